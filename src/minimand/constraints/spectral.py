r"""Keep the singular values of weights within a bound, after every step of an optimizer.

A weight is measured by its operator norm from RMS to RMS, :math:`|W| = \sqrt{n/m}\,\|W\|_2` for :math:`W` of
:math:`m` rows and :math:`n` columns, so that entries of size one go to entries of size at most :math:`|W|` whatever the
widths; or by :math:`\|W\|_2` itself (``norm="l2"``). With :math:`\sigma_i` the singular values in that unit and the
largest allowed norm :math:`w`:

==========================  ==================================  ====================================================
soft cap                    :math:`p_2(p_1(\sigma_i))`          :math:`p_{1,2}(x) = x \mp \alpha x^3`; no decomposition
hard cap                    :math:`\min(\sigma_i, w)`           the nearest matrix; by odd polynomials, or exactly
normalisation               :math:`\sigma_i\min(1, w/\sigma_1)` scales the whole matrix
hammer                      :math:`\sigma_1 \to w`              the others stay, and may be above
spectral weight decay       :math:`\sigma_1 \to (1-\eta\lambda)\sigma_1`  the others stay
Stiefel                     :math:`\sigma_i \to w`              all of them
==========================  ==================================  ====================================================

The soft cap is made for optimizers whose step has a known norm, as Muon's: after a step of size :math:`\eta` with
weight decay :math:`\lambda` from within the set none exceeds :math:`k = w(1 - \eta\lambda) + \eta`, and the
strength :math:`\alpha` is the one for which :math:`p_2(p_1(k)) = w`. Small steps make it gentle.

A convolution's kernel is taken as the matrix of its output channels. That matrix has the stated norm; the operator
norm of the convolution is another number, up to the root of the kernel's size times larger.

Source: Newhouse, Hess, Cesista, Zahorodnii, Bernstein and Isola, "Training Transformers with Enforced Lipschitz
Constants", 2025, arXiv 2507.13338. The exact range of steps of the soft cap, and the scaled hard cap, are derived here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from .. import checks
from ..numerics import orthogonalize
from ..projections import Projection

# min(x, 1) on [0, 2.5], to 0.034. Divided by its largest value so that the bound is kept: to 0.045, never above 1.
_HARD_CAP = (
    (0.805032, 0.206361, -0.019763), (0.649867, 0.162935, -0.011150), (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)  # fmt: skip
_HARD_CAP_LARGEST = 1.010882
_HARD_CAP_RANGE = 2.5
_MOST_GROWTH = 81 / 62  # k / w up to which the soft cap is monotone: there alpha k^2 = 1/3
_POWER_ITERATIONS = 16


def rms_operator_norm(weight: Float[Tensor, "rows *columns"]) -> Float[Tensor, ""]:
    r"""Compute :math:`\sqrt{n/m}\,\sigma_1(W)`: by how much a weight can raise the root mean square of its input.

    Args:
        weight: A matrix, ``(rows, columns)``; a convolution's kernel is flattened to ``(channels, rest)``.

    Returns:
        The norm, by a singular value decomposition, in float32 or the weight's wider dtype.

    Raises:
        ValueError: If it is no matrix, is empty or not finite.

    Example:
        >>> rms_operator_norm(torch.eye(4)[:1])  # of four entries one is kept: RMS 1 can all sit there
        tensor(2.)

    Source:
        Newhouse et al. 2025, arXiv 2507.13338; Yang, Simon and Bernstein 2023, arXiv 2310.17813.
    """
    matrix = _as_matrix(weight)
    norm = torch.linalg.matrix_norm(_widened(matrix), ord=2)
    rows, columns = matrix.shape
    return norm / _unit(rows, columns, "rms")


@functools.lru_cache(maxsize=256)
def soft_cap_strength(max_norm: float, *, lr: float, weight_decay: float = 0.0) -> float:
    r"""Solve for the soft cap's :math:`\alpha` that takes the largest value a step can reach back to the bound.

    With :math:`k = w(1 - \eta\lambda) + \eta` and :math:`t = \alpha k^2`, the two cubic rounds take :math:`k` to
    :math:`k(1 - 3t^2 + 3t^3 - t^4)`. That is :math:`w` for one :math:`t` in [0, 1]. All of [0, k] stays below :math:`w`
    as long as :math:`t \le 1/3`, which is :math:`k \le 81/62\,w`: steps up to :math:`19/62\,w` without weight decay.

    Args:
        max_norm: w, the bound.
        lr: eta, the norm of the step.
        weight_decay: lambda, decoupled.

    Returns:
        alpha; 0 where the weight decay alone keeps the bound.

    Raises:
        ValueError: If the step is too large for the bound.

    Example:
        >>> alpha = soft_cap_strength(1.0, lr=0.1)
        >>> once = 1.1 - alpha * 1.1**3
        >>> round(once + alpha * once**3, 12)
        1.0

    Source:
        Newhouse et al. 2025, arXiv 2507.13338, the coupling of strength and learning rate; the range is derived here.
    """
    checks.positive(max_norm, "max_norm")
    checks.non_negative(lr, "lr")
    checks.non_negative(weight_decay, "weight_decay")
    reach = max_norm * (1 - lr * weight_decay) + lr
    if reach <= max_norm:
        return 0.0
    if reach > _MOST_GROWTH * max_norm:
        most = (_MOST_GROWTH - 1) * max_norm / (1 - max_norm * weight_decay)
        raise ValueError(
            f"the step must be at most {most:.4g} for a soft cap at {max_norm} with weight_decay {weight_decay}, "
            f"got {lr:.4g}: use SpectralHardCap for larger steps"
        )
    fall = 1 - max_norm / reach
    return float(brentq(lambda t: t * t * (3 - 3 * t + t * t) - fall, 0.0, 1.0, xtol=1e-16)) / reach**2


@dataclasses.dataclass(frozen=True)
class SpectralSoftCap(Projection):
    r"""Two cubic rounds that keep singular values below a bound after a step of known size.

    :math:`X \leftarrow X - \alpha X X^\top X`, then :math:`X \leftarrow X + \alpha X X^\top X`. With Muon of the same
    learning rate a weight within the bound stays within it: give it as :class:`minimand.optim.Muon`'s ``projection``.
    Half-way to the bound a singular value changes by less than one percent. Without a step (``lr=0``) a weight within
    the bound is left alone. Should a weight be further out than such a step can lead, after other optimizers or before
    the first step, it is scaled back to there first, by an estimate that 16 power iterations give.

    Args:
        max_norm: The paper's w_max.
        norm: ``"rms"`` for the operator norm from RMS to RMS, ``"l2"`` for the spectral norm. The step's norm is ``lr``
            from RMS to RMS in either case, as Muon's is.
        heads: Into how many blocks of rows the weight is divided, each with the bound of its own. A step of the
            whole weight can move one block by the root of ``heads`` times its own norm, and the cap allows for that.

    Example:
        >>> torch.linalg.svdvals(SpectralSoftCap(1.0)(torch.diag(torch.tensor([1.1, 0.5])), lr=0.1))
        tensor([1.0000, 0.4977])

    Source:
        Newhouse et al. 2025, arXiv 2507.13338, spectral soft cap.
    """

    max_norm: float
    _: dataclasses.KW_ONLY
    norm: str = "rms"
    heads: int = 1

    def __post_init__(self) -> None:
        _check_settings(self.max_norm, self.norm, self.heads)

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the capped weight.

        Raises:
            ValueError: If it is no matrix or not finite, or ``lr`` is too large for the bound.
        """

        def cap(x: Tensor) -> Tensor:
            rows, columns = x.shape[-2:]
            step = lr * _unit(rows * self.heads, columns, "rms") / _unit(rows, columns, self.norm)
            alpha = soft_cap_strength(self.max_norm, lr=step, weight_decay=weight_decay)
            reach = max(self.max_norm * (1 - step * weight_decay) + step, self.max_norm)
            x = _scaled_back(x, reach, _POWER_ITERATIONS)
            if alpha == 0:
                return x
            x = torch.sub(x, _times(x, _gram(x)), alpha=alpha)
            return torch.add(x, _times(x, _gram(x)), alpha=alpha)

        return _change(point, cap, norm=self.norm, heads=self.heads)


