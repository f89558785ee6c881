"""Laws of returns with finitely many atoms, and what is read off them.

Source: Rockafellar and Uryasev 2000 for the tail mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks

if TYPE_CHECKING:
    import matplotlib.figure

_MOST_LINES, _BINS = 60, 40


@dataclasses.dataclass(frozen=True)
class ReturnLaw:
    """A law of returns with finitely many atoms.

    Args:
        atoms: The returns, ``(atoms,)``, or ``(atoms, rewards)`` where rewards are vectors.
        weights: Their probabilities, ``(atoms,)``.

    Raises:
        ValueError: If shapes do not fit, an atom is not finite, or the weights are no probabilities.

    Example:
        >>> law = ReturnLaw(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.25, 0.25, 0.5]))
        >>> law.mean(), law.cvar(0.5), law.quantile(0.25)
        (tensor(2.2500), tensor(0.5000), tensor(1.))

    Source:
        Rockafellar and Uryasev 2000, "Optimization of conditional value-at-risk".
    """

    atoms: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for value, name in ((self.atoms, "atoms"), (self.weights, "weights")):
            checks.floating(value, name)
            checks.not_empty(value, name)
            checks.finite(value, name)
        if self.atoms.dim() not in (1, 2) or self.weights.shape != self.atoms.shape[:1]:
            raise ValueError(
                "atoms must have shape (atoms,) or (atoms, rewards) and weights (atoms,), "
                f"got {tuple(self.atoms.shape)} and {tuple(self.weights.shape)}"
            )
        checks.require(
            (self.weights >= 0).all() & ((self.weights.sum() - 1).abs() <= rounding_slack(self.weights)),
            lambda: f"weights must hold probabilities that add up to 1, got a sum of {float(self.weights.sum())}",
        )

    def mean(self) -> Float[Tensor, "*rewards"]:
        """Return the mean."""
        return self.weights @ self.atoms

    def cvar(self, tau: float) -> Float[Tensor, ""]:
        """Return the mean of the worst share of the law, the atom on the border split.

        Args:
            tau: The share, in (0, 1].

        Raises:
            ValueError: If tau lies outside (0, 1], or the returns are vectors.
        """
        checks.between(tau, "tau", 0, 1, low_open=True)
        atoms, weights = self._sorted()
        before = weights.cumsum(0) - weights
        return (weights.minimum((tau - before).clamp_min(0)) * atoms).sum() / tau

    def quantile(self, tau: float) -> Float[Tensor, ""]:
        """Return the largest g below which the law has no more than tau of its mass: the upper quantile.

        Args:
            tau: The level, in [0, 1).

        Raises:
            ValueError: If tau lies outside [0, 1), or the returns are vectors.
        """
        checks.between(tau, "tau", 0, 1, high_open=True)
        atoms, weights = self._sorted()
        # A level that sums of weights should meet exactly must not be missed by their rounding.
        below = weights.cumsum(0) - weights <= tau + rounding_slack(weights)
        return atoms[below.sum() - 1]

    def draw(
        self, *, tau: float | None = None, name: str = "return", others: Mapping[str, ReturnLaw] | None = None
    ) -> matplotlib.figure.Figure:
        """Draw the law: its masses, and how surely the return is no larger than each number; vectors of two as a map.

        Args:
            tau: Shade the worst share of this law and mark its tail mean; None shades nothing.
            name: What this law is of.
            others: More laws to compare it with, by what they are of; None for none.

        Returns:
            A figure of its own, which no global state of matplotlib holds: ``figure.savefig(...)`` writes it.

        Raises:
            ValueError: If tau lies outside (0, 1], the returns have more than two entries, or the others have another
                number of them.

        Example:
            >>> law = ReturnLaw(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.25, 0.25, 0.5]))
            >>> [axes.get_ylabel() for axes in law.draw(tau=0.5).axes]
            ['probability', 'probability of no more']
        """
        from matplotlib.figure import Figure

        others = others or {}
        if name in others:
            raise ValueError(f"others must have names of their own, got {name!r} among them")
        laws = {name: self, **others}
        shapes = {each: tuple(law.atoms.shape[1:]) for each, law in laws.items()}
        if len(set(shapes.values())) > 1 or shapes[name] not in ((), (1,), (2,)):
            raise ValueError(f"laws drawn together must have returns of alike one or two entries, got {shapes}")
        if shapes[name] == (2,):
            if tau is not None:
                raise ValueError("tau is for returns that are numbers: vectors have no worst share")
            figure = Figure(figsize=(5.5, 5), layout="constrained")
            _draw_map(figure, laws)
            return figure
        if tau is not None:
            checks.between(tau, "tau", 0, 1, low_open=True)
        figure = Figure(figsize=(7, 5), layout="constrained")
        _draw_numbers(figure, laws, tau)
        return figure

    def _sorted(self) -> tuple[Tensor, Tensor]:
        if self.atoms.dim() != 1:
            raise ValueError(f"a tail is of returns that are numbers, got vectors of shape {tuple(self.atoms.shape)}")
        atoms, order = self.atoms.sort()
        return atoms, self.weights[order]


def _draw_numbers(figure: matplotlib.figure.Figure, laws: Mapping[str, ReturnLaw], tau: float | None) -> None:
    masses, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.2))
    plain = {name: _columns(law) for name, law in laws.items()}
    low, high = min(float(x[0]) for x, _ in plain.values()), max(float(x[-1]) for x, _ in plain.values())
    margin = 0.05 * (high - low) or 1.0
    many = max(len(atoms) for atoms, _ in plain.values()) > _MOST_LINES
    bins = np.linspace(low - 0.5 * margin, high + 0.5 * margin, _BINS + 1)
    for place, (name, (atoms, weights)) in enumerate(plain.items()):
        colour = f"C{place}"
        if many:
            masses.stairs(np.histogram(atoms, bins, weights=weights)[0], bins, color=colour, fill=True, alpha=0.4)
        else:
            # Side by side, so that masses at one return do not hide each other.
            aside = 0.004 * (high - low) * (place - (len(plain) - 1) / 2)
            masses.vlines(atoms + aside, 0, weights, color=colour, linewidth=2.5)
        steps = np.concatenate([[low - margin], atoms, [high + margin]])
        below.step(steps, np.concatenate([[0], weights.cumsum(), [1]]), where="post", color=colour, label=name)
        mean = float(weights @ atoms)
        masses.axvline(mean, color=colour, linestyle="--", linewidth=1, label=f"mean of {name}: {mean:.4g}")
        if place == 0 and tau is not None:
            tail, cumulative = next(iter(laws.values())).cvar(tau).item(), weights.cumsum()
            # The shaded area is tau times what the tail mean is short of the tail's border.
            border = atoms[np.searchsorted(cumulative, tau - 1e-9).clip(max=len(atoms) - 1)]
            inside = np.concatenate([[low - margin], atoms[atoms < border], [border]])
            heights = np.concatenate([[0], cumulative[atoms < border], [tau]])
            below.fill_between(inside, heights, step="post", color=colour, alpha=0.25, linewidth=0)
            below.axhline(tau, color="0.5", linewidth=0.8, linestyle=":")
            below.axvline(tail, color=colour, linestyle=":", label=f"mean of the worst {tau:.4g}: {tail:.4g}")
    masses.set_ylim(bottom=0)
    masses.set_ylabel("probability by range" if many else "probability")
    masses.legend(loc="best", fontsize="small")
    below.set_ylim(0, 1.02)
    below.set_xlim(low - margin, high + margin)
    below.set_xlabel("return")
    below.set_ylabel("probability of no more")
    below.legend(loc="best", fontsize="small")


def _draw_map(figure: matplotlib.figure.Figure, laws: Mapping[str, ReturnLaw]) -> None:
    axes = figure.subplots()
    largest = max(float(law.weights.max()) for law in laws.values())
    for place, (name, law) in enumerate(laws.items()):
        points = law.atoms.detach().double().cpu().numpy()
        areas = 300 * law.weights.detach().double().cpu().numpy() / largest
        axes.scatter(points[:, 0], points[:, 1], s=areas, color=f"C{place}", alpha=0.5, linewidth=0, label=name)
        across, up = law.mean().tolist()
        axes.scatter(across, up, marker="+", s=80, color=f"C{place}")
    axes.set_xlabel("first return")
    axes.set_ylabel("second return")
    axes.set_title("area: probability, cross: mean", fontsize="small")
    axes.legend(loc="best", fontsize="small")


def _columns(law: ReturnLaw) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms, ascending, and weights."""
    atoms, order = law.atoms.detach().double().cpu().reshape(-1).sort()
    return atoms.numpy(), law.weights.detach().double().cpu()[order].numpy()


def rounding_slack(weights: Tensor) -> float:
    """Return by how much sums of probabilities may differ through rounding."""
    return 1024 * torch.finfo(weights.dtype).eps
