r"""Read a network as norm-based bounds do: one matrix a layer, batch norm folded into the layer before it.

In evaluation mode batch norm is affine, so with scale :math:`g` and shift :math:`h`, running mean :math:`\mu` and
variance :math:`v`, the layer before it becomes :math:`W' = D W`, :math:`b' = D (b - \mu) + h` with
:math:`D = \operatorname{diag}(g / \sqrt{v + \epsilon})`. A convolution's weight is the matrix of its output channels.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import checks


@dataclasses.dataclass(frozen=True)
class FoldedNetwork:
    """A network without batch norm that computes what the model computes.

    Args:
        network: Its structure.
        parameters: Its weights and biases by name, with gradient to the model's own.
        layers: Names of the parameters that are weights of linear and convolutional layers, in order.
    """

    network: nn.Module
    parameters: Mapping[str, Tensor]
    layers: tuple[str, ...]

    @property
    def matrices(self) -> list[Tensor]:
        """The layers' weights, ``(outputs, rest)`` each."""
        return [self.parameters[name].flatten(1) for name in self.layers]

    def network_with_parameters(self) -> nn.Module:
        """Return a module of its own that holds the parameters, all of them trainable."""
        own = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter.copy_(self.parameters[name])
        return own.requires_grad_()

    def __call__(self, inputs: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the network's outputs, with other parameters if they are given."""
        return torch.func.functional_call(
            self.network, dict(self.parameters if parameters is None else parameters), (inputs,)
        )

    def scores(
        self, inputs: Tensor, parameters: Mapping[str, Tensor] | None = None, *, batch_size: int = 4096
    ) -> Tensor:
        """Return the outputs for many inputs, batch by batch, and refuse what are no class scores.

        Raises:
            ValueError: If they have another shape than ``(examples, classes)``, or are not finite.
        """
        found = torch.cat([self(part, parameters) for part in inputs.split(batch_size)])
        if found.dim() != 2 or len(found) != len(inputs) or found.shape[1] < 2:
            raise ValueError(
                f"model must return scores (examples, classes) with at least 2 classes, got {tuple(found.shape)}"
            )
        checks.finite(found, "the model's scores")
        return found


def require_evaluation(model: nn.Module) -> None:
    """Raise unless every module of the model is in evaluation mode: training mode is another function each call."""
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"model must be in evaluation mode, since dropout and batch norm make it another function in training: "
            f"call model.eval() first ({training[0]} is in training mode)"
        )


def fold(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> FoldedNetwork:
    """Fold batch norm and find the weight matrices.

    Args:
        model: Of linear and convolutional layers, batch norm behind them, and layers without parameters; in
            evaluation mode.
        state: The ``state_dict`` whose numbers stand in for the model's own, such as that of its start.

    Raises:
        TypeError: If the model is no module.
        ValueError: If it is in training mode, holds parameters of other layers, has batch norm that cannot be folded,
            or the state does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    require_evaluation(model)
    own = dict(model.named_parameters())
    tensors = own | dict(model.named_buffers())
    if state is not None:
        tensors = {name: _taken(state, name, value) for name, value in tensors.items()}
    names = {id(value): name for name, value in own.items()}
    network, layers = model, list(_layers(model))
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        network, tensors = _without_batch_norm(model, tensors)
    elif not layers:
        raise ValueError("model has no linear or convolutional layer")
    weights = dict.fromkeys(names[id(module.weight)] for module in layers)  # tied weights count once
    kept = {name: value for name, value in tensors.items() if name in dict(network.named_parameters())}
    for name, value in kept.items():
        checks.finite(value, f"parameter {name}")
    return FoldedNetwork(network, kept, tuple(weights))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)):
            yield module
        elif not isinstance(module, _BatchNorm) and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{name or 'model'} is a {type(module).__name__} with parameters of its own: norms are defined for "
                f"networks of linear and convolutional layers, with batch norm behind them"
            )


def _taken(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in state:
        raise ValueError(f"initial_state must be a state_dict of this model: it lacks {name!r}")
    value = state[name].detach()
    if value.shape != like.shape:
        raise ValueError(f"initial_state[{name!r}] must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return value.to(device=like.device, dtype=like.dtype)


def squared_spectral_norms(matrices: list[Tensor]) -> Tensor:
    """Return the squared spectral norms: the top eigenvalue of the smaller Gram matrix costs less than an SVD."""
    grams = [matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix for matrix in matrices]
    return torch.stack([torch.linalg.eigvalsh(gram)[-1] for gram in grams])


def steps(model: nn.Module) -> list[nn.Module] | None:
    """Return the modules of a chain of ``nn.Sequential`` in order, or None if the model is anything else."""
    if type(model) is not nn.Sequential:
        return None
    found: list[nn.Module] = []
    for module in model:
        inner = steps(module) if isinstance(module, nn.Sequential) else [module]
        if inner is None:
            return None
        found += inner
    return found


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a model, or say in one sentence that its code depends on its data."""
    try:
        # A layer on its own would be traced into its insides.
        return fx.symbolic_trace(nn.Sequential(model) if isinstance(model, (nn.Linear, _ConvNd)) else model)
    except Exception as error:  # tracing runs the user's own forward, which may raise anything
        raise ValueError(f"model cannot be read, since its forward cannot be traced: {error}") from error


def _without_batch_norm(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    graph_module, found = trace(model), dict(tensors)
    modules = dict(graph_module.named_modules())
    calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    for node in list(graph_module.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm):
            continue
        before = node.args[0]
        layer = modules.get(str(before.target)) if before.op == "call_module" else None
        alone = len(before.users) == 1 and calls.count(before.target) == 1
        if not isinstance(layer, (nn.Linear, _ConvNd)) or not alone or norm.running_mean is None:
            raise ValueError(
                f"{node.target} cannot be folded: batch norm must have running statistics and stand directly behind a "
                f"linear or convolutional layer that nothing else reads"
            )
        own, target = f"{node.target}.", str(before.target)
        mean, variance = found.pop(f"{own}running_mean"), found.pop(f"{own}running_var")
        found.pop(f"{own}num_batches_tracked", None)
        weight = found[f"{target}.weight"]
        scale = found.pop(f"{own}weight", torch.ones_like(variance)) / (variance + norm.eps).sqrt()
        shift = found.pop(f"{own}bias", torch.zeros_like(mean))
        found[f"{target}.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        found[f"{target}.bias"] = (found.get(f"{target}.bias", torch.zeros_like(mean)) - mean) * scale + shift
        if layer.bias is None:
            biased = copy.deepcopy(layer)
            biased.bias = nn.Parameter(torch.zeros_like(mean))
            parent, _, leaf = target.rpartition(".")
            setattr(graph_module.get_submodule(parent), leaf, biased)
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module.eval(), found
