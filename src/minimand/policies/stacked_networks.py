"""Small networks of many learners side by side, so that what a call costs is paid once for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StackedMLP(nn.Module):
    r"""Apply multilayer perceptrons of one shape, one a member, to a batch of each member's own.

    Layer :math:`l` of member :math:`s` is :math:`x \mapsto x W_{ls} + b_{ls}`, with ReLU between layers. Weights and
    biases start uniform in :math:`\pm 1/\sqrt{\text{fan in}}`, as those of :class:`torch.nn.Linear` do, each
    member's from its own generator: a member starts and learns as it would alone.

    Args:
        sizes: Widths from input to output, e.g. ``(11, 256, 256, 3)``.
        generators: One a member; the numbers it starts from are drawn from it.
        heads: Networks a member, all reading the same input (twin critics have two).

    Example:
        >>> networks = StackedMLP((3, 8, 2), generators=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
        >>> networks(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 1, 5, 2])

    Source: The stacking of M. Hessel et al., "Podracer architectures" (2021, arXiv 2104.06272), done for
    ``torch.bmm``.
    """

    def __init__(self, sizes: Sequence[int], *, generators: Sequence[torch.Generator], heads: int = 1) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be at least two positive widths, got {tuple(sizes)}")
        if not generators:
            raise ValueError("generators must hold one generator a member, got none")
        self.sizes, self.members, self.heads = tuple(sizes), len(generators), heads
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(self.sizes):
            drawn = [_uniform((heads, inputs + 1, outputs), inputs, generator) for generator in generators]
            layer = torch.stack(drawn).flatten(0, 1)
            self.weights.append(nn.Parameter(layer[:, :-1].clone()))
            self.biases.append(nn.Parameter(layer[:, -1:].clone()))

    def forward(self, input: Float[Tensor, "members batch inputs"]) -> Float[Tensor, "members heads batch outputs"]:
        """Return what each head of each member makes of that member's rows."""
        batch = input.shape[1]
        if self.heads > 1:
            input = input.unsqueeze(1).expand(-1, self.heads, -1, -1).flatten(0, 1)
        output = _layers(input, list(self.weights), list(self.biases))
        return output.view(self.members, self.heads, batch, -1)

    def head(
        self, input: Float[Tensor, "members batch inputs"], which: int = 0
    ) -> Float[Tensor, "members batch outputs"]:
        """Return what one head of each member makes of that member's rows."""
        if self.heads == 1:
            return _layers(input, list(self.weights), list(self.biases))
        weights = [weight[which :: self.heads] for weight in self.weights]
        biases = [bias[which :: self.heads] for bias in self.biases]
        return _layers(input, weights, biases)

    def member(self, which: int, *, head: int = 0, outputs: int | None = None) -> nn.Sequential:
        """Return a copy of one network as ordinary layers.

        Args:
            which: The member.
            head: Its head.
            outputs: Keep only so many of the last layer's first columns; None keeps all.
        """
        place = which * self.heads + head
        layers: list[nn.Module] = []
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            kept = outputs if depth == len(self.weights) - 1 else None
            matrix, offset = weight[place].detach()[:, :kept], bias[place, 0].detach()[:kept]
            layer = nn.Linear(len(matrix), matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
            layer.load_state_dict({"weight": matrix.t(), "bias": offset})
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def extra_repr(self) -> str:
        """Name the shape."""
        return f"sizes={self.sizes}, members={self.members}, heads={self.heads}"


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)


def _layers(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    # With one network a plain product costs less than a batch of one.
    alone = len(x) == 1
    if alone:
        x = x[0]
    for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if depth:
            x = torch.relu(x)
        x = torch.addmm(bias[0], x, weight[0]) if alone else torch.baddbmm(bias, x, weight)
    return x.unsqueeze(0) if alone else x


def member_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a member, from which the numbers its networks start with are drawn."""
    if not seeds:
        raise ValueError("seeds must name at least one member, got none")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def per_member(value: float | Sequence[float] | Tensor, members: int, name: str) -> Tensor:
    """Spread a setting over members: one number for all, or one each, shape ``(members,)``."""
    spread = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if spread.ndim > 1 or (spread.ndim == 1 and len(spread) != members):
        raise ValueError(f"{name} must be one number or {members} of them, got shape {tuple(spread.shape)}")
    if not bool(torch.isfinite(spread).all()) or bool((spread < 0).any()):
        raise ValueError(f"{name} must be finite and not negative, got {spread.tolist()}")
    return spread.expand(members).clone()


def adam(module: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam that moves all tensors of a module in one call: for small networks the calls are what costs."""
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be finite and above zero, got {lr}")
    return torch.optim.Adam(module.parameters(), lr=lr, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step of an optimizer down the sum of each member's loss; no other parameter collects a gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def follow(targets: list[Tensor], online: list[Tensor], rate: float) -> None:
    """Move slow copies towards what they copy: ``target += rate * (online - target)``, all in one call."""
    torch._foreach_lerp_(targets, online, rate)
