"""ALM, GOLD (both forms) and ULD from the recipe to the gradient, with a student and a teacher that cut the same texts into different tokens.

Student and teacher are tables of logits; the formulas are written out over byte offsets, apart from the code that aligns.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from opd_rollout.types import Completion, ScoreRequest, TokenScores

from opd.build.views import check_foreign
from opd.learner.packing import pack
from opd.objective import denominators, join
from opd.teacher.aligned import AlignedTeacher
from opd.text.bpe import train_byte_bpe
from opd.types import Judged, Prepared, Prompt, Verdict
from tests.objective import dense

K = 4
TEXTS = ("a few words to merge", "few merges of a word", "words ord")


@pytest.fixture(scope="module")
def tokenizers():
    student = train_byte_bpe(["a few words to merge"] * 9, 300)
    return student, train_byte_bpe(["ord rd few wo"] * 9, 290)


@dataclass
class Answer:
    """ids [T] of the student, theirs [U] of the teacher; now, old [T, V], teacher [U, W] fp64 logits."""

    ids: torch.Tensor
    theirs: torch.Tensor
    now: torch.Tensor
    old: torch.Tensor
    teacher: torch.Tensor


@pytest.fixture
def answers(tokenizers):
    student, teacher = tokenizers
    g = torch.Generator().manual_seed(3)
    made = []
    for text in TEXTS:
        ids, theirs = (torch.tensor([*t(text, add_special_tokens=False)["input_ids"], t.eos_token_id]) for t in tokenizers)
        old = 2.0 * torch.randn(len(ids), len(student), dtype=torch.float64, generator=g)
        old[torch.arange(len(ids)), ids] += 4.0
        logits = 2.0 * torch.randn(len(theirs), len(teacher), dtype=torch.float64, generator=g)
        logits[torch.arange(len(theirs)), theirs] += 4.0
        made.append(Answer(ids, theirs, old + 0.3 * torch.randn(old.shape, dtype=torch.float64, generator=g), old, logits))
    return made


def own_scores(answer, k):
    """What a scorer of the teacher's own tokens returns."""
    logp, token = answer.teacher.log_softmax(-1), answer.theirs[:, None]
    top = logp.topk(min(max(k, 1), logp.shape[-1]), -1).indices[:, :k]
    ids = torch.cat([token, torch.where(top == token, -1, top)], -1)
    return TokenScores(
        sampled=logp.gather(-1, token)[:, 0],
        ids=ids,
        logp=torch.where(ids >= 0, logp.gather(-1, ids.clamp_min(0)), -1e4),
        tail_logp=torch.zeros(len(token), dtype=torch.float64),
        entropy=-(logp.exp() * logp).sum(-1),
        temperature=1.0,
        version=0,
        view_hash="",
    )


def run(objective, answers, tokenizers, k=K):
    """(loss, gradients in each answer's `now`): the aligned teacher, join, pack and the vocabulary operation."""
    objective = objective.at(0, {})
    by_ids = {tuple(a.theirs.tolist()): a for a in answers}
    wrapped = AlignedTeacher(
        lambda requests: [own_scores(by_ids[r.completion_ids], r.k) for r in requests], student=tokenizers[0], teacher=tokenizers[1]
    )
    need = objective.needs.signals["main"]
    judged, prepared, scores = [], [], []
    for number, a in enumerate(answers):
        logp = a.old.log_softmax(-1)
        own = logp.gather(-1, a.ids[:, None])[:, 0]
        completion = Completion(
            token_ids=tuple(a.ids.tolist()), logprobs=own, loss_mask=torch.ones(len(a.ids), dtype=torch.bool), source="student",
            temperature=1.0, finish="stop", versions=(),
        )  # fmt: skip
        prompt = Prompt(id=str(number), messages=())
        verdict = Verdict(reward=0.0)
        judged.append(Judged(prompt=prompt, prompt_ids=(1,), completion=completion, text="", verdict=verdict, group=number, member=0))
        top = logp.topk(k, -1)
        ids = torch.cat([a.ids[:, None], torch.where(top.indices == a.ids[:, None], -1, top.indices)], -1)
        kept = torch.where(ids >= 0, logp.gather(-1, ids.clamp_min(0)), -1e4)
        prepared.append(Prepared(old_logp=own, entropy=-(logp.exp() * logp).sum(-1), topk_ids=ids, topk_logp=kept))
        support_ids = ids if need.student_support or need.unpaired else None
        request = ScoreRequest(context_ids=(1,), completion_ids=tuple(a.ids.tolist()), k=need.k, support_ids=support_ids)
        scores.append({"main": wrapped.scores([request])[0]})
    samples = join(judged, prepared, scores, objective)
    options = {"signals": objective.needs.signals, "token_budget": 10**6, "packed": True, "temperature": 1.0, "pad_id": 0}
    batches = [pack([sample], **options)[0] for sample in samples]
    shared = denominators(objective, batches, lambda counts: counts)
    found = [one_batch(objective, shared, a.now, batch.rows) for a, batch in zip(answers, batches, strict=True)]
    return sum(loss for loss, _ in found), [gradient for _, gradient in found]


