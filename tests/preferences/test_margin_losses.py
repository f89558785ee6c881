"""The baselines on pairs: their derivatives, the limits that make one of them another, and where each is at rest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimand.preferences import (
    CPOLoss,
    DPOLoss,
    DPOPLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    RDPOLoss,
    RRHFLoss,
    SFTLoss,
    SimPOLoss,
    SLiCLoss,
    SPPOLoss,
    cpo_loss,
    dpo_loss,
    dpop_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    rdpo_loss,
    rrhf_loss,
    sft_loss,
    simpo_loss,
    slic_loss,
    sppo_loss,
)


def sigma(z):
    return 1 / (1 + math.exp(-z))


def slope_of_log_odds(logp):
    return 1 / (1 - math.exp(logp))


def log_odds(logp):
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


# Each row: the objective; its value; and minus its derivative in log pi_w and its derivative in log pi_l, all written
# out for one pair with u = log-ratio, w = log pi_w, r = log pi_l, n and m the lengths.
TABLE = {
    "dpo": (
        DPOLoss(0.3),
        lambda p: -math.log(sigma(0.3 * p.margin)),
        lambda p: (0.3 * sigma(-0.3 * p.margin), 0.3 * sigma(-0.3 * p.margin)),
    ),
    "conservative dpo": (
        DPOLoss(0.3, label_smoothing=0.2),
        lambda p: -0.8 * math.log(sigma(0.3 * p.margin)) - 0.2 * math.log(sigma(-0.3 * p.margin)),
        lambda p: (0.3 * (sigma(-0.3 * p.margin) - 0.2),) * 2,
    ),
    "ipo": (
        IPOLoss(0.3),
        lambda p: (p.margin - 1 / 0.6) ** 2,
        lambda p: (2 * (1 / 0.6 - p.margin),) * 2,
    ),
    "ipo per token": (
        IPOLoss(0.3, length_normalized=True),
        lambda p: (p.u / p.n - p.v / p.m - 1 / 0.6) ** 2,
        lambda p: (
            2 * (1 / 0.6 - p.u / p.n + p.v / p.m) / p.n,
            2 * (1 / 0.6 - p.u / p.n + p.v / p.m) / p.m,
        ),
    ),
    "hinge": (
        HingeLoss(0.3),
        lambda p: max(0, 1 - 0.3 * p.margin),
        lambda p: (0.3 * (0.3 * p.margin < 1),) * 2,
    ),
    "dpop": (
        DPOPLoss(0.3, penalty=2.0),
        lambda p: -math.log(sigma(0.3 * (p.margin - 2 * max(0, -p.u)))),
        lambda p: (
            0.3 * sigma(-0.3 * (p.margin - 2 * max(0, -p.u))) * (1 + 2 * (p.u < 0)),
            0.3 * sigma(-0.3 * (p.margin - 2 * max(0, -p.u))),
        ),
    ),
    "rdpo": (
        RDPOLoss(0.3, length_penalty=0.2),
        lambda p: -math.log(sigma(0.3 * p.margin + 0.2 * (p.n - p.m))),
        lambda p: (0.3 * sigma(-0.3 * p.margin - 0.2 * (p.n - p.m)),) * 2,
    ),
    "sppo": (
        SPPOLoss(0.3),
        lambda p: (p.u - 1 / 0.6) ** 2 + (p.v + 1 / 0.6) ** 2,
        lambda p: (2 * (1 / 0.6 - p.u), 2 * (p.v + 1 / 0.6)),
    ),
    "kto": (
        KTOLoss(0.3, desirable_weight=1.5, undesirable_weight=0.7),
        lambda p: 0.75 * sigma(0.3 * (max(0, p.v) - p.u)) + 0.35 * sigma(0.3 * (p.v - max(0, p.u))),
        lambda p: (
            0.75 * 0.3 * sigma(0.3 * (max(0, p.v) - p.u)) * sigma(-0.3 * (max(0, p.v) - p.u)),
            0.35 * 0.3 * sigma(0.3 * (p.v - max(0, p.u))) * sigma(-0.3 * (p.v - max(0, p.u))),
        ),
    ),
    "sft": (SFTLoss(), lambda p: -p.w, lambda p: (1, 0)),
    "sft per token": (SFTLoss("length"), lambda p: -p.w / p.n, lambda p: (1 / p.n, 0)),
    "slic": (
        SLiCLoss(1.0, sft_weight=0.4),
        lambda p: max(0, 1 - p.w + p.r) - 0.4 * p.w,
        lambda p: ((p.w - p.r < 1) + 0.4, float(p.w - p.r < 1)),
    ),
    "cpo": (
        CPOLoss(0.3, sft_weight=0.4),
        lambda p: -math.log(sigma(0.3 * (p.w - p.r))) - 0.4 * p.w,
        lambda p: (0.3 * sigma(-0.3 * (p.w - p.r)) + 0.4, 0.3 * sigma(-0.3 * (p.w - p.r))),
    ),
    "simpo": (
        SimPOLoss(2.5, target_margin=0.8),
        lambda p: -math.log(sigma(2.5 * (p.w / p.n - p.r / p.m) - 0.8)),
        lambda p: (
            2.5 * sigma(0.8 - 2.5 * (p.w / p.n - p.r / p.m)) / p.n,
            2.5 * sigma(0.8 - 2.5 * (p.w / p.n - p.r / p.m)) / p.m,
        ),
    ),
    "orpo": (
        ORPOLoss(0.4),
        lambda p: -p.w / p.n - 0.4 * math.log(sigma(log_odds(p.w / p.n) - log_odds(p.r / p.m))),
        lambda p: (
            1 / p.n + 0.4 * sigma(log_odds(p.r / p.m) - log_odds(p.w / p.n)) * slope_of_log_odds(p.w / p.n) / p.n,
            0.4 * sigma(log_odds(p.r / p.m) - log_odds(p.w / p.n)) * slope_of_log_odds(p.r / p.m) / p.m,
        ),
    ),
    "rrhf": (
        RRHFLoss(0.4),
        lambda p: max(0, p.r / p.m - p.w / p.n) - 0.4 * p.w,
        lambda p: ((p.r / p.m > p.w / p.n) / p.n + 0.4, (p.r / p.m > p.w / p.n) / p.m),
    ),
}


class Pair:
    def __init__(self, w, r, ref_w, ref_l, n, m):
        self.w, self.r, self.n, self.m = w, r, n, m
        self.u, self.v = w - ref_w, r - ref_l
        self.margin = self.u - self.v


number = st.floats(-12, -0.5)
length = st.integers(1, 9)


@pytest.mark.parametrize("name", TABLE)
@given(w=number, r=number, ref_w=number, ref_l=number, n=length, m=length)
def test_values_and_derivatives_are_those_of_the_table(name, w, r, ref_w, ref_l, n, m):
    loss, value, slopes = TABLE[name]
    pair = Pair(w, r, ref_w, ref_l, n, m)
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (w, r))
    found = loss(
        chosen,
        rejected,
        *(torch.tensor([x], dtype=torch.float64) for x in (ref_w, ref_l)),
        chosen_lengths=torch.tensor([n]),
        rejected_lengths=torch.tensor([m]),
    )
    at_a_kink = min(abs(pair.u), abs(0.3 * pair.margin - 1), abs(w - r - 1), abs(r / m - w / n)) < 1e-9
    assert found.item() == pytest.approx(value(pair), abs=1e-10, rel=1e-10)
    if not at_a_kink:
        found.backward()
        got = (-chosen.grad.item(), 0.0 if rejected.grad is None else rejected.grad.item())
        assert got == pytest.approx(slopes(pair), abs=1e-10, rel=1e-10)


def rows(seed=0, batch=64):
    generator = torch.Generator().manual_seed(seed)
    return [-8 * torch.rand(batch, generator=generator, dtype=torch.float64) - 0.1 for _ in range(4)]


def lengths(seed=1, batch=64):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randint(1, 9, (batch,), generator=generator) for key in ("chosen_lengths", "rejected_lengths")}


def answers(generator=None):
    """A prompt with six answers of known reward, length and probability under the reference."""
    generator = generator or torch.Generator().manual_seed(3)
    reference = torch.rand(6, generator=generator, dtype=torch.float64).log_softmax(0)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    return reference, reward, torch.tensor([1, 2, 3, 5, 8, 13])


def test_the_optimal_policy_of_a_regularised_reward_has_dpos_loss_of_the_bradley_terry_model():
    reference, reward, _ = answers()
    optimal = (reference + reward / 0.3).log_softmax(0)
    first, second = torch.triu_indices(6, 6, 1)
    found = dpo_loss(optimal[first], optimal[second], reference[first], reference[second], beta=0.3)
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(reward[first] - reward[second]))


def test_the_optimal_policy_of_a_reward_that_pays_for_length_has_rdpos_loss_of_the_bradley_terry_model():
    reference, reward, length = answers()
    optimal = (reference + (reward - 0.2 * length) / 0.3).log_softmax(0)
    first, second = torch.triu_indices(6, 6, 1)
    found = rdpo_loss(
        optimal[first],
        optimal[second],
        reference[first],
        reference[second],
        chosen_lengths=length[first],
        rejected_lengths=length[second],
        beta=0.3,
        length_penalty=0.2,
    )
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(reward[first] - reward[second]))


def test_dpo_that_doubts_its_labels_rests_at_the_log_odds_of_a_right_label():
    margin = torch.tensor([math.log(0.9 / 0.1) / 0.5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo_loss(margin, zero, zero, zero, beta=0.5, label_smoothing=0.1).backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_ipo_rests_at_half_a_temperature_and_sppo_at_the_same_on_each_side():
    w, r, ref_w, ref_l = rows()
    margin = (w - ref_w) - (r - ref_l)
    moved = w + (1 / 0.6 - margin)
    assert ipo_loss(moved, r, ref_w, ref_l, beta=0.3).abs().max() < 1e-20
    assert sppo_loss(ref_w + 1 / 0.6, ref_l - 1 / 0.6, ref_w, ref_l, beta=0.3).abs().max() < 1e-20


def test_limits_that_make_one_objective_another():
    w, r, ref_w, ref_l = rows()
    known = lengths()
    dpo = dpo_loss(w, r, ref_w, ref_l, beta=0.3)
    torch.testing.assert_close(dpop_loss(w, r, ref_w, ref_l, beta=0.3, penalty=0.0), dpo)
    above = torch.maximum(w, ref_w)
    torch.testing.assert_close(dpop_loss(above, r, ref_w, ref_l, beta=0.3), dpo_loss(above, r, ref_w, ref_l, beta=0.3))
    torch.testing.assert_close(rdpo_loss(w, r, ref_w, ref_l, beta=0.3, length_penalty=0.0, **known), dpo)
    same = dict.fromkeys(known, known["chosen_lengths"])
    torch.testing.assert_close(rdpo_loss(w, r, ref_w, ref_l, beta=0.3, **same), dpo)
    ones = {key: torch.ones_like(value) for key, value in known.items()}
    torch.testing.assert_close(
        ipo_loss(w, r, ref_w, ref_l, length_normalized=True, **ones), ipo_loss(w, r, ref_w, ref_l)
    )
    uniform = torch.full_like(w, -3.0)
    torch.testing.assert_close(cpo_loss(w, r, beta=0.3, sft_weight=0.0), dpo_loss(w, r, uniform, uniform, beta=0.3))
    torch.testing.assert_close(
        simpo_loss(w, r, beta=0.3, target_margin=0.0, **ones), cpo_loss(w, r, beta=0.3, sft_weight=0.0)
    )
    torch.testing.assert_close(
        slic_loss(w, r, margin=1.0, sft_weight=0.0), hinge_loss(w, r, uniform, uniform, beta=1.0)
    )
    torch.testing.assert_close(slic_loss(w, r, margin=0.0, sft_weight=0.4), rrhf_loss(w, r, sft_weight=0.4, **ones))
    torch.testing.assert_close(
        orpo_loss(w, r, odds_weight=0.0, **known),
        sft_loss(w, normalization="length", chosen_lengths=known["chosen_lengths"]),
    )


def test_supervised_losses_add_up_by_answer_or_by_token():
    w, number = rows()[0], lengths()["chosen_lengths"]
    by_token = sft_loss(w, chosen_lengths=number, normalization="batch").mean()
    torch.testing.assert_close(by_token, -w.sum() / number.sum())
    torch.testing.assert_close(sft_loss(w, chosen_lengths=number, normalization="length"), -w / number)
    loss = CPOLoss(0.3, sft_weight=0.4, normalization="batch")
    torch.testing.assert_close(
        loss(*rows()[:2], **lengths()), cpo_loss(*rows()[:2], beta=0.3, sft_weight=0.0).mean() + 0.4 * by_token
    )


def test_kto_values_an_answer_as_likely_as_its_baseline_at_one_half_and_never_more_than_its_weight():
    w, r, ref_w, ref_l = rows()
    even = kto_loss(ref_w + 1.5, ref_l + 1.5, ref_w, ref_l, baseline=1.5, desirable_weight=1.2, undesirable_weight=0.6)
    torch.testing.assert_close(even, torch.full_like(even, 0.45))
    found = kto_loss(1e3 * w, 1e3 * r, ref_w, ref_l, baseline=0.0, desirable_weight=1.2, undesirable_weight=0.6)
    assert (found >= 0).all()
    assert (found <= 0.9).all()


def test_no_gradient_flows_through_ktos_baseline_and_a_scalar_serves_as_well():
    w, r, ref_w, ref_l = rows()
    w.requires_grad_()
    baseline = kto_baseline(w + 5, ref_w)
    assert baseline.item() == pytest.approx((w + 5 - ref_w).mean().item())
    assert not baseline.requires_grad
    assert kto_baseline(w - 50, ref_w).item() == 0.0
    learning = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    kto_loss(w, r, ref_w, ref_l, baseline=learning).sum().backward()
    assert learning.grad is None
    torch.testing.assert_close(
        kto_loss(w, r, ref_w, ref_l, baseline=learning), kto_loss(w, r, ref_w, ref_l, baseline=0.7)
    )
    by_hand = kto_loss(w, r, ref_w, ref_l, baseline=0.7, beta=0.3).mean()
    torch.testing.assert_close(KTOLoss(0.3)(w, r, ref_w, ref_l, baseline=0.7), by_hand)


def test_ktos_own_baseline_judges_each_kind_by_the_mean_of_the_other():
    w, r, ref_w, ref_l = rows()
    r = r + 9  # so that the baseline of the chosen answers is above 0
    upper, lower = (r - ref_l).mean(), (w - ref_w).mean().clamp_min(0)
    expected = (torch.sigmoid(0.1 * (upper - w + ref_w)) + torch.sigmoid(0.1 * (r - ref_l - lower))) / 2
    assert upper > 0
    torch.testing.assert_close(kto_loss(w, r, ref_w, ref_l), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_stay_finite_where_the_policy_is_certain_and_where_it_gives_up(dtype):
    w, r = (
        torch.tensor(x, dtype=dtype, requires_grad=True) for x in ([0.0, -1e4, -0.69, -1e-12], [-1e4, 0.0, -0.7, 0.0])
    )
    ones = torch.ones(4, dtype=torch.long)
    found = orpo_loss(w, r, chosen_lengths=ones, rejected_lengths=ones)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(w.grad).all()
    assert torch.isfinite(r.grad).all()


@pytest.mark.parametrize("name", TABLE)
def test_losses_are_finite_however_sure_the_policy_is(name):
    w, r = (torch.tensor(x, requires_grad=True) for x in ([0.0, -1e4], [-1e4, 0.0]))
    ones = torch.ones(2, dtype=torch.long)
    found = TABLE[name][0](
        w, r, torch.full((2,), -5.0), torch.full((2,), -5.0), chosen_lengths=ones, rejected_lengths=ones
    )
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(w.grad).all()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IPOLoss(0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda: HingeLoss(-1.0), "beta must"),
        (lambda: DPOPLoss(penalty=-1.0), "penalty must be a finite number of at least 0"),
        (lambda: RDPOLoss(length_penalty=-1.0), "length_penalty must"),
        (lambda: SPPOLoss(float("nan")), "beta must"),
        (lambda: KTOLoss(desirable_weight=-1.0), "desirable_weight must"),
        (lambda: KTOLoss(undesirable_weight=-1.0), "undesirable_weight must"),
        (lambda: SLiCLoss(-1.0), "margin must"),
        (lambda: SLiCLoss(sft_weight=-1.0), "sft_weight must"),
        (lambda: CPOLoss(normalization="tokens"), "normalization must be one of"),
        (lambda: SFTLoss("tokens"), "normalization must be one of"),
        (lambda: SimPOLoss(target_margin=-1.0), "target_margin must"),
        (lambda: ORPOLoss(-1.0), "odds_weight must"),
        (lambda: RRHFLoss(-1.0), "sft_weight must"),
        (lambda: kto_loss(*rows(), baseline=-0.1), "baseline must be a finite number of nats of at least 0"),
        (lambda: kto_loss(*rows(), baseline=float("nan")), "baseline must"),
        (lambda: ipo_loss(*rows(), length_normalized=True), "chosen_lengths is missing"),
        (lambda: sft_loss(rows()[0], normalization="batch"), "chosen_lengths is missing"),
        (lambda: kto_baseline(rows()[0], rows()[0][:3]), "ref_logp_mismatched must have shape"),
        (lambda: kto_baseline(rows()[0][:0], rows()[0][:0]), "logp_mismatched is empty"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_objects_say_their_settings_and_what_they_need():
    assert "length_normalized=True" in repr(IPOLoss(length_normalized=True))
    assert IPOLoss(length_normalized=True).needs_lengths
    assert not IPOLoss().needs_lengths
    assert SFTLoss("batch").needs_lengths
    assert not SFTLoss().needs_reference
    assert repr(ORPOLoss()) == "ORPOLoss(odds_weight=0.1, normalization='length')"
