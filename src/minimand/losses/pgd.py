r"""Projected gradient ascent within a norm ball: the search behind adversarial training and its evaluation.

.. math:: x' \leftarrow \Pi_{B(x)}\big(x' + \eta\, d(\nabla_{x'} f(x'))\big),
          \qquad B(x) = \{x' : \|x' - x\| \le \epsilon\},

with :math:`d` the sign for the maximum norm and division by the norm for the Euclidean one.

Source: Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
ICLR 2018, arXiv 1706.06083; the margin objective: Carlini and Wagner, "Towards Evaluating the Robustness of Neural
Networks", 2017, arXiv 1608.04644.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks

Model = Callable[[Tensor], Tensor]
Norm = Literal["linf", "l2"]


def pgd_attack(
    model: Model,
    inputs: Float[Tensor, "batch *features"],
    target: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    objective: Literal["cross-entropy", "margin"] = "cross-entropy",
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *features"]:
    """Search near each input for one that the model misclassifies.

    The model is read in evaluation mode and left as it was: modes, parameters and their gradients.

    Args:
        model: Maps inputs to scores ``(batch, classes)``.
        inputs: What is attacked.
        target: True classes.
        eps: Radius of the ball, in the inputs' units.
        norm: Of the ball: ``"linf"`` or ``"l2"``.
        steps: Gradient steps a restart; 40 as in Madry et al. for small images.
        step_size: Length of a step. None: 2.5 eps / steps, so that any point can be reached from any other.
        restarts: Random starts in the ball.
        objective: What is climbed: the cross-entropy, or the margin of the best wrong class over the true one, whose
            gradient does not vanish on confident predictions.
        clip: Range of valid inputs, which must hold ``inputs`` already; None for no limits.
        generator: Source of the starts.

    Returns:
        For each input the point met, itself among them, where the wrong class led by most. Detached.

    Raises:
        ValueError: If a setting is out of range, or the inputs are outside ``clip`` or not finite.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> pgd_attack(model, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), eps=0.125)
        tensor([[0.4750, 0.5250]])

    Source:
        Madry et al. 2018, arXiv 1706.06083.
    """
    ball = Ball(eps, norm, clip)
    length = step_length(eps, steps, step_size)
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    checks.one_of(objective, "objective", ("cross-entropy", "margin"))
    ball.check(inputs)
    best = inputs.detach().clone()
    with evaluating(model):
        with torch.no_grad():
            scores = model(inputs)
        checks.class_scores(scores, target)
        best_margin = wrong_margin(scores, target)

        def climb(moved: Tensor) -> Tensor:
            nonlocal best, best_margin
            scores = model(moved)
            margin = wrong_margin(scores, target)
            better = margin.detach() > best_margin
            best_margin = torch.where(better, margin.detach(), best_margin)
            best = torch.where(better.reshape(-1, *[1] * (moved.dim() - 1)), moved.detach(), best)
            return margin if objective == "margin" else F.cross_entropy(scores, target, reduction="none")

        for _ in range(restarts):
            moved = ascend(climb, inputs, ball.draw(inputs, generator), ball=ball, steps=steps, step_size=length)
            with torch.no_grad():
                climb(moved)
    return best


@dataclasses.dataclass(frozen=True)
class Ball:
    """The points within ``eps`` of an input and inside the valid range.

    Args:
        eps: Radius.
        norm: ``"linf"`` or ``"l2"``, over all features of an example.
        clip: Lowest and highest valid value, or None.
    """

    eps: float
    norm: Norm = "linf"
    clip: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        checks.non_negative(self.eps, "eps")
        checks.one_of(self.norm, "norm", ("linf", "l2"))
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be a pair (low, high) with low < high, got {self.clip}")

    def check(self, inputs: Tensor) -> None:
        """Raise unless ``inputs`` is a non-empty batch of finite points of the valid range."""
        checks.floating(inputs, "inputs")
        checks.not_empty(inputs, "inputs")
        if inputs.dim() < 2:
            raise ValueError(f"inputs must have shape (batch, *features), got {tuple(inputs.shape)}")
        checks.finite(inputs.detach(), "inputs")
        if self.clip is not None:
            low, high = self.clip
            checks.require(
                (inputs.detach() >= low) & (inputs.detach() <= high),
                lambda: (
                    f"inputs must lie in clip's range [{low}, {high}], "
                    f"got values from {float(inputs.min())} to {float(inputs.max())}"
                ),
            )

    def draw(self, centre: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a point of each ball, uniformly before clipping."""
        device = centre.device if generator is None else generator.device
        centre = centre.detach()
        if self.norm == "linf":
            noise = 2 * torch.rand(centre.shape, generator=generator, device=device, dtype=centre.dtype) - 1
            return self.project(centre + self.eps * noise.to(centre.device), centre)
        normal = torch.randn(centre.shape, generator=generator, device=device, dtype=centre.dtype)
        share = torch.rand(len(centre), generator=generator, device=device, dtype=centre.dtype)
        # In d dimensions a share r^d of the ball lies within r of its centre.
        radius = share.to(centre.device) ** (1 / centre[0].numel())
        return self.project(
            centre + self.eps * _per_example(radius, centre) * self.direction(normal.to(centre.device)), centre
        )

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the steepest step of length 1."""
        if self.norm == "linf":
            return gradient.sign()
        tiny = torch.finfo(gradient.dtype).tiny
        # Scaled first: squares of gradients below 1e-23 would vanish in float32.
        scaled = gradient / _per_example(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
        return scaled / _per_example(scaled.flatten(1).norm(dim=1).clamp_min(tiny), gradient)

    def project(self, moved: Tensor, centre: Tensor) -> Tensor:
        """Return the nearest points of the balls; clipping after moves no point farther from its centre."""
        if self.norm == "linf":
            moved = torch.clamp(moved, centre - self.eps, centre + self.eps)
        else:
            shift = moved - centre
            length = shift.flatten(1).norm(dim=1)
            shrink = (self.eps / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)
            moved = centre + shift * _per_example(shrink, shift)
        return moved if self.clip is None else moved.clamp(*self.clip)


def ascend(
    climb: Callable[[Tensor], Tensor], centre: Tensor, start: Tensor, *, ball: Ball, steps: int, step_size: float
) -> Tensor:
    """Climb ``climb``, one number an example, by projected gradient steps from ``start``; the end is detached."""
    centre, moved = centre.detach(), start.detach()
    with torch.enable_grad():
        for _ in range(steps):
            moved = moved.requires_grad_()
            # Asked for the inputs alone, autograd neither computes nor stores gradients of the parameters.
            (gradient,) = torch.autograd.grad(climb(moved).sum(), moved)
            moved = ball.project(moved.detach() + step_size * ball.direction(gradient), centre)
    return moved


def step_length(eps: float, steps: int, step_size: float | None) -> float:
    """Return ``step_size``, checked, or 2.5 eps / steps."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if step_size is None:
        return 2.5 * eps / steps
    checks.between(step_size, "step_size", 0.0, math.inf, low_open=True, high_open=True)
    return step_size


def wrong_margin(scores: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Compute by how much the best wrong class leads the true one; above 0 where the model errs."""
    own = scores.gather(1, target[:, None])
    return scores.scatter(1, target[:, None], -math.inf).amax(1) - own[:, 0]


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
