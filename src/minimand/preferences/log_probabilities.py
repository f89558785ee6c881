r"""From a model's scores to the log-probabilities of answers.

Source: the chain rule of probability, :math:`\log\pi(y|x) = \sum_t \log\pi(y_t|x, y_{<t})`.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from .. import checks


def token_log_probabilities(
    logits: Float[Tensor, "*batch vocabulary"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Compute :math:`\log\mathrm{softmax}(l)_{target}`.

    Half-precision scores are summed in float32: the sum over a vocabulary has only three digits in bfloat16.

    Args:
        logits: Scores of every token of the vocabulary; ``logits[..., t, :]`` must be those that predict
            ``targets[..., t]`` (shift them first).
        targets: Indices into the vocabulary.

    Returns:
        The log-probabilities, in nats, float32 or wider.

    Raises:
        TypeError: If ``logits`` is no floating-point tensor.
        ValueError: If shapes do not match or a target lies outside the vocabulary.

    Example:
        >>> token_log_probabilities(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor([-0.6931, -0.3133])

    Source:
        The definition of the softmax.
    """
    checks.floating(logits, "logits")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    checks.not_empty(logits, "logits")
    checks.require(
        (targets >= 0) & (targets < logits.shape[-1]),
        lambda: f"targets must be indices into a vocabulary of {logits.shape[-1]}",
    )
    scores = logits.float() if logits.element_size() < 4 else logits
    # torch's fused kernel: half the time of a gather and a logsumexp, whose backward passes add up two vocabularies.
    rows = functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1), reduction="none")
    values = -rows.reshape(targets.shape)
    checks.finite(values.detach(), "logits: a log-probability")
    return values


def sequence_log_probability(
    logits: Float[Tensor, "batch tokens vocabulary"],
    targets: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Compute the log-probability of each answer and its length.

    Args:
        logits: Scores that predict ``targets``, already shifted.
        targets: Indices into the vocabulary; padding may hold any valid index.
        mask: True at the tokens of the answer.

    Returns:
        Sums of the tokens' log-probabilities ``(batch,)`` in nats, and the numbers of tokens ``(batch,)``.

    Raises:
        TypeError: If ``logits`` is no floating-point tensor.
        ValueError: If shapes do not match, a target lies outside the vocabulary, or an answer has no token.

    Example:
        >>> scores, answer = torch.zeros(1, 3, 4), torch.tensor([[1, 2, 0]])
        >>> sequence_log_probability(scores, answer, torch.tensor([[True, True, False]]))
        (tensor([-2.7726]), tensor([2]))

    Source:
        The chain rule of probability.
    """
    if mask.shape != targets.shape:
        raise ValueError(f"mask must have shape {tuple(targets.shape)}, got {tuple(mask.shape)}")
    lengths = mask.sum(-1)
    checks.require(lengths >= 1, lambda: "mask leaves an answer without a token")
    return token_log_probabilities(logits, targets).masked_fill(~mask, 0.0).sum(-1), lengths
