r"""SAF and MESA: sharpness-aware training at the price of ordinary training.

SAM's sharpness is, to first order, the drop of the loss a step makes. So a network whose outputs changed much over the
last updates sits on a steep slope, and one may penalise the change instead of searching for the slope. For present
scores :math:`f`, earlier scores :math:`r` of the same examples and temperature :math:`\tau`, the trajectory term is

.. math:: T(f, r) = \tau^2\, KL(\mathrm{softmax}(r / \tau) \,\|\, \mathrm{softmax}(f / \tau)), \qquad
          \nabla_f T = \tau\,(\mathrm{softmax}(f / \tau) - \mathrm{softmax}(r / \tau)),

and :math:`L = \ell(f, y) + \lambda\, T(f, r)` is minimised. SAF remembers :math:`r` from :math:`E` epochs ago; MESA
asks a moving average of the weights, :math:`v \leftarrow \beta v + (1 - \beta)\,\theta`. The term pulls each score
towards the old prediction with a force of up to :math:`\lambda\tau`, so labels that the network did not believe,
often wrong ones, are learnt late or never.

Source: Du, Zhou, Feng, Tan and Zhou, "Sharpness-Aware Training for Free", NeurIPS 2022, arXiv 2205.14083, and its
official code, from which the factor :math:`\tau^2` is taken.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss

Base = Callable[..., Tensor]

# An epoch that no slot was ever written in.
_NEVER = -1


def trajectory_kl(
    input: Float[Tensor, "batch classes *spatial"],
    reference: Float[Tensor, "batch classes *spatial"],
    *,
    temperature: float = 5.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the trajectory term :math:`\tau^2\,KL(softmax(r / \tau) \| softmax(f / \tau))`.

    Args:
        input: Present scores f.
        reference: Earlier scores r, a constant: no gradient flows to them.
        temperature: The paper's tau, above 0; 5 in the official code. As it grows the term tends to half the
            variance over the classes of f - r.
        reduction: ``"mean"`` (over the examples), ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or one number an example.

    Raises:
        ValueError: If the shapes differ, or a score is NaN or infinite.

    Example:
        >>> trajectory_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.)

    Source:
        Du et al. 2022, arXiv 2205.14083, the trajectory loss.
    """
    checks.positive(temperature, "temperature")
    checks.floating(input, "input")
    checks.floating(reference, "reference")
    if input.shape != reference.shape:
        raise ValueError(f"reference must have input's shape {tuple(input.shape)}, got {tuple(reference.shape)}")
    if input.dim() < 2:
        raise ValueError(f"input must have shape (batch, classes, *), got {tuple(input.shape)}")
    checks.not_empty(input, "input")
    checks.finite(reference, "reference")
    shape = (input.shape[0], *input.shape[2:])
    term = _trajectory(_rows(input), _rows(reference), temperature)
    return reduce(term, reduction, shape=shape)


