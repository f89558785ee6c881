"""Ctrl-U's loss, forward and backward, against its formula by torch's kl_div and against the plain reward loss."""

import pytest
import torch
from torch.nn import functional

from benchmarks.timing import paired_ratio
from minimand.preferences import UncertaintyWeightedLoss

LOSS = UncertaintyWeightedLoss()


def ours(first, second, target):
    return LOSS(first, second, functional.cross_entropy(first, target, reduction="none"))


def by_hand(first, second, target):
    """The formula as one would write it: kl_div of log-probabilities and probabilities, without checks."""
    uncertainty = functional.kl_div(first.log_softmax(1), second.softmax(1), reduction="none").sum(1)
    loss = functional.cross_entropy(first, target, reduction="none")
    return (torch.exp(-uncertainty) * loss).mean() + uncertainty.mean()


def plain(first, second, target):
    return functional.cross_entropy(first, target)


def step(loss, shape):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)

    def run():
        first.grad = second.grad = None
        loss(first, second, target).backward()

    return run


# On a small map the limit leaves room for the argument checks; on maps of a real size there is nothing to excuse.
@pytest.mark.parametrize(
    ("shape", "inner", "limit"), [((8, 4, 16, 16), 20, 2.0), ((8, 20, 64, 64), 2, 1.0), ((2, 150, 128, 128), 1, 1.0)]
)
def test_the_uncertainty_weighted_loss_costs_no_more_than_its_formula(record, shape, inner, limit):
    name = " x ".join(map(str, shape))
    ratio = paired_ratio(step(ours, shape), step(by_hand, shape), inner=inner)
    record(f"ctrl-u against its formula by kl_div, {name}", ratio.median, unit="x", target=f"<= {limit}")
    record(f"ctrl-u, {name}, ours", 1e3 * ratio.ours_seconds, unit="ms")
    against_plain = paired_ratio(step(ours, shape), step(plain, shape), inner=inner)
    record(f"ctrl-u against the plain reward loss, {name}", against_plain.median, unit="x")
    assert ratio.median <= limit


def test_a_second_generation_about_doubles_a_step_through_the_reward_network(record):
    """What Ctrl-U costs in training: two generations through the network, and the loss on both, against one."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 20, 3, padding=1)
    ).requires_grad_(False)
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.zeros(4, 48, 48, dtype=torch.long)

    def both():
        images.grad = None
        ours(*network(images).chunk(2), target).backward()

    def one():
        images.grad = None
        plain(network(images[:4]), None, target).backward()

    ratio = paired_ratio(both, one, inner=2)
    record("a step of ctrl-u's reward against one of the plain reward", ratio.median, unit="x", target="<= 3")
    assert ratio.median <= 3
