r"""Normalised pair gradients: a step that raises the chosen and lowers the rejected answer, to first order.

A margin loss moves along :math:`d_w g_w - d_l g_l`, the difference of the gradients of the two log-probabilities, and
where these are alike the longer one decides for both answers. Scaled to length one before they are subtracted,

.. math:: u = m \left(\frac{g_w}{\|g_w\|} - \frac{g_l}{\|g_l\|}\right), \qquad
          \Delta_w = s\,m\,\|g_w\| (1 - \cos(g_w, g_l)) \ge 0, \qquad
          \Delta_l = -s\,m\,\|g_l\| (1 - \cos(g_w, g_l)) \le 0,

with equality only where they are parallel. :math:`m` is 1, or the weight that a loss of the margin gives the pair.

Source: Yuan, Zeng, Wu, Wang, Wang and Leqi, ICLR 2025, arXiv 2410.13828, pairwise normalised gradient descent. The
changes are derived here. Whether the paper multiplies by the loss's weight could not be learnt; both are offered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..reduction import Reduction
from .gradient_entanglement import MarginCoefficients, entanglement, gradients_of, inner_product, margin_coefficients
from .pair_loss import PairLogProbabilities, PairLoss

Per = Literal["batch", "pair"]


def normalized_pair_gradient(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    parameters: Iterable[Tensor],
    *,
    coefficients: MarginCoefficients | None = None,
    per: Per = "batch",
    eps: float = 1e-8,
) -> tuple[Tensor, ...]:
    r"""Compute :math:`-u`, the gradient that takes the place of a loss's, for each parameter.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, with its graph, in nats.
        logp_rejected: The same for each rejected answer.
        parameters: What is trained.
        coefficients: A loss's, from :func:`margin_coefficients`, as weights of the pairs; None for ones. Where the
            two of a pair differ, chosen rises only if the cosine is below their quotient.
        per: ``"batch"`` scales the mean chosen and the mean rejected gradient to length one, with two backward passes
            in place of one, and moves the two means apart. ``"pair"`` does so in each pair and takes the mean of
            what comes out, with two more passes a pair and memory of ``batch`` times ``parameters``.
        eps: Gradients shorter than this count as zero: an answer of probability one has no direction.

    Returns:
        One gradient a parameter, to be put in its ``.grad``; zeros where it has no part.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or a setting is out of range.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> normalized_pair_gradient(3 * weight[:1], 0.5 * weight[1:], [weight])
        (tensor([-1.,  1.]),)

    Source:
        Yuan et al. 2025, arXiv 2410.13828: pairwise normalised gradient descent.
    """
    wanted = tuple(parameters)
    weights = _weights(logp_chosen, logp_rejected, coefficients, per, eps)
    if per == "pair":
        # Given the lengths, the direction is the gradient of a weighted sum: one pass, no more memory.
        losses = _surrogate(logp_chosen, logp_rejected, wanted, weights, per, eps)
        return torch.autograd.grad(losses.mean(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
    sides = []
    for logp, weight, name in (
        (logp_chosen, weights.chosen, "logp_chosen"),
        (logp_rejected, weights.rejected, "logp_rejected"),
    ):
        gradients = gradients_of((weight * logp).mean(), wanted, name)
        scale = weight.abs().mean() * _inverse(inner_product(gradients, gradients), eps)
        sides.append([None if one is None else one * scale.to(one) for one in gradients])
    return tuple(
        sum((part for part in (None if up is None else -up, down) if part is not None), torch.zeros_like(parameter))
        for parameter, up, down in zip(wanted, *sides, strict=True)
    )


class NormalizedPairLoss(PairLoss):
    r"""A loss whose gradient is the normalised one, for trainers that call backward themselves.

    Its value is :math:`m\,(\log\pi(y_l) / \|g_l\| - \log\pi(y_w) / \|g_w\|)` with lengths and weights held fixed.
    Finding the lengths costs two more backward passes (``"batch"``), which :func:`normalized_pair_gradient` saves in
    a loop of one's own. Without a graph, in evaluation, lengths count as one. The step does not shrink as the margin
    grows, unless ``base`` makes it: let the learning rate decay, or weigh the pairs by ``DPOLoss()``.

    Spread over devices, each scales by the lengths of its own gradients; where parameters are sharded (FSDP,
    ZeRO-3) the lengths cannot be had this way.

    Args:
        base: The loss whose coefficients weigh the pairs; None for weights of one.
        parameters: What the lengths are measured over, such as a few layers to save time; None for all that the
            log-probabilities depend on.
        per: ``"batch"`` or ``"pair"``, as in :func:`normalized_pair_gradient`.
        eps: Gradients shorter than this count as zero.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> NormalizedPairLoss()(3 * weight[:1], 0.5 * weight[1:]).backward()
        >>> weight.grad
        tensor([-1.,  1.])

    Source:
        Yuan et al. 2025, arXiv 2410.13828: pairwise normalised gradient descent; ``base`` is offered beside it.
    """

    def __init__(
        self,
        base: PairLoss | None = None,
        *,
        parameters: Iterable[Tensor] | None = None,
        per: Per = "batch",
        eps: float = 1e-8,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.one_of(per, "per", ("batch", "pair"))
        checks.positive(eps, "eps")
        self.base = base
        self.per = per
        self.eps = eps
        # A tuple, so that the policy's parameters do not become this module's own.
        self._measured = None if parameters is None else tuple(parameters)
        if base is not None:
            self.needs_reference = base.needs_reference  # type: ignore[misc]
            self.needs_lengths = base.needs_lengths  # type: ignore[misc]
        else:
            self.needs_reference = False  # type: ignore[misc]

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        coefficients = None if self.base is None else margin_coefficients(self.base, pairs)
        weights = _weights(pairs.chosen, pairs.rejected, coefficients, self.per, self.eps)
        if not (torch.is_grad_enabled() and pairs.chosen.requires_grad and pairs.rejected.requires_grad):
            return weights.rejected * pairs.rejected - weights.chosen * pairs.chosen
        parameters = graph_leaves(pairs.chosen, pairs.rejected) if self._measured is None else self._measured
        return _surrogate(pairs.chosen, pairs.rejected, parameters, weights, self.per, self.eps)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"per={self.per!r}, eps={self.eps}"


def graph_leaves(*values: Tensor) -> tuple[Tensor, ...]:
    """Find the tensors that ``values`` were computed from and that gather gradients."""
    leaves = {id(value): value for value in values if value.requires_grad and value.grad_fn is None}
    waiting = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return tuple(leaves.values())


def _surrogate(
    chosen: Tensor, rejected: Tensor, parameters: tuple[Tensor, ...], weights: MarginCoefficients, per: Per, eps: float
) -> Tensor:
    """Return losses whose mean has the normalised gradient; the lengths come without a graph."""
    if per == "pair":
        found = entanglement(chosen, rejected, parameters)
        strength: tuple[Tensor, Tensor] = weights
    else:
        found = entanglement((weights.chosen * chosen).mean(), (weights.rejected * rejected).mean(), parameters)
        strength = (
            weights.chosen * weights.chosen.abs().mean(),
            weights.rejected * weights.rejected.abs().mean(),
        )
    up = strength[0] * _inverse(found.chosen_square, eps).to(chosen)
    down = strength[1] * _inverse(found.rejected_square, eps).to(rejected)
    return down * rejected - up * chosen


def _inverse(square: Tensor, eps: float) -> Tensor:
    length = square.sqrt()
    return torch.where(length > eps, 1 / length.clamp_min(eps), torch.zeros_like(length))


def _weights(
    chosen: Tensor, rejected: Tensor, coefficients: MarginCoefficients | None, per: Per, eps: float
) -> MarginCoefficients:
    checks.one_of(per, "per", ("batch", "pair"))
    checks.positive(eps, "eps")
    for value, name in ((chosen, "logp_chosen"), (rejected, "logp_rejected")):
        checks.floating(value, name)
        if value.dim() != 1 or value.shape != chosen.shape:
            raise ValueError(f"{name} must hold one log-probability a pair, (batch,), got {tuple(value.shape)}")
        checks.not_empty(value, name)
        checks.finite(value.detach(), name)
    if coefficients is None:
        return MarginCoefficients(torch.ones_like(chosen.detach()), torch.ones_like(rejected.detach()))
    for value, name in zip(coefficients, ("chosen", "rejected"), strict=True):
        if value.shape != chosen.shape:
            raise ValueError(f"coefficients.{name} must have shape {tuple(chosen.shape)}, got {tuple(value.shape)}")
        checks.finite(value, f"coefficients.{name}")
    return MarginCoefficients(*(value.detach().to(chosen) for value in coefficients))
