"""Stands in for pydantic's core where it is not installed, like pydantic.py beside it."""


class PydanticCustomError(ValueError):
    """An error of a check that nothing runs."""
