"""A trained policy: what a user calls, saves, loads and exports."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import checks
from .offline_batches import Scaling

_FORMAT = "minimand.policy/1"
# How a network of that name is built from its shape, which is all that is stored beside its numbers.
NETWORKS: dict[str, Callable[..., nn.Module]] = {}


def plain_network(sizes: list[int]) -> nn.Sequential:
    """Layers of those widths with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NETWORKS["plain"] = plain_network


def network_shape(network: nn.Module) -> dict[str, Any]:
    """Return what :data:`NETWORKS` needs to build such a network again.

    A network that is no plain sequence of layers says so itself, by a method ``shape``.
    """
    shape = getattr(network, "shape", None)
    if shape is not None:
        return shape()
    linear = [layer for layer in network.children() if isinstance(layer, nn.Linear)]
    return {"kind": "plain", "sizes": [linear[0].in_features, *(layer.out_features for layer in linear)]}


class Policy(nn.Module):
    r"""Act: :math:`o \mapsto l + (1 + \tanh f((o - \mu)/\sigma))\,(h - l)/2`.

    Args:
        network: :math:`f`, from scaled observations to one number an action coordinate.
        scaling: Of observations and actions.

    Example:
        >>> scaling = Scaling(torch.zeros(3), torch.ones(3), torch.tensor([-2.0]), torch.tensor([2.0]))
        >>> policy = Policy(nn.Sequential(nn.Linear(3, 1)), scaling)
        >>> policy.act([0.1, 0.2, 0.3]).shape
        (1,)

    Source: The deterministic policy of S. Fujimoto and S. S. Gu (2021, arXiv 2106.06860); stored as safetensors,
    which hold numbers and no code.
    """

    def __init__(self, network: nn.Module, scaling: Scaling) -> None:
        super().__init__()
        self.network, self.scaling = network, scaling

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        return len(self.scaling.mean)

    def forward(self, observation: Float[Tensor, "batch n"]) -> Float[Tensor, "batch m"]:
        """Return actions, as the process takes them, for observations as it gives them."""
        checks.finite(observation, "observation")
        return self.scaling.action_out(torch.tanh(self.network(self.scaling.observation_in(observation))))

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """Return the action for one observation, or one for each.

        Args:
            observation: An array, list or tensor of shape ``(n,)`` or ``(B, n)``.

        Returns:
            Actions of shape ``(m,)`` or ``(B, m)``: a tensor for a tensor, else a NumPy array.

        Raises:
            ValueError: If the observation has another width, or is not finite.
        """
        mean = self.scaling.mean
        given = torch.as_tensor(observation, device=mean.device, dtype=mean.dtype)
        if given.ndim not in (1, 2) or given.shape[-1] != self.observation_dim:
            raise ValueError(
                f"observation must have shape ({self.observation_dim},) or (B, {self.observation_dim}), "
                f"got {tuple(given.shape)}"
            )
        action = self(given.view(-1, self.observation_dim)).view(*given.shape[:-1], -1)
        return action if isinstance(observation, Tensor) else action.cpu().numpy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a safetensors file: numbers and shapes, never code."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        about = {"format": _FORMAT, "network": json.dumps(network_shape(self.network))}
        save_file(state, os.fspath(path), metadata=about)

    def export_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as ONNX, from ``observation`` of shape ``(batch, n)`` to ``action`` of shape ``(batch, m)``.

        Raises:
            ImportError: If what torch exports with is absent: ``pip install "minimand[policies]"``.
        """
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError('ONNX export needs the extra "policies": pip install "minimand[policies]"') from error
        example = torch.zeros(2, self.observation_dim, dtype=self.scaling.mean.dtype, device=self.scaling.mean.device)
        program = torch.onnx.export(
            self.eval(),
            (example,),
            input_names=["observation"],
            output_names=["action"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(os.fspath(path))


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Load what :meth:`Policy.save` wrote.

    Args:
        path: The safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no policy of ours.

    Example:
        >>> import tempfile
        >>> scaling = Scaling(torch.zeros(3), torch.ones(3), torch.tensor([-2.0]), torch.tensor([2.0]))
        >>> policy = Policy(nn.Sequential(nn.Linear(3, 1)), scaling)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     policy.save(f"{folder}/policy.safetensors")
        ...     same = load_policy(f"{folder}/policy.safetensors")
        >>> bool((same.act([1.0, 2.0, 3.0]) == policy.act([1.0, 2.0, 3.0])).all())
        True

    Source: The safetensors format: a JSON header and raw numbers, so that loading runs no code.
    """
    file = pathlib.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        with safe_open(os.fspath(file), framework="pt") as stored:
            about = stored.metadata() or {}
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no safetensors file: {error}") from error
    if about.get("format") != _FORMAT:
        raise ValueError(f"{file.name} is no policy saved by Policy.save")
    shape = json.loads(about["network"])
    kind = shape.pop("kind")
    if kind not in NETWORKS:
        raise ValueError(f"{file.name} holds a network of unknown kind {kind!r}")
    network = NETWORKS[kind](**shape).to(state["scaling.mean"].dtype)
    scaling = Scaling(*(state[f"scaling.{name}"] for name in ("mean", "deviation", "low", "high")))
    policy = Policy(network, scaling)
    policy.load_state_dict(state)
    return policy.eval()
