"""EControl: exact SGD up to a shift, its limits, its fixed point, its bytes, and its rounds on two real processes."""

import itertools
import math
import os
import pathlib
import subprocess
import sys
import warnings

import econtrol_processes as processes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.optim import (
    EF21,
    EF21SGDM,
    CompressedDataParallel,
    CompressionState,
    EControl,
    ErrorFeedback,
    Identity,
    LowRank,
    Message,
    NaiveCompression,
    RandK,
    SignMean,
    TopK,
    WorkerState,
    econtrol_step,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKERS, DIM = 4, 30


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


COMPRESSORS = {
    "top-k": lambda: TopK(k=6),
    "top-k, rounded": lambda: TopK(0.2, dtype=torch.bfloat16),
    "rand-k": lambda: RandK(k=6, generator=generator()),
    "sign": SignMean,
    "low rank": lambda: LowRank(1, generator=generator()),
    "identity": Identity,
}
HOMOGENEOUS = [name for name in COMPRESSORS if name != "top-k, rounded"]


class Quadratic:
    """Workers' losses a_i |x|^2 / 2 - b_i x, whose gradients differ at the minimiser of their mean."""

    def __init__(self, *, noise=0.0, scale=1.0, tilt=None, seed=1):
        self.curvature = scale * torch.linspace(0.5, 1.5, WORKERS, dtype=torch.float64)[:, None]
        self.pull = scale * normal(WORKERS, DIM, seed=seed)
        self.tilt = torch.zeros_like(self.pull) if tilt is None else tilt
        self.noise = scale * noise

    @property
    def solution(self):
        return self.pull.mean(0) / self.curvature.mean()

    def gradients(self, x, step=None):
        exact = self.curvature * x - self.pull + self.tilt
        return exact if self.noise == 0 else exact + self.noise * normal(WORKERS, DIM, seed=1000 + step)


def descend(method, losses, *, lr, rounds, state=None, x=None):
    """Run the method and return all points, directions' end state and gradients."""
    x = torch.full((DIM,), 3.0, dtype=torch.float64) if x is None else x
    points, given = [x], []
    first = state is None
    for step in range(rounds):
        gradient = losses.gradients(x, step)
        state = method.begin(gradient) if state is None else state
        sent = (method.first() if first and step == 0 else method).encode(state, gradient)
        state = sent.state
        x = x - lr * method.direction(sent)
        points.append(x)
        given.append(gradient)
    return torch.stack(points), state, torch.stack(given)


# Compressors


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(max_examples=40, deadline=None)
@given(dim=st.integers(1, 70), seed=st.integers(0, 10**6), power=st.integers(0, 8))
def test_no_compressor_loses_more_than_it_may(name, dim, seed, power):
    # High powers of normal numbers are dominated by few entries, low ones are spread.
    vector = normal(dim, seed=seed) ** (2 * power + 1)
    compressor = COMPRESSORS[name]()
    message = compressor.compress(vector)
    error = (compressor.decompress(message) - vector).square().sum()
    total = vector.square().sum()
    least = compressor.delta(dim) if name in ("top-k", "top-k, rounded", "sign", "identity") else 0.0
    assert error <= (1 - least) * total * (1 + 1e-12)
    assert 0 < compressor.delta(dim) <= 1


@pytest.mark.parametrize("name", COMPRESSORS)
def test_zero_comes_through_as_zero(name):
    compressor = COMPRESSORS[name]()
    assert not compressor.decompress(compressor.compress(torch.zeros(DIM))).any()


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_compressor_commutes_with_positive_factors(name):
    vector = normal(DIM)
    one, other = COMPRESSORS[name](), COMPRESSORS[name]()
    assert torch.allclose(
        other.decompress(other.compress(4 * vector)), 4 * one.decompress(one.compress(vector)), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", ["top-k", "top-k, rounded", "sign", "identity"])
def test_a_batch_is_compressed_row_by_row_and_added_up(name):
    vectors, compressor = normal(3, 2, 13), COMPRESSORS[name]()
    message = compressor.compress(vectors)
    rows = torch.stack(
        [torch.stack([compressor.decompress(compressor.compress(row)) for row in rows]) for rows in vectors]
    )
    assert torch.equal(compressor.decompress(message), rows)
    assert message.nbytes == 6 * compressor.compress(vectors[0, 0]).nbytes
    assert torch.allclose(compressor.sum(compressor.compress(vectors[:, 0])), rows[:, 0].sum(0), rtol=1e-14)


@pytest.mark.parametrize("name", ["rand-k", "low rank"])
def test_a_drawing_compressor_adds_up_what_its_batch_says(name):
    compressor = COMPRESSORS[name]()
    message = compressor.compress(normal(5, DIM))
    assert torch.allclose(compressor.sum(message), compressor.decompress(message).sum(0), rtol=1e-12)


def test_no_k_entries_come_nearer_than_the_largest():
    vector, compressor = normal(7), TopK(k=3)
    error = (compressor.decompress(compressor.compress(vector)) - vector).square().sum()
    best = min(
        sum(float(vector[j]) ** 2 for j in range(7) if j not in kept) for kept in itertools.combinations(range(7), 3)
    )
    assert float(error) == pytest.approx(best, rel=1e-13)


@pytest.mark.parametrize(("dim", "k"), [(12, 5), (13, 4), (30, 30), (2, 1), (1, 1)])
def test_each_random_entry_is_as_likely_as_any(dim, k):
    """For every stride, the starts send each entry exactly k times; and drawn strides share no factor with dim."""
    compressor = RandK(k=k, generator=generator())
    for stride in (s for s in range(1, max(dim, 2)) if math.gcd(s, dim) == 1):
        seeds = torch.tensor([[first, stride] for first in range(dim)], dtype=torch.int32)
        everything = Message((seeds, torch.ones(dim, k)), dim, torch.float32)
        places = compressor.decompress(everything)
        assert (places.sum(1) == k).all()
        assert (places.sum(0) == k).all()
    drawn = compressor.compress(torch.ones(2000, dim)).payload[0]
    assert (torch.gcd(drawn[:, 1], torch.tensor(dim, dtype=torch.int32)) == 1).all()
    counts = torch.bincount(drawn[:, 0].long(), minlength=dim)
    assert counts.min() > 2000 / dim - 6 * math.sqrt(2000 / dim)
    if dim > 2:
        assert len(drawn[:, 1].unique()) == sum(math.gcd(s, dim) == 1 for s in range(1, dim))


def test_pairs_are_as_likely_as_in_a_uniform_subset_if_the_dimension_is_prime():
    dim, k = 7, 3
    compressor, counts = RandK(k=k, generator=generator()), torch.zeros(dim, dim)
    for first, stride in itertools.product(range(dim), range(1, dim)):
        seed = torch.tensor([[first, stride]], dtype=torch.int32)
        sent = compressor.decompress(Message((seed, torch.ones(1, k)), dim, torch.float32))[0]
        counts += sent[:, None] * sent
    off_diagonal = counts[~torch.eye(dim, dtype=torch.bool)]
    assert (off_diagonal / (dim * (dim - 1)) == torch.tensor(k * (k - 1) / (dim * (dim - 1)))).all()


def test_the_receiver_rebuilds_random_places_from_the_message_alone():
    sender = RandK(0.3, generator=generator(5))
    receiver = RandK(0.3, generator=generator(99))
    vector = normal(41)
    message = sender.compress(vector)
    got = receiver.decompress(message)
    assert message.payload[0].nbytes == 8
    assert torch.equal(got[got != 0], vector[got != 0])
    assert int((got != 0).sum()) == 13


def test_the_error_of_signs_is_known_exactly():
    vector, compressor = normal(1001), SignMean()
    error = (compressor.decompress(compressor.compress(vector)) - vector).square().sum()
    assert float(error) == pytest.approx(float(vector.square().sum() - vector.abs().sum() ** 2 / 1001), rel=1e-12)


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64, 1001])
def test_signs_travel_eight_to_a_byte(dim):
    vector = normal(dim).float()
    message = SignMean().compress(vector)
    rows = torch.nn.functional.pad(vector >= 0, (0, -dim % 8)).view(8, -1)
    packed = np.packbits(rows.numpy(), axis=0, bitorder="little")[0]
    assert torch.equal(message.payload[1], torch.from_numpy(packed))
    assert message.nbytes == 4 + math.ceil(dim / 8)


