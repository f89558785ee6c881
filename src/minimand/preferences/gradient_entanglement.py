r"""Gradient entanglement: why chosen and rejected log-probabilities move together, told before the step is taken.

Let :math:`g_w` and :math:`g_l` be the gradients of the log-probabilities of the chosen and the rejected answer, and
:math:`d_w = -\partial l / \partial \log\pi(y_w)`, :math:`d_l = \partial l / \partial \log\pi(y_l)` the coefficients
that a loss :math:`l` gives them. A gradient step of size :math:`s` changes the two by, to first order,

.. math:: \Delta_w = s\,(d_w \|g_w\|^2 - d_l \langle g_w, g_l \rangle), \qquad
          \Delta_l = s\,(d_w \langle g_w, g_l \rangle - d_l \|g_l\|^2),

so each depends on the other's gradient. With positive coefficients the chosen one rises if and only if
:math:`\langle g_w, g_l \rangle < (d_w / d_l) \|g_w\|^2`, the rejected one falls if and only if
:math:`\langle g_w, g_l \rangle < (d_l / d_w) \|g_l\|^2`, and both cannot go the wrong way at once. Under Adam,
momentum or clipping the step is no multiple of the gradient: there :func:`first_order_change` takes the step itself.

Source: Yuan, Zeng, Wu, Wang, Wang and Leqi, "A Common Pitfall of Margin-based Language Model Alignment: Gradient
Entanglement", ICLR 2025, arXiv 2410.13828. Conditions and coefficients are derived here.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from .pair_loss import PairLogProbabilities, PairLoss, check_pairs


class Regime(enum.IntEnum):
    """Where a step takes the two log-probabilities."""

    BOUNDARY = 0  # one of them stays, to first order
    DESIRED = 1  # chosen up, rejected down
    BOTH_UP = 2
    BOTH_DOWN = 3
    REVERSED = 4  # chosen down, rejected up: only where a coefficient is negative


class MarginCoefficients(NamedTuple):
    """How strongly a loss pushes each log-probability, one number a pair.

    Args:
        chosen: The paper's d_w: minus the loss's derivative by the chosen log-probability.
        rejected: The paper's d_l: the loss's derivative by the rejected log-probability.
    """

    chosen: Tensor
    rejected: Tensor


@dataclasses.dataclass(frozen=True)
class Entanglement:
    r"""The products of a pair's two gradients, and what they say of the next step; one number a pair.

    Args:
        inner: :math:`\langle g_w, g_l \rangle`.
        chosen_square: :math:`\|g_w\|^2`.
        rejected_square: :math:`\|g_l\|^2`.
        coefficients: The loss's coefficients of the two.
    """

    inner: Float[Tensor, "*batch"]
    chosen_square: Float[Tensor, "*batch"]
    rejected_square: Float[Tensor, "*batch"]
    coefficients: MarginCoefficients

    @property
    def cosine(self) -> Float[Tensor, "*batch"]:
        """Cosine of the two gradients; 0 where one of them vanishes."""
        return _quotient(self.inner, self.chosen_square.sqrt() * self.rejected_square.sqrt())

    @property
    def ratio(self) -> Float[Tensor, "*batch"]:
        """Inner product over the smaller squared norm: 1 is where a loss with equal coefficients entangles them."""
        return _quotient(self.inner, torch.minimum(self.chosen_square, self.rejected_square))

    @property
    def chosen_change(self) -> Float[Tensor, "*batch"]:
        """First-order change of the chosen log-probability for each unit of a gradient step."""
        return self.coefficients.chosen * self.chosen_square - self.coefficients.rejected * self.inner

    @property
    def rejected_change(self) -> Float[Tensor, "*batch"]:
        """First-order change of the rejected log-probability for each unit of a gradient step."""
        return self.coefficients.chosen * self.inner - self.coefficients.rejected * self.rejected_square

    @property
    def regime(self) -> Int[Tensor, "*batch"]:
        """Value of :class:`Regime` of each pair; a change within rounding of zero is on the boundary."""
        d_w, d_l = (value.abs() for value in self.coefficients)
        chosen = _sign(self.chosen_change, d_w * self.chosen_square + d_l * self.inner.abs())
        rejected = _sign(self.rejected_change, d_w * self.inner.abs() + d_l * self.rejected_square)
        rows = (
            (Regime.REVERSED, Regime.BOUNDARY, Regime.BOTH_DOWN),
            (Regime.BOUNDARY, Regime.BOUNDARY, Regime.BOUNDARY),
            (Regime.BOTH_UP, Regime.BOUNDARY, Regime.DESIRED),
        )
        return torch.tensor(rows, device=chosen.device)[chosen + 1, 1 - rejected]

    def share(self, regime: Regime) -> float:
        """Return the fraction of pairs in a regime."""
        return float((self.regime == regime).double().mean())

    def predicted(self, step: float) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Return the first-order changes, chosen and rejected, of a plain gradient step of that size."""
        checks.positive(step, "step")
        return step * self.chosen_change, step * self.rejected_change


