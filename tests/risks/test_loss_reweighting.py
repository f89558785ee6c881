"""Dynamic loss reweighting against its mathematics (Sow et al. 2025)."""

import math
import socket
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.risks import DynamicLossReweighting, loss_weights, sequence_losses

F64 = torch.float64
STRATEGIES = ["uniform", "linupper", "quadratic", "extremes", "upper"]
pytestmark = pytest.mark.filterwarnings("ignore:losses carry no gradient")

any_losses = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=30)


def losses_of(seed, size=40):
    return 3 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def scaled(losses):
    return (2 * losses - losses.max() - losses.min()) / (losses.max() - losses.min())


SCORES = {
    "uniform": torch.zeros_like,
    "linupper": lambda h: torch.minimum(h + 1, torch.ones_like(h)),
    "quadratic": lambda h: 1 - h**2,
    "extremes": torch.abs,
    "upper": lambda h: (h + 1) / 2,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_weights_are_the_softmax_of_the_strategys_scores(strategy, temperature):
    losses = losses_of(0)
    weights = loss_weights(losses, strategy=strategy, temperature=temperature)
    e = (SCORES[strategy](scaled(losses)) / temperature).exp()
    torch.testing.assert_close(weights, e / e.sum(), rtol=0, atol=1e-12)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (weights >= 0).all()


def test_the_uniform_strategy_is_the_mean():
    losses = losses_of(1)
    torch.testing.assert_close(DynamicLossReweighting("uniform")(losses), losses.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_tend_to_uniform_as_temperature_grows(strategy):
    weights = loss_weights(losses_of(2), strategy=strategy, temperature=1e9)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 40), rtol=0, atol=1e-10)


def test_linupper_at_vanishing_temperature_shares_all_weight_among_the_upper_half():
    losses = losses_of(3)
    upper = scaled(losses) >= 0
    weights = loss_weights(losses, temperature=1e-4)
    torch.testing.assert_close(weights, upper.to(F64) / upper.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_ignore_a_shift_and_a_rescaling_of_the_losses(strategy):
    losses = losses_of(4)
    expected = loss_weights(losses, strategy=strategy)
    for scale, shift in ((1.0, 100.0), (1e3, -7.0), (1e-3, 0.5)):
        changed = loss_weights(scale * losses + shift, strategy=strategy)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("strategy", "even"), [("quadratic", True), ("extremes", True), ("linupper", False)])
def test_only_the_even_strategies_ignore_the_sign_of_the_losses(strategy, even):
    losses = losses_of(5)
    change = (loss_weights(-losses, strategy=strategy) - loss_weights(losses, strategy=strategy)).abs().max()
    assert (change < 1e-10) == even


@settings(max_examples=100, deadline=None)
@given(losses=any_losses, temperature=st.floats(0.1, 5.0))
def test_linupper_weights_rise_with_the_loss_and_differ_by_at_most_exp_of_one_over_the_temperature(losses, temperature):
    x = torch.tensor(losses, dtype=F64)
    weights = loss_weights(x, temperature=temperature)
    assert (weights[x.argsort()].diff() >= -1e-12).all()
    assert weights.max() / weights.min() <= math.exp(1 / temperature) * (1 + 1e-9)
    assert weights.max() <= 1 / (1 + (len(x) - 1) * math.exp(-1 / temperature)) + 1e-9


