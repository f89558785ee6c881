"""What temperatures cost: TempNet's two losses against cross-entropy and InfoNCE, alone and in a training step.

The models are tiny, a feed-forward block or an encoder of 1.6 million parameters, so the shares are upper bounds.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.losses import RobustTemperatureLoss, TempNet, TempNetContrastiveLoss, robust_temperature_loss

TOKENS, WIDTH, VOCABULARY = 512, 512, 8_000
PAIRS, EMBEDDING = 256, 256


def step(modules, value):
    """Run one forward and backward pass."""
    for module in modules:
        module.zero_grad(set_to_none=True)
    value().backward()


def language_model():
    """Build the top of a small language model: one feed-forward block, and the output layer apart."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    return block, nn.Linear(WIDTH, VOCABULARY)


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, EMBEDDING))


def test_robust_loss_alone_costs_about_a_temperature_scaled_cross_entropy(record):
    scores = torch.randn(TOKENS, VOCABULARY, requires_grad=True)
    target = torch.randint(VOCABULARY, (TOKENS,))
    temperature = torch.rand(TOKENS).add_(0.5).requires_grad_()

    def ours():
        robust_temperature_loss(scores, target, temperature=temperature, radius=6.0).backward()

    def scaled():
        (temperature * F.cross_entropy(scores / temperature[:, None], target, reduction="none")).mean().backward()

    def plain():
        F.cross_entropy(scores, target).backward()

    ratio = paired_ratio(ours, scaled)
    record("robust loss over cross-entropy at learnt temperatures", ratio.median, unit="x", target="<= 1.1")
    record("robust loss over plain cross-entropy", paired_ratio(ours, plain).median, unit="x")
    assert ratio.median <= 1.1


@pytest.mark.parametrize(("reads", "target"), [("hidden states", 1.4), ("scores", 2.0)])
def test_a_language_model_step_stays_near_one_with_cross_entropy(record, reads, target):
    block, head = language_model()
    tokens, labels = torch.randn(TOKENS, WIDTH), torch.randint(VOCABULARY, (TOKENS,))
    if reads == "scores":
        loss = RobustTemperatureLoss.for_classes(VOCABULARY)
    else:
        loss = RobustTemperatureLoss(TempNet(WIDTH), radius=6.0)

    def robust():
        hidden = block(tokens)
        return loss(head(hidden), labels, None if reads == "scores" else hidden)

    def plain():
        return F.cross_entropy(head(block(tokens)), labels)

    modules = (block, head, loss)
    ratio = paired_ratio(functools.partial(step, modules, robust), functools.partial(step, modules, plain))
    record(f"step with TempNet on {reads} over cross-entropy", ratio.median, unit="x", target=f"<= {target}")
    assert ratio.median <= target


def test_a_contrastive_step_stays_near_one_with_infonce(record):
    encoders = encoder(), encoder()
    images, texts = torch.randn(PAIRS, 512), torch.randn(PAIRS, 512)
    index = torch.arange(PAIRS)
    loss = TempNetContrastiveLoss(10_000, EMBEDDING)

    def robust():
        out = loss(encoders[0](images), encoders[1](texts), index=index)
        return out.loss + out.temperature_loss

    def infonce():
        image, text = (F.normalize(net(x), dim=1) for net, x in zip(encoders, (images, texts), strict=True))
        scores = image @ text.T / 0.05
        return F.cross_entropy(scores, index) + F.cross_entropy(scores.T, index)

    modules = (*encoders, loss)
    ratio = paired_ratio(functools.partial(step, modules, robust), functools.partial(step, modules, infonce))
    record("contrastive step with TempNet over InfoNCE", ratio.median, unit="x", target="<= 1.4")
    assert ratio.median <= 1.4
