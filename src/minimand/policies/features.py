"""Rows of features of states and actions: side by side, over a history, scaled, and as monomials."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .. import checks
from .transitions import Transitions


def monomials(rows: Float[Tensor, "batch features"], *, degree: int) -> Float[Tensor, "batch terms"]:
    r"""Compute :math:`z(x) = (x_1^{e_1} \cdots x_p^{e_p})` for all exponents with :math:`e_1 + \dots + e_p \le d`.

    They come by degree, the constant first; there are :math:`\binom{p + d}{d}` of them.

    Args:
        rows: One point a row; scale them to about [-1, 1], or powers of unlike size make any fit ill-conditioned.
        degree: d, at least 0.

    Returns:
        One column a monomial.

    Raises:
        TypeError: If the rows are no floating-point tensor.
        ValueError: If they are not finite or no matrix, or the degree is below 0.

    Example:
        >>> monomials(torch.tensor([[2.0, 3.0]]), degree=2)
        tensor([[1., 2., 3., 4., 6., 9.]])

    Source:
        Standard; the basis of the polynomials in Lasserre and Pauwels 2019, arXiv 1701.02886, section 2.
    """
    check_rows(rows)
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    feature = torch.arange(rows.shape[1], device=rows.device)
    block, last = torch.ones_like(rows[:, :1]), feature.new_zeros(1)
    blocks = [block]
    for _ in range(degree):
        # Each monomial grows by its last feature and those after it only, so that none comes twice.
        parent, last = (feature >= last[:, None]).nonzero(as_tuple=True)
        block = block[:, parent] * rows[:, last]
        blocks.append(block)
    return torch.cat(blocks, 1)


def history_rows(
    rows: Float[Tensor, "steps features"], starts: Bool[Tensor, " steps"], *, length: int
) -> Float[Tensor, "steps features_of_history"]:
    """Stack each row with those before it in its episode, oldest first.

    Where an episode is not that old yet, its first row stands in for what came before.

    Args:
        rows: States with actions, episode after episode.
        starts: Whether an episode starts at a row; the first does.
        length: How many rows a history has, its own included; 1 leaves rows as they are.

    Returns:
        ``length`` times as many features.

    Raises:
        ValueError: If the first row starts no episode, shapes disagree, or the length is below 1.

    Example:
        >>> history_rows(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([True, False, True]), length=2)
        tensor([[1., 1.],
                [1., 2.],
                [5., 5.]])

    Source:
        Yan et al. 2025, arXiv 2505.16242: the guardian looks at state-action histories; the padding is ours.
    """
    check_rows(rows)
    checks.tensor(starts, "starts")
    if starts.dtype != torch.bool or starts.shape != rows.shape[:1] or not len(rows):
        raise ValueError(f"starts must be boolean of shape ({len(rows)},), not empty, got {tuple(starts.shape)}")
    checks.require(starts[0], lambda: "starts must be True at the first row")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    place = torch.arange(len(rows), device=rows.device)
    first = torch.where(starts, place, 0).cummax(0).values
    back = torch.arange(length - 1, -1, -1, device=rows.device)
    return rows[torch.maximum(place[:, None] - back, first[:, None])].flatten(1)


def pair_rows(observation: Tensor, action: Tensor, *, num_actions: int | None = None) -> Tensor:
    """Put observations ``(batch, n)`` and actions side by side: vectors as they are, choices as 0 and 1 for each."""
    checks.floating(observation, "observation")
    checks.tensor(action, "action")
    if observation.dim() != 2:
        raise ValueError(f"observation must have shape (batch, n), got {tuple(observation.shape)}")
    checks.finite(observation, "observation")
    if num_actions is None:
        if not action.is_floating_point() or action.dim() != 2 or len(action) != len(observation):
            raise ValueError(
                f"action must be floating of shape ({len(observation)}, m), or num_actions be given, "
                f"got {action.dtype} of shape {tuple(action.shape)}"
            )
        checks.finite(action, "action")
        return torch.cat([observation, action.to(observation)], 1)
    if action.is_floating_point() or action.shape != observation.shape[:1]:
        raise ValueError(f"action must hold choices ({len(observation)},), got {action.dtype}, {tuple(action.shape)}")
    checks.require(
        (action >= 0) & (action < num_actions),
        lambda: (
            f"action must lie in [0, {num_actions - 1}], got values from {int(action.min())} to {int(action.max())}"
        ),
    )
    return torch.cat([observation, functional.one_hot(action, num_actions).to(observation)], 1)


def logged_rows(
    transitions: Transitions, *, history: int = 1, num_actions: int | None = None
) -> Float[Tensor, "steps features"]:
    """Return a log's states with actions over a history, a row a step: what a guardian is fitted to.

    Args:
        transitions: The log.
        history: How many steps a row tells of, its own included; see :func:`history_rows`.
        num_actions: How many choices there are, each of which becomes a feature; None where actions are vectors.

    Raises:
        ValueError: If the log's actions are of the other kind, or the history is below 1.

    Example:
        >>> last = torch.tensor([False, True])
        >>> log = Transitions(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), torch.zeros(2), torch.ones(2, 1),
        ...                   last, ~last & last)
        >>> logged_rows(log, num_actions=2)
        tensor([[0., 1., 0.],
                [1., 0., 1.]])

    Source:
        Yan et al. 2025, arXiv 2505.16242: the rows that its guardian sees.
    """
    ends = transitions.episode_ends
    rows = pair_rows(transitions.observation, transitions.action, num_actions=num_actions)
    return history_rows(rows, torch.cat([ends.new_ones(1), ends[:-1]]), length=history)


def feature_limits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middle and half the range of each feature of rows; features that never vary keep their unit."""
    check_rows(rows)
    checks.not_empty(rows, "rows")
    low, high = rows.aminmax(dim=0)
    half = (high - low) / 2
    return (high + low) / 2, torch.where(half > 0, half, torch.ones_like(half))


def check_rows(rows: Tensor, features: int | None = None) -> None:
    """Raise unless rows are a finite floating-point matrix, of so many features if any number is given."""
    checks.floating(rows, "rows")
    if rows.dim() != 2 or (features is not None and rows.shape[1] != features):
        wanted = "features" if features is None else str(features)
        raise ValueError(f"rows must have shape (batch, {wanted}), got {tuple(rows.shape)}")
    checks.finite(rows, "rows")