def test_low_rank_is_exact_on_low_rank_and_never_beats_the_best():
    rows, columns, rank = 9, 14, 2
    compressor = LowRank(rank, rows=rows, generator=generator())
    exact = (normal(rows, rank) @ normal(rank, columns, seed=1)).flatten()
    assert torch.allclose(compressor.decompress(compressor.compress(exact)), exact, rtol=1e-11, atol=1e-12)
    matrix = normal(rows, columns)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
    error = (compressor.decompress(compressor.compress(matrix.flatten())) - matrix.flatten()).square().sum()
    assert tail <= error < matrix.square().sum() * (1 - compressor.delta(rows * columns))


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (12, 8)])
@pytest.mark.parametrize("kind", ["flat spectrum", "one direction"])
def test_low_rank_keeps_its_share_in_expectation(rows, columns, kind):
    matrix = torch.eye(rows, columns, dtype=torch.float64)
    if kind == "one direction":
        matrix[1:] = 0
    compressor = LowRank(2, rows=rows, num_iters=1, generator=generator())
    draws = matrix.flatten().expand(4000, -1)
    lost = (compressor.decompress(compressor.compress(draws)) - draws).square().sum(1) / matrix.square().sum()
    assert float(lost.mean()) <= 1 - compressor.delta(rows * columns) + 4 * float(lost.std()) / math.sqrt(4000) + 1e-12


