"""What the processes of test_econtrol do: rounds of DistributedDataParallel with the compression hook."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minimand.optim import (
    EF21,
    EF21SGDM,
    CompressionState,
    EControl,
    ErrorFeedback,
    Identity,
    LowRank,
    NaiveCompression,
    RandK,
    SignMean,
    TopK,
    compression_hook,
)

LR, ROUNDS = 0.2, 8


def generator():
    return torch.Generator().manual_seed(7)


METHODS = {
    "econtrol": lambda: EControl(TopK(0.2), eta=0.2),
    "econtrol from zero": lambda: EControl(TopK(0.2), init="zero"),
    "econtrol, signs": lambda: EControl(SignMean(), eta=0.1),
    "econtrol, half the bytes": lambda: EControl(TopK(0.2, dtype=torch.bfloat16)),
    "error feedback": lambda: ErrorFeedback(TopK(0.2)),
    "ef21": lambda: EF21(TopK(0.2)),
    "ef21-sgdm": lambda: EF21SGDM(TopK(0.2)),
    "all": lambda: NaiveCompression(Identity()),
}
DRAWN = {
    "random entries": lambda: EControl(RandK(0.2, generator=generator())),
    "low rank": lambda: EControl(LowRank(1, generator=generator()), eta=0.2),
}


class Branches(nn.Module):
    """Two layers, and one more that rounds weigh, and leave out by None."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.extra = nn.Linear(6, 3)

    def forward(self, inputs, weight=1.0):
        return self.body(inputs) + (0 if weight is None else weight * self.extra(inputs))


def build(dtype=torch.float64):
    torch.manual_seed(3)
    return Branches().to(dtype)


def batch(worker, step):
    """Inputs and targets whose number differs between workers and whose law does too."""
    rng = torch.Generator().manual_seed(100 * worker + step)
    inputs = torch.randn(3 + 4 * worker, 6, generator=rng, dtype=torch.float64)
    return inputs, torch.randn(3 + 4 * worker, 3, generator=rng, dtype=torch.float64) + worker


def loss_of(model, worker, step, weight=1.0):
    inputs, target = batch(worker, step)
    inputs, target = (one.to(next(model.parameters()).dtype) for one in (inputs, target))
    return (model(inputs, weight) - target).square().mean()


def uses_extra(worker, step):
    """Nobody in rounds 2 and 3, one worker in rounds 4 and 5."""
    return None if step in (2, 3) or (step in (4, 5) and worker == 0) else 1.0


def weighs_extra(worker, step):
    """As above, but with a weight of zero, so that there is a gradient."""
    return uses_extra(worker, step) or 0.0


def train(model, state, rank, steps, *, choose=lambda worker, step: 1.0, **settings):
    # So small a cap leaves a bucket for nearly every parameter, other ones after the first round than in it.
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-5, **settings)
    ddp.register_comm_hook(state, compression_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, rank, step, choose(rank, step)).backward()
        optimizer.step()
    return ddp


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {"weights": {}, "bytes": {}, "resumed": {}}
    for name, make in {**METHODS, **DRAWN}.items():
        model = build()
        state = CompressionState(model, make())
        train(model, state, rank, range(ROUNDS))
        found["weights"][name], found["bytes"][name] = weights(model), state.bytes_sent
        found["resumed"][name] = resumed(make, rank, folder)

    model = build()
    ddp = train(
        model, CompressionState(model, METHODS["econtrol"]()), rank, range(ROUNDS), gradient_as_bucket_view=True
    )
    found["as views"] = weights(ddp)
    model = build(torch.bfloat16)
    state = CompressionState(model, METHODS["econtrol"]())
    train(model, state, rank, range(2))
    found["bfloat16"] = {
        "weights": weights(model),
        "state": state.state_dict()["parameters"]["extra.weight"]["memory"].dtype,
    }
    model = build()
    train(
        model,
        CompressionState(model, METHODS["econtrol"]()),
        rank,
        range(ROUNDS),
        choose=uses_extra,
        find_unused_parameters=True,
    )
    found["unused"] = weights(model)
    model = build()
    train(model, CompressionState(model, METHODS["econtrol"]()), rank, range(ROUNDS), choose=weighs_extra)
    found["weighed by zero"] = weights(model)
    found["synchronized"] = synchronized(rank)
    found["not finite"] = [not_finite(rank, step) for step in (0, 3)]
    found["errors"] = checkpoint_errors()
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


def resumed(make, rank, folder):
    """Train half of the rounds, write a checkpoint, and do the rest in new objects."""
    model = build()
    state = CompressionState(model, make())
    train(model, state, rank, range(ROUNDS // 2))
    file = f"{folder}/state-{rank}.pt"
    torch.save({"exchange": state.state_dict(), "model": model.state_dict()}, file)
    saved = torch.load(file, weights_only=True)
    model = build()
    model.load_state_dict(saved["model"])
    state = CompressionState(model, make())
    state.load_state_dict(saved["exchange"])
    train(model, state, rank, range(ROUNDS // 2, ROUNDS))
    return weights(model), state.bytes_sent


def synchronized(rank):
    model = build(torch.float32)
    state = CompressionState(model, METHODS["econtrol"]())
    train(model, state, rank, range(ROUNDS))
    before = {name: one["mean"].clone() for name, one in state.state_dict()["parameters"].items()}
    state.synchronize()
    return {
        name: (before[name], one["mean"], one["estimate"]) for name, one in state.state_dict()["parameters"].items()
    }


def not_finite(rank, step):
    """Rank 1 meets an infinite gradient; return what each rank is told and whether its state changed."""
    model = build()
    state = CompressionState(model, METHODS["econtrol"]())
    ddp = train(model, state, rank, range(step))
    before = copy.deepcopy(state.state_dict()["parameters"])
    try:
        loss = loss_of(ddp, rank, step)
        if rank == 1:
            # The gradient of one parameter only, whose bucket is neither the first nor the last.
            model.body[0].bias.register_hook(lambda gradient: gradient * float("inf"))
        loss.backward()
    except (ValueError, RuntimeError) as error:
        after = state.state_dict()["parameters"]
        same = before.keys() == after.keys() and all(
            torch.equal(value, after[name][key]) for name, one in before.items() for key, value in one.items()
        )
        return type(error).__name__, str(error), same
    return None


def checkpoint_errors():
    model = build()
    state = CompressionState(model, METHODS["econtrol"]())
    good = state.state_dict()
    told = {}
    changes = {
        "num_workers": {"num_workers": 4},
        "rank": {"rank": 5},
        "method": {"method": "EF21"},
        "unknown": {"parameters": {"nowhere": {}}},
        "shape": {"parameters": {"extra.bias": {"memory": torch.zeros(2)}}},
    }
    for name, change in changes.items():
        try:
            state.load_state_dict({**good, **change})
        except ValueError as error:
            told[name] = str(error)
    return told
