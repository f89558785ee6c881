"""Logs of graded quality, made once by training in an environment and kept as Minari data sets."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..caching import user_cache
from .environments import Environment, make_environment
from .minari_data import OfflineData, read_minari, write_minari
from .online_td3 import OnlineRun, train_online
from .saved_policy import Policy
from .transitions import Transitions

QUALITIES = ("random", "medium", "expert", "medium-replay", "medium-expert", "random-expert")
# Part of the name, so that a change of what follows makes new sets.
_VERSION = "v0"
_TRANSITIONS = 20_000
_SEED = 0
# Of the noise on a behaviour policy's actions, in units of half their range.
_EXPLORATION = 0.1


def behaviour_data(
    environment: str = "Pendulum-v1",
    quality: str = "random-expert",
    *,
    transitions: int = _TRANSITIONS,
    rounds: int = 40,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OfflineData:
    """Return a log of behaviour of some quality, made on first use and kept.

    A policy is trained in the environment by TD3 (:func:`train_online`). Its best snapshot is the expert, that
    whose score is nearest to halfway from chance the medium one.

    Args:
        environment: Gymnasium id, with continuous actions.
        quality: ``"random"``: uniform actions. ``"medium"``, ``"expert"``: that snapshot with noise of deviation 0.1.
            ``"medium-replay"``: all that was lived until the medium snapshot. ``"medium-expert"``: half of each.
            ``"random-expert"``: 19 transitions of chance for each of the expert.
        transitions: Least number of transitions, whole episodes; ``"medium-replay"`` has what there was.
        rounds: Of training.
        cache: Folder of the data sets; None for minimand's folder in the user's cache.
        progress: Told rounds of training done and in all; not called when the set is there.

    Returns:
        The log with its environment, bounds of actions and reference scores.

    Raises:
        ImportError: If the extra ``policies``, or what the environment runs on, is not installed.
        ValueError: If the quality or the environment is unknown.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = behaviour_data(quality="random", transitions=200, rounds=5, cache=folder)
        >>> data.environment, len(data.transitions)
        ('Pendulum-v1', 200)

    Source: The kinds of data of J. Fu et al., "D4RL: datasets for deep data-driven reinforcement learning" (2020,
    arXiv 2004.07219), appendix; "random-expert" is ours.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    if transitions < 1:
        raise ValueError(f"transitions must be at least 1, got {transitions}")
    root = pathlib.Path(cache) if cache is not None else user_cache() / "minari"
    folder = root / environment / f"{transitions}-{rounds}"
    wanted = folder / f"{quality}-{_VERSION}"
    if not wanted.exists():
        world = make_environment(environment)
        run = train_online(world, rounds=rounds, seed=_SEED, progress=progress)
        for name, log in _logs(world, run, transitions).items():
            target = folder / f"{name}-{_VERSION}"
            if not target.exists():
                scores = run.random_score, run.best.score
                write_minari(OfflineData(log, environment, world.low, world.high, *scores), target)
    data = read_minari(wanted)
    return dataclasses.replace(data, environment=environment)


def _logs(world: Environment, run: OnlineRun, transitions: int) -> dict[str, Transitions]:
    """The log of each quality."""
    low, high = world.low, world.high
    generator = torch.Generator().manual_seed(_SEED + 1)

    def chance(observation: Tensor) -> Tensor:
        return low + (high - low) * torch.rand((len(observation), len(low)), generator=generator)

    def noisy(policy: Policy) -> Callable[[Tensor], Tensor]:
        def act(observation: Tensor) -> Tensor:
            noise = torch.randn((len(observation), len(low)), generator=generator)
            return policy(observation) + _EXPLORATION * noise * (high - low) / 2

        return act

    def lived(act: Callable[[Tensor], Tensor], count: int, seed: int) -> Transitions:
        parts: list[Transitions] = []
        while sum(map(len, parts)) < count:
            parts.append(world.record(act, episodes=5, seed=seed + 5 * len(parts)))
        log = Transitions.join(parts)
        enough = int((log.episode_lengths().cumsum(0) < count).sum()) + 1
        return log.episodes(torch.arange(enough))

    expert, medium = noisy(run.best.policy), noisy(run.medium.policy)
    half, twentieth = -(-transitions // 2), -(-transitions // 20)
    until = int((run.replay.episode_lengths().cumsum(0) <= run.medium.seen).sum())
    return {
        "random": lived(chance, transitions, 1_000_000),
        "medium": lived(medium, transitions, 2_000_000),
        "expert": lived(expert, transitions, 3_000_000),
        "medium-replay": run.replay.episodes(torch.arange(until)),
        "medium-expert": Transitions.join([lived(medium, half, 4_000_000), lived(expert, half, 5_000_000)]),
        "random-expert": Transitions.join(
            [lived(expert, twentieth, 6_000_000), lived(chance, transitions - twentieth, 7_000_000)]
        ),
    }
