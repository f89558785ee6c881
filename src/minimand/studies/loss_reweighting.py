"""Does cutting the weight of samples already learnt help a language model on redundant text?

A small network predicts characters of Python's own help texts. A share of its training samples comes from one short
passage, over and over, and in one condition some samples are random characters. Each step takes one batch of samples,
which the contenders weigh in their own way; the held-out text is weighed evenly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bench import Claim, Metric, Outcome, Run, Study
from ..risks import KLDRO, CVaR, DynamicLossReweighting, Mean, Risk, sequence_losses
from ..risks.loss_reweighting import Strategy
from ..training import seeded

HALF, MOST, NOISY, NONE = "50 % redundant", "80 % redundant", "50 % redundant, 10 % noise", "no redundancy"
SHARES = {HALF: (0.5, 0.0), MOST: (0.8, 0.0), NOISY: (0.5, 0.1), NONE: (0.0, 0.0)}

CONTEXT, PREDICTIONS, BATCH, STEPS, WARMUP = 12, 16, 32, 400, 40
PASSAGE, TRAIN, TEST = 1_500, 300_000, 20_000
HIDDEN = 128


@dataclasses.dataclass(frozen=True)
class Text:
    """The samples of one condition, step by step, and the held-out text.

    Args:
        samples: ``(steps, batch, context + predictions)`` character ids.
        held_out: ``(characters,)`` ids.
        vocabulary: Number of different characters.
    """

    samples: Tensor
    held_out: Tensor
    vocabulary: int


@functools.cache
def characters() -> tuple[np.ndarray, int]:
    """Return Python's help topics as character ids, and how many characters there are."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return np.array([alphabet[character] for character in text], dtype=np.uint8), len(alphabet)


def problem(source: Any, seed: int) -> dict[str, Text]:
    """Draw the samples of every step; the conditions replace shares of the same ones."""
    ids, vocabulary = characters()
    generator = np.random.default_rng(seed)
    length = CONTEXT + PREDICTIONS
    starts = generator.integers(TRAIN - length, size=(STEPS, BATCH))
    repeated = generator.integers(TRAIN - PASSAGE) + generator.integers(PASSAGE - length, size=starts.shape)
    kind = generator.random(starts.shape)
    random_text = generator.integers(vocabulary, size=(*starts.shape, length), dtype=np.uint8)
    held_out = torch.from_numpy(ids[-TEST:].astype(np.int64))
    found = {}
    for name, (redundant, noise) in SHARES.items():
        begin = np.where(kind < redundant, repeated, starts)
        samples = ids[begin[..., None] + np.arange(length)]
        samples = np.where((kind > 1 - noise)[..., None], random_text, samples)
        found[name] = Text(torch.from_numpy(samples), held_out, vocabulary)
    return found


class NextCharacter(nn.Module):
    """Predict each character from the twelve before it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.body = nn.Sequential(nn.Linear(16 * CONTEXT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, vocabulary))

    def forward(self, text: Tensor) -> Tensor:
        """Score ``(batch, context + predictions)`` ids: ``(batch, predictions, vocabulary)``."""
        windows = self.embed(text[:, :-1]).unfold(1, CONTEXT, 1)
        return self.body(windows.flatten(2))


class TrainLanguageModel:
    """Train on the samples of each condition with a risk over the samples of a batch, and measure held-out text.

    Args:
        make_risk: How the losses of a batch's samples add up, after some first steps of plain means.
        rate: Adam's learning rate at the start; a cosine to zero follows.
    """

    def __init__(self, make_risk: Callable[[], Risk], *, rate: float = 3e-3) -> None:
        self.make_risk = make_risk
        self.rate = rate

    def __call__(self, data: Mapping[str, Text], run: Run) -> Outcome:
        """Train and measure one cell under every condition."""
        metrics, curves = {}, {}
        for name, text in data.items():
            model = seeded(functools.partial(NextCharacter, text.vocabulary), run.stream("model"))
            curves[f"training loss, {name}"] = self._train(model, text)
            metrics[f"held-out loss, {name}"] = held_out_loss(model, text)
        return Outcome(metrics, curves)

    def _train(self, model: nn.Module, text: Text) -> list[float]:
        warmup, risk = Mean(), self.make_risk()
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(text.samples))
        means = []
        for step, samples in enumerate(text.samples.long()):
            losses, _ = sequence_losses(model(samples), samples[:, CONTEXT:], shift=False)
            optimizer.zero_grad()
            (warmup if step < WARMUP else risk)(losses).backward()
            optimizer.step()
            schedule.step()
            means.append(losses.detach().mean())
        return torch.stack(means).unflatten(0, (-1, 10)).mean(1).tolist()


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text) -> float:
    """Return the mean negative log-likelihood of a held-out character, in nats."""
    length = CONTEXT + PREDICTIONS
    pieces = text.held_out.unfold(0, length, PREDICTIONS)
    losses, _ = sequence_losses(model(pieces), pieces[:, CONTEXT:], shift=False)
    return float(losses.mean())


def reweighted(strategy: Strategy) -> Callable[[], Risk]:
    """Build dynamic reweighting at the temperature of the paper's larger models."""
    return functools.partial(DynamicLossReweighting, strategy, temperature=0.4)


