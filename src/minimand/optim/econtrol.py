r"""EControl: workers send compressed messages, and feed back a set fraction of what compression dropped.

Worker i of n holds an estimate :math:`h_i` of its gradient and the error :math:`e_i` of all it has sent. In a round
with gradients :math:`g_i` and a contractive compressor C,

.. math:: \Delta_i = C(\eta e_i + g_i - h_i), \qquad h_i' = h_i + \Delta_i, \qquad e_i' = e_i + g_i - h_i',

and all step along :math:`h' = \frac1n \sum_i h_i'`, which needs no more than the messages :math:`\Delta_i`. One message
serves two ends: it follows the gradient and pays the error back, a fraction :math:`\eta` at a time. Then

.. math:: x_t - \frac\gamma n \sum_i e_i \quad\text{moves by}\quad -\frac\gamma n \sum_i g_i

exactly: up to a small shift the method is SGD, whatever the compressor. Relatives with the same state: error feedback
has :math:`h_i = 0` and :math:`\eta = 1`, EF21 has :math:`\eta = 0`.

Source: Gao, Islamov and Stich, "EControl: Fast Distributed Optimization with Compression and Error Control", ICLR 2024,
arXiv 2311.05645.
"""

# Annotations are not postponed: DistributedDataParallel compares those of a hook with the classes themselves.

import abc
import copy
import dataclasses
import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .compressors import Compressor, Identity, Message, RandK, TopK, check_finite

Init = Literal["full", "zero"]


class WorkerState(NamedTuple):
    """What workers remember between rounds, ``(*batch, dim)``; None where a method has no use for it.

    Attributes:
        memory: The error e; for :class:`EF21SGDM` the moving average of gradients, v.
        estimate: The estimate h of the gradient.
    """

    memory: Tensor | None
    estimate: Tensor | None


class Encoding(NamedTuple):
    """What workers send in a round, and what they remember after it.

    Attributes:
        message: The message to send.
        change: What the message says, decompressed, ``(*batch, dim)``.
        state: For the next round.
    """

    message: Message
    change: Tensor
    state: WorkerState


def econtrol_step(
    state: WorkerState, gradient: Float[Tensor, "*batch dim"], compressor: Compressor, *, eta: float | Tensor
) -> Encoding:
    r"""Compute the message of a round and the state after it, for many workers at once.

    .. math:: \Delta = C(\eta e + g - h), \qquad h' = h + \Delta, \qquad e' = e + g - h'.

    Args:
        state: From the last round; zeros at first.
        gradient: Of each worker.
        compressor: C; its rounding is part of the change: what the receiver decodes is what the sender counts on.
        eta: Fraction of the error that is fed back, in [0, 1]; a tensor for many runs at once, broadcast against
            ``gradient``.

    Returns:
        The message, the change and the next state.

    Raises:
        ValueError: If the gradient is not finite or of another shape than the state, or ``eta`` out of range.

    Example:
        >>> state = WorkerState(torch.zeros(3), torch.zeros(3))
        >>> sent = econtrol_step(state, torch.tensor([1.0, -3.0, 2.0]), TopK(k=1), eta=0.3)
        >>> sent.change, sent.state.memory
        (tensor([ 0., -3.,  0.]), tensor([1., 0., 2.]))

    Source:
        Gao et al. 2024, arXiv 2311.05645, algorithm 1 (EControl).
    """
    _check_eta(eta)
    _check_round(state, gradient)
    return _econtrol(state, gradient, compressor, eta)


def _econtrol(state: WorkerState, gradient: Tensor, compressor: Compressor, eta: float | Tensor) -> Encoding:
    memory, estimate = _need(state.memory), _need(state.estimate)
    owed = gradient - estimate
    message = compressor.pack(owed.addcmul_(eta, memory) if isinstance(eta, Tensor) else owed.add_(memory, alpha=eta))
    change = compressor.decompress(message)
    estimate = estimate + change
    return Encoding(message, change, WorkerState((gradient - estimate).add_(memory), estimate))


