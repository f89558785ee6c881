r"""Fine-tuning on demonstrations as the learning of an implicit reward; cross-entropy is one member of the family.

Let the policy :math:`\pi` match the demonstrator :math:`E` in an f-divergence and stay near the pretrained
:math:`\pi_{ref}`. With :math:`D_f(\pi, E) = \sup_r E_E[\phi(r)] - E_\pi[r]`, :math:`\phi` concave,
:math:`\phi(0) = 0`, :math:`\phi'(0) = 1`, and the policy that is best for a reward, :math:`\pi \propto \pi_{ref}
e^{r / \beta}` (the map of DPO),

.. math:: \min_\pi D_f(\pi, E) + \beta\,KL(\pi \| \pi_{ref}) = \max_{\pi, V} E_E[\phi(u + V)] - E_x[V],
          \qquad u = \beta \log\frac{\pi(y|x)}{\pi_{ref}(y|x)},

where :math:`r = u + V` is the implicit reward and :math:`V(x)` the value of the prompt. A demonstration's gradient
is that of cross-entropy times :math:`\phi'(r)`:

- ``"total_variation"`` :math:`\phi = x`, weight 1: V cancels, and with it the KL. This is cross-entropy, and nothing
  but the size of its steps holds the policy near the reference;
- ``"forward_kl"``, of E from the policy: :math:`\log(1 + x)`, weight :math:`1 / (1 + x)`;
- ``"reverse_kl"``, of the policy from E: :math:`1 - e^{-x}`, weight :math:`e^{-x}`;
- ``"pearson"`` :math:`\sum (\pi - E)^2 / E`: :math:`x - x^2 / 4`, weight :math:`1 - x / 2`, none from 2 on;
- ``"neyman"`` :math:`\sum (\pi - E)^2 / \pi`: :math:`2 (\sqrt{1 + x} - 1)`, weight :math:`(1 + x)^{-1/2}`;
- ``"hellinger"`` :math:`\sum (\sqrt\pi - \sqrt E)^2`: :math:`x / (1 + x)`, weight :math:`(1 + x)^{-2}`;
- ``"jensen_shannon"``, twice the divergence: :math:`\log(2 - e^{-x})`, weight :math:`1 / (2 e^x - 1)`.

Source: Wang, Cheng, Peng, Bao, Li, Guo, Li, Zeng, Zhou and Qiu, "Implicit Reward as the Bridge: A Unified View of SFT
and DPO Connections", NeurIPS 2025, arXiv 2507.00018. Derived anew from its abstract; see the method's page for what
that leaves open.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, reduce
from .f_matching import DUALS, Divergence
from .log_probabilities import token_log_probabilities
from .pair_loss import PairTokens

Level = Literal["token", "sequence"]


def implicit_reward(
    logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"], *, beta: float = 0.1
) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`u = \beta \log(\pi / \pi_{ref})`, the reward that a policy has learnt, up to the prompt's value.

    Training again from a policy adds its rewards: that of DPO from a fine-tuned policy plus that of the fine-tuning
    is the reward of both, where both have the same beta.

    Args:
        logp: Policy's log-probabilities of tokens or of answers, in nats.
        ref_logp: The reference's.
        beta: Strength of the KL divergence to the reference, above 0; 0.1 is DPO's.

    Returns:
        The rewards, of the shape of ``logp``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or ``beta`` is not above 0.

    Example:
        >>> implicit_reward(torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0]))
        tensor([ 0.1000, -0.4000])

    Source:
        Wang et al. 2025, arXiv 2507.00018; Rafailov et al. 2023, arXiv 2305.18290, equation 5.
    """
    checks.positive(beta, "beta")
    return beta * _log_ratio(logp, ref_logp, None)


