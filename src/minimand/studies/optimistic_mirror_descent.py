"""Does optimistic mirror descent pay only for noise and drift, and what does it cost where there is but one of them?

Streams of losses whose noise and drift are known exactly are played by all contenders: linear losses whose mean changes
its sign after every block of rounds, is fixed, or is turned by an adversary; and quadratic ones whose minimiser jumps
or turns. Every cell draws new means and plays eight independent streams a condition, all in one computation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bench import Claim, Metric, Outcome, Run, Study
from ..optim import (
    EnsembleState,
    FollowState,
    MirrorState,
    SEAStream,
    ensemble_step,
    ensemble_step_sizes,
    optimistic_ftrl_step,
    optimistic_step,
)
from ..projections import Ball, project_ball

DOMAIN, DIAMETER = Ball(1.0), 2.0
DIM, STREAMS, ROUNDS, LONG, TURNS = 10, 8, 2400, 8000, 4000
PREFIXES = tuple(LONG >> halvings for halvings in (4, 3, 2, 1, 0))
LEVELS = (0.1, 0.3, 1.0)

BLOCKS = {
    "blocks of 20, noise 0.3": (20, 0.3),
    "blocks of 20": (20, 0.0),
    "blocks of 5": (5, 0.0),
    "blocks of 60, noise 1": (60, 1.0),
}
ALTERNATING, FIXED, CORRUPTED = "sign alternating", "one law, noise 0.3", "5 % turned, noise 0.3"
LINEAR = (*BLOCKS, ALTERNATING, FIXED, CORRUPTED)
CURVED = "quadratic, alternating, noise 0.3"
# Angle a round and noise; those with noise have larger gradients.
TURNING = {
    "turning by 0.2": (0.2, 0.0),
    "turning by 0.02": (0.02, 0.0),
    "turning by 0.02, noise 1": (0.02, 1.0),
    "turning by 0.002, noise 1": (0.002, 1.0),
}
NOISE_EXPONENT, ROUNDS_EXPONENT = "|exponent of noise - 1|", "|exponent of rounds - 0.475|"
GROWTH = "growth of regret over 16 times as many rounds, quadratic"
NOISY_TURN = "turning by 0.02, noise 1"

OGD, ADAGRAD, FTRL, HINDSIGHT, THEOREM = "gradient descent", "adagrad", "optimistic ftrl", "hindsight", "theorem"
OMD, OMD_CONVEX, ENSEMBLE = "mirror descent", "mirror descent, convex", "ensemble"
RIVALS = ((OMD_CONVEX, "one learner"), (OGD, "gradient descent"), (ADAGRAD, "AdaGrad"), (FTRL, "optimistic FTRL"))


def regret_of(condition: str) -> str:
    """Name the metric of a condition."""
    return f"{'dynamic regret' if condition in TURNING else 'regret'}, {condition}"


METRICS = (
    *(Metric(regret_of(name), "lower is better") for name in LINEAR),
    Metric(NOISE_EXPONENT, "lower is better"),
    Metric(ROUNDS_EXPONENT, "lower is better"),
    Metric(regret_of(CURVED), "lower is better"),
    Metric(GROWTH, "lower is better", "x"),
    *(Metric(regret_of(name), "lower is better") for name in TURNING),
)
UNKNOWN = dict.fromkeys((metric.name for metric in METRICS), math.nan)


@dataclasses.dataclass(frozen=True)
class Streams:
    """The streams of one cell by what their regret is measured against.

    Args:
        linear: Condition to linear losses.
        long: One law at each level of noise, over many rounds.
        curved: Quadratic losses whose minimiser alternates.
        turning: Condition to quadratic losses whose minimiser turns.
    """

    linear: dict[str, SEAStream]
    long: list[SEAStream]
    curved: SEAStream
    turning: dict[str, SEAStream]


def problem(source: Any, seed: int) -> Streams:
    """Draw the streams of a cell."""
    seeds = iter(range(100 * seed, 100 * seed + 100))

    def linear(block: int, noise: float, rounds: int = ROUNDS) -> SEAStream:
        return SEAStream.blocks(rounds, block=block, streams=STREAMS, dim=DIM, noise=noise, seed=next(seeds))

    return Streams(
        linear={
            **{name: linear(*condition) for name, condition in BLOCKS.items()},
            ALTERNATING: linear(1, 0.0),
            FIXED: linear(ROUNDS, 0.3),
            CORRUPTED: SEAStream.corrupted(ROUNDS, share=0.05, streams=STREAMS, dim=DIM, noise=0.3, seed=next(seeds)),
        },
        long=[linear(LONG, noise, LONG) for noise in LEVELS],
        curved=dataclasses.replace(linear(1, 0.3, LONG), quadratic=True),
        turning={
            name: SEAStream.rotating(TURNS, angle=angle, streams=STREAMS, dim=5, noise=noise, seed=next(seeds))
            for name, (angle, noise) in TURNING.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a learner may know of losses: how many rounds, a bound on gradients, and their curvature, if any."""

    rounds: int
    grad_bound: float
    curvature: float | None = None


