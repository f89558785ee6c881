"""Bag loss, instance loss and their mix against their mathematics (Javanmard et al. 2024)."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.losses import AggregateLoss, aggregate_loss, ols, private_bag_means, within_bag_variance

F64 = torch.float64


def bags(seed=0, count=12, largest=6, scale=2.0):
    """Draw predictions in bags of differing sizes, rows in random order, and a target a bag."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, largest + 1, (count,), generator=generator)
    bag = torch.arange(count).repeat_interleave(sizes)
    bag = bag[torch.randperm(len(bag), generator=generator)]
    predictions = scale * torch.randn(len(bag), generator=generator, dtype=F64)
    return predictions, torch.randn(count, generator=generator, dtype=F64), bag


def log_cosh(input, target):
    """A convex loss whose second derivative lies in (0, 1]."""
    gap = input - target
    return gap.abs() + F.softplus(-2 * gap.abs()) - math.log(2)


def written_out(predictions, target, bag, rho, weighting, row_loss):
    """The definition, bag by bag."""
    total = 0.0
    for a in range(len(target)):
        f = predictions[bag == a]
        weight = len(f) / len(predictions) if weighting == "row" else 1 / len(target)
        instance = row_loss(f, target[a].expand_as(f)).mean()
        total = total + weight * ((1 - rho) * row_loss(f.mean(), target[a]) + rho * instance)
    return total


@pytest.mark.parametrize("weighting", ["row", "bag"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("loss", ["mse", log_cosh])
def test_loss_is_its_definition_bag_by_bag(weighting, rho, loss):
    predictions, target, bag = bags()
    row_loss = (lambda f, y: (f - y) ** 2) if loss == "mse" else loss
    value = aggregate_loss(predictions, target, bag, rho=rho, loss=loss, weighting=weighting)
    expected = written_out(predictions, target, bag, rho, weighting, row_loss)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["row", "bag"]))
def test_instance_loss_is_bag_loss_plus_within_bag_variance(seed, weighting):
    predictions, target, bag = bags(seed)
    ends = [aggregate_loss(predictions, target, bag, rho=rho, weighting=weighting) for rho in (0.0, 1.0)]
    variance = within_bag_variance(predictions, bag, weighting=weighting)
    torch.testing.assert_close(ends[1], ends[0] + variance, rtol=0, atol=1e-12)
    assert variance >= 0


def test_within_bag_variance_is_the_sum_over_pairs_over_two_m_k_squared():
    f = torch.randn(7, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    pairs = ((f[:, :, None] - f[:, None, :]) ** 2).sum() / (2 * 7 * 4**2)
    torch.testing.assert_close(within_bag_variance(f), pairs, rtol=0, atol=1e-12)
    flat = within_bag_variance(f.reshape(-1), torch.arange(7).repeat_interleave(4))
    torch.testing.assert_close(flat, pairs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "bce", log_cosh])
