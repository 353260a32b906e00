"""Batch-invariant products: the bits of a row depend neither on how many others there are nor on which."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import batch_invariant as bench
from pallas_kernels.bench.weight_only import WeightOnlyCase
from pallas_kernels.block_matmul import (
    api,
    block_diagonal_matmul,
    decode_sm90,
    kernel_sm90,
    matmul,
    weight_only_sm90,
)
from pallas_kernels.block_matmul.cases import BENCH, MatmulCase
from pallas_kernels.block_matmul.codes import ORDER
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.sm90 import TREATED
from pallas_kernels.block_matmul.table import TABLE
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.tilings import dense_tiling, in_one_order, weight_only_tiling
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.grouped_matmul import api as experts_api
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul import experts
from pallas_kernels.grouped_matmul import tilings as layer_tilings
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP, ObservedWeight, QuantTensor, TreatedWeight
from pallas_kernels.router import Routing
from tests.kernels import compiled
from tests.kernels.compiled import quantize

H100 = KINDS["H100 / H200"]
ROW = FORMATS["fp8_row"]


def normal(seed, *sizes, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), dtype)


def treated(w):
    channels = jnp.asarray([3, 17], jnp.int32)
    return TreatedWeight(quantize(w, ROW), None, channels, w[:, channels].astype(jnp.bfloat16), rotated=True)


REFERENCE = {
    "plain": (lambda w: w, None, jnp.float32),
    "bfloat16": (lambda w: w.astype(jnp.bfloat16), None, jnp.bfloat16),
    "fp8": (lambda w: quantize(w, FP8_BLOCK), FP8_GROUP, jnp.float32),
    "treated": (treated, ROW, jnp.float32),
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_the_reference(kind):
    """Any number of rows, and a row in any place."""
    make, activations, dtype = REFERENCE[kind]
    w, x = make(normal(1, 96, 256)), normal(0, 130, 256, dtype=dtype)
    run = jax.jit(functools.partial(matmul, activations=activations, batch_invariant=True, implementation="reference"))
    whole = np.asarray(run(x, w), np.float32)
    plain = np.asarray(matmul(x, w, activations=activations, implementation="reference"), np.float32)
    np.testing.assert_allclose(whole, plain, rtol=2e-2, atol=2e-2 * np.std(plain))
    for rows in (slice(0, 1), slice(3, 6), slice(64, 128), slice(60, 130)):
        np.testing.assert_array_equal(np.asarray(run(x[rows], w), np.float32), whole[rows])


def test_the_reference_of_groups():
    w, x = quantize(normal(1, 3 * 64, 128), FP8_BLOCK), normal(0, 2, 35, 3, 128)
    run = jax.jit(functools.partial(block_diagonal_matmul, batch_invariant=True, implementation="reference"))
    whole = np.asarray(run(x, w))
    np.testing.assert_allclose(whole, block_diagonal_matmul(x, w), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(run(x[1:, 30:31], w), whole[1:, 30:31])


def test_the_reference_has_its_gradient():
    x, w = normal(0, 5, 64), normal(1, 32, 64)
    got, want = (jax.grad(lambda x, on=on: jnp.sin(matmul(x, w, batch_invariant=on)).sum())(x) for on in (True, False))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def blocks_of_whole_numbers(rows, k, form, seed):
    """Codes whose products within a block are exact however they are added, scales that make sums of blocks round."""
    rng = np.random.default_rng(seed)
    values = jnp.asarray(rng.integers(-8, 9, (rows, k)), form.values_dtype)
    codes = rng.integers(120, 134, form.scale_shape((rows, k))).astype(np.uint8)
    return QuantTensor(values, jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e8m0fnu), form)


def one_order(results):
    """That each of the results [rows, n] has the bits of the last one, as far as it goes."""
    *others, whole = (np.asarray(y, np.float32) for y in results)
    for y in others:
        np.testing.assert_array_equal(y, whole[: len(y)])


def test_all_tilings_of_fp8_products_add_in_one_order():
    """Both kernels, and results in float32, which show every bit. Sharing out K shows there."""
    k = 1024
    x, w = blocks_of_whole_numbers(256, k, FP8_GROUP, 0), blocks_of_whole_numbers(128, k, FP8_BLOCK, 1)
    scale, w_scale = scale_bytes(x.scale), scale_bytes(w.scale)

    def run(tiling, rows):
        few = isinstance(tiling, FewRows)
        multiply = (decode_sm90 if few else kernel_sm90).matmul
        of_rows = scale[:rows].T if few else scale[:rows]
        call = jax.jit(functools.partial(multiply, tiling=tiling, out_dtype=jnp.float32))
        return np.asarray(call(x.values[:rows], of_rows, w.values, w_scale))

    tried = [
        (FewRows(4, 2, 1), 8), (FewRows(1, 3, 2), 24), (ManyRows(64, 128, 3, "columns", blocks=2, in_flight=2), 64),
        (ManyRows(128, 128, 2, "rows"), 256),
    ]  # fmt: skip
    with interpreted():
        results = [run(*at) for at in tried]
        shared = run(FewRows(1, 3, 1, shares=4), 8)
    one_order(results)
    assert all(in_one_order(tiling) for tiling, _ in tried)
    assert not in_one_order(FewRows(1, 3, 1, shares=4)) and (shared != results[0]).any()


def test_all_tilings_of_the_weight_only_kernel_add_in_one_order():
    k = 512
    x = normal(0, 48, k).round().astype(jnp.bfloat16)
    w = blocks_of_whole_numbers(128, k, FP8_BLOCK, 1)

    def run(tiling, rows):
        call = jax.jit(functools.partial(weight_only_sm90.matmul, tiling=tiling, out_dtype=jnp.float32))
        return np.asarray(call(x[:rows], w.values, scale_bytes(w.scale)))

    tried = [(WeightOnly(8, 1, 128, 2), 8), (WeightOnly(16, 2, 64, 3), 16), (WeightOnly(48, 1, 64, 4), 48)]
    with interpreted():
        one_order([run(*at) for at in tried])


@pytest.mark.parametrize("activations", [FP8_GROUP, None], ids=["fp8", "weight-only"])
def test_the_op_on_hopper(activations):
    """Rows beside others, one of which is NaN, have the bits that they have alone."""
    x, w = normal(0, 9, 256, dtype=jnp.bfloat16), quantize(normal(1, 64, 256), FP8_BLOCK)
    poisoned = x.at[4].set(jnp.nan)
    run = functools.partial(compiled.matmul, activations=activations, batch_invariant=True, implementation="sm90")
    with interpreted():
        alone, beside = (np.asarray(run(rows, w), np.float32) for rows in (x[3:4], poisoned))
    assert np.isnan(beside[4]).all()
    np.testing.assert_array_equal(alone[0], beside[3])


COSTS = {
    "dense": bench.dense(MatmulCase("small", 3, 64, 256)),
    "weight-only": bench.of_weight_only(WeightOnlyCase("small", 3, 64, 256)),
    "layer": bench.layer(grouped_cases.LayerCase("small", 3, 256, 128, 4, 2)),
    "mxfp4": bench.layer(grouped_cases.LayerCase("small", 3, 512, 512, 4, 2, mxfp4=True)),
}


@pytest.mark.parametrize("which", COSTS)
def test_the_benchmark_of_the_cost(which):
    case = COSTS[which]
    sets = case.sets(1)[0]
    with interpreted():
        want, got = case.reference(sets), case.ours[case.usual](sets)
        jax.block_until_ready((want, got))
    assert case.name == "batch-invariant small" and case.wrong(got, want) is None
    other = case.wrong(got.at[0, 3].multiply(2), want)
    assert other == f"1 of {want.size} results have other bits in a batch of another size"


def test_shared_out_k_is_passed_over(tmp_path):
    """Although it was measured to be faster."""
    size, plain = "m=1 n=1024 k=4096", {"us": 9.0}
    path = tmp_path / "tilings.json"
    entries = {
        "few_rows": {size: {"shares": 4, "us": 3.0}, "m=2 n=1024 k=4096": plain},
        "weight_only": {size: {"shares": 8, "stages": 4, "us": 3.0}, "m=2 n=1024 k=4096": plain},
    }
    path.write_text(json.dumps(entries))
    problem = Problem(1, 1024, 4096)
    for choose in (functools.partial(dense_tiling, 1, 1024, 4096), functools.partial(weight_only_tiling, problem)):
        assert choose(table=path).shares > 1
        assert choose(table=path, batch_invariant=True).shares == 1


def test_every_case_has_a_tiling_of_one_order():
    for case in BENCH:
        problem = Problem(case.m, case.n, case.k)
        for table in (TABLE, TABLE.with_name("none.json")):
            found = dense_tiling(case.m, case.n, case.k, table, batch_invariant=True)
            weight_only = weight_only_tiling(problem, table, batch_invariant=True)
            assert found and in_one_order(found) and weight_only and in_one_order(weight_only)
    for case in grouped_cases.LAYERS:
        sizes = case.tokens, case.top, case.experts, case.d, case.i
        found = layer_tilings.layer_tiling(*sizes, batch_invariant=True)
        assert found and in_one_order(found.gate_up) and in_one_order(found.down)


def test_who_refuses():
    """What XLA multiplies by codes, and treatments by XLA around a kernel."""
    x, w = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16), quantize(normal(1, 64, 256), ROW)
    how = {"activations": ROW, "batch_invariant": True}
    with pretend(H100):
        assert api.MATMUL.choose((x, w), how)[0].name == "sm90"
        candidate, refusals = api.MATMUL.choose((x, treated(normal(1, 64, 256))), how)
        assert candidate.name == "reference"
        assert refusals == (f"sm90: {TREATED}", f"scaled_dot: {ORDER}", f"block_dot: {ORDER}")
        stack = quantize(normal(1, 2, 64, 256), ROW)
        args = x, stack, stack, stack, routing_of(np.zeros((8, 2), np.int32), 2)
        candidate, refusals = experts_api.EXPERTS.choose(args, how | {"limit": 0.0})
    assert candidate.name == "reference" and refusals[1] == f"scaled_dot: {ORDER}"


@pytest.mark.parametrize("activations", [FORMATS["fp8_tensor"], FP8_BLOCK], ids=["tensor", "blocks"])
def test_scales_that_span_rows_are_refused(activations):
    """A large row would change what its neighbours are rounded to; by a static scale it does not."""
    how = {"activations": activations, "batch_invariant": True}
    x, w = normal(0, 4, 128), quantize(normal(1, 64, 128), ROW)
    refused = pytest.raises(ValueError, match="batch_invariant: a scale of .* take tiles of one row, such as fp8_row")
    with refused:
        matmul(x, w, **how)
    stack = quantize(normal(1, 2, 128, 128), ROW)
    routing = routing_of(np.array([[0, 1]] * 4, np.int32), 2)
    with refused:
        experts(x, stack, stack, ObservedWeight(TreatedWeight(stack), "w2"), routing, limit=0.0, **how)
    assert matmul(x, normal(1, 64, 128), **how).shape == (4, 64)  # nothing is rounded
    static = TreatedWeight(w, jnp.ones((1, 1), activations.scale_dtype))
    alone, beside = (matmul(rows, static, **how) for rows in (x[:1], x.at[1].multiply(100)))
    np.testing.assert_array_equal(alone[0], beside[0])


def routing_of(chosen, count):
    """Of experts int [N, k], with weights that differ."""
    flat = np.asarray(chosen).reshape(-1)
    weights = 0.5 + np.arange(flat.size).reshape(chosen.shape) % 7 / 8
    counts, order = np.bincount(flat, minlength=count), np.argsort(flat, kind="stable")
    parts = chosen, weights.astype(np.float32), np.zeros((len(chosen), count), np.float32)
    return Routing(*map(jnp.asarray, (*parts, counts.astype(np.int32), order.astype(np.int32))))


@pytest.mark.parametrize("implementation", ["reference", "sm90"])
def test_layers_of_experts(implementation):
    """A token alone, and among others that choose the same experts and other ones."""
    count = 4
    chosen = np.stack([np.random.default_rng(s).permutation(count)[:2] for s in range(6)]).astype(np.int32)
    weights = [quantize(normal(s, count, 128, 128) / 11, FP8_BLOCK) for s in range(3)]
    x, routing = normal(9, 6, 128, dtype=jnp.bfloat16), routing_of(chosen, count)
    run = functools.partial(
        compiled.experts, limit=2.0, activations=FP8_GROUP, batch_invariant=True, implementation=implementation
    )
    alone = routing_of(chosen[4:5], count)._replace(weights=routing.weights[4:5])
    with interpreted():
        beside = np.asarray(run(x, *weights, routing), np.float32)
        single = np.asarray(run(x[4:5], *weights, alone), np.float32)
    np.testing.assert_array_equal(single[0], beside[4])
