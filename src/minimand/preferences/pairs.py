r"""Pairs of answers: from a file to tokens, to batches, to log-probabilities under any causal language model.

Rows are in the preference format of TRL: ``prompt``, ``chosen``, ``rejected``, each text or a list of messages
``{"role": ..., "content": ...}``; a row without a prompt has one implied, what its two answers begin with.

A batch has one of two layouts. *Padded*: two rows a pair, prompts padded on the left and answers on the right, so
that answers begin in one column and scores are asked for from there on. *Shared*: one row a pair, the prompt once,
then both answers, which see the prompt and themselves but not each other, at the positions they would have alone.

Source: the preference format of TRL; the shared layout is an attention mask, so its log-probabilities are those of
the padded one.
"""

from __future__ import annotations

import collections
import inspect
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import checks
from .log_probabilities import token_log_probabilities
from .pair_loss import PairTokens

# A row that cannot be used is counted under one of these.
EMPTY = "an empty answer"
SAME = "identical answers"
NO_PROMPT = "an empty prompt"
NO_ROOM = "no room for an answer within max_length"


class TokenPair(NamedTuple):
    """Token indices of one pair; both answers follow the same prompt."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class TokenizedPairs(NamedTuple):
    """Pairs as tokens, and what became of the rows that are not among them or not whole.

    Args:
        pairs: One for each row that could be used, in order.
        rows: Which row each pair came from.
        skipped: How many rows could not be used, by reason.
        truncated: How many pairs lost tokens to ``max_length``.
    """

    pairs: list[TokenPair]
    rows: list[int]
    skipped: dict[str, int]
    truncated: int


class PairBatch(NamedTuple):
    """Tokens of a batch of pairs, laid out for one forward pass.

    Args:
        input_ids: ``(rows, columns)``.
        attention_mask: ``(rows, columns)`` of 1 and 0, or ``(rows, 1, columns, columns)`` for the shared layout: 0
            where a position may be seen, the lowest number of float32 where not.
        position_ids: ``(rows, columns)``.
        chosen: Targets, tokens of the chosen answers ``(pairs, tokens)``.
        rejected: The same for the rejected answers.
        chosen_mask: True where ``chosen`` holds a token.
        rejected_mask: The same for ``rejected``.
        shared: Whether the two answers of a pair share a row.
    """

    input_ids: Int[Tensor, "rows columns"]
    attention_mask: Tensor
    position_ids: Int[Tensor, "rows columns"]
    chosen: Int[Tensor, "pairs tokens"]
    rejected: Int[Tensor, "pairs tokens"]
    chosen_mask: Bool[Tensor, "pairs tokens"]
    rejected_mask: Bool[Tensor, "pairs tokens"]
    shared: bool

    def to(self, device: torch.device | str) -> PairBatch:
        """Copy the batch to a device."""
        moved: dict[str, Any] = {name: one.to(device) for name, one in self._asdict().items() if torch.is_tensor(one)}
        return self._replace(**moved)

    @property
    def keep(self) -> int:
        """How many of the last columns hold scores of answers."""
        widths = self.chosen.shape[1], self.rejected.shape[1]
        return 1 + (sum(widths) if self.shared else max(widths))

    def split(self, columns: Float[Tensor, "rows keep *extra"]) -> tuple[Tensor, Tensor]:
        """Pick from the last columns, ``keep`` of them, those that predict the chosen and the rejected answers."""
        first, second = self.chosen.shape[1], self.rejected.shape[1]
        if self.shared:
            # The last token of the prompt predicts the first token of either answer.
            return columns[:, :first], torch.cat([columns[:, :1], columns[:, first + 1 : first + second]], 1)
        chosen, rejected = columns.chunk(2)
        return chosen[:, :first], rejected[:, :second]


def read_pairs(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read rows in TRL's preference format and check that each has what it needs.

    Args:
        source: A file of JSON lines; a folder written by ``datasets``; the name of a data set on the hub (its
            ``train`` split); or rows.

    Returns:
        Rows with ``chosen`` and ``rejected``, and ``prompt`` where it is given; other columns are kept.

    Raises:
        ImportError: If a data set is asked for and ``datasets`` is not installed.
        ValueError: If there is no row, a row is no JSON, or a row lacks an answer or has one of another kind; with
            the row's number.

    Example:
        >>> read_pairs([{"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}])
        [{'prompt': '1 + 1 = ', 'chosen': '2', 'rejected': '3'}]

    Source:
        The preference format of TRL.
    """
    if isinstance(source, (str, os.PathLike)):
        path = pathlib.Path(source)
        rows: Iterable[Any] = _json_lines(path) if path.is_file() else _data_set(path)
    else:
        rows = source
    checked = [_checked(row, number) for number, row in enumerate(rows, start=1)]
    if not checked:
        raise ValueError(f"{source if isinstance(source, (str, os.PathLike)) else 'source'} holds no pairs")
    return checked


