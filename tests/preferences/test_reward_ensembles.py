"""Reward ensembles against their mathematics (Coste et al. 2024)."""

import copy
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from minimand.preferences import (
    PairwiseRewardLoss,
    RewardEnsemble,
    RewardHeads,
    aggregate_rewards,
    fit_reward_heads,
    pairwise_reward_loss,
)

F64 = torch.float64
METHODS = ["mean", "worst-case", "uncertainty-weighted"]

tables = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.floats(-100, 100), min_size=k, max_size=k), min_size=1, max_size=8)
)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uncertainty_weighted(scores, penalty, **others):
    return aggregate_rewards(scores, method="uncertainty-weighted", penalty=penalty, **others)


def separable(pairs=200, features=4, seed=0, dtype=torch.float32):
    """Pairs of feature vectors of which the one further along a direction was chosen."""
    points = normal(2, pairs, features, seed=seed, dtype=dtype)
    first = points[0].sum(1) > points[1].sum(1)
    chosen = torch.where(first[:, None], points[0], points[1])
    return chosen, points.sum(0) - chosen


class Affine(nn.Module):
    """A member that scores vectors by a direction, in a unit and from a zero of its own."""

    def __init__(self, direction, scale=1.0, shift=0.0):
        super().__init__()
        self.direction, self.scale, self.shift = direction, scale, shift

    def forward(self, features):
        return self.scale * (features @ self.direction) + self.shift


# Aggregates


@settings(max_examples=100, deadline=None)
@given(score=st.floats(-1e6, 1e6, width=32), members=st.integers(2, 9), penalty=st.floats(0, 100))
def test_members_that_agree_have_their_common_score_whatever_the_aggregate(score, members, penalty):
    for dtype in (torch.float32, F64):
        scores = torch.full((members, 3), score, dtype=dtype)
        for method in METHODS:
            assert torch.equal(aggregate_rewards(scores, method=method, penalty=penalty), scores[0])


@settings(max_examples=100, deadline=None)
@given(table=tables, penalties=st.tuples(st.floats(0, 10), st.floats(0, 10)))
def test_the_worst_case_is_at_most_the_mean_and_the_penalty_only_lowers(table, penalties):
    scores = torch.tensor(table, dtype=F64).T
    mean, low, high = aggregate_rewards(scores, method="mean"), min(penalties), max(penalties)
    assert (aggregate_rewards(scores) <= mean).all()
    assert (uncertainty_weighted(scores, high) <= uncertainty_weighted(scores, low)).all()
    assert torch.equal(uncertainty_weighted(scores, 0.0), mean)
    torch.testing.assert_close(mean, scores.mean(0), rtol=0, atol=1e-12)


def test_aggregates_by_hand():
    scores = torch.tensor([[1.0, 4.0], [3.0, 0.0]], dtype=F64)
    assert aggregate_rewards(scores, method="mean").tolist() == [2, 2]
    assert aggregate_rewards(scores, method="worst-case").tolist() == [1, 0]
    assert uncertainty_weighted(scores, 0.5).tolist() == [1.5, 0]
    assert uncertainty_weighted(scores, 0.5, unbiased=True).tolist() == [1, -2]


@settings(max_examples=50, deadline=None)
@given(table=tables, shift=st.floats(-100, 100), seed=st.integers(0, 100))
@pytest.mark.parametrize("method", METHODS)
def test_a_common_shift_is_added_and_the_order_of_members_does_not_matter(method, table, shift, seed):
    scores = torch.tensor(table, dtype=F64).T
    reward = aggregate_rewards(scores, method=method)
    torch.testing.assert_close(aggregate_rewards(scores + shift, method=method), reward + shift, rtol=0, atol=1e-9)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(aggregate_rewards(scores[order], method=method), reward, rtol=0, atol=1e-9)


def test_a_shift_of_one_member_changes_the_minimum_and_the_penalty_so_members_need_one_scale():
    scores = normal(5, 20)
    shifted = scores + torch.tensor([3.0, 0, 0, 0, -3.0], dtype=F64)[:, None]
    torch.testing.assert_close(
        aggregate_rewards(shifted, method="mean"), aggregate_rewards(scores, method="mean"), rtol=0, atol=1e-12
    )
    for method in METHODS[1:]:
        assert (aggregate_rewards(shifted, method=method) < aggregate_rewards(scores, method=method) - 0.1).any()


def test_doubled_scores_quadruple_the_penalty():
    scores = normal(5, 20)

    def penalty(s):
        return aggregate_rewards(s, method="mean") - uncertainty_weighted(s, 0.5)

    torch.testing.assert_close(penalty(2 * scores), 4 * penalty(scores))