@dataclasses.dataclass(frozen=True)
class SpectralHardCap(Projection):
    r"""Lower the singular values above a bound to it, and leave the others: :math:`\min(\sigma_i, w)`.

    This is the nearest matrix within the bound. The polynomials stand for it to 0.045 of the bound, always on
    its inner side, for singular values up to 2.5 times the bound (a weight beyond is scaled back to there first).

    Args:
        max_norm: The paper's w_max.
        exact: By a singular value decomposition, rather than by four odd polynomials of degree five.
        norm: ``"rms"`` for the operator norm from RMS to RMS, ``"l2"`` for the spectral norm.
        heads: Into how many blocks of rows the weight is divided, each with the bound of its own.

    Example:
        >>> SpectralHardCap(1.0, exact=True)(torch.diag(torch.tensor([3.0, 0.5])))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Source:
        Newhouse et al. 2025, arXiv 2507.13338, spectral hard cap.
    """

    max_norm: float
    _: dataclasses.KW_ONLY
    exact: bool = False
    norm: str = "rms"
    heads: int = 1

    def __post_init__(self) -> None:
        _check_settings(self.max_norm, self.norm, self.heads)

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the capped weight.

        Raises:
            ValueError: If it is no matrix or not finite.
        """
        cap = self._exact if self.exact else self._polynomial
        return _change(point, cap, norm=self.norm, heads=self.heads)

    def _exact(self, x: Tensor) -> Tensor:
        u, sigma, v = torch.linalg.svd(x, full_matrices=False)
        return x - (u * (sigma - self.max_norm).clamp_min(0).unsqueeze(-2)) @ v

    def _polynomial(self, x: Tensor) -> Tensor:
        x = _scaled_back(x / self.max_norm, _HARD_CAP_RANGE, _POWER_ITERATIONS)
        for a, b, c in _HARD_CAP:
            gram = _gram(x)
            x = a * x + _times(x, b * gram + c * gram @ gram)
        return x * (self.max_norm / _HARD_CAP_LARGEST)


@dataclasses.dataclass(frozen=True)
class SpectralNormalize(Projection):
    r"""Scale a weight whose norm exceeds a bound back to it: :math:`W / \max(1, |W| / w)`.

    The norm comes from power iterations, which approach it from below, so the result may exceed the bound by what they
    miss: on average over starts a share of less than ``0.44 log(columns) / (num_iters - 1)``, and far less where there
    is a gap below the largest singular value.

    Args:
        max_norm: The paper's w_max.
        num_iters: Power iterations, from the same random vector each time. 16 as in the paper's code.
        norm: ``"rms"`` for the operator norm from RMS to RMS, ``"l2"`` for the spectral norm.
        heads: Into how many blocks of rows the weight is divided, each with the bound of its own.

    Example:
        >>> SpectralNormalize(1.0)(torch.diag(torch.tensor([2.0, 0.5])))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])

    Source:
        Miyato et al. 2018, arXiv 1802.05957; as a projection after each step: Gouk et al. 2018, arXiv 1804.04368;
        Newhouse et al. 2025, arXiv 2507.13338; error: Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992.
    """

    max_norm: float
    _: dataclasses.KW_ONLY
    num_iters: int = _POWER_ITERATIONS
    norm: str = "rms"
    heads: int = 1

    def __post_init__(self) -> None:
        _check_settings(self.max_norm, self.norm, self.heads, self.num_iters)

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the scaled weight.

        Raises:
            ValueError: If it is no matrix or not finite.
        """
        return _change(
            point, lambda x: _scaled_back(x, self.max_norm, self.num_iters), norm=self.norm, heads=self.heads
        )


