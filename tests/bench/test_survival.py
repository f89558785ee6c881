"""Reading slides, dealing patients into folds, and comparing pools on them."""

import builtins
import json
import pathlib

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from minimand.bench import Run
from minimand.bench.slides import read_features, read_slides
from minimand.bench.survival import (
    PoolBags,
    SurvivalFolds,
    SurvivalRecipe,
    attention_pool,
    bags_with_junk,
    feature_scale,
    fold_of,
    full_transport,
    mean_pool,
    risk_groups,
    survival_figure,
    survival_study,
    winner_code,
)
from minimand.cli import app
from minimand.survival import concordance_index

COLUMNS = {"slide": "slide", "time": "months", "event": "died"}
QUICK = SurvivalRecipe(epochs=2, batch_size=10, dim=4, prototypes=2)


def write(path, features):
    if path.suffix == ".npz":
        np.savez(path, features=features, coords=np.zeros((len(features), 2)))
    elif path.suffix == ".safetensors":
        save_file({"features": torch.from_numpy(features)}, path)
    else:
        with h5py.File(path, "w") as stored:
            stored["features"], stored["coords"] = features[None], np.zeros((len(features), 2))


@pytest.fixture
def slides(tmp_path):
    """Forty slides in three formats, of sizes that differ, and their table."""
    folder = tmp_path / "features"
    folder.mkdir()
    random = np.random.default_rng(0)
    time = random.exponential(10, size=40).round(2) + 0.01
    for number in range(40):
        features = random.normal(size=(5 + number % 4, 3)).astype(np.float32) - np.float32(time[number] / 10)
        write(folder / f"s{number}{('.npz', '.safetensors', '.h5')[number % 3]}", features)
    frame = pl.DataFrame(
        {
            "slide": [f"s{number}" for number in range(40)],
            "months": time,
            "died": (np.arange(40) % 4 > 0).astype(int),
            "patient": [f"p{number // 2}" for number in range(40)],
        }
    )
    frame.write_csv(tmp_path / "times.csv")
    return tmp_path


def read(slides, **options):
    return read_slides(slides / "features", slides / "times.csv", **{**COLUMNS, **options})


def rewrite(slides, **columns):
    frame = pl.read_csv(slides / "times.csv").with_columns(**columns)
    frame.write_csv(slides / "times.csv")


def test_slides_of_all_formats_come_back_with_their_times(slides):
    cohort = read(slides, patient="patient")
    assert len(cohort) == 40
    assert [tuple(bag.shape) for bag in cohort.bags][:4] == [(5, 3), (6, 3), (7, 3), (8, 3)]
    with np.load(slides / "features" / "s0.npz") as stored:
        np.testing.assert_array_equal(cohort.bags[0].numpy(), stored["features"])
    frame = pl.read_csv(slides / "times.csv")
    assert cohort.time.tolist() == frame["months"].to_list()
    assert cohort.event.tolist() == (frame["died"] == 1).to_list()
    assert torch.equal(cohort.unit[::2], cohort.unit[1::2])
    part = cohort.take(torch.tensor([3, 1]))
    assert part.names == ("s3", "s1")
    assert torch.equal(part.bags[1], cohort.bags[1])


def test_events_may_be_words_and_the_array_may_have_another_name(slides):
    np.savez(slides / "features" / "s0.npz", x=np.ones((2, 3)))
    rewrite(slides, died=pl.Series(["True", "false"] * 20))
    assert read(slides).event.tolist() == [True, False] * 20
    np.savez(slides / "two.npz", x=np.ones((2, 3)), y=np.zeros((4, 3)))
    assert read_features(slides / "two.npz", "y").shape == (4, 3)
    with pytest.raises(ValueError, match="no array 'features', it holds 'x', 'y': name one with --key"):
        read_features(slides / "two.npz")


