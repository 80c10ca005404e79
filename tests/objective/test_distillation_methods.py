"""Distillation methods: each recipe against its loss written out over dense fp64 logits, and against itself without what sets it apart."""

import math
from dataclasses import replace

import pytest
import torch

from opd.objective import Setting, build_objective
from tests.objective.dense import Batch, load, log

K = 3


@pytest.fixture
def batch():
    return Batch.make()


def total_tokens(answers):
    return sum(len(a.tokens) for a in answers)


def forward_kl(lp, lq):
    return (lq.exp() * (lq - lp)).sum(-1)


def reverse_kl(lp, lq):
    return (lp.exp() * (lp - lq)).sum(-1)


def jsd(lp, lq, mix=0.5):
    m = torch.logaddexp(lq + math.log(mix), lp + math.log(1 - mix))
    return mix * forward_kl(m, lq) + (1 - mix) * forward_kl(m, lp)


def teacher(a, name="main"):
    return log(a.teachers[name])


def lumped(logits, ids, tail=True):
    """Log-probs at the ids [T, k] and of all the rest together."""
    logp = log(logits)
    inside = logp.gather(-1, ids)
    rest = torch.log1p(-inside.exp().sum(-1, keepdim=True))
    return torch.cat([inside, rest], -1) if tail else inside


def top(logits, k=K):
    return logits.topk(k, dim=-1).indices


def with_sampled(a, k=K):
    """[T] rows of ids: the student's top-k at rollout weights and the sampled token, each once."""
    return [list(dict.fromkeys([*row, token])) for row, token in zip(top(a.old, k).tolist(), a.tokens.tolist(), strict=True)]


def token_mean(answers, loss):
    return sum(loss(a).sum() for a in answers) / total_tokens(answers)


def sequence_mean(answers, loss):
    return sum(loss(a).mean() for a in answers) / len(answers)


def reinforce(a, advantage):
    lp = a.at(a.now)
    return -advantage * (1 + lp - lp.detach())


def rollout_ratio(a, signal="main"):
    return a.at(a.teachers[signal]) - a.at(a.old)


def opd_full(answers):
    return token_mean(answers, lambda a: reverse_kl(log(a.now), teacher(a)))


def opd(answers):
    def loss(a):
        weight = (a.at(a.now).detach() - a.at(a.engine)).exp()
        return weight * reinforce(a, a.at(a.teachers["main"]) - a.at(a.old))

    return token_mean(answers, loss)


def gkd(answers):
    return sequence_mean(answers, lambda a: jsd(log(a.now), teacher(a)))


def minillm(answers):
    def future(a):
        r = rollout_ratio(a)
        left = [r[t + 1 :] for t in range(len(r))]
        return torch.stack([rest.mean() if len(rest) else torch.zeros((), dtype=torch.float64) for rest in left])

    def loss(a):
        ratio = (a.at(a.now) - a.at(a.old)).exp()
        clipped = -torch.minimum(ratio * future(a), ratio.clamp(0.8, 1.2) * future(a))
        drawn = (a.at(a.old) - a.at(a.engine)).exp().clamp(max=100.0)  # the engine's distribution is the mixture with the teacher
        return drawn * (reverse_kl(log(a.now), teacher(a)) + clipped)

    return token_mean(answers, loss)


def taid(answers):
    def loss(a):
        ids = top(a.teachers["main"])
        lp, lq = lumped(a.now, ids), lumped(a.teachers["main"], ids)
        return forward_kl(lp, (0.6 * lp.detach() + 0.4 * lq).log_softmax(-1))

    return token_mean(answers, loss)


def opd_topk(answers):
    def loss(a):
        ids = top(a.old)
        lp, lq = lumped(a.now, ids, False), lumped(a.teachers["main"], ids, False)
        return (lp.exp() * (lp.detach() - lq)).sum(-1)

    return token_mean(answers, loss)


def entropy(logits):
    return -(log(logits).exp() * log(logits)).sum(-1)


