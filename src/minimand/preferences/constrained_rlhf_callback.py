r"""Constrained RLHF inside TRL: multipliers that set the reward weights of a GRPO or RLOO trainer as it trains.

TRL takes a list of reward functions, weighs them by ``reward_weights`` and charges ``beta`` for the divergence to the
reference, all of them fixed. This callback reads the mean reward of each function from what the trainer logs, moves
the multipliers of a :class:`minimand.preferences.RewardMultipliers` and sets

.. math:: \text{reward\_weights} = m, \qquad \text{beta} = \beta_0 \Big(N - \sum_i m_i\Big),

with :math:`\beta_0` the beta that the trainer was built with. It imports transformers and is therefore not imported by
the room: say ``from minimand.preferences.constrained_rlhf_callback import ConstrainedRewardsCallback``.

Source: Moskovitz et al., ICLR 2024, arXiv 2310.04373; the documentation of ``transformers.TrainerCallback``.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .constrained_rlhf import RewardMultipliers
from .threshold_search import ThresholdSearch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"training through TRL needs it: install minimand[preferences] ({error})") from None

_FILE = "reward_multipliers.safetensors"


class ConstrainedRewardsCallback(TrainerCallback):
    r"""Hold each reward of a TRL trainer at its threshold.

    The multipliers move once a logging step, by the mean rewards since the last one: ``logging_steps=1`` is the
    paper's pace. TRL adds up raw rewards, so the trainer must not divide them by their own spread, which would undo
    the multipliers' common scale: ``scale_rewards="none"`` for GRPO; RLOO does not by default. Checkpoints hold the
    multipliers, and the search, in ``reward_multipliers.safetensors``, and a resumed run takes them up.

    Args:
        trainer: A ``GRPOTrainer`` or ``RLOOTrainer`` with one reward function a threshold and a ``beta`` above 0.
        multipliers: Thresholds, in the units of the rewards, and how fast the weights follow.
        search: Finds the thresholds while the run goes on; None to keep those of ``multipliers``. It is told the
            evaluation once every reward is within 5 % of its threshold, or ``patience`` is over.
        evaluate: Called with the model: how good it is, higher is better. Required with ``search``.
        check_every: Look so often, in logging steps, whether the thresholds are reached; 5 is the released code's.
        patience: Most logging steps for one question of the search; the released code takes a tenth of the run.

    Attributes:
        history: A dictionary each logging step: the values, thresholds and weights of the rewards, and ``beta``.

    Raises:
        ValueError: If the trainer's rewards do not fit, its beta is 0, it rescales rewards, or ``search`` comes
            without ``evaluate``.

    Example:
        >>> from types import SimpleNamespace  # stands for a trainer: GRPOTrainer(reward_funcs=[helpful, brief], ...)
        >>> args = SimpleNamespace(scale_rewards="none", multi_objective_aggregation="sum_then_normalize")
        >>> trainer = SimpleNamespace(args=args, beta=0.1, reward_func_names=["helpful", "brief"])
        >>> multipliers = RewardMultipliers(torch.tensor([0.7, 0.4]), kind="at least")
        >>> callback = ConstrainedRewardsCallback(trainer, multipliers)  # then trainer.add_callback(callback)
        >>> trainer.reward_weights, round(trainer.beta, 3)
        (tensor([0.5000, 0.5000]), 0.1)

    Source:
        Moskovitz et al. 2024, arXiv 2310.04373.
    """

    def __init__(
        self,
        trainer: Any,
        multipliers: RewardMultipliers,
        *,
        search: ThresholdSearch | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        check_every: int = 5,
        patience: int = 50,
    ) -> None:
        names = list(trainer.reward_func_names)
        if len(names) != len(multipliers.thresholds):
            raise ValueError(f"multipliers must hold one threshold a reward function of the trainer, {names}")
        if len(set(names)) != len(names):
            raise ValueError(f"the trainer's reward functions must have names of their own, got {names}")
        if not trainer.beta > 0:
            raise ValueError(f"the trainer's beta must be above 0, or it keeps no reference, got {trainer.beta}")
        args = trainer.args
        # None where a trainer has no such setting: GRPO has the first two, RLOO the last.
        scaled = getattr(args, "scale_rewards", None) not in (None, "none", False)
        if scaled or getattr(args, "normalize_advantages", False):
            raise ValueError("the trainer must not scale rewards: scale_rewards='none', or normalize_advantages=False")
        if getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
            raise ValueError("the trainer's multi_objective_aggregation must be 'sum_then_normalize'")
        if search is not None and evaluate is None:
            raise ValueError("evaluate is required with search: how good a model is")
        if check_every < 1 or patience < 1:
            raise ValueError(f"check_every and patience must be at least 1, got {check_every} and {patience}")
        self.trainer, self.multipliers = trainer, multipliers
        self.search, self.evaluate = search, evaluate
        self.check_every, self.patience = check_every, patience
        self.history: list[dict[str, Any]] = []
        self._keys = [f"rewards/{name}/mean" for name in names]
        self._beta = float(trainer.beta)
        self._waited = 0
        if search is not None:
            multipliers.set_thresholds(search.ask().to(multipliers.thresholds))
        self._set_weights()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the multipliers of the checkpoint that training goes on from."""
        saved = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
        if state.global_step and saved.exists():
            tensors = safetensors.torch.load_file(saved)
            if self.search is not None:
                told = tensors.pop("search.told").tolist()
                self.search.load_state_dict({"initial": tensors.pop("search.initial"), "told": told})
                self._waited = int(tensors.pop("search.waited"))
            self.multipliers.load_state_dict(tensors)
            self._set_weights()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the multipliers, and what the search was told, beside the model."""
        if not state.is_world_process_zero:
            return
        tensors = dict(self.multipliers.state_dict())
        if self.search is not None:
            found = self.search.state_dict()
            tensors["search.initial"] = found["initial"]
            tensors["search.told"] = torch.tensor(found["told"], dtype=torch.float64)
            tensors["search.waited"] = torch.tensor(self._waited)
        folder = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"
        safetensors.torch.save_file(tensors, folder / _FILE)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Move the multipliers by the rewards logged and hand the trainer its new weights."""
        found = [None if logs is None else logs.get(key) for key in self._keys]
        # The last log of a run and those of an evaluation hold no rewards of training.
        if any(value is None or not math.isfinite(value) for value in found):
            return
        values = self.multipliers.thresholds.new_tensor(found)
        self.multipliers.update(values)
        if self.search is not None and self.evaluate is not None and self.search.status is None:
            self._waited += 1
            there = self._waited % self.check_every == 0 and self.multipliers.reached(values)
            if there or self._waited >= self.patience:
                self.search.tell(float(self.evaluate(kwargs["model"])))
                self.multipliers.set_thresholds(self.search.ask().to(self.multipliers.thresholds))
                self._waited = 0
        self._set_weights()
        self.history.append(
            {
                "values": values.tolist(),
                "thresholds": self.multipliers.thresholds.tolist(),
                "weights": self.trainer.reward_weights.tolist(),
                "beta": self.trainer.beta,
            }
        )

    def _set_weights(self) -> None:
        self.trainer.reward_weights = self.multipliers.weights.detach().float()
        # A beta that rounds to 0 would tell the trainer that there is no reference.
        self.trainer.beta = self._beta * max(float(self.multipliers.kl_weight), 1e-6)
