"""The distance to a log and its search, three ways; PRDC's loss, its limits and its gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimand.policies import PRDC, TD3BC, BatchStream, DatasetConstraint, Pendulum, ScaledLog, train_offline
from minimand.policies.dataset_constraint import equal_cells

EXACT = ("tree", "scan")


@pytest.fixture(scope="module")
def log():
    pendulum = Pendulum()
    return ScaledLog.of(pendulum.log("mixed", episodes=4, seed=3), low=pendulum.low, high=pendulum.high)


def first_batch(log, learner, seeds=(0,), size=16):
    return next(BatchStream(log, seeds=seeds, batch_size=size, noise_width=learner.noise_width))


def pairs(rows=700, n=3, m=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, width, generator=generator, dtype=dtype) for width in (n, m))


def brute_force(keys, query):
    """Every distance, in double precision, by numpy."""
    return np.linalg.norm(query.double().numpy()[:, None] - keys.double().numpy()[None], axis=-1)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0, 1e6])
@pytest.mark.parametrize("rows", [1, 3, 64 * 4, 64 * 4 + 1, 2000])
def test_an_exact_search_finds_the_nearest_row_of_all(backend, dtype, beta, rows):
    observation, action = pairs(rows, dtype=dtype)
    constraint = DatasetConstraint(observation, action, beta=beta, backend=backend)
    # Some queries are at logged states: with a large beta the action then hangs on differences of large numbers.
    state = torch.cat([observation[:20], pairs(40, seed=1, dtype=dtype)[0]])
    query = pairs(len(state), seed=2, dtype=dtype)[1]
    found = constraint.nearest(state, query)
    distances = brute_force(constraint.keys, torch.cat([constraint.beta * state, query], 1))
    chosen = distances[np.arange(len(state)), found.row.numpy()]
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(chosen, distances.min(1), rtol=rounding, atol=1e-12)
    np.testing.assert_allclose(found.distance, distances.min(1), rtol=1e-5 if rounding > 1e-9 else 1e-9, atol=1e-12)
    torch.testing.assert_close(found.action, action[found.row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_that_cannot_tell_rows_apart_are_searched_again_by_differences(dtype):
    # Far from the origin all products agree to the last digit.
    observation, action = pairs(2000, dtype=torch.float64)
    far = (1e5 + observation / 8).to(dtype)
    constraint = DatasetConstraint(far, action.to(dtype), beta=1.0, backend="scan")
    state, query = far[500:600], action[500:600].to(dtype)
    assert torch.equal(constraint.nearest(state, query).distance, torch.zeros(100, dtype=dtype))


def test_the_whole_stack_is_searched_in_one_call():
    observation, action = pairs()
    state, query = pairs(24, seed=1)
    for backend in ("tree", "scan", "cells"):
        constraint = DatasetConstraint(observation, action, backend=backend)
        flat = constraint.nearest(state, query)
        stacked = constraint.nearest(state.view(2, 3, 4, 3), query.view(2, 3, 4, 2))
        assert stacked.row.shape == (2, 3, 4)
        assert stacked.action.shape == (2, 3, 4, 2)
        assert torch.equal(stacked.row.flatten(), flat.row)


@given(rows=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_cells_are_of_one_size_and_hold_every_row(rows, seed):
    points = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    cells = equal_cells(points)
    assert torch.equal(cells.unique(), torch.arange(rows))
    assert cells.numel() - rows < len(cells)
    assert cells.shape[1] <= 128
    assert len(cells) & (len(cells) - 1) == 0


def test_cells_halve_at_the_median_of_the_widest_coordinate():
    points = torch.stack([torch.arange(128.0).flip(0), torch.zeros(128)], 1)
    first, second = equal_cells(points)
    assert sorted(first.tolist()) == list(range(64, 128))
    assert sorted(second.tolist()) == list(range(64))


def test_looking_at_all_cells_is_exact_and_at_more_of_them_never_farther():
    observation, action = pairs(4000)
    state, query = pairs(300, seed=1)
    exact = DatasetConstraint(observation, action, backend="tree").nearest(state, query)
    before = None
    for probes in (1, 2, 8, 64, 1000):
        found = DatasetConstraint(observation, action, backend="cells", probes=probes).nearest(state, query)
        assert (found.distance >= exact.distance).all()
        assert before is None or (found.distance <= before).all()
        before = found.distance
        if probes == 8:
            assert (found.row == exact.row).double().mean() > 0.85
    assert torch.equal(before, exact.distance)


@given(seed=st.integers(0, 999), low=st.floats(0, 5), more=st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_distance_grows_with_beta_shrinks_with_data_and_is_lipschitz_in_the_action(seed, low, more):
    observation, action = pairs(50, seed=seed)
    state, query = pairs(10, seed=seed + 1000)
    other = pairs(10, seed=seed + 2000)[1]

    def distance(beta, a, kept=50):
        return DatasetConstraint(observation[:kept], action[:kept], beta=beta).nearest(state, a).distance

    assert (distance(low + more, query) >= distance(low, query) - 1e-9).all()
    assert (distance(low, query) <= distance(low, query, kept=20) + 1e-12).all()
    assert ((distance(low, query) - distance(low, other)).abs() <= (query - other).norm(dim=1) + 1e-9).all()
    nearest_action = torch.cdist(query, action).amin(1)
    torch.testing.assert_close(distance(0.0, query), nearest_action, atol=1e-9, rtol=0)


@pytest.mark.parametrize("backend", ["tree", "scan", "cells"])
def test_a_pair_of_the_log_costs_nothing_and_pulls_nowhere(backend):
    observation, action = pairs()
    constraint = DatasetConstraint(observation, action, backend=backend, reduction="sum")
    chosen = action[::7].clone().requires_grad_()
    loss = constraint(observation[::7], chosen)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(chosen.grad, torch.zeros_like(chosen))


def test_the_gradient_is_twice_the_difference_over_the_width_and_that_of_the_squared_distance():
    observation, action = pairs()
    state, query = pairs(6, seed=1)
    query.requires_grad_()
    constraint = DatasetConstraint(observation, action)
    constraint(state, query).backward()
    found = constraint.nearest(state, query)
    torch.testing.assert_close(query.grad, 2 * (query - found.action).detach() / (6 * 2))
    assert torch.autograd.gradcheck(lambda a: constraint(state, a), (query,))
    step, direction = 1e-5, torch.ones_like(query)
    ahead, behind = (constraint.nearest(state, query + sign * step * direction).distance for sign in (1, -1))
    slope = (ahead.square() - behind.square()).sum() / (2 * step) / (6 * 2)
    torch.testing.assert_close(query.grad.sum(), slope.detach(), rtol=1e-6, atol=1e-9)


def test_reductions_of_the_batch():
    observation, action = pairs()
    state, query = pairs(6, seed=1)
    each = DatasetConstraint(observation, action, reduction="none")(state, query)
    found = DatasetConstraint(observation, action).nearest(state, query)
    torch.testing.assert_close(each, (query - found.action).square().mean(1))
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum()), (torch.amax, each.amax())):
        torch.testing.assert_close(DatasetConstraint(observation, action, reduction=reduction)(state, query), expected)


def test_a_small_beta_lets_the_action_of_a_neighbour_count_and_a_large_one_only_the_states_own():
    observation, action = torch.tensor([[0.0], [0.1]]), torch.tensor([[-1.0], [1.0]])
    state, query = torch.tensor([[0.0]]), torch.tensor([[0.8]])
    assert DatasetConstraint(observation, action, beta=1.0).nearest(state, query).row.item() == 1
    assert DatasetConstraint(observation, action, beta=100.0).nearest(state, query).row.item() == 0
    # The turning point: beta^2 0.1^2 + 0.2^2 = 1.8^2.
    turn = math.sqrt(1.8**2 - 0.2**2) / 0.1
    assert DatasetConstraint(observation, action, beta=turn * 0.999).nearest(state, query).row.item() == 1
    assert DatasetConstraint(observation, action, beta=turn * 1.001).nearest(state, query).row.item() == 0


def test_with_a_large_beta_loss_and_gradient_are_those_of_td3_bc(log):
    distinct = len(log.observation.unique(dim=0)) == len(log)
    assert distinct
    wide = ScaledLog(*(part.double() for part in list(vars(log).values())[:5]), log.scaling)
    ours, theirs = PRDC(wide, beta=1e7, hidden=(8,)).double(), TD3BC(3, 1, hidden=(8,)).double()
    batch = first_batch(wide, ours)
    losses = ours.actor_loss(batch), theirs.actor_loss(batch)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    gradients = (
        torch.autograd.grad(loss.sum(), list(learner.nets.actor.parameters()))
        for loss, learner in zip(losses, (ours, theirs), strict=True)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_prdc_is_its_equations_written_out(log):
    learner = PRDC(log, alpha=1.7, beta=0.5, hidden=(8,))
    batch = first_batch(log, learner)
    state = batch.observation[0]
    chosen = torch.tanh(learner.network(0)(state))
    value = learner.nets.critic.networks.member(0)(torch.cat([state, chosen], 1))
    distances = 0.25 * torch.cdist(state, log.observation).square() + torch.cdist(chosen, log.action).square()
    nearest = log.action[distances.argmin(1)]
    expected = -1.7 / value.abs().mean() * value.mean() + ((chosen - nearest) ** 2).mean()
    torch.testing.assert_close(learner.actor_loss(batch)[0], expected)


def test_the_loss_does_not_depend_on_the_scale_of_rewards(log):
    learner = PRDC(log, hidden=(8,))
    batch = first_batch(log, learner)
    before = learner.actor_loss(batch)
    with torch.no_grad():
        last = learner.nets.critic.networks
        last.weights[-1] *= 37
        last.biases[-1] *= 37
    torch.testing.assert_close(learner.actor_loss(batch), before)


def test_members_of_different_beta_are_each_searched_by_their_own(log):
    together = PRDC(log, beta=[4.0, 0.1, 4.0], hidden=(8,), seeds=(0, 1, 2))
    batch = first_batch(log, together, seeds=(0, 1, 2))
    assert len(together.constraints) == 2
    for member, beta in enumerate((4.0, 0.1, 4.0)):
        alone = PRDC(log, beta=beta, hidden=(8,), seeds=(member,))
        own = type(batch)(*(part[member : member + 1] for part in batch))
        torch.testing.assert_close(together.actor_loss(batch)[member], alone.actor_loss(own)[0])


def test_two_learners_alive_at_once_search_each_its_own_log(log):
    other = Pendulum().log("random", episodes=3)
    first = PRDC(log, hidden=(8,))
    batch = first_batch(log, first)
    before = first.actor_loss(batch)
    PRDC(ScaledLog.of(other), hidden=(8,)).actor_loss(batch)
    assert torch.equal(first.actor_loss(batch), before)


def test_the_actor_loss_is_that_of_d3rlpy(log):
    pytest.importorskip("d3rlpy")
    from d3rlpy.algos.qlearning.torch.prdc_impl import PRDCImpl
    from d3rlpy.models.torch import ActionOutput
    from sklearn.neighbors import NearestNeighbors

    learner = PRDC(log, alpha=1.3, beta=1.5, hidden=(8,))
    batch = first_batch(log, learner, size=64)
    state = batch.observation[0]
    chosen = torch.tanh(learner.network(0)(state))
    critic = learner.nets.critic

    class Forwarder:
        def compute_expected_q(self, x, action, reduction):
            return critic(x[None], action[None])[0].unsqueeze(-1)

    class Peer(nn.Module):
        compute_actor_loss = PRDCImpl.compute_actor_loss

        def __init__(self):
            super().__init__()
            self._alpha, self._beta, self._action_size, self.device = 1.3, 1.5, 1, "cpu"
            self.action_size = 1
            self._q_func_forwarder = Forwarder()
            keys = torch.cat([1.5 * log.observation, log.action], 1).numpy()
            self._nbsr = NearestNeighbors(n_neighbors=1, algorithm="auto").fit(keys)

    class Seen:
        observations = state

    theirs = Peer().compute_actor_loss(Seen(), ActionOutput(chosen, chosen, None))
    torch.testing.assert_close(learner.actor_loss(batch)[0], theirs.actor_loss, rtol=1e-5, atol=1e-6)


def test_every_way_to_search_trains_and_exact_ones_alike(log):
    found = {}
    for backend in ("tree", "scan", "cells"):
        learner = PRDC(log, backend=backend, probes=1000, hidden=(8,))
        found[backend] = train_offline(learner, log, steps=20, batch_size=16, report_every=10).losses
    for backend in ("scan", "cells"):
        for key, curve in found["tree"].items():
            torch.testing.assert_close(found[backend][key], curve)


def test_the_state_tells_beta_but_not_the_log_and_another_beta_is_refused():
    observation, action = pairs()
    constraint = DatasetConstraint(observation, action, beta=3.0)
    assert list(constraint.state_dict()) == ["beta"]
    with pytest.raises(RuntimeError, match=r"beta is 3.0 in the state, but this was built with 2.0"):
        DatasetConstraint(observation, action, beta=2.0).load_state_dict(constraint.state_dict())


@pytest.mark.parametrize("backend", ["tree", "scan", "cells"])
def test_a_constraint_that_is_converted_searches_in_its_new_precision(backend):
    observation, action = pairs(dtype=torch.float32)
    constraint = DatasetConstraint(observation, action, backend=backend)
    constraint.nearest(observation[:5], action[:5])
    constraint.double()
    found = constraint.nearest(observation[:5].double(), action[:5].double())
    assert found.distance.dtype == torch.float64
    assert found.row.tolist() == [0, 1, 2, 3, 4]


def test_auto_takes_the_tree_in_few_dimensions_and_the_scan_in_many():
    assert DatasetConstraint(torch.zeros(5, 3), torch.zeros(5, 1)).method == "tree"
    assert DatasetConstraint(torch.zeros(5, 30), torch.zeros(5, 1)).method == "scan"
    assert DatasetConstraint(torch.zeros(5, 3), torch.zeros(5, 1), backend="cells").method == "cells"


@pytest.mark.untyped
def test_wrong_input_is_refused_at_once(log):
    observation, action = pairs()
    with pytest.raises(ValueError, match=r"got \(700, 3\) and \(699, 2\)"):
        DatasetConstraint(observation, action[1:])
    with pytest.raises(ValueError, match="observation contains NaN"):
        DatasetConstraint(observation / 0, action)
    with pytest.raises(ValueError, match="action is empty"):
        DatasetConstraint(observation, action[:, :0])
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0, got -1"):
        DatasetConstraint(observation, action, beta=-1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        DatasetConstraint(observation, action, backend="faiss")
    with pytest.raises(ValueError, match="probes must be at least 1"):
        DatasetConstraint(observation, action, probes=0)
    with pytest.raises(TypeError, match="action must have a floating"):
        DatasetConstraint(observation, action.long())
    constraint = DatasetConstraint(observation, action)
    with pytest.raises(ValueError, match=r"action must have shape \(\*batch, 2\), got \(5, 1\)"):
        constraint(observation[:5], action[:5, :1])
    with pytest.raises(ValueError, match="of one batch"):
        constraint.nearest(observation[:5], action[:4])
    with pytest.raises(ValueError, match="beta must be one number or 2"):
        PRDC(log, beta=[1.0, 2.0, 3.0], seeds=(0, 1))
