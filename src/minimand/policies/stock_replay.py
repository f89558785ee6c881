r"""Transitions kept for learning, with stocks that can be edited when they are drawn.

The process does not know the stock, so that each transition seen from :math:`c_t` in an episode begun with
:math:`c_0` is one from :math:`c_t + \gamma^{-t}(\tilde c_0 - c_0)` as well. As this is computed when a batch is drawn,
every draw of a transition can be from another stock, and none is stored twice.

Source: Ávila Pires et al. 2025, arXiv 2501.13028, for the recursion; Moghimi 2026, arXiv 2602.04131, who stores edited
copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .expected_utility import check_discount
from .stock import edit_stock
from .stock_agent import StockTransitions

FirstStocks = Callable[[int, torch.Generator | None], Tensor]


class StockReplay:
    r"""The last transitions seen, in tensors allocated once.

    Args:
        capacity: Most transitions; beyond, the oldest are overwritten.
        discount: :math:`\gamma`, in (0, 1].

    Raises:
        ValueError: If the capacity is below 1 or the discount lies outside (0, 1].

    Example:
        >>> replay = StockReplay(100, discount=1.0)
        >>> replay.add(torch.zeros(3), action=1, reward=2.0, next_observation=torch.ones(3), terminal=False,
        ...            stock=-5.0, first_stock=-6.0, step=4)
        >>> replay.sample(2, generator=torch.Generator().manual_seed(0)).stock
        tensor([-5., -5.])
        >>> edited = replay.sample(1, first_stock=lambda count, generator: torch.full((count,), -10.0))
        >>> edited.stock  # as if the episode had begun 4 lower
        tensor([-9.])

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028; Moghimi 2026, arXiv 2602.04131.
    """

    def __init__(self, capacity: int = 100_000, *, discount: float) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        check_discount(discount)
        self.capacity = capacity
        self.discount = discount
        self._count = 0
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self._count, self.capacity)

    def add(
        self,
        observation: Float[Tensor, "*observation"],
        *,
        action: int,
        reward: float,
        next_observation: Float[Tensor, "*observation"],
        terminal: bool,
        stock: float,
        first_stock: float,
        step: int,
    ) -> None:
        """Keep a transition.

        Args:
            observation: Before the step.
            action: What was done.
            reward: What it paid.
            next_observation: After the step.
            terminal: Whether nothing can follow.
            stock: Before the step.
            first_stock: With which the episode began.
            step: Steps taken before.
        """
        values = {
            "observation": observation,
            "next_observation": next_observation,
            "stock": observation.new_tensor(stock),
            "first_stock": observation.new_tensor(first_stock),
            "reward": observation.new_tensor(reward),
            "action": torch.tensor(action, device=observation.device),
            "step": torch.tensor(step, device=observation.device),
            "terminal": torch.tensor(terminal, device=observation.device),
        }
        if not self._columns:
            self._columns = {name: value.new_empty(self.capacity, *value.shape) for name, value in values.items()}
        place = self._count % self.capacity
        for name, value in values.items():
            self._columns[name][place] = value
        self._count += 1

    def sample(
        self,
        batch_size: int,
        *,
        first_stock: FirstStocks | None = None,
        generator: torch.Generator | None = None,
    ) -> StockTransitions:
        """Draw transitions with replacement.

        Args:
            batch_size: How many.
            first_stock: Draws the first stocks that the episodes are to have begun with, ``(count, generator) ->
                (count,)``; None leaves the stocks as they were.
            generator: Of the draws; on the CPU.

        Raises:
            ValueError: If nothing was added yet.
        """
        if not len(self):
            raise ValueError("there is nothing to sample: add transitions first")
        checks.positive(batch_size, "batch_size")
        index = torch.randint(len(self), (batch_size,), generator=generator).to(self._columns["step"].device)
        rows = {name: column[index] for name, column in self._columns.items()}
        first, step = rows.pop("first_stock"), rows.pop("step")
        if first_stock is not None:
            shift = first_stock(batch_size, generator).to(first) - first
            rows["stock"] = edit_stock(rows["stock"], step, shift, discount=self.discount)
        return StockTransitions(**rows)
