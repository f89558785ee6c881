r"""Sharpness-aware minimisation: descend by the gradient at the worst point nearby.

For weights :math:`w`, gradient :math:`g` and radius :math:`\rho`, a step moves to the first-order maximiser of the
loss over a ball around :math:`w`, takes the gradient there, returns to :math:`w` and hands it to the base optimizer:

.. math:: g_{\mathrm{SAM}} = \nabla L(w + \rho\, g / \|g\|_2).

The adaptive ball of ASAM measures each weight by its own size, :math:`\|\epsilon / |w|\|_2 \le \rho`, which makes
the step blind to rescaling of layers: :math:`\epsilon = \rho\, w^2 g / \|\,|w|\,g\|_2`.

Source: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021, arXiv 2010.01412, equation 2; adaptive: Kwon, Kim, Park and Choi, ICML 2021,
arXiv 2102.11600.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import checks


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around any optimizer, at two forward and backward passes a step.

    The parameter groups and the state are the base optimizer's own, so schedulers and checkpoints work as with
    it. Each group also holds ``radius`` and ``adaptive``, which may differ between groups; the norm of the gradient
    is taken over all of them. Batch normalisation sees both passes. ``torch.amp.GradScaler`` takes no closures, so
    mixed precision means bfloat16 here.

    Args:
        params: Parameters, or parameter groups.
        base: Makes the optimizer that takes the step: ``functools.partial(torch.optim.SGD, lr=0.1)``.
        radius: The paper's rho, at least 0: how far to look for the worst point. 0.05 as in the paper.
        adaptive: Whether to measure the ball relative to each weight (ASAM, which wants a radius about ten times
            larger).

    Example:
        >>> import functools
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SAM(model.parameters(), functools.partial(torch.optim.SGD, lr=0.1), radius=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = model(torch.ones(4, 2)).square().mean()
        ...     value.backward()
        ...     return value
        >>> optimizer.step(closure).shape
        torch.Size([])

    Source:
        Foret et al. 2021, arXiv 2010.01412, algorithm 1; Kwon et al. 2021, arXiv 2102.11600, for ``adaptive``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[[Iterable[Any]], torch.optim.Optimizer],
        *,
        radius: float = 0.05,
        adaptive: bool = False,
    ) -> None:
        checks.non_negative(radius, "radius")
        optimizer = base(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"base must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
        super().__init__(optimizer.param_groups, {**optimizer.defaults, "radius": radius, "adaptive": adaptive})
        self.base = optimizer
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss. Called twice.

        Returns:
            What the closure returned at the present weights.

        Raises:
            ValueError: If there is no closure.
        """
        if closure is None:
            raise ValueError(
                "closure is required: SAM takes the gradient twice a step, so step() needs a function that clears the "
                "gradients, computes the loss, calls backward and returns the loss"
            )
        evaluate = torch.enable_grad()(closure)
        value = evaluate()
        weights, moves = self._ascent()
        # Copied back rather than subtracted: rounding would let the weights drift.
        here = [weight.clone() for weight in weights]
        try:
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
            evaluate()
        finally:
            for weight, value_here in zip(weights, here, strict=True):
                weight.copy_(value_here)
        self.base.step()
        return value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state and the groups' settings, radius included."""
        self.base.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _ascent(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that have a gradient, and each one's move to the worst point."""
        weights, gradients, groups = [], [], []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weights.append(weight)
                    gradients.append(weight.grad * weight.abs() if group["adaptive"] else weight.grad)
                    groups.append(group)
        if not weights:
            raise ValueError("closure must call backward: no parameter has a gradient")
        norms = [torch.linalg.vector_norm(gradient, dtype=_wide(gradient)) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack([one.to(norms[0]) for one in norms]))
        # At a stationary point there is no direction, and the move is zero.
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        moves = []
        for weight, gradient, group in zip(weights, gradients, groups, strict=True):
            move = gradient * (group["radius"] / norm).to(gradient)
            moves.append(move * weight.abs() if group["adaptive"] else move)
        return weights, moves


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
