"""Every command of README and docs is run, every generated page is up to date, every link leads somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from opd.building_blocks import PLACES, building_blocks
from opd.reference import comparison_reference, guard_rails, recipe_reference, shipped_recipes, with_table
from opd.timing.scaling import with_tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "kernels").glob("README.md")])
SHORTER = {  # what makes a command of the documents short enough for a test; its words stay as they are
    "train": ["steps=2", "eval.num_problems=8", "eval.final_problems=8", "eval.final_samples=2", "rollout.prompts=4", "track.wandb=disabled"],
    "eval": ["eval.final_problems=8", "eval.final_samples=2"],
    "diagnose": ["diagnose.problems=4", "diagnose.rollouts=2", "diagnose.nodes=2"],
    "compare": ["seeds=[0]", "eval.num_problems=8", "eval.final_problems=8", "budget.generated_tokens=300", "workers=1"],
}
OWN_NAMES = "main|distill|policy|nll|answer|steps|rollout|views|prepare|teacher|join|learn|sync|step"  # of signals, terms, parts and phases
NEEDS_MORE = ("make ", "pip install", "python kernels/benchmarks", "python benchmarks", "opd compare recipes/compare")  # make test is this test


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    for name in ("recipes", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "FILE.jsonl").write_text((ROOT / "tests/data/gsm8k_like.jsonl").read_text())
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_runs(page: Path, workplace: Path):
    for language in ("python", "yaml"):
        for block in blocks(page, language):
            if named := re.match(r"# (\S+\.(?:py|yaml))\n", block):
                (workplace / named[1]).write_text(block)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for line in commands(page):
        if line.startswith(NEEDS_MORE):
            continue
        words = shlex.split(line)
        given = {word.partition("=")[0] for word in words}
        more = [word for word in SHORTER.get(words[1], []) if word.partition("=")[0] not in given] if words[0] == "opd" and len(words) > 2 else []
        done = subprocess.run([*words, *more], cwd=workplace, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_the_python_example_of_the_readme_runs(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("opd.train", lambda *a, **k: trained(*a, **k), raising=False)
    from opd.api import train

    def trained(recipe, overrides, **more):
        return train(
            recipe, {**overrides, "steps": 2, "eval.num_problems": 0, "eval.final_problems": 0, "track.wandb": "disabled"}, quiet=True, **more
        )

    block = next(block for block in blocks(ROOT / "README.md", "python") if "opd.train" in block)
    space: dict = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), space)
    assert (space["folder"] / "metrics.jsonl").read_text().count("\n") == 2


def test_generated_pages_are_up_to_date():
    assert (ROOT / "docs/recipe_reference.md").read_text() == recipe_reference(), "run: python -m opd.reference"
    assert (ROOT / "docs/comparison_reference.md").read_text() == comparison_reference(), "run: python -m opd.reference"
    assert (ROOT / "docs/building_blocks.md").read_text() == building_blocks(), "run: python -m opd.reference"
    assert (ROOT / "docs/recipes.md").read_text() == shipped_recipes(), "run: python -m opd.reference"
    page = (ROOT / "docs/methods.md").read_text()
    assert page == with_table(page), "run: python -m opd.reference"
    assert (ROOT / "docs/guard_rails.md").read_text() == guard_rails(), "run: python -m opd.reference"


def test_every_building_block_says_what_it_does_and_its_parameters_are_known():
    for heading, (_, table, _) in PLACES.items():
        for name, function in table.items():
            assert (function.__doc__ or "").strip(), f"{heading}: {name} has no docstring"
    page = building_blocks()
    assert "| `ppo_clip` | `low=0.2` a number at least 0 and at most 1<br>`high=0.2` a number above 0<br>" in page
    assert "| `student_topk` | `k` a whole number at least 1<br>`tail=bucket` bucket \\| renormalise \\| drop<br>`sampled=false` true or" in page
    assert "<class" not in page and "typing" not in page and "collections.abc" not in page


def test_every_method_has_a_paragraph_and_every_paragraph_a_method():
    found = re.findall(r"^\*\*`(\w+)`\*\*", (ROOT / "docs/methods.md").read_text(), flags=re.MULTILINE)
    methods = sorted(path.stem for path in (ROOT / "recipes/methods").glob("*.yaml"))
    assert sorted(found) == methods


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_metric_of_a_run_is_documented(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    from opd.api import train
    from opd.run.folder import read_lines

    text = (ROOT / "docs/metrics.md").read_text()
    small = {"steps": 1, "eval.num_problems": 0, "eval.final_problems": 0, "track.wandb": "disabled", "rollout.prompts": 2}
    for recipe in ("opsd_expr", "hybrid_expr", "sft_expr"):
        folder = train(f"recipes/runs/{recipe}.yaml", small, workplace / recipe, quiet=True)
        for name in next(read_lines(folder / "metrics.jsonl")):
            pattern = re.sub(rf"(?<=/)({OWN_NAMES})(?=\b|_)", "<.*?>", name)
            assert re.search(rf"`{pattern}`|`{re.escape(name)}`|{re.escape(name.removeprefix('seconds/'))}", text), (
                f"{name} is not in docs/metrics.md"
            )


def test_the_tables_of_the_scaling_page_are_up_to_date():
    page = (ROOT / "docs/scaling.md").read_text()
    assert page == with_tables(page), "run: python -m opd.timing.scaling"
