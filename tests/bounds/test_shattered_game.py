"""The game of random labels by enumeration in rational numbers."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch

from minimand.bounds import ShatteredGame

POINTS = 4


def laws(points, examples):
    """The exact joint law of (training set, function, true labels) in each world."""
    labelings = list(itertools.product((0, 1), repeat=points))
    draws = list(itertools.product(range(points), repeat=examples))
    zero, one = Counter(), Counter()
    for truth in labelings:
        for drawn in draws:
            weight = Fraction(1, len(labelings) * len(draws))
            sample = tuple((place, truth[place]) for place in drawn)
            zero[sample, truth, truth] += weight
            posterior = [guess for guess in labelings if all(guess[place] == label for place, label in sample)]
            for guess in posterior:
                one[sample, guess, truth] += weight / len(posterior)
    return zero, one


def seen_by_an_estimate(law):
    found = Counter()
    for (sample, learnt, _), weight in law.items():
        found[sample, learnt] += weight
    return found


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_the_law_of_training_set_and_function_is_the_same_in_both_worlds(examples):
    zero, one = laws(POINTS, examples)
    assert seen_by_an_estimate(zero) == seen_by_an_estimate(one)
    assert sum(one.values()) == 1


@pytest.mark.parametrize("examples", [1, 2, 3])
@pytest.mark.parametrize("tolerance", [Fraction(0), Fraction(1, 8), Fraction(1, 5), Fraction(1, 4), Fraction(2, 5)])
def test_no_estimate_fails_less_than_the_floor_and_the_constant_one_attains_it(examples, tolerance):
    """For each training set and function, all estimates that differ in which errors they are near to are tried."""
    zero, one = laws(POINTS, examples)
    candidates = {Fraction(k, POINTS) + sign * tolerance for k in range(POINTS + 1) for sign in (-1, 0, 1)}
    least, constant = Fraction(0), Fraction(0)
    masses = {}
    for law in (zero, one):
        for (sample, learnt, truth), weight in law.items():
            error = Fraction(sum(a != b for a, b in zip(learnt, truth, strict=True)), POINTS)
            masses.setdefault((sample, learnt), Counter())[error] += weight

    def failing(errors, estimate):
        return sum(weight for error, weight in errors.items() if abs(estimate - error) > tolerance)

    for errors in masses.values():
        least += min(failing(errors, estimate) for estimate in candidates)
        constant += failing(errors, tolerance)
    game = ShatteredGame(POINTS, examples=examples)
    assert game.failure_floor(float(tolerance)) == pytest.approx(float(least), abs=1e-12)
    assert constant == least


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_one_of_two_worlds_fails_half_of_what_the_second_loses(examples):
    """The general theorem with a = the tolerance doubled: q = P(error > a), and some world fails with q / 2."""
    _, one = laws(POINTS, examples)
    tolerance = Fraction(1, 8)
    q = sum(
        weight
        for (_, learnt, truth), weight in one.items()
        if Fraction(sum(a != b for a, b in zip(learnt, truth, strict=True)), POINTS) > 2 * tolerance
    )
    assert ShatteredGame(POINTS, examples=examples).failure_floor(float(tolerance)) / 2 >= float(q) / 2 - 1e-12
    assert q > 0


def test_the_number_of_unseen_points_has_its_exact_law():
    game = ShatteredGame(5, examples=3)
    counted = Counter(5 - len(set(drawn)) for drawn in itertools.product(range(5), repeat=3))
    assert game.unseen_law().tolist() == pytest.approx([counted[unseen] / 125 for unseen in range(6)], abs=1e-14)


def test_large_domains_fail_almost_surely_below_a_quarter():
    assert ShatteredGame(2000, examples=20).failure_floor(0.23) > 0.99
    assert ShatteredGame(2000, examples=20).failure_floor(0.27) < 0.01
    # Half of the points seen at most: an eighth, as in the paper.
    assert ShatteredGame(1000, examples=500).failure_floor(0.12) > 0.99


def test_simulated_failures_meet_the_floor():
    game = ShatteredGame(30, examples=10)
    generator = torch.Generator().manual_seed(0)
    trials = 4000
    for name, estimator in {
        "constant": lambda seen, learnt: torch.full((len(seen),), 0.15),
        "unseen": lambda seen, learnt: (~seen).double().mean(1) / 2,
        "ones": lambda seen, learnt: learnt.double().mean(1) / 2,
    }.items():
        failures = game.evaluate(estimator, tolerance=0.15, trials=trials, generator=generator)
        assert sum(failures) > game.failure_floor(0.15) - 3 * 0.5 / trials**0.5
        if name == "constant":
            assert failures[0] == 0.0
            assert failures[1] == pytest.approx(game.failure_floor(0.15), abs=3 * 0.5 / trials**0.5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShatteredGame(0, examples=1), "points"),
        (lambda: ShatteredGame(3, examples=1.5), "examples"),
        (lambda: ShatteredGame(3, examples=1).failure_floor(float("nan")), "tolerance"),
        (lambda: ShatteredGame(3, examples=1).sample(2, 1), "world"),
        (
            lambda: ShatteredGame(3, examples=1).evaluate(
                lambda seen, learnt: seen[:, 0] / 0.0 * 0.0, tolerance=0.1, trials=3
            ),
            "NaN",
        ),
    ],
)
def test_impossible_games_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
