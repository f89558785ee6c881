"""The commands as a user types them."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from minimand.catalogue import methods
from minimand.cli import app

runner = CliRunner()
ROWS = "a,b,label\n" + "".join(f"{i % 7},{i % 3},{'u' if i % 2 else 'v'}\n" for i in range(40))


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMAND_STORE", str(tmp_path / "store.sqlite"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text(ROWS)
    return str(path)


def quick(data, *more):
    return ["compare", "classify", data, "--target", "label", "--epochs", "2", "--folds", "2", "--repeats", "1", "--jobs", "1",
            "--contenders", "cross-entropy,mae,aldr-kl", *more]  # fmt: skip


def test_compare_prints_a_leaderboard_a_sentence_and_the_winners_code(data, tmp_path):
    result = runner.invoke(app, quick(data, "--out", "there"))
    assert result.exit_code == 0, result.output
    for name in ("cross-entropy", "mae", "aldr-kl"):
        assert name in result.output
    assert "ObjectiveClassifier(" in result.output
    page = (tmp_path / "there" / "compare-classify.html").read_text()
    assert "aldr-kl" in page


def test_json_is_one_object_of_the_promised_shape(data):
    result = runner.invoke(app, quick(data, "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == [
        "problem",
        "data",
        "metric",
        "cells",
        "seconds",
        "contenders",
        "best",
        "comparisons",
        "report",
    ]
    assert found["cells"] == 6
    assert set(found["contenders"][0]) == {"name", "mean", "low", "high", "seconds"}
    assert set(found["comparisons"][0]) == {"a", "b", "difference", "low", "high", "p", "verdict"}
    assert pathlib.Path(found["report"]).exists()


def test_the_second_run_reads_the_store(data):
    first = json.loads(runner.invoke(app, quick(data, "--json")).stdout)
    second = json.loads(runner.invoke(app, quick(data, "--json")).stdout)
    assert first["contenders"] == second["contenders"]


def test_noise_metric_group_and_drop_are_heard(data):
    result = runner.invoke(app, quick(data, "--json", "--noise", "0.2", "--metric", "log-loss", "--drop", "b"))
    found = json.loads(result.stdout)
    assert found["metric"] == "log loss"
    assert "20 %" in found["data"]
    assert "1 columns" in found["data"]


def test_tuning_runs_the_asked_number_of_trials(data):
    result = runner.invoke(app, [*quick(data, "--json", "--tune", "2")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "classify", "absent.csv", "--target", "y"], "no such file"),
        (["compare", "classify", "my.csv", "--target", "lable"], "did you mean 'label'"),
        (["compare", "classify", "my.csv", "--target", "label", "--contenders", "magic"], "'magic' is unknown"),
        (["compare", "classify", "my.csv", "--target", "label", "--engine", "cloud"], "engine must be"),
        (["compare", "classify", "my.csv", "--target", "label", "--jobs", "0"], "jobs must be"),
        (["compare", "classify", "my.csv", "--target", "label", "--out", "my.csv"], "is a file, not a folder"),
        (["compare", "classify", "my.csv", "--target", "label", "--out", "/proc/here"], "--out"),
        (["compare", "bags", "my.csv"], "--target and --bag"),
        (["compare", "calibrate", "absent.npz"], "absent.npz"),
        (["compare", "bounds", "absent", "my.csv", "--test-fraction", "0.5"], "MODEL must be a folder"),
        (["compare", "bounds", "absent"], "DATA is needed"),
        (["compare", "bounds", "--delta", "2"], "--delta must lie between 0 and 1"),
        (["reproduce", "aldr"], "did you mean aldr-kl"),
        (["reproduce", "neur2ro"], "has no study yet"),
        (["show", "nothing"], "there is no method"),
        (["list", "--room", "kitchen"], "rooms are"),
    ],
)
def test_a_wrong_word_gets_one_sentence_and_exit_code_two(arguments, message, data, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("store"))
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert before == sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("store"))


def test_bounds_audits_a_saved_classifier(data, tmp_path):
    import polars as pl

    from minimand import ObjectiveClassifier

    table = pl.read_csv(data).with_row_index("row")
    ObjectiveClassifier(epochs=2, random_state=0).fit(table[:20].drop("label"), table[:20]["label"]).save("model")
    table.write_csv("rows.csv")
    command = ["compare", "bounds", "model", "rows.csv", "--target", "label", "--test-fraction", "0.5"]
    command += ["--repeats", "2", "--jobs", "1", "--out", "there"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    for words in ("hold-out bound", "floor in the worse world", "path norm", "Trust no number"):
        assert words in result.output
    assert "What is promised, and every measure" in (tmp_path / "there" / "compare-bounds.html").read_text()
    found = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert found["cells"] == 14
    assert found["floor"] == found["error"] / 2
    assert found["measures"]["l2_norm"] > 0


def test_list_shows_all_methods_as_data():
    rows = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert len(rows) == 57
    for row in rows:
        assert {"name", "room", "parts", "card", "proofs", "verdict"} <= set(row)
        assert set(row["proofs"]) == {"oracles", "contracts", "study", "benchmark", "page"}


def test_show_tells_the_paper_and_the_parts():
    result = runner.invoke(app, ["show", "aldr-kl"])
    assert "2112.14869" in result.output
    assert "ALDRKLLoss" in result.output


def run_python(*code):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def test_importing_minimand_loads_no_torch_and_costs_next_to_nothing():
    code = "import sys, time; s = time.process_time(); import minimand; print(time.process_time() - s, 'torch' in sys.modules)"
    seconds, torch_loaded = run_python("-c", code)[1].split()
    assert torch_loaded == "False"
    assert float(seconds) < 0.3


@pytest.mark.parametrize(
    "words",
    [["list"], ["show", "z-loss"], ["--help"], ["compare", "classify", "--help"], ["compare", "bounds", "--help"]],
)
def test_what_needs_no_torch_answers_at_once(words):
    code = (
        "import sys, resource, runpy; sys.argv = ['minimand'] + " + repr(words) + "\n"
        "try:\n    runpy.run_module('minimand', run_name='__main__')\nexcept SystemExit: pass\n"
        "print('\\nCPU', resource.getrusage(resource.RUSAGE_SELF).ru_utime, 'torch' in sys.modules)"
    )
    _, output = run_python("-c", code)
    _, seconds, torch_loaded = output.strip().splitlines()[-1].split()
    assert torch_loaded == "False"
    # The machine may be busy, so the processor's time is what is held to the half second.
    assert float(seconds) < 0.5


def test_ctrl_c_keeps_what_is_done(data, tmp_path):
    import signal

    command = [sys.executable, "-m", "minimand", *quick(data, "--epochs", "400", "--folds", "5", "--repeats", "40")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ, text=True)
    from minimand.bench import Store

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "store.sqlite").exists():
            with Store(tmp_path / "store.sqlite") as store:
                if len(store):
                    break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "minimand-report").exists()


def test_the_studied_methods_are_those_that_can_be_reproduced():
    shown = runner.invoke(app, ["list", "--studied", "--names"]).stdout.split()
    assert shown == [method.name for method in methods() if method.studied]
    assert set(shown) < {method.name for method in methods()}
    without = next(method for method in methods() if not method.studied)
    refused = runner.invoke(app, ["reproduce", without.name])
    assert refused.exit_code == 2
    assert "minimand list --studied" in refused.output
    nobody = runner.invoke(app, ["list", "--studied", "--room", without.room])
    alone = not any(method.studied for method in methods() if method.room == without.room)
    assert ("is studied yet" in nobody.output) == alone
