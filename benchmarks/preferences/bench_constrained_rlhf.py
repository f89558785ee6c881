"""Reward multipliers against Cooper's on the same bandit, and the threshold search against scipy's simplex."""

from __future__ import annotations

import inspect

import cooper
import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.timing import paired_ratio
from minimand.preferences import RewardMultipliers, ThresholdSearch

RESPONSES, THRESHOLDS, LR, DUAL_LR = 200, torch.tensor([0.56, 0.54]), 0.5, 2.0
REWARDS = (1.5 * torch.randn(2, RESPONSES, generator=torch.Generator().manual_seed(0))).sigmoid()


def with_minimand(steps: int) -> Tensor:
    """Follow the exact policy gradient with rewards held at their thresholds from below."""
    logits = torch.nn.Parameter(torch.zeros(RESPONSES))
    optimizer = torch.optim.SGD([logits], lr=LR * RESPONSES)
    multipliers = RewardMultipliers(THRESHOLDS, kind="at least", lr=DUAL_LR, momentum=0.0, max_norm=None)
    for _ in range(steps):
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        policy = logp.detach().exp()
        advantages = multipliers(REWARDS, -logp.detach(), normalize=False)
        (-(policy * advantages) @ logp).backward()
        multipliers.update(REWARDS @ policy)
        optimizer.step()
    return logits.detach().softmax(0)


class Thresholds(cooper.ConstrainedMinimizationProblem):
    """Least divergence with rewards of at least their thresholds, in Cooper's words."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards = cooper.Constraint(
            constraint_type=cooper.ConstraintType.INEQUALITY,
            multiplier=cooper.multipliers.DenseMultiplier(num_constraints=2),
            formulation_type=cooper.formulations.Lagrangian,
        )

    def compute_cmp_state(self, logits: Tensor) -> cooper.CMPState:
        """Evaluate divergence and violation."""
        logp = logits.log_softmax(0)
        policy = logp.exp()
        state = cooper.ConstraintState(violation=THRESHOLDS - REWARDS @ policy)
        return cooper.CMPState(loss=policy @ logp, observed_constraints={self.rewards: state})


def with_cooper(steps: int) -> Tensor:
    """Solve the same problem by Cooper's simultaneous updates, gradients through the expectations."""
    logits = torch.nn.Parameter(torch.zeros(RESPONSES))
    problem = Thresholds()
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=torch.optim.SGD([logits], lr=LR * RESPONSES),
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=DUAL_LR, maximize=True),
    )
    for _ in range(steps):
        optimizer.roll(compute_cmp_state_kwargs={"logits": logits})
    return logits.detach().softmax(0)


def lines(*parts: object) -> int:
    """Count the lines of code, docstrings and blank lines left out."""
    text = [line.strip() for part in parts for line in inspect.getsource(part).splitlines()]  # type: ignore[arg-type]
    return sum(bool(line) and not line.startswith('"""') for line in text)


def test_reward_multipliers_end_where_coopers_do_in_fewer_lines(record):
    """The target, set before measuring: a step of the bandit takes no longer than Cooper's."""
    ours, peer = with_minimand(3000), with_cooper(3000)
    assert torch.allclose(REWARDS @ ours, THRESHOLDS, atol=1e-3)
    assert (ours - peer).abs().max() < 1e-3 * peer.max()
    ratio = paired_ratio(lambda: with_minimand(100), lambda: with_cooper(100))
    record("two rewards at their thresholds, 100 steps, against cooper", ratio.median, unit="x", target="<= 1")
    record("a step with reward multipliers, ours", 1e4 * ratio.ours_seconds, unit="us")
    shorter = lines(with_minimand) / lines(Thresholds, with_cooper)
    record("lines of code, against cooper", shorter, unit="x", target="< 1")
    assert shorter < 1
    assert ratio.median <= 1.0


def quadratic(theta: np.ndarray) -> float:
    """Evaluate a bowl."""
    away = theta - 0.6
    return float(away @ away)


def test_the_threshold_search_costs_a_question_what_scipys_simplex_does(record):
    """The target, set before measuring: at most four times scipy's, since each question goes out as a tensor."""
    box = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    first = torch.tensor([[0.1, 0.2], [0.9, 0.3], [0.4, 0.8]], dtype=torch.float64)
    settings = {"initial_simplex": first.numpy(), "maxfev": 60, "xatol": 0.0, "fatol": 0.0}

    def ours() -> float:
        search = ThresholdSearch(box, initial=first, tolerance=0.0, cache_tolerance=0.0, max_iter=60)
        return search.run(lambda theta: -quadratic(theta.numpy())).evaluation

    def peer() -> float:
        return -minimize(quadratic, first[0].numpy(), method="Nelder-Mead", bounds=[(0, 1)] * 2, options=settings).fun

    assert abs(ours() - peer()) < 1e-9
    ratio = paired_ratio(ours, peer, inner=2)
    record("threshold search, 60 questions, against scipy", ratio.median, unit="x", target="<= 4")
    record("threshold search, a question, ours", 1e6 * ratio.ours_seconds / 60, unit="us")
    assert ratio.median <= 4


def test_a_cache_saves_evaluations(record):
    """What counts where a question costs training: policies trained until the evaluations agree to 0.001."""

    def evaluations(cache: float) -> int:
        count = 0
        for seed in range(20):
            draw = torch.Generator().manual_seed(seed)
            box = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
            search = ThresholdSearch(box, generator=draw, tolerance=1e-5, cache_tolerance=cache)
            found = search.run(lambda theta: -quadratic(theta.numpy()))
            assert found.evaluation > -1e-3
            count += found.evaluations
        return count

    saved = evaluations(5e-3) / evaluations(0.0)
    record("evaluations with the cache against without, 20 searches to 1e-5", saved, unit="x", target="< 1")
    assert saved < 1
