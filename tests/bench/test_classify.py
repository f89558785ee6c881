"""compare classify: what it reads, what it refuses, and that no test row leaks into training."""

import json
import pathlib

import numpy as np
import polars as pl
import pytest
import torch

from minimand.bench import Run
from minimand.bench.classification import METRICS, Split, TrainClassifier, classification_metrics
from minimand.bench.classify import OBJECTIVES, Objective, TableFolds, classify_study, label_table, winner_code
from minimand.bench.readers import DataError, read_table
from minimand.training import Recipe


@pytest.fixture
def csv(tmp_path):
    """Three classes that two numbers tell apart, a category, and gaps."""
    generator = np.random.default_rng(0)
    label = np.repeat(["low", "mid", "high"], 30)
    centre = np.repeat([-2.0, 0.0, 2.0], 30)
    frame = pl.DataFrame(
        {
            "height": [
                None if row % 11 == 0 else value for row, value in enumerate(centre + generator.normal(0, 0.5, 90))
            ],
            "width": generator.normal(size=90),
            "colour": generator.choice(["red", "green"], 90),
            "patient": [f"p{row // 3}" for row in range(90)],
            "class": label,
        }
    )
    path = tmp_path / "data.csv"
    frame.write_csv(path)
    return path


def test_every_format_holds_the_same_table(csv, tmp_path):
    frame = read_table(csv)
    frame.write_parquet(tmp_path / "data.parquet")
    frame.write_ndjson(tmp_path / "data.jsonl")
    frame.write_csv(tmp_path / "data.tsv", separator="\t")
    frame.write_csv(tmp_path / "semi.csv", separator=";")
    for name in ("data.parquet", "data.jsonl", "data.tsv", "semi.csv"):
        assert read_table(tmp_path / name).equals(frame), name


def test_an_npz_is_a_table_of_its_columns(tmp_path):
    np.savez(tmp_path / "data.npz", X=np.arange(12.0).reshape(6, 2), y=np.array(["a", "b"] * 3))
    table = label_table(str(tmp_path / "data.npz"))
    assert table.frame.columns == ["x0", "x1"]
    assert table.classes == ("a", "b")


def test_labels_of_any_type_become_class_numbers(tmp_path):
    for values in ([True, False], [3, 7], ["x", "y"], [0.0, 1.0]):
        pl.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "y": values * 2}).write_parquet(tmp_path / "t.parquet")
        assert label_table(str(tmp_path / "t.parquet"), target="y").labels.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_folds_part_the_rows_and_keep_the_classes_in_proportion(csv):
    study = classify_study(str(csv), target="class", drop=["patient"], folds=3, repeats=1)
    splits = [study.problem(None, fold) for fold in range(3)]
    assert [len(split.test_target) for split in splits] == [30, 30, 30]
    for split in splits:
        assert torch.bincount(split.test_target).tolist() == [10, 10, 10]
        assert len(split.train_target) == 60


def test_groups_are_never_split_between_training_and_test(csv, monkeypatch):
    problem = TableFolds(str(csv), "class", (), "patient", 3, 0.0, 0)
    groups = problem.table().groups
    seen = []
    monkeypatch.setattr(
        "minimand.bench.classify.TableEncoder.fit_transform",
        lambda self, X: seen.append(X) or np.zeros((X.height, 1), np.float32),
    )
    monkeypatch.setattr(
        "minimand.bench.classify.TableEncoder.transform",
        lambda self, X: seen.append(X) or np.zeros((X.height, 1), np.float32),
    )
    widths = problem.table().frame["width"].to_list()
    for fold in range(3):
        seen.clear()
        problem(None, fold)
        train, test = ({groups[widths.index(value)] for value in part["width"]} for part in seen)
        assert not train & test


def test_the_encoder_learns_from_training_rows_only(csv):
    split = TableFolds(str(csv), "class", ("patient", "colour"), None, 3, 0.0, 0)(None, 0)
    means = split.train_inputs.mean(0)
    torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-5, rtol=0)
    assert (split.test_inputs.mean(0).abs() > 1e-3).any()


def test_noise_flips_the_asked_share_of_training_labels_and_no_test_label():
    clean = TableFolds(None, None, (), None, 5, 0.0, 0)
    noisy = TableFolds(None, None, (), None, 5, 0.3, 0)
    shares = []
    for fold in range(5):
        one, other = clean(None, fold), noisy(None, fold)
        assert torch.equal(one.test_target, other.test_target)
        assert torch.equal(one.train_inputs, other.train_inputs)
        shares.append((one.train_target != other.train_target).float().mean().item())
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)


def test_repeats_draw_the_folds_anew_and_seeds_too():
    first, again, other = (TableFolds(None, None, (), None, 5, 0.0, seed) for seed in (0, 0, 1))
    assert torch.equal(first(None, 0).test_inputs, again(None, 0).test_inputs)
    assert not torch.equal(first(None, 0).test_target, first(None, 5).test_target)
    assert not torch.equal(first(None, 0).test_target, other(None, 0).test_target)


