"""What every public part keeps, whatever its kind; and modules that are called in ways of their own.

Losses of ``(input, target)`` and risks have contracts of their own. Every other module that a room exports must have
a row in MODULES: one that has none fails, so a new part is covered the day it is exported.
"""

import copy
import dataclasses
import doctest
import enum
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn
from torch.nn import functional

import minimand
from minimand import constraints, losses, online, policies, preferences, risks, transport

ROOMS = ("losses", "risks", "constraints", "transport", "optim", "bounds", "preferences", "policies", "online")
PARTS = [
    (room, name)
    for room in ROOMS
    for name in importlib.import_module(f"minimand.{room}").__all__
    if not inspect.isabstract(getattr(importlib.import_module(f"minimand.{room}"), name))
]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def scores(dtype=torch.float32, shape=(6, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def both_heads(part, dtype):
    seen = scores(dtype).requires_grad_()
    return sum(each.square().mean() for each in part(seen)), seen


def aggregate(part, dtype):
    predictions = scores(dtype, (6,)).requires_grad_()
    return part(predictions, torch.tensor([0.5, 0.2], dtype=dtype), torch.tensor([0, 0, 0, 1, 1, 1])), predictions


def tempnet(part, dtype):
    # The network stays in float32: in half precision its temperatures would fall into steps.
    inputs = scores(dtype).requires_grad_()
    return part(inputs).sum(), inputs


def contrastive(part, dtype):
    images, texts = scores(dtype, (6, 4)).requires_grad_(), scores(dtype, (6, 4)).flip(0)
    out = part(images, texts, index=torch.arange(6))
    return out.loss + out.temperature_loss, images


def adversarial(part, dtype):
    model = nn.Linear(3, 3).to(dtype)
    inputs = scores(dtype).sigmoid()
    return part(model, inputs, LABELS), model.weight


def factored(part, dtype):
    hidden = scores(dtype, (6, 4)).requires_grad_()
    return part(hidden, LABELS), hidden


def adaptive(part, dtype):
    features = scores(dtype, (6, 12)).requires_grad_()
    return part(features).sum(), features


def matched(part, dtype):
    cost = scores(dtype).requires_grad_()
    return part(cost), cost


def routed(part, dtype):
    logits = scores(dtype).requires_grad_()
    return part(logits).combine.sum(), logits


def multiplier(part, dtype):
    violations = scores(dtype, (3,)).requires_grad_()
    return part(violations), violations


def lipschitz_regressor(part, dtype):
    states = scores(dtype, (6, 2)).requires_grad_()
    return part(states).sum(), states


def survival(part, dtype):
    log_risk = scores(dtype, (6,)).requires_grad_()
    return part(log_risk, torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0, 4.0]), torch.tensor([1, 1, 0, 1, 0, 1])), log_risk


def hazards(part, dtype):
    logits = scores(dtype).requires_grad_()
    return part(logits, LABELS, torch.tensor([1, 1, 0, 1, 0, 1])), logits


def pooled(part, dtype):
    bags = scores(dtype, (2, 5, 3)).requires_grad_()
    return part(bags)[0].sum(), bags


def bags(part, dtype):
    instances = scores(dtype, (2, 5, 3)).requires_grad_()
    return part(instances).sum(), instances


def block(part, dtype):
    tokens = scores(dtype, (2, 3, 4)).requires_grad_()
    return part(tokens).sum(), tokens


def language_model(part, dtype):
    with torch.no_grad():
        part.embedding.weight.copy_(scores(dtype, (5, 4)))
    return part(torch.tensor([[0, 1, 2], [3, 4, 0]])).square().mean(), part.embedding.weight


def compared(part, dtype):
    chosen = scores(dtype, (6,)).requires_grad_()
    return part(chosen, scores(dtype, (6,)).flip(0)), chosen


def rewarded(part, dtype):
    features = scores(dtype, (6, 4)).requires_grad_()
    return part(features).sum(), features


def uncertain(part, dtype):
    predictions = scores(dtype).requires_grad_()
    each = functional.cross_entropy(predictions, LABELS, reduction="none")
    return part(predictions, scores(dtype).flip(0), each), predictions


def twice_generated(part, dtype):
    generated = scores(dtype).requires_grad_()
    return part(generated, LABELS[:3], timesteps=torch.tensor([0, 400, 999])).loss, generated


def reward_multipliers(part, dtype):
    advantages = scores(dtype, (2, 6)).requires_grad_()
    mixed = part(advantages, scores(dtype, (6,)))
    part.update(torch.tensor([0.2, 0.9], dtype=dtype))
    return (mixed * torch.arange(6)).sum(), advantages