def tip(answers):
    h, d = [], []
    for a in answers:
        h.append(entropy(a.old))
        rows = [(lumped(a.old[t : t + 1], torch.tensor([ids])), lumped(a.teachers["main"][t : t + 1], torch.tensor([ids])))
                for t, ids in enumerate(with_sampled(a))]  # fmt: skip
        d.append(torch.cat([reverse_kl(p, q) for p, q in rows]))
    every_h, every_d = torch.cat(h), torch.cat(d)
    high = every_h.sort().values[int(0.98 * (len(every_h) - 1))]
    h_unit = ((every_h - every_h.min()) / (high - every_h.min())).clamp(0, 1)
    d_unit = (every_d - every_d.min()) / (every_d.max() - every_d.min())
    score = h_unit + d_unit - h_unit * d_unit
    keep = score >= score.topk(len(score) // 2).values[-1]
    losses = torch.cat([reverse_kl(lumped(a.now, top(a.old)), lumped(a.teachers["main"], top(a.old))) for a in answers])
    return losses[keep].sum() / keep.sum()


def eopd(answers, threshold=0.8):
    def loss(a):
        unsure = (entropy(a.teachers["main"]) > threshold).double()
        return reverse_kl(log(a.now), teacher(a)) + unsure * forward_kl(log(a.now), teacher(a))

    return token_mean(answers, loss)


def iw_opd(answers):
    def loss(a):
        r = rollout_ratio(a)
        before = r.abs().cumsum(0) - r.abs()
        return reinforce(a, r * (1 + 0.5 * (1 - before / r.abs().sum())))

    return token_mean(answers, loss)


def reopold(answers):
    return token_mean(answers, lambda a: reinforce(a, rollout_ratio(a).clamp_min(math.log(0.1) / 0.9)))


def kdrl(answers):
    def loss(a):
        r = torch.tensor([b.reward for b in answers if b.group == a.group], dtype=torch.float64)
        advantage = float((a.reward - r.mean()) / (r.std() + 1e-6))
        ratio = (a.at(a.now) - a.at(a.old)).exp()
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return policy + 5e-3 * (a.at(a.now) - a.at(a.teachers["main"])).square() / 2

    return token_mean(answers, loss)


def exopd(answers):
    def loss(a):
        t, s, base = a.at(a.teachers["main"]), a.at(a.old), a.at(a.teachers["reference"])
        return reinforce(a, 1.25 * (t - base) - (s - base))

    return token_mean(answers, loss)


def scope(answers):
    def weight(a):
        right = a.reward > 0.5
        mates = [b for b in answers if b.group == a.group and (b.reward > 0.5) == right]

        def power(b):
            perplexity = torch.exp(-b.at(b.old if right else b.teachers["main"]).mean())
            return perplexity if right else 1 / perplexity

        return float(power(a) / sum(power(b) for b in mates) * len(mates))

    def loss(a):
        return weight(a) * (-a.at(a.now) if a.reward > 0.5 else reinforce(a, rollout_ratio(a)))

    return token_mean(answers, loss)


def paced(answers):
    def weight(a):
        rate = sum(b.reward for b in answers if b.group == a.group) / sum(b.group == a.group for b in answers)
        return rate * (1 - rate)

    return sum(weight(a) * forward_kl(log(a.now), teacher(a)).sum() for a in answers) / sum(weight(a) * len(a.tokens) for a in answers)


def aligndistil(answers):
    def loss(a):
        out = []
        for t, ids in enumerate(with_sampled(a)):
            for signal in ("main", "reference"):
                ids = list(dict.fromkeys([*ids, *top(a.teachers[signal])[t].tolist()]))
            rest = len(ids) < a.now.shape[-1]
            ids = torch.tensor([ids])
            p, up, down = (lumped(z[t : t + 1], ids, rest)[0] for z in (a.now, a.teachers["main"], a.teachers["reference"]))
            step = 15.0 * (up.exp() - down.exp()).abs().sum() + 1e-3
            out.append(0.1 / step * reverse_kl(p, (up + step * (up - down)).log_softmax(-1)))
        return torch.stack(out)

    return sequence_mean(answers, loss)


def tsd_kd(answers):
    def ranking(a):
        ids = top(a.old)
        p, q = (lumped(z, ids, False) for z in (a.now, a.teachers["main"]))
        ranked = p.gather(-1, q.argsort(-1, descending=True))
        return sum(ranked[:, j:].logsumexp(-1) - ranked[:, j] for j in range(K))

    openers = []
    for a in answers:
        share = entropy(a.old).cumsum(0) - entropy(a.old)
        openers.append(share < 0.1 * entropy(a.old).sum())
    first = sum((ranking(a) * keep).sum() for a, keep in zip(answers, openers, strict=True)) / sum(int(keep.sum()) for keep in openers)

    def direct(a):
        gate = (entropy(a.now).detach() - entropy(a.teachers["main"])).sigmoid()
        return gate * jsd(lumped(a.now, top(a.old)), lumped(a.teachers["main"], top(a.old)), 0.9)

    every = torch.cat([entropy(a.old) for a in answers])
    keep = every >= every.topk(max(1, int(0.1 * len(every)))).values[-1]
    unsure = torch.cat([entropy(a.now) for a in answers])[keep].mean()
    return 0.1 * first + token_mean(answers, direct) + unsure


def skd(answers):
    return token_mean(answers, lambda a: forward_kl(log(a.now), teacher(a)))


def distillm(answers):
    def loss(a):
        lp, lq = log(a.now), teacher(a)
        return reverse_kl(lp, torch.logaddexp(lp + math.log(0.1), lq + math.log(0.9)))

    return token_mean(answers, loss)


def paired():
    """The last answer of each group comes with the data."""
    batch = Batch.make(signals=("main", "reference"))
    for a in (batch.answers[3], batch.answers[7]):
        a.source, a.reward = "dataset", 1.0
    return batch


def parts(answers):
    return [a for a in answers if a.source == "dataset"], [a for a in answers if a.source != "dataset"]


def distillm2(answers):
    data, ours = parts(answers)

    def on_data(a):
        lp, lq = log(a.now), teacher(a)
        return forward_kl(torch.logaddexp(lq + math.log(0.1), lp + math.log(0.9)), lq)

    def on_ours(a):
        lp, lq = lumped(a.now, top(a.old)), lumped(a.teachers["main"], top(a.old))
        return reverse_kl(lp, torch.logaddexp(lp.detach() + math.log(0.1), lq + math.log(0.9)))

    return sequence_mean(data, on_data) + sequence_mean(ours, on_ours)


def redi(answers):
    data, ours = parts(answers)
    wrong = [a for a in ours if a.reward < 0.5]
    return sequence_mean(data, lambda a: -a.at(a.now)) - 0.8 * sequence_mean(wrong, lambda a: -a.at(a.now))


def adpa(answers):
    data, ours = parts(answers)

    def linear(a):
        ids = top(a.old)
        advantage = teacher(a).gather(-1, ids) - teacher(a, "reference").gather(-1, ids)
        return -(lumped(a.now, ids, False).exp() * advantage).sum(-1)

    return token_mean(data, lambda a: -a.at(a.now)) + token_mean(ours, linear)


def dpo(answers):
    """-log sigmoid of each pair's margin, a mean over the pairs of a group, then over all answers as the recipe's denominator counts."""
    total = 0.0
    for group in {a.group for a in answers}:
        mates = [a for a in answers if a.group == group]
        ratio = {id(a): (a.at(a.now) - a.at(a.teachers["reference"])).sum() for a in mates}
        pairs = [(r, w) for r in mates if r.reward > 0.5 for w in mates if w.reward < 0.5]
        total = total - sum(torch.nn.functional.logsigmoid(0.1 * (ratio[id(r)] - ratio[id(w)])) for r, w in pairs) / len(pairs)
    return total / len(answers)


PAIRED = {"distillm2": distillm2, "redi": redi, "adpa": adpa}
PAIRED_WITHOUT = {
    "distillm2": {"t1__distill": {"skew_reverse_kl": {"alpha": 0.1}}},
    "redi": {"t1__coef": 0.0},
    "adpa": {"t1__coef": 0.0},
    "dpo": {"t0__advantage": "raw_reward", "t0__route": "from_student"},
}


@pytest.mark.parametrize("name", PAIRED)
def test_a_method_of_pairs_is_its_papers_loss(name):
    paired().expect(load(name)[1], PAIRED[name])


@pytest.mark.parametrize("name", PAIRED_WITHOUT)
def test_a_method_of_pairs_without_its_own_part_is_another(name):
    whole, plain = (paired().run(objective)[1] for objective in (load(name)[1], load(name, **PAIRED_WITHOUT[name])[1]))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, plain, strict=True)) > 1e-4


