"""LinUCB, NeuralUCB and NeuralTS: ridge regression, gradients and their covariance, the law of Thompson's draws."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from minimand.online import (
    ClassificationBandit,
    DisjointLinear,
    LinUCB,
    NeuralTS,
    NeuralUCB,
    PerturbedOutput,
    play_bandit,
)
from minimand.online.confidence_bandits import (
    GradientCovariance,
    inverse_with_rows,
    output_gradients,
    probability_of_least,
)


def rounds(number, dims=4, actions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randn(number, 1, dims, generator=generator, dtype=torch.float64)
    return contexts, torch.rand(number, actions, generator=generator, dtype=torch.float64)


def joined(network, contexts, action=None):
    outputs, gradients = output_gradients(network, contexts, action)
    return outputs, torch.cat(gradients, -1)


def curved(actions=3, dims=4):
    """A network with weights that actions share and weights of their own."""
    torch.manual_seed(0)
    return nn.Sequential(DisjointLinear(dims, 5, num_actions=actions), nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize("bias", [True, False])
def test_linucb_is_ridge_regression_less_its_confidence_width(bias):
    agent = LinUCB(4, num_actions=3, exploration=0.7, regularization=0.5, bias=bias).double()
    seen = [([], []) for _ in range(3)]
    contexts, losses = rounds(80)
    for context, loss in zip(contexts, losses, strict=True):
        x = np.append(context[0].numpy(), [1.0] * bias)
        estimates, scores = [], []
        for rows, values in seen:
            rows = np.array(rows).reshape(-1, len(x))
            covariance = 0.5 * np.eye(len(x)) + rows.T @ rows
            estimates.append(np.linalg.solve(covariance, rows.T @ np.array(values)) @ x)
            scores.append(estimates[-1] - 0.7 * math.sqrt(x @ np.linalg.solve(covariance, x)))
        assert np.allclose(agent(context)[0], estimates, atol=1e-10)
        action, probability = agent.act(context)
        assert int(action) == int(np.argmin(scores))
        assert float(probability) == 1
        agent.update(context, action, loss[action])
        seen[int(action)][0].append(x)
        seen[int(action)][1].append(float(loss[action]))
    assert min(len(rows) for rows, _ in seen) > 5


def test_linucb_learns_a_batch_as_its_rounds_one_by_one():
    contexts, losses = rounds(30)
    action = torch.arange(30) % 2
    one, other = (LinUCB(4, num_actions=3).double() for _ in range(2))
    one.update(contexts[:, 0], action, losses[:, 0])
    for number in range(30):
        other.update(contexts[number], action[number, None], losses[number, :1])
    assert torch.allclose(one.inverse, other.inverse, atol=1e-12)
    assert torch.allclose(one.moments, other.moments, atol=1e-12)
    assert torch.equal(one.inverse[2], torch.eye(5, dtype=torch.float64))


def test_rows_are_added_to_an_inverse_by_woodburys_identity():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    found = inverse_with_rows(eye.expand(2, 4, 4) / 0.3, rows)
    assert torch.allclose(found, torch.linalg.inv(0.3 * eye + rows.mT @ rows), atol=1e-12)


@pytest.mark.parametrize("disjoint", [True, False])
def test_neuralucb_of_a_linear_network_is_linucb(disjoint):
    """With the full covariance, and the weights that ridge regression finds."""
    network = nn.Sequential(DisjointLinear(4, 1, num_actions=3)) if disjoint else nn.Sequential(nn.Linear(4, 3))
    neural = NeuralUCB(network.double(), exploration=0.6, regularization=2.0, covariance="full")
    linear = LinUCB(4, num_actions=3, exploration=0.6, regularization=2.0).double()
    taken = []
    for context, loss in zip(*rounds(60), strict=True):
        with torch.no_grad():
            weights = linear._weights()
            network[0].weight.copy_(weights[:, :4].view_as(network[0].weight))
            network[0].bias.copy_(weights[:, 4].view_as(network[0].bias))
        action = linear.act(context).action
        assert torch.equal(neural.act(context).action, action)
        for agent in (neural, linear):
            agent.update(context, action, loss[action])
        taken.append(int(action))
    assert set(taken) == {0, 1, 2}


def test_gradients_are_those_of_each_output_alone():
    network, contexts = curved(), rounds(4)[0][:, 0]
    outputs, gradients = joined(network, contexts)
    assert torch.equal(outputs, network(contexts)[..., 0].detach())
    for row in range(4):
        for action in range(3):
            parts = torch.autograd.grad(network(contexts[row, None])[0, action, 0], list(network.parameters()))
            assert torch.allclose(gradients[row, action], torch.cat([part.flatten() for part in parts]), atol=1e-14)
        alone = joined(network, contexts[row, None])
        assert torch.allclose(alone[1][0], gradients[row], atol=1e-14)
        assert torch.allclose(alone[0][0], outputs[row], atol=1e-14)
        chosen = joined(network, contexts[row, None], torch.tensor([row % 3]))
        assert torch.allclose(chosen[1][0, 0], gradients[row, row % 3], atol=1e-14)
    chosen = joined(network, contexts, torch.arange(4) % 3)
    assert torch.allclose(chosen[1][:, 0], gradients[torch.arange(4), torch.arange(4) % 3], atol=1e-14)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_widths_are_those_of_the_covariance_of_the_gradients_added(covariance):
    network = curved()
    found = GradientCovariance(network, regularization=0.3, covariance=covariance)
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(9, 31 + 50, generator=generator, dtype=torch.float64)
    added, asked = (
        added[:, : (size := sum(p.numel() for p in network.parameters()))],
        torch.eye(size).double()[:6] - 0.1,
    )
    matrix = 0.3 * torch.eye(size, dtype=torch.float64)
    assert torch.allclose(found([asked[None]])[0], asked.norm(dim=1) / math.sqrt(0.3), atol=1e-12)
    for part in added.split([1, 3, 5]):
        found.update([part[:, None]])
        matrix += part.T @ part
    if covariance == "diagonal":
        matrix = matrix.diagonal().diag()
    expected = (asked @ torch.linalg.inv(matrix) * asked).sum(1).sqrt()
    assert torch.allclose(found([asked[None]])[0], expected, atol=1e-10)


def test_the_full_covariance_is_the_diagonal_one_where_gradients_share_no_axis():
    agents = [NeuralUCB(nn.Linear(3, 4, bias=False).double(), covariance=kind) for kind in ("diagonal", "full")]
    contexts = torch.eye(3, dtype=torch.float64)
    for row, action in [(0, 0)] * 5 + [(1, 2)] * 2 + [(2, 3)]:
        for agent in agents:
            agent.update(contexts[row, None], torch.tensor([action]), torch.ones(1, dtype=torch.float64))
    _, gradients = output_gradients(agents[0].regressor.network, contexts)
    one, other = (agent.uncertainty(gradients) for agent in agents)
    assert torch.allclose(one, other, atol=1e-12)
    assert one.std() > 0.05


@pytest.mark.parametrize("loss", ["square", "kl"])
def test_neuralucb_takes_the_least_output_less_its_width_and_adds_the_gradient_of_before_the_step(loss):
    agent = NeuralUCB(curved(), exploration=0.5, regularization=0.2, loss=loss)
    diagonal = torch.full((81,), 0.2, dtype=torch.float64)
    explored = 0
    for context, losses in zip(*rounds(40), strict=True):
        outputs = agent.regressor.network(context)[0, :, 0]
        gradients = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(each, list(agent.regressor.parameters()), retain_graph=True)]
            )
            for each in outputs
        ]
        scores = torch.stack(
            [f - 0.5 * (g.square() / diagonal).sum().sqrt() for f, g in zip(outputs, gradients, strict=True)]
        )
        action = agent.act(context).action
        assert int(action) == int(scores.argmin())
        explored += int(action) != int(outputs.argmin())
        agent.update(context, action, losses[action])
        diagonal += gradients[int(action)].square()
        assert torch.allclose(agent.uncertainty.diagonal, diagonal, atol=1e-12)
    assert explored > 3


def test_without_exploration_all_three_are_greedy():
    contexts = rounds(50)[0][:, 0]
    for agent in (
        LinUCB(4, num_actions=3, exploration=0.0).double(),
        NeuralUCB(curved(), exploration=0.0),
        NeuralTS(curved(), exploration=0.0),
    ):
        agent.update(contexts, torch.arange(50) % 3, torch.linspace(0, 1, 50, dtype=torch.float64))
        action, probability = agent.act(contexts)
        assert torch.equal(action, agent(contexts).argmin(1))
        assert torch.allclose(probability, torch.ones_like(probability), atol=1e-12)


def test_neuralts_draws_normal_losses_with_the_widths_for_deviations():
    agent = NeuralTS(nn.Linear(2, 3).double(), exploration=0.8, regularization=0.5)
    with torch.no_grad():
        agent.regressor.network.weight.copy_(torch.tensor([[0.1, 0.3], [-0.2, 0.1], [0.4, 0.0]]))
        agent.regressor.network.bias.copy_(torch.tensor([0.0, 0.3, -0.5]))
    agent.uncertainty.diagonal += torch.linspace(0, 4, 9, dtype=torch.float64)
    context = torch.tensor([[0.6, -1.0]], dtype=torch.float64)
    outputs, gradients = output_gradients(agent.regressor.network, context)
    means, deviations = outputs[0].tolist(), (0.8 * agent.uncertainty(gradients))[0].tolist()
    expected = []
    for a in range(3):
        others = [b for b in range(3) if b != a]

        def least(value, a=a, others=others):
            above = math.prod(stats.norm.sf(value, means[b], deviations[b]) for b in others)
            return stats.norm.pdf(value, means[a], deviations[a]) * above

        expected.append(integrate.quad(least, -20, 20, points=means)[0])
    assert sum(expected) == pytest.approx(1, abs=1e-7)
    decision = agent.act(context.expand(20_000, 2))
    often = decision.action.bincount(minlength=3) / 20_000
    assert (often - torch.tensor(expected)).abs().max() < 0.012
    assert torch.allclose(decision.probability, torch.tensor(expected, dtype=torch.float64)[decision.action], atol=1e-7)


def test_the_probability_of_the_least_of_two_is_the_normal_law_of_their_difference():
    means = torch.tensor([[0.0, 0.4], [1.0, 0.4], [0.1, 0.1], [0.1, 0.2]], dtype=torch.float64)
    deviations = torch.tensor([[0.3, 0.5], [1.0, 0.1], [0.2, 0.2], [1.0, 1e-4]], dtype=torch.float64)
    expected = torch.special.ndtr((means[:, 1] - means[:, 0]) / deviations.norm(dim=1))
    for action, law in ((0, expected), (1, 1 - expected)):
        found = probability_of_least(means, deviations, torch.full((4,), action))
        assert torch.allclose(found[:3], law[:3], atol=1e-9)
        assert abs(found[3] - law[3]) < 0.02


def test_the_probabilities_of_being_the_least_add_up_to_one():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    deviations = 0.1 + torch.rand(20, 6, generator=generator, dtype=torch.float64)
    total = sum(probability_of_least(means, deviations, torch.full((20,), action)) for action in range(6))
    assert torch.allclose(total, torch.ones(20, dtype=torch.float64), atol=1e-8)


AGENTS = {
    "linucb": lambda: LinUCB(4, num_actions=3),
    "neuralucb": lambda: NeuralUCB(curved().float()),
    "neuralucb, full": lambda: NeuralUCB(curved().float(), covariance="full", loss="kl"),
    "neuralts": lambda: NeuralTS(curved().float(), seed=4),
    "neuralts, full": lambda: NeuralTS(curved().float(), covariance="full", seed=4),
}


@pytest.mark.parametrize("name", AGENTS)
def test_a_saved_agent_goes_on_as_it_would_have(name):
    generator = torch.Generator().manual_seed(0)
    bandit = ClassificationBandit(torch.randn(60, 4, generator=generator), torch.arange(60) % 3)
    first, third = AGENTS[name](), AGENTS[name]()
    play_bandit(first, bandit, num_rounds=40)
    third.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    expected = play_bandit(first, bandit, num_rounds=40, seed=1).actions
    assert torch.equal(play_bandit(third, bandit, num_rounds=40, seed=1).actions, expected)
    assert torch.equal(play_bandit(copied, bandit, num_rounds=40, seed=1).actions, expected)


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_stops_erring_where_contexts_tell_the_action(name):
    bandit = ClassificationBandit(torch.eye(3, 4), torch.arange(3))
    regret = play_bandit(AGENTS[name](), bandit, num_rounds=300).regret
    assert regret[-1] - regret[-101] < 15  # by chance 67


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinUCB(0, num_actions=3), "in_features must be"),
        (lambda: LinUCB(2, num_actions=1), "num_actions at least 2"),
        (lambda: LinUCB(2, num_actions=3, exploration=-1.0), "exploration must be"),
        (lambda: LinUCB(2, num_actions=3, regularization=0.0), "regularization must be"),
        (lambda: LinUCB(2, num_actions=3).act(torch.rand(1, 3)), r"contexts must have shape \(batch, 2\)"),
        (lambda: LinUCB(2, num_actions=3).act(torch.full((1, 2), math.inf)), "contexts contains NaN"),
        (
            lambda: LinUCB(2, num_actions=3).update(torch.rand(1, 2), torch.tensor([3]), torch.ones(1)),
            "action must lie",
        ),
        (
            lambda: LinUCB(2, num_actions=3).update(torch.rand(1, 2), torch.tensor([0]), torch.ones(1) * 2),
            "loss must lie",
        ),
        (lambda: NeuralUCB(nn.Linear(2, 3), exploration=-1.0), "exploration must be"),
        (lambda: NeuralUCB(nn.Linear(2, 3), regularization=0.0), "regularization must be"),
        (lambda: NeuralUCB(nn.Linear(2, 3), covariance="block"), "covariance must be one of"),
        (lambda: NeuralUCB(nn.ReLU()), "nothing to learn"),
        (
            lambda: NeuralUCB(nn.Linear(2, 3)).update(torch.rand(1, 2), torch.tensor([3]), torch.ones(1)),
            "action must lie",
        ),
        (lambda: NeuralUCB(nn.Linear(2, 1)).act(torch.rand(1, 2)), "at least 2 actions"),
        (lambda: NeuralUCB(nn.Linear(2, 1)).act(torch.rand(4, 2)), "at least 2 actions"),
        (lambda: NeuralUCB(nn.Linear(2, 3)).act(torch.full((4, 2), math.nan)), "NaN"),
        (lambda: NeuralTS(nn.Linear(2, 3)).act(torch.full((1, 2), math.nan)), "NaN"),
        (lambda: NeuralTS(nn.Linear(2, 3), exploration=-1.0), "exploration must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_perturbed_network_is_no_network_to_be_unsure_of():
    with pytest.raises(TypeError, match="network must be a plain one"):
        NeuralUCB(PerturbedOutput(nn.Linear(2, 3), strength=1.0))
