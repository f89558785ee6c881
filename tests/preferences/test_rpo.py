"""Regularized preference optimisation against its mathematics (Liu et al. 2024)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.preferences import (
    DPOLoss,
    PairTokens,
    RPOLoss,
    adversarial_value,
    coverage_coefficient,
    dpo_loss,
    rpo_loss,
)

F64 = torch.float64


def close(found, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=found.dtype).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def pairs_of(seed, batch=6, learn=False):
    generator = torch.Generator().manual_seed(seed)
    rows = [-10 - 5 * torch.randn(batch, generator=generator, dtype=F64) for _ in range(4)]
    return rows[0].requires_grad_(learn), rows[1].requires_grad_(learn), rows[2], rows[3]


def simplex(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).softmax(-1)


def fit(reward, winners, losers):
    """The reward model's loss L(r): of pairs of answers, one row a prompt, for rewards ``(*, prompts, answers)``."""
    prompts = torch.arange(len(winners))[:, None]
    return -F.logsigmoid(reward[..., prompts, winners] - reward[..., prompts, losers]).mean((-2, -1))


# Oracle 1.
@pytest.mark.parametrize("seed", range(5))
def test_the_game_at_the_best_policy_of_a_reward_is_the_rpo_loss_of_that_policy(seed):
    generator = torch.Generator().manual_seed(seed)
    beta, eta, prompts, answers = 0.3, 0.7, 4, 7
    reward = 2 * torch.randn(prompts, answers, generator=generator, dtype=F64)
    reference, baseline = simplex(seed + 10, prompts, answers), simplex(seed + 20, prompts, answers)
    winners, losers = torch.randint(answers, (2, prompts, 3), generator=generator)
    best = (reference.log() + reward / beta).softmax(-1)
    game = eta * adversarial_value(reward, reference, baseline, beta=beta).mean() + fit(reward, winners, losers)
    ratio = (best / reference).log()
    loss = eta * beta * -(baseline * ratio).sum(-1).mean() + fit(beta * ratio, winners, losers)
    close(game, loss)

    # The same by the loss itself, every answer of the baseline policy taken in turn.
    prompt = torch.arange(prompts)[:, None].expand(prompts, 3).flatten()
    logp, ref = best.log(), reference.log()
    chosen, rejected = winners.flatten(), losers.flatten()
    total = 0.0
    for answer in range(answers):
        losses = rpo_loss(
            logp[prompt, chosen],
            logp[prompt, rejected],
            ref[prompt, chosen],
            ref[prompt, rejected],
            beta=beta,
            eta=eta,
            logp_baseline=logp[prompt, answer],
        )
        total += (baseline[prompt, answer] * losses).mean()
    constant = eta * beta * (baseline * ref).sum(-1).mean()
    close(total + constant, game)


def test_no_policy_gains_more_than_the_best_one_which_is_the_references_tilt():
    reward, reference, baseline = simplex(0, 9).log(), simplex(1, 9), simplex(2, 9)
    best = (reference.log() + reward / 0.4).softmax(-1)
    highest = adversarial_value(reward, reference, baseline, beta=0.4)
    close(adversarial_value(reward, reference, baseline, beta=0.4, policy=best), highest)
    tried = torch.distributions.Dirichlet(torch.ones(9, dtype=F64)).sample((2000,))
    for share in (1.0, 0.1, 0.01):
        mixed = (1 - share) * best + share * tried
        assert (adversarial_value(reward, reference, baseline, beta=0.4, policy=mixed) < highest).all()


def test_the_gradient_of_the_best_value_by_the_reward_is_its_policy_less_the_baseline():
    reward = simplex(3, 5, 9).log().requires_grad_()
    reference, baseline = simplex(4, 9), simplex(5, 9)
    adversarial_value(reward, reference, baseline, beta=0.2).sum().backward()
    close(reward.grad, (reference.log() + reward.detach() / 0.2).softmax(-1) - baseline)