def demonstrated(part, dtype):
    logp = scores(dtype).log_softmax(-1).requires_grad_()
    return part(logp, scores(dtype).flip(0).log_softmax(-1)), logp


def masked(part, dtype):
    logp, hidden = -scores(dtype).abs().requires_grad_(), scores(dtype, (6, 3, 4))
    answers = torch.ones(6, 3, dtype=torch.bool)
    logp.retain_grad()
    return part(
        preferences.PairTokens(
            logp, logp.flip(0), answers, answers, -logp.detach().abs(), -logp.detach().abs(), hidden, hidden
        )
    ), logp


def period(part, dtype):
    log_returns = scores(dtype).requires_grad_()
    return part(log_returns), log_returns


def perturbed(part, dtype):
    contexts = scores(dtype).requires_grad_()
    return part(contexts).mean() + part.penalty().to(dtype), contexts


def bandit(part, dtype):
    contexts = scores(dtype).requires_grad_()
    decision = part.act(contexts.detach())
    part.update(contexts.detach(), decision.action, decision.probability)
    return part(contexts).sum(), contexts


def regressor(part, dtype):
    contexts = scores(dtype).requires_grad_()
    part.update(contexts.detach(), LABELS, torch.linspace(0, 1, 6, dtype=dtype))
    return part(contexts).sum(), contexts


def disjoint(part, dtype):
    contexts = scores(dtype).requires_grad_()
    return part(contexts).square().mean(), contexts


def questioned(part, dtype):
    counts = scores(dtype).abs().requires_grad_()
    return part(counts, scores(dtype).flip(0).abs()).square().sum(), counts


def price_reader(part, dtype):
    image = scores(dtype, (6, 18)).view(6, 1, 6, 3).requires_grad_()
    actions, values = part(image, scores(dtype))
    return actions.square().mean() + values.square().mean(), image


def offline(part, dtype):
    ends = torch.tensor([False, False, True, False, False, True])
    seen, torque = scores(dtype), scores(dtype, (6, 1))
    log = policies.Transitions(seen, torque, scores(dtype, (6,)), seen + 1, ends, torch.zeros(6, dtype=torch.bool))
    stream = policies.BatchStream(policies.ScaledLog.of(log), seeds=(0,), batch_size=4, noise_width=part.noise_width)
    return part.actor_loss(next(stream)).sum(), seen


def remembered(part, dtype):
    seen = scores(dtype, (1, 6, 3)).requires_grad_()
    action, noise = scores(dtype, (1, 6, 1)).tanh(), torch.zeros(1, 6, 2, dtype=dtype)
    return part.loss(seen, action, gate=torch.ones(1, 6, dtype=dtype), noise=noise).sum(), seen


def constrained(part, dtype):
    action = scores(dtype, (6, 1)).requires_grad_()
    return part(scores(dtype), action), action


def policy():
    log = policies.Pendulum().log("mixed", episodes=2)
    return policies.Policy(nn.Sequential(nn.Linear(3, 1)), policies.ScaledLog.of(log).scaling)


def acted(part, dtype):
    seen = scores(dtype).requires_grad_()
    return part(seen).sum(), seen


def stocked(part, dtype):
    observation = scores(dtype).requires_grad_()
    return part(observation, scores(dtype, (6,))).square().mean(), observation


def guarded(part, dtype):
    rows = scores(dtype, (6, 2)).requires_grad_()
    return part(rows).sum(), rows


def counted(part, dtype):
    rows = scores(dtype, (6, 2)).requires_grad_()
    return torch.where(part.inside(rows.detach()), 0.0, rows.square().sum(1)).sum(), rows


def predicted(part, dtype):
    state = scores(dtype, (6, 2)).requires_grad_()
    found = part(state, scores(dtype, (6, 1)).detach())
    return (found.next_observation.mean(1) + found.reward).sum() + state.sum() * 0, state


def gaussian(part, dtype):
    observation = scores(dtype, (6, 2)).requires_grad_()
    return part(observation).log_prob(scores(dtype, (6, 1)).detach().flip(0)).sum(), observation


def dose_log():
    return policies.DoseSimulator().log(20, generator=torch.Generator().manual_seed(0))


