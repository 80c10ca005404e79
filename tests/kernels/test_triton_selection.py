"""The kernels of what happens on [C, K], in the interpreter, against `selection` in fp64 and with its cases: duplicates, pads, -inf, NaN."""

import pytest
import torch
from opd_kernels import selection, selection_kernels
from opd_kernels.selection import RunningSums, Upstream

NEG_INF = float("-inf")
NAMES = ("logp", "tail_logp", "logz", "entropy")


def sums_and_chosen(ids: torch.Tensor, level: float = 0.0) -> tuple[torch.Tensor, RunningSums]:
    """Logits at ids [C, K] (equal ids have equal ones) and fp32 running sums over 30 other columns; levels above 0 make rows confident."""
    generator = torch.Generator().manual_seed(0)
    rows = ids.shape[0]
    table, rest = (torch.randn(rows, width, generator=generator) * 4 for width in (60, 30))
    table[:, 7] += level
    chosen = torch.where(ids < 0, NEG_INF, table.gather(1, ids.clamp(min=0)))
    m = rest.amax(dim=1)
    e = (rest - m[:, None]).double()
    return chosen, RunningSums(m=m, l=e.exp().sum(dim=1).float(), t=(e.exp() * e).sum(dim=1).float())


def wide(sums: RunningSums) -> RunningSums:
    return RunningSums(m=sums.m.double(), l=sums.l.double(), t=sums.t.double())


IDS = torch.tensor([[7, 3, 7, -1, 9], [-1, -1, -1, -1, -1], [59, 0, 59, 59, 0], [7, 8, 9, 10, 11], [1, 2, 3, -1, -1]])


@pytest.mark.parametrize("level", [0.0, 12.0, 30.0])
def test_finalize(level):
    chosen, sums = sums_and_chosen(IDS, level)
    sums.m[4], sums.l[4], sums.t[4] = NEG_INF, 0.0, 0.0  # nothing but the chosen columns
    found = selection_kernels.finalize_rows(chosen, IDS, sums)
    wanted = selection.finalize(chosen.double(), IDS, wide(sums))
    for name, one, exact in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=2e-6, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    if level == 12.0:  # 1 - p keeps its digits
        torch.testing.assert_close(torch.expm1(found[0][0, 0].double()), torch.expm1(wanted[0][0, 0]), rtol=1e-5, atol=0)


def test_finalize_of_dead_and_nan_rows():
    chosen, sums = sums_and_chosen(IDS)
    chosen[2], sums.m[2], sums.l[2], sums.t[2] = NEG_INF, NEG_INF, 0.0, 0.0
    chosen[3, 1] = float("nan")
    sums.m[1] = sums.l[1] = float("nan")
    logp, tail, logz, entropy = selection_kernels.finalize_rows(chosen, IDS, sums)
    assert logz[2] == NEG_INF and entropy[2] == 0 and (logp[2] == NEG_INF).all()
    assert logp[3].isnan().all() and all(values[row].isnan() for values in (tail, logz, entropy) for row in (1, 3))
    assert logp[0].isfinite().all() and entropy[0].isfinite()


@pytest.mark.parametrize("given", [NAMES, ("logp",), ("tail_logp",), ("logz",), ("entropy",), ("logp", "tail_logp")])
@pytest.mark.parametrize("level", [0.0, 12.0])
def test_coefficients(level, given):
    chosen, sums = sums_and_chosen(IDS, level)
    chosen[2], sums.m[2], sums.l[2], sums.t[2] = NEG_INF, NEG_INF, 0.0, 0.0
    sums.m[4], sums.l[4], sums.t[4] = NEG_INF, 0.0, 0.0
    generator = torch.Generator().manual_seed(1)
    drawn = {"logp": torch.randn(IDS.shape, generator=generator)} | {name: torch.randn(5, generator=generator) for name in NAMES[1:]}
    drawn["logz"] = torch.ones(1).expand(5)  # as a sum's gradient comes
    scale = torch.rand(5, generator=generator) + 0.5
    exact = selection.finalize(chosen.double(), IDS, wide(sums))
    state = [value.float() for value in exact]
    found = selection_kernels.coefficient_rows(Upstream(**{n: drawn[n] if n in given else None for n in NAMES}), IDS, *state, scale)
    upstream = Upstream(**{n: drawn[n].double() if n in given else None for n in NAMES})
    wanted = selection.coefficients(upstream, IDS, *[value.double() for value in state], scale.double())
    for name in ("reference", "scale", "slope", "selected"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=3e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert not found.selected[IDS < 0].any() and torch.equal(found.selected[0, 0], found.selected[0, 2])
