r"""TempNet: a small network that gives each input its own softmax temperature, trained by a robust loss.

For scores :math:`h \in R^K`, label :math:`y` and temperature :math:`\tau`, the robust loss is the dual of the worst
case over the distributions :math:`p` that lie within a radius :math:`\rho` of the uniform one, :math:`u`:

.. math:: F(\tau) = \tau \log \frac1K \sum_k e^{(h_k - h_y)/\tau} + \rho\tau
                  = \tau\,CE(h/\tau, y) + (\rho - \log K)\,\tau ,
          \qquad \min_{\tau} F(\tau) = \max_{KL(p \| u) \le \rho} \sum_k p_k (h_k - h_y) .

With :math:`p = softmax(h/\tau)` its gradients are :math:`\partial F/\partial h = p - e_y` and
:math:`\partial F/\partial\tau = \rho - KL(p \| u) = \rho - \log K + H(p)`. The label cancels from the second: the best
temperature makes the predictive entropy :math:`\log K - \rho`, whatever the truth. Peaked scores get a large one, flat
scores a small one.

A temperature network predicts it, so that it exists for unseen inputs. Its shape follows from the optimum, which is a
pooling of the scores: :math:`\sum_k (p_k - \frac1K) h_k = \tau\,(KL(p \| u) + KL(u \| p))`. Here it pools :math:`M`
learnt prototypes :math:`v` with weights :math:`w = softmax(v / e^\phi)`:
:math:`\tau = \tau_{min} + (\tau_{max} - \tau_{min})\,sigmoid(a^T ((w - \frac1M) \odot v) + b)`.

Source: Qiu, Guo, Xu, Zhao, Zhang and Yang, "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
via DRO", ICML 2024, arXiv 2404.04575.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss

Kind = Literal["logits", "prototype"]


def robust_temperature_loss(
    input: Float[Tensor, "batch classes *spatial"],
    target: Int[Tensor, "batch *spatial"],
    *,
    temperature: float | Float[Tensor, "batch *spatial"],
    radius: float,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the KL-constrained robust loss :math:`\tau\,CE(h/\tau, y) + (\rho - \log K)\,\tau`.

    Args:
        input: Scores ``(batch, classes)`` or ``(batch, classes, *)``.
        target: Class indices ``(batch,)`` or ``(batch, *)``.
        temperature: The paper's tau, above 0: one for all, or one an example in the shape of ``target``. The
            gradient reaches it, so it can be learnt; pass one that does not depend on ``input`` by autograd.
        radius: The paper's rho, in nats: the entropy that the best temperature brings about is
            ``log(classes) - radius``. Useful inside ``(0, log(classes))``; warns outside.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses in the shape of ``target``.

    Raises:
        ValueError: If the temperature is not above 0, the radius is negative, or the batch is malformed.

    Example:
        >>> robust_temperature_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), temperature=1.0, radius=0.5)
        tensor(-0.0662)

    Source:
        Qiu et al. 2024, arXiv 2404.04575, the constrained robust loss, its constant ``-tau_0 rho`` left out.
    """
    rows, labels, row_weight = class_rows(input, target, weight=weight, ignore_index=ignore_index)
    _check_radius(radius, rows.shape[1])
    if isinstance(temperature, Tensor):
        if temperature.shape != target.shape:
            raise ValueError(
                f"temperature must be a number or have the target's shape {tuple(target.shape)}, "
                f"got {tuple(temperature.shape)}"
            )
        checks.require(temperature > 0, lambda: "temperature must be above 0")
        temperature = temperature.reshape(-1)
    else:
        checks.positive(temperature, "temperature")
    losses = _robust_losses(rows, labels, temperature, radius)
    return reduce(losses, reduction, row_weight=row_weight, shape=target.shape)