class GradientExchange(abc.ABC):
    """What a worker sends in place of its gradient, and what it remembers.

    A worker's rounds: ``state = method.begin(gradient)`` once, then ``method.encode(state, gradient)``, by
    ``method.first()`` in the first round. The receiver averages the changes of all workers and adds them up if the
    method ``learns``.
    """

    learns: ClassVar[bool]
    """Whether the step is along the mean of estimates, the sum of all changes, rather than of this round's changes."""

    compressor: Compressor

    def begin(self, gradient: Float[Tensor, "*batch dim"]) -> WorkerState:
        """Return the state before the first round, whose gradient is given."""
        return WorkerState(torch.zeros_like(gradient), torch.zeros_like(gradient))

    def first(self) -> "GradientExchange":
        """Return the method of the first round, which sends everything if ``init`` is ``"full"``."""
        return self._with(Identity()) if getattr(self, "init", "zero") == "full" else self

    def encode(self, state: WorkerState, gradient: Float[Tensor, "*batch dim"]) -> Encoding:
        """Return the message of a round, what it says, and the state after it.

        Raises:
            ValueError: If the gradient is not finite or of another shape than the state.
        """
        _check_round(state, gradient)
        return self._encode(state, gradient)

    def direction(self, sent: Encoding) -> Float[Tensor, "*batch dim"]:
        """Return what to step along, given what all workers sent: ``(*batch, workers, dim)`` to ``(*batch, dim)``."""
        return (_need(sent.state.estimate) if self.learns else sent.change).mean(-2)

    def of_shape(self, shape: Sequence[int]) -> "GradientExchange":
        """Return the method for vectors that are flattened tensors of that shape."""
        return self._with(self.compressor.of_shape(shape))

    @abc.abstractmethod
    def _encode(self, state: WorkerState, gradient: Tensor) -> Encoding: ...

    def _with(self, compressor: Compressor) -> "GradientExchange":
        # Not dataclasses.replace, which would check, and warn, again.
        other = copy.copy(self)
        object.__setattr__(other, "compressor", compressor)
        return other


@final
@dataclasses.dataclass(frozen=True, eq=False)
class EControl(GradientExchange):
    r"""Feed back a fraction of the error in the message that follows the gradient.

    Args:
        compressor: C.
        eta: Fraction of the error that is fed back, in [0, 1]. None: the compressor's delta, which for the sign and low
            rank is next to 0: set it there, 0.1 say. Above delta it may diverge. The paper's theory asks for a small
            multiple of delta, its experiments tune. A tensor holds many runs' values.
        init: ``"full"``: the first message is not compressed, so that estimates start at gradients; ``"zero"``: at 0.

    Example:
        >>> method = EControl(TopK(0.5), eta=0.1)
        >>> gradient = torch.tensor([1.0, -3.0])
        >>> sent = method.first().encode(method.begin(gradient), gradient)
        >>> method.encode(sent.state, gradient + 1).change
        tensor([1., 0.])

    Source:
        Gao et al. 2024, arXiv 2311.05645, algorithm 1.
    """

    learns: ClassVar[bool] = True

    compressor: Compressor
    eta: float | Tensor | None = dataclasses.field(default=None, kw_only=True)
    init: Init = dataclasses.field(default="full", kw_only=True)

    def __post_init__(self) -> None:
        _check_compressor(self.compressor)
        checks.one_of(self.init, "init", ("full", "zero"))
        if self.eta is None:
            return
        _check_eta(self.eta)
        # The sign and low rank guarantee next to nothing, and keep much: there a warning would say nothing.
        if isinstance(self.compressor, (TopK, RandK)) and self.compressor.ratio is not None:
            largest = float(torch.as_tensor(self.eta, dtype=torch.float64).max())
            if largest > self.compressor.ratio:
                warnings.warn(
                    f"eta = {largest:g} is above the {self.compressor.ratio:g} of a gradient that the compressor "
                    f"keeps at least: EControl may diverge",
                    stacklevel=3,
                )

    def _encode(self, state: WorkerState, gradient: Tensor) -> Encoding:
        eta = self.compressor.delta(gradient.shape[-1]) if self.eta is None else self.eta
        return _econtrol(state, gradient, self.compressor, eta)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class ErrorFeedback(GradientExchange):
    r"""Add what was dropped to the next gradient: :math:`\Delta = C(e + g)`, :math:`e' = e + g - \Delta`.

    Needs no estimate, and serves well where workers' gradients agree near the solution; where they do not, their
    differences pass through the compressor for ever, and leave a floor.

    Args:
        compressor: C.

    Example:
        >>> method = ErrorFeedback(TopK(k=1))
        >>> gradient = torch.tensor([1.0, -3.0])
        >>> method.encode(method.begin(gradient), gradient).state.memory
        tensor([1., 0.])

    Source:
        Seide et al., Interspeech 2014; Stich et al. 2018, arXiv 1809.07599; Karimireddy et al. 2019, arXiv 1901.09847.
        Known as EC or EF14. The error here holds gradients rather than steps, so that a change of the learning rate
        does not rescale it.
    """

    learns: ClassVar[bool] = False

    compressor: Compressor

    def __post_init__(self) -> None:
        _check_compressor(self.compressor)

    def begin(self, gradient: Float[Tensor, "*batch dim"]) -> WorkerState:
        """Return an error of zero."""
        return WorkerState(torch.zeros_like(gradient), None)

    def _encode(self, state: WorkerState, gradient: Tensor) -> Encoding:
        owed = _need(state.memory) + gradient
        message = self.compressor.pack(owed)
        change = self.compressor.decompress(message)
        return Encoding(message, change, WorkerState(owed - change, None))


