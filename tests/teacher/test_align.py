"""Two tokenizers over one text; with one tokenizer everything is what the teacher said."""

import pytest
import torch
from opd_rollout.types import ScoreRequest, TokenScores

from opd.teacher.aligned import AlignedTeacher
from opd.text.align import align, last_of_span, rank_distance, single, sorted_distance, span_likelihood, sums
from opd.text.bpe import train_byte_bpe


def test_spans_by_hand():
    found = align([b"ab", b"c", b"de"], [b"a", b"bc", b"d", b"e"])
    assert (found.student.tolist(), found.teacher.tolist()) == ([0, 0, 1], [0, 0, 1, 1])
    assert last_of_span(found.student).tolist() == [False, True, True] and single(found.student).tolist() == [False, False, True]
    ended = align([b"a", b"bc", b""], [b"ab", b"c", b""])
    assert (ended.student.tolist(), ended.teacher.tolist()) == ([0, 0, 1], [0, 0, 1])
    cut = align([b"a", b"b\xe2"], [b"a", b"b?"])
    assert (cut.student.tolist(), cut.teacher.tolist()) == ([0, -1], [0, -1])


def test_span_likelihood_by_hand():
    value = [span_likelihood(torch.tensor(s).double(), torch.tensor(-2.0).double()).item() for s in (-2.0, -3.0, -1.0)]
    assert value == pytest.approx([0.09727, 0.09914, 0.10109], abs=1e-5)
    logp = torch.tensor(-2.0).double().requires_grad_()
    span_likelihood(logp, torch.tensor(-2.0).double()).backward()
    assert logp.grad.abs() < 1e-12, "least where both agree"
    assert sums(torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([0, 0, 1]), 2).tolist() == [-1.5, -2.0]


def test_sorted_distance_by_hand():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([[0.1, 0.7, 0.2]]).double()
    assert sorted_distance(p.log(), q.log()).item() == pytest.approx(0.0), "blind to which token it is"
    assert sorted_distance(p.log(), torch.tensor([[0.5, 0.5]]).double().log()).item() == pytest.approx(0.2 + 0.3 + 0.1)
    assert rank_distance(p.log(), q.log()).item() == pytest.approx(0.6 + 0.5 + 0.1)


def scorer(vocab):
    def scores(requests):
        out = []
        for r in requests:
            length = len(r.completion_ids)
            logits = torch.randn(length, vocab, generator=torch.Generator().manual_seed(length)).log_softmax(-1)
            token = torch.tensor(r.completion_ids)[:, None]
            top = logits.topk(r.k, -1).indices
            ids = torch.cat([token, torch.where(top == token, -1, top)], -1)
            logp = torch.where(ids >= 0, logits.gather(-1, ids.clamp_min(0)), -1e4)
            tail = torch.log1p(-logp.exp().sum(-1))
            entropy = -(logits.exp() * logits).sum(-1)
            out.append(TokenScores(sampled=logp[:, 0], ids=ids, logp=logp, tail_logp=tail, entropy=entropy, temperature=1.0, version=0, view_hash=""))
        return out

    return scores


@pytest.mark.parametrize("k", [0, 5])
def test_one_tokenizer_gives_back_what_the_teacher_said(k):
    tokenizer = train_byte_bpe(["a few words to merge, a few words"], 300)
    ids = (*tokenizer("a few words to merge", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    request = ScoreRequest(context_ids=(1,), completion_ids=ids, k=k)
    [plain] = scorer(len(tokenizer))([request])
    [found] = AlignedTeacher(scorer(len(tokenizer)), student=tokenizer, teacher=tokenizer).scores([request])
    assert found.span.tolist() == list(range(len(ids)))
    torch.testing.assert_close(found.sampled, plain.sampled)
    torch.testing.assert_close(found.entropy, plain.entropy)
    special = set(tokenizer.all_special_ids)
    named = torch.tensor([[j == 0 or int(i) not in special for j, i in enumerate(row)] for row in plain.ids])
    assert torch.equal(torch.where(named, found.ids, -1), torch.where(named, plain.ids, -1)), "all but special tokens, which have no bytes"
    torch.testing.assert_close(torch.where(found.ids >= 0, found.logp, 0.0), torch.where(named & (plain.ids >= 0), plain.logp, 0.0))


def test_the_sum_over_an_answer_is_the_teachers_whatever_its_tokens():
    student, teacher = train_byte_bpe(["a few words to merge"] * 9, 300), train_byte_bpe(["other text, merges words few"] * 9, 290)
    ids = (*student("a few words to merge", add_special_tokens=False)["input_ids"], student.eos_token_id)
    made = AlignedTeacher(scorer(len(teacher)), student=student, teacher=teacher)
    request = ScoreRequest(context_ids=(1,), completion_ids=ids, k=4)
    [found] = made.scores([request])
    theirs = made._translated(request)
    [plain] = scorer(len(teacher))([ScoreRequest(context_ids=(1,), completion_ids=theirs, k=4)])
    assert len(theirs) != len(ids)
    torch.testing.assert_close(found.sampled.sum(), plain.sampled.sum())
    assert (found.logp.exp() * (found.ids >= 0)).sum(-1).max() <= 1.0 + 1e-6