def margin_coefficients(
    loss: PairLoss | Callable[[PairLogProbabilities], Tensor], pairs: PairLogProbabilities
) -> MarginCoefficients:
    r"""Compute the coefficients :math:`(d_w, d_l)` that a loss gives the two log-probabilities of each pair.

    By automatic differentiation with respect to the log-probabilities alone, so any loss will do and no model is
    touched.

    Args:
        loss: A loss on pairs, taken pair by pair whatever its reduction; or a function from
            :class:`PairLogProbabilities` to losses, which are added up.
        pairs: The log-probabilities at which the coefficients are asked for, with what else the loss needs.

    Returns:
        The coefficients, two times ``(batch,)``, without gradient. They are positive where the loss asks for a
        higher chosen and a lower rejected log-probability.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or an input that the loss needs is missing.

    Example:
        >>> pairs = PairLogProbabilities(*torch.tensor([[-3.0], [-9.0], [-4.0], [-5.0]]))
        >>> margin_coefficients(lambda pairs: (1 - pairs.chosen + pairs.rejected).relu() - pairs.chosen, pairs)
        MarginCoefficients(chosen=tensor([1.]), rejected=tensor([0.]))

    Source:
        Yuan et al. 2025, arXiv 2410.13828: the general form of a margin loss.
    """
    if isinstance(loss, PairLoss):
        check_pairs(pairs, reference=loss.needs_reference, lengths=loss.needs_lengths)
        each: Callable[[PairLogProbabilities], Tensor] = loss.losses
    else:
        check_pairs(pairs, reference=False)
        each = loss
    with torch.enable_grad():
        chosen, rejected = (value.detach().requires_grad_() for value in (pairs.chosen, pairs.rejected))
        total = each(pairs._replace(chosen=chosen, rejected=rejected)).sum()
        if not total.requires_grad:
            return MarginCoefficients(torch.zeros_like(chosen.detach()), torch.zeros_like(rejected.detach()))
        by_chosen, by_rejected = torch.autograd.grad(
            total, (chosen, rejected), allow_unused=True, materialize_grads=True
        )
    return MarginCoefficients(-by_chosen, by_rejected)


