"""The README's example runs as it stands; the benchmark scripts run, and what they compare computes the same thing."""

import importlib
import re
from pathlib import Path

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
