"""How much memory something took at its height."""

from __future__ import annotations

import contextlib
import pathlib
import resource
import sys

import torch

_STATUS, _CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Start measuring anew, where the system allows that: Linux and CUDA."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def peak_megabytes() -> float:
    """Return the largest resident memory of this process since :func:`forget_peak`, plus that on the GPU, in MB."""
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1e3 * 1.024 + on_device / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6 + on_device / 1e6
