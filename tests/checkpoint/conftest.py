"""Tools to read, change and rewrite checkpoints without the code under test, as the fixture `tools`."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors

from dsv4.checkpoint import CheckpointError, read

ORACLE = Path(__file__).parents[1] / "oracle" / "ckpt"
BITS = {"F32": np.uint32, "BF16": np.uint16, "I64": np.int64, "I8": np.uint8, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8}


@pytest.fixture(scope="session")
def tools():
    """The functions below: test modules cannot import one another."""
    return sys.modules[__name__]


@pytest.fixture
def copy(tmp_path):
    """Copies a recorded checkpoint to where it may be damaged."""

    def copy_case(case):
        return Path(shutil.copytree(ORACLE / case, tmp_path / case))

    return copy_case


def stored(directory):
    """Name -> (dtype, shape, bytes) of every tensor, by the reference implementation."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for path in sorted(Path(directory).glob("*.safetensors"))
        for name, tensor in safetensors.deserialize(path.read_bytes())
    }


def pack(header, data):
    """The bytes of a safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def rewrite(directory, change, file="model.safetensors"):
    """Applies `change` to the dict of `stored` tensors of one file, in place."""
    path = Path(directory) / file
    tensors = {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(path.read_bytes())
    }
    change(tensors)
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content
    path.write_bytes(pack(header, data))


def poke(name, dtype, at, value):
    """A change for `rewrite`: element `at` of the flat tensor becomes `value`."""

    def change(tensors):
        stored_dtype, shape, content = tensors[name]
        array = np.frombuffer(content, dtype).copy()
        array[at] = value
        tensors[name] = (stored_dtype, shape, array.tobytes())

    return change


def edit_config(directory, **changes):
    """Sets keys of config.json; None removes one."""
    path = Path(directory) / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def assert_same_bits(actual, expected):
    """Two trees with equal structure (int keys, QuantTensor formats included), dtypes and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where


def expected_bits(stored, name):
    """One of the `stored` tensors as unsigned integers (hash tables: int64)."""
    dtype, shape, content = stored[name]
    return np.frombuffer(content, BITS[dtype]).reshape(shape)


def problems_of(directory, **options):
    """The error that reading `directory` raises."""
    with pytest.raises(CheckpointError) as caught:
        read(directory, **options)
    return caught.value


def retyped(name, dtype, numpy_dtype):
    """A change for `rewrite`: the tensor claims `dtype`, its size on disk fitting."""

    def change(tensors):
        old, shape, content = tensors[name]
        value = np.frombuffer(content, BITS[old]).astype(numpy_dtype)
        tensors[name] = (dtype, shape, value.tobytes())

    return change


def reshaped(name, shape):
    """A change for `rewrite`: the tensor claims `shape`."""

    def change(tensors):
        tensors[name] = (tensors[name][0], shape, tensors[name][2])

    return change
