r"""Sparse token masks: a margin loss on the tokens that tell two answers apart.

Tokens that both answers share have nearly the same gradient in each, and it is they that make chosen and rejected
log-probabilities move together. A mask :math:`q_t \in [0, 1]` weighs every token of either answer,

.. math:: \log\tilde\pi(y) = \sum_t q_t \log\pi(y_t | x, y_{<t}), \qquad
          l = l_{\mathrm{margin}}(\log\tilde\pi(y_w), \log\tilde\pi(y_l))
              + \lambda \Big(\sum_t q_{w,t} + \sum_t q_{l,t}\Big),

and the reference's tokens are weighed by the same numbers. The price :math:`\lambda` of a token is worth paying only
where it adds to the margin: what a shared token adds to one side it takes back on the other.

Source: Yuan, Zeng, Wu, Wang, Wang and Leqi, ICLR 2025, arXiv 2410.13828, sparsity regularised token masking. The
objective is theirs; the network that gives the masks is reconstructed: :math:`q_t = \sigma(a^\top h_t + b)` of the
last hidden state, as is usual (Christopoulou et al. 2024, arXiv 2410.05102, learn masks of a related loss so).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..reduction import reduce
from .margin_losses import DPOLoss
from .pair_loss import PairLogProbabilities, PairLoss, PairTokens, check_pairs


def masked_log_probabilities(
    tokens: PairTokens,
    chosen_weights: Float[Tensor, "batch chosen_tokens"],
    rejected_weights: Float[Tensor, "batch rejected_tokens"],
) -> PairLogProbabilities:
    """Add up each answer's log-probabilities with a weight for each token, policy's and reference's alike.

    Args:
        tokens: Log-probabilities of single tokens.
        chosen_weights: Weights of the chosen answers' tokens, in [0, 1]; what stands at padding counts for nothing.
        rejected_weights: The same for the rejected answers.

    Returns:
        Weighted sums, with the lengths of the whole answers. The references' have no graph, as losses want them; a
        weight's gradient is that of its token's log-ratio.

    Raises:
        TypeError: If weights are no floating-point tensors.
        ValueError: If shapes do not match, or a weight is outside [0, 1] or no number.

    Example:
        >>> logp, answer = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
        >>> weights = torch.tensor([[1.0, 0.5]])
        >>> masked_log_probabilities(PairTokens(logp, logp, answer, answer), weights, 1 - weights).rejected
        tensor([-1.])

    Source:
        Yuan et al. 2025, arXiv 2410.13828: token masking.
    """
    for weights, mask, name in (
        (chosen_weights, tokens.chosen_mask, "chosen_weights"),
        (rejected_weights, tokens.rejected_mask, "rejected_weights"),
    ):
        checks.floating(weights, name)
        if weights.shape != mask.shape:
            raise ValueError(f"{name} must have shape {tuple(mask.shape)}, got {tuple(weights.shape)}")
        checks.require(
            ((weights >= 0) & (weights <= 1)) | ~mask,
            lambda name=name: f"{name} must lie in [0, 1] at every token, and contain no NaN",  # type: ignore[misc]
        )

    def side(values: Tensor, reference: Tensor | None, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        # where before the product, as padding may hold any number and 0 * inf is NaN.
        weights = torch.where(mask, weights, 0.0)
        total = (torch.where(mask, values, 0.0) * weights).sum(-1)
        if reference is None:
            return total, None
        held = (torch.where(mask, reference, 0.0) * weights).sum(-1)
        # Losses take references without a graph: what the reference's sum says to the weights goes with the policy's.
        return total - (held - held.detach()), held.detach()

    chosen, ref_chosen = side(tokens.chosen, tokens.ref_chosen, chosen_weights, tokens.chosen_mask)
    rejected, ref_rejected = side(tokens.rejected, tokens.ref_rejected, rejected_weights, tokens.rejected_mask)
    lengths = tokens.chosen_mask.sum(-1), tokens.rejected_mask.sum(-1)
    return PairLogProbabilities(chosen, rejected, ref_chosen, ref_rejected, *lengths)


class SparseTokenMask(nn.Module):
    r"""A loss on pairs of answers that learns which tokens to look at.

    It has parameters of its own, the mask's, that the optimizer must be given beside the policy's. The hidden states
    are read without a gradient, so that the policy cannot change its mask but through the margin.

    Args:
        hidden_size: Width of the policy's last hidden state.
        base: The loss of the masked log-probabilities; its ``reduction`` adds the pairs up. ``DPOLoss()`` if None.
        sparsity: lambda, what a whole token costs, at least 0. Reconstructed: 0.01, of a grid from 0.001 to 0.1; it
            is compared with the coefficient of the loss, beta / 2 at the start of DPO, times a token's log-ratio.
        bias: b at the start: 3, where every mask is 0.95 and the loss nearly ``base``. Reconstructed.

    Attributes:
        last_weights: The masks of the latest call, chosen and rejected, without a graph; 0 at padding; or None.

    Example:
        >>> part = SparseTokenMask(3, sparsity=0.1)
        >>> logp, answer, hidden = -torch.ones(1, 2), torch.tensor([[True, True]]), torch.ones(1, 2, 3)
        >>> part.from_tokens(PairTokens(logp, logp, answer, answer, logp, logp, hidden, hidden))
        tensor(1.0742, grad_fn=<MeanBackward0>)

    Source:
        Yuan et al. 2025, arXiv 2410.13828: sparsity regularised token masking; the mask's network is reconstructed.
    """

    needs_hidden = True

    def __init__(
        self, hidden_size: int, *, base: PairLoss | None = None, sparsity: float = 0.01, bias: float = 3.0
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        checks.non_negative(sparsity, "sparsity")
        self.base = DPOLoss() if base is None else base
        self.sparsity = sparsity
        self.needs_reference = self.base.needs_reference
        self.needs_lengths = self.base.needs_lengths
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)  # all tokens alike at the start, whatever the hidden states
        nn.init.constant_(self.score.bias, bias)
        self.last_weights: tuple[Tensor, Tensor] | None = None

    def forward(self, tokens: PairTokens) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of pairs, with the price of its masks.

        Args:
            tokens: Log-probabilities of single tokens, with the hidden states that they were predicted from.

        Returns:
            A scalar, or ``(batch,)`` if the base loss has ``reduction="none"``.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: If hidden states are missing or of another width, shapes differ, or a number is not finite.
        """
        weights = (
            self._mask(tokens.chosen_hidden, tokens.chosen_mask, "chosen_hidden"),
            self._mask(tokens.rejected_hidden, tokens.rejected_mask, "rejected_hidden"),
        )
        if not self.base.needs_reference:
            tokens = tokens._replace(ref_chosen=None, ref_rejected=None)
        pairs = masked_log_probabilities(tokens, *weights)
        check_pairs(pairs, reference=self.base.needs_reference, lengths=self.base.needs_lengths)
        self.last_weights = (weights[0].detach(), weights[1].detach())
        price = self.sparsity * (weights[0].sum(-1) + weights[1].sum(-1))
        return reduce(self.base.losses(pairs) + price, self.base.reduction)

    def from_tokens(self, tokens: PairTokens) -> Float[Tensor, "*reduced"]:
        """Compute the loss: what a trainer calls."""
        return self(tokens)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"sparsity={self.sparsity}"

    def _mask(self, hidden: Tensor | None, mask: Tensor, name: str) -> Tensor:
        if hidden is None:
            raise ValueError(f"{name} is missing: masks are read from the policy's last hidden states")
        checks.floating(hidden, name)
        if hidden.shape != (*mask.shape, self.score.in_features):
            raise ValueError(
                f"{name} must have shape {(*mask.shape, self.score.in_features)}, got {tuple(hidden.shape)}"
            )
        safe = torch.where(mask[..., None], hidden.detach(), torch.zeros_like(hidden))
        checks.finite(safe, name)
        weights = torch.sigmoid(self.score(safe.to(self.score.weight)).squeeze(-1))
        return torch.where(mask, weights, torch.zeros_like(weights))
