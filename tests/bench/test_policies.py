"""``minimand compare policy``: what it reads, refuses, chooses, measures and shows."""

import dataclasses
import json
import math

import pytest
import torch

from minimand.bench import Run, run
from minimand.bench.policies import (
    COST,
    EXCESS,
    LOGGED,
    RETURN,
    SCORE,
    VALUE,
    WIDTH,
    TrainOffline,
    chosen_lines,
    chosen_settings,
    load_offline_data,
    policy_study,
    winner_code,
)
from minimand.bench.readers import DataError
from minimand.policies import Pendulum, Policy, Transitions


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    Pendulum(episode_steps=40).log("medium", episodes=8).save(tmp_path / "log.npz")
    return str(tmp_path / "log.npz")


def ready(file, **settings):
    defaults = {"steps": 12, "batch_size": 16, "hidden": (8,), "episodes": 4, "seeds": 2}
    study = policy_study(file, **defaults | settings)
    return study.presentation.prepare(study, lambda text: None)


def test_every_learner_comes_out_with_every_number(file):
    study = ready(file, environment="Pendulum-v1")
    results = run(study, jobs=1)
    assert not results.failures
    names = [metric.name for metric in study.metrics]
    assert names == [RETURN.name, "action distance", EXCESS.name]
    for cell in results.cells:
        numbers = cell.outcome.metrics
        assert all(math.isfinite(numbers[name]) for name in names if name != EXCESS.name), cell.contender
        assert math.isfinite(numbers[EXCESS.name]) == (cell.contender not in (LOGGED, "behaviour cloning"))
    assert {cell.contender for cell in results.cells} == {
        LOGGED, "behaviour cloning", "TD3+BC", "IQL", "CQL", "PRDC", "FamO2O", "A2PR",
    }  # fmt: skip


def test_without_an_environment_policies_are_valued_on_the_log(file):
    study = ready(file, contenders=["TD3+BC"])
    assert [metric.name for metric in study.metrics[:2]] == [VALUE.name, WIDTH.name]
    assert "no environment" in study.data
    results = run(dataclasses.replace(study), jobs=1)
    assert not results.failures
    trained = [cell.outcome.metrics for cell in results.cells if cell.contender == "TD3+BC"]
    assert all(numbers[WIDTH.name] > 0 for numbers in trained)


def test_scores_are_normalised_between_chance_and_expert(tmp_path):
    from minimand.policies import OfflineData, write_minari

    log = Pendulum().log("expert", episodes=4)
    write_minari(OfflineData(log, "Pendulum-v1", random_score=-1000.0, expert_score=-200.0), tmp_path / "x-v0")
    study = ready(str(tmp_path / "x-v0"), contenders=["behaviour cloning"])
    assert study.metrics[0] is SCORE
    cell = study.contenders[LOGGED](study.problem(None, 0), Run(0))
    expected = 100 * (float(log.episode_returns().mean()) + 1000) / 800
    assert cell.metrics[SCORE.name] == pytest.approx(expected, rel=1e-5)


def test_the_setting_that_scores_best_late_is_taken(file):
    study = ready(file, environment="Pendulum-v1", contenders=["TD3+BC"], steps=48)
    contender = study.contenders["TD3+BC"].inner
    data = study.problem(None, 0)
    outcome = contender(data, Run(0))
    one_by_one = []
    for settings in contender.grid:
        alone = dataclasses.replace(contender, grid=(settings,))
        one_by_one.append(alone(data, Run(0)).curves["score"])
    late = [sum(scores[-3:]) / 3 for scores in one_by_one]
    best = max(range(3), key=lambda place: late[place])
    assert outcome.details["settings"] == dict(contender.grid[best])
    assert outcome.curves["score"] == pytest.approx(one_by_one[best], rel=1e-3)


def test_cells_are_the_same_alone_and_together(file):
    study = ready(file, environment="Pendulum-v1", contenders=["IQL"])
    contender, data = study.contenders["IQL"], study.problem(None, 0)
    together = contender.batch([data, data], [Run(0), Run(1)])
    alone = contender(data, Run(1))
    for name, number in alone.metrics.items():
        assert together[1].metrics[name] == pytest.approx(number, rel=1e-2, abs=1e-2), name


def test_the_critics_excess_is_its_value_less_what_the_policy_then_earned():
    """A critic that says 5 of a policy that earns a discounted 3 overestimates by 2, in the log's own unit."""
    from minimand.bench.policies import OfflineRecipe, PolicyData, measured
    from minimand.policies import OfflineData

    class World(Pendulum):
        def record(self, act, *, episodes, seed=0):
            log = super().record(act, episodes=episodes, seed=seed)
            ends = torch.arange(200).repeat(episodes) == 199
            first = torch.arange(200).repeat(episodes) == 0
            return dataclasses.replace(log, reward=3.0 * first, truncated=ends)

    log = Pendulum().log("random", episodes=2)
    data = PolicyData(OfflineData(log, "Pendulum-v1", torch.tensor([-2.0]), torch.tensor([2.0])), World(), "x")
    policy = Policy(torch.nn.Sequential(torch.nn.Linear(3, 1)), data.log.scaling)
    told = 5.0 / data.reward_unit
    found = measured(data, policy, OfflineRecipe(), Run(0), lambda s, a: torch.full(s.shape[:2], told), 0, 1)
    assert found[EXCESS.name] == pytest.approx(2.0, abs=1e-4)
    assert found[RETURN.name] == pytest.approx(3.0)


