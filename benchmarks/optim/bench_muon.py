"""A step of Muon against torch's own, with the same number of polynomial steps in the same precision."""

import pytest
import torch
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.optim import Muon

NUM_STEPS = 6


def weights(count, size):
    found = [nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0))) for _ in range(count)]
    for weight in found:
        weight.grad = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    return found


# torch's computes in bfloat16; in float32, our default, a step costs what a processor's float32 products cost. At 512
# the products are nearly all of either step, and 1.2 lies within a shared machine's spread: recorded, not asserted.
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is in torch 2.9 and later")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "size"), [(24, 32), (12, 128), (4, 512)])
def test_a_step_costs_no_more_than_torchs(record, count, size, dtype):
    settings = {"momentum": 0.95, "weight_decay": 0.1}
    mine = Muon(weights(count, size), 0.02, nesterov=True, num_steps=NUM_STEPS, compute_dtype=dtype, **settings)
    peer = torch.optim.Muon(weights(count, size), lr=0.02, ns_steps=NUM_STEPS, **settings)
    ratio = paired_ratio(mine.step, peer.step, rounds=9)
    name = f"{count} weights of {size}, {str(dtype).removeprefix('torch.')}"
    record(f"Muon against torch's, {name}", ratio.median, unit="x", target="<= 1.2" if dtype == torch.bfloat16 else "")
    record(f"Muon, {name}, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert dtype != torch.bfloat16 or size == 512 or ratio.median <= 1.2
