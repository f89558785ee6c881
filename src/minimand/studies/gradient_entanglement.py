"""Do chosen and rejected answers move together when they end alike, and do normalised gradients part them?

A small transformer learns to answer a prompt by one token of sentiment and an ending that follows from the prompt, the
same for both answers. It is right about the sentiment in 70 of 100 cases when training on pairs begins. Then every
contender takes steps of one length along its own direction, so that only the direction differs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..bench import Claim, Metric, Outcome, Run, Study
from ..preferences import (
    CPOLoss,
    DPOLoss,
    DPOPLoss,
    IPOLoss,
    LayerGradients,
    PairLoss,
    PairTokens,
    RPOLoss,
    SimPOLoss,
    SparseTokenMask,
    entanglement,
    first_order_change,
    margin_coefficients,
    normalized_pair_gradient,
    token_log_probabilities,
)
from ..training import seeded

NONE, SHORT, LONG = "no shared ending", "2 shared tokens", "20 shared tokens"
ENDINGS = {NONE: 0, SHORT: 2, LONG: 20}

VOCABULARY, WIDTH, PROMPT, RIGHT = 64, 64, 6, 0.7
SFT_STEPS, SFT_BATCH = 150, 64
STEPS, BATCH, LENGTH, CHECKS = 60, 16, 0.02, 6
HELD_OUT, TINY = 64, 1e-4
SIGNS, ERROR, COSINE = "signs foretold", "error of the first order", "rise of the cosine"


class Block(nn.Module):
    """One block of a transformer."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(rows, tokens, width)`` to the same shape."""
        heads = self.project(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Policy(nn.Module):
    """A causal transformer of two blocks with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(0.05 * torch.randn(PROMPT + 1 + max(ENDINGS.values()), WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embed.weight, std=0.05)

    def hidden(self, text: Tensor) -> Tensor:
        """Return the states that the tokens of the answers are predicted from."""
        hidden = self.embed(text[:, :-1]) + self.place[: text.shape[1] - 1]
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)[:, PROMPT - 1 :]

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of every token of the answers, and the states they come from."""
        hidden = self.hidden(text)
        return token_log_probabilities(hidden @ self.embed.weight.T, text[:, PROMPT:]), hidden


def draw(pairs: int, ending: int, generator: torch.Generator) -> Tensor:
    """Draw texts, ``(2 * pairs, tokens)``: prompts with the right answers, then with the wrong ones."""
    prompt = torch.randint(8, VOCABULARY, (pairs, PROMPT), generator=generator)
    asked = torch.randint(2, (pairs,), generator=generator)
    prompt[:, -1] = 5 + asked
    place = torch.arange(ending)
    shared = 8 + (prompt[:, place % (PROMPT - 1)] + 7 * place) % (VOCABULARY - 8)
    answers = [torch.cat([prompt, (2 + token)[:, None], shared], 1) for token in (asked, 1 - asked)]
    return torch.cat(answers)


@dataclasses.dataclass(frozen=True)
class Condition:
    """A policy after fine-tuning, and the pairs it goes on with.

    Args:
        policy: The policy at the start, which is the reference.
        batches: ``(steps, 2 * batch, tokens)``.
        held_out: ``(2 * held-out, tokens)``.
    """

    policy: Policy
    batches: Tensor
    held_out: Tensor


@functools.lru_cache(maxsize=16)
def condition(ending: int, seed: int) -> Condition:
    """Fine-tune a policy on answers of which 70 % are right."""
    generator = torch.Generator().manual_seed(100 * seed + ending)
    policy = seeded(Policy, seed)
    assert isinstance(policy, Policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    for _ in range(SFT_STEPS):
        right, wrong = draw(SFT_BATCH, ending, generator).chunk(2)
        kept = torch.rand(SFT_BATCH, 1, generator=generator) < RIGHT
        optimizer.zero_grad()
        (-policy(torch.where(kept, right, wrong))[0].mean()).backward()
        optimizer.step()
    policy.zero_grad(set_to_none=True)
    batches = torch.stack([draw(BATCH, ending, generator) for _ in range(STEPS)])
    return Condition(policy, batches, draw(HELD_OUT, ending, generator))


def problem(source: Any, seed: int) -> dict[str, Condition]:
    """Make the policy and the pairs of each condition."""
    return {name: condition(ending, seed) for name, ending in ENDINGS.items()}


# What a contender descends: from the policy and a batch with the reference's log-probabilities to a gradient for
# each parameter of the policy.
Rule = Callable[[Policy, Tensor, Tensor], Sequence[Tensor]]


def tokens_of(policy: Policy, text: Tensor, reference: Tensor) -> PairTokens:
    """Put a batch through the policy."""
    logp, hidden = policy(text)
    mask = torch.ones_like(logp, dtype=torch.bool)
    return PairTokens(*logp.chunk(2), *mask.chunk(2), *reference.chunk(2), *hidden.chunk(2))


class Objective:
    """The gradient of an objective on pairs, which may learn parameters of its own.

    Args:
        make: Makes the objective.
        rate: Adam's learning rate for the parameters of the objective.
    """

    def __init__(self, make: Callable[[], Any], rate: float = 0.05) -> None:
        self.objective = make()
        own = list(self.objective.parameters())
        self.optimizer = torch.optim.Adam(own, lr=rate) if own else None

    def __call__(self, policy: Policy, text: Tensor, reference: Tensor) -> Sequence[Tensor]:
        """Compute the gradient by the policy; take a step of the objective's own parameters."""
        loss = self.objective.from_tokens(tokens_of(policy, text, reference))
        own = [] if self.optimizer is None else list(self.objective.parameters())
        found = torch.autograd.grad(loss, [*policy.parameters(), *own])
        if self.optimizer is not None:
            for parameter, gradient in zip(own, found[len(found) - len(own) :], strict=True):
                parameter.grad = gradient.to(parameter)
            self.optimizer.step()
        return found[: len(found) - len(own)]


def normalised(policy: Policy, text: Tensor, reference: Tensor) -> Sequence[Tensor]:
    """Scale the two mean gradients of the batch to length one."""
    pairs = tokens_of(policy, text, reference).sums()
    return normalized_pair_gradient(pairs.chosen, pairs.rejected, policy.parameters())


def normalised_by_pair(policy: Policy, text: Tensor, reference: Tensor) -> Sequence[Tensor]:
    """Scale the two gradients of each pair by their lengths over all linear layers."""
    with LayerGradients(layer for layer in policy.modules() if isinstance(layer, nn.Linear)) as record:
        pairs = tokens_of(policy, text, reference).sums()
    found = record.pair_gradients(pairs.chosen, pairs.rejected).entanglement()
    surrogate = pairs.rejected / found.rejected_square.sqrt() - pairs.chosen / found.chosen_square.sqrt()
    return torch.autograd.grad(surrogate.mean(), list(policy.parameters()))


def surgery(policy: Policy, text: Tensor, reference: Tensor) -> Sequence[Tensor]:
    """Gradient surgery (PCGrad) on DPO's two pulls: each loses its part along the other where they conflict."""
    pairs = tokens_of(policy, text, reference).sums()
    weights = margin_coefficients(DPOLoss(), pairs)
    pulls = -(weights.chosen * pairs.chosen).mean(), (weights.rejected * pairs.rejected).mean()
    up, down = (torch.autograd.grad(pull, list(policy.parameters()), retain_graph=True) for pull in pulls)
    conflict, up_square, down_square = (
        sum((one * other).sum() for one, other in zip(*both, strict=True))
        for both in ((up, down), (up, up), (down, down))
    )
    if conflict >= 0:
        return [one + other for one, other in zip(up, down, strict=True)]
    keep_up, keep_down = 1 - conflict / up_square, 1 - conflict / down_square
    return [keep_up * one + keep_down * other for one, other in zip(up, down, strict=True)]


class Descend:
    """Take steps by a rule in every condition, and measure held-out answers.

    Args:
        make_rule: Makes the rule for one run.
        adam: Whether Adam takes the steps; else each has the same length.
        by_gradient: Whether signs are foretold from the gradient even where Adam takes the step.
    """

    def __init__(self, make_rule: Callable[[], Rule], *, adam: bool = False, by_gradient: bool = False) -> None:
        self.make_rule = make_rule
        self.adam = adam
        self.by_gradient = by_gradient

    def __call__(self, data: Mapping[str, Condition], run: Run) -> Outcome:
        """Train and measure one cell under every condition."""
        metrics: dict[str, float] = {}
        curves: dict[str, list[float]] = {}
        hits: list[float] = []
        for name, given in data.items():
            policy, rule = copy.deepcopy(given.policy), self.make_rule()
            before = answers(policy, given.held_out)
            curves[f"chosen, {name}"] = self._train(policy, rule, given, hits)
            after = answers(policy, given.held_out)
            metrics[f"chosen, {name}"], metrics[f"rejected, {name}"] = (after - before).tolist()
        metrics[SIGNS] = sum(hits) / len(hits)
        metrics[ERROR] = error_of_first_order(self.make_rule(), data[LONG])
        metrics[COSINE] = cosine(data[LONG]) - cosine(data[NONE])
        return Outcome(metrics, curves)

    def _train(self, policy: Policy, rule: Rule, given: Condition, hits: list[float]) -> list[float]:
        parameters = list(policy.parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-3) if self.adam else None
        curve = []
        for step, text in enumerate(given.batches):
            with torch.no_grad():
                reference = given.policy(text)[0]
            gradient = rule(policy, text, reference)
            checked = step % CHECKS == 0
            old = [value.detach().clone() for value in parameters]
            if optimizer is None:
                scale = -LENGTH / length_of(gradient)
                moves = [scale * one for one in gradient]
            else:
                for value, one in zip(parameters, gradient, strict=True):
                    value.grad = one
                optimizer.step()
                moves = [value.detach() - was for value, was in zip(parameters, old, strict=True)]
                move(parameters, old)
            if checked:
                logp = policy(text)[0].sum(-1).chunk(2)
                told = [-one for one in gradient] if self.by_gradient else moves
                foretold = [float(first_order_change(one.mean(), parameters, told)) for one in logp]
            move(parameters, [was + one for was, one in zip(old, moves, strict=True)])
            if checked:
                was_here = torch.stack([one.detach().mean() for one in logp])
                changes = (answers(policy, text) - was_here).tolist()
                hits += [float(one * other > 0) for one, other in zip(foretold, changes, strict=True)]
                curve.append(float(answers(policy, given.held_out)[0]))
        return curve


def untouched(data: Mapping[str, Condition], run: Run) -> Outcome:
    """Take no step, foretell signs by a coin, and foretell no change."""
    metrics = {f"{side}, {name}": 0.0 for name in data for side in ("chosen", "rejected")}
    return Outcome({**metrics, SIGNS: 0.5, ERROR: 1.0, COSINE: 0.0})


@torch.no_grad()
def move(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def answers(policy: Policy, text: Tensor) -> Tensor:
    """Return the mean log-probabilities of chosen and rejected answers."""
    return torch.stack([half.mean() for half in policy(text)[0].sum(-1).chunk(2)])


def length_of(gradient: Sequence[Tensor]) -> Tensor:
    """Return the length of a gradient."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in gradient]))


def error_of_first_order(rule: Rule, given: Condition) -> float:
    """Return how far a tiny step's changes are from those foretold, over the changes, in double precision."""
    policy = copy.deepcopy(given.policy).double()
    if isinstance(rule, Objective):
        rule.objective.double()
    parameters, text = list(policy.parameters()), given.batches[1]
    with torch.no_grad():
        reference = policy(text)[0]
    # Away from the reference, where kinks such as DPOP's lie.
    move(parameters, [value + 1e-3 * value.abs() for value in parameters])
    gradient = rule(policy, text, reference)
    scale = -TINY / length_of(gradient)
    moves = [scale * one for one in gradient]
    logp = policy(text)[0].sum(-1).chunk(2)
    foretold = torch.stack([first_order_change(one.mean(), parameters, moves) for one in logp])
    before = answers(policy, text)
    move(parameters, [value + one for value, one in zip(parameters, moves, strict=True)])
    actual = answers(policy, text) - before
    return float((foretold - actual).norm() / actual.norm())


def cosine(given: Condition) -> float:
    """Return the cosine of the mean gradients of held-out chosen and rejected answers at the start."""
    chosen, rejected = given.policy(given.held_out)[0].sum(-1).chunk(2)
    return float(entanglement(chosen.mean(), rejected.mean(), given.policy.parameters()).cosine)


def loss(make: Callable[[], PairLoss | SparseTokenMask], **settings: bool) -> Descend:
    """Descend an objective."""
    return Descend(functools.partial(Objective, make), **settings)


LOSSES: dict[str, Callable[[], PairLoss]] = {
    "dpo": DPOLoss,
    "simpo": SimPOLoss,
    "ipo": IPOLoss,
    "cpo": CPOLoss,
    "dpop": DPOPLoss,
    "rpo": RPOLoss,
}


def _claim(contender: str, beats: str, metric: str, says: str, margin: float = 0.0) -> Claim:
    return Claim(contender, beats=beats, metric=metric, margin=margin, says=says)


def _rises(contender: str, condition: str, says: str) -> Claim:
    return _claim(contender, "untouched", f"chosen, {condition}", says)


study = Study(
    method="gradient-entanglement",
    problem=problem,
    contenders={
        "untouched": untouched,
        **{name: loss(make) for name, make in LOSSES.items()},
        "dpo with gradient surgery": Descend(lambda: surgery),
        "dpo by adam, told by its step": Descend(functools.partial(Objective, DPOLoss), adam=True),
        "dpo by adam, told by the gradient": Descend(
            functools.partial(Objective, DPOLoss), adam=True, by_gradient=True
        ),
        "normalised": Descend(lambda: normalised),
        "normalised, each pair": Descend(lambda: normalised_by_pair),
        "sparse mask": loss(functools.partial(SparseTokenMask, WIDTH)),
    },
    metrics=(
        Metric(f"chosen, {LONG}", "higher is better", "nats"),
        Metric(f"chosen, {SHORT}", "higher is better", "nats"),
        Metric(f"chosen, {NONE}", "higher is better", "nats"),
        Metric(f"rejected, {LONG}", "lower is better", "nats"),
        Metric(f"rejected, {SHORT}", "lower is better", "nats"),
        Metric(f"rejected, {NONE}", "lower is better", "nats"),
        Metric(SIGNS, "higher is better", "%"),
        Metric(ERROR, "lower is better", "%"),
        Metric(COSINE, "higher is better"),
    ),
    claims=(
        _rises("normalised", LONG, "20 shared tokens: normalised gradients raise the chosen answers"),
        _claim("untouched", "dpo", f"chosen, {LONG}", "20 shared tokens: DPO lowers the chosen answers"),
        _rises("dpo", NONE, "no shared ending: DPO raises the chosen answers"),
        _claim("dpo", "untouched", COSINE, "the gradients' cosine rises by over 0.5 with the ending", 0.5),
        _rises("normalised", SHORT, "2 shared tokens: normalised gradients raise the chosen answers"),
        _rises("normalised", NONE, "no shared ending: normalised gradients raise the chosen answers"),
        _rises("normalised, each pair", LONG, "20 shared tokens: normalised by pair raises the chosen"),
        _claim("normalised", "untouched", f"rejected, {LONG}", "20 shared tokens: normalised lowers the rejected"),
        _claim("normalised", "dpo", f"chosen, {LONG}", "20 shared tokens: normalised keeps the chosen above DPO's"),
        _rises("cpo", LONG, "20 shared tokens: CPO, which pulls the chosen harder, raises them"),
        _rises("dpop", LONG, "20 shared tokens: DPOP, which pulls the chosen harder, raises them"),
        _claim("dpo", "untouched", SIGNS, "the signs of DPO's changes are foretold in over 80 % of cases", 0.3),
        _claim(
            "dpo by adam, told by its step",
            "dpo by adam, told by the gradient",
            SIGNS,
            "under Adam, its own step foretells the signs better than the gradient does",
        ),
        *(
            _claim(name, "untouched", ERROR, f"{name}: a tiny step's changes are foretold within 2 %", 0.98)
            for name in (*LOSSES, "normalised", "sparse mask")
        ),
        _claim("sparse mask", "dpo", f"chosen, {LONG}", "20 shared tokens: masks keep the chosen above DPO's"),
        _rises("sparse mask", LONG, "20 shared tokens: masks raise the chosen answers"),
        _claim("normalised", "cpo", f"chosen, {LONG}", "20 shared tokens: normalised raises the chosen more than CPO"),
        _claim(
            "normalised",
            "dpo with gradient surgery",
            f"chosen, {LONG}",
            "20 shared tokens: normalised raises the chosen more than gradient surgery",
        ),
        _claim("normalised", "dpo", f"rejected, {LONG}", "20 shared tokens: it lowers the rejected more than DPO"),
    ),
    seeds=5,
    about="A two-block transformer chooses between two answers that differ in one token and share the rest.",
    notes=(
        "Log-probabilities are of whole held-out answers, as changes since training on pairs began. Every step but "
        "Adam's has length 0.02, whatever the objective: what is compared are directions, not learning rates. No "
        "setting was tuned; losses have their defaults. Signs are those of the changes of the mean log-probabilities "
        "of the batch by the step on it, chosen and rejected, at every sixth step; the untouched policy stands for a "
        "coin, and for foretelling no change. The mask's network and its price are reconstructed, not the paper's."
    ),
)
