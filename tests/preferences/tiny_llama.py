"""A random Llama of 20,000 numbers and a tokenizer of 40 words, made on the spot: nothing is downloaded."""

import datasets
import tokenizers
import torch
import transformers

WORDS = [f"w{i}" for i in range(36)]


def tokenizer():
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    # The end of a text is glued to its last word, so it must be split off as a token of its own.
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def folder(path, seed=0):
    """Write a model and its tokenizer, since TRL loads references by name."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def pairs(rows=16, seed=0, prompt_words=None):
    """Chosen answers favour the first half of the words; lengths differ within and between pairs."""
    generator = torch.Generator().manual_seed(seed)

    def text(low, high, at_least, at_most):
        length = int(torch.randint(at_least, at_most + 1, (1,), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(low, high, (length,), generator=generator))

    return datasets.Dataset.from_list(
        [
            {
                "prompt": text(0, 36, *((prompt_words,) * 2 if prompt_words else (2, 4))),
                "chosen": " " + text(0, 18, 2, 6),
                "rejected": " " + text(18, 36, 1, 5),
            }
            for _ in range(rows)
        ]
    )
