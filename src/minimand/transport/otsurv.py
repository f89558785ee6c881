r"""OTSurv: pool a bag of instances by partial transport onto prototypes, and predict survival from it.

The instances of a bag, with masses :math:`a` that add up to one, are moved onto prototypes at the cost :math:`C` by

.. math:: \min_{Q \ge 0,\; Q \mathbf 1 \le a,\; \mathbf 1^\top Q \mathbf 1 = \rho}
          \langle C, Q \rangle + \gamma\,KL(Q^\top \mathbf 1 \,\|\, \rho\, b)
          + \varepsilon \sum_{ij} Q_{ij} (\log Q_{ij} - 1).

- *Long tail*: the use of the prototypes is drawn to the prior :math:`b` but not tied to it.
- *Progressive mass*: only a share :math:`\rho` of the instances' mass is moved, that of the instances that fit
  best; :class:`MassRamp` raises it over training.

What is left over goes to a virtual prototype at no cost, which must take :math:`1 - \rho` exactly and whose entropy
counts too. With it, and with :math:`f_k = \gamma / (\gamma + \varepsilon)` for a prototype and 1 for the virtual one,
matrix scaling in log space is an iteration on one potential a column,

.. math:: P = \mathrm{softmax}_k(V_k - C_{ik} / \varepsilon), \qquad c = P^\top a, \qquad
          V \leftarrow f\,(\log b - \log c + V), \qquad Q = \mathrm{diag}(a) P,

whose matrix of derivatives :math:`J = \mathrm{diag}(f / c) P^\top \mathrm{diag}(a) P` has row sums :math:`f \le 1`. The
gradient of the plan is that of the solution: with :math:`G = \partial L / \partial Q` and
:math:`R(G) = Q \odot (G - (P \odot G) \mathbf 1)`, solve :math:`(I - J^\top) w = R(G)^\top \mathbf 1`; then

.. math:: \partial L / \partial C = -R(G - \mathbf 1 h^\top) / \varepsilon, \qquad h = w f / c.

Source: Ren, Wang, Fang, Ling and You, "OTSurv: A Novel Multiple Instance Learning Framework for Survival Prediction
with Heterogeneity-aware Optimal Transport", MICCAI 2025, arXiv 2506.20741; defaults are the authors' code's. The
iteration is that of Chizat, Peyré, Schmitzer and Vialard, "Scaling algorithms for unbalanced optimal transport
problems", 2018, arXiv 1607.05816. The implicit gradient is ours: the authors differentiate through all rounds.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import checks
from ..stopping import Budget, Stop
from .pools import InstancePool, clean_bag

# Cheap sweeps between two in log space.
_SWEEPS = 15


@dataclasses.dataclass(frozen=True)
class PartialTransport:
    """What :func:`semi_relaxed_partial_ot` found.

    Args:
        plan: ``(*batch, instances, prototypes)``; adds up to the mass that was asked for, differentiable.
        residual: The last sweep's largest change of a potential, over the batch.
        iterations: Sweeps.
        status: Why it stopped.
    """

    plan: Tensor
    residual: float
    iterations: int
    status: Stop


def semi_relaxed_partial_ot(
    cost: Float[Tensor, "*batch instances prototypes"],
    *,
    mass: float = 1.0,
    regularization: float = 0.1,
    usage_penalty: float = 1.0,
    row_mass: Float[Tensor, "*batch instances"] | None = None,
    prior: Float[Tensor, "*#batch prototypes"] | None = None,
    mask: Bool[Tensor, "*batch instances"] | None = None,
    max_iter: int = 1000,
    max_seconds: float | None = None,
    tolerance: float | None = None,
) -> PartialTransport:
    r"""Move a share of the instances' mass onto prototypes whose use is free to be uneven.

    :math:`\min \langle C, Q \rangle + \gamma KL(Q^\top 1 \| \rho b) - \varepsilon H(Q)` subject to :math:`Q 1 \le a`
    and :math:`1^\top Q 1 = \rho`, with the entropy of what is left over counted in H. At ``mass=1`` it is semi-relaxed
    transport; with ``usage_penalty=math.inf`` also, Sinkhorn's; with ``usage_penalty=0``, a softmax for each row.

    Args:
        cost: The cost C of moving an instance to a prototype. Its scale is measured by ``regularization``.
        mass: The paper's rho, in (0, 1]: the share of the mass that is moved.
        regularization: The paper's epsilon, above 0: weight of the entropy. 0.1 in the authors' code, for costs in
            [0, 1].
        usage_penalty: The paper's gamma, at least 0 and possibly infinite: how strongly the use of the prototypes is
            drawn to the prior. 1 in the authors' code.
        row_mass: Non-negative mass of each instance, scaled to add up to one; None for equal masses.
        prior: Positive share of each prototype, scaled to add up to one; None for equal shares.
        mask: True for instances, False for padding, whose costs are not looked at; None: all are instances.
        max_iter: Most sweeps.
        max_seconds: Most seconds; looked at every 16 sweeps.
        tolerance: Converged once a sweep changes no potential by more, that is no column's mass by a larger factor
            than exp(tolerance). None: 1e-9 in float64, else 1e-5, which rounding lets it reach.

    Returns:
        The plan, and why the solver stopped. The plan's gradient with respect to ``cost``, ``row_mass`` and
        ``prior`` is the exact solution's: it is as good as the solution is.

    Raises:
        ValueError: If a number is out of range, shapes disagree, a cost is not finite, a mass is negative, or a bag
            holds no instance or no mass.

    Example:
        >>> cost = torch.tensor([[0.0, 0.4], [0.4, 0.0], [0.4, 0.4]])
        >>> semi_relaxed_partial_ot(cost, mass=0.5).plan.sum(1)  # the third fits nothing and moves least
        tensor([0.2365, 0.2365, 0.0269])

    Source:
        Ren et al. 2025, arXiv 2506.20741; Chizat et al. 2018, arXiv 1607.05816, algorithm 1.
    """
    checks.floating(cost, "cost")
    if cost.dim() < 2:
        raise ValueError(f"cost must have shape (*batch, instances, prototypes), got {tuple(cost.shape)}")
    checks.not_empty(cost, "cost")
    checks.between(mass, "mass", 0.0, 1.0, low_open=True)
    checks.positive(regularization, "regularization")
    _check_penalty(usage_penalty)
    if tolerance is not None:
        checks.non_negative(tolerance, "tolerance")
    budget = Budget(max_iter, max_seconds)

    *batch, instances, prototypes = cost.shape
    precise = torch.promote_types(cost.dtype, torch.float32)
    costs = cost.to(precise).reshape(-1, instances, prototypes)
    rows = _row_mass(costs, row_mass, mask)
    if mask is not None:
        # where, not a product: padding may hold anything.
        costs = torch.where(mask.reshape(-1, instances, 1), costs, 0.0)
    checks.finite(costs.detach(), "cost")
    columns = _column_mass(costs, prior, batch, mass)
    relaxed = 1.0 if math.isinf(usage_penalty) else usage_penalty / (usage_penalty + regularization)
    exponent = torch.full_like(columns[0], relaxed)
    exponent[prototypes:] = 1.0
    if tolerance is None:
        tolerance = 1e-9 if precise == torch.float64 else 1e-5

    with torch.no_grad():
        # A row a column: softmaxes over few prototypes and products with the kernel then run along memory.
        logits = costs.new_zeros(len(costs), columns.shape[1], instances)
        torch.div(costs.mT, -regularization, out=logits[:, :prototypes])
        shares, residual, iterations, status = _scale(logits, rows, columns, exponent, tolerance, budget)
    plan = _Plan.apply(costs, rows, columns, shares, exponent, regularization)
    return PartialTransport(plan.to(cost.dtype).reshape(cost.shape), residual, iterations, status)


class MassRamp:
    r"""The share of mass to move at each step of training, rising to one.

    :math:`\min(1, u\, e^{-5 (1 - \min(t, T) / T)^2} + m_0)`, or :math:`\min(1, u \min(t, T) / T + m_0)` if linear.

    Args:
        total_steps: The ramp's length T in optimizer steps, at least 1; the authors' code takes ten epochs.
        base: The share m0 at the start, in (0, 1]; 0.1 in the authors' code.
        upper: The rise u, at least 0; 1 in the authors' code, with which the sigmoid ramp reaches one at 0.855 T.
        kind: ``"sigmoid"``, the authors' choice, or ``"linear"``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> ramp = MassRamp(100)
        >>> [round(ramp(step), 3) for step in (0, 25, 50, 75, 100)]
        [0.107, 0.16, 0.387, 0.832, 1.0]

    Source:
        Ren et al. 2025, arXiv 2506.20741, the progressive mass constraint; constants from the authors' code.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        base: float = 0.1,
        upper: float = 1.0,
        kind: Literal["sigmoid", "linear"] = "sigmoid",
    ) -> None:
        checks.positive(total_steps, "total_steps")
        checks.between(base, "base", 0.0, 1.0, low_open=True)
        checks.non_negative(upper, "upper")
        checks.one_of(kind, "kind", ("sigmoid", "linear"))
        self.total_steps, self.base, self.upper, self.kind = total_steps, base, upper, kind

    def __call__(self, step: int) -> float:
        """Return the share at optimizer step ``step``, counted from 0."""
        checks.non_negative(step, "step")
        progress = min(step / self.total_steps, 1.0)
        rise = math.exp(-5 * (1 - progress) ** 2) if self.kind == "sigmoid" else progress
        return min(1.0, self.upper * rise + self.base)


