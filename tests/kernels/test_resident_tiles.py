"""Tiles that forward leaves for backward: how many products that saves, how long the memory lives, and that no gradient depends on it."""

import itertools

import opd_kernels
import pytest
import torch
from opd_kernels.placement import Placement
from opd_kernels.resident import Grid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.allocations import Allocations, allocations_of
from tests.kernels.cases import assert_same, make_case, oracle, run, upstream_of

TOKENS, COLUMNS, HIDDEN, WIDTH = 40, 1000, 16, 64
TILE_BYTES = 4 * TOKENS * WIDTH  # 16 tiles, the last of 40 columns
HALF = 8 * TILE_BYTES
REST = 7 * WIDTH + 40  # columns of the last 8 tiles


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    monkeypatch.setattr("opd_kernels.tiling._CPU_WIDTH", WIDTH)


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "linear"), f"{name} is not counted"
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def products(work, one: int = TOKENS * COLUMNS * HIDDEN) -> float:
    """Matrix products of N x V x H that `work` executes."""
    with Multiplications() as multiplications:
        work()
    return multiplications.total / one


def leaves(seed: int = 0):
    case = make_case(TOKENS, COLUMNS, HIDDEN, 5, logit_std=3.0, seed=seed)
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(), case.ids


def loss_of(hidden, weight, ids, **keywords):
    """A loss on every output that was asked for."""
    selected = opd_kernels.selected_logprobs(hidden, weight, ids, backend="torch", **keywords)
    loss = torch.where(ids >= 0, selected.logp, 0.0).sum() + 0.3 * selected.tail_logp.sum()
    return loss if selected.entropy is None else loss + 0.1 * selected.entropy.square().sum()


def gradients(**keywords):
    hidden, weight, ids = leaves()
    return torch.autograd.grad(loss_of(hidden, weight, ids, **keywords), (hidden, weight))


# An entropy takes a second area of a tile's size from the same budget, a softcap another one.
@pytest.mark.parametrize(
    ("areas", "options", "kept_columns"),
    [
        (1, {"entropy": False}, 40),
        (4, {"entropy": False}, 3 * WIDTH + 40),
        (16, {"entropy": False}, COLUMNS),
        (100, {"entropy": False}, COLUMNS),
        (4, {}, 2 * WIDTH + 40),
        (17, {}, COLUMNS),
        (4, {"softcap": 9.0}, WIDTH + 40),
        (4, {"softcap": 9.0, "entropy": False}, 2 * WIDTH + 40),
    ],
)
def test_only_what_was_given_up_is_multiplied_again(areas, options, kept_columns):
    """4 products less the kept share of the columns; 3 where all are kept, like autograd over whole logits."""
    counted = products(lambda: gradients(chunk_bytes=areas * TILE_BYTES, **options))
    assert counted == pytest.approx(4 - kept_columns / COLUMNS, abs=1e-9)


def test_a_frozen_head_saves_the_same_product():
    hidden, weight, ids = leaves()
    counted = products(lambda: loss_of(hidden, weight.detach(), ids, chunk_bytes=HALF, entropy=False).backward())
    assert counted == pytest.approx(3 - REST / COLUMNS, abs=1e-9)


@pytest.mark.parametrize(
    ("frozen", "lent_tiles"),
    [((), 6), (("weight",), 0), (("hidden",), 6)],  # the weight's gradient takes 6.25 tiles of memory
)
def test_without_a_budget_tiles_also_take_the_memory_of_the_gradient_to_come(monkeypatch, frozen, lent_tiles):
    monkeypatch.setattr("opd_kernels.types.CPU_TILE_BYTES", (2 * TILE_BYTES, 2 * TILE_BYTES))
    hidden, weight, ids = leaves()
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        tensor.requires_grad_(name not in frozen)
    small = 24 * 4 * TOKENS * 5  # tensors of [N, K], int64 ones twice, with room
    with Allocations(hidden, weight, ids) as counted:
        loss = loss_of(hidden, weight, ids, entropy=False)
        assert 0 <= counted.alive_bytes - 2 * TILE_BYTES - (4 * HIDDEN * COLUMNS if lent_tiles else 0) <= small
    kept_columns = (1 + lent_tiles) * WIDTH + 40
    assert products(loss.backward) == pytest.approx(1 + (not frozen) + 1 - kept_columns / COLUMNS, abs=1e-9)
    wanted, theirs = (
        torch.autograd.grad(loss_of(hidden, weight, ids, chunk_bytes=b), [t for t in (hidden, weight) if t.requires_grad]) for b in (TILE_BYTES, None)
    )
    for left, right in zip(wanted, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "columns", "hidden_size"), [(8, 1000, 64), (64, 640, 64), (200, 1030, 24), (4200, 400, 48), (9, 64, 4)])
