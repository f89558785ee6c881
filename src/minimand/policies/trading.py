r"""A market to act in: given prices, holdings that drift with them, and every trade paid for.

A portfolio is a row of weights, cash first, that add up to 1. Weights set at the close of day t earn the relatives
:math:`y_{t+1}` (closing price over the last; 1 for cash) of the day after, so what is known and what is earned never
overlap. Between trades weights drift to :math:`w'_{t+1} = y_{t+1} w_t / (y_{t+1} \cdot w_t)`.

**What a trade costs.** To come from drifted weights :math:`w'` to :math:`w` at a proportional cost :math:`\kappa` of
everything bought or sold, a fraction :math:`\mu` of the wealth is left. What is left is what is dealt out, so

.. math:: 1 - \mu = \kappa \sum_{i \ge 1} |w'_i - \mu w_i|,

whose one root is found exactly: the right-hand side is piecewise linear. The paper charges
:math:`1 - \mu = \kappa \sum_i |w'_i - w_i|`, as if the cost itself needed no trade; ``exact=False`` does so.

Source: Huang, Zhou and Song 2024, arXiv 2412.18563 (environment); Gyorfi and Vajda 2008 (self-financing costs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from .price_history import PriceHistory
from .sharpe import AverageSharpeReward

ON_THE_SIMPLEX = 1e-4  # how far the sum of weights may be from 1: float32 softmax over hundreds of assets is within


def wealth_after_trade(
    held: Float[Tensor, "*batch holdings"],
    target: Float[Tensor, "*batch holdings"],
    *,
    cost: float = 0.0025,
    exact: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Compute the fraction :math:`\mu` of wealth left after a trade from ``held`` to ``target``.

    With :math:`b_i = w'_i / w_i`, asset i is bought where :math:`b_i < \mu` and sold where :math:`b_i > \mu`. Sorted by
    :math:`b`, the set that is bought is a prefix, found by the sign of :math:`1 - \mu - \kappa \sum_i |w'_i - \mu w_i|`
    at each :math:`\mu = b_i`; on it the equation is linear. Differentiable wherever something of everything is traded.

    Args:
        held: :math:`w'`, weights before the trade, cash first.
        target: :math:`w`, weights after it.
        cost: :math:`\kappa` in [0, 1), of the value bought or sold of everything but cash; 0.0025 is the paper's.
        exact: Solve for :math:`\mu`; otherwise charge :math:`\kappa \sum_i |w'_i - w_i|`, the paper's way.

    Returns:
        :math:`\mu`, from 0 to 1.

    Raises:
        TypeError: If weights are no floating-point tensors.
        ValueError: If weights are off the simplex by more than 1e-4, shapes differ, or ``cost`` is out of range.

    Example:
        >>> wealth_after_trade(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), cost=0.25)
        tensor(0.8000)

    Source:
        Gyorfi and Vajda 2008, section 2; Huang, Zhou and Song 2024, arXiv 2412.18563 (first order).
    """
    _check_cost(cost)
    check_weights(held, "held")
    check_weights(target, "target")
    if held.shape != target.shape:
        raise ValueError(f"target must have the shape of held, {tuple(held.shape)}, got {tuple(target.shape)}")
    return _left(held, target, cost, exact)


def drift(
    weights: Float[Tensor, "*batch holdings"], relatives: Float[Tensor, "*batch holdings"]
) -> Float[Tensor, "*batch holdings"]:
    r"""Compute what weights become when prices move, :math:`y w / (y \cdot w)`.

    Args:
        weights: Weights, cash first.
        relatives: y, price over last price of each holding, above 0; 1 for cash.

    Returns:
        Weights, which add up to 1.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If weights are off the simplex, shapes differ, or a relative is not finite and above 0.

    Example:
        >>> drift(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563.
    """
    check_weights(weights, "weights")
    _check_relatives(relatives, weights)
    return _drift(weights, relatives)


