"""Do conservative reward ensembles keep the true reward from falling when their score is optimised hard?

A random network is the true (gold) reward of answers, which are points. Reward models learn it from noisy comparisons
of points drawn from a Gaussian, the policy; then their score is optimised by best-of-n and by PPO, and the gold reward
of what they choose is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bench import Claim, Metric, Outcome, Run, Study
from ..preferences import (
    RewardEnsemble,
    RewardHeads,
    best_of_n_curve,
    clipped_policy_loss,
    fit_reward_heads,
    generalized_advantages,
    kl_estimate,
)

DIM, PAIRS, PROMPTS, ANSWERS, MEMBERS = 16, 1000, 40, 2048, 5
NOISY, CLEAN = "25 % label noise", "no label noise"
FLIPPED = {NOISY: 0.25, CLEAN: 0.0}
# What 5 % of the answers to choose from are multiplied by; reward models saw none such.
TAIL, INSIDE, FAR = "5 % of answers unusual", "all answers usual", "5 % of answers far out"
STRETCH = {TAIL: 2.0, INSIDE: 1.0, FAR: 3.0}
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

KL_PENALTIES = (0.01, 0.2)
UPDATES, BATCH, PASSES, RATE, EVERY, MEASURED = 40, 256, 4, 0.02, 2, 512

BON_GRID, PPO_GRID = np.linspace(0, 5.9, 60), np.linspace(0, 30, 61)

NONE, SINGLE, LARGER, PENALIZED, MEAN = (
    "one answer",
    "single",
    "single, five times larger",
    "single, 20 x KL penalty",
    "mean",
)
WORST, UWO_HALF, UWO_TWO, UWO_FIVE = "worst case", "uncertainty 0.5", "uncertainty 2", "uncertainty 5"


def gold_of(regime: str, noise: str) -> str:
    """Name the metric of best-of-n's gold reward."""
    return f"gold, best of {SIZES[-1]}, {regime}, {noise}"


def fall_of(noise: str) -> str:
    """Name the metric of how much of its highest gold reward best-of-n loses again."""
    return f"fall from peak, best-of-n, {noise}"


def ppo_of(penalty: float, noise: str) -> str:
    """Name the metric of PPO's gold reward."""
    return f"gold, PPO, KL penalty {penalty}, {noise}"


def ppo_fall_of(noise: str) -> str:
    """Name the metric of how much of its highest gold reward PPO loses again at the smaller penalty."""
    return f"fall from peak, PPO, {noise}"


@dataclasses.dataclass(frozen=True)
class Gold:
    """The true reward: a random network of two hidden layers, less a penalty far from the centre.

    Args:
        weights: Of the three layers.
        center: Subtracted last, so that usual answers have mean 0.
        spread: Divided by, so that they have standard deviation 1.
    """

    weights: tuple[Tensor, ...]
    center: float = 0.0
    spread: float = 1.0

    def __call__(self, answers: Tensor) -> Tensor:
        """Score answers ``(*batch, dim)``."""
        first, second, last = self.weights
        hidden = ((answers @ first).tanh() @ second).tanh()
        distance = torch.linalg.vector_norm(answers, dim=-1)
        return (3 * (hidden @ last).squeeze(-1) - 0.5 * (distance - 5).clamp_min(0) - self.center) / self.spread


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What there is to learn from, to choose from and to measure by.

    Args:
        gold: The true reward.
        pairs: Name of the noise to chosen and rejected answers, each ``(pairs, dim)``.
        answers: Usual answers, ``(prompts, answers, dim)``.
        unusual: Which of them a regime may stretch, ``(prompts, answers)``.
        worth: Name of the regime to the gold reward of its answers, ``(prompts, answers)``.
    """

    gold: Gold
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    answers: Tensor
    unusual: Tensor
    worth: Mapping[str, Tensor]


# The contenders of a seed share its world and, below, its reward models: they are drawn and trained once.
@functools.lru_cache(maxsize=8)
def problem(source: Any, seed: int) -> World:
    """Draw a gold reward, comparisons by it, and answers to choose from; the conditions share their draws."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((DIM, 128), (128, 128), (128, 1))
    gold = Gold(tuple(1.5 / a**0.5 * torch.randn(a, b, generator=generator) for a, b in sizes))
    answers = torch.randn(PROMPTS, ANSWERS, DIM, generator=generator)
    scores = gold(answers)
    gold = Gold(gold.weights, float(scores.mean()), float(scores.std()))
    compared = torch.randn(2, PAIRS, DIM, generator=generator)
    first = gold(compared[0]) > gold(compared[1])
    luck = torch.rand(PAIRS, generator=generator)
    pairs = {}
    for noise, share in FLIPPED.items():
        said = (first ^ (luck < share))[:, None]
        chosen = torch.where(said, compared[0], compared[1])
        pairs[noise] = chosen, torch.where(said, compared[1], compared[0])
    unusual = torch.rand(PROMPTS, ANSWERS, generator=generator) < 0.05
    return World(gold, pairs, answers, unusual, in_regimes(gold, answers, unusual))


