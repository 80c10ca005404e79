import json
import re
import shutil
import subprocess

import pytest
import torch
from fake_samples import WordTokenizer, fake_contexts, fake_sample

from opd.api import train
from opd.cli import main
from opd.config.load import parse_recipe
from opd.run.folder import read_lines
from opd.text.token_class import CLASSES
from opd.viewer.difference import first_difference, first_token, pair_up
from opd.viewer.modes import modes_of, values_of
from opd.viewer.page import packed, unpacked, write_viewer
from opd.viewer.record import write_samples


def make_run(folder, *, shift=0, steps=(25, 50, 75)):
    for step in steps:
        path = folder / "samples" / f"step-{step:06d}.jsonl"
        samples = [fake_sample(n, seed=step + (shift if step > 25 else 0)) for n in range(16)]
        columns = {"loss/total": torch.linspace(-1, 1, 18), "loss/grpo": torch.full((18,), float("nan"))}
        write_samples(path, step, samples, tokenizer=WordTokenizer(), num_samples=8, contexts=fake_contexts, columns=lambda n, c=columns: c)
    rows = [{"step": step, "loss/total": step / 7 + (shift if step > 25 else 0), "reward/mean": 0.5, "seconds/step": shift} for step in range(1, 76)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "first")


def script(page, name):
    return re.search(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL).group(1)


def contents(page):
    """(page facts, index, every detail) as the browser unpacks them."""
    facts, index = json.loads(script(page, "page")), unpacked(script(page, "index"))
    count = len(re.findall(r'id="chunk-\d+"', page))
    return facts, index, [detail for n in range(count) for detail in unpacked(script(page, f"chunk-{n}"))]


def test_the_page_holds_every_sample_and_nothing_from_outside(run):
    page = write_viewer(run).read_text()
    facts, index, details = contents(page)
    assert [row["step"] for row in index] == [25] * 8 + [50] * 8 + [75] * 8 and len(details) == 24
    assert index[0]["question"] == "(3+0)*2</script>"
    assert all(len(detail["tokens"]) == row["length"] == 18 for row, detail in zip(index, details, strict=True))
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", page)
    assert facts["classes"] == list(CLASSES) and facts["difference"] is None


def test_names_cannot_end_the_script(tmp_path):
    folder = make_run(tmp_path / "a<script>alert(1)<")
    page = write_viewer(folder).read_text()
    assert "<script>alert" not in page and contents(page)[0]["runs"] == ["a<script>alert(1)<"]


def test_large_runs_leave_out_middle_steps_and_say_so(run):
    size = (run / "samples" / "step-000025.jsonl").stat().st_size
    page = write_viewer(run, max_bytes=int(2.5 * size)).read_text()
    assert {row["step"] for row in contents(page)[1]} == {25, 75}
    assert "1 sample file left out for size" in page


def test_mass_is_the_absolute_loss_by_token_class(run):
    _, index, details = contents(write_viewer(run).read_text())
    for row, detail in zip(index, details, strict=True):
        by_hand = [0.0] * len(CLASSES)
        for place, value in zip(detail["classes"], detail["columns"]["loss/total"], strict=True):
            by_hand[place] += abs(value)
        assert row["mass"] == pytest.approx(by_hand, abs=1e-6) and sum(row["tokens_of"]) == 18


def test_modes_have_numbers_and_scales(run):
    facts, _, details = contents(write_viewer(run).read_text())
    modes = {mode["name"]: mode for mode in facts["modes"]}
    wanted = {"teacher − student log-prob", "teacher mass outside its top-k", "student entropy", "loss/total", "advantage grpo", "token class"}
    assert wanted <= modes.keys()
    assert "loss/grpo" not in modes, "nothing is known of it"
    gap = modes["teacher − student log-prob"]
    detail = details[0]
    by_hand = [q - p for q, p in zip(detail["signals"]["main"]["logp"], detail["student_logp"], strict=True)]
    assert values_of(detail, gap) == pytest.approx(by_hand)
    everything = sorted(abs(value) for one in details for value in values_of(one, gap))
    assert gap["scale"] == pytest.approx(everything[int(0.97 * (len(everything) - 1))])
    assert modes_of(details)[-1]["kind"] == "category"


