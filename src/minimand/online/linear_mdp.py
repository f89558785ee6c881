r"""An episodic decision problem in layers, linear in known features, whose losses may change from episode to episode.

An episode visits one state :math:`s` in each layer :math:`h = 1, \dots, H` and takes one action :math:`a` there. With
features :math:`\phi_h(s, a)`, transitions :math:`P_h(s' | s, a)` that are linear in them and losses
:math:`\phi_h(s, a)^\top \theta_h`, the action values of every policy are linear too. Any table is such a problem: give
each pair of state and action a feature of its own. All quantities are exact sums over the table:

.. math:: q_{h+1}(s') = \sum_{s, a} q_h(s)\, \pi_h(a|s)\, P_h(s'|s, a), \qquad
          Q_h(s, a) = \ell_h(s, a) + c \sum_{s'} P_h(s'|s, a) \sum_{a'} \pi_{h+1}(a'|s')\, Q_{h+1}(s', a').

The dilation :math:`c` is 1 for action values, and :math:`1 + 1/H` for dilated bonuses. As transitions stay, the best
fixed policy over many episodes is the best one against their summed losses, found by one backward pass.

Source: Jin, Yang, Wang and Jordan, "Provably efficient reinforcement learning with linear function approximation",
COLT 2020, arXiv 1907.05388 (linear problems); Luo, Wei and Lee, NeurIPS 2021, arXiv 2107.08346 (dilated bonuses).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks


class LinearMDP:
    r"""A layered decision problem as a table, with features in which it should be linear.

    Policies and losses come and go as tables ``(*batch, layers, states, actions)``: batches of policies are evaluated,
    and rolled out, together.

    Args:
        features: :math:`\phi_h(s, a)`, ``(layers, states, actions, dimensions)``, of norm at most 1.
        transitions: :math:`P_h(s' | s, a)` to the next layer, ``(layers - 1, states, actions, states)``.
        initial: Probabilities of the first layer's states, ``(states,)``.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, a feature's norm is above 1, or probabilities do not add up to 1.

    Example:
        >>> mdp = LinearMDP.random_simplex(num_layers=3, num_states=4, num_actions=5, num_dimensions=4, seed=0)
        >>> uniform = torch.full((3, 4, 5), 1 / 5, dtype=torch.float64)
        >>> losses = mdp.linear_losses(torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4))
        >>> best = mdp.best_policy(losses)
        >>> bool(mdp.value(best, losses) < mdp.value(uniform, losses))
        True
        >>> bool(mdp.linearity_residual(losses) < 1e-12)
        True

    Source:
        Jin et al., COLT 2020, arXiv 1907.05388, assumption A; the table is ours.
    """

    def __init__(
        self,
        features: Float[Tensor, "layers states actions dimensions"],
        transitions: Float[Tensor, "layers-1 states actions states"],
        initial: Float[Tensor, " states"],
    ) -> None:
        checks.floating(features, "features")
        checks.not_empty(features, "features")
        if features.dim() != 4:
            raise ValueError(f"features must have shape (layers, states, actions, dimensions), got {features.shape}")
        layers, states, actions, _ = features.shape
        check_features(features, "features")
        _check_probabilities(transitions, "transitions", (layers - 1, states, actions, states))
        _check_probabilities(initial, "initial", (states,))
        self.features = features
        self.transitions = transitions.to(features)
        self.initial = initial.to(features)

    @classmethod
    def random_simplex(
        cls,
        *,
        num_layers: int,
        num_states: int,
        num_actions: int,
        num_dimensions: int,
        feature_concentration: float = 0.3,
        measure_concentration: float = 0.5,
        seed: int,
    ) -> LinearMDP:
        r"""Draw a problem whose features lie on the simplex, so that it is exactly linear.

        Features :math:`\phi_h(s, a)` and the measures :math:`\psi_{h, i}` over next states come from symmetric
        Dirichlet distributions, and :math:`P_h(s'|s, a) = \sum_i \phi_{h, i}(s, a)\, \psi_{h, i}(s')`. The first
        state is uniform. In float64.

        Args:
            num_layers: :math:`H`.
            num_states: States of each layer.
            num_actions: Actions of each state.
            num_dimensions: Of the features.
            feature_concentration: Of the features' distribution; small values give features near the corners.
            measure_concentration: Of the measures' distribution.
            seed: Of the draw.
        """
        checks.positive(feature_concentration, "feature_concentration")
        checks.positive(measure_concentration, "measure_concentration")
        rng = np.random.default_rng(seed)
        pairs, steps = (num_layers, num_states, num_actions), (num_layers - 1, num_dimensions)
        features = torch.from_numpy(rng.dirichlet(np.full(num_dimensions, feature_concentration), pairs))
        measures = torch.from_numpy(rng.dirichlet(np.full(num_states, measure_concentration), steps))
        transitions = torch.einsum("hsai,hit->hsat", features[:-1], measures)
        return cls(features, transitions, features.new_full((num_states,), 1 / num_states))

    @classmethod
    def tabular(
        cls, transitions: Float[Tensor, "steps states actions states"], initial: Float[Tensor, " states"]
    ) -> LinearMDP:
        """Embed a table: one feature for each pair of state and action.

        Args:
            transitions: To the next layer, ``(layers - 1, states, actions, states)``.
            initial: Probabilities of the first layer's states.
        """
        checks.floating(transitions, "transitions")
        if transitions.dim() != 4:
            raise ValueError(
                f"transitions must have shape (layers - 1, states, actions, states), got {tuple(transitions.shape)}"
            )
        steps, states, actions, _ = transitions.shape
        corners = torch.eye(states * actions, dtype=transitions.dtype, device=transitions.device)
        features = corners.view(1, states, actions, -1).repeat(steps + 1, 1, 1, 1)
        return cls(features, transitions, initial)

    @property
    def num_layers(self) -> int:
        """Layers of an episode: the paper's H."""
        return self.features.shape[0]

    @property
    def num_states(self) -> int:
        """States of each layer."""
        return self.features.shape[1]

    @property
    def num_actions(self) -> int:
        """Actions of each state: the paper's A."""
        return self.features.shape[2]

    @property
    def num_dimensions(self) -> int:
        """Dimensions of the features: the paper's d."""
        return self.features.shape[3]

    def linear_losses(
        self, weights: Float[Tensor, "*batch layers dimensions"]
    ) -> Float[Tensor, "*batch layers states actions"]:
        r"""Return the losses :math:`\phi_h(s, a)^\top \theta_h`.

        Args:
            weights: :math:`\theta_h` for each layer.
        """
        wanted = (self.num_layers, self.num_dimensions)
        if tuple(weights.shape[-2:]) != wanted:
            raise ValueError(f"weights must have shape (*batch, {wanted[0]}, {wanted[1]}), got {tuple(weights.shape)}")
        return torch.einsum("hsad,...hd->...hsa", self.features, weights.to(self.features))

    def occupancy(
        self, policy: Float[Tensor, "*batch layers states actions"]
    ) -> Float[Tensor, "*batch layers states actions"]:
        """Return how likely the policy is to take each action in each state of each layer.

        Args:
            policy: Probabilities of the actions.
        """
        self._check_policy(policy)
        return occupancy(self, policy)

    def value(
        self, policy: Float[Tensor, "*policies layers states actions"], losses: Float[Tensor, "*losses layers s a"]
    ) -> Float[Tensor, "*batch"]:
        """Return the expected loss of an episode.

        Args:
            policy: Probabilities of the actions.
            losses: Of each state and action; batches of both broadcast.
        """
        self._check_table(losses, "losses")
        return (self.occupancy(policy) * losses).sum((-3, -2, -1))

    def action_values(
        self,
        policy: Float[Tensor, "*policies layers states actions"],
        losses: Float[Tensor, "*losses layers s a"],
        *,
        dilation: float = 1.0,
    ) -> Float[Tensor, "*batch layers states actions"]:
        r"""Return :math:`Q_h(s, a)`: the expected sum of losses from a layer on, after an action is taken.

        Args:
            policy: Probabilities of the actions of the layers that follow.
            losses: Of each state and action; batches of both broadcast.
            dilation: By what each further layer's losses are multiplied: :math:`1 + 1/H` gives the dilated bonus of a
                bonus put in the place of losses.
        """
        self._check_policy(policy)
        self._check_table(losses, "losses")
        return action_values(self, policy, losses, dilation=dilation)

    def best_policy(
        self, losses: Float[Tensor, "*batch layers states actions"]
    ) -> Float[Tensor, "*batch layers states actions"]:
        """Return the policy of least expected loss, with probabilities 0 and 1.

        Args:
            losses: Of each state and action; summed over episodes for the best fixed policy in hindsight.
        """
        self._check_table(losses, "losses")
        values = losses[..., -1, :, :]
        actions = [values.argmin(-1)]
        for layer in reversed(range(self.num_layers - 1)):
            values = losses[..., layer, :, :] + _expect(self, values.amin(-1), layer)
            actions.append(values.argmin(-1))
        chosen = torch.stack(actions[::-1], -2)[..., None]
        return torch.zeros_like(losses).scatter(-1, chosen, 1.0)

    def regret(
        self, incurred: Float[Tensor, "episodes *runs"], losses: Float[Tensor, "episodes *runs layers states actions"]
    ) -> Float[Tensor, "episodes *runs"]:
        """Return the regret after each episode against the policy that is the best fixed one up to that episode.

        Args:
            incurred: The expected loss of each episode, under the policy that was played in it.
            losses: Of the episodes.
        """
        checks.floating(incurred, "incurred")
        checks.finite(incurred, "incurred")
        if incurred.shape != losses.shape[:-3]:
            raise ValueError(
                f"incurred must have shape {tuple(losses.shape[:-3])} for losses of shape {tuple(losses.shape)}, "
                f"got {tuple(incurred.shape)}"
            )
        summed = losses.cumsum(0)
        return incurred.cumsum(0) - self.value(self.best_policy(summed), summed)

    def rollout(
        self, policy: Float[Tensor, "*batch layers states actions"], *, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "*batch layers"], Int[Tensor, "*batch layers"]]:
        """Play one episode with each policy of a batch; expand one policy to play many.

        Args:
            policy: Probabilities of the actions.
            generator: Of the draws.

        Returns:
            The states and the actions of the episodes.
        """
        self._check_policy(policy)
        batch = policy.shape[:-3]
        flat = policy.reshape(-1, *policy.shape[-3:])
        rows = torch.arange(len(flat), device=flat.device)
        state = _draw(self.initial.expand(len(flat), -1), generator)
        states, actions = [], []
        for layer in range(self.num_layers):
            action = _draw(flat[rows, layer, state], generator)
            states.append(state)
            actions.append(action)
            if layer + 1 < self.num_layers:
                state = _draw(self.transitions[layer, state, action], generator)
        return torch.stack(states, -1).view(*batch, -1), torch.stack(actions, -1).view(*batch, -1)

    def observe(
        self,
        table: Float[Tensor, "*tables layers states actions"],
        states: Int[Tensor, "*batch layers"],
        actions: Int[Tensor, "*batch layers"],
    ) -> Float[Tensor, "*batch layers"]:
        """Return a table's entries on the paths of episodes: all that is seen of an episode's losses.

        Args:
            table: Losses, say; its batch broadcasts with that of the episodes.
            states: Visited.
            actions: Taken.
        """
        self._check_table(table, "table")
        check_path(self.features, states, actions)
        place = (states * self.num_actions + actions)[..., None]
        flat = table.flatten(-2).expand(*place.shape[:-1], -1)
        return flat.gather(-1, place).squeeze(-1)

    def features_at(
        self, states: Int[Tensor, "*batch layers"], actions: Int[Tensor, "*batch layers"]
    ) -> Float[Tensor, "*batch layers dimensions"]:
        """Return the features on the paths of episodes.

        Args:
            states: Visited.
            actions: Taken.
        """
        check_path(self.features, states, actions)
        return self.features[torch.arange(self.num_layers, device=self.features.device), states, actions]

    def linearity_residual(
        self, losses: Float[Tensor, "*batch layers states actions"] | None = None
    ) -> Float[Tensor, ""]:
        """Return how far transitions, and losses if given, are from being linear in the features.

        It is the largest error of their least-squares fits. Where it is not near 0, action values are not linear, and
        regret bounds for linear problems get a term that grows with every episode.

        Args:
            losses: Of each state and action.
        """
        features = self.features.flatten(1, 2)
        targets = self.transitions.flatten(1, 2)
        residual = _fit_error(features[:-1], targets)
        if losses is not None:
            self._check_table(losses, "losses")
            by_layer = losses.reshape(-1, self.num_layers, features.shape[1]).permute(1, 2, 0)
            residual = torch.maximum(residual, _fit_error(features, by_layer.to(features)))
        return residual

    def _check_table(self, table: Tensor, name: str) -> None:
        checks.floating(table, name)
        wanted = tuple(self.features.shape[:3])
        if tuple(table.shape[-3:]) != wanted:
            raise ValueError(
                f"{name} must have shape (*batch, {', '.join(map(str, wanted))}), got {tuple(table.shape)}"
            )
        checks.finite(table, name)

    def _check_policy(self, policy: Tensor) -> None:
        self._check_table(policy, "policy")
        _check_probabilities(policy, "policy", tuple(policy.shape))

    def __repr__(self) -> str:
        return (
            f"LinearMDP(num_layers={self.num_layers}, num_states={self.num_states}, num_actions={self.num_actions}, "
            f"num_dimensions={self.num_dimensions})"
        )