class Learner(NamedTuple):
    """An online learner: how it begins at points, and how it steps from state to state."""

    begin: Callable[[Tensor], Any]
    step: Callable[[Any, Tensor], Any]


class Descent(NamedTuple):
    """The state of a baseline that takes gradient steps."""

    point: Tensor
    squares: Tensor
    largest: Tensor
    rounds: int


def descent(size: Callable[[Descent], Any]) -> Learner:
    """Build projected gradient descent from a rule for its step size."""

    def begin(point: Tensor) -> Descent:
        zero = point.new_zeros(point.shape[:-1])
        return Descent(point, zero, zero, 0)

    def step(state: Descent, gradient: Tensor) -> Descent:
        norm = torch.linalg.vector_norm(gradient, dim=-1)
        largest = torch.maximum(state.largest, norm)
        state = Descent(state.point, state.squares + norm.square(), largest, state.rounds + 1)
        eta = torch.as_tensor(size(state)).to(gradient)
        eta = eta if eta.dim() == 0 else eta[..., None]
        return state._replace(point=project_ball(state.point - eta * gradient, radius=DOMAIN.radius, dim=-1))

    return Learner(begin, step)


def gradient_descent(promise: Promise) -> Learner:
    """Build online gradient descent: D / (G sqrt t), or 1 / (lambda t) where losses are curved."""
    if (curvature := promise.curvature) is not None:
        return descent(lambda state: 1 / (curvature * state.rounds))
    return descent(lambda state: DIAMETER / (state.largest * math.sqrt(state.rounds)))


def adagrad_norm(promise: Promise) -> Learner:
    """Build AdaGrad with one step size: D over the root of twice the sum of squares."""
    return descent(lambda state: DIAMETER / (2 * state.squares).sqrt())


def optimistic_ftrl(promise: Promise) -> Learner:
    """Build optimistic follow-the-regularised-leader."""
    return Learner(FollowState.at, lambda state, g: optimistic_ftrl_step(state, g, diameter=DIAMETER, domain=DOMAIN))


def mirror_descent(promise: Promise) -> Learner:
    """Build optimistic mirror descent, told of the curvature where there is some."""
    return Learner(
        MirrorState.at,
        lambda state, g: optimistic_step(
            state, g, diameter=DIAMETER, domain=DOMAIN, strong_convexity=promise.curvature
        ),
    )


def convex_mirror_descent(promise: Promise) -> Learner:
    """Build optimistic mirror descent that knows of no curvature."""
    return mirror_descent(dataclasses.replace(promise, curvature=None))


def ensemble(promise: Promise) -> Learner:
    """Build the ensemble for moving comparators."""
    settings = {"smoothness": 1.0, "grad_bound": promise.grad_bound, "diameter": DIAMETER}
    sizes = ensemble_step_sizes(promise.rounds, **settings)
    return Learner(
        lambda point: EnsembleState.at(point, learners=len(sizes)),
        lambda state, g: ensemble_step(state, g, step_sizes=sizes, domain=DOMAIN, **settings),
    )


def play(learner: Learner, streams: list[SEAStream]) -> Tensor:
    """Play streams of equally many rounds at once; return the mean losses, ``(rounds, conditions, streams)``."""
    means = torch.stack([stream.means for stream in streams], 1)[:, :, None]
    noise = torch.stack([stream.noise for stream in streams], 1)
    quadratic = streams[0].quadratic
    state, losses = learner.begin(torch.zeros_like(noise[0])), []
    for mean, drawn in zip(means, noise, strict=True):
        x = state.point
        losses.append((x - mean).square().sum(-1) / 2 if quadratic else (x * mean).sum(-1))
        state = learner.step(state, x - mean - drawn if quadratic else mean + drawn)
    return torch.stack(losses)


