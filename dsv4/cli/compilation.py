"""Compiled programs are kept on disk, so that the second run of a command starts soon."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DSV4_COMPILATION_CACHE"
# Programs that compile faster than this are not worth a file.
MIN_SECONDS = 0.1


def cache_directory() -> Path | None:
    """Where compiled programs go: $DSV4_COMPILATION_CACHE (`off`: nowhere), by default the user's cache directory."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in ("off", "0", "none"):
        return None
    if wanted:
        return Path(wanted).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsv4" / "xla"


def keep_compiled_programs() -> str | None:
    """Turns jax's persistent compilation cache on and returns its directory, None if it is off.

    A cache that jax has been given already (JAX_COMPILATION_CACHE_DIR) stays as it is, and a directory that cannot be
    made means none.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return jax.config.jax_compilation_cache_dir
    directory = cache_directory()
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return str(directory)
