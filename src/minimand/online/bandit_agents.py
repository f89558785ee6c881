"""What every contextual bandit keeps: how it is called, how it draws, and what it may be told."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks


class Decision(NamedTuple):
    """What an agent's ``act`` chose.

    Args:
        action: The actions taken, ``(batch,)``.
        probability: The probability that each was taken with, ``(batch,)``: what off-policy evaluation asks for.
    """

    action: Tensor
    probability: Tensor


@runtime_checkable
class BanditAgent(Protocol):
    """What :func:`play_bandit` plays: an agent of this room, or anything that has these two methods."""

    def act(self, contexts: Any) -> Any:
        """Choose an action for each context: a pair of actions ``(batch,)`` and their probabilities ``(batch,)``."""

    def update(self, contexts: Any, action: Any, loss: Any) -> Any:
        """Learn from the losses ``(batch,)`` of the actions taken."""


class RandomDraws(nn.Module):
    """A generator whose state travels in the ``state_dict``, so that a saved agent goes on with the same draws.

    Args:
        seed: Of the generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def actions(self, probabilities: Float[Tensor, "batch actions"]) -> Decision:
        """Draw an action for each context.

        Args:
            probabilities: Of the actions.
        """
        uniform = torch.rand(len(probabilities), 1, generator=self.generator, dtype=probabilities.dtype)
        total = probabilities.cumsum(-1)
        # Scaled to end at exactly 1, so that rounding never draws an action of probability 0.
        action = (total / total[:, -1:] <= uniform.to(total.device)).sum(-1)
        return Decision(action, probabilities.gather(-1, action[:, None]).squeeze(-1))

    def normal(self, like: Tensor) -> Tensor:
        """Draw standard normal numbers in the shape, dtype and place of ``like``."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype).to(like.device)

    def get_extra_state(self) -> Tensor:
        """Return the state of the generator, for ``state_dict``."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of the generator, for ``load_state_dict``.

        Args:
            state: What :meth:`get_extra_state` returned.
        """
        self.generator.set_state(state.cpu())


def check_feedback(
    action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"], *, batch: int, num_actions: int
) -> None:
    """Raise unless an agent was told actions that exist and losses in [0, 1], one of each a context.

    Args:
        action: The actions taken.
        loss: The losses they brought.
        batch: The number of contexts.
        num_actions: The number of actions.

    Raises:
        TypeError: If ``action`` holds no integers, or ``loss`` no floating-point numbers.
        ValueError: If shapes do not match, an action does not exist, or a loss lies outside [0, 1].
    """
    checks.tensor(action, "action")
    checks.floating(loss, "loss")
    if action.is_floating_point() or action.dtype == torch.bool:
        raise TypeError(f"action must have an integer dtype, got {action.dtype}")
    if action.shape != (batch,) or loss.shape != (batch,):
        raise ValueError(
            f"action and loss must have shape {(batch,)}, as the batch of contexts; "
            f"got {tuple(action.shape)} and {tuple(loss.shape)}"
        )
    check_unit(loss, "loss")
    checks.require(
        (action >= 0) & (action < num_actions),
        lambda: f"action must lie in [0, {num_actions - 1}], got {int(action.min())} to {int(action.max())}",
    )


def check_unit(value: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless every element of ``value`` lies in [0, 1]."""
    checks.finite(value, name)
    checks.require(
        (value >= 0) & (value <= 1),
        lambda: f"{name} must lie in [0, 1], got values from {float(value.min())} to {float(value.max())}",
    )
