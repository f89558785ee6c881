"""The complexity is its closed forms; the table is the game played out; and its solution is the minimax policy."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from minimand.online import (
    ActiveLearner,
    QueryGame,
    QueryNetwork,
    TabularPolicy,
    complexity,
    generalized_binary_search,
    thresholds,
    train_robust_policy,
    uniform_allocation,
)
from minimand.stopping import Stop

SMALL = QueryGame(thresholds(2), budget=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) - 1


def drawn_table(game, seed=0):
    return (3 * drawn(*game.counts.shape, seed=seed)).softmax(-1)


# ------------------------------------------------------------------------------------------------------- complexity


@pytest.mark.parametrize("gap", [0.1, 0.5, 2.0])
def test_two_arms_take_four_over_the_squared_gap(gap):
    solution = complexity(torch.tensor([1.0 + gap, 1.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    assert solution.value.item() == pytest.approx(4 / gap**2, rel=1e-8)


@pytest.mark.parametrize("losers", [1, 2, 7, 30])
def test_arms_that_lose_alike_take_one_plus_their_root_squared(losers):
    theta = torch.full((losers + 1,), 0.3, dtype=torch.float64)
    theta[0] = 0.8
    solution = complexity(theta, torch.eye(losers + 1, dtype=torch.float64))
    assert solution.value.item() == pytest.approx((1 + math.sqrt(losers)) ** 2 / 0.25, rel=1e-7)
    # The best arm is asked root of K times as often as each other one.
    assert (solution.allocation[0] / solution.allocation[1]).item() == pytest.approx(math.sqrt(losers), rel=1e-3)


def test_thresholds_have_the_complexities_of_the_card():
    found = complexity(thresholds(4), thresholds(4)).value
    wanted = torch.tensor([1.6762, 2.5333, 2.6667, 2.5333, 1.6762], dtype=torch.float64)
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("linear", [False, True])
def test_the_allocation_attains_what_the_weights_prove(linear):
    hypotheses, theta = drawn(9, 4, seed=1), drawn(20, 4, seed=2)
    queries = drawn(7, 4, seed=3) if linear else torch.eye(4, dtype=torch.float64)
    solution = complexity(theta, hypotheses, queries=queries if linear else None)
    assert solution.status is Stop.CONVERGED
    for row in range(len(theta)):
        values = hypotheses @ theta[row]
        best = int(values.argmax())
        keep = [z for z in range(9) if z != best]
        v = ((hypotheses[best] - hypotheses) / (values[best] - values)[:, None])[keep]
        inverse = torch.linalg.inv(queries.T @ (solution.allocation[row][:, None] * queries))
        costs = ((v @ inverse) * v).sum(-1)
        assert solution.value[row].item() == pytest.approx(costs.max().item(), rel=1e-9)
        p = solution.weights[row][keep]
        assert p.sum().item() == pytest.approx(1)
        if linear:
            moment = v.T @ (p[:, None] * v)
            pull = (queries @ inverse @ moment @ inverse @ queries.T).diagonal().max()
            lower = torch.trace(inverse @ moment) ** 2 / pull
            assert solution.lower[row].item() <= solution.value[row].item() < lower.item() * (1 + 1e-4)
        else:
            # The dual of the card: its value at any weights is at most the complexity.
            dual = (p @ v.square()).sqrt().sum().square().item()
            assert dual == pytest.approx(solution.value[row].item(), rel=1e-6)
            assert dual <= solution.value[row].item() * (1 + 1e-12)


def test_the_complexity_is_that_of_a_general_convex_solver():
    import cvxpy

    hypotheses, theta, queries = drawn(6, 3, seed=4), drawn(3, seed=5), drawn(5, 3, seed=6)
    values = (hypotheses @ theta).numpy()
    best = values.argmax()
    share = cvxpy.Variable(5, nonneg=True)
    information = sum(share[x] * np.outer(queries[x], queries[x]) for x in range(5))
    costs = [
        cvxpy.matrix_frac((hypotheses[best] - hypotheses[z]).numpy() / (values[best] - values[z]), information)
        for z in range(6)
        if z != best
    ]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.maximum(*costs)), [cvxpy.sum(share) == 1])
    problem.solve(solver=cvxpy.CLARABEL)
    assert complexity(theta, hypotheses, queries=queries).value.item() == pytest.approx(problem.value, rel=1e-5)


@given(st.floats(0.01, 100), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_an_instance_that_is_scaled_takes_the_inverse_square(scale, seed):
    hypotheses, theta = drawn(5, 3, seed=seed), drawn(3, seed=seed + 1)
    once, twice = complexity(theta, hypotheses), complexity(scale * theta, hypotheses)
    assert (twice.value * scale**2).item() == pytest.approx(once.value.item(), rel=1e-8)


def test_reversing_thresholds_and_turning_signs_leaves_complexity_loss_and_value():
    theta = drawn(10, 4, seed=7)
    assert torch.allclose(
        complexity(theta, thresholds(4)).value, complexity(-theta.flip(1), thresholds(4)).value, rtol=1e-7
    )
    game = QueryGame(thresholds(4), budget=3)
    value, mirrored = game.solve(theta).value, game.solve(-theta.flip(1)).value
    assert value == pytest.approx(mirrored, abs=1e-6)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_inverse_root_of_the_complexity_is_concave_where_one_hypothesis_is_best(seed, share):
    hypotheses, ends = drawn(5, 4, seed=seed), drawn(40, 4, seed=seed + 1)
    best = (ends @ hypotheses.T).argmax(-1)
    first, second = ends[best == best[0]][[0, -1]]
    roots = complexity(torch.stack([first, second, torch.lerp(first, second, share)]), hypotheses).value.rsqrt()
    assert roots[2] >= torch.lerp(roots[0], roots[1], share) - 1e-7


# ------------------------------------------------------------------------------------------------------------- game


def test_states_are_distributions_at_every_level():
    game = QueryGame(thresholds(3), budget=4)
    levels = game.state_probabilities(drawn_table(game), drawn(6, 3, seed=1))
    assert [level.shape[1] for level in levels] == [math.comb(t + 5, 5) for t in range(5)]
    for level in levels:
        assert (level.sum(-1) - 1).abs().max() < 1e-12


def played_out(game, table, theta, loss):
    """Walk through all sequences of queries and answers."""
    policy = TabularPolicy(table)
    hypotheses = game.hypotheses
    values = hypotheses @ theta

    def walk(positives, negatives, left):
        if not left:
            asked = positives + negatives
            estimate = torch.where(asked > 0, (positives - negatives) / asked.clamp_min(1), 0.0)
            scores = hypotheses @ estimate
            ties = [z for z in range(len(hypotheses)) if scores[z] > scores.max() - 1e-9]
            costs = [values.max() - values[z] if loss == "regret" else float(z != int(values.argmax())) for z in ties]
            return float(sum(costs)) / len(ties)
        total = 0.0
        for query, chance in enumerate(
            policy((positives + negatives)[None], (positives - negatives)[None])[0].tolist()
        ):
            step = torch.eye(len(theta), dtype=torch.float64)[query]
            right = (1 + theta[query].item()) / 2
            if chance:
                total += chance * right * walk(positives + step, negatives, left - 1)
                total += chance * (1 - right) * walk(positives, negatives + step, left - 1)
        return total

    nothing = torch.zeros(len(theta), dtype=torch.float64)
    return walk(nothing, nothing, game.budget)


@pytest.mark.parametrize("loss", ["error", "regret"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_loss_is_that_of_the_game_played_out(loss, deterministic):
    game = QueryGame(thresholds(2), budget=3, loss=loss)
    table = drawn_table(game)
    if deterministic:
        table = torch.nn.functional.one_hot(table.argmax(-1), 2).double()
    theta = drawn(4, 2, seed=3)
    found = game.loss(table, theta)
    for row in range(4):
        assert found[row].item() == pytest.approx(played_out(game, table, theta[row], loss), abs=1e-12)


@pytest.mark.parametrize("mean", [-0.8, 0.3, 1.0])
def test_one_answer_of_one_query_is_wrong_half_of_one_less_the_mean(mean):
    game = QueryGame(torch.tensor([[-1.0], [1.0]]), budget=1)
    theta = torch.tensor([[mean]], dtype=torch.float64)
    assert game.loss(game.table(uniform_allocation), theta).item() == pytest.approx((1 - abs(mean)) / 2, abs=1e-12)


def test_a_single_hypothesis_is_never_missed():
    game = QueryGame(torch.tensor([[1.0, -1.0]]), budget=3)
    assert game.loss(game.table(uniform_allocation), drawn(5, 2)).abs().max() == 0


def test_uniform_allocation_has_the_product_formula_of_binomials():
    """All labelings of two points, three answers each: the guess is right where both majorities are."""
    labels = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    game, theta = QueryGame(labels, budget=6), drawn(8, 2, seed=2)
    right = (1 + theta.abs()) / 2
    majority = right**3 + 3 * right**2 * (1 - right)
    found = game.loss(game.table(uniform_allocation), theta)
    assert torch.allclose(found, 1 - majority.prod(-1), atol=1e-12)


def test_the_gradients_of_the_loss_are_right():
    table, theta = drawn_table(SMALL).log().requires_grad_(), (0.9 * drawn(3, 2, seed=4)).requires_grad_()
    regret = QueryGame(thresholds(2), budget=3, loss="regret")
    assert torch.autograd.gradcheck(lambda logits, t: regret.loss(logits.softmax(-1), t), (table, theta))


# ---------------------------------------------------------------------------------------------------------- minimax


def all_deterministic(game):
    for choice in itertools.product(range(game.num_queries), repeat=len(game.counts)):
        yield torch.nn.functional.one_hot(torch.tensor(choice), game.num_queries).double()


def matrix_game(losses):
    rows, columns = losses.shape
    result = linprog(
        np.append(np.zeros(columns), 1.0),
        A_ub=np.hstack([losses, -np.ones((rows, 1))]),
        b_ub=np.zeros(rows),
        A_eq=np.append(np.ones(columns), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * columns + [(None, None)],
    )
    return result.fun


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shifted", [False, True])
def test_the_solution_is_the_minimax_over_all_mixtures_of_all_policies(seed, shifted):
    """Every one of the 2^5 deterministic policies of the game is listed, and the matrix game of them is solved."""
    game, theta = QueryGame(thresholds(2), budget=2), drawn(7, 2, seed=seed)
    offset = drawn(7, seed=seed + 1) / 10 if shifted else torch.zeros(7, dtype=torch.float64)
    losses = torch.stack([game.loss(table, theta) for table in all_deterministic(game)], 1) - offset[:, None]
    solution = game.solve(theta, offset=offset)
    assert solution.status is Stop.CONVERGED
    assert solution.value == pytest.approx(matrix_game(losses.numpy()), abs=1e-7)
    assert (game.loss(solution.table, theta) - offset).max().item() == pytest.approx(solution.value, abs=1e-9)
    assert (solution.weights @ losses).min().item() == pytest.approx(solution.lower, abs=1e-9)


def sequence_form(game, theta):
    """Solve for how often every state and query is reached: one linear program over all policies."""
    levels = [level.numpy() for level in game._levels]
    places = [{tuple(state): row for row, state in enumerate(level)} for level in levels]
    starts = np.cumsum([0] + [len(level) * game.num_queries for level in levels[:-1]])
    count = starts[-1] + len(levels[-1])
    rows, right = [], []
    for t, level in enumerate(levels):
        flows = np.zeros((len(level), count + 1))
        for row, state in enumerate(level):
            if t == game.budget:
                flows[row, starts[-1] + row] = 1
            else:
                flows[row, starts[t] + row * game.num_queries : starts[t] + (row + 1) * game.num_queries] = 1
            for part in np.flatnonzero(state):
                before = state.copy()
                before[part] -= 1
                query = part % game.num_queries
                flows[row, starts[t - 1] + places[t - 1][tuple(before)] * game.num_queries + query] -= 1
        rows.append(flows)
        right.append(np.full(len(level), float(t == 0)))
    losses = np.hstack([np.zeros((len(theta), starts[-1])), game._losses(theta).numpy(), -np.ones((len(theta), 1))])
    objective = np.append(np.zeros(count), 1.0)
    bounds = [(0, None)] * count + [(None, None)]
    return linprog(
        objective, losses, np.zeros(len(theta)), np.vstack(rows), np.concatenate(right), bounds, method="highs"
    ).fun


def test_the_solution_is_that_of_the_linear_program_over_how_often_states_are_reached():
    game = QueryGame(thresholds(3), budget=4)
    theta = game.classes.draw(20, radius=4.0, generator=seeded()).theta
    assert game.solve(theta).value == pytest.approx(sequence_form(game, theta), abs=1e-6)


def test_no_policy_beats_the_bayes_policy_on_its_mixture():
    game, theta = QueryGame(thresholds(2), budget=2), drawn(5, 2, seed=8)
    weights = drawn(5, seed=9).abs()
    bayes = (weights @ game.loss(game.best_response(weights, theta), theta)).item()
    assert bayes == pytest.approx(
        min((weights @ game.loss(table, theta)).item() for table in all_deterministic(game)), abs=1e-12
    )


def test_values_rise_with_the_class_and_the_joint_gap_is_the_least():
    """Two nested classes: the joint policy's gap is no larger than those of the policies made for one class."""
    game = QueryGame(thresholds(3), budget=5)
    easy, hard = (game.classes.draw(15, radius=radius, generator=seeded()).theta for radius in (3.0, 30.0))
    both = torch.cat([easy, hard])
    first, second = game.solve(easy), game.solve(both)
    assert first.value <= second.value
    offset = torch.tensor([first.value] * 15 + [second.value] * 15, dtype=torch.float64)
    joint = game.solve(both, offset=offset)
    gaps = [(game.loss(one.table, both) - offset).max().item() for one in (first, second)]
    assert joint.value + 1e-9 >= 0
    assert joint.value <= min(gaps) + 1e-7
    assert (game.loss(first.table, easy) - first.value).max().abs() < 1e-6


