"""The risk of linear regression on bag means: formula against special cases and simulation (Javanmard et al. 2024)."""

import functools
import itertools

import numpy as np
import pytest
import torch

from minimand.bounds import best_bag_size, best_rho, interpolation_risk
from minimand.losses import ols, private_bag_means

F64 = torch.float64


def gaussian_bags(features, rows_per_feature, bag_size, generator):
    bags = round(features * rows_per_feature / bag_size)
    inputs = torch.randn(bags * bag_size, features, generator=generator, dtype=F64)
    return inputs, torch.arange(bags).repeat_interleave(bag_size)


def simulate(rows_per_feature, bag_size, rho, *, features=120, draws=12, seed=0):
    """Exact bias and variance of the estimator given the inputs, for each draw of them; signal and noise are 1."""
    generator = torch.Generator().manual_seed(seed)
    biases, variances = [], []
    for _ in range(draws):
        inputs, _ = gaussian_bags(features, rows_per_feature, bag_size, generator)
        means = inputs.reshape(-1, bag_size, features).mean(1)
        a = bag_size * means.T @ means
        b = inputs.T @ inputs - a
        inverse = torch.linalg.inv(a + rho * b)
        # Averaged over all directions of the signal, and over the noise.
        biases.append(float((rho * inverse @ b).square().sum() / features))
        variances.append(float(torch.trace(inverse @ a @ inverse)))
    return np.array(biases), np.array(variances)


@pytest.mark.parametrize(
    ("rows_per_feature", "bag_size", "rho"),
    [(10, 2, 0.3), (10, 5, 0.1), (10, 5, 1.0), (4, 5, 0.2), (6, 3, 0.02), (3, 2, 0.5), (5, 4, 2.0), (8, 4, 0.0)],
)
def test_formula_matches_simulation(rows_per_feature, bag_size, rho):
    bias, variance = interpolation_risk(rows_per_feature, bag_size=bag_size, rho=rho)
    biases, variances = simulate(rows_per_feature, bag_size, rho)
    # A limit in the number of features: at 120 it is off by about one part in 120.
    assert variances.mean() == pytest.approx(variance, rel=0.02)
    assert biases.mean() == pytest.approx(bias, rel=0.02, abs=1e-12)


def test_bag_loss_is_unbiased_with_the_variance_of_least_squares_on_bag_means():
    for psi, k in ((3.0, 2), (10.0, 5), (30.0, 1)):
        bias, variance = interpolation_risk(psi, bag_size=k, rho=0.0, signal=4.0, noise=1.7)
        assert bias == 0
        assert variance == pytest.approx(1.7 * k / (psi - k), rel=1e-12)


def test_instance_loss_has_its_closed_form():
    for psi, k in ((1.5, 2), (10.0, 5), (30.0, 1), (3.0, 8)):
        bias, variance = interpolation_risk(psi, bag_size=k, rho=1.0, signal=4.0, noise=1.7)
        assert bias == pytest.approx(4.0 * (k - 1) / k**2 * (k - 1 + 1 / (psi - 1)), rel=1e-12, abs=1e-14)
        assert variance == pytest.approx(1.7 / (k * (psi - 1)), rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0, 3.0])
def test_bags_of_one_row_are_ordinary_regression_for_every_rho(rho):
    bias, variance = interpolation_risk(6.0, bag_size=1, rho=rho, noise=2.0)
    assert bias == pytest.approx(0.0, abs=1e-14)
    assert variance == pytest.approx(2.0 / 5.0, rel=1e-12)


def test_formula_is_continuous_as_rho_vanishes():
    for psi, k in ((10.0, 5), (6.0, 2)):
        small = interpolation_risk(psi, bag_size=k, rho=1e-9)
        zero = interpolation_risk(psi, bag_size=k, rho=0.0)
        np.testing.assert_allclose(small, zero, atol=1e-7)


