"""The problem behind ``minimand compare survival``: bags of instances with times and events, and ways to pool them."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import checks, training
from ..losses import cox_ph_loss, discrete_hazard_loss, event_time_edges, hazard_survival
from ..survival import concordance_index, kaplan_meier, log_rank_test
from ..training import Recipe
from ..transport import AttentionPool, InstancePool, MassRamp, MeanPool, OTPool, OTSurv
from .readers import DataError
from .slides import Cohort, folder_hash, read_slides
from .study import Metric, Outcome, Presentation, Run, Study
from .svg import words

C_INDEX = Metric("C-index", "higher is better")
LOG_RANK = Metric("log-rank p", "lower is better")

# Of the authors' code, where training lasts 50 epochs.
_RAMP_EPOCHS = 10


@dataclasses.dataclass(frozen=True)
class SurvivalSplit:
    """Training and test bags of one cell."""

    train: Cohort
    test: Cohort


@dataclasses.dataclass(frozen=True)
class SurvivalRecipe:
    """How a model of bags is trained, whatever pools them.

    Args:
        epochs: Passes over the training bags.
        batch_size: Bags a step. Cox's loss compares the bags of a batch, so few of them make it noisy.
        lr: AdamW's learning rate at the start; a cosine to zero follows.
        dim: Features of an encoded instance.
        prototypes: Of the pools that have any.
        loss: ``"cox"``, or ``"hazards"`` of four time intervals.
        max_instances: A training step sees a random part of this size of a larger bag; measuring sees all.
    """

    epochs: int = 25
    batch_size: int = 25
    lr: float = 1e-3
    dim: int = 32
    prototypes: int = 8
    loss: str = "cox"
    max_instances: int = 2000


@dataclasses.dataclass(frozen=True)
class PoolBags:
    """A contender: one encoder and head, and what pools the instances between them.

    Args:
        make_pool: Builds the pool from the features of an instance and the number of prototypes.
        recipe: How it is trained.
        ramp: Whether the share of mass that the pool moves rises over the first ten epochs.
        rates: Learning rates to choose from by the concordance on a fifth of the training bags; empty for the
            recipe's own.
    """

    make_pool: Callable[[int, int], InstancePool]
    recipe: SurvivalRecipe
    ramp: bool = False
    rates: tuple[float, ...] = ()

    def __call__(self, data: SurvivalSplit, run: Run) -> Outcome:
        """Train and measure one cell."""
        risk = self.learn_from(data.train, seed=run.stream("model"))(data.test)
        return Outcome(*_measured(data.test, risk))

    def learn_from(self, cohort: Cohort, *, seed: int) -> SurvivalPredictor:
        """Train on all bags of a cohort; return what maps a cohort to a risk a bag."""
        rates = self.rates or (self.recipe.lr,)
        if len(rates) == 1:
            return self._train(cohort, rates[0], seed)
        held = fold_of(cohort, 5, seed) == 0
        rest, validation = cohort.take((~held).nonzero()[:, 0]), cohort.take(held.nonzero()[:, 0])
        scores = [_concordance(validation, self._train(rest, rate, seed)(validation)) for rate in rates]
        return self._train(cohort, rates[int(np.nanargmax(scores))], seed)

    def _train(self, cohort: Cohort, lr: float, seed: int) -> SurvivalPredictor:
        own = self.recipe
        edges = event_time_edges(cohort.time, cohort.event) if own.loss == "hazards" else None
        bins = None if edges is None else len(edges) + 1
        features = cohort.bags[0].shape[1]
        centre, scale = feature_scale(cohort)

        def make() -> nn.Module:
            return OTSurv(features, dim=own.dim, pool=self.make_pool(own.dim, own.prototypes), num_bins=bins)

        model: Any = training.seeded(make, seed)
        recipe = Recipe(epochs=own.epochs, batch_size=own.batch_size, lr=lr, weight_decay=1e-5)
        ramp = None
        if self.ramp:
            steps = training.batches_per_epoch(len(cohort), min(own.batch_size, len(cohort)))
            ramp = MassRamp(min(_RAMP_EPOCHS, own.epochs) * steps)
        bags = _Bags(model, cohort, centre, scale, own.max_instances, ramp, seed)
        target = torch.stack([cohort.time, cohort.event.double()], 1)
        if edges is not None:
            target[:, 0] = torch.bucketize(cohort.time, edges, right=True).double()
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global stream
            torch.manual_seed(seed)
            training.fit(bags, _objective(own.loss), torch.arange(len(cohort)), target, recipe=recipe, seed=seed)
        return SurvivalPredictor(model, centre, scale)


@dataclasses.dataclass(frozen=True)
class SurvivalPredictor:
    """A trained model, and the scale of the features it was trained on."""

    model: OTSurv
    centre: Tensor
    scale: Tensor

    @torch.no_grad()
    def __call__(self, cohort: Cohort) -> Tensor:
        """Return a risk for each bag, ``(bags,)``: the higher, the sooner."""
        scores = torch.cat([self.model(self._scaled(bag)) for bag in cohort.bags])
        return scores if scores.dim() == 1 else -hazard_survival(scores).sum(1)

    @torch.no_grad()
    def heat_map(self, bag: Tensor) -> Tensor:
        """Return how much each instance of one bag ``(instances, features)`` adds to its score."""
        return self.model.attribution(self._scaled(bag))[0]

    def _scaled(self, bag: Tensor) -> Tensor:
        return ((bag - self.centre) / self.scale)[None]


class _Bags(nn.Module):
    """A model of bags as one of their numbers, so that a plain training loop may shuffle those."""

    def __init__(
        self,
        model: OTSurv,
        cohort: Cohort,
        centre: Tensor,
        scale: Tensor,
        max_instances: int,
        ramp: MassRamp | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.model, self.cohort, self.centre, self.scale = model, cohort, centre, scale
        self.max_instances, self.ramp, self.step = max_instances, ramp, 0
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, places: Tensor) -> Tensor:
        if self.ramp is not None:
            self.model.pool.set_mass(self.ramp(self.step))  # type: ignore[operator]
            self.step += 1
        bags = [self._part(self.cohort.bags[place]) for place in places.tolist()]
        sizes = torch.tensor([len(bag) for bag in bags])
        padded = (pad_sequence(bags, batch_first=True) - self.centre) / self.scale
        alike = bool((sizes == sizes[0]).all())
        return self.model(padded, None if alike else torch.arange(padded.shape[1]) < sizes[:, None])

    def _part(self, bag: Tensor) -> Tensor:
        if len(bag) <= self.max_instances:
            return bag
        return bag[torch.randperm(len(bag), generator=self.generator)[: self.max_instances]]


def _objective(loss: str) -> Callable[[Tensor, Tensor], Tensor]:
    def cox(scores: Tensor, target: Tensor) -> Tensor:
        time, event = target.unbind(1)
        return cox_ph_loss(scores, time, event) if bool(event.any()) else 0 * scores.sum()

    def hazards(scores: Tensor, target: Tensor) -> Tensor:
        return discrete_hazard_loss(scores, target[:, 0].long(), target[:, 1])

    return cox if loss == "cox" else hazards


def feature_scale(cohort: Cohort) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each feature over all instances, which may not fit into memory."""
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for bag in cohort.bags:
        wide = bag.double()
        count += len(bag)
        total = total + wide.sum(0)
        squares = squares + wide.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    # A feature that is the same everywhere says nothing, at any scale.
    return mean.float(), torch.where(deviation > 1e-6 * mean.abs(), deviation, 1.0).clamp_min(1e-30).float()


