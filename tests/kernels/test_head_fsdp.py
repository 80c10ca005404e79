"""The Head under FSDP2: parameters are DTensors outside their module's forward and backward."""

import opd_kernels
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.kernels.cases import relative
from tests.kernels.head_models import HIDDEN, TinyModel, expected_gradients, loss_of
from tests.kernels.ranks import launch

CASES = [("composable", {}), ("fused", {}), ("dense", {}), ("fused", {"frozen_head": True}), ("composable", {"tied": True})]


def fsdp_equals_one_process(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind, keywords in CASES:
        model = TinyModel(**keywords)
        if not keywords.get("tied"):  # tied parameters belong to one group: that of the root
            fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        loss_of(model, kind, rank).backward()
        wanted = expected_gradients(kind, world, **keywords)
        for name, parameter in model.named_parameters():
            grad = None if parameter.grad is None else parameter.grad.full_tensor()
            assert (grad is None) == (name not in wanted), name
            assert grad is None or relative(grad, wanted[name]) < 1e-6, (kind, name, relative(grad, wanted[name]))
        with pytest.raises(ValueError, match="weight is a DTensor; call the operation inside opd_kernels.Head's forward"):
            opd_kernels.selected_logprobs(torch.randn(1, HIDDEN), model.lm_head.weight, torch.zeros(1, 1, dtype=torch.int64))


def test_fsdp2(tmp_path):
    launch(fsdp_equals_one_process, 2, tmp_path)
