"""A loss, a risk and two constraints that know nothing of each other hold at once, in a plain loop."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from minimand.constraints import Multiplier, SpectralNormalize, constrain, rms_operator_norm
from minimand.losses import ALDRKLLoss
from minimand.risks import CVaR

CAP, CONFIDENCE = 3.0, 0.4


def train(*, capped=True, held=True, steps=250):
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    loss = ALDRKLLoss(num_samples=len(x), reduction=CVaR(level=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if capped:
        constrain(optimizer, SpectralNormalize(CAP))
    multiplier = Multiplier(0.2, damping=2.0)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        scores = model(x[index])
        value = loss(scores, y[index], index=index)
        if held:
            value = value + multiplier(CONFIDENCE - scores.softmax(1).amax(1).mean())
        value.backward()
        optimizer.step()
    with torch.no_grad():
        scores = model(x)
    return {
        "accuracy": (scores.argmax(1) == y).float().mean().item(),
        "confidence": scores.softmax(1).amax(1).mean().item(),
        "norms": [rms_operator_norm(layer.weight.detach()).item() for layer in (model[0], model[2])],
        "multiplier": multiplier.value.item(),
    }


def test_both_constraints_hold_and_the_task_is_learnt():
    found = train()
    assert found["accuracy"] > 0.9
    assert found["confidence"] == pytest.approx(CONFIDENCE, abs=0.03)
    assert found["multiplier"] > 0
    assert max(found["norms"]) <= CAP * 1.01


def test_each_constraint_is_broken_without_its_part():
    assert train(held=False)["confidence"] < CONFIDENCE - 0.1
    assert max(train(capped=False)["norms"]) > CAP * 1.2
