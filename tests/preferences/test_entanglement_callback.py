"""The callback that watches entanglement: its numbers are those of the parts, and it leaves the run alone."""

import copy
import subprocess
import sys
import xml.etree.ElementTree

import datasets
import pytest
import tiny_llama
import torch
import transformers
import trl

from minimand.preferences import (
    DPOLoss,
    EntanglementCallback,
    NormalizedPairLoss,
    TokenPair,
    collate_pairs,
    entanglement,
    last_linear_layers,
    pair_log_probabilities,
)
from minimand.preferences.trl import PairLossTrainer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
TOKENIZER = tiny_llama.tokenizer()
PAIRS = tiny_llama.pairs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def train(folder, tmp_path):
    def run(kind=trl.DPOTrainer, callbacks=(), **more):
        args = trl.DPOConfig(
            str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=1,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model = tiny_llama.load(folder)
        trainer = kind(
            model, args=args, train_dataset=PAIRS, processing_class=TOKENIZER, callbacks=list(callbacks), **more
        )
        trainer.train()
        return trainer

    return run


def first_pairs(trainer, count):
    rows = [trainer.train_dataset[i] for i in range(count)]
    return [TokenPair(*(tuple(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))) for row in rows]


def test_the_numbers_in_trls_log_are_those_of_the_parts(train, folder, tmp_path):
    callback = EntanglementCallback(num_pairs=3, every=2)
    trainer = train(callbacks=[callback])
    assert [row["step"] for row in callback.history] == [1, 3, 5]
    logged = [row for row in trainer.state.log_history if "entanglement/cosine" in row]
    assert len(logged) == 6
    assert logged[0]["entanglement/cosine"] == callback.history[0]["cosine"]
    policy = tiny_llama.load(folder)  # as it was before the first step
    tokens = pair_log_probabilities(policy, collate_pairs(first_pairs(trainer, 3), share_prompt=False)).sums()
    watched = [layer.weight for layer in last_linear_layers(policy)]
    found = entanglement(tokens.chosen, tokens.rejected, watched)
    first = callback.history[0]
    assert first["cosine"] == pytest.approx(float(found.cosine.mean()), rel=1e-4)
    assert first["ratio"] == pytest.approx(float(found.ratio.mean()), rel=1e-4)
    assert first["chosen_logp"] == pytest.approx(tokens.chosen.mean().item(), rel=1e-5)
    assert first["desired"] + first["both_up"] + first["both_down"] == pytest.approx(1)
    drawn = xml.etree.ElementTree.parse(tmp_path / "run" / "entanglement.svg").getroot()
    assert drawn.tag.endswith("svg")


def test_with_all_layers_watched_the_first_order_change_is_the_change_of_the_step(train):
    callback = EntanglementCallback(
        num_pairs=4, every=1, layers=lambda model: [one for one in model.modules() if type(one).__name__ == "Linear"]
    )

    def freeze(model):
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.requires_grad_(True)

    class LinearOnly(trl.DPOTrainer):
        def create_optimizer(self, *args, **kwargs):
            freeze(self.model)
            return super().create_optimizer(*args, **kwargs)

    train(LinearOnly, [callback])
    for row in callback.history[1:]:  # a step of the warm-up may be zero
        for side in ("chosen", "rejected"):
            assert row[f"{side}_update"] == pytest.approx(row[f"{side}_change"], rel=0.15)


def test_a_run_that_is_watched_is_the_run_that_is_not(train):
    plain, watched = train(), train(callbacks=[EntanglementCallback(every=1)])
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (plain, watched)]
    assert losses[0] == losses[1]
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_watches_pairs_of_ones_own_in_our_trainer_with_a_loss_of_other_coefficients(train, tmp_path):
    callback = EntanglementCallback(
        [TokenPair((4, 5), (6, 7), (8,)), TokenPair((4,), (9,), (8, 10))],
        every=3,
        loss=DPOLoss(),
        path=tmp_path / "charts" / "one.svg",
    )
    train(PairLossTrainer, [callback], objective=NormalizedPairLoss(DPOLoss()))
    assert len(callback.history) == 2
    assert (tmp_path / "charts" / "one.svg").exists()
    first = (tmp_path / "charts" / "one.svg").read_bytes()
    assert callback.draw(tmp_path / "again.svg").read_bytes() == first


@pytest.mark.untyped
def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        EntanglementCallback(every=0)
    with pytest.raises(ValueError, match="pairs is empty"):
        EntanglementCallback([])
    callback = EntanglementCallback()
    with pytest.raises(ValueError, match="nothing was measured yet"):
        callback.draw(tmp_path / "chart.svg")
    with pytest.raises(AttributeError, match="has no attribute 'of'"):
        callback.of
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    state = transformers.TrainerState(is_world_process_zero=True)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="pairs must be given: the training data cannot be read by number"):
        callback.on_train_begin(args, state, None, model=model, train_dataloader=None)
    loader = torch.utils.data.DataLoader([{"chosen": 1}])
    with pytest.raises(ValueError, match="the training data have no 'prompt_ids', 'chosen_ids', 'rejected_ids'"):
        callback.on_train_begin(args, state, None, model=model, train_dataloader=loader)
    args.fsdp = ["full_shard"]
    with pytest.raises(ValueError, match="not with FSDP or DeepSpeed"):
        callback.on_train_begin(args, state, None, model=model, train_dataloader=loader)


def test_it_answers_every_event_of_a_trainer_and_can_be_copied():
    callback = copy.deepcopy(EntanglementCallback())
    for name in dir(transformers.TrainerCallback):
        if name.startswith("on_"):
            assert callable(getattr(callback, name))


def test_it_needs_no_transformers_to_be_made():
    script = (
        "import sys; sys.modules.update(transformers=None, trl=None)\n"
        "from minimand.preferences import EntanglementCallback; EntanglementCallback().on_save()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
