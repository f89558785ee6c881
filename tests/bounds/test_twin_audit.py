"""The twin audit: what it promises of every estimate, its control, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimand.bounds import twin_audit
from minimand.training import mlp, seeded

DOMAIN = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)


def trained(seed=0, noise=0.0, width=64):
    """A network fitted to zero training error on part of the domain, and the world it comes from."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(8, generator=generator)
    labels = (DOMAIN @ direction > 0).long()
    flips = torch.rand(len(DOMAIN), generator=generator) < noise
    labels = torch.where(flips, 1 - labels, labels)
    drawn = torch.randperm(len(DOMAIN), generator=generator)[:60]
    model = seeded(lambda: mlp(8, 2, hidden=(width,)), seed)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(DOMAIN[drawn]), labels[drawn]).backward()
        optimizer.step()
    return model.eval(), DOMAIN[drawn], labels[drawn], (DOMAIN, labels)


@pytest.fixture(scope="module")
def world():
    return trained(noise=0.5)


@settings(max_examples=25, deadline=None)
@given(st.floats(-2, 2), st.integers(0, 1000))
def test_every_estimate_is_off_by_half_the_error_in_one_world(constant, seed):
    model, inputs, target, population = WORLD
    weights = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    measures = {
        "constant": lambda *_: constant,
        "of the training set": lambda model, inputs, target: (inputs @ weights * target).mean(),
        "of the weights": lambda model, inputs, target: next(model.parameters()).norm() * constant,
    }
    report = twin_audit(model, inputs, target, population=population, measures=measures)
    for row in report.table:
        assert row.estimate == row.twin_estimate
        assert row.error == abs(row.estimate - report.loss)
        assert row.twin_error == abs(row.estimate)
        assert row.worst >= report.floor - 1e-12
    assert report.floor == report.loss / 2


WORLD = trained(noise=0.5)


def test_the_floor_is_attained_by_half_the_error():
    model, inputs, target, population = WORLD
    loss = float((model(population[0]).argmax(1) != population[1]).double().mean())
    report = twin_audit(model, inputs, target, population=population, measures={"half": lambda *_: loss / 2})
    assert loss > 0.2
    assert report.loss == loss
    assert report["half"].worst == report.floor == loss / 2


def test_the_twin_labels_the_domain_by_the_model_and_the_training_set_as_it_was(world):
    model, inputs, target, population = world
    report = twin_audit(model, inputs, target, population=population)
    assert report.twin_loss == 0
    assert torch.equal(report.twin_target, model(population[0]).argmax(1))
    matches = (DOMAIN[:, None] == inputs).all(-1)
    for place, row in matches.nonzero():
        assert report.twin_target[place] == target[row] == population[1][place]


def test_the_hold_out_escapes_the_floor_in_both_worlds(world):
    model, inputs, target, (domain, labels) = world
    drawn = torch.randint(len(domain), (4000,), generator=torch.Generator().manual_seed(1))
    report = twin_audit(model, inputs, target, population=(domain, labels), holdout=(domain[drawn], labels[drawn]))
    control = report["hold-out"]
    assert control.twin_estimate == control.twin_error == 0.0
    assert control.error < 3 * 0.5 / 4000**0.5
    assert control.worst < report.floor / 4


def test_a_misfit_keeps_its_label_in_the_twin_of_a_finite_domain(world):
    model, inputs, target, (domain, labels) = world
    wrong = torch.arange(3)
    target = target.clone()
    target[wrong] = 1 - target[wrong]
    labels = labels.clone()
    for row in wrong:
        labels[(domain == inputs[row]).all(1)] = target[row]
    report = twin_audit(
        model,
        inputs,
        target,
        population=(domain, labels),
        measures={"zero": lambda *_: 0.0},
        holdout=(domain, labels),
        misfits="domain",
    )
    assert report.twin_loss == 3 / len(domain)
    assert report.floor == pytest.approx((report.loss - 3 / len(domain)) / 2)
    assert report["zero"].worst >= report.floor
    assert report["hold-out"].error == report["hold-out"].twin_error == 0.0
    for row in range(len(inputs)):
        assert report.twin_target[(domain == inputs[row]).all(1)] == target[row]


def test_on_unseen_inputs_misfits_do_not_matter(world):
    model, inputs, target, (domain, labels) = world
    target = target.clone()
    target[:5] = 1 - target[:5]
    unseen = ~(domain[:, None] == inputs).all(-1).any(1)
    rest = domain[unseen], labels[unseen]
    report = twin_audit(model, inputs, target, population=rest, holdout=rest, misfits="unseen")
    assert report.twin_loss == report["hold-out"].worst == 0.0
    assert report.floor == report.loss / 2 == float((model(rest[0]).argmax(1) != rest[1]).double().mean()) / 2


def test_a_measure_that_moves_the_weights_leaves_no_trace(world):
    model, inputs, target, population = world
    before = copy.deepcopy(model.state_dict())

    def destroys(model, inputs, target):
        for parameter in model.parameters():
            parameter.data.zero_()
        return 0.1

    report = twin_audit(model, inputs, target, population=population, measures={"a": destroys, "b": destroys})
    assert report["a"].estimate == report["b"].estimate == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_report_prints_a_table(world):
    model, inputs, target, population = world
    text = str(twin_audit(model, inputs, target, population=population, measures={"never": lambda *_: 0.0}))
    assert "never" in text
    assert "no function of the model and its training set" in text


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda *_: float("nan"), "'it' is nan"),
        (lambda *_: torch.tensor(float("inf")), "'it' is inf"),
        (lambda *_: torch.rand(()), "fixed seed"),
    ],
)
def test_a_measure_that_is_no_number_or_not_the_same_twice_is_refused(measure, message, world):
    model, inputs, target, population = world
    with pytest.raises(ValueError, match=message):
        twin_audit(model, inputs, target, population=population, measures={"it": measure})


@pytest.mark.untyped
def test_training_errors_training_mode_and_absent_misfits_are_refused(world):
    model, inputs, target, population = world
    wrong = target.clone()
    wrong[0] = 1 - wrong[0]
    with pytest.raises(ValueError, match="misfits 1 of 60"):
        twin_audit(model, inputs, wrong, population=population)
    elsewhere = inputs.clone()
    elsewhere[0] *= 1.5
    wrong = 1 - model(elsewhere).argmax(1)
    with pytest.raises(ValueError, match="whole domain"):
        twin_audit(model, elsewhere, wrong, population=population, misfits="domain")
    with pytest.raises(ValueError, match="misfits must be one of"):
        twin_audit(model, inputs, target, population=population, misfits="keep")
    with pytest.raises(ValueError, match="NaN"):
        twin_audit(model, inputs * float("nan"), target, population=population)
    with pytest.raises(ValueError, match="class indices"):
        twin_audit(model, inputs, target, population=(population[0], population[1] + 1))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        twin_audit(copy.deepcopy(model).train(), inputs, target, population=population)
