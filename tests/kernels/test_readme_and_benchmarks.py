"""The README's example runs as it stands; the benchmark scripts run, and what they compare computes the same thing."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def test_the_example_trains():
    blocks = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), flags=re.DOTALL)
    example = next(block for block in blocks if "Qwen3ForCausalLM" in block)
    losses = []
    names = {"losses": losses}
    exec(compile(example.replace("    loss.backward()\n", "    loss.backward()\n    losses.append(loss.item())\n"), "README.md", "exec"), names)
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert names["aux"]["kl"].shape == (24,)


def test_the_table_of_tests_names_tests_that_exist():
    section = (KERNELS / "README.md").read_text().split("## The 21 tests")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 22))
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", section)
    assert len(named) > 30 and all(f"def {name}(" in sources for name in named)


def test_every_table_runs_and_agrees_with_fp64(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(KERNELS / "benchmarks")
    gpu = importlib.import_module("gpu")
    tables = gpu.tables(gpu.plan(True, "cpu"), 1, name="check", folder=tmp_path)
    assert [table["task"] for table in tables] == [
        "sparse forward KL with tail", "top-k scoring with tail and entropy", "dense JSD between two heads", "one label a token"
    ]  # fmt: skip
    rows = {(table["task"], row["system"]): row for table in tables for row in table["rows"]}
    ours = {key: row for key, row in rows.items() if key[1] in ("composable", "fused", "ours_recompute", "ours_in_forward", "topk_logprobs")}
    assert len(ours) == 7 and all("seconds" in row for row in ours.values()), ours
    assert all(row["errors"][key] < 1e-5 for row in ours.values() if row["errors"] for key in ("loss", "d_hidden", "d_weight"))
    measured = [row for row in rows.values() if row.get("errors")]
    assert all(row["errors"]["d_hidden"] < 1e-3 for row in measured)  # every system computes the same task
    assert '"machine"' in (tmp_path / "check.json").read_text()
    late = gpu.tables(gpu.plan(True, "cpu"), 1, minutes=-1.0)
    assert all("skipped" in table for table in late)  # a run that is out of time says what it left out


@pytest.mark.slow
def test_what_runs_on_a_gpu_in_one_command_runs_here_at_tiny_sizes():
    """All steps but the tables, whose numbers the test above looks at; a step that fails is told at the end, and by the exit status."""
    command = [sys.executable, str(KERNELS / "benchmarks/on_a_gpu.py"), "--check"]
    run = subprocess.run([*command, "tests", "findings", "memcheck", "plot", "parts", "fused"], capture_output=True, text=True, timeout=300)
    summary = [line.split(maxsplit=3) for line in run.stdout.splitlines()[-6:]]
    assert [(line[0], line[3]) for line in summary] == [
        ("tests", "ok"), ("findings", "ok"), ("memcheck", "left out: only a GPU has anything to check here"), ("plot", "ok"), ("parts", "ok"),
        ("fused", "ok"),
    ], run.stdout[-2000:] + run.stderr[-2000:]  # fmt: skip
    assert run.returncode == 0


def test_a_failing_step_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(KERNELS / "benchmarks"))
    module = importlib.import_module("on_a_gpu")
    fails = module.Step(why="fails", command=[], check=lambda _: [sys.executable, "-c", "import sys; sys.exit(3)"], minutes=1)
    hangs = module.Step(why="hangs", command=[], check=lambda _: [sys.executable, "-c", "import time; time.sleep(60)"], minutes=0.01)
    passes = module.Step(why="passes", command=[], check=lambda _: [sys.executable, "-c", ""], minutes=1)
    monkeypatch.setattr(module, "STEPS", {"fails": fails, "hangs": hangs, "passes": passes})
    monkeypatch.setattr(sys, "argv", ["on_a_gpu.py", "--check"])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 1
    ends = [line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert ends == ["failed: exit status 3", "failed: longer than 0.01 minutes", "ok"]
    monkeypatch.setattr(sys, "argv", ["on_a_gpu.py", "nonsense"])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 2
