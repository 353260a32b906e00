"""One softmax over a window and selected compressed entries, with a sink for every head.

Two forms of one op. Decode reads single entries by index; prefill takes the window as a band of consecutive rows,
which is what many queries of one sequence share. Both return the natural log-sum-exp WITHOUT the sink: partial
results over disjoint entries merge by it, and the sink enters once, at the end.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.operands import require_floats
from pallas_kernels.quant import Pages, Rows
from pallas_kernels.rotary import Rotation
from pallas_kernels.sparse_attention import prefill_blocks, prefill_sm90, reference, sm90
from pallas_kernels.sparse_attention.shapes import require_alike
from pallas_kernels.typing import typed

DECODE = Op(
    "sparse_attention",
    [
        kernel(sm90.attend, sm90.unsupported_reason),
        reference_candidate(reference.sparse_attention),
    ],
)
PREFILL = Op(
    "sparse_attention_prefill",
    [
        kernel(prefill_sm90.attend, prefill_sm90.unsupported_reason),
        reference_candidate(prefill_blocks.sparse_attention_prefill),
    ],
)


@typed
def sparse_attention(
    q: Float[Array, "B T H K"],
    window: Float[Array, "B S K"] | Rows | Pages,
    window_index: Int[Array, "B T W"],
    compressed: Float[Array, "B C K"] | Rows | Pages | None,
    compressed_index: Int[Array, "B T k"] | None,
    compressed_count: Int[Array, "B T"] | None,
    sink: Float[Array, " H"] | None,
    *,
    scale: float,
    rotation: Rotation | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
    """Decode form: T (1 to a few) queries a sequence, entries named by index, -1 for none.

    compressed_index None selects the first `compressed_count` entries of `compressed`; with an index, what it names
    beyond the count is not read either, and may be anything. An entry that is named twice counts twice. Entries are
    keys and values at once; quantised ones (Rows, Pages) are dequantised as they are read. Returns the output in q's
    dtype and the float32 log-sum-exp. No entry at all: output 0 and lse -inf; sink +inf: output 0; sink None: no sink.
    Raises ValueError where shapes do not fit, and for compressed entries with neither index nor count.
    rotation, cosines and sines [B, T, half]: the last channels of each token's output are turned by it, before they
    are rounded to q's dtype. With the inverse of the token's own rotation this undoes what rotated values carry.
    """
    named = {
        "window_index": window_index, "compressed_index": compressed_index, "compressed_count": compressed_count,
    }  # fmt: skip
    require_alike(q, {"window": window, "compressed": compressed}, named, sink, rotation)
    return DECODE(
        q, window, window_index, compressed, compressed_index, compressed_count, sink,
        scale=scale, rotation=rotation, implementation=implementation,
    )  # fmt: skip


@typed
def sparse_attention_prefill(
    q: Float[Array, "B T H K"],
    band: Float[Array, "B S K"],
    start: Int[Array, " B"],
    compressed: Float[Array, "B C K"] | Rows | None,
    compressed_index: Int[Array, "B T k"] | None,
    compressed_count: Int[Array, "B T"] | None,
    sink: Float[Array, " H"] | None,
    *,
    width: int,
    scale: float,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
    """Prefill and training form: query t of sequence b is at position start[b] + t and sees the last `width` tokens.

    The LAST T rows of `band` are the queries' own tokens, the S - T before them the tokens that precede `start`;
    rows of positions below 0 are not read. The entries that a query names are distinct. The rest is as in
    `sparse_attention`. Raises ValueError where shapes do not fit, for a band shorter than q, and for a width below 1.
    """
    named = {"compressed_index": compressed_index, "compressed_count": compressed_count}
    require_floats(band=band)  # no Rows: they are the window's in the decode form alone
    if isinstance(compressed, Pages):
        raise TypeError("compressed entries are Pages: prefill takes an array or Rows")
    require_alike(q, {"band": band, "compressed": compressed}, named, sink)
    if width < 1 or band.shape[1] < q.shape[1]:
        raise ValueError(
            f"a window of {width} over a band of {band.shape[1]} rows for {q.shape[1]} queries: it is 1 or more, and "
            "the band's last rows are the queries' own"
        )
    if start.shape != q.shape[:1]:
        raise ValueError(f"start has shape {start.shape}: it has one position for each of {q.shape[0]} sequences")
    return PREFILL(
        q, band, start, compressed, compressed_index, compressed_count, sink,
        width=width, scale=scale, implementation=implementation,
    )  # fmt: skip
