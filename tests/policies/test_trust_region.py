"""The step of a constrained trust region, against an independent solver and the formulas of CPO."""

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.sparse.linalg import cg
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn import functional

from minimand.policies import backtracking, conjugate_gradients, fisher_product, trust_region_step
from minimand.policies.curvature import flatten, unflatten
from minimand.stopping import Stop

F64 = torch.float64


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def metric(dim, seed):
    root = draw((dim, dim), seed)
    return root @ root.T / dim + 0.1 * torch.eye(dim, dtype=F64)


def exact(gradient, matrix, **settings):
    return trust_region_step(gradient, lambda v: v @ matrix, tolerance=1e-13, max_iter=200, **settings)


def problem(seed, count, dim=5):
    violations = 0.2 * draw((count,), seed + 3000)
    return draw((dim,), seed + 1000), metric(dim, seed), draw((count, dim), seed + 2000), violations


def by_slsqp(gradient, matrix, rows, violations, max_kl, start):
    g, h, b, c = (np.asarray(each) for each in (gradient, matrix, rows, violations))
    return scipy.optimize.minimize(
        lambda x: -g @ x,
        start,
        jac=lambda x: -g,
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x: -(c + b @ x), "jac": lambda x: -b},
            {"type": "ineq", "fun": lambda x: max_kl - x @ h @ x / 2, "jac": lambda x: -h @ x},
        ],
        options={"maxiter": 500, "ftol": 1e-15},
    )


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_step_is_feasible_and_as_good_as_that_of_slsqp(count):
    compared = 0
    for seed in range(25):
        gradient, matrix, rows, violations = problem(seed, count)
        found = exact(gradient, matrix, constraint_gradients=rows, violations=violations, max_kl=0.05)
        if not found.feasible:
            continue
        assert (violations + rows @ found.step).max() <= 1e-9
        assert found.step @ matrix @ found.step / 2 <= 0.05 + 1e-9
        for start in (np.zeros(5), found.step.numpy()):  # from our own answer, it finds nothing better
            other = by_slsqp(gradient, matrix, rows, violations, 0.05, start)
            if other.success:
                assert float(gradient @ found.step) == pytest.approx(-other.fun, abs=1e-6)
                compared += 1
    assert compared >= 10


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_step_and_its_multipliers_satisfy_kkt(count):
    for seed in range(25):
        gradient, matrix, rows, violations = problem(seed, count)
        found = exact(gradient, matrix, constraint_gradients=rows, violations=violations, max_kl=0.05)
        if not found.feasible:
            continue
        pull = gradient - rows.T @ found.multipliers  # = lambda H x
        image = matrix @ found.step
        scale = (pull @ image) / (image @ image)
        torch.testing.assert_close(pull, scale * image, atol=1e-7, rtol=1e-7)
        assert scale >= 0
        assert (found.multipliers >= -1e-9).all()
        torch.testing.assert_close(
            found.multipliers * (violations + rows @ found.step), torch.zeros(count, dtype=F64), atol=1e-8, rtol=0
        )
        assert float(found.step @ matrix @ found.step) / 2 == pytest.approx(0.05, rel=1e-8)


def cpo(gradient, matrix, b, c, delta):
    """The three cases of CPO as its authors write them, with dense solves."""
    hg, hb = torch.linalg.solve(matrix, gradient), torch.linalg.solve(matrix, b)
    q, r, s = gradient @ hg, gradient @ hb, b @ hb
    scale = (q / (2 * delta)).sqrt()
    if c + r / scale <= 0:
        return "free", hg / scale
    if c > 0 and c**2 / s > 2 * delta:
        return "recovery", -(2 * delta / s).sqrt() * hb
    scale = ((q - r**2 / s) / (2 * delta - c**2 / s)).sqrt()
    return "bound", (hg - (scale * c + r) / s * hb) / scale


def test_one_constraint_gives_the_three_cases_of_cpo():
    cases = []
    for seed in range(60):
        gradient, matrix, rows, violations = problem(seed, 1)
        violations = 3 * violations
        case, step = cpo(gradient, matrix, rows[0], violations[0], 0.02)
        found = exact(gradient, matrix, constraint_gradients=rows, violations=violations, max_kl=0.02)
        torch.testing.assert_close(found.step, step)
        assert bool(found.feasible) == (case != "recovery")
        assert bool(found.active) == (case == "bound")
        cases.append(case)
    assert set(cases) == {"free", "bound", "recovery"}


