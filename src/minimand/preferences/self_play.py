r"""Rounds of self-play: a policy draws answers, an oracle compares them, and a loss on the pairs makes the next policy.

Within a round the answers, the oracle's verdicts and the log-probabilities under the reference and under the policy
that drew them are fixed; only the policy in training moves. Any loss on pairs can be minimised, so iterated DPO, IPO
and INPO are the same rounds with other losses.

Two ways to make pairs of a prompt's n answers:

- ``"independent"``: the first with the second, the third with the fourth and so on, each compared once. It is what
  theory asks for: both answers of a pair are drawn independently from the policy.
- ``"extremes"``: the best with the worst, found by a tournament. It is what is done in practice, one clear pair a
  prompt; but pairs are no longer independent draws, and the policy that wins is not the same.

Source: Zhang et al. 2024, arXiv 2407.00617, section 4 (the rounds, the tournament); Pohl, "A sorting problem and its
complexity", CACM 1972: to find the largest and the smallest of n takes 3n/2 - 2 comparisons at the least.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .. import checks

Sample = Callable[[nn.Module, Tensor, int], Tensor]
LogProbability = Callable[[nn.Module, Tensor, Tensor], Tensor]
Compare = Callable[[Tensor, Tensor, Tensor], Tensor]
Pairing = Literal["independent", "extremes"]


@dataclasses.dataclass(frozen=True)
class SelfPlayPairs:
    """The pairs of a round, or some of them; the first dimension of every tensor counts pairs.

    Args:
        prompts: The prompt of each pair.
        chosen: The answer that the oracle prefers.
        rejected: The other one.
        preference: Probability that the chosen answer is better, from 0.5 to 1; 1 where a label was drawn, or where
            the pair are the extremes of a tournament.
        ref_logp_chosen: Log-probability of the chosen answer under the reference, in nats.
        ref_logp_rejected: The same for the rejected answer.
        prev_logp_chosen: Log-probability of the chosen answer under the policy that the round began with.
        prev_logp_rejected: The same for the rejected answer.
    """

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    preference: Tensor
    ref_logp_chosen: Tensor
    ref_logp_rejected: Tensor
    prev_logp_chosen: Tensor
    prev_logp_rejected: Tensor

    def __len__(self) -> int:
        return len(self.preference)

    def select(self, index: Int[Tensor, " chosen"]) -> SelfPlayPairs:
        """Return the pairs at some positions.

        Args:
            index: Positions, from 0.
        """
        return SelfPlayPairs(**{name: value[index] for name, value in vars(self).items()})

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[SelfPlayPairs]:
        """Yield all pairs once, in random order, in batches of a size; the last may be smaller.

        Args:
            size: Pairs a batch, at least 1.
            generator: Draws the order; torch's default if None.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        device = self.preference.device if generator is None else generator.device
        order = torch.randperm(len(self), generator=generator, device=device).to(self.preference.device)
        for index in order.split(size):
            yield self.select(index)

    def fixed(self) -> dict[str, Tensor]:
        """Return what is fixed in the round, by the names under which INPO's loss takes it."""
        names = ("ref_logp_chosen", "ref_logp_rejected", "prev_logp_chosen", "prev_logp_rejected", "preference")
        return {name: getattr(self, name) for name in names}


def tournament(
    prompts: Shaped[Tensor, "prompts *prompt"], answers: Shaped[Tensor, "prompts n *answer"], compare: Compare
) -> tuple[Int[Tensor, " prompts"], Int[Tensor, " prompts"]]:
    """Find the best and the worst of an even number n of answers to each prompt by 3n/2 - 2 comparisons.

    Answers meet in pairs; the winners play on until one has won all its matches, the losers until one has lost all.
    Where preferences run in circles, which these are depends on the order of the answers.

    Args:
        prompts: One a row.
        answers: n answers to each prompt, n even.
        compare: ``(prompts, first, second) -> probabilities that the first is better``, all with one row a match;
            1 and 0 where it draws labels. It is called for all prompts of a stage together.

    Returns:
        Positions of the best and of the worst answer, ``(prompts,)`` each.

    Raises:
        ValueError: If n is odd or 0, shapes do not match, or a comparison is no probability.

    Example:
        >>> by_size = lambda prompts, first, second: (first > second).float()
        >>> tournament(torch.zeros(1), torch.tensor([[3, 1, 4, 1, 5, 9]]), by_size)
        (tensor([5]), tensor([1]))

    Source:
        Pohl 1972; Zhang et al. 2024, arXiv 2407.00617, section 4.
    """
    checks.tensor(prompts, "prompts")
    _check_answers(answers, prompts)
    indices = torch.arange(answers.shape[1], device=answers.device).expand(len(answers), -1)
    winners, losers = _stage(prompts, answers, indices, compare)
    while winners.shape[1] > 1:
        winners = _play_on(prompts, answers, winners, compare, 0)
    while losers.shape[1] > 1:
        losers = _play_on(prompts, answers, losers, compare, 1)
    return winners[:, 0], losers[:, 0]


