"""Does weighing a reward by the agreement of two generations make a diffusion model follow its conditions better?

Two small conditional diffusion models are fine-tuned on a reward network that saw few images. One paints maps of
rectangles, whose class at each pixel is the condition, and is judged by a network that saw many images; one draws
scikit-learn's handwritten digits from their edges, and is judged by the edges themselves. In the third part, linear
models are fitted to readings of known noise.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..bench import Claim, Metric, Outcome, Run, Study
from ..preferences import (
    CtrlUReward,
    UncertaintyTerms,
    UncertaintyWeightedLoss,
    one_step_x0,
    paired_timesteps,
)
from ..training import Recipe, fit, seeded
from . import digits

MAPS = Metric("oracle mIoU, rectangles", unit="%")
EDGES = Metric("edge error, digits", "lower is better")
QUALITY = Metric("Fréchet distance to real digits", "lower is better")
READ_MAPS = Metric("mIoU as the reward network reads it", unit="%")
READ_EDGES = Metric("edge error as the reward network reads it", "lower is better")
NOISY = Metric("parameter error, noisy readings", "lower is better")
SKEW = Metric("pull towards easy conditions", "lower is better")
METRICS = (MAPS, EDGES, QUALITY, READ_MAPS, READ_EDGES, NOISY, SKEW)

TIMES = 1000
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES), 0)
WINDOW, RATE, STEPS, BATCH, SAMPLING_STEPS = (0, 400), 5e-4, 200, 16, 30
CLASSES, SIDE = 4, 12
COLOURS = torch.tensor([[-0.7, -0.7, -0.7], [0.7, -0.3, -0.3], [-0.3, 0.7, -0.3], [-0.3, -0.3, 0.7]])


@dataclasses.dataclass(frozen=True)
class World:
    """Images, a denoiser pretrained on them and the network that rewards.

    Args:
        images: Training images in [-1, 1].
        target: What the reward network reads: the class of each pixel, or the strength of its edge.
        condition: What the denoiser is told of ``target``.
        denoiser: ``(noisy, times, condition) -> noise``, pretrained; contenders fine-tune a copy.
        network: The reward network.
        criterion: Its loss, pixel by pixel.
        divergence: How two of its readings are compared.
        penalty: The price of their uncertainty.
        reward_scale: The factor of the reward.
        test_target: What to generate images for.
        score: Metrics of generated images.
    """

    images: Tensor
    target: Tensor
    condition: Callable[[Tensor], Tensor]
    denoiser: nn.Module
    network: nn.Module
    criterion: nn.Module
    divergence: Literal["kl", "l1"]
    penalty: float
    reward_scale: float
    test_target: Tensor
    score: Callable[[Tensor], dict[str, float]]


class TimeFeatures(nn.Module):
    """Sines and cosines of the time, through a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """Embed ``(batch,)`` times."""
        angles = times[:, None] / TIMES * math.pi * 2.0 ** torch.arange(4)
        return self.body(torch.cat([angles.sin(), angles.cos()], 1))


class Denoiser(nn.Module):
    """Four convolutions that predict the noise of an image from it, its time and its condition."""

    def __init__(self, channels: int, conditions: int, width: int = 16) -> None:
        super().__init__()
        self.times = TimeFeatures(width)
        self.enter = nn.Conv2d(channels + conditions, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Predict the noise."""
        hidden = (self.enter(torch.cat([noisy, condition], 1)) + self.times(times)[..., None, None]).relu()
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        return self.leave(hidden)


def pixel_reader(channels: int, outputs: int, width: int) -> nn.Module:
    """Build a network that reads something off each pixel and those around it."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, outputs, 1),
    )


def faint_classes(target: Tensor) -> Tensor:
    """Return one-hot classes of height 0.3, ``(batch, classes, *)``."""
    return 0.3 * functional.one_hot(target, CLASSES).float().movedim(-1, 1)


