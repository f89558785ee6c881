"""Stable elementary functions that more than one room needs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def expm1_ratio(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`(e^z - 1) / z`, continuous through ``z = 0`` where it is 1.

    Both the value and the gradient stay exact near zero, where the quotient itself is 0 / 0.
    """
    small = z.abs() < 1e-5 if z.dtype == torch.float64 else z.abs() < 1e-2
    safe = torch.where(small, torch.ones_like(z), z)  # keeps the unused branch's gradient finite
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return torch.where(small, series, torch.expm1(safe) / safe)


def categorical_kl(
    log_p: Float[Tensor, "*batch classes"], log_q: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Compute KL(p || q) of categorical distributions given by their log-probabilities; 0 log 0 is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
