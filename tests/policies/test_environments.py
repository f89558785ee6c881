"""Environments by name, the logs made in them, and what a policy is worth without one."""

import dataclasses
import math

import gymnasium
import minari
import numpy as np
import pytest
import torch

from minimand.policies import (
    OfflineData,
    Pendulum,
    Transitions,
    behaviour_data,
    fitted_q_evaluation,
    make_environment,
    read_minari,
    train_online,
    write_minari,
)
from minimand.policies.environments import GymnasiumEnvironment, require_fits


class Endless(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    reward = 1.0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), self.reward, False, False, {"cost": 0.5}


class Broken(Endless):
    reward = math.nan

    def step(self, action):
        return (*super().step(action)[:2], True, False, {"cost": 0.5})


def test_an_environment_of_gymnasium_lives_the_episodes_it_would_live_alone():
    world = make_environment("InvertedPendulum-v5")
    log = world.record(lambda seen: torch.sin(seen.sum(1, keepdim=True)), episodes=3, seed=4)
    rows = []
    for place in range(3):
        one = gymnasium.make("InvertedPendulum-v5")
        seen, ends = one.reset(seed=4 + place)[0], False
        while not ends:
            action = torch.sin(torch.as_tensor(seen, dtype=torch.float32)[None].sum(1, keepdim=True))[0].numpy()
            following, reward, terminated, truncated, _ = one.step(action)
            rows.append((seen, reward, terminated, truncated))
            seen, ends = following, terminated or truncated
    np.testing.assert_allclose(log.observation, np.stack([row[0] for row in rows]), atol=1e-5)
    assert log.reward.tolist() == [row[1] for row in rows]
    assert log.terminated.tolist() == [row[2] for row in rows]
    assert log.num_episodes == 3


def test_a_pendulum_of_gymnasium_is_worth_what_ours_is():
    theirs = GymnasiumEnvironment("Pendulum-v1", lambda: gymnasium.make("Pendulum-v1"))
    returns = theirs.record(Pendulum.controller, episodes=40).episode_returns()
    assert (
        abs(returns.mean() - Pendulum().returns(Pendulum.controller, episodes=1000).mean())
        < 4 * returns.std() / 40**0.5
    )


@pytest.mark.untyped
def test_what_cannot_be_acted_in_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="did you mean Hopper-v5"):
        make_environment("Hoper-v5")
    with pytest.raises(TypeError, match="has discrete actions"):
        make_environment("CartPole-v1")
    endless = GymnasiumEnvironment("Endless-v0", Endless)
    with pytest.raises(ValueError, match="did not end in 10,000 steps"):
        endless.record(lambda seen: torch.zeros(len(seen), 1), episodes=1)
    with pytest.raises(ValueError, match="reward contains NaN"):
        GymnasiumEnvironment("Broken-v0", Broken).record(lambda seen: torch.zeros(len(seen), 1), episodes=1)
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install \"minimand\[policies\]\""):
        make_environment("Hopper-v5")


def test_costs_that_an_environment_tells_are_kept():
    class Short(Broken):
        reward = 1.0

    log = GymnasiumEnvironment("Short-v0", Short).record(lambda seen: torch.zeros(len(seen), 1), episodes=2)
    assert log.cost.tolist() == [[0.5], [0.5]]


@pytest.mark.untyped
def test_a_log_of_another_environment_is_refused():
    pendulum = Pendulum()
    log = pendulum.log("random", episodes=2)
    require_fits(log, pendulum, "Pendulum-v1")
    far = dataclasses.replace(log, observation=log.observation + 20)
    with pytest.raises(ValueError, match="400 observations lie outside the space of Pendulum-v1"):
        require_fits(far, pendulum, "Pendulum-v1")
    with pytest.raises(ValueError, match="actions lie outside what Pendulum-v1 takes"):
        require_fits(dataclasses.replace(log, action=3 * log.action), pendulum, "Pendulum-v1")
    with pytest.raises(ValueError, match="another environment"):
        require_fits(log, make_environment("InvertedPendulum-v5"), "InvertedPendulum-v5")
    discrete = Transitions(**log.tensors() | {"action": torch.zeros(400, dtype=torch.int64)})
    with pytest.raises(TypeError, match="actions are choices"):
        require_fits(discrete, pendulum, "Pendulum-v1")