@final
@dataclasses.dataclass(frozen=True, eq=False)
class EF21(GradientExchange):
    r"""Send the compressed change of the gradient: :math:`\Delta = C(g - h)`, :math:`h' = h + \Delta`.

    Differences between workers leave no floor, but what is dropped is never sent, and noise of gradients comes through
    amplified.

    Args:
        compressor: C.
        init: As in :class:`EControl`.

    Example:
        >>> method = EF21(TopK(k=1), init="zero")
        >>> gradient = torch.tensor([1.0, -3.0])
        >>> method.encode(method.begin(gradient), gradient).state.estimate
        tensor([ 0., -3.])

    Source:
        Richtarik, Sokolov and Fatkhullin, "EF21", NeurIPS 2021, arXiv 2106.05203, algorithm 2.
    """

    learns: ClassVar[bool] = True

    compressor: Compressor
    init: Init = dataclasses.field(default="full", kw_only=True)

    def __post_init__(self) -> None:
        _check_compressor(self.compressor)
        checks.one_of(self.init, "init", ("full", "zero"))

    def begin(self, gradient: Float[Tensor, "*batch dim"]) -> WorkerState:
        """Return an estimate of zero."""
        return WorkerState(None, torch.zeros_like(gradient))

    def _encode(self, state: WorkerState, gradient: Tensor) -> Encoding:
        estimate = _need(state.estimate)
        message = self.compressor.pack(gradient - estimate)
        change = self.compressor.decompress(message)
        return Encoding(message, change, WorkerState(None, estimate + change))


