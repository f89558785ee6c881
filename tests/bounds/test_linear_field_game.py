"""The field game against enumeration in rational numbers, and elimination against substitution."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.bounds import LinearFieldGame, solve_over_field, uniform_failure_bound

PRIMES = [2, 3, 5, 7, 101, 4093, 4099, 1_000_003]


def rank_of(rows, order):
    """Rank by elimination on plain integers."""
    rows, rank = [list(row) for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column] % order), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, order)
        rows[rank] = [value * inverse % order for value in rows[rank]]
        for i in range(len(rows)):
            if i != rank:
                factor = rows[i][column]
                rows[i] = [(a - factor * b) % order for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def everything(order, dimension, examples):
    """All inputs of the game, all coefficients, and the labels they give."""
    vectors = list(itertools.product(range(order), repeat=dimension))
    for inputs in itertools.product(vectors, repeat=examples):
        yield (
            inputs,
            [
                (world_zero, a, tuple(sum(x * y for x, y in zip(row, a, strict=True)) % order for row in inputs))
                for a in vectors
                for world_zero in [not any(a[examples:])]
            ],
        )


@pytest.mark.parametrize(("order", "closed"), [(2, 0.6173065), (3, 0.7031826), (5, 0.8079854), (7, 0.8600570)])
def test_the_recovery_probability_is_the_mean_of_q_to_minus_the_corank(order, closed):
    game = LinearFieldGame(order, dimension=9, examples=5)
    assert game.recovery_probability() == pytest.approx(closed, abs=1e-6)
    law = game.corank_law()
    assert sum(law) == pytest.approx(1, abs=1e-12)
    for corank, chance in enumerate(law):
        product = float(order) ** -(corank**2)
        for step in range(5 - corank):
            product *= (1 - order ** (step - 5.0)) ** 2 / (1 - order ** (step - 5.0 + corank))
        assert chance == pytest.approx(product, rel=1e-9)


@pytest.mark.parametrize(("order", "limit"), [(2, 0.6103), (3, 0.7023), (5, 0.8079), (7, 0.8600)])
def test_the_recovery_probability_has_the_paper_s_limits(order, limit):
    assert LinearFieldGame(order, dimension=40, examples=30).recovery_probability() == pytest.approx(limit, abs=6e-5)


@pytest.mark.parametrize(("order", "dimension", "examples"), [(2, 3, 2), (2, 2, 2), (3, 2, 1), (2, 4, 1), (2, 3, 1)])
def test_total_variation_and_least_failure_are_those_of_enumeration(order, dimension, examples):
    """Every training set of both worlds, every answer the algorithm could be given an estimate for."""
    game = LinearFieldGame(order, dimension=dimension, examples=examples)
    size = Fraction(order) ** (dimension * examples)
    fit = game.erm()
    distance = failures = recovered = by_rank = Fraction(0)
    for inputs, worlds in everything(order, dimension, examples):
        block = [row[:examples] for row in inputs]
        by_rank += Fraction(order) ** (rank_of(block, order) - rank_of(inputs, order)) / size
        tensor = torch.tensor(inputs).reshape(1, examples, dimension)
        for labels in {labels for _, _, labels in worlds}:
            answer = tuple(fit(tensor, torch.tensor([labels]))[0].tolist())
            mass = {}
            for world, weight in ((0, Fraction(order) ** -examples), (1, Fraction(order) ** -dimension)):
                behind = [a for zero, a, found in worlds if found == labels and (world == 1 or zero)]
                mass[world, True] = weight * sum(a == answer for a in behind)
                mass[world, False] = weight * sum(a != answer for a in behind)
            likelihood = [mass[world, True] + mass[world, False] for world in (0, 1)]
            distance += abs(likelihood[0] - likelihood[1]) / 2 / size
            # An estimate below the middle fails where the answer is wrong, one above it where it is right.
            failures += min(mass[0, True] + mass[1, True], mass[0, False] + mass[1, False]) / size
            recovered += mass[0, True] / size
    assert game.total_variation() == pytest.approx(float(distance), abs=1e-12)
    assert game.total_variation() == pytest.approx(float(1 - by_rank), abs=1e-12)
    assert game.failure_floor() == pytest.approx(float(failures), abs=1e-12)
    assert game.recovery_probability() == pytest.approx(float(recovered), abs=1e-12)


@pytest.mark.parametrize("order", [2, 3, 5])
def test_the_floor_is_met_by_the_constant_estimate_and_by_no_other_tried(order):
    game = LinearFieldGame(order, dimension=24, examples=8)
    generator = torch.Generator().manual_seed(order)
    error = 2 * game.tolerance
    estimators = {
        "high": lambda inputs, labels, found: torch.full((len(labels),), error),
        "low": lambda inputs, labels, found: torch.zeros(len(labels)),
        "middle": lambda inputs, labels, found: torch.full((len(labels),), error / 2),
        "rank": lambda inputs, labels, found: (
            error * (solve_over_field(inputs[..., :8], labels, order=order).rank < 8).double()
        ),
    }
    trials, sums = 4000, {}
    for name, estimator in estimators.items():
        report = game.evaluate(game.erm(), estimator, trials=trials, generator=generator)
        sums[name] = report.failure_sum
    spread = 3 * (0.5 / trials**0.5)
    assert abs(sums["high"] - game.failure_floor()) < spread
    assert min(sums.values()) > game.failure_floor() - spread
    assert sums["middle"] == 2.0


@pytest.mark.parametrize("order", [2, 3])
def test_simulated_rates_are_the_exact_ones_within_three_standard_errors(order):
    game = LinearFieldGame(order, dimension=40, examples=12)
    trials = 4000
    report = game.evaluate(
        game.erm(),
        lambda inputs, labels, found: torch.zeros(len(labels)),
        trials=trials,
        generator=torch.Generator().manual_seed(0),
    )
    expected = game.recovery_probability()
    error = 3 * (expected * (1 - expected) / trials) ** 0.5
    assert report.exact[0] == pytest.approx(expected, abs=error)
    assert report.preferred[0] == 1.0
    assert report.preferred[1] == pytest.approx(1 - game.total_variation(), abs=error)
    assert report.exact[1] < 0.01
    assert report.loss[1] == pytest.approx(1 - 1 / order, abs=0.01)


def test_an_algorithm_may_prefer_any_coordinates():
    game = LinearFieldGame(3, dimension=6, examples=3)
    inputs, _, _ = game.sample(1, 300, generator=torch.Generator().manual_seed(0))
    preferred = torch.tensor([5, 1, 3])
    hidden = torch.zeros(300, 6, dtype=torch.int64)
    hidden[:, preferred] = torch.randint(3, (300, 3), generator=torch.Generator().manual_seed(1))
    labels = (inputs * hidden[:, None]).sum(-1) % 3
    found = game.erm(preferred)(inputs, labels)
    assert not found[:, [0, 2, 4]].any()
    assert torch.equal((inputs * found[:, None]).sum(-1) % 3, labels)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRIMES),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_elimination_solves_what_can_be_solved_and_says_what_cannot(order, rows, columns, systems, seed, sparse):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-order, 2 * order, (systems, rows, columns), generator=generator)
    if sparse:
        matrix *= torch.randint(2, matrix.shape, generator=generator)
    values = torch.randint(order, (systems, rows), generator=generator)
    found = solve_over_field(matrix, values, order=order)
    for one, right, solution, consistent, rank in zip(
        matrix.tolist(),
        values.tolist(),
        found.solution.tolist(),
        found.consistent.tolist(),
        found.rank.tolist(),
        strict=True,
    ):
        assert rank == rank_of(one, order)
        joined = [[*row, value] for row, value in zip(one, right, strict=True)]
        assert consistent == (rank_of(joined, order) == rank)
        assert all(0 <= value < order for value in solution)
        if consistent:
            for row, value in zip(one, right, strict=True):
                assert sum(a * b for a, b in zip(row, solution, strict=True)) % order == value


def test_elimination_uses_the_first_columns_where_they_suffice():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(2, (500, 4, 9), generator=generator)
    hidden = torch.randint(2, (500, 4), generator=generator)
    values = (matrix[..., :4] * hidden[:, None]).sum(-1) % 2
    found = solve_over_field(matrix, values, order=2)
    assert found.consistent.all()
    assert not found.solution[:, 4:].any()


def test_the_general_bound_is_one_less_all_that_can_tell_the_families_apart():
    found = uniform_failure_bound(0.2, low_loss=0.1, high_loss=0.5, low_failure=0.1, high_failure=0.05)
    assert found.tolerance == pytest.approx(0.2)
    assert found.failures == pytest.approx(0.65)
    assert uniform_failure_bound(0.9, low_loss=0.0, high_loss=1.0, low_failure=0.2).failures == 0.0


def test_the_general_bound_holds_in_the_field_game_and_the_game_s_own_is_sharper():
    game = LinearFieldGame(5, dimension=30, examples=10)
    general = uniform_failure_bound(
        game.total_variation(),
        low_loss=0.0,
        high_loss=0.8,
        low_failure=1 - game.recovery_probability(),
        high_failure=5.0**-20,
    )
    assert general.tolerance == pytest.approx(game.tolerance)
    assert 0.5 < general.failures < game.failure_floor()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearFieldGame(4, dimension=3, examples=2), "prime"),
        (lambda: LinearFieldGame(1, dimension=3, examples=2), "prime"),
        (lambda: LinearFieldGame(67_108_879, dimension=3, examples=2), r"2\*\*26"),
        (lambda: LinearFieldGame(2, dimension=3, examples=4), "at most dimension"),
        (lambda: LinearFieldGame(2, dimension=3, examples=0), "examples"),
        (lambda: LinearFieldGame(2, dimension=3, examples=2).sample(2, 5), "world"),
        (lambda: LinearFieldGame(2, dimension=3, examples=2).erm(torch.tensor([0, 3])), "preferred"),
        (lambda: LinearFieldGame(2, dimension=3, examples=2).erm(torch.tensor([1, 1])), "twice"),
        (lambda: solve_over_field(torch.ones(2, 2).long(), torch.ones(2).long(), order=2), "shape"),
        (lambda: uniform_failure_bound(1.5, low_loss=0.0, high_loss=1.0), "total_variation"),
        (lambda: uniform_failure_bound(float("nan"), low_loss=0.0, high_loss=1.0), "total_variation"),
        (lambda: uniform_failure_bound(0.5, low_loss=0.5, high_loss=0.5), "high_loss"),
    ],
)
def test_impossible_games_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
def test_floats_are_no_field_elements_and_odd_algorithms_and_estimates_are_refused():
    with pytest.raises(TypeError, match="integer"):
        LinearFieldGame(2.0, dimension=3, examples=2)
    with pytest.raises(TypeError, match="integer dtype"):
        solve_over_field(torch.ones(1, 2, 2), torch.ones(1, 2).long(), order=2)
    game = LinearFieldGame(2, dimension=3, examples=2)
    with pytest.raises(ValueError, match="coefficients of shape"):
        game.evaluate(lambda inputs, labels: labels, lambda *_: torch.zeros(5), trials=5)
    with pytest.raises(ValueError, match="estimator must return"):
        game.evaluate(game.erm(), lambda *_: torch.zeros(4), trials=5)
    with pytest.raises(ValueError, match="NaN"):
        game.evaluate(game.erm(), lambda *_: torch.full((5,), float("nan")), trials=5)
