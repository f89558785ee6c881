r"""Generalization measures: numbers that a trained classifier and its training set are said to betray its error by.

With weight matrices :math:`W_1, \dots, W_D` (convolutions as matrices of their output channels, batch norm folded in,
biases left out), their starts :math:`W_i^0`, all weights :math:`w` as one vector, :math:`m` training examples, and the
margin :math:`\gamma`, a low quantile of correct score less best other score:

================================  =====================================================================================
``parameter_count``               number :math:`P` of weights
``l2_norm``, ``l2_distance``      :math:`\|w\|_2`, :math:`\|w - w^0\|_2`
``parameter_norm``                :math:`\sum_i \|W_i\|_F^2`
``frobenius_distance``            :math:`\sum_i \|W_i - W_i^0\|_F^2`
``spectral_distance``             :math:`\sum_i \|W_i - W_i^0\|_2^2`
``inverse_margin``                :math:`1 / \gamma^2`
``log_spectral_product``          :math:`p = \sum_i \log \|W_i\|_2^2`
``log_spectral_sum``              :math:`\log D + p / D`
``frobenius_over_spectral``       :math:`r = \sum_i \|W_i\|_F^2 / \|W_i\|_2^2`
``log_spectral_main``             :math:`p - 2 \log \gamma + \log r`
``log_spectral_main_distance``    the same with :math:`\|W_i - W_i^0\|_F^2` over :math:`\|W_i\|_2^2`
``log_frobenius_product``         :math:`f = \sum_i \log \|W_i\|_F^2`
``log_frobenius_sum``             :math:`\log D + f / D`
``path_norm``                     outputs, summed, of the network with squared parameters on an input of ones
``sharpness``                     rise of the cross-entropy within 0.05, :func:`minimand.bounds.sharpness`
``inverse_noise``                 :math:`1 / s^2`, :math:`s` the noise of :func:`minimand.bounds.noise_tolerance`
``pac_bayes_norm``                :math:`\|w\|^2 / 4 s^2 + \log(m / s) + 10`
``pac_bayes_distance``            the same with :math:`\|w - w^0\|^2`
``inverse_magnitude_noise``       :math:`1 / s'^2`, :math:`s'` the noise in proportion to magnitudes
``pac_bayes_magnitude_norm``      :math:`\frac14 \sum_i \log \frac{\epsilon^2 + (s'^2 + 1) \|w\|^2 / P}
                                  {\epsilon^2 + s'^2 (w_i - w_i^0)^2} + \log(m / s') + 10`
``pac_bayes_magnitude_distance``  the same with :math:`\|w - w^0\|^2` above
================================  =====================================================================================

The logarithms of products and sums, and ``path_norm``, also come ``..._over_margin``: less :math:`2 \log \gamma`
inside, or over :math:`\gamma^2`.

None is an error rate, and :func:`minimand.bounds.twin_audit` shows that none can be turned into a good estimate of one
without an assumption on the data.

Source: Jiang, Neyshabur, Mobahi, Krishnan and Bengio, "Fantastic Generalization Measures and Where to Find Them",
ICLR 2020, arXiv 1912.02178; Dziugaite et al., "In Search of Robust Measures of Generalization", NeurIPS 2020, arXiv
2010.11924; Gastpar, Nachum, Shafer and Weinberger, "Fantastic Generalization Measures are Nowhere to be Found",
ICLR 2024, arXiv 2309.13658.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .noise_tolerance import noise_tolerance
from .sharpness import sharpness
from .weight_matrices import FoldedNetwork, fold, squared_spectral_norms, steps, trace

_MAGNITUDE_EPSILON = 1e-3
# SAM's usual radius.
_SHARPNESS_RADIUS = 0.05


def generalization_measures(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    target: Int[Tensor, " examples"],
    *,
    initial_state: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
    quantile: float = 0.1,
    scaled: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Compute generalization measures of a trained classifier.

    All but the PAC-Bayes ones, ``inverse_noise``, ``inverse_magnitude_noise`` and ``sharpness`` are differentiable in
    the model's parameters, and may be added to a training loss.

    Args:
        model: Of linear and convolutional layers, in evaluation mode, with scores ``(examples, classes)``. Batch norm
            directly behind a layer is folded into it.
        inputs: The training inputs ``(examples, ...)``.
        target: The training labels ``(examples,)``, class indices.
        initial_state: The ``state_dict`` that training started from; needed by measures of distance.
        names: Which measures, see above; None for all, without those of distance if there is no ``initial_state``.
        quantile: Of the margins, the measures' gamma.
        scaled: Whether to return what the literature ranks: half the logarithmic measures less half of log m, and the
            square root of the others over m.
        generator: Source of the noise of the PAC-Bayes measures; None: a fixed seed, so that the measures are functions
            of the model and its training set.

    Returns:
        The measures by name, in the order asked for.

    Raises:
        ValueError: If a name is unknown, the model is in training mode or cannot be read, the margin is not positive
            where a measure divides by it, or a measure is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).eval()
        >>> model[0].weight.data, model[2].weight.data = torch.eye(3)[:, :2] * 3, torch.eye(3)[:2] * 2
        >>> inputs, target = torch.eye(2), torch.tensor([0, 1])
        >>> found = generalization_measures(model, inputs, target, names=["path_norm", "inverse_margin"])
        >>> {name: round(value.item(), 4) for name, value in found.items()}  # 2 * 2**2 * 3**2 and 1 / 6**2
        {'path_norm': 72.0, 'inverse_margin': 0.0278}

    Source:
        Jiang et al. 2020, arXiv 1912.02178; Dziugaite et al. 2020, arXiv 2010.11924, whose scaling and 10th percentile
        these are.
    """
    chosen = _chosen(names, initial_state is not None)
    network = fold(model)
    start = None if initial_state is None else fold(model, initial_state)
    facts = _Facts(network, start, inputs, target, quantile, generator)
    found = {}
    for name in chosen:
        value = MEASURES[name](facts)
        if scaled:
            logged = name.startswith("log_")
            value = 0.5 * (value - math.log(facts.examples)) if logged else (value / facts.examples).sqrt()
        if not torch.isfinite(value):
            raise ValueError(f"measure {name!r} is {value.item()}")
        found[name] = value
    return found


