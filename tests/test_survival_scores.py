"""Scores of survival against lifelines, scikit-survival and brute force."""

import itertools
import math

import lifelines
import numpy as np
import pytest
import torch
from sksurv import metrics as sksurv_metrics

from minimand.survival import concordance_index, kaplan_meier, log_rank_test


def sample(count=80, *, seed=0, ties=True):
    generator = np.random.default_rng(seed)
    time = generator.exponential(size=count)
    risk = -time + generator.normal(size=count)
    if ties:
        time, risk = np.ceil(4 * time) / 4, np.round(2 * risk) / 2
    return torch.from_numpy(risk), torch.from_numpy(time), torch.from_numpy(generator.random(count) < 0.6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [2, 3, 8, 33, 200])
def test_concordance_is_scikit_survivals_with_and_without_ties(count, ties):
    for seed in range(5):
        risk, time, event = sample(count, seed=seed, ties=ties)
        event[time.argmin()] = True
        try:
            theirs = sksurv_metrics.concordance_index_censored(event.numpy(), time.numpy(), risk.numpy(), tied_tol=0.0)[
                0
            ]
        except ValueError:  # all at one time
            continue
        assert float(concordance_index(risk, time, event)) == pytest.approx(theirs, abs=1e-12)


def test_concordance_counts_pairs():
    risk, time, event = sample(40, seed=3)
    good = all_pairs = 0.0
    for i, j in itertools.permutations(range(40), 2):
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
            all_pairs += 1
            good += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    assert float(concordance_index(risk, time, event)) == pytest.approx(good / all_pairs, abs=1e-12)


def test_concordance_without_tied_events_is_lifelines_too():
    from lifelines.utils import concordance_index as theirs

    risk, time, event = sample(150, ties=False)
    ours = float(concordance_index(risk, time, event))
    assert ours == pytest.approx(theirs(time.numpy(), -risk.numpy(), event.numpy()), abs=1e-12)


def test_concordance_of_reversed_risks_is_its_complement_and_order_does_not_matter():
    risk, time, event = sample(60)
    value, order = concordance_index(risk, time, event), torch.randperm(60)
    assert float(concordance_index(-risk, time, event)) == pytest.approx(1 - float(value), abs=1e-12)
    torch.testing.assert_close(concordance_index(risk[order], time[order], event[order]), value)
    torch.testing.assert_close(concordance_index(risk.exp(), time, event), value)


def test_concordance_of_a_hundred_thousand_takes_no_square_of_memory():
    risk, time, event = sample(100_000, ties=False)
    assert 0.5 < float(concordance_index(risk, time, event)) < 1


@pytest.mark.parametrize("groups", [2, 3])
def test_log_rank_is_lifelines(groups):
    from lifelines.statistics import multivariate_logrank_test

    _, time, event = sample(120)
    group = torch.from_numpy(np.random.default_rng(5).integers(groups, size=120))
    ours = log_rank_test(time + 0.3 * group, event, group)
    theirs = multivariate_logrank_test((time + 0.3 * group).numpy(), group.numpy(), event.numpy())
    assert ours.statistic == pytest.approx(theirs.test_statistic, rel=1e-9)
    assert ours.p == pytest.approx(theirs.p_value, rel=1e-8)
    assert float(ours.observed.sum()) == pytest.approx(float(ours.expected.sum()))


def test_log_rank_is_scikit_survivals():
    from sksurv.compare import compare_survival

    _, time, event = sample(90, seed=2)
    group = torch.arange(90) % 2 == 0
    outcome = np.array(list(zip(event.tolist(), time.tolist(), strict=True)), dtype=[("e", bool), ("t", float)])
    statistic, p = compare_survival(outcome, group.numpy())
    ours = log_rank_test(time, event, group)
    assert (ours.statistic, ours.p) == (pytest.approx(statistic, rel=1e-9), pytest.approx(p, rel=1e-9))


def test_groups_alike_have_no_log_rank():
    time, event = torch.arange(1.0, 6.0).repeat(2), torch.ones(10, dtype=torch.bool)
    found = log_rank_test(time, event, torch.arange(10) // 5)
    assert (found.statistic, found.p) == (pytest.approx(0.0, abs=1e-12), pytest.approx(1.0))


def test_the_curve_and_its_interval_are_lifelines():
    _, time, event = sample(70, seed=4)
    ours = kaplan_meier(time, event)
    fitter = lifelines.KaplanMeierFitter().fit(time.numpy(), event.numpy())
    at = ours.time.numpy()
    np.testing.assert_allclose(ours.survival, fitter.survival_function_.loc[at, "KM_estimate"], atol=1e-12)
    inside = ((ours.survival > 0) & (ours.survival < 1)).numpy()
    theirs = fitter.confidence_interval_.loc[at].to_numpy()
    np.testing.assert_allclose(ours.low[inside], theirs[inside, 0], atol=1e-10)
    np.testing.assert_allclose(ours.high[inside], theirs[inside, 1], atol=1e-10)
    table = fitter.event_table.loc[at]
    assert ours.at_risk.tolist() == table["at_risk"].tolist()
    assert ours.events.tolist() == table["observed"].tolist()


def test_without_censoring_the_curve_is_the_share_still_alive():
    _, time, event = sample(50, seed=6)
    curve = kaplan_meier(time, torch.ones_like(event))
    alive = (time[None] > curve.time[:, None]).double().mean(1)
    torch.testing.assert_close(curve.survival, alive)
    assert float(curve.low[-1]) == float(curve.high[-1]) == 0


@pytest.mark.untyped
def test_what_cannot_be_scored_is_refused():
    risk, time, event = sample(5)
    broken = time.clone()
    broken[0] = math.nan
    none = torch.zeros(5, dtype=torch.bool)
    for call, message in (
        (lambda: concordance_index(risk, broken, event), "time contains NaN"),
        (lambda: concordance_index(risk / 0, time, event), "log_risk contains NaN"),
        (lambda: concordance_index(risk, time[:3], event), "time must have shape"),
        (lambda: concordance_index(risk, time, 2 * torch.ones(5)), "booleans, or 0 and 1"),
        (lambda: concordance_index(risk, time, none), "no pair is comparable"),
        (lambda: log_rank_test(time, none, none.long()), "at least two groups"),
        (lambda: log_rank_test(time, none, torch.arange(5)), "no event"),
        (lambda: log_rank_test(time, event, risk), "booleans or integers"),
        (lambda: kaplan_meier(broken, event), "time contains NaN"),
        (lambda: kaplan_meier(time, event, level=1.0), "level must lie in"),
        (lambda: kaplan_meier(time[:0], event[:0]), "time is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
