"""A step of implicit-reward fine-tuning against cross-entropy and TRL's losses; the exact solver against cvxpy."""

import cvxpy
import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import paired_ratio
from minimand.preferences import ImplicitRewardSFTLoss, f_matching_dual, token_log_probabilities

ROWS, TOKENS, VOCABULARY = 8, 64, 8192


def step(leaf, loss):
    def run():
        leaf.grad = None
        loss(leaf).backward()

    return run


@pytest.mark.parametrize("divergence", ["total_variation", "pearson", "hellinger"])
def test_from_scores_to_gradient_it_costs_what_cross_entropy_costs(record, divergence):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, TOKENS, VOCABULARY, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(TOKENS // 2, TOKENS, (ROWS, 1), generator=generator)
    ignored = targets.masked_fill(~mask, -100).flatten()
    ref_logp = token_log_probabilities(torch.randn(logits.shape, generator=generator), targets)
    loss = ImplicitRewardSFTLoss(divergence, beta=0.3)
    peer = step(logits, lambda x: F.cross_entropy(x.flatten(0, 1), ignored))

    def ours(x):
        logp = -F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return loss(logp, ref_logp, mask)

    ratio = paired_ratio(step(logits, ours), peer, rounds=9)
    name = f"implicit-reward step from scores, {divergence}"
    record(f"{name}, against F.cross_entropy", ratio.median, unit="x", target="<= 1.3")
    record(f"{name}, ours", 1e3 * ratio.ours_seconds, unit="ms")
    # The room's own log-probabilities need no log-softmax in memory, at the price of a second pass backward.
    lean = step(logits, lambda x: loss(token_log_probabilities(x, targets), ref_logp, mask))
    record(f"{name}, by token_log_probabilities", paired_ratio(lean, peer, rounds=9).median, unit="x")
    assert ratio.median <= 1.3


def test_on_tokens_it_costs_little_more_than_trls_losses(record):
    """TRL's arithmetic on the tokens' log-probabilities, for ``loss_type="nll"`` and ``"dft"``."""
    generator = torch.Generator().manual_seed(1)
    logp = (-torch.rand(16, 1024, generator=generator)).requires_grad_()
    ref_logp, mask = -torch.rand(16, 1024, generator=generator), torch.ones(16, 1024, dtype=torch.bool)
    loss = ImplicitRewardSFTLoss("pearson", beta=0.3)

    def dft(x):
        return (torch.where(mask, -x, 0.0) * x.exp().detach()).sum() / mask.sum().clamp(min=1)

    def by_hand(x):
        u = 0.3 * (x - ref_logp)
        return torch.where(mask, (u.clamp(max=2).square() / 4 - u.clamp(max=2)) / 0.3, 0.0).sum() / mask.sum()

    ours = step(logp, lambda x: loss(x, ref_logp, mask))
    against = paired_ratio(ours, step(logp, dft), inner=4)
    record("implicit-reward loss on 16,384 tokens, against TRL's dft arithmetic", against.median, unit="x")
    record("implicit-reward loss on 16,384 tokens, ours", 1e6 * against.ours_seconds, unit="us")
    against = paired_ratio(ours, step(logp, by_hand), inner=4)
    target = "<= 3"  # checks for NaN read every tensor once, and the formula by hand has none
    record(
        "implicit-reward loss on 16,384 tokens, against its formula by hand", against.median, unit="x", target=target
    )
    assert against.median <= 3


def test_the_exact_solver_is_faster_than_a_general_one(record):
    generator = torch.Generator().manual_seed(2)
    expert, reference = (torch.rand(100, generator=generator, dtype=torch.float64) + 0.01 for _ in range(2))
    expert, reference = expert / expert.sum(), reference / reference.sum()

    def general():
        policy = cvxpy.Variable(100)
        objective = cvxpy.sum(cvxpy.rel_entr(expert.numpy(), policy))
        objective += 0.3 * cvxpy.sum(cvxpy.rel_entr(policy, reference.numpy()))
        cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(policy) == 1]).solve(solver="CLARABEL")

    ours = paired_ratio(
        lambda: f_matching_dual(expert, reference, divergence="forward_kl", beta=0.3, tolerance=1e-12),
        general,
        rounds=5,
    )
    record("f-matching of 100 responses, against cvxpy with Clarabel", ours.median, unit="x", target="<= 0.5")
    record("f-matching of 100 responses, ours", 1e3 * ours.ours_seconds, unit="ms")
    assert ours.median <= 0.5
