"""Put weights back into a set after every step of any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..projections import Projection


def constrain(
    optimizer: torch.optim.Optimizer,
    constraint: Projection | Callable[[Tensor], Tensor],
    *,
    params: Iterable[Tensor] | None = None,
) -> RemovableHandle:
    """Project weights onto a set after every step of ``optimizer``, from now on.

    Several constraints on one optimizer are applied in the order they were added. The learning rate and weight decay
    of a weight's own group, as they stand after the step, are handed to the projection; a projection that depends on
    them therefore follows any schedule.

    Args:
        optimizer: Any optimizer. Nothing is kept in its state: checkpoints are as before.
        constraint: A :class:`Projection`, or any function from a weight to a weight.
        params: The weights it holds for; None for every weight of the optimizer that has at least two dimensions,
            which leaves gains and biases free.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: If a weight of ``params`` is not the optimizer's, or there is none to constrain.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> from minimand.constraints import Ball
        >>> handle = constrain(optimizer, Ball(1.0), params=[weight])
        >>> (-weight.sum()).backward()
        >>> optimizer.step()
        >>> round(weight.norm().item(), 6)
        1.0

    Source:
        Goldstein, "Convex programming in Hilbert space", 1964 (projected gradient); Newhouse et al. 2025,
        arXiv 2507.13338, for projections after the steps of other optimizers.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if params is None:
        chosen = {id(weight) for group in optimizer.param_groups for weight in group["params"] if weight.dim() >= 2}
        if not chosen:
            raise ValueError("the optimizer has no weight of two dimensions or more: name the weights in params")
    else:
        chosen = {id(weight) for weight in params}
        if not chosen:
            raise ValueError("params is empty: there is nothing to constrain")
        if not chosen <= held:
            raise ValueError("params holds a weight that is not the optimizer's")

    @torch.no_grad()
    def project(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in stepped.param_groups:
            for weight in group["params"]:
                if id(weight) in chosen:
                    if isinstance(constraint, Projection):
                        decay = float(group.get("weight_decay", 0))
                        found = constraint(weight, lr=float(group["lr"]), weight_decay=decay)
                    else:
                        found = constraint(weight)
                    weight.copy_(found)

    project(optimizer, None, None)
    return optimizer.register_step_post_hook(project)
