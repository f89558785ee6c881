"""Generalization measures against closed forms, invariances, and the definitions written plainly."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from minimand.bounds import (
    generalization_measures,
    margin_quantile,
    noise_tolerance,
    path_norm,
    sharpness,
    twin_audit,
)
from minimand.bounds.generalization_measures import MEASURES
from minimand.bounds.weight_matrices import fold
from minimand.stopping import Stop
from minimand.training import seeded

F64 = torch.float64


def mlp(*widths, bias=True, seed=0):
    layers = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside, bias=bias), nn.ReLU()]
    return seeded(lambda: nn.Sequential(*layers[:-1]).double(), seed).eval()


def separated(model, size=(40, 3), seed=0):
    """Inputs, and the labels the model itself gives: no training error, positive margins."""
    inputs = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    with torch.no_grad():
        return inputs, model(inputs).argmax(1)


def start_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=F64)
        for name, value in model.state_dict().items()
    }


class ConvNet(nn.Module):
    def __init__(self, norms=True, bias=False):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(4) if norms else nn.Identity()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.other_norm = nn.BatchNorm2d(4, affine=False) if norms else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(x + F.relu(self.other_norm(self.second(x))), 2)
        return self.head(x.mean((2, 3)))


def conv_net(**options):
    model = seeded(lambda: ConvNet(**options).double(), 0)
    images = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    if options.get("norms", True):
        for module in (model.norm, model.other_norm):
            module.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            module.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
        nn.init.uniform_(model.norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(4))
        nn.init.normal_(model.norm.bias, generator=torch.Generator().manual_seed(5))
    return model.eval(), images


def test_every_measure_is_what_its_formula_says():
    model = mlp(3, 7, 5, 4)
    inputs, target = separated(model)
    start = start_of(model)
    found = generalization_measures(model, inputs, target, initial_state=start)
    assert list(found) == list(MEASURES)
    weights = [value for name, value in model.state_dict().items() if name.endswith("weight")]
    moved = [value - start[name] for name, value in model.state_dict().items() if name.endswith("weight")]
    spectral = [torch.linalg.svdvals(weight)[0].item() ** 2 for weight in weights]
    frobenius = [weight.norm().item() ** 2 for weight in weights]
    frobenius_moved = [weight.norm().item() ** 2 for weight in moved]
    scores = model(inputs)
    margins = []
    for row, label in zip(scores, target, strict=True):
        others = [row[k].item() for k in range(4) if k != label]
        margins.append(row[label].item() - max(others))
    margin = sorted(margins)[3]  # the fourth of forty
    product = sum(map(math.log, spectral))
    frobenius_product = sum(map(math.log, frobenius))
    ratio = sum(f / s for f, s in zip(frobenius, spectral, strict=True))
    seed = torch.Generator().manual_seed(0)
    noise = noise_tolerance(model, inputs, target, generator=seed).sigma
    seed = torch.Generator().manual_seed(0)
    magnitude = noise_tolerance(model, inputs, target, generator=seed, magnitude_epsilon=1e-3).sigma
    count = sum(weight.numel() for weight in weights)

    def magnitude_bound(squares):
        total = 0.0
        for change in torch.cat([weight.flatten() for weight in moved]).tolist():
            above = 1e-6 + (magnitude**2 + 1) * squares / count
            total += math.log(above / (1e-6 + magnitude**2 * change**2))
        return total / 4 + math.log(40 / magnitude) + 10

    squared = copy.deepcopy(model)
    for parameter in squared.parameters():
        parameter.data.square_()
    paths = squared(torch.ones(1, 3, dtype=F64)).sum().item()
    expected = {
        "parameter_count": count,
        "l2_norm": math.sqrt(sum(frobenius)),
        "l2_distance": math.sqrt(sum(frobenius_moved)),
        "parameter_norm": sum(frobenius),
        "frobenius_distance": sum(frobenius_moved),
        "spectral_distance": sum(torch.linalg.svdvals(weight)[0].item() ** 2 for weight in moved),
        "inverse_margin": margin**-2,
        "log_spectral_product": product,
        "log_spectral_product_over_margin": product - 2 * math.log(margin),
        "log_spectral_sum": math.log(3) + product / 3,
        "log_spectral_sum_over_margin": math.log(3) + (product - 2 * math.log(margin)) / 3,
        "frobenius_over_spectral": ratio,
        "log_spectral_main": product - 2 * math.log(margin) + math.log(ratio),
        "log_spectral_main_distance": product
        - 2 * math.log(margin)
        + math.log(sum(f / s for f, s in zip(frobenius_moved, spectral, strict=True))),
        "log_frobenius_product": frobenius_product,
        "log_frobenius_product_over_margin": frobenius_product - 2 * math.log(margin),
        "log_frobenius_sum": math.log(3) + frobenius_product / 3,
        "log_frobenius_sum_over_margin": math.log(3) + (frobenius_product - 2 * math.log(margin)) / 3,
        "path_norm": paths,
        "path_norm_over_margin": paths / margin**2,
        "sharpness": sharpness(model, F.cross_entropy, (inputs, target), radius=0.05),
        "inverse_noise": noise**-2,
        "pac_bayes_norm": sum(frobenius) / (4 * noise**2) + math.log(40 / noise) + 10,
        "pac_bayes_distance": sum(frobenius_moved) / (4 * noise**2) + math.log(40 / noise) + 10,
        "inverse_magnitude_noise": magnitude**-2,
        "pac_bayes_magnitude_norm": magnitude_bound(sum(frobenius)),
        "pac_bayes_magnitude_distance": magnitude_bound(sum(frobenius_moved)),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-10)
    scaled = generalization_measures(model, inputs, target, initial_state=start, scaled=True)
    for name, value in scaled.items():
        ranked = 0.5 * (expected[name] - math.log(40)) if name.startswith("log_") else math.sqrt(expected[name] / 40)
        assert value.item() == pytest.approx(ranked, rel=1e-10), name


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
def test_the_path_norm_of_two_layers_is_ones_w2_squared_w1_squared_ones(inside, hidden, outside, seed):
    model = mlp(inside, hidden, outside, bias=False, seed=seed)
    first, second = model[0].weight, model[2].weight
    closed = (second.square() @ first.square()).sum()
    torch.testing.assert_close(path_norm(model, torch.zeros(1, inside, dtype=F64)), closed, rtol=1e-12, atol=0)


def test_the_path_norm_of_a_residual_net_sums_the_paths_of_both_branches():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return self.outer(x + torch.relu(self.inner(x)))

    model = seeded(lambda: Residual().double(), 0).eval()
    inner, outer = model.inner.weight.square(), model.outer.weight.square()
    closed = outer.sum() + (outer @ inner).sum()
    torch.testing.assert_close(path_norm(model, torch.zeros(1, 2, dtype=F64)), closed)


def test_the_spectral_norm_of_a_diagonal_is_its_largest_entry():
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double().eval()
    model[0].weight.data = torch.diag(torch.tensor([1.0, -7.0, 2.0], dtype=F64))
    inputs = torch.eye(3, dtype=F64)
    found = generalization_measures(model, inputs, torch.tensor([0, 2, 2]), names=["log_spectral_product"])
    assert found["log_spectral_product"].item() == pytest.approx(math.log(49), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9), st.integers(0, 10_000))
def test_frobenius_norms_exceed_spectral_ones_by_at_most_the_rank(inside, hidden, outside, seed):
    model = mlp(inside, hidden, outside, seed=seed)
    inputs, target = separated(model, (8, inside))
    found = generalization_measures(
        model,
        inputs,
        target,
        names=["log_frobenius_product", "log_spectral_product", "frobenius_over_spectral"],
    )
    assert found["log_frobenius_product"] >= found["log_spectral_product"] - 1e-9
    ranks = min(inside, hidden) + min(hidden, outside)
    assert 2 - 1e-9 <= found["frobenius_over_spectral"].item() <= ranks + 1e-9


def test_rescaling_relu_layers_leaves_the_function_margin_path_norm_and_product_of_spectral_norms():
    model = mlp(3, 8, 4, bias=False)
    inputs, target = separated(model)
    rescaled = copy.deepcopy(model)
    rescaled[0].weight.data *= 5
    rescaled[2].weight.data /= 5
    torch.testing.assert_close(model(inputs), rescaled(inputs), rtol=1e-12, atol=1e-12)
    before, after = (generalization_measures(one, inputs, target) for one in (model, rescaled))
    same = [
        *("inverse_margin", "log_spectral_product", "log_spectral_product_over_margin", "frobenius_over_spectral"),
        *("log_spectral_main", "log_frobenius_product", "log_spectral_sum", "path_norm", "path_norm_over_margin"),
    ]
    for name in same:
        assert before[name].item() == pytest.approx(after[name].item(), rel=1e-10), name
    for name in ("l2_norm", "parameter_norm", "sharpness", "inverse_noise", "pac_bayes_norm"):
        assert before[name].item() != pytest.approx(after[name].item(), rel=1e-3), name


def test_a_convolution_counts_as_the_matrix_of_its_output_channels():
    model, images = conv_net(norms=False, bias=True)
    target = model(images).argmax(1)
    found = generalization_measures(model, images, target, names=["log_spectral_product", "parameter_count"])
    matrices = [model.first.weight.reshape(4, 18), model.second.weight.reshape(4, 36), model.head.weight]
    expected = sum(2 * torch.linalg.matrix_norm(matrix, 2).log() for matrix in matrices)
    torch.testing.assert_close(found["log_spectral_product"], expected)
    assert found["parameter_count"] == 4 * 18 + 4 * 36 + 12


@pytest.mark.parametrize("bias", [True, False])
def test_folding_batch_norm_leaves_the_function_and_takes_its_scale_into_the_weights(bias):
    model, images = conv_net(bias=bias)
    network = fold(model)
    torch.testing.assert_close(network(images), model(images), rtol=1e-12, atol=1e-12)
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    torch.testing.assert_close(network.matrices[0], scale[:, None] * model.first.weight.flatten(1))
    before = generalization_measures(model, images, model(images).argmax(1))
    model.norm.weight.data *= 3
    model.norm.bias.data *= 3  # the branch is now three times as large
    after = generalization_measures(model, images, model(images).argmax(1), names=["log_spectral_product"])
    assert after["log_spectral_product"].item() == pytest.approx(
        before["log_spectral_product"].item() + 2 * math.log(3)
    )


def test_the_start_is_folded_with_its_own_statistics():
    model, images = conv_net()
    start = copy.deepcopy(model.state_dict())
    model.norm.running_var.mul_(4)
    found = generalization_measures(
        model, images, model(images).argmax(1), initial_state=start, names=["frobenius_distance"]
    )
    before = fold(model, start).matrices[0]
    torch.testing.assert_close(found["frobenius_distance"], (fold(model).matrices[0] - before).square().sum())
    assert found["frobenius_distance"] > 0


@pytest.mark.parametrize(
    "name", [name for name in MEASURES if not name.startswith(("pac_", "inverse_n", "inverse_mag", "sharp", "param"))]
)
def test_a_measure_without_noise_is_differentiable(name):
    model = mlp(3, 6, 3)
    inputs, target = separated(model, (20, 3))
    start = start_of(model)

    def value(*weights):
        names = [key for key, _ in model.named_parameters()]
        moved = copy.deepcopy(model)
        for key, weight in zip(names, weights, strict=True):
            owner, _, leaf = key.rpartition(".")
            module = moved.get_submodule(owner)
            delattr(module, leaf)
            module.register_parameter(leaf, None)
            setattr(module, leaf, None)
            module._parameters[leaf] = weight
        return generalization_measures(moved, inputs, target, initial_state=start, names=[name])[name]

    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    assert torch.autograd.gradcheck(value, weights)


def test_a_penalty_on_the_spectral_product_trains_it_down():
    torch.manual_seed(0)  # a start whose product is low already has little to lose
    model = mlp(3, 8, 3)
    inputs, target = separated(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(20):
        penalty = generalization_measures(model, inputs, target, names=["log_spectral_product"])["log_spectral_product"]
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        values.append(penalty.item())
    assert values[-1] < values[0] - 0.5


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_noise_borne_by_a_sign_has_a_closed_form(weight):
    """With scores 0 and w x the sign turns when w + s z < 0: a drop of Phi(-w / s)."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False)).double().eval()
    model[0].weight.data = torch.tensor([[-weight / 2], [weight / 2]], dtype=F64)
    inputs = torch.tensor([[-2.0], [-1.0], [1.0], [3.0]], dtype=F64)
    found = noise_tolerance(
        model,
        inputs,
        torch.tensor([0, 0, 1, 1]),
        num_samples=20_000,
        tolerance=1e-3,
        max_iter=40,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.status is Stop.CONVERGED
    # The difference of the two weights gets noise of standard deviation sqrt(2) s.
    closed = norm.cdf(-weight / (math.sqrt(2) * found.sigma))
    assert closed == pytest.approx(0.1, abs=0.008)
    assert found.drop == pytest.approx(closed, abs=0.008)


def test_noise_in_proportion_to_magnitudes_does_not_see_the_scale_of_the_weights():
    inputs = torch.tensor([[-2.0], [1.0]], dtype=F64)
    found = []
    for weight in (1.0, 100.0):
        model = nn.Sequential(nn.Linear(1, 2, bias=False)).double().eval()
        model[0].weight.data = torch.tensor([[-weight], [weight]], dtype=F64)
        generator = torch.Generator().manual_seed(0)
        options = {"magnitude_epsilon": 1e-9, "num_samples": 4000, "generator": generator}
        found.append(noise_tolerance(model, inputs, torch.tensor([0, 1]), **options).sigma)
    assert found[0] == found[1]
    assert norm.cdf(-2 / (math.sqrt(2) * found[0])) == pytest.approx(0.1, abs=0.03)


def test_a_network_that_bears_all_noise_gets_the_largest_and_the_same_seed_the_same_answer():
    model = nn.Sequential(nn.Linear(1, 2)).double().eval()
    model[0].bias.data = torch.tensor([0.0, 1e3], dtype=F64)
    inputs = torch.ones(4, 1, dtype=F64)
    found = noise_tolerance(model, inputs, torch.ones(4, dtype=torch.int64))
    assert (found.sigma, found.status, found.iterations) == (2.0, Stop.CONVERGED, 1)
    network = mlp(3, 6, 3)
    data = separated(network)
    one, two = (noise_tolerance(network, *data, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(("quantile", "rank"), [(0.0, 1), (0.1, 10), (0.29, 29), (1.0, 100)])
def test_the_margin_is_the_kth_smallest(quantile, rank):
    scores = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    target = torch.arange(100) % 5
    by_hand = sorted(
        scores[i, label].item() - max(scores[i, k].item() for k in range(5) if k != label)
        for i, label in enumerate(target.tolist())
    )
    assert margin_quantile(scores, target, quantile=quantile).item() == by_hand[rank - 1]


def test_tied_weights_count_once():
    layer = nn.Linear(3, 3, bias=False).double()
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    inputs = torch.eye(3, dtype=F64)
    target = model(inputs).argmax(1)
    found = generalization_measures(model, inputs, target, names=["parameter_count", "parameter_norm"])
    assert found["parameter_count"] == 9
    torch.testing.assert_close(found["parameter_norm"], layer.weight.square().sum())


def test_no_measure_changes_the_model():
    model = mlp(3, 6, 3)
    before = copy.deepcopy(model.state_dict())
    generalization_measures(model, *separated(model), initial_state=start_of(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_measure_is_bit_equal_in_both_worlds_and_errs_by_half_the_error_in_one():
    model = mlp(2, 32, 2, seed=3)
    inputs, target = separated(model, (30, 2))
    domain = torch.randn(500, 2, generator=torch.Generator().manual_seed(9), dtype=F64)
    labels = (domain[:, 0] > 0).long()
    start = start_of(model)
    estimators = {
        name: lambda model, inputs, target, name=name: generalization_measures(
            model, inputs, target, initial_state=start, names=[name]
        )[name]
        for name in MEASURES
    }
    report = twin_audit(model, inputs, target, population=(domain, labels), measures=estimators)
    assert report.loss > 0.05
    for row in report.table:
        assert row.estimate == row.twin_estimate
        assert row.worst >= report.floor == report.loss / 2


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, data: (model.train(), *data, {}), r"model.eval\(\)"),
        (lambda model, data: (model, data[0] * float("nan"), data[1], {}), "NaN"),
        (lambda model, data: (model, data[0], data[1] * 0 + 7, {}), "class indices"),
        (lambda model, data: (model, data[0][:0], data[1][:0], {}), "empty"),
        (lambda model, data: (model, *data, {"names": ["path"]}), "names must be one of"),
        (lambda model, data: (model, *data, {"names": ["l2_distance"]}), "initial_state"),
        (lambda model, data: (model, *data, {"initial_state": {}}), "state_dict"),
        (lambda model, data: (model, data[0], (data[1] + 1) % 3, {"names": ["inverse_margin"]}), "margin at quantile"),
        (lambda model, data: (nn.Sequential(model, nn.LayerNorm(3).double()).eval(), *data, {}), "LayerNorm"),
        (lambda model, data: (nn.Sequential(nn.ReLU()).eval(), *data, {}), "no linear or convolutional"),
        (lambda model, data: (nn.Sequential(model, nn.Sigmoid()).eval(), *data, {"names": ["path_norm"]}), "Sigmoid"),
        (
            lambda model, data: (
                nn.Sequential(model, nn.ReLU(), nn.BatchNorm1d(3).double(), nn.Linear(3, 3).double()).eval(),
                *data,
                {},
            ),
            "directly behind",
        ),
        (
            lambda model, data: (nn.Sequential(model, nn.Flatten(0)).eval(), *data, {"names": ["inverse_margin"]}),
            "scores",
        ),
    ],
)
def test_what_has_no_measures_is_refused_by_name(change, message):
    model = mlp(3, 6, 3)
    model, inputs, target, options = change(model, separated(model))
    with pytest.raises(ValueError, match=message):
        generalization_measures(model, inputs, target, **options)


@pytest.mark.untyped
def test_dead_layers_nan_weights_and_names_in_one_string_are_refused():
    model = mlp(3, 6, 3)
    data = separated(model)
    with pytest.raises(TypeError, match="several names"):
        generalization_measures(model, *data, names="l2_norm")
    with pytest.raises(TypeError, match=r"torch.nn.Module"):
        generalization_measures(lambda x: x, *data)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter 0.weight contains NaN"):
        generalization_measures(model, *data)
    model[0].weight.data.zero_()
    with pytest.raises(ValueError, match="all zero"):
        generalization_measures(model, *data, names=["log_spectral_product"])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 0.0}, "drop"),
        ({"largest": -1.0}, "largest"),
        ({"num_samples": 0}, "num_samples"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_a_search_with_impossible_settings_is_refused(options, message):
    model = mlp(3, 6, 3)
    with pytest.raises(ValueError, match=message):
        noise_tolerance(model, *separated(model), **options)
