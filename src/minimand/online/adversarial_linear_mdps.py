r"""Policy optimization in episodes whose losses an adversary sets, when only those on the path taken are seen.

After an episode, in which :math:`\phi_h` are the features of the pair visited in layer :math:`h` and :math:`L_h` is the
sum of the losses from there on, the action values of the policy that was played are estimated through its covariance
:math:`\Sigma_h = E_\pi[\phi\phi^\top]`, with :math:`\Sigma_h^+ = (\gamma I + \Sigma_h)^{-1}` and
:math:`X(s, a) = \phi(s, a)^\top \Sigma_h^+ \phi_h`, either plainly or with magnitude reduced:

.. math:: \hat Q = X L_h \ge -\frac{H}{\gamma}, \qquad
          \hat Q = X L_h - H \min(X, 0) + H\, E_{\phi' \sim \pi} \min(\phi(s, a)^\top \Sigma_h^+ \phi', 0)
          \ge -\frac{H}{\sqrt\gamma}.

Both have the same expectation: what is taken from one is given back on average. In every state the next policy follows
the regularised leader of the estimates less dilated bonuses, :math:`G = \sum_j \hat Q_j - B_j`:

.. math:: \pi(\cdot|s) = \arg\min_{p} \eta \langle p, G(s, \cdot) \rangle + R(p), \qquad
          R(p) = \sum_a p_a \ln p_a \;\text{ or }\; \sum_a \ln\frac{1}{p_a},

.. math:: b_h(s, a) = \beta \Big( \|\phi(s, a)\|^2_{\Sigma^+_h}
              + E_{a' \sim \pi(\cdot|s)} \|\phi(s, a')\|^2_{\Sigma^+_h} \Big), \qquad
          B_h = b_h + \Big(1 + \frac1H\Big) E_{s', a'} B_{h+1}(s', a').

The barrier :math:`\sum_a \ln(1/p_a)` puts up with plain estimates, however negative, at the price of a factor
:math:`\sqrt A` in the regret; the entropy needs the reduced magnitude, and no such factor.

Source: Dai, Luo, Wei and Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation", ICML 2023,
arXiv 2301.12942, algorithms 1 and 2; Luo, Wei and Lee, "Policy Optimization in Adversarial MDPs: Improved Exploration
via Dilated Bonuses", NeurIPS 2021, arXiv 2107.08346 (dilated bonuses; plain estimates with the entropy). Constants are
derived here from the conditions that the analysis needs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop
from .linear_mdp import LinearMDP, action_values, check_features, check_losses, occupancy

ESTIMATORS = ("reduced", "plain")
REGULARIZERS = ("entropy", "log-barrier")


@dataclasses.dataclass(frozen=True)
class BarrierStep:
    """What :func:`log_barrier_step` found.

    Args:
        policy: The minimisers, ``(*batch, actions)``; they add up to 1.
        multiplier: Of the constraint that they do, ``(*batch,)``: the minimisers are 1 / (learning rate times losses +
            multiplier).
        residual: The largest distance from 1 of a sum of these, before they were made to add up to 1.
        iterations: Newton steps.
        status: Why it stopped; ``STALLED`` where rounding allows no further step.
    """

    policy: Tensor
    multiplier: Tensor
    residual: float
    iterations: int
    status: Stop


@torch.no_grad()
def log_barrier_step(
    losses: Float[Tensor, "*batch actions"],
    *,
    learning_rate: float,
    tolerance: float = 1e-6,
    max_iter: int = 100,
    max_seconds: float | None = None,
) -> BarrierStep:
    r"""Follow the leader on the simplex, regularised by a logarithmic barrier.

    .. math:: \arg\min_{p \in \Delta} \eta \langle p, G \rangle + \sum_a \ln \frac{1}{p_a}
              = \frac{1}{\eta G + \nu}, \qquad \sum_a \frac{1}{\eta G_a + \nu} = 1.

    Newton's method finds :math:`\nu`, for all rows together, as the root of
    :math:`1 / \sum_a (\eta G_a + \nu)^{-1} - 1`, a harmonic mean but for constants. Harmonic means are concave and no
    greater than arithmetic ones, so the latter give a start on the left of the root, from where every step goes
    towards it and none goes past. Where all losses are equal, the start is the root. No gradient is recorded.

    Args:
        losses: Summed losses :math:`G` of the actions; adding a constant to a row changes nothing.
        learning_rate: The paper's :math:`\eta`.
        tolerance: Largest distance of a sum of probabilities from 1. Rounding leaves about the dtype's epsilon.
        max_iter: Most Newton steps.
        max_seconds: Most seconds; None for no limit.

    Returns:
        A :class:`BarrierStep`.

    Raises:
        TypeError: If ``losses`` is not of a floating-point dtype.
        ValueError: If there are no losses, or they are not finite, or the learning rate or tolerance is not above 0.

    Example:
        >>> log_barrier_step(torch.tensor([0.0, 1.0, 4.0]), learning_rate=2.0).policy
        tensor([0.6193, 0.2767, 0.1040])

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithm 1; the solver is ours.
    """
    checks.floating(losses, "losses")
    checks.not_empty(losses, "losses")
    if losses.dim() == 0:
        raise ValueError("losses must have shape (*batch, actions), got ()")
    checks.finite(losses, "losses")
    checks.positive(learning_rate, "learning_rate")
    checks.positive(tolerance, "tolerance")
    budget = Budget(max_iter, max_seconds)
    least = losses.amin(-1, keepdim=True)
    scaled = learning_rate * (losses - least)
    multiplier = (losses.shape[-1] - scaled.mean(-1, keepdim=True)).clamp_min(1)
    iteration = 0
    while True:
        policy = 1 / (scaled + multiplier)
        total = policy.sum(-1, keepdim=True)
        far = (total - 1).abs() > tolerance
        # Sums below 1 lie on the right of the root, where only rounding leads.
        step = total * (total - 1).clamp_min(0) / policy.square().sum(-1, keepdim=True)
        ahead = torch.where(far, multiplier + step, multiplier)
        status = budget.spent(iteration) if bool(far.any()) else Stop.CONVERGED
        if status is None and torch.equal(ahead, multiplier):
            status = Stop.STALLED
        if status is not None:
            shift = (multiplier - learning_rate * least).squeeze(-1)
            return BarrierStep(policy / total, shift, float((total - 1).abs().max()), iteration, status)
        multiplier = ahead
        iteration += 1


def inverse_covariance(
    features: Float[Tensor, "... samples dimensions"],
    *,
    regularization: float,
    weights: Float[Tensor, "*batch samples"] | None = None,
) -> Float[Tensor, "*batch dimensions dimensions"]:
    r"""Invert the regularised covariance of features: :math:`(\gamma I + \sum_m w_m \phi_m \phi_m^\top)^{-1}`.

    From :math:`20 \ln(d) / \gamma` samples the regularised covariance itself is within a half and three halves of that
    of their distribution, with high probability.

    Args:
        features: One row a sample; their batch broadcasts with that of the weights.
        regularization: The paper's :math:`\gamma`.
        weights: Of the samples, at least 0, such as a policy's occupancy of all pairs; one over their number if None.

    Returns:
        Symmetric positive definite matrices.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If there are no samples, numbers are not finite, a weight is negative, ``regularization`` is not
            above 0, or so small that the sum is not positive definite in this dtype.

    Example:
        >>> inverse_covariance(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), regularization=0.5)
        tensor([[ 0.9011, -0.2637],
                [-0.2637,  1.2967]])

    Source:
        Dai et al. 2023, arXiv 2301.12942: the estimate that takes the place of matrix geometric resampling.
    """
    checks.floating(features, "features")
    checks.not_empty(features, "features")
    if features.dim() < 2:
        raise ValueError(f"features must have shape (*batch, samples, dimensions), got {tuple(features.shape)}")
    checks.finite(features, "features")
    checks.positive(regularization, "regularization")
    if weights is not None:
        _check_weights(weights, features, "weights")
    return _inverse(features, regularization, weights)


def _inverse(features: Tensor, regularization: float, weights: Tensor | None) -> Tensor:
    """Invert the covariance of features that need no check; the factorisation finds out whether it can be."""
    if weights is None:
        covariance = features.mT @ features / features.shape[-2]
    else:
        covariance = features.mT @ (weights[..., None] * features)
    covariance.diagonal(dim1=-2, dim2=-1).add_(regularization)
    factor, info = torch.linalg.cholesky_ex(covariance)
    checks.require(
        info == 0,
        lambda: f"regularization must make the covariance positive definite in {features.dtype}, got {regularization}",
    )
    return torch.cholesky_inverse(factor)


def matrix_geometric_resampling(
    features: Float[Tensor, "*batch repetitions samples dimensions"], *, regularization: float
) -> Float[Tensor, "*batch dimensions dimensions"]:
    r"""Estimate the inverse of the regularised covariance by a truncated geometric series.

    .. math:: c \sum_{n=0}^{N} \prod_{j \le n} \Big( I - c (\gamma I + \phi_j \phi_j^\top) \Big), \qquad c = \frac12,

    averaged over repetitions. It is the estimator of earlier methods, kept for comparison: :func:`inverse_covariance`
    is better from the same samples. A truncated series is wrong by at most :math:`(1 - c\gamma)^{N+1} / \gamma` in
    expectation, so :math:`N = (2/\gamma) \ln(1/(\epsilon\gamma))` samples a repetition leave a bias below
    :math:`\epsilon`.

    Args:
        features: Independent samples, of norm at most 1; the series takes them in order.
        regularization: The paper's :math:`\gamma`, at most 1.

    Returns:
        Matrices that need be neither symmetric nor positive definite.

    Raises:
        TypeError: If ``features`` is not of a floating-point dtype.
        ValueError: If there are no samples, a norm is above 1, or ``regularization`` does not lie in (0, 1].

    Example:
        >>> corners = torch.eye(2)[torch.randint(2, (2000, 50), generator=torch.Generator().manual_seed(0))]
        >>> estimate = matrix_geometric_resampling(corners, regularization=0.5)
        >>> torch.allclose(estimate, inverse_covariance(corners[:, 0], regularization=0.5), atol=0.05)
        True

    Source:
        Neu and Bartok, 2013 (geometric resampling); Luo, Wei and Lee 2021, arXiv 2107.08346, in this form.
    """
    checks.floating(features, "features")
    checks.not_empty(features, "features")
    if features.dim() < 3:
        raise ValueError(
            f"features must have shape (*batch, repetitions, samples, dimensions), got {tuple(features.shape)}"
        )
    check_features(features, "features")
    checks.between(regularization, "regularization", 0, 1, low_open=True)
    shape = (*features.shape[:-2], features.shape[-1], features.shape[-1])
    product = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device).expand(shape)
    series = product
    for phi in features.unbind(-2):
        along = product @ phi[..., None]
        product = (1 - regularization / 2) * product - along * phi[..., None, :] / 2
        series = series + product
    return series.mean(-3) / 2


def linear_q_estimate(
    features: Float[Tensor, "... queries dimensions"],
    observed: Float[Tensor, "*batch dimensions"],
    loss_to_go: Float[Tensor, "*batch"],
    inverse: Float[Tensor, "*batch dimensions dimensions"],
) -> Float[Tensor, "*batch queries"]:
    r"""Estimate action values from one episode: :math:`\hat Q(s, a) = \phi(s, a)^\top \Sigma^+ \phi_h\, L_h`.

    Args:
        features: Of the pairs of state and action asked for; its batch broadcasts.
        observed: Features of the pair that was visited.
        loss_to_go: :math:`L_h`, the sum of the losses from the visit on.
        inverse: :math:`\Sigma^+`, of the policy that was played.

    Returns:
        Estimates, as low as minus the loss to go over the regularization.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, a feature's norm is above 1, or numbers are not finite.

    Example:
        >>> linear_q_estimate(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor(0.5), 4 * torch.eye(2))
        tensor([2., 0.])

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithm 1.
    """
    _check_visit(features, observed, loss_to_go, inverse)
    return _alignment(features, observed, inverse) * loss_to_go[..., None]


def magnitude_reduced_estimate(
    features: Float[Tensor, "... queries dimensions"],
    observed: Float[Tensor, "*batch dimensions"],
    loss_to_go: Float[Tensor, "*batch"],
    inverse: Float[Tensor, "*batch dimensions dimensions"],
    *,
    largest: Float[Tensor, "*largest"] | float,
    reference: Float[Tensor, "... samples dimensions"],
    weights: Float[Tensor, "*batch samples"] | None = None,
) -> Float[Tensor, "*batch queries"]:
    r"""Estimate action values from one episode, without large negative estimates.

    .. math:: \hat Q(s, a) = X L_h - H \min(X, 0) + H\, E_{\phi' \sim \pi} \min(\phi(s, a)^\top \Sigma^+ \phi', 0),
              \qquad X = \phi(s, a)^\top \Sigma^+ \phi_h.

    Its expectation is that of :func:`linear_q_estimate`, as the last two terms cancel. The first two are never
    negative, and the last is at least :math:`-H \|\phi(s, a)\|_{\Sigma^+}` where :math:`\Sigma^+` comes from the
    reference.

    Args:
        features: Of the pairs of state and action asked for; its batch broadcasts.
        observed: Features of the pair that was visited.
        loss_to_go: :math:`L_h`, the sum of the losses from the visit on.
        inverse: :math:`\Sigma^+`, of the policy that was played.
        largest: The largest loss to go there can be: the paper's :math:`H`, or the layers that are left.
        reference: Features that the policy meets in this layer: those of all pairs, or of simulated episodes.
        weights: How likely each of them is met; one over their number if None.

    Returns:
        Estimates, at least :math:`-H / \sqrt\gamma`.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, a feature's norm is above 1, a loss to go is negative or above ``largest``, a
            weight is negative, or numbers are not finite.

    Example:
        >>> features, often = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0.98, 0.01, 0.01])
        >>> inverse = inverse_covariance(features, regularization=1e-3, weights=often)
        >>> seen = features[1], torch.tensor(1.0), inverse
        >>> linear_q_estimate(features, *seen).round(decimals=1)
        tensor([  0.6000,  46.7000, -46.0000])
        >>> magnitude_reduced_estimate(
        ...     features, *seen, largest=1.0, reference=features, weights=often
        ... ).round(decimals=1)
        tensor([ 0.6000, 46.3000, -0.5000])

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithm 2.
    """
    _check_visit(features, observed, loss_to_go, inverse)
    ceiling = torch.as_tensor(largest, dtype=loss_to_go.dtype, device=loss_to_go.device)
    checks.require(
        (loss_to_go >= 0) & (loss_to_go <= ceiling * (1 + 1e-6)),
        lambda: (
            f"loss_to_go must lie between 0 and largest, got values from {float(loss_to_go.min()):.6g} to "
            f"{float(loss_to_go.max()):.6g} for largest up to {float(ceiling.max()):.6g}"
        ),
    )
    check_features(reference, "reference")
    if weights is not None:
        _check_weights(weights, reference, "weights")
    return _reduced(features, observed, loss_to_go, inverse, ceiling, reference, weights)


def _reduced(
    features: Tensor,
    observed: Tensor,
    loss_to_go: Tensor,
    inverse: Tensor,
    ceiling: Tensor,
    reference: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Estimate with magnitude reduced, from what needs no check."""
    alignment = _alignment(features, observed, inverse)
    aligned = (features @ inverse @ reference.mT).clamp_max_(0)
    given_back = aligned.mean(-1) if weights is None else (aligned @ weights[..., None]).squeeze(-1)
    lifted = alignment * loss_to_go[..., None] - ceiling[..., None] * alignment.clamp_max(0)
    return lifted + ceiling[..., None] * given_back


