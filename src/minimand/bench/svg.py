"""Bits of the figures that reports hold: their colours are those of the page."""

from __future__ import annotations


def words(across: float, down: float, what: str, *, anchor: str = "middle", colour: str = "--muted") -> str:
    """Return a text element; styles, not attributes, for the page's own style sheet would come before those.

    Args:
        across: Where the anchor is.
        down: Where the base line is.
        what: The text, escaped.
        anchor: ``"start"``, ``"middle"`` or ``"end"``.
        colour: Custom property of the page.
    """
    return f'<text x="{across}" y="{down}" style="text-anchor:{anchor};fill:var({colour})">{what}</text>'
