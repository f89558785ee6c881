"""The problem behind ``minimand compare preferences``: pairs of answers, a language model, and objectives."""

from __future__ import annotations

import dataclasses
import html
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..preferences import (
    CPOLoss,
    DPOLoss,
    DPOPLoss,
    ImplicitRewardSFTLoss,
    INPOLoss,
    IPOLoss,
    KTOLoss,
    NormalizedPairLoss,
    ORPOLoss,
    RewardEnsemble,
    RewardHeads,
    RPOLoss,
    SFTLoss,
    SimPOLoss,
    SLiCLoss,
    SparseTokenMask,
    fit_reward_heads,
)
from ..preferences.language_models import SMOLLM2
from .pair_training import PairRecipe, PairSource, PreparedPairs, drift, entangled, prepared, train
from .readers import DataError, content_hash, require_content
from .study import Metric, Outcome, Presentation, Run, Study
from .svg import words

ACCURACY = Metric("preference accuracy", "higher is better", "%")
RANKING = Metric("ranking accuracy", "higher is better", "%")
CHOSEN = Metric("chosen drift", "higher is better", " nats")
REJECTED = Metric("rejected drift", "lower is better", " nats")
KL = Metric("KL to the reference", "lower is better", " nats/token")
ENTANGLED = Metric("entangled pairs", "lower is better", "%")
MEMORY = Metric("peak memory", "lower is better", " MB")

UNTRAINED = "no training"
# Those that take part unless others are named: one of each kind, so that there is time for more splits.
_USUAL = (
    *("SFT", "implicit-reward SFT", "DPO", "IPO", "KTO", "SimPO", "RPO", "INPO", "normalized pairs"),
    "reward heads (ensemble)",
)
ENSEMBLE = "reward heads (ensemble)"


@dataclasses.dataclass(frozen=True)
class PairSplit:
    """Pairs of one cell: places in the prepared pairs that train, choose the learning rate, and measure."""

    data: PreparedPairs
    train: list[int]
    validation: list[int]
    test: list[int]


@dataclasses.dataclass(frozen=True)
class PairSplits:
    """A problem: three parts of the pairs, by prompts, so that none is both seen and measured.

    Args:
        source: The pairs and the model.
        seed: Shuffles the prompts.
    """

    source: PairSource
    seed: int

    def __call__(self, source: Any, seed: int) -> PairSplit:
        """Return the split of cell ``seed``: six tenths, a seventh, and the rest."""
        require_content(self.source.path, self.source.content)
        data = prepared(self.source)
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, pair in enumerate(data.pairs):
            groups.setdefault(pair.prompt, []).append(place)
        members = list(groups.values())
        order = torch.randperm(
            len(members), generator=torch.Generator().manual_seed(self.seed * 10_007 + seed)
        ).tolist()
        parts: list[list[int]] = [[], [], []]
        bounds = (round(0.6 * len(order)), round(0.75 * len(order)))
        for rank, group in enumerate(order):
            parts[0 if rank < bounds[0] else 1 if rank < bounds[1] else 2] += members[group]
        # Where a column says that a label was made wrong, the pair teaches but does not measure.
        test = [place for place in parts[2] if data.clean[place]]
        return PairSplit(data, parts[0], parts[1], test)


@dataclasses.dataclass(frozen=True)
class MakeObjective:
    """Builds an objective, or says how to.

    Args:
        kind: Its class.
        settings: Its arguments, as (name, value).
        reads_hidden: Whether its first argument is the width of the model's hidden states.
    """

    kind: type[Any]
    settings: tuple[tuple[str, Any], ...] = ()
    reads_hidden: bool = False

    def __call__(self, width: int) -> Any:
        """Build the objective for hidden states of that width."""
        return self.kind(*([width] if self.reads_hidden else []), **dict(self.settings))

    def code(self) -> str:
        """Return the call that builds it beside a ``model``."""
        arguments = ["model.config.hidden_size"] if self.reads_hidden else []
        arguments += [f"{name}={value!r}" for name, value in self.settings]
        return f"{self.kind.__name__}({', '.join(arguments)})"


