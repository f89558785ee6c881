"""The augmented states that can be reached from given starts, step by step, and laws of returns over them.

Totals closer than the resolution are one, so that runs which earned the same meet again.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .expected_utility import ExpectedUtility


@dataclasses.dataclass(frozen=True)
class Edges:
    """The possible transitions of a process, by the state that they leave.

    Args:
        counts: How many leave each state, ``(states,)``.
        action: ``(transitions,)``.
        successor: ``(transitions,)``.
        probability: ``(transitions,)``.
        reward: ``(transitions, entries)``.
        num_actions: Actions in each state.
    """

    counts: Tensor
    action: Tensor
    successor: Tensor
    probability: Tensor
    reward: Tensor
    num_actions: int

    @classmethod
    def of(cls, transition: Tensor, reward: Tensor) -> Edges:
        """List those of positive probability among ``(states, actions, states)``."""
        state, action, successor = (transition > 0).nonzero(as_tuple=True)
        return cls(
            counts=torch.bincount(state, minlength=len(transition)),
            action=action,
            successor=successor,
            probability=transition[state, action, successor],
            reward=reward[state, action, successor],
            num_actions=transition.shape[1],
        )


@dataclasses.dataclass(frozen=True)
class Layer:
    """The augmented states of one step, and a row for each transition from them."""

    state: Tensor
    stock: Tensor
    stopped: Tensor
    node: Tensor
    action: Tensor
    successor: Tensor
    probability: Tensor
    reward: Tensor


@dataclasses.dataclass(frozen=True)
class NodeLaws:
    """A law for each node of a layer, one behind the other."""

    atoms: Tensor
    weights: Tensor
    counts: Tensor

    @classmethod
    def nothing(cls, layer: Layer) -> NodeLaws:
        """Make the laws that pay nothing."""
        return cls(torch.zeros_like(layer.stock), layer.stock.new_ones(len(layer.state)), torch.ones_like(layer.state))


@dataclasses.dataclass(frozen=True)
class Outlook:
    """The returns of every action at one step, and what they are worth, ``(nodes, actions)``."""

    quality: Tensor
    edge: Tensor
    returns: Tensor
    weights: Tensor


@dataclasses.dataclass(frozen=True)
class StockTree:
    """Layers of augmented states, one for each step and one for the end.

    Args:
        layers: By step.
        starts: Which node of the first layer each start is.
        discount: Of the process.
        resolution: Totals closer than this, in units of the first step, are one.
        num_actions: Actions in each state.
        vectors: Whether users see totals as vectors, even of one entry.
    """

    layers: tuple[Layer, ...]
    starts: Tensor
    discount: float
    resolution: float
    num_actions: int
    vectors: bool

    @classmethod
    def grow(
        cls,
        edges: Edges,
        ends: Tensor,
        state: Tensor,
        stock: Tensor,
        *,
        steps: int,
        discount: float,
        resolution: float,
        max_nodes: int,
        vectors: bool,
    ) -> StockTree:
        """List what can be reached from states and stocks ``(starts, entries)``.

        Raises:
            ValueError: If a layer has more than ``max_nodes`` nodes.
        """
        starts, state, stock = _distinct(state, stock, resolution)
        layers = []
        for step in range(steps + 1):
            if len(state) > max_nodes:
                raise ValueError(
                    f"max_nodes is {max_nodes}, but {len(state)} augmented states can be reached at step {step}: "
                    "take a shorter horizon, fewer starts, or rewards rounded to a grid"
                )
            stopped = ends[state] if step < steps else torch.ones_like(state, dtype=torch.bool)
            moving = (~stopped).nonzero().squeeze(1)
            place, row = _members(edges.counts, state[moving])
            node, reward = moving[place], edges.reward[row]
            successor, next_state, next_stock = _distinct(
                edges.successor[row], (stock[node] + reward) / discount, resolution / discount ** (step + 1)
            )
            layers.append(
                Layer(
                    state=state,
                    stock=stock,
                    stopped=stopped,
                    node=node,
                    action=edges.action[row],
                    successor=successor,
                    probability=edges.probability[row],
                    reward=reward,
                )
            )
            state, stock = next_state, next_stock
        return cls(tuple(layers), starts, discount, resolution, edges.num_actions, vectors)

    @property
    def steps(self) -> int:
        """How many steps are taken."""
        return len(self.layers) - 1

    @property
    def widest(self) -> int:
        """Nodes of the largest layer."""
        return max(len(layer.state) for layer in self.layers)

    def shown(self, totals: Tensor) -> Tensor:
        """Return totals ``(count, entries)`` as users see them."""
        return totals if self.vectors else totals.squeeze(1)

    def totals(self) -> Tensor:
        """Return the first stock plus the return at the ends of all runs, ascending."""
        totals = torch.cat([self.discount**step * layer.stock[layer.stopped] for step, layer in enumerate(self.layers)])
        _, _, totals = _distinct(torch.zeros_like(totals[:, 0]).long(), totals, self.resolution)
        return totals.squeeze(1).sort().values

    def outlook(self, step: int, after: NodeLaws, utility: ExpectedUtility) -> Outlook:
        """Compute the return of every action at one step, given the laws after it, and what it is worth."""
        layer = self.layers[step]
        edge, atom = _members(after.counts, layer.successor)
        returns = layer.reward[edge] + self.discount * after.atoms[atom]
        weights = layer.probability[edge] * after.weights[atom]
        worth = weights * utility(self.shown(layer.stock[layer.node[edge]] + returns))
        place = layer.node[edge] * self.num_actions + layer.action[edge]
        quality = worth.new_zeros(len(layer.state) * self.num_actions).index_add_(0, place, worth)
        return Outlook(quality.view(-1, self.num_actions), edge, returns, weights)

    def follow(self, step: int, outlook: Outlook, action: Tensor) -> NodeLaws:
        """Compute the laws of the return under the chosen actions."""
        layer = self.layers[step]
        node = layer.node[outlook.edge]
        chosen = layer.action[outlook.edge] == action[node]
        stopped = layer.stopped.nonzero().squeeze(1)
        nodes = torch.cat([node[chosen], stopped])
        returns = torch.cat([outlook.returns[chosen], outlook.returns.new_zeros(len(stopped), layer.stock.shape[1])])
        weights = torch.cat([outlook.weights[chosen], outlook.weights.new_ones(len(stopped))])
        inverse, node, atoms = _distinct(nodes, returns, self.resolution / self.discount**step)
        weights = weights.new_zeros(len(node)).index_add_(0, inverse, weights)
        return NodeLaws(atoms, weights, torch.bincount(node, minlength=len(layer.state)))

    def value(self, step: int, laws: NodeLaws, utility: ExpectedUtility) -> Tensor:
        """Compute the objective at every node of one step."""
        layer = self.layers[step]
        node = torch.repeat_interleave(laws.counts)
        worth = laws.weights * utility(self.shown(layer.stock[node] + laws.atoms))
        return worth.new_zeros(len(layer.state)).index_add_(0, node, worth)


def greedy(quality: Tensor, current: Tensor | None = None) -> Tensor:
    """Return the best actions; of those that differ by rounding alone the current, or else the first."""
    best = quality.amax(1, keepdim=True)
    good = quality >= best - 64 * torch.finfo(quality.dtype).eps * quality.abs().amax(1, keepdim=True)
    first = good.long().argmax(1)
    if current is None:
        return first
    return torch.where(good.gather(1, current[:, None]).squeeze(1), current, first)


def _members(counts: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs of a place in ``groups`` and a member of the group there; groups lie one behind the other."""
    sizes = counts[groups]
    place = torch.repeat_interleave(sizes)
    first = (counts.cumsum(0) - counts)[groups]
    within = torch.arange(len(place), device=place.device) - (sizes.cumsum(0) - sizes)[place]
    return place, first[place] + within


def _distinct(label: Tensor, totals: Tensor, resolution: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each labelled total went, and the labels and totals that differ, by label and then by total."""
    key = label
    for column in (totals / resolution).round().long().unbind(1):
        key = _joined(key, column)
    found, inverse, counts = torch.unique(key, return_inverse=True, return_counts=True)
    kept = totals.new_zeros(len(found), totals.shape[1]).index_add_(0, inverse, totals) / counts[:, None]
    return inverse, label.new_empty(len(found)).scatter_(0, inverse, label), kept


def _joined(key: Tensor, column: Tensor) -> Tensor:
    """Return one integer for each pair, in the order of pairs: a sort of numbers is many times faster than of rows."""
    if not len(key):
        return key
    low, high = column.aminmax()
    column, span = column - low, int(high - low) + 1
    if (int(key.max()) + 1) * span >= 2**63:
        # Ranks are no more than there are rows, so that their pairs fit.
        key, column = (torch.unique(each, return_inverse=True)[1] for each in (key, column))
        span = len(column)
    return key * span + column
