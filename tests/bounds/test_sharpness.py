"""Sharpness and the top Hessian eigenvalue against losses whose curvature is known."""

import itertools
import math

import pytest
import torch
from torch import nn

from minimand.bounds import sharpness, top_hessian_eigenvalue
from minimand.training import mlp, seeded

F64 = torch.float64
SPECTRUM = [-9.0, -1.0, 0.0, 0.5, 2.0, 4.0, 4.1]


class Weights(nn.Module):
    """A model whose output is its weights."""

    def __init__(self, values):
        super().__init__()
        self.first = nn.Parameter(values[:2].clone())
        self.rest = nn.Parameter(values[2:].clone())

    def forward(self, inputs):
        return torch.cat([self.first, self.rest])


def quadratic(spectrum):
    """A symmetric matrix of that spectrum."""
    size = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=F64))
    return basis @ torch.diag(torch.tensor(spectrum, dtype=F64)) @ basis.T


def bowl(matrix):
    return lambda weights, _: 0.5 * weights @ matrix @ weights


EMPTY = (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))


@pytest.mark.parametrize("spectrum", [SPECTRUM, [1.0, 2.0, 3.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 7.0]])
def test_top_eigenvalue_of_a_quadratic_is_the_largest_of_its_spectrum_even_beside_a_larger_negative_one(spectrum):
    model = Weights(torch.linspace(-1, 1, len(spectrum), dtype=F64))
    found = top_hessian_eigenvalue(model, bowl(quadratic(spectrum)), EMPTY, tolerance=1e-8)
    assert found == pytest.approx(max(spectrum), abs=1e-6)


def test_top_eigenvalue_of_a_network_is_that_of_its_full_hessian():
    model = seeded(lambda: mlp(4, 3, hidden=(5,)), 0).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(30, 4, generator=generator, dtype=F64)
    target = torch.randint(3, (30,), generator=generator)
    names = [name for name, _ in model.named_parameters()]
    sizes = [weight.numel() for weight in model.parameters()]
    shapes = [weight.shape for weight in model.parameters()]

    def loss(flat):
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        scores = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (inputs,))
        return nn.functional.cross_entropy(scores, target)

    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat))[-1].item()
    found = top_hessian_eigenvalue(model, nn.CrossEntropyLoss(), (inputs, target), tolerance=1e-6)
    assert found == pytest.approx(expected, rel=1e-5)


def test_top_eigenvalue_of_one_weight_is_its_second_derivative():
    model = nn.Linear(1, 1, bias=False).double()
    batch = torch.full((1, 1), 3.0, dtype=F64), torch.zeros(1, 1, dtype=F64)
    assert top_hessian_eigenvalue(model, nn.MSELoss(), batch) == pytest.approx(18.0)


def test_a_linear_loss_has_no_curvature_and_rises_by_radius_times_slope():
    slope = torch.tensor([3.0, 0.0, -4.0, 12.0], dtype=F64)
    model = Weights(torch.ones(4, dtype=F64))

    def plane(weights, _):
        return slope @ weights

    assert top_hessian_eigenvalue(model, plane, EMPTY) == 0
    for steps in (1, 5):
        assert sharpness(model, plane, EMPTY, radius=0.7, steps=steps) == pytest.approx(0.7 * 13.0, abs=1e-12)


def test_sharpness_of_a_round_bowl_is_the_rise_along_its_radius():
    start = torch.linspace(-1, 2, 6, dtype=F64)
    found = sharpness(Weights(start), lambda weights, _: 1.5 * weights.square().sum(), EMPTY, radius=0.3)
    assert found == pytest.approx(1.5 * (2 * 0.3 * start.norm().item() + 0.09), abs=1e-12)


def test_sharpness_near_a_minimum_is_half_the_top_eigenvalue_times_the_radius_squared():
    matrix = quadratic([0.1, 0.5, 1.0, 4.0])
    found = sharpness(Weights(torch.full((4,), 1e-9, dtype=F64)), bowl(matrix), EMPTY, radius=0.2, steps=40)
    assert found == pytest.approx(0.5 * 4.0 * 0.04, rel=1e-6)


def test_more_steps_never_find_less():
    matrix = quadratic([0.1, 0.5, 3.9, 4.0])
    model = Weights(torch.tensor([0.1, 0.2, -0.1, 0.05], dtype=F64))
    found = [sharpness(model, bowl(matrix), EMPTY, radius=0.3, steps=steps) for steps in range(1, 9)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] > found[0]


def test_the_best_point_counts_where_later_steps_overshoot():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    found = sharpness(model, lambda weights, _: weights.sum().sin(), (EMPTY[0][None], EMPTY[1]), radius=2.0, steps=2)
    assert found == pytest.approx(math.sin(2.0))


def test_sharpness_at_a_maximum_is_zero():
    model = Weights(torch.zeros(4, dtype=F64))
    assert sharpness(model, lambda weights, _: -weights.square().sum(), EMPTY) == 0.0


def test_frozen_weights_do_not_count():
    model = Weights(torch.ones(4, dtype=F64))
    model.first.requires_grad_(False)
    scale = torch.tensor([100.0, 100.0, 1.0, 2.0], dtype=F64)
    found = top_hessian_eigenvalue(model, lambda weights, _: 0.5 * (scale * weights.square()).sum(), EMPTY)
    assert found == pytest.approx(2.0)


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.randn(8, 3), torch.randint(2, (8,))
    assert math.isfinite(sharpness(model, nn.CrossEntropyLoss(), batch))
    assert math.isfinite(top_hessian_eigenvalue(model, nn.CrossEntropyLoss(), batch))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.untyped
def test_misuse_is_refused():
    model = Weights(torch.ones(4, dtype=F64))
    with pytest.raises(ValueError, match="radius must be"):
        sharpness(model, bowl(torch.eye(4, dtype=F64)), EMPTY, radius=0.0)
    with pytest.raises(ValueError, match="steps must be"):
        sharpness(model, bowl(torch.eye(4, dtype=F64)), EMPTY, steps=0)
    with pytest.raises(ValueError, match="tolerance must be"):
        top_hessian_eigenvalue(model, bowl(torch.eye(4, dtype=F64)), EMPTY, tolerance=0.0)
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        sharpness(model, lambda weights, _: weights, EMPTY)
    with pytest.raises(ValueError, match="loss_fn returned nan"):
        top_hessian_eigenvalue(model, lambda weights, _: weights.sum() * math.nan, EMPTY)
    with pytest.raises(ValueError, match="no parameter"):
        sharpness(model.requires_grad_(False), bowl(torch.eye(4, dtype=F64)), EMPTY)
