"""The model reproduces an independent implementation's recorded numbers (tests/oracle/README.md) in every mode."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4
from dsv4.config import Execution
from dsv4.decoding.run import extend, last_logits
from dsv4.model.cache import init_cache
from dsv4.model.handle import Model

TOLERANCE = 2e-4  # the logits' standard deviation is about 1.5
CASES = ["swa", "csa", "hca16", "hca128", "mixed", "mixed_fp8fp4"]
ODD_LENGTHS = [1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 127, 128, 129]
ORACLE = Path(__file__).parents[1] / "oracle"


@cache
def load(case: str) -> Model:
    return dsv4.load(ORACLE / "ckpt" / case, execution=Execution())


@cache
def data(case: str, name: str = "main") -> dict[str, np.ndarray]:
    with np.load(ORACLE / "data" / f"{case}__{name}.npz") as file:
        return dict(file)


def assert_same_logits(got: jax.Array | np.ndarray, want: np.ndarray) -> None:
    got = np.asarray(got)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@cache
def full(case: str):
    return dsv4.forward(load(case), data(case)["input_ids"], trace=True)


@pytest.mark.parametrize("case", CASES)
def test_full_sequence(case):
    logits, trace = full(case)
    assert_same_logits(logits, data(case)["logits"])
    np.testing.assert_allclose(trace.hidden, data(case)["final_hidden"], atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_greedy_decode(case):
    recorded = data(case)
    logits, cache = dsv4.prefill(load(case), recorded["input_ids"])
    assert_same_logits(logits, recorded["decode_logits"][:, 0])
    for step, token in enumerate(recorded["decode_tokens"].T):
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), token)
        logits, cache = dsv4.decode_step(load(case), token, cache)
        assert_same_logits(logits, recorded["decode_logits"][:, step + 1])


@pytest.mark.parametrize("case", CASES)
def test_chunked_prefill(case):
    """Chunks of the recorded sizes, right-padded to one shape: what pads them must change nothing."""
    recorded, model = data(case), load(case)
    ids, sizes = recorded["input_ids"], recorded["chunk_sizes"]
    cache = init_cache(model.config, model.execution, len(ids), 512)
    begin = 0
    for number, size in enumerate(sizes):
        chunk = np.full((len(ids), sizes.max()), 7, np.int32)
        chunk[:, :size] = ids[:, begin : begin + size]
        count = jnp.full(len(ids), size, jnp.int32)
        logits, cache = last_logits(model, jnp.asarray(chunk), count, cache)
        begin += size
        assert_same_logits(logits, recorded["chunk_end_logits"][:, number])


@pytest.mark.parametrize("case", ["mixed", "csa"])
def test_token_by_token_from_an_empty_cache(case):
    recorded, model = data(case), load(case)
    ids = recorded["input_ids"][:, :160]
    cache = init_cache(model.config, model.execution, len(ids), 160)
    rows = []
    for token in ids.T:
        logits, cache = dsv4.decode_step(model, token, cache)
        rows.append(logits)
    assert_same_logits(jnp.stack(rows, axis=1), recorded["logits"][:, :160])


def selections(trace, layer: int) -> np.ndarray:
    return np.sort(np.asarray(trace.layers[layer].attention.selected), axis=-1)


@pytest.mark.parametrize("case", ["csa", "mixed", "mixed_fp8fp4"])
def test_selections(case):
    """Every query of every CSA layer selects the recorded entries, in any order."""
    recorded, (_, trace) = data(case), full(case)
    layers = [int(name.split(".")[1]) for name in recorded if name.startswith("topk_indices.")]
    assert layers
    for layer in layers:
        np.testing.assert_array_equal(selections(trace, layer), np.sort(recorded[f"topk_indices.{layer}"], axis=-1))


def test_trace_of_mixed():
    recorded, (_, trace) = data("mixed"), full("mixed")
    at = recorded["trace_positions"]
    streams = np.stack([trace.embedded, *(layer.streams for layer in trace.layers)])
    np.testing.assert_allclose(streams[:, :, at], recorded["streams"], atol=TOLERANCE)
    for name in ("attn_out", "ffn_out"):
        got = np.stack([getattr(layer, name) for layer in trace.layers])
        np.testing.assert_allclose(got[:, :, at], recorded[name], atol=TOLERANCE)
    for i, layer in enumerate(trace.layers):
        order = np.argsort(layer.moe.experts, axis=-1)
        want = np.argsort(recorded[f"expert_indices.{i}"], axis=-1)
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(layer.moe.experts), order, -1),
            np.take_along_axis(recorded[f"expert_indices.{i}"], want, -1),
        )
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(layer.moe.weights), order, -1),
            np.take_along_axis(recorded[f"expert_weights.{i}"], want, -1),
            atol=TOLERANCE,
        )
        for name, got in (("compressed_kv", layer.attention.entries), ("indexer_keys", layer.attention.index_keys)):
            assert (f"{name}.{i}" in recorded) == (got is not None)
            if got is not None:
                np.testing.assert_allclose(got, recorded[f"{name}.{i}"], atol=TOLERANCE)


def test_mtp_block():
    recorded, model = data("mixed", "mtp"), load("mixed")

    @jax.jit
    def predict(model, streams, ids):
        with jax.default_matmul_precision("highest"):
            return model.bind().predict_next(streams, ids)[0]

    got = predict(model, jnp.asarray(recorded["mtp_streams_in"]), jnp.asarray(recorded["mtp_next_ids"]))
    assert_same_logits(got, recorded["mtp_logits"])


def odd(length: int) -> dict[str, np.ndarray]:
    prefix = f"len{length}."
    return {k.removeprefix(prefix): v for k, v in data("mixed", "odd").items() if k.startswith(prefix)}


@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_odd_lengths(length):
    """Through one padded shape: every logit of the prompt, then the greedy continuation."""
    recorded, model = odd(length), load("mixed")
    ids = recorded["input_ids"]
    padded = np.full((2, 129), 3, np.int32)
    padded[: len(ids), :length] = ids
    cache = init_cache(model.config, model.execution, 2, 192)
    logits, cache = extend(model, jnp.asarray(padded), jnp.full(2, length, jnp.int32), cache)
    logits = logits[: len(ids), :length]
    assert_same_logits(logits, recorded["logits"])
    last = logits[:, -1]
    for step, token in enumerate(recorded["decode_tokens"].T):
        assert_same_logits(last, recorded["decode_logits"][:, step])
        np.testing.assert_array_equal(jnp.argmax(last, axis=-1), token)
        both = jnp.zeros(2, jnp.int32).at[: len(token)].set(token)
        logits, cache = dsv4.decode_step(model, both, cache)
        last = logits[: len(ids)]


@pytest.mark.slow
@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_odd_lengths_in_their_own_shape(length):
    recorded, model = odd(length), load("mixed")
    assert_same_logits(dsv4.forward(model, recorded["input_ids"]), recorded["logits"])
    logits, _ = dsv4.prefill(model, recorded["input_ids"])
    assert_same_logits(logits, recorded["decode_logits"][:, 0])