def fold_of(cohort: Cohort, folds: int, seed: int) -> Tensor:
    """Deal patients into folds, those with an event and those without by turns; return each bag's fold."""
    units = int(cohort.unit.max()) + 1
    seen = torch.zeros(units).index_add_(0, cohort.unit, cohort.event.float()) > 0
    order = torch.from_numpy(np.random.default_rng(seed).permutation(units))
    order = order[torch.argsort(seen[order].int(), descending=True, stable=True)]
    fold = torch.empty(units, dtype=torch.long)
    fold[order] = torch.arange(units) % folds
    return fold[cohort.unit]


@dataclasses.dataclass(frozen=True)
class SurvivalFolds:
    """A problem: cell ``seed`` is fold ``seed % folds`` of repeat ``seed // folds``; no fold splits a patient.

    Args:
        folder: Of feature files, or None for generated bags.
        table: Of times and events.
        slide: Column of the slides' names.
        time: Column of the times.
        event: Column of the events.
        patient: Column of the patients, or None.
        key: Name of the array within a file, or None.
        folds: Folds a repeat.
        seed: Shuffles the folds.
        content: Of :func:`minimand.bench.slides.folder_hash`, so that other data under the same names are another
            problem.
    """

    folder: str | None
    table: str | None
    slide: str | None
    time: str | None
    event: str | None
    patient: str | None
    key: str | None
    folds: int
    seed: int
    content: str = ""

    def __call__(self, source: Any, seed: int) -> SurvivalSplit:
        """Return the data of cell ``seed``."""
        cohort = self.everything()
        repeat, fold = divmod(seed, self.folds)
        test = fold_of(cohort, self.folds, self.seed * 10_007 + repeat) == fold
        return SurvivalSplit(cohort.take((~test).nonzero()[:, 0]), cohort.take(test.nonzero()[:, 0]))

    def everything(self) -> Cohort:
        """Return all bags, read once a process."""
        if self.folder is None:
            return bags_with_junk(200, instances=60, seed=0)
        if self.content != folder_hash(self.folder, str(self.table)):
            raise DataError(f"{self.folder} or {self.table} has changed since the comparison began: run it again")
        return _read(self)