def fixed_regret(stream: SEAStream, losses: Tensor, rounds: int) -> float:
    """Return the regret of so many first rounds to the best fixed point, averaged over streams."""
    first = dataclasses.replace(stream, means=stream.means[:rounds], noise=stream.noise[:rounds])
    zeros = torch.zeros(rounds, 1, stream.means.shape[1], dtype=losses.dtype)
    # The regret of resting at zero less its losses is minus those of the best point.
    best = first.mean_losses(zeros).sum() - first.regret(zeros, domain=DOMAIN)[0]
    return float(losses[:rounds].sum(0).mean() - best)


class PlayStreams:
    """Play all streams and measure regret; those of several cells in one computation.

    Args:
        make: Builds the learner from what may be known of the losses.
        only_turning: Whether to play no other streams than those whose best point turns.
    """

    def __init__(self, make: Callable[[Promise], Learner], *, only_turning: bool = False) -> None:
        self.make = make
        self.only_turning = only_turning

    def __call__(self, data: Streams, run: Run) -> Outcome:
        """Play one cell."""
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[Streams], runs: Sequence[Run]) -> list[Outcome]:
        """Play several cells."""
        found = [dict(UNKNOWN) for _ in datas]
        for noise in (0.0, 1.0):
            names = [name for name, (_, level) in TURNING.items() if level == noise]
            losses = self._play(Promise(TURNS, 1.8 + noise), [[data.turning[name] for name in names] for data in datas])
            for metrics, played in zip(found, losses, strict=True):
                # The minimiser lies in the ball, where its loss is 0.
                metrics |= {regret_of(name): float(played[:, i].sum(0).mean()) for i, name in enumerate(names)}
        if not self.only_turning:
            self._against_the_best_point(datas, found)
        return [Outcome(metrics) for metrics in found]

    def _play(self, promise: Promise, streams: list[list[SEAStream]]) -> list[Tensor]:
        losses = play(self.make(promise), [stream for each in streams for stream in each])
        return list(losses.split([len(each) for each in streams], dim=1))

    def _against_the_best_point(self, datas: Sequence[Streams], found: list[dict[str, float]]) -> None:
        linear = self._play(Promise(ROUNDS, 2.0), [list(data.linear.values()) for data in datas])
        long = self._play(Promise(LONG, 2.0), [data.long for data in datas])
        curved = self._play(Promise(LONG, 2.3, curvature=1.0), [[data.curved] for data in datas])
        for cell, (data, metrics) in enumerate(zip(datas, found, strict=True)):
            for i, (name, stream) in enumerate(data.linear.items()):
                metrics[regret_of(name)] = fixed_regret(stream, linear[cell][:, i], ROUNDS)
            by_level = [fixed_regret(stream, long[cell][:, i], LONG) for i, stream in enumerate(data.long)]
            by_rounds = [fixed_regret(data.long[-1], long[cell][:, -1], rounds) for rounds in PREFIXES]
            metrics[NOISE_EXPONENT] = abs(exponent(LEVELS, by_level) - 1)
            metrics[ROUNDS_EXPONENT] = abs(exponent(PREFIXES, by_rounds) - 0.475)
            early, late = (fixed_regret(data.curved, curved[cell][:, 0], rounds) for rounds in (PREFIXES[0], LONG))
            metrics |= {regret_of(CURVED): late, GROWTH: late / early}


def best_step_in_hindsight(data: Streams, run: Run) -> Outcome:
    """Play gradient descent with every constant step of a grid, and keep the best of each condition: nobody can."""
    steps = 2.0 ** torch.arange(-9, 3, dtype=torch.float64)[:, None, None]
    grid = descent(lambda state: steps)
    learner = Learner(lambda point: grid.begin(point.expand(len(steps), *point.shape)), grid.step)
    metrics = dict(UNKNOWN)
    losses = play(learner, list(data.linear.values()))
    for i, (name, stream) in enumerate(data.linear.items()):
        metrics[regret_of(name)] = min(fixed_regret(stream, losses[:, k, i], ROUNDS) for k in range(len(steps)))
    losses = play(learner, list(data.turning.values())).sum(0).mean(-1).amin(0)
    return Outcome(metrics | {regret_of(name): float(loss) for name, loss in zip(data.turning, losses, strict=True)})


