"""Muon against its own bound, and against torch's (Jordan et al. 2024; Newhouse et al. 2025)."""

import copy
import math

import pytest
import torch
from torch import nn

from minimand.constraints import SpectralHardCap, SpectralSoftCap, orthogonalize, rms_operator_norm
from minimand.optim import Muon


def parameter(*shape, seed=0, dtype=torch.float32, scale=0.1):
    return nn.Parameter(scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def gradients(shape, kind, step, weight):
    """Gradients of low and full rank, and those that push outward the most."""
    generator = torch.Generator().manual_seed(step)
    if kind == "outward":
        return -weight.detach().clone()
    if kind == "rank one":
        return torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(12, 12), (24, 6), (6, 24)])
@pytest.mark.parametrize("kind", ["full rank", "rank one", "outward"])
@pytest.mark.parametrize(("share", "decay"), [(0.02, 0.0), (0.1, 0.1), (0.3, 0.0)])
def test_no_step_with_the_soft_cap_leaves_the_bound(shape, kind, share, decay):
    bound = 1.5
    weight = parameter(*shape)
    optimizer = Muon([weight], share * bound, weight_decay=decay, projection=SpectralSoftCap(bound))
    largest = 0.0
    for step in range(150):
        weight.grad = gradients(shape, kind, step, weight)
        optimizer.step()
        largest = max(largest, float(rms_operator_norm(weight.detach())))
    assert largest <= bound * (1 + 1e-4)
    if kind == "outward":
        assert largest > 0.95 * bound  # the cap is reached, so the test means something


@pytest.mark.parametrize("start", [0.01, 3.0])
def test_with_weight_decay_alone_the_norm_stays_below_its_reciprocal(start):
    weight = parameter(8, 8, scale=1.0)
    weight.data *= start / float(rms_operator_norm(weight.detach()))
    optimizer = Muon([weight], 0.1, weight_decay=0.5)
    for step in range(200):
        weight.grad = gradients((8, 8), "outward" if step % 2 else "full rank", step, weight)
        optimizer.step()
        assert rms_operator_norm(weight.detach()) <= max(start, 1 / 0.5) * (1 + 1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_those_of_the_formula(nesterov):
    weight = parameter(6, 4, dtype=torch.float64)
    w, momentum = weight.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    optimizer = Muon([weight], 0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.3)
    for step in range(5):
        gradient = gradients((6, 4), "full rank", step, weight).double()
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.8 * momentum + 0.2 * gradient
        direction = 0.8 * momentum + 0.2 * gradient if nesterov else momentum
        w = (1 - 0.1 * 0.3) * w - 0.1 * math.sqrt(6 / 4) * orthogonalize(direction)
        assert torch.allclose(weight, w, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is in torch 2.9 and later")
@pytest.mark.parametrize("nesterov", [False, True])
def test_its_direction_is_torchs_up_to_the_polynomial(nesterov):
    ours, theirs = (parameter(24, 8) for _ in range(2))
    mine = Muon([ours], 0.1, momentum=0.9, nesterov=nesterov)
    peer = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.0, adjust_lr_fn="original", eps=1e-7
    )
    for step in range(4):
        before = theirs.detach().clone()
        ours.data.copy_(before)
        ours.grad = gradients((24, 8), "full rank", step, ours)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
        # torch's five steps in bfloat16 leave singular values in [0.7, 1.2]: the same directions, so equal once all are 1.
        update = (before - theirs.detach()) / (0.1 * math.sqrt(24 / 8))
        mined = (before - ours.detach()) / (0.1 * math.sqrt(24 / 8))
        assert torch.allclose(orthogonalize(update, num_steps=8), orthogonalize(mined, num_steps=8), atol=0.03)


def test_weights_of_one_shape_step_as_if_alone():
    together = [parameter(6, 4, seed=seed) for seed in range(3)] + [parameter(4, 6)]
    alone = copy.deepcopy(together)
    optimizers = [Muon(together, 0.1), *[Muon([weight], 0.1) for weight in alone]]
    for step in range(3):
        for number, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = gradients(one.shape, "full rank", 10 * step + number, one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_kernel_steps_as_the_matrix_of_its_channels():
    kernel, matrix = parameter(4, 3, 2, 2), parameter(4, 3, 2, 2)
    matrix = nn.Parameter(matrix.detach().flatten(1))
    kernel.grad = gradients((4, 12), "full rank", 0, matrix).view(4, 3, 2, 2)
    matrix.grad = kernel.grad.flatten(1).clone()
    for weight in (kernel, matrix):
        Muon([weight], 0.1, projection=SpectralHardCap(0.2, exact=True)).step()
    assert torch.allclose(kernel.flatten(1), matrix)


def test_computing_in_bfloat16_never_lengthens_a_step():
    weight = nn.Parameter(torch.zeros(48, 48))
    weight.grad = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    Muon([weight], 0.1, compute_dtype=torch.bfloat16).step()
    assert 0.09 < rms_operator_norm(weight.detach()) <= 0.1


def test_a_copy_keeps_the_projection():
    weight = parameter(4, 4, scale=0.0)
    optimizer = copy.deepcopy(Muon([weight], 0.1, projection=SpectralSoftCap(0.4)))
    (held,) = optimizer.param_groups[0]["params"]
    for _ in range(10):
        held.grad = -torch.eye(4)
        optimizer.step()
    assert rms_operator_norm(held.detach()) <= 0.4 * (1 + 1e-4)


@pytest.mark.untyped
def test_what_it_cannot_step_is_refused():
    with pytest.raises(
        ValueError, match=r"at least two dimensions, got shape \(3,\): give gains and biases to another"
    ):
        Muon([nn.Parameter(torch.ones(3))], 0.1)
    with pytest.raises(TypeError, match="projection must be a minimand Projection"):
        Muon([parameter(3, 3)], 0.1, projection=lambda weight: weight)
    with pytest.raises(ValueError, match="momentum"):
        Muon([parameter(3, 3)], 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0"):
        Muon([parameter(3, 3)], -0.1)
    weight = parameter(3, 3)
    weight.grad = torch.full((3, 3), float("nan"))
    with pytest.raises(ValueError, match="the gradient contains NaN"):
        Muon([weight], 0.1).step()
