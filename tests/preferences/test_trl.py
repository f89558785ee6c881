"""Objectives of the room inside TRL's trainer, held against TRL's own run of the same seed."""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import datasets
import peft
import pytest
import tiny_llama
import torch
import transformers
import trl
from safetensors.torch import load_file
from torch import nn
from trl.trainer import dpo_trainer
from two_processes import Tempered

from minimand import preferences
from minimand.preferences import CPOLoss, DPOLoss, SFTLoss, SimPOLoss
from minimand.preferences.trl import PairLossTrainer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
TOKENIZER = tiny_llama.tokenizer()
PAIRS = tiny_llama.pairs()
# What an objective cannot be built without.
SETTINGS = {"SparseTokenMask": {"hidden_size": 32}}
OBJECTIVES = [
    name
    for name in preferences.__all__
    if inspect.isclass(part := getattr(preferences, name)) and hasattr(part, "from_tokens") and name != "PairLoss"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        defaults = {
            "max_steps": 20,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return trl.DPOConfig(str(tmp_path / "run"), **(defaults | changes))

    return make


def ours(folder, args, objective, **more):
    return PairLossTrainer(
        tiny_llama.load(folder), args, PAIRS, objective=objective, processing_class=TOKENIZER, **more
    )


def theirs(folder, args, **more):
    return trl.DPOTrainer(tiny_llama.load(folder), args=args, train_dataset=PAIRS, processing_class=TOKENIZER, **more)


def history(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(one, other, tolerance=1e-5):
    assert len(one) == len(other) > 0
    for mine, its in zip(one, other, strict=True):
        assert mine.keys() == its.keys()
        for key, value in its.items():
            assert mine[key] == pytest.approx(value, abs=tolerance, rel=tolerance), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_twenty_steps_through_trl(name, folder, settings):
    objective = getattr(preferences, name)(**SETTINGS.get(name, {}))
    trainer = ours(folder, settings(), objective)
    assert (trainer.ref_model is not None) == objective.needs_reference
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    own = [parameter.clone() for parameter in objective.parameters()]
    losses = torch.tensor([entry["loss"] for entry in history(trainer)])
    assert trainer.state.global_step == 20
    assert torch.isfinite(losses).all()
    assert any(not torch.equal(was, now) for was, now in zip(before, trainer.model.parameters(), strict=True))
    assert all(not torch.equal(was, now) for was, now in zip(own, objective.parameters(), strict=True))


def test_dpo_is_trls_own_run_step_for_step_in_every_metric(folder, settings):
    mine, its = history(ours(folder, settings(), DPOLoss())), history(theirs(folder, settings()))
    assert_same(mine, its)
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"} <= mine[0].keys()
    first, last = mine[0]["loss"], sum(entry["loss"] for entry in mine[-4:]) / 4
    assert first == pytest.approx(0.6931, abs=1e-4)
    assert last < 0.7 * first


def test_accumulated_gradients_are_trls_and_those_of_one_large_batch(folder, settings):
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 5}
    assert_same(history(ours(folder, settings(**args), DPOLoss())), history(theirs(folder, settings(**args))))
    small, large = (
        ours(folder, settings(**(args | more)), Tempered())
        for more in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1})
    )
    history(small)
    history(large)
    assert small.objective.log_beta.item() == pytest.approx(large.objective.log_beta.item(), abs=1e-6)


def test_references_computed_beforehand_are_those_computed_on_the_way(folder, settings):
    now = history(ours(folder, settings(), DPOLoss()))
    trainer = ours(folder, settings(precompute_ref_log_probs=True), DPOLoss())
    assert trainer.ref_model is None
    assert_same(history(trainer), now)


def test_low_rank_adapters_train_as_in_trl_and_the_bare_model_is_the_reference(folder, settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8)
    args = {"learning_rate": 1e-2}
    trainer = ours(folder, settings(**args), DPOLoss(), peft_config=config)
    assert trainer.ref_model is None
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    mine = history(trainer)
    assert mine[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert mine[-1]["loss"] < 0.6
    assert_same(mine, history(theirs(folder, settings(**args), peft_config=config)))


def test_an_objective_without_reference_takes_adapters_too(folder, settings):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    trainer = ours(folder, settings(max_steps=2), SimPOLoss(), peft_config=config)
    assert trainer.ref_model is None
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in history(trainer)])).all()


