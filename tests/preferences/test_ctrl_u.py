import math
import pathlib
import re

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from minimand.preferences import (
    CtrlUReward,
    UncertaintyWeightedLoss,
    one_step_x0,
    paired_timesteps,
    uncertainty_kl,
    uncertainty_weighted_loss,
)

F64 = torch.float64


def logits(seed=0, dtype=F64, shape=(3, 4, 5, 6), scale=2.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def labels(shape=(3, 5, 6), classes=4):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(9))


def cross_entropy(prediction, target):
    return F.cross_entropy(prediction, target, reduction="none")


def by_hand(first, second, target, *, scale=1.0, penalty=1.0):
    """The objective of the paper, pixel by pixel, in plain numbers: KL(p2 || p1), its weight and its penalty."""
    rewards, uncertainties = [], []
    for example in range(len(first)):
        for row in range(first.shape[2]):
            for column in range(first.shape[3]):
                one, two = (x[example, :, row, column].tolist() for x in (first, second))
                p1, p2 = ([math.exp(a) / sum(map(math.exp, x)) for a in x] for x in (one, two))
                u = scale * sum(b * math.log(b / a) for a, b in zip(p1, p2, strict=True))
                uncertainties.append(u)
                rewards.append(math.exp(-u) * -math.log(p1[int(target[example, row, column])]))
    return sum(rewards) / len(rewards) + penalty * sum(uncertainties) / len(uncertainties)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize("dim", [1, -1])
def test_the_divergence_is_that_of_the_second_prediction_from_the_first(dtype, tolerance, dim):
    first, second = logits(0, dtype), logits(1, dtype)
    p1, p2 = (torch.distributions.Categorical(logits=x.movedim(dim, -1)) for x in (first, second))
    expected = torch.distributions.kl_divergence(p2, p1)
    found = uncertainty_kl(first, second, dim=dim)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (found >= 0).all()
    assert not torch.allclose(found, torch.distributions.kl_divergence(p1, p2), rtol=1e-2)


@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]))
@settings(deadline=None, max_examples=60)
def test_the_divergence_of_near_or_far_predictions_is_finite_and_never_negative(seed, distance):
    first = logits(seed, torch.float32, (4, 7))
    second = first + distance * logits(seed + 1, torch.float32, (4, 7))
    found = uncertainty_kl(first.requires_grad_(), second.requires_grad_())
    found.sum().backward()
    assert (found >= 0).all()
    assert torch.isfinite(first.grad).all()
    assert torch.isfinite(second.grad).all()


def test_values_of_the_card_hold_by_hand():
    first, second = torch.tensor([[0.5, 0.5]], dtype=F64).log(), torch.tensor([[0.9, 0.1]], dtype=F64).log()
    u = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert uncertainty_kl(first, second).item() == pytest.approx(u, abs=1e-12)
    assert u == pytest.approx(0.3680642, abs=1e-7)
    terms = uncertainty_weighted_loss(torch.ones(1, dtype=F64), torch.tensor([u], dtype=F64))
    assert terms.reward.item() == pytest.approx(0.692073, abs=1e-6)
    value = UncertaintyWeightedLoss()(first, second, torch.ones(1, dtype=F64))
    assert value.item() == pytest.approx(1.060137, abs=1e-6)


