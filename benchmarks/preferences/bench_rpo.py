"""RPO's forward and backward pass against the formula of TRL's trainer written by hand, from tokens and from sums."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import paired_ratio
from minimand.preferences import PairTokens, RPOLoss

BETA, ETA = 0.1, 0.005


def tokens_of(batch, length):
    generator = torch.Generator().manual_seed(0)
    rows = [-2 * torch.rand(batch, length, generator=generator) for _ in range(4)]
    lengths = torch.randint(length // 2, length + 1, (2, batch, 1), generator=generator)
    masks = torch.arange(length) < lengths
    return PairTokens(rows[0].requires_grad_(), rows[1].requires_grad_(), masks[0], masks[1], rows[2], rows[3])


def by_hand(tokens):
    """TRL 1.16's loss for ``["sigmoid", "sft"]``, without checks."""
    chosen, rejected = (tokens.chosen * tokens.chosen_mask).sum(1), (tokens.rejected * tokens.rejected_mask).sum(1)
    ref_chosen = (tokens.ref_chosen * tokens.chosen_mask).sum(1)
    ref_rejected = (tokens.ref_rejected * tokens.rejected_mask).sum(1)
    sigmoid = -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    return sigmoid.mean() + ETA * -tokens.chosen[tokens.chosen_mask].mean()


def sums_by_hand(chosen, rejected, ref_chosen, ref_rejected):
    margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return (-F.logsigmoid(margin) - ETA * BETA * chosen).mean()


def step(loss, inputs):
    def run():
        inputs[0].grad = inputs[1].grad = None
        loss(inputs).backward()

    return run


@pytest.mark.parametrize(("batch", "length", "inner", "limit"), [(8, 512, 20, 2.0), (64, 2048, 2, 1.2)])
def test_rpo_from_tokens_costs_what_trls_formula_costs(record, batch, length, inner, limit):
    tokens = tokens_of(batch, length)
    ours = RPOLoss(BETA, eta=ETA, sft="mean")
    ratio = paired_ratio(step(ours.from_tokens, tokens), step(by_hand, tokens), inner=inner)
    record(f"RPO against TRL's formula, {batch} pairs of {length} tokens", ratio.median, unit="x", target=f"<= {limit}")
    record(f"RPO, {batch} pairs of {length} tokens, ours", 1e6 * ratio.ours_seconds, unit="us")
    assert ratio.median <= limit


@pytest.mark.parametrize(("batch", "inner", "limit"), [(64, 50, 3.5), (65_536, 4, 1.6)])
def test_rpo_from_sums_costs_what_its_formula_costs(record, batch, inner, limit):
    generator = torch.Generator().manual_seed(1)
    sums = [-100 * torch.rand(batch, generator=generator) for _ in range(4)]
    for row in sums[:2]:
        row.requires_grad_()
    ours = RPOLoss(BETA, eta=ETA)
    ratio = paired_ratio(
        step(lambda rows: ours(*rows), sums), step(lambda rows: sums_by_hand(*rows), sums), inner=inner
    )
    record(f"RPO against its formula by hand, {batch} pairs", ratio.median, unit="x", target=f"<= {limit}")
    # No batch of pairs is that large; there the argument checks, each a pass over all sums, take longer than the loss.
    if batch < 65_536:
        assert ratio.median <= limit