def test_dpo_has_the_gradient_of_its_papers_loss_at_rollout_weights():
    batch = paired()
    for a in batch.answers:
        a.old = a.now
    _, gradients, _ = batch.run(load("dpo")[1])
    free = [replace(a, now=a.now.clone().requires_grad_()) for a in batch.answers]
    dpo(free).backward()
    for a, found in zip(free, gradients, strict=True):
        torch.testing.assert_close(found, a.now.grad, rtol=0, atol=1e-10)


def test_an_answer_of_the_data_leaves_the_students_baseline_alone():
    """group_centered over the student's answers only, whatever the data's answer beside them is worth."""
    spec = {"policy": "reinforce", "advantage": "group_centered", "route": "from_student"}
    objective = build_objective([spec], Setting(signals=(), group=3, source="mixed"))
    batch = paired()
    ours = Batch([a for a in batch.answers if a.source == "student"])
    both, alone = batch.run(objective), ours.run(objective)
    torch.testing.assert_close(both[0], alone[0], rtol=0, atol=1e-12)


METHODS = {
    "skd": skd,
    "distillm": distillm,
    "opd_full": opd_full,
    "opd": opd,
    "gkd": gkd,
    "minillm": minillm,
    "taid": taid,
    "opd_topk": opd_topk,
    "tip": tip,
    "eopd": eopd,
    "iw_opd": iw_opd,
    "reopold": reopold,
    "kdrl": kdrl,
    "exopd": exopd,
    "scope": scope,
    "paced": paced,
    "aligndistil": aligndistil,
    "tsd_kd": tsd_kd,
}
WITHOUT = {  # what a method would be without the part that sets it apart
    "minillm": {"t1__coef": 0.0},
    "distillm": {"t0__distill": "reverse_kl"},
    "skd": {"t0__distill": "reverse_kl"},
    "taid": {"without": ["0.target"]},
    "opd_topk": {"t0__distill": "reverse_kl", "t0__allow": ["truncated_reverse_kl"]},
    "tip": {"without": ["0.weight"]},
    "eopd": {"without": ["1.weight"]},
    "iw_opd": {"t0__advantage": "teacher_logratio"},
    "reopold": {"t0__advantage": "teacher_logratio"},
    "kdrl": {"t1__coef": 0.0},
    "exopd": {"t0__advantage": "teacher_logratio"},
    "scope": {"t0__route": "correct", "t1__route": "wrong"},
    "paced": {"without": ["0.route", "1.route"]},
    "aligndistil": {"without": ["0.weight"]},
    "aligndistil on the student's ids alone": {"t0__support": {"student_topk": {"k": K, "tail": "bucket", "sampled": True}}},
    "tsd_kd": {"without": ["0.weight"]},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_its_papers_loss(batch, name):
    batch.expect(load(name)[1], METHODS[name], atol=1e-8 if name == "scope" else 1e-10)  # routes travel in fp32


@pytest.mark.parametrize("name", WITHOUT)
def test_a_recipe_without_its_own_part_is_another_method(batch, name):
    whole, plain = (batch.run(objective)[1] for objective in (load(name.split()[0])[1], load(name.split()[0], **WITHOUT[name])[1]))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, plain, strict=True)) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(batch, name):
    objective = load(name)[1]
    (apart, gradients, _), (together, others, _) = batch.run(objective), batch.run(objective, together=True)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-10)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_mopd_asks_each_domains_teacher_under_one_denominator():
    batch = Batch.make(signals=("first", "second"))
    for a in batch.answers:
        del a.teachers["second" if a.group == 0 else "first"]

    def loss(a):
        ratio = (a.at(a.old) - a.at(a.engine)).exp()
        [name] = a.teachers
        return torch.where((ratio >= 0.2) & (ratio <= 5.0), ratio, 0.0) * reinforce(a, rollout_ratio(a, name))

    def whole(answers):
        return token_mean(answers, loss)

    batch.expect(load("mopd")[1], whole)
    one = batch.run(load("mopd", t1__coef=0.0)[1])[1]
    assert all(float(g.abs().max()) == 0.0 for g, a in zip(one, batch.answers, strict=True) if a.group == 1)


def test_paced_changes_its_divergence_at_the_stage(batch):
    def second(answers):
        weight = {0: 0.25, 1: 3 / 16}
        total = sum(weight[a.group] * reverse_kl(log(a.now), teacher(a)).sum() for a in answers)
        return total / sum(weight[a.group] * len(a.tokens) for a in answers)

    batch.expect(load("paced")[1], second, step=50)


def test_reopold_keeps_the_unsurest_fifth_after_the_stage(batch):
    def second(answers):
        every = torch.cat([entropy(a.old) for a in answers])
        keep = every >= every.topk(int(0.2 * len(every))).values[-1]
        return torch.cat([reinforce(a, rollout_ratio(a).clamp_min(math.log(0.1) / 0.9)) for a in answers])[keep].sum() / keep.sum()

    batch.expect(load("reopold")[1], second, step=50)