def occupancy(mdp: LinearMDP, policy: Tensor) -> Tensor:
    """Return what :meth:`LinearMDP.occupancy` does, of a policy that needs no check."""
    reach = mdp.initial.expand(*policy.shape[:-3], mdp.num_states)
    taken = []
    for layer in range(mdp.num_layers):
        taken.append(reach[..., None] * policy[..., layer, :, :])
        if layer + 1 < mdp.num_layers:
            reach = taken[-1].flatten(-2) @ mdp.transitions[layer].flatten(0, 1)
    return torch.stack(taken, -3)


def action_values(mdp: LinearMDP, policy: Tensor, losses: Tensor, *, dilation: float) -> Tensor:
    """Return what :meth:`LinearMDP.action_values` does, of a policy and losses that need no check."""
    values = [losses[..., -1, :, :]]
    for layer in reversed(range(mdp.num_layers - 1)):
        following = (policy[..., layer + 1, :, :] * values[-1]).sum(-1)
        values.append(losses[..., layer, :, :] + dilation * _expect(mdp, following, layer))
    return torch.stack(torch.broadcast_tensors(*reversed(values)), -3)


def check_features(features: Tensor, name: str) -> None:
    """Raise unless features are finite and of norm at most 1, but for rounding."""
    checks.floating(features, name)
    checks.finite(features, name)
    norms = torch.linalg.vector_norm(features.detach(), dim=-1)
    checks.require(
        norms <= 1 + 1e-6, lambda: f"{name} must have norms of at most 1, got one of {float(norms.max()):.6g}"
    )