@settings(max_examples=100, deadline=None)
@given(losses=any_losses, strategy=st.sampled_from(["linupper", "upper"]))
def test_chebyshev_the_reweighted_loss_is_at_least_the_mean_when_weights_rise_with_the_loss(losses, strategy):
    x = torch.tensor(losses, dtype=F64)
    weights = loss_weights(x, strategy=strategy, temperature=0.4)
    assert ((weights - 1 / len(x)) * x).sum() >= -1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_descent_with_any_weights_keeps_the_two_bounds_of_the_theorem(strategy):
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(200, 20, generator=generator, dtype=F64)
    best = torch.randn(20, generator=generator, dtype=F64)
    smoothness = inputs.square().sum(1).max()
    rate = 0.5 / smoothness
    theta = torch.zeros(20, dtype=F64, requires_grad=True)
    start = best.square().sum()
    bound = start / (2 * rate * (1 - rate * smoothness))
    steps, weighted, plain, gain = 300, 0.0, 0.0, 0.0
    risk = DynamicLossReweighting(strategy, temperature=0.4)
    for _ in range(steps):
        losses = (inputs @ (theta - best)).square() / 2
        value = risk(losses)
        (gradient,) = torch.autograd.grad(value, theta)
        weighted += value.item()
        plain += losses.mean().item()
        gain += ((risk.last_weights - 1 / 200) * losses).sum().item()
        distance = (theta - best).square().sum()
        with torch.no_grad():
            theta -= rate * gradient
        # The one-step inequality behind both.
        assert (theta - best).square().sum() <= distance - 2 * rate * (1 - rate * smoothness) * value + 1e-9
    assert weighted <= bound
    assert plain / steps <= (bound - gain) / steps + 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_other_weights_gain_more_after_paying_for_their_divergence_from_uniform(strategy):
    losses = losses_of(7)
    scores, temperature = SCORES[strategy](scaled(losses)), 0.4

    def objective(w):
        return w @ scores - temperature * ((torch.special.xlogy(w, w)).sum(-1) + math.log(40))

    weights = loss_weights(losses, strategy=strategy, temperature=temperature)
    tried = torch.distributions.Dirichlet(torch.full((40,), 0.7, dtype=F64)).sample((2000,))
    for share in (1.0, 0.1, 0.01):
        assert (objective((1 - share) * weights + share * tried) < objective(weights)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gradient_treats_the_weights_as_constants(strategy):
    inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(8), dtype=F64)
    theta = torch.ones(5, dtype=F64, requires_grad=True)
    risk = DynamicLossReweighting(strategy, temperature=0.4)
    risk((inputs @ theta).square()).backward()
    expected = (risk.last_weights[:, None] * 2 * (inputs @ theta.detach())[:, None] * inputs).sum(0)
    torch.testing.assert_close(theta.grad, expected, rtol=0, atol=1e-10)
    assert not risk.last_weights.requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678, -3e30])
def test_equal_losses_get_exactly_equal_weights(strategy, value):
    weights = loss_weights(torch.full((16,), value), strategy=strategy, temperature=0.01)
    assert torch.equal(weights, torch.full((16,), 1 / 16))


def test_doubling_delta_halves_the_temperature_but_for_quadratic():
    losses = losses_of(9)
    for strategy in ("linupper", "extremes", "upper"):
        torch.testing.assert_close(
            loss_weights(losses, strategy=strategy, delta=2.0),
            loss_weights(losses, strategy=strategy, temperature=0.5),
        )
    torch.testing.assert_close(
        loss_weights(losses, strategy="quadratic", delta=2.0), loss_weights(losses, strategy="quadratic")
    )


def test_a_callable_strategy_scores_the_scaled_losses():
    losses = losses_of(10)
    torch.testing.assert_close(
        loss_weights(losses, strategy=lambda h: 1 - h.square()), loss_weights(losses, strategy="quadratic")
    )


def test_quantile_scaling_keeps_an_outlier_from_taking_the_weight():
    losses = losses_of(11)
    losses[0] = 1e6
    plain = loss_weights(losses, temperature=0.2)
    robust = loss_weights(losses, temperature=0.2, normalize=("quantile", 0.9))
    assert plain[0] > 0.75
    assert robust[0] < 0.1
    h = torch.quantile(losses, torch.tensor([0.1, 0.9], dtype=F64))
    e = (SCORES["linupper"]((2 * losses.clamp(*h) - h.sum()) / (h[1] - h[0])) / 0.2).exp()
    torch.testing.assert_close(robust, e / e.sum())
    torch.testing.assert_close(loss_weights(losses, normalize=("quantile", 1.0)), loss_weights(losses))


def test_warm_up_steps_are_uniform_and_only_training_counts_steps():
    losses = losses_of(12).requires_grad_()
    risk = DynamicLossReweighting(temperature=0.1, warmup_steps=2)
    for _ in range(2):
        torch.testing.assert_close(risk(losses), losses.mean())
    risk.eval()
    risk(losses)
    assert risk.step.item() == 2
    risk.train()
    expected = (loss_weights(losses, temperature=0.1) * losses).sum()
    torch.testing.assert_close(risk(losses), expected)
    other = DynamicLossReweighting(temperature=0.1, warmup_steps=2)
    other.load_state_dict(risk.state_dict())
    assert other.step.item() == 3


