r"""Label-distributionally robust losses: LDR-KL, and ALDR-KL whose temperature adapts to each example.

For scores :math:`f \in R^K`, label :math:`y`, margin :math:`c_k = c\,[k \ne y]` and temperature
:math:`\lambda`, LDR-KL is the worst case over label distributions near the uniform one,

.. math:: \psi_\lambda(f, y) = \max_{p \in \Delta} \sum_k p_k (f_k - f_y + c_k) - \lambda\,KL(p \| u)
          = \lambda \log \frac1K \sum_k e^{(f_k - f_y + c_k)/\lambda}.

:math:`\lambda = 1, c = 0` is cross-entropy less :math:`\log K`; :math:`\lambda \to 0` the multi-class hinge
loss; :math:`\lambda \to \infty` the symmetric loss :math:`\bar f + \bar c - f_y`. ALDR-KL maximises over
:math:`\lambda` as well, held near :math:`\lambda_0` by :math:`-\frac{\alpha}{2}(\lambda - \lambda_0)^2`, so that
an example whose scores are near uniform, often a mislabelled one, gets a large, forgiving temperature. The optimum
satisfies :math:`\lambda^* = \lambda_0 - KL(p_{\lambda^*} \| u) / \alpha`. No gradient flows through it (Danskin).

Source: Zhu, Ying and Yang, "Label Distributionally Robust Losses for Multi-class Classification", ICML 2023,
arXiv 2112.14869.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss

Normalize = Literal["l1", "softplus"] | None


def ldr_kl_loss(
    input: Float[Tensor, "batch classes *spatial"],
    target: Int[Tensor, "batch *spatial"],
    *,
    temperature: float = 1.0,
    margin: float = 0.1,
    normalize: Normalize = None,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the LDR-KL loss.

    Args:
        input: Scores ``(batch, classes)`` or ``(batch, classes, *)``.
        target: Class indices ``(batch,)`` or ``(batch, *)``.
        temperature: The paper's lambda, above 0: small fits every label, large forgives wrong ones.
        margin: The paper's c, at least 0, added to every class but the target. Default as in the official code.
        normalize: ``"l1"`` divides each row by its mean absolute score, ``"softplus"`` applies softplus
            first; both give ``temperature`` a fixed meaning whatever the scale of the scores.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses in the shape of ``target``.

    Raises:
        ValueError: If the temperature or margin is out of range, or the batch is malformed.

    Example:
        >>> ldr_kl_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), margin=0.0)  # cross-entropy - log 2
        tensor(-0.5662)

    Source:
        Zhu et al. 2023, arXiv 2112.14869, the LDR-KL loss with its margin.
    """
    checks.positive(temperature, "temperature")
    checks.non_negative(margin, "margin")
    rows, labels, row_weight = class_rows(input, target, weight=weight, ignore_index=ignore_index)
    losses = _ldr_kl(normalize_scores(rows, normalize), labels, margin, temperature)
    return reduce(losses, reduction, row_weight=row_weight, shape=target.shape)


