"""Auditing a trained model: reading it, halving what it has not seen, and what is promised in both worlds."""

import functools
import json
import math
import sys

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from minimand import ObjectiveClassifier
from minimand.bench import Run, make_record, run
from minimand.bench.promises import (
    AT_BEST,
    HOLD_OUT,
    HOLD_OUT_BOUND,
    METRICS,
    PAC_BAYES,
    SPECTRAL,
    Promise,
    audit_figure,
    audit_rows,
    audit_summary,
    bootstrap_error,
    bounds_study,
    measure_values,
    noisy_digits,
    pac_bayes_error,
    spectral_error,
    training_error,
)
from minimand.bounds import binary_kl_inverse, generalization_measures, pac_bayes_bound, spectral_margin_bound
from minimand.bounds.generalization_measures import MEASURES


def frame(rows=200, seed=0):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, rows))
    label = np.where(a + 0.8 * random.normal(size=rows) > 0, "yes", "no")
    return pl.DataFrame({"a": a, "b": b, "kind": random.choice(["u", "v"], rows), "label": label})


@pytest.fixture
def saved(tmp_path):
    """A classifier trained on the first 150 of 200 rows, and the files."""
    table = frame()
    table.write_csv(tmp_path / "all.csv")
    table[:150].write_csv(tmp_path / "train.csv")
    table[150:].write_csv(tmp_path / "test.csv")
    fitted = ObjectiveClassifier(epochs=5, random_state=0).fit(table[:150].drop("label"), table[:150]["label"])
    fitted.save(tmp_path / "model")
    return fitted, tmp_path


