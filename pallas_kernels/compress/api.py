"""The compressor of CSA (overlapping) and HCA layers: projected rows in, finished entries and open blocks out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.compress import reference, sm90
from pallas_kernels.compress.reference import CompressorState, Entries, initial_state
from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.quant.rows import Rows
from pallas_kernels.typing import typed

COMPRESS = Op(
    "compress",
    [
        kernel(sm90.compress_into, sm90.unsupported_reason),
        reference_candidate(reference.compress_into),
    ],
)

__all__ = ["CompressorState", "Entries", "compress", "compress_into", "initial_state"]


@typed
def compress(
    kv: Float[Array, "B T w"],
    gate: Float[Array, "B T w"],
    state: CompressorState | None,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    ape: Float[Array, "m w"],
    norm_weight: Float[Array, " K"],
    frequencies: Float[Array, " half"],
    *,
    norm_eps: float,
) -> tuple[Entries, CompressorState | None]:
    """Pools the first `count` rows (tokens start..start+count-1) of each sequence together with its open block.

    w = K pools each block alone (HCA); w = 2K overlaps (CSA): entry e pools the first half of block e-1 and the
    second half of block e, and block -1 does not exist. Entries are RMS-normed and rotated at position e*m. Rows
    beyond `count` change nothing. `state=None` means start is 0 everywhere and nothing is carried on. Differentiable,
    and the reference on every device; `compress_into` is what decoding runs.
    """
    return reference.compress(kv, gate, state, start, count, ape, norm_weight, frequencies, norm_eps=norm_eps)


def require_alike(
    rows: Rows,
    kv: jax.Array,
    gate: jax.Array,
    state: CompressorState,
    start: jax.Array,
    count: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
) -> None:
    """Raises ValueError, naming the operand, where it does not fit kv [B, T, w]: kernels read by address."""
    batch, _, width = kv.shape
    entry = norm_weight.shape[-1]
    if width not in (entry, 2 * entry) or ape.shape[-1] != width:
        raise ValueError(
            f"kv has {width} channels, ape {ape.shape[-1]}, norm_weight {entry}: w, w, and w or half of it"
        )
    if gate.shape != kv.shape:
        raise ValueError(f"gate has shape {gate.shape}: it is that of kv, {kv.shape}")
    if (rows.shape[0], rows.shape[-1]) != (batch, entry):
        raise ValueError(f"rows have shape {rows.shape}: they are of {batch} sequences, {entry} channels")
    for name, x in (("kv", state.kv), ("gate", state.gate)):
        if x.shape != (batch, state.kv.shape[1], width) or x.dtype != jnp.float32:
            wanted = (batch, state.kv.shape[1], width)
            raise ValueError(f"the state's {name} is {x.dtype} {x.shape}: float32 {wanted}, with the slots of its kv")
    for name, x in (("start", start), ("count", count)):
        if x.shape != (batch,):
            raise ValueError(f"{name} has shape {x.shape}: one for each of {batch} sequences")


@typed
def compress_into(
    rows: Rows,
    kv: Float[Array, "B T w"],
    gate: Float[Array, "B T w"],
    state: CompressorState,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    ape: Float[Array, "m w"],
    norm_weight: Float[Array, " K"],
    frequencies: Float[Array, " half"],
    *,
    norm_eps: float,
    implementation: str = "auto",
) -> tuple[Rows, CompressorState]:
    """`compress`, with every entry that closes encoded as row `number` of the cache `rows` [B, N, K], in its format.

    Rows and state are updated in place where the caller donates them (jit) or has no use for them any more: no other
    row is read or written. Entries with numbers from N on are dropped. A sequence's bits depend on no other. A kernel
    adds in an order of its own: one code in some ten thousand is its neighbour, where a value lies on the boundary.
    Raises ValueError where shapes do not fit. The reference is differentiable, the kernel is not.
    """
    require_alike(rows, kv, gate, state, start, count, ape, norm_weight)
    return COMPRESS(
        rows, kv, gate, state, start, count, ape, norm_weight, frequencies,
        norm_eps=norm_eps, implementation=implementation,
    )  # fmt: skip