def portfolio_log_returns(
    weights: Float[Tensor, "*batch days holdings"],
    relatives: Float[Tensor, "*batch days holdings"],
    *,
    cost: float = 0.0025,
    initial: Float[Tensor, "*batch holdings"] | None = None,
    exact: bool = True,
) -> Float[Tensor, "*batch days"]:
    r"""Compute what portfolios that trade daily earn after costs: :math:`\ln \mu_t + \ln(y_{t+1} \cdot w_t)`.

    All days at once: what a day's trade starts from is known from the weights and prices of the day before. The return
    of a day is that of its own decision, first its cost and then its growth; the paper books the growth one step later.
    Differentiable in the weights: prices do not move with what is traded.

    Args:
        weights: :math:`w_t`, set before :math:`y_{t+1}` is earned, cash first.
        relatives: :math:`y_{t+1}`, price over last price of each holding, above 0; 1 for cash.
        cost: :math:`\kappa` in [0, 1).
        initial: Weights before the first trade; all cash if None.
        exact: As for :func:`wealth_after_trade`.

    Returns:
        One log-return a day.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If weights are off the simplex, shapes differ, or a relative is not finite and above 0.

    Example:
        >>> weights, relatives = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[1.0, 3.0], [1.0, 1.0]])
        >>> portfolio_log_returns(weights, relatives, cost=0.0).exp()
        tensor([2., 1.])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563; Gyorfi and Vajda 2008.
    """
    _check_cost(cost)
    check_weights(weights, "weights")
    _check_relatives(relatives, weights)
    if initial is None:
        initial = all_cash(weights[..., 0, :])
    else:
        check_weights(initial, "initial")
        if initial.shape != weights.shape[:-2] + weights.shape[-1:]:
            raise ValueError(f"initial must have the shape of a day's weights, got {tuple(initial.shape)}")
    held = torch.cat([initial[..., None, :], _drift(weights, relatives)[..., :-1, :]], -2)
    return _left(held, weights, cost, exact).log() + (weights * relatives).sum(-1).log()


class Observation(NamedTuple):
    """What is seen at the close of a day.

    Args:
        image: ``(batch, channels, window + 1, assets)``: the prices of the last days over the asset's last close, and
            on top a row of the weights held, repeated over channels. Nothing later than the close is in it.
        progress: ``(batch, 3)``: fraction of the episode that is over, and annualised mean and deviation of its
            log-returns. A running Sharpe ratio depends on them, so a critic needs them; an actor does not.
    """

    image: Float[Tensor, "batch channels rows assets"]
    progress: Float[Tensor, "batch 3"]


class Step(NamedTuple):
    """What a day of trading brought.

    Args:
        observation: At the next close.
        log_return: ``(batch,)``, cost paid.
        done: Whether the episodes, which all have the same length, are over.
    """

    observation: Observation
    log_return: Float[Tensor, " batch"]
    done: bool


