"""Guardians: densities as SciPy's and scikit-learn's, Christoffel's function by its variational form, exact coverage."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, gaussian_kde
from sklearn.neighbors import KernelDensity

from minimand.policies import ChristoffelGuardian, CountGuardian, KernelDensityGuardian, coverage_threshold, monomials
from minimand.policies import guardians as module


def rows(count=200, features=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return (torch.randn(count, features, generator=generator, dtype=torch.float64) @ mix).to(dtype)


def scaled(guardian, x):
    return (x - guardian.center) / guardian.half_range


def test_the_density_is_that_of_scikit_learn():
    x, new = rows(), rows(50, seed=1)
    guardian = KernelDensityGuardian(0.4).fit(x)
    peer = KernelDensity(bandwidth=0.4).fit(scaled(guardian, x).numpy())
    wanted = peer.score_samples(scaled(guardian, new).numpy())
    np.testing.assert_allclose(guardian.score(new).numpy(), wanted, atol=1e-8)


def test_the_density_is_that_of_scipy_up_to_a_factor_and_ranks_alike():
    x, new = rows(features=1), rows(50, features=1, seed=1)
    guardian = KernelDensityGuardian(0.3).fit(x)
    inputs = scaled(guardian, x)[:, 0].numpy()
    peer = gaussian_kde(inputs, bw_method=0.3 / inputs.std(ddof=1))
    wanted = peer(scaled(guardian, new)[:, 0].numpy())
    found = guardian.score(new).exp().numpy()
    np.testing.assert_allclose(found / wanted, (found / wanted)[0], rtol=1e-8)
    assert (found.argsort() == wanted.argsort()).all()


def test_a_density_does_not_depend_on_how_rows_are_chunked(monkeypatch):
    x = rows()
    guardian = KernelDensityGuardian().fit(x)
    whole = guardian.score(x)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 7 * len(x))
    torch.testing.assert_close(guardian.score(x), whole)


@settings(max_examples=25, deadline=None)
@given(st.integers(30, 120), st.floats(0.01, 0.6), st.booleans())
def test_the_share_of_fitted_rows_inside_is_one_minus_alpha_within_one_row(count, alpha, density):
    x = rows(count, 2, seed=count)
    guardian = KernelDensityGuardian(alpha=alpha) if density else ChristoffelGuardian(2, alpha=alpha)
    inside = guardian.fit(x).inside(x).sum().item()
    assert (1 - alpha) * count <= inside + 1e-9 < (1 - alpha) * count + 1


def test_christoffels_polynomial_has_the_number_of_monomials_as_its_mean():
    x = rows()
    guardian = ChristoffelGuardian(3, regularization=0.0).fit(x)
    assert guardian.polynomial(x).mean().item() == pytest.approx(20, abs=1e-6)


def test_christoffels_polynomial_does_not_change_under_affine_maps():
    x, new = rows(), rows(40, seed=1)
    mix, shift = (
        torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0], [1.0, 0.0, 1.0]]).double(),
        torch.tensor([5.0, 0.0, -9]),
    )
    before = ChristoffelGuardian(3, regularization=0.0).fit(x).polynomial(new)
    after = ChristoffelGuardian(3, regularization=0.0).fit(x @ mix + shift).polynomial(new @ mix + shift)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_one_over_the_polynomial_is_the_least_mean_square_of_polynomials_that_are_one_at_the_point():
    x, point = rows(), rows(1, seed=3)
    guardian = ChristoffelGuardian(2, regularization=0.0).fit(x)
    z, at = monomials(x, degree=2), monomials(point, degree=2)[0]
    # Polynomials with p(point) = 1: a first one and the null space of the condition; least squares over the rest.
    first = at / (at @ at)
    null = torch.linalg.svd(at[None]).Vh[1:].mT
    free = torch.linalg.lstsq(z @ null, -(z @ first)).solution
    least = (z @ (first + null @ free)).square().mean()
    assert 1 / guardian.polynomial(point).item() == pytest.approx(least.item(), rel=1e-8)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_christoffels_polynomial_is_nowhere_below_one(seed):
    # The constant 1 is among the polynomials, so the least mean square is at most 1.
    guardian = ChristoffelGuardian(2, regularization=0.0).fit(rows())
    assert bool((guardian.polynomial(10 * rows(50, seed=seed)) >= 1 - 1e-9).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 400), st.floats(0.02, 0.5), st.floats(0.5, 0.99))
def test_the_rank_is_the_largest_that_keeps_the_confidence(count, alpha, confidence):
    kept = [k for k in range(1, count + 1) if binom.sf(k - 1, count, alpha) >= confidence]
    scores = torch.arange(1.0, count + 1)
    if not kept:
        with pytest.raises(ValueError, match=f"needs more than {count} rows"):
            coverage_threshold(scores, alpha=alpha, confidence=confidence)
        return
    found = coverage_threshold(scores, alpha=alpha, confidence=confidence)
    assert found.item() == max(kept)
    # The mass below the k-th of n uniform scores is Beta(k, n + 1 - k).
    assert beta.cdf(alpha, max(kept), count + 1 - max(kept)) >= confidence - 1e-12 or max(kept) == 0


def test_calibrated_coverage_holds_as_often_as_promised_and_that_of_the_fitted_rows_does_not():
    generator, alpha, confidence = torch.Generator().manual_seed(0), 0.1, 0.9

    def draw(count):
        return torch.rand(count, 2, generator=generator, dtype=torch.float64)

    fresh, kept = draw(4000), {True: 0, False: 0}
    for _ in range(60):
        x, calibration = draw(60), draw(60)
        for calibrated in kept:
            settings_ = {"calibration": calibration, "confidence": confidence} if calibrated else {}
            guardian = KernelDensityGuardian(0.1, alpha=alpha).fit(x, **settings_)
            kept[calibrated] += int(guardian.inside(fresh).double().mean() >= 1 - alpha)
    assert kept[True] >= 48
    assert kept[False] <= 20


def test_counts_are_counts():
    x = torch.randint(0, 3, (100, 2), generator=torch.Generator().manual_seed(0)).double()
    guardian = CountGuardian(12).fit(x)
    counter = collections.Counter(map(tuple, x.tolist()))
    new = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    wanted = torch.tensor([float(counter[tuple(row)]) for row in new.tolist()], dtype=torch.float64)
    assert torch.equal(guardian.score(new), wanted)
    assert torch.equal(guardian.inside(new), wanted >= 12)


@pytest.mark.parametrize("guardian", [KernelDensityGuardian(), ChristoffelGuardian(), CountGuardian(2)])
def test_inside_is_a_margin_of_at_least_zero_and_an_unfitted_copy_takes_a_fitted_ones_state(guardian):
    x, new = rows().round(), rows(50, seed=1).round()
    guardian.fit(x)
    assert torch.equal(guardian.inside(new), guardian(new) >= 0)
    other = type(guardian)()
    other.load_state_dict(guardian.state_dict())
    assert torch.equal(other.score(new), guardian.score(new))
    assert torch.equal(other.inside(new), guardian.inside(new))


def test_scores_have_gradients_towards_what_is_covered():
    for guardian in (KernelDensityGuardian(), ChristoffelGuardian()):
        guardian.fit(rows())
        x = rows(5, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(guardian, x)
        far = torch.full((1, 3), 40.0, dtype=torch.float64, requires_grad=True)
        guardian(far).sum().backward()
        assert (far.grad @ far.detach().mT).item() < 0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KernelDensityGuardian(0.0), ValueError, "bandwidth"),
        (lambda: KernelDensityGuardian(alpha=1.0), ValueError, "alpha"),
        (lambda: ChristoffelGuardian(0), ValueError, "degree"),
        (lambda: ChristoffelGuardian(alpha=0.0), ValueError, "alpha"),
        (lambda: ChristoffelGuardian(regularization=-1.0), ValueError, "regularization"),
        (lambda: ChristoffelGuardian(3, regularization=0.0).fit(rows(10)), ValueError, "singular"),
        (lambda: CountGuardian(0), ValueError, "min_count"),
        (lambda: KernelDensityGuardian().fit(rows())(rows(features=2)), ValueError, r"\(batch, 3\)"),
        (lambda: ChristoffelGuardian().fit(rows())(rows(features=2)), ValueError, r"\(batch, 3\)"),
        (lambda: CountGuardian().fit(rows())(rows(features=2)), ValueError, r"\(batch, 3\)"),
        (lambda: KernelDensityGuardian().fit(rows()[:0]), ValueError, "empty"),
        (lambda: KernelDensityGuardian().fit(rows() / 0), ValueError, "NaN"),
        (lambda: KernelDensityGuardian().fit(rows(), confidence=0.9), ValueError, "calibration rows"),
        (lambda: coverage_threshold(torch.zeros(0), alpha=0.1), ValueError, "empty"),
        (lambda: coverage_threshold(torch.zeros(9), alpha=0.1, confidence=1.0), ValueError, "confidence"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
