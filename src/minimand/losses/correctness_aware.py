r"""Correctness-aware calibration: a temperature for each example, trained on whether predictions are right.

A frozen classifier gives logits :math:`z` and the prediction :math:`\hat y = \arg\max z`, right (:math:`k = 1`) or
wrong (:math:`k = 0`). With a temperature :math:`T`, the confidence is
:math:`\hat c = \mathrm{softmax}(z / T)_{\hat y}`, and the loss is the mean squared gap to correctness,

.. math:: L = \frac{\sum_i \omega_i (\hat c_i - k_i)^2}{\sum_i \omega_i},
          \qquad \omega_i = (1 - a)^b \text{ if right}, \; a^b \text{ if wrong},

with :math:`a` the accuracy of the batch. :math:`b = 0` is the paper's form: a proper scoring rule, so its optimum
is calibrated. :math:`b = 1` is the official code's: right and wrong carry the same total weight, and examples that
are right with probability :math:`q` get the confidence :math:`q(1-a) / (q(1-a) + (1-q)a)`: deliberately too low where
:math:`a > 1/2`, which lowers the calibration error on shifted data and raises it on data like the calibration set.

With :math:`s = 1/T`, cross-entropy has the slope :math:`E_p[z] - z_y`, so it sharpens a wrong prediction whose true
class scores above average; here a wrong prediction is always softened and a right one always sharpened, since
:math:`d\hat c/ds = \hat c (z_{\hat y} - E_p[z]) \ge 0`.

The temperature is predicted by :class:`AdaptiveTemperature` from how stable the prediction is when the input is
transformed (:func:`consistency_features`). No temperature changes the predicted class.

Source: Liu, Wang, Zou, Zou and Zheng, "Optimizing Calibration by Gaining Aware of Prediction Correctness", 2024,
arXiv 2404.13016, and its official code for the features, the network and the balanced weights.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks, training
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss

Kind = Literal["mse", "bce"]


def correctness_aware_loss(
    input: Float[Tensor, "batch classes *spatial"],
    target: Int[Tensor, "batch *spatial"],
    *,
    temperature: float | Tensor = 1.0,
    balanced: bool | float = False,
    loss: Kind = "mse",
    predicted: Int[Tensor, "batch *spatial"] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the gap between confidence and correctness, :math:`(\hat c - k)^2` or its cross-entropy.

    Args:
        input: Logits ``(batch, classes)`` or ``(batch, classes, *)``.
        target: Class indices ``(batch,)`` or ``(batch, *)``.
        temperature: Divides the logits: a number, or one an example, ``(batch,)`` or ``(batch, 1)``, or in the shape
            of ``target``.
        balanced: The power b of the class-balanced weights, in [0, 1]; False is 0, the paper's form, and True is
            1, the official code's default. The weights have mean 1; in a batch that is all right or all
            wrong, all are 1.
        loss: ``"mse"``, the paper's squared gap, or ``"bce"``, the cross-entropy of correctness.
        predicted: Predicted classes in the shape of ``target``; None: those with the largest logit.
        weight: One weight a class (of the target), or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses in the shape of ``target``.

    Raises:
        ValueError: If a temperature is not above 0, a setting is out of range, or the batch is malformed.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # confidence one half
        >>> correctness_aware_loss(logits, torch.tensor([0, 1]))
        tensor(0.2500)

    Source:
        Liu et al. 2024, arXiv 2404.13016.
    """
    power = _power(balanced)
    checks.one_of(loss, "loss", ("mse", "bce"))
    rows, labels, row_weight = class_rows(input, target, weight=weight, ignore_index=ignore_index)
    if predicted is None:
        # Of the logits as they came, since scaling may round two into one; on a CPU max is faster than argmax.
        chosen = rows.detach().max(1).indices
    else:
        checks.class_scores(input, predicted, ignore_index=ignore_index)
        chosen = predicted.reshape(-1)
        chosen = torch.where(chosen == ignore_index, torch.zeros_like(chosen), chosen)
    right = chosen == labels
    rows = _scaled(rows, temperature)
    losses = _squared_gap(rows, chosen, right) if loss == "mse" else _log_gap(rows, chosen, right)
    if power > 0:
        wide = torch.promote_types(losses.dtype, torch.float32)  # bfloat16 cannot count a batch
        losses = losses * _balance(right, row_weight, power, wide).to(losses.dtype)
    return reduce(losses, reduction, row_weight=row_weight, shape=target.shape)


