"""Models without weights: published counts, families kept when made smaller, stand-in tokenizers, runs that ask nothing of the hub."""

import json

import pytest
import torch
from opd_rollout.backbone import check_head, head_of
from transformers import AutoModelForCausalLM

from opd.api import train
from opd.build import shapes
from opd.build.pretrained import check_same_tokens, new_model
from opd.config.load import parse_recipe
from opd.data.sample import KINDS, sample_records
from opd.prompts import read_prompts
from opd.text import chat
from opd.text.standin import standin_tokenizer
from opd.verify import make_verifier

MODELS = list(shapes.public_shapes())
ONE_OF_EACH = ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B-Instruct", "google/gemma-2-2b-it", "google/gemma-3-1b-it"]


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_give_the_published_count_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.shape_config(name))
    assert sum(p.numel() for p in model.parameters()) == shapes.find_shape(name)["parameters"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [0.02, 0.1, 0.5])
def test_a_scaled_model_keeps_family_ties_and_the_ratio_of_heads(name, scale):
    whole, small = shapes.shape_config(name), shapes.shape_config(name, scale)
    assert type(small) is type(whole) and small.tie_word_embeddings == whole.tie_word_embeddings
    ratio = whole.num_attention_heads // whole.num_key_value_heads
    assert small.num_attention_heads == ratio * small.num_key_value_heads
    assert small.num_hidden_layers == max(1, round(scale * whole.num_hidden_layers))
    assert small.vocab_size > len(shapes.shape_tokenizer(name, scale))  # rows beyond the tokenizer, as real heads have
    assert abs(small.hidden_size / whole.hidden_size - scale) < max(0.3 * scale, 64 / whole.hidden_size)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_scaled_model_runs_and_its_head_is_known(name):
    model = new_model(shapes.shape_config(name, 0.02), 0, dtype=torch.float32)
    check_head(model, head_of(model))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_stand_in_keeps_text_and_opens_turns_the_same_way(name):
    tokenizer = shapes.shape_tokenizer(name, 0.02)
    text = "Zwei plus zwei: 4, \\boxed{4} – né?\n"
    assert chat.decode(tokenizer, chat.tokenize(tokenizer, text)) == text
    assert len(chat.assistant_prefix(tokenizer)) > 0
    rendered = tokenizer.decode(chat.render(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]))
    assert rendered.index("Be brief.") < rendered.index("2+2?")
    generation = shapes.shape_generation(name, 0.02)
    assert chat.stop_ids(tokenizer, generation)[0] == tokenizer.eos_token_id and len(chat.stop_ids(tokenizer, generation)) > 1


def test_qwen_thinks_unless_told_not_to():
    tokenizer = shapes.shape_tokenizer("Qwen/Qwen3-8B", 0.02)
    without, plain = chat.assistant_prefix(tokenizer, thinking=False), chat.assistant_prefix(tokenizer)
    assert "</think>" in tokenizer.decode(without) and "</think>" not in tokenizer.decode(plain)


def test_a_teacher_of_the_family_shares_the_students_tokens():
    small, large = (shapes.shape_tokenizer(f"Qwen/Qwen3-{size}", 0.02).get_vocab() for size in ("0.6B", "32B"))
    check_same_tokens(small, large, "Qwen3-32B")
    with pytest.raises(ValueError, match="another tokenizer"):
        check_same_tokens(small, shapes.shape_tokenizer("google/gemma-3-1b-it", 0.02).get_vocab(), "gemma")


def test_a_stand_in_needs_room_for_its_bytes():
    with pytest.raises(ValueError, match="it needs 320"):
        standin_tokenizer("qwen3", 200)


@pytest.mark.parametrize("kind", ["math", "choice"])
def test_made_up_solutions_are_right(kind):
    verify = make_verifier(kind)
    prompts, _ = read_prompts(sample_records(kind))
    assert len(prompts) == 64 and len({p.id for p in prompts}) == 64
    assert all(verify(p, p.hints["solution"]).correct for p in prompts[:6])


def test_made_up_programs_pass_their_tests():
    for _, record in list(sample_records("code"))[:5]:
        space: dict = {}
        exec(record["solution"].removeprefix("```python\n").removesuffix("```"), space)
        exec(record["answer"], space)
    assert set(KINDS) == {"math", "choice", "code"}


def test_an_unknown_name_and_a_scale_of_trained_weights_are_refused():
    with pytest.raises(ValueError, match=r"no sizes of 'Qwen/Qwen3-7B'.*did you mean 'Qwen/Qwen3-"):
        shapes.find_shape("Qwen/Qwen3-7B")
    with pytest.raises(ValueError, match="add model.init=random"):
        parse_recipe({"model": {"path": "Qwen/Qwen3-8B", "scale": 0.1}})
    with pytest.raises(ValueError, match="leave one of the two out"):
        parse_recipe({"model": {"path": "Qwen/Qwen3-8B", "init": "random"}, "init": "runs/before"})


def test_a_recipe_of_hub_names_trains_without_the_hub(tmp_path):
    recipe = parse_recipe({
        "method": "opd_topk", "model": {"path": "Qwen/Qwen3-1.7B", "init": "random", "scale": 0.02}, "data": {"preset": "gsm8k"},
        "teacher": {"external": {"path": "Qwen/Qwen3-32B", "engine": "vllm"}}, "rollout": {"prompts": 2}, "group": 2,
        "sampling": {"max_tokens": 6}, "steps": 2, "learner": {"kind": "torch"}, "track": {"wandb": "disabled"},
        "eval": {"num_problems": 2, "final_problems": 2, "final_samples": 1},
    })  # fmt: skip
    folder = train(recipe, folder=tmp_path / "run", quiet=True)
    config = json.loads((folder / "model/config.json").read_text())
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert config["model_type"] == "qwen3" and config["tie_word_embeddings"] and config["vocab_size"] % 64 == 0