class SelfPlayRounds:
    r"""Iterate over the rounds of self-play of a policy.

    ::

        for pairs in rounds:
            for batch in pairs.batches(64):
                loss(*rounds.log_probabilities(batch), **batch.fixed()).backward()
                ...

    When a round begins, the policy draws answers, the oracle compares them, and their log-probabilities under policy
    and reference are computed once, without gradient and with dropout off. The policy is used and trained where it is.
    Kept beside it are copies of its weights as they were at the very start, which are the reference, and at the start
    of the round: of its trainable parameters and its buffers only, so for adapters on a frozen model they are small.

    Pairs of identical answers say nothing; they are left out before the oracle is asked.

    Args:
        policy: Any module. Its weights at the time of this call are the reference.
        prompts: One a row, ``(prompts, ...)``, or a callable from the round, counted from 0, to such a tensor. Where
            prompts are text, let the rows be their positions in a list that the callables below know.
        sample: ``(policy, prompts, n) -> answers``, ``(prompts, n, ...)``, drawn independently; rows of tokens are to
            be padded to one width in all calls.
        log_probability: ``(policy, prompts, answers) -> (rows,)``: log-probability of one answer to each prompt, in
            nats, summed over tokens. Trained through by :meth:`log_probabilities`.
        compare: ``(prompts, first, second) -> (rows,)``: the probability that the first answer is better, or a drawn
            label, 1 or 0. The oracle: people, a judge, a pair model; it need not be transitive.
        num_rounds: How many rounds; 3 is the paper's, as far as known.
        num_answers: n, answers to a prompt in a round; even. The paper takes 8, with ``pairing="extremes"``.
        pairing: ``"independent"`` makes n / 2 pairs a prompt, ``"extremes"`` one.
        batch_size: Most rows in a call of ``sample``, ``log_probability`` or ``compare`` as a round begins; all if
            None.

    Attributes:
        finished: Rounds that are over.
        current: The pairs of the round under way, or None.
        comparisons: How often the oracle was asked.

    Raises:
        ValueError: If a setting is out of range, the policy has nothing to train, or a callable returns what it should
            not.

    Example:
        >>> policy = torch.nn.Embedding(1, 3)
        >>> def sample(policy, prompts, n):
        ...     return torch.multinomial(policy(prompts).softmax(-1), n, replacement=True)
        >>> def log_probability(policy, prompts, answers):
        ...     return policy(prompts).log_softmax(-1).gather(-1, answers[:, None]).squeeze(-1)
        >>> def compare(prompts, first, second):  # rock, paper, scissors
        ...     return ((first - second) % 3 == 1).float()
        >>> rounds = SelfPlayRounds(
        ...     policy,
        ...     prompts=torch.zeros(20, dtype=torch.long),
        ...     sample=sample,
        ...     log_probability=log_probability,
        ...     compare=compare,
        ... )
        >>> pairs = next(iter(rounds))
        >>> len(pairs) == rounds.comparisons <= 20
        True

    Source:
        Zhang et al. 2024, arXiv 2407.00617, section 4, algorithm 1.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        prompts: Tensor | Callable[[int], Tensor],
        sample: Sample,
        log_probability: LogProbability,
        compare: Compare,
        num_rounds: int = 3,
        num_answers: int = 2,
        pairing: Pairing = "independent",
        batch_size: int | None = None,
    ) -> None:
        checks.one_of(pairing, "pairing", ("independent", "extremes"))
        if num_rounds < 1:
            raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
        if num_answers < 2 or num_answers % 2:
            raise ValueError(f"num_answers must be an even number of at least 2, got {num_answers}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ValueError("policy has no parameter that requires a gradient: there is nothing to train")
        self.policy = policy
        self.prompts = prompts
        self.sample = sample
        self.log_probability = log_probability
        self.compare = compare
        self.num_rounds = num_rounds
        self.num_answers = num_answers
        self.pairing = pairing
        self.batch_size = batch_size
        self.finished = 0
        self.comparisons = 0
        self.current: SelfPlayPairs | None = None
        self._reference = _copy(_weights(policy))
        self._previous = self._reference

    def __iter__(self) -> Iterator[SelfPlayPairs]:
        """Yield the pairs of each round that is left; a round is over when the next one is asked for.

        A loop that was left early, or a state that was loaded, goes on with the round that was under way.
        """
        while self.finished < self.num_rounds:
            if self.current is None:
                self._previous = _copy(_weights(self.policy))
                self.current = self._play()
            yield self.current
            self.finished += 1
            self.current = None

    def log_probabilities(self, pairs: SelfPlayPairs) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Return the policy's log-probabilities of the chosen and the rejected answers, to train through.

        Both go through the policy in one pass.

        Args:
            pairs: Of this round.
        """
        both = torch.cat([pairs.chosen, pairs.rejected])
        chosen, rejected = self._scored(torch.cat([pairs.prompts, pairs.prompts]), both).split(len(pairs))
        return chosen, rejected

    def rewind(self) -> None:
        """Set the policy back to what it was when the round under way, or else the last one, began."""
        with torch.no_grad():
            for name, value in _weights(self.policy).items():
                value.copy_(self._previous[name])

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on: counts, the two copies of weights, and the pairs under way.

        The policy and its optimizer have states of their own.
        """
        return {
            "finished": self.finished,
            "comparisons": self.comparisons,
            "reference": dict(self._reference),
            "previous": dict(self._previous),
            "current": None if self.current is None else dict(vars(self.current)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a state was taken.

        Args:
            state: From :meth:`state_dict`, of rounds of the same kind of policy.

        Raises:
            ValueError: If something is missing, or weights do not fit the policy.
        """
        missing = {"finished", "comparisons", "reference", "previous", "current"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        own = _weights(self.policy)
        loaded = []
        for which in ("reference", "previous"):
            shapes = {name: value.shape for name, value in state[which].items()}
            if shapes != {name: value.shape for name, value in own.items()}:
                raise ValueError(f"state: the {which}'s weights do not fit the policy")
            loaded.append({name: value.detach().clone().to(own[name]) for name, value in state[which].items()})
        self._reference, self._previous = loaded
        self.finished, self.comparisons = int(state["finished"]), int(state["comparisons"])
        device = next(iter(own.values())).device
        pairs = state["current"]
        self.current = (
            None if pairs is None else SelfPlayPairs(**{name: value.to(device) for name, value in pairs.items()})
        )

    @torch.no_grad()
    def _play(self) -> SelfPlayPairs:
        """Draw and compare the answers of a round."""
        prompts = self.prompts(self.finished) if callable(self.prompts) else self.prompts
        checks.tensor(prompts, "prompts")
        checks.not_empty(prompts, "prompts")
        with _evaluating(self.policy):
            answers = self._chunked(lambda rows: self.sample(self.policy, rows, self.num_answers), prompts)
            _check_answers(answers, prompts, self.num_answers)
            if self.pairing == "independent":
                prompts = prompts.repeat_interleave(self.num_answers // 2, 0)
                first, second = answers.flatten(0, 1).unflatten(0, (-1, 2)).unbind(1)
            else:
                best, worst = tournament(prompts, answers, self._ask)
                rows = torch.arange(len(answers), device=answers.device)
                first, second = answers[rows, best], answers[rows, worst]
            distinct = (first != second).flatten(1).any(1) if first.dim() > 1 else first != second
            if not bool(distinct.any()):
                raise ValueError("sample: both answers of every pair are the same, so there is nothing to learn from")
            prompts, first, second = prompts[distinct], first[distinct], second[distinct]
            logp = self._score_both(prompts, first, second)
            with _holding(self.policy, self._reference):
                ref_logp = self._score_both(prompts, first, second)
            wins = torch.ones_like(logp[0])
            if self.pairing == "independent":
                wins = self._ask(prompts, first, second).to(wins)
        swap = wins < 0.5

        def ordered(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            turned = swap.view(-1, *[1] * (one.dim() - 1))
            return torch.where(turned, other, one), torch.where(turned, one, other)

        preference = torch.where(swap, 1 - wins, wins)
        return SelfPlayPairs(prompts, *ordered(first, second), preference, *ordered(*ref_logp), *ordered(*logp))

    def _ask(self, prompts: Tensor, first: Tensor, second: Tensor) -> Tensor:
        self.comparisons += len(prompts)
        return self._chunked(lambda *rows: _check_wins(self.compare(*rows), len(rows[0])), prompts, first, second)

    def _score_both(self, prompts: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self._chunked(self._scored, prompts, first), self._chunked(self._scored, prompts, second)

    def _scored(self, prompts: Tensor, answers: Tensor) -> Tensor:
        values = self.log_probability(self.policy, prompts, answers)
        checks.floating(values, "log_probability's result")
        if values.shape != prompts.shape[:1]:
            raise ValueError(
                f"log_probability must return one number a row, ({len(prompts)},), got {tuple(values.shape)}"
            )
        return values

    def _chunked(self, call: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        size = self.batch_size or len(rows[0])
        return torch.cat([call(*chunk) for chunk in zip(*(row.split(size) for row in rows), strict=True)])


def _stage(prompts: Tensor, answers: Tensor, indices: Tensor, compare: Compare) -> tuple[Tensor, Tensor]:
    """Let neighbours meet, ``indices`` being ``(prompts, even)``; return the winners' and the losers' positions."""
    matches = indices.shape[1] // 2
    rows = torch.arange(len(answers), device=answers.device).repeat_interleave(matches)
    first, second = indices.reshape(-1, 2).unbind(1)
    wins = _check_wins(compare(prompts[rows], answers[rows, first], answers[rows, second]), len(rows)) >= 0.5
    winners, losers = torch.where(wins, first, second), torch.where(wins, second, first)
    return winners.view(-1, matches), losers.view(-1, matches)


def _play_on(prompts: Tensor, answers: Tensor, indices: Tensor, compare: Compare, keep: int) -> Tensor:
    """Return who is left of the winners (``keep`` 0) or the losers (1) after a stage; an odd one passes."""
    even = indices.shape[1] // 2 * 2
    kept = _stage(prompts, answers, indices[:, :even], compare)[keep]
    return torch.cat([kept, indices[:, even:]], 1)


def _check_answers(answers: Tensor, prompts: Tensor, num_answers: int | None = None) -> None:
    checks.tensor(answers, "answers")
    wanted = "an even number" if num_answers is None else num_answers
    fits = answers.dim() >= 2 and len(answers) == len(prompts) and answers.shape[1] >= 2 and answers.shape[1] % 2 == 0
    if not fits or (num_answers is not None and answers.shape[1] != num_answers):
        raise ValueError(f"answers must have shape ({len(prompts)}, {wanted}, ...), got {tuple(answers.shape)}")


def _check_wins(wins: Tensor, rows: int) -> Tensor:
    checks.tensor(wins, "compare's result")
    if wins.shape != (rows,):
        raise ValueError(f"compare must return one number a row, ({rows},), got {tuple(wins.shape)}")
    # As NaN is neither, it is refused as well.
    checks.require((wins >= 0) & (wins <= 1), lambda: "compare must return probabilities, between 0 and 1")
    return wins


def _weights(policy: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: trainable parameters and buffers."""
    trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    return {**trained, **dict(policy.named_buffers())}


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


@contextlib.contextmanager
def _holding(policy: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the policy hold other weights for a while; no number is copied."""
    own = _weights(policy)
    kept = {name: value.data for name, value in own.items()}
    try:
        for name, value in own.items():
            value.data = weights[name]
        yield
    finally:
        for name, value in own.items():
            value.data = kept[name]


@contextlib.contextmanager
def _evaluating(policy: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off for a while; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