def test_t_solves_its_equation_even_where_it_is_huge():
    # With fewer bags than features, t grows like 1 / rho: V / (1 - ...) shows it through the variance at rho -> 0.
    psi, k = 4.0, 5
    for rho in (1e-3, 1e-6, 1e-9):
        _, variance = interpolation_risk(psi, bag_size=k, rho=rho)
        a, b = psi / k, psi * (1 - 1 / k)
        t = max(np.roots([rho * (psi - 1), a + b * rho - 1 - rho, -1.0]))
        assert a * t / (1 + t) + b * rho * t / (1 + rho * t) == pytest.approx(1.0, rel=1e-6)
        w1, w2 = 1 / (k * (1 + t) ** 2), (1 - 1 / k) / (1 + rho * t) ** 2
        assert variance == pytest.approx(t * w1 / (w1 + rho * w2), rel=1e-6)


def test_finite_sample_variance_of_the_bag_loss_is_inverse_wishart():
    # s2 d / (m - d - 1), exactly, at a size where the limit s2 k / (psi - k) is 5 % off.
    features, bags, k = 5, 24, 3
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(40_000, bags, k, features, generator=generator).mean(2).double()
    variances = torch.linalg.inv(k * means.mT @ means).diagonal(dim1=1, dim2=2).sum(1)
    assert float(variances.mean()) == pytest.approx(features / (bags - features - 1), rel=0.01)


def test_share_of_a_in_the_whole_scatter_is_one_over_k():
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(8, 8, dtype=F64)
    for _ in range(400):
        inputs, _ = gaussian_bags(8, 12, 4, generator)
        means = inputs.reshape(-1, 4, 8).mean(1)
        total += torch.linalg.solve(inputs.T @ inputs, 4 * means.T @ means) / 400
    torch.testing.assert_close(total, torch.eye(8, dtype=F64) / 4, rtol=0, atol=0.01)


@pytest.mark.parametrize("rows_per_feature", [2.0, 5.0, 10.0, 30.0])
@pytest.mark.parametrize("bag_size", [2, 3, 5, 10])
def test_variance_falls_and_bias_rises_with_rho(rows_per_feature, bag_size):
    bias, variance = interpolation_risk(rows_per_feature, bag_size=bag_size, rho=np.linspace(0.001, 2.0, 400))
    assert (np.diff(variance) < 0).all()
    if rows_per_feature > bag_size:  # with fewer bags than features the bias can fall
        assert (np.diff(bias) > 0).all()


@pytest.mark.parametrize(
    ("noise", "bag_size", "rho", "least", "bag", "instance"),
    [(1.0, 2, 0.183, 0.199, 0.25, 0.3333), (1.0, 5, 0.130, 0.430, 1.0, 0.680), (0.5, 5, 0.061, 0.290, 0.5, 0.669)],
)
def test_best_rho_lies_between_and_beats_both_ends(noise, bag_size, rho, least, bag, instance):
    risk = functools.partial(interpolation_risk, 10.0, bag_size=bag_size, noise=noise)
    found = best_rho(10.0, bag_size=bag_size, noise=noise)
    assert found == pytest.approx(rho, abs=2e-3)
    assert sum(risk(rho=found)) == pytest.approx(least, abs=6e-4)
    assert sum(risk(rho=0.0)) == pytest.approx(bag, abs=6e-4)
    assert sum(risk(rho=1.0)) == pytest.approx(instance, abs=6e-4)
    grid = np.linspace(0.0, 1.0, 2001)
    assert sum(risk(rho=found)) <= (np.sum(risk(rho=grid), 0)).min() + 1e-9


def test_best_rho_grows_with_the_noise_and_is_zero_without():
    values = [best_rho(10.0, bag_size=3, noise=noise) for noise in (0.0, 0.1, 1.0, 2.0, 1e4)]
    assert values[0] == 0
    assert all(low < high for low, high in itertools.pairwise(values))
    assert values[-1] == 1.0
    assert best_rho(10.0, bag_size=3, noise=1e4, largest=50.0) > 1.0
    assert best_rho(10.0, bag_size=1) == 0


