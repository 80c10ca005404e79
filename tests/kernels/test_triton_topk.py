"""The Triton top-k in the interpreter: exact ids and order against a stable sort, sums over everything else, rows that are sorted anew."""

import opd_kernels
import pytest
import torch
from opd_kernels import triton_rows, triton_topk
from opd_kernels.row_kernels import TileConstants

from tests.kernels.cases import make_case
from tests.kernels.triton_cases import TILES, Guarded, constants, logits, shrink_launches

NEG_INF = float("-inf")
ROWS = 4


@pytest.fixture(autouse=True)
def poisoned_memory_and_small_launches(monkeypatch):
    shrink_launches(monkeypatch.setattr)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(kind: str, columns: int) -> torch.Tensor:
    z = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(columns)) * 5
    if kind == "ties":
        z = (z * 0.4).round()
    elif kind == "constant":
        z = torch.full_like(z, -3.0)
    elif kind == "cluster":
        z[:, columns // 2 : columns // 2 + 12] += 50.0
    elif kind == "mostly_minus_infinity":
        z[:, 3:] = NEG_INF
        z[3] = NEG_INF
    elif kind == "signed_zeros":
        z = torch.where(z > 0, 0.0, -0.0)
        z[:, ::7] = 1.0
    return z


def wanted_of(x: torch.Tensor, removed: torch.Tensor, k: int):
    """(values, columns) by a stable sort of the columns that were not removed, and their complement's logsumexp."""
    values, columns, rest = [], [], []
    for row in range(x.shape[0]):
        kept = torch.tensor([column for column in range(x.shape[1]) if column not in removed[row].tolist()])
        order = kept[x[row, kept].sort(descending=True, stable=True).indices]
        values.append(x[row, order[:k]])
        columns.append(order[:k])
        rest.append(x[row, order[k:]].double().logsumexp(dim=0))
    return torch.stack(values), torch.stack(columns), torch.stack(rest)


def best_columns(z: torch.Tensor, k: int, with_: TileConstants) -> triton_topk.TopColumns:
    """Top columns of products z, flagged rows sorted as an operation does."""
    removed = torch.full((z.shape[0], 1), -1)
    scan = triton_rows.scan_rows(z, removed, with_, 0, k, TILES)
    triton_rows.sort_flagged(scan, lambda rows: z[rows], removed, with_, 0)
    return triton_topk.TopColumns(x=scan.best_x, columns=scan.best_ids, rest=scan.sums, redo=scan.redo)


@pytest.mark.parametrize("kind", ["random", "ties", "constant", "cluster", "mostly_minus_infinity", "signed_zeros"])
@pytest.mark.parametrize(("columns", "k"), [(161, 1), (161, 5), (272, 3), (95, 3), (64, 16), (33, 33)])
def test_equals_a_stable_sort(columns, k, kind):
    guarded = Guarded(ROWS, columns)
    guarded.tile.copy_(drawn(kind, columns))
    plain = TileConstants(inverse_temperature=torch.ones(ROWS))
    best = best_columns(guarded.tile, k, plain)
    values, ids, rest = wanted_of(guarded.tile, torch.full((ROWS, 1), -1), k)
    assert torch.equal(best.columns, ids) and torch.equal(best.x, values) and guarded.gaps_hold()
    torch.testing.assert_close(best.rest.m.double() + best.rest.l.double().log(), rest, rtol=0, atol=5e-6)


def test_most_rows_need_no_sort():
    z = drawn("random", 272)
    best = triton_topk.top_columns(z, 3, 16, TileConstants(inverse_temperature=torch.ones(ROWS)), TILES)
    assert not best.redo.any()


def test_too_many_equal_logits_are_flagged_and_sorted():
    z = drawn("random", 272)
    z[1, 16:112] = 90.0
    plain = TileConstants(inverse_temperature=torch.ones(ROWS))
    assert triton_topk.top_columns(z, 4, 16, plain, TILES).redo.tolist() == [False, True, False, False]
    best = best_columns(z, 4, plain)
    assert best.columns[1].tolist() == [16, 17, 18, 19]
    assert torch.equal(best.columns, wanted_of(z, torch.full((ROWS, 1), -1), 4)[1])


@pytest.mark.parametrize("k", [3, 150])
def test_removed_columns_are_neither_ranked_nor_summed(k):
    with_ = constants(ROWS, 161, bias=True, softcap=20.0, scale=0.5)
    z = drawn("random", 161)
    x = logits(z, with_).float()
    removed = x.topk(2, dim=1).indices[:, [1, 0, 1]]
    scan = triton_rows.scan_rows(z, removed + 1000, with_, 1000, k, TILES)
    values, ids, rest = wanted_of(x, removed, k)
    assert torch.equal(scan.best_ids, ids + 1000) and (scan.best_x - values).abs().max() < 1e-5
    torch.testing.assert_close(scan.selected, x.gather(1, removed), rtol=0, atol=1e-5)
    torch.testing.assert_close(scan.sums.m.double() + scan.sums.l.double().log(), rest, rtol=0, atol=1e-5)


def test_a_rest_of_small_mass_keeps_its_digits():
    """The sums leave the best columns out; the difference to the whole row would have no digits left."""
    z = drawn("random", 272) - 40.0
    z[:, [5, 100, 260]] = torch.tensor([9.0, 8.0, 7.5])
    best = triton_topk.top_columns(z, 3, 16, TileConstants(inverse_temperature=torch.ones(ROWS)), TILES)
    torch.testing.assert_close(
        best.rest.m.double() + best.rest.l.double().log(), wanted_of(z, torch.full((ROWS, 1), -1), 3)[2], rtol=0, atol=2e-6
    )


def test_a_nan_ranks_first():
    z = drawn("random", 272)
    z[2, 77] = float("nan")
    best = best_columns(z, 3, TileConstants(inverse_temperature=torch.ones(ROWS)))
    assert best.columns[2, 0] == 77 and best.x[2, 0].isnan() and torch.equal(best.columns[0], wanted_of(z, torch.full((ROWS, 1), -1), 3)[1][0])


@pytest.mark.parametrize("group", [128, 64, 16])
def test_groups_shrink_until_there_are_enough(group):
    columns = 2 * 256 * group
    assert triton_topk.group_size(columns, 256) == group and triton_topk.group_size(100, 50) is None


@pytest.mark.parametrize("with_included", [False, True])
@pytest.mark.parametrize("k", [1, 6, 181])
def test_scores_equal_the_reference(k, with_included):
    case = make_case(5, 203, 16, 5, temperature=torch.linspace(0.5, 1.5, 5), vocab_size=181, softcap=25.0, with_bias=True)
    included = None
    if with_included:
        top = opd_kernels.topk_logprobs(case.hidden, case.weight, 1, bias=case.bias, backend="reference", **case.keywords).ids[:, 0]
        included = torch.where(torch.arange(5) % 2 == 0, top, case.ids[:, 2])
        included[3] = -1
    scores = {}
    for backend, chosen in (("triton", case), ("reference", case.cast(torch.float64))):
        scores[backend] = opd_kernels.topk_logprobs(
            chosen.hidden, chosen.weight, k, always_include=included, bias=chosen.bias, backend=backend, chunk_bytes=4000, **chosen.keywords
        )
    assert torch.equal(scores["triton"].ids, scores["reference"].ids)
    for name in ("logp", "tail_logp", "logz", "entropy"):
        torch.testing.assert_close(getattr(scores["triton"], name).double(), getattr(scores["reference"], name), rtol=0, atol=3e-5)


@pytest.mark.parametrize("path", ["composable", "fused"])
@pytest.mark.parametrize("k", [2, 12])
def test_the_students_top_k_includes_chosen_ids(k, path):
    case = make_case(9, 150, 16, 5)
    case.ids[4] = (case.hidden @ case.weight.T)[4].topk(5).indices.flip(0)
    keywords = {"student_topk": k, "backend": "triton", "chunk_bytes": 4000}
    if path == "composable":
        selected = opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, **keywords)
        ids, logp = selected.topk_ids, selected.topk_logp
    else:
        _, aux = opd_kernels.fused_sparse_loss(
            case.hidden, case.weight, case.ids, lambda s: (s.logz.sum(), {"ids": s.topk_ids, "logp": s.topk_logp}), **keywords
        )
        ids, logp = aux["ids"], aux["logp"]
    wanted = (case.hidden.double() @ case.weight.double().T).log_softmax(dim=1)
    assert torch.equal(ids, (case.hidden @ case.weight.T).sort(dim=1, descending=True, stable=True).indices[:, :k])
    assert (logp - wanted.gather(1, ids)).abs().max() < 3e-5