class OTPool(InstancePool):
    r"""Pool a bag by the plan that moves its best-fitting instances onto learnable prototypes.

    With the plan Q scaled to add up to one and a weight :math:`w_k` a prototype, instance i weighs
    :math:`\alpha_i = \sum_k w_k Q_{ik}`, of either sign, and the embedding is :math:`\sum_i \alpha_i z_i + w_0`. That
    is what mixing the prototypes' pooled vectors :math:`Q^\top Z` gives, at a fraction of the work.

    The cost is the distance of an instance to a prototype over the largest in the bag: one far outlier makes all
    other costs alike. In training mode the share of mass is :attr:`mass`, which :meth:`set_mass` changes; in
    evaluation it is ``eval_mass``. At 1 every instance weighs the same mass, so that nothing is suppressed.

    Args:
        dim: Features of an instance.
        num_prototypes: The paper's K; 16 in the authors' code.
        mass: The paper's rho in training, in (0, 1], until :meth:`set_mass` says otherwise.
        eval_mass: The paper's rho in evaluation, in (0, 1]. 1 in the authors' code, whatever training used.
        regularization: The paper's epsilon, above 0.
        usage_penalty: The paper's gamma, at least 0.
        normalize_cost: Whether to divide distances by the bag's largest. Without it, ``regularization`` is in units
            of distance.
        shift: Whether distances are taken after each vector's smallest entry is subtracted from it, as in the
            authors' code.
        num_iters: Most sweeps of the solver, which stops earlier at its own tolerance.

    Attributes:
        mass: The share of mass moved in training, a buffer.
        prototypes: ``(num_prototypes, dim)``, drawn from a standard normal distribution.

    Example:
        >>> pool = OTPool(8, num_prototypes=4, mass=0.2, eval_mass=0.2)
        >>> embedding, weights = pool(torch.randn(2, 100, 8))
        >>> embedding.shape, weights.shape
        (torch.Size([2, 8]), torch.Size([2, 100]))

    Source:
        Ren et al. 2025, arXiv 2506.20741; layout and defaults from the authors' code.
    """

    mass: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_prototypes: int = 16,
        mass: float = 1.0,
        eval_mass: float = 1.0,
        regularization: float = 0.1,
        usage_penalty: float = 1.0,
        normalize_cost: bool = True,
        shift: bool = True,
        num_iters: int = 1000,
    ) -> None:
        super().__init__()
        for value, name in ((dim, "dim"), (num_prototypes, "num_prototypes"), (num_iters, "num_iters")):
            checks.positive(value, name)
        checks.between(eval_mass, "eval_mass", 0.0, 1.0, low_open=True)
        checks.positive(regularization, "regularization")
        _check_penalty(usage_penalty)
        self.dim = dim
        self.eval_mass = eval_mass
        self.regularization = regularization
        self.usage_penalty = usage_penalty
        self.normalize_cost = normalize_cost
        self.shift = shift
        self.num_iters = num_iters
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, dim))
        self.mixing = nn.Linear(num_prototypes, 1)
        self.register_buffer("mass", torch.ones(()))
        self.set_mass(mass)

    def set_mass(self, mass: float) -> None:
        """Set the share of mass that is moved in training, in (0, 1]: ``pool.set_mass(ramp(step))``."""
        checks.between(mass, "mass", 0.0, 1.0, low_open=True)
        self.mass.fill_(mass)

    def plan(
        self, instances: Float[Tensor, "batch instances dim"], mask: Bool[Tensor, "batch instances"] | None = None
    ) -> Float[Tensor, "batch instances prototypes"]:
        """Return which instance goes to which prototype: the plan scaled to add up to one, 0 at padding.

        Args:
            instances: A bag of vectors a row, padded.
            mask: True for instances, False for padding.

        Warns:
            RuntimeWarning: If the solver ran out of sweeps, so that plan and gradient are approximate.
        """
        return self._plan(clean_bag(instances, mask, self.dim), mask)

    def _plan(self, instances: Tensor, mask: Tensor | None) -> Tensor:
        share = float(self.mass) if self.training else self.eval_mass
        found = semi_relaxed_partial_ot(
            self._cost(instances, mask),
            mass=share,
            regularization=self.regularization,
            usage_penalty=self.usage_penalty,
            mask=mask,
            max_iter=self.num_iters,
        )
        if found.status is Stop.ITERATION_LIMIT:
            warnings.warn(
                f"the transport plan is {found.residual:.1e} from its fixed point after {found.iterations} sweeps: "
                "raise regularization or num_iters",
                RuntimeWarning,
                stacklevel=2,
            )
        return found.plan / share

    def _weights(self, instances: Tensor, mask: Tensor | None) -> Tensor:
        # A product in half precision would lose small masses before they add up.
        plan = self._plan(instances, mask)
        return (plan @ self.mixing.weight[0].to(plan.dtype)).to(instances.dtype)

    @property
    def offset(self) -> Tensor:
        """What is added to every entry of the embedding."""
        return self.mixing.bias

    def _cost(self, instances: Tensor, mask: Tensor | None) -> Tensor:
        precise = torch.promote_types(instances.dtype, torch.float32)
        distance = _Distance.apply(instances.to(precise), self.prototypes.to(precise), self.shift)
        if not self.normalize_cost:
            return distance
        counted = distance if mask is None else torch.where(mask[..., None], distance, 0.0)
        # All distances are zero where every instance is every prototype; any scale is right then.
        return distance / counted.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(precise).tiny)