def exploration_bonus(
    features: Float[Tensor, "... states actions dimensions"],
    inverse: Float[Tensor, "*batch dimensions dimensions"],
    policy: Float[Tensor, "*batch states actions"],
    *,
    scale: float,
) -> Float[Tensor, "*batch states actions"]:
    r"""Compute how uncertain an action, and a state under the policy, are.

    .. math:: b(s, a) = \beta \Big( \|\phi(s, a)\|^2_{\Sigma^+}
                  + E_{a' \sim \pi(\cdot|s)} \|\phi(s, a')\|^2_{\Sigma^+} \Big).

    Its dilated sum over the layers that follow is ``LinearMDP.action_values(policy, bonus, dilation=1 + 1 / H)``.

    Args:
        features: Of all pairs of state and action; its batch broadcasts.
        inverse: :math:`\Sigma^+`, of the policy.
        policy: Probabilities of the actions.
        scale: The paper's :math:`\beta`, at least 0.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If a feature's norm is above 1, numbers are not finite, or ``scale`` is negative.

    Example:
        >>> exploration_bonus(torch.eye(2)[None], torch.eye(2), torch.tensor([[0.5, 0.5]]), scale=0.1)
        tensor([[0.2000, 0.2000]])

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithms 1 and 2; Luo, Wei and Lee 2021, arXiv 2107.08346.
    """
    check_features(features, "features")
    checks.floating(inverse, "inverse")
    checks.finite(inverse, "inverse")
    checks.floating(policy, "policy")
    checks.finite(policy, "policy")
    checks.non_negative(scale, "scale")
    return _bonus(features, inverse, policy, scale)


