"""What every optimizer keeps: it is a torch.optim.Optimizer in all that a training loop relies on."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from minimand import optim

# Name to ``build(params)``. ``params`` are weights of two dimensions, or groups of them.
OPTIMIZERS = {
    "SAM": lambda params: optim.SAM(params, functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    "Muon": lambda params: optim.Muon(params, lr=0.05, weight_decay=0.1),
    "EnsembleMirrorDescent": lambda params: optim.EnsembleMirrorDescent(
        params, 2.0, horizon=100, smoothness=1.0, grad_bound=2.0
    ),
    "OptimisticFTRL": lambda params: optim.OptimisticFTRL(params, 1.0),
    "OptimisticMirrorDescent": lambda params: optim.OptimisticMirrorDescent(params, 1.0, average=True),
}


def exported():
    return [
        name
        for name in optim.__all__
        if inspect.isclass(part := getattr(optim, name)) and issubclass(part, torch.optim.Optimizer)
    ]


def problem(dtype=torch.float32):
    """Return a small regression: a network without biases, and a closure for its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False)).to(dtype)
    inputs, target = torch.randn(16, 4).to(dtype), torch.randn(16, 2).to(dtype)
    return model, inputs, target


def closure_of(model, optimizer, inputs, target):
    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        return loss

    return closure


def run(name, steps, dtype=torch.float32, *, model=None, optimizer=None):
    fresh, inputs, target = problem(dtype)
    model = fresh if model is None else model
    optimizer = OPTIMIZERS[name](model.parameters()) if optimizer is None else optimizer
    losses = [float(optimizer.step(closure_of(model, optimizer, inputs, target))) for _ in range(steps)]
    return model, optimizer, losses


def test_every_optimizer_has_a_row():
    assert set(exported()) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_optimizer_lowers_the_loss_and_keeps_the_dtype(name, dtype):
    model, _, losses = run(name, 40, dtype)
    assert losses[-1] < losses[0]
    assert all(weight.dtype == dtype and torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_returns_what_the_closure_did(name):
    model, inputs, target = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = (model(inputs) - target).square().mean()
    assert torch.allclose(optimizer.step(closure_of(model, optimizer, inputs, target)), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_as_if_never_saved(name):
    model, optimizer, _ = run(name, 5)
    other, other_optimizer, _ = run(name, 0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(name, 5, model=model, optimizer=optimizer)
    run(name, 5, model=other, optimizer=other_optimizer)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_plain_enough_for_a_safe_checkpoint(name, tmp_path):
    _, optimizer, _ = run(name, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["param_groups"][0].keys() == optimizer.state_dict()["param_groups"][0].keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_of_its_own_learning_rate_zero_stays(name):
    model, _, _ = run(name, 0)
    first, second = model.parameters()
    optimizer = OPTIMIZERS[name]([{"params": [first]}, {"params": [second]}])
    optimizer.param_groups[1]["lr"] = 0.0
    held, moved = second.detach().clone(), first.detach().clone()
    run(name, 3, model=model, optimizer=optimizer)
    assert torch.equal(second, held)
    assert not torch.equal(first, moved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scheduler_drives_it(name):
    model, optimizer, _ = run(name, 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    _, inputs, target = problem()
    optimizer.step(closure_of(model, optimizer, inputs, target))
    scheduler.step()
    held = [weight.detach().clone() for weight in model.parameters()]
    optimizer.step(closure_of(model, optimizer, inputs, target))
    assert all(torch.equal(one, weight) for one, weight in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_without_gradient_stays(name):
    model, _, _ = run(name, 0)
    idle = nn.Parameter(torch.ones(3, 3))
    optimizer = OPTIMIZERS[name]([*model.parameters(), idle])
    run(name, 3, model=model, optimizer=optimizer)
    assert torch.equal(idle, torch.ones(3, 3))