@pytest.mark.parametrize("cost", [False, True])
def test_a_minari_data_set_gives_back_every_bit(tmp_path, cost):
    log = Pendulum().log("mixed", episodes=3)
    if cost:
        log = dataclasses.replace(log, cost=torch.rand(600, 2))
    data = OfflineData(log, "Pendulum-v1", torch.tensor([-2.0]), torch.tensor([2.0]), -1200.0, -150.0)
    write_minari(data, tmp_path / "mixed-v0")
    back = read_minari(tmp_path / "mixed-v0")
    for name, value in log.tensors().items():
        assert torch.equal(back.transitions.tensors()[name], value), name
    assert (back.environment, back.random_score, back.expert_score) == ("Pendulum-v1", -1200.0, -150.0)
    assert (back.low, back.high) == (data.low, data.high)
    with pytest.raises(ValueError, match="is there already"):
        write_minari(data, tmp_path / "mixed-v0")
    with pytest.raises(FileNotFoundError, match="no Minari data set"):
        read_minari(tmp_path / "none-v0")
    (tmp_path / "mixed-v0" / "data" / "main_data.hdf5").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read the Minari data set"):
        read_minari(tmp_path / "mixed-v0")


def test_minari_itself_reads_what_we_write(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    log = Pendulum(episode_steps=10).log("mixed", episodes=3)
    write_minari(OfflineData(log, "Pendulum-v1"), tmp_path / "mixed-v0")
    theirs = minari.load_dataset("mixed-v0")
    assert theirs.total_steps == 30
    assert theirs.spec.env_spec.id == "Pendulum-v1"
    np.testing.assert_array_equal(theirs[1].actions, log.action[10:20].numpy())
    assert read_minari("mixed-v0").transitions.num_episodes == 3


def test_training_in_an_environment_learns_and_grades(tmp_path):
    torch.manual_seed(0)
    told = []
    settings = {"transitions": 400, "rounds": 9, "cache": tmp_path}
    expert = behaviour_data(quality="expert", progress=lambda done, total: told.append((done, total)), **settings)
    assert told[-1] == (9, 9)
    again = behaviour_data(quality="random", progress=lambda *_: pytest.fail("trained again"), **settings)
    assert again.random_score == expert.random_score < expert.expert_score
    mixture = behaviour_data(quality="random-expert", **settings).transitions
    assert mixture.num_episodes == 3  # 20 transitions of the expert are one whole episode
    replay = behaviour_data(quality="medium-replay", **settings).transitions
    assert replay.num_episodes % 2 == 0
    with pytest.raises(ValueError, match="quality must be one of"):
        behaviour_data(quality="good")
    same = train_online(Pendulum(episode_steps=30), rounds=7, seed=3)
    more = train_online(Pendulum(episode_steps=30), rounds=7, seed=3)
    assert torch.equal(same.replay.action, more.replay.action)


def chain(episodes, seed):
    """Episodes of three steps whose reward is the action's square less a tenth of the step: returns known exactly."""
    generator = torch.Generator().manual_seed(seed)
    action = 2 * torch.rand((episodes * 3, 1), generator=generator) - 1
    step = torch.arange(3).repeat(episodes).float()
    ends = step == 2
    seen, following = step[:, None] / 2, (step[:, None] + 1) / 2
    return Transitions(seen, action, action[:, 0] ** 2 - 0.1 * step, following, ends, torch.zeros_like(ends))


def test_fitted_q_evaluation_finds_the_value_of_policies_that_never_acted():
    policies = [lambda seen: torch.full((len(seen), 1), 0.9), lambda seen: seen - 0.5]
    values = fitted_q_evaluation(chain(300, 0), policies, discount=0.9, steps=1500, resamples=3)
    constant = sum(0.9**k * (0.81 - 0.1 * k) for k in range(3))
    linear = sum(0.9**k * ((k / 2 - 0.5) ** 2 - 0.1 * k) for k in range(3))
    assert abs(values[0].mean - constant) < 0.08
    assert abs(values[1].mean - linear) < 0.08
    assert values[0].low < values[0].mean < values[0].high


@pytest.mark.untyped
def test_fitted_q_evaluation_of_one_trajectory_is_refused():
    with pytest.raises(ValueError, match="one trajectory"):
        fitted_q_evaluation(chain(1, 0), [lambda seen: seen])
    with pytest.raises(ValueError, match="resamples must be at least 2"):
        fitted_q_evaluation(chain(3, 0), [lambda seen: seen], resamples=1)
