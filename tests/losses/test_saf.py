"""SAF and MESA against their mathematics (Du et al. 2022)."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimand import training
from minimand.losses import ALDRKLLoss, LDRKLLoss, MESALoss, SAFLoss, trajectory_kl
from minimand.training import Recipe

F64 = torch.float64


def scores(rows=12, classes=5, seed=0, scale=3.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, generator=generator, dtype=dtype)


def labels(rows=12, classes=5, seed=9):
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def run_through(loss, outputs, target, epochs):
    """Give the loss the same batch of each epoch's scores; return its values."""
    index = torch.arange(len(target))
    values = []
    for epoch in range(epochs):
        loss.start_epoch(epoch)
        values.append(loss(outputs(epoch), target, index=index))
    return values


# The trajectory term.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_the_term_and_its_gradient_vanish_where_the_scores_are_the_reference(temperature):
    input = scores().requires_grad_()
    value = trajectory_kl(input, input, temperature=temperature)
    value.backward()
    assert abs(value.item()) < 1e-12
    assert input.grad.abs().max() < 1e-8


@given(temperature=st.floats(0.2, 50.0), seed=st.integers(0, 50))
def test_the_term_is_positive_elsewhere(temperature, seed):
    assert trajectory_kl(scores(seed=seed), scores(seed=seed + 100), temperature=temperature).item() > 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 5.0])
def test_gradient_is_temperature_times_the_difference_of_the_predictions_over_the_batch(temperature):
    input, reference = scores(seed=1).requires_grad_(), scores(seed=2)
    trajectory_kl(input, reference, temperature=temperature).backward()
    p, p_reference = (torch.softmax(z / temperature, 1) for z in (input.detach(), reference))
    torch.testing.assert_close(input.grad, temperature * (p - p_reference) / 12, rtol=0, atol=1e-12)
    assert input.grad.sum(1).abs().max() < 1e-12


def test_no_gradient_flows_to_the_reference():
    reference = scores(seed=2).requires_grad_()
    trajectory_kl(scores().requires_grad_(), reference).backward()
    assert reference.grad is None


def test_the_term_tends_to_half_the_variance_of_the_change_as_temperature_grows():
    input, reference = scores(seed=1), scores(seed=2)
    term = trajectory_kl(input, reference, temperature=1e3, reduction="none")
    expected = 0.5 * (input - reference).var(1, unbiased=False)
    torch.testing.assert_close(term, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_term_is_the_distillation_loss_of_hinton_with_the_reference_as_teacher(temperature):
    input, reference = scores(seed=1), scores(seed=2)
    student = torch.log_softmax(input / temperature, 1)
    teacher = torch.softmax(reference / temperature, 1)
    expected = temperature**2 * F.kl_div(student, teacher, reduction="batchmean")
    torch.testing.assert_close(trajectory_kl(input, reference, temperature=temperature), expected, rtol=0, atol=1e-12)


@given(shift=st.floats(-50, 50), other=st.floats(-50, 50))
def test_the_term_ignores_a_shift_of_either_side(shift, other):
    input, reference = scores(seed=1), scores(seed=2)
    rows = torch.linspace(-1, 1, 12, dtype=F64)[:, None]
    torch.testing.assert_close(
        trajectory_kl(input + shift * rows, reference + other * rows), trajectory_kl(input, reference)
    )


def test_the_term_of_a_map_of_scores_is_that_of_each_position():
    input, reference = scores(24, seed=1), scores(24, seed=2)
    expected = trajectory_kl(input, reference, reduction="none").reshape(2, 3, 4)
    maps = [z.reshape(2, 3, 4, 5).movedim(-1, 1) for z in (input, reference)]
    torch.testing.assert_close(trajectory_kl(*maps, reduction="none"), expected)


def test_the_term_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda z: trajectory_kl(z, scores(seed=2)), scores(seed=1).requires_grad_())


# SAF.


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5])
def test_the_ring_gives_back_the_scores_of_lag_epochs_ago_for_every_sample(lag):
    loss = SAFLoss(7, lag=lag, after_epoch=lag, strength=1.0, dtype=F64, reduction="none")
    target = labels(7)

    def outputs(epoch):
        return scores(7, seed=epoch)

    values = run_through(loss, outputs, target, 14)
    for epoch in range(lag + 1, 14):
        term = trajectory_kl(outputs(epoch), outputs(epoch - lag), reduction="none")
        expected = F.cross_entropy(outputs(epoch), target, reduction="none") + term
        torch.testing.assert_close(values[epoch], expected, rtol=0, atol=1e-10)


