"""What every loss keeps. Swept over every concrete Loss that minimand.losses exports: a new one is covered at once.

A loss whose constructor needs arguments, or that only takes some shapes, says so in SETTINGS.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch

import minimand.losses
from minimand.losses import Loss

BATCH, CLASSES = 6, 5


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the contract builds and feeds one loss."""

    make: Callable[[], Loss]
    classes: int = CLASSES
    spatial: bool = True  # takes (batch, classes, *)
    weighted: bool = True  # takes weight and ignore_index
    couples: bool = False  # one example's loss depends on the others of its batch
    surrogate: bool = False  # only the gradient has a meaning, so no gradcheck of the value
    reranks: bool = False  # its link is not monotone in the scores, so it may rank the classes otherwise


def saf_under_way() -> Loss:
    """Build a SAF that remembers an epoch, so that its term is not zero."""
    loss = minimand.losses.SAFLoss(BATCH, lag=1, after_epoch=1)
    loss.start_epoch(1)
    loss.remember(torch.randn(BATCH, CLASSES), torch.arange(BATCH))
    loss.start_epoch(2)
    return loss


# Losses are built with their defaults unless said otherwise here.
SETTINGS: dict[str, Setting] = {
    "ALDRKLLoss": Setting(lambda: minimand.losses.ALDRKLLoss(num_samples=BATCH), spatial=False),
    "EnsLoss": Setting(minimand.losses.EnsLoss, weighted=False, couples=True, surrogate=True),
    "MESALoss": Setting(lambda: minimand.losses.MESALoss(torch.nn.Linear(3, CLASSES)), spatial=False),
    "RobustTemperatureLoss": Setting(
        lambda: minimand.losses.RobustTemperatureLoss.for_classes(CLASSES, dropout=0.0), surrogate=True
    ),
    "SAFLoss": Setting(saf_under_way, spatial=False),
    "SphericalSoftmaxLoss": Setting(minimand.losses.SphericalSoftmaxLoss, reranks=True),
    "TaylorSoftmaxLoss": Setting(minimand.losses.TaylorSoftmaxLoss, reranks=True),
}

NAMES = sorted(
    name
    for name in minimand.losses.__all__
    if inspect.isclass(getattr(minimand.losses, name))
    and issubclass(getattr(minimand.losses, name), Loss)
    and not inspect.isabstract(getattr(minimand.losses, name))
)


def setting_of(name: str) -> Setting:
    return SETTINGS.get(name) or Setting(getattr(minimand.losses, name))


@pytest.fixture(params=NAMES)
def setting(request) -> Setting:
    return setting_of(request.param)


def make(setting: Setting, *, reduction="mean", dtype=torch.float32) -> Loss:
    torch.manual_seed(0)
    loss = setting.make()
    loss.reduction = reduction
    if hasattr(loss, "generator"):
        loss.generator = torch.Generator().manual_seed(0)
    return loss.to(dtype)


