"""The smooth adversarial comp-sum loss, its attack, TRADES and PGD against their mathematics."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimand.losses import (
    SmoothAdversarialCompSumLoss,
    comp_sum_loss,
    pgd_attack,
    smooth_adversarial_comp_sum_loss,
    trades_loss,
)
from minimand.losses.pgd import Ball

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(features=6, classes=5, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def linear(classes, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(6, classes).double()


def data(rows=12, features=6, classes=5, seed=1):
    generator = seeded(seed)
    inputs = torch.rand(rows, features, generator=generator, dtype=F64)
    return inputs, torch.randint(classes, (rows,), generator=generator)


def phi(u, tau):
    return torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def margins_of_wrong_classes(scores, target):
    """The paper's margin vector, of width one less than the classes."""
    wrong = F.one_hot(target, scores.shape[1]) == 0
    gaps = scores.gather(1, target[:, None]) - scores
    return gaps[wrong].reshape(len(scores), -1)


def movement(model, moved, inputs, target):
    return margins_of_wrong_classes(model(moved), target) - margins_of_wrong_classes(model(inputs), target)


def distances(moved, inputs, norm):
    shift = (moved - inputs).flatten(1)
    return shift.abs().amax(1) if norm == "linf" else shift.norm(dim=1)


def loss_with(**settings):
    return SmoothAdversarialCompSumLoss(**{"eps": 0.1, "generator": seeded(), **settings})


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_loss_is_comp_sum_of_scaled_scores_plus_the_distance_of_margin_vectors(tau):
    model = network()
    inputs, target = data()
    clean, moved = model(inputs), model(inputs + 0.1)
    vectors = [margins_of_wrong_classes(scores, target) for scores in (clean, moved)]
    expected = phi((-vectors[0] / 0.3).exp().sum(1), tau) + 0.7 * (vectors[1] - vectors[0]).norm(dim=1)
    losses = smooth_adversarial_comp_sum_loss(clean, moved, target, tau=tau, rho=0.3, nu=0.7, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("rho", [0.3, 1.0, 2.0])
def test_smooth_loss_dominates_the_worst_case_ramp_loss_at_every_point(tau, rho):
    generator = seeded(3)
    for seed, scale in itertools.product(range(10), (0.3, 3.0)):
        model = network(seed=seed)
        inputs, target = data(rows=40, seed=seed)
        candidates = inputs + scale * torch.randn(inputs.shape, generator=generator, dtype=F64)
        clean, moved = scale * model(inputs), scale * model(candidates)
        ramp = (1 - margins_of_wrong_classes(moved, target) / rho).clamp(0, 1)
        smooth = smooth_adversarial_comp_sum_loss(
            clean, moved, target, tau=tau, rho=rho, nu=math.sqrt(4) / rho, reduction="none"
        )
        ideal = phi(ramp.sum(1), tau)
        assert (smooth >= ideal - 1e-10).all()
        # Hence it is at least phi(1) times the adversarial zero-one loss.
        wrong = (moved.argmax(1) != target).to(F64)
        assert (smooth >= phi(torch.tensor(1.0, dtype=F64), tau) * wrong - 1e-10).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_loss_is_the_plain_comp_sum_loss_in_a_ball_of_radius_zero(norm):
    model = network()
    inputs, target = data()
    loss = loss_with(eps=0.0, tau=1.4, rho=0.3, norm=norm)
    value = loss(model, inputs, target)
    torch.testing.assert_close(value, comp_sum_loss(model(inputs), target, tau=1.4, rho=0.3), rtol=0, atol=1e-12)
    value.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_attack_finds_the_supremum_of_a_linear_model_in_the_maximum_norm():
    model = linear(2)
    inputs, target = data(classes=2)
    moved = loss_with(clip=None).attack(model, inputs, target)
    found = movement(model, moved, inputs, target).norm(dim=1)
    difference = model.weight[0] - model.weight[1]
    torch.testing.assert_close(found, (0.1 * difference.abs().sum()).expand(12), rtol=0, atol=1e-5)


def test_attack_finds_the_supremum_of_a_linear_model_in_the_euclidean_norm():
    model = linear(2)
    inputs, target = data(classes=2)
    moved = loss_with(clip=None, norm="l2", steps=20, step_size=1.0).attack(model, inputs, target)
    found = movement(model, moved, inputs, target).norm(dim=1)
    expected = 0.1 * (model.weight[0] - model.weight[1]).norm()
    torch.testing.assert_close(found, expected.expand(12), rtol=0, atol=1e-5)


def test_attack_comes_close_to_the_best_vertex_of_a_linear_model_with_many_classes():
    model = linear(5)
    inputs, target = data()
    gaps = model.weight[target][:, None] - model.weight  # the margin vector's Jacobian
    vertices = 0.1 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=F64)
    supremum = torch.einsum("bkf,vf->bvk", gaps, vertices).norm(dim=2).amax(1)
    found = torch.zeros(12, dtype=F64)
    loss = loss_with(clip=None, steps=20)
    for _ in range(5):
        moved = loss.attack(model, inputs, target)
        shift = movement(model, moved, inputs, target)
        assert (shift.norm(dim=1) <= supremum + 1e-10).all()
        found = torch.maximum(found, shift.norm(dim=1))
    torch.testing.assert_close(found, supremum, rtol=0.02, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None])
