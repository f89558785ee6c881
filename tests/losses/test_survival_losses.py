"""Cox's partial likelihood and discrete hazards against lifelines, scikit-survival and the formulas by hand."""

import math

import numpy as np
import pytest
import torch

from minimand.losses import (
    CoxPHLoss,
    DiscreteHazardLoss,
    cox_ph_loss,
    discrete_hazard_loss,
    event_time_edges,
    hazard_survival,
)


def sample(count=30, *, ties=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    time = torch.rand(count, generator=generator, dtype=torch.float64)
    if ties:
        time = (6 * time).ceil()
    log_risk = torch.randn(count, generator=generator, dtype=torch.float64)
    return log_risk, time, torch.rand(count, generator=generator) < 0.7


def by_hand(log_risk, time, event, ties):
    """The definition, event time by event time."""
    total = 0.0
    for t in set(time[event].tolist()):
        risk = log_risk[time >= t].exp().sum()
        tied = log_risk[(time == t) & event]
        for k in range(len(tied)):
            share = k / len(tied) if ties == "efron" else 0.0
            total += float((risk - share * tied.exp().sum()).log() - tied[k])
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_the_loss_is_the_definition(ties, tied):
    log_risk, time, event = sample(ties=tied)
    expected = by_hand(log_risk, time, event, ties)
    assert float(cox_ph_loss(log_risk, time, event, ties=ties, reduction="sum")) == pytest.approx(expected, abs=1e-9)
    mean = cox_ph_loss(log_risk, time, event, ties=ties)
    assert float(mean) == pytest.approx(expected / int(event.sum()), abs=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_efrons_loss_is_lifelines_likelihood(tied):
    import lifelines
    import pandas

    x, time, event = sample(ties=tied)
    frame = pandas.DataFrame({"x": x.numpy(), "t": time.numpy(), "e": event.numpy()})
    fitted = lifelines.CoxPHFitter().fit(frame, "t", "e")
    log_risk = x * float(fitted.params_["x"])
    ours = cox_ph_loss(log_risk, time, event, ties="efron", reduction="sum")
    assert -float(ours) == pytest.approx(fitted.log_likelihood_, abs=1e-6)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_the_gradient_is_zero_where_scikit_survivals_estimate_is(ties):
    from sksurv import linear_model

    x, time, event = sample(60, ties=True)
    outcome = np.array(list(zip(event.tolist(), time.tolist(), strict=True)), dtype=[("e", bool), ("t", float)])
    model = linear_model.CoxPHSurvivalAnalysis(ties=ties, tol=1e-12).fit(x.numpy()[:, None], outcome)
    weight = torch.tensor(float(model.coef_[0]), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cox_ph_loss(weight * x, time, event, ties=ties, reduction="sum"), weight)
    assert float(gradient) == pytest.approx(0.0, abs=1e-6)


def test_without_ties_all_ways_to_treat_them_agree():
    log_risk, time, event = sample()
    values = [float(cox_ph_loss(log_risk, time, event, ties=ties)) for ties in ("none", "breslow", "efron")]
    assert values == pytest.approx([values[0]] * 3, abs=1e-12)


def test_with_none_order_in_the_batch_tells_ties_apart():
    log_risk = torch.tensor([0.0, 1.0, 2.0]).double()
    time, event = torch.ones(3), torch.tensor([True, True, True])
    expected = log_risk.logcumsumexp(0) - log_risk
    torch.testing.assert_close(cox_ph_loss(log_risk, time, event, ties="none", reduction="none"), expected)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_the_order_of_the_batch_and_a_constant_do_not_matter(ties):
    log_risk, time, event = sample(ties=True)
    losses = cox_ph_loss(log_risk, time, event, ties=ties, reduction="none")
    order = torch.randperm(30)
    again = cox_ph_loss(log_risk[order] + 7, time[order].exp(), event[order].long(), ties=ties, reduction="none")
    torch.testing.assert_close(again, losses[order])
    assert float(losses[~event].abs().max()) == 0


@pytest.mark.parametrize("ties", ["none", "breslow", "efron"])
def test_gradients_are_exact(ties):
    log_risk, time, event = sample(12, ties=True)
    assert torch.autograd.gradcheck(
        lambda r: cox_ph_loss(r, time, event, ties=ties), (log_risk.requires_grad_(),), atol=1e-6
    )


@pytest.mark.parametrize("ties", ["none", "breslow", "efron"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_log_risks_stay_finite(ties, dtype):
    log_risk = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4], dtype=dtype, requires_grad=True)
    time, event = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0]), torch.tensor([1, 1, 0, 1, 1])
    loss = CoxPHLoss(ties)(log_risk, time, event)
    loss.backward()
    assert loss.dtype == dtype
    assert torch.isfinite(loss)
    assert torch.isfinite(log_risk.grad).all()