# ---------------------------------------------------------------------------------------------- classes and training


@pytest.mark.parametrize("hypotheses", [thresholds(4), torch.eye(4, dtype=torch.float64)], ids=["thresholds", "arms"])
@pytest.mark.parametrize("radius", [5.0, 20.0])
def test_instances_come_back_into_their_class_and_those_inside_stay(hypotheses, radius):
    game = QueryGame(hypotheses, budget=2)
    best = game.classes.feasible(radius).repeat(40)[:200]
    theta = game.classes.retract(3 * drawn(len(best), 4, seed=1), best, radius=radius)
    assert theta.abs().max() <= 1
    assert torch.equal((theta @ hypotheses.T).argmax(-1), best)
    assert complexity(theta, hypotheses).value.max() <= radius * (1 + 1e-9)
    inside = game.classes.retract(
        0.5 * theta + 0.5 * game.classes.retract(theta, best, radius=radius), best, radius=radius
    )
    assert torch.allclose(inside, theta, atol=1e-4)


def test_a_class_too_easy_for_the_box_is_empty():
    game = QueryGame(thresholds(4), budget=2)
    assert game.classes.feasible(1.6).tolist() == []
    assert game.classes.feasible(1.7).tolist() == [0, 4]
    with pytest.raises(ValueError, match="radius must be larger"):
        game.classes.draw(3, radius=1.6)
    with pytest.raises(ValueError, match=r"radius must be at least 2\.667"):
        game.classes.retract(drawn(1, 4), torch.tensor([2]), radius=2.0)


