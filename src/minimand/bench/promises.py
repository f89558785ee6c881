"""The problem behind ``minimand compare bounds``: a trained model, and what is promised of its error."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import html
import importlib
import importlib.util
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from .. import training
from ..bounds import (
    binary_kl_inverse,
    generalization_measures,
    pac_bayes_bound,
    spectral_margin_bound,
    twin_audit,
)
from ..bounds.generalization_measures import MEASURES
from ..bounds.twin_audit import rows_among
from ..classifier import ObjectiveClassifier
from ..training import Recipe
from .label_noise import flip_uniformly
from .readers import DataError, content_hash, nearest, read_table, require_column
from .study import Metric, Outcome, Presentation, Run, Study

AT_BEST = "any measure at its best"
TRAINING, BOOTSTRAP, PAC_BAYES, SPECTRAL = "training error", "bootstrap", "PAC-Bayes bound", "spectral margin bound"
HOLD_OUT, HOLD_OUT_BOUND = "hold-out error", "hold-out bound"

METRICS = (
    Metric("off by, worse world", "lower is better", "%"),
    Metric("off by, real world", "lower is better", "%"),
    Metric("off by, twin world", "lower is better", "%"),
)

_FEWEST_UNSEEN = 20
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model, the rows it was trained on, and rows it has not seen.

    Args:
        model: In evaluation mode; scores ``(rows, classes)``.
        inputs: Training inputs.
        target: Training labels, class indices.
        fresh_inputs: Unseen inputs.
        fresh_target: Their labels.
        initial_state: The ``state_dict`` that training started from, or None.
        repeated: Unseen rows that were left out because their inputs are among the training rows.
    """

    model: nn.Module
    inputs: Tensor
    target: Tensor
    fresh_inputs: Tensor
    fresh_target: Tensor
    initial_state: Mapping[str, Tensor] | None = None
    repeated: int = 0


