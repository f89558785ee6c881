"""Logged transitions: what they must satisfy, and that files give back what was put in them."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from minimand.policies import Transitions, read_transitions


def log(lengths=(3, 2, 4), *, seed=0, terminated=(True, False, True), cost=False):
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    last = torch.tensor(lengths).cumsum(0) - 1
    ends = torch.zeros(count, dtype=torch.bool)
    ends[last] = True
    terminal = torch.zeros(count, dtype=torch.bool)
    terminal[last] = torch.tensor(terminated)
    seen = torch.randn(count, 2, generator=generator)
    following = torch.randn(count, 2, generator=generator)
    for place in range(count - 1):
        if not ends[place]:
            following[place] = seen[place + 1]
    return Transitions(
        seen,
        torch.randn(count, 1, generator=generator),
        torch.randn(count, generator=generator),
        following,
        terminal,
        ends & ~terminal,
        torch.rand(count, 2, generator=generator) if cost else None,
    )


def test_returns_and_lengths_are_those_of_a_loop_over_the_rows():
    data = log()
    totals, lengths, total, length = [], [], 0.0, 0
    for reward, end in zip(data.reward.tolist(), data.episode_ends.tolist(), strict=True):
        total, length = total + reward, length + 1
        if end:
            totals.append(total)
            lengths.append(length)
            total, length = 0.0, 0
    torch.testing.assert_close(data.episode_returns(), torch.tensor(totals))
    assert data.episode_lengths().tolist() == lengths == [3, 2, 4]


def test_episodes_that_are_kept_are_kept_whole():
    data = log()
    some = data.episodes(torch.tensor([0, 2]))
    assert some.episode_lengths().tolist() == [3, 4]
    assert torch.equal(some.reward, torch.cat([data.reward[:3], data.reward[5:]]))
    assert torch.equal(Transitions.join([some, data.episodes(torch.tensor([1]))]).reward[7:], data.reward[3:5])


@pytest.mark.parametrize("cost", [False, True])
def test_a_file_gives_back_every_bit(tmp_path, cost):
    data = log(cost=cost)
    data.save(tmp_path / "log.npz")
    back = read_transitions(tmp_path / "log.npz")
    assert all(torch.equal(value, back.tensors()[name]) for name, value in data.tensors().items())
    assert (back.cost is None) == (not cost)


@pytest.mark.parametrize("lists", [True, False])
def test_a_parquet_table_reads_the_same_with_lists_or_numbered_columns(tmp_path, lists):
    data = log()
    columns = {}
    for name, value in data.tensors().items():
        if value.ndim == 1:
            columns[name] = value.numpy()
        elif lists:
            columns[name] = value.numpy().tolist()
        else:
            columns |= {f"{name}_{place}": column for place, column in enumerate(value.numpy().T)}
    pl.DataFrame(columns).write_parquet(tmp_path / "log.parquet")
    back = read_transitions(tmp_path / "log.parquet")
    assert all(torch.equal(value, back.tensors()[name]) for name, value in data.tensors().items())


def test_next_observations_that_are_absent_are_those_of_the_next_row():
    data = log()
    arrays = {"observations": data.observation.numpy(), "actions": data.action.numpy(), "rewards": data.reward.numpy()}
    arrays |= {"terminals": data.terminated.numpy(), "timeouts": data.truncated.numpy()}
    found = Transitions.from_arrays(arrays)
    # What followed the truncated second episode's last row is not known, so that row is not a transition.
    assert found.episode_lengths().tolist() == [3, 1, 4]
    inside = ~found.episode_ends
    kept = torch.tensor([True] * 4 + [False] + [True] * 4)
    assert torch.equal(found.next_observation[inside], data.next_observation[kept][inside])
    assert torch.equal(found.terminated, data.terminated[kept])


def test_integer_actions_are_choices():
    data = log()
    arrays = {name: value.numpy() for name, value in data.tensors().items()} | {"action": np.arange(9)[:, None]}
    found = Transitions.from_arrays(arrays)
    assert not found.continuous
    assert found.action.tolist() == list(range(9))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": torch.tensor([float("nan")] * 9)}, "reward contains NaN"),
        ({"reward": torch.zeros(8)}, r"reward must have shape \(9,\)"),
        ({"observation": torch.full((9, 2), float("inf"))}, "observation contains NaN or infinity"),
        ({"next_observation": torch.zeros(9, 3)}, "next_observation must have the shape of observation"),
        ({"action": torch.zeros(9)}, "action must have shape"),
        ({"action": torch.zeros(9, 1, dtype=torch.int64)}, "int64 with shape"),
        ({"terminated": torch.zeros(9, dtype=torch.bool)}, "an episode that does not end"),
        ({"terminated": torch.zeros(9)}, "terminated must be boolean"),
        ({"cost": torch.zeros(9)}, "cost must have shape"),
        ({"observation": torch.zeros(0, 2)}, "N >= 1"),
    ],
)
def test_a_log_that_cannot_be_is_refused(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        dataclasses.replace(log(), **change)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"actions": np.zeros((2, 1)), "rewards": np.zeros(2)}, "no observation among the arrays"),
        ({"obs": np.zeros((2, 1)), "actions": np.zeros((2, 1)), "rewards": np.zeros(2)}, "where episodes end"),
        ({"obs": np.zeros((2, 1)), "states": np.zeros((2, 1))}, "which is the observation"),
    ],
)
def test_a_file_that_is_not_a_log_says_what_is_missing(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        read_transitions(tmp_path / "x.npz")


def test_a_file_that_is_absent_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_transitions(tmp_path / "x.npz")
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="must end in"):
        read_transitions(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ValueError, match="cannot read transitions from"):
        read_transitions(tmp_path / "x.parquet")
