"""One line of a benchmark: inputs, who computes on them, and what the hardware allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.tilings import Problem

# Of SXM parts as their data sheets have them, which differ in memory alone.
BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}
FLOPS_PER_SECOND = {"fp8": 1979e12, "bf16": 989e12, "int8": 1979e12}


@dataclass(frozen=True)
class Choice:
    """What a table of tilings says of an implementation: under which kind and problem it keeps which tiling."""

    kind: str
    problem: Problem
    tiling: Any


def disagreement(got: Any, want: Any, relative: float = 3e-3, elementwise: float = 2.0**-8) -> str | None:
    """Why `got` is not `want` by the tolerance of bfloat16 results; None if it is. NaN must be in the same places.

    relative: of the error's rms. elementwise: of the worst element, against its size and the rms of all.
    """
    misplaced, found, expected, far, worst = (float(x) for x in _errors(got, want))
    if misplaced:
        return f"NaN in {found:.0f} places, {expected:.0f} expected"
    if far <= relative and worst <= elementwise:
        return None
    return f"relative error {far:.2e} ({relative:.1e} allowed), worst element {worst:.2e} ({elementwise:.1e} allowed)"


@jax.jit
def _errors(got: Any, want: Any) -> tuple[jax.Array, ...]:
    """On the device, where the results are: NaN in one of the two alone, in each, and both errors of the rest."""
    got, want = jnp.asarray(got, jnp.float32), jnp.asarray(want, jnp.float32)
    of_got, of_want = jnp.isnan(got), jnp.isnan(want)
    error, size = jnp.abs(got - want), jnp.abs(want)
    rms = jnp.maximum(_rms(size, ~of_want), jnp.finfo(jnp.float32).tiny)
    worst = jnp.max(error / (size + rms), where=~of_want, initial=0)
    return jnp.sum(of_got != of_want), jnp.sum(of_got), jnp.sum(of_want), _rms(error, ~of_want) / rms, worst


def _rms(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), where=where))


@dataclass(frozen=True)
class Bench:
    """inputs: key -> one input set. ours, xla: implementations by name, each taking an input set.

    shared: key -> what is large and made once; an input set is then the pair (inputs(key), shared).
    reference: the result of an input set in float32, or a part of it: `part` cuts the same from a result, whose rows
    behind the reference's are padding. judge: (result, reference) -> what is wrong, or None.
    in_place: implementations replace what an input set holds, so that results are checked on sets not used before.
    choices: what the table of tilings calls those of `ours` that it may hold. chosen: the name of the one that it
    gives for this case, which is timed unless all are (None: the first).
    nbytes: each operand once. peer: the name the peer's adapter knows this shape by.
    """

    op: str
    name: str
    inputs: Callable[[jax.Array], Any]
    ours: dict[str, Callable[[Any], Any]]
    xla: dict[str, Callable[[Any], Any]]
    reference: Callable[[Any], Any]
    nbytes: int
    flops: int
    unit: str = "fp8"
    peer: tuple[Any, ...] | None = None
    shape: dict[str, int] = field(default_factory=dict)
    shared: Callable[[jax.Array], Any] | None = None
    part: Callable[[Any], Any] = lambda result: result
    judge: Callable[[Any, Any], str | None] = disagreement
    in_place: bool = False
    choices: dict[str, Choice] = field(default_factory=dict)
    chosen: str | None = None

    @property
    def usual(self) -> str | None:
        """The name of the implementation that is timed unless all are; None where no kernel takes the case."""
        return self.chosen or next(iter(self.ours), None)

    @property
    def limit(self) -> float:
        """Microseconds below which no implementation can be: bytes over bandwidth, or FLOPs over the unit's rate."""
        return max(self._seconds.values()) * 1e6

    @property
    def bound(self) -> str:
        """Which of the two sets the limit: bytes or flops."""
        return max(self._seconds, key=self._seconds.__getitem__)

    @property
    def _seconds(self) -> dict[str, float]:
        device = jax.devices()[0].device_kind
        bandwidth = next((rate for name, rate in BYTES_PER_SECOND.items() if name in device), BYTES_PER_SECOND["H100"])
        return {"bytes": self.nbytes / bandwidth, "flops": self.flops / FLOPS_PER_SECOND[self.unit]}

    def shapes(self) -> Any:
        """Of an input set."""
        key = jax.random.key(0)
        made = jax.eval_shape(self.inputs, key)
        return made if self.shared is None else (made, jax.eval_shape(self.shared, key))

    def sets(self, count: int) -> list[Any]:
        """Input sets with values of their own, on the device."""
        of_shared, *keys = jax.random.split(jax.random.key(0), count + 1)
        make = jax.jit(self.inputs)
        made = [make(key) for key in keys]
        if self.shared is None:
            return made
        shared = jax.jit(self.shared)(of_shared)
        return [(inputs, shared) for inputs in made]

    def wrong(self, result: Any, want: Any) -> str | None:
        """What is wrong with a result, by the reference's; None if nothing is."""
        part = jax.tree.map(lambda got, of: got[: of.shape[0]], self.part(result), want)
        return self.judge(part, want)