def test_without_constraints_the_step_is_the_natural_gradient_on_the_edge_of_the_trust_region():
    gradient, matrix = draw((6,), 1), metric(6, 2)
    natural = torch.linalg.solve(matrix, gradient)
    found = exact(gradient, matrix, max_kl=0.03)
    torch.testing.assert_close(found.step, natural * (2 * 0.03 / (gradient @ natural)).sqrt())
    assert found.feasible


def test_a_constraint_that_cannot_bind_changes_nothing():
    gradient, matrix, rows, _ = problem(4, 2)
    far = torch.full((2,), -1e3, dtype=F64)
    torch.testing.assert_close(
        exact(gradient, matrix, constraint_gradients=rows, violations=far).step, exact(gradient, matrix).step
    )


def nearest_point(matrix, rows, violations):
    h, b, c = matrix.numpy(), rows.numpy(), violations.numpy()
    found = scipy.optimize.minimize(
        lambda x: x @ h @ x / 2,
        np.zeros(len(h)),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: -(c + b @ x)},
        options={"maxiter": 500, "ftol": 1e-15},
    )
    return torch.from_numpy(found.x)


def test_recovery_goes_straight_towards_the_nearest_point_that_keeps_all_constraints():
    violations = torch.tensor([3.0, 2.0, -0.1], dtype=F64)
    for seed in range(10):
        gradient, matrix, rows, _ = problem(seed, 3)
        found = exact(gradient, matrix, constraint_gradients=rows, violations=violations, max_kl=1e-3)
        assert not found.feasible
        goal = nearest_point(matrix, rows, violations)
        along = goal * (2e-3 / (goal @ matrix @ goal)).sqrt()
        torch.testing.assert_close(found.step, along, atol=1e-6, rtol=1e-4)


def test_constraints_that_no_point_keeps_still_give_a_finite_step_within_the_region():
    row = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    found = exact(
        torch.ones(2, dtype=F64), torch.eye(2, dtype=F64), constraint_gradients=row, violations=torch.ones(2, dtype=F64)
    )
    assert not found.feasible
    assert torch.isfinite(found.step).all()
    assert found.step @ found.step / 2 <= 0.01 + 1e-12


def test_a_repeated_constraint_and_one_without_gradient_change_nothing():
    gradient, matrix, rows, violations = problem(8, 1)
    once = exact(gradient, matrix, constraint_gradients=rows, violations=-violations.abs() / 10)
    rows3 = torch.cat([rows, 2 * rows, 0 * rows])
    violations3 = torch.cat([-violations.abs() / 10, -violations.abs() / 5, torch.tensor([-1.0], dtype=F64)])
    torch.testing.assert_close(
        exact(gradient, matrix, constraint_gradients=rows3, violations=violations3).step, once.step
    )


def test_policies_in_a_batch_step_as_each_would_alone():
    many = [problem(seed, 2) for seed in range(6)]
    gradient, matrix, rows, violations = (torch.stack(each) for each in zip(*many, strict=True))
    together = trust_region_step(
        gradient,
        lambda v: (matrix @ v[..., None]).squeeze(-1),
        constraint_gradients=rows,
        violations=violations,
        tolerance=1e-13,
        max_iter=200,
    )
    for index, (g, h, b, c) in enumerate(many):
        alone = exact(g, h, constraint_gradients=b, violations=c)
        torch.testing.assert_close(together.step[index], alone.step)
        assert together.feasible[index] == alone.feasible


def test_conjugate_gradients_agree_with_scipy_and_end_after_as_many_products_as_dimensions():
    matrix, rhs = metric(8, 5), draw((3, 8), 6)
    found = conjugate_gradients(lambda v: v @ matrix, rhs, tolerance=1e-10, max_iter=50)
    for row, solution in zip(rhs, found.solution, strict=True):
        peer, _ = cg(matrix.numpy(), row.numpy(), rtol=1e-12)
        np.testing.assert_allclose(solution.numpy(), peer, rtol=1e-8)
    assert found.status is Stop.CONVERGED
    assert found.iterations <= 10
    assert found.residual.max() < 1e-10


