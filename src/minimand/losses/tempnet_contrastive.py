r"""TempNet's contrastive loss: iSogCLR whose temperatures two networks predict, one for images and one for texts.

For anchor :math:`i` with gaps :math:`D_{ij} = S_{ij} - S_{ii}` to the negatives of the whole data set, the robust loss
is :math:`\tau_i \log mean_j\,e^{D_{ij}/\tau_i} + \rho\tau_i`. A batch shows only a few of the negatives, so each
example keeps a moving average :math:`s_i` of its sum :math:`g_i = \sum_{j \ne i} e^{D_{ij}/\tau_i}` over the batches:

.. math:: s_i \leftarrow (1 - \gamma)\,s_i + \gamma\,g_i , \qquad w_{ij} = e^{D_{ij}/\tau_i} / s_i .

The gradient of :math:`mean_i \sum_j w_{ij} D_{ij}` with :math:`w` held still trains the encoders, that of
:math:`mean_i \tau_i\,(\log \frac{s_i}{B - 1} + \rho - \sum_j w_{ij} D_{ij}/\tau_i)` with the bracket held still trains
the networks; images as anchors and texts as anchors are added.

Source: Qiu, Guo, Xu, Zhao, Zhang and Yang, "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
via DRO", ICML 2024, arXiv 2404.04575.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .tempnet import TempNet, at_least_float32


class ContrastiveOut(NamedTuple):
    """What :class:`TempNetContrastiveLoss` returns.

    Attributes:
        loss: Its gradient trains the encoders; its value is a surrogate, no objective.
        temperature_loss: Its gradient trains the temperature networks.
        image_temperature: Temperature of each image as anchor, without gradient.
        text_temperature: Temperature of each text as anchor, without gradient.
    """

    loss: Float[Tensor, ""]
    temperature_loss: Float[Tensor, ""]
    image_temperature: Float[Tensor, " batch"]
    text_temperature: Float[Tensor, " batch"]


class TempNetContrastiveLoss(nn.Module):
    """Contrast paired embeddings with a predicted temperature for each image and each text.

    Backpropagate ``out.loss + out.temperature_loss``: the first has no gradient in the networks, the second none in the
    encoders. The networks' parameters are this module's; the official run trains them with AdamW at ``3e-5`` where
    the encoders have ``8e-4``. The moving averages are kept as logarithms, one buffer a direction, which says the same
    as the official pair of a scaled sum and its running maximum and needs no clamp. An example is started at its
    first batch, in whatever epoch. Evaluation mode leaves the averages alone.

    Args:
        num_samples: Size of the training set.
        features: Width of the embeddings.
        radius: The paper's rho, in nats: 7 in the official run script. Above the logarithm of the negatives in a
            batch it drives temperatures to their lower edge; warns from ``log(num_samples - 1)``.
        momentum: The paper's gamma, in (0, 1]: weight of the newest batch, as in torch's batch normalisation. 0.8 in
            the official run script; 1 keeps no memory.
        temperature_min: Lower edge of the temperatures; official.
        temperature_max: Upper edge of the temperatures; official.
        prototypes: The paper's M; official.
        dropout: Of the networks; official.

    Example:
        >>> contrast = TempNetContrastiveLoss(100, 8, radius=2.0)
        >>> out = contrast(torch.randn(4, 8), torch.randn(4, 8), index=torch.arange(4))
        >>> out.image_temperature.shape
        torch.Size([4])

    Source:
        Qiu et al. 2024, arXiv 2404.04575, and its official code's running update.
    """

    image_log_sum: Tensor
    text_log_sum: Tensor

    def __init__(
        self,
        num_samples: int,
        features: int,
        *,
        radius: float = 7.0,
        momentum: float = 0.8,
        temperature_min: float = 0.005,
        temperature_max: float = 0.05,
        prototypes: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        checks.non_negative(radius, "radius")
        checks.between(momentum, "momentum", 0.0, 1.0, low_open=True)
        if not 0 < radius < math.log(max(num_samples - 1, 2)):
            warnings.warn(
                f"radius {radius:g} is outside (0, log {num_samples - 1} = {math.log(num_samples - 1):.4g}), so every "
                f"temperature ends at {'temperature_max' if radius == 0 else 'temperature_min'}",
                stacklevel=2,
            )
        self.radius = radius
        self.momentum = momentum

        def net() -> TempNet:
            return TempNet(
                features,
                kind="prototype",
                hidden=prototypes,
                temperature_min=temperature_min,
                temperature_max=temperature_max,
                dropout=dropout,
            )

        self.image_net = net()
        self.text_net = net()
        # -inf, the logarithm of an empty sum, marks an example that has not been seen.
        self.register_buffer("image_log_sum", torch.full((num_samples,), -math.inf))
        self.register_buffer("text_log_sum", torch.full((num_samples,), -math.inf))

    def forward(
        self,
        images: Float[Tensor, "batch features"],
        texts: Float[Tensor, "batch features"],
        *,
        index: Int[Tensor, " batch"],
    ) -> ContrastiveOut:
        """Compute the losses of a batch of pairs.

        Args:
            images: Embeddings ``(batch, features)``; they are scaled to norm 1 here.
            texts: The embeddings paired with them.
            index: Places of the pairs in the training set; no pair twice.

        Returns:
            The two losses and the temperatures; see :class:`ContrastiveOut`.

        Raises:
            ValueError: If shapes differ, the batch has fewer than two pairs, or the index is out of range.
        """
        for name, value in (("images", images), ("texts", texts)):
            checks.floating(value, name)
            checks.finite(value.detach(), name)
        if images.dim() != 2 or images.shape != texts.shape:
            raise ValueError(
                f"images and texts must share one shape (batch, features), got {tuple(images.shape)} "
                f"and {tuple(texts.shape)}"
            )
        if len(images) < 2:
            raise ValueError(f"a batch needs at least 2 pairs to contrast, got {len(images)}")
        checks.index_of_examples(index, len(images), len(self.image_log_sum))
        dtype = torch.promote_types(images.dtype, torch.float32)  # differences are divided by as little as 0.005
        # Autocast would send the similarities to the lower precision again.
        with torch.autocast(images.device.type, enabled=False):
            images, texts = F.normalize(images.to(dtype), dim=1), F.normalize(texts.to(dtype), dim=1)
            image_temperature = self.image_net(images.detach())
            text_temperature = self.text_net(texts.detach())
            similarity = images @ texts.T
            by_image = self._direction(similarity, image_temperature, self.image_log_sum, index)
            by_text = self._direction(similarity.T, text_temperature, self.text_log_sum, index)
        return ContrastiveOut(
            by_image[0] + by_text[0],
            by_image[1] + by_text[1],
            image_temperature.detach(),
            text_temperature.detach(),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(at_least_float32(fn), recurse)  # log sums of bfloat16 would be 3 % off

    def _direction(
        self, similarity: Tensor, temperature: Tensor, log_sums: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute both losses with the rows of ``similarity`` as anchors, and move ``log_sums``."""
        batch = len(similarity)
        own = torch.eye(batch, dtype=torch.bool, device=similarity.device)
        with torch.no_grad():
            exponents = (similarity - similarity.diagonal()[:, None]) / temperature[:, None]
            log_sum = torch.logsumexp(exponents.masked_fill(own, -math.inf), dim=1)
            old = log_sums[index].to(log_sum.dtype)
            memory = math.log1p(-self.momentum) if self.momentum < 1 else -math.inf
            moved = torch.logaddexp(old + memory, log_sum + math.log(self.momentum))
            log_sum = torch.where(torch.isinf(old), log_sum, moved)
            if self.training:
                log_sums[index] = log_sum.to(log_sums.dtype)
            weights = torch.exp(exponents - log_sum[:, None]).masked_fill_(own, 0.0)
            slope = log_sum - math.log(batch - 1) + self.radius - (weights * exponents).sum(1)
            # sum_j w_ij (S_ij - S_ii) as one product with S, so that the gaps need no backward of their own.
            weights -= torch.diag(weights.sum(1))
        return (weights * similarity).sum() / batch, (temperature * slope.to(temperature.dtype)).mean()