@functools.lru_cache(maxsize=2)
def _read(problem: SurvivalFolds) -> Cohort:
    assert problem.folder is not None
    assert problem.table is not None
    assert problem.slide is not None
    assert problem.time is not None
    assert problem.event is not None
    return read_slides(
        problem.folder,
        problem.table,
        slide=problem.slide,
        time=problem.time,
        event=problem.event,
        patient=problem.patient,
        key=problem.key,
    )


@functools.lru_cache(maxsize=16)
def bags_with_junk(
    count: int, *, seed: int, instances: int = 150, features: int = 32, junk: tuple[float, float] = (0.1, 0.8),
    common: float = 2.0,
) -> Cohort:  # fmt: skip
    """Generate bags of which three of eight kinds of instance decide the risk and a large share is junk.

    Kinds have centres of standard normal numbers and noise of 0.7; their shares are Dirichlet around a long tail,
    halving from one to the next. Junk lies along one direction common to all bags, moved a little in each. The risk
    rises with the sixth and seventh kind's share before junk came in and falls with the fourth's.

    Args:
        count: Bags.
        seed: Decides all.
        instances: Of a bag.
        features: Of an instance.
        junk: Range of the share of a bag's instances that are junk.
        common: How far junk lies along its direction.
    """
    random = np.random.default_rng(seed)
    kinds = 8
    centres = random.normal(size=(kinds, features))
    tail = 2.0 ** -np.arange(kinds)
    shares = random.dirichlet(8 * tail / tail.sum() + 0.05, size=count)
    kind = (random.random((count, instances, 1)) > shares.cumsum(1)[:, None]).sum(2).clip(max=kinds - 1)
    bags = centres[kind] + 0.7 * random.normal(size=(count, instances, features))
    direction = random.normal(size=features)
    moved = common * direction + 0.3 * random.normal(size=(count, 1, features))
    noise = moved + 1.2 * random.normal(size=bags.shape)
    is_junk = random.random((count, instances)) < random.uniform(*junk, size=(count, 1))
    bags = np.where(is_junk[..., None], noise, bags)
    risk = 6 * np.sqrt(shares[:, 5] + shares[:, 6]) - 3 * np.sqrt(shares[:, 3])
    risk = 1.5 * (risk - risk.mean()) / risk.std()
    died = random.exponential(size=count) * np.exp(-risk)
    left = random.exponential(2.5 * np.median(died), size=count)
    return Cohort(
        list(torch.from_numpy(bags.astype(np.float32))),
        torch.from_numpy(np.minimum(died, left)),
        torch.from_numpy(died <= left),
        torch.arange(count),
        tuple(f"bag {number}" for number in range(count)),
    )


def full_transport(dim: int, prototypes: int) -> OTPool:
    """Build OTSurv's pool as its authors evaluate it, with all mass; in training the ramp sets the mass."""
    return OTPool(dim, num_prototypes=prototypes)


