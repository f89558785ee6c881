"""Do multipliers that hold each reward at its proxy point keep quality from falling, where fixed weights let it fall?

A policy over 200 responses is trained by PPO against two correlated reward models. Its true quality is highest at one
level of each reward and falls beyond:

    gold = 1 - sum over rewards of ((value - proxy point) / 0.25)^2 - 0.02 KL(policy || reference).

Everybody may have the gold of 11 runs of 200 iterations, with 11 pairs of weights, evaluated every 5 iterations: fixed
weights choose the best of these runs, multipliers read their thresholds from them. Then training goes on to 600.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..bench import Claim, Metric, Outcome, Run, Study
from ..preferences import (
    RewardMultipliers,
    ThresholdSearch,
    clipped_policy_loss,
    kl_estimate,
    proxy_point,
)
from ..preferences.constrained_rlhf import Kind

RESPONSES, SAMPLES, EPOCHS, RATE = 200, 128, 2, 0.02
TUNED, TRAINED, SEARCHED, WATCH = 200, 600, 1200, 5
KL_WEIGHT, DAMPING = 0.2, 5.0
PROXIES = (0.7, 0.6)
UNRELATED, TWO, ALIKE, ONE = "correlation 0", "two rewards", "correlation 0.9", "one reward"
EVERY = (UNRELATED, ALIKE, ONE)
GAMES = {TWO: 0.5, UNRELATED: 0.0, ALIKE: 0.9, ONE: 0.0}
WEIGHTS = torch.stack([torch.linspace(0, 1, 11), 1 - torch.linspace(0, 1, 11)])
KL_WEIGHTS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)

END, THIRD, LOST, DIVERGENCE = "gold at the end", "gold after a third", "gold lost since its best", "KL at the end"
ITERATIONS, QUERIES = "iterations, tuning included", "evaluations asked for"
GOLD = {UNRELATED: "gold, correlation 0", ALIKE: "gold, correlation 0.9", ONE: "gold, one reward"}


@dataclasses.dataclass(frozen=True)
class Game:
    """Responses, what the reward models say of them, and where quality peaks.

    Args:
        rewards: ``(rewards, responses)`` in (0, 1); the reference is uniform.
        proxies: ``(rewards,)``, unknown to the contenders.
    """

    rewards: Tensor
    proxies: Tensor

    def values(self, logp: Tensor) -> Tensor:
        """Return the mean rewards of policies ``(runs, responses)``: ``(runs, rewards)``."""
        return logp.exp() @ self.rewards.T

    def divergence(self, logp: Tensor) -> Tensor:
        """Return KL(policy || reference) of policies ``(runs, responses)``."""
        return (logp.exp() * (logp - self.reference)).sum(1)

    def gold(self, logp: Tensor) -> Tensor:
        """Return the true quality of policies ``(runs, responses)``."""
        away = (self.values(logp) - self.proxies) / 0.25
        return 1 - away.square().sum(1) - 0.02 * self.divergence(logp)

    @property
    def reference(self) -> Tensor:
        """The reference policy's log-probabilities."""
        return torch.full((self.rewards.shape[1],), 1 / self.rewards.shape[1]).log()


def problem(source: Any, seed: int) -> dict[str, Game]:
    """Draw the responses; games differ in how the two rewards are correlated, and one has a single reward."""
    draw = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, RESPONSES, generator=draw)
    games = {}
    for name, correlation in GAMES.items():
        quality = torch.stack([first, correlation * first + (1 - correlation**2) ** 0.5 * second])
        count = 1 if name == ONE else 2
        games[name] = Game((1.5 * quality[:count]).sigmoid(), torch.tensor(PROXIES[:count]))
    return games


class Weighing(Protocol):
    """How the advantages of several runs are mixed, and what is learnt from the rewards."""

    def mix(self, rewards: Tensor, kl_rewards: Tensor) -> Tensor:
        """Mix ``(rewards, runs, samples)`` and ``(runs, samples)`` into advantages ``(runs, samples)``."""
        ...

    def update(self, values: Tensor) -> None:
        """See the mean rewards ``(rewards, runs)`` of the samples."""
        ...


