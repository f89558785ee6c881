"""compare classify: the default grid against skorch cell by cell, and a table of twenty million values."""

from __future__ import annotations

import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import polars as pl
import torch
from torch import nn

from minimand import training
from minimand.bench import run
from minimand.bench.classify import OBJECTIVES, classify_study

GIB = 2**30


def skorch_cell(split, criterion: nn.Module, recipe: training.Recipe) -> float:
    """Train one cell as a skorch user would and return its seconds."""
    from skorch import NeuralNetClassifier

    steps = recipe.epochs * training.batches_per_epoch(len(split.train_target), recipe.batch_size)
    from skorch.callbacks import LRScheduler

    network = NeuralNetClassifier(
        training.mlp(split.train_inputs.shape[1], split.num_classes),
        criterion=criterion,
        max_epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        optimizer=torch.optim.AdamW,
        optimizer__weight_decay=recipe.weight_decay,
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        train_split=None,
        verbose=0,
        callbacks=[LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps, step_every="batch")],
    )
    start = time.perf_counter()
    network.fit(split.train_inputs.numpy(), split.train_target.numpy())
    network.predict_proba(split.test_inputs.numpy())
    return time.perf_counter() - start


def test_default_grid_against_skorch(record):
    """Ours is timed whole, start of the worker processes included.

    The peer runs cell by cell, one after the other, and is timed on one cell of each contender and scaled to the grid.
    Losses that need to know the example's place, which skorch does not tell them, are timed there as plain
    cross-entropy, in the peer's favour. Spread over two processes without any loss, the peer would take half as long:
    that figure is kept too.
    """
    study = classify_study()
    start = time.perf_counter()
    results = run(study, jobs=2)
    ours = time.perf_counter() - start
    assert not results.failures
    assert len(results.cells) == 10 * len(study.contenders)
    split = study.problem(None, 0)
    peer = 0.0
    for name, contender in study.contenders.items():
        loss = OBJECTIVES[name](split.num_classes)
        plain = getattr(loss, "needs", ()) or not hasattr(loss, "link")
        criterion = nn.CrossEntropyLoss() if plain else loss
        peer += 10 * skorch_cell(split, criterion, contender.recipe)
    record("compare classify, default grid", ours, unit="s", target="< 60")
    record("skorch, the same grid cell by cell", peer, unit="s")
    record("skorch over minimand", peer / ours, unit="x", target=">= 5")
    record("skorch on two processes, ideally, over minimand", peer / 2 / ours, unit="x")
    assert ours < 60
    assert peer / ours >= 5


def test_twenty_million_values_in_four_gib(record, tmp_path: pathlib.Path):
    """A million rows by twenty columns of all kinds: read, encoded, trained one epoch, in a process of its own."""
    rows = 1_000_000
    generator = np.random.default_rng(0)
    label = generator.integers(0, 3, rows)
    columns = {
        f"number{place}": (generator.normal(size=rows) + label * (place % 3)).astype(np.float32) for place in range(15)
    }
    columns["gaps"] = np.where(generator.random(rows) < 0.2, np.nan, generator.normal(size=rows))
    columns["colour"] = generator.choice(["red", "green", "blue", "grey"], rows)
    columns["city"] = np.char.add("city", generator.integers(0, 25, rows).astype(str))
    columns["day"] = np.datetime64("2020-01-01") + generator.integers(0, 1500, rows)
    frame = pl.DataFrame({**columns, "label": label})
    path = tmp_path / "large.csv"
    frame.write_csv(path)
    del frame, columns
    script = (
        "from minimand import ObjectiveClassifier\n"
        "from minimand.bench.readers import read_table\n"
        f"table = read_table({str(path)!r})\n"
        "model = ObjectiveClassifier(epochs=1, batch_size=512, random_state=0)\n"
        "model.fit(table.drop('label'), table['label'])\n"
        "print(model.history_)\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record("20 million values, peak memory", peak / GIB, unit="GiB", target="< 4")
    record("20 million values, read to trained", seconds, unit="s")
    assert peak < 4 * GIB
