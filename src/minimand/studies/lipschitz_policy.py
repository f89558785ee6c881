"""Does a bound on the policy's slope buy robustness, and do the loop's bounds hold in every run?

Three plants with experts whose loops contract: a stable and an unstable linear one, and an inverted pendulum whose
expert is nonlinear. Policies are cloned from 150 states with noise-free and with noisy controls, then driven from 100
starts with true measurements and with an adversary who picks, at every step, the error of a given norm that leads
to the costliest next state. States are measured in the norm in which the expert's loop contracts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from ..bench import Claim, Metric, Outcome, Run, Study
from ..constraints import (
    LipschitzRegressor,
    SpectralNormalize,
    closed_loop_bounds,
    constrain,
    fill_distance,
    lipschitz_bound,
    measurement_attack,
    policy_error_bound,
)

DEMONSTRATIONS, STARTS, STEPS, GRID = 150, 100, 60, 61
MULTIPLES = (0.5, 1.0, 2.0, 10.0)
_GRAVITY, _PULL, _TIME = 9.8, 4.9, 0.05


@dataclasses.dataclass(frozen=True)
class Plant:
    """A plant with an expert, in coordinates in which Euclidean distance is the norm of contraction.

    Args:
        name: For people.
        matrix: A of the linear part.
        inlet: B.
        gain: K of the expert, u = -K x less ``pull`` sin of the first state.
        swing: Coefficient of the sine in the second state's equation.
        pull: Of the expert.
        root: Root of the norm's matrix: z = root x.
        side: The set of states is the box with this half side.
        attack: Norm of the measurement error, in z.
    """

    name: str
    matrix: Tensor
    inlet: Tensor
    gain: Tensor
    swing: float
    pull: float
    root: Tensor
    side: float
    attack: float

    def expert(self, z: Tensor) -> Tensor:
        """Return the expert's controls at scaled states."""
        x = self.unscaled(z)
        return -(x @ self.gain.T) - self.pull * torch.sin(x[:, :1])

    def step(self, z: Tensor, u: Tensor) -> Tensor:
        """Return the next scaled states."""
        x = self.unscaled(z)
        push = torch.zeros_like(x)
        push[:, 1] = self.swing * torch.sin(x[:, 0])
        return (x @ self.matrix.T + push + u @ self.inlet.T) @ self.root.T

    def cost(self, z: Tensor, u: Tensor) -> Tensor:
        """Return the quadratic stage cost."""
        return self.unscaled(z).square().sum(1) + 0.1 * u.square().sum(1)

    def unscaled(self, z: Tensor) -> Tensor:
        """Return the plant's own states."""
        return torch.linalg.solve_triangular(self.root.T, z, upper=False, left=False)

    def inside(self, z: Tensor) -> Tensor:
        """Tell which states lie in the set that policies are bounded on."""
        return (self.unscaled(z).abs() <= self.side).all(1)

    @functools.cached_property
    def constants(self) -> dict[str, float]:
        """Contraction, input gain and the expert's Lipschitz constant.

        All Jacobians are affine in the cosine of the angle and norms are convex, so the largest is at an end.
        """
        back = torch.linalg.inv(self.root)
        contraction = lipschitz = 0.0
        for cosine in {math.cos(min(self.side, math.pi)), 1.0}:
            slope = self.gain.clone()
            slope[0, 0] += self.pull * cosine
            loop = self.matrix - self.inlet @ slope
            loop[1, 0] += self.swing * cosine
            contraction = max(contraction, float(torch.linalg.matrix_norm(self.root @ loop @ back, 2)))
            lipschitz = max(lipschitz, float(torch.linalg.matrix_norm(slope @ back, 2)))
        gain = float(torch.linalg.matrix_norm(self.root @ self.inlet, 2))
        return {"contraction": contraction, "input_gain": gain, "expert_lipschitz": lipschitz}