def test_saf_is_its_base_loss_bit_for_bit_up_to_after_epoch_and_from_before_epoch():
    loss = SAFLoss(12, lag=2, after_epoch=4, before_epoch=8)
    target = labels()
    values = run_through(loss, lambda epoch: scores(seed=epoch), target, 10)
    for epoch, value in enumerate(values):
        plain = F.cross_entropy(scores(seed=epoch), target, reduction="none").mean()
        assert torch.equal(value, plain) == (not 4 < epoch < 8)


def test_saf_is_its_base_loss_while_the_model_stands_still():
    input, target = scores(scale=1.0).float(), labels()
    loss = SAFLoss(12, strength=1.0)
    for value in run_through(loss, lambda epoch: input, target, 12):
        torch.testing.assert_close(value, F.cross_entropy(input, target), rtol=0, atol=1e-6)


def test_what_is_remembered_follows_the_index_not_the_position_in_the_batch():
    loss = SAFLoss(20, lag=1, after_epoch=1, dtype=F64, strength=1.0)
    order = torch.tensor([17, 3, 0, 9, 8, 5])
    first, second = scores(6, seed=1), scores(6, seed=2)
    loss.start_epoch(1)
    loss(first, labels(6), index=order)
    assert (loss.written >= 0).any(0).nonzero()[:, 0].tolist() == [0, 3, 5, 8, 9, 17]
    loss.start_epoch(2)
    back = torch.tensor([5, 4, 3, 2, 1, 0])
    found = loss.trajectory(second[back], order[back])
    torch.testing.assert_close(found, trajectory_kl(second, first, reduction="none")[back])


def test_a_sample_that_was_left_out_lag_epochs_ago_has_no_term():
    loss = SAFLoss(4, lag=1, after_epoch=1, dtype=F64)
    loss.start_epoch(0)  # the slot that epoch 2 would read, were it not skipped by sample 3
    loss.remember(scores(4, seed=0), torch.arange(4))
    loss.start_epoch(2)
    loss.remember(scores(3, seed=2), torch.arange(3))
    loss.start_epoch(3)
    found = loss.trajectory(scores(4, seed=3), torch.arange(4))
    torch.testing.assert_close(found[:3], trajectory_kl(scores(4, seed=3)[:3], scores(3, seed=2), reduction="none"))
    assert found[3] == 0


def test_half_precision_storage_keeps_huge_scores_with_the_probabilities_they_mean():
    loss = SAFLoss(2, lag=1, after_epoch=1)
    huge = torch.tensor([[1e6, 1e6 - 2.0, 0.0], [-1e8, 3.0, 1.0]], dtype=F64)
    present = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 3.0]], dtype=F64)
    loss.start_epoch(1)
    loss.remember(huge, torch.arange(2))
    loss.start_epoch(2)
    term = loss.trajectory(present, torch.arange(2))
    torch.testing.assert_close(term, trajectory_kl(present, huge, reduction="none"), rtol=1e-6, atol=0)


def test_evaluation_mode_remembers_nothing_and_needs_no_index():
    loss = SAFLoss(12, num_classes=5)
    loss.start_epoch(0)
    loss.eval()
    torch.testing.assert_close(loss(scores(), labels()), F.cross_entropy(scores(), labels()))
    loss(scores(), labels(), index=torch.arange(12))
    assert (loss.written == -1).all()


def test_the_term_is_added_to_any_base_loss_with_its_state_and_hooks():
    base = ALDRKLLoss(temperature=2.0, reduction="none")
    loss = SAFLoss(lag=1, after_epoch=1, base=base, strength=2.0, dtype=F64)
    loss.start(nn.Linear(1, 1), 12)
    assert loss.needs == ("index",)
    twin = copy.deepcopy(base).double()
    loss.double()
    values = run_through(loss, lambda epoch: scores(seed=epoch), labels(), 3)
    for epoch in range(3):
        plain = twin(scores(seed=epoch), labels(), index=torch.arange(12)).mean()
        term = trajectory_kl(scores(seed=2), scores(seed=1)) if epoch == 2 else 0.0
        torch.testing.assert_close(values[epoch], plain + 2.0 * term)
    input = scores(seed=1)
    assert torch.equal(SAFLoss(base=LDRKLLoss(3.0, reduction="none")).link(input), LDRKLLoss(3.0).link(input))


