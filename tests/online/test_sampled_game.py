"""Games that are played have the losses and the gradients of the table; classes, rules and scores are their formulas."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from minimand.online import (
    ActiveLearner,
    InstanceClasses,
    PlayedGames,
    QueryGame,
    QueryNetwork,
    QueryScorer,
    SampledQueryGame,
    complexity,
    gap_search,
    generalized_binary_search,
    thresholds,
    train_robust_policy,
    train_sampled_policy,
    uniform_allocation,
)
from minimand.online.answer_counts import estimate

LABELS = thresholds(3)
ARMS = torch.tensor([[1.0, 0.2], [0.1, 0.9], [-0.8, 0.3], [0.1, 0.3]], dtype=torch.float64)  # the last is in the hull


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) - 1


def network(dim=3, budget=4, seed=0):
    torch.manual_seed(seed)
    return QueryNetwork(dim, budget=budget, hidden=(4,)).double()


def normal_cdf(value):
    return torch.special.ndtr(torch.as_tensor(value))


def agrees(estimates, wanted):
    """Whether the mean of independent estimates is within four and a half standard errors of what is wanted."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    return bool(((estimates.mean(0) - wanted).abs() <= 4.5 * error + 1e-12).all())


# ------------------------------------------------------------------------------------------- against the exact game


@pytest.mark.parametrize("loss", ["error", "regret"])
def test_played_games_lose_as_often_as_the_table_says(loss):
    exact, played = (
        QueryGame(LABELS, budget=4, loss=loss),
        SampledQueryGame(LABELS, budget=4, noise="bernoulli", loss=loss),
    )
    policy, theta = network(), 0.8 * drawn(4, 3)
    losses = played.play(policy, theta, games=20_000, generator=seeded()).losses.detach()
    assert agrees(losses.T, exact.loss(exact.table(policy), theta).detach())


@pytest.mark.parametrize("loss", ["error", "regret"])
def test_the_gradient_of_the_policy_is_unbiased(loss):
    exact, played = (
        QueryGame(LABELS, budget=4, loss=loss),
        SampledQueryGame(LABELS, budget=4, noise="bernoulli", loss=loss),
    )
    policy, theta, generator = network(), 0.8 * drawn(2, 3), seeded()

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))])

    wanted = gradient(exact.loss(exact.table(policy), theta).sum())
    found = [
        gradient(played.play(policy, theta, games=2000, generator=generator).policy_surrogate().sum())
        for _ in range(40)
    ]
    assert agrees(torch.stack(found), wanted)
    assert wanted.norm() > 3 * (torch.stack(found).mean(0) - wanted).norm()


@pytest.mark.parametrize("loss", ["error", "regret"])
def test_the_gradient_of_the_instance_is_unbiased(loss):
    exact, played = (
        QueryGame(LABELS, budget=4, loss=loss),
        SampledQueryGame(LABELS, budget=4, noise="bernoulli", loss=loss),
    )
    policy, theta, generator = network(), (0.8 * drawn(3, 3)).requires_grad_(), seeded()
    (wanted,) = torch.autograd.grad(exact.loss(exact.table(policy).detach(), theta).sum(), theta)
    found = [
        played.play(policy, theta, games=2000, generator=generator).instance_gradients().detach() for _ in range(40)
    ]
    assert agrees(torch.stack(found), wanted)
    assert wanted.norm() > 3 * (torch.stack(found).mean(0) - wanted).norm()


def test_two_answers_of_one_query_are_wrong_half_of_one_less_the_mean_and_its_slope_is_minus_a_half():
    """One point asked twice: wrong with (1 - m)^2 / 4 and half of the ties, so ((1 - m) / 2); its slope is -1/2."""
    game = SampledQueryGame(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), budget=2, noise="bernoulli")
    played = game.play(uniform_allocation, torch.tensor([[0.4]], dtype=torch.float64), games=50_000, generator=seeded())
    assert agrees(played.losses.T, torch.tensor([0.3], dtype=torch.float64))
    assert played.instance_gradients().item() == pytest.approx(-0.5, abs=0.02)


# ------------------------------------------------------------------------------------------------- Gaussian answers


