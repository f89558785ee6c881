"""A first layer of a bandit's network with weights of its own for each action."""

import math

import pytest
import torch
from torch import nn

from minimand.online import DisjointLinear, NeuralCB


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_the_context_placed_in_the_block_of_the_action(bias):
    torch.manual_seed(0)
    layer = DisjointLinear(4, 5, num_actions=3, bias=bias).double()
    contexts = torch.randn(6, 4, dtype=torch.float64)
    augmented = torch.cat([contexts, torch.ones(6, 1, dtype=torch.float64)], 1) if bias else contexts
    placed = torch.stack([torch.kron(torch.eye(3).double()[a], augmented) for a in range(3)], 1)
    blocks = [torch.cat([layer.weight[a], layer.bias[a, :, None]], 1) if bias else layer.weight[a] for a in range(3)]
    dense = nn.Linear(placed.shape[-1], 5, bias=False).double()
    with torch.no_grad():
        dense.weight.copy_(torch.cat(blocks, 1))
    assert torch.allclose(layer(contexts), dense(placed), atol=1e-14)
    pull = torch.randn(6, 3, 5, dtype=torch.float64)
    (layer(contexts) * pull).sum().backward()
    (dense(placed) * pull).sum().backward()
    for a, block in enumerate(dense.weight.grad.chunk(3, 1)):
        assert torch.allclose(block[:, :4], layer.weight.grad[a], atol=1e-13)
        assert not bias or torch.allclose(block[:, 4], layer.bias.grad[a], atol=1e-13)


def test_weights_start_as_those_of_a_linear_layer_of_one_context():
    torch.manual_seed(0)
    layer = DisjointLinear(16, 50, num_actions=10)
    bound = 1 / math.sqrt(16)
    for values in (layer.weight, layer.bias):
        assert values.abs().max() <= bound
        assert float(values.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_learning_of_one_action_leaves_the_first_layer_of_others_alone():
    torch.manual_seed(0)
    network = nn.Sequential(DisjointLinear(4, 5, num_actions=3), nn.Tanh(), nn.Linear(5, 1))
    before = network[0].weight.detach().clone()
    NeuralCB(network, lr=1.0).update(torch.ones(1, 4), torch.tensor([1]), torch.ones(1))
    assert ((network[0].weight - before).abs().sum((1, 2)) > 0).tolist() == [False, True, False]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DisjointLinear(0, 5, num_actions=3), "must be at least 1"),
        (lambda: DisjointLinear(4, 0, num_actions=3), "must be at least 1"),
        (lambda: DisjointLinear(4, 5, num_actions=1), "num_actions must be at least 2"),
        (lambda: DisjointLinear(4, 5, num_actions=3)(torch.rand(2, 3)), "contexts must have 4 features"),
        (lambda: DisjointLinear(4, 5, num_actions=3)(torch.full((1, 4), math.nan)), "contexts contains NaN"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
