"""Every method file loads, is legal, and loses its distinguishing part visibly when that part is taken out."""

from pathlib import Path

import pytest
import torch

from opd.config.choices import name_of, parameters_of
from tests.objective import dense

FOLDER = Path(__file__).parents[2] / "recipes" / "methods"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


ALLOWED = {"grpo_kl": ("k3_loss",), "sd_zero": ("renormalised_reverse_kl",), "gold_hybrid": ("truncated_jsd",)}
"""Published forms with a known bias; every other method is free of them."""


def load(name):
    return dense.load(name, k=None)


def test_the_methods_are_there():
    expected = {"sft", "grpo", "dr_grpo", "dapo", "rloo", "opd", "opd_full", "opsd", "gkd", "sdft", "sdpo", "hybrid"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_short_legal_names_its_source_and_its_biases(name):
    recipe, objective = load(name)
    assert objective.allowed == ALLOWED.get(name, ()) and recipe.paper.startswith("https://")
    text = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert len(text) <= 20 and max(map(len, text)) <= 160


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_clipped_methods_make_several_updates_so_that_the_clip_can_act(name):
    recipe, objective = load(name)
    assert recipe.updates.minibatches * recipe.updates.epochs > 1 and recipe.group > 1
    assert objective.needs.old_logp


def one_term(name):
    [term] = load(name)[1].terms
    return term


def test_what_sets_the_group_methods_apart():
    grpo, dr_grpo, dapo, rloo = (one_term(name) for name in ("grpo", "dr_grpo", "dapo", "rloo"))
    assert parameters_of(grpo.credit)["std"] and not parameters_of(dr_grpo.credit)["std"] and parameters_of(dapo.credit)["std"]
    assert [term.reduce.kind for term in (grpo, dr_grpo, dapo, rloo)] == ["sequence_mean", "constant", "token_mean", "constant"]
    assert [parameters_of(term.loss).get("high") for term in (grpo, dr_grpo, dapo)] == [0.2, 0.2, 0.28]
    assert name_of(dapo.route) == "mixed_groups" and load("dapo")[0].rollout.filter == "mixed_groups"
    assert name_of(rloo.loss) == "reinforce" and name_of(rloo.credit) == "leave_one_out" and rloo.reduce.length == 1.0


def test_what_sets_the_distillation_methods_apart():
    opsd, gkd, sdft, sdpo = (one_term(name) for name in ("opsd", "gkd", "sdft", "sdpo"))
    assert (opsd.dense.name, opsd.dense.entry_clip) == ("forward_kl", 0.05)
    assert (gkd.dense.name, gkd.dense.mix, sdft.dense.name, sdft.dense.entry_clip) == ("jsd", 0.5, "forward_kl", None)
    assert (sdpo.support.kind, sdpo.support.k, sdpo.support.tail) == ("student_topk", 100, "bucket")
    assert parameters_of(sdpo.weights[0]) == {"cap": 2.0}
    weights = {name: load(name)[0].signals["main"].weights for name in ("opsd", "gkd", "sdft", "sdpo", "hybrid")}
    ema = {"sdft": {"ema": {"rate": 0.01}}, "sdpo": {"ema": {"rate": 0.05}}, "hybrid": {"ema": {"rate": 0.05}}}
    assert weights == {"opsd": "frozen", "gkd": {"external": {"path": ""}}, **ema}


def test_opsd_without_its_clip_has_another_gradient(small, fixture_logits):
    student, teacher = fixture_logits
    token = torch.tensor([1])
    rows = small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",))
    clipped = small.run(load("opsd")[1], student, rows)
    assert clipped.loss.item() == pytest.approx(-0.07223631, abs=1e-8)
    free = small.run(small.build({"distill": "forward_kl"}), student, rows)
    assert free.loss.item() == pytest.approx(0.8321983825361869, abs=1e-12)
    assert (free.gradient - clipped.gradient).norm() > 0.1


def test_opd_estimates_what_opd_full_computes(small):
    generator = torch.Generator().manual_seed(4)
    one, other = (torch.randn(1, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    token = torch.arange(6)
    logp = one.log_softmax(-1)[0]
    rows = small.rows(
        token,
        {"main": (other.expand(6, -1).contiguous(), token[:, None])},
        behaviour_logp=logp,
        advantage={"policy": other.log_softmax(-1)[0] - logp},
        route={"policy": logp.exp()},
    )
    sampled = small.run(load("opd")[1], one.expand(6, -1).contiguous(), rows, {"policy": 1.0, "*": 1.0})
    full = small.run(load("opd_full")[1], one, small.rows(token[:1], {"main": (other, token[:1, None])}, terms=("distill",)))
    torch.testing.assert_close(sampled.gradient.sum(0, keepdim=True), full.gradient, rtol=0, atol=1e-12)


def test_hybrid_splits_answers_between_its_terms_under_one_denominator():
    _, objective = load("hybrid")
    policy, distill = objective.terms
    assert (name_of(policy.route), name_of(distill.route)) == ("not_wrong_with_view", "wrong_with_view")
    assert policy.reduce == distill.reduce and policy.reduce.over == "all"
