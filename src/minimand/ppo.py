r"""Proximal policy optimisation, its mathematics only: advantages, the clipped objective and the KL penalty.

No sampling and no loop: a language model, a bandit and a control task differ in those and share this.

Source: Schulman et al. 2015, arXiv 1506.02438 (generalised advantages); Schulman et al. 2017, arXiv 1707.06347 (PPO).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import checks


def generalized_advantages(
    rewards: Float[Tensor, "*batch steps"],
    values: Float[Tensor, "*batch steps"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Tensor, "*batch"] | None = None,
    mask: Bool[Tensor, "*batch steps"] | None = None,
    next_values: Float[Tensor, "*batch steps"] | None = None,
    ends: Bool[Tensor, "*batch steps"] | None = None,
) -> Float[Tensor, "*batch steps"]:
    r"""Compute generalised advantage estimates along the last dimension.

    :math:`A_t = \sum_{k \ge 0} (\gamma\lambda)^k \delta_{t+k}` with
    :math:`\delta_t = r_t + \gamma V_{t+1} - V_t`. Leading dimensions, of which one may be reward heads, are
    independent of each other. Add ``values`` to get the targets of the critic.

    Args:
        rewards: :math:`r_t`.
        values: :math:`V_t`, of the same shape.
        gamma: Discount in [0, 1]; 1, the custom for answers of a language model, does not discount.
        lam: lambda in [0, 1]: 0 is one step ahead, 1 the return minus the value.
        bootstrap: Value of the state after the last step, without the last dimension; None where the episode ends.
        mask: True at steps that took place; the rest, at the end, counts for nothing and gets advantage 0.
        next_values: :math:`V_{t+1}` of the state that each step led to, 0 where the episode terminated; takes the place
            of ``bootstrap``. Where episodes follow one another it is not the next of ``values``.
        ends: True at the last step of each episode; needs ``next_values``. Nothing flows back from the next one.

    Returns:
        The advantages, not normalised.

    Raises:
        TypeError: If rewards or values are no floating-point tensors.
        ValueError: If shapes differ, a number is not finite or a setting is out of range.

    Example:
        >>> generalized_advantages(torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3), lam=0.5)
        tensor([0.2500, 0.5000, 1.0000])

    Source:
        Schulman et al. 2015, arXiv 1506.02438, equation 16.
    """
    for value, name in ((rewards, "rewards"), (values, "values")):
        checks.floating(value, name)
        checks.finite(value, name)
    checks.between(gamma, "gamma", 0.0, 1.0)
    checks.between(lam, "lam", 0.0, 1.0)
    if rewards.shape != values.shape:
        raise ValueError(f"values must have the shape of rewards, {tuple(rewards.shape)}, got {tuple(values.shape)}")
    if mask is not None:
        if mask.shape != rewards.shape:
            raise ValueError(f"mask must have the shape of rewards, {tuple(rewards.shape)}, got {tuple(mask.shape)}")
        rewards, values = rewards * mask, values * mask
    for each, name in ((next_values, "next_values"), (ends, "ends")):
        if each is not None and each.shape != values.shape:
            raise ValueError(f"{name} must have shape {tuple(values.shape)}, got {tuple(each.shape)}")
    if ends is not None and next_values is None:
        raise ValueError("next_values is required with ends: a value across an end is that of another episode")
    if next_values is not None and bootstrap is not None:
        raise ValueError("bootstrap and next_values both say what comes last: give one of them")
    if bootstrap is None:
        bootstrap = torch.zeros_like(values[..., 0])
    elif bootstrap.shape != values.shape[:-1]:
        raise ValueError(f"bootstrap must have shape {tuple(values.shape[:-1])}, got {tuple(bootstrap.shape)}")
    checks.finite(bootstrap, "bootstrap")
    if next_values is None:
        next_values = torch.cat([values[..., 1:], bootstrap[..., None]], -1)
    checks.finite(next_values, "next_values")
    deltas = rewards + gamma * next_values - values
    decay = torch.full_like(deltas, gamma * lam) if ends is None else gamma * lam * ~ends
    running, advantages = torch.zeros_like(deltas[..., 0]), torch.empty_like(deltas)
    for step in reversed(range(deltas.shape[-1])):
        running = deltas[..., step] + decay[..., step] * running
        advantages[..., step] = running
    return advantages if mask is None else advantages * mask


def clipped_policy_loss(
    logp: Float[Tensor, "*steps"],
    old_logp: Float[Tensor, "*steps"],
    advantages: Float[Tensor, "*steps"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, "*steps"]:
    r"""Compute the clipped surrogate of PPO, to be minimised.

    :math:`-\min(\rho A,\ \mathrm{clip}(\rho, 1 - c, 1 + c) A)` with :math:`\rho = \pi/\pi_{old}`.

    Args:
        logp: Log-probability of each action under the policy.
        old_logp: The same under the policy that acted; it is detached.
        advantages: Advantages, of the same shape; they are detached.
        clip: c, above 0; 0.2 is the paper's.

    Returns:
        The loss of each step, so that any mask or mean may follow.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or ``clip`` is not above 0.

    Example:
        >>> clipped_policy_loss(torch.tensor([0.5, -0.5]), torch.zeros(2), torch.tensor([1.0, 1.0]))
        tensor([-1.2000, -0.6065])

    Source:
        Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    checks.positive(clip, "clip")
    for value, name in ((logp, "logp"), (old_logp, "old_logp"), (advantages, "advantages")):
        checks.floating(value, name)
        checks.finite(value.detach(), name)
        if value.shape != logp.shape:
            raise ValueError(f"{name} must have the shape of logp, {tuple(logp.shape)}, got {tuple(value.shape)}")
    ratio = (logp - old_logp.detach()).exp()
    weight = advantages.detach()
    return -torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight)


