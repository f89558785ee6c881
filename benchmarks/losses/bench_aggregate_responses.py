"""AggregateLoss on a million rows in a hundred thousand bags: what it costs beside other ways to write it."""

import torch
import torch.nn.functional as F

from benchmarks.timing import paired_ratio
from minimand.losses import AggregateLoss, private_bag_means

ROWS, BAGS = 1_000_000, 100_000


def data():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(ROWS, generator=generator).requires_grad_()
    bag = torch.cat([torch.arange(BAGS), torch.randint(BAGS, (ROWS - BAGS,), generator=generator)]).sort().values
    return predictions, torch.randn(BAGS, generator=generator), bag


def step(loss, predictions):
    def run():
        predictions.grad = None
        loss().backward()

    return run


def by_scatter_reduce(predictions, target, bag, rho):
    """The same loss as (1 - rho) bag loss + rho instance loss, written with scatter_reduce."""
    means = torch.zeros_like(target).scatter_reduce(0, bag, predictions, "mean", include_self=False)
    sizes = torch.zeros_like(target).scatter_reduce(0, bag, torch.ones_like(predictions), "sum")
    whole = (sizes * (means - target) ** 2).sum() / len(bag)
    return (1 - rho) * whole + rho * ((predictions - target[bag]) ** 2).mean()


def by_loop(predictions, target, bag, rho):
    """The same loss, bag by bag."""
    total = predictions.new_zeros(())
    for place, part in enumerate(predictions.split(bag.bincount().tolist())):
        whole = (part.mean() - target[place]) ** 2
        total = total + len(part) * ((1 - rho) * whole + rho * ((part - target[place]) ** 2).mean())
    return total / len(predictions)


def test_ragged_bags_against_scatter_reduce(record):
    predictions, target, bag = data()
    loss = AggregateLoss(0.1)
    torch.testing.assert_close(loss(predictions, target, bag), by_scatter_reduce(predictions, target, bag, 0.1))
    ours = step(lambda: loss(predictions, target, bag), predictions)
    ratio = paired_ratio(ours, step(lambda: by_scatter_reduce(predictions, target, bag, 0.1), predictions), rounds=9)
    record("AggregateLoss, 1M rows in 100k bags, of scatter_reduce", ratio.median, unit="x", target="<= 1.1")
    record("AggregateLoss, 1M rows in 100k bags", ratio.ours_seconds * 1e3, unit="ms")
    assert ratio.median <= 1.1


def test_ragged_bags_against_a_plain_loss_of_rows(record):
    predictions, target, bag = data()
    loss, rows = AggregateLoss(0.1), target[bag]
    ours = step(lambda: loss(predictions, target, bag), predictions)
    ratio = paired_ratio(ours, step(lambda: F.mse_loss(predictions, rows), predictions), rounds=9)
    # Rows must be gathered and added bag by bag, forward and back, which no row-wise loss does.
    record("AggregateLoss, 1M rows in 100k bags, of mse_loss on rows", ratio.median, unit="x", target="<= 20")
    assert ratio.median <= 20


def dense_data():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(BAGS, ROWS // BAGS, generator=generator).requires_grad_()
    target = torch.randn(BAGS, generator=generator)
    return predictions, target, target[:, None].expand_as(predictions).contiguous()


def test_bags_of_one_size_against_the_mix_written_with_mse_loss(record):
    predictions, target, rows = dense_data()
    loss = AggregateLoss(0.1)
    by_hand = lambda: 0.9 * F.mse_loss(predictions.mean(1), target) + 0.1 * F.mse_loss(predictions, rows)  # noqa: E731
    torch.testing.assert_close(loss(predictions, target), by_hand())
    ours = step(lambda: loss(predictions, target), predictions)
    ratio = paired_ratio(ours, step(by_hand, predictions), rounds=15)
    # mse_loss fuses the square and its gradient; ours gives one loss a bag, which a risk may reweigh.
    record("AggregateLoss, (100k, 10) bags, of the mix of two mse_loss", ratio.median, unit="x", target="<= 2.5")
    assert ratio.median <= 2.5


def test_bags_of_one_size_against_a_plain_loss_of_rows(record):
    predictions, target, rows = dense_data()
    loss = AggregateLoss(0.1)
    ours = step(lambda: loss(predictions, target), predictions)
    ratio = paired_ratio(ours, step(lambda: F.mse_loss(predictions, rows), predictions), rounds=15)
    record("AggregateLoss, (100k, 10) bags, of mse_loss on rows", ratio.median, unit="x", target="<= 10")
    assert ratio.median <= 10


def test_ragged_bags_against_a_python_loop(record):
    predictions, target, bag = data()
    rows = int((bag < 2000).sum())
    few, ids, means = predictions.detach()[:rows].clone().requires_grad_(), bag[:rows], target[:2000]
    loss = AggregateLoss(0.1)
    torch.testing.assert_close(loss(few, means, ids), by_loop(few, means, ids, 0.1))
    ours = step(lambda: loss(few, means, ids), few)
    ratio = paired_ratio(ours, step(lambda: by_loop(few, means, ids, 0.1), few), rounds=3, warmup=1)
    record("AggregateLoss, 20k rows in 2k bags, of a loop over bags", ratio.median, unit="x", target="<= 0.02")
    assert ratio.median <= 0.02


def test_private_bag_means_of_a_million_labels(record):
    predictions, _, bag = data()
    labels = predictions.detach()
    release = lambda: private_bag_means(labels, bag, epsilon=1.0, clip=2.0)  # noqa: E731
    plain = lambda: torch.zeros(BAGS).scatter_reduce(0, bag, labels.clamp(-2, 2), "mean", include_self=False)  # noqa: E731
    ratio = paired_ratio(release, plain, rounds=9)
    record("private_bag_means, 1M labels, of scatter_reduce means without noise", ratio.median, unit="x", target="<= 3")
    assert ratio.median <= 3
