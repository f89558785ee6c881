"""Logged decisions: transitions of episodes, what they must satisfy, and the files they come from."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks

# What the same field is called in the files of others (D4RL, Minari, d3rlpy, CORL, gymnasium).
_NAMES = {
    "observation": ("observation", "observations", "obs", "state", "states"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "next_observation": ("next_observation", "next_observations", "next_obs", "next_state", "next_states"),
    "terminated": ("terminated", "terminations", "terminals", "terminal", "done", "dones"),
    "truncated": ("truncated", "truncations", "timeouts", "timeout"),
    "cost": ("cost", "costs"),
}


@dataclasses.dataclass(frozen=True)
class Transitions:
    """Logged transitions, episode after episode, each in the order it was lived.

    Args:
        observation: What was seen, shape ``(N, n)``.
        action: What was done: shape ``(N, m)`` floating, or ``(N,)`` int64 where actions are a choice.
        reward: What it gave, shape ``(N,)``.
        next_observation: What was seen then, shape ``(N, n)``.
        terminated: Whether the process ended there, shape ``(N,)``: nothing is worth anything afterwards.
        truncated: Whether only the record ended there (a time limit), shape ``(N,)``: the process would go on.
        cost: What it cost in each constrained quantity, shape ``(N, K)``, or None.

    Raises:
        TypeError: If a field is not a tensor of the right kind.
        ValueError: If shapes disagree, a number is not finite, or the last transition ends no episode.

    Example:
        >>> log = Transitions(torch.zeros(3, 2), torch.zeros(3, 1), torch.ones(3), torch.zeros(3, 2),
        ...                   torch.tensor([False, True, False]), torch.tensor([False, False, True]))
        >>> log.num_episodes, log.episode_returns().tolist()
        (2, [2.0, 1.0])
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor
    truncated: Tensor
    cost: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("observation", "reward", "next_observation"):
            checks.floating(getattr(self, name), name)
        checks.tensor(self.action, "action")
        if self.observation.ndim != 2 or not self.observation.shape[0]:
            raise ValueError(f"observation must have shape (N, n) with N >= 1, got {tuple(self.observation.shape)}")
        count = self.observation.shape[0]
        if self.action.is_floating_point():
            if self.action.ndim != 2 or self.action.shape[0] != count:
                raise ValueError(f"action must have shape ({count}, m), got {tuple(self.action.shape)}")
            checks.finite(self.action, "action")
        elif self.action.dtype != torch.int64 or self.action.shape != (count,):
            raise ValueError(
                f"action must be floating with shape ({count}, m), or int64 with shape ({count},), "
                f"got {self.action.dtype} with shape {tuple(self.action.shape)}"
            )
        if self.next_observation.shape != self.observation.shape:
            raise ValueError(
                f"next_observation must have the shape of observation {tuple(self.observation.shape)}, "
                f"got {tuple(self.next_observation.shape)}"
            )
        for name in ("reward", "terminated", "truncated"):
            value = getattr(self, name)
            checks.tensor(value, name)
            if value.shape != (count,):
                raise ValueError(f"{name} must have shape ({count},), got {tuple(value.shape)}")
        for name in ("terminated", "truncated"):
            if getattr(self, name).dtype != torch.bool:
                raise TypeError(f"{name} must be boolean, got {getattr(self, name).dtype}")
        for name in ("observation", "next_observation", "reward"):
            checks.finite(getattr(self, name), name)
        if self.cost is not None:
            checks.floating(self.cost, "cost")
            if self.cost.ndim != 2 or self.cost.shape[0] != count:
                raise ValueError(f"cost must have shape ({count}, K), got {tuple(self.cost.shape)}")
            checks.finite(self.cost, "cost")
        checks.require(
            self.episode_ends[-1:],
            lambda: "the last transition is neither terminated nor truncated: an episode that does not end",
        )

    def __len__(self) -> int:
        return self.observation.shape[0]

    @property
    def episode_ends(self) -> Tensor:
        """Whether an episode's record ends there, for either reason, shape ``(N,)``."""
        return self.terminated | self.truncated

    @property
    def num_episodes(self) -> int:
        """How many episodes there are."""
        return int(self.episode_ends.sum())

    @property
    def continuous(self) -> bool:
        """Whether an action is a vector of numbers rather than a choice."""
        return self.action.is_floating_point()

    def episode_index(self) -> Tensor:
        """Return the number of each transition's episode, shape ``(N,)`` int64."""
        ends = self.episode_ends.long()
        return ends.cumsum(0) - ends

    def episode_returns(self) -> Tensor:
        """Return the undiscounted sum of rewards of each episode, shape ``(E,)``."""
        return self.reward.new_zeros(self.num_episodes).index_add_(0, self.episode_index(), self.reward)

    def episode_lengths(self) -> Tensor:
        """Return how many transitions each episode has, shape ``(E,)`` int64."""
        return torch.bincount(self.episode_index(), minlength=self.num_episodes)

    def episodes(self, which: Tensor) -> Transitions:
        """Return the transitions of some episodes, in the order they have here.

        Args:
            which: Numbers of episodes, int64.
        """
        kept = torch.zeros(self.num_episodes, dtype=torch.bool, device=self.reward.device)
        kept[which] = True
        return self.rows(kept[self.episode_index()])

    def rows(self, which: Tensor) -> Transitions:
        """Return the transitions that the boolean mask ``which`` of shape ``(N,)`` keeps; the last must end one."""
        return Transitions(**{name: value[which] for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are there, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Transitions:
        """Return the transitions on a device; ``dtype`` changes floating fields only."""
        return Transitions(
            **{
                name: value.to(device, dtype if value.is_floating_point() else None)
                for name, value in self.tensors().items()
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` that :func:`read_transitions` reads back exactly."""
        file = pathlib.Path(path)
        if file.suffix != ".npz":
            raise ValueError(f"the name must end in .npz, got {file.name}")
        arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in self.tensors().items()}
        np.savez_compressed(file, **arrays)

    @staticmethod
    def join(parts: list[Transitions]) -> Transitions:
        """Return the episodes of several logs of the same process, one log after the other."""
        if not parts:
            raise ValueError("join needs at least one log")
        names = {tuple(part.tensors()) for part in parts}
        if len(names) > 1:
            raise ValueError("some of the logs have costs and some have none")
        return Transitions(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in names.pop()})

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> Transitions:
        """Build transitions from arrays under the names that other libraries use.

        ``observations`` or ``obs`` are understood as ``observation``, ``terminals`` or ``dones`` as ``terminated``,
        ``timeouts`` as ``truncated``, and so on. Where the next observations are absent they are those of the next
        row: then the last transition of each truncated episode is left out, since what followed it is not known.

        Raises:
            ValueError: If a field is absent, or no array says where episodes end.
        """
        found: dict[str, Any] = {}
        for field, names in _NAMES.items():
            present = [name for name in names if name in arrays]
            if len(present) > 1:
                raise ValueError(f"both {present[0]!r} and {present[1]!r} are there: which is the {field}?")
            if present:
                found[field] = arrays[present[0]]
        missing = [name for name in ("observation", "action", "reward") if name not in found]
        if missing:
            raise ValueError(
                f"no {missing[0]} among the arrays {sorted(arrays)}: call it one of {', '.join(_NAMES[missing[0]])}"
            )
        if "terminated" not in found and "truncated" not in found:
            raise ValueError("nothing says where episodes end: give terminated, truncated (or terminals, timeouts)")
        count = len(found["observation"])
        numbers = [name for name in ("observation", "reward", "next_observation") if name in found]
        tensors: dict[str, Tensor] = {name: _tensor(found[name], count) for name in numbers}
        action = _array(found["action"])
        if np.issubdtype(action.dtype, np.integer):
            tensors["action"] = torch.as_tensor(action.reshape(count, -1).squeeze(-1).astype(np.int64))
        else:
            tensors["action"] = _tensor(action.reshape(count, -1), count)
        for name in ("terminated", "truncated"):
            flags = np.asarray(found.get(name, np.zeros(count))).reshape(-1)
            tensors[name] = torch.as_tensor(flags.astype(bool))
        if "cost" in found:
            tensors["cost"] = _tensor(_array(found["cost"]).reshape(count, -1), count)
        if tensors["observation"].ndim == 1:
            tensors["observation"] = tensors["observation"][:, None]
        if "next_observation" in tensors:
            tensors["next_observation"] = tensors["next_observation"].reshape(tensors["observation"].shape)
            return Transitions(**tensors)
        return _with_following_rows(tensors)


def _array(values: Any) -> np.ndarray:
    """One array, also of a column that holds a list in each row."""
    array = np.asarray(values)
    return np.stack([np.asarray(row) for row in array]) if array.dtype == object else array


def _tensor(values: Any, count: int) -> Tensor:
    """Numbers of a file as floats, in single precision where the file has double."""
    array = _array(values)
    if not np.issubdtype(array.dtype, np.number) or len(array) != count:
        raise ValueError(f"expected {count} rows of numbers, got {array.dtype} with shape {array.shape}")
    return torch.as_tensor(array.astype(np.float32))


def _with_following_rows(tensors: dict[str, Tensor]) -> Transitions:
    """Fill in next observations from the row that follows; an end's own is never read, or the row goes."""
    observation = tensors["observation"]
    following = torch.cat([observation[1:], observation[-1:]])
    keep = ~(tensors["truncated"] & ~tensors["terminated"])
    truncated = tensors["truncated"].clone()
    # The row before one that goes becomes its episode's last.
    truncated[:-1] |= ~keep[1:] & ~(tensors["terminated"] | tensors["truncated"])[:-1]
    tensors = {**tensors, "next_observation": following, "truncated": truncated}
    return Transitions(**{name: value[keep] for name, value in tensors.items()})


def read_transitions(path: str | os.PathLike[str]) -> Transitions:
    """Read logged transitions from a file.

    Args:
        path: An ``.npz`` of arrays, or a ``.parquet`` table with a row a transition and a column of lists (or columns
            ``observation_0``, ``observation_1``, ...) a field. :meth:`Transitions.from_arrays` tells the names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or what it holds is not transitions.

    Example:
        >>> import numpy, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.savez(f"{folder}/log.npz", obs=[[0.0], [1.0]], actions=[[1.0], [1.0]], rewards=[0.0, 1.0],
        ...                 terminals=[False, True])
        ...     read_transitions(f"{folder}/log.npz").next_observation.tolist()
        [[1.0], [1.0]]

    Source: The names of D4RL (Fu et al., 2020, arXiv 2004.07219) and of Minari and gymnasium are understood.
    """
    file = pathlib.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                columns = dict(arrays)
        elif file.suffix == ".parquet":
            columns = _parquet_columns(file)
        else:
            raise ValueError("its name must end in .npz or .parquet")
        return Transitions.from_arrays(columns)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"cannot read transitions from {file.name}: {error}") from error


def _parquet_columns(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Columns of a table as arrays: ``name_0``, ``name_1``, ... side by side under ``name``."""
    import polars as pl

    try:
        table = pl.read_parquet(file)
    except pl.exceptions.PolarsError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    columns: dict[str, Any] = {}
    numbered: dict[str, dict[int, np.ndarray]] = {}
    for name in table.columns:
        stem, _, digits = name.rpartition("_")
        values = table[name].to_numpy()
        if stem and digits.isdecimal():
            numbered.setdefault(stem, {})[int(digits)] = values
        else:
            columns[name] = values
    for stem, parts in numbered.items():
        columns[stem] = np.stack([parts[place] for place in sorted(parts)], axis=1)
    return columns