@torch.no_grad()
def in_regimes(score: Callable[[Tensor], Tensor], answers: Tensor, unusual: Tensor) -> dict[str, Tensor]:
    """Score the answers of every regime, ``(*members, prompts, answers)``; regimes differ in the unusual ones alone."""
    # In pieces that stay in the cache.
    usual = torch.cat([score(piece) for piece in answers.flatten(0, 1).split(4096)], -1)
    usual = usual.unflatten(-1, answers.shape[:2])
    found = {}
    for regime, factor in STRETCH.items():
        found[regime] = usual.clone()
        found[regime][..., unusual] = score(factor * answers[unusual])
    return found


@functools.lru_cache(maxsize=16)
def trained(data: World, noise: str, hidden: tuple[int, ...], run_seeds: tuple[int, int]) -> tuple[RewardHeads, float]:
    """Train five reward models, the same for every contender; the single ones are the members of the ensembles."""
    start = time.perf_counter()
    heads = RewardHeads(DIM, num_members=MEMBERS, hidden=hidden, seed=run_seeds[0])
    fit_reward_heads(heads, *data.pairs[noise], seed=run_seeds[1])
    return heads.requires_grad_(False), time.perf_counter() - start


class Reward:
    """Train reward models and optimise their score, by best-of-n and by PPO.

    Args:
        method: How five members are aggregated; None to use each alone and report their mean.
        penalty: lambda of the uncertainty-weighted aggregate.
        hidden: Widths of a reward model.
        kl_factor: What PPO's KL penalties are multiplied by; None for 1. Best-of-n, which knows none, is left out.
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        penalty: float = 0.5,
        hidden: tuple[int, ...] = (64, 64),
        kl_factor: float | None = None,
    ) -> None:
        self.method, self.penalty, self.hidden, self.kl_factor = method, penalty, hidden, kl_factor

    def __call__(self, data: World, run: Run) -> Outcome:
        """Run one cell under every condition."""
        metrics: dict[str, float] = {}
        curves: dict[str, list[float]] = {}
        start, training = time.perf_counter(), 0.0
        for noise, (chosen, rejected) in data.pairs.items():
            before = time.perf_counter()
            heads, seconds = trained(data, noise, self.hidden, (run.stream("weights"), run.stream("orders")))
            training += seconds - (time.perf_counter() - before)
            method: Any = self.method or "mean"
            reward = RewardEnsemble(heads, method=method, penalty=self.penalty).fit_scale(torch.cat([chosen, rejected]))
            if self.kl_factor is None:
                self._best_of_n(reward, data, noise, metrics, curves)
            self._ppo(reward, data.gold, run.stream("policy"), noise, metrics, curves)
        return Outcome(metrics, curves, seconds=time.perf_counter() - start + training)

    def _best_of_n(
        self, reward: RewardEnsemble, data: World, noise: str, metrics: dict[str, float], curves: dict[str, list[float]]
    ) -> None:
        score = reward.scores if self.method is None else reward
        for regime, proxy in in_regimes(score, data.answers, data.unusual).items():
            worth = data.worth[regime].expand_as(proxy)
            curve = best_of_n_curve(proxy, worth, SIZES)
            gold = curve.gold
            metrics[gold_of(regime, noise)] = float(gold[-1])
            for name, values in (("gold", gold), ("proxy", curve.proxy)):
                drawn = np.interp(BON_GRID, curve.kl.numpy(), values.numpy())
                curves[f"{name} by KL from 0 to 5.9, best-of-n, {regime}, {noise}"] = drawn.tolist()
            if regime == TAIL:
                metrics[fall_of(noise)] = float(1 - gold[-1] / gold.max())

    def _ppo(
        self,
        reward: RewardEnsemble,
        gold: Gold,
        seed: int,
        noise: str,
        metrics: dict[str, float],
        curves: dict[str, list[float]],
    ) -> None:
        def alone(x: Tensor) -> Tensor:
            scores = reward.members.each(x.flatten(1, 2)).unflatten(1, x.shape[1:3])  # type: ignore[union-attr, operator]
            return (scores - reward.center[:, None, None]) / reward.spread[:, None, None]

        score: Callable[[Tensor], Tensor] = alone if self.method is None else reward
        policies = MEMBERS if self.method is None else 1
        kl, proxies, golds = train_policies(
            score, gold, policies, torch.tensor(KL_PENALTIES) * (self.kl_factor or 1.0), seed
        )
        for number, penalty in enumerate(KL_PENALTIES):
            metrics[ppo_of(penalty, noise)] = float(golds[-1, number])
        metrics[ppo_fall_of(noise)] = float(1 - golds[-1, 0] / golds[:, 0].max())
        for number, penalty in enumerate(KL_PENALTIES):
            for name, values in (("gold", golds), ("proxy", proxies)):
                # A penalised policy ends by wandering about its optimum: its divergence so far is what it has cost.
                reached = kl[:, number].cummax(0).values.numpy()
                drawn = np.interp(PPO_GRID[reached[-1] >= PPO_GRID], reached, values[:, number].numpy())
                curves[f"{name} by KL from 0 to 30, PPO, KL penalty {penalty}, {noise}"] = drawn.tolist()


def train_policies(
    score: Callable[[Tensor], Tensor], gold: Gold, policies: int, penalties: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Move Gaussian policies N(m, I) from m = 0 by PPO, one for each penalty and each of ``policies`` rewards.

    Args:
        score: From answers ``(policies, penalties, batch, dim)`` to proxy rewards without the last dimension.
        gold: The true reward.
        policies: How many.
        penalties: Weights of the KL divergence.
        seed: Decides what is drawn.

    Returns:
        Divergence, proxy and gold reward over training, each ``(measured, penalties)``, means over policies.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(policies, len(penalties), 1, DIM, requires_grad=True)
    optimizer = torch.optim.Adam([means], lr=RATE)
    measured = torch.randn(MEASURED, DIM, generator=generator)
    history = []

    def log_density(x: Tensor, mean: Tensor | float) -> Tensor:
        return -(x - mean).square().sum(-1) / 2

    for update in range(UPDATES + 1):
        with torch.no_grad():
            if update % EVERY == 0:
                x = means + measured
                kl = means.square().sum(-1)[..., 0] / 2
                history.append(torch.stack([kl, score(x).mean(-1), gold(x).mean(-1)]).mean(1))
            x = means + torch.randn(policies, 1, BATCH, DIM, generator=generator)
            old = log_density(x, means)
            rewards = score(x) - penalties[:, None] * kl_estimate(old, log_density(x, 0.0))
            baseline = rewards.mean(-1, keepdim=True).expand_as(rewards)
            # An answer is one step long.
            advantages = generalized_advantages(rewards[..., None], baseline[..., None])[..., 0]
            advantages = advantages / advantages.std(-1, keepdim=True)
        for _ in range(PASSES):
            loss = clipped_policy_loss(log_density(x, means), old, advantages).mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    kl, proxy, worth = torch.stack(history).unbind(1)
    return kl, proxy, worth


def one_answer(data: World, run: Run) -> Outcome:
    """Optimise nothing: take one answer of the policy."""
    metrics: dict[str, float] = {}
    for noise in FLIPPED:
        metrics |= {gold_of(regime, noise): float(data.worth[regime].mean()) for regime in STRETCH}
        metrics |= {ppo_of(penalty, noise): float(data.worth[INSIDE].mean()) for penalty in KL_PENALTIES}
    return Outcome(metrics)


def _claim(contender: str, beats: str, metric: str, margin: float, says: str) -> Claim:
    return Claim(contender, beats=beats, metric=metric, margin=margin, says=says)


study = Study(
    method="reward-ensembles",
    problem=problem,
    contenders={
        SINGLE: Reward(),
        NONE: one_answer,
        LARGER: Reward(hidden=(152, 152)),
        PENALIZED: Reward(kl_factor=20),
        MEAN: Reward("mean"),
        WORST: Reward("worst-case"),
        UWO_HALF: Reward("uncertainty-weighted", penalty=0.5),
        UWO_TWO: Reward("uncertainty-weighted", penalty=2.0),
        UWO_FIVE: Reward("uncertainty-weighted", penalty=5.0),
    },
    metrics=(
        *(Metric(gold_of(regime, noise)) for noise in FLIPPED for regime in STRETCH),
        *(Metric(fall_of(noise), "lower is better", "%") for noise in FLIPPED),
        *(Metric(ppo_of(penalty, noise)) for noise in FLIPPED for penalty in KL_PENALTIES),
        *(Metric(ppo_fall_of(noise), "lower is better", "%") for noise in FLIPPED),
    ),
    claims=(
        _claim(
            WORST,
            SINGLE,
            gold_of(TAIL, NOISY),
            0.1,
            "where a few answers are unusual and labels noisy, the worst case beats one reward model at large n",
        ),
        _claim(UWO_TWO, SINGLE, gold_of(TAIL, NOISY), 0.1, "and so does the uncertainty-weighted reward"),
        _claim(
            WORST, SINGLE, fall_of(NOISY), 0.1, "the worst case falls from its peak by 10 points less than one model"
        ),
        _claim(MEAN, SINGLE, gold_of(TAIL, NOISY), 0.0, "unusual answers, noise: the mean beats one model"),
        _claim(WORST, MEAN, gold_of(TAIL, NOISY), 0.0, "unusual answers, noise: the worst case beats the mean"),
        _claim(UWO_TWO, WORST, gold_of(TAIL, NOISY), 0.0, "unusual answers, noise: uncertainty 2 beats the worst case"),
        _claim(WORST, LARGER, gold_of(TAIL, NOISY), 0.0, "unusual answers, noise: and one model as large as five"),
        _claim(WORST, SINGLE, gold_of(TAIL, CLEAN), 0.1, "unusual answers, clean labels: it beats one model"),
        _claim(WORST, SINGLE, gold_of(INSIDE, NOISY), 0.1, "usual answers, noise: the worst case beats one model"),
        _claim(WORST, MEAN, gold_of(INSIDE, NOISY), 0.0, "usual answers, noise: the worst case beats the mean"),
        _claim(WORST, SINGLE, gold_of(INSIDE, CLEAN), 0.1, "usual answers, clean labels: it beats one model"),
        _claim(WORST, NONE, gold_of(FAR, NOISY), 0.0, "answers far out, noise: the worst case beats not choosing"),
        _claim(UWO_TWO, NONE, gold_of(FAR, NOISY), 0.0, "answers far out, noise: so does uncertainty 2"),
        _claim(WORST, SINGLE, ppo_fall_of(NOISY), 0.0, "PPO with a KL penalty of 0.01: the worst case falls less"),
        _claim(
            WORST,
            PENALIZED,
            ppo_of(KL_PENALTIES[0], NOISY),
            0.0,
            "PPO: the worst case needs less of a KL penalty than one model, by a factor of 20",
        ),
        _claim(
            WORST,
            SINGLE,
            ppo_of(KL_PENALTIES[1], NOISY),
            0.0,
            "PPO with a KL penalty of 0.2: the worst case beats one model",
        ),
        _claim(
            UWO_TWO, SINGLE, ppo_of(KL_PENALTIES[1], NOISY), 0.0, "PPO with a KL penalty of 0.2: so does uncertainty 2"
        ),
        _claim(
            UWO_TWO,
            MEAN,
            ppo_of(KL_PENALTIES[1], NOISY),
            0.0,
            "PPO with a KL penalty of 0.2: uncertainty 2 beats the mean",
        ),
    ),
    seeds=8,
    about=(
        "A random network rewards points in 16 dimensions; five small reward models learn it from 1000 comparisons. "
        "Best of up to 1024 among 2048 answers to each of 40 prompts, and PPO of a Gaussian policy."
    ),
    notes=(
        "Gold rewards are in standard deviations of the policy's answers. A single model is one of the five members; "
        "its numbers are means over all five used alone, so that no luck of the draw counts. Nothing is tuned: all are "
        "trained alike, and lambda is shown at three values. Unusual answers are stretched by 2, those far out by 3; "
        "no reward model saw either. The policy of PPO is free to leave the training data as far as it likes, which a "
        "language model is not; with a KL penalty of 0.01 it does. Curves are over the divergence from the policy, in "
        "even steps. None of the paper's figures, which are of language models, is reproduced."
    ),
)
