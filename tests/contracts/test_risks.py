"""What every risk keeps. Swept over every concrete Risk that minimand.risks exports: a new one is covered at once.

A risk whose constructor needs arguments, or that lacks one of the properties, says so in SETTINGS.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable

import pytest
import test_losses
import torch

import minimand.risks
from minimand.risks import Risk

BATCH, GROUPS = 12, 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the contract builds one risk, and which properties it claims."""

    make: Callable[[], Risk]
    monotone: bool = True  # raising a loss never lowers the risk
    translates: bool = True  # risk(l + c) = risk(l) + c
    scales: bool = True  # risk(a l) = a risk(l) for a > 0: together with the rest, a coherent risk
    bounded: bool = True  # weights are non-negative and add up to one
    convex: bool = True
    surrogate: bool = False  # weights are held constant in the gradient, so no gradcheck of the value


R = minimand.risks

# Risks are built with their defaults unless said otherwise here. CVaR, KL-DRO and chi-square DRO are coherent.
SETTINGS: dict[str, Setting] = {
    "ChiSquareDRO": Setting(lambda: R.ChiSquareDRO(radius=1.5)),
    "CVaR": Setting(lambda: R.CVaR(0.7)),
    # Its weights ignore a shift and a rescaling of the losses; a larger loss may lower the other losses' weights.
    "DynamicLossReweighting": Setting(
        lambda: R.DynamicLossReweighting(temperature=0.4), monotone=False, convex=False, surrogate=True
    ),
    # In evaluation mode; in training mode the update looks at the scale of the losses.
    "GroupDRO": Setting(lambda: R.GroupDRO(GROUPS)),
    "KLDRO": Setting(lambda: R.KLDRO(radius=0.5)),
}

NAMES = sorted(
    name
    for name, part in ((name, getattr(R, name)) for name in R.__all__)
    if inspect.isclass(part) and issubclass(part, Risk) and not inspect.isabstract(part)
)


def setting_of(name: str) -> Setting:
    return SETTINGS.get(name) or Setting(getattr(R, name))


@pytest.fixture(params=NAMES)
def setting(request) -> Setting:
    return setting_of(request.param)


def make(setting: Setting, dtype=torch.float64) -> Risk:
    return setting.make().to(dtype).eval()


def batch(dtype=torch.float64, seed=1):
    losses = torch.rand(BATCH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * losses).to(dtype)


def context(risk: Risk) -> dict[str, torch.Tensor]:
    available = {"group": torch.arange(BATCH) % GROUPS}
    return {name: available[name] for name in risk.needs}


def call(risk: Risk, losses):
    return risk(losses, **context(risk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_works_in_every_dtype_and_keeps_it(setting, dtype, training):
    risk = make(setting, dtype).train(training)
    losses = batch(dtype).requires_grad_()
    value = call(risk, losses)
    value.backward()
    assert value.dtype == losses.grad.dtype == dtype
    assert value.shape == ()
    assert torch.isfinite(losses.grad).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_agrees_with_float64(setting, dtype, tolerance):
    rough = batch(dtype)
    exact = call(make(setting), rough.double())
    torch.testing.assert_close(call(make(setting, dtype), rough).double(), exact, rtol=tolerance, atol=0)


def test_is_finite_for_extreme_losses(setting):
    losses = (1e4 * (batch(torch.float32) - 1.5).sign()).requires_grad_()
    value = call(make(setting, torch.float32), losses)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(losses.grad).all()


def test_does_not_depend_on_the_order_of_the_examples(setting):
    risk = make(setting)
    losses = batch()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    shuffled = risk(losses[order], **{name: value[order] for name, value in context(risk).items()})
    torch.testing.assert_close(shuffled, call(risk, losses), rtol=0, atol=1e-12)


def test_adding_a_constant_to_all_losses_adds_it_to_the_risk(setting):
    if not setting.translates:
        pytest.skip("this risk is not translation equivariant")
    losses = batch()
    expected = call(make(setting), losses) + 7.5
    torch.testing.assert_close(call(make(setting), losses + 7.5), expected, rtol=0, atol=1e-9)


def test_scaling_all_losses_scales_the_risk(setting):
    if not setting.scales:
        pytest.skip("this risk is not positively homogeneous")
    losses = batch()
    for factor in (0.01, 40.0):
        expected = factor * call(make(setting), losses)
        torch.testing.assert_close(call(make(setting), factor * losses), expected, rtol=1e-9, atol=0)


def test_raising_a_loss_never_lowers_the_risk(setting):
    if not setting.monotone:
        pytest.skip("this risk is not monotone")
    losses = batch()
    value = call(make(setting), losses)
    for example in range(BATCH):
        for amount in (1e-3, 0.5, 10.0):
            raised = losses.clone()
            raised[example] += amount
            assert call(make(setting), raised) >= value - 1e-10


def test_is_convex_in_the_losses(setting):
    if not setting.convex:
        pytest.skip("this risk is not convex")
    one, two = batch(seed=1), batch(seed=2)
    for share in (0.1, 0.5, 0.8):
        mixed = call(make(setting), share * one + (1 - share) * two)
        assert mixed <= share * call(make(setting), one) + (1 - share) * call(make(setting), two) + 1e-10


def test_lies_between_the_smallest_and_the_largest_loss(setting):
    if not setting.bounded:
        pytest.skip("this risk's weights may be negative")
    losses = batch().requires_grad_()
    value = call(make(setting), losses)
    value.backward()
    assert losses.min() <= value <= losses.max()
    assert (losses.grad >= 0).all()
    assert losses.grad.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 2.5, -4.0])
