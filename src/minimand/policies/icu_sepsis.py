"""ICU-Sepsis: treatment of sepsis as a table of 716 states and 25 doses, fitted to the records of intensive care."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

import numpy as np
import torch
from torch import Tensor

from .tabular_cmdp import TabularCMDP

ENDED = 713  # the last three states are death, survival and the end


@dataclasses.dataclass(frozen=True)
class ICUSepsis:
    """A patient's treatment: 1 for survival; a cost of 1 a step in which organs fail badly.

    Args:
        problem: Transitions, rewards, and the cost, with discount 1; the last three states end the episode.
        clinicians: Probabilities of the doses that were given, ``(states, actions)``; even in the last three states.
        features: 47 measurements of each state, the middle of its cluster, ``(states, 47)``.
        severity: The organ failure score (SOFA) of each state, ``(states,)``.

    Example:
        >>> sepsis = ICUSepsis.load()
        >>> round(float(sepsis.problem.evaluate(sepsis.clinicians).value), 4)
        0.7818

    Source:
        Choudhary, Gupta and Thomas, "ICU-Sepsis: a benchmark MDP built from real medical data", RLC 2024,
        arXiv 2406.05646; the package icu-sepsis.
    """

    problem: TabularCMDP
    clinicians: Tensor
    features: Tensor
    severity: Tensor

    @classmethod
    def load(cls, *, severe: float = 11.0) -> ICUSepsis:
        """Read the tables that the package icu-sepsis ships.

        Args:
            severe: The organ failure score from which on a step costs 1.

        Raises:
            ImportError: If the package is not installed.
        """
        # Found but not imported: only its file is needed, and the import loads a retired environment library.
        found = importlib.util.find_spec("icu_sepsis")
        if found is None or found.submodule_search_locations is None:
            raise ImportError('ICUSepsis needs the package icu-sepsis: pip install "minimand[policies]"')
        folder = pathlib.Path(found.submodule_search_locations[0]) / "envs" / "assets"
        with np.load(folder / "dynamics.npz", allow_pickle=False) as arrays:
            tables = {name: torch.from_numpy(arrays[name]) for name in arrays}
        reward = (tables["tx_mat"] * tables["r_mat"]).sum(-1)
        transition = tables["tx_mat"].clone()
        transition[ENDED:] = 0
        clinicians = tables["expert_policy"].clone()
        clinicians[ENDED:] = 1 / clinicians.shape[1]
        cost = (tables["sofa_scores"] >= severe).double()[:, None].repeat(1, reward.shape[1])
        cost[ENDED:] = 0
        problem = TabularCMDP(transition, reward, tables["d_0"], discount=1.0, cost=cost[None])
        return cls(problem, clinicians, tables["state_cluster_centers"], tables["sofa_scores"])
