r"""What every objective on pairs of answers shares: its inputs, their checks, and how pairs add up.

A pair is a prompt x with a chosen answer :math:`y_w` and a rejected one :math:`y_l`. An objective sees it through
log-probabilities of whole answers, :math:`\log\pi(y|x) = \sum_t \log\pi(y_t|x, y_{<t})`, under the policy and under a
frozen reference, and the answers' lengths in tokens. Nothing here knows a tokenizer, a model or a trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, reduce


class PairLogProbabilities(NamedTuple):
    """Log-probabilities of whole answers, one pair a row, each ``(batch,)``.

    Args:
        chosen: Policy's log-probability of the chosen answer, summed over its tokens, in nats.
        rejected: The same for the rejected answer.
        ref_chosen: The reference's, or None for an objective without a reference.
        ref_rejected: The same for the rejected answer.
        chosen_lengths: Tokens in the chosen answer, or None for an objective that does not ask.
        rejected_lengths: The same for the rejected answer.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None

    def references(self) -> tuple[Tensor, Tensor]:
        """Return the reference's log-probabilities, chosen and rejected, or raise ``ValueError``."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("a reference is missing: this objective compares the policy with one")
        return self.ref_chosen, self.ref_rejected

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Return the answers' lengths, chosen and rejected, or raise ``ValueError``."""
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise ValueError("lengths are missing: this objective divides by the number of tokens")
        return self.chosen_lengths, self.rejected_lengths


class PairTokens(NamedTuple):
    """Log-probabilities of single tokens, one pair a row, each ``(batch, tokens)``; what a trainer hands over.

    Args:
        chosen: Policy's log-probability of each token of the chosen answer.
        rejected: The same for the rejected answer; its number of columns may differ.
        chosen_mask: True where ``chosen`` holds a token, False where padding.
        rejected_mask: The same for ``rejected``.
        ref_chosen: The reference's, or None.
        ref_rejected: The reference's, or None.
        chosen_hidden: Last hidden state that each token was predicted from, ``(batch, tokens, width)``, or None.
        rejected_hidden: The same for the rejected answer.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_hidden: Tensor | None = None
    rejected_hidden: Tensor | None = None

    def sums(self) -> PairLogProbabilities:
        """Add up each answer's tokens; padding counts for nothing, whatever it holds."""

        def total(values: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask, values, torch.zeros_like(values)).sum(-1)

        return PairLogProbabilities(
            total(self.chosen, self.chosen_mask),
            total(self.rejected, self.rejected_mask),
            None if self.ref_chosen is None else total(self.ref_chosen, self.chosen_mask),
            None if self.ref_rejected is None else total(self.ref_rejected, self.rejected_mask),
            self.chosen_mask.sum(-1),
            self.rejected_mask.sum(-1),
        )


def check_pairs(pairs: PairLogProbabilities, *, reference: bool, lengths: bool = False) -> None:
    """Raise unless the log-probabilities form pairs that an objective can be computed from.

    Args:
        pairs: The log-probabilities.
        reference: Whether the objective needs a reference.
        lengths: Whether the objective needs lengths.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a batch is empty, a value is not finite, a reference or lengths are missing, a
            length is below 1, or a reference requires a gradient.
    """
    _require(pairs, reference=reference, lengths=lengths)
    given = {
        "logp_chosen": pairs.chosen,
        "logp_rejected": pairs.rejected,
        "ref_logp_chosen": pairs.ref_chosen,
        "ref_logp_rejected": pairs.ref_rejected,
    }
    for name, value in given.items():
        if value is None:
            continue
        checks.floating(value, name)
        if value.dim() != 1 or value.shape != pairs.chosen.shape:
            raise ValueError(
                f"{name} must hold one log-probability a pair, shape {tuple(pairs.chosen.shape[:1])}, "
                f"got {tuple(value.shape)}"
            )
        checks.not_empty(value, name)
        checks.finite(value, name)
        if name.startswith("ref") and value.requires_grad:
            raise ValueError(f"{name} requires a gradient: compute the reference under torch.no_grad()")
    for name, value in (("chosen_lengths", pairs.chosen_lengths), ("rejected_lengths", pairs.rejected_lengths)):
        if value is None:
            continue
        if value.shape != pairs.chosen.shape:
            raise ValueError(f"{name} must have shape {tuple(pairs.chosen.shape)}, got {tuple(value.shape)}")
        checks.require(value >= 1, lambda: "lengths must be at least 1: an answer without tokens has no probability")


def _require(pairs: PairLogProbabilities, *, reference: bool, lengths: bool) -> None:
    """Raise ``ValueError`` if something is missing; what is there is not looked at."""
    if reference:
        for name, value in (("ref_logp_chosen", pairs.ref_chosen), ("ref_logp_rejected", pairs.ref_rejected)):
            if value is None:
                raise ValueError(f"{name} is missing: this objective compares the policy with a reference")
    if lengths:
        for name, value in (("chosen_lengths", pairs.chosen_lengths), ("rejected_lengths", pairs.rejected_lengths)):
            if value is None:
                raise ValueError(f"{name} is missing: this objective divides by the number of tokens")


class PairLoss(nn.Module, ABC):
    """A loss of pairs of answers; leaves say what one pair costs.

    Args:
        reduction: "mean", "sum", "none", or a risk that maps losses ``(batch,)`` to a scalar.
    """

    # What an object needs may depend on its settings, so neither is a ClassVar.
    needs_reference: bool = True
    needs_lengths: bool = False

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    @abstractmethod
    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair, ``(batch,)``; a leaf checks the numbers, see :func:`check_pairs`."""

    def forward(
        self,
        logp_chosen: Float[Tensor, " batch"],
        logp_rejected: Float[Tensor, " batch"],
        ref_logp_chosen: Float[Tensor, " batch"] | None = None,
        ref_logp_rejected: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of pairs.

        Args:
            logp_chosen: Policy's log-probability of each chosen answer, summed over tokens, ``(batch,)``, in nats.
            logp_rejected: The same for each rejected answer.
            ref_logp_chosen: The frozen reference's; left out only where ``needs_reference`` is False.
            ref_logp_rejected: The same for each rejected answer.
            chosen_lengths: Tokens in each chosen answer; asked for where ``needs_lengths`` is True.
            rejected_lengths: The same for each rejected answer.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: If shapes differ, a value is not finite, or an input this objective needs is missing.
        """
        return self.of(
            PairLogProbabilities(
                logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, chosen_lengths, rejected_lengths
            )
        )

    def of(self, pairs: PairLogProbabilities) -> Float[Tensor, "*reduced"]:
        """Compute the loss of pairs that come as one record."""
        # The rest is checked by the function that does the mathematics, once.
        _require(pairs, reference=self.needs_reference, lengths=self.needs_lengths)
        return reduce(self.losses(pairs), self.reduction)

    def from_tokens(self, tokens: PairTokens) -> Float[Tensor, "*reduced"]:
        """Compute the loss from single tokens: what a trainer calls, and objectives on tokens override."""
        return self.of(tokens.sums())
