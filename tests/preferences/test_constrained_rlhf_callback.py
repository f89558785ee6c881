"""Multipliers inside TRL's trainers: the weights are those of the formula, and rewards go to their thresholds."""

import datasets
import pytest
import tiny_llama
import torch
import transformers
import trl

from minimand.preferences import RewardMultipliers, ThresholdSearch
from minimand.preferences.constrained_rlhf_callback import ConstrainedRewardsCallback

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
TOKENIZER = tiny_llama.tokenizer()
PROMPTS = datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)])


def low(completion_ids, **_):
    """The share of tokens among the first half of the words."""
    return [sum(token < 22 for token in ids) / len(ids) for ids in completion_ids]


def even(completion_ids, **_):
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def build(folder, tmp_path):
    def make(kind="GRPO", rewards=(low, even), **changes):
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 6,
            "logging_steps": 1,
            "learning_rate": 3e-3,
            "beta": 0.05,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "gradient_checkpointing": False,
        }
        if kind == "GRPO":
            settings["scale_rewards"] = "none"
        config = getattr(trl, f"{kind}Config")(str(tmp_path / "run"), **(settings | changes))
        return getattr(trl, f"{kind}Trainer")(
            folder, list(rewards), args=config, train_dataset=PROMPTS, processing_class=TOKENIZER
        )

    return make


def constrain(trainer, thresholds=(0.7, 0.3), kind="exactly", **settings):
    options = {name: settings.pop(name) for name in ("lr", "damping") if name in settings}
    multipliers = RewardMultipliers(torch.tensor(thresholds), kind=kind, **options)
    callback = ConstrainedRewardsCallback(trainer, multipliers, **settings)
    trainer.add_callback(callback)
    return callback


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_weights_and_beta_follow_the_multipliers_through_the_trainer(build, kind):
    trainer = build(kind)
    callback = constrain(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/low/mean" in entry]
    assert len(callback.history) == len(logged) == 3
    alone = RewardMultipliers(torch.tensor([0.7, 0.3]))
    for entry, log in zip(callback.history, logged, strict=True):
        alone.update(torch.tensor([log["rewards/low/mean"], log["rewards/even/mean"]]))
        assert entry["weights"] == pytest.approx(alone.weights.tolist(), abs=1e-6)
        assert entry["beta"] == pytest.approx(0.05 * alone.kl_weight.item(), rel=1e-6)
    assert torch.allclose(trainer.reward_weights, alone.weights)


def test_the_trainer_rewards_by_the_weights_it_was_given(build):
    """What TRL logs as the reward is the mean of the weighted sum, with the weights of the step before."""
    trainer = build()
    callback = constrain(trainer, kind="at least", lr=1.0)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/low/mean" in entry]
    weights = [[0.5, 0.5], *[entry["weights"] for entry in callback.history]]
    for entry, log, used in zip(callback.history, logged, weights, strict=False):
        assert log["reward"] == pytest.approx(sum(w * v for w, v in zip(used, entry["values"], strict=True)), abs=1e-5)


def test_a_reward_climbs_to_its_threshold_and_stays(build):
    trainer = build(
        rewards=[low], max_steps=40, per_device_train_batch_size=32, beta=0.02, lr_scheduler_type="constant"
    )
    callback = constrain(trainer, thresholds=[0.75], lr=0.3, damping=10.0)
    trainer.train()
    values = torch.tensor([entry["values"][0] for entry in callback.history])
    assert values[:3].mean() < 0.65
    assert values[-20:].mean() == pytest.approx(0.75, abs=0.05)
    assert (values[-20:] - 0.75).abs().mean() < 0.1


def test_a_search_within_the_run_moves_the_thresholds(build):
    trainer = build(max_steps=9)
    search = ThresholdSearch(torch.tensor([[0.4, 0.6], [0.4, 0.6]]), generator=torch.Generator().manual_seed(0))
    seen = []

    def evaluate(model):
        seen.append(model)
        return float(len(seen))

    callback = constrain(trainer, search=search, evaluate=evaluate, patience=3)
    first = callback.multipliers.thresholds.clone()
    trainer.train()
    thresholds = torch.tensor([entry["thresholds"] for entry in callback.history])
    assert search.evaluations == len(seen) >= 3
    assert isinstance(seen[0], torch.nn.Module)
    assert torch.equal(thresholds[0], first)
    assert len(thresholds.unique(dim=0)) == len(seen) + 1


def test_a_resumed_run_takes_up_the_multipliers_and_the_search(build, tmp_path):
    box = torch.tensor([[0.4, 0.6], [0.4, 0.6]])

    def run(steps, **more):
        trainer = build(max_steps=steps, save_strategy="steps", save_steps=3)
        search = ThresholdSearch(box, generator=torch.Generator().manual_seed(more.pop("seed")))
        callback = constrain(trainer, search=search, evaluate=lambda model: 1.0 + search.evaluations, patience=2)
        trainer.train(**more)
        return callback

    first = run(3, seed=0)
    again = run(4, seed=1, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected = RewardMultipliers(torch.zeros(2))
    expected.load_state_dict(first.multipliers.state_dict())
    expected.update(torch.tensor(again.history[0]["values"]))
    assert len(again.history) == 1
    assert again.history[0]["weights"] == pytest.approx(expected.weights.tolist())
    assert again.search.evaluations == first.search.evaluations + 1 == 2  # the wait of one step was kept as well
    assert torch.equal(again.search.state_dict()["initial"], first.search.state_dict()["initial"])


@pytest.mark.parametrize(
    ("trainer", "settings", "says"),
    [
        ({}, {"thresholds": [0.5]}, "one threshold a reward function"),
        ({"beta": 0.0}, {}, "beta must be above 0"),
        ({"scale_rewards": "group"}, {}, "must not scale rewards"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, {}, "multi_objective_aggregation"),
        ({"rewards": (low, low)}, {}, "names of their own"),
        ({}, {"search": ThresholdSearch(torch.tensor([[0.0, 1.0]] * 2))}, "evaluate is required"),
        ({}, {"patience": 0}, "at least 1"),
    ],
)
def test_what_would_undo_the_multipliers_is_refused(build, trainer, settings, says):
    with pytest.raises(ValueError, match=says):
        constrain(build(**trainer), **settings)