def test_the_worst_instances_are_in_the_class_and_worse_than_those_drawn():
    game = QueryGame(thresholds(3), budget=4)
    table = game.table(uniform_allocation)
    found, losses = game.worst_instances(table, radius=4.0, restarts=32, num_steps=30, generator=seeded())
    start = game.classes.draw(32, radius=4.0, generator=seeded())
    assert (losses >= game.loss(table, start.theta)).all()
    assert torch.allclose(game.loss(table, found.theta), losses, atol=1e-12)
    assert losses.max() > game.loss(table, start.theta).max() + 1e-3
    assert complexity(found.theta, game.hypotheses).value.max() <= 4 * (1 + 1e-9)


def test_a_trained_policy_is_more_robust_than_uniform_allocation_and_bisection():
    game = QueryGame(thresholds(3), budget=5)
    torch.manual_seed(0)
    policy = QueryNetwork(3, budget=5, hidden=(64, 64))
    train_robust_policy(
        policy, game, radii=torch.tensor([4.0]), num_steps=80, num_instances=32, lr=1e-2, generator=seeded()
    )
    search = functools.partial(generalized_binary_search, hypotheses=game.hypotheses)
    worst = [
        game.worst_instances(game.table(one).detach(), radius=4.0, restarts=32, num_steps=30, generator=seeded(1))[
            1
        ].max()
        for one in (policy, uniform_allocation, search)
    ]
    assert worst[0] < min(worst[1:])