def entanglement(
    logp_chosen: Float[Tensor, "*batch"],
    logp_rejected: Float[Tensor, "*batch"],
    parameters: Iterable[Tensor],
    *,
    coefficients: MarginCoefficients | None = None,
) -> Entanglement:
    """Compute how the gradients of chosen and rejected log-probabilities hang together.

    Scalars cost two backward passes, each as deep as ``parameters`` lie; give the sums over a batch to see its mean
    gradients. Of ``(batch,)`` every pair is taken by itself, which costs as many passes as there are pairs and memory
    of ``batch`` times ``parameters``; :class:`LayerGradients` needs one pass for all. The graph is kept, so the loss
    may be computed from the same log-probabilities.

    Args:
        logp_chosen: Policy's log-probability of the chosen answer with its graph, a scalar or ``(batch,)``, in nats;
            dropout must be off.
        logp_rejected: The same for the rejected answer.
        parameters: What the gradients are taken by: all that is trained, or a few layers to save time. Those without
            a part in the log-probabilities count for nothing.
        coefficients: The loss's, from :func:`margin_coefficients`; None for ones, which stand for every loss of the
            margin alone (DPO, IPO short of its target).

    Returns:
        The products of the gradients, without a graph.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or no parameter has a part in a log-probability.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = entanglement(weight.sum(), (weight * torch.tensor([1.0, 3.0])).sum(), [weight])
        >>> found.inner, found.chosen_square, Regime(int(found.regime))  # 4 is more than the smaller square, 2
        (tensor(4.), tensor(2.), <Regime.BOTH_DOWN: 3>)

    Source:
        Yuan et al. 2025, arXiv 2410.13828: the gradient inner product condition.
    """
    wanted = tuple(parameters)
    if logp_chosen.dim() > 1 or logp_rejected.shape != logp_chosen.shape:
        raise ValueError(
            "logp_chosen and logp_rejected must both be scalars or have shape (batch,), got "
            f"{tuple(logp_chosen.shape)} and {tuple(logp_rejected.shape)}"
        )
    chosen = gradients_of(logp_chosen, wanted, "logp_chosen")
    rejected = gradients_of(logp_rejected, wanted, "logp_rejected")
    batch = logp_chosen.dim()
    products = ((chosen, rejected), (chosen, chosen), (rejected, rejected))
    inner, chosen_square, rejected_square = (inner_product(one, other, batch) for one, other in products)
    return of_products(inner, chosen_square, rejected_square, coefficients)


def token_inner_products(
    logp_chosen: Float[Tensor, " chosen_tokens"],
    logp_rejected: Float[Tensor, " rejected_tokens"],
    parameters: Iterable[Tensor],
) -> Float[Tensor, "chosen_tokens rejected_tokens"]:
    r"""Compute the inner products of the gradients of single tokens: where in the answers entanglement comes from.

    Entry (i, j) is :math:`\langle \nabla \log\pi(y_{w,i}), \nabla \log\pi(y_{l,j}) \rangle`; all entries add up to
    the inner product of the answers. Tokens that both answers share give positive entries, those that tell them apart
    negative ones. It costs a backward pass a token: for one pair at a time, and few layers.

    Args:
        logp_chosen: Log-probability of each token of the chosen answer, with its graph, in nats.
        logp_rejected: The same for the rejected answer.
        parameters: What the gradients are taken by.

    Returns:
        The inner products, without a graph.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If a number is not finite, an answer is empty, or no parameter has a part in it.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> token_inner_products(weight * torch.tensor([1.0, 2.0]), weight[:1] * 3, [weight])
        tensor([[3.],
                [0.]])

    Source:
        Yuan et al. 2025, arXiv 2410.13828: inner products of token gradients.
    """
    wanted = tuple(parameters)
    for value, name in ((logp_chosen, "logp_chosen"), (logp_rejected, "logp_rejected")):
        if value.dim() != 1:
            raise ValueError(f"{name} must hold one log-probability a token, (tokens,), got {tuple(value.shape)}")
    chosen = gradients_of(logp_chosen, wanted, "logp_chosen")
    rejected = gradients_of(logp_rejected, wanted, "logp_rejected")
    parts = [
        _wide(one).flatten(1) @ _wide(other).flatten(1).mT
        for one, other in zip(chosen, rejected, strict=True)
        if one is not None and other is not None
    ]
    return _checked(torch.stack(parts).sum(0)) if parts else logp_chosen.new_zeros(len(logp_chosen), len(logp_rejected))


def first_order_change(
    logp: Float[Tensor, "*batch"], parameters: Iterable[Tensor], updates: Iterable[Tensor]
) -> Float[Tensor, "*batch"]:
    r"""Compute what an update of the parameters does to log-probabilities, to first order.

    :math:`\langle \nabla_\theta \log\pi, \Delta\theta \rangle`, for the step that an optimizer really takes: Adam's,
    with momentum, clipped, decayed.

    Args:
        logp: Log-probabilities with their graph at the parameters before the update, a scalar or ``(batch,)``. A
            scalar costs one backward pass, a batch one a member.
        parameters: The parameters that are updated.
        updates: New minus old value of each, in the same order.

    Returns:
        The change of each log-probability, without a graph.

    Raises:
        TypeError: If ``logp`` is no floating-point tensor.
        ValueError: If parameters and updates do not match, a number is not finite, or no parameter has a part.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> first_order_change(weight.square().sum(), [weight], [torch.tensor([0.5, 0.0])])
        tensor(1.)

    Source:
        Taylor's theorem; Yuan et al. 2025, arXiv 2410.13828, for plain gradient steps.
    """
    wanted, moves = tuple(parameters), tuple(updates)
    if len(wanted) != len(moves) or any(one.shape != other.shape for one, other in zip(wanted, moves, strict=True)):
        raise ValueError(
            "updates must have one tensor for each parameter, of its shape: got "
            f"{[tuple(move.shape) for move in moves]} for {[tuple(value.shape) for value in wanted]}"
        )
    if logp.dim() > 1:
        raise ValueError(f"logp must be a scalar or have shape (batch,), got {tuple(logp.shape)}")
    return _checked(inner_product(gradients_of(logp, wanted, "logp"), moves, logp.dim()))