@dataclasses.dataclass(frozen=True)
class Halved:
    """One cell's data: half of the unseen rows are the truth, the other half is a hold-out.

    Args:
        trained: The model and its rows.
        truth: Inputs and labels that decide the true error.
        holdout: Inputs and labels that an estimate may look at.
        delta: Probability with which a bound may be wrong.
    """

    trained: TrainedModel
    truth: tuple[Tensor, Tensor]
    holdout: tuple[Tensor, Tensor]
    delta: float


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model and its rows come from; see :func:`bounds_study`."""

    model: str | None = None
    data: str | None = None
    target: str | None = None
    drop: tuple[str, ...] = ()
    test: str | None = None
    test_fraction: float | None = None
    weights: str | None = None
    initial: str | None = None
    factory: str | None = None

    def content(self) -> str:
        """Hash all that is read."""
        digest = hashlib.blake2b(digest_size=16)
        for path in (self.data, self.test, self.weights, self.initial):
            digest.update(content_hash(path).encode() + b"\0")
        if self.model is not None and os.path.isdir(self.model):
            for file in sorted(pathlib.Path(self.model).iterdir()):
                digest.update(file.name.encode() + b"\0" + content_hash(file).encode() + b"\0")
        for named in (self.model, self.factory):
            module = (named or "").partition(":")
            if module[1]:
                found = importlib.util.find_spec(module[0]) if _importable(module[0]) else None
                digest.update(content_hash(found.origin if found is not None else None).encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Halves:
    """A problem: cell ``seed`` halves the unseen rows at random.

    Args:
        source: Of the model and its rows; with no model a network on digits is trained anew for each seed.
        delta: Probability with which a bound may be wrong.
    """

    source: Source
    delta: float

    def __call__(self, source: Any, seed: int) -> Halved:
        """Return the data of cell ``seed``."""
        trained = noisy_digits(seed) if self.source.model is None else _read(self.source, self.source.content())
        rows = len(trained.fresh_target)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
        truth, holdout = order[: rows // 2], order[rows // 2 :]
        inputs, target = trained.fresh_inputs, trained.fresh_target
        return Halved(trained, (inputs[truth], target[truth]), (inputs[holdout], target[holdout]), self.delta)


@dataclasses.dataclass(frozen=True)
class Promise:
    """A contender: an estimate of the error from the model and its training rows.

    Args:
        estimate: From the cell's data to the number promised.
    """

    estimate: Callable[[Halved], float]

    def __call__(self, data: Halved, run: Run) -> Outcome:
        """Audit one cell."""
        promised = self.estimate(data)
        report = _audit(data, {"it": lambda *_: promised})
        row = report["it"]
        return _outcome(promised, row.error, row.twin_error, report.loss)


@dataclasses.dataclass(frozen=True)
class AtBest:
    """The baseline: what no function of the model and its training rows can do better than, in the worse world.

    The first cell also carries the values of all measures.
    """

    def __call__(self, data: Halved, run: Run) -> Outcome:
        """Audit one cell."""
        report = _audit(data, {})
        more = (
            {"measures": measure_values(data.trained), "training error": training_error(data)} if run.seed == 0 else {}
        )
        return _outcome(report.floor, report.floor, report.floor, report.loss, **more)


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """The control: an estimate that looks at fresh rows, which are labelled anew in the twin world.

    Args:
        bounded: Whether to report an upper bound instead of the rate.
    """

    bounded: bool = False

    def __call__(self, data: Halved, run: Run) -> Outcome:
        """Audit one cell."""
        report = _audit(data, {})
        row, rows = report["hold-out"], len(data.holdout[1])
        real, twin = row.estimate, row.twin_estimate
        if self.bounded:
            real, twin = (binary_kl_inverse(rate, math.log(1 / data.delta) / rows) for rate in (real, twin))
        return _outcome(real, abs(real - report.loss), abs(twin - report.twin_loss), report.loss)


def training_error(data: Halved) -> float:
    """Return the share of training rows that the model gets wrong."""
    trained = data.trained
    return float((_predicted(trained.model, trained.inputs) != trained.target).double().mean())


def bootstrap_error(data: Halved) -> float:
    """Return the 95 % quantile of the training error over resamples of the training rows."""
    rows = len(data.trained.target)
    wrong = round(training_error(data) * rows)
    return float(np.quantile(np.random.default_rng(0).binomial(rows, wrong / rows, _RESAMPLES), 0.95) / rows)


def pac_bayes_error(data: Halved) -> float:
    """Return the PAC-Bayes bound on the error of the model with noise."""
    trained = data.trained
    return pac_bayes_bound(
        trained.model, trained.inputs, trained.target, initial_state=trained.initial_state, delta=data.delta
    ).error


def spectral_error(data: Halved) -> float:
    """Return the spectral margin bound, at a margin that a tenth of the training rows beside the wrong ones miss."""
    trained = data.trained
    quantile = min(0.1 + training_error(data), 1.0)
    return spectral_margin_bound(
        trained.model, trained.inputs, trained.target, delta=data.delta, quantile=quantile
    ).error


def measure_values(trained: TrainedModel) -> dict[str, float | str]:
    """Compute every measure that exists for the model; for the others, why it does not."""
    found: dict[str, float | str] = {}
    for name in MEASURES:
        try:
            value = generalization_measures(
                trained.model, trained.inputs, trained.target, initial_state=trained.initial_state, names=[name]
            )
            found[name] = float(value[name].detach())
        except ValueError as error:
            found[name] = str(error)
    return found


def bounds_study(
    model: str | None = None,
    data: str | None = None,
    *,
    target: str | None = None,
    drop: Sequence[str] = (),
    test: str | None = None,
    test_fraction: float | None = None,
    weights: str | None = None,
    initial: str | None = None,
    factory: str | None = None,
    delta: float = 0.05,
) -> Study:
    """Build the audit of a trained model: what its bounds promise, in the real world and in the twin.

    Args:
        model: Folder saved by :meth:`minimand.ObjectiveClassifier.save`, or ``"package.module:factory"`` of a function
            without arguments that returns a trained ``nn.Module``; None for networks on digits with noisy labels.
        data: Table or NPZ of the rows that trained it.
        target: Name of the label column.
        drop: Columns to leave out.
        test: Table or NPZ of rows that it has not seen.
        test_fraction: Instead of ``test``: the share of ``data``'s last rows that the model was not trained on.
        weights: Safetensors file to load into the model of a factory.
        initial: Safetensors file of the weights that training started from.
        factory: What builds the network of a saved classifier of a custom model, ``"package.module:factory"``.
        delta: Probability with which a bound may be wrong.

    Raises:
        DataError: If something cannot be used, with one sentence that says why.
    """
    if not 0 < delta < 1:
        raise DataError(f"--delta must lie between 0 and 1, got {delta}")
    source = Source(model, data, target, tuple(drop), test, test_fraction, weights, initial, factory)
    notes = (
        "The twin world has the same inputs, labelled by the model itself wherever it was not trained. Training rows, "
        "training and every number computed from the model and its training rows are the same there, but the error is "
        "zero. So no such number is closer to the error than half of it in both worlds: that is the baseline, which "
        "would need to know the error to get there. This does not show that a measure is wrong on the data at hand, "
        "or ranks models badly: only that it is right by an assumption that excludes the twin. A bound is not refuted "
        f"by being far off; only its tightness is. Bounds hold with probability {1 - delta:.0%}; the PAC-Bayes bound "
        "is one on the model with noise on its weights. Half of the unseen rows stand for the truth, the others are "
        "the hold-out; both are the user's, so the truth is itself a sample."
    )
    if model is None:
        given = [
            name
            for name, value in (("--target", target), ("--test", test), ("--weights", weights), ("--initial", initial))
            if value is not None
        ]
        if given or data is not None:
            raise DataError(f"{given[0] if given else 'DATA'} needs a MODEL: name one, and the rows that trained it")
        described, spectral, ratio = "networks on digits, 300 rows, a fifth of all labels wrong", True, 2.5
    else:
        trained = _read(source, source.content())
        described = (
            f"{pathlib.Path(model).name}, trained on {len(trained.target):,} rows, {len(trained.fresh_target):,} unseen"
        )
        if trained.repeated:
            notes += f" {trained.repeated} unseen rows were left out: their inputs are among the training rows."
        spectral, ratio = _has_spectral_bound(trained), 1.0
    contenders: dict[str, Any] = {
        AT_BEST: AtBest(),
        TRAINING: Promise(training_error),
        BOOTSTRAP: Promise(bootstrap_error),
        PAC_BAYES: Promise(pac_bayes_error),
    }
    if spectral:
        contenders[SPECTRAL] = Promise(spectral_error)
    contenders |= {HOLD_OUT: HoldOut(), HOLD_OUT_BOUND: HoldOut(bounded=True)}
    return Study(
        method="compare bounds",
        problem=Halves(source, delta),
        contenders=contenders,
        metrics=METRICS,
        seeds=10,
        test_train_ratio=ratio,
        about="random halves of the unseen rows: one is the truth, the other the hold-out",
        notes=notes,
        data=described,
        data_key="noisy digits" if model is None else source.content(),
        settings={"delta": delta, **({} if model is None else dataclasses.asdict(source))},
        presentation=Presentation(
            figures=audit_figure, summary=lambda _, record: audit_summary(record), lines=audit_lines
        ),
    )


def audit_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what the cells say of the model: its errors, the floor, each promise, each measure.

    Args:
        record: Of a run of :func:`bounds_study`.

    Returns:
        ``"training error"``, ``"error"``, ``"floor"``, ``"promises"`` (name to its mean), ``"vacuous"`` (names of
        bounds that promise nothing), ``"measures"`` and ``"advice"``.
    """
    cells = [cell for cell in record["cells"] if "details" in cell]
    losses = [cell["details"]["error"] for cell in cells if cell["contender"] == AT_BEST]
    first: Mapping[str, Any] = next((cell["details"] for cell in cells if "measures" in cell["details"]), {})
    promises = {}
    for name in record["contenders"]:
        values = [cell["details"]["promise"] for cell in cells if cell["contender"] == name]
        if name != AT_BEST and values:
            promises[name] = sum(values) / len(values)
    error = sum(losses) / len(losses) if losses else math.nan
    floor = error / 2
    bound = promises.get(HOLD_OUT_BOUND)
    advice = (
        f"Trust no number computed from the model and its training rows to within {100 * floor:.1f} points, whatever "
        f"it promises"
    )
    if bound is not None:
        advice += f"; report the bound from unseen rows, an error of at most {100 * bound:.1f} %."
    return {
        "training error": first.get("training error"),
        "error": error,
        "floor": floor,
        "promises": promises,
        "vacuous": [name for name in (PAC_BAYES, SPECTRAL) if promises.get(name, 0.0) >= 1 - 1e-6],
        "measures": first.get("measures", {}),
        "advice": advice,
    }


