r"""Constrained RLHF: several reward models, each used up to the point where more of it stops helping.

With the values :math:`v_i = E_\pi[r_i]` of :math:`N` reward models, :math:`v_0 = -KL(\pi \| \pi_{ref})` and thresholds
:math:`\theta_i`, the policy solves one of

.. math:: \max_\pi v_0 \text{ s.t. } v_i = \theta_i, \qquad \max_\pi v_0 \text{ s.t. } v_i \ge \theta_i, \qquad
          \max_\pi \textstyle\sum_i v_i \text{ s.t. } v_i \le \theta_i

("exactly", "at least", "at most"; the paper's xi-PPO, mu-PPO and All-PPO). The multipliers are squashed,
:math:`m = \tanh(\lambda)` for "exactly" and :math:`m = \sigma(\lambda)` otherwise, and mix the advantages of the
rewards with the advantage :math:`A_0` of the divergence,

.. math:: A = \Big(N - \sum_i m_i\Big) A_0 + \sum_i m_i A_i, \qquad\text{or, for "at most",}\qquad
          A = \beta A_0 + \sum_i (1 - m_i) A_i .

The factor of :math:`A_0` keeps the sum of all weights at :math:`N`: as a reward gains weight, the pull to the reference
gives way. PPO improves the policy along :math:`A`, while :math:`\lambda` follows the violation, so that a reward
below its threshold gains weight, and one above it loses weight, below zero if need be ("exactly").

Source: Moskovitz, Singh, Strouse, Sandholm, Salakhutdinov, Dragan and McAleer, "Confronting Reward Model
Overoptimization with Constrained RLHF", ICLR 2024, arXiv 2310.04373.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .. import checks
from ..constraints import Multiplier

Kind = Literal["exactly", "at least", "at most"]

_KINDS = ("exactly", "at least", "at most")


def mix_advantages(
    advantages: Float[Tensor, "rewards *steps"],
    kl_advantages: Float[Tensor, "*steps"],
    *,
    weights: Float[Tensor, " rewards"],
    kl_weight: float | Float[Tensor, ""] = 1.0,
    normalize: bool = True,
    mask: Bool[Tensor, "*steps"] | None = None,
) -> Float[Tensor, "*steps"]:
    r"""Mix the advantages of several rewards and of the divergence into one.

    :math:`w_0 A_0 + \sum_i w_i A_i`, each advantage first brought to mean 0 and standard deviation 1 by itself, so that
    the scale of a reward does not matter.

    Args:
        advantages: One advantage a reward and step, as :func:`generalized_advantages` gives them.
        kl_advantages: The advantage of the reward :math:`-\log(\pi/\pi_{ref})`.
        weights: One weight a reward; may be negative.
        kl_weight: :math:`w_0`.
        normalize: Whether each advantage is brought to mean 0 and standard deviation 1 over all its steps. An
            advantage that is the same at every step becomes 0.
        mask: True at steps that took place; the others count for nothing and get 0.

    Returns:
        The mixed advantages.

    Raises:
        TypeError: If an advantage is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or a single step is to be normalised.

    Example:
        >>> advantages, kl_advantages = torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([0.0, -2.0, 2.0])
        >>> mix_advantages(advantages, kl_advantages, weights=torch.tensor([0.8]), kl_weight=0.2)
        tensor([ 0.8000, -1.0000,  0.2000])

    Source:
        Moskovitz et al. 2024, arXiv 2310.04373.
    """
    for value, name in ((advantages, "advantages"), (kl_advantages, "kl_advantages"), (weights, "weights")):
        checks.floating(value, name)
        checks.finite(value.detach(), name)
    if advantages.shape[1:] != kl_advantages.shape or advantages.dim() < 2:
        raise ValueError(
            "advantages must have shape (rewards, *steps) and kl_advantages (*steps), "
            f"got {tuple(advantages.shape)} and {tuple(kl_advantages.shape)}"
        )
    if tuple(weights.shape) != (len(advantages),):
        raise ValueError(f"weights must have shape ({len(advantages)},), one a reward, got {tuple(weights.shape)}")
    if mask is not None and mask.shape != kl_advantages.shape:
        raise ValueError(f"mask must have shape {tuple(kl_advantages.shape)}, got {tuple(mask.shape)}")
    if normalize:
        advantages, kl_advantages = _normalized(advantages, mask), _normalized(kl_advantages[None], mask)[0]
    mixed = kl_weight * kl_advantages + torch.tensordot(weights.to(advantages.dtype), advantages, dims=1)
    mixed = mixed.to(advantages.dtype)
    return mixed if mask is None else torch.where(mask, mixed, torch.zeros_like(mixed))


def proxy_point(
    values: Float[Tensor, "policies rewards"],
    evaluations: Float[Tensor, " policies"],
    *,
    bandwidth: float | None = None,
) -> Float[Tensor, " rewards"]:
    r"""Find the rewards at which policies evaluate best: thresholds for :class:`RewardMultipliers`.

    Evaluations are smoothed over the values by a Gaussian kernel,
    :math:`\hat f(v) = \sum_j K(v - v_j) f_j / \sum_j K(v - v_j)`, and the best of the given values is returned: it is
    never extrapolated. Give policies that reach all rewards together, under several weights: the points found by
    optimising one reward at a time are others if rewards are correlated.

    Args:
        values: Mean reward of each policy, at the ends of several runs or along them.
        evaluations: How good each policy is; higher is better.
        bandwidth: Width of the kernel in standard deviations of each reward's values; 0 smooths nothing, None is
            Scott's rule, :math:`n^{-1/(N + 4)}`.

    Returns:
        The row of ``values`` whose smoothed evaluation is highest.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If shapes do not fit, there are no policies, or a number is not finite.

    Example:
        >>> values = torch.linspace(0, 1, 11)[:, None]
        >>> proxy_point(values, 1 - (values[:, 0] - 0.6).square())
        tensor([0.6000])

    Source:
        Moskovitz et al. 2024, arXiv 2310.04373 (proxy points); Nadaraya, "On Estimating Regression", 1964 (the kernel).
    """
    for value, name in ((values, "values"), (evaluations, "evaluations")):
        checks.floating(value, name)
        checks.not_empty(value, name)
        checks.finite(value, name)
    if values.dim() != 2 or tuple(evaluations.shape) != (len(values),):
        raise ValueError(
            "values must have shape (policies, rewards) and evaluations (policies,), "
            f"got {tuple(values.shape)} and {tuple(evaluations.shape)}"
        )
    if bandwidth is None:
        bandwidth = float(len(values)) ** (-1 / (values.shape[1] + 4))
    checks.non_negative(bandwidth, "bandwidth")
    if bandwidth == 0 or len(values) == 1:
        return values[evaluations.argmax()]
    spread = values.std(0)
    scaled = values / torch.where(spread > 0, spread, torch.ones_like(spread)) / bandwidth
    kernel = torch.softmax(-torch.cdist(scaled, scaled).square() / 2, dim=1)
    return values[(kernel @ evaluations).argmax()]


class RewardMultipliers(nn.Module):
    r"""Weigh reward models by multipliers that hold each of them at its threshold.

    Call it on the advantages of a minibatch to mix them, and ``update`` it with the mean rewards of the sampled
    episodes, once a minibatch as in the paper or once a batch. Multipliers are buffers: they are saved, moved and
    copied with the module. Under data parallelism give ``update`` means over all processes.

    Args:
        thresholds: theta, the useful level of each reward (its proxy point): the mean reward of an episode.
        kind: ``"exactly"`` (the paper's xi-PPO, best where quality falls beyond the thresholds), ``"at least"``
            (mu-PPO, where more is harmless but not needed) or ``"at most"`` (All-PPO, where rewards are worth having
            and thresholds are caps).
        kl_weight: beta of ``"at most"``, the weight of the divergence, at least 0; the other two kinds set it
            themselves. 0.2 is the KL coefficient of the released code; the paper's coefficient could not be confirmed.
        lr: Step of the multipliers, above 0. The default 0.1, as those of momentum and norm, is the released code's.
        momentum: Of that step, in [0, 1); kept low, since momentum makes multipliers overshoot.
        max_norm: The largest norm of the multipliers' gradient; None for no bound.
        damping: c, at least 0: how far a multiplier answers to the last violation g at once,
            :math:`m = \mathrm{squash}(\lambda + c\,g)`, besides adding it up in lambda. It ends the swinging of rewards
            around their thresholds, and moves no solution. 0 is the paper's; ours.

    Attributes:
        thresholds: theta, ``(rewards,)``.
        violation: g as last seen, ``(rewards,)``.
        multiplier: The :class:`minimand.constraints.Multiplier` within, which holds lambda.

    Example:
        >>> multipliers = RewardMultipliers(torch.tensor([0.7, 0.6]))
        >>> violation = multipliers.update(torch.tensor([0.5, 0.8]))  # the first is wanted more, the second less
        >>> multipliers.weights, multipliers.kl_weight
        (tensor([ 0.0200, -0.0200]), tensor(2.))

    Source:
        Moskovitz et al. 2024, arXiv 2310.04373.
    """

    thresholds: Tensor
    violation: Tensor

    def __init__(
        self,
        thresholds: Float[Tensor, " rewards"],
        *,
        kind: Kind = "exactly",
        kl_weight: float = 0.2,
        lr: float = 0.1,
        momentum: float = 0.1,
        max_norm: float | None = 0.5,
        damping: float = 0.0,
    ) -> None:
        super().__init__()
        checks.floating(thresholds, "thresholds")
        checks.not_empty(thresholds, "thresholds")
        checks.finite(thresholds, "thresholds")
        if thresholds.dim() != 1:
            raise ValueError(f"thresholds must have shape (rewards,), got {tuple(thresholds.shape)}")
        checks.one_of(kind, "kind", _KINDS)
        checks.non_negative(kl_weight, "kl_weight")
        checks.non_negative(damping, "damping")
        self.kind, self.damping = kind, damping
        self._fixed_kl_weight = kl_weight
        self.multiplier = Multiplier(
            lr,
            num_constraints=len(thresholds),
            equality=kind == "exactly",
            squash=True,
            momentum=momentum,
            max_norm=max_norm,
        ).to(thresholds)
        self.register_buffer("thresholds", thresholds.detach().clone())
        self.register_buffer("violation", torch.zeros_like(self.thresholds))

    @property
    def weights(self) -> Float[Tensor, " rewards"]:
        """The weight of each reward: its multiplier m, or 1 - m for ``"at most"``."""
        raw = self.multiplier.dual + self.damping * self.violation
        if self.kind == "exactly":
            return raw.tanh()
        # 1 - sigmoid(x) as sigmoid(-x), which does not round to 0.
        return raw.sigmoid() if self.kind == "at least" else (-raw).sigmoid()

    @property
    def kl_weight(self) -> Float[Tensor, ""]:
        """The weight of the divergence: N minus the multipliers' sum, or beta for ``"at most"``."""
        if self.kind == "at most":
            return self.thresholds.new_tensor(self._fixed_kl_weight)
        return (1 - self.weights).sum()

    def forward(
        self,
        advantages: Float[Tensor, "rewards *steps"],
        kl_advantages: Float[Tensor, "*steps"],
        *,
        normalize: bool = True,
        mask: Bool[Tensor, "*steps"] | None = None,
    ) -> Float[Tensor, "*steps"]:
        """Mix advantages by the present weights; see :func:`mix_advantages`.

        Args:
            advantages: One advantage a reward and step.
            kl_advantages: The advantage of the divergence to the reference.
            normalize: Whether each advantage is brought to mean 0 and standard deviation 1 first.
            mask: True at steps that took place.

        Raises:
            TypeError: If an advantage is no floating-point tensor.
            ValueError: If shapes differ, a number is not finite, or a single step is to be normalised.
        """
        return mix_advantages(
            advantages,
            kl_advantages,
            weights=self.weights,
            kl_weight=self.kl_weight.to(kl_advantages.dtype),
            normalize=normalize,
            mask=mask,
        )

    def update(self, values: Float[Tensor, " rewards"]) -> Float[Tensor, " rewards"]:
        """Move the multipliers by what the policy earns now.

        Args:
            values: Mean reward of an episode, a reward each; measured on samples, not by a critic.

        Returns:
            The violations: how far each reward is short of its threshold, or above it for ``"at most"``.

        Raises:
            ValueError: If the shape is another or a number is not finite; the multipliers are then left as they were.
        """
        self._check_values(values)
        violation = self.thresholds - values.detach().to(self.thresholds)
        if self.kind == "at most":
            violation = -violation
        self.multiplier.update(violation)
        self.violation.copy_(violation)
        return violation

    def reached(self, values: Float[Tensor, " rewards"], *, tolerance: float = 0.05) -> bool:
        """Tell whether every reward is at its threshold, for a search that then asks for other ones.

        Args:
            values: Mean reward of an episode, a reward each.
            tolerance: Allowed difference as a share of the threshold; 0.05 is the released code's.

        Raises:
            ValueError: If the shape is another or a number is not finite.
        """
        self._check_values(values)
        checks.non_negative(tolerance, "tolerance")
        away = (values.detach().to(self.thresholds) - self.thresholds).abs()
        return bool((away <= tolerance * self.thresholds.abs()).all())

    def set_thresholds(self, thresholds: Float[Tensor, " rewards"]) -> None:
        """Replace the thresholds; the multipliers go on from where they are.

        Args:
            thresholds: The new ones, ``(rewards,)``.

        Raises:
            ValueError: If the shape is another or a number is not finite.
        """
        self._check_values(thresholds, "thresholds")
        self.thresholds.copy_(thresholds.detach())

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"{self.kind} {[round(theta, 4) for theta in self.thresholds.tolist()]}"

    def _check_values(self, values: Tensor, name: str = "values") -> None:
        checks.floating(values, name)
        if values.shape != self.thresholds.shape:
            raise ValueError(f"{name} must have shape {tuple(self.thresholds.shape)}, got {tuple(values.shape)}")
        checks.finite(values.detach(), name)


def _normalized(advantages: Tensor, mask: Tensor | None) -> Tensor:
    """Bring each head to mean 0 and standard deviation 1 over the steps that took place."""
    rows = advantages.flatten(1)
    if mask is None:
        count = torch.tensor(float(rows.shape[1]))
        centred = rows - rows.mean(1, keepdim=True)
    else:
        place = mask.flatten()
        count = place.sum()
        rows = torch.where(place, rows, torch.zeros_like(rows))
        centred = torch.where(place, rows - rows.sum(1, keepdim=True) / count, torch.zeros_like(rows))
    checks.require(count > 1, lambda: f"normalising needs at least 2 steps, got {int(count)}")
    spread = (centred.square().sum(1, keepdim=True) / (count.to(rows) - 1)).sqrt()
    # What rounding leaves of a constant is noise, which a division would blow up to size 1.
    constant = spread <= 8 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)
    scaled = torch.where(constant, torch.zeros_like(centred), centred / spread.masked_fill(constant, 1.0))
    return scaled.reshape(advantages.shape)