def test_the_worst_case_sends_the_gradient_to_the_worst_member_alone():
    scores = normal(5, 20).requires_grad_()
    aggregate_rewards(scores).sum().backward()
    assert torch.equal(scores.grad, functional.one_hot(scores.argmin(0), 5).T.to(F64))


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_gradient_of_the_uncertainty_weighted_reward_is_its_formula(unbiased):
    scores, penalty, k = normal(5, 20).requires_grad_(), 0.7, 5
    uncertainty_weighted(scores, penalty, unbiased=unbiased).sum().backward()
    expected = 1 / k - 2 * penalty / (k - unbiased) * (scores - scores.mean(0))
    torch.testing.assert_close(scores.grad, expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.untyped
@pytest.mark.parametrize("method", METHODS)
def test_aggregates_pass_gradcheck_are_compiled_and_mapped(method):
    scores = normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: aggregate_rewards(s, method=method), scores)
    expected = aggregate_rewards(scores.detach(), method=method)
    torch._dynamo.reset()
    compiled = torch.compile(aggregate_rewards, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(scores.detach(), method=method), expected)
    mapped = torch.func.vmap(lambda s: aggregate_rewards(s, method=method), in_dims=1)
    torch.testing.assert_close(mapped(scores.detach()), expected)


def test_the_worst_of_five_gaussian_members_lies_1_16296_deviations_below_the_mean():
    scores = 2.0 + 0.5 * normal(5, 1_000_000)
    assert aggregate_rewards(scores).mean().item() == pytest.approx(2.0 - 1.16296 * 0.5, abs=1.5e-3)
    # And the penalty of the variance is lambda (k - 1) / k sd^2, or lambda sd^2 without bias.
    assert uncertainty_weighted(scores, 2.0).mean().item() == pytest.approx(2.0 - 2.0 * 0.8 * 0.25, abs=3e-3)
    assert uncertainty_weighted(scores, 2.0, unbiased=True).mean().item() == pytest.approx(1.5, abs=3e-3)


def test_half_precision_is_computed_in_single():
    scores = normal(5, 50).to(torch.bfloat16)
    for method in METHODS:
        reward = aggregate_rewards(scores, method=method)
        assert reward.dtype == torch.bfloat16
        torch.testing.assert_close(reward, aggregate_rewards(scores.double(), method=method).to(torch.bfloat16))


# The loss of a reward model


def test_equal_scores_cost_log_two_and_the_decay_of_both():
    score = torch.tensor([0.0, 1.0, -20.0], dtype=F64)
    expected = math.log(2) + 1e-3 * score.square()
    torch.testing.assert_close(pairwise_reward_loss(score, score), expected, rtol=0, atol=1e-14)


def test_without_decay_the_loss_is_logistic_regression_on_the_difference_with_smoothed_labels():
    chosen, rejected = normal(30), normal(30, seed=1)
    found = pairwise_reward_loss(chosen, rejected, score_decay=0.0, label_smoothing=0.2)
    target = torch.full_like(chosen, 0.8)
    expected = functional.binary_cross_entropy_with_logits(chosen - rejected, target, reduction="none")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    shifted = pairwise_reward_loss(chosen + 7, rejected + 7, score_decay=0.0, label_smoothing=0.2)
    torch.testing.assert_close(shifted, found, rtol=0, atol=1e-12)


def test_the_decay_is_half_of_the_squares_and_settles_the_shift():
    chosen, rejected = normal(30), normal(30, seed=1)
    bare = pairwise_reward_loss(chosen, rejected, score_decay=0.0)
    full = pairwise_reward_loss(chosen, rejected, score_decay=0.3)
    torch.testing.assert_close(full - bare, 0.15 * (chosen**2 + rejected**2), rtol=0, atol=1e-12)
    shift = torch.zeros((), dtype=F64, requires_grad=True)
    pairwise_reward_loss(chosen + shift, rejected + shift, score_decay=0.3).sum().backward()
    torch.testing.assert_close(shift.grad, 0.3 * (chosen + rejected).sum(), rtol=0, atol=1e-12)


def test_the_loss_is_finite_for_large_scores_and_passes_gradcheck():
    assert pairwise_reward_loss(torch.tensor([-1e4]), torch.tensor([1e4]), score_decay=0.0).item() == 2e4
    scores = normal(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: pairwise_reward_loss(s[0], s[1], score_decay=0.1, label_smoothing=0.1), scores
    )