def test_a_shift_of_the_reward_changes_no_value():
    reward, reference, baseline, policy = (simplex(seed, 8) for seed in range(4))
    for one in (None, policy):
        expected = adversarial_value(reward, reference, baseline, policy=one)
        close(adversarial_value(reward + 3.0, reference, baseline, policy=one), expected, atol=1e-10)


def test_an_answer_that_the_reference_never_gives_is_worth_nothing_to_the_best_policy_and_forbidden_to_others():
    reference, even = torch.tensor([0.5, 0.5, 0.0]), torch.full((3,), 1 / 3)
    short = adversarial_value(torch.tensor([1.0, 0.0]), reference[:2], reference[:2])
    close(adversarial_value(torch.tensor([1.0, 0.0, 9.0]), reference, reference), short, atol=1e-6)
    assert adversarial_value(torch.ones(3), reference, even, policy=even) == -math.inf
    assert adversarial_value(torch.ones(3), reference, even, policy=reference) == 0


# Oracle 2.
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sft", ["sum", "mean"])
def test_without_pessimism_value_and_gradient_are_those_of_dpo(sft, label_smoothing):
    lengths = torch.arange(1, 7)
    rpo, dpo, peer = pairs_of(0, learn=True), pairs_of(0, learn=True), pairs_of(0, learn=True)
    loss = rpo_loss(*rpo, beta=0.3, eta=0.0, sft=sft, label_smoothing=label_smoothing, baseline_lengths=lengths).mean()
    DPOLoss(0.3, label_smoothing=label_smoothing)(*dpo).backward()
    loss.backward()
    # The formula of the common trainers, written by hand.
    scaled = 0.3 * (peer[0] - peer[1] - (peer[2] - peer[3]))
    by_hand = -F.logsigmoid(scaled) * (1 - label_smoothing) - F.logsigmoid(-scaled) * label_smoothing
    by_hand.mean().backward()
    close(loss, by_hand.mean())
    for one, two, three in zip(rpo[:2], dpo[:2], peer[:2], strict=True):
        close(one.grad, two.grad)
        close(one.grad, three.grad)


# Oracle 3.
@settings(max_examples=50, deadline=None)
@given(beta=st.floats(0.01, 2.0), eta=st.floats(0.0, 2.0), smoothing=st.floats(0.0, 0.49), seed=st.integers(0, 1000))
def test_the_gradients_are_the_closed_ones(beta, eta, smoothing, seed):
    chosen, rejected, *references = pairs_of(seed, learn=True)
    rpo_loss(chosen, rejected, *references, beta=beta, eta=eta, label_smoothing=smoothing).sum().backward()
    margin = (chosen - references[0] - rejected + references[1]).detach()
    s = (1 - smoothing) * torch.sigmoid(-beta * margin) - smoothing * torch.sigmoid(beta * margin)
    close(chosen.grad, -beta * s - eta * beta)
    close(rejected.grad, beta * s)


@pytest.mark.parametrize("sft", ["sum", "mean"])
def test_the_gradients_by_all_three_answers_match_differences(sft):
    chosen, rejected, *references = pairs_of(1, batch=3, learn=True)
    baseline = (chosen.detach() - 2).requires_grad_()
    lengths = torch.tensor([1, 4, 9])

    def loss(chosen, rejected, baseline):
        return rpo_loss(
            chosen, rejected, *references, eta=0.4, sft=sft, logp_baseline=baseline, baseline_lengths=lengths
        )

    assert torch.autograd.gradcheck(loss, (chosen, rejected, baseline))
    loss(chosen, rejected, baseline).sum().backward()
    close(baseline.grad, -0.04 if sft == "sum" else -0.4 / lengths.double())