def _linear(name: str, matrix: list[list[float]], inlet: list[list[float]], attack: float) -> Plant:
    a, b = np.array(matrix), np.array(inlet)
    cost = scipy.linalg.solve_discrete_are(a, b, np.eye(2), 0.1 * np.eye(1))
    gain = np.linalg.solve(0.1 + b.T @ cost @ b, b.T @ cost @ a)
    return _scaled(name, a, b, gain, cost, swing=0.0, pull=0.0, side=2.0, attack=attack)


def _scaled(name: str, a: Any, b: Any, gain: Any, norm: Any, **rest: float) -> Plant:
    a, b, gain = (torch.tensor(np.asarray(value), dtype=torch.float64) for value in (a, b, gain))
    root = torch.tensor(np.linalg.cholesky(norm / np.linalg.eigvalsh(norm)[0]).T.copy())
    return Plant(name, a, b, gain, rest["swing"], rest["pull"], root, rest["side"], rest["attack"])


def _pendulum() -> Plant:
    a = np.array([[1.0, _TIME], [0.0, 1.0 - 0.5 * _TIME]])
    b = np.array([[0.0], [_TIME]])
    upright = a + np.array([[0.0, 0.0], [_TIME * (_GRAVITY - _PULL), 0.0]])
    cost = scipy.linalg.solve_discrete_are(upright, b, np.eye(2), 0.1 * np.eye(1))
    gain = np.linalg.solve(0.1 + b.T @ cost @ b, b.T @ cost @ upright)
    side = 1.2
    middle = a + np.array([[0.0, 0.0], [_TIME * (_GRAVITY - _PULL) * (1 + math.cos(side)) / 2, 0.0]]) - b @ gain
    norm = scipy.linalg.solve_discrete_lyapunov(middle.T, np.eye(2))
    return _scaled("pendulum", a, b, gain, norm, swing=_TIME * _GRAVITY, pull=_PULL, side=side, attack=0.3)


@functools.cache
def plants() -> tuple[Plant, ...]:
    """Return the three plants."""
    stable = _linear("stable plant", [[0.99, 0.1], [-0.1, 0.97]], [[0.0], [0.15]], 0.3)
    unstable = _linear("unstable plant", [[1.0, 0.1], [0.3, 1.0]], [[0.0], [0.1]], 0.3)
    return stable, unstable, _pendulum()


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """What a policy is cloned from, and where it starts.

    Args:
        states: ``(states, 2)``, scaled.
        controls: The expert's.
        noisy: The same with noise of a tenth of their range.
        starts: Where the loops begin, scaled.
    """

    states: Tensor
    controls: Tensor
    noisy: Tensor
    starts: Tensor


def demonstrations(source: Any, seed: int) -> dict[str, Demonstrations]:
    """Draw the demonstrations of cell ``seed`` for every plant."""
    found: dict[str, Demonstrations] = {}
    for plant in plants():
        draw = torch.Generator().manual_seed(1000 * seed + len(found))
        uniform = 2 * torch.rand(DEMONSTRATIONS + STARTS, 2, generator=draw, dtype=torch.float64) - 1
        states = plant.side * uniform[:DEMONSTRATIONS] @ plant.root.T
        starts = plant.side / 2 * uniform[DEMONSTRATIONS:] @ plant.root.T
        controls = plant.expert(states)
        noise = torch.randn(controls.shape, generator=draw, dtype=torch.float64)
        found[plant.name] = Demonstrations(states, controls, controls + 0.3 * controls.std() * noise, starts)
    return found