def test_attacks_stay_in_the_ball_and_in_the_valid_range(norm, clip):
    model = network()
    inputs, target = data()
    for moved in (
        loss_with(eps=0.3, norm=norm, clip=clip).attack(model, inputs, target),
        pgd_attack(model, inputs, target, eps=0.3, norm=norm, clip=clip, generator=seeded()),
    ):
        assert not moved.requires_grad
        assert (distances(moved, inputs, norm) <= 0.3 + 1e-12).all()
        if clip is not None:
            assert ((moved >= 0) & (moved <= 1)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm):
    centre = torch.zeros(20000, 2, dtype=F64)
    starts = Ball(0.5, norm, None).draw(centre, seeded())
    radii = distances(starts, centre, norm)
    assert (radii <= 0.5).all()
    # In two dimensions half of the ball lies within 1/sqrt(2) of its radius.
    inside = (radii <= 0.5 / math.sqrt(2)).to(F64).mean().item()
    assert inside == pytest.approx(0.5, abs=0.015)
    torch.testing.assert_close(starts.mean(0), torch.zeros(2, dtype=F64), rtol=0, atol=0.01)


def test_projection_gives_the_nearest_point_of_the_euclidean_ball():
    moved, centre = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.zeros(2, 2)
    torch.testing.assert_close(Ball(1.0, "l2", None).project(moved, centre), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


@pytest.mark.parametrize("reach", ["attack", "pgd", "trades"])
def test_attacks_leave_the_model_as_it_was(reach):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5)).double()
    model.train()
    model[1].eval()  # one module's own mode differs from the whole's
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, target = data()
    if reach == "attack":
        loss_with().attack(model, inputs, target)
    elif reach == "pgd":
        pgd_attack(model, inputs, target, eps=0.1, steps=3)
    else:
        trades_loss(model, inputs, target, eps=0.1, steps=3)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_models_modes_are_restored_though_it_fails():
    class Failing(nn.Module):
        def forward(self, inputs):
            raise RuntimeError("no")

    model = Failing()
    inputs, target = data()
    with pytest.raises(RuntimeError, match="no"):
        loss_with().attack(model, inputs, target)
    assert model.training


def test_attack_works_where_gradients_are_switched_off():
    model = network()
    inputs, target = data()
    expected = pgd_attack(model, inputs, target, eps=0.1, generator=seeded())
    with torch.no_grad():
        moved = pgd_attack(model, inputs, target, eps=0.1, generator=seeded())
    assert torch.equal(moved, expected)


def test_gradient_flows_through_both_the_clean_and_the_moved_scores():
    clean = torch.tensor([[1.0, 0.0, 0.5]], dtype=F64, requires_grad=True)
    moved = torch.tensor([[0.2, 0.1, 0.9]], dtype=F64, requires_grad=True)
    target = torch.tensor([0])

    def value(clean, moved):
        return smooth_adversarial_comp_sum_loss(clean, moved, target, tau=1.3, rho=0.4, nu=0.7)

    assert torch.autograd.gradcheck(value, (clean, moved))
    value(clean, moved).backward()
    assert (moved.grad != 0).any()
    plain = torch.autograd.grad(comp_sum_loss(clean, target, tau=1.3, rho=0.4), clean)[0]
    # The penalty sees the clean scores with the opposite sign.
    torch.testing.assert_close(clean.grad - plain, -moved.grad)


