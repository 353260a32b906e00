"""Strict arithmetic for every test, and one compilation cache for all workers."""

import os
from pathlib import Path

os.environ.setdefault("DSV4_TYPECHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of two, each worker's wait for the other worker's
os.environ.setdefault("NPROC", "16")  # XLA's threads: with two, interpreted kernels of many threads wait for ever
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tests compile thousands of programs and run each a few times. LLVM's optimisations take half of the time that
    # takes, and of the rest, setting up XLA's MLIR emitters half. `.ci/run` does without both settings where what XLA
    # makes of a program is what is tested.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Linux gives a process 65530 memory maps unless told otherwise (vm.max_map_count). Every compiled program keeps a few
# until it is forgotten, and XLA aborts the process where it gets no more: one worker compiles enough for that.
MEMORY_MAPS = 30_000

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of recorded numbers (see its README)."""
    return ORACLE


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are dropped after a module once they hold too much of what the process may map."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MEMORY_MAPS:
        jax.clear_caches()
