"""What a step of training costs more with EnsLoss than with BCEWithLogitsLoss."""

import torch
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.losses import EnsLoss

BATCH, FEATURES = 128, 200


def network(width):
    torch.manual_seed(0)
    layers = []
    features = FEATURES
    for _ in range(3):
        layers += [nn.Linear(features, width), nn.ReLU(), nn.BatchNorm1d(width)]
        features = width
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))


def training_step(loss, width):
    model = network(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs, target = torch.randn(BATCH, FEATURES), torch.randint(2, (BATCH,)).float()

    def run():
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        optimizer.step()

    return run


def test_a_step_of_the_papers_network(record):
    ratio = paired_ratio(training_step(EnsLoss(), 1024), training_step(nn.BCEWithLogitsLoss(), 1024), rounds=31)
    record("ensloss step, MLP 3 x 1024, batch 128", ratio.median, unit="x", target="<= 1.15")
    assert ratio.median <= 1.15


def test_a_step_of_a_small_network(record):
    ratio = paired_ratio(training_step(EnsLoss(), 128), training_step(nn.BCEWithLogitsLoss(), 128), inner=10)
    record("ensloss step, MLP 3 x 128, batch 128", ratio.median, unit="x", target="<= 1.5")
    assert ratio.median <= 1.5


def test_the_loss_alone(record):
    scores = torch.randn(BATCH).requires_grad_()
    target = torch.randint(2, (BATCH,)).float()

    def run(loss):
        def step():
            scores.grad = None
            loss(scores, target).backward()

        return step

    ratio = paired_ratio(run(EnsLoss()), run(nn.BCEWithLogitsLoss()), inner=50)
    # Two sorts and some thirty small kernels, whatever the network.
    record("ensloss alone, batch 128", ratio.median, unit="x", target="<= 15")
    record("ensloss alone, batch 128, ours", 1e6 * ratio.ours_seconds, unit="us")
    assert ratio.median <= 15