def test_a_batch_without_events_costs_nothing_and_says_so():
    log_risk = torch.randn(4, requires_grad=True)
    with pytest.warns(UserWarning, match="no event"):
        loss = CoxPHLoss()(log_risk, torch.arange(4.0), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(log_risk.grad, torch.zeros(4))


def test_a_risk_is_given_the_losses_of_events():
    log_risk, time, event = sample()
    worst = CoxPHLoss(reduction=torch.max)(log_risk, time, event)
    assert float(worst) == float(CoxPHLoss(reduction="none")(log_risk, time, event)[event].max())


def test_hazards_cost_minus_the_log_of_their_likelihood():
    logits = torch.randn(3, 4, dtype=torch.float64)
    h = torch.sigmoid(logits)
    losses = discrete_hazard_loss(logits, torch.tensor([0, 2, 3]), torch.tensor([True, True, False]), reduction="none")
    expected = torch.stack(
        [
            -h[0, 0].log(),
            -((1 - h[1, 0]) * (1 - h[1, 1]) * h[1, 2]).log(),
            -(1 - h[2]).prod().log(),
        ]
    )
    torch.testing.assert_close(losses, expected)
    survival = hazard_survival(logits)
    torch.testing.assert_close(survival, (1 - h).cumprod(1))


def test_the_best_constant_hazards_are_those_of_kaplan_and_meier():
    from minimand.survival import kaplan_meier

    generator = torch.Generator().manual_seed(0)
    interval = torch.randint(4, (200,), generator=generator)
    event = torch.rand(200, generator=generator) < 0.6
    curve = kaplan_meier(interval, event)
    logits = torch.logit(curve.events / curve.at_risk).requires_grad_()
    DiscreteHazardLoss()(logits.double().expand(200, 4), interval, event).backward()
    assert float(logits.grad.abs().max()) < 1e-7


def test_hazards_of_huge_logits_stay_finite_and_gradients_are_exact():
    interval, event = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
    huge = torch.tensor([[1e4, -1e4, 0.0]]).repeat(3, 1).requires_grad_()
    DiscreteHazardLoss()(huge, interval, event).backward()
    assert torch.isfinite(huge.grad).all()
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: discrete_hazard_loss(x, interval, event), (logits,))


def test_edges_split_the_events_evenly():
    time = torch.arange(1.0, 101.0)
    event = torch.arange(100) % 2 == 0
    edges = event_time_edges(time, event, num_bins=5)
    counts = torch.bincount(torch.bucketize(time[event], edges, right=True))
    assert counts.tolist() == [10] * 5
    assert len(event_time_edges(torch.ones(4), torch.ones(4, dtype=torch.bool))) == 1


@pytest.mark.untyped
def test_what_is_no_survival_data_is_refused():
    log_risk, time, event = sample(4)
    logits = torch.zeros(4, 3)
    for call, message in (
        (lambda: cox_ph_loss(log_risk / 0, time, event), "log_risk contains NaN"),
        (lambda: cox_ph_loss(log_risk[:, None], time, event), "log_risk must have shape"),
        (lambda: cox_ph_loss(log_risk, time * math.nan, event), "time contains NaN"),
        (lambda: cox_ph_loss(log_risk, time, event[:2]), "event must have shape"),
        (lambda: cox_ph_loss(log_risk, time, 3 * event.long()), "0 and 1"),
        (lambda: CoxPHLoss("exact"), "ties must be one of"),
        (lambda: CoxPHLoss(reduction="max"), "reduction must be"),
        (lambda: discrete_hazard_loss(logits, torch.tensor([0, 1, 2, 3]), event), "interval must lie in"),
        (lambda: discrete_hazard_loss(logits, time, event), "interval hold integers"),
        (lambda: discrete_hazard_loss(logits / 0, torch.zeros(4).long(), event), "NaN"),
        (lambda: event_time_edges(time, torch.zeros(4)), "no event"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