@final
@dataclasses.dataclass(frozen=True, eq=False)
class EF21SGDM(GradientExchange):
    r"""Let EF21 follow a moving average of gradients: :math:`v' = (1 - b) v + b g`, :math:`\Delta = C(v' - h)`.

    The average, which starts at the first gradient, takes the noise away before it is compressed.

    Args:
        compressor: C.
        momentum: :math:`1 - b`, in [0, 1); 0.9 by custom. A tensor holds many runs' values.
        init: As in :class:`EControl`.

    Example:
        >>> method = EF21SGDM(TopK(k=1), momentum=0.5)
        >>> state = WorkerState(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -3.0]))
        >>> method.encode(state, torch.tensor([3.0, -3.0])).state
        WorkerState(memory=tensor([ 2., -3.]), estimate=tensor([ 2., -3.]))

    Source:
        Fatkhullin, Tyurin and Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023, arXiv 2305.15155.
    """

    learns: ClassVar[bool] = True

    compressor: Compressor
    momentum: float | Tensor = dataclasses.field(default=0.9, kw_only=True)
    init: Init = dataclasses.field(default="full", kw_only=True)

    def __post_init__(self) -> None:
        _check_compressor(self.compressor)
        checks.one_of(self.init, "init", ("full", "zero"))
        momentum = torch.as_tensor(self.momentum)
        checks.require(
            (momentum >= 0) & (momentum < 1), lambda: f"momentum must lie in [0.0, 1.0), got {self.momentum}"
        )

    def begin(self, gradient: Float[Tensor, "*batch dim"]) -> WorkerState:
        """Return the gradient as its own average, and an estimate of zero."""
        return WorkerState(gradient.clone(), torch.zeros_like(gradient))

    def _encode(self, state: WorkerState, gradient: Tensor) -> Encoding:
        estimate = _need(state.estimate)
        average = gradient + self.momentum * (_need(state.memory) - gradient)
        message = self.compressor.pack(average - estimate)
        change = self.compressor.decompress(message)
        return Encoding(message, change, WorkerState(average, estimate + change))


@final
@dataclasses.dataclass(frozen=True, eq=False)
class NaiveCompression(GradientExchange):
    """Send the compressed gradient and forget what was dropped; with :class:`Identity`, plain averaging.

    Args:
        compressor: C.

    Example:
        >>> method = NaiveCompression(TopK(k=1))
        >>> gradient = torch.tensor([1.0, -3.0])
        >>> method.encode(method.begin(gradient), gradient).change
        tensor([ 0., -3.])

    Source:
        The baseline that need not converge: Karimireddy et al. 2019, arXiv 1901.09847, section 3.
    """

    learns: ClassVar[bool] = False

    compressor: Compressor

    def __post_init__(self) -> None:
        _check_compressor(self.compressor)

    def begin(self, gradient: Float[Tensor, "*batch dim"]) -> WorkerState:
        """Return nothing to remember."""
        return WorkerState(None, None)

    def _encode(self, state: WorkerState, gradient: Tensor) -> Encoding:
        message = self.compressor.pack(gradient)
        return Encoding(message, self.compressor.decompress(message), state)


