"""What moves where: optimal transport with plans that people and networks can use."""

__all__: list[str] = []
