"""The problem behind ``minimand compare classify``: a table, a label column, and every objective that may suit it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from .. import training
from ..tables import TableEncoder
from ..training import Recipe
from .classification import METRICS, Range, Split, TrainClassifier
from .label_noise import flip_uniformly
from .readers import DataError, content_hash, nearest, read_table, require_column, require_content
from .study import Presentation, Study
from .tuning import tuned

BUILT_IN_NOISE = 0.3


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective as a contender: what to build, and the line a user writes to build it.

    Args:
        loss: ``"module:Class"`` of the loss.
        arguments: Its arguments.
        risk: ``"module:Class"`` of a risk that replaces the mean, or None.
        risk_arguments: The risk's arguments.
        sized: Whether the loss is built for a number of classes (``Class.for_classes(num_classes, ...)``).
        space: What tuning may set, by name of the loss's argument (or the risk's, where there is a risk).
        min_classes: The fewest classes the loss is defined for.
    """

    loss: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    risk: str | None = None
    risk_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sized: bool = False
    space: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    min_classes: int = 2

    def __call__(self, num_classes: int, **settings: float) -> nn.Module:
        """Build the loss for ``num_classes`` classes."""
        for_risk = settings if self.risk else {}
        for_loss = {} if self.risk else settings
        kind = _look_up(self.loss)
        make = functools.partial(kind.for_classes, num_classes) if self.sized else kind
        loss = make(**{**self.arguments, **for_loss})
        if self.risk is None:
            return loss
        return training.with_risk(loss, _look_up(self.risk)(**{**self.risk_arguments, **for_risk}))

    def imports(self) -> list[str]:
        """Return the import lines of :meth:`expression`."""
        lines = []
        for path in filter(None, (self.loss, self.risk)):
            module, name = path.split(":")
            lines.append(f"from {module} import {name}")
        return lines

    def expression(self, num_classes: int) -> str:
        """Return the arguments of ObjectiveClassifier that train with this objective."""
        name = self.loss.split(":")[1]
        call = f"{name}.for_classes" if self.sized else name
        first = [str(num_classes)] if self.sized else []
        text = f"loss={call}({', '.join(first + _keywords(self.arguments))})"
        if self.risk is not None:
            text += f", risk={self.risk.split(':')[1]}({', '.join(_keywords(self.risk_arguments))})"
        return text


_LOSSES, _RISKS, _TORCH = "minimand.losses", "minimand.risks", "torch.nn"

BASELINES: dict[str, Objective] = {
    "cross-entropy": Objective(f"{_TORCH}:CrossEntropyLoss"),
    "label-smoothing": Objective(
        f"{_TORCH}:CrossEntropyLoss", {"label_smoothing": 0.1}, space={"label_smoothing": Range(0.01, 0.5)}
    ),
    "focal": Objective(f"{_LOSSES}:FocalLoss", {"gamma": 2.0}, space={"gamma": Range(0.5, 5.0)}),
    "generalized-cross-entropy": Objective(
        f"{_LOSSES}:GeneralizedCrossEntropyLoss", {"q": 0.7}, space={"q": Range(0.1, 1.0)}
    ),
    "symmetric-cross-entropy": Objective(
        f"{_LOSSES}:SymmetricCrossEntropyLoss", {"alpha": 0.1, "beta": 1.0}, space={"alpha": Range(0.01, 1.0, log=True)}
    ),
    "mae": Objective(f"{_LOSSES}:MeanAbsoluteErrorLoss"),
}

METHODS: dict[str, Objective] = {
    "comp-sum": Objective(f"{_LOSSES}:CompSumLoss", {"tau": 1.5}, space={"tau": Range(0.5, 1.9)}),
    "ldr-kl": Objective(
        f"{_LOSSES}:LDRKLLoss",
        {"temperature": 10.0, "normalize": "softplus"},
        space={"temperature": Range(0.3, 30.0, log=True)},
    ),
    "aldr-kl": Objective(
        f"{_LOSSES}:ALDRKLLoss", {"temperature": 10.0}, space={"temperature": Range(0.3, 30.0, log=True)}
    ),
    "ensloss": Objective(f"{_LOSSES}:EnsLoss"),
    "tempnet": Objective(f"{_LOSSES}:RobustTemperatureLoss", sized=True),
    "z-loss": Objective(
        f"{_LOSSES}:ZLoss",
        {"sharpness": 1.0, "margin": 10.0},
        space={"margin": Range(1.0, 30.0, log=True)},
        min_classes=3,
    ),
    "loss-reweighting": Objective(
        f"{_TORCH}:CrossEntropyLoss",
        risk=f"{_RISKS}:DynamicLossReweighting",
        risk_arguments={"strategy": "linupper", "temperature": 1.0},
        space={"temperature": Range(0.2, 5.0, log=True)},
    ),
    "saf": Objective(f"{_LOSSES}:SAFLoss", {"strength": 0.3}, space={"strength": Range(0.05, 2.0, log=True)}),
    "mesa": Objective(f"{_LOSSES}:MESALoss", {"strength": 0.8}, space={"strength": Range(0.05, 2.0, log=True)}),
}

