r"""Compressors of gradients: what a worker sends in place of a vector, packed to the bytes that really travel.

A compressor C is contractive with :math:`\delta \in (0, 1]` if for every vector v

.. math:: E \|C(v) - v\|_2^2 \le (1 - \delta) \|v\|_2^2.

All of them here are positively homogeneous, :math:`C(cv) = c\,C(v)`, biased, and act on the last dimension, so that the
vectors of many workers are compressed at once.

Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599 (top-k, rand-k);
Karimireddy, Rebjock, Stich and Jaggi, ICML 2019, arXiv 1901.09847 (scaled sign); Vogels, Karimireddy and Jaggi,
"PowerSGD", NeurIPS 2019, arXiv 1905.13727 (low rank).
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks

# Places travel as 32-bit integers.
_MOST_DIM = 2**31 - 1


class Message(NamedTuple):
    """What travels, and what the receiver knows anyway.

    Attributes:
        payload: The tensors that are sent, ``(*batch, ...)``.
        dim: Length of the vectors that were compressed.
        dtype: Their dtype.
    """

    payload: tuple[Tensor, ...]
    dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the payload, of all the messages of a batch together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.payload)

    def row(self, index: int) -> Message:
        """Return one message of a batch."""
        return self._replace(payload=tuple(tensor[index] for tensor in self.payload))


class Compressor(abc.ABC):
    """Turns vectors into short messages and messages into vectors."""

    def compress(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Pack a vector, or a batch of them, into a message.

        Args:
            vector: Finite; the last dimension is compressed.

        Raises:
            ValueError: If the vector is empty, longer than 2^31 - 1, or not finite.
        """
        checks.floating(vector, "vector")
        if vector.dim() == 0 or vector.numel() == 0:
            raise ValueError(f"vector must have at least one element, got shape {tuple(vector.shape)}")
        if vector.shape[-1] > _MOST_DIM:
            raise ValueError(f"vector must have at most 2^31 - 1 elements, got {vector.shape[-1]}")
        check_finite(vector, "vector")
        return self.pack(vector)

    @abc.abstractmethod
    def pack(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Do what :meth:`compress` does, without its checks: what comes of numbers that are not finite is undefined."""

    @abc.abstractmethod
    def decompress(self, message: Message) -> Float[Tensor, "*batch dim"]:
        """Unpack a message, or a batch of them, into vectors of the dtype that was compressed."""

    @abc.abstractmethod
    def delta(self, dim: int) -> float:
        r"""Return the :math:`\delta` that holds for all vectors of that length."""

    def of_shape(self, shape: Sequence[int]) -> Compressor:
        """Return the compressor for vectors that are flattened tensors of that shape.

        One that draws gets a generator of its own, seeded from this one's: then the order in which a model's tensors
        come makes no difference.
        """
        return self

    def add_to(self, total: Float[Tensor, " dim"], message: Message) -> None:
        """Add the vector of one message to ``total``, in place."""
        total += self.decompress(message)

    def sum(self, message: Message) -> Float[Tensor, " dim"]:
        """Add up the vectors of a batch of messages ``(workers, ...)``.

        One after the other, so that the dense vectors of all workers never exist at once and every receiver rounds
        alike: sums in an order of the device's choosing would let replicas of a model drift apart.
        """
        workers = message.payload[0].shape[0]
        total = torch.zeros(message.dim, dtype=message.dtype, device=message.payload[0].device)
        for worker in range(workers):
            self.add_to(total, message.row(worker))
        return total


@final
class Identity(Compressor):
    r"""Send the vector as it is: :math:`\delta = 1`.

    Example:
        >>> Identity().compress(torch.ones(3)).nbytes
        12

    Source:
        No compression: the baseline of every study of compressors.
    """

    def __repr__(self) -> str:
        return "Identity()"

    def pack(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Send the vector."""
        return Message((vector,), vector.shape[-1], vector.dtype)

    def decompress(self, message: Message) -> Float[Tensor, "*batch dim"]:
        """Return the vector."""
        return message.payload[0]

    def delta(self, dim: int) -> float:
        """Return 1."""
        return 1.0


class _Sparsifier(Compressor):
    """Sends k entries of a vector as they are, or rounded to a shorter dtype."""

    ratio: float | None
    k: int | None
    dtype: torch.dtype | None

    @abc.abstractmethod
    def _indices(self, message: Message) -> Tensor:
        """Return which entries were sent, int64 ``(*batch, k)``."""

    def count(self, dim: int) -> int:
        """Return how many of ``dim`` entries are sent: the ratio of them, rounded up, or at most k."""
        if self.k is not None:
            return min(self.k, dim)
        assert self.ratio is not None
        # Rounding of the product itself must not add an entry: 0.07 * 100 is a little above 7.
        return min(max(math.ceil(self.ratio * dim * (1 - 1e-12)), 1), dim)

    def delta(self, dim: int) -> float:
        """Return the share of entries that are sent, less what rounding loses."""
        lost = 0.0 if self.dtype is None else (torch.finfo(self.dtype).eps / 2) ** 2
        return self.count(dim) / dim * (1 - lost)

    def decompress(self, message: Message) -> Float[Tensor, "*batch dim"]:
        """Put the entries in their places, and zeros elsewhere."""
        values = message.payload[1].to(message.dtype)
        return values.new_zeros(*values.shape[:-1], message.dim).scatter_(-1, self._indices(message), values)

    def add_to(self, total: Float[Tensor, " dim"], message: Message) -> None:
        """Add the entries to ``total`` in their places."""
        total.index_add_(0, self._indices(message), message.payload[1].to(total.dtype))

    def _round(self, values: Tensor) -> Tensor:
        if self.dtype is None:
            return values
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype)