def test_a_loss_object_reduces_as_torch_does_and_takes_a_risk():
    chosen, rejected = normal(30), normal(30, seed=1)
    each = pairwise_reward_loss(chosen, rejected, score_decay=0.5)
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum()), ("none", each), (torch.amax, each.amax())):
        torch.testing.assert_close(PairwiseRewardLoss(0.5, reduction=reduction)(chosen, rejected), expected)


# Heads, held and trained as one


def test_heads_are_the_networks_that_each_member_is_alone():
    heads = RewardHeads(4, num_members=3, hidden=(7, 5), seed=3).double()
    features = normal(2, 6, 4)
    heads.fit_features(3 * normal(50, 4, seed=1) + 1)
    alone = torch.stack([heads.member(i)(features).squeeze(-1) for i in range(3)])
    torch.testing.assert_close(heads(features), alone, rtol=0, atol=1e-12)
    own = normal(3, 6, 4, seed=2)
    alone = torch.stack([heads.member(i)(own[i]).squeeze(-1) for i in range(3)])
    torch.testing.assert_close(heads.each(own), alone, rtol=0, atol=1e-12)


def test_first_weights_follow_from_seed_and_number_alone_within_the_bounds_of_torch():
    few, many = RewardHeads(6, num_members=2, seed=1), RewardHeads(6, num_members=5, seed=1)
    for a, b in zip(few.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b[:2])
        assert not torch.equal(b[0], b[1])
    other = RewardHeads(6, num_members=2, seed=2)
    # Neighbouring seeds share no member.
    assert not any(torch.equal(a, b) for a in few.weights[0] for b in other.weights[0])
    for weight, bias in zip(many.weights, many.biases, strict=True):
        bound = weight.shape[1] ** -0.5
        assert 0.8 * bound < weight.abs().max() <= bound
        assert bias.abs().max() <= bound