@pytest.mark.untyped
def test_saf_survives_compile_while_it_remembers():
    plain, traced = (SAFLoss(12, num_classes=5, lag=1, after_epoch=1) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for epoch in range(4):
        plain.start_epoch(epoch)
        traced.start_epoch(epoch)
        batch = scores(seed=epoch).float(), labels()
        value = compiled(*batch, index=torch.arange(12))
        torch.testing.assert_close(value, plain(*batch, index=torch.arange(12)))
    assert torch.equal(plain.outputs, traced.outputs)


def outputs_of(epoch):
    return scores(seed=epoch).float()


def test_training_resumed_from_the_state_dict_goes_on_as_if_it_had_not_stopped():
    loss = SAFLoss(12, lag=2, after_epoch=2)
    expected = run_through(loss, outputs_of, labels(), 8)
    stopped = SAFLoss(12, lag=2, after_epoch=2)
    run_through(stopped, outputs_of, labels(), 5)
    resumed = SAFLoss(lag=2, after_epoch=2)  # sized by the state
    resumed.load_state_dict(stopped.state_dict())
    for epoch in range(5, 8):
        resumed.start_epoch(epoch)
        assert torch.equal(resumed(outputs_of(epoch), labels(), index=torch.arange(12)), expected[epoch])


def test_a_file_holds_what_memory_would_and_a_new_loss_goes_on_with_it(tmp_path):
    expected = run_through(SAFLoss(12, lag=2, after_epoch=2), outputs_of, labels(), 8)
    on_file = functools.partial(SAFLoss, 12, num_classes=5, lag=2, after_epoch=2, storage=tmp_path / "outputs.bin")
    first = on_file()
    found = run_through(first, outputs_of, labels(), 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:5], strict=True))
    assert not first.state_dict()
    resumed = on_file()
    for epoch in range(5, 8):
        resumed.start_epoch(epoch)
        assert torch.equal(resumed(outputs_of(epoch), labels(), index=torch.arange(12)), expected[epoch])
    resumed.start(nn.Linear(1, 1), 12)
    assert (resumed.written == -1).all()
    with pytest.raises(ValueError, match="belongs to another training run"):
        SAFLoss(13, num_classes=5, lag=2, after_epoch=2, storage=tmp_path / "outputs.bin")


def test_fit_tells_saf_the_epoch_the_size_and_the_index():
    inputs, target = scores(64, 6).float(), labels(64, 3)
    model = training.seeded(lambda: training.mlp(6, 3, hidden=(8,)), 0)
    loss = SAFLoss(lag=2, after_epoch=2)
    training.fit(model, loss, inputs, target, recipe=Recipe(epochs=7, batch_size=32))
    assert loss.outputs.shape == (3, 64, 3)
    assert sorted(loss.written[:, 0].tolist()) == [4, 5, 6]
    plain = training.seeded(lambda: training.mlp(6, 3, hidden=(8,)), 0)
    training.fit(plain, nn.CrossEntropyLoss(), inputs, target, recipe=Recipe(epochs=7, batch_size=32))
    assert not torch.equal(plain[0].weight, model[0].weight)


# MESA.


def test_mesa_adds_the_term_of_the_averages_scores():
    model, inputs, target = training.seeded(lambda: nn.Linear(4, 5), 0), scores(12, 4).float(), labels()
    loss = MESALoss(model, strength=0.8)
    reference = model(inputs).detach()
    with torch.no_grad():
        model.weight += 0.5 * scores(5, 4, seed=3).float()
    input = model(inputs)
    expected = F.cross_entropy(input, target) + 0.8 * trajectory_kl(input, reference)
    torch.testing.assert_close(loss(input, target, inputs=inputs), expected)


def moved(model, seed):
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)


def test_an_average_without_memory_is_the_model_and_has_no_term():
    model, inputs = training.seeded(lambda: training.mlp(4, 5, hidden=(6,)), 0), scores(12, 4).float()
    loss = MESALoss(model, decay=0.0)
    for seed in range(3):
        moved(model, seed)
        assert loss.trajectory(model(inputs), inputs).max() > 0.01
        loss.after_step(model)
        assert loss.trajectory(model(inputs), inputs).abs().max() < 1e-6


