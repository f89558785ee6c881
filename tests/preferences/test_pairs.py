"""From rows to log-probabilities: every layout gives what a slow pass over one answer at a time gives."""

import json

import datasets
import pytest
import tiny_llama
import torch
import transformers
import trl

from minimand.preferences import (
    TokenPair,
    answer_logits,
    collate_pairs,
    load_language_model,
    pair_log_probabilities,
    read_pairs,
    shares_prompt,
    tokenize_pairs,
    train_only,
)

TOKENIZER = tiny_llama.tokenizer()
TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
ROWS = [dict(row) for row in tiny_llama.pairs(8)]
PAIRS = tokenize_pairs(ROWS, TOKENIZER).pairs


def chat_tokenizer():
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.folder(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def model(folder):
    return load_language_model(folder)[0]


@torch.no_grad()
def slowly(model, prompt, answer):
    """One answer, one token at a time: no padding, no mask, no sharing."""
    found = []
    for place in range(len(answer)):
        scores = model(torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1].double()
        found.append(scores.log_softmax(-1)[answer[place]])
    return torch.stack(found)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_log_probabilities_of_a_batch_are_those_of_each_answer_alone(model, share_prompt, pad_id):
    with torch.no_grad():
        tokens = pair_log_probabilities(model, collate_pairs(PAIRS, pad_id=pad_id, share_prompt=share_prompt))
    for row, pair in enumerate(PAIRS):
        for values, mask, answer in (
            (tokens.chosen, tokens.chosen_mask, pair.chosen),
            (tokens.rejected, tokens.rejected_mask, pair.rejected),
        ):
            assert int(mask[row].sum()) == len(answer)
            assert torch.allclose(values[row, : len(answer)].double(), slowly(model, pair.prompt, answer), atol=1e-5)


def test_gradients_of_the_shared_layout_are_those_of_the_padded_one(model):
    gradients = []
    for share_prompt in (True, False):
        model.zero_grad()
        sums = pair_log_probabilities(model, collate_pairs(PAIRS, share_prompt=share_prompt)).sums()
        (sums.chosen.sum() - 2 * sums.rejected.sum()).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*gradients, atol=2e-4)
    assert gradients[0].abs().max() > 1


def test_hidden_states_are_those_that_predict_the_tokens(model):
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        tokens = pair_log_probabilities(model, batch, hidden=True)
        scores = model.lm_head(tokens.rejected_hidden)
        assert torch.allclose(scores, answer_logits(model, batch)[1], atol=1e-5)


def test_a_model_that_cannot_choose_its_scores_gives_the_same(model):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        one, other = pair_log_probabilities(Plain(), batch), pair_log_probabilities(model, batch)
    assert torch.allclose(one.rejected[other.rejected_mask], other.rejected[other.rejected_mask], atol=1e-5)


def test_models_with_learned_positions_share_a_prompt_too():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert shares_prompt(model, PAIRS[0])
    tokens = pair_log_probabilities(model, collate_pairs(PAIRS))
    pair = PAIRS[3]
    assert torch.allclose(
        tokens.rejected[3, : len(pair.rejected)].double(), slowly(model, pair.prompt, pair.rejected), atol=1e-5
    )


def test_a_model_that_ignores_the_mask_is_found_out(model):
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return self.inner(input_ids=input_ids, position_ids=position_ids)

    assert not shares_prompt(Blind(), TokenPair((5, 6, 7), (8, 9, 10), (11, 12, 13)))


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_tokens_are_those_of_trl(folder, tmp_path, kind):
    tokenizer = chat_tokenizer() if kind == "messages" else TOKENIZER
    rows = [messages(row) if kind == "messages" else row for row in ROWS]
    settings = trl.DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=None)
    trainer = trl.DPOTrainer(
        folder, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    theirs = [
        TokenPair(tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))
        for row in trainer.train_dataset
    ]
    assert tokenize_pairs(rows, tokenizer).pairs == theirs


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_an_implied_prompt_is_what_both_answers_begin_with(kind):
    rows = [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}]
    if kind == "text":
        implied = [{"chosen": "w1 w2 w3 w4", "rejected": "w1 w2 w5"}]
        # Letters are compared, so the answers part after what "w3" and "w5" share: their tokens tell them apart.
        assert tokenize_pairs(implied, TOKENIZER).pairs == tokenize_pairs(rows, TOKENIZER).pairs
    else:
        asked = messages(rows[0])
        implied = [{name: asked["prompt"] + asked[name] for name in ("chosen", "rejected")}]
        assert tokenize_pairs(implied, chat_tokenizer()).pairs == tokenize_pairs([asked], chat_tokenizer()).pairs