def test_training_takes_the_values_of_classes_off():
    game = QueryGame(thresholds(2), budget=2)
    radii, values = torch.tensor([4.0, 8.0]), torch.tensor([0.1, 0.2])
    torch.manual_seed(0)
    policy = QueryNetwork(2, budget=2, hidden=(8,))
    report = train_robust_policy(
        policy, game, radii=radii, values=values, num_instances=8, num_steps=2, generator=seeded()
    )
    plain = game.loss(game.table(policy), report.instances.theta)
    assert torch.allclose(plain - report.losses, torch.tensor([0.1] * 4 + [0.2] * 4, dtype=torch.float64), atol=1e-6)
    assert complexity(report.instances.theta[:4], game.hypotheses).value.max() <= 4 * (1 + 1e-9)


# --------------------------------------------------------------------------------------------------------- policies


def test_search_halves_and_is_uncertainty_sampling():
    hypotheses = thresholds(7)
    positives, negatives = drawn(20, 7).abs().mul(3).round(), drawn(20, 7, seed=1).abs().mul(3).round()
    found = generalized_binary_search(
        positives + negatives, positives - negatives, hypotheses=hypotheses, sharpness=0.7
    )
    for row in range(20):
        wrong = 1 / (1 + math.exp(1.4))
        likelihood = torch.ones(8, dtype=torch.float64)
        for query in range(7):
            fits = torch.where(hypotheses[:, query] > 0, 1 - wrong, wrong)
            likelihood *= fits ** positives[row, query] * (1 - fits) ** negatives[row, query]
        chance = (likelihood / likelihood.sum()) @ (hypotheses > 0).double()
        unsure = (chance - 0.5).abs()
        assert torch.equal(found[row] > 0, unsure < unsure.min() + 1e-9)
    nothing = torch.zeros(1, 7)
    assert generalized_binary_search(nothing, nothing, hypotheses=hypotheses)[0].argmax() == 3


