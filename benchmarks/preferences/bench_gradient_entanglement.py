"""What the diagnosis costs at every step of a training run, and what it costs the way everyone does it first."""

import torch
from torch import nn
from torch.nn import functional

from benchmarks.timing import paired_ratio
from minimand.preferences import (
    DPOLoss,
    LayerGradients,
    NormalizedPairLoss,
    PairLogProbabilities,
    entanglement,
    last_linear_layers,
    margin_coefficients,
    normalized_pair_gradient,
    token_log_probabilities,
)

VOCABULARY, WIDTH, TOKENS, PAIRS = 1024, 128, 48, 8


class Block(nn.Module):
    """One block, its four matrices each an nn.Linear."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden):
        """Map hidden states to hidden states."""
        heads = self.project(self.attention_norm(hidden)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Policy(nn.Module):
    """A small causal transformer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False))

    def forward(self, text):
        """Return the log-probability of each row."""
        hidden = self.embed(text[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        return token_log_probabilities(self.head(hidden), text[:, 1:]).sum(-1)


def training(diagnose=None, objective=None):
    """Build a training step, with a diagnosis of its pairs or none."""
    policy, objective = Policy(), DPOLoss() if objective is None else objective
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True)
    text = torch.randint(VOCABULARY, (2 * PAIRS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = policy(text).chunk(2)
    record = LayerGradients(last_linear_layers(policy))

    def step():
        optimizer.zero_grad()
        with record:
            logp = policy(text).chunk(2)
        pairs = PairLogProbabilities(*logp, *reference)
        if diagnose is not None:
            diagnose(policy, record, pairs)
        objective.of(pairs).backward()
        optimizer.step()

    return step


def by_layers(policy, record, pairs):
    """Every pair's regime, from the last block's linear layers, with the coefficients of the loss."""
    gradients = record.pair_gradients(pairs.chosen, pairs.rejected)
    return gradients.entanglement(margin_coefficients(DPOLoss(), pairs)).regime


def by_autograd(policy, record, pairs):
    """The same numbers from a gradient for each answer."""
    return entanglement(
        pairs.chosen, pairs.rejected, record.parameters(), coefficients=margin_coefficients(DPOLoss(), pairs)
    ).regime


def of_the_whole_model(policy, record, pairs):
    """The mean gradients over all parameters: two whole backward passes."""
    return entanglement(pairs.chosen.mean(), pairs.rejected.mean(), policy.parameters()).regime


def test_a_step_with_the_diagnosis_of_every_pair_is_at_most_1_3_steps(record):
    ratio = paired_ratio(training(by_layers), training())
    record(
        "step with diagnosis of every pair by the last block, against without", ratio.median, unit="x", target="<= 1.3"
    )
    record("step without diagnosis, 8 pairs", 1e3 * ratio.peer_seconds, unit="ms")
    assert ratio.median <= 1.3


def test_layer_gradients_beat_a_gradient_for_each_answer(record):
    ratio = paired_ratio(training(by_layers), training(by_autograd), rounds=7)
    record("step with diagnosis by layers, against by autograd", ratio.median, unit="x", target="<= 0.5")
    assert ratio.median <= 0.5


def test_the_whole_model_costs_two_backward_passes(record):
    ratio = paired_ratio(training(of_the_whole_model), training(), rounds=7)
    record("step with diagnosis of the whole model, against without", ratio.median, unit="x")


def test_normalised_gradients_cost_at_most_two_backward_passes_more(record):
    policy = Policy()
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    text = torch.randint(VOCABULARY, (2 * PAIRS, TOKENS), generator=torch.Generator().manual_seed(0))

    def by_hand():
        logp = policy(text).chunk(2)
        for parameter, gradient in zip(parameters, normalized_pair_gradient(*logp, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()

    ratio = paired_ratio(by_hand, training(), rounds=7)
    record("step by normalized_pair_gradient, against DPO's", ratio.median, unit="x", target="<= 2")
    in_a_trainer = paired_ratio(training(objective=NormalizedPairLoss()), training(), rounds=7)
    record("step by NormalizedPairLoss, against DPO's", in_a_trainer.median, unit="x", target="<= 3")
    assert ratio.median <= 2
    assert in_a_trainer.median <= 3
