"""Counts and bytes against published figures, recorded files and the arrays themselves."""

import json
import sys
from dataclasses import replace

import jax
import pytest

from dsv4.config import CACHE_FORMATS, Execution, load_config
from dsv4.config.overrides import parse_layers
from dsv4.cost import (
    bytes_per_token,
    compressor_state_bytes,
    count_parameters,
    dense_multihead_bytes_per_token,
    entry_bytes,
    index_key_bytes,
    weight_bytes,
    window_bytes,
)
from dsv4.model.cache import MAX_STEP, init_cache

FORMATS = BF16, FP8, FP4 = tuple(CACHE_FORMATS[name] for name in ("bf16", "fp8", "fp8_fp4_index"))


@pytest.mark.parametrize(
    ("name", "total", "active"), [("flash", 284e9, 13e9), ("pro", 1.6e12, 49e9)], ids=["flash", "pro"]
)
def test_parameters_are_those_published(name, total, active):
    found = count_parameters(load_config(name).model)
    assert found.total == pytest.approx(total, rel=0.02)
    assert round(found.active / 1e9) == active / 1e9


def test_mtp_blocks_count_apart():
    config = load_config("tiny").model
    without = replace(config, mtp_blocks=0)
    assert count_parameters(config).mtp > 0 == count_parameters(without).mtp
    assert count_parameters(config).total == count_parameters(without).total


def test_active_takes_k_of_e_experts_and_no_embedding():
    config = load_config("tiny").model
    found = count_parameters(config)
    expert = 3 * config.width * config.moe.expert_width
    unused = len(config.layers) * (config.moe.experts - config.moe.per_token) * expert
    assert found.total - found.active == unused + config.vocab_size * config.width


def test_a_dense_control_uses_all_but_its_embedding():
    config = load_config("tiny").model
    dense = replace(config, moe=replace(config.moe, experts=0, hash_layers=0))
    found = count_parameters(dense)
    assert found.total - found.active == config.vocab_size * config.width


@pytest.mark.parametrize("case", ["csa", "mixed", "mixed_fp8fp4", "hca128"])
def test_weight_bytes_are_those_of_the_files(oracle, case):
    directory = oracle / "ckpt" / case
    found = 0
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        found += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert weight_bytes(load_config(directory).model) == found


@pytest.mark.parametrize(
    ("name", "expected"), [("flash", (6880, 3850, 3514)), ("pro", (9848, 5511, 5031))], ids=["flash", "pro"]
)
def test_cache_bytes_per_token_are_those_published(name, expected):
    config = load_config(name).model
    assert tuple(int(bytes_per_token(config, form)) for form in FORMATS) == expected


def test_entries_and_keys_of_the_interchange_format():
    config = load_config("flash").model
    assert entry_bytes(config.attention, "fp8") == 584
    assert entry_bytes(config.attention, "bfloat16") == 1024
    assert [index_key_bytes(128, form) for form in ("bfloat16", "fp8", "fp4")] == [256, 132, 68]
    # 8 codes in one short tile, 8 rotary dims of 2 bytes, one scale padded to 8.
    assert entry_bytes(load_config("tiny").model.attention, "fp8") == 8 + 16 + 8


def test_window_and_dense_cache():
    config = load_config("flash").model
    assert window_bytes(config, FP8) == 43 * 128 * 584
    assert dense_multihead_bytes_per_token(config) == 43 * 2 * 64 * 512 * 2


def test_a_full_layer_keeps_every_token_and_has_no_window():
    config = replace(load_config("tiny").model, layers=parse_layers("full,window"))
    assert bytes_per_token(config, BF16) == 2 * config.attention.head_dim
    assert window_bytes(config, BF16) == config.attention.window * 2 * config.attention.head_dim


@pytest.mark.parametrize("layers", ["window,csa:4,hca:8", "full,csa:2,hca:16"])
def test_bytes_are_those_of_the_cache_arrays(layers):
    config = replace(load_config("tiny").model, layers=parse_layers(layers))
    capacity = 64
    cache = jax.eval_shape(lambda: init_cache(config, Execution(dtype="bfloat16"), 1, capacity))
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    drafts = len(config.layers) * (MAX_STEP - 1) * entry_bytes(config.attention, "bfloat16")
    fixed = window_bytes(config, BF16) + drafts + compressor_state_bytes(config)
    assert allocated == fixed + capacity * bytes_per_token(config, BF16)


def test_cost_needs_no_jax():
    for module in (name for name in sys.modules if name.startswith("dsv4.cost")):
        assert "jax" not in vars(sys.modules[module])
