r"""Ctrl-U: trust a reward less where two generations of the same condition make it disagree with itself.

A frozen network reads the condition back from a generated image, and its error is the reward loss :math:`l`. Given two
generations it predicts :math:`c_1` and :math:`c_2`; element by element (a pixel, or a whole image),

.. math:: U = s\,D(c_1, c_2), \qquad L = \mathrm{mean}[e^{-U}\, l] + \lambda\,\mathrm{mean}[U],

with :math:`D = KL(softmax(c_2) \| softmax(c_1))` for classes and :math:`|c_1 - c_2|` for maps such as depth or edges.
The gradient runs through :math:`U` in both terms: :math:`\partial L/\partial U = \lambda - e^{-U} l`, so an element is
made consistent where :math:`l < \lambda e^U` and may differ up to :math:`U = \log(l/\lambda)` where its loss is large.

Nothing here knows a diffusion model but :func:`paired_timesteps` and :func:`one_step_x0`, which make the two
generations: one image with one noise at two times, each denoised in a single step.

Source: Zhang, Gao, Jiang, Zhao and Zheng, "Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward
Modeling", ICLR 2025, arXiv 2410.11236; the form of the weight is that of Zheng and Yang 2021, arXiv 2003.03773.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, reduce

Divergence = Literal["kl", "l1"] | Callable[[Tensor, Tensor], Tensor]
PredictionType = Literal["epsilon", "v_prediction"]


class UncertaintyTerms(NamedTuple):
    """The two terms of each example, whose sum is the loss.

    Args:
        reward: Mean over the counted elements of the reward loss times its weight, ``(batch,)``.
        uncertainty: Mean over all elements of the uncertainty, not yet multiplied by its penalty, ``(batch,)``.
    """

    reward: Tensor
    uncertainty: Tensor


class RewardTerms(NamedTuple):
    """What a step of reward fine-tuning adds to the diffusion loss, each a scalar.

    Args:
        loss: What to minimise: the scaled reward term plus the penalty on the uncertainty.
        reward: Mean weighted reward loss inside the window, before it is scaled; detached.
        uncertainty: Mean uncertainty inside the window; detached.
    """

    loss: Tensor
    reward: Tensor
    uncertainty: Tensor


def uncertainty_kl(
    logits1: Float[Tensor, "..."], logits2: Float[Tensor, "..."], *, dim: int = 1
) -> Float[Tensor, "..."]:
    r"""Compute :math:`KL(softmax(c_2) \| softmax(c_1))` of two predictions of classes.

    Args:
        logits1: :math:`c_1`: the prediction that the reward loss is computed from, e.g. ``(batch, classes, *)``.
        logits2: :math:`c_2`: the second prediction, of the same shape.
        dim: The dimension of the classes.

    Returns:
        The divergence, at least 0, in nats, without the dimension of the classes; in float32 for shorter dtypes.

    Raises:
        TypeError: If a prediction is no floating-point tensor.
        ValueError: If the shapes differ or a divergence is not finite.

    Example:
        >>> uncertainty_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.3681])

    Source:
        Zhang et al. 2025, arXiv 2410.11236, equation 2; the order of the arguments is the official code's.
    """
    _check_predictions(logits1, logits2)
    log_p1, log_p2 = (torch.log_softmax(_widened(logits), dim) for logits in (logits1, logits2))
    # Rounding takes the divergence of near-equal predictions below zero.
    divergence = (log_p2.exp() * (log_p2 - log_p1)).sum(dim).clamp_min(0)
    checks.finite(divergence.detach(), "the divergence of logits1 and logits2")
    return divergence


def uncertainty_weighted_loss(
    loss: Float[Tensor, "batch *shape"],
    uncertainty: Float[Tensor, "batch *shape"],
    *,
    mask: Bool[Tensor, "batch *shape"] | None = None,
    detach_weight: bool = False,
) -> UncertaintyTerms:
    r"""Compute the mean of :math:`e^{-U} l` and of :math:`U` over the elements of each example.

    Args:
        loss: The reward loss l of each element: ``(batch, height, width)``, or ``(batch,)`` where an example is one.
        uncertainty: U of each element, at least 0.
        mask: True where an element counts for the reward; U is averaged over all elements. None counts all.
        detach_weight: Whether the weight :math:`e^{-U}` is a constant to the gradient. The paper's is not, so without
            a penalty on U the model could raise U to be rid of the loss.

    Returns:
        The two terms of each example. An example without a counted element has reward 0.

    Raises:
        TypeError: If an input has the wrong dtype.
        ValueError: If shapes differ, the loss was reduced already, a loss is not finite or an uncertainty negative.

    Example:
        >>> terms = uncertainty_weighted_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.6931]]))
        >>> terms.reward, terms.uncertainty
        (tensor([1.2500]), tensor([0.3465]))

    Source:
        Zhang et al. 2025, arXiv 2410.11236, equations 3 and 4.
    """
    checks.floating(loss, "loss")
    checks.floating(uncertainty, "uncertainty")
    if loss.dim() == 0 or loss.shape != uncertainty.shape:
        raise ValueError(
            f"loss must hold one number an element, shape {tuple(uncertainty.shape)} as the uncertainty, got "
            f"{tuple(loss.shape)}: compute it with reduction='none'"
        )
    checks.not_empty(loss, "loss")
    checks.finite(loss.detach(), "loss")
    checks.require(
        (uncertainty.detach() >= 0) & torch.isfinite(uncertainty.detach()),
        lambda: "uncertainty must be at least 0 and finite",
    )
    loss, uncertainty = _widened(loss), _widened(uncertainty)
    weighted = torch.exp(-(uncertainty.detach() if detach_weight else uncertainty)) * loss
    if mask is None:
        return UncertaintyTerms(_example_means(weighted), _example_means(uncertainty))
    checks.tensor(mask, "mask")
    if mask.dtype != torch.bool or mask.shape != loss.shape:
        raise ValueError(
            f"mask must be boolean of shape {tuple(loss.shape)}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    counted = mask.reshape(len(mask), -1).sum(1).clamp_min(1)
    total = torch.where(mask, weighted, torch.zeros_like(weighted)).reshape(len(mask), -1).sum(1)
    return UncertaintyTerms(total / counted, _example_means(uncertainty))


def one_step_x0(
    noisy: Float[Tensor, "batch *shape"],
    prediction: Float[Tensor, "batch *shape"],
    alpha_bar: Float[Tensor, " batch"],
    *,
    prediction_type: PredictionType = "epsilon",
) -> Float[Tensor, "batch *shape"]:
    r"""Compute the clean image that a denoiser's single prediction implies.

    From :math:`x_t = \sqrt{\bar\alpha}\,x_0 + \sqrt{1 - \bar\alpha}\,\epsilon`: for a prediction of the noise
    :math:`(x_t - \sqrt{1 - \bar\alpha}\,\epsilon)/\sqrt{\bar\alpha}`, for one of the velocity
    :math:`\sqrt{\bar\alpha}\,x_t - \sqrt{1 - \bar\alpha}\,v`.

    Args:
        noisy: :math:`x_t`.
        prediction: The denoiser's output, of the same shape.
        alpha_bar: :math:`\bar\alpha_t`, one an example, in (0, 1]: a scheduler's ``alphas_cumprod[timesteps]``.
        prediction_type: ``"epsilon"`` (the paper's) or ``"v_prediction"``.

    Returns:
        The estimate of :math:`x_0`, not clipped.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If shapes differ, a number is not finite, or ``alpha_bar`` is out of range.

    Example:
        >>> one_step_x0(torch.tensor([[1.1]]), torch.tensor([[0.5]]), torch.tensor([0.64]))
        tensor([[1.]])

    Source:
        Ho et al. 2020, arXiv 2006.11239, equation 15; velocity: Salimans and Ho 2022, arXiv 2202.00512.
    """
    checks.one_of(prediction_type, "prediction_type", ("epsilon", "v_prediction"))
    for value, name in ((noisy, "noisy"), (prediction, "prediction"), (alpha_bar, "alpha_bar")):
        checks.floating(value, name)
    for value, name in ((noisy, "noisy"), (prediction, "prediction")):
        checks.finite(value.detach(), name)
    if prediction.shape != noisy.shape:
        raise ValueError(
            f"prediction must have the shape of noisy, {tuple(noisy.shape)}, got {tuple(prediction.shape)}"
        )
    if noisy.dim() == 0 or tuple(alpha_bar.shape) != tuple(noisy.shape[:1]):
        raise ValueError(
            f"alpha_bar must hold one number an example, shape {tuple(noisy.shape[:1])}, got {tuple(alpha_bar.shape)}"
        )
    checks.require((alpha_bar > 0) & (alpha_bar <= 1), lambda: "alpha_bar must lie in (0, 1]")
    each = alpha_bar.reshape(-1, *[1] * (noisy.dim() - 1))
    signal, noise = each.sqrt().to(noisy.dtype), (1 - each).sqrt().to(noisy.dtype)
    if prediction_type == "epsilon":
        return (noisy - noise * prediction) / signal
    return signal * noisy - noise * prediction


def paired_timesteps(
    timesteps: Int[Tensor, " batch"], *, gap: int = 1, num_timesteps: int = 1000
) -> Int[Tensor, " both"]:
    r"""Return the times of both generations: those given, then those ``gap`` later, no later than the last.

    Args:
        timesteps: t, one an example, in [0, num_timesteps).
        gap: How much later the second generation is, at least 0. 1 is the official code's, over which a smooth denoiser
            hardly differs; tens of steps make the uncertainty tell. 0 makes sense only with noise of its own for each.
        num_timesteps: The scheduler's number of training steps; 1000 is the custom.

    Returns:
        ``(2 * batch,)``: t, then :math:`\min(t + gap, T - 1)`, of the same dtype.

    Raises:
        TypeError: If ``timesteps`` is no tensor of integers.
        ValueError: If it is not one-dimensional, a time is out of range or ``gap`` is negative.

    Example:
        >>> paired_timesteps(torch.tensor([10, 980]), gap=50)
        tensor([ 10, 980,  60, 999])

    Source:
        Zhang et al. 2025, arXiv 2410.11236; the gap and its end are the official code's.
    """
    checks.tensor(timesteps, "timesteps")
    if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(f"timesteps must have an integer dtype, got {timesteps.dtype}")
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps must have shape (batch,), got {tuple(timesteps.shape)}")
    if gap < 0:
        raise ValueError(f"gap must be at least 0, got {gap}")
    checks.require(
        (timesteps >= 0) & (timesteps < num_timesteps), lambda: f"timesteps must lie in [0, {num_timesteps - 1}]"
    )
    return torch.cat([timesteps, (timesteps + gap).clamp_max(num_timesteps - 1)])


class UncertaintyWeightedLoss(nn.Module):
    r"""A reward loss weighted by how well two predictions agree, plus a penalty on their disagreement.

    Args:
        divergence: D: ``"kl"`` between softmaxes of logits ``(batch, classes, *)``; ``"l1"`` between maps, element by
            element; or a callable from two predictions to numbers of the loss's shape, at least 0.
        scale: s, at least 0: multiplies the divergence, in the weight and in the penalty alike. 1 is the official
            code's on ADE20K, 0.1 on COCO-Stuff; 1 with ``"l1"``. 0 is the plain loss.
        penalty: lambda, at least 0: the price of uncertainty. 1 is the official code's for classes; 0.1 for ``"l1"``.
            Without it and with ``detach_weight=False`` the model may raise U to be rid of its loss.
        symmetric: Whether each prediction is weighted and penalised in turn and the two averaged, as in the paper;
            the official code has only the first, which costs less.
        detach_weight: Whether the weight is a constant to the gradient.
        reduction: "mean", "sum", "none", or a risk, over examples.

    Example:
        >>> loss = UncertaintyWeightedLoss()
        >>> logits1, logits2 = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> loss(logits1, logits2, torch.tensor([1.0]))  # exp(-0.3681) + 0.3681
        tensor(1.0601)

    Source:
        Zhang et al. 2025, arXiv 2410.11236, equations 2 to 4.
    """

    def __init__(
        self,
        divergence: Divergence = "kl",
        *,
        scale: float = 1.0,
        penalty: float = 1.0,
        symmetric: bool = False,
        detach_weight: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if not callable(divergence):
            checks.one_of(divergence, "divergence", ("kl", "l1"))
        checks.non_negative(scale, "scale")
        checks.non_negative(penalty, "penalty")
        check_reduction(reduction)
        self.divergence = divergence
        self.scale = scale
        self.penalty = penalty
        self.symmetric = symmetric
        self.detach_weight = detach_weight
        self.reduction = reduction

    def forward(
        self,
        prediction1: Float[Tensor, "..."],
        prediction2: Float[Tensor, "..."],
        loss1: Float[Tensor, "batch *shape"],
        loss2: Float[Tensor, "batch *shape"] | None = None,
        *,
        mask: Bool[Tensor, "batch *shape"] | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch.

        Args:
            prediction1: The reward network's prediction from the first generation; gradients flow.
            prediction2: From the second generation of the same conditions.
            loss1: The loss of each element of the first prediction, ``reduction="none"``.
            loss2: The same of the second; asked for where ``symmetric`` is True.
            mask: True where an element counts for the reward; None counts all.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.

        Raises:
            TypeError: If an input is no floating-point tensor.
            ValueError: If shapes differ, a value is not finite, or ``loss2`` is missing or not asked for.
        """
        terms = self.terms(prediction1, prediction2, loss1, loss2, mask=mask)
        return reduce(terms.reward + self.penalty * terms.uncertainty, self.reduction)

    def terms(
        self,
        prediction1: Float[Tensor, "..."],
        prediction2: Float[Tensor, "..."],
        loss1: Float[Tensor, "batch *shape"],
        loss2: Float[Tensor, "batch *shape"] | None = None,
        *,
        mask: Bool[Tensor, "batch *shape"] | None = None,
    ) -> UncertaintyTerms:
        """Compute the two terms of each example apart; takes what ``forward`` takes."""
        if self.symmetric and loss2 is None:
            raise ValueError("loss2 is missing: symmetric=True weighs the losses of both predictions")
        if loss2 is not None and not self.symmetric:
            raise ValueError("loss2 must be None unless symmetric=True: the one-sided form weighs the first loss only")
        first = self._one_sided(prediction1, prediction2, loss1, mask)
        if loss2 is None:
            return first
        second = self._one_sided(prediction2, prediction1, loss2, mask)
        return UncertaintyTerms((first.reward + second.reward) / 2, (first.uncertainty + second.uncertainty) / 2)

    def uncertainty(self, prediction1: Float[Tensor, "..."], prediction2: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Compute U of each element, which may be drawn as a map."""
        _check_predictions(prediction1, prediction2)
        if callable(self.divergence):
            return self.scale * self.divergence(prediction1, prediction2)
        if self.divergence == "kl":
            return self.scale * uncertainty_kl(prediction1, prediction2)
        return self.scale * (_widened(prediction1) - _widened(prediction2)).abs()

    def _one_sided(self, own: Tensor, other: Tensor, loss: Tensor, mask: Tensor | None) -> UncertaintyTerms:
        return uncertainty_weighted_loss(
            loss, self.uncertainty(own, other), mask=mask, detach_weight=self.detach_weight
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return (
            f"{self.divergence!r}, scale={self.scale}, penalty={self.penalty}, symmetric={self.symmetric}, "
            f"detach_weight={self.detach_weight}"
        )


class CtrlUReward(nn.Module):
    r"""The reward side of Ctrl-U: a frozen network, a loss on what it reads, a window of times and a warm-up.

    :math:`g_k\,\mathrm{mean}_{t \in window}[reward] + \lambda\,\mathrm{mean}_{t \in window}[U]` with
    :math:`g_k = g \min(1, k/warmup)` at step k; the caller adds the diffusion loss. The penalty is not warmed up.

    Args:
        network: Maps images ``(2 * batch, ...)`` to predictions. Its parameters are frozen here, and it stays in eval
            mode whatever mode this module is in, since batch statistics would leak between the generations.
        criterion: The loss of each element: ``(predictions, target) -> (batch, *)``, as torch's losses with
            ``reduction="none"``.
        weighting: How the two predictions weigh the loss; None is :class:`UncertaintyWeightedLoss` by default.
        window: First and last time t, both inside, at which an example is rewarded: an image denoised in one step from
            heavy noise tells nothing. (0, 400) is the paper's, (0, 200) its choice on COCO-Stuff.
        reward_scale: g, at least 0. The official code has 0.1 or 0.2 for segmentation, 1 for depth and edges.
        warmup_steps: Steps until the scale is whole, at least 0; 5000 is the official code's for segmentation and
            depth. A step is a call in training mode, and the first has scale 0.

    Attributes:
        step: How many training steps were taken.

    Example:
        >>> objective = CtrlUReward(nn.Identity(), nn.CrossEntropyLoss(reduction="none")).eval()
        >>> images = torch.tensor([[0.0, 0.0], [0.0, 2.0]], requires_grad=True)  # two generations of one condition
        >>> objective(images, torch.tensor([1]), timesteps=torch.tensor([10, 60])).loss
        tensor(0.8272, grad_fn=<AddBackward0>)

    Source:
        Zhang et al. 2025, arXiv 2410.11236; window, scale and warm-up are the official code's, which has them from
        ControlNet++ (Li et al. 2024, arXiv 2404.07987).
    """

    step: Tensor

    def __init__(
        self,
        network: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        weighting: UncertaintyWeightedLoss | None = None,
        window: tuple[int, int] = (0, 400),
        reward_scale: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not callable(criterion):
            raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
        if not 0 <= window[0] <= window[1]:
            raise ValueError(f"window must hold a first and a last time with 0 <= first <= last, got {window}")
        checks.non_negative(reward_scale, "reward_scale")
        checks.non_negative(warmup_steps, "warmup_steps")
        self.network = network.requires_grad_(False).eval()
        self.criterion = criterion
        self.weighting = UncertaintyWeightedLoss() if weighting is None else weighting
        self.window = window
        self.reward_scale = reward_scale
        self.warmup_steps = warmup_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> CtrlUReward:
        """Set the mode of this module; the network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(
        self,
        images: Float[Tensor, "both ..."],
        target: Tensor,
        *,
        timesteps: Int[Tensor, " times"],
        mask: Bool[Tensor, "batch *shape"] | None = None,
    ) -> RewardTerms:
        """Compute what a step adds to the diffusion loss.

        Args:
            images: Two generations a condition, ``(2 * batch, ...)``: all first ones, then all second ones, as the
                network takes them (decoded, clipped and normalised).
            target: The conditions, ``(batch, ...)``, as ``criterion`` takes them.
            timesteps: The times of the first generations, ``(batch,)``, or of both, ``(2 * batch,)``; the window looks
                at the first.
            mask: True where an element counts for the reward; None counts all.

        Returns:
            The loss, and its two terms for the record. All are 0 where no time lies in the window.

        Raises:
            TypeError: If images are no floating-point tensor.
            ValueError: If there are not two images a condition, or the network's predictions or losses are not finite
                or have the wrong shape.
        """
        checks.floating(images, "images")
        checks.not_empty(images, "images")
        batch = len(target)
        if len(images) != 2 * batch:
            raise ValueError(f"images must hold two generations a condition, {2 * batch} in all, got {len(images)}")
        if timesteps.dim() != 1 or len(timesteps) not in (batch, 2 * batch):
            raise ValueError(f"timesteps must have shape ({batch},) or ({2 * batch},), got {tuple(timesteps.shape)}")
        prediction1, prediction2 = self.network(images).chunk(2)
        loss1 = self.criterion(prediction1, target)
        loss2 = self.criterion(prediction2, target) if self.weighting.symmetric else None
        terms = self.weighting.terms(prediction1, prediction2, loss1, loss2, mask=mask)
        first, last = self.window
        inside = ((timesteps[:batch] >= first) & (timesteps[:batch] <= last)).to(terms.reward)
        counted = inside.sum().clamp_min(1)
        reward, uncertainty = ((inside * term).sum() / counted for term in terms)
        scale: float | Tensor = self.reward_scale
        if self.warmup_steps:
            scale = scale * (self.step / self.warmup_steps).clamp_max(1)
        if self.training:
            self.step += 1
        return RewardTerms(scale * reward + self.weighting.penalty * uncertainty, reward.detach(), uncertainty.detach())

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"window={self.window}, reward_scale={self.reward_scale}, warmup_steps={self.warmup_steps}"


def _check_predictions(prediction1: Tensor, prediction2: Tensor) -> None:
    checks.floating(prediction1, "prediction1")
    checks.floating(prediction2, "prediction2")
    if prediction1.shape != prediction2.shape:
        raise ValueError(
            f"both predictions must have one shape, got {tuple(prediction1.shape)} and {tuple(prediction2.shape)}"
        )
    checks.not_empty(prediction1, "prediction1")


def _widened(tensor: Tensor) -> Tensor:
    """Return float32 for shorter dtypes: their exponentials overflow and their small differences vanish."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _example_means(elements: Tensor) -> Tensor:
    return elements.reshape(len(elements), -1).mean(1)
