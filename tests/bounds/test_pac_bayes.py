"""PAC-Bayes bounds: their pieces against closed forms and scipy, their promises by simulation."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn

from minimand.bounds import binary_kl_inverse, pac_bayes_bound, spectral_margin_bound
from minimand.bounds.pac_bayes import _gaussian_divergence, _largest_noise, _share, _with_biases
from minimand.bounds.weight_matrices import fold
from minimand.training import mlp, seeded


def kl(q, p):
    return (q * math.log(q / p) if q else 0.0) + ((1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.99), st.floats(1e-6, 5))
def test_the_inverse_of_kl_is_the_root_above_the_rate(rate, divergence):
    found = binary_kl_inverse(rate, divergence)
    if kl(rate, 1 - 1e-15) > divergence:
        expected = brentq(lambda p: kl(rate, p) - divergence, max(rate, 1e-300), 1 - 1e-15, xtol=1e-15)
        assert found == pytest.approx(expected, abs=1e-9)
    assert found >= rate


def test_the_inverse_of_kl_has_its_closed_forms():
    assert binary_kl_inverse(0.0, 0.3) == pytest.approx(1 - math.exp(-0.3), abs=1e-11)
    assert binary_kl_inverse(0.2, 0.0) == pytest.approx(0.2, abs=1e-6)
    assert binary_kl_inverse(1.0, 0.5) == 1.0
    assert binary_kl_inverse(0.1, 1e9) == pytest.approx(1.0)


def test_the_shares_of_delta_add_up_to_one():
    assert sum(_share(power) for power in range(-10_000, 10_001)) == pytest.approx(1, abs=1e-3)


def test_the_divergence_is_torch_s_own():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, generator=generator, dtype=torch.float64)
    ours = _gaussian_divergence(0.3, 0.7, float(weights.square().sum()), 50, 0.05, 0)[1]
    normal = torch.distributions.Normal
    posterior, prior = normal(weights, torch.full_like(weights, 0.3)), normal(torch.zeros_like(weights), 0.7)
    assert ours == pytest.approx(float(torch.distributions.kl_divergence(posterior, prior).sum()), rel=1e-12)


def signs(examples, features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    inputs[:, 0] += inputs[:, 0].sign()
    model = nn.Sequential(nn.Linear(features, 2, bias=False)).double().eval()
    model[0].weight.data = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    return model, inputs, (inputs[:, 0] > 0).long()


def test_the_bound_on_the_noisy_network_is_what_its_formula_says_and_holds_on_fresh_data():
    model, inputs, target = signs(3000)
    bound = pac_bayes_bound(model, inputs, target, delta=0.05, num_samples=400)
    drawn = binary_kl_inverse(bound.training_error, math.log(24 / 0.05) / 400)
    budgets = [_gaussian_divergence(bound.sigma, 2 ** (power / 2), 2.0, 6, 0.025, power)[0] for power in range(-40, 41)]
    by_hand = binary_kl_inverse(drawn, (min(budgets) + math.log(2 * math.sqrt(3000))) / 3000)
    assert bound.error == pytest.approx(by_hand, abs=1e-9)
    assert bound.error < 0.1
    assert not bound.vacuous
    _, fresh, labels = signs(20_000, seed=1)
    generator = torch.Generator().manual_seed(2)
    wrong = []
    for _ in range(100):
        moved = model[0].weight + bound.sigma * torch.randn(2, 3, generator=generator, dtype=torch.float64)
        wrong.append(float(((fresh @ moved.T).argmax(1) != labels).double().mean()))
    assert sum(wrong) / 100 < bound.error


def test_a_prior_at_the_start_costs_the_way_from_it():
    model, inputs, target = signs(500)
    near = {"0.weight": model[0].weight.detach() * 0.99}
    assert pac_bayes_bound(model, inputs, target, initial_state=near).divergence < 0.5
    assert pac_bayes_bound(model, inputs, target).divergence > 1
    assert (
        pac_bayes_bound(model, inputs, target, initial_state=near).error < pac_bayes_bound(model, inputs, target).error
    )


def test_smaller_delta_and_fewer_examples_promise_less():
    model, inputs, target = signs(2000)
    bound = pac_bayes_bound(model, inputs, target, delta=0.05).error
    assert pac_bayes_bound(model, inputs, target, delta=1e-6).error > bound
    assert pac_bayes_bound(model, inputs[:200], target[:200], delta=0.05).error > bound
    bound = spectral_margin_bound(model, inputs, target, delta=0.05).complexity
    assert spectral_margin_bound(model, inputs, target, delta=1e-6).complexity > bound


def network(seed=0, width=16):
    model = seeded(lambda: mlp(4, 3, hidden=(width, width)).double(), seed).eval()
    inputs = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return model, inputs, model(inputs).argmax(1)


def test_matrices_with_biases_compute_the_network():
    model, inputs, _ = network()
    found = torch.cat([inputs, torch.ones(300, 1, dtype=torch.float64)], 1).T
    matrices = _with_biases(fold(model))
    for place, matrix in enumerate(matrices):
        found = matrix @ found if place == len(matrices) - 1 else torch.relu(matrix @ found)
    torch.testing.assert_close(found.T, model(inputs), rtol=1e-12, atol=1e-12)


def test_noise_of_the_bound_s_size_moves_outputs_by_less_than_a_quarter_more_than_half_of_the_time():
    model, inputs, _ = network()
    matrices = [matrix.detach() for matrix in _with_biases(fold(model))]
    depth = len(matrices)
    spectral = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in matrices]
    beta = math.prod(spectral) ** (1 / depth)
    matrices = [beta / norm * matrix for matrix, norm in zip(matrices, spectral, strict=True)]
    points = torch.cat([inputs, torch.ones(300, 1, dtype=torch.float64)], 1)
    longest = float(points.norm(dim=1).max())
    reach = [sum(math.sqrt(side) for side in matrix.shape) + math.sqrt(2 * math.log(2 * depth)) for matrix in matrices]
    sigma = _largest_noise(beta, reach, longest)
    moved = longest * (math.prod(beta + sigma * one for one in reach) - beta**depth)
    assert moved == pytest.approx(0.25, rel=1e-6)

    def run(weights):
        found = points.T
        for place, matrix in enumerate(weights):
            found = matrix @ found if place == depth - 1 else torch.relu(matrix @ found)
        return found.T

    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(200):
        noisy = [
            matrix + sigma * torch.randn(matrix.shape, generator=generator, dtype=torch.float64) for matrix in matrices
        ]
        kept += float((run(noisy) - run(matrices)).norm(dim=1).max()) < 0.25
    assert kept > 100


@pytest.mark.parametrize(("data", "vacuous"), [(lambda: network(), True), (lambda: signs(50_000), False)])
def test_the_spectral_bound_is_what_its_formula_says(data, vacuous):
    model, inputs, target = data()
    bound = spectral_margin_bound(model, inputs, target, delta=0.1, quantile=0.2)
    matrices = [matrix.detach() for matrix in _with_biases(fold(model))]
    depth, examples = len(matrices), len(inputs)
    scores = model(inputs)
    others = scores.scatter(1, target[:, None], -math.inf).amax(1)
    margins = (scores.gather(1, target[:, None])[:, 0] - others).detach().sort().values
    rank = examples // 5 - 1
    margin = float(margins[rank])
    assert bound.margin == pytest.approx(margin, rel=1e-12)
    assert bound.margin_error == rank / examples
    spectral = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in matrices]
    beta = (math.prod(spectral) / margin) ** (1 / depth)
    reach = [sum(math.sqrt(side) for side in matrix.shape) + math.sqrt(2 * math.log(2 * depth)) for matrix in matrices]
    longest = math.sqrt(float(inputs.norm(dim=1).max()) ** 2 + 1)
    power = next(
        power
        for power in range(10, -100, -1)
        if longest * (math.prod(beta + 2.0**power * one for one in reach) - beta**depth) < 0.25
    )
    squares = sum(
        float(matrix.norm()) ** 2 * (beta / norm) ** 2 for matrix, norm in zip(matrices, spectral, strict=True)
    )
    shared = 0.1 * 2 / (3 * (abs(power) + 1) * (abs(power) + 2))
    budget = squares / 4.0**power + 2 * math.log(2) + math.log(2 * math.sqrt(examples) / shared)
    assert bound.complexity == pytest.approx(budget / examples, rel=1e-9)
    assert bound.error == pytest.approx(binary_kl_inverse(rank / examples, budget / examples), abs=1e-9)
    assert bound.vacuous == vacuous


def test_the_spectral_bound_does_not_see_a_rescaling_of_layers_or_of_the_outputs():
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).double().eval()
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = model(inputs).argmax(1)
    bound = spectral_margin_bound(model, inputs, target)
    louder = copy.deepcopy(model)
    louder[2].weight.data *= 8
    assert spectral_margin_bound(louder, inputs, target).complexity == pytest.approx(bound.complexity, rel=1e-9)


def test_the_spectral_bound_says_something_of_a_linear_classifier_of_many_examples():
    model, inputs, target = signs(100_000)
    inputs = inputs.clamp(-3, 3)
    bound = spectral_margin_bound(model, inputs, target, quantile=0.0)
    assert bound.error < 0.2
    assert not bound.vacuous


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, inputs: (nn.Sequential(model, nn.Sigmoid()), inputs, {}), "linear layers with ReLU"),
        (lambda model, inputs: (nn.Sequential(model, nn.ReLU()), inputs, {}), "end in a linear layer"),
        (lambda model, inputs: (model, inputs[:, :, None], {}), r"\(examples, features\)"),
        (lambda model, inputs: (model, inputs, {"delta": 0.0}), "delta"),
        (lambda model, inputs: (model, inputs, {"input_norm": 0.1}), "input_norm"),
        (lambda model, inputs: (model, inputs * float("nan"), {}), "NaN"),
    ],
)
def test_what_the_spectral_bound_does_not_hold_for_is_refused(change, message):
    model, inputs, target = network()
    model, inputs, options = change(model, inputs)
    with pytest.raises(ValueError, match=message):
        spectral_margin_bound(model.eval(), inputs, target, **options)


@pytest.mark.untyped
def test_wrong_rates_deltas_margins_and_draws_are_refused():
    model, inputs, target = network()
    with pytest.raises(ValueError, match="rate"):
        binary_kl_inverse(float("nan"), 0.1)
    with pytest.raises(ValueError, match="divergence"):
        binary_kl_inverse(0.1, -0.1)
    with pytest.raises(ValueError, match="delta"):
        pac_bayes_bound(model, inputs, target, delta=1.0)
    with pytest.raises(ValueError, match="num_samples"):
        pac_bayes_bound(model, inputs, target, num_samples=0)
    with pytest.raises(ValueError, match="without a positive one"):
        spectral_margin_bound(model, inputs, (target + 1) % 3)
