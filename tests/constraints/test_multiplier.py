"""The multiplier ends where the Karush-Kuhn-Tucker conditions hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimand.constraints import Multiplier, augmented_lagrangian

NUMBER = st.floats(-5, 5)


def solve(objective, violation, x, multiplier, *, steps=2000, lr=0.02):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (objective(x) + multiplier(violation(x))).backward()
        optimizer.step()
    return x.detach()


@given(violation=NUMBER, multiplier=st.floats(0, 5), damping=st.floats(0.01, 10))
def test_the_term_of_an_inequality_is_rockafellars_formula(violation, multiplier, damping):
    g, value = torch.tensor(violation, dtype=torch.float64), torch.tensor(multiplier, dtype=torch.float64)
    direct = ((value + damping * g).clamp_min(0).square() - value.square()) / (2 * damping)
    assert torch.allclose(augmented_lagrangian(g, value, damping=damping), direct, atol=1e-10)


@given(violation=NUMBER, multiplier=st.floats(0, 5), damping=st.floats(0, 10), equality=st.booleans())
def test_its_slope_is_the_multiplier_after_a_step_of_size_damping(violation, multiplier, damping, equality):
    g = torch.tensor(violation, dtype=torch.float64, requires_grad=True)
    augmented_lagrangian(
        g, torch.tensor(multiplier, dtype=torch.float64), damping=damping, equality=equality
    ).backward()
    moved = multiplier + damping * violation
    assert g.grad.item() == pytest.approx(moved if equality else max(moved, 0.0), abs=1e-9)


@given(violation=NUMBER, multiplier=st.floats(0, 5))
def test_without_damping_it_is_the_lagrangian(violation, multiplier):
    g, value = torch.tensor(violation), torch.tensor(multiplier)
    expected = value * g if multiplier > 0 else torch.tensor(0.0)
    assert torch.allclose(augmented_lagrangian(g, value), expected)
    assert torch.allclose(augmented_lagrangian(g, value, equality=True), value * g)


def test_an_inactive_constraint_keeps_multiplier_zero_and_the_unconstrained_minimum():
    multiplier = Multiplier(0.05, damping=1.0)
    x = solve(lambda x: (x - 2).square(), lambda x: x - 3, 0.0, multiplier)
    assert x.item() == pytest.approx(2.0, abs=1e-8)
    assert multiplier.value.item() == 0.0


def test_active_constraints_meet_their_bounds_with_the_multipliers_of_the_theory():
    """min |x - (2, 1)|^2 with x0 + x1 <= 2, x0 <= 1.2: x = (1.2, 0.8), 2 (x - a) + A^T lambda = 0."""
    target = torch.tensor([2.0, 1.0], dtype=torch.float64)
    multiplier = Multiplier(0.05, num_constraints=2, damping=1.0)
    x = solve(
        lambda x: (x - target).square().sum(),
        lambda x: torch.stack([x.sum() - 2, x[0] - 1.2]),
        [0.0, 0.0],
        multiplier,
    )
    assert torch.allclose(x, torch.tensor([1.2, 0.8], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(multiplier.value, torch.tensor([0.4, 1.2]), atol=1e-4)


def test_an_equality_may_pull_either_way():
    multiplier = Multiplier(0.05, equality=True, damping=1.0)
    x = solve(lambda x: (x - 2).square(), lambda x: x - 3, 0.0, multiplier)
    assert x.item() == pytest.approx(3.0, abs=1e-6)
    assert multiplier.value.item() == pytest.approx(-2.0, abs=1e-4)


def test_damping_ends_the_circling_of_plain_descent_and_ascent():
    """A bilinear problem: min_x max_lambda lambda x. Without damping the iterates spiral outwards."""

    def distance(damping):
        multiplier = Multiplier(0.1, equality=True, damping=damping, initial=1.0)
        x = solve(lambda x: 0 * x, lambda x: x, 1.0, multiplier, steps=500, lr=0.1)
        return abs(x.item()) + abs(multiplier.value.item())

    assert distance(1.0) < 1e-6
    assert distance(0.0) > 0.5


def test_the_multiplier_moves_after_it_was_used_and_only_in_training():
    multiplier = Multiplier(0.5, initial=1.0)
    assert multiplier(torch.tensor(2.0)).item() == 2.0  # with the multiplier as it was: 1
    assert multiplier.value.item() == 2.0
    multiplier.eval()
    assert multiplier(torch.tensor(2.0)).item() == 4.0
    assert multiplier.value.item() == 2.0


def test_the_ceiling_holds_where_the_constraint_cannot_be_met():
    capped = Multiplier(1.0, ceiling=3.0)
    both = Multiplier(1.0, ceiling=3.0, equality=True)
    for _ in range(10):
        capped(torch.tensor(1.0))
        both(torch.tensor(-1.0))
    assert capped.value.item() == 3.0
    assert both.value.item() == -3.0


def test_a_checkpoint_holds_the_multiplier():
    first, second = Multiplier(0.5), Multiplier(0.5)
    first(torch.tensor(2.0))
    second.load_state_dict(first.state_dict())
    assert second.value.item() == 1.0


def test_a_refused_violation_leaves_the_multiplier_as_it_was():
    multiplier = Multiplier(0.5, initial=1.0)
    with pytest.raises(ValueError, match="NaN"):
        multiplier(torch.tensor(float("nan")))
    with pytest.raises(ValueError, match=r"scalar or have shape \(1,\), got \(2,\)"):
        multiplier(torch.zeros(2))
    assert multiplier.value.item() == 1.0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": 0.1, "damping": -1.0}, "damping"),
        ({"lr": 0.1, "num_constraints": 0}, "num_constraints"),
        ({"lr": 0.1, "initial": -1.0}, "initial"),
        ({"lr": 0.1, "ceiling": 0.0}, "ceiling"),
        ({"lr": 0.1, "ceiling": 2.0, "squash": True}, "ceiling must be None"),
        ({"lr": 0.1, "initial": 0.0, "squash": True}, "initial"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum"),
        ({"lr": 0.1, "max_norm": 0.0}, "max_norm"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says):
        Multiplier(**settings)


@pytest.mark.untyped
def test_it_compiles_whole():
    multiplier, other = Multiplier(0.5, damping=1.0), Multiplier(0.5, damping=1.0)
    torch._dynamo.reset()
    compiled = torch.compile(multiplier, fullgraph=True, backend="aot_eager")
    for violation in (torch.tensor(0.3), torch.tensor(-0.1), torch.tensor(0.7)):
        assert torch.allclose(compiled(violation), other(violation))
    assert torch.allclose(multiplier.value, other.value)


@given(dual=st.floats(-4, 4), violation=NUMBER, equality=st.booleans())
def test_a_squashed_multiplier_climbs_the_gradient_of_its_term(dual, violation, equality):
    """d/d lambda of squash(lambda) g, by autograd."""
    multiplier = Multiplier(1.0, squash=True, equality=equality).double()
    multiplier.dual.fill_(dual)
    leaf = torch.tensor([dual], dtype=torch.float64, requires_grad=True)
    ((torch.tanh if equality else torch.sigmoid)(leaf) * violation).sum().backward()
    multiplier.update(torch.tensor([violation], dtype=torch.float64))
    assert torch.allclose(multiplier.dual - dual, leaf.grad, atol=1e-12, rtol=0)


@given(violations=st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5), squash=st.booleans())
def test_momentum_and_norm_are_those_of_torchs_sgd(violations, squash):
    multiplier = Multiplier(0.3, num_constraints=2, equality=True, squash=squash, momentum=0.4, max_norm=0.5).double()
    dual = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([dual], lr=0.3, momentum=0.4, maximize=True)
    for violation in violations:
        optimizer.zero_grad()
        seen = torch.tensor(violation, dtype=torch.float64)
        ((dual.tanh() if squash else dual) * seen).sum().backward()
        torch.nn.utils.clip_grad_norm_([dual], 0.5)
        optimizer.step()
        multiplier.update(seen)
    assert torch.allclose(multiplier.dual, dual.detach(), atol=1e-5)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize(("equality", "low"), [(False, 0.0), (True, -1.0)])
def test_a_squashed_multiplier_stays_in_its_range_and_comes_back_from_its_end(equality, low):
    multiplier = Multiplier(0.5, squash=True, equality=equality)
    assert multiplier.value.item() == (1 + low) / 2
    for _ in range(400):
        multiplier.update(torch.tensor(1.0))
    assert 0.99 < multiplier.value.item() <= 1.0
    for _ in range(800):
        multiplier.update(torch.tensor(-1.0))
    assert low <= multiplier.value.item() < low + 0.01


def test_a_squashed_multiplier_solves_what_a_plain_one_does_where_its_range_allows():
    """min (x - 2)^2 / 4 with x <= 1: multiplier 1/2, inside (0, 1)."""
    x = solve(lambda x: (x - 2).square() / 4, lambda x: x - 1, 0.0, Multiplier(0.2, squash=True, initial=0.1), lr=0.1)
    assert x.item() == pytest.approx(1.0, abs=1e-5)


def test_update_moves_what_forward_moves_in_any_mode():
    settings = {"squash": True, "momentum": 0.5}
    by_call, by_update = Multiplier(0.5, **settings), Multiplier(0.5, **settings).eval()
    for violation in (1.0, -0.3):
        by_call(torch.tensor(violation))
        by_update.update(torch.tensor(violation))
    assert torch.equal(by_call.dual, by_update.dual)