# Not in the default line-up; named by --contenders.
FURTHER: dict[str, Objective] = {
    "taylor-softmax": Objective(f"{_LOSSES}:TaylorSoftmaxLoss"),
    "cvar": Objective(
        f"{_TORCH}:CrossEntropyLoss",
        risk=f"{_RISKS}:CVaR",
        risk_arguments={"level": 0.5},
        space={"level": Range(0.1, 0.95)},
    ),
    "kl-dro": Objective(
        f"{_TORCH}:CrossEntropyLoss",
        risk=f"{_RISKS}:KLDRO",
        risk_arguments={"radius": 0.1},
        space={"radius": Range(0.01, 1.0, log=True)},
    ),
    "chi-square-dro": Objective(
        f"{_TORCH}:CrossEntropyLoss",
        risk=f"{_RISKS}:ChiSquareDRO",
        risk_arguments={"radius": 0.1},
        space={"radius": Range(0.01, 1.0, log=True)},
    ),
}

OBJECTIVES: dict[str, Objective] = {**BASELINES, **METHODS, **FURTHER}


@dataclasses.dataclass(frozen=True)
class LabelledTable:
    """A table with its labels taken out.

    Args:
        frame: The features.
        labels: ``(rows,)`` class numbers.
        classes: Name of each class, in the order of its number.
        groups: ``(rows,)`` group numbers, or None.
        name: What the table is called.
        shape: Shape of one input, when it has more than one dimension.
    """

    frame: pl.DataFrame
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: NDArray[np.int64] | None
    name: str

    def describe(self) -> str:
        """Say what the table is in a few words."""
        return f"{self.name}: {self.frame.height:,} rows, {self.frame.width:,} columns, {len(self.classes)} classes"


def label_table(
    path: str | None, *, target: str | None = None, drop: Sequence[str] = (), group: str | None = None
) -> LabelledTable:
    """Read a table and take its labels out.

    Args:
        path: The file; None for scikit-learn's digits.
        target: The label column. None: ``y`` of an NPZ.
        drop: Columns to leave out.
        group: A column whose rows of equal value must not be split between training and test data.

    Raises:
        DataError: If the table cannot be learnt from, with one sentence that says why.
    """
    if path is None:
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        frame = pl.DataFrame(images, schema=[f"pixel{place}" for place in range(64)], orient="row")
        frame, target, name = frame.with_columns(pl.Series("digit", digits)), "digit", "digits"
    else:
        frame, name = read_table(path), pathlib.Path(path).name
        if target is None:
            if not path.lower().endswith(".npz"):
                raise DataError(f"--target is missing: which column of {name} is the label?")
            target = "y"
    require_column(frame, target, "--target")
    # "a,b" drops two columns, unless one is really called that.
    drop = [name for entry in drop for name in ([entry] if entry in frame.columns else entry.split(","))]
    for column in drop:
        require_column(frame, column, "--drop")
    if group is not None:
        require_column(frame, group, "--group")
    if target in drop or target == group:
        raise DataError(f"column {target!r} cannot be the target and be {'dropped' if target in drop else 'the group'}")
    labels, classes = _labels(frame[target])
    groups = None
    if group is not None:
        if frame[group].null_count():
            raise DataError(f"--group: column {group!r} has {frame[group].null_count()} missing values")
        groups = frame[group].rank("dense").cast(pl.Int64).to_numpy() - 1
    features = frame.drop([target, *drop, *([group] if group is not None else [])])
    _check_features(features, name)
    return LabelledTable(features, labels, classes, groups, name)