def consistency_features(
    logits: Float[Tensor, "batch classes"], transformed: Sequence[Float[Tensor, "batch classes"]], *, top: int = 4
) -> Float[Tensor, "batch features"]:
    """Gather what the transformed copies of each input give to the original's most probable classes.

    Args:
        logits: Of the original inputs: they decide the classes and their order.
        transformed: Logits of the transformed inputs, one tensor a transform. ``[logits]`` gives the example's own
            largest probabilities.
        top: Classes kept; 4 in the paper, or all if there are fewer.

    Returns:
        Probabilities ``(batch, len(transformed) * min(top, classes))``, transform by transform.

    Raises:
        ValueError: If there is no transform, the shapes differ, or ``top`` is below 1.

    Example:
        >>> consistency_features(torch.tensor([[0.0, 1.0]]), [torch.tensor([[0.0, 0.0]])])
        tensor([[0.5000, 0.5000]])

    Source:
        Official code of Liu et al. 2024, arXiv 2404.13016.
    """
    checks.floating(logits, "logits")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if not transformed:
        raise ValueError("transformed must hold the logits of at least one transform, got none")
    for other in transformed:
        if other.shape != logits.shape:
            raise ValueError(
                f"transformed logits must have the shape of logits, {tuple(logits.shape)}, got {tuple(other.shape)}"
            )
    kept = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return torch.cat([torch.softmax(other, dim=1).gather(1, kept) for other in transformed], dim=1)


