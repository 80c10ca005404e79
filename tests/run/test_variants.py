"""What a recipe may switch on, end to end: learners, precision, packing, checkpointing, LoRA, filters, stages, verifiers, padded teachers."""

import json
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.build.pretrained import new_config
from opd.cli import main
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer

torch.set_num_threads(1)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
RECIPE = {
    "method": "opsd",
    "model": {"shape": SHAPE},
    "data": {"task": "expr"},
    "rollout": {"prompts": 4},
    "sampling": {"max_tokens": 12},
    "steps": 3,
    "optimizer": {"lr": 1e-2},
    "eval": {"every": 0, "num_problems": 0, "final_problems": 0},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled"},
}
FIXED = {"rollout": {"prompts": 4, "source": {"dataset": "solution"}}}  # answers from the data: variants cannot drift apart by sampling


def recipe(name="r", **keys):
    """RECIPE with keys merged over it, as a file."""
    merged = {**RECIPE, **{key: {**RECIPE[key], **value} if isinstance(RECIPE.get(key), dict) else value for key, value in keys.items()}}
    with open(f"{name}.yaml", "w") as file:
        yaml.safe_dump({**merged, "name": name}, file)
    return f"{name}.yaml"


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def column(name, metric="loss/total"):
    return torch.tensor([row[metric] for row in lines(f"runs/{name}/metrics.jsonl")], dtype=torch.float64)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_learner_precision_packing_and_memory_settings_do_not_change_the_method(here):
    variants = {
        "plain": {},
        "deepspeed": {"learner": {"kind": "deepspeed"}},
        "packed": {"learner": {"packed": True}},
        "recomputed": {"model": {"shape": SHAPE, "gradient_checkpointing": True}},
        "one_by_one": {"learner": {"token_budget": 20, "chunk_bytes": 4096}, "engine": {"token_budget": 64}},
        "eager": {"model": {"shape": SHAPE, "attention": "eager"}},
    }
    for name, keys in variants.items():
        opd.train(recipe(name, **{**FIXED, **keys}), quiet=True)
    plain = column("plain")
    assert (plain > 1e-4).all() and len(set(plain.tolist())) == 3
    for name in variants:
        torch.testing.assert_close(column(name), plain, rtol=2e-4, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    opd.train(recipe("bf16", **FIXED, model={"shape": SHAPE, "dtype": "bfloat16"}), quiet=True)
    torch.testing.assert_close(column("bf16"), plain, rtol=0.2, atol=0)
    assert load_file("runs/bf16/model/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_lora_trains_adapters_only_and_its_frozen_teacher_is_the_adapter_switched_off(here, kind):
    lora = {"shape": SHAPE, "lora": {"rank": 2, "alpha": 4}}
    opd.train(recipe("sft", method="sft", steps=2), quiet=True)
    opd.train(recipe("same", view="plain", init="runs/sft", model=lora, learner={"kind": kind}, steps=1), quiet=True)
    assert column("same").abs().max() < 1e-7  # nats, in fp32  # nothing to teach: same weights, same context
    opd.train(recipe("lora", init="runs/sft", model=lora, learner={"kind": kind}), quiet=True)
    assert (column("lora") > 1e-6).all() and (column("lora", "gradient_norm") > 0).all()
    before, after = load_file("runs/sft/model/model.safetensors"), load_file("runs/lora/model/model.safetensors")
    assert before.keys() == after.keys()  # merged: a plain model
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained("runs/lora/model"), AutoTokenizer.from_pretrained("runs/lora/model")
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer) and tokenizer.chat_template


def test_every_checkpoint_holds_a_complete_model_folder(here):
    opd.train(recipe(), quiet=True)
    folder = "runs/r/checkpoints/step-000003/model"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id is not None


def by_length(prompt, text):
    return float(len(text) % 2)


def test_groups_of_equal_rewards_are_dropped_refilled_and_paid_for(here):
    keys = {"method": "dapo", "group": 2, "rollout": {"prompts": 4, "filter": "mixed_groups", "max_refill": 3}, "updates": {"minibatches": 2}}
    opd.train(recipe(**keys), verifier=by_length, quiet=True)
    rows = lines("runs/r/metrics.jsonl")
    assert sum(row["tokens/discarded"] for row in rows) > 0 and max(row["rollout/rounds"] for row in rows) > 1
    assert rows[-1]["tokens/student"] >= sum(row["tokens/discarded"] for row in rows) + rows[-1]["tokens/learner"] * 0.3
    assert json.load(open("runs/r/resolved.json"))["verifier"] == "by_length"


def test_a_function_judges_in_the_place_of_the_recipes_verifier(here):
    seen = []

    def always(prompt, text):
        seen.append(prompt.id)
        return 1.0

    folder = opd.train(recipe(eval={"num_problems": 2, "final_problems": 2, "final_samples": 2}), verifier=always, quiet=True)
    assert str(folder) == "runs/r" and column("r", "accuracy/train").tolist() == [1.0, 1.0, 1.0] and len(set(seen)) == 3 * 4 + 2 + 2
    assert [row["avg@k"] for row in lines("runs/r/eval.jsonl")] == [1.0] * 4


def test_stages_of_one_file_follow_each_other_and_the_second_starts_from_the_firsts_model(here, capfd):
    text = {**RECIPE, "stages": [{"name": "sft", "method": "sft", "steps": 2}, {"name": "opsd", "steps": 2, "optimizer": {"lr": 1e-12}}]}
    with open("chain.yaml", "w") as file:
        yaml.safe_dump(text, file)
    assert main(["train", "chain.yaml", "name=both", "stages.0.steps=1"]) == 0
    assert len(lines("runs/both/sft/metrics.jsonl")) == 1 and len(lines("runs/both/opsd/metrics.jsonl")) == 2
    first, second = (load_file(f"runs/both/{stage}/model/model.safetensors") for stage in ("sft", "opsd"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-9)
    assert json.load(open("runs/both/opsd/resolved.json"))["recipe"]["init"] == "runs/both/sft"
    before = os.stat("runs/both/sft/status.json").st_mtime_ns
    assert main(["train", "chain.yaml", "name=both", "stages.0.steps=1"]) == 0 and os.stat("runs/both/sft/status.json").st_mtime_ns == before
    capfd.readouterr()
    assert main(["show", "chain.yaml"]) == 0
    shown = capfd.readouterr().out
    assert shown.count("with every default filled in") == 2 and "max_position" not in shown and "zero_stage: 0" in shown
    for words, said in {
        "stages=[{name: a}, {name: a}]": "a name of its own",
        "name=both stages.sft.steps=3": "runs/both/sft cannot go on to 3 steps: runs/both/opsd has started from its model",
        "name=both stages.sft.steps=1 stages.opsd.group=3": "runs/both/opsd holds a run of another recipe: group: ",
        "name=new stages.rl.steps=3": "stages.rl.steps: no such stage; write one of stages.sft, stages.opsd (or stages.0 ... stages.1) and a key",
        "name=new stages.2.steps=3": "stages.2.steps: no such stage",
        "name=new stages.sfd.steps=3": "no such stage (did you mean 'sft'?)",
        "name=new stages.sft=3": "no such stage",
    }.items():
        assert main(["train", "chain.yaml", *([words] if "[" in words else words.split())]) == 2, words
        err = capfd.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert not os.path.exists("runs/new")
    assert main(["train", "chain.yaml", "name=both", "stages.sft.steps=1", "stages.opsd.steps=3"]) == 0  # the last one may grow
    assert [row["step"] for row in lines("runs/both/opsd/metrics.jsonl")] == [1, 2, 3]


def test_a_teacher_with_a_padded_vocabulary_teaches(here):
    tokenizer = character_tokenizer(TASKS["expr"].characters)
    model = AutoModelForCausalLM.from_config(new_config({**SHAPE, "vocab_size": len(tokenizer) + 8}, tokenizer))
    model.save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    for name, support in (("full", "full"), ("top", {"teacher_topk": {"k": 4, "tail": "bucket"}})):
        objective = [{"distill": "forward_kl", "support": support}]
        opd.train(recipe(name, **FIXED, method="opd", teacher={"external": {"path": "teacher"}}, objective=objective), quiet=True)
        assert (column(name) > 1e-3).all() and column(name).isfinite().all()


def test_hints_that_do_not_fit_are_cut_or_dropped_and_counted(here):
    longest = {"shape": {**SHAPE, "max_position_embeddings": 12 + 13}}
    opd.train(recipe(model=longest, data={"difficulty": "easy"}), quiet=True)
    assert column("r", "views/main_shortened").max() > 0
    opd.train(recipe("s", model={"shape": {**SHAPE, "max_position_embeddings": 12 + 10}}, data={"difficulty": "easy"}), quiet=True)
    assert column("s", "views/main_dropped").max() > 0
    assert torch.allclose(column("s", "views/main") + column("s", "views/main_dropped"), torch.ones(3, dtype=torch.float64))


def test_gsm8k_text_goes_through_the_whole_loop_and_is_evaluated_again(here, capfd, request):
    data = request.config.rootpath / "tests/data/gsm8k_like.jsonl"
    words = [f"data.path={data}", "steps=2", "eval.every=1", "rollout.prompts=4", "sampling.max_tokens=16", "track.wandb=disabled", "name=text"]
    assert main(["train", "recipes/runs/gsm8k_tiny.yaml", *words, "model.vocabulary=400", "learner.kind=torch"]) == 0
    rows = lines("runs/text/eval.jsonl")
    assert [(row["step"], row["split"], row["decoding"]) for row in rows][:3] == [(n, "dev", "temperature 1.0") for n in (0, 1, 2)]
    assert {row["decoding"] for row in rows if row["split"] == "test"} == {"temperature 1.0", "greedy"}
    generated = lines("runs/text/" + rows[-1]["generations"])
    assert all(line["status"] == "score" and line["expected"] for line in generated)
    assert column("text", "views/main").tolist() == [1.0, 1.0] and (column("text") > 0).all()
    capfd.readouterr()
    assert main(["eval", "runs/text"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert len(out) == 2 and "test, temperature 1.0: avg@2" in out[0] and "test, greedy: avg@1" in out[1]
    again = opd.evaluate("runs/text/model", {"data.path": str(data), "eval.num_problems": 2, "eval.final_problems": 2, "sampling.max_tokens": 16})
    assert [row["n_problems"] for row in again] == [2, 2]
    assert main(["inspect", "runs/text"]) == 0 and os.path.getsize("runs/text/inspect.html") > 1000


def test_evaluating_a_run_gives_its_own_test_rows_again(here, capfd):
    opd.train(recipe(eval={"num_problems": 2, "final_problems": 4, "final_samples": 2}), quiet=True)
    again = opd.evaluate("runs/r")
    test = [row for row in lines("runs/r/eval.jsonl") if row["split"] == "test"]
    for mine, theirs in zip(again, test, strict=True):
        assert {k: mine[k] for k in ("decoding", "avg@k", "pass@k", "tokens")} == {k: theirs[k] for k in ("decoding", "avg@k", "pass@k", "tokens")}
