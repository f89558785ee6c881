"""FamO2O: learn a whole family of policies offline, and let each state pick its member online."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks
from .actor_critic import TwinCritic
from .balance_model import ENCODING, BalancedNetwork, BalanceModel, encode_balance
from .cql import conservative_excess
from .gaussian_actor import GaussianActor, SquashedActor
from .iql import expectile_loss
from .offline_batches import Batch
from .stacked_networks import StackedMLP, adam, descend, follow, member_generators, per_member


class FamO2O(nn.Module):
    r"""Learn a family of policies :math:`\pi(a|s, \beta)` and the balance :math:`\beta(s)` that suits a state.

    The policy reads an encoding of :math:`\beta`, which weighs improvement against staying near the log, and offline
    sees every :math:`\beta` of a range. A balance model is taught to pick, state by state, the :math:`\beta` whose
    action the critics value most, with an entropy that keeps it from freezing; online it decides.

    On ``base="iql"``, values and critics are :class:`IQL`'s and the policy minimises
    :math:`-\min(e^{\beta(\min_i Q_i' - V)}, w_{\max}) \log\pi(a|s,\beta)`. On ``base="cql"`` the critics are
    :class:`CQL`'s and the policy minimises :math:`\tau\log\pi - \beta \min_i Q_i(s, \hat a)`.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions are scaled to [-1, 1].
        base: ``"iql"`` or ``"cql"``.
        balance: Least and largest :math:`\beta`. The authors take (8, 14) in mazes, (1, 5) by default, and (0.5, 1.5)
            on CQL.
        expectile: Of IQL's value; one number, or one a member.
        conservatism: Of CQL's critics; one number, or one a member.
        num_actions: Actions of each source in CQL's integral.
        largest_weight: :math:`w_{\max}`.
        discount: Of later rewards.
        target_rate: How far slow critics move a step.
        target_entropy: Entropy of the balance model's place in (-1, 1) that its temperature aims at; uniform has 0.69.
        lr: Learning rate of Adam.
        hidden: Widths of the hidden layers.
        seeds: One a member: learners of different seeds train side by side.

    Example:
        >>> learner = FamO2O(3, 1, hidden=(8,), balance=(1.0, 10.0))
        >>> learner.act(torch.zeros(1, 5, 3)).shape
        torch.Size([1, 5, 1])

    Source: S. Wang et al., "Train once, get a family: state-adaptive balances for offline-to-online reinforcement
    learning" (2023, arXiv 2310.17966), its section 4; defaults from its authors' code, whose CQL variant this departs
    from where it maps the balance outside its range and takes a next state's balance from the state before it.
    """

    expectile: Tensor
    conservatism: Tensor
    online: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        base: str = "iql",
        balance: tuple[float, float] = (1.0, 5.0),
        expectile: float | Sequence[float] = 0.7,
        conservatism: float | Sequence[float] = 5.0,
        num_actions: int = 10,
        largest_weight: float = 100.0,
        discount: float = 0.99,
        target_rate: float = 0.005,
        target_entropy: float = -0.5,
        lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        checks.one_of(base, "base", ("iql", "cql"))
        checks.positive(largest_weight, "largest_weight")
        checks.between(discount, "discount", 0, 1)
        checks.between(target_rate, "target_rate", 0, 1)
        if num_actions < 1:
            raise ValueError(f"num_actions must be at least 1, got {num_actions}")
        self.base, self.action_dim, self.num_actions = base, action_dim, num_actions
        # Of the balance model, of the family's policy in its step, and of the balance that the policy learns with;
        # on CQL also of the next state's balance and action, and of three sources of actions.
        extra = 1 + action_dim + 3 * num_actions * action_dim if base == "cql" else 0
        self.noise_width = 2 + action_dim + extra
        self.largest_log_weight, self.discount, self.target_rate = math.log(largest_weight), discount, target_rate
        self.target_entropy = target_entropy
        self.register_buffer("expectile", per_member(expectile, len(seeds), "expectile"))
        self.register_buffer("conservatism", per_member(conservatism, len(seeds), "conservatism"))
        checks.require(self.expectile < 1, lambda: f"expectile must lie below 1, got {self.expectile.tolist()}")
        self.register_buffer("online", torch.zeros((), dtype=torch.bool))
        self._online = False
        generators = member_generators(seeds)
        kind = GaussianActor if base == "iql" else SquashedActor
        self.actor: GaussianActor | SquashedActor = kind(
            observation_dim + ENCODING, action_dim, hidden=hidden, generators=generators
        )
        self.critic = TwinCritic(observation_dim, action_dim, hidden=hidden, generators=generators)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.balance = BalanceModel(
            observation_dim, low=balance[0], high=balance[1], hidden=hidden, generators=generators
        )
        self.log_temperature = nn.Parameter(torch.zeros(len(seeds)))
        self._optimizers = {
            "actor": adam(self.actor, lr),
            "critic": adam(self.critic, lr),
            "balance": adam(self.balance, lr),
            "temperature": torch.optim.Adam([self.log_temperature], lr=lr),
        }
        if base == "iql":
            self.state_value = StackedMLP((observation_dim, *hidden, 1), generators=generators)
            self._optimizers["value"] = adam(self.state_value, lr)
        else:
            self.log_entropy_weight = nn.Parameter(torch.zeros(len(seeds)))
            self._optimizers["entropy"] = torch.optim.Adam([self.log_entropy_weight], lr=lr)

    def go_online(self) -> None:
        """Let the policy learn, from now on, with the balance that the model picks rather than with every balance."""
        self._online = True
        self.online.fill_(True)

    def _noise(self, batch: Batch) -> tuple[Tensor, ...]:
        m = self.action_dim
        return batch.noise.split((1, m, 1, *((1, m, 3 * self.num_actions * m) if self.base == "cql" else ())), -1)

    def _with(self, observation: Tensor, balance: Tensor) -> Tensor:
        return torch.cat([observation, encode_balance(balance)], -1)

    def _drawn_balance(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Balances the policy learns with: any offline, the model's online; no gradient passes."""
        if not self._online:
            return self.balance.uniform(noise)
        with torch.no_grad():
            return self.balance.draw(observation, noise)[0]

    def balance_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what each balance model minimises, shape ``(S,)``, and the log densities of what it picked.

        The gradient reaches the model through the encoding, the policy and the critics, none of which move.
        """
        of_balance, of_policy = self._noise(batch)[:2]
        chosen, log_prob = self.balance.draw(batch.observation, of_balance)
        drawn = self.actor.draw(self._with(batch.observation, chosen), of_policy)
        action = drawn[0] if isinstance(drawn, tuple) else drawn
        critic = self.slow_critic if self.base == "iql" else self.critic
        value = critic.least(batch.observation, action)
        return (self.log_temperature.detach().exp()[:, None] * log_prob - value).mean(-1), log_prob.detach()

    def _advantage(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            value = self.slow_critic.least(batch.observation, batch.action)
        return value - self.state_value.head(batch.observation).squeeze(-1)

    def _actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        of_policy, of_balance = self._noise(batch)[1:3]
        chosen = self._drawn_balance(batch.observation, of_balance)
        input = self._with(batch.observation, chosen)
        if isinstance(self.actor, GaussianActor):
            with torch.no_grad():
                exponent = chosen.squeeze(-1) * self._advantage(batch)
                weight = exponent.clamp_max(self.largest_log_weight).exp()
            return -(weight * self.actor.log_prob(input, batch.action)).mean(-1), None
        action, log_prob = self.actor.draw(input, of_policy)
        value = self.critic.least(batch.observation, action)
        entropy_weight = self.log_entropy_weight.detach().exp().unsqueeze(-1)
        return (entropy_weight * log_prob - chosen.squeeze(-1) * value).mean(-1), log_prob.detach()

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each policy minimises on a batch, shape ``(S,)``."""
        return self._actor_loss(batch)[0]

    def critic_loss(self, batch: Batch) -> Tensor:
        """Return what each member's critics minimise on a batch, shape ``(S,)``."""
        with torch.no_grad():
            if isinstance(self.actor, GaussianActor):
                following = self.state_value.head(batch.next_observation).squeeze(-1)
            else:
                next_balance, next_action = self._noise(batch)[3:5]
                there = self._with(batch.next_observation, self._drawn_balance(batch.next_observation, next_balance))
                action, _ = self.actor.draw(there, next_action)
                following = self.slow_critic.least(batch.next_observation, action)
            target = batch.reward + self.discount * batch.continues * following
        error = (self.critic(batch.observation, batch.action) - target.unsqueeze(1)).square().mean(-1).sum(1)
        if isinstance(self.actor, GaussianActor):
            return error
        of_balance, rest = self._noise(batch)[2], self._noise(batch)[5]
        uniform, first, second = rest.unflatten(-1, (3 * self.num_actions, -1)).split(self.num_actions, -2)
        with torch.no_grad():
            here = self._with(batch.observation, self._drawn_balance(batch.observation, of_balance))
            drawn = [self.actor.draw(here, first), self.actor.draw(there, second)]
        excess = conservative_excess(self.critic, batch, uniform, drawn).sum(1)
        return error + self.conservatism * excess

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        losses: dict[str, Tensor] = {}
        if self.base == "iql":
            losses["value"] = expectile_loss(self._advantage(batch), self.expectile)
            descend(self._optimizers["value"], losses["value"])
        losses["balance"], log_prob = self.balance_loss(batch)
        descend(self._optimizers["balance"], losses["balance"])
        # The temperature falls while the entropy is above what is aimed at.
        gap = -log_prob.mean(-1) - self.target_entropy
        descend(self._optimizers["temperature"], self.log_temperature.exp() * gap)
        losses["actor"], action_log_prob = self._actor_loss(batch)
        descend(self._optimizers["actor"], losses["actor"])
        if action_log_prob is not None:
            gap = -action_log_prob.mean(-1) + self.action_dim
            descend(self._optimizers["entropy"], self.log_entropy_weight.exp() * gap)
        losses["critic"] = self.critic_loss(batch)
        descend(self._optimizers["critic"], losses["critic"])
        follow(list(self.slow_critic.parameters()), list(self.critic.parameters()), self.target_rate)
        return {name: loss.detach() for name, loss in losses.items()}

    def act(self, observation: Tensor) -> Tensor:
        """Return the picked member's mean actions, shapes ``(S, B, n)`` to ``(S, B, m)``, observations scaled."""
        return self.actor(self._with(observation, self.balance(observation)))

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the critics' first estimate of scaled observations and actions, shape ``(S, B)``."""
        return self.critic.first(observation, action)

    def network(self, member: int) -> BalancedNetwork:
        """Return a copy of one member's policy and balance model, before its tanh."""
        policy = self.actor.network.member(member, outputs=self.action_dim)
        return BalancedNetwork(policy, self.balance.network.member(member), self.balance.low, self.balance.high)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return dict(self._optimizers)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._online = bool(self.online)
