"""Does staying near the nearest logged pair, not near the action logged at the state, find the few good actions?

A pendulum must be swung up after a log of 100 episodes, five of them by a controller and 95 of random torques. TD3+BC
holds to whatever was logged; PRDC may borrow the action of a nearby state. In between lies beta: a small one allows any
logged action anywhere, a large one only the state's own, which is TD3+BC.
"""

from __future__ import annotations

from ..bench import Claim, Study
from .swing_up import APART, BATCH, EXCESS, METRICS, STEPS, Learn, imitate, iql, prdc, problem, td3_bc

ALPHAS = ("alpha", (2.5, 10.0))
# So much value that imitation counts for nothing: plain TD3, whose values nothing holds to the log.
FREE = 1e6


def at_beta(beta: float) -> Learn:
    """PRDC at the paper's alpha and some beta."""
    return Learn(prdc, {"alpha": 2.5, "beta": beta})


study = Study(
    method="prdc",
    problem=problem,
    contenders={
        "behaviour cloning": Learn(imitate),
        "TD3": Learn(td3_bc, {"alpha": FREE}),
        "TD3+BC": Learn(td3_bc, choices=ALPHAS),
        "IQL": Learn(iql, choices=("expectile", (0.7, 0.9))),
        "PRDC": Learn(prdc, {"beta": 2.0}, ALPHAS),
        "PRDC, beta 0.1": at_beta(0.1),
        "PRDC, beta 0.5": at_beta(0.5),
        "PRDC, beta 10": at_beta(10.0),
        "PRDC, beta 1000": at_beta(1000.0),
    },
    metrics=METRICS,
    claims=(
        Claim("PRDC", "TD3+BC", margin=100, says="PRDC returns more than TD3+BC, both with their better alpha"),
        Claim("PRDC", "IQL", margin=100, says="PRDC returns more than IQL with its better expectile"),
        Claim("PRDC", "TD3", EXCESS.name, says="PRDC overestimates values less than TD3"),
        Claim("PRDC", "TD3+BC", EXCESS.name, says="PRDC overestimates values less than TD3+BC"),
        Claim("PRDC", "TD3", APART.name, says="PRDC stays nearer to the log than TD3"),
        Claim("PRDC", "PRDC, beta 0.1", margin=100, says="the paper's beta 2 returns more than 0.1"),
        Claim("PRDC", "PRDC, beta 10", margin=100, says="the paper's beta 2 returns more than 10"),
        Claim(
            "TD3+BC",
            "PRDC, beta 1000",
            margin=-100,
            says="with beta 1000 PRDC falls back to TD3+BC: it returns no more, but for 100",
        ),
    ),
    seeds=5,
    about="Swing up a pendulum from a log of 20,000 transitions, 5 % of them by a good controller.",
    notes=(
        f"One log, {STEPS:,} steps of {BATCH} for all, two layers of 64, learning rate 0.001, slow copies at 0.01 (the "
        "paper: 1,000,000 steps of 256, two layers of 256, 0.0003 and 0.005, on D4RL, which no package ships). "
        "Seeds differ in training and testing, not in the log. TD3+BC, IQL and PRDC choose one of two settings on 100 "
        "episodes that the test does not see, which needs the simulator, as the paper's choice of alpha did."
    ),
)
