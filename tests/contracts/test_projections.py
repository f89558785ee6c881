"""What every projection keeps: a row each, and one that has none fails."""

import inspect

import pytest
import torch

from minimand import constraints
from minimand.constraints import Projection

# How to build it, and how far a second application may move a point: 0 but for those that only come near their set.
PROJECTIONS = {
    "Ball": (lambda: constraints.Ball(0.7), 1e-6),
    "Box": (lambda: constraints.Box(-0.2, 0.3), 1e-6),
    "Simplex": (lambda: constraints.Simplex(), 1e-6),
    "SpectralHammer": (lambda: constraints.SpectralHammer(20.0), 1e-5),
    "SpectralHardCap": (lambda: constraints.SpectralHardCap(1.0), 0.05),
    "SpectralNormalize": (lambda: constraints.SpectralNormalize(1.0), 1e-5),
    "SpectralSoftCap": (lambda: constraints.SpectralSoftCap(1.0), 1e-3),
    "SpectralWeightDecay": (lambda: constraints.SpectralWeightDecay(0.1), 1e-6),
    "Stiefel": (lambda: constraints.Stiefel(1.0), 1e-6),
}


def exported():
    return [
        name
        for name in constraints.__all__
        if inspect.isclass(part := getattr(constraints, name))
        and issubclass(part, Projection)
        and not inspect.isabstract(part)
    ]


def matrix(dtype=torch.float32, scale=3.0):
    return (scale * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def test_every_projection_has_a_row():
    assert set(exported()) == set(PROJECTIONS)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_projection_keeps_shape_and_dtype_and_leaves_its_input(name, dtype):
    point = matrix(dtype)
    before = point.clone()
    found = PROJECTIONS[name][0]()(point, lr=0.01)
    assert found.shape == point.shape
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    assert torch.equal(point, before)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projected_point_stays(name):
    build, tolerance = PROJECTIONS[name]
    once = build()(matrix(torch.float64))
    assert torch.allclose(build()(once), once, rtol=0, atol=tolerance)


@pytest.mark.untyped
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_projection_refuses_what_is_not_finite(name, bad):
    point = matrix()
    point[1, 1] = bad
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        PROJECTIONS[name][0]()(point)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_constrained_optimizer_holds_it_after_every_step(name):
    build, tolerance = PROJECTIONS[name]
    weight = torch.nn.Parameter(matrix(torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    handle = constraints.constrain(optimizer, build(), params=[weight])
    for step in range(3):
        weight.grad = matrix(torch.float64) * (-1) ** step
        optimizer.step()
        assert torch.allclose(build()(weight.detach()), weight, rtol=0, atol=tolerance)
    handle.remove()
    held = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.allclose(weight, held - 0.01)
