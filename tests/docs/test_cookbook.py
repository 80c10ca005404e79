"""Plans that the pages quote are those of `opd check`. Every command of the cookbook is run by test_documents.py (blocks marked bash), or says
that it needs a GPU; those load all the same.
"""

import re
import shlex
from pathlib import Path

import pytest

from opd.comparison.config import load_comparison
from opd.config.load import parse_overrides
from opd.config.stages import read_stages
from opd.preflight.report import examine

ROOT = Path(__file__).resolve().parents[2]
COOKBOOK = sorted((ROOT / "docs/cookbook").glob("*.md"))
NEEDS_GPU = re.compile(r"needs? (a|one|the) GPU|eight GPUs", re.IGNORECASE)
BY_MAKE = ("opd compare recipes/compare/demo.yaml", "make words")  # minutes to hours; targets of the Makefile
STARTS_FROM_A_RUN = "_words"  # tests/build/test_words_runs.py


def untested(page):
    """(command, what is said of it: its comment, the paragraph before its block, the page's first) of every block that no test runs."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if block[1] not in ("", "text"):
            continue
        paragraphs = [part for part in text[: block.start()].split("\n\n") if part.strip()]
        for line in block[2].splitlines():
            command, _, comment = line.partition("#")
            if command.strip().startswith(("opd ", "python ", "make ")):
                yield command.strip(), " ".join([comment, paragraphs[-1], paragraphs[1]])


ALL = [(page, command, said) for page in COOKBOOK for command, said in untested(page)]


def test_the_pages_that_were_asked_for_are_there_and_have_commands_that_run():
    names = {page.stem for page in COOKBOOK}
    assert {"distil_8b_into_1.7b", "self_distil_with_solutions", "compare_grpo_with_opsd", "bring_data_and_verifier", "out_of_memory"} <= names
    assert "read_the_board" in names
    for page in COOKBOOK:
        assert "\n```bash\n" in page.read_text(encoding="utf-8"), f"{page.name}: nothing that a test runs"


@pytest.mark.parametrize(("page", "command", "said"), ALL, ids=lambda value: value.stem if isinstance(value, Path) else None)
def test_what_no_test_runs_says_that_it_needs_a_gpu(page, command, said):
    by_make = command in BY_MAKE and command.removeprefix("make ") in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert by_make or NEEDS_GPU.search(said), f"{page.name}: {command!r} is in a block that no test runs and does not say that it needs a GPU"


@pytest.mark.parametrize("command", sorted({command for _, command, _ in ALL if command.startswith("opd ") and STARTS_FROM_A_RUN not in command}))
def test_commands_for_a_gpu_load_and_fit_it(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, verb, reference, *overrides = shlex.split(command)
    if verb == "compare":
        assert load_comparison(reference, overrides).arms
        return
    assert verb in ("train", "check"), f"{command}: teach this test what to check"
    for recipe in read_stages(reference, parse_overrides(overrides)):
        found, plan = examine(recipe)
        assert [finding.sentence for finding in found if finding.severity == "error"] == [] and plan is not None
        assert plan.bytes <= plan.device.memory


@pytest.mark.parametrize("page", COOKBOOK, ids=lambda page: page.stem)
def test_recipes_named_in_the_text_exist(page):
    for named in re.findall(r"`opd \w+ (recipes/[\w./]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / named).is_file(), named


ONE_GPU = re.findall(r"^\|.*\| `([^`]+)`.*\| (\d+) GiB \|$", (ROOT / "docs/one_gpu.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize(("words", "said"), ONE_GPU)
def test_planned_memory_on_one_gpu_is_what_check_says(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, *overrides = shlex.split(words)
    [recipe] = read_stages(name, parse_overrides(overrides))
    _, plan = examine(recipe)
    assert plan is not None and round(plan.bytes / 2**30) == int(said)