@dataclasses.dataclass(frozen=True)
class TableFolds:
    """A problem: cell ``seed`` is fold ``seed % folds`` of repeat ``seed // folds`` of stratified cross-validation.

    The encoder learns from a cell's training rows only, and label noise is injected into them only.

    Args:
        path: The file, or None for the built-in digits.
        target: The label column.
        drop: Columns left out.
        group: Column whose groups are not split.
        folds: Folds a repeat.
        noise: Share of training labels replaced by another class.
        seed: Shuffles the folds and draws the noise.
        content: Hash of the file's content, so that another table under the same name is another problem.
    """

    path: str | None
    target: str | None
    drop: tuple[str, ...]
    group: str | None
    folds: int
    noise: float
    seed: int
    content: str = ""

    def __call__(self, source: Any, seed: int) -> Split:
        """Return the data of cell ``seed``."""
        return _split(self, seed)

    def table(self) -> LabelledTable:
        """Read the table, once a process."""
        return _table(self.path, self.target, self.drop, self.group, self.content)


def classify_study(
    path: str | None = None,
    *,
    target: str | None = None,
    drop: Sequence[str] = (),
    group: str | None = None,
    model: str = "mlp",
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 2e-3,
    folds: int = 5,
    repeats: int = 2,
    tune: int = 0,
    noise: float | None = None,
    metric: str = "accuracy",
    contenders: Sequence[str] | None = None,
    seed: int = 0,
) -> Study:
    """Build the comparison of classification objectives on a user's table.

    Args:
        path: CSV, TSV, Parquet, JSON lines or NPZ; None for scikit-learn's digits with 30 % label noise.
        target: The label column.
        drop: Columns to leave out.
        group: A column whose groups must not be split between training and test data.
        model: ``"linear"``, ``"mlp"``, or ``"package.module:factory"``, called with features and classes.
        epochs: Passes over the training data, the same for all.
        batch_size: Examples a step.
        lr: Learning rate, where it is not tuned.
        folds: Folds of the cross-validation, at least 2.
        repeats: How often the folds are drawn anew.
        tune: Trials of tuning for each contender; 0 for each one's defaults.
        noise: Share of training labels replaced by another class; None for 0.3 on the built-in data, else 0.
        metric: What decides.
        contenders: Names; None for all baselines and methods.
        seed: Seed of folds, noise and training.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    order = _metric_order(metric)
    if folds < 2:
        raise DataError(f"--folds must be at least 2, got {folds}")
    if repeats < 1:
        raise DataError(f"--repeats must be at least 1, got {repeats}")
    if seed < 0:
        raise DataError(f"--seed must be at least 0, got {seed}")
    if tune < 0:
        raise DataError(f"--tune must be at least 0, got {tune}")
    level = (BUILT_IN_NOISE if path is None else 0.0) if noise is None else noise
    if not 0 <= level < 1:
        raise DataError(f"--noise must be at least 0 and below 1, got {level}")
    problem = TableFolds(path, target, tuple(drop), group, folds, level, seed, content_hash(path))
    table = problem.table()
    _check_folds(table, folds)
    chosen = _line_up(contenders, len(table.classes))
    try:
        factory = training.model_factory(model)
        recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr)
    except ValueError as error:
        raise DataError(f"--{error}") from None
    if factory not in (training.linear, training.mlp):
        _check_model(factory, model, problem(None, 0))
    trained = {
        name: TrainClassifier(OBJECTIVES[name], make_model=factory, recipe=recipe, space=OBJECTIVES[name].space)
        for name in chosen
    }
    built_in = path is None
    return Study(
        method="compare classify",
        problem=problem,
        contenders={
            name: tuned(one, tune, seed=seed, metric=order[0]) if tune else one for name, one in trained.items()
        },
        metrics=order,
        seeds=folds * repeats,
        test_train_ratio=1 / (folds - 1),
        about=f"{folds}-fold cross-validation, {repeats} times" + (f", folds grouped by {group}" if group else ""),
        notes="Training labels only were made wrong; the labels that test the models were left as they are."
        if level
        else "",
        data=table.describe() + (f", {100 * level:g} % of the training labels made wrong" if level else ""),
        data_key="digits" if built_in else problem.content,
        settings={
            "target": target,
            "drop": sorted(drop),
            "group": group,
            "model": model,
            "model_code": model_code(factory),
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "folds": folds,
            "tune": tune,
            "noise": level,
            "seed": seed,
            "selected on": order[0].name if tune else None,
        },
        presentation=Presentation(code=winner_code),
    )


def model_code(factory: Callable[..., Any]) -> str:
    """Hash the file that a user's model factory lies in, so that its cells are run again when it changes."""
    if factory in (training.linear, training.mlp):
        return ""
    try:
        source = inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:  # built into the interpreter, so its code does not change
        return ""
    return hashlib.blake2b(pathlib.Path(source).read_bytes(), digest_size=8).hexdigest() if source else ""