def train_alone(model, chosen, rejected, order, epochs, batch_size, lr):
    """The loop that a user would write for one member; ``order`` gives the pairs of each epoch's batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    history = []
    for _ in range(epochs):
        losses = []
        for batch in order(len(chosen), batch_size):
            good, bad = model(chosen[batch])[:, 0], model(rejected[batch])[:, 0]
            loss = (-functional.logsigmoid(good - bad) + 1e-3 / 2 * (good**2 + bad**2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
    return history


@pytest.mark.parametrize("bootstrap", [False, True])
def test_heads_trained_at_once_end_where_each_would_have_ended_alone(bootstrap, monkeypatch):
    from minimand.preferences import reward_ensembles

    chosen, rejected = separable(dtype=F64)
    heads = RewardHeads(4, num_members=3, hidden=(8,), seed=5).double()
    start = copy.deepcopy(heads)
    both = torch.cat([chosen, rejected])
    scaled = [(part - both.mean(0)) / both.std(0, correction=0) for part in (chosen, rejected)]
    settings = {"epochs": 3, "batch_size": 32, "lr": 1e-2}
    history = fit_reward_heads(heads, chosen, rejected, weight_decay=0.01, bootstrap=bootstrap, seed=9, **settings)
    for member in range(3):
        generator = reward_ensembles._generator(9, member, "order")
        rows = torch.arange(200)
        if bootstrap:
            rows = torch.randint(200, (200,), generator=generator)
            assert len(rows.unique()) < 160

        def order(samples, size, generator=generator, rows=rows):
            return rows[torch.randperm(samples, generator=generator)[: samples // size * size]].view(-1, size)

        alone = start.member(member)
        losses = train_alone(alone, *scaled, order, **settings)
        assert history[:, member].tolist() == pytest.approx(losses, abs=1e-10)
        found = heads.member(member)
        torch.testing.assert_close(
            found(both), alone((both - both.mean(0)) / both.std(0, correction=0)), atol=1e-9, rtol=0
        )


def test_members_see_the_pairs_in_orders_of_their_own_and_the_seed_repeats_them():
    chosen, rejected = separable()

    # From equal weights, what differs is the order alone.
    def trained(seed, bootstrap=False):
        heads = RewardHeads(4, num_members=2, hidden=(8,))
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter[1] = parameter[0]
        history = fit_reward_heads(heads, chosen, rejected, epochs=2, seed=seed, bootstrap=bootstrap)
        return heads, history

    heads, history = trained(0)
    again, same = trained(0)
    assert torch.equal(history, same)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    assert not torch.equal(heads.weights[0][0], heads.weights[0][1])
    assert not torch.equal(trained(1)[1], history)
    assert not torch.equal(trained(0, bootstrap=True)[1], history)


def test_training_needs_no_scaling_of_the_features_and_finds_the_preferences_of_unseen_pairs():
    chosen, rejected = separable(600, 16)
    unit, zero = 10 ** normal(16, seed=2, dtype=torch.float32), 100 * normal(16, seed=3, dtype=torch.float32)
    chosen, rejected = chosen * unit + zero, rejected * unit + zero
    heads = RewardHeads(16, hidden=())
    history = fit_reward_heads(heads, chosen[:400], rejected[:400], epochs=40, lr=1e-2)
    assert (history[-1] < history[0] / 2).all()
    reward = RewardEnsemble(heads).fit_scale(torch.cat([chosen[:400], rejected[:400]]))
    assert (reward(chosen[400:]) > reward(rejected[400:])).float().mean() > 0.93


def test_a_constant_feature_is_left_where_it_is():
    heads = RewardHeads(3)
    features = torch.cat([normal(20, 2, dtype=torch.float32), torch.full((20, 1), 0.1)], 1)
    heads.fit_features(features)
    assert heads.feature_scale[2] == 1
    assert torch.isfinite(heads(features)).all()


def test_label_smoothing_and_decay_of_the_loss_reach_the_training():
    chosen, rejected = separable()

    def largest(loss):
        heads = RewardHeads(4, hidden=())
        fit_reward_heads(heads, chosen, rejected, loss=loss, epochs=40, lr=1e-2)
        return heads(chosen).abs().max()

    plain = largest(PairwiseRewardLoss(0.0))
    assert largest(PairwiseRewardLoss(1.0)) < plain / 2
    assert largest(PairwiseRewardLoss(0.0, label_smoothing=0.4)) < plain / 2


# The ensemble


@pytest.mark.parametrize("method", METHODS)
def test_members_in_any_unit_and_from_any_zero_give_the_same_rewards(method):
    directions, reference, answers = normal(5, 4), normal(100, 4, seed=1), normal(20, 4, seed=2)
    plain = RewardEnsemble([Affine(d) for d in directions], method=method).double().fit_scale(reference)
    scales, shifts = (0.01, 1.0, 7.0, 300.0, 2.0), (0.0, -5.0, 1e3, 1e-3, 9.0)
    changed = [Affine(*each) for each in zip(directions, scales, shifts, strict=True)]
    other = RewardEnsemble(changed, method=method).double().fit_scale(reference)
    torch.testing.assert_close(other(answers), plain(answers), rtol=0, atol=1e-10)


def test_on_the_reference_every_member_has_mean_zero_and_deviation_one():
    reference = normal(3, 40, 6, dtype=torch.float32)
    reward = RewardEnsemble(RewardHeads(6)).fit_scale(reference)
    scores = reward.scores(reference).flatten(1)
    torch.testing.assert_close(scores.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.std(1, correction=0), torch.ones(5))
    torch.testing.assert_close(reward(reference).flatten(), aggregate_rewards(scores))
    torch.testing.assert_close(reward.disagreement(reference).flatten(), scores.std(0, correction=0))


def test_without_standardisation_scores_are_the_members_own():
    heads, features = RewardHeads(6), normal(9, 6, dtype=torch.float32)
    reward = RewardEnsemble(heads, method="mean", standardize=False)
    assert torch.equal(reward(features), aggregate_rewards(heads(features), method="mean"))


def test_disagreement_is_small_where_members_were_taught_and_large_far_away():
    chosen, rejected = separable(500)
    heads = RewardHeads(4, hidden=(16,))
    fit_reward_heads(heads, chosen, rejected, epochs=20)
    reward = RewardEnsemble(heads).fit_scale(torch.cat([chosen, rejected]))
    near = normal(500, 4, seed=8, dtype=torch.float32)
    assert reward.disagreement(4 * near).mean() > 2 * reward.disagreement(near).mean()


def test_the_scale_travels_with_the_state():
    reference = normal(40, 6, dtype=torch.float32)
    reward = RewardEnsemble(RewardHeads(6)).fit_scale(5 * reference)
    other = RewardEnsemble(RewardHeads(6, seed=4))
    other.load_state_dict(reward.state_dict())
    assert torch.equal(other(reference), reward(reference))


def test_gradients_of_an_ensemble_reach_its_inputs():
    features = normal(9, 6).requires_grad_()
    reward = RewardEnsemble(RewardHeads(6, hidden=()), method="mean").double().fit_scale(normal(40, 6, seed=1))
    reward(features).sum().backward()
    weights = reward.members.weights[0].detach().squeeze(-1) / reward.spread[:, None]
    torch.testing.assert_close(features.grad, weights.mean(0).expand(9, 6))


def test_the_reward_function_is_called_and_answers_as_trl_wants():
    from trl import GRPOTrainer

    reward = RewardEnsemble(RewardHeads(2)).fit_scale(normal(40, 2, dtype=torch.float32))
    seen = []

    def encode(prompts, completions):
        seen.append((reward.training, torch.is_grad_enabled()))
        return torch.tensor([[len(p), len(c)] for p, c in zip(prompts, completions, strict=True)]).float()

    function = reward.reward_function(encode)
    # TRL feeds modules token ids and names functions by their names.
    assert not isinstance(function, nn.Module)
    assert not inspect.iscoroutinefunction(function)
    assert function.__name__ == "reward_ensemble"
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list" in source
    answers = function(
        prompts=["a", "bb"], completions=["ccc", "d"], completion_ids=[[1], [2]], trainer_state=None, column=["x", "y"]
    )
    assert seen == [(False, False)]
    assert reward.training
    assert answers == pytest.approx(reward(torch.tensor([[1.0, 3.0], [2.0, 1.0]])).tolist())
    assert all(type(answer) is float for answer in answers)


NAN = torch.tensor([[1.0, float("nan")], [0.0, 0.0]])
ROWS = torch.ones(4, 3)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregate_rewards(torch.ones(2, 3), method="median"), "method must be one of"),
        (lambda: aggregate_rewards(torch.ones(2, 3), penalty=-1.0), "penalty"),
        (lambda: aggregate_rewards(NAN), "scores contains NaN"),
        (lambda: aggregate_rewards(torch.ones(0, 3)), "scores is empty"),
        (lambda: aggregate_rewards(torch.tensor(1.0)), "members"),
        (lambda: uncertainty_weighted(torch.ones(1, 3), 0.5), "at least two members, got 1"),
        (lambda: uncertainty_weighted(torch.ones(1, 3), 0.5, unbiased=True), "at least two members, got 1"),
        (lambda: pairwise_reward_loss(torch.ones(3), torch.ones(2)), "rejected must have the shape of chosen"),
        (lambda: pairwise_reward_loss(torch.ones(3), torch.ones(3), score_decay=-1.0), "score_decay"),
        (lambda: PairwiseRewardLoss(label_smoothing=0.5), "label_smoothing"),
        (lambda: RewardHeads(0), "at least 1"),
        (lambda: RewardHeads(3, num_members=0), "num_members"),
        (lambda: RewardHeads(3)(torch.ones(4, 2)), r"features must have shape \(\*batch, 3\)"),
        (lambda: RewardHeads(3)(torch.ones(3)), r"features must have shape \(\*batch, 3\)"),
        (lambda: RewardHeads(3).each(torch.ones(4, 2, 3)), "with 5 members"),
        (lambda: RewardHeads(2)(NAN), "features contains NaN"),
        (lambda: fit_reward_heads(RewardHeads(3), ROWS, ROWS[:2]), "chosen and rejected must both have shape"),
        (lambda: fit_reward_heads(RewardHeads(3), ROWS[:0], ROWS[:0]), "chosen is empty"),
        (lambda: fit_reward_heads(RewardHeads(3), ROWS, ROWS, epochs=0), "epochs"),
        (lambda: fit_reward_heads(RewardHeads(3), ROWS, ROWS, batch_size=0), "batch_size"),
        (lambda: fit_reward_heads(RewardHeads(3), ROWS, ROWS, lr=0.0), "lr"),
        (lambda: fit_reward_heads(RewardHeads(3), *separable(40, 3), lr=1e30), "lr=1e.30 is too large"),
        (lambda: RewardEnsemble(nn.Linear(3, 5)), "num_members"),
        (lambda: RewardEnsemble([]), "members must be"),
        (lambda: RewardEnsemble(RewardHeads(3, num_members=1), method="uncertainty-weighted"), "at least two members"),
        (lambda: RewardEnsemble(RewardHeads(3, num_members=1), standardize=False).disagreement(ROWS), "at least two"),
        (lambda: RewardEnsemble(RewardHeads(3))(ROWS), "call fit_scale"),
        (lambda: RewardEnsemble(RewardHeads(3)).fit_scale(ROWS), "member 0 scores all reference inputs alike"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.untyped
def test_integers_are_no_scores():
    with pytest.raises(TypeError, match="scores must have a floating-point dtype"):
        aggregate_rewards(torch.ones(2, 3).long())
