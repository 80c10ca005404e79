"""The fused product of kernels/benchmarks and the leaner pass: interpreted, against fp64 and the library, and compiled for Hopper without a GPU."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from opd_kernels.row_kernels import Tiles
from opd_kernels.triton_topk import GroupSums, group_sums, top_of_groups

from tests.kernels.triton_cases import Guarded, constants, logits

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
SCRIPT = Path(__file__).with_name("compile_fused_product.py")
GROUP = 16
TILES = Tiles(block=64, group=GROUP)
SHARED_BYTES = 227 << 10  # of a Hopper program
NEG_INF = float("-inf")
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": -0.5},
    "everything": {"bias": True, "softcap": 5.0, "scale": -0.5},
}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def module(name: str):
    return importlib.import_module(name)


def small(**changes: int):
    return replace(module("fused_product").LaunchShape(rows=16, columns=32, depth=16, warps=4, stages=2, swath=2), **changes)


def operands(rows: int, columns: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    hidden, weight = (torch.randn(size, hidden_size, generator=generator) for size in (rows, columns))
    return (hidden * 6 / hidden_size**0.5).to(dtype), weight.to(dtype)


class Fused:
    """What one launch wrote, into guarded buffers."""

    def __init__(self, hidden, weight, with_, shape, *, store: bool = True) -> None:
        rows, columns = len(hidden), len(weight)
        self.products = Guarded(rows, columns, gap=8 - columns % 4)
        kept = [Guarded(rows, triton.cdiv(columns, GROUP), dtype, gap=0) for dtype in (torch.int32, torch.float32, torch.float32)]
        self.buffers, self.z = [self.products, *kept], self.products.tile
        self.z.fill_(math.nan)
        self.sums = GroupSums(code=kept[0].tile, total=kept[1].tile, centred=kept[2].tile)
        module("fused_product").fused_product(hidden, weight, self.z, self.sums, GROUP, with_, shape, store=store)

    def guards_hold(self) -> bool:
        return all(buffer.bands_hold() and buffer.gaps_hold() for buffer in self.buffers)


def exact_moments(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(largest, log of the sum of exponentials, mean logit under them) of each group of fp64 logits."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP), value=NEG_INF).view(len(x), -1, GROUP)
    mean = (x.softmax(dim=2) * x.masked_fill(x == NEG_INF, 0.0)).sum(dim=2)
    return x.amax(dim=2), x.logsumexp(dim=2), mean


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "columns", "hidden_size"), [(19, 75, 24), (16, 64, 16)])
def test_equals_fp64_dense(rows, columns, hidden_size, options):
    hidden, weight = operands(rows, columns, hidden_size)
    with_ = constants(rows, columns, **OPTIONS[options])
    done = Fused(hidden, weight, with_, small())
    exact = hidden.double() @ weight.double().T
    torch.testing.assert_close(done.z.double(), exact, rtol=0, atol=5e-5)
    wanted = exact_moments(logits(exact, with_))
    for got, want in zip(module("gpu_fused_product").moments(done.sums), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
    assert done.guards_hold()


@pytest.mark.parametrize("options", OPTIONS)
def test_codes_are_the_bits_that_the_selection_finds_again(options):
    hidden, weight = operands(5, 75, 8, torch.float16)
    with_ = constants(5, 75, **OPTIONS[options])
    done = Fused(hidden, weight, with_, small())
    unfused = group_sums(done.z, GROUP, with_, TILES)
    assert torch.equal(done.sums.code, unfused.code)
    torch.testing.assert_close(done.sums.total, unfused.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(done.sums.centred, unfused.centred, rtol=1e-5, atol=1e-5)
    best = top_of_groups(done.z, done.sums, 2, GROUP, with_, TILES)
    wanted = logits(done.z, with_).sort(dim=1, descending=True, stable=True).indices[:, :2]
    assert torch.equal(best.columns, wanted) and not best.redo.any()


def test_infinite_and_undefined_products():
    hidden, weight = operands(18, 80, 8)
    hidden[:, 0] = 1.0
    hidden[17, 3] = math.nan
    weight[[3, 40], 0] = NEG_INF
    weight[16:32, 0] = NEG_INF  # a group without a finite logit
    weight[50, 0] = math.inf
    weight[70, 1] = math.nan  # one of a group's columns
    with_ = constants(18, 80)
    done, groups = Fused(hidden, weight, with_, small()), 5
    unfused = group_sums(done.z, GROUP, with_, TILES)
    assert torch.equal(done.sums.code, unfused.code) and done.guards_hold()
    torch.testing.assert_close(done.sums.total, unfused.total, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(done.sums.centred, unfused.centred, rtol=1e-5, atol=1e-5, equal_nan=True)
    largest, *_ = module("gpu_fused_product").moments(done.sums)
    assert (largest[:17, 1] == NEG_INF).all() and (done.sums.total[:17, 1] == 0).all() and (done.sums.centred[:17, 1] == 0).all()
    assert (largest[:17, 3] == math.inf).all() and done.sums.total[:17, [0, 2]].isfinite().all()
    assert largest[:, 4].isnan().all() and done.sums.total[:, 4].isnan().all()
    assert largest[17].isnan().all() and done.sums.total[17].isnan().tolist() == [True] * groups


@pytest.mark.parametrize("changes", [{"swath": 1}, {"swath": 3}, {"columns": 16}, {"rows": 32, "columns": 64}])
def test_every_order_and_tile_gives_the_same_bits(changes):
    hidden, weight = operands(37, 70, 16)
    with_ = constants(37, 70)
    one, other = Fused(hidden, weight, with_, small()), Fused(hidden, weight, with_, small(**changes))
    assert one.z.isfinite().all() and other.guards_hold()
    assert torch.equal(one.z, other.z) and torch.equal(one.sums.code, other.sums.code) and torch.equal(one.sums.total, other.sums.total)


def test_without_storing_only_the_statistics_are_written():
    hidden, weight = operands(16, 48, 16)
    with_ = constants(16, 48)
    done = Fused(hidden, weight, with_, small(), store=False)
    assert done.z.isnan().all() and torch.equal(done.sums.code, Fused(hidden, weight, with_, small()).sums.code)


def test_one_command_measures_compares_and_decides():
    command = module("gpu_fused_product")
    sizes = replace(command.HEADLINE, tokens=3, columns=70, hidden_size=16, chosen=2, device=torch.get_default_device().type)
    done = command.table(sizes, (small(),), 16, TILES, 1)
    lean = [f"{command.LEAN}, {warps} warps" for warps in (4, 8)]
    assert [row["system"] for row in done["rows"]] == [command.PRODUCT, command.UNFUSED, *lean, done["best"]]
    assert len(done["following"]) == 4 and all(row["teraflops"] > 0 for row in done["rows"] + done["following"])
    assert done["agrees"] and done["differences"]["share_of_equal_top_ids"] == 1.0
    assert max(value for name, value in done["differences"].items() if name != "share_of_equal_top_ids") < 1e-4
    assert not command.agrees(done["differences"] | {"mean": math.nan})


def test_the_rule():
    command = module("gpu_fused_product")
    row = {"system": "fused", "seconds": 0.008, "teraflops": 637.3, "ratio": 1.08}
    done = {"sizes": {"hidden_size": 2048}, "rows": [row], "best": "fused", "agrees": True}
    assert command.verdict([done]) == "H = 2048: 637 TFLOP/s, 1.08 of the product alone (fused), more than 600: fuse"
    slow = command.verdict([done | {"rows": [row | {"teraflops": 600.0}]}])
    assert slow.endswith("not more than 600: do not fuse")
    for without in (done | {"agrees": False}, done | {"best": None}, done | {"sizes": {"hidden_size": 1024}}):
        assert command.verdict([without]).startswith("no verdict")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("columns", "group"), [(331, 64), (256, 128), (75, 16)])
def test_the_leaner_pass_is_the_pass(columns, group, options):
    products = Guarded(3, columns)  # what lies between the rows is read by neither
    products.tile.copy_(torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)) * 6)
    products.tile[1, : group + 3], products.tile[2, 7] = NEG_INF, math.nan
    with_, tiles = constants(3, columns, **OPTIONS[options]), Tiles(block=2 * group, group=group)
    lean, library = (one(products.tile, group, with_, tiles) for one in (module("lean_group_sums").lean_group_sums, group_sums))
    assert torch.equal(lean.code, library.code) and lean.total[:2].isfinite().all() and lean.total[2, 0].isnan()
    torch.testing.assert_close(lean.total, library.total, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(lean.centred, library.centred, rtol=1e-5, atol=1e-5, equal_nan=True)


def compiled(positions: list[int | str], cache: Path) -> list[dict]:
    """What the machine code of those launch shapes needs: each plain, then with every option."""
    paths = [str(Path(triton.__file__).parents[1]), *(path for path in sys.path if path), str(SCRIPT.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(SCRIPT), *(str(position) for position in positions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(launches) == 2 * len(positions)
    return launches


def check_launches(launches: list[dict]) -> None:
    assert all(launch["shared"] <= SHARED_BYTES and not launch["remarks"] for launch in launches)
    assert all(len(launch["products"]) == 1 and launch["products"][0].endswith("k16.f32.bf16.bf16") for launch in launches)
    assert all(launch["stack"] == launch["local"] == 0 for launch in launches[::2])  # nothing is spilled without options


def test_compiles_for_hopper(tmp_path):
    check_launches(compiled([0], tmp_path))


def test_the_leaner_pass_compiles_for_hopper(tmp_path):
    assert all(launch["stack"] == launch["local"] == 0 and launch["shared"] <= 48 << 10 for launch in compiled(["lean"], tmp_path))


@pytest.mark.slow
def test_every_launch_shape_compiles_for_hopper(tmp_path):
    shapes = module("fused_product").SHAPES
    launches = compiled(list(range(1, len(shapes))), tmp_path)
    check_launches(launches)
    resident = [shape.warps * 32 * launch["reg"] for shape, launch in zip(shapes[1:], launches[::2], strict=True)]
    small_tiles = [index for index, shape in enumerate(shapes[1:]) if shape.rows * shape.columns == 128 * 128]
    assert len(small_tiles) == 2 and all(2 * resident[index] <= 1 << 16 for index in small_tiles)  # two programs an SM
    assert all(2 * (launches[2 * index]["shared"] + 1024) <= 228 << 10 for index in small_tiles)