class SAFLoss(Loss):
    """SAF: any loss, plus the distance of the scores to those of the same examples a few epochs ago.

    In training mode the scores of each batch are remembered, in a ring of ``lag + 1`` epochs. The term is zero up to
    epoch ``after_epoch``, and for an example that was not seen exactly ``lag`` epochs ago. In evaluation mode
    nothing is remembered, and without ``index`` the base loss alone is computed.

    A training loop calls ``start_epoch(epoch)``, and passes ``index``: positions in the training set, by which an
    example must keep its identity (no mixup).

    Args:
        num_samples: Size N of the training set. None: sized by :meth:`start`.
        num_classes: Number C of scores an example. None: taken from the first batch.
        base: The loss that the term is added to, with ``reduction="none"``; None is cross-entropy.
        strength: The paper's lambda, at least 0; 0.3 in its README.
        temperature: The paper's tau, above 0; 5 in the official code.
        lag: The paper's E, at least 1: how many epochs ago; 3 in the official code.
        after_epoch: The paper's E_start, at least ``lag``: the term acts in epochs after this one; 5 in its README.
        before_epoch: The paper's E_end: the term acts in epochs before this one. None: to the end.
        storage: ``"memory"``, where the scores are buffers in the state dict; or the path of a file mapped into
            memory, one a training run, which itself holds what is remembered and stays on the CPU. :meth:`start`
            begins it anew; a loss built on an existing file goes on with it.
        dtype: Of the remembered scores. float16 takes ``2 (lag + 1) N C`` bytes.
        weight: One weight a class, or None, of the sum of both terms.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = SAFLoss(num_samples=100, num_classes=3)
        >>> loss.start_epoch(0)
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 1]), index=torch.tensor([7, 42]))
        tensor(1.0986)

    Source:
        Du et al. 2022, arXiv 2205.14083, section 3.
    """

    outputs: Tensor
    written: Tensor  # the epoch that each sample's scores in each slot are of
    weight: Tensor | None

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        num_classes: int | None = None,
        base: Base | None = None,
        strength: float = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        after_epoch: int = 5,
        before_epoch: int | None = None,
        storage: str | os.PathLike[str] = "memory",
        dtype: torch.dtype = torch.float16,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        _check_settings(base, strength, temperature)
        if lag < 1:
            raise ValueError(f"lag must be at least 1, got {lag}")
        if after_epoch < lag:
            raise ValueError(
                f"after_epoch must be at least lag, since nothing is remembered of epochs before the first: "
                f"got after_epoch={after_epoch} and lag={lag}"
            )
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        if storage != "memory" and num_classes is None:
            raise ValueError("num_classes is required where storage is a file")
        self.base = base
        self.strength = strength
        self.temperature = temperature
        self.lag = lag
        self.after_epoch = after_epoch
        self.before_epoch = before_epoch
        self.storage = storage
        self.dtype = dtype
        self.ignore_index = ignore_index
        self.epoch: int | None = None
        self.needs = _merge_needs(("index",), base)
        self.couples_batches = getattr(base, "couples_batches", False)
        self.register_buffer("weight", weight)
        self._allocate(num_samples or 0, num_classes or 0)

    def start(self, model: nn.Module, num_samples: int) -> None:
        """Forget everything, and make room for ``num_samples`` examples."""
        _call(self.base, "start", model, num_samples)
        self.epoch = None
        self._allocate(num_samples, self.outputs.shape[2])
        self.written.fill_(_NEVER)

    def start_epoch(self, epoch: int) -> None:
        """Note that epoch ``epoch`` (from 0) begins; going back warns."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if self.epoch is not None and epoch < self.epoch:
            warnings.warn(
                f"epoch goes back from {self.epoch} to {epoch}: what was remembered since is of the future",
                stacklevel=2,
            )
        self.epoch = epoch
        _call(self.base, "start_epoch", epoch)

    def after_step(self, model: nn.Module) -> None:
        """Pass the model on to the base loss."""
        _call(self.base, "after_step", model)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, index: Tensor | None = None, **context: Tensor
    ) -> Tensor:
        """Compute the loss; ``index`` ``(batch,)`` gives the examples' places in the training set."""
        if input.dim() > 2:
            raise ValueError(f"input must have shape (batch, classes), got {tuple(input.shape)}")
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        if "index" in getattr(self.base, "needs", ()) and index is not None:
            context["index"] = index
        losses = _base_losses(self.base, rows, labels, target.shape, context)
        if self.training or index is not None:
            epoch, place = self._place(rows, index)
            if self._acts(epoch):
                losses = losses + self._term(rows, epoch, place, self.strength)
        total = reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)
        if self.training:
            self._keep(rows, epoch, place)
        return total

    def trajectory(
        self, input: Float[Tensor, "batch classes"], index: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, " batch"]:
        """Compute the trajectory term of each example, without remembering: for losses of one's own."""
        epoch, place = self._place(input, index)
        return self._term(input, epoch, place, 1.0) if self._acts(epoch) else input.new_zeros(len(input))

    def remember(self, input: Float[Tensor, "batch classes"], index: Int[Tensor, " batch"] | None) -> None:
        """Keep the scores of this epoch, as :meth:`forward` does in training mode."""
        self._keep(input, *self._place(input, index))

    def link(self, input: Tensor) -> Tensor:
        """Return the base loss's probabilities."""
        return _link(self.base, input)

    def _place(self, input: Tensor, index: Tensor | None) -> tuple[int, Tensor]:
        """Return the epoch, and the examples' places in the ring, sized on the first batch."""
        if self.outputs.shape[2] == 0:
            self._allocate(self.written.shape[1], input.shape[1])
        if self.outputs.shape[2] != input.shape[1]:
            raise ValueError(f"input must score num_classes = {self.outputs.shape[2]} classes, got {input.shape[1]}")
        checks.index_of_examples(index, len(input), self.written.shape[1])
        if self.epoch is None:
            raise RuntimeError("start_epoch(epoch) must be called at the start of every epoch")
        assert index is not None
        return self.epoch, index.to(self.outputs.device)

    def _acts(self, epoch: int) -> bool:
        return epoch > self.after_epoch and (self.before_epoch is None or epoch < self.before_epoch)

    def _term(self, input: Tensor, epoch: int, place: Tensor, scale: float) -> Tensor:
        wanted = epoch - self.lag
        slot = wanted % (self.lag + 1)
        reference = self.outputs[slot].index_select(0, place).to(input)
        known = self.written[slot].index_select(0, place) == wanted
        return _trajectory(input, reference, self.temperature, (scale * known).to(input.device))

    @torch.no_grad()
    def _keep(self, input: Tensor, epoch: int, place: Tensor) -> None:
        slot = epoch % (self.lag + 1)
        # A shift of the scores changes no probability, and puts the ones that matter where float16 is finest.
        shifted = (input - input.amax(1, keepdim=True)).clamp_min_(torch.finfo(self.outputs.dtype).min)
        self.outputs[slot].index_copy_(0, place, shifted.to(self.outputs))
        self.written[slot].index_fill_(0, place, epoch)

    def _allocate(self, samples: int, classes: int) -> None:
        slots = self.lag + 1
        if self.storage != "memory":
            # Plain attributes, not buffers: a module's .to(device) and state dict would copy the whole file.
            if samples:
                self.outputs, self.written = _map_file(self.storage, slots, samples, classes, self.dtype)
            else:
                self.outputs = torch.empty(slots, 0, classes, dtype=self.dtype)
                self.written = torch.empty(slots, 0, dtype=torch.int32)
            return
        old = getattr(self, "outputs", torch.empty(0, dtype=self.dtype))
        self.register_buffer("outputs", old.new_zeros(slots, samples, classes))
        written = torch.full((slots, samples), _NEVER, dtype=torch.int32, device=old.device)
        self.register_buffer("written", written)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the state's size where this loss has none yet."""
        outputs = state_dict.get(f"{prefix}outputs")
        if isinstance(outputs, Tensor) and outputs.dim() == 3 and 0 in self.outputs.shape:
            self._allocate(*outputs.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args)


