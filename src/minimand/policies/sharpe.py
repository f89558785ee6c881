r"""The Sharpe ratio as an objective: of a whole period, step by step, and its companions among the figures of merit.

All functions take log-returns :math:`R_1, \dots, R_T`, time along the last dimension, and are differentiable.

The Sharpe ratio of a holding period comes once, at its end. Its average over the prefixes of the period,

.. math:: \frac1T \sum_{t=1}^T SR_t, \qquad SR_t = \sqrt{A}\, \frac{\mathrm{mean}(R_1..R_t)}{\mathrm{std}(R_1..R_t)},

falls apart into rewards :math:`r_t = SR_t / T`, which an actor-critic can take. :math:`SR_1` has no deviation and
:math:`SR_2` depends on two numbers only, so a warmup without reward is offered.

Source: Huang, Zhou and Song 2024, arXiv 2412.18563 (average Sharpe reward); Moody and Saffell, "Learning to trade via
direct reinforcement", 2001 (differential Sharpe ratio); Sortino and van der Meer 1991; Magdon-Ismail et al. 2004.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, reduce


def sharpe_ratio(
    log_returns: Float[Tensor, "*batch steps"], *, annualize: float = 252.0, epsilon: float = 0.0
) -> Float[Tensor, "*batch"]:
    r"""Compute the annualised Sharpe ratio of each period.

    :math:`\sqrt{A}\, m / (s + \epsilon)` with :math:`s` in its population form. Its gradient, at :math:`\epsilon = 0`,
    is :math:`\sqrt{A} / (T s) \cdot (1 - (R_i - m) m / s^2)`.

    Args:
        log_returns: :math:`R_t`, time along the last dimension.
        annualize: A, steps a year: 252 trading days.
        epsilon: :math:`\epsilon`, at least 0; where it is 0, a period of constant returns has no Sharpe ratio.

    Returns:
        One ratio a period.

    Raises:
        TypeError: If ``log_returns`` is no floating-point tensor.
        ValueError: If it is empty or not finite, a setting is out of range, or returns are constant and epsilon is 0.

    Example:
        >>> sharpe_ratio(torch.tensor([0.01, 0.03]), annualize=1.0)
        tensor(2.)

    Source:
        Sharpe 1966; Huang, Zhou and Song 2024, arXiv 2412.18563.
    """
    _check(log_returns, annualize, epsilon)
    mean = log_returns.mean(-1)
    deviation = _root((log_returns - mean[..., None]).square().mean(-1))
    if epsilon == 0:
        checks.require(
            deviation > 0, lambda: "log_returns must vary in every period, or epsilon must be above 0: no Sharpe ratio"
        )
    return math.sqrt(annualize) * mean / (deviation + epsilon)


def prefix_sharpe_ratios(
    log_returns: Float[Tensor, "*batch steps"], *, annualize: float = 252.0, epsilon: float = 1e-4
) -> Float[Tensor, "*batch steps"]:
    r"""Compute the Sharpe ratio of every prefix of each period, :math:`SR_1, \dots, SR_T`.

    The squared deviations add up as :math:`M_t = M_{t-1} + \frac{t-1}{t} (R_t - m_{t-1})^2` (Welford), a cumulative
    sum without cancellation.

    Args:
        log_returns: :math:`R_t`, time along the last dimension.
        annualize: A, steps a year.
        epsilon: Added to the deviation; above 0, as the first prefix has none. The authors' code has 1e-7, with which
            the first step's reward outweighs all others; 1e-4 is a hundredth of a common daily deviation.

    Returns:
        One ratio a prefix.

    Raises:
        TypeError: If ``log_returns`` is no floating-point tensor.
        ValueError: If it is empty or not finite, or a setting is out of range.

    Example:
        >>> prefix_sharpe_ratios(torch.tensor([0.0, 0.01, 0.03]), annualize=1.0, epsilon=1e-9)
        tensor([0.0000, 1.0000, 1.0690])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563; Welford 1962.
    """
    checks.positive(epsilon, "epsilon")
    _check(log_returns, annualize, epsilon)
    steps = log_returns.shape[-1]
    count = torch.arange(1, steps + 1, device=log_returns.device, dtype=log_returns.dtype)
    mean = log_returns.cumsum(-1) / count
    earlier = torch.cat([torch.zeros_like(mean[..., :1]), mean[..., :-1]], -1)
    squares = ((count - 1) / count * (log_returns - earlier).square()).cumsum(-1)
    return math.sqrt(annualize) * mean / (_root(squares / count) + epsilon)


def average_sharpe_rewards(
    log_returns: Float[Tensor, "*batch steps"], *, annualize: float = 252.0, warmup: int = 0, epsilon: float = 1e-4
) -> Float[Tensor, "*batch steps"]:
    r"""Compute the rewards :math:`r_t = SR_t / T`, which add up to the average Sharpe ratio over the prefixes.

    Args:
        log_returns: :math:`R_t` of whole episodes, time along the last dimension.
        annualize: A, steps a year.
        warmup: So many first steps have reward 0; the paper has none.
        epsilon: Added to the deviation, above 0.

    Returns:
        One reward a step.

    Raises:
        TypeError: If ``log_returns`` is no floating-point tensor.
        ValueError: If it is empty or not finite, or a setting is out of range.

    Example:
        >>> average_sharpe_rewards(torch.tensor([0.0, 0.01, 0.03]), annualize=1.0, warmup=1)
        tensor([0.0000, 0.3268, 0.3535])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563.
    """
    ratios = prefix_sharpe_ratios(log_returns, annualize=annualize, epsilon=epsilon)
    _check_warmup(warmup, ratios.shape[-1])
    rewards = ratios / ratios.shape[-1]
    return torch.cat([torch.zeros_like(rewards[..., :warmup]), rewards[..., warmup:]], -1)


def differential_sharpe_rewards(
    log_returns: Float[Tensor, "*batch steps"], *, rate: float = 0.04, initial_deviation: float = 0.01
) -> Float[Tensor, "*batch steps"]:
    r"""Compute the differential Sharpe ratio: how each return moves a Sharpe ratio of exponential averages.

    With averages :math:`A` of the returns and :math:`B` of their squares,
    :math:`D_t = (B\,\Delta A - \tfrac12 A\,\Delta B) / (B - A^2)^{3/2}`, where :math:`\Delta A = R_t - A` and
    :math:`\Delta B = R_t^2 - B`; then :math:`A` and :math:`B` move by :math:`\eta` of their :math:`\Delta`. To first
    order in :math:`\eta`, :math:`\eta D_t` is the change of :math:`A / \sqrt{B - A^2}`.

    Args:
        log_returns: :math:`R_t`, time along the last dimension.
        rate: :math:`\eta` in (0, 1).
        initial_deviation: The averages start as those of returns of mean 0 and this deviation: 1 % a day.

    Returns:
        One reward a step, not annualised.

    Raises:
        TypeError: If ``log_returns`` is no floating-point tensor.
        ValueError: If it is empty or not finite, or a setting is out of range.

    Example:
        >>> differential_sharpe_rewards(torch.tensor([0.01, -0.01]), initial_deviation=0.01)
        tensor([ 1.0000, -1.0425])

    Source:
        Moody and Saffell 2001, equations 16 to 19.
    """
    checks.between(rate, "rate", 0.0, 1.0, low_open=True, high_open=True)
    checks.positive(initial_deviation, "initial_deviation")
    _check(log_returns, 1.0, 0.0)
    first = torch.zeros_like(log_returns[..., 0])
    # The variance itself is carried on, V <- (1 - rate) (V + rate (R - A)^2): B - A^2 would cancel.
    variance = torch.full_like(first, initial_deviation**2)
    rewards = []
    for value in log_returns.unbind(-1):
        change = value - first
        square = variance + first.square()
        rewards.append((square * change - first * (value.square() - square) / 2) / variance.pow(1.5))
        variance = (1 - rate) * (variance + rate * change.square())
        first = first + rate * change
    return torch.stack(rewards, -1)


class AverageSharpeReward:
    r"""The rewards of :func:`average_sharpe_rewards` one step at a time, for environments that reward as they go.

    Args:
        horizon: T, steps an episode.
        annualize: A, steps a year.
        warmup: So many first steps have reward 0.
        epsilon: Added to the deviation, above 0.

    Attributes:
        state: ``(batch, 3)``: steps so far, mean and deviation of the returns so far. The reward depends on them, so a
            critic that is to foretell it should see them. None before the first step.

    Example:
        >>> reward = AverageSharpeReward(2, annualize=1.0)
        >>> reward.step(torch.tensor([0.01])), reward.step(torch.tensor([0.03]))
        (tensor([50.]), tensor([0.9901]))

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563; Welford 1962.
    """

    def __init__(self, horizon: int, *, annualize: float = 252.0, warmup: int = 0, epsilon: float = 1e-4) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        checks.positive(annualize, "annualize")
        checks.positive(epsilon, "epsilon")
        _check_warmup(warmup, horizon)
        self.horizon = horizon
        self.annualize = annualize
        self.warmup = warmup
        self.epsilon = epsilon
        self.state: Tensor | None = None

    def reset(self) -> None:
        """Begin new episodes."""
        self.state = None

    def step(self, log_return: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Take in the returns of one step of every episode and give its rewards.

        Args:
            log_return: :math:`R_t`, one an episode.

        Raises:
            ValueError: If the number of episodes changed, the horizon is past, or a return is not finite.
        """
        checks.floating(log_return, "log_return")
        checks.finite(log_return, "log_return")
        state = self.state if self.state is not None else log_return.new_zeros((*log_return.shape, 3))
        if state.shape[:-1] != log_return.shape:
            raise ValueError(f"log_return must have shape {tuple(state.shape[:-1])}, got {tuple(log_return.shape)}")
        count, mean, deviation = state.unbind(-1)
        checks.require(count < self.horizon, lambda: f"the horizon of {self.horizon} steps must not be passed: reset()")
        count, before = count + 1, count
        change = log_return - mean
        mean = mean + change / count
        deviation = _root(before / count * (deviation.square() + change.square() / count))
        self.state = torch.stack([count, mean, deviation], -1)
        reward = math.sqrt(self.annualize) * mean / (deviation + self.epsilon) / self.horizon
        return torch.where(before < self.warmup, torch.zeros_like(reward), reward)


