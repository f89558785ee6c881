"""The factored output layer against dense stochastic gradient descent (Vincent et al. 2015)."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimand.losses import FactoredSphericalLinear, SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss, ZLoss

F64 = torch.float64
FAMILY = {
    "z": lambda **kw: ZLoss(0.5, margin=3.0, **kw),
    "squared error": SquaredErrorLoss,
    "Taylor softmax": TaylorSoftmaxLoss,
    "spherical softmax": lambda **kw: SphericalSoftmaxLoss(0.05, **kw),
}
RATES = {"z": 0.3, "squared error": 0.02, "Taylor softmax": 0.3, "spherical softmax": 0.02}


def layer_of(loss, features=8, classes=60, seed=0, dtype=F64, **settings):
    torch.manual_seed(seed)
    return FactoredSphericalLinear(features, num_classes=classes, loss=loss, dtype=dtype, **settings)


def dense_of(layer):
    """The same layer as nn.Linear."""
    dense = torch.nn.Linear(layer.in_features, layer.num_classes, bias=layer.has_bias, dtype=layer.weight.dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if layer.has_bias:
            dense.bias.copy_(layer.bias)
    return dense


def batches(steps, features=8, rows=6, targets=10, seed=1, dtype=F64):
    """Few distinct targets, so that a batch repeats classes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield (
            torch.randn(rows, features, generator=generator, dtype=F64).to(dtype),
            torch.randint(targets, (rows,), generator=generator),
        )


def train(layer, data, lr, weight_decay=0.0):
    for hidden, target in data:
        layer(hidden, target).backward()
        layer.step(lr, weight_decay=weight_decay)


def assert_same_weights(layer, dense, tolerance):
    torch.testing.assert_close(layer.weight, dense.weight.detach(), rtol=0, atol=tolerance)
    if layer.has_bias:
        torch.testing.assert_close(layer.bias, dense.bias.detach(), rtol=0, atol=tolerance)


def assert_consistent(layer, tolerance):
    """Q = W^T W, its sum vector W^T 1, and U times its inverse is the identity."""
    whole = layer._dense().double()
    torch.testing.assert_close(layer.gram, whole.T @ whole, rtol=0, atol=tolerance)
    torch.testing.assert_close(layer.weight_sum, whole.sum(0), rtol=0, atol=tolerance)
    identity = torch.eye(len(layer.mixing), dtype=F64)
    torch.testing.assert_close(layer.mixing @ layer.mixing_inverse, identity, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("reduction", "bias"), [("mean", True), ("sum", False)])
@pytest.mark.parametrize("name", FAMILY)
def test_two_hundred_steps_equal_dense_sgd(name, reduction, bias):
    loss = FAMILY[name](reduction=reduction)
    lr = RATES[name] if reduction == "mean" else RATES[name] / 6
    layer = layer_of(loss, bias=bias, stabilise_period=25)
    dense = dense_of(layer)
    start = layer.weight
    optimizer = torch.optim.SGD(dense.parameters(), lr=lr)
    for hidden, target in batches(200):
        ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        value, expected = layer(ours, target), loss(dense(theirs), target)
        optimizer.zero_grad()
        value.backward()
        expected.backward()
        layer.step(lr)
        optimizer.step()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)
    assert_same_weights(layer, dense, 1e-9)
    assert_consistent(layer, 1e-9)
    assert (layer.weight - start).abs().amax() > 0.1


@pytest.mark.parametrize("name", FAMILY)
def test_one_example_at_a_time_equals_dense_sgd_one_example_at_a_time(name):
    loss = FAMILY[name]()
    layer = layer_of(loss)
    dense = dense_of(layer)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.01)
    for hidden, target in batches(50, rows=1):
        layer(hidden, target).backward()
        layer.step(0.01)
        optimizer.zero_grad()
        loss(dense(hidden), target).backward()
        optimizer.step()
    assert_same_weights(layer, dense, 1e-10)