@dataclasses.dataclass(frozen=True)
class SpectralHammer(Projection):
    r"""Set the largest singular value to a bound: :math:`W + (w - \sigma_1) u_1 v_1^\top`.

    As in the paper, also where it is below. The second singular value may exceed the bound, so this guarantees nothing;
    it is the paper's remedy for optimizers whose steps raise one direction at a time, as Adam's do.

    Args:
        max_norm: The paper's w_max.
        num_iters: Power iterations, from the same random vector each time.
        norm: ``"rms"`` for the operator norm from RMS to RMS, ``"l2"`` for the spectral norm.
        heads: Into how many blocks of rows the weight is divided, each treated on its own.

    Example:
        >>> torch.linalg.svdvals(SpectralHammer(1.0)(torch.diag(torch.tensor([2.0, 0.5]))))
        tensor([1.0000, 0.5000])

    Source:
        Newhouse et al. 2025, arXiv 2507.13338, spectral hammer.
    """

    max_norm: float
    _: dataclasses.KW_ONLY
    num_iters: int = _POWER_ITERATIONS
    norm: str = "rms"
    heads: int = 1

    def __post_init__(self) -> None:
        _check_settings(self.max_norm, self.norm, self.heads, self.num_iters)

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the weight with its largest singular value replaced.

        Raises:
            ValueError: If it is no matrix or not finite.
        """

        def hammer(x: Tensor) -> Tensor:
            sigma, u, v = _leading(x, self.num_iters)
            return x + (self.max_norm - sigma) * u @ v.mT

        return _change(point, hammer, norm=self.norm, heads=self.heads)


@dataclasses.dataclass(frozen=True)
class SpectralWeightDecay(Projection):
    r"""Shrink the largest singular value alone: :math:`W - \eta\lambda\,\sigma_1 u_1 v_1^\top`.

    Like decoupled weight decay it is proportional to the learning rate that a call is given, and does nothing without.
    It guarantees no bound.

    Args:
        strength: lambda, at least 0.
        num_iters: Power iterations, from the same random vector each time.
        heads: Into how many blocks of rows the weight is divided, each treated on its own.

    Example:
        >>> torch.linalg.svdvals(SpectralWeightDecay(0.5)(torch.diag(torch.tensor([2.0, 0.5])), lr=0.1))
        tensor([1.9000, 0.5000])

    Source:
        Newhouse et al. 2025, arXiv 2507.13338, spectral weight decay; the factor of the learning rate is ours.
    """

    strength: float
    _: dataclasses.KW_ONLY
    num_iters: int = _POWER_ITERATIONS
    heads: int = 1

    def __post_init__(self) -> None:
        checks.non_negative(self.strength, "strength")
        _check_settings(1.0, "l2", self.heads, self.num_iters)

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the weight with its largest singular value shrunk.

        Raises:
            ValueError: If it is no matrix or not finite.
        """
        share = lr * self.strength

        def decay(x: Tensor) -> Tensor:
            sigma, u, v = _leading(x, self.num_iters)
            return x - share * sigma * u @ v.mT

        return _change(point, decay, norm="l2", heads=self.heads)