def audit_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the summary as rows of a table, names and numbers."""
    rows = [
        ("held-out error", f"{100 * summary['error']:.1f} %"),
        ("floor in the worse world", f"{100 * summary['floor']:.1f} %"),
    ]
    for name, value in summary["promises"].items():
        vacuous = ", vacuous" if name in summary["vacuous"] else ""
        rows.append((name, f"{100 * value:.1f} %{vacuous}"))
    for name in MEASURES:  # in their own order, which a store does not keep
        if name in summary["measures"]:
            value = summary["measures"][name]
            rows.append((name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else "-"))
    return rows


def audit_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines that a terminal shows of an audit: its rows, and the advice."""
    rows = audit_rows(summary)
    wide = max(len(name) for name, _ in rows)
    return [*(f"{name:{wide}}  {value}" for name, value in rows), "", summary["advice"]]


def audit_figure(study: Study, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Draw the promises and measures as a table for the report."""
    summary = audit_summary(record)
    rows = audit_rows(summary)
    height = 22
    lines = [
        f'<text x="8" y="{height * place + 16}">{html.escape(name)}</text>'
        f'<text x="472" y="{height * place + 16}" text-anchor="end">{html.escape(value)}</text>'
        for place, (name, value) in enumerate(rows)
    ]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 {height * len(rows) + 8}" role="img" '
        f'font-family="inherit" font-size="13" fill="currentColor">{"".join(lines)}</svg>'
    )
    return [
        {
            "title": "What is promised, and every measure",
            "caption": f"{summary['advice']} Measures are of the first cell's model; none is an error rate, and the "
            f"best possible reading of any of them is the baseline.",
            "svg": svg,
        }
    ]


@functools.lru_cache(maxsize=16)
def noisy_digits(seed: int) -> TrainedModel:
    """Train a network on 300 digits to zero training error, a fifth of all labels, unseen ones too, being wrong.

    Args:
        seed: Decides the split, the wrong labels and the network.
    """
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32)
    labels = flip_uniformly(torch.tensor(digits), 0.2, 10, seed=seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, fresh = order[:300], order[300:]
    model = training.seeded(lambda: training.mlp(64, 10), seed)
    start = copy.deepcopy(model.state_dict())
    recipe = Recipe(epochs=400, batch_size=50, lr=3e-3, weight_decay=0.0, schedule="constant")

    def fitted(epoch: int, loss: float) -> bool:
        return loss < 0.005

    training.fit(
        model, nn.CrossEntropyLoss(), images[train], labels[train], recipe=recipe, seed=seed, after_epoch=fitted
    )
    return TrainedModel(model, images[train], labels[train], images[fresh], labels[fresh], start)


def _audit(data: Halved, measures: Mapping[str, Any]) -> Any:
    trained = data.trained
    return twin_audit(
        trained.model,
        trained.inputs,
        trained.target,
        population=data.truth,
        holdout=data.holdout,
        measures=measures,
        misfits="unseen",
    )


def _outcome(promise: float, real: float, twin: float, error: float, **details: Any) -> Outcome:
    values = (max(real, twin), real, twin)
    return Outcome(
        {metric.name: value for metric, value in zip(METRICS, values, strict=True)},
        details={"promise": promise, "error": error, **details},
    )


def _has_spectral_bound(trained: TrainedModel) -> bool:
    try:
        spectral_error(Halved(trained, _NOTHING, _NOTHING, 0.05))
    except ValueError:
        return False
    return True


_NOTHING = (torch.empty(0), torch.empty(0))


@torch.no_grad()
def _predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in inputs.split(4096)])


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@functools.lru_cache(maxsize=2)
def _read(source: Source, content: str) -> TrainedModel:
    """Read a model and its rows; keyed by content as well, so that what was written anew is read anew."""
    assert source.model is not None
    if source.data is None:
        raise DataError("DATA is needed: the rows that the model was trained on")
    if source.test is not None and source.test_fraction is not None:
        raise DataError("--test and --test-fraction exclude each other")
    if source.test is None and source.test_fraction is None:
        raise DataError(
            "no unseen rows were given, and without them nothing is known of the error: name a file of them with "
            "--test, or with --test-fraction the share of DATA's last rows that the model was not trained on"
        )
    if source.test_fraction is not None and not 0 < source.test_fraction < 1:
        raise DataError(f"--test-fraction must lie between 0 and 1, got {source.test_fraction}")
    if os.path.isdir(source.model):
        model, load = _saved(source)
    else:
        model, load = _from_factory(source)
    inputs, target = load(source.data)
    if source.test is not None:
        fresh_inputs, fresh_target = load(source.test)
    else:
        assert source.test_fraction is not None
        count = len(target) - round(source.test_fraction * len(target))
        inputs, fresh_inputs = inputs[:count], inputs[count:]
        target, fresh_target = target[:count], target[count:]
    if len(target) < 2:
        raise DataError(f"{source.data} leaves {len(target)} training rows: at least 2 are needed")
    if fresh_inputs.shape[1:] != inputs.shape[1:]:
        raise DataError(
            f"training rows have shape {tuple(inputs.shape[1:])}, unseen ones {tuple(fresh_inputs.shape[1:])}"
        )
    kept = ~rows_among(fresh_inputs, inputs)
    repeated = int((~kept).sum())
    if int(kept.sum()) < _FEWEST_UNSEEN:
        left = f", of which {repeated} have inputs that are among the training rows" if repeated else ""
        raise DataError(f"{len(fresh_target)} unseen rows were given{left}: at least {_FEWEST_UNSEEN} are needed")
    _check_scores(model, inputs, torch.cat([target, fresh_target[kept]]), source)
    initial = None if source.initial is None else _tensors(source.initial, "--initial")
    if initial is not None:
        _load(copy.deepcopy(model), initial, "--initial")
    return TrainedModel(model, inputs, target, fresh_inputs[kept], fresh_target[kept], initial, repeated)


Loader = Callable[[str], tuple[Tensor, Tensor]]


def _saved(source: Source) -> tuple[nn.Module, Loader]:
    """Load a folder that ObjectiveClassifier.save wrote, and what turns a table into its inputs."""
    if source.weights is not None:
        raise DataError("--weights is for a MODEL given as package.module:factory; a saved classifier has its own")
    try:
        classifier = ObjectiveClassifier.load(str(source.model), model=source.factory)
    except DataError:
        raise
    except Exception as error:  # a damaged folder can fail in JSON, safetensors, skops or torch
        raise DataError(f"cannot load {source.model}: {' '.join(str(error).split())[:300]}") from error

    def load(path: str) -> tuple[Tensor, Tensor]:
        frame, labels = _table(path, source)
        names = list(getattr(classifier, "feature_names_in_", []))
        if names:
            for name in names:
                require_column(frame, name, f"{pathlib.Path(path).name} does not fit the model")
            frame = frame.select(names)
        elif frame.width != classifier.n_features_in_:
            raise DataError(
                f"{pathlib.Path(path).name} has {frame.width} columns besides the target, the model was trained on "
                f"{classifier.n_features_in_}: leave others out with --drop"
            )
        else:
            frame = frame.rename(dict(zip(frame.columns, classifier.encoder_.columns_, strict=True)))
        known = {str(label): place for place, label in enumerate(classifier.classes_.tolist())}
        found = [known.get(str(label)) for label in labels.to_list()]
        if None in found:
            stranger = labels.to_list()[found.index(None)]
            raise DataError(
                f"{pathlib.Path(path).name} holds the label {stranger!r}, which the model does not know: its classes "
                f"are {', '.join(list(known)[:12])}"
            )
        try:
            encoded = classifier.encoder_.transform(frame)
        except Exception as error:  # polars and scikit-learn raise many kinds; a user needs the sentence
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{pathlib.Path(path).name} does not fit the model: {reason}") from error
        return torch.from_numpy(encoded), torch.tensor(found)

    return classifier.model_.eval(), load


def _from_factory(source: Source) -> tuple[nn.Module, Loader]:
    """Call a user's factory; its model takes the table's numbers, or an NPZ's arrays, as they are."""
    named = str(source.model)
    if ":" not in named:
        near = "" if not os.path.exists(named) else ", and this is a file"
        raise DataError(
            f"MODEL must be a folder that ObjectiveClassifier.save wrote, or package.module:factory, "
            f"got {named!r}{near}"
        )
    if source.factory is not None:
        raise DataError("--factory is for a saved classifier; name the factory as MODEL")
    try:
        build: Callable[[], nn.Module] = training.model_factory(named)  # type: ignore[assignment]  # takes no shapes
        model = build()
    except Exception as error:  # the user's own code may raise anything
        raise DataError(f"MODEL: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(model, nn.Module):
        raise DataError(f"MODEL: {named} must return a torch.nn.Module, got {type(model).__name__}")
    if source.weights is not None:
        _load(model, _tensors(source.weights, "--weights"), "--weights")

    def load(path: str) -> tuple[Tensor, Tensor]:
        inputs, labels = _arrays(path) if path.lower().endswith(".npz") else _numbers(path, source)
        name = pathlib.Path(path).name
        if not np.isfinite(inputs).all():
            raise DataError(f"{name} holds {int((~np.isfinite(inputs)).sum())} inputs that are missing or infinite")
        if labels.dtype.kind not in "iuf" or (labels != np.round(labels)).any() or (labels < 0).any():
            raise DataError(f"{name}: the target of a model given as a factory must hold class indices 0, 1, ...")
        return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))

    return model.eval(), load