def test_a_batch_is_not_its_examples_in_turn():
    # Their gradients interact through Q even when the inputs are orthogonal in all but the bias.
    hidden, target = torch.eye(8, dtype=F64)[:2], torch.tensor([3, 3])
    together, in_turn = layer_of(ZLoss(reduction="sum")), layer_of(ZLoss(reduction="sum"))
    train(together, [(hidden, target)], 0.5)
    train(in_turn, [(hidden[:1], target[:1]), (hidden[1:], target[1:])], 0.5)
    assert (together.weight - in_turn.weight).abs().amax() > 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_weight_decay_is_that_of_torch_sgd_and_reaches_every_part_of_the_state(name):
    loss = FAMILY[name]()
    layer = layer_of(loss)
    dense = dense_of(layer)
    optimizer = torch.optim.SGD(dense.parameters(), lr=RATES[name], weight_decay=0.1)
    for hidden, target in batches(40):
        layer(hidden, target).backward()
        layer.step(RATES[name], weight_decay=0.1)
        optimizer.zero_grad()
        loss(dense(hidden), target).backward()
        optimizer.step()
    assert_same_weights(layer, dense, 1e-10)
    assert_consistent(layer, 1e-10)


def squeezing_batches(steps):
    """Inputs of a few directions, in which alone U's singular values drift."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(3, 40, generator=generator, dtype=F64) / 4
    for _, target in batches(steps):
        yield torch.randn(6, 3, generator=generator, dtype=F64) @ basis, target


def test_a_factor_squeezed_step_after_step_is_stabilised_before_it_is_singular():
    # Each step halves U in the directions of the data: 60 of them would leave it singular in float64.
    loss = SquaredErrorLoss()
    layer = layer_of(loss, features=40, stabilise_period=None)
    dense = dense_of(layer)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for hidden, target in squeezing_batches(60):
        train(layer, [(hidden, target)], 0.1)
        assert layer.condition() < 1e5
        optimizer.zero_grad()
        loss(dense(hidden), target).backward()
        optimizer.step()
    assert_same_weights(layer, dense, 1e-9)
    assert_consistent(layer, 1e-9)


@pytest.mark.parametrize("operation", ["stabilise", "refactorise"])
def test_stabilising_and_refactorising_leave_the_weights_alone(operation):
    layer = layer_of(SquaredErrorLoss(), features=40, stabilise_period=None)
    train(layer, squeezing_batches(3), 0.1)
    before = copy.deepcopy(layer)
    assert 4 < before.condition() < 1e3
    getattr(layer, operation)()
    assert layer.condition() <= 4 + 1e-9
    torch.testing.assert_close(layer.weight, before.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.bias, before.bias, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.gram, before.gram, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.weight_sum, before.weight_sum, rtol=0, atol=1e-10)
    assert_consistent(layer, 1e-10)
    is_identity = torch.equal(layer.mixing, torch.eye(41, dtype=F64))
    assert is_identity == (operation == "refactorise")


def test_stabilising_refactorises_when_most_directions_have_drifted_or_the_scale_has():
    for scale in (torch.linspace(-3, 3, 9, dtype=F64).exp(), torch.full((9,), 1e-5, dtype=F64)):
        layer = layer_of(ZLoss())
        weight = layer.weight
        layer.mixing.mul_(scale[:, None])
        layer.class_factors.div_(scale)
        layer.stabilise()
        assert torch.equal(layer.mixing, torch.eye(9, dtype=F64))
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-12)
        assert_consistent(layer, 1e-10)


def test_a_step_that_would_make_the_factor_singular_is_taken_all_the_same():
    # Squared error of one example with 2 lr ||h||^2 = 1 maps U h to zero: W' exists, U' has no inverse.
    loss = SquaredErrorLoss()
    layer = layer_of(loss, bias=False)
    dense = dense_of(layer)
    hidden, target = torch.ones(1, 8, dtype=F64), torch.tensor([5])
    optimizer = torch.optim.SGD(dense.parameters(), lr=1 / 16)
    train(layer, [(hidden, target)], 1 / 16)
    loss(dense(hidden), target).backward()
    optimizer.step()
    assert_same_weights(layer, dense, 1e-12)
    assert_consistent(layer, 1e-10)
    for hidden, target in batches(20):
        train(layer, [(hidden, target)], 0.01)
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        loss(dense(hidden), target).backward()
        optimizer.step()
    assert_same_weights(layer, dense, 1e-10)


@pytest.mark.parametrize("name", FAMILY)
def test_float32_weights_with_a_float64_state_follow_dense_float64_sgd(name):
    exact, rough = layer_of(FAMILY[name]()), layer_of(FAMILY[name](), dtype=torch.float32)
    rough.class_factors.copy_(exact.class_factors)
    rough.refactorise()
    train(exact, batches(200), RATES[name] / 2)
    train(rough, batches(200, dtype=torch.float32), RATES[name] / 2)
    assert rough.weight.dtype == torch.float32
    assert rough.gram.dtype == F64
    torch.testing.assert_close(rough.weight.double(), exact.weight, rtol=0, atol=2e-5)
    assert_consistent(rough, 1e-3)


def test_class_weights_ignored_targets_and_risks_reach_the_step():
    weight = torch.linspace(0.5, 2.0, 60, dtype=F64)
    for loss in (
        ZLoss(weight=weight, ignore_index=4),
        ZLoss(ignore_index=4, reduction=lambda losses: losses.square().mean()),
    ):
        layer = layer_of(loss)
        dense = dense_of(layer)
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.2)
        for hidden, target in batches(20, rows=12):
            (3 * layer(hidden, target)).backward()
            layer.step(0.2)
            optimizer.zero_grad()
            (3 * loss(dense(hidden), target)).backward()
            optimizer.step()
        assert_same_weights(layer, dense, 1e-10)


def test_gradient_by_the_input_passes_gradcheck():
    layer = layer_of(ZLoss(margin=3.0)).eval()
    hidden, target = next(batches(1))
    assert torch.autograd.gradcheck(lambda value: layer(value, target), (hidden.requires_grad_(),))


def test_evaluation_mode_prepares_no_step():
    layer = layer_of(ZLoss()).eval()
    hidden, target = next(batches(1))
    layer(hidden, target).backward()
    with pytest.raises(RuntimeError, match="got 0"):
        layer.step(0.1)


def test_step_wants_exactly_one_backward_of_the_current_weights():
    layer = layer_of(ZLoss())
    hidden, target = next(batches(1))
    with pytest.raises(RuntimeError, match="got 0"):
        layer.step(0.1)
    layer(hidden, target)
    with pytest.raises(RuntimeError, match="got 0"):
        layer.step(0.1)
    layer(hidden, target).backward()
    layer(hidden, target).backward()
    with pytest.raises(RuntimeError, match="got 2"):
        layer.step(0.1)
    late = layer(hidden, target)
    train(layer, [(hidden, target)], 0.1)
    late.backward()
    with pytest.raises(RuntimeError, match="changed since forward"):
        layer.step(0.1)
    train(layer, [(hidden, target)], 0.1)


def test_a_step_that_overflows_is_refused_and_changes_nothing():
    layer = layer_of(SquaredErrorLoss())
    before = copy.deepcopy(layer.state_dict())
    hidden, target = next(batches(1))
    layer(hidden, target).backward()
    with pytest.raises(ValueError, match="not finite"):
        layer.step(1e200)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.untyped
def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 3 for ZLoss, got 2"):
        FactoredSphericalLinear(4, num_classes=2, loss=ZLoss())
    with pytest.raises(TypeError, match="loss must be a SphericalLoss"):
        FactoredSphericalLinear(4, num_classes=9, loss=torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="in_features"):
        FactoredSphericalLinear(0, num_classes=9, loss=ZLoss())
    with pytest.raises(ValueError, match="stabilise_period"):
        FactoredSphericalLinear(4, num_classes=9, loss=ZLoss(), stabilise_period=0)
    with pytest.raises(TypeError, match="state_dtype"):
        FactoredSphericalLinear(4, num_classes=9, loss=ZLoss(), state_dtype=torch.int64)
    layer = FactoredSphericalLinear(4, num_classes=9, loss=ZLoss())
    with pytest.raises(ValueError, match="input must have shape"):
        layer(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"class indices in \[0, 8\]"):
        layer(torch.ones(2, 4), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="target must have shape"):
        layer(torch.ones(2, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((1, 4), float("nan")), torch.tensor([0]))
    with pytest.raises(ValueError, match="k must lie"):
        layer.predict(torch.ones(1, 4), k=10)
    layer(torch.ones(2, 4), torch.tensor([0, 1])).backward()
    with pytest.raises(ValueError, match="lr must be"):
        layer.step(-0.1)
    with pytest.raises(ValueError, match="below 1"):
        layer.step(0.5, weight_decay=2.0)


def test_no_optimizer_sees_the_layer():
    assert list(layer_of(ZLoss()).parameters()) == []


@pytest.mark.parametrize("name", FAMILY)
def test_predict_ranks_every_class_as_the_dense_scores_do(name, monkeypatch):
    monkeypatch.setattr("minimand.losses.factored_spherical.ROWS_AT_ONCE", 7)
    layer = layer_of(FAMILY[name]())
    train(layer, batches(30), RATES[name])
    hidden, _ = next(batches(1, rows=20, seed=5))
    ranks = layer.loss.ranking(dense_of(layer)(hidden))
    assert torch.equal(layer.predict(hidden, k=12), ranks.topk(12).indices)
    assert torch.equal(layer.predict(hidden)[:, 0], ranks.argmax(1))


def test_a_resumed_run_repeats_every_bit():
    data = list(batches(40))
    straight = layer_of(ZLoss(margin=3.0), stabilise_period=15)
    train(straight, data, 0.3)
    first = layer_of(ZLoss(margin=3.0), stabilise_period=15)
    train(first, data[:20], 0.3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = layer_of(ZLoss(margin=3.0), stabilise_period=15, seed=9)
    hidden, target = data[0]
    second(hidden, target).backward()
    second.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(RuntimeError, match="got 0"):
        second.step(0.3)
    train(second, data[20:], 0.3)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_a_change_of_dtype_keeps_the_state_precise_and_true_to_the_weights():
    layer = layer_of(ZLoss())
    train(layer, batches(20), 0.3)
    weight = layer.weight
    layer.float()
    assert layer.class_factors.dtype == torch.float32
    assert layer.gram.dtype == F64
    torch.testing.assert_close(layer.weight.double(), weight, rtol=0, atol=1e-6)
    assert_consistent(layer, 1e-12)


class LargestNew(TorchDispatchMode):
    """Note the largest storage that an operation returns, other than those known before."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


def test_memory_is_one_copy_of_the_weights_and_a_step_makes_nothing_of_the_size_of_the_classes():
    classes, features = 300_000, 16
    layer = FactoredSphericalLinear(features, num_classes=classes, loss=ZLoss(), bias=False, stabilise_period=None)
    held = sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers())
    assert held - 4 * classes * features <= 8 * (3 * features**2 + 2 * features + 1)
    hidden = torch.randn(32, features, requires_grad=True)
    target = torch.randint(classes, (32,), generator=torch.Generator().manual_seed(0))
    with LargestNew(layer.buffers()) as watched:
        layer(hidden, target).backward()
        layer.step(0.1, weight_decay=1e-3)
    assert 0 < watched.nbytes < classes  # less than a byte a class
    # A pass over all classes works on a fixed number of rows at a time.
    layer.mixing[0, 0] *= 9
    layer.mixing_inverse[0, 0] /= 9
    with LargestNew(layer.buffers()) as watched:
        layer.stabilise()
    assert 0 < watched.nbytes < 8 * 8192 * features
    with LargestNew(layer.buffers()) as watched:
        layer.refactorise()
    assert 0 < watched.nbytes <= 8 * 8192 * features