def aldr_temperature(
    scores: Float[Tensor, "batch classes"],
    temperature: float,
    alpha: float,
    *,
    iterations: int = 60,
) -> Float[Tensor, " batch"]:
    r"""Solve for the temperatures that maximise ALDR-KL, to machine precision.

    The fixed-point map :math:`\lambda \mapsto \lambda_0 - KL(p_\lambda \| u)/a`, with
    :math:`a = \alpha \log K / \lambda_0`, increases, so iterating it from either end of
    :math:`[\lambda_0(1 - 1/\alpha), \lambda_0]` converges monotonically. Both ends are kept, since about two
    problems in a hundred have two fixed points, and the one with the larger objective is returned.

    Args:
        scores: Normalised scores, with the margin added where it is to count.
        temperature: The paper's lambda_0.
        alpha: Above 1: temperatures stay above ``temperature * (1 - 1 / alpha)``.
        iterations: Fixed-point steps from each end.

    Returns:
        One temperature an example, without gradient.

    Raises:
        ValueError: If ``temperature`` or ``alpha`` is out of range.

    Example:
        >>> aldr_temperature(torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]), 1.0, 2.0)  # unsure, sure
        tensor([1.0000, 0.5029])

    Source:
        Zhu et al. 2023, arXiv 2112.14869, the inner maximisation of ALDR-KL.
    """
    checks.positive(temperature, "temperature")
    checks.between(alpha, "alpha", 1.0, math.inf, low_open=True, high_open=True)
    z = scores.detach()
    z = (z - z.amax(-1, keepdim=True)).to(torch.promote_types(z.dtype, torch.float32))
    log_classes = math.log(z.shape[-1])
    strength = alpha * log_classes / temperature
    tolerance = 4 * torch.finfo(z.dtype).eps * temperature

    def step(value: Tensor) -> Tensor:
        return temperature - _kl_from_uniform(z, value) / strength

    def settle(value: Tensor) -> Tensor:
        for _ in range(iterations):
            previous, value = value, step(value)
            # Only eager code on a CPU may look at the value without a stall.
            readable = checks.values_readable(value) and value.device.type == "cpu"
            if readable and bool(((value - previous).abs() <= tolerance).all()):
                break
        return value

    def objective(value: Tensor) -> Tensor:
        smooth_max = value * (torch.logsumexp(z / value[:, None], dim=-1) - log_classes)
        return smooth_max - strength / 2 * (value - temperature) ** 2

    top = settle(torch.full_like(z[:, 0], temperature))
    bottom = settle(torch.full_like(z[:, 0], temperature * (1 - 1 / alpha)))
    return torch.where(objective(top) >= objective(bottom), top, bottom).to(scores.dtype)


def normalize_scores(scores: Float[Tensor, "rows classes"], how: Normalize) -> Float[Tensor, "rows classes"]:
    """Scale each row to mean absolute score 1 (``"l1"``), after softplus (``"softplus"``), or not at all."""
    if how is None:
        return scores
    if how == "softplus":
        scores = F.softplus(scores)
    elif how != "l1":
        raise ValueError(f"normalize must be None, 'l1' or 'softplus', got {how!r}")
    # A row of zeros has no scale; the clamp leaves it at zero.
    return scores / scores.abs().mean(-1, keepdim=True).clamp_min(1e-12)


