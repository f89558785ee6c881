"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

__all__: list[str] = []
