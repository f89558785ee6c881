"""Does self-play by mirror descent reach the policy that no other beats, where preferences run in circles?

Prompts with ten answers each; preferences are a reward's, plus c times a circle: answers stand in a ring, and each
beats those that follow it. A small network is the policy, drawn labels are all that it learns from, and the exact game
says how far it is from the Nash policy. All contenders have the same network, optimizer and number of comparisons, and
choose their strength among four on a second set of games.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bench import Claim, Metric, Outcome, Run, Study
from ..preferences import (
    INPOLoss,
    PreferenceGame,
    SelfPlayPairs,
    SelfPlayRounds,
    bradley_terry,
    dpo_loss,
    ipo_loss,
    sppo_loss,
)
from ..training import seeded

CIRCLES = (0.0, 1.0, 2.0)
PROMPTS, FEATURES, ANSWERS, HIDDEN, TAU = 10, 8, 10, 32, 0.1
ROUNDS, PAIRS, STEPS, RATE = 50, 100, 16, 0.01
LAST, NEAR = 10, 0.01

OFFLINE, DPO, DPO_LAST, IPO, IPO_LAST = (
    "dpo in one round",
    "iterated dpo",
    "iterated dpo, moving",
    "iterated ipo",
    "iterated ipo, moving",
)
SPPO, NASH_MD, NASH, EXTREMES, INPO = "sppo", "nash-md", "nash policy", "inpo, best and worst of 8", "inpo"
STRONG, MILD = 2.0, 1.0


def played(circle: float) -> str:
    """Name the deciding metric of a strength of the circle."""
    return f"exploitability, c = {circle:g}"


def exact(circle: float) -> str:
    """Name the metric of exact steps."""
    return f"exploitability of exact steps, c = {circle:g}"


def queries(circle: float) -> str:
    """Name the metric of how many comparisons it takes."""
    return f"comparisons to {NEAR}, c = {circle:g}"


@dataclasses.dataclass(frozen=True)
class Games:
    """Games side by side: for every strength of the circle one to choose settings on, and one that counts.

    Args:
        features: ``(2 * circles, prompts, features)``; games to choose on come first.
        preferences: ``(2 * circles, prompts, answers, answers)``.
    """

    features: Tensor
    preferences: Tensor


def problem(source: Any, seed: int) -> Games:
    """Draw features, rewards that are linear in them, and the order of each prompt's answers around the ring."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    both = []
    for _ in range(2):
        features = normal(PROMPTS, FEATURES)
        rewards = features @ normal(FEATURES, ANSWERS) / math.sqrt(FEATURES)
        place = torch.rand(PROMPTS, ANSWERS, generator=generator).argsort(1) * (2 * math.pi / ANSWERS)
        ring = 2 * torch.sin(place[:, :, None] - place[:, None, :])
        reward = rewards[:, :, None] - rewards[:, None, :]
        both.append((features, torch.stack([torch.sigmoid(reward + circle * ring) for circle in CIRCLES])))
    features = torch.cat([each.expand(len(CIRCLES), -1, -1) for each, _ in both])
    return Games(features, torch.cat([table for _, table in both]))


class Policies(nn.Module):
    """One network a game, from features to scores of answers, side by side and of the same initial weights.

    A prompt is a position among all games' prompts, ``game * PROMPTS + prompt``.
    """

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features.float())
        games = len(features)

        def weights(rows: int, columns: int) -> nn.Parameter:
            drawn = torch.randn(1, rows, columns) / math.sqrt(rows)
            return nn.Parameter(drawn.expand(games, -1, -1).clone())

        self.inner, self.outer = weights(FEATURES, HIDDEN), weights(HIDDEN, ANSWERS)

    def forward(self) -> Tensor:
        """Return the log-probabilities of all answers to all prompts, ``(games * prompts, answers)``."""
        return (torch.tanh(self.features @ self.inner) @ self.outer).log_softmax(-1).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class Method:
    """A contender: what it minimises in a round, and what its exact round is.

    Args:
        settings: Strengths to choose from; None is eta = tau (t + 2) / 2 in round t.
        loss: ``(setting, round, chosen, rejected, pairs) -> losses``.
        step: ``(game, setting, round, policy, reference) -> policy``: the minimiser of the mean loss.
        mixture: Whether answers are drawn from the mixture of policy and reference.
        extremes: Whether a pair are the best and the worst of eight.
        rounds: Among how many rounds the comparisons are shared.
    """

    settings: Sequence[float | None]
    loss: Callable[[float | None, int, Tensor, Tensor, SelfPlayPairs], Tensor]
    step: Callable[[PreferenceGame, float | None, int, Tensor], Tensor] | None
    mixture: bool = False
    extremes: bool = False
    rounds: int = ROUNDS