def clipped_value_loss(
    values: Float[Tensor, "*steps"],
    old_values: Float[Tensor, "*steps"],
    targets: Float[Tensor, "*steps"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, "*steps"]:
    r"""Compute the critic's squared error, at its worse end where the value left the trust region.

    :math:`\tfrac12 \max\big((V - T)^2,\ (V_{old} + \mathrm{clip}(V - V_{old}, \pm c) - T)^2\big)`.

    Args:
        values: The critic's values.
        old_values: Its values when the actions were taken; detached.
        targets: What the values should have been: advantages plus old values; detached.
        clip: c, above 0, or None for the plain squared error.

    Returns:
        The loss of each step.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or ``clip`` is not above 0.

    Example:
        >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.3200])

    Source:
        Schulman et al. 2017, arXiv 1707.06347; the clipped form is that of the authors' implementation.
    """
    for value, name in ((values, "values"), (old_values, "old_values"), (targets, "targets")):
        checks.floating(value, name)
        checks.finite(value.detach(), name)
        if value.shape != values.shape:
            raise ValueError(f"{name} must have the shape of values, {tuple(values.shape)}, got {tuple(value.shape)}")
    old, wanted = old_values.detach(), targets.detach()
    plain = (values - wanted).square()
    if clip is None:
        return plain / 2
    checks.positive(clip, "clip")
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum(plain, (near - wanted).square()) / 2


def kl_estimate(
    logp: Float[Tensor, "*steps"],
    ref_logp: Float[Tensor, "*steps"],
    *,
    kind: Literal["plain", "square", "unbiased"] = "plain",
) -> Float[Tensor, "*steps"]:
    r"""Estimate KL(policy || reference) from samples of the policy, each element on its own.

    With :math:`u = \log\pi - \log\pi_{ref}`: "plain" is :math:`u`, unbiased and often negative; "square" is
    :math:`u^2/2`, biased, never negative; "unbiased" is :math:`e^{-u} - 1 + u`, unbiased and never negative.

    Args:
        logp: Log-probability of each sampled action under the policy.
        ref_logp: The same under the reference, of the same shape.
        kind: Which estimator.

    Returns:
        Estimates whose mean over samples of the policy is the divergence.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or ``kind`` is unknown.

    Example:
        >>> kl_estimate(torch.tensor([0.0]), torch.tensor([-1.0]), kind="square")
        tensor([0.5000])

    Source:
        Schulman 2020, "Approximating KL divergence".
    """
    checks.one_of(kind, "kind", ("plain", "square", "unbiased"))
    for value, name in ((logp, "logp"), (ref_logp, "ref_logp")):
        checks.floating(value, name)
        checks.finite(value.detach(), name)
    if logp.shape != ref_logp.shape:
        raise ValueError(f"ref_logp must have the shape of logp, {tuple(logp.shape)}, got {tuple(ref_logp.shape)}")
    log_ratio = logp - ref_logp
    if kind == "plain":
        return log_ratio
    return log_ratio.square() / 2 if kind == "square" else torch.expm1(-log_ratio) + log_ratio
