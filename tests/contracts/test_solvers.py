"""No solver hangs: every public part with an iteration limit has a time limit too, and says which one ended it."""

import importlib
import inspect

import pytest
import torch

from minimand import bounds, constraints, online, policies, preferences, transport
from minimand.stopping import Stop

STEEP = torch.linspace(0, 1, 8)[:, None], torch.linspace(0, 3, 8)[:, None].square()


def noisy_signs():
    """A classifier of signs, which noise of size 1 turns now and then."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False)).eval()
    model[0].weight.data = torch.tensor([[-0.5], [0.5]])
    return model, torch.tensor([[-2.0], [1.0]]), torch.tensor([0, 1])


def on_the_circle(max_iter, max_seconds):
    """The lowest point of a circle, by Newton's method."""
    solver, start = constraints.ExactALNewton(), torch.tensor([0.8, 0.6], dtype=torch.float64)
    settings = {"max_iter": max_iter, "max_seconds": max_seconds}
    return solver.minimize(lambda x: x[0], lambda x: x.square().sum()[None] - 1, start, **settings)


def waves():
    """Columns that depend on one another in no order."""
    mix = torch.linspace(0, 60, 64, dtype=torch.float64).sin().view(8, 8) + torch.eye(8, dtype=torch.float64)
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ mix


def thresholds(max_iter, max_seconds):
    """The best of two thresholds, by asking."""
    box = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    search = preferences.ThresholdSearch(
        box, generator=torch.Generator().manual_seed(0), max_iter=max_iter, max_seconds=max_seconds
    )
    return search.run(lambda theta: -float((theta - 0.6).square().sum()))


def circling():
    """Rock beats scissors beat paper beats rock, and a reference that likes rock."""
    beats = torch.tensor([[0.5, 0.1, 0.9], [0.9, 0.5, 0.1], [0.1, 0.9, 0.5]], dtype=torch.float64)
    return beats, torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)


def stocked(max_iter, max_seconds):
    """One unit up or down at each of three steps, towards a target."""
    reward = torch.tensor([1.0, -1.0]).view(1, 2, 1)
    mdp = policies.StockMDP(torch.ones(1, 2, 1), reward, discount=1.0)
    settings = {"horizon": 3, "max_iter": max_iter, "max_seconds": max_seconds}
    return mdp.value_iteration(policies.ExpectedUtility.target(), torch.tensor([0]), torch.tensor([-1.0]), **settings)


SLOPES = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])


class Levers:
    """One lever pays in one reward, the other in the other."""

    observation_size, num_objectives, action_size, discrete = 1, 2, 2, True

    def __init__(self, num_episodes, seed):
        self.num_episodes = num_episodes

    def reset(self):
        return torch.zeros(self.num_episodes, 1)

    def step(self, action):
        over = torch.ones(self.num_episodes, dtype=torch.bool)
        return policies.VectorStep(self.reset(), torch.eye(2)[action], over, ~over, self.reset())


