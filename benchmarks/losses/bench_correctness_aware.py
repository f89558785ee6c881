"""Calibrators and the correctness-aware loss against what one would write otherwise."""

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from benchmarks.timing import paired_ratio
from minimand.losses import TemperatureScaling, correctness_aware_loss


def overconfident(rows, classes):
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(rows, classes, generator=generator)
    target = torch.multinomial(torch.softmax(logits / 3, 1), 1, generator=generator)[:, 0]
    return logits, target


def lbfgs_temperature(logits, target):
    """The usual recipe: L-BFGS with autograd on the negative log-likelihood."""
    temperature = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(logits / temperature, target)
        value.backward()
        return value

    optimizer.step(closure)
    return temperature.item()


def scipy_temperature(logits, target):
    found = minimize_scalar(lambda t: float(F.cross_entropy(logits / t, target)), bounds=(0.05, 20), method="bounded")
    return found.x


@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (5000, 100)])
@pytest.mark.parametrize("peer", [lbfgs_temperature, scipy_temperature])
def test_fit_of_one_temperature(record, peer, rows, classes):
    logits, target = overconfident(rows, classes)
    ours = TemperatureScaling().fit(logits, target).temperature
    assert abs(ours / peer(logits, target) - 1) < 1e-2
    ratio = paired_ratio(lambda: TemperatureScaling().fit(logits, target), lambda: peer(logits, target))
    record(f"temperature fit, {rows} x {classes}, vs {peer.__name__}", ratio.median, unit="x", target="<= 1")
    assert ratio.median <= 1


def argmax_of_logits(logits, target):
    """The prediction is the largest logit, as ours is."""
    predicted = logits.detach().argmax(1)
    confidence = torch.softmax(logits, 1).gather(1, predicted[:, None])[:, 0]
    return F.mse_loss(confidence, (predicted == target).float())


def maximum_of_softmax(logits, target):
    """One pass less: the prediction is the largest probability, where rounding may have made two of them equal."""
    confidence, predicted = torch.softmax(logits, 1).max(1)
    return F.mse_loss(confidence, (predicted == target).float())


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize(("peer", "bound"), [(argmax_of_logits, 1.15), (maximum_of_softmax, 1.6)])
def test_loss_step(record, peer, bound, classes):
    logits, target = overconfident(1000, classes)
    logits.requires_grad_()

    def step(loss):
        logits.grad = None
        loss(logits, target).backward()

    ratio = paired_ratio(lambda: step(correctness_aware_loss), lambda: step(peer), inner=20)
    name = f"correctness-aware loss step, 1000 x {classes}, vs mse_loss by {peer.__name__}"
    record(name, ratio.median, unit="x", target=f"<= {bound}")
    assert ratio.median <= bound