def partial_transport(mass: float, dim: int, prototypes: int) -> OTPool:
    """Build OTSurv's pool with the same share of mass in training and evaluation."""
    return OTPool(dim, num_prototypes=prototypes, mass=mass, eval_mass=mass)


def mean_pool(dim: int, prototypes: int) -> MeanPool:
    """Build the mean of a bag."""
    return MeanPool()


def attention_pool(dim: int, prototypes: int) -> AttentionPool:
    """Build gated attention, with as many hidden features as an instance has."""
    return AttentionPool(dim, hidden=dim)


def survival_study(
    folder: str | os.PathLike[str] | None = None,
    *,
    table: str | os.PathLike[str] | None = None,
    slide: str | None = None,
    time: str | None = None,
    event: str | None = None,
    patient: str | None = None,
    key: str | None = None,
    loss: str = "cox",
    dim: int | None = None,
    prototypes: int | None = None,
    epochs: int = 30,
    batch_size: int = 25,
    lr: float = 3e-3,
    max_instances: int = 2000,
    folds: int = 5,
    repeats: int = 2,
    seed: int = 0,
) -> Study:
    """Build the comparison of pools on a user's slides.

    Args:
        folder: Of one feature file a slide; None for generated bags, more than a third of which is junk.
        table: One slide a row, see :func:`minimand.bench.slides.read_slides`.
        slide: Column of the slides' names.
        time: Column of the times.
        event: Column of the events.
        patient: Column of the patients, whose slides no fold splits.
        key: Name of the array within a file; None for ``"features"``, or the only one.
        loss: ``"cox"`` or ``"hazards"``.
        dim: Features of an encoded instance; None for 256, or 32 for generated bags.
        prototypes: Of the pools that have any; None for 16, or 8 for generated bags.
        epochs: Passes over the training slides.
        batch_size: Slides a step.
        lr: Learning rate.
        max_instances: Instances of a slide in a training step.
        folds: Folds of the cross-validation, at least 2.
        repeats: How often the folds are drawn anew.
        seed: Seed of folds and training.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    if loss not in ("cox", "hazards"):
        raise DataError(f"--loss must be one of cox, hazards, got {loss!r}")
    if folds < 2:
        raise DataError(f"--folds must be at least 2, got {folds}")
    generated = folder is None
    recipe = SurvivalRecipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        dim=dim if dim is not None else 32 if generated else 256,
        prototypes=prototypes if prototypes is not None else 8 if generated else 16,
        loss=loss,
        max_instances=max_instances,
    )
    for value, option in (
        (repeats, "--repeats"),
        (epochs, "--epochs"),
        (batch_size, "--batch-size"),
        (lr, "--lr"),
        (recipe.dim, "--dim"),
        (recipe.prototypes, "--prototypes"),
        (max_instances, "--max-instances"),
    ):
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"{option} must be above 0, got {value}")
    if batch_size < 2 and loss == "cox":
        raise DataError("--batch-size must be at least 2 for Cox's loss, which compares the slides of a batch")
    if generated:
        problem = SurvivalFolds(None, None, None, None, None, None, None, folds, seed)
        named, data_key = "generated bags, 10 to 80 % junk", "generated bags"
    else:
        for option, given, meaning in (
            ("--table", table, "the table of times and events"),
            ("--id", slide, "which column names the slides"),
            ("--time", time, "which column holds the times"),
            ("--event", event, "which column says whether the event was seen"),
        ):
            if given is None:
                raise DataError(f"{option} is missing: {meaning}?")
        for path, kind in ((folder, pathlib.Path.is_dir), (table, pathlib.Path.is_file)):
            if not kind(pathlib.Path(str(path))):
                read_slides(str(folder), str(table), slide=str(slide), time=str(time), event=str(event))
        data_key = folder_hash(str(folder), str(table))
        columns = (slide, time, event, patient, key)
        problem = SurvivalFolds(str(folder), str(table), *columns, folds, seed, data_key)
        named = pathlib.Path(str(folder)).name
    cohort = problem.everything()
    patients, events = int(cohort.unit.max()) + 1, int(cohort.event.sum())
    # A fold needs two patients with an event, or there is hardly a pair to rank.
    if events < 2 * folds:
        raise DataError(f"--event: {events} events are too few for {folds} folds: at least {2 * folds} are needed")
    if patients < 4 * folds:
        raise DataError(f"{patients} patients are too few for {folds} folds: at least {4 * folds} are needed")
    described = f"{named}: {len(cohort):,} slides" + (f" of {patients:,} patients" if patient else "")
    return Study(
        method="compare survival",
        problem=problem,
        contenders={
            "mean pooling": PoolBags(mean_pool, recipe),
            "attention (ABMIL)": PoolBags(attention_pool, recipe),
            "OTSurv": PoolBags(full_transport, recipe, ramp=True),
            "OTSurv, mass 0.2": PoolBags(functools.partial(partial_transport, 0.2), recipe),
        },
        metrics=(C_INDEX, LOG_RANK),
        seeds=folds * repeats,
        test_train_ratio=1 / (folds - 1),
        about=f"{folds}-fold cross-validation over {'patients' if patient else 'slides'}, {repeats} times; "
        + ("Cox's partial likelihood" if loss == "cox" else "hazards of four time intervals"),
        notes="C-index: of pairs whose order in time is known, the share ranked rightly; 0.5 is chance. Log-rank p: "
        "between the halves of a test fold with higher and lower risk. All pools share encoder, head, optimizer, steps "
        "and learning rate, which was not tuned. OTSurv raises the share of instances it moves from a tenth to all and "
        "is tested with all, as its authors do; with mass 0.2 it keeps to the best-fitting fifth.",
        data=f"{described}, {events:,} events, {cohort.bags[0].shape[1]:,} features",
        data_key=data_key,
        settings={
            **dataclasses.asdict(recipe),
            "slide": slide,
            "time": time,
            "event": event,
            "patient": patient,
            "key": key,
            "folds": folds,
            "seed": seed,
        },
        presentation=Presentation(code=winner_code, figures=survival_figure),
    )


def winner_code(study: Study, winner: str) -> str:
    """Return about ten lines that train the winner on all slides and draw one slide's heat map."""
    problem: SurvivalFolds = study.problem  # type: ignore[assignment]
    chosen = {name: getattr(problem, name) for name in ("table", "slide", "time", "event", "patient", "key")}
    names = ("loss", "dim", "prototypes", "epochs", "batch_size", "lr", "max_instances")
    chosen |= {name: study.settings[name] for name in names}
    arguments = "".join(f", {name}={value!r}" for name, value in chosen.items() if value is not None)
    return "\n".join(
        [
            "from minimand.bench.survival import survival_study",
            "",
            f"study = survival_study({problem.folder!r}{arguments})",
            "cohort = study.problem.everything()",
            f"predict = study.contenders[{winner!r}].learn_from(cohort, seed={problem.seed})",
            "risk = predict(cohort)                       # one number a slide: the higher, the sooner",
            "heat = predict.heat_map(cohort.bags[0])      # what each tile of the first slide adds to its score",
        ]
    )