def test_what_does_not_fit_loses_the_beginning_of_the_prompt_then_the_end_of_the_answer():
    row = {"prompt": "w1 w2 w3 w4", "chosen": " w5 w6 w7", "rejected": " w8"}
    whole = tokenize_pairs([row], TOKENIZER).pairs[0]
    assert (len(whole.prompt), len(whole.chosen), len(whole.rejected)) == (4, 4, 2)
    for length, sizes in ((8, (4, 4, 2)), (6, (2, 4, 2)), (5, (1, 4, 2)), (3, (1, 2, 2)), (2, (1, 1, 1))):
        found = tokenize_pairs([row], TOKENIZER, max_length=length)
        cut = found.pairs[0]
        assert (len(cut.prompt), len(cut.chosen), len(cut.rejected)) == sizes
        assert cut.prompt == whole.prompt[-len(cut.prompt) :]
        assert cut.chosen == whole.chosen[: len(cut.chosen)]
        assert found.truncated == (length < 8)


def test_rows_that_cannot_be_used_are_counted_by_reason():
    good = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    rows = [
        good,
        good | {"chosen": ""},
        good | {"rejected": "  "},
        good | {"rejected": " w2"},
        {"prompt": "", "chosen": "w2", "rejected": "w3"},
        good | {"chosen": " w2 w4", "rejected": " w2 w5"},
    ]
    tokenizer = tiny_llama.tokenizer()
    found = tokenize_pairs(rows, tokenizer, max_length=2)
    # The last differs only beyond what fits; the empty prompt is begun by the tokenizer's own first token.
    assert found.skipped == {"an empty answer": 2, "identical answers": 2}
    assert found.rows == [0, 4]
    assert found.pairs[1].prompt == (1,)
    tokenizer.bos_token = None
    assert tokenize_pairs(rows, tokenizer, max_length=2).skipped["an empty prompt"] == 1
    with pytest.raises(ValueError, match="none of 1 pairs can be used: 1 with identical answers"):
        tokenize_pairs(rows[3:4], tokenizer)


def test_a_tokenizer_without_padding_token_will_do(model):
    tokenizer = tiny_llama.tokenizer()
    tokenizer.pad_token = None
    assert tokenize_pairs(ROWS, tokenizer).pairs == PAIRS


def test_rows_are_read_from_json_lines_and_data_sets(tmp_path):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert read_pairs(lines) == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    assert read_pairs(str(tmp_path / "folder")) == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert read_pairs(tmp_path / "splits") == ROWS
    assert read_pairs(datasets.Dataset.from_list(ROWS)) == ROWS


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no pairs"),
        ([{"prompt": "a", "chosen": "b"}], "row 1 has no 'rejected'; it has 'prompt', 'chosen'"),
        ([ROWS[0], {"prompt": "a", "chosen": None, "rejected": "b"}], "row 2 has no 'chosen'"),
        ([{"prompt": "a", "chosen": 3, "rejected": "b"}], "row 1: 'chosen' must be text or a list of messages"),
        ([messages(ROWS[0]) | {"prompt": "a"}], "'prompt' is text but 'chosen' is messages"),
        ([["a", "b"]], "row 1 must be an object"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_by_number(rows, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(rows)


def test_files_that_are_no_pairs_are_refused(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": \n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2, is not JSON"):
        read_pairs(broken)
    with pytest.raises(ValueError, match=r"missing.jsonl does not exist: give a file of JSON lines"):
        read_pairs(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="datasets cannot load it"):
        read_pairs(tmp_path)


@pytest.mark.untyped
def test_wrong_settings_are_refused(model):
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenize_pairs(ROWS, TOKENIZER, max_length=1)
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_pairs([messages(ROWS[0])], TOKENIZER)
    with pytest.raises(ValueError, match="pairs is empty"):
        collate_pairs([])
    with pytest.raises(ValueError, match="at least one token each"):
        collate_pairs([TokenPair((1,), (), (2,))])
    with pytest.raises(ValueError, match="tokens up to 99 came to a model that reads 40"):
        pair_log_probabilities(model, collate_pairs([TokenPair((1,), (99,), (2,))]))


def test_what_trains_is_what_was_asked_for(folder):
    def trained(part):
        model = train_only(load_language_model(folder)[0], part)
        return {name.split(".layers.")[-1] for name, weight in model.named_parameters() if weight.requires_grad}

    assert all(name.startswith("1.") for name in trained("last:1"))
    assert any(name.startswith("0.") for name in trained("last:2"))
    assert "lm_head.weight" in trained("all")
    assert all("lora_" in name for name in trained("lora:2"))
    for part, message in (("last:3", "has 2"), ("last:0", "at least 1"), ("first:1", "'all', 'last:N' or 'lora:R'")):
        with pytest.raises(ValueError, match=message):
            train_only(load_language_model(folder)[0], part)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    tokenizer = tiny_llama.tokenizer()
    tokenizer.add_tokens(["w99"])
    load_language_model(folder)[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 41 tokens but the model reads 40"):
        load_language_model(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no causal language model"):
        load_language_model(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder, nor a name on the hub"):
        load_language_model("no-such-model")
