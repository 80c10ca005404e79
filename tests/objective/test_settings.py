"""What sets a method apart beside its loss: who writes the answers, who teaches, what the teacher sees, how many answers and updates.

The loss of every recipe is pinned elsewhere; without this page a frozen teacher could become a live one and nothing would notice. New methods
add their names.
"""

from pathlib import Path

import pytest

from opd.config.load import load_recipe
from opd.config.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "methods"

EXTERNAL, FOREIGN = {"external": {"path": ""}}, {"external": {"path": "", "tokenizer": "own"}}
SOLUTION = {"solution": {"template": "opsd"}}
SIBLING = {"peer_success": {"own": False}}
UNISD = {"ema": {"rate": 0.1, "every": 10}}

TAUGHT_BY_ANOTHER_MODEL = (  # the same prompt, another model
    "distillm distillm2 eopd gkd iw_opd kdrl minillm opd opd_full opd_topk paced reopold rs_kd scope seq_kd skd taid tip tsd_kd vla_opd"
).split()
TAUGHT_IN_ANOTHER_TOKENIZER = ["alm", "gold", "gold_hybrid", "uld"]
HELD_TO_THE_START = ["dpo", "gdsd", "grpo_kl", "rloo_kl"]
ALONE = "cispo dapo dr_grpo grpo gspo icepop max_rl redi reinforce_pp rft rloo sd_zero_srt sft tis".split()

SIGNALS = {  # signal -> (weights, view)
    **{name: {} for name in ALONE},
    **{name: {"main": (EXTERNAL, "plain")} for name in TAUGHT_BY_ANOTHER_MODEL},
    **{name: {"main": (FOREIGN, "plain")} for name in TAUGHT_IN_ANOTHER_TOKENIZER},
    **{name: {"reference": ("frozen", "plain")} for name in HELD_TO_THE_START},
    **{name: {"main": ("frozen", SOLUTION)} for name in ("opsd", "opsd_jsd", "opsd_reverse", "opsd_sampled", "opsd_topk", "pw_opsd")},
    "adpa": {"main": (EXTERNAL, "plain"), "reference": (EXTERNAL, "plain")},
    "aligndistil": {"main": (EXTERNAL, "plain"), "reference": (EXTERNAL, "plain")},
    "exopd": {"main": (EXTERNAL, "plain"), "reference": ("frozen", "plain")},
    "mopd": {"first": (EXTERNAL, "plain"), "second": (EXTERNAL, "plain")},
    "mad_opd": dict.fromkeys(("first", "second"), (EXTERNAL, {"note": {"name": "debate", "template": "debate"}})),
    "atesd": {"main": ("frozen", {"partial_solution": {"share": "exposure"}})},
    **{
        name: {
            "whole": ("frozen", "solution"),
            "part": ("frozen", {"partial_solution": {"share": 0.5, "answer": False}}),
            "answer": ("frozen", "answer"),
        }
        for name in ("avsd", "avsd_dense")
    },
    "cepo": {"main": ("live", "answer"), "negative": ("live", "wrong_answer")},
    "rlsd": {"main": ("live", "answer")},
    "cord": {"main": ("live", "facts")},
    "curio_sft": {"main": ({"ema": {"rate": 0.99, "every": 5}}, "plain")},
    "hdpo": {"main": ("live", "solution")},
    "opsd_pi": {"main": ("live", "solution")},
    "pi_distill": {"main": ("live", "solution"), "student": ("live", "plain")},
    "opsdc": {"main": ("live", {"instruction": {"text": "Solve this concisely: only the steps that are needed, without repetition."}})},
    "hybrid": {"main": ({"ema": {"rate": 0.05}}, SIBLING)},
    "srpo": {"main": ({"ema": {"rate": 0.05}}, SIBLING)},
    "sdpo": {"main": ({"ema": {"rate": 0.05}}, {"feedback": {"solution": "peer_success", "own": False, "together": True}})},
    "vpd": {"main": ("live", {"feedback": {"solution": "peer_success", "together": True}})},
    "sd_zero": {"main": ("frozen", "revision")},
    "sdft": {"main": ({"ema": {"rate": 0.01}}, "demonstration")},
    "trace": {"main": ({"ema": {"rate": 1.0, "every": 10}}, {"note": {"name": "spans"}})},
    "unisd": {
        "main": (UNISD, "demonstration"),
        "second": (UNISD, "facts"),
        "third": (UNISD, "answer"),
        "negative": (UNISD, "wrong_answer"),
    },
    "unisd_clip": {"main": ("frozen", "demonstration")},
}

