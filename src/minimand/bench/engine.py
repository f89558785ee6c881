"""The engine: runs the cells that the store does not hold yet, here or on a cluster."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle

from .store import Cell, CellKey, Store
from .study import BatchedContender, Outcome, Run, Study

# Cells of one contender trained together. Fixed, so that a resumed run groups them as the first run did
# and its numbers come out bit-equal.
BATCH = 10


@dataclasses.dataclass(frozen=True)
class Failure:
    """A cell that raised.

    Args:
        contender: Whose cell.
        seed: Which cell.
        error: The exception in one line.
        trace: Its traceback.
    """

    contender: str
    seed: int
    error: str
    trace: str


@dataclasses.dataclass(frozen=True)
class Results:
    """All cells of a run, and those that failed."""

    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Cells of one contender that are run together, ready to be sent."""

    contender: str
    seeds: tuple[int, ...]
    payload: bytes


@dataclasses.dataclass(frozen=True)
class Done:
    """What a task brought back: outcomes, or why there are none."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    failure: tuple[str, str] | None = None


Engine = Callable[[Sequence[Task], int], Iterator[tuple[Task, Done]]]
Progress = Callable[[int, int, str], None]


def run(
    study: Study,
    *,
    seeds: int | None = None,
    store: Store | None = None,
    engine: str = "local",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Results:
    """Run every cell of a study that the store does not hold, and return all of them.

    Args:
        study: What to run.
        seeds: Cells a contender; None for the study's own number.
        store: Where cells are kept; None keeps nothing.
        engine: ``"local"`` (a pool of processes) or ``"ray"`` (a Ray cluster).
        jobs: Processes; None for one a core. 1 runs here, without a pool.
        progress: Called with cells done, cells in all and the contender that came in.

    Raises:
        ValueError: If the engine is unknown.
        KeyboardInterrupt: On Ctrl-C, after the workers are stopped; what is done is kept.
    """
    execute = _engine(engine, jobs)
    count = study.seeds if seeds is None else seeds
    if count < 1:
        raise ValueError(f"seeds must be at least 1, got {count}")
    kept = Store(":memory:") if store is None else store
    key_of = _keys(study)
    found: dict[tuple[str, int], Cell] = {}
    tasks = []
    for name, contender in study.contenders.items():
        size = BATCH if isinstance(contender, BatchedContender) else 1
        for start in range(0, count, size):
            group = range(start, min(start + size, count))
            missing = []
            for seed in group:
                cell = kept.get(key_of(name, seed))
                if cell is None:
                    missing.append(seed)
                else:
                    found[name, seed] = cell
            if missing:
                payload = cloudpickle.dumps((contender, study.problem, study.source, tuple(missing)))
                tasks.append(Task(name, tuple(missing), payload))
    total = count * len(study.contenders)
    done = len(found)
    if progress is not None:
        progress(done, total, "")
    failures: list[Failure] = []
    try:
        for task, result in execute(tasks, _workers(jobs, len(tasks))):
            if result.failure is not None:
                failures += [Failure(task.contender, seed, *result.failure) for seed in task.seeds]
            else:
                each = result.seconds / len(task.seeds)
                rows = [
                    (key_of(task.contender, seed), outcome, each if outcome.seconds is None else outcome.seconds)
                    for seed, outcome in zip(task.seeds, result.outcomes, strict=True)
                ]
                kept.put(rows)
                for key, _, _ in rows:
                    cell = kept.get(key)
                    assert cell is not None
                    found[task.contender, key.seed] = cell
            done += len(task.seeds)
            if progress is not None:
                progress(done, total, task.contender)
    finally:
        if store is None:
            kept.close()
    order = [(name, seed) for name in study.contenders for seed in range(count)]
    return Results(tuple(found[place] for place in order if place in found), tuple(failures))


def execute_cells(payload: bytes) -> tuple[list[Outcome], float]:
    """Run the cells of one task. This is what a worker does, wherever it is."""
    contender, problem, source, seeds = cloudpickle.loads(payload)
    with _one_thread():
        datas = [problem(source, seed) for seed in seeds]
        runs = [Run(seed) for seed in seeds]
        start = time.perf_counter()
        if isinstance(contender, BatchedContender):
            outcomes = contender.batch(datas, runs)
        else:
            outcomes = [contender(data, cell) for data, cell in zip(datas, runs, strict=True)]
        return list(outcomes), time.perf_counter() - start


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Hold torch to one thread: a worker a core, and sums in one order whatever the machine."""
    torch = sys.modules.get("torch")
    if torch is None:  # a study without torch need not wait for it
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def code_version(method: str) -> str:
    """Hash what decides a cell's numbers: minimand's own code below the reports, and the libraries' versions."""
    root = pathlib.Path(__file__).resolve().parent.parent
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        room = inside.parts[0]
        if room in ("report", "cli.py") or (room == "studies" and inside.stem != method.replace("-", "_")):
            continue
        digest.update(str(inside).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(json.dumps(versions(), sort_keys=True).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of minimand and of the libraries whose numbers it relies on."""
    names = ("minimand", "torch", "numpy", "scipy", "scikit-learn", "skrub", "polars")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _keys(study: Study) -> Callable[[str, int], CellKey]:
    settings = json.dumps(study.settings, sort_keys=True, default=str)
    code = code_version(study.method)

    def key_of(contender: str, seed: int) -> CellKey:
        return CellKey(study.method, contender, settings, study.data_key, code, seed)

    return key_of


def _workers(jobs: int | None, tasks: int) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available if jobs is None else jobs, tasks))


def _engine(name: str, jobs: int | None) -> Engine:
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if name == "local":
        return _local
    if name == "ray":
        from .cluster import run_on_ray

        return functools.partial(run_on_ray, perform=perform)
    raise ValueError(f"engine must be 'local' or 'ray', got {name!r}")


def perform(task: Task) -> Done:
    """Run a task and report a failure instead of raising it, so that one bad contender stops no other."""
    try:
        outcomes, seconds = execute_cells(task.payload)
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return Done((), 0.0, (line, traceback.format_exc()))
    return Done(tuple(outcomes), seconds)


def _local(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Done]]:
    if workers == 1:
        for task in tasks:
            yield task, perform(task)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        pending = {pool.submit(perform, task): task for task in tasks}
        for future in concurrent.futures.as_completed(pending):
            task = pending[future]
            try:
                yield task, future.result()
            except concurrent.futures.process.BrokenProcessPool:
                # The system killed a worker (out of memory, most often): what is done is in the store.
                message = "a worker process died, perhaps for want of memory; run again to go on, with fewer jobs"
                raise RuntimeError(message) from None
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def as_dict(failure: Failure) -> dict[str, Any]:
    """Return a failure as it stands in a record."""
    return {"contender": failure.contender, "seed": failure.seed, "error": failure.error}