@dataclasses.dataclass(frozen=True)
class TrainPolicy:
    """A contender: a language model trained by one objective.

    Args:
        make_objective: Builds the objective from the width of the model's hidden states.
        recipe: How it is trained.
        rounds: Rounds of self-play on the given pairs, for an objective that knows of them.
    """

    make_objective: MakeObjective
    recipe: PairRecipe
    rounds: int = 1

    def __call__(self, split: PairSplit, run: Run) -> Outcome:
        """Train once a learning rate, keep the best on validation pairs, and measure it."""
        data, best = split.data, None
        width = data.frozen.get_input_embeddings().weight.shape[1]
        megabytes = 0.0
        for lr in self.recipe.rates:
            torch.manual_seed(run.stream("objective"))
            objective = self.make_objective(width)
            trained = train(
                data, split.train, objective, self.recipe, lr=lr, rounds=self.rounds, seed=run.stream("order")
            )
            megabytes = max(megabytes, trained.megabytes)
            found = drift(data, trained.policy, split.validation, divergence=False)
            if best is None or found.accuracy() > best[0]:  # a tie goes to the smaller step
                best = (found.accuracy(), lr, objective, trained)
        assert best is not None
        _, lr, objective, trained = best
        metrics = _measured(data, trained.policy, split.test)
        share = entangled(data, trained.policy, objective, split.test[:16])
        if share is not None:
            metrics[ENTANGLED.name] = share
        metrics[MEMORY.name] = megabytes
        return Outcome(metrics, trained.curves, details={"learning rate": lr})


@dataclasses.dataclass(frozen=True)
class Untrained:
    """A contender: the reference itself, which prefers nothing over itself."""

    def __call__(self, split: PairSplit, run: Run) -> Outcome:
        """Measure one cell."""
        return Outcome(_measured(split.data, split.data.frozen, split.test))


@dataclasses.dataclass(frozen=True)
class TrainRewardHeads:
    """A contender: no policy, but an ensemble of reward heads on the reference's last hidden states.

    Args:
        members: Of the ensemble.
    """

    members: int = 5

    def __call__(self, split: PairSplit, run: Run) -> Outcome:
        """Train and measure one cell."""
        chosen, rejected = split.data.features(split.train)
        heads = RewardHeads(chosen.shape[1], num_members=self.members, hidden=(), seed=run.stream("heads"))
        fit_reward_heads(
            heads, chosen, rejected, batch_size=min(32, len(chosen)), weight_decay=1e-2, seed=run.stream("order")
        )
        reward = RewardEnsemble(heads).fit_scale(torch.cat([chosen, rejected]))
        better, worse = split.data.features(split.test)
        with torch.no_grad():
            margins = reward(better) - reward(worse)
        return Outcome({ACCURACY.name: float((margins > 0).double().mean())})


def _measured(data: PreparedPairs, policy: Any, places: Sequence[int]) -> dict[str, float]:
    found = drift(data, policy, places)
    return {
        ACCURACY.name: found.accuracy(),
        RANKING.name: found.ranking(),
        CHOSEN.name: float(found.chosen.mean()),
        REJECTED.name: float(found.rejected.mean()),
        KL.name: found.kl,
    }


def _objectives() -> dict[str, tuple[MakeObjective, int]]:
    """Name every objective, with how it is built and in how many rounds it is trained."""
    return {
        "SFT": (MakeObjective(SFTLoss), 1),
        "implicit-reward SFT": (MakeObjective(ImplicitRewardSFTLoss, (("divergence", "pearson"),)), 1),
        "DPO": (MakeObjective(DPOLoss), 1),
        "IPO": (MakeObjective(IPOLoss), 1),
        "SLiC": (MakeObjective(SLiCLoss), 1),
        "KTO": (MakeObjective(KTOLoss), 1),
        "SimPO": (MakeObjective(SimPOLoss), 1),
        "CPO": (MakeObjective(CPOLoss), 1),
        "ORPO": (MakeObjective(ORPOLoss), 1),
        "DPOP": (MakeObjective(DPOPLoss), 1),
        "RPO": (MakeObjective(RPOLoss, (("sft", "mean"), ("eta", 0.2))), 1),
        "INPO": (MakeObjective(INPOLoss, (("eta", 0.1),)), 2),
        "normalized pairs": (MakeObjective(NormalizedPairLoss), 1),
        "sparse token mask": (MakeObjective(SparseTokenMask, reads_hidden=True), 1),
    }


