"""Data sets in Minari's format: read those a user has on disk, and write our own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..caching import arriving
from .transitions import Transitions


@dataclasses.dataclass(frozen=True)
class OfflineData:
    """A log and what is known of where it comes from.

    Args:
        transitions: The log.
        environment: Id of its environment, or None.
        low: Least action, shape ``(m,)``, or None.
        high: Largest action, shape ``(m,)``, or None.
        random_score: Mean return of chance, which a normalised score calls 0; or None.
        expert_score: Mean return of an expert, which it calls 100; or None.
    """

    transitions: Transitions
    environment: str | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    random_score: float | None = None
    expert_score: float | None = None


def _minari() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import minari
    except ImportError as error:
        raise ImportError('Minari data sets need the extra "policies": pip install "minimand[policies]"') from error
    return minari


def read_minari(dataset: str | os.PathLike[str]) -> OfflineData:
    """Read a Minari data set that is on disk.

    Args:
        dataset: Its folder, or its id if it lies in Minari's own folder (``MINARI_DATASETS_PATH``, else
            ``~/.minari/datasets``). Nothing is downloaded.

    Returns:
        Its transitions, bounds of actions, environment and reference scores.

    Raises:
        ImportError: If Minari is not installed; says which extra to install.
        FileNotFoundError: If there is no such data set.
        ValueError: If it is damaged, or its observations or actions are no vectors.
        TypeError: If its spaces are of another kind.

    Example:
        >>> import tempfile
        >>> from minimand.policies import Pendulum
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_minari(OfflineData(Pendulum().log("mixed", episodes=2), "Pendulum-v1"), f"{folder}/mixed-v0")
        ...     read_minari(f"{folder}/mixed-v0").transitions.num_episodes
        2

    Source: O. Younis et al., "Minari" (2024), the data set format of the Farama Foundation.
    """
    minari = _minari()
    folder = pathlib.Path(dataset)
    if not folder.is_dir():
        root = pathlib.Path(os.environ.get("MINARI_DATASETS_PATH") or pathlib.Path.home() / ".minari" / "datasets")
        folder = root / dataset
    data = folder if (folder / "metadata.json").exists() else folder / "data"
    if not (data / "metadata.json").exists():
        raise FileNotFoundError(f"no Minari data set at {os.fspath(dataset)!r}: a folder with data/metadata.json")
    try:
        found = minari.MinariDataset(data)
        episodes = list(found.iterate_episodes())
        spec = found.spec.env_spec
        metadata = found.storage.metadata
        space = found.spec.action_space
    except Exception as error:  # damaged files raise many kinds, and a user needs the sentence
        raise ValueError(f"cannot read the Minari data set {folder.name}: {error}") from error
    if not episodes:
        raise ValueError(f"the Minari data set {folder.name} holds no episodes")
    for name, value in (("observations", episodes[0].observations), ("actions", episodes[0].actions)):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"the {name} of {folder.name} must be arrays, got {type(value).__name__}")
    costs = [episode.infos.get("cost") if episode.infos else None for episode in episodes]
    arrays: dict[str, Any] = {
        "observation": np.concatenate([episode.observations[:-1] for episode in episodes]),
        "next_observation": np.concatenate([episode.observations[1:] for episode in episodes]),
        "action": np.concatenate([episode.actions for episode in episodes]),
        "reward": np.concatenate([episode.rewards for episode in episodes]),
        "terminated": np.concatenate([episode.terminations for episode in episodes]),
        "truncated": np.concatenate([episode.truncations for episode in episodes]),
    }
    # Collectors may write one cost more than there are steps: that of the reset.
    if all(cost is not None for cost in costs):
        pairs = zip(costs, episodes, strict=True)
        arrays["cost"] = np.concatenate([np.asarray(cost)[-len(episode.rewards) :] for cost, episode in pairs])
    bounds = [getattr(space, name, None) for name in ("low", "high")]
    low, high = (
        torch.as_tensor(np.asarray(bound), dtype=torch.float32)
        if bound is not None and np.isfinite(bound).all() and np.asarray(bound).ndim == 1
        else None
        for bound in bounds
    )
    scores = [metadata.get(name) for name in ("ref_min_score", "ref_max_score")]
    return OfflineData(
        Transitions.from_arrays(arrays),
        spec.id if spec is not None else None,
        low,
        high,
        *(float(score) if score is not None else None for score in scores),
    )


def write_minari(data: OfflineData, folder: str | os.PathLike[str]) -> None:
    """Write a log as a Minari data set, which Minari itself and :func:`read_minari` read.

    Args:
        data: What to write; its actions must be vectors.
        folder: Where; its name must end in a version, as in ``mixed-v0``. Nobody ever finds half of it.

    Raises:
        ImportError: If Minari is not installed; says which extra to install.
        ValueError: If the folder is there already, or its name has no version.
        TypeError: If actions are choices.

    Example:
        >>> import tempfile
        >>> from minimand.policies import Pendulum
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_minari(OfflineData(Pendulum().log("expert", episodes=1)), f"{folder}/expert-v0")

    Source: O. Younis et al., "Minari" (2024), the data set format of the Farama Foundation.
    """
    minari = _minari()
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    target = pathlib.Path(folder)
    if target.exists():
        raise ValueError(f"{target} is there already")
    log = data.transitions
    if not log.continuous:
        raise TypeError("the data's actions are choices; only vectors are written")
    low = log.action.amin(0) if data.low is None else data.low
    high = log.action.amax(0) if data.high is None else data.high
    lengths = log.episode_lengths().tolist()
    fields = {name: value.cpu().split(lengths) for name, value in log.tensors().items()}
    buffers = [
        EpisodeBuffer(
            id=place,
            observations=torch.cat([fields["observation"][place], fields["next_observation"][place][-1:]]).numpy(),
            actions=fields["action"][place].numpy(),
            rewards=fields["reward"][place].tolist(),
            terminations=fields["terminated"][place].tolist(),
            truncations=fields["truncated"][place].tolist(),
            infos={"cost": fields["cost"][place].numpy()} if "cost" in fields else None,
        )
        for place in range(len(lengths))
    ]
    with arriving(target) as draft, _datasets_in(draft.parent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id=target.name,
            buffer=buffers,
            env=data.environment,
            observation_space=Box(-np.inf, np.inf, (log.observation.shape[1],), np.float32),
            action_space=Box(low.cpu().numpy(), high.cpu().numpy(), dtype=np.float32),
            ref_min_score=data.random_score,
            ref_max_score=data.expert_score,
            data_format="hdf5",
        )


@contextlib.contextmanager
def _datasets_in(folder: pathlib.Path) -> Iterator[None]:
    """Minari writes below a folder that only the environment variable names."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
