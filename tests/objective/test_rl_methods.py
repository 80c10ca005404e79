"""Reinforcement methods: each recipe against its loss written out over dense fp64 logits, and against itself without what sets it apart."""

import pytest
import torch

from opd.credit import AnswerFacts, GroupOutcome, SequenceSignals, batch_whitened, kl_penalty, max_rl, overlong
from opd.objective.surrogates import at_answer_ratio, cispo, sequence_clip
from tests.objective.dense import Batch, load


@pytest.fixture
def batch():
    return Batch.make()


def group_of(answers, a):
    return torch.tensor([b.reward for b in answers if b.group == a.group], dtype=torch.float64)


def standardised(answers, a):
    r = group_of(answers, a)
    return float((a.reward - r.mean()) / (r.std() + 1e-6))


def clipped(a, advantage, low=0.2, high=0.2):
    """PPO's token losses [T]."""
    r = (a.at(a.now) - a.at(a.old)).exp()
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


def tokens(answers):
    return sum(len(a.tokens) for a in answers)


def grpo(answers):
    return sum(clipped(a, standardised(answers, a)).mean() for a in answers) / len(answers)


def dapo(answers):
    def shaped(a):
        return a.reward - min(max(len(a.tokens) - 4.0, 0.0) / 1.0, 1.0)  # max_tokens 5, a fifth of it as buffer

    def advantage(a):
        r = torch.tensor([shaped(b) for b in answers if b.group == a.group], dtype=torch.float64)
        return float((shaped(a) - r.mean()) / (r.std() + 1e-6))

    return sum(clipped(a, advantage(a), 0.2, 0.28).sum() for a in answers) / tokens(answers)


def dr_grpo(answers):
    total = sum(clipped(a, a.reward - float(group_of(answers, a).mean())).sum() for a in answers)
    return total / (len(answers) * 64)


def rloo(answers):
    def advantage(a):
        others = [b.reward for b in answers if b.group == a.group and b is not a]
        return a.reward - sum(others) / len(others)

    return sum(-advantage(a) * (1 + a.at(a.now) - a.at(a.now).detach()).sum() for a in answers) / len(answers)


def sft(answers):
    return -sum(a.at(a.now).sum() for a in answers) / tokens(answers)


def rft(answers):
    right = [a for a in answers if a.reward > 0.5]
    return -sum(a.at(a.now).sum() for a in right) / tokens(right)