class CorrectnessAwareLoss(Loss):
    """Correctness-aware loss: the gap between the confidence of a prediction and whether it is right.

    It trains confidences, not predictions: minimise it over what scales the logits of a frozen classifier.

    Args:
        balanced: The power b of the class-balanced weights, in [0, 1]: False (0) is the paper's form, True (1) the
            official code's. Above 0 the loss of an example depends on the accuracy of its batch.
        loss: ``"mse"``, the paper's squared gap, or ``"bce"``, the cross-entropy of correctness.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = CorrectnessAwareLoss(balanced=0.5)
        >>> loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])

    Source:
        Liu et al. 2024, arXiv 2404.13016.
    """

    weight: Tensor | None

    def __init__(
        self,
        balanced: bool | float = False,
        *,
        loss: Kind = "mse",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.balanced = _power(balanced)
        self.couples_batches = self.balanced > 0
        checks.one_of(loss, "loss", ("mse", "bce"))
        self.loss: Kind = loss
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, temperature: float | Tensor = 1.0, predicted: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of logits ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return correctness_aware_loss(
            input,
            target,
            temperature=temperature,
            balanced=self.balanced,
            loss=self.loss,
            predicted=predicted,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class AdaptiveTemperature(nn.Module):
    r"""A small network from features to a temperature, :math:`T = l (h / l)^{\sigma(g(\phi))}` between l and h.

    The official code clamps the network's output to [0.1, 10] instead, which leaves an output near zero at its
    lower limit without gradient; here T starts at ``initial_temperature`` and always has a gradient.

    Args:
        in_features: Number of features.
        hidden: Hidden units; 5 in the official code.
        min_temperature: Lower limit; 0.1 in the official code.
        max_temperature: Upper limit; 10 in the official code.
        initial_temperature: What every example gets before training; 1 leaves the classifier as it is.

    Example:
        >>> AdaptiveTemperature(12)(torch.zeros(2, 12)).tolist()
        [[1.0], [1.0]]

    Source:
        Official code of Liu et al. 2024, arXiv 2404.13016, but for the range.
    """

    def __init__(
        self,
        in_features: int,
        *,
        hidden: int = 5,
        min_temperature: float = 0.1,
        max_temperature: float = 10.0,
        initial_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if in_features < 1 or hidden < 1:
            raise ValueError(f"in_features and hidden must be at least 1, got {in_features} and {hidden}")
        checks.positive(min_temperature, "min_temperature")
        checks.between(max_temperature, "max_temperature", min_temperature, math.inf, low_open=True, high_open=True)
        checks.between(
            initial_temperature,
            "initial_temperature",
            min_temperature,
            max_temperature,
            low_open=True,
            high_open=True,
        )
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.input = nn.Linear(in_features, hidden)
        self.output = nn.Linear(hidden, 1)
        place = math.log(initial_temperature / min_temperature) / math.log(max_temperature / min_temperature)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, math.log(place / (1 - place)))

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch 1"]:
        """Predict temperatures ``(batch, 1)`` from features ``(batch, features)``."""
        wanted = self.input.in_features
        if features.dim() != 2 or features.shape[1] != wanted:
            raise ValueError(f"features must have shape (batch, {wanted}), got {tuple(features.shape)}")
        checks.finite(features.detach(), "features")
        place = torch.sigmoid(self.output(torch.relu(self.input(features))))
        return self.min_temperature * torch.exp(math.log(self.max_temperature / self.min_temperature) * place)


class TransformConsistencyFeatures:
    """How stable predictions are when the input is transformed: the input of :class:`AdaptiveTemperature`.

    Args:
        model: The frozen classifier: inputs to logits ``(batch, classes)``. Put in evaluation mode while it is used.
        transforms: Functions of a batch of inputs; the official code rotates, greys and jitters the colour. They must
            be mild enough that the classifier still copes.
        top: Classes kept of each example; 4 in the paper.
        batch_size: Inputs given to the model at a time.

    Example:
        >>> features = TransformConsistencyFeatures(lambda x: x, [lambda x: x / 2])
        >>> logits, phi = features(torch.tensor([[0.0, 2.0]]))
        >>> phi  # softmax of (1, 0): the predicted class comes first
        tensor([[0.7311, 0.2689]])

    Source:
        Official code of Liu et al. 2024, arXiv 2404.13016.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        transforms: Sequence[Callable[[Tensor], Tensor]],
        *,
        top: int = 4,
        batch_size: int = 1000,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if not transforms:
            raise ValueError("transforms must hold at least one function, got none")
        if top < 1 or batch_size < 1:
            raise ValueError(f"top and batch_size must be at least 1, got {top} and {batch_size}")
        self.model = model
        self.transforms = tuple(transforms)
        self.top = top
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch features"]]:
        """Return the logits ``(batch, classes)`` of ``inputs`` and their features."""
        checks.not_empty(inputs, "inputs")
        logits, features = [], []
        with _evaluating(self.model):
            for part in inputs.split(self.batch_size):
                logits.append(self.model(part))
                others = [self.model(transform(part)) for transform in self.transforms]
                features.append(consistency_features(logits[-1], others, top=self.top))
        return torch.cat(logits), torch.cat(features)


class CACalibrator:
    """Calibrates a frozen classifier with a temperature for each input, trained to be unsure where it is wrong.

    :meth:`fit` and calling take inputs and need ``model`` and ``transforms``; :meth:`fit_features` and
    :meth:`calibrate` take logits and features of your own and need neither.

    Args:
        model: The frozen classifier, or None.
        transforms: Functions of a batch of inputs, one extra forward pass each.
        top: Classes kept of each example; 4 in the paper.
        balanced: See :class:`CorrectnessAwareLoss`; True is the official code's default and is under-confident on data
            like the calibration set. False for the paper's form.
        loss: Another loss of scaled logits and target in place of :class:`CorrectnessAwareLoss`, such as
            ``nn.CrossEntropyLoss()``.
        hidden: Hidden units of the temperature's network; 5 in the official code.
        steps: Steps of Adam; 500 in the official code, with ``lr=1e-4`` from another starting temperature.
        lr: Learning rate at the start; it falls to zero.
        batch_size: Examples a step; 1000 in the official code.
        weight_decay: Decoupled; raise it below some 2,000 calibration examples.
        seed: Decides initial weights and batches.

    Example:
        >>> calibrator = CACalibrator(nn.Linear(3, 5), [lambda x: -x, lambda x: x / 2], steps=10)
        >>> inputs, target = torch.randn(64, 3), torch.randint(5, (64,))
        >>> calibrator.fit(inputs, target)(inputs).shape
        torch.Size([64, 5])

    Source:
        Liu et al. 2024, arXiv 2404.13016.
    """

    temperature: AdaptiveTemperature | None

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        transforms: Sequence[Callable[[Tensor], Tensor]] = (),
        *,
        top: int = 4,
        balanced: bool | float = True,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        hidden: int = 5,
        steps: int = 500,
        lr: float = 1e-2,
        batch_size: int = 1000,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
        self.features = None if model is None else TransformConsistencyFeatures(model, transforms, top=top)
        self.loss = CorrectnessAwareLoss(balanced) if loss is None else loss
        self.hidden = hidden
        self.steps = steps
        self.recipe = training.Recipe(batch_size=batch_size, lr=lr, weight_decay=weight_decay)
        self.seed = seed
        self.temperature = None

    def fit(self, inputs: Tensor, target: Int[Tensor, " batch"]) -> CACalibrator:
        """Train the temperature on calibration inputs, which the classifier was not trained on, and their classes."""
        logits, features = self._features(inputs)
        return self.fit_features(logits, features, target)

    def fit_features(
        self,
        logits: Float[Tensor, "batch classes"],
        features: Float[Tensor, "batch features"],
        target: Int[Tensor, " batch"],
    ) -> CACalibrator:
        """Train the temperature on logits ``(batch, classes)``, features ``(batch, features)`` and classes."""
        checks.class_scores(logits, target, ignore_index=0)  # 0 is a class, so that nothing is ignored
        checks.floating(features, "features")
        if features.dim() != 2 or len(features) != len(logits):
            raise ValueError(f"features must have shape ({len(logits)}, features), got {tuple(features.shape)}")
        checks.finite(logits, "logits")
        checks.finite(features, "features")
        if getattr(self.loss, "balanced", 0.0) > 0:
            right = logits.argmax(1) == target
            if bool(right.all()) or not bool(right.any()):
                warnings.warn(
                    f"every calibration example is {'right' if bool(right[0]) else 'wrong'}: "
                    "there is nothing to balance, and all weigh the same",
                    stacklevel=2,
                )
        width = features.shape[1]
        scaled = training.seeded(lambda: _ScaledLogits(width, self.hidden), self.seed).to(logits)
        inputs = torch.cat([features.to(logits), logits], dim=1).detach()
        epochs = math.ceil(self.steps / training.batches_per_epoch(len(logits), self.recipe.batch_size))
        recipe = dataclasses.replace(self.recipe, epochs=epochs)
        training.fit(scaled, self.loss, inputs, target, recipe=recipe, seed=self.seed)
        self.temperature = scaled.get_submodule("temperature")  # type: ignore[assignment]
        return self

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Float[Tensor, "batch classes"]:
        """Return the calibrated probabilities ``(batch, classes)`` of inputs."""
        return self.calibrate(*self._features(inputs))

    @torch.no_grad()
    def calibrate(
        self, logits: Float[Tensor, "batch classes"], features: Float[Tensor, "batch features"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the calibrated probabilities of logits with their features."""
        if self.temperature is None:
            raise RuntimeError("this calibrator is not fitted: call fit or fit_features first")
        checks.finite(logits, "logits")
        checks.finite(features, "features")
        return torch.softmax(logits / self.temperature(features.to(logits)), dim=1)

    def _features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.features is None:
            raise ValueError("model is required to work on inputs: give it, or use fit_features and calibrate")
        return self.features(inputs)


class _ScaledLogits(nn.Module):
    """Maps features and logits, side by side, to the scaled logits."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.temperature = AdaptiveTemperature(width, hidden=hidden)
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, self.width :] / self.temperature(inputs[:, : self.width])


def _power(balanced: bool | float) -> float:
    power = float(balanced)
    checks.between(power, "balanced", 0.0, 1.0)
    return power


def _scaled(rows: Tensor, temperature: float | Tensor) -> Tensor:
    """Check temperatures and divide each row by its own."""
    if not isinstance(temperature, Tensor):
        checks.positive(temperature, "temperature")
        return rows if temperature == 1 else rows / temperature
    if temperature.numel() not in (1, len(rows)):
        raise ValueError(
            f"temperature must be one number or one an example, {len(rows)}, got shape {tuple(temperature.shape)}"
        )
    checks.require(
        torch.isfinite(temperature.detach()) & (temperature.detach() > 0),
        lambda: f"temperature must be finite and above 0, got a least value of {float(temperature.detach().min())}",
    )
    return rows / temperature.reshape(-1, 1).to(rows)


def _squared_gap(rows: Tensor, chosen: Tensor, right: Tensor) -> Tensor:
    # Gathered at the prediction, not the maximum: the same value, and one gradient where classes tie.
    if rows.shape[1] <= 32:  # torch's softmax is slow on short rows, and its logsumexp on long ones
        confidence = (rows.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(rows, dim=1)).exp()
    else:
        confidence = torch.softmax(rows, dim=1).gather(1, chosen[:, None])[:, 0]
    return (confidence - right.to(rows.dtype)).square()


def _log_gap(rows: Tensor, chosen: Tensor, right: Tensor) -> Tensor:
    """Compute -log of the confidence where right, and -log of its complement, summed over the others, where wrong."""
    is_chosen = torch.arange(rows.shape[1], device=rows.device) == chosen[:, None]
    kept = torch.where(is_chosen == right[:, None], rows, torch.full_like(rows, -math.inf))
    return torch.logsumexp(rows, dim=1) - torch.logsumexp(kept, dim=1)


def _balance(right: Tensor, row_weight: Tensor | None, power: float, dtype: torch.dtype) -> Tensor:
    """Weigh right examples by the share of the wrong and the reverse, to the power, with mean one."""
    right = right.to(dtype)
    mass = torch.ones_like(right) if row_weight is None else row_weight.to(dtype)
    total = mass.sum()
    accuracy = (mass * right).sum() / total
    omega = torch.where(right > 0, (1 - accuracy) ** power, accuracy**power)
    mean = (mass * omega).sum() / total
    one_sided = mean <= 0
    return torch.where(one_sided, torch.ones_like(omega), omega / torch.where(one_sided, torch.ones_like(mean), mean))


@contextmanager
def _evaluating(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put a module in evaluation mode, and each part of it back afterwards."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