@pytest.mark.parametrize("loss", ["error", "regret"])
def test_two_arms_pulled_alike_have_the_normal_s_tail_and_its_slope(loss):
    gap, pulls = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 3
    tail = normal_cdf(-gap * math.sqrt(pulls / 2))
    wanted = tail * gap if loss == "regret" else tail
    (slope,) = torch.autograd.grad(wanted, gap)
    game = SampledQueryGame(torch.eye(2, dtype=torch.float64), budget=2 * pulls, loss=loss)
    theta = torch.tensor([[0.5, -0.2]], dtype=torch.float64)
    generator = seeded()
    found = [game.play(uniform_allocation, theta, games=2000, generator=generator) for _ in range(40)]
    assert agrees(torch.cat([each.losses for each in found], 1).T, wanted.detach())
    gradients = torch.cat([each.instance_gradients() for each in found])
    assert agrees(gradients, torch.stack([slope, -slope]))


def test_a_linear_design_has_the_tail_of_its_least_squares():
    """Two hypotheses, each query once: wrong with Phi(-<d, theta> / |d|_{(X'X)^-1})."""
    queries, theta = drawn(5, 3, seed=1), drawn(1, 3, seed=2)
    hypotheses = drawn(2, 3, seed=3)
    game = SampledQueryGame(hypotheses, budget=5, queries=queries)
    difference = hypotheses[0] - hypotheses[1]
    width = (difference @ torch.linalg.inv(queries.T @ queries) @ difference).sqrt()
    wanted = normal_cdf(-(difference @ theta[0]).abs() / width)
    played = game.play(uniform_allocation, theta, games=40_000, generator=seeded())
    assert played.counts.unique().tolist() == [1.0]
    assert agrees(played.losses.T, wanted)
    point = theta[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(normal_cdf(-(difference @ point).abs() / width), point)
    assert torch.allclose(played.instance_gradients()[0], slope, atol=0.03)


def test_the_estimate_is_the_shortest_of_least_squares():
    queries, counts = drawn(4, 6, seed=1), torch.tensor([[2.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]]).double()
    answers = drawn(2, 4, seed=2) * counts.sign()
    found = estimate(counts, answers * counts, queries)
    rows = (counts[0].sqrt()[:, None] * queries).numpy()
    wanted = np.linalg.lstsq(rows, (counts[0].sqrt() * answers[0]).numpy(), rcond=None)[0]
    assert np.allclose(found[0].numpy(), wanted, atol=1e-10)
    assert found[1].abs().max() == 0


# --------------------------------------------------------------------------------------------------------- baseline


def test_the_baseline_is_the_mean_of_the_other_games():
    losses, chosen, scores = drawn(2, 5), drawn(2, 5, seed=1), drawn(2, 5, 3, seed=2)
    nothing = torch.zeros(2, 5, 3, dtype=torch.float64)
    games = PlayedGames(nothing, nothing, losses, chosen, scores, nothing)
    for instance in range(2):
        wanted, slope = 0.0, torch.zeros(3, dtype=torch.float64)
        for game in range(5):
            others = [losses[instance, other].item() for other in range(5) if other != game]
            advantage = losses[instance, game].item() - sum(others) / 4
            wanted += advantage * chosen[instance, game].item() / 5
            slope += advantage * scores[instance, game] / 5
        assert games.policy_surrogate()[instance].item() == pytest.approx(wanted, abs=1e-12)
        assert torch.allclose(games.instance_gradients()[instance], slope, atol=1e-12)


def test_the_baseline_takes_variance_and_no_number_added_to_all_losses_matters():
    game, policy, theta = SampledQueryGame(LABELS, budget=4, noise="bernoulli"), network(), 0.5 * LABELS[1:2]
    played = game.play(policy, theta, games=4000, generator=seeded())
    parts = [played.counts, played.sums, played.losses + 7, played.log_probabilities, played.scores, played.loss_slopes]
    assert torch.allclose(PlayedGames(*parts).instance_gradients(), played.instance_gradients(), atol=1e-9)
    plain = (played.losses[..., None] * played.scores).var(1)
    centred = ((played.losses - played.losses.mean())[..., None] * played.scores).var(1)
    assert (centred < plain).all()


# ---------------------------------------------------------------------------------------------------------- classes


def test_the_easiest_instance_found_by_programs_is_the_noiseless_one():
    """With two values in a column it is known; queries that are the unit vectors take the other way to it."""
    for hypotheses in (thresholds(4), torch.eye(3, dtype=torch.float64)):
        known = InstanceClasses(hypotheses)
        found = InstanceClasses(hypotheses, queries=torch.eye(hypotheses.shape[1], dtype=torch.float64))
        assert torch.allclose(found.easiest, known.easiest, rtol=1e-3)
    assert torch.allclose(InstanceClasses(thresholds(4), bound=3.0).easiest, 3 * InstanceClasses(thresholds(4)).easiest)


def test_no_instance_of_a_linear_problem_is_easier_than_the_home_of_its_hypothesis():
    queries = drawn(6, 2, seed=4)
    classes = InstanceClasses(ARMS, queries=queries, bound=2.0)
    assert (classes.means(classes.home).abs() <= 2 + 1e-9).all()
    assert torch.equal((classes.home @ ARMS.T).argmax(-1)[:3], torch.arange(3))
    # An arm inside of the hull of the others is best for no instance.
    assert classes.easiest[3] == 0
    assert classes.feasible(1e9).tolist() == [0, 1, 2]
    theta = 4 * drawn(3000, 2, seed=5)
    theta = theta[(classes.means(theta).abs() <= 2).all(-1)]
    best, roots = (theta @ ARMS.T).argmax(-1), complexity(theta, ARMS, queries=queries, tolerance=1e-4).value.rsqrt()
    assert len(theta) > 300
    for hypothesis in range(3):
        here = roots[best == hypothesis]
        assert here.max() <= classes.easiest[hypothesis] * (1 + 1e-3)
        assert here.max() > 0.8 * classes.easiest[hypothesis]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("cheap", [False, True])
def test_instances_come_back_into_the_class_whatever_allocation_they_are_measured_with(linear, cheap):
    hypotheses, queries = (ARMS, drawn(6, 2, seed=4)) if linear else (thresholds(4), None)
    classes = InstanceClasses(hypotheses, queries=queries, bound=1.5)
    radius = float(classes.easiest[classes.easiest > 0].min() ** -2) * 4
    inside = classes.draw(60, radius=radius, generator=seeded())
    measure = classes.measure(inside.theta, inside.best) if cheap else None
    moved = inside.theta + drawn(*inside.theta.shape, seed=6)
    found = classes.retract(moved, inside.best, radius=radius, measure=measure)
    assert (classes.means(found).abs() <= 1.5 + 1e-9).all()
    assert torch.equal((found @ hypotheses.T).argmax(-1), inside.best)
    assert complexity(found, hypotheses, queries=queries).value.max() <= radius * (1 + 1e-9)
    if cheap:
        # Measured with its own allocation, an instance inside stays.
        own = classes.retract(inside.theta, inside.best, radius=radius, measure=measure)
        assert torch.allclose(own, inside.theta, atol=1e-3)


@pytest.mark.parametrize("hypotheses", [thresholds(2), thresholds(2)[:1]], ids=["three", "one"])
def test_an_instance_in_a_corner_of_the_box_moves_without_harm(hypotheses):
    classes, best = InstanceClasses(hypotheses), torch.tensor([0])
    corner = torch.ones(1, 2, dtype=torch.float64)
    measure = classes.measure(corner, best)
    assert torch.equal(classes.move(corner, best, corner, radius=50.0, measure=measure), corner)
    assert torch.isfinite(classes.move(corner, best, -0.5 * corner, radius=50.0, measure=measure)).all()


def test_an_instance_that_keeps_moving_rests_where_the_edge_is_furthest():
    """The part of a class is convex, so that another solver can say how far it goes in a direction."""
    classes, radius = InstanceClasses(thresholds(4)), 4.0
    best, direction = torch.tensor([1]), torch.tensor([[-0.9, -0.5, -0.4, 0.6]], dtype=torch.float64)
    theta = classes.home[best]
    for step in range(120):
        measure = classes.measure(theta, best)
        length = 0.1 * 0.02 ** (step / 119)
        theta = classes.move(theta, best, length * direction, radius=radius, measure=measure)

    def constraint(point):
        inside = classes.measure(torch.from_numpy(point)[None], best)
        return float((inside.slopes[0] * torch.from_numpy(point)).sum()) - radius**-0.5

    found = minimize(
        lambda point: -float(direction[0].numpy() @ point),
        classes.home[1].numpy() * 0.9,
        jac=lambda point: -direction[0].numpy(),
        constraints={
            "type": "ineq",
            "fun": constraint,
            "jac": lambda point: classes.measure(torch.from_numpy(point)[None], best).slopes[0].numpy(),
        },
        bounds=[(-1, 1)] * 4,
        method="SLSQP",
    )
    assert found.success
    assert (theta * direction).sum().item() == pytest.approx(-found.fun, abs=5e-3)


# --------------------------------------------------------------------------------------------------------- policies


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 3.0]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_gap_search_asks_what_leaves_the_least_variance_along_the_gap(seed, confidence, linear):
    hypotheses = drawn(5, 3, seed=seed)
    queries = drawn(6, 3, seed=seed + 1) if linear else torch.eye(3, dtype=torch.float64)
    counts = (3 * drawn(1, len(queries), seed=seed + 2)).abs().round()
    sums = counts * drawn(1, len(queries), seed=seed + 3)
    found = gap_search(counts, sums, hypotheses=hypotheses, queries=queries if linear else None, confidence=confidence)[
        0
    ]
    precision = torch.eye(3, dtype=torch.float64) + queries.T @ (counts[0][:, None] * queries)
    theta = torch.linalg.solve(precision, queries.T @ sums[0])
    best = int((hypotheses @ theta).argmax())
    bonus = [
        float((z - hypotheses[best]) @ theta)
        + confidence * float(((z - hypotheses[best]) @ torch.linalg.inv(precision) @ (z - hypotheses[best])).sqrt())
        for z in hypotheses
    ]
    bonus[best] = -math.inf
    gap = hypotheses[best] - hypotheses[int(np.argmax(bonus))]
    left = torch.stack([gap @ torch.linalg.inv(precision + torch.outer(x, x)) @ gap for x in queries])
    assert torch.equal(found > 0, left <= left.min() + 1e-12)


