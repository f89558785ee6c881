"""Optimistic mirror descent: regret bounds that hold for every sequence of gradients, and the laws of its steps."""

import copy
import itertools
import math

import pytest
import scipy.optimize
import torch
from torch import nn

from minimand import optim
from minimand.optim import FollowState, MirrorState, NewtonState, OptimisticMirrorDescent
from minimand.projections import Ball, Box, Simplex

STREAMS, ROUNDS, DIM, G = 1000, 60, 4, 2.0
SLACK = 1e-9
DOMAINS = {"ball": (Ball(1.5), 3.0), "box": (Box(-1.0, 0.5), 3.0), "simplex": (Simplex(2.0), 2 * math.sqrt(2))}


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def short(vectors, bound=G):
    """Scale vectors down to the promised norm."""
    return vectors * (bound / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)).clamp_max(1)


# Name to a gradient ``(round, point, last gradient) -> gradient``, all of norm at most G.
ADVERSARIES = {
    "random": lambda t, x, last: short(normals(*x.shape, seed=t)),
    "constant": lambda t, x, last: short(normals(*x.shape)),
    "against the point": lambda t, x, last: short(10 * x + 0.1 * normals(*x.shape, seed=t)),
    "against the hint": lambda t, x, last: short(-10 * last + 0.1 * normals(*x.shape, seed=t)),
    "blocks": lambda t, x, last: (-1) ** (t // 7) * short(normals(*x.shape)),
    "bursts": lambda t, x, last: short(normals(*x.shape, seed=t)) * (uniforms(*x.shape[:-1], 1, seed=t) < 0.2),
}


def start(domain, streams=STREAMS, dim=DIM):
    if isinstance(domain, Simplex):
        return torch.full((streams, dim), domain.total / dim, dtype=torch.float64)
    return torch.zeros(streams, dim, dtype=torch.float64)


def inside(domain, seed, streams=STREAMS, dim=DIM):
    """Draw points of the domain: corners and inner points."""
    far = 10.0 ** (2 * uniforms(streams, 1, seed=seed) - 1) * normals(streams, dim, seed=seed + 1)
    if isinstance(domain, Ball):
        return short(far, domain.radius)
    return domain(far)


def best(domain, gradients):
    """Return the comparator that makes the linear regret largest."""
    total = gradients.sum(0)
    if isinstance(domain, Ball):
        return -domain.radius * nn.functional.normalize(total, dim=-1)
    if isinstance(domain, Box):
        return torch.where(total > 0, domain.low, domain.high).double()
    return domain.total * nn.functional.one_hot(total.argmin(-1), total.shape[-1]).double()


def comparators(domain, gradients):
    return [best(domain, gradients), *(inside(domain, seed) for seed in (10, 20, 30))]


def play(step, state, adversary, rounds=ROUNDS):
    """Play, and return the points, the gradients and the last state."""
    points, gradients, last = [], [], torch.zeros_like(state.point)
    for t in range(rounds):
        last = adversary(t, state.point, last)
        points.append(state.point)
        gradients.append(last)
        state = step(t, state, last)
    return torch.stack(points), torch.stack(gradients), state


def variations(gradients):
    before = torch.cat([torch.zeros_like(gradients[:1]), gradients[:-1]])
    return (gradients - before).square().sum(-1)


def regret(points, gradients, comparator):
    return (gradients * (points - comparator)).sum((0, -1))


def below(small, large):
    return bool((small <= large + SLACK * (1 + large.abs())).all())


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_convex_regret_never_exceeds_its_bound_whatever_the_gradients(domain, adversary):
    """A thousand streams a case, the worst comparator among them; the closed form with 3/2 where the paper has 5/2."""
    domain, diameter = DOMAINS[domain]
    points, gradients, state = play(
        lambda t, state, g: optim.optimistic_step(state, g, diameter=diameter, domain=domain, grad_bound=G, eps=1e-8),
        MirrorState.at(start(domain)),
        ADVERSARIES[adversary],
    )
    total = variations(gradients).sum(0)
    earlier = variations(gradients)[:-1].sum(0)
    assert torch.allclose(state.variation, total)
    closed = diameter / 2 * (1e-8 + 4 * G**2 + earlier).sqrt() + diameter * total.sqrt()
    for comparator in comparators(domain, gradients):
        assert below(regret(points, gradients, comparator), state.regret_bound(diameter=diameter))
    assert below(state.regret_bound(diameter=diameter), closed)
    assert below(closed, 1.5 * diameter * (1e-8 + 4 * G**2 + total).sqrt())


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_strongly_convex_regret_is_at_most_the_sum_of_variations_over_rounds(domain, adversary):
    """Less the curvature's share, regret is at most sum v_t / (lambda t): no diameter, half the paper's constant."""
    domain, diameter = DOMAINS[domain]
    curvature = 0.7
    points, gradients, state = play(
        lambda t, state, g: optim.optimistic_step(
            state, g, diameter=diameter, domain=domain, strong_convexity=curvature
        ),
        MirrorState.at(start(domain)),
        ADVERSARIES[adversary],
    )
    times = torch.arange(1, ROUNDS + 1, dtype=torch.float64)[:, None]
    closed = (variations(gradients) / times).sum(0) / curvature
    assert torch.allclose(state.regret_bound(diameter=diameter), closed, rtol=1e-9)
    for comparator in comparators(domain, gradients):
        gap = (points - comparator).square().sum((0, -1))
        assert below(regret(points, gradients, comparator) - curvature / 2 * gap, closed)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize(("curvature", "scale"), [(0.03, 1.0), (2.0, 1.0), (1.0, 0.01)])
def test_exp_concave_regret_never_exceeds_its_bound_whatever_the_gradients(adversary, curvature, scale):
    domain, streams, rounds = Ball(1.5), 250, 40
    settings = {"grad_bound": G, "curvature": curvature}
    inverses = []

    def step(t, state, gradient):
        inverses.append(state.inverse)
        return optim.optimistic_newton_step(state, gradient, domain=domain, **settings)

    begin = NewtonState.at(start(domain, streams), scale=scale, **settings)
    points, gradients, state = play(step, begin, ADVERSARIES[adversary], rounds)
    bound = state.regret_bound(diameter=3.0)
    steps = gradients.diff(dim=0, prepend=torch.zeros_like(gradients[:1]))
    stability = torch.einsum("tsi,tsij,tsj->s", steps, torch.stack(inverses), steps)
    assert torch.allclose(bound, 4.5 * (scale + curvature * G**2 / 2) + 1.5 * stability)
    logarithm = 12 * DIM / curvature * torch.log1p(curvature * variations(gradients).sum(0) / (8 * DIM * scale))
    assert below(1.5 * stability, logarithm)
    for comparator in [best(domain, gradients), *(inside(domain, seed, streams) for seed in (10, 20, 30))]:
        bent = (gradients * (points - comparator)).sum(-1).square().sum(0)
        assert below(regret(points, gradients, comparator) - curvature / 2 * bent, bound)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("uniform", [True, False])
def test_entropic_regret_never_exceeds_its_bound_whatever_the_gradients(adversary, uniform):
    domain = Simplex(2.0)
    begin = start(domain) if uniform else 2 * (2 * normals(STREAMS, DIM)).softmax(-1)
    points, gradients, state = play(
        lambda t, state, g: optim.optimistic_entropic_step(state, g, total=2.0, grad_bound=G),
        FollowState.on_simplex(begin),
        ADVERSARIES[adversary],
    )
    bound = state.entropic_regret_bound()
    for comparator in comparators(domain, gradients):
        assert below(regret(points, gradients, comparator), bound)
    size = (2.0 / begin).log().amax(-1)
    largest = gradients.diff(dim=0, prepend=torch.zeros_like(gradients[:1])).abs().amax(-1).square() * domain.total**2
    root = (1e-8 + 4 * (G * domain.total) ** 2 + largest[:-1].sum(0)).sqrt()
    assert below(bound, size.sqrt() * (root + largest.sum(0).sqrt()))


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_ftrl_regret_never_exceeds_its_bound_whatever_the_gradients(domain, adversary):
    domain, diameter = DOMAINS[domain]
    points, gradients, state = play(
        lambda t, state, g: optim.optimistic_ftrl_step(state, g, diameter=diameter, domain=domain, grad_bound=G),
        FollowState.at(start(domain)),
        ADVERSARIES[adversary],
    )
    total, earlier = variations(gradients).sum(0), variations(gradients)[:-1].sum(0)
    bound = state.regret_bound(diameter=diameter)
    assert below(bound, diameter / 2 * (1e-8 + 4 * G**2 + earlier).sqrt() + diameter * total.sqrt())
    for comparator in comparators(domain, gradients):
        assert below(regret(points, gradients, comparator), bound)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("drift", [0.0, 0.05, 1.0])
def test_ensemble_dynamic_regret_never_exceeds_its_bound_whatever_the_gradients(adversary, drift):
    domain, diameter, streams = Ball(1.5), 3.0, 200
    settings = {"diameter": diameter, "grad_bound": G, "smoothness": 0.5}
    sizes = optim.ensemble_step_sizes(ROUNDS, **settings)
    points, gradients, state = play(
        lambda t, state, g: optim.ensemble_step(state, g, step_sizes=sizes, domain=domain, **settings),
        optim.EnsembleState.at(start(domain, streams), learners=len(sizes)),
        ADVERSARIES[adversary],
    )
    # Comparators walk at random, or towards where each round's loss is least.
    walk = normals(ROUNDS, streams, DIM, seed=5).cumsum(0) * drift + inside(domain, 3, streams)
    for path in (walk, walk - 50 * drift * gradients):
        path = short(path, domain.radius)
        length = torch.linalg.vector_norm(path.diff(dim=0), dim=-1).sum(0)
        bound = state.regret_bound(step_sizes=sizes, diameter=diameter, smoothness=0.5, path_length=length)
        assert below(regret(points, gradients, path), bound)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_bounds_hold_under_any_schedule_of_learning_rates(adversary):
    domain, diameter = DOMAINS["simplex"]
    ensemble = {"diameter": diameter, "grad_bound": G, "smoothness": 0.5, "step_sizes": torch.tensor([0.1, 0.3])}
    steps = {
        "convex": (
            lambda s, g, lr: optim.optimistic_step(s, g, diameter=diameter, domain=domain, lr=lr),
            MirrorState.at,
            lambda s: s.regret_bound(diameter=diameter),
            0.0,
        ),
        "strongly convex": (
            lambda s, g, lr: optim.optimistic_step(s, g, diameter=diameter, domain=domain, strong_convexity=1.0, lr=lr),
            MirrorState.at,
            lambda s: s.regret_bound(diameter=diameter),
            1.0,
        ),
        "entropic": (
            lambda s, g, lr: optim.optimistic_entropic_step(s, g, total=2.0, lr=lr),
            FollowState.on_simplex,
            lambda s: s.entropic_regret_bound(),
            0.0,
        ),
        "ftrl": (
            lambda s, g, lr: optim.optimistic_ftrl_step(s, g, diameter=diameter, domain=domain, lr=lr),
            FollowState.at,
            lambda s: s.regret_bound(diameter=diameter),
            0.0,
        ),
        "ensemble": (
            lambda s, g, lr: optim.ensemble_step(s, g, domain=domain, lr=lr, **ensemble),
            lambda x: optim.EnsembleState.at(x, learners=2),
            lambda s: s.regret_bound(step_sizes=ensemble["step_sizes"], diameter=diameter, smoothness=0.5),
            0.0,
        ),
    }
    rates = 10.0 ** (4 * uniforms(ROUNDS, seed=9) - 2)
    for name, (step, begin, bound, curvature) in steps.items():
        points, gradients, state = play(
            lambda t, state, g, step=step: step(state, g, float(rates[t])),
            begin(start(domain, 200)),
            ADVERSARIES[adversary],
        )
        for comparator in (best(domain, gradients), inside(domain, 10, 200)):
            gap = (points - comparator).square().sum((0, -1))
            assert below(regret(points, gradients, comparator) - curvature / 2 * gap, bound(state)), name


def test_bounds_hold_for_gradients_that_outgrow_all_before():
    """Without a promise the step follows the largest norm so far, and the account stays true."""
    domain, diameter = DOMAINS["ball"]
    growing = lambda t, x, last: 1.3**t * short(normals(*x.shape, seed=t) * (t > 3))  # noqa: E731
    points, gradients, state = play(
        lambda t, state, g: optim.optimistic_step(state, g, diameter=diameter, domain=domain),
        MirrorState.at(start(domain)),
        growing,
    )
    assert below(regret(points, gradients, best(domain, gradients)), state.regret_bound(diameter=diameter))


def test_the_account_charges_for_growth_of_one_over_the_step_that_curvature_does_not_pay():
    rates = [1.0, 0.25, 4.0, 0.5, 0.1]
    state, sizes = MirrorState.at(torch.zeros(2, dtype=torch.float64)), [2 * rates[0] / 0.6]
    for t, rate in enumerate(rates):
        gradient = torch.ones(2, dtype=torch.float64)
        state = optim.optimistic_step(state, gradient, diameter=3.0, strong_convexity=0.6, lr=rate)
        sizes.append(2 * rate / (0.6 * (t + 2)))
    inverse = [1 / size for size in sizes[:-1]]
    growth = [after - before - min(0.3, after / 2) for before, after in itertools.pairwise(inverse)]
    ascent = sum(max(0.0, one) for one in growth)  # the curvature pays for the first step
    assert ascent > 1
    assert float(state.ascent) == pytest.approx(ascent)
    assert float(state.regret_bound(diameter=3.0)) == pytest.approx(4.5 * ascent + sizes[0])  # v_1 is 2, then 0


def test_steps_without_a_promise_do_not_depend_on_the_unit_of_the_loss():
    domain, diameter = DOMAINS["ball"]

    def points(unit):
        return play(
            lambda t, state, g: optim.optimistic_step(state, unit * g, diameter=diameter, domain=domain, eps=1e-30),
            MirrorState.at(start(domain, 20)),
            ADVERSARIES["bursts"],
        )[0]

    assert torch.allclose(points(1.0), points(1e6), atol=1e-12)


def test_the_step_size_of_a_round_is_that_of_the_variation_before_it():
    gradients = [torch.tensor(g, dtype=torch.float64) for g in ([3.0, 4.0], [0.0, 1.0], [2.0, -1.0])]
    state = MirrorState.at(torch.zeros(2, dtype=torch.float64))
    variation = 0.0
    anchor = torch.zeros(2, dtype=torch.float64)
    hint = torch.zeros(2, dtype=torch.float64)
    for gradient in gradients:
        size = 2.0 / math.sqrt(0.5 + 4 * 25 + variation)
        assert torch.allclose(state.point, anchor - size * hint, atol=1e-15)
        state = optim.optimistic_step(state, gradient, diameter=2.0, grad_bound=5.0, eps=0.5)
        anchor = anchor - size * gradient
        assert torch.allclose(state.anchor, anchor, atol=1e-15)
        variation += float((gradient - hint).square().sum())
        hint = gradient


def test_without_a_promise_the_step_follows_the_largest_norm_so_far_and_the_first_sees_its_own():
    """After rounds without gradient, in which every step would have stayed at the start, the first may still choose."""
    norms = [0.0, 0.0, 3.0, 1.0, 5.0, 2.0]
    state, largest, variation, before, sizes = MirrorState.at(torch.zeros(1, dtype=torch.float64)), 0.0, 0.0, 0.0, []
    for norm in norms:
        sizes.append(2.0 / math.sqrt(0.1 + 4 * (largest or norm) ** 2 + variation))
        largest, variation, before = max(largest, norm), variation + (norm - before) ** 2, norm
        state = optim.optimistic_step(state, torch.tensor([norm], dtype=torch.float64), diameter=2.0, eps=0.1)
        assert float(state.inverse_step) == pytest.approx(1 / sizes[-1])
    anchor = -sum(size * norm for size, norm in zip(sizes, norms, strict=True))
    assert float(state.anchor) == pytest.approx(anchor)


def test_constant_gradients_leave_the_step_alone_and_the_regret_bounded():
    gradient = nn.functional.normalize(normals(10), dim=-1)
    regrets, sizes, state = [0.0], [], MirrorState.at(torch.zeros(10, dtype=torch.float64))
    for _ in range(600):
        regrets.append(regrets[-1] + float(gradient @ state.point) + 1.0)
        state = optim.optimistic_step(state, gradient, diameter=2.0, domain=Ball(1.0), grad_bound=1.0, eps=1e-8)
        sizes.append(float(state.step_size))
    assert float(state.variation) == pytest.approx(1.0)
    assert len(set(sizes)) == 1
    assert regrets[-1] == pytest.approx(regrets[20], abs=1e-9)
    assert regrets[-1] < 2.0


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_unconstrained_steps_are_the_optimistic_gradient_form(adversary):
    sizes = []

    def step(t, state, gradient):
        after = optim.optimistic_step(state, gradient, diameter=2.0, grad_bound=G)
        sizes.append(after.inverse_step.reciprocal()[:, None])
        return after

    points, gradients, state = play(step, MirrorState.at(start(None, 20)), ADVERSARIES[adversary])
    sizes.append(state.step_size[:, None])
    points, before = [*points, state.point], torch.zeros_like(gradients[0])
    for t, gradient in enumerate(gradients):
        ahead = points[t] - (sizes[t] + sizes[t + 1]) * gradient + sizes[t] * before
        assert torch.allclose(points[t + 1], ahead, atol=1e-12)
        before = gradient


def test_where_the_hint_is_zero_the_point_is_its_anchor():
    state = MirrorState.at(start(None, 20))
    for t in range(6):
        gradient = short(normals(20, DIM, seed=t)) * (t % 2 == 0)
        state = optim.optimistic_step(state, gradient, diameter=2.0, grad_bound=G)
        assert torch.equal(state.point, state.anchor) == (t % 2 == 1)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_point_is_no_farther_from_the_next_anchor_than_the_step_times_the_surprise(adversary):
    domain, diameter = DOMAINS["box"]
    state, last = MirrorState.at(start(domain, 100)), torch.zeros(100, DIM, dtype=torch.float64)
    for t in range(ROUNDS):
        gradient = ADVERSARIES[adversary](t, state.point, last)
        after = optim.optimistic_step(state, gradient, diameter=diameter, domain=domain, grad_bound=G)
        moved = torch.linalg.vector_norm(state.point - after.anchor, dim=-1)
        assert below(moved, torch.linalg.vector_norm(gradient - last, dim=-1) / after.inverse_step)
        state, last = after, gradient


def test_last_iterates_of_a_saddle_game_converge_where_gradient_descent_spirals_out():
    x = y = torch.ones(1, dtype=torch.float64)
    players = [optim.EnsembleState.at(x, learners=1), optim.EnsembleState.at(y, learners=1)]
    plain = [1.0, 1.0]
    settings = {"step_sizes": torch.tensor([0.2]), "diameter": 4.0, "grad_bound": 2.0, "smoothness": 1.0}
    for _ in range(600):
        x, y = players[0].point, players[1].point
        players = [optim.ensemble_step(one, g, **settings) for one, g in zip(players, (y, -x), strict=True)]
        plain = [plain[0] - 0.2 * plain[1], plain[1] + 0.2 * plain[0]]
    assert float(players[0].point.abs() + players[1].point.abs()) < 1e-4
    assert abs(plain[0]) + abs(plain[1]) > 100


# The quadratic map


def test_in_one_dimension_the_quadratic_map_is_a_step_of_one_over_h():
    settings = {"grad_bound": 2.0, "curvature": 0.3}
    state = NewtonState.at(torch.zeros(1, dtype=torch.float64), **settings)
    metric, anchor, point = 1 + 0.3 * 4 / 2, 0.0, 0.0
    for gradient in 2 * uniforms(30) - 1:
        assert float(state.point) == pytest.approx(point, abs=1e-12)
        state = optim.optimistic_newton_step(state, gradient[None], domain=Ball(0.5), **settings)
        anchor = max(-0.5, min(0.5, anchor - float(gradient) / metric))
        metric += 0.15 * float(gradient) ** 2
        point = max(-0.5, min(0.5, anchor - float(gradient) / metric))
        assert float(state.metric) == pytest.approx(metric, abs=1e-12)


def test_the_metric_grows_by_half_beta_times_the_gradients_square_and_keeps_its_inverse():
    settings = {"grad_bound": G, "curvature": 0.3}
    state = NewtonState.at(start(None, 20), **settings)
    for t in range(ROUNDS):
        gradient = short(normals(20, DIM, seed=t))
        after = optim.optimistic_newton_step(state, gradient, **settings)
        assert torch.allclose(after.metric - state.metric, 0.15 * torch.einsum("si,sj->sij", gradient, gradient))
        assert torch.equal(after.metric, after.metric.mT)
        state = after
    identity = torch.eye(DIM, dtype=torch.float64).expand(20, DIM, DIM)
    assert torch.allclose(state.metric @ state.inverse, identity, atol=1e-12)


def test_in_single_precision_the_inverse_stays_one_over_thousands_of_rounds():
    settings = {"grad_bound": G, "curvature": 0.3}
    state = NewtonState.at(torch.zeros(6), **settings)
    for gradient in short(normals(1000, 6)).float():
        state = optim.optimistic_newton_step(state, gradient, domain=Ball(1.0), **settings)
    assert torch.allclose(state.metric @ state.inverse, torch.eye(6), atol=1e-4)


def metrics(count, dim, spread):
    turn = torch.linalg.qr(normals(count, dim, dim, seed=4)).Q
    return (turn * 10.0 ** (spread * (uniforms(count, 1, dim, seed=5) - 0.5))) @ turn.mT


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0, 12.0])
def test_projection_in_a_metric_meets_its_kkt_conditions(spread):
    metric, y = metrics(300, 5, spread), 3 * normals(300, 5)
    x = optim.project_ball_in_metric(y, metric, radius=2.0)
    norm = torch.linalg.vector_norm(x, dim=-1)
    inside = torch.linalg.vector_norm(y, dim=-1) <= 2.0
    assert inside.any()
    assert torch.equal(x[inside], y[inside])
    assert torch.allclose(norm[~inside], torch.full_like(norm[~inside], 2.0), rtol=1e-9)
    force = torch.einsum("sij,sj->si", metric, y - x)[~inside]
    multiplier = (force * x[~inside]).sum(-1, keepdim=True) / 4
    assert bool((multiplier > 0).all())
    scale = torch.linalg.matrix_norm(metric[~inside], 2)[:, None]
    assert bool(((force - multiplier * x[~inside]).abs() <= 1e-7 * scale).all())


