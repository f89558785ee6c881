"""Dynamic programming over states with a stock reaches what brute force over all policies reaches."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from minimand.policies import ExpectedUtility, ReturnLaw, StockMDP, edit_stock, stock_update
from minimand.stopping import Stop

STARTS = torch.tensor([0])


def random_mdp(seed, *, states=2, actions=2, discount=1.0, rewards=(), branches=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    kept = transition.argsort(-1).argsort(-1) >= states - branches
    transition = transition * kept
    transition = transition / transition.sum(-1, keepdim=True)
    reward = torch.randint(-3, 4, (states, actions, states, *rewards), generator=generator).to(dtype)
    return StockMDP(transition.to(dtype), reward, discount=discount), transition.tolist(), reward.tolist()


def all_laws(transition, reward, discount, horizon, state=0):
    """List the return laws of every deterministic policy that may look at the whole history: [(return, weight)]."""
    if horizon == 0:
        return [[(0.0, 1.0)]]
    found = []
    for action, row in enumerate(transition[state]):
        following = [s for s, p in enumerate(row) if p > 0]
        tails = [all_laws(transition, reward, discount, horizon - 1, s) for s in following]
        for choice in itertools.product(*tails):
            branches = zip(following, choice, strict=True)
            law = [(reward[state][action][s] + discount * g, row[s] * p) for s, tail in branches for g, p in tail]
            found += [law]
    return found


def expected(law, f):
    return sum(p * f(g) for g, p in law)


def tail_mean(law, tau):
    total, left = 0.0, tau
    for g, p in sorted(law):
        total, left = total + min(p, left) * g, left - min(p, left)
    return total / tau


def upper_quantile(law, tau):
    return max(g for g, _ in law if sum(p for other, p in law if other < g - 1e-9) <= tau + 1e-9)


def stocks(*values):
    return torch.tensor(values, dtype=torch.float64)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    st.floats(0.3, 1.0),
    st.floats(-9, 9),
)
@settings(max_examples=50, deadline=None)
def test_the_first_stock_plus_return_is_what_is_left_scaled(rewards, discount, first):
    stock = stocks(first)
    returns = [sum(discount**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards) + 1)]
    for step, reward in enumerate([*rewards, 0.0]):
        assert discount**step * (stock.item() + returns[step]) == pytest.approx(first + returns[0], rel=1e-9, abs=1e-9)
        stock = stock_update(stock, stocks(reward), discount=discount)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(-9, 9), st.floats(-9, 9), st.floats(0.3, 1.0))
@settings(max_examples=50, deadline=None)
def test_an_edited_stock_is_that_of_an_episode_begun_with_another(rewards, first, other, discount):
    stock, wanted, shift = stocks(first), stocks(other), stocks(other - first)
    for step, reward in enumerate([*rewards, 0.0]):
        edited = edit_stock(stock, torch.tensor([step]), shift, discount=discount)
        assert torch.allclose(edited, wanted, rtol=1e-9, atol=1e-9)
        assert torch.allclose(edited - stock, shift / discount**step, rtol=1e-9, atol=1e-9)
        stock, wanted = (stock_update(each, stocks(reward), discount=discount) for each in (stock, wanted))


@pytest.mark.parametrize("method", ["value_iteration", "policy_iteration", "solve"])
@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "utility",
    [
        ExpectedUtility.mean(),
        ExpectedUtility.lower_tail(),
        ExpectedUtility.upper_tail(),
        ExpectedUtility.target(),
        ExpectedUtility.shortfall(2.0),
        ExpectedUtility.at_least(),
        ExpectedUtility(lambda x: -x.square(), name="square"),
    ],
    ids=lambda utility: utility.name,
)
def test_it_reaches_the_best_of_all_history_policies_from_every_stock(method, discount, seed, utility):
    mdp, transition, reward = random_mdp(seed, discount=discount)
    first = stocks(-3.25, -1.5, 0.1, 2.05)  # where no total is zero, rounding decides nothing
    found = getattr(mdp, method)(utility, STARTS.expand(4), first, horizon=3)
    laws = all_laws(transition, reward, discount, 3)
    best = [max(expected(law, lambda g, c=c: float(utility(stocks(c + g)))) for law in laws) for c in first.tolist()]
    assert found.status is Stop.CONVERGED
    assert found.error_bound == 0
    assert found.value.tolist() == pytest.approx(best, abs=1e-9)
    own = [float(law.weights @ utility(c + law.atoms)) for c, law in zip(first, found.laws, strict=True)]
    assert own == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_homeostasis_reaches_the_best_of_all_history_policies(discount):
    mdp, transition, reward = random_mdp(5, discount=discount, rewards=(2,))
    start = stocks(1.0, -2.0)
    found = mdp.value_iteration(ExpectedUtility.homeostasis(), STARTS, start[None], horizon=2)
    best = -math.inf
    for first in range(2):
        for second in itertools.product(range(2), repeat=2):
            value = 0.0
            for s in range(2):
                for last in range(2):
                    action = second[s]
                    p = transition[0][first][s] * transition[s][action][last]
                    gained = stocks(*reward[0][first][s]) + discount * stocks(*reward[s][action][last])
                    value -= p * float((start + gained).norm())
            best = max(best, value)
    assert found.value.item() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("tau", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_tail_mean_is_the_best_of_all_history_policies(discount, tau, seed):
    mdp, transition, reward = random_mdp(seed, discount=discount)
    laws = all_laws(transition, reward, discount, 3)
    found = mdp.best_cvar(0, tau=tau, horizon=3, tolerance=0.0)
    assert found.value == pytest.approx(max(tail_mean(law, tau) for law in laws), abs=1e-9)
    assert found.status is Stop.CONVERGED
    assert found.gap <= 1e-9
    at_stock = -found.stock + float(found.solution.value) / tau
    assert at_stock == pytest.approx(found.value, abs=1e-9)  # Rockafellar and Uryasev


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_the_quantile_is_the_best_of_all_history_policies(discount, tau, seed):
    mdp, transition, reward = random_mdp(seed, discount=discount)
    laws = all_laws(transition, reward, discount, 3)
    found = mdp.best_quantile(0, tau=tau, horizon=3)
    assert found.value == pytest.approx(max(upper_quantile(law, tau) for law in laws), abs=1e-9)
    assert found.gap == 0


def test_the_search_over_first_stocks_says_how_far_it_may_be_from_the_best():
    mdp, *_ = random_mdp(0, states=3, actions=3, branches=3, discount=0.9)
    best = mdp.best_cvar(0, tau=0.2, horizon=4, tolerance=0.0).value
    for rounds in range(6):
        early = mdp.best_cvar(0, tau=0.2, horizon=4, tolerance=0.0, max_iter=rounds)
        assert early.value <= best + 1e-9
        assert best <= early.value + early.gap + 1e-9
        assert early.status is Stop.ITERATION_LIMIT
    loose = mdp.best_cvar(0, tau=0.2, horizon=4, tolerance=0.1)
    assert loose.status is Stop.CONVERGED
    assert best - loose.value <= loose.gap <= 0.1
    assert mdp.best_cvar(0, tau=0.2, horizon=4, max_seconds=0.0).status is Stop.TIME_LIMIT
    assert mdp.best_quantile(0, tau=0.2, horizon=4, max_seconds=0.0).status is Stop.TIME_LIMIT
    assert mdp.best_quantile(0, tau=0.2, horizon=4, max_iter=1).status is Stop.ITERATION_LIMIT


def test_the_mean_is_ordinary_dynamic_programming_whatever_the_stock():
    mdp, transition, reward = random_mdp(2, states=3, actions=3, discount=0.8)
    p, r = torch.tensor(transition, dtype=torch.float64), torch.tensor(reward, dtype=torch.float64)
    value = torch.zeros(3, dtype=torch.float64)
    for _ in range(4):
        quality = (p * (r + 0.8 * value)).sum(-1)
        value = quality.amax(-1)
    first = stocks(-7.0, 0.0, 3.0)
    found = mdp.value_iteration(ExpectedUtility.mean(), torch.arange(3), first, horizon=4)
    assert torch.allclose(found.value, first + value, atol=1e-9)
    again = mdp.value_iteration(ExpectedUtility.mean(), torch.arange(3), first + 1.5, horizon=4)
    for ours in (found, again):
        assert torch.equal(ours.layers[0].action, quality.argmax(-1)[ours.layers[0].state])


def test_the_mean_is_the_tail_mean_of_everything():
    mdp, *_ = random_mdp(3, discount=0.9)
    mean = mdp.value_iteration(ExpectedUtility.mean(), STARTS, stocks(0.0), horizon=4).value.item()
    assert mdp.best_cvar(0, tau=1.0, horizon=4).value == pytest.approx(mean, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 9)), min_size=1, max_size=8), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_tail_mean_is_the_highest_over_all_first_stocks(pairs, tau):
    atoms, weights = stocks(*(g for g, _ in pairs)), stocks(*(w for _, w in pairs))
    weights = weights / weights.sum()
    over_stocks = (atoms + (weights * (atoms - atoms[:, None]).clamp_max(0)).sum(1) / tau).max()
    law = ReturnLaw(atoms, weights)
    assert law.cvar(tau).item() == pytest.approx(over_stocks.item(), abs=1e-9)
    assert law.cvar(1.0).item() == pytest.approx(law.mean().item(), abs=1e-9)
    assert law.quantile(tau / 2).item() == upper_quantile(
        list(zip(atoms.tolist(), weights.tolist(), strict=True)), tau / 2
    )


def test_value_iteration_is_the_optimum_of_as_many_steps_as_sweeps_and_its_error_is_bounded():
    mdp, transition, reward = random_mdp(1, discount=0.7)
    utility, stock = ExpectedUtility.target(), stocks(-1.5)
    exact = mdp.value_iteration(utility, STARTS, stock, horizon=7).value.item()
    for sweeps in range(4):
        early = mdp.value_iteration(utility, STARTS, stock, horizon=7, max_iter=sweeps)
        best = max(expected(law, lambda g: -abs(g - 1.5)) for law in all_laws(transition, reward, 0.7, sweeps))
        assert early.value.item() == pytest.approx(best, abs=1e-9)
        assert early.status is Stop.ITERATION_LIMIT
        assert early.iterations == sweeps
        assert abs(early.value.item() - exact) <= early.error_bound
        largest = torch.tensor(reward).abs()[torch.tensor(transition) > 0].max().item()
        assert early.error_bound == pytest.approx(largest * sum(0.7**k for k in range(sweeps, 7)))


def test_the_distributional_operator_contracts_the_wasserstein_distance_by_the_discount():
    """Two processes that pay otherwise after one step only: their laws differ by no more than the discount."""
    for seed in range(5):
        _, transition, reward = random_mdp(seed, actions=1)
        p, r = torch.tensor(transition, dtype=torch.float64), torch.tensor(reward, dtype=torch.float64)
        # A first step into copies of the states of one process or another: T eta and T eta' of the same policy.
        _, _, other = random_mdp(seed + 100, actions=1)
        tails, wholes = [], []
        for paid in (reward, other):
            size = 6
            transition_ = torch.zeros(size, 1, size, dtype=torch.float64)
            reward_ = torch.zeros_like(transition_)
            transition_[:2, :, 2:4], reward_[:2, :, 2:4] = p, r
            transition_[2:4, :, 4:], reward_[2:4, :, 4:] = p, torch.tensor(paid, dtype=torch.float64)
            transition_[4:, 0, 4:] = torch.eye(2)
            mdp = StockMDP(transition_, reward_, discount=0.6)
            start = torch.arange(4)
            laws = mdp.value_iteration(ExpectedUtility.mean(), start, torch.zeros(4, dtype=torch.float64)).laws
            wholes.append(laws[:2])
            tails.append(laws[2:])

        def apart(pairs):
            return max(
                wasserstein_distance(a.atoms, b.atoms, a.weights, b.weights) for a, b in zip(*pairs, strict=True)
            )

        assert 0 < apart(wholes) <= 0.6 * apart(tails) + 1e-12


def test_a_target_in_a_deterministic_process_is_the_nearest_sum():
    size, pays = 5, [[1.0, 3.0], [-2.0, 6.0], [5.0, -1.0], [2.0, 7.0]]
    transition = torch.zeros(size, 2, size, dtype=torch.float64)
    reward = torch.zeros_like(transition)
    for step, pair in enumerate(pays):
        transition[step, :, step + 1] = 1
        reward[step, :, step + 1] = stocks(*pair)
    transition[4, :, 4] = 1
    mdp = StockMDP(transition, reward, discount=0.5)
    sums = [sum(0.5**k * r for k, r in enumerate(plan)) for plan in itertools.product(*pays)]
    for goal in (-1.0, 2.3, 4.9, 8.0):
        found = mdp.policy_iteration(ExpectedUtility.target(), STARTS, stocks(-goal))
        assert found.value.item() == pytest.approx(-min(abs(g - goal) for g in sums), abs=1e-12)
        state, stock, total = 0, stocks(-goal).squeeze(), 0.0
        for step in range(4):
            paid = stocks(pays[step][found.action(step, state, stock)]).squeeze()
            total, stock, state = total + 0.5**step * paid.item(), stock_update(stock, paid, discount=0.5), state + 1
        assert total == pytest.approx(found.laws[0].atoms.item())


def test_a_process_without_end_is_solved_to_the_tolerance_asked_for():
    transition = torch.ones(1, 2, 1, dtype=torch.float64)
    reward = stocks(1.0, -1.0).view(1, 2, 1)
    mdp = StockMDP(transition, reward, discount=0.5)
    # Any number in [-2, 2] is a sum of +-0.5^k.
    found = mdp.value_iteration(ExpectedUtility.target(), STARTS, stocks(-0.3), tolerance=1e-3)
    assert found.status is Stop.CONVERGED
    assert 0 < found.error_bound <= 1e-3
    assert abs(found.value.item()) <= found.error_bound
    tail = mdp.best_cvar(0, tau=0.5, tolerance=1e-2)
    assert abs(tail.value - 2) <= tail.gap <= 1e-2


def test_policy_iteration_never_gets_worse_and_needs_no_more_improvements_than_steps():
    mdp, *_ = random_mdp(4, states=3, actions=3, discount=0.9)
    values = [
        mdp.policy_iteration(ExpectedUtility.lower_tail(), STARTS, stocks(-1.0), horizon=5, max_iter=k).value.item()
        for k in range(7)
    ]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(values))
    done = mdp.policy_iteration(ExpectedUtility.lower_tail(), STARTS, stocks(-1.0), horizon=5)
    assert done.status is Stop.CONVERGED
    assert done.iterations <= 5
    assert mdp.policy_iteration(ExpectedUtility.target(), STARTS, stocks(-1.0), horizon=5, max_seconds=0.0).status is (
        Stop.TIME_LIMIT
    )


@pytest.mark.parametrize(
    ("f", "allowed"),
    [
        (lambda x: x.clamp_max(0), True),
        (lambda x: x.abs() * 3 - 2, True),
        (lambda x: -x.square(), True),
        (lambda x: torch.zeros_like(x), True),
        (torch.exp, False),
        (torch.tanh, False),
        (lambda x: x + x.square(), False),
        (lambda x: (x + 1).clamp_max(0), False),
    ],
)
def test_the_discount_must_keep_the_order_of_laws(f, allowed):
    utility = ExpectedUtility(f)
    assert (utility.refusal(discount=0.9, scale=10.0) is None) == allowed
    assert utility.refusal(discount=1.0, scale=10.0) is None


def test_a_kink_far_below_the_scale_of_totals_is_still_seen():
    kinked = ExpectedUtility(lambda x: (x + 1).clamp_max(0))
    assert kinked.refusal(discount=0.9, scale=1e9) is not None
    assert ExpectedUtility(lambda x: x.abs() ** 1.5).refusal(discount=0.9, scale=1e9) is None


def test_first_stocks_are_solved_for_in_groups_that_fit():
    mdp, transition, reward = random_mdp(0, states=3, actions=3, branches=3, discount=0.9)
    p, r = torch.tensor(transition, dtype=torch.float64), torch.tensor(reward, dtype=torch.float64)
    tight = StockMDP(p, r, discount=0.9, max_nodes=4_000)
    ours, free = (each.best_cvar(0, tau=0.2, horizon=4, tolerance=0.0) for each in (tight, mdp))
    assert (ours.value, ours.stock, ours.evaluations) == (free.value, free.stock, free.evaluations)


def test_an_objective_that_cannot_be_optimised_is_refused_with_the_reason():
    mdp, *_ = random_mdp(0, discount=0.9)
    solve = mdp.value_iteration
    with pytest.raises(ValueError, match="not indifferent to the discount"):
        solve(ExpectedUtility(torch.tanh), STARTS, stocks(0.0), horizon=2)
    with pytest.raises(ValueError, match="at least has no Lipschitz constant"):
        solve(ExpectedUtility.at_least(), STARTS, stocks(0.0))
    with pytest.raises(ValueError, match="to have Lipschitz constant"):
        solve(ExpectedUtility(lambda x: x, 0.5), STARTS, stocks(0.0))
    endless, *_ = random_mdp(0)
    with pytest.raises(ValueError, match="horizon must be given"):
        endless.value_iteration(ExpectedUtility.mean(), STARTS, stocks(0.0))
    with pytest.raises(ValueError, match="no Lipschitz"):
        mdp.best_quantile(0, tau=0.5)


@pytest.mark.untyped
def test_bad_input_is_named():
    mdp, transition, reward = random_mdp(0, discount=0.9)
    p, r = torch.tensor(transition, dtype=torch.float64), torch.tensor(reward, dtype=torch.float64)
    with pytest.raises(TypeError, match="not indifferent to mixtures"):
        mdp.value_iteration(lambda law: -law.var(), STARTS, stocks(0.0), horizon=2)
    with pytest.raises(ValueError, match="stock must have shape"):
        mdp.value_iteration(ExpectedUtility.mean(), STARTS, stocks(0.0, 1.0), horizon=2)
    with pytest.raises(ValueError, match="stock contains NaN"):
        mdp.value_iteration(ExpectedUtility.mean(), STARTS, stocks(math.nan), horizon=2)
    with pytest.raises(ValueError, match="state must lie in"):
        mdp.value_iteration(ExpectedUtility.mean(), STARTS + 2, stocks(0.0), horizon=2)
    with pytest.raises(ValueError, match="discount"):
        StockMDP(p, r, discount=0.0)
    with pytest.raises(ValueError, match="add up to 1"):
        StockMDP(p * 0.9, r, discount=0.9)
    with pytest.raises(ValueError, match="reward must have shape"):
        StockMDP(p, r[0], discount=0.9)
    with pytest.raises(ValueError, match="max_nodes is 3"):
        StockMDP(p, r, discount=0.9, max_nodes=3).best_cvar(0, tau=0.5, horizon=4)
    with pytest.raises(ValueError, match="tails are of returns that are numbers"):
        random_mdp(0, rewards=(2,))[0].best_cvar(0, tau=0.5, horizon=2)
    with pytest.raises(ValueError, match="weights must hold probabilities"):
        ReturnLaw(stocks(0.0, 1.0), stocks(0.5, 0.6))
    with pytest.raises(ValueError, match="atoms must have shape"):
        ReturnLaw(stocks(0.0, 1.0), stocks(1.0))
    with pytest.raises(ValueError, match="step must be at least 0"):
        edit_stock(stocks(0.0), torch.tensor([-1]), stocks(1.0), discount=0.9)
    found = mdp.value_iteration(ExpectedUtility.mean(), STARTS, stocks(0.0), horizon=2)
    with pytest.raises(ValueError, match="is not reached at step 1"):
        found.action(1, 0, 99.0)


def test_single_precision_agrees_with_double():
    single, *_ = random_mdp(1, discount=0.7, dtype=torch.float32)
    double, *_ = random_mdp(1, discount=0.7)
    ours = single.value_iteration(ExpectedUtility.target(), STARTS, torch.tensor([-1.5]), horizon=4)
    wanted = double.value_iteration(ExpectedUtility.target(), STARTS, stocks(-1.5), horizon=4)
    assert ours.value.dtype == torch.float32
    assert ours.value.item() == pytest.approx(wanted.value.item(), abs=1e-5)