def _json_lines(path: pathlib.Path) -> Iterable[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None


def _data_set(path: pathlib.Path) -> Iterable[Any]:
    name = str(path)
    if not path.is_dir() and (path.suffix or path.is_absolute() or not 1 <= len(path.parts) <= 2):
        raise ValueError(f"{name} does not exist: give a file of JSON lines, a folder of datasets or a name on the hub")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"to read {name} install minimand[preferences], which brings datasets") from None
    try:
        found = datasets.load_from_disk(name) if path.is_dir() else datasets.load_dataset(name)
    except Exception as error:
        raise ValueError(f"{name} is no file, and datasets cannot load it: {error}") from None
    return found["train"] if isinstance(found, dict) else found


def _checked(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} must be an object with 'prompt', 'chosen' and 'rejected', got {row!r:.80}")
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise ValueError(f"row {number} has no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    kinds = {key: _kind(row[key]) for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    for key, kind in kinds.items():
        if kind is None:
            raise ValueError(f"row {number}: {key!r} must be text or a list of messages with 'role' and 'content'")
    for key, kind in kinds.items():
        if kind != kinds["chosen"]:
            raise ValueError(f"row {number}: {key!r} is {kind} but 'chosen' is {kinds['chosen']}; they must agree")
    return dict(row)


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    messages = isinstance(value, Sequence) and all(
        isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value
    )
    return "messages" if messages else None


def tokenize_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, max_length: int = 1024) -> TokenizedPairs:
    """Turn rows into tokens; what cannot be used is counted, never silently dropped.

    Text gets the end-of-sequence token; messages go through the tokenizer's chat template. A prompt that does not
    fit loses its beginning, an answer that still does not fit its end.

    Args:
        rows: From :func:`read_pairs`.
        tokenizer: Of transformers. A padding token is not needed.
        max_length: Most tokens in a prompt and one answer; leave no more than the model's context.

    Returns:
        The pairs, the rows they came from, and counts of rows skipped and pairs truncated.

    Raises:
        ValueError: If ``max_length`` is below 2, messages come without a chat template, or no row can be used.

    Example:
        >>> class Letters:
        ...     eos_token, bos_token_id, chat_template = ".", None, None
        ...     def __call__(self, text):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "", "rejected": "c"}]
        >>> found = tokenize_pairs(rows, Letters())
        >>> found.pairs, found.skipped
        ([TokenPair(prompt=(97,), chosen=(98, 46), rejected=(99, 46))], {'an empty answer': 1})

    Source:
        The preference format of TRL, whose tokens these are.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, one token for the prompt and one to answer, got {max_length}")
    pairs: list[TokenPair] = []
    kept: list[int] = []
    skipped: collections.Counter[str] = collections.Counter()
    truncated = 0
    for place, row in enumerate(rows):
        prompt, chosen, rejected = _parts(row)
        reason = EMPTY if not _said(chosen) or not _said(rejected) else SAME if chosen == rejected else None
        if reason is None:
            whole = _tokens(prompt, chosen, rejected, tokenizer)
            cut = _fitted(whole, max_length)
            reason = NO_PROMPT if not whole.prompt else NO_ROOM if not cut.chosen or not cut.rejected else None
            if reason is None and cut.chosen == cut.rejected:
                reason = SAME
        if reason is not None:
            skipped[reason] += 1
            continue
        truncated += cut != whole
        pairs.append(cut)
        kept.append(place)
    if not pairs:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
        raise ValueError(f"none of {len(rows)} pairs can be used: {reasons or 'there is none'}")
    return TokenizedPairs(pairs, kept, dict(skipped), truncated)


def _parts(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row["prompt"], chosen, rejected
    same = 0
    for mine, other in zip(chosen, rejected, strict=False):
        if mine != other:
            break
        same += 1
    if isinstance(chosen, str) and same and chosen[same - 1 : same] == " ":
        same -= 1  # a word's space belongs to the word, as tokenizers have it
    return chosen[:same], chosen[same:], rejected[same:]


def _said(answer: Any) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(str(message["content"] or "").strip() for message in answer)


def _tokens(prompt: Any, chosen: Any, rejected: Any, tokenizer: Any) -> TokenPair:
    if isinstance(chosen, str):
        end = tokenizer.eos_token or ""
        texts = [
            prompt,
            *(prompt + answer.removesuffix(end) + end for answer in (chosen, rejected)),
        ]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        if not prompt and tokenizer.bos_token_id is not None and (not ids[1] or ids[1][0] != tokenizer.bos_token_id):
            ids = [[tokenizer.bos_token_id, *one] for one in ids]
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the pairs are messages, but the tokenizer has no chat template: set its chat_template")
        texts = [
            tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True) if prompt else "",
            *(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False) for answer in (chosen, rejected)),
        ]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # The answers begin where the tokens part from the prompt's, which may be before its end: letters merge across it.
    length = min(_common(ids[0], ids[1]), _common(ids[0], ids[2]))
    return TokenPair(tuple(ids[1][:length]), tuple(ids[1][length:]), tuple(ids[2][length:]))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for mine, its in zip(one, other, strict=False):
        if mine != its:
            break
        length += 1
    return length


def _fitted(pair: TokenPair, max_length: int) -> TokenPair:
    longest = max(len(pair.chosen), len(pair.rejected))
    # At least one token of the prompt stays, or nothing predicts the answers' first.
    prompt = pair.prompt[-max(1, max_length - longest) :]
    room = max_length - len(prompt)
    return TokenPair(prompt, pair.chosen[:room], pair.rejected[:room])


def collate_pairs(pairs: Sequence[TokenPair], *, pad_id: int = 0, share_prompt: bool = True) -> PairBatch:
    """Lay out pairs for one forward pass.

    Args:
        pairs: At least one.
        pad_id: Any index of the vocabulary; what it is changes nothing, for padding is masked.
        share_prompt: One row a pair with the prompt once, or two rows a pair.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there is no pair, or a pair has an empty prompt or answer.

    Example:
        >>> batch = collate_pairs([TokenPair((5, 6), (7,), (8, 9))])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]])

    Source:
        The definition of causal attention: an answer sees its prompt and what it has said.
    """
    if not pairs:
        raise ValueError("pairs is empty: a batch needs at least one")
    for pair in pairs:
        if not all(pair):
            raise ValueError(f"a pair needs a prompt and two answers of at least one token each, got {pair}")
    chosen, chosen_mask = _padded([pair.chosen for pair in pairs], pad_id)
    rejected, rejected_mask = _padded([pair.rejected for pair in pairs], pad_id)
    prompt, prompt_mask = _padded([pair.prompt for pair in pairs], pad_id, left=True)
    if share_prompt:
        input_ids = torch.cat([prompt, chosen, rejected], 1)
        mask = torch.cat([prompt_mask, chosen_mask, rejected_mask], 1)
        spoken = prompt_mask.sum(1, keepdim=True)
        positions = torch.cat(
            [prompt_mask.cumsum(1) - 1, *(spoken + torch.arange(m.shape[1]) for m in (chosen_mask, rejected_mask))], 1
        ).clamp_min(0)
        part = torch.cat([torch.full((len(m),), k) for k, m in enumerate((prompt[0], chosen[0], rejected[0]))])
        sees = torch.ones(len(part), len(part), dtype=torch.bool).tril() & ((part[:, None] == part) | (part == 0))
        # Padding sees itself alone: a row of a softmax needs something to weigh.
        allowed = (sees & mask[:, None, :]) | torch.eye(len(part), dtype=torch.bool)
        blocked = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return PairBatch(input_ids, blocked[:, None], positions, chosen, rejected, chosen_mask, rejected_mask, True)
    width = max(chosen.shape[1], rejected.shape[1])
    mask = torch.cat([torch.cat([prompt_mask, _widened(m, width)], 1) for m in (chosen_mask, rejected_mask)])
    input_ids = torch.cat([torch.cat([prompt, _widened(answer, width, pad_id)], 1) for answer in (chosen, rejected)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return PairBatch(input_ids, mask.long(), positions, chosen, rejected, chosen_mask, rejected_mask, False)


def _widened(rows: Tensor, width: int, value: int = 0) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)


def _padded(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = True
    return ids, mask


def pair_log_probabilities(
    model: nn.Module, batch: PairBatch, *, inputs_embeds: Tensor | None = None, hidden: bool = False
) -> PairTokens:
    """Compute the log-probability of every token of every answer in one forward pass.

    Scores are computed for answers only, where the model can be asked to (``logits_to_keep`` of transformers).

    Args:
        model: A causal language model of transformers, or one wrapped by peft.
        batch: From :func:`collate_pairs`; moved to the device of the model's parameters.
        inputs_embeds: What the model reads in place of ``batch.input_ids``, ``(rows, columns, width)``, or None.
        hidden: Whether to return the last hidden states that tokens were predicted from as well.

    Returns:
        Log-probabilities ``(pairs, tokens)`` and masks; the reference is left out, see
        :class:`minimand.preferences.ReferenceCache`.

    Raises:
        ValueError: If a token lies outside the model's vocabulary, or a log-probability is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> tokens = pair_log_probabilities(model, collate_pairs([TokenPair((1, 2), (3,), (4, 5))]))
        >>> tokens.chosen.shape, tokens.rejected.shape
        (torch.Size([1, 1]), torch.Size([1, 2]))

    Source:
        The chain rule of probability.
    """
    logits, states = _answers(model, batch, inputs_embeds, hidden)
    place = logits[0].device
    return PairTokens(
        token_log_probabilities(logits[0], batch.chosen.to(place)),
        token_log_probabilities(logits[1], batch.rejected.to(place)),
        batch.chosen_mask.to(place),
        batch.rejected_mask.to(place),
        chosen_hidden=states[0],
        rejected_hidden=states[1],
    )


def answer_logits(
    model: nn.Module, batch: PairBatch, *, inputs_embeds: Tensor | None = None
) -> tuple[Float[Tensor, "pairs chosen_tokens vocabulary"], Float[Tensor, "pairs rejected_tokens vocabulary"]]:
    """Compute the scores that predict every token of every answer, chosen and rejected.

    Args:
        model: A causal language model of transformers, or one wrapped by peft.
        batch: From :func:`collate_pairs`; moved to the device of the model's parameters.
        inputs_embeds: What the model reads in place of ``batch.input_ids``, ``(rows, columns, width)``, or None.

    Returns:
        Scores of the chosen and of the rejected answers; at padding they mean nothing.

    Raises:
        ValueError: If a score is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> [scores.shape for scores in answer_logits(model, collate_pairs([TokenPair((1, 2), (3,), (4, 5))]))]
        [torch.Size([1, 1, 16]), torch.Size([1, 2, 16])]

    Source:
        The definition of a causal language model.
    """
    logits = _answers(model, batch, inputs_embeds, False)[0]
    for scores in logits:
        checks.finite(scores.detach(), "logits")
    return logits


def _answers(
    model: nn.Module, batch: PairBatch, inputs_embeds: Tensor | None, hidden: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Run the model once; return scores and, if asked for, hidden states that predict the answers' tokens."""
    parameter = next(model.parameters())
    batch = batch.to(parameter.device)
    mask = batch.attention_mask
    if mask.is_floating_point() and parameter.dtype != mask.dtype:
        mask = torch.where(mask < 0, torch.finfo(parameter.dtype).min, 0.0).to(parameter.dtype)
    read: dict[str, Any] = {"inputs_embeds": inputs_embeds}
    if inputs_embeds is None:
        _check_vocabulary(model, batch.input_ids)
        read = {"input_ids": batch.input_ids}
    if hidden:
        read["output_hidden_states"] = True
    if _keeps(model):
        read["logits_to_keep"] = batch.keep
    output = model(attention_mask=mask, position_ids=batch.position_ids, use_cache=False, **read)
    states = batch.split(output.hidden_states[-1][:, -batch.keep :]) if hidden else (None, None)
    return batch.split(output.logits[:, -batch.keep :]), states