def test_a_gradient_is_written_over_no_tile_that_waits(monkeypatch, tokens, columns, hidden_size, dtype, entropy):
    """Fewer tokens than hidden numbers and more, several tiles of rows, gradients of half and of twice the size: the second pass has no loan."""
    case = make_case(tokens, columns, hidden_size, 3, logit_std=3.0, seed=1)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (case.hidden, case.weight)]
    tile = min(tokens, 4096) * WIDTH * (8 if dtype == torch.float64 else 4)
    monkeypatch.setattr("opd_kernels.types.CPU_TILE_BYTES", (3 * tile, 3 * tile))
    loss = loss_of(*inputs, case.ids, entropy=entropy)
    first, again = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    without = torch.autograd.grad(loss_of(*inputs, case.ids, entropy=entropy, chunk_bytes=3 * tile), inputs)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float64: 1e-13}[dtype]
    assert all((left - right).norm() <= rounding * right.norm() for left, right in zip(first, without, strict=True))


def test_tiles_that_a_gradient_lends_memory_to_lie_before_what_is_written():
    """Every small grid: as a block of columns is written, its own tiles and those of all earlier columns lie before its place."""
    lent = 0
    for rows, blocks, height, hidden_size, size in itertools.product((1, 2, 3), range(1, 7), (1, 2, 3, 5, 9), (1, 2, 4, 9, 30), (2, 4)):
        where = Placement(**dict.fromkeys(("entry", "row", "column")), bounds=[], row_tiles=rows, tile_rows=height, tile_columns=4)
        grid = Grid(where=where, elements=4 * height, tiles=rows * blocks, parts=1, budget=0, entropy=False)
        weight = torch.empty(4 * blocks, hidden_size, dtype={2: torch.bfloat16, 4: torch.float32}[size])
        count = grid.lendable(weight, 4)
        lent += count
        assert 0 <= count < grid.tiles
        for block in range((grid.tiles - count) // rows, blocks) if count else ():
            waiting = (block + 1) * rows - (grid.tiles - count)
            assert waiting * 4 * height * 4 <= block * 4 * hidden_size * size
    assert lent > 1000


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_only_the_newest_of_several_waiting_calls_borrows(monkeypatch, order):
    """The older one forms its borrowed tiles again, to the same bits; with a backward pass begun nothing is taken from it."""
    monkeypatch.setattr("opd_kernels.types.CPU_TILE_BYTES", (2 * TILE_BYTES, 2 * TILE_BYTES))
    inputs, losses, loans = [leaves(seed) for seed in (0, 1)], [], []
    alone = [torch.autograd.grad(loss_of(*of_one, entropy=False), of_one[:2]) for of_one in inputs]

    def pack(tensor):
        if tensor.shape == of_one[1].shape and tensor is not of_one[1]:
            loans.append(tensor)
        return tensor

    for of_one in inputs:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses.append(loss_of(*of_one, entropy=False))
    assert [loan.untyped_storage().nbytes() for loan in loans] == [0, 4 * HIDDEN * COLUMNS]
    for turn, again in zip(order, (5 * WIDTH + 40, 0) if order == (0, 1) else (0, 5 * WIDTH + 40), strict=True):
        grads = []
        work = lambda: grads.extend(torch.autograd.grad(losses[turn], inputs[turn][:2]))  # noqa: B023, E731
        assert products(work) == pytest.approx(3 - (7 * WIDTH + 40 - again) / COLUMNS, abs=1e-9)
        assert all(torch.equal(left, right) for left, right in zip(grads, alone[turn], strict=True))


def test_a_forward_inside_backward_takes_nothing_from_it(monkeypatch):
    """Recomputation under checkpointing runs forwards between the tiles' use and their release."""
    monkeypatch.setattr("opd_kernels.types.CPU_TILE_BYTES", (2 * TILE_BYTES, 2 * TILE_BYTES))
    hidden, weight, ids = leaves()
    wanted = torch.autograd.grad(loss_of(hidden, weight, ids, entropy=False), (hidden, weight))
    loss = loss_of(hidden, weight, ids, entropy=False)
    inner, add_tile = [], opd_kernels.chunked.add_tile

    def interrupted(*arguments):
        if not inner:
            with torch.enable_grad():
                inner.append(loss_of(hidden, weight, ids, entropy=False))
        add_tile(*arguments)

    monkeypatch.setattr("opd_kernels.chunked.add_tile", interrupted)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert inner and all(torch.equal(left, right) for left, right in zip(grads, wanted, strict=True))


def test_two_checkpointed_calls_save_alike_when_they_run_again(monkeypatch):
    """Recomputed together both wait, the first with its borrowed tiles recalled: the shapes that checkpointing compares are the same."""
    monkeypatch.setattr("opd_kernels.types.CPU_TILE_BYTES", (2 * TILE_BYTES, 2 * TILE_BYTES))
    hidden, weight, ids = leaves()

    def two(hidden, weight):
        return loss_of(hidden, weight, ids, entropy=False) + loss_of(hidden * 0.5, weight, ids, entropy=False)

    wanted = torch.autograd.grad(two(hidden, weight), (hidden, weight))
    grads = torch.autograd.grad(checkpoint(two, hidden, weight, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(left, right) for left, right in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_call_uses_the_tiles_that_it_has_formed_again(monkeypatch, reentrant):
    """One product more than without checkpointing, wherever the memory of the second forward lies."""
    monkeypatch.setattr("opd_kernels.types.CPU_TILE_BYTES", (2 * TILE_BYTES, 2 * TILE_BYTES))
    hidden, weight, ids = leaves()
    between = []

    def work():
        loss = checkpoint(lambda h, w: loss_of(h, w, ids, entropy=False), hidden, weight, use_reentrant=reentrant)
        between.append(torch.empty(COLUMNS, HIDDEN))  # takes the place that the first forward's has left
        loss.backward()

    assert products(work) == pytest.approx(5 - (7 * WIDTH + 40) / COLUMNS, abs=1e-9)


def test_tiles_split_over_rows_and_columns():
    """5,000 tokens in tiles of 4,096: the budget holds 3 of the 4 tiles, and what is left out is the shorter one of the first columns."""
    case = make_case(5000, 2 * WIDTH, 4, 3)
    upstream = upstream_of(case, ("logp", "tail_logp", "logz"))
    one, budget = 5000 * 2 * WIDTH * 4, 4 * 4 * 4096 * WIDTH  # a fourth area for the entropy's second one
    results = []
    assert products(lambda: results.append(run(case, upstream, path="composable", chunk_bytes=budget)), one) == pytest.approx(
        3 + (5000 - 4096) * WIDTH / (5000 * 2 * WIDTH), abs=1e-9
    )
    assert_same(results[0], oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize("chunk_bytes", [TILE_BYTES, HALF, 100 * TILE_BYTES])
@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"with_bias": True, "temperature": torch.linspace(0.5, 2.0, TOKENS)}], ids=str)
@pytest.mark.parametrize("names", [("logp", "tail_logp", "logz", "entropy"), ("logp", "tail_logp"), ("logp",)], ids=str)
def test_gradients_equal_fp64_dense(chunk_bytes, options, names):
    case = make_case(TOKENS, COLUMNS, HIDDEN, 5, **options)
    upstream = upstream_of(case, names)
    assert_same(run(case, upstream, path="composable", chunk_bytes=chunk_bytes), oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize("chunk_bytes", [TILE_BYTES, HALF, 100 * TILE_BYTES])
def test_gradients_of_bf16_inputs(chunk_bytes):
    case = make_case(TOKENS, COLUMNS, HIDDEN, 5, dtype=torch.bfloat16)
    upstream = upstream_of(case)
    assert_same(run(case, upstream, path="composable", chunk_bytes=chunk_bytes), oracle(case, upstream), value=3e-5, gradient=8e-3)


def test_backward_casts_the_weight_in_one_place():
    """Fresh memory for every tile's cast would come from what the tiles before have given up, and touch it again."""
    hidden, weight, ids = leaves()
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    loss = loss_of(*half, ids, chunk_bytes=HALF)
    shapes = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in ("_to_copy", "empty", "new_empty"):
                shapes.append(tuple(result.shape))
            return result

    with Casts():
        torch.autograd.grad(loss, half)
    assert shapes.count((WIDTH, HIDDEN)) == 2  # a tile of the weight, and one of its gradient; 16 tiles are cast
    assert (TOKENS, HIDDEN) in shapes


@pytest.mark.parametrize("options", [{"entropy": False}, {}, {"softcap": 9.0}], ids=str)
def test_a_retained_graph_repeats_the_bits_without_the_memory(options):
    """The first backward pass overwrites and frees the kept tiles; the next ones form them again, at three products each."""
    hidden, weight, ids = leaves()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(hidden, weight, ids, chunk_bytes=HALF, **options)
    areas = [tensor for tensor in saved if tensor.numel() == TOKENS * WIDTH]
    assert len(areas) == 8 - (options.get("entropy", True) + ("softcap" in options))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert [area.untyped_storage().nbytes() for area in areas] == [0] * len(areas)
    for _ in range(2):
        again = []
        assert products(lambda: again.extend(torch.autograd.grad(loss, (hidden, weight), retain_graph=True))) == pytest.approx(3, abs=1e-9)  # noqa: B023
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_several_live_calls_keep_apart():
    """Forward of two batches, then backward in either order: bitwise what each gives alone."""
    alone = []
    for seed in (0, 1):
        hidden, weight, ids = leaves(seed)
        alone.append(torch.autograd.grad(loss_of(hidden, weight, ids, chunk_bytes=HALF), (hidden, weight)))
    for order in ((0, 1), (1, 0)):
        inputs = [leaves(seed) for seed in (0, 1)]
        losses = [loss_of(*of_one, chunk_bytes=HALF) for of_one in inputs]
        for turn in order:
            grads = torch.autograd.grad(losses[turn], inputs[turn][:2])
            assert all(torch.equal(left, right) for left, right in zip(grads, alone[turn], strict=True))


def test_a_weight_changed_between_the_passes_is_caught():
    hidden, weight, ids = leaves()
    loss = loss_of(hidden, weight, ids, chunk_bytes=100 * TILE_BYTES)
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_budget_bounds_what_is_held():
    """Whole logits are 160,000 bytes. Between the passes the budget's tiles are held, afterwards nothing; without a gradient one tile."""
    small = 24 * 4 * TOKENS * 5  # tensors of [N, K], int64 ones twice, with room
    hidden, weight, ids = leaves()
    returned = 4 * HIDDEN * (TOKENS + COLUMNS)
    for areas in (4, 8):
        with Allocations(hidden, weight, ids) as counted:
            loss = loss_of(hidden, weight, ids, chunk_bytes=areas * TILE_BYTES, entropy=False)
            assert areas * TILE_BYTES <= counted.alive_bytes <= areas * TILE_BYTES + small
            loss.backward()
            del loss
            assert counted.alive_bytes <= returned + small
        assert counted.peak_bytes <= areas * TILE_BYTES + returned + small
        hidden.grad = weight.grad = None
        with torch.no_grad():
            without = allocations_of(lambda: loss_of(hidden, weight, ids, chunk_bytes=HALF, entropy=False), hidden, weight, ids)  # noqa: B023
        assert without.peak_bytes <= TILE_BYTES + small
        constants = allocations_of(lambda: loss_of(hidden.detach(), weight.detach(), ids, chunk_bytes=HALF, entropy=False), hidden, weight, ids)  # noqa: B023
        assert constants.peak_bytes <= TILE_BYTES + small


def test_a_graph_that_is_dropped_frees_its_tiles():
    hidden, weight, ids = leaves()
    with Allocations(hidden, weight, ids) as counted:
        loss = loss_of(hidden, weight, ids, chunk_bytes=HALF, entropy=False)
        assert counted.alive_bytes >= HALF
        del loss
        assert counted.alive_bytes < TILE_BYTES


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_holds_no_tiles_and_changes_no_bit(reentrant):
    wanted = gradients(chunk_bytes=HALF)
    hidden, weight, ids = leaves()
    with Allocations(hidden, weight, ids) as counted:
        loss = checkpoint(lambda h, w: loss_of(h, w, ids, chunk_bytes=HALF), hidden, weight, use_reentrant=reentrant)
        assert counted.alive_bytes < TILE_BYTES
        loss.backward()
    assert torch.equal(hidden.grad, wanted[0]) and torch.equal(weight.grad, wanted[1])


def test_saved_tensors_may_be_moved_away():
    """Hooks that offload: backward receives copies, with memory that cannot be given up. It overwrites them, so that a second one must not."""
    wanted = gradients(chunk_bytes=HALF)
    hidden, weight, ids = leaves()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t if t is weight or t is hidden or t.dtype != torch.float32 else torch.from_numpy(t.detach().numpy().copy()),
        lambda t: t,
    ):
        loss = loss_of(hidden, weight, ids, chunk_bytes=HALF)
    for _ in range(2):
        grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert all(torch.equal(left, right) for left, right in zip(grads, wanted, strict=True))


def test_hooks_that_pack_into_one_buffer_keep_it():
    """A view of a larger storage is not this library's to free."""
    wanted = gradients(chunk_bytes=HALF)
    hidden, weight, ids = leaves()
    arena, used = torch.zeros(20 * TOKENS * WIDTH), [0]

    def pack(tensor):
        if tensor.numel() != TOKENS * WIDTH:
            return tensor
        place = arena[used[0] : used[0] + tensor.numel()]
        used[0] += tensor.numel()
        return place.copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(hidden, weight, ids, chunk_bytes=HALF)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert used[0] and arena.untyped_storage().nbytes() == 4 * arena.numel()
    assert all(torch.equal(left, right) for left, right in zip(grads, wanted, strict=True))


def test_overwriting_kept_tiles_is_no_change_that_autograd_counts():
    """Without hooks autograd compares versions of what it saved: a second backward must not take the first one's work for a mistake."""
    hidden, weight, ids = leaves()
    loss = loss_of(hidden, weight, ids, chunk_bytes=HALF)
    first, again = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
