"""From a bag of instances to one vector: what a pool is, and the mean and gated attention, the usual baselines."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .. import checks


def clean_bag(instances: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Check bags ``(batch, instances, dim)`` and return them with zeros at padding, whatever stood there.

    Raises:
        ValueError: If shapes disagree, a bag holds no instance, or an instance is not finite.
    """
    checks.floating(instances, "instances")
    if instances.dim() != 3 or dim not in (None, instances.shape[2]):
        raise ValueError(f"instances must have shape (batch, instances, {dim or 'dim'}), got {tuple(instances.shape)}")
    checks.not_empty(instances, "instances")
    if mask is not None:
        checks.tensor(mask, "mask")
        if mask.dtype != torch.bool or mask.shape != instances.shape[:2]:
            raise ValueError(
                f"mask must hold booleans of shape {tuple(instances.shape[:2])}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        checks.require(
            mask.any(1), lambda: f"bag {int((~mask.any(1)).nonzero()[0, 0])} is empty: its mask is False everywhere"
        )
        instances = torch.where(mask[..., None], instances, 0.0)
    # A sum is finite only if its terms are: one pass, and no array of booleans as large as the bags.
    checks.finite(instances.detach().sum(-1, dtype=torch.promote_types(instances.dtype, torch.float32)), "instances")
    return instances


class InstancePool(nn.Module, abc.ABC):
    r"""A pool: an embedding :math:`\sum_i \alpha_i z_i + w_0` of a bag, with one weight an instance.

    Subclasses say how instances weigh, in ``_weights``, which is given bags with zeros at padding.
    """

    dim: int | None = None

    @abc.abstractmethod
    def _weights(self, instances: Tensor, mask: Tensor | None) -> Tensor:
        """Return the weight of each instance, 0 at padding."""

    @property
    def offset(self) -> Tensor | float:
        """What is added to every entry of the embedding."""
        return 0.0

    def weights(
        self, instances: Float[Tensor, "batch instances dim"], mask: Bool[Tensor, "batch instances"] | None = None
    ) -> Float[Tensor, "batch instances"]:
        """Return the weight of each instance, 0 at padding.

        Args:
            instances: A bag of vectors a row, padded to the longest.
            mask: True for instances, False for padding; None: all are instances.
        """
        return self._weights(clean_bag(instances, mask, self.dim), mask)

    def forward(
        self, instances: Float[Tensor, "batch instances dim"], mask: Bool[Tensor, "batch instances"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch instances"]]:
        """Pool bags.

        Args:
            instances: A bag of vectors a row, padded to the longest.
            mask: True for instances, False for padding; None: all are instances.

        Returns:
            The embeddings ``(batch, dim)``, and the weight of each instance ``(batch, instances)``.

        Raises:
            ValueError: If shapes disagree, a bag holds no instance, or an instance is not finite.
        """
        instances = clean_bag(instances, mask, self.dim)
        weights = self._weights(instances, mask)
        return torch.bmm(weights[:, None], instances)[:, 0] + self.offset, weights


class MeanPool(InstancePool):
    """The mean of a bag's instances.

    Example:
        >>> embedding, weights = MeanPool()(torch.tensor([[[1.0], [3.0], [0.0]]]), torch.tensor([[True, True, False]]))
        >>> embedding, weights
        (tensor([[2.]]), tensor([[0.5000, 0.5000, 0.0000]]))

    Source:
        The baseline of multiple-instance learning; Zaheer et al., "Deep Sets", NeurIPS 2017, arXiv 1703.06114.
    """

    def _weights(self, instances: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return instances.new_full(instances.shape[:2], 1 / instances.shape[1])
        counted = mask.to(instances.dtype)
        return counted / counted.sum(1, keepdim=True)


class AttentionPool(InstancePool):
    r"""Gated attention (ABMIL), an instance's weight learnt from the instance alone.

    Weights are the softmax over the bag of :math:`w^\top (\tanh(V z_i) \odot \sigma(U z_i))`.

    Args:
        dim: Features of an instance.
        hidden: Features of the attention network; 128 in the paper.

    Example:
        >>> pool = AttentionPool(8)
        >>> embedding, weights = pool(torch.randn(2, 100, 8))
        >>> embedding.shape, weights.shape
        (torch.Size([2, 8]), torch.Size([2, 100]))

    Source:
        Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv 1802.04712,
        eq. 9.
    """

    def __init__(self, dim: int, *, hidden: int = 128) -> None:
        super().__init__()
        checks.positive(dim, "dim")
        checks.positive(hidden, "hidden")
        self.dim = dim
        self.content = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1)

    def _weights(self, instances: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.score(torch.tanh(self.content(instances)) * torch.sigmoid(self.gate(instances)))[..., 0]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(1)