@pytest.mark.parametrize(("scale", "penalty"), [(1.0, 1.0), (0.1, 1.0), (0.7, 0.3)])
def test_the_loss_is_the_sum_over_pixels_written_out(scale, penalty):
    first, second, target = logits(0), logits(1), labels()
    loss = UncertaintyWeightedLoss(scale=scale, penalty=penalty)
    found = loss(first, second, cross_entropy(first, target))
    assert found.item() == pytest.approx(by_hand(first, second, target, scale=scale, penalty=penalty), abs=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_predictions_give_the_plain_loss_and_its_gradient(symmetric):
    target = labels()
    plain = logits().requires_grad_()
    F.cross_entropy(plain, target).backward()
    first, second = logits().requires_grad_(), logits().requires_grad_()
    own, other = cross_entropy(first, target), cross_entropy(second, target) if symmetric else None
    value = UncertaintyWeightedLoss(symmetric=symmetric)(first, second, own, other)
    value.backward()
    assert value.item() == pytest.approx(F.cross_entropy(logits(), target).item(), abs=1e-15)
    torch.testing.assert_close(first.grad + second.grad, plain.grad, rtol=0, atol=1e-15)


def test_equal_maps_give_the_plain_squared_error_and_its_gradient():
    target, plain = logits(3), logits().requires_grad_()
    F.mse_loss(plain, target).backward()
    first, second = logits().requires_grad_(), logits().requires_grad_()
    value = UncertaintyWeightedLoss("l1", penalty=0.1)(first, second, F.mse_loss(first, target, reduction="none"))
    value.backward()
    assert value.item() == pytest.approx(F.mse_loss(logits(), target).item(), rel=1e-12)
    torch.testing.assert_close(first.grad, plain.grad, rtol=0, atol=1e-15)
    assert not second.grad.any()


def test_scale_zero_is_the_plain_loss_whatever_the_second_prediction():
    first, second, target = logits(0), logits(1), labels()
    value = UncertaintyWeightedLoss(scale=0.0)(first, second, cross_entropy(first, target))
    assert value.item() == pytest.approx(F.cross_entropy(first, target).item(), abs=1e-15)


def test_without_penalty_and_with_a_detached_weight_it_is_a_reweighted_loss():
    first, second, target = logits(0).requires_grad_(), logits(1).requires_grad_(), labels()
    UncertaintyWeightedLoss(penalty=0.0, detach_weight=True)(first, second, cross_entropy(first, target)).backward()
    weight = torch.exp(-uncertainty_kl(first, second)).detach()
    other = logits(0).requires_grad_()
    (weight * cross_entropy(other, target)).mean().backward()
    torch.testing.assert_close(first.grad, other.grad, rtol=0, atol=1e-15)
    assert second.grad is None or not second.grad.any()


@pytest.mark.parametrize(("loss", "penalty"), [(3.0, 1.0), (0.4, 1.0), (2.0, 0.1), (0.05, 0.1)])
def test_the_best_uncertainty_is_the_log_of_the_loss_over_the_penalty(loss, penalty):
    def objective(u):
        terms = uncertainty_weighted_loss(torch.full_like(u, loss), u)
        return terms.reward + penalty * terms.uncertainty

    grid = torch.tensor([0.0, 0.3, 1.0, 2.5], dtype=F64, requires_grad=True)
    objective(grid).sum().backward()
    expected = penalty - loss * torch.exp(-grid.detach())
    torch.testing.assert_close(grid.grad, expected, rtol=0, atol=1e-8)
    best = torch.tensor([max(math.log(loss / penalty), 0.0)], dtype=F64, requires_grad=True)
    objective(best).sum().backward()
    # Stationary inside; at the edge of what an uncertainty can be, it pays to lower it still.
    assert best.grad.item() == pytest.approx(max(penalty - loss, 0.0), abs=1e-8)
    tried = torch.linspace(0, 5, 2001, dtype=F64)
    assert (objective(tried) >= objective(best.detach()) - 1e-12).all()


def test_ignored_pixels_change_nothing_in_the_reward_but_count_for_the_uncertainty():
    first, second, target = logits(0), logits(1), labels()
    whole = UncertaintyWeightedLoss().terms(first, second, cross_entropy(first, target))
    wide1, wide2 = (torch.cat([x, 50 * logits(5, shape=(3, 4, 5, 2))], 3) for x in (first, second))
    ignored = torch.cat([target, torch.full((3, 5, 2), 255)], 2)
    each = F.cross_entropy(wide1, ignored, ignore_index=255, reduction="none")
    masked = UncertaintyWeightedLoss().terms(wide1, wide2, each, mask=ignored != 255)
    torch.testing.assert_close(masked.reward, whole.reward, rtol=0, atol=1e-14)
    torch.testing.assert_close(masked.uncertainty, whole.uncertainty * 6 / 8, rtol=0, atol=1e-14)
    uneven = torch.ones_like(target, dtype=torch.bool)
    uneven[0, 2:] = False
    few = UncertaintyWeightedLoss().terms(first, second, cross_entropy(first, target), mask=uneven)
    cropped = UncertaintyWeightedLoss().terms(
        first[:1, :, :2], second[:1, :, :2], cross_entropy(first[:1, :, :2], target[:1, :2])
    )
    torch.testing.assert_close(few.reward, torch.cat([cropped.reward, whole.reward[1:]]), rtol=0, atol=1e-14)


def test_an_example_without_a_counted_pixel_has_reward_zero_and_no_nan():
    first, target = logits().requires_grad_(), labels()
    mask = torch.ones_like(target, dtype=torch.bool)
    mask[1] = False
    terms = UncertaintyWeightedLoss().terms(first, logits(1), cross_entropy(first, target), mask=mask)
    assert terms.reward[1] == 0
    terms.reward.sum().backward()
    assert torch.isfinite(first.grad).all()
    assert first.grad[0].any()
    assert not first.grad[1].any()


@pytest.mark.parametrize("divergence", ["kl", "l1"])
def test_swapping_the_predictions_changes_the_one_sided_form_only(divergence):
    first, second, target = logits(0), logits(1), labels()
    if divergence == "kl":
        own, other = cross_entropy(first, target), cross_entropy(second, target)
    else:
        own, other = first.square(), second.square()
    both = UncertaintyWeightedLoss(divergence, symmetric=True, penalty=0.3)
    assert both(first, second, own, other).item() == pytest.approx(both(second, first, other, own).item(), abs=1e-12)
    one = UncertaintyWeightedLoss(divergence, penalty=0.3)
    assert abs(one(first, second, own) - one(second, first, other)) > 1e-3
    halves = (one(first, second, own) + one(second, first, other)) / 2
    assert both(first, second, own, other).item() == pytest.approx(halves.item(), abs=1e-12)


def test_the_gradient_reaches_both_predictions_as_the_formula_says():
    first, second, target = logits(0).requires_grad_(), logits(1).requires_grad_(), labels()
    each = cross_entropy(first, target)
    each.retain_grad()
    UncertaintyWeightedLoss()(first, second, each).backward()
    p1, p2 = first.detach().softmax(1), second.detach().softmax(1)
    u = (p2 * (p2 / p1).log()).sum(1)
    to_u = (1 - torch.exp(-u) * each.detach())[:, None] / u.numel()
    torch.testing.assert_close(second.grad, to_u * p2 * ((p2 / p1).log() - u[:, None]), rtol=0, atol=1e-12)
    through_loss = torch.exp(-u)[:, None] * (p1 - F.one_hot(target, 4).movedim(-1, 1)) / u.numel()
    torch.testing.assert_close(first.grad, to_u * (p1 - p2) + through_loss, rtol=0, atol=1e-12)
    assert (second.grad.flatten(1).norm(dim=1) > 0).all()


def test_without_its_penalty_the_gradient_raises_the_uncertainty_that_spares_it_the_loss():
    first, second = torch.zeros(1, 2, dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
    for penalty, direction in ((0.0, 1), (5.0, -1)):
        second.grad = None
        UncertaintyWeightedLoss(penalty=penalty)(first, second, torch.ones(1, dtype=F64)).backward()
        with torch.no_grad():
            moved = uncertainty_kl(first, second - 0.01 * second.grad) - uncertainty_kl(first, second)
        assert torch.sign(moved).item() == direction


def test_gradients_pass_a_numerical_check():
    target = labels((2, 3))
    loss = UncertaintyWeightedLoss(scale=0.5, penalty=0.3, symmetric=True)
    inputs = [logits(seed, shape=(2, 4, 3)).requires_grad_() for seed in (0, 1)]

    def value(a, b):
        return loss(a, b, cross_entropy(a, target), cross_entropy(b, target))

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_compared_in_float32(dtype):
    first, second = logits(0, dtype, scale=30.0), logits(1, dtype, scale=30.0)
    found = UncertaintyWeightedLoss()(first, second, cross_entropy(first.float(), labels()))
    wide = UncertaintyWeightedLoss()(first.float(), second.float(), cross_entropy(first.float(), labels()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide)


def test_a_callable_divergence_is_used_and_scaled():
    first, second, target = logits(0), logits(1), labels()
    own = UncertaintyWeightedLoss(lambda a, b: (a - b).square().mean(1), scale=0.2, penalty=0.0)
    u = 0.2 * (first - second).square().mean(1)
    each = cross_entropy(first, target)
    assert own(first, second, each).item() == pytest.approx((torch.exp(-u) * each).mean().item(), abs=1e-14)


def test_reductions_agree():
    first, second, target = logits(0), logits(1), labels()
    each = cross_entropy(first, target)
    none = UncertaintyWeightedLoss(reduction="none")(first, second, each)
    assert none.shape == (3,)
    for reduction, expected in (("mean", none.mean()), ("sum", none.sum()), (torch.amax, none.amax())):
        torch.testing.assert_close(UncertaintyWeightedLoss(reduction=reduction)(first, second, each), expected)


def test_one_prediction_an_image_works_as_one_a_pixel():
    first, second, target = logits(0, shape=(6, 4)), logits(1, shape=(6, 4)), labels((6,))
    flat = UncertaintyWeightedLoss(reduction="none")(first, second, cross_entropy(first, target))
    pixel = UncertaintyWeightedLoss(reduction="none")(
        first[..., None], second[..., None], cross_entropy(first[..., None], target[:, None])
    )
    torch.testing.assert_close(flat, pixel)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_recovers_the_image_when_the_prediction_is_the_truth(dtype, prediction_type):
    image, noise = logits(0, dtype, (5, 2, 3, 3)), logits(1, dtype, (5, 2, 3, 3), scale=1.0)
    alpha_bar = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.02], dtype=dtype)
    a = alpha_bar[:, None, None, None]
    noisy = a.sqrt() * image + (1 - a).sqrt() * noise
    truth = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * image
    found = one_step_x0(noisy, truth, alpha_bar, prediction_type=prediction_type)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_is_what_the_scheduler_of_diffusers_estimates(prediction_type):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    noisy, prediction, times = logits(0, torch.float32), logits(1, torch.float32), torch.tensor([3, 400, 999])
    found = one_step_x0(noisy, prediction, scheduler.alphas_cumprod[times], prediction_type=prediction_type)
    for row, time in enumerate(times):
        step = scheduler.step(prediction[row : row + 1], time, noisy[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], step.pred_original_sample, rtol=1e-5, atol=1e-4)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=9), st.integers(0, 1200))
