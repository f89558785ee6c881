"""The game of preferences against its mathematics, and its solver against linear programs and one-dimensional roots."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog

from minimand.preferences import PreferenceGame
from minimand.stopping import Stop

F64 = torch.float64


def random_game(seed, answers=6, tau=0.1, prompts=(), spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(*prompts, answers, answers, generator=generator, dtype=F64)
    reference = 0.5 * torch.randn(*prompts, answers, generator=generator, dtype=F64)
    return PreferenceGame(torch.sigmoid(scores - scores.mT), reference.log_softmax(-1), tau=tau)


def random_policy(seed, answers=6, prompts=(), spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*prompts, answers, generator=generator, dtype=F64)).log_softmax(-1)


seeds = st.integers(0, 10_000)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, tau=st.floats(0.0, 3.0))
def test_a_policy_wins_half_against_itself_and_the_game_is_symmetric(seed, tau):
    game, pi, mu = random_game(seed, tau=tau), random_policy(seed), random_policy(seed + 1)
    half = torch.tensor(0.5, dtype=F64)
    torch.testing.assert_close(game.payoff(pi, pi), half, rtol=0, atol=1e-12)
    torch.testing.assert_close(game.payoff(pi, mu) + game.payoff(mu, pi), 2 * half, rtol=0, atol=1e-12)


def test_the_payoff_is_the_sum_over_all_pairs_less_the_divergences():
    game, pi, mu = random_game(0), random_policy(1), random_policy(2)
    p, q, rho = (x.exp().tolist() for x in (pi, mu, game.log_reference))
    wins = sum(p[i] * q[j] * float(game.preferences[i, j]) for i in range(6) for j in range(6))
    own = sum(p[i] * math.log(p[i] / rho[i]) for i in range(6))
    others = sum(q[i] * math.log(q[i] / rho[i]) for i in range(6))
    assert float(game.payoff(pi, mu)) == pytest.approx(wins - 0.1 * own + 0.1 * others, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, tau=st.floats(0.02, 2.0))
def test_nobody_wins_more_than_the_best_response_and_exploitability_is_what_it_wins(seed, tau):
    game, pi = random_game(seed, tau=tau), random_policy(seed)
    best = game.best_response(pi)
    won = game.payoff(best, pi)
    torch.testing.assert_close(game.exploitability(pi), won - 0.5, rtol=0, atol=1e-12)
    rivals = torch.stack([random_policy(seed + k, spread=0.1 + k / 10) for k in range(1, 40)])
    near = (best + 0.01 * rivals).log_softmax(-1)
    for others in (rivals, near):
        assert (game.payoff(others, pi.expand_as(others)) <= won + 1e-12).all()


@pytest.mark.parametrize("tau", [3.0, 0.1, 0.02])
def test_exploitability_is_the_formula_of_the_log_partition_function(tau):
    game, pi = random_game(3, tau=tau), random_policy(3)
    win_rates = game.preferences @ pi.exp()
    largest = tau * (game.log_reference + win_rates / tau).logsumexp(-1)
    largest = largest + tau * (pi.exp() * (pi - game.log_reference)).sum()
    torch.testing.assert_close(game.exploitability(pi), largest - 0.5, rtol=0, atol=1e-12)


def test_without_regularisation_exploitability_is_the_win_rate_of_the_best_answer_above_half():
    game, pi = random_game(4, tau=0.0), random_policy(4)
    rates = [float(game.preferences[i] @ pi.exp()) for i in range(6)]
    assert float(game.exploitability(pi)) == pytest.approx(max(rates) - 0.5, abs=1e-14)
    with pytest.raises(ValueError, match="tau of a game"):
        game.nash()
    with pytest.raises(ValueError, match="tau of a game"):
        game.best_response(pi)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, tau=st.floats(0.01, 3.0), spread=st.floats(0.0, 10.0))
def test_the_nash_policy_is_its_own_best_response_and_none_exploits_it(seed, tau, spread):
    game = random_game(seed, tau=tau, spread=spread)
    found = game.nash(tolerance=1e-11)
    assert found.status is Stop.CONVERGED
    pi = found.log_policy
    expected = game.log_reference + (game.preferences @ pi.exp()) / tau
    torch.testing.assert_close(pi, expected.log_softmax(-1), rtol=0, atol=1e-10)
    assert float(found.exploitability) < 1e-15
    assert float(game.exploitability(random_policy(seed))) > 1e-8


@settings(max_examples=15, deadline=None)
@given(seed=seeds, tau=st.floats(0.05, 3.0), excess=st.floats(1.0, 20.0))
def test_mirror_descent_rests_at_the_nash_policy_and_nash_md_where_its_steps_are_small(seed, tau, excess):
    game = random_game(seed, tau=tau)
    pi = game.nash(tolerance=1e-13).log_policy
    eta = tau * excess
    torch.testing.assert_close(game.mirror_step(pi, eta=eta), pi, rtol=0, atol=1e-11)
    # Nash-MD rests there only in the limit of small steps: its opponent is the mixture, not the policy.
    opponent = game.mixture(pi, eta=eta)
    moved = game.mirror_step(pi, eta=eta, log_opponent=opponent)
    gap = game.win_rate(opponent) - game.win_rate(pi)
    torch.testing.assert_close(moved, (pi + gap / eta).log_softmax(-1), rtol=0, atol=1e-11)


def test_the_nash_policy_of_two_answers_is_the_root_of_one_equation():
    p, rho, tau = 0.8, 0.3, 0.25
    game = PreferenceGame(
        torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=F64), torch.tensor([rho, 1 - rho]).log(), tau=tau
    )
    # The difference of the two win rates is p - 1/2 whatever the policy, so the log-odds are known.
    odds = math.log(rho / (1 - rho)) + (p - 0.5) / tau
    assert float(game.nash(tolerance=1e-12).log_policy[0].exp()) == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-7)


def test_the_nash_policy_of_three_answers_of_which_two_are_alike_is_the_root_of_one_equation():
    # 0 beats 1 by a, 1 beats 2, 2 beats 0 by a alike: with a symmetric reference, pi(0) = pi(1) = pi(2) = 1/3.
    a, tau = 0.9, 0.1
    beats = torch.tensor([[0.5, a, 1 - a], [1 - a, 0.5, a], [a, 1 - a, 0.5]], dtype=F64)
    found = PreferenceGame(beats, tau=tau).nash(tolerance=1e-12).log_policy.exp()
    torch.testing.assert_close(found, torch.full((3,), 1 / 3, dtype=F64), rtol=0, atol=1e-13)
    # Two alike that beat the third by a: pi(0) = pi(1) = x, and log(x / (1 - 2x)) = (a - 1/2) / tau.
    beats = torch.tensor([[0.5, 0.5, a], [0.5, 0.5, a], [1 - a, 1 - a, 0.5]], dtype=F64)
    x = brentq(lambda x: math.log(x / (1 - 2 * x)) - (a - 0.5) / tau, 1e-9, 0.5 - 1e-12, xtol=1e-15)
    found = PreferenceGame(beats, tau=tau).nash(tolerance=1e-12).log_policy.exp()
    torch.testing.assert_close(found[:2], torch.full((2,), x, dtype=F64), rtol=0, atol=1e-10)


# Where the game without regularisation is nearly degenerate (seed 1), the limit is reached at far smaller tau only.
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_as_tau_vanishes_the_nash_policy_becomes_that_of_the_linear_program(seed):
    game = random_game(seed, answers=5, tau=2e-3)
    edges = (game.preferences - 0.5).numpy()
    # Maximise v with p^T A >= v, p on the simplex.
    program = linprog(
        c=[0, 0, 0, 0, 0, -1],
        A_ub=[[*(-edges[:, j]), 1] for j in range(5)],
        b_ub=[0] * 5,
        A_eq=[[1, 1, 1, 1, 1, 0]],
        b_eq=[1],
        bounds=[(0, 1)] * 5 + [(None, None)],
    )
    found = game.nash()
    assert found.status is Stop.CONVERGED
    exact = torch.tensor(program.x[:5], dtype=F64)
    errors = [(g.nash().log_policy.exp() - exact).abs().max() for g in (random_game(seed, answers=5, tau=0.05), game)]
    assert errors[1] < 0.02
    assert errors[1] < 0.5 * errors[0]
    plain = PreferenceGame(game.preferences, tau=0.0)
    assert float(plain.exploitability(exact.clamp_min(1e-300).log())) < 1e-9
    # What the divergence can be worth to a rival is at most tau log(1 / the rarest answer).
    assert float(plain.exploitability(found.log_policy)) <= -game.tau * float(game.log_reference.min())


def test_newtons_matrix_has_eigenvalues_of_real_part_one_so_that_it_is_never_singular():
    for seed in range(20):
        game, pi = random_game(seed, tau=0.01), random_policy(seed, spread=3.0)
        jacobian = torch.autograd.functional.jacobian(
            lambda theta, game=game: theta - (game.preferences @ theta.softmax(-1)) / game.tau, pi
        )
        eigenvalues = torch.linalg.eigvals(jacobian)
        torch.testing.assert_close(eigenvalues.real, torch.ones(6, dtype=F64), rtol=0, atol=1e-6)
        error = pi - game.best_response(pi)
        step = game._newton_step(pi, error)
        torch.testing.assert_close(jacobian @ step, -error, rtol=0, atol=1e-9)


def test_prompts_are_solved_together_as_they_would_be_alone():
    game = random_game(7, answers=5, tau=0.03, prompts=(4, 3))
    together = game.nash(tolerance=1e-11)
    assert together.log_policy.shape == (4, 3, 5)
    for i in range(4):
        for j in range(3):
            alone = PreferenceGame(game.preferences[i, j], game.log_reference[i, j], tau=0.03).nash(tolerance=1e-11)
            torch.testing.assert_close(together.log_policy[i, j], alone.log_policy, rtol=0, atol=1e-9)
    policies = random_policy(1, answers=5, prompts=(2, 4, 3))
    torch.testing.assert_close(
        game.exploitability(policies)[1, 2, 1],
        PreferenceGame(game.preferences[2, 1], game.log_reference[2, 1], tau=0.03).exploitability(policies[1, 2, 1]),
    )


def test_hedge_a_mirror_step_without_regularisation_is_multiplicative_weights():
    game, pi = random_game(8, tau=0.0), random_policy(8)
    expected = pi.exp() * ((game.preferences @ pi.exp()) / 0.3).exp()
    torch.testing.assert_close(game.mirror_step(pi, eta=0.3).exp(), expected / expected.sum(), rtol=0, atol=1e-12)


def test_a_mirror_step_with_eta_at_tau_is_the_best_response():
    game, pi = random_game(9), random_policy(9)
    torch.testing.assert_close(game.mirror_step(pi, eta=0.1), game.best_response(pi), rtol=0, atol=1e-12)


def test_a_mirror_step_maximises_the_linearised_game_less_the_divergence_to_the_policy():
    game, pi, eta = random_game(10, tau=0.2), random_policy(10), 0.7
    gradient = game.win_rate(pi) - game.tau * (pi - game.log_reference)

    def objective(log_q):
        q = log_q.exp()
        return (q * gradient).sum(-1) - eta * (q * (log_q - pi)).sum(-1)

    best = objective(game.mirror_step(pi, eta=eta))
    for seed in range(50):
        rival = (game.mirror_step(pi, eta=eta) + random_policy(seed, spread=0.05 + seed / 100)).log_softmax(-1)
        assert objective(rival) <= best + 1e-13


def test_for_small_logits_of_a_reward_the_step_is_that_of_a_quarter_of_the_reward():
    rewards = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=F64)
    pi, eta, errors = random_policy(11, answers=4), 0.5, []
    for scale in (0.1, 0.05, 0.025):
        r = scale * rewards
        game = PreferenceGame(torch.sigmoid(r[:, None] - r), random_policy(12, answers=4), tau=0.2)
        step = game.mirror_step(pi, eta=eta)
        rewarded = (game.mixture(pi, eta=eta) + r / (4 * eta)).log_softmax(-1)
        errors.append(float((step - rewarded).abs().max()))
    # Halving the logits takes an eighth of the error: sigmoid(x) - 1/2 = x/4 - x^3/48.
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.05)


def divergence(p, q):
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_last_iterate_of_mirror_descent_nears_the_nash_policy_like_one_over_rounds(seed):
    game = random_game(seed, tau=0.1)
    nash, pi = game.nash(tolerance=1e-12).log_policy, game.log_reference
    distance = divergence(nash, pi)
    for t in range(500):
        eta = game.tau * (t + 2) / 2
        pi, before = game.mirror_step(pi, eta=eta), distance
        distance = divergence(nash, pi)
        # Along the path the gradient's entries span at most 2: win rates at most 1, and tau log pi / rho as much.
        assert distance <= (1 - game.tau / eta) * before + 1 / (2 * eta**2)
        assert distance <= 2 / (game.tau**2 * (t + 2))
    assert distance < 1e-4
    assert float(game.exploitability(pi)) < 1e-5


@pytest.mark.parametrize("rounds", [10, 300])
def test_the_average_policy_of_mirror_descent_is_exploited_by_no_more_than_its_regret(rounds):
    game, eta = random_game(13, tau=0.0), math.sqrt(rounds / (8 * math.log(6)))
    pi, total = torch.full((6,), -math.log(6), dtype=F64), torch.zeros(6, dtype=F64)
    for _ in range(rounds):
        total += pi.exp() / rounds
        pi = game.mirror_step(pi, eta=eta)
    assert float(game.exploitability(total.log())) <= eta * math.log(6) / rounds + 1 / (8 * eta)


def test_mirror_descent_with_large_steps_need_not_converge_and_with_small_ones_does():
    beats = torch.full((3, 3), 0.5, dtype=F64)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        beats[i, j], beats[j, i] = 0.9, 0.1
    game = PreferenceGame(beats, torch.tensor([0.5, 0.3, 0.2], dtype=F64).log(), tau=0.05)
    large = small = game.log_reference
    for _ in range(500):
        large, small = game.mirror_step(large, eta=0.1), game.mirror_step(small, eta=1.0)
    assert float(game.exploitability(large)) > 0.1
    assert float(game.exploitability(small)) < 1e-8


@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_the_policy_is_unchanged_by_a_preference_table_given_in_another_order(seed):
    game = random_game(seed, prompts=(2,))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    turned = PreferenceGame(game.preferences[:, order][:, :, order], game.log_reference[:, order], tau=game.tau)
    torch.testing.assert_close(
        turned.nash(tolerance=1e-11).log_policy, game.nash(tolerance=1e-11).log_policy[:, order], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_game_keeps_its_dtype_and_converges_in_it(dtype):
    game = random_game(0, tau=0.2)
    game = PreferenceGame(game.preferences.to(dtype), game.log_reference.to(dtype), tau=0.2)
    found = game.nash()
    assert found.status is Stop.CONVERGED
    assert found.log_policy.dtype == game.exploitability(found.log_policy).dtype == dtype


def test_a_tolerance_below_rounding_ends_without_success_and_says_so():
    game = random_game(0, tau=0.2)
    game = PreferenceGame(game.preferences.float(), game.log_reference.float(), tau=0.2)
    found = game.nash(tolerance=1e-12)
    assert found.status in (Stop.STALLED, Stop.ITERATION_LIMIT)
    assert found.residual < 1e-5


@pytest.mark.untyped
def test_bad_games_and_policies_are_refused_by_name():
    good = random_game(0)
    for broken, message in (
        (torch.rand(3, 4), "preferences must have shape"),
        (torch.eye(3), "must add up to 1"),
        (torch.full((2, 2), 0.5) + torch.tensor([[0.0, 0.7], [-0.7, 0.0]]), "between 0 and 1"),
        (torch.full((2, 2), float("nan")), "NaN"),
        (torch.zeros(0, 2, 2), "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceGame(broken, tau=0.1)
    with pytest.raises(TypeError, match="preferences must have a floating-point dtype"):
        PreferenceGame(torch.ones(2, 2).long(), tau=0.1)
    with pytest.raises(ValueError, match="tau must be"):
        PreferenceGame(good.preferences, tau=-0.1)
    with pytest.raises(ValueError, match=r"log_reference must have shape \(\*prompts, 6\)"):
        PreferenceGame(good.preferences, torch.zeros(5), tau=0.1)
    with pytest.raises(ValueError, match="log_policy must hold log-probabilities"):
        good.payoff(torch.zeros(6, dtype=F64), good.log_reference)
    with pytest.raises(ValueError, match="log_opponent contains NaN"):
        good.win_rate(torch.full((6,), -math.inf, dtype=F64))
    with pytest.raises(ValueError, match=r"eta must be at least tau = 0\.1"):
        good.mirror_step(good.log_reference, eta=0.09)
    with pytest.raises(ValueError, match="eta must be a finite number above 0"):
        good.mixture(good.log_reference, eta=0.0)
