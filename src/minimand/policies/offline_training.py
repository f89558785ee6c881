"""Train an offline learner on a log, for as many steps as wanted, also with breaks in between."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..caching import arriving, tensors_hash
from .offline_batches import Batch, BatchStream, ScaledLog
from .saved_policy import Policy


@runtime_checkable
class OfflineLearner(Protocol):
    """What can be trained on a log: a module of one or several members that takes one step a batch."""

    noise_width: int

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        ...

    def act(self, observation: Tensor) -> Tensor:
        """Return actions for scaled observations, shapes ``(S, B, n)`` to ``(S, B, m)``."""
        ...

    def network(self, member: int) -> nn.Module:
        """Return a copy of one member's actor, before its tanh."""
        ...

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        ...


@dataclasses.dataclass(frozen=True)
class OfflineTraining:
    """What offline training found.

    Args:
        policies: One a member.
        losses: Name to the mean loss since the last report, a row a report, shape ``(reports, S)``.
        measured: What ``measure`` returned, one a report.
        steps: Steps taken in all.
    """

    policies: list[Policy]
    losses: Mapping[str, Tensor]
    measured: list[Any]
    steps: int


def train_offline(
    learner: Any,
    log: ScaledLog,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 100_000,
    batch_size: int = 256,
    report_every: int = 1_000,
    measure: Callable[[Any, int], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    pools: Sequence[Tensor] | None = None,
) -> OfflineTraining:
    r"""Train an offline learner on a log.

    Args:
        learner: Such as :class:`TD3BC`, built with as many ``seeds``; any module with the methods it has.
        log: The log, scaled.
        seeds: One a member: the batches that member sees follow from it.
        steps: Steps in all.
        batch_size: Transitions a member and step.
        report_every: Steps between reports; losses are averaged in between.
        measure: Called with the learner and the step at each report; what it returns must be JSON-able if a
            checkpoint is kept.
        checkpoint: A safetensors file. If it is there, training goes on from it, and ends where it would have ended
            without the break, number for number; it is written at each report.
        pools: Rows of the log that each member draws from, int64; None lets all draw from all.

    Returns:
        Policies, losses, and what was measured.

    Raises:
        ValueError: If a loss is no longer finite, or the checkpoint is of another run.

    Example:
        >>> from minimand.policies import TD3BC, Pendulum, ScaledLog
        >>> log = ScaledLog.of(Pendulum().log("mixed", episodes=2))
        >>> training = train_offline(TD3BC(3, 1, hidden=(8,)), log, steps=20, batch_size=16, report_every=10)
        >>> training.policies[0].act([1.0, 0.0, 0.0]).shape
        (1,)

    Source: The loop of S. Fujimoto and S. S. Gu (2021, arXiv 2106.06860), for any learner.
    """
    if not (isinstance(learner, OfflineLearner) and isinstance(learner, nn.Module)):
        raise TypeError(f"learner must have update, act, network, optimizers and noise_width, got {type(learner)}")
    for name, value in (("steps", steps), ("report_every", report_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    stream = BatchStream(log, seeds=seeds, batch_size=batch_size, noise_width=learner.noise_width, pools=pools)
    run = {"seeds": list(seeds), "batch_size": batch_size, "report_every": report_every}
    # What a learner starts from tells its seeds, its shape and the settings that members differ in.
    run["learner"] = tensors_hash(learner.state_dict().items())
    run["log"] = tensors_hash((("action", log.action), ("reward", log.reward), ("observation", log.observation)))
    file = pathlib.Path(checkpoint) if checkpoint is not None else None
    taken = 0
    losses: list[dict[str, list[float]]] = []
    measured: list[Any] = []
    if file is not None and file.exists():
        taken, losses, measured = _resume(file, run, learner, stream)
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    while taken < steps:
        for name, loss in learner.update(next(stream)).items():
            totals[name] = totals[name] + loss if name in totals else loss
            counts[name] = counts.get(name, 0) + 1
        taken += 1
        if taken % report_every and taken < steps:
            continue
        means = {name: total / counts[name] for name, total in totals.items()}
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                raise ValueError(f"the {name} loss is no longer finite after {taken} steps: {mean.tolist()}")
        losses.append({name: mean.tolist() for name, mean in means.items()})
        totals, counts = {}, {}
        if measure is not None:
            measured.append(measure(learner, taken))
        # A report out of turn, at the very end, is not where a longer run would break.
        if file is not None and not taken % report_every:
            _keep(file, run, learner, stream, taken, losses, measured)
    names = {name: None for row in losses for name in row}
    curves = {name: torch.tensor([row[name] for row in losses if name in row]) for name in names}
    policies = [Policy(learner.network(member), log.scaling).eval() for member in range(len(seeds))]
    return OfflineTraining(policies, curves, measured, taken)


def _optimizer_tensors(learner: Any) -> dict[str, Tensor]:
    """The moments and step counts of all optimizers, by name and place."""
    return {
        f"optimizer.{name}.{place}.{key}": value
        for name, optimizer in learner.optimizers().items()
        for place, moments in optimizer.state_dict()["state"].items()
        for key, value in moments.items()
    }


def _keep(
    file: pathlib.Path,
    run: dict[str, Any],
    learner: Any,
    stream: BatchStream,
    taken: int,
    losses: list[Any],
    measured: list[Any],
) -> None:
    """Write all that the rest of the run depends on."""
    tensors = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    tensors |= _optimizer_tensors(learner) | {f"stream.{name}": value for name, value in stream.state().items()}
    about = {"run": json.dumps(run), "taken": str(taken), "losses": json.dumps(losses)}
    about["measured"] = json.dumps(measured)
    with arriving(file) as draft:
        save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, draft, metadata=about)


def _resume(
    file: pathlib.Path, run: dict[str, Any], learner: Any, stream: BatchStream
) -> tuple[int, list[Any], list[Any]]:
    """Bring a learner and its batches to where a run was cut off."""
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    found = json.loads(about["run"])
    other = [name for name in run if found.get(name) != run[name]]
    if other:
        raise ValueError(f"{file.name} is the checkpoint of another run: its {other[0]} differs")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    learner.load_state_dict(part("learner."))
    for name, optimizer in learner.optimizers().items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(f"optimizer.{name}.").items():
            place, moment = key.split(".", 1)
            state.setdefault(int(place), {})[moment] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    stream.resume(part("stream."))
    return int(about["taken"]), json.loads(about["losses"]), json.loads(about["measured"])
