"""Every block of Python in the README and the documentation runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            name = f"{page.relative_to(ROOT)}#{number}"
            line = page.read_text()[: match.start()].count("\n") + 1
            yield pytest.param(match.group(1), line, id=name)


@pytest.mark.untyped
@pytest.mark.parametrize(("code", "line"), list(blocks()))
def test_a_block_of_the_documentation_runs(code, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    exec(compile("\n" * line + code, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.untyped
def test_the_lightning_module_of_the_documentation_trains():
    """The page shows the module only: what every user of Lightning adds to it is here."""
    import lightning
    import torch

    (code,) = (
        block for block in BLOCK.findall((ROOT / "docs/guide/loops.md").read_text()) if "LightningModule" in block
    )
    names = {"__name__": "documentation"}
    exec(compile(code, "documentation", "exec"), names)
    torch.manual_seed(0)
    labels = torch.arange(64) % 10
    inputs = torch.randn(10, 64)[labels]
    module = names["Digits"]()
    before = module.loss(module.net(inputs), labels)
    trainer = lightning.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=16))
    assert module.loss(module.net(inputs), labels) < before - 0.1
