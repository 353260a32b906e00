"""How much of a model is measured."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.config.errors import require


@dataclass(frozen=True)
class Settings:
    """windows: of `length` targets each, at most. prompts: continued greedily, at most one a window, of which each is
    the first `prompt_tokens`; 0 for none. new_tokens: of each continuation. resamples, seed: of the bootstrap.

    Raises ConfigError for values out of range.
    """

    windows: int = 16
    length: int = 1024
    prompts: int = 16
    prompt_tokens: int = 128
    new_tokens: int = 64
    resamples: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 0), ("resamples", 2000), ("seed", 0)):
            require((value := getattr(self, name)) >= least, f"{name} is {value}: it must be at least {least}")
        for name in ("windows", "length", "prompt_tokens", "new_tokens"):
            require((value := getattr(self, name)) >= 1, f"{name} is {value}: it must be at least 1")
