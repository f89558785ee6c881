"""A DPO step of SmolLM2-135M, all of it trained: our loop beside TRL's trainer, time and memory at its height.

Each side has a process of its own, so that each has its own memory, and they step in turn. Both have the reference's
log-probabilities beforehand, the same eight pairs of answers to questions of fact, no activation checkpoints, AdamW.
"""

import multiprocessing
import tempfile

import torch

from benchmarks.timing import paired_ratio

PAIRS = 8


def serve(side, pipe):
    """Step whenever asked to; answer with the loss, or with the memory."""
    from minimand.bench.memory import forget_peak, peak_megabytes

    torch.manual_seed(0)
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    step = {"ours": ours, "trl": theirs}[side]()
    forget_peak()
    while (asked := pipe.recv()) is not None:
        pipe.send(step() if asked == "step" else peak_megabytes())


def ours():
    from minimand.bench.facts import fact_pairs
    from minimand.preferences import (
        DPOLoss,
        ReferenceCache,
        collate_pairs,
        load_language_model,
        pair_log_probabilities,
        tokenize_pairs,
        with_reference,
    )

    model, tokenizer = load_language_model()
    pairs = tokenize_pairs(fact_pairs()[:PAIRS], tokenizer).pairs
    reference = ReferenceCache(model)(pairs)
    batch, objective = collate_pairs(pairs), DPOLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step():
        loss = objective.from_tokens(with_reference(pair_log_probabilities(model, batch), reference))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def theirs():
    import datasets
    import trl

    from minimand.bench.facts import fact_pairs
    from minimand.preferences import load_language_model

    model, tokenizer = load_language_model()
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in fact_pairs()[:PAIRS]]
    settings = trl.DPOConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, learning_rate=1e-6,
        gradient_checkpointing=False, precompute_ref_log_probs=True, per_device_train_batch_size=PAIRS,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.get_train_dataloader()
    batch = trainer.data_collator(list(trainer.train_dataset))
    model, optimizer = trainer.model.train(), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        loss = trainer.training_step(model, dict(batch), num_items_in_batch=None)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def test_a_step_takes_no_longer_and_no_more_memory_than_trls(record):
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in ("ours", "trl"):
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=serve, args=(side, end), daemon=True))
        processes[-1].start()

    def ask(side, what):
        pipes[side].send(what)
        return pipes[side].recv()

    # The same pairs, the same reference: both begin at log 2.
    assert abs(ask("ours", "step") - ask("trl", "step")) < 1e-4
    ratio = paired_ratio(lambda: ask("ours", "step"), lambda: ask("trl", "step"), rounds=7, warmup=1)
    memory = {side: ask(side, "memory") for side in pipes}
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    record("DPO step of SmolLM2-135M / TRL", ratio.median, unit="x", target="<= 1")
    record("DPO step of SmolLM2-135M", ratio.ours_seconds, unit="s")
    record("DPO step of SmolLM2-135M, memory", memory["ours"], unit="MB", target="<= TRL's")
    record("DPO step of SmolLM2-135M by TRL, memory", memory["trl"], unit="MB")
    assert ratio.median <= 1.0
    assert memory["ours"] <= memory["trl"]