def broken(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no feature file of slide 's0'"),
        (broken(features=np.ones((4, 5))), "3 features an instance, s0.npz has 5"),
        (broken(features=np.full((4, 3), np.nan)), "s0.npz holds 12 features that are NaN or infinite"),
        (broken(features=np.ones((0, 3))), "s0.npz holds an empty bag"),
        (broken(features=np.ones(3)), r"must have shape \(instances, features\)"),
        (broken(features=np.array([["a"]])), "must be real numbers"),
        (broken(features=np.array([{}], dtype=object)), "pickled objects"),
        (lambda path: path.write_text("no zip"), "s0.npz is not an NPZ file"),
        (lambda path: np.savez(path.with_suffix(""), y=np.ones((2, 3)), z=np.ones(1)), "no array 'features'"),
        (lambda path: (path.parent / "s0.h5").write_text("x"), "slide 's0' has two files"),
        (lambda path: (path.parent / "s1.safetensors").write_bytes(b"no"), "s1.safetensors is damaged"),
        (lambda path: (path.parent / "s2.h5").write_bytes(b"no"), "s2.h5 is damaged or no HDF5 file"),
    ],
)
def test_files_that_cannot_be_used_are_told_in_one_sentence(slides, spoil, message):
    spoil(slides / "features" / "s0.npz")
    with pytest.raises(ValueError, match=message) as error:
        read(slides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"died": pl.lit(0)}, "holds no event"),
        ({"died": pl.lit(2)}, "must hold 1 where the event was seen"),
        ({"died": pl.lit("dead")}, "must hold 1 where the event was seen"),
        ({"months": -pl.col("months")}, "negative times"),
        ({"months": pl.lit("long")}, "must hold numbers"),
        ({"months": pl.lit(None)}, "40 missing values"),
        ({"slide": pl.lit("s0")}, "'s0' stands in 40 rows"),
    ],
)
def test_tables_that_cannot_be_used_are_told_in_one_sentence(slides, columns, message):
    rewrite(slides, **columns)
    with pytest.raises(ValueError, match=message) as error:
        read(slides)
    assert "\n" not in str(error.value)


def test_without_h5py_the_extra_is_named(slides, monkeypatch):
    whole = builtins.__import__

    def without(name, *rest, **more):
        if name == "h5py":
            raise ImportError(name)
        return whole(name, *rest, **more)

    (slides / "x.h5").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'minimand\[slides\]'"):
        read_features(slides / "x.h5")


