"""The same tensors through TRL 1.16's self-distillation and cross-tokenizer losses: equal, or different by what the test states."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trl import RLOOTrainer
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.sdft.sdft_trainer import SDFTTrainer
from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

from opd.text.align import align
from opd.text.bpe import train_byte_bpe
from opd.text.token_bytes import token_bytes
from tests.objective import test_cross_tokenizer as strangers
from tests.objective.dense import Batch, load
from tests.objective.test_cross_tokenizer import answers, tokenizers  # noqa: F401
from tests.objective.test_trl import FakeTrainer, equal, padded

pytestmark = pytest.mark.slow  # importing TRL's trainers takes longer than five seconds


def self_distilled(trainer_class, batch, **options):
    """(loss, gradients) of TRL's loss on these logits; answers without the teacher `main` are masked, as its trainers mask them."""
    logits = [a.now.clone().requires_grad_() for a in batch.answers]
    teachers = [a.teachers.get("main", a.now) for a in batch.answers]
    defaults = {"distillation_mode": "full_logits", "distillation_topk": None, "distillation_alpha": 0.0, "distillation_add_tail": False}
    fake = SimpleNamespace(
        args=SimpleNamespace(**{**defaults, "distillation_is_clip": None, **options}),
        accelerator=SimpleNamespace(gather=lambda x: x),
        _log_self_distillation_metric=lambda *_: None,
    )
    seen = SimpleNamespace(
        completion_ids=padded([a.tokens for a in batch.answers], 0),
        loss_mask=padded([torch.full((len(a.tokens),), float("main" in a.teachers), dtype=torch.float64) for a in batch.answers]),
        student_logits=padded(logits),
        teacher_logits=padded(teachers),
    )
    inputs = {"old_per_token_logps": padded([a.at(a.old) for a in batch.answers])}
    loss = trainer_class._compute_self_distillation_loss(fake, SimpleNamespace(training=True), inputs, seen)
    loss.backward()
    return loss.detach(), [z.grad for z in logits]


def test_sdft_is_trls():
    """Its divergence at alpha 0 and its mean over an answer's tokens, then over answers; alpha 1 is the text's direction."""
    batch = Batch.make()
    equal(batch.run(load("sdft")[1]), self_distilled(SDFTTrainer, batch), atol=1e-10)
    backwards = self_distilled(SDFTTrainer, batch, distillation_alpha=1.0)
    equal(batch.run(load("sdft", t0__distill="reverse_kl")[1]), backwards, atol=1e-10)
    with pytest.raises(AssertionError):
        equal(batch.run(load("sdft")[1]), backwards)


def test_sdpo_is_trls_up_to_the_denominator():
    """There a mean over each answer's tokens and then over all answers, those without a view among them; here over the tokens that have one."""
    batch = Batch.make()
    for a in batch.answers:
        a.old = 0.8 * a.now  # another policy with the same likeliest tokens: there the support is chosen anew at every update
    for a in batch.answers[2:4]:
        a.teachers = {}
    options = {"distillation_mode": "topk_logits", "distillation_topk": 3, "distillation_alpha": 0.5, "distillation_add_tail": True}
    theirs = self_distilled(SDPOTrainer, batch, **options, distillation_is_clip=2.0)
    loss, gradients, _ = batch.run(load("sdpo", t0__reduce="sequence_mean")[1])
    equal((loss * 6 / 8, [g * 6 / 8 for g in gradients]), theirs, atol=1e-7)
    unweighted, _, _ = batch.run(load("sdpo", t0__reduce="sequence_mean", without=["0.weight"])[1])
    assert abs(float(unweighted * 6 / 8 - theirs[0])) > 1e-3
    plain, _, _ = batch.run(load("sdpo")[1])
    assert abs(float(plain - loss)) > 1e-3


def test_opsd_on_sampled_tokens_is_trls_loss_over_answers():
    """TRL's sampled_token mode takes log q - log p of the weights as they are now: the same at rollout weights."""
    batch = Batch.make(drift=0.0)
    theirs = self_distilled(SDFTTrainer, batch, distillation_mode="sampled_token", distillation_alpha=1.0)
    ours = batch.run(load("opsd_sampled", t0__reduce="sequence_mean")[1])
    equal(ours, theirs, value=False)


