"""Train the last blocks of a language model without running the others again: they never change."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .language_models import blocks
from .pairs import PairBatch, TokenPair, collate_pairs, pair_log_probabilities


class _Enough(Exception):  # noqa: N818
    """Ends a forward pass whose rest nobody wants."""


class FrozenTrunk:
    """A language model cut in two: a trunk that is run once over the pairs, and a top that trains on what it said.

    The top is the same model with its last blocks only, and reads the trunk's hidden states in place of embeddings.
    That is exact where a model does nothing to its embeddings and its positions enter through attention, as in the
    Llama family; for others, such as GPT-2, ``exact`` says so and the whole model must be trained.

    Args:
        model: A causal language model of transformers. It is left as it is.
        last: How many blocks the top has.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> trunk, pairs = FrozenTrunk(model, last=1), [TokenPair((1, 2), (3,), (4, 5))]
        >>> log_probabilities_from_states(trunk.top(), pairs, trunk.states(pairs)).rejected.shape
        torch.Size([1, 2])

    Source:
        The chain rule: no gradient passes a block that does not train.
    """

    def __init__(self, model: nn.Module, *, last: int) -> None:
        layers = blocks(model)
        if not 1 <= last < len(layers):
            raise ValueError(f"last must leave a block to each part of the {len(layers)}, got {last}")
        self.model = model
        self.last = last

    def top(self) -> Any:
        """Copy the top: the last blocks train, the rest of it does not."""
        owner, name, layers = self._layers()
        setattr(owner, name, layers[-self.last :])
        try:
            top = copy.deepcopy(self.model)
        finally:
            setattr(owner, name, layers)
        top.requires_grad_(False)
        blocks(top).requires_grad_(True)
        return top

    @torch.no_grad()
    def states(
        self,
        pairs: Sequence[TokenPair],
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Run the trunk: the hidden states ``(prompt + chosen + rejected, width)`` of each pair, on the CPU.

        Args:
            pairs: At least one.
            batch_size: Pairs in a forward pass.
            progress: Called with pairs done and pairs in all.
        """
        caught: list[Tensor] = []

        def catch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Enough

        handle = blocks(self.model)[-self.last].register_forward_pre_hook(catch, with_kwargs=True)
        found: list[tuple[int, Tensor]] = []
        order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))
        try:
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                batch = collate_pairs([pairs[place] for place in places])
                with contextlib.suppress(_Enough):
                    pair_log_probabilities(self.model, batch)
                hidden = caught.pop()
                found += [(place, hidden[row, _real(batch, row)].cpu()) for row, place in enumerate(places)]
                if progress is not None:
                    progress(min(start + batch_size, len(order)), len(order))
        finally:
            handle.remove()
        return [states for _, states in sorted(found, key=lambda one: one[0])]

    @torch.no_grad()
    def exact(self, pair: TokenPair, *, tolerance: float = 1e-3) -> bool:
        """Tell whether trunk and top together give the model's own log-probabilities of a pair."""
        whole = pair_log_probabilities(self.model, collate_pairs([pair], share_prompt=False))
        try:
            cut = log_probabilities_from_states(self.top(), [pair], self.states([pair]))
        # A model that cannot be cut fails in ways of its own: it takes no embeddings, or its settings count blocks.
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, NotImplementedError):
            return False
        apart = max((whole.chosen - cut.chosen).abs().max(), (whole.rejected - cut.rejected).abs().max())
        return float(apart) <= tolerance

    def _layers(self) -> tuple[nn.Module, str, nn.ModuleList]:
        wanted = blocks(self.model)
        for owner in self.model.modules():
            for name, child in owner.named_children():
                if child is wanted:
                    return owner, name, wanted
        raise AssertionError("a list of blocks belongs to a module")


def log_probabilities_from_states(
    top: nn.Module, pairs: Sequence[TokenPair], states: Sequence[Tensor], *, hidden: bool = False
) -> Any:
    """Compute what :func:`minimand.preferences.pair_log_probabilities` does, from a trunk's hidden states.

    Args:
        top: From :meth:`FrozenTrunk.top`.
        pairs: A batch of pairs.
        states: The trunk's hidden states of the same pairs.
        hidden: Whether to return the last hidden states as well.

    Returns:
        Log-probabilities of every token and masks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> trunk, pairs = FrozenTrunk(model, last=2), [TokenPair((1, 2), (3,), (4, 5))]
        >>> tokens = log_probabilities_from_states(trunk.top(), pairs, trunk.states(pairs))
        >>> torch.allclose(tokens.chosen, pair_log_probabilities(model, collate_pairs(pairs)).chosen, atol=1e-5)
        True

    Source:
        The chain rule of probability.
    """
    batch = collate_pairs(pairs)
    return pair_log_probabilities(top, batch, inputs_embeds=states_as_inputs(top, batch, states), hidden=hidden)


def states_as_inputs(
    top: nn.Module, batch: PairBatch, states: Sequence[Tensor]
) -> Float[Tensor, "pairs columns width"]:
    """Lay out a trunk's hidden states as a batch's inputs, on the device and in the dtype of the top.

    Args:
        top: From :meth:`FrozenTrunk.top`.
        batch: Pairs in the shared layout.
        states: The trunk's hidden states of the same pairs.

    Returns:
        What the top reads in place of embeddings; zeros at padding.

    Raises:
        ValueError: If a number is not finite, or pairs and states do not match.

    Example:
        >>> batch = collate_pairs([TokenPair((1,), (2,), (3,))])
        >>> states_as_inputs(torch.nn.Linear(4, 4), batch, [torch.ones(3, 4)]).shape
        torch.Size([1, 3, 4])

    Source:
        A change of layout.
    """
    if len(states) != len(batch.input_ids):
        raise ValueError(f"states holds {len(states)} pairs, the batch {len(batch.input_ids)}")
    parameter = next(top.parameters())
    inputs = torch.zeros(*batch.input_ids.shape, states[0].shape[-1], dtype=parameter.dtype)
    for row, state in enumerate(states):
        checks.finite(state, f"states[{row}]")
        inputs[row, _real(batch, row)] = state.to(parameter.dtype)
    return inputs.to(parameter.device)


def _real(batch: PairBatch, row: int) -> Tensor:
    """Columns of a row in the shared layout that hold tokens, in order."""
    answers = torch.cat([batch.chosen_mask[row], batch.rejected_mask[row]])
    prompt = batch.input_ids.shape[1] - len(answers)
    # A prompt is padded on the left, and position 0 belongs to its first token and to all padding before it.
    first = prompt - int(batch.position_ids[row, prompt - 1]) - 1
    columns = torch.cat([torch.arange(prompt) >= first, answers])
    return columns.nonzero()[:, 0]