# Oracle 4.
def test_an_action_in_no_pair_has_no_gradient_in_dpo_and_its_probability_times_eta_beta_in_rpo():
    beta, eta = 0.3, 0.7
    theta = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=F64).requires_grad_()
    ref = torch.full((6,), 1 / 6, dtype=F64).log()
    chosen, rejected = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 0, 0])

    def gradient(loss):
        logp = theta.log_softmax(-1)
        value = loss(logp[chosen], logp[rejected], ref[chosen], ref[rejected])
        return torch.autograd.grad(value, theta)[0]

    close(gradient(DPOLoss(beta))[3:], 0.0)
    close(gradient(RPOLoss(beta, eta=eta))[3:], eta * beta * theta.detach().softmax(-1)[3:])


# Oracle 5.
def test_as_beta_vanishes_with_eta_beta_fixed_the_loss_is_log_two_plus_the_likelihood():
    weight, beta = 0.25, 1e-9
    chosen, rejected, *references = pairs_of(3, learn=True)
    losses = rpo_loss(chosen, rejected, *references, beta=beta, eta=weight / beta)
    losses.sum().backward()
    close(losses, math.log(2) - weight * chosen.detach(), atol=1e-7)
    close(chosen.grad, -weight, atol=1e-8)
    close(rejected.grad, 0.0, atol=1e-8)


# Oracle 6.
def test_the_mean_form_is_the_sum_form_with_eta_over_beta_and_length():
    pairs, lengths = pairs_of(4), torch.full((6,), 17)
    mean = rpo_loss(*pairs, beta=0.3, eta=0.2, sft="mean", baseline_lengths=lengths)
    close(mean, rpo_loss(*pairs, beta=0.3, eta=0.2 / (0.3 * 17)))
    different = torch.arange(2, 8)
    each = rpo_loss(*pairs, beta=0.3, eta=0.2, sft="mean", baseline_lengths=different)
    close(each, dpo_loss(*pairs, beta=0.3) - 0.2 * pairs[0] / different)


