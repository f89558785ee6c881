"""Gradient entanglement against its mathematics (Yuan et al. 2025), and the two ways out of it."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from minimand import preferences
from minimand.preferences import (
    DPOLoss,
    Entanglement,
    LayerGradients,
    MarginCoefficients,
    NormalizedPairLoss,
    PairLogProbabilities,
    PairTokens,
    Regime,
    SparseTokenMask,
    entanglement,
    first_order_change,
    last_linear_layers,
    margin_coefficients,
    masked_log_probabilities,
    normalized_pair_gradient,
    token_inner_products,
)

F64 = torch.float64
VOCABULARY, WIDTH, TOKENS, PAIRS = 7, 6, 4, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def sigmoid(value):
    return 1 / (1 + (-value).exp())


class Policy(nn.Module):
    """Two layers that score each token from the one before it, and from the mean of all before it."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def forward(self, text):
        hidden = self.embed(text)
        hidden = hidden.cumsum(1) / torch.arange(1, text.shape[1] + 1, dtype=F64)[:, None]
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.head(hidden)

    def tokens(self, text):
        scores = self(text[:, :-1]).log_softmax(-1)
        return scores.gather(-1, text[:, 1:, None]).squeeze(-1)[:, 1:]  # the first two tokens are the prompt

    def logp(self, text):
        return self.tokens(text).sum(-1)


def answers(seed=1, pairs=PAIRS):
    """Chosen and rejected texts: a prompt of two tokens, one that differs, and a shared ending."""
    text = torch.randint(VOCABULARY, (pairs, 2 + TOKENS), generator=seeded(seed))
    other = text.clone()
    other[:, 2] = (text[:, 2] + 1) % VOCABULARY
    return text, other


def random_pairs(seed=0, batch=40):
    """Log-probabilities on both sides of every hinge and kink."""
    chosen, rejected, ref_chosen, ref_rejected = (-6 + 2 * normal(4, batch, seed=seed)).clamp_max(-0.1)
    lengths = torch.randint(1, 9, (2, batch), generator=seeded(seed))
    return PairLogProbabilities(chosen, rejected, ref_chosen, ref_rejected, lengths[0], lengths[1])


BETA = 0.3


def log_ratios(p):
    return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def table():
    """The coefficients of every loss, each by its formula: ``(loss, pairs -> (d_w, d_l))``."""

    def margin(p):
        u_w, u_l = log_ratios(p)
        return u_w - u_l

    def dpo(p):
        weight = BETA * sigmoid(-BETA * margin(p))
        return weight, weight

    def rdpo(p):
        weight = BETA * sigmoid(-(BETA * margin(p) + 0.2 * (p.chosen_lengths - p.rejected_lengths).double()))
        return weight, weight

    def ipo(p):
        weight = 2 * (1 / (2 * BETA) - margin(p))
        return weight, weight

    def hinge(p):
        weight = BETA * (BETA * margin(p) < 1).to(F64)
        return weight, weight

    def dpop(p):
        u_w, _ = log_ratios(p)
        weight = BETA * sigmoid(-BETA * (margin(p) - 5.0 * (-u_w).relu()))
        return weight * (1 + 5.0 * (u_w < 0)), weight

    def sppo(p):
        u_w, u_l = log_ratios(p)
        return 2 * (1 / (2 * BETA) - u_w), 2 * (u_l + 1 / (2 * BETA))

    def slic(p):
        active = (p.chosen - p.rejected < 1).to(F64)
        return active + 0.1, active

    def cpo(p):
        weight = BETA * sigmoid(-BETA * (p.chosen - p.rejected))
        return weight + 0.7, weight

    def rpo(p):
        weight = dpo(p)[0]
        return weight + 0.5 * BETA, weight

    def simpo(p):
        u = BETA * (p.chosen / p.chosen_lengths - p.rejected / p.rejected_lengths) - 0.4
        weight = BETA * sigmoid(-u)
        return weight / p.chosen_lengths, weight / p.rejected_lengths

    def rrhf(p):
        active = (p.chosen / p.chosen_lengths < p.rejected / p.rejected_lengths).to(F64)
        return active / p.chosen_lengths + 1.0, active / p.rejected_lengths

    def orpo(p):
        each = [(p.chosen, p.chosen_lengths), (p.rejected, p.rejected_lengths)]
        p_w, p_l = ((logp / length).exp() for logp, length in each)
        weight = 0.2 * sigmoid(-((p_w / (1 - p_w)).log() - (p_l / (1 - p_l)).log()))
        return (
            1 / p.chosen_lengths.double() + weight / (p.chosen_lengths * (1 - p_w)),
            weight / (p.rejected_lengths * (1 - p_l)),
        )

    def kto(p):
        u_w, u_l = log_ratios(p)
        # Each side's baseline is the other's mean log-ratio, at least 0.
        s_w = sigmoid(BETA * (u_w - u_l.mean().clamp_min(0)))
        s_l = sigmoid(BETA * (u_w.mean().clamp_min(0) - u_l))
        return BETA * s_w * (1 - s_w) / 2, BETA * s_l * (1 - s_l) / 2

    def sft(p):
        return torch.ones_like(p.chosen), torch.zeros_like(p.chosen)

    return {
        "DPO": (DPOLoss(BETA), dpo),
        "R-DPO": (preferences.RDPOLoss(BETA, length_penalty=0.2), rdpo),
        "IPO": (preferences.IPOLoss(BETA), ipo),
        "hinge": (preferences.HingeLoss(BETA), hinge),
        "DPOP": (preferences.DPOPLoss(BETA, penalty=5.0), dpop),
        "SPPO": (preferences.SPPOLoss(BETA), sppo),
        "SLiC": (preferences.SLiCLoss(1.0, sft_weight=0.1), slic),
        "CPO": (preferences.CPOLoss(BETA, sft_weight=0.7, normalization="none"), cpo),
        "RPO": (preferences.RPOLoss(beta=BETA, eta=0.5), rpo),
        "SimPO": (preferences.SimPOLoss(BETA, target_margin=0.4), simpo),
        "RRHF": (preferences.RRHFLoss(), rrhf),
        "ORPO": (preferences.ORPOLoss(0.2), orpo),
        "KTO": (preferences.KTOLoss(BETA), kto),
        "SFT": (preferences.SFTLoss("none"), sft),
    }


