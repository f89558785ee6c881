"""What the family costs a step beside plain IQL of the same networks, and beside IQL at three balances one by one."""

import torch

from benchmarks.timing import paired_ratio
from minimand.policies import IQL, BatchStream, FamO2O, Pendulum, ScaledLog

PENDULUM = Pendulum()
LOG = ScaledLog.of(PENDULUM.log("mixed"), low=PENDULUM.low, high=PENDULUM.high)
STEPS = 20


def steps(learner, seeds):
    stream = BatchStream(LOG, seeds=seeds, batch_size=256, noise_width=learner.noise_width)

    def run():
        for _ in range(STEPS):
            learner.update(next(stream))

    return run


def test_the_familys_step_against_one_iql(record):
    family, plain = FamO2O(3, 1, hidden=(64, 64)), IQL(3, 1, hidden=(64, 64))
    ratio = paired_ratio(steps(family, (0,)), steps(plain, (0,)), rounds=9)
    record("FamO2O step over IQL's", ratio.median, unit="x", target="<= 3")
    # Besides IQL's three networks it moves a balance model, through the policy and both critics.
    assert ratio.median < 3


def test_one_family_against_iql_at_three_balances(record):
    family = steps(FamO2O(3, 1, hidden=(64, 64)), (0,))
    grid = [steps(IQL(3, 1, hidden=(64, 64), beta=beta), (0,)) for beta in (1.0, 3.0, 10.0)]
    ratio = paired_ratio(family, lambda: [one() for one in grid], rounds=9)
    record("one family over three balances of IQL", ratio.median, unit="x", target="<= 1")
    assert ratio.median < 1.2


def test_a_family_of_five_seeds_against_five_families(record):
    torch.manual_seed(0)
    together = steps(FamO2O(3, 1, hidden=(64, 64), seeds=range(5)), range(5))
    alone = [steps(FamO2O(3, 1, hidden=(64, 64), seeds=(seed,)), (seed,)) for seed in range(5)]
    ratio = paired_ratio(together, lambda: [one() for one in alone], rounds=7)
    record("five seeds of FamO2O in one stack over five in turn", ratio.median, unit="x", target="<= 0.7")
    assert ratio.median < 1