def test_a_schedule_sets_the_temperature_of_each_step():
    losses = losses_of(13)
    risk = DynamicLossReweighting(temperature_schedule=lambda step: 2.0 / (step + 1))
    for step in range(3):
        risk(losses)
        torch.testing.assert_close(risk.last_weights, loss_weights(losses, temperature=2.0 / (step + 1)))


def test_a_batch_of_one_is_its_loss():
    assert DynamicLossReweighting()(torch.tensor([2.5])).item() == 2.5


def test_sequence_losses_are_mean_token_cross_entropies():
    generator = torch.Generator().manual_seed(14)
    logits = torch.randn(3, 6, 9, generator=generator, dtype=F64)
    labels = torch.randint(9, (3, 6), generator=generator)
    labels[0, 3:] = -100
    labels[2] = -100
    losses, active = sequence_losses(logits, labels)
    assert active.tolist() == [2, 5, 0]
    for row in (0, 1):
        expected = F.cross_entropy(logits[row, :-1], labels[row, 1:])
        torch.testing.assert_close(losses[row], expected)
    assert losses[2] == 0
    unshifted, active = sequence_losses(logits, labels, shift=False)
    assert active.tolist() == [3, 6, 0]
    torch.testing.assert_close(unshifted[1], F.cross_entropy(logits[1], labels[1]))


def test_a_sequence_without_a_counted_token_has_no_gradient_and_no_nan():
    logits = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    losses, _ = sequence_losses(logits, torch.full((2, 3), -100))
    losses.sum().backward()
    assert (logits.grad == 0).all()


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _device(rank, port, parts, queue):
    """One device of the two: average the gradients as DistributedDataParallel does, and report them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(parts)
    )
    try:
        found = []
        for warmup in (0, 1):
            theta = torch.ones(5, dtype=F64, requires_grad=True)
            risk = DynamicLossReweighting(
                temperature=0.4, warmup_steps=warmup, process_group=torch.distributed.group.WORLD
            )
            risk((parts[rank] @ theta).square()).backward()
            torch.distributed.all_reduce(theta.grad)
            found.append((theta.grad / len(parts)).tolist())
        queue.put((rank, found, risk.last_weights.sum().item()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.untyped
def test_two_devices_with_batches_of_different_size_reproduce_the_gradient_of_one():
    inputs = torch.randn(21, 5, generator=torch.Generator().manual_seed(15), dtype=F64)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = _free_port()
    processes = [context.Process(target=_device, args=(rank, port, (inputs[:8], inputs[8:]), queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    reports = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sum(total for _, _, total in reports) == pytest.approx(1.0, abs=1e-12)
    for number, warmup in enumerate((0, 1)):
        theta = torch.ones(5, dtype=F64, requires_grad=True)
        DynamicLossReweighting(temperature=0.4, warmup_steps=warmup)((inputs @ theta).square()).backward()
        for _, found, _ in reports:
            torch.testing.assert_close(torch.tensor(found[number], dtype=F64), theta.grad, rtol=0, atol=1e-10)


def test_detached_losses_draw_a_warning_in_training_only():
    losses = losses_of(16)
    with pytest.warns(UserWarning, match="no gradient"):
        DynamicLossReweighting()(losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DynamicLossReweighting().eval()(losses)
        DynamicLossReweighting()(losses.clone().requires_grad_())
        with torch.no_grad():
            DynamicLossReweighting()(losses)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicLossReweighting("lower"), "strategy must be one of"),
        (lambda: DynamicLossReweighting(temperature=0.0), "temperature"),
        (lambda: DynamicLossReweighting(warmup_steps=-1), "warmup_steps"),
        (lambda: DynamicLossReweighting(normalize="std"), "normalize must be"),
        (lambda: DynamicLossReweighting(normalize=("quantile", 0.5)), "quantile must lie in"),
        (lambda: DynamicLossReweighting(temperature_schedule=lambda s: -1.0 * s)(torch.ones(2)), "temperature"),
        (lambda: loss_weights(torch.ones(3), delta=0.0), "delta"),
        (lambda: loss_weights(torch.ones(3), strategy=lambda h: h.sum()), "one score a sample"),
        (lambda: sequence_losses(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)), "logits must have shape"),
        (lambda: sequence_losses(torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.long)), "empty"),
        (lambda: sequence_losses(torch.zeros(2, 3, 4), torch.full((2, 3), 4)), "target must hold class indices"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
