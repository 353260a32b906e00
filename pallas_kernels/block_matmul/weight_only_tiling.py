"""How weight_only_sm90 cuts a problem up: what fits, and what its time is where nothing was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from pallas_kernels.block_matmul.problem import BLOCK, MOST_COLUMNS, MOST_SHARES, SHARED_BYTES, WGMMA_ROWS, Problem
from pallas_kernels.block_matmul.tiling import PRODUCER_REGISTERS, launch_registers
from pallas_kernels.mosaic.launch import H100_SMS

CONVERTING = 300  # instructions of a warp for 64 x 128 weights, in cycles of its scheduler
BYTES_A_CYCLE = 32  # that a multiprocessor is given, nearly
BEGINNING, EXCHANGING = 1500, 1500  # cycles of a tile before its first product, and of adding shares
OTHER_REGISTERS = 80  # of a thread, for weights on their way and addresses
CONSUMERS = {1: 232, 2: 232, 4: 104}  # warpgroups and their registers


@dataclass(frozen=True)
class WeightOnly:
    """tokens x (64 x warpgroups) results a tile, `depth` of K a stage, buffers, and the order of tiles.

    shares: thread blocks, a cluster, that share out K of one tile. Consecutive tiles run along `width` tiles of
    weights, so that they meet their operands in the L2 cache.
    """

    tokens: int = 8
    warpgroups: int = 1
    depth: int = 128
    stages: int = 12
    registers: int = 232
    shares: int = 1
    width: int = 16

    def __post_init__(self) -> None:
        asked = self.warpgroups * self.registers + PRODUCER_REGISTERS
        if asked > (there := launch_registers(self.warpgroups + 1)):
            raise ValueError(f"{self} asks for {asked} registers (one thread of each warpgroup), there are {there}")


def weight_only_reason(
    tiling: WeightOnly, problem: Problem, *, by_block: bool = False, out_bytes: int = 2
) -> str | None:
    """Why weight_only_sm90 cannot cut the problem so; None if it can.

    by_block: scales multiply the sums of their blocks of K. out_bytes: of an element of the result.
    """
    rows, deep, tokens = WGMMA_ROWS * tiling.warpgroups, tiling.depth * tiling.shares, tiling.tokens
    accumulators = tokens // 2 * (2 if by_block else 1)
    if tiling.depth not in (WGMMA_ROWS, BLOCK) or (by_block and tiling.depth != BLOCK):
        return f"stages of {tiling.depth}: {BLOCK}{'' if by_block else f' or {WGMMA_ROWS}'}"
    if problem.n % rows or problem.k % deep:
        return f"weights [{problem.n}, {problem.k}] are no multiples of [{rows}, {deep}]"
    if tokens % 8 or tokens > MOST_COLUMNS:
        return f"{tokens} tokens: a multiple of 8, at most {MOST_COLUMNS}"
    if accumulators + OTHER_REGISTERS > tiling.registers:
        return f"{accumulators} registers of sums of {tiling.registers}: {OTHER_REGISTERS} are for others"
    if tiling.shares > MOST_SHARES:
        return f"a cluster of {tiling.shares}: at most {MOST_SHARES}"
    shared = tiling.stages * _stage(tiling) + _behind(tiling, out_bytes)
    if tiling.stages < 2 or shared > SHARED_BYTES:
        return f"{shared} bytes of shared memory in {tiling.stages} stages: there are {SHARED_BYTES}, and 2 at least"
    return None


def weight_only_tilings(problem: Problem, fits: Callable[[WeightOnly], bool], out_bytes: int = 2) -> list[WeightOnly]:
    """Those that fit, with as many stages as shared memory holds; the one with the fewest cycles, nearly, first."""
    least = -(-problem.m // problem.experts // 8) * 8
    tokens = sorted({min(least, most) for most in (8, 16, 32, 64, 128, 256)})
    found = []
    for columns, (warpgroups, registers), shares in itertools.product(tokens, CONSUMERS.items(), (1, 2, 4, 8)):
        depth = WGMMA_ROWS if columns > BLOCK or problem.k % BLOCK else BLOCK
        tiling = WeightOnly(columns, warpgroups, depth, 2, registers, shares)
        stages = min(16, (SHARED_BYTES - _behind(tiling, out_bytes)) // _stage(tiling))
        found.append(WeightOnly(columns, warpgroups, depth, max(1, stages), registers, shares))
    return sorted(filter(fits, found), key=lambda tiling: _cycles(tiling, problem))


def _stage(tiling: WeightOnly) -> int:
    return tiling.depth * (WGMMA_ROWS * tiling.warpgroups + 2 * tiling.tokens)


def _behind(tiling: WeightOnly, out_bytes: int) -> int:
    """Bytes of shared memory for results and what the shares send."""
    results = WGMMA_ROWS * tiling.warpgroups * tiling.tokens
    return results * (out_bytes + (4 * tiling.shares if tiling.shares > 1 else 0))


def _cycles(tiling: WeightOnly, problem: Problem) -> float:
    rows, tokens = WGMMA_ROWS * tiling.warpgroups, tiling.tokens
    tiles = problem.experts * -(-problem.m // problem.experts // tokens) * (problem.n // rows)
    at_once = max(1, H100_SMS // tiling.shares)
    multiplying, converting = 4 * tokens * tiling.warpgroups, CONVERTING * tiling.warpgroups
    moving = BLOCK * (rows + 2 * tokens) / BYTES_A_CYCLE
    blocks = problem.k / BLOCK / tiling.shares
    extra = BEGINNING + (EXCHANGING if tiling.shares > 1 else 0)
    return -(-tiles // at_once) * (blocks * max(multiplying, converting, moving) + extra)