def test_low_rank_sends_small_matrices_whole_and_fills_up_odd_ones():
    compressor = LowRank(1, generator=generator())
    assert compressor.delta(4) == 1
    assert torch.equal(compressor.decompress(compressor.compress(normal(4))), normal(4))
    assert compressor.decompress(compressor.compress(normal(101))).shape == (101,)
    assert compressor.compress(normal(101)).nbytes == 8 * (11 + 10)


def test_half_precision_messages_never_overflow():
    vector = torch.tensor([1e6, -3.0, 1e-9])
    sent = TopK(k=2, dtype=torch.float16).compress(vector)
    assert TopK(k=2, dtype=torch.float16).decompress(sent).tolist() == [65504.0, -3.0, 0.0]


@pytest.mark.parametrize(("dim", "ratio", "k"), [(100, 0.07, 7), (100, 0.071, 8), (3, 0.01, 1), (10, 1.0, 10)])
def test_bytes_of_a_sparse_message_are_places_and_values(dim, ratio, k):
    assert TopK(ratio).compress(torch.ones(dim)).nbytes == k * (4 + 4)
    assert TopK(ratio).compress(torch.ones(dim).double()).nbytes == k * (4 + 8)
    assert TopK(ratio, dtype=torch.bfloat16).compress(torch.ones(dim)).nbytes == k * (4 + 2)
    assert RandK(ratio, generator=generator()).compress(torch.ones(dim)).nbytes == 8 + k * 4
    assert TopK(ratio).delta(dim) == k / dim