DATA = {"source": {"dataset": "solution"}}
PAIRED = {"source": {"paired": {"dataset": "solution"}}}
ROLLOUT = {  # whatever differs from "the student answers, and all groups are kept"
    **{name: DATA for name in ("curio_sft", "rs_kd", "sft", "taid")},
    **{name: PAIRED for name in ("adpa", "distillm2", "dpo", "redi")},
    "dapo": {"filter": "mixed_groups"},
    "gkd": {"source": {"mixed": {"student": 0.5, "dataset": "solution"}}},
    "distillm": {
        "source": {"mixed": {"student": {"rise_when_worse": {"metric": "eval/dev", "tolerance": 0.02}}, "dataset": "solution"}},
        "replay": {"size": 1000, "least": 1000, "max_age": 10000, "fresh": {"linear": {"start": 1.0, "end": 0.0, "steps": 100}}},
    },
    "minillm": {"sampler": {"mixture": {"share": 0.2}}},
    "skd": {"sampler": {"interleave": {"k": 25}}},
    "seq_kd": {"sampler": "teacher"},
    "pi_distill": {"source": {"view": "main"}},
    "sd_zero_srt": {"revise": {}},
}

GROUPS = {
    **dict.fromkeys(SIGNALS, 1),
    **dict.fromkeys("alm dpo eopd exopd gold gold_hybrid iw_opd minillm mopd opd opd_full opd_topk reopold rloo rloo_kl tip uld unisd".split(), 4),
    **dict.fromkeys("cepo cispo cord dapo dr_grpo gdsd grpo grpo_kl gspo hdpo hybrid icepop kdrl max_rl opsd_pi paced pi_distill".split(), 8),
    **dict.fromkeys("rft rlsd scope sdpo srpo tis trace vla_opd vpd".split(), 8),
}
UPDATES = {
    **dict.fromkeys(SIGNALS, 1),
    **dict.fromkeys("cepo cord dr_grpo grpo grpo_kl hdpo hybrid icepop kdrl max_rl minillm opsd_pi pi_distill".split(), 2),
    **dict.fromkeys("reinforce_pp rlsd srpo tis trace".split(), 2),
    **dict.fromkeys(["cispo", "dapo", "gdsd", "gspo"], 4),
}


def load(name) -> Recipe:
    return load_recipe(str(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize("name", SIGNALS)
def test_who_teaches_and_what_it_sees(name):
    assert {key: (signal.weights, signal.view) for key, signal in load(name).signals.items()} == SIGNALS[name]


@pytest.mark.parametrize("name", SIGNALS)
def test_who_writes_the_answers(name):
    assert load(name).rollout.model_dump(exclude_unset=True) == ROLLOUT.get(name, {})


@pytest.mark.parametrize("name", SIGNALS)
def test_how_many_answers_a_prompt_and_updates_a_batch(name):
    recipe = load(name)
    assert (recipe.group, recipe.updates.minibatches, recipe.updates.epochs) == (GROUPS[name], UPDATES[name], 1)


def test_candidates_as_published():
    """How many of the likeliest tokens, where a paper or its code names a number."""
    ks = {"adpa": 50, "curio_sft": 512, "opd_topk": 20, "rs_kd": 50, "sdpo": 100, "srpo": 100, "unisd_clip": 100, "tsd_kd": 10, "sd_zero": 64}
    for name, k in ks.items():
        text = (FOLDER / f"{name}.yaml").read_text()
        assert f"k: {k}" in text or f"draws: {k}" in text, name


def test_parts_that_no_other_method_has():
    trace, mopd, atesd = load("trace"), load("mopd"), load("atesd")
    [spans] = trace.writers.values()
    assert (spans.about, spans.points, spans.coverage, spans.until) == ("correct", True, 0.25, 40)
    assert "{solution}" in spans.ask and "{segments}" in spans.ask
    assert [signal.domain for signal in mopd.signals.values()] == ["expr", "route"]
    [debate] = load("mad_opd").writers.values()
    assert (debate.by, debate.rounds, debate.about) == (["first", "second"], 2, "all")
    assert "<<CONFIDENCE=N>>" in debate.role and not {"{attempt}", "{solution}"} & set(debate.ask.split() + debate.reply.split())
    assert atesd.controllers == {"exposure": {"learned_exposure": {"steps": 100}}}


def test_numbers_that_a_small_batch_does_not_reach():
    """The losses are pinned on answers of at most five tokens, and DPO at rollout weights, where all surrogates are one."""
    cord, gdsd, dpo = (load(name).objective for name in ("cord", "gdsd", "dpo"))
    assert cord[1]["weight"] == {"peak_divergence": {"tokens": 20, "factor": 2.0, "decay": 0.99}}
    assert gdsd[0]["policy"] == {"log_ratio_regression": {"scale": 1.0, "low": 0.2, "high": 0.2}}
    assert dpo[0]["policy"] == "reinforce"
    cap, floor = {"staleness_ratio": {"cap": 2.0}}, {"batch_confidence": {"beta": 1.0}}
    assert load("srpo").objective[1]["weight"] == [cap, floor] and load("unisd").objective[1]["advantage"]["margin"]["margin"] == 0.5
    assert [term["weight"] for term in load("minillm").objective] == [{"engine_ratio": {"high": 100.0}}] * 2
    assert load("kdrl").objective[1]["coef"] == {"linear": {"start": 5e-3, "end": 1e-3, "steps": 80}}
    for name in ("opsd_pi", "pi_distill"):  # groups of equal rewards leave every term, the KLs too
        assert {term["route"] for term in load(name).objective} == {"mixed_groups"}
