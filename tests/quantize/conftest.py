"""A model small enough to quantise in every way: its weights have two shapes, so that little is compiled."""

import dataclasses
import sys
import warnings

import jax
import numpy as np
import pytest
import safetensors

import dsv4
from dsv4 import checkpoint
from dsv4.config import RECIPES, AttentionConfig, IndexerConfig, ModelConfig, MoEConfig, Recipe
from dsv4.config.layers import parse_layers
from pallas_kernels.formats import FORMATS

CONFIG = ModelConfig(
    layers=parse_layers("window,csa:4"),
    vocab_size=256,
    width=32,
    max_context=32,
    attention=AttentionConfig(heads=2, head_dim=16, rope_dim=8, q_lora_rank=32, o_groups=1, o_lora_rank=32, window=8),
    indexer=IndexerConfig(heads=2, head_dim=16, top_k=2),
    moe=MoEConfig(experts=2, per_token=1, expert_width=32, hash_layers=1),
    mtp_blocks=1,
)
# Every recipe, every treatment, and the classes that no recipe of ours touches.
VARIANTS: dict[str, Recipe] = {name: recipe for name, recipe in RECIPES.items() if name != "bf16"} | {
    "rotated": dataclasses.replace(RECIPES["int8"], rotate=True),
    "outliers": dataclasses.replace(RECIPES["fp8"], outlier_channels=3),
    "both": dataclasses.replace(RECIPES["fp8_per_channel"], outlier_channels=3, rotate=True),
    "embedded": dataclasses.replace(RECIPES["released"], embedding=FORMATS["int8_row"], head=FORMATS["fp8_row"]),
    "bfloat16 scales": dataclasses.replace(
        RECIPES["int8"], dense=dataclasses.replace(FORMATS["int8_row"], scale="bfloat16")
    ),
}


@pytest.fixture(scope="session")
def model():
    """In bfloat16."""
    return dsv4.init(CONFIG, seed=3)


@pytest.fixture(scope="session")
def source(model, tmp_path_factory):
    """`model` as a released checkpoint."""
    directory = tmp_path_factory.mktemp("source") / "model"
    checkpoint.export(model, directory)
    return directory


@pytest.fixture(scope="session")
def windows():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 24)).astype(np.int32)


def content(directory):
    """File name -> bytes, of a finished checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def stored(directory):
    """Tensor -> (dtype, shape), by the reference implementation of the format."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]))
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.deserialize(path.read_bytes())
    }


def same_bits(actual, expected):
    """Two trees with equal structure, formats included, dtypes and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where


def export_quietly(model, directory, **options):
    """Export without the warning that only dsv4 will read the result, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.export(model, directory, **options)


def nothing_at(directory):
    """Neither the directory nor anything unfinished beside it."""
    return not list(directory.parent.glob(f"*{directory.name}*"))


@pytest.fixture(scope="session")
def tools():
    """The functions and tables of this file: test modules cannot import one another."""
    return sys.modules[__name__]
