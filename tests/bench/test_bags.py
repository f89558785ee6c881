"""The comparison of losses for bags: what it reads, what it refuses, and that no bag or label leaks."""

import numpy as np
import polars as pl
import pytest
import torch

from minimand.bench import Run, run
from minimand.bench.bags import (
    RHOS,
    BagLearner,
    Bags,
    LearnFromBags,
    bag_table,
    bags_study,
    choose,
    plug_in_rho,
    winner_code,
)
from minimand.bounds import best_rho
from minimand.losses import ols
from minimand.training import Recipe


def frame(bags=30, size=3, features=4, noise=0.5, seed=0, aggregate=True, proportions=False):
    random = np.random.RandomState(seed)
    rows = bags * size
    inputs = random.randn(rows, features)
    label = inputs @ np.arange(1, features + 1) + noise * random.randn(rows)
    if proportions:
        label = (label > 0).astype(float)
    ids = random.permutation(np.repeat(np.arange(bags), size))
    if aggregate:
        label = (np.bincount(ids, label) / size)[ids]
    table = pl.DataFrame(inputs, schema=[f"x{i}" for i in range(features)], orient="row")
    return table.with_columns(pl.Series("id", [f"shop {i}" for i in ids]), pl.Series("sales", label))


@pytest.fixture
def write(tmp_path):
    def keep(table, name="table.csv"):
        path = tmp_path / name
        table.write_csv(path)
        return str(path)

    return keep


