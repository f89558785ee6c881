"""scikit-learn's handwritten digits under label noise: the data of several studies."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..bench.classification import Split
from ..bench.label_noise import flip_to_next, flip_uniformly


@functools.cache
def load() -> tuple[Tensor, Tensor]:
    """Return 1,797 images of 8 x 8 pixels in [0, 1] and their digits."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)


def random_split(seed: int, *, train: int = 1200) -> Split:
    """Split the digits at random; labels are clean."""
    inputs, target = load()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(target)))
    first, rest = order[:train], order[train:]
    return Split(inputs[first], target[first], inputs[rest], target[rest], 10)


def noisy(seed: int, *, uniform: float = 0.0, to_next: float = 0.0, train: int = 1200) -> Split:
    """Split the digits and flip training labels, to any other class or to the next one; test labels stay clean."""
    clean = random_split(seed, train=train)
    labels = flip_uniformly(clean.train_target, uniform, 10, seed=2 * seed)
    labels = flip_to_next(labels, to_next, 10, seed=2 * seed + 1)
    return Split(clean.train_inputs, labels, clean.test_inputs, clean.test_target, 10)
