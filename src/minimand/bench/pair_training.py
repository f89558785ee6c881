"""Training a language model on pairs of answers, whatever the objective, and measuring what that did to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..caching import arriving, user_cache
from ..preferences import (
    FrozenTrunk,
    LayerGradients,
    PairLoss,
    PairTokens,
    ReferenceCache,
    Regime,
    TokenizedPairs,
    answer_logits,
    collate_pairs,
    last_linear_layers,
    load_language_model,
    margin_coefficients,
    pair_log_probabilities,
    read_pairs,
    shares_prompt,
    states_as_inputs,
    token_log_probabilities,
    tokenize_pairs,
    train_only,
    with_reference,
)
from ..preferences.language_models import blocks, context_length
from .facts import fact_pairs
from .memory import forget_peak, peak_megabytes
from .readers import DataError

# Hidden states of a trunk beyond this are not worth their disk and memory; then all blocks run at every step.
_MOST_STATES = 2_000_000_000
# Scores of a whole vocabulary are dear; so many pairs tell a mean.
_DIVERGENCE_PAIRS = 32


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Which pairs, which language model, and what of it trains.

    Args:
        path: Of the pairs, or None for questions of fact.
        model: For :func:`minimand.preferences.load_language_model`.
        part: For :func:`minimand.preferences.train_only`.
        max_length: Most tokens in a prompt and one answer; None for the model's context, at most 1,024.
        most: How many pairs are drawn, by ``seed``, from a larger file.
        seed: See ``most``.
        content: Hash of the file when the comparison began.
    """

    path: str | None
    model: str
    part: str
    max_length: int | None = None
    most: int = 400
    seed: int = 0
    content: str = ""

    def rows(self) -> tuple[list[dict[str, Any]], int]:
        """Read the pairs; return those drawn and how many there are in all."""
        rows = fact_pairs() if self.path is None else read_pairs(self.path)
        if len(rows) <= self.most:
            return rows, len(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[: self.most]
        return [rows[place] for place in sorted(order.tolist())], len(rows)


class PreparedPairs:
    """Pairs as tokens, the reference's log-probabilities of them, and the model that learns from them.

    What is dear, the reference and the frozen blocks' states, is kept on disk; see :class:`ReferenceCache`.

    Args:
        source: What to prepare.
        progress: Told what is under way.
    """

    def __init__(self, source: PairSource, progress: Callable[[str], None] = lambda _: None) -> None:
        self.source = source
        progress(f"loading {source.model}")
        self.model, self.tokenizer = load_language_model(source.model)
        context = context_length(self.model) or 1024
        length = min(context, 1024) if source.max_length is None else source.max_length
        if length > context:
            raise DataError(f"--max-length is {length}, but {source.model} reads at most {context} tokens")
        self.rows, self.available = source.rows()
        self.tokenized: TokenizedPairs = tokenize_pairs(self.rows, self.tokenizer, max_length=length)
        self.pairs = self.tokenized.pairs
        self.clean = torch.tensor([self.rows[row].get("clean") is not False for row in self.tokenized.rows])
        cache = ReferenceCache(self.model)
        self.trunk = self._trunk()
        self.states: list[Tensor] | None = None
        if self.trunk is None:
            told = _told(progress, f"{source.model} reads the pairs")
            self.reference = cache(self.pairs, progress=told)
            self.shared = shares_prompt(self.model, self.pairs[0])
            self.frozen = self.model.requires_grad_(False)
        else:
            path = user_cache() / "states" / f"{cache.key(self.pairs)}-{self.trunk.last}.safetensors"
            self.states = self._states(path, _told(progress, f"the frozen blocks of {source.model} read the pairs"))
            self.frozen = self.trunk.top().eval().requires_grad_(False)
            told = _told(progress, f"{source.model} reads the pairs")
            self.reference = cache(self.pairs, compute=self._by_top, progress=told)
            del self.trunk, self.model  # the top is all that is needed from here on

    def policy(self) -> Any:
        """Return a model that is the reference still, with what trains set to train."""
        policy = copy.deepcopy(self.frozen)
        if self.states is None:
            return train_only(policy, self.source.part)
        return train_only(policy, f"last:{self.source.part.partition(':')[2]}")

    def tokens(self, policy: nn.Module, places: Sequence[int], *, hidden: bool = False) -> PairTokens:
        """Run a policy on some pairs; the reference's log-probabilities come with the policy's."""
        inputs, batch = self._inputs(policy, places)
        found = pair_log_probabilities(policy, batch, inputs_embeds=inputs, hidden=hidden)
        return with_reference(found, [self.reference[place] for place in places])

    def logits(self, policy: nn.Module, places: Sequence[int]) -> tuple[Tensor, Tensor, Any]:
        """Run a policy on some pairs; return its scores at every token of both answers, and the batch."""
        inputs, batch = self._inputs(policy, places)
        chosen, rejected = answer_logits(policy, batch, inputs_embeds=inputs)
        return chosen, rejected, batch

    def features(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the reference's last hidden state at the last token of each chosen and rejected answer."""
        chosen: list[Tensor] = []
        rejected: list[Tensor] = []
        for start in range(0, len(places), 8):
            part = places[start : start + 8]
            with torch.no_grad():
                tokens = self.tokens(self.frozen, part, hidden=True)
            for found, states, mask in (
                (chosen, tokens.chosen_hidden, tokens.chosen_mask),
                (rejected, tokens.rejected_hidden, tokens.rejected_mask),
            ):
                assert states is not None
                found.append(states[torch.arange(len(part)), mask.sum(1) - 1])
        return torch.cat(chosen).float(), torch.cat(rejected).float()

    def _inputs(self, policy: nn.Module, places: Sequence[int]) -> tuple[Tensor | None, Any]:
        pairs = [self.pairs[place] for place in places]
        if self.states is None:
            return None, collate_pairs(pairs, share_prompt=self.shared)
        batch = collate_pairs(pairs)
        return states_as_inputs(policy, batch, [self.states[place] for place in places]), batch

    def _by_top(self, places: Sequence[int]) -> PairTokens:
        inputs, batch = self._inputs(self.frozen, places)
        return pair_log_probabilities(self.frozen, batch, inputs_embeds=inputs)

    def _trunk(self) -> FrozenTrunk | None:
        kind, _, last = self.source.part.partition(":")
        if kind != "last":
            return None
        train_only(self.model, self.source.part)  # says what is wrong with the part before anything dear is done
        tokens = sum(sum(map(len, pair)) for pair in self.pairs)
        if 4 * tokens * self.model.get_input_embeddings().weight.shape[1] > _MOST_STATES:
            return None
        try:
            trunk = FrozenTrunk(self.model, last=int(last))
        except ValueError:  # all blocks train
            return None
        return trunk if trunk.exact(self.pairs[0]) else None

    def _states(self, path: pathlib.Path, progress: Callable[[int, int], None]) -> list[Tensor]:
        assert self.trunk is not None
        sizes = [sum(map(len, pair)) for pair in self.pairs]
        if path.is_file():
            try:
                flat = load_file(path)["states"]
            except (SafetensorError, KeyError):  # cut short by somebody: computed anew
                flat = torch.empty(0)
            if len(flat) == sum(sizes):
                return list(flat.split(sizes))
        states = self.trunk.states(self.pairs, progress=progress)
        with arriving(path) as draft:
            save_file({"states": torch.cat(states).contiguous()}, draft)
        return states


@functools.lru_cache(maxsize=1)
def prepared(source: PairSource) -> PreparedPairs:
    """Prepare pairs, once a process."""
    return PreparedPairs(source)


def _told(progress: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"{what}: {done} of {total}")


@dataclasses.dataclass(frozen=True)
class PairRecipe:
    """How a policy is trained, whatever the objective.

    Args:
        steps: Of AdamW; the learning rate warms up over a tenth of them and falls to zero as a cosine.
        batch_size: Pairs a step.
        rates: Learning rates to choose from on validation pairs.
        max_grad_norm: Longer gradients are cut to this.
    """

    steps: int = 15
    batch_size: int = 4
    rates: tuple[float, ...] = (1e-4, 3e-4)
    max_grad_norm: float = 1.0

    def schedule(self, step: int) -> float:
        """Return the factor of the learning rate at a step."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A policy after training, and what was seen on the way, step by step."""

    policy: Any
    curves: dict[str, list[float]]
    megabytes: float


def train(
    data: PreparedPairs, places: Sequence[int], objective: Any, recipe: PairRecipe, *, lr: float, rounds: int, seed: int
) -> Trained:
    """Train a policy on pairs.

    Args:
        data: The pairs.
        places: Which of them are seen.
        objective: Any that has ``from_tokens``; its own parameters are trained too.
        recipe: Steps and their size.
        lr: Learning rate.
        rounds: Into how many rounds the steps are divided; each later one takes the policy it begins with into its
            reference, as the objective's ``mixed_reference`` says.
        seed: Decides the order of the pairs.
    """
    forget_peak()
    generator = torch.Generator().manual_seed(seed)
    policy = data.policy().eval()  # no dropout: the reference has none either
    weights = [weight for weight in [*policy.parameters(), *objective.parameters()] if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    curves: dict[str, list[float]] = {"loss": [], "chosen drift": [], "rejected drift": []}
    queue: list[int] = []
    previous: Any = None  # the policy that the round began with
    hidden = getattr(objective, "needs_hidden", False)
    for step in range(recipe.steps):
        if len(queue) < recipe.batch_size:
            queue += [places[place] for place in torch.randperm(len(places), generator=generator).tolist()]
        batch, queue = queue[: recipe.batch_size], queue[recipe.batch_size :]
        tokens = data.tokens(policy, batch, hidden=hidden)
        sums = tokens.sums()
        if step and rounds > 1 and step % math.ceil(recipe.steps / rounds) == 0:
            previous = copy.deepcopy(policy).requires_grad_(False)
        if previous is not None:
            with torch.no_grad():
                tokens = _mixed(tokens, data.tokens(previous, batch), objective)
        loss = objective.from_tokens(tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        ref_chosen, ref_rejected = sums.references()
        curves["loss"].append(float(loss.detach()))
        curves["chosen drift"].append(float((sums.chosen - ref_chosen).detach().mean()))
        curves["rejected drift"].append(float((sums.rejected - ref_rejected).detach().mean()))
    if not math.isfinite(curves["loss"][-1]):
        raise RuntimeError(f"training diverged at the learning rate {lr:g}")
    return Trained(policy.requires_grad_(False), curves, peak_megabytes())


def _mixed(tokens: PairTokens, previous: PairTokens, objective: Any) -> PairTokens:
    """Take the policy that a round began with into the reference."""
    return tokens._replace(
        ref_chosen=objective.mixed_reference(tokens.ref_chosen, previous.chosen),
        ref_rejected=objective.mixed_reference(tokens.ref_rejected, previous.rejected),
    )


@dataclasses.dataclass(frozen=True)
class Drift:
    """What a policy says of held-out pairs, one number a pair.

    Args:
        chosen: How far the chosen answer's log-probability has moved from the reference's, in nats.
        rejected: The same for the rejected answer.
        likelier: Policy's log-probability of the chosen answer minus the rejected one's, in nats.
        kl: Divergence of the policy from the reference in nats a token, over all tokens of both answers; one number.
    """

    chosen: Tensor
    rejected: Tensor
    likelier: Tensor
    kl: float

    def accuracy(self) -> float:
        """Return the share of pairs whose implicit reward prefers the chosen answer; a tie is half of one."""
        return _share_above(self.chosen - self.rejected)

    def ranking(self) -> float:
        """Return the share of pairs whose chosen answer is the likelier one; a tie is half of one."""
        return _share_above(self.likelier)


def _share_above(margins: Tensor) -> float:
    # What the reference itself says of its own answers differs by rounding alone.
    tied = margins.abs() <= 1e-4
    return float(((margins > 0) & ~tied).double().mean() + 0.5 * tied.double().mean())


@torch.no_grad()
def drift(
    data: PreparedPairs, policy: nn.Module, places: Sequence[int], *, batch_size: int = 8, divergence: bool = True
) -> Drift:
    """Measure a policy on pairs, without training.

    The divergence is exact for each next token, ``sum_v pi(v) (log pi(v) - log pi_ref(v))``, and its mean is taken
    over the tokens of the given answers, not over answers that the policy would draw; of about 32 pairs of all lengths.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    total, count = 0.0, 0
    # Answers of one length together: the scores of padding are as dear as those of tokens.
    order = sorted(range(len(places)), key=lambda rank: sum(map(len, data.pairs[places[rank]])))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    stride = math.ceil(len(batches) * batch_size / _DIVERGENCE_PAIRS)
    for number, ranks in enumerate(batches):
        some = [places[rank] for rank in ranks]
        *scores, batch = data.logits(policy, some)
        device = scores[0].device
        found = PairTokens(
            token_log_probabilities(scores[0], batch.chosen.to(device)),
            token_log_probabilities(scores[1], batch.rejected.to(device)),
            batch.chosen_mask.to(device),
            batch.rejected_mask.to(device),
        )
        sums = with_reference(found, [data.reference[place] for place in some]).sums()
        ref_chosen, ref_rejected = sums.references()
        parts.append((sums.chosen - ref_chosen, sums.rejected - ref_rejected, sums.chosen - sums.rejected))
        if not divergence or number % stride:
            continue
        *others, _ = data.logits(data.frozen, some)
        for mine, theirs, mask in zip(scores, others, (found.chosen_mask, found.rejected_mask), strict=True):
            mine, theirs = (value[mask].float().log_softmax(-1) for value in (mine, theirs))
            total += float((mine.exp() * (mine - theirs)).sum())
            count += len(mine)
    back = torch.tensor(order).argsort()
    chosen, rejected, likelier = (torch.cat(values).cpu()[back] for values in zip(*parts, strict=True))
    return Drift(chosen, rejected, likelier, total / count if divergence else math.nan)


def entangled(data: PreparedPairs, policy: nn.Module, objective: Any, places: Sequence[int]) -> float | None:
    """Return the share of pairs whose chosen answer the next step of gradient descent would make less likely.

    By the gradients of the linear layers in the last block; None for an objective that is no loss on pairs.
    """
    if not isinstance(objective, PairLoss):
        return None
    policy.requires_grad_(False)
    blocks(policy)[-1].requires_grad_(True)  # cheap, and there all policies here can learn
    with LayerGradients(last_linear_layers(policy)) as record:
        sums = data.tokens(policy, places).sums()
    found = record.pair_gradients(sums.chosen, sums.rejected).entanglement(margin_coefficients(objective, sums))
    policy.requires_grad_(False)
    return found.share(Regime.BOTH_DOWN) + found.share(Regime.REVERSED)