def demonstration_weights(
    reward: Float[Tensor, "*shape"], *, divergence: Divergence = "pearson", max_weight: float = 2.0
) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`\phi'(r)`, by how much a demonstration's gradient is that of cross-entropy.

    Their mean tells how much of the training is left; ``(weights.detach() * nll).mean()`` has the gradient of
    :func:`implicit_reward_sft_loss`, for trainers that only let tokens be weighed.

    Args:
        reward: Implicit rewards r, those of :func:`implicit_reward` plus a value.
        divergence: The f-divergence; the module's docstring says them all.
        max_weight: The largest weight; see :func:`implicit_reward_sft_loss`.

    Returns:
        The weights: 1 at 0, and the smaller the more the policy outgrew the reference.

    Raises:
        TypeError: If ``reward`` is no floating-point tensor.
        ValueError: If a value is not finite or a setting is out of range.

    Example:
        >>> demonstration_weights(torch.tensor([-0.5, 0.0, 1.0]), divergence="forward_kl")
        tensor([2.0000, 1.0000, 0.5000])

    Source:
        Wang et al. 2025, arXiv 2507.00018.
    """
    checks.floating(reward, "reward")
    checks.finite(reward, "reward")
    _check_family(divergence, max_weight)
    return _weights(reward, divergence, max_weight)


def implicit_reward_sft_loss(
    logp: Float[Tensor, "*shape"],
    ref_logp: Float[Tensor, "*shape"] | None = None,
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    divergence: Divergence = "pearson",
    beta: float = 0.1,
    value: float | Tensor | Literal["optimal"] = 0.0,
    max_weight: float = 2.0,
) -> Float[Tensor, "*shape"]:
    r"""Compute the loss of each demonstration, a token or an answer.

    :math:`-\frac{1}{\beta} (\phi(u + V) - V)`. Divided by beta, its gradient at the reference is that of cross-entropy
    for every divergence and every beta, so the learning rate keeps its meaning.

    Args:
        logp: Policy's log-probabilities of tokens ``(batch, tokens)``, or of answers ``(batch,)``, in nats.
        ref_logp: The reference's, without gradient. With ``"total_variation"`` it only adds a constant, and may be
            left out: the loss is then cross-entropy itself.
        mask: False where ``logp`` is padding, whose loss is 0.
        divergence: The f-divergence between policy and demonstrator; the module's docstring says them all.
        beta: Strength of the KL divergence to the reference, above 0; 0.1 is DPO's.
        value: V: a number; a tensor that broadcasts against ``logp``, such as a value head's output, which learns by
            this loss too; or ``"optimal"``, the best single V for the mean loss of all demonstrations given. The
            default, 0, is right at the reference and leaves each demonstration a loss of its own.
        max_weight: The largest weight a demonstration may get, above 1: where it has become so unlikely that
            :math:`\phi'` would exceed this, :math:`\phi` goes on straight, so that loss and gradient stay finite past
            the end of its domain. Ours; of ``"forward_kl"``, 2 is reached at u + V = -0.5.

    Returns:
        The losses, 0 where ``mask`` is False.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, a row of the mask is empty, the reference is missing or
            requires a gradient, or a setting is out of range.

    Example:
        >>> logp, ref_logp = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> implicit_reward_sft_loss(logp, ref_logp, divergence="hellinger")  # of cross-entropy: -1, 4
        tensor([-0.9091,  6.2843])

    Source:
        Wang et al. 2025, arXiv 2507.00018. With ``"optimal"``, the loss is the worst case over reweightings w of the
        demonstrations, :math:`\min_w \frac{1}{n} \sum_i w_i u_i` plus the divergence of w from 1, as in Duchi and
        Namkoong, "Learning models with uniform performance via distributionally robust optimization", 2021.
    """
    checks.positive(beta, "beta")
    _check_family(divergence, max_weight)
    if ref_logp is None and divergence != "total_variation":
        raise ValueError(f"ref_logp is missing: {divergence!r} compares the policy with a reference")
    log_ratio = _log_ratio(logp, ref_logp, mask)
    reward = beta * log_ratio
    if isinstance(value, str):
        checks.one_of(value, "value", ("optimal",))
        # V is the best one, so the gradient that goes through it is zero: the envelope theorem.
        value = _optimal_value(reward.detach(), mask, divergence, max_weight)
    elif isinstance(value, Tensor):
        checks.floating(value, "value")
        paired = zip(reversed(value.shape), reversed(reward.shape), strict=False)
        if value.dim() > reward.dim() or any(one not in (1, other) for one, other in paired):
            raise ValueError(f"value must broadcast against {tuple(reward.shape)}, got shape {tuple(value.shape)}")
        checks.finite(value, "value")
    elif not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value}")
    if divergence == "total_variation":
        losses = -log_ratio  # beta and V cancel, and must not be put in and taken out again
    else:
        losses = (value - _objective(reward + value, divergence, max_weight)) / beta
    return losses if mask is None else torch.where(mask, losses, torch.zeros_like(losses))


class ImplicitRewardSFTLoss(nn.Module):
    r"""Fine-tuning on demonstrations that slows where the policy has outgrown the reference.

    Args:
        divergence: The f-divergence between policy and demonstrator: ``"total_variation"`` is cross-entropy;
            ``"forward_kl"``, ``"reverse_kl"``, ``"pearson"``, ``"neyman"``, ``"hellinger"`` and ``"jensen_shannon"``
            keep the KL divergence to the reference in the objective.
        beta: Strength of that KL, above 0; 0.1 is DPO's. Single tokens can do with up to 1.
        level: Whether a demonstration is a ``"token"`` (with its prefix for a prompt), or a ``"sequence"``, whose
            tokens add up: its rewards reach tens of ``beta`` nats.
        value: How V is treated: ``"zero"``; ``"optimal"``, the best single one for each batch; or ``"learned"``, a
            parameter of this module that the optimizer must be given.
        max_weight: The largest weight a demonstration may get, above 1; see :func:`implicit_reward_sft_loss`.
        reduction: ``"mean"`` (over tokens, at that level), ``"sum"``, ``"none"``, or a risk.

    Attributes:
        needs_reference: False for ``"total_variation"`` only.
        learned_value: V, if it is learned; else None.

    Example:
        >>> loss = ImplicitRewardSFTLoss("hellinger", level="sequence")
        >>> tokens = torch.tensor([[-1.0, -2.0], [-9.0, 0.0]])
        >>> loss(tokens, tokens.flip(0), torch.tensor([[True, True], [True, False]]))
        tensor(5.2671)

    Source:
        Wang et al. 2025, arXiv 2507.00018.
    """

    needs_lengths = False
    learned_value: nn.Parameter | None

    def __init__(
        self,
        divergence: Divergence = "pearson",
        *,
        beta: float = 0.1,
        level: Level = "token",
        value: Literal["zero", "optimal", "learned"] = "zero",
        max_weight: float = 2.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        checks.positive(beta, "beta")
        _check_family(divergence, max_weight)
        checks.one_of(level, "level", get_args(Level))
        checks.one_of(value, "value", ("zero", "optimal", "learned"))
        if value == "learned" and divergence == "total_variation":
            raise ValueError("value must be 'zero' with 'total_variation', got 'learned': V cancels and learns nothing")
        check_reduction(reduction)
        self.divergence = divergence
        self.beta = beta
        self.level = level
        self.value = value
        self.max_weight = max_weight
        self.reduction = reduction
        self.needs_reference = divergence != "total_variation"
        self.learned_value = nn.Parameter(torch.zeros(())) if value == "learned" else None

    def forward(
        self,
        logp: Float[Tensor, "*shape"],
        ref_logp: Float[Tensor, "*shape"] | None = None,
        mask: Bool[Tensor, "*shape"] | None = None,
        *,
        value: Tensor | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of demonstrations.

        Args:
            logp: Policy's log-probabilities of tokens ``(batch, tokens)``, or of answers ``(batch,)``, in nats.
            ref_logp: The reference's; left out only where ``needs_reference`` is False.
            mask: False where ``logp`` is padding.
            value: Values from a head of your own, in place of what the module was told: a tensor that broadcasts
                against the demonstrations, ``(batch, tokens)`` or ``(batch,)``.

        Returns:
            A scalar; with ``reduction="none"`` one loss a demonstration, 0 where ``mask`` is False.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: If shapes differ, a value is not finite, or an input is missing.
        """
        if self.level == "sequence" and logp.dim() == 2:
            if ref_logp is not None:
                _check_log_probabilities(logp, ref_logp, mask)
                ref_logp = _total(ref_logp, mask)
            logp, mask = _total(logp, mask), None
        treatment: float | Tensor | Literal["optimal"] = 0.0
        if value is not None:
            treatment = value
        elif self.learned_value is not None:
            treatment = self.learned_value
        elif self.value == "optimal":
            treatment = "optimal"
        losses = implicit_reward_sft_loss(
            logp,
            ref_logp,
            mask,
            divergence=self.divergence,
            beta=self.beta,
            value=treatment,
            max_weight=self.max_weight,
        )
        if mask is None or self.reduction in ("sum", "none"):  # a padded token's loss is 0
            return reduce(losses.flatten(), self.reduction, shape=losses.shape)
        if self.reduction == "mean":
            return reduce(losses.flatten(), "sum") / mask.sum()
        return reduce(losses.flatten(), self.reduction, row_weight=mask.flatten().to(losses))

    def from_tokens(self, tokens: PairTokens) -> Float[Tensor, "*reduced"]:
        """Compute the loss of the chosen answers of a batch of pairs, as trainers on pairs call it."""
        reference = tokens.ref_chosen if self.needs_reference else None
        return self(tokens.chosen, reference, tokens.chosen_mask)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"{self.divergence!r}, beta={self.beta}, level={self.level!r}, value={self.value!r}"


