"""Do constrained steps find more of a Pareto front than weighted sums that take as many steps?

Three problems whose fronts are concave, where weighted sums find little but the ends. Functions: those of Fonseca and
Fleming, whose front and hypervolume are known, climbed by Adam. Places: a point moves for ten steps and is paid, at
the end, by how near it is to each of two goals; the front is the same, the policies are learned by PPO. Nine: the same
with nine goals on a circle.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..bench import Claim, Metric, Outcome, Run, Study
from ..policies import (
    CMORLTraining,
    ParetoArchive,
    PPOSettings,
    VectorActorCritic,
    VectorEnvironment,
    VectorStep,
    extension_thresholds,
    interior_point_barrier,
    train_c_morl,
    trust_region_step,
    weight_grid,
)

PLACES = Metric("hypervolume, two places")
GAPS = Metric("sparsity, two places", "lower is better")
UTILITY = Metric("expected utility, two places")
ONE_ROUND = Metric("hypervolume, functions, one round")
FUNCTIONS = Metric("hypervolume, functions")
NINE = Metric("side of the hypervolume, nine places")
NINE_UTILITY = Metric("expected utility, nine places")
STEPS = Metric("thousand steps, two places", "lower is better")
METRICS = (PLACES, GAPS, UTILITY, ONE_ROUND, FUNCTIONS, NINE, NINE_UTILITY, STEPS)

HORIZON, REACH = 10, 0.3
SETTINGS = PPOSettings(num_envs=32, num_steps=HORIZON, epochs=4, num_minibatches=2, lr=1e-3, gamma=0.99)
Extension = Literal["ipo", "cpo", "free"]


class Places:
    """A point in the plane that moves where it is told, and is paid for where it ends.

    Args:
        goals: Where they are, ``(objectives, 2)``.
        num_episodes: How many points.
        seed: Of nothing: all start at one place.
    """

    observation_size, action_size, discrete = 3, 2, False

    def __init__(self, goals: Tensor, num_episodes: int, seed: int) -> None:
        self.goals, self.num_episodes, self.num_objectives = goals, num_episodes, len(goals)

    def reset(self) -> Tensor:
        """Put all points where no goal is near."""
        self.place = START.repeat(self.num_episodes, 1)
        self.time = 0
        return self._seen()

    def step(self, action: Tensor) -> VectorStep:
        """Move; all episodes end together."""
        self.place, self.time = self.place + REACH * action.clamp(-1, 1), self.time + 1
        last = self._seen()
        over = torch.full((self.num_episodes,), self.time == HORIZON)
        rewards = (-(self.place[:, None] - self.goals).square().sum(-1)).exp() * over[:, None]
        return VectorStep(self.reset() if self.time == HORIZON else last, rewards, over, torch.zeros_like(over), last)

    def _seen(self) -> Tensor:
        return torch.cat([self.place, torch.full((self.num_episodes, 1), self.time / HORIZON)], 1)


START = torch.tensor([0.0, -1.5])
TWO = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
ANGLES = 2 * math.pi * torch.arange(9) / 9
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def network(env: VectorEnvironment) -> VectorActorCritic:
    """Make a network half as wide as the paper's."""
    return VectorActorCritic(
        env.observation_size, env.action_size, env.num_objectives, discrete=env.discrete, hidden=(32, 32)
    )


def fonseca_fleming(points: Tensor) -> Tensor:
    """Return two objectives of points in space, one a goal: the nearer the better."""
    goal = torch.full((3,), 1 / math.sqrt(3))
    return torch.stack([(-(points - goal).square().sum(-1)).exp(), (-(points + goal).square().sum(-1)).exp()], -1)


def climb(archive: ParetoArchive, points: Tensor, loss: Callable[[Tensor], Tensor], *, steps: int = 150) -> None:
    """Lower a loss of the objectives of each point by Adam; every tenth place goes to the archive."""
    points = points.clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.03)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(fonseca_fleming(points)).sum().backward()
        optimizer.step()
        if step % 10 == 0:
            archive.add(fonseca_fleming(points.detach()), list(points.detach().clone()))


