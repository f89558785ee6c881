"""The reference is computed once, kept under its content, and comes back where it belongs."""

import pytest
import tiny_llama
import torch

from minimand.preferences import (
    FrozenTrunk,
    ReferenceCache,
    collate_pairs,
    load_language_model,
    log_probabilities_from_states,
    pair_log_probabilities,
    tokenize_pairs,
    train_only,
    with_reference,
)

PAIRS = tokenize_pairs([dict(row) for row in tiny_llama.pairs(7)], tiny_llama.tokenizer()).pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def model(folder):
    return load_language_model(folder)[0]


class Counted:
    """Counts forward passes of a model."""

    def __init__(self, model):
        self.passes = 0
        model.register_forward_hook(self)

    def __call__(self, *_):
        self.passes += 1


def test_a_policy_that_has_not_moved_has_the_references_log_probabilities(model, tmp_path):
    reference = ReferenceCache(model, folder=tmp_path, batch_size=3)(PAIRS)
    tokens = with_reference(pair_log_probabilities(model, collate_pairs(PAIRS)), reference)
    assert torch.allclose(tokens.ref_chosen, tokens.chosen.detach() * tokens.chosen_mask, atol=1e-5)
    assert torch.allclose(tokens.ref_rejected, tokens.rejected.detach() * tokens.rejected_mask, atol=1e-5)
    assert not tokens.ref_chosen.requires_grad


def test_the_second_time_nothing_is_computed(model, tmp_path):
    counted = Counted(model)
    first = ReferenceCache(model, folder=tmp_path)(PAIRS)
    before = counted.passes
    second = ReferenceCache(model, folder=tmp_path)(PAIRS)
    assert counted.passes == before > 0
    assert all(
        torch.equal(one, other) for pair in zip(first, second, strict=True) for one, other in zip(*pair, strict=True)
    )


def test_other_weights_and_other_pairs_are_other_keys(model, tmp_path):
    cache = ReferenceCache(model, folder=tmp_path)
    key = cache.key(PAIRS)
    assert cache.key(PAIRS[::-1]) != key
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-4
    assert cache.key(PAIRS) != key


def test_a_file_cut_short_is_computed_anew(model, tmp_path):
    cache = ReferenceCache(model, folder=tmp_path)
    first = cache(PAIRS)
    path = tmp_path / f"{cache.key(PAIRS)}.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(cache(PAIRS)[2][1], first[2][1])
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_adapters_are_switched_off_and_are_no_part_of_the_key(folder, model, tmp_path):
    plain = ReferenceCache(model, folder=tmp_path)
    reference = plain(PAIRS)
    adapted = train_only(load_language_model(folder)[0], "lora:2")
    before = ReferenceCache(adapted, folder=tmp_path).key(PAIRS)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    found = ReferenceCache(adapted, folder=tmp_path / "other")(PAIRS)
    assert torch.allclose(found[0][0], reference[0][0], atol=1e-5)
    moved = pair_log_probabilities(adapted, collate_pairs(PAIRS[:1])).chosen[0, : len(reference[0][0])]
    assert not torch.allclose(moved, reference[0][0], atol=1e-2)
    assert ReferenceCache(adapted, folder=tmp_path).key(PAIRS) == before


def test_a_reference_of_other_pairs_is_refused(model, tmp_path):
    tokens = pair_log_probabilities(model, collate_pairs(PAIRS))
    reference = ReferenceCache(model, folder=tmp_path)(PAIRS)
    with pytest.raises(ValueError, match="reference holds 6 pairs"):
        with_reference(tokens, reference[:6])
    with pytest.raises(ValueError, match="different tokenizers or another order"):
        with_reference(tokens, reference[1:] + reference[:1])


@pytest.mark.parametrize("last", [1, 2])
def test_trunk_and_top_together_are_the_model_in_value_and_gradient(tmp_path, last):
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**size, num_hidden_layers=4, initializer_range=0.2, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    trunk = FrozenTrunk(model, last=last)
    assert trunk.exact(PAIRS[0])
    states, top = trunk.states(PAIRS, batch_size=3), trunk.top()
    assert [len(one) for one in states] == [sum(map(len, pair)) for pair in PAIRS]
    train_only(model, f"last:{last}")
    for run in (
        lambda: pair_log_probabilities(model, collate_pairs(PAIRS, share_prompt=False)),
        lambda: log_probabilities_from_states(top, PAIRS, states),
    ):
        sums = run().sums()
        (sums.chosen.sum() - 2 * sums.rejected.sum()).backward()
    whole = [weight.grad for weight in model.parameters() if weight.requires_grad]
    cut = [weight.grad for weight in top.parameters() if weight.requires_grad]
    assert len(whole) == len(cut) == 9 * last
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert len(model.model.layers) == 4


def test_a_model_whose_positions_are_in_its_embeddings_is_not_cut():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)
    assert not FrozenTrunk(model, last=1).exact(PAIRS[0])


def test_a_cut_leaves_a_block_to_each_part(model):
    for last in (0, 2):
        with pytest.raises(ValueError, match="leave a block to each part of the 2"):
            FrozenTrunk(model, last=last)
