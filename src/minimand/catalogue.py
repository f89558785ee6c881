"""The catalogue: the 57 methods as data, and which of their proofs stand."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import pathlib
import tomllib
from typing import Any

_HERE = pathlib.Path(__file__).resolve().parent

PROOFS = ("oracles", "contracts", "study", "benchmark", "page")


@dataclasses.dataclass(frozen=True)
class Method:
    """One published idea: one row of the catalogue, one file of code, one study, one page."""

    name: str
    card: int
    room: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    code: str
    purpose: str
    claim: str
    keywords: tuple[str, ...]
    parts: tuple[str, ...]
    proofs: tuple[str, ...]

    @property
    def module(self) -> str:
        """Name of the method's file, without its ending."""
        return self.name.replace("-", "_")

    @property
    def built(self) -> bool:
        """Whether the method has parts."""
        return bool(self.parts)

    @property
    def studied(self) -> bool:
        """Whether the method has a study, which ``minimand reproduce`` runs."""
        return pathlib.Path(__file__).with_name("studies").joinpath(f"{self.module}.py").is_file()

    def part_paths(self) -> tuple[str, ...]:
        """Return where each part is imported from; a part of another room is written ``room.Name``."""
        return tuple(f"minimand.{part if '.' in part else f'{self.room}.{part}'}" for part in self.parts)

    def evidence(self) -> dict[str, Any] | None:
        """Return the stored record of the method's study, or None."""
        path = _HERE / "evidence" / f"{self.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def state(self) -> dict[str, str]:
        """Tell for each of the five proofs whether it ``"stands"`` or is ``"open"``."""
        return {proof: "stands" if proof in self.proofs else "open" for proof in PROOFS}

    def verdict(self) -> str | None:
        """Return the stored verdict on the central claim, or None."""
        record = self.evidence()
        return None if record is None else record["verdict"]


@functools.cache
def methods() -> tuple[Method, ...]:
    """Return all methods, by card number."""
    with (_HERE / "catalogue.toml").open("rb") as file:
        rows: list[dict[str, Any]] = tomllib.load(file)["method"]
    return tuple(Method(**{key: _frozen(value) for key, value in row.items()}) for row in rows)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def find(name: str) -> Method:
    """Return the method of that name, or of that card number or arXiv id.

    Raises:
        KeyError: With the nearest names, if there is none.
    """
    for method in methods():
        if name in (method.name, method.module, str(method.card), f"{method.card:02d}", method.arxiv):
            return method
    close = difflib.get_close_matches(name, [method.name for method in methods()], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; `minimand list` shows all"
    raise KeyError(f"there is no method {name!r}{hint}")
