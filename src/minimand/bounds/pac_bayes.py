r"""Bounds on the error of a trained classifier, with every constant.

Both rest on Maurer's form of the PAC-Bayes theorem: for a prior :math:`P` fixed before the :math:`m` examples are
seen, with probability :math:`1 - \delta` for all :math:`Q` at once,

.. math:: \operatorname{kl}(\hat L_Q \,\|\, L_Q) \le \frac{KL(Q \| P) + \ln (2 \sqrt m / \delta)}{m},

:math:`\operatorname{kl}` the divergence of two coins.

*The network with noise.* :math:`Q = N(w, s^2 I)`, :math:`P = N(w^0, \lambda^2 I)` over :math:`N` weights and biases:
:math:`2 KL = N (s^2 / \lambda^2 - 1 - \ln (s^2 / \lambda^2)) + \|w - w^0\|^2 / \lambda^2`. The prior's size is chosen
among :math:`2^{j/2}`, the noise's among a few, each at its share of :math:`\delta`; the error under noise is estimated
from draws, with its own bound.

*The network itself*, for fully connected ReLU networks. Biases become weights of a constant input. Layers are rescaled
to one spectral norm :math:`\beta`, and so that the margin is 1. Noise of standard deviation :math:`\sigma` with

.. math:: B \Bigl[ \prod_i (\beta + \sigma \tau_i) - \beta^D \Bigr] \le \frac14, \qquad
          \tau_i = \sqrt{a_i} + \sqrt{b_i} + \sqrt{2 \ln (2 D)},

moves no output by more than 1/4 with probability 1/2, for layers of :math:`a_i \times b_i` weights and inputs no longer
than :math:`B`. On that half of the noise the network's error is at most the noisy network's share of margins below 1/2,
and that at most :math:`\hat L_\gamma`, the share of training margins below :math:`\gamma`. Confined to it, the
divergence is at most :math:`2 (KL + \ln 2)`, so that

.. math:: \operatorname{kl}(\hat L_\gamma \,\|\, L) \le \frac1m \Bigl[ \frac{\sum_i \|W_i\|_F^2}{\sigma^2} + 2 \ln 2
          + \ln \frac{2 \sqrt m}{\delta_\sigma} \Bigr].

Source: Maurer, "A Note on the PAC Bayesian Theorem", 2004, arXiv cs/0411099; Dziugaite and Roy, "Computing Nonvacuous
Generalization Bounds for Deep (Stochastic) Neural Networks with Many More Parameters than Training Data", UAI 2017,
arXiv 1703.11008; Neyshabur, Bhojanapalli and Srebro, "A PAC-Bayesian Approach to Spectrally-Normalized Margin Bounds
for Neural Networks", ICLR 2018, arXiv 1707.09564. The constants of the second bound are derived here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .generalization_measures import margin_quantile
from .noise_tolerance import Noise
from .weight_matrices import FoldedNetwork, fold, squared_spectral_norms, trace


@dataclasses.dataclass(frozen=True)
class PACBayesBound:
    """What :func:`pac_bayes_bound` found.

    Args:
        error: With probability ``1 - delta`` the error of the network with noise is at most this.
        training_error: Mean training error under the noise.
        sigma: Standard deviation of the noise.
        divergence: KL of the noisy weights from the prior, in nats.
    """

    error: float
    training_error: float
    sigma: float
    divergence: float

    @property
    def vacuous(self) -> bool:
        """Whether the bound promises no more than guessing one class out of many: an error of 1."""
        return self.error >= 1 - 1e-6


@dataclasses.dataclass(frozen=True)
class SpectralMarginBound:
    """What :func:`spectral_margin_bound` found.

    Args:
        error: With probability ``1 - delta`` the error of the network is at most this.
        complexity: The bracket of the formula over m: what kl may be; far above 1 the bound is vacuous.
        margin: The margin gamma.
        margin_error: Share of training examples with smaller margins.
    """

    error: float
    complexity: float
    margin: float
    margin_error: float

    @property
    def vacuous(self) -> bool:
        """Whether the bound promises no more than an error of 1."""
        return self.error >= 1 - 1e-6


def binary_kl_inverse(rate: float, divergence: float) -> float:
    r"""Compute the largest :math:`p` with :math:`\operatorname{kl}(q \| p) \le c`.

    Args:
        rate: Observed rate, q, in [0, 1].
        divergence: c, at least 0, in nats.

    Returns:
        p, between the rate and 1.

    Raises:
        ValueError: If the rate is no probability or the divergence is negative.

    Example:
        >>> round(binary_kl_inverse(0.0, 0.5), 4)  # 1 - exp(-0.5)
        0.3935

    Source:
        Langford and Caruana, "(Not) Bounding the True Error", NeurIPS 2001.
    """
    checks.between(rate, "rate", 0, 1)
    if math.isnan(divergence) or divergence < 0:
        raise ValueError(f"divergence must be a number of at least 0, got {divergence}")
    low, high = rate, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _binary_kl(rate, middle) > divergence:
            high = middle
        else:
            low = middle
    return high


def pac_bayes_bound(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    target: Int[Tensor, " examples"],
    *,
    initial_state: Mapping[str, Tensor] | None = None,
    delta: float = 0.05,
    num_samples: int = 100,
    generator: torch.Generator | None = None,
) -> PACBayesBound:
    """Bound the error of a trained classifier with Gaussian noise on its weights.

    It speaks of the network with noise, not of the network, and of examples drawn independently from one distribution.

    Args:
        model: In evaluation mode; batch norm is folded first, and the folded weights get the noise.
        inputs: The training inputs.
        target: The training labels, class indices.
        initial_state: Centre of the prior, which must not depend on the examples: the random start of training. None:
            zero.
        delta: Probability with which the bound may be wrong.
        num_samples: Draws of the noise that estimate the error under it.
        generator: Source of the noise; None: a fixed seed.

    Returns:
        The bound of the best noise tried.

    Raises:
        ValueError: If the model cannot be read or an argument is out of range.

    Example:
        >>> model = nn.Linear(1, 2, bias=False).eval()
        >>> model.weight.data = torch.tensor([[-1.0], [1.0]])
        >>> inputs = torch.cat([torch.full((2000, 1), -1.0), torch.full((2000, 1), 1.0)])
        >>> bound = pac_bayes_bound(model, inputs, (inputs[:, 0] > 0).long())
        >>> 0 < bound.error < 0.1
        True

    Source:
        Maurer 2004, arXiv cs/0411099; Dziugaite and Roy 2017, arXiv 1703.11008, whose construction this is without
        their training of the noise.
    """
    checks.between(delta, "delta", 0, 1, low_open=True, high_open=True)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    with torch.no_grad():
        network = fold(model)
        checks.class_scores(network.scores(inputs), target)
        start = None if initial_state is None else fold(model, initial_state)
        squares, length, count = 0.0, 0.0, 0
        for name, weight in network.parameters.items():
            moved = weight if start is None else weight - start.parameters[name]
            squares += float(moved.double().square().sum())
            length += float(weight.double().square().sum())
            count += weight.numel()
        fixed = torch.Generator().manual_seed(0) if generator is None else generator
        noise = Noise(network, num_samples, generator=fixed)
        size = math.sqrt(max(length, 1e-12) / count)
        best = None
        for step in range(_NOISES):
            sigma = size * 2.0 ** (1 - step)
            training_error = 1 - noise.accuracy(sigma, inputs, target)
            # Half of delta for the draws, half for the theorem; the draws' half is shared among the noises tried.
            drawn = binary_kl_inverse(training_error, math.log(2 * _NOISES / delta) / num_samples)
            divergence, budget = min(
                _gaussian_divergence(sigma, 2 ** (power / 2), squares, count, delta / 2, power)
                for power in range(*_powers(sigma, squares, count))
            )[1:]
            error = binary_kl_inverse(drawn, (budget + math.log(2 * math.sqrt(len(inputs)))) / len(inputs))
            if best is None or error < best.error:
                best = PACBayesBound(error, training_error, sigma, divergence)
    assert best is not None
    return best


def spectral_margin_bound(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    target: Int[Tensor, " examples"],
    *,
    delta: float = 0.05,
    quantile: float = 0.1,
    input_norm: float | None = None,
) -> SpectralMarginBound:
    """Bound the error of a fully connected ReLU network by its margin and the norms of its layers.

    Args:
        model: Linear layers with ReLU between them, in evaluation mode; batch norm is folded first.
        inputs: The training inputs ``(examples, features)``.
        target: The training labels, class indices.
        delta: Probability with which the bound may be wrong.
        quantile: Of the training margins, gamma; any may be chosen after seeing the data.
        input_norm: Length that no input of the distribution exceeds; None: that of the longest training input, which
            is then an assumption on the others.

    Returns:
        The bound, its margin and its complexity.

    Raises:
        ValueError: If the network is of another kind, the margin is not positive, or an input is longer than
            ``input_norm``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> inputs = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> spectral_margin_bound(model, inputs, model(inputs).argmax(1)).vacuous
        True

    Source:
        Neyshabur et al. 2018, arXiv 1707.09564, theorem 1; the constants are derived here.
    """
    checks.between(delta, "delta", 0, 1, low_open=True, high_open=True)
    if inputs.dim() != 2:
        raise ValueError(f"inputs must have shape (examples, features), got {tuple(inputs.shape)}")
    checks.finite(inputs, "inputs")
    with torch.no_grad():
        network = fold(model)
        _require_plain(network)
        scores = network.scores(inputs)
        margin = float(margin_quantile(scores, target, quantile=quantile))
        if margin <= 0:
            raise ValueError(
                f"the margin at quantile {quantile} is {margin:.4g}: without a positive one there is no bound"
            )
        longest = float(inputs.norm(dim=1).max())
        if input_norm is None:
            input_norm = longest
        elif input_norm < longest:
            raise ValueError(f"input_norm is {input_norm}, but a training input has length {longest:.4g}")
        matrices = _with_biases(network)
        spectral = squared_spectral_norms(matrices).sqrt().tolist()
        frobenius = [float(matrix.norm()) for matrix in matrices]
        shapes = [tuple(matrix.shape) for matrix in matrices]
        # A margin below gamma, as the margin bound counts it.
        others = scores.scatter(1, target[:, None], -math.inf).amax(1)
        margins = scores.gather(1, target[:, None])[:, 0] - others
        margin_error = float((margins < margin).double().mean())
    depth, examples = len(matrices), len(inputs)
    bound = math.sqrt(input_norm**2 + 1)  # the constant input that biases read
    beta = (math.prod(spectral) / margin) ** (1 / depth)
    reach = [math.sqrt(rows) + math.sqrt(columns) + math.sqrt(2 * math.log(2 * depth)) for rows, columns in shapes]
    power = math.floor(math.log2(_largest_noise(beta, reach, bound)))
    sigma = 2.0**power
    squares = sum((beta * whole / top) ** 2 for whole, top in zip(frobenius, spectral, strict=True))
    budget = squares / sigma**2 + 2 * math.log(2) + math.log(2 * math.sqrt(examples)) - math.log(delta * _share(power))
    error = binary_kl_inverse(margin_error, budget / examples)
    return SpectralMarginBound(error, budget / examples, margin, margin_error)


_NOISES = 12


def _binary_kl(q: float, p: float) -> float:
    first = q * math.log(q / p) if q > 0 else 0.0
    second = (1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0
    return first + second


def _share(power: int) -> float:
    """Return the share of delta of one power of a grid over all whole numbers; the shares add up to one."""
    return 2 / (3 * (abs(power) + 1) * (abs(power) + 2))


def _gaussian_divergence(
    sigma: float, prior: float, squares: float, count: int, delta: float, power: int
) -> tuple[float, float, float]:
    ratio = (sigma / prior) ** 2
    divergence = 0.5 * (count * (ratio - 1 - math.log(ratio)) + squares / prior**2)
    budget = divergence - math.log(delta * _share(power))
    return budget, divergence, budget


def _powers(sigma: float, squares: float, count: int) -> tuple[int, int]:
    """Return the range of half powers of two around the best size of the prior."""
    best = round(math.log2(sigma**2 + squares / count))
    return best - 2, best + 3


def _largest_noise(beta: float, reach: list[float], bound: float) -> float:
    """Return the largest noise that moves no output by more than a quarter."""

    def moves(sigma: float) -> float:
        # Of the product less its first term, without the cancellation that small noise would bring.
        return bound * beta ** len(reach) * math.expm1(sum(math.log1p(sigma * one / beta) for one in reach))

    low, high = 0.0, 1 / (4 * bound * beta ** (len(reach) - 1) * min(reach))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if moves(middle) >= 0.25 else (middle, high)
    return low


def _with_biases(network: FoldedNetwork) -> list[Tensor]:
    """Return double-precision matrices that act on activations and a constant one."""
    found = []
    for place, name in enumerate(network.layers):
        weight = network.parameters[name].double()
        bias = network.parameters.get(name.removesuffix("weight") + "bias")
        column = torch.zeros_like(weight[:, :1]) if bias is None else bias.double()[:, None]
        matrix = torch.cat([weight, column], 1)
        if place < len(network.layers) - 1:
            row = torch.zeros_like(matrix[:1])
            row[0, -1] = 1
            matrix = torch.cat([matrix, row])
        found.append(matrix)
    return found


def _require_plain(network: FoldedNetwork) -> None:
    """Raise unless the network is a chain of linear layers with ReLU between them."""
    traced = trace(network.network)
    modules = dict(traced.named_modules())
    kinds: list[str] = []
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        kind = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        name = getattr(kind, "__name__", str(kind))
        if kind in (nn.Identity, nn.Dropout) or (kind is nn.Flatten and not kinds):
            continue
        kinds.append("relu" if name in ("ReLU", "relu") else name)
        if len(node.all_input_nodes) != 1 or kinds[-1] != ("Linear", "relu")[(len(kinds) - 1) % 2]:
            raise ValueError(
                f"the spectral margin bound is for linear layers with ReLU between them, and {node.target} is none"
            )
    if not kinds or kinds[-1] != "Linear":
        raise ValueError("the spectral margin bound is for networks that end in a linear layer")
