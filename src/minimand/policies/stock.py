r"""The stock: a running total that turns what is left of an episode into the first problem, scaled.

.. math:: C_{t+1} = (C_t + R_{t+1}) / \gamma, \qquad\text{so that}\qquad C_0 + G_0 = \gamma^t (C_t + G_t).

Source: Ávila Pires et al. 2025, arXiv 2501.13028, section 3.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from .expected_utility import check_discount


def stock_update(
    stock: Float[Tensor, "*stock"], reward: Float[Tensor, "*stock"], *, discount: float
) -> Float[Tensor, "*stock"]:
    r"""Compute the next stock :math:`(c + r) / \gamma`.

    Args:
        stock: What the discounted rewards so far and the first stock add up to, in units of the present step.
        reward: Of this step.
        discount: :math:`\gamma`, in (0, 1].

    Returns:
        The stock at the next step.

    Raises:
        ValueError: If the stock or reward is not finite, or the discount lies outside (0, 1].

    Example:
        >>> stock_update(torch.tensor([1.0]), torch.tensor([2.0]), discount=0.5)
        tensor([6.])

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028, section 3.
    """
    check_discount(discount)
    for value, name in ((stock, "stock"), (reward, "reward")):
        checks.floating(value, name)
        checks.finite(value, name)
    return (stock + reward) / discount


def edit_stock(
    stock: Float[Tensor, " batch"],
    step: Int[Tensor, " batch"],
    shift: Float[Tensor, " batch"],
    *,
    discount: float,
) -> Float[Tensor, " batch"]:
    r"""Compute what the stock would be had the episode begun with another: :math:`c_t + \gamma^{-t} \Delta c_0`.

    The process does not know the stock, so that every transition seen is one from any other stock as well.

    Args:
        stock: Of transitions that were seen.
        step: Steps taken before each, at least 0.
        shift: By how much the first stock is to be higher.
        discount: :math:`\gamma`, in (0, 1].

    Returns:
        The edited stocks.

    Raises:
        ValueError: If a stock or shift is not finite, a step is negative, or the discount lies outside (0, 1].

    Example:
        >>> edit_stock(torch.tensor([6.0]), torch.tensor([1]), torch.tensor([2.0]), discount=0.5)
        tensor([10.])

    Source:
        Follows from the recursion of Ávila Pires et al. 2025, arXiv 2501.13028; used so by Moghimi 2026, arXiv
        2602.04131.
    """
    check_discount(discount)
    for value, name in ((stock, "stock"), (shift, "shift")):
        checks.floating(value, name)
        checks.finite(value, name)
    checks.require(step >= 0, lambda: f"step must be at least 0, got {int(step.min())}")
    return stock + shift / discount ** step.to(stock)