def test_projection_in_a_metric_is_that_of_an_independent_solver():
    metric, y = metrics(5, 4, 2.0), 4 * normals(5, 4)
    ours = optim.project_ball_in_metric(y, metric, radius=1.3)
    for found, h, point in zip(ours.numpy(), metric.numpy(), y.numpy(), strict=True):
        theirs = scipy.optimize.minimize(
            lambda x, h=h, point=point: (x - point) @ h @ (x - point) / 2,
            0.5 * found,
            jac=lambda x, h=h, point=point: h @ (x - point),
            constraints={"type": "ineq", "fun": lambda x: 1.3**2 - x @ x, "jac": lambda x: -2 * x},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert found == pytest.approx(theirs.x, abs=1e-6)


def test_a_broken_promise_makes_the_exp_concave_bound_infinite():
    settings = {"grad_bound": 1.0, "curvature": 0.3}
    state = NewtonState.at(torch.zeros(2), **settings)
    state = optim.optimistic_newton_step(state, torch.tensor([0.6, 0.8]), **settings)
    assert math.isfinite(state.regret_bound(diameter=2.0))
    large = optim.optimistic_newton_step(state, torch.tensor([0.6, 0.9]), **settings)
    assert large.regret_bound(diameter=2.0) == math.inf
    scaled = optim.optimistic_newton_step(state, torch.tensor([0.6, 0.8]), lr=0.5, **settings)
    assert scaled.regret_bound(diameter=2.0) == math.inf


# The entropic map


def test_with_a_constant_step_the_entropic_map_is_the_two_lines_of_mirror_descent():
    """A huge eps holds the step constant: exponentiated gradients from the anchor, with and without the hint."""
    size = 0.3
    eps = math.log(DIM) / size**2 * 1e18
    state = FollowState.on_simplex(start(Simplex(), 20))
    anchor = point = start(Simplex(), 20)
    for t in range(ROUNDS):
        assert torch.allclose(state.point, point, atol=1e-12)
        gradient = short(normals(20, DIM, seed=t))
        state = optim.optimistic_entropic_step(state, gradient, lr=1e9, eps=eps)
        anchor = nn.functional.normalize(anchor * torch.exp(-size * gradient), p=1, dim=-1)
        point = nn.functional.normalize(anchor * torch.exp(-size * gradient), p=1, dim=-1)


def test_with_falling_steps_the_entropic_map_draws_the_anchor_back_to_the_start():
    begin = normals(20, DIM).softmax(-1)
    state, anchor, point = FollowState.on_simplex(begin), begin, begin
    for t in range(ROUNDS):
        assert torch.allclose(state.point, point, atol=1e-12)
        gradient = short(normals(20, DIM, seed=t))
        state = optim.optimistic_entropic_step(state, gradient, grad_bound=G)
        size, after = state.inverse_step.reciprocal()[:, None], state.step_size[:, None]
        moved = anchor * torch.exp(-size * gradient)
        anchor = nn.functional.normalize(moved ** (after / size) * begin ** (1 - after / size), p=1, dim=-1)
        point = nn.functional.normalize(anchor * torch.exp(-after * gradient), p=1, dim=-1)


def test_no_shift_of_all_entries_moves_the_entropic_map():
    shifted, plain = (FollowState.on_simplex(start(Simplex(), 20)) for _ in range(2))
    for t in range(20):
        gradient = normals(20, DIM, seed=t)
        plain = optim.optimistic_entropic_step(plain, gradient)
        shifted = optim.optimistic_entropic_step(shifted, gradient + 5 * t)
    assert torch.allclose(plain.point, shifted.point, atol=1e-11)
    assert torch.allclose(plain.variation, shifted.variation)


def test_the_leader_is_the_best_point_for_all_gradients_and_the_last_once_more():
    domain = Box(-0.2, 0.3)
    state = FollowState.at(torch.full((20, DIM), 0.1, dtype=torch.float64))
    total, hint, variation = 0.0, torch.zeros(20, DIM, dtype=torch.float64), 0.0
    for t in range(ROUNDS):
        gradient = short(normals(20, DIM, seed=t))
        state = optim.optimistic_ftrl_step(state, gradient, diameter=1.0, domain=domain, grad_bound=G, eps=0.5)
        total, variation = total + gradient, variation + (gradient - hint).square().sum(-1, keepdim=True)
        hint = gradient
        size = (0.5 + 4 * G**2 + variation).rsqrt()
        assert torch.allclose(state.point, (0.1 - size * (total + gradient)).clamp(-0.2, 0.3), atol=1e-12)


# The ensemble


def test_an_ensemble_of_one_is_that_learner():
    settings = {"diameter": 2.0, "grad_bound": G, "smoothness": 1.0}
    sizes, domain = torch.tensor([0.1], dtype=torch.float64), Ball(0.3)
    state = optim.EnsembleState.at(start(None, 20), learners=1)
    anchor = point = start(None, 20)
    for t in range(ROUNDS):
        assert torch.allclose(state.point, point, atol=1e-12)
        gradient = short(normals(20, DIM, seed=t))
        state = optim.ensemble_step(state, gradient, step_sizes=sizes, domain=domain, **settings)
        anchor = short(anchor - 0.1 * gradient, 0.3)
        point = short(anchor - 0.1 * gradient, 0.3)


def test_the_weights_of_an_ensemble_are_optimistic_hedge_on_corrected_losses():
    settings = {"diameter": 2.0, "grad_bound": G, "smoothness": 0.7}
    sizes, domain = torch.tensor([0.05, 0.2, 0.8], dtype=torch.float64), Ball(1.0)
    state = optim.EnsembleState.at(torch.zeros(DIM, dtype=torch.float64), learners=3)
    total, error, hint = torch.zeros(3).double(), 0.0, torch.zeros(3).double()
    before, correction = state.points, 0.0
    for t in range(ROUNDS):
        gradient = short(normals(DIM, seed=t))
        moves = (state.points - before).square().sum(-1)
        correction = correction + moves - state.weights.point @ moves
        loss = state.points @ gradient + 1.4 * (state.points - before).square().sum(-1)
        total, error = total + loss, error + float((loss - hint).max() - (loss - hint).min()) ** 2 / 4
        before = state.points
        state = optim.ensemble_step(state, gradient, step_sizes=sizes, domain=domain, **settings)
        hint = state.points @ gradient + 1.4 * (state.points - before).square().sum(-1)
        rate = math.sqrt(math.log(3) / (1e-8 + (2.0 * G) ** 2 + error))
        weights = torch.softmax(-rate * (total + hint), -1)
        assert torch.allclose(state.weights.point, weights, atol=1e-12)
        assert float(weights.sum()) == pytest.approx(1.0)
        assert torch.allclose(state.point, weights @ state.points, atol=1e-12)
    for path in (0.0, 0.5, 30.0):
        choosing = state.weights.entropic_regret_bound() + 1.4 * correction
        tracking = (2.0 + 2.0 * path) / sizes + sizes * state.variation / 2
        bound = state.regret_bound(step_sizes=sizes, diameter=2.0, smoothness=0.7, path_length=path)
        assert float(bound) == pytest.approx(float((choosing + tracking).min()))


def test_step_sizes_double_from_the_static_one_to_the_smoothest():
    sizes = optim.ensemble_step_sizes(4000, smoothness=1.0, grad_bound=2.8, diameter=2.0)
    assert float(sizes[0]) == pytest.approx(math.sqrt(4.0 / (8 * 2.8**2 * 4000)))
    assert torch.allclose(sizes[1:-1] / sizes[:-2], torch.tensor(2.0, dtype=torch.float64))
    assert float(sizes[-1]) == 1 / 8
    assert float(sizes[-1] / sizes[-2]) <= 2
    assert len(sizes) == math.ceil(0.5 * math.log2(2.8**2 * 4000 / (8 * 4))) + 1
    assert optim.ensemble_step_sizes(1, smoothness=9.0, grad_bound=0.1, diameter=2.0).tolist() == [1 / 72]


# The optimizers


def quadratic(weights, target):
    return sum((weight - target).square().sum() for weight in weights) / 2


MAKERS = {
    "convex": lambda params: OptimisticMirrorDescent(params, domain=Ball(2.0), average=True),
    "strongly convex": lambda params: OptimisticMirrorDescent(
        params, domain=Box(-1.0, 0.5), mode="strongly_convex", strong_convexity=1.0, average=True
    ),
    "exp-concave": lambda params: OptimisticMirrorDescent(
        params, domain=Ball(1.0), mode="exp_concave", grad_bound=10.0, exp_concavity=0.1, average=True
    ),
    "entropic": lambda params: OptimisticMirrorDescent(params, domain=Simplex(), mode="entropic", average=True),
    "ftrl": lambda params: optim.OptimisticFTRL(params, domain=Ball(2.0), average=True),
    "ensemble": lambda params: optim.EnsembleMirrorDescent(
        params, domain=Ball(2.0), horizon=50, smoothness=1.0, grad_bound=10.0, average=True
    ),
}


def weights_of(dtype=torch.float64):
    return [nn.Parameter(torch.full(shape, 0.125, dtype=dtype)) for shape in ((2, 3), (2,))]


@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_plays_all_parameters_as_one_point_with_a_bound_on_its_regret(name):
    weights = weights_of()
    optimizer = MAKERS[name](weights)
    assert optimizer.variation == 0
    assert optimizer.regret_bound() == 0
    points, gradients = [], []
    for t in range(50):
        optimizer.zero_grad()
        quadratic(weights, math.sin(t / 5)).backward()
        points.append(torch.cat([weight.detach().reshape(-1) for weight in weights]))
        gradients.append(torch.cat([weight.grad.reshape(-1) for weight in weights]))
        optimizer.step()
    points, gradients = torch.stack(points), torch.stack(gradients)
    averages = torch.cat([one.reshape(-1) for one in optimizer.average])
    assert torch.allclose(averages, points.mean(0))
    assert torch.allclose(optimizer.domain(points[-1]), points[-1], atol=1e-12)
    if name != "entropic":
        assert optimizer.variation == pytest.approx(float(variations(gradients).sum()))
    worst = best(optimizer.domain, gradients)
    true = sum(
        float((x - c).square().sum() - (worst - c).square().sum()) for x, c in zip(points, _targets(), strict=True)
    )
    assert true / 2 <= optimizer.regret_bound() + SLACK


def _targets():
    return [math.sin(t / 5) for t in range(50)]


def test_the_optimizer_takes_the_steps_of_the_function():
    weights = weights_of()
    optimizer = OptimisticMirrorDescent(weights, domain=Ball(2.0))
    state = MirrorState.at(torch.full((8,), 0.125, dtype=torch.float64))
    for t in range(20):
        optimizer.zero_grad()
        quadratic(weights, math.sin(t)).backward()
        optimizer.step()
        state = optim.optimistic_step(state, state.point - math.sin(t), diameter=4.0, domain=Ball(2.0))
        assert torch.allclose(torch.cat([weight.detach().reshape(-1) for weight in weights]), state.point, atol=1e-14)


@pytest.mark.parametrize("name", MAKERS)
def test_clearing_gradients_in_place_does_not_reach_the_hint(name):
    runs = []
    for to_none in (True, False):
        weights = [nn.Parameter(torch.full((8,), 0.125, dtype=torch.float64))]
        optimizer = MAKERS[name](weights)
        for t in range(5):
            optimizer.zero_grad(set_to_none=to_none)
            quadratic(weights, math.sin(t)).backward()
            optimizer.step()
        runs.append(weights[0].detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", MAKERS)
def test_a_half_precision_checkpoint_keeps_the_learner_in_full(name, tmp_path):
    weights = weights_of(torch.bfloat16)
    optimizer = MAKERS[name](weights)

    def rounds(weights, optimizer):
        for t in range(5):
            optimizer.zero_grad()
            quadratic(weights, math.sin(t)).backward()
            optimizer.step()

    rounds(weights, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = MAKERS[name](weights_of(torch.bfloat16))
    fresh.param_groups[0]["params"] = others
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    bound = optimizer.regret_bound()
    assert fresh.regret_bound() == bound
    rounds(weights, optimizer)
    assert fresh.regret_bound() == bound  # the two share no tensor
    rounds(others, fresh)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, others, strict=True))
    assert fresh.regret_bound() == optimizer.regret_bound()


def test_a_copied_optimizer_keeps_its_domain():
    weights = [nn.Parameter(torch.zeros(3))]
    twin = copy.deepcopy(MAKERS["convex"](weights))
    twin.param_groups[0]["params"][0].grad = torch.full((3,), 100.0)
    for _ in range(9):
        twin.step()
    assert float(twin.param_groups[0]["params"][0].detach().norm()) == pytest.approx(2.0)
    assert torch.equal(weights[0], torch.zeros(3))


def test_groups_are_learners_of_their_own_whose_regrets_add_up():
    together = weights_of()
    both = OptimisticMirrorDescent([{"params": [together[0]], "diameter": 1.0}, {"params": [together[1]]}], 3.0)
    apart = weights_of()
    alone = [OptimisticMirrorDescent([apart[0]], 1.0), OptimisticMirrorDescent([apart[1]], 3.0)]
    for t in range(10):
        for weights, optimizers in ((together, [both]), (apart, alone)):
            for weight in weights:
                weight.grad = None
            quadratic(weights, math.sin(t)).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(together, apart, strict=True))
    assert both.regret_bound() == pytest.approx(sum(one.regret_bound() for one in alone))
    assert both.variation == pytest.approx(sum(one.variation for one in alone))