@final
class CompressedDataParallel:
    """Train a model as if on several workers that exchange compressed gradients, in one process.

    Each parameter is a vector of its own, for all workers at once. A parameter whose gradient is zero on all workers
    rests: nothing is sent and nothing remembered changes. Workers count alike; for other weights multiply each one's
    loss by its weight and the number of workers.

    Args:
        model: The one model that all workers share.
        method: What is sent.
        num_workers: How many workers, at least 1.

    Attributes:
        bytes_sent: What all workers have sent so far.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> workers = CompressedDataParallel(model, EControl(TopK(0.25)), num_workers=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> workers.backward([model(torch.ones(3, 4)).mean(), model(torch.zeros(5, 4)).square().mean()])
        >>> optimizer.step()
        >>> workers.bytes_sent
        40

    Source:
        Gao et al. 2024, arXiv 2311.05645, algorithm 1.
    """

    def __init__(self, model: nn.Module, method: GradientExchange, *, num_workers: int) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.num_workers = num_workers
        self.bytes_sent = 0
        self._method = method
        self._slots = _slots(model, method)

    def backward(self, losses: Sequence[Tensor] | Tensor) -> None:
        """Write what the workers agree on into ``grad`` of every parameter, in place of what was there.

        Args:
            losses: One scalar a worker, in the order of workers.

        Raises:
            ValueError: If there are not as many losses as workers or a gradient is not finite; then nothing changed.
        """
        if len(losses) != self.num_workers:
            raise ValueError(f"losses must hold one for each of {self.num_workers} workers, got {len(losses)}")
        parameters = list(self._slots)
        rows = []
        for worker, loss in enumerate(losses):
            # Losses may share a graph, which the last one may free.
            keep = worker + 1 < self.num_workers
            rows.append(torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True))
        rounds: list[tuple[nn.Parameter, _Slot, GradientExchange, Encoding]] = []
        idle: list[tuple[nn.Parameter, Tensor | None]] = []
        for parameter, *given in zip(parameters, *rows, strict=True):
            if all(one is None for one in given):
                idle.append((parameter, None))
                continue
            gradient = torch.stack([torch.zeros_like(parameter) if one is None else one for one in given]).flatten(1)
            gradient = gradient.to(_wide(gradient.dtype))
            slot = self._slots[parameter]
            check_finite(gradient, f"gradient of {slot.name}")
            if not bool(gradient.any()):
                idle.append((parameter, torch.zeros_like(parameter)))
                continue
            method, state = slot.at(gradient)
            rounds.append((parameter, slot, method, method._encode(state, gradient)))
        for parameter, zero in idle:
            parameter.grad = zero
        for parameter, slot, method, sent in rounds:
            slot.state = sent.state
            self.bytes_sent += sent.message.nbytes
            parameter.grad = method.direction(sent).to(parameter.dtype).view_as(parameter)

    def virtual_iterate(self, lr: float) -> list[Tensor]:
        r"""Return :math:`x - \frac\gamma n \sum_i e_i` of each parameter: where SGD by the same gradients would be.

        Raises:
            ValueError: If the method keeps no error.
        """
        if not isinstance(self._method, (EControl, ErrorFeedback)):
            raise ValueError(f"method must keep an error, {type(self._method).__name__} keeps none")
        found = []
        for parameter, slot in self._slots.items():
            error = None if slot.state is None else slot.state.memory
            shift = 0.0 if error is None else error.mean(0).view_as(parameter)
            found.append(parameter.detach() - lr * shift)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what the workers remember, for a checkpoint: tensors and numbers only."""
        return {**_saved(self._slots, self._method), "num_workers": self.num_workers, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If it is of another method, number of workers or model; then nothing changed.
        """
        _check_same(state_dict, "num_workers", self.num_workers)
        _load(self._slots, self._method, state_dict, (self.num_workers,))
        self.bytes_sent = int(state_dict["bytes_sent"])


