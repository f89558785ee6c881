"""What moves where: optimal transport with plans that people and networks can use."""

from .otsurv import MassRamp, OTPool, OTSurv, PartialTransport, semi_relaxed_partial_ot
from .pools import AttentionPool, InstancePool, MeanPool
from .sparse_ot import Routing, SparseOTLoss, SparseOTRouter, SparseTransport, project_topk_simplex, sparse_ot

__all__ = [
    "AttentionPool",
    "InstancePool",
    "MassRamp",
    "MeanPool",
    "OTPool",
    "OTSurv",
    "PartialTransport",
    "Routing",
    "SparseOTLoss",
    "SparseOTRouter",
    "SparseTransport",
    "project_topk_simplex",
    "semi_relaxed_partial_ot",
    "sparse_ot",
]
