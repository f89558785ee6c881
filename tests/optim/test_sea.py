"""The stochastically extended adversary: noise and drift are what the stream says, and regret is to the best point."""

import math

import pytest
import torch

from minimand import optim
from minimand.optim import MirrorState, SEAStream
from minimand.projections import Ball, Box, Simplex

STREAMS = {
    "fixed": lambda noise: SEAStream.fixed(200, streams=500, dim=4, noise=noise),
    "blocks": lambda noise: SEAStream.blocks(200, block=7, streams=500, dim=4, noise=noise),
    "alternating": lambda noise: SEAStream.blocks(200, block=1, streams=500, dim=4, noise=noise),
    "corrupted": lambda noise: SEAStream.corrupted(200, share=0.1, streams=500, dim=4, noise=noise),
    "rotating": lambda noise: SEAStream.rotating(200, angle=0.1, streams=500, dim=4, noise=noise),
}


def test_drift_is_that_of_its_closed_form():
    assert float(SEAStream.fixed(100).cumulative_variation) == 0
    assert float(SEAStream.blocks(100, block=20).cumulative_variation) == pytest.approx(4 * 4)
    assert float(SEAStream.blocks(100, block=1).cumulative_variation) == pytest.approx(4 * 99)
    chord = 2 * 0.8 * math.sin(0.05)
    assert float(SEAStream.rotating(100, angle=0.1).cumulative_variation) == pytest.approx(99 * chord**2)
    corrupted = SEAStream.corrupted(100, share=0.1, dim=3)
    turned = (corrupted.means @ corrupted.means[0]).sign()
    assert float(corrupted.cumulative_variation) == pytest.approx(4 * float((turned.diff() != 0).sum()))
    assert float(corrupted.cumulative_variation) > 0


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_noise_and_drift_measured_from_gradients_are_the_exact_ones(kind, noise):
    stream = STREAMS[kind](noise)
    point = torch.full((500, 4), 0.3, dtype=torch.float64)
    gradients = torch.stack([stream.gradient(t, point) for t in range(200)])
    variance, variation = optim.measure_sea(gradients)
    assert float(variance) == pytest.approx(float(stream.cumulative_variance), rel=0.01, abs=1e-12)
    assert float(variation) == pytest.approx(float(stream.cumulative_variation), rel=0.05, abs=0.15 * noise**2)


def test_the_variance_of_a_stream_is_rounds_times_sigma_squared():
    stream = SEAStream.fixed(50, noise=0.5, streams=3)
    assert float(stream.cumulative_variance) == pytest.approx(50 * 0.25)
    assert torch.allclose(stream.noise.square().sum(-1), torch.tensor(0.25, dtype=torch.float64))


@pytest.mark.parametrize("kind", STREAMS)
def test_gradients_are_those_of_the_losses(kind):
    stream = STREAMS[kind](0.0)
    point = torch.randn(500, 4, dtype=torch.float64, requires_grad=True)
    stream.mean_losses(point.expand(200, 500, 4))[17].sum().backward()
    assert torch.allclose(point.grad, stream.gradient(17, point.detach()))


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("domain", [Ball(0.7), Box(-0.3, 0.5), Simplex()], ids=repr)
def test_regret_is_to_the_best_of_all_points(kind, domain):
    """No point drawn at random has less loss, fixed or in a round, and some come close."""
    stream = STREAMS[kind](0.0)
    drawn = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if isinstance(domain, Ball):
        candidates = 0.7 * torch.nn.functional.normalize(drawn, dim=-1) * torch.rand(500, 1, dtype=torch.float64) ** 0.1
    else:
        candidates = domain(drawn)
    regrets = stream.regret(candidates.expand(200, 500, 4), domain=domain)
    assert float(regrets.min()) >= -1e-9
    dynamic = stream.dynamic_regret(candidates.expand(200, 500, 4), domain=domain)
    assert bool((dynamic >= regrets - 1e-9).all())
    best = stream._best(stream.means, domain)
    assert torch.allclose(domain(best) if not isinstance(domain, Ball) else best, best)
    assert torch.allclose(
        stream.dynamic_regret(best[:, None].expand(200, 500, 4), domain=domain), torch.zeros(500, dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", ["fixed", "blocks", "alternating", "corrupted"])
@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_expected_variation_is_noise_twice_and_drift_once_and_bounds_the_regret(kind, noise):
    """For linear losses E V_T = E |g_1|^2 + Sigma^2 + 2 sigma^2, and E regret is at most 3/2 D sqrt(4 G^2 + E V_T)."""
    stream = STREAMS[kind](noise)
    state, points = MirrorState.at(torch.zeros(500, 4, dtype=torch.float64)), []
    for t in range(200):
        points.append(state.point)
        gradient = stream.gradient(t, state.point)
        state = optim.optimistic_step(state, gradient, diameter=2.0, domain=Ball(1.0), grad_bound=1 + noise)
    expected = 1 + noise**2 + float(stream.cumulative_variation) + 2 * noise**2 * 199
    assert float(state.variation.mean()) == pytest.approx(expected, rel=0.01)
    regret = float(stream.regret(torch.stack(points), domain=Ball(1.0)).mean())
    assert regret <= 3 * math.sqrt(4 * (1 + noise) ** 2 + expected)


def test_the_same_seed_draws_the_same_stream():
    one, two, other = (SEAStream.fixed(5, noise=1.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.noise, two.noise)
    assert not torch.equal(one.noise, other.noise)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("match", "build"),
    [
        ("rounds must be an integer", lambda: SEAStream.fixed(0)),
        ("block must be an integer", lambda: SEAStream.blocks(10, block=0)),
        ("share must lie", lambda: SEAStream.corrupted(10, share=1.5)),
        ("noise_level must be", lambda: SEAStream.fixed(10, noise=-1.0)),
        ("dim must be at least 2", lambda: SEAStream.rotating(10, angle=0.1, dim=1)),
        ("means must have shape", lambda: SEAStream(torch.zeros(3, 2), torch.zeros(4, 1, 2), 0.0)),
        ("at least two draws", lambda: optim.measure_sea(torch.zeros(3, 1, 2))),
        ("domain must be", lambda: SEAStream.fixed(10).regret(torch.zeros(10, 1, 10), domain=None)),
    ],
)
def test_mistakes_are_told_at_once(match, build):
    with pytest.raises((ValueError, TypeError), match=match):
        build()