def test_rloo_has_trls_gradient_at_rollout_weights():
    """There one clipped ratio an answer, whose value is -A; here REINFORCE."""
    batch = Batch.make(drift=0.0)
    logits = [a.now.clone().requires_grad_() for a in batch.answers]
    fake = FakeTrainer(batch, logits)
    inputs = {
        "prompt_ids": torch.zeros(len(logits), 1).long(), "prompt_mask": torch.ones(len(logits), 1),
        "completion_ids": padded([a.tokens for a in batch.answers], 0),
        "completion_mask": padded([torch.ones(len(a.tokens)) for a in batch.answers]),
        "old_logps": torch.stack([a.at(a.old).sum() for a in batch.answers]),
    }  # fmt: skip
    mates = [[b.reward for b in batch.answers if b.group == a.group] for a in batch.answers]
    inputs["advantages"] = torch.tensor([a.reward - (sum(m) - a.reward) / (len(m) - 1) for a, m in zip(batch.answers, mates, strict=True)])
    loss = RLOOTrainer._compute_loss(fake, None, inputs)
    loss.backward()
    equal(batch.run(load("rloo")[1]), (loss.detach(), [z.grad for z in logits]), value=False)


def byte_offsets(pieces):
    """(start, end) of each token; a token without bytes lies at the end, as in TRL's collator."""
    out, at = [], 0
    for piece in pieces:
        out.append((at, at + len(piece)))
        at += len(piece)
    return out


def gold_loss(student, teacher, **options):
    config = GOLDConfig(output_dir="unused", use_cpu=True, uld_crossentropy_weight=0.0, uld_token_merge_strategy="bayesian", beta=0.5, **options)
    return ULDLoss(config, student_tokenizer=student, teacher_tokenizer=teacher)


def test_gold_aligns_and_merges_as_trl_does(answers, tokenizers):  # noqa: F811
    """The same runs of tokens, and at each the teacher's candidates with the same probabilities.

    TRL leaves the merged probability at the id of the last token alone ("d" of "wor" + "d"); here it stands at the student's token of the
    same bytes ("word"), so ids are compared by their bytes.
    """
    student, teacher = tokenizers
    loss = gold_loss(student, teacher)
    own = {number: piece for piece, number in student.get_vocab().items()}
    checked = 0
    for a in answers:
        sides = [token_bytes(one, tuple(ids.tolist())) for one, ids in zip(tokenizers, (a.ids, a.theirs), strict=True)]
        groups = loss._align_by_byte_offsets(*(byte_offsets(side[:-1]) for side in sides))
        spans = align(*sides)
        for numbers, found in zip((spans.student, spans.teacher), groups, strict=True):
            assert [[n for n, s in enumerate(numbers.tolist()) if s == place] for place in range(len(found))] == found
        merged = loss._merge_probabilities_with_alignment_groups(a.teacher.softmax(-1), groups[1], a.theirs.tolist())
        wrapped = strangers.AlignedTeacher(lambda r, a=a: [strangers.own_scores(a, r[0].k)], student=student, teacher=teacher)
        request = strangers.ScoreRequest(context_ids=(1,), completion_ids=tuple(a.ids.tolist()), k=strangers.K)
        scores = wrapped.scores([request])[0]
        for place, (ours, theirs) in enumerate(zip(*groups, strict=True)):
            if len(ours) > 1:
                continue
            before = "".join(teacher.convert_ids_to_tokens(int(a.theirs[u])) for u in theirs[:-1])
            for token, logp in zip(scores.ids[ours[0]].tolist(), scores.logp[ours[0]].tolist(), strict=True):
                if token < 0 or not own[token].startswith(before):
                    continue
                last = teacher.get_vocab().get(own[token].removeprefix(before))
                if last is not None:
                    assert logp == pytest.approx(float(merged[place, last].log()), abs=1e-5)
                    checked += len(theirs) > 1
    assert checked > 3


def test_gold_with_one_tokenizer_is_trls_matched_loss(answers, tokenizers):  # noqa: F811
    """All tokens pair up: JSD over the whole vocabulary, a mean over runs. k is the whole vocabulary, so nothing is left for the tail.

    TRL leaves the end of sequence out, so the answer is scored without its end, and pairs special tokens by name, which here belong to the
    tail as tokens without bytes: nobody says them. It also clamps probabilities at 1e-8.
    """
    student, _ = tokenizers
    g = torch.Generator().manual_seed(4)
    a = answers[0]
    nobody = torch.zeros(len(student), dtype=torch.float64).index_fill(0, torch.tensor(student.all_special_ids), -40.0)
    a = replace(a, ids=a.ids[:-1], now=a.now[:-1] + nobody, old=a.old[:-1] + nobody)
    a = replace(a, theirs=a.ids, teacher=a.old + torch.randn(a.old.shape, dtype=torch.float64, generator=g))
    free = a.now.clone().requires_grad_()
    shifted = [torch.cat([torch.zeros_like(z[:1]), z, torch.zeros_like(z[:1])]) for z in (free, a.teacher)]
    labels = torch.cat([torch.tensor([-100, -100]), a.ids])[None]
    offsets = byte_offsets(token_bytes(student, tuple(a.ids.tolist())))
    places = torch.tensor([(0, 0), (0, 0), *offsets])[None]
    loss = gold_loss(student, student, uld_use_hybrid_loss=True, use_extended_uld=True, uld_skip_student_eos=False, uld_skip_teacher_eos=False)
    theirs = loss(*(z[None] for z in shifted), labels, labels, labels.clamp_min(0), labels.clamp_min(0), places, places)
    theirs.backward()
    objective = load("gold", k=len(student))[1]
    ours = strangers.run(objective, [a], (student, student))
    torch.testing.assert_close(ours[0], theirs.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1][0], free.grad, rtol=0, atol=1e-5)