LOSSES = table()


# Oracle 1: the table.


@pytest.mark.parametrize("name", LOSSES)
def test_the_coefficients_of_every_loss_are_those_of_the_table(name):
    loss, formula = LOSSES[name]
    pairs = random_pairs()
    chosen, rejected = formula(pairs)
    found = margin_coefficients(loss, pairs)
    torch.testing.assert_close(found.chosen, chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.rejected, rejected, rtol=0, atol=1e-10)


def test_losses_of_the_margin_alone_have_equal_coefficients_and_sft_terms_raise_the_chosen_one():
    pairs = random_pairs()
    gaps = {name: (c.chosen - c.rejected) for name in LOSSES for c in [margin_coefficients(LOSSES[name][0], pairs)]}
    for name in ("DPO", "R-DPO", "IPO", "hinge"):
        torch.testing.assert_close(gaps[name], torch.zeros_like(gaps[name]), rtol=0, atol=1e-12)
    for name in ("SLiC", "CPO", "RPO", "DPOP"):
        assert (gaps[name] >= -1e-12).all()
        assert (gaps[name] > 1e-6).any()


def test_coefficients_ignore_the_reduction_and_leave_the_policys_graph_alone():
    pairs = random_pairs()
    leaf = pairs.chosen.clone().requires_grad_()
    mean = margin_coefficients(DPOLoss(BETA), pairs._replace(chosen=leaf))
    each = margin_coefficients(DPOLoss(BETA, reduction="none"), pairs)
    assert torch.equal(mean.chosen, each.chosen)
    assert leaf.grad is None
    assert not mean.chosen.requires_grad
    with torch.no_grad():
        assert torch.equal(margin_coefficients(DPOLoss(BETA), pairs).chosen, each.chosen)


def test_a_loss_given_as_a_function_is_taken_as_it_is():
    pairs = random_pairs()
    found = margin_coefficients(lambda p: (2 * p.rejected - 3 * p.chosen).mean(), pairs)
    torch.testing.assert_close(found.chosen, torch.full_like(pairs.chosen, 3 / 40))
    torch.testing.assert_close(found.rejected, torch.full_like(pairs.chosen, 2 / 40))
    nothing = margin_coefficients(lambda p: torch.zeros(3), pairs)
    assert not nothing.chosen.any()
    assert not nothing.rejected.any()


# Oracle 2: the first order.


