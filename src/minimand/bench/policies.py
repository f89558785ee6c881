"""The problem behind ``minimand compare policy``: a log of decisions, offline learners, and what they came to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..caching import tensors_hash, user_cache
from ..policies import (
    A2PR,
    CQL,
    IQL,
    PRDC,
    TD3BC,
    BehaviourCloning,
    Environment,
    FamO2O,
    OfflineData,
    Policy,
    ScaledLog,
    Transitions,
    behaviour_data,
    fitted_q_evaluation,
    make_environment,
    read_minari,
    read_transitions,
    train_offline,
)
from ..policies.behaviour_data import QUALITIES
from ..policies.environments import require_fits
from .engine import code_version
from .readers import DataError
from .study import Metric, Outcome, Presentation, Run, Study

SCORE = Metric("normalised score", "higher is better")
RETURN = Metric("return", "higher is better")
VALUE = Metric("fitted-Q value", "higher is better")
WIDTH = Metric("fitted-Q interval", "lower is better")
DISTANCE = Metric("action distance", "lower is better")
EXCESS = Metric("Q overestimation", "lower is better")
COST = Metric("episode cost", "lower is better")

DEFAULT = "Pendulum-v1/random-expert"
LOGGED = "the log itself"
# Rows on which the distance of actions is measured, and resamples of episodes for the final fitted-Q estimates.
_PROBE, _RESAMPLES = 2_000, 8


@dataclasses.dataclass(frozen=True)
class OfflineRecipe:
    """How every learner is trained, chosen and measured.

    Args:
        steps: Gradient steps.
        batch_size: Transitions a step.
        hidden: Widths of the hidden layers.
        discount: Of later rewards.
        reports: How often a policy is looked at during training.
        choice_episodes: Episodes that choose among a learner's settings, at each of the last reports.
        test_episodes: Episodes that measure the chosen one.
    """

    steps: int = 6_000
    batch_size: int = 128
    hidden: tuple[int, ...] = (64, 64)
    discount: float = 0.99
    reports: int = 12
    choice_episodes: int = 10
    test_episodes: int = 50


@dataclasses.dataclass(frozen=True)
class PolicyData:
    """What a cell learns from and is measured in.

    Args:
        data: The log and where it comes from.
        world: The environment, or None where there is none to try policies in.
        key: Fingerprint of the log.
    """

    data: OfflineData
    world: Environment | None
    key: str

    @functools.cached_property
    def log(self) -> ScaledLog:
        """The log as learners see it; rewards have deviation one, which suits one learning rate for all logs."""
        rewards = self.data.transitions.reward
        scale = 1 / max(float(rewards.std()), 1e-6 * max(1.0, float(rewards.abs().max())))
        return ScaledLog.of(self.data.transitions, low=self.data.low, high=self.data.high, reward_scale=scale)

    @property
    def reward_unit(self) -> float:
        """How many of the log's rewards make one of the learners'."""
        return float(self.data.transitions.reward.abs().max()) / max(float(self.log.reward.abs().max()), 1e-12)

    def score(self, returns: Tensor) -> Tensor:
        """Normalise returns: chance is 0, the expert 100; as they are where that is not known."""
        low, high = self.data.random_score, self.data.expert_score
        return returns if low is None or high is None or high <= low else 100 * (returns - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class PolicySource:
    """Which log, and where its policies can be tried.

    Args:
        dataset: A file, a Minari data set, or ``ENV/QUALITY`` for one of our own.
        environment: Gymnasium id, or None.
        content: Fingerprint of the log when the comparison began.
    """

    dataset: str
    environment: str | None = None
    content: str = ""

    def __call__(self, source: Any, seed: int) -> PolicyData:
        """Return the log of cell ``seed``: the same for all, since what differs is chance in training."""
        found = _loaded(self.dataset, self.environment)
        if self.content and found.key != self.content:
            raise DataError(f"{self.dataset} changed while the comparison ran: start it again")
        return found


@functools.lru_cache(maxsize=2)
def _loaded(dataset: str, environment: str | None) -> PolicyData:
    data = load_offline_data(dataset)
    name = environment or data.environment
    world = None
    if name is not None:
        world = make_environment(name)
        require_fits(data.transitions, world, name)
        data = dataclasses.replace(data, environment=name, low=world.low, high=world.high)
    return PolicyData(data, world, tensors_hash(data.transitions.tensors().items()))


def load_offline_data(dataset: str, progress: Callable[[int, int], None] | None = None) -> OfflineData:
    """Read a log from wherever it lies.

    Args:
        dataset: An ``.npz`` or ``.parquet`` file, a Minari data set's folder or id, or ``ENV/QUALITY``.
        progress: Told how far training behaviour policies is, if that must be done first.

    Raises:
        ValueError: If it cannot be read.
        FileNotFoundError: If there is no such thing.
        ImportError: If an extra is missing.
    """
    path = pathlib.Path(dataset)
    if path.suffix in (".npz", ".parquet"):
        return OfflineData(read_transitions(path))
    environment, _, quality = dataset.rpartition("/")
    if environment and quality in QUALITIES and not path.exists():
        return behaviour_data(environment, quality, progress=progress)
    if path.is_file():
        raise ValueError(f"cannot read {path.name}: a log is an .npz, a .parquet or a folder in Minari's format")
    try:
        return read_minari(dataset)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no log at {dataset!r}: give an .npz or .parquet of transitions, a Minari data set on this machine, or "
            f"ENVIRONMENT/QUALITY with a quality of {', '.join(QUALITIES)}, such as {DEFAULT}"
        ) from None


@dataclasses.dataclass(frozen=True)
class TrainOffline:
    """A contender: an offline learner with a few settings to choose from.

    Args:
        kind: Name of its class.
        grid: Settings that are tried, each a mapping of arguments; as many for every learner.
        recipe: How it is trained.
        fixed: Arguments that every setting shares.
    """

    kind: str
    grid: tuple[tuple[tuple[str, float], ...], ...]
    recipe: OfflineRecipe
    fixed: tuple[tuple[str, Any], ...] = ()

    def __call__(self, data: PolicyData, run: Run) -> Outcome:
        """Train one cell."""
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[PolicyData], runs: Sequence[Run]) -> list[Outcome]:
        """Train all settings of all cells side by side, and measure each cell's best."""
        data, recipe, settings = datas[0], self.recipe, [dict(one) for one in self.grid]
        seeds = [run.stream("training") % (1 << 40) for run in runs for _ in settings]
        tried = settings * len(runs)
        learner, pools = self._build(data, tried, seeds)
        shape = (len(runs), len(settings))

        def measure(learner: Any, step: int) -> list[float]:
            if data.world is None:
                return []
            found = [_returns(data, _policy(learner, data, place), recipe.choice_episodes, runs[place // shape[1]])
                     for place in range(len(seeds))]  # fmt: skip
            return [float(data.score(one).mean()) for one in found]

        training = _resumable(
            learner, data, seeds, recipe, measure, pools, f"{self.kind} {self.grid} {self.fixed} {recipe}"
        )
        policies = training.policies
        scores = torch.tensor(training.measured) if data.world is not None else None
        if scores is not None:
            # The last quarter of the reports decides: one report alone is mostly chance.
            late = scores[-max(1, len(scores) // 4) :].mean(0).view(shape)
        else:
            late = self._offline_choice(data, policies).view(shape)
        outcomes = []
        for cell, run in enumerate(runs):
            place = cell * shape[1] + int(late[cell].argmax())
            value = learner.value if hasattr(learner, "value") else None
            metrics = measured(data, policies[place], recipe, run, value, place, len(seeds))
            curves = {} if scores is None else {"score": scores[:, place].tolist()}
            outcomes.append(Outcome(metrics, curves, details={"settings": dict(tried[place])}))
        return outcomes

    def _offline_choice(self, data: PolicyData, policies: Sequence[Policy]) -> Tensor:
        """What the log says each policy is worth, from two resamples."""
        values = fitted_q_evaluation(
            data.data.transitions, policies, discount=self.recipe.discount, steps=2_000, resamples=2,
            low=data.data.low, high=data.data.high,
        )  # fmt: skip
        return torch.tensor([value.mean for value in values])

    def _build(
        self, data: PolicyData, tried: Sequence[Mapping[str, float]], seeds: Sequence[int]
    ) -> tuple[Any, list[Tensor] | None]:
        """Build the stack of learners, and the rows each draws from where they differ."""
        log, recipe = data.log, self.recipe
        names = [name for name in tried[0] if name != "top"]
        varied = {name: [one[name] for one in tried] for name in names}
        arguments: dict[str, Any] = {**dict(self.fixed), **varied, "hidden": recipe.hidden, "seeds": seeds}
        if self.kind != "BehaviourCloning":
            arguments["discount"] = recipe.discount
        kind = _LEARNERS[self.kind]
        learner = kind(log, **arguments) if kind is PRDC else kind(log.observation_dim, log.action_dim, **arguments)
        if "top" not in tried[0]:
            return learner, None
        return learner, [_top_rows(data.data.transitions, one["top"]) for one in tried]


_LEARNERS: dict[str, Any] = {
    "BehaviourCloning": BehaviourCloning,
    "TD3BC": TD3BC,
    "IQL": IQL,
    "CQL": CQL,
    "PRDC": PRDC,
    "A2PR": A2PR,
    "FamO2O": FamO2O,
}


def _top_rows(log: Transitions, share: float) -> Tensor:
    """Rows of the episodes with the highest returns, at least one."""
    returns = log.episode_returns()
    best = returns.argsort(descending=True)[: max(1, round(share * len(returns)))]
    kept = torch.zeros(len(returns), dtype=torch.bool)
    kept[best.cpu()] = True
    return kept[log.episode_index().cpu()].nonzero()[:, 0]


def _policy(learner: Any, data: PolicyData, member: int) -> Policy:
    return Policy(learner.network(member), data.log.scaling).eval()


def _returns(data: PolicyData, policy: Callable[[Tensor], Tensor], episodes: int, run: Run) -> Tensor:
    """Returns of episodes whose starts no measurement shares."""
    assert data.world is not None
    with torch.no_grad():
        return data.world.record(policy, episodes=episodes, seed=run.stream("choice") % (1 << 30)).episode_returns()


def _resumable(
    learner: Any,
    data: PolicyData,
    seeds: Sequence[int],
    recipe: OfflineRecipe,
    measure: Callable[[Any, int], Any],
    pools: list[Tensor] | None,
    about: str,
) -> Any:
    """Train, going on from where an earlier call with the same code was cut off; what it kept goes at the end."""
    named = json.dumps([about, data.key, list(seeds), code_version("compare policy")])
    file = user_cache() / "training" / f"{hashlib.blake2b(named.encode(), digest_size=16).hexdigest()}.safetensors"
    training = train_offline(
        learner, data.log, seeds=seeds, steps=recipe.steps, batch_size=recipe.batch_size,
        report_every=max(1, recipe.steps // recipe.reports), measure=measure, checkpoint=file, pools=pools,
    )  # fmt: skip
    file.unlink(missing_ok=True)
    return training


def measured(
    data: PolicyData,
    policy: Policy,
    recipe: OfflineRecipe,
    run: Run,
    value: Callable[[Tensor, Tensor], Tensor] | None,
    member: int,
    members: int,
) -> dict[str, float]:
    """Measure a policy where it can be tried, else by fitted-Q evaluation, and how it relates to the log.

    Args:
        data: The log and the environment.
        policy: What is measured.
        recipe: How.
        run: Decides the starts of the test's episodes.
        value: The learner's critic for all its members, or None if it has none.
        member: Which of them is the policy's.
        members: How many there are.
    """
    log = data.data.transitions
    rows = torch.arange(len(log))[:: max(1, len(log) // _PROBE)]
    scaling = data.log.scaling
    # In half ranges of the action, so that it reads alike whatever the unit.
    apart = scaling.action_in(policy.act(log.observation[rows])) - scaling.action_in(log.action[rows])
    found = {DISTANCE.name: float(apart.square().mean().sqrt())}
    if data.world is not None:
        lived = data.world.record(policy.act, episodes=recipe.test_episodes, seed=run.stream("test") % (1 << 30))
        found |= _from_episodes(data, lived)
        starts, real = lived, _discounted(lived, recipe.discount)
    else:
        (estimate,) = fitted_q_evaluation(
            log, [policy], discount=recipe.discount, resamples=_RESAMPLES, low=data.data.low, high=data.data.high,
            seed=run.stream("fitted-Q") % (1 << 30),
        )  # fmt: skip
        found |= {VALUE.name: estimate.mean, WIDTH.name: estimate.high - estimate.low}
        starts, real = log, torch.tensor([estimate.mean])
    found[EXCESS.name] = math.nan
    if value is not None:
        begins = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + starts.episode_ends.nonzero()[:-1, 0]])
        seen = scaling.observation_in(starts.observation[begins])
        done = scaling.action_in(policy.act(starts.observation[begins]))
        shape = (members, -1, -1)
        told = value(seen.expand(*shape), done.expand(*shape))[member].detach() * data.reward_unit
        found[EXCESS.name] = float(told.mean() - real.mean())
    return found


def _from_episodes(data: PolicyData, lived: Transitions) -> dict[str, float]:
    returns = lived.episode_returns()
    found = {SCORE.name: float(data.score(returns).mean()), RETURN.name: float(returns.mean())}
    if lived.cost is not None:
        found[COST.name] = float(lived.cost.sum()) / lived.num_episodes
    return found


def _discounted(log: Transitions, discount: float) -> Tensor:
    """Discounted return of each episode from its start."""
    index = log.episode_index()
    lengths = log.episode_lengths()
    begins = lengths.cumsum(0) - lengths
    age = torch.arange(len(log), device=index.device) - begins[index]
    return log.reward.new_zeros(len(lengths)).index_add_(0, index, log.reward * discount**age)


@dataclasses.dataclass(frozen=True)
class LoggedBehaviour:
    """The reference: what the log's own episodes came to.

    Args:
        recipe: Tells the discount.
    """

    recipe: OfflineRecipe

    def __call__(self, data: PolicyData, run: Run) -> Outcome:
        """Read the log."""
        log = data.data.transitions
        found = {DISTANCE.name: 0.0, EXCESS.name: math.nan}
        if data.world is not None:
            return Outcome(found | _from_episodes(data, log))
        returns = _discounted(log, self.recipe.discount)
        half = 1.959964 * float(returns.std()) / len(returns) ** 0.5
        return Outcome(found | {VALUE.name: float(returns.mean()), WIDTH.name: 2 * half})


def _grids(recipe: OfflineRecipe) -> dict[str, TrainOffline]:
    """Every learner with three settings to choose from."""

    def one(kind: str, *settings: Mapping[str, float], **fixed: Any) -> TrainOffline:
        return TrainOffline(kind, tuple(tuple(each.items()) for each in settings), recipe, tuple(fixed.items()))

    return {
        "behaviour cloning": one("BehaviourCloning", {"top": 1.0}, {"top": 0.5}, {"top": 0.1}),
        "TD3+BC": one("TD3BC", {"alpha": 1.0}, {"alpha": 2.5}, {"alpha": 10.0}),
        "IQL": one(
            "IQL", {"expectile": 0.7, "beta": 3.0}, {"expectile": 0.7, "beta": 10.0}, {"expectile": 0.9, "beta": 10.0}
        ),
        "CQL": one("CQL", {"conservatism": 0.5}, {"conservatism": 2.0}, {"conservatism": 5.0}, num_actions=4),
        "PRDC": one("PRDC", {"alpha": 2.5}, {"alpha": 10.0}, {"alpha": 40.0}),
        "FamO2O": one("FamO2O", {"expectile": 0.5}, {"expectile": 0.7}, {"expectile": 0.9}, balance=(1.0, 10.0)),
        "A2PR": one("A2PR", {"alpha": 1.0}, {"alpha": 2.5}, {"alpha": 10.0}, vae_hidden=recipe.hidden),
    }


def policy_study(
    dataset: str | None = None,
    *,
    environment: str | None = None,
    steps: int = 6_000,
    batch_size: int = 128,
    hidden: Sequence[int] = (64, 64),
    discount: float = 0.99,
    episodes: int = 50,
    contenders: Sequence[str] | None = None,
    seeds: int = 5,
    seed: int = 0,
) -> Study:
    """Build the comparison of offline learners on a log.

    Args:
        dataset: An ``.npz`` or ``.parquet`` of transitions, a Minari data set, or ``ENVIRONMENT/QUALITY``; None for
            ``Pendulum-v1/random-expert``.
        environment: Gymnasium id of the environment to try policies in; None for the data set's own, if it has one.
        steps: Gradient steps of each learner.
        batch_size: Transitions a step.
        hidden: Widths of the hidden layers.
        discount: Of later rewards.
        episodes: Episodes that measure a policy.
        contenders: Names of those that take part; None for all.
        seeds: Learners trained anew.
        seed: Decides every random number.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    for value, option, least in (
        (steps, "--steps", 10),
        (batch_size, "--batch-size", 2),
        (seeds, "--seeds", 2),
        (episodes, "--episodes", 2),
    ):
        if value < least:
            raise DataError(f"{option} must be at least {least}, got {value}")
    if not hidden or min(hidden) < 1:
        raise DataError(f"--hidden must be positive widths, got {','.join(map(str, hidden)) or 'none'}")
    if not 0 < discount < 1:
        raise DataError(f"--discount must lie between 0 and 1, got {discount}")
    recipe = OfflineRecipe(steps, batch_size, tuple(hidden), discount, test_episodes=episodes)
    learners: dict[str, Any] = {LOGGED: LoggedBehaviour(recipe), **_grids(recipe)}
    if contenders is not None:
        by_lower = {name.lower(): name for name in learners}
        unknown = [name for name in contenders if name.lower() not in by_lower]
        if unknown:
            raise DataError(f"--contenders: there is no {unknown[0]!r}; there are {', '.join(learners)}")
        wanted = {LOGGED, *(by_lower[name.lower()] for name in contenders)}
        learners = {name: learner for name, learner in learners.items() if name in wanted}
    source = PolicySource(dataset or DEFAULT, environment)
    return Study(
        method="compare policy",
        problem=source,
        contenders=learners,
        metrics=(SCORE, RETURN, DISTANCE, EXCESS),
        seeds=seeds,
        about=f"{steps:,} steps of {batch_size} transitions, networks {'-'.join(map(str, hidden))}",
        data=source.dataset,
        settings={**dataclasses.asdict(recipe), "seed": seed, **dataclasses.asdict(source)},
        presentation=Presentation(
            prepare=functools.partial(prepare, seed=seed), code=winner_code, summary=chosen_settings, lines=chosen_lines
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Seeded:
    """A contender whose cells draw from another stream for each ``seed`` of the comparison."""

    inner: Any
    seed: int

    def __call__(self, data: PolicyData, run: Run) -> Outcome:
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[PolicyData], runs: Sequence[Run]) -> list[Outcome]:
        moved = [dataclasses.replace(run, seed=run.seed + 10_007 * self.seed) for run in runs]
        if hasattr(self.inner, "batch"):
            return self.inner.batch(datas, moved)
        return [self.inner(data, run) for data, run in zip(datas, moved, strict=True)]


def prepare(study: Study, progress: Callable[[str], None], *, seed: int) -> Study:
    """Read the log, making one of our own first if that is asked for, and say what it holds.

    Raises:
        DataError: If the log or the environment cannot be used, with one sentence that says why.
    """
    source: PolicySource = study.problem  # type: ignore[assignment]

    def told(done: int, total: int) -> None:
        filled = round(20 * done / total)
        progress(f"training behaviour policies, once: {'━' * filled}{'╌' * (20 - filled)} {done} of {total} rounds")

    try:
        progress("reading the log")
        with contextlib.suppress(FileNotFoundError):
            load_offline_data(source.dataset, told)
        found = _loaded(source.dataset, source.environment)
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        raise DataError(str(error)) from None
    log = found.data.transitions
    if not log.continuous:
        raise DataError(f"{source.dataset} has discrete actions, and the learners compared here want continuous ones")
    if log.num_episodes < 2:
        raise DataError(
            f"{source.dataset} holds one trajectory: at least two episodes are needed to tell policies apart"
        )
    name = found.data.environment
    normalised = found.data.random_score is not None and found.data.expert_score is not None
    returns = log.episode_returns()
    where = f"tried in {name}" if found.world is not None else "no environment: fitted-Q evaluation"
    metrics = (((SCORE, RETURN) if normalised else (RETURN,)) if found.world is not None else (VALUE, WIDTH)) + (
        DISTANCE,
        EXCESS,
    )
    if log.cost is not None and found.world is not None:
        metrics += (COST,)
    return dataclasses.replace(
        study,
        problem=dataclasses.replace(source, content=found.key),
        contenders={who: _Seeded(contender, seed) for who, contender in study.contenders.items()},
        metrics=metrics,
        data=f"{source.dataset}: {len(log):,} transitions, {log.num_episodes:,} episodes, mean return "
        f"{float(returns.mean()):.4g}; {where}",
        data_key=found.key,
        notes=_notes(found, study),
    )


def _notes(found: PolicyData, study: Study) -> str:
    recipe = study.settings
    told = [
        f"Every learner has three settings to choose from and trains them for each of the seeds on the whole log; "
        f"rewards are divided by their deviation, discount {recipe['discount']:g}.",
    ]
    if found.world is not None:
        told.append(
            f"The setting is chosen by {recipe['choice_episodes']} episodes at each report of the last quarter of "
            f"training, and measured in {recipe['test_episodes']} others: a choice that wants the environment, and is "
            "the same for all. "
        )
        if found.data.random_score is not None and found.data.expert_score is not None:
            told.append(
                f"Normalised score: 0 is chance (return {found.data.random_score:.4g}), 100 the expert "
                f"({found.data.expert_score:.4g}). "
            )
        told.append(
            "Q overestimation: the critic's value of the policy's first actions minus their discounted return in the "
            "test's episodes, where a time limit cuts off what the critic still counts. "
        )
    else:
        told.append(
            "No environment is known (--env names one): policies are chosen and measured by fitted-Q evaluation on "
            "this very log, whose interval covers the chance in the log and not what the log never saw. "
            "Q overestimation: the critic's value minus that estimate. "
        )
    told.append(
        "Action distance: root mean square between the policy's and the logged actions, in half ranges. Intervals "
        "are over seeds of training on one log, not over logs."
    )
    return " ".join(one.strip() for one in told)


def chosen_settings(study: Study, record: dict[str, Any]) -> dict[str, Any]:
    """Count, for each learner, the cells in which each of its settings was chosen."""
    counts: dict[str, dict[str, int]] = {}
    for cell in record["cells"]:
        settings = cell.get("details", {}).get("settings")
        if settings:
            named = ", ".join(f"{name} {value:g}" for name, value in settings.items())
            of_learner = counts.setdefault(cell["contender"], {})
            of_learner[named] = of_learner.get(named, 0) + 1
    return {"chosen": counts}


def chosen_lines(summary: dict[str, Any]) -> list[str]:
    """Say in a line each which settings were chosen how often."""
    told = {
        name: "; ".join(f"{settings} ({count} cells)" for settings, count in sorted(counts.items()))
        for name, counts in summary["chosen"].items()
    }
    return ["settings chosen:", *(f"  {name}: {settings}" for name, settings in told.items())]


def winner_code(study: Study, winner: str) -> str:
    """Return about ten lines that train the winner on the log and save its policy."""
    source: PolicySource = study.problem  # type: ignore[assignment]
    contender = getattr(study.contenders[winner], "inner", study.contenders[winner])
    load = f'data = load_offline_data("{source.dataset}")'
    if not isinstance(contender, TrainOffline):
        return (
            "# No learner was shown to beat the log itself: more steps, seeds or data may tell.\n"
            f"from minimand.bench.policies import load_offline_data\n\n{load}"
        )
    recipe = contender.recipe
    middle = dict(contender.grid[1])
    arguments = {name: value for name, value in middle.items() if name != "top"} | dict(contender.fixed)
    arguments |= {"hidden": recipe.hidden}
    if contender.kind != "BehaviourCloning":
        arguments["discount"] = recipe.discount
    told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    first = "log" if contender.kind == "PRDC" else "log.observation_dim, log.action_dim"
    return "\n".join(
        [
            "from minimand.bench.policies import load_offline_data",
            f"from minimand.policies import {contender.kind}, ScaledLog, train_offline",
            "",
            load,
            "scale = 1 / float(data.transitions.reward.std())",
            "log = ScaledLog.of(data.transitions, low=data.low, high=data.high, reward_scale=scale)",
            f"learner = {contender.kind}({first}, {told})  # the middle of the settings tried",
            f"policy = train_offline(learner, log, steps={recipe.steps}, batch_size={recipe.batch_size}).policies[0]",
            'policy.save("policy.safetensors")  # load_policy reads it; policy.export_onnx("policy.onnx")',
            "action = policy.act(data.transitions.observation[0])",
        ]
    )
