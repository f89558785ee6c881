"""Classification: what a split is, what is measured, and contenders that train a model on one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import training
from ..scores import brier_score, expected_calibration_error
from ..training import Recipe
from .study import Metric, Outcome, Run

METRICS = (
    Metric("accuracy", "higher is better", "%"),
    Metric("balanced accuracy", "higher is better", "%"),
    Metric("macro F1", "higher is better", "%"),
    Metric("log loss", "lower is better"),
    Metric("Brier score", "lower is better"),
    Metric("calibration error", "lower is better", "%"),
    Metric("worst-class recall", "higher is better", "%"),
)

# Data beyond this size gain nothing from being trained side by side: the arithmetic outweighs the overhead.
_STACK_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Split:
    """Training and test data of one cell.

    Args:
        train_inputs: ``(train, features)`` or ``(train, *)``, float32.
        train_target: ``(train,)`` class indices.
        test_inputs: ``(test, features)`` or ``(test, *)``.
        test_target: ``(test,)``.
        num_classes: Number of classes.
    """

    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor
    num_classes: int

    def validation(self, seed: int, *, fraction: float = 0.2) -> Split:
        """Split the training data once more, class by class; the test data are left out altogether."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train_target), generator=generator)
        labels = self.train_target[order]
        held = torch.zeros(len(order), dtype=torch.bool)
        for label in range(self.num_classes):
            rows = (labels == label).nonzero()[:, 0]
            # At least one example of a class stays for training.
            held[rows[: min(round(fraction * len(rows)), len(rows) - 1)] if len(rows) else rows] = True
        keep, test = order[~held], order[held]
        return Split(
            self.train_inputs[keep],
            self.train_target[keep],
            self.train_inputs[test],
            self.train_target[test],
            self.num_classes,
        )


@dataclasses.dataclass(frozen=True)
class Range:
    """Values that tuning may try.

    Args:
        low: Smallest.
        high: Largest.
        log: Whether to sample evenly in the logarithm.
    """

    low: float
    high: float
    log: bool = False


COMMON_SPACE = {"lr": Range(3e-4, 3e-2, log=True), "weight_decay": Range(1e-6, 1e-1, log=True)}


