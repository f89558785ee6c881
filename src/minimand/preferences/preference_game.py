r"""The game behind preferences that need not be transitive, in a table: its Nash policy, and the distance from it.

Answers :math:`y` are compared by :math:`P(y \succ y')`, with :math:`P(y \succ y') + P(y' \succ y) = 1`. Two policies
play against each other, each held near a reference :math:`\rho`:

.. math:: J(\pi, \mu) = E_{y \sim \pi, y' \sim \mu} P(y \succ y') - \tau KL(\pi \| \rho) + \tau KL(\mu \| \rho).

The game is symmetric, so its value is 1/2. With the win rate :math:`P(y \succ \mu) = E_{y' \sim \mu} P(y \succ y')`,

.. math:: \mathrm{best}(\mu) \propto \rho \exp(P(\cdot \succ \mu) / \tau), \qquad
          \max_\pi J(\pi, \mu) - \tfrac12 = \tau\, KL(\mu \| \mathrm{best}(\mu)),

and the Nash policy, the one policy that no other beats, is the fixed point :math:`\pi^* = \mathrm{best}(\pi^*)`. In
logits it is the root of :math:`F(\theta) = \theta - \log\rho - P\,\mathrm{softmax}(\theta) / \tau`. The Jacobian is
:math:`I - A S / \tau` with :math:`A = P - \frac12` antisymmetric and :math:`S` the covariance of the softmax. As
:math:`A S` has the eigenvalues of the antisymmetric :math:`S^{1/2} A S^{1/2}`, which are imaginary, the Jacobian is
never singular; as win rates are bounded, the level sets of :math:`\|F\|` are compact. So Newton's method with a line
search on :math:`\|F\|` reaches the Nash policy from anywhere.

Source: Munos et al. 2023, "Nash learning from human feedback", arXiv 2312.00886, section 3 (the regularised game);
Zhang et al. 2024, arXiv 2407.00617, sections 2 and 3. The solver and the form of the exploitability as a divergence are
ours.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..numerics import categorical_kl
from ..stopping import Budget, Stop
from .bradley_terry import check_preferences

_SHORTEST = 2.0**-30


@dataclasses.dataclass(frozen=True)
class NashSolution:
    """What :meth:`PreferenceGame.nash` found.

    Args:
        log_policy: Log-probabilities of the Nash policy, ``(*prompts, answers)``.
        residual: The largest error of a log-probability against its fixed-point equation, in nats.
        exploitability: Of the policy, ``(*prompts,)``.
        iterations: Newton steps.
        status: Why it stopped; ``STALLED`` where rounding allows no further step.
    """

    log_policy: Tensor
    residual: float
    exploitability: Tensor
    iterations: int
    status: Stop


class PreferenceGame:
    r"""A symmetric game between policies over a table of answers, one game a prompt.

    Policies come and go as log-probabilities ``(*prompts, answers)``; dimensions in front of these are batches.

    Args:
        preferences: :math:`P(y \succ y')`, rows beat columns, ``(*prompts, answers, answers)``, in [0, 1].
        log_reference: Log-probabilities of the reference :math:`\rho`, ``(*prompts, answers)`` or what broadcasts to
            it; uniform if None.
        tau: Weight of the divergence to the reference, at least 0: the paper's tau. At 0 the game is the plain one.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If the table is not square, holds no probabilities, or P(y > y') and P(y' > y) do not add up to 1.

    Example:
        >>> beats = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])  # rock, paper, scissors
        >>> game = PreferenceGame(beats, torch.tensor([0.5, 0.3, 0.2]).log(), tau=0.1)
        >>> game.nash().log_policy.exp()
        tensor([0.3884, 0.2669, 0.3446])
        >>> game.exploitability(game.log_reference)
        tensor(0.0248)

    Source:
        Munos et al. 2023, arXiv 2312.00886, section 3; Zhang et al. 2024, arXiv 2407.00617.
    """

    def __init__(
        self,
        preferences: Float[Tensor, "*prompts answers answers"],
        log_reference: Float[Tensor, "*references answers"] | None = None,
        *,
        tau: float,
    ) -> None:
        check_preferences(preferences)
        checks.non_negative(tau, "tau")
        answers = preferences.shape[-1]
        if log_reference is None:
            log_reference = preferences.new_zeros(answers).log_softmax(-1)
        _check_policy(log_reference, "log_reference", answers)
        # Exactly antisymmetric, so that a policy wins exactly half of the time against itself.
        self.preferences = (preferences - preferences.mT + 1) / 2
        self.log_reference = log_reference.to(preferences).log_softmax(-1).expand(preferences.shape[:-1])
        self.tau = float(tau)

    def win_rate(self, log_opponent: Float[Tensor, "*prompts answers"]) -> Float[Tensor, "*prompts answers"]:
        r"""Return how often each answer beats the opponent's: :math:`P(y \succ \mu)`.

        Args:
            log_opponent: Log-probabilities of the opponent :math:`\mu`.
        """
        self._check(log_opponent, "log_opponent")
        return self._win_rate(log_opponent)

    def payoff(
        self, log_policy: Float[Tensor, "*prompts answers"], log_opponent: Float[Tensor, "*prompts answers"]
    ) -> Float[Tensor, "*prompts"]:
        r"""Return :math:`J(\pi, \mu)`: how often the policy wins, less its divergence, plus the opponent's.

        Args:
            log_policy: Log-probabilities of :math:`\pi`.
            log_opponent: Log-probabilities of :math:`\mu`.
        """
        self._check(log_policy, "log_policy")
        wins = (log_policy.exp() * self.win_rate(log_opponent)).sum(-1)
        own, others = (categorical_kl(each, self.log_reference.expand_as(each)) for each in (log_policy, log_opponent))
        return wins - self.tau * (own - others)

    def best_response(self, log_opponent: Float[Tensor, "*prompts answers"]) -> Float[Tensor, "*prompts answers"]:
        r"""Return :math:`\arg\max_\pi J(\pi, \mu) \propto \rho \exp(P(\cdot \succ \mu) / \tau)`.

        Args:
            log_opponent: Log-probabilities of :math:`\mu`.

        Raises:
            ValueError: If tau is 0, where a best response has no log-probabilities.
        """
        checks.positive(self.tau, "tau of a game with a best response in log-probabilities")
        self._check(log_opponent, "log_opponent")
        return self._best_response(log_opponent)

    def exploitability(self, log_policy: Float[Tensor, "*prompts answers"]) -> Float[Tensor, "*prompts"]:
        r"""Return :math:`\max_q J(q, \pi) - \frac12`: by how much the policy's best opponent beats it.

        It is half of the duality gap :math:`\max_q J(q, \pi) - \min_q J(\pi, q)`, at least 0, and 0 for the Nash policy
        alone (where tau is above 0). Take the mean over prompts for that of a policy over prompts.

        Args:
            log_policy: Log-probabilities of :math:`\pi`.
        """
        if self.tau == 0:
            return (self.win_rate(log_policy).amax(-1) - 0.5).clamp_min(0)
        # As a divergence, and not as a difference of two numbers near 1/2, it keeps its digits as it vanishes.
        return (self.tau * categorical_kl(log_policy, self.best_response(log_policy))).clamp_min(0)

    def mixture(
        self, log_policy: Float[Tensor, "*prompts answers"], *, eta: float
    ) -> Float[Tensor, "*prompts answers"]:
        r"""Return the geometric mixture of policy and reference, :math:`\propto \rho^{\tau/\eta} \pi^{1-\tau/\eta}`.

        Args:
            log_policy: Log-probabilities of :math:`\pi`.
            eta: One over the step size, at least tau.
        """
        self._check(log_policy, "log_policy")
        _check_eta(eta, self.tau)
        return torch.lerp(log_policy, self.log_reference.expand_as(log_policy), self.tau / eta).log_softmax(-1)

    def mirror_step(
        self,
        log_policy: Float[Tensor, "*prompts answers"],
        *,
        eta: float,
        log_opponent: Float[Tensor, "*prompts answers"] | None = None,
    ) -> Float[Tensor, "*prompts answers"]:
        r"""Take one exact step of mirror descent.

        It is :math:`\propto \rho^{\tau/\eta} \pi^{1-\tau/\eta} \exp(P(\cdot \succ \mu) / \eta)`, and maximises
        :math:`E_\pi P(y \succ \mu) - \tau KL(\pi \| \rho)`, the divergence linearised at the policy, less
        :math:`\eta` times the divergence to the policy. Several methods are this step:

        - against itself (``log_opponent=None``): INPO; where tau is 0, multiplicative weights, which SPPO follows;
        - against ``mixture(log_policy, eta=eta)``: Nash-MD, which rests at the Nash policy only as eta grows;
        - ``eta=tau``: the policy drops out of the mixture, and the step is the best response to it, which is iterated
          IPO with a fixed reference.

        Args:
            log_policy: Log-probabilities of :math:`\pi`.
            eta: One over the step size, above 0 and at least tau: the paper's eta.
            log_opponent: Log-probabilities of :math:`\mu`; the policy itself if None.

        Raises:
            ValueError: If eta is below tau, so that the policy would get a negative weight.
        """
        rates = self.win_rate(log_policy if log_opponent is None else log_opponent)
        return (self.mixture(log_policy, eta=eta) + rates / eta).log_softmax(-1)

    def nash(
        self,
        *,
        tolerance: float = 1e-5,
        max_iter: int = 200,
        max_seconds: float | None = None,
    ) -> NashSolution:
        r"""Solve for the Nash policy by Newton's method, from the reference.

        Prompts are solved together, with a line search for each. A step costs :math:`O(answers^3)` a prompt.

        Args:
            tolerance: Largest error of a log-probability against :math:`\log\mathrm{best}(\pi)`, in nats. Rounding
                leaves about the dtype's epsilon over tau.
            max_iter: Most Newton steps.
            max_seconds: Most seconds; None for no limit.

        Returns:
            A :class:`NashSolution`.

        Raises:
            ValueError: If tau is 0, where there may be many Nash policies.
        """
        checks.positive(self.tau, "tau of a game to be solved")
        checks.positive(tolerance, "tolerance")
        budget = Budget(max_iter, max_seconds)
        theta, iteration = self.log_reference, 0
        error = self._error(theta)
        moving = torch.ones_like(error[..., 0], dtype=torch.bool)
        while True:
            residual = error.abs().amax(-1)
            open_ = moving & (residual > tolerance)
            status = Stop.CONVERGED if bool((residual <= tolerance).all()) else budget.spent(iteration)
            if status is None and not bool(open_.any()):
                status = Stop.STALLED
            if status is not None:
                gain = self.tau * categorical_kl(theta, theta - error).clamp_min(0)
                return NashSolution(theta, float(residual.max()), gain, iteration, status)
            step = self._newton_step(theta, error)
            theta, error, moving = self._search(theta, error, step, open_)
            iteration += 1

    def _win_rate(self, log_opponent: Tensor) -> Tensor:
        return (self.preferences @ log_opponent.exp()[..., None]).squeeze(-1)

    def _best_response(self, log_opponent: Tensor) -> Tensor:
        return torch.add(self.log_reference, self._win_rate(log_opponent), alpha=1 / self.tau).log_softmax(-1)

    def _error(self, theta: Tensor) -> Tensor:
        return theta - self._best_response(theta)

    def _newton_step(self, theta: Tensor, error: Tensor) -> Tensor:
        policy = theta.exp()
        # P (diag(p) - p p^T): the rows of P weighed by p, less their means.
        jacobian = (self._win_rate(theta)[..., None] - self.preferences) * (policy / self.tau)[..., None, :]
        jacobian.diagonal(dim1=-2, dim2=-1).add_(1)
        return -torch.linalg.solve(jacobian, error)

    def _search(self, theta: Tensor, error: Tensor, step: Tensor, open_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Halve the steps of open prompts until their errors shrink enough; tell which of them moved."""
        before = _deviation(error)
        length = torch.ones_like(before)
        while True:
            candidate = (theta + length[..., None] * step).log_softmax(-1)
            found = self._error(candidate)
            good = open_ & (_deviation(found) < (1 - 1e-4 * length) * before)
            if bool((good | ~open_ | (length < _SHORTEST)).all()):
                keep = good[..., None]
                return torch.where(keep, candidate, theta), torch.where(keep, found, error), good
            length = torch.where(good, length, length / 2)

    def _check(self, log_policy: Tensor, name: str) -> None:
        _check_policy(log_policy, name, self.preferences.shape[-1])

    def __repr__(self) -> str:
        return f"PreferenceGame(preferences={tuple(self.preferences.shape)}, tau={self.tau})"


def _deviation(error: Tensor) -> Tensor:
    """Measure errors of log-probabilities up to the constant that normalisation takes out."""
    return torch.linalg.vector_norm(error - error.mean(-1, keepdim=True), dim=-1)


def _check_policy(log_policy: Tensor, name: str, answers: int) -> None:
    checks.floating(log_policy, name)
    if log_policy.dim() == 0 or log_policy.shape[-1] != answers:
        raise ValueError(f"{name} must have shape (*prompts, {answers}), got {tuple(log_policy.shape)}")
    checks.finite(log_policy, name)
    checks.require(
        log_policy.detach().logsumexp(-1).abs() <= 1e-3, lambda: f"{name} must hold log-probabilities that add up to 1"
    )


def _check_eta(eta: float, tau: float) -> None:
    checks.positive(eta, "eta")
    if eta < tau:
        raise ValueError(f"eta must be at least tau = {tau}, or the last policy gets a negative weight; got {eta}")
