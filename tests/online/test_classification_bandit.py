"""A bandit made of a classification table, and the loop that plays it."""

import polars as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from minimand.online import ClassificationBandit, NeuralCB, play_bandit


def from_targets(values):
    return ClassificationBandit.from_table(pl.DataFrame({"a": [1.0, 2.0], "b": values}), target="b")


class Scripted:
    """An agent that takes the actions it was given, and writes down what it is told."""

    def __init__(self, actions):
        self.actions, self.told = iter(actions), []

    def act(self, contexts):
        return torch.tensor([next(self.actions)]), torch.tensor([0.5])

    def update(self, contexts, action, loss):
        self.told.append((contexts.tolist(), int(action), float(loss)))


FEATURES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
LABELS = torch.tensor([2, 0, 1, 0])


def test_regret_counts_the_mistakes_and_only_the_loss_of_the_action_taken_is_told():
    bandit = ClassificationBandit(FEATURES, LABELS)
    rows = bandit.rows(4, seed=3)
    script = [int(LABELS[rows[0]]), (int(LABELS[rows[1]]) + 1) % 3, int(LABELS[rows[2]]), int(LABELS[rows[3]])]
    agent = Scripted(script)
    run = play_bandit(agent, bandit, num_rounds=4, seed=3)
    assert run.regret.tolist() == [0, 1, 1, 1]
    assert run.actions.tolist() == script
    assert run.probabilities.tolist() == [0.5] * 4
    expected = [([FEATURES[row].tolist()], a, float(a != LABELS[row])) for row, a in zip(rows, script, strict=True)]
    assert agent.told == expected


def test_the_label_has_no_loss_and_every_other_action_has_one():
    losses = ClassificationBandit(FEATURES, LABELS).losses(torch.arange(4))
    assert torch.equal(losses, 1 - nn.functional.one_hot(LABELS, 3).float())


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_every_pass_shows_every_row_once_and_sorted_ones_class_after_class(order):
    bandit = ClassificationBandit(FEATURES, LABELS)
    rows = bandit.rows(10, order=order, seed=1)
    assert sorted(rows[:4].tolist()) == sorted(rows[4:8].tolist()) == [0, 1, 2, 3]
    assert torch.equal(rows, bandit.rows(10, order=order, seed=1))
    labels = LABELS[rows[:8].view(2, 4)].tolist()
    assert (labels == [[0, 0, 1, 2]] * 2) == (order == "sorted")


def test_a_csv_of_mixed_columns_becomes_unit_contexts_and_classes_in_order(tmp_path):
    path = tmp_path / "fruit.csv"
    path.write_text("weight,skin,name\n1.0,rough,pear\n2.0,smooth,apple\n,smooth,fig\n4.0,rough,pear\n")
    bandit = ClassificationBandit.from_table(pl.read_csv(path), target="name")
    assert bandit.labels.tolist() == [2, 0, 1, 2]
    assert torch.allclose(bandit.features.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("values", [[3.0, 1.0], [True, False], [7, -2], ["no", "aye"]])
def test_classes_of_any_kind_are_numbered_in_their_order(values):
    assert from_targets(values).labels.tolist() == [1, 0]


def test_an_agent_learns_the_digits_from_the_losses_of_its_actions_alone():
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    bandit = ClassificationBandit(nn.functional.normalize(images.float()), labels)
    torch.manual_seed(0)
    agent = NeuralCB(nn.Linear(64, 10), gamma=100.0, lr=1.0)
    regret = play_bandit(agent, bandit, num_rounds=3000).regret
    assert regret[-1] - regret[-1001] < 250  # of 1000 rounds; by chance 900


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassificationBandit(FEATURES, LABELS[:3]), "must have shape"),
        (lambda: ClassificationBandit(FEATURES / 0, LABELS), "features contains NaN"),
        (lambda: ClassificationBandit(FEATURES, LABELS * 0), "at least 2 classes"),
        (lambda: ClassificationBandit(FEATURES, LABELS - 1), "at least 2 classes"),
        (lambda: ClassificationBandit(FEATURES, LABELS).rows(0), "num_rounds must be"),
        (lambda: ClassificationBandit(FEATURES, LABELS).rows(3, order="worst"), "order must be one of"),
        (lambda: ClassificationBandit.from_table(pl.DataFrame({"a": [1]}), target="b"), "target must be one of"),
        (lambda: ClassificationBandit.from_table(pl.DataFrame({"a": [1], "b": [None]}), target="b"), "every row"),
        (lambda: ClassificationBandit.from_table(pl.DataFrame({"b": [1, 2]}), target="b"), "nothing to decide by"),
        (lambda: from_targets([0.5, 1.0]), "must hold classes"),
        (lambda: from_targets([float("nan"), 1.0]), "must hold classes"),
        (lambda: from_targets(["x", "x"]), "at least 2 classes"),
        (lambda: play_bandit(Scripted([7]), ClassificationBandit(FEATURES, LABELS), num_rounds=1), "agent must take"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