def test_all_rho_agree_on_bags_of_one_row(loss):
    f = torch.randn(9, dtype=F64, generator=torch.Generator().manual_seed(0))
    target = torch.rand(9, dtype=F64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    plain = {
        "mse": F.mse_loss,
        "bce": F.binary_cross_entropy_with_logits,
        log_cosh: lambda f, y: log_cosh(f, y).mean(),
    }[loss](f, target[order])
    for rho in (0.0, 0.4, 1.0):
        torch.testing.assert_close(aggregate_loss(f, target, order, rho=rho, loss=loss), plain, rtol=0, atol=1e-12)
        dense = aggregate_loss(f[:, None], target[order], rho=rho, loss=loss)
        torch.testing.assert_close(dense, plain, rtol=0, atol=1e-12)
    assert within_bag_variance(f, order) == 0


@pytest.mark.parametrize("loss", ["mse", "bce", log_cosh])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense_and_indexed_bags_agree(loss, reduction):
    f = 3 * torch.randn(6, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    target = torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(1))
    make = AggregateLoss(0.2, loss=loss, reduction=reduction)
    flat = make(f.reshape(-1), target, torch.arange(6).repeat_interleave(5))
    torch.testing.assert_close(make(f, target), flat, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_a_convex_loss_lies_between_bag_and_instance_loss(seed, rho):
    predictions, target, bag = bags(seed)
    proportions = torch.sigmoid(target)
    quartic = lambda f, y: (f - y) ** 4  # noqa: E731
    for loss, y in (("mse", target), ("bce", proportions), (log_cosh, target), (quartic, target)):
        low, value, high = (
            aggregate_loss(predictions, y, bag, rho=r, loss=loss, reduction="none") for r in (0.0, rho, 1.0)
        )
        slack = 1e-12 * (1 + high.abs())
        assert (low <= value + slack).all()
        assert (value <= high + slack).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_curvature_of_the_loss_brackets_the_gap_by_the_within_bag_variance(seed):
    predictions, target, bag = bags(seed)
    low, high = (aggregate_loss(predictions, target, bag, rho=rho, loss=log_cosh) for rho in (0.0, 1.0))
    variance = within_bag_variance(predictions, bag)
    widest = (predictions - target[bag]).abs().max()
    least_curvature = 1 / torch.cosh(widest) ** 2
    assert least_curvature / 2 * variance - 1e-12 <= high - low <= variance / 2 + 1e-12


def test_cross_entropy_is_that_of_the_mean_probability_not_of_the_mean_logit():
    predictions, target, bag = bags()
    proportions = torch.sigmoid(target)
    losses = aggregate_loss(predictions, proportions, bag, rho=0.25, loss="bce", weighting="bag", reduction="none")
    for a, value in enumerate(losses):
        z = predictions[bag == a]
        whole = F.binary_cross_entropy(torch.sigmoid(z).mean(), proportions[a])
        rows = F.binary_cross_entropy_with_logits(z, proportions[a].expand_as(z))
        torch.testing.assert_close(value, 0.75 * whole + 0.25 * rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_cross_entropy_is_finite_and_exact_where_probabilities_are_zero_or_one(dense):
    z = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    target = torch.tensor([0.0, 0.25, 0.5])
    bag = None if dense else torch.arange(3).repeat_interleave(2)
    losses = aggregate_loss(z if dense else z.reshape(-1), target, bag, rho=0.5, loss="bce", reduction="none")
    expected = torch.tensor([1e4, 0.25e4, 0.5 * math.log(2) + 0.5 * 0.5e4])
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_gradient_of_the_squared_loss_is_that_of_the_card():
    predictions, target, bag = bags()
    predictions.requires_grad_()
    rho, n = 0.3, len(predictions)
    aggregate_loss(predictions, target, bag, rho=rho).backward()
    f = predictions.detach()
    centre = torch.stack([f[bag == a].mean() for a in range(len(target))])
    expected = -2 / n * (target - centre)[bag] + 2 * rho / n * (f - centre[bag])
    torch.testing.assert_close(predictions.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "bce", log_cosh])
def test_first_and_second_derivatives_match_differences(loss):
    predictions, target, bag = bags(count=3, largest=3)
    call = functools.partial(aggregate_loss, target=torch.sigmoid(target), bag=bag, rho=0.3, loss=loss)
    f = predictions.requires_grad_()
    assert torch.autograd.gradcheck(call, (f,))
    assert torch.autograd.gradgradcheck(call, (f,))


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_order_of_rows_and_of_bags_does_not_matter(loss):
    predictions, target, bag = bags()
    target = torch.sigmoid(target)
    expected = aggregate_loss(predictions, target, bag, loss=loss)
    rows = torch.randperm(len(bag), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(aggregate_loss(predictions[rows], target, bag[rows], loss=loss), expected)
    places = torch.randperm(len(target), generator=torch.Generator().manual_seed(4))
    moved = torch.empty_like(target)
    moved[places] = target
    torch.testing.assert_close(aggregate_loss(predictions, moved, places[bag], loss=loss), expected)


@pytest.mark.parametrize("weighting", ["row", "bag"])
def test_mean_of_unreduced_losses_is_the_mean_and_a_risk_sees_them(weighting):
    predictions, target, bag = bags()
    call = functools.partial(aggregate_loss, predictions, target, bag, weighting=weighting)
    each = call(reduction="none")
    assert each.shape == target.shape
    torch.testing.assert_close(call(reduction="mean"), each.mean())
    torch.testing.assert_close(call(reduction="sum"), each.sum())
    torch.testing.assert_close(call(reduction=torch.max), each.max())


def linear_problem(features=6, count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (count,), generator=generator)
    bag = torch.arange(count).repeat_interleave(sizes)
    inputs = torch.randn(len(bag), features, generator=generator, dtype=F64)
    labels = inputs @ torch.randn(features, generator=generator, dtype=F64)
    labels = labels + torch.randn(len(bag), generator=generator, dtype=F64)
    target = torch.stack([labels[bag == a].mean() for a in range(count)])
    return inputs, target, bag


@pytest.mark.parametrize("weighting", ["row", "bag"])
@pytest.mark.parametrize("rho", [0.0, 0.15, 1.0])
def test_closed_form_is_what_gradient_descent_on_the_loss_reaches(rho, weighting):
    inputs, target, bag = linear_problem()
    theta = torch.zeros(6, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = aggregate_loss(inputs @ theta, target, bag, rho=rho, weighting=weighting)
        value.backward()
        return value

    optimizer.step(closure)
    found = ols(inputs, target, bag, rho=rho, weighting=weighting)
    torch.testing.assert_close(theta.detach(), found, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rho", [0.0, 0.15, 1.0])
def test_closed_form_is_the_inverse_of_a_plus_rho_b(rho):
    inputs, target, bag = linear_problem()
    same = (bag[:, None] == bag[None, :]).to(F64)
    projection = same / same.sum(1, keepdim=True)
    a = inputs.T @ projection @ inputs
    b = inputs.T @ inputs - a
    expected = torch.linalg.solve(a + rho * b, inputs.T @ target[bag])
    torch.testing.assert_close(ols(inputs, target, bag, rho=rho), expected, rtol=0, atol=1e-10)


def test_closed_form_is_least_squares_on_bag_means_and_on_repeated_bag_means():
    inputs, target, bag = linear_problem()
    means = torch.stack([inputs[bag == a].mean(0) for a in range(len(target))])
    on_bags = np.linalg.lstsq(means.numpy(), target.numpy(), rcond=None)[0]
    found = ols(inputs, target, bag, rho=0.0, weighting="bag").numpy()
    np.testing.assert_allclose(found, on_bags, rtol=0, atol=1e-10)
    on_rows = np.linalg.lstsq(inputs.numpy(), target[bag].numpy(), rcond=None)[0]
    np.testing.assert_allclose(ols(inputs, target, bag, rho=1.0).numpy(), on_rows, rtol=0, atol=1e-10)


def test_closed_form_has_least_norm_when_bags_are_fewer_than_features():
    inputs, target, bag = linear_problem(features=9, count=5)
    means = torch.stack([inputs[bag == a].mean(0) for a in range(len(target))])
    expected = np.linalg.lstsq(means.numpy(), target.numpy(), rcond=None)[0]
    found = ols(inputs, target, bag, rho=0.0, weighting="bag").numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_no_rho_shrinks_the_intercept():
    inputs, target, bag = linear_problem()
    rows = torch.cat([torch.ones(len(inputs), 1, dtype=F64), inputs], 1)
    huge = ols(rows, target, bag, rho=1e8)
    weighted_mean = (target[bag]).mean()
    torch.testing.assert_close(huge[0], weighted_mean, rtol=0, atol=1e-5)
    assert huge[1:].abs().max() < 1e-5


def test_neighbouring_labels_move_the_bag_means_by_at_most_two_clips_over_k():
    generator = torch.Generator().manual_seed(0)
    bag = torch.arange(5).repeat_interleave(4)
    worst = 0.0
    for trial in range(100):
        labels = 10 * torch.randn(20, generator=generator, dtype=F64)
        neighbour = labels.clone()
        neighbour[trial % 20] = 10 * torch.randn((), generator=generator, dtype=F64)
        # The same seed draws the same noise, so the difference is that of the exact means.
        means, _ = private_bag_means(labels, bag, epsilon=1.0, clip=1.5, generator=torch.Generator().manual_seed(7))
        moved, _ = private_bag_means(neighbour, bag, epsilon=1.0, clip=1.5, generator=torch.Generator().manual_seed(7))
        worst = max(worst, float((means - moved).abs().sum()))
        assert (means - moved).abs().sum() <= 2 * 1.5 / 4 + 1e-12
    assert worst == pytest.approx(2 * 1.5 / 4)  # the bound is met, so no smaller scale would do


@pytest.mark.parametrize(("epsilon", "size"), [(0.5, 1), (2.0, 4)])
def test_noise_is_laplace_with_the_variance_of_the_mechanism(epsilon, size):
    count, clip = 200_000, 2.0
    bag = torch.arange(count).repeat_interleave(size)
    means, scale = private_bag_means(
        torch.zeros(len(bag), dtype=F64), bag, epsilon=epsilon, clip=clip, generator=torch.Generator().manual_seed(0)
    )
    assert (scale == 2 * clip / (size * epsilon)).all()
    assert float(means.var()) == pytest.approx(8 * clip**2 / (size * epsilon) ** 2, rel=0.02)
    # |Laplace| is exponential: its quantiles give the scale and its ratio P(|z| > s) = 1/e the shape.
    for multiple in (0.5, 1.0, 3.0):
        beyond = float((means.abs() > multiple * scale).double().mean())
        assert beyond == pytest.approx(math.exp(-multiple), abs=0.004)
    assert float((means > 0).double().mean()) == pytest.approx(0.5, abs=0.004)


def test_labels_of_zero_and_one_have_sensitivity_one_over_k():
    labels, bag = torch.ones(6), torch.tensor([0, 0, 0, 0, 1, 1])
    _, scale = private_bag_means(labels, bag, epsilon=0.5, clip=(0.0, 1.0))
    torch.testing.assert_close(scale, torch.tensor([0.5, 1.0]))


def test_private_means_tend_to_the_clipped_means_as_epsilon_grows():
    labels, bag = torch.tensor([5.0, -1.0, 0.5, 1.0], dtype=F64), torch.tensor([1, 0, 1, 0])
    means, _ = private_bag_means(labels, bag, epsilon=1e9, clip=2.0)
    torch.testing.assert_close(means, torch.tensor([0.0, 1.25], dtype=F64), rtol=0, atol=1e-6)


def test_a_seed_decides_the_noise():
    labels, bag = torch.zeros(8), torch.arange(8)
    first, again, other = (
        private_bag_means(labels, bag, epsilon=1.0, clip=1.0, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_every_dtype_is_kept_and_agrees_with_float64(dtype, loss):
    predictions, target, bag = bags()
    target = torch.sigmoid(target)
    input = predictions.to(dtype).requires_grad_()
    value = aggregate_loss(input, target.to(dtype), bag, loss=loss)
    value.backward()
    assert value.dtype == input.grad.dtype == dtype
    exact = aggregate_loss(input.detach().double(), target.to(dtype).double(), bag, loss=loss)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(value.detach().double(), exact, rtol=rtol, atol=0)


@pytest.mark.untyped
@pytest.mark.parametrize("loss", ["mse", "bce", log_cosh])
def test_survives_compile_and_vmap(loss):
    predictions, target, bag = bags()
    target = torch.sigmoid(target)
    module = AggregateLoss(0.2, loss=loss)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    f = predictions.clone().requires_grad_()
    value = compiled(f, target, bag)
    value.backward()
    torch.testing.assert_close(value.detach(), module(predictions, target, bag))
    stacked = torch.stack([predictions, 2 * predictions])
    values = torch.func.vmap(lambda p: module(p, target, bag))(stacked)
    torch.testing.assert_close(values, torch.stack([module(p, target, bag) for p in stacked]))
    dense = torch.func.vmap(module)(stacked[:, :12].reshape(2, 4, 3), torch.stack([target[:4], target[4:8]]))
    torch.testing.assert_close(dense[0], module(predictions[:12].reshape(4, 3), target[:4]))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be"),
        ({"loss": "hinge"}, ValueError, "loss must be"),
        ({"weighting": "size"}, ValueError, "weighting must be one of"),
        ({"reduction": "median"}, ValueError, "reduction must be"),
        ({"loss": F.mse_loss}, ValueError, "loss must return one number a prediction"),
        ({"bag": torch.tensor([0, 0, 1, 3])}, ValueError, r"bag must hold ids in \[0, 2\], got values from 0 to 3"),
        ({"bag": torch.tensor([0, -1, 1, 2])}, ValueError, "bag must hold ids"),
        ({"bag": torch.tensor([0, 0, 2, 2])}, ValueError, "bag 1 of 3 has none"),
        ({"bag": torch.tensor([0, 1, 2])}, ValueError, r"shape \(rows,\), got \(4,\) and \(3,\)"),
        ({"bag": torch.tensor([0.0, 0, 1, 2])}, TypeError, "bag must have an integer dtype"),
        ({"bag": None}, ValueError, r"shape \(bags, size\) without bag ids"),
        ({"bag": None, "input": torch.zeros(2, 2)}, ValueError, "each of the 2 bags of input, got 3"),
        ({"target": torch.zeros(3, 1)}, ValueError, r"target must have shape \(bags,\)"),
        ({"target": torch.tensor([0.0, float("nan"), 0.0])}, ValueError, "target contains NaN"),
        ({"target": torch.tensor([0, 1, 0])}, TypeError, "target must have a floating-point dtype"),
        ({"loss": "bce", "target": torch.tensor([0.0, 1.5, 0.0])}, ValueError, r"proportions in \[0, 1\]"),
        ({"input": torch.tensor([0.0, float("nan"), 0.0, 0.0])}, ValueError, "input contains NaN"),
        ({"input": torch.zeros(0), "bag": torch.zeros(0, dtype=torch.int64)}, ValueError, "input is empty"),
        ({"input": torch.zeros(4, dtype=torch.int64)}, TypeError, "input must have a floating-point dtype"),
    ],
)
def test_malformed_calls_are_refused(change, error, message):
    call = {"input": torch.zeros(4), "target": torch.zeros(3), "bag": torch.tensor([0, 0, 1, 2])} | change
    with pytest.raises(error, match=message):
        aggregate_loss(**call)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AggregateLoss(-1.0), "rho"),
        (lambda: AggregateLoss(loss="hinge"), "loss"),
        (lambda: AggregateLoss(weighting="size"), "weighting"),
        (lambda: AggregateLoss(reduction="median"), "reduction"),
        (lambda: private_bag_means(torch.zeros(2), torch.arange(2), epsilon=0.0, clip=1.0), "epsilon"),
        (lambda: private_bag_means(torch.zeros(2), torch.arange(2), epsilon=1.0, clip=-1.0), "clip"),
        (lambda: private_bag_means(torch.zeros(2), torch.arange(2), epsilon=1.0, clip=(1.0, 0.0)), "clip"),
        (lambda: private_bag_means(torch.tensor([math.nan]), torch.arange(1), epsilon=1.0, clip=1.0), "NaN"),
        (lambda: private_bag_means(torch.zeros(2), torch.tensor([0, 2]), epsilon=1.0, clip=1.0), "bag 1 of 3"),
        (lambda: ols(torch.zeros(2, 1), torch.zeros(1), torch.zeros(2).long(), rho=-1.0), "rho"),
        (lambda: ols(torch.full((2, 1), math.inf), torch.zeros(1), torch.zeros(2).long()), "input contains"),
        (lambda: within_bag_variance(torch.zeros(3)), "without bag ids"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