def test_folds_split_no_patient_share_out_the_events_and_follow_the_seed():
    cohort = bags_with_junk(60, seed=1, instances=4, features=2)
    pairs = type(cohort)(cohort.bags, cohort.time, cohort.event, torch.arange(60) // 2, cohort.names)
    fold = fold_of(pairs, 5, 3)
    assert torch.equal(fold[::2], fold[1::2])
    assert torch.equal(fold, fold_of(pairs, 5, 3))
    assert not torch.equal(fold, fold_of(pairs, 5, 4))
    seen = [int(cohort.event[fold_of(cohort, 5, 0) == k].sum()) for k in range(5)]
    assert max(seen) - min(seen) <= 1


def test_the_cells_of_a_repeat_test_every_slide_once(slides):
    study = survival_study(slides / "features", table=slides / "times.csv", folds=4, repeats=2, **COLUMNS)
    assert study.seeds == 8
    names = [name for seed in range(4) for name in study.problem(None, seed).test.names]
    assert sorted(names) == sorted(f"s{number}" for number in range(40))
    split = study.problem(None, 5)
    assert not set(split.train.names) & set(split.test.names)


def test_features_are_scaled_by_their_spread_over_all_instances():
    cohort = bags_with_junk(5, seed=0, instances=7, features=3)
    together = torch.cat(list(cohort.bags))
    centre, scale = feature_scale(cohort)
    torch.testing.assert_close(centre, together.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(scale, together.std(0, correction=0), atol=1e-6, rtol=1e-5)
    same = type(cohort)(
        [torch.full((3, 2), 4.0)] * 2, *(getattr(cohort, n) for n in ("time", "event", "unit", "names"))
    )
    assert feature_scale(same)[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("loss", ["cox", "hazards"])
@pytest.mark.parametrize("make", [mean_pool, attention_pool, full_transport])
def test_every_pool_learns_ragged_slides_and_measures_each_cell(slides, make, loss):
    study = survival_study(slides / "features", table=slides / "times.csv", folds=2, **COLUMNS)
    recipe = SurvivalRecipe(epochs=2, batch_size=10, dim=4, prototypes=2, loss=loss, max_instances=6)
    contender = PoolBags(make, recipe, ramp=make is full_transport)
    outcome = contender(study.problem(None, 0), Run(0))
    assert {metric.name for metric in study.metrics} == set(outcome.metrics)
    risk, time, event = (torch.tensor(outcome.details[name]) for name in ("risk", "time", "event"))
    assert outcome.metrics["C-index"] == float(concordance_index(risk, time, event))
    again = contender(study.problem(None, 0), Run(0))
    assert again.metrics == outcome.metrics
    assert json.loads(json.dumps(outcome.details)) == outcome.details


def test_a_signal_that_all_instances_carry_is_found(slides):
    study = survival_study(slides / "features", table=slides / "times.csv", folds=2, **COLUMNS)
    recipe = SurvivalRecipe(epochs=30, batch_size=10, lr=1e-2, dim=8, prototypes=2)
    assert PoolBags(mean_pool, recipe)(study.problem(None, 0), Run(0)).metrics["C-index"] > 0.8


def test_the_better_of_two_learning_rates_is_taken_and_heat_maps_add_up():
    cohort = bags_with_junk(60, seed=0, instances=10)
    contender = PoolBags(mean_pool, QUICK, rates=(1e-9, 1e-2))
    predict = contender.learn_from(cohort, seed=0)
    fixed = PoolBags(mean_pool, QUICK, rates=(1e-2,)).learn_from(cohort, seed=0)
    slow = PoolBags(mean_pool, QUICK, rates=(1e-9,)).learn_from(cohort, seed=0)
    assert any(torch.equal(predict(cohort), other(cohort)) for other in (fixed, slow))
    heat = predict.heat_map(cohort.bags[0])
    assert heat.shape == (10,)
    torch.testing.assert_close(heat.sum() + predict.model.baseline.detach(), predict(cohort)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "--loss must be one of cox, hazards"),
        ({"folds": 1}, "--folds must be at least 2"),
        ({"folds": 20}, "too few for 20 folds"),
        ({"epochs": 0}, "--epochs must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"table": None}, "--table is missing"),
        ({"event": None}, "--event is missing"),
        ({"event": "dead"}, "there is no column 'dead'"),
        ({"patient": "person"}, "--patient: there is no column"),
        ({"table": "absent.csv"}, "no such file"),
        ({"folder": "absent"}, "is not there"),
    ],
)
def test_options_that_cannot_be_used_are_told_in_one_sentence(slides, options, message):
    arguments = {"folder": slides / "features", "table": slides / "times.csv", **COLUMNS, **options}
    with pytest.raises(ValueError, match=message) as error:
        survival_study(arguments.pop("folder"), **arguments)
    assert "\n" not in str(error.value)


def test_data_that_changed_since_the_comparison_began_are_refused(slides):
    study = survival_study(slides / "features", table=slides / "times.csv", folds=2, **COLUMNS)
    before = study.data_key
    np.savez(slides / "features" / "s0.npz", features=np.ones((9, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="has changed since"):
        study.problem(None, 0)
    assert survival_study(slides / "features", table=slides / "times.csv", folds=2, **COLUMNS).data_key != before


def test_generated_bags_follow_the_seed_and_their_risk_follows_what_decides_it():
    one, again = bags_with_junk(30, seed=2, instances=20), bags_with_junk(30, seed=2, instances=20)
    assert torch.equal(one.bags[0], again.bags[0])
    assert isinstance(SurvivalFolds(*[None] * 7, 5, 0)(None, 0).train.bags[0], torch.Tensor)
    assert 0.3 < float(one.event.double().mean()) < 1


def test_the_command_writes_a_report_with_curves_and_code_that_runs(slides, monkeypatch):
    monkeypatch.setenv("MINIMAND_STORE", str(slides / "store.sqlite"))
    monkeypatch.chdir(slides)
    words = ["compare", "survival", "features", "--table", "times.csv", "--id", "slide", "--time", "months", "--event",
             "died", "--folds", "2", "--repeats", "1", "--epochs", "2", "--dim", "4", "--prototypes", "2", "--jobs", "1",
             "--out", "there", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {row["name"] for row in found["contenders"]} == {
        "mean pooling",
        "attention (ABMIL)",
        "OTSurv",
        "OTSurv, mass 0.2",
    }
    page = pathlib.Path(found["report"]).read_text()
    assert "Survival by predicted risk" in page
    assert "Kaplan-Meier curves" in page
    study = survival_study("features", table="times.csv", folds=2, repeats=1, epochs=2, dim=4, prototypes=2, **COLUMNS)
    scope = {}
    exec(winner_code(study, "OTSurv"), scope)
    assert scope["risk"].shape == (40,)
    assert scope["heat"].shape == (5,)


def test_the_command_refuses_in_one_sentence(slides, monkeypatch):
    monkeypatch.chdir(slides)
    (slides / "features" / "s7.safetensors").unlink()
    words = [
        "compare",
        "survival",
        "features",
        "--table",
        "times.csv",
        "--id",
        "slide",
        "--time",
        "months",
        "--event",
        "died",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "no feature file of slide 's7'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_figure_holds_each_slide_once_and_is_left_out_where_there_is_one_group():
    study = survival_study(folds=2, repeats=2)
    details = {"time": [1.0, 2.0, 3.0], "event": [True, True, False], "high": [True, False, True]}
    cells = [{"contender": "a", "seed": seed, "details": details} for seed in range(4)]
    assert len(risk_groups({"cells": cells}, "a", 2)["time"]) == 6
    (figure,) = survival_figure(study, {"cells": cells, "recommended": "a"})
    assert figure["svg"].count("<svg") == 1
    alone = [{**cell, "details": {**details, "high": [True] * 3}} for cell in cells]
    assert survival_figure(study, {"cells": alone, "recommended": "a"}) == []
