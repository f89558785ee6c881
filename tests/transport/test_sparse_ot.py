"""Sparsity-constrained transport against its mathematics, brute force and POT (Liu, Puigcerver and Blondel 2023)."""

import contextlib
import io
import itertools
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ot.smooth import smooth_ot_dual, smooth_ot_semi_dual

from minimand.projections import project_simplex
from minimand.stopping import Stop
from minimand.transport import SparseOTLoss, SparseOTRouter, project_topk_simplex, sparse_ot
from minimand.transport.sparse_ot import _Columns, _water_level

F64 = torch.float64
TIGHT = {"tolerance": 1e-11, "max_iter": 5000}
# Where k leaves ties, the dual has a kink at its maximum, which only a history as long as alpha reaches.
TIED = {"tolerance": 1e-7, "max_iter": 1000, "history": 40}


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(m, n, seed=0):
    """Draw costs, and masses that are not uniform and add up to 2.5."""
    a, b = 0.2 + random(m, seed=seed + 1), 0.2 + random(n, seed=seed + 2)
    return random(m, n, seed=seed), 2.5 * a / a.sum(), 2.5 * b / b.sum()


def gaussians(bins=32):
    """Return the squared distances of bins on a line, over the largest, and two histograms."""
    x = torch.arange(bins, dtype=F64)
    cost = (x[:, None] - x) ** 2
    a, b = (torch.exp(-((x - mean) ** 2) / (2 * spread**2)) for mean, spread in ((10, 4), (16, 5)))
    return cost / cost.max(), a / a.sum(), b / b.sum()


