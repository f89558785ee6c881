"""Measures against their definitions written plainly, the noise search draw by draw, elimination system by system."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.bounds import generalization_measures, noise_tolerance, solve_over_field
from minimand.training import mlp, seeded

NAMES = [
    *("l2_norm", "inverse_margin", "log_spectral_product", "log_spectral_main", "frobenius_over_spectral"),
    *("log_frobenius_product", "path_norm", "path_norm_over_margin"),
]


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def case(name):
    make, shape = {
        "mlp": (lambda: mlp(64, 10, hidden=(512, 512)), (300, 64)),
        "cnn": (cnn, (64, 3, 16, 16)),
        "small mlp": (lambda: mlp(10, 2, hidden=(64,)), (96, 10)),
    }[name]
    model = seeded(make, 0).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, inputs, model(inputs).argmax(1)


@torch.no_grad()
def plainly(model, inputs, target):
    """The same measures, each norm from a full singular value decomposition."""
    weights = [value.flatten(1) for name, value in model.named_parameters() if "weight" in name]
    spectral = torch.stack([torch.linalg.svd(weight).S.max() ** 2 for weight in weights])
    frobenius = torch.stack([weight.norm() ** 2 for weight in weights])
    scores = model(inputs)
    correct = scores[torch.arange(len(target)), target]
    scores[torch.arange(len(target)), target] = -math.inf
    margin = (correct - scores.max(1).values).kthvalue(len(target) // 10).values
    squared = copy.deepcopy(model)
    for parameter in squared.parameters():
        parameter.pow_(2)
    paths = squared(torch.ones_like(inputs[:1])).sum()
    product, ratio = spectral.log().sum(), (frobenius / spectral).sum()
    main = product - 2 * margin.log() + ratio.log()
    return [
        frobenius.sum().sqrt(),
        1 / margin**2,
        product,
        main,
        ratio,
        frobenius.log().sum(),
        paths,
        paths / margin**2,
    ]


@torch.no_grad()
def draw_by_draw(model, inputs, target, searches=15, draws=10):
    """Bisection with a copy of the model for every draw."""
    right = (model(inputs).argmax(1) == target).float().mean()
    low, high = 0.0, 2.0
    for _ in range(searches):
        sigma = (low + high) / 2
        found = []
        for _ in range(draws):
            noisy = copy.deepcopy(model)
            for parameter in noisy.parameters():
                parameter.add_(torch.randn_like(parameter) * sigma)
            found.append((noisy(inputs).argmax(1) == target).float().mean())
        drop = right - torch.stack(found).mean()
        low, high = (low, sigma) if drop > 0.1 else (sigma, high)
    return low


def system_by_system(matrix, values, order):
    """Gaussian elimination with numpy rows, one system after the other."""
    solutions = np.zeros((len(matrix), matrix.shape[2]), dtype=np.int64)
    for place in range(len(matrix)):
        table = np.concatenate([matrix[place], values[place][:, None]], 1) % order
        rank, pivots = 0, []
        for column in range(matrix.shape[2]):
            candidates = np.nonzero(table[rank:, column])[0]
            if len(candidates) == 0:
                continue
            table[[rank, rank + candidates[0]]] = table[[rank + candidates[0], rank]]
            table[rank] = table[rank] * pow(int(table[rank, column]), -1, order) % order
            factors = table[:, column].copy()
            factors[rank] = 0
            table = (table - factors[:, None] * table[rank]) % order
            pivots.append(column)
            rank += 1
            if rank == len(table):
                break
        solutions[place, pivots] = table[:rank, -1]
    return solutions


@pytest.mark.parametrize(("name", "limit"), [("mlp", 0.5), ("cnn", 1.0)])
def test_measures_cost_less_than_their_definitions(record, name, limit):
    model, inputs, target = case(name)
    with torch.no_grad():
        ours = list(generalization_measures(model, inputs, target, names=NAMES).values())
        torch.testing.assert_close(torch.stack(ours), torch.stack(plainly(model, inputs, target)), rtol=1e-3, atol=0)

    @torch.no_grad()
    def measure():
        generalization_measures(model, inputs, target, names=NAMES)

    ratio = paired_ratio(measure, lambda: plainly(model, inputs, target))
    record(f"eight measures against their definitions, {name}", ratio.median, unit="x", target=f"<= {limit}")
    record(f"eight measures, {name}, ours", 1e3 * ratio.ours_seconds, unit="ms")
    # Both spend their time in the same forward pass where there is a convolution: room for the clock's noise.
    assert ratio.median <= 1.25 * limit


def test_the_noise_search_costs_less_than_draw_by_draw(record):
    model, inputs, target = case("small mlp")
    search = {"tolerance": 1e-9, "max_iter": 15}
    ratio = paired_ratio(
        lambda: noise_tolerance(model, inputs, target, **search), lambda: draw_by_draw(model, inputs, target)
    )
    record("noise search against draw by draw, small MLP", ratio.median, unit="x", target="<= 0.5")
    assert ratio.median <= 0.5


@pytest.mark.parametrize("order", [2, 5])
def test_batched_elimination_costs_a_fraction_of_a_loop(record, order):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(order, (500, 20, 60), generator=generator)
    values = torch.randint(order, (500, 20), generator=generator)
    ours = solve_over_field(matrix, values, order=order).solution
    theirs = system_by_system(matrix.numpy(), values.numpy(), order)
    assert (ours.numpy() == theirs).all()
    ratio = paired_ratio(
        lambda: solve_over_field(matrix, values, order=order),
        lambda: system_by_system(matrix.numpy(), values.numpy(), order),
        rounds=7,
    )
    record(f"elimination over {order} elements, 500 systems, against a loop", ratio.median, unit="x", target="<= 0.2")
    record(f"elimination over {order} elements, 500 systems, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert ratio.median <= 0.2