def test_a_scorer_knows_no_order_of_queries_or_hypotheses():
    torch.manual_seed(0)
    scorer = QueryScorer(ARMS, budget=9, queries=ARMS).double()
    for name in ("hypotheses", "rows", "predicted"):
        assert getattr(scorer, name).dtype is torch.float64
    counts = (3 * drawn(7, 4, seed=1)).abs().round()
    sums = counts * drawn(7, 4, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    turned = QueryScorer(ARMS[order.flip(0)], budget=9, queries=ARMS[order]).double()
    turned.load_state_dict({**scorer.state_dict(), **{k: v for k, v in turned.state_dict().items() if k in BUFFERS}})
    first = scorer(counts, sums)
    assert torch.allclose(turned(counts[:, order], sums[:, order]), first[:, order], atol=1e-6)
    assert (first - 0.25).abs().max() > 1e-3


BUFFERS = ("hypotheses", "rows", "predicted")


def test_a_scorer_of_unit_queries_is_that_of_the_unit_vectors():
    torch.manual_seed(0)
    unit = QueryScorer(LABELS, budget=9).double()
    linear = QueryScorer(LABELS, budget=9, queries=torch.eye(3, dtype=torch.float64)).double()
    linear.load_state_dict(unit.state_dict())
    counts = (3 * drawn(7, 3, seed=1)).abs().round()
    sums = counts * drawn(7, 3, seed=2)
    assert torch.allclose(unit(counts, sums), linear(counts, sums), atol=1e-12)


def test_a_learner_takes_numbers_and_guesses_by_least_squares():
    learner = ActiveLearner(
        ARMS, policy=uniform_allocation, budget=8, queries=ARMS, noise="gaussian", generator=seeded()
    )
    theta = torch.tensor([0.2, 1.1], dtype=torch.float64)
    assert learner.run(lambda query: float(ARMS[query] @ theta)) == 1
    assert torch.allclose(estimate(learner.counts[None], learner.sums[None], ARMS)[0], theta)


# --------------------------------------------------------------------------------------------------------- training


def test_the_first_step_descends_the_smooth_maximum_of_the_losses():
    """Adam's first step is the sign of the gradient, of log-sum-exp(beta l) / beta over the instances drawn."""
    game, policy = QueryGame(LABELS, budget=3), network(budget=3)
    before = [p.detach().clone() for p in policy.parameters()]
    theta = game.classes.draw(8, radius=5.0, generator=seeded()).theta
    smooth = (20.0 * game.loss(game.table(policy), theta)).logsumexp(0) / 20
    slopes = torch.autograd.grad(smooth, list(policy.parameters()))
    train_robust_policy(
        policy, game, radii=torch.tensor([5.0]), num_instances=8, num_steps=1, lr=1e-3, generator=seeded()
    )
    for old, new, slope in zip(before, policy.parameters(), slopes, strict=True):
        moved, clear = new.detach() - old, slope.abs() > 1e-6
        assert torch.allclose(moved[clear], -1e-3 * slope.sign()[clear], rtol=1e-2)


def test_a_policy_trained_by_playing_is_robust_in_the_exact_game():
    exact, played = QueryGame(LABELS, budget=5), SampledQueryGame(LABELS, budget=5, noise="bernoulli")
    torch.manual_seed(0)
    policy = QueryScorer(LABELS, budget=5)
    report = train_sampled_policy(policy, played, radii=torch.tensor([4.0]), num_steps=160, generator=seeded())
    assert complexity(report.instances.theta, LABELS).value.max() <= 4 * (1 + 1e-9)
    search = functools.partial(generalized_binary_search, hypotheses=LABELS)
    worst = [
        exact.worst_instances(exact.table(one).detach(), radius=4.0, restarts=32, num_steps=30, generator=seeded(1))[1]
        .max()
        .item()
        for one in (policy, uniform_allocation, search)
    ]
    assert worst[0] < min(worst[1:])


def test_the_worst_instance_is_in_the_class_and_nearly_as_bad_as_the_exact_search_finds():
    exact, played = QueryGame(LABELS, budget=4), SampledQueryGame(LABELS, budget=4, noise="bernoulli")
    table = exact.table(uniform_allocation)
    wanted = exact.worst_instances(table, radius=4.0, restarts=32, num_steps=40, generator=seeded())[1].max().item()
    theta, loss = played.worst_instance(uniform_allocation, radius=4.0, num_steps=40, games=64, generator=seeded(1))
    assert complexity(theta, LABELS).value.item() <= 4 * (1 + 1e-9)
    assert loss == pytest.approx(exact.loss(table, theta[None]).item(), abs=4.5 * 0.5 / 64)
    assert wanted - 0.03 < exact.loss(table, theta[None]).item() < wanted + 1e-3


def test_training_by_playing_is_the_same_again_and_takes_values_off():
    game = SampledQueryGame(LABELS, budget=3, noise="bernoulli")
    reports = []
    for values in (None, None, torch.tensor([0.1, 0.2])):
        torch.manual_seed(0)
        policy = QueryScorer(LABELS, budget=3, hidden=(4,))
        reports.append(
            train_sampled_policy(
                policy,
                game,
                radii=torch.tensor([4.0, 8.0]),
                values=values,
                num_instances=8,
                games=4,
                num_steps=1,
                generator=seeded(),
            )
        )
    assert torch.equal(reports[0].losses, reports[1].losses)
    assert 0.1 <= (reports[0].worst - reports[2].worst).item() <= 0.25


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampledQueryGame(LABELS, budget=2, noise="cauchy"), "noise must be one of"),
        (lambda: SampledQueryGame(LABELS, budget=2, queries=torch.ones(2, 2)), r"queries must have shape"),
        (lambda: SampledQueryGame(LABELS, budget=2, queries=torch.eye(3)[:2]), "queries must tell"),
        (lambda: SampledQueryGame(LABELS, budget=2, bound=0.0), "bound must be"),
        (lambda: gaussian().play(uniform_allocation, torch.ones(1, 2), games=1), "theta must have shape"),
        (lambda: gaussian().play(uniform_allocation, torch.ones(1, 3), games=0), "games must be at least 1"),
        (lambda: gaussian().play(lambda c, s: c + 1, torch.ones(1, 3), games=2), "add up to 1"),
        (lambda: gaussian("bernoulli").play(uniform_allocation, 2 * torch.ones(1, 3), games=2), r"in \[-1, 1\]"),
        (
            lambda: gaussian().play(uniform_allocation, torch.ones(1, 3), games=1).instance_gradients(),
            "at least 2 games",
        ),
        (lambda: gap_search(torch.ones(1, 3), torch.ones(1, 3), hypotheses=torch.ones(1, 3)), "at least 2"),
        (lambda: QueryScorer(LABELS, budget=2)(torch.ones(1, 2), torch.ones(1, 2)), "3 columns"),
        (lambda: train(games=1), "games must be at least 2"),
        (lambda: train(floor=1.5), "floor must lie"),
        (lambda: train(num_instances=0), "number of classes"),
        (lambda: told(math.nan), "finite number"),
    ],
)
def test_what_cannot_be_played_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def gaussian(noise="gaussian"):
    return SampledQueryGame(LABELS, budget=2, noise=noise)


def train(**settings):
    return train_sampled_policy(network(budget=2), gaussian(), radii=torch.tensor([8.0]), num_steps=1, **settings)


def told(answer):
    learner = ActiveLearner(LABELS, policy=uniform_allocation, budget=2, noise="gaussian")
    learner.ask()
    learner.tell(answer)
