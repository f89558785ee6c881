"""Does a stock in the state reach what policies without one cannot: tail means, target totals, set points?

Exactly, on small random processes, where every policy can be listed: those that look at the whole history, and those
that look at state and time alone, whose best is the strongest policy without a stock. And by learning, in a casino of
eight rounds in which a player takes one unit for sure or one of two bets; policies are learnt from play, and what
they bring is computed exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..bench import Claim, Metric, Outcome, Run, Study
from ..policies import (
    ExpectedUtility,
    MDPEnvironment,
    ReturnLaw,
    StockAgent,
    StockMDP,
    StockQuantileNetwork,
    StockTransitions,
    quantile_huber_loss,
    train_stock_agent,
)

CASINO_TAIL = Metric("tail mean (worst 20 %), casino")
CASINO_MISS = Metric("distance to a total of 14, casino", "lower is better")
CASINO_MEAN = Metric("mean, casino")
TAIL = Metric("tail mean (worst 30 %), random processes")
MISS = Metric("distance to a total of 1.5, random processes", "lower is better")
HOME = Metric("distance to a set point of two resources, random processes", "lower is better")
MEAN = Metric("mean of the tail mean's policy, random processes")
REFUSED = Metric("exponential utility discounted by 0.7, random processes")
METRICS = (CASINO_TAIL, CASINO_MISS, CASINO_MEAN, TAIL, MISS, HOME, MEAN, REFUSED)

ROUNDS, SHARE, GOAL = 8, 0.2, 14.0
PROCESSES, STEPS, PROCESS_SHARE, PROCESS_GOAL, SET_POINT = 20, 3, 0.3, 1.5, (-1.5, 2.5)
START = torch.tensor([0])
GRID = torch.arange(-8.0, 49.0)

Policy = Callable[[int, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Unrefused(ExpectedUtility):
    """A utility that is taken as it is, though dynamic programming may not optimise it."""

    def refusal(self, *, discount: float, scale: float = 1.0, rewards: int | None = None) -> str | None:
        """Find nothing wrong."""
        return None


# Steep enough that what was earned matters, flat enough that no total decides alone.
EXPONENTIAL = Unrefused(lambda total: -torch.exp(-total / 2), name="exponential")


@dataclasses.dataclass(frozen=True)
class Worlds:
    """What a cell is about.

    Args:
        casino: One process.
        numbers: Random processes that pay numbers.
        vectors: Random processes that pay two resources.
        discounted: The first kind, discounted by 0.7.
    """

    casino: StockMDP
    numbers: tuple[StockMDP, ...]
    vectors: tuple[StockMDP, ...]
    discounted: tuple[StockMDP, ...]


def problem(source: Any, seed: int) -> Worlds:
    """Draw a casino's odds and random processes."""
    generator = torch.Generator().manual_seed(Run(seed).stream("worlds"))
    low, high = torch.rand(2, generator=generator, dtype=torch.float64).tolist()

    def draw(entries: tuple[int, ...], discount: float) -> tuple[StockMDP, ...]:
        found = []
        for _ in range(PROCESSES):
            transition = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64)
            reward = torch.randint(-3, 4, (2, 3, 2, *entries), generator=generator).double()
            found.append(StockMDP(transition / transition.sum(-1, keepdim=True), reward, discount=discount))
        return tuple(found)

    return Worlds(casino(0.75 + 0.1 * low, 0.45 + 0.1 * high), draw((), 1.0), draw((2,), 1.0), draw((), 0.7))


def casino(small: float, large: float) -> StockMDP:
    """Pay 1 for sure, or 3 with the small bet's odds, or 6 with the large one's; a lost bet costs 1.

    The state says whether a bet was won just now.
    """
    transition, reward = torch.zeros(2, 2, 3, 2, dtype=torch.float64)
    transition[:, 0, 0], reward[:, 0, 0] = 1, 1
    for bet, odds, pays in ((1, small, 3), (2, large, 6)):
        transition[:, bet, 1], transition[:, bet, 0] = odds, 1 - odds
        reward[:, bet, 1], reward[:, bet, 0] = pays, -1
    return StockMDP(transition, reward, discount=1.0)


# Laws of many policies at once are tensors: returns (policies, atoms, entries), weights (policies, atoms).
Laws = tuple[Tensor, Tensor]


