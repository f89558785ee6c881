"""Focal, generalized and symmetric cross-entropy and the mean absolute error against their formulas and limits."""

import pytest
import torch
import torch.nn.functional as F

from minimand.losses import (
    CompSumLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    MeanAbsoluteErrorLoss,
    SymmetricCrossEntropyLoss,
)

F64 = torch.float64


def batch(rows=64, classes=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    return scores, torch.randint(classes, (rows,), generator=generator)


def own_probability(scores, target):
    return torch.softmax(scores, 1).gather(1, target[:, None])[:, 0]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def population_minimiser(loss, probabilities):
    """Minimise the expected loss of one point over its scores."""
    loss.reduction = "none"
    classes = len(probabilities)
    scores = torch.zeros(1, classes, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=1000, tolerance_grad=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        expected = (probabilities * loss(scores.expand(classes, classes), torch.arange(classes))).sum()
        expected.backward()
        return expected

    optimizer.step(closure)
    return scores.detach()


def test_focal_is_cross_entropy_at_gamma_zero():
    scores, target = batch()
    close(FocalLoss(0.0)(scores, target), F.cross_entropy(scores, target))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_its_formula(gamma):
    scores, target = batch()
    p = own_probability(scores, target)
    close(FocalLoss(gamma, reduction="none")(scores, target), -((1 - p) ** gamma) * p.log())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_and_its_slope_are_finite_where_the_prediction_is_certain(gamma):
    scores = torch.tensor([[1e4, 0.0], [0.0, 1e4], [40.0, 0.0]], requires_grad=True)
    loss = FocalLoss(gamma)(scores, torch.tensor([0, 0, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_generalized_cross_entropy_tends_to_cross_entropy_as_q_vanishes():
    scores, target = batch()
    expected = F.cross_entropy(scores, target)
    close(GeneralizedCrossEntropyLoss(0.0)(scores, target), expected)
    torch.testing.assert_close(GeneralizedCrossEntropyLoss(1e-9)(scores, target), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("q", [0.2, 0.7, 1.0])
def test_generalized_cross_entropy_is_its_formula_and_comp_sum_at_one_plus_q(q):
    scores, target = batch()
    p = own_probability(scores, target)
    losses = GeneralizedCrossEntropyLoss(q, reduction="none")(scores, target)
    close(losses, (1 - p**q) / q)
    close(losses, CompSumLoss(1 + q, reduction="none")(scores, target))


def test_mean_absolute_error_is_the_l1_distance_and_twice_generalized_cross_entropy_at_one():
    scores, target = batch()
    losses = MeanAbsoluteErrorLoss(reduction="none")(scores, target)
    close(losses, (torch.softmax(scores, 1) - F.one_hot(target, 7)).abs().sum(1))
    close(losses, 2 * GeneralizedCrossEntropyLoss(1.0, reduction="none")(scores, target))


def test_mean_absolute_error_summed_over_all_labels_is_constant():
    scores, target = batch()
    loss = MeanAbsoluteErrorLoss(reduction="none")
    total = sum(loss(scores, torch.full_like(target, label)) for label in range(7))
    close(total, torch.full((64,), 2.0 * 6, dtype=F64))


def test_symmetric_cross_entropy_is_cross_entropy_without_its_reverse_part():
    scores, target = batch()
    close(SymmetricCrossEntropyLoss(1.0, beta=0.0)(scores, target), F.cross_entropy(scores, target))


def test_symmetric_cross_entropy_is_a_multiple_of_mean_absolute_error_without_its_forward_part():
    scores, target = batch()
    loss = SymmetricCrossEntropyLoss(0.0, beta=1.0, log_zero=-2.0)
    close(loss(scores, target), MeanAbsoluteErrorLoss()(scores, target))


@pytest.mark.parametrize(("alpha", "beta", "log_zero"), [(0.1, 1.0, -4.0), (6.0, 0.1, -4.0), (1.0, 0.5, -7.0)])
def test_symmetric_cross_entropy_is_its_definition(alpha, beta, log_zero):
    scores, target = batch()
    p, label = torch.softmax(scores, 1), F.one_hot(target, 7).to(F64)
    log_label = torch.where(label > 0, torch.zeros_like(p), torch.full_like(p, log_zero))
    expected = -alpha * (label * p.log()).sum(1) - beta * (p * log_label).sum(1)
    loss = SymmetricCrossEntropyLoss(alpha, beta=beta, log_zero=log_zero, reduction="none")
    close(loss(scores, target), expected)


@pytest.mark.parametrize(
    "loss",
    [
        FocalLoss(0.0),
        FocalLoss(0.5),
        FocalLoss(2.0),
        GeneralizedCrossEntropyLoss(0.7),
        SymmetricCrossEntropyLoss(0.5, beta=0.2),
        SymmetricCrossEntropyLoss(1.0, beta=0.0),
    ],
    ids=["focal 0", "focal 0.5", "focal 2", "gce 0.7", "sce", "sce without reverse"],
)
def test_link_recovers_the_class_probabilities_at_the_population_minimiser(loss):
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    scores = population_minimiser(loss, probabilities)
    torch.testing.assert_close(loss.link(scores)[0], probabilities, rtol=0, atol=1e-5)


def test_links_of_losses_that_keep_only_the_likeliest_class_are_the_softmax():
    scores, _ = batch()
    for loss in (GeneralizedCrossEntropyLoss(1.0), MeanAbsoluteErrorLoss(), SymmetricCrossEntropyLoss(0.0)):
        close(loss.link(scores), torch.softmax(scores, 1))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(-1.0), "gamma must be a finite number of at least 0, got -1.0"),
        (lambda: GeneralizedCrossEntropyLoss(1.5), r"q must lie in \[0.0, 1.0\], got 1.5"),
        (lambda: SymmetricCrossEntropyLoss(-1.0), "alpha"),
        (lambda: SymmetricCrossEntropyLoss(beta=-1.0), "beta"),
        (lambda: SymmetricCrossEntropyLoss(log_zero=0.0), "log_zero"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