def tokens_of(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    rows = [-2 * torch.rand(len(lengths), 9, generator=generator, dtype=F64) for _ in range(4)]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    return PairTokens(rows[0].requires_grad_(), rows[1].requires_grad_(), mask, mask, rows[2], rows[3])


def trl_sigmoid_and_sft(tokens, beta, weight):
    """TRL 1.16's DPOTrainer with ``loss_type=["sigmoid", "sft"]`` and ``loss_weights=[1, weight]``."""
    sums = [(row * tokens.chosen_mask).sum(1) for row in (tokens[0], tokens[1], tokens.ref_chosen, tokens.ref_rejected)]
    sigmoid = -F.logsigmoid(beta * (sums[0] - sums[2] - (sums[1] - sums[3])))
    return sigmoid.mean() + weight * -tokens.chosen[tokens.chosen_mask].mean()


def test_answers_of_one_length_make_both_forms_trls_dpo_with_a_likelihood_term():
    beta, eta, length = 0.3, 0.05, 7
    for loss in (RPOLoss(beta, eta=eta), RPOLoss(beta, eta=eta * beta * length, sft="mean")):
        ours, peer = tokens_of(5, [length] * 4), tokens_of(5, [length] * 4)
        found, expected = loss.from_tokens(ours), trl_sigmoid_and_sft(peer, beta, eta * beta * length)
        close(found, expected)
        found.backward()
        expected.backward()
        close(ours.chosen.grad, peer.chosen.grad)
        close(ours.rejected.grad, peer.rejected.grad)


def test_answers_of_different_lengths_weigh_alike_in_the_mean_form_and_by_their_tokens_in_trls():
    tokens, beta, weight = tokens_of(6, [1, 2, 4, 9]), 0.3, 0.2
    lengths = tokens.chosen_mask.sum(1)
    nll = -(tokens.chosen * tokens.chosen_mask).sum(1)
    dpo = DPOLoss(beta).from_tokens(tokens)
    close(RPOLoss(beta, eta=weight, sft="mean").from_tokens(tokens), dpo + weight * (nll / lengths).mean())
    close(trl_sigmoid_and_sft(tokens, beta, weight), dpo + weight * nll.sum() / lengths.sum())
    close(RPOLoss(beta, eta=weight).from_tokens(tokens), dpo + weight * beta * nll.mean())


# Oracle 7.
@pytest.mark.parametrize("shift", [-3.0, 0.5, 20.0])
def test_a_shift_of_both_log_ratios_moves_the_likelihood_term_and_nothing_else(shift):
    chosen, rejected, *references = pairs_of(7)
    change = rpo_loss(chosen + shift, rejected + shift, *references, beta=0.3, eta=0.7)
    change = change - rpo_loss(chosen, rejected, *references, beta=0.3, eta=0.7)
    close(change, -0.3 * 0.7 * shift, atol=1e-10)


# Oracle 8.
def grid_game(points, beta, eta, span=1.5):
    """The game over all rewards of three answers on a grid, and over the best policies of those rewards."""
    axis = torch.linspace(-span, span, points, dtype=F64)
    rewards = torch.cartesian_prod(axis, axis)
    rewards = torch.cat([rewards, torch.zeros(len(rewards), 1, dtype=F64)], 1)
    reference, baseline = simplex(8, 3), simplex(9, 3)
    # Every two answers were compared, each won at least once: the likelihood is bounded in all directions.
    winners, losers = torch.tensor([[0, 0, 1, 1, 2, 0, 2]]), torch.tensor([[1, 2, 0, 2, 0, 1, 1]])
    policies = (reference.log() + rewards / beta).softmax(-1)
    fits = fit(rewards[:, None], winners, losers)
    values = adversarial_value(rewards, reference, baseline, beta=beta, policy=policies[:, None])
    highest = eta * adversarial_value(rewards, reference, baseline, beta=beta) + fits
    # Algorithm 2's objective of each policy: the loss of every pair, with the chosen answer's place taken by the
    # baseline policy's answers, weighed by their probability.
    logp, ref = policies.log(), reference.log()
    w, one = winners[0], winners[0] * 0
    losses = sum(
        baseline[y]
        * torch.stack(
            [
                rpo_loss(p[w], p[losers[0]], ref[w], ref[losers[0]], beta=beta, eta=eta, logp_baseline=p[one + y])
                for p in logp
            ]
        ).mean(1)
        for y in range(3)
    )
    return eta * values + fits, highest, losses + eta * beta * baseline @ ref


@pytest.mark.parametrize(("beta", "eta"), [(1.0, 0.3), (0.5, 0.1), (0.3, 1.0)])
@pytest.mark.parametrize("points", [11, 31])
def test_on_a_grid_max_min_is_min_max_and_the_cautious_policy_minimises_the_loss(beta, eta, points):
    game, highest, losses = grid_game(points, beta, eta)
    close(losses, highest, atol=1e-10)
    close(game.amax(0), highest, atol=1e-10)  # every reward's best policy is on the grid
    step = 3.0 / (points - 1)
    gap = (game.amax(0).amin() - game.amin(1).amax()).item()
    # Second order: the game is stationary in both at its saddle.
    assert -1e-12 <= gap <= step**2
    cautious, minimiser = game.amin(1).argmax(), losses.argmin()
    for place, other in ((cautious // points, minimiser // points), (cautious % points, minimiser % points)):
        assert abs(place - other) <= 1
        assert 0 < place < points - 1


# Coverage.
def graph_laplacian(pairs):
    both = pairs + pairs.transpose(-1, -2)
    return torch.diag_embed(both.sum(-1)) - both


def test_among_all_rewards_coverage_is_an_effective_resistance_and_a_finite_class_attains_it():
    answers = 6
    pairs = simplex(10, answers * answers).view(answers, answers)
    true, policy, baseline = simplex(11, answers).log(), simplex(12, answers), simplex(13, answers)
    direction = torch.linalg.pinv(graph_laplacian(pairs)) @ (policy - baseline)
    resistance = (policy - baseline) @ direction
    close(coverage_coefficient((true - direction)[None], true, policy, baseline, pairs), resistance.sqrt())
    rewards = torch.randn(500, answers, generator=torch.Generator().manual_seed(14), dtype=F64)
    below = coverage_coefficient(rewards, true, policy, baseline, pairs)
    assert 0 < below < resistance.sqrt()


def test_coverage_averages_over_prompts_as_the_pairs_do():
    prompts, answers = 3, 4
    pairs = simplex(15, prompts * answers**2).view(prompts, answers, answers)
    rewards, true = simplex(16, 5, prompts, answers), simplex(17, prompts, answers)
    policy, baseline = simplex(18, prompts, answers), simplex(19, prompts, answers)
    expected = 0.0
    for reward in rewards:
        doubt = square = 0.0
        for x, i, j in itertools.product(range(prompts), range(answers), range(answers)):
            d = true[x] - reward[x]
            gap = d[i] - d[j]
            square += pairs[x, i, j] * gap**2
            doubt += pairs[x].sum() * policy[x, i] * baseline[x, j] * gap
        expected = max(expected, (doubt / square.sqrt()).item())
    assert expected > 0
    close(coverage_coefficient(rewards, true, policy, baseline, pairs), expected)


def test_coverage_is_zero_for_the_baseline_and_for_rewards_that_differ_by_a_constant():
    pairs = simplex(20, 16).view(4, 4)
    rewards, true, policy = simplex(21, 9, 4), simplex(22, 4), simplex(23, 4)
    assert coverage_coefficient(rewards, true, policy, policy, pairs) == 0
    shifted = true + torch.tensor([[0.0], [0.1], [1e6]], dtype=F64)
    assert coverage_coefficient(shifted, true, policy, simplex(24, 4), pairs) == 0


def test_coverage_is_infinite_where_pairs_cannot_tell_that_the_policy_is_good():
    pairs = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    true = torch.tensor([0.0, 1.0, 2.0])
    uncovered, covered, baseline = torch.eye(3)[2], torch.eye(3)[1], torch.tensor([0.5, 0.5, 0.0])
    for shift in (0.0, 0.1, 0.7):  # not all of which leave the difference of rewards as it was, to the last digit
        unfair = torch.tensor([0.0, 1.0, -2.0]) + shift
        assert coverage_coefficient(torch.stack([true, unfair]), true, uncovered, baseline, pairs) == math.inf
        assert coverage_coefficient(torch.stack([true, unfair]), true, covered, baseline, pairs) == 0
    flattering = torch.tensor([0.0, 1.0, 7.0])
    assert coverage_coefficient(torch.stack([true, flattering]), true, uncovered, baseline, pairs) == 0


@pytest.mark.parametrize("seed", range(4))
def test_with_infinitely_many_pairs_pessimism_competes_with_every_covered_policy(seed):
    generator = torch.Generator().manual_seed(seed)
    top, beta, eta = 2.0, 0.3, 0.8
    # Answer 3 is hardly ever compared.
    frequency = torch.tensor([0.4, 0.35, 0.24, 0.01], dtype=F64)
    pairs = frequency[:, None] * frequency
    rewards = top * torch.rand(60, 4, generator=generator, dtype=F64)
    true = rewards[0]
    reference, baseline = torch.full((4,), 0.25, dtype=F64), frequency
    gaps = rewards[..., :, None] - rewards[..., None, :]
    wins = torch.sigmoid(true[:, None] - true)
    fits = -(pairs * (wins * F.logsigmoid(gaps) + (1 - wins) * F.logsigmoid(-gaps))).sum((-1, -2))
    steps = 14
    grid = torch.tensor([c for c in itertools.product(range(steps + 1), repeat=4) if sum(c) == steps]).double() / steps
    values = adversarial_value(rewards, reference, baseline, beta=beta, policy=grid[:, None])
    cautious = (eta * values + fits).amin(1).argmax()
    slope = torch.tensor(top).sigmoid() * torch.tensor(-top).sigmoid()
    bounds = torch.stack(
        [eta * coverage_coefficient(rewards, true, one, baseline, pairs) ** 2 / (2 * slope) for one in grid]
    )
    gap = values[:, 0] - values[cautious, 0]
    assert (gap <= bounds + 1e-12).all()
    assert gap.max() > 0  # somebody is better, so the bound says something


def test_a_module_that_takes_the_mean_asks_for_lengths_and_one_that_sums_does_not():
    assert not RPOLoss().needs_lengths
    assert RPOLoss(sft="mean").needs_lengths
    assert "sft='mean'" in repr(RPOLoss(sft="mean"))


def test_a_baseline_answer_takes_the_place_of_the_chosen_one():
    pairs, lengths = pairs_of(25), torch.arange(1, 7)
    baseline = pairs[0] - 4
    for sft, divisor in (("sum", torch.ones(6)), ("mean", lengths)):
        loss = RPOLoss(0.3, eta=0.7, sft=sft, label_smoothing=0.1, reduction="none")
        found = loss(*pairs, logp_baseline=baseline, baseline_lengths=lengths)
        weight = 0.7 * (0.3 if sft == "sum" else 1.0)
        close(found, dpo_loss(*pairs, beta=0.3, label_smoothing=0.1) - weight * baseline / divisor)
        own = loss(*pairs, chosen_lengths=lengths, rejected_lengths=lengths + 1)
        close(own, loss(*pairs, logp_baseline=pairs[0], baseline_lengths=lengths))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RPOLoss(0.0), "beta"),
        (lambda: RPOLoss(eta=-0.1), "eta"),
        (lambda: RPOLoss(sft="median"), "sft must be one of"),
        (lambda: RPOLoss(label_smoothing=0.5), "label_smoothing"),
        (lambda: RPOLoss()(*pairs_of(0)[:2]), "ref_logp_chosen is missing"),
        (lambda: RPOLoss()(*pairs_of(0), baseline_lengths=torch.ones(6)), "came without logp_baseline"),
        (lambda: RPOLoss(sft="mean")(*pairs_of(0)), "chosen_lengths is missing"),
        (lambda: RPOLoss(sft="mean")(*pairs_of(0), logp_baseline=pairs_of(0)[0]), "baseline_lengths is missing"),
        (lambda: rpo_loss(*pairs_of(0), eta=math.nan), "eta"),
        (lambda: rpo_loss(*pairs_of(0), logp_baseline=torch.zeros(5)), "logp_baseline must have shape"),
        (lambda: rpo_loss(*pairs_of(0), logp_baseline=torch.full((6,), math.nan)), "logp_baseline contains NaN"),
        (lambda: rpo_loss(*pairs_of(0), sft="mean"), "baseline_lengths is missing"),
        (lambda: rpo_loss(*pairs_of(0), sft="mean", baseline_lengths=torch.ones(5)), "baseline_lengths must have"),
        (lambda: rpo_loss(*pairs_of(0), sft="mean", baseline_lengths=torch.zeros(6)), "at least 1"),
        (lambda: adversarial_value(torch.ones(2), torch.ones(2), simplex(0, 2)), "reference must hold probabilities"),
        (lambda: adversarial_value(torch.ones(2), simplex(0, 2), -simplex(0, 2)), "baseline must hold probabilities"),
        (
            lambda: adversarial_value(torch.ones(2), simplex(0, 2), simplex(0, 2), policy=torch.tensor([math.nan, 1])),
            "policy must hold probabilities",
        ),
        (lambda: adversarial_value(torch.ones(2), simplex(0, 2), simplex(0, 2), beta=0.0), "beta"),
        (
            lambda: coverage_coefficient(
                torch.ones(1, 2), torch.ones(2), torch.ones(2) / 2, torch.ones(2) / 2, torch.ones(2, 2)
            ),
            "pairs must hold probabilities",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
