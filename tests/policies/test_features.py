"""Rows of features: all monomials and no others, and histories that never cross from one episode to the next."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.policies import Transitions, history_rows, logged_rows, monomials
from minimand.policies.features import feature_limits, pair_rows


def log(action=None, length=4):
    last = torch.arange(1, 2 * length + 1) % length == 0
    state = torch.arange(4.0 * length).view(-1, 2)
    action = state[:, :1] / 10 if action is None else action
    return Transitions(state, action, state[:, 0], state + 1, last, torch.zeros_like(last))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4))
def test_monomials_are_all_products_of_powers_up_to_the_degree_each_once(features, degree):
    rows = torch.randn(3, features, generator=torch.Generator().manual_seed(features), dtype=torch.float64)
    exponents = [e for e in itertools.product(range(degree + 1), repeat=features) if sum(e) <= degree]
    wanted = torch.stack([(rows ** torch.tensor(e)).prod(1) for e in exponents], 1)
    found = monomials(rows, degree=degree)
    assert found.shape[1] == len(exponents) == math.comb(features + degree, degree)
    torch.testing.assert_close(found.sort(1).values, wanted.sort(1).values)
    assert torch.equal(found[:, 0], torch.ones_like(found[:, 0]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_a_history_is_the_last_rows_of_its_own_episode_with_the_first_one_repeated(lengths, length):
    rows = torch.arange(2.0 * sum(lengths)).view(-1, 2)
    starts = torch.cat([torch.arange(n) == 0 for n in lengths])
    wanted, first = [], 0
    for n in lengths:
        wanted += [torch.cat([rows[first + max(t - back, 0)] for back in reversed(range(length))]) for t in range(n)]
        first += n
    assert torch.equal(history_rows(rows, starts, length=length), torch.stack(wanted))


def test_logged_rows_are_states_beside_actions_and_choices_are_features():
    vectors = log()
    assert torch.equal(logged_rows(vectors), torch.cat([vectors.observation, vectors.action], 1))
    two = logged_rows(vectors, history=2)
    assert torch.equal(two[4], torch.cat([logged_rows(vectors)[4]] * 2))  # a new episode knows nothing of the last
    assert torch.equal(two[5], torch.cat([logged_rows(vectors)[4], logged_rows(vectors)[5]]))
    choices = logged_rows(log(torch.arange(8) % 3), num_actions=3)
    assert torch.equal(choices[:, 2:].argmax(1), torch.arange(8) % 3)
    assert torch.equal(choices[:, 2:].sum(1), torch.ones(8))


def test_limits_put_every_feature_into_minus_one_to_one():
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 0.0]) + 5
    center, half = feature_limits(rows)
    scaled = (rows - center) / half
    torch.testing.assert_close(scaled.aminmax(dim=0).min[:2], torch.full((2,), -1.0))
    torch.testing.assert_close(scaled.aminmax(dim=0).max[:2], torch.full((2,), 1.0))
    assert torch.equal(scaled[:, 2], torch.zeros(50))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: monomials(torch.zeros(3), degree=1), ValueError, "rows must have shape"),
        (lambda: monomials(torch.zeros(3, 1), degree=-1), ValueError, "degree must be"),
        (lambda: monomials(torch.zeros(3, 1).long(), degree=1), TypeError, "floating"),
        (lambda: history_rows(torch.zeros(2, 1), torch.tensor([False, True]), length=1), ValueError, "first row"),
        (lambda: history_rows(torch.zeros(2, 1), torch.tensor([True]), length=1), ValueError, "starts must be"),
        (lambda: history_rows(torch.zeros(2, 1), torch.tensor([True, True]), length=0), ValueError, "length must"),
        (lambda: logged_rows(log(torch.arange(8) % 3)), ValueError, "num_actions be given"),
        (lambda: logged_rows(log(), num_actions=3), ValueError, "must hold choices"),
        (lambda: logged_rows(log(torch.arange(8) % 3), num_actions=2), ValueError, r"must lie in \[0, 1\]"),
        (lambda: pair_rows(torch.zeros(2), torch.zeros(2, 1)), ValueError, "observation must have shape"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