def signal(features, seed):
    direction = torch.randn(features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return direction / direction.norm()


def linear_bags(bags, size, features, noise, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    inputs = torch.randn(bags * size, features, generator=generator, dtype=torch.float64)
    labels = inputs @ signal(features, seed)
    labels = labels + noise**0.5 * torch.randn(len(labels), generator=generator, dtype=torch.float64)
    bag = torch.arange(bags).repeat_interleave(size)
    return Bags(inputs, bag, labels.reshape(bags, size).mean(1), labels)


LINEAR = BagLearner("linear", "mse", Recipe())


def test_no_fold_splits_a_bag_and_every_bag_is_tested_once(write):
    path = write(frame(bags=23))
    study = bags_study(path, target="sales", bag="id", folds=5, repeats=1)
    tested = []
    for seed in range(5):
        split = study.problem(None, seed)
        assert (split.train.sizes() == 3).all()
        assert (split.test.sizes() == 3).all()
        assert len(split.train.target) + len(split.test.target) == 23
        tested += split.test.target.tolist()
    values = pl.read_csv(path)["sales"].unique().to_numpy()
    np.testing.assert_allclose(sorted(tested), np.sort(values), rtol=1e-12)


def test_folds_of_another_repeat_differ_and_the_same_cell_is_the_same(write):
    study = bags_study(write(frame()), target="sales", bag="id")
    assert torch.equal(study.problem(None, 0).test.target, study.problem(None, 0).test.target)
    assert not torch.equal(study.problem(None, 0).test.target, study.problem(None, 5).test.target)


def test_a_constant_target_means_that_instance_labels_are_unknown(write):
    study = bags_study(write(frame(aggregate=True)), target="sales", bag="id")
    assert [metric.name for metric in study.metrics] == ["bag error"]
    assert study.problem(None, 0).test.labels is None
    assert "nobody knows" in study.notes


def test_individual_labels_are_averaged_and_kept_for_evaluation_only(write):
    table = frame(aggregate=False)
    study = bags_study(write(table), target="sales", bag="id")
    assert [metric.name for metric in study.metrics] == ["instance error", "bag error"]
    split = study.problem(None, 0)
    assert split.train.labels is None
    torch.testing.assert_close(split.test.means(split.test.labels), split.test.target)
    assert "learners saw only the means over bags" in study.notes


def test_aggregate_and_individual_tables_teach_the_same(write):
    aggregate = bags_study(write(frame(aggregate=True), "a.csv"), target="sales", bag="id")
    individual = bags_study(write(frame(aggregate=False), "b.csv"), target="sales", bag="id")
    for name, contender in aggregate.contenders.items():
        one = contender(aggregate.problem(None, 1), Run(1)).metrics
        other = individual.contenders[name](individual.problem(None, 1), Run(1)).metrics
        assert one["bag error"] == pytest.approx(other["bag error"], rel=1e-6)


def test_ends_of_the_line_up_are_least_squares_with_rho_zero_and_one(write):
    study = bags_study(write(frame()), target="sales", bag="id")
    data = study.problem(None, 0)
    for name, rho in (("bag loss", 0.0), ("instance loss", 1.0)):
        ones = torch.ones(len(data.train.inputs), 1, dtype=torch.float64)
        theta = ols(torch.cat([ones, data.train.inputs.double()], 1), data.train.target, data.train.bag, rho=rho)
        predictions = theta[0] + data.test.inputs.double() @ theta[1:]
        error = (data.test.means(predictions) - data.test.target).square().mean()
        assert study.contenders[name](data, Run(0)).metrics["bag error"] == pytest.approx(float(error), rel=1e-6)


def test_a_column_of_no_information_changes_nothing(write):
    table = frame()
    doubled = table.with_columns(x9=pl.col("x0") * 2 + 1, constant=pl.lit(3.0))
    one, other = (
        bags_study(write(t, name), target="sales", bag="id") for t, name in ((table, "a.csv"), (doubled, "b.csv"))
    )
    for name in ("bag loss", "instance loss"):
        errors = [s.contenders[name](s.problem(None, 0), Run(0)).metrics["bag error"] for s in (one, other)]
        # The doubled column weighs in the scale of x0 only, which least squares does not see.
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_held_out_bags_choose_zero_without_noise_and_one_for_noise_alone():
    clean = linear_bags(60, 4, 5, noise=0.0)
    candidates = [(rho, 0.0) for rho in RHOS]
    assert choose(LINEAR, clean, candidates, seed=0) == (0.0, 0.0)
    noisy = linear_bags(24, 4, 10, noise=400.0)
    assert choose(LINEAR, noisy, candidates, seed=0)[0] >= 0.5


def test_penalty_is_ridge_regression_on_bag_means():
    bags = linear_bags(30, 4, 6, noise=1.0)
    fresh = torch.randn(50, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    # The penalty's row a coefficient shifts no other: centre the features and the labels, and solve by hand.
    middle, mean = bags.inputs.mean(0), bags.target.mean()
    means = bags.means(bags.inputs - middle)
    scatter = 4 * means.T @ means
    scale = 0.7 * scatter.trace() / 6
    theta = torch.linalg.solve(scatter + scale * torch.eye(6, dtype=torch.float64), 4 * means.T @ (bags.target - mean))
    expected = mean + (fresh - middle) @ theta
    torch.testing.assert_close(LINEAR(bags, 0.0, 0, 0.7)(fresh), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bags", [4000, 60])
def test_formula_finds_the_best_rho_from_bag_means_alone(bags):
    # 60 bags of 40 features leave least squares no residuals worth the name: the second moments must do.
    size, features, noise = 5, 40, 2.0
    found = np.mean([plug_in_rho(linear_bags(bags, size, features, noise, seed)) for seed in range(12)])
    expected = best_rho(bags * size / features, bag_size=size, signal=1.0, noise=noise)
    assert found == pytest.approx(expected, rel=0.05 if bags == 4000 else 0.5)


def test_formula_falls_back_to_the_instance_loss_with_more_features_than_rows():
    assert plug_in_rho(linear_bags(5, 2, 20, noise=1.0)) == 1.0


def test_interpolation_beats_both_ends_where_theory_says_so():
    errors = {}
    for rho in (0.0, 1.0, "held-out bags", "formula"):
        values = []
        for seed in range(15):
            predict, _ = LearnFromBags(LINEAR, rho).learn_from(linear_bags(72, 5, 36, noise=1.0, seed=seed), seed=seed)
            fresh = torch.randn(1000, 36, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            values.append(float((predict(fresh) - fresh @ signal(36, seed)).square().mean()))
        errors[rho] = np.mean(values)
    assert errors["held-out bags"] < min(errors[0.0], errors[1.0])
    assert errors["formula"] < min(errors[0.0], errors[1.0])


def test_proportions_are_learnt_by_cross_entropy_unless_told_otherwise(write):
    path = write(frame(proportions=True, noise=0.0))
    study = bags_study(path, target="sales", bag="id", epochs=40)
    assert study.settings["loss"] == "bce"
    data = study.problem(None, 0)
    predict, rho = study.contenders["bag loss"].learn_from(data.train, seed=0)
    predictions = predict(data.test.inputs)
    assert rho == 0
    assert ((predictions >= 0) & (predictions <= 1)).all()
    learnt, mean = (study.contenders[name](data, Run(0)).metrics["bag error"] for name in ("bag loss", "mean label"))
    assert learnt < 0.5 * mean
    assert bags_study(path, target="sales", bag="id", loss="mse").settings["loss"] == "mse"
    assert bags_study(write(frame(), "b.csv"), target="sales", bag="id").settings["loss"] == "mse"


def test_training_by_batches_of_whole_bags_reaches_the_closed_form():
    bags = linear_bags(40, 3, 4, noise=0.2)
    uneven = bags.take(torch.arange(40) % 5 > 0)
    floats = Bags(uneven.inputs.float(), uneven.bag, uneven.target)
    recipe = Recipe(epochs=500, batch_size=32, lr=1e-2, weight_decay=0.0)
    trained = BagLearner("linear", "mse", recipe)._train(floats, 0.3, seed=0)
    closed = LINEAR(uneven, 0.3, seed=0)
    fresh = torch.randn(200, 4, generator=torch.Generator().manual_seed(5))
    assert float((trained(fresh) - closed(fresh.double())).square().mean().sqrt()) < 0.02


def test_a_network_learns_from_unequal_bags_and_a_seed_decides_it(write):
    table = frame(bags=24).head(70)
    study = bags_study(write(table), target="sales", bag="id", model="mlp", epochs=30)
    data = study.problem(None, 0)
    assert len(data.train.sizes().unique()) > 1
    outcomes = [study.contenders["bag loss"](data, Run(3)).metrics["bag error"] for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] < 0.5 * study.contenders["mean label"](data, Run(3)).metrics["bag error"]


def test_study_runs_in_the_engine_on_the_built_in_data():
    results = run(bags_study(repeats=1), jobs=1)
    assert not results.failures
    assert len(results.cells) == 30
    assert all(np.isfinite(list(cell.outcome.metrics.values())).all() for cell in results.cells)


def test_code_of_the_winner_runs(write):
    study = bags_study(write(frame()), target="sales", bag="id", drop=["x3"])
    for winner in study.contenders:
        room = {}
        exec(winner_code(study, winner), room)
        assert room["predictions"].shape == (90,)
        assert torch.isfinite(room["predictions"]).all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t, {"bag": "idd"}, "--bag: there is no column 'idd'; did you mean 'id'"),
        (lambda t: t, {"target": "sale"}, "--target: there is no column 'sale'; did you mean 'sales'"),
        (lambda t: t, {"target": None}, "--target is missing"),
        (lambda t: t, {"bag": None}, "--bag is missing"),
        (lambda t: t, {"bag": "sales"}, "must be different columns"),
        (lambda t: t, {"drop": ["y"]}, "--drop: there is no column 'y'"),
        (lambda t: t, {"drop": ["x0,x1", "x2", "x3"]}, "has no feature column"),
        (lambda t: t, {"folds": 31}, "--bag makes 30 bags, fewer than the 31 folds"),
        (lambda t: t, {"folds": 1}, "--folds must be at least 2"),
        (lambda t: t, {"repeats": 0}, "--repeats must be at least 1"),
        (lambda t: t, {"model": "forest"}, "--model must be one of linear, mlp"),
        (lambda t: t, {"loss": "hinge"}, "--loss must be one of auto, mse, bce"),
        (lambda t: t, {"loss": "bce"}, r"--loss bce needs proportions in \[0, 1\]"),
        (lambda t: t, {"epochs": 0}, "--epochs must be at least 1"),
        (lambda t: t, {"target": "id", "bag": "x0"}, "must hold numbers"),
        (lambda t: t, {"bag": "x0"}, "every bag of column 'x0' has one row, .* plain regression"),
        (lambda t: t.head(6), {"folds": 2}, "at least 4 are needed|fewer than"),
        (
            lambda t: t.with_columns(pl.when(pl.col("x0") > 1.5).then(None).otherwise(pl.col("sales")).alias("sales")),
            {},
            "--target: column 'sales' has [0-9]+ values that are missing",
        ),
        (
            lambda t: t.with_columns(pl.when(pl.col("x0") > 1.5).then(None).otherwise(pl.col("id")).alias("id")),
            {},
            "--bag: column 'id' has [0-9]+ missing values",
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_in_one_sentence(write, change, options, message):
    table = change(frame().sort("id"))
    with pytest.raises(ValueError, match=message) as caught:
        bags_study(write(table), **{"target": "sales", "bag": "id", **options})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="no such file"):
        bag_table("nowhere.csv", target="y", bag="id")
