"""The robust temperature loss, TempNet and its contrastive loss against their mathematics (Qiu et al. 2024)."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.losses import (
    RobustTemperatureLoss,
    TempNet,
    TempNetContrastiveLoss,
    exact_temperature,
    robust_temperature_loss,
)

F64 = torch.float64
CLASSES = 7


def batch(rows=64, classes=CLASSES, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    temperature = 0.2 + 3 * torch.rand(rows, generator=generator, dtype=F64)
    return scores, torch.randint(classes, (rows,), generator=generator), temperature


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def uniform(p):
    return torch.full_like(p, 1 / p.shape[-1])


def entropy(scores, temperature):
    log_p = torch.log_softmax(scores / temperature[:, None], 1)
    return -(log_p.exp() * log_p).sum(1)


# --- the robust loss ---


@pytest.mark.parametrize("radius", [0.3, 1.0, 1.9])
def test_robust_loss_is_the_dual_tau_log_mean_exp_of_gaps_over_tau_plus_radius_tau(radius):
    scores, target, temperature = batch()
    gaps = scores - scores.gather(1, target[:, None])
    expected = temperature * (gaps / temperature[:, None]).exp().mean(1).log() + radius * temperature
    losses = robust_temperature_loss(scores, target, temperature=temperature, radius=radius, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-10)


def test_minimum_over_the_temperature_is_the_worst_case_within_the_kl_ball():
    # Strong duality: the worst distribution is the tilted one whose divergence is the radius.
    scores, target, _ = batch(rows=200, scale=1.0)
    best = exact_temperature(scores, radius=0.5, temperature_min=1e-3, temperature_max=1e3)
    losses = robust_temperature_loss(scores, target, temperature=best, radius=0.5, reduction="none")
    gaps = scores - scores.gather(1, target[:, None])
    worst = torch.softmax(scores / best[:, None], 1)
    torch.testing.assert_close(kl(worst, uniform(worst)), torch.full_like(best, 0.5), rtol=0, atol=1e-10)
    torch.testing.assert_close(losses, (worst * gaps).sum(1), rtol=0, atol=1e-9)
    # Weak duality: no distribution of the ball does worse, at any temperature's bound.
    generator = torch.Generator().manual_seed(1)
    others = torch.softmax(torch.randn(500, CLASSES, generator=generator, dtype=F64), 1)
    others = others[kl(others, uniform(others)) <= 0.5]
    assert len(others) > 100
    assert ((others @ gaps.T).amax(0) <= losses + 1e-10).all()


def test_gradient_in_the_scores_is_the_worst_case_distribution_less_the_label():
    scores, target, temperature = batch()
    scores.requires_grad_()
    robust_temperature_loss(scores, target, temperature=temperature, radius=1.0, reduction="sum").backward()
    expected = torch.softmax(scores.detach() / temperature[:, None], 1) - F.one_hot(target, CLASSES)
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-10)


def test_gradient_in_the_temperature_is_the_radius_less_the_divergence_whatever_the_label():
    scores, target, temperature = batch()
    p = torch.softmax(scores / temperature[:, None], 1)
    for labels in (target, (target + 3) % CLASSES):
        tau = temperature.clone().requires_grad_()
        robust_temperature_loss(scores, labels, temperature=tau, radius=1.2, reduction="sum").backward()
        torch.testing.assert_close(tau.grad, 1.2 - kl(p, uniform(p)), rtol=0, atol=1e-10)


def test_curvature_in_the_temperature_is_the_variance_of_the_scores_over_tau_cubed():
    scores, target, temperature = batch()
    tau = temperature.clone().requires_grad_()
    value = robust_temperature_loss(scores, target, temperature=tau, radius=1.0, reduction="sum")
    (slope,) = torch.autograd.grad(value, tau, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), tau)
    p = torch.softmax(scores / temperature[:, None], 1)
    variance = (p * scores**2).sum(1) - (p * scores).sum(1) ** 2
    torch.testing.assert_close(curvature, variance / temperature**3, rtol=1e-8, atol=1e-10)


def test_robust_loss_passes_gradcheck_in_scores_and_temperature():
    scores, target, temperature = batch(rows=6)
    scores.requires_grad_()
    temperature.requires_grad_()

    def value(h, tau):
        return robust_temperature_loss(h, target, temperature=tau, radius=1.0)

    assert torch.autograd.gradcheck(value, (scores, temperature))


def test_robust_loss_at_temperature_one_is_cross_entropy_less_log_k_plus_the_radius():
    scores, target, _ = batch()
    losses = robust_temperature_loss(scores, target, temperature=1.0, radius=0.8, reduction="none")
    expected = F.cross_entropy(scores, target, reduction="none") - math.log(CLASSES) + 0.8
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_robust_loss_without_radius_tends_to_the_mean_gap_as_temperature_grows():
    scores, target, _ = batch()
    with pytest.warns(UserWarning, match="temperature_max"):
        losses = robust_temperature_loss(scores, target, temperature=1e6, radius=0.0, reduction="none")
    expected = scores.mean(1) - scores.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)


def test_robust_loss_of_scaled_scores_at_the_scaled_temperature_is_scaled():
    scores, target, temperature = batch()
    losses = robust_temperature_loss(scores, target, temperature=temperature, radius=1.0, reduction="none")
    scaled = robust_temperature_loss(5 * scores + 2, target, temperature=5 * temperature, radius=1.0, reduction="none")
    torch.testing.assert_close(scaled, 5 * losses, rtol=1e-10, atol=1e-10)


def test_robust_loss_takes_a_temperature_for_every_position():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 3, generator=generator, dtype=F64)
    target = torch.randint(5, (2, 3), generator=generator)
    temperature = 0.5 + torch.rand(2, 3, generator=generator, dtype=F64)
    losses = robust_temperature_loss(scores, target, temperature=temperature, radius=0.7, reduction="none")
    one = robust_temperature_loss(scores[1:, :, 2], target[1:, 2], temperature=temperature[1:, 2], radius=0.7)
    torch.testing.assert_close(losses[1, 2], one)


# --- the exact temperature ---


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 20),
    fraction=st.floats(0.05, 0.95),
    scale=st.floats(0.1, 30.0),
)
def test_exact_temperature_brings_the_entropy_to_log_k_less_the_radius(seed, classes, fraction, scale):
    scores, _, _ = batch(rows=8, classes=classes, scale=scale, seed=seed)
    radius = fraction * math.log(classes)
    tau = exact_temperature(scores, radius=radius, temperature_min=1e-6, temperature_max=1e6)
    expected = torch.full_like(tau, math.log(classes) - radius)
    torch.testing.assert_close(entropy(scores, tau), expected, rtol=0, atol=1e-8)


def test_exact_temperature_ends_at_the_edge_beyond_which_the_optimum_lies():
    scores, _, _ = batch()
    free = exact_temperature(scores, radius=1.0, temperature_min=1e-6, temperature_max=1e6)
    low, high = free.quantile(0.3).item(), free.quantile(0.7).item()
    boxed = exact_temperature(scores, radius=1.0, temperature_min=low, temperature_max=high)
    torch.testing.assert_close(boxed, free.clamp(low, high), rtol=1e-12, atol=0)
    flat = exact_temperature(torch.zeros(1, 4), radius=1.0, temperature_min=0.1, temperature_max=2.0)
    assert flat.item() == pytest.approx(0.1)


def test_exact_temperature_scales_with_the_scores_and_ignores_a_shift():
    scores, _, _ = batch()
    tau = exact_temperature(scores, radius=1.0, temperature_min=1e-6, temperature_max=1e6)
    scaled = exact_temperature(4 * scores - 9, radius=1.0, temperature_min=1e-6, temperature_max=1e6)
    torch.testing.assert_close(scaled, 4 * tau, rtol=1e-10, atol=0)


def test_exact_temperature_beats_every_temperature_of_a_grid():
    scores, target, _ = batch()
    best = exact_temperature(scores, radius=1.3, temperature_min=0.3, temperature_max=4.0)
    least = robust_temperature_loss(scores, target, temperature=best, radius=1.3, reduction="none")
    for value in torch.linspace(0.3, 4.0, 50).tolist():
        losses = robust_temperature_loss(scores, target, temperature=value, radius=1.3, reduction="none")
        assert (least <= losses + 1e-12).all()


def test_peaked_scores_need_a_larger_temperature_than_flat_ones():
    scores, _, _ = batch(rows=1)
    sizes = torch.tensor([[0.5], [1.0], [3.0]], dtype=F64)
    tau = exact_temperature(sizes * scores, radius=1.0, temperature_min=1e-6, temperature_max=1e6)
    assert tau[0] < tau[1] < tau[2]


def test_centred_pooling_of_the_scores_is_tau_times_the_symmetric_divergence():
    scores, _, temperature = batch()
    p = torch.softmax(scores / temperature[:, None], 1)
    pooled = ((p - 1 / CLASSES) * scores).sum(1)
    expected = temperature * (kl(p, uniform(p)) + kl(uniform(p), p))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-10)
    # Hence the optimum is a pooling of the scores, the shape that TempNet copies.
    best = exact_temperature(scores, radius=1.0, temperature_min=1e-6, temperature_max=1e6)
    p = torch.softmax(scores / best[:, None], 1)
    pooled = ((p - 1 / CLASSES) * scores).sum(1)
    torch.testing.assert_close(best, pooled / (1.0 + kl(uniform(p), p)), rtol=1e-8, atol=0)


# --- the network ---


def network(kind="logits", **settings):
    torch.manual_seed(0)
    return TempNet(CLASSES, kind=kind, hidden=16, temperature_min=0.3, temperature_max=1.7, **settings).double()


def test_tempnet_on_logits_is_its_formula():
    net = network(pooling_temperature=0.5).eval()
    with torch.no_grad():
        net.importance.normal_()
        net.bias.fill_(0.3)
    x, _, _ = batch(rows=5)
    hidden = 1 / (1 + (-((x / x.norm(dim=1, keepdim=True)) @ net.transform.weight.T + net.transform.bias)).exp())
    v = hidden @ net.prototypes.T + net.offsets
    w = (v / 0.5).exp() / (v / 0.5).exp().sum(1, keepdim=True)
    t = ((w - 1 / 16) * v * net.importance).sum(1) + 0.3
    torch.testing.assert_close(net(x), 0.3 + 1.4 / (1 + (-t).exp()), rtol=0, atol=1e-7)


def test_tempnet_on_embeddings_is_its_formula():
    net = network("prototype").eval()
    with torch.no_grad():
        net.importance.normal_()
        net.bias.fill_(-0.2)
    e, _, _ = batch(rows=5, scale=0.3)
    x = 1 / (1 + (-(e @ net.transform.weight.T + net.transform.bias)).exp())
    k = x @ (net.prototypes / net.prototypes.norm(dim=1, keepdim=True)).T
    w = torch.softmax(k / 0.01, 1)
    t = ((w - 1 / 16) / (1 + (-k).exp()) * net.importance).sum(1) - 0.2
    torch.testing.assert_close(net(e), 0.3 + 1.4 / (1 + (-t).exp()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["logits", "prototype"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e4))
def test_temperatures_lie_in_their_range(kind, seed, scale):
    x, _, _ = batch(rows=8, scale=scale, seed=seed)
    tau = network(kind)(x)
    assert tau.shape == (8,)
    assert ((tau >= 0.3) & (tau <= 1.7)).all()


@pytest.mark.parametrize("kind", ["logits", "prototype"])
def test_order_of_the_prototypes_does_not_matter(kind):
    net = network(kind).eval()
    with torch.no_grad():
        net.importance.normal_()
    x, _, _ = batch(rows=5)
    expected = net(x)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for values in (net.prototypes, net.importance, *([net.offsets] if net.offsets is not None else [])):
            values.copy_(values[order].clone())
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("kind", ["logits", "prototype"])
def test_uniform_pooling_gives_the_middle_of_the_range(kind):
    net = network(kind, pooling_temperature=1e12).eval()
    x, _, _ = batch(rows=5)
    torch.testing.assert_close(net(x), torch.ones(5, dtype=F64), rtol=0, atol=1e-8)


def test_tempnet_does_not_see_the_scale_of_the_logits():
    # A limit of the official network: the exact temperature scales with the logits, its input does not.
    net = network().eval()
    x, _, _ = batch(rows=5)
    torch.testing.assert_close(net(x), net(10 * x))


def test_prediction_is_free_of_dropout_and_training_is_not():
    net = network()
    x, _, _ = batch(rows=5)
    assert torch.equal(net.predict(x), copy.deepcopy(net).eval()(x).detach())
    assert not torch.equal(net(x), net(x))
    net.generator = torch.Generator().manual_seed(5)
    first = net(x)
    net.generator.manual_seed(5)
    assert torch.equal(net(x), first)


def test_dropout_keeps_the_mean_of_the_hidden_units():
    net = network(dropout=0.4)
    net.generator = torch.Generator().manual_seed(0)
    dropped = net._drop(torch.ones(200, 500, dtype=F64), 0.4)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.6])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tempnet_stays_in_float32_when_the_model_is_cast_lower(dtype):
    loss = RobustTemperatureLoss.for_classes(CLASSES, dropout=0.0)
    before = copy.deepcopy(loss.tempnet.state_dict())
    loss.to(dtype)
    for name, value in loss.tempnet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    scores, target, _ = batch(rows=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.tempnet(scores.to(dtype)).dtype == torch.float32
    assert loss(scores.to(dtype), target).dtype == dtype
    assert loss.double().tempnet.bias.dtype == F64


def test_prototypes_start_at_the_transformed_embeddings():
    net = network("prototype")
    untouched = net.prototypes[3:].detach().clone()
    embeddings, _, _ = batch(rows=3)
    net.init_prototypes(embeddings)
    torch.testing.assert_close(net.prototypes[:3].detach(), torch.sigmoid(net.transform(embeddings)).detach())
    assert torch.equal(net.prototypes[3:], untouched)
    with pytest.raises(ValueError, match="kind='prototype'"):
        network().init_prototypes(embeddings)


# --- the loss with its network ---


def robust_loss(**settings):
    torch.manual_seed(0)
    return RobustTemperatureLoss.for_classes(CLASSES, dropout=0.0, **settings).double()


def test_module_is_the_robust_loss_at_the_predicted_temperatures():
    scores, target, _ = batch()
    loss = robust_loss(radius=1.1, reduction="none")
    expected = robust_temperature_loss(scores, target, temperature=loss.tempnet(scores), radius=1.1, reduction="none")
    torch.testing.assert_close(loss(scores, target), expected)


def test_no_gradient_reaches_the_model_through_the_network():
    scores, target, _ = batch()
    scores.requires_grad_()
    loss = robust_loss(radius=1.1, reduction="sum")
    loss(scores, target).backward()
    tau = loss.tempnet(scores).detach()
    expected = torch.softmax(scores.detach() / tau[:, None], 1) - F.one_hot(target, CLASSES)
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-10)


def test_gradient_of_the_network_is_radius_less_divergence_times_its_own():
    scores, target, _ = batch()
    loss = robust_loss(radius=1.1, reduction="sum")
    loss(scores, target).backward()
    tau = loss.tempnet(scores)
    p = torch.softmax(scores / tau.detach()[:, None], 1)
    expected = torch.autograd.grad(((1.1 - kl(p, uniform(p))) * tau).sum(), list(loss.tempnet.parameters()))
    for parameter, gradient in zip(loss.tempnet.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-10)


def test_training_the_network_brings_each_temperature_to_the_exact_one():
    scores, target, _ = batch(rows=6, scale=1.0)
    loss = robust_loss(radius=0.8, hidden=64)
    exact = exact_temperature(scores, radius=0.8, temperature_min=0.01, temperature_max=2.0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(3000):
        optimizer.zero_grad()
        loss(scores, target).backward()
        optimizer.step()
    torch.testing.assert_close(loss.tempnet.predict(scores), exact, rtol=0.02, atol=0)


def test_link_is_the_softmax_at_the_predicted_temperatures():
    scores, _, _ = batch()
    loss = RobustTemperatureLoss.for_classes(CLASSES, dropout=0.5).double()
    expected = torch.softmax(scores / loss.tempnet.predict(scores)[:, None], 1)
    torch.testing.assert_close(loss.link(scores), expected)
    grid = scores.reshape(16, 4, CLASSES).movedim(2, 1)
    torch.testing.assert_close(loss.link(grid), expected.reshape(16, 4, CLASSES).movedim(2, 1))


def test_network_may_read_hidden_states_in_place_of_the_scores():
    scores, target, _ = batch(rows=6)
    hidden = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    loss = RobustTemperatureLoss(TempNet(3, hidden=8, dropout=0.0), radius=1.0).double()
    expected = robust_temperature_loss(scores, target, temperature=loss.tempnet(hidden), radius=1.0)
    torch.testing.assert_close(loss(scores, target, hidden), expected)
    torch.testing.assert_close(
        loss.link(scores, hidden), torch.softmax(scores / loss.tempnet.predict(hidden)[:, None], 1)
    )
    with pytest.raises(ValueError, match=r"features must have shape \(rows, 3\)"):
        loss(scores, target)


@pytest.mark.untyped
def test_compiled_and_vmapped_losses_with_their_network_are_the_eager_one():
    scores, target, _ = batch(rows=12)
    loss = robust_loss()
    expected = loss(scores, target)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(scores, target), expected)
    stacked = torch.func.vmap(loss)(scores.reshape(3, 4, -1), target.reshape(3, 4))
    torch.testing.assert_close(stacked.mean(), expected)


# --- the contrastive loss ---


def pairs(batch=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(batch, width, generator=generator, dtype=F64) for _ in range(2))
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def contrast(num_samples=10, **settings):
    torch.manual_seed(0)
    settings = {"radius": 1.0, "temperature_min": 0.05, "temperature_max": 0.5, "dropout": 0.0, **settings}
    return TempNetContrastiveLoss(num_samples, 5, prototypes=8, **settings).double()


def global_contrastive(images, texts, image_temperature, text_temperature):
    """mean_i tau_i log mean_{j != i} exp(D_ij / tau_i) for both directions, anchor by anchor."""
    total = 0.0
    for anchors, others, temperature in (
        (images, texts, image_temperature),
        (texts, images, text_temperature),
    ):
        for i in range(len(anchors)):
            gaps = [anchors[i] @ (others[j] - others[i]) for j in range(len(anchors)) if j != i]
            mean = torch.stack([(gap / temperature[i]).exp() for gap in gaps]).mean()
            total = total + temperature[i] * mean.log() / len(anchors)
    return total


def test_without_memory_the_encoders_gradient_is_that_of_the_global_contrastive_loss():
    images, texts = (x.requires_grad_() for x in pairs())
    loss = contrast(momentum=1.0)
    out = loss(images, texts, index=torch.arange(6))
    found = torch.autograd.grad(out.loss, (images, texts), retain_graph=True)
    # Scaling to norm 1 leaves the tangent part of the gradient, so the reference is scaled too.
    objective = global_contrastive(
        F.normalize(images, dim=1), F.normalize(texts, dim=1), out.image_temperature, out.text_temperature
    )
    for gradient, expected in zip(found, torch.autograd.grad(objective, (images, texts)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    assert torch.autograd.grad(out.temperature_loss, images, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out.loss, loss.image_net.bias, allow_unused=True) == (None,)


def test_without_memory_the_networks_gradient_is_the_derivative_in_tau_plus_the_radius():
    images, texts = pairs()
    loss = contrast(momentum=1.0, radius=1.3)
    out = loss(images, texts, index=torch.arange(6))
    networks = [*loss.image_net.parameters(), *loss.text_net.parameters()]
    found = torch.autograd.grad(out.temperature_loss, networks)
    image_temperature, text_temperature = loss.image_net(images), loss.text_net(texts)
    objective = global_contrastive(images, texts, image_temperature, text_temperature)
    objective = objective + 1.3 * (image_temperature.mean() + text_temperature.mean())
    for gradient, expected in zip(found, torch.autograd.grad(objective, networks), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def sogclr(steps, momentum, temperatures, radius):
    """The official update, one anchor at a time: sums s scaled by a running maximum b."""
    state = {}
    for images, texts, index in steps:
        values = [0.0, 0.0]
        for side, (anchors, others) in enumerate(((images, texts), (texts, images))):
            for i, place in enumerate(index.tolist()):
                tau = float(temperatures[side][i])
                gaps = [float(anchors[i] @ (others[j] - others[i])) for j in range(len(anchors))]
                x = [gap / tau for gap in gaps]
                s_old, b_old = state.get((side, place), (None, 0.0))
                b = max(b_old, *x)
                g = sum(math.exp(x[j] - b) for j in range(len(x)) if j != i)
                s = g if s_old is None else (1 - momentum) * s_old * math.exp(b_old - b) + momentum * g
                state[side, place] = (s, b)
                w = [math.exp(x[j] - b) / s if j != i else 0.0 for j in range(len(x))]
                values[0] += sum(wj * gap for wj, gap in zip(w, gaps, strict=True)) / len(anchors)
                values[1] += (
                    tau
                    * (math.log(s / (len(x) - 1)) + b + radius - sum(a * c for a, c in zip(w, x, strict=True)))
                    / len(anchors)
                )
    return values, state


def test_with_constant_temperatures_the_losses_and_averages_are_those_of_sogclr():
    loss = contrast(momentum=0.8, radius=1.0)
    order = [[0, 1, 2, 3, 4, 5], [9, 3, 1, 0, 7, 2], [2, 9, 8, 6, 0, 1]]
    steps = [(*pairs(seed=seed), torch.tensor(index)) for seed, index in enumerate(order)]
    for net, bias in ((loss.image_net, 0.5), (loss.text_net, -0.5)):
        net.importance.data.zero_()  # one temperature a direction, whatever the embedding
        net.bias.data.fill_(bias)
    tau_image, tau_text = loss.image_net.predict(steps[0][0]), loss.text_net.predict(steps[0][1])
    for images, texts, index in steps:
        out = loss(images, texts, index=index)
    (value, temperature_value), state = sogclr(steps, 0.8, (tau_image, tau_text), 1.0)
    assert out.loss.item() == pytest.approx(value, abs=1e-10)
    assert out.temperature_loss.item() == pytest.approx(temperature_value, abs=1e-10)
    for side, log_sums in enumerate((loss.image_log_sum, loss.text_log_sum)):
        seen = {place: math.log(s) + b for (which, place), (s, b) in state.items() if which == side}
        assert log_sums.isfinite().nonzero().flatten().tolist() == sorted(seen)
        for place, expected in seen.items():
            assert log_sums[place].item() == pytest.approx(expected, abs=1e-10)


def test_evaluation_leaves_the_moving_averages_alone():
    images, texts = pairs()
    loss = contrast()
    loss(images, texts, index=torch.arange(6))
    before = loss.image_log_sum.clone()
    loss.eval()(*pairs(seed=1), index=torch.arange(6))
    assert torch.equal(loss.image_log_sum, before)


def test_swapping_the_modalities_swaps_the_directions():
    images, texts = pairs()
    loss = contrast()
    loss.text_net.load_state_dict(loss.image_net.state_dict())
    out = loss(images, texts, index=torch.arange(6))
    image_sums = loss.image_log_sum.clone()
    loss.image_log_sum.fill_(-math.inf)
    loss.text_log_sum.fill_(-math.inf)
    swapped = loss(texts, images, index=torch.arange(6))
    torch.testing.assert_close(swapped.loss, out.loss)
    torch.testing.assert_close(swapped.image_temperature, out.text_temperature)
    torch.testing.assert_close(loss.text_log_sum, image_sums)


def test_contrastive_state_travels_and_stays_in_float32():
    images, texts = pairs()
    loss = contrast().float().to(torch.bfloat16)
    out = loss(images.bfloat16(), texts.bfloat16(), index=torch.arange(6))
    assert out.loss.dtype == loss.image_log_sum.dtype == torch.float32
    full = contrast().float()(images.bfloat16().float(), texts.bfloat16().float(), index=torch.arange(6))
    torch.testing.assert_close(out.loss, full.loss)
    other = contrast().float()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.text_log_sum, loss.text_log_sum)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_contrastive_loss_is_finite_at_the_coldest_temperature_and_extreme_pairs(sign):
    images = torch.eye(5)[:4].requires_grad_()
    loss = TempNetContrastiveLoss(100, 5, radius=2.0)
    loss.image_net.bias.data.fill_(-20.0)  # the sum of its exponentials is exp(-200) or exp(200), beyond float32
    for _ in range(3):
        out = loss(images, sign * images, index=torch.arange(4))
    (out.loss + out.temperature_loss).backward()
    assert images.grad.isfinite().all()
    assert loss.image_net.importance.grad.isfinite().all()
    assert loss.image_log_sum[:4].isfinite().all()


@pytest.mark.untyped
def test_contrastive_loss_compiles_without_a_graph_break():
    images, texts = pairs()
    eager, traced = contrast(), contrast()
    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = eager(images, texts, index=torch.arange(6))
        found = compiled(images, texts, index=torch.arange(6))
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(traced.image_log_sum, eager.image_log_sum)


# --- errors ---


@pytest.mark.parametrize(("radius", "edge"), [(0.0, "temperature_max"), (math.log(CLASSES), "temperature_min")])
def test_a_radius_outside_its_range_warns_and_drives_the_temperature_to_the_named_edge(radius, edge):
    scores, target, _ = batch()
    box = {"temperature_min": 0.1, "temperature_max": 5.0}
    with pytest.warns(UserWarning, match=edge):
        found = exact_temperature(scores, radius=radius, **box)
    torch.testing.assert_close(found, torch.full_like(found, box[edge]), rtol=1e-10, atol=0)
    with pytest.warns(UserWarning, match=edge):
        RobustTemperatureLoss.for_classes(CLASSES, radius=radius).double()(scores, target)


def test_a_contrastive_radius_beyond_the_data_set_warns():
    with pytest.warns(UserWarning, match="temperature_min"):
        contrast(num_samples=10, radius=math.log(9))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TempNet(0), "in_features"),
        (lambda: TempNet(3, hidden=0), "hidden"),
        (lambda: TempNet(3, kind="linear"), "kind"),
        (lambda: TempNet(3, temperature_min=2.0), "temperature_min must be below"),
        (lambda: TempNet(3, temperature_min=0.0), "temperature_min"),
        (lambda: TempNet(3, dropout=1.0), "dropout"),
        (lambda: TempNet(3, pooling_temperature=0.0), "pooling_temperature"),
        (lambda: RobustTemperatureLoss(TempNet(3), radius=-1.0), "radius"),
        (lambda: RobustTemperatureLoss.for_classes(1), "num_classes"),
        (lambda: TempNetContrastiveLoss(1, 3), "num_samples"),
        (lambda: TempNetContrastiveLoss(99, 3, radius=2.0, momentum=0.0), "momentum"),
        (lambda: exact_temperature(torch.zeros(2, 3), radius=1.0, temperature_min=2.0, temperature_max=1.0), "below"),
        (
            lambda: exact_temperature(
                torch.full((2, 3), math.nan), radius=1.0, temperature_min=0.1, temperature_max=1.0
            ),
            "NaN",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.untyped
@pytest.mark.parametrize("temperature", [0.0, torch.tensor([1.0, -1.0]), torch.ones(2, 1), torch.ones(3)], ids=str)
def test_a_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must"):
        robust_temperature_loss(torch.zeros(2, 3), torch.tensor([0, 1]), temperature=temperature, radius=0.5)


@pytest.mark.untyped
def test_a_malformed_contrastive_batch_is_refused():
    images, texts = pairs()
    loss = contrast()
    with pytest.raises(ValueError, match="share one shape"):
        loss(images, texts[:5], index=torch.arange(6))
    with pytest.raises(ValueError, match="at least 2 pairs"):
        loss(images[:1], texts[:1], index=torch.arange(1))
    with pytest.raises(ValueError, match=r"index must lie in \[0, 9\]"):
        loss(images, texts, index=torch.arange(5, 11))
    with pytest.raises(ValueError, match="texts contains NaN"):
        loss(images, texts * math.nan, index=torch.arange(6))
    with pytest.raises(TypeError, match="images"):
        loss(images.long(), texts, index=torch.arange(6))