class MESALoss(Loss):
    """MESA: any loss, plus the distance of the scores to those of a moving average of the model.

    A training loop passes ``inputs``, the batch that the model saw, and calls ``after_step(model)`` after each
    optimizer step. In evaluation mode, without ``inputs``, the base loss alone is computed.

    Args:
        model: The model, whose weights the average starts from. None: given by :meth:`start`. Of a wrapped one
            (DDP), its ``module``.
        base: The loss that the term is added to, with ``reduction="none"``; None is cross-entropy.
        strength: The paper's lambda, at least 0; 0.8 in its README.
        temperature: The paper's tau, above 0; 5 in the official code.
        decay: The paper's beta, in [0, 1]; 0.9995 in the paper. Let ``1 / (1 - decay)`` be the steps of 2 to 10 epochs.
        warmup_steps: The term is zero until so many steps are taken.
        weight: One weight a class, or None, of the sum of both terms.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> loss, inputs = MESALoss(model), torch.ones(2, 4)
        >>> loss(model(inputs), torch.tensor([0, 1]), inputs=inputs).shape
        torch.Size([])
        >>> loss.after_step(model)

    Source:
        Du et al. 2022, arXiv 2205.14083, section 3, and the official code's order of steps.
    """

    steps: Tensor
    weight: Tensor | None
    average: nn.Module | None

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        base: Base | None = None,
        strength: float = 0.8,
        temperature: float = 5.0,
        decay: float = 0.9995,
        warmup_steps: int = 0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        _check_settings(base, strength, temperature)
        checks.between(decay, "decay", 0.0, 1.0)
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.base = base
        self.strength = strength
        self.temperature = temperature
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.ignore_index = ignore_index
        self.needs = _merge_needs(("inputs",), base)
        self.couples_batches = getattr(base, "couples_batches", False)
        self.register_buffer("weight", weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.average = None if model is None else _frozen_copy(model)

    def start(self, model: nn.Module, num_samples: int) -> None:
        """Begin the average anew, at ``model``'s weights."""
        _call(self.base, "start", model, num_samples)
        self.average = _frozen_copy(model)
        self.steps.zero_()

    def start_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the base loss."""
        _call(self.base, "start_epoch", epoch)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Move the average towards ``model``; running statistics are averaged too, and counters copied."""
        average = self._average()
        mine = [*average.parameters(), *average.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        if [value.shape for value in mine] != [value.shape for value in theirs]:
            raise ValueError("model must have the weights that the average was started from")
        pairs = [(a, b.detach().to(a)) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
        if pairs:
            torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - self.decay)
        for a, b in zip(mine, theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)
        self.steps += 1
        _call(self.base, "after_step", model)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, inputs: Any = None, **context: Tensor
    ) -> Tensor:
        """Compute the loss; ``inputs`` is the batch that the model saw."""
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        if "inputs" in getattr(self.base, "needs", ()) and inputs is not None:
            context["inputs"] = inputs
        losses = _base_losses(self.base, rows, labels, target.shape, context)
        if self.training or inputs is not None:
            losses = losses + self.strength * self.trajectory(input, inputs).reshape(-1)
        return reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)

    def trajectory(
        self, input: Float[Tensor, "batch classes *spatial"], inputs: Any
    ) -> Float[Tensor, "batch *spatial"]:
        """Compute the trajectory term of each example: for losses of one's own."""
        average = self._average()
        if inputs is None:
            raise ValueError("inputs is required: the batch that the model saw")
        with torch.no_grad():
            reference = average(_in_dtype_of(average, inputs))
        if reference.shape != input.shape:
            raise ValueError(
                f"input must be the model's scores of inputs, of shape {tuple(reference.shape)}, "
                f"got {tuple(input.shape)}"
            )
        term = _trajectory(_rows(input), _rows(reference.to(input)), self.temperature)
        if self.warmup_steps:
            term = torch.where(self.steps >= self.warmup_steps, term, torch.zeros_like(term))
        return term.reshape(input.shape[0], *input.shape[2:])

    def link(self, input: Tensor) -> Tensor:
        """Return the base loss's probabilities."""
        return _link(self.base, input)

    def train(self, mode: bool = True) -> MESALoss:
        """Set the mode; the average stays in evaluation mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def _average(self) -> nn.Module:
        if self.average is None:
            raise RuntimeError("model is required: pass it to MESALoss, or call start(model, num_samples)")
        return self.average


def _trajectory(
    input: Float[Tensor, "rows classes"],
    reference: Float[Tensor, "rows classes"],
    temperature: float,
    scale: Float[Tensor, " rows"] | float = 1.0,
) -> Float[Tensor, " rows"]:
    """Compute the term of each row, times a constant ``scale``, on which no gradient step is spent."""
    # A half-precision logarithm is coarser than the term itself.
    wide = torch.promote_types(input.dtype, torch.float32)
    log_p = torch.log_softmax(reference.detach().to(wide) / temperature, dim=-1)
    log_q = torch.log_softmax(input.to(wide) / temperature, dim=-1)
    scale = temperature**2 * scale
    force = log_p.exp() * (scale[:, None].to(wide) if isinstance(scale, Tensor) else scale)
    return (force * (log_p - log_q)).sum(-1).to(input.dtype)


def _rows(scores: Tensor) -> Tensor:
    return scores if scores.dim() == 2 else scores.movedim(1, -1).reshape(-1, scores.shape[1])


def _check_settings(base: Base | None, strength: float, temperature: float) -> None:
    checks.non_negative(strength, "strength")
    checks.positive(temperature, "temperature")
    if base is not None and not callable(base):
        raise TypeError(f"base must be a loss or None, got {type(base).__name__}")
    if getattr(base, "reduction", "none") != "none":
        raise ValueError("base must have reduction='none': both terms are reduced together, by this loss's reduction")


def _merge_needs(own: tuple[str, ...], base: Base | None) -> tuple[str, ...]:
    return (*own, *(name for name in getattr(base, "needs", ()) if name not in own))


def _base_losses(
    base: Base | None, rows: Tensor, labels: Tensor, shape: torch.Size, context: dict[str, Tensor]
) -> Tensor:
    if base is None:
        return F.cross_entropy(rows, labels, reduction="none")
    losses = base(rows, labels, **context)
    if losses.shape != labels.shape:
        raise ValueError(
            f"base must return one loss an example, shape {tuple(labels.shape)}, got {tuple(losses.shape)}"
        )
    return losses


def _call(base: Base | None, hook: str, *args: Any) -> None:
    method = getattr(base, hook, None)
    if method is not None:
        method(*args)


def _link(base: Base | None, input: Tensor) -> Tensor:
    link = getattr(base, "link", None)
    return torch.softmax(input, dim=-1) if link is None else link(input)


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Copy the model, without gradients, in at least float32: a half-precision average would stand still."""
    average = copy.deepcopy(model).requires_grad_(False).eval()
    values = (*average.parameters(), *average.buffers())
    half = any(value.is_floating_point() and torch.finfo(value.dtype).bits < 32 for value in values)
    return average.float() if half else average


def _in_dtype_of(module: nn.Module, inputs: Any) -> Any:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return inputs
    for parameter in module.parameters():  # next(..., default) breaks the graph in torch 2.6
        return inputs.to(parameter.dtype)
    return inputs


def _map_file(
    path: str | os.PathLike[str], slots: int, samples: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Map remembered scores and the epochs that they are of from one file, made if it is not there."""
    epochs = slots * samples * 4
    size = epochs + slots * samples * classes * dtype.itemsize
    fresh = not os.path.exists(path)
    if not fresh and os.path.getsize(path) != size:
        raise ValueError(
            f"storage {os.fspath(path)!r} holds {os.path.getsize(path)} bytes, not the {size} of {slots} epochs, "
            f"{samples} samples and {classes} classes in {dtype}: it belongs to another training run"
        )
    raw = torch.from_file(os.fspath(path), shared=True, size=size, dtype=torch.uint8)
    written = raw[:epochs].view(torch.int32).view(slots, samples)
    if fresh:
        written.fill_(_NEVER)
    return raw[epochs:].view(dtype).view(slots, samples, classes), written
