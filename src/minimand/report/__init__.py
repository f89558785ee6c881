"""The front: one record becomes one HTML file, or tables in a terminal."""

from .html import render, write

__all__ = ["render", "write"]
