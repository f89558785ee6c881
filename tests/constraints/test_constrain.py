"""Constraints on weights hold after every step, whatever the optimizer, and follow its schedule."""

import pytest
import torch
from torch import nn

from minimand.constraints import Ball, Box, Projection, constrain


class Recorder(Projection):
    """Keeps what it was told."""

    def __init__(self):
        self.calls = []

    def __call__(self, point, *, lr=0.0, weight_decay=0.0):
        self.calls.append((lr, weight_decay))
        return point.clone()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_weights_are_inside_from_the_start_and_after_each_step(make):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make(model.parameters(), lr=0.5)
    constrain(optimizer, Ball(0.5))
    assert model.weight.norm() <= 0.5 + 1e-6
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().mul(-1).backward()
        optimizer.step()
        assert model.weight.norm() <= 0.5 + 1e-6
    assert model.bias.norm() > 0.5  # a bias is left free unless named


def test_two_constraints_are_applied_in_the_order_they_were_added():
    weight = nn.Parameter(torch.tensor([[3.0, 0.0]]))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    constrain(optimizer, Ball(2.0))
    constrain(optimizer, Box(-1.0, 1.0))
    optimizer.step()
    assert torch.equal(weight.detach(), torch.tensor([[1.0, 0.0]]))


def test_a_projection_is_told_the_step_it_corrects():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    recorder = Recorder()
    constrain(optimizer, recorder)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert recorder.calls == [(0.5, 0.1), (0.5, 0.1), (0.25, 0.1)]


def test_any_function_of_a_weight_will_do():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    constrain(optimizer, lambda w: w.clamp_min(0), params=[weight])
    assert torch.equal(weight.detach(), torch.tensor([1.0, 0.0]))


def test_checkpoints_are_as_before():
    weight = nn.Parameter(torch.ones(2, 2))
    plain, constrained = (torch.optim.SGD([weight], lr=0.1, momentum=0.9) for _ in range(2))
    constrain(constrained, Ball(1.0))
    assert plain.state_dict().keys() == constrained.state_dict().keys()


@pytest.mark.untyped
def test_what_cannot_be_constrained_is_refused():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="no weight of two dimensions"):
        constrain(optimizer, Ball(1.0))
    with pytest.raises(ValueError, match="not the optimizer's"):
        constrain(optimizer, Ball(1.0), params=[nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="params is empty"):
        constrain(optimizer, Ball(1.0), params=[])
    with pytest.raises(TypeError, match="optimizer must be"):
        constrain(nn.Linear(1, 1), Ball(1.0))
