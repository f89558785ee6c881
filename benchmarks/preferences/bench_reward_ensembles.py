"""Five reward heads trained as one against a loop over five; best-of-n for all n at once against drawing subsets."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import paired_ratio
from minimand.preferences import RewardHeads, expected_best_of_n, fit_reward_heads

MEMBERS, PAIRS, EPOCHS, BATCH = 5, 1000, 4, 64


def one_by_one(heads, chosen, rejected):
    """Train plain modules in turn, with the same fused optimizer, batches and loss."""
    for number in range(MEMBERS):
        model = heads.member(number)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(number)
        pairs = torch.stack([chosen, rejected], 1)
        for _ in range(EPOCHS):
            order = torch.randperm(PAIRS, generator=generator)
            for batch in order[: PAIRS // BATCH * BATCH].view(-1, BATCH):
                scores = model(pairs[batch].flatten(0, 1)).view(-1, 2)
                losses = -F.logsigmoid(scores[:, 0] - scores[:, 1]) + 5e-4 * scores.square().sum(1)
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()


# A wide linear head does little but gather its rows, which costs each member the same either way.
@pytest.mark.parametrize(("features", "hidden", "limit"), [(16, (64, 64), 0.5), (16, (32,), 0.5), (576, (), 1.0)])
def test_five_heads_train_as_one_in_less_time_than_in_turn(record, features, hidden, limit):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, PAIRS, features, generator=generator)
    heads = RewardHeads(features, num_members=MEMBERS, hidden=hidden)
    ratio = paired_ratio(
        lambda: fit_reward_heads(heads, chosen, rejected, epochs=EPOCHS, batch_size=BATCH),
        lambda: one_by_one(heads, chosen, rejected),
        rounds=7,
    )
    name = f"{features} features, hidden {hidden or 'none'}"
    record(f"five reward heads as one against a loop, {name}", ratio.median, unit="x", target=f"<= {limit}")
    record(f"five reward heads as one, {EPOCHS} epochs of {PAIRS} pairs, {name}", ratio.ours_seconds, unit="s")
    assert ratio.median <= limit


def test_the_estimate_costs_less_than_a_hundred_random_subsets(record):
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 100, 2048, generator=generator)

    def by_subsets():
        found = torch.zeros(100)
        for _ in range(100):
            drawn = torch.randperm(2048, generator=generator)[:256]
            found += gold[:, drawn].gather(1, proxy[:, drawn].argmax(1, keepdim=True))[:, 0]
        return found / 100

    ratio = paired_ratio(lambda: expected_best_of_n(proxy, gold, 256), by_subsets, rounds=9)
    record("best-of-256 of 2048 without bias against 100 random subsets", ratio.median, unit="x", target="<= 1")
    assert ratio.median <= 1