def batch(setting: Setting, dtype=torch.float32, scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    input = scale * torch.randn(BATCH, setting.classes, generator=generator, dtype=torch.float64)
    target = torch.randint(setting.classes, (BATCH,), generator=generator)
    return input.to(dtype), target


def context(loss: Loss, rows: int = BATCH) -> dict[str, torch.Tensor]:
    available = {"index": torch.arange(rows), "inputs": torch.zeros(rows, 3)}
    return {name: available[name] for name in loss.needs}


def call(loss: Loss, input, target):
    return loss(input, target, **context(loss, len(input)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_works_in_every_dtype_and_keeps_it(setting, dtype):
    loss = make(setting, dtype=dtype)
    input, target = batch(setting, dtype)
    input.requires_grad_()
    value = call(loss, input, target)
    value.backward()
    assert value.dtype == dtype
    assert value.shape == ()
    assert input.grad.dtype == dtype
    assert torch.isfinite(input.grad).all()


def test_low_precision_agrees_with_float64(setting):
    input, target = batch(setting, torch.float64)
    exact = call(make(setting, dtype=torch.float64), input, target).detach()
    rough = call(make(setting), input.float(), target).detach()
    torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_is_finite_for_extreme_scores(setting, scale):
    loss = make(setting)
    input, target = batch(setting)
    input = (scale * input.sign()).requires_grad_()
    value = call(loss, input, target)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(input.grad).all()


def test_passes_gradcheck(setting):
    if setting.surrogate:
        pytest.skip("only the gradient of this loss is defined: its oracle test checks it")
    loss = make(setting, dtype=torch.float64).eval()
    input, target = batch(setting, torch.float64)
    input.requires_grad_()

    def value(scores):
        if hasattr(loss, "generator"):
            loss.generator.manual_seed(0)
        return call(loss, scores, target)

    assert torch.autograd.gradcheck(value, (input,))


@pytest.mark.untyped
def test_survives_compile_without_a_graph_break(setting):
    loss = make(setting).eval()
    input, target = batch(setting)
    expected = call(loss, input, target)
    torch._dynamo.reset()
    # The aot_eager backend traces and differentiates the whole graph, without minutes of code generation.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    if hasattr(loss, "generator"):
        loss.generator = None
        compiled(input, target, **context(loss))
        return
    scores = input.clone().requires_grad_()
    value = compiled(scores, target, **context(loss))
    value.backward()
    torch.testing.assert_close(value, expected)


def test_survives_vmap(setting):
    loss = make(setting).eval()
    stacked = [batch(setting, seed=seed) for seed in (1, 2, 3)]
    inputs = torch.stack([input for input, _ in stacked])
    targets = torch.stack([target for _, target in stacked])
    extra = context(loss)
    value = torch.func.vmap(lambda i, t: loss(i, t, **extra), randomness="different")(inputs, targets)
    assert value.shape == (3,)
    if not hasattr(loss, "generator"):
        expected = torch.stack([call(loss, input, target) for input, target in stacked])
        torch.testing.assert_close(value, expected)


def test_reductions_agree(setting):
    input, target = batch(setting)
    each = call(make(setting, reduction="none"), input, target)
    assert each.shape == target.shape
    torch.testing.assert_close(call(make(setting, reduction="mean"), input, target), each.mean())
    torch.testing.assert_close(call(make(setting, reduction="sum"), input, target), each.sum())
    torch.testing.assert_close(call(make(setting, reduction=torch.max), input, target), each.max())


def test_examples_do_not_see_each_other(setting):
    if setting.couples:
        pytest.skip("this loss is defined on the batch: its oracle test checks how")
    input, target = batch(setting)
    together = call(make(setting, reduction="none"), input, target)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = make(setting, reduction="none")
    extra = {name: value[order] for name, value in context(loss).items()}
    torch.testing.assert_close(loss(input[order], target[order], **extra), together[order])


def test_spatial_scores_are_rows_of_scores(setting):
    if not setting.spatial:
        pytest.skip("this loss takes (batch, classes) only")
    loss = make(setting, reduction="none")
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, setting.classes, 3, 2, generator=generator)
    target = torch.randint(setting.classes, (2, 3, 2), generator=generator)
    losses = loss(input, target)
    assert losses.shape == target.shape
    rows = make(setting, reduction="none")(input.movedim(1, -1).reshape(-1, setting.classes), target.reshape(-1))
    torch.testing.assert_close(losses.reshape(-1), rows)


def test_ignored_examples_count_for_nothing(setting):
    if not setting.weighted or setting.couples:
        pytest.skip("this loss has no ignore_index")
    loss = make(setting)
    input, target = batch(setting)
    kept = torch.tensor([0, 2, 3, 5])
    expected = make(setting)(input[kept], target[kept], **{name: value[kept] for name, value in context(loss).items()})
    target[[1, 4]] = loss.ignore_index
    torch.testing.assert_close(call(loss, input, target), expected)
    per_example = call(make(setting, reduction="none"), input, target)
    assert (per_example[[1, 4]] == 0).all()
    torch.testing.assert_close(call(make(setting, reduction=torch.mean), input, target), expected)


def test_class_weights_give_the_weighted_mean(setting):
    if not setting.weighted:
        pytest.skip("this loss has no class weights")
    input, target = batch(setting)
    each = call(make(setting, reduction="none"), input, target)
    weight = torch.linspace(0.5, 2.0, setting.classes)
    loss = make(setting)
    loss.weight = weight
    expected = (weight[target] * each).sum() / weight[target].sum()
    torch.testing.assert_close(call(loss, input, target), expected)


def test_state_travels_in_the_state_dict(setting):
    loss = make(setting)
    input, target = batch(setting)
    call(loss, input, target)
    other = make(setting)
    other.load_state_dict(loss.state_dict())
    for name, value in loss.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_a_deep_copy_is_independent(setting):
    loss = make(setting)
    input, target = batch(setting)
    before = copy.deepcopy(loss.state_dict())
    call(copy.deepcopy(loss), input, target)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])


def test_link_gives_probabilities(setting):
    loss = make(setting)
    input, _ = batch(setting)
    probabilities = loss.link(input)
    assert probabilities.shape == input.shape
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(BATCH))
    ranked_by = loss.ranking(input) if setting.reranks else input
    assert torch.equal(probabilities.argmax(1), ranked_by.argmax(1))


@pytest.mark.untyped
def test_refuses_a_malformed_batch(setting):
    loss = make(setting)
    input, target = batch(setting)
    with pytest.raises(ValueError, match="target must"):
        call(loss, input, torch.full_like(target, setting.classes))
    with pytest.raises(TypeError, match="target must hold class indices"):
        call(loss, input, target.float())
    with pytest.raises(ValueError, match="target must have shape"):
        loss(input, target[:-1], **context(loss))
    with pytest.raises(ValueError, match="input is empty"):
        loss(input[:0], target[:0], **context(loss, 0))
    with pytest.raises(TypeError, match="input must have a floating-point dtype"):
        call(loss, input.long(), target)
    broken = input.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        call(loss, broken, target)


@pytest.mark.untyped
def test_refuses_an_unknown_reduction(setting):
    loss = make(setting, reduction="median")
    input, target = batch(setting)
    with pytest.raises(ValueError, match="reduction must be"):
        call(loss, input, target)
