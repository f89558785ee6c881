"""Epsilon-greedy: its probabilities, its draws, and that it learns as the others do."""

import math

import pytest
import torch
from torch import nn

from minimand.online import ClassificationBandit, EpsilonGreedy, NeuralCB, play_bandit


def agent(**settings):
    torch.manual_seed(0)
    return EpsilonGreedy(nn.Linear(4, 3).double(), **settings)


CONTEXTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_the_best_action_has_what_exploring_leaves_and_all_have_an_even_share_of_it(epsilon):
    each = agent(epsilon=epsilon)
    best = nn.functional.one_hot(each(CONTEXTS).argmin(1), 3)
    assert torch.allclose(each.probabilities(CONTEXTS), (1 - epsilon) * best.double() + epsilon / 3, atol=1e-15)


def test_actions_are_drawn_as_often_as_their_probabilities_say():
    each = agent(epsilon=0.3)
    decision = each.act(CONTEXTS[:1].expand(40_000, 4))
    p = each.probabilities(CONTEXTS[:1])[0]
    assert (decision.action.bincount(minlength=3) / 40_000 - p).abs().max() < 0.01
    assert torch.equal(decision.probability, p[decision.action])


@pytest.mark.parametrize("loss", ["square", "kl"])
def test_its_network_learns_as_that_of_neuralcb(loss):
    torch.manual_seed(0)
    other = NeuralCB(nn.Linear(4, 3).double(), loss=loss, lr=0.5)
    each = agent(loss=loss, lr=0.5)
    for learner in (each, other):
        for context in CONTEXTS.split(1):
            learner.update(context, torch.tensor([1]), torch.full((1,), 0.7, dtype=torch.float64))
    assert torch.equal(each(CONTEXTS), other(CONTEXTS))


def test_epsilon_may_fall_with_the_rounds():
    each = agent(epsilon=lambda t: 1 / t)
    for t in (1, 2, 3, 4):
        assert each.probabilities(CONTEXTS[:1]).min() == pytest.approx(1 / (3 * t))
        each.update(CONTEXTS[:1], torch.tensor([0]), torch.ones(1, dtype=torch.float64))


def test_a_saved_agent_goes_on_with_its_draws():
    bandit = ClassificationBandit(CONTEXTS, torch.arange(20) % 3)
    first, second = agent(epsilon=0.5, seed=3), agent(seed=4, epsilon=0.5)
    play_bandit(first, bandit, num_rounds=20)
    second.load_state_dict(first.state_dict())
    runs = [play_bandit(each, bandit, num_rounds=40, seed=1).actions for each in (first, second)]
    assert torch.equal(*runs)
    assert len(runs[0].unique()) == 3


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agent(epsilon=1.1), "epsilon must lie"),
        (lambda: agent(epsilon=lambda t: 2.0).act(CONTEXTS), "epsilon must lie"),
        (lambda: EpsilonGreedy(nn.ReLU()), "nothing to learn"),
        (lambda: agent().act(CONTEXTS * math.nan), "NaN"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