def _check_sparsity(ratio: float | None, k: int | None, dtype: torch.dtype | None) -> None:
    if (ratio is None) == (k is None):
        raise ValueError(f"give either ratio or k, got ratio={ratio} and k={k}")
    if ratio is not None:
        checks.between(ratio, "ratio", 0.0, 1.0, low_open=True)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")


@final
class TopK(_Sparsifier):
    r"""Send the k entries that are largest in absolute value: :math:`\delta = k/d`, and far more where few dominate.

    Their places travel as 32-bit integers.

    Args:
        ratio: Share of entries to send, in (0, 1], rounded up to at least one entry.
        k: How many entries to send, in place of ``ratio``; all of a shorter vector.
        dtype: What to round the entries to on their way. ``torch.bfloat16`` halves their bytes; ``torch.float16`` loses
            entries below 6e-8 and cuts those above 65504. None: not rounded.

    Example:
        >>> compressor = TopK(k=1)
        >>> message = compressor.compress(torch.tensor([1.0, -3.0, 2.0]))
        >>> compressor.decompress(message), message.nbytes
        (tensor([ 0., -3.,  0.]), 8)

    Source:
        Stich et al. 2018, arXiv 1809.07599, definition 2.1.
    """

    def __init__(self, ratio: float | None = None, *, k: int | None = None, dtype: torch.dtype | None = None) -> None:
        _check_sparsity(ratio, k, dtype)
        self.ratio, self.k, self.dtype = ratio, k, dtype

    def __repr__(self) -> str:
        return f"TopK(ratio={self.ratio}, k={self.k}, dtype={self.dtype})"

    def pack(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Find the largest entries."""
        dim = vector.shape[-1]
        indices = vector.abs().topk(self.count(dim), dim=-1, sorted=False).indices
        values = self._round(vector.gather(-1, indices))
        return Message((indices.to(torch.int32), values), dim, vector.dtype)

    def _indices(self, message: Message) -> Tensor:
        return message.payload[0].long()


@final
class RandK(_Sparsifier):
    r"""Send k random entries, whose places the receiver rebuilds from eight bytes: :math:`\delta = k/d` in expectation.

    The places are :math:`a, a + b, a + 2b, \dots` modulo d for random a and b, of which b has no common factor with d;
    these two travel. Every entry is sent with probability exactly k/d, which is all that the expectation depends on
    (and every pair as often as in a uniform subset if d is prime). The places are found in O(k), and are the same on
    any device. Entries are not scaled up by d/k: the message is contractive rather than unbiased.

    Args:
        ratio: Share of entries to send, in (0, 1], rounded up to at least one entry.
        k: How many entries to send, in place of ``ratio``; all of a shorter vector.
        generator: Draws the places. Workers may share a seed or not.
        dtype: What to round the entries to on their way, see :class:`TopK`. None: not rounded.

    Example:
        >>> compressor = RandK(0.5, generator=torch.Generator().manual_seed(0))
        >>> compressor.decompress(compressor.compress(torch.ones(6))).sum()
        tensor(3.)

    Source:
        Stich et al. 2018, arXiv 1809.07599, definition 2.1; the choice of places is this library's.
    """

    def __init__(
        self,
        ratio: float | None = None,
        *,
        k: int | None = None,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_sparsity(ratio, k, dtype)
        self.ratio, self.k, self.dtype, self.generator = ratio, k, dtype, generator

    def __repr__(self) -> str:
        return f"RandK(ratio={self.ratio}, k={self.k}, dtype={self.dtype})"

    def of_shape(self, shape: Sequence[int]) -> RandK:
        """Return the compressor with a generator of its own."""
        return RandK(self.ratio, k=self.k, generator=_child(self.generator), dtype=self.dtype)

    def pack(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Draw the places and pick their entries."""
        dim = vector.shape[-1]
        message = Message((self._progression(vector.shape[:-1], dim).to(vector.device), vector), dim, vector.dtype)
        return message._replace(payload=(message.payload[0], self._round(vector.gather(-1, self._indices(message)))))

    def _indices(self, message: Message) -> Tensor:
        first, stride = message.payload[0].long().split(1, dim=-1)
        steps = torch.arange(self.count(message.dim), device=first.device)
        return (first + stride * steps) % message.dim

    def _progression(self, batch: torch.Size, dim: int) -> Tensor:
        """Draw the first place and the stride, int32 ``(*batch, 2)``."""
        draw = functools.partial(torch.randint, generator=self.generator, device=self.generator.device)
        first = draw(0, dim, (*batch, 1))
        # Below 2^31 at least one number in seven is free of common factors: 128 trials fail once in 10^8 draws.
        tried = draw(1, max(dim, 2), (*batch, 128))
        tried[..., -1] = 1
        free = torch.gcd(tried, torch.full_like(tried, dim)) == 1
        stride = tried.gather(-1, free.byte().argmax(-1, keepdim=True))
        return torch.cat([first, stride], -1).to(torch.int32)


@final
class SignMean(Compressor):
    r"""Send the signs, one bit each, and the mean absolute value m: :math:`C(v) = m\,\mathrm{sign}(v)`.

    The error is exactly :math:`\|v\|_2^2 - \|v\|_1^2 / d`, so :math:`\delta = \|v\|_1^2 / (d \|v\|_2^2)`: 0.64 for
    normal entries, but 1/d for a vector with a single one. Zero counts as positive.

    Example:
        >>> compressor = SignMean()
        >>> message = compressor.compress(torch.tensor([1.0, -3.0, 2.0]))
        >>> compressor.decompress(message), message.nbytes
        (tensor([ 2., -2.,  2.]), 5)

    Source:
        Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1 and lemma 8.
    """

    def __repr__(self) -> str:
        return "SignMean()"

    def pack(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Pack the signs eight to a byte, entry i into byte i modulo the number of bytes."""
        dim = vector.shape[-1]
        scale = vector.abs().mean(-1, keepdim=True)
        # Eight long rows rather than many short ones: then every operation runs along memory.
        bits = torch.nn.functional.pad(vector >= 0, (0, -dim % 8)).view(torch.uint8).unflatten(-1, (8, -1))
        packed = bits[..., 0, :].clone()
        for place in range(1, 8):
            packed |= bits[..., place, :] << place
        return Message((scale, packed), dim, vector.dtype)

    def decompress(self, message: Message) -> Float[Tensor, "*batch dim"]:
        """Give every sign the mean absolute value."""
        scale, packed = message.payload
        places = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
        bits = ((packed[..., None, :] >> places) & 1).flatten(-2)[..., : message.dim]
        return bits.to(message.dtype).sub_(0.5).mul_(2 * scale)

    def delta(self, dim: int) -> float:
        """Return 1 / dim, which a vector with one entry attains."""
        return 1 / dim


@final
class LowRank(Compressor):
    r"""Send the matrix as a product :math:`P (P^\top M)` with r orthonormal columns in P, found from a random start.

    :math:`\delta = r / \min(\mathrm{rows}, \mathrm{columns})` in expectation: the projection on the range of
    :math:`MQ` keeps at least :math:`\|MQ\|^2`, and for random orthonormal Q that is r/columns of :math:`\|M\|^2`. The
    smaller side takes the part of the columns. Every call starts anew: a start kept from one method's vectors would be
    wrong for another's. Where two factors are no shorter than the matrix, it is sent whole, :math:`\delta = 1`.

    Args:
        rank: How many columns, at least 1.
        rows: Rows of the matrix that the vector flattens; None: near the square root of its length. The last row is
            filled up with zeros. Where the shape of a parameter is known (in :class:`CompressionState`), its first
            dimension gives the rows.
        num_iters: Sweeps of subspace iteration, at least 1, each at two products with the matrix. 2 here; PowerSGD does
            one, from the last round's start.
        generator: Draws the starts.

    Example:
        >>> compressor = LowRank(1, rows=6, generator=torch.Generator().manual_seed(0))
        >>> matrix = torch.outer(torch.arange(6.0), torch.ones(8))
        >>> message = compressor.compress(matrix.flatten())
        >>> torch.allclose(compressor.decompress(message), matrix.flatten(), atol=1e-5), message.nbytes
        (True, 56)

    Source:
        Vogels et al. 2019, arXiv 1905.13727, algorithm 1 without its warm start.
    """

    def __init__(self, rank: int, *, rows: int | None = None, num_iters: int = 2, generator: torch.Generator) -> None:
        for name, value in (("rank", rank), ("rows", rows), ("num_iters", num_iters)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.rank, self.rows, self.num_iters, self.generator = rank, rows, num_iters, generator

    def __repr__(self) -> str:
        return f"LowRank({self.rank}, rows={self.rows}, num_iters={self.num_iters})"

    def of_shape(self, shape: Sequence[int]) -> LowRank:
        """Return the compressor with the first dimension of the shape as its rows, and a generator of its own."""
        rows = shape[0] if len(shape) > 0 else 1
        return LowRank(self.rank, rows=rows, num_iters=self.num_iters, generator=_child(self.generator))

    def pack(self, vector: Float[Tensor, "*batch dim"]) -> Message:
        """Find the factors."""
        dim = vector.shape[-1]
        rows, columns = self._matrix(dim)
        if self._is_whole(dim):
            return Message((vector,), dim, vector.dtype)
        matrix = torch.nn.functional.pad(vector, (0, rows * columns - dim)).unflatten(-1, (rows, columns))
        if rows < columns:
            matrix = matrix.mT
        start = (*matrix.shape[:-2], matrix.shape[-1], self.rank)
        right = torch.randn(start, generator=self.generator, device=self.generator.device, dtype=vector.dtype)
        right = right.to(matrix.device)
        for _ in range(self.num_iters):
            # QR of zeros gives unit columns, so a zero matrix needs no case of its own.
            left = torch.linalg.qr(matrix @ torch.linalg.qr(right).Q).Q
            right = matrix.mT @ left
        return Message((left, right), dim, vector.dtype)

    def decompress(self, message: Message) -> Float[Tensor, "*batch dim"]:
        """Multiply the factors."""
        if len(message.payload) == 1:
            return message.payload[0]
        left, right = message.payload
        rows, columns = self._matrix(message.dim)
        matrix = right @ left.mT if rows < columns else left @ right.mT
        return matrix.flatten(-2)[..., : message.dim]

    def delta(self, dim: int) -> float:
        """Return the rank over the smaller side, 1 if the matrix is sent whole."""
        return 1.0 if self._is_whole(dim) else self.rank / min(self._matrix(dim))

    def _matrix(self, dim: int) -> tuple[int, int]:
        rows = math.isqrt(dim - 1) + 1 if self.rows is None else min(self.rows, dim)
        return rows, -(-dim // rows)

    def _is_whole(self, dim: int) -> bool:
        return self.rank * sum(self._matrix(dim)) >= dim


def _child(generator: torch.Generator) -> torch.Generator:
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)


def check_finite(value: Tensor, name: str) -> None:
    """Raise unless every element is finite, by the extremes, in a tenth of the time of looking at each."""
    checks.finite(torch.stack(torch.aminmax(value.detach())), name)
