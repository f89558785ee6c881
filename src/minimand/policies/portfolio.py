r"""A portfolio policy trained by actor-critic learning for the Sharpe ratio of the whole holding period.

An image-like network reads the last prices and the weights held; its Gaussian action, through a softmax, is the new
portfolio. It trades episodes that start on random days, is rewarded by the average Sharpe ratio of their prefixes
(:func:`average_sharpe_rewards`), and learns by proximal policy optimisation.

Three things differ from the released code on purpose: an action is not clipped to [0, 1] before the softmax, which
would hold every weight near 1 / n; growth is :math:`y \cdot w`, not :math:`\exp(w \cdot \ln y)`; and the critic, not
the actor, also sees how the episode went so far, on which the reward depends. The network is one block of the VGG kind;
its widths are not published and are reconstructed.

Source: Huang, Zhou and Song 2024, arXiv 2412.18563; Schulman et al. 2017, arXiv 1707.06347.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..ppo import clipped_policy_loss, clipped_value_loss, generalized_advantages
from ..stopping import Budget, Stop
from .backtest import Strategy
from .price_history import PriceHistory
from .sharpe import average_sharpe_rewards
from .trading import TradingEnvironment, price_image

Rewards = Callable[[Tensor], Tensor]
PRICE_SCALE = 20.0  # a price's distance from the last close is some percent; this makes it some tenths


class PortfolioPolicy(nn.Module):
    r"""An actor and a critic that read the image of :func:`price_image`.

    Two 3 x 3 convolutions and a 2 x 2 pooling (one block of the VGG kind) and a hidden layer each. The action is
    Gaussian with the actor's mean and a deviation of its own a holding; weights are its softmax.

    Args:
        num_assets: Assets beside cash.
        num_channels: Prices a day of each asset: 1 for closes, 4 in the paper.
        window: Days in the image; 50 in the paper.
        width: Channels of the convolutions.
        hidden: Units of the hidden layers; 64 is the custom of the authors' framework.

    Example:
        >>> policy = PortfolioPolicy(3, window=5)
        >>> policy.act(torch.ones(2, 1, 6, 3)).shape
        torch.Size([2, 4])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563, the VGG-1 variant.
    """

    def __init__(
        self, num_assets: int, *, num_channels: int = 1, window: int = 50, width: int = 16, hidden: int = 64
    ) -> None:
        super().__init__()
        sizes = {
            "num_assets": num_assets,
            "num_channels": num_channels,
            "window": window,
            "width": width,
            "hidden": hidden,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.window = window
        self.shape = (num_channels, window + 1, num_assets)
        self.features = nn.Sequential(
            nn.Conv2d(num_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Flatten(),
        )
        size = width * -(-(window + 1) // 2) * -(-num_assets // 2)
        last = nn.Linear(hidden, num_assets + 1)
        self.actor = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), last)
        self.critic = nn.Sequential(nn.Linear(size + 3, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.log_deviation = nn.Parameter(torch.zeros(num_assets + 1))
        with torch.no_grad():  # near equal weights at first, as is the custom for the last layer of an actor
            last.weight.mul_(0.01)
            last.bias.zero_()

    def forward(
        self, image: Float[Tensor, "batch channels rows assets"], progress: Float[Tensor, "batch 3"]
    ) -> tuple[Float[Tensor, "batch holdings"], Float[Tensor, " batch"]]:
        """Compute the mean action and the value.

        Args:
            image: From :func:`price_image`.
            progress: From :class:`Observation`; only the critic sees it.
        """
        features = self._read(image)
        checks.finite(progress, "progress")
        return self.actor(features), self.critic(torch.cat([features, progress.to(features.dtype)], 1)).squeeze(1)

    def act(self, image: Float[Tensor, "batch channels rows assets"]) -> Float[Tensor, "batch holdings"]:
        """Return the weights of the mean action, cash first: what to trade to once training is over.

        Args:
            image: From :func:`price_image`.
        """
        return self.weights(self.actor(self._read(image)))

    def weights(self, action: Float[Tensor, "*batch holdings"]) -> Float[Tensor, "*batch holdings"]:
        """Turn actions into weights: their softmax.

        Args:
            action: Any real numbers, cash first.
        """
        return action.softmax(-1)

    def strategy(self) -> Strategy:
        """Return the policy as a strategy for :func:`walk_forward`."""
        dtype = self.log_deviation.dtype

        @torch.no_grad()
        def trade(past: PriceHistory, held: Tensor) -> Tensor:
            day = torch.tensor([len(past) - 1], device=held.device)
            weights = self.act(price_image(past.prices, day, held[None], window=self.window).to(dtype))
            return weights[0].to(held)

        return trade

    def _read(self, image: Tensor) -> Tensor:
        checks.floating(image, "image")
        if tuple(image.shape[1:]) != self.shape:
            raise ValueError(
                f"image must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(image.shape)}"
            )
        checks.finite(image, "image")
        return self.features(torch.cat([image[:, :, :1], PRICE_SCALE * (image[:, :, 1:] - 1)], 2))

    def extra_repr(self) -> str:
        """Show the shape of an image."""
        return f"image={self.shape}"


@dataclasses.dataclass(frozen=True)
class PortfolioTraining:
    """How a training of a portfolio policy went.

    Args:
        rewards: Mean reward of the episodes of each iteration: with the default, the average Sharpe ratio.
        iterations: How many there were.
        status: Why they ended: converged where the reward is above 0 and flat, stalled where it is flat but not.
    """

    rewards: tuple[float, ...]
    iterations: int
    status: Stop


def train_portfolio(
    policy: PortfolioPolicy,
    history: PriceHistory,
    *,
    reward: Rewards = average_sharpe_rewards,
    horizon: int = 128,
    cost: float = 0.0025,
    num_episodes: int = 16,
    lr: float = 3e-4,
    gamma: float = 0.99,
    lam: float = 0.95,
    clip: float = 0.2,
    value_weight: float = 0.5,
    max_norm: float = 0.5,
    epochs: int = 10,
    batch_size: int = 256,
    tolerance: float = 0.01,
    patience: int = 50,
    max_iter: int = 4400,
    max_seconds: float | None = None,
    generator: torch.Generator | None = None,
) -> PortfolioTraining:
    """Train a policy in place by proximal policy optimisation on episodes that start on random days.

    Defaults are the paper's, which are those of its framework: 2,048 steps an iteration, 9 million in all.

    Args:
        policy: The policy; the history is brought to its dtype.
        history: Prices to train on, and nothing later.
        reward: ``log_returns (episodes, steps) -> rewards`` of the same shape.
        horizon: Days an episode.
        cost: kappa in [0, 1).
        num_episodes: Episodes an iteration.
        lr: Of Adam.
        gamma: Discount in [0, 1].
        lam: lambda of the generalised advantages, in [0, 1].
        clip: Of the policy's ratio, above 0.
        value_weight: Of the critic's loss.
        max_norm: Gradients are clipped to this norm.
        epochs: Passes over an iteration's steps.
        batch_size: Steps a gradient.
        tolerance: Training ends when the mean reward of the last ``patience`` iterations is not more than this above
            that of the ``patience`` before.
        patience: See there.
        max_iter: Most iterations.
        max_seconds: Most seconds; None for no limit.
        generator: Draws starts, actions and batches; torch's default if None.

    Returns:
        The rewards, and why training ended.

    Raises:
        ValueError: If a setting is out of range, the history is too short, or its assets do not fit the policy.

    Example:
        >>> history = PriceHistory(torch.linspace(1, 2, 30)[:, None].expand(30, 2))
        >>> policy = PortfolioPolicy(2, window=5)
        >>> train_portfolio(policy, history, horizon=4, max_iter=2).status
        <Stop.ITERATION_LIMIT: 'iteration limit'>

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563; Schulman et al. 2017, arXiv 1707.06347.
    """
    for value, name in ((lr, "lr"), (max_norm, "max_norm"), (clip, "clip")):
        checks.positive(value, name)
    for value, name in ((tolerance, "tolerance"), (value_weight, "value_weight")):
        checks.non_negative(value, name)
    for count, name in ((epochs, "epochs"), (batch_size, "batch_size"), (patience, "patience")):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    budget = Budget(max_iter, max_seconds)
    prices = history.prices.to(policy.log_deviation)
    if (prices.shape[2], prices.shape[1]) != (policy.shape[0], policy.shape[2]):
        raise ValueError(
            f"history must have {policy.shape[2]} assets and {policy.shape[0]} channels as the policy does, "
            f"got {prices.shape[1]} and {prices.shape[2]}"
        )
    environment = TradingEnvironment(
        PriceHistory(prices),
        window=policy.window,
        horizon=horizon,
        cost=cost,
        num_episodes=num_episodes,
        generator=generator,
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5)
    means: list[float] = []
    status = budget.spent(0)
    while status is None:
        steps, log_returns = _episodes(policy, environment, generator)
        rewards = reward(log_returns)
        if rewards.shape != log_returns.shape:
            raise ValueError(f"reward must return shape {tuple(log_returns.shape)}, got {tuple(rewards.shape)}")
        values = steps["values"]
        advantages = generalized_advantages(rewards, values, gamma=gamma, lam=lam)
        steps |= {"targets": advantages + values, "advantages": advantages}
        rows = {name: value.flatten(0, 1) for name, value in steps.items()}
        for _ in range(epochs):
            for index in _shuffled(rewards.numel(), generator, rewards.device).split(batch_size):
                loss = _loss(policy, {name: value[index] for name, value in rows.items()}, clip, value_weight)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
                optimizer.step()
        means.append(float(rewards.sum(1).mean()))
        status = _flat(means, patience, tolerance) or budget.spent(len(means))
    return PortfolioTraining(tuple(means), len(means), status)


@torch.no_grad()
def _episodes(
    policy: PortfolioPolicy, environment: TradingEnvironment, generator: torch.Generator | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Trade a batch of episodes with sampled actions; all is ``(episodes, steps, ...)``."""
    observation, done = environment.reset(), False
    log_returns, taken = [], []
    while not done:
        mean, value = policy(observation.image, observation.progress)
        where = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=where, dtype=mean.dtype).to(mean.device)
        action = mean + policy.log_deviation.exp() * noise
        taken.append((*observation, action, _log_density(policy, mean, action), value))
        observation, log_return, done = environment.step(policy.weights(action))
        log_returns.append(log_return)
    names = ("image", "progress", "action", "logp", "values")
    steps = {name: torch.stack(column, 1) for name, column in zip(names, zip(*taken, strict=True), strict=True)}
    return steps, torch.stack(log_returns, 1)


def _log_density(policy: PortfolioPolicy, mean: Tensor, action: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, policy.log_deviation.exp()).log_prob(action).sum(-1)


def _loss(policy: PortfolioPolicy, rows: dict[str, Tensor], clip: float, value_weight: float) -> Tensor:
    mean, value = policy(rows["image"], rows["progress"])
    advantages = rows["advantages"]
    # One row has no deviation to be divided by.
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    acted = clipped_policy_loss(_log_density(policy, mean, rows["action"]), rows["logp"], advantages, clip=clip)
    valued = clipped_value_loss(value, rows["values"], rows["targets"], clip=None)
    return acted.mean() + 2 * value_weight * valued.mean()  # the framework's squared error has no half


def _shuffled(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    where = device if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=where).to(device)


def _flat(means: list[float], patience: int, tolerance: float) -> Stop | None:
    if len(means) < 2 * patience:
        return None
    late, early = sum(means[-patience:]) / patience, sum(means[-2 * patience : -patience]) / patience
    if late - early > tolerance:
        return None
    return Stop.CONVERGED if late > 0 else Stop.STALLED