@final
class CompressionState:
    """What one process of DistributedDataParallel remembers between rounds, for :func:`compression_hook`.

    State is kept by parameter, not by bucket: buckets change after the first step, parameters do not. Memory: up to
    three floats a parameter (error, own estimate, mean estimate), in at least float32.

    Every process saves and loads its own :meth:`state_dict`, which differs from rank to rank.

    Args:
        model: The model, plain or wrapped in DistributedDataParallel.
        method: What is sent; the same on all ranks.
        process_group: That of DistributedDataParallel; None for the default group.

    Attributes:
        bytes_sent: What this process has handed over to be sent so far.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> state = CompressionState(model, EControl(TopK(0.25)))
        >>> # DistributedDataParallel(model).register_comm_hook(state, compression_hook)
        >>> state.bytes_sent
        0

    Source:
        Gao et al. 2024, arXiv 2311.05645, algorithm 1, every process playing worker and server.
    """

    def __init__(
        self, model: nn.Module, method: GradientExchange, *, process_group: dist.ProcessGroup | None = None
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.process_group = process_group
        self.bytes_sent = 0
        self._method = method
        self._slots = _slots(model, method)
        self._round = _Round()

    def _enter_round(self, *, first: bool, last: bool) -> "_Round":
        if first:
            self._round = _Round()
        self._round.enter(last)
        return self._round

    def _slot(self, parameter: Tensor) -> "_Slot":
        for_parameter: dict[Any, _Slot] = self._slots
        if parameter not in for_parameter:
            raise ValueError("state is of another model: it knows nothing of a parameter of the bucket")
        return for_parameter[parameter]

    def synchronize(self) -> None:
        """Set the mean estimate anew from the workers' own, which rounding lets it drift from, about 1e-7 a round.

        All ranks must call it, between steps; once in some thousands of rounds is enough. It sends one full message.
        """
        group = self.process_group or dist.group.WORLD
        for slot in self._slots.values():
            if self._method.learns and slot.state is not None:
                assert slot.mean is not None
                slot.mean.copy_(_need(slot.state.estimate))
                dist.all_reduce(slot.mean, group=group)
                slot.mean.div_(dist.get_world_size(group))
                self.bytes_sent += slot.mean.numel() * slot.mean.element_size()

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank remembers, for a checkpoint: tensors and numbers only."""
        ranks = {"rank": dist.get_rank(self.process_group), "num_workers": dist.get_world_size(self.process_group)}
        return {**_saved(self._slots, self._method), **ranks, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from this rank's :meth:`state_dict`.

        Raises:
            ValueError: If it is of another method, rank, number of workers or model; then nothing changed.
        """
        _check_same(state_dict, "num_workers", dist.get_world_size(self.process_group))
        _check_same(state_dict, "rank", dist.get_rank(self.process_group))
        _load(self._slots, self._method, state_dict, ())
        self.bytes_sent = int(state_dict["bytes_sent"])


# No return type: DistributedDataParallel allows but torch.futures.Future, of whose base class alone torch's are.
def compression_hook(state: CompressionState, bucket: dist.GradBucket):  # type: ignore[no-untyped-def]
    """Exchange compressed gradients instead of averaging them: a communication hook of DistributedDataParallel.

    Every parameter is compressed on its own, the messages of a bucket are packed into one tensor of bytes, gathered
    from all ranks, and decoded in the order of ranks, so that all replicas compute the very same step. Rounds that send
    everything (the first one of ``init="full"``) are an all-reduce. A parameter whose gradient is zero on all ranks, as
    that of one nobody used, rests: what is remembered of it does not change. Weights of workers: as in
    :class:`CompressedDataParallel`.

    Args:
        state: Of this process.
        bucket: From DistributedDataParallel.

    Returns:
        The future of what to step along, written into the bucket.

    Raises:
        ValueError: If a gradient is not finite on any rank, inside the future: the backward pass of every rank ends in
            a RuntimeError that quotes it and names the parameter and the rank, with no state changed. On accelerators,
            where reading a number would stall the stream, a device assertion fails. So there is no place for
            ``GradScaler``, whose overflows and changes of scale would spoil the estimates: use bfloat16.

    Example:
        >>> # model = DistributedDataParallel(net)
        >>> # model.register_comm_hook(CompressionState(model, EControl(TopK(0.01))), compression_hook)

    Source:
        Gao et al. 2024, arXiv 2311.05645, algorithm 1.
    """
    group = state.process_group or dist.group.WORLD
    this_round = state._enter_round(first=bucket.index() == 0, last=bucket.is_last())
    buffer = bucket.buffer()
    parameters = bucket.parameters()
    pieces = buffer.split([parameter.numel() for parameter in parameters])
    drafts = [_Draft(state._slot(parameter), piece) for parameter, piece in zip(parameters, pieces, strict=True)]
    packed = [draft for draft in drafts if not draft.whole]
    whole = [draft for draft in drafts if draft.whole]

    # The extremes tell in one pass whether a gradient is finite and whether it is used at all.
    peaks = torch.stack([torch.stack(torch.aminmax(piece)) for piece in pieces]).abs().amax(1)
    status = (peaks > 0).byte() + 2 * peaks.isfinite().byte()
    sent = torch.cat([status, *(_bytes(tensor) for draft in packed for tensor in draft.sent.message.payload)])
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    state.bytes_sent += sent.numel()
    reduced, reduction = None, None
    if whole:
        reduced = torch.cat([draft.sent.change for draft in whole])
        state.bytes_sent += reduced.numel() * reduced.element_size()
        reduction = dist.all_reduce(reduced, group=group, async_op=True)
    gathering = dist.all_gather(received, sent, group=group, async_op=True)

    def finish(future: object) -> Tensor:
        if reduction is not None:
            reduction.wait()
        _use_on_this_stream(reduced, *received, *(tensor for draft in drafts for tensor in draft.tensors()))
        all_status = torch.stack([one[: len(drafts)] for one in received])
        checks.require(all_status >= 2, functools.partial(_blame, drafts, all_status))
        used = (all_status % 2 == 1).any(0)
        totals = _decode(packed, received, len(drafts))
        if reduced is not None:
            sizes = [draft.sent.change.numel() for draft in whole]
            totals |= dict(zip(whole, reduced.split(sizes), strict=True))
        for draft, piece, flag in zip(drafts, pieces, used, strict=True):
            draft.complete(totals[draft], flag, num_workers=len(received), out=piece)
        this_round.leave(drafts, at_once=buffer.is_cuda)
        return buffer

    return gathering.get_future().then(finish)


class _Slot:
    """What is remembered of one parameter."""

    def __init__(self, name: str, method: GradientExchange) -> None:
        self.name = name
        self.method = method
        self.state: WorkerState | None = None
        self.mean: Tensor | None = None

    @property
    def generator(self) -> torch.Generator | None:
        return getattr(self.method.compressor, "generator", None)

    def at(self, gradient: Tensor) -> tuple[GradientExchange, WorkerState]:
        """Return the method of this round and the state before it."""
        if self.state is None:
            return self.method.first(), self.method.begin(gradient)
        return self.method, self.state


class _Draft:
    """A round of one parameter, which counts once the gradients of all ranks are found to be sound."""

    def __init__(self, slot: _Slot, piece: Tensor) -> None:
        gradient = piece.to(_wide(piece.dtype))
        self.slot = slot
        method, self.before = slot.at(gradient)
        self.sent = method._encode(self.before, gradient)
        self.compressor = method.compressor
        self.whole = isinstance(self.compressor, Identity)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self.sent.state if tensor is not None]

    def complete(self, total_change: Tensor, used: Tensor, *, num_workers: int, out: Tensor) -> None:
        """Write what to step along into ``out``, given the sum of changes and whether any rank used the parameter."""
        self.used = used
        share = used.to(total_change.dtype) / num_workers
        if not self.slot.method.learns:
            torch.mul(total_change, share, out=out)
            return
        if self.slot.mean is None:
            self.mean = total_change * share
        else:
            self.mean = torch.addcmul(self.slot.mean, total_change, share)
        torch.mul(self.mean, used, out=out)

    def commit(self) -> None:
        """Take the round over, unless the parameter rests."""
        slot, after = self.slot, self.sent.state
        if self.used.is_cpu:
            slot.state = after if self.used else self.before
        else:
            # In place: what another stream may still read is then never given back to the allocator.
            for old, new in zip(self.before, after, strict=True):
                if old is not None and new is not None:
                    torch.where(self.used, new, old, out=old)
            slot.state = self.before
        if slot.method.learns:
            if slot.mean is None or self.used.is_cpu:
                slot.mean = self.mean
            else:
                slot.mean.copy_(self.mean)


