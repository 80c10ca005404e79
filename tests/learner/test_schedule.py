"""Learning rates and the clip, by hand."""

import math

import torch
from pytest import approx, mark

from opd.learner.optimizer import adamw, clip
from opd.learner.schedule import learning_rate
from opd.learner.types import OptimizerSettings


@mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0]),
    ],
)
def test_warm_up_then_the_schedule(schedule, expected):
    settings = OptimizerSettings(lr=1.0, schedule=schedule, warmup_steps=4, total_steps=8)
    assert [learning_rate(settings, step) for step in range(10)] == approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate(OptimizerSettings(lr=3e-4, schedule="cosine", total_steps=10), 0) == 3e-4


def test_gradients_are_scaled_together_to_the_largest_norm():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    finite, norm = clip([first, second], 1.0)
    assert finite and norm == approx(5.0)
    assert [first.grad.item(), second.grad.item()] == approx([0.6, 0.8], abs=1e-6)


def test_smaller_gradients_are_left_alone_and_nan_is_reported():
    one = torch.nn.Parameter(torch.zeros(2))
    one.grad = torch.tensor([0.3, 0.4])
    assert clip([one], 1.0) == (True, approx(0.5))
    assert one.grad.tolist() == approx([0.3, 0.4], abs=1e-7)
    one.grad = torch.tensor([float("inf"), 0.0])
    assert not clip([one], 1.0)[0]


def test_the_first_step_of_adamw_by_hand():
    """Bias-corrected moments cancel on the first step: the update is lr * sign(g), after decay by lr * decay on matrices alone."""
    matrix, vector = torch.nn.Parameter(torch.ones(1, 1)), torch.nn.Parameter(torch.ones(1))
    optimizer = adamw({"matrix": matrix, "vector": vector}, OptimizerSettings(lr=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.tensor([[2.0]]), torch.tensor([-2.0])
    optimizer.step()
    assert matrix.item() == approx(1.0 - 0.05 - 0.1, abs=1e-6) and vector.item() == approx(1.1, abs=1e-6)