def winner_code(study: Study, winner: str) -> str:
    """Return about ten lines that train the winner on all of the data."""
    problem: TableFolds = study.problem  # type: ignore[assignment]
    objective, settings = OBJECTIVES[winner], study.settings
    lines = ["from minimand import ObjectiveClassifier", *objective.imports()]
    if problem.path is None:
        lines += ["from sklearn.datasets import load_digits", "", "features, labels = load_digits(return_X_y=True)"]
    elif problem.path.lower().endswith(".npz"):
        lines += [
            "import numpy as np",
            "",
            f"data = np.load({problem.path!r})",
            'features, labels = data["X"], data["y"]',
        ]
    else:
        left_out = [problem.target, *problem.drop, *([problem.group] if problem.group else [])]
        lines += [
            "from minimand.bench.readers import read_table",
            "",
            f"table = read_table({problem.path!r})",
            f"features, labels = table.drop({left_out!r}), table[{problem.target!r}]",
        ]
    model = settings["model"]
    lines += [
        f"model = ObjectiveClassifier({objective.expression(len(problem.table().classes))}, model={model!r}, "
        f"epochs={settings['epochs']}, batch_size={settings['batch_size']}, lr={settings['lr']})",
        "model.fit(features, labels)",
        'model.save("classifier")',
    ]
    return "\n".join(sorted(set(lines[: lines.index("")])) + lines[lines.index("") :])


def _line_up(names: Sequence[str] | None, num_classes: int) -> list[str]:
    if names is None:
        # A loss that two classes do not suffice for is nobody's choice: it is left out, not failed.
        return [name for name in (*BASELINES, *METHODS) if num_classes >= OBJECTIVES[name].min_classes]
    for name in names:
        if name not in OBJECTIVES:
            near = nearest(name, OBJECTIVES)
            raise DataError(f"--contenders: {name!r} is unknown{near or '; known are ' + ', '.join(OBJECTIVES)}")
    for name in names:
        fewest = OBJECTIVES[name].min_classes
        if num_classes < fewest:
            raise DataError(f"--contenders: {name} needs at least {fewest} classes, the target has {num_classes}")
    # The catalogue's order puts baselines first, whatever order they were named in.
    chosen = [name for name in OBJECTIVES if name in names]
    if not chosen:
        raise DataError("--contenders names nobody")
    return chosen


def _metric_order(name: str) -> tuple[Any, ...]:
    known = {metric.name.casefold(): metric for metric in METRICS}
    first = known.get(name.replace("-", " ").replace("_", " ").casefold()) or known.get(name.casefold())
    if first is None:
        near = nearest(name, [metric.name for metric in METRICS])
        listed = ", ".join(metric.name for metric in METRICS)
        raise DataError(f"--metric: {name!r} is unknown{near or '; known are ' + listed}")
    return (first, *(metric for metric in METRICS if metric is not first))


