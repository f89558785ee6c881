"""minimand: change what your model minimises, not your training loop.

Rooms are imported when first touched, so that ``import minimand`` costs nothing and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = (
    *("bench", "bounds", "constraints", "losses", "online", "optim", "policies", "preferences", "report"),
    *("risks", "scores", "studies", "survival", "training", "transport"),
)

__all__ = ["ObjectiveClassifier", "__version__", *_ROOMS]

if TYPE_CHECKING:
    from . import (  # noqa: F401
        bench,
        bounds,
        constraints,
        losses,
        online,
        optim,
        policies,
        preferences,
        report,
        risks,
        scores,
        studies,
        survival,
        training,
        transport,
    )
    from .classifier import ObjectiveClassifier


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "ObjectiveClassifier":
        return importlib.import_module(f"{__name__}.classifier").ObjectiveClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
