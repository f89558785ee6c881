"""Where online learners live: projection of many points at once, and how far apart points of a set can be."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..projections import Ball, Box, Projection, Simplex, project_ball


def check_domain(domain: Projection | None) -> None:
    """Raise ``TypeError`` unless the domain is one that :func:`project_rows` knows."""
    if not (domain is None or isinstance(domain, (Ball, Box, Simplex))):
        raise TypeError(f"domain must be a Ball, a Box, a Simplex or None, got {domain!r}")


def project_rows(points: Float[Tensor, "*batch dim"], domain: Projection | None) -> Float[Tensor, "*batch dim"]:
    """Return the nearest point of the domain for every row; the points themselves where there is no domain."""
    if domain is None:
        return points
    # A Ball called as a function takes all entries together, here every row is a point of its own.
    return project_ball(points, radius=domain.radius, dim=-1) if isinstance(domain, Ball) else domain(points)


def diameter_of(domain: Projection | None, dim: int, diameter: float | None) -> float:
    """Return the given diameter, or that of the domain in so many dimensions."""
    check_domain(domain)
    if diameter is not None:
        checks.positive(diameter, "diameter")
        return diameter
    if domain is None:
        raise ValueError("diameter is required where there is no domain: how far from the start the solution may lie")
    found = math.sqrt(dim) * (domain.high - domain.low) if isinstance(domain, Box) else domain.diameter
    if not 0 < found < math.inf:
        raise ValueError(f"diameter is required for {domain!r}, whose own is {found}")
    return found
