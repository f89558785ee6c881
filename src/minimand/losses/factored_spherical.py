r"""An output layer over very many classes, trained exactly at a cost that does not depend on their number.

With a loss of the spherical family (see :mod:`~minimand.losses.z_loss`) the gradient of the weights
:math:`W \in R^{D \times d}` is a rank-one matrix times old weights, plus a row for each target, plus one row
shared by all classes. So :math:`W` is kept as

.. math:: W = V U + 1 \omega^T, \qquad V \in R^{D \times d},\; U \in R^{d \times d},\; \omega \in R^d

beside :math:`U^{-1}`, :math:`Q = W^T W` and :math:`\bar w = W^T 1`. A batch :math:`H \in R^{m \times d}` with
targets :math:`c` gives :math:`q = h^T Q h`, :math:`s = \bar w^T h` and :math:`o_c` without the other scores. With
:math:`\alpha, \beta, \gamma` the derivatives by :math:`s, q, o_c`, :math:`B = \mathrm{diag}(2\beta)` and step size
:math:`\eta`, a step of SGD is

.. math::
    U' &= U - \eta\, U H^T B H, \qquad
    \omega' = \omega - \eta\, H^T (B H \omega + \alpha), \\
    P &= (I_m - \eta\, H H^T B)^{-1} H U^{-1} = H U'^{-1}, \qquad
    U'^{-1} = U^{-1} + \eta\, H^T B P, \\
    V_{c_i}' &= V_{c_i} - \eta\, \gamma_i P_i, \qquad
    \bar w' = \bar w - \eta\, H^T (B s + D \alpha + \gamma), \\
    Q' &= Q - H^T E - E^T H, \qquad E = \eta\, \frac{\partial L}{\partial H} - \frac{\eta^2}{2} G G^T\!H,

where row :math:`i` of :math:`G` is example :math:`i`'s gradient by the scores. It costs
:math:`O(m d^2 + m^2 d + m^3)` and touches at most :math:`m` rows of :math:`V`.

Source: Vincent, de Brébisson and Bouthillier, "Efficient Exact Gradient Update for training Deep Networks with Very
Large Sparse Targets", NIPS 2015, arXiv 1412.7091. The update of a whole batch, the Woodbury form and the weight decay
are re-derived here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import class_rows, reduce
from .z_loss import SphericalLoss

STATE = ("mixing", "mixing_inverse", "offset", "gram", "weight_sum")
ROWS_AT_ONCE = 8192  # rows of V that a pass over all classes works on: what it needs beyond V stays small


class FactoredSphericalLinear(nn.Module):
    r"""A linear output layer and its loss in one, whose exact SGD step costs the same for any number of classes.

    Equals ``loss(nn.Linear(in_features, num_classes)(input), target)`` trained by plain SGD. It holds one copy of
    the weights, in buffers that no optimizer sees, and updates them itself: after ``backward()``, call
    :meth:`step` beside the optimizer's. Reduction, class weights and ``ignore_index`` are the loss's own.

    Args:
        in_features: The paper's d.
        num_classes: The paper's D.
        loss: A member of the spherical family: :class:`~minimand.losses.ZLoss`,
            :class:`~minimand.losses.SquaredErrorLoss`, :class:`~minimand.losses.TaylorSoftmaxLoss`,
            :class:`~minimand.losses.SphericalSoftmaxLoss` or one of your own.
        bias: Whether each class has a bias.
        stabilise_period: Steps between two calls of :meth:`stabilise`, 100 as in the official example. Steps that
            squeeze U hard call it sooner; None leaves it to those.
        state_dtype: Of everything but V. float64 keeps :math:`q/D - (s/D)^2` from cancelling.
        device: Where the buffers live.
        dtype: Of V, the one large buffer.

    Example:
        >>> from minimand.losses import ZLoss
        >>> layer = FactoredSphericalLinear(8, num_classes=1000, loss=ZLoss())
        >>> hidden = torch.randn(4, 8, requires_grad=True)
        >>> layer(hidden, torch.tensor([3, 999, 3, 0])).backward()
        >>> layer.step(lr=0.1)
        >>> layer.predict(hidden, k=5).shape
        torch.Size([4, 5])

    Source:
        Vincent, de Brébisson and Bouthillier, NIPS 2015, arXiv 1412.7091.
    """

    class_factors: Tensor
    mixing: Tensor
    mixing_inverse: Tensor
    offset: Tensor
    gram: Tensor
    weight_sum: Tensor
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        *,
        num_classes: int,
        loss: SphericalLoss,
        bias: bool = True,
        stabilise_period: int | None = 100,
        state_dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, SphericalLoss):
            raise TypeError(f"loss must be a SphericalLoss such as ZLoss(), with value_and_partials, got {loss!r}")
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if num_classes < loss.min_classes:
            raise ValueError(
                f"num_classes must be at least {loss.min_classes} for {type(loss).__name__}, got {num_classes}"
            )
        if stabilise_period is not None and stabilise_period < 1:
            raise ValueError(f"stabilise_period must be at least 1 or None, got {stabilise_period}")
        if not state_dtype.is_floating_point:
            raise TypeError(f"state_dtype must be a floating-point dtype, got {state_dtype}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.has_bias = bias
        self.stabilise_period = stabilise_period
        self.loss: Any = loss
        width = in_features + bias
        state: dict[str, Any] = {"device": device, "dtype": state_dtype}
        self.register_buffer("class_factors", torch.empty(num_classes, width, device=device, dtype=dtype))
        self.register_buffer("mixing", torch.empty(width, width, **state))
        self.register_buffer("mixing_inverse", torch.empty(width, width, **state))
        self.register_buffer("offset", torch.empty(width, **state))
        self.register_buffer("gram", torch.empty(width, width, **state))
        self.register_buffer("weight_sum", torch.empty(width, **state))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self._passes: list[_Pass] = []
        self._updates = 0
        self.register_load_state_dict_post_hook(_forget_passes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights and biases as ``nn.Linear`` does, uniformly within 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        self.class_factors.uniform_(-bound, bound)
        self._reset_mixing()
        self._measure()
        self.steps.zero_()
        _forget_passes(self)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.has_bias}"

    def forward(
        self, input: Float[Tensor, "batch features"], target: Int[Tensor, " batch"]
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss, differentiable by ``input``; in training mode, prepare :meth:`step`.

        Args:
            input: Hidden vectors ``(batch, in_features)``.
            target: Class indices ``(batch,)``.

        Returns:
            The loss, reduced as ``loss`` says.

        Raises:
            ValueError: If the shapes disagree, an index is out of range, or a number is NaN or infinite.
        """
        self._check_input(input)
        # Scores that exist only as a shape: the loss's own checks, weights and ignore_index serve here as well.
        shape = input.new_zeros(()).expand(input.shape[0], self.num_classes)
        _, labels, row_weight = class_rows(
            shape,
            target,
            weight=self.loss.weight,
            ignore_index=self.loss.ignore_index,
            min_classes=self.loss.min_classes,
        )
        # Fixed features need no gradient, yet backward() must reach this layer.
        anchor = torch.zeros((), dtype=input.dtype, device=input.device, requires_grad=True)
        losses = _FactoredLosses.apply(input, anchor, self, labels)
        return reduce(losses, self.loss.reduction, row_weight=row_weight, shape=target.shape)

    @torch.no_grad()
    def step(self, lr: float, *, weight_decay: float = 0.0) -> None:
        """Take the step of SGD that the last ``backward()`` prepared.

        The same as ``torch.optim.SGD(lr, weight_decay=weight_decay)`` on weights and biases. A step so large that it
        would make U singular is taken by multiplying V out, which costs O(classes * in_features^2) once.

        Args:
            lr: The learning rate.
            weight_decay: The L2 penalty's factor; ``lr * weight_decay`` must stay below 1.

        Raises:
            RuntimeError: Unless exactly one ``backward()`` of one ``forward()`` ran since the last step.
            ValueError: If the update is not finite. The weights are then left as they were.
        """
        checks.non_negative(lr, "lr")
        checks.non_negative(weight_decay, "weight_decay")
        if lr * weight_decay >= 1:
            raise ValueError(f"lr * weight_decay must lie below 1, got {lr * weight_decay}")
        passes, self._passes = self._passes, []
        if len(passes) != 1:
            raise RuntimeError(
                f"step() wants exactly one backward() in training mode since the last step, got {len(passes)}"
            )
        if passes[0].update != self._updates:
            raise RuntimeError("step() wants a backward() of the current weights, but they changed since forward()")
        # SGD's W - lr (G + decay W) is keep * (W - lr / keep * G).
        keep = 1 - lr * weight_decay
        strained = self._descend(passes[0], lr / keep)
        if keep != 1:
            for value in (self.mixing, self.offset, self.weight_sum):
                value.mul_(keep)
            self.mixing_inverse.div_(keep)
            self.gram.mul_(keep**2)
        self._updates += 1
        self.steps += 1
        period = self.stabilise_period
        if strained or (period is not None and int(self.steps) % period == 0):
            self.stabilise()

    @torch.no_grad()
    def stabilise(self) -> None:
        """Bring U's singular values back to within a factor of 2 of their median; the weights stay as they are.

        Costs O(classes * in_features) for each value that had drifted, and calls :meth:`refactorise` when more than
        a third had.
        """
        squares, vectors = torch.linalg.eigh(self.mixing @ self.mixing.T)
        values = squares.clamp_min(0).sqrt()
        middle = values.median()
        drifted = (values < middle / 2) | (values > middle * 2)
        # V carries the reciprocal of U's scale: far from 1 it would leave its dtype's range.
        if int(drifted.sum()) > len(values) // 3 or not 1e-4 < float(middle) < 1e4 or bool((values == 0).any()):
            self.refactorise()
            return
        axes = vectors[:, drifted]
        stretch = middle / values[drifted]
        self.mixing += (axes * (stretch - 1)) @ (axes.T @ self.mixing)
        self.mixing_inverse = torch.linalg.inv(self.mixing)
        if len(stretch):
            shrink = (axes * (1 / stretch - 1)).to(self.class_factors.dtype)
            axes = axes.to(self.class_factors.dtype)
            for rows in self._blocks():
                rows.addmm_(rows @ shrink, axes.T)

    @torch.no_grad()
    def refactorise(self) -> None:
        """Multiply W out into V, reset U and omega, and measure Q and the sum of W anew.

        Costs O(classes * in_features^2). The weights stay as they are.
        """
        self._multiply_out()
        self._measure()

    @property
    def weight(self) -> Float[Tensor, "classes features"]:
        """The weights as ``nn.Linear`` would hold them, computed anew at each call."""
        return self._dense()[:, : self.in_features]

    @property
    def bias(self) -> Float[Tensor, " classes"] | None:
        """The biases as ``nn.Linear`` would hold them, computed anew at each call; None if there are none."""
        if not self.has_bias:
            return None
        last = self.mixing[:, -1].to(self.class_factors.dtype)
        return self.class_factors @ last + self.offset[-1].to(self.class_factors.dtype)

    @torch.no_grad()
    def predict(self, input: Float[Tensor, "batch features"], k: int = 1) -> Int[Tensor, "batch k"]:
        """Find the ``k`` classes that rank highest for each hidden vector, best first.

        Costs O(batch * classes * in_features): this scores every class, without forming W.
        """
        self._check_input(input)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must lie in [1, {self.num_classes}], got {k}")
        inputs = self._widen(input)
        mixed = (inputs @ self.mixing.T).to(self.class_factors.dtype)
        shared = (inputs @ self.offset)[:, None].to(self.class_factors.dtype)
        best = mixed.new_empty(len(mixed), 0)
        classes = torch.empty(len(mixed), 0, dtype=torch.int64, device=mixed.device)
        first = 0
        for rows in self._blocks():
            ranks = torch.cat((best, self.loss.ranking(mixed @ rows.T + shared)), dim=1)
            numbers = torch.arange(first, first + len(rows), device=mixed.device).expand(len(mixed), -1)
            best, places = ranks.topk(min(k, ranks.shape[1]), dim=1)
            classes = torch.cat((classes, numbers), dim=1).gather(1, places)
            first += len(rows)
        return classes

    def condition(self) -> float:
        """Return the condition number of U, by which V's rounding errors are magnified."""
        return float(torch.linalg.cond(self.mixing))

    def _check_input(self, input: Tensor) -> None:
        checks.floating(input, "input")
        if input.dim() != 2 or input.shape[1] != self.in_features:
            raise ValueError(f"input must have shape (batch, {self.in_features}), got {tuple(input.shape)}")
        checks.not_empty(input, "input")

    def _widen(self, input: Tensor) -> Tensor:
        inputs = input.detach().to(self.mixing.dtype)
        return nn.functional.pad(inputs, (0, 1), value=1.0) if self.has_bias else inputs

    def _descend(self, batch: _Pass, lr: float) -> bool:
        """Take one step of SGD and tell whether U should be stabilised at once."""
        inputs, pull, hidden_gradient = batch.inputs, batch.by_target, batch.by_input
        curved = batch.by_square[:, None] * 2 * inputs  # B H
        shared = batch.by_sum
        same = (batch.labels[:, None] == batch.labels).to(inputs.dtype)
        products = (
            hidden_gradient @ curved.T
            + curved @ (hidden_gradient - batch.by_square[:, None] * 2 * batch.gram_inputs).T
            + self.num_classes * torch.outer(shared, shared)
            + torch.outer(shared, pull)
            + torch.outer(pull, shared)
            + same * torch.outer(pull, pull)
        )  # G G^T
        change = lr * (hidden_gradient - lr / 2 * (products @ inputs))
        turned = inputs @ self.mixing_inverse
        system = -lr * (inputs @ curved.T)
        system.diagonal().add_(1)
        solved, failed = torch.linalg.solve_ex(system, turned)
        # What V's new rows, and with them their rounding errors, are magnified by: |U| |h U'^-1| / |h|.
        lengths = torch.linalg.vector_norm(inputs, dim=1).clamp_min(torch.finfo(inputs.dtype).tiny)
        growth = (torch.linalg.vector_norm(solved, dim=1) / lengths).amax()
        growth = growth * torch.linalg.matrix_norm(self.mixing) / math.sqrt(len(self.mixing))
        # One look at the numbers decides all: a stalled stream costs more than these few flops.
        finite, growth_value = torch.stack(
            (torch.isfinite(change).all().to(growth.dtype), torch.where(failed == 0, growth, math.inf))
        ).tolist()
        if not finite:
            raise ValueError("the update is not finite: lower lr, or look for NaN in the gradient of the loss")
        gram_change = inputs.T @ change
        self.mixing.addmm_(batch.mixed_inputs.T, curved, alpha=-lr)
        self.offset -= lr * (curved.T @ (inputs @ self.offset) + inputs.T @ shared)
        self.weight_sum -= lr * (inputs.T @ (2 * batch.by_square * batch.score_sum + self.num_classes * shared + pull))
        self.gram -= gram_change + gram_change.T
        limit = _largest_growth(self.class_factors.dtype)
        if growth_value < limit:
            self.mixing_inverse.addmm_(curved.T, solved, alpha=lr)
        else:
            self._multiply_out()
            solved, growth_value = inputs, 1.0
        rows = (-lr * pull[:, None] * solved).to(self.class_factors.dtype)
        self.class_factors.index_add_(0, batch.labels, rows)
        return growth_value > math.sqrt(limit)

    def _blocks(self) -> Iterator[Tensor]:
        return iter(self.class_factors.split(ROWS_AT_ONCE))

    def _multiply_out(self) -> None:
        for rows in self._blocks():
            rows.copy_(torch.addmm(self.offset, rows.to(self.mixing.dtype), self.mixing))
        self._reset_mixing()

    def _reset_mixing(self) -> None:
        for value in (self.mixing, self.mixing_inverse):
            value.zero_().diagonal().fill_(1)
        self.offset.zero_()

    def _measure(self) -> None:
        """Compute Q and the sum of W from V, where U is the identity and omega zero."""
        self.gram.zero_()
        self.weight_sum.zero_()
        for rows in self._blocks():
            exact = rows.to(self.gram.dtype)
            self.gram.addmm_(exact.T, exact)
            self.weight_sum += exact.sum(0)

    @torch.no_grad()
    def _dense(self) -> Tensor:
        dense = torch.empty_like(self.class_factors)
        for rows, out in zip(self._blocks(), dense.split(ROWS_AT_ONCE), strict=True):
            out.copy_(torch.addmm(self.offset, rows.to(self.mixing.dtype), self.mixing))
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredSphericalLinear:
        """Move with the module, but keep the state's dtype when V's changes (``.float()``, ``.to(bfloat16)``)."""
        state = {id(getattr(self, name)) for name in STATE}
        before = self.class_factors.dtype

        def moved(value: Tensor) -> Tensor:
            result = fn(value)
            return value.to(result.device) if id(value) in state and result.dtype != value.dtype else result

        super()._apply(moved, recurse)
        if self.class_factors.dtype != before:
            self.refactorise()
        _forget_passes(self)
        return self


