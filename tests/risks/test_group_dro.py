"""Group DRO against its algorithm and its limit (Sagawa et al. 2020)."""

import math

import pytest
import torch

from minimand.risks import GroupDRO

F64 = torch.float64


def example():
    losses = torch.tensor([1.0, 3.0, 0.5, 0.7, 0.3, 2.0], dtype=F64)
    return losses, torch.tensor([0, 0, 1, 1, 1, 2])


def test_one_step_is_the_exponentiated_update_and_then_the_weighted_group_means():
    losses, group = example()
    risk = GroupDRO(3, step_size=0.4).double()
    value = risk(losses, group=group)
    means = torch.tensor([2.0, 0.5, 2.0], dtype=F64)
    q = (0.4 * means).exp() / 3
    q /= q.sum()
    torch.testing.assert_close(risk.weights, q)
    torch.testing.assert_close(value, (q * means).sum())


def test_weights_after_many_steps_are_the_softmax_of_the_summed_group_losses():
    risk = GroupDRO(3, step_size=0.05).double()
    total = torch.zeros(3, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        losses = torch.rand(12, generator=generator, dtype=F64)
        group = torch.arange(12) % 3
        risk(losses, group=group)
        total += losses.reshape(4, 3).mean(0)
    torch.testing.assert_close(risk.weights, torch.softmax(0.05 * total, 0), rtol=1e-9, atol=0)


def test_an_absent_group_keeps_its_share_against_groups_without_loss():
    risk = GroupDRO(3, step_size=1.0).double()
    risk(torch.tensor([0.0, math.log(2.0)], dtype=F64), group=torch.tensor([0, 1]))
    torch.testing.assert_close(risk.weights, torch.tensor([0.25, 0.5, 0.25], dtype=F64))


def test_one_group_is_the_mean():
    losses, _ = example()
    torch.testing.assert_close(GroupDRO(1)(losses, group=torch.zeros(6, dtype=torch.long)), losses.mean())


def test_a_large_step_size_gives_the_worst_group():
    losses = torch.tensor([1.0, 3.0, 0.5, 4.0], dtype=F64)
    value = GroupDRO(3, step_size=1e4)(losses, group=torch.tensor([0, 0, 1, 2]))
    assert value.item() == pytest.approx(4.0)


def test_a_tiny_step_size_gives_the_mean_of_the_group_means():
    losses, group = example()
    assert GroupDRO(3, step_size=1e-9)(losses, group=group).item() == pytest.approx((2.0 + 0.5 + 2.0) / 3)


def test_the_gradient_of_an_example_is_its_groups_weight_over_its_groups_size():
    losses, group = example()
    losses.requires_grad_()
    risk = GroupDRO(3, step_size=0.4).double()
    risk(losses, group=group).backward()
    size = torch.tensor([2.0, 3.0, 1.0], dtype=F64)
    torch.testing.assert_close(losses.grad, (risk.weights / size)[group])


def test_online_weights_solve_the_minimax_problem():
    # Two groups that want x = 0 and x = 3, the second twice as much: the worst group is least at x = 3 sqrt(2) - ...
    x = torch.zeros((), dtype=F64, requires_grad=True)
    risk = GroupDRO(2, step_size=0.02).double()
    total, steps = 0.0, 6000
    for _ in range(steps):
        losses = torch.stack([x.square(), 2 * (x - 3).square()])
        risk(losses, group=torch.tensor([0, 1])).backward()
        with torch.no_grad():
            x -= 0.02 * x.grad
            x.grad = None
        total += x.item() / steps
    # x^2 = 2 (3 - x)^2 at x = 3 sqrt(2) / (1 + sqrt(2)).
    assert total == pytest.approx(3 * math.sqrt(2) / (1 + math.sqrt(2)), abs=0.02)


def test_evaluation_mode_leaves_the_weights_alone():
    losses, group = example()
    risk = GroupDRO(3).double()
    risk(losses, group=group)
    before = risk.weights.clone()
    risk.eval()(losses, group=group)
    assert torch.equal(risk.weights, before)


def test_huge_losses_do_not_overflow_the_weights():
    risk = GroupDRO(2, step_size=1.0)
    value = risk(torch.tensor([1e4, 0.0]), group=torch.tensor([0, 1]))
    assert value.item() == pytest.approx(1e4)
    assert torch.isfinite(risk.weights).all()


@pytest.mark.untyped
def test_bad_settings_and_groups_are_refused():
    losses, group = example()
    with pytest.raises(ValueError, match="num_groups"):
        GroupDRO(0)
    with pytest.raises(ValueError, match="step_size"):
        GroupDRO(2, step_size=0.0)
    risk = GroupDRO(3)
    with pytest.raises(ValueError, match="group is required"):
        risk(losses)
    with pytest.raises(TypeError, match="integer dtype"):
        risk(losses, group=group.double())
    with pytest.raises(ValueError, match="group must have shape"):
        risk(losses, group=group[:-1])
    with pytest.raises(ValueError, match=r"group must lie in \[0, 2\]"):
        risk(losses, group=group + 1)