# The method


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("family", ["econtrol", "error feedback"])
def test_up_to_a_shift_by_the_mean_error_it_is_sgd(name, family):
    """x - lr mean(e) moves by -lr mean(g), whatever the compressor and the noise."""
    lr, compressor = 0.02, COMPRESSORS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = EControl(compressor, eta=0.05) if family == "econtrol" else ErrorFeedback(compressor)
    losses = Quadratic(noise=2.0)
    x = torch.full((DIM,), 3.0, dtype=torch.float64)
    state, virtual, worst = None, x, 0.0
    for step in range(500):
        gradient = losses.gradients(x, step)
        state = method.begin(gradient) if state is None else state
        sent = method.encode(state, gradient)
        state = sent.state
        x = x - lr * method.direction(sent)
        virtual = virtual - lr * gradient.mean(0)
        worst = max(worst, float((x - lr * state.memory.mean(0) - virtual).abs().max()))
    assert worst < 1e-12
    if name != "identity":
        assert state.memory.abs().max() > 1e-3


def test_without_compression_it_is_sgd_from_the_second_round_whatever_the_first_estimate():
    losses, lr = Quadratic(noise=1.0), 0.1
    start = WorkerState(torch.zeros(WORKERS, DIM).double(), normal(WORKERS, DIM, seed=8))
    points, state, gradients = descend(EControl(Identity(), eta=0.3), losses, lr=lr, rounds=20, state=start)
    assert torch.allclose(points[1:], points[:-1] - lr * gradients.mean(1), rtol=0, atol=1e-13)
    assert state.memory.abs().max() < 1e-14


def naive_topk(vector, k):
    kept = sorted(range(len(vector)), key=lambda j: -abs(vector[j]))[:k]
    return np.array([vector[j] if j in kept else 0.0 for j in range(len(vector))])


def test_without_feedback_it_is_ef21():
    losses, lr, rounds, k = Quadratic(noise=1.0), 0.05, 60, 5
    points, _, _ = descend(EControl(TopK(k=k), eta=0.0), losses, lr=lr, rounds=rounds)
    sister, _, _ = descend(EF21(TopK(k=k)), losses, lr=lr, rounds=rounds)
    x = np.full(DIM, 3.0)
    h = [losses.gradients(torch.from_numpy(x), 0)[i].numpy() for i in range(WORKERS)]
    path = [x]
    for step in range(rounds):
        g = losses.gradients(torch.from_numpy(x), step).numpy()
        if step > 0:
            h = [h[i] + naive_topk(g[i] - h[i], k) for i in range(WORKERS)]
        x = x - lr * sum(h) / WORKERS
        path.append(x)
    assert np.abs(points.numpy() - path).max() < 1e-12
    assert torch.equal(points, sister)


def test_error_feedback_is_the_method_with_estimates_frozen_at_zero_and_all_of_the_error():
    losses, lr, rounds, k = Quadratic(noise=1.0), 0.05, 60, 5
    points, _, _ = descend(ErrorFeedback(TopK(k=k)), losses, lr=lr, rounds=rounds)
    x, e, zero = points[0], torch.zeros(WORKERS, DIM).double(), torch.zeros(WORKERS, DIM).double()
    for step in range(rounds):
        sent = econtrol_step(WorkerState(e, zero), losses.gradients(x, step), TopK(k=k), eta=1.0)
        e = sent.state.memory
        x = x - lr * sent.change.mean(0)
        assert torch.allclose(x, points[step + 1], rtol=0, atol=1e-12)


def test_ef21_with_momentum_follows_the_average_and_without_is_ef21():
    losses = Quadratic(noise=1.0)
    plain, _, _ = descend(EF21(TopK(k=5)), losses, lr=0.05, rounds=40)
    same, _, _ = descend(EF21SGDM(TopK(k=5), momentum=0.0), losses, lr=0.05, rounds=40)
    assert torch.allclose(plain, same, rtol=0, atol=1e-12)
    _, state, gradients = descend(EF21SGDM(TopK(k=5), momentum=0.7), losses, lr=0.05, rounds=40)
    average = gradients[0]
    for gradient in gradients[1:]:
        average = 0.7 * average + 0.3 * gradient
    assert torch.allclose(state.memory, average, rtol=0, atol=1e-12)


