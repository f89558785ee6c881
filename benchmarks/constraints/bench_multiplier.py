"""A multiplier against Cooper: logistic regression under a bound on the weights' norm, the same steps, fewer lines."""

from __future__ import annotations

import inspect

import cooper
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from benchmarks.timing import paired_ratio
from minimand.constraints import Multiplier

FEATURES, LABELS = load_breast_cancer(return_X_y=True)
X = torch.tensor(StandardScaler().fit_transform(FEATURES), dtype=torch.float32)
Y = torch.tensor(LABELS, dtype=torch.float32)
BOUND, LR, DUAL_LR, DAMPING = 1.0, 0.1, 0.05, 1.0


def with_minimand(steps: int) -> torch.Tensor:
    """Descend with a multiplier of minimand."""
    weight = torch.nn.Parameter(torch.zeros(X.shape[1]))
    optimizer = torch.optim.SGD([weight], lr=LR)
    multiplier = Multiplier(DUAL_LR, damping=DAMPING)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(X @ weight, Y)
        (loss + multiplier(weight.square().sum() - BOUND)).backward()
        optimizer.step()
    return weight.detach()


class NormBound(cooper.ConstrainedMinimizationProblem):
    """The same problem in Cooper's words."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = cooper.Constraint(
            constraint_type=cooper.ConstraintType.INEQUALITY,
            multiplier=cooper.multipliers.DenseMultiplier(num_constraints=1),
            formulation_type=cooper.formulations.AugmentedLagrangian,
            penalty_coefficient=cooper.penalty_coefficients.DensePenaltyCoefficient(init=torch.tensor(DAMPING)),
        )

    def compute_cmp_state(self, weight: torch.Tensor) -> cooper.CMPState:
        """Evaluate objective and violation."""
        loss = F.binary_cross_entropy_with_logits(X @ weight, Y)
        state = cooper.ConstraintState(violation=weight.square().sum().view(1) - BOUND)
        return cooper.CMPState(loss=loss, observed_constraints={self.norm: state})


def with_cooper(steps: int) -> torch.Tensor:
    """Descend with Cooper's simultaneous updates."""
    weight = torch.nn.Parameter(torch.zeros(X.shape[1]))
    problem = NormBound()
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=torch.optim.SGD([weight], lr=LR),
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=DUAL_LR, maximize=True),
    )
    for _ in range(steps):
        optimizer.roll(compute_cmp_state_kwargs={"weight": weight})
    return weight.detach()


def lines(*parts: object) -> int:
    """Count the lines of code, docstrings and blank lines left out."""
    text = [line.strip() for part in parts for line in inspect.getsource(part).splitlines()]  # type: ignore[arg-type]
    return sum(bool(line) and not line.startswith('"""') for line in text)


def test_the_same_problem_in_fewer_lines_and_no_slower(record):
    """Ours and Cooper's end at the same weights; target of the issue: fewer lines, ratio at most 1."""
    ours, peer = with_minimand(2000), with_cooper(2000)
    assert torch.allclose(ours, peer, atol=1e-4)
    assert abs(ours.square().sum() - BOUND) < 1e-3
    ratio = paired_ratio(lambda: with_minimand(100), lambda: with_cooper(100))
    record("norm-bounded logistic regression, 100 steps, against cooper", ratio.median, unit="x", target="<= 1")
    shorter = lines(with_minimand) / lines(NormBound, with_cooper)
    record("lines of code, against cooper", shorter, unit="x", target="< 1")
    assert ratio.median <= 1.0
    assert shorter < 1