class _Round:
    """The buckets of one backward pass: what they brought counts once all of them are there and sound."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.under_way = 0
        self.all_entered = False
        self.drafts: list[_Draft] = []

    def enter(self, last: bool) -> None:
        with self.lock:
            self.under_way += 1
            self.all_entered |= last

    def leave(self, drafts: list[_Draft], *, at_once: bool) -> None:
        # An accelerator does not survive an unsound gradient, and the buckets' streams do not wait for one another.
        with self.lock:
            self.under_way -= 1
            self.drafts += drafts
            if at_once or (self.all_entered and self.under_way == 0):
                for draft in self.drafts:
                    draft.commit()
                self.drafts = []


def _decode(drafts: list[_Draft], received: list[Tensor], start: int) -> dict[_Draft, Tensor]:
    """Add up the changes that the bytes of all ranks hold, from ``start`` on."""
    totals = {}
    for draft in drafts:
        payload = []
        for sample in draft.sent.message.payload:
            stop = start + sample.numel() * sample.element_size()
            # Stacked afresh, bytes lie where numbers of any size may begin.
            rows = torch.stack([one[start:stop] for one in received])
            payload.append(rows.view(sample.dtype).view(len(received), *sample.shape))
            start = stop
        totals[draft] = draft.compressor.sum(draft.sent.message._replace(payload=tuple(payload)))
    return totals


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _use_on_this_stream(*tensors: Tensor | None) -> None:
    """Keep the allocator from reusing memory of another stream before the callback's own is done with it."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _blame(drafts: list[_Draft], status: Tensor) -> str:
    """A gradient contains NaN or infinity."""
    rank, place = (status < 2).nonzero()[0].tolist()
    return f"gradient of {drafts[place].slot.name} contains NaN or infinity on rank {rank}"


