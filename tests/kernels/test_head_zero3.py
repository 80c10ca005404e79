"""The Head under DeepSpeed's ZeRO stage 3: weights exist only while their module runs, forward and backward."""

import os

import pytest

from tests.kernels.cases import relative
from tests.kernels.head_models import TinyModel, expected_gradients, loss_of
from tests.kernels.ranks import launch

CASES = [("composable", {}), ("fused", {}), ("dense", {}), ("fused", {"tied": True}), ("composable", {"frozen_head": True})]


def zero3_equals_one_process(rank: int, world: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else the first use compiles a C++ all-reduce, for half a minute
    for kind, keywords in CASES:
        model = TinyModel(**keywords)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        assert model.lm_head.weight.numel() == 0  # partitioned: outside its module there is no weight
        engine.backward(loss_of(engine, kind, rank))
        wanted = expected_gradients(kind, world, **keywords)
        for name, parameter in model.named_parameters():
            grad = deepspeed.utils.safe_get_full_grad(parameter) if parameter.requires_grad else None
            assert (grad is None) == (name not in wanted), name
            assert grad is None or relative(grad, wanted[name]) < 1e-6, (kind, name, relative(grad, wanted[name]))
        engine.destroy()


@pytest.mark.parametrize("world", [2])
def test_zero3(world, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(zero3_equals_one_process, world, tmp_path)
