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
    assert len(code.strip().splitlines()) <= 10
    exec(compile("\n" * line + code, "documentation", "exec"), {"__name__": "documentation"})
