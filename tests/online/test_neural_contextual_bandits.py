"""NeuSquareCB and NeuFastCB: inverse gap weights, perturbed outputs, online regression, and the agent made of them."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimand.online import NeuralCB, PerturbedOutput, inverse_gap_weights, online_regression_loss

KINDS = ("square", "fast")
unit = st.floats(0, 1)
vectors = st.integers(2, 8).flatmap(lambda size: st.lists(unit, min_size=size, max_size=size))


def draws(rows, actions, seed=0):
    """Predicted and true losses: uniform, and crowded near 0 and near each other."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, rows, actions, generator=generator, dtype=torch.float64)
    power = 10 ** (-3 * torch.rand(2, rows, 1, generator=generator, dtype=torch.float64))
    predicted, means = uniform ** (1 / power).clamp_max(8)
    near = torch.rand(rows, 1, generator=generator) < 0.5
    return torch.where(near, (means + 0.1 * (predicted - 0.5)).clamp(0, 1), predicted).clamp_min(1e-6), means


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 3.0, 250.0])
def test_weights_are_the_papers_fractions(kind, gamma):
    predicted = [Fraction(1, 2), Fraction(1, 8), Fraction(3, 4), Fraction(1, 8), Fraction(1)]
    least = min(predicted)
    expected = [
        1 / (5 + int(gamma) * (y - least)) if kind == "square" else least / (5 * least + int(gamma) * (y - least))
        for y in predicted
    ]
    expected[1] = 1 - sum(p for a, p in enumerate(expected) if a != 1)
    found = inverse_gap_weights(torch.tensor([float(y) for y in predicted]).double(), gamma=gamma, kind=kind)
    assert found.tolist() == pytest.approx([float(p) for p in expected], abs=1e-15)


@pytest.mark.parametrize("actions", [2, 5, 10])
@pytest.mark.parametrize("scale", [1.0, 4.0, 100.0])
def test_regret_of_a_round_is_bounded_by_its_squared_error_of_regression(actions, scale):
    predicted, means = draws(20_000, actions)
    gamma = scale * actions
    p = inverse_gap_weights(predicted, gamma=gamma)
    regret = (p * (means - means.amin(-1, keepdim=True))).sum(-1)
    bound = 2 * actions / gamma + gamma / 4 * (p * (predicted - means).square()).sum(-1)
    assert (regret <= bound + 1e-12).all()


@pytest.mark.parametrize("actions", [2, 5, 10])
@pytest.mark.parametrize("scale", [2.0, 10.0, 100.0])
def test_regret_of_a_round_is_bounded_by_its_triangular_error_times_the_loss(actions, scale):
    predicted, means = draws(20_000, actions)
    gamma = scale * actions
    p = inverse_gap_weights(predicted, gamma=gamma, kind="fast")
    regret = (p * (means - means.amin(-1, keepdim=True))).sum(-1)
    triangle = (p * (predicted - means).square() / (predicted + means)).sum(-1)
    assert (regret <= 5 * actions / gamma * (p * means).sum(-1) + 7 * gamma * triangle + 1e-12).all()


def test_the_triangular_error_is_at_most_twice_the_kl_loss():
    p, q = draws(50_000, 2)
    p, q = p[:, 0].clamp(1e-6, 1 - 1e-6), q[:, 0].clamp(1e-6, 1 - 1e-6)
    divergence = online_regression_loss(q.logit()[None], p, kind="kl", reduction="none")
    assert ((p - q).square() / (p + q) <= 2 * divergence + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_without_exploitation_or_without_gaps_are_uniform(kind):
    predicted = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64)
    even = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.equal(inverse_gap_weights(predicted, gamma=0.0, kind=kind), even)
    for level in (0.0, 0.3, 1.0):
        assert torch.equal(inverse_gap_weights(torch.full_like(predicted, level), gamma=50.0, kind=kind), even)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_endless_exploitation_are_all_on_the_best(kind):
    p = inverse_gap_weights(torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64), gamma=1e15, kind=kind)
    assert torch.allclose(p, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12)


def test_fast_weights_do_not_explore_where_the_best_has_no_loss():
    p = inverse_gap_weights(torch.tensor([0.5, 0.0, 0.0, 1e-30]), gamma=20.0, kind="fast")
    assert p.tolist() == [0.0, 0.75, 0.25, 0.0]


