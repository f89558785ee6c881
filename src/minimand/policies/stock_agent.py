r"""A deep agent for the whole distribution of the return: quantiles of what is to come, given state and stock.

A network predicts N quantiles :math:`q_j(o, c, a)` of the return G, not of c + G, for each action. The agent takes

.. math:: \arg\max_a \frac{1}{N} \sum_j f(c + q_j(o, c, a)),

and learns by quantile regression on :math:`r + \gamma\, q^-_j(o', c', a^*)`, where :math:`c' = (c + r) / \gamma`,
:math:`a^*` is what the target network :math:`q^-` would take from there, and nothing is to come after an end.

The network and its sizes are not those of the paper, which reads pictures; they are reconstructed.

Source: Ávila Pires et al. 2025, arXiv 2501.13028: the agent :math:`D\eta N`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import checks
from .expected_utility import ExpectedUtility, check_discount
from .quantile_regression import quantile_huber_loss
from .return_law import ReturnLaw

_WEIGHTS, _SETTINGS = "agent.safetensors", "agent.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class StockTransitions:
    """Steps of episodes, a row each.

    Args:
        observation: ``(batch, *observation)``.
        stock: Before the step, ``(batch,)``.
        action: ``(batch,)``.
        reward: ``(batch,)``.
        next_observation: ``(batch, *observation)``.
        terminal: Whether nothing can follow, ``(batch,)``. A step at which an episode was only cut off is not terminal.
    """

    observation: Float[Tensor, "batch *observation"]
    stock: Float[Tensor, " batch"]
    action: Int[Tensor, " batch"]
    reward: Float[Tensor, " batch"]
    next_observation: Float[Tensor, "batch *observation"]
    terminal: Bool[Tensor, " batch"]


@dataclasses.dataclass(frozen=True)
class StockChoice:
    """The first stock that promises the best tail mean.

    Args:
        stock: To start from; never chosen anew within an episode.
        value: The tail mean that the network promises from there.
    """

    stock: float
    value: float


class StockQuantileNetwork(nn.Module):
    r"""Predict quantiles of the return from an observation and the stock: a perceptron of both.

    Args:
        num_features: Entries of an observation.
        num_actions: Actions.
        num_quantiles: N.
        hidden: Units of the hidden layers. Sizes and N are those of Moghimi's reimplementation.
        stock_scale: What stocks are divided by before the first layer: about how large they get.
        return_scale: What the last layer is multiplied by: about how large returns get.

    Raises:
        ValueError: If a size is below 1 or a scale is not positive.

    Example:
        >>> network = StockQuantileNetwork(3, 2, num_quantiles=8)
        >>> network(torch.zeros(5, 3), torch.zeros(5)).shape
        torch.Size([5, 2, 8])

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028; sizes from Moghimi 2026, arXiv 2602.04131.
    """

    def __init__(
        self,
        num_features: int,
        num_actions: int,
        *,
        num_quantiles: int = 50,
        hidden: Sequence[int] = (120, 84),
        stock_scale: float = 1.0,
        return_scale: float = 1.0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_features", num_features),
            ("num_actions", num_actions),
            ("num_quantiles", num_quantiles),
            *(("hidden", units) for units in hidden),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        checks.positive(stock_scale, "stock_scale")
        checks.positive(return_scale, "return_scale")
        self.settings = {
            "num_features": num_features,
            "num_actions": num_actions,
            "num_quantiles": num_quantiles,
            "hidden": list(hidden),
            "stock_scale": stock_scale,
            "return_scale": return_scale,
        }
        self.shape = (num_actions, num_quantiles)
        self.stock_scale, self.return_scale = stock_scale, return_scale
        sizes = [num_features + 1, *hidden]
        layers: list[nn.Module] = []
        for width, units in itertools.pairwise(sizes):
            layers += [nn.Linear(width, units), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(sizes[-1], num_actions * num_quantiles))

    def forward(
        self, observation: Float[Tensor, "batch *observation"], stock: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch actions quantiles"]:
        """Predict quantiles.

        Args:
            observation: Of any shape with ``num_features`` entries.
            stock: The stocks.

        Raises:
            ValueError: If an observation or stock is not finite, or of another size.
        """
        checks.finite(observation, "observation")
        checks.finite(stock, "stock")
        features = observation.flatten(1)
        if features.shape[1] != self.settings["num_features"]:
            raise ValueError(
                f"observation must have {self.settings['num_features']} entries, got {features.shape[1]} in "
                f"shape {tuple(observation.shape)}"
            )
        joined = torch.cat([features, (stock / self.stock_scale).to(features)[:, None]], dim=1)
        return self.return_scale * self.body(joined).unflatten(1, self.shape)


class StockAgent(nn.Module):
    r"""An agent that optimises an expected utility of the stock plus the return.

    Any loop can train it: ``loss`` on batches of transitions, an optimizer's step on ``network``, and now and then
    ``update_target``. :func:`~minimand.policies.train_stock_agent` is one.

    Args:
        network: ``(observation, stock) -> (batch, actions, quantiles)``, such as :class:`StockQuantileNetwork`.
        utility: The objective. It must be indifferent to the discount; see
            :class:`~minimand.policies.ExpectedUtility`.
        discount: :math:`\gamma`, in (0, 1]. Below 1 stocks grow as :math:`\gamma^{-t}`: episodes should not be much
            longer than :math:`1 / (1 - \gamma)` steps.
        kappa: Of :func:`~minimand.policies.quantile_huber_loss`, in units of the return.
        scale: How large totals get: up to there the utility is held to its conditions.

    Raises:
        ValueError: If the utility is one that a greedy step does not optimise under this discount, with the reason.

    Example:
        >>> network = StockQuantileNetwork(3, 2, num_quantiles=8)
        >>> agent = StockAgent(network, ExpectedUtility.lower_tail(), discount=0.9)
        >>> agent.act(torch.zeros(5, 3), torch.zeros(5)).shape
        torch.Size([5])
        >>> StockAgent(network, ExpectedUtility(torch.exp, name="exp"), discount=0.9)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: utility cannot be optimised: exp is not indifferent to the discount: ...

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028; Dabney et al. 2018, arXiv 1710.10044 for the regression.
    """

    def __init__(
        self,
        network: nn.Module,
        utility: ExpectedUtility,
        *,
        discount: float,
        kappa: float = 1.0,
        scale: float = 100.0,
    ) -> None:
        super().__init__()
        check_discount(discount)
        checks.non_negative(kappa, "kappa")
        if not isinstance(utility, ExpectedUtility):
            raise TypeError(
                "utility must be an ExpectedUtility: a greedy step on other objectives, such as a variance or a tail "
                f"mean taken as it is, need not improve them, got {type(utility).__name__}"
            )
        if (reason := utility.refusal(discount=discount, scale=scale)) is not None:
            raise ValueError(f"utility cannot be optimised: {reason}")
        self.network = network
        self.target_network = copy.deepcopy(network).requires_grad_(False)
        self.utility = utility
        self.discount = float(discount)
        self.kappa = float(kappa)
        self.scale = float(scale)

    def forward(
        self, observation: Float[Tensor, "batch *observation"], stock: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch actions quantiles"]:
        """Predict quantiles of the return after each action."""
        return self.network(observation, stock)

    @torch.no_grad()
    def act(
        self,
        observation: Float[Tensor, "*batch_observation"],
        stock: Float[Tensor, "*batch"] | float,
        *,
        epsilon: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "*batch"]:
        """Choose actions.

        Args:
            observation: One observation, or a batch of them.
            stock: One stock, or one for each observation.
            epsilon: The share of actions drawn at random.
            generator: Of these draws; on the CPU.

        Returns:
            The action, or one for each observation.
        """
        checks.between(epsilon, "epsilon", 0, 1)
        stock = torch.as_tensor(stock, dtype=observation.dtype, device=observation.device)
        single = stock.dim() == 0
        if single:
            observation, stock = observation[None], stock[None]
        quantiles = self.network(observation, stock)
        action = self._quality(quantiles, stock).argmax(1)
        if epsilon > 0:
            anew = torch.rand(len(action), generator=generator) < epsilon
            drawn = torch.randint(quantiles.shape[1], (len(action),), generator=generator)
            action = torch.where(anew.to(action.device), drawn.to(action), action)
        return action[0] if single else action

    def loss(self, batch: StockTransitions) -> Float[Tensor, ""]:
        """Compute the regression of the chosen actions' quantiles on what followed.

        Args:
            batch: Transitions.

        Raises:
            ValueError: If shapes do not fit or a number is not finite.
        """
        for name in ("stock", "reward"):
            checks.finite(getattr(batch, name), name)
        rows = torch.arange(len(batch.action), device=batch.action.device)
        with torch.no_grad():
            next_stock = (batch.stock + batch.reward) / self.discount
            following = self.target_network(batch.next_observation, next_stock)
            best = following[rows, self._quality(following, next_stock).argmax(1)]
            goes_on = self.discount * (~batch.terminal).to(best)
            wanted = batch.reward.to(best)[:, None] + goes_on[:, None] * best
        predicted = self.network(batch.observation, batch.stock)[rows, batch.action]
        return quantile_huber_loss(predicted, wanted, kappa=self.kappa)

    @torch.no_grad()
    def update_target(self, rate: float = 1.0) -> None:
        """Move the target network to the network, all the way or by a share of the difference.

        Args:
            rate: The share, in (0, 1].
        """
        checks.between(rate, "rate", 0, 1, low_open=True)
        for behind, ahead in zip(self.target_network.parameters(), self.network.parameters(), strict=True):
            behind.lerp_(ahead, rate)
        for kept, new in zip(self.target_network.buffers(), self.network.buffers(), strict=True):
            kept.copy_(new)

    @torch.no_grad()
    def return_law(
        self, observation: Float[Tensor, "*observation"], stock: float, *, action: int | None = None
    ) -> ReturnLaw:
        """Return the law of the return that the network predicts.

        Args:
            observation: One observation.
            stock: Its stock.
            action: The first action; None for the one that the agent takes.
        """
        c = torch.as_tensor(stock, dtype=observation.dtype, device=observation.device)[None]
        quantiles = self.network(observation[None], c)
        chosen = int(self._quality(quantiles, c).argmax(1)) if action is None else action
        atoms = quantiles[0, chosen].sort().values
        return ReturnLaw(atoms, torch.full_like(atoms, 1 / len(atoms)))

    @torch.no_grad()
    def best_first_stock(
        self, observation: Float[Tensor, "*observation"], candidates: Float[Tensor, " candidates"], *, tau: float
    ) -> StockChoice:
        r"""Choose the first stock for a tail mean, :math:`\arg\max_c -c + \frac{1}{\tau} E \min(c + G, 0)`.

        Only for a utility that is :meth:`ExpectedUtility.lower_tail`. The maximum is over values that the network
        predicts, each with an error of its own: the value found is promised rather than held.

        Args:
            observation: The first.
            candidates: First stocks, within the range trained for; minus the returns that may be the tail's border.
            tau: The share of the worst returns, in (0, 1].

        Raises:
            ValueError: If tau lies outside (0, 1], there is no candidate, or the utility is another.
        """
        checks.between(tau, "tau", 0, 1, low_open=True)
        checks.not_empty(candidates, "candidates")
        if self.utility.name != ExpectedUtility.lower_tail().name:
            raise ValueError(f"utility must be ExpectedUtility.lower_tail() for a tail mean, got {self.utility.name}")
        observations = observation.expand(len(candidates), *observation.shape)
        quality = self._quality(self.network(observations, candidates), candidates).amax(1)
        values = quality / tau - candidates
        best = int(values.argmax())
        return StockChoice(float(candidates[best]), float(values[best]))

    def save(self, folder: str | pathlib.Path) -> None:
        """Write weights and settings to a folder, as ``agent.safetensors`` and ``agent.json``.

        Of the utility only the name is kept: it is code, and none is ever read from a file.

        Args:
            folder: Made if it is not there.
        """
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in self.state_dict().items()}, path / _WEIGHTS
        )
        settings = {
            "format": _FORMAT,
            "utility": self.utility.name,
            "discount": self.discount,
            "kappa": self.kappa,
            "scale": self.scale,
            "network": self.network.settings if isinstance(self.network, StockQuantileNetwork) else None,
        }
        (path / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(
        cls, folder: str | pathlib.Path, utility: ExpectedUtility, *, network: nn.Module | None = None
    ) -> StockAgent:
        """Read an agent that was saved.

        Args:
            folder: Where it was saved.
            utility: The utility that it was trained for.
            network: A network of the same making; None if it was a :class:`StockQuantileNetwork`.

        Returns:
            The agent, on the CPU.

        Raises:
            FileNotFoundError: If there is no agent in the folder.
            ValueError: If it was saved in another format, for another utility, or with a network of the user's own
                that is not given or does not fit.
        """
        path = pathlib.Path(folder)
        settings = json.loads((path / _SETTINGS).read_text())
        if settings.get("format") != _FORMAT:
            raise ValueError(f"folder {path} holds an agent of format {settings.get('format')!r}, wanted {_FORMAT}")
        if settings["utility"] != utility.name:
            raise ValueError(f"utility must be the one trained for, {settings['utility']!r}, got {utility.name!r}")
        if network is None:
            if settings["network"] is None:
                raise ValueError("network must be given: the agent was saved with one of the user's own")
            network = StockQuantileNetwork(**settings["network"])
        agent = cls(network, utility, **{name: settings[name] for name in ("discount", "kappa", "scale")})
        try:
            agent.load_state_dict(safetensors.torch.load_file(path / _WEIGHTS))
        except RuntimeError as error:
            raise ValueError(f"network does not fit the weights in {path}: {error}") from error
        return agent

    def _quality(self, quantiles: Tensor, stock: Tensor) -> Tensor:
        return self.utility(stock.to(quantiles)[:, None, None] + quantiles).mean(-1)