def test_costs_are_reported_where_both_log_and_world_tell_them(tmp_path, monkeypatch):
    """A quarter a step, in episodes of forty steps: ten an episode."""

    class Dear(Pendulum):
        def record(self, act, *, episodes, seed=0):
            log = super().record(act, episodes=episodes, seed=seed)
            return dataclasses.replace(log, cost=torch.full((len(log), 1), 0.25))

    monkeypatch.setattr("minimand.bench.policies.make_environment", lambda name: Dear(episode_steps=40))
    Dear(episode_steps=40).log("medium", episodes=8).save(tmp_path / "dear.npz")
    study = ready(str(tmp_path / "dear.npz"), environment="Pendulum-v1", contenders=["TD3+BC"])
    assert study.metrics[-1] is COST
    data = study.problem(None, 0)
    for name in (LOGGED, "TD3+BC"):
        assert study.contenders[name](data, Run(0)).metrics[COST.name] == pytest.approx(10.0)


@pytest.mark.parametrize("winner", ["behaviour cloning", "TD3+BC", "IQL", "CQL", "PRDC", "A2PR", "FamO2O", LOGGED])
def test_the_code_that_is_shown_runs(file, tmp_path, monkeypatch, winner):
    monkeypatch.chdir(tmp_path)
    study = ready(file, environment="Pendulum-v1")
    code = winner_code(study, winner)
    exec(compile(code, "shown", "exec"), {})
    assert (tmp_path / "policy.safetensors").exists() == (winner != LOGGED)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 1}, "--steps must be at least 10"),
        ({"seeds": 1}, "--seeds must be at least 2"),
        ({"hidden": (0,)}, "--hidden must be positive"),
        ({"discount": 1.0}, "--discount must lie between"),
        ({"contenders": ["SAC"]}, "there is no 'SAC'; there are"),
        ({"environment": "Pendulm-v1"}, "did you mean Pendulum-v1"),
        ({"environment": "CartPole-v1"}, "discrete actions"),
        ({"environment": "InvertedPendulum-v5"}, "another environment"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(file, settings, words):
    with pytest.raises(DataError, match=words):
        ready(file, **settings)


def test_wrong_data_are_told_in_a_sentence(tmp_path):
    log = Pendulum(episode_steps=20).log("random", episodes=2)
    log.episodes(torch.tensor([0])).save(tmp_path / "one.npz")
    with pytest.raises(DataError, match="one trajectory"):
        ready(str(tmp_path / "one.npz"))
    Transitions(**log.tensors() | {"action": torch.zeros(40, dtype=torch.int64)}).save(tmp_path / "discrete.npz")
    with pytest.raises(DataError, match="discrete actions"):
        ready(str(tmp_path / "discrete.npz"))
    with pytest.raises(DataError, match="no log at"):
        ready(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no such file"):
        ready(str(tmp_path / "none.npz"))
    (tmp_path / "text.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"a log is an \.npz"):
        ready(str(tmp_path / "text.csv"))
    dataclasses.replace(log, observation=log.observation * 50).save(tmp_path / "far.npz")
    with pytest.raises(DataError, match="observations lie outside the space of Pendulum-v1"):
        ready(str(tmp_path / "far.npz"), environment="Pendulum-v1")


def test_a_log_that_changes_under_way_is_refused(file):
    study = ready(file, environment="Pendulum-v1")
    Pendulum(episode_steps=40).log("random", episodes=8).save(file)
    from minimand.bench import policies

    policies._loaded.cache_clear()
    with pytest.raises(DataError, match="changed while the comparison ran"):
        study.problem(None, 0)


def test_our_own_logs_are_named_by_environment_and_quality(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "minimand.bench.policies.behaviour_data", lambda *names, progress: asked.append(names) or "data"
    )
    assert load_offline_data("Hopper-v5/medium") == "data"
    assert asked == [("Hopper-v5", "medium")]


def test_a_run_that_is_cut_off_goes_on_in_the_middle_of_training(file, monkeypatch):
    study = ready(file, environment="Pendulum-v1", contenders=["TD3+BC"], steps=24)
    contender, data = study.contenders["TD3+BC"], study.problem(None, 0)
    whole = contender(data, Run(0))
    from minimand.bench import policies

    real, seen = policies._returns, []

    def cut(*arguments):
        seen.append(1)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(policies, "_returns", cut)
    with pytest.raises(KeyboardInterrupt):
        contender(data, Run(0))
    before = len(seen)
    again = contender(data, Run(0))
    assert again.metrics == whole.metrics
    assert again.curves == whole.curves
    # Six reports of three settings were kept, so that only the rest were measured anew.
    assert len(seen) - before == 3 * (12 - 6)


def test_the_settings_that_were_chosen_are_told():
    cells = [{"contender": "IQL", "details": {"settings": {"expectile": 0.7, "beta": 3.0}}}] * 2
    cells += [{"contender": "IQL", "details": {"settings": {"expectile": 0.9, "beta": 10.0}}}, {"contender": LOGGED}]
    summary = chosen_settings(policy_study("log.npz"), {"cells": cells})
    assert summary == {"chosen": {"IQL": {"expectile 0.7, beta 3": 2, "expectile 0.9, beta 10": 1}}}
    assert chosen_lines(summary)[1] == "  IQL: expectile 0.7, beta 3 (2 cells); expectile 0.9, beta 10 (1 cells)"


def test_settings_decide_the_key_of_a_cell(file):
    first, other = ready(file), ready(file, discount=0.9)
    assert json.dumps(first.settings, default=str) != json.dumps(other.settings, default=str)
    assert isinstance(first.contenders["IQL"].inner, TrainOffline)
