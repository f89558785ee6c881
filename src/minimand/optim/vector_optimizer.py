"""Optimizers for which all parameters of a group are one vector, moved by a pure function from state to state."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..projections import Projection
from .domains import diameter_of, project_rows


class VectorOptimizer(torch.optim.Optimizer, abc.ABC):
    """An online learner as an optimizer: the parameters hold the point to play, the state all else.

    The state of a group is kept with its first parameter, in at least float32, so that checkpoints are plain tensors.
    The domain is the optimizer's own and not saved: build it anew before loading a checkpoint.
    """

    def __init__(
        self, params: Iterable[Any], settings: dict[str, Any], *, domain: Projection | None, average: bool
    ) -> None:
        self.domain = domain
        super().__init__(params, {**settings, "average": average})

    @abc.abstractmethod
    def _check(self, group: dict[str, Any], dim: int) -> None:
        """Raise unless the settings of the group are in range and go together."""

    @abc.abstractmethod
    def _begin(self, group: dict[str, Any], vector: Tensor) -> Any:
        """Return the state, a NamedTuple of tensors, of a learner that begins at the vector."""

    @abc.abstractmethod
    def _advance(self, group: dict[str, Any], state: Any, gradient: Tensor) -> Any:
        """Return the state after a round."""

    @abc.abstractmethod
    def _restore(self, group: dict[str, Any], saved: dict[str, Any]) -> Any:
        """Rebuild the state from its dictionary."""

    @abc.abstractmethod
    def _bound(self, group: dict[str, Any], state: Any) -> Tensor:
        """Return what the regret of the rounds so far cannot exceed."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: a vector, and a learner, of its own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for weight in group["params"]:
                checks.floating(weight, "params")
                checks.finite(weight.detach(), "params")
            dim = sum(weight.numel() for weight in group["params"])
            group["diameter"] = diameter_of(self.domain, dim, group["diameter"])
            self._check(group, dim)
            start = _vector(group["params"])
            if not torch.allclose(project_rows(start, self.domain), start, atol=1e-4):
                raise ValueError(f"params must begin inside the domain {self.domain!r}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Play a round: read the gradients at the parameters, and write the next point to them.

        A group is left as it is where its learning rate is 0 or none of its parameters has a gradient.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss; optional.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If a gradient is sparse or not finite; the parameters then stay as they are.
        """
        value = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            gradient = None if group["lr"] == 0 else _gradient(group["params"])
            if gradient is not None:
                self._play(group, gradient)
        return value

    @property
    def variation(self) -> float:
        """The paper's V_T: how far gradients have moved from one round to the next, squared and summed."""
        return float(sum(state.variation for _, state in self._states()))

    @property
    def average(self) -> list[Tensor]:
        """The mean of the points that were played, one tensor a parameter: the answer of online-to-batch conversion."""
        found: list[Tensor] = []
        for group in self.param_groups:
            if not group["average"]:
                raise RuntimeError("the optimizer was built with average=False, so no mean of points was kept")
            mean = self.state[group["params"][0]].get("average")
            vector = _vector(group["params"]) if mean is None else mean
            found += [part.clone() for part in _parts(vector, group["params"])]
        return found

    def regret_bound(self) -> float:
        """Return what the regret of the rounds so far cannot exceed, against every point of the domain.

        The sum of the groups' bounds, proven for the gradients as they came: nothing is assumed of their law.
        """
        return float(sum(self._bound(group, state) for group, state in self._states()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, in the precision it was saved in."""
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of the parameters; half precision would lose where the learner stands.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            first = group["params"][0]
            if saved["params"][0] in state_dict["state"]:
                self.state[first] = _copy(state_dict["state"][saved["params"][0]], first.device)

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        return {**super().__getstate__(), "domain": self.domain}

    def _states(self) -> list[tuple[dict[str, Any], Any]]:
        played = [group for group in self.param_groups if self.state.get(group["params"][0])]
        return [(group, self._restore(group, self.state[group["params"][0]]["learner"])) for group in played]

    def _play(self, group: dict[str, Any], gradient: Tensor) -> None:
        store = self.state[group["params"][0]]
        state = self._restore(group, store["learner"]) if store else self._begin(group, _vector(group["params"]))
        after = self._advance(group, state, gradient)
        if group["average"]:
            mean = store.get("average", state.point)
            store["average"] = mean + (state.point - mean) / after.rounds
        store["learner"] = _plain(after)
        torch._foreach_copy_(group["params"], _parts(after.point, group["params"]))


def _plain(state: Any) -> dict[str, Any]:
    """Turn a NamedTuple, and such tuples in it, into dictionaries that any checkpoint can hold."""
    return {name: _plain(value) if hasattr(value, "_asdict") else value for name, value in state._asdict().items()}


def _copy(saved: Any, device: torch.device) -> Any:
    if isinstance(saved, dict):
        return {name: _copy(value, device) for name, value in saved.items()}
    return saved.to(device, copy=True) if isinstance(saved, Tensor) else saved


def _join(tensors: list[Tensor]) -> Tensor:
    # torch.cat copies even a single tensor, so that zero_grad cannot reach the hint.
    vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _vector(weights: list[Tensor]) -> Tensor:
    return _join([weight.detach() for weight in weights])


def _parts(vector: Tensor, weights: list[Tensor]) -> list[Tensor]:
    parts = vector.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def _gradient(weights: list[Tensor]) -> Tensor | None:
    """Return the gradients as one vector, zero where a parameter has none, or None where no parameter has one."""
    found = [weight.grad for weight in weights]
    if all(one is None for one in found):
        return None
    gradients = [torch.zeros_like(weight) if one is None else one for weight, one in zip(weights, found, strict=True)]
    if any(one.is_sparse for one in gradients):
        raise ValueError("gradients must be dense: the hint and the variation are those of the whole vector")
    return _join(gradients)
