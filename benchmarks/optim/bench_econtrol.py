"""A step with the compression hook against torch's own on two processes, and compressors against plain versions."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import paired_ratio
from minimand.optim import CompressionState, EControl, LowRank, RandK, SignMean, TopK, compression_hook

METHODS = {
    "top 1 %": lambda: EControl(TopK(0.01)),
    "random 1 %": lambda: EControl(RandK(0.01, generator=torch.Generator().manual_seed(0))),
    "signs": lambda: EControl(SignMean(), eta=0.1),
    "rank 1": lambda: EControl(LowRank(1, num_iters=1, generator=torch.Generator().manual_seed(0)), eta=0.1),
}
# Against one sweep of PowerSGD at rank 1, which also compresses, remembers and decodes. Set before measuring and missed
# on CPUs, where the method's two states cost passes over memory that PowerSGD's one does not: recorded, not asserted.
LIMITS = {"top 1 %": 2.0, "random 1 %": 1.2, "signs": 1.5, "rank 1": 1.5}


def stepper(register):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    # One bucket: PowerSGD starts collectives from callbacks, whose order over several buckets gloo does not keep.
    ddp = DistributedDataParallel(model, bucket_cap_mb=50)
    register(ddp)
    inputs = torch.randn(16, 512)

    def step():
        ddp.zero_grad()
        ddp(inputs).square().mean().backward()

    for _ in range(4):
        step()
    return step


def ours(name, ddp):
    ddp.register_comm_hook(CompressionState(ddp, METHODS[name]()), compression_hook)


def power_sgd(ddp):
    settings = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2}
    ddp.register_comm_hook(powerSGD_hook.PowerSGDState(None, **settings), powerSGD_hook.powerSGD_hook)


def all_reduce(ddp):
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)


def measure(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for peer in (power_sgd, all_reduce):
        theirs = stepper(peer)
        for name in METHODS:
            ratio = paired_ratio(stepper(functools.partial(ours, name)), theirs)
            found[f"{name} against {peer.__name__}"] = ratio.median, ratio.ours_seconds
    dist.destroy_process_group()
    if rank == 0:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    torch.multiprocessing.spawn(measure, (str(folder),), nprocs=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_two_processes_is_timed_against_torchs_own(record, steps, name):
    ratio, seconds = steps[f"{name} against power_sgd"]
    target = f"<= {LIMITS[name]}" + ("" if ratio <= LIMITS[name] else ", missed")
    record(f"EControl, {name}, step against PowerSGD of rank 1", ratio, unit="x", target=target)
    record(f"EControl, {name}, step, ours", 1e3 * seconds, unit="ms")
    record(f"EControl, {name}, step against all-reduce in memory", steps[f"{name} against all_reduce"][0], unit="x")


def naive_topk(vector, k):
    order = vector.abs().sort(descending=True).indices[:k]
    dense = torch.zeros_like(vector)
    dense[order] = vector[order]
    return dense


def naive_signs(vector):
    packed = np.packbits((vector >= 0).numpy())
    signs = torch.from_numpy(np.unpackbits(packed)[: len(vector)])
    return (2 * signs.float() - 1) * vector.abs().mean()


def round_trip(compressor, naive):
    vector = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    return paired_ratio(
        lambda: compressor.decompress(compressor.compress(vector)), lambda: naive(vector), rounds=15, inner=4
    )


def test_top_entries_are_found_faster_than_by_a_sort(record):
    ratio = round_trip(TopK(0.01), functools.partial(naive_topk, k=10_000)).median
    record("top 1 % of 1,000,000, compress and decompress, against a sort", ratio, unit="x", target="<= 1")
    assert ratio <= 1


def test_signs_are_timed_against_numpy(record):
    # numpy packs bits by instructions that torch has no access to: recorded, not asserted.
    ratio = round_trip(SignMean(), naive_signs).median
    target = "<= 1.5" + ("" if ratio <= 1.5 else ", missed")
    record("signs of 1,000,000, compress and decompress, against numpy", ratio, unit="x", target=target)