MODULES = {
    "GaussianPolicy": (lambda: policies.GaussianPolicy(2, 1, low=0.0, high=1.0), gaussian),
    "KernelDensityGuardian": (lambda: policies.KernelDensityGuardian().fit(dose_log().observation), guarded),
    "ChristoffelGuardian": (lambda: policies.ChristoffelGuardian().fit(dose_log().observation), guarded),
    "CountGuardian": (lambda: policies.CountGuardian(2).fit(dose_log().observation), counted),
    "NearestNeighborModel": (lambda: policies.NearestNeighborModel().fit(dose_log()), predicted),
    "RegressionModel": (lambda: policies.RegressionModel().fit(dose_log()), predicted),
    "StockQuantileNetwork": (lambda: policies.StockQuantileNetwork(3, 2, hidden=(4,)), stocked),
    "StockAgent": (
        lambda: policies.StockAgent(
            policies.StockQuantileNetwork(3, 2, hidden=(4,)), policies.ExpectedUtility.target(), discount=0.9
        ),
        stocked,
    ),
    "BehaviourCloning": (lambda: policies.BehaviourCloning(3, 1, hidden=(4,)), offline),
    "CQL": (lambda: policies.CQL(3, 1, hidden=(4,), num_actions=2), offline),
    "IQL": (lambda: policies.IQL(3, 1, hidden=(4,)), offline),
    "FamO2O": (lambda: policies.FamO2O(3, 1, hidden=(4,)), offline),
    "Policy": (policy, acted),
    "TD3BC": (lambda: policies.TD3BC(3, 1, hidden=(4,)), offline),
    "A2PR": (lambda: policies.A2PR(3, 1, hidden=(4,), vae_hidden=(4,)), offline),
    "AdvantageGatedVAE": (
        lambda: policies.AdvantageGatedVAE(3, 1, hidden=(4,), generators=[torch.Generator().manual_seed(0)]),
        remembered,
    ),
    "DatasetConstraint": (lambda: policies.DatasetConstraint(torch.eye(3), torch.eye(3)[:, :1]), constrained),
    "PRDC": (lambda: policies.PRDC(policies.ScaledLog.of(policies.Pendulum().log(episodes=1)), hidden=(4,)), offline),
    "PortfolioPolicy": (lambda: policies.PortfolioPolicy(3, window=5, width=2, hidden=4), price_reader),
    "QueryNetwork": (lambda: online.QueryNetwork(3, budget=5, hidden=(8,)), questioned),
    "QueryScorer": (lambda: online.QueryScorer(online.thresholds(3), budget=5, hidden=(8,)), questioned),
    "NeuralCB": (lambda: online.NeuralCB(nn.Linear(3, 3), radius=0.1), bandit),
    "EpsilonGreedy": (lambda: online.EpsilonGreedy(nn.Linear(3, 3)), bandit),
    "LinUCB": (lambda: online.LinUCB(3, num_actions=3), bandit),
    "NeuralUCB": (lambda: online.NeuralUCB(nn.Linear(3, 3)), bandit),
    "NeuralTS": (lambda: online.NeuralTS(nn.Linear(3, 3), covariance="full"), bandit),
    "VectorActorCritic": (lambda: policies.VectorActorCritic(3, 2, 4, discrete=False), both_heads),
    "OnlineRegressor": (lambda: online.OnlineRegressor(nn.Linear(3, 3), radius=0.1), regressor),
    "DisjointLinear": (lambda: online.DisjointLinear(3, 2, num_actions=4), disjoint),
    "PerturbedOutput": (lambda: online.PerturbedOutput(nn.Linear(3, 1), strength=0.1), perturbed),
    "SharpeLoss": (policies.SharpeLoss, period),
    "SparseTokenMask": (lambda: preferences.SparseTokenMask(4), masked),
    "CtrlUReward": (
        lambda: preferences.CtrlUReward(nn.Linear(3, 3), nn.CrossEntropyLoss(reduction="none"), warmup_steps=2),
        twice_generated,
    ),
    "ImplicitRewardSFTLoss": (lambda: preferences.ImplicitRewardSFTLoss(value="learned"), demonstrated),
    "UncertaintyWeightedLoss": (preferences.UncertaintyWeightedLoss, uncertain),
    "PairwiseRewardLoss": (preferences.PairwiseRewardLoss, compared),
    "RewardEnsemble": (
        lambda: preferences.RewardEnsemble(preferences.RewardHeads(4)).fit_scale(torch.eye(4)),
        rewarded,
    ),
    "RewardHeads": (lambda: preferences.RewardHeads(4), rewarded),
    "AttentionPool": (lambda: transport.AttentionPool(3, hidden=4), pooled),
    "CoxPHLoss": (losses.CoxPHLoss, survival),
    "DiscreteHazardLoss": (losses.DiscreteHazardLoss, hazards),
    "MeanPool": (transport.MeanPool, pooled),
    "OTPool": (lambda: transport.OTPool(3, num_prototypes=2, mass=0.5), pooled),
    "OTSurv": (
        lambda: transport.OTSurv(3, dim=4, pool=transport.OTPool(4, num_prototypes=2), dropout=0.0),
        bags,
    ),
    "SparseOTLoss": (lambda: transport.SparseOTLoss(2), matched),
    "SparseOTRouter": (lambda: transport.SparseOTRouter(3), routed),
    "AggregateLoss": (losses.AggregateLoss, aggregate),
    "LipschitzRegressor": (
        lambda: constraints.LipschitzRegressor(2.0).fit(torch.eye(2), torch.eye(2)[:, :1]),
        lipschitz_regressor,
    ),
    "Multiplier": (lambda: constraints.Multiplier(0.1, num_constraints=3, damping=1.0), multiplier),
    "RewardMultipliers": (lambda: preferences.RewardMultipliers(torch.tensor([0.7, 0.6])), reward_multipliers),
    "TempNet": (lambda: losses.TempNet(3), tempnet),
    "TempNetContrastiveLoss": (lambda: losses.TempNetContrastiveLoss(6, 4, radius=1.0), contrastive),
    "SmoothAdversarialCompSumLoss": (lambda: losses.SmoothAdversarialCompSumLoss(eps=0.1), adversarial),
    "FactoredSphericalLinear": (
        lambda: losses.FactoredSphericalLinear(4, num_classes=5, loss=losses.ZLoss()),
        factored,
    ),
    "AdaptiveTemperature": (lambda: losses.AdaptiveTemperature(12), adaptive),
    "LipschitzBlock": (lambda: constraints.LipschitzBlock(4, 2, num_blocks=1), block),
    "LipschitzGPT": (lambda: constraints.LipschitzGPT(5, 4, num_blocks=1, num_heads=2), language_model),
}

