"""Constrained decision problems in a table: the linear program against value iteration, budgets, and guardians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.policies import (
    CountGuardian,
    ICUSepsis,
    InfeasibleBudgetsError,
    TabularCMDP,
    Transitions,
)


def problem(seed=0, states=6, actions=3, costs=1, discount=0.9, ends=0.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    transition = draw(states, actions, states) ** 3
    transition = (1 - ends) * transition / transition.sum(-1, keepdim=True)
    initial = draw(states)
    cost = draw(costs, states, actions)
    return TabularCMDP(transition, draw(states, actions), initial / initial.sum(), discount=discount, cost=cost)


def best_value(mdp, reward=None, allowed=None):
    """Return the best value by value iteration."""
    reward = mdp.reward if reward is None else reward
    reward = reward if allowed is None else reward.masked_fill(~allowed, -torch.inf)
    value = torch.zeros_like(mdp.initial)
    for _ in range(2000):
        value = (reward + mdp.discount * mdp.transition @ value).amax(1)
    return float(mdp.initial @ value)


def even(mdp):
    return torch.full_like(mdp.reward, 1 / mdp.reward.shape[1])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(0.9, 0.0), (0.99, 0.1), (1.0, 0.2)]))
def test_without_budgets_the_program_is_value_iteration(seed, kind):
    mdp = problem(seed, discount=kind[0], ends=kind[1])
    found = mdp.solve()
    assert found.value.item() == pytest.approx(best_value(mdp), abs=1e-6)
    assert found.residual < 1e-6
    assert found.multipliers.tolist() == [0.0]
    assert torch.equal(found.policy.amax(1), torch.ones(6, dtype=torch.float64))


def test_a_policy_is_worth_what_its_steps_add_up_to():
    mdp = problem(discount=0.8)
    policy = even(mdp)
    reach, value, cost, occupancy = mdp.initial, 0.0, 0.0, torch.zeros_like(mdp.reward)
    for step in range(200):
        taken = 0.8**step * reach[:, None] * policy
        value, cost, occupancy = (
            value + (taken * mdp.reward).sum(),
            cost + (taken * mdp.cost[0]).sum(),
            occupancy + taken,
        )
        reach = torch.einsum("s,sa,sat->t", reach, policy, mdp.transition)
    found = mdp.evaluate(policy)
    torch.testing.assert_close(found.value, value)
    torch.testing.assert_close(found.costs[0], cost)
    torch.testing.assert_close(found.occupancy, occupancy)
    assert found.occupancy.sum().item() == pytest.approx(1 / (1 - 0.8))


def test_the_value_rises_with_the_budget_and_ever_less_and_the_multiplier_is_its_slope():
    mdp = problem()
    least = -best_value(mdp, -mdp.cost[0])
    most = mdp.solve().costs[0].item()
    budgets = torch.linspace(least + 1e-3, most, 9, dtype=torch.float64)
    values = torch.stack([mdp.solve(budget[None]).value for budget in budgets])
    slopes = values.diff() / budgets.diff()
    assert bool((slopes >= -1e-9).all())
    assert bool((slopes.diff() <= 1e-7).all())
    middle = budgets[4] + 1e-3
    found = mdp.solve(middle[None])
    higher = mdp.solve(middle[None] + 1e-6)
    assert found.multipliers.item() == pytest.approx(((higher.value - found.value) / 1e-6).item(), rel=1e-3)
    assert found.costs.item() == pytest.approx(middle.item(), abs=1e-8)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_an_optimal_policy_is_random_in_at_most_one_state_a_budget(seed):
    mdp = problem(seed, costs=2)
    loose = mdp.solve().costs
    found = mdp.solve((loose + mdp.evaluate(even(mdp)).costs) / 2)
    assert int((found.policy.amax(1) < 1 - 1e-9).sum()) <= 2


def test_budgets_that_cannot_be_kept_are_refused_with_the_least_costs():
    mdp = problem(costs=2)
    least = [-best_value(mdp, -cost) for cost in mdp.cost]
    with pytest.raises(InfeasibleBudgetsError, match="cost 0 has budget 0 and is at least") as caught:
        mdp.solve(torch.tensor([0.0, torch.inf]).double())
    assert caught.value.minimal_costs.tolist() == pytest.approx(least, abs=1e-6)
    assert caught.value.excess == pytest.approx(least[0], abs=1e-6)
    raised = torch.tensor([least[0] + 1e-7, torch.inf]).double()
    assert mdp.solve(raised).costs[0].item() == pytest.approx(least[0], abs=1e-6)
    with pytest.raises(InfeasibleBudgetsError) as both:
        mdp.solve(torch.tensor([least[0], least[1]]).double())
    assert both.value.excess > 0
    kept = torch.tensor(least).double() + both.value.excess + 1e-7
    assert bool((mdp.solve(kept).costs <= kept + 1e-6).all())


def test_a_policy_that_may_use_only_some_pairs_uses_no_others_and_is_the_best_of_these():
    mdp = problem()
    allowed = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[:, 0] |= ~allowed.any(1)
    found = mdp.solve(allowed=allowed)
    assert not found.policy[~allowed].any()
    assert found.value.item() == pytest.approx(best_value(mdp, allowed=allowed), abs=1e-6)


def test_a_guardian_that_lets_everything_in_changes_nothing_and_one_that_lets_nothing_in_leaves_the_penalty():
    mdp = problem()
    everything, nothing = torch.ones(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    guarded = mdp.guarded(everything, penalty=-25.0).solve()
    assert guarded.value.item() == pytest.approx(best_value(mdp), abs=1e-6)
    assert guarded.costs[-1].item() == pytest.approx(0.0, abs=1e-9)
    policy = torch.cat([even(mdp), even(mdp)[:1]])
    lost = mdp.guarded(nothing, penalty=-25.0).evaluate(policy)
    assert lost.value.item() == pytest.approx(-25.0 / (1 - 0.9))
    assert lost.costs.tolist() == pytest.approx([0.0, 1 / (1 - 0.9)])
    once = problem(discount=1.0, ends=0.2).guarded(nothing, penalty=-3.0).evaluate(policy)
    assert once.value.item() == pytest.approx(-3.0)
    assert once.costs[-1].item() == pytest.approx(1.0)


def test_no_budget_outside_a_budget_of_nothing_and_a_large_penalty_are_the_same_guardian():
    mdp = problem()
    inside = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    inside[:, 0] |= ~inside.any(1)
    wanted = best_value(mdp, allowed=inside)
    guarded = mdp.guarded(inside, penalty=0.0)
    budget = torch.tensor([torch.inf, 0.0], dtype=torch.float64)
    assert guarded.solve(budget).value.item() == pytest.approx(wanted, abs=1e-6)
    assert mdp.guarded(inside, penalty=-1000.0).solve().value.item() == pytest.approx(wanted, abs=1e-6)
    looser = [guarded.solve(budget + torch.tensor([0.0, more])).value.item() for more in (0.0, 1.0, 2.0)]
    assert looser == sorted(looser)


def test_frequencies_of_a_long_log_come_near_the_problem_and_of_a_known_log_are_exact():
    state = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    following = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    done = torch.tensor([False, False, False, True])
    log = Transitions(
        state,
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        following,
        done,
        torch.tensor([False, False, True, False]),
        torch.tensor([[0.0], [1.0], [1.0], [0.0]]),
    )
    mdp = TabularCMDP.from_transitions(log, num_states=2, num_actions=2, discount=0.9)
    torch.testing.assert_close(mdp.transition[0], torch.tensor([[1 / 3, 2 / 3], [0.0, 0.0]]))
    assert not mdp.transition[1].any()  # what was logged there ended, and the rest is not known
    torch.testing.assert_close(mdp.reward, torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(mdp.cost, torch.tensor([[[2 / 3, 0.0], [0.0, 0.0]]]))
    torch.testing.assert_close(mdp.initial, torch.tensor([0.5, 0.5]))


def test_survival_under_the_clinicians_of_icu_sepsis_is_that_of_a_linear_solve():
    sepsis = ICUSepsis.load()
    found = sepsis.problem.evaluate(sepsis.clinicians)
    assert found.value.item() == pytest.approx(0.78184, abs=1e-5)
    assert found.costs.item() == pytest.approx(0.443, abs=1e-3)
    assert found.occupancy[:713].sum().item() == pytest.approx(9.24, abs=0.01)


def sepsis_log(sepsis, episodes, seed=0):
    """Episodes under the clinicians, all at once."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.multinomial(sepsis.problem.initial, episodes, replacement=True, generator=generator)
    who, rows = torch.arange(episodes), []
    law = sepsis.problem.transition.cumsum(-1).float()
    while len(state):
        action = torch.multinomial(sepsis.clinicians[state], 1, generator=generator).squeeze(1)
        drawn = torch.rand(len(state), 1, generator=generator)
        following = (law[state, action] < drawn).sum(1).clamp(max=715)
        done = following >= 713
        rows.append((who, state, action, (following == 714).double(), following, done))
        who, state = who[~done], following[~done]
    who, state, action, reward, following, done = (torch.cat(each) for each in zip(*rows, strict=True))
    order = who.argsort(stable=True)
    state, following = state[order, None].double(), following[order, None].double()
    cost = sepsis.problem.cost[0, state.squeeze(1).long(), :1]
    return Transitions(state, action[order], reward[order], following, done[order], torch.zeros_like(done), cost)