def test_equal_losses_give_their_value(setting, constant):
    losses = torch.full((BATCH,), constant, dtype=torch.float64)
    assert call(make(setting), losses).item() == pytest.approx(constant, abs=1e-12)


def test_one_example_gives_its_loss(setting):
    risk = setting.make().eval()
    if risk.needs:
        pytest.skip("this risk's other groups are absent then: its oracle test says what that means")
    assert risk(torch.tensor([2.5])).item() == pytest.approx(2.5)


def test_passes_gradcheck(setting):
    if setting.surrogate:
        pytest.skip("the weights are constants in the gradient: its oracle test checks that")
    risk = make(setting)
    assert torch.autograd.gradcheck(lambda losses: call(risk, losses), (batch().requires_grad_(),))


@pytest.mark.untyped
@pytest.mark.parametrize("training", [True, False])
def test_survives_compile_without_a_graph_break(setting, training):
    risk = make(setting, torch.float32).train(training)
    reference = copy.deepcopy(risk)
    torch._dynamo.reset()
    compiled = torch.compile(risk, fullgraph=True, backend="aot_eager")
    losses, expected_losses = batch(torch.float32).requires_grad_(), batch(torch.float32).requires_grad_()
    value, expected = compiled(losses, **context(risk)), call(reference, expected_losses)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(losses.grad, expected_losses.grad)
    for name, state in reference.state_dict().items():
        torch.testing.assert_close(risk.state_dict()[name], state)


def test_survives_vmap(setting):
    risk = make(setting)
    stacked = torch.stack([batch(seed=seed) for seed in (1, 2, 3)])
    extra = context(risk)
    value = torch.func.vmap(lambda losses: risk(losses, **extra))(stacked)
    torch.testing.assert_close(value, torch.stack([call(risk, losses) for losses in stacked]))
    gradient = torch.func.vmap(torch.func.grad(lambda losses: risk(losses, **extra)))(stacked)
    for losses, row in zip(stacked, gradient, strict=True):
        losses = losses.clone().requires_grad_()
        call(risk, losses).backward()
        torch.testing.assert_close(row, losses.grad)


def test_state_travels_in_the_state_dict(setting):
    risk = make(setting).train()
    call(risk, batch().requires_grad_())
    other = make(setting).train()
    other.load_state_dict(risk.state_dict())
    for _ in range(2):
        torch.testing.assert_close(
            call(other, batch(seed=5).requires_grad_()), call(risk, batch(seed=5).requires_grad_())
        )


def test_a_deep_copy_is_independent(setting):
    risk = make(setting).train()
    before = copy.deepcopy(risk.state_dict())
    call(copy.deepcopy(risk), batch().requires_grad_())
    for name, value in risk.state_dict().items():
        assert torch.equal(value, before[name])


# A plain reduction cannot be told what a risk needs.
@pytest.mark.parametrize("risk_name", [name for name in NAMES if not getattr(R, name).needs])
@pytest.mark.parametrize("name", test_losses.NAMES)
def test_reduces_every_loss(risk_name, name):
    risk = make(setting_of(risk_name), torch.float32)
    how = test_losses.setting_of(name)
    input, target = test_losses.batch(how)
    input.requires_grad_()
    each = test_losses.call(test_losses.make(how, reduction="none"), input, target)
    value = test_losses.call(test_losses.make(how, reduction=risk), input, target)
    torch.testing.assert_close(value, risk(each))
    value.backward()
    assert torch.isfinite(input.grad).all()


@pytest.mark.untyped
def test_refuses_malformed_losses(setting):
    risk = make(setting, torch.float32)
    losses = batch(torch.float32)
    with pytest.raises(TypeError, match=r"losses must be a torch\.Tensor"):
        call(risk, losses.tolist())
    with pytest.raises(TypeError, match="losses must have a floating-point dtype"):
        call(risk, losses.long())
    with pytest.raises(ValueError, match=r"losses must have shape \(batch,\)"):
        call(risk, losses.reshape(3, 4))
    with pytest.raises(ValueError, match=r"losses must have shape \(batch,\)"):
        call(risk, losses.sum())
    with pytest.raises(ValueError, match="losses is empty"):
        call(risk, losses[:0])
    for bad in (float("nan"), float("inf")):
        broken = losses.clone()
        broken[3] = bad
        with pytest.raises(ValueError, match="losses contains NaN or infinity"):
            call(risk, broken)