def test_one_worker_with_one_number_is_sgd():
    x, state, path = torch.tensor([2.0]).double(), None, []
    method = EControl(TopK(k=1), eta=0.7)
    for step in range(10):
        gradient = x + normal(1, seed=step)
        state = method.begin(gradient) if state is None else state
        sent = method.encode(state, gradient)
        state, expected = sent.state, x - 0.1 * gradient
        x = x - 0.1 * method.direction(of_one_worker(sent))
        path.append(float((x - expected).abs()))
    assert max(path) < 1e-14


def of_one_worker(sent):
    """A batch of one worker."""
    return sent._replace(state=WorkerState(sent.state.memory[None], sent.state.estimate[None]))


def test_at_rest_nothing_is_owed_and_every_estimate_is_the_workers_own_gradient():
    losses = Quadratic()
    points, state, _ = descend(EControl(TopK(k=6), eta=0.1), losses, lr=0.1, rounds=1500)
    distance = (points - losses.solution).norm(dim=1)
    assert distance[-1] < 1e-10
    assert state.memory.abs().max() < 1e-10
    assert (state.estimate - losses.gradients(losses.solution)).abs().max() < 1e-10
    assert losses.gradients(losses.solution).abs().max() > 0.5  # the workers do differ there
    # Linear: each hundred rounds gain a like factor.
    assert (distance[100:401:100] < 0.1 * distance[0:301:100]).all()


