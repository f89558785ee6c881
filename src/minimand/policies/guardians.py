r"""Guardians: which rows a log covers well enough for what was learnt from it to be trusted there.

A guardian scores rows :math:`x`, states with actions or a short history of both; the larger the score, the better
covered. It holds :math:`x` to be inside where the score reaches a threshold :math:`\tau`:

- a kernel density of the logged rows, :math:`\log \frac1N \sum_i \mathcal N(x; x_i, \sigma^2 I)`;
- the Christoffel function, :math:`-\log v(x)` with the sum of squares
  :math:`v(x) = z(x)^\top (\frac1N \sum_i z(x_i) z(x_i)^\top + \lambda I)^{-1} z(x)` of the monomials :math:`z` up to
  a degree: the closed form of the smallest polynomial sublevel set around data. Its mean over the log is the number of
  monomials (at :math:`\lambda = 0`), and it does not change under affine maps of the rows;
- how often exactly this row was logged, where states and actions are discrete.

The threshold leaves the share :math:`\alpha` of the worst covered logged rows outside. A guardian has seen these, so
new rows of the same origin fall outside more often. With rows held out for calibration the k-th smallest of their n
scores can be taken instead: as the mass below it has a Beta(k, n + 1 - k) law whatever the scores' own,

.. math:: P(\text{mass inside} \ge 1 - \alpha) = P(\mathrm{Binomial}(n, \alpha) \ge k),

and the largest k that keeps this above the confidence asked for is used.

Source: Yan, Shen, Wachi, Gros, Zhao and Hu 2025, arXiv 2505.16242 (guardian, density and polynomial sublevel sets);
Lasserre and Pauwels 2019, arXiv 1701.02886 (Christoffel function); Wilks 1941 (tolerance sets).
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor, nn

from .. import checks
from .features import check_rows, feature_limits, monomials

_PAIRS_AT_ONCE = 2**22


def coverage_threshold(
    scores: Float[Tensor, " rows"], *, alpha: float, confidence: float | None = None
) -> Float[Tensor, ""]:
    r"""Compute the threshold that at least the share :math:`1 - \alpha` of rows reaches.

    Args:
        scores: Of rows; for a statement about new rows, of rows that the guardian was not fitted to.
        alpha: The share that may lie outside, in (0, 1).
        confidence: None: of these rows at least :math:`1 - \alpha` reach it, and at most one row more. A number in
            (0, 1): of the law they were drawn from, in at least this share of draws.

    Returns:
        One of the scores.

    Raises:
        ValueError: If there are too few rows for the confidence, a score is not finite, or an argument out of range.

    Example:
        >>> coverage_threshold(torch.arange(10.0), alpha=0.2), coverage_threshold(
        ...     torch.arange(100.0), alpha=0.1, confidence=0.9)
        (tensor(2.), tensor(5.))

    Source:
        Wilks, "Determination of sample sizes for setting tolerance limits", Annals of Mathematical Statistics 12, 1941.
    """
    checks.floating(scores, "scores")
    checks.not_empty(scores, "scores")
    checks.finite(scores, "scores")
    checks.between(alpha, "alpha", 0.0, 1.0, low_open=True, high_open=True)
    count = len(scores)
    if confidence is None:
        rank = int(alpha * count) + 1
    else:
        checks.between(confidence, "confidence", 0.0, 1.0, low_open=True, high_open=True)
        # P(Binomial >= k) falls with k: as many ranks keep the confidence as the largest that does.
        rank = int((stats.binom.sf(range(count), count, alpha) >= confidence).sum())
        if rank < 1:
            raise ValueError(
                f"confidence {confidence} that {1 - alpha:.4g} of the mass lies inside needs more than {count} rows"
            )
    return scores.kthvalue(rank).values


class Guardian(nn.Module, abc.ABC):
    """What every guardian answers: how well rows are covered, and whether well enough.

    ``guardian(rows)`` is the margin, score less threshold: at least 0 inside.
    """

    threshold: Tensor

    @abc.abstractmethod
    def fit(self, rows: Float[Tensor, "rows features"]) -> Guardian:
        """Learn what the log covers.

        Args:
            rows: Logged states with actions, one row a step.
        """

    @abc.abstractmethod
    def score(self, rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Return how well rows are covered: the larger, the better.

        Args:
            rows: As many features as those of the fit.
        """

    def inside(self, rows: Float[Tensor, "batch features"]) -> Bool[Tensor, " batch"]:
        """Tell which rows are covered well enough.

        Args:
            rows: As many features as those of the fit.
        """
        with torch.no_grad():
            return self.score(rows) >= self.threshold

    def forward(self, rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Return the margin of rows ``(batch, features)``: at least 0 inside."""
        return self.score(rows) - self.threshold

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The buffers' sizes are the log's: an unfitted guardian takes those of the checkpoint.
        for name, buffer in self.named_buffers(recurse=False):
            if isinstance(saved := state_dict.get(prefix + name), Tensor):
                setattr(self, name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class KernelDensityGuardian(Guardian):
    r"""A guardian by the Gaussian kernel density of the logged rows, each feature scaled to [-1, 1].

    It keeps the log: a score costs one kernel a logged row. Beyond about 20 features, densities tell little.

    Args:
        bandwidth: The kernel's standard deviation sigma, above 0, in scaled features; 0.535 in the official code.
        alpha: The share of rows that lies outside, in (0, 1); 0.05 in the official code.

    Attributes:
        threshold: The least log-density inside.

    Example:
        >>> rows = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> guardian = KernelDensityGuardian(0.3).fit(rows)
        >>> guardian.inside(torch.tensor([[0.5, 0.5], [1.5, 0.5]]))
        tensor([ True, False])

    Source:
        Yan et al. 2025, arXiv 2505.16242 and its official code; the density is normalised here.
    """

    rows: Tensor
    center: Tensor
    half_range: Tensor

    def __init__(self, bandwidth: float = 0.535, *, alpha: float = 0.05) -> None:
        super().__init__()
        checks.positive(bandwidth, "bandwidth")
        checks.between(alpha, "alpha", 0.0, 1.0, low_open=True, high_open=True)
        self.bandwidth, self.alpha = bandwidth, alpha
        self.register_buffer("rows", torch.empty(0, 0))
        self.register_buffer("center", torch.empty(0))
        self.register_buffer("half_range", torch.empty(0))
        self.register_buffer("threshold", torch.tensor(0.0))

    @torch.no_grad()
    def fit(
        self,
        rows: Float[Tensor, "rows features"],
        *,
        calibration: Float[Tensor, "held_out features"] | None = None,
        confidence: float | None = None,
    ) -> KernelDensityGuardian:
        """Learn what the log covers.

        Args:
            rows: Logged states with actions, one row a step.
            calibration: Rows held out of ``rows`` that set the threshold; None: the rows themselves do.
            confidence: See :func:`coverage_threshold`; only with calibration rows.

        Raises:
            ValueError: If rows are empty or not finite, or there are too few for the confidence.
        """
        self.center, self.half_range = feature_limits(rows)
        self.rows = (rows - self.center) / self.half_range
        self.threshold = _threshold(self, rows, calibration, confidence, self.alpha)
        return self

    def score(self, rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Return log-densities of scaled rows.

        Args:
            rows: As many features as those of the fit.
        """
        check_rows(rows, self.rows.shape[1])
        scaled = ((rows.to(self.rows) - self.center) / self.half_range) / self.bandwidth
        logged = self.rows / self.bandwidth
        offset = -0.5 * logged.square().sum(1)
        sums = [
            torch.addmm(offset, part, logged.mT).logsumexp(1) - 0.5 * part.square().sum(1)
            for part in scaled.split(max(_PAIRS_AT_ONCE // len(logged), 1))
        ]
        kernel = len(logged) * (2 * torch.pi) ** (logged.shape[1] / 2) * self.bandwidth ** logged.shape[1]
        return torch.cat(sums) - torch.tensor(kernel, dtype=torch.float64).log().item()

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"bandwidth={self.bandwidth}, alpha={self.alpha}"


class ChristoffelGuardian(Guardian):
    r"""A guardian by the Christoffel function: inside is a sublevel set of a sum-of-squares polynomial.

    It keeps a matrix and no log: :math:`\binom{p + d}{d}^2` numbers for p features and degree d.

    Args:
        degree: d, at least 1; 3 in our study.
        alpha: The share of rows that lies outside, in (0, 1); 0.05 as for densities.
        regularization: lambda, at least 0, added to the diagonal of the moments of monomials of scaled rows.

    Attributes:
        threshold: Minus the logarithm of the largest :math:`v` inside.

    Example:
        >>> angle = torch.linspace(0, 6.28, 200)
        >>> ring = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 1.1]).repeat(100)[:, None]
        >>> guardian = ChristoffelGuardian(4).fit(ring)
        >>> guardian.inside(torch.tensor([[0.0, 1.05], [0.0, 0.0]]))  # on the ring, and in its hole
        tensor([ True, False])

    Source:
        Lasserre and Pauwels 2019, arXiv 1701.02886, section 3; as a closed form of the sum-of-squares guardian of
        Yan et al. 2025, arXiv 2505.16242, ours.
    """

    whitening: Tensor
    center: Tensor
    half_range: Tensor

    def __init__(self, degree: int = 3, *, alpha: float = 0.05, regularization: float = 1e-6) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree must be at least 1, got {degree}")
        checks.between(alpha, "alpha", 0.0, 1.0, low_open=True, high_open=True)
        checks.non_negative(regularization, "regularization")
        self.degree, self.alpha, self.regularization = degree, alpha, regularization
        self.register_buffer("whitening", torch.empty(0, 0))
        self.register_buffer("center", torch.empty(0))
        self.register_buffer("half_range", torch.empty(0))
        self.register_buffer("threshold", torch.tensor(0.0))

    @torch.no_grad()
    def fit(
        self,
        rows: Float[Tensor, "rows features"],
        *,
        calibration: Float[Tensor, "held_out features"] | None = None,
        confidence: float | None = None,
    ) -> ChristoffelGuardian:
        """Learn what the log covers.

        Args:
            rows: Logged states with actions, one row a step.
            calibration: Rows held out of ``rows`` that set the threshold; None: the rows themselves do.
            confidence: See :func:`coverage_threshold`; only with calibration rows.

        Raises:
            ValueError: If rows are empty or not finite, there are too few for the confidence, or their moments are
                singular and ``regularization`` does not make up for it.
        """
        self.center, self.half_range = feature_limits(rows)
        # The moments' condition number is that of the monomials, squared: single precision is not enough.
        z = monomials((rows.double() - self.center) / self.half_range, degree=self.degree)
        moments = z.mT @ z / len(z)
        moments.diagonal().add_(self.regularization)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if bool(failed) or float(factor.diagonal().min()) < 1e-7:
            raise ValueError(
                f"regularization {self.regularization} leaves the moments of {z.shape[1]} monomials of {len(z)} rows "
                "singular: raise it, lower the degree, or drop features that others determine"
            )
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.whitening = torch.linalg.solve_triangular(factor, identity, upper=False).to(rows)
        self.threshold = _threshold(self, rows, calibration, confidence, self.alpha)
        return self

    def polynomial(self, rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Return the sum of squares :math:`v` at rows; its mean over the fitted ones is the number of monomials.

        Args:
            rows: As many features as those of the fit.
        """
        check_rows(rows, len(self.center))
        z = monomials((rows.to(self.center) - self.center) / self.half_range, degree=self.degree)
        return (z @ self.whitening.mT).square().sum(1)

    def score(self, rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        r"""Return :math:`-\log v`.

        Args:
            rows: As many features as those of the fit.
        """
        return -self.polynomial(rows).log()

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"degree={self.degree}, alpha={self.alpha}, regularization={self.regularization}"


class CountGuardian(Guardian):
    """A guardian of discrete rows, such as states with actions: inside is what was logged often enough.

    Args:
        min_count: The fewest times, at least 1.

    Example:
        >>> guardian = CountGuardian(2).fit(torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 0.0]]))
        >>> guardian.score(torch.tensor([[0.0, 1.0], [3.0, 0.0], [3.0, 1.0]]))
        tensor([2., 1., 0.])

    Source:
        Laroche, Trichelair and Tachet des Combes 2019, arXiv 1712.06924 (a minimal count); as a guardian in the sense
        of Yan et al. 2025, arXiv 2505.16242, ours.
    """

    rows: Tensor
    counts: Tensor

    def __init__(self, min_count: int = 10) -> None:
        super().__init__()
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        self.min_count = min_count
        self.register_buffer("rows", torch.empty(0, 0))
        self.register_buffer("counts", torch.empty(0))
        self.register_buffer("threshold", torch.tensor(float(min_count)))

    @torch.no_grad()
    def fit(self, rows: Float[Tensor, "rows features"]) -> CountGuardian:
        """Count the rows of the log.

        Args:
            rows: Logged states with actions, one row a step; equal rows are the same.

        Raises:
            ValueError: If rows are empty or not finite.
        """
        check_rows(rows)
        checks.not_empty(rows, "rows")
        self.rows, counts = torch.unique(rows, dim=0, return_counts=True)
        self.counts, self.threshold = counts.to(rows.dtype), self.threshold.to(rows)
        return self

    @torch.no_grad()
    def score(self, rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Return how often rows were logged.

        Args:
            rows: As many features as those of the fit.
        """
        check_rows(rows, self.rows.shape[1])
        known = len(self.rows)
        _, place = torch.unique(torch.cat([self.rows, rows.to(self.rows)]), dim=0, return_inverse=True)
        return torch.zeros_like(place, dtype=self.counts.dtype).index_add_(0, place[:known], self.counts)[place[known:]]

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"min_count={self.min_count}"


def _threshold(
    guardian: Guardian, rows: Tensor, calibration: Tensor | None, confidence: float | None, alpha: float
) -> Tensor:
    if confidence is not None and calibration is None:
        raise ValueError(f"confidence {confidence} wants calibration rows: of the fitted ones it would not be true")
    return coverage_threshold(
        guardian.score(rows if calibration is None else calibration), alpha=alpha, confidence=confidence
    )
