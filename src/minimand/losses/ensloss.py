r"""EnsLoss: a new convex, classification-calibrated loss at every step, for binary classification.

A step of gradient descent sees a margin loss :math:`\phi(s)`, :math:`s_i = y_i f(x_i)` with :math:`y_i = \pm 1`, only
by its derivatives :math:`g_i = \phi'(s_i)`. So these are drawn instead of :math:`\phi`:

1. magnitudes :math:`m_i = \min(BC_\lambda^{-1}(\xi_i), c)` with :math:`\xi_i \sim N(0, 1)`, where the inverse Box-Cox
   map is :math:`BC_\lambda^{-1}(\xi) = (1 + \lambda \xi)_+^{1/\lambda}`, or :math:`e^\xi` at :math:`\lambda = 0`;
2. sorted so that the smallest margin gets the largest, :math:`s_i \le s_j \Rightarrow g_i \le g_j`: :math:`\phi` is
   convex;
3. divided by the margin where :math:`s_i > 1`, so that :math:`\phi` levels off on the right;
4. :math:`g_i = -m_i - \varepsilon < 0`, so that :math:`\phi'(0) < 0`: with convexity, calibration.

The loss of an example is :math:`g_i s_i` with :math:`g_i` held constant. Only its gradient means anything: the value
need not fall, and may be far below zero.

Source: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification", ICML 2025,
PMLR 267, arXiv 2409.00908. The paper is binary. More than two classes one against the rest are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss

Tail = Literal["inverse"] | None
Targets = Literal["binary", "signed"]


def inverse_box_cox(xi: Float[Tensor, "*shape"], lam: float | Tensor) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`(1 + \lambda \xi)_+^{1/\lambda}`, and :math:`e^\xi` at :math:`\lambda = 0`.

    Args:
        xi: Any numbers.
        lam: The Box-Cox exponent lambda, a number or a scalar tensor.

    Returns:
        Non-negative numbers; infinity where ``lam`` is negative and ``1 + lam * xi`` is not positive.

    Example:
        >>> inverse_box_cox(torch.tensor([0.0, 1.0]), 0.5)
        tensor([1.0000, 2.2500])

    Source:
        Dai 2025, arXiv 2409.00908; the inverse of Box and Cox 1964.
    """
    power = torch.as_tensor(lam, dtype=xi.dtype, device=xi.device)
    safe = torch.where(power == 0, torch.ones_like(power), power)
    # By log1p, so that small exponents run into the exponential without losing digits.
    return torch.where(power == 0, xi, torch.log1p((power * xi).clamp_min(-1)) / safe).exp()


def calibrated_derivatives(
    margins: Float[Tensor, "batch *columns"],
    draws: Float[Tensor, "batch *columns"],
    *,
    clip: float | None = 1.0,
    tail: Tail = "inverse",
    eps: float = 1e-6,
) -> Float[Tensor, "batch *columns"]:
    """Turn magnitudes into the derivatives of a convex calibrated loss at the margins.

    Args:
        margins: One margin an example; several columns are several independent problems.
        draws: Non-negative magnitudes, in any order.
        clip: The largest magnitude, or None. 1 is the steepest slope of the hinge and the logistic loss.
        tail: ``"inverse"`` divides the derivative by the margin where that is above 1; None does not.
        eps: Subtracted from every derivative, above 0: keeps them strictly negative.

    Returns:
        Derivatives without gradient: negative, and non-decreasing in the margin.

    Raises:
        ValueError: If the shapes differ, a draw is negative, or a setting is out of range.

    Example:
        >>> calibrated_derivatives(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, 0.25, 3.0]))
        tensor([-0.1250, -1.0000, -0.5000])

    Source:
        Dai 2025, arXiv 2409.00908, and the released ``losses.py``.
    """
    if margins.shape != draws.shape:
        raise ValueError(f"draws must have the shape of margins, {tuple(margins.shape)}, got {tuple(draws.shape)}")
    if clip is not None:
        checks.positive(clip, "clip")
    checks.one_of(tail, "tail", ("inverse", None))
    checks.positive(eps, "eps")
    checks.require(draws >= 0, lambda: f"draws must be non-negative, got a smallest of {float(draws.min())}")
    s = margins.detach()
    sizes = draws if clip is None else draws.clamp_max(clip)
    order = s.argsort(dim=0, stable=True)
    magnitude = torch.zeros_like(s).scatter(0, order, sizes.to(s.dtype).sort(dim=0, descending=True).values)
    if tail == "inverse":
        magnitude = magnitude / s.clamp_min(1)
    return -magnitude - eps


