"""The engine: runs the cells of studies and comparisons, keeps them, and judges the differences."""

from .engine import Failure, Results, run
from .record import make_record, write_evidence
from .store import Cell, CellKey, Store
from .study import BatchedContender, Claim, Contender, Metric, Outcome, Run, Study

__all__ = [
    "BatchedContender",
    "Cell",
    "CellKey",
    "Claim",
    "Contender",
    "Failure",
    "Metric",
    "Outcome",
    "Results",
    "Run",
    "Store",
    "Study",
    "make_record",
    "run",
    "write_evidence",
]
