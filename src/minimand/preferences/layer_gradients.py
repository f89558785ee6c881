r"""Per-pair gradients of a few linear layers, exactly and for all pairs at once, from one partial backward pass.

A linear layer that sees inputs :math:`a_t` and whose outputs get gradients :math:`\delta_t` at the tokens t of one
answer has the weight gradient :math:`\sum_t \delta_t a_t^\top`. So two answers' inner product is

.. math:: \langle G, G' \rangle = \sum_{t, s} (a_t^\top a'_s)\,(\delta_t^\top \delta'_s),

with one more for a bias, and no gradient is ever formed. Answers of a batch do not see each other, so the outputs'
gradients of all of them come from one backward pass of the sum of their log-probabilities. It stops at the deepest
of the layers and computes no parameter's gradient: for the last block of a network it costs a small part of a step.

Source: the identity is Goodfellow's, "Efficient per-example gradient computations", 2015, arXiv 1510.01799, with
tokens; used here for Yuan et al., ICLR 2025, arXiv 2410.13828.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .. import checks
from .gradient_entanglement import Entanglement, MarginCoefficients, of_products
from .language_models import blocks


class _Factors(NamedTuple):
    """One layer's inputs and its outputs' gradients, ``(rows, tokens, width)``: chosen answers first."""

    inputs: Tensor
    gradients: Tensor


@dataclasses.dataclass(frozen=True)
class PairGradients:
    """Gradients of the answers' log-probabilities by the layers' weights, one pair a row, kept as factors.

    Args:
        layers: The layers.
        factors: Of each layer.
    """

    layers: tuple[nn.Module, ...]
    factors: tuple[_Factors, ...]

    def entanglement(self, coefficients: MarginCoefficients | None = None) -> Entanglement:
        """Compute each pair's products; see :func:`minimand.preferences.entanglement`."""
        sums = []
        for layer, (inputs, gradients) in zip(self.layers, self.factors, strict=True):
            bias = 0.0 if _bias(layer) is None else 1.0
            (a_w, a_l), (d_w, d_l) = inputs.chunk(2), gradients.chunk(2)
            sums.append(
                torch.stack(
                    [
                        ((a @ b.mT + bias) * (d @ e.mT)).sum((-2, -1))
                        for a, b, d, e in ((a_w, a_l, d_w, d_l), (a_w, a_w, d_w, d_w), (a_l, a_l, d_l, d_l))
                    ]
                )
            )
        inner, chosen_square, rejected_square = torch.stack(sums).sum(0)
        return of_products(inner, chosen_square, rejected_square, coefficients)

    def change(self, updates: Sequence[Tensor]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Compute what an update does to each log-probability, chosen and rejected, to first order.

        Args:
            updates: New minus old value of the layers' parameters, in the order of :meth:`LayerGradients.parameters`.

        Raises:
            ValueError: If the updates do not match the parameters.
        """
        moves = list(updates)
        wanted = list(_parameters(self.layers))
        if [tuple(move.shape) for move in moves] != [tuple(value.shape) for value in wanted]:
            raise ValueError(
                f"updates must have the shapes of the layers' parameters, {[tuple(value.shape) for value in wanted]}, "
                f"got {[tuple(move.shape) for move in moves]}"
            )
        total: Tensor | float = 0.0
        for layer, (inputs, gradients) in zip(self.layers, self.factors, strict=True):
            weight = moves.pop(0).to(inputs)
            moved = inputs @ (weight.mT if isinstance(layer, nn.Linear) else weight)
            if _bias(layer) is not None:
                moved = moved + moves.pop(0).to(inputs)
            total = total + (moved * gradients).sum((-2, -1))
        assert isinstance(total, Tensor)
        chosen, rejected = total.chunk(2)
        return chosen, rejected


class LayerGradients:
    """Record what linear layers see in a forward pass, and turn it into gradients of each pair.

    Use it as a context around the forward pass of the policy, then ask :meth:`pair_gradients`. The answers may come
    in one batch, chosen ones first, in two calls, chosen ones first, or two in a row that they share. A layer whose
    weight has other uses, such as an output layer tied to the embedding, counts with this use only.

    Args:
        layers: The layers: ``nn.Linear``, or the ``Conv1D`` of transformers; :func:`last_linear_layers` picks some.

    Example:
        >>> torch.manual_seed(0)
        <torch...
        >>> head, hidden = torch.nn.Linear(3, 4), torch.randn(2, 5, 3)
        >>> with LayerGradients([head]) as record:
        ...     logp = head(hidden).log_softmax(-1)[..., 0].sum(-1)
        >>> record.pair_gradients(logp[:1], logp[1:]).entanglement().cosine
        tensor([0.5002])

    Source:
        Goodfellow 2015, arXiv 1510.01799; Yuan et al. 2025, arXiv 2410.13828.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("layers is empty: there is nothing to record")
        for number, layer in enumerate(self.layers):
            if not _is_linear(layer):
                raise TypeError(f"layers[{number}] must be an nn.Linear or a Conv1D, got {type(layer).__name__}")
            if not layer.weight.requires_grad:
                raise ValueError(f"layers[{number}] has a frozen weight: leave it out")
        self._calls: list[list[tuple[Tensor, Tensor, int, int]]] = [[] for _ in self.layers]
        self._handles: list[Any] = []

    def __enter__(self) -> LayerGradients:
        """Forget earlier records and start a new one."""
        self._calls = [[] for _ in self.layers]
        for layer, calls in zip(self.layers, self._calls, strict=True):

            def keep(_: nn.Module, args: tuple[Any, ...], output: Tensor, calls: list[Any] = calls) -> None:
                calls.append((args[0], output, args[0]._version, output._version))

            self._handles.append(layer.register_forward_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def parameters(self) -> list[Tensor]:
        """Return the layers' parameters: each weight, and after it the bias that is trained."""
        return list(_parameters(self.layers))

    def pair_gradients(
        self, logp_chosen: Float[Tensor, " batch"], logp_rejected: Float[Tensor, " batch"]
    ) -> PairGradients:
        """Compute the gradients of each pair by one partial backward pass; the graph is kept.

        Args:
            logp_chosen: Policy's log-probability of each chosen answer, from the recorded forward pass; dropout must
                be off for the numbers to mean anything.
            logp_rejected: The same for each rejected answer.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: If shapes differ, a number is not finite, nothing was recorded, a layer has no part in the
                log-probabilities, or it saw another number of answers.
        """
        for value, name in ((logp_chosen, "logp_chosen"), (logp_rejected, "logp_rejected")):
            checks.floating(value, name)
            if value.dim() != 1 or value.shape != logp_chosen.shape:
                raise ValueError(f"{name} must hold one log-probability a pair, got shape {tuple(value.shape)}")
            checks.not_empty(value, name)
            checks.finite(value.detach(), name)
        calls = [call for of_layer in self._calls for call in of_layer]
        for number, of_layer in enumerate(self._calls):
            if not of_layer:
                raise ValueError(f"layers[{number}] recorded nothing: run the forward pass inside the `with` block")
        for inputs, output, input_version, output_version in calls:
            if not output.requires_grad:
                raise ValueError("a layer ran without a graph: enable gradients, and switch gradient checkpointing off")
            if (inputs._version, output._version) != (input_version, output_version):
                raise ValueError("a layer's input or output was changed in place after the layer had run")
        outputs = [call[1] for call in calls]
        pairs = len(logp_chosen)
        rows = sum(len(call[1]) for call in self._calls[0])
        if rows not in (pairs, 2 * pairs):
            raise ValueError(f"a layer saw {rows} rows: {pairs} pairs come in {2 * pairs}, or in {pairs} they share")
        # Rows of their own do not see each other, so one pass serves both answers; a shared row needs one for each.
        sums = (
            [logp_chosen.sum() + logp_rejected.sum()] if rows == 2 * pairs else [logp_chosen.sum(), logp_rejected.sum()]
        )
        passes = [torch.autograd.grad(one, outputs, retain_graph=True, allow_unused=True) for one in sums]
        factors, start = [], 0
        for of_layer in self._calls:
            span = slice(start, start + len(of_layer))
            start = span.stop
            factors.append(_factors(of_layer, [one[span] for one in passes], rows))
        return PairGradients(self.layers, tuple(factors))


def last_linear_layers(model: nn.Module, *, num_blocks: int = 1) -> list[nn.Module]:
    """Find the trained linear layers in the last blocks of a model.

    The blocks are the members of its longest ``nn.ModuleList``, which holds the layers of a transformer in every
    common implementation. Adapters in them (LoRA) are linear layers too, and the frozen weights below are left out.

    Args:
        model: The policy.
        num_blocks: How many blocks, from the last one.

    Returns:
        The layers, in the order in which the model lists them.

    Raises:
        ValueError: If there is no list of blocks, or no trained linear layer in the last ones.

    Example:
        >>> layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
        >>> last_linear_layers(torch.nn.ModuleDict({"blocks": layers}), num_blocks=2) == list(layers[1:])
        True

    Source:
        Layer subsampling: minimand's own, to keep the diagnosis of Yuan et al. 2025, arXiv 2410.13828, cheap.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    found = [
        layer
        for block in list(blocks(model))[-num_blocks:]
        for layer in block.modules()
        # The last layer of nn.MultiheadAttention is never called: its weight is read.
        if _is_linear(layer)
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and layer.weight.requires_grad
    ]
    if not found:
        raise ValueError("the last blocks of the model have no trained linear layer: name the layers yourself")
    return found


def _is_linear(layer: nn.Module) -> bool:
    # Conv1D, GPT-2's linear layer, stores its weight transposed; naming its class spares importing transformers.
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _parameters(layers: Iterable[nn.Module]) -> Iterator[Tensor]:
    for layer in layers:
        yield layer.weight  # type: ignore[misc]
        bias = _bias(layer)
        if bias is not None:
            yield bias


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias if bias is not None and bias.requires_grad else None


def _factors(
    calls: Sequence[tuple[Tensor, Tensor, int, int]], passes: Sequence[Sequence[Tensor | None]], rows: int
) -> _Factors:
    """Lay out a layer's calls as answers in rows; those of two calls are padded to one length by zeros."""
    if all(gradient is None for one in passes for gradient in one):
        raise ValueError("a layer has no part in the log-probabilities: leave it out")
    inputs = _rows([call[0].detach() for call in calls], rows)
    gradients = [
        _rows([torch.zeros_like(call[1]) if one is None else one for call, one in zip(calls, found, strict=True)], rows)
        for found in passes
    ]
    return _Factors(torch.cat([inputs] * len(passes)), torch.cat(gradients))


def _rows(parts: Sequence[Tensor], rows: int) -> Tensor:
    found = [_answers(part) for part in parts]
    if sum(map(len, found)) != rows:
        raise ValueError(f"a layer saw {sum(map(len, found))} rows, but the first one {rows}")
    longest = max(part.shape[1] for part in found)
    return torch.cat([functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in found])


def _answers(values: Tensor) -> Tensor:
    if values.dim() not in (2, 3):
        raise ValueError(f"a layer must see (rows, tokens, width) or (rows, width), got {tuple(values.shape)}")
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.unsqueeze(1) if wide.dim() == 2 else wide
