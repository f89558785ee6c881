"""LDR-KL and ALDR-KL, forward and backward, against torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import paired_ratio
from minimand.losses import ALDRKLLoss, LDRKLLoss


@pytest.mark.parametrize(("batch", "classes", "inner"), [(256, 10, 20), (4096, 1000, 1)])
@pytest.mark.parametrize("name", ["ldr-kl", "ldr-kl, normalised", "aldr-kl, running", "aldr-kl, exact"])
def test_step_against_cross_entropy(record, name, batch, classes, inner):
    scores = torch.randn(batch, classes, requires_grad=True)
    target = torch.randint(classes, (batch,))
    index = torch.arange(batch)
    if name == "aldr-kl, running":
        running = ALDRKLLoss(batch)
        value = lambda: running(scores, target, index=index)  # noqa: E731
    else:
        loss = {
            "ldr-kl": LDRKLLoss(2.0),
            "ldr-kl, normalised": LDRKLLoss(2.0, normalize="l1"),
            "aldr-kl, exact": ALDRKLLoss(solve="exact"),
        }[name]
        value = lambda: loss(scores, target)  # noqa: E731

    def ours():
        scores.grad = None
        value().backward()

    def peer():
        scores.grad = None
        F.cross_entropy(scores, target).backward()

    ratio = paired_ratio(ours, peer, inner=inner)
    # The plain loss has cross-entropy's cost in view; normalising, and solving for temperatures, is extra work.
    limit = {"ldr-kl": 3.0, "ldr-kl, normalised": 8.0, "aldr-kl, running": 15.0}.get(name, 250.0)
    record(f"{name} step over cross-entropy, {batch} x {classes}", ratio.median, unit="x", target=f"<= {limit:g}")
    assert ratio.median <= limit
