"""The interpreter does what the kernel tests rely on."""

import subprocess
import sys

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.mosaic import interpreted, is_interpreted, sm_count
from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, RaceError
from pallas_kernels.mosaic.scales import scale_bytes, scale_product


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


def test_a_simulated_grid_is_small():
    assert not is_interpreted() and sm_count() == 132
    with interpreted():
        assert is_interpreted() and sm_count() == INTERPRETED_SMS


def test_scales_multiply_by_adding_exponents():
    codes = jnp.arange(256, dtype=jnp.uint8)
    for scalar in (0, 100, 127, 150, 254):
        got = np.asarray(scale_product(codes, jnp.uint8(scalar)))
        exponent = np.arange(256) + scalar - 254
        want = np.where(exponent < -126, 0.0, np.exp2(np.clip(exponent, -126, 128).astype(np.float64)))
        want[exponent > 127] = np.inf
        np.testing.assert_array_equal(got, want.astype(np.float32))
    vector = jnp.asarray([0.5, 3.0])
    np.testing.assert_array_equal(scale_product(vector, jnp.float32(2)), [1.0, 6.0])
    assert scale_bytes(vector).dtype == jnp.float32
    assert scale_bytes(jnp.ones(3, jnp.float8_e8m0fnu)).tolist() == [127] * 3


def test_ops_do_not_wait_for_pallas():
    """It is slow to import, and not on every platform: who runs no kernel does without."""
    code = (
        "import sys; from dsv4.cli.implementations import import_every_op; import_every_op();"
        "sys.exit('jax.experimental.pallas.mosaic_gpu' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
