r"""Policies that between them reach all that can be reached, found without rewards and without a simulator.

Each round plays the policy that seems to meet the largest uncertainty, by optimistic least-squares value iteration:

.. math:: u_h(s, a) = c\, \|\phi_h(s, a)\|_{\Lambda_h^{-1}}, \qquad
          \Lambda_h = \lambda I + \sum_n \phi_{n,h} \phi_{n,h}^\top, \qquad
          Q_h = \min\big(\min(u_h, 1) + \phi^\top w_h + u_h, H_h\big),

.. math:: w_h = \Lambda_h^{-1} \sum_n \phi_{n,h} \max_a Q_{h+1}(s_{n,h+1}, a),

where :math:`H_h` layers are left, and nothing follows the last. Uncertainty is the reward, up to 1, and once more the
bonus. In a problem with linear transitions :math:`\phi^\top w_h` is nearly the expected value of the next layer; where
:math:`u_h` is no smaller than its error, :math:`Q_h` is no smaller than the largest sum of rewards that a policy can
get. The mixture of the policies of all rounds is the cover. A state is known to it where
:math:`\max_a \|\phi_h(s, a)\|^2` is small in the inverse of the mixture's covariance.

Source: Jin, Krishnamurthy, Simchowitz and Yu, ICML 2020, arXiv 2002.02794 (exploration without rewards); Wang, Du,
Yang and Salakhutdinov, "On reward-free reinforcement learning with linear function approximation", NeurIPS 2020,
arXiv 2006.11274 (this form, in which the policies of all rounds are made for the uncertainty of their time).
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import checks
from .linear_mdp import check_features, check_path


@dataclasses.dataclass(frozen=True)
class PolicyCover:
    """A mixture of policies, and the inverse of the covariance of what they meet.

    Args:
        policies: Of the rounds, ``(members, layers, states, actions)``.
        shares: How likely each of them is drawn, ``(members,)``.
        inverse: Of the mixture's regularised covariance in each layer, ``(layers, dimensions, dimensions)``.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, numbers are not finite, or probabilities do not add up to 1.
    """

    policies: Tensor
    shares: Tensor
    inverse: Tensor

    def __post_init__(self) -> None:
        for value, name in ((self.policies, "policies"), (self.shares, "shares"), (self.inverse, "inverse")):
            checks.floating(value, name)
            checks.not_empty(value, name)
            checks.finite(value, name)
        if self.policies.dim() != 4:
            raise ValueError(
                f"policies must have shape (members, layers, states, actions), got {tuple(self.policies.shape)}"
            )
        members, layers = self.policies.shape[:2]
        if tuple(self.shares.shape) != (members,):
            raise ValueError(f"shares must have shape ({members},), got {tuple(self.shares.shape)}")
        if self.inverse.dim() != 3 or self.inverse.shape[0] != layers or self.inverse.shape[1] != self.inverse.shape[2]:
            raise ValueError(
                f"inverse must have shape ({layers}, dimensions, dimensions), got {tuple(self.inverse.shape)}"
            )
        for value, name in ((self.policies, "policies"), (self.shares, "shares")):
            checks.require(
                (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() <= 1e-5),
                lambda name=name: f"{name} must hold probabilities that add up to 1 along the last dimension",  # type: ignore[misc]
            )

    def uncertainty(
        self, features: Float[Tensor, "layers states actions dimensions"]
    ) -> Float[Tensor, "layers states actions"]:
        r"""Return :math:`\|\phi_h(s, a)\|^2` in the inverse of the mixture's covariance.

        Args:
            features: Of all pairs of state and action.
        """
        check_features(features, "features")
        return torch.einsum("hsad,hde,hsae->hsa", features, self.inverse.to(features), features)

    def known(
        self, features: Float[Tensor, "layers states actions dimensions"], *, threshold: float
    ) -> Bool[Tensor, "layers states"]:
        """Tell which states are known: those where no action's uncertainty is above a threshold.

        Args:
            features: Of all pairs of state and action.
            threshold: Above 0; infinity knows all states.
        """
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0, got {threshold}")
        return (self.uncertainty(features) <= threshold).all(-1)


class CoverExplorer:
    r"""Explores a problem with linear transitions, which it does not know, to cover what its policies can reach.

    Play :attr:`policy`, tell :meth:`update` where the episodes went, and so on; :meth:`cover` is the mixture of what
    was played. Losses play no part.

    Args:
        features: :math:`\phi_h(s, a)`, ``(layers, states, actions, dimensions)``, of norm at most 1.
        bonus_scale: :math:`c`. In theory of order :math:`d H \sqrt{\log}`, above the error of the estimates with high
            probability; smaller values explore as well and sooner.
        regularization: :math:`\lambda`.

    Raises:
        TypeError: If ``features`` is not of a floating-point dtype.
        ValueError: If a feature's norm is above 1, or a setting is not above 0.

    Example:
        >>> from minimand.online import LinearMDP
        >>> mdp = LinearMDP.random_simplex(num_layers=3, num_states=4, num_actions=5, num_dimensions=4, seed=0)
        >>> explorer, generator = CoverExplorer(mdp.features), torch.Generator().manual_seed(0)
        >>> for _ in range(20):
        ...     explorer.update(*mdp.rollout(explorer.policy.expand(5, -1, -1, -1), generator=generator))
        >>> cover = explorer.cover()
        >>> cover.policies.shape, bool(cover.known(mdp.features, threshold=50.0).all())
        (torch.Size([20, 3, 4, 5]), True)

    Source:
        Wang et al. 2020, arXiv 2006.11274, algorithm 1.
    """

    def __init__(
        self,
        features: Float[Tensor, "layers states actions dimensions"],
        *,
        bonus_scale: float = 1.0,
        regularization: float = 1.0,
    ) -> None:
        checks.floating(features, "features")
        checks.not_empty(features, "features")
        if features.dim() != 4:
            raise ValueError(f"features must have shape (layers, states, actions, dimensions), got {features.shape}")
        check_features(features, "features")
        checks.positive(bonus_scale, "bonus_scale")
        checks.positive(regularization, "regularization")
        self.features = features
        self.bonus_scale = float(bonus_scale)
        self.regularization = float(regularization)
        layers, _, _, dimensions = features.shape
        eye = torch.eye(dimensions, dtype=features.dtype, device=features.device)
        self._covariance = (self.regularization * eye).repeat(layers, 1, 1)
        # How the features of episodes and the states that followed add up, for every layer but the last.
        self._followed = features.new_zeros(layers - 1, dimensions, features.shape[1])
        self._policies: list[Tensor] = []
        self._counts: list[int] = []
        self._plan()

    @property
    def policy(self) -> Float[Tensor, "layers states actions"]:
        """The policy of the next round, with probabilities 0 and 1."""
        return self._policy

    @property
    def values(self) -> Float[Tensor, "layers states actions"]:
        """What the policy of the next round is greedy for: optimistic sums of the uncertainties to come."""
        return self._values

    @property
    def uncertainty(self) -> Float[Tensor, "layers states actions"]:
        """The reward of the next round: uncertainties, up to 1."""
        return self._uncertainty

    @torch.no_grad()
    def update(self, states: Int[Tensor, "*episodes layers"], actions: Int[Tensor, "*episodes layers"]) -> None:
        """Take in the episodes of a round, all played by :attr:`policy`.

        Args:
            states: Visited.
            actions: Taken.

        Raises:
            ValueError: If there are no episodes, shapes do not fit or an index is out of range.
        """
        check_path(self.features, states, actions)
        checks.not_empty(states, "states")
        layers, num_states = self.features.shape[:2]
        states, actions = states.reshape(-1, layers), actions.reshape(-1, layers)
        seen = self.features[torch.arange(layers, device=states.device), states, actions].movedim(0, 1)
        self._covariance = self._covariance + seen.mT @ seen
        arrived = torch.nn.functional.one_hot(states[:, 1:], num_states).movedim(0, 1).to(seen)
        self._followed = self._followed + seen[:-1].mT @ arrived
        self._policies.append(self._policy)
        self._counts.append(len(states))
        self._plan()

    def cover(self) -> PolicyCover:
        """Return the mixture of the policies of all rounds so far, each as likely as it had episodes.

        Raises:
            RuntimeError: If there was no round yet.
        """
        if not self._policies:
            raise RuntimeError("there is no cover before the first update")
        counts = self.features.new_tensor(self._counts)
        inverse = counts.sum() * torch.linalg.inv(self._covariance)
        return PolicyCover(torch.stack(self._policies), counts / counts.sum(), (inverse + inverse.mT) / 2)

    def _plan(self) -> None:
        """Find the policy that is greedy for optimistic sums of uncertainties."""
        inverse = torch.linalg.inv(self._covariance)
        norms = torch.einsum("hsad,hde,hsae->hsa", self.features, inverse, self.features).clamp_min(0).sqrt()
        bonus = self.bonus_scale * norms
        self._uncertainty = bonus.clamp_max(1)
        layers = len(norms)
        values = [self._uncertainty[-1]]
        for layer in reversed(range(layers - 1)):
            weights = inverse[layer] @ (self._followed[layer] @ values[-1].amax(-1))
            ahead = self._uncertainty[layer] + self.features[layer] @ weights + bonus[layer]
            values.append(ahead.clamp(0, layers - layer))
        self._values = torch.stack(values[::-1])
        best = self._values.argmax(-1, keepdim=True)
        self._policy = torch.zeros_like(self._values).scatter(-1, best, 1.0)

    def __repr__(self) -> str:
        layers, states, actions, dimensions = self.features.shape
        return (
            f"CoverExplorer(features of {layers} layers, {states} states, {actions} actions and {dimensions} "
            f"dimensions, bonus_scale={self.bonus_scale:.4g}, regularization={self.regularization:.4g}, "
            f"rounds={len(self._policies)})"
        )
