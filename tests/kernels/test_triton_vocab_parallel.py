"""The Triton operations, interpreted, on a vocabulary split unevenly over ranks, against one rank of the torch backend."""

import torch
import torch.distributed as dist

from tests.kernels.cases import make_case, relative
from tests.kernels.ranks import launch
from tests.kernels.test_vocab_parallel import VALID, VOCABULARY, everything
from tests.kernels.triton_cases import shrink_launches

SHARDS = (120, 75, 8)  # the last holds padded rows alone


def shard_equals_whole(rank: int, world: int) -> None:
    shrink_launches()
    case = make_case(21, VOCABULARY, 24, 7, with_bias=True, vocab_size=VALID)
    whole = everything(case, case.weight, case.bias)
    start = sum(SHARDS[:rank])
    rows = slice(start, start + SHARDS[rank])
    part = everything(case, case.weight[rows], case.bias[rows], backend="triton", process_group=dist.group.WORLD, vocab_start=start)
    for name, wanted in whole.items():
        if name.endswith(("d_weight", "d_bias")):
            wanted = wanted[rows]
        if wanted.dtype == torch.int64:
            assert torch.equal(part[name], wanted), name
        elif "/d_" in name:
            assert (part[name] - wanted).norm() <= 1e-5 * whole[name].norm(), (name, relative(part[name], wanted))
        else:
            torch.testing.assert_close(part[name], wanted, rtol=1e-6, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_shards_equal_the_whole(tmp_path):
    launch(shard_equals_whole, len(SHARDS), tmp_path)
