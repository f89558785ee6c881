"""Do SAF and MESA find flatter minima that generalise better than SGD's, and how near do they come to SAM?

scikit-learn's digits with training labels replaced at random: a network wide enough to memorise them all, SGD with
momentum, a cosine schedule. Flatness is the top eigenvalue of the Hessian of the training cross-entropy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..bench import Claim, Metric, Study
from ..bench.classification import Split, TrainClassifier
from ..bench.tuning import UnderConditions
from ..bounds import top_hessian_eigenvalue
from ..losses import MESALoss, SAFLoss
from ..optim import SAM
from ..training import Recipe, mlp
from . import digits

SOME, MANY, NONE = "20 % random labels", "40 % random labels", "no random labels"


def problem(source: Any, seed: int) -> dict[str, Split]:
    """Return the digits under the three conditions."""
    # A label replaced by any class keeps its true one in a tenth of the cases.
    rates = {SOME: 0.2, MANY: 0.4, NONE: 0.0}
    return {name: digits.noisy(seed, uniform=0.9 * rate, train=800) for name, rate in rates.items()}


def wide_mlp(features: int, classes: int) -> nn.Module:
    """Build a network that can memorise the training set."""
    return mlp(features, classes, hidden=(256, 256))


def cross_entropy(classes: int) -> nn.Module:
    """Build cross-entropy."""
    return nn.CrossEntropyLoss()


def saf(classes: int, *, strength: float) -> nn.Module:
    """Build SAF with the released settings."""
    return SAFLoss(num_classes=classes, strength=strength)


def mesa(classes: int, *, decay: float) -> nn.Module:
    """Build MESA with the released settings but for the decay: its memory should be some epochs of 12 steps long."""
    return MESALoss(decay=decay)


def flatness(model: nn.Module, loss: Any, data: Split) -> dict[str, float]:
    """Measure the curvature of the training loss, the same for all contenders: plain cross-entropy."""
    batch = data.train_inputs, data.train_target
    return {"top Hessian eigenvalue": top_hessian_eigenvalue(model, nn.CrossEntropyLoss(), batch, tolerance=1e-2)}


SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
RECIPE = functools.partial(Recipe, epochs=60, batch_size=64, lr=0.1, weight_decay=5e-4)


def contender(make_loss: Any, *, sam_radius: float | None = None) -> UnderConditions:
    """Train with SGD, or with SAM around it."""
    optimizer = "sgd" if sam_radius is None else functools.partial(SAM, base=SGD, radius=sam_radius)
    recipe = RECIPE(optimizer=optimizer)
    return UnderConditions(TrainClassifier(make_loss, make_model=wide_mlp, recipe=recipe, measure=flatness))


study = Study(
    method="saf",
    problem=problem,
    contenders={
        "SGD": contender(cross_entropy),
        "SAM, radius 0.05": contender(cross_entropy, sam_radius=0.05),
        "SAM, radius 0.2": contender(cross_entropy, sam_radius=0.2),
        "SAF, strength 0.3": contender(functools.partial(saf, strength=0.3)),
        "SAF, strength 1": contender(functools.partial(saf, strength=1.0)),
        "MESA, decay 0.98": contender(functools.partial(mesa, decay=0.98)),
        "MESA, decay 0.995": contender(functools.partial(mesa, decay=0.995)),
    },
    metrics=(
        *(Metric(f"accuracy, {name}", unit="%") for name in (SOME, MANY, NONE)),
        *(Metric(f"top Hessian eigenvalue, {name}", "lower is better") for name in (SOME, MANY, NONE)),
    ),
    claims=(
        Claim(
            "SAF, strength 1",
            beats="SGD",
            metric=f"accuracy, {SOME}",
            margin=0.03,
            says="with 20 % random labels, SAF beats SGD by more than 3 points",
        ),
        Claim(
            "MESA, decay 0.995",
            beats="SGD",
            metric=f"accuracy, {SOME}",
            margin=0.03,
            says="with 20 % random labels, MESA beats SGD by more than 3 points",
        ),
        Claim(
            "SAF, strength 1",
            beats="SGD",
            metric=f"top Hessian eigenvalue, {SOME}",
            says="SAF's minima are flatter than SGD's",
        ),
        Claim(
            "MESA, decay 0.995",
            beats="SGD",
            metric=f"top Hessian eigenvalue, {SOME}",
            says="MESA's minima are flatter than SGD's",
        ),
        Claim(
            "SAF, strength 0.3",
            beats="SAM, radius 0.05",
            metric=f"accuracy, {SOME}",
            margin=-0.01,
            says="with their default settings, SAF is at most 1 point worse than SAM",
        ),
        Claim(
            "SAF, strength 1",
            beats="SAM, radius 0.2",
            metric=f"accuracy, {SOME}",
            margin=-0.01,
            says="with stronger settings, SAF is at most 1 point worse than SAM",
        ),
        Claim(
            "MESA, decay 0.995",
            beats="SAM, radius 0.2",
            metric=f"accuracy, {MANY}",
            margin=-0.01,
            says="with 40 % random labels, MESA is at most 1 point worse than SAM",
        ),
        Claim(
            "SAF, strength 1",
            beats="SGD",
            metric=f"accuracy, {NONE}",
            margin=-0.01,
            says="on clean labels SAF is at most 1 point worse than SGD",
        ),
    ),
    seeds=10,
    test_train_ratio=997 / 800,
    about="scikit-learn digits, 800 training and 997 test images, training labels replaced at random.",
    notes=(
        "Nothing is tuned per cell: each method runs with its default strength and with a stronger one, at SGD's own "
        "learning rate and schedule. The paper's networks are larger and its labels clean; random labels make the "
        "difference between minima visible at this size. The term raises the training loss on labels that are not "
        "learnt, so flatness is read beside accuracy, not instead of it."
    ),
)