@dataclasses.dataclass(frozen=True)
class Stiefel(Projection):
    r"""Set every singular value to one number: :math:`w\,U V^\top`, the nearest matrix of orthogonal columns or rows.

    Singular values below 0.003 of the Frobenius norm rise only part of the way, and zero stays zero.

    Args:
        max_norm: The paper's w_max.
        num_steps: Of :func:`minimand.numerics.orthogonalize`; 8 leave rounding errors.
        norm: ``"rms"`` for the operator norm from RMS to RMS, ``"l2"`` for the spectral norm.
        heads: Into how many blocks of rows the weight is divided, each treated on its own.

    Example:
        >>> torch.allclose(Stiefel(1.0)(torch.diag(torch.tensor([2.0, 0.5]))), torch.eye(2), atol=1e-6)
        True

    Source:
        Newhouse et al. 2025, arXiv 2507.13338; the polar factor is the nearest point: Fan and Hoffman, 1955.
    """

    max_norm: float = 1.0
    _: dataclasses.KW_ONLY
    num_steps: int = 8
    norm: str = "rms"
    heads: int = 1

    def __post_init__(self) -> None:
        _check_settings(self.max_norm, self.norm, self.heads, self.num_steps)

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the orthogonal weight.

        Raises:
            ValueError: If it is no matrix or not finite.
        """
        return _change(
            point,
            lambda x: self.max_norm * orthogonalize(x, num_steps=self.num_steps),
            norm=self.norm,
            heads=self.heads,
        )


def _change(weight: Tensor, change: Callable[[Tensor], Tensor], *, norm: str, heads: int) -> Tensor:
    """Apply ``change`` to a matrix, or one for each head, whose spectral norm is the weight's norm."""
    matrix = _as_matrix(weight)
    if len(matrix) % heads:
        raise ValueError(f"weight must have a multiple of heads = {heads} rows, got shape {tuple(weight.shape)}")
    # Singular values of bfloat16 products drift by a percent: more than the caps have to spare.
    blocks = _widened(matrix)
    if heads > 1:
        blocks = blocks.unflatten(0, (heads, -1))
    unit = _unit(blocks.shape[-2], blocks.shape[-1], norm)
    return (change(blocks / unit) * unit).reshape(weight.shape).to(weight.dtype)