class LDRKLLoss(Loss):
    """LDR-KL: temperature-scaled cross-entropy with a margin, read as a worst case over label distributions.

    Args:
        temperature: The paper's lambda, above 0.
        margin: The paper's c, at least 0; 0.1 in the official code.
        normalize: None, ``"l1"`` or ``"softplus"``: how scores are scaled first.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = LDRKLLoss(temperature=2.0)
        >>> loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])

    Source:
        Zhu et al. 2023, arXiv 2112.14869.
    """

    weight: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        margin: float = 0.1,
        normalize: Normalize = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.positive(temperature, "temperature")
        checks.non_negative(margin, "margin")
        checks.one_of(normalize, "normalize", (None, "l1", "softplus"))
        self.temperature = temperature
        self.margin = margin
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return ldr_kl_loss(
            input,
            target,
            temperature=self.temperature,
            margin=self.margin,
            normalize=self.normalize,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def link(self, input: Tensor) -> Tensor:
        """Return softmax(scores / temperature), whose logarithm the population minimiser recovers."""
        return torch.softmax(normalize_scores(input, self.normalize) / self.temperature, dim=-1)


class ALDRKLLoss(Loss):
    """ALDR-KL: LDR-KL whose temperature is solved for each training example.

    With ``solve="running"`` (the paper's algorithm) each example keeps its temperature in a buffer and takes
    one fixed-point step each time it is seen, at the price of a softmax; the loss then needs ``index``.
    With ``solve="exact"`` the inner problem is solved anew for each batch and no index is needed.

    Args:
        num_samples: Size of the training set, for ``solve="running"``. None: sized by :meth:`start`.
        temperature: The paper's lambda_0, the largest temperature; {0.1, 1, 10} in the official runs.
        alpha: The official code's alpha_c, above 1: temperatures stay above ``temperature * (1 - 1/alpha)``.
        margin: The paper's c; 0.1 in the official code.
        normalize: None, ``"l1"`` (official default) or ``"softplus"``.
        solve: ``"running"`` or ``"exact"``.
        margin_in_temperature: Whether the margin enters the temperature's optimality condition: True is the
            exact stationarity, False the official code.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = ALDRKLLoss(num_samples=100)
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 1]), index=torch.tensor([7, 42])).shape
        torch.Size([])

    Source:
        Zhu et al. 2023, arXiv 2112.14869, and its official code's running update.
    """

    temperatures: Tensor
    weight: Tensor | None

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        temperature: float = 1.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: Normalize = "l1",
        solve: Literal["running", "exact"] = "running",
        margin_in_temperature: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.positive(temperature, "temperature")
        checks.between(alpha, "alpha", 1.0, math.inf, low_open=True, high_open=True)
        checks.non_negative(margin, "margin")
        checks.one_of(normalize, "normalize", (None, "l1", "softplus"))
        checks.one_of(solve, "solve", ("running", "exact"))
        self.temperature = temperature
        self.alpha = alpha
        self.margin = margin
        self.normalize = normalize
        self.solve = solve
        self.needs = ("index",) if solve == "running" else ()
        self.margin_in_temperature = margin_in_temperature
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)
        self.register_buffer("temperatures", torch.full((num_samples or 0,), temperature))

    def start(self, model: nn.Module, num_samples: int) -> None:
        """Give each of ``num_samples`` examples the starting temperature."""
        self.temperatures = self.temperatures.new_full((num_samples,), self.temperature)

    def forward(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Compute the loss; ``index`` ``(batch,)`` gives the examples' places in the training set.

        In training mode ``solve="running"`` first updates the temperatures of the batch; in evaluation mode it
        uses those stored.
        """
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        scores = normalize_scores(rows, self.normalize)
        judged = scores
        if self.margin_in_temperature:
            judged = scores.scatter_add(1, labels[:, None], torch.full_like(scores[:, :1], -self.margin))
        temperature = self._temperature(judged, target, index)
        strength = self.alpha * math.log(rows.shape[1]) / self.temperature
        losses = (
            _ldr_kl(scores, labels, self.margin, temperature) - strength / 2 * (temperature - self.temperature) ** 2
        )
        return reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)

    def link(self, input: Tensor) -> Tensor:
        """Return softmax(scores / lambda*), with each row's own exact temperature."""
        scores = normalize_scores(input, self.normalize)
        return torch.softmax(scores / aldr_temperature(scores, self.temperature, self.alpha)[:, None], dim=-1)

    @torch.no_grad()
    def _temperature(self, scores: Tensor, target: Tensor, index: Tensor | None) -> Tensor:
        if self.solve == "exact":
            return aldr_temperature(scores, self.temperature, self.alpha)
        checks.index_of_examples(index, target.shape[0], len(self.temperatures))
        if target.dim() > 1:
            raise ValueError("solve='running' keeps one temperature an example: target must be (batch,)")
        strength = self.alpha * math.log(scores.shape[1]) / self.temperature
        old = self.temperatures[index].to(scores.dtype)
        if not self.training:
            return old
        new = self.temperature - _kl_from_uniform(scores, old) / strength
        self.temperatures[index] = new.to(self.temperatures.dtype)
        return new


def _ldr_kl(scores: Tensor, labels: Tensor, margin: float, temperature: float | Tensor) -> Tensor:
    """Return lambda log mean_k exp((f_k - f_y + c [k != y]) / lambda).

    The margin on every class but the target is a margin taken from the target, so this is torch's fused
    cross-entropy of shifted, scaled scores.
    """
    per_row = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    scaled = scores / per_row if isinstance(temperature, Tensor) or temperature != 1 else scores
    if margin:
        shift = (
            (-margin / per_row) if isinstance(per_row, Tensor) else torch.full_like(scores[:, :1], -margin / per_row)
        )
        scaled = scaled.scatter_add(1, labels[:, None], shift.to(scaled.dtype))
    return temperature * (F.cross_entropy(scaled, labels, reduction="none") - math.log(scores.shape[1]))


def _kl_from_uniform(scores: Tensor, temperature: Tensor) -> Tensor:
    """Return KL(softmax(scores / temperature) || uniform) of each row."""
    scaled = scores / temperature[:, None]
    scaled = scaled - scaled.amax(-1, keepdim=True)
    weight = scaled.exp()
    total = weight.sum(-1)
    return (weight * scaled).sum(-1) / total - total.log() + math.log(scores.shape[1])
