"""One plain training loop, and the same loop for many small models at once.

:func:`fit` is what a user would write. :func:`fit_many` trains models of one architecture side by side with
stacked parameters: small models spend their time in per-call overhead, which the stack pays once. Each of its
models sees the batches, draws the numbers and takes the steps that :func:`fit` would give it alone.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import checks

Objective = Callable[..., Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever it minimises.

    Args:
        epochs: Passes over the data.
        batch_size: Examples a step; an incomplete last batch of an epoch is left out, and the next epoch
            shuffles anew.
        lr: Learning rate at the start.
        weight_decay: Decoupled for AdamW, an L2 penalty for SGD.
        momentum: Of SGD.
        optimizer: ``"adamw"``, ``"sgd"``, or a callable from parameters to a torch optimizer. Its ``step`` is
            given a closure, so two-pass optimizers such as SAM work.
        schedule: ``"cosine"`` to zero over all steps, or ``"constant"``.
        clip_norm: Largest norm of a model's gradient, or None.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    optimizer: str | OptimizerFactory = "adamw"
    schedule: str = "cosine"
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if int(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        checks.positive(self.lr, "lr")
        checks.non_negative(self.weight_decay, "weight_decay")
        checks.one_of(self.schedule, "schedule", ("cosine", "constant"))
        if not callable(self.optimizer):
            checks.one_of(self.optimizer, "optimizer", ("adamw", "sgd"))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Build the optimizer. The fused kernels update all tensors in one call, on CPUs and GPUs."""
        if callable(self.optimizer):
            return self.optimizer(parameters)
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
            )
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at ``step`` of ``steps``."""
        return 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Count the batches of an epoch: whole ones only, but at least one."""
    return max(samples // batch_size, 1)


def shuffled_batches(samples: int, batch_size: int, generator: torch.Generator) -> Int[Tensor, "steps batch"]:
    """Shuffle ``range(samples)`` into the whole batches of one epoch."""
    size = min(batch_size, samples)
    steps = batches_per_epoch(samples, size)
    return torch.randperm(samples, generator=generator)[: steps * size].reshape(steps, size)


def linear(features: int, classes: int) -> nn.Sequential:
    """Build a linear classifier."""
    return nn.Sequential(nn.Linear(features, classes))


def mlp(features: int, classes: int, *, hidden: Sequence[int] = (128, 128)) -> nn.Sequential:
    """Build a multi-layer perceptron with ReLU between its layers."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def model_factory(model: str | Callable[[Any, int], nn.Module]) -> Callable[[Any, int], nn.Module]:
    """Return what builds a model from its number (or shape) of features and its number of classes.

    Args:
        model: ``"linear"``, ``"mlp"``, ``"package.module:factory"``, or a callable, which is returned.

    Raises:
        ValueError: If the name stands for nothing that can be called.
    """
    if callable(model):
        return model
    known: dict[str, Callable[[Any, int], nn.Module]] = {"linear": linear, "mlp": mlp}
    if model in known:
        return known[model]
    module, separator, name = str(model).partition(":")
    if not separator:
        raise ValueError(f"model must be 'linear', 'mlp' or 'package.module:factory', got {model!r}")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: cannot import {model}: {error}") from None
    if not callable(factory):
        raise ValueError(f"model: {model} cannot be called")
    return factory


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module whose random initial weights follow from ``seed``, leaving the global stream untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class _Risked(nn.Module):
    """A loss of torch's own, whose examples a risk adds up."""

    def __init__(self, loss: nn.Module, risk: nn.Module) -> None:
        super().__init__()
        self.loss, self.risk = loss, risk

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.risk(self.loss(input, target))


def with_risk(loss: nn.Module, risk: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of ``loss`` whose per-example losses are added up by ``risk`` instead of their mean.

    Args:
        loss: Any loss with a ``reduction``: minimand's or torch's.
        risk: Maps losses ``(batch,)`` to a scalar.

    Raises:
        TypeError: If the loss has no ``reduction``, so that its per-example losses cannot be had.
    """
    if not hasattr(loss, "reduction"):
        raise TypeError(f"loss must have a reduction for a risk to replace, {type(loss).__name__} has none")
    own: Any = copy.deepcopy(loss)
    if hasattr(own, "link"):
        own.reduction = risk
        return own
    own.reduction = "none"
    return _Risked(own, risk if isinstance(risk, nn.Module) else _Function(risk))


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, losses: Tensor) -> Tensor:
        return self.function(losses)


def fit(
    model: nn.Module,
    loss: Objective,
    inputs: Float[Tensor, "samples ..."],
    target: Tensor,
    *,
    recipe: Recipe,
    seed: int = 0,
    after_epoch: Callable[[int, float], bool | None] | None = None,
) -> list[float]:
    """Train ``model`` in place to minimise ``loss`` on a data set held in memory.

    Args:
        model: Maps ``inputs`` to what ``loss`` takes. Trained where it is: its device and dtype are kept.
        loss: ``loss(scores, target)``. What it ``needs`` (see :class:`minimand.losses.Loss`) is passed by
            keyword, its ``start``, ``start_epoch`` and ``after_step`` are called, and its parameters are trained
            with the model's.
        inputs: All inputs.
        target: All targets, one an input.
        recipe: How to train.
        seed: Decides the order of the examples.
        after_epoch: Called with the epoch and its mean loss; training stops when it returns True.

    Returns:
        The mean loss of each epoch.
    """
    if len(inputs) != len(target):
        raise ValueError(f"inputs and target differ in length: {len(inputs)} and {len(target)}")
    checks.not_empty(inputs, "inputs")
    generator = torch.Generator().manual_seed(seed)
    _call(loss, "start", model, len(inputs))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = recipe.make_optimizer([*own, *_parameters(loss)])
    base_rates = [group["lr"] for group in optimizer.param_groups]
    steps = recipe.epochs * batches_per_epoch(len(inputs), recipe.batch_size)
    step = 0
    history = []
    model.train()
    for epoch in range(recipe.epochs):
        _call(loss, "start_epoch", epoch)
        total = torch.zeros((), device=inputs.device)
        order = shuffled_batches(len(inputs), recipe.batch_size, generator).to(inputs.device)
        for index in order:
            batch, labels = inputs[index], target[index]
            context = _context(loss, index=index, inputs=batch)

            def closure(batch: Tensor = batch, labels: Tensor = labels, context: dict[str, Tensor] = context) -> Tensor:
                optimizer.zero_grad()
                value = loss(model(batch), labels, **context)
                value.backward()
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(own, recipe.clip_norm)
                return value

            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * recipe.rate(step, steps)
            value: Any = optimizer.step(closure)  # type: ignore[arg-type]  # the stubs expect a float
            _call(loss, "after_step", model)
            total += value.detach()
            step += 1
        history.append(float(total) / len(order))
        if after_epoch is not None and after_epoch(epoch, history[-1]):
            break
    model.eval()
    return history


def fit_many(
    models: Sequence[nn.Module],
    losses: Sequence[Objective],
    inputs: Sequence[Float[Tensor, "samples ..."]],
    targets: Sequence[Tensor],
    *,
    recipe: Recipe,
    seeds: Sequence[int],
) -> list[list[float]]:
    """Train several models of one architecture at once, each in place, as :func:`fit` would one by one.

    The models' parameters are stacked and the forward pass is a ``torch.func.vmap``. A loss without state is
    vmapped too; others are called model by model on their slice of the scores. Every data set must give
    the same number of batches of the same size.

    Args:
        models: One model a data set; all of one architecture.
        losses: One loss a model, not shared: each keeps its own state.
        inputs: One data set a model.
        targets: One target tensor a model.
        recipe: How to train; its optimizer must be named, not a callable.
        seeds: One seed a model: decides the order of its examples.

    Returns:
        The mean loss of each epoch, for each model.

    Raises:
        ValueError: If :func:`can_stack` says that these cannot be trained together.
    """
    if len(models) == 1:
        return [fit(models[0], losses[0], inputs[0], targets[0], recipe=recipe, seed=seeds[0])]
    problem = can_stack(models, inputs, recipe)
    if problem is not None:
        raise ValueError(problem)
    count = len(models)
    cells = torch.arange(count)[:, None]
    all_inputs, all_targets = _stack_ragged(inputs), _stack_ragged(targets)
    samples = [len(data) for data in inputs]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    parameters, buffers = torch.func.stack_module_state(list(models))
    views = [_view(model, parameters, cell) for cell, model in enumerate(models)]
    skeleton = copy.deepcopy(models[0]).to("meta")

    def forward(values: dict[str, Tensor], state: dict[str, Tensor], batch: Tensor) -> Any:
        return torch.func.functional_call(skeleton, (values, state), (batch,))

    scores_of = torch.func.vmap(forward)
    for loss, view, size in zip(losses, views, samples, strict=True):
        _call(loss, "start", view, size)
    optimizer = recipe.make_optimizer(
        [*parameters.values(), *(parameter for loss in losses for parameter in _parameters(loss))]
    )
    steps_an_epoch = batches_per_epoch(samples[0], recipe.batch_size)
    steps = recipe.epochs * steps_an_epoch
    stateless = _is_stateless(losses[0])
    loss_of = torch.func.vmap(losses[0]) if stateless else None
    step = 0
    history = []
    for epoch in range(recipe.epochs):
        for loss in losses:
            _call(loss, "start_epoch", epoch)
        total = torch.zeros(count, device=all_inputs.device)
        order = torch.stack(
            [
                shuffled_batches(size, recipe.batch_size, generator)
                for size, generator in zip(samples, generators, strict=True)
            ],
            dim=1,
        ).to(all_inputs.device)
        for index in order:
            batch, labels = all_inputs[cells, index], all_targets[cells, index]
            scores = scores_of(parameters, buffers, batch)
            if loss_of is not None:
                values = loss_of(scores, labels)
            else:
                values = torch.stack(
                    [
                        loss(scores[cell], labels[cell], **_context(loss, index=index[cell], inputs=batch[cell]))
                        for cell, loss in enumerate(losses)
                    ]
                )
            optimizer.zero_grad()
            values.sum().backward()  # the cells share no parameter, so the sum's gradient is each one's own
            if recipe.clip_norm is not None:
                _clip_each(parameters.values(), recipe.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * recipe.rate(step, steps)
            optimizer.step()
            for loss, view in zip(losses, views, strict=True):
                _call(loss, "after_step", view)
            total += values.detach()
            step += 1
        history.append((total / steps_an_epoch).tolist())
    with torch.no_grad():
        for cell, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][cell])
            model.eval()
    return [list(curve) for curve in zip(*history, strict=True)]


def can_stack(models: Sequence[nn.Module], inputs: Sequence[Tensor], recipe: Recipe) -> str | None:
    """Tell why these models cannot be trained by :func:`fit_many`, or None if they can."""
    if callable(recipe.optimizer):
        return "an optimizer given as a callable may mix the stacked models"
    shapes = {tuple((name, value.shape) for name, value in model.state_dict().items()) for model in models}
    if len(shapes) > 1 or len({data.shape[1:] for data in inputs}) > 1:
        return "the models or their inputs differ in shape"
    plans = {(batches_per_epoch(len(data), recipe.batch_size), min(len(data), recipe.batch_size)) for data in inputs}
    if len(plans) > 1:
        return "the data sets differ in their number of batches"
    if any(module.training and _draws_or_tracks(module) for model in models for module in model.modules()):
        return "the model draws random numbers or keeps running statistics"
    return None


def _draws_or_tracks(module: nn.Module) -> bool:
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return dropout or (isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats)


def _call(loss: Objective, hook: str, *args: Any) -> None:
    """Call a hook of :class:`minimand.losses.Loss`; torch's own losses have none."""
    method = getattr(loss, hook, None)
    if method is not None:
        method(*args)


def _parameters(loss: Objective) -> Iterator[nn.Parameter]:
    return loss.parameters() if isinstance(loss, nn.Module) else iter(())


def _context(loss: Objective, **available: Tensor) -> dict[str, Tensor]:
    return {name: available[name] for name in getattr(loss, "needs", ())}


def _is_stateless(loss: Objective) -> bool:
    """Tell whether one copy of the loss can serve all models under vmap: no state, no random numbers."""
    if getattr(loss, "needs", ()) or getattr(loss, "couples_batches", False):
        return False
    modules = list(loss.modules()) if isinstance(loss, nn.Module) else []
    if any(hasattr(module, "generator") for module in modules):
        return False
    return not any(True for module in modules for _ in (*module.parameters(False), *module.buffers(False)))


def _stack_ragged(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors that differ in length; the padding is never drawn."""
    longest = max(len(tensor) for tensor in tensors)
    stacked = tensors[0].new_zeros((len(tensors), longest, *tensors[0].shape[1:]))
    for row, tensor in zip(stacked, tensors, strict=True):
        row[: len(tensor)] = tensor
    return stacked


def _view(model: nn.Module, parameters: dict[str, Tensor], cell: int) -> nn.Module:
    """Copy ``model`` with parameters that are views of its slice of the stack."""
    view = copy.deepcopy(model)
    for name, parameter in view.named_parameters():
        parameter.data = parameters[name].detach()[cell]
    return view


def _clip_each(parameters: Iterable[Tensor], largest: float) -> None:
    """Clip each model's gradient to norm ``largest``, as clip_grad_norm_ does for one."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    scale = (largest / (norms + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient *= scale.reshape(-1, *[1] * (gradient.dim() - 1))