def test_paired_times_are_the_given_ones_and_those_a_gap_later_but_not_past_the_end(times, gap):
    both = paired_timesteps(torch.tensor(times), gap=gap)
    assert both.tolist() == times + [min(time + gap, 999) for time in times]


def reward(**settings):
    generator = torch.Generator().manual_seed(2)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return CtrlUReward(network, nn.CrossEntropyLoss(reduction="none"), **settings).double()


def images():
    return logits(7, shape=(6, 2, 5, 6))


def test_the_reward_is_the_loss_of_the_networks_two_predictions():
    target = labels()
    for symmetric in (False, True):
        weighting = UncertaintyWeightedLoss(scale=0.5, penalty=0.3, symmetric=symmetric)
        objective = reward(weighting=weighting, reward_scale=0.2)
        first, second = objective.network(images()).chunk(2)
        other = cross_entropy(second, target) if symmetric else None
        terms = weighting.terms(first, second, cross_entropy(first, target), other)
        found = objective(images(), target, timesteps=torch.tensor([0, 5, 400]))
        assert found.reward.item() == pytest.approx(terms.reward.mean().item(), abs=1e-14)
        assert found.uncertainty.item() == pytest.approx(terms.uncertainty.mean().item(), abs=1e-14)
        assert found.loss.item() == pytest.approx(0.2 * found.reward.item() + 0.3 * found.uncertainty.item(), abs=1e-14)