def gold_hybrid_in_both(a, student, teacher):
    """(our loss, our gradient, TRL's loss, TRL's gradient) of one answer with its end; unlike its default, both weights 1."""
    free = a.now.clone().requires_grad_()
    sides = []
    for tokenizer, ids, logits in ((student, a.ids, free), (teacher, a.theirs, a.teacher)):
        offsets = [(0, 0), *byte_offsets(token_bytes(tokenizer, tuple(ids.tolist())))]
        labels = torch.cat([torch.tensor([-100]), ids])
        sides.append(tuple(one[None] for one in (torch.cat([logits, torch.zeros_like(logits[:1])]), labels, torch.tensor(offsets))))
    loss = gold_loss(
        student, teacher, uld_use_hybrid_loss=True, use_extended_uld=True, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=1.0,
    )  # fmt: skip
    logits, labels, offsets = zip(*sides, strict=True)
    theirs = loss(*logits, *labels, *(one.clamp_min(0) for one in labels), *offsets)
    theirs.backward()
    k = len(student)
    ours = strangers.run(load("gold_hybrid", k=k)[1], [a], (student, teacher), k)
    return ours[0], ours[1][0], theirs.detach(), free.grad


def test_gold_hybrid_is_trls_where_every_run_is_one_token(tokenizers):  # noqa: F811
    """k is the whole vocabulary. Special tokens, which TRL pairs by name and we by rank, are as good as impossible but for the end."""
    student, teacher = tokenizers
    g = torch.Generator().manual_seed(6)
    made = []
    for tokenizer in tokenizers:
        ids = torch.tensor([*tokenizer("xyzq", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        logits = torch.randn(len(ids), len(tokenizer), dtype=torch.float64, generator=g)
        logits[:, tokenizer.all_special_ids] = -40.0
        logits[torch.arange(len(ids)), ids] = 4.0
        made.append((ids, logits))
    (ids, now), (theirs, q) = made
    assert len(ids) == len(theirs) == 5
    alone = [set(one.get_vocab()) - set(other.get_vocab()) for one, other in ((student, teacher), (teacher, student))]
    assert len(alone[0]) >= len(alone[1]) > 3, "where the teacher has more, TRL's value holds their sum, a constant"
    value, gradient, other_value, other_gradient = gold_hybrid_in_both(strangers.Answer(ids, theirs, now, now, q), student, teacher)
    torch.testing.assert_close(value, other_value, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=1e-5)
    assert other_gradient[:-1, [student.get_vocab()[piece] for piece in alone[0]]].abs().max() > 1e-4


def test_a_run_of_two_teacher_tokens_costs_nothing_here_and_much_in_trl():
    """Both models are sure of "ab". TRL compares the student's "ab" with the teacher's "b" alone; here a + b is the student's ab."""
    student, teacher = train_byte_bpe(["ab"] * 9, 262), train_byte_bpe(["cd"] * 9, 262)
    made = []
    for tokenizer in (student, teacher):
        ids = torch.tensor([*tokenizer("ab", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        made.append((ids, 40.0 * torch.eye(len(tokenizer), dtype=torch.float64)[ids]))
    (ids, now), (theirs, q) = made
    assert (len(ids), len(theirs)) == (2, 3)
    value, _, other_value, _ = gold_hybrid_in_both(strangers.Answer(ids, theirs, now, now, q), student, teacher)
    assert float(value) == pytest.approx(0.0, abs=1e-6)
    assert float(other_value) == pytest.approx((1.0 + 0.5 * math.log(2)) / 2, abs=1e-5)  # "ab" has no partner, "b" has one and the student's is 0
