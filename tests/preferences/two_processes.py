"""A run of six steps for test_trl.py, started on its own or as one of several processes."""

import json
import os
import pathlib
import sys

import tiny_llama
import torch
import trl
from torch import nn

from minimand.preferences.trl import PairLossTrainer


class Tempered(nn.Module):
    """DPO with a temperature of its own to learn, and a count to keep."""

    needs_reference = True

    def __init__(self):
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("seen", torch.tensor(0))

    def from_tokens(self, tokens):
        pairs = tokens.sums()
        self.seen += len(pairs.chosen) * self.training
        margin = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
        return -nn.functional.logsigmoid(self.log_beta.exp() * margin).mean()


def main(model, output, pairs_a_process):
    args = trl.DPOConfig(
        output,
        max_steps=6,
        per_device_train_batch_size=pairs_a_process,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    trainer = PairLossTrainer(
        tiny_llama.load(model),
        args,
        tiny_llama.pairs(),
        objective=Tempered(),
        processing_class=tiny_llama.tokenizer(),
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "log_beta": trainer.objective.log_beta.item(),
        "losses": [entry["loss"] for entry in losses],
        "margins": [entry["rewards/margins"] for entry in losses],
        "tokens": losses[-1]["num_tokens"],
    }
    # A file a process: lines printed by two at once run into each other.
    pathlib.Path(f"{output}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