def test_an_average_that_only_remembers_keeps_the_weights_it_started_from():
    model = training.seeded(lambda: training.mlp(4, 5, hidden=(6,)), 0)
    start = copy.deepcopy(model.state_dict())
    loss = MESALoss(model, decay=1.0)
    for seed in range(3):
        moved(model, seed)
        loss.after_step(model)
    assert all(torch.equal(value, start[name]) for name, value in loss.average.state_dict().items())


def test_the_average_of_a_linear_models_weights_gives_the_average_of_its_outputs():
    model, inputs = training.seeded(lambda: nn.Linear(4, 5), 0).double(), scores(12, 4)
    loss = MESALoss(model, decay=0.7)
    average = model(inputs).detach()
    for seed in range(5):
        moved(model, seed)
        loss.after_step(model)
        average = 0.7 * average + 0.3 * model(inputs).detach()
        torch.testing.assert_close(loss.average(inputs), average, rtol=0, atol=1e-10)


def test_running_statistics_are_averaged_and_counters_copied_and_the_average_stays_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    loss = MESALoss(model, decay=0.9).train()
    old = model[1].running_mean.clone()
    model(scores(12, 4).float())
    loss.after_step(model)
    torch.testing.assert_close(loss.average[1].running_mean, 0.9 * old + 0.1 * model[1].running_mean)
    assert loss.average[1].num_batches_tracked == 1
    assert not any(module.training for module in loss.average.modules())
    inputs = scores(12, 4).float()
    assert torch.equal(loss.average(inputs), loss.average(inputs))


def test_the_average_is_neither_trained_nor_shared_with_the_model():
    model, inputs = training.seeded(lambda: nn.Linear(4, 5), 0), scores(12, 4).float()
    loss = MESALoss(model, decay=0.5)
    moved(model, 0)
    before = copy.deepcopy(loss.average.state_dict())
    loss(model(inputs), labels(), inputs=inputs).backward()
    assert all(not value.requires_grad and value.grad is None for value in loss.parameters())
    assert all(torch.equal(value, before[name]) for name, value in loss.average.state_dict().items())


def test_the_average_of_a_stacked_model_copies_its_own_slice_only():
    models = [training.seeded(lambda: training.mlp(4, 5, hidden=(6,)), seed) for seed in range(8)]
    parameters, _ = torch.func.stack_module_state(models)
    view = training._view(models[3], parameters, 3)
    loss = MESALoss()
    loss.start(view, 100)
    for mine, own in zip(loss.average.parameters(), models[3].parameters(), strict=True):
        assert torch.equal(mine, own)
        assert mine.untyped_storage().nbytes() == own.numel() * own.element_size()
        assert mine.data_ptr() not in {value[3].data_ptr() for value in parameters.values()}


def test_a_half_precision_model_has_an_average_that_moves():
    model, inputs = training.seeded(lambda: nn.Linear(4, 5), 0).bfloat16(), scores(12, 4).bfloat16()
    loss = MESALoss(model, decay=0.9995)
    start = loss.average.weight.clone()
    moved(model, 0)
    loss.after_step(model)
    expected = start + 0.0005 * (model.weight.float() - start)
    torch.testing.assert_close(loss.average.weight, expected.detach(), rtol=0, atol=1e-7)
    assert not torch.equal(loss.average.weight, start)
    assert loss(model(inputs), labels(), inputs=inputs).dtype == torch.bfloat16


def test_the_term_waits_for_the_warm_up():
    model, inputs, target = training.seeded(lambda: nn.Linear(4, 5), 0), scores(12, 4).float(), labels()
    loss = MESALoss(model, warmup_steps=2, decay=1.0)
    moved(model, 0)
    for step in range(4):
        value = loss(model(inputs), target, inputs=inputs)
        plain = F.cross_entropy(model(inputs), target, reduction="none").mean()
        assert torch.equal(value, plain) == (step < 2)
        loss.after_step(model)