def extend(archive: ParetoArchive, extension: Extension) -> None:
    """Extend five points towards both objectives."""
    chosen = archive.select(5)
    points = torch.stack([one.payload for one in chosen for _ in range(2)])
    goals = torch.arange(2).repeat(len(chosen))
    thresholds = extension_thresholds(fonseca_fleming(points))

    def other(values: Tensor) -> Tensor:
        return values.gather(1, 1 - goals[:, None]).squeeze(1)

    def loss(values: Tensor) -> Tensor:
        towards = -values.gather(1, goals[:, None]).squeeze(1)
        return towards if extension == "free" else towards + interior_point_barrier(other(values - thresholds))

    if extension != "cpo":
        climb(archive, points, loss)
        return
    for step in range(1, 151):
        points.requires_grad_()
        values = fonseca_fleming(points)
        gain, violation = values.gather(1, goals[:, None]).sum(), other(thresholds - values)
        gradients = [torch.autograd.grad(each, points, retain_graph=True)[0] for each in (gain, violation.sum())]
        found = trust_region_step(
            gradients[0],
            lambda vector: vector,
            constraint_gradients=gradients[1][:, None],
            violations=violation.detach()[:, None],
            max_kl=0.03**2 / 2,  # as far as a step of Adam goes in one coordinate
        )
        points = (points.detach() + found.step).detach()
        if step % 10 == 0:
            archive.add(fonseca_fleming(points), list(points.clone()))


