"""Argument checks: every part refuses bad input at once, naming the argument, what came and what was wanted.

Checks of *values* need the numbers. On a CPU they raise ``ValueError`` at once; on an accelerator, where
reading a value would stall the stream, they become asynchronous device assertions; under
``torch.compile`` and ``torch.func`` transforms, where values do not exist yet, they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def values_readable(tensor: Tensor) -> bool:
    """Tell whether the numbers of ``tensor`` can be read now: eager, not traced or transformed."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def require(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise ``ValueError(message())`` unless every element of the boolean ``condition`` holds."""
    if not values_readable(condition):
        return
    if condition.device.type == "cpu":
        if not bool(condition.all()):
            raise ValueError(message())
    else:
        torch._assert_async(condition.all(), message.__doc__ or "minimand: a value is out of range")


def tensor(value: Any, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def floating(value: Tensor, name: str) -> None:
    """Raise unless ``value`` is a floating-point tensor."""
    tensor(value, name)
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")


def finite(value: Tensor, name: str) -> None:
    """Raise unless every element of ``value`` is finite."""
    require(torch.isfinite(value), lambda: f"{name} contains NaN or infinity")


def not_empty(value: Tensor, name: str) -> None:
    """Raise if ``value`` has no elements."""
    if value.numel() == 0:
        raise ValueError(f"{name} is empty: got shape {tuple(value.shape)}")


def positive(value: float, name: str) -> None:
    """Raise unless the number ``value`` is finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def non_negative(value: float, name: str) -> None:
    """Raise unless the number ``value`` is finite and at least zero."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def between(
    value: float, name: str, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> None:
    """Raise unless ``value`` lies between ``low`` and ``high`` (ends included unless said to be open)."""
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, got {value}")


def one_of(value: Any, name: str, allowed: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        wanted = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def class_scores(input: Tensor, target: Tensor, *, ignore_index: int = -100, min_classes: int = 2) -> None:
    """Check scores ``(batch, classes, *)`` against class indices ``(batch, *)``, as in torch.nn.

    Args:
        input: Scores, floating point, ``(batch, classes)`` or ``(batch, classes, *)``.
        target: Class indices, integer, ``(batch,)`` or ``(batch, *)``.
        ignore_index: A target value that is allowed though it is no class.
        min_classes: The fewest classes that the loss is defined for.
    """
    floating(input, "input")
    tensor(target, "target")
    if input.dim() < 2:
        raise ValueError(f"input must have shape (batch, classes, *), got {tuple(input.shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices of an integer dtype, got {target.dtype}")
    wanted = (input.shape[0], *input.shape[2:])
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"target must have shape {wanted} for input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    not_empty(input, "input")
    classes = input.shape[1]
    if classes < min_classes:
        raise ValueError(f"input must score at least {min_classes} classes, got {classes}")
    require(
        ((target >= 0) & (target < classes)) | (target == ignore_index),
        lambda: (
            f"target must hold class indices in [0, {classes - 1}], "
            f"got values from {int(target.min())} to {int(target.max())}"
        ),
    )


def index_of_examples(index: Tensor | None, batch: int, num_samples: int) -> None:
    """Check the positions of a batch's examples in the training set, for parts that keep state by example."""
    if index is None:
        raise ValueError("index is required: the position of every example of the batch in the training set")
    tensor(index, "index")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"index must have an integer dtype, got {index.dtype}")
    if tuple(index.shape) != (batch,):
        raise ValueError(f"index must have shape ({batch},), got {tuple(index.shape)}")
    require(
        (index >= 0) & (index < num_samples),
        lambda: f"index must lie in [0, {num_samples - 1}], got values from {int(index.min())} to {int(index.max())}",
    )