class SoftValues(NamedTuple):
    """What a model's scores say of each token of an answer, each ``(batch, tokens)``.

    Args:
        q: Q of the token in its state, 0 at padding.
        value: V of the state it was chosen in, 0 at padding.
        reward: What the token earned: ``q`` less the value of the state it leads to; 0 at padding.
    """

    q: Tensor
    value: Tensor
    reward: Tensor


def logits_as_q(
    logits: Float[Tensor, "batch tokens vocabulary"],
    targets: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    beta: float = 0.1,
    ref_logits: Float[Tensor, "batch tokens vocabulary"] | None = None,
) -> SoftValues:
    r"""Read a Q-function, the values of prefixes and the rewards of tokens off a language model's scores.

    A softmax policy is the soft-optimal one of :math:`Q(s, a) = \beta (l_a(s) - \log\pi_{ref}(a|s))`,
    :math:`V(s) = \beta \log\sum_a e^{l_a(s)}`, and :math:`r(s, a) = Q(s, a) - V(s')` with V = 0 at the end. Over an
    answer :math:`\sum_t r_t = V(s_0) + \beta \sum_t \log(\pi / \pi_{ref})`. The scores of a state may be
    shifted without any change of the policy, so V and r are what this model says, not what the policy alone would.

    Args:
        logits: Raw scores, without temperature, that predict ``targets``, already shifted.
        targets: The answer's tokens; padding may hold any valid index.
        mask: True at the answer's tokens, one unbroken run a row, its end the answer's end; None for all.
        beta: Strength of the KL divergence to the reference, above 0; for a fine-tuned model, whose cross-entropy
            has none, it only is the unit. 0.1 is DPO's.
        ref_logits: The reference's scores; None for the uniform one, whose constant is left out.

    Returns:
        Q, V and r of each token, float32 or wider. ``beta * logits`` is Q of every token of the vocabulary.

    Raises:
        TypeError: If scores are no floating-point tensor.
        ValueError: If shapes do not match, a score is not finite, a target lies outside the vocabulary, or a row of the
            mask is empty or broken.

    Example:
        >>> scores = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
        >>> logits_as_q(scores, torch.tensor([[0, 1]]), beta=1.0).reward
        tensor([[1.3069, 0.0000]])

    Source:
        Wang et al. 2025, arXiv 2507.00018; Rafailov et al., "From r to Q*", 2024, arXiv 2404.12358.
    """
    checks.positive(beta, "beta")
    for name, scores in (("logits", logits), ("ref_logits", ref_logits)):
        if scores is None:
            continue
        checks.floating(scores, name)
        if scores.dim() != 3 or scores.shape[:2] != targets.shape or scores.shape != logits.shape:
            raise ValueError(
                f"{name} must have shape (batch, tokens, vocabulary) for targets of shape {tuple(targets.shape)}, "
                f"got {tuple(scores.shape)}"
            )
        checks.not_empty(scores, name)
        checks.finite(scores, name)
    checks.require(
        (targets >= 0) & (targets < logits.shape[-1]),
        lambda: f"targets must be indices into a vocabulary of {logits.shape[-1]}",
    )
    own = logits.float() if logits.element_size() < 4 else logits
    q = own.gather(-1, targets[..., None]).squeeze(-1)
    if ref_logits is not None:
        q = q - token_log_probabilities(ref_logits, targets)
    value = own.logsumexp(-1)
    if mask is not None:
        _check_mask(mask, q)
        starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        checks.require(starts.sum(-1) == 1, lambda: "mask must mark one unbroken run of tokens in each row")
        q, value = (torch.where(mask, each, torch.zeros_like(each)) for each in (q, value))
    q, value = beta * q, beta * value
    after = torch.nn.functional.pad(value, (0, 1))[:, 1:]
    reward = q - after
    if mask is not None:
        reward = torch.where(mask, reward, torch.zeros_like(reward))
    return SoftValues(q, value, reward)