def _labels(column: pl.Series) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    name = column.name
    if column.dtype.is_float():
        column = column.fill_nan(None)
    missing = column.null_count()
    if missing:
        rows = (np.flatnonzero(column.is_null().to_numpy()) + 1)[:3]
        shown = ", ".join(str(row) for row in rows) + (", ..." if missing > 3 else "")
        raise DataError(
            f"target {name!r} has {missing} missing labels (rows {shown}): fill them or leave those rows out"
        )
    if column.dtype.is_nested():
        raise DataError(f"target {name!r} holds lists, not labels")
    values = column.unique().sort()
    if len(values) == 1:
        raise DataError(f"target {name!r} has one class only, {values[0]!r}: there is nothing to tell apart")
    if column.dtype.is_float() and not bool((values == values.round()).all()) and len(values) > 20:
        raise DataError(
            f"target {name!r} holds {len(values):,} distinct fractions: a quantity, not a class; bin it first"
        )
    if len(values) > max(1000, len(column) // 3):
        raise DataError(f"target {name!r} has {len(values):,} classes in {len(column):,} rows: is it an identifier?")
    classes = tuple(str(value) for value in values)
    numbers = column.replace_strict(values, pl.Series(range(len(values))), return_dtype=pl.Int64)
    return numbers.to_numpy(), classes


def _check_features(features: pl.DataFrame, name: str) -> None:
    if features.width == 0:
        raise DataError(f"{name} has no column left to learn from")
    counts = features.select(
        pl.col(column).fill_nan(None).null_count() if features[column].dtype.is_float() else pl.col(column).null_count()
        for column in features.columns
    ).row(0)
    empty = [column for column, count in zip(features.columns, counts, strict=True) if count == features.height]
    if empty:
        options = " ".join(f"--drop {column!r}" if " " in column else f"--drop {column}" for column in empty[:5])
        raise DataError(f"column {empty[0]!r} has no values at all: leave it out with {options}")
    nested = [column for column in features.columns if features[column].dtype.is_nested()]
    if nested:
        raise DataError(f"column {nested[0]!r} holds lists or structures: unpack it, or leave it out with --drop")
    if all(features[column].n_unique() == 1 for column in features.columns):
        raise DataError(f"{name} is constant: no column has two different values, so there is nothing to learn from")


def _check_model(factory: Callable[[Any, int], Any], name: str, split: Split) -> None:
    """Build a user's model once, before any training, and see that it scores the classes of a row."""
    features, classes = split.train_inputs.shape[1], split.num_classes
    try:
        model = factory(features, classes)
        scores = model(split.train_inputs[:2]) if isinstance(model, nn.Module) else None
    except Exception as error:  # a user's code may raise anything
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"--model: {name}({features}, {classes}) fails with {line}") from error
    if scores is None:
        raise DataError(f"--model: {name} must return a torch.nn.Module, it returns a {type(model).__name__}")
    if tuple(scores.shape) != (2, classes):
        raise DataError(
            f"--model: {name} must score {classes} classes a row, two rows gave shape {tuple(scores.shape)}"
        )


def _check_folds(table: LabelledTable, folds: int) -> None:
    counts = np.bincount(table.labels, minlength=len(table.classes))
    rarest = int(counts.argmin())
    if counts[rarest] < folds:
        raise DataError(
            f"class {table.classes[rarest]!r} has {counts[rarest]} rows, fewer than the {folds} folds: "
            f"lower --folds, or merge or leave out that class"
        )
    if table.groups is not None:
        number = int(table.groups.max()) + 1
        if number < folds:
            raise DataError(f"--group makes {number} groups, fewer than the {folds} folds")
        for label, name in enumerate(table.classes):
            if len(np.unique(table.groups[table.labels == label])) < 2:
                raise DataError(f"class {name!r} occurs in one group only, so no fold can both learn and test it")


@functools.lru_cache(maxsize=4)
def _table(
    path: str | None, target: str | None, drop: tuple[str, ...], group: str | None, content: str
) -> LabelledTable:
    require_content(path, content)
    return label_table(path, target=target, drop=drop, group=group)


# Encoded folds of the present comparison: contenders share them. Bounded in bytes, oldest out first.
_ENCODED: collections.OrderedDict[tuple[TableFolds, int], Split] = collections.OrderedDict()
_ENCODED_BYTES = 2**29


def _split(problem: TableFolds, seed: int) -> Split:
    key = (problem, seed)
    if key not in _ENCODED:
        _ENCODED[key] = _encode(problem, seed)
        while len(_ENCODED) > 1 and sum(map(_bytes, _ENCODED.values())) > _ENCODED_BYTES:
            _ENCODED.popitem(last=False)
    return _ENCODED[key]


def _bytes(split: Split) -> int:
    return sum(part.numel() * part.element_size() for part in (split.train_inputs, split.test_inputs))


def _encode(problem: TableFolds, seed: int) -> Split:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    table = problem.table()
    repeat, fold = divmod(seed, problem.folds)
    state = problem.seed * 10_007 + repeat
    if table.groups is None:
        folds = StratifiedKFold(problem.folds, shuffle=True, random_state=state).split(table.labels, table.labels)
    else:
        folds = StratifiedGroupKFold(problem.folds, shuffle=True, random_state=state).split(
            table.labels, table.labels, table.groups
        )
    train, test = list(folds)[fold]
    encoder = TableEncoder()
    train_inputs = encoder.fit_transform(table.frame[train])
    labels = torch.from_numpy(table.labels[train])
    if problem.noise:
        labels = flip_uniformly(labels, problem.noise, len(table.classes), seed=state * problem.folds + fold)
    return Split(
        torch.from_numpy(train_inputs),
        labels,
        torch.from_numpy(encoder.transform(table.frame[test])),
        torch.from_numpy(table.labels[test]),
        len(table.classes),
    )


def _look_up(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _keywords(arguments: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in arguments.items()]