class TrainClassifier:
    """A contender that trains a model with a loss and measures it on the test data.

    Cells are trained together where :func:`minimand.training.can_stack` allows, else one by one.

    Args:
        make_loss: ``num_classes -> loss``; may take hyper-parameters by keyword, which tuning sets.
        make_model: ``(features, classes) -> model``; ``features`` is an int, or the shape of one input.
        recipe: How to train.
        measure: ``(model, loss, split) -> numbers`` beside the usual metrics.
        space: Ranges of ``make_loss``'s hyper-parameters for tuning, by name.
    """

    def __init__(
        self,
        make_loss: Callable[..., Any],
        *,
        make_model: Callable[[Any, int], nn.Module] = training.mlp,
        recipe: Recipe | None = None,
        measure: Callable[[nn.Module, Any, Split], Mapping[str, float]] | None = None,
        space: Mapping[str, Range] | None = None,
    ) -> None:
        self.make_loss = make_loss
        self.make_model = make_model
        self.recipe = recipe or Recipe()
        self.measure = measure
        self.space = dict(space or {})

    def __call__(self, data: Split, run: Run) -> Outcome:
        """Train and measure one cell."""
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[Split], runs: Sequence[Run]) -> list[Outcome]:
        """Train and measure several cells, side by side where that is possible."""
        outcomes: dict[int, Outcome] = {}
        for cells in self._groups(datas, runs):
            trained = self._train([datas[cell] for cell in cells], [runs[cell] for cell in cells])
            outcomes |= dict(zip(cells, trained, strict=True))
        return [outcomes[cell] for cell in range(len(datas))]

    def _groups(self, datas: Sequence[Split], runs: Sequence[Run]) -> list[list[int]]:
        """Group cells that may share a stack: same settings, shapes and number of batches, and small."""
        groups: dict[Any, list[int]] = {}
        for cell, (data, run) in enumerate(zip(datas, runs, strict=True)):
            size = len(data.train_inputs)
            large = data.train_inputs.numel() * data.train_inputs.element_size() * len(datas) > _STACK_BYTES
            batch = self._recipe(run).batch_size
            key = (
                tuple(sorted(run.settings.items())),
                data.train_inputs.shape[1:],
                data.num_classes,
                (training.batches_per_epoch(size, batch), min(size, batch)),
                cell if large else None,
            )
            groups.setdefault(key, []).append(cell)
        return list(groups.values())

    def _recipe(self, run: Run) -> Recipe:
        chosen = {name: value for name, value in run.settings.items() if name in COMMON_SPACE}
        return dataclasses.replace(self.recipe, **chosen)

    def _train(self, datas: Sequence[Split], runs: Sequence[Run]) -> list[Outcome]:
        start = time.perf_counter()
        recipe = self._recipe(runs[0])
        own = {name: value for name, value in runs[0].settings.items() if name not in COMMON_SPACE}
        shape = datas[0].train_inputs.shape[1:]
        features = shape[0] if len(shape) == 1 else tuple(shape)
        classes = datas[0].num_classes
        models = [training.seeded(lambda: self.make_model(features, classes), run.stream("model")) for run in runs]
        losses = [_with_generator(lambda: self.make_loss(classes, **own), run) for run in runs]
        seeds = [run.stream("order") for run in runs]
        inputs, targets = [data.train_inputs for data in datas], [data.train_target for data in datas]
        if training.can_stack(models, inputs, recipe) is None:
            curves = training.fit_many(models, losses, inputs, targets, recipe=recipe, seeds=seeds)
        else:
            curves = [
                training.fit(*cell, recipe=recipe, seed=seed)
                for *cell, seed in zip(models, losses, inputs, targets, seeds, strict=True)
            ]
        seconds = (time.perf_counter() - start) / len(datas)
        return [
            Outcome(self._measure(model, loss, data), {"training loss": curve}, seconds)
            for model, loss, data, curve in zip(models, losses, datas, curves, strict=True)
        ]

    def _measure(self, model: nn.Module, loss: Any, data: Split) -> dict[str, float]:
        with torch.no_grad():
            scores = torch.cat([model(part) for part in data.test_inputs.split(8192)])
            if isinstance(loss, nn.Module):
                loss.eval()
            probabilities = loss.link(scores) if hasattr(loss, "link") else torch.softmax(scores, dim=-1)
        numbers = classification_metrics(scores, probabilities, data.test_target)
        return numbers if self.measure is None else {**numbers, **self.measure(model, loss, data)}


def classification_metrics(scores: Tensor, probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """Measure predictions on test data.

    Args:
        scores: ``(test, classes)``: the largest is the prediction.
        probabilities: ``(test, classes)``.
        target: ``(test,)`` class indices.

    Returns:
        One number for each of ``METRICS``. Recall and F1 are averaged over the classes that occur in the test data.
    """
    classes = scores.shape[1]
    predicted = scores.argmax(1)
    table = torch.bincount(target * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    confusion = table.double().cpu().numpy()
    hits, members, guesses = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    present = members > 0
    recall = hits[present] / members[present]
    f1 = 2 * hits[present] / (members[present] + guesses[present])
    chosen = probabilities.gather(1, target[:, None])[:, 0].double()
    confidence = probabilities.gather(1, predicted[:, None])[:, 0]
    return {
        "accuracy": float(hits.sum() / members.sum()),
        "balanced accuracy": float(recall.mean()),
        "macro F1": float(f1.mean()),
        # A probability of exactly zero would cost infinity; scikit-learn clips likewise, at the dtype's resolution.
        "log loss": float(-chosen.clamp_min(torch.finfo(probabilities.dtype).eps).log().mean()),
        "Brier score": float(brier_score(probabilities, target)),
        "calibration error": float(expected_calibration_error(confidence, predicted == target)),
        "worst-class recall": float(recall.min()),
    }


def _with_generator(make: Callable[[], Any], run: Run) -> Any:
    """Build a loss under the cell's own seed, and give it the cell's own random stream if it draws numbers."""
    loss = training.seeded(make, run.stream("loss"))
    modules: Iterable[Any] = loss.modules() if isinstance(loss, nn.Module) else ()
    for module in modules:
        if getattr(module, "generator", False) is None:
            module.generator = torch.Generator().manual_seed(run.stream("draws"))
    return loss
