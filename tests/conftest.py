"""Types are checked at run time in every test: shapes by jaxtyping, the rest by beartype."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import config, install_import_hook

hook = install_import_hook(
    [
        "minimand.losses",
        "minimand.risks",
        "minimand.bounds",
        "minimand.constraints",
        "minimand.online",
        "minimand.optim",
        "minimand.policies",
        "minimand.ppo",
        "minimand.preferences",
        "minimand.projections",
        "minimand.transport",
        "minimand.numerics",
        "minimand.reduction",
        "minimand.scores",
        "minimand.survival",
    ],
    "beartype.beartype",
)
hook.__enter__()

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _type_checks(request):
    """Switch the run-time type checks off where a test wants to hear minimand's own error."""
    off = request.node.get_closest_marker("untyped") is not None
    config.update("jaxtyping_disable", off)
    yield
    config.update("jaxtyping_disable", False)