@torch.no_grad()
def exact_temperature(
    input: Float[Tensor, "batch classes"],
    *,
    radius: float,
    temperature_min: float,
    temperature_max: float,
    iterations: int = 60,
) -> Float[Tensor, " batch"]:
    r"""Solve for the temperatures in a range that minimise the robust loss: what a TempNet approximates.

    :math:`KL(softmax(h/\tau) \| u)` falls in :math:`\tau`, so bisection on its logarithm finds where it is the radius,
    or ends at the edge of the range. The answer needs no label.

    Args:
        input: Scores ``(batch, classes)``.
        radius: The paper's rho, in nats; warns outside ``(0, log(classes))``.
        temperature_min: Lower edge, above 0.
        temperature_max: Upper edge.
        iterations: Bisection steps; 60 exhaust float64.

    Returns:
        One temperature an example, without gradient.

    Raises:
        ValueError: If the range is empty, the radius negative, or the scores are not finite.

    Example:
        >>> exact_temperature(torch.tensor([[2.0, 0.0]]), radius=0.5, temperature_min=0.01, temperature_max=9.0)
        tensor([0.6704])

    Source:
        Qiu et al. 2024, arXiv 2404.04575: the inner minimum over tau of the robust loss.
    """
    checks.floating(input, "input")
    checks.finite(input, "input")
    _check_range(temperature_min, temperature_max)
    _check_radius(radius, input.shape[1])
    scores = input.to(torch.promote_types(input.dtype, torch.float32))
    low = torch.full_like(scores[:, 0], math.log(temperature_min))
    high = torch.full_like(scores[:, 0], math.log(temperature_max))
    for _ in range(iterations):
        middle = (low + high) / 2
        too_peaked = _kl_from_uniform(scores, middle.exp()) > radius
        low = torch.where(too_peaked, middle, low)
        high = torch.where(too_peaked, high, middle)
    return ((low + high) / 2).exp().clamp(temperature_min, temperature_max).to(input.dtype)


