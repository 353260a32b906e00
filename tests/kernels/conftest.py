"""Kernels in the interpreter; with JAX_PLATFORMS=cuda,cpu, the same cases compiled, on a Hopper GPU."""

import contextlib
import os

import jax
import pytest

from pallas_kernels import mosaic

ON_GPU = os.environ["JAX_PLATFORMS"].startswith("cuda")
if ON_GPU:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the device
    mosaic.interpreted = contextlib.nullcontext  # before the tests import it
    collect_ignore = ["test_mosaic.py", "test_device.py"]  # of the interpreter itself, and of other machines


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
    """Compiled without optimisation: these tests compile a hundred small programs and run each a few times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not ON_GPU)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
