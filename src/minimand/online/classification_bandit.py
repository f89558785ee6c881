"""A bandit made of a classification table, and the loop that plays it.

Each row is a round: its features are the context, its classes the actions. The action that is its label loses nothing,
every other loses 1, and only the loss of the action taken is shown. The best action of every round has loss 0, so the
regret against it is the number of mistakes.

Source: Beygelzimer and Langford 2009, "The Offset Tree for Learning with Partial Labels", arXiv 0812.4044; Deb et al.
2024, arXiv 2312.07145, section 5, which compares bandits so.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..tables import TableEncoder, as_frame
from .bandit_agents import BanditAgent

Order = Literal["random", "sorted"]


@dataclasses.dataclass(frozen=True)
class BanditRun:
    """What happened in the rounds that :func:`play_bandit` played.

    Args:
        regret: Losses up to and including each round, less those of the best action of each, ``(rounds,)``.
        actions: Actions taken, ``(rounds,)``.
        probabilities: What they were taken with, ``(rounds,)``.
    """

    regret: Tensor
    actions: Tensor
    probabilities: Tensor


class ClassificationBandit:
    """A bandit whose contexts are the rows of a table, and whose actions are its classes.

    Args:
        features: Contexts, one a row.
        labels: The class of each row, from 0: the action that has loss 0 where the others have 1.

    Raises:
        TypeError: If features are not of a floating-point dtype, or labels not of an integer one.
        ValueError: If there are no rows, a feature is not finite, or labels are negative or of less than two classes.

    Example:
        >>> bandit = ClassificationBandit(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> bandit.num_actions, bandit.losses(torch.tensor([2]))
        (3, tensor([[1., 1., 0.]]))

    Source:
        Beygelzimer and Langford 2009, arXiv 0812.4044.
    """

    def __init__(self, features: Float[Tensor, "rows features"], labels: Int[Tensor, " rows"]) -> None:
        checks.floating(features, "features")
        checks.tensor(labels, "labels")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
        if features.dim() != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features must have shape (rows, features) and labels (rows,), got {tuple(features.shape)} "
                f"and {tuple(labels.shape)}"
            )
        checks.not_empty(features, "features")
        checks.finite(features, "features")
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most < 1:
            raise ValueError(f"labels must count at least 2 classes from 0, got values from {least} to {most}")
        self.features = features
        self.labels = labels
        self.num_actions = most + 1

    @classmethod
    def from_table(cls, table: Any, *, target: str) -> ClassificationBandit:
        """Make a bandit of any table, such as ``polars.read_csv`` gives.

        Columns are encoded as numbers of mean 0 and variance 1 over all rows, and rows scaled to unit norm, as the
        paper's contexts are. Classes are numbered in sorted order. :func:`minimand.bench.readers.read_table` reads
        other files than CSV too, and says what is wrong with a broken one.

        Args:
            table: A polars or pandas data frame.
            target: The column of the classes: text, whole numbers, booleans or categories.

        Raises:
            ValueError: If there is no such column or no other, a class is missing, there are less than two, or the
                column holds fractions, which are amounts and no classes.
        """
        frame = as_frame(table)
        if target not in frame.columns:
            raise ValueError(f"target must be one of the columns {', '.join(frame.columns)}, got {target!r}")
        column = frame[target]
        if column.null_count():
            raise ValueError(f"target {target!r} must have a class in every row, got {column.null_count()} without")
        if frame.width < 2:
            raise ValueError(f"table must have columns besides the target {target!r}: there is nothing to decide by")
        if column.dtype.is_float() and not (column.is_finite() & (column == column.round())).all():
            raise ValueError(f"target {target!r} must hold classes, got numbers that are not whole")
        classes = {name: number for number, name in enumerate(column.unique().sort().to_list())}
        labels = torch.tensor([classes[name] for name in column.to_list()])
        features = torch.from_numpy(TableEncoder().fit_transform(frame.drop(target)))
        return cls(torch.nn.functional.normalize(features, dim=-1), labels)

    def losses(self, rows: Int[Tensor, " rounds"]) -> Float[Tensor, "rounds actions"]:
        """Return the losses of all actions in the given rows, of which a bandit shows one a round.

        Args:
            rows: Their numbers.
        """
        actions = torch.arange(self.num_actions, device=self.labels.device)
        return (actions != self.labels[rows][:, None]).to(self.features.dtype)

    def rows(self, num_rounds: int, *, order: Order = "random", seed: int = 0) -> Int[Tensor, " rounds"]:
        """Return the rows that the rounds show, each as often as any other, up to one.

        Args:
            num_rounds: How many; beyond the number of rows, the table is gone through again.
            order: ``"random"``, or ``"sorted"``: shuffled, but class after class, so that what an agent has learnt of
                one class keeps failing in the next.
            seed: Of the shuffles.
        """
        checks.one_of(order, "order", ("random", "sorted"))
        if num_rounds < 1:
            raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
        generator = torch.Generator().manual_seed(seed)
        size = len(self.labels)
        passes = []
        for _ in range(-(-num_rounds // size)):
            shuffled = torch.randperm(size, generator=generator).to(self.labels.device)
            passes.append(shuffled[self.labels[shuffled].argsort(stable=True)] if order == "sorted" else shuffled)
        return torch.cat(passes)[:num_rounds]


def play_bandit(
    agent: BanditAgent, bandit: ClassificationBandit, *, num_rounds: int, order: Order = "random", seed: int = 0
) -> BanditRun:
    """Play an agent for a number of rounds, one context a round, and count its regret.

    Args:
        agent: The agent; it goes on from where it is.
        bandit: The bandit.
        num_rounds: How many rounds.
        order: Of the rows: ``"random"`` or ``"sorted"`` by class.
        seed: Of that order. The agent draws its actions from a generator of its own.

    Returns:
        A :class:`BanditRun`.

    Raises:
        ValueError: If a setting is out of range, or the agent takes an action that the bandit does not have.

    Example:
        >>> from minimand.online import NeuralCB
        >>> bandit = ClassificationBandit(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> agent = NeuralCB(torch.nn.Linear(3, 3), gamma=100.0, lr=1.0)
        >>> run = play_bandit(agent, bandit, num_rounds=200)
        >>> bool(run.regret[-1] - run.regret[-50] < 5)
        True

    Source:
        Deb et al. 2024, arXiv 2312.07145, section 5.
    """
    rows = bandit.rows(num_rounds, order=order, seed=seed)
    actions, probabilities = [], []
    for row, losses in zip(rows.split(1), bandit.losses(rows), strict=True):
        contexts = bandit.features[row]
        action, probability = agent.act(contexts)
        if not 0 <= int(action) < bandit.num_actions:
            raise ValueError(f"agent must take an action in [0, {bandit.num_actions - 1}], got {int(action)}")
        agent.update(contexts, action, losses[action])
        actions.append(action)
        probabilities.append(probability)
    taken = torch.cat(actions)
    return BanditRun((taken != bandit.labels[rows]).cumsum(0), taken, torch.cat(probabilities))