def _check_vocabulary(model: Any, input_ids: Tensor) -> None:
    if hasattr(model, "get_input_embeddings"):
        rows = model.get_input_embeddings().weight.shape[0]
        checks.require(
            input_ids < rows,
            lambda: f"tokens up to {int(input_ids.max())} came to a model that reads {rows}: they do not match",
        )


def _keeps(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


@torch.no_grad()
def shares_prompt(model: nn.Module, pair: TokenPair, *, tolerance: float = 1e-3) -> bool:
    """Tell whether a model gives the shared layout the log-probabilities of the padded one.

    Attention kernels that know no mask of their own, and models whose attention is not by mask alone, do not.

    Args:
        model: A causal language model of transformers.
        pair: Any pair.
        tolerance: Largest difference of one token's log-probability, in nats.

    Returns:
        Whether ``share_prompt=True`` may be used.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> shares_prompt(model, TokenPair((1, 2), (3,), (4, 5)))
        True

    Source:
        The definition of causal attention.
    """
    padded = pair_log_probabilities(model, collate_pairs([pair], share_prompt=False))
    try:
        shared = pair_log_probabilities(model, collate_pairs([pair], share_prompt=True))
    # Attention that knows no mask of this shape fails in ways of its own; what else is wrong, the padded pass said.
    except (ValueError, RuntimeError, TypeError, NotImplementedError):
        return False
    apart = max(
        float((one - other).abs().max())
        for one, other in ((padded.chosen, shared.chosen), (padded.rejected, shared.rejected))
    )
    return apart <= tolerance