def test_the_same_generator_seed_gives_the_same_attack_and_another_seed_another():
    model = network()
    inputs, target = data()
    first, again, other = (
        loss_with(generator=seeded(seed), steps=2).attack(model, inputs, target) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_penalty_ignores_a_constant_added_to_all_moved_scores():
    model = network()
    inputs, target = data()
    clean = model(inputs)
    torch.testing.assert_close(
        smooth_adversarial_comp_sum_loss(clean, clean + 3.0, target), F.cross_entropy(clean, target)
    )


@pytest.mark.parametrize("objective", ["cross-entropy", "margin"])
def test_pgd_finds_an_error_of_a_linear_model_exactly_where_one_exists(objective):
    model = linear(2)
    inputs, _ = data(rows=200, classes=2)
    inputs = inputs - 0.5
    target = model(inputs).argmax(1)
    scores = model(inputs)
    lead = margins_of_wrong_classes(scores, target)[:, 0]
    reach = 0.2 * (model.weight[0] - model.weight[1]).abs().sum()
    moved = pgd_attack(model, inputs, target, eps=0.2, clip=None, objective=objective, generator=seeded())
    assert 20 < (lead < reach).sum() < 180
    assert torch.equal(model(moved).argmax(1) != target, lead < reach)


def test_pgd_is_never_weaker_than_its_input_and_more_restarts_never_hurt():
    model = network()
    inputs, target = data(rows=50)

    def lead(moved):
        scores = model(moved)
        return -margins_of_wrong_classes(scores, target).amin(1)

    once = pgd_attack(model, inputs, target, eps=0.05, steps=3, generator=seeded())
    thrice = pgd_attack(model, inputs, target, eps=0.05, steps=3, restarts=3, generator=seeded())
    assert (lead(once) >= lead(inputs)).all()
    assert (lead(thrice) >= lead(once)).all()
    assert (lead(thrice) > lead(once)).any()


def test_trades_is_cross_entropy_plus_beta_times_the_divergence():
    model = network()
    inputs, target = data()
    plain = F.cross_entropy(model(inputs), target, reduction="none")
    torch.testing.assert_close(trades_loss(model, inputs, target, eps=0.1, beta=0.0, reduction="none"), plain)
    torch.testing.assert_close(trades_loss(model, inputs, target, eps=0.0, reduction="none"), plain)

    def penalty(beta):
        return trades_loss(model, inputs, target, eps=0.1, beta=beta, generator=seeded(), reduction="none") - plain

    torch.testing.assert_close(penalty(6.0), 6 * penalty(1.0))


def test_trades_ends_at_a_vertex_where_the_divergence_of_a_linear_model_peaks():
    model = linear(2)
    inputs, target = data(classes=2)
    vertex = 0.5 * (model.weight[0] - model.weight[1]).sign()
    p = torch.softmax(model(inputs), 1)
    peaks = torch.stack(
        [(p * (p.log() - torch.log_softmax(model(inputs + sign * vertex), 1))).sum(1) for sign in (-1, 1)]
    )
    loss = trades_loss(
        model, inputs, target, eps=0.5, beta=1.0, clip=None, steps=20, generator=seeded(), reduction="none"
    )
    found = loss - F.cross_entropy(model(inputs), target, reduction="none")
    torch.testing.assert_close((found - peaks).abs().amin(0), torch.zeros(12, dtype=F64), rtol=0, atol=1e-10)
    assert (peaks[0] - peaks[1]).abs().max() > 1e-4


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loss_with(eps=-0.1), "eps must be a finite number of at least 0, got -0.1"),
        (lambda: loss_with(tau=-1.0), "tau"),
        (lambda: loss_with(rho=0.0), "rho"),
        (lambda: loss_with(nu=-1.0), "nu"),
        (lambda: loss_with(norm="l1"), "norm must be one of 'linf', 'l2', got 'l1'"),
        (lambda: loss_with(steps=0), "steps must be at least 1, got 0"),
        (lambda: loss_with(step_size=0.0), "step_size"),
        (lambda: loss_with(clip=(1.0, 0.0)), "clip"),
        (lambda: loss_with(reduction="median"), "reduction"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.untyped
def test_bad_batches_are_refused():
    model, loss = network(), loss_with()
    inputs, target = data()
    with pytest.raises(ValueError, match=r"inputs must lie in clip's range \[0.0, 1.0\]"):
        loss(model, inputs + 1, target)
    with pytest.raises(ValueError, match="inputs contains NaN"):
        loss(model, inputs * float("nan"), target)
    with pytest.raises(ValueError, match="target must hold class indices"):
        loss(model, inputs, target + 5)
    with pytest.raises(ValueError, match="inputs is empty"):
        loss(model, inputs[:0], target[:0])
    with pytest.raises(TypeError, match="inputs must have a floating-point dtype"):
        loss(model, inputs.long(), target)
    with pytest.raises(ValueError, match="restarts must be at least 1"):
        pgd_attack(model, inputs, target, eps=0.1, restarts=0)
    with pytest.raises(ValueError, match="beta"):
        trades_loss(model, inputs, target, eps=0.1, beta=-1.0)