def _objective(reward: Tensor, divergence: str, max_weight: float) -> Tensor:
    """Compute phi, straight below the reward at which its slope reaches ``max_weight``."""
    dual = DUALS[divergence]
    if divergence == "total_variation":
        return reward
    inside = reward.clamp_min(dual.reward(reward.new_full((), math.log(max_weight))))
    return torch.add(dual.objective(inside), reward - inside, alpha=max_weight)


def _weights(reward: Tensor, divergence: str, max_weight: float) -> Tensor:
    dual = DUALS[divergence]
    if divergence == "total_variation":
        return torch.ones_like(reward)
    return dual.weight(reward.clamp_min(dual.reward(reward.new_full((), math.log(max_weight)))))


@torch.no_grad()
def _optimal_value(reward: Tensor, mask: Tensor | None, divergence: str, max_weight: float) -> Tensor:
    """Find the V at which the demonstrations' mean weight is 1: where the derivative of the objective vanishes."""
    if divergence == "total_variation":
        return reward.new_zeros(())
    counted = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
    low = -torch.where(counted, reward, -math.inf).amax()
    high = -torch.where(counted, reward, math.inf).amin()
    total = counted.sum()
    # Halvings, not Newton steps: their number is fixed, so nothing waits for the device, and weights may be flat.
    for _ in range(8 * reward.element_size()):
        middle = (low + high) / 2
        weights = torch.where(counted, _weights(reward + middle, divergence, max_weight), 0.0)
        heavy = weights.sum() > total
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return (low + high) / 2