class SharpeLoss(nn.Module):
    r"""The Sharpe ratio with its sign turned, to be minimised where the market is differentiable.

    Prices that are history do not move with what is traded, so :func:`portfolio_log_returns` has exact gradients and
    a policy may simply descend this loss.

    Args:
        annualize: A, steps a year.
        epsilon: Added to the deviation, at least 0.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk, over periods.

    Example:
        >>> SharpeLoss(annualize=1.0)(torch.tensor([[0.01, 0.03], [0.01, 0.01]]))
        tensor(-50.9901)

    Source:
        Moody and Saffell 2001; Huang, Zhou and Song 2024, arXiv 2412.18563.
    """

    def __init__(self, *, annualize: float = 252.0, epsilon: float = 1e-4, reduction: Reduction = "mean") -> None:
        super().__init__()
        checks.positive(annualize, "annualize")
        checks.non_negative(epsilon, "epsilon")
        check_reduction(reduction)
        self.annualize = annualize
        self.epsilon = epsilon
        self.reduction = reduction

    def forward(self, log_returns: Float[Tensor, "batch steps"]) -> Tensor:
        """Compute the loss.

        Args:
            log_returns: One period a row.
        """
        return reduce(-sharpe_ratio(log_returns, annualize=self.annualize, epsilon=self.epsilon), self.reduction)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"annualize={self.annualize}, epsilon={self.epsilon}, reduction={self.reduction!r}"


