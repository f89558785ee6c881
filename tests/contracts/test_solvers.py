"""No solver hangs: every public part with an iteration limit has a time limit too, and says which one ended it."""

import importlib
import inspect

import pytest
import torch

from minimand import bounds, constraints
from minimand.stopping import Stop

STEEP = torch.linspace(0, 1, 8)[:, None], torch.linspace(0, 3, 8)[:, None].square()


def noisy_signs():
    """A classifier of signs, which noise of size 1 turns now and then."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False)).eval()
    model[0].weight.data = torch.tensor([[-0.5], [0.5]])
    return model, torch.tensor([[-2.0], [1.0]]), torch.tensor([0, 1])


# Name to a call ``(max_iter, max_seconds) -> Stop`` on a problem that takes more than one iteration.
SOLVERS = {
    "LipschitzRegressor": lambda max_iter, max_seconds: (
        constraints.LipschitzRegressor(0.5, max_iter=max_iter, max_seconds=max_seconds).fit(*STEEP).result.status
    ),
    "lipschitz_regression": lambda max_iter, max_seconds: (
        constraints.lipschitz_regression(*STEEP, lipschitz=0.5, max_iter=max_iter, max_seconds=max_seconds).status
    ),
    "noise_tolerance": lambda max_iter, max_seconds: (
        bounds.noise_tolerance(*noisy_signs(), num_samples=100, max_iter=max_iter, max_seconds=max_seconds).status
    ),
}


def exported():
    found = set()
    for room in ("losses", "risks", "constraints", "transport", "optim", "bounds"):
        module = importlib.import_module(f"minimand.{room}")
        for name in module.__all__:
            part = getattr(module, name)
            calls = [part]
            if inspect.isclass(part):
                calls += [member for _, member in inspect.getmembers(part, inspect.isfunction)]
            for call in calls:
                try:
                    parameters = inspect.signature(call).parameters
                except (TypeError, ValueError):
                    continue
                if "max_iter" in parameters:
                    assert "max_seconds" in parameters, f"{room}.{name} can run on without end"
                    found.add(name)
    return found


def test_every_solver_has_a_row():
    assert exported() == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_that_runs_out_of_iterations_says_so(name):
    assert SOLVERS[name](1, None) is Stop.ITERATION_LIMIT


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_that_runs_out_of_time_says_so(name):
    assert SOLVERS[name](10_000_000, 0.0) is Stop.TIME_LIMIT


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_that_is_given_room_converges(name):
    assert SOLVERS[name](10_000, 60.0) is Stop.CONVERGED
