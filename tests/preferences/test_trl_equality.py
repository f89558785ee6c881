"""Where TRL has a method too, its own trainer gives the same loss and the same gradient of every weight.

Each of TRL's losses is computed by TRL's trainer, from tokens; ours by the pure path, from the same tokens, the model's
scores and this room's functions.
"""

import datasets
import pytest
import tiny_llama
import torch
import transformers
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from minimand.preferences import (
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    RPOLoss,
    SFTLoss,
    SimPOLoss,
    SPPOLoss,
    kto_baseline,
    sequence_log_probability,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
TOKENIZER = tiny_llama.tokenizer()
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_length": 32}
ROWS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("reference"), seed=1)


def gradient(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def assert_equal(mine, theirs, model):
    torch.testing.assert_close(mine.detach(), theirs.detach(), atol=1e-5, rtol=1e-5)
    my_gradient, their_gradient = gradient(mine, model), gradient(theirs, model)
    assert my_gradient.norm() > 1e-3
    torch.testing.assert_close(my_gradient, their_gradient, atol=1e-5, rtol=1e-5)


def scored(model, ids, attention, answer):
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    return sequence_log_probability(logits, ids[:, 1:], answer[:, 1:].bool())


def first_rows(trainer, count=ROWS):
    """A batch of the trainer's own collator."""
    wanted = trainer._signature_columns or trainer.train_dataset.column_names
    return trainer.data_collator(
        [{key: value for key, value in trainer.train_dataset[row].items() if key in wanted} for row in range(count)]
    )


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("sigmoid", DPOLoss(beta=0.2)),
        ("ipo", IPOLoss(beta=0.2, length_normalized=True)),
        ("hinge", HingeLoss(beta=0.2)),
        ("sppo_hard", SPPOLoss(beta=0.2)),
        ("sft", SFTLoss("batch")),
    ],
)
def test_losses_of_trls_dpo_trainer(loss_type, objective, folder, reference, tmp_path):
    trainer = trl.DPOTrainer(
        tiny_llama.load(folder),
        ref_model=tiny_llama.load(reference),
        args=trl.DPOConfig(str(tmp_path), loss_type=loss_type, beta=0.2, **COMMON),
        train_dataset=tiny_llama.pairs(ROWS),
        processing_class=TOKENIZER,
    )
    model, batch = trainer.model, first_rows(trainer)
    theirs = trainer.compute_loss(model, batch)
    tokens = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    logp, lengths = scored(model, *tokens)
    with torch.no_grad():
        ref_logp, _ = scored(tiny_llama.load(reference), *tokens)
    (chosen, rejected), (ref_chosen, ref_rejected) = logp.chunk(2), ref_logp.chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    mine = objective(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    assert (chosen_lengths != rejected_lengths).any()
    assert_equal(mine, theirs, model)


def test_rpo_of_trls_dpo_trainer_with_a_likelihood_term_where_chosen_answers_are_of_one_length(
    folder, reference, tmp_path
):
    beta, eta = 0.2, 0.3
    rows = [row for row in tiny_llama.pairs(64) if len(row["chosen"].split()) == 4][:ROWS]
    tokens_of_an_answer = 5  # its words and the end of text
    trainer = trl.DPOTrainer(
        tiny_llama.load(folder),
        ref_model=tiny_llama.load(reference),
        args=trl.DPOConfig(
            str(tmp_path),
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, eta * beta * tokens_of_an_answer],
            beta=beta,
            **COMMON,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )
    model, batch = trainer.model, first_rows(trainer)
    tokens = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    logp, lengths = scored(model, *tokens)
    assert (lengths[:ROWS] == tokens_of_an_answer).all()
    with torch.no_grad():
        ref_logp, _ = scored(tiny_llama.load(reference), *tokens)
    mine = RPOLoss(beta, eta=eta)(*logp.chunk(2), *ref_logp.chunk(2))
    assert_equal(mine, trainer.compute_loss(model, batch), model)


@pytest.mark.parametrize(("swapped", "clamped"), [(False, False), (True, True)])
def test_kto_of_trls_kto_trainer(swapped, clamped, folder, reference, tmp_path):
    policy, other = (reference, folder) if swapped else (folder, reference)
    pairs = tiny_llama.pairs(ROWS)
    answers = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for key in ("chosen", "rejected")
        for row in pairs
    ]
    trainer = trl.KTOTrainer(
        tiny_llama.load(policy),
        ref_model=tiny_llama.load(other),
        args=trl.KTOConfig(
            str(tmp_path),
            beta=0.2,
            desirable_weight=1.5,
            undesirable_weight=0.7,
            per_device_train_batch_size=2 * ROWS,
            **COMMON,
        ),
        train_dataset=datasets.Dataset.from_list(answers),
        processing_class=TOKENIZER,
    )
    trainer._set_signature_columns_if_needed()
    model, batch = trainer.model, first_rows(trainer, 2 * ROWS)
    assert batch["label"].tolist() == [True] * ROWS + [False] * ROWS
    theirs = trainer.compute_loss(model, batch)
    tokens = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    mismatched = batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"]
    frozen = tiny_llama.load(other)
    logp, _ = scored(model, *tokens)
    with torch.no_grad():
        ref_logp, _ = scored(frozen, *tokens)
        baseline = kto_baseline(scored(model, *mismatched)[0], scored(frozen, *mismatched)[0])
    mine = KTOLoss(0.2, desirable_weight=1.5, undesirable_weight=0.7)(
        *logp.chunk(2), *ref_logp.chunk(2), baseline=baseline
    )
    # Whichever way round the two models are, one of the two estimates is clamped at 0.
    assert (baseline == 0) == clamped
    assert_equal(mine, theirs, model)