def _table(path: str, source: Source) -> tuple[pl.DataFrame, pl.Series]:
    frame = read_table(path)
    target = source.target
    if target is None:
        if not path.lower().endswith(".npz"):
            raise DataError("--target is needed: the column of labels")
        target = "y"
    require_column(frame, target, "--target")
    for name in source.drop:
        require_column(frame, name, "--drop")
    labels = frame[target]
    if labels.null_count():
        raise DataError(f"{pathlib.Path(path).name}: column {target!r} has {labels.null_count()} missing labels")
    return frame.drop([target, *source.drop]), labels


def _numbers(path: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
    frame, labels = _table(path, source)
    for name in frame.columns:
        if not (frame[name].dtype.is_numeric() or frame[name].dtype == pl.Boolean):
            raise DataError(f"column {name!r} holds no numbers, which a model given as a factory takes: --drop it")
    return frame.cast(pl.Float64).fill_null(math.nan).to_numpy(), labels.to_numpy()


def _arrays(path: str) -> tuple[np.ndarray, np.ndarray]:
    file = pathlib.Path(path)
    if not file.is_file():
        near = nearest(file.name, (other.name for other in file.parent.iterdir())) if file.parent.is_dir() else ""
        raise DataError(f"no such file: {file}{near}")
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file.name} is not an NPZ file")
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except ValueError:
        raise DataError(f"{file.name} holds pickled objects, which can run code when read: save plain arrays") from None
    if not {"X", "y"} <= set(arrays):
        raise DataError(f"{file.name} must hold arrays 'X' and 'y', it holds {', '.join(arrays) or 'none'}")
    inputs, labels = arrays["X"], arrays["y"]
    if inputs.dtype.kind not in "iufb" or labels.ndim != 1 or len(labels) != len(inputs) or inputs.ndim < 2:
        raise DataError(
            f"{file.name}: X must hold numbers, one row or more a label of y, got X {inputs.dtype} of shape "
            f"{inputs.shape} and y of shape {labels.shape}"
        )
    return inputs, labels


def _tensors(path: str, option: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise DataError(f"{option}: no such file: {path}")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises a kind of its own for what is no such file
        raise DataError(f"{option}: {path} is no safetensors file: {error}") from error


def _load(model: nn.Module, tensors: Mapping[str, Tensor], option: str) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{option} does not fit the model: {' '.join(str(error).split())[:300]}") from error


@torch.no_grad()
def _check_scores(model: nn.Module, inputs: Tensor, labels: Tensor, source: Source) -> None:
    try:
        scores = model(inputs[:2])
    except Exception as error:  # a network may fail on a wrong shape in any way
        raise DataError(
            f"the model cannot read rows of shape {tuple(inputs.shape[1:])}: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < 2:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(f"the model must return scores (rows, classes) of at least 2 classes, got {shape}")
    if int(labels.max()) >= scores.shape[1]:
        raise DataError(
            f"the target holds class {int(labels.max())}, the model scores {scores.shape[1]} classes from 0"
        )