def edges(images: Tensor) -> Tensor:
    """Return the strength of each pixel's edge by Sobel's filters, 1 at the strongest there can be."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gradients = functional.conv2d(
        functional.pad(images, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None]
    )
    return torch.linalg.vector_norm(gradients, dim=1, keepdim=True) / (8 * math.sqrt(2))


def draw_maps(count: int, generator: torch.Generator) -> Tensor:
    """Draw maps of three rectangles on a ground, ``(count, 12, 12)`` classes."""
    maps, line = torch.zeros(count, SIDE, SIDE, dtype=torch.long), torch.arange(SIDE)
    for _ in range(3):
        start = torch.randint(0, SIDE - 3, (count, 2, 1), generator=generator)
        length = torch.randint(3, SIDE // 2 + 2, (count, 2, 1), generator=generator)
        kind = torch.randint(1, CLASSES, (count, 1, 1), generator=generator)
        inside = (line >= start) & (line < start + length)
        maps = torch.where(inside[:, 0, :, None] & inside[:, 1, None, :], kind, maps)
    return maps


def paint(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Paint maps: the colour of each class differs from image to image, and every pixel is noisy."""
    colours = COLOURS + 0.4 * torch.randn(len(maps), CLASSES, 3, generator=generator)
    images = torch.gather(colours, 1, maps.flatten(1)[..., None].expand(-1, -1, 3)).movedim(1, -1)
    images = images.reshape(len(maps), 3, SIDE, SIDE)
    return (images + 0.15 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def add_noise(images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Diffuse images to their times."""
    alpha_bar = ALPHA_BAR[times].reshape(-1, *[1] * (images.dim() - 1))
    return alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise


def taught(
    make: Callable[[], nn.Module], loss: nn.Module, images: Tensor, target: Tensor, seed: int, *, epochs: int
) -> nn.Module:
    """Train a network that reads conditions back."""
    network = seeded(make, seed)
    fit(network, loss, images, target, recipe=Recipe(epochs=epochs, batch_size=20, lr=3e-3), seed=seed)
    return network


def pretrain(world: World, seed: int, *, steps: int, batch: int = 32) -> None:
    """Train the world's denoiser by the diffusion loss alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(world.denoiser.parameters(), lr=2e-3, fused=True)
    for _ in range(steps):
        index = torch.randint(len(world.images), (batch,), generator=generator)
        images, condition = world.images[index], world.condition(world.target[index])
        times = torch.randint(TIMES, (batch,), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        optimizer.zero_grad()
        functional.mse_loss(world.denoiser(add_noise(images, noise, times), times, condition), noise).backward()
        optimizer.step()


@functools.lru_cache(maxsize=16)
def rectangles(seed: int) -> World:
    """Make a world of painted maps; its reward network saw 20 of them, the one that judges 1,000."""
    run = Run(seed)
    generator = torch.Generator().manual_seed(run.stream("maps"))
    maps = draw_maps(1_000, generator)
    images, test_maps = paint(maps, generator), draw_maps(150, generator)
    teach = functools.partial(taught, loss=nn.CrossEntropyLoss())
    network = teach(
        lambda: pixel_reader(3, CLASSES, 16),
        images=images[:20],
        target=maps[:20],
        seed=run.stream("reward"),
        epochs=200,
    )
    judge = teach(lambda: pixel_reader(3, CLASSES, 24), images=images, target=maps, seed=run.stream("judge"), epochs=10)

    @torch.no_grad()
    def score(found: Tensor) -> dict[str, float]:
        return {
            metric.name: mean_iou(each(found).argmax(1), test_maps)
            for metric, each in ((MAPS, judge), (READ_MAPS, network))
        }

    world = World(
        images=images,
        target=maps,
        condition=faint_classes,
        denoiser=seeded(lambda: Denoiser(3, CLASSES), run.stream("denoiser")),
        network=network,
        criterion=nn.CrossEntropyLoss(reduction="none"),
        divergence="kl",
        penalty=1.0,
        reward_scale=1.0,
        test_target=test_maps,
        score=score,
    )
    pretrain(world, run.stream("pretraining"), steps=400)
    return world


@functools.lru_cache(maxsize=16)
def handwriting(seed: int) -> World:
    """Make a world of digits to be drawn from their edges; its reward network saw ten of them."""
    run, split = Run(seed), digits.random_split(seed)
    images, held_out = (2 * part.reshape(-1, 1, 8, 8) - 1 for part in (split.train_inputs, split.test_inputs))
    strength, test_strength = edges(images), edges(held_out)
    network = taught(
        lambda: pixel_reader(1, 1, 16), nn.MSELoss(), images[:10], strength[:10], run.stream("reward"), epochs=200
    )

    @torch.no_grad()
    def score(found: Tensor) -> dict[str, float]:
        wrong = {EDGES: edges(found) - test_strength, READ_EDGES: network(found) - test_strength}
        return {metric.name: float(error.square().mean().sqrt()) for metric, error in wrong.items()} | {
            QUALITY.name: frechet_distance(found.flatten(1), held_out.flatten(1))
        }

    world = World(
        images=images,
        target=strength,
        condition=lambda target: target,
        denoiser=seeded(lambda: Denoiser(1, 1), run.stream("denoiser")),
        network=network,
        criterion=nn.MSELoss(reduction="none"),
        divergence="l1",
        penalty=1.0,
        reward_scale=10.0,
        test_target=test_strength,
        score=score,
    )
    pretrain(world, run.stream("pretraining"), steps=800)
    return world


def problem(source: Any, seed: int) -> int:
    """Return the seed that the worlds of a cell follow from; they are made once and kept."""
    return seed


@torch.no_grad()
def generate(denoiser: nn.Module, condition: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Sample an image for each condition by DDIM, without noise of its own."""
    noisy = torch.randn(len(condition), *shape, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(TIMES - 1, 0, SAMPLING_STEPS).long()
    for now, after in itertools.pairwise(times):
        each = now.expand(len(condition))
        clean = one_step_x0(noisy, denoiser(noisy, each, condition), ALPHA_BAR[each]).clamp(-1, 1)
        noise = (noisy - ALPHA_BAR[now].sqrt() * clean) / (1 - ALPHA_BAR[now]).sqrt()
        noisy = add_noise(clean, noise, after.expand(len(condition)))
    last = times[-1].expand(len(condition))
    return one_step_x0(noisy, denoiser(noisy, last, condition), ALPHA_BAR[last]).clamp(-1, 1)


def mean_iou(found: Tensor, target: Tensor) -> float:
    """Return the intersection over union of each class, averaged over classes."""
    classes = torch.arange(CLASSES).reshape(-1, 1, 1, 1)
    both, either = (found == classes) & (target == classes), (found == classes) | (target == classes)
    return float((both.sum((1, 2, 3)) / either.sum((1, 2, 3)).clamp_min(1)).mean())


def frechet_distance(found: Tensor, real: Tensor) -> float:
    """Return the Fréchet distance of the Gaussians of two sets of rows: of their pixels, here."""
    found, real = found.double(), real.double()
    covariances = found.T.cov(), real.T.cov()
    # The eigenvalues of a product of covariances are real and at least 0, but for rounding.
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
    distance = (found.mean(0) - real.mean(0)).square().sum() + sum(each.trace() for each in covariances) - 2 * cross
    return float(distance)


class FineTune:
    """Fine-tune both worlds' denoisers on the diffusion loss of both generations, and on the reward.

    Args:
        make_weighting: Makes what weighs the reward by its two readings, given a divergence and a penalty; None leaves
            the reward out.
        gap: Steps of time between the two generations.
        times_scale: What the worlds' reward scales are multiplied by.
    """

    def __init__(
        self,
        make_weighting: Callable[..., UncertaintyWeightedLoss] | None,
        *,
        gap: int = 50,
        times_scale: float = 1.0,
    ) -> None:
        self.make_weighting = make_weighting
        self.gap = gap
        self.times_scale = times_scale

    def __call__(self, data: int, run: Run) -> Outcome:
        """Train and measure one cell."""
        metrics = dict.fromkeys((metric.name for metric in METRICS), math.nan)
        curves = {}
        for name, world in (("rectangles", rectangles(data)), ("digits", handwriting(data))):
            denoiser, curves[f"reward loss, {name}"] = self._train(world, run.stream(f"training, {name}"))
            condition = world.condition(world.test_target)
            metrics |= world.score(generate(denoiser, condition, world.images.shape[1:], run.stream(f"start, {name}")))
        return Outcome(metrics, curves)

    def _train(self, world: World, seed: int) -> tuple[nn.Module, list[float]]:
        generator, denoiser = torch.Generator().manual_seed(seed), copy.deepcopy(world.denoiser)
        objective = None
        if self.make_weighting is not None:
            objective = CtrlUReward(
                world.network,
                world.criterion,
                weighting=self.make_weighting(world.divergence, penalty=world.penalty),
                window=WINDOW,
                reward_scale=self.times_scale * world.reward_scale,
            )
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=RATE, fused=True)
        rewards = []
        for _ in range(STEPS):
            index = torch.randint(len(world.images), (BATCH,), generator=generator)
            images, target = world.images[index], world.target[index]
            times = paired_timesteps(torch.randint(TIMES, (BATCH,), generator=generator), gap=self.gap)
            noise = torch.cat(2 * [torch.randn(images.shape, generator=generator)])
            noisy = add_noise(torch.cat(2 * [images]), noise, times)
            predicted = denoiser(noisy, times, torch.cat(2 * [world.condition(target)]))
            loss = functional.mse_loss(predicted, noise)
            if objective is not None:
                generated = one_step_x0(noisy, predicted, ALPHA_BAR[times]).clamp(-1, 1)
                terms = objective(generated, target, timesteps=times)
                loss = loss + terms.loss
                rewards.append(terms.reward)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return denoiser, torch.stack(rewards).unflatten(0, (-1, 10)).mean(1).tolist() if rewards else []


class PenaltyOnly(UncertaintyWeightedLoss):
    """Ctrl-U's penalty on disagreement without its weight, to tell what each of them does."""

    def terms(
        self, prediction1: Tensor, prediction2: Tensor, loss1: Tensor, loss2: Tensor | None = None, **context: Any
    ) -> UncertaintyTerms:
        """Compute the two terms of each example."""
        weighted = super().terms(prediction1, prediction2, loss1, loss2, **context)
        return UncertaintyTerms(loss1.flatten(1).mean(1), weighted.uncertainty)


def without_penalty(divergence: Literal["kl", "l1"], *, penalty: float, **settings: Any) -> UncertaintyWeightedLoss:
    """Make Ctrl-U's weight without its penalty, whatever that is."""
    return UncertaintyWeightedLoss(divergence, penalty=0.0, **settings)


FITS, CONDITIONS, FEATURES = 50, 400, 5
EASY, HARD = 0.1, 3.0


class FitReadings:
    """Fit a linear generator to conditions that are read back with noise: little on half of them, much on the rest.

    Args:
        weighting: How two readings weigh the squared error, or None for the inverse of the noise's true variance.
    """

    def __init__(self, weighting: UncertaintyWeightedLoss | None) -> None:
        self.weighting = weighting

    def __call__(self, data: int, run: Run) -> Outcome:
        """Fit fifty generators and measure one cell."""
        generator = torch.Generator().manual_seed(Run(data).stream("readings"))
        truth, inputs, deviation, noise = (
            torch.randn(FITS, 1, FEATURES, generator=generator, dtype=torch.float64),
            torch.randn(FITS, CONDITIONS, FEATURES, generator=generator, dtype=torch.float64),
            torch.where(torch.arange(CONDITIONS) < CONDITIONS // 2, EASY, HARD).double(),
            torch.randn(2, FITS, CONDITIONS, generator=generator, dtype=torch.float64),
        )
        metrics = dict.fromkeys((metric.name for metric in METRICS), math.nan)
        fitted = self._fit(inputs, (inputs * truth).sum(-1), deviation, noise)
        metrics[NOISY.name] = float((fitted - truth[:, 0]).square().mean().sqrt())
        # The hard conditions follow a law of their own: no linear generator suits both halves.
        shift = 0.5 * torch.where(torch.arange(CONDITIONS) < CONDITIONS // 2, -1.0, 1.0).double()[:, None]
        fitted = self._fit(inputs, (inputs * (truth + shift)).sum(-1), deviation, noise)
        metrics[SKEW.name] = float((truth[:, 0] - fitted).mean())
        return Outcome(metrics)

    def _loss(self, readings: Tensor, target: Tensor, deviation: Tensor) -> Tensor:
        errors = (readings[0] - target).square()
        if self.weighting is None:
            return (errors / deviation.square()).mean()
        return self.weighting(readings[0], readings[1], errors)

    def _fit(self, inputs: Tensor, target: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
        slope = torch.zeros(FITS, FEATURES, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([slope], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self._loss((inputs * slope[:, None]).sum(-1) + deviation * noise, target, deviation)
            value.backward()
            return value

        optimizer.step(closure)
        return slope.detach()


def _claim(contender: str, beats: str, metric: Metric, says: str, margin: float = 0.0) -> Claim:
    return Claim(contender, beats=beats, metric=metric.name, margin=margin, says=says)


def _both(contender: str, beats: str, says: str, margin: float = 0.0) -> tuple[Claim, Claim]:
    return (
        _claim(contender, beats, MAPS, f"rectangles: {says}", margin),
        _claim(contender, beats, EDGES, f"digits: {says}"),
    )


plain = functools.partial(UncertaintyWeightedLoss, scale=0.0)

study = Study(
    method="ctrl-u",
    problem=problem,
    contenders={
        "diffusion only": FineTune(None),
        "plain reward": FineTune(plain),
        "plain reward, both generations": FineTune(functools.partial(plain, symmetric=True)),
        "plain reward, twice the scale": FineTune(plain, times_scale=2.0),
        "weight only": FineTune(without_penalty),
        "weight only, detached": FineTune(functools.partial(without_penalty, detach_weight=True)),
        "penalty only": FineTune(PenaltyOnly),
        "ctrl-u, gap 1": FineTune(UncertaintyWeightedLoss, gap=1),
        "ctrl-u, gap 10": FineTune(UncertaintyWeightedLoss, gap=10),
        "ctrl-u, gap 50": FineTune(UncertaintyWeightedLoss),
        "ctrl-u, gap 100": FineTune(UncertaintyWeightedLoss, gap=100),
        "ctrl-u, gap 50, a tenth of U": FineTune(functools.partial(UncertaintyWeightedLoss, scale=0.1)),
        "ctrl-u, gap 50, symmetric": FineTune(functools.partial(UncertaintyWeightedLoss, symmetric=True)),
        "ctrl-u, gap 50, twice the scale": FineTune(UncertaintyWeightedLoss, times_scale=2.0),
        "readings: plain": FitReadings(UncertaintyWeightedLoss("l1", scale=0.0)),
        "readings: inverse variance": FitReadings(None),
        "readings: ctrl-u": FitReadings(UncertaintyWeightedLoss("l1")),
    },
    metrics=METRICS,
    claims=(
        *_both("ctrl-u, gap 50", "plain reward", "Ctrl-U, 50 steps apart, beats the plain reward", 0.01),
        *_both("ctrl-u, gap 1", "plain reward", "Ctrl-U, one step apart, beats the plain reward"),
        *_both("ctrl-u, gap 50", "ctrl-u, gap 1", "50 steps apart beat one"),
        *_both(
            "ctrl-u, gap 50, symmetric",
            "plain reward, both generations",
            "the symmetric form beats the plain reward of both generations",
        ),
        *_both(
            "ctrl-u, gap 50, twice the scale",
            "plain reward, twice the scale",
            "at twice the reward's scale Ctrl-U beats the plain reward",
        ),
        *_both("ctrl-u, gap 50", "penalty only", "the weight adds to what the penalty does"),
        *_both("ctrl-u, gap 50", "weight only", "the penalty adds to what the weight does"),
        _claim("ctrl-u, gap 50", "plain reward", QUALITY, "digits: Ctrl-U's images are closer to real ones"),
        *_both("plain reward", "diffusion only", "the reward itself helps", 0.05),
        _claim("readings: ctrl-u", "readings: plain", NOISY, "readings of uneven noise: the weights lower the error"),
        _claim("readings: inverse variance", "readings: ctrl-u", NOISY, "and the true variances lower it further"),
        _claim("readings: plain", "readings: ctrl-u", SKEW, "the price: weights pull towards easy conditions"),
    ),
    seeds=5,
    about="Small diffusion models of painted maps and of scikit-learn's digits are fine-tuned on an ignorant reward.",
    notes=(
        "Every contender pays for two generations a step and learns the diffusion loss from both, 200 steps of 16 "
        "conditions; rewarded are times up to 400. The scale of the reward is that at which the plain reward did best "
        "on worlds of other seeds (out of 0.5, 1, 2 and 4 for rectangles; 1, 3, 10, 30 and 100 for digits); Ctrl-U was "
        "given the same. The penalty is 1 for rectangles, a tenth of the reward's scale for digits, as in the official "
        "code for edges. Both networks are far smaller than the paper's, none of whose figures is reproduced. Readings "
        "are fitted exactly; there the penalty is a constant, so it makes no difference."
    ),
)
