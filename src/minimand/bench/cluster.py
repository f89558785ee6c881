"""Cells on a Ray cluster: the same tasks, sent to whichever machine is free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Done = TypeVar("Done")


def run_on_ray(tasks: Sequence[Task], workers: int, *, perform: Callable[[Task], Done]) -> Iterator[tuple[Task, Done]]:
    """Run tasks on the Ray cluster that is connected, or named by ``RAY_ADDRESS``, or else on a local one.

    minimand must be installed on every machine of the cluster. Each task takes one CPU; Ray runs a task
    again when its machine is lost.

    Args:
        tasks: What to run.
        workers: CPUs of a local cluster, if one has to be started.
        perform: Runs one task.

    Yields:
        Each task with what it brought back, as they come in.

    Raises:
        ValueError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("the ray engine needs Ray: pip install 'minimand[ray]'") from None
    started = not ray.is_initialized()
    if started:
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=3)(perform)
    try:
        pending = {remote.remote(task): task for task in tasks}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            for reference in ready:
                yield pending.pop(reference), ray.get(reference)
    finally:
        if started:
            ray.shutdown()