class OTSurv(nn.Module):
    r"""Predict survival from bags of instances: encode each instance, pool the bag, score the embedding.

    Instances pass through :math:`z_i = \mathrm{Dropout}(\mathrm{ReLU}(W f_i + b))`, a pool turns them into one
    embedding :math:`\sum_i \alpha_i z_i + w_0`, and a linear head turns that into a log-risk for
    :class:`minimand.losses.CoxPHLoss`, or into the logits of discrete hazards for
    :class:`minimand.losses.DiscreteHazardLoss`. The score is linear in what each instance adds to it, which
    :meth:`attribution` returns: the heat map of a slide.

    Args:
        in_features: Features of an instance as it comes; 1,024 for the authors' tiles.
        dim: Features of an instance after encoding; 256 in the authors' code.
        pool: How a bag becomes one vector of ``dim`` features: an :class:`InstancePool`. None: ``OTPool(dim)``.
            With :class:`MeanPool` or :class:`AttentionPool` this is the usual baseline of the same encoder and head.
        num_bins: None for a log-risk; a number of time intervals for the logits of their hazards.
        dropout: Share of the encoded features that are dropped in training, in [0, 1); 0.25 in the authors' code.

    Example:
        >>> model = OTSurv(32, dim=16, pool=OTPool(16, num_prototypes=4, mass=0.2, eval_mass=0.2)).eval()
        >>> bags = torch.randn(3, 50, 32)
        >>> model(bags).shape, model.attribution(bags).shape
        (torch.Size([3]), torch.Size([3, 50]))

    Source:
        Ren et al. 2025, arXiv 2506.20741.
    """

    def __init__(
        self,
        in_features: int,
        *,
        dim: int = 256,
        pool: InstancePool | None = None,
        num_bins: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        for value, name in ((in_features, "in_features"), (dim, "dim"), (num_bins or 1, "num_bins")):
            checks.positive(value, name)
        checks.between(dropout, "dropout", 0.0, 1.0, high_open=True)
        self.in_features = in_features
        self.num_bins = num_bins
        self.encoder = nn.Sequential(nn.Linear(in_features, dim), nn.ReLU(), nn.Dropout(dropout))
        self.pool = OTPool(dim) if pool is None else pool
        self.head = nn.Linear(dim, 1 if num_bins is None else num_bins)

    def forward(
        self, bags: Float[Tensor, "batch instances features"], mask: Bool[Tensor, "batch instances"] | None = None
    ) -> Float[Tensor, " batch"] | Float[Tensor, "batch bins"]:
        """Score bags: a log-risk each, ``(batch,)``, or with ``num_bins`` logits of hazards, ``(batch, num_bins)``.

        Args:
            bags: A bag of instances a row, padded to the longest.
            mask: True for instances, False for padding; None: all are instances.

        Raises:
            ValueError: If shapes disagree, a bag holds no instance, or an instance is not finite.
        """
        embedding, _ = self.pool(self._encode(bags, mask), mask)
        scores = self.head(embedding)
        return scores[:, 0] if self.num_bins is None else scores

    def attribution(
        self, bags: Float[Tensor, "batch instances features"], mask: Bool[Tensor, "batch instances"] | None = None
    ) -> Float[Tensor, "batch instances"] | Float[Tensor, "batch instances bins"]:
        r"""Return how much each instance adds to its bag's score: the heat map of a slide.

        :math:`\alpha_i\, z_i^\top v` for the head's weights v; a positive one raises the risk. Over the instances
        they add up to the score but for :attr:`baseline`, which is the same for all bags. 0 at padding. With
        ``num_bins``, one number for each hazard. Call ``model.eval()`` first: dropout and the mass of training
        change the map.

        Args:
            bags: As for :meth:`forward`.
            mask: As for :meth:`forward`.

        Returns:
            ``(batch, instances)``, or ``(batch, instances, num_bins)``.
        """
        instances = self._encode(bags, mask)
        parts = self.pool.weights(instances, mask)[..., None] * (instances @ self.head.weight.mT)
        if mask is not None:
            parts = torch.where(mask[..., None], parts, 0.0)
        return parts[..., 0] if self.num_bins is None else parts

    @property
    def baseline(self) -> Tensor:
        """The part of every score that no instance adds to: a scalar, or one number a bin."""
        constant = self.head.bias + self.pool.offset * self.head.weight.sum(1)
        return constant[0] if self.num_bins is None else constant

    def _encode(self, bags: Tensor, mask: Tensor | None) -> Tensor:
        return self.encoder(clean_bag(bags, mask, self.in_features))


def _check_penalty(usage_penalty: float) -> None:
    if math.isnan(usage_penalty) or usage_penalty < 0:
        raise ValueError(f"usage_penalty must be a number of at least 0 or infinity, got {usage_penalty}")


def _row_mass(costs: Tensor, row_mass: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the mass of each instance, 0 at padding, 1 in each bag."""
    bags, instances, _ = costs.shape
    rows = costs.new_ones(bags, instances)
    if row_mass is not None:
        checks.floating(row_mass, "row_mass")
        if row_mass.numel() != rows.numel():
            raise ValueError(f"row_mass must have one number for each row of cost, got {tuple(row_mass.shape)}")
        rows = row_mass.to(rows).reshape(bags, instances)
    if mask is not None:
        checks.tensor(mask, "mask")
        if mask.dtype != torch.bool or mask.numel() != rows.numel():
            raise ValueError(
                f"mask must hold one boolean for each row of cost, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        rows = torch.where(mask.reshape(bags, instances), rows, 0.0)
    if row_mass is None and mask is None:
        return rows / instances
    checks.require(
        torch.isfinite(rows) & (rows >= 0),
        lambda: "row_mass must be finite and not negative where there is an instance",
    )
    total = rows.sum(1, keepdim=True)
    checks.require(total > 0, lambda: f"bag {int((total[:, 0] <= 0).nonzero()[0, 0])} is empty: it holds no mass")
    return rows / total


def _column_mass(costs: Tensor, prior: Tensor | None, batch: list[int], mass: float) -> Tensor:
    """Return the masses that the columns are drawn to: rho b, and what the virtual one must take if it is any."""
    bags, _, prototypes = costs.shape
    if prior is None:
        columns = costs.new_full((bags, prototypes), mass / prototypes)
    else:
        checks.floating(prior, "prior")
        checks.require(torch.isfinite(prior) & (prior > 0), lambda: "prior must be finite and above 0")
        wanted = (*batch, prototypes)
        try:
            shared = prior.to(costs).expand(wanted).reshape(bags, prototypes)
        except RuntimeError:
            raise ValueError(f"prior must have shape {wanted}, or broadcast to it, got {tuple(prior.shape)}") from None
        columns = mass * shared / shared.sum(1, keepdim=True)
    if mass == 1:
        return columns
    return torch.cat([columns, columns.new_full((bags, 1), 1 - mass)], dim=1)


def _scale(
    logits: Tensor, rows: Tensor, columns: Tensor, exponent: Tensor, tolerance: float, budget: Budget
) -> tuple[Tensor, float, int, Stop]:
    """Return the shares P^T at the fixed point, the last change of a potential, the sweeps and why they ended.

    A sweep in log space costs two passes of exponentials, one on the kernel two products of a matrix and a vector. So
    far from the solution, sweeps run on the kernel P from one sweep in log space to the next. Near it a Newton step on
    the few potentials is tried, since sweeps converge slowly where little mass is moved.
    """
    finfo = torch.finfo(logits.dtype)
    weights, log_columns = rows[..., None], columns.log()
    potential = torch.zeros_like(columns)
    fallback = potential
    last = potential.new_full((len(potential),), math.inf)
    residual, iterations, newton, may_try = math.inf, 0, False, True
    while True:
        log_shares = (logits + potential[..., None]).log_softmax(1)
        shares = log_shares.exp()
        stop = budget.spent(iterations)
        if stop is not None:
            return shares, residual, iterations, stop
        used = torch.bmm(shares, weights)[..., 0]
        log_used = used.log()
        if bool((used <= finfo.tiny).any()):  # a column that no row comes near: its mass is there in log space only
            log_used = (log_shares + rows.log()[:, None]).logsumexp(2)
        moved = exponent * (log_columns - log_used + potential)
        delta = moved - potential
        change = 0.5 * (delta.amax(1) - delta.amin(1)) if _free_constant(exponent) else delta.abs().amax(1)
        residual = float(change.max())
        iterations += 1
        if residual <= tolerance:
            return shares, residual, iterations, Stop.CONVERGED
        # No sweep changes more than the one before (J's row sums are at most 1): what does not shrink is rounding.
        worse = ~(change <= (0.5 if newton else 1.0) * last)
        if bool(worse.any()):
            if residual <= 1e2 * finfo.eps * (1 + float(potential.abs().max())):
                return shares, residual, iterations, Stop.STALLED
            if newton:
                potential = torch.where(worse[:, None], fallback, potential)
                newton = may_try = False
                continue
        if not math.isfinite(residual):
            raise ValueError(
                "cost spans too many multiples of regularization for its dtype: raise regularization or use float64"
            )
        last = change
        # A Newton step is trusted where masses are within a factor of e of what they should be.
        newton = may_try and residual < 1
        may_try = True
        if newton:
            fallback = moved
            system, _ = _one_less_derivative(shares, rows, used, exponent)
            step = torch.linalg.solve(system.mT, (moved - potential).to(system))
            potential = potential + step.to(potential)
        else:
            potential, swept = _sweeps(shares, rows, moved, exponent, log_columns, potential, budget, iterations)
            iterations += swept


def _sweeps(
    shares: Tensor,
    rows: Tensor,
    moved: Tensor,
    exponent: Tensor,
    log_columns: Tensor,
    potential: Tensor,
    budget: Budget,
    iterations: int,
) -> tuple[Tensor, int]:
    """Sweep on the kernel from ``moved``; return the potential, and in how many sweeps: none where they overflow."""
    count = max(min(_SWEEPS, budget.max_iter - iterations), 0)
    constant = exponent * (log_columns + potential) - potential
    log_v = moved - potential
    for _ in range(count):
        scaled = rows / torch.bmm(log_v.exp()[:, None], shares)[:, 0]
        log_v = constant - exponent * torch.bmm(shares, scaled[..., None])[..., 0].log()
    return (potential + log_v, count) if bool(torch.isfinite(log_v).all()) else (moved, 0)


def _free_constant(exponent: Tensor) -> bool:
    """Tell whether a constant added to all potentials has no effect, or next to none."""
    return bool((exponent > 1 - 1e-6).all())


def _one_less_derivative(shares: Tensor, rows: Tensor, used: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Return I - J^T for each bag in double precision, made invertible by c 1^T where it is not; and f / c."""
    ratio = exponent / used.clamp_min(torch.finfo(used.dtype).tiny)
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    system = -(torch.bmm(rows[:, None] * shares, shares.mT) * ratio[:, None]).to(wide)
    system.diagonal(dim1=1, dim2=2).add_(1)
    if _free_constant(exponent):
        system = system + used[..., None].to(wide)
    return system, ratio


class _Plan(torch.autograd.Function):
    """The plan diag(a) P without its last column, from P^T, with the gradient of the exact solution."""

    @staticmethod
    def forward(
        ctx: Any,
        costs: Tensor,
        rows: Tensor,
        columns: Tensor,
        shares: Tensor,
        exponent: Tensor,
        regularization: float,
    ) -> Tensor:
        ctx.save_for_backward(rows, columns, shares, exponent)
        ctx.regularization, ctx.prototypes = regularization, costs.shape[2]
        return (rows[:, None] * shares[:, : ctx.prototypes]).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, shares, exponent = ctx.saved_tensors
        prototypes = ctx.prototypes
        grad = grad.mT
        inner = torch.linalg.vecdot(shares[:, :prototypes], grad, dim=1)  # the virtual column has no gradient
        plan = rows[:, None] * shares
        used = plan.sum(2)
        pull = -torch.bmm(plan, inner[..., None])[..., 0]
        pull[:, :prototypes] += torch.linalg.vecdot(plan[:, :prototypes], grad, dim=2)
        system, ratio = _one_less_derivative(shares, rows, used, exponent)
        lift = torch.linalg.solve(system, pull.to(system)).to(pull) * ratio
        inner = inner - torch.bmm(lift[:, None], shares)[:, 0]
        cost_grad = (grad - lift[:, :prototypes, None]).sub_(inner[:, None])
        cost_grad.mul_(plan[:, :prototypes]).div_(-ctx.regularization)
        return cost_grad.mT, inner, lift * used / columns, None, None, None


class _Distance(torch.autograd.Function):
    """Euclidean distances of instances to prototypes, after each vector's smallest entry was subtracted from it.

    Written out because autograd would keep and pass over several arrays of the size of the instances.
    """

    @staticmethod
    def forward(ctx: Any, instances: Tensor, prototypes: Tensor, shift: bool) -> Tensor:
        dim = instances.shape[-1]
        low, place = instances.min(-1) if shift else (instances.new_zeros(instances.shape[:-1]), None)
        floor, floor_place = prototypes.min(-1) if shift else (prototypes.new_zeros(len(prototypes)), None)
        shifted = prototypes - floor[:, None]
        squares = torch.linalg.vector_norm(instances, dim=-1).square()
        if shift:
            squares += low * (dim * low - 2 * instances.sum(-1))
        products = instances @ shifted.mT - low[..., None] * shifted.sum(1)
        distance = products.mul_(-2).add_(squares[..., None]).add_(shifted.square().sum(1))
        # The root's derivative at 0 is infinite; differences of large squares may fall below it.
        distance = distance.clamp_min_(0).add_(1e-12).sqrt_()
        ctx.save_for_backward(instances, shifted, distance, low, place, floor_place)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        instances, shifted, distance, low, place, floor_place = ctx.saved_tensors
        pulls = grad / distance
        total = pulls.sum(-1)
        flat = pulls.flatten(0, -2)
        instance_grad = prototype_grad = None
        if ctx.needs_input_grad[0]:
            instance_grad = torch.addcmul(-(pulls @ shifted), total[..., None], instances)
            if place is not None:
                instance_grad -= (total * low)[..., None]
                instance_grad.scatter_add_(-1, place[..., None], -instance_grad.sum(-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            prototype_grad = shifted * flat.sum(0)[:, None] - flat.mT @ instances.flatten(0, -2)
            prototype_grad += (flat.mT @ low.flatten())[:, None]
            if floor_place is not None:
                prototype_grad.scatter_add_(-1, floor_place[:, None], -prototype_grad.sum(-1, keepdim=True))
        return instance_grad, prototype_grad, None
