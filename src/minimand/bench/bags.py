"""The problem behind ``minimand compare bags``: labels known as means over bags, and ways to learn rows from them."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import training
from ..bounds import best_rho
from ..losses import AggregateLoss, ols
from ..tables import TableEncoder
from ..training import Recipe
from .readers import DataError, content_hash, read_table, require_column, require_content
from .study import Metric, Outcome, Presentation, Run, Study

# Small values first: with many bags and little noise the best rho is a few hundredths.
RHOS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
# As many as RHOS, so that both contenders that choose have the same budget.
PENALTIES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 10.0)

BAG_ERROR = Metric("bag error", "lower is better")
INSTANCE_ERROR = Metric("instance error", "lower is better")


@dataclasses.dataclass(frozen=True)
class Bags:
    """Rows in bags, with the bags' mean labels.

    Args:
        inputs: ``(rows, features)``.
        bag: ``(rows,)`` ids from 0, in rising order.
        target: ``(bags,)`` mean labels.
        labels: ``(rows,)`` labels of single rows, for evaluation only, or None where nobody knows them.
    """

    inputs: Tensor
    bag: Tensor
    target: Tensor
    labels: Tensor | None = None

    def take(self, keep: Tensor) -> Bags:
        """Keep the bags where the boolean ``keep`` holds, with all their rows."""
        rows = keep[self.bag]
        renamed = keep.cumsum(0) - 1
        labels = None if self.labels is None else self.labels[rows]
        return Bags(self.inputs[rows], renamed[self.bag[rows]], self.target[keep], labels)

    def means(self, values: Tensor) -> Tensor:
        """Average ``(rows, *)`` over each bag."""
        sums = values.new_zeros(len(self.target), *values.shape[1:]).index_add(0, self.bag, values)
        return sums / self.sizes().to(values).reshape(-1, *[1] * (values.dim() - 1))

    def sizes(self) -> Tensor:
        """Count the rows of each bag."""
        return torch.bincount(self.bag, minlength=len(self.target))


@dataclasses.dataclass(frozen=True)
class BagSplit:
    """Training and test data of one cell. Contenders must not look at ``train.labels``, which is always None."""

    train: Bags
    test: Bags


@dataclasses.dataclass(frozen=True)
class BagTable:
    """A table with its bags and labels taken out.

    Args:
        frame: The features.
        bag: ``(rows,)`` bag numbers.
        values: ``(rows,)`` the target column.
        individual: Whether the target column holds each row's own label rather than its bag's mean.
        name: What the table is called.
    """

    frame: pl.DataFrame
    bag: NDArray[np.int64]
    values: NDArray[np.float64]
    individual: bool
    name: str

    def describe(self) -> str:
        """Say what the table is in a few words."""
        bags = int(self.bag.max()) + 1
        return f"{self.name}: {len(self.bag):,} rows in {bags:,} bags, {self.frame.width:,} columns"


def bag_table(path: str | None, *, target: str | None, bag: str | None, drop: Sequence[str] = ()) -> BagTable:
    """Read a table and take its bags and labels out.

    Args:
        path: The file; None for scikit-learn's diabetes with quadratic features, in random bags of four.
        target: Column of the label: a bag's mean on each of its rows, or each row's own, averaged here.
        bag: Column of the bag ids, of any type.
        drop: Columns to leave out.

    Raises:
        DataError: If the table cannot be learnt from, with one sentence that says why.
    """
    if path is None:
        frame, target, bag, name = _diabetes(), "progression", "bag", "diabetes, quadratic features"
    else:
        frame, name = read_table(path), pathlib.Path(path).name
        if target is None or bag is None:
            option, meaning = ("--target", "label") if target is None else ("--bag", "bag id")
            raise DataError(f"{option} is missing: which column of {name} is the {meaning}?")
    require_column(frame, target, "--target")
    require_column(frame, bag, "--bag")
    drop = [column for entry in drop for column in ([entry] if entry in frame.columns else entry.split(","))]
    for column in drop:
        require_column(frame, column, "--drop")
    if target == bag or target in drop or bag in drop:
        raise DataError("the target, the bag ids and the dropped columns must be different columns")
    values = _numbers(frame[target])
    missing = frame[bag].null_count()
    if missing:
        raise DataError(f"--bag: column {bag!r} has {missing} missing values")
    ids = frame[bag].rank("dense").cast(pl.Int64).to_numpy() - 1
    sizes = np.bincount(ids)
    if sizes.max() == 1:
        raise DataError(
            f"--bag: every bag of column {bag!r} has one row, so every label is known and this is plain regression"
        )
    features = frame.drop([target, bag, *drop])
    if features.width == 0:
        raise DataError(f"{name} has no feature column besides the target, the bag ids and what is dropped")
    means = np.bincount(ids, values) / sizes
    scale = max(float(np.abs(values).max()), 1e-300)
    # A mean written out with float32's seven digits still counts as one number a bag.
    individual = bool((np.abs(values - means[ids]) > 1e-6 * scale).any())
    return BagTable(features, ids, values, individual, name)


@dataclasses.dataclass(frozen=True)
class BagFolds:
    """A problem: cell ``seed`` is fold ``seed % folds`` of repeat ``seed // folds``; no fold splits a bag.

    Args:
        path: The file, or None for the built-in data.
        target: The label column.
        bag: The column of bag ids.
        drop: Columns left out.
        folds: Folds a repeat.
        seed: Shuffles the folds.
        content: Hash of the file's content, so that another table under the same name is another problem.
    """

    path: str | None
    target: str | None
    bag: str | None
    drop: tuple[str, ...]
    folds: int
    seed: int
    content: str = ""

    def __call__(self, source: Any, seed: int) -> BagSplit:
        """Return the data of cell ``seed``."""
        table = self.table()
        repeat, fold = divmod(seed, self.folds)
        bags = int(table.bag.max()) + 1
        order = np.random.RandomState(self.seed * 10_007 + repeat).permutation(bags)
        held = np.zeros(bags, dtype=bool)
        held[order[fold :: self.folds]] = True
        test = held[table.bag]
        encoder = TableEncoder()
        train_inputs = encoder.fit_transform(table.frame.filter(pl.Series(~test)))
        test_inputs = encoder.transform(table.frame.filter(pl.Series(test)))
        train = _bags(train_inputs, table.bag[~test], table.values[~test], individual=False)
        return BagSplit(train, _bags(test_inputs, table.bag[test], table.values[test], table.individual))

    def everything(self) -> tuple[TableEncoder, Bags]:
        """Return all of the data, for learning once the comparison is over, and what encodes further rows."""
        table, encoder = self.table(), TableEncoder()
        return encoder, _bags(encoder.fit_transform(table.frame), table.bag, table.values, individual=False)

    def table(self) -> BagTable:
        """Read the table, once a process."""
        return _table(self.path, self.target, self.bag, self.drop, self.content)


Predictor = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class BagLearner:
    """Learns a predictor of rows from bags with a given rho.

    Args:
        model: ``"linear"``, in closed form for the squared loss, or ``"mlp"``.
        loss: ``"mse"``, or ``"bce"`` for proportions.
        recipe: How a model is trained that has no closed form; a batch is so many whole bags.
    """

    model: str
    loss: str
    recipe: Recipe

    @property
    def closed_form(self) -> bool:
        """Whether nothing is trained step by step."""
        return self.model == "linear" and self.loss == "mse"

    def __call__(self, bags: Bags, rho: float, seed: int, penalty: float = 0.0) -> Predictor:
        """Return what maps ``(rows, features)`` to a prediction a row, float64.

        ``penalty`` weighs squared coefficients, in units of a feature's mean square over bags, where there is
        a closed form; elsewhere it is added to the recipe's weight decay.
        """
        return _solve(bags, rho, penalty) if self.closed_form else self._train(bags, rho, seed, penalty)

    def _train(self, bags: Bags, rho: float, seed: int, penalty: float = 0.0) -> Predictor:
        make = training.linear if self.model == "linear" else functools.partial(training.mlp, hidden=(64, 64))
        model = training.seeded(lambda: make(bags.inputs.shape[1], 1), seed)
        centre, scale = 0.0, 1.0
        if self.loss == "mse":
            centre = float(bags.target.mean())
            scale = float(bags.target.std()) or 1.0
        target = ((bags.target - centre) / scale).float()
        objective = functools.partial(_whole_bags, AggregateLoss(rho, loss=self.loss))  # type: ignore[arg-type]
        places = torch.arange(len(target))
        recipe = dataclasses.replace(self.recipe, weight_decay=self.recipe.weight_decay + penalty)
        training.fit(_Bagwise(model, bags), objective, places, target, recipe=recipe, seed=seed)

        def predict(inputs: Tensor) -> Tensor:
            with torch.no_grad():
                scores = model(inputs)[:, 0].double()
            return torch.sigmoid(scores) if self.loss == "bce" else centre + scale * scores

        return predict


@dataclasses.dataclass(frozen=True)
class PredictMean:
    """A contender that predicts the mean training label for every row."""

    def __call__(self, data: BagSplit, run: Run) -> Outcome:
        """Measure one cell."""
        return _measured(*self.learn_from(data.train, seed=0), data.test)

    def learn_from(self, bags: Bags, *, seed: int) -> tuple[Predictor, None]:
        """Return a predictor of rows, and no rho."""
        sizes = bags.sizes().double()
        mean = float((sizes * bags.target).sum() / sizes.sum())
        return lambda inputs: torch.full((len(inputs),), mean, dtype=torch.float64), None


@dataclasses.dataclass(frozen=True)
class LearnFromBags:
    """A contender that learns with the interpolated loss.

    Args:
        learn: How.
        rho: A number; ``"held-out bags"``: the rho of ``RHOS`` with the least error on bags held out of the
            training data; ``"formula"``: the best rho of linear theory for the signal and noise that the bag means
            show.
        penalty: A number, or ``"held-out bags"``: that of ``PENALTIES`` chosen likewise.
    """

    learn: BagLearner
    rho: float | str
    penalty: float | str = 0.0

    def __call__(self, data: BagSplit, run: Run) -> Outcome:
        """Learn and measure one cell."""
        return _measured(*self.learn_from(data.train, seed=run.stream("model")), data.test)

    def learn_from(self, bags: Bags, *, seed: int) -> tuple[Predictor, float]:
        """Return a predictor of rows, and the rho that it was learnt with."""
        rho, penalty = self.rho, self.penalty
        if rho == "formula":
            rho = plug_in_rho(bags)
        rhos = RHOS if rho == "held-out bags" else (float(rho),)
        penalties = PENALTIES if penalty == "held-out bags" else (float(penalty),)
        candidates = [(one, other) for one in rhos for other in penalties]
        chosen = choose(self.learn, bags, candidates, seed=seed) if len(candidates) > 1 else candidates[0]
        return self.learn(bags, chosen[0], seed, chosen[1]), chosen[0]


def choose(
    learn: BagLearner, bags: Bags, candidates: Sequence[tuple[float, float]], *, seed: int
) -> tuple[float, float]:
    """Choose the (rho, penalty) whose predictions have the least squared error on the means of held-out bags.

    Five folds of the bags where learning has a closed form, else one quarter of them held out. For random bags the
    held-out error ranks models as their error on single rows does, up to the bags' noise.
    """
    count = len(bags.target)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = min(5, count) if learn.closed_form else min(4, count)
    errors = np.zeros(len(candidates))
    for part in range(parts if learn.closed_form else 1):
        held = torch.zeros(count, dtype=torch.bool)
        held[order[part::parts]] = True
        rest, test = bags.take(~held), bags.take(held)
        for place, (rho, penalty) in enumerate(candidates):
            errors[place] += float(_bag_errors(learn(rest, rho, seed, penalty), test).sum())
    return candidates[int(errors.argmin())]


def plug_in_rho(bags: Bags) -> float:
    """Estimate signal and noise from the bag means and return the best rho of :func:`minimand.bounds.best_rho`.

    The noise comes from the residuals of least squares on bag means where there are twice as many bags as
    features, else from the second moments of whitened features (Dicker 2014), which need not be fitted. 1 where rows
    do not outnumber features, since there the formula says nothing.
    """
    _, rotated = _rotate(bags.inputs)
    rows, features = rotated.shape
    if features == 0 or rows <= 1.05 * features:
        return 1.0
    weight = bags.sizes().double().sqrt()
    target = weight * (bags.target - (weight**2 * bags.target).sum() / (weight**2).sum())
    count = len(target)
    total = float(target.square().sum()) / max(count - 1, 1)
    means = weight[:, None] * bags.means(rotated)
    if count >= 2 * features + 2:
        residual = target - means @ (torch.linalg.pinv(means) @ target)
        noise = float(residual.square().sum()) / (count - features - 1)
    else:
        white = means / (rotated.square().mean(0).sqrt() + 1e-300)
        aligned = float((white.T @ target).square().sum())
        noise = ((features + count + 1) * float(target.square().sum()) - aligned) / (count * (count + 1))
    # Estimates of a variance may fall outside [0, total]; the formula needs a little of both.
    noise = min(max(noise, 0.01 * total), 0.99 * total)
    if total <= 0:
        return 1.0
    return best_rho(rows / features, bag_size=rows / count, signal=total - noise, noise=noise)


def bags_study(
    path: str | None = None,
    *,
    target: str | None = None,
    bag: str | None = None,
    drop: Sequence[str] = (),
    model: str = "linear",
    folds: int = 5,
    repeats: int = 2,
    epochs: int = 60,
    loss: str = "auto",
    seed: int = 0,
) -> Study:
    """Build the comparison of losses for aggregate labels on a user's table.

    Args:
        path: CSV, TSV, Parquet, JSON lines or NPZ; None for scikit-learn's diabetes in random bags of four.
        target: Column of the label: a bag's mean on each of its rows, or each row's own, averaged over the bag.
        bag: Column of the bag ids.
        drop: Columns to leave out.
        model: ``"linear"`` or ``"mlp"``.
        folds: Folds of the cross-validation over bags, at least 2.
        repeats: How often the folds are drawn anew.
        epochs: Passes over the training bags, where the model has no closed form.
        loss: ``"mse"``, ``"bce"`` for proportions, or ``"auto"``: ``"bce"`` where all labels lie in [0, 1].
        seed: Seed of folds and training.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    for value, option, allowed in ((model, "--model", ("linear", "mlp")), (loss, "--loss", ("auto", "mse", "bce"))):
        if value not in allowed:
            raise DataError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    if folds < 2:
        raise DataError(f"--folds must be at least 2, got {folds}")
    if repeats < 1:
        raise DataError(f"--repeats must be at least 1, got {repeats}")
    problem = BagFolds(path, target, bag, tuple(drop), folds, seed, content_hash(path))
    table = problem.table()
    count = int(table.bag.max()) + 1
    if count < folds:
        raise DataError(f"--bag makes {count} bags, fewer than the {folds} folds")
    if folds == 2 and count < 4:
        raise DataError(f"--bag makes {count} bags: at least 4 are needed to train on some and hold out others")
    proportions = bool(((table.values >= 0) & (table.values <= 1)).all())
    if loss == "bce" and not proportions:
        raise DataError(
            "--loss bce needs proportions in [0, 1]; the target column holds values from "
            f"{table.values.min():g} to {table.values.max():g}"
        )
    kind = ("bce" if proportions else "mse") if loss == "auto" else loss
    try:
        # Ten steps an epoch at least, or a table of few bags would hardly be learnt from.
        batch_size = min(16, max(1, count // 10))
        recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=1e-2 if model == "linear" else 3e-3)
    except ValueError as error:
        raise DataError(f"--{error}") from None
    learn = BagLearner(model, kind, recipe)
    evaluated = (
        "The target column holds one label a row: learners saw only the means over bags, and instance error is "
        "measured on the rows of held-out bags."
        if table.individual
        else "The target column is constant within bags, so nobody knows the labels of single rows: bag error, on the "
        "means of held-out bags, is all that can be measured, and ranks models of rows for random bags only."
    )
    return Study(
        method="compare bags",
        problem=problem,
        contenders={
            "bag loss": LearnFromBags(learn, 0.0),
            "instance loss": LearnFromBags(learn, 1.0),
            "mean label": PredictMean(),
            "bag loss, ridge": LearnFromBags(learn, 0.0, penalty="held-out bags"),
            "interpolation, held-out bags": LearnFromBags(learn, "held-out bags"),
            "interpolation, formula": LearnFromBags(learn, "formula"),
        },
        metrics=(INSTANCE_ERROR, BAG_ERROR) if table.individual else (BAG_ERROR,),
        seeds=folds * repeats,
        test_train_ratio=1 / (folds - 1),
        about=f"{folds}-fold cross-validation over bags, {repeats} times; {model} model, "
        + ("cross-entropy of proportions" if kind == "bce" else "squared loss"),
        notes=evaluated + " Errors are mean squares, the noise of the labels included. The formula assumes random "
        "bags and a linear model.",
        data=table.describe(),
        data_key="diabetes in bags of four" if path is None else problem.content,
        settings={
            "target": target,
            "bag": bag,
            "drop": sorted(drop),
            "model": model,
            "folds": folds,
            "epochs": None if learn.closed_form else epochs,
            "loss": kind,
            "seed": seed,
        },
        presentation=Presentation(code=winner_code),
    )


def winner_code(study: Study, winner: str) -> str:
    """Return about ten lines that train the winner on all of the data."""
    problem: BagFolds = study.problem  # type: ignore[assignment]
    settings = study.settings
    chosen = {"target": problem.target, "bag": problem.bag, "drop": list(problem.drop) or None}
    chosen |= {"model": settings["model"], "epochs": settings["epochs"], "loss": settings["loss"]}
    arguments = "".join(f", {name}={value!r}" for name, value in chosen.items() if value is not None)
    return "\n".join(
        [
            "import torch",
            "from minimand.bench.bags import bags_study",
            "",
            f"study = bags_study({problem.path!r}{arguments})",
            "encoder, bags = study.problem.everything()",
            f"predict, rho = study.contenders[{winner!r}].learn_from(bags, seed={problem.seed})",
            "predictions = predict(torch.from_numpy(encoder.transform(study.problem.table().frame)))",
        ]
    )


class _Bagwise(nn.Module):
    """Maps places of bags to the predictions of all their rows, so that a batch is made of whole bags."""

    def __init__(self, model: nn.Module, bags: Bags) -> None:
        super().__init__()
        self.model = model
        self.inputs = bags.inputs
        self.sizes = bags.sizes()
        self.starts = self.sizes.cumsum(0) - self.sizes

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.sizes[places]
        bag = torch.arange(len(places)).repeat_interleave(sizes)
        within = torch.arange(len(bag)) - (sizes.cumsum(0) - sizes)[bag]
        return self.model(self.inputs[self.starts[places][bag] + within])[:, 0], bag


def _whole_bags(loss: AggregateLoss, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    predictions, bag = output
    return loss(predictions, target, bag)


def _solve(bags: Bags, rho: float, penalty: float) -> Predictor:
    rotation, rotated = _rotate(bags.inputs)
    centre = bags.inputs.double().mean(0)
    design = torch.cat([torch.ones(len(rotated), 1, dtype=torch.float64), rotated], dim=1)
    target, bag, features = bags.target, bags.bag, rotated.shape[1]
    if penalty > 0 and features:
        # One row a coefficient, alone in its bag and with label 0, is the ridge penalty.
        means = bags.means(rotated)
        mean_square = float((bags.sizes().double()[:, None] * means.square()).sum()) / features
        ridge = (penalty * mean_square) ** 0.5 * torch.eye(features, features + 1, dtype=torch.float64).roll(1, 1)
        design = torch.cat([design, ridge])
        bag = torch.cat([bag, len(target) + torch.arange(features)])
        target = torch.cat([target, target.new_zeros(features)])
    theta = ols(design, target, bag, rho=rho)
    return lambda inputs: theta[0] + (inputs.double() - centre) @ rotation @ theta[1:]


def _rotate(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Centre the features and turn them to their principal axes, leaving out those that rounding alone made."""
    centred = inputs.double() - inputs.double().mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-5 * values.max().clamp_min(1e-300)
    rotation = axes[kept].T
    return rotation, centred @ rotation


def _bag_errors(predict: Predictor, bags: Bags) -> Tensor:
    return (bags.means(predict(bags.inputs)) - bags.target).square()


def _measured(predict: Predictor, rho: float | None, test: Bags) -> Outcome:
    metrics = {BAG_ERROR.name: float(_bag_errors(predict, test).mean())}
    if test.labels is not None:
        metrics[INSTANCE_ERROR.name] = float((predict(test.inputs) - test.labels).square().mean())
    if rho is not None:
        metrics["rho"] = rho
    return Outcome(metrics)


def _bags(inputs: NDArray[np.float32], bag: NDArray[np.int64], values: NDArray[np.float64], individual: bool) -> Bags:
    """Lay rows out bag by bag, with ids from 0 and the mean of each bag's values."""
    order = np.argsort(bag, kind="stable")
    _, ids = np.unique(bag[order], return_inverse=True)
    means = np.bincount(ids, values[order]) / np.bincount(ids)
    labels = torch.from_numpy(values[order]) if individual else None
    return Bags(torch.from_numpy(inputs[order]), torch.from_numpy(ids), torch.from_numpy(means), labels)


def _numbers(column: pl.Series) -> NDArray[np.float64]:
    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        raise DataError(f"--target: column {column.name!r} must hold numbers, it holds {column.dtype}")
    values = column.cast(pl.Float64).to_numpy()
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise DataError(f"--target: column {column.name!r} has {wrong} values that are missing or not finite")
    return values


@functools.lru_cache(maxsize=4)
def _table(path: str | None, target: str | None, bag: str | None, drop: tuple[str, ...], content: str) -> BagTable:
    require_content(path, content)
    return bag_table(path, target=target, bag=bag, drop=drop)


def _diabetes() -> pl.DataFrame:
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    inputs, progression = load_diabetes(return_X_y=True)
    features = PolynomialFeatures(2, include_bias=False).fit_transform(StandardScaler().fit_transform(inputs))
    frame = pl.DataFrame(features, schema=[f"x{column}" for column in range(features.shape[1])], orient="row")
    order = np.random.RandomState(0).permutation(len(frame))
    return frame.with_columns(pl.Series("progression", progression), pl.Series("bag", order // 4))