def functions(extension: Extension | None, start: Tensor, *, worst: bool) -> float:
    """Return the hypervolume found by as many climbs as there are starts; ten a round go into extension."""
    archive = ParetoArchive(torch.zeros(2), capacity=1000)
    count = len(start) if extension is None else 6
    weights = weight_grid(2, divisions=count - 1)

    def loss(values: Tensor) -> Tensor:
        # The worst shortfall from the best there is, 1, has minima on concave fronts too.
        return (weights * (1 - values)).amax(1) if worst else -(weights * values).sum(1)

    climb(archive, start[:count], loss)
    if extension is not None:
        for _ in range((len(start) - count) // 10):
            extend(archive, extension)
    return archive.hypervolume()


@dataclasses.dataclass(frozen=True)
class Search:
    """Look for the fronts of all three problems.

    Args:
        extension: How the constraints of an extension are held, or "free" for none; None trains all policies for
            weighted sums.
        divisions: Of the grids of weights on two and on nine objectives; 0 leaves the latter out.
        updates: Of those policies; extension adds to them.
        worst: Whether functions are climbed for their worst weighted shortfall in place of a weighted sum.
    """

    extension: Extension | None
    divisions: tuple[int, int]
    updates: tuple[int, int]
    worst: bool = False

    def __call__(self, data: int, run: Run) -> Outcome:
        """Search and measure one cell."""
        generator = torch.Generator().manual_seed(data)
        start = 0.5 * torch.randn(156, 3, generator=generator)
        metrics = dict.fromkeys((metric.name for metric in METRICS), math.nan)
        metrics[ONE_ROUND.name] = functions(self.extension, start[:16], worst=self.worst)
        metrics[FUNCTIONS.name] = functions(self.extension, start, worst=self.worst)
        if self.worst:
            return Outcome(metrics)  # PPO's surrogate is of one weighted sum
        two = self._train(TWO, self.divisions[0], self.updates[0], rounds=3, seed=run.stream("two places"))
        metrics[PLACES.name] = two.archive.hypervolume()
        metrics[GAPS.name] = two.archive.sparsity()
        metrics[UTILITY.name] = two.archive.expected_utility(weight_grid(2, divisions=100))
        metrics[STEPS.name] = two.steps / 1000
        if self.extension != "cpo" and self.divisions[1]:
            nine = self._train(CIRCLE, self.divisions[1], self.updates[1], rounds=2, seed=run.stream("nine places"))
            metrics[NINE.name] = nine.archive.hypervolume() ** (1 / 9)
            metrics[NINE_UTILITY.name] = nine.archive.expected_utility(weight_grid(9, divisions=4))
        front = two.archive.returns[two.archive.returns[:, 0].argsort()]
        return Outcome(metrics, {f"two places, goal {i + 1}": front[:, i].tolist() for i in range(2)})

    def _train(self, goals: Tensor, divisions: int, updates: int, *, rounds: int, seed: int) -> CMORLTraining:
        extended = 0 if self.extension is None else 10 * rounds
        return train_c_morl(
            functools.partial(Places, goals),
            reference=torch.zeros(len(goals)),
            weights=weight_grid(len(goals), divisions=divisions),
            make_policy=network,
            solver="cpo" if self.extension == "cpo" else "ipo",
            beta=-1e9 if self.extension == "free" else 0.9,
            initial_updates=updates,
            extension_updates=10,
            evaluate_every=5,
            evaluation_episodes=1,
            evaluation_gamma=1.0,
            capacity=200 if len(goals) == 2 else 60,
            settings=SETTINGS,
            seed=seed,
            max_iter=updates + extended,
        )


def problem(source: Any, seed: int) -> int:
    """Return the seed of all starting points."""
    return seed


# As many steps each: 24 * 6 + 10 * 10 * 3 = 444, 28 * 16 = 448 and 74 * 6 = 444 updates of a policy on two places;
# 20 * 9 + 45 * 10 * 2 = 1,080 and 24 * 45 = 1,080 on nine.
study = Study(
    method="c-morl",
    problem=problem,
    contenders={
        "weighted sums": Search(None, (15, 2), (28, 24)),
        "few weighted sums, longer": Search(None, (5, 0), (74, 0)),
        "weighted worst cases": Search(None, (15, 2), (28, 24), worst=True),
        "extension without constraints": Search("free", (5, 1), (24, 20)),
        "c-morl, trust region": Search("cpo", (5, 1), (24, 20)),
        "c-morl": Search("ipo", (5, 1), (24, 20)),
    },
    metrics=METRICS,
    claims=(
        Claim("c-morl", "weighted sums", PLACES.name, 0.01, "C-MORL's front is larger at equal steps"),
        Claim("c-morl", "weighted sums", GAPS.name, says="and denser"),
        Claim("c-morl", "weighted sums", UTILITY.name, says="and worth more to linear preferences"),
        Claim("c-morl", "few weighted sums, longer", PLACES.name, says="It beats few weights trained longer"),
        Claim("c-morl", "extension without constraints", PLACES.name, says="The constraints are what works"),
        Claim("c-morl", "c-morl, trust region", PLACES.name, says="The interior point is better than the trust region"),
        Claim("c-morl", "weighted sums", ONE_ROUND.name, 0.03, "On functions, one round doubles the hypervolume"),
        Claim("c-morl", "weighted sums", FUNCTIONS.name, 0.1, "and fifteen come near the whole front"),
        Claim("c-morl", "weighted worst cases", FUNCTIONS.name, says="Worst cases, made for concave fronts, do worse"),
        Claim("c-morl", "weighted sums", NINE.name, says="With nine objectives its front is larger too"),
        Claim("c-morl", "weighted sums", NINE_UTILITY.name, says="and worth more to linear preferences"),
    ),
    seeds=5,
    about="Three problems with concave fronts: two known functions, and places to go to, two or nine, learned by PPO.",
    notes=(
        "Every contender takes as many steps, up to rounds that find fewer than five policies to extend, and offers "
        "what it finds to an archive equally often. The whole front of the functions and of two places has "
        "hypervolume 0.342. The side is the ninth root of the hypervolume. The trust region is left out on nine "
        "places, few weighted sums too, worst cases on all places. Settings of the method are the paper's; networks, "
        "rates and steps were chosen to be quick and are shared, after looks at seed 0. Points start off the front: "
        "from starts around its middle, tried first, weighted sums pass over nearly all of it on their way to goals."
    ),
)
