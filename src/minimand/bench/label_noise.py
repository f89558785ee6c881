"""Wrong labels, made on purpose."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from .. import checks


def flip_uniformly(
    target: Int[Tensor, " samples"], rate: float, num_classes: int, *, seed: int
) -> Int[Tensor, " samples"]:
    """Replace each label with probability ``rate`` by one of the other classes, all equally likely."""
    checks.between(rate, "rate", 0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.rand(len(target), generator=generator) < rate
    shift = torch.randint(1, num_classes, (len(target),), generator=generator)
    return torch.where(flipped, (target + shift) % num_classes, target)


def flip_to_next(
    target: Int[Tensor, " samples"], rate: float, num_classes: int, *, seed: int
) -> Int[Tensor, " samples"]:
    """Replace each label with probability ``rate`` by the next class: noise that depends on the class."""
    checks.between(rate, "rate", 0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.rand(len(target), generator=generator) < rate
    return torch.where(flipped, (target + 1) % num_classes, target)
