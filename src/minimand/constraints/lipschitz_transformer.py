r"""A transformer whose Lipschitz constant can be bounded, and the bound, layer by layer, as a certificate.

A token :math:`x \in \mathbb R^d` has norm :math:`|x| = \|x\|_2/\sqrt d`, a sequence the largest norm of its tokens
:math:`x_t`, a weight the operator norm of these. The transformer has no normalisation layers. Its residuals are convex,
:math:`x \leftarrow (1-a)\,x + a\,f(x)` with :math:`a = 1/(2\,\text{blocks})`, for :math:`f` in turn

.. math:: \text{attention: } \tfrac13 W_o\,\operatorname{concat}_j
          \Bigl(\sum_u \operatorname{softmax}_u\bigl(\tfrac s{d_h}\langle Q_j x_t, K_j x_u\rangle\bigr) V_j x_u\Bigr),
          \qquad \text{MLP: } W_2\,\operatorname{gelu}(W_1 x)/c,

with rotated queries and keys, and :math:`c` the largest slope of gelu. Let :math:`A` bound the tokens' norms before a
layer, and :math:`q_j, k_j, v_j` be the norms of a head's blocks. Then

.. math:: A_{\text{attention}} = \tfrac13 |W_o| \sqrt{\operatorname{mean}_j v_j^2}\;A, \qquad
          L_{\text{attention}} = \tfrac13 |W_o| \sqrt{\operatorname{mean}_j \bigl[v_j (1 + 2 s A^2 q_j k_j)\bigr]^2},

          A_{\text{MLP}} = |W_2| |W_1| A / c, \qquad L_{\text{MLP}} = |W_2| |W_1|,

and a residual maps :math:`A` to :math:`(1-a)A + a A_f` and :math:`L` to :math:`(1 - a + a L_f) L`.

For attention: softmax rows are convex weights, so a head's output is no longer than its longest value, :math:`v_j A`.
A change :math:`\delta` of the input changes logits by at most :math:`2 s q_j k_j A |\delta|`, rotations keeping
lengths; the weights, in the sum of absolute values, by no more than that, which is softmax's slope from the maximum
norm to the sum norm; and the output by :math:`v_j |\delta|` besides. Heads may attend to different tokens, hence means
over heads of maxima over tokens. The paper's formula has the norms of the whole matrices in place of
:math:`q_j, k_j, v_j`. With more than one head that is no bound, since one head can hold all of a matrix's norm.

Source: Newhouse, Hess, Cesista, Zahorodnii, Bernstein and Isola, "Training Transformers with Enforced Lipschitz
Constants", 2025, arXiv 2507.13338, for the architecture and the recursion; the bound of several heads is derived here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import checks

# Largest slope of x Phi(x), at x = sqrt(2): Phi(sqrt 2) + sqrt 2 phi(sqrt 2).
_GELU_SLOPE = 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi)
_ATTENTION_GAIN = 1 / 3


class LipschitzBlock(nn.Module):
    """Attention and a two-layer perceptron, each mixed convexly with its input, without normalisation or biases.

    With weights of norm 1 or less, inputs of norm 1 stay so. Weights start orthogonal at norm 1 but for the last
    of each branch, which start at zero, so that the block starts as a multiple of the identity.

    Args:
        dim: Features of a token.
        num_heads: Heads; ``dim`` must be an even multiple of it.
        num_blocks: Of the whole network, which the residuals' share ``1 / (2 num_blocks)`` depends on.
        hidden: Width of the perceptron; None for four times ``dim``.
        softmax_scale: s, of the logits over ``dim / num_heads``.
        causal: Whether a token attends to itself and earlier ones only.
        rotary_base: Of the rotary position embedding's wavelengths.

    Example:
        >>> block = LipschitzBlock(8, 2, num_blocks=1)
        >>> block(torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Source:
        Newhouse et al. 2025, arXiv 2507.13338; rotary embedding: Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_blocks: int,
        hidden: int | None = None,
        softmax_scale: float = 1.0,
        causal: bool = True,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
            raise ValueError(f"dim must be an even multiple of num_heads, got {dim} and {num_heads}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        checks.positive(softmax_scale, "softmax_scale")
        checks.positive(rotary_base, "rotary_base")
        hidden = 4 * dim if hidden is None else hidden
        self.num_heads = num_heads
        self.share = 1 / (2 * num_blocks)
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.rotary_base = rotary_base
        self.query, self.key, self.value = (_orthogonal(dim, dim) for _ in range(3))
        self.output = _orthogonal(dim, dim)
        self.up = _orthogonal(dim, hidden)
        self.down = _orthogonal(hidden, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, tokens: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Return the tokens after attention and perceptron.

        Raises:
            ValueError: If they are not finite or of another width.
        """
        checks.floating(tokens, "tokens")
        if tokens.dim() < 2 or tokens.shape[-1] != self.query.in_features:
            raise ValueError(f"tokens must have shape (*, tokens, {self.query.in_features}), got {tuple(tokens.shape)}")
        checks.finite(tokens, "tokens")
        x = torch.lerp(tokens, self.attention(tokens), self.share)
        return torch.lerp(x, self.perceptron(x), self.share)

    def attention(self, tokens: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Return the attention branch, without the residual."""
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for layer in (self.query, self.key, self.value)
        )
        turn = _rotation(query.shape[-2], query.shape[-1], self.rotary_base, query)
        mixed = nn.functional.scaled_dot_product_attention(
            _rotate(query, turn),
            _rotate(key, turn),
            value,
            is_causal=self.causal,
            scale=self.softmax_scale / query.shape[-1],
        )
        return _ATTENTION_GAIN * self.output(mixed.transpose(-3, -2).flatten(-2))

    def perceptron(self, tokens: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Return the perceptron's branch, without the residual."""
        return self.down(nn.functional.gelu(self.up(tokens)) / _GELU_SLOPE)


class LipschitzGPT(nn.Module):
    """A causal language model of :class:`LipschitzBlock` between an embedding and a linear head.

    Embeddings start at norm 1; keep them there with
    ``constrain(optimizer, partial(project_ball, radius=dim**0.5, dim=-1), params=[model.embedding.weight])`` and the
    other weights with a spectral projection. Whatever they are, :func:`lipschitz_bound` certifies what they give.

    Args:
        num_tokens: Size of the vocabulary.
        dim: Features of a token.
        num_blocks: Blocks.
        num_heads: Heads of each; ``dim`` must be an even multiple of it.
        hidden: Width of the perceptrons; None for four times ``dim``.
        softmax_scale: Of the attention's logits.
        logit_scale: Factor of the outputs, an inverse temperature. The bound is proportional to it.

    Example:
        >>> model = LipschitzGPT(10, 8, num_blocks=2, num_heads=2)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 10])

    Source:
        Newhouse et al. 2025, arXiv 2507.13338.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        *,
        num_blocks: int,
        num_heads: int,
        hidden: int | None = None,
        softmax_scale: float = 1.0,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        checks.positive(logit_scale, "logit_scale")
        self.logit_scale = logit_scale
        self.embedding = nn.Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList(
            LipschitzBlock(dim, num_heads, num_blocks=num_blocks, hidden=hidden, softmax_scale=softmax_scale)
            for _ in range(num_blocks)
        )
        self.head = _orthogonal(dim, num_tokens)
        with torch.no_grad():
            self.embedding.weight /= self.embedding.weight.square().mean(1, keepdim=True).sqrt()

    def forward(self, tokens: Int[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch tokens vocabulary"]:
        """Return the logits of every next token.

        Raises:
            TypeError: If the tokens are no integers.
            ValueError: If one is not in the vocabulary.
        """
        checks.tensor(tokens, "tokens")
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must have an integer dtype, got {tokens.dtype}")
        checks.require(
            (tokens >= 0) & (tokens < self.embedding.num_embeddings),
            lambda: (
                f"tokens must lie in [0, {self.embedding.num_embeddings - 1}], "
                f"got values from {int(tokens.min())} to {int(tokens.max())}"
            ),
        )
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logit_scale * self.head(x)


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """A certified bound on how much a model's output can change for a change of its input.

    Args:
        value: The bound; infinity where it exceeds the largest double.
        log10: Its decimal logarithm, which does not overflow.
        norm: In which norm of inputs and outputs: ``"rms"`` or ``"l2"``.
        per_layer: By what each layer, residual included, multiplies the bound.
        activation_norms: Bounds on the norms of activations behind each layer, for inputs within ``input_norm``. Empty
            for ``"l2"``.
    """

    value: float
    log10: float
    norm: str
    per_layer: Mapping[str, float]
    activation_norms: Mapping[str, float]


@torch.no_grad()
def lipschitz_bound(model: nn.Module, *, norm: str = "rms", input_norm: float = 1.0) -> LipschitzBound:
    r"""Bound a model's Lipschitz constant, layer by layer: a certificate, by singular value decompositions.

    The product of the layers' own bounds, attention's from the norms of the activations that reach it. Every step
    is an upper bound, rounding of the decompositions included; the rounding errors of the model's own forward
    pass are not.

    Args:
        model: A ``Sequential`` of Linear layers (with biases or without), common activations, Flatten, Identity,
            Dropout in evaluation mode, max and average pooling (``norm="l2"``) and :class:`LipschitzBlock`; or a
            :class:`LipschitzGPT`. Layers may be parametrized, in evaluation mode.
        norm: ``"rms"`` for the root mean square of a token's features, and the largest of the tokens, on both ends;
            ``"l2"`` for the Euclidean norm of a whole example.
        input_norm: Largest norm of an input. The bound of a model with attention holds for such inputs only. A
            :class:`LipschitzGPT` ignores it: its inputs are distributions over tokens, measured by the sum of absolute
            values, which are single tokens in practice.

    Returns:
        A :class:`LipschitzBound`.

    Raises:
        TypeError: If the model has a layer that is not supported.
        ValueError: If dropout is in training mode, a layer has hooks, or a weight is not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
        >>> _ = torch.nn.init.eye_(model[0].weight), torch.nn.init.orthogonal_(model[2].weight, gain=3.0)
        >>> bound = lipschitz_bound(model)
        >>> round(bound.value, 4), {name: round(factor, 4) for name, factor in bound.per_layer.items()}
        (3.0, {'0': 1.0, '1': 1.0, '2': 3.0})

    Source:
        Newhouse et al. 2025, arXiv 2507.13338, with the corrections derived in this module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.one_of(norm, "norm", ("rms", "l2"))
    checks.positive(input_norm, "input_norm")
    log_slope, log_size = 0.0, math.log(input_norm)
    factors, sizes = {}, {}
    for name, layer in _layers(model, ""):
        log_factor, log_size = layer(log_size, norm)
        log_slope += log_factor
        factors[name], sizes[name] = _exp(log_factor), _exp(log_size)
    log_slope += _SLACK
    return LipschitzBound(
        value=_exp(log_slope),
        log10=log_slope / math.log(10),
        norm=norm,
        per_layer=factors,
        activation_norms=sizes if norm == "rms" else {},
    )


def certified_radius(bound: LipschitzBound, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    r"""Compute how far an input may move before the predicted class can change: :math:`m / (\sqrt 2\,L)`.

    :math:`m` is the largest logit less the runner-up. Their difference has :math:`\sqrt 2` times the slope of the
    logits in the Euclidean norm, and the root mean square of C logits is :math:`\sqrt C` times smaller than that norm.

    Args:
        bound: Of the model that gave the logits.
        logits: The model's outputs.

    Returns:
        Radii in the bound's norm of inputs. From ``"rms"`` to Euclidean multiply by the root of an input's size.

    Raises:
        ValueError: If there are fewer than two classes, or a logit is not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> certified_radius(lipschitz_bound(model, norm="l2"), torch.tensor([1.0, 0.0]))  # as far as (0.5, 0.5)
        tensor(0.7071)

    Source:
        Tsuzuku, Sato and Sugiyama, NeurIPS 2018, arXiv 1802.04034.
    """
    checks.floating(logits, "logits")
    if logits.dim() < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits must score at least 2 classes in its last dimension, got {tuple(logits.shape)}")
    checks.finite(logits, "logits")
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    unit = math.sqrt(logits.shape[-1]) if bound.norm == "rms" else 1.0
    return (first - second) * _exp(-math.log(10) * bound.log10 - math.log(math.sqrt(2) * unit))


# A layer's rule: from the logarithm of the activations' norm, and the norm's name, to the logarithm of the layer's
# Lipschitz bound and of the activations' norm behind it.
_Rule = Callable[[float, str], tuple[float, float]]

_SLACK = 1e-12  # rounding of sums of logarithms


def _layers(module: Any, name: str) -> Iterator[tuple[str, _Rule]]:
    """Yield the rules of a module's layers in the order they are applied."""
    kind = _kind(module, name)
    if kind is nn.Sequential:
        for child, layer in module.named_children():
            yield from _layers(layer, f"{name}.{child}" if name else child)
    elif kind is LipschitzGPT:
        yield "embedding", functools.partial(_embedding, module.embedding)
        for number, block in enumerate(module.blocks):
            yield from _layers(block, f"blocks.{number}")
        yield "head", functools.partial(_linear, module.head, "head", gain=module.logit_scale)
    elif kind is LipschitzBlock:
        prefix = f"{name}." if name else ""
        yield f"{prefix}attention", functools.partial(_residual, module.share, _attention(module, prefix))
        yield f"{prefix}perceptron", functools.partial(_residual, module.share, _perceptron(module, prefix))
    elif kind is nn.Linear:
        yield name or "model", functools.partial(_linear, module, name)
    elif kind in _POOLS:
        yield name or "model", functools.partial(_pool, module, name)
    elif kind in _ACTIVATIONS:
        yield name or "model", functools.partial(_elementwise, _ACTIVATIONS[kind](module))
    elif kind in _DROPOUTS:
        if module.training:
            raise ValueError(f"{name or 'model'} is {kind.__name__} in training mode: call model.eval() first")
        yield name or "model", _identity
    elif kind is nn.Flatten and module.start_dim == 0:
        raise TypeError(f"{name or 'model'} flattens the examples of a batch into one: start_dim must be at least 1")
    elif kind in (nn.Identity, nn.Flatten):
        yield name or "model", _identity
    else:
        known = sorted(one.__name__ for one in (nn.Sequential, nn.Linear, nn.Flatten, LipschitzBlock, LipschitzGPT))
        others = sorted(one.__name__ for one in (*_ACTIVATIONS, *_DROPOUTS, *_POOLS))
        raise TypeError(
            f"{name or 'model'} is a {type(module).__name__}, for which no bound is known; supported are "
            f"{', '.join([*known, *others])}"
        )


def _kind(module: nn.Module, name: str) -> type:
    """Return a module's own class: a subclass may compute anything, a parametrized one only has another weight."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"{name or 'model'} has hooks or a forward of its own, which may change what it computes")
    if not parametrize.is_parametrized(module):
        return type(module)
    if module.training:
        raise ValueError(f"{name or 'model'} is parametrized, and in training mode: call model.eval() first")
    return type(module).__mro__[1]


def _identity(log_size: float, norm: str) -> tuple[float, float]:
    return 0.0, log_size


def _embedding(layer: nn.Module, log_size: float, norm: str) -> tuple[float, float]:
    _require_rms("LipschitzGPT", norm)
    weight = _certifiable(_weight(layer, nn.Embedding, "embedding"), "embedding")
    # From the sum norm: a mixture of tokens is no longer than the longest.
    longest = _log(float(weight.square().mean(1).max().sqrt()))
    return longest, longest


def _linear(layer: Any, name: str, log_size: float, norm: str, *, gain: float = 1.0) -> tuple[float, float]:
    weight = _certifiable(_weight(layer, nn.Linear, name), name)
    rows, columns = weight.shape
    unit = math.sqrt(rows / columns) if norm == "rms" else 1.0
    slope = math.log(gain) + _log(float(_spectral_norm(weight)) / unit)
    size = slope + log_size
    if layer.bias is not None:
        bias = _certifiable(layer.bias, name)
        size = _log_sum(size, math.log(gain) + _log(float(bias.square().mean().sqrt())))
    return slope, size


def _residual(share: float, branch: _Rule, log_size: float, norm: str) -> tuple[float, float]:
    slope, size = branch(log_size, norm)
    keep, take = _log(1 - share), math.log(share)
    return _log_sum(keep, take + slope), _log_sum(keep + log_size, take + size)


def _attention(block: Any, name: str) -> _Rule:
    def rule(log_size: float, norm: str) -> tuple[float, float]:
        _require_rms("LipschitzBlock", norm)
        query, key, value = (
            _head_norms(_weight(layer, nn.Linear, f"{name}{part}"), block.num_heads, f"{name}{part}")
            for part, layer in (("query", block.query), ("key", block.key), ("value", block.value))
        )
        outer, _ = _linear(block.output, f"{name}output", 0.0, norm)
        outer += math.log(_ATTENTION_GAIN)
        attend = math.log(2 * block.softmax_scale) + 2 * log_size + query.log() + key.log()
        slopes = value.log() + torch.logaddexp(torch.zeros_like(attend), attend)
        return outer + _log_rms(slopes), outer + _log_rms(value.log()) + log_size

    return rule


def _perceptron(block: Any, name: str) -> _Rule:
    def rule(log_size: float, norm: str) -> tuple[float, float]:
        up, _ = _linear(block.up, f"{name}up", 0.0, norm)
        down, _ = _linear(block.down, f"{name}down", 0.0, norm)
        return up + down, up + down + log_size - math.log(_GELU_SLOPE)

    return rule


class _Activation(NamedTuple):
    """Elementwise f with ``|f(x) - f(y)| <= slope |x - y|`` and ``|f(x)| <= min(at_zero + growth |x|, limit)``."""

    slope: float
    growth: float = 1.0
    at_zero: float = 0.0
    limit: float = math.inf


def _elementwise(activation: _Activation, log_size: float, norm: str) -> tuple[float, float]:
    size = _log_sum(_log(activation.at_zero), _log(activation.growth) + log_size)
    return _log(activation.slope), min(size, math.log(activation.limit))


def _largest_slope_of_negative_part(slope: float) -> _Activation:
    steeper = max(1.0, abs(slope))
    return _Activation(steeper, steeper)


def _hardtanh(layer: Any) -> _Activation:
    low, high = layer.min_val, layer.max_val
    return _Activation(1.0, 1.0, at_zero=abs(min(max(0.0, low), high)), limit=max(abs(low), abs(high)))


# Slopes of GELU's tanh form, SiLU and Mish: maxima found numerically, rounded up.
_ACTIVATIONS: dict[type, Callable[[Any], _Activation]] = {
    nn.ReLU: lambda layer: _Activation(1.0),
    nn.ReLU6: lambda layer: _Activation(1.0, limit=6.0),
    nn.LeakyReLU: lambda layer: _largest_slope_of_negative_part(layer.negative_slope),
    nn.PReLU: lambda layer: _largest_slope_of_negative_part(float(layer.weight.abs().max())),
    nn.ELU: lambda layer: _largest_slope_of_negative_part(layer.alpha),
    nn.CELU: lambda layer: _Activation(1.0),
    nn.SELU: lambda layer: _Activation(1.7580994, 1.7580994),
    nn.GELU: lambda layer: _Activation(_GELU_SLOPE if layer.approximate == "none" else 1.129),
    nn.SiLU: lambda layer: _Activation(1.09984),
    nn.Mish: lambda layer: _Activation(1.08851),
    nn.Tanh: lambda layer: _Activation(1.0, limit=1.0),
    nn.Sigmoid: lambda layer: _Activation(0.25, 0.25, at_zero=0.5, limit=1.0),
    nn.LogSigmoid: lambda layer: _Activation(1.0, at_zero=math.log(2)),
    nn.Softsign: lambda layer: _Activation(1.0, limit=1.0),
    nn.Hardtanh: _hardtanh,
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3, nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}


def _pool(layer: Any, name: str, log_size: float, norm: str) -> tuple[float, float]:
    kind = _kind(layer, name)
    if norm != "l2":
        raise TypeError(f"{name or 'model'} is a {kind.__name__}, which is bounded for norm='l2' only")
    kernel, stride, padding = (
        _repeated(value, _POOLS[kind]) for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    # Each entry lies in this many windows at most.
    windows = math.prod(math.ceil(size / step) for size, step in zip(kernel, stride, strict=True))
    if kind.__name__.startswith("Max"):
        if set(_repeated(layer.dilation, _POOLS[kind])) != {1} or layer.return_indices:
            raise TypeError(f"{name or 'model'} is a {kind.__name__} with dilation or indices, which is not supported")
        return 0.5 * math.log(windows), log_size
    uneven = layer.ceil_mode or (any(padding) and not layer.count_include_pad)
    if uneven or getattr(layer, "divisor_override", None) is not None:
        raise TypeError(f"{name or 'model'} is a {kind.__name__} with a divisor of its own, which is not supported")
    return 0.5 * math.log(windows / math.prod(kernel)), log_size


def _repeated(value: Any, times: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * times


def _require_rms(what: str, norm: str) -> None:
    if norm != "rms":
        raise TypeError(f"{what} is bounded for norm='rms' only, got norm={norm!r}")


def _weight(layer: nn.Module, wanted: type, name: str) -> Tensor:
    if _kind(layer, name) is not wanted:
        raise TypeError(f"{name} must be a {wanted.__name__} to be certified, got {type(layer).__name__}")
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _certifiable(weight: Tensor, name: str) -> Tensor:
    checks.finite(weight, f"a parameter of {name or 'model'}")
    return weight.double()


def _head_norms(weight: Tensor, num_heads: int, name: str) -> Tensor:
    """Return the norms from RMS to RMS of the blocks of rows that belong to each head."""
    blocks = _certifiable(weight, name).unflatten(0, (num_heads, -1))
    return _spectral_norm(blocks) * math.sqrt(blocks.shape[2] / blocks.shape[1])


def _spectral_norm(matrix: Tensor) -> Tensor:
    # LAPACK's error is a modest multiple of the size, in units of rounding.
    slack = 1 + 8 * sum(matrix.shape) * torch.finfo(torch.float64).eps
    return torch.linalg.matrix_norm(matrix, ord=2) * slack


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _log_sum(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high


def _log_rms(values: Tensor) -> float:
    return 0.5 * (float(torch.logsumexp(2 * values, 0)) - math.log(len(values)))


def _orthogonal(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.orthogonal_(layer.weight, gain=math.sqrt(outputs / inputs))
    return layer


def _rotation(tokens: int, size: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(tokens, size / 2)`` of the angles by which pairs of features turn."""
    frequency = base ** (-torch.arange(0, size, 2, device=like.device) / size)
    # In float32 at least: late positions are large numbers of turns.
    angle = torch.arange(tokens, device=like.device)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    (cos, sin), (first, second) = turn, x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