def margin_quantile(
    scores: Float[Tensor, "examples classes"], target: Int[Tensor, " examples"], *, quantile: float = 0.1
) -> Float[Tensor, ""]:
    r"""Compute a low quantile of the margins: the correct class's score less the best other one.

    The :math:`\lfloor q m \rfloor`-th smallest of :math:`s_{i y_i} - \max_{k \ne y_i} s_{ik}`, the smallest if that
    is none.

    Args:
        scores: ``(examples, classes)``.
        target: ``(examples,)`` class indices.
        quantile: In [0, 1]; 0 is the smallest margin.

    Returns:
        The margin, negative where more than that share of the examples is wrong; differentiable.

    Raises:
        ValueError: If the scores are not finite, the labels are no classes, or the quantile is out of range.

    Example:
        >>> margin_quantile(torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]), quantile=0.0)
        tensor(1.)

    Source:
        Jiang et al. 2020, arXiv 1912.02178, whose margin is the 10th percentile.
    """
    checks.class_scores(scores, target)
    checks.finite(scores, "scores")
    checks.between(quantile, "quantile", 0, 1)
    true = scores.gather(1, target[:, None])[:, 0]
    others = scores.scatter(1, target[:, None], -math.inf).amax(1)
    rank = max(math.floor(quantile * len(scores) + 1e-9), 1)  # 0.29 * 100 is a hair below 29
    return (true - others).kthvalue(rank).values


def path_norm(model: nn.Module, inputs: Float[Tensor, "examples ..."]) -> Float[Tensor, ""]:
    r"""Compute the squared path norm: over all paths from inputs to outputs, the product of squared weights, summed.

    It is what the network with all its parameters squared returns on an input of ones,
    :math:`\mathbf 1^\top (W_D \circ W_D) \cdots (W_1 \circ W_1) \mathbf 1` without biases. Pools act on the squares as
    they act on activations.

    Args:
        model: Of linear and convolutional layers, ReLU, pools, sums and reshaping, in evaluation mode. Batch norm is
            folded first.
        inputs: Any inputs; only their shape, dtype and device matter.

    Returns:
        The squared path norm; differentiable in the parameters.

    Raises:
        ValueError: If the model holds anything that has no paths, such as a sigmoid, or is in training mode.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)).eval()
        >>> model[0].weight.data, model[2].weight.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
        >>> path_norm(model, torch.zeros(1, 2)).item()  # 9 * (1 + 4)
        45.0

    Source:
        Neyshabur, Tomioka and Srebro, "Norm-Based Capacity Control in Neural Networks", COLT 2015, arXiv 1503.00036.
    """
    return _path_norm(fold(model), inputs)


def _path_norm(network: FoldedNetwork, inputs: Tensor) -> Tensor:
    checks.not_empty(inputs, "inputs")
    checks.floating(inputs, "inputs")
    _require_paths(network.network)
    return network(
        torch.ones_like(inputs[:1]), {name: value.square() for name, value in network.parameters.items()}
    ).sum()