NAMES = [
    name
    for room, name in PARTS
    if inspect.isclass(part := getattr(importlib.import_module(f"minimand.{room}"), name))
    and issubclass(part, nn.Module)
    and not issubclass(part, (losses.Loss, risks.Risk, preferences.PairLoss))
]


def built(name):
    torch.manual_seed(0)
    return MODULES[name][0]()


def test_every_module_has_a_row():
    assert set(NAMES) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_gives_a_finite_scalar_and_gradient_in_the_dtype_of_its_input(name, dtype):
    part = built(name)
    value, source = MODULES[name][1](part if name == "FactoredSphericalLinear" else part.to(dtype), dtype)
    value.backward()
    assert value.shape == ()
    assert torch.isfinite(value)
    assert value.dtype in (dtype, torch.float32)
    if source.grad is not None:
        assert source.grad.dtype == dtype
        assert torch.isfinite(source.grad).all()
    else:
        # A temperature network does not pass gradients on to what it reads.
        assert any(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_state_travels_and_a_copy_is_independent(name):
    part, call = built(name), MODULES[name][1]
    before = copy.deepcopy(part.state_dict())
    call(copy.deepcopy(part), torch.float32)
    for key, value in part.state_dict().items():
        assert torch.equal(value, before[key])
    call(part, torch.float32)
    other = built(name)
    other.load_state_dict(part.state_dict())
    for key, value in part.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.untyped
@pytest.mark.parametrize("name", MODULES)
def test_a_module_refuses_nan(name):
    part, call = built(name), MODULES[name][1]
    poison = globals()["scores"]

    def broken(dtype=torch.float32, shape=(6, 3)):
        value = poison(dtype, shape)
        value.view(-1)[1] = float("nan")
        return value

    globals()["scores"] = broken
    try:
        with pytest.raises(ValueError, match=r"(?i)nan|finite"):
            call(part, torch.float32)
    finally:
        globals()["scores"] = poison


@pytest.mark.parametrize(("room", "name"), PARTS)
def test_a_public_part_says_what_it_does_shows_it_and_names_its_source(room, name):
    part = getattr(importlib.import_module(f"minimand.{room}"), name)
    text = inspect.getdoc(part) or ""
    assert len(text.splitlines()[0]) > 20
    result = inspect.isclass(part) and (
        issubclass(part, (tuple, Exception, enum.Enum)) or dataclasses.is_dataclass(part)
    )
    if result or getattr(part, "_is_protocol", False):
        return  # a result, an error or a protocol shows itself where it is used
    assert "Example:" in text
    assert "Source:" in text or name == "Mean"
    parameters = [p for p in inspect.signature(part).parameters.values() if p.name not in ("self", "args", "kwargs")]
    assert not parameters or "Args:" in text
    for parameter in parameters:
        assert f"{parameter.name}:" in text, parameter.name


def modules():
    return [
        module.name for module in pkgutil.walk_packages(minimand.__path__, "minimand.") if "__main__" not in module.name
    ]


@pytest.mark.untyped
@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "math": __import__("math"), **vars(module)}
    torch.manual_seed(0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, extraglobs=names, optionflags=flags).failed == 0
