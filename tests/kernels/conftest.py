"""Kernels in the interpreter; with JAX_PLATFORMS=cuda,cpu, the same cases compiled, on a Hopper GPU."""

import contextlib
import os

import jax
import pytest

from pallas_kernels import mosaic
from pallas_kernels.products import NO_TRITON
from tests.kernels.sums import ON_GPU

if ON_GPU:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the device
    # References are to round where they say so, and nowhere else: neither less, nor operands to TF32.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_allow_excess_precision=false {NO_TRITON}"
    jax.config.update("jax_default_matmul_precision", "highest")
    mosaic.interpreted = contextlib.nullcontext  # before the tests import it
    collect_ignore = ["test_mosaic.py", "test_device.py"]  # of the interpreter itself, and of other machines


@pytest.fixture(autouse=True)
def int8_by_cublas(monkeypatch):
    """What INT8 products on a GPU ask for."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {NO_TRITON}")