def test_a_run_that_was_cut_in_two_is_the_run_that_was_not_with_the_objectives_parameters(folder, settings):
    whole = ours(folder, settings(lr_scheduler_type="constant"), Tempered())
    expected = history(whole)
    assert whole.objective.log_beta.item() != -2.0
    args = {"save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "constant"}
    first = ours(folder, settings(max_steps=10, **args), Tempered())
    history(first)
    checkpoint = f"{first.args.output_dir}/checkpoint-10"
    saved = load_file(f"{checkpoint}/objective.safetensors")
    assert saved["log_beta"].item() == first.objective.log_beta.item()
    assert saved["seen"].item() == 40
    second = ours(folder, settings(**args), Tempered())
    resumed = history(second, resume=checkpoint)
    losses = [entry["loss"] for entry in resumed]
    assert losses == pytest.approx([entry["loss"] for entry in expected], abs=1e-5)
    assert second.objective.log_beta.item() == pytest.approx(whole.objective.log_beta.item(), abs=1e-6)
    assert second.objective.seen.item() == 80
    with pytest.raises(ValueError, match=r"has no objective\.safetensors"):
        ours(folder, settings(), Tempered())._load_objective(folder)


def test_an_optimizer_of_the_users_must_hold_the_objectives_parameters(folder, settings):
    model, objective = tiny_llama.load(folder), Tempered()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = PairLossTrainer(
        model,
        settings(),
        PAIRS,
        objective=objective,
        processing_class=TOKENIZER,
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="lacks parameters of the objective"):
        trainer.train()


def test_evaluation_is_trls(folder, settings):
    more = {"eval_dataset": tiny_llama.pairs(rows=6, seed=1)}
    mine, its = ours(folder, settings(), DPOLoss(), **more).evaluate(), theirs(folder, settings(), **more).evaluate()
    shared = [key for key in its if not key.endswith(("runtime", "second"))]
    assert "eval_rewards/margins" in shared
    assert {key: mine[key] for key in shared} == pytest.approx({key: its[key] for key in shared}, abs=1e-5)


def test_scores_of_the_whole_vocabulary_say_what_the_fused_head_says(folder, settings, monkeypatch):
    trainer = ours(folder, settings(), DPOLoss())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    fused = trainer._score(trainer.model, batch, metrics=True)
    monkeypatch.delattr(dpo_trainer, "add_fused_lm_head", raising=False)
    plain = trainer._score(trainer.model, batch, metrics=True, hidden=True)
    mask = batch["completion_mask"][:, 1:].bool()
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(plain, name)[mask], getattr(fused, name)[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(plain.is_top1[mask], fused.is_top1[mask])
    head = trainer.model.get_output_embeddings()
    rebuilt = head(plain.hidden).log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(rebuilt, plain.log_probs, atol=1e-5, rtol=1e-5)


def test_the_users_settings_are_left_as_they_were(folder, settings):
    args = settings()
    trainer = ours(folder, args, CPOLoss())
    assert args.precompute_ref_log_probs is False
    assert trainer.args.precompute_ref_log_probs is False
    assert "ref_chosen_logps" not in trainer.train_dataset.column_names


@pytest.mark.untyped
def test_what_would_be_without_effect_is_refused(folder, settings):
    with pytest.raises(ValueError, match=r"args\.loss_type=\['ipo'\] has no effect: DPOLoss"):
        ours(folder, settings(loss_type="ipo"), DPOLoss())
    with pytest.raises(ValueError, match=r"args\.beta=0\.5 has no effect"):
        ours(folder, settings(beta=0.5), DPOLoss())
    ours(folder, settings(beta=0.5), DPOLoss(beta=0.5))
    with pytest.raises(ValueError, match="sync_ref_model is set, but SFTLoss needs no reference"):
        ours(folder, settings(sync_ref_model=True), SFTLoss())
    with pytest.raises(ValueError, match="ref_model was given, but SFTLoss needs no reference"):
        ours(folder, settings(), SFTLoss(), ref_model=tiny_llama.load(folder))
    with pytest.raises(ValueError, match="Tempered looks at single tokens"):
        ours(folder, settings(precompute_ref_log_probs=True), Tempered())
    with pytest.raises(TypeError, match="got the class DPOLoss"):
        ours(folder, settings(), DPOLoss)
    with pytest.raises(TypeError, match="got MSELoss"):
        ours(folder, settings(), nn.MSELoss())
    with pytest.raises(ValueError, match="must reduce to a scalar"):
        ours(folder, settings(), DPOLoss(reduction="none")).train()


def test_a_reference_of_another_vocabulary_is_refused(folder, settings):
    other = tiny_llama.load(folder)
    other.resize_token_embeddings(48)
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 48 tokens, the policy one of 40"):
        ours(folder, settings(), DPOLoss(), ref_model=other)


def test_the_room_needs_no_trl_and_says_what_to_install_where_it_does():
    script = (
        "import sys; sys.modules.update(trl=None, peft=None, datasets=None, transformers=None, accelerate=None)\n"
        "import minimand.preferences\n"
        "try:\n"
        "    import minimand.preferences.trl\n"
        "except ImportError as error:\n"
        "    assert 'minimand[preferences]' in str(error)\n"
        "else:\n"
        "    raise SystemExit('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch_for_the_objectives_parameters_too(folder, tmp_path):
    script = str(pathlib.Path(__file__).with_name("two_processes.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(name, pairs_a_process, *launcher):
        command = [*launcher, script, folder, str(tmp_path / name), str(pairs_a_process)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{name}-*.json"))]

    (alone,) = run("one", 4, sys.executable)
    both = run("two", 2, *launcher)
    assert len(both) == 2
    for one in both:
        assert one["log_beta"] == pytest.approx(alone["log_beta"], abs=1e-6)
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert one["margins"] == pytest.approx(alone["margins"], abs=1e-3)
        assert one["tokens"] == alone["tokens"]
    assert alone["log_beta"] != -2.0