def gspo(answers):
    total = 0.0
    for a in answers:
        s = (a.at(a.now) - a.at(a.old)).mean().exp()  # the paper's sequence form, differentiated as it stands
        advantage = standardised(answers, a)
        total = total - torch.minimum(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
    return total / len(answers)


def cispo_loss(answers):
    total = 0.0
    for a in answers:
        weight = (a.at(a.now) - a.at(a.old)).exp().clamp(0.0, 5.0).detach()
        lp = a.at(a.now)
        total = total - (weight * standardised(answers, a) * (1 + lp - lp.detach())).sum()
    return total / tokens(answers)


def reinforce_pp(answers):
    every = torch.cat([torch.full((len(a.tokens),), a.reward, dtype=torch.float64) for a in answers])
    return sum(clipped(a, float((a.reward - every.mean()) / (every.std() + 1e-8))).sum() for a in answers) / tokens(answers)


def max_rl_loss(answers):
    def advantage(a):
        mean = float(group_of(answers, a).mean())
        return (a.reward - mean) / mean

    return sum(clipped(a, advantage(a)).sum() for a in answers) / tokens(answers)


def grpo_kl(answers):
    def penalty(a):
        gap = a.at(a.teachers["reference"]) - a.at(a.now)
        return (gap.exp() - 1 - gap).mean()

    return grpo(answers) + 0.04 * sum(penalty(a) for a in answers) / len(answers)


def rloo_kl(answers):
    def reward(a):
        return a.reward - 0.05 * float((a.at(a.old) - a.at(a.teachers["reference"])).sum())

    def advantage(a):
        others = [reward(b) for b in answers if b.group == a.group and b is not a]
        return reward(a) - sum(others) / len(others)

    return sum(-advantage(a) * (1 + a.at(a.now) - a.at(a.now).detach()).sum() for a in answers) / len(answers)


def corrected(answers, weight):
    def ratio(a):
        return (a.at(a.old) - a.at(a.engine)).exp()

    return sum((weight(ratio(a)) * clipped(a, standardised(answers, a), 0.2, 0.28)).sum() for a in answers) / tokens(answers)


def tis(answers):
    return corrected(answers, lambda r: r.clamp_max(2.0))


def icepop(answers):
    return corrected(answers, lambda r: torch.where((r >= 0.5) & (r <= 5.0), r, 0.0))


METHODS = {
    "sft": sft,
    "seq_kd": sft,  # on answers that the teacher wrote
    "rft": rft,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo_loss,
    "reinforce_pp": reinforce_pp,
    "max_rl": max_rl_loss,
    "grpo_kl": grpo_kl,
    "rloo_kl": rloo_kl,
    "tis": tis,
    "icepop": icepop,
}
WITHOUT = {  # what a method would be without the part that sets it apart
    "dapo": {"without": ["0.shape"]},
    "rft": {"without": ["0.route"]},
    "dr_grpo": {"without": ["0.reduce"]},
    "rloo": {"t0__advantage": "group_centered"},
    "gspo": {"t0__policy": {"ppo_clip": {"low": 3e-4, "high": 4e-4}}},
    "cispo": {"t0__policy": {"ppo_clip": {}}},
    "reinforce_pp": {"t0__advantage": "raw_reward"},
    "max_rl": {"t0__advantage": "group_centered"},
    "grpo_kl": {"t1__coef": 0.0},
    "rloo_kl": {"without": ["0.shape"]},
    "tis": {"without": ["0.weight"]},
    "icepop": {"t0__weight": {"engine_ratio": {"high": 5.0}}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_its_papers_loss(batch, name):
    batch.expect(load(name)[1], METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_also_far_from_the_rollouts_policy(name):
    """Ratios from below 0.2 to above 5: every bound of a clip, a cap or a mask is reached on both sides."""
    far = Batch.make(drift=2.0)
    ratios = torch.cat([(a.at(a.now) - a.at(a.old)).exp() for a in far.answers])
    assert ratios.min() < 0.2 and ratios.max() > 5
    far.expect(load(name)[1], METHODS[name])


@pytest.mark.parametrize("name", WITHOUT)
def test_a_recipe_without_its_own_part_is_another_method(batch, name):
    whole, plain = (batch.run(objective)[1] for objective in (load(name)[1], load(name, **WITHOUT[name])[1]))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, plain, strict=True)) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(batch, name):
    objective = load(name)[1]
    (apart, gradients, _), (together, others, _) = batch.run(objective), batch.run(objective, together=True)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-10)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_overlong_by_the_papers_numbers():
    nothing = SequenceSignals(student_logp=torch.zeros(0), scores={}, advantage=torch.zeros(0), loss_mask=torch.zeros(0, dtype=torch.bool))
    given = {16384: 0.0, 18432: -0.5, 20480: -1.0, 20481: -1.0}
    for length, expected in given.items():
        facts = AnswerFacts(length=length, text="", sequence=nothing)
        assert overlong(facts, share=0.2, max_tokens=20480) == pytest.approx(expected, abs=1e-12)
    assert overlong(AnswerFacts(length=100, text="", sequence=nothing), share=0.2, max_tokens=100, factor=0.3) == pytest.approx(-0.3)


def test_an_answers_ratio_is_the_geometric_mean_of_its_loss_tokens():
    now, old = torch.tensor([-1.0, -2.0, -9.0, -1.0]).double(), torch.tensor([-1.5, -2.1, -1.0, -1.0]).double()
    mask, sequence = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1])
    held = at_answer_ratio(now, old, sequence, mask)
    assert (now - held).tolist() == pytest.approx([0.3, 0.3, 0.3, 0.0])
    assert at_answer_ratio(now[:0], old[:0], sequence[:0], mask[:0]).shape == (0,)
    logp = now.clone().requires_grad_()
    loss, cut = sequence_clip(logp, held, torch.ones(4).double(), low=0.1, high=0.4)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.3498588] * 3 + [-1.0]) and logp.grad.tolist() == pytest.approx(loss.tolist())
    assert cut.tolist() == [False] * 4 and sequence_clip(now, held, torch.ones(4).double())[1].tolist() == [True, True, True, False]


