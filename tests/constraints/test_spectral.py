"""Spectral projections against singular value decompositions and the paper's polynomials (Newhouse et al. 2025)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from minimand.constraints import (
    SpectralHammer,
    SpectralHardCap,
    SpectralNormalize,
    SpectralSoftCap,
    SpectralWeightDecay,
    Stiefel,
    orthogonalize,
    rms_operator_norm,
    soft_cap_strength,
)

F64 = torch.float64


def with_singular_values(values, rows=6, columns=9, seed=0, dtype=F64):
    """Return a matrix with given singular values and random singular vectors, and those."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=F64))
    v, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=F64))
    return (u * torch.tensor(values, dtype=F64) @ v.T).to(dtype), u, v


def soft_cap_by_hand(x, alpha):
    once = x - alpha * x**3
    return once + alpha * once**3


class TestOrthogonalize:
    @pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 9), (3, 6, 4), (2, 3, 4, 6)])
    def test_singular_values_land_within_one_percent_below_one(self, shape):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
        values = torch.linalg.svdvals(orthogonalize(matrix))
        assert values.min() > 0.99
        assert values.max() < 1

    def test_it_is_the_product_of_singular_vectors(self):
        matrix, u, v = with_singular_values([1.0, 0.5, 0.1, 0.04, 0.02, 0.01])
        assert torch.allclose(orthogonalize(matrix), u @ v.T, atol=1e-2)
        assert torch.allclose(orthogonalize(matrix, num_steps=8), u @ v.T, atol=1e-12)

    @pytest.mark.parametrize("share", [3e-3, 0.01, 0.1, 0.7])
    def test_the_documented_range_of_singular_values(self, share):
        small = torch.diag(torch.tensor([share, math.sqrt(1 - share**2)], dtype=F64))
        for steps, low in ((6, 0.9955), (7, 1 - 3e-7), (8, 1 - 1e-14)):
            values = torch.linalg.svdvals(orthogonalize(small, num_steps=steps))
            assert low <= values.min()
            assert values.max() <= 1 + 1e-14

    @given(st.floats(-30, 30))
    @settings(max_examples=20, deadline=None)
    def test_a_positive_multiple_changes_nothing(self, exponent):
        matrix, _, _ = with_singular_values([3.0, 1.0, 0.5])
        scaled = orthogonalize((matrix * 10**exponent).float())
        assert torch.allclose(scaled, orthogonalize(matrix.float()), atol=1e-4)

    def test_the_transpose_gives_the_transpose(self):
        matrix, _, _ = with_singular_values([3.0, 1.0, 0.5])
        assert torch.allclose(orthogonalize(matrix.T), orthogonalize(matrix).T)

    def test_zero_stays_zero(self):
        assert not orthogonalize(torch.zeros(3, 4)).any()

    def test_bfloat16_is_off_by_two_percent_at_most(self):
        matrix = torch.randn(4, 64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
        values = torch.linalg.svdvals(orthogonalize(matrix).double())
        assert values.min() > 0.97
        assert values.max() < 1.02

    @pytest.mark.untyped
    def test_what_is_no_matrix_is_refused(self):
        with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(3,\)"):
            orthogonalize(torch.ones(3))
        with pytest.raises(ValueError, match="num_steps"):
            orthogonalize(torch.eye(3), num_steps=0)


class TestNorm:
    def test_it_is_the_largest_growth_of_the_root_mean_square(self):
        weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
        _, sigma, vt = torch.linalg.svd(weight)
        worst = vt[0]

        def rms(x):
            return x.square().mean().sqrt()

        norm = rms_operator_norm(weight)
        assert torch.allclose(rms(weight @ worst) / rms(worst), norm)
        assert torch.allclose(norm, sigma[0] * math.sqrt(8 / 5))

    def test_a_kernel_is_the_matrix_of_its_channels(self):
        kernel = torch.randn(4, 3, 2, 2)
        assert torch.equal(rms_operator_norm(kernel), rms_operator_norm(kernel.flatten(1)))
        capped = SpectralHardCap(0.5, exact=True)(kernel)
        assert capped.shape == kernel.shape
        assert torch.allclose(rms_operator_norm(capped), torch.tensor(0.5))


class TestSoftCap:
    @pytest.mark.parametrize("decay", [0.0, 0.1, 0.5])
    @pytest.mark.parametrize("lr", [1e-6, 0.01, 0.1, 0.3])
    @pytest.mark.parametrize("bound", [0.25, 1.0, 6.0])
    def test_the_strength_takes_the_largest_value_a_step_can_reach_to_the_bound(self, lr, bound, decay):
        step = lr * bound
        alpha = soft_cap_strength(bound, lr=step, weight_decay=decay)
        reach = bound * (1 - step * decay) + step
        # Where the decay alone keeps the bound there is nothing to do.
        assert soft_cap_by_hand(reach, alpha) == pytest.approx(min(bound, reach), rel=1e-12)

    @pytest.mark.parametrize("lr", [0.05, 0.2, 0.3])
    def test_the_strength_is_the_smallest_root_of_the_papers_quartic(self, lr):
        k = 1 + lr
        roots = np.roots([-(k**9), 3 * k**7, -3 * k**5, 0, k - 1])
        real = roots.real[(abs(roots.imag) < 1e-9) & (roots.real >= 0)]
        assert soft_cap_strength(1.0, lr=lr) == pytest.approx(real.min(), rel=1e-9)

    def test_up_to_the_largest_step_the_cap_is_monotone_and_beyond_it_is_not(self):
        limit = 19 / 62
        assert soft_cap_strength(1.0, lr=limit * (1 - 1e-12)) * (1 + limit) ** 2 == pytest.approx(1 / 3)
        for step in (0.02, 0.1, 0.3, limit * (1 - 1e-12)):
            x = torch.linspace(0, 1 + step, 20_001, dtype=F64)
            y = soft_cap_by_hand(x, soft_cap_strength(1.0, lr=step))
            assert (y.diff() >= -1e-12).all()
            assert y.max() <= 1 + 1e-12
        # The same coupling at a step of 0.35 would let values in between out.
        t = brentq(lambda t: 3 * t**2 - 3 * t**3 + t**4 - 0.35 / 1.35, 0, 1)
        x = torch.linspace(0, 1.35, 20_001, dtype=F64)
        assert soft_cap_by_hand(x, t / 1.35**2).max() > 1.0015

    @pytest.mark.untyped
    def test_a_step_that_is_too_large_is_refused_with_a_way_out(self):
        with pytest.raises(ValueError, match=r"at most 0\.6129 .* got 1: use SpectralHardCap"):
            SpectralSoftCap(2.0)(torch.eye(3), lr=1.0)

    def test_it_acts_on_singular_values_and_leaves_their_vectors(self):
        weight, u, v = with_singular_values([1.1, 0.8, 0.3], 6, 6)
        capped = SpectralSoftCap(1.0)(weight, lr=0.1)
        alpha = soft_cap_strength(1.0, lr=0.1)
        wanted = soft_cap_by_hand(torch.tensor([1.1, 0.8, 0.3], dtype=F64), alpha)
        assert torch.allclose(capped, u * wanted @ v.T, atol=1e-9)

    @pytest.mark.parametrize("lr", [0.01, 0.1, 0.3])
    def test_half_way_to_the_bound_values_change_by_less_than_one_percent(self, lr):
        assert soft_cap_by_hand(0.5, soft_cap_strength(1.0, lr=lr)) > 0.99 * 0.5

    def test_without_a_step_a_weight_within_the_bound_is_left_alone(self):
        weight, _, _ = with_singular_values([0.8, 0.4], 6, 6)
        assert torch.equal(SpectralSoftCap(1.0)(weight), weight)
        assert soft_cap_strength(1.0, lr=0.0) == 0
        assert soft_cap_strength(1.0, lr=0.1, weight_decay=1.0) == 0

    def test_a_weight_from_far_outside_comes_back(self):
        weight, _, _ = with_singular_values([1e3, 10.0, 0.4], 6, 6)
        assert rms_operator_norm(SpectralSoftCap(1.0)(weight, lr=0.05)) <= 1 + 1e-9

    def test_the_bound_is_in_the_norm_that_was_asked_for(self):
        weight, _, _ = with_singular_values([50.0, 1.0], 4, 16)
        for bound in (0.5, 2.0):
            assert rms_operator_norm(SpectralSoftCap(bound)(weight)) == pytest.approx(bound)
            spectral = torch.linalg.matrix_norm(SpectralSoftCap(bound, norm="l2")(weight), ord=2)
            assert spectral == pytest.approx(bound)

    @pytest.mark.parametrize("norm", ["rms", "l2"])
    def test_after_a_step_of_the_whole_weight_every_head_is_within_the_bound(self, norm):
        torch.manual_seed(0)
        cap = SpectralSoftCap(2.0, heads=4, norm=norm)
        weight = cap(torch.randn(16, 16, dtype=F64) * 9)
        for _ in range(50):
            # The worst update: one that has all heads agree with where they are.
            update = orthogonalize(torch.randn(16, 16, dtype=F64)) if torch.rand(()) < 0.5 else orthogonalize(weight)
            weight = cap(weight + 0.2 * update, lr=0.2)
            unit = 2.0 if norm == "rms" else 1.0
            heads = unit * torch.linalg.matrix_norm(weight.view(4, 4, 16), ord=2)
            assert heads.max() <= 2 * (1 + 1e-6)


class TestOtherProjections:
    @pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
    def test_the_exact_cap_clamps_singular_values_and_stays_put(self, shape):
        weight = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
        cap = SpectralHardCap(1.5, exact=True, norm="l2")
        u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
        assert torch.allclose(cap(weight), u * sigma.clamp(max=1.5) @ vt, rtol=0, atol=1e-10)
        assert torch.allclose(cap(cap(weight)), cap(weight), rtol=0, atol=1e-10)

    def test_the_exact_cap_is_the_matrix_sign_formula(self):
        # cap(W) = (w O + W - D sign(D)^T O) / 2 with O = sign(W), D = w O - W.
        weight, _, _ = with_singular_values([3.0, 1.7, 1.2, 0.9, 0.4, 0.1], 6, 6)
        sign = orthogonalize(weight, num_steps=12)
        rest = sign - weight
        formula = 0.5 * (sign + weight - rest @ orthogonalize(rest, num_steps=12).T @ sign)
        assert torch.allclose(SpectralHardCap(1.0, exact=True)(weight), formula, rtol=0, atol=1e-10)

    def test_the_polynomial_cap_is_near_the_exact_one_and_never_above_the_bound(self):
        values = torch.linspace(0, 5.0, 401, dtype=F64)
        capped = SpectralHardCap(2.0, norm="l2")(torch.diag(values)).diagonal()
        assert capped.max() <= 2.0
        assert ((capped - values.clamp(max=2.0)).abs() <= 0.045 * 2.0).all()

    @pytest.mark.parametrize("second", [1.0, 2.0, 2.5])
    def test_normalisation_and_hammer_agree_with_the_decomposition(self, second):
        weight, u, v = with_singular_values([3.0, second, 0.5], 8, 8, dtype=torch.float32)
        values = torch.linalg.svdvals(SpectralNormalize(1.5)(weight))
        assert values[0] == pytest.approx(1.5, rel=1e-4)
        assert values[1] == pytest.approx(second / 2, rel=1e-4)
        hammered = SpectralHammer(1.5)(weight)
        wanted = (u * torch.tensor([1.5, second, 0.5], dtype=F64) @ v.T).float()
        assert torch.allclose(hammered, wanted, atol=1e-2 if second == 2.5 else 1e-4)

    def test_normalisation_leaves_what_is_within_the_bound(self):
        weight, _, _ = with_singular_values([0.9, 0.5], 6, 6)
        assert torch.equal(SpectralNormalize(1.0)(weight), weight)

    def test_the_hammer_also_raises_and_does_not_bound_the_second(self):
        raised = torch.linalg.svdvals(SpectralHammer(2.0)(with_singular_values([1.0, 0.5], 6, 6)[0]))
        assert raised[0] == pytest.approx(2.0)
        left = torch.linalg.svdvals(SpectralHammer(1.0)(with_singular_values([3.0, 1.5], 6, 6)[0]))
        assert left[0] == pytest.approx(1.5)

    def test_spectral_weight_decay_shrinks_the_first_alone(self):
        weight, _, _ = with_singular_values([3.0, 1.5, 0.2], 6, 9)
        values = torch.linalg.svdvals(SpectralWeightDecay(0.5)(weight, lr=0.2))[:3]
        assert values.tolist() == pytest.approx([2.7, 1.5, 0.2])

    def test_stiefel_is_the_polar_factor(self):
        weight, u, v = with_singular_values([3.0, 1.0, 0.7, 0.4, 0.2, 0.1], 6, 9)
        assert torch.allclose(Stiefel(2.0, norm="l2")(weight), 2 * u @ v.T, atol=1e-10)

    def test_heads_are_treated_as_matrices_of_their_own(self):
        weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
        for build in (SpectralNormalize, SpectralHammer, SpectralHardCap, SpectralSoftCap, Stiefel):
            together = build(1.0, heads=2)(weight)
            apart = torch.cat([build(1.0)(weight[:4]), build(1.0)(weight[4:])])
            assert torch.allclose(together, apart, atol=1e-7)

    def test_a_weight_in_half_precision_is_capped_in_single(self):
        weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        capped = SpectralSoftCap(1.0)(weight, lr=0.1)
        assert torch.equal(capped, SpectralSoftCap(1.0)(weight.float(), lr=0.1).bfloat16())

    def test_projections_pass_gradients(self):
        weight, _, _ = with_singular_values([2.0, 1.0, 0.5], 3, 3)
        for projection in (
            SpectralNormalize(1.0, num_iters=60),
            SpectralHardCap(1.5, exact=True),
            SpectralHardCap(1.5),
            SpectralSoftCap(3.0),
        ):
            assert torch.autograd.gradcheck(lambda w, p=projection: p(w, lr=0.1), weight.clone().requires_grad_())

    @pytest.mark.untyped
    @pytest.mark.parametrize(
        "build", [SpectralSoftCap, SpectralHardCap, SpectralNormalize, SpectralHammer, SpectralWeightDecay, Stiefel]
    )
    def test_bad_settings_and_what_is_no_matrix_are_refused(self, build):
        with pytest.raises(ValueError, match=r"must be a matrix, .* got shape \(3,\)"):
            build(1.0)(torch.ones(3))
        with pytest.raises(ValueError, match="multiple of heads = 2 rows"):
            build(1.0, heads=2)(torch.ones(3, 3))
        with pytest.raises(ValueError, match="must be"):
            build(-1.0)
        with pytest.raises(ValueError, match="heads must be at least 1"):
            build(1.0, heads=0)
        if build is not SpectralWeightDecay:
            with pytest.raises(ValueError, match="norm must be one of 'rms', 'l2'"):
                build(1.0, norm="frobenius")