@pytest.mark.parametrize("name", LOSSES)
def test_a_tiny_gradient_step_changes_log_probabilities_as_predicted(name):
    loss, _ = LOSSES[name]
    policy, reference = Policy(0), Policy(9)
    chosen, rejected = (text[:1] for text in answers())
    with torch.no_grad():
        references = reference.logp(chosen), reference.logp(rejected)
    lengths = torch.tensor([TOKENS]), torch.tensor([TOKENS])
    pairs = PairLogProbabilities(policy.logp(chosen), policy.logp(rejected), *references, *lengths)
    parameters = list(policy.parameters())
    found = entanglement(pairs.chosen, pairs.rejected, parameters, coefficients=margin_coefficients(loss, pairs))
    # Small for the curvature to vanish, and far above the rounding of log-probabilities of about ten.
    step = 1e-6
    after = copy.deepcopy(policy)
    gradients = torch.autograd.grad(loss.of(pairs), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(after.parameters(), gradients, strict=True):
            parameter -= step * gradient
    predicted = found.predicted(step)
    actual = after.logp(chosen) - pairs.chosen, after.logp(rejected) - pairs.rejected
    for one, other in zip(predicted, actual, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-4 * step)
        assert abs(one) > 1e-3 * step or loss is LOSSES["hinge"][0]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizers_own_update_predicts_its_changes_to_first_order(optimizer):
    policy = Policy(0)
    chosen, rejected = answers()
    parameters = list(policy.parameters())
    before = [value.detach().clone() for value in parameters]
    logp = policy.logp(chosen)
    steps = optimizer(parameters, lr=1e-7)
    NormalizedPairLoss()(logp, policy.logp(rejected)).backward(retain_graph=True)
    steps.step()
    updates = [new.detach() - old for new, old in zip(parameters, before, strict=True)]
    with torch.no_grad():
        for value, old in zip(parameters, before, strict=True):
            value.copy_(old)  # the graph must see the parameters that it was made with
    logp = policy.logp(chosen)
    each = first_order_change(logp, parameters, updates)
    with torch.no_grad():
        for value, move in zip(parameters, updates, strict=True):
            value += move
        actual = policy.logp(chosen) - logp
    torch.testing.assert_close(each, actual, rtol=1e-3, atol=1e-12)
    with torch.no_grad():
        for value, old in zip(parameters, before, strict=True):
            value.copy_(old)
    logp = policy.logp(chosen)
    torch.testing.assert_close(first_order_change(logp.sum(), parameters, updates), each.sum())


# Oracle 3: what is impossible.


def products(inner, chosen_square, rejected_square, d_w=1.0, d_l=1.0):
    shape = torch.as_tensor(inner, dtype=F64)
    wide = [torch.as_tensor(value, dtype=F64).expand_as(shape) for value in (chosen_square, rejected_square, d_w, d_l)]
    return Entanglement(shape, wide[0], wide[1], MarginCoefficients(wide[2], wide[3]))


def random_gradients(count, dimension=3, seed=0):
    chosen, rejected = normal(2, count, dimension, seed=seed) * torch.rand(2, count, 1, generator=seeded(seed)).exp()
    rejected = rejected + 2 * normal(count, 1, seed=seed + 1) * chosen  # of every angle
    return chosen, rejected


def test_chosen_down_with_rejected_up_never_occurs_while_coefficients_are_positive():
    g_w, g_l = random_gradients(100_000)
    weights = 0.01 + torch.rand(2, 100_000, generator=seeded(3), dtype=F64)
    found = products((g_w * g_l).sum(-1), g_w.square().sum(-1), g_l.square().sum(-1), *weights)
    counts = [found.share(regime) for regime in Regime]
    assert counts[Regime.REVERSED] == 0
    assert min(counts[Regime.DESIRED], counts[Regime.BOTH_UP], counts[Regime.BOTH_DOWN]) > 0.05
    reversed_signs = products((g_w * g_l).sum(-1), g_w.square().sum(-1), g_l.square().sum(-1), *-weights)
    assert reversed_signs.share(Regime.REVERSED) == counts[Regime.DESIRED]  # IPO past its target


def test_with_equal_coefficients_the_margin_grows_by_the_squared_difference_of_the_gradients():
    g_w, g_l = random_gradients(10_000)
    found = products((g_w * g_l).sum(-1), g_w.square().sum(-1), g_l.square().sum(-1), 0.3, 0.3)
    chosen, rejected = found.predicted(0.1)
    torch.testing.assert_close(chosen - rejected, 0.03 * (g_w - g_l).square().sum(-1), rtol=1e-9, atol=1e-12)


# Oracle 4: one token, and a linear head.


def test_with_a_linear_head_and_one_token_the_products_have_a_closed_form_and_are_never_entangled():
    hidden = 3 * normal(1000, 8)
    head = nn.Linear(8, 10, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(normal(10, 8, seed=1))
    logp = head(hidden).log_softmax(-1)
    found = entanglement(logp[:, 2], logp[:, 5], [head.weight])
    p = logp.detach().exp()
    h2, p2 = hidden.square().sum(-1), p.square().sum(-1)
    for ours, closed in (
        (found.inner, h2 * (p2 - p[:, 2] - p[:, 5])),
        (found.chosen_square, h2 * (1 - 2 * p[:, 2] + p2)),
        (found.rejected_square, h2 * (1 - 2 * p[:, 5] + p2)),
    ):
        torch.testing.assert_close(ours, closed, rtol=1e-12, atol=1e-12)
    gap = h2 * (p[:, 2] - p[:, 5] - 1)
    torch.testing.assert_close(found.inner - found.chosen_square, gap, rtol=1e-9, atol=1e-10)
    assert (found.inner < torch.minimum(found.chosen_square, found.rejected_square)).all()
    assert found.share(Regime.DESIRED) == 1


# Oracle 5: identical answers.


def test_identical_answers_are_parallel_and_neither_dpo_nor_the_normalised_update_moves():
    policy = Policy()
    text, _ = answers()
    parameters = list(policy.parameters())
    for logp in (policy.logp(text), policy.logp(text).sum()):
        found = entanglement(logp, logp, parameters)
        torch.testing.assert_close(found.inner, found.chosen_square, rtol=0, atol=0)
        torch.testing.assert_close(found.cosine, torch.ones_like(found.cosine), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.ratio, torch.ones_like(found.ratio), rtol=0, atol=1e-12)
        assert (found.regime == Regime.BOUNDARY).all()
        assert not found.chosen_change.any()
    for per in ("batch", "pair"):
        update = normalized_pair_gradient(policy.logp(text), policy.logp(text), parameters, per=per)
        assert max(float(one.abs().max()) for one in update) < 1e-12


# Oracle 6: normalised gradients.


def flat(gradients):
    return torch.cat([one.flatten() for one in gradients])


@pytest.mark.parametrize("per", ["batch", "pair"])
def test_the_normalised_update_ignores_the_lengths_of_the_gradients(per):
    policy = Policy()
    parameters = list(policy.parameters())
    chosen, rejected = (policy.logp(text) for text in answers())
    update = normalized_pair_gradient(chosen, rejected, parameters, per=per)
    scaled = normalized_pair_gradient(7 * chosen, 0.01 * rejected, parameters, per=per)
    torch.testing.assert_close(flat(scaled), flat(update), rtol=1e-9, atol=1e-12)


def test_the_normalised_update_is_the_difference_of_unit_gradients():
    policy = Policy()
    parameters = list(policy.parameters())
    logp = [policy.logp(text) for text in answers()]
    units = []
    for value in logp:
        rows = [flat(torch.autograd.grad(one, parameters, retain_graph=True)) for one in value]
        units.append((torch.stack(rows), torch.stack(rows).mean(0)))
    (g_w, mean_w), (g_l, mean_l) = units
    batch = mean_l / mean_l.norm() - mean_w / mean_w.norm()
    pair = (g_l / g_l.norm(dim=1, keepdim=True) - g_w / g_w.norm(dim=1, keepdim=True)).mean(0)
    for per, wanted in (("batch", batch), ("pair", pair)):
        torch.testing.assert_close(flat(normalized_pair_gradient(*logp, parameters, per=per)), wanted)


def test_the_normalised_update_is_dpos_direction_where_the_gradients_are_equally_long():
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=F64, requires_grad=True)
    chosen = (weight * torch.tensor([3.0, 4.0, 0.0], dtype=F64)).sum()[None]
    rejected = (weight * torch.tensor([0.0, 3.0, 4.0], dtype=F64)).sum()[None]
    references = chosen.detach() + 0.1, rejected.detach() - 0.3
    pairs = PairLogProbabilities(chosen, rejected, *references)
    (dpo,) = torch.autograd.grad(DPOLoss(BETA).of(pairs), weight, retain_graph=True)
    weights = margin_coefficients(DPOLoss(BETA), pairs)
    (update,) = normalized_pair_gradient(chosen, rejected, [weight], coefficients=weights)
    torch.testing.assert_close(5 * update, dpo, rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_normalised_step_raises_chosen_and_lowers_rejected_whatever_the_gradients(seed):
    g_w, g_l = (one[0] for one in random_gradients(1, seed=seed))
    weight = torch.zeros(3, dtype=F64, requires_grad=True)
    (update,) = normalized_pair_gradient((weight * g_w).sum()[None], (weight * g_l).sum()[None], [weight])
    cosine = functional.cosine_similarity(g_w, g_l, dim=0)
    torch.testing.assert_close((-update * g_w).sum(), g_w.norm() * (1 - cosine), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close((-update * g_l).sum(), -g_l.norm() * (1 - cosine), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("per", ["batch", "pair"])
@pytest.mark.parametrize("base", [None, DPOLoss(BETA), preferences.CPOLoss(BETA)])
def test_the_loss_for_trainers_has_the_normalised_gradient(per, base):
    policy, reference = Policy(0), Policy(9)
    parameters = list(policy.parameters())
    texts = answers()
    with torch.no_grad():
        references = [reference.logp(text) for text in texts]
    pairs = PairLogProbabilities(*(policy.logp(text) for text in texts), *references)
    weights = None if base is None else margin_coefficients(base, pairs)
    wanted = normalized_pair_gradient(pairs.chosen, pairs.rejected, parameters, coefficients=weights, per=per)
    for watched in (None, parameters):
        NormalizedPairLoss(base, parameters=watched, per=per).of(pairs).backward(retain_graph=True)
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None


def test_the_loss_for_trainers_can_be_evaluated_without_a_graph_and_keeps_no_parameters():
    policy = Policy()
    part = NormalizedPairLoss(parameters=policy.parameters())
    assert not list(part.parameters())
    with torch.no_grad():
        chosen, rejected = (policy.logp(text) for text in answers())
        torch.testing.assert_close(part(chosen, rejected), (rejected - chosen).mean())


def test_an_answer_of_probability_one_has_no_direction_and_takes_none():
    weight = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    certain, other = (0 * weight.sum())[None], weight[1:]
    for per in ("batch", "pair"):
        (update,) = normalized_pair_gradient(certain, other, [weight], per=per)
        torch.testing.assert_close(update, torch.tensor([0.0, 1.0], dtype=F64))
    found = entanglement(certain, other, [weight])
    assert found.cosine == 0
    assert found.ratio == 0


# Oracle 7: masks.


def token_pairs(seed=0, pairs=3):
    logp = -normal(4, pairs, TOKENS, seed=seed).abs() - 0.1
    hidden = normal(2, pairs, TOKENS, WIDTH, seed=seed)
    lengths = torch.tensor([TOKENS, 2, 1])
    mask = torch.arange(TOKENS) < lengths[:pairs, None]
    return PairTokens(logp[0], logp[1], mask, mask.flip(0), logp[2], logp[3], hidden[0], hidden[1])


@pytest.mark.parametrize("name", ["DPO", "IPO", "CPO", "SimPO", "DPOP"])
def test_with_masks_of_one_the_loss_is_the_base_loss_and_the_price_of_every_token(name):
    base, tokens = copy.deepcopy(LOSSES[name][0]), token_pairs()
    part = SparseTokenMask(WIDTH, base=base, sparsity=0.03, bias=60.0).double()
    counts = tokens.chosen_mask.sum(-1) + tokens.rejected_mask.sum(-1)
    torch.testing.assert_close(part(tokens), base.from_tokens(tokens) + 0.03 * counts.double().mean())
    base.reduction = "none"
    torch.testing.assert_close(part.from_tokens(tokens), base.from_tokens(tokens) + 0.03 * counts)


def test_masks_of_zero_leave_nothing_but_the_loss_of_a_tie():
    part = SparseTokenMask(WIDTH, sparsity=0.5, bias=-800.0).double()
    torch.testing.assert_close(part(token_pairs()), torch.tensor(math.log(2), dtype=F64))


def test_a_masked_log_probability_is_a_weighted_sum_and_references_carry_no_graph():
    tokens = token_pairs()
    weights = torch.rand(2, 3, TOKENS, generator=seeded(), dtype=F64).requires_grad_()
    pairs = masked_log_probabilities(tokens, weights[0], weights[1])
    q = weights.detach()
    torch.testing.assert_close(pairs.chosen, (q[0] * tokens.chosen * tokens.chosen_mask).sum(-1))
    torch.testing.assert_close(pairs.ref_rejected, (q[1] * tokens.ref_rejected * tokens.rejected_mask).sum(-1))
    assert not pairs.ref_chosen.requires_grad
    assert torch.equal(pairs.chosen_lengths, tokens.chosen_mask.sum(-1))


def test_a_masks_gradient_is_the_margins_weight_times_the_log_ratio_of_its_token_less_its_price():
    tokens = token_pairs()
    weights = [torch.rand(3, TOKENS, generator=seeded(k), dtype=F64).requires_grad_() for k in range(2)]
    DPOLoss(BETA, reduction="sum").of(masked_log_probabilities(tokens, *weights)).backward()
    with torch.no_grad():
        ratio = [(tokens.chosen - tokens.ref_chosen), (tokens.rejected - tokens.ref_rejected)]
        masks = [tokens.chosen_mask, tokens.rejected_mask]
        margin = (weights[0] * ratio[0] * masks[0]).sum(-1) - (weights[1] * ratio[1] * masks[1]).sum(-1)
        weight = BETA * sigmoid(-BETA * margin)[:, None]
    torch.testing.assert_close(weights[0].grad, -weight * ratio[0] * masks[0])
    torch.testing.assert_close(weights[1].grad, weight * ratio[1] * masks[1])


def test_the_policy_cannot_reach_its_mask_through_the_hidden_states():
    tokens = token_pairs()
    hidden = tokens.chosen_hidden.clone().requires_grad_()
    chosen = tokens.chosen.clone().requires_grad_()
    SparseTokenMask(WIDTH).double()(tokens._replace(chosen=chosen, chosen_hidden=hidden)).backward()
    assert hidden.grad is None
    assert (chosen.grad != 0).equal(tokens.chosen_mask)


def test_learnt_masks_keep_the_token_that_differs_and_drop_those_that_are_shared():
    """Five tokens; only the first has another log-ratio in the chosen than in the rejected answer."""
    ratio = torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0]])
    hidden = torch.eye(5)[None]
    mask = torch.ones(1, 5, dtype=torch.bool)
    shared = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    tokens = PairTokens(
        ratio - 3,
        ratio * shared - 2 * (1 - shared) - 3,
        mask,
        mask,
        -3 * mask.float(),
        -3 * mask.float(),
        hidden,
        hidden,
    )
    part = SparseTokenMask(5, sparsity=0.01)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        part(tokens).backward()
        optimizer.step()
    for weights in part.last_weights:
        assert weights[0, 0] > 0.9
        assert weights[0, 1:].max() < 0.2


@pytest.mark.untyped
def test_masks_say_what_is_wrong():
    tokens = token_pairs()
    part = SparseTokenMask(WIDTH).double()
    with pytest.raises(ValueError, match="chosen_hidden is missing"):
        part(tokens._replace(chosen_hidden=None))
    with pytest.raises(ValueError, match=r"rejected_hidden must have shape \(3, 4, 6\)"):
        part(tokens._replace(rejected_hidden=tokens.rejected_hidden[..., :2]))
    with pytest.raises(ValueError, match="ref_logp_chosen is missing"):
        part(tokens._replace(ref_chosen=None))
    with pytest.raises(ValueError, match="sparsity must be a finite number of at least 0"):
        SparseTokenMask(WIDTH, sparsity=-1.0)
    weights = torch.ones(3, TOKENS, dtype=F64)
    with pytest.raises(ValueError, match=r"rejected_weights must lie in \[0, 1\]"):
        masked_log_probabilities(tokens, weights, 2 * weights)
    with pytest.raises(ValueError, match="chosen_weights must have shape"):
        masked_log_probabilities(tokens, weights[:, :1], weights)


# Oracle 8: the classifier.


def test_the_regime_agrees_with_the_conditions_of_the_paper():
    g_w, g_l = random_gradients(20_000, seed=5)
    d_w, d_l = 0.01 + torch.rand(2, 20_000, generator=seeded(6), dtype=F64)
    c, w2, l2 = (g_w * g_l).sum(-1), g_w.square().sum(-1), g_l.square().sum(-1)
    chosen_up, rejected_down = c < d_w / d_l * w2, c < d_l / d_w * l2
    wanted = torch.full_like(c, Regime.REVERSED, dtype=torch.long)
    wanted[chosen_up & rejected_down] = Regime.DESIRED
    wanted[chosen_up & ~rejected_down] = Regime.BOTH_UP
    wanted[~chosen_up & rejected_down] = Regime.BOTH_DOWN
    assert torch.equal(products(c, w2, l2, d_w, d_l).regime, wanted)


def test_equality_in_a_condition_is_the_boundary_and_the_least_above_rounding_is_not():
    for d_w, d_l, w2, l2 in itertools.product((0.3, 1.0), (0.7, 1.0), (0.1, 3.0), (0.1, 3.0)):
        for threshold in (d_w / d_l * w2, d_l / d_w * l2):
            assert products(threshold, w2, l2, d_w, d_l).regime == Regime.BOUNDARY
            for factor in (1 + 1e-12, 1 - 1e-12):
                assert products(threshold * factor, w2, l2, d_w, d_l).regime != Regime.BOUNDARY


def test_regimes_by_hand():
    found = products([0.0, 2.0, 2.0, 1.0], torch.tensor([1.0, 1.0, 9.0, 1.0]), torch.tensor([1.0, 9.0, 1.0, 9.0]))
    assert [Regime(one) for one in found.regime.tolist()] == [
        Regime.DESIRED,
        Regime.BOTH_DOWN,
        Regime.BOTH_UP,
        Regime.BOUNDARY,
    ]
    assert found.share(Regime.DESIRED) == 0.25


# Single tokens.


def test_token_products_add_up_to_the_answers_and_shared_endings_add_the_positive_part():
    policy = Policy()
    parameters = list(policy.parameters())
    chosen, rejected = (policy.tokens(text[:1])[0] for text in answers())
    found = token_inner_products(chosen, rejected, parameters)
    torch.testing.assert_close(found.sum(), entanglement(chosen.sum(), rejected.sum(), parameters).inner)
    each = [torch.autograd.grad(one, parameters, retain_graph=True) for one in (chosen[0], rejected[2])]
    torch.testing.assert_close(found[0, 2], (flat(each[0]) * flat(each[1])).sum())
    assert (found.diagonal()[1:] > 0).all()  # the same token after the same or nearly the same context
    assert found[0, 0] < 0  # the tokens that tell the answers apart


# Layers.


def slow(policy, logp, layers):
    parameters = [value for layer in layers for value in layer.parameters()]
    return entanglement(*logp, parameters)


def assert_same(found, wanted):
    for name in ("inner", "chosen_square", "rejected_square"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)


def test_layer_gradients_are_those_of_automatic_differentiation():
    policy = Policy()
    layers = [*policy.blocks, policy.head]
    texts = answers()
    with LayerGradients(layers) as record:
        logp = policy.logp(torch.cat(texts)).chunk(2)
    found = record.pair_gradients(*logp)
    assert_same(found.entanglement(), slow(policy, logp, layers))
    updates = [normal(*value.shape, seed=k) for k, value in enumerate(record.parameters())]
    for ours, value in zip(found.change(updates), logp, strict=True):
        torch.testing.assert_close(ours, first_order_change(value, record.parameters(), updates))


def test_layer_gradients_of_two_calls_of_other_lengths_are_the_same():
    policy = Policy()
    chosen, rejected = answers()
    longer = torch.cat([rejected, rejected[:, -2:]], 1)
    with LayerGradients(policy.blocks) as record:
        logp = policy.logp(chosen), policy.logp(longer)
    assert_same(record.pair_gradients(*logp).entanglement(), slow(policy, logp, policy.blocks))


def test_layer_gradients_of_answers_that_share_a_row_are_the_same():
    layer = nn.Linear(WIDTH, VOCABULARY).double()
    hidden = normal(PAIRS, 3, WIDTH)  # a prompt and two answers of a token each, which all three columns serve
    with LayerGradients([layer]) as record:
        scores = torch.tanh(layer(hidden)).cumsum(1)
        logp = (scores[:, 1].log_softmax(-1)[:, 0], scores[:, 2].log_softmax(-1)[:, 1])
    assert_same(record.pair_gradients(*logp).entanglement(), slow(layer, logp, [layer]))


def test_layer_gradients_know_the_transposed_layer_of_gpt_2_and_frozen_biases():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(VOCABULARY, WIDTH).double()
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(normal(WIDTH, VOCABULARY))
    with LayerGradients([layer]) as record:
        logp = layer(normal(2 * PAIRS, TOKENS, WIDTH, seed=3)).log_softmax(-1)[..., 0].sum(-1).chunk(2)
    found = record.pair_gradients(*logp)
    assert_same(found.entanglement(), entanglement(*logp, [layer.weight]))
    updates = [normal(WIDTH, VOCABULARY, seed=4)]
    torch.testing.assert_close(found.change(updates)[1], first_order_change(logp[1], [layer.weight], updates))


def test_layer_gradients_leave_the_step_as_it_was():
    texts = answers()

    def step(recorded):
        policy = Policy()
        with LayerGradients(last_linear_layers(policy)) as record:
            logp = policy.logp(torch.cat(texts)).chunk(2)
        if recorded:
            record.pair_gradients(*logp)
        (logp[1] - logp[0]).mean().backward()
        return [value.grad for value in policy.parameters()]

    for one, other in zip(step(True), step(False), strict=True):
        assert torch.equal(one, other)


def test_the_last_layers_of_torchs_own_transformer_are_those_that_are_called():
    blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True) for _ in range(2)).double()
    layers = last_linear_layers(blocks)
    assert layers == [blocks[1].linear1, blocks[1].linear2]
    with LayerGradients(layers) as record:
        logp = blocks[1](blocks[0](normal(2 * PAIRS, TOKENS, WIDTH))).log_softmax(-1)[..., 0].sum(-1).chunk(2)
    assert_same(record.pair_gradients(*logp).entanglement(), slow(blocks, logp, layers))


