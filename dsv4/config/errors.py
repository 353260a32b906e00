"""What every config raises, and how its messages are put together."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A config that cannot be built: the message names the field, its value and what is allowed."""


def one_of(allowed: Sequence[str]) -> str:
    """`a, b or c`, for messages."""
    return " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