def check_path(features: Tensor, states: Tensor, actions: Tensor) -> None:
    """Raise unless states and actions, ``(*batch, layers)``, are of a problem with these features."""
    layers, num_states, num_actions, _ = features.shape
    for path, name, count in ((states, "states", num_states), (actions, "actions", num_actions)):
        checks.tensor(path, name)
        if path.is_floating_point() or path.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype, got {path.dtype}")
        if path.dim() == 0 or path.shape[-1] != layers or path.shape != states.shape:
            raise ValueError(f"{name} must have shape (*batch, {layers}), got {tuple(path.shape)}")
        checks.require(
            (path >= 0) & (path < count),
            lambda path=path, name=name, count=count: (  # type: ignore[misc]
                f"{name} must lie in [0, {count - 1}], got values from {int(path.min())} to {int(path.max())}"
            ),
        )


def check_losses(losses: Tensor) -> None:
    """Raise unless losses lie in [0, 1], but for rounding: features on the simplex may add up to a bit more than 1."""
    checks.require((losses >= -1e-6) & (losses <= 1 + 1e-6), lambda: "losses must lie in [0, 1]")


def _expect(mdp: LinearMDP, values: Tensor, layer: int) -> Tensor:
    """Return the expectation of the next layer's state values, for each state and action."""
    following = values @ mdp.transitions[layer].flatten(0, 1).mT
    return following.unflatten(-1, (mdp.num_states, mdp.num_actions))


def _check_probabilities(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
    checks.floating(value, name)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    checks.finite(value, name)
    value = value.detach()
    checks.require(
        (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() <= 1e-5),
        lambda: f"{name} must hold probabilities that add up to 1 along the last dimension",
    )


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _fit_error(features: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() == 0:
        return features.new_zeros(())
    return (targets - features @ (torch.linalg.pinv(features) @ targets)).abs().amax()
