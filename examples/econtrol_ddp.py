"""Train a classifier of digits on several processes that exchange one gradient entry in twenty, by EControl.

    torchrun --nproc-per-node 4 examples/econtrol_ddp.py
    torchrun --nproc-per-node 4 examples/econtrol_ddp.py --checkpoints runs/digits   # again: goes on where it stopped

Each process holds the images of some digits only. Runs on CPUs by gloo and on GPUs by nccl, one a process.
"""

import argparse
import os
import pathlib

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minimand.optim import CompressionState, EControl, TopK, compression_hook


def main() -> None:
    """Train, report and save."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--checkpoints", type=pathlib.Path, default=None)
    options = arguments.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    images, digits = (torch.tensor(array, device=device) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    mine = digits.argsort(stable=True).tensor_split(workers)[rank]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    ddp = DistributedDataParallel(model)
    exchange = CompressionState(model, EControl(TopK(0.05)))
    ddp.register_comm_hook(exchange, compression_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    done = 0
    folder = options.checkpoints
    if folder is not None and (folder / f"rank-{rank}.pt").exists():
        saved = torch.load(folder / "model.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        done = saved["steps"]
        exchange.load_state_dict(torch.load(folder / f"rank-{rank}.pt", map_location=device, weights_only=True))

    for step in range(done, done + options.steps):
        draw = torch.Generator().manual_seed(step * workers + rank)
        batch = mine[torch.randint(len(mine), (32,), generator=draw).to(device)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(images[batch]), digits[batch]).backward()
        optimizer.step()

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(exchange.state_dict(), folder / f"rank-{rank}.pt")
        if rank == 0:
            torch.save({"model": model.state_dict(), "steps": done + options.steps}, folder / "model.pt")
    if rank == 0:
        with torch.no_grad():
            right = (model(images).argmax(1) == digits).float().mean()
        dense = 4 * sum(weight.numel() for weight in model.parameters()) * (done + options.steps)
        print(
            f"{done + options.steps} steps: {right:.1%} of the digits right, "
            f"{exchange.bytes_sent / dense:.1%} of the bytes of plain gradients sent"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
