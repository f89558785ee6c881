"""A family of policies by one number, and the model that picks the number for each state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .saved_policy import NETWORKS, network_shape, plain_network
from .stacked_networks import StackedMLP

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
# Width of the encoding and the base of its wavelengths, in the authors' code.
ENCODING = 6
_BASE = 10_000.0


def encode_balance(balance: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows 6"]:
    r"""Encode a balance coefficient by sines: :math:`(\sin x_0, \cos x_0, \sin x_1, \ldots)`.

    With :math:`x_i = \beta / 10^{4 \cdot 2i/6}`, the position encoding of a transformer of width 6.

    Args:
        balance: :math:`\beta`, shape ``(..., 1)``.

    Returns:
        Numbers in [-1, 1], shape ``(..., 6)``.
    """
    pairs = torch.arange(ENCODING // 2, device=balance.device, dtype=balance.dtype)
    waves = balance * _BASE ** (-2 * pairs / ENCODING)
    return torch.stack([waves.sin(), waves.cos()], -1).flatten(-2)


class BalanceModel(nn.Module):
    r"""Pick :math:`\beta = l + (y + 1)(h - l)/2` with :math:`y = \tanh(m(s) + \sigma\xi)`, a number a state.

    Args:
        observation_dim: Width of an observation.
        low: :math:`l`.
        high: :math:`h`.
        hidden: Widths of the hidden layers of :math:`m`.
        generators: One a member.
    """

    def __init__(
        self,
        observation_dim: int,
        *,
        low: float,
        high: float,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        if not (0 <= low < high and math.isfinite(high)):
            raise ValueError(f"balance must be a range 0 <= low < high, got ({low}, {high})")
        self.low, self.high = low, high
        self.network = StackedMLP((observation_dim, *hidden, 1), generators=generators)
        self.log_std = nn.Parameter(torch.zeros(len(generators), 1, 1))

    def spread(self, place: Tensor) -> Tensor:
        """Map places in [-1, 1] onto the range."""
        return self.low + (place + 1) * (self.high - self.low) / 2

    def forward(self, observation: Float[Tensor, "members batch n"]) -> Float[Tensor, "members batch 1"]:
        """Return the balance of each state without chance."""
        return self.spread(torch.tanh(self.network.head(observation)))

    def draw(
        self, observation: Float[Tensor, "members batch n"], noise: Float[Tensor, "members batch 1"]
    ) -> tuple[Float[Tensor, "members batch 1"], Float[Tensor, "members batch"]]:
        """Return balances drawn with given standard normal numbers, and the log density of their places in (-1, 1)."""
        log_std = self.log_std.clamp(-20, 2)
        before = self.network.head(observation) + log_std.exp() * noise
        log_slope = 2 * (math.log(2) - before - functional.softplus(-2 * before))
        log_prob = -(0.5 * noise.square() + log_std + _HALF_LOG_TWO_PI + log_slope).sum(-1)
        return self.spread(torch.tanh(before)), log_prob

    def uniform(self, noise: Float[Tensor, "members batch 1"]) -> Float[Tensor, "members batch 1"]:
        """Return balances uniform in the range, from standard normal numbers."""
        return self.spread(torch.erf(noise / math.sqrt(2)))


class BalancedNetwork(nn.Module):
    """Act by the member of the family that the balance model picks.

    Args:
        policy: From an observation and an encoded balance to an action before tanh.
        balance: From an observation to a place in the range, before tanh.
        low: Of the range.
        high: Of the range.
    """

    def __init__(self, policy: nn.Module, balance: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.policy, self.balance, self.low, self.high = policy, balance, low, high

    def forward(self, observation: Float[Tensor, "batch n"]) -> Float[Tensor, "batch m"]:
        """Return actions before tanh."""
        place = torch.tanh(self.balance(observation))
        chosen = self.low + (place + 1) * (self.high - self.low) / 2
        return self.policy(torch.cat([observation, encode_balance(chosen)], -1))

    def shape(self) -> dict[str, Any]:
        """Return what :func:`load_policy` needs to build such a network again."""
        policy, balance = network_shape(self.policy)["sizes"], network_shape(self.balance)["sizes"]
        return {"kind": "balanced", "policy": policy, "balance": balance, "low": self.low, "high": self.high}


def _balanced(policy: list[int], balance: list[int], low: float, high: float) -> BalancedNetwork:
    return BalancedNetwork(plain_network(policy), plain_network(balance), low, high)


NETWORKS["balanced"] = _balanced