def test_plain_error_feedback_comes_to_no_rest_where_workers_differ():
    losses = Quadratic()
    points, _, _ = descend(ErrorFeedback(TopK(k=6)), losses, lr=0.1, rounds=1500)
    assert (points[-200:] - losses.solution).norm(dim=1).min() > 1e-2


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_loss_in_other_units_takes_the_same_path(name):
    scale = 8.0
    one, _, _ = descend(quiet(COMPRESSORS[name]()), Quadratic(noise=1.0), lr=0.02, rounds=100)
    other, _, _ = descend(quiet(COMPRESSORS[name]()), Quadratic(noise=1.0, scale=scale), lr=0.02 / scale, rounds=100)
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def quiet(compressor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EControl(compressor, eta=0.1)


def test_linear_terms_that_cancel_between_workers_change_nothing():
    tilt = 50 * normal(WORKERS, DIM, seed=4)
    tilt = tilt - tilt.mean(0)
    flat, tilted = Quadratic(noise=1.0), Quadratic(noise=1.0, tilt=tilt)
    method = EControl(TopK(k=5), eta=0.1)
    one, _, _ = descend(method, flat, lr=0.05, rounds=200)
    other, _, _ = descend(method, tilted, lr=0.05, rounds=200)  # starts at its own gradients, which hold the tilt
    assert torch.allclose(one, other, rtol=0, atol=1e-11)
    plain, plain_tilted = (
        descend(ErrorFeedback(TopK(k=5)), losses, lr=0.05, rounds=200)[0] for losses in (flat, tilted)
    )
    assert (plain - plain_tilted).abs().max() > 1


def test_a_grid_of_fractions_and_runs_is_computed_at_once():
    etas = torch.tensor([0.0, 0.1, 0.2]).double()
    state = WorkerState(normal(3, WORKERS, DIM), normal(3, WORKERS, DIM, seed=1))
    gradient = normal(3, WORKERS, DIM, seed=2)
    together = econtrol_step(state, gradient, TopK(k=5), eta=etas[:, None, None])
    for i, eta in enumerate(etas):
        alone = econtrol_step(WorkerState(state[0][i], state[1][i]), gradient[i], TopK(k=5), eta=float(eta))
        assert torch.equal(together.change[i], alone.change)
        assert torch.equal(together.state.memory[i], alone.state.memory)


def test_the_default_fraction_is_what_the_compressor_keeps():
    state, gradient = WorkerState(normal(DIM), normal(DIM, seed=1)), normal(DIM, seed=2)
    ours = EControl(TopK(k=6)).encode(state, gradient)
    assert torch.equal(ours.change, econtrol_step(state, gradient, TopK(k=6), eta=6 / DIM).change)


# Errors


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: TopK(0.0), r"ratio must lie in \(0.0, 1.0\], got 0.0"),
        (lambda: TopK(1.5), r"ratio must lie in"),
        (lambda: TopK(float("nan")), r"ratio must lie in"),
        (lambda: TopK(), "either ratio or k"),
        (lambda: TopK(0.1, k=3), "either ratio or k"),
        (lambda: TopK(k=0), "k must be an integer of at least 1"),
        (lambda: LowRank(0, generator=generator()), "rank must be at least 1"),
        (lambda: LowRank(1, num_iters=0, generator=generator()), "num_iters must be at least 1"),
        (lambda: TopK(k=1).compress(torch.tensor([1.0, float("nan")])), "NaN"),
        (lambda: TopK(k=1).compress(torch.tensor([])), "at least one element"),
        (lambda: EControl(TopK(0.1), eta=-0.1), r"eta must lie in \[0.0, 1.0\], got -0.1"),
        (lambda: EControl(TopK(0.1), eta=1.1), "eta must lie in"),
        (lambda: EControl(TopK(0.1), init="half"), "init must be one of"),
        (lambda: EF21SGDM(TopK(0.1), momentum=1.0), "momentum must lie in"),
        (lambda: EControl(TopK(0.1)).encode(WorkerState(torch.zeros(3), torch.zeros(3)), torch.ones(4)), r"\(3,\)"),
        (lambda: EControl(TopK(0.1)).encode(WorkerState(None, torch.zeros(3)), torch.ones(3)), "same method"),
        (lambda: CompressedDataParallel(torch.nn.Linear(1, 1), EF21(TopK(0.1)), num_workers=0), "num_workers"),
        (lambda: CompressionState(torch.nn.ReLU(), EF21(TopK(0.1))), "no parameter"),
    ],
)
def test_bad_settings_are_told_at_once(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.untyped
def test_bad_kinds_are_told_at_once():
    with pytest.raises(TypeError, match="compressor must be a Compressor"):
        EControl(0.1)
    with pytest.raises(TypeError, match="method must be a GradientExchange"):
        CompressionState(torch.nn.Linear(1, 1), TopK(0.1))
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        TopK(0.1, dtype=torch.int8)


def test_a_fraction_above_what_is_kept_is_warned_of_once():
    with pytest.warns(UserWarning, match="eta = 0.3 is above the 0.1"):
        method = EControl(TopK(0.1), eta=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CompressedDataParallel(torch.nn.Linear(2, 2), method, num_workers=1)
        EControl(TopK(0.1), eta=0.1)
        EControl(SignMean(), eta=0.3)


# Workers of one process


def simulate(make, *, choose=lambda worker, step: 1.0, steps=range(processes.ROUNDS), saved=None):
    model = processes.build()
    if saved is not None:
        model.load_state_dict(saved["model"])
    workers = CompressedDataParallel(model, make(), num_workers=2)
    if saved is not None:
        workers.load_state_dict(saved["exchange"])
    optimizer = torch.optim.SGD(model.parameters(), lr=processes.LR)
    for step in steps:
        optimizer.zero_grad()
        workers.backward([processes.loss_of(model, worker, step, choose(worker, step)) for worker in range(2)])
        optimizer.step()
    return model, workers


def test_a_model_is_trained_as_the_formula_says():
    """One parameter of one layer, against econtrol_step by hand."""
    model = torch.nn.Linear(5, 2, bias=False).double()
    workers = CompressedDataParallel(model, EControl(TopK(0.3), eta=0.2), num_workers=3)
    inputs, weight, state = normal(3, 4, 5), model.weight.detach().clone(), None
    for step in range(4):
        workers.backward([model(rows).square().mean() for rows in inputs])
        gradient = torch.stack([2 * (rows.T @ (rows @ weight.T)).T / 8 for rows in inputs]).flatten(1)
        if step == 0:
            state, direction = WorkerState(torch.zeros_like(gradient), gradient), gradient.mean(0)
        else:
            sent = econtrol_step(state, gradient, TopK(0.3), eta=0.2)
            state, direction = sent.state, sent.state.estimate.mean(0)
        assert torch.allclose(model.weight.grad.flatten(), direction, rtol=1e-12, atol=1e-14)
        weight = weight - 0.1 * direction.view(2, 5)
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad
    (virtual,) = workers.virtual_iterate(0.1)
    assert torch.allclose(virtual, weight - 0.1 * state.memory.mean(0).view(2, 5), rtol=1e-12)
    assert workers.bytes_sent == 3 * (10 * 8 + 3 * 3 * (4 + 8))


@pytest.mark.parametrize("name", {**processes.METHODS, **processes.DRAWN})
def test_simulated_workers_go_on_from_a_checkpoint_as_if_never_stopped(name, tmp_path):
    make = {**processes.METHODS, **processes.DRAWN}[name]
    whole, counted = simulate(make)
    half, workers = simulate(make, steps=range(4))
    torch.save({"exchange": workers.state_dict(), "model": half.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, again = simulate(make, steps=range(4, processes.ROUNDS), saved=saved)
    assert torch.equal(processes.weights(whole), processes.weights(resumed))
    assert counted.bytes_sent == again.bytes_sent


def test_a_wrong_number_of_workers_is_told_before_anything_changes():
    model, workers = simulate(processes.METHODS["econtrol"], steps=range(2))
    before = workers.state_dict()
    with pytest.raises(ValueError, match="one for each of 2 workers, got 3"):
        workers.backward([processes.loss_of(model, 0, 0)] * 3)
    other = CompressedDataParallel(model, processes.METHODS["econtrol"](), num_workers=3)
    with pytest.raises(ValueError, match="num_workers 2, but this is 3"):
        other.load_state_dict(before)


def test_a_gradient_that_is_not_finite_is_told_before_anything_changes():
    model, workers = simulate(processes.METHODS["econtrol"], steps=range(3))
    before = {k: v.clone() for k, v in flat(workers.state_dict()["parameters"])}
    held = [value.grad.clone() for value in model.parameters()]
    model.body[0].bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=r"gradient of body\.0\.bias contains NaN or infinity"):
        workers.backward([processes.loss_of(model, worker, 3) for worker in range(2)])
    assert all(torch.equal(before[k], v) for k, v in flat(workers.state_dict()["parameters"]))
    assert all(torch.equal(one, value.grad) for one, value in zip(held, model.parameters(), strict=True))


def flat(parameters):
    return [((name, key), value) for name, one in parameters.items() for key, value in one.items()]


def test_a_parameter_that_nobody_used_rests():
    model, workers = simulate(processes.METHODS["econtrol"], steps=range(3))
    before = {k: v.clone() for k, v in flat(workers.state_dict()["parameters"]) if k[0].startswith("extra")}
    workers.backward([processes.loss_of(model, worker, 3, None) for worker in range(2)])
    assert model.extra.weight.grad is None
    assert all(torch.equal(v, dict(flat(workers.state_dict()["parameters"]))[k]) for k, v in before.items())


def test_a_virtual_iterate_needs_an_error():
    with pytest.raises(ValueError, match="EF21 keeps none"):
        CompressedDataParallel(torch.nn.Linear(1, 1), EF21(TopK(0.5)), num_workers=1).virtual_iterate(0.1)


# Two processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two real processes found, each its own."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(processes.run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", {**processes.METHODS, **processes.DRAWN})
def test_replicas_stay_equal_to_the_last_bit(found, name):
    assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])


@pytest.mark.parametrize("name", processes.METHODS)
def test_processes_compute_what_the_simulation_does(found, name):
    model, workers = simulate(processes.METHODS[name])
    assert torch.allclose(found[0]["weights"][name], processes.weights(model), rtol=0, atol=1e-12)
    flags = processes.ROUNDS * len(list(model.parameters()))
    assert sum(one["bytes"][name] - flags for one in found) == workers.bytes_sent


@pytest.mark.parametrize("name", {**processes.METHODS, **processes.DRAWN})
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(found, name):
    for one in found:
        resumed, counted = one["resumed"][name]
        assert torch.equal(resumed, one["weights"][name])
        assert counted == one["bytes"][name]


def test_every_byte_of_the_packed_messages_is_counted(found):
    sizes = [value.numel() for value in processes.build().parameters()]
    kept = sum(math.ceil(0.2 * size) for size in sizes)
    first, later = 8 * sum(sizes), (processes.ROUNDS - 1) * kept * (4 + 8)
    assert found[0]["bytes"]["econtrol"] == first + later + processes.ROUNDS * len(sizes)


def test_buckets_as_views_of_gradients_make_no_difference(found):
    assert all(torch.equal(one["as views"], one["weights"]["econtrol"]) for one in found)


def test_unused_parameters_rest_on_processes_as_in_the_simulation(found):
    model, _ = simulate(processes.METHODS["econtrol"], choose=processes.uses_extra)
    assert torch.equal(found[0]["unused"], found[1]["unused"])
    assert torch.allclose(found[0]["unused"], processes.weights(model), rtol=0, atol=1e-12)


def test_a_gradient_of_zero_on_all_workers_moves_nothing(found):
    model, _ = simulate(processes.METHODS["econtrol"], choose=processes.weighs_extra)
    assert torch.allclose(found[0]["weighed by zero"], processes.weights(model), rtol=0, atol=1e-12)
    assert torch.equal(found[0]["weighed by zero"], found[0]["unused"])


def test_a_bfloat16_model_keeps_its_memory_in_float32(found):
    assert found[0]["bfloat16"]["state"] == torch.float32
    assert torch.equal(found[0]["bfloat16"]["weights"], found[1]["bfloat16"]["weights"])
    assert torch.isfinite(found[0]["bfloat16"]["weights"]).all()


def test_synchronizing_makes_the_mean_estimate_that_of_the_workers(found):
    for name, (before, mean, mine) in found[0]["synchronized"].items():
        _, other_mean, theirs = found[1]["synchronized"][name]
        assert torch.equal(mean, other_mean)
        assert torch.equal(mean, (mine + theirs) / 2)
        assert torch.allclose(before, mean, rtol=0, atol=1e-6)


def test_a_gradient_that_is_not_finite_on_one_rank_is_told_on_all_and_changes_no_state(found):
    for rank in range(2):
        for kind, message, same in found[rank]["not finite"]:
            assert kind == "RuntimeError"
            assert "gradient of body.0.bias contains NaN or infinity on rank 1" in message
            assert same


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("num_workers", "num_workers 4, but this is 2"),
        ("rank", "rank 5, but this is"),
        ("method", "'EF21', but this is 'EControl'"),
        ("unknown", "nowhere"),
        ("shape", r"must have shape (3,), got (2,)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(found, what, says):
    assert says in found[0]["errors"][what]


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "econtrol_ddp.py"), "--steps", "30", "--checkpoints", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "30 steps" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"rank-0.pt", "rank-1.pt", "model.pt"}


def test_plain_averaging_needs_no_state():
    sent = NaiveCompression(Identity()).encode(WorkerState(None, None), normal(WORKERS, DIM))
    assert torch.equal(NaiveCompression(Identity()).direction(sent), normal(WORKERS, DIM).mean(0))
