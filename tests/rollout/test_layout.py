import pytest
import torch
from opd_rollout.layout import lay_out, split_by_budget, to_device


def test_one_sequence_is_laid_out_as_documented() -> None:
    layout = lay_out([((5, 6, 7), (8, 9, 2))], packed=False)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 2]]
    assert layout.predict_at.tolist() == [2, 3, 4]
    assert layout.token.tolist() == [8, 9, 2]
    assert layout.position.tolist() == [0, 1, 2]
    assert layout.sequence.tolist() == [0, 0, 0]


THREE = [((5, 6), (7,)), ((1, 2, 3), ()), ((4,), (8, 9, 2))]


def test_padded_rows_of_three_sequences() -> None:
    layout = lay_out(THREE, pad_id=11, packed=False)
    assert layout.input_ids.tolist() == [[5, 6, 7, 11], [1, 2, 3, 11], [4, 8, 9, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert layout.attention_mask is not None
    assert layout.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert layout.predict_at.tolist() == [1, 8, 9, 10]
    assert layout.token.tolist() == [7, 8, 9, 2]
    assert layout.sequence.tolist() == [0, 2, 2, 2]
    assert layout.position.tolist() == [0, 0, 1, 2]
    assert layout.num_sequences == 3


def test_packed_row_of_three_sequences() -> None:
    layout = lay_out(THREE, pad_id=11, packed=True)
    assert layout.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 4, 8, 9, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]
    assert layout.attention_mask is None
    assert layout.predict_at.tolist() == [1, 6, 7, 8]
    assert layout.sequence.tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_the_row_before_a_token_predicts_it(packed: bool) -> None:
    layout = lay_out(THREE, packed=packed)
    assert layout.input_ids.flatten()[layout.predict_at + 1].tolist() == layout.token.tolist()


def test_only_empty_completions_give_no_rows() -> None:
    layout = lay_out([((5, 6), ()), ((7,), ())], packed=False)
    assert layout.predict_at.shape == (0,)
    assert layout.token.dtype == torch.int64
    assert layout.input_ids.tolist() == [[5, 6], [7, 0]]


def test_an_empty_context_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has an empty context"):
        lay_out([((5,), (6,)), ((), (7,))], packed=False)


def test_no_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="pass at least one"):
        lay_out([], packed=True)


def test_to_device_moves_every_tensor() -> None:
    moved = to_device(lay_out(THREE, packed=False), torch.device("meta"))
    assert moved.num_sequences == 3
    assert {moved.input_ids.device.type, moved.predict_at.device.type, moved.position.device.type} == {"meta"}


def test_batches_hold_whole_sequences_within_the_budget() -> None:
    assert split_by_budget([3, 9, 4, 4], 9) == [[1], [2, 3], [0]]


def test_a_sequence_above_the_budget_stands_alone() -> None:
    assert split_by_budget([2, 20, 2], 5) == [[1], [0, 2]]


def test_every_split_covers_all_indices_once_and_keeps_the_budget() -> None:
    lengths = torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    for budget in (49, 64, 333, 10_000):
        batches = split_by_budget(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(200))
        assert max(len(batch) * max(lengths[index] for index in batch) for batch in batches) <= budget
        assert batches == split_by_budget(lengths, budget)


def test_empty_and_impossible_budgets() -> None:
    assert split_by_budget([], 8) == []
    with pytest.raises(ValueError, match="token_budget is 0"):
        split_by_budget([1], 0)
