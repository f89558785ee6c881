"""LDR-KL and ALDR-KL against their mathematics (Zhu, Ying and Yang 2023)."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimand.losses import ALDRKLLoss, LDRKLLoss, aldr_temperature, ldr_kl_loss
from minimand.losses.aldr_kl import normalize_scores

F64 = torch.float64


def batch(rows=64, classes=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    return scores, torch.randint(classes, (rows,), generator=generator)


def margins(target, classes, margin):
    return margin * (1 - F.one_hot(target, classes).to(F64))


def objective(scores, target, margin, temperature, centre, strength):
    """The function of lambda that ALDR-KL maximises, written out."""
    gaps = scores - scores.gather(1, target[:, None]) + margins(target, scores.shape[1], margin)
    smooth = temperature * (torch.logsumexp(gaps / temperature[:, None], 1) - math.log(scores.shape[1]))
    return smooth - strength / 2 * (temperature - centre) ** 2


def test_ldr_kl_is_cross_entropy_less_log_k_at_temperature_one_without_margin():
    scores, target = batch()
    losses = ldr_kl_loss(scores, target, temperature=1.0, margin=0.0, reduction="none")
    expected = F.cross_entropy(scores, target, reduction="none") - math.log(7)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
def test_ldr_kl_is_scaled_cross_entropy_of_scores_plus_margin(temperature, margin):
    scores, target = batch()
    shifted = (scores + margins(target, 7, margin)) / temperature
    expected = temperature * (F.cross_entropy(shifted, target, reduction="none") - math.log(7))
    losses = ldr_kl_loss(scores, target, temperature=temperature, margin=margin, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-10)


def test_ldr_kl_tends_to_the_multiclass_hinge_loss_as_temperature_vanishes():
    scores, target = batch(scale=1.0)
    gaps = scores - scores.gather(1, target[:, None]) + margins(target, 7, 0.5)
    losses = ldr_kl_loss(scores, target, temperature=1e-4, margin=0.5, reduction="none")
    difference = gaps.amax(1) - losses
    assert (difference >= 0).all()
    assert (difference <= 1e-4 * math.log(7) + 1e-12).all()


def test_ldr_kl_tends_to_a_symmetric_loss_as_temperature_grows():
    scores, target = batch(scale=1.0)
    expected = (scores + margins(target, 7, 0.2)).mean(1) - scores.gather(1, target[:, None])[:, 0]
    losses = ldr_kl_loss(scores, target, temperature=1e6, margin=0.2, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-3)
    over_labels = sum(
        ldr_kl_loss(scores, torch.full_like(target, label), temperature=1e6, margin=0.2, reduction="none")
        for label in range(7)
    )
    torch.testing.assert_close(over_labels, torch.full_like(over_labels, 0.2 * 6), rtol=0, atol=1e-3)


def test_ldr_kl_falls_as_temperature_rises_and_stays_within_its_band():
    scores, target = batch()
    hinge = (scores - scores.gather(1, target[:, None]) + margins(target, 7, 0.1)).amax(1)
    previous = hinge
    for temperature in (0.01, 0.1, 1.0, 3.0, 30.0):
        losses = ldr_kl_loss(scores, target, temperature=temperature, margin=0.1, reduction="none")
        assert (losses <= previous + 1e-12).all()
        assert (hinge - losses <= temperature * math.log(7) + 1e-12).all()
        previous = losses


def test_ldr_kl_ignores_a_shift_of_the_scores():
    scores, target = batch()
    torch.testing.assert_close(ldr_kl_loss(scores + 5.0, target), ldr_kl_loss(scores, target), rtol=0, atol=1e-10)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_population_minimiser_of_ldr_kl_ranks_classes_as_their_probabilities(margin):
    torch.manual_seed(3)
    for _ in range(5):
        probabilities = torch.distributions.Dirichlet(torch.ones(5, dtype=F64)).sample()
        scores = torch.zeros(1, 5, dtype=F64, requires_grad=True)
        optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(scores=scores, optimizer=optimizer, probabilities=probabilities):
            optimizer.zero_grad()
            losses = ldr_kl_loss(scores.expand(5, 5), torch.arange(5), temperature=2.0, margin=margin, reduction="none")
            expected = (probabilities * losses).sum()
            expected.backward()
            return expected

        optimizer.step(closure)
        found = scores.detach()[0]
        assert torch.equal(found.argsort(), probabilities.argsort())
        if margin == 0:
            expected = 2.0 * probabilities.log()
            torch.testing.assert_close(found - found.mean(), expected - expected.mean(), rtol=0, atol=1e-3)


def test_aldr_temperature_solves_its_fixed_point_equation_inside_its_interval():
    scores, _ = batch(rows=500, scale=2.0)
    temperature = aldr_temperature(scores, 3.0, 2.0)
    p = torch.softmax(scores / temperature[:, None], 1)
    kl = (p * p.log()).sum(1) + math.log(7)
    strength = 2.0 * math.log(7) / 3.0
    torch.testing.assert_close(temperature, 3.0 - kl / strength, rtol=0, atol=1e-8)
    assert ((temperature >= 1.5) & (temperature <= 3.0)).all()


def test_aldr_kl_equals_the_maximum_over_a_grid_of_temperatures():
    scores, target = batch(rows=200, scale=2.0)
    loss = ALDRKLLoss(
        temperature=1.0,
        alpha=2.0,
        margin=0.1,
        normalize=None,
        solve="exact",
        margin_in_temperature=True,
        reduction="none",
    )
    strength = 2.0 * math.log(7)
    grid = torch.linspace(0.5, 1.0, 4001, dtype=F64)
    values = torch.stack([objective(scores, target, 0.1, value.expand(len(scores)), 1.0, strength) for value in grid])
    torch.testing.assert_close(loss(scores, target), values.amax(0), rtol=0, atol=1e-6)


def test_aldr_kl_lies_between_ldr_kl_at_its_two_extreme_temperatures():
    scores, target = batch()
    loss = ALDRKLLoss(
        temperature=2.0, alpha=2.0, normalize=None, solve="exact", margin_in_temperature=True, reduction="none"
    )
    value = loss(scores, target)
    assert (value >= ldr_kl_loss(scores, target, temperature=2.0, reduction="none") - 1e-10).all()
    assert (value <= ldr_kl_loss(scores, target, temperature=1.0, reduction="none") + 1e-10).all()


def test_aldr_kl_tends_to_ldr_kl_as_alpha_grows():
    scores, target = batch()
    loss = ALDRKLLoss(temperature=2.0, alpha=1e7, normalize=None, solve="exact", reduction="none")
    expected = ldr_kl_loss(scores, target, temperature=2.0, reduction="none")
    torch.testing.assert_close(loss(scores, target), expected, rtol=0, atol=1e-5)


def test_gradient_is_the_worst_case_distribution_less_the_label():
    scores, target = batch(rows=20, scale=2.0)
    scores.requires_grad_()
    loss = ALDRKLLoss(
        temperature=1.0, margin=0.1, normalize=None, solve="exact", margin_in_temperature=True, reduction="sum"
    )
    loss(scores, target).backward()
    shifted = scores.detach() + margins(target, 7, 0.1)
    p = torch.softmax(
        shifted / aldr_temperature(shifted - scores.detach().gather(1, target[:, None]), 1.0, 2.0)[:, None], 1
    )
    torch.testing.assert_close(scores.grad, p - F.one_hot(target, 7), rtol=0, atol=1e-8)
    # Danskin: the same by differences through the maximum itself, where the temperature moves too.
    step = 1e-5
    bumped = scores.detach().clone()
    bumped[:, 2] += step
    lowered = scores.detach().clone()
    lowered[:, 2] -= step
    loss.reduction = "none"
    slope = (loss(bumped, target) - loss(lowered, target)) / (2 * step)
    torch.testing.assert_close(slope, scores.grad[:, 2], rtol=0, atol=1e-6)


def test_running_temperatures_reach_the_exact_ones_when_scores_stand_still():
    scores, target = batch(rows=50, scale=2.0)
    loss = ALDRKLLoss(50, temperature=3.0).double()
    index = torch.arange(50)
    for _ in range(80):
        loss(scores, target, index=index)
    exact = aldr_temperature(normalize_scores(scores, "l1"), 3.0, 2.0)
    torch.testing.assert_close(loss.temperatures, exact, rtol=0, atol=1e-8)


def test_running_temperatures_follow_the_data_set_index_not_the_batch_position():
    scores, target = batch(rows=4)
    loss = ALDRKLLoss(10)
    loss(scores, target, index=torch.tensor([9, 0, 3, 7]))
    touched = loss.temperatures != 1.0
    assert touched.nonzero().flatten().tolist() == [0, 3, 7, 9]


def test_evaluation_mode_leaves_the_temperatures_alone():
    scores, target = batch(rows=4)
    loss = ALDRKLLoss(10).eval()
    loss(scores, target, index=torch.arange(4))
    assert (loss.temperatures == 1.0).all()


def test_temperatures_travel_in_the_state_dict():
    scores, target = batch(rows=4)
    loss = ALDRKLLoss(10)
    loss(scores, target, index=torch.arange(4))
    other = ALDRKLLoss(10)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.temperatures, loss.temperatures)


def test_confident_scores_get_a_smaller_temperature():
    flat, peaked = torch.zeros(1, 5, dtype=F64), torch.tensor([[9.0, 0, 0, 0, 0]], dtype=F64)
    assert aldr_temperature(peaked, 1.0, 2.0) < aldr_temperature(flat, 1.0, 2.0)
    assert aldr_temperature(flat, 1.0, 2.0).item() == pytest.approx(1.0)


def test_scale_of_the_scores_is_ignored_under_l1_normalisation():
    scores, target = batch()
    loss = LDRKLLoss(2.0, normalize="l1")
    torch.testing.assert_close(loss(scores, target), loss(7 * scores, target), rtol=0, atol=1e-10)


def test_link_recovers_the_class_probabilities():
    probabilities = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64)
    loss = LDRKLLoss(3.0, margin=0.0)
    torch.testing.assert_close(loss.link(3.0 * probabilities.log()), probabilities)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LDRKLLoss(0.0), "temperature"),
        (lambda: LDRKLLoss(margin=-1.0), "margin"),
        (lambda: ALDRKLLoss(alpha=1.0), "alpha"),
        (lambda: ALDRKLLoss(solve="guess"), "solve"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_or_wrong_index_is_refused():
    scores, target = batch(rows=4)
    loss = ALDRKLLoss(10)
    with pytest.raises(ValueError, match="index is required"):
        loss(scores, target)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 9\]"):
        loss(scores, target, index=torch.tensor([0, 1, 2, 10]))


def test_of_two_fixed_points_the_better_one_is_chosen():
    """Some scores have a second fixed point, which only the objective tells from the maximum."""
    generator = torch.Generator().manual_seed(0)
    scale = 4 * torch.rand(20_000, 1, generator=generator, dtype=F64)
    scores = scale * torch.randn(20_000, 4, generator=generator, dtype=F64)
    temperature, alpha = 1.0, 1.05
    strength = alpha * math.log(4) / temperature
    ends = []
    for start in (temperature, temperature * (1 - 1 / alpha)):
        value = torch.full((len(scores),), start, dtype=F64)
        for _ in range(300):
            log_p = torch.log_softmax(scores / value[:, None], 1)
            value = temperature - ((log_p.exp() * log_p).sum(1) + math.log(4)) / strength
        ends.append(value)
    double = (ends[0] - ends[1]).abs() > 0.05
    assert double.sum() > 20
    chosen = aldr_temperature(scores[double], temperature, alpha, iterations=300)
    upper, lower = ends[0][double], ends[1][double]
    target = torch.zeros(int(double.sum()), dtype=torch.long)
    gain = [objective(scores[double], target, 0.0, value, temperature, strength) for value in (upper, lower)]
    assert (gain[0] > gain[1] + 1e-4).any()
    assert (gain[1] > gain[0] + 1e-4).any()
    better = torch.where(gain[0] >= gain[1], upper, lower)
    clear = (gain[0] - gain[1]).abs() > 1e-6
    torch.testing.assert_close(chosen[clear], better[clear], rtol=0, atol=1e-5)
