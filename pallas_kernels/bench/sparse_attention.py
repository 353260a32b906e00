"""Benchmarks of sparse decode attention: entries of one large pool in the interchange layout, named at random.

Indices number entries through the pool, as the peer has them. XLA's side is the reference on bfloat16, jitted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench, disagreement
from pallas_kernels.quant import Pages, encode_rows, paged
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import reference, sm90
from pallas_kernels.sparse_attention.cases import BENCH, DecodeCase

WIDTH, ROTARY = 512, 64
SCALE = WIDTH**-0.5
FORM = entry_format("fp8", ROTARY)
BYTES = FORM.nbytes(WIDTH)
WINDOW_PAGE, POOL_PAGE = 256, 64
CONTEXT = 16384  # entries of the pool for each sequence
LEAST = 32  # sequences with entries in the pools
CHECKED = 2  # sequences that are compared with the reference
LSE = 1e-3
Queries = tuple[jax.Array, jax.Array, jax.Array]
Pools = tuple[jax.Array, jax.Array, jax.Array]
Result = tuple[jax.Array, jax.Array]


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: DecodeCase) -> Bench:
    queries = case.batch * case.tokens
    return Bench(
        op="sparse_attention",
        name=case.name,
        inputs=functools.partial(inputs, case),
        shared=functools.partial(pools, case),
        ours={"sm90": jax.jit(functools.partial(run, sm90.attend))},
        xla={"reference": jax.jit(functools.partial(run, reference.sparse_attention))},
        reference=jax.jit(exact),
        judge=difference,
        nbytes=queries * ((case.window + case.top) * BYTES + case.heads * WIDTH * 4),
        flops=4 * queries * case.heads * WIDTH * (case.window + case.top),
        unit="bf16",
        peer=("flashmla", case.batch, case.tokens, case.heads, case.window, case.top),
        shape={"batch": case.batch, "tokens": case.tokens, "heads": case.heads, "top": case.top},
    )


def inputs(case: DecodeCase, key: jax.Array) -> Queries:
    """q and the indices into both pools."""
    of_q, of_window, of_pool = jax.random.split(key, 3)
    q = jax.random.normal(of_q, (case.batch, case.tokens, case.heads, WIDTH), jnp.bfloat16)
    window = index(case, of_window, case.window, sequences(case) * WINDOW_PAGE, float(case.alike > 0))
    return q, window, index(case, of_pool, case.top, sequences(case) * CONTEXT, case.alike)


def sequences(case: DecodeCase) -> int:
    """Whose entries fill the pools: enough of them to overflow the L2 cache."""
    return max(case.batch, LEAST)


def index(case: DecodeCase, key: jax.Array, count: int, entries: int, alike: float) -> jax.Array:
    """int32 [B, T, count], of which `alike` is the same for all queries of a sequence."""
    named = jax.random.randint(key, (case.batch, case.tokens, count), 0, entries, jnp.int32)
    same = jnp.arange(count) < round(alike * count)
    return jnp.where(same[None, None], named[:, :1], named)


def pools(case: DecodeCase, key: jax.Array) -> Pools:
    """Pages of windows, of compressed entries, and the sinks. The entries of one sequence, over and over."""

    def pool(key: jax.Array, count: int, page: int) -> jax.Array:
        rows = encode_rows(jax.random.normal(key, (1, count, WIDTH), jnp.float32), FORM)
        return jnp.tile(paged(rows, page).pool, (sequences(case), 1))

    of_window, of_pool, of_sink = jax.random.split(key, 3)
    sink = jax.random.normal(of_sink, (case.heads,))
    return pool(of_window, WINDOW_PAGE, WINDOW_PAGE), pool(of_pool, CONTEXT, POOL_PAGE), sink


def run(attend: Callable[..., Result], sets: tuple[Queries, Pools]) -> Result:
    (q, window_index, pool_index), (window, pool, sink) = sets
    pages = [
        Pages(data, None, FORM, WIDTH, page_size) for data, page_size in ((window, WINDOW_PAGE), (pool, POOL_PAGE))
    ]
    return attend(q, pages[0], window_index, pages[1], pool_index, None, sink, scale=SCALE)


def exact(sets: tuple[Queries, Pools]) -> Result:
    """The first sequences' results, in float32."""
    (q, *indices), shared = sets
    q, *indices = (x[:CHECKED] for x in (q.astype(jnp.float32), *indices))
    return run(reference.sparse_attention, ((q, *indices), shared))


def difference(got: Result, want: Result) -> str | None:
    """Why output or log-sum-exp are not the reference's; None if they are."""
    if reason := disagreement(got[0], want[0]):
        return reason
    far = np.max(np.abs(np.asarray(got[1]) - np.asarray(want[1])))
    return f"log-sum-exp off by {far:.1e} ({LSE:.0e} allowed)" if not far <= LSE else None