def one_batch(objective, shared, logits, rows):
    """As in dense.one_batch, for this vocabulary."""
    before, dense.V = dense.V, logits.shape[-1]
    try:
        return dense.one_batch(objective, shared, logits, rows)
    finally:
        dense.V = before


def pieces(tokenizer, ids):
    return [b"" if i in tokenizer.all_special_ids else tokenizer.decode([i]).encode() for i in ids.tolist()]


def runs(answer, tokenizers):
    """[(the student's token places, the teacher's)] that cover the same bytes, cut wherever both sides have an end; the ends of sequence last."""
    sides = [pieces(tokenizers[0], answer.ids), pieces(tokenizers[1], answer.theirs)]
    ends = []
    for side in sides:
        total, found = 0, []
        for piece in side[:-1]:
            total += len(piece)
            found.append(total)
        ends.append(found)
    stops = sorted(set(ends[0]) & set(ends[1]))
    cut = [[[n for n, e in enumerate(one) if low < e <= high] for low, high in zip([0, *stops], stops, strict=False)] for one in ends]
    return [*zip(*cut, strict=True), ([len(answer.ids) - 1], [len(answer.theirs) - 1])]


def sampled(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def alm(answers, tokenizers, tau=100.0):
    total, count = 0.0, 0
    for a in answers:
        ours, theirs = sampled(a.now, a.ids), sampled(a.teacher, a.theirs)
        for s, t in runs(a, tokenizers):
            p, q = ((side.sum() / tau).exp() for side in (ours[s], theirs[t]))
            total, count = total - q * p.log() - (1 - q) * (1 - p).log(), count + 1
    return total / count


def named(tokenizer):
    """What each id that is a token is called: the same string for the same bytes."""
    return {i: tokenizer.backend_tokenizer.id_to_token(i) for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}


def partners(a, s, t, tokenizers, k):
    """(student id -> the teacher's probability of the whole run, by equal text; the teacher's other probabilities among its k likeliest)."""
    ids, names = {name: i for i, name in reversed(named(tokenizers[0]).items())}, named(tokenizers[1])
    q_all = a.teacher.log_softmax(-1)
    earlier = sampled(a.teacher, a.theirs)[t[:-1]].sum()
    prefix = "".join(names[int(a.theirs[u])] for u in t[:-1])
    mass, rest = {}, []
    for c in q_all[t[-1]].topk(k).indices.tolist():
        own, q = ids.get(prefix + names[c]) if c in names else None, (earlier + q_all[t[-1], c]).exp()
        if own is not None:
            mass[own] = q
        elif c != int(a.theirs[t[-1]]):
            rest.append(q)
    token = int(a.ids[s[0]])
    if token not in mass and len(mass) < k:  # fewer candidates than asked for: the token itself stays one
        mass[token] = (earlier + sampled(a.teacher, a.theirs)[t[-1]]).exp()
    return mass, rest, prefix


def jsd(p, q, mix):
    m = mix * p + (1 - mix) * q
    return mix * (p * (p / m).log()).sum() + (1 - mix) * (q * (q / m).log()).sum()


def gold(answers, tokenizers, mix=0.5):
    total, count = 0.0, 0
    for a in answers:
        for s, t in runs(a, tokenizers):
            if len(s) != 1:
                continue
            mass, _, _ = partners(a, s, t, tokenizers, K)
            p_all, count = a.now[s[0]].softmax(-1), count + 1
            p = torch.stack([*(p_all[i] for i in mass), 1 - sum(p_all[i] for i in mass)])
            total = total + jsd(p, torch.stack([*mass.values(), 1 - sum(mass.values())]), mix)
    return total / count


def gold_hybrid(answers, tokenizers, k=120):
    """Paired tokens as they are, without a rest, and the others by rank; mean over an answer, then over answers."""
    total = 0.0
    names, known = named(tokenizers[0]), set(named(tokenizers[1]).values())
    for a in answers:
        values = []
        for s, t in runs(a, tokenizers):
            if len(s) != 1:
                continue
            mass, rest, prefix = partners(a, s, t, tokenizers, k)
            p_all = a.now[s[0]].softmax(-1)
            value = jsd(torch.stack([p_all[i] for i in mass]), torch.stack([*mass.values()]), 0.5)
            ours = [i for i in a.old[s[0]].topk(k).indices.tolist() if i != int(a.ids[s[0]])]
            ours = [i for i in ours if i not in names or not (names[i].startswith(prefix) and names[i][len(prefix) :] in known)]
            for rank, i in enumerate(ours):
                value = value + (p_all[i] - (rest[rank] if rank < len(rest) else 0.0)).abs()
            values.append(value)
        total = total + sum(values) / len(values)
    return total / len(answers)


def uld(answers, tokenizers):
    total, count = 0.0, 0
    for a in answers:
        for s, t in runs(a, tokenizers):
            if len(s) != 1:
                continue
            count += 1
            p_all, ranked = a.now[s[0]].softmax(-1), a.teacher[t[-1]].softmax(-1).topk(K).values
            p = p_all[a.old[s[0]].topk(K).indices]
            total = total + (p - ranked).abs().sum() + ((1 - p.sum()) - (1 - ranked.sum())).abs()
    return total / count


def load(name, k=K, **changes):
    return dense.load(name, k=k, **changes)[1]


def expect(objective, formula, answers, tokenizers, k=K):
    loss, gradients = run(objective, answers, tokenizers, k)
    free = [replace(a, now=a.now.clone().requires_grad_()) for a in answers]
    wanted = formula(free, tokenizers)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=2e-6)
    for a, found in zip(free, gradients, strict=True):
        torch.testing.assert_close(found, a.now.grad, rtol=0, atol=2e-6)