def _bonus(features: Tensor, inverse: Tensor, policy: Tensor, scale: float) -> Tensor:
    """Compute the bonus from what needs no check."""
    pairs = features.flatten(-3, -2)
    uncertainty = ((pairs @ inverse) * pairs).sum(-1).unflatten(-1, features.shape[-3:-1])
    return scale * (uncertainty + (policy * uncertainty).sum(-1, keepdim=True))


class AdversarialMDPLearner:
    r"""Plays a linear decision problem against changing losses, of which it sees those on its path.

    The transitions are known: covariances, references and bonuses come from exact occupancies, or the first two, as in
    the paper, from simulated episodes. Losses are seen only by :meth:`update`. Settings:

    - ``estimator="reduced", regularizer="entropy"``, the default, is the paper's algorithm 2, with a regret of
      :math:`\tilde O(\sqrt{d H^6 K})` in :math:`K` episodes;
    - ``estimator="plain", regularizer="log-barrier"`` is its algorithm 1, with :math:`\tilde O(\sqrt{A d H^6 K})`;
    - ``estimator="plain", regularizer="entropy"`` is that of Luo, Wei and Lee (2021), with
      :math:`\tilde O(d^{2/3} H^2 K^{2/3})`.

    Args:
        mdp: The problem: features, transitions and first states.
        learning_rate: The paper's :math:`\eta`.
        regularization: Of covariances: the paper's :math:`\gamma`.
        bonus_scale: The paper's :math:`\beta`; 0 for no bonus.
        estimator: ``"reduced"`` or ``"plain"``.
        regularizer: ``"entropy"`` or ``"log-barrier"``.
        num_simulated: Simulated episodes for each covariance, and as many others for each reference; None for exact
            ones.
        runs: Shape of a batch of learners that play independently.
        generator: Of the simulated episodes.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> mdp = LinearMDP.random_simplex(num_layers=2, num_states=3, num_actions=3, num_dimensions=3, seed=0)
        >>> learner = AdversarialMDPLearner.for_episodes(mdp, 50, scale=10.0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> losses = mdp.linear_losses(torch.rand(2, 3, generator=generator, dtype=torch.float64))
        >>> before = mdp.value(learner.policy, losses)
        >>> for _ in range(50):
        ...     states, actions = mdp.rollout(learner.policy, generator=generator)
        ...     learner.update(states, actions, mdp.observe(losses, states, actions))
        >>> bool(mdp.value(learner.policy, losses) < before)
        True

    Source:
        Dai et al. 2023, arXiv 2301.12942, algorithms 1 and 2.
    """

    def __init__(
        self,
        mdp: LinearMDP,
        *,
        learning_rate: float,
        regularization: float,
        bonus_scale: float,
        estimator: Literal["reduced", "plain"] = "reduced",
        regularizer: Literal["entropy", "log-barrier"] = "entropy",
        num_simulated: int | None = None,
        runs: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        checks.positive(learning_rate, "learning_rate")
        checks.positive(regularization, "regularization")
        checks.non_negative(bonus_scale, "bonus_scale")
        checks.one_of(estimator, "estimator", ESTIMATORS)
        checks.one_of(regularizer, "regularizer", REGULARIZERS)
        if num_simulated is not None and num_simulated < 1:
            raise ValueError(f"num_simulated must be at least 1 or None, got {num_simulated}")
        self.mdp = mdp
        self.learning_rate = float(learning_rate)
        self.regularization = float(regularization)
        self.bonus_scale = float(bonus_scale)
        self.estimator, self.regularizer = estimator, regularizer
        self.num_simulated = num_simulated
        self.runs = tuple(runs)
        self._generator = generator
        # Pairs of state and action in a row, for each layer.
        self._pairs = mdp.features.flatten(1, 2)
        self._remaining = torch.arange(mdp.num_layers, 0, -1, device=mdp.features.device).to(mdp.features.dtype)
        self._follow(mdp.features.new_zeros(*self.runs, *mdp.features.shape[:3]))

    @classmethod
    def for_episodes(
        cls,
        mdp: LinearMDP,
        num_episodes: int,
        *,
        estimator: Literal["reduced", "plain"] = "reduced",
        regularizer: Literal["entropy", "log-barrier"] = "entropy",
        scale: float = 1.0,
        num_simulated: int | None = None,
        runs: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> AdversarialMDPLearner:
        r"""Choose the settings of a number of episodes :math:`K` by the theory.

        They are :math:`\eta = c \sqrt{A' / (d H^4 K)}` with :math:`A' = A` for the barrier and :math:`\ln A` for the
        entropy, :math:`\beta = 8 \eta H^2` and :math:`\gamma = 96 \eta^2 H^4`, which meet the conditions
        :math:`8 \eta H^2 \le \beta`, :math:`12 \eta \beta H^2 \le \gamma` and
        :math:`\eta (H / \sqrt\gamma + 6 \beta H / \gamma) \le 1` whatever :math:`c`.

        Args:
            mdp: The problem.
            num_episodes: The paper's :math:`K`.
            estimator: As of the constructor.
            regularizer: As of the constructor.
            scale: :math:`c`. The theory's 1 is cautious: below some 1e5 episodes larger values learn faster.
            num_simulated: As of the constructor.
            runs: As of the constructor.
            generator: As of the constructor.

        Raises:
            ValueError: For plain estimates with the entropy, which these settings do not keep stable.
        """
        if num_episodes < 1:
            raise ValueError(f"num_episodes must be at least 1, got {num_episodes}")
        if mdp.num_actions < 2:
            raise ValueError(f"mdp must have at least 2 actions to choose from, got {mdp.num_actions}")
        checks.positive(scale, "scale")
        if estimator == "plain" and regularizer == "entropy":
            raise ValueError(
                "estimator must be 'reduced' with the entropy for these settings: plain estimates are too negative; "
                "build the learner with settings of your own, such as a learning_rate of order num_episodes ** (-2/3)"
            )
        horizon, dimensions = mdp.num_layers, mdp.num_dimensions
        spread = mdp.num_actions if regularizer == "log-barrier" else math.log(mdp.num_actions)
        learning_rate = scale * math.sqrt(spread / (dimensions * horizon**4 * num_episodes))
        return cls(
            mdp,
            learning_rate=learning_rate,
            regularization=96 * learning_rate**2 * horizon**4,
            bonus_scale=8 * learning_rate * horizon**2,
            estimator=estimator,
            regularizer=regularizer,
            num_simulated=num_simulated,
            runs=runs,
            generator=generator,
        )

    @property
    def policy(self) -> Float[Tensor, "*runs layers states actions"]:
        """The policy of the next episode."""
        return self._policy

    @torch.no_grad()
    def update(
        self,
        states: Int[Tensor, "*runs layers"],
        actions: Int[Tensor, "*runs layers"],
        losses: Float[Tensor, "*runs layers"],
    ) -> None:
        """Learn from an episode that :attr:`policy` played.

        Args:
            states: Visited.
            actions: Taken.
            losses: Of these, in [0, 1], to be made small.

        Raises:
            ValueError: If a loss lies outside [0, 1], or shapes do not fit.
        """
        wanted = (*self.runs, self.mdp.num_layers)
        checks.floating(losses, "losses")
        for value, name in ((states, "states"), (actions, "actions"), (losses, "losses")):
            if tuple(value.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
        check_losses(losses)
        mdp, policy = self.mdp, self._policy
        loss_to_go = losses.to(policy).clamp(0, 1).flip(-1).cumsum(-1).flip(-1)
        seen, weights = self._met()
        inverse = _inverse(seen, self.regularization, weights)
        observed = mdp.features_at(states, actions)
        # All that is handed on from here was checked already, by the problem or above.
        if self.estimator == "plain":
            estimate = _alignment(self._pairs, observed, inverse) * loss_to_go[..., None]
        else:
            # Simulated references must be others than those of the covariance, or the estimates get a bias.
            fresh = seen if self.num_simulated is None else self._met()[0]
            estimate = _reduced(self._pairs, observed, loss_to_go, inverse, self._remaining, fresh, weights)
        bonus = _bonus(mdp.features, inverse, policy, self.bonus_scale)
        dilated = action_values(mdp, policy, bonus, dilation=1 + 1 / mdp.num_layers)
        self._follow(self._summed + estimate.view_as(policy) - dilated)

    def state_dict(self) -> dict[str, Any]:
        """Return the summed estimates, from which the policy follows."""
        return {"summed": self._summed.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up learning where it was saved.

        Args:
            state: Of a learner of the same problem and runs.

        Raises:
            ValueError: If it is of another shape.
        """
        summed = state["summed"]
        if summed.shape != self._summed.shape:
            raise ValueError(f"state must hold sums of shape {tuple(self._summed.shape)}, got {tuple(summed.shape)}")
        self._follow(summed.to(self._summed))

    def _follow(self, summed: Tensor) -> None:
        self._summed = summed
        if self.regularizer == "entropy":
            self._policy = torch.softmax(-self.learning_rate * summed, -1)
            return
        step = log_barrier_step(summed, learning_rate=self.learning_rate)
        if step.status is Stop.ITERATION_LIMIT:
            raise RuntimeError(f"the policy was not found to tolerance: its sum is off by {step.residual:.3g}")
        self._policy = step.policy

    def _met(self) -> tuple[Tensor, Tensor | None]:
        """Return features that the policy meets in each layer, and how likely, or None for equally likely ones."""
        if self.num_simulated is None:
            return self._pairs, occupancy(self.mdp, self._policy).flatten(-2)
        many = self._policy.expand(self.num_simulated, *self._policy.shape)
        episodes = self.mdp.rollout(many, generator=self._generator)
        return self.mdp.features_at(*episodes).movedim(0, -2), None

    def __repr__(self) -> str:
        return (
            f"AdversarialMDPLearner({self.mdp}, learning_rate={self.learning_rate:.4g}, "
            f"regularization={self.regularization:.4g}, bonus_scale={self.bonus_scale:.4g}, "
            f"estimator={self.estimator!r}, regularizer={self.regularizer!r}, num_simulated={self.num_simulated}, "
            f"runs={self.runs})"
        )


def _alignment(features: Tensor, observed: Tensor, inverse: Tensor) -> Tensor:
    """Return phi(s, a)^T Sigma^+ phi_h."""
    return (features @ (inverse @ observed[..., None])).squeeze(-1)


def _check_visit(features: Tensor, observed: Tensor, loss_to_go: Tensor, inverse: Tensor) -> None:
    """Check what every estimate is made of."""
    check_features(features, "features")
    check_features(observed, "observed")
    for value, name in ((loss_to_go, "loss_to_go"), (inverse, "inverse")):
        checks.floating(value, name)
        checks.finite(value, name)
    dimensions = observed.shape[-1]
    if features.shape[-1] != dimensions:
        raise ValueError(f"features must have shape (*batch, queries, {dimensions}), got {tuple(features.shape)}")
    if tuple(inverse.shape) != (*observed.shape, dimensions):
        raise ValueError(f"inverse must have shape {(*observed.shape, dimensions)}, got {tuple(inverse.shape)}")
    if loss_to_go.shape != observed.shape[:-1]:
        raise ValueError(f"loss_to_go must have shape {tuple(observed.shape[:-1])}, got {tuple(loss_to_go.shape)}")


def _check_weights(weights: Tensor, features: Tensor, name: str) -> None:
    checks.floating(weights, name)
    if weights.shape[-1:] != features.shape[-2:-1]:
        raise ValueError(
            f"{name} must hold one weight for each of {features.shape[-2]} rows, got {tuple(weights.shape)}"
        )
    checks.finite(weights, name)
    checks.require(weights >= 0, lambda: f"{name} must be at least 0, got {float(weights.min())}")
