"""A study of small, real trainings for the tests of the engine."""

import functools

import torch
from torch import nn

from minimand.bench import Claim, Metric, Outcome, Run, Study
from minimand.training import Recipe, fit, fit_many, mlp, seeded


def problem(source, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (64,), generator=generator)
    return torch.randn(64, 6, generator=generator) + target[:, None], target


class Train:
    """Trains one cell, or several at once."""

    def __init__(self, width):
        self.width = width
        self.recipe = Recipe(epochs=12, batch_size=16)

    def __call__(self, data, run: Run) -> Outcome:
        return self.batch([data], [run])[0]

    def batch(self, datas, runs):
        models = [seeded(lambda: mlp(6, 3, hidden=(self.width,)), run.stream("model")) for run in runs]
        losses = [nn.CrossEntropyLoss() for _ in runs]
        inputs, targets = [data[0] for data in datas], [data[1] for data in datas]
        curves = fit_many(
            models, losses, inputs, targets, recipe=self.recipe, seeds=[run.stream("order") for run in runs]
        )
        with torch.no_grad():
            return [
                Outcome({"accuracy": (model(x).argmax(1) == y).float().mean().item()}, {"loss": curve})
                for model, x, y, curve in zip(models, inputs, targets, curves, strict=True)
            ]


class Alone:
    """The same, one cell at a time."""

    def __init__(self, width):
        self.width = width
        self.recipe = Recipe(epochs=12, batch_size=16)

    def __call__(self, data, run: Run) -> Outcome:
        model = seeded(lambda: mlp(6, 3, hidden=(self.width,)), run.stream("model"))
        curve = fit(model, nn.CrossEntropyLoss(), *data, recipe=self.recipe, seed=run.stream("order"))
        with torch.no_grad():
            return Outcome({"accuracy": (model(data[0]).argmax(1) == data[1]).float().mean().item()}, {"loss": curve})


def fail(data, run: Run, *, at: int) -> Outcome:
    if run.seed == at:
        raise ZeroDivisionError("on purpose")
    return Outcome({"accuracy": 0.5})


def study(**changes) -> Study:
    options = {
        "method": "toy",
        "problem": problem,
        "contenders": {"narrow": Train(4), "wide": Train(32), "wider": Train(64)},
        "metrics": (Metric("accuracy", unit="%"),),
        "claims": (Claim("wide", beats="narrow", says="wide beats narrow"),),
        "seeds": 20,
    }
    return Study(**{**options, **changes})


def failing() -> Study:
    return study(contenders={"steady": Train(4), "fails": functools.partial(fail, at=1)}, claims=(), seeds=3)