class _Facts:
    """What several measures share, each computed once and only if a measure asks."""

    def __init__(
        self,
        network: FoldedNetwork,
        start: FoldedNetwork | None,
        inputs: Tensor,
        target: Tensor,
        quantile: float,
        generator: torch.Generator | None,
    ) -> None:
        checks.not_empty(inputs, "inputs")
        checks.finite(inputs, "inputs")
        self.network, self.inputs, self.target, self.quantile = network, inputs, target, quantile
        self.start = start
        self.examples, self.depth = len(inputs), len(network.layers)
        self.generator = generator

    @functools.cached_property
    def matrices(self) -> list[Tensor]:
        return self.network.matrices

    @functools.cached_property
    def moved(self) -> list[Tensor]:
        assert self.start is not None
        return [now - before for now, before in zip(self.matrices, self.start.matrices, strict=True)]

    @functools.cached_property
    def count(self) -> int:
        return sum(matrix.numel() for matrix in self.matrices)

    @functools.cached_property
    def frobenius(self) -> Tensor:
        return self._positive(_frobenius(self.matrices))

    @functools.cached_property
    def spectral(self) -> Tensor:
        return self._positive(squared_spectral_norms(self.matrices))

    @functools.cached_property
    def moved_frobenius(self) -> Tensor:
        return _frobenius(self.moved)

    @functools.cached_property
    def margin(self) -> Tensor:
        margin = margin_quantile(self.network.scores(self.inputs), self.target, quantile=self.quantile)
        checks.require(
            margin > 0,
            lambda: (
                f"the margin at quantile {self.quantile} is {margin.item():.4g}: with that many examples wrong or on "
                f"the boundary, measures that divide by it do not exist"
            ),
        )
        return margin

    @functools.cached_property
    def path(self) -> Tensor:
        return _path_norm(self.network, self.inputs)

    @functools.cached_property
    def noise(self) -> float:
        return self._noise(None)

    @functools.cached_property
    def magnitude_noise(self) -> float:
        return self._noise(_MAGNITUDE_EPSILON)

    def pac_bayes(self, squares: Tensor) -> Tensor:
        return squares.detach() / (4 * self.noise**2) + math.log(self.examples / self.noise) + 10

    def pac_bayes_magnitude(self, squares: Tensor) -> Tensor:
        noise, epsilon = self.magnitude_noise**2, _MAGNITUDE_EPSILON**2
        above = epsilon + (noise + 1) * squares.detach() / self.count
        moved = torch.cat([matrix.detach().flatten() for matrix in self.moved])
        logs = (above / (epsilon + noise * moved.square())).log().sum()
        return 0.25 * logs + math.log(self.examples / self.magnitude_noise) + 10

    def scalar(self, value: int | float) -> Tensor:
        return self.matrices[0].new_tensor(value)

    def _noise(self, magnitude_epsilon: float | None) -> float:
        # The same noise for every call with the same seed: a measure is a function of the model and the training set.
        generator = self.generator if self.generator is not None else torch.Generator().manual_seed(0)
        found = noise_tolerance(
            self.network.network_with_parameters(),
            self.inputs,
            self.target,
            magnitude_epsilon=magnitude_epsilon,
            generator=generator,
        )
        if found.sigma == 0:
            raise ValueError("no noise on the weights is borne: the PAC-Bayes measures do not exist")
        return found.sigma

    def _positive(self, squares: Tensor) -> Tensor:
        checks.require(squares > 0, lambda: "a layer's weights are all zero: measures of its norm do not exist")
        return squares


def _frobenius(matrices: list[Tensor]) -> Tensor:
    return torch.stack([matrix.square().sum() for matrix in matrices])


def _log_product(squares: Tensor) -> Tensor:
    return squares.log().sum()


def _over_margin(value: Callable[[_Facts], Tensor]) -> Callable[[_Facts], Tensor]:
    return lambda facts: value(facts) - 2 * facts.margin.log()


def _sum(product: Callable[[_Facts], Tensor]) -> Callable[[_Facts], Tensor]:
    return lambda facts: math.log(facts.depth) + product(facts) / facts.depth


def _spectral_product(facts: _Facts) -> Tensor:
    return _log_product(facts.spectral)


def _frobenius_product(facts: _Facts) -> Tensor:
    return _log_product(facts.frobenius)


def _sharpness(facts: _Facts) -> Tensor:
    model = facts.network.network_with_parameters()
    return facts.scalar(sharpness(model, F.cross_entropy, (facts.inputs, facts.target), radius=_SHARPNESS_RADIUS))


