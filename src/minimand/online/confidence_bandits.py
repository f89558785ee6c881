r"""Bandits that explore what they are unsure of: LinUCB, NeuralUCB and NeuralTS.

All three keep the covariance :math:`Z = \lambda I + \sum_t g_t g_t^\top` of the directions that they were trained in
and take the uncertainty of an action with direction g for

.. math:: s = \sqrt{g^\top Z^{-1} g} .

LinUCB's direction is the context, with a matrix for each action; that of the other two is the gradient of the network's
output with respect to all its weights. LinUCB and NeuralUCB take the action of least :math:`\hat y_a - \nu s_a`;
NeuralTS draws :math:`\mathcal N(\hat y_a, \nu^2 s_a^2)` for each action and takes the least.

Source: Li, Chu, Langford and Schapire 2010, arXiv 1003.0146 (LinUCB); Zhou, Li and Gu 2020, arXiv 1911.04462
(NeuralUCB); Zhang, Zhou, Li and Gu 2021, arXiv 2010.00827 (NeuralTS).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .. import checks
from .bandit_agents import Decision, RandomDraws, check_feedback
from .online_regression import OnlineRegressor, Regression, action_outputs
from .perturbed_output import PerturbedOutput

Covariance = Literal["diagonal", "full"]

# Deviations from the mean at which NeuralTS asks whether the other draws lie above; beyond 8 there is no mass.
_NODES, _REACH = 257, 8.0


class LinUCB(nn.Module):
    r"""LinUCB with disjoint linear models: ridge regression for each action, less its uncertainty.

    .. math:: A_a = \lambda I + \sum_{t: a_t = a} x_t x_t^\top, \quad
              \hat\theta_a = A_a^{-1} \sum_{t: a_t = a} y_t x_t, \quad
              a_t = \arg\min_a \hat\theta_a^\top x - \nu \sqrt{x^\top A_a^{-1} x} .

    The inverses are kept, and updated in :math:`O(d^2)` a round.

    Args:
        in_features: Size d of a context.
        num_actions: Number of actions, at least 2.
        exploration: :math:`\nu` (the paper's :math:`\alpha`), at least 0.
        regularization: :math:`\lambda`, above 0; 1 as in the paper.
        bias: Whether a 1 is put behind each context, with a weight that is regularised like the others.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> agent = LinUCB(2, num_actions=3)
        >>> contexts = torch.eye(2)
        >>> decision = agent.act(contexts)
        >>> agent.update(contexts, decision.action, torch.tensor([0.0, 1.0]))
        >>> agent(contexts).shape
        torch.Size([2, 3])

    Source:
        Li et al. 2010, arXiv 1003.0146, algorithm 1, with losses in place of payoffs.
    """

    inverse: Tensor
    moments: Tensor

    def __init__(
        self,
        in_features: int,
        *,
        num_actions: int,
        exploration: float = 1.0,
        regularization: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_actions < 2:
            raise ValueError(
                f"in_features must be at least 1 and num_actions at least 2, got {in_features} and {num_actions}"
            )
        checks.non_negative(exploration, "exploration")
        checks.positive(regularization, "regularization")
        self.in_features = in_features
        self.exploration = exploration
        self.regularization = regularization
        self.bias = bias
        dims = in_features + bias
        self.register_buffer("inverse", torch.eye(dims).expand(num_actions, dims, dims) / regularization)
        self.register_buffer("moments", torch.zeros(num_actions, dims))

    def forward(self, contexts: Float[Tensor, "batch dims"]) -> Float[Tensor, "batch actions"]:
        """Predict the loss of every action.

        Args:
            contexts: ``(batch, in_features)``.

        Raises:
            ValueError: If contexts have another shape, or are not finite.
        """
        return self._rows(contexts) @ self._weights().mT

    @torch.no_grad()
    def act(self, contexts: Float[Tensor, "batch dims"]) -> Decision:
        """Take the action of least predicted loss less uncertainty, for each context.

        Args:
            contexts: ``(batch, in_features)``.
        """
        rows = self._rows(contexts)
        widths = torch.einsum("bi,aij,bj->ba", rows, self.inverse, rows).clamp_min(0).sqrt()
        return _sure((rows @ self._weights().mT - self.exploration * widths).argmin(-1), rows)

    @torch.no_grad()
    def update(
        self, contexts: Float[Tensor, "batch dims"], action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]
    ) -> None:
        """Add the losses of the actions taken to the regressions.

        Args:
            contexts: ``(batch, in_features)``, as given to :meth:`act`.
            action: The actions taken.
            loss: The losses they brought, in [0, 1].

        Raises:
            TypeError: If ``action`` holds no integers, or ``loss`` no floating-point numbers.
            ValueError: If shapes do not match, an action does not exist, or a loss lies outside [0, 1].
        """
        rows = self._rows(contexts)
        check_feedback(action, loss, batch=len(rows), num_actions=len(self.moments))
        touched = action.unique()
        own = torch.where((action == touched[:, None])[..., None], rows, 0.0)
        self.inverse[touched] = inverse_with_rows(self.inverse[touched], own)
        self.moments.index_add_(0, action, rows * loss.to(rows)[:, None])

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"{self.in_features}, num_actions={len(self.moments)}, exploration={self.exploration}, "
            f"regularization={self.regularization}, bias={self.bias}"
        )

    def _rows(self, contexts: Tensor) -> Tensor:
        checks.floating(contexts, "contexts")
        if contexts.dim() != 2 or contexts.shape[1] != self.in_features:
            raise ValueError(f"contexts must have shape (batch, {self.in_features}), got {tuple(contexts.shape)}")
        checks.finite(contexts.detach(), "contexts")
        return nn.functional.pad(contexts, (0, 1), value=1.0) if self.bias else contexts

    def _weights(self) -> Float[Tensor, "actions dims"]:
        return (self.inverse @ self.moments[..., None]).squeeze(-1)


class NeuralUCB(nn.Module):
    r"""NeuralUCB: the action of least predicted loss less the uncertainty of the network's gradient.

    .. math:: a_t = \arg\min_a f(\theta; x, a) - \nu \sqrt{g_a^\top Z^{-1} g_a}, \qquad
              g_a = \nabla_\theta f(\theta; x, a), \quad Z = \lambda I + \sum_t g_t g_t^\top .

    The network learns as that of :class:`NeuralCB`, by one step a round. With ``loss="kl"`` it predicts logits, and is
    optimistic in them.

    Args:
        network: As :class:`NeuralCB` takes it, but not a :class:`PerturbedOutput`.
        exploration: :math:`\nu`, at least 0. It and ``regularization`` absorb the papers' factors of the width m and
            of :math:`\lambda` before the square root; the default is ours, and is there to be tuned.
        regularization: :math:`\lambda`, above 0; the default is ours.
        covariance: ``"diagonal"`` keeps the diagonal of Z, as the papers' experiments do; ``"full"`` keeps its
            inverse, a square matrix as wide as there are weights: for small networks.
        loss: What the network is trained by: ``"square"`` (the paper) or ``"kl"``.
        optimizer: Of the network's parameters; plain SGD at ``lr`` by default. Its ``weight_decay`` is not the paper's
            pull to the initial weights.
        lr: Learning rate of the default optimizer.

    Raises:
        ValueError: If a setting is out of range, or the network has no parameter that needs a gradient.
        TypeError: If the network is a :class:`PerturbedOutput`.

    Example:
        >>> agent = NeuralUCB(nn.Linear(2, 3), exploration=0.5)
        >>> contexts = torch.eye(2)
        >>> decision = agent.act(contexts)
        >>> loss = agent.update(contexts, decision.action, torch.tensor([0.0, 1.0]))
        >>> decision.probability
        tensor([1., 1.])

    Source:
        Zhou, Li and Gu 2020, arXiv 1911.04462, algorithm 1, with losses in place of rewards, and with a step a round
        where the paper retrains on all rounds.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        exploration: float = 0.1,
        regularization: float = 1.0,
        covariance: Covariance = "diagonal",
        loss: Regression = "square",
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        checks.non_negative(exploration, "exploration")
        self.regressor = OnlineRegressor(network, loss=loss, optimizer=optimizer, lr=lr)
        self.uncertainty = GradientCovariance(network, regularization=regularization, covariance=covariance)
        self.exploration = exploration

    def forward(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Predict the loss of every action, as :class:`OnlineRegressor` does.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        predicted: Tensor = self.regressor(contexts)
        return predicted

    def act(self, contexts: Tensor) -> Decision:
        """Take the action of least predicted loss less uncertainty, for each context.

        Args:
            contexts: ``(batch, *)``, as the network takes them.

        Raises:
            ValueError: If the network's output has another shape or is not finite.
        """
        outputs, gradients = output_gradients(self.regressor.network, contexts)
        return _sure((outputs - self.exploration * self.uncertainty(gradients)).argmin(-1), outputs)

    def update(
        self, contexts: Tensor, action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Add the gradients of the actions taken to the covariance, then learn as :meth:`OnlineRegressor.update` does.

        Args:
            contexts: ``(batch, *)``, as given to :meth:`act`.
            action: The actions taken.
            loss: The losses they brought, in [0, 1].
        """
        return _add_and_learn(self.regressor, self.uncertainty, contexts, action, loss)

    def extra_repr(self) -> str:
        """Show the setting."""
        return f"exploration={self.exploration}"


class NeuralTS(nn.Module):
    r"""NeuralTS: Thompson sampling, with the uncertainty of the network's gradient for a standard deviation.

    .. math:: \tilde y_a \sim \mathcal N\bigl(f(\theta; x, a),\ \nu^2\, g_a^\top Z^{-1} g_a\bigr), \qquad
              a_t = \arg\min_a \tilde y_a .

    One number is drawn for each action, independently. The probability of the action that was taken is the integral

    .. math:: p_a = \int \varphi(z) \prod_{b \ne a} \Phi\Bigl(\frac{f_b - f_a - \nu s_a z}{\nu s_b}\Bigr)\, dz

    on 257 nodes: exact to many digits, unless one deviation is far below another's; then still to 0.02.

    Args:
        network: As :class:`NeuralCB` takes it, but not a :class:`PerturbedOutput`.
        exploration: :math:`\nu`, at least 0, as of :class:`NeuralUCB`.
        regularization: :math:`\lambda`, above 0.
        covariance: ``"diagonal"`` or ``"full"``, as of :class:`NeuralUCB`.
        loss: What the network is trained by: ``"square"`` (the paper) or ``"kl"``.
        optimizer: Of the network's parameters; plain SGD at ``lr`` by default.
        lr: Learning rate of the default optimizer.
        seed: Of the generator that draws.

    Raises:
        ValueError: If a setting is out of range, or the network has no parameter that needs a gradient.
        TypeError: If the network is a :class:`PerturbedOutput`.

    Example:
        >>> agent = NeuralTS(nn.Linear(2, 3), exploration=0.5)
        >>> contexts = torch.eye(2)
        >>> decision = agent.act(contexts)
        >>> loss = agent.update(contexts, decision.action, torch.tensor([0.0, 1.0]))
        >>> bool((decision.probability < 1).all())
        True

    Source:
        Zhang, Zhou, Li and Gu 2021, arXiv 2010.00827, algorithm 1, with losses in place of rewards, and with a step a
        round where the paper retrains on all rounds. The probability is ours.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        exploration: float = 0.1,
        regularization: float = 1.0,
        covariance: Covariance = "diagonal",
        loss: Regression = "square",
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.non_negative(exploration, "exploration")
        self.regressor = OnlineRegressor(network, loss=loss, optimizer=optimizer, lr=lr)
        self.uncertainty = GradientCovariance(network, regularization=regularization, covariance=covariance)
        self.exploration = exploration
        self.draws = RandomDraws(seed)

    def forward(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Predict the loss of every action, as :class:`OnlineRegressor` does.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        predicted: Tensor = self.regressor(contexts)
        return predicted

    def act(self, contexts: Tensor) -> Decision:
        """Draw a loss for each action and take the least, for each context.

        Args:
            contexts: ``(batch, *)``, as the network takes them.

        Raises:
            ValueError: If the network's output has another shape or is not finite.
        """
        outputs, gradients = output_gradients(self.regressor.network, contexts)
        deviations = self.exploration * self.uncertainty(gradients)
        action = (outputs + deviations * self.draws.normal(outputs)).argmin(-1)
        return Decision(action, probability_of_least(outputs, deviations, action))

    def update(
        self, contexts: Tensor, action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Add the gradients of the actions taken to the covariance, then learn as :meth:`OnlineRegressor.update` does.

        Args:
            contexts: ``(batch, *)``, as given to :meth:`act`.
            action: The actions taken.
            loss: The losses they brought, in [0, 1].
        """
        return _add_and_learn(self.regressor, self.uncertainty, contexts, action, loss)

    def extra_repr(self) -> str:
        """Show the setting."""
        return f"exploration={self.exploration}"


class GradientCovariance(nn.Module):
    r"""The covariance :math:`Z = \lambda I + \sum_t g_t g_t^\top` of gradients, and how far a gradient is from them.

    Args:
        network: Whose parameters that need a gradient are counted.
        regularization: :math:`\lambda`, above 0.
        covariance: ``"diagonal"`` or ``"full"``.
    """

    diagonal: Tensor
    inverse: Tensor

    def __init__(self, network: nn.Module, *, regularization: float, covariance: Covariance) -> None:
        super().__init__()
        checks.positive(regularization, "regularization")
        checks.one_of(covariance, "covariance", ("diagonal", "full"))
        if isinstance(network, PerturbedOutput):
            raise TypeError("network must be a plain one: gradients explore here, not perturbations")
        self.covariance = covariance
        learnt = nn.utils.parameters_to_vector([each for each in network.parameters() if each.requires_grad]).detach()
        if covariance == "diagonal":
            self.register_buffer("diagonal", torch.full_like(learnt, regularization))
        else:
            self.register_buffer("inverse", torch.diag(torch.full_like(learnt, 1 / regularization)))

    def forward(self, gradients: list[Tensor]) -> Float[Tensor, "batch chosen"]:
        r"""Return :math:`\sqrt{g^\top Z^{-1} g}`.

        Args:
            gradients: Vectors g, as :func:`output_gradients` returns them.
        """
        if self.covariance == "diagonal":
            inverses = self.diagonal.reciprocal().split([part.shape[-1] for part in gradients])
            squares = [part.square() @ inverse for part, inverse in zip(gradients, inverses, strict=True)]
            return torch.stack(squares).sum(0).sqrt()
        rows = torch.cat(gradients, -1)
        return ((rows @ self.inverse) * rows).sum(-1).clamp_min(0).sqrt()

    def update(self, gradients: list[Tensor]) -> None:
        """Add gradients to the covariance.

        Args:
            gradients: Vectors g, as :func:`output_gradients` returns them.
        """
        rows = torch.cat(gradients, -1).flatten(0, 1)
        if self.covariance == "diagonal":
            self.diagonal += rows.square().sum(0)
        else:
            self.inverse.copy_(inverse_with_rows(self.inverse, rows))

    def extra_repr(self) -> str:
        """Show the setting."""
        return f"covariance={self.covariance!r}"


def inverse_with_rows(
    inverse: Float[Tensor, "*batch dims dims"], rows: Float[Tensor, "*batch rows dims"]
) -> Float[Tensor, "*batch dims dims"]:
    r"""Return :math:`(A + X^\top X)^{-1}` for a positive definite A, given its inverse, by Woodbury's identity.

    Args:
        inverse: :math:`A^{-1}`.
        rows: X; rows of zeros change nothing.
    """
    product = rows @ inverse
    inner = product @ rows.mT + torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), product, upper=False)
    return inverse - half.mT @ half


@torch.enable_grad()
def output_gradients(
    network: nn.Module, contexts: Tensor, action: Int[Tensor, " batch"] | None = None
) -> tuple[Float[Tensor, "batch actions"], list[Tensor]]:
    """Return the outputs of a network, and the gradients of them with respect to its parameters that need one.

    Gradients are left in one piece a parameter, flattened, ``(batch, chosen, numel)``: to join them would copy what is
    often much more than everything else that a decision touches.

    Args:
        network: Maps contexts ``(batch, *)`` to ``(batch, actions)`` or ``(batch, actions, 1)``.
        contexts: Contexts.
        action: Of which action's output the gradient is asked for, in each context; None for those of all.

    Raises:
        ValueError: If the output has another shape or is not finite.
    """
    learnt = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if len(contexts) == 1:
        # The usual round. Backward from all actions at once costs a third of what torch.func takes to dispatch.
        outputs = action_outputs(network(contexts)[None], batch=1)[0]
        if action is None:
            directions = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
            parts = torch.autograd.grad(outputs[0], list(learnt.values()), directions, is_grads_batched=True)
        else:
            parts = torch.autograd.grad(outputs[0, action].sum(), list(learnt.values()))
        return outputs.detach(), [part.reshape(1, len(part) if action is None else 1, -1) for part in parts]

    def of_one(parameters: dict[str, Tensor], context: Tensor, action: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs = action_outputs(functional_call(network, parameters, (context[None],))[None], batch=1)[0, 0]
        return outputs if action is None else outputs.gather(0, action[None]), outputs

    parameters = {name: parameter.detach() for name, parameter in learnt.items()}
    over = (None, 0, None if action is None else 0)
    jacobians, outputs = vmap(jacrev(of_one, has_aux=True), in_dims=over)(parameters, contexts, action)
    # Values cannot be read inside of vmap.
    checks.finite(outputs, "the network's output")
    return outputs, [jacobians[name].flatten(2) for name in learnt]


def probability_of_least(
    means: Float[Tensor, "batch actions"], deviations: Float[Tensor, "batch actions"], action: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    r"""Return the probability that the given one of independent normal variables is the least.

    Args:
        means: Their means.
        deviations: Their standard deviations, at least 0.
        action: Which.
    """
    nodes = torch.linspace(-_REACH, _REACH, _NODES, dtype=means.dtype, device=means.device)
    density = torch.exp(-nodes.square() / 2)
    chosen = action[:, None]
    values = means.gather(1, chosen) + deviations.gather(1, chosen) * nodes
    tiny = torch.finfo(means.dtype).tiny
    above = torch.special.ndtr((means[:, None] - values[..., None]) / deviations.clamp_min(tiny)[:, None])
    # The chosen one is not compared with itself.
    above = above.scatter(-1, chosen[:, None].expand(-1, _NODES, 1), 1.0)
    return (above.prod(-1) @ density) / density.sum()


def _sure(action: Tensor, like: Tensor) -> Decision:
    return Decision(action, torch.ones(len(action), dtype=like.dtype, device=like.device))


def _add_and_learn(
    regressor: OnlineRegressor, uncertainty: GradientCovariance, contexts: Tensor, action: Tensor, loss: Tensor
) -> Tensor:
    with torch.no_grad():
        predicted = regressor(contexts)
    check_feedback(action, loss, batch=len(predicted), num_actions=predicted.shape[1])
    # At the weights that the action was taken with: the step comes after.
    _, gradients = output_gradients(regressor.network, contexts, action.long())
    uncertainty.update(gradients)
    return regressor.update(contexts, action, loss)
