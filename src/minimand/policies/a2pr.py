"""A2PR: value, and staying near the better of the logged action and one that a model of good actions proposes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .actor_critic import TD3ActorCritic, normalized_value
from .advantage_gated_vae import AdvantageGatedVAE
from .offline_batches import Batch
from .stacked_networks import StackedMLP, adam, descend, member_generators, per_member


class GuidedTarget(NamedTuple):
    """What an action is pulled to, and whether it is.

    Args:
        action: The better action, shape ``(*batch, m)``.
        mask: Whether it is good enough to be followed, shape ``(*batch,)`` boolean.
        proposed: Whether it is the proposed one, shape ``(*batch,)`` boolean.
    """

    action: Tensor
    mask: Tensor
    proposed: Tensor


def advantage_guided_target(
    logged: Float[Tensor, "*batch m"],
    proposal: Float[Tensor, "*batch m"],
    *,
    logged_value: Float[Tensor, "*batch"],
    proposal_value: Float[Tensor, "*batch"],
    state_value: Float[Tensor, "*batch"],
    threshold: float = 0.0,
) -> GuidedTarget:
    r"""Choose between a logged and a proposed action by their advantages.

    With :math:`A(s, a) = Q(s, a) - V(s)`, the target is the proposal :math:`\tilde a` where
    :math:`A(s, \tilde a) \ge A(s, a)`, else the logged action; the mask is
    :math:`1\{A(s, \tilde a) \ge \epsilon \text{ or } A(s, a) > \epsilon\}`.

    Args:
        logged: Logged actions, shape ``(*batch, m)``.
        proposal: Proposed actions, shape ``(*batch, m)``.
        logged_value: :math:`Q(s, a)`, shape ``(*batch,)``.
        proposal_value: :math:`Q(s, \tilde a)`, shape ``(*batch,)``.
        state_value: :math:`V(s)`, shape ``(*batch,)``.
        threshold: The advantage :math:`\epsilon` from which an action is followed; minus infinity follows all.

    Returns:
        Target, mask, and whether the proposal was chosen; a gradient flows to the chosen action only.

    Raises:
        ValueError: If shapes disagree, or a value is not finite.

    Example:
        >>> better = advantage_guided_target(torch.tensor([[0.1]]), torch.tensor([[0.9]]),
        ...                                  logged_value=torch.tensor([1.0]), proposal_value=torch.tensor([3.0]),
        ...                                  state_value=torch.tensor([2.0]))
        >>> better.action.tolist(), better.mask.tolist()
        ([[0.8999999761581421]], [True])

    Source: T. Liu et al., "Adaptive advantage-guided policy regularization for offline reinforcement learning" (2024,
    arXiv 2405.19909), the advantage-guided target; the mask is that of its authors' code.
    """
    if math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    if proposal.shape != logged.shape:
        raise ValueError(f"proposal must have the shape of logged {tuple(logged.shape)}, got {tuple(proposal.shape)}")
    values = {"logged_value": logged_value, "proposal_value": proposal_value, "state_value": state_value}
    for name, value in values.items():
        if value.shape != logged.shape[:-1]:
            raise ValueError(f"{name} must have shape {tuple(logged.shape[:-1])}, got {tuple(value.shape)}")
        checks.finite(value, name)
    return _guided(logged, proposal, logged_value, proposal_value, state_value, threshold)


def _guided(
    logged: Tensor,
    proposal: Tensor,
    logged_value: Tensor,
    proposal_value: Tensor,
    state_value: Tensor,
    threshold: float,
) -> GuidedTarget:
    # Compared by value, not by advantage: the difference of both is the same, without a rounding that could turn it.
    proposed = proposal_value >= logged_value
    mask = (proposal_value - state_value >= threshold) | (logged_value - state_value > threshold)
    return GuidedTarget(torch.where(proposed.unsqueeze(-1), proposal, logged), mask, proposed)


class A2PR(nn.Module):
    r"""Learn from a log by TD3 whose actor is held near actions of high advantage, and let go where there are none.

    An autoencoder learns the logged actions that were better than expected, :math:`Q_1(s, a) - V(s) > \epsilon`, and
    proposes a candidate :math:`\tilde a`. The actor minimises
    :math:`-\alpha\,\bar Q_1(s, \pi(s)) / \overline{|Q_1|} + \overline{w M\,(\pi(s) - \bar a)^2}` with
    :math:`\bar a` the better of :math:`\tilde a` and the logged action and :math:`M` whether it is good at all
    (:func:`advantage_guided_target`). :math:`V` regresses the lesser of the critics' target and of the same target by
    the critics just updated.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions are scaled to [-1, 1].
        alpha: Weight of the value; one number, or one a member. 2.5, or 40 for half-cheetah in the paper.
        mask_weight: :math:`w`; one number, or one a member. 0.4 to 1 by task in the authors' code.
        vae_weight: Of the autoencoder's errors against its divergence; 1 to 1.5 in the authors' code.
        gate_threshold: :math:`\epsilon` of the autoencoder's gate; minus infinity opens it for all.
        mask_threshold: :math:`\epsilon` of the mask; minus infinity follows every target.
        candidates: ``"policy"``: what the autoencoder makes of the policy's own action, as in the authors' code;
            ``"prior"``: the best of ``num_candidates`` samples, as in the paper; ``"logged"``: the logged action alone.
        num_candidates: Samples a state of ``"prior"``.
        detach_target: Take the target as given. The authors' code lets the gradient of ``"policy"`` candidates flow
            back into the policy, which weakens the pull; False does so too.
        discount: Of later rewards.
        target_rate: How far slow copies move a step.
        target_noise: Of the smoothed target action.
        noise_clip: Where that noise is cut off.
        policy_delay: Critic steps an actor step.
        lr: Learning rate of Adam, of actor, critics and :math:`V`.
        vae_lr: Of the autoencoder.
        hidden: Widths of the hidden layers of actor, critics and :math:`V`.
        vae_hidden: Of the autoencoder.
        seeds: One a member: learners of different seeds (or settings) train side by side.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> learner = A2PR(3, 1, hidden=(8,), vae_hidden=(8,), seeds=(0, 1))
        >>> learner.act(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1])

    Source: T. Liu, Y. Li, Y. Lan, H. Gao, W. Pan and X. Xu, "Adaptive advantage-guided policy regularization for
    offline reinforcement learning" (2024, arXiv 2405.19909), its objectives; order of steps and defaults from its
    authors' code.
    """

    alpha: Tensor
    mask_weight: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        alpha: float | Sequence[float] = 2.5,
        mask_weight: float | Sequence[float] = 1.0,
        vae_weight: float = 1.0,
        gate_threshold: float = 0.0,
        mask_threshold: float = 0.0,
        candidates: str = "policy",
        num_candidates: int = 10,
        detach_target: bool = True,
        discount: float = 0.99,
        target_rate: float = 0.005,
        target_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        lr: float = 3e-4,
        vae_lr: float = 1e-3,
        hidden: Sequence[int] = (256, 256),
        vae_hidden: Sequence[int] = (750, 750),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        checks.non_negative(vae_weight, "vae_weight")
        checks.one_of(candidates, "candidates", ("policy", "prior", "logged"))
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        for name, threshold in (("gate_threshold", gate_threshold), ("mask_threshold", mask_threshold)):
            if math.isnan(threshold):
                raise ValueError(f"{name} must be a number, got {threshold}")
        self.vae_weight, self.gate_threshold, self.mask_threshold = vae_weight, gate_threshold, mask_threshold
        self.candidates, self.detach_target = candidates, detach_target
        self.num_candidates = num_candidates if candidates == "prior" else 1
        self.register_buffer("alpha", per_member(alpha, len(seeds), "alpha"))
        self.register_buffer("mask_weight", per_member(mask_weight, len(seeds), "mask_weight"))
        generators = member_generators(seeds)
        self.nets = TD3ActorCritic(
            observation_dim,
            action_dim,
            discount=discount,
            target_rate=target_rate,
            target_noise=target_noise,
            noise_clip=noise_clip,
            policy_delay=policy_delay,
            lr=lr,
            hidden=hidden,
            generators=generators,
        )
        self.state_value = StackedMLP((observation_dim, *hidden, 1), generators=generators)
        self.vae = AdvantageGatedVAE(observation_dim, action_dim, hidden=vae_hidden, generators=generators)
        self.value_optimizer, self.vae_optimizer = adam(self.state_value, lr), adam(self.vae, vae_lr)
        self.noise_width = action_dim + (1 + self.num_candidates) * self.vae.latent_dim

    def _noise(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise of the autoencoder's training and of its candidates; the first ``m`` numbers smooth the target."""
        noise = batch.noise[..., self.nets.action_dim :]
        width = self.vae.latent_dim
        return noise[..., :width], noise[..., width:].unflatten(-1, (self.num_candidates, width))

    def _value_of_state(self, batch: Batch) -> Tensor:
        return self.state_value.head(batch.observation).squeeze(-1)

    def cautious_target(self, batch: Batch, target: Tensor) -> Tensor:
        """Return what the value of states regresses: no more than the critics, just updated, say, shape ``(S, B)``."""
        nets = self.nets
        with torch.no_grad():
            following = nets.critic.least(batch.next_observation, nets.smoothed_action(batch))
            return target.minimum(torch.addcmul(batch.reward, batch.continues, following, value=nets.discount))

    def gate(self, batch: Batch) -> Tensor:
        """Return whether each logged action was better than expected, shape ``(S, B)`` boolean."""
        with torch.no_grad():
            advantage = self.nets.critic.first(batch.observation, batch.action) - self._value_of_state(batch)
        return advantage > self.gate_threshold

    def vae_loss(self, batch: Batch) -> Tensor:
        """Return what each autoencoder minimises on a batch, shape ``(S,)``."""
        return self.vae.loss(
            batch.observation,
            batch.action,
            gate=self.gate(batch),
            noise=self._noise(batch)[0],
            weight=self.vae_weight,
            validate=False,
        )

    def propose(self, batch: Batch, action: Tensor) -> Tensor:
        """Return one candidate a state, given the policy's actions, shape ``(S, B, m)``."""
        noise = self._noise(batch)[1]
        if self.candidates == "policy":
            return self.vae(batch.observation, action, noise[..., 0, :])
        if self.candidates == "logged":
            return batch.action
        with torch.no_grad():
            tried = self.vae.propose(batch.observation, noise=noise)
            repeated = batch.observation.unsqueeze(2).expand(*tried.shape[:3], -1)
            value = self.nets.critic.first(repeated.flatten(1, 2), tried.flatten(1, 2)).view(tried.shape[:3])
            best = value.argmax(-1, keepdim=True).unsqueeze(-1)
            return tried.take_along_dim(best, 2).squeeze(2)

    def guided_target(self, batch: Batch, action: Tensor) -> GuidedTarget:
        """Return what the policy's actions are pulled to, and where."""
        with torch.set_grad_enabled(not self.detach_target and torch.is_grad_enabled()):
            proposal = self.propose(batch, action)
            with torch.no_grad():
                critic = self.nets.critic
                logged_value = critic.first(batch.observation, batch.action)
                proposal_value = critic.first(batch.observation, proposal)
                state_value = self._value_of_state(batch)
            return _guided(batch.action, proposal, logged_value, proposal_value, state_value, self.mask_threshold)

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each actor minimises on a batch, shape ``(S,)``."""
        action = self.nets.act(batch.observation)
        value = self.nets.critic.first(batch.observation, action)
        target = self.guided_target(batch, action)
        pull = (target.mask.unsqueeze(-1) * (action - target.action).square()).mean((1, 2))
        return normalized_value(value, self.alpha) + self.mask_weight * pull

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        target = self.nets.target(batch)
        losses = {"critic": self.nets.improve_critic(batch, target)}
        value_loss = (self._value_of_state(batch) - self.cautious_target(batch, target)).square().mean(-1)
        descend(self.value_optimizer, value_loss)
        vae_loss = self.vae_loss(batch)
        descend(self.vae_optimizer, vae_loss)
        losses |= {"value": value_loss.detach(), "vae": vae_loss.detach()}
        return losses | self.nets.improve_due_actor(batch, self.actor_loss)

    def act(self, observation: Tensor) -> Tensor:
        """Return actions for scaled observations, shapes ``(S, B, n)`` to ``(S, B, m)``."""
        return self.nets.act(observation)

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the critics' first estimate of scaled observations and actions, shape ``(S, B)``."""
        return self.nets.critic.first(observation, action)

    def network(self, member: int) -> nn.Sequential:
        """Return a copy of one member's actor, before its tanh."""
        return self.nets.actor.member(member)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return {**self.nets.optimizers(), "value": self.value_optimizer, "vae": self.vae_optimizer}