def risk_groups(record: dict[str, Any], contender: str, folds: int) -> dict[str, Tensor]:
    """Gather a contender's test predictions over one cross-validation: times, events and who was of higher risk."""
    cells = [cell for cell in record["cells"] if cell["contender"] == contender and cell["seed"] < folds]
    gathered = {
        name: [value for cell in cells for value in cell.get("details", {}).get(name, [])]
        for name in ("time", "event", "high")
    }
    return {
        "time": torch.tensor(gathered["time"], dtype=torch.float64),
        "event": torch.tensor(gathered["event"], dtype=torch.bool),
        "high": torch.tensor(gathered["high"], dtype=torch.bool),
    }


def survival_figure(study: Study, record: dict[str, Any]) -> list[dict[str, str]]:
    """Draw the recommended contender's Kaplan-Meier curves: test patients of higher and of lower predicted risk."""
    problem: SurvivalFolds = study.problem  # type: ignore[assignment]
    found = risk_groups(record, record["recommended"], problem.folds)
    time, event, high = found["time"], found["event"], found["high"]
    if not (bool(high.any()) and bool((~high).any()) and bool(event.any())):
        return []
    p = log_rank_test(time, event, high).p
    return [
        {
            "title": "Survival by predicted risk",
            "caption": f"{record['recommended']}: slides whose risk, predicted when they were held out, is above or "
            f"below the median of their fold, over one cross-validation; bands hold 95 % pointwise, ticks are "
            f"censored. Log-rank p {p:.2g}, which takes the predictions of the folds for independent.",
            "svg": _curves(time, event, high),
        }
    ]