MEASURES: dict[str, Callable[[_Facts], Tensor]] = {
    "parameter_count": lambda facts: facts.scalar(facts.count),
    "l2_norm": lambda facts: facts.frobenius.sum().sqrt(),
    "l2_distance": lambda facts: facts.moved_frobenius.sum().sqrt(),
    "parameter_norm": lambda facts: facts.frobenius.sum(),
    "frobenius_distance": lambda facts: facts.moved_frobenius.sum(),
    "spectral_distance": lambda facts: squared_spectral_norms(facts.moved).sum(),
    "inverse_margin": lambda facts: 1 / facts.margin.square(),
    "log_spectral_product": _spectral_product,
    "log_spectral_product_over_margin": _over_margin(_spectral_product),
    "log_spectral_sum": _sum(_spectral_product),
    "log_spectral_sum_over_margin": _sum(_over_margin(_spectral_product)),
    "frobenius_over_spectral": lambda facts: (facts.frobenius / facts.spectral).sum(),
    "log_spectral_main": lambda facts: (
        _over_margin(_spectral_product)(facts) + (facts.frobenius / facts.spectral).sum().log()
    ),
    "log_spectral_main_distance": lambda facts: (
        _over_margin(_spectral_product)(facts) + (facts.moved_frobenius / facts.spectral).sum().log()
    ),
    "log_frobenius_product": _frobenius_product,
    "log_frobenius_product_over_margin": _over_margin(_frobenius_product),
    "log_frobenius_sum": _sum(_frobenius_product),
    "log_frobenius_sum_over_margin": _sum(_over_margin(_frobenius_product)),
    "path_norm": lambda facts: facts.path,
    "path_norm_over_margin": lambda facts: facts.path / facts.margin.square(),
    "sharpness": _sharpness,
    "inverse_noise": lambda facts: facts.scalar(facts.noise**-2),
    "pac_bayes_norm": lambda facts: facts.pac_bayes(facts.frobenius.sum()),
    "pac_bayes_distance": lambda facts: facts.pac_bayes(facts.moved_frobenius.sum()),
    "inverse_magnitude_noise": lambda facts: facts.scalar(facts.magnitude_noise**-2),
    "pac_bayes_magnitude_norm": lambda facts: facts.pac_bayes_magnitude(facts.frobenius.sum()),
    "pac_bayes_magnitude_distance": lambda facts: facts.pac_bayes_magnitude(facts.moved_frobenius.sum()),
}

_OF_DISTANCE = frozenset(
    {
        *("l2_distance", "frobenius_distance", "spectral_distance", "log_spectral_main_distance"),
        *("pac_bayes_distance", "pac_bayes_magnitude_norm", "pac_bayes_magnitude_distance"),
    }
)


def _chosen(names: Iterable[str] | None, has_start: bool) -> list[str]:
    if names is None:
        return [name for name in MEASURES if has_start or name not in _OF_DISTANCE]
    if isinstance(names, str):
        raise TypeError(f"names must be several names, such as [{names!r}], got the string {names!r}")
    chosen = list(names)
    for name in chosen:
        checks.one_of(name, "names", tuple(MEASURES))
        if name in _OF_DISTANCE and not has_start:
            raise ValueError(f"measure {name!r} needs initial_state, the state_dict that training started from")
    return chosen


# What maps non-negative activations to non-negative ones without mixing in anything but weights.
_PATH_MODULES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_PATH_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(F.relu, F.leaky_relu, torch.relu, torch.flatten, torch.reshape, torch.cat, torch.squeeze, torch.unsqueeze),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.dropout, torch.mean),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
        *(operator.getitem, getattr),
    }
)
_PATH_SUMS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add})
_PATH_METHODS = frozenset(
    {
        *("relu", "flatten", "view", "reshape", "mean", "size", "contiguous", "squeeze", "unsqueeze"),
        *("permute", "transpose"),
    }
)


def _require_paths(network: nn.Module) -> None:
    """Raise unless every step of the network passes paths on."""
    chain = steps(network)
    if chain is not None and all(type(module) in _PATH_MODULES for module in chain):
        return  # tracing takes longer than the path norm itself
    traced = trace(network)
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "call_module":
            known = type(modules[str(node.target)]) in _PATH_MODULES
            what = f"{node.target}, a {type(modules[str(node.target)]).__name__}"
        elif node.op == "call_function":
            sums_paths = node.target in _PATH_SUMS and all(isinstance(arg, torch.fx.Node) for arg in node.args)
            known = sums_paths or node.target in _PATH_FUNCTIONS
            what = getattr(node.target, "__name__", str(node.target))
        else:
            known = node.op in ("placeholder", "output") or (node.op == "call_method" and node.target in _PATH_METHODS)
            what = str(node.target)
        if not known:
            raise ValueError(f"the path norm is defined for ReLU networks, and {what} is no part of one")