def _log_ratio(logp: Tensor, ref_logp: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the policy's log-probabilities over the reference's, checked, 0 at padding."""
    _check_log_probabilities(logp, ref_logp, mask)
    ratio = logp if ref_logp is None else logp - ref_logp
    if mask is not None:
        ratio = torch.where(mask, ratio, torch.zeros_like(ratio))
    # One look at the difference: it is finite where both are.
    checks.require(torch.isfinite(ratio.detach()), lambda: f"{_culprit(logp, mask)} contains NaN or infinity")
    return ratio


def _culprit(logp: Tensor, mask: Tensor | None) -> str:
    counted = logp if mask is None else logp[mask]
    return "ref_logp" if bool(torch.isfinite(counted).all()) else "logp"


def _total(logp: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logp.sum(-1)
    _check_mask(mask, logp)
    return torch.where(mask, logp, torch.zeros_like(logp)).sum(-1)


def _check_family(divergence: str, max_weight: float) -> None:
    checks.one_of(divergence, "divergence", get_args(Divergence))
    if not (math.isfinite(max_weight) and max_weight > 1):
        raise ValueError(f"max_weight must be a finite number above 1, got {max_weight}")


def _check_mask(mask: Tensor, like: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != like.shape:
        raise ValueError(
            f"mask must hold booleans, shape {tuple(like.shape)}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    checks.require(mask.any(-1), lambda: "mask leaves an answer without a token")


def _check_log_probabilities(logp: Tensor, ref_logp: Tensor | None, mask: Tensor | None) -> None:
    checks.floating(logp, "logp")
    checks.not_empty(logp, "logp")
    if mask is not None:
        _check_mask(mask, logp)
    if ref_logp is not None:
        checks.floating(ref_logp, "ref_logp")
        if ref_logp.shape != logp.shape:
            raise ValueError(f"ref_logp must have shape {tuple(logp.shape)}, got {tuple(ref_logp.shape)}")
        if ref_logp.requires_grad:
            raise ValueError("ref_logp requires a gradient: compute the reference under torch.no_grad()")