def eta_of(setting: float | None, number: int) -> float:
    """Return eta in a round, counted from 0."""
    return TAU * (number + 2) / 2 if setting is None else setting


class PlayRounds:
    """Play all games with every setting, and report each strength of the circle under the setting chosen for it."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, data: Games, run: Run) -> Outcome:
        """Play one cell."""
        by_setting = [self._play(data, run, setting) for setting in self.method.settings]
        metrics: dict[str, float] = {}
        curves: dict[str, list[float]] = {}
        chosen: dict[str, float | None] = {}
        for k, circle in enumerate(CIRCLES):
            counted = len(CIRCLES) + k
            best = min(range(len(by_setting)), key=lambda i: float(by_setting[i][0][-LAST:, k].mean()))
            distances = by_setting[best][0][:, counted]
            chosen[f"c = {circle:g}"] = self.method.settings[best]
            metrics[played(circle)] = float(distances[-LAST:].mean())
            curves[played(circle)] = distances.tolist()
            fastest = min(by_setting, key=lambda each: until_near(each[0][:, k], each[1][:, k]))
            metrics[queries(circle)] = until_near(fastest[0][:, counted], fastest[1][:, counted])
        return Outcome(metrics | self._exact(data, run), curves, details={"chosen": chosen})

    def _play(self, data: Games, run: Run, setting: float | None) -> tuple[Tensor, Tensor]:
        """Return exploitability after each round and comparisons so far a prompt, ``(rounds, games)`` each."""
        policy = seeded(functools.partial(Policies, data.features), run.stream("policy"))
        with torch.no_grad():
            reference = policy()
        game = game_of(data, reference)
        tables = data.preferences.flatten(0, 1).float()
        generator = torch.Generator().manual_seed(run.stream("answers"))
        number, asked = 0, torch.zeros(len(data.features))

        def sample(policy: nn.Module, prompts: Tensor, count: int) -> Tensor:
            log_policy = policy()
            if self.method.mixture:
                log_policy = log_policy.lerp(reference, TAU / eta_of(setting, number)).log_softmax(-1)
            return torch.multinomial(log_policy.exp()[prompts], count, replacement=True, generator=generator)

        def compare(prompts: Tensor, first: Tensor, second: Tensor) -> Tensor:
            asked.index_add_(0, prompts // PROMPTS, torch.full((len(prompts),), 1 / PROMPTS))
            wins = tables[prompts, first, second]
            return (torch.rand(wins.shape, generator=generator) < wins).float()

        everyone, each = torch.arange(len(data.features) * PROMPTS), PAIRS * ROUNDS // self.method.rounds
        rounds = SelfPlayRounds(
            policy,
            # A tournament of eight takes ten comparisons.
            prompts=everyone.repeat_interleave(each // 10) if self.method.extremes else everyone,
            sample=sample,
            log_probability=lambda policy, prompts, answers: policy()[prompts, answers],
            compare=compare,
            num_rounds=self.method.rounds,
            num_answers=8 if self.method.extremes else 2 * each,
            pairing="extremes" if self.method.extremes else "independent",
        )
        optimizer = torch.optim.Adam(policy.parameters(), lr=RATE, fused=True)
        distances, comparisons = [], []
        for number, pairs in enumerate(rounds):
            # Where one round has all comparisons, a step sees no more of them than elsewhere.
            batches = (b for _ in range(STEPS) for b in pairs.batches(len(everyone) * PAIRS, generator=generator))
            for batch in batches:
                optimizer.zero_grad()
                # The games' networks share no weight, so the sum's gradient is each one's own.
                losses = self.method.loss(setting, number, *rounds.log_probabilities(batch), batch)
                (losses.sum() / (PROMPTS * PAIRS)).backward()
                optimizer.step()
            with torch.no_grad():
                log_policy = policy().double().view_as(game.log_reference)
            distances.append(game.exploitability(log_policy.log_softmax(-1)).mean(-1))
            comparisons.append(asked.clone())
        return torch.stack(distances), torch.stack(comparisons)

    def _exact(self, data: Games, run: Run) -> dict[str, float]:
        """Take exact rounds in place of drawn ones."""
        if self.method.step is None:
            return {exact(circle): math.nan for circle in CIRCLES}
        policy = seeded(functools.partial(Policies, data.features), run.stream("policy"))
        with torch.no_grad():
            game = game_of(data, policy())
        found = []
        for setting in self.method.settings:
            log_policy, distances = game.log_reference, []
            for number in range(self.method.rounds):
                log_policy = self.method.step(game, setting, number, log_policy)
                distances.append(game.exploitability(log_policy).mean(-1))
            found.append(torch.stack(distances[-LAST:]).mean(0))
        table = torch.stack(found)
        best = table[:, : len(CIRCLES)].argmin(0)
        return {exact(c): float(table[best[k], len(CIRCLES) + k]) for k, c in enumerate(CIRCLES)}


def game_of(data: Games, reference: Tensor) -> PreferenceGame:
    """Return the exact games of a cell."""
    log_reference = reference.double().view(data.preferences.shape[:-1]).log_softmax(-1)
    return PreferenceGame(data.preferences, log_reference, tau=TAU)


def until_near(distances: Tensor, asked: Tensor) -> float:
    """Return after how many comparisons a prompt a policy is near and stays so; all there may be, if it is never."""
    far = (distances >= NEAR).nonzero()
    first = 0 if len(far) == 0 else int(far[-1]) + 1
    return float(asked[first]) if first < len(asked) else float(ROUNDS * PAIRS)


def nash_policy(data: Games, run: Run) -> Outcome:
    """Solve the games: what there is to reach, without a comparison."""
    policy = seeded(functools.partial(Policies, data.features), run.stream("policy"))
    with torch.no_grad():
        found = game_of(data, policy()).nash().exploitability.mean(-1)
    counted = [float(each) for each in found[len(CIRCLES) :]]
    metrics = {name(c): value for name in (played, exact) for c, value in zip(CIRCLES, counted, strict=True)}
    return Outcome(metrics | {queries(c): 0.0 for c in CIRCLES})


def _against(last: bool, pairs: SelfPlayPairs) -> tuple[Tensor, Tensor]:
    if last:
        return pairs.prev_logp_chosen, pairs.prev_logp_rejected
    return pairs.ref_logp_chosen, pairs.ref_logp_rejected


def _dpo(last: bool, rounds: int = ROUNDS) -> Method:
    def loss(beta: Any, number: int, chosen: Tensor, rejected: Tensor, pairs: SelfPlayPairs) -> Tensor:
        return dpo_loss(chosen, rejected, *_against(last, pairs), beta=beta)

    def step(game: PreferenceGame, beta: Any, number: int, log_policy: Tensor) -> Tensor:
        scores = bradley_terry(game.preferences, log_policy.exp(), tolerance=1e-5).scores
        return ((log_policy if last else game.log_reference) + scores / beta).log_softmax(-1)

    return Method((10.0, 30.0, 100.0, 300.0) if last else (0.25, 0.5, 1.0, 2.0), loss, step, rounds=rounds)


def _ipo(last: bool) -> Method:
    def loss(beta: Any, number: int, chosen: Tensor, rejected: Tensor, pairs: SelfPlayPairs) -> Tensor:
        return ipo_loss(chosen, rejected, *_against(last, pairs), beta=beta)

    def step(game: PreferenceGame, beta: Any, number: int, log_policy: Tensor) -> Tensor:
        return ((log_policy if last else game.log_reference) + game.win_rate(log_policy) / beta).log_softmax(-1)

    return Method((1.0, 3.0, 10.0, 30.0) if last else (0.1, 0.25, 0.5, 1.0), loss, step)


def _sppo_loss(beta: Any, number: int, chosen: Tensor, rejected: Tensor, pairs: SelfPlayPairs) -> Tensor:
    return sppo_loss(chosen, rejected, *_against(True, pairs), beta=beta)


def _inpo_loss(eta: float | None, number: int, chosen: Tensor, rejected: Tensor, pairs: SelfPlayPairs) -> Tensor:
    return INPOLoss(eta_of(eta, number), tau=TAU, reduction="none")(chosen, rejected, **pairs.fixed())


def _inpo_step(game: PreferenceGame, eta: float | None, number: int, log_policy: Tensor) -> Tensor:
    return game.mirror_step(log_policy, eta=eta_of(eta, number))


def _nash_md_step(game: PreferenceGame, eta: float | None, number: int, log_policy: Tensor) -> Tensor:
    rate = eta_of(eta, number)
    return game.mirror_step(log_policy, eta=rate, log_opponent=game.mixture(log_policy, eta=rate))


ETAS = (0.5, 1.0, 2.0, None)


def _claims() -> tuple[Claim, ...]:
    rivals = (DPO, DPO_LAST, IPO, IPO_LAST, SPPO, OFFLINE)
    mild = [
        Claim(INPO, who, played(MILD), 0.0, f"preferences in circles: nearer to the Nash policy than {who}")
        for who in rivals
    ]
    strong = [
        Claim(INPO, who, played(STRONG), 0.0, f"strongly in circles: nearer to the Nash policy than {who}")
        for who in rivals
    ]
    return (
        *mild,
        *strong,
        Claim(INPO, NASH, played(MILD), -0.005, "in circles: within 0.005 of the Nash policy"),
        Claim(INPO, NASH, played(STRONG), -0.005, "strongly in circles: within 0.005 of the Nash policy"),
        *(
            Claim(INPO, who, exact(c), 0.0, f"exact steps, c = {c:g}: nearer to the Nash policy than {who}")
            for c in (MILD, STRONG)
            for who in (DPO, IPO)
        ),
        Claim(OFFLINE, INPO, played(0.0), -0.002, "no circles: DPO in one round is as near, to 0.002"),
        Claim(IPO, INPO, played(0.0), -0.002, "no circles: iterated IPO is as near, to 0.002"),
        Claim(IPO, INPO, exact(0.0), -0.002, "exact steps, no circles: iterated IPO is as near, to 0.002"),
        Claim(INPO, NASH_MD, played(MILD), 0.0, "in circles: nearer to the Nash policy than Nash-MD"),
        Claim(INPO, NASH_MD, played(STRONG), 0.0, "strongly in circles: nearer to the Nash policy than Nash-MD"),
        Claim(INPO, NASH_MD, queries(MILD), 0.0, "in circles: near by fewer comparisons than Nash-MD"),
        Claim(INPO, NASH_MD, queries(STRONG), 0.0, "strongly in circles: near by fewer comparisons than Nash-MD"),
        Claim(INPO, EXTREMES, played(MILD), 0.0, "in circles: independent pairs end nearer than best and worst of 8"),
        Claim(INPO, EXTREMES, played(0.0), 0.0, "no circles: independent pairs end nearer than best and worst of 8"),
    )


study = Study(
    method="inpo",
    problem=problem,
    contenders={
        DPO: PlayRounds(_dpo(last=False)),
        DPO_LAST: PlayRounds(_dpo(last=True)),
        IPO: PlayRounds(_ipo(last=False)),
        IPO_LAST: PlayRounds(_ipo(last=True)),
        SPPO: PlayRounds(Method((1.0, 3.0, 10.0, 30.0), _sppo_loss, None)),
        OFFLINE: PlayRounds(_dpo(last=False, rounds=1)),
        NASH_MD: PlayRounds(Method(ETAS, _inpo_loss, _nash_md_step, mixture=True)),
        NASH: nash_policy,
        EXTREMES: PlayRounds(Method((2.0, 4.0, 8.0, 16.0), _inpo_loss, None, extremes=True)),
        INPO: PlayRounds(Method(ETAS, _inpo_loss, _inpo_step)),
    },
    metrics=(
        *(Metric(played(c), "lower is better") for c in (MILD, STRONG, 0.0)),
        *(Metric(exact(c), "lower is better") for c in (MILD, STRONG, 0.0)),
        *(Metric(queries(c), "lower is better", "a prompt") for c in (MILD, STRONG, 0.0)),
    ),
    claims=_claims(),
    about=(
        "A network learns from 5,000 drawn comparisons a prompt which of ten answers wins, where preferences are a "
        "reward's plus c times a circle; measured is what the best opponent gains on it, 0 at the Nash policy."
    ),
    notes=(
        "Exploitability is half of the duality gap of the game with tau = 0.1, averaged over prompts and over the last "
        "ten of 50 rounds. Contenders choose one of four strengths on a second set of games, by exploitability, which "
        "nobody has in practice; INPO's and Nash-MD's choice includes the falling steps of theory. Only the strengths "
        "differ between the contenders: network, optimizer and its rate, rounds and comparisons are the same and were "
        "set on another seed. Nash-MD draws from the exact mixture, which a language model has to approximate. "
        "Those with a moving reference aim at another game, the one without a divergence to the reference, and are "
        "judged by this one as they would be used: stopped in time. Exact steps replace drawn pairs and training by "
        "the minimiser of the mean loss. 'Comparisons to 0.01' is 5,000 for those that are not near at the end, and "
        "counts from the strength that was fastest on the second set of games. The policies are small networks; "
        "nothing here says how large the circles of people's preferences are."
    ),
)