def test_mesa_takes_maps_of_scores():
    model, target = training.seeded(lambda: nn.Conv2d(2, 5, 1), 0), labels(24).reshape(2, 3, 4)
    inputs = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    loss = MESALoss(model, strength=0.5, reduction="none")
    reference = model(inputs).detach()
    moved(model, 0)
    expected = F.cross_entropy(model(inputs), target, reduction="none") + 0.5 * trajectory_kl(
        model(inputs), reference, reduction="none"
    )
    torch.testing.assert_close(loss(model(inputs), target, inputs=inputs), expected)


def test_the_average_and_its_steps_travel_in_the_state_dict():
    model = training.seeded(lambda: nn.Linear(4, 5), 0)
    loss = MESALoss(model, decay=0.5)
    moved(model, 0)
    loss.after_step(model)
    other = MESALoss(nn.Linear(4, 5))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.average.weight, loss.average.weight)
    assert other.steps == 1


def test_start_begins_the_average_anew():
    first, second = nn.Linear(4, 5), nn.Linear(4, 5)
    loss = MESALoss(first)
    loss.after_step(first)
    loss.start(second, 100)
    assert torch.equal(loss.average.weight, second.weight)
    assert loss.steps == 0


def test_mesa_in_evaluation_mode_needs_no_inputs():
    loss = MESALoss(nn.Linear(4, 5)).eval()
    torch.testing.assert_close(loss(scores(), labels()), F.cross_entropy(scores(), labels()))


# Refusals.


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAFLoss(strength=-1.0), "strength"),
        (lambda: SAFLoss(temperature=0.0), "temperature"),
        (lambda: SAFLoss(lag=0), "lag must be at least 1"),
        (lambda: SAFLoss(lag=4, after_epoch=3), "after_epoch must be at least lag"),
        (lambda: SAFLoss(base=nn.CrossEntropyLoss()), "base must have reduction='none'"),
        (lambda: SAFLoss(10, storage="outputs.bin"), "num_classes is required"),
        (lambda: MESALoss(decay=1.5), "decay"),
        (lambda: MESALoss(warmup_steps=-1), "warmup_steps"),
        (lambda: MESALoss(strength=math.nan), "strength"),
        (lambda: trajectory_kl(scores(), scores()[:3]), "reference must have input's shape"),
        (lambda: trajectory_kl(scores() * math.nan, scores()), "NaN"),
        (lambda: trajectory_kl(scores(), scores() * math.nan), "reference contains NaN"),
        (lambda: trajectory_kl(scores()[:0], scores()[:0]), "input is empty"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.untyped
def test_misuse_is_refused():
    loss = SAFLoss(12, num_classes=5)
    with pytest.raises(RuntimeError, match="start_epoch"):
        loss(scores(), labels(), index=torch.arange(12))
    loss.start_epoch(3)
    with pytest.raises(ValueError, match="index is required"):
        loss(scores(), labels())
    with pytest.raises(ValueError, match=r"index must lie in \[0, 11\]"):
        loss(scores(), labels(), index=torch.arange(12) + 1)
    with pytest.raises(ValueError, match="num_classes = 5 classes, got 4"):
        loss(scores(classes=4), labels(classes=4), index=torch.arange(12))
    with pytest.warns(UserWarning, match="epoch goes back from 3 to 2"):
        loss.start_epoch(2)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        loss.start_epoch(-1)
    with pytest.raises(TypeError, match="dtype"):
        SAFLoss(dtype=torch.int8)
    with pytest.raises(TypeError, match="base must be"):
        SAFLoss(base=3)


@pytest.mark.untyped
def test_mesa_refuses_what_is_not_its_model():
    with pytest.raises(RuntimeError, match="model is required"):
        MESALoss()(scores(), labels(), inputs=scores())
    loss = MESALoss(nn.Linear(4, 5))
    with pytest.raises(ValueError, match="inputs is required"):
        loss(scores(), labels())
    with pytest.raises(ValueError, match="scores of inputs"):
        loss(scores(classes=3), labels(classes=3), inputs=torch.zeros(12, 4))
    with pytest.raises(ValueError, match="weights that the average was started from"):
        loss.after_step(nn.Linear(4, 6))


def test_a_batch_that_is_refused_is_not_remembered():
    loss = SAFLoss(12, num_classes=5)
    loss.start_epoch(0)
    broken = scores()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        loss(broken, labels(), index=torch.arange(12))
    assert (loss.written == -1).all()