def test_conjugate_gradients_tell_where_a_matrix_is_not_positive_definite():
    found = conjugate_gradients(lambda v: v * torch.tensor([1.0, -5.0]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert found.status is Stop.STALLED
    assert torch.equal(found.solution[0], torch.zeros(2))


def test_the_fisher_product_of_a_softmax_is_that_of_its_covariance():
    inputs, weight = draw((7, 3), 1), draw((4, 3), 2).requires_grad_()
    law = Categorical(logits=functional.linear(inputs, weight))
    old = Categorical(logits=law.logits.detach())
    product = fisher_product(kl_divergence(old, law).mean(), [weight], damping=0.0)
    spread = torch.diag_embed(old.probs) - old.probs[:, :, None] * old.probs[:, None, :]
    fisher = torch.einsum("nij,nk,nl->ikjl", spread, inputs, inputs).reshape(12, 12) / 7
    vectors = draw((5, 12), 3)
    torch.testing.assert_close(product(vectors), vectors @ fisher)
    torch.testing.assert_close(product(vectors[0]), fisher @ vectors[0])


def test_the_fisher_product_of_a_gaussian_is_known_and_damping_adds_its_multiple():
    mean, log_deviation = draw((2,), 1).requires_grad_(), draw((2,), 2).requires_grad_()
    law, old = Normal(mean, log_deviation.exp()), Normal(mean.detach(), log_deviation.detach().exp())
    product = fisher_product(kl_divergence(old, law).sum(), [mean, log_deviation], damping=0.5)
    diagonal = torch.cat([(-2 * log_deviation).exp(), torch.full((2,), 2.0, dtype=F64)]).detach() + 0.5
    vector = draw((4,), 3)
    torch.testing.assert_close(product(vector), diagonal * vector)


def test_the_fisher_product_of_stacked_policies_keeps_them_apart():
    inputs, weights = draw((3, 7, 2), 1), draw((3, 4, 2), 2).requires_grad_()

    def divergence(rows, weight):
        law = Categorical(logits=rows @ weight.mT)
        return kl_divergence(Categorical(logits=law.logits.detach()), law).mean(-1).sum()

    together = fisher_product(divergence(inputs, weights), [weights], batch_dims=1)
    vectors = draw((2, 3, 8), 3)
    for policy in range(3):
        weight = weights[policy].detach().requires_grad_()
        alone = fisher_product(divergence(inputs[policy], weight), [weight])
        torch.testing.assert_close(together(vectors)[:, policy], alone(vectors[:, policy]))


def test_a_parameter_that_the_divergence_does_not_depend_on_has_no_curvature_but_the_damping():
    used, unused = draw((2,), 1).requires_grad_(), draw((3,), 2).requires_grad_()
    product = fisher_product(used.square().sum(), [unused, used], damping=0.5)
    torch.testing.assert_close(product(torch.ones(2, 5, dtype=F64))[1], torch.tensor([0.5] * 3 + [2.5] * 2, dtype=F64))


def test_flatten_and_unflatten_are_inverse():
    tensors = [draw((3, 2, 2), 1), draw((3,), 2), draw((3, 5), 3)]
    vector = flatten(tensors, batch_dims=1)
    assert vector.shape == (3, 10)
    for one, other in zip(unflatten(vector, tensors, batch_dims=1), tensors, strict=True):
        assert torch.equal(one, other)


def test_backtracking_takes_the_longest_step_on_its_ladder_that_is_accepted():
    found = backtracking(torch.tensor([[4.0], [0.5], [100.0]]), lambda step: step[:, 0] < 1, factor=0.5, max_iter=4)
    assert found.scale.tolist() == [0.125, 1.0, 0.0]
    assert found.accepted.tolist() == [True, True, False]
    assert found.status is Stop.ITERATION_LIMIT
    assert found.step[2] == 0


@pytest.mark.untyped
def test_errors_name_the_argument():
    identity = torch.ones(2), lambda v: v
    with pytest.raises(ValueError, match="violations"):
        trust_region_step(*identity, constraint_gradients=torch.ones(1, 2), violations=torch.ones(3))
    with pytest.raises(ValueError, match="at most 10"):
        trust_region_step(*identity, constraint_gradients=torch.ones(11, 2), violations=torch.ones(11))
    with pytest.raises(ValueError, match="max_kl"):
        trust_region_step(*identity, max_kl=0.0)
    with pytest.raises(ValueError, match="product"):
        conjugate_gradients(lambda v: v[:1], torch.ones(2))
    with pytest.raises(ValueError, match="scalar"):
        fisher_product(torch.ones(2), [])