@pytest.mark.parametrize(("ratio", "weight", "cut"), [(0.5, 0.5, False), (6.0, 5.0, True), (1.0, 1.0, False)])
def test_cispo_keeps_the_gradient_of_clipped_tokens(ratio, weight, cut):
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss, clipped_there = cispo(logp, logp.detach() - torch.tensor([ratio]).double().log(), torch.tensor([2.0]).double())
    loss.backward()
    assert (loss.item(), logp.grad.item()) == (pytest.approx(-2 * weight), pytest.approx(-2 * weight))
    assert clipped_there.item() == cut


def answer(advantage, mask=None):
    advantage = torch.tensor(advantage)
    mask = torch.ones(len(advantage), dtype=torch.bool) if mask is None else torch.tensor(mask)
    return SequenceSignals(student_logp=torch.zeros(len(advantage)), scores={}, advantage=advantage, loss_mask=mask)


def test_whitening_counts_loss_tokens_of_all_ranks():
    ours, theirs = [answer([1.0, 1.0, 7.0], [True, True, False])], [answer([0.0, 0.0, 0.0])]
    every = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).double()
    expected = [float((value - every.mean()) / (every.std() + 1e-8)) for value in (1.0, 0.0)]
    [alone_ours, alone_theirs] = batch_whitened([*ours, *theirs], lambda values: values)
    assert alone_ours.tolist() == pytest.approx([expected[0], expected[0], 0.0]) and alone_theirs.tolist() == pytest.approx([expected[1]] * 3)
    [split] = batch_whitened(ours, lambda values: torch.cat([values, torch.zeros(3).double()]))
    assert torch.equal(split, alone_ours)
    assert batch_whitened([answer([2.0, 2.0])], lambda values: values)[0].tolist() == [0.0, 0.0]
    assert batch_whitened([], lambda values: values) == []


def test_max_rl_is_the_gradient_of_the_logarithm_of_the_pass_rate():
    """Sum over the group of A grad log p = grad p-hat / p-hat, with p-hat the pass rate: n A_i = (r_i - m) / m."""
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    outcome = GroupOutcome(
        reward=reward, correct=reward > 0, valid=torch.ones(5, dtype=torch.bool), length=torch.ones(5), truncated=torch.zeros(5, dtype=torch.bool)
    )
    assert max_rl(outcome).tolist() == pytest.approx([1.5, -1.0, -1.0, -1.0, 1.5])


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", False)])
def test_only_k1_in_the_reward_has_the_reverse_kls_policy_gradient(kind, unbiased):
    """Two-token answers over three tokens, enumerated: sum over y of p(y) x (-penalty(y)) x grad log p(y)."""
    g = torch.Generator().manual_seed(3)
    first, second = torch.randn(3, generator=g).double().requires_grad_(), torch.randn(3, 3, generator=g).double().requires_grad_()
    other_first, other_second = torch.randn(3, generator=g).double(), torch.randn(3, 3, generator=g).double()
    lp, lq = [], []
    for a in range(3):
        for b in range(3):
            lp.append(torch.stack([first.log_softmax(-1)[a], second[a].log_softmax(-1)[b]]))
            lq.append(torch.stack([other_first.log_softmax(-1)[a], other_second[a].log_softmax(-1)[b]]))
    total = [pair.sum() for pair in lp]
    exact = sum(one.exp() * (one - other.sum()) for one, other in zip(total, lq, strict=True))
    wanted = torch.autograd.grad(exact, (first, second), retain_graph=True)
    surrogate = 0.0
    for pair, other, one in zip(lp, lq, total, strict=True):
        scores = {"reference": type("S", (), {"sampled": other})()}
        known = SequenceSignals(student_logp=pair.detach(), scores=scores, advantage=torch.zeros(2), loss_mask=torch.ones(2, dtype=torch.bool))
        penalty = kl_penalty(AnswerFacts(length=2, text="", sequence=known), coef=1.0, kind=kind)
        surrogate = surrogate - one.detach().exp() * penalty * one
    found = torch.autograd.grad(surrogate, (first, second))
    gap = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    assert (gap < 1e-12) == unbiased and (unbiased or gap > 1e-2)