def test_metrics_equal_scikit_learns():
    from sklearn import metrics

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 4, generator=generator)
    target = torch.randint(4, (300,), generator=generator)
    probabilities = scores.softmax(1)
    numbers = classification_metrics(scores, probabilities, target)
    predicted = scores.argmax(1)
    assert set(numbers) == {metric.name for metric in METRICS}
    assert numbers["accuracy"] == pytest.approx(metrics.accuracy_score(target, predicted))
    assert numbers["balanced accuracy"] == pytest.approx(metrics.balanced_accuracy_score(target, predicted))
    assert numbers["macro F1"] == pytest.approx(metrics.f1_score(target, predicted, average="macro"))
    assert numbers["log loss"] == pytest.approx(metrics.log_loss(target, probabilities.double()), rel=1e-5)
    brier = ((probabilities - torch.nn.functional.one_hot(target, 4)) ** 2).sum(1).mean()
    assert numbers["Brier score"] == pytest.approx(brier.item(), rel=1e-5)
    assert numbers["worst-class recall"] == pytest.approx(metrics.recall_score(target, predicted, average=None).min())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_together_as_it_trains_alone(name):
    """The batched cells of each contender equal its cells run one by one."""
    problem = TableFolds(None, None, (), None, 5, 0.3, 0)
    splits = [problem(None, fold) for fold in (0, 1, 2)]
    small = [Split(s.train_inputs[:320], s.train_target[:320], s.test_inputs, s.test_target, 10) for s in splits]
    contender = TrainClassifier(OBJECTIVES[name], recipe=Recipe(epochs=2))
    runs = [Run(seed) for seed in range(3)]
    together = contender.batch(small, runs)
    for data, run, outcome in zip(small, runs, together, strict=True):
        alone = contender(data, run)
        assert outcome.curves["training loss"] == pytest.approx(alone.curves["training loss"], abs=1e-5, rel=1e-5)
        assert outcome.metrics["accuracy"] == pytest.approx(alone.metrics["accuracy"], abs=0.01)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_lines_that_train_the_winner_are_real_python(name, csv, tmp_path, monkeypatch):
    study = classify_study(str(csv), target="class", epochs=1, contenders=[name])
    code = winner_code(study, name)
    assert len(code.splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "winner", "exec"), {})
    assert json.loads((tmp_path / "classifier" / "classifier.json").read_text())["classes"] == ["high", "low", "mid"]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return str(path)


ROWS = "a,b,y\n" + "".join(f"{i},{i % 3},{'u' if i % 2 else 'v'}\n" for i in range(20))