@pytest.mark.untyped
def test_layer_gradients_say_what_is_wrong():
    policy = Policy()
    chosen, rejected = answers()
    with pytest.raises(TypeError, match=r"layers\[0\] must be an nn.Linear or a Conv1D, got Embedding"):
        LayerGradients([policy.embed])
    with pytest.raises(ValueError, match="layers is empty"):
        LayerGradients([])
    record = LayerGradients(policy.blocks)
    logp = policy.logp(chosen), policy.logp(rejected)
    with pytest.raises(ValueError, match=r"layers\[0\] recorded nothing"):
        record.pair_gradients(*logp)
    with record, torch.no_grad():
        policy.logp(chosen)
    with pytest.raises(ValueError, match="ran without a graph"):
        record.pair_gradients(*logp)
    with record:
        logp = policy.logp(chosen), policy.logp(rejected)
    with pytest.raises(ValueError, match="a layer saw 10 rows: 3 pairs come in 6"):
        record.pair_gradients(logp[0][:3], logp[1][:3])
    with pytest.raises(ValueError, match="shapes of the layers' parameters"):
        record.pair_gradients(*logp).change([torch.zeros(1)])
    with LayerGradients([policy.head]) as record:
        functional.relu(policy.head(normal(2, WIDTH)), inplace=True)
    with pytest.raises(ValueError, match="changed in place"):
        record.pair_gradients(logp[0][:1], logp[1][:1])
    policy.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\[0\] has a frozen weight"):
        LayerGradients([policy.head])
    with pytest.raises(ValueError, match="no trained linear layer"):
        last_linear_layers(policy.requires_grad_(False))


