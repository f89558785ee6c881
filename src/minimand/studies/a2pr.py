"""Does staying near actions of high advantage, logged or proposed, find the few good actions of a poor log?

A pendulum must be swung up after a log of 100 episodes, five of them by a controller and 95 of random torques. The
parts of A2PR are taken away one by one: the gate of its autoencoder, the mask of its pull, its candidates.
"""

from __future__ import annotations

import math

from ..bench import Claim, Study
from .swing_up import BATCH, EXCESS, METRICS, STEPS, Learn, a2pr, imitate, prdc, problem, td3_bc

ALPHAS = ("alpha", (2.5, 10.0))
# So much value that imitation counts for nothing: plain TD3, whose values nothing holds to the log.
FREE = 1e6

study = Study(
    method="a2pr",
    problem=problem,
    contenders={
        "behaviour cloning": Learn(imitate),
        "TD3": Learn(td3_bc, {"alpha": FREE}),
        "TD3+BC": Learn(td3_bc, choices=ALPHAS),
        "PRDC": Learn(prdc, choices=ALPHAS),
        "A2PR": Learn(a2pr),
        "A2PR, target moves": Learn(a2pr, {"detach_target": False}),
        "A2PR, prior": Learn(a2pr, {"candidates": "prior"}),
        "A2PR, no gate": Learn(a2pr, {"gate_threshold": -math.inf}),
        "A2PR, no mask": Learn(a2pr, {"mask_threshold": -math.inf}),
        "A2PR, no candidates": Learn(a2pr, {"candidates": "logged"}),
    },
    metrics=METRICS,
    claims=(
        Claim("A2PR", "TD3+BC", margin=150, says="A2PR at the paper's alpha returns more than TD3+BC at its best"),
        Claim("A2PR", "PRDC", says="A2PR returns more than PRDC at its best"),
        Claim("A2PR", "TD3", EXCESS.name, says="A2PR overestimates values less than TD3"),
        Claim("A2PR", "A2PR, no gate", says="an autoencoder of good actions only is better than one of all"),
        Claim("A2PR", "A2PR, no mask", says="letting go where no action is good is better"),
        Claim("A2PR", "A2PR, no candidates", says="proposing actions is better than masking logged ones alone"),
        Claim("A2PR, prior", "A2PR", says="the paper's samples of the prior are better than the code's candidates"),
        Claim("A2PR, target moves", "A2PR", says="the code's moving target is better than one taken as given"),
    ),
    seeds=5,
    about="Swing up a pendulum from a log of 20,000 transitions, 5 % of them by a good controller.",
    notes=(
        f"One log, {STEPS:,} steps of {BATCH} for all, two layers of 64, learning rate 0.001, slow copies at 0.01 (the "
        "paper: 1,000,000 steps of 256, two layers of 256 and 750, 0.0003 and 0.005, on D4RL, which no "
        "package ships). Seeds differ in training and testing, not in the log. TD3+BC and PRDC choose alpha among 2.5 "
        "and 10 on 100 episodes that the test does not see; all forms of A2PR keep 2.5, with a weight of 1 on the mask."
    ),
)