def test_only_examples_whose_first_time_lies_in_the_window_count():
    target, objective = labels(), reward(window=(10, 400))
    both = paired_timesteps(torch.tensor([9, 400, 700]), gap=50)  # the second time of the second example lies outside
    found = objective(images(), target, timesteps=both)
    alone = objective(images()[[1, 4]], target[1:2], timesteps=both[1:2])
    torch.testing.assert_close(tuple(found), tuple(alone))


def test_an_empty_window_gives_zero_and_a_zero_gradient():
    source = images().requires_grad_()
    found = reward()(source, labels(), timesteps=torch.tensor([401, 700, 999]))
    found.loss.backward()
    assert [term.item() for term in found] == [0.0, 0.0, 0.0]
    assert not source.grad.any()


def test_the_reward_but_not_the_uncertainty_is_warmed_up_and_only_training_counts_steps():
    objective = reward(warmup_steps=4, reward_scale=0.5)
    arguments = {"timesteps": torch.zeros(3, dtype=torch.long)}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        found = objective(images(), labels(), **arguments)
        assert found.loss.item() == pytest.approx(
            0.5 * share * found.reward.item() + found.uncertainty.item(), abs=1e-14
        )
    objective.eval()
    objective(images(), labels(), **arguments)
    assert objective.step.item() == 6
    other = reward(warmup_steps=4)
    other.load_state_dict(objective.state_dict())
    assert other.step.item() == 6


