"""Does planning inside what a log covers treat patients better, and more safely, than planning wherever a model leads?

Clinicians treat 300 simulated patients, never with high doses. A quadratic regression on this log makes high doses look
good: what they do to the patient in the end was never seen. All contenders learn from the log alone and are then
judged in the true dynamics. Planners start from a copy of the clinicians and take the same number of steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..bench import Claim, Metric, Outcome, Run, Study
from ..policies import (
    OGSRL,
    ChristoffelGuardian,
    DoseSimulator,
    GaussianPolicy,
    Guardian,
    RegressionModel,
    Transitions,
    logged_rows,
)
from ..training import seeded

RETURN = Metric("true return")
VIOLATIONS = Metric("true violations", "lower is better", "%")
OPTIMISM = Metric("over-optimism", "lower is better")
OUTSIDE = Metric("steps outside the log", "lower is better", "%")
PREDICTED = Metric("return predicted by the model")
METRICS = (RETURN, VIOLATIONS, OPTIMISM, OUTSIDE, PREDICTED)

PATIENTS, JUDGED = 300, 1000
DOSES = 9
COST_LIMIT, PENALTY = 0.1, -2.0
SIMULATOR = DoseSimulator()


@dataclasses.dataclass(frozen=True)
class Ward:
    """A log, and what is learnt from it once for all contenders.

    Args:
        log: Of the clinicians.
        model: Of what follows a dose, fitted to the log.
        guardian: Of what the log covers.
    """

    log: Transitions
    model: RegressionModel
    guardian: Guardian


@functools.lru_cache(maxsize=8)
def ward(source: Any, seed: int) -> Ward:
    """Log patients, and fit model and guardian."""
    log = SIMULATOR.log(PATIENTS, generator=torch.Generator().manual_seed(Run(seed).stream("log")))
    model = RegressionModel(2, cost=SIMULATOR.cost).fit(log)
    return Ward(log, model, ChristoffelGuardian(3, alpha=0.02).fit(logged_rows(log)))


def judge(
    data: Ward, act: Callable[[Tensor], Tensor], run: Run, curves: dict[str, list[float]] | None = None
) -> Outcome:
    """Treat new patients by a policy, in truth and in the model."""
    generator = torch.Generator().manual_seed(run.stream("judge"))
    truth = SIMULATOR.play(act, JUDGED, generator=generator)
    state, predicted = SIMULATOR.start(JUDGED, generator=generator), 0.0
    for _ in range(SIMULATOR.horizon):
        found = data.model(state, act(state).clamp(0, 1))
        state, predicted = found.next_observation, predicted + found.reward.mean().item()
    achieved = truth.episode_returns().mean().item()
    assert truth.cost is not None
    return Outcome(
        {
            RETURN.name: achieved,
            VIOLATIONS.name: truth.cost.mean().item(),
            OPTIMISM.name: max(predicted - achieved, 0.0),
            OUTSIDE.name: (~data.guardian.inside(logged_rows(truth))).float().mean().item(),
            PREDICTED.name: predicted,
        },
        curves or {},
    )


def clinicians(data: Ward, run: Run) -> Outcome:
    """Judge those who made the log."""
    generator = torch.Generator().manual_seed(run.stream("clinicians"))
    return judge(data, functools.partial(SIMULATOR.clinician, generator=generator), run)


def imitation(log: Transitions, run: Run, *, steps: int = 200) -> GaussianPolicy:
    """Copy the clinicians by maximum likelihood."""
    generator = torch.Generator().manual_seed(run.stream("imitation"))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.stream("policy"))
        policy = GaussianPolicy(2, 1, low=0.0, high=1.0, hidden=(16, 16))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(log), (256,), generator=generator)
        optimizer.zero_grad()
        (-policy(log.observation[rows]).log_prob(log.action[rows]).mean()).backward()
        optimizer.step()
    return policy


@dataclasses.dataclass(frozen=True)
class Planner:
    """Improve a copy of the clinicians in the model.

    Args:
        guarded: Whether episodes end where the log does not cover them.
        limited: Whether violations are limited.
        algorithm: Of the limits.
        true_model: Whether the model is the truth, as no one has it.
        steps: Of the trust region.
    """

    guarded: bool = False
    limited: bool = False
    algorithm: Any = "cpo"
    true_model: bool = False
    steps: int = 80

    def __call__(self, data: Ward, run: Run) -> Outcome:
        """Plan, and judge the policy by its mean."""
        generator = torch.Generator().manual_seed(run.stream("planning"))
        truth = functools.partial(SIMULATOR.step, generator=generator)
        policy = imitation(data.log, run)
        learner = OGSRL(
            policy,
            data.log,
            truth if self.true_model else data.model,
            guardian=data.guardian if self.guarded else None,
            cost_limits=[COST_LIMIT] if self.limited else None,
            outside_penalty=PENALTY,
            algorithm=self.algorithm,
            action_range=(0.0, 1.0),
            num_episodes=64,
            max_kl=0.05,
            critic_hidden=(32, 32),
            critic_lr=3e-3,
            generator=generator,
        )
        rewards, outside = [], []
        for _ in range(self.steps):
            seen = learner.step()
            rewards.append(seen.reward)
            outside.append(seen.outside)
        return judge(data, policy.act, run, {"predicted reward": rewards, "steps outside": outside})


@dataclasses.dataclass(frozen=True)
class ConservativeQ:
    """CQL over nine doses: squared temporal differences, and values of doses that were not logged pushed down.

    Args:
        weight: Of the push; 1 in the paper's code.
        guarded: Whether a dose that the policy would give pays the penalty where it lies outside: the paper's GCQL.
        balanced: Whether episodes are drawn the more often the rarer their doses: the paper's CCQL.
        price: Of a violation, taken off the reward.
        steps: Of Adam.
    """

    weight: float = 1.0
    guarded: bool = False
    balanced: bool = False
    price: float = 0.0
    steps: int = 600

    def __call__(self, data: Ward, run: Run) -> Outcome:
        """Learn values of doses, and judge the policy of the best dose."""
        generator = torch.Generator().manual_seed(run.stream("cql"))
        log, doses = data.log, torch.linspace(0, 1, DOSES)
        assert log.cost is not None
        dose = (log.action[:, 0] * (DOSES - 1)).round().long()
        reward = log.reward - self.price * log.cost[:, 0]
        left = (SIMULATOR.horizon - 1 - torch.arange(len(log)) % SIMULATOR.horizon) / SIMULATOR.horizon
        weights = self._weights(log, dose)
        network = seeded(self._network, run.stream("network"))
        target = seeded(self._network, run.stream("network"))
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for step in range(self.steps):
            if step % 20 == 0:
                target.load_state_dict(network.state_dict())
            rows = torch.multinomial(weights, 256, replacement=True, generator=generator)
            values = network(log.observation[rows])
            paid = reward[rows]
            with torch.no_grad():
                if self.guarded:
                    own = torch.cat([log.observation[rows], doses[values.argmax(1), None]], 1)
                    paid = paid + PENALTY * ~data.guardian.inside(own)
                # Truncation at the horizon is no end, but in a task of a fixed horizon nothing counts after it.
                following = target(log.next_observation[rows]).amax(1) * (left[rows] > 0)
            chosen = values.gather(1, dose[rows, None]).squeeze(1)
            push = (values.logsumexp(1) - chosen).mean()
            optimizer.zero_grad()
            (functional.mse_loss(chosen, paid + 0.99 * following) + self.weight * push).backward()
            optimizer.step()
        return judge(data, lambda state: doses[network(state).argmax(1), None], run)

    def _weights(self, log: Transitions, dose: Tensor) -> Tensor:
        if not self.balanced:
            return torch.ones(len(log))
        rare = 1 / torch.bincount(dose, minlength=DOSES).clamp_min(1).float()[dose]
        episode = log.episode_index()
        return torch.zeros(log.num_episodes).index_add_(0, episode, rare)[episode]

    @staticmethod
    def _network() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DOSES))


study = Study(
    method="ogsrl",
    problem=ward,
    contenders={
        "clinicians": clinicians,
        "CQL": ConservativeQ(),
        "CQL, guarded (GCQL)": ConservativeQ(guarded=True),
        "CQL, balanced doses (CCQL)": ConservativeQ(balanced=True),
        "planning": Planner(),
        "planning, cost limit (MB-CPO)": Planner(limited=True),
        "planning, guarded (GMB-TRPO)": Planner(guarded=True),
        "OGSRL": Planner(guarded=True, limited=True),
        "OGSRL, Lagrangian": Planner(guarded=True, limited=True, algorithm="lagrangian"),
        "planning in the truth, cost limit": Planner(limited=True, true_model=True),
    },
    metrics=METRICS,
    claims=(
        Claim("OGSRL", beats="planning", says="a guardian makes planning in a learnt model better in truth"),
        Claim("OGSRL", beats="clinicians", margin=0.5, says="it beats those who made the log by half a point"),
        Claim("OGSRL", beats="planning", metric=VIOLATIONS.name, says="a guardian makes planning safer"),
        Claim(
            "OGSRL",
            beats="planning, cost limit (MB-CPO)",
            metric=VIOLATIONS.name,
            margin=0.1,
            says="limiting costs in the model without a guardian does not limit them in truth: 10 points more",
        ),
        Claim("OGSRL", beats="planning", metric=OPTIMISM.name, margin=1.0, says="it keeps the model's promises"),
        Claim("OGSRL", beats="CQL", says="it beats conservative values"),
        Claim("OGSRL", beats="CQL, guarded (GCQL)", says="it beats conservative values with the same guardian"),
        Claim(
            "OGSRL",
            beats="planning, guarded (GMB-TRPO)",
            metric=VIOLATIONS.name,
            says="the cost limit adds safety to the guardian's",
        ),
    ),
    seeds=5,
    about="A simulated treatment whose harm comes late and was hardly logged; 300 patients treated by clinicians.",
    notes=(
        "The paper's data (MIMIC-III) are not public and the simulator is ours. The penalty outside, -2 a step, is "
        "twice the worst reward of a step, as in the paper's code; policies start as copies of the clinicians, which "
        "the paper's do not."
    ),
)