def sortino_ratio(
    log_returns: Float[Tensor, "*batch steps"], *, annualize: float = 252.0, epsilon: float = 1e-8
) -> Float[Tensor, "*batch"]:
    r"""Compute the annualised Sortino ratio, which counts only losses as risk.

    :math:`\sqrt{A}\, m / (\sqrt{\mathrm{mean}(\min(R_t, 0)^2)} + \epsilon)`.

    Args:
        log_returns: :math:`R_t`, time along the last dimension.
        annualize: A, steps a year.
        epsilon: Added to the downside deviation, above 0: a period may have no loss.

    Returns:
        One ratio a period.

    Raises:
        TypeError: If ``log_returns`` is no floating-point tensor.
        ValueError: If it is empty or not finite, or a setting is out of range.

    Example:
        >>> sortino_ratio(torch.tensor([0.03, -0.01]), annualize=2.0)
        tensor(2.0000)

    Source:
        Sortino and van der Meer 1991.
    """
    checks.positive(epsilon, "epsilon")
    _check(log_returns, annualize, epsilon)
    downside = _root(log_returns.clamp_max(0).square().mean(-1))
    return math.sqrt(annualize) * log_returns.mean(-1) / (downside + epsilon)


def drawdowns(log_returns: Float[Tensor, "*batch steps"]) -> Float[Tensor, "*batch steps"]:
    r"""Compute how far wealth stands below its highest so far, the start included, after each step.

    :math:`d_t = 1 - p_t / \max_{s \le t} p_s` with :math:`p_0 = 1`; the largest is the maximum drawdown.

    Args:
        log_returns: :math:`R_t`, time along the last dimension.

    Returns:
        Fractions from 0 to 1.

    Raises:
        TypeError: If ``log_returns`` is no floating-point tensor.
        ValueError: If it is empty or not finite.

    Example:
        >>> drawdowns(torch.tensor([2.0, 1.0, 1.5, 3.0]).log().diff())
        tensor([0.5000, 0.2500, -0.0000])

    Source:
        Magdon-Ismail, Atiya, Pratap and Abu-Mostafa 2004.
    """
    _check(log_returns, 1.0, 0.0)
    log_wealth = log_returns.cumsum(-1)
    return -torch.expm1(log_wealth - log_wealth.cummax(-1).values.clamp_min(0))


def _root(square: Tensor) -> Tensor:
    """Return the square root, with gradient 0 rather than infinity at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _check(log_returns: Tensor, annualize: float, epsilon: float) -> None:
    checks.floating(log_returns, "log_returns")
    if log_returns.dim() == 0:
        raise ValueError("log_returns must have shape (*, steps), got a scalar")
    checks.not_empty(log_returns, "log_returns")
    checks.finite(log_returns, "log_returns")
    checks.positive(annualize, "annualize")
    checks.non_negative(epsilon, "epsilon")


def _check_warmup(warmup: int, steps: int) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be from 0 to {steps - 1}, one less than the steps, got {warmup}")
