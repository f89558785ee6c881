"""Models of transitions: the nearest logged row, whole, and regressions that recover polynomial dynamics exactly."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from minimand.policies import NearestNeighborModel, RegressionModel, Transitions, monomials


def log(count=120, seed=0, terminated=False, choices=None):
    """Quadratic dynamics without noise, in features of unlike ranges."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 50.0])
    action = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    if choices is not None:
        action = torch.randint(choices, (count,), generator=generator)
    pushed = action[:, 0] if choices is None else action.double()
    following = torch.stack([state[:, 0] + pushed * state[:, 1], state[:, 1] - pushed.square()], 1)
    ends = torch.arange(1, count + 1) % 10 == 0
    done = ends & terminated
    cost = torch.stack([following[:, 0], state[:, 0]], 1)
    return Transitions(state, action, state[:, 0] * pushed, following, done, ends & ~done, cost)


def fields(found):
    return found.next_observation, found.reward, found.cost, found.terminated


@pytest.mark.parametrize("choices", [None, 3])
def test_a_logged_pair_is_answered_by_what_followed_it_every_field_of_the_same_row(choices):
    data = log(terminated=True, choices=choices)
    model = NearestNeighborModel(num_actions=choices).fit(data)
    wanted = (data.next_observation, data.reward, data.cost, data.terminated)
    for found, field in zip(fields(model(data.observation, data.action)), wanted, strict=True):
        assert torch.equal(found, field)


def test_the_nearest_row_is_that_of_brute_force_in_features_scaled_by_the_log():
    data, new = log(), log(30, seed=1)
    model = NearestNeighborModel().fit(data)
    logged = np.concatenate([data.observation, data.action], 1)
    asked = np.concatenate([new.observation, new.action], 1)
    half = (logged.max(0) - logged.min(0)) / 2
    wanted = (((asked[:, None] - logged) / half) ** 2).sum(-1).argmin(1)
    assert (model.nearest(new.observation, new.action).numpy() == wanted).all()


def test_the_nearest_row_does_not_depend_on_units_or_on_how_rows_are_chunked(monkeypatch):
    data, new = log(), log(30, seed=1)
    wanted = NearestNeighborModel().fit(data).nearest(new.observation, new.action)
    units = torch.tensor([1000.0, 0.01], dtype=torch.float64)
    other = Transitions(
        data.observation * units, data.action, data.reward, data.next_observation, data.terminated, data.truncated
    )
    assert torch.equal(NearestNeighborModel().fit(other).nearest(new.observation * units, new.action), wanted)
    monkeypatch.setattr("minimand.policies.transition_models._PAIRS_AT_ONCE", 7 * len(data))
    assert torch.equal(NearestNeighborModel().fit(data).nearest(new.observation, new.action), wanted)


def test_another_choice_is_never_nearer_than_the_same_one_at_the_far_end_of_a_feature():
    state, action = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    ends = torch.ones(2, dtype=torch.bool)
    data = Transitions(state, action, torch.tensor([5.0, 6.0]), state, ends, ~ends)
    model = NearestNeighborModel(num_actions=2).fit(data)
    assert model(torch.tensor([[1.0], [0.0]]), torch.tensor([0, 1])).reward.tolist() == [5.0, 6.0]


def test_a_regression_recovers_quadratic_dynamics_beyond_the_log_too():
    model = RegressionModel(2, regularization=0.0).fit(log())
    new = log(30, seed=1)
    found = model(new.observation * 3, new.action)
    state, action = new.observation * 3, new.action[:, 0]
    wanted = torch.stack([state[:, 0] + action * state[:, 1], state[:, 1] - action.square()], 1)
    torch.testing.assert_close(found.next_observation, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.reward, state[:, 0] * action, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.cost, torch.stack([wanted[:, 0], state[:, 0]], 1), rtol=1e-8, atol=1e-8)
    assert not found.terminated.any()


def test_a_regression_is_scikit_learns_ridge_on_monomials_of_scaled_features():
    data, strength = log(), 0.3
    model = RegressionModel(2, regularization=strength).fit(data)
    rows = torch.cat([data.observation, data.action], 1)
    z = monomials((rows - model.center) / model.half_range, degree=2)[:, 1:].numpy()
    change = (data.next_observation - data.observation).numpy()
    peer = Ridge(alpha=strength * len(z)).fit(z, change)
    found = model(data.observation, data.action).next_observation - data.observation
    np.testing.assert_allclose(found.numpy(), peer.predict(z), atol=1e-8)


def test_known_rewards_and_costs_are_those_of_the_predicted_state():
    data = log()
    model = RegressionModel(
        1,
        reward=lambda state, action, following: following[:, 0] - action[:, 0],
        cost=lambda state, action, following: (following > state).to(state),
    ).fit(data)
    found = model(data.observation, data.action)
    assert torch.equal(found.reward, found.next_observation[:, 0] - data.action[:, 0])
    assert torch.equal(found.cost, (found.next_observation > data.observation).double())


@pytest.mark.parametrize("model", [NearestNeighborModel, RegressionModel])
def test_an_unfitted_model_takes_a_fitted_ones_state(model):
    data = log()
    fitted, other = model().fit(data), model()
    other.load_state_dict(fitted.state_dict())
    found, wanted = (fields(each(data.observation, data.action)) for each in (other, fitted))
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NearestNeighborModel(num_actions=1), "num_actions"),
        (lambda: RegressionModel(0), "degree"),
        (lambda: RegressionModel(regularization=-1.0), "regularization"),
        (lambda: RegressionModel().fit(log(terminated=True)), "terminated"),
        (lambda: RegressionModel(4, regularization=0.0).fit(log(20)), "undetermined"),
        (lambda: NearestNeighborModel().fit(log(choices=3)), "num_actions be given"),
        (lambda: NearestNeighborModel().fit(log())(torch.zeros(2, 3), torch.zeros(2, 1)), "3 features together"),
        (lambda: RegressionModel().fit(log())(torch.zeros(2, 2), torch.zeros(3, 1)), "action must be floating"),
        (lambda: RegressionModel().fit(log())(torch.zeros(2, 2) / 0, torch.zeros(2, 1)), "NaN"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
