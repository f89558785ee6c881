"""Copies of an environment with gymnasium's interface, as tensors."""

import sys
from types import SimpleNamespace

import mo_gymnasium
import numpy as np
import pytest
import torch

from minimand.policies import GymEpisodes, VectorEnvironment


def test_steps_are_those_of_mo_gymnasium_and_an_episode_that_is_over_begins_anew():
    episodes = GymEpisodes("deep-sea-treasure-concave-v0", num_episodes=2)
    peers = [mo_gymnasium.make("deep-sea-treasure-concave-v0") for _ in range(2)]
    assert (episodes.action_size, episodes.discrete, episodes.num_objectives) == (4, True, 2)
    assert isinstance(episodes, VectorEnvironment)
    seen = episodes.reset()
    wanted = [peer.reset(seed=i)[0] for i, peer in enumerate(peers)]
    np.testing.assert_allclose(seen.numpy(), np.stack(wanted))
    generator, ends = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        action = torch.randint(4, (2,), generator=generator)
        step = episodes.step(action)
        for i, peer in enumerate(peers):
            observation, reward, terminated, truncated, _ = peer.step(int(action[i]))
            np.testing.assert_allclose(step.rewards[i].numpy(), reward)
            np.testing.assert_allclose(step.last[i].numpy(), observation)
            assert (bool(step.terminated[i]), bool(step.truncated[i])) == (terminated, truncated and not terminated)
            if terminated or truncated:
                ends += 1
                observation = peer.reset()[0]
            np.testing.assert_allclose(step.observation[i].numpy(), observation)
    assert ends > 0


def test_numbers_in_the_unit_interval_are_stretched_to_the_bounds_of_the_box():
    class Box:
        low, high, shape, dtype = np.array([-2.0, 0.0]), np.array([2.0, 10.0]), (2,), np.float64

    class Echo:
        action_space = Box()

        def reset(self, *, seed=None):
            return np.zeros(1), {}

        def step(self, action):
            return np.zeros(1), action, False, True, {}

    step = GymEpisodes(Echo, num_episodes=1, num_objectives=2)
    step.reset()
    assert step.step(torch.tensor([[0.0, 3.0]])).rewards.tolist() == [[0.0, 10.0]]
    assert step.step(torch.tensor([[-1.0, 0.0]])).truncated.tolist() == [True]


def test_a_discrete_observation_becomes_an_indicator():
    class Counter:
        action_space, observation_space = SimpleNamespace(n=2), SimpleNamespace(n=3)

        def reset(self, *, seed=None):
            return 1, {}

        def step(self, action):
            return 2, [1.0], False, False, {}

    episodes = GymEpisodes(Counter, num_episodes=1, num_objectives=1)
    assert episodes.observation_size == 3
    assert episodes.reset().tolist() == [[0, 1, 0]]
    assert episodes.step(torch.tensor([0])).observation.tolist() == [[0, 0, 1]]


@pytest.mark.untyped
def test_errors_say_what_is_missing(monkeypatch):
    class Endless:
        action_space = SimpleNamespace()

    with pytest.raises(ValueError, match="discrete or bounded"):
        GymEpisodes(Endless, num_episodes=1)
    with pytest.raises(ValueError, match="num_episodes"):
        GymEpisodes("deep-sea-treasure-v0", num_episodes=0)
    monkeypatch.setitem(sys.modules, "mo_gymnasium", None)
    with pytest.raises(ImportError, match=r"minimand\[policies\]"):
        GymEpisodes("deep-sea-treasure-v0", num_episodes=1)