def test_a_learner_plays_the_game_of_the_table():
    """Over many plays its guesses are wrong as often as the table says."""
    table, theta = SMALL.solve(drawn(4, 2, seed=3)).table, torch.tensor([0.5, -0.2], dtype=torch.float64)
    generator = seeded()
    wrong, plays = 0, 1500
    best = int((SMALL.hypotheses @ theta).argmax())
    for _ in range(plays):
        learner = ActiveLearner(SMALL.hypotheses, policy=TabularPolicy(table), budget=3, generator=generator)
        noise = torch.rand(3, generator=generator).tolist()
        wrong += best != learner.run(
            lambda query, noise=noise: 1 if noise.pop() < (1 + float(theta[query])) / 2 else -1
        )
    wanted = SMALL.loss(table, theta[None]).item()
    assert abs(wrong / plays - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / plays)


def test_a_learner_can_be_taken_up_again():
    first, second = (
        ActiveLearner(thresholds(3), policy=uniform_allocation, budget=4, generator=seeded()) for _ in range(2)
    )
    first.tell(1 if first.ask() else -1)
    query = first.ask()
    assert first.ask() == query
    second.load_state_dict(first.state_dict())
    assert second.ask() == query
    first.tell(1)
    assert second.num_answers == 1
    assert first.num_answers == 2


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: complexity(torch.tensor([1.0, 1.0]), torch.eye(2)), "unique best"),
        (lambda: complexity(torch.tensor([1.0, 0.0]), torch.ones(2, 2)), "all be different"),
        (lambda: complexity(torch.tensor([1.0, 0.0]), torch.eye(2), queries=torch.tensor([[1.0, 0.0]])), "span"),
        (lambda: complexity(torch.ones(3), torch.eye(2)), "shape"),
        (lambda: QueryGame(torch.tensor([[0.0], [1.0], [2.0]]), budget=1), "two values"),
        (lambda: QueryGame(thresholds(10), budget=20), "states"),
        (lambda: QueryGame(thresholds(2), budget=0), "budget must be at least 1"),
        (lambda: QueryGame(thresholds(2), budget=1, loss="hinge"), "loss must be one of"),
        (lambda: SMALL.loss(torch.ones_like(SMALL.counts), drawn(1, 2)), "add up to 1"),
        (lambda: SMALL.loss(drawn_table(SMALL), 2 + drawn(1, 2)), r"\[-1, 1\]"),
        (lambda: TabularPolicy(drawn_table(SMALL))(torch.full((1, 2), 3.0), torch.ones(1, 2)), "table ends"),
        (lambda: TabularPolicy(drawn_table(SMALL))(torch.ones(1, 2), torch.zeros(1, 2)), "sums must be"),
        (lambda: ActiveLearner(thresholds(2), policy=uniform_allocation, budget=1).tell(0), "1 or -1"),
    ],
)
def test_what_makes_no_game_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_learner_neither_hears_nor_asks_out_of_turn():
    learner = ActiveLearner(thresholds(2), policy=uniform_allocation, budget=1)
    with pytest.raises(RuntimeError, match="ask first"):
        learner.tell(1)
    learner.ask()
    learner.tell(1)
    with pytest.raises(RuntimeError, match="is spent"):
        learner.ask()
