"""profile.steps: FLOPs against torch's own count and by hand, figures against the run's records, the trace, and what is refused."""

import gzip
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from opd.api import train
from opd.config.load import parse_recipe
from opd.learner.lora import add_lora
from opd.preflight.memory import products
from opd.run.folder import read_lines
from opd.timing import profile as profiling
from opd.timing.flops import Products, forward, generation, pairs, training

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
FAMILIES = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
}
LENGTH = 24


def executed(config, *, backward=False, lora=0):
    """(FLOPs of matrix products, those of attention with all pairs) that torch counts for one sequence."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if lora:
        add_lora(model, rank=lora, alpha=1.0, targets="all-linear", seed=0)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.zeros((1, LENGTH), dtype=torch.int64), use_cache=False).logits
        if backward:
            logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for name, n in counts.items() if "bmm" in str(name))
    return sum(counts.values()) - attention, attention


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_executes(family):
    p = products(FAMILIES[family])
    linear, attention = executed(FAMILIES[family])
    no_attention = Products(body=p.body, head=p.head, heads=(), windows=())
    assert forward(no_attention, LENGTH, LENGTH) == linear
    assert sum(4 * width * LENGTH**2 for width in p.heads) == attention  # which computes the masked pairs as well
    assert training(no_attention, LENGTH, LENGTH) == executed(FAMILIES[family], backward=True)[0]


def test_frozen_weights_need_no_gradient_of_their_own():
    """All but the first layer's: its input is the embedding's output, which nothing trains."""
    config = FAMILIES["llama"]
    p = products(config, lora_rank=4)
    linear, _ = executed(config, backward=True, lora=4)
    spared = 2 * LENGTH * (64 * (64 + 32 + 32) + 4 * 3 * 64)  # q, k, v of layer one, and their first factors: no gradient to the input
    counted = training(Products(body=p.body, head=p.head, heads=(), windows=(), adapters=p.adapters), LENGTH, LENGTH)
    assert counted - spared == linear


def test_counts_by_hand():
    assert (pairs(4), pairs(4, 4), pairs(5, 2)) == (10, 10, 1 + 2 * 4)
    p = Products(body=100, head=10, heads=(8, 8), windows=(0, 2))
    whole = 2 * 100 * 5 + 2 * 10 * 3 + 4 * 8 * (15 + 9)
    assert forward(p, 5, 3) == whole and training(p, 5, 3) == 3 * whole
    assert forward(p, 2, 0) + forward(p, 5, 3, before=2) == whole
    assert generation(p, 2, [3, 3]) == forward(p, 2, 0) + 2 * forward(p, 5, 3, before=2)
    assert p.windows == (0, 2) and products(FAMILIES["gemma3"]).windows == (8, 8, 0)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile") / "run"
    small = {"steps": 5, "profile.steps": 3, "rollout.prompts": 4, "sampling.max_tokens": 12, "eval.num_problems": 0, "eval.final_problems": 0}
    return train("recipes/runs/opsd_expr.yaml", {**small, "learner.kind": "torch", "track.wandb": "disabled"}, folder, quiet=True)


def test_figures_agree_with_the_runs_records(profiled):
    found = json.loads((profiled / "profile/profile.json").read_text())
    rows = list(read_lines(profiled / "metrics.jsonl"))
    assert found["steps"] == [2, 3, 4] and found["traced_step"] == 5
    for role, one in found["roles"].items():
        assert one["tokens"] == rows[3][f"tokens/{role}"] - rows[0][f"tokens/{role}"] > 0
        assert one["seconds"] == pytest.approx(sum(row.get(f"seconds/{phase}", 0) for row in rows[1:4] for phase in one["phases"]))
        assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"])
        assert one["mfu"] == pytest.approx(one["flops"] / one.get("seconds_of_mfu", one["seconds"]) / found["peak_flops"]) and 0 < one["mfu"] < 1.5
    flops = sum(one["flops"] for one in found["roles"].values())
    assert found["mfu"] == pytest.approx(flops / sum(row["seconds/step"] for row in rows[1:4]) / found["peak_flops"])
    assert "1,024 x 1,024 float32" in found["peak_from"]


def test_the_trace_has_the_phases_of_one_step(profiled):
    with gzip.open(profiled / "profile/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in names if name and name.startswith("opd/")] == [
        f"opd/{phase}" for phase in ("rollout", "views", "prepare", "teacher", "join", "learn", "sync")
    ]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_profile_changes_nothing_that_is_learned(profiled, tmp_path):
    small = {"steps": 5, "rollout.prompts": 4, "sampling.max_tokens": 12, "eval.num_problems": 0, "eval.final_problems": 0, "learner.kind": "torch"}
    plain = train("recipes/runs/opsd_expr.yaml", {**small, "track.wandb": "disabled"}, tmp_path / "plain", quiet=True)
    losses = [[row["loss/total"] for row in read_lines(folder / "metrics.jsonl")] for folder in (plain, profiled)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"profile.steps": 3, "steps": 4}, "profile.steps is 3, and steps is 4: one step warms up and one is traced besides, so use steps=5 or more"),
        ({"profile.peak_tflops": 100}, "add profile.steps=3"),
        ({"profile.step": 3}, "did you mean 'profile.steps'?"),
        ({"profiler": 3}, "did you mean 'profile'?"),
    ],
)
def test_refusals(changes, sentence):
    with pytest.raises(ValueError, match=".") as caught:
        parse_recipe({}, changes)
    assert sentence in str(caught.value)


def test_what_cannot_be_known_is_null_and_says_why():
    spent = {f"{kind}/{role}": 10.0 for kind in ("seconds", "tokens", "flops") for role in profiling.TOKENS}
    spent |= {"seconds/step": 30.0, "seconds/learn": 5.0}
    apart = profiling.figures_of(spent, [2], 2.0, {"student": "engine=vllm answers in processes of its own"})
    assert apart["mfu"] is None and apart["roles"]["student"] | {"phases": []} == {
        "tokens": 10.0, "seconds": 10.0, "phases": [], "tokens_per_second": 1.0, "flops": None, "mfu": None,
        "why": "engine=vllm answers in processes of its own",
    }  # fmt: skip
    assert (apart["roles"]["teacher"]["mfu"], apart["roles"]["learner"]["mfu"]) == (0.5, 1.0)
    unknown = profiling.figures_of(spent, [2], 0.0, {})
    assert unknown["mfu"] is None and unknown["roles"]["learner"]["why"] == "the device's peak is not known"


def test_gpus_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = parse_recipe({"model": {"dtype": "bfloat16"}})
    for card, peak in (("H100 80GB HBM3", 989e12), ("H100 PCIe", 0.0), ("A100-SXM4-80GB", 312e12), ("GeForce RTX 4090", 0.0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        assert profiling.peak_flops(recipe)[0] == peak
    given = parse_recipe({"profile": {"steps": 1, "peak_tflops": 165}})
    assert profiling.peak_flops(given) == (165e12, "profile.peak_tflops")
    monkeypatch.setattr(profiling, "supported_activities", lambda: set())
    with pytest.raises(ValueError, match=r"cannot trace the GPU .* profile.steps=0"):
        profiling.activities()