def of_products(
    inner: Tensor, chosen_square: Tensor, rejected_square: Tensor, coefficients: MarginCoefficients | None
) -> Entanglement:
    """Make an :class:`Entanglement` of checked products; ones stand for coefficients that are not given."""
    for value in (inner, chosen_square, rejected_square):
        _checked(value)
    if coefficients is None:
        coefficients = MarginCoefficients(torch.ones_like(inner), torch.ones_like(inner))
    for value, name in zip(coefficients, ("chosen", "rejected"), strict=True):
        checks.floating(value, f"coefficients.{name}")
        if value.shape != inner.shape:
            raise ValueError(f"coefficients.{name} must have shape {tuple(inner.shape)}, got {tuple(value.shape)}")
        checks.finite(value, f"coefficients.{name}")
    own = MarginCoefficients(*(value.detach().to(inner) for value in coefficients))
    return Entanglement(inner, chosen_square, rejected_square, own)


def gradients_of(logp: Tensor, parameters: tuple[Tensor, ...], name: str) -> tuple[Tensor | None, ...]:
    """Check ``logp`` and return its gradient by each parameter; of a batch, one row for each of its members."""
    checks.floating(logp, name)
    checks.not_empty(logp, name)
    checks.finite(logp.detach(), name)
    if not parameters:
        raise ValueError("parameters is empty: there is nothing to take a gradient by")
    for number, value in enumerate(parameters):
        checks.floating(value, f"parameters[{number}]")
        if not value.requires_grad:
            raise ValueError(f"parameters[{number}] does not require a gradient: leave frozen parameters out")
    if not logp.requires_grad:
        raise ValueError(f"{name} has no graph: compute it with gradients enabled, and do not detach it")
    if logp.dim() == 0:
        found = torch.autograd.grad(logp, parameters, retain_graph=True, allow_unused=True)
    else:
        rows = torch.eye(len(logp), dtype=logp.dtype, device=logp.device)
        found = torch.autograd.grad(logp, parameters, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
    if all(gradient is None for gradient in found):
        raise ValueError(f"parameters: none of them has a part in {name}")
    return found


def inner_product(left: Sequence[Tensor | None], right: Sequence[Tensor | None], batch: int = 0) -> Tensor:
    """Sum the products of two lists of tensors over all but ``batch`` leading dimensions; None counts as zero.

    The sum runs over one tensor at a time: gradients of a whole model are never put end to end.
    """
    shape = next(value.shape[:batch] for value in left if value is not None)
    parts = [
        (_wide(one) * _wide(other)).flatten(batch).sum(-1) if one.dim() > batch else _wide(one) * _wide(other)
        for one, other in zip(left, right, strict=True)
        if one is not None and other is not None
    ]
    first = next(value for value in left if value is not None)
    return torch.stack(parts).sum(0) if parts else _wide(first).new_zeros(shape)


def _checked(products: Tensor) -> Tensor:
    checks.require(torch.isfinite(products), lambda: "the gradients of the log-probabilities contain NaN or infinity")
    return products


def _wide(value: Tensor) -> Tensor:
    """Sums over a model's parameters lose all digits in half precision."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)


def _sign(change: Tensor, scale: Tensor) -> Tensor:
    rounding = 8 * torch.finfo(change.dtype).eps * scale
    return torch.where(change.abs() <= rounding, torch.zeros_like(change), change.sign()).long()