def _follow(mdp: StockMDP, state: int, action: int, tails: list[Laws]) -> Laws:
    """Return the laws after an action, given those of as many policies from each next state."""
    transition, reward = mdp.transition[state, action], mdp.reward[state, action].reshape(2, -1)
    returns = [reward[s] + mdp.discount * tails[s][0] for s in range(2)]
    return torch.cat(returns, 1), torch.cat([transition[s] * tails[s][1] for s in range(2)], 1)


def _stacked(laws: list[Laws]) -> Laws:
    return torch.cat([each[0] for each in laws]), torch.cat([each[1] for each in laws])


def _ended(mdp: StockMDP) -> Laws:
    return torch.zeros(1, 1, mdp.num_rewards or 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)


def every_history_policy(mdp: StockMDP, state: int = 0, steps: int = STEPS) -> Laws:
    """List the laws of all deterministic policies that may look at all that happened."""
    if not steps:
        return _ended(mdp)
    tails = [every_history_policy(mdp, s, steps - 1) for s in range(2)]
    pairs = torch.cartesian_prod(*(torch.arange(len(tail[0])) for tail in tails)).T
    chosen = [(tail[0][index], tail[1][index]) for tail, index in zip(tails, pairs, strict=True)]
    return _stacked([_follow(mdp, state, action, chosen) for action in range(3)])


def every_plain_policy(mdp: StockMDP) -> Laws:
    """List the laws of all deterministic policies that look at state and time alone."""
    tails = [_ended(mdp), _ended(mdp)]
    for _ in range(STEPS):
        pairs = list(itertools.product(range(3), repeat=2))
        tails = [_stacked([_follow(mdp, s, pair[s], tails) for pair in pairs]) for s in range(2)]
    return tails[0]


def tail_means(laws: Laws) -> Tensor:
    """Compute the mean over the worst share of each law."""
    returns, order = laws[0].squeeze(2).sort(1)
    weights = laws[1].gather(1, order)
    before = weights.cumsum(1) - weights
    return (weights.minimum((PROCESS_SHARE - before).clamp_min(0)) * returns).sum(1) / PROCESS_SHARE


def expectations(laws: Laws, utility: ExpectedUtility, stock: Tensor) -> Tensor:
    """Compute the expected utility of the stock plus the return of each law."""
    totals = stock + laws[0]
    return (laws[1] * utility(totals if totals.shape[2] > 1 else totals.squeeze(2))).sum(1)


def report(found: dict[Metric, float], law: ReturnLaw | None = None) -> Outcome:
    """Make an outcome; what was not measured is NaN."""
    metrics = {metric.name: found.get(metric, math.nan) for metric in METRICS}
    if law is None:
        return Outcome(metrics)
    below = [float(law.weights[law.atoms <= total].sum()) for total in GRID]
    return Outcome(metrics, {"probability of no more than -8, -7, ..., 48 in the casino": below})


