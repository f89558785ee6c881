r"""Muon: descend by the orthogonal factor of the momentum, a step whose operator norm is known in advance.

For a weight of :math:`m` rows and :math:`n` columns with gradient :math:`G`, learning rate :math:`\eta`, momentum
:math:`\beta` and weight decay :math:`\lambda`,

.. math:: M \leftarrow \beta M + (1-\beta) G, \qquad
          W \leftarrow \mathcal P\bigl[(1 - \eta\lambda) W - \eta\sqrt{m/n}\,\operatorname{orth}(M)\bigr].

:math:`\operatorname{orth}(M) = U V^\top` for :math:`M = U\Sigma V^\top`, so the step has norm :math:`\eta` from RMS to
RMS whatever the gradient. Hence :math:`|W| \le \max(|W_0|, 1/\lambda)` with weight decay alone, and a projection
:math:`\mathcal P` that is told :math:`\eta` and :math:`\lambda` knows how far out a weight can be:
:class:`minimand.constraints.SpectralSoftCap` keeps it within a bound without a decomposition.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; projection and polynomials:
Newhouse, Hess, Cesista, Zahorodnii, Bernstein and Isola, "Training Transformers with Enforced Lipschitz Constants",
2025, arXiv 2507.13338.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..numerics import orthogonalize
from ..projections import Projection

_MOST_STACKED = 2**18  # entries; larger matrices keep a device busy one by one
_HALF_PRECISION_HEADROOM = 1.02  # rounding in bfloat16 lifts singular values above 1, by up to 0.01 in trials


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are set to one, then decoupled weight decay and a projection.

    For matrices and convolution kernels, which are taken as the matrix of their output channels. Gains, biases and,
    by custom, embeddings and the last layer go to another optimizer. Small weights of one shape are computed together.

    Args:
        params: Weights of at least two dimensions, or groups of them.
        lr: The norm of a step from RMS to RMS: 0.02 changes a weight of norm 1 by two percent. ``torch.optim.Muon``
            scales by ``sqrt(max(1, rows / columns))`` instead, which is the same for square and tall weights.
        momentum: beta, in [0, 1). 0.9 as in the paper.
        nesterov: Whether the gradient is mixed in once more.
        weight_decay: lambda, decoupled and multiplied by ``lr``.
        projection: Applied to every weight after its step, with the step's ``lr`` and ``weight_decay``. It is no part
            of the ``state_dict``. To project some weights only, use :func:`minimand.constraints.constrain`.
        num_steps: Steps of :func:`minimand.numerics.orthogonalize`.
        compute_dtype: In which dtype they are computed; None for the weight's own. bfloat16 is several times faster
            on accelerators; its update is divided by 1.02 so that no step exceeds ``lr``.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Muon([weight], lr=0.1)
        >>> (weight * torch.tensor([[3.0, 0.0], [0.0, 7.0]])).sum().backward()
        >>> optimizer.step()
        >>> torch.linalg.svdvals(weight.detach()).round(decimals=3)
        tensor([0.1000, 0.1000])

    Source:
        Jordan et al. 2024; Newhouse et al. 2025, arXiv 2507.13338.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        projection: Projection | None = None,
        num_steps: int = 6,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        checks.non_negative(lr, "lr")
        checks.between(momentum, "momentum", 0, 1, high_open=True)
        checks.non_negative(weight_decay, "weight_decay")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if projection is not None and not isinstance(projection, Projection):
            raise TypeError(f"projection must be a minimand Projection or None, got {type(projection).__name__}")
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise TypeError(f"compute_dtype must be a floating-point dtype or None, got {compute_dtype}")
        self.projection = projection
        self.compute_dtype = compute_dtype
        settings = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "num_steps": num_steps}
        super().__init__(params, {"lr": lr, **settings})

    def __getstate__(self) -> dict[str, Any]:
        """Keep the projection in copies, which torch's own state leaves out: a copy without it would be unbounded."""
        return {**super().__getstate__(), "projection": self.projection, "compute_dtype": self.compute_dtype}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of weights.

        Raises:
            ValueError: If one has fewer than two dimensions.
        """
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.dim() < 2:
                del self.param_groups[-1]
                raise ValueError(
                    f"params must have at least two dimensions, got shape {tuple(weight.shape)}: give gains and biases "
                    f"to another optimizer, such as AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            ValueError: If a gradient is not finite.
        """
        value = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            for weights in _alike(group["params"]):
                directions = torch.stack([self._direction(weight, group).flatten(1) for weight in weights])
                checks.finite(directions.abs().amax(), "the gradient")
                dtype = self.compute_dtype or directions.dtype
                updates = orthogonalize(directions.to(dtype), num_steps=group["num_steps"])
                size = lr * math.sqrt(updates.shape[1] / updates.shape[2])
                if dtype in (torch.bfloat16, torch.float16):
                    size /= _HALF_PRECISION_HEADROOM
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - lr * decay).add_(update.view_as(weight), alpha=-size)
                    if self.projection is not None:
                        weight.copy_(self.projection(weight, lr=lr, weight_decay=decay))
        return value

    def _direction(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _alike(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Group the weights that have a gradient by shape, dtype and device; as many at once as are small."""
    found: dict[Any, list[Tensor]] = {}
    for weight in params:
        if weight.grad is not None:
            found.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
    for weights in found.values():
        size = max(_MOST_STACKED // weights[0].numel(), 1)
        for begin in range(0, len(weights), size):
            yield weights[begin : begin + size]
