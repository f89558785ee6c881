"""Does feeding back a fraction of the compression error serve workers whose data differ and whose gradients are noisy?

Ten workers send the largest tenth of their gradients' entries and minimise quadratics whose minimisers differ by a set
amount; then a linear classifier and a small network learn digits that are dealt out by label, unevenly. Every contender
tries equally many settings on other draws of noise, all in one computation, and is measured on fresh ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bench import Claim, Metric, Outcome, Run, Study
from ..optim import (
    EF21,
    EF21SGDM,
    Compressor,
    EControl,
    ErrorFeedback,
    GradientExchange,
    Identity,
    NaiveCompression,
    TopK,
)
from . import digits

WORKERS, DIM, KEPT, START, ROUNDS = 10, 100, 10, 3.0, 2000
# Heterogeneity zeta and noise sigma.
EXACT, FAR, NOISY, ALIKE = "differing", "very differing", "differing and noisy", "alike and noisy"
CONDITIONS = {EXACT: (10.0, 0.0), FAR: (100.0, 0.0), NOISY: (10.0, 5.0), ALIKE: (0.0, 5.0)}
RATES = (0.05, 0.0005)
CROWDS, CROWD_RATE, CROWD_ROUNDS = (2, 8, 32), 0.01, 1500

BATCH, SHARE = 8, 0.05
LINEAR, NETWORK = "linear classifier", "network"
HIDDEN = {LINEAR: (), NETWORK: (16,)}
LEARNING_ROUNDS = {LINEAR: 400, NETWORK: 300}
LEARNING_RATES = {LINEAR: (3.0, 0.03), NETWORK: (1.0, 0.01)}
TENTHS, WINDOW = 10, 10

SGD, CSGD, EC, EF, SGDM, OURS = "sgd", "compressed sgd", "error feedback", "ef21", "ef21-sgdm", "econtrol"
CROWD_EXPONENT = "|exponent of workers + 1|"


def distance_of(condition: str) -> str:
    """Name the metric of a condition."""
    return f"log10 of squared distance, {condition}"


def loss_after(model: str) -> str:
    """Name the metric of equal rounds."""
    return f"loss after {LEARNING_ROUNDS[model]} rounds, {model}"


def loss_at_bytes(model: str) -> str:
    """Name the metric of equal bytes."""
    return f"loss at equal bytes, {model}"


@dataclasses.dataclass(frozen=True)
class Quadratics:
    r"""The mean of :math:`\frac12 \|a_i x - b_i\|^2` over workers, with noise added to gradients.

    Args:
        curvature: The squares of a, ``(workers, 1)``.
        pull: :math:`a_i b_i`, ``(conditions, workers, dim)``.
        noise: Standard deviation of an entry, ``(conditions, 1, 1)``.
    """

    curvature: Tensor
    pull: Tensor
    noise: Tensor

    @property
    def solution(self) -> Tensor:
        """The minimisers, ``(conditions, 1, dim)``."""
        return self.pull.mean(1, keepdim=True) / self.curvature.mean()

    def gradients(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return workers' gradients at points ``(conditions, settings, dim)``; settings share the noise."""
        drawn = torch.randn(self.pull.shape[1:], generator=generator, dtype=x.dtype)
        return self.curvature * x[:, :, None] + (self.noise * drawn - self.pull)[:, None]


@dataclasses.dataclass(frozen=True)
class Shares:
    """Digits in the order of their labels, dealt out in shares of one to ten parts.

    Args:
        inputs: ``(samples, 64)``.
        target: ``(samples,)``.
        bounds: Where the share of each worker begins and ends, ``(workers + 1,)``.
    """

    inputs: Tensor
    target: Tensor
    bounds: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the indices of a batch for each worker, ``(workers, batch)``."""
        first, size = self.bounds[:-1, None], self.bounds.diff()[:, None]
        return first + (torch.rand(WORKERS, BATCH, generator=generator, dtype=torch.float64) * size).long()

    @property
    def weights(self) -> Tensor:
        """What each worker's loss counts in a plain mean over workers, ``(workers,)``."""
        return self.bounds.diff() * WORKERS / len(self.target)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one cell is measured on.

    Args:
        quadratics: All conditions at once.
        crowds: The same curvature for all, by number of workers.
        shares: The digits.
        seed: Decides the noise.
    """

    quadratics: Quadratics
    crowds: dict[int, Quadratics]
    shares: Shares
    seed: int


def problem(source: Any, seed: int) -> Problem:
    """Draw the workers' minimisers and who gets which digits."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(1, WORKERS + 1, dtype=torch.float64)[:, None]
    a = place / math.sqrt(WORKERS)
    zeta, sigma = torch.tensor(list(CONDITIONS.values()), dtype=torch.float64).T
    targets = torch.randn(WORKERS, DIM, generator=generator, dtype=torch.float64) / place
    quadratics = Quadratics(a.square(), a * zeta[:, None, None] * targets, sigma[:, None, None] / math.sqrt(DIM))
    crowds = {
        size: Quadratics(
            torch.ones(size, 1, dtype=torch.float64),
            3.0 * torch.randn(1, size, DIM, generator=generator, dtype=torch.float64),
            torch.full((1, 1, 1), 5.0 / math.sqrt(DIM), dtype=torch.float64),
        )
        for size in CROWDS
    }
    inputs, target = digits.load()
    renamed = torch.randperm(10, generator=generator)[target]
    order = renamed.argsort(stable=True)
    parts = torch.arange(WORKERS + 1).cumsum(0)
    bounds = (parts * len(target)).div(parts[-1], rounding_mode="floor")
    return Problem(quadratics, crowds, Shares(inputs[order], target[order], bounds), seed)