def test_on_icu_sepsis_a_count_guardian_cures_the_over_optimism_of_a_fitted_table_and_beats_the_clinicians():
    sepsis = ICUSepsis.load()
    log = sepsis_log(sepsis, 10_000)
    table = TabularCMDP.from_transitions(log, num_states=716, num_actions=25, discount=1.0)
    pairs = torch.cartesian_prod(torch.arange(716.0), torch.arange(25.0)).double()
    rows = torch.cat([log.observation, log.action[:, None].double()], 1)
    clinicians = sepsis.problem.evaluate(sepsis.clinicians)
    value = torch.zeros(716, dtype=torch.float64)
    for _ in range(100):
        quality = table.reward + table.transition @ value
        value = quality.amax(1)
    greedy = torch.nn.functional.one_hot(quality.argmax(1), 25).double()
    optimism = table.initial @ value - sepsis.problem.evaluate(greedy).value

    inside = CountGuardian(10).fit(rows).inside(pairs).view(716, 25)
    allowed = torch.cat([inside, inside[-1:]])
    allowed[:, 0] |= ~allowed.any(1)  # where nothing is covered there is no choice, and a patient counts as lost
    budgets = torch.tensor([clinicians.costs.item(), torch.inf]).double()
    found = table.guarded(inside, penalty=0.0).solve(budgets, allowed=allowed)
    truth = sepsis.problem.evaluate(found.policy[:716])
    assert optimism > 0.1
    assert abs(found.value - truth.value) < optimism / 2
    assert truth.value > clinicians.value + 0.02
    assert truth.costs[0] < 1.05 * clinicians.costs[0]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TabularCMDP(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), discount=1.0), "transition must have"),
        (lambda: TabularCMDP(torch.ones(2, 1, 2), torch.ones(2, 1), torch.ones(2) / 2, discount=1.0), "at most 1"),
        (lambda: TabularCMDP(torch.ones(1, 1, 1), torch.ones(1, 1), torch.zeros(1), discount=0.9), "initial must"),
        (lambda: TabularCMDP(torch.ones(1, 1, 1), torch.ones(1), torch.ones(1), discount=0.9), "reward must"),
        (
            lambda: TabularCMDP(torch.ones(1, 1, 1), torch.ones(1, 1) / 0, torch.ones(1), discount=0.9),
            "reward contains",
        ),
        (lambda: TabularCMDP(torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1), discount=0.0), "discount"),
        (lambda: problem().evaluate(torch.ones(6, 3)), "policy must hold probabilities"),
        (lambda: problem(discount=1.0).evaluate(even(problem())), "must end"),
        (lambda: problem(discount=1.0).solve(), "no policy ends"),
        (lambda: problem().solve(torch.ones(2)), "budgets must have shape"),
        (lambda: problem().solve(torch.tensor([torch.nan])), "NaN"),
        (lambda: problem().solve(allowed=torch.zeros(6, 3, dtype=torch.bool)), "at least one action"),
        (lambda: problem().guarded(torch.ones(6, 3), penalty=-1.0), "inside must be boolean"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
