"""H-consistency bounds of comp-sum losses against their theorems (Mao, Mohri and Zhong 2023)."""

import math

import pytest
import torch

from minimand.bounds import comp_sum_bound, comp_sum_transform, conditional_regret, minimizability_gap
from minimand.losses import comp_sum_loss

F64 = torch.float64
TAUS = [0.0, 0.5, 1.0, 1.5, 1.9, 2.0, 2.5]
GRID = torch.linspace(0, 1, 201, dtype=F64)


def draws(rows, classes, seed):
    """Probabilities and scores of every degree of sharpness, also near the bound's tight cases."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 10 ** (2 * torch.rand(rows, 2, generator=generator, dtype=F64) - 1)
    logits = torch.randn(rows, classes, generator=generator, dtype=F64) * sharpness[:, :1]
    scores = torch.randn(rows, classes, generator=generator, dtype=F64) * sharpness[:, 1:]
    # In half of the draws the two best scores nearly tie.
    half = rows // 2
    scores[:half, 0] = scores[:half].amax(1)
    scores[:half, 1] = scores[:half, 0] + 1e-9 * torch.randn(half, generator=generator, dtype=F64)
    return torch.softmax(logits, 1), scores


def zero_one_regret(probabilities, scores):
    return probabilities.amax(1) - probabilities.gather(1, scores.argmax(1, keepdim=True))[:, 0]


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("classes", [2, 3, 5, 20])
def test_transform_of_the_zero_one_regret_never_exceeds_the_comp_sum_regret(tau, classes):
    probabilities, scores = draws(12_000, classes, seed=classes)
    regret = conditional_regret(probabilities, scores, tau=tau)
    promised = comp_sum_transform(zero_one_regret(probabilities, scores), tau=tau, num_classes=classes)
    assert (regret >= promised - 1e-10).all()


@pytest.mark.parametrize(
    ("tau", "classes"),
    [(0.0, 2), (0.0, 6), (0.5, 2), (0.5, 6), (1.0, 2), (1.0, 6), (1.2, 2), (1.5, 2), (1.9, 2), (2.0, 2)],
)
def test_bound_is_tight_where_the_two_likeliest_classes_tie(tau, classes):
    b = GRID[:, None]
    rest = torch.zeros(len(GRID), classes - 2, dtype=F64)
    probabilities = torch.cat([(1 + b) / 2, (1 - b) / 2, rest], 1)
    scores = torch.cat([torch.zeros(len(GRID), 2, dtype=F64), rest - 60.0], 1)
    regret = conditional_regret(probabilities, scores, tau=tau)
    torch.testing.assert_close(regret, comp_sum_transform(GRID, tau=tau, num_classes=classes), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 0.99])
def test_transform_below_one_exceeds_its_parabola(tau):
    values = comp_sum_transform(GRID, tau=tau, num_classes=9)
    assert (values >= GRID**2 / (2**tau * (2 - tau)) - 1e-13).all()


@pytest.mark.parametrize("tau", [1.0, 1.3, 1.7, 1.99])
@pytest.mark.parametrize("classes", [2, 9])
def test_transform_from_one_to_two_exceeds_its_parabola(tau, classes):
    values = comp_sum_transform(GRID, tau=tau, num_classes=classes)
    assert (values >= GRID**2 / (2 * classes ** (tau - 1)) - 1e-13).all()


@pytest.mark.parametrize(("tau", "classes"), [(0.5, 4), (1.0, 4), (1.6, 2)])
def test_parabola_is_the_transforms_second_order_term(tau, classes):
    b = torch.tensor([1e-3], dtype=F64)
    constant = 2**tau * (2 - tau) if tau < 1 else 2 * classes ** (tau - 1) * (2 - tau if tau > 1 else 1)
    ratio = comp_sum_transform(b, tau=tau, num_classes=classes) / b**2
    assert ratio.item() == pytest.approx(1 / constant, rel=1e-4)


def test_transform_is_continuous_in_tau_through_one_for_two_classes():
    at_one = comp_sum_transform(GRID, tau=1.0, num_classes=2)
    for step in (-1e-7, 1e-7):
        near = comp_sum_transform(GRID, tau=1 + step, num_classes=2)
        torch.testing.assert_close(near, at_one, rtol=0, atol=1e-6)


def test_transform_is_continuous_in_tau_through_two():
    below = comp_sum_transform(GRID, tau=2 - 1e-9, num_classes=5)
    torch.testing.assert_close(below, comp_sum_transform(GRID, tau=2.0, num_classes=5), rtol=0, atol=1e-8)


@pytest.mark.parametrize("tau", TAUS)
def test_transform_starts_at_zero_increases_and_is_convex(tau):
    values = comp_sum_transform(GRID, tau=tau, num_classes=4)
    assert values[0].item() == 0
    assert (values.diff() > 0).all()
    assert (values.diff().diff() > -1e-13).all()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("classes", [2, 10])
def test_bound_inverts_the_transform(tau, classes):
    values = comp_sum_transform(GRID, tau=tau, num_classes=classes)
    # Below 1e-8 the transform is lost in rounding, so its inverse is known to 1e-8 only.
    torch.testing.assert_close(comp_sum_bound(values, tau=tau, num_classes=classes), GRID, rtol=1e-6, atol=1e-7)
    beyond = comp_sum_bound(values[-1:] * 1.5, tau=tau, num_classes=classes)
    assert beyond.item() == 1


@pytest.mark.parametrize(
    ("tau", "simple"),
    [
        (0.0, lambda t: (2 * t).sqrt()),
        (0.5, lambda t: (2**0.5 * 1.5 * t).sqrt()),
        (1.0, lambda t: (2 * t).sqrt()),
        (1.5, lambda t: (2 * 10**0.5 * t).sqrt()),
        (2.0, lambda t: 10 * t),
        (2.5, lambda t: 1.5 * 10**1.5 * t),
    ],
)
def test_bound_lies_below_its_simple_forms(tau, simple):
    regret = torch.linspace(0, 0.05, 100, dtype=F64)
    bound = comp_sum_bound(regret, tau=tau, num_classes=10)
    assert (bound <= simple(regret) + 1e-7).all()


def test_only_above_one_does_the_number_of_classes_weaken_the_bound():
    regret = torch.tensor([0.01], dtype=F64)
    for tau in (0.0, 0.5, 1.0):
        assert comp_sum_bound(regret, tau=tau, num_classes=2) == comp_sum_bound(regret, tau=tau, num_classes=100)
    for tau in (1.5, 2.0):
        few, many = (comp_sum_bound(regret, tau=tau, num_classes=n) for n in (2, 100))
        assert many > few


@pytest.mark.parametrize("tau", TAUS)
def test_conditional_regret_is_the_expected_loss_above_the_best_scores(tau):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(torch.randn(5, generator=generator, dtype=F64), 0)
    if tau < 2:
        best = probabilities.log() / (2 - tau)
    else:
        best = torch.full((5,), -300.0, dtype=F64)
        best[probabilities.argmax()] = 300.0
    scores = torch.randn(5, generator=generator, dtype=F64)

    def expected(scores):
        losses = comp_sum_loss(scores.expand(5, 5).contiguous(), torch.arange(5), tau=tau, reduction="none")
        return (probabilities * losses).sum()

    regret = conditional_regret(probabilities, scores, tau=tau)
    torch.testing.assert_close(regret, expected(scores) - expected(best), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        conditional_regret(probabilities, best, tau=tau), torch.zeros((), dtype=F64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_regret_is_finite_where_a_class_cannot_occur(tau):
    regret = conditional_regret(torch.tensor([0.7, 0.3, 0.0]), torch.zeros(3), tau=tau)
    assert torch.isfinite(regret)
    assert regret >= 0


def test_minimizability_gap_vanishes_where_one_hypothesis_is_best_everywhere():
    probabilities, _ = draws(20, 4, seed=0)
    best = probabilities.log()
    worse = torch.zeros_like(best)
    gap = minimizability_gap(probabilities, torch.stack([worse, best]), tau=1.0)
    assert gap.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7, 2.0])
def test_minimizability_gap_of_two_opposed_constants_is_known(tau):
    # Each constant is right on one point and wrong on the other: the gap is half their difference.
    s = 1.5
    scores = torch.tensor([[[s, 0.0]] * 2, [[0.0, s]] * 2], dtype=F64)
    right, wrong = (
        comp_sum_loss(torch.tensor([[s, 0.0]], dtype=F64), torch.tensor([label]), tau=tau) for label in (0, 1)
    )
    gap = minimizability_gap(torch.eye(2, dtype=F64), scores, tau=tau)
    torch.testing.assert_close(gap, (wrong - right) / 2)


@pytest.mark.parametrize(("lower", "higher"), [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.0)])
def test_bound_on_the_gap_of_bounded_scores_with_certain_labels_does_not_rise_with_tau(lower, higher):
    # Labels are certain and scores lie in [-B, B]: M <= phi(R0*) - phi((n-1) e^{-2B}), R0 the sum-exponential loss.
    n, largest = 3, 1.0
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(n, (30,), generator=generator)
    scores = largest * (2 * torch.rand(50, 30, n, generator=generator, dtype=F64) - 1)
    # Give the set, at every point, some hypothesis that attains the least loss there.
    certain = largest * (2 * torch.nn.functional.one_hot(labels, n).to(F64) - 1)
    for point in range(30):
        scores[point % 50, point] = certain[point]
    probabilities = torch.nn.functional.one_hot(labels, n).to(F64)

    def phi(u, tau):
        return math.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)

    losses = torch.stack([comp_sum_loss(scores[h], labels, tau=0.0) for h in range(50)])
    bounds = []
    for tau in (lower, higher):
        bound = phi(losses.min().item(), tau) - phi((n - 1) * math.exp(-2 * largest), tau)
        gap = minimizability_gap(probabilities, scores, tau=tau).item()
        assert 0 < gap <= bound + 1e-12
        bounds.append(bound)
    assert bounds[1] <= bounds[0]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: comp_sum_transform(torch.tensor([1.1]), tau=1.0, num_classes=2), "zero_one_regret must lie in"),
        (lambda: comp_sum_transform(torch.tensor([0.1]), tau=-1.0, num_classes=2), "tau"),
        (lambda: comp_sum_transform(torch.tensor([0.1]), tau=1.0, num_classes=1), "num_classes must be at least 2"),
        (lambda: comp_sum_bound(torch.tensor([-0.1]), tau=1.0, num_classes=2), "surrogate_regret must be at least 0"),
        (lambda: comp_sum_bound(torch.tensor([math.nan]), tau=1.0, num_classes=2), "surrogate_regret"),
        (lambda: conditional_regret(torch.tensor([0.6, 0.6]), torch.zeros(2), tau=1.0), "probabilities must be"),
        (lambda: conditional_regret(torch.tensor([0.5, 0.5]), torch.zeros(3), tau=1.0), "scores must have the shape"),
        (lambda: conditional_regret(torch.tensor([0.5, 0.5]), torch.zeros(2), tau=-1.0), "tau"),
        (lambda: minimizability_gap(torch.eye(2), torch.zeros(2, 2), tau=1.0), "scores must have shape"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
