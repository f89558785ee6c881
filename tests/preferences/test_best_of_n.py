"""Best-of-n against brute force, order statistics and exact divergences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.preferences import (
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_weights,
    expected_best_of_n,
)

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 5, 100, 6000, 12_599, 12_600])
def test_weights_of_ranks_are_a_ratio_of_binomials_and_add_up_to_one(n):
    weights = best_of_n_weights(12_600, n)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (weights >= 0).all()
    assert (weights[: n - 1] == 0).all()
    assert weights[-1].item() == pytest.approx(n / 12_600, rel=1e-14)
    for rank in {n, min(n + 7, 12_600), 12_000 + n // 21}:
        exact = math.comb(rank - 1, n - 1) * 10**40 // math.comb(12_600, n) / 1e40
        assert weights[rank - 1].item() == pytest.approx(exact, rel=1e-10, abs=1e-38)


def test_the_best_of_one_is_the_mean_and_the_best_of_all_is_the_favourite_of_the_proxy():
    proxy, gold = normal(6, 50), normal(6, 50, seed=1)
    torch.testing.assert_close(expected_best_of_n(proxy, gold, 1), gold.mean(1), rtol=0, atol=1e-12)
    favourite = gold.gather(1, best_of_n(proxy)[:, None])[:, 0]
    torch.testing.assert_close(expected_best_of_n(proxy, gold, 50), favourite, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", range(1, 9))
def test_the_estimate_is_the_mean_over_all_subsets(n):
    proxy, gold = normal(3, 8), normal(3, 8, seed=1)
    subsets = torch.tensor(list(itertools.combinations(range(8), n)))
    chosen = proxy[:, subsets].argmax(-1)
    brute = gold[:, subsets].gather(-1, chosen[..., None])[..., 0].mean(1)
    torch.testing.assert_close(expected_best_of_n(proxy, gold, n), brute, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(ranks=st.lists(st.integers(0, 3), min_size=2, max_size=7), data=st.data())
def test_ties_of_the_proxy_are_broken_by_lot(ranks, data):
    n = data.draw(st.integers(1, len(ranks)))
    proxy, gold = torch.tensor(ranks, dtype=F64), normal(len(ranks))
    expected = []
    for subset in itertools.combinations(range(len(ranks)), n):
        best = max(ranks[i] for i in subset)
        tied = [gold[i].item() for i in subset if ranks[i] == best]
        expected.append(sum(tied) / len(tied))
    found = expected_best_of_n(proxy, gold, n).item()
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_the_best_of_n_uniform_scores_is_n_over_n_plus_one():
    # At the expected order statistics i / (N + 1) the estimate is n / (n + 1) exactly.
    scores = torch.arange(1, 101, dtype=F64)[torch.randperm(100, generator=torch.Generator().manual_seed(0))] / 101
    for n in (1, 3, 10, 100):
        assert expected_best_of_n(scores, scores, n).item() == pytest.approx(n / (n + 1), abs=1e-12)
    drawn = torch.rand(400, 500, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert expected_best_of_n(drawn, drawn, 7).mean().item() == pytest.approx(7 / 8, abs=2e-3)


def test_a_proxy_that_knows_nothing_gains_nothing_and_one_that_is_wrong_loses():
    proxy, gold = normal(50, 400), normal(50, 400, seed=1)
    curve = best_of_n_curve(proxy, gold, [1, 4, 16, 64])
    assert (curve.gold - gold.mean()).abs().max() < 0.1
    assert (curve.proxy.diff() > 0.5).all()
    wrong = best_of_n_curve(proxy, -proxy, [1, 4, 16, 64])
    torch.testing.assert_close(wrong.gold, -wrong.proxy)


def test_the_curve_holds_the_means_over_prompts():
    proxy, gold = normal(2, 3, 20), normal(2, 3, 20, seed=1)
    curve = best_of_n_curve(proxy, gold, [1, 5, 20])
    assert curve.n == (1, 5, 20)
    for column, n in enumerate(curve.n):
        assert curve.gold[column].item() == pytest.approx(expected_best_of_n(proxy, gold, n).mean().item())
        assert curve.proxy[column].item() == pytest.approx(expected_best_of_n(proxy, proxy, n).mean().item())
        assert curve.kl[column].item() == pytest.approx(best_of_n_kl(n))
    assert torch.isfinite(curve.gold).all()


def test_an_affine_gold_score_goes_through_and_a_monotone_proxy_decides_alike():
    proxy, gold = normal(4, 30), normal(4, 30, seed=1)
    found = expected_best_of_n(proxy, gold, 6)
    torch.testing.assert_close(expected_best_of_n(proxy.exp(), gold, 6), found)
    torch.testing.assert_close(expected_best_of_n(proxy, 3 * gold - 2, 6), 3 * found - 2)


def test_inputs_are_left_as_they_are():
    proxy, gold = normal(4, 30), normal(4, 30, seed=1)
    before = proxy.clone(), gold.clone()
    best_of_n(proxy, 3)
    best_of_n_curve(proxy, gold, [2, 3])
    assert torch.equal(proxy, before[0])
    assert torch.equal(gold, before[1])


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=40), n=st.integers(1, 200))
def test_the_divergence_bounds_the_exact_one_over_finitely_many_answers(weights, n):
    p = torch.tensor(weights, dtype=F64)
    p = p / p.sum()
    upper = p.cumsum(0).clamp_max(1)
    q = upper**n - (upper - p).clamp_min(0) ** n
    exact = torch.special.xlogy(q, q / p).sum().item()
    assert exact <= best_of_n_kl(n) + 1e-9


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_divergence_is_that_of_the_density_of_the_largest_of_n(n):
    # The largest of n uniform numbers has density n u^(n-1); KL = integral of it times its logarithm.
    answers = 200_000
    u = (torch.arange(answers, dtype=F64) + 0.5) / answers
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(torch.special.xlogy(density, density).mean().item(), abs=1e-4)


def test_the_first_n_answers_are_looked_at_and_the_first_of_equal_ones_is_chosen():
    proxy = torch.tensor([[1.0, 3.0, 3.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    assert best_of_n(proxy, 3).tolist() == [1, 0]
    assert best_of_n(proxy).tolist() == [3, 0]
    assert best_of_n(proxy[0]).item() == 3


SCORES = torch.ones(2, 5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: best_of_n(SCORES, 6), ValueError, "n must be between 1 and the number of answers, 5, got 6"),
        (lambda: best_of_n(SCORES, 0), ValueError, "n must be between"),
        (lambda: best_of_n(SCORES.log() / 0, 2), ValueError, "proxy contains NaN"),
        (lambda: best_of_n(SCORES[:0], 2), ValueError, "proxy is empty"),
        (lambda: best_of_n(torch.tensor(1.0)), ValueError, "proxy must have shape"),
        (lambda: best_of_n(SCORES.long()), TypeError, "floating-point"),
        (lambda: best_of_n_weights(5, 6), ValueError, "n must be between"),
        (lambda: best_of_n_kl(0), ValueError, "n must be at least 1, got 0"),
        (lambda: best_of_n_kl(2.5), TypeError, "n must be an integer"),
        (lambda: expected_best_of_n(SCORES, SCORES[:, :4], 2), ValueError, "gold must have the shape of proxy"),
        (lambda: expected_best_of_n(SCORES, SCORES, 6), ValueError, "n must be between"),
        (lambda: best_of_n_curve(SCORES, SCORES, []), ValueError, "at least one size"),
        (lambda: best_of_n_curve(SCORES, SCORES, [1, 6]), ValueError, "n must be between"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