def test_label_privacy_acts_as_more_noise():
    # The whole mechanism, simulated: labels inside the clip, Laplace noise on bag means, interpolated regression.
    features, psi, k, epsilon, clip, rho = 40, 20, 4, 2.0, 3.0, 0.3
    generator = torch.Generator().manual_seed(0)
    risks = []
    for _ in range(150):
        inputs, bag = gaussian_bags(features, psi, k, generator)
        signal = torch.randn(features, generator=generator, dtype=F64)
        signal = signal * (0.5 / signal.norm())
        labels = inputs @ signal + 0.5 * torch.randn(len(bag), generator=generator, dtype=F64)
        means, _ = private_bag_means(labels, bag, epsilon=epsilon, clip=clip, generator=generator)
        risks.append(float((ols(inputs, means, bag, rho=rho) - signal).square().sum()))
    private = 0.25 + 8 * clip**2 / (k * epsilon**2)
    expected = sum(interpolation_risk(psi, bag_size=k, rho=rho, signal=0.25, noise=private))
    standard_error = np.std(risks) / np.sqrt(len(risks))
    assert abs(np.mean(risks) - expected) < 3 * standard_error + 0.02 * expected


def test_single_labels_are_best_for_the_bag_loss_at_every_epsilon():
    for epsilon in (0.3, 1.0, 10.0):
        risks = []
        for k in range(1, 12):
            noise = 1.0 + 8 * 4.0 / (k * epsilon**2)
            risks.append(sum(interpolation_risk(20.0, bag_size=k, rho=0.0, noise=noise)))
            assert risks[-1] == pytest.approx((k * 1.0 + 8 * 4.0 / epsilon**2) / (20.0 - k), rel=1e-12)
        assert (np.diff(risks) > 0).all()
        assert best_bag_size(20.0, epsilon=epsilon, clip=2.0, rho=0.0) == 1


def test_best_bag_size_grows_as_privacy_tightens():
    sizes = [best_bag_size(20.0, epsilon=e, clip=2.0, rho=0.3, largest=8) for e in (100.0, 4.0, 2.0, 1.0, 0.5)]
    assert sizes == [1, 1, 2, 7, 8]
    assert best_bag_size(50.0, epsilon=2.0, clip=2.0) == 2


def test_tensors_give_tensors_with_gradient():
    rho = torch.tensor(0.2, dtype=F64, requires_grad=True)
    bias, variance = interpolation_risk(10.0, bag_size=5, rho=rho)
    (bias + variance).backward()
    step = 1e-6
    high, low = (sum(interpolation_risk(10.0, bag_size=5, rho=0.2 + s)) for s in (step, -step))
    assert float(rho.grad) == pytest.approx((high - low) / (2 * step), rel=1e-6)
    expected = interpolation_risk(10.0, bag_size=5, rho=0.2)
    assert (float(bias.detach()), float(variance.detach())) == pytest.approx(expected, rel=1e-12)


def test_arrays_broadcast():
    bias, variance = interpolation_risk(10.0, bag_size=np.array([[2], [5]]), rho=np.array([0.0, 0.1, 1.0]))
    assert bias.shape == variance.shape == (2, 3)
    assert variance[1, 1] == pytest.approx(interpolation_risk(10.0, bag_size=5, rho=0.1)[1])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolation_risk(5.0, bag_size=5, rho=0.0), "above bag_size where rho is 0, got 5.0"),
        (lambda: interpolation_risk(1.0, bag_size=2, rho=0.5), "rows_per_feature must be above 1"),
        (lambda: interpolation_risk(5.0, bag_size=0.5, rho=0.5), "bag_size"),
        (lambda: interpolation_risk(5.0, bag_size=2, rho=-0.5), "rho"),
        (lambda: interpolation_risk(5.0, bag_size=2, rho=float("nan")), "rho"),
        (lambda: interpolation_risk(5.0, bag_size=2, rho=0.5, noise=-1.0), "noise"),
        (lambda: interpolation_risk(5.0, bag_size=2, rho=0.5, signal=-1.0), "signal"),
        (lambda: best_rho(5.0, bag_size=2, largest=0.0), "largest"),
        (lambda: best_rho(0.5, bag_size=1), "rows_per_feature"),
        (lambda: best_bag_size(5.0, epsilon=0.0, clip=1.0), "epsilon"),
        (lambda: best_bag_size(5.0, epsilon=1.0, clip=0.0), "clip"),
        (lambda: best_bag_size(5.0, epsilon=1.0, clip=1.0, largest=0), "largest"),
        (lambda: best_bag_size(1.0, epsilon=1.0, clip=1.0, rho=0.0), "rows_per_feature"),
    ],
)
def test_impossible_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
