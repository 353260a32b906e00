"""Messages between the thread blocks of a cluster: stores into each other's shared memory, which count on its barriers.

A store tells a barrier of the thread block that it goes to how many bytes have come (`st.async`): who waits there sees
them, and nobody else waits. Barriers are words of shared memory here: Mosaic's own cannot be given to another thread
block. The interpreter has nothing of the kind.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import constant, i32, i64
from pallas_kernels.mosaic.warp import thread

SPLAT = plgpu.Layout.WG_SPLAT(())
BARRIER_WORDS = 2  # int32 of a barrier


def start(barriers: Any, expected: list[int | None]) -> None:
    """Makes barriers, each complete when so many bytes have come, or behind an `expect` where that is None.

    Every thread of the cluster calls it, and `joined` before anything goes to another thread block.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_ctx: Any, barriers: ir.Value) -> None:
        base = address(barriers)
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), constant(0))):
            for i, count in enumerate(expected):
                asm("mbarrier.init.shared::cta.b64 [$0], 1;", "r", moved(base, 8 * i))
                if count is not None:
                    expect_at(moved(base, 8 * i), count)
            asm("fence.mbarrier_init.release.cluster;", "")
        asm("bar.sync 0;", "")
        asm("barrier.cluster.arrive.relaxed.aligned;", "")

    run(barriers)


def joined() -> None:
    @plgpu.inline_mgpu()
    def run(_ctx: Any) -> None:
        asm("barrier.cluster.wait.acquire.aligned;", "")

    run()


def warpgroup_barrier() -> None:
    @plgpu.inline_mgpu()
    def run(_ctx: Any) -> None:
        utils.warpgroup_barrier()

    run()


def expect(barriers: Any, i: jax.Array, count: int) -> None:
    """Bytes of what comes next. By a warpgroup, once for each time that the barrier completes."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def run(_ctx: Any, barriers: ir.Value, i: Any) -> None:
        at = arith.addi(address(barriers), arith.muli(i.registers.item(), constant(8)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread(), constant(0))):
            expect_at(at, count)

    run(barriers, i)


def wait(barriers: Any, i: jax.Array, parity: jax.Array) -> None:
    """Until all bytes of barrier i have come. By a warpgroup."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def run(_ctx: Any, barriers: ir.Value, i: Any, parity: Any) -> None:
        at = arith.addi(address(barriers), arith.muli(i.registers.item(), constant(8)))
        # As usual, for the thread block: for the cluster, each wait would throw away the L1 cache.
        text = """{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;
            @p bra DONE; bra AGAIN; DONE: }"""
        asm(text, "r,r", at, parity.registers.item())

    run(barriers, i, parity)


def expect_at(at: ir.Value, count: int) -> None:
    asm(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count};", "r", at)


def there(at: ir.Value, rank: int | ir.Value) -> ir.Value:
    """The address, in the cluster, of what lies in thread block `rank` where `at` is in this one."""
    rank = constant(rank) if isinstance(rank, int) else rank
    return llvm.inline_asm(i32(), [at, rank], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", has_side_effects=True)


def send(to: ir.Value, values: list[ir.Value], barrier: ir.Value) -> None:
    """float32 values, one, two or four, to an address in the cluster; they count on a barrier in the same thread block."""
    wide = f".v{len(values)}" if len(values) > 1 else ""
    names = ", ".join(f"${i + 2}" for i in range(len(values)))
    source = f"{{{names}}}" if wide else names
    text = f"st.async.shared::cluster.mbarrier::complete_tx::bytes{wide}.b32 [$0], {source}, [$1];"
    words = [llvm.bitcast(i32(), value) for value in values]
    asm(text, ",".join(["r"] * (2 + len(values))), to, barrier, *words)


def address(ref: ir.Value) -> ir.Value:
    """In shared memory, of 32 bits."""
    return arith.trunci(i32(), llvm.ptrtoint(i64(), utils.memref_ptr(ref)))


def moved(at: ir.Value, offset: int) -> ir.Value:
    return arith.addi(at, constant(offset)) if offset else at


def asm(text: str, constraints: str, *args: ir.Value) -> None:
    """With no result, in its place among accesses to memory."""
    constraints = f"{constraints},~{{memory}}" if constraints else "~{memory}"
    llvm.inline_asm(None, list(args), text, constraints, has_side_effects=True)
