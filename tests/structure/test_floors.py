"""Who may import whom: upward edges, cycles, late imports and third-party imports outside their home fail here."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"opd": ROOT / "opd", "opd_rollout": ROOT / "rollout/opd_rollout", "opd_kernels": ROOT / "kernels/opd_kernels"}

FLOORS = [  # lowest first; a module may import its own floor and below; a module of a package stands where its package does, unless it is named
    {"opd_kernels"},
    {"opd_rollout"},
    {"opd.config", "opd.errors", "opd.launcher", "opd.pooling", "opd.stop", "opd.types"},
    {"opd.contexts", "opd.credit", "opd.evidence", "opd.objective", "opd.tasks", "opd.text", "opd.verify", "opd.views"},
    {
        "opd.accuracy",
        "opd.build",
        "opd.data",
        "opd.guard",
        "opd.launcher.beacon",
        "opd.launcher.machines",
        "opd.launcher.ranks",
        "opd.launcher.watch",
        "opd.learner",
        "opd.prompts",
        "opd.randomness",
        "opd.run",
        "opd.teacher",
    },
    {
        "opd.ahead",
        "opd.eval",
        "opd.guard.action",
        "opd.loop",
        "opd.loop_async",
        "opd.replay_buffer",
        "opd.replaying",
        "opd.revising",
        "opd.run.training",
        "opd.sampler",
        "opd.source",
        "opd.writing",
    },
    {"opd.build.problems", "opd.build.stored", "opd.build.student"},
    {"opd.build.speaking"},
    {
        "opd",
        "opd.__main__",
        "opd.api",
        "opd.build.actors",
        "opd.build.audit",
        "opd.build.system",
        "opd.build.views",
        "opd.building_blocks",
        "opd.cli",
        "opd.comparison",
        "opd.diagnosis",
        "opd.examination",
        "opd.help",
        "opd.launcher.driver",
        "opd.launcher.rank",
        "opd.overview",
        "opd.preflight",
        "opd.reference",
        "opd.replaying.freezing",
        "opd.replaying.replay",
        "opd.publishing",
        "opd.reports",
        "opd.scoring",
        "opd.timing",
        "opd.viewer",
    },
]
HOMES = {  # third-party package -> modules that may import it
    "triton": {"opd_kernels.row_kernels", "opd_kernels.selection_kernels", "opd_kernels.triton"},
    "deepspeed": {"opd.learner.deepspeed"},
    "transformers": {
        "opd.text.chat",
        "opd.build",
        "opd.examination.speaker",
        "opd.preflight.facts",
        "opd.preflight.memory",
        "opd.text.bpe",
        "opd.text.standin",
        "opd.learner",
        "opd.tasks.tokenizer",
        "opd_rollout.torch_engine",
        "opd_rollout.backbone",
        "opd_rollout.cache",
        "opd_rollout.lean_decoding",
    },
    "tokenizers": {"opd.text.bpe", "opd.text.standin", "opd.tasks.tokenizer"},
    "liger_kernel": {"opd.build.fused"},
    "peft": {"opd.build", "opd.learner"},
    "pyarrow": {"opd.data.tables"},
    "datasets": {"opd.data.tables", "opd.comparison.outside"},
    "math_verify": {"opd.verify.math"},
    "regex": {"opd.verify.patterns"},
    "huggingface_hub": {"opd.build.pretrained", "opd.preflight.hub", "opd.publishing"},
    "wandb": {"opd.run.offline", "opd.run.track"},
    "matplotlib": {"opd.comparison", "opd.viewer"},
    "jinja2": {"opd.comparison", "opd.viewer", "opd.diagnosis"},
    "trl": {"opd.comparison.outside"},
    "ray": {"opd_rollout.vllm", "opd_rollout.weight_sync", "opd_rollout.dispatch", "opd_rollout.actor_states", "opd.launcher.driver"},
    "vllm": {"opd_rollout.vllm", "opd_rollout.weight_sync", "opd.launcher.driver"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            dotted = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            if "_recipes" not in dotted:
                found[dotted] = path
    return found


def imports(path: Path, dotted: str, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{dotted}: relative import"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else str(node.module) for a in node.names}
    return found


def floor(dotted: str) -> int:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, names in enumerate(FLOORS):
            if prefix in names and (prefix != "opd" or dotted == "opd"):
                return number
    raise AssertionError(f"{dotted} stands on no floor: add it to FLOORS")


MODULES = modules()


def test_no_upward_edge_and_no_cycle():
    graph = {}
    for dotted, path in MODULES.items():
        ours = {name for name in imports(path, dotted, set(MODULES)) if name.split(".")[0] in PACKAGES}
        upward = {name for name in ours if floor(name) > floor(dotted)}
        assert not upward, f"{dotted} imports upward: {upward}"
        graph[dotted] = {name for name in ours if name in MODULES and name != dotted}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def names_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_every_imported_name_exists():
    """What two changes that never met each other would break; without importing anything."""
    names = {dotted: names_of(path) for dotted, path in MODULES.items()}
    for dotted, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in names:
                missing = [a.name for a in node.names if a.name not in names[node.module] and f"{node.module}.{a.name}" not in names]
                assert not missing, f"{dotted} imports {missing} from {node.module}, which has no such name"


def test_teacher_and_learner_do_not_know_each_other():
    for dotted, path in MODULES.items():
        names = imports(path, dotted, set(MODULES))
        if dotted.startswith("opd.teacher"):
            assert not [n for n in names if n.startswith("opd.learner")], dotted
        if dotted.startswith("opd.learner"):
            assert not [n for n in names if n.startswith("opd.teacher")], dotted


@pytest.mark.parametrize("package", sorted(HOMES))
def test_third_party_packages_stay_at_home(package):
    for dotted, path in MODULES.items():
        if any(name.split(".")[0] == package for name in imports(path, dotted, set(MODULES))):
            assert any(dotted == home or dotted.startswith((home + ".", home + "_")) for home in HOMES[package]), f"{dotted} imports {package}"


def test_no_import_inside_functions_except_in_build():
    for dotted, path in MODULES.items():
        if dotted == "opd.build.system":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                late = [n.lineno for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
                assert not late, f"{path}:{late}"


def test_sizes():
    for dotted, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} is longer than 400 lines"
        limit = 150 if dotted.startswith("opd_kernels") else 60
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno + 1 <= limit, f"{path}:{node.lineno} {node.name}"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_plain_kernels_and_rollout_are_not_importable():
    assert run_python("import importlib.util as u; print(u.find_spec('kernels'), u.find_spec('rollout'))") == "None None"


def test_config_and_command_line_load_without_torch():
    assert run_python("import sys, opd.config.load, opd.cli; print('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"