def test_the_two_tokenizers_differ_in_every_way_that_matters(answers, tokenizers):
    shapes = {(min(len(s), 2), min(len(t), 2)) for a in answers for s, t in runs(a, tokenizers)}
    assert shapes == {(1, 1), (1, 2), (2, 1), (2, 2)}


@pytest.mark.parametrize(("name", "formula"), [("alm", alm), ("gold", gold), ("uld", uld)])
def test_from_recipe_to_gradient(name, formula, answers, tokenizers):
    expect(load(name), formula, answers, tokenizers)


@pytest.mark.parametrize(
    ("name", "formula", "changes"),
    [
        ("alm", alm, {"t0__distill": {"span_likelihood": {"tau": 50.0}}}),
        ("alm", alm, {"t0__distill": "reverse_kl", "t0__support": "sampled"}),
        ("gold", gold, {"t0__distill": {"jsd": {"mix": 0.1}}}),
        ("gold", gold, {"t0__support": {"teacher_topk": {"k": K, "tail": "renormalise"}}}),
        ("uld", uld, {"t0__support": {"student_topk": {"k": K, "tail": "renormalise"}}}),
    ],
)
def test_another_form_is_noticed(name, formula, changes, answers, tokenizers):
    with pytest.raises(AssertionError, match="not close"):
        expect(load(name, **changes), formula, answers, tokenizers)


def test_gold_hybrid_from_recipe_to_gradient(answers, tokenizers):
    """Of 120 likeliest ids a side some have no partner, in runs of one token and of two."""
    left = {}
    for a in answers:
        for s, t in (run for run in runs(a, tokenizers) if len(run[0]) == 1):
            left.setdefault(len(t) > 1, []).append(len(partners(a, s, t, tokenizers, 120)[1]))
    assert all(max(left[several]) > 3 for several in (False, True))
    expect(load("gold_hybrid", k=120), gold_hybrid, answers, tokenizers, k=120)


@pytest.mark.parametrize(
    "changes",
    [{"t1__coef": 0.0}, {"t1__reduce": "token_mean", "t0__reduce": "token_mean"}, {"t0__support": {"teacher_topk": {"k": 120, "tail": "bucket"}}}],
)
def test_another_gold_hybrid_is_noticed(changes, answers, tokenizers):
    with pytest.raises(AssertionError, match="not close"):
        expect(load("gold_hybrid", k=120, **changes), gold_hybrid, answers, tokenizers, k=120)


def test_tokens_without_a_partner_need_two_tokenizers_and_one_k():
    recipe, objective = dense.load("gold_hybrid")
    check_foreign(recipe, objective, {"main"})
    with pytest.raises(ValueError, match="has the student's; give it one of its own, .*tokenizer: own"):
        check_foreign(recipe, objective, set())
    with pytest.raises(ValueError, match="Legal: the same support and k"):
        dense.load("gold_hybrid", k=0, t1__support={"unpaired": {"k": 8}})