def _claim(contender: str, beats: str, condition: str, margin: float, says: str) -> Claim:
    return Claim(contender, beats=beats, metric=f"held-out loss, {condition}", margin=margin, says=says)


study = Study(
    method="loss-reweighting",
    problem=problem,
    contenders={
        "uniform": TrainLanguageModel(Mean),
        "uniform, twice the rate": TrainLanguageModel(Mean, rate=6e-3),
        "cvar": TrainLanguageModel(functools.partial(CVaR, 0.5)),
        "kl-dro": TrainLanguageModel(functools.partial(KLDRO, 0.1)),
        "linupper": TrainLanguageModel(reweighted("linupper")),
        "linupper, twice the rate": TrainLanguageModel(reweighted("linupper"), rate=6e-3),
        "quadratic": TrainLanguageModel(reweighted("quadratic")),
        "extremes": TrainLanguageModel(reweighted("extremes")),
    },
    metrics=tuple(Metric(f"held-out loss, {name}", "lower is better", "nats") for name in SHARES),
    claims=(
        _claim("linupper", "uniform", HALF, 0.1, "half redundant: LinUpper beats uniform by more than 0.1 nats"),
        _claim("linupper", "uniform", MOST, 0.1, "80 % redundant: LinUpper beats uniform by more than 0.1 nats"),
        _claim("linupper", "quadratic", HALF, 0.0, "half redundant: LinUpper beats Quadratic"),
        _claim("linupper", "quadratic", MOST, 0.0, "80 % redundant: LinUpper beats Quadratic"),
        _claim("quadratic", "uniform", HALF, 0.0, "half redundant: Quadratic beats uniform weights"),
        _claim("quadratic", "uniform", MOST, 0.0, "80 % redundant: Quadratic beats uniform weights"),
        _claim("uniform", "extremes", HALF, 0.0, "half redundant: favouring both extremes is worse than uniform"),
        _claim("uniform", "extremes", MOST, 0.0, "80 % redundant: favouring both extremes is worse than uniform"),
        _claim("quadratic", "linupper", NOISY, 0.0, "with noise samples among them, Quadratic beats LinUpper"),
        _claim("quadratic", "uniform", NOISY, 0.0, "with noise samples among them, Quadratic beats uniform weights"),
        _claim("linupper", "uniform", NONE, -0.05, "without redundancy LinUpper costs at most 0.05 nats"),
        _claim("linupper", "cvar", HALF, 0.0, "half redundant: LinUpper beats the mean of the worst half (CVaR)"),
        _claim("linupper", "kl-dro", HALF, 0.0, "half redundant: LinUpper beats KL-DRO"),
        _claim("linupper", "uniform, twice the rate", HALF, 0.0, "half redundant: more than a doubled learning rate"),
        _claim("linupper", "uniform, twice the rate", MOST, 0.0, "80 % redundant: more than a doubled learning rate"),
        _claim(
            "linupper, twice the rate",
            "uniform, twice the rate",
            HALF,
            0.0,
            "half redundant: LinUpper beats uniform weights when both have the doubled learning rate",
        ),
    ),
    seeds=5,
    test_train_ratio=TEST / TRAIN,
    about="A network predicts characters of Python's help texts from the twelve before; 400 batches of 32 samples.",
    notes=(
        "Reweighting acts like a larger learning rate where losses are high, so the claims at one rate say more than "
        "a tuned comparison would: uniform weights and LinUpper are also run at twice the rate. All contenders start "
        "with 40 steps of plain means. CVaR counts the worse half of each batch, KL-DRO has radius 0.1; neither they "
        "nor the temperature of 0.4 were tuned. The text is that of the running Python, so numbers differ between its "
        "versions. The network and the number of steps are far smaller than the paper's, none of whose perplexities "
        "is reproduced."
    ),
)
