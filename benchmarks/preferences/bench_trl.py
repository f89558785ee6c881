"""A DPO step through TRL's trainer, through ours inside TRL, and through a plain loop of this room.

One random Llama (width 256, 4 layers, 8,000 tokens), 8 pairs of a prompt of 32 tokens and answers of 32; every step
scores policy and reference, goes backward and takes a step of AdamW, without activation checkpoints.
"""

import copy

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl

from benchmarks.timing import paired_ratio
from minimand.preferences import DPOLoss, TokenPair, collate_pairs, pair_log_probabilities
from minimand.preferences.trl import PairLossTrainer

VOCABULARY, PAIRS, TOKENS = 8000, 8, 32
ROUNDS = {"rounds": 7, "warmup": 1}


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(VOCABULARY - 4)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)

    def text(count):
        return " ".join(f"w{int(i)}" for i in torch.randint(VOCABULARY - 4, (count,), generator=generator))

    return datasets.Dataset.from_list(
        [
            {"prompt": text(TOKENS), "chosen": f" {text(TOKENS - 1)}", "rejected": f" {text(TOKENS - 1)}"}
            for _ in range(PAIRS)
        ]
    )


def through(trainer):
    """One step of a trainer: its own ``training_step``, then what its loop does."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    model, optimizer = trainer.model.train(), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what its loop sets before the first step

    def step():
        trainer.training_step(model, dict(batch), num_items_in_batch=None)
        optimizer.step()
        optimizer.zero_grad()

    return step


def settings(folder):
    return trl.DPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False
    )


def theirs(folder, rows):
    model = llama()
    return through(
        trl.DPOTrainer(
            model,
            ref_model=copy.deepcopy(model),
            args=settings(folder),
            train_dataset=rows,
            processing_class=tokenizer(),
        )
    )


def ours_in_trl(folder, rows):
    model = llama()
    return through(
        PairLossTrainer(
            model,
            settings(folder),
            rows,
            objective=DPOLoss(),
            ref_model=copy.deepcopy(model),
            processing_class=tokenizer(),
        )
    )


def plain_loop(rows, share_prompt):
    policy = llama().train()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer, loss, words = torch.optim.AdamW(policy.parameters(), lr=1e-6), DPOLoss(), tokenizer()
    pairs = []
    for row in rows:
        prompt, chosen, rejected = (
            words(text)["input_ids"] for text in (row["prompt"], row["chosen"], row["rejected"])
        )
        pairs.append(TokenPair(tuple(prompt), (*chosen, 2), (*rejected, 2)))
    batch = collate_pairs(pairs, share_prompt=share_prompt)

    def step():
        with torch.no_grad():
            frozen = pair_log_probabilities(reference, batch)
        tokens = pair_log_probabilities(policy, batch)
        loss.from_tokens(tokens._replace(ref_chosen=frozen.chosen, ref_rejected=frozen.rejected)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_our_loss_inside_trl_costs_what_trls_does(rows, tmp_path, record):
    ratio = paired_ratio(ours_in_trl(tmp_path, rows), theirs(tmp_path, rows), **ROUNDS)
    record("DPO step: our loss inside TRL / TRL", ratio.median, unit="x", target="<= 1.05")
    assert ratio.median <= 1.05


def test_a_plain_loop_is_no_slower_than_trl(rows, tmp_path, record):
    ratio = paired_ratio(plain_loop(rows, share_prompt=False), theirs(tmp_path, rows), **ROUNDS)
    record("DPO step: plain loop, prompts twice / TRL", ratio.median, unit="x", target="<= 1.05")
    assert ratio.median <= 1.05


def test_a_plain_loop_that_reads_prompts_once_is_faster_than_trl(rows, tmp_path, record):
    ratio = paired_ratio(plain_loop(rows, share_prompt=True), theirs(tmp_path, rows), **ROUNDS)
    record("DPO step: plain loop, prompts once / TRL", ratio.median, unit="x", target="<= 1.05")
    assert ratio.median <= 1.05