def pot(solver, cost, a, b, gamma, **settings):
    """Solve by POT, tightly, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = solver(
            a.numpy(), b.numpy(), cost.numpy(), reg=gamma, stopThr=1e-15, numItermax=5000, log=True, **settings
        )
    return torch.from_numpy(plan), -log["res"].fun


def exact(cost, a, b):
    return float(ot.emd2(a.numpy(), b.numpy(), cost.numpy()))


def test_a_cap_of_m_is_quadratically_regularised_transport():
    for seed in range(3):
        cost, a, b = problem(14, 9, seed)
        ours = sparse_ot(cost, a, b, k=14, regularization=0.3, **TIGHT)
        plan, value = pot(smooth_ot_semi_dual, cost, a, b, 0.3, reg_type="l2")
        assert ours.converged
        assert ours.value.item() == pytest.approx(value, abs=1e-8)
        torch.testing.assert_close(ours.plan, plan, rtol=0, atol=1e-4)
        beyond = sparse_ot(cost, a, b, k=100, regularization=0.3, **TIGHT)
        torch.testing.assert_close(beyond.plan, ours.plan, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_cap_of_1_is_unregularised_transport_and_its_plan_the_permutation(seed):
    cost = random(12, 12, seed=seed)
    b = torch.full((12,), 1 / 12, dtype=F64)
    ours = sparse_ot(cost, k=1, regularization=0.1, **TIGHT)
    assert ours.value.item() == pytest.approx(exact(cost, b, b) + 0.05 * float(b @ b), abs=1e-9)
    plan = torch.from_numpy(ot.emd(b.numpy(), b.numpy(), cost.numpy()))
    torch.testing.assert_close(ours.plan, plan, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("k", "gamma"), [(3, 0.1), (5, 0.1), (5, 2.0), (8, 2.0)])
def test_the_value_is_pots_also_where_masses_are_not_uniform(k, gamma):
    cost, a, b = problem(20, 15, seed=4)
    ours = sparse_ot(cost, a, b, k=k, regularization=gamma, **TIGHT)
    for solver in (smooth_ot_semi_dual, smooth_ot_dual):
        _, value = pot(solver, cost, a, b, gamma, reg_type="sparsity_constrained", max_nz=k)
        assert ours.value.item() == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(("k", "gamma"), [(1, 0.1), (2, 0.1), (1, 2.0), (2, 2.0), (3, 2.0)])
def test_where_the_plans_tie_the_value_is_at_least_pots_and_close(k, gamma):
    cost, a, b = problem(20, 15, seed=4)
    ours = float(sparse_ot(cost, a, b, k=k, regularization=gamma, **TIED).value)
    _, value = pot(smooth_ot_semi_dual, cost, a, b, gamma, reg_type="sparsity_constrained", max_nz=k)
    assert value - 1e-6 <= ours
    assert ours == pytest.approx(value, rel=0.02)


def test_the_plan_is_pots_where_the_cap_leaves_no_ties():
    cost, a, b = gaussians()
    ours = sparse_ot(cost, a, b, k=10, regularization=0.1, tolerance=1e-6)
    plan, value = pot(smooth_ot_semi_dual, cost, a, b, 0.1, reg_type="sparsity_constrained", max_nz=10)
    assert ours.converged
    assert ours.value.item() == pytest.approx(value, abs=1e-8)
    torch.testing.assert_close(ours.plan, plan, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["gaussians", "random"])
def test_the_value_falls_as_the_cap_rises_between_the_bounds_of_the_k_support_norm(case):
    cost, a, b = gaussians() if case == "gaussians" else problem(16, 16, seed=8)
    gamma = 0.1
    unregularised, square = exact(cost, a, b), float(b @ b)
    values = []
    for k in (1, 2, 3, 5, 8, 16):
        value = float(sparse_ot(cost, a, b, k=k, regularization=gamma, **TIED).value)
        assert value <= unregularised + gamma / 2 * square + 1e-9
        # A column of mass b in k entries has the squared norm b^2 / k at least. At a kink the solver stays a bit below.
        assert value >= unregularised + gamma / 2 * square / k - 2e-3 * unregularised
        values.append(value)
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(values))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    k=st.integers(1, 14),
    gamma=st.sampled_from([0.01, 1.0, 30.0]),
    iterations=st.integers(0, 60),
)
def test_columns_hold_their_mass_exactly_in_at_most_k_entries_however_soon_the_solver_stops(
    seed, m, n, k, gamma, iterations
):
    cost, a, b = problem(m, n, seed)
    found = sparse_ot(cost, a, b, k=k, regularization=gamma, max_iter=iterations)
    assert (found.plan >= 0).all()
    assert ((found.plan > 0).sum(0) <= k).all()
    torch.testing.assert_close(found.plan.sum(0), b, rtol=0, atol=1e-12)
    assert found.row_residual.item() == pytest.approx(float((found.plan.sum(1) - a).abs().sum()), abs=1e-15)
    # A lower bound of the cost of the unregularised optimum spread over single entries, wherever the solver is.
    assert found.value.item() <= exact(cost, a, b) + gamma / 2 * float(b @ b) + 1e-9


def conjugate_plus(s, k, gamma):
    return s.clamp_min(0).topk(min(k, s.shape[0]), dim=0).values.square().sum(0) / (2 * gamma)


def conjugate_mass(s, z, k, gamma):
    """Maximise <s, t> - gamma/2 |t|^2 over every choice of k entries in turn."""
    best = -float("inf")
    for chosen in itertools.combinations(range(len(s)), min(k, len(s))):
        part = s[list(chosen)]
        t = gamma**-1 * project_simplex(part, total=gamma * z)
        best = max(best, float(part @ t - gamma / 2 * t @ t))
    return best


def dual(alpha, beta, cost, a, b, k, gamma):
    return alpha @ a + beta @ b - conjugate_plus(alpha[:, None] + beta - cost, k, gamma).sum()


@pytest.mark.parametrize("iterations", [0, 3, 40, 4000])
def test_the_semi_dual_is_the_dual_at_its_best_beta_and_above_it_at_any_other(iterations):
    cost, a, b = problem(9, 7, seed=2)
    found = sparse_ot(cost, a, b, k=3, regularization=0.5, max_iter=iterations, tolerance=1e-10)
    at_beta = dual(found.alpha, found.beta, cost, a, b, 3, 0.5)
    assert at_beta.item() == pytest.approx(found.value.item(), abs=1e-10)
    for seed in range(10):
        other = found.beta + 0.3 * (random(7, seed=seed) - 0.5)
        assert dual(found.alpha, other, cost, a, b, 3, 0.5) <= found.value + 1e-12


@pytest.mark.parametrize("k", [4, 5, 9])
def test_the_dual_formulation_has_the_maximum_of_the_semi_dual(k):
    cost, a, b = problem(9, 7, seed=2)
    first = sparse_ot(cost, a, b, k=k, regularization=0.5, tolerance=1e-9, max_iter=5000)
    second = sparse_ot(cost, a, b, k=k, regularization=0.5, tolerance=1e-9, max_iter=5000, formulation="dual")
    assert second.value.item() == pytest.approx(first.value.item(), abs=1e-7)
    assert second.value.item() == pytest.approx(dual(second.alpha, second.beta, cost, a, b, k, 0.5).item(), abs=1e-10)
    if first.converged:
        torch.testing.assert_close(second.plan, first.plan, rtol=0, atol=1e-5)


def test_adam_climbs_to_the_maximum_of_lbfgs():
    cost, a, b = problem(9, 7, seed=2)
    best = sparse_ot(cost, a, b, k=4, regularization=0.5, **TIGHT)
    slow = sparse_ot(cost, a, b, k=4, regularization=0.5, solver="adam", max_iter=2000)
    assert slow.value.item() == pytest.approx(best.value.item(), abs=1e-5)
    assert slow.value <= best.value + 1e-12
    assert slow.iterations > best.iterations


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("gamma", [0.2, 3.0])
def test_the_conjugate_of_a_column_is_the_maximum_over_all_supports(k, gamma):
    for seed in range(5):
        s, z = 2 * random(6, seed=seed) - 1, 0.7
        top = s.topk(k).values
        t = (top - _water_level(top, torch.tensor(gamma * z, dtype=F64))).clamp_min(0) / gamma
        assert t.sum().item() == pytest.approx(z, abs=1e-12)
        value = float(top @ t - gamma / 2 * t @ t)
        assert value == pytest.approx(conjugate_mass(s, z, k, gamma), abs=1e-10)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_the_projection_is_the_nearest_point_over_all_supports(k):
    for seed in range(5):
        point = 2 * random(6, seed=seed) - 1
        ours = project_topk_simplex(point, k=k, total=1.5)
        assert (ours > 0).sum() <= k
        distances = []
        for chosen in itertools.combinations(range(6), k):
            other = torch.zeros(6, dtype=F64)
            other[list(chosen)] = project_simplex(point[list(chosen)], total=1.5)
            distances.append(float((point - other).norm()))
        assert float((point - ours).norm()) == pytest.approx(min(distances), abs=1e-12)


def test_the_projection_takes_any_dimension_and_a_total_for_each_vector():
    point, totals = random(2, 5, 3), torch.tensor([[[0.5, 1.0, 2.0]]], dtype=F64)
    ours = project_topk_simplex(point, k=2, total=totals, dim=1)
    for row in range(2):
        for column in range(3):
            one = project_topk_simplex(point[row, :, column], k=2, total=float(totals[0, 0, column]))
            torch.testing.assert_close(ours[row, :, column], one, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        project_topk_simplex(point, k=9, dim=1), project_simplex(point, dim=1), rtol=0, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda x: project_topk_simplex(x, k=2), (random(4, 5).requires_grad_(),))


def test_a_shift_of_rows_and_columns_moves_the_value_and_not_the_plan():
    cost, a, b = problem(10, 8, seed=6)
    u, v = 3 * random(10, seed=1), 5 * random(8, seed=2) - 4
    first = sparse_ot(cost, a, b, k=5, regularization=0.4, **TIGHT)
    moved = sparse_ot(cost + u[:, None] + v, a, b, k=5, regularization=0.4, **TIGHT)
    assert first.converged
    torch.testing.assert_close(moved.plan, first.plan, rtol=0, atol=1e-8)
    assert (moved.value - first.value).item() == pytest.approx(float(u @ a + v @ b), abs=1e-9)


def test_the_gradient_of_the_value_is_the_plan_and_the_potentials():
    cost, a, b = problem(6, 5, seed=1)
    options = {"k": 3, "regularization": 0.2, **TIGHT}
    assert sparse_ot(cost, a, b, **options).converged
    cost.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sparse_ot(c, a, b, **options).value, (cost,), eps=1e-6, atol=1e-6)
    moved_a, moved_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    found = sparse_ot(cost, moved_a, moved_b, **options)
    found.value.backward()
    torch.testing.assert_close(cost.grad, found.plan)
    torch.testing.assert_close(moved_a.grad, found.alpha)
    torch.testing.assert_close(moved_b.grad, found.beta)

    def along(shift):  # masses may only move so that their total stays
        change_a, change_b = shift[:6] - shift[:6].mean(), shift[6:] - shift[6:].mean()
        return sparse_ot(cost.detach(), a + change_a, b + change_b, **options).value

    assert torch.autograd.gradcheck(along, (torch.zeros(11, dtype=F64, requires_grad=True),), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", [6, 4])
def test_the_implicit_gradient_of_the_plan_is_that_of_finite_differences(m):
    cost, a, b = (torch.stack(both) for both in zip(problem(m, 5, seed=1), problem(m, 5, seed=30), strict=True))
    options = {"k": 3, "regularization": 0.2, "gradient": "implicit", "tolerance": 1e-13, "max_iter": 5000}
    assert sparse_ot(cost, a, b, **options).row_residual.max() < 1e-9
    assert torch.autograd.gradcheck(
        lambda c: sparse_ot(c, a, b, **options).plan, (cost.requires_grad_(),), eps=1e-6, atol=1e-5
    )

    def along(shift):
        changes = shift[:, :m] - shift[:, :m].mean(1, keepdim=True), shift[:, m:] - shift[:, m:].mean(1, keepdim=True)
        return sparse_ot(cost.detach(), a + changes[0], b + changes[1], **options).plan

    shift = torch.zeros(2, m + 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (shift,), eps=1e-6, atol=1e-5)


def test_the_implicit_gradient_exists_where_the_plan_falls_into_parts():
    # Two blocks that exchange no mass: the Laplacian has a null space of its own for each.
    cost = torch.full((4, 4), 9.0, dtype=F64)
    cost[:2, :2], cost[2:, 2:] = random(2, 2, seed=1), random(2, 2, seed=2)
    options = {"k": 4, "regularization": 1.0, "gradient": "implicit", "tolerance": 1e-13}
    found = sparse_ot(cost, **options)
    assert found.plan[:2, 2:].sum() == found.plan[2:, :2].sum() == 0
    assert torch.autograd.gradcheck(lambda c: sparse_ot(c, **options).plan, (cost.requires_grad_(),), eps=1e-6)


def test_the_envelope_gives_the_plan_no_gradient():
    cost = random(4, 4).requires_grad_()
    found = sparse_ot(cost, k=2)
    assert not found.plan.requires_grad
    assert not found.alpha.requires_grad
    assert found.value.requires_grad


@pytest.mark.parametrize("k", [1, 3, 20])
def test_a_batch_is_its_problems_one_by_one(k):
    cost, a, b = (torch.stack(three) for three in zip(*(problem(20, 11, seed) for seed in (0, 10, 20)), strict=True))
    options = {"k": k, "regularization": 0.5, "tolerance": 1e-6}
    together = sparse_ot(cost[None], a, b, **options)
    assert together.plan.shape == (1, 3, 20, 11)
    assert together.value.shape == together.row_residual.shape == together.converged.shape == (1, 3)
    ends = []
    for row in range(3):
        alone = sparse_ot(cost[row], a[row], b[row], **options)
        assert together.value[0, row].item() == pytest.approx(
            alone.value.item(), rel=1e-12 if alone.converged else 1e-2
        )
        ends.append(alone.status)
        if alone.converged:
            torch.testing.assert_close(together.plan[0, row], alone.plan, rtol=0, atol=1e-5)
    assert (together.status is Stop.CONVERGED) == all(end is Stop.CONVERGED for end in ends)
    assert torch.equal(together.converged[0], torch.tensor([end is Stop.CONVERGED for end in ends]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 2, 8, 30, 90]), scale=st.sampled_from([1e-3, 0.1, 3.0]))
def test_short_lists_give_the_top_entries_of_a_full_sort_along_any_path(seed, k, scale):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, 5, 90, generator=generator, dtype=F64)
    mass = 10 ** (4 * torch.rand(2, 5, generator=generator, dtype=F64) - 3)
    columns, alpha = _Columns(cost, k), torch.zeros(2, 90, dtype=F64)
    everyone = torch.arange(2)
    for step in range(12):
        rows = everyone if step < 8 else everyone[1:]
        here = alpha[rows]
        top, index, level = columns.top(here, rows, lambda top, rows=rows: _water_level(top, mass[rows]))
        plan = torch.zeros(len(rows), 5, 90, dtype=F64).scatter(2, index, (top - level[..., None]).clamp_min(0))
        entries = here[:, None] - cost[rows]
        wanted = project_topk_simplex(entries, k=k, total=mass[rows][..., None])
        torch.testing.assert_close(plan, wanted, rtol=0, atol=1e-12)
        alpha = alpha + scale * torch.randn(2, 90, generator=generator, dtype=F64)


def test_where_no_sparse_plan_has_the_marginals_the_residual_is_told_and_not_hidden():
    cost, a, b = gaussians()
    found = [sparse_ot(cost, a, b, k=k, regularization=0.1, tolerance=1e-5, max_iter=500) for k in (1, 2, 5, 10)]
    assert [bool(one.converged) for one in found] == [False, False, False, True]
    for one in found:
        assert bool(one.converged) == (one.status is Stop.CONVERGED) == (one.row_residual <= 1e-5)
    assert found[0].row_residual > found[1].row_residual > found[2].row_residual > found[3].row_residual
    assert found[0].row_residual > 0.1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), columns=st.sampled_from([4, 20]))
def test_equal_entries_are_broken_alike_by_the_solver_and_by_the_plan_that_it_returns(seed, k, columns):
    levels = torch.randint(0, 3, (3, 20, columns), generator=torch.Generator().manual_seed(seed)).double()
    found = sparse_ot(levels, k=k, tolerance=1e-6, max_iter=100)
    assert torch.equal(found.converged, found.row_residual <= 1e-6)
    assert ((found.plan > 0).sum(1) <= k).all()


def test_masses_of_zero_take_and_send_nothing():
    cost, a, b = problem(7, 6, seed=3)
    a[2], b[1] = 0.0, 0.0
    b *= a.sum() / b.sum()
    found = sparse_ot(cost, a, b, k=4, **TIGHT)
    assert found.converged
    assert found.plan[:, 1].sum() == 0
    assert found.plan[2].sum() < 1e-10
    without = sparse_ot(cost[:, [0, 2, 3, 4, 5]], a, b[[0, 2, 3, 4, 5]], k=4, **TIGHT)
    assert found.value.item() == pytest.approx(without.value.item(), abs=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_single_precision_comes_as_near_as_its_digits_allow_and_half_is_computed_in_single(dtype, tolerance):
    cost, a, b = problem(12, 9, seed=5)
    wanted = sparse_ot(cost, a, b, k=4, regularization=0.5)
    found = sparse_ot(cost.to(dtype), a.float(), b.float(), k=4, regularization=0.5, tolerance=1e-5)
    assert found.plan.dtype == torch.float32
    assert found.value.item() == pytest.approx(wanted.value.item(), rel=tolerance)
    assert found.row_residual < 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_a_single_row_or_column_leaves_no_choice(shape):
    cost, a, b = problem(*shape)
    found = sparse_ot(cost, a, b, k=max(shape))
    assert found.converged
    torch.testing.assert_close(found.plan, a[:, None] * b / a.sum(), rtol=0, atol=1e-6)


def test_more_mass_in_a_row_than_k_columns_can_use_is_told_by_the_status_and_never_hangs():
    # One row must feed every column, but each column may only hear one row.
    a, b = torch.tensor([0.5, 0.5], dtype=F64), torch.ones(1, dtype=F64)
    found = sparse_ot(torch.zeros(2, 1, dtype=F64), a, b, k=1, max_seconds=20.0)
    assert found.status is not Stop.CONVERGED
    assert found.row_residual.item() == pytest.approx(1.0)


# Name to changed arguments, and what the message must say.
BAD = {
    "NaN cost": ({"cost": torch.tensor([[float("nan"), 1.0]])}, "cost contains NaN"),
    "infinite cost": ({"cost": torch.tensor([[float("inf"), 1.0]])}, "cost contains NaN or inf"),
    "vector cost": ({"cost": torch.ones(3)}, "cost must have shape"),
    "empty cost": ({"cost": torch.ones(0, 3)}, "cost is empty"),
    "NaN mass": ({"a": torch.tensor([float("nan")])}, "a contains NaN"),
    "negative mass": ({"b": torch.tensor([1.5, -0.5])}, "b must hold no negative mass"),
    "other totals": ({"a": torch.tensor([1.0]), "b": torch.tensor([0.5, 0.6])}, "same total, got 1 and 1.1"),
    "no mass": ({"a": torch.tensor([0.0]), "b": torch.tensor([0.0, 0.0])}, "some mass"),
    "wrong length": ({"b": torch.ones(3) / 3}, "b must have shape"),
    "wrong batch": ({"b": torch.ones(4, 2) / 2}, "b must broadcast"),
    "k of zero": ({"k": 0}, "k must be at least 1"),
    "negative regularization": ({"regularization": -1.0}, "regularization must be"),
    "other formulation": ({"formulation": "primal"}, "formulation must be"),
    "other solver": ({"solver": "sgd"}, "solver must be"),
    "other gradient": ({"gradient": "unrolled"}, "gradient must be"),
}


@pytest.mark.untyped
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments = {"cost": torch.tensor([[0.5, 1.0]]), "k": 1, **BAD[name][0]}
    with pytest.raises(ValueError, match=BAD[name][1]):
        sparse_ot(**arguments)


@pytest.mark.untyped
@pytest.mark.parametrize("k", [1.5, True, "2"])
def test_a_cap_that_is_no_integer_is_refused(k):
    for call in (
        lambda: sparse_ot(torch.ones(2, 2), k=k),
        lambda: project_topk_simplex(torch.ones(2), k=k),
        lambda: SparseOTLoss(k),
    ):
        with pytest.raises(TypeError, match="k must be an integer"):
            call()


def test_the_loss_is_the_value_reduced_and_trains_what_makes_the_costs():
    points, goal = random(3, 6, 2, seed=1).requires_grad_(), random(6, 2, seed=2)
    cost = (points[:, :, None] - goal).square().sum(-1)
    loss = SparseOTLoss(2, regularization=0.5, reduction="none")
    values = loss(cost)
    torch.testing.assert_close(values, sparse_ot(cost, k=2, regularization=0.5, tolerance=1e-4).value)
    assert torch.equal(SparseOTLoss(2, regularization=0.5)(cost), values.mean())
    assert torch.equal(SparseOTLoss(2, regularization=0.5, reduction="sum")(cost), values.sum())
    loss = SparseOTLoss(6, regularization=0.01, num_iters=40)
    optimizer, history = torch.optim.Adam([points], lr=0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        history.append(loss((points[:, :, None] - goal).square().sum(-1)))
        history[-1].backward()
        optimizer.step()
    assert history[-1] < 0.1 * history[0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    factor=st.sampled_from([0.3, 1.0, 1.25, 4.0]),
    iterations=st.integers(0, 30),
    kind=st.sampled_from(["random", "skewed", "ties", "few levels", "huge"]),
)
def test_no_expert_ever_takes_more_tokens_than_its_capacity(seed, tokens, experts, factor, iterations, kind):
    logits = random(2, tokens, experts, seed=seed).float()
    logits = {
        "random": logits,
        "skewed": logits + 5 * torch.eye(experts)[0],
        "ties": torch.zeros_like(logits),
        "few levels": (2 * logits).round(),
        "huge": 2e4 * (logits - 0.5),
    }[kind]
    router = SparseOTRouter(experts, capacity_factor=factor, num_iters=iterations)
    routing = router(logits)
    capacity = router.capacity(tokens)
    assert capacity == max(1, int(np.ceil(tokens / experts * factor)))
    assert (routing.dispatch.sum(1) <= capacity).all()
    assert torch.equal(routing.load, routing.dispatch.sum(1))
    served = routing.dispatch.any(2).float().mean(1)
    torch.testing.assert_close(routing.unserved, 1 - served)
    torch.testing.assert_close(routing.combine, logits.softmax(-1) * routing.dispatch)


def test_with_slack_every_token_is_served_also_where_the_gate_favours_one_expert():
    logits = torch.randn(20, 64, 8, generator=torch.Generator().manual_seed(0))
    for skew in (0.0, 2.0):
        skewed = logits + skew * torch.eye(8)[0]
        routing = SparseOTRouter(8, capacity_factor=1.5, num_iters=200)(skewed)
        assert routing.unserved.mean() < 0.005
        # Expert choice fills its places whoever is left over, top-1 overfills the favourite.
        choice = torch.zeros_like(skewed).scatter(1, skewed.softmax(-1).topk(12, dim=1).indices, 1.0)
        assert (choice.sum(2) == 0).float().mean() > 10 * routing.unserved.mean()


def test_the_gate_learns_through_the_softmax_of_the_dispatched_only():
    logits = random(16, 4, seed=3).requires_grad_()
    routing = SparseOTRouter(4)(logits)
    (gradient,) = torch.autograd.grad(routing.combine.sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(-1) * routing.dispatch).sum(), logits)
    torch.testing.assert_close(gradient, wanted)
    half = SparseOTRouter(4)(logits.detach().bfloat16())
    assert half.combine.dtype == torch.bfloat16


@pytest.mark.untyped
def test_a_router_refuses_logits_of_another_width_and_settings_that_are_none():
    with pytest.raises(ValueError, match=r"logits must have shape \(..., tokens, 4\)"):
        SparseOTRouter(4)(torch.zeros(8, 3))
    with pytest.raises(ValueError, match="num_experts"):
        SparseOTRouter(0)
    with pytest.raises(TypeError, match="num_experts"):
        SparseOTRouter(2.0)
    with pytest.raises(ValueError, match="capacity_factor"):
        SparseOTRouter(2, capacity_factor=0.0)
    with pytest.raises(ValueError, match="max_iter"):
        SparseOTRouter(2, num_iters=-1)