@settings(max_examples=200, deadline=None)
@given(vectors, st.sampled_from(KINDS), st.floats(0, 1e4))
def test_weights_are_probabilities_that_fall_with_the_predicted_loss(values, kind, gamma):
    predicted = torch.tensor(values, dtype=torch.float64)
    p = inverse_gap_weights(predicted, gamma=gamma, kind=kind)
    assert (p >= 0).all()
    assert abs(float(p.sum()) - 1) < 1e-12
    assert float(p[predicted.argmin()]) >= 1 / len(values) - 1e-12
    falling = p[predicted.argsort(stable=True)]
    assert (falling[1:] <= falling[:-1] + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_a_permutation_of_the_actions(kind):
    predicted = torch.rand(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    p = inverse_gap_weights(predicted, gamma=30.0, kind=kind)
    assert torch.allclose(inverse_gap_weights(predicted[:, order], gamma=30.0, kind=kind), p[:, order], atol=1e-15)


def test_square_weights_do_not_know_the_level_nor_fast_ones_the_scale():
    predicted = torch.rand(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    for kind, moved in (("square", predicted + 0.5), ("fast", predicted / 7)):
        p = inverse_gap_weights(predicted, gamma=40.0, kind=kind)
        assert torch.allclose(inverse_gap_weights(moved, gamma=40.0, kind=kind), p, atol=1e-12)
        other = "fast" if kind == "square" else "square"
        away = inverse_gap_weights(moved, gamma=40.0, kind=other) - inverse_gap_weights(
            predicted, gamma=40.0, kind=other
        )
        assert away.abs().max() > 0.01


def moved_network(strength, copies, step=0.1):
    """A network of ten weights, perturbed, and moved from where it started."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 1)).double()
    perturbed = PerturbedOutput(network, strength=strength, copies=copies)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += step * torch.randn_like(parameter)
    return perturbed


def with_all_signs(perturbed):
    signs = torch.tensor(list(itertools.product([-1, 1], repeat=perturbed.initial.numel())), dtype=torch.int8)
    perturbed.signs = signs
    return perturbed


CONTEXTS = torch.tensor([[0.6, -0.8], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
SEEN = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def test_the_square_loss_averaged_over_all_signs_is_the_plain_one_and_a_pull_to_the_start():
    perturbed = with_all_signs(moved_network(0.7, copies=2))
    exact = online_regression_loss(perturbed(CONTEXTS)[..., 0], SEEN, kind="square")
    plain = (SEEN - perturbed.network(CONTEXTS)[:, 0]).square().mean() / 2
    weights = torch.cat([parameter.flatten() for parameter in perturbed.network.parameters()])
    pull = 0.7**2 / 2 * (weights - perturbed.initial).square().sum()
    assert abs(float(exact - plain - pull)) < 1e-12
    assert abs(float(perturbed.penalty() - pull)) < 1e-15
    assert torch.allclose(*(torch.cat(gradient(value, perturbed)) for value in (exact, plain + pull)), atol=1e-12)


def test_the_kl_loss_averaged_over_all_signs_gains_the_pull_times_the_logistic_slope_to_second_order():
    errors = []
    for strength in (0.4, 0.2):
        perturbed = with_all_signs(moved_network(strength, copies=2))
        exact = online_regression_loss(perturbed(CONTEXTS)[..., 0], SEEN, kind="kl")
        logits = perturbed.network(CONTEXTS)[:, 0]
        slope = (logits.sigmoid() * (1 - logits.sigmoid())).mean()
        plain = online_regression_loss(logits[None], SEEN, kind="kl")
        errors.append(float(exact - plain - slope * perturbed.penalty()))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.05)


def gradient(value, perturbed):
    return [g.flatten() for g in torch.autograd.grad(value, list(perturbed.network.parameters()), retain_graph=True)]


def test_there_is_no_perturbation_at_the_start_whatever_the_signs():
    perturbed = with_all_signs(moved_network(0.7, copies=2, step=0.0))
    assert torch.equal(perturbed(CONTEXTS), perturbed.network(CONTEXTS).expand(2**10, 3, 1))
    assert perturbed.penalty() == 0


def test_the_perturbation_adds_its_signs_to_the_gradient():
    perturbed = moved_network(0.7, copies=3)
    plain = torch.cat(gradient(perturbed.network(CONTEXTS).sum(), perturbed))
    for copy_, signs in zip(perturbed(CONTEXTS)[:, :, 0], perturbed.signs, strict=True):
        assert torch.allclose(torch.cat(gradient(copy_.sum(), perturbed)), plain + 3 * 0.7 * signs, atol=1e-12)


def test_signs_are_fair_independent_and_kept():
    torch.manual_seed(0)
    perturbed = PerturbedOutput(nn.Linear(100, 100), strength=1.0, copies=4, seed=3)
    signs = perturbed.signs.double()
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert (signs @ signs.mT / signs.shape[1] - torch.eye(4)).abs().max() < 0.04
    assert signs.mean(1).abs().max() < 0.04
    other = PerturbedOutput(nn.Linear(100, 100), strength=1.0, copies=4, seed=4)
    other.load_state_dict(perturbed.state_dict())
    assert torch.equal(other.signs, perturbed.signs)


@pytest.mark.parametrize("kind", ["kl", "square"])
def test_the_gradient_of_either_loss_is_the_prediction_less_what_was_seen(kind):
    outputs = torch.linspace(-6, 6, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    target = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    online_regression_loss(outputs, target, kind=kind, reduction="sum").backward()
    prediction = outputs.detach().sigmoid() if kind == "kl" else outputs.detach()
    assert torch.allclose(outputs.grad, (prediction - target) / 3, atol=1e-14)


def test_the_kl_loss_is_the_divergence_and_zero_where_the_prediction_is_right():
    target = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64)
    other = target.flip(0)
    expected = target * (target / other).log() + (1 - target) * ((1 - target) / (1 - other)).log()
    found = online_regression_loss(other.logit()[None], target, reduction="none")
    assert torch.allclose(found, expected, atol=1e-14)
    right = online_regression_loss(target.logit()[None], target, reduction="none")
    assert right.abs().max() < 1e-15
    extreme = online_regression_loss(torch.tensor([[-1e4, 1e4]]), torch.tensor([0.0, 1.0]), reduction="none")
    assert extreme.tolist() == [0.0, 0.0]


def linear(actions=3, dims=2):
    torch.manual_seed(0)
    return nn.Linear(dims, actions).double()


def rounds(number, dims=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randn(number, 1, dims, generator=generator, dtype=torch.float64)
    losses = torch.rand(number, 1, 3, generator=generator, dtype=torch.float64)
    return zip(contexts, losses, strict=True)


def played(agent, number, seed=0):
    actions = []
    for contexts, losses in rounds(number, seed=seed):
        decision = agent.act(contexts)
        agent.update(contexts, decision.action, losses[0, decision.action])
        actions.append(int(decision.action))
    return actions


def test_a_linear_network_with_the_square_loss_is_squarecb_step_by_step():
    agent = NeuralCB(linear(), loss="square", gamma=20.0, lr=0.05, seed=5)
    weight, bias = (parameter.detach().numpy().copy() for parameter in agent.regressor.network.parameters())
    uniform = torch.Generator().manual_seed(5)
    for contexts, losses in rounds(60):
        x = contexts[0].numpy()
        predicted = np.clip(weight @ x + bias, 0, 1)
        best = int(np.argmin(predicted))
        p = [1 / (3 + 20 * (y - predicted[best])) for y in predicted]
        p[best] += 1 - sum(p)
        draw, action = float(torch.rand(1, generator=uniform, dtype=torch.float64)), 0
        while draw >= sum(p[: action + 1]):
            action += 1
        decision = agent.act(contexts)
        assert int(decision.action) == action
        assert float(decision.probability) == pytest.approx(p[action], abs=1e-12)
        agent.update(contexts, decision.action, losses[0, decision.action])
        residual = weight[action] @ x + bias[action] - float(losses[0, action])
        weight[action] -= 0.05 * residual * x
        bias[action] -= 0.05 * residual
        assert np.allclose(agent.regressor.network.weight.detach().numpy(), weight, atol=1e-13)


@pytest.mark.parametrize("loss", ["kl", "square"])
def test_one_copy_without_strength_is_the_plain_network(loss):
    plain = NeuralCB(linear(), loss=loss)
    perturbed = NeuralCB(PerturbedOutput(linear(), strength=0.0, copies=1), loss=loss)
    assert played(plain, 40) == played(perturbed, 40)
    assert torch.equal(plain.regressor.network.weight, perturbed.regressor.network.network.weight)


@pytest.mark.parametrize("loss", ["kl", "square"])
def test_the_expected_perturbation_steps_by_the_mean_over_all_signs(loss):
    agents = []
    for copies in (None, 1):
        perturbed = PerturbedOutput(linear(2), strength=0.05, copies=copies)
        with torch.no_grad():
            perturbed.network.weight += 0.3
            perturbed.network.bias -= 0.2
        agents.append(NeuralCB(perturbed if copies is None else with_all_signs(perturbed), loss=loss, lr=1.0))
    before = torch.cat([p.detach().flatten() for p in agents[0].regressor.network.parameters()])
    contexts = torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)
    for agent in agents:
        agent.update(contexts, torch.tensor([0, 1]), torch.tensor([1.0, 0.2], dtype=torch.float64))
    one, other = (torch.cat([p.detach().flatten() for p in agent.regressor.network.parameters()]) for agent in agents)
    assert (one - before).norm() > 0.1
    assert (one - other).abs().max() < (1e-12 if loss == "square" else 1e-6)


def test_predictions_of_the_kl_agent_average_after_the_logistic_function():
    agent = NeuralCB(moved_network(3.0, copies=5))
    agent.regressor.network.network[2] = nn.Linear(3, 1).double()
    agent.regressor.network.network[2].load_state_dict({"weight": torch.ones(1, 3), "bias": torch.zeros(1)})
    contexts = CONTEXTS[None].expand(4, 3, 2)
    outputs = agent.regressor.network(contexts)[..., 0]
    assert torch.allclose(agent(contexts), outputs.sigmoid().mean(0))
    assert (agent(contexts) - outputs.mean(0).sigmoid()).abs().max() > 1e-3


def test_gradient_descent_on_a_strongly_convex_loss_has_logarithmic_regret():
    """Hazan, Agarwal and Kale 2007: at most G^2 (1 + ln T) / (2 mu) with steps 1 / (mu t)."""
    mu, radius, number = 0.2, 2.0, 400
    network = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(network.weight)
    perturbed = PerturbedOutput(network, strength=math.sqrt(mu), copies=None)
    optimizer = torch.optim.SGD(network.parameters(), lr=1 / mu)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    agent = NeuralCB(perturbed, loss="square", gamma=5.0, optimizer=optimizer, radius=radius)
    generator = torch.Generator().manual_seed(0)
    seen, outcomes, suffered, steepest = [], [], 0.0, 0.0
    for _ in range(number):
        contexts = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64)
        contexts = contexts / contexts.norm(dim=-1, keepdim=True)
        action = agent.act(contexts).action
        loss = torch.rand(1, generator=generator, dtype=torch.float64)
        suffered += float(agent.update(contexts, action, loss))
        steepest = max(steepest, float(network.weight.grad.norm()))
        schedule.step()
        seen.append(contexts[0, action[0]])
        outcomes.append(loss[0])
        assert network.weight.norm() <= radius * (1 + 1e-12)
    x, y = torch.stack(seen), torch.stack(outcomes)
    best = torch.linalg.solve(x.mT @ x + number * mu * torch.eye(3), x.mT @ y)
    least = ((x @ best - y).square().sum() + number * mu * best.square().sum()) / 2
    assert best.norm() < radius
    assert 0 < suffered - float(least) <= steepest**2 / (2 * mu) * (1 + math.log(number))


def test_every_parameter_stays_in_its_ball_and_is_left_alone_inside():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    start = copy.deepcopy(network)
    agent = NeuralCB(network, lr=5.0, radius=0.3)
    far = 0.0
    for contexts, losses in rounds(30):
        decision = agent.act(contexts)
        agent.update(contexts, decision.action, losses[0, decision.action])
        for now, then in zip(network.parameters(), start.parameters(), strict=True):
            assert (now - then).norm() <= 0.3 * (1 + 1e-12)
            far = max(far, float((now - then).norm()))
    assert far == pytest.approx(0.3)
    loose, free = NeuralCB(linear(), radius=1e3), NeuralCB(linear())
    assert played(loose, 20) == played(free, 20)
    assert torch.allclose(loose.regressor.network.weight, free.regressor.network.weight, atol=1e-14)


@pytest.mark.parametrize("loss", ["kl", "square"])
def test_a_seed_gives_the_actions_and_a_saved_agent_goes_on_with_them(loss):
    first, second = (NeuralCB(linear(), loss=loss, seed=7) for _ in range(2))
    assert played(first, 50) == played(second, 50)
    third = NeuralCB(nn.Linear(2, 3).double(), loss=loss, seed=8)
    third.load_state_dict(first.state_dict())
    assert int(third.regressor.rounds) == 50
    copied = copy.deepcopy(first)
    expected = played(first, 30, seed=1)
    assert played(third, 30, seed=1) == expected
    assert played(copied, 30, seed=1) == expected
    assert torch.equal(copied.regressor.network.weight, first.regressor.network.weight)
    assert len(set(expected)) > 1


def test_actions_are_drawn_as_often_as_their_probabilities_say():
    agent = NeuralCB(linear(), loss="square", gamma=4.0)
    contexts = torch.tensor([[0.5, -1.0]], dtype=torch.float64).expand(40_000, 2)
    decision = agent.act(contexts)
    p = agent.probabilities(contexts[:1])[0]
    often = decision.action.bincount(minlength=3) / 40_000
    assert (often - p).abs().max() < 0.01
    assert torch.allclose(decision.probability, p[decision.action])


def test_only_the_output_of_the_action_taken_is_trained():
    agent = NeuralCB(linear(), loss="kl", lr=1.0)
    before = agent.regressor.network.weight.detach().clone()
    agent.update(torch.ones(1, 2, dtype=torch.float64), torch.tensor([1]), torch.ones(1, dtype=torch.float64))
    moved = (agent.regressor.network.weight - before).abs().sum(1) > 0
    assert moved.tolist() == [False, True, False]


def test_gamma_may_grow_with_the_rounds():
    agent = NeuralCB(linear(), loss="square", gamma=lambda t: 10.0 * t)
    default = NeuralCB(linear(), loss="square")
    contexts = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    for t in (1, 2, 3):
        predicted = agent(contexts).clamp(0, 1)
        assert torch.equal(agent.probabilities(contexts), inverse_gap_weights(predicted, gamma=10.0 * t))
        predicted = default(contexts).clamp(0, 1)
        assert torch.equal(default.probabilities(contexts), inverse_gap_weights(predicted, gamma=math.sqrt(3 * t)))
        for each in (agent, default):
            each.update(contexts, torch.tensor([0]), torch.tensor([0.4], dtype=torch.float64))
    fast = NeuralCB(linear())
    fast.regressor.rounds += 299
    assert fast._gamma(3) == 30.0
    fast.regressor.rounds += 2700
    assert fast._gamma(3) == pytest.approx(math.sqrt(9000))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_gap_weights(torch.rand(3), gamma=-1.0), "gamma must be"),
        (lambda: inverse_gap_weights(torch.rand(1), gamma=1.0), "at least 2 actions"),
        (lambda: inverse_gap_weights(torch.rand(3) + 1, gamma=1.0, kind="fast"), r"predicted must lie in \[0, 1\]"),
        (lambda: inverse_gap_weights(torch.rand(3), gamma=1.0, kind="slow"), "kind must be one of"),
        (lambda: online_regression_loss(torch.rand(2, 3), torch.tensor([0.0, 1.1, 0.0])), r"target must lie in \[0"),
        (lambda: online_regression_loss(torch.rand(3), torch.rand(3)), "copies"),
        (lambda: PerturbedOutput(nn.Linear(2, 1), strength=-1.0), "strength must be"),
        (lambda: PerturbedOutput(nn.Linear(2, 1), strength=1.0, copies=0), "copies must be"),
        (lambda: PerturbedOutput(nn.ReLU(), strength=1.0), "nothing to perturb"),
        (lambda: NeuralCB(nn.ReLU()), "nothing to learn"),
        (lambda: NeuralCB(nn.Linear(2, 3), loss="hinge"), "loss must be one of"),
        (lambda: NeuralCB(nn.Linear(2, 3), weighting="kl"), "weighting must be one of"),
        (lambda: NeuralCB(nn.Linear(2, 3), gamma=-1.0), "gamma must be"),
        (lambda: NeuralCB(nn.Linear(2, 3), radius=0.0), "radius must be"),
        (lambda: NeuralCB(nn.Linear(2, 1)).act(torch.rand(4, 2)), "at least 2 actions"),
        (lambda: NeuralCB(nn.Linear(2, 3)).act(torch.rand(2)), "at least 2 actions"),
        (lambda: NeuralCB(nn.Linear(2, 3)).act(torch.full((1, 2), math.nan)), "NaN"),
        (lambda: seen(torch.tensor([3]), torch.tensor([0.5])), r"action must lie in \[0, 2\]"),
        (lambda: seen(torch.tensor([-1]), torch.tensor([0.5])), r"action must lie in \[0, 2\]"),
        (lambda: seen(torch.tensor([0]), torch.tensor([1.5])), r"loss must lie in \[0, 1\]"),
        (lambda: seen(torch.tensor([0]), torch.tensor([math.nan])), "loss contains NaN"),
        (lambda: seen(torch.tensor([0, 1]), torch.tensor([0.5])), "must have shape"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def seen(action, loss):
    return NeuralCB(nn.Linear(2, 3)).update(torch.rand(1, 2), action, loss)
