"""How exact sums of products of codes are: in the interpreter, and on a GPU."""

import os

import jax.numpy as jnp
import numpy as np

ON_GPU = os.environ["JAX_PLATFORMS"].startswith("cuda")
# Hopper adds products of FP8 codes in some 14 bits, relative to the largest of those it adds at once, and only what
# kernels add themselves, from block to block, is float32. The interpreter's sums are float32 throughout.
BOUNDS = {jnp.bfloat16: 2.0**-8, jnp.float32: 2.0**-10 if ON_GPU else 2.0**-18}
ALONG_K = 2.0**-7 if ON_GPU else 2.0**-18  # of float32 sums that the device adds along all of K


def check(y, want, out_dtype=jnp.bfloat16, *, relative=3e-3, bound=None):
    """The one tolerance for matmuls: in norm, and of elements, whose results are rounded to `out_dtype`."""
    got, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    error, rms = np.abs(got - want), np.sqrt(np.mean(want**2))
    allowed = (bound or BOUNDS[out_dtype]) * (np.abs(want) + rms)
    assert got.shape == want.shape
    assert np.sqrt(np.mean(error**2)) <= relative * rms, f"{np.sqrt(np.mean(error**2)) / rms:.2e} in norm"
    assert (error <= allowed).all(), f"2^{np.log2(np.max(error / (np.abs(want) + rms))):.1f} of an element and the rms"
