"""Figures of a benchmark run are shown at its end and kept in benchmarks/results.json."""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch

FIGURES: list[dict[str, object]] = []
RESULTS = pathlib.Path(__file__).with_name("results.json")


@pytest.fixture(autouse=True)
def _one_thread():
    """Time one core: what differs then is the work, not the scheduling."""
    torch.set_num_threads(1)


@pytest.fixture
def record(request):
    """Keep one figure: ``record("aldr-kl step", 1.02, unit="x", target="<= 1.2")``."""

    def keep(name: str, value: float, *, unit: str = "", target: str = "") -> None:
        FIGURES.append(
            {"benchmark": request.node.nodeid, "name": name, "value": float(value), "unit": unit, "target": target}
        )

    return keep


def pytest_terminal_summary(terminalreporter):
    """Show every figure with its target."""
    if not FIGURES:
        return
    terminalreporter.section("figures")
    for figure in FIGURES:
        target = f"  (target {figure['target']})" if figure["target"] else ""
        terminalreporter.write_line(f"{figure['name']}: {figure['value']:.4g} {figure['unit']}{target}")


def pytest_sessionfinish():
    """Merge this run's figures into the stored ones."""
    if not FIGURES or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    ran = {figure["benchmark"] for figure in FIGURES}
    kept = [figure for figure in stored if figure["benchmark"] not in ran]
    RESULTS.write_text(
        json.dumps(sorted([*kept, *FIGURES], key=lambda f: (f["benchmark"], f["name"])), indent=1) + "\n"
    )