@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_rows_with_too_many_equal_logits_are_projected_again(chunk_bytes):
    case = make_case(6, 300, 8, 3)
    case.hidden[[1, 4]] = 0.0  # every logit equal
    scores = [
        opd_kernels.topk_logprobs(one.hidden, one.weight, 4, always_include=case.ids[:, 1], backend=backend, chunk_bytes=chunk_bytes)
        for one, backend in ((case, "triton"), (case.cast(torch.float64), "reference"))
    ]
    assert torch.equal(scores[0].ids, scores[1].ids) and set(scores[0].ids[1, 1:].tolist()) <= {0, 1, 2, 3, -1}
    for name in ("logp", "tail_logp", "logz", "entropy"):
        torch.testing.assert_close(getattr(scores[0], name).double(), getattr(scores[1], name), rtol=0, atol=3e-5)


def test_a_shard_sorts_flagged_rows_without_its_own_removed_columns():
    """Global id 1003 is column 3 of a shard that begins at 1000; 3 is an id of another rank. All logits are equal: the rows are flagged."""
    z, ids, with_ = torch.zeros(2, 300), torch.tensor([[1003], [3]]), TileConstants(inverse_temperature=torch.ones(2))
    scan = triton_rows.scan_rows(z.clone(), ids, with_, 1000, 4, TILES)
    assert scan.redo.all()
    assert triton_rows.sort_flagged(scan, lambda rows: z[rows], ids, with_, 1000)
    assert scan.best_ids.tolist() == [[1000, 1001, 1002, 1004], [1000, 1001, 1002, 1003]]
    torch.testing.assert_close(scan.sums.l, torch.tensor([295.0, 296.0]))


