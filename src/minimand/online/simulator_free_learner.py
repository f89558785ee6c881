r"""Policy optimization against changing losses when the transitions are unknown as well. Experimental.

An epoch is an even number of episodes, half of them for a covariance and half for estimates, in all of which one
policy :math:`\pi` is learned about. An episode follows it throughout or, with probability :math:`\delta`, follows a
policy drawn from a cover through a random layer :math:`h^*`, its action included, and :math:`\pi` thereafter. What
comes after layer :math:`h^*` is then as under :math:`\pi`, so that with the weights

.. math:: v_h = 1 \text{ without exploration}, \qquad v_h = H\, 1\{h = h^*\} \text{ with it}, \qquad
          E[v_h \phi_h \phi_h^\top] = \Sigma_h = (1 - \delta)\, E_\pi[\phi_h \phi_h^\top]
              + \delta\, E_{\text{cover}}[\phi_h \phi_h^\top],

the action values of :math:`\pi`, which are linear in a linear problem, are estimated from real episodes alone:

.. math:: \Sigma_h^+ = \Big( \gamma I + \frac{1}{N} \sum_{n \le N} v_{n,h} \phi_{n,h} \phi_{n,h}^\top \Big)^{-1},
          \qquad
          \hat\theta_h = \Sigma_h^+ \frac{1}{N} \sum_{n > N} v_{n,h} \phi_{n,h} L_{n,h}.

Likewise the dilated bonus. Its part that lies ahead is linear whatever the bonus :math:`b`, since transitions are:

.. math:: B_h = b_h + \phi_h^\top \hat\Lambda_h, \qquad
          \hat\Lambda_h = \Sigma_h^+ \frac{1}{N} \sum_{n > N} v_{n,h} \phi_{n,h} D_{n,h}, \qquad
          D_{n,h} = \sum_{i > h} \Big( 1 + \frac1H \Big)^{i - h} b_i(s_{n,i}, a_{n,i}).

The bonus is 0 in states that the cover does not know. In those it knows, with
:math:`\|\phi\|^2_{\Sigma_{\text{cover}}^+} \le \alpha`, it is at most :math:`2 \beta \alpha / \delta`. After each epoch
the policy follows the leader, regularised by the logarithmic barrier, which puts up with very negative estimates.

What is proven here, by tests against exact sums over all episodes: that the mean of :math:`v_h \phi_h \phi_h^\top` is
as above; that with this covariance estimates have the action values, and the dilated bonus, for their means, but for
the ridge's bias; that this bias is at most :math:`H \sqrt{\gamma d}\, \|\phi\|_{\Sigma^+}`, which the bonus pays for
up to :math:`\gamma d H^2 / (4 \beta)`; and the bound on the bonus. What is not: how far a covariance of :math:`N`
episodes moves the estimates, and so the regret of order :math:`K^{8/9}` that the paper states. Its constants, the
length of its epochs and the threshold of its known states could not be checked against the paper: there are no
settings by theory.

Source: Dai, Luo, Wei and Zimmert, ICML 2023, arXiv 2301.12942, algorithm 3; Luo, Wei and Lee, NeurIPS 2021, arXiv
2107.08346, section 5 (epochs, exploration by a cover, and the linear form of the bonus). Reconstructed, as said above.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..stopping import Stop
from .adversarial_linear_mdps import exploration_bonus, inverse_covariance, log_barrier_step
from .linear_mdp import check_features, check_losses, check_path
from .policy_cover import PolicyCover


def exploration_weights(
    explored: Int[Tensor, "*batch"], num_layers: int, *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "*batch layers"]:
    r"""Weigh the layers of episodes of which some were explored through one layer.

    .. math:: v_h = 1 \text{ without exploration}, \qquad v_h = H\, 1\{h = h^*\} \text{ with it}.

    Args:
        explored: The layer :math:`h^*` up to which, and with which, another policy was followed; -1 for none.
        num_layers: :math:`H`.
        dtype: Of the weights.

    Raises:
        TypeError: If ``explored`` is not of an integer dtype.
        ValueError: If a layer is out of range.

    Example:
        >>> exploration_weights(torch.tensor([-1, 0, 2]), 3, dtype=torch.float32)
        tensor([[1., 1., 1.],
                [3., 0., 0.],
                [0., 0., 3.]])

    Source:
        Luo, Wei and Lee 2021, arXiv 2107.08346, the algorithm for linear problems.
    """
    checks.tensor(explored, "explored")
    if explored.is_floating_point() or explored.dtype == torch.bool:
        raise TypeError(f"explored must have an integer dtype, got {explored.dtype}")
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    checks.require(
        (explored >= -1) & (explored < num_layers),
        lambda: f"explored must lie in [-1, {num_layers - 1}], got values from {explored.min()} to {explored.max()}",
    )
    layers = torch.arange(num_layers, device=explored.device)
    there = num_layers * (layers == explored[..., None])
    return torch.where(explored[..., None] < 0, 1, there).to(dtype)


def linear_q_weights(
    observed: Float[Tensor, "*batch samples dimensions"],
    loss_to_go: Float[Tensor, "*batch samples"],
    inverse: Float[Tensor, "*batch dimensions dimensions"],
    *,
    weights: Float[Tensor, "*batch samples"] | None = None,
) -> Float[Tensor, "*batch dimensions"]:
    r"""Estimate the weights of linear action values from many episodes.

    .. math:: \hat\theta = \Sigma^+ \sum_n w_n \phi_n L_n.

    Where :math:`\Sigma^+` is that of the same features and weights, it is ridge regression; where it comes from others,
    the estimate has no bias but the ridge's, given them.

    Args:
        observed: Features of the pairs visited.
        loss_to_go: :math:`L_n`, or what else is to be predicted.
        inverse: :math:`\Sigma^+`.
        weights: Of the episodes, at least 0; one over their number if None.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, a feature's norm is above 1, a weight is negative, or numbers are not finite.

    Example:
        >>> linear_q_weights(torch.eye(2), torch.tensor([1.0, 3.0]), 2 * torch.eye(2))
        tensor([1., 3.])

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithm 3.
    """
    check_features(observed, "observed")
    checks.not_empty(observed, "observed")
    for value, name in ((loss_to_go, "loss_to_go"), (inverse, "inverse")):
        checks.floating(value, name)
        checks.finite(value, name)
    if observed.dim() < 2 or loss_to_go.shape != observed.shape[:-1]:
        raise ValueError(
            f"loss_to_go must have shape (*batch, samples) for observed of shape (*batch, samples, dimensions), got "
            f"{tuple(loss_to_go.shape)} for {tuple(observed.shape)}"
        )
    wanted = (*observed.shape[:-2], observed.shape[-1], observed.shape[-1])
    if tuple(inverse.shape) != wanted:
        raise ValueError(f"inverse must have shape {wanted}, got {tuple(inverse.shape)}")
    if weights is None:
        target = loss_to_go / observed.shape[-2]
    else:
        checks.floating(weights, "weights")
        checks.finite(weights, "weights")
        if weights.shape != loss_to_go.shape:
            raise ValueError(f"weights must have shape {tuple(loss_to_go.shape)}, got {tuple(weights.shape)}")
        checks.require(weights >= 0, lambda: f"weights must be at least 0, got {float(weights.min())}")
        target = weights * loss_to_go
    return (inverse @ (observed.mT @ target[..., None])).squeeze(-1)


class SimulatorFreeLearner:
    r"""Plays a linear decision problem of unknown transitions against changing losses seen on its path. Experimental.

    It knows features only, and a cover found without a simulator, by :class:`CoverExplorer` say. See the module's text
    on what is proven of it and what is not.

    Args:
        features: :math:`\phi_h(s, a)`, ``(layers, states, actions, dimensions)``, of norm at most 1.
        cover: Policies to explore with.
        learning_rate: The paper's :math:`\eta`, of one epoch's estimate.
        regularization: Of covariances: the paper's :math:`\gamma`.
        bonus_scale: The paper's :math:`\beta`; 0 for no bonus.
        exploration: Probability :math:`\delta` of an episode of exploration, in [0, 1].
        half_epoch: Episodes :math:`N` of each half of an epoch.
        known_threshold: Largest uncertainty :math:`\alpha` of the actions of a known state; infinity knows all.
        runs: Shape of a batch of learners that play independently.
        generator: Of the exploration.

    Raises:
        TypeError: If ``features`` is not of a floating-point dtype.
        ValueError: If a setting is out of its range, or the cover is of another problem.

    Example:
        >>> from minimand.online import CoverExplorer, LinearMDP
        >>> mdp = LinearMDP.random_simplex(num_layers=2, num_states=3, num_actions=3, num_dimensions=3, seed=0)
        >>> generator, explorer = torch.Generator().manual_seed(0), CoverExplorer(mdp.features)
        >>> for _ in range(20):
        ...     explorer.update(*mdp.rollout(explorer.policy, generator=generator))
        >>> settings = {"learning_rate": 1.0, "regularization": 0.05, "bonus_scale": 0.01, "exploration": 0.1}
        >>> learner = SimulatorFreeLearner(
        ...     mdp.features, explorer.cover(), half_epoch=10, generator=generator, **settings
        ... )
        >>> losses = mdp.linear_losses(torch.rand(2, 3, generator=generator, dtype=torch.float64))
        >>> before = mdp.value(learner.leader, losses)
        >>> for _ in range(200):
        ...     states, actions = mdp.rollout(learner.policy, generator=generator)
        ...     learner.update(states, actions, mdp.observe(losses, states, actions))
        >>> bool(mdp.value(learner.leader, losses) < before)
        True

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithm 3, reconstructed.
    """

    def __init__(
        self,
        features: Float[Tensor, "layers states actions dimensions"],
        cover: PolicyCover,
        *,
        learning_rate: float,
        regularization: float,
        bonus_scale: float,
        exploration: float,
        half_epoch: int,
        known_threshold: float = float("inf"),
        runs: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        checks.floating(features, "features")
        checks.not_empty(features, "features")
        if features.dim() != 4:
            raise ValueError(f"features must have shape (layers, states, actions, dimensions), got {features.shape}")
        check_features(features, "features")
        checks.positive(learning_rate, "learning_rate")
        checks.positive(regularization, "regularization")
        checks.non_negative(bonus_scale, "bonus_scale")
        checks.between(exploration, "exploration", 0, 1)
        if half_epoch < 1:
            raise ValueError(f"half_epoch must be at least 1, got {half_epoch}")
        wanted, found = (*features.shape, features.shape[-1]), (*cover.policies.shape[1:], *cover.inverse.shape[1:])
        if found != wanted:
            raise ValueError(f"cover must be of layers, states, actions and dimensions {wanted[:4]}, got {found[:4]}")
        self.features = features
        self.cover = cover
        self.learning_rate = float(learning_rate)
        self.regularization = float(regularization)
        self.bonus_scale = float(bonus_scale)
        self.exploration = float(exploration)
        self.half_epoch = half_epoch
        self.known_threshold = float(known_threshold)
        self.runs = tuple(runs)
        self._generator = generator
        self._members = cover.policies.to(features)
        self._known = cover.known(features, threshold=known_threshold)[..., None].to(features)
        self._layers = torch.arange(features.shape[0], device=features.device)
        self._episodes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._follow(features.new_zeros(*self.runs, *features.shape[:3]))
        self._draw()

    @property
    def leader(self) -> Float[Tensor, "*runs layers states actions"]:
        r"""The policy that this epoch learns about: the paper's :math:`\pi_k`."""
        return self._leader

    @property
    def policy(self) -> Float[Tensor, "*runs layers states actions"]:
        """The policy of the next episode: the leader, behind a policy of the cover if there is exploration."""
        return self._policy

    @property
    def explored(self) -> Int[Tensor, "*runs"]:
        """The layer through which the next episode explores, or -1."""
        return self._explored

    @torch.no_grad()
    def update(
        self,
        states: Int[Tensor, "*runs layers"],
        actions: Int[Tensor, "*runs layers"],
        losses: Float[Tensor, "*runs layers"],
    ) -> None:
        """Take in an episode that :attr:`policy` played, and learn at the end of an epoch.

        Args:
            states: Visited.
            actions: Taken.
            losses: Of these, in [0, 1], to be made small.

        Raises:
            ValueError: If a loss lies outside [0, 1], or shapes do not fit.
        """
        wanted = (*self.runs, len(self._layers))
        checks.floating(losses, "losses")
        for value, name in ((states, "states"), (actions, "actions"), (losses, "losses")):
            if tuple(value.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
        check_path(self.features, states, actions)
        check_losses(losses)
        self._episodes.append((states, actions, losses.to(self.features).clamp(0, 1), self._explored))
        if len(self._episodes) == 2 * self.half_epoch:
            states, actions, losses, explored = (torch.stack(each, -2) for each in self._columns())
            self._episodes = []
            self._follow(self._summed + self._estimate(states, actions, losses, explored.squeeze(-1)))
        self._draw()

    def state_dict(self) -> dict[str, Any]:
        """Return the summed estimates, the episodes of this epoch, and what the next one plays."""
        columns = [torch.stack(each) for each in self._columns()] if self._episodes else []
        return {"summed": self._summed.clone(), "episodes": columns, "next": (self._policy, self._explored)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up learning where it was saved.

        Args:
            state: Of a learner of the same problem, runs and settings.

        Raises:
            ValueError: If it is of another shape.
        """
        summed = state["summed"]
        if summed.shape != self._summed.shape:
            raise ValueError(f"state must hold sums of shape {tuple(self._summed.shape)}, got {tuple(summed.shape)}")
        self._follow(summed.to(self._summed))
        states, actions, losses, explored = state["episodes"] or 4 * ((),)
        self._episodes = list(zip(states, actions, losses, (each.squeeze(-1) for each in explored), strict=True))
        self._policy, self._explored = state["next"]

    def _columns(self) -> list[list[Tensor]]:
        """Return the states, actions, losses and explored layers, the last as columns, of this epoch's episodes."""
        states, actions, losses, explored = zip(*self._episodes, strict=True)
        return [list(states), list(actions), list(losses), [each[..., None] for each in explored]]

    def _estimate(self, states: Tensor, actions: Tensor, losses: Tensor, explored: Tensor) -> Tensor:
        """Return the epoch's action values less dilated bonuses, from ``(*runs, episodes, layers)``."""
        half, horizon = self.half_epoch, len(self._layers)
        observed = self.features[self._layers, states, actions].movedim(-2, -3)
        weights = exploration_weights(explored, horizon, dtype=observed.dtype).mT / half
        inverse = inverse_covariance(
            observed[..., :half, :], regularization=self.regularization, weights=weights[..., :half]
        )
        bonus = self._known * exploration_bonus(self.features, inverse, self._leader, scale=self.bonus_scale)
        place = (states * self.features.shape[2] + actions)[..., half:, :].mT
        met = bonus.flatten(-2).gather(-1, place)
        ahead = torch.zeros_like(met)
        for layer in reversed(range(horizon - 1)):
            ahead[..., layer, :] = (1 + 1 / horizon) * (met[..., layer + 1, :] + ahead[..., layer + 1, :])
        loss_to_go = losses[..., half:, :].flip(-1).cumsum(-1).flip(-1).mT
        theta = linear_q_weights(observed[..., half:, :], loss_to_go - ahead, inverse, weights=weights[..., half:])
        return torch.einsum("hsad,...hd->...hsa", self.features, theta) - bonus

    def _follow(self, summed: Tensor) -> None:
        self._summed = summed
        step = log_barrier_step(summed, learning_rate=self.learning_rate)
        if step.status is Stop.ITERATION_LIMIT:
            raise RuntimeError(f"the policy was not found to tolerance: its sum is off by {step.residual:.3g}")
        self._leader = step.policy

    def _draw(self) -> None:
        """Draw whether, through which layer and with which policy the next episode explores."""
        shape, device, generator = self.runs, self.features.device, self._generator
        layer = torch.randint(len(self._layers), shape, generator=generator, device=device)
        chance = torch.rand(shape, generator=generator, device=device)
        self._explored = torch.where(chance < self.exploration, layer, -1)
        count = self._explored.numel()
        member = torch.multinomial(self.cover.shares, count, replacement=True, generator=generator).view(shape)
        leading = (self._layers <= self._explored[..., None])[..., None, None]
        self._policy = torch.where(leading, self._members[member], self._leader)

    def __repr__(self) -> str:
        layers, states, actions, dimensions = self.features.shape
        return (
            f"SimulatorFreeLearner(features of {layers} layers, {states} states, {actions} actions and {dimensions} "
            f"dimensions, learning_rate={self.learning_rate:.4g}, regularization={self.regularization:.4g}, "
            f"bonus_scale={self.bonus_scale:.4g}, exploration={self.exploration:.4g}, half_epoch={self.half_epoch}, "
            f"known_threshold={self.known_threshold:.4g}, runs={self.runs})"
        )