class TempNet(nn.Module):
    r"""Predict a temperature for each row of features by pooling learnt prototypes.

    ``kind="logits"`` (language models, classifiers) reads scores or hidden states :math:`x`, scaled to norm 1, and
    pools :math:`v = W_2\,sigmoid(W_1 x + b_1) + b_2`. ``kind="prototype"`` (contrastive training) reads an embedding
    :math:`e` and pools :math:`sigmoid(k)` with weights from :math:`k = sigmoid(W e + b)\,\hat P^T`, the rows of
    :math:`\hat P` being prototypes of norm 1. Both apply dropout behind the first sigmoid.

    Parameters and arithmetic stay in float32 when the rest of the model is cast lower: steps of the learning rates in
    use would be lost in bfloat16, and the pooling softmax overflows in float16.

    Args:
        in_features: Width of the input: classes, hidden width or embedding width.
        kind: ``"logits"`` or ``"prototype"``.
        hidden: The paper's M, the number of prototypes; 256 in the official code.
        temperature_min: Lower edge of the output, above 0; 0.01 in the official LLaMA runs.
        temperature_max: Upper edge of the output; 2 in the official LLaMA runs.
        dropout: Probability; 0.5 in the official code.
        pooling_temperature: Start of the learnt :math:`e^\phi`. None: 1 for logits, 0.01 for prototypes (official).

    Attributes:
        generator: Draws the dropout masks. None: torch's global stream.

    Example:
        >>> net = TempNet(10, temperature_min=0.5, temperature_max=1.5)
        >>> net(torch.randn(4, 10)).shape
        torch.Size([4])

    Source:
        Qiu et al. 2024, arXiv 2404.04575, the temperature network; shapes and starts as in the official code.
    """

    def __init__(
        self,
        in_features: int,
        *,
        kind: Kind = "logits",
        hidden: int = 256,
        temperature_min: float = 0.01,
        temperature_max: float = 2.0,
        dropout: float = 0.5,
        pooling_temperature: float | None = None,
    ) -> None:
        super().__init__()
        checks.one_of(kind, "kind", ("logits", "prototype"))
        for name, size in (("in_features", in_features), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        _check_range(temperature_min, temperature_max)
        checks.between(dropout, "dropout", 0.0, 1.0, high_open=True)
        if pooling_temperature is None:
            pooling_temperature = 1.0 if kind == "logits" else 0.01
        checks.positive(pooling_temperature, "pooling_temperature")
        self.in_features = in_features
        self.kind = kind
        self.temperature_min = temperature_min
        self.temperature_max = temperature_max
        self.dropout = dropout
        self.generator: torch.Generator | None = None
        width = hidden if kind == "logits" else in_features
        self.transform = nn.Linear(in_features, width)
        self.prototypes = nn.Parameter(torch.randn(hidden, width))
        if kind == "logits":
            bound = 1 / math.sqrt(width)  # as nn.Linear draws its weights
            nn.init.uniform_(self.prototypes, -bound, bound)
            self.offsets = nn.Parameter(torch.empty(hidden).uniform_(-bound, bound))
        else:
            self.register_parameter("offsets", None)
        self.log_pooling_temperature = nn.Parameter(torch.tensor(math.log(pooling_temperature)))
        self.importance = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
        """Predict the temperatures of features ``(rows, in_features)``, with dropout in training mode."""
        return self._temperatures(features, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def predict(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
        """Predict temperatures for use: without dropout or gradient, in training mode too."""
        return self._temperatures(features, 0.0)

    @torch.no_grad()
    def init_prototypes(self, features: Float[Tensor, "rows features"]) -> None:
        """Start the prototypes of ``kind="prototype"`` at embeddings, in the paper those of the other modality.

        Args:
            features: Embeddings ``(rows, in_features)``; the first ``hidden`` rows are transformed and copied, and
                prototypes beyond their number keep their random start.
        """
        if self.kind != "prototype":
            raise ValueError(f"init_prototypes needs kind='prototype', got kind={self.kind!r}")
        transformed = self._transform(features[: len(self.prototypes)])
        self.prototypes[: len(transformed)] = transformed

    def _temperatures(self, features: Tensor, dropout: float) -> Tensor:
        # Autocast would send the matrix products to the lower precision that this network must not be in.
        with torch.autocast(features.device.type, enabled=False):
            x = self._transform(features)
            if dropout > 0:
                x = self._drop(x, dropout)
            if self.offsets is not None:
                keys = values = F.linear(x, self.prototypes, self.offsets)
            else:
                keys = F.linear(x, F.normalize(self.prototypes, dim=1))
                values = torch.sigmoid(keys)
            weights = torch.softmax(keys * torch.exp(-self.log_pooling_temperature), dim=1)
            pooled = ((weights - 1 / weights.shape[1]) * values) @ self.importance + self.bias
            checks.finite(pooled.detach(), "features")  # one number a row tells of all that was read
            width = self.temperature_max - self.temperature_min
            return self.temperature_min + width * torch.sigmoid(pooled)

    def _transform(self, features: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features must have shape (rows, {self.in_features}), got {tuple(features.shape)}")
        x = features.to(self.transform.weight.dtype)
        if self.kind == "logits":
            x = F.normalize(x, dim=1)
        return torch.sigmoid(self.transform(x))

    def _drop(self, x: Tensor, probability: float) -> Tensor:
        device = x.device if self.generator is None else self.generator.device
        kept = torch.rand(x.shape, generator=self.generator, device=device).to(x.device) >= probability
        return x * kept / (1 - probability)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(at_least_float32(fn), recurse)


class RobustTemperatureLoss(Loss):
    r"""Cross-entropy at temperatures that a :class:`TempNet` predicts, trained by the robust loss.

    The network's parameters are this module's: give them to an optimizer (the official joint runs use a rate 300
    times below the model's; :func:`minimand.training.fit` uses the model's own). Train both together, or only the
    network on the scores of a frozen model. It sees detached scores, so no gradient reaches the model through it. After
    joint training the scores are on the scale of the temperatures: predict with :meth:`link`.

    Args:
        tempnet: Reads the scores, or what is passed as ``features``. :meth:`for_classes` builds one.
        radius: The paper's rho, in nats: ``log(classes)`` less the predictive entropy aimed at. Official runs use
            8 of ``log 50257 = 10.8`` for GPT-2, 8 to 8.5 of ``log 32000 = 10.4`` for LLaMA-2.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = RobustTemperatureLoss.for_classes(10)
        >>> loss(torch.zeros(4, 10), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])

    Source:
        Qiu et al. 2024, arXiv 2404.04575, its language model objective.
    """

    weight: Tensor | None

    def __init__(
        self,
        tempnet: TempNet,
        *,
        radius: float,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(radius, "radius")
        self.tempnet = tempnet
        self.radius = radius
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    @classmethod
    def for_classes(
        cls,
        num_classes: int,
        *,
        radius: float | None = None,
        hidden: int | None = None,
        temperature_min: float = 0.01,
        temperature_max: float = 2.0,
        dropout: float = 0.5,
        reduction: Reduction = "mean",
    ) -> RobustTemperatureLoss:
        """Build the loss with a network that reads the scores of ``num_classes`` classes.

        Args:
            num_classes: Classes, or size of the vocabulary.
            radius: The paper's rho. None: three quarters of ``log(num_classes)``, as in the official language
                model runs.
            hidden: Prototypes of the network. None: the paper's 256, which are for vocabularies, but no more than four
                a class: with ten classes they would outweigh the model.
            temperature_min: Lower edge of the temperatures.
            temperature_max: Upper edge of the temperatures.
            dropout: Of the network.
            reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.
        """
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        net = TempNet(
            num_classes,
            hidden=min(256, 4 * num_classes) if hidden is None else hidden,
            temperature_min=temperature_min,
            temperature_max=temperature_max,
            dropout=dropout,
        )
        return cls(net, radius=0.75 * math.log(num_classes) if radius is None else radius, reduction=reduction)

    @property
    def generator(self) -> torch.Generator | None:
        """Draws the network's dropout masks. None: torch's global stream."""
        return self.tempnet.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self.tempnet.generator = generator

    def forward(self, input: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``.

        ``features`` ``(batch, in_features, *)``, for example the last hidden states, is what the network reads in
        place of the scores: far fewer parameters than a large vocabulary takes.
        """
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        _check_radius(self.radius, rows.shape[1])
        temperature = self.tempnet(rows.detach() if features is None else _rows(features.detach()))
        losses = _robust_losses(rows, labels, temperature, self.radius)
        return reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)

    def link(self, input: Tensor, features: Tensor | None = None) -> Tensor:
        """Return softmax(scores / temperature), at the temperatures that the network predicts."""
        temperature = self.tempnet.predict(_rows(input if features is None else features))
        temperature = temperature.reshape(input.shape[0], 1, *input.shape[2:])
        return torch.softmax(input / temperature, dim=1).to(input.dtype)


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a module's ``_apply`` move tensors but not cast them below float32."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.is_floating_point() and moved.itemsize < 4 else moved

    return apply


def _rows(features: Tensor) -> Tensor:
    return features if features.dim() == 2 else features.movedim(1, -1).reshape(-1, features.shape[1])


@no_type_check  # the compiler does not trace run-time type checks inside an autograd function
class _ScaledCrossEntropy(torch.autograd.Function):
    """Compute tau CE(h / tau, y) of each row, with its closed-form backward: p - e_y and H(p).

    Autograd's own takes half as long again and keeps two tensors of the scores' size where this keeps the scores. The
    backward is a function of the inputs alone, so it can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return temperature * F.cross_entropy(scores / temperature[:, None], labels, reduction="none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        scores, labels, temperature = ctx.saved_tensors
        log_p = torch.log_softmax(scores / temperature[:, None], dim=1)
        p = log_p.exp()
        to_scores = to_temperature = None
        if ctx.needs_input_grad[2]:
            # A batched product, since p * log_p would be written out to be summed.
            to_temperature = -gradient * torch.matmul(p[:, None, :], log_p[:, :, None])[:, 0, 0]
        if ctx.needs_input_grad[0]:
            to_scores = (gradient[:, None] * p).scatter_add(1, labels[:, None], -gradient[:, None])
        return to_scores, None, to_temperature


def _robust_losses(rows: Tensor, labels: Tensor, temperature: float | Tensor, radius: float) -> Tensor:
    """Compute tau CE(h / tau) + (rho - log K) tau, in float32 at least: h / tau overflows a short exponent."""
    scores = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.dtype)
    else:
        temperature = torch.full_like(scores[:, 0], temperature)
    losses = _ScaledCrossEntropy.apply(scores, labels, temperature)
    return (losses + (radius - math.log(rows.shape[1])) * temperature).to(rows.dtype)


def _kl_from_uniform(scores: Tensor, temperature: Tensor) -> Tensor:
    log_p = torch.log_softmax(scores / temperature[:, None], dim=-1)
    return (log_p.exp() * log_p).sum(-1) + math.log(scores.shape[1])


def _check_range(temperature_min: float, temperature_max: float) -> None:
    checks.positive(temperature_min, "temperature_min")
    checks.positive(temperature_max, "temperature_max")
    if temperature_min >= temperature_max:
        raise ValueError(f"temperature_min must be below temperature_max, got {temperature_min} and {temperature_max}")


def _check_radius(radius: float, classes: int) -> None:
    checks.non_negative(radius, "radius")
    if not 0 < radius < math.log(classes) and not torch.compiler.is_compiling():
        edge = "temperature_max" if radius == 0 else "temperature_min"
        warnings.warn(
            f"radius {radius:g} is outside (0, log {classes} = {math.log(classes):.4g}), so every temperature ends at "
            f"{edge}; log {classes} less the predictive entropy wanted is a sensible radius",
            stacklevel=3,
        )
