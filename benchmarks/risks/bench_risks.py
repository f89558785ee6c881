"""Each risk's forward and backward pass against the plain PyTorch of its own kind, at a small and a huge batch."""

import pytest
import torch

from benchmarks.timing import paired_ratio
from minimand.risks import KLDRO, ChiSquareDRO, CVaR, GroupDRO, Mean

SMALL, HUGE = 64, 65_536


def step(risk, losses, **context):
    leaf = losses.requires_grad_()

    def run():
        leaf.grad = None
        risk(leaf, **context).backward()

    return run


def top_tenth(losses):
    return losses.topk(max(len(losses) // 10, 1)).values.mean()


def by_sort(losses):
    return losses.sort(descending=True).values[: max(len(losses) // 10, 1)].mean()


def solved_by_bisection(radius):
    """KL-DRO as one would write it: sixty halvings of a bracket, each a softmax."""

    def risk(losses):
        x = losses.detach().double()
        low, high = 1e-6, 1e6
        for _ in range(60):
            beta = (low * high) ** 0.5
            log_q = torch.log_softmax(beta * x, 0)
            kl = (log_q.exp() * log_q).sum() + torch.log(torch.tensor(float(len(x))))
            low, high = (beta, high) if kl < radius else (low, beta)
        return (torch.softmax(beta * x, 0).to(losses) * losses).sum()

    return risk


def by_groups(groups, group):
    """Group means by a loop over the groups."""
    weights = torch.full((groups,), 1 / groups)

    def risk(losses):
        means = torch.stack([losses[group == g].mean() for g in range(groups)])
        weights.mul_((0.01 * means.detach()).exp())
        weights.div_(weights.sum())
        return (weights * means).sum()

    return risk


# Each against the plain PyTorch that one would write for it. At 64 the limits leave room for the argument checks, which
# read the losses once; what they cost in training is the absolute figure, which is also recorded.
CASES = {
    "mean against torch.mean": (lambda size: Mean(), lambda size: torch.mean, 4.0, 2.0),
    "cvar against topk": (lambda size: CVaR(0.9), lambda size: top_tenth, 4.0, 1.5),
    "cvar against sort": (lambda size: CVaR(0.9), lambda size: by_sort, 4.0, 1.0),
    "kl-dro against bisection": (lambda size: KLDRO(0.1), lambda size: solved_by_bisection(0.1), 1.0, 1.0),
    "chi-square dro against sort": (lambda size: ChiSquareDRO(0.5), lambda size: by_sort, 20.0, 6.0),
}


@pytest.mark.parametrize("size", [SMALL, HUGE])
@pytest.mark.parametrize("case", CASES)
def test_risk_step(record, case, size):
    ours, peer, small_limit, huge_limit = CASES[case]
    losses = torch.rand(size, generator=torch.Generator().manual_seed(0))
    ratio = paired_ratio(
        step(ours(size), losses.clone()), step(peer(size), losses.clone()), inner=50 if size == SMALL else 2
    )
    limit = small_limit if size == SMALL else huge_limit
    record(f"{case}, batch {size}", ratio.median, unit="x", target=f"<= {limit}")
    record(f"{case}, batch {size}, ours", 1e6 * ratio.ours_seconds, unit="us")
    assert ratio.median <= limit


@pytest.mark.parametrize("size", [SMALL, HUGE])
def test_group_dro_step(record, size):
    losses = torch.rand(size, generator=torch.Generator().manual_seed(0))
    group = torch.arange(size) % 8
    ours = step(GroupDRO(8), losses.clone(), group=group)
    ratio = paired_ratio(ours, step(by_groups(8, group), losses.clone()), inner=50 if size == SMALL else 2)
    record(f"group dro against a loop over 8 groups, batch {size}", ratio.median, unit="x", target="<= 1")
    record(f"group dro, batch {size}, ours", 1e6 * ratio.ours_seconds, unit="us")
    assert ratio.median <= 1
