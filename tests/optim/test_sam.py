"""SAM against its first-order formula (Foret et al. 2021)."""

import copy
import functools

import pytest
import torch
from torch import nn

from minimand.optim import SAM
from minimand.training import Recipe, fit, mlp, seeded

F64 = torch.float64
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = functools.partial(torch.optim.AdamW, lr=0.01)


def quadratic():
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    return root @ root.T


def problem(make, seed=0, dtype=torch.float32):
    """A model, its optimizer and a closure over fixed data."""
    model = seeded(lambda: mlp(6, 3, hidden=(8,)), seed).to(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 6, generator=generator).to(dtype)
    target = torch.randint(3, (20,), generator=generator)
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(inputs), target)
        value.backward()
        return value

    return model, optimizer, closure


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_a_step_uses_the_gradient_at_the_end_of_the_normalised_ascent_of_a_quadratic():
    curvature = quadratic()
    weight = nn.Parameter(torch.linspace(-1, 2, 5, dtype=F64))
    start = weight.detach().clone()
    optimizer = SAM([weight], functools.partial(torch.optim.SGD, lr=0.1), radius=0.3)

    def closure():
        optimizer.zero_grad()
        value = 0.5 * weight @ curvature @ weight
        value.backward()
        return value

    value = optimizer.step(closure)
    gradient = curvature @ start
    ascended = start + 0.3 * gradient / gradient.norm()
    torch.testing.assert_close(weight.detach(), start - 0.1 * curvature @ ascended, rtol=0, atol=1e-12)
    assert value.item() == pytest.approx((0.5 * start @ gradient).item())


def test_an_adaptive_step_measures_the_ball_by_each_weight():
    curvature = quadratic()
    weight = nn.Parameter(torch.linspace(-1, 2, 5, dtype=F64))
    start = weight.detach().clone()
    optimizer = SAM([weight], functools.partial(torch.optim.SGD, lr=0.1), radius=0.3, adaptive=True)

    def closure():
        optimizer.zero_grad()
        value = 0.5 * weight @ curvature @ weight
        value.backward()
        return value

    optimizer.step(closure)
    gradient = curvature @ start
    move = 0.3 * start**2 * gradient / (start.abs() * gradient).norm()
    assert (move / start).norm().item() == pytest.approx(0.3)
    torch.testing.assert_close(weight.detach(), start - 0.1 * curvature @ (start + move), rtol=0, atol=1e-12)


def test_the_norm_is_taken_over_all_parameters_and_the_radius_of_each_group():
    first, second = nn.Parameter(torch.tensor([3.0], dtype=F64)), nn.Parameter(torch.tensor([4.0], dtype=F64))
    seen = []
    optimizer = SAM(
        [{"params": [first]}, {"params": [second], "radius": 1.0}],
        functools.partial(torch.optim.SGD, lr=0.0),
        radius=0.5,
    )

    def closure():
        optimizer.zero_grad()
        seen.append((first.item(), second.item()))
        value = 0.5 * (first.square() + second.square()).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert seen[0] == (3.0, 4.0)
    assert seen[1] == pytest.approx((3.0 + 0.5 * 3 / 5, 4.0 + 1.0 * 4 / 5))


@pytest.mark.parametrize("base", [SGD, ADAM])
def test_radius_zero_is_the_base_optimizer(base):
    model, optimizer, closure = problem(lambda params: SAM(params, base, radius=0.0))
    plain, other, plain_closure = problem(base)
    for _ in range(5):
        optimizer.step(closure)
        other.step(plain_closure)
    assert torch.equal(flat(model), flat(plain))


def test_weights_return_exactly_to_where_they_were():
    model, optimizer, closure = problem(
        lambda params: SAM(params, functools.partial(torch.optim.SGD, lr=0.0), radius=7.0)
    )
    before = flat(model)
    optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_weights_return_when_the_second_pass_fails():
    model, optimizer, closure = problem(lambda params: SAM(params, SGD, radius=1.0))
    before, calls = flat(model), []

    def failing():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert torch.equal(flat(model), before)


def test_a_stationary_point_stays():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = SAM([weight], functools.partial(torch.optim.SGD, lr=0.1), radius=0.5)

    def closure():
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.equal(weight.detach(), torch.zeros(3))


@pytest.mark.parametrize("base", [SGD, ADAM])
def test_training_goes_on_from_its_state_dict_as_if_it_had_not_stopped(base):
    model, optimizer, closure = problem(lambda params: SAM(params, base, radius=0.2))
    for _ in range(3):
        optimizer.step(closure)
    resumed, other, other_closure = problem(lambda params: SAM(params, base, radius=9.0), seed=5)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["radius"] == 0.2
    for _ in range(3):
        optimizer.step(closure)
        other.step(other_closure)
    assert torch.equal(flat(model), flat(resumed))


def test_a_learning_rate_schedule_reaches_the_base_optimizer():
    _, optimizer, closure = problem(lambda params: SAM(params, SGD))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(closure)
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_group_added_later_is_trained():
    _, optimizer, closure = problem(lambda params: SAM(params, SGD))
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})

    def both():
        value = closure() + late.square().sum()
        late.square().sum().backward()
        return value

    optimizer.step(both)
    assert (late.detach() < 1).all()


def test_fit_trains_with_it():
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(96, 6, generator=generator), torch.randint(3, (96,), generator=generator)
    ours, plain = (seeded(lambda: mlp(6, 3, hidden=(8,)), 0) for _ in range(2))
    recipe = functools.partial(Recipe, epochs=2, batch_size=32)
    fit(
        ours,
        nn.CrossEntropyLoss(),
        inputs,
        target,
        recipe=recipe(optimizer=functools.partial(SAM, base=SGD, radius=0.0)),
    )
    fit(plain, nn.CrossEntropyLoss(), inputs, target, recipe=recipe(optimizer=SGD))
    assert torch.equal(flat(ours), flat(plain))


def test_weights_without_a_gradient_stay_where_they_are():
    frozen, weight = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SAM([frozen, weight], functools.partial(torch.optim.SGD, lr=0.1))

    def closure():
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.equal(frozen.detach(), torch.ones(2))
    assert (weight.detach() < 1).all()


def test_misuse_is_refused():
    _, optimizer, _ = problem(lambda params: SAM(params, SGD))
    with pytest.raises(ValueError, match="closure is required"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure must call backward"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="radius must be"):
        SAM([nn.Parameter(torch.ones(1))], SGD, radius=-1.0)
    with pytest.raises(TypeError, match=r"base must make a torch\.optim\.Optimizer"):
        SAM([nn.Parameter(torch.ones(1))], lambda params: None)