def _curves(time: Tensor, event: Tensor, high: Tensor) -> str:
    from matplotlib.ticker import MaxNLocator

    left, top, width, height = 64, 12, 560, 260
    end = float(time.max()) or 1.0

    def x(value: float) -> float:
        return round(left + width * value / end, 1)

    def y(value: float) -> float:
        return round(top + height * (1 - value), 1)

    # Styles, not attributes: what the report's own style sheet says of paths would come before those.
    def path(line: str, style: str) -> str:
        return f'<path d="{line}" style="{style}"/>'

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(path(f"M{left} {y(share)}h{width}", "stroke:var(--line)"))
        parts.append(words(left - 10, y(share) + 4, f"{share:.0%}", anchor="end"))
    ticks = [float(tick) for tick in MaxNLocator(6).tick_values(0.0, end) if 0 <= tick <= end]
    below = top + height + 20
    parts += [words(x(tick), below, f"{tick:g}") for tick in ticks]
    parts.append(words(left - 20, below + 31, "at risk", anchor="end"))
    for row, (mine, colour, name) in enumerate(((high, "--bad", "higher risk"), (~high, "--good", "lower risk"))):
        curve = kaplan_meier(time[mine], event[mine])
        at = curve.time.tolist()
        middle, upper, lower = (
            list(zip(at, values.tolist(), strict=True)) for values in (curve.survival, curve.high, curve.low)
        )
        band = f"{_steps(x, y, upper)}{_back(x, y, lower)}Z"
        parts.append(path(band, f"fill:var({colour});stroke:none;opacity:0.14"))
        parts.append(path(_steps(x, y, middle), f"stroke:var({colour});stroke-width:2"))
        gone = set(time[mine & ~event].tolist())
        marks = "".join(f"M{x(moment)} {y(share) - 4}v8" for moment, share in middle if moment in gone)
        parts.append(path(marks, f"stroke:var({colour})"))
        down = below + 22 + 18 * row
        parts += [words(x(tick), down, str(int((time[mine] >= tick).sum())), colour=colour) for tick in ticks]
        parts.append(words(left + width, top + 16 + 18 * row, name, anchor="end", colour=colour))
    label = "Kaplan-Meier curves of slides with higher and lower predicted risk; below, how many are still at risk"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 16} {top + height + 70}" role="img" '
        f'aria-label="{label}" font-family="inherit" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


def _steps(x: Callable[[float], float], y: Callable[[float], float], points: list[tuple[float, float]]) -> str:
    return f"M{x(0.0)} {y(1.0)}" + "".join(f"H{x(at)}V{y(share)}" for at, share in points)


def _back(x: Callable[[float], float], y: Callable[[float], float], points: list[tuple[float, float]]) -> str:
    """Return along a step curve from its end to its beginning."""
    before = [1.0, *(share for _, share in points[:-1])]
    return "".join(f"V{y(share)}H{x(at)}V{y(was)}" for (at, share), was in zip(points[::-1], before[::-1], strict=True))


def _concordance(cohort: Cohort, risk: Tensor) -> float:
    try:
        return float(concordance_index(risk, cohort.time, cohort.event))
    except ValueError as error:
        if "comparable" not in str(error):
            raise
        return math.nan


def _measured(test: Cohort, risk: Tensor) -> tuple[dict[str, float], dict[str, Any], None, dict[str, Any]]:
    """Return an outcome's metrics, curves, seconds and details; a number that does not exist is left out."""
    checks.finite(risk, "the predicted risk")
    metrics = {}
    concordance = _concordance(test, risk)
    if math.isfinite(concordance):
        metrics[C_INDEX.name] = concordance
    high = risk > risk.median()
    if bool(high.any()) and bool(test.event.any()):
        metrics[LOG_RANK.name] = log_rank_test(test.time, test.event, high).p
    details = {
        "name": list(test.names),
        "risk": risk.double().tolist(),
        "time": test.time.tolist(),
        "event": test.event.tolist(),
        "high": high.tolist(),
    }
    return metrics, {}, None, details