def _need(part: Tensor | None) -> Tensor:
    if part is None:
        raise ValueError("state lacks what the method remembers: begin it by the same method")
    return part


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _slots(model: nn.Module, method: GradientExchange) -> dict[nn.Parameter, _Slot]:
    if not isinstance(method, GradientExchange):
        raise TypeError(f"method must be a GradientExchange such as EControl, got {type(method).__name__}")
    found = {
        parameter: _Slot(name, method.of_shape(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not found:
        raise ValueError("model has no parameter that requires a gradient")
    return found


def _saved(slots: dict[nn.Parameter, _Slot], method: GradientExchange) -> dict[str, Any]:
    found = {}
    for slot in slots.values():
        if slot.state is not None:
            named = {**slot.state._asdict(), "mean": slot.mean}
            found[slot.name] = {key: value for key, value in named.items() if value is not None}
    drawing = {slot.name: slot.generator.get_state() for slot in slots.values() if slot.generator is not None}
    return {"method": type(method).__name__, "parameters": found, "generators": drawing}


def _load(
    slots: dict[nn.Parameter, _Slot], method: GradientExchange, saved: dict[str, Any], batch: tuple[int, ...]
) -> None:
    _check_same(saved, "method", type(method).__name__)
    by_name = {slot.name: (parameter, slot) for parameter, slot in slots.items()}
    if unknown := set(saved["parameters"]) - set(by_name):
        raise ValueError(f"state_dict holds {sorted(unknown)}, which are not parameters of the model")
    if drawing := {slot.name for slot in slots.values() if slot.generator is not None} - set(saved["generators"]):
        raise ValueError(f"state_dict lacks the generators of {sorted(drawing)}")
    for name, tensors in saved["parameters"].items():
        wanted = (*batch, by_name[name][0].numel())
        for key, value in tensors.items():
            if key != "mean" and tuple(value.shape) != wanted:
                raise ValueError(f"state_dict: {key} of {name} must have shape {wanted}, got {tuple(value.shape)}")
    for name, (parameter, slot) in by_name.items():
        tensors = {
            # Copied: the state is updated in place, and the checkpoint remains the caller's.
            key: value.to(parameter.device, copy=True)
            for key, value in saved["parameters"].get(name, {}).items()
        }
        slot.mean = tensors.pop("mean", None)
        slot.state = None
        if name in saved["parameters"]:
            slot.state = WorkerState(tensors.get("memory"), tensors.get("estimate"))
        if slot.generator is not None:
            slot.generator.set_state(saved["generators"][name].cpu())


def _check_same(saved: dict[str, Any], key: str, wanted: Any) -> None:
    if saved.get(key) != wanted:
        raise ValueError(f"state_dict has {key} {saved.get(key)!r}, but this is {wanted!r}")


def _check_compressor(compressor: Compressor) -> None:
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be a Compressor such as TopK, got {type(compressor).__name__}")


def _check_eta(eta: float | Tensor) -> None:
    values = torch.as_tensor(eta)
    checks.require((values >= 0) & (values <= 1), lambda: f"eta must lie in [0.0, 1.0], got {eta}")


def _check_round(state: WorkerState, gradient: Tensor) -> None:
    checks.floating(gradient, "gradient")
    if gradient.dim() == 0 or gradient.numel() == 0:
        raise ValueError(f"gradient must have at least one element, got shape {tuple(gradient.shape)}")
    for name, value in state._asdict().items():
        if value is not None and value.shape != gradient.shape:
            raise ValueError(
                f"gradient must have the shape {tuple(value.shape)} of the state's {name}, got {tuple(gradient.shape)}"
            )
    check_finite(gradient, "gradient")
