"""Partial semi-relaxed transport against POT, closed forms and its own optimality; the pools and the model on top."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimand.stopping import Stop
from minimand.transport import AttentionPool, MassRamp, MeanPool, OTPool, OTSurv, semi_relaxed_partial_ot
from minimand.transport.otsurv import _Distance

EPS, GAMMA = 0.1, 1.0


def costs(instances=30, prototypes=5, *, batch=(), seed=0):
    return torch.rand(*batch, instances, prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(cost, **options):
    found = semi_relaxed_partial_ot(cost, **{"tolerance": 1e-13, "max_iter": 10_000, **options})
    assert found.status in (Stop.CONVERGED, Stop.STALLED)
    return found.plan


def uniform(size):
    return np.full(size, 1 / size)


def test_with_all_mass_the_plan_is_pots_semi_relaxed_one():
    import ot

    cost = costs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ot.unbalanced.sinkhorn_unbalanced(
            uniform(30), uniform(5), cost.numpy(), EPS, (np.inf, GAMMA), reg_type="entropy", numItermax=20_000,
            stopThr=1e-15,
        )  # fmt: skip
    np.testing.assert_allclose(solve(cost).numpy(), theirs, atol=1e-10)


@pytest.mark.parametrize("penalty", [1e8, math.inf])
def test_with_all_mass_and_a_hard_prior_the_plan_is_sinkhorns(penalty):
    import ot

    cost = costs()
    theirs = ot.sinkhorn(uniform(30), uniform(5), cost.numpy(), EPS, stopThr=1e-14, numItermax=20_000)
    np.testing.assert_allclose(solve(cost, usage_penalty=penalty, tolerance=1e-12).numpy(), theirs, atol=1e-9)


def test_masses_and_prior_are_those_that_pot_is_given():
    import ot

    cost, generator = costs(), torch.Generator().manual_seed(1)
    rows, prior = torch.rand(30, generator=generator).double(), torch.rand(5, generator=generator).double()
    a, b = (rows / rows.sum()).numpy(), (prior / prior.sum()).numpy()
    theirs = ot.sinkhorn(a, b, cost.numpy(), EPS, stopThr=1e-14, numItermax=20_000)
    plan = solve(cost, usage_penalty=math.inf, row_mass=rows, prior=prior)
    np.testing.assert_allclose(plan.numpy(), theirs, atol=1e-10)


@pytest.mark.parametrize("penalty", [0.0, 1e-8])
def test_with_all_mass_and_no_prior_the_plan_is_a_softmax_of_each_row(penalty):
    cost = costs()
    expected = torch.softmax(-cost / EPS, 1) / 30
    torch.testing.assert_close(solve(cost, usage_penalty=penalty), expected, atol=1e-8, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    mass=st.floats(0.02, 1.0),
    penalty=st.sampled_from([0.0, 0.1, 1.0, 10.0, math.inf]),
    instances=st.integers(1, 40),
    prototypes=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_exactly_the_asked_mass_moves_and_no_row_gives_more_than_it_has(mass, penalty, instances, prototypes, seed):
    plan = solve(costs(instances, prototypes, seed=seed), mass=mass, usage_penalty=penalty, tolerance=1e-10)
    assert float(plan.sum()) == pytest.approx(mass, abs=1e-8)
    assert float(plan.sum(1).max()) <= 1 / instances + 1e-12
    assert float(plan.min()) >= 0


def objective(plan, cost, mass):
    """The problem of step 4 of the method, with the entropy of what is left over counted in."""
    left = 1 / len(plan) - plan.sum(1)
    whole = torch.cat([plan, left[:, None]], 1)
    used, prior = plan.sum(0), mass / plan.shape[1]
    divergence = (used * (used / prior).log() - used + prior).sum()
    return (cost * plan).sum() + GAMMA * divergence + EPS * (whole * (whole.log() - 1)).sum()


@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_no_exchange_of_mass_between_two_rows_and_columns_lowers_the_objective(mass):
    cost = costs()
    plan = solve(cost, mass=mass)
    best = objective(plan, cost, mass)
    generator = np.random.default_rng(0)
    for _ in range(200):
        (i, j), (k, m) = generator.choice(30, 2, replace=False), generator.choice(6, 2, replace=False)
        whole = torch.cat([plan, (1 / 30 - plan.sum(1))[:, None]], 1)
        amount = generator.uniform(0.01, 0.5) * float(torch.minimum(whole[i, k], whole[j, m]))
        whole[i, k] -= amount
        whole[i, m] += amount
        whole[j, m] -= amount
        whole[j, k] += amount
        assert objective(whole[:, :5], cost, mass) > best


def test_no_change_of_the_prototypes_use_lowers_the_objective():
    cost = costs()
    plan = solve(cost, mass=0.5)
    best = objective(plan, cost, 0.5)
    for i in range(5):
        for k in range(5):
            changed = plan.clone()
            amount = 0.05 * float(changed[i, k])
            changed[i, k] -= amount
            changed[i, (k + 1) % 5] += amount
            assert objective(changed, cost, 0.5) > best


@pytest.mark.parametrize("mass", [0.2, 1.0])
def test_equal_costs_move_equal_masses(mass):
    plan = solve(torch.full((7, 3), 0.4, dtype=torch.float64), mass=mass)
    torch.testing.assert_close(plan, torch.full_like(plan, mass / 21))


def test_the_use_of_prototypes_rises_from_collapse_to_even_with_the_penalty():
    tokens = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double() * 3
    tokens[0] = 0  # one near the data's mean takes all
    points = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)).double() * 0.5
    cost = torch.cdist(points, tokens)
    cost = cost / cost.max()
    entropies = []
    for penalty in (1e-8, 0.1, 1.0, 10.0, 1e8):
        used = solve(cost, usage_penalty=penalty, tolerance=1e-10).sum(0)
        entropies.append(float(-(used * used.log()).sum()))
    assert entropies == sorted(entropies)
    assert entropies[-1] == pytest.approx(math.log(6), abs=1e-6)
    assert entropies[0] < 0.5 * entropies[-1]


def test_rows_that_fit_nothing_move_little_of_their_mass():
    cost = costs(200)
    moved = solve(cost, mass=0.3).sum(1)
    assert float(torch.corrcoef(torch.stack([moved, cost.amin(1)]))[0, 1]) < -0.7


@pytest.mark.parametrize("penalty", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("mass", [0.3, 1.0])
def test_the_gradient_is_the_exact_solutions(penalty, mass):
    cost = costs(6, 3, batch=(2,)).requires_grad_()
    rows, prior = costs(2, 6, seed=1).add(0.1).requires_grad_(), costs(2, 3, seed=2).add(0.1).requires_grad_()

    def plan(cost, rows, prior):
        return solve(cost, mass=mass, usage_penalty=penalty, row_mass=rows, prior=prior, tolerance=1e-14)

    assert torch.autograd.gradcheck(plan, (cost, rows, prior), atol=1e-6)


def test_the_gradient_is_that_of_unrolled_scaling():
    cost = costs(12, 4).requires_grad_()
    pull = costs(12, 4, seed=3)
    (ours,) = torch.autograd.grad((solve(cost, mass=0.6) * pull).sum(), cost)
    kernel = torch.exp(-torch.cat([cost, torch.zeros(12, 1).double()], 1) / EPS)
    target = torch.tensor([0.15] * 4 + [0.4], dtype=torch.float64)
    power = torch.tensor([GAMMA / (GAMMA + EPS)] * 4 + [1.0], dtype=torch.float64)
    v = torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(1200):
        u = 1 / 12 / (kernel @ v)
        v = (target / (kernel.mT @ u)) ** power
    plan = (u[:, None] * kernel * v)[:, :4]
    (theirs,) = torch.autograd.grad((plan * pull).sum(), cost)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_bags_of_a_batch_do_not_see_each_other_nor_their_padding():
    short, long = costs(9, 4), costs(14, 4, seed=1)
    padded = torch.full((2, 14, 4), math.nan, dtype=torch.float64)
    padded[0, :9], padded[1] = short, long
    mask = torch.arange(14)[None] < torch.tensor([[9], [14]])
    plan = solve(padded, mass=0.4, mask=mask)
    torch.testing.assert_close(plan[0, :9], solve(short, mass=0.4), atol=1e-12, rtol=0)
    torch.testing.assert_close(plan[1], solve(long, mass=0.4), atol=1e-12, rtol=0)
    assert float(plan[0, 9:].abs().max()) == 0


def test_a_row_without_mass_moves_none():
    cost = costs(5, 3)
    rows = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).double()
    plan = solve(cost, mass=0.5, row_mass=rows)
    keep = rows > 0
    torch.testing.assert_close(plan[keep], solve(cost[keep], mass=0.5))
    assert float(plan[1].abs().max()) == 0


@pytest.mark.parametrize("mass", [0.05, 0.5, 1.0])
def test_small_regularization_does_not_overflow(mass):
    found = semi_relaxed_partial_ot(costs(), mass=mass, regularization=1e-2)
    assert found.status is Stop.CONVERGED
    assert float(found.plan.sum()) == pytest.approx(mass, abs=1e-8)


def test_a_problem_too_sharp_for_its_sweeps_says_how_far_it_came():
    found = semi_relaxed_partial_ot(costs(), mass=0.5, regularization=1e-4, max_iter=300)
    assert found.status is Stop.ITERATION_LIMIT
    assert found.iterations == 300
    left = 1 - float(found.plan.sum())
    assert abs(math.log(left / 0.5)) <= found.residual * (1 + 1e-9)


def test_a_prototype_that_no_instance_comes_near_does_not_break_the_solver():
    cost = costs(20, 3)
    cost[:, 2] = 500.0
    plan = solve(cost, usage_penalty=math.inf)
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_plans_come_back_in_their_dtype_near_the_exact_one(dtype):
    cost = costs(500, 8).to(dtype)
    found = semi_relaxed_partial_ot(cost, mass=0.1)
    assert found.plan.dtype == dtype
    assert found.status is Stop.CONVERGED
    exact = solve(cost.double(), mass=0.1)
    rounding = 5e-5 if dtype == torch.float32 else 1e-2
    assert float((found.plan.double() - exact).abs().max()) <= rounding * float(exact.max())


def test_a_tolerance_below_rounding_ends_as_stalled_not_at_the_limit():
    found = semi_relaxed_partial_ot(costs(500, 8).float(), mass=0.1, tolerance=0.0, max_iter=100_000)
    assert found.status is Stop.STALLED
    assert found.iterations < 1000


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": 0.0}, "mass must lie in"),
        ({"mass": 1.5}, "mass must lie in"),
        ({"mass": math.nan}, "mass must lie in"),
        ({"regularization": 0.0}, "regularization must be"),
        ({"usage_penalty": -1.0}, "usage_penalty must be"),
        ({"usage_penalty": math.nan}, "usage_penalty must be"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"row_mass": torch.tensor([1.0, -1.0, 1.0])}, "row_mass must be finite and not negative"),
        ({"row_mass": torch.tensor([1.0, math.nan, 1.0])}, "row_mass must be finite"),
        ({"row_mass": torch.zeros(3)}, "bag 0 is empty"),
        ({"row_mass": torch.ones(2)}, "one number for each row"),
        ({"prior": torch.tensor([1.0, 0.0])}, "prior must be finite and above 0"),
        ({"prior": torch.ones(3)}, "prior must have shape"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, "bag 0 is empty"),
        ({"mask": torch.ones(3)}, "one boolean for each row"),
        ({"cost": torch.full((3, 2), math.inf)}, "cost contains NaN or infinity"),
        ({"cost": torch.ones(3)}, "cost must have shape"),
        ({"cost": torch.ones(0, 2)}, "cost is empty"),
        ({"max_iter": -1}, "max_iter must be"),
    ],
)
def test_what_makes_no_transport_problem_is_refused(change, message):
    arguments = {"cost": torch.ones(3, 2), **change}
    with pytest.raises(ValueError, match=message):
        semi_relaxed_partial_ot(arguments.pop("cost"), **arguments)


def test_the_ramp_rises_as_written_and_is_whole_from_its_crossing_on():
    ramp = MassRamp(1000)
    expected = [math.exp(-5 * (1 - t / 1000) ** 2) + 0.1 for t in (0, 250, 500, 750)]
    assert [ramp(t) for t in (0, 250, 500, 750)] == pytest.approx(expected, abs=1e-12)
    assert [round(value, 3) for value in expected] == [0.107, 0.16, 0.387, 0.832]
    crossing = 1000 * (1 - math.sqrt(-math.log(0.9) / 5))
    assert crossing == pytest.approx(854.8, abs=0.05)
    assert ramp(math.floor(crossing)) < 1 == ramp(math.ceil(crossing)) == ramp(5000)
    linear = MassRamp(100, base=0.2, upper=0.5, kind="linear")
    assert [linear(t) for t in (0, 50, 100, 200)] == pytest.approx([0.2, 0.45, 0.7, 0.7])


@pytest.mark.parametrize("shift", [True, False])
def test_distances_are_euclidean_after_the_shift_with_their_gradient(shift):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    moved = [x - x.amin(-1, keepdim=True) if shift else x for x in (points, tokens)]
    torch.testing.assert_close(_Distance.apply(points, tokens, shift), torch.cdist(*moved))
    assert torch.autograd.gradcheck(lambda a, b: _Distance.apply(a, b, shift), (points, tokens))


def test_the_gradient_is_finite_where_an_instance_is_a_prototype():
    pool = OTPool(3, num_prototypes=2, shift=False).double()
    points = pool.prototypes.detach()[None].repeat(1, 2, 1).requires_grad_()
    pool(points)[0].sum().backward()
    assert torch.isfinite(points.grad).all()
    assert torch.isfinite(pool.prototypes.grad).all()


def test_the_pool_is_the_mixture_of_what_each_prototype_pools():
    torch.manual_seed(0)
    pool, points = OTPool(6, num_prototypes=4, mass=0.4).double(), torch.randn(2, 20, 6).double()
    pooled = pool.plan(points).mT @ points  # (batch, prototypes, dim)
    mixed = pool.mixing(pooled.mT)[..., 0]
    embedding, weights = pool(points)
    torch.testing.assert_close(embedding, mixed)
    assert weights.shape == (2, 20)
    torch.testing.assert_close(pool.plan(points).sum((1, 2)), torch.ones(2).double())


def test_the_share_of_mass_is_the_layers_in_training_and_its_own_in_evaluation():
    torch.manual_seed(0)
    pool, points = OTPool(6, num_prototypes=4, eval_mass=0.3).double(), torch.randn(1, 20, 6).double()
    pool.set_mass(0.3)
    trained = pool(points)[0]
    pool.set_mass(0.9)
    assert not torch.allclose(pool(points)[0], trained)
    torch.testing.assert_close(pool.eval()(points)[0], trained, atol=1e-5, rtol=0)  # the buffer is in single precision
    assert float(OTPool(2).state_dict()["mass"]) == 1


def test_at_full_mass_every_instance_moves_the_same():
    torch.manual_seed(0)
    pool = OTPool(6, num_prototypes=4).double()
    torch.testing.assert_close(pool.plan(torch.randn(1, 20, 6).double()).sum(2), torch.full((1, 20), 0.05).double())


def model(pool=None, *, num_bins=None):
    torch.manual_seed(1)
    pool = OTPool(8, num_prototypes=4, eval_mass=0.4) if pool is None else pool
    return OTSurv(5, dim=8, pool=pool, num_bins=num_bins).double().eval()


POOLS = {
    "transport": lambda: OTPool(8, num_prototypes=4, eval_mass=0.4),
    "mean": MeanPool,
    "attention": lambda: AttentionPool(8, hidden=4),
}


@pytest.mark.parametrize("pool", POOLS)
def test_the_order_of_instances_and_padding_do_not_change_the_risk(pool):
    bags = torch.randn(2, 12, 5, dtype=torch.float64)
    net = model(POOLS[pool]())
    order = torch.randperm(12)
    torch.testing.assert_close(net(bags), net(bags[:, order]), atol=1e-10, rtol=0)
    torch.testing.assert_close(net.attribution(bags)[:, order], net.attribution(bags[:, order]), atol=1e-10, rtol=0)
    padded = torch.cat([bags, torch.full((2, 3, 5), math.nan, dtype=torch.float64)], 1)
    mask = torch.arange(15).expand(2, 15) < 12
    torch.testing.assert_close(net(padded, mask), net(bags), atol=1e-10, rtol=0)
    assert float(net.attribution(padded, mask)[:, 12:].detach().abs().max()) == 0
    net(padded, mask).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_the_order_of_prototypes_does_not_change_the_risk():
    bags, net = torch.randn(2, 12, 5, dtype=torch.float64), model()
    before, order = net(bags), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        net.pool.prototypes.copy_(net.pool.prototypes[order].clone())
        net.pool.mixing.weight.copy_(net.pool.mixing.weight[:, order].clone())
    torch.testing.assert_close(net(bags), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("num_bins", [None, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_the_heat_map_adds_up_to_the_score(pool, num_bins):
    bags = torch.randn(2, 12, 5, dtype=torch.float64)
    net = model(POOLS[pool](), num_bins=num_bins)
    torch.testing.assert_close(net.attribution(bags).sum(1) + net.baseline, net(bags))


def test_gradients_of_the_whole_model_are_exact():
    net = model(OTPool(8, num_prototypes=3, mass=0.5, eval_mass=0.5))
    bags = torch.randn(1, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (bags,), atol=1e-5)


def test_attention_is_a_softmax_of_gated_scores():
    pool, points = AttentionPool(3, hidden=2), torch.randn(1, 4, 3)
    gated = torch.tanh(pool.content(points)) * torch.sigmoid(pool.gate(points))
    torch.testing.assert_close(pool.weights(points), (gated @ pool.score.weight[0] + pool.score.bias).softmax(1))


def test_the_mean_of_a_ragged_bag_is_over_its_own_instances():
    points, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    embedding, _ = MeanPool()(points, mask)
    torch.testing.assert_close(embedding, torch.stack([points[0, :2].mean(0), points[1].mean(0)]))


def test_running_out_of_sweeps_is_told():
    pool = OTPool(8, num_prototypes=4, mass=0.2, num_iters=1)
    with pytest.warns(RuntimeWarning, match="after 1 sweeps"):
        pool(torch.randn(1, 50, 8))


@pytest.mark.untyped
def test_bags_that_cannot_be_pooled_are_refused():
    net = model()
    good = torch.randn(2, 12, 5, dtype=torch.float64)
    bad = good.clone()
    bad[1, 3, 2] = math.nan
    for bags, mask, message in (
        (bad, None, "NaN"),
        (good[0], None, "must have shape"),
        (good[..., :4], None, r"\(batch, instances, 5\)"),
        (good[:, :0], None, "empty"),
        (good, torch.tensor([[True] * 12, [False] * 12]), "bag 1 is empty"),
        (good, torch.ones(2, 12), "booleans"),
    ):
        with pytest.raises(ValueError, match=message):
            net(bags, mask)
    with pytest.raises(ValueError, match="mass must lie in"):
        net.pool.set_mass(0.0)
    for arguments in ({"dropout": 1.0}, {"dim": 0}, {"num_bins": -1}):
        with pytest.raises(ValueError, match="must"):
            OTSurv(5, **arguments)


def test_training_by_cox_finds_the_bags_that_die_early():
    from minimand.losses import CoxPHLoss
    from minimand.survival import concordance_index

    torch.manual_seed(0)
    signal = torch.rand(40)
    bags = torch.randn(40, 30, 5)
    bags[..., 0] += torch.where(torch.arange(30) < 30 * signal[:, None], 3.0, 0.0)
    time, event = torch.exp(-3 * signal), torch.ones(40, dtype=torch.bool)
    net = OTSurv(5, dim=8, pool=OTPool(8, num_prototypes=4), dropout=0.0)
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=1e-2), CoxPHLoss()
    for _ in range(60):
        optimizer.zero_grad()
        loss(net(bags), time, event).backward()
        optimizer.step()
    assert float(concordance_index(net.eval()(bags).detach(), time, event)) > 0.9


@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_is_near_double(pool):
    net, bags = model(POOLS[pool]()), torch.randn(2, 40, 5, dtype=torch.float64)
    exact = net(bags).detach()
    half = net.bfloat16()(bags.bfloat16())
    half.sum().backward()
    assert half.dtype == torch.bfloat16
    assert float((half.detach().double() - exact).abs().max()) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_it_moves_and_saves_like_any_module():
    net = model()
    other = model(OTPool(8, num_prototypes=4, eval_mass=0.4))
    with torch.no_grad():
        for parameter in other.parameters():
            nn.init.normal_(parameter)
    net.pool.set_mass(0.25)
    other.load_state_dict(net.state_dict())
    bags = torch.randn(2, 12, 5, dtype=torch.float64)
    torch.testing.assert_close(other(bags), net(bags))
    assert float(other.pool.mass) == 0.25
