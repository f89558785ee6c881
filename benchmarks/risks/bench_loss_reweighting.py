"""Dynamic reweighting's forward and backward pass against its formula written by hand, and against the plain mean."""

import pytest
import torch

from benchmarks.timing import paired_ratio
from minimand.risks import DynamicLossReweighting


def by_hand(losses):
    """LinUpper as in the paper's formula, without checks, warm-up or state."""
    x = losses.detach()
    h = (2 * x - x.max() - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
    return (torch.softmax((h + 1).clamp_max(1), 0) * losses).sum()


def step(risk, losses):
    leaf = losses.clone().requires_grad_()

    def run():
        leaf.grad = None
        risk(leaf).backward()

    return run


# At 64 the limit leaves room for the argument checks, which read the losses once.
@pytest.mark.parametrize(("size", "inner", "limit"), [(64, 50, 2.5), (65_536, 4, 1.5)])
def test_reweighting_costs_what_its_formula_costs(record, size, inner, limit):
    losses = torch.rand(size, generator=torch.Generator().manual_seed(0))
    ratio = paired_ratio(step(DynamicLossReweighting(), losses), step(by_hand, losses), inner=inner)
    record(f"reweighting against its formula by hand, batch {size}", ratio.median, unit="x", target=f"<= {limit}")
    record(f"reweighting, batch {size}, ours", 1e6 * ratio.ours_seconds, unit="us")
    against_mean = paired_ratio(step(DynamicLossReweighting(), losses), step(torch.mean, losses), inner=inner)
    record(f"reweighting against torch.mean, batch {size}", against_mean.median, unit="x")
    assert ratio.median <= limit
