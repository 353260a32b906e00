"""The compressor of CSA (overlapping) and HCA layers: projected rows in, finished entries and open blocks out."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.compress import reference
from pallas_kernels.compress.reference import CompressorState, Entries, initial_state
from pallas_kernels.dispatch import Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.typing import typed

COMPRESS = Op("compress", [reference_candidate(reference.compress)])

__all__ = ["CompressorState", "Entries", "compress", "initial_state"]


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
    implementation: str = "auto",
) -> tuple[Entries, CompressorState | None]:
    """Pools the first `count` rows (tokens start..start+count-1) of each sequence together with its open block.

    w = K pools each block alone (HCA); w = 2K overlaps (CSA): entry e pools the first half of block e-1 and the
    second half of block e, and block -1 does not exist. Entries are RMS-normed and rotated at position e*m. Rows
    beyond `count` change nothing. `state=None` means start is 0 everywhere and nothing is carried on.
    """
    return COMPRESS(
        kv, gate, state, start, count, ape, norm_weight, frequencies, norm_eps=norm_eps, implementation=implementation
    )
