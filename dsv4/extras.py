"""How to add an optional part of this package (`data`, `plots`, ...; pyproject.toml) to an environment."""


def how_to_install(extra: str) -> str:
    """What to type, for errors. The package is on no index, and `uv sync` alone would take other extras away."""
    return f'in a clone, uv sync --inexact --extra {extra} (without uv: pip install ".[{extra}]")'
