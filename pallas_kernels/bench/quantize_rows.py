"""Benchmarks of quantising rows, alone and behind RMSNorm: scales with tokens last where a kernel for few rows follows.

XLA's side is the reference, jitted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_GROUP
from pallas_kernels.quantize_rows import kernel_sm90, reference
from pallas_kernels.quantize_rows.cases import BENCH, RowsCase
from pallas_kernels.quantize_rows.tiling import GROUP, RowTiling, default_tiling

EPS = 1e-6
FEW = 64  # rows up to which the scales have tokens last
# Of codes and of scales: a mean summed in another order moves what lies on a boundary.
NORMED_MAY_DIFFER = 1e-3
Inputs = tuple[jax.Array, jax.Array | None]
Result = tuple[jax.Array, jax.Array]


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: RowsCase) -> Bench:
    weight = 2 * case.k if case.normed else 0
    return Bench(
        op="quantize_rows",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={str(tiling): functools.partial(run, case, tiling) for tiling in tilings(case)},
        xla={"reference": functools.partial(plain, case)},
        reference=functools.partial(plain, case),
        judge=functools.partial(difference, allowed=NORMED_MAY_DIFFER if case.normed else 0.0),
        nbytes=3 * case.m * case.k + case.m * case.k // GROUP + weight,
        flops=0,
        shape={"m": case.m, "k": case.k},
    )


def inputs(case: RowsCase, key: jax.Array) -> Inputs:
    """x [m, k] bfloat16 and, where it is normed, weight [k]."""
    of_x, of_weight = jax.random.split(key)
    x = jax.random.normal(of_x, (case.m, case.k), jnp.bfloat16)
    return x, 1 + jax.random.normal(of_weight, (case.k,), jnp.bfloat16) / 4 if case.normed else None


def tilings(case: RowsCase) -> Iterator[RowTiling]:
    """The default first, then every way to cut these rows that is worth a try."""
    blocks = case.k // GROUP
    kind = {"tokens_last": case.m <= FEW, "whole_rows": case.normed}
    tried = [default_tiling(case.m, case.m, blocks, **kind, sms=132)]
    for groups in [blocks] if case.normed else (8, 16, 32, 64):
        unit = blocks if kind["tokens_last"] else case.m * blocks
        tried += [RowTiling(groups, per_sm) for per_sm in (4, 8, 16, 32) if unit % groups == 0]
    return iter(dict.fromkeys(tried))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(case: RowsCase, tiling: RowTiling, sets: Inputs) -> Result:
    eps = EPS if case.normed else None
    return kernel_sm90.quantize_rows(*sets, eps, form=FP8_GROUP, tokens_last=case.m <= FEW, tiling=tiling)


@functools.partial(jax.jit, static_argnums=0)
def plain(case: RowsCase, sets: Inputs) -> Result:
    found = reference.quantize_rows(*sets, EPS if case.normed else None, form=FP8_GROUP)
    scale = scale_bytes(found.scale)
    return found.values, scale.T if case.m <= FEW else scale


def difference(got: Result, want: Result, allowed: float) -> str | None:
    """Why codes or scales are not those of the reference, `allowed` of them aside; None if they are."""
    for name, ours, theirs in zip(("codes", "scales"), got, want, strict=True):
        differ = np.mean(np.asarray(ours).view(np.uint8) != np.asarray(theirs).view(np.uint8))
        if differ > allowed:
            return f"{differ:.2e} of the {name} differ ({allowed:.0e} allowed)"
    return None