BAD = {
    "no such file": (lambda t: (str(t / "absent.csv"), "y"), {}, "no such file"),
    "a near file name": (lambda t: (write(t, "sales.csv", ROWS).replace("sales", "sale"), "y"), {}, "did you mean 'sales.csv'"),
    "no such column": (lambda t: (write(t, "d.csv", ROWS.replace("y", "label", 1)), "lable"), {}, "did you mean 'label'"),
    "no target": (lambda t: (write(t, "d.csv", ROWS), None), {}, "--target is missing"),
    "one class": (lambda t: (write(t, "d.csv", "a,y\n1,u\n2,u\n3,u\n"), "y"), {}, "one class only"),
    "a rare class": (lambda t: (write(t, "d.csv", ROWS + "1,2,w\n2,1,w\n"), "y"), {}, "class 'w' has 2 rows, fewer than the 5 folds"),
    "an empty column": (lambda t: (write(t, "d.csv", "a,c,y\n" + "".join(f"{i},,{'uv'[i % 2]}\n" for i in range(20))), "y"), {}, "column 'c' has no values at all: leave it out with --drop c"),
    "a ragged row": (lambda t: (write(t, "d.csv", ROWS + "1,2,u,9\n"), "y"), {}, "a row has more fields than the header"),
    "missing labels": (lambda t: (write(t, "d.csv", ROWS + "1,2,\n3,4,NaN\n"), "y"), {}, "2 missing labels"),
    "a constant table": (lambda t: (write(t, "d.csv", "a,y\n" + "1,u\n1,v\n" * 10), "y"), {}, "is constant"),
    "an unknown contender": (lambda t: (write(t, "d.csv", ROWS), "y"), {"contenders": ["aldr-lk"]}, "did you mean 'aldr-kl'"),
    "an unknown metric": (lambda t: (write(t, "d.csv", ROWS), "y"), {"metric": "acuracy"}, "did you mean 'accuracy'"),
    "a binary file": (lambda t: (write(t, "d.csv", b"\x89PNG\r\n\x00\x01" * 50), "y"), {}, "binary file"),
    "an empty file": (lambda t: (write(t, "d.csv", ""), "y"), {}, "is empty"),
    "a header only": (lambda t: (write(t, "d.csv", "a,b,y\n"), "y"), {}, "no rows"),
    "an unknown ending": (lambda t: (write(t, "d.xlsx", ROWS), "y"), {}, "must end in one of"),
    "a quantity": (lambda t: (write(t, "d.csv", "a,y\n" + "".join(f"{i},{i / 7}\n" for i in range(60))), "y"), {}, "a quantity, not a class"),
    "only the target": (lambda t: (write(t, "d.csv", "y\nu\nv\n" * 5), "y"), {}, ""),
    "one fold": (lambda t: (write(t, "d.csv", ROWS), "y"), {"folds": 1}, "--folds"),
    "too much noise": (lambda t: (write(t, "d.csv", ROWS), "y"), {"noise": 1.5}, "--noise"),
    "no epochs": (lambda t: (write(t, "d.csv", ROWS), "y"), {"epochs": 0}, "epochs"),
    "an unknown model": (lambda t: (write(t, "d.csv", ROWS), "y"), {"model": "mpl"}, "model must be"),
    "a model that is none": (lambda t: (write(t, "d.csv", ROWS), "y"), {"model": "builtins:divmod"}, "must return a torch.nn.Module, it returns a tuple"),
    "a model that fails": (lambda t: (write(t, "d.csv", ROWS), "y"), {"model": "os:system"}, "fails with TypeError"),
    "a model of another shape": (lambda t: (write(t, "d.csv", ROWS), "y"), {"model": "torch.nn:Bilinear"}, "fails with TypeError"),
    "a negative seed": (lambda t: (write(t, "d.csv", ROWS), "y"), {"seed": -1}, "--seed must be at least 0"),
    "too few groups": (lambda t: (write(t, "d.csv", ROWS), "y"), {"group": "b"}, "3 groups, fewer than the 5 folds"),
    "the target as group": (lambda t: (write(t, "d.csv", ROWS), "y"), {"group": "y"}, "cannot be the target and be the group"),
    "a folder": (lambda t: (str(t), "y"), {}, "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case, tmp_path):
    build, options, message = BAD[case]
    path, target = build(tmp_path)
    with pytest.raises(DataError) as caught:
        classify_study(path, target=target, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_npz_with_pickled_objects_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pathlib.Path(tmp_path / "ran").touch, ())

    np.savez(tmp_path / "d.npz", X=np.array([Bomb()] * 4, dtype=object).reshape(2, 2), y=np.array([0, 1]))
    with pytest.raises(DataError, match="pickled objects"):
        label_table(str(tmp_path / "d.npz"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "arrays", [{"X": np.zeros((3, 2))}, {"X": np.zeros((3, 2)), "y": np.zeros(4)}, {"X": np.zeros(3), "y": np.zeros(3)}]
)
def test_an_npz_without_fitting_arrays_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError):
        label_table(str(tmp_path / "d.npz"))


def test_baselines_come_first_whatever_order_they_are_named_in():
    study = classify_study(contenders=["aldr-kl", "cross-entropy"])
    assert list(study.contenders) == ["cross-entropy", "aldr-kl"]


def test_a_loss_for_three_classes_or_more_is_left_out_of_two_and_refused_by_name(tmp_path):
    path = write(tmp_path, "d.csv", ROWS)
    assert "z-loss" not in classify_study(path, target="y").contenders
    assert "z-loss" in classify_study().contenders
    with pytest.raises(DataError, match="z-loss needs at least 3 classes, the target has 2"):
        classify_study(path, target="y", contenders=["cross-entropy", "z-loss"])


def test_another_table_under_the_same_name_is_read_anew(tmp_path):
    path = write(tmp_path, "d.csv", ROWS)
    first = classify_study(path, target="y")
    write(tmp_path, "d.csv", ROWS + "9,1,u\n")
    second = classify_study(path, target="y")
    assert first.data_key != second.data_key
    assert "21 rows" in second.data
    sizes = [len(second.problem(None, fold).test_target) for fold in range(5)]
    assert sum(sizes) == 21


def test_a_table_that_changes_under_the_run_is_refused(tmp_path):
    path = write(tmp_path, "d.csv", ROWS)
    problem = TableFolds(path, "y", (), None, 5, 0.0, 0, "the hash of what it was")
    with pytest.raises(DataError, match="has changed since the comparison began"):
        problem(None, 0)


def test_a_risk_is_part_of_an_objective():
    loss = Objective("torch.nn:CrossEntropyLoss", risk="minimand.risks:Mean")(3)
    scores, target = torch.randn(5, 3), torch.randint(3, (5,))
    torch.testing.assert_close(loss(scores, target), torch.nn.functional.cross_entropy(scores, target))