def check_cc(margins: Float[Tensor, " batch"], g: Float[Tensor, " batch"]) -> bool:
    """Tell whether derivatives at margins are those of a convex loss that falls everywhere, hence calibrated.

    A differentiable convex margin loss is classification-calibrated if and only if its slope at 0 is negative.
    Examples of equal margin may have different derivatives: those of a kink.

    Args:
        margins: One margin an example.
        g: The derivative of the loss at each.

    Returns:
        Whether ``g`` is negative and non-decreasing in the margin.

    Example:
        >>> s = torch.tensor([-1.0, 0.0, 2.0])
        >>> check_cc(s, -torch.sigmoid(-s)), check_cc(s, -s.square())
        (True, False)

    Source:
        Bartlett, Jordan and McAuliffe 2006, Theorem 2; Dai 2025, arXiv 2409.00908.
    """
    by_slope = g.argsort()
    ordered = g[by_slope][margins[by_slope].argsort(stable=True)]
    return bool((g < 0).all()) and bool((ordered.diff() >= 0).all())


class EnsLoss(Loss):
    r"""Draw a new convex calibrated loss at every step: a dropout over loss functions.

    Scores may be raw, ``(batch,)`` or ``(batch, 1)``, positive for class 1; or ``(batch, 2)``, whose margin is the
    difference of the columns. With more classes, which the paper does not have, each column is a binary problem
    of its own, that class against the rest, and their losses are added.

    The examples of a batch share one draw by their ranks, so batches below 16 are of little use. In evaluation mode
    nothing is drawn: magnitudes are the quantiles of their distribution, to which large batches converge.

    Args:
        boxcox_lambda: The paper's lambda: 0 draws log-normal magnitudes, as in the released configuration;
            ``"random"`` draws it uniformly from [-1, 1].
        period: With ``"random"``: lambda is drawn anew every so many training calls. None: at the first only, and
            by :meth:`resample`.
        clip: The largest magnitude; 1 as in the released code. None does not clip.
        tail: ``"inverse"`` as in the released code, or None: the division may hurt where labels are noisy.
        eps: Subtracted from every derivative; 1e-6 as in the released code.
        derivative: In place of the draws: a function from margins to the derivative of a fixed margin loss.
        targets: For raw scores: ``"binary"`` labels are 0 and 1, ``"signed"`` are -1 and 1.
        generator: Where the numbers are drawn from; None is torch's default.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = EnsLoss(generator=torch.Generator().manual_seed(0))
        >>> loss(torch.randn(128), torch.randint(2, (128,))).shape
        torch.Size([])

    Source:
        Dai 2025, arXiv 2409.00908, and its released code.
    """

    couples_batches = True
    current_lambda: Tensor
    calls: Tensor

    def __init__(
        self,
        boxcox_lambda: float | Literal["random"] = 0.0,
        *,
        period: int | None = None,
        clip: float | None = 1.0,
        tail: Tail = "inverse",
        eps: float = 1e-6,
        derivative: Callable[[Tensor], Tensor] | None = None,
        targets: Targets = "binary",
        generator: torch.Generator | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        if isinstance(boxcox_lambda, str):
            checks.one_of(boxcox_lambda, "boxcox_lambda", ("random",))
        elif not math.isfinite(boxcox_lambda):
            raise ValueError(f"boxcox_lambda must be a finite number or 'random', got {boxcox_lambda}")
        elif abs(boxcox_lambda) > 1:
            warnings.warn(f"boxcox_lambda is {boxcox_lambda}; the method draws it from [-1, 1]", stacklevel=2)
        if period is not None and period < 1:
            raise ValueError(f"period must be at least 1 or None, got {period}")
        if clip is not None:
            checks.positive(clip, "clip")
        checks.one_of(tail, "tail", ("inverse", None))
        checks.positive(eps, "eps")
        checks.one_of(targets, "targets", ("binary", "signed"))
        self.boxcox_lambda = boxcox_lambda
        self.period = period
        self.clip = clip
        self.tail = tail
        self.eps = eps
        self.derivative = derivative
        self.targets = targets
        self.generator = generator
        fixed = 0.0 if isinstance(boxcox_lambda, str) else boxcox_lambda
        self.register_buffer("current_lambda", torch.tensor(fixed))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def resample(self) -> None:
        """Draw lambda anew; only with ``boxcox_lambda="random"``."""
        if self.boxcox_lambda != "random":
            raise ValueError(f"boxcox_lambda is fixed at {self.boxcox_lambda}: there is nothing to draw")
        self.current_lambda.copy_(self._random_lambda())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch,)``, ``(batch, 1)`` or ``(batch, classes, *)`` and labels."""
        margins = self._margins(input, target)
        # A few thousand distinct slopes do not fit in half precision, and eps vanishes there.
        exact = margins.to(torch.promote_types(margins.dtype, torch.float32))
        if self.derivative is not None:
            g = self.derivative(exact.detach())
        else:
            g = calibrated_derivatives(exact, self._magnitudes(exact), clip=self.clip, tail=self.tail, eps=self.eps)
        losses = (g * exact).sum(1).to(margins.dtype)
        return reduce(losses, self.reduction, shape=target.shape)

    def link(self, input: Tensor) -> Tensor:
        """Return the logistic probabilities of the scores; EnsLoss itself fits none, only their order."""
        if input.dim() == 1 or input.shape[1] == 1:
            positive = torch.sigmoid(input.reshape(-1))
            return torch.stack([1 - positive, positive], dim=1)
        return super().link(input)

    def _margins(self, input: Tensor, target: Tensor) -> Tensor:
        """Return margins ``(rows, 1)``, or ``(rows, classes)`` for more than two classes."""
        checks.floating(input, "input")
        checks.tensor(target, "target")
        if input.dim() == 1 or (input.dim() == 2 and input.shape[1] == 1):
            scores, sign = input.reshape(-1, 1), self._signs(input, target)
        else:
            # An ignored example would still take a rank, so there is no ignore_index: 0 allows the classes only.
            rows, labels, _ = class_rows(input, target, ignore_index=0)
            if rows.shape[1] == 2:
                scores, sign = rows[:, 1:] - rows[:, :1], 2 * labels[:, None] - 1
            else:
                own = torch.arange(rows.shape[1], device=rows.device) == labels[:, None]
                scores, sign = rows, 2 * own.to(rows.dtype) - 1
        if len(scores) < 2 and not torch.compiler.is_compiling():
            warnings.warn("input holds one example: its rank, and so its derivative, is arbitrary", stacklevel=3)
        return scores * sign

    def _signs(self, input: Tensor, target: Tensor) -> Tensor:
        checks.not_empty(input, "input")
        batch = len(input)
        # (batch, 1) scores less (batch,) labels would broadcast to all pairs.
        if tuple(target.shape) not in ((batch,), (batch, 1)):
            raise ValueError(
                f"target must have shape ({batch},) or ({batch}, 1) for input of shape {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
        low = 0 if self.targets == "binary" else -1
        checks.require(
            (target == low) | (target == 1),
            lambda: f"target must hold {low} and 1 only, got values from {target.min()} to {target.max()}",
        )
        return torch.where(target.reshape(-1, 1) == 1, 1, -1)

    def _random_lambda(self) -> Tensor:
        device = self.current_lambda.device if self.generator is None else self.generator.device
        return 2 * torch.rand((), generator=self.generator, device=device).to(self.current_lambda) - 1

    def _magnitudes(self, margins: Tensor) -> Tensor:
        """Draw magnitudes; in evaluation mode, take their quantiles."""
        if not self.training:
            rank = torch.arange(len(margins), dtype=margins.dtype, device=margins.device)
            xi = torch.special.ndtri((rank + 0.5) / len(margins))[:, None].expand(margins.shape)
            return inverse_box_cox(xi, self.current_lambda)
        if self.boxcox_lambda == "random":
            due = self.calls == 0 if self.period is None else self.calls % self.period == 0
            self.current_lambda.copy_(torch.where(due, self._random_lambda(), self.current_lambda))
            self.calls += 1
        # Drawn in float32 whatever the scores are, so that the same seed gives the same loss in every precision.
        device = margins.device if self.generator is None else self.generator.device
        xi = torch.randn(margins.shape, generator=self.generator, device=device)
        return inverse_box_cox(xi.to(margins), self.current_lambda)