class Classifier:
    """A classifier as a function of flat vectors of weights, many at once.

    Args:
        hidden: Widths of its hidden layers.
    """

    def __init__(self, hidden: tuple[int, ...]) -> None:
        widths = (64, *hidden, 10)
        self.layers = list(itertools.pairwise(widths))
        self.dim = sum((fan_in + 1) * fan_out for fan_in, fan_out in self.layers)

    def start(self, generator: torch.Generator) -> Tensor:
        """Draw weights of the size that torch's own layers have, ``(dim,)``."""
        parts = []
        for fan_in, fan_out in self.layers:
            drawn = torch.rand((fan_in + 1) * fan_out, generator=generator)
            parts.append((2 * drawn - 1) / math.sqrt(fan_in))
        return torch.cat(parts)

    def losses(self, weights: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
        """Return mean losses of weights ``(*batch, dim)`` on inputs that broadcast with ``(*batch, samples, 64)``."""
        hidden, place = inputs, 0
        for layer, (fan_in, fan_out) in enumerate(self.layers):
            if layer > 0:
                hidden = torch.relu(hidden)
            end = place + fan_in * fan_out
            matrix = weights[..., place:end].unflatten(-1, (fan_in, fan_out))
            hidden = hidden @ matrix + weights[..., None, end : end + fan_out]
            place = end + fan_out
        target = target.expand(hidden.shape[:-1])
        return F.cross_entropy(hidden.flatten(0, -2), target.flatten(), reduction="none").view(target.shape).mean(-1)

    def gradients(self, weights: Tensor, shares: Shares, generator: torch.Generator) -> Tensor:
        """Return workers' weighted gradients on fresh batches at ``(settings, dim)``; settings share the batches."""
        batch = shares.draw(generator)
        own = weights[:, None].expand(-1, WORKERS, -1).clone().requires_grad_()
        losses = self.losses(own, shares.inputs[batch], shares.target[batch]) * shares.weights
        (found,) = torch.autograd.grad(losses.sum(), own)
        return found


class Exchange:
    """Workers that exchange gradients in one way, at the best of equally many settings for all ways.

    Args:
        make: Builds the method from the compressor and the values of its own setting, if it has one.
        values: What its own setting may be; then a third as many learning rates are tried.
        compressed: Whether messages are compressed.
    """

    def __init__(
        self,
        make: Callable[[Compressor, Any], GradientExchange],
        *,
        values: tuple[float, float, float] | None = None,
        compressed: bool = True,
    ) -> None:
        self.make = make
        self.values = values
        self.compressed = compressed

    def __call__(self, data: Problem, run: Run) -> Outcome:
        """Choose settings and measure one cell."""
        metrics = {**self._quadratics(data), CROWD_EXPONENT: self._crowds(data)}
        curves = {}
        for model in HIDDEN:
            found, curve = self._learning(data, model)
            metrics |= found
            curves[f"loss after 1 to 9 tenths of the bytes, {model}"] = curve
        return Outcome(metrics, curves)

    def settings(self, rates: tuple[float, float], trials: int) -> tuple[Tensor, Tensor]:
        """Return the learning rates and own values to try, two lists of ``trials`` numbers."""
        count = trials if self.values is None else trials // len(self.values)
        grid = torch.logspace(math.log10(rates[0]), math.log10(rates[1]), count, dtype=torch.float64)
        own = torch.tensor(self.values or [0.0], dtype=torch.float64)
        return grid.repeat_interleave(len(own)), own.repeat(count)

    def compressor(self, kept: int) -> Compressor:
        """Return what every method is given."""
        return TopK(k=kept) if self.compressed else Identity()

    def descend(
        self,
        x: Tensor,
        gradients: Callable[[Tensor], Tensor],
        *,
        rates: Tensor,
        own: Tensor,
        rounds: int,
        kept: int,
        seen: Callable[[int, Tensor], None],
    ) -> None:
        """Run all settings at once from points ``(*settings, dim)``; ``rates`` and ``own`` are ``(*settings,)``.

        ``seen`` is shown the point after each round.
        """
        method = self.make(self.compressor(kept), own.to(x.dtype)[..., None, None])
        rates = rates.to(x.dtype)[..., None]
        state = None
        for step in range(rounds):
            gradient = gradients(x)
            if state is None:
                sent = method.first().encode(method.begin(gradient), gradient)
            else:
                sent = method.encode(state, gradient)
            state, x = sent.state, x - rates * method.direction(sent)
            if step % 10 == 9:
                # A setting that diverges is held far away, where it counts as bad and its numbers stay finite.
                lost = ~(x.abs().amax(-1, keepdim=True) < 1e8)
                if lost.any():
                    x = torch.where(lost, 1e8, x)
                    kept_state = (None if part is None else part.masked_fill(lost[..., None], 0) for part in state)
                    state = type(state)(*kept_state)
            seen(step, x)

    def _quadratics(self, data: Problem) -> dict[str, float]:
        losses = data.quadratics
        rates, own = (one.expand(len(CONDITIONS), -1) for one in self.settings(RATES, 21))
        tuning = self._distances(losses, rates, own, seed=2 * data.seed)
        best = tuning.argmin(1, keepdim=True)
        found = self._distances(losses, rates.gather(1, best), own.gather(1, best), seed=2 * data.seed + 1)
        # Double precision ends at about 1e-30.
        logs = found.clamp_min(1e-40).log10()[:, 0].tolist()
        return {distance_of(name): value for name, value in zip(CONDITIONS, logs, strict=True)}

    def _distances(
        self, losses: Quadratics, rates: Tensor, own: Tensor, *, seed: int, rounds: int = ROUNDS, part: int = 10
    ) -> Tensor:
        """Return squared distances to the solution, averaged over the last part of the rounds, ``(*settings)``."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(rates.shape, dtype=torch.float64)
        last = rounds // part

        def seen(step: int, x: Tensor) -> None:
            if step >= rounds - last:
                total.add_((x - losses.solution).square().sum(-1), alpha=1 / last)

        start = torch.full((*rates.shape, DIM), START, dtype=torch.float64)
        self.descend(
            start,
            lambda x: losses.gradients(x, generator),
            rates=rates,
            own=own,
            rounds=rounds,
            kept=KEPT,
            seen=seen,
        )
        return total

    def _crowds(self, data: Problem) -> float:
        """Fit the power of the number of workers that the distance at one learning rate falls with."""
        rate = torch.full((1, 1), CROWD_RATE, dtype=torch.float64)
        own = torch.full((1, 1), self.values[1] if self.values else 0.0, dtype=torch.float64)
        found = [
            self._distances(losses, rate, own, seed=2 * data.seed + 1, rounds=CROWD_ROUNDS, part=2).log().item()
            for losses in data.crowds.values()
        ]
        across = torch.tensor(CROWDS, dtype=torch.float64).log()
        across = across - across.mean()
        exponent = across @ torch.tensor(found, dtype=torch.float64) / (across @ across)
        return abs(float(exponent) + 1)

    def _learning(self, data: Problem, model: str) -> tuple[dict[str, float], list[float]]:
        classifier, rounds = Classifier(HIDDEN[model]), LEARNING_ROUNDS[model]
        kept = math.ceil(SHARE * classifier.dim)
        budget = rounds * kept * (4 + 4)
        marks = [self._rounds_within(budget * (i + 1) // TENTHS, classifier.dim, kept) for i in range(TENTHS)]
        start = classifier.start(torch.Generator().manual_seed(data.seed))

        def losses(rates: Tensor, own: Tensor, seed: int) -> dict[int, Tensor]:
            """Return the losses of all settings by round, averaged over ten rounds where it matters."""
            generator, found = torch.Generator().manual_seed(seed), {}

            def seen(step: int, x: Tensor) -> None:
                if step in marks or any(end - WINDOW <= step < end for end in (rounds, marks[-1])):
                    found[step + 1] = classifier.losses(x, data.shares.inputs, data.shares.target)

            self.descend(
                start.expand(len(rates), -1),
                lambda x: classifier.gradients(x, data.shares, generator),
                rates=rates,
                own=own,
                rounds=rounds,
                kept=kept,
                seen=seen,
            )
            return found

        def late(found: dict[int, Tensor], end: int) -> Tensor:
            return torch.stack([found[step] for step in range(end - WINDOW + 1, end + 1)]).mean(0)

        ends = (rounds, marks[-1])
        rates, own = self.settings(LEARNING_RATES[model], 15)
        tuning = losses(rates, own, 2 * data.seed)
        best = torch.stack([late(tuning, end).nan_to_num(math.inf).argmin() for end in ends])
        final = losses(rates[best], own[best], 2 * data.seed + 1)
        metrics = {
            loss_after(model): float(late(final, ends[0])[0]),
            loss_at_bytes(model): float(late(final, ends[1])[1]),
        }
        return metrics, [float(final[mark + 1][1]) if mark else math.log(10) for mark in marks[:-1]]

    def _rounds_within(self, budget: int, dim: int, kept: int) -> int:
        """Count the rounds whose messages fit in so many bytes a worker, the first one's whole message included."""
        message = self.compressor(kept).compress(torch.zeros(dim)).nbytes
        method = self.make(self.compressor(kept), 0.0)
        first = 4 * dim if isinstance(method.first().compressor, Identity) else message
        return 0 if budget < first else 1 + (budget - first) // message


def _claims() -> tuple[Claim, ...]:
    def claim(contender: str, beats: str, metric: str, margin: float, says: str) -> Claim:
        return Claim(contender, beats=beats, metric=metric, margin=margin, says=says)

    noisy, alike = distance_of(NOISY), distance_of(ALIKE)
    learning = [
        claim(OURS, rival, loss_after(model), 0.0, f"{model} after equal rounds: EControl beats {words}")
        for model in HIDDEN
        for rival, words in ((EC, "error feedback"), (EF, "EF21"), (SGDM, "EF21-SGDM"))
    ]
    return (
        claim(OURS, SGD, noisy, -math.log10(1.3), f"{NOISY}: at most 1.3 times the distance of uncompressed SGD"),
        claim(OURS, EC, noisy, 0.0, f"{NOISY}: EControl beats error feedback"),
        claim(OURS, EF, noisy, math.log10(4), f"{NOISY}: a quarter of EF21's distance or less"),
        claim(OURS, SGDM, noisy, 0.0, f"{NOISY}: EControl beats EF21-SGDM"),
        *(
            claim(OURS, EC, distance_of(name), 10.0, f"{name}, no noise: error feedback stalls, EControl does not")
            for name in (EXACT, FAR)
        ),
        claim(OURS, CSGD, distance_of(EXACT), 10.0, f"{EXACT}, no noise: compression without memory stalls"),
        claim(OURS, SGD, CROWD_EXPONENT, -0.1, "the distance falls with the number of workers as SGD's does"),
        claim(EC, OURS, alike, 0.0, f"{ALIKE}: error feedback is the better choice"),
        *learning,
        *(
            claim(OURS, SGD, loss_at_bytes(model), 0.0, f"{model} at equal bytes: EControl beats uncompressed SGD")
            for model in HIDDEN
        ),
    )


study = Study(
    method="econtrol",
    problem=problem,
    contenders={
        SGD: Exchange(lambda compressor, own: NaiveCompression(compressor), compressed=False),
        CSGD: Exchange(lambda compressor, own: NaiveCompression(compressor)),
        EC: Exchange(lambda compressor, own: ErrorFeedback(compressor)),
        EF: Exchange(lambda compressor, own: EF21(compressor)),
        SGDM: Exchange(lambda compressor, own: EF21SGDM(compressor, momentum=own), values=(0.7, 0.9, 0.97)),
        OURS: Exchange(lambda compressor, own: EControl(compressor, eta=own), values=(0.03, 0.1, 0.3)),
    },
    metrics=(
        *(Metric(distance_of(name), "lower is better") for name in (NOISY, EXACT, FAR, ALIKE)),
        Metric(CROWD_EXPONENT, "lower is better"),
        *(Metric(loss_after(model), "lower is better", "nats") for model in HIDDEN),
        *(Metric(loss_at_bytes(model), "lower is better", "nats") for model in HIDDEN),
    ),
    claims=_claims(),
    seeds=5,
    about="Ten workers, top-k messages: quadratics whose minimisers differ; digits dealt out by label, unevenly.",
    notes=(
        "Every contender tries 21 settings on the quadratics and 15 on the digits, chosen on noise and batches of "
        "their own: learning rates in one range, a third as many where the method has a second setting (EControl's "
        "fraction, the momentum of EF21-SGDM). Distances are averaged over the last tenth of 2000 rounds, losses of "
        "all digits, learnt on, over ten rounds. How distance falls with 2, 8 and 32 workers is measured at one "
        "learning rate. EControl, EF21 and EF21-SGDM start with a whole message, which is counted: at equal bytes it "
        "costs them about ten rounds. The quadratics are of the kind usual in the field; none of the paper's numbers, "
        "nor its networks on CIFAR-10, is reproduced."
    ),
)
