"""The reference's log-probabilities, computed once and kept on disk under the hash of what they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import checks
from ..caching import arriving, tensors_hash, user_cache
from .pair_loss import PairTokens
from .pairs import TokenPair, collate_pairs, pair_log_probabilities, shares_prompt


class ReferenceCache:
    """The log-probability of every token of every answer under a frozen model.

    The key is the content: the model's weights and the pairs' tokens. A model trained for one step, another tokenizer
    or another order of the pairs is another key; nothing goes stale.

    Args:
        model: A causal language model of transformers. One wrapped by peft is read with its adapters switched off.
        folder: Where results are kept; None for minimand's folder in the user's cache.
        batch_size: Pairs in a forward pass.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> folder = pathlib.Path(__import__("tempfile").mkdtemp())
        >>> reference = ReferenceCache(model, folder=folder)([TokenPair((1, 2), (3,), (4, 5))])
        >>> [answer.shape for answer in reference[0]]
        [torch.Size([1]), torch.Size([2])]

    Source:
        Precomputed references as in TRL's ``precompute_ref_log_probs``.
    """

    model: Any

    def __init__(self, model: nn.Module, *, folder: pathlib.Path | None = None, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.folder = user_cache() / "references" if folder is None else pathlib.Path(folder)
        self.batch_size = batch_size

    def __call__(
        self,
        pairs: Sequence[TokenPair],
        *,
        compute: Callable[[Sequence[int]], PairTokens] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each pair's log-probabilities, chosen ``(tokens,)`` and rejected ``(tokens,)``, on the CPU.

        Args:
            pairs: At least one.
            compute: What the model says of the pairs at some places, where there is a cheaper way to find out than
                to run all of it; None runs it.
            progress: Called with pairs done and pairs in all.

        Raises:
            ValueError: If there is no pair or a token lies outside the model's vocabulary.
        """
        if not pairs:
            raise ValueError("pairs is empty: there is nothing to compute a reference of")
        path = self.folder / f"{self.key(pairs)}.safetensors"
        sizes = [len(part) for pair in pairs for part in (pair.chosen, pair.rejected)]
        if path.is_file():
            with contextlib.suppress(SafetensorError, KeyError):  # a file that somebody cut short is computed anew
                flat = load_file(path)["log_probabilities"]
                if len(flat) == sum(sizes):
                    return _in_twos(flat, sizes)
        flat = self._compute(pairs, compute, progress)
        with arriving(path) as draft:
            save_file({"log_probabilities": flat}, draft)
        return _in_twos(flat, sizes)

    def key(self, pairs: Sequence[TokenPair]) -> str:
        """Compute the name that results are kept under: the hash of the weights and the tokens."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        weights = ((name, value) for name, value in inner.state_dict().items() if "lora_" not in name)
        digest = hashlib.blake2b(tensors_hash(weights).encode(), digest_size=16)
        digest.update(repr([tuple(map(tuple, pair)) for pair in pairs]).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def _compute(
        self,
        pairs: Sequence[TokenPair],
        compute: Callable[[Sequence[int]], PairTokens] | None,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        training = self.model.training
        self.model.eval()
        plain = self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else contextlib.nullcontext()
        # Pairs of one length together, so that little is padding.
        order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))
        found: list[tuple[int, Tensor]] = []
        try:
            with plain:
                run = self._runner(pairs) if compute is None else compute
                for start in range(0, len(order), self.batch_size):
                    places = order[start : start + self.batch_size]
                    tokens = run(places)
                    for row, place in enumerate(places):
                        chosen = tokens.chosen[row, : len(pairs[place].chosen)]
                        rejected = tokens.rejected[row, : len(pairs[place].rejected)]
                        found.append((place, torch.cat([chosen, rejected]).float().cpu()))
                    if progress is not None:
                        progress(min(start + self.batch_size, len(order)), len(order))
        finally:
            self.model.train(training)
        return torch.cat([part for _, part in sorted(found, key=lambda one: one[0])])

    def _runner(self, pairs: Sequence[TokenPair]) -> Callable[[Sequence[int]], PairTokens]:
        share = shares_prompt(self.model, pairs[0])
        return lambda places: pair_log_probabilities(
            self.model, collate_pairs([pairs[place] for place in places], share_prompt=share)
        )


def with_reference(tokens: PairTokens, reference: Sequence[tuple[Tensor, Tensor]]) -> PairTokens:
    """Put the reference's log-probabilities beside the policy's.

    Args:
        tokens: Of the policy.
        reference: Of the same pairs in the same order, from a :class:`ReferenceCache`.

    Returns:
        The tokens with a reference, on the device and in the dtype of the policy's.

    Raises:
        ValueError: If there are more or fewer pairs, or an answer has more or fewer tokens, than the policy's.

    Example:
        >>> tokens = PairTokens(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), *torch.ones(2, 1, 1, dtype=torch.bool))
        >>> with_reference(tokens, [(torch.tensor([-3.0]), torch.tensor([-4.0]))]).ref_rejected
        tensor([[-4.]])

    Source:
        A change of layout.
    """
    if len(reference) != len(tokens.chosen):
        raise ValueError(f"reference holds {len(reference)} pairs, the policy's log-probabilities {len(tokens.chosen)}")

    def padded(side: int, like: Tensor, mask: Tensor) -> Tensor:
        values = torch.zeros(like.shape, dtype=torch.float32)
        for row, pair in enumerate(reference):
            if len(pair[side]) != int(mask[row].sum()):
                raise ValueError(
                    f"reference pair {row} has an answer of {len(pair[side])} tokens, the policy's has "
                    f"{int(mask[row].sum())}: they come from different tokenizers or another order"
                )
            checks.finite(pair[side], f"reference pair {row}")
            values[row, : len(pair[side])] = pair[side]
        return values.to(like)

    return tokens._replace(
        ref_chosen=padded(0, tokens.chosen, tokens.chosen_mask),
        ref_rejected=padded(1, tokens.rejected, tokens.rejected_mask),
    )


def _in_twos(flat: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    parts = iter(flat.split(list(sizes)))
    return list(zip(parts, parts, strict=True))