class TradingEnvironment:
    """Episodes from random windows of a price history, a batch at once.

    ::

        observation = environment.reset()
        done = False
        while not done:
            observation, log_return, done = environment.step(policy.act(observation.image))

    Args:
        history: Prices; the channels are what the image shows, the first is the close, which is traded at.
        window: Days that are seen, 50 in the paper.
        horizon: Days an episode, 128 in the paper.
        cost: kappa in [0, 1); 0.0025 is the paper's.
        num_episodes: Episodes at once.
        exact: As for :func:`wealth_after_trade`.
        generator: Draws where episodes start, uniformly; torch's default if None.

    Attributes:
        held: ``(num_episodes, assets + 1)``: weights before the next trade, all cash at the start.

    Raises:
        ValueError: If a setting is out of range or the history is shorter than a window and an episode.

    Example:
        >>> history = PriceHistory(torch.linspace(1, 2, 20)[:, None].expand(20, 2))
        >>> environment = TradingEnvironment(history, window=5, horizon=3, num_episodes=4)
        >>> environment.reset().image.shape
        torch.Size([4, 1, 6, 2])
        >>> environment.step(torch.full((4, 3), 1 / 3)).log_return.shape
        torch.Size([4])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563, the environment and the random sampling of windows.
    """

    def __init__(
        self,
        history: PriceHistory,
        *,
        window: int = 50,
        horizon: int = 128,
        cost: float = 0.0025,
        num_episodes: int = 64,
        exact: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        for value, name in ((window, "window"), (horizon, "horizon"), (num_episodes, "num_episodes")):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _check_cost(cost)
        if window + horizon > len(history):
            raise ValueError(
                f"history must have at least window + horizon = {window + horizon} days, it has {len(history)}"
            )
        self.history = history
        self.window = window
        self.horizon = horizon
        self.cost = cost
        self.num_episodes = num_episodes
        self.exact = exact
        self.generator = generator
        self._relatives = history.relatives()
        self._windows = _windows(history.prices, window)
        self._moments = AverageSharpeReward(horizon)
        self._day: Int[Tensor, " batch"] | None = None
        self._steps = 0

    def reset(self, start: Int[Tensor, " batch"] | None = None) -> Observation:
        """Begin new episodes, all in cash.

        Args:
            start: Day, counted from 0, at whose close each episode begins, at least ``window - 1``; drawn if None.

        Raises:
            ValueError: If an episode would begin before a window is full or run beyond the history.
        """
        prices = self.history.prices
        first, last = self.window - 1, len(self.history) - 1 - self.horizon
        if start is None:
            device = prices.device if self.generator is None else self.generator.device
            drawn = torch.randint(first, last + 1, (self.num_episodes,), generator=self.generator, device=device)
            start = drawn.to(prices.device)
        elif start.shape != (self.num_episodes,):
            raise ValueError(f"start must have shape ({self.num_episodes},), got {tuple(start.shape)}")
        checks.require((start >= first) & (start <= last), lambda: f"start must lie in [{first}, {last}]")
        self._day = start
        self._steps = 0
        self._moments.reset()
        self.held = all_cash(prices.new_zeros(self.num_episodes, prices.shape[1] + 1))
        return self._observe()

    def step(self, weights: Float[Tensor, "batch holdings"]) -> Step:
        """Trade to weights at the close, pay, and live through the next day.

        Args:
            weights: Cash first, one row an episode.

        Raises:
            RuntimeError: If no episode is under way.
            ValueError: If weights are off the simplex or of the wrong shape.
        """
        if self._day is None or self._steps == self.horizon:
            raise RuntimeError("no episode is under way: call reset() first")
        check_weights(weights, "weights")
        if weights.shape != self.held.shape:
            raise ValueError(f"weights must have shape {tuple(self.held.shape)}, got {tuple(weights.shape)}")
        relatives = self._relatives[self._day]
        growth = (weights * relatives).sum(-1)
        log_return = _left(self.held, weights, self.cost, self.exact).log() + growth.log()
        self.held = _drift(weights, relatives)
        self._day = self._day + 1
        self._steps += 1
        self._moments.step(log_return)
        return Step(self._observe(), log_return, self._steps == self.horizon)

    def _observe(self) -> Observation:
        assert self._day is not None
        image = _image(self._windows, self._day, self.held)
        progress = self.held.new_zeros(len(self.held), 3)
        if self._moments.state is not None:
            annualize = self._moments.annualize
            scale = progress.new_tensor([1 / self.horizon, annualize, annualize**0.5])
            progress = self._moments.state * scale
        return Observation(image, progress)


def price_image(
    prices: Float[Tensor, "days assets channels"],
    day: Int[Tensor, " batch"],
    held: Float[Tensor, "batch holdings"],
    *,
    window: int = 50,
) -> Float[Tensor, "batch channels rows assets"]:
    """Draw the image that a policy sees at the close of a day: past prices over the last close, weights on top.

    Args:
        prices: Above 0, the close in the first channel.
        day: Days, counted from 0, at least ``window - 1``. Later prices are not looked at.
        held: Weights held, cash first.
        window: Days that are seen.

    Returns:
        ``window + 1`` rows: the weights of the assets, then days from the earliest to ``day``.

    Raises:
        TypeError: If prices or weights are no floating-point tensors.
        ValueError: If there are too few days before one of ``day``, or weights are off the simplex.

    Example:
        >>> prices = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
        >>> price_image(prices, torch.tensor([2]), torch.tensor([[0.7, 0.3]]), window=2)
        tensor([[[[0.3000],
                  [0.5000],
                  [1.0000]]]])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563, the state.
    """
    checks.floating(prices, "prices")
    check_weights(held, "held")
    checks.require((day >= window - 1) & (day < len(prices)), lambda: f"day must lie in [{window - 1}, {len(prices)})")
    first = int(day.min()) + 1 - window
    image = _image(_windows(prices[first : int(day.max()) + 1], window), day - first, held)
    checks.finite(image.detach(), "prices")
    return image


def check_weights(weights: Tensor, name: str) -> None:
    """Raise unless the rows of ``weights`` are on the simplex, to 1e-4."""
    checks.floating(weights, name)
    if weights.dim() == 0 or weights.shape[-1] < 2:
        raise ValueError(f"{name} must hold cash and at least one asset, got shape {tuple(weights.shape)}")
    weights = weights.detach()
    checks.finite(weights, name)
    checks.require(
        (weights.amin(-1) >= -ON_THE_SIMPLEX) & ((weights.sum(-1) - 1).abs() <= ON_THE_SIMPLEX),
        lambda: f"{name} must be at least 0 and add up to 1 along the last dimension",
    )


def all_cash(like: Float[Tensor, "*batch holdings"]) -> Float[Tensor, "*batch holdings"]:
    """Return weights of the shape of ``like`` that are all in cash."""
    weights = torch.zeros_like(like)
    weights[..., 0] = 1
    return weights


def _windows(prices: Tensor, window: int) -> Tensor:
    """Lay every window out as the rows of an image, of which the first, a day too early, is for the weights.

    A view of the prices, channels first: windows that overlap share their memory, and each is one run of it.
    """
    days, assets, channels = prices.shape
    rows = torch.cat([prices[:1], prices]).permute(2, 0, 1).contiguous()
    shape = (days - window + 1, channels, window + 1, assets)
    return rows.as_strided(shape, (assets, (days + 1) * assets, assets, 1))


def _image(windows: Tensor, day: Tensor, held: Tensor) -> Tensor:
    rows = windows.shape[2]
    image = windows.flatten(2).index_select(0, day + 2 - rows).unflatten(2, (rows, -1))
    image = image.div_(image[:, :1, -1:].clone())
    image[:, :, 0] = held[:, None, 1:]
    return image


def _left(held: Tensor, target: Tensor, cost: float, exact: bool) -> Tensor:
    before, after = held[..., 1:], target[..., 1:]
    if not exact:
        return 1 - cost * (before - after).abs().sum(-1)
    # At or above 1 an asset is sold whatever is left, so 2 stands for all that, infinity included.
    wanted = after > 0
    turning = torch.where(wanted, before / torch.where(wanted, after, 1.0), 2.0).detach().clamp_max(2.0)
    turning, order = turning.sort(-1)
    before, after = before.gather(-1, order), after.gather(-1, order)
    old, new = before.detach(), after.detach()
    # sum_i |w'_i - mu w_i| at mu = b_k: those up to k are bought, the others sold.
    traded = (old.sum(-1, keepdim=True) - 2 * old.cumsum(-1)) - turning * (
        new.sum(-1, keepdim=True) - 2 * new.cumsum(-1)
    )
    sign = torch.where(1 - turning - cost * traded > 0, -1.0, 1.0).to(before)
    return (1 - cost * (sign * before).sum(-1)) / (1 - cost * (sign * after).sum(-1))


def _drift(weights: Tensor, relatives: Tensor) -> Tensor:
    grown = weights * relatives
    return grown / grown.sum(-1, keepdim=True)


def _check_cost(cost: float) -> None:
    checks.between(cost, "cost", 0.0, 1.0, high_open=True)


def _check_relatives(relatives: Tensor, weights: Tensor) -> None:
    checks.floating(relatives, "relatives")
    if relatives.shape != weights.shape:
        raise ValueError(
            f"relatives must have the shape of weights, {tuple(weights.shape)}, got {tuple(relatives.shape)}"
        )
    checks.finite(relatives, "relatives")
    checks.require(relatives > 0, lambda: "relatives must be above 0")
