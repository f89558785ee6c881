"""Ask a user's oracle: which item to label next, and what the answers say so far.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .answer_counts import Noise, Policy, check_budget, check_probabilities, guess
from .problem_complexity import check_hypotheses, check_queries


class ActiveLearner:
    """Ask which query to make next, tell its answer, and guess the hypothesis once the budget is spent.

    Args:
        hypotheses: Rows z, all different: labels in plus and minus one, say, of the items that may be asked about.
        policy: ``(counts, sums) -> probabilities`` of the queries, all ``(1, queries)`` here: a trained
            :class:`QueryNetwork` or :class:`QueryScorer`, a :class:`TabularPolicy`, or a baseline.
        budget: Queries in all, at least 1.
        queries: Rows x; None for the unit vectors, where query i is about column i of the hypotheses.
        noise: ``"bernoulli"`` for answers of 1 and -1, ``"gaussian"`` for answers that are any number.
        generator: Draws queries, and guesses among ties; torch's default if None.

    Example:
        >>> import functools
        >>> from minimand.online import generalized_binary_search, thresholds
        >>> labels = thresholds(3)
        >>> search = functools.partial(generalized_binary_search, hypotheses=labels)
        >>> learner = ActiveLearner(labels, policy=search, budget=9, generator=torch.Generator().manual_seed(0))
        >>> while not learner.finished:
        ...     learner.tell(1 if learner.ask() >= 2 else -1)  # the oracle's labels turn at item 2
        >>> learner.guess()
        2

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
    """

    def __init__(
        self,
        hypotheses: Float[Tensor, "hypotheses dim"],
        *,
        policy: Policy,
        budget: int,
        queries: Float[Tensor, "queries dim"] | None = None,
        noise: Noise = "bernoulli",
        generator: torch.Generator | None = None,
    ) -> None:
        check_hypotheses(hypotheses)
        check_queries(queries, hypotheses.shape[1])
        check_budget(budget)
        checks.one_of(noise, "noise", ("bernoulli", "gaussian"))
        self.hypotheses, self.policy, self.budget, self.noise = hypotheses.detach(), policy, budget, noise
        self.queries = None if queries is None else queries.detach()
        self.counts = self.hypotheses.new_zeros(hypotheses.shape[1] if queries is None else len(queries))
        self.sums = torch.zeros_like(self.counts)
        self._generator = generator
        self._pending: int | None = None

    @property
    def num_answers(self) -> int:
        """Answers told so far."""
        return int(self.counts.sum())

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.num_answers >= self.budget

    def ask(self) -> int:
        """Return the query to make next; the same one until its answer is told.

        Raises:
            RuntimeError: If the budget is spent.
        """
        if self.finished:
            raise RuntimeError(f"the budget of {self.budget} queries is spent: take the guess")
        if self._pending is None:
            with torch.no_grad():
                probabilities = self.policy(self.counts[None], self.sums[None])
            check_probabilities(probabilities, "what the policy returns", (1, len(self.counts)))
            self._pending = self._draw(probabilities[0])
        return self._pending

    def tell(self, answer: int | float) -> None:
        """Say what the answer to the query asked was.

        Args:
            answer: 1 or -1, or with Gaussian noise any finite number.

        Raises:
            ValueError: If it is no such number.
            RuntimeError: If no query is open.
        """
        if self.noise == "bernoulli" and answer not in (-1, 1):
            raise ValueError(f"answer must be 1 or -1, got {answer!r}")
        if not math.isfinite(answer):
            raise ValueError(f"answer must be a finite number, got {answer!r}")
        if self._pending is None:
            raise RuntimeError("no query is open: ask first")
        self.counts[self._pending] += 1
        self.sums[self._pending] += answer
        self._pending = None

    def guess(self) -> int:
        """Return the hypothesis that suits the average answers so far best; drawn among ties."""
        return self._draw(guess(self.counts[None], self.sums[None], self.hypotheses, self.queries)[0])

    def run(self, oracle: Callable[[int], float]) -> int:
        """Ask an oracle until the budget is spent, and guess.

        Args:
            oracle: Takes a query, returns its answer.

        Returns:
            The guess.
        """
        while not self.finished:
            self.tell(oracle(self.ask()))
        return self.guess()

    def state_dict(self) -> dict[str, Any]:
        """Return the answers so far and the query that is open."""
        return {"counts": self.counts.clone(), "sums": self.sums.clone(), "pending": self._pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a search where it was saved.

        Args:
            state: Of a learner with as many queries.

        Raises:
            ValueError: If the number of queries differs.
        """
        wanted = tuple(self.counts.shape)
        for name in ("counts", "sums"):
            if tuple(state[name].shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(state[name].shape)}")
        self.counts = state["counts"].clone().to(self.hypotheses)
        self.sums = state["sums"].clone().to(self.hypotheses)
        self._pending = state["pending"]

    def _draw(self, probabilities: Tensor) -> int:
        device = probabilities.device if self._generator is None else self._generator.device
        return int(torch.multinomial(probabilities.to(device), 1, generator=self._generator))
