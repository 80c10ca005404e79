import pytest
import torch
from opd_rollout.backbone import head_of, hidden_states
from opd_rollout.layout import lay_out
from opd_rollout.scoring import score_tokens, view_hash
from opd_rollout.types import ScoreRequest, TokenScores
from torch import Tensor, nn

from tests.rollout.models import FAMILIES, VOCAB, gemma2, llama, prompts, qwen3


def _score(model: nn.Module, requests: list[ScoreRequest], **changes: object) -> list[TokenScores]:
    options = {"temperature": 1.0, "token_budget": 10_000, "version": 0, **changes}
    return score_tokens(model, head_of(model), requests, **options)


def _dense(model: nn.Module, request: ScoreRequest, temperature: float) -> Tensor:
    """log-softmax [T, V] of the model's own logits, one sequence at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([request.context_ids + request.completion_ids])).logits[0].double()
    start = len(request.context_ids) - 1
    return torch.log_softmax(logits[start : start + len(request.completion_ids)] / temperature, dim=-1)


def _requests(count: int = 6, **asked: object) -> list[ScoreRequest]:
    contexts, completions = prompts(count, seed=1), prompts(count, (1, 14), seed=2)
    return [
        ScoreRequest(context_ids=context, completion_ids=completion, **asked)
        for context, completion in zip(contexts, completions, strict=True)
    ]


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_models_own_log_softmax(family: str, packed: bool) -> None:
    model = FAMILIES[family]()
    requests = _requests()
    for request, scores in zip(requests, _score(model, requests, temperature=0.8, packed=packed), strict=True):
        logp = _dense(model, request, 0.8)
        token = torch.tensor(request.completion_ids)
        expected = logp.gather(1, token[:, None])
        _close(scores.sampled, expected[:, 0])
        _close(scores.entropy, -(logp.exp() * logp).sum(dim=1))
        assert scores.ids.tolist() == token[:, None].tolist()
        _close(scores.logp, expected)
        _close(scores.tail_logp, torch.log1p(-expected[:, 0].exp()))
        assert scores.hidden is None


@pytest.mark.parametrize("packed", [False, True])
def test_topk_holds_the_sampled_token_first(packed: bool) -> None:
    model, requests = gemma2(), _requests(k=5)
    for request, scores in zip(requests, _score(model, requests, packed=packed), strict=True):
        logp = _dense(model, request, 1.0)
        for row, (ids, token) in enumerate(zip(scores.ids.tolist(), request.completion_ids, strict=True)):
            top = logp[row].topk(5).indices.tolist()
            assert ids == [token, *[-1 if each == token else each for each in top]]
            kept = sorted({token, *top})
            assert scores.logp[row, [column for column, each in enumerate(ids) if each == -1]].tolist() == [-1e4] * ids.count(-1)
            _close(scores.logp[row, 0], logp[row, token])
            _close(scores.tail_logp[row].exp(), 1 - logp[row, kept].exp().sum())
        _close(scores.sampled, scores.logp[:, 0])


def _support(request: ScoreRequest, *, with_token: bool) -> Tensor:
    """Four columns: a pad, two other ids, and the token or a third other id."""
    token = torch.tensor(request.completion_ids)[:, None]
    others = (token + torch.tensor([3, 11])) % VOCAB
    last = token if with_token else (token + 17) % VOCAB
    return torch.cat([torch.full_like(token, -1), others, last], dim=1)


@pytest.mark.parametrize("with_token", [False, True])
def test_given_support_and_its_exact_tail(with_token: bool) -> None:
    model = llama()
    requests = [
        ScoreRequest(context_ids=r.context_ids, completion_ids=r.completion_ids, support_ids=_support(r, with_token=with_token))
        for r in _requests()
    ]
    for request, scores in zip(requests, _score(model, requests, temperature=1.4), strict=True):
        logp = _dense(model, request, 1.4)
        ids = request.support_ids
        assert torch.equal(scores.ids, ids)
        assert scores.logp[:, 0].tolist() == [-1e4] * len(ids)
        _close(scores.logp[:, 1:], logp.gather(1, ids[:, 1:]))
        _close(scores.tail_logp.exp(), 1 - logp.gather(1, ids[:, 1:]).exp().sum(dim=1))
        _close(scores.sampled, logp.gather(1, torch.tensor(request.completion_ids)[:, None])[:, 0])


def test_a_support_of_the_whole_vocabulary_has_no_tail() -> None:
    request = _requests(1)[0]
    support = torch.arange(VOCAB).repeat(len(request.completion_ids), 1)
    scores = _score(qwen3(), [ScoreRequest(context_ids=request.context_ids, completion_ids=request.completion_ids, support_ids=support)])[0]
    assert (scores.tail_logp < -12).all()
    _close(scores.logp.exp().sum(dim=1), torch.ones(len(support)))


def test_hidden_states_and_head_reproduce_the_scores() -> None:
    model = gemma2()
    head = head_of(model)
    requests = _requests(hidden=True)
    for request, scores in zip(requests, _score(model, requests), strict=True):
        assert scores.hidden is not None
        logits = torch.tanh(scores.hidden @ head.weight.T / head.softcap) * head.softcap
        _close(torch.log_softmax(logits, dim=-1), _dense(model, request, 1.0))


def test_mixed_requests_come_back_in_order() -> None:
    plain, top, hidden = _requests(), _requests(k=3), _requests(hidden=True)
    mixed = [request for three in zip(plain, top, hidden, strict=True) for request in three]
    found = _score(qwen3(), mixed, token_budget=40)
    expected = [scores for three in zip(*[_score(qwen3(), kind) for kind in (plain, top, hidden)], strict=True) for scores in three]
    for one, two in zip(found, expected, strict=True):
        assert one.ids.shape == two.ids.shape
        assert (one.hidden is None) == (two.hidden is None)
        _close(one.sampled, two.sampled)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("asked", [{}, {"k": 2}, {"hidden": True}])
def test_an_empty_completion_has_empty_scores(packed: bool, asked: dict[str, object]) -> None:
    full, empty = _requests(2)[0], ScoreRequest(context_ids=(4, 5), completion_ids=(), **asked)
    for requests in ([empty], [full, empty, full]):
        scores = _score(qwen3(), requests, packed=packed)[requests.index(empty)]
        assert scores.sampled.shape == scores.entropy.shape == scores.tail_logp.shape == (0,)
        assert scores.logp.shape == scores.ids.shape == (0, 1 + asked.get("k", 0))


def test_scores_carry_their_origin() -> None:
    contexts = [(1, 2), (1, 2), (12,)]
    scores = _score(
        qwen3(), [ScoreRequest(context_ids=context, completion_ids=(3,)) for context in contexts], temperature=0.5, version=9
    )
    assert {each.temperature for each in scores} == {0.5}
    assert {each.version for each in scores} == {9}
    assert scores[0].view_hash == scores[1].view_hash == view_hash((1, 2)) != scores[2].view_hash
    assert not scores[0].sampled.requires_grad


def test_no_requests_give_no_scores() -> None:
    assert _score(qwen3(), []) == []


def test_impossible_requests_are_refused() -> None:
    support = torch.zeros((2, 3), dtype=torch.int64)
    cases = [
        (ScoreRequest(context_ids=(1,) * 60, completion_ids=(2,) * 5), "60 context and 5 completion tokens, but the scorer has 64"),
        (ScoreRequest(context_ids=(1,), completion_ids=(2, 3), support_ids=support, k=4), "choose one"),
        (ScoreRequest(context_ids=(1,), completion_ids=(2, 3, 4), support_ids=support), r"it must be \[3, K\]"),
        (ScoreRequest(context_ids=(), completion_ids=(2,)), "empty context"),
    ]
    for request, message in cases:
        with pytest.raises(ValueError, match=message):
            _score(qwen3(), [request])


@pytest.mark.parametrize("packed", [False, True])
def test_forward_passes_stay_within_the_token_budget(packed: bool) -> None:
    model = qwen3()
    sizes = []
    model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    _score(model, _requests(20), token_budget=64, packed=packed)
    assert len(sizes) > 3
    assert max(sizes) <= 64


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_equals_one_by_one(family: str) -> None:
    model = FAMILIES[family]()
    sequences = [(request.context_ids, request.completion_ids) for request in _requests()]
    with torch.no_grad():
        padded, packed = (
            hidden_states(model, layout)[layout.predict_at]
            for layout in (lay_out(sequences, pad_id=3, packed=False), lay_out(sequences, packed=True))
        )
        alone = torch.cat(
            [
                model.get_decoder()(torch.tensor([context + completion])).last_hidden_state[0, len(context) - 1 : -1]
                for context, completion in sequences
            ]
        )
    _close(padded, alone)
    _close(packed, alone)


def test_padding_takes_no_gradient_and_changes_none() -> None:
    model = qwen3()
    sequences = [((1, 2, 3), (4, 5)), ((6,), (7, 8, 9, 10, 11, 12))]
    gradients = []
    for layouts in ([lay_out(sequences, pad_id=40, packed=False)], [lay_out([sequence], packed=False) for sequence in sequences]):
        model.zero_grad()
        for layout in layouts:
            hidden_states(model, layout)[layout.predict_at].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.parameters()])
    for together, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert gradients[0][0][40].abs().max() == 0


def test_a_head_already_installed_is_used() -> None:
    model = gemma2()
    head = head_of(model, vocab_size=40)
    model.set_output_embeddings(head)
    assert head_of(model) is head
    assert head.softcap == 3.0
    with pytest.raises(ValueError, match="vocab_size is 41"):
        head_of(model, vocab_size=41)
