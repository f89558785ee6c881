"""The engine runs each cell once, keeps it, and gives the same numbers however it was interrupted."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from minimand.bench import Store, make_record, run
from minimand.bench.engine import code_version

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy


def numbers(results):
    return {(cell.contender, cell.seed): (cell.outcome.metrics, cell.outcome.curves) for cell in results.cells}


@pytest.fixture(scope="module")
def uninterrupted():
    return numbers(run(toy.study(), jobs=1))


def test_every_cell_comes_back_in_order(uninterrupted):
    assert list(uninterrupted) == [(name, seed) for name in ("narrow", "wide", "wider") for seed in range(20)]


def test_a_pool_of_processes_gives_the_same_bits(uninterrupted):
    assert numbers(run(toy.study(), jobs=2)) == uninterrupted


def test_cells_run_together_equal_cells_run_alone(uninterrupted):
    alone = run(toy.study(contenders={"narrow": toy.Alone(4)}, claims=()), jobs=1)
    for cell in alone.cells:
        _, curves = uninterrupted["narrow", cell.seed]
        assert cell.outcome.curves["loss"] == pytest.approx(curves["loss"], abs=1e-5)


def test_a_cell_in_the_store_is_not_run_again(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        first = run(toy.study(), store=store, jobs=1)
        again = run(toy.study(), store=store, jobs=1)
        # A cell that had been run anew would have taken other seconds.
        assert [cell.seconds for cell in again.cells] == [cell.seconds for cell in first.cells]
        more = run(toy.study(), store=store, jobs=1, seeds=30)
        assert len(more.cells) == 90
        assert len(store) == 90


def test_other_settings_are_other_cells(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        run(toy.study(seeds=1), store=store, jobs=1)
        run(toy.study(seeds=1, settings={"epochs": 3}), store=store, jobs=1)
        run(toy.study(seeds=1, data_key="another"), store=store, jobs=1)
        assert len(store) == 9


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_the_same_bits(tmp_path, uninterrupted):
    """A child runs the study and is killed with SIGKILL; the next one goes on from the store."""
    path = tmp_path / "store.sqlite"
    start = time.perf_counter()
    run(toy.study(), jobs=1)
    whole = time.perf_counter() - start
    moments = random.Random(0)
    sizes = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            with Store(path) as store:
                run(toy.study(), store=store, jobs=1)
            os._exit(0)
        time.sleep(moments.uniform(0, whole / 6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Store(path) as store:
            sizes.append(len(store))
    assert sizes == sorted(sizes)
    assert sizes[0] < 60
    with Store(path) as store:
        assert numbers(run(toy.study(), store=store, jobs=1)) == uninterrupted
        assert len(store) == 60


@pytest.mark.slow
def test_a_killed_parent_takes_its_workers_along_and_loses_nothing(tmp_path, uninterrupted):
    path = tmp_path / "store.sqlite"
    script = (
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import toy; from minimand.bench import Store, run\n"
        f"if __name__ == '__main__':\n    with Store({str(path)!r}) as store: run(toy.study(), store=store, jobs=2)\n"
    )
    (tmp_path / "script.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists():
            with Store(path) as store:
                if len(store):
                    break
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and members(parent.pid):
        time.sleep(0.1)
    assert not members(parent.pid)
    with Store(path) as store:
        assert len(store) >= 10
        assert numbers(run(toy.study(), store=store, jobs=1)) == uninterrupted


def members(group):
    """Process ids of a process group that are alive."""
    alive = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                alive.append(int(entry.name))
    return alive


def test_a_failing_cell_stops_no_other():
    results = run(toy.failing(), jobs=1)
    assert len(results.cells) == 5
    (failure,) = results.failures
    assert (failure.contender, failure.seed) == ("fails", 1)
    assert failure.error == "ZeroDivisionError: on purpose"
    record = make_record(toy.failing(), results, kind="compare", problem="toy", seconds=1.0)
    assert record["failures"] == [{"contender": "fails", "seed": 1, "error": "ZeroDivisionError: on purpose"}]


def test_the_record_is_plain_json_and_judges_the_claim(uninterrupted):
    study = toy.study()
    record = make_record(study, run(study, jobs=1), kind="reproduce", problem="toy", seconds=1.0)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["verdict"] in ("confirmed", "refuted", "inconclusive")
    assert {row["name"] for row in record["summary"]["accuracy"]} == {"narrow", "wide", "wider"}
    assert [row["a"] for row in record["comparisons"]["accuracy"]] == ["wide", "wider"]


def test_progress_counts_every_cell():
    seen = []
    run(toy.study(seeds=3), jobs=1, progress=lambda done, total, name: seen.append((done, total)))
    assert seen[0] == (0, 9)
    assert seen[-1] == (9, 9)


def test_unknown_engines_and_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="engine must be"):
        run(toy.study(), engine="cloud")
    with pytest.raises(ValueError, match="jobs must be"):
        run(toy.study(), jobs=0)
    with pytest.raises(ValueError, match="seeds must be"):
        run(toy.study(), seeds=0)


def test_the_code_version_is_stable():
    assert code_version("aldr-kl") == code_version("aldr-kl") != code_version("comp-sum")


def test_claims_must_name_contenders_and_metrics():
    from minimand.bench import Claim

    with pytest.raises(ValueError, match="not a contender"):
        toy.study(claims=(Claim("nobody", beats="narrow"),))
    with pytest.raises(ValueError, match="not a metric"):
        toy.study(claims=(Claim("wide", beats="narrow", metric="recall"),))