def average(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


class Listed:
    """The best of all policies of a kind for each objective, found by listing them.

    Args:
        every: Lists the laws of the policies of a process.
    """

    def __init__(self, every: Callable[[StockMDP], Laws]) -> None:
        self.every = every

    def __call__(self, data: Worlds, run: Run) -> Outcome:
        """List and measure one cell."""
        found: dict[Metric, float] = {}
        tails, means, misses = [], [], []
        target, home = ExpectedUtility.target(), ExpectedUtility.homeostasis()
        for mdp in data.numbers:
            laws = self.every(mdp)
            each = tail_means(laws)
            tails.append(float(each.max()))
            means.append(float((laws[0].squeeze(2) * laws[1]).sum(1)[each.argmax()]))
            misses.append(-float(expectations(laws, target, torch.tensor(-PROCESS_GOAL)).max()))
        found |= {TAIL: average(tails), MEAN: average(means), MISS: average(misses)}
        found[HOME] = -average(
            [float(expectations(self.every(mdp), home, torch.tensor(SET_POINT)).max()) for mdp in data.vectors]
        )
        found[REFUSED] = average(
            [float(expectations(self.every(mdp), EXPONENTIAL, torch.zeros(())).max()) for mdp in data.discounted]
        )
        if self.every is not every_plain_policy:
            return report(found)
        tail = exchange(data.casino, lambda law: float(law.cvar(SHARE)))
        near = exchange(data.casino, lambda law: -float(law.weights @ (law.atoms - GOAL).abs()))
        plain = data.casino.value_iteration(ExpectedUtility.mean(), START, START.double(), horizon=ROUNDS)
        found[CASINO_TAIL] = float(tail.cvar(SHARE))
        found[CASINO_MISS] = float(near.weights @ (near.atoms - GOAL).abs())
        found[CASINO_MEAN] = float(plain.laws[0].mean())
        return report(found, tail)


def played(mdp: StockMDP, policy: Policy, stock: float = 0.0, steps: int = ROUNDS) -> ReturnLaw:
    """Compute the law of the return under a policy."""
    first = torch.tensor([stock], dtype=torch.float64)
    return mdp.evaluate(policy, ExpectedUtility.mean(), START, first, horizon=steps).laws[0]


def exchange(mdp: StockMDP, objective: Callable[[ReturnLaw], float]) -> ReturnLaw:
    """Improve the best fixed plan for the casino, one decision by state and time after the other."""

    def law(table: Tensor) -> ReturnLaw:
        return played(mdp, lambda step, state, stock: table[step, state])

    counts = [pair for pair in itertools.product(range(ROUNDS + 1), repeat=2) if sum(pair) <= ROUNDS]
    plans = [torch.tensor([1] * small + [2] * large + [0] * (ROUNDS - small - large)) for small, large in counts]
    table = max((plan[:, None].repeat(1, 2) for plan in plans), key=lambda each: objective(law(each)))
    best, improved = objective(law(table)), True
    while improved:
        improved = False
        for step, state, action in itertools.product(range(ROUNDS), range(2), range(3)):
            other = table.clone()
            other[step, state] = action
            if (value := objective(law(other))) > best + 1e-9:
                table, best, improved = other, value, True
    return law(table)


def plain_programme(mdp: StockMDP, quality: Callable[[ReturnLaw], float], steps: int) -> ReturnLaw:
    """Go greedily, from the last step to the first, by the law of the return alone: no stock anywhere."""
    states = range(len(mdp.transition))
    laws = [ReturnLaw(torch.zeros(1, *mdp.reward.shape[3:]).double(), torch.ones(1).double()) for _ in states]
    for _ in range(steps):
        above = []
        for state in states:
            found = []
            for action in range(mdp.transition.shape[1]):
                atoms = [mdp.reward[state, action, s] + mdp.discount * laws[s].atoms for s in states]
                weights = [mdp.transition[state, action, s] * laws[s].weights for s in states]
                found.append(merged(torch.cat(atoms), torch.cat(weights)))
            above.append(max(found, key=quality))
        laws = above
    return laws[0]


def merged(atoms: Tensor, weights: Tensor) -> ReturnLaw:
    """Make a law, equal atoms one."""
    # Rewards are integers where laws get long, so that equal returns are equal numbers.
    kept, place = torch.unique(atoms, dim=0, return_inverse=True)
    return ReturnLaw(kept, weights.new_zeros(len(kept)).index_add_(0, place, weights))


def nested_tail(mdp: StockMDP, share: float, steps: int) -> ReturnLaw:
    """Optimise the tail mean of the tail mean of the tail mean: a Markov risk measure, by its own dynamic programme."""
    value = torch.zeros(len(mdp.transition), dtype=torch.float64)
    tables: list[Tensor] = []
    for _ in range(steps):
        outcomes, order = (mdp.reward + mdp.discount * value).sort(-1)
        weights = mdp.transition.gather(-1, order)
        before = weights.cumsum(-1) - weights
        quality = (weights.minimum((share - before).clamp_min(0)) * outcomes).sum(-1) / share
        value, action = quality.max(-1)
        tables.insert(0, action)
    return played(mdp, lambda step, state, stock: tables[step][state], steps=steps)


def miss(law: ReturnLaw, goal: float) -> float:
    """Return the mean distance to a total."""
    return float(law.weights @ (law.atoms - goal).abs())


def risk_neutral(data: Worlds, run: Run) -> Outcome:
    """Maximise the mean, and measure everything else."""

    def solved(mdp: StockMDP, steps: int) -> ReturnLaw:
        return mdp.value_iteration(ExpectedUtility.mean(), START, torch.zeros(1).double(), horizon=steps).laws[0]

    laws, law = [solved(mdp, STEPS) for mdp in data.numbers], solved(data.casino, ROUNDS)
    return report(
        {
            TAIL: average([float(each.cvar(PROCESS_SHARE)) for each in laws]),
            MEAN: average([float(each.mean()) for each in laws]),
            MISS: average([miss(each, PROCESS_GOAL) for each in laws]),
            CASINO_TAIL: float(law.cvar(SHARE)),
            CASINO_MISS: miss(law, GOAL),
            CASINO_MEAN: float(law.mean()),
        },
        law,
    )


def nested(data: Worlds, run: Run) -> Outcome:
    """Optimise the nested tail mean."""
    laws = [nested_tail(mdp, PROCESS_SHARE, STEPS) for mdp in data.numbers]
    law = nested_tail(data.casino, SHARE, ROUNDS)
    return report(
        {
            TAIL: average([float(each.cvar(PROCESS_SHARE)) for each in laws]),
            MEAN: average([float(each.mean()) for each in laws]),
            CASINO_TAIL: float(law.cvar(SHARE)),
        },
        law,
    )


def greedy_on_laws(data: Worlds, run: Run) -> Outcome:
    """Go greedily by the objective of the return to come, as if nothing had been earned."""
    home = torch.tensor(SET_POINT, dtype=torch.float64)

    def distance(law: ReturnLaw) -> float:
        return float(law.weights @ torch.linalg.vector_norm(home + law.atoms, dim=1))

    laws = [plain_programme(mdp, lambda law: float(law.cvar(PROCESS_SHARE)), STEPS) for mdp in data.numbers]
    near = [plain_programme(mdp, lambda law: -miss(law, PROCESS_GOAL), STEPS) for mdp in data.numbers]
    tail = plain_programme(data.casino, lambda law: float(law.cvar(SHARE)), ROUNDS)
    return report(
        {
            TAIL: average([float(each.cvar(PROCESS_SHARE)) for each in laws]),
            MEAN: average([float(each.mean()) for each in laws]),
            MISS: average([miss(each, PROCESS_GOAL) for each in near]),
            HOME: average([distance(plain_programme(mdp, lambda law: -distance(law), STEPS)) for mdp in data.vectors]),
            CASINO_TAIL: float(tail.cvar(SHARE)),
            CASINO_MISS: miss(plain_programme(data.casino, lambda law: -miss(law, GOAL), ROUNDS), GOAL),
        },
        tail,
    )


def with_stock(data: Worlds, run: Run, *, search: bool = True) -> Outcome:
    """Solve exactly with a stock; without the search, tail means start from a stock of zero."""

    def tail(mdp: StockMDP, share: float, steps: int) -> ReturnLaw:
        if search:
            return mdp.best_cvar(0, tau=share, horizon=steps, tolerance=0.0).solution.laws[0]
        zero = torch.zeros(1, dtype=torch.float64)
        return mdp.value_iteration(ExpectedUtility.lower_tail(), START, zero, horizon=steps).laws[0]

    def value(mdp: StockMDP, utility: ExpectedUtility, stock: float | tuple[float, ...], steps: int) -> float:
        first = torch.tensor([stock], dtype=torch.float64)
        return float(mdp.value_iteration(utility, START, first, horizon=steps).value)

    laws, law = [tail(mdp, PROCESS_SHARE, STEPS) for mdp in data.numbers], tail(data.casino, SHARE, ROUNDS)
    found = {
        TAIL: average([float(each.cvar(PROCESS_SHARE)) for each in laws]),
        MEAN: average([float(each.mean()) for each in laws]),
        CASINO_TAIL: float(law.cvar(SHARE)),
    }
    if search:
        target, home = ExpectedUtility.target(), ExpectedUtility.homeostasis()
        found |= {
            MISS: -average([value(mdp, target, -PROCESS_GOAL, STEPS) for mdp in data.numbers]),
            HOME: -average([value(mdp, home, SET_POINT, STEPS) for mdp in data.vectors]),
            REFUSED: average([value(mdp, EXPONENTIAL, 0.0, STEPS) for mdp in data.discounted]),
            CASINO_MISS: -value(data.casino, target, -GOAL, ROUNDS),
            CASINO_MEAN: value(data.casino, ExpectedUtility.mean(), 0.0, ROUNDS),
        }
    return report(found, law)


class PlainAgent(nn.Module):
    """A quantile network without a stock (QR-DQN) that is greedy by some number of the law of the return to come.

    Args:
        network: A network that is told a stock of zero.
        quality: ``(batch, actions, quantiles) -> (batch, actions)``.
    """

    utility = ExpectedUtility.mean()
    discount = 1.0

    def __init__(self, network: nn.Module, quality: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.quality = network, quality
        self.target_network = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        stock: Tensor | float,
        *,
        epsilon: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Choose an action, or one for each observation."""
        rows = observation if observation.dim() > 1 else observation[None]
        action = self.quality(self.network(rows, torch.zeros(len(rows)))).argmax(1)
        if epsilon and float(torch.rand((), generator=generator)) < epsilon:
            action = torch.randint(3, (len(rows),), generator=generator)
        return action if observation.dim() > 1 else action[0]

    def loss(self, batch: StockTransitions) -> Tensor:
        """Regress quantiles on what followed."""
        rows, none = torch.arange(len(batch.action)), torch.zeros_like(batch.stock)
        with torch.no_grad():
            following = self.target_network(batch.next_observation, none)
            best = following[rows, self.quality(following).argmax(1)]
            wanted = batch.reward[:, None] + (~batch.terminal)[:, None] * best
        return quantile_huber_loss(self.network(batch.observation, none)[rows, batch.action], wanted)

    def update_target(self) -> None:
        """Copy the network."""
        self.target_network.load_state_dict(self.network.state_dict())


FIRST_STOCKS = (-30.0, 5.0)


def network(seed: int) -> StockQuantileNetwork:
    """Make the network that all agents learn."""
    torch.manual_seed(seed)
    return StockQuantileNetwork(3, 3, num_quantiles=32, hidden=(64, 64), stock_scale=20.0, return_scale=20.0)


def learnt(mdp: StockMDP, agent: StockAgent | PlainAgent, seed: int, *, edit_stocks: bool = True) -> MDPEnvironment:
    """Train an agent in the casino."""
    environment = MDPEnvironment(mdp, 0, horizon=ROUNDS)
    train_stock_agent(
        agent,
        environment,
        first_stock=FIRST_STOCKS,
        num_steps=5_000,
        edit_stocks=edit_stocks,
        learning_starts=500,
        target_every=50,
        seed=seed,
    )
    return environment


def follow(agent: StockAgent | PlainAgent, environment: MDPEnvironment) -> Policy:
    """Return the agent as a policy of states and stocks."""
    return lambda step, state, stock: agent.act(environment.observe(step, state), stock.float())


class Stocked:
    """The agent with a stock, trained for the tail mean and for the target.

    Args:
        edit_stocks: Whether transitions are replayed with other stocks.
    """

    def __init__(self, *, edit_stocks: bool) -> None:
        self.edit_stocks = edit_stocks

    def __call__(self, data: Worlds, run: Run) -> Outcome:
        """Train and measure one cell."""
        found: dict[Metric, float] = {}
        seed = run.stream("play")
        agent = StockAgent(network(run.stream("tail")), ExpectedUtility.lower_tail(), discount=1.0)
        environment = learnt(data.casino, agent, seed, edit_stocks=self.edit_stocks)
        first = environment.observe(0, START)[0]
        choice = agent.best_first_stock(first, torch.arange(FIRST_STOCKS[0], FIRST_STOCKS[1] + 1), tau=SHARE)
        law = played(data.casino, follow(agent, environment), choice.stock)
        found[CASINO_TAIL] = float(law.cvar(SHARE))
        agent = StockAgent(network(run.stream("target")), ExpectedUtility.target(), discount=1.0)
        environment = learnt(data.casino, agent, seed, edit_stocks=self.edit_stocks)
        found[CASINO_MISS] = miss(played(data.casino, follow(agent, environment), -GOAL), GOAL)
        return report(found, law)


def stocked_for_the_mean(data: Worlds, run: Run) -> Outcome:
    """Train the agent with a stock for the mean, where it has nothing to gain."""
    agent = StockAgent(network(run.stream("mean")), ExpectedUtility.mean(), discount=1.0)
    environment = learnt(data.casino, agent, run.stream("play"))
    return report({CASINO_MEAN: float(played(data.casino, follow(agent, environment)).mean())})


def plain_mean(data: Worlds, run: Run) -> Outcome:
    """Train QR-DQN for the mean, and measure everything else."""
    agent = PlainAgent(network(run.stream("mean")), lambda quantiles: quantiles.mean(-1))
    law = played(data.casino, follow(agent, learnt(data.casino, agent, run.stream("play"))))
    return report(
        {CASINO_TAIL: float(law.cvar(SHARE)), CASINO_MISS: miss(law, GOAL), CASINO_MEAN: float(law.mean())}, law
    )


def plain_greedy(data: Worlds, run: Run) -> Outcome:
    """Train QR-DQN with a greedy step on the tail mean, and one with a greedy step on the distance to the target."""

    def worst(quantiles: Tensor) -> Tensor:
        count = quantiles.shape[-1]
        before = torch.arange(count) / count
        weights = (SHARE - before).clamp(0, 1 / count) / SHARE
        return (quantiles.sort(-1).values * weights).sum(-1)

    laws = []
    for name, quality in (("tail", worst), ("target", lambda quantiles: -(quantiles - GOAL).abs().mean(-1))):
        agent = PlainAgent(network(run.stream(name)), quality)
        laws.append(played(data.casino, follow(agent, learnt(data.casino, agent, run.stream("play")))))
    return report({CASINO_TAIL: float(laws[0].cvar(SHARE)), CASINO_MISS: miss(laws[1], GOAL)}, laws[0])


def _claim(contender: str, beats: str, metric: Metric, says: str, margin: float = 0.0) -> Claim:
    return Claim(contender, beats, metric.name, margin, says)


study = Study(
    method="stock-augmented-distributional-dp",
    problem=problem,
    contenders={
        "risk-neutral, exact": risk_neutral,
        "nested tail mean, exact": nested,
        "greedy without stock, exact": greedy_on_laws,
        "best without stock": Listed(every_plain_policy),
        "best of all policies": Listed(every_history_policy),
        "stock, exact": with_stock,
        "stock from zero, exact": functools.partial(with_stock, search=False),
        "QR-DQN": plain_mean,
        "QR-DQN, greedy on the objective": plain_greedy,
        "agent with stock": Stocked(edit_stocks=True),
        "agent with stock, not edited": Stocked(edit_stocks=False),
        "agent with stock, for the mean": stocked_for_the_mean,
    },
    metrics=METRICS,
    claims=(
        _claim(
            "agent with stock",
            "best without stock",
            CASINO_TAIL,
            "the agent's tail mean is above that of the best policy without a stock, which knows the casino",
        ),
        _claim(
            "agent with stock",
            "best without stock",
            CASINO_MISS,
            "the agent comes closer to the target than the best policy without a stock, which knows the casino",
        ),
        _claim("agent with stock", "QR-DQN, greedy on the objective", CASINO_TAIL, "above QR-DQN's, too", 1.0),
        _claim("agent with stock", "QR-DQN, greedy on the objective", CASINO_MISS, "closer than QR-DQN, too", 1.0),
        _claim("agent with stock", "stock, exact", CASINO_TAIL, "its tail mean is within 0.5 of the best", -0.5),
        _claim("agent with stock", "stock, exact", CASINO_MISS, "its distance to the target within 0.5", -0.5),
        _claim("agent with stock", "agent with stock, not edited", CASINO_TAIL, "editing stocks helps: tail mean"),
        _claim("agent with stock", "agent with stock, not edited", CASINO_MISS, "editing stocks helps: target"),
        _claim("agent with stock, for the mean", "QR-DQN", CASINO_MEAN, "for the mean, too, a stock helps"),
        *(
            _claim("stock, exact", "best of all policies", metric, f"no policy of the history is better: {name}", -1e-9)
            for metric, name in ((TAIL, "tail mean"), (MISS, "target"), (HOME, "set point"))
        ),
        *(
            _claim("stock, exact", "best without stock", metric, f"without a stock it cannot be reached: {name}")
            for metric, name in ((TAIL, "tail mean"), (MISS, "target"), (HOME, "set point"))
        ),
        _claim("stock, exact", "nested tail mean, exact", TAIL, "nor by nesting tail means"),
        _claim("stock, exact", "stock from zero, exact", TAIL, "the first stock must be searched for"),
        _claim("best of all policies", "stock, exact", REFUSED, "an objective that is refused would be missed"),
        _claim("risk-neutral, exact", "stock, exact", MEAN, "the price of the tail mean is a lower mean"),
    ),
    seeds=5,
    about="Tail means, target totals and set points on random processes, and learnt in a casino of eight rounds.",
    notes=(
        "Everything is computed exactly, also what learnt policies bring. Each random process has two states, three "
        "actions and three steps, and results are means over 20 of them. The casino's odds differ from seed to seed; "
        "its best policy without a stock is the best fixed plan, improved decision by decision, so it may not be the "
        "very best. Agents learn from 5,000 steps, 625 episodes, with one network; none was tuned. The tasks are far "
        "smaller than the paper's, none of whose figures is reproduced."
    ),
)