class FixedWeights:
    """PPO that mixes as the constrained methods do: each advantage normalised by itself, one pair of weights a run."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def mix(self, rewards: Tensor, kl_rewards: Tensor) -> Tensor:
        """Mix with the weights of each run."""
        return (self.weights[..., None] * _normalized(rewards)).sum(0) + KL_WEIGHT * _normalized(kl_rewards)

    def update(self, values: Tensor) -> None:
        """Learn nothing."""


class FixedSum(FixedWeights):
    """PPO as it is customary: rewards are added up, with a share of the divergence, and their sum is normalised."""

    def __init__(self, weights: Tensor, kl_weights: Tensor) -> None:
        super().__init__(weights)
        self.kl_weights = kl_weights

    def mix(self, rewards: Tensor, kl_rewards: Tensor) -> Tensor:
        """Add up, and bring the sum to mean 0 and standard deviation 1."""
        return _normalized((self.weights[..., None] * rewards).sum(0) + self.kl_weights[:, None] * kl_rewards)


def _normalized(advantages: Tensor) -> Tensor:
    """Bring the samples of each run to mean 0 and standard deviation 1."""
    # At first the policy is the reference, and no sample has any divergence to it.
    spread = advantages.std(-1, keepdim=True).clamp_min(1e-6)
    return (advantages - advantages.mean(-1, keepdim=True)) / spread


class Satisficing(FixedWeights):
    """PPO-SAT: each sample is to have the rewards of the thresholds."""

    def __init__(self, thresholds: Tensor) -> None:
        super().__init__(torch.ones(1, 1))
        self.thresholds = thresholds

    def mix(self, rewards: Tensor, kl_rewards: Tensor) -> Tensor:
        """Reward the negative squared distance to the thresholds."""
        away = rewards - self.thresholds[:, None, None]
        return super().mix(-away.square().sum(0, keepdim=True), kl_rewards)


class Constrained:
    """Multipliers, one :class:`RewardMultipliers` a run."""

    def __init__(self, multipliers: list[RewardMultipliers]) -> None:
        self.multipliers = multipliers

    def mix(self, rewards: Tensor, kl_rewards: Tensor) -> Tensor:
        """Mix with the multipliers of each run."""
        runs = zip(self.multipliers, rewards.unbind(1), kl_rewards, strict=True)
        return torch.stack([each(r, kl) for each, r, kl in runs])

    def update(self, values: Tensor) -> None:
        """Move the multipliers of each run."""
        for each, seen in zip(self.multipliers, values.T, strict=True):
            each.update(seen)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was seen every five iterations.

    Args:
        gold: ``(looks, runs)``.
        values: ``(looks, runs, rewards)``.
        divergence: Of the last policies, ``(runs,)``.
    """

    gold: Tensor
    values: Tensor
    divergence: Tensor

    def after(self, iterations: int) -> Tensor:
        """Return the gold of each run after so many iterations."""
        return self.gold[iterations // WATCH]

    def best(self, iterations: int) -> int:
        """Return the run of highest gold after so many iterations."""
        return int(self.after(iterations).argmax())

    def points(self) -> tuple[Tensor, Tensor]:
        """Return the values and the gold of all policies seen."""
        return self.values.flatten(0, 1), self.gold.flatten()


def train(
    game: Game,
    weighing: Weighing,
    seed: int,
    *,
    runs: int = 1,
    iterations: int = TRAINED,
    look: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Trace:
    """Train policies by PPO, several runs side by side, each on samples of its own.

    Args:
        game: What they are rewarded by.
        weighing: How rewards are weighed.
        seed: Of the samples.
        runs: How many.
        iterations: Rounds of sampling; each is followed by two epochs over all samples.
        look: Called every five iterations with their number, the values and the gold of the runs.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = torch.zeros(runs, RESPONSES, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    gold, values = [], []
    for iteration in range(iterations + 1):
        with torch.no_grad():
            logp = logits.log_softmax(1)
            if iteration % WATCH == 0:
                gold.append(game.gold(logp))
                values.append(game.values(logp))
                if look is not None:
                    look(iteration, values[-1], gold[-1])
            if iteration == iterations:
                break
            actions = torch.multinomial(logp.exp(), SAMPLES, replacement=True, generator=draw)
            old_logp = logp.gather(1, actions)
            rewards = game.rewards[:, actions]
            advantages = weighing.mix(rewards, -kl_estimate(old_logp, game.reference[actions]))
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            taken = logits.log_softmax(1).gather(1, actions)
            clipped_policy_loss(taken, old_logp, advantages).mean(1).sum().backward()
            optimizer.step()
            weighing.update(rewards.mean(2))
    return Trace(torch.stack(gold), torch.stack(values), game.divergence(logp))


def tuning_runs(game: Game, run: Run, *, iterations: int = TUNED) -> tuple[Trace, Tensor]:
    """Train once with each pair of fixed weights, or once with one reward; return the trace and the weights."""
    weights = WEIGHTS if len(game.rewards) == 2 else torch.ones(1, 1)
    return train(
        game, FixedWeights(weights), run.stream("tuning"), runs=weights.shape[1], iterations=iterations
    ), weights


def points_together(game: Game, run: Run) -> Tensor:
    """Read the proxy points from runs that reach for both rewards with several weights."""
    return proxy_point(*tuning_runs(game, run)[0].points(), bandwidth=0.1)


def points_one_by_one(game: Game, run: Run) -> Tensor:
    """Read each proxy point from a run that reaches for its reward alone."""
    count = len(game.rewards)
    trace = train(game, FixedWeights(torch.eye(count)), run.stream("tuning"), runs=count, iterations=TUNED)
    return torch.stack(
        [proxy_point(trace.values[:, each, each, None], trace.gold[:, each], bandwidth=0.1)[0] for each in range(count)]
    )


def points_given(game: Game, run: Run) -> Tensor:
    """Return the true ones."""
    return game.proxies


class WithFixedWeights:
    """Choose the best of many runs with fixed weights after a third of the training, and go on with it.

    Args:
        kl_weights: Weights of the divergence that are tried with each pair, for the customary sum; None for the
            paper's mixture with one weight.
    """

    def __init__(self, kl_weights: tuple[float, ...] | None = None) -> None:
        self.kl_weights = kl_weights

    def __call__(self, data: Mapping[str, Game], run: Run) -> Outcome:
        """Train and measure one cell."""
        trace, runs = self._train(data[TWO], run)
        best = trace.best(TUNED)
        other, _ = self._train(data[ONE], run)
        extra = {GOLD[ONE]: float(other.gold[-1, other.best(TUNED)])}
        return outcome(trace, best, tuning=runs * TUNED - TUNED, queries=runs, extra=extra)

    def _train(self, game: Game, run: Run) -> tuple[Trace, int]:
        if self.kl_weights is None:
            trace, weights = tuning_runs(game, run, iterations=TRAINED)
            return trace, weights.shape[1]
        weights = WEIGHTS if len(game.rewards) == 2 else torch.ones(1, 1)
        pairs = weights.repeat_interleave(len(self.kl_weights), dim=1)
        shares = torch.tensor(self.kl_weights).repeat(weights.shape[1])
        trace = train(game, FixedSum(pairs, shares), run.stream("tuning"), runs=len(shares))
        return trace, len(shares)


class StoppedEarly:
    """Keep the best policy that the tuning runs with fixed weights went through."""

    def __call__(self, data: Mapping[str, Game], run: Run) -> Outcome:
        """Train and measure one cell."""
        trace, weights = tuning_runs(data[TWO], run)
        extra = {GOLD[ONE]: float(tuning_runs(data[ONE], run)[0].gold.max())}
        best = float(trace.gold.max())
        metrics = {END: best, THIRD: best, LOST: 0.0, ITERATIONS: float(TUNED * weights.shape[1])}
        return Outcome({**metrics, QUERIES: float(trace.gold.numel()), **extra})


class WithThresholds:
    """Train towards thresholds.

    Args:
        build: Makes the weighing from the thresholds.
        find: Finds the thresholds in a game.
        scale: What they are multiplied by.
        games: In which games, beside the one with two rewards.
    """

    def __init__(
        self,
        build: Callable[[Tensor], Weighing],
        *,
        find: Callable[[Game, Run], Tensor] = points_together,
        scale: float = 1.0,
        games: tuple[str, ...] = (),
    ) -> None:
        self.build, self.find, self.scale, self.games = build, find, scale, games

    def __call__(self, data: Mapping[str, Game], run: Run) -> Outcome:
        """Train and measure one cell."""
        traces = {}
        for name in (TWO, *self.games):
            game = data[name]
            thresholds = self.scale * self.find(game, run)
            traces[name] = train(game, self.build(thresholds), run.stream("samples"))
        runs = 0 if self.find is points_given else 2 if self.find is points_one_by_one else WEIGHTS.shape[1]
        extra = {GOLD[name]: float(traces[name].gold[-1]) for name in self.games}
        return outcome(traces[TWO], 0, tuning=runs * TUNED, queries=runs * (TUNED // WATCH + 1), extra=extra)


class SearchedThresholds:
    """Search the thresholds by Nelder and Mead within one run, from nothing.

    Args:
        damping: Of the multipliers; 0 is the paper's.
    """

    def __init__(self, damping: float = 0.0) -> None:
        self.damping = damping

    def __call__(self, data: Mapping[str, Game], run: Run) -> Outcome:
        """Train and measure one cell; the last fifth goes to the best thresholds found."""
        game = data[TWO]
        draw = torch.Generator().manual_seed(run.stream("simplex"))
        search = ThresholdSearch(torch.tensor([[0.5, 0.9], [0.5, 0.9]]), generator=draw, tolerance=0.01)
        multipliers = RewardMultipliers(search.ask(), damping=self.damping)
        asked_at = 0

        def look(iteration: int, values: Tensor, gold: Tensor) -> None:
            nonlocal asked_at
            if iteration >= 0.8 * SEARCHED or search.status is not None:
                multipliers.set_thresholds(search.best)
            elif multipliers.reached(values[0]) or iteration - asked_at >= SEARCHED // 10:
                search.tell(float(gold[0]))
                multipliers.set_thresholds(search.ask())
                asked_at = iteration

        trace = train(game, Constrained([multipliers]), run.stream("samples"), iterations=SEARCHED, look=look)
        return outcome(trace, 0, tuning=SEARCHED - TRAINED, queries=search.evaluations)


class GridOfThresholds:
    """Train ten full runs towards thresholds drawn from the box of the search, and keep the best."""

    def __call__(self, data: Mapping[str, Game], run: Run) -> Outcome:
        """Train and measure one cell."""
        draw = torch.Generator().manual_seed(run.stream("simplex"))
        thresholds = 0.5 + 0.4 * torch.rand(10, 2, generator=draw)
        weighing = Constrained([RewardMultipliers(each) for each in thresholds])
        trace = train(data[TWO], weighing, run.stream("samples"), runs=10)
        return outcome(trace, trace.best(TRAINED), tuning=9 * TRAINED, queries=10)


def outcome(
    trace: Trace, place: int, *, tuning: int, queries: int, extra: Mapping[str, float] | None = None
) -> Outcome:
    """Measure one of the runs of a trace."""
    gold = trace.gold[:, place]
    metrics = {
        END: float(gold[-1]),
        THIRD: float(gold[TUNED // WATCH]),
        LOST: float(gold.max() - gold[-1]),
        DIVERGENCE: float(trace.divergence[place]),
        ITERATIONS: float(tuning + TRAINED),
        QUERIES: float(queries),
    }
    return Outcome({**metrics, **(extra or {})}, {"gold": gold[::4].tolist()})


def constrained(kind: Kind, *, damping: float = 0.0) -> Callable[[Tensor], Weighing]:
    """Build the multipliers of one run, with the defaults of the paper."""
    return lambda thresholds: Constrained([RewardMultipliers(thresholds, kind=kind, damping=damping)])


def _claim(contender: str, beats: str, metric: str, margin: float, says: str) -> Claim:
    return Claim(contender, beats=beats, metric=metric, margin=margin, says=says)


study = Study(
    method="constrained-rlhf",
    problem=problem,
    contenders={
        "ppo": WithFixedWeights((KL_WEIGHT,)),
        "ppo, mixed": WithFixedWeights(),
        "ppo, KL tuned": WithFixedWeights(KL_WEIGHTS),
        "ppo, stopped early": StoppedEarly(),
        "ppo-sat": WithThresholds(Satisficing),
        "all": WithThresholds(constrained("at most")),
        "mu": WithThresholds(constrained("at least")),
        "xi": WithThresholds(constrained("exactly"), games=EVERY),
        "xi, damped": WithThresholds(constrained("exactly", damping=DAMPING), games=EVERY),
        "xi, true points": WithThresholds(constrained("exactly"), find=points_given),
        "xi, points one by one": WithThresholds(constrained("exactly"), find=points_one_by_one, games=EVERY),
        "xi, damped, points one by one": WithThresholds(
            constrained("exactly", damping=DAMPING), find=points_one_by_one, games=EVERY
        ),
        "xi, 10 % high": WithThresholds(constrained("exactly"), scale=1.1),
        "xi, 10 % low": WithThresholds(constrained("exactly"), scale=0.9),
        "xi, grid": GridOfThresholds(),
        "xi, searched": SearchedThresholds(),
        "xi, damped, searched": SearchedThresholds(DAMPING),
    },
    metrics=(
        Metric(END, "higher is better"),
        Metric(THIRD, "higher is better"),
        Metric(LOST, "lower is better"),
        Metric(DIVERGENCE, "lower is better", "nats"),
        Metric(ITERATIONS, "lower is better"),
        Metric(QUERIES, "lower is better"),
        *(Metric(name, "higher is better") for name in GOLD.values()),
    ),
    claims=(
        _claim("xi", "ppo", END, 0.0, "after long training xi has more gold than the best of 11 fixed weights"),
        _claim("mu", "ppo", END, 0.0, "after long training mu has more gold than the best of 11 fixed weights"),
        _claim("all", "ppo", END, 0.0, "after long training all has more gold than the best of 11 fixed weights"),
        _claim("xi", "ppo, mixed", END, 0.5, "more than 0.5 above fixed weights that mix advantages as xi does"),
        _claim("xi", "ppo", LOST, 0.0, "trained three times as long, xi is closer to its best than fixed weights"),
        _claim("xi", "ppo, mixed", LOST, 0.5, "and by more than 0.5 closer than fixed weights that mix as xi does"),
        _claim("xi", "ppo-sat", END, 0.0, "xi ends with more gold than PPO-SAT"),
        _claim("xi", "ppo-sat", DIVERGENCE, 3.0, "xi stays more than 3 nats closer to the reference than PPO-SAT"),
        _claim("xi", "mu", END, -0.05, "xi ends at most 0.05 of gold below mu"),
        _claim("xi", "xi, true points", END, -0.05, "points read from runs cost at most 0.05 of gold"),
        _claim("xi", "xi, 10 % high", END, 0.0, "thresholds 10 % too high do worse"),
        _claim("xi", "xi, 10 % low", END, 0.0, "thresholds 10 % too low do worse"),
        _claim("xi", "xi, points one by one", END, 0.0, "points found together do better than one by one"),
        _claim("xi", "xi, points one by one", GOLD[ALIKE], 0.0, "the same, at correlation 0.9"),
        _claim("xi", "xi, points one by one", GOLD[UNRELATED], -0.05, "at correlation 0 they are as good (0.05)"),
        _claim(
            "xi, damped",
            "xi, damped, points one by one",
            END,
            0.0,
            "points found together do better, both damped (ours)",
        ),
        _claim(
            "xi, searched", "xi, grid", END, -0.05, "a search in one run ends at most 0.05 below the best of ten runs"
        ),
        _claim("xi, searched", "xi, grid", ITERATIONS, 1000.0, "and takes more than 1000 iterations less"),
        _claim("xi, damped, searched", "xi, grid", END, -0.05, "the same search with damped multipliers (ours)"),
        _claim("xi, damped", "xi", END, 0.0, "damping (ours) ends with more gold"),
        _claim("xi, damped", "xi", THIRD, 0.0, "damping (ours) has more gold after a third of the training"),
        _claim(
            "xi", "ppo, KL tuned", END, 0.0, "xi beats PPO whose weight of the divergence was tuned as well, 88 runs"
        ),
        _claim("xi", "ppo, stopped early", END, 0.0, "xi beats the best policy that the tuning runs went through"),
        _claim("xi", "ppo, KL tuned", GOLD[ONE], 0.0, "with one reward xi beats PPO with a tuned divergence"),
    ),
    seeds=5,
    about="PPO on 200 responses with two correlated reward models, whose gold reward peaks at one level of each.",
    notes=(
        "An episode is one response, so there is no critic: normalised advantages leave nothing for one. Gold and "
        "values are exact, not sampled, where they are measured or queried; training sees 128 samples an iteration. "
        "ppo adds up raw rewards and 0.2 of the divergence, the released code's coefficient, as is customary; ppo, KL "
        "tuned does too, and chooses among 11 pairs of weights and 8 weights of the divergence; ppo, mixed and ppo-sat "
        "normalise each advantage before mixing, as the constrained methods do, with 0.2 for the divergence. mu and xi "
        "have the released step, momentum and norm, untuned; all has 0.2 for the divergence, "
        "the coefficient of its paper being unknown. Thresholds are drawn from [0.5, 0.9] by the grid and the search. "
        "The search asks for other thresholds when all values are within 5 % or after 120 iterations, and trains the "
        "last fifth towards the best. Language models and the paper's figures are not reproduced."
    ),
)
