"""ObjectiveClassifier as scikit-learn's users know estimators."""

import datetime
import json

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.datasets import load_iris, make_classification
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from minimand import ObjectiveClassifier, losses, risks


@parametrize_with_checks([ObjectiveClassifier(epochs=20, random_state=0)])
def test_scikit_learns_own_checks_pass(estimator, check):
    check(estimator)


def table(rows=240, seed=0):
    """Numbers with gaps, a category, a date, free text, a boolean; the label follows from the first two."""
    generator = np.random.default_rng(seed)
    number = generator.normal(size=rows)
    kind = generator.choice(["red", "green", "blue"], rows)
    label = np.where(number + (kind == "red") > 0.5, "yes", "no")
    gaps = [None if place % 7 == 0 else float(value) for place, value in enumerate(number)]
    return pl.DataFrame(
        {
            "number": gaps,
            "kind": kind,
            "day": [datetime.date(2024, 1, 1) + datetime.timedelta(int(n)) for n in generator.integers(0, 500, rows)],
            "text": [f"note {place} about {kind[place]} things" for place in range(rows)],
            "flag": generator.random(rows) > 0.5,
        }
    ), label


def test_a_mixed_frame_with_missing_values_is_learnt():
    frame, label = table()
    model = ObjectiveClassifier(random_state=0).fit(frame, label)
    assert model.score(frame, label) > 0.9
    held, truth = table(seed=1)
    assert model.score(held, truth) > 0.75


def test_pandas_and_polars_frames_are_encoded_alike():
    import pandas as pd

    frame, label = table()
    frame = frame.drop("day")
    other = pd.DataFrame({name: frame[name].to_list() for name in frame.columns})
    first = ObjectiveClassifier(random_state=0, epochs=3).fit(frame, label).predict_proba(frame)
    second = ObjectiveClassifier(random_state=0, epochs=3).fit(other, label).predict_proba(other)
    np.testing.assert_allclose(first, second, atol=1e-5)


LOSSES = {
    "none": lambda: None,
    "torch": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "ldr-kl": lambda: losses.LDRKLLoss(2.0, normalize="l1"),
    "aldr-kl": lambda: losses.ALDRKLLoss(temperature=2.0),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("risk", [None, risks.Mean()])
def test_saved_and_loaded_it_predicts_the_same(tmp_path, name, risk):
    frame, label = table()
    model = ObjectiveClassifier(LOSSES[name](), risk=risk, epochs=3, random_state=0).fit(frame, label)
    model.save(tmp_path / "model")
    loaded = ObjectiveClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
    np.testing.assert_array_equal(loaded.predict(frame), model.predict(frame))
    assert loaded.classes_.dtype == model.classes_.dtype


def test_nothing_stored_is_a_pickle(tmp_path):
    import pickletools

    features, labels = load_iris(return_X_y=True)
    ObjectiveClassifier(epochs=1).fit(features, labels).save(tmp_path)
    for file in tmp_path.iterdir():
        with pytest.raises(Exception):  # noqa: B017 - pickletools raises several kinds
            list(pickletools.genops(file.read_bytes()))


def test_a_stored_file_cannot_name_code_to_run(tmp_path):
    features, labels = load_iris(return_X_y=True)
    ObjectiveClassifier(epochs=1).fit(features, labels).save(tmp_path)
    described = json.loads((tmp_path / "classifier.json").read_text())
    foreign = {**described, "loss": {"class": "os:system", "arguments": {}}}
    (tmp_path / "classifier.json").write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match="only hold losses"):
        ObjectiveClassifier.load(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps({**described, "model": "os:system"}))
    with pytest.raises(ValueError, match="say what builds it"):
        ObjectiveClassifier.load(tmp_path)


def test_early_stopping_keeps_the_best_model_on_held_out_data():
    features, labels = make_classification(400, 10, flip_y=0.3, random_state=0)
    model = ObjectiveClassifier(epochs=200, early_stopping=True, patience=3, random_state=0).fit(features, labels)
    assert len(model.history_) < 200
    assert 0.5 < model.validation_accuracy_ <= 1


def test_class_weights_move_the_decision():
    features, labels = make_classification(600, 6, weights=[0.9], flip_y=0.1, random_state=0)
    plain = ObjectiveClassifier(random_state=0).fit(features, labels).predict(features).mean()
    balanced = ObjectiveClassifier(random_state=0, class_weight="balanced").fit(features, labels)
    assert balanced.predict(features).mean() > plain + 0.03


def test_the_same_seed_gives_the_same_model():
    features, labels = load_iris(return_X_y=True)
    first = ObjectiveClassifier(losses.ALDRKLLoss(), random_state=3, epochs=4).fit(features, labels)
    second = ObjectiveClassifier(losses.ALDRKLLoss(), random_state=3, epochs=4).fit(features, labels)
    np.testing.assert_array_equal(first.predict_proba(features), second.predict_proba(features))


def test_the_loss_given_is_left_untouched():
    features, labels = load_iris(return_X_y=True)
    loss = losses.ALDRKLLoss()
    ObjectiveClassifier(loss, epochs=1).fit(features, labels)
    assert loss.temperatures.numel() == 0


def test_cross_validation_takes_it_as_any_estimator():
    features, labels = load_iris(return_X_y=True)
    scores = cross_val_score(ObjectiveClassifier(losses.LDRKLLoss(), random_state=0), features, labels, cv=3)
    assert scores.mean() > 0.85


def test_a_model_of_ones_own_is_built_from_features_and_classes():
    features, labels = load_iris(return_X_y=True)
    model = ObjectiveClassifier(model=lambda d, k: nn.Linear(d, k), epochs=2).fit(features, labels)
    assert isinstance(model.model_, nn.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "forest"}, "model must be"),
        ({"model": "nowhere.at_all:thing"}, "cannot import"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"optimizer": "magic"}, "optimizer"),
        ({"early_stopping": True, "validation_fraction": 2.0}, "validation_fraction"),
    ],
)
def test_bad_settings_are_refused_by_fit(options, message):
    features, labels = load_iris(return_X_y=True)
    with pytest.raises(ValueError, match=message):
        ObjectiveClassifier(**options).fit(features, labels)


def test_missing_labels_are_refused():
    frame, label = table()
    broken = [None, *label[1:]]
    with pytest.raises(ValueError, match="missing labels in 1 rows"):
        ObjectiveClassifier().fit(frame, pl.Series(broken))


def test_training_follows_the_dtype_and_device_of_the_model():
    features, labels = load_iris(return_X_y=True)
    model = ObjectiveClassifier(epochs=1, device=torch.device("cpu")).fit(features, labels)
    assert next(model.model_.parameters()).device.type == "cpu"