def without_reference(trainer, batch):
    """Log-probabilities and lengths of the batches of TRL's trainers that keep no reference."""
    rows = []
    for side in ("chosen", "rejected"):
        labels = batch[f"{side}_labels"]
        rows.append(scored(trainer.model, batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], labels != -100))
    (chosen, chosen_lengths), (rejected, rejected_lengths) = rows
    return (chosen, rejected), {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 0.6, "beta": 0.3}, CPOLoss(0.3, sft_weight=0.6, normalization="batch")),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.8},
            SimPOLoss(2.5, target_margin=0.8),
        ),
    ],
    ids=["cpo", "simpo"],
)
def test_losses_of_trls_cpo_trainer(settings, objective, folder, tmp_path):
    trainer = CPOTrainer(
        tiny_llama.load(folder),
        args=CPOConfig(str(tmp_path), **COMMON, **settings),
        train_dataset=tiny_llama.pairs(ROWS),
        processing_class=TOKENIZER,
    )
    batch = first_rows(trainer)
    theirs = trainer.compute_loss(trainer.model, batch)
    rows, lengths = without_reference(trainer, batch)
    assert_equal(objective(*rows, **lengths), theirs, trainer.model)


def orpo(folder, path, pairs):
    return ORPOTrainer(
        tiny_llama.load(folder),
        args=ORPOConfig(str(path), beta=0.4, **COMMON),
        train_dataset=pairs,
        processing_class=TOKENIZER,
    )


def test_orpo_of_trls_orpo_trainer_where_the_prompt_is_one_token(folder, tmp_path):
    trainer = orpo(folder, tmp_path, tiny_llama.pairs(ROWS, prompt_words=1))
    batch = first_rows(trainer)
    # A prompt is a start token and a word. TRL's supervised term counts the tokens of the prompt as well, which a
    # prompt of one token has none of that are predicted.
    batch = {key: value[:, 1:] if value.dim() == 2 else value for key, value in batch.items() if torch.is_tensor(value)}
    assert (batch["chosen_labels"][:, 0] == -100).all()
    assert (batch["chosen_labels"][:, 1] != -100).all()
    theirs = trainer.compute_loss(trainer.model, batch)
    rows, lengths = without_reference(trainer, batch)
    assert_equal(ORPOLoss(0.4, normalization="batch")(*rows, **lengths), theirs, trainer.model)


def test_the_odds_ratio_of_trls_orpo_trainer_whatever_the_prompt(folder, tmp_path):
    trainer = orpo(folder, tmp_path, tiny_llama.pairs(ROWS))
    rows, lengths = without_reference(trainer, first_rows(trainer))
    means = [row / length for row, length in zip(rows, lengths.values(), strict=True)]
    theirs = -trainer.odds_ratio_loss(*means)[0].mean()
    rows, lengths = without_reference(trainer, first_rows(trainer))
    both = ORPOLoss(0.4)(*rows, **lengths) - ORPOLoss(0.0)(*rows, **lengths)
    assert_equal(both, theirs, trainer.model)
