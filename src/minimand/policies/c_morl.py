r"""C-MORL: find policies all over a Pareto front, by weighted sums first and by constrained steps from there.

Some policies are trained for weighted sums of the objectives. Then, again and again, the least crowded policies
:math:`\pi_r` on the front are each extended towards every objective i,

.. math:: \max_\pi G_i(\pi) \quad\text{subject to}\quad
          G_j(\pi) \ge G_j(\pi_r) - (1 - \beta)\,|G_j(\pi_r)| \quad\text{for } j \ne i,

so that also parts of the front are reached that are best for no weighted sum. For positive returns the threshold is
:math:`\beta G_j`, the paper's; for negative ones, costs, that would ask for an improvement. All policies of a stage
are trained side by side, and every so often all of them are offered to an archive, which is the result.

Source: Liu et al., ICLR 2025, arXiv 2410.02236. The threshold for negative returns is derived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..stopping import Budget, Stop
from .constrained_extension import Extension, extension_thresholds, interior_point_barrier, weighted_loss
from .parallel_ppo import (
    Experience,
    Moments,
    ParallelPPO,
    PPOSettings,
    VectorPolicy,
    draw_seed,
    evaluate_policies,
)
from .pareto_archive import ParetoArchive
from .pareto_front import weight_grid
from .vector_actor_critic import VectorActorCritic
from .vector_environment import MakeEnvironment, VectorEnvironment


@dataclasses.dataclass(frozen=True)
class CMORLTraining:
    """How a training of policies for several objectives went.

    Args:
        archive: The front: its payloads are :class:`VectorPolicy`.
        iterations: Updates, each of all policies of its stage.
        steps: Steps of the environment that policies learned from; evaluations come on top.
        hypervolumes: Of the archive, after the first stage and each round of extension.
        status: Why it stopped; converged where every policy on the front has been extended.
    """

    archive: ParetoArchive
    iterations: int
    steps: int
    hypervolumes: tuple[float, ...]
    status: Stop


def train_c_morl(
    make_env: MakeEnvironment,
    *,
    reference: Float[Tensor, " objectives"],
    weights: Float[Tensor, "policies objectives"] | None = None,
    make_policy: Callable[[VectorEnvironment], nn.Module] | None = None,
    solver: Literal["ipo", "cpo"] = "ipo",
    beta: float = 0.9,
    sharpness: float = 20.0,
    max_kl: float = 0.01,
    num_select: int = 5,
    initial_updates: int = 100,
    extension_updates: int = 20,
    evaluate_every: int = 10,
    evaluation_episodes: int = 4,
    evaluation_gamma: float = 0.99,
    evaluation_steps: int = 1000,
    capacity: int = 200,
    settings: PPOSettings | None = None,
    seed: int = 0,
    max_iter: int = 200,
    max_seconds: float | None = None,
) -> CMORLTraining:
    r"""Train policies that cover the Pareto front of several rewards.

    Args:
        make_env: Makes a :class:`VectorEnvironment` of as many episodes as asked, from a seed:
            ``(num_episodes, seed) -> environment``. See :class:`GymEpisodes` for those of mo-gymnasium.
        reference: What a policy must reach in every objective to count.
        weights: Of the first policies, by rows; None for a grid of six on two objectives, of one division on more.
            They weigh objectives in units of their standard deviation, as in the paper's code.
        make_policy: Makes a network like :class:`VectorActorCritic` for an environment; None for that one.
        solver: What holds the constraints.
        beta: Share of every other objective to be kept; 0.9 is the paper's.
        sharpness: t of the interior point; 20 is the authors'.
        max_kl: Of a step of "cpo"; 0.01 is its authors'.
        num_select: Policies extended in a round, each towards every objective; 5 or 6 in the paper.
        initial_updates: Of the first stage.
        extension_updates: Of a round of extension; 20 is the paper's.
        evaluate_every: Updates between evaluations; 10 is the paper's.
        evaluation_episodes: Of each policy, played by its likeliest actions.
        evaluation_gamma: Discount of evaluations; 0.99 is the authors'.
        evaluation_steps: Where an evaluation is cut off.
        capacity: Of the archive; 200 is the authors'.
        settings: Of proximal policy optimisation.
        seed: Every random number follows from it.
        max_iter: Most updates, those of the first stage included.
        max_seconds: Most seconds, or None.

    Returns:
        The archive, and how it came about. Ask it for a policy by ``archive.assign(preference).payload.act``.

    Raises:
        ValueError: If a setting is out of range or shapes do not fit.

    Example:
        >>> class Bandit:
        ...     num_episodes, observation_size, num_objectives, action_size, discrete = 1, 1, 2, 3, True
        ...     def __init__(self, num_episodes, seed):
        ...         self.num_episodes = num_episodes
        ...     def reset(self):
        ...         return torch.zeros(self.num_episodes, 1)
        ...     def step(self, action):
        ...         rewards = torch.tensor([[1.0, 0.1], [0.4, 0.4], [0.1, 1.0]])[action]
        ...         seen, over = self.reset(), torch.ones(self.num_episodes, dtype=torch.bool)
        ...         return VectorStep(seen, rewards, over, ~over, seen)
        >>> from minimand.policies import VectorStep
        >>> short = PPOSettings(num_steps=16, num_minibatches=4)
        >>> train_c_morl(Bandit, reference=torch.zeros(2), initial_updates=2, settings=short, max_iter=2).status
        <Stop.ITERATION_LIMIT: 'iteration limit'>

    Source:
        Liu et al. 2025, arXiv 2410.02236, algorithm 1.
    """
    settings = PPOSettings() if settings is None else settings
    checks.one_of(solver, "solver", ("ipo", "cpo"))
    checks.positive(max_kl, "max_kl")
    checks.between(evaluation_gamma, "evaluation_gamma", 0.0, 1.0)
    extension_thresholds(reference, beta=beta)
    interior_point_barrier(reference.abs(), sharpness=sharpness)
    counts = {
        "num_select": num_select,
        "initial_updates": initial_updates,
        "extension_updates": extension_updates,
        "evaluate_every": evaluate_every,
        "evaluation_episodes": evaluation_episodes,
        "evaluation_steps": evaluation_steps,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    budget = Budget(max_iter, max_seconds)
    archive = ParetoArchive(reference, capacity=capacity)
    generator = torch.Generator().manual_seed(seed)
    evaluation_seed = draw_seed(generator)
    objectives = len(reference)
    if weights is None:
        weights = weight_grid(objectives, divisions=5 if objectives == 2 else 1)
    if weights.dim() != 2 or weights.shape[1] != objectives or not bool((weights >= 0).all()):
        raise ValueError(f"weights must have shape (policies, {objectives}) and no entry below 0")

    hypervolumes: list[float] = []
    iterations = steps = 0

    def run(trainer: ParallelPPO, update: Callable[[Experience], None], updates: int) -> Stop | None:
        """Train one stage, and offer its policies to the archive."""
        nonlocal iterations, steps
        for done in range(1, updates + 1):
            stop = budget.spent(iterations)
            if stop is not None:
                return stop
            update(trainer.collect())
            iterations += 1
            steps += trainer.count * settings.num_envs * settings.num_steps
            if done % evaluate_every == 0 or done == updates:
                policies = trainer.policies()
                env = make_env(trainer.count * evaluation_episodes, evaluation_seed)
                returns = evaluate_policies(env, policies, gamma=evaluation_gamma, max_steps=evaluation_steps)
                archive.add(returns, policies)
        hypervolumes.append(archive.hypervolume())
        return None

    status = budget.spent(0)
    if status is None:
        policies = _first_policies(make_env, make_policy, len(weights), objectives, generator)
        trainer = ParallelPPO(make_env, policies, settings, generator=generator)
        loss = weighted_loss(weights.to(trainer.device), clip=settings.clip)
        status = run(trainer, lambda experience: trainer.improve(experience, loss), initial_updates)
    while status is None:
        chosen = archive.select(num_select)
        if not chosen:
            status = budget.spent(iterations) or Stop.CONVERGED
            break
        starts = [one.payload for one in chosen for _ in range(objectives)]
        trainer = ParallelPPO(make_env, starts, settings, generator=generator)
        goals = torch.arange(objectives, device=trainer.device).repeat(len(chosen))
        extension = Extension(trainer, goals, solver=solver, beta=beta, sharpness=sharpness, max_kl=max_kl)
        status = run(trainer, extension.update, extension_updates)
    return CMORLTraining(archive, iterations, steps, tuple(hypervolumes), status)


def _first_policies(
    make_env: MakeEnvironment,
    make_policy: Callable[[VectorEnvironment], nn.Module] | None,
    count: int,
    objectives: int,
    generator: torch.Generator,
) -> list[VectorPolicy]:
    env = make_env(1, draw_seed(generator))
    if env.num_objectives != objectives:
        raise ValueError(f"reference must have one number for each of {env.num_objectives} objectives")

    def network() -> nn.Module:
        if make_policy is not None:
            return make_policy(env)
        return VectorActorCritic(env.observation_size, env.action_size, objectives, discrete=env.discrete)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(generator))
        networks = [network() for _ in range(count)]
    parameters = [{name: value.detach() for name, value in each.named_parameters()} for each in networks]
    device = next(iter(parameters[0].values())).device
    seen, values = Moments.none(1, env.observation_size).to(device), Moments.none(1, objectives).to(device)
    return [VectorPolicy(networks[0], each, seen, values, env.discrete) for each in parameters]
