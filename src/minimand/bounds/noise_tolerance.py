r"""How much noise on its weights a classifier bears.

For a network with weights :math:`w` and training accuracy :math:`a(w)`, the tolerance is the largest :math:`s` with

.. math:: a(w) - \mathbb E_{u \sim N(0, I)}\, a(w + s\, u) \le \mathrm{drop},

found by bisection. The noise is drawn once and scaled, so that the search meets one fixed function of :math:`s`. In the
form that knows magnitudes, weight :math:`w_i` gets noise of variance :math:`s^2 w_i^2 + \epsilon^2`.

Source: Jiang, Neyshabur, Mobahi, Krishnan and Bengio, "Fantastic Generalization Measures and Where to Find Them",
ICLR 2020, arXiv 1912.02178, appendix on PAC-Bayes measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..stopping import Budget, Stop
from .weight_matrices import FoldedNetwork, fold

_BATCH = 4096
_ROOM = 2**22  # numbers that a chunk of draws may hold


@dataclasses.dataclass(frozen=True)
class NoiseTolerance:
    """What :func:`noise_tolerance` found.

    Args:
        sigma: Standard deviation of the largest noise that is borne.
        drop: Mean drop of accuracy under it.
        iterations: Bisections made.
        status: Why the search stopped.
    """

    sigma: float
    drop: float
    iterations: int
    status: Stop


def noise_tolerance(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    target: Int[Tensor, " examples"],
    *,
    drop: float = 0.1,
    largest: float = 2.0,
    magnitude_epsilon: float | None = None,
    num_samples: int = 10,
    tolerance: float = 0.01,
    max_iter: int = 15,
    max_seconds: float | None = None,
    generator: torch.Generator | None = None,
) -> NoiseTolerance:
    """Find the largest noise on the weights and biases that costs no more than ``drop`` of the accuracy.

    Args:
        model: In evaluation mode; batch norm is folded first. Left as it was.
        inputs: ``(examples, ...)``.
        target: ``(examples,)`` class indices.
        drop: Accuracy that may be lost, in (0, 1).
        largest: Upper end of the search.
        magnitude_epsilon: None: all weights get noise of standard deviation ``s``. A number: that of weight ``w`` is
            ``sqrt((s w)**2 + magnitude_epsilon**2)``.
        num_samples: Draws of the noise.
        tolerance: The search ends when the drop is this close to ``drop``; it also ends when the interval left is
            a millionth of ``largest``, since accuracy moves in steps.
        max_iter: Most bisections.
        max_seconds: Most seconds; None for no limit.
        generator: Source of the noise; None for torch's own.

    Returns:
        The noise that is borne, with the drop measured under it; 0 where even the smallest noise tried costs more.

    Raises:
        ValueError: If the model cannot be read, or an argument is out of range.

    Example:
        >>> model = nn.Linear(1, 2, bias=False).eval()
        >>> model.weight.data = torch.tensor([[-0.5], [0.5]])  # predicts the sign of x
        >>> inputs, target = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = noise_tolerance(model, inputs, target, num_samples=2000, generator=generator)
        >>> round(noise.sigma, 1)  # the difference of weights, 1, turns its sign in a tenth of the draws
        0.6

    Source:
        Jiang et al. 2020, arXiv 1912.02178, whose drop of 0.1 is the default; 15 bisections on [0, 2] with 10 draws and
        tolerance 0.01 are those of Dziugaite et al. 2020, arXiv 2010.11924.
    """
    checks.between(drop, "drop", 0, 1, low_open=True, high_open=True)
    checks.positive(largest, "largest")
    checks.positive(tolerance, "tolerance")
    if magnitude_epsilon is not None:
        checks.positive(magnitude_epsilon, "magnitude_epsilon")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    budget = Budget(max_iter, max_seconds)
    with torch.no_grad():
        network = fold(model)
        scores = network.scores(inputs)
        checks.class_scores(scores, target)
        right = float((scores.argmax(1) == target).double().mean())
        noise = Noise(network, num_samples, magnitude_epsilon=magnitude_epsilon, generator=generator)
        return _bisect(lambda sigma: right - noise.accuracy(sigma, inputs, target), drop, largest, tolerance, budget)


class Noise:
    """Draws of Gaussian noise on a network's weights, the same ones at every scale.

    The draws are made anew from a seed each time, so that they need not be kept.

    Args:
        network: Whose parameters are moved.
        num_samples: Draws.
        magnitude_epsilon: See :func:`noise_tolerance`.
        generator: Source of the seed.
    """

    def __init__(
        self,
        network: FoldedNetwork,
        num_samples: int,
        *,
        magnitude_epsilon: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        device = "cpu" if generator is None else generator.device
        self.network, self.num_samples = network, num_samples
        self.seed = int(torch.randint(2**62, (), generator=generator, device=device))
        self.magnitude_epsilon = magnitude_epsilon

    def accuracy(self, sigma: float, inputs: Tensor, target: Tensor) -> float:
        """Return the mean accuracy over the draws, scaled by ``sigma``."""
        parameters = self.network.parameters
        generator = torch.Generator(inputs.device).manual_seed(self.seed)
        chunk, right = self._chunk(inputs), 0
        for start in range(0, self.num_samples, chunk):
            draws = min(chunk, self.num_samples - start)
            moved = {name: self._moved(weight, sigma, draws, generator) for name, weight in parameters.items()}
            for part, labels in zip(inputs.split(_BATCH), target.split(_BATCH), strict=True):
                right += int((self._predict(part, moved, draws) == labels).sum())
        return right / (self.num_samples * len(inputs))

    def _moved(self, weight: Tensor, sigma: float, draws: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn((draws, *weight.shape), generator=generator, dtype=weight.dtype, device=weight.device)
        if self.magnitude_epsilon is None:
            return noise.mul_(sigma).add_(weight)
        return noise.mul_((weight.square() * sigma**2 + self.magnitude_epsilon**2).sqrt()).add_(weight)

    def _predict(self, inputs: Tensor, moved: dict[str, Tensor], draws: int) -> Tensor:
        if draws == 1:
            return self.network(inputs, {name: weight[0] for name, weight in moved.items()}).argmax(-1)
        return torch.func.vmap(lambda parameters: self.network(inputs, parameters))(moved).argmax(-1)

    def _chunk(self, inputs: Tensor) -> int:
        """Return how many draws are run at once: as many as fit, and one by one for convolutions."""
        matrices = [self.network.parameters[name] for name in self.network.layers]
        if any(matrix.dim() > 2 for matrix in matrices):
            return 1  # stacked, they become grouped convolutions, which cost more than one after the other
        widest = max(len(matrix) for matrix in matrices)
        weights = sum(weight.numel() for weight in self.network.parameters.values())
        return max(1, min(self.num_samples, _ROOM // max(weights, widest * min(len(inputs), _BATCH))))


def _bisect(
    lost: Callable[[float], float], drop: float, largest: float, tolerance: float, budget: Budget
) -> NoiseTolerance:
    low, high = (0.0, 0.0), largest
    iteration = 0
    while (stop := budget.spent(iteration)) is None:
        # The upper end first: a network that bears it needs no search.
        sigma = largest if iteration == 0 else (low[0] + high) / 2
        found = lost(sigma)
        iteration += 1
        close = iteration > 1 and abs(found - drop) < tolerance
        if close or (iteration == 1 and found <= drop):
            return NoiseTolerance(sigma, found, iteration, Stop.CONVERGED)
        if found > drop:
            high = sigma
        else:
            low = (sigma, found)
        if high - low[0] <= 1e-6 * largest:
            return NoiseTolerance(*low, iteration, Stop.CONVERGED)
    return NoiseTolerance(*low, iteration, stop)
