"""The interpreter does what the kernel tests rely on."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.mosaic import interpreted, is_interpreted, row_store, sm_count, words
from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, RaceError
from pallas_kernels.mosaic.races import quick_races
from pallas_kernels.mosaic.scale_words import bits_of, least_bits
from pallas_kernels.mosaic.scales import LEAST_BITS, activation_bits, scale_bits, scale_bytes, scale_product


def pass_on(x, *, wait):
    """One warpgroup writes shared memory, the other reads it, with or without waiting for the first."""

    def kernel(x_gmem, y_gmem, smem, written):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _write():
            smem[...] = x_gmem[...]
            plgpu.barrier_arrive(written)
            if not wait:
                plgpu.barrier_wait(written)

        @pl.when(warpgroup == 1)
        def _read():
            if wait:
                plgpu.barrier_wait(written)
            y_gmem[...] = smem[...]

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={"smem": plgpu.SMEM(x.shape, x.dtype), "written": plgpu.Barrier()},
    )(x)


def test_a_race_is_an_error():
    x = jnp.arange(128, dtype=jnp.float32)
    with interpreted():
        np.testing.assert_array_equal(pass_on(x, wait=True), x)
    with pytest.raises(RaceError, match="smem|read of|write of"), interpreted():
        pass_on(x, wait=False).block_until_ready()


def told(seed):
    """What jax's race detector says of each of a few dozen accesses: clocks of every order, ranges of every kind."""
    from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
    from jax._src.pallas.mosaic.interpret.vector_clock import NpVectorClock

    rng = np.random.default_rng(seed)
    fields = {field.name for field in dataclasses.fields(RaceDetectionState)}
    detector, said = RaceDetectionState(**{"num_cores": 3} if "num_cores" in fields else {}), []
    for number in range(40):
        clock = NpVectorClock(3)
        clock.clock[:] = rng.integers(0, 4, 3) + number // 8
        start, kind = rng.integers(0, 6, 2).tolist(), rng.integers(0, 3, 2)
        ends = slice(start[0], start[0] + int(rng.integers(0, 3))), slice(start[1], start[1] + 2, 1)
        of_axes = tuple((slice(None), first, end)[k] for first, end, k in zip(start, ends, kind, strict=True))
        check = detector.check_read if rng.integers(2) else detector.check_write
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                check(f"thread {number}", clock, f"buffer {rng.integers(2)}", of_axes)
            except RuntimeError as error:  # jax from 0.12 on
                print(error)
        said.append(re.sub(" at 0x[0-9a-f]+", "", printed.getvalue()))  # addresses of clocks
    return said


@pytest.mark.parametrize("seed", range(20))
def test_races_are_found_as_jax_finds_them(seed):
    want = told(seed)
    with quick_races():
        got = told(seed)
    assert got == want and 3 < sum(map(bool, want)) < 38


def test_a_simulated_grid_is_small():
    assert not is_interpreted() and sm_count() == 132
    with interpreted():
        assert is_interpreted() and sm_count() == INTERPRETED_SMS


def products_of_scales(codes, scalar):
    """2^(codes - 127) 2^(scalar - 127), 0 below 2^-126; NaN where the scalar is, infinity where codes are 255."""
    exponent = codes.astype(int) + scalar - 254
    want = np.where(exponent < -126, 0.0, np.exp2(np.clip(exponent, -126, 128).astype(np.float64)))
    want[(exponent > 127) | (codes == 255)] = np.inf
    return np.where(scalar == 255, np.nan, want).astype(np.float32)


def test_scales_multiply_as_float32_does():
    codes = np.arange(256, dtype=np.uint8)
    with interpreted():
        for scalar in (0, 100, 127, 150, 254, 255):
            got = scale_product(activation_bits(jnp.asarray(codes)), scale_bits(jnp.uint8(scalar)))
            np.testing.assert_array_equal(got, products_of_scales(codes, scalar))
        vector = jnp.asarray([0.5, 3.0])
        np.testing.assert_array_equal(scale_product(scale_bits(vector), jnp.float32(2)), [1.0, 6.0])
    assert np.isnan(lax.bitcast_convert_type(scale_bits(jnp.uint8(255)), jnp.float32))


def test_scale_bytes_keep_what_was_stored():
    vector = jnp.asarray([0.5, 3.0])
    assert scale_bytes(vector).dtype == jnp.float32
    assert scale_bytes(jnp.ones(3, jnp.float8_e8m0fnu)).tolist() == [127] * 3


@pytest.mark.parametrize("at", range(4))
def test_scales_of_words_are_those_of_their_bytes(at):
    """A word's least is NaN where one of its four codes is, at whichever place, and only there."""
    codes = np.random.default_rng(at).integers(0, 255, (512, 4)).astype(np.uint8)
    codes[:6, at] = 0, 1, 127, 128, 254, 255
    codes[6:10] = 255 * np.eye(4, dtype=np.uint8) + 254 * (1 - np.eye(4, dtype=np.uint8))
    words = jnp.asarray(codes.view(np.int32)[:, 0])
    of_activations, of_weights = bits_of(words, at, LEAST_BITS), bits_of(words, jnp.int32(at), least_bits(words))
    with interpreted():
        one = scale_bits(jnp.uint8(127))
        got = scale_product(of_activations, one)
        np.testing.assert_array_equal(got, products_of_scales(codes[:, at], 127))
        got = scale_product(of_weights, one)
    nan = np.any(codes == 255, axis=1)
    np.testing.assert_array_equal(got, np.where(nan, np.nan, products_of_scales(codes[:, at], 127)))


def test_ops_do_not_wait_for_pallas():
    """It is slow to import, and not on every platform: who runs no kernel does without."""
    code = (
        "import sys; from dsv4.cli.implementations import import_every_op; import_every_op();"
        "sys.exit('jax.experimental.pallas.mosaic_gpu' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("count", [1, 512, 3000])
def test_words_are_cleared(count):
    with interpreted():
        found = np.asarray(words.zeros(count))
    assert found.shape == (-(-count // words.CHUNK) * words.CHUNK,) and not found.any()


def test_four_lanes_trade_blocks():
    """What the interpreter does not run: lane i gets block i, whose words lane j had at j."""
    place = np.arange(4)
    of_lanes = [10 * block + place for block in range(4)]  # of each block, the word that each lane has
    four = row_store.traded(of_lanes, place % 2 == 1, place >= 2, np.where, lambda x, distance: x[place ^ distance])
    np.testing.assert_array_equal(four, 10 * place[None] + np.arange(4)[:, None])
