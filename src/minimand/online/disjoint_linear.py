r"""A first layer with weights of its own for each action of a bandit.

Where one context describes all actions, the usual way to give each action features of its own is to place the context
in block a of a vector of zeros, :math:`(0, \dots, x, \dots, 0) \in \mathbb R^{K d}`. A linear layer then has a separate
block of weights for each action, :math:`W_a x + c_a`; this layer holds just the blocks, and never makes the zeros.

Source: Li, Chu, Langford and Schapire 2010, arXiv 1003.0146, section 3.1 (disjoint models); Zhou, Li and Gu 2020,
arXiv 1911.04462, section 7 (the same encoding before a network).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks


class DisjointLinear(nn.Module):
    r"""Map one context to hidden units of every action, each by weights of its own.

    .. math:: h_a = W_a x + c_a, \qquad a = 1 \dots K .

    It is the linear layer of the context placed in block a of a vector of zeros, without the zeros. Layers after it are
    shared by the actions: end with one output, ``nn.Sequential(DisjointLinear(d, 50, num_actions=K), nn.ReLU(),
    nn.Linear(50, 1))``, and the network gives ``(batch, actions, 1)``, as the agents of this room take it.

    Args:
        in_features: Size d of a context.
        out_features: Units of an action.
        num_actions: Number of actions K, at least 2.
        bias: Whether there are biases :math:`c_a`.

    Raises:
        ValueError: If a size is below 1, or there are fewer than two actions.

    Example:
        >>> layer = DisjointLinear(4, 8, num_actions=3)
        >>> layer(torch.ones(5, 4)).shape
        torch.Size([5, 3, 8])

    Source:
        Li et al. 2010, arXiv 1003.0146, section 3.1; initial weights are those of ``nn.Linear(in_features, ...)``.
    """

    def __init__(self, in_features: int, out_features: int, *, num_actions: int, bias: bool = True) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        if num_actions < 2:
            raise ValueError(f"num_actions must be at least 2, got {num_actions}")
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_actions, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_actions, out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, contexts: Float[Tensor, "*batch dims"]) -> Float[Tensor, "*batch actions units"]:
        """Return the units of every action.

        Args:
            contexts: ``(*batch, in_features)``.

        Raises:
            ValueError: If contexts have another number of features, or are not finite.
        """
        num_actions, units, dims = self.weight.shape
        if contexts.dim() == 0 or contexts.shape[-1] != dims:
            raise ValueError(f"contexts must have {dims} features, got shape {tuple(contexts.shape)}")
        checks.finite(contexts.detach(), "contexts")
        bias = None if self.bias is None else self.bias.flatten()
        # One matrix product for all actions, as wide as their units together.
        return nn.functional.linear(contexts, self.weight.flatten(0, 1), bias).unflatten(-1, (num_actions, units))

    def extra_repr(self) -> str:
        """Show the sizes."""
        num_actions, units, dims = self.weight.shape
        return f"{dims}, {units}, num_actions={num_actions}, bias={self.bias is not None}"