def test_a_column_of_minus_infinity_stays_one_under_a_softcap_in_sorted_rows():
    """tanh(-inf) is -1: without the mask the column would have a logit of -softcap and a probability."""
    bias = torch.zeros(300)
    bias[7:] = NEG_INF
    with_ = TileConstants(inverse_temperature=torch.ones(2), bias=bias, softcap=5.0)
    z, ids = torch.zeros(2, 300), torch.full((2, 1), -1)
    scan = triton_rows.scan_rows(z.clone(), ids, with_, 0, 4, TILES)
    triton_rows.sort_flagged(scan, lambda rows: z[rows], ids, with_, 0)
    assert scan.best_ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(scan.sums.l, torch.full((2,), 3.0))


def test_a_removed_column_does_not_come_back_among_columns_of_minus_infinity():
    """Columns 0, 1 and 2 are finite, 1 is removed: what follows 0 and 2 is the lowest column of -inf that was not removed."""
    z = torch.full((1, 300), NEG_INF)
    z[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    with_, ids = TileConstants(inverse_temperature=torch.ones(1)), torch.tensor([[1]])
    scan = triton_rows.scan_rows(z.clone(), ids, with_, 0, 4, TILES)
    triton_rows.sort_flagged(scan, lambda rows: z[rows], ids, with_, 0)
    assert scan.best_ids.tolist() == [[0, 2, 3, 4]]