# Name to a call ``(max_iter, max_seconds) -> Stop`` on a problem that takes more than one iteration.
SOLVERS = {
    "TabularCMDP": lambda max_iter, max_seconds: (
        policies.TabularCMDP(
            torch.linspace(0, 9, 50).view(5, 2, 5).sin().abs().softmax(-1),
            torch.linspace(0, 7, 10).view(5, 2).cos(),
            torch.full((5,), 0.2),
            discount=0.9,
            cost=torch.linspace(0, 5, 10).view(1, 5, 2).sin(),
        )
        .solve(torch.tensor([2.0]), max_iter=max_iter, max_seconds=max_seconds)
        .status
    ),
    "train_portfolio": lambda max_iter, max_seconds: (
        policies.train_portfolio(
            policies.PortfolioPolicy(2, window=2, width=2, hidden=4),
            policies.PriceHistory(torch.linspace(1, 2, 24).view(12, 2)),
            horizon=4,
            num_episodes=2,
            cost=0.0,
            lr=1e-6,
            patience=3,
            tolerance=1e3,
            max_iter=max_iter,
            max_seconds=max_seconds,
        ).status
    ),
    "conjugate_gradients": lambda max_iter, max_seconds: (
        policies.conjugate_gradients(lambda v: v @ SLOPES, SLOPES[0], max_iter=max_iter, max_seconds=max_seconds).status
    ),
    "trust_region_step": lambda max_iter, max_seconds: (
        policies.trust_region_step(SLOPES[0], lambda v: v @ SLOPES, max_iter=max_iter, max_seconds=max_seconds).status
    ),
    "backtracking": lambda max_iter, max_seconds: (
        policies.backtracking(
            torch.ones(3), lambda step: step[0] < 0.5, max_iter=max_iter, max_seconds=max_seconds
        ).status
    ),
    "train_c_morl": lambda max_iter, max_seconds: (
        policies.train_c_morl(
            Levers,
            reference=torch.zeros(2),
            settings=policies.PPOSettings(num_steps=8, num_minibatches=4, epochs=1),
            initial_updates=2,
            extension_updates=1,
            capacity=1,
            max_iter=max_iter,
            max_seconds=max_seconds,
        ).status
    ),
    "risk_parity": lambda max_iter, max_seconds: (
        policies.risk_parity(
            torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]),
            max_iter=max_iter,
            max_seconds=max_seconds,
        ).status
    ),
    "StockMDP": lambda max_iter, max_seconds: stocked(max_iter, max_seconds).status,
    "QueryGame": lambda max_iter, max_seconds: (
        online.QueryGame(online.thresholds(2), budget=3)
        .solve(online.thresholds(2) / 2, max_iter=max_iter, max_seconds=max_seconds)
        .status
    ),
    "complexity": lambda max_iter, max_seconds: (
        online.complexity(
            torch.tensor([3.0, 2.0, 0.0]), torch.eye(3), max_iter=max_iter, max_seconds=max_seconds
        ).status
    ),
    "log_barrier_step": lambda max_iter, max_seconds: (
        online.log_barrier_step(
            torch.tensor([0.0, 1.0, 9.0]), learning_rate=1.0, max_iter=max_iter, max_seconds=max_seconds
        ).status
    ),
    "f_matching_dual": lambda max_iter, max_seconds: (
        preferences.f_matching_dual(
            torch.tensor([0.7, 0.2, 0.1]),
            torch.tensor([0.1, 0.2, 0.7]),
            max_iter=max_iter,
            max_seconds=max_seconds,
        ).status
    ),
    "PreferenceGame": lambda max_iter, max_seconds: (
        preferences.PreferenceGame(circling()[0], circling()[1].log(), tau=0.1)
        .nash(max_iter=max_iter, max_seconds=max_seconds)
        .status
    ),
    "bradley_terry": lambda max_iter, max_seconds: (
        preferences.bradley_terry(*circling(), max_iter=max_iter, max_seconds=max_seconds).status
    ),
    "ExactALNewton": lambda max_iter, max_seconds: on_the_circle(max_iter, max_seconds).status,
    "TopoSwap": lambda max_iter, max_seconds: (
        constraints.TopoSwap(max_iter=max_iter, max_seconds=max_seconds).fit(waves(), order=list(range(8))).status
    ),
    "ThresholdSearch": lambda max_iter, max_seconds: thresholds(max_iter, max_seconds).status,
    "LipschitzRegressor": lambda max_iter, max_seconds: (
        constraints.LipschitzRegressor(0.5, max_iter=max_iter, max_seconds=max_seconds).fit(*STEEP).result.status
    ),
    "lipschitz_regression": lambda max_iter, max_seconds: (
        constraints.lipschitz_regression(*STEEP, lipschitz=0.5, max_iter=max_iter, max_seconds=max_seconds).status
    ),
    "noise_tolerance": lambda max_iter, max_seconds: (
        bounds.noise_tolerance(*noisy_signs(), num_samples=100, max_iter=max_iter, max_seconds=max_seconds).status
    ),
    "semi_relaxed_partial_ot": lambda max_iter, max_seconds: (
        transport.semi_relaxed_partial_ot(
            torch.linspace(0, 1, 24).view(8, 3).sin(), mass=0.5, max_iter=max_iter, max_seconds=max_seconds
        ).status
    ),
    "sketch_and_project": lambda max_iter, max_seconds: (
        constraints.sketch_and_project(
            torch.eye(4), torch.ones(4), sketch="kaczmarz", max_iter=max_iter, max_seconds=max_seconds
        ).status
    ),
    "sparse_ot": lambda max_iter, max_seconds: (
        transport.sparse_ot(
            torch.linspace(0, 1, 24).view(4, 6).sin(), k=4, max_iter=max_iter, max_seconds=max_seconds
        ).status
    ),
}


def exported():
    found = set()
    for room in ("losses", "risks", "constraints", "transport", "optim", "bounds", "preferences", "policies", "online"):
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
