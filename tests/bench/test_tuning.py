"""Tuning is fair: the same proposals for all, chosen on validation data only."""

import math

import pytest
import torch

from minimand.bench import Metric, Outcome, Run
from minimand.bench.classification import Range, Split, TrainClassifier
from minimand.bench.tuning import Selected, UnderConditions, propose, tuned
from minimand.training import Recipe


class Spy:
    """A contender whose quality is its setting and that remembers what it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, data, run):
        return self.batch([data], [run])[0]

    def batch(self, datas, runs):
        self.seen.append((datas, [dict(run.settings) for run in runs]))
        return [
            Outcome({"accuracy": -abs(run.settings.get("x", 0) - data.num_classes)})
            for data, run in zip(datas, runs, strict=True)
        ]


def split(classes, rows=60):
    target = torch.arange(rows) % classes
    return Split(torch.arange(rows, dtype=torch.float32)[:, None], target, -torch.ones(5, 1), target[:5], classes)


def test_each_cell_keeps_the_setting_that_is_best_on_its_own_validation_data():
    spy = Spy()
    outcomes = Selected(spy, [{}, {"x": 2}, {"x": 3}]).batch([split(2), split(3)], [Run(0), Run(1)])
    assert [outcome.metrics["accuracy"] for outcome in outcomes] == [0, 0]
    assert spy.seen[-1][1] == [{"x": 2}, {"x": 3}]


def test_trials_never_see_test_data_and_the_last_run_trains_on_all_training_data():
    spy = Spy()
    data = split(3)
    Selected(spy, [{}, {"x": 2}, {"x": 3}])(data, Run(0))
    *trials, final = spy.seen
    assert len(trials) == 3
    for (inner,), _ in trials:
        assert (inner.train_inputs >= 0).all()
        assert (inner.test_inputs >= 0).all()
        together = torch.cat([inner.train_inputs, inner.test_inputs]).flatten().sort().values
        assert torch.equal(together, data.train_inputs.flatten())
    assert final[0][0] is data


def test_one_proposal_is_not_tried_first():
    spy = Spy()
    Selected(spy, [{"x": 1}])(split(2), Run(0))
    assert len(spy.seen) == 1


def test_lower_is_better_is_chosen_the_other_way():
    outcome = Selected(Spy(), [{"x": 2}, {"x": 9}], metric=Metric("accuracy", "lower is better"))(split(2), Run(0))
    assert outcome.metrics["accuracy"] == -7


def test_proposals_are_the_defaults_then_a_sequence_inside_the_ranges_the_same_every_time():
    space = {"lr": Range(1e-4, 1e-1, log=True), "tau": Range(0.5, 2.0)}
    first, again, other = propose(space, 9, 0), propose(space, 9, 0), propose(space, 9, 1)
    assert first == again != other
    assert first[0] == {}
    assert len(first) == 9
    assert all(1e-4 <= p["lr"] <= 1e-1 and 0.5 <= p["tau"] <= 2.0 for p in first[1:])
    assert len({p["lr"] for p in first[1:]}) == 8
    # Even in the logarithm: half of the rates lie below the geometric mean, give or take one of eight.
    assert 3 <= sum(math.log10(p["lr"]) < -2.5 for p in first[1:]) <= 5


def test_no_trials_are_refused():
    with pytest.raises(ValueError, match="tune must be"):
        propose({"lr": Range(0.1, 1.0)}, 0, 0)


def test_tuning_helps_a_contender_with_a_hopeless_default():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (300,), generator=generator)
    inputs = torch.randn(300, 5, generator=generator) + 2 * torch.nn.functional.one_hot(target, 5)
    data = Split(inputs[:200], target[:200], inputs[200:], target[200:], 3)
    contender = TrainClassifier(lambda classes: torch.nn.CrossEntropyLoss(), recipe=Recipe(epochs=3, lr=1e-6))
    plain = contender(data, Run(0)).metrics["accuracy"]
    assert tuned(contender, 8)(data, Run(0)).metrics["accuracy"] > plain + 0.1


def test_validation_holds_out_a_fifth_of_each_class_and_spares_the_rarest():
    data = split(3, rows=90)
    inner = data.validation(0)
    assert torch.bincount(inner.test_target).tolist() == [6, 6, 6]
    lonely = Split(torch.zeros(11, 1), torch.tensor([0] * 10 + [1]), torch.zeros(1, 1), torch.tensor([0]), 2)
    assert (lonely.validation(0).train_target == 1).sum() == 1


def test_conditions_become_metrics_of_their_own():
    outcome = UnderConditions(Spy())({"clean": split(2), "noisy": split(3)}, Run(0))
    assert outcome.metrics == {"accuracy, clean": -2, "accuracy, noisy": -3}