# Numbers and errors.


def test_products_of_half_precision_are_summed_in_single():
    torch.manual_seed(0)
    head = nn.Linear(4096, 3, bias=False).bfloat16()
    logp = head(torch.ones(1, 4096, dtype=torch.bfloat16)).float().log_softmax(-1)[0]
    found = entanglement(logp[0], logp[1], [head.weight])
    assert found.inner.dtype == torch.float32
    rows = [torch.autograd.grad(one, head.weight, retain_graph=True)[0].double() for one in logp[:2]]
    torch.testing.assert_close(found.inner.double(), (rows[0] * rows[1]).sum(), rtol=1e-5, atol=0)


def test_parameters_without_a_part_count_for_nothing_and_the_graph_is_kept():
    policy, extra = Policy(), torch.ones(3, dtype=F64, requires_grad=True)
    logp = [policy.logp(text) for text in answers()]
    found = entanglement(*logp, [*policy.parameters(), extra])
    assert_same(found, entanglement(*logp, policy.parameters()))
    (logp[0] - logp[1]).sum().backward()


@pytest.mark.untyped
def test_errors_name_the_argument():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    chosen, rejected = weight.sum(), weight.prod()
    frozen = torch.ones(2)
    with pytest.raises(ValueError, match=r"both be scalars or have shape \(batch,\)"):
        entanglement(chosen, rejected[None], [weight])
    with pytest.raises(ValueError, match="parameters is empty"):
        entanglement(chosen, rejected, [])
    with pytest.raises(ValueError, match=r"parameters\[1\] does not require a gradient"):
        entanglement(chosen, rejected, [weight, frozen])
    with pytest.raises(ValueError, match="logp_chosen has no graph"):
        entanglement(chosen.detach(), rejected, [weight])
    with pytest.raises(ValueError, match="none of them has a part in logp_chosen"):
        entanglement(chosen, rejected, [torch.ones(2, requires_grad=True)])
    zero = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="gradients of the log-probabilities contain NaN or infinity"):
        entanglement(zero.sqrt().sum(), zero.sum(), [zero])
    with pytest.raises(ValueError, match=r"coefficients.chosen must have shape \(\)"):
        entanglement(chosen, rejected, [weight], coefficients=MarginCoefficients(frozen, frozen))
    with pytest.raises(ValueError, match="updates must have one tensor for each parameter"):
        first_order_change(chosen, [weight], [torch.ones(3)])
    with pytest.raises(ValueError, match="step must be a finite number above 0"):
        entanglement(chosen, rejected, [weight]).predicted(0.0)
    with pytest.raises(ValueError, match="per must be one of 'batch', 'pair'"):
        normalized_pair_gradient(chosen[None], rejected[None], [weight], per="token")
    with pytest.raises(ValueError, match="eps must be a finite number above 0"):
        NormalizedPairLoss(eps=0.0)
    with pytest.raises(ValueError, match="chosen_lengths is missing"):
        margin_coefficients(preferences.SimPOLoss(), PairLogProbabilities(frozen, frozen))
