"""What opd publish writes, that it loads and says the truth, and what happens on the way to the hub (which is a fake here)."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import publishing
from opd.api import train
from opd.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish") / "lora-run"
    changes = {
        "model.lora": {"rank": 4}, "steps": 2, "optimizer.lr": 1e-2, "rollout.prompts": 4, "eval.num_problems": 4, "eval.final_problems": 16,
        "eval.final_samples": 2, "track.wandb": "disabled", "learner.kind": "torch", "model.path": str(ROOT / "models/expr-base"),
    }  # fmt: skip
    return train(str(ROOT / "recipes/runs/grpo_expr.yaml"), changes, folder, quiet=True)


def test_the_folder_loads_with_adapters_merged_and_the_card_says_what_was_done(run):
    said = publishing.publish(str(run))
    out = run / "published"
    assert said == f"{out}: weights, tokenizer and model card; push it with repo=OWNER/NAME"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models/expr-base")
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in base.named_parameters()} and not any("lora" in name for name in names)
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(weight), base.get_parameter(weight))
    ids = tokenizer("1+2", return_tensors="pt")["input_ids"]
    chosen = AutoModelForCausalLM.from_pretrained(run / "model")
    torch.testing.assert_close(model(ids).logits, chosen(ids).logits, atol=0, rtol=0)
    card = (out / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["opd", "grpo"]}
    assert "| adapters | LoRA, rank 4, merged |" in body and "| steps | 2 of 4 prompts x 8 |" in body and "from `expr-base`" in body
    [row] = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines() if '"test"' in line and "temperature 1.0" in line]
    low, high = row["interval"]
    assert f"| expr, test | temperature 1.0, k = 2 | {100 * row['avg@k']:.1f} ({100 * low:.1f} to {100 * high:.1f}) |" in body
    assert "dev" not in body.replace("develop", "")
    for file in (out / "README.md", out / "opd.json"):
        assert str(ROOT) not in file.read_text() and str(run.parent) not in file.read_text()
    assert json.loads((out / "opd.json").read_text())["recipe"]["model"]["path"] == "expr-base"
    assert publishing.publish(str(run)).startswith(str(out))  # again, over its own folder


def test_the_adapter_alone_on_its_base_is_the_merged_model(run, tmp_path):
    out = tmp_path / "adapter"
    said = publishing.publish(str(run), {"adapter": True, "out": str(out)})
    assert said == f"{out}: adapters, tokenizer and model card; push it with repo=OWNER/NAME"
    assert not list(out.glob("model*")) and not (out / "config.json").exists()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "expr-base"
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models/expr-base")
    tokenizer, merged = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(run / "model")
    ids = tokenizer("1+2", return_tensors="pt")["input_ids"]
    before = base(ids).logits
    found = PeftModel.from_pretrained(base, out)(ids).logits
    assert (found - merged(ids).logits).abs().max() < 1e-5 < (found - before).abs().max()
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "LoRA, rank 4, alone" in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("expr-base")' in card
    publishing.publish(str(run), {"out": str(tmp_path / "merged")})
    assert not (tmp_path / "merged/adapter").exists() and (tmp_path / "merged/model.safetensors").is_file()


def test_a_push_uploads_the_folder_and_private_is_the_default(run, monkeypatch):
    calls = []
    monkeypatch.setattr(publishing.huggingface_hub, "get_token", lambda: "fake")
    monkeypatch.setattr(publishing.huggingface_hub, "whoami", lambda: {"name": "fake-user"})
    monkeypatch.setattr(publishing.huggingface_hub, "create_repo", lambda repo, **options: calls.append((repo, options)))
    monkeypatch.setattr(publishing.huggingface_hub, "upload_folder", lambda **options: calls.append(options) or "https://fake/me/model")
    said = publishing.publish(str(run), {"repo": "me/model", "out": str(run.parent / "out")})
    assert said.endswith("out -> https://fake/me/model")
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True}) and calls[1]["repo_id"] == "me/model"
    assert 'from_pretrained("me/model")' in (run.parent / "out/README.md").read_text()

    def refused(repo, **options):
        raise OSError("403 Forbidden\nmore")

    monkeypatch.setattr(publishing.huggingface_hub, "create_repo", refused)
    with pytest.raises(ValueError, match="the hub refused .403 Forbidden.: may the token write there"):
        publishing.publish(str(run), {"repo": "me/model", "out": str(run.parent / "out")})
    monkeypatch.setattr(publishing.huggingface_hub, "whoami", lambda: refused("x"))
    with pytest.raises(ValueError, match="does not accept the login or cannot be reached"):
        publishing.publish(str(run), {"repo": "me/model"})


def test_what_cannot_be_published_is_named(run, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(publishing.huggingface_hub, "get_token", lambda: None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/resolved.json").write_text("{}")
    cases = [
        ([str(run), "repo=me/model"], "nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN"),
        ([str(run), "repo=model"], "write repo=OWNER/NAME"),
        ([str(run), "repo=me/model", "private=maybe"], "write private=true or private=false"),
        ([str(run), "rep=me/model"], "unknown option 'rep'; options: out, repo, private, adapter"),
        ([str(run), "adapter=1"], "write adapter=true or adapter=false"),
        ([str(tmp_path / "none")], "/none does not exist"),
        ([str(tmp_path / "half")], "has no model/ yet: finish the run first"),
        ([str(run), f"out={tmp_path / 'mine'}"], "exists and was not written by opd publish"),
    ]
    for words, message in cases:
        assert main(["publish", *words]) == 2 and message in capfd.readouterr().err, words