@dataclasses.dataclass(frozen=True)
class _Pass:
    """What a forward and a backward pass leave for the step; derivatives are those of the reduced loss."""

    update: int
    labels: Tensor
    inputs: Tensor
    gram_inputs: Tensor
    mixed_inputs: Tensor
    score_sum: Tensor
    by_target: Tensor
    by_square: Tensor
    by_sum: Tensor
    by_input: Tensor


class _FactoredLosses(torch.autograd.Function):
    """The loss of each example from Q, the sum of W and its own row of V."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, anchor: Tensor, layer: FactoredSphericalLinear, labels: Tensor) -> Tensor:
        inputs = layer._widen(input)
        gram_inputs = inputs @ layer.gram
        mixed_inputs = inputs @ layer.mixing.T
        score_sum = inputs @ layer.weight_sum
        rows = layer.class_factors[labels].to(inputs.dtype)
        target_score = (rows * mixed_inputs).sum(1) + inputs @ layer.offset
        square_sum = (gram_inputs * inputs).sum(1)
        losses, by_target, by_square, by_sum = layer.loss.value_and_partials(
            target_score, square_sum, score_sum, layer.num_classes
        )
        own_weights = torch.addmm(layer.offset, rows, layer.mixing)
        by_input = (
            2 * by_square[:, None] * gram_inputs + by_target[:, None] * own_weights + by_sum[:, None] * layer.weight_sum
        )
        ctx.layer = layer
        ctx.result = _Pass(
            update=layer._updates,
            labels=labels,
            inputs=inputs,
            gram_inputs=gram_inputs,
            mixed_inputs=mixed_inputs,
            score_sum=score_sum,
            by_target=by_target,
            by_square=by_square,
            by_sum=by_sum,
            by_input=by_input,
        )
        return losses.to(input.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # The reduction's gradient (1/m of a mean, the weights of a risk) scales each example's derivatives.
        result, share = ctx.result, gradient.to(ctx.result.inputs.dtype)
        by_input = share[:, None] * result.by_input
        if ctx.layer.training:
            ctx.layer._passes.append(
                dataclasses.replace(
                    result,
                    by_target=share * result.by_target,
                    by_square=share * result.by_square,
                    by_sum=share * result.by_sum,
                    by_input=by_input,
                )
            )
        return by_input[:, : ctx.layer.in_features].to(gradient.dtype), None, None, None


def _forget_passes(layer: FactoredSphericalLinear, *_: Any) -> None:
    """Make step() refuse what was computed from weights that are no more."""
    layer._passes.clear()
    layer._updates += 1


def _largest_growth(dtype: torch.dtype) -> float:
    """Bound how far V's rounding errors may be magnified; at the square root of it U is stabilised."""
    return min(1e5, max(10.0, 1e-4 / torch.finfo(dtype).eps))
