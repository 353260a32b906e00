"""Compiled programs are kept on disk, so that the second run of a command starts at once."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DSV4_COMPILATION_CACHE"
# Programs that compile faster than this are not worth a file.
MIN_SECONDS = 0.1


def cache_directory() -> Path | None:
    """Where compiled programs are kept: $DSV4_COMPILATION_CACHE (`off`: nowhere), else the user's cache directory.

    None also where jax has a cache of its own already (JAX_COMPILATION_CACHE_DIR).
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in ("off", "0", "none") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    if wanted:
        return Path(wanted).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsv4" / "xla"


def keep_compiled_programs() -> None:
    """Turns jax's persistent compilation cache on; a directory that cannot be made turns it off, silently."""
    directory = cache_directory()
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
