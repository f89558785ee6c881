"""The search asks what Nelder and Mead's simplex asks, never the same question twice, and can be taken up again."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from minimand.preferences import ThresholdSearch
from minimand.stopping import Stop

BOX = torch.tensor([[-3.0, 3.0], [-3.0, 3.0]], dtype=torch.float64)


def rosenbrock(theta):
    return float(100 * (theta[1] - theta[0] ** 2) ** 2 + (1 - theta[0]) ** 2)


def quadratic(theta, *, center=(0.7, 0.6, -0.2)):
    away = np.asarray(theta) - np.asarray(center[: len(theta)])
    return float(away @ away + 0.5 * away.sum() ** 2)


def asked(search, function, *, most=10_000):
    """Run a search to minimise and return every point it asked for."""
    points = []
    while search.status is None and len(points) < most:
        points.append(search.ask())
        search.tell(-function(points[-1].numpy()))
    return torch.stack(points)


def scipys(function, simplex, bounds, **options):
    points = []

    def traced(theta):
        points.append(theta.copy())
        return function(theta)

    minimize(
        traced,
        simplex[0],
        method="Nelder-Mead",
        bounds=bounds.tolist(),
        options={"initial_simplex": simplex, "maxfev": 10_000, "maxiter": 10_000} | options,
    )
    return np.stack(points)


def simplex_of(seed, count=2, low=-1.0, high=1.0):
    return low + (high - low) * torch.rand(
        count + 1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def assert_same_questions(function, initial, bounds, *, most):
    """Same start, no other end than the number of questions: the whole trace agrees, but that scipy repeats itself."""
    search = ThresholdSearch(bounds, initial=initial, tolerance=0.0, cache_tolerance=1e-12, max_iter=most)
    ours = asked(search, function).numpy()
    peer = scipys(function, initial.numpy(), bounds, xatol=0.0, fatol=0.0, maxfev=most)
    new = [all(np.abs(peer[:row] - peer[row]).max(1) > 1e-11) if row else True for row in range(most)]
    assert search.iterations == most
    assert len(ours) == sum(new)
    assert np.abs(ours - peer[new]).max() < 1e-9


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_question_is_scipys_on_a_quadratic(seed, count):
    bounds = torch.tensor([[-3.0, 3.0]] * count, dtype=torch.float64)
    assert_same_questions(quadratic, simplex_of(seed, count), bounds, most=40 if count > 1 else 20)


@pytest.mark.parametrize("seed", range(5))
def test_every_question_is_scipys_in_a_bent_valley(seed):
    assert_same_questions(rosenbrock, simplex_of(seed), BOX, most=60)


@pytest.mark.parametrize("seed", range(5))
def test_every_question_is_scipys_at_the_walls_of_the_box(seed):
    bounds = torch.tensor([[-2.0, 0.5], [-2.0, 2.0]], dtype=torch.float64)
    assert_same_questions(rosenbrock, simplex_of(seed, low=-2.0, high=0.5), bounds, most=60)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_bottom_of_rosenbrocks_valley(seed):
    search = ThresholdSearch(
        BOX, generator=torch.Generator().manual_seed(seed), tolerance=0.0, cache_tolerance=1e-6, max_iter=2000
    )
    found = search.run(lambda theta: -rosenbrock(theta.numpy()))
    assert found.status is Stop.CONVERGED
    assert (found.thresholds - 1).abs().max() < 1e-4
    assert found.evaluation > -1e-8


def test_the_first_questions_are_the_vertices_of_the_simplex():
    initial = simplex_of(0)
    assert torch.equal(asked(ThresholdSearch(BOX, initial=initial, max_iter=3), quadratic), initial)


def test_drawn_vertices_lie_in_the_box_and_follow_the_seed():
    bounds = torch.tensor([[0.2, 0.3], [5.0, 9.0]])

    def first(seed):
        search = ThresholdSearch(bounds, generator=torch.Generator().manual_seed(seed), max_iter=3)
        return asked(search, lambda theta: float(theta.sum()))

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert ((first(1) >= bounds[:, 0]) & (first(1) <= bounds[:, 1])).all()


def test_a_question_close_to_an_old_one_is_answered_from_the_cache():
    search = ThresholdSearch(BOX, initial=simplex_of(1), tolerance=0.0, cache_tolerance=0.01)
    points = asked(search, quadratic)
    apart = (points[:, None] - points).abs().amax(-1) / 6  # in shares of the box
    apart.fill_diagonal_(1.0)
    assert apart.min() > 0.01
    assert search.evaluations == len(points) < search.iterations
    assert search.status is Stop.CONVERGED


@pytest.mark.parametrize("seed", range(10))
def test_a_cached_search_still_ends_near_the_best(seed):
    search = ThresholdSearch(BOX, generator=torch.Generator().manual_seed(seed), tolerance=1e-3)
    found = search.run(lambda theta: -quadratic(theta.numpy()))
    assert found.status is Stop.CONVERGED
    assert found.evaluation > -0.02


def test_it_converges_when_the_evaluations_on_the_simplex_agree():
    search = ThresholdSearch(BOX, initial=simplex_of(2), tolerance=0.05, cache_tolerance=0.0)
    found = search.run(lambda theta: -quadratic(theta.numpy()))
    assert found.status is Stop.CONVERGED
    assert found.spread < 0.05
    again = ThresholdSearch(BOX, initial=simplex_of(2), tolerance=found.spread, cache_tolerance=0.0)
    assert again.run(lambda theta: -quadratic(theta.numpy())).evaluations > found.evaluations


def test_the_spread_is_the_standard_deviation_on_the_simplex():
    initial = simplex_of(2)
    values = [-quadratic(vertex.numpy()) for vertex in initial]
    spread = float(np.std(values, ddof=1))
    search = ThresholdSearch(BOX, initial=initial, tolerance=1.001 * spread)
    for value in values:
        search.tell(value)
    assert search.status is Stop.CONVERGED
    assert search.result.spread == pytest.approx(spread)
    again = ThresholdSearch(BOX, initial=initial, tolerance=0.999 * spread)
    for value in values:
        again.tell(value)
    assert again.status is None


def test_the_result_is_the_best_of_what_was_told_and_ask_goes_on_with_it():
    search = ThresholdSearch(BOX, initial=simplex_of(3), max_iter=12)
    told = []
    while search.status is None:
        told.append((search.ask(), -rosenbrock(search.ask().numpy())))
        search.tell(told[-1][1])
        assert torch.equal(search.best, max(told, key=lambda pair: pair[1])[0])
    best = max(told, key=lambda pair: pair[1])
    assert search.status is Stop.ITERATION_LIMIT
    assert torch.equal(search.result.thresholds, best[0])
    assert torch.equal(search.ask(), best[0])
    assert search.result.evaluation == best[1]


def test_asking_again_asks_the_same_and_what_is_done_to_the_answer_does_no_harm():
    search = ThresholdSearch(BOX, initial=simplex_of(4))
    search.ask().zero_()
    assert torch.equal(search.ask(), simplex_of(4)[0])


@pytest.mark.parametrize("told", [0, 1, 5, 17])
def test_a_search_taken_up_again_asks_on_as_if_never_left(told):
    search = ThresholdSearch(BOX, initial=simplex_of(5), max_iter=40)
    for _ in range(told):
        search.tell(-rosenbrock(search.ask().numpy()))
    other = ThresholdSearch(BOX, generator=torch.Generator().manual_seed(9), max_iter=40)
    other.load_state_dict(copy.deepcopy(search.state_dict()))
    assert other.iterations == search.iterations
    assert torch.equal(asked(other, rosenbrock), asked(search, rosenbrock))
    assert other.result.evaluation == search.result.evaluation


def test_thresholds_come_in_the_dtype_of_the_bounds():
    for dtype in (torch.float32, torch.float64):
        assert ThresholdSearch(BOX.to(dtype)).ask().dtype == dtype


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ThresholdSearch(torch.ones(2)), "bounds must have shape"),
        (lambda: ThresholdSearch(torch.ones(2, 2)), "bounds must rise"),
        (lambda: ThresholdSearch(torch.tensor([[0.0, float("inf")]])), "bounds contains NaN"),
        (lambda: ThresholdSearch(BOX, initial=torch.zeros(2, 2).double()), "initial must have shape"),
        (lambda: ThresholdSearch(BOX, initial=4 * simplex_of(0).sign()), "inside the bounds"),
        (lambda: ThresholdSearch(BOX, initial=torch.zeros(3, 2).double()), "simplex with a volume"),
        (lambda: ThresholdSearch(BOX, tolerance=-1.0), "tolerance"),
        (lambda: ThresholdSearch(BOX, cache_tolerance=-1.0), "cache_tolerance"),
        (lambda: ThresholdSearch(BOX, max_iter=-1), "max_iter"),
        (lambda: ThresholdSearch(BOX).tell(float("nan")), "evaluation must be a finite number"),
        (lambda: ThresholdSearch(BOX).load_state_dict({"initial": torch.ones(2, 1), "told": []}), "simplex of shape"),
        (
            lambda: ThresholdSearch(BOX, max_iter=2).load_state_dict({"initial": simplex_of(0), "told": [1.0] * 3}),
            "ends earlier",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_search_that_is_over_is_told_nothing_and_one_that_goes_on_has_no_result():
    with pytest.raises(RuntimeError, match="goes on"):
        _ = ThresholdSearch(BOX).result
    search = ThresholdSearch(BOX, max_iter=0)
    with pytest.raises(RuntimeError, match="over"):
        search.tell(1.0)
    assert search.result.evaluation == -float("inf")
