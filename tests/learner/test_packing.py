"""Micro-batches: indices by hand, columns, pads, budgets."""

import torch
from opd_kernels import PAD_LOGP
from opd_rollout.types import Completion, TokenScores
from pytest import raises

from opd.learner.packing import num_rows, pack, pad_to
from opd.types import Judged, Prompt, Sample, Verdict

OPTIONS = {"packed": False, "temperature": 1.0, "pad_id": 0}


def sample(prompt_ids, tokens, scores=None, **fields) -> Sample:
    length = len(tokens)
    completion = Completion(
        token_ids=tuple(tokens),
        logprobs=-torch.arange(1.0, length + 1),
        loss_mask=torch.ones(length, dtype=torch.bool),
        source="student",
        temperature=1.0,
        finish="stop",
        versions=(),
    )
    judged = Judged(
        prompt=Prompt(id="p", messages=()),
        prompt_ids=tuple(prompt_ids),
        completion=completion,
        text="",
        verdict=Verdict(),
        group=0,
        member=0,
    )
    route = fields.pop("route", 1.0)
    return Sample(
        judged=judged, scores=scores or {}, advantage={"a": 10.0 * torch.arange(1.0, length + 1)}, route={"a": route}, **fields
    )


def scores(ids, temperature=1.0, hidden=None) -> TokenScores:
    ids = torch.tensor(ids)
    return TokenScores(
        sampled=torch.full((len(ids),), -0.5),
        ids=ids,
        logp=-ids.float(),
        tail_logp=torch.full((len(ids),), -3.0),
        entropy=torch.full((len(ids),), 0.7),
        hidden=hidden,
        temperature=temperature,
        version=0,
        view_hash="",
    )


def test_the_worked_example():
    [batch] = pack([sample((5, 6, 7), (8, 9, 2))], signals=(), token_budget=100, **OPTIONS)
    assert batch.layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 2]]
    assert batch.layout.predict_at.tolist() == [2, 3, 4]
    assert batch.rows.token.tolist() == [8, 9, 2]
    assert batch.rows.position.tolist() == [0, 1, 2]
    assert batch.rows.ids.tolist() == [[8], [9], [2]]
    assert batch.rows.behaviour_logp.tolist() == [-1.0, -2.0, -3.0]
    assert batch.rows.old_logp is None


def test_rows_follow_their_sequences_when_a_batch_is_sorted_and_an_answer_is_empty():
    batches = pack(
        [sample((5,), (8, 9), route=0.5), sample((5, 6), ()), sample((5, 6, 7), (1, 2, 3), route=2.0)], signals=(), token_budget=100, **OPTIONS
    )
    [batch] = batches
    assert batch.rows.token.tolist() == [1, 2, 3, 8, 9]
    assert batch.rows.sequence.tolist() == [0, 0, 0, 1, 1]
    assert batch.rows.advantage["a"].tolist() == [10.0, 20.0, 30.0, 10.0, 20.0]
    assert batch.rows.route["a"].tolist() == [2.0, 2.0, 2.0, 0.5, 0.5]
    flat = batch.layout.input_ids.flatten()
    assert flat[batch.layout.predict_at + 1].tolist() == batch.rows.token.tolist()


def test_every_signal_owns_columns_and_missing_views_are_pads():
    first = sample((5,), (8, 9), {"main": scores([[8, 1, 2], [9, 3, 4]]), "reference": scores([[8], [9]])})
    second = sample((5,), (7,), {"reference": scores([[7]])})
    third = sample((5,), (6,), {"main": scores([[6, 5]])})
    [batch] = pack([first, second, third], signals=("main", "reference"), token_budget=100, **OPTIONS)
    main, reference = batch.rows.signals["main"], batch.rows.signals["reference"]
    assert main.columns == slice(1, 4) and reference.columns == slice(0, 1)
    assert batch.rows.ids.tolist() == [[8, 8, 1, 2], [9, 9, 3, 4], [7, -1, -1, -1], [6, 6, 5, -1]]
    assert main.available.tolist() == [True, True, False, True]
    assert main.logp[2].tolist() == [PAD_LOGP] * 3 and main.logp[3].tolist() == [-6.0, -5.0, PAD_LOGP]
    assert main.tail_logp.tolist() == [-3.0, -3.0, PAD_LOGP, -3.0]
    assert reference.available.tolist() == [True, True, True, False]


def test_a_signal_that_nobody_has_a_view_for_is_there_and_unavailable():
    [batch] = pack([sample((5,), (8, 9))], signals=("main",), token_budget=100, **OPTIONS)
    main = batch.rows.signals["main"]
    assert main.available.tolist() == [False, False] and main.hidden is None and main.columns == slice(0, 1)


def test_hidden_states_of_missing_views_are_zeros():
    hidden = torch.arange(4.0).reshape(2, 2)
    first, second = sample((5, 6), (8, 9), {"main": scores([[8], [9]], hidden=hidden)}), sample((5,), (7,))
    [batch] = pack([first, second], signals=("main",), token_budget=100, **OPTIONS)
    assert batch.rows.signals["main"].hidden.tolist() == [[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]]


def test_a_sequence_is_never_split_and_the_budget_counts_padding():
    batches = pack([sample((5,), (1,) * length) for length in (2, 8, 3, 3)], signals=(), token_budget=9, **OPTIONS)
    assert [list(batch.layout.input_ids.shape) for batch in batches] == [[1, 9], [2, 4], [1, 3]]
    assert sum(num_rows(batch) for batch in batches) == 16


def test_short_ranks_are_filled_with_batches_without_rows():
    batches = pad_to(pack([sample((5,), (8, 9))], signals=(), token_budget=9, **OPTIONS), 3, **OPTIONS)
    assert [num_rows(batch) for batch in batches] == [2, 0, 0]
    assert all(batch.layout.input_ids.numel() > 0 for batch in batches)


def test_two_temperatures_in_a_run_are_refused():
    with raises(ValueError, match="scored at temperature 0.7, but the student learns at 1.0"):
        pack([sample((5,), (8,), {"main": scores([[8]], temperature=0.7)})], signals=("main",), token_budget=9, **OPTIONS)


def test_scores_of_another_completion_are_refused():
    with raises(ValueError, match="scored 2 tokens of a completion of 1"):
        pack([sample((5,), (8,), {"main": scores([[8], [9]])})], signals=("main",), token_budget=9, **OPTIONS)
