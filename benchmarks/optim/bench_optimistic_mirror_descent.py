"""A step of mirror descent against torch's own adaptive optimizers, and the ensemble against a loop over learners."""

import pytest
import torch
from torch import nn

from benchmarks.timing import paired_ratio
from minimand import optim
from minimand.optim import EnsembleMirrorDescent, OptimisticMirrorDescent
from minimand.projections import Ball


def network(width):
    """Return the weights of a network of three layers, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


# SGD keeps no state: a figure, not a target. Adagrad keeps one vector and takes no norm; mirror descent keeps three,
# takes two norms and accounts for its regret.
PEERS = {
    "SGD": (lambda weights: torch.optim.SGD(weights, lr=1e-6, foreach=True), None),
    "Adagrad": (lambda weights: torch.optim.Adagrad(weights, lr=1e-6, foreach=True), 3.0),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("width", "inner"), [(32, 50), (700, 2)])
def test_a_step_costs_what_adaptive_optimizers_cost(record, peer, width, inner):
    build, limit = PEERS[peer]
    ours, theirs = OptimisticMirrorDescent(network(width), 1e-3), build(network(width))
    ratio = paired_ratio(ours.step, theirs.step, inner=inner)
    size = sum(weight.numel() for weight in network(width))
    name = f"mirror descent, step of {size:,} parameters"
    target = "" if limit is None else f"<= {limit}"
    record(f"{name}, against {peer} (foreach)", ratio.median, unit="x", target=target)
    record(f"{name}, ours", 1 / ratio.ours_seconds, unit="steps/s")
    if limit is not None:
        assert ratio.median <= limit


@pytest.mark.parametrize(("dim", "inner"), [(10, 10), (10_000, 4)])
def test_an_ensemble_is_faster_than_a_loop_over_its_learners(record, dim, inner):
    settings = {"horizon": 4000, "smoothness": 1.0, "grad_bound": 2.8}
    weight = nn.Parameter(torch.zeros(dim))
    weight.grad = torch.full((dim,), dim**-0.5)
    ensemble = EnsembleMirrorDescent([weight], domain=Ball(1.0), **settings)
    sizes = optim.ensemble_step_sizes(diameter=2.0, **settings)
    alone = []
    for _ in sizes:
        copy = nn.Parameter(torch.zeros(dim))
        copy.grad = weight.grad.clone()
        alone.append(OptimisticMirrorDescent([copy], domain=Ball(1.0), grad_bound=2.8))

    def loop():
        for optimizer in alone:
            optimizer.step()

    ratio = paired_ratio(ensemble.step, loop, inner=inner)
    name = f"ensemble of {len(sizes)} learners, {dim:,} parameters, against a loop over them without weights"
    record(name, ratio.median, unit="x", target="<= 1")
    assert ratio.median <= 1
