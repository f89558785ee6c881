"""INPO's loss against the mirror descent it stands for (Zhang et al. 2024)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.preferences import INPOLoss, IPOLoss, PairTokens, PreferenceGame, inpo_loss, ipo_loss, tournament

F64 = torch.float64
TAU, ETA = 0.2, 0.5
seeds = st.integers(0, 10_000)


def random_policy(seed, answers=6, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(answers, generator=generator, dtype=F64)).log_softmax(-1)


def random_game(seed, answers=6, tau=TAU):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(answers, answers, generator=generator, dtype=F64)
    return PreferenceGame(torch.sigmoid(scores - scores.mT), random_policy(seed + 1, answers), tau=tau)


def rows(seed, count=8):
    generator = torch.Generator().manual_seed(seed)
    return list(-5 * torch.rand(6, count, generator=generator, dtype=F64)), torch.rand(
        count, generator=generator, dtype=F64
    )


def population_loss(log_policy, previous, game, *, eta=ETA, tau=TAU, soft=True):
    """The mean loss over all pairs of answers that the last policy draws, and over the labels of each."""
    first, second = torch.cartesian_prod(torch.arange(len(previous)), torch.arange(len(previous))).unbind(1)
    weight = (previous[first] + previous[second]).exp()
    p = game.preferences[first, second]

    def loss(winner, loser, preference=None):
        return inpo_loss(
            log_policy[winner],
            log_policy[loser],
            game.log_reference[winner],
            game.log_reference[loser],
            prev_logp_chosen=previous[winner],
            prev_logp_rejected=previous[loser],
            preference=preference,
            eta=eta,
            tau=tau,
        )

    losses = loss(first, second, p) if soft else p * loss(first, second) + (1 - p) * loss(second, first)
    return (weight * losses).sum()


def minimised(loss, answers=6):
    theta = torch.zeros(answers, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(theta.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().log_softmax(-1)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(("eta", "tau"), [(0.5, 0.2), (0.5, 0.0), (0.3, 0.3), (2.0, 0.1)])
def test_the_minimiser_of_the_mean_loss_is_the_exact_step_of_mirror_descent(soft, eta, tau):
    game, previous = random_game(0, tau=tau), random_policy(5)
    found = minimised(lambda log_policy: population_loss(log_policy, previous, game, eta=eta, tau=tau, soft=soft))
    torch.testing.assert_close(found, game.mirror_step(previous, eta=eta), rtol=0, atol=1e-7)


def test_the_gradient_of_the_mean_loss_vanishes_at_the_nash_policy_played_against_itself():
    game = random_game(1)
    nash = game.nash(tolerance=1e-13).log_policy
    theta = nash.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(population_loss(theta.log_softmax(-1), nash, game), theta)
    assert gradient.abs().max() < 1e-10
    elsewhere = random_policy(3).requires_grad_()
    (gradient,) = torch.autograd.grad(population_loss(elsewhere.log_softmax(-1), elsewhere.detach(), game), elsewhere)
    assert gradient.abs().max() > 1e-2


@settings(max_examples=15, deadline=None)
@given(seed=seeds, eta=st.floats(0.01, 5.0), share=st.floats(0.0, 1.0))
def test_ipo_the_first_round_is_ipo_whatever_tau(seed, eta, share):
    (chosen, rejected, ref_chosen, ref_rejected, _, _), _ = rows(seed)
    expected = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=eta)
    fixed = {"prev_logp_chosen": ref_chosen, "prev_logp_rejected": ref_rejected}
    for known in ({}, fixed):
        found = inpo_loss(chosen, rejected, ref_chosen, ref_rejected, **known, eta=eta, tau=share * eta)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_every_round_is_ipo_against_the_mixture_of_reference_and_last_policy():
    (chosen, rejected, ref_chosen, ref_rejected, prev_chosen, prev_rejected), _ = rows(0)
    loss = INPOLoss(ETA, tau=TAU)
    expected = loss(
        chosen, rejected, ref_chosen, ref_rejected, prev_logp_chosen=prev_chosen, prev_logp_rejected=prev_rejected
    )
    mixed = loss.mixed_reference(ref_chosen, prev_chosen), loss.mixed_reference(ref_rejected, prev_rejected)
    torch.testing.assert_close(loss(chosen, rejected, *mixed), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(IPOLoss(ETA)(chosen, rejected, *mixed), expected, rtol=0, atol=1e-12)
    # The reference has the weight tau / eta, the last policy the rest.
    torch.testing.assert_close(mixed[0], 0.4 * ref_chosen + 0.6 * prev_chosen, rtol=0, atol=1e-12)


def test_mixed_tokens_run_a_later_round_in_a_trainer_that_knows_of_one_reference():
    generator = torch.Generator().manual_seed(0)
    tokens = [-2 * torch.rand(3, 5, generator=generator, dtype=F64) for _ in range(6)]
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    loss = INPOLoss(ETA, tau=TAU)
    mixed = [loss.mixed_reference(tokens[2 + k], tokens[4 + k]) for k in range(2)]
    sums = [(mask * each).sum(-1) for each in tokens]
    expected = loss(*sums[:4], prev_logp_chosen=sums[4], prev_logp_rejected=sums[5])
    found = loss.from_tokens(PairTokens(tokens[0], tokens[1], mask, mask, *mixed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tau", "reference", "last"), [(ETA, True, False), (0.0, False, True), (TAU, True, True)])
def test_with_eta_at_tau_the_last_policy_drops_out_and_with_tau_zero_the_reference(tau, reference, last):
    (chosen, rejected, ref_chosen, ref_rejected, prev_chosen, prev_rejected), _ = rows(1)

    def losses(shift_reference=0.0, shift_last=0.0):
        return inpo_loss(
            chosen,
            rejected,
            ref_chosen + shift_reference,
            ref_rejected,
            prev_logp_chosen=prev_chosen + shift_last,
            prev_logp_rejected=prev_rejected,
            eta=ETA,
            tau=tau,
        )

    assert (not torch.allclose(losses(), losses(shift_reference=1.0))) == reference
    assert (not torch.allclose(losses(), losses(shift_last=1.0))) == last


@settings(max_examples=15, deadline=None)
@given(seed=seeds, eta=st.floats(0.05, 5.0))
def test_the_soft_loss_is_the_mean_of_the_hard_loss_over_labels(seed, eta):
    (chosen, rejected, ref_chosen, ref_rejected, prev_chosen, prev_rejected), p = rows(seed)

    def loss(flip=False, preference=None):
        one, other = (chosen, ref_chosen, prev_chosen), (rejected, ref_rejected, prev_rejected)
        (winner, ref_w, prev_w), (loser, ref_l, prev_l) = (other, one) if flip else (one, other)
        known = {"prev_logp_chosen": prev_w, "prev_logp_rejected": prev_l, "preference": preference}
        return inpo_loss(winner, loser, ref_w, ref_l, **known, eta=eta)

    mean = p * loss() + (1 - p) * loss(flip=True)
    torch.testing.assert_close(loss(preference=p), mean, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(loss(flip=True, preference=1 - p), mean, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(loss(preference=torch.ones_like(p)), loss(), rtol=0, atol=1e-12)


def test_the_mean_loss_differs_from_the_regression_on_win_rates_by_a_constant():
    game, previous = random_game(2), random_policy(4)
    rates, weight = game.win_rate(previous), previous.exp()
    anchor = (TAU / ETA) * game.log_reference + (1 - TAU / ETA) * previous

    def regression(log_policy):
        g = log_policy - anchor
        residual = (g[:, None] - g) - (rates[:, None] - rates) / ETA
        return (weight[:, None] * weight * residual.square()).sum()

    differences = torch.stack(
        [
            population_loss(policy, previous, game, soft=soft) - regression(policy)
            for policy in map(random_policy, range(5))
            for soft in (True, False)
        ]
    )
    torch.testing.assert_close(differences, differences[:1].expand(10), rtol=0, atol=1e-12)


def test_the_gradient_is_twice_the_residual():
    (chosen, rejected, ref_chosen, ref_rejected, prev_chosen, prev_rejected), p = rows(6)
    chosen.requires_grad_()
    rejected.requires_grad_()
    known = {"prev_logp_chosen": prev_chosen, "prev_logp_rejected": prev_rejected, "eta": ETA, "tau": TAU}
    inpo_loss(chosen, rejected, ref_chosen, ref_rejected, **known, preference=p).sum().backward()
    h = chosen - rejected - 0.4 * (ref_chosen - ref_rejected) - 0.6 * (prev_chosen - prev_rejected)
    expected = 2 * (h - (2 * p - 1) / (2 * ETA)).detach()
    torch.testing.assert_close(chosen.grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rejected.grad, -expected, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, shift=st.floats(-5, 5))
def test_a_shift_of_both_answers_under_any_of_the_three_policies_changes_nothing(seed, shift):
    given_rows, p = rows(seed)

    def losses(values):
        known = {"prev_logp_chosen": values[4], "prev_logp_rejected": values[5], "preference": p}
        return inpo_loss(*values[:4], **known, eta=ETA, tau=TAU)

    expected = losses(given_rows)
    for policy in range(3):
        shifted = [row + shift if which // 2 == policy else row for which, row in enumerate(given_rows)]
        torch.testing.assert_close(losses(shifted), expected, rtol=0, atol=1e-10)


def test_a_tie_is_least_where_the_log_ratio_is_that_of_the_mixture():
    reference = torch.tensor([-3.0], dtype=F64), torch.tensor([-4.0], dtype=F64)
    tie = torch.tensor([0.5], dtype=F64)
    values = [
        float(inpo_loss(reference[0] + s, reference[1], *reference, preference=tie, eta=ETA)) for s in (-0.1, 0.0, 0.1)
    ]
    assert values[1] == pytest.approx(1 / (4 * ETA**2), abs=1e-12)
    assert values[0] == pytest.approx(values[2]) == pytest.approx(values[1] + 0.01)


def extremes_loss(log_policy, previous, game, answers):
    """The mean loss over the best and the worst of n answers, over all n answers that the last policy may draw."""
    tuples = torch.cartesian_prod(*[torch.arange(len(previous))] * answers)
    weight = previous[tuples].sum(1).exp()
    best, worst = tournament(torch.zeros(len(tuples)), tuples, lambda _, first, second: game.preferences[first, second])
    every = torch.arange(len(tuples))
    winner, loser = tuples[every, best], tuples[every, worst]
    known = {"prev_logp_chosen": previous[winner], "prev_logp_rejected": previous[loser]}
    losses = inpo_loss(
        log_policy[winner],
        log_policy[loser],
        game.log_reference[winner],
        game.log_reference[loser],
        **known,
        eta=ETA,
        tau=TAU,
    )
    return (weight * losses * (winner != loser)).sum()


def test_pairs_of_the_best_and_the_worst_move_the_minimiser_away_from_mirror_descent():
    game, previous = random_game(3, answers=3), random_policy(4, answers=3)
    exact = game.mirror_step(previous, eta=ETA)
    moved = minimised(lambda log_policy: extremes_loss(log_policy, previous, game, 4), answers=3)
    assert (moved - exact).abs().max() > 0.2


def test_the_loss_of_one_pair_by_hand():
    value = inpo_loss(
        *(torch.tensor([x], dtype=F64) for x in (-1.0, -2.0, -3.0, -5.0)),
        prev_logp_chosen=torch.tensor([-2.0], dtype=F64),
        prev_logp_rejected=torch.tensor([-6.0], dtype=F64),
        eta=0.5,
        tau=0.125,
    )
    # h = 1 - 2 / 4 - 3 * 4 / 4 = -2.5, the target 1.
    assert float(value) == pytest.approx(3.5**2, abs=1e-12)


def test_the_defaults_are_those_said_to_be_the_papers():
    loss = INPOLoss()
    assert (loss.eta, loss.tau) == (7.5e-3, 2.5e-3)
    assert INPOLoss(0.3).tau == pytest.approx(0.1)
    assert math.isclose(1 / (2 * loss.eta), 66.667, rel_tol=1e-4)


def test_the_loss_of_a_batch_is_the_loss_of_each_pair_under_vmap():
    values, p = rows(9)

    def loss(*row):
        known = {"prev_logp_chosen": row[4], "prev_logp_rejected": row[5], "preference": row[6]}
        return inpo_loss(*row[:4], **known, eta=ETA, tau=TAU)

    each = torch.func.vmap(lambda *row: loss(*(x[None] for x in row))[0])(*values, p)
    torch.testing.assert_close(each, loss(*values, p), rtol=0, atol=1e-12)


@pytest.mark.untyped
def test_bad_settings_and_inputs_are_refused_by_name():
    for eta, tau, message in (
        (0.0, None, "eta must be a finite number above 0"),
        (-1.0, None, "eta must be"),
        (0.5, -0.1, "tau must be"),
        (0.1, 0.2, r"eta must be at least tau = 0\.2"),
    ):
        with pytest.raises(ValueError, match=message):
            INPOLoss(eta, tau=tau)
        values, _ = rows(0)
        with pytest.raises(ValueError, match=message):
            inpo_loss(*values[:4], eta=eta, tau=tau)
    values, p = rows(0)
    loss = INPOLoss()

    def call(chosen=values[4], rejected=values[5], preference=None):
        return loss(*values[:4], prev_logp_chosen=chosen, prev_logp_rejected=rejected, preference=preference)

    with pytest.raises(ValueError, match="must be given together"):
        call(rejected=None)
    with pytest.raises(ValueError, match="must be given together"):
        call(chosen=None)
    with pytest.raises(ValueError, match="prev_logp_chosen requires a gradient"):
        call(chosen=values[4].clone().requires_grad_())
    with pytest.raises(ValueError, match="prev_logp_rejected must have shape"):
        call(rejected=values[5][:3])
    with pytest.raises(ValueError, match="prev_logp_chosen contains NaN"):
        call(chosen=values[4] * float("nan"))
    with pytest.raises(ValueError, match="preference must hold probabilities"):
        call(preference=p + 1)
    with pytest.raises(ValueError, match="preference contains NaN"):
        call(preference=p * float("nan"))
    with pytest.raises(TypeError, match="preference must have a floating-point dtype"):
        call(preference=torch.ones(8).long())
