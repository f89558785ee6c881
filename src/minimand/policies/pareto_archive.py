"""The policies on the front that were found so far: which to keep, which to go on from, which to use.

Source: Liu et al., ICLR 2025, arXiv 2410.02236 (buffer, selection, assignment); Deb et al., IEEE Trans. Evol. Comput. 6
(2002) (crowding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import checks
from .pareto_front import check_returns, crowding_distance, expected_utility, hypervolume, non_dominated, sparsity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ArchivedPolicy(NamedTuple):
    """A policy on the front.

    Attributes:
        returns: Its expected return in each objective.
        payload: What was stored with it: parameters, a function, a name.
    """

    returns: Float[Tensor, " objectives"]
    payload: Any


class ParetoArchive:
    r"""Keep the policies that no other dominates.

    When there are more than ``capacity``, those with the largest crowding distance stay. Returns are kept in float64.

    Args:
        reference: What a policy must reach in every objective to be kept, and where the hypervolume is measured from.
        capacity: Most policies; 200 is the authors'.

    Raises:
        ValueError: If the reference is no finite vector or ``capacity`` is below 1.

    Example:
        >>> archive = ParetoArchive(torch.zeros(2))
        >>> archive.add(torch.tensor([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]]), ["a", "b", "c"])
        tensor([ True,  True, False])
        >>> archive.assign(torch.tensor([0.9, 0.1])).payload
        'b'

    Source:
        Liu et al. 2025, arXiv 2410.02236, sections 4.2 and 4.4.
    """

    def __init__(self, reference: Float[Tensor, " objectives"], *, capacity: int = 200) -> None:
        checks.floating(reference, "reference")
        checks.finite(reference, "reference")
        if reference.dim() != 1 or reference.numel() < 1:
            raise ValueError(f"reference must have shape (objectives,), got {tuple(reference.shape)}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.reference = reference.double()
        self.capacity = capacity
        self.returns = self.reference.new_zeros(0, len(reference))
        self.payloads: list[Any] = []
        self._selected: set[tuple[float, ...]] = set()

    def __len__(self) -> int:
        return len(self.payloads)

    def add(self, returns: Float[Tensor, "policies objectives"], payloads: Sequence[Any]) -> Bool[Tensor, " policies"]:
        """Add policies and drop those that are dominated, or too many.

        Args:
            returns: Of each policy, on the reference's device or any other.
            payloads: What to store with each.

        Returns:
            Which of the new policies are in the archive now. Of equal returns the first stays.

        Raises:
            TypeError: If ``returns`` is no floating-point tensor.
            ValueError: If it is not finite, or the shapes do not fit.
        """
        check_returns(returns)
        if returns.shape[1] != len(self.reference) or len(payloads) != len(returns):
            raise ValueError(
                f"returns must have {len(self.reference)} columns and a row for each of {len(payloads)} payloads, "
                f"got shape {tuple(returns.shape)}"
            )
        before = len(self)
        every, payloads = torch.cat([self.returns, returns.to(self.reference)]), [*self.payloads, *payloads]
        equal = (every[:, None] == every[None]).all(-1)
        keep = non_dominated(every) & (every >= self.reference).all(1) & ~equal.tril(-1).any(1)
        index = keep.nonzero().squeeze(1)
        if len(index) > self.capacity:
            widest = crowding_distance(every[index]).argsort(descending=True, stable=True)[: self.capacity]
            index = index[widest.sort().values]
        self.returns = every[index]
        self.payloads = [payloads[i] for i in index.tolist()]
        kept = torch.zeros(len(every), dtype=torch.bool, device=every.device)
        kept[index] = True
        return kept[before:].to(returns.device)

    def select(self, count: int) -> list[ArchivedPolicy]:
        """Pick the policies with the largest crowding distances among those never picked before.

        Args:
            count: Most policies; 5 or 6 in the paper.

        Returns:
            The policies, those at the ends of the front first; none if all were picked before.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        order = crowding_distance(self.returns).argsort(descending=True, stable=True).tolist()
        fresh = [i for i in order if tuple(self.returns[i].tolist()) not in self._selected][:count]
        self._selected |= {tuple(self.returns[i].tolist()) for i in fresh}
        return [self[i] for i in fresh]

    def assign(self, weights: Float[Tensor, " objectives"]) -> ArchivedPolicy:
        r"""Return the policy that is best for a preference, :math:`\arg\max_k w^T G_k`.

        Args:
            weights: w, at least 0 and not all 0. They need not add up to one.

        Raises:
            ValueError: If the archive is empty or the weights are no preference.
        """
        checks.floating(weights, "weights")
        checks.finite(weights, "weights")
        if weights.shape != self.reference.shape:
            raise ValueError(f"weights must have shape {tuple(self.reference.shape)}, got {tuple(weights.shape)}")
        if not (bool((weights >= 0).all()) and bool((weights > 0).any())):
            raise ValueError(f"weights must be at least 0 and not all 0, got {weights.tolist()}")
        if not len(self):
            raise ValueError("the archive is empty: no policy reached the reference")
        return self[int((self.returns @ weights.to(self.returns)).argmax())]

    def __getitem__(self, index: int) -> ArchivedPolicy:
        return ArchivedPolicy(self.returns[index], self.payloads[index])

    def hypervolume(self) -> float:
        """Return the volume between the front and the reference."""
        return float(hypervolume(self.returns, self.reference))

    def expected_utility(self, weights: Float[Tensor, "preferences objectives"]) -> float:
        """Return what the best policy for each preference is worth, on average.

        Args:
            weights: Preferences by rows; see :func:`weight_grid`.
        """
        return float(expected_utility(self.returns, weights))

    def sparsity(self) -> float:
        """Return the mean squared gap between neighbours on the front."""
        return float(sparsity(self.returns))

    def figure(self, names: Sequence[str] | None = None) -> Figure:
        """Draw the front: two objectives against each other, more as lines across parallel axes.

        Args:
            names: Of the objectives.

        Returns:
            A matplotlib figure, to be saved or shown.
        """
        from .front_drawing import draw_front

        return draw_front(self.returns, self.reference, names)

    def __repr__(self) -> str:
        return f"ParetoArchive({len(self)} of at most {self.capacity} policies, {len(self.reference)} objectives)"