def test_two_runs_say_where_they_part(run, tmp_path):
    other = make_run(tmp_path / "second", shift=1)
    facts, index, _ = contents(write_viewer(run, other=other).read_text())
    difference = facts["difference"]
    assert (difference["step"], difference["steps"], difference["differing"]) == (26, 75, 1)
    assert difference["metrics"] == [["loss/total", 26 / 7, 26 / 7 + 1]], "times are no difference, and what is equal is not shown"
    assert all(row["differs"] == -1 for row in index if row["step"] == 25)
    assert all(row["differs"] >= 0 for row in index if row["step"] > 25)
    for n, row in enumerate(index):
        partner = index[row["pair"]]
        assert partner["run"] != row["run"] and partner["pair"] == n and partner["prompt_id"] == row["prompt_id"]
    assert first_difference(run, run) == {"steps": 75, "step": None, "metrics": [], "differing": 0}


def test_first_token():
    assert first_token(["a", "b"], ["a", "b"]) == -1 and first_token(["a", "b"], ["a", "c"]) == 1
    assert first_token(["a"], ["a", "b"]) == 1 and first_token([], []) == -1
    assert pair_up([{"step": 1, "prompt_id": "p", "group": 0, "member": 0, "run": 0, "tokens": []}]) == {}


def test_old_samples_without_the_new_columns_open(run):
    for path in (run / "samples").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            for name in ("columns", "classes", "versions"):
                del row[name]
            for signal in row["signals"].values():
                del signal["tail"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, index, details = contents(write_viewer(run).read_text())
    assert index[0]["mass"] is None and len(details[0]["classes"]) == 18


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "a name is missing"),
        (["inspect", "EMPTY"], "EMPTY is no run folder"),
        (["inspect", "RUN", "other=EMPTY"], "EMPTY is no run folder"),
        (["inspect", "RUN", "step=3"], "unknown option 'step'"),
    ],
)
def test_mistakes_are_explained(run, tmp_path, monkeypatch, words, message, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir(exist_ok=True)
    assert main([str(run) if word == "RUN" else word for word in words]) == 2
    assert message in capfd.readouterr().err


def test_the_script_parses(run, tmp_path):
    node = shutil.which("node")
    code = re.search(r"<script>\n(.*?)</script>", write_viewer(run).read_text(), re.DOTALL).group(1)
    assert code.count("{") == code.count("}") and code.count("(") == code.count(")")
    if node:
        (tmp_path / "page.js").write_text(code)
        checked = subprocess.run([node, "--check", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=30, check=False)
        assert checked.returncode == 0, checked.stderr


def test_packing_is_reversible():
    assert unpacked(packed({"a": [1, None, "é<"]})) == {"a": [1, None, "é<"]}


def test_the_losses_of_all_tokens_add_up_to_the_steps_loss(tmp_path):
    """Two minibatches, two epochs, an answer shorter than the others: what is shown is what the update saw."""
    torch.set_num_threads(1)
    recipe = {
        "view": "facts", "teacher": "frozen", "objective": [{"nll": {}}, {"distill": "jsd", "support": "full"}],
        "group": 2, "steps": 2, "rollout": {"prompts": 5}, "sampling": {"max_tokens": 9},
        "model": {"shape": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}},
        "data": {"task": "expr"}, "learner": {"kind": "torch", "token_budget": 64}, "optimizer": {"lr": 1e-2},
        "eval": {"every": 0, "num_problems": 0, "final_problems": 0}, "track": {"wandb": "disabled", "samples_every": 1, "samples": 99},
    }  # fmt: skip
    folder = train(parse_recipe(recipe), folder=tmp_path / "r", quiet=True)
    for row in read_lines(folder / "metrics.jsonl"):
        shown = list(read_lines(folder / "samples" / f"step-{row['step']:06d}.jsonl"))
        assert len(shown) == 10
        total = sum(value for one in shown for value in one["columns"]["loss/total"])
        assert total == pytest.approx(row["loss/total"], abs=1e-5) and row["loss/total"] > 1
        for one in shown:
            assert len(one["columns"]["loss/total"]) == len(one["tokens"]) and one["versions"][0][2] == len(one["tokens"])