def preferences_study(
    path: str | None = None,
    *,
    model: str = SMOLLM2,
    train: str = "last:2",
    steps: int = 15,
    batch_size: int = 4,
    rates: Sequence[float] = (1e-4, 3e-4),
    max_length: int | None = None,
    pairs: int = 400,
    objectives: Sequence[str] = (),
    seeds: int = 4,
    seed: int = 0,
) -> Study:
    """Build the comparison of objectives on a user's pairs of answers.

    Args:
        path: JSON lines, a folder of datasets or a data set's name, in TRL's preference format; None for answers to
            questions of fact, a tenth of them labelled the wrong way.
        model: A folder, a name on the hub, or ``"smollm2-135m"``.
        train: ``"last:N"`` blocks, ``"lora:RANK"`` or ``"all"``.
        steps: Of training.
        batch_size: Pairs a step.
        rates: Learning rates to choose from, for every objective alike.
        max_length: Most tokens in a prompt and one answer.
        pairs: How many are drawn from a larger file.
        objectives: Names of some contenders; ``("all",)`` for every one there is, empty for one of each kind.
        seeds: Splits.
        seed: Decides splits, draws and the order of pairs.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    for value, option, least in (
        (steps, "--steps", 1),
        (batch_size, "--batch-size", 2),
        (seeds, "--seeds", 2),
        (pairs, "--pairs", 20),
    ):
        if value < least:
            raise DataError(f"{option} must be at least {least}, got {value}")
    if not rates or any(not 0 < rate < 1 for rate in rates):
        raise DataError(f"--lr must name learning rates between 0 and 1, got {', '.join(map(str, rates)) or 'none'}")
    if not re.fullmatch(r"all|(last|lora):[1-9]\d*", train):
        raise DataError(f"--train must be last:BLOCKS, lora:RANK or all, got {train!r}")
    if max_length is not None and max_length < 2:
        raise DataError(f"--max-length must be at least 2, got {max_length}")
    recipe = PairRecipe(steps=steps, batch_size=batch_size, rates=tuple(sorted(rates)))
    known = _objectives()
    contenders: dict[str, Any] = {UNTRAINED: Untrained()}
    contenders |= {name: TrainPolicy(make, recipe, rounds) for name, (make, rounds) in known.items()}
    contenders[ENSEMBLE] = TrainRewardHeads()
    if not objectives:
        objectives = _USUAL
    if tuple(objectives) != ("all",):
        by_lower = {name.lower(): name for name in contenders}
        unknown = [name for name in objectives if name.lower() not in by_lower]
        if unknown:
            raise DataError(f"--objective: there is no {unknown[0]!r}; there are all, {', '.join(contenders)}")
        wanted = {UNTRAINED, *(by_lower[name.lower()] for name in objectives)}
        contenders = {name: contender for name, contender in contenders.items() if name in wanted}
    source = PairSource(path, model, train, max_length, pairs, seed, content_hash(path))
    named = pathlib.Path(path).name if path is not None else "questions of fact, a tenth labelled the wrong way"
    tried = ", ".join(f"{rate:g}" for rate in recipe.rates)
    return Study(
        method="compare preferences",
        problem=PairSplits(source, seed),
        contenders=contenders,
        metrics=(ACCURACY, RANKING, CHOSEN, REJECTED, KL, ENTANGLED, MEMORY),
        seeds=seeds,
        test_train_ratio=0.25 / 0.6,
        about=f"{model}, {train} trained; {steps} steps of {batch_size} pairs; {seeds} splits by prompts",
        notes="Preference accuracy: of held-out pairs, the share whose chosen answer has gained more log-probability "
        "over the reference than the rejected one; the reference has 50 %. Ranking accuracy: the share whose "
        "chosen answer is the likelier. Drift: how far the mean log-probability of held-out answers moved from the "
        "reference's. KL: to the reference, exact for each next token, over the tokens of held-out answers. Entangled: "
        "pairs whose chosen answer the objective's next gradient step would make less likely, by the last block. "
        "Memory: of the process at its height, the model included. All objectives share data, model, optimizer, steps "
        f"and the choice among learning rates {tried} on a seventh of the pairs; "
        "betas are their papers' or TRL's. INPO plays two rounds on the given pairs, where its theory wants new ones. "
        "The reward heads train no policy: they say how much of the preference can be read off the reference. More "
        "objectives take part with --objective all.",
        data=named,
        data_key=source.content or "facts",
        settings={**dataclasses.asdict(recipe), **dataclasses.asdict(source)},
        presentation=Presentation(prepare=prepare, code=winner_code, figures=drift_figure),
    )


def prepare(study: Study, progress: Callable[[str], None]) -> Study:
    """Do once, in this process, what all cells need, and say in the study what became of the rows.

    Raises:
        DataError: If the pairs or the model cannot be used, with one sentence that says why.
    """
    problem: PairSplits = study.problem  # type: ignore[assignment]
    try:
        data = PreparedPairs(problem.source, progress)
    except (ValueError, ImportError) as error:
        raise DataError(str(error)) from None
    prompts = len({pair.prompt for pair in data.pairs})
    if prompts < 16:
        raise DataError(
            f"{prompts} different prompts are too few to train, choose and measure on: at least 16 are needed"
        )
    skipped = [f"{count:,} left out for {reason}" for reason, count in data.tokenized.skipped.items()]
    if data.available > len(data.rows):
        skipped.insert(0, f"{len(data.rows):,} drawn of {data.available:,}")
    if data.tokenized.truncated:
        skipped.append(f"{data.tokenized.truncated:,} truncated")
    told = "".join(f"; {one}" for one in skipped)
    described = f"{study.data}: {len(data.pairs):,} pairs of answers to {prompts:,} prompts{told}"
    return dataclasses.replace(study, data=described)


def winner_code(study: Study, winner: str) -> str:
    """Return about ten lines that train the winner through TRL on all pairs."""
    problem: PairSplits = study.problem  # type: ignore[assignment]
    source = problem.source
    contender = study.contenders[winner]
    load = f"model, tokenizer = load_language_model({source.model!r})"
    if isinstance(contender, Untrained):
        return (
            "# No objective was shown to beat the model as it is: more pairs, steps or seeds may tell.\n"
            f"from minimand.preferences import load_language_model\n\n{load}"
        )
    if isinstance(contender, TrainRewardHeads):
        arguments = f"{source.path!r}, model={source.model!r}, train={source.part!r}"
        return (
            "import torch\n\n"
            "from minimand.bench.preferences import preferences_study\n"
            "from minimand.preferences import RewardEnsemble, RewardHeads, fit_reward_heads\n\n"
            f"data = preferences_study({arguments}).problem(None, seed=0).data\n"
            "chosen, rejected = data.features(range(len(data.pairs)))  # of the reference, at each answer's end\n"
            f"heads = RewardHeads(chosen.shape[1], num_members={contender.members}, hidden=())\n"
            "fit_reward_heads(heads, chosen, rejected, batch_size=32, weight_decay=1e-2)\n"
            "reward = RewardEnsemble(heads).fit_scale(torch.cat([chosen, rejected]))"
        )
    assert isinstance(contender, TrainPolicy)
    make = contender.make_objective
    pairs = f"read_pairs({source.path!r})" if source.path is not None else "fact_pairs()"
    reader = "read_pairs, " if source.path is not None else ""
    lines = [
        "from datasets import Dataset",
        "from trl import DPOConfig",
        *([] if source.path is not None else ["from minimand.bench.facts import fact_pairs"]),
        f"from minimand.preferences import {make.kind.__name__}, load_language_model, {reader}train_only",
        "from minimand.preferences.trl import PairLossTrainer",
        "",
        load,
        f"model = train_only(model, {source.part!r})",
        f"pairs = Dataset.from_list({pairs})",
        f'settings = DPOConfig(output_dir="policy", learning_rate={max(study.settings["rates"]):g}, bf16=False)',
        "trainer = PairLossTrainer(",
        "    model, settings, train_dataset=pairs, processing_class=tokenizer,",
        f"    objective={make.code()},",
        ")",
        "trainer.train()",
    ]
    return "\n".join(lines)


def drift_figure(study: Study, record: dict[str, Any]) -> list[dict[str, str]]:
    """Draw where each objective took held-out chosen and rejected answers: a point each, the reference at zero."""
    means = {
        metric.name: {row["name"]: row["mean"] for row in record["summary"].get(metric.name, [])}
        for metric in (CHOSEN, REJECTED)
    }
    points = [
        (name, float(across), float(means[REJECTED.name][name]))
        for name, across in means[CHOSEN.name].items()
        if name != UNTRAINED and across is not None
    ]
    if not points:
        return []
    return [
        {
            "title": "Where chosen and rejected answers went",
            "caption": "Mean change of held-out log-probabilities from the reference, in nats. Below the diagonal the "
            "margin grew. In the lower right quadrant the chosen answers became likelier and the rejected ones less "
            "so; in the lower left both lost: the preference is learnt, but the model moves away from good answers.",
            "svg": _scatter(points),
        }
    ]


def _scatter(points: Sequence[tuple[str, float, float]]) -> str:
    from matplotlib.ticker import MaxNLocator

    left, top, width, height = 64, 16, 560, 360
    low_x, high_x = min(0.0, *(p[1] for p in points)), max(0.0, *(p[1] for p in points))
    low_y, high_y = min(0.0, *(p[2] for p in points)), max(0.0, *(p[2] for p in points))
    pad_x, pad_y = 0.08 * (high_x - low_x) + 0.2, 0.08 * (high_y - low_y) + 0.2
    low_x, high_x, low_y, high_y = low_x - pad_x, high_x + pad_x, low_y - pad_y, high_y + pad_y

    def x(value: float) -> float:
        return round(left + width * (value - low_x) / (high_x - low_x), 1)

    def y(value: float) -> float:
        return round(top + height * (high_y - value) / (high_y - low_y), 1)

    parts = [
        f'<path d="M{x(0)} {top}v{height}M{left} {y(0)}h{width}" style="stroke:var(--line);fill:none"/>',
    ]
    start, end = max(low_x, low_y), min(high_x, high_y)
    if end > start:
        parts.append(
            f'<path d="M{x(start)} {y(start)}L{x(end)} {y(end)}" '
            'style="stroke:var(--line);stroke-dasharray:4 4;fill:none"/>'
        )
    across_ticks = [value for value in MaxNLocator(6).tick_values(low_x, high_x) if low_x <= value <= high_x]
    down_ticks = [value for value in MaxNLocator(6).tick_values(low_y, high_y) if low_y <= value <= high_y]
    parts += [words(x(value), top + height + 18, f"{value:g}") for value in across_ticks]
    parts += [words(left - 10, y(value) + 4, f"{value:g}", anchor="end") for value in down_ticks]
    parts.append(words(left + width / 2, top + height + 38, "chosen answers, nats"))
    parts.append(
        f'<text transform="translate(14 {top + height / 2}) rotate(-90)" '
        'style="text-anchor:middle;fill:var(--muted)">rejected answers, nats</text>'
    )
    taken: list[tuple[float, float]] = []
    for name, across, down in sorted(points, key=lambda point: -point[2]):
        at = x(across), y(down)
        parts.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="4" style="fill:var(--accent, currentColor)"/>')
        # A name goes right of its point, or left of it near the edge, and down until it covers no other.
        right = at[0] < left + 0.75 * width
        line = at[1] + 4
        while any(abs(line - other[1]) < 13 and abs(at[0] - other[0]) < 130 for other in taken):
            line += 6
        taken.append((at[0], line))
        shift, anchor = (9, "start") if right else (-9, "end")
        parts.append(words(at[0] + shift, line, html.escape(name), anchor=anchor, colour="--text, currentColor"))
    label = "Each objective's mean change of chosen and rejected log-probabilities"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 16} {top + height + 50}" role="img" '
        f'aria-label="{label}" font-family="inherit" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )
