"""From partial products to a sub-layer's input: coefficients, Sinkhorn, the sum of streams, RMSNorm; on Hopper.

A warpgroup takes `held` tokens. For their coefficients each has one or more warps, a lane for each of the 24 numbers
while partials are added, then every lane all of them: 16 numbers of a matrix in 16 registers, so that no
normalisation moves anything between threads. Then one token at a time: its streams, 8 neighbours a thread, are read
once, in flight while the coefficients are made, and x stays in registers from the weighted sum to its norm.

Bound: memory, or for few tokens latency: an iteration of Sinkhorn is a chain of some 100 cycles.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection.project_sm90 import ROW
from pallas_kernels.hyper_connection.tiling import CHUNK, GROUP, MIXED, MOST_HELD, STREAMS, PreTiling
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quantize_rows.kernel_sm90 import quantized, registers, spread

AHEAD = 32  # groups of columns up to which a warpgroup holds the next token's streams beside x
COMB = range(2 * STREAMS, MIXED)


class Numbers(NamedTuple):
    """What `pre` is told besides its arrays."""

    iterations: int
    eps: float
    norm_eps: float


def scratch(held: int) -> dict[str, Any]:
    """mixed: the 24 numbers of a token, transposed where there are several. into: its weights of streams."""
    return {
        "mixed": plgpu.SMEM((ROW, held) if held > 1 else (held, ROW), jnp.float32),
        "into": plgpu.SMEM((STREAMS, held), jnp.float32),
    }


def out_types(tokens: int, width: int, form: QuantFormat | None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of x, post and comb, and of x's codes and their scales if there is a format for them."""
    of_codes = ()
    if form is not None:
        of_scales = jnp.uint8 if form.scale == "ue8m0" else jnp.float32
        of_codes = (
            jax.ShapeDtypeStruct((tokens, width // CHUNK, CHUNK), form.values_dtype),
            jax.ShapeDtypeStruct((tokens, width // CHUNK), of_scales),
        )
    return (
        jax.ShapeDtypeStruct((tokens, width // CHUNK, CHUNK), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, STREAMS), jnp.float32),
        jax.ShapeDtypeStruct((tokens, STREAMS * STREAMS), jnp.float32),
        *of_codes,
    )


def of_rows(codes: jax.Array, scale: jax.Array, form: QuantFormat) -> QuantTensor:
    """[m, D] of codes and scales as they are written."""
    if form.scale == "ue8m0":
        scale = lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
    return QuantTensor(codes.reshape(codes.shape[0], -1), scale, form)


def finish(
    partial: jax.Array,
    squares: jax.Array,
    streams: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm_weight: jax.Array,
    numbers: Numbers,
    tiling: PreTiling,
    form: QuantFormat | None = None,
) -> tuple[jax.Array, ...]:
    """x [m, D/128, 128], post [m, 4] and comb [m, 16] of streams [m, 4, D/128, 128], in one launch of its own.

    norm_weight [D/128, 128]. form: of x's codes, which follow: float8 [m, D/128, 128] and stored scales [m, D/128].
    """
    tokens, _, groups, _ = streams.shape
    held = tiling.held
    assert tokens % held == 0, f"{tokens} tokens in {tiling}"
    if held > MOST_HELD and not is_interpreted():
        raise ValueError(f"held={held} does not compile with jax {jax.__version__}: use held={MOST_HELD}, or jax 0.11")

    def kernel(*refs, **scratch):
        token = lax.axis_index("item") * held
        finish_tokens(token, *refs, numbers=numbers, tiling=tiling, form=form, **scratch)

    return plgpu.kernel(
        kernel,
        out_type=out_types(tokens, groups * CHUNK, form),
        grid=(tokens // held,),
        grid_names=("item",),
        scratch_types=scratch(held),
    )(partial, squares, streams, base, scale, norm_weight)


def finish_tokens(
    token: jax.Array,
    partial_gmem: Any,
    squares_gmem: Any,
    streams_gmem: Any,
    base_gmem: Any,
    scale_gmem: Any,
    norm_weight_gmem: Any,
    x_gmem: Any,
    post_gmem: Any,
    comb_gmem: Any,
    *codes_gmem: Any,
    numbers: Numbers,
    tiling: PreTiling,
    form: QuantFormat | None,
    mixed: Any,
    into: Any,
) -> None:
    """What becomes of the `held` tokens from `token` on."""
    held, groups = tiling.held, streams_gmem.shape[2]
    layout = registers(groups)

    def load_streams(t: int) -> list[jax.Array]:
        at = streams_gmem.at[token + t]
        return [plgpu.load(at.at[i], layout=layout, optimized=False) for i in range(STREAMS)]

    def load_factors() -> jax.Array:
        return plgpu.load(norm_weight_gmem, layout=layout, optimized=False)

    streams = load_streams(0)  # before anything that waits
    factors = load_factors() if held == 1 else None
    constants = [base_gmem[o] for o in range(MIXED)], [scale_gmem[i] for i in range(3)]
    rows = pl.ds(token, held)
    logits = mixed_numbers(partial_gmem.at[:, :, rows], squares_gmem.at[:, :, rows], constants, mixed, numbers, tiling)

    def store(gmem, i, value):
        if held == 1:
            gmem[token, i] = value
        else:
            store_narrow(gmem, (rows, i), value)

    weights = [sigmoid(logits[i]) + numbers.eps for i in range(STREAMS)]
    for i, weight in enumerate(weights):
        store(post_gmem, i, 2 * sigmoid(logits[STREAMS + i]))
        if held > 1:
            into[i] = weight
    for i, value in enumerate(sinkhorn([logits[o] for o in COMB], numbers)):
        store(comb_gmem, i, value)
    for t in range(held):
        of_token = weights if held == 1 else [into[i, t] for i in range(STREAMS)]
        parts = [weight * stream.astype(jnp.float32) for weight, stream in zip(of_token, streams, strict=True)]
        wide = functools.reduce(jnp.add, parts)
        if t + 1 < held and groups <= AHEAD:
            streams = load_streams(t + 1)
        of_columns = load_factors() if factors is None else factors  # again: registers are scarce
        squares = jnp.sum(wide * wide, axis=1)
        squares = jnp.sum(squares) if groups > 1 else spread(squares, layout)
        x = wide * lax.rsqrt(squares / (groups * CHUNK) + numbers.norm_eps) * of_columns.astype(jnp.float32)
        rounded = x.astype(jnp.bfloat16)
        x_gmem[token + t] = rounded
        if form is not None:
            codes, stored = quantized(rounded.astype(jnp.float32), form, layout)
            codes_gmem[0][token + t] = codes
            store_narrow(codes_gmem[1], token + t, stored)
        if t + 1 < held and groups > AHEAD:
            streams = load_streams(t + 1)


def mixed_numbers(
    partial_gmem: Any, squares_gmem: Any, constants: Any, mixed_smem: Any, numbers: Numbers, tiling: PreTiling
) -> list[jax.Array]:
    """mix * scale + base: 24 arrays [held], of partials [groups, each, held, 32] and squares [groups, each, held]."""
    base, scale = constants
    lanes = token_lanes(tiling.held)
    columns = partial_gmem.shape[0] * GROUP * CHUNK

    several = partial_gmem.shape[0] > 1  # groups: Mosaic infers no layout for an axis of one

    def of_chunk(c: int) -> tuple[jax.Array, jax.Array]:  # of every group
        at = (slice(None) if several else 0, c)
        return (
            plgpu.load(partial_gmem.at[at], layout=lanes, optimized=False),
            plgpu.load(squares_gmem.at[at], layout=lanes.reduce(1), optimized=False),
        )

    product, squares = functools.reduce(added, map(of_chunk, range(partial_gmem.shape[1])))
    if several:
        product, squares = jnp.sum(product, axis=0), jnp.sum(squares, axis=0)
    inverse_rms = lax.rsqrt(squares / columns + numbers.norm_eps)
    mix = product * plgpu.layout_cast(lax.broadcast_in_dim(inverse_rms, product.shape, [0]), lanes)
    if tiling.held == 1:  # scalars: every thread has all numbers of the one token
        mixed_smem[...] = mix
        found = [mixed_smem[0, o] for o in range(MIXED)]
    else:
        mixed_smem.T[...] = mix
        found = [plgpu.load(mixed_smem.at[o], layout=lanes.reduce(1), optimized=False) for o in range(MIXED)]
    return [x * scale[min(o // STREAMS, 2)] + base[o] for o, x in enumerate(found)]


def added(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def sinkhorn(logits: list[jax.Array], numbers: Numbers) -> list[jax.Array]:
    """The 16 numbers of the matrix, row by row, from those of its logits: `reference.sinkhorn` unrolled."""
    n = STREAMS

    def sums(values: list[jax.Array]) -> list[jax.Array]:  # of rows
        return [(a + b) + (c + d) for a, b, c, d in (values[i : i + n] for i in range(0, n * n, n))]

    def normalize_rows(values: list[jax.Array]) -> list[jax.Array]:
        inverse = [reciprocal(total + numbers.eps) for total in sums(values)]
        return [value * inverse[i // n] for i, value in enumerate(values)]

    def normalize_columns(values: list[jax.Array]) -> list[jax.Array]:
        return transposed(normalize_rows(transposed(values)))

    def transposed(values: list[jax.Array]) -> list[jax.Array]:
        return [values[i % n * n + i // n] for i in range(n * n)]

    most = [functools.reduce(jnp.maximum, logits[i : i + n]) for i in range(0, n * n, n)]
    values = [jnp.exp(logit - most[i // n]) for i, logit in enumerate(logits)]
    inverse = [reciprocal(total) for total in sums(values)]
    values = normalize_columns([value * inverse[i // n] + numbers.eps for i, value in enumerate(values)])

    def both(_: Any, values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(normalize_columns(normalize_rows(list(values))))

    return list(lax.fori_loop(0, numbers.iterations - 1, both, tuple(values)))


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x for positive x, to a few units in the last place: a division is a chain four times as long."""
    root = lax.rsqrt(x)
    return root * root


def sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def token_lanes(held: int) -> Any:
    """How a warpgroup has [held, 32]: a lane for each column, and every token 4 / held warps."""
    warp_dims = {4: (-3,), 2: (plgpu.Replicated(2), -3), 1: (plgpu.Replicated(4),)}[held]
    return plgpu.Layout.TILED(plgpu.Tiling(((held, ROW), (1,))), warp_dims, (-2,), -1)
