"""Bradley-Terry scores against the equations they solve, and against an independent logistic regression."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from minimand.preferences import bradley_terry, dpo_loss
from minimand.stopping import Stop

F64 = torch.float64


def table(seed, answers=5, spread=2.0, prompts=()):
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(*prompts, answers, answers, generator=generator, dtype=F64)
    weights = torch.randn(*prompts, answers, generator=generator, dtype=F64).softmax(-1)
    return torch.sigmoid(scores - scores.mT), weights


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 8.0))
def test_every_answers_win_rate_is_as_predicted(seed, spread):
    preferences, weights = table(seed, spread=spread)
    found = bradley_terry(preferences, weights, tolerance=1e-12)
    assert found.status is Stop.CONVERGED
    predicted = torch.sigmoid(found.scores[:, None] - found.scores)
    torch.testing.assert_close(predicted @ weights, preferences @ weights, rtol=0, atol=1e-11)
    assert float(weights @ found.scores) == pytest.approx(0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_scores_that_made_the_preferences_are_found_whatever_the_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(6, generator=generator, dtype=F64)
    weights = (2 * torch.randn(6, generator=generator, dtype=F64)).softmax(-1)
    found = bradley_terry(torch.sigmoid(scores[:, None] - scores), weights, tolerance=1e-14).scores
    torch.testing.assert_close(found - found[0], scores - scores[0], rtol=0, atol=1e-8)


def test_it_is_logistic_regression_on_all_pairs():
    preferences, weights = table(1)
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
    features = torch.eye(5, dtype=F64)[first] - torch.eye(5, dtype=F64)[second]
    counts = weights[first] * weights[second]
    fit = LogisticRegression(C=1e8, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
        torch.cat([features, features]).numpy(),
        [1] * 25 + [0] * 25,
        sample_weight=torch.cat([counts * preferences[first, second], counts * preferences[second, first]]).numpy(),
    )
    theirs = torch.tensor(fit.coef_[0])
    ours = bradley_terry(preferences, weights, tolerance=1e-12).scores
    torch.testing.assert_close(ours - ours[0], theirs - theirs[0], rtol=0, atol=1e-4)


def test_dpo_learns_these_scores():
    preferences, weights = table(2)
    reference, beta = weights.log(), 0.7
    policy = (reference + bradley_terry(preferences, weights, tolerance=1e-13).scores / beta).log_softmax(-1)
    policy.requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
    losses = dpo_loss(policy[first], policy[second], reference[first], reference[second], beta=beta)
    (gradient,) = torch.autograd.grad(
        (weights[first] * weights[second] * preferences[first, second] * losses).sum(), policy
    )
    assert gradient.abs().max() < 1e-10


def test_a_circle_has_no_scores_but_zero():
    beats = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    torch.testing.assert_close(bradley_terry(beats).scores, torch.zeros(3), rtol=0, atol=1e-6)


def test_answers_that_always_win_get_scores_large_enough_for_the_tolerance():
    beats = torch.ones(4, 4, dtype=F64).triu(1) + torch.eye(4, dtype=F64) / 2
    found = bradley_terry(beats, tolerance=1e-6)
    assert found.status is Stop.CONVERGED
    assert (found.scores.diff() < -5).all()


def test_an_answer_that_is_never_drawn_is_scored_by_how_it_fares_against_the_others():
    preferences, weights = table(4)
    weights = torch.cat([weights[:4] / weights[:4].sum(), weights.new_zeros(1)])
    found = bradley_terry(preferences, weights, tolerance=1e-12).scores
    among = bradley_terry(preferences[:4, :4], weights[:4], tolerance=1e-12).scores
    torch.testing.assert_close(found[:4], among, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        torch.sigmoid(found[4] - among) @ weights[:4], preferences[4, :4] @ weights[:4], rtol=0, atol=1e-11
    )


def test_prompts_are_fitted_together_as_they_would_be_alone():
    preferences, weights = table(3, prompts=(2, 3))
    together = bradley_terry(preferences, weights, tolerance=1e-12).scores
    alone = bradley_terry(preferences[1, 2], weights[1, 2], tolerance=1e-12).scores
    torch.testing.assert_close(together[1, 2], alone, rtol=0, atol=1e-9)


@pytest.mark.untyped
def test_bad_input_is_refused_by_name():
    preferences, weights = table(0)
    for broken, message in (
        (weights[:4], "weights must have shape"),
        (weights * 2, "weights must add up to 1"),
        (weights - weights.max(), "weights must be at least 0"),
        (weights * float("nan"), "weights must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bradley_terry(preferences, broken)
    with pytest.raises(ValueError, match="must add up to 1"):
        bradley_terry(preferences.triu())
    with pytest.raises(ValueError, match="tolerance must be"):
        bradley_terry(preferences, tolerance=0.0)