FACTORY = """
import torch
from torch import nn

def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].bias.data.zero_()
    return model

def images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def text():
    return "no module"

def broken():
    raise KeyError("inside")
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_models", None)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(120, 3, generator=generator)
    import my_models

    target = my_models.trained()(inputs).argmax(1)
    flipped = torch.where(torch.rand(120, generator=generator) < 0.3, 1 - target, target)
    flipped[:60] = target[:60]
    np.savez(tmp_path / "rows.npz", X=inputs.numpy(), y=flipped.numpy())
    return tmp_path


def cell(study, seed=0):
    return study.problem(None, seed)


def test_a_saved_classifier_is_read_with_its_rows_encoded_and_its_labels_numbered(saved):
    fitted, folder = saved
    study = bounds_study(
        str(folder / "model"), str(folder / "train.csv"), target="label", test=str(folder / "test.csv")
    )
    data = cell(study)
    assert len(data.trained.target) == 150
    assert len(data.truth[1]) == len(data.holdout[1]) == 25
    table = frame()
    expected = fitted.decision_function(table[150:].drop("label"))
    scores = data.trained.model(data.trained.fresh_inputs)
    np.testing.assert_allclose((scores[:, 1] - scores[:, 0]).detach().numpy(), expected, rtol=1e-5)
    assert data.trained.fresh_target.tolist() == (table[150:]["label"] == "yes").cast(int).to_list()


def test_a_fraction_is_the_last_rows(saved):
    _, folder = saved
    model = str(folder / "model")
    by_fraction = cell(bounds_study(model, str(folder / "all.csv"), target="label", test_fraction=0.25))
    by_file = cell(bounds_study(model, str(folder / "train.csv"), target="label", test=str(folder / "test.csv")))
    assert torch.equal(by_fraction.trained.inputs, by_file.trained.inputs)
    assert torch.equal(by_fraction.truth[0], by_file.truth[0])


def test_halves_are_random_disjoint_and_the_same_for_the_same_seed(saved):
    _, folder = saved
    study = bounds_study(str(folder / "model"), str(folder / "all.csv"), target="label", test_fraction=0.25)
    one, same, other = cell(study, 1), cell(study, 1), cell(study, 2)
    assert torch.equal(one.truth[0], same.truth[0])
    assert not torch.equal(one.truth[0], other.truth[0])
    both = torch.cat([one.truth[0], one.holdout[0]])
    assert len(torch.unique(both, dim=0)) == 50


def test_a_classifier_trained_on_an_array_takes_a_table_of_as_many_columns(tmp_path):
    table = frame().drop("kind")
    arrays = table.drop("label").to_numpy()
    ObjectiveClassifier(epochs=2, random_state=0).fit(arrays[:150], table["label"][:150].to_numpy()).save(
        tmp_path / "model"
    )
    table.write_csv(tmp_path / "all.csv")
    data = cell(bounds_study(str(tmp_path / "model"), str(tmp_path / "all.csv"), target="label", test_fraction=0.25))
    assert data.trained.inputs.shape == (150, 2)


def test_a_factory_s_network_takes_arrays_of_any_shape_and_weights_from_a_file(factory):
    images = np.random.default_rng(0).normal(size=(90, 1, 6, 6)).astype(np.float32)
    np.savez(factory / "images.npz", X=images, y=np.arange(90) % 3)
    study = bounds_study("my_models:images", "images.npz", test_fraction=0.4)
    data = cell(study)
    assert data.trained.inputs.shape == (54, 1, 6, 6)
    assert SPECTRAL not in study.contenders  # which is for fully connected networks
    import my_models

    weights = {name: torch.zeros_like(value) for name, value in my_models.images().state_dict().items()}
    save_file(weights, factory / "zeros.safetensors")
    data = cell(
        bounds_study("my_models:images", "images.npz", test_fraction=0.4, weights="zeros.safetensors",
                     initial="zeros.safetensors")
    )  # fmt: skip
    assert not any(parameter.any() for parameter in data.trained.model.parameters())
    assert set(data.trained.initial_state) == set(weights)


def test_promises_are_what_the_parts_say(factory):
    study = bounds_study("my_models:trained", "rows.npz", test_fraction=0.5)
    data = cell(study)
    trained = data.trained
    assert training_error(data) == bootstrap_error(data) == 0.0
    assert pac_bayes_error(data) == pac_bayes_bound(trained.model, trained.inputs, trained.target).error
    assert spectral_error(data) == spectral_margin_bound(trained.model, trained.inputs, trained.target).error
    values = measure_values(trained)
    assert list(values) == list(MEASURES)
    expected = generalization_measures(trained.model, trained.inputs, trained.target)
    for name, value in values.items():
        if name in expected:
            assert value == expected[name].item()
        else:
            assert "initial_state" in value


def test_every_promise_but_the_hold_out_s_is_off_by_half_the_error_in_the_worse_world(factory):
    study = bounds_study("my_models:trained", "rows.npz", test_fraction=0.5)
    data = cell(study)
    found = {name: contender(data, Run(0)) for name, contender in study.contenders.items()}
    wrong = (data.trained.model(data.truth[0]).argmax(1) != data.truth[1]).double().mean().item()
    assert wrong > 0.1
    worse = METRICS[0].name
    assert found[AT_BEST].metrics[worse] == wrong / 2
    for name, outcome in found.items():
        assert outcome.details["error"] == wrong
        if name not in (HOLD_OUT, HOLD_OUT_BOUND):
            assert outcome.metrics[worse] >= wrong / 2
            assert outcome.metrics[METRICS[2].name] == outcome.details["promise"]
    held = (data.trained.model(data.holdout[0]).argmax(1) != data.holdout[1]).double().mean().item()
    assert found[HOLD_OUT].metrics == {
        METRICS[0].name: pytest.approx(abs(held - wrong)),
        METRICS[1].name: pytest.approx(abs(held - wrong)),
        METRICS[2].name: 0.0,
    }
    assert found[HOLD_OUT_BOUND].details["promise"] == binary_kl_inverse(held, math.log(20) / 30)


def test_misfits_are_left_where_they_are(factory):
    with np.load(factory / "rows.npz") as stored:
        inputs, target = stored["X"], stored["y"].copy()
    target[:6] = 1 - target[:6]
    np.savez(factory / "wrong.npz", X=inputs, y=target)
    data = cell(bounds_study("my_models:trained", "wrong.npz", test_fraction=0.5))
    assert training_error(data) == pytest.approx(0.1)
    assert 0.1 < bootstrap_error(data) < 0.25
    assert Promise(training_error)(data, Run(0)).metrics[METRICS[2].name] == pytest.approx(0.1)
    assert spectral_error(data) <= 1.0


def test_unseen_rows_that_repeat_training_rows_are_left_out_and_that_is_said(factory):
    with np.load(factory / "rows.npz") as stored:
        inputs, target = stored["X"], stored["y"]
    np.savez(factory / "train.npz", X=inputs[:60], y=target[:60])
    np.savez(factory / "test.npz", X=inputs[50:], y=target[50:])
    study = bounds_study("my_models:trained", "train.npz", test="test.npz")
    assert len(cell(study).trained.fresh_target) == 60
    assert "10 unseen rows were left out" in study.notes


def test_the_built_in_networks_fit_their_rows_and_err_on_others():
    trained = noisy_digits(0)
    assert torch.equal(trained.model(trained.inputs).argmax(1), trained.target)
    wrong = (trained.model(trained.fresh_inputs).argmax(1) != trained.fresh_target).double().mean()
    assert 0.2 < wrong < 0.6
    start = generalization_measures(
        trained.model, trained.inputs, trained.target, initial_state=trained.initial_state, names=["l2_distance"]
    )
    assert start["l2_distance"] > 0


@functools.cache
def record():
    study = bounds_study()
    return study, make_record(study, run(study, seeds=3, jobs=1), kind="compare", problem="bounds", seconds=0.0)


def test_the_built_in_audit_shows_that_only_fresh_rows_beat_the_floor():
    _, found = record()
    rows = {row["name"]: row["mean"] for row in found["summary"][METRICS[0].name]}
    for name, mean in rows.items():
        assert (mean < rows[AT_BEST]) == (name in (HOLD_OUT, HOLD_OUT_BOUND)) or name == AT_BEST


def test_the_summary_names_errors_promises_measures_and_advice():
    _, found = record()
    summary = audit_summary(found)
    assert summary["training error"] == 0.0
    assert summary["floor"] == summary["error"] / 2
    assert set(summary["vacuous"]) == {PAC_BAYES, SPECTRAL}
    assert set(summary["measures"]) == set(MEASURES)
    assert f"within {100 * summary['floor']:.1f} points" in summary["advice"]
    json.dumps(summary)
    names = [name for name, _ in audit_rows(summary)]
    assert "path norm" in names
    assert ("PAC-Bayes bound", "100.0 %, vacuous") in audit_rows(summary)


def test_the_figure_holds_every_row_escaped():
    study, found = record()
    (figure,) = audit_figure(study, found)
    assert figure["svg"].startswith("<svg")
    assert figure["svg"].endswith("</svg>")
    for name, value in audit_rows(audit_summary(found)):
        assert f">{name}<" in figure["svg"]
        assert f">{value}<" in figure["svg"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("model",), {"target": "label"}, "DATA is needed"),
        (("model", "all.csv"), {"target": "label"}, "no unseen rows were given"),
        (("model", "all.csv"), {"target": "label", "test": "test.csv", "test_fraction": 0.5}, "exclude each other"),
        (("model", "all.csv"), {"target": "label", "test_fraction": 1.5}, "between 0 and 1"),
        (("model", "all.csv"), {"target": "label", "test_fraction": 0.05}, "at least 20"),
        (("model", "all.csv"), {"test_fraction": 0.3}, "--target is needed"),
        (("model", "all.csv"), {"target": "lable", "test_fraction": 0.3}, "did you mean 'label'"),
        (
            ("model", "all.csv"),
            {"target": "kind", "test_fraction": 0.3},
            "all.csv does not fit the model: there is no column 'kind'",
        ),
        (
            ("model", "strange.csv"),
            {"target": "label", "test_fraction": 0.3},
            "label 'maybe', which the model does not know: its classes are no, yes",
        ),
        (("model", "all.csv"), {"target": "label", "drop": ["b"], "test_fraction": 0.3}, "no column 'b'"),
        (("model", "absent.csv"), {"target": "label", "test_fraction": 0.3}, "no such file"),
        (("model", "train.csv"), {"target": "label", "test": "train.csv"}, "among the training rows"),
        (("model", "all.csv"), {"target": "label", "test_fraction": 0.3, "weights": "w"}, "--weights is for"),
        (("empty", "all.csv"), {"target": "label", "test_fraction": 0.3}, "no stored classifier"),
        (("all.csv", "all.csv"), {"target": "label", "test_fraction": 0.3}, "MODEL must be a folder"),
        (("nowhere", "all.csv"), {"target": "label", "test_fraction": 0.3}, "MODEL must be a folder"),
        ((None, "all.csv"), {}, "needs a MODEL"),
        ((None, None), {"test": "test.csv"}, "--test needs a MODEL"),
        ((None, None), {"delta": 0.0}, "--delta"),
        (("no_such_module:f", "all.csv"), {"target": "label", "test_fraction": 0.3}, "cannot import"),
    ],
)
def test_a_saved_model_that_cannot_be_audited_is_refused_in_one_sentence(
    saved, monkeypatch, arguments, options, message
):
    _, folder = saved
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    frame().with_columns(label=pl.lit("maybe")).write_csv("strange.csv")
    with pytest.raises(ValueError, match=message) as caught:
        bounds_study(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("my_models:text", {}, "must return a torch.nn.Module, got str"),
        ("my_models:broken", {}, "inside"),
        ("my_models:absent", {}, "cannot import"),
        ("my_models:images", {}, "cannot read rows of shape"),
        ("my_models:trained", {"weights": "absent.safetensors"}, "no such file"),
        ("my_models:trained", {"weights": "rows.npz"}, "no safetensors file"),
        ("my_models:trained", {"weights": "other.safetensors"}, "--weights does not fit"),
        ("my_models:trained", {"initial": "other.safetensors"}, "--initial does not fit"),
        ("my_models:trained", {"factory": "my_models:trained"}, "--factory is for"),
        ("my_models:trained", {"data": "words.csv", "target": "y"}, "holds no numbers"),
        ("my_models:trained", {"data": "classes.npz"}, "class 5, the model scores 2"),
        ("my_models:trained", {"data": "holes.npz"}, "missing or infinite"),
        ("my_models:trained", {"data": "fractions.npz"}, "class indices"),
        ("my_models:trained", {"data": "flat.npz"}, "X must hold numbers"),
        ("my_models:trained", {"data": "pickled.npz"}, "pickled"),
        ("my_models:trained", {"data": "nothing.npz"}, "'X' and 'y'"),
    ],
)
def test_a_factory_that_cannot_be_audited_is_refused_in_one_sentence(factory, model, options, message):
    with np.load("rows.npz") as stored:
        inputs, target = stored["X"], stored["y"]
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    pl.DataFrame({"a": ["x"] * 50, "y": [0, 1] * 25}).write_csv("words.csv")
    np.savez("classes.npz", X=inputs, y=target + 4)
    np.savez("holes.npz", X=np.where(inputs > 2, np.nan, inputs), y=target)
    np.savez("fractions.npz", X=inputs, y=target + 0.5)
    np.savez("flat.npz", X=inputs[:, 0], y=target)
    np.savez("pickled.npz", X=np.array([{}] * 120, dtype=object), y=target)
    np.savez("nothing.npz", data=inputs)
    with pytest.raises(ValueError, match=message) as caught:
        bounds_study(model, **{"data": "rows.npz", "test_fraction": 0.5, **options})
    assert "\n" not in str(caught.value)


def test_a_model_written_anew_is_read_anew(saved):
    fitted, folder = saved
    read = functools.partial(
        bounds_study, str(folder / "model"), str(folder / "all.csv"), target="label", test_fraction=0.25
    )
    first = read()
    fitted.model_[0].weight.data += 1
    fitted.save(folder / "model")
    second = read()
    assert first.data_key != second.data_key
    assert torch.equal(next(cell(second).trained.model.parameters()), fitted.model_[0].weight)
