"""Stable elementary functions that more than one room needs."""

from __future__ import annotations

import math

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


def comp_sum(log_probability: Float[Tensor, "*shape"], tau: float) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`(p^{\tau-1} - 1) / (1 - \tau)` from :math:`\log p`; :math:`-\log p` at ``tau = 1``.

    expm1 keeps every digit as ``tau`` nears 1. Below 1 the value grows like :math:`p^{\tau-1}`; past the square root
    of the dtype's largest number it goes on along its tangent, so that neither it nor its gradient overflows.
    """
    if tau == 1:
        return -log_probability
    z = (tau - 1) * log_probability
    if tau > 1:
        return torch.expm1(z) / (1 - tau)
    ceiling = 0.5 * math.log(torch.finfo(z.dtype).max)
    beyond = torch.relu(z - ceiling)
    return torch.add(torch.expm1(z - beyond), beyond, alpha=math.exp(ceiling)) / (1 - tau)
