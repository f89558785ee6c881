"""The plain loop against torch by hand, and the stacked loop against the plain one."""

import copy

import pytest
import torch
from torch import nn

from minimand import losses, training
from minimand.training import Recipe, fit, fit_many


def data(seed, samples=150, features=12, classes=4):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    target = torch.randint(classes, (samples,), generator=generator)
    return centres[target] + torch.randn(samples, features, generator=generator), target


def model(seed):
    return training.seeded(lambda: training.mlp(12, 4, hidden=(16, 16)), seed)


def test_fit_takes_the_steps_of_a_loop_written_by_hand():
    inputs, target = data(0)
    recipe = Recipe(epochs=3, batch_size=50, lr=0.1, weight_decay=0.01, optimizer="sgd", schedule="cosine")
    ours, theirs = model(1), model(1)
    fit(ours, nn.CrossEntropyLoss(), inputs, target, recipe=recipe, seed=5)
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for _ in range(3):
        for index in torch.randperm(150, generator=generator).reshape(3, 50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(inputs[index]), target[index]).backward()
            optimizer.step()
            schedule.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss,
    "ldr-kl": lambda: losses.LDRKLLoss(2.0, normalize="l1"),
    "aldr-kl": lambda: losses.ALDRKLLoss(temperature=2.0),
    "saf": lambda: losses.SAFLoss(lag=1, after_epoch=1, strength=1.0),
    "mesa": lambda: losses.MESALoss(decay=0.8),
    "weighted": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "recipe",
    [Recipe(epochs=4, batch_size=32), Recipe(epochs=4, batch_size=32, optimizer="sgd", lr=0.05, clip_norm=0.5)],
)
def test_models_trained_together_equal_models_trained_alone(name, recipe):
    sets = [data(seed, samples=150 + seed) for seed in range(4)]
    alone, together = [model(seed) for seed in range(4)], [model(seed) for seed in range(4)]
    curves = [
        fit(net, LOSSES[name](), *pair, recipe=recipe, seed=10 + seed)
        for seed, (net, pair) in enumerate(zip(alone, sets, strict=True))
    ]
    stacked = fit_many(
        together,
        [LOSSES[name]() for _ in range(4)],
        [inputs for inputs, _ in sets],
        [target for _, target in sets],
        recipe=recipe,
        seeds=[10, 11, 12, 13],
    )
    for one, many in zip(alone, together, strict=True):
        for a, b in zip(one.parameters(), many.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(curves), torch.tensor(stacked), rtol=0, atol=1e-5)


def test_a_loss_with_parameters_of_its_own_is_trained_with_the_model():
    class Scaled(losses.Loss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input, target):
            return nn.functional.cross_entropy(input * self.scale, target)

    inputs, target = data(0)
    loss = Scaled()
    fit(model(0), loss, inputs, target, recipe=Recipe(epochs=2))
    assert loss.scale.item() != 1.0
    pair = [Scaled(), Scaled()]
    fit_many([model(0), model(1)], pair, [inputs] * 2, [target] * 2, recipe=Recipe(epochs=2), seeds=[0, 1])
    assert pair[0].scale.item() == pytest.approx(loss.scale.item(), abs=1e-5)
    assert pair[0].scale.item() != pair[1].scale.item()


def test_after_epoch_stops_training():
    inputs, target = data(0)
    history = fit(
        model(0), nn.CrossEntropyLoss(), inputs, target, recipe=Recipe(epochs=9), after_epoch=lambda e, _: e == 2
    )
    assert len(history) == 3


def test_a_model_that_draws_random_numbers_is_not_stacked():
    net = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    inputs, target = data(0)
    with pytest.raises(ValueError, match="random numbers"):
        fit_many(
            [net, copy.deepcopy(net)],
            [nn.CrossEntropyLoss()] * 2,
            [inputs] * 2,
            [target] * 2,
            recipe=Recipe(epochs=1),
            seeds=[0, 1],
        )


def test_data_sets_with_different_numbers_of_batches_are_not_stacked():
    small, large = data(0, samples=60), data(1, samples=200)
    assert "batches" in training.can_stack([model(0), model(1)], [small[0], large[0]], Recipe(batch_size=32))


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    fit(model(0), nn.CrossEntropyLoss(), *data(0), recipe=Recipe(epochs=1))
    assert torch.equal(torch.rand(1), expected)