Clone = Callable[[Plant, Tensor, Tensor, Run], Callable[[Tensor], Tensor]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A contender: clone a policy for every plant and close its loop.

    Args:
        clone: ``(plant, states, controls, run) -> policy``.
    """

    clone: Clone

    def __call__(self, data: dict[str, Demonstrations], run: Run) -> Outcome:
        """Clone, drive and measure one cell."""
        metrics: dict[str, float] = {}
        violations, used = 0, 0.0
        for plant in plants():
            seen = data[plant.name]
            policy = self.clone(plant, seen.states, seen.controls, run)
            grid = _grid(plant)
            for attack, label in ((0.0, "nominal"), (plant.attack, "attacked")):
                cost, states, expert, stage = drive(plant, policy, seen.starts, attack)
                metrics[f"{label} cost, {plant.name}"] = math.log10(max(cost, 1e-12))
                if hasattr(policy, "lipschitz_constant"):
                    broken, share = check(plant, policy, seen, grid, attack, states, expert, stage)
                    violations, used = violations + broken, max(used, share)
            if hasattr(policy, "lipschitz_constant"):
                metrics["violated bounds"], metrics["share of a bound used"] = float(violations), used
            from_noise = self.clone(plant, seen.states, seen.noisy, run)
            error = (from_noise(grid) - plant.expert(grid)).square().mean() / plant.expert(grid).square().mean()
            metrics[f"control error from noisy demonstrations, {plant.name}"] = float(error) ** 0.5
        return Outcome(metrics)


def drive(
    plant: Plant, policy: Callable[[Tensor], Tensor], starts: Tensor, attack: float
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Close the loop, beside the expert's own.

    Returns:
        The mean stage cost; the states and the expert's states ``(steps + 1, starts, 2)``; and the mean difference of
        a stage cost of slope 1, ``(|z| + |u|) / root 2``, from the expert's, one a start.
    """
    z = expert = starts
    states, paths, costs, differences = [z], [expert], [], []
    for _ in range(STEPS):
        error = measurement_attack(policy, plant.step, z, radius=attack, value=lambda s: s.norm(dim=1)) if attack else 0
        u, best = policy(z + error), plant.expert(expert)
        costs.append(plant.cost(z, u))
        differences.append((z.norm(dim=1) + u.norm(dim=1) - expert.norm(dim=1) - best.norm(dim=1)) / math.sqrt(2))
        # A loop that diverges is stopped far outside, where its cost is already beyond comparison.
        z, expert = plant.step(z, u).clamp(-1e3, 1e3), plant.step(expert, best)
        states.append(z)
        paths.append(expert)
    return float(torch.stack(costs).mean()), torch.stack(states), torch.stack(paths), torch.stack(differences)


def check(
    plant: Plant,
    policy: Any,
    seen: Demonstrations,
    grid: Tensor,
    attack: float,
    states: Tensor,
    expert: Tensor,
    stage: Tensor,
) -> tuple[int, float]:
    """Count the bounds that a run breaks, and find the largest share of a bound that it used.

    The policy's error is bounded on the set of states, so a start counts as long as it has not left it.
    """
    constants: dict[str, Any] = dict(plant.constants)
    lipschitz = policy.lipschitz_constant
    corner = torch.full((1, 2), plant.side / (GRID - 1), dtype=grid.dtype) @ plant.root.T
    error = policy_error_bound(
        fit_error=float((policy(seen.states) - plant.expert(seen.states)).abs().max()),
        lipschitz=lipschitz,
        expert_lipschitz=constants["expert_lipschitz"],
        covering_radius=float(fill_distance(seen.states, grid)) + float(corner.abs().norm()),
    )
    shares = [float((policy(grid) - plant.expert(grid)).norm(dim=1).max()) / error]
    inside = torch.stack([plant.inside(z) for z in states[:-1]]).cumprod(0).bool()
    bound = functools.partial(
        closed_loop_bounds, **constants, lipschitz=lipschitz, cost_lipschitz=1.0, policy_error=error,
        measurement_error=attack,
    )  # fmt: skip
    for step in range(1, STEPS + 1):
        away = (states[step] - expert[step]).norm(dim=1)[inside[step - 1]]
        if len(away):
            shares.append(float(away.max()) / bound(horizon=step).state)
    stayed = inside[-1]
    if bool(stayed.any()):
        shares.append(float(stage[:, stayed].mean(0).abs().max()) / bound().regret)
    return sum(share > 1 + 1e-9 for share in shares), max(shares)


def bounded(multiple: float, plant: Plant, states: Tensor, controls: Tensor, run: Run) -> LipschitzRegressor:
    """Clone under a multiple of the expert's own constant."""
    return LipschitzRegressor(multiple * plant.constants["expert_lipschitz"]).fit(states, controls)


def chosen(plant: Plant, states: Tensor, controls: Tensor, run: Run) -> LipschitzRegressor:
    """Clone under the bound, of nine, that predicts held-out demonstrations best; the expert's constant is not told."""
    slope = float((controls - controls.mean(0)).std() / (states - states.mean(0)).std())
    candidates = [slope * 2.0**power for power in range(-3, 6)]
    errors = []
    for bound in candidates:
        kept = len(states) * 4 // 5
        policy = LipschitzRegressor(bound).fit(states[:kept], controls[:kept])
        errors.append(float((policy(states[kept:]) - controls[kept:]).square().mean()))
    return LipschitzRegressor(candidates[int(np.argmin(errors))]).fit(states, controls)


class CappedNetwork:
    """A network whose weights are capped after every step, so that its certified constant is the expert's at most.

    Args:
        net: The network.
        unit: States are divided by it.
        size: Outputs are multiplied by it.
    """

    def __init__(self, net: nn.Sequential, unit: float, size: float) -> None:
        self.net, self.unit, self.size = net, unit, size
        self.lipschitz_constant = lipschitz_bound(net, norm="l2").value * size / unit

    def __call__(self, z: Tensor) -> Tensor:
        """Return the controls."""
        return self.net(z / self.unit) * self.size


def capped(plant: Plant, states: Tensor, controls: Tensor, run: Run) -> CappedNetwork:
    """Clone by a network with a spectral cap on each layer; told the expert's constant, as the bound there is."""
    unit, size = float(states.std()), float(controls.std())
    cap = (plant.constants["expert_lipschitz"] * unit / size) ** (1 / 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.stream(plant.name) % 2**31)
        net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    constrain(optimizer, SpectralNormalize(cap, norm="l2"))
    for _ in range(600):
        optimizer.zero_grad()
        (net(states / unit) - controls / size).square().mean().backward()
        optimizer.step()
        schedule.step()
    return CappedNetwork(net.requires_grad_(False), unit, size)


def network(jitter: bool, plant: Plant, states: Tensor, controls: Tensor, run: Run) -> Callable[[Tensor], Tensor]:
    """Clone by a network without a bound; its weight decay, or its inputs' jitter, is chosen on held-out states."""
    options = (0.0, 0.03, 0.1, 0.2, 0.4) if jitter else (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    seed = run.stream(plant.name) % 2**31
    kept = len(states) * 4 // 5
    tried = _trained(states[:kept], controls[:kept], options, jitter=jitter, seed=seed)
    errors = (tried(states[kept:]) - controls[kept:]).square().mean((1, 2))
    best = _trained(states, controls, (options[int(errors.argmin())],), jitter=jitter, seed=seed)
    return lambda z: best(z)[0]


def _trained(
    states: Tensor, controls: Tensor, options: tuple[float, ...], *, jitter: bool, seed: int
) -> Callable[[Tensor], Tensor]:
    """Train one network an option, all together, and return ``states -> (options, states, 1)``."""
    draw = torch.Generator().manual_seed(seed)
    center, scale, size = states.mean(0), states.std(0), controls.std()
    inputs, target = (states - center) / scale, controls / size
    widths = (2, 64, 64, 1)
    # Every option starts from the same weights.
    weights = [
        (torch.randn(1, fan, out, generator=draw, dtype=states.dtype) / fan**0.5).repeat(len(options), 1, 1)
        for fan, out in itertools.pairwise(widths)
    ]
    biases = [torch.zeros(len(options), 1, out, dtype=states.dtype) for out in widths[1:]]
    parameters = [value.requires_grad_() for value in (*weights, *biases)]
    amount = torch.tensor(options, dtype=states.dtype)[:, None, None]

    def forward(z: Tensor) -> Tensor:
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            z = z @ weight + bias
            z = torch.tanh(z) if layer < len(weights) - 1 else z
        return z

    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        noise = torch.randn(inputs.shape, generator=draw, dtype=inputs.dtype)
        (forward(inputs + amount * noise if jitter else inputs) - target).square().mean((1, 2)).sum().backward()
        optimizer.step()
        if not jitter:  # decoupled weight decay, one amount an option
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1 - optimizer.param_groups[0]["lr"] * amount)
        schedule.step()
    for value in parameters:
        value.requires_grad_(False)
    return lambda z: forward((z - center) / scale) * size


@functools.cache
def _grid(plant: Plant) -> Tensor:
    line = torch.linspace(-plant.side, plant.side, GRID, dtype=torch.float64)
    return torch.cartesian_prod(line, line) @ plant.root.T


def _metrics() -> tuple[Metric, ...]:
    names = [plant.name for plant in plants()]
    kinds = [f"{kind} cost, {name}" for kind in ("attacked", "nominal") for name in names]
    costs = [Metric(kind, "lower is better", "log10") for kind in kinds]
    errors = [Metric(f"control error from noisy demonstrations, {name}", "lower is better", "%") for name in names]
    return (
        *costs,
        *errors,
        Metric("violated bounds", "lower is better"),
        Metric("share of a bound used", "lower is better", "%"),
    )


def _claims() -> tuple[Claim, ...]:
    at, steep = "bound at the expert's", "bound at 10 times"
    names = [plant.name for plant in plants()]
    claims = [
        Claim(at, beats=steep, metric=f"attacked cost, {name}",
              says=f"under attack a bound at the expert's own constant beats one ten times as large, {name}")
        for name in names
    ]  # fmt: skip
    claims += [
        Claim(at, beats="bound at half", metric=f"nominal cost, {name}",
              says=f"below the expert's constant the nominal cost is higher, {name}")
        for name in names
    ]  # fmt: skip
    claims += [
        Claim("bound chosen", beats=rival, metric=f"attacked cost, {name}",
              says=f"under attack a bound chosen on held-out states beats a {rival}, {name}")
        for rival in ("network", "network with jitter") for name in names
    ]  # fmt: skip
    claims += [
        Claim("network with capped weights", beats="network", metric=f"attacked cost, {name}",
              says=f"under attack a network with capped weights beats a network, {name}")
        for name in names
    ]  # fmt: skip
    claims += [
        Claim("network with capped weights", beats="network", metric=f"control error from noisy demonstrations, {name}",
              says=f"from noisy demonstrations a network with capped weights beats a network, {name}")
        for name in names
    ]  # fmt: skip
    claims += [
        Claim(at, beats=steep, metric=f"control error from noisy demonstrations, {name}",
              says=f"from noisy demonstrations the expert's constant beats one ten times as large, {name}")
        for name in names
    ]  # fmt: skip
    return tuple(claims)


study = Study(
    method="lipschitz-policy",
    problem=demonstrations,
    contenders={
        "network": Loop(functools.partial(network, False)),
        "network with jitter": Loop(functools.partial(network, True)),
        "bound at half": Loop(functools.partial(bounded, 0.5)),
        "bound at the expert's": Loop(functools.partial(bounded, 1.0)),
        "bound at twice": Loop(functools.partial(bounded, 2.0)),
        "bound at 10 times": Loop(functools.partial(bounded, 10.0)),
        "bound chosen": Loop(chosen),
        "network with capped weights": Loop(capped),
    },
    metrics=_metrics(),
    claims=_claims(),
    seeds=10,
    about=f"{DEMONSTRATIONS} demonstrations, {STARTS} starts, {STEPS} steps, a new draw for each seed",
    data="built-in: three plants with an expert",
    notes=(
        "Costs are logarithms to base 10 of the mean stage cost. Violated bounds: of policy error, state and regret "
        "together, over both runs of the three plants; a start counts while it has not left the set of states. "
        "The adversary knows plant and policy and looks one step ahead. All rivals that are tuned choose among "
        "five to nine settings on the same fifth of the demonstrations."
    ),
)