def theorem(data: Streams, run: Run) -> Outcome:
    """Say what the theorem allows: 3/2 D sqrt(4 G^2 + E V_T) on linear losses, and the exponents 1 and nearly 1/2."""
    metrics = dict(UNKNOWN)
    for name, stream in data.linear.items():
        noise = stream.noise_level
        variation = 1 + noise**2 + float(stream.cumulative_variation) + 2 * (ROUNDS - 1) * noise**2
        metrics[regret_of(name)] = 1.5 * DIAMETER * math.sqrt(4 * (1 + noise) ** 2 + variation)
    return Outcome({**metrics, NOISE_EXPONENT: 0.0, ROUNDS_EXPONENT: 0.0})


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit the power of x that y grows with, by least squares of logarithms; NaN where y is not above zero."""
    if min(y) <= 0:
        return math.nan
    across, up = (torch.tensor(list(values), dtype=torch.float64).log() for values in (x, y))
    across = across - across.mean()
    return float(across @ up / (across @ across))


def _claims() -> tuple[Claim, ...]:
    def claim(contender: str, beats: str, condition: str, says: str, margin: float = 0.0) -> Claim:
        return Claim(contender, beats=beats, metric=regret_of(condition), margin=margin, says=says)

    blocks = [
        claim(OMD, rival, name, f"{name}: less regret than {words}")
        for name in BLOCKS
        for rival, words in ((FTRL, "optimistic FTRL"), (OGD, "gradient descent"), (ADAGRAD, "AdaGrad"))
    ]
    theory = [
        Claim(OMD, THEOREM, NOISE_EXPONENT, -0.1, "one law: regret grows with noise to a power within 0.1 of 1"),
        Claim(OMD, THEOREM, ROUNDS_EXPONENT, -0.025, "one law: regret grows with rounds to a power of 0.45 to 0.5"),
        *(claim(OMD, THEOREM, name, f"{name}: the theorem's bound holds") for name in (ALTERNATING, FIXED, CORRUPTED)),
    ]
    return (
        *blocks,
        claim(OMD, OGD, ALTERNATING, "the worst case for the hint costs at most a tenth more", margin=-8.8),
        *theory,
        claim(OMD, ADAGRAD, CORRUPTED, "a turned sign now and then: less regret than AdaGrad"),
        claim(OMD, OMD_CONVEX, CURVED, "quadratic: knowing the curvature helps"),
        claim(OMD, OGD, CURVED, "quadratic: less regret than gradient descent that knows the curvature"),
        Claim(OMD, OMD_CONVEX, GROWTH, 0.0, "quadratic: knowing the curvature slows the growth of regret"),
        *(
            claim(ENSEMBLE, rival, NOISY_TURN, f"drift and noise: the ensemble beats {words}")
            for rival, words in RIVALS
        ),
        claim(OMD_CONVEX, ENSEMBLE, "turning by 0.02", "drift without noise: one learner beats the ensemble"),
        claim(FTRL, OMD, FIXED, "one law: optimistic FTRL is the better choice"),
        claim(OGD, OMD, FIXED, "one law: gradient descent is the better choice"),
        claim(OMD, HINDSIGHT, "blocks of 20, noise 0.3", "blocks: as good as the best constant step in hindsight"),
        claim(ENSEMBLE, HINDSIGHT, NOISY_TURN, "drift and noise: as good as the best constant step in hindsight"),
    )


study = Study(
    method="optimistic-mirror-descent",
    problem=problem,
    contenders={
        OGD: PlayStreams(gradient_descent),
        ADAGRAD: PlayStreams(adagrad_norm),
        FTRL: PlayStreams(optimistic_ftrl),
        HINDSIGHT: best_step_in_hindsight,
        THEOREM: theorem,
        OMD: PlayStreams(mirror_descent),
        OMD_CONVEX: PlayStreams(convex_mirror_descent),
        ENSEMBLE: PlayStreams(ensemble, only_turning=True),
    },
    metrics=METRICS,
    claims=_claims(),
    seeds=5,
    about="Streams of losses with known noise and drift on the unit ball; regret of the mean losses to the best point.",
    notes=(
        "Nobody is told the bound on gradients but the ensemble; all others use the largest norm so far. The constant "
        "step in hindsight is chosen for each condition by the regret it had there, so it bounds what tuning could do. "
        "'Mirror descent' knows the curvature of the alternating quadratic losses, as does gradient descent; nobody is "
        "told that of the turning ones. Regret is below zero where a learner beats every fixed point."
    ),
)
