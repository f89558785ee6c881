r"""How far a state and an action are from a log: the nearest logged pair, searched exactly or nearly so.

Three ways to search, all for many queries at once:

- ``"tree"``: scipy's k-d tree, in double precision, for tensors on the CPU. Unbeaten in few dimensions.
- ``"scan"``: every row, by matrix products whose best blocks are looked at again by differences. What rounding leaves
  open is searched anew without products, so the answer is exact; accelerators take differences at once.
- ``"cells"``: only the cells of equal size whose bounding boxes are nearest. Approximate; exact if all are looked at.

Source: Ran, Li, Zhang, Zhang and Yu 2023, arXiv 2306.06569; Friedman, Bentley and Finkel 1977 (k-d trees).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, reduce

# Beyond so many dimensions a k-d tree looks at more rows than it saves (benchmarks/policies/bench_prdc.py).
_TREE_DIMENSIONS = 16
# Numbers held at once: what stays in the cache is several times faster than what does not.
_NUMBERS_AT_ONCE = 2**21
_BLOCK_ROWS, _BLOCKS = 64, 4
_CELL_ROWS = 64


class NearestPair(NamedTuple):
    """The logged pair nearest to each query; none of it carries a gradient.

    Args:
        distance: Shape ``(*batch,)``.
        row: Its row in the log, shape ``(*batch,)`` int64.
        action: Its action, shape ``(*batch, m)``.
    """

    distance: Tensor
    row: Tensor
    action: Tensor


class DatasetConstraint(nn.Module):
    r"""Compute how far actions are from the action of the nearest logged pair of state and action.

    .. math:: d_\beta(s, a) = \min_i \|(\beta s, a) - (\beta s_i, a_i)\|_2, \qquad
        R(s, a) = \tfrac1m \|a - a_{i^*(s, a)}\|^2

    where :math:`i^*` attains the minimum. With :math:`\beta = 0` any logged action is as good as any other; with a
    large :math:`\beta` only the action logged at the very state counts. :math:`i^*` is piecewise constant in the
    action, so the gradient of :math:`R` is that of :math:`d_\beta^2/m` wherever there is one.

    States and actions are compared as they are given: scale both before (:class:`ScaledLog` does), and scale queries
    alike. The log is not part of the state dict; a constraint is built from its log, and its state tells ``beta``.

    Args:
        observation: Logged states, shape ``(N, n)``.
        action: Logged actions, shape ``(N, m)``.
        beta: Weight of states against actions; 2 in the paper's locomotion, 7.5 in its mazes.
        backend: ``"tree"``, ``"scan"``, ``"cells"`` (approximate), or ``"auto"``: the tree on a CPU in at most 16
            dimensions, else the scan.
        probes: Cells of 64 to 127 rows that ``"cells"`` looks at.
        reduction: Of the batch: ``"mean"``, ``"sum"``, ``"none"`` or a callable.

    Raises:
        TypeError: If the log is not of floating tensors.
        ValueError: If shapes disagree, the log is empty or not finite, or a setting is out of range.

    Example:
        >>> constraint = DatasetConstraint(torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0]]), beta=1.0)
        >>> constraint(torch.tensor([[0.2]]), torch.tensor([[0.5]])).item()  # (1, 1) is nearer than (0, -1)
        0.25

    Source: Y. Ran, Y.-C. Li, F. Zhang, Z. Zhang and Y. Yu, "Policy regularization with dataset constraint for offline
    reinforcement learning" (2023, arXiv 2306.06569), definition of the point-to-set distance; the mean square over
    action coordinates is that of its authors' code, to which their weights are tuned.
    """

    beta: Tensor
    keys: Tensor

    def __init__(
        self,
        observation: Float[Tensor, "rows n"],
        action: Float[Tensor, "rows m"],
        *,
        beta: float = 2.0,
        backend: str = "auto",
        probes: int = 8,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        for name, value in (("observation", observation), ("action", action)):
            checks.floating(value, name)
            checks.not_empty(value, name)
            checks.finite(value, name)
        if observation.ndim != 2 or action.ndim != 2 or len(observation) != len(action):
            raise ValueError(
                "observation and action must have shapes (N, n) and (N, m), "
                f"got {tuple(observation.shape)} and {tuple(action.shape)}"
            )
        checks.non_negative(beta, "beta")
        checks.one_of(backend, "backend", ("auto", "tree", "scan", "cells"))
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}")
        self.observation_dim, self.action_dim = observation.shape[1], action.shape[1]
        self.backend, self.probes, self.reduction = backend, probes, reduction
        self.register_buffer("beta", torch.as_tensor(float(beta), dtype=observation.dtype, device=observation.device))
        self.register_buffer("keys", self._key(observation, action.to(observation)).detach(), persistent=False)
        self._index: Any = None

    def _key(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.beta * observation, action], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DatasetConstraint:
        # What was built to search the keys is of their old device and precision.
        self._index = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, meta: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved = state.get(f"{prefix}beta")
        if saved is not None and saved.item() != self.beta.item():
            lists[-1].append(f"{prefix}beta is {saved.item()} in the state, but this was built with {self.beta.item()}")
        super()._load_from_state_dict(state, prefix, meta, strict, *lists)

    @property
    def method(self) -> str:
        """How it searches: ``backend``, or what ``"auto"`` comes to."""
        if self.backend != "auto":
            return self.backend
        few = self.keys.shape[1] <= _TREE_DIMENSIONS
        return "tree" if few and self.keys.device.type == "cpu" else "scan"

    @torch.no_grad()
    def rows(self, observation: Float[Tensor, "*batch n"], action: Float[Tensor, "*batch m"]) -> Tensor:
        """Return the rows of the nearest pairs, shape ``(*batch,)``; numbers are not checked: this is the hot path."""
        query = self._key(observation.to(self.keys), action.to(self.keys)).flatten(0, -2)
        search = {"tree": self._tree_rows, "scan": self._scan_rows, "cells": self._cell_rows}[self.method]
        return search(query).view(observation.shape[:-1])

    def actions(self, observation: Float[Tensor, "*batch n"], action: Float[Tensor, "*batch m"]) -> Tensor:
        """Return the actions of the nearest pairs, in the precision of ``action``; numbers are not checked."""
        return self.keys[self.rows(observation, action), self.observation_dim :].to(action.dtype)

    def nearest(self, observation: Float[Tensor, "*batch n"], action: Float[Tensor, "*batch m"]) -> NearestPair:
        """Return distance, row and action of the logged pair nearest to each query.

        Args:
            observation: States, shape ``(*batch, n)``.
            action: Actions, shape ``(*batch, m)``.

        Raises:
            ValueError: If widths are not the log's, batches differ, or a number is not finite.
        """
        self._check(observation, action)
        row = self.rows(observation, action)
        found = self.keys[row]
        with torch.no_grad():
            distance = (self._key(observation.to(found), action.to(found)) - found).norm(dim=-1)
        return NearestPair(distance.to(action.dtype), row, found[..., self.observation_dim :].to(action.dtype))

    def forward(self, observation: Float[Tensor, "*batch n"], action: Float[Tensor, "*batch m"]) -> Tensor:
        """Return the mean square over coordinates of action minus nearest pair's action, reduced over the batch."""
        self._check(observation, action)
        return reduce((action - self.actions(observation, action)).square().mean(-1), self.reduction)

    def _check(self, observation: Tensor, action: Tensor) -> None:
        for name, value, width in (
            ("observation", observation, self.observation_dim),
            ("action", action, self.action_dim),
        ):
            checks.floating(value, name)
            if value.ndim < 2 or value.shape[-1] != width:
                raise ValueError(f"{name} must have shape (*batch, {width}), got {tuple(value.shape)}")
            checks.finite(value, name)
        if observation.shape[:-1] != action.shape[:-1]:
            raise ValueError(
                "observation and action must be of one batch, "
                f"got shapes {tuple(observation.shape)} and {tuple(action.shape)}"
            )

    def _tree_rows(self, query: Tensor) -> Tensor:
        if query.device.type != "cpu":
            raise ValueError(
                f"the tree searches tensors on the CPU, got {query.device}: take backend 'scan' or 'cells'"
            )
        if self._index is None:
            from scipy.spatial import cKDTree

            self._index = cKDTree(self.keys.double().numpy())
        _, row = self._index.query(query.double().numpy(), workers=torch.get_num_threads())
        return torch.from_numpy(row)

    def _scan_rows(self, query: Tensor) -> Tensor:
        # On an accelerator differences cost little, and asking whether products were precise enough would stall it.
        if query.device.type != "cpu" or len(self.keys) <= _BLOCK_ROWS * _BLOCKS:
            return self._difference_rows(query)
        if self._index is None:
            padding = -len(self.keys) % _BLOCK_ROWS
            offset = nn.functional.pad(0.5 * self.keys.square().sum(1), (0, padding), value=torch.inf)
            self._index = nn.functional.pad(self.keys, (0, 0, 0, padding)), offset, (2 * offset[: len(self.keys)]).max()
        chunks = query.split(max(_NUMBERS_AT_ONCE // len(self.keys), 1))
        return torch.cat([self._product_rows(chunk, *self._index) for chunk in chunks])

    def _product_rows(self, query: Tensor, keys: Tensor, offset: Tensor, largest: Tensor) -> Tensor:
        # |q - k|^2 = |q|^2 + 2 (|k|^2/2 - qk): the bracket ranks blocks of rows, differences decide in the best blocks.
        ranks = torch.addmm(offset, query, keys.mT, alpha=-1).view(len(query), -1, _BLOCK_ROWS).amin(-1)
        least, block = ranks.topk(min(_BLOCKS + 1, ranks.shape[1]), largest=False)
        row = block[:, :_BLOCKS, None] * _BLOCK_ROWS + torch.arange(_BLOCK_ROWS, device=query.device)
        row = row.flatten(1).clamp_max_(len(self.keys) - 1)
        best, row = self._nearest_of(query, row)
        if ranks.shape[1] > _BLOCKS:
            # No row elsewhere is nearer than this, whatever the rounding of a product of that many terms.
            squared = query.square().sum(1)
            width = keys.shape[1] + 4
            slack = width * torch.finfo(keys.dtype).eps * (squared.sqrt() + largest.sqrt()).square()
            open_ = best > 2 * least[:, -1] + squared - 4 * slack
            if bool(open_.any()):
                row[open_] = self._difference_rows(query[open_])
        return row

    def _nearest_of(self, query: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance and row of the nearest among candidates ``row`` of shape ``(queries, candidates)``."""
        squared = (query.unsqueeze(1) - self.keys[row]).square().sum(-1)
        best, place = squared.min(1)
        return best, row.gather(1, place.unsqueeze(1)).squeeze(1)

    def _difference_rows(self, query: Tensor) -> Tensor:
        chunks = query.split(max(_NUMBERS_AT_ONCE // len(self.keys), 1))
        mode = "donot_use_mm_for_euclid_dist"
        return torch.cat([torch.cdist(chunk, self.keys, compute_mode=mode).argmin(1) for chunk in chunks])

    def _cell_rows(self, query: Tensor) -> Tensor:
        if self._index is None:
            cells = equal_cells(self.keys)
            members = self.keys[cells]
            self._index = cells, members.amin(1), members.amax(1)
        cells, low, high = self._index
        probes, (count, size) = min(self.probes, len(cells)), cells.shape
        found = []
        for chunk in query.split(max(_NUMBERS_AT_ONCE // (max(count, probes * size) * query.shape[1]), 1)):
            part = chunk.unsqueeze(1)
            outside = (low - part).clamp_min(0) + (part - high).clamp_min(0)
            nearest = outside.square().sum(-1).topk(probes, largest=False, sorted=False).indices
            found.append(self._nearest_of(chunk, cells[nearest].flatten(1))[1])
        return torch.cat(found)


def equal_cells(points: Float[Tensor, "rows dim"]) -> Tensor:
    """Split points in halves at the median of their widest coordinate until cells hold few, all of one size.

    Args:
        points: Shape ``(N, d)``.

    Returns:
        Rows by cell, shape ``(cells, size)`` int64; where ``N`` does not divide, some rows are in two cells.
    """
    count = 1
    while len(points) >= 2 * count * _CELL_ROWS:
        count *= 2
    size = -(-len(points) // count)
    cells = (torch.arange(count * size, device=points.device) % len(points)).unsqueeze(0)
    while len(cells) < count:
        members = points[cells]
        widest = (members.amax(1) - members.amin(1)).argmax(-1)
        along = members.gather(2, widest.view(-1, 1, 1).expand(-1, members.shape[1], 1)).squeeze(2)
        cells = cells.gather(1, along.argsort(1)).view(2 * len(cells), -1)
    return cells