def _as_matrix(weight: Tensor) -> Tensor:
    checks.floating(weight, "weight")
    if weight.dim() < 2:
        raise ValueError(f"weight must be a matrix, or a convolution's kernel, got shape {tuple(weight.shape)}")
    checks.not_empty(weight, "weight")
    # The largest entry is NaN or infinite if any is, and ten times faster to find than to look at each.
    checks.finite(weight.detach().abs().amax(), "weight")
    return weight.flatten(1)


def _widened(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _unit(rows: int, columns: int, norm: str) -> float:
    """Return the spectral norm of a matrix whose norm is 1."""
    return math.sqrt(rows / columns) if norm == "rms" else 1.0


def _check_settings(max_norm: float, norm: str, heads: int, num_iters: int = 1) -> None:
    checks.positive(max_norm, "max_norm")
    checks.one_of(norm, "norm", ("rms", "l2"))
    for name, value in (("heads", heads), ("the number of iterations", num_iters)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _gram(x: Tensor) -> Tensor:
    """Return the product of ``x`` with itself on its smaller side."""
    return x.mT @ x if x.shape[-2] >= x.shape[-1] else x @ x.mT


def _times(x: Tensor, gram: Tensor) -> Tensor:
    """Multiply ``x`` on its smaller side."""
    return x @ gram if x.shape[-2] >= x.shape[-1] else gram @ x


def _scaled_back(x: Tensor, max_norm: float, num_iters: int) -> Tensor:
    sigma, _, _ = _leading(x, num_iters)
    return x / (sigma / max_norm).clamp_min(1)


def _leading(x: Tensor, num_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the largest singular value ``(*, 1, 1)`` from below, and its vectors, by power iterations."""
    with torch.no_grad():
        # With a largest entry of 1, sigma lies in [1, size]: four rounds neither over- nor underflow.
        scaled = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        transposed = scaled.mT
        # Always the same start, so that a projection is a function of the weight alone. Some row of the weight would
        # not do: it may be orthogonal to what is sought.
        generator = torch.Generator(x.device).manual_seed(0)
        start = torch.randn(x.shape[-1], 1, generator=generator, device=x.device, dtype=x.dtype)
        v = start.expand(*x.shape[:-2], *start.shape)
        for iteration in range(num_iters):
            v = transposed @ (scaled @ v)
            # Not every time: on a small matrix the cost is the number of kernels.
            if iteration % 4 == 3 or iteration == num_iters - 1:
                v = torch.nn.functional.normalize(v, dim=-2)
        u = torch.nn.functional.normalize(scaled @ v, dim=-2)
    return u.mT @ (x @ v), u, v
