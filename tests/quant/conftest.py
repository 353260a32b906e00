"""The recorded vectors (tests/oracle/README.md) and their reference code."""

import importlib.util

import numpy as np
import pytest


@pytest.fixture(scope="session")
def vectors(oracle):
    return dict(np.load(oracle / "quant_vectors.npz"))


@pytest.fixture(scope="session")
def reference(oracle):
    """The numpy code that made the vectors."""
    spec = importlib.util.spec_from_file_location("quant_ref", oracle / "quant_ref.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