def test_the_theorys_curvature_follows_from_exp_concavity():
    weight = [nn.Parameter(torch.zeros(3))]
    small = OptimisticMirrorDescent(weight, 2.0, mode="exp_concave", grad_bound=5.0, exp_concavity=0.01)
    by_hand = OptimisticMirrorDescent(weight, 2.0, mode="exp_concave", grad_bound=5.0, curvature=0.005)
    large = OptimisticMirrorDescent(weight, 2.0, mode="exp_concave", grad_bound=5.0, exp_concavity=1.0)
    metrics_ = []
    for optimizer in (small, by_hand, large):
        weight[0].grad = torch.ones(3)
        optimizer.step()
        metrics_.append(optimizer.state[weight[0]]["learner"]["metric"])
    assert torch.equal(metrics_[0], metrics_[1])
    assert float(metrics_[2][0, 1]) == pytest.approx(1 / (4 * 5.0 * 2.0) / 4)


def test_a_refused_gradient_leaves_the_parameters_and_the_state():
    weight = nn.Parameter(torch.ones(3))
    optimizer = OptimisticMirrorDescent([weight], 2.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    held, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    weight.grad = torch.tensor([1.0, math.nan, 0.0])
    with pytest.raises(ValueError, match="gradient contains NaN"):
        optimizer.step()
    weight.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        optimizer.step()
    assert torch.equal(weight, held)
    after = optimizer.state_dict()["state"][0]["learner"]
    assert all(bool((after[name] == value).all()) for name, value in _tensors(state[0]["learner"]).items())
    assert after["rounds"] == state[0]["learner"]["rounds"] == 1


def _tensors(saved):
    return {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}


P = nn.Parameter


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "build"),
    [
        (ValueError, "diameter is required", lambda: OptimisticMirrorDescent([P(torch.zeros(2))])),
        (ValueError, "diameter must be", lambda: OptimisticMirrorDescent([P(torch.zeros(2))], -1.0)),
        (
            ValueError,
            "diameter is required",
            lambda: OptimisticMirrorDescent([P(torch.zeros(2))], domain=Box(0, math.inf)),
        ),
        (ValueError, "mode must be one of", lambda: OptimisticMirrorDescent([P(torch.zeros(2))], 1.0, mode="newton")),
        (
            ValueError,
            "strong_convexity is required",
            lambda: OptimisticMirrorDescent([P(torch.zeros(2))], 1.0, mode="strongly_convex"),
        ),
        (
            ValueError,
            "exp_concavity is required",
            lambda: OptimisticMirrorDescent([P(torch.zeros(2))], 1.0, mode="exp_concave", grad_bound=1.0),
        ),
        (
            ValueError,
            "grad_bound is required",
            lambda: OptimisticMirrorDescent([P(torch.zeros(2))], 1.0, mode="exp_concave", curvature=1.0),
        ),
        (
            TypeError,
            "domain must be a Ball or None",
            lambda: OptimisticMirrorDescent(
                [P(torch.zeros(2))], domain=Box(), mode="exp_concave", grad_bound=1.0, curvature=1.0
            ),
        ),
        (
            ValueError,
            "at most 2000",
            lambda: OptimisticMirrorDescent(
                [P(torch.zeros(2001))], 1.0, mode="exp_concave", grad_bound=1.0, curvature=1.0
            ),
        ),
        (
            TypeError,
            "domain must be a Simplex",
            lambda: OptimisticMirrorDescent([P(torch.zeros(2))], domain=Ball(), mode="entropic"),
        ),
        (
            ValueError,
            "entries above 0",
            lambda: OptimisticMirrorDescent([P(torch.tensor([1.0, 0.0]))], domain=Simplex(), mode="entropic"),
        ),
        (ValueError, "begin inside", lambda: OptimisticMirrorDescent([P(torch.ones(2))], domain=Ball())),
        (TypeError, "domain must be", lambda: OptimisticMirrorDescent([P(torch.zeros(2))], 1.0, domain="ball")),
        (ValueError, "grad_bound must be", lambda: OptimisticMirrorDescent([P(torch.zeros(2))], 1.0, grad_bound=0.0)),
        (ValueError, "lr must be", lambda: optim.OptimisticFTRL([P(torch.zeros(2))], 1.0, lr=-1.0)),
        (ValueError, "eps must be", lambda: optim.OptimisticFTRL([P(torch.zeros(2))], 1.0, eps=0.0)),
        (TypeError, "floating", lambda: OptimisticMirrorDescent([P(torch.zeros(2).cfloat())], 1.0)),
        (ValueError, "params contains NaN", lambda: OptimisticMirrorDescent([P(torch.tensor([math.nan]))], 1.0)),
        (
            ValueError,
            "smoothness must be",
            lambda: optim.EnsembleMirrorDescent([P(torch.zeros(2))], 1.0, horizon=10, smoothness=0.0, grad_bound=1.0),
        ),
        (RuntimeError, "average=False", lambda: optim.OptimisticFTRL([P(torch.zeros(2))], 1.0).average),
        (
            ValueError,
            "grad_bound is required with hints",
            lambda: optim.optimistic_entropic_step(
                FollowState.on_simplex(torch.full((2,), 0.5)), torch.zeros(2), hint=torch.zeros(2)
            ),
        ),
        (
            ValueError,
            "point's shape",
            lambda: optim.optimistic_step(MirrorState.at(torch.zeros(2)), torch.zeros(3), diameter=1.0),
        ),
        (
            ValueError,
            "positive definite",
            lambda: optim.project_ball_in_metric(torch.full((2,), 3.0), torch.tensor([[1.0, 0.0], [0.0, -1.0]])),
        ),
        (ValueError, "metric must have shape", lambda: optim.project_ball_in_metric(torch.ones(2), torch.ones(2))),
        (
            ValueError,
            "step_sizes must be one for each",
            lambda: optim.ensemble_step(
                optim.EnsembleState.at(torch.zeros(2), learners=2),
                torch.zeros(2),
                step_sizes=torch.ones(3),
                diameter=1.0,
                grad_bound=1.0,
                smoothness=1.0,
            ),
        ),
    ],
)
def test_mistakes_are_told_at_once(error, match, build):
    with pytest.raises(error, match=match):
        build()
