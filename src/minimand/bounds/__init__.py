"""What can be promised: bounds on the error of what was learnt."""

__all__: list[str] = []
