"""Sparsity-constrained transport against POT's, at objectives that are equal to 1e-6 or better, in the same run.

Both are given squared distances of uniform points in the unit square. POT solves with its own defaults (a relative
change of 1e-9). Ours stops at 0.05 % of the mass misplaced, where its objective, which both maximise, is
checked to be no more than 1e-6 below POT's, relative to its size.
"""

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
from ot.smooth import smooth_ot_semi_dual

from benchmarks.timing import paired_ratio
from minimand.transport import SparseOTRouter, sparse_ot

CAP = 8


def costs(count, rows, columns):
    generator = np.random.default_rng(0)
    first, second = generator.random((count, rows, 1, 2)), generator.random((count, 1, columns, 2))
    return ((first - second) ** 2).sum(-1)


def by_pot(cost, gamma):
    rows, columns = cost.shape
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = smooth_ot_semi_dual(
            np.full(rows, 1 / rows),
            np.full(columns, 1 / columns),
            cost,
            reg=gamma,
            reg_type="sparsity_constrained",
            max_nz=CAP,
            log=True,
        )
    return plan, -log["res"].fun


def by_minimand(cost, gamma):
    return sparse_ot(cost, k=CAP, regularization=gamma, tolerance=5e-4)


@pytest.mark.parametrize(("size", "gamma"), [(1000, 1.0), (1000, 10.0)])
def test_one_problem_of_a_thousand_points_is_solved_3_times_as_fast(record, size, gamma):
    (cost,) = costs(1, size, size)
    tensor = torch.from_numpy(cost)
    value = by_pot(cost, gamma)[1]
    assert float(by_minimand(tensor, gamma).value) >= value * (1 - 1e-6)
    ratio = paired_ratio(lambda: by_minimand(tensor, gamma), lambda: by_pot(cost, gamma), rounds=5, warmup=1)
    name = f"one {size} x {size} problem, gamma {gamma:g}"
    record(f"{name}, against POT", 1 / ratio.median, unit="x faster", target=">= 3")
    record(f"{name}, ours", ratio.ours_seconds, unit="s")
    assert ratio.median <= 1 / 3


def test_a_batch_of_64_problems_is_solved_in_one_call(record):
    batch, gamma = costs(64, 256, 64), 0.1
    tensor = torch.from_numpy(batch)
    values = np.array([by_pot(cost, gamma)[1] for cost in batch])
    assert (by_minimand(tensor, gamma).value.numpy() >= values * (1 - 1e-6)).all()
    ratio = paired_ratio(
        lambda: by_minimand(tensor, gamma), lambda: [by_pot(cost, gamma) for cost in batch], rounds=5, warmup=1
    )
    # The target of 10 is missed: see the page. What is asserted is that one call is worth it.
    record("64 problems of 256 x 64, against POT in a loop", 1 / ratio.median, unit="x faster", target=">= 10")
    record("64 problems of 256 x 64, ours", ratio.ours_seconds, unit="s")
    assert ratio.median <= 1 / 1.5


def test_routing_costs_milliseconds(record):
    logits = torch.randn(16, 256, 8, generator=torch.Generator().manual_seed(0))
    router = SparseOTRouter(8, capacity_factor=1.25)
    ratio = paired_ratio(lambda: router(logits), lambda: logits.softmax(-1).topk(1), rounds=9)
    record("routing 16 groups of 256 tokens to 8 experts, ours", 1e3 * ratio.ours_seconds, unit="ms")
