r"""Dynamic loss-based reweighting: samples that are already learnt get less weight in each batch.

The losses of the (global) batch are scaled to :math:`h_i \in [-\delta, \delta]` by the smallest and the largest,

.. math:: h_i = \delta\,\frac{2 l_i - l_{max} - l_{min}}{\max(l_{max} - l_{min}, 10^{-6})}, \qquad
          w_i = \frac{e^{f(h_i) / r}}{\sum_j e^{f(h_j) / r}}, \qquad \text{risk} = \sum_i w_i l_i,

without gradient through :math:`w`, which solves :math:`\max_{w \in \Delta} \sum_i w_i f(h_i) - r\,KL(w \| u)`. The
strategy :math:`f` says who is to count:

- ``"linupper"`` :math:`\min(h + \delta, \delta)`: low losses count less, the upper half alike;
- ``"quadratic"`` :math:`1 - h^2 / \delta^2`: middling losses count most;
- ``"extremes"`` :math:`|h|`: both ends count most, as a contrast;
- ``"upper"`` :math:`(h + \delta) / 2`: the larger the loss, the more it counts;
- ``"uniform"`` 0: the mean.

Source: Sow, Woisetschläger, Bulusu, Wang, Jacobsen and Liang, "Dynamic Loss-Based Sample Reweighting for Improved
Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733; ``"upper"`` and the clamp are the official code's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from .risk import Risk, check_losses

Strategy = Literal["uniform", "linupper", "quadratic", "extremes", "upper"] | Callable[[Tensor], Tensor]
Normalize = Literal["minmax"] | tuple[Literal["quantile"], float]

_STRATEGIES = ("uniform", "linupper", "quadratic", "extremes", "upper")


def loss_weights(
    losses: Float[Tensor, " batch"],
    *,
    strategy: Strategy = "linupper",
    temperature: float | Tensor = 1.0,
    delta: float = 1.0,
    normalize: Normalize = "minmax",
    process_group: Any = None,
) -> Float[Tensor, " batch"]:
    """Compute the weight of each sample from the losses of its batch.

    Args:
        losses: One loss a sample.
        strategy: ``"uniform"``, ``"linupper"``, ``"quadratic"``, ``"extremes"``, ``"upper"``, or a callable from
            the scaled losses h to scores f.
        temperature: The paper's r, above 0: weights differ by at most the factor exp(1 / temperature). 1 for the
            paper's smallest model, 0.4 for its larger ones.
        delta: The scale of h, above 0; 1 throughout the paper. But for ``"quadratic"``, which it leaves alone, and
            callables, doubling it is halving the temperature.
        normalize: ``"minmax"``, or ``("quantile", q)`` with q in (0.5, 1], which scales by the quantiles 1 - q and q
            and clips, so that a single outlier cannot set the scale. Ours; not in the paper.
        process_group: The torch.distributed group over whose devices the batch is spread, or None for this one alone.

    Returns:
        Weights without gradient. Over all devices they are non-negative and add up to one.

    Raises:
        ValueError: If an argument is out of range or a loss is not finite.

    Example:
        >>> loss_weights(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.1554, 0.4223, 0.4223])

    Source:
        Sow et al. 2025, arXiv 2502.06733.
    """
    check_losses(losses)
    _check_strategy(strategy)
    _check_temperature(temperature)
    checks.positive(delta, "delta")
    quantile = _check_normalize(normalize)
    own = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    return _weights(own, strategy, temperature, delta, quantile, process_group).to(losses.dtype)


def sequence_losses(
    logits: Float[Tensor, "batch time vocabulary"],
    labels: Int[Tensor, "batch time"],
    *,
    ignore_index: int = -100,
    shift: bool = True,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Compute the mean token cross-entropy of each sequence, the loss of a sample in language modelling.

    Args:
        logits: Next-token logits.
        labels: Token ids.
        ignore_index: Tokens with this label count for nothing.
        shift: Whether logits at time t are for the label at t + 1, as language models give them.

    Returns:
        One loss a sequence, 0 where it has no counted token; and how many tokens were counted.

    Raises:
        ValueError: If the shapes disagree, nothing is left to predict, or a label is no token.

    Example:
        >>> losses, active = sequence_losses(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        >>> losses, active  # log 4, over one token
        (tensor([1.3863]), tensor([1]))

    Source:
        Sow et al. 2025, arXiv 2502.06733: the per-sample loss of the released trainer.
    """
    checks.floating(logits, "logits")
    checks.tensor(labels, "labels")
    if logits.dim() != 3 or tuple(labels.shape) != tuple(logits.shape[:2]):
        raise ValueError(
            "logits must have shape (batch, time, vocabulary) and labels (batch, time), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scores = logits.movedim(-1, 1)
    checks.class_scores(scores, labels, ignore_index=ignore_index)
    tokens = F.cross_entropy(scores, labels, ignore_index=ignore_index, reduction="none")
    active = (labels != ignore_index).sum(1)
    return tokens.sum(1) / active.clamp_min(1), active


class DynamicLossReweighting(Risk):
    """A mean whose weights follow the losses of the batch.

    In training mode each call counts a step. Give it batches of at least 16: with two losses, scaling by the
    extremes only tells the smaller from the larger; a batch of one is its loss.

    Spread over devices, the weights are those of the global batch, and each device's risk is its share times the
    number of devices, so that DistributedDataParallel's average of the gradients is the gradient of the global
    risk. Devices may hold different numbers of samples, but at least one each.

    Args:
        strategy: ``"linupper"`` (the paper's choice), ``"quadratic"`` (where some samples are noise),
            ``"extremes"``, ``"upper"``, ``"uniform"``, or a callable from scaled losses h in [-1, 1] to scores.
        temperature: The paper's r, above 0: large is near uniform. 1 for the paper's smallest model, 0.4 for larger.
        warmup_steps: So many first steps weigh uniformly; the official code takes a twentieth of all steps.
        temperature_schedule: ``step -> temperature`` in place of ``temperature``. The step comes as a scalar tensor,
            so that arithmetic on it can be compiled.
        normalize: ``"minmax"``, or ``("quantile", q)`` against outliers; see :func:`loss_weights`.
        process_group: The torch.distributed group that the batch is spread over (``torch.distributed.group.WORLD``),
            or None.

    Attributes:
        last_weights: The weights of the latest call on this device, or None.
        step: How many training steps were taken.

    Example:
        >>> risk = DynamicLossReweighting(temperature=0.4)
        >>> losses = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
        >>> risk(losses)
        tensor(1.4409, grad_fn=<MulBackward0>)

    Source:
        Sow et al. 2025, arXiv 2502.06733.
    """

    step: Tensor
    last_weights: Tensor | None

    def __init__(
        self,
        strategy: Strategy = "linupper",
        *,
        temperature: float = 1.0,
        warmup_steps: int = 0,
        temperature_schedule: Callable[[Any], Any] | None = None,
        normalize: Normalize = "minmax",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _check_strategy(strategy)
        checks.positive(temperature, "temperature")
        checks.non_negative(warmup_steps, "warmup_steps")
        self.quantile = _check_normalize(normalize)
        self.strategy = strategy
        self.temperature = temperature
        self.warmup_steps = warmup_steps
        self.temperature_schedule = temperature_schedule
        self.process_group = process_group
        self.last_weights = None
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, ""]:  # type: ignore[override]
        """Weigh losses ``(batch,)`` and add them up."""
        check_losses(losses)
        # Half precision rounds weights of many samples so much that they no longer add up to one.
        exact = losses.to(torch.promote_types(losses.dtype, torch.float32))
        temperature: float | Tensor = self.temperature
        if self.temperature_schedule is not None:
            temperature = self.temperature_schedule(self.step.clone())
            _check_temperature(temperature)
        weights = _weights(exact.detach(), self.strategy, temperature, 1.0, self.quantile, self.process_group)
        devices = 1
        if self.process_group is not None:
            devices = torch.distributed.get_world_size(self.process_group)
        if self.warmup_steps:
            everyone = len(losses) if self.process_group is None else sum(_sizes(losses, self.process_group))
            weights = torch.where(self.step < self.warmup_steps, torch.full_like(weights, 1 / everyone), weights)
        if checks.values_readable(losses):
            self.last_weights = weights
            if self.training and torch.is_grad_enabled() and not losses.requires_grad:
                warnings.warn("losses carry no gradient: were they detached before the risk?", stacklevel=2)
        if self.training:
            self.step += 1
        return (devices * (weights * exact).sum()).to(losses.dtype)


def _weights(
    losses: Tensor, strategy: Strategy, temperature: float | Tensor, delta: float, quantile: float, process_group: Any
) -> Tensor:
    everywhere, start = (losses, 0) if process_group is None else _gather(losses, process_group)
    weights = torch.softmax(_scores(_scale(everywhere, quantile), strategy, delta) / temperature, dim=-1)
    return weights if process_group is None else weights[start : start + len(losses)]


def _scale(losses: Tensor, quantile: float) -> Tensor:
    """Scale losses to [-1, 1]; equal losses give exactly 0."""
    if quantile < 1:
        low, high = losses.quantile(1 - quantile), losses.quantile(quantile)
        losses = losses.clamp(low, high)
    else:
        low, high = losses.aminmax()
    # Two differences cancel exactly where all losses are equal; in place, since both are fresh.
    return (losses - high).add_(losses - low).div_((high - low).clamp_min(1e-6))


def _scores(h: Tensor, strategy: Strategy, delta: float) -> Tensor:
    if callable(strategy):
        scores = strategy(delta * h)
        if scores.shape != h.shape:
            raise ValueError(f"strategy must return one score a sample, {tuple(h.shape)}, got {tuple(scores.shape)}")
        return scores
    if strategy == "linupper":
        return (h + 1).clamp_max_(1).mul_(delta)
    if strategy == "quadratic":
        return 1 - h.square()
    if strategy == "extremes":
        return delta * h.abs()
    if strategy == "upper":
        return delta * (h + 1) / 2
    return torch.zeros_like(h)


def _sizes(losses: Tensor, process_group: Any) -> list[int]:
    size = torch.tensor([len(losses)], device=losses.device)
    sizes = [torch.empty_like(size) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(sizes, size, group=process_group)
    return [int(each) for each in sizes]


def _gather(losses: Tensor, process_group: Any) -> tuple[Tensor, int]:
    """Return the losses of all devices, and where this device's begin."""
    sizes = _sizes(losses, process_group)
    # Devices must send alike many numbers: shorter batches are padded, and the padding cut off again.
    padded = F.pad(losses, (0, max(sizes) - len(losses)))
    received = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(received, padded, group=process_group)
    parts = [part[:size] for part, size in zip(received, sizes, strict=True)]
    return torch.cat(parts), sum(sizes[: torch.distributed.get_rank(process_group)])


def _check_strategy(strategy: Strategy) -> None:
    if not callable(strategy):
        checks.one_of(strategy, "strategy", _STRATEGIES)


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        checks.require(
            torch.isfinite(temperature) & (temperature > 0),
            lambda: f"temperature must be a finite number above 0, got {temperature.tolist()}",
        )
    else:
        checks.positive(temperature, "temperature")


def _check_normalize(normalize: Normalize) -> float:
    """Return the upper quantile that scales the losses; 1 is the largest loss."""
    if normalize == "minmax":
        return 1.0
    if isinstance(normalize, tuple) and len(normalize) == 2 and normalize[0] == "quantile":
        checks.between(normalize[1], "quantile", 0.5, 1.0, low_open=True)
        return float(normalize[1])
    raise ValueError(f"normalize must be 'minmax' or ('quantile', q), got {normalize!r}")
