"""Deciding as data arrive: bandits, adversaries, and questions worth asking."""

__all__: list[str] = []