def test_the_network_is_frozen_and_stays_in_eval_mode_while_gradients_pass_through_it():
    objective = reward().train()
    assert objective.training
    assert not any(module.training for module in objective.network.modules())
    before = {name: value.clone() for name, value in objective.network.state_dict().items()}
    source = images().requires_grad_()
    objective(source, labels(), timesteps=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert source.grad[:3].any()
    assert source.grad[3:].any()
    assert all(parameter.grad is None for parameter in objective.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in objective.network.state_dict().items())


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_loop_of_diffusers_fine_tunes_its_model_on_the_reward(predicts):
    """A tiny conditional diffusion model of two-class maps: the reward loss falls, and the reward is left alone."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(prediction_type=predicts)
    network = nn.Conv2d(1, 2, 1)  # reads a pixel's class off its sign
    with torch.no_grad():
        network.weight.copy_(torch.tensor([-2.0, 2.0]).reshape(2, 1, 1, 1))
        network.bias.zero_()
    objective = CtrlUReward(network, nn.CrossEntropyLoss(reduction="none"), window=(0, 999), warmup_steps=5)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    rewards = []
    for _ in range(25):
        condition = (torch.rand(8, 1, 8, 8, generator=generator) > 0.5).long()
        clean = 2.0 * condition - 1
        noise = torch.randn(clean.shape, generator=generator).repeat(2, 1, 1, 1)
        times = paired_timesteps(torch.randint(100, 900, (8,), generator=generator), gap=50)
        noisy = scheduler.add_noise(clean.repeat(2, 1, 1, 1), noise, times)
        predicted = unet(torch.cat([noisy, clean.repeat(2, 1, 1, 1)], 1), times).sample
        wanted = noise if predicts == "epsilon" else scheduler.get_velocity(clean.repeat(2, 1, 1, 1), noise, times)
        generated = one_step_x0(noisy, predicted, scheduler.alphas_cumprod[times], prediction_type=predicts)
        terms = objective(generated, condition[:, 0], timesteps=times)
        optimizer.zero_grad()
        (F.mse_loss(predicted, wanted) + terms.loss).backward()
        optimizer.step()
        rewards.append(terms.reward.item())
    assert sum(rewards[-5:]) < 0.7 * sum(rewards[:5])
    assert objective.step.item() == 25


@pytest.mark.untyped
@pytest.mark.parametrize("changed", [False, True])
def test_the_loop_of_the_page_runs_before_and_after_its_change(changed):
    page = pathlib.Path(__file__).resolve().parents[2] / "docs/methods/ctrl-u.md"
    (block,) = re.findall(r"^```diff\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(line[1:] for line in block.splitlines() if line[0] in (" +" if changed else " -"))
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    before = [parameter.clone() for parameter in unet.parameters()]
    target = labels((4, 8, 8), classes=2)
    maps = F.one_hot(target, 2).movedim(-1, 1).float()
    names = {
        "torch": torch, "CtrlUReward": CtrlUReward, "one_step_x0": one_step_x0, "paired_timesteps": paired_timesteps,
        "segmenter": nn.Conv2d(1, 2, 3, padding=1), "loader": 3 * [(2.0 * target[:, None] - 1, maps, target)],
        "unet": unet, "scheduler": diffusers.DDPMScheduler(), "optimizer": torch.optim.AdamW(unet.parameters()),
    }  # fmt: skip
    exec(code, names)
    assert torch.isfinite(names["loss"])
    assert any(not torch.equal(*pair) for pair in zip(before, unet.parameters(), strict=True))
    if changed:
        assert names["objective"].step.item() == 3


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UncertaintyWeightedLoss("l2"), ValueError, "divergence must be one of"),
        (lambda: UncertaintyWeightedLoss(scale=-1.0), ValueError, "scale must be"),
        (lambda: UncertaintyWeightedLoss(penalty=-1.0), ValueError, "penalty must be"),
        (lambda: UncertaintyWeightedLoss(reduction="max"), ValueError, "reduction must be"),
        (lambda: UncertaintyWeightedLoss()(logits(), logits(), torch.tensor(1.0)), ValueError, "reduction='none'"),
        (lambda: UncertaintyWeightedLoss()(logits(), logits()[:2], torch.ones(3, 5, 6)), ValueError, "one shape"),
        (lambda: UncertaintyWeightedLoss()(labels(), labels(), torch.ones(3)), TypeError, "floating-point"),
        (
            lambda: UncertaintyWeightedLoss(symmetric=True)(logits(), logits(), torch.ones(3, 5, 6)),
            ValueError,
            "loss2 is missing",
        ),
        (
            lambda: UncertaintyWeightedLoss()(logits(), logits(), *[torch.ones(3, 5, 6)] * 2),
            ValueError,
            "loss2 must be None",
        ),
        (
            lambda: UncertaintyWeightedLoss(lambda a, b: (a - b).sum(1))(logits(), logits(1), torch.ones(3, 5, 6)),
            ValueError,
            "at least 0",
        ),
        (
            lambda: uncertainty_weighted_loss(torch.ones(2), torch.ones(2), mask=torch.ones(2)),
            ValueError,
            "mask must be boolean",
        ),
        (lambda: uncertainty_weighted_loss(torch.ones(2), torch.ones(2, 1)), ValueError, "one number an element"),
        (lambda: uncertainty_kl(labels(), labels()), TypeError, "floating-point"),
        (lambda: one_step_x0(logits(), logits(), torch.zeros(3)), ValueError, "alpha_bar must lie"),
        (lambda: one_step_x0(logits(), logits(), torch.ones(2)), ValueError, "one number an example"),
        (lambda: one_step_x0(logits(), logits()[:2], torch.ones(3)), ValueError, "shape of noisy"),
        (lambda: one_step_x0(logits(), logits(), torch.ones(3), prediction_type="x"), ValueError, "prediction_type"),
        (lambda: paired_timesteps(torch.tensor([1000])), ValueError, "timesteps must lie"),
        (lambda: paired_timesteps(torch.tensor([[1]])), ValueError, "shape"),
        (lambda: paired_timesteps(torch.tensor([1]), gap=-1), ValueError, "gap"),
        (lambda: paired_timesteps(torch.tensor([1.0])), TypeError, "integer"),
        (lambda: reward(window=(5, 4)), ValueError, "window must"),
        (lambda: reward(reward_scale=-1.0), ValueError, "reward_scale"),
        (lambda: reward(warmup_steps=-1), ValueError, "warmup_steps"),
        (lambda: CtrlUReward(nn.Identity(), "mse"), TypeError, "criterion"),
        (lambda: reward()(images()[:5], labels(), timesteps=torch.zeros(3).long()), ValueError, "two generations"),
        (lambda: reward()(images(), labels(), timesteps=torch.zeros(4).long()), ValueError, "timesteps must"),
        (lambda: CtrlUReward(nn.Identity(), nn.MSELoss())(*[logits()] * 2, timesteps=labels((3,))), ValueError, "two"),
        (
            lambda: CtrlUReward(nn.Identity(), nn.MSELoss(), weighting=UncertaintyWeightedLoss("l1"))(
                images(), logits()[:, :2], timesteps=labels((3,))
            ),
            ValueError,
            "reduction='none'",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
