"""Which implementation of an op runs, and why.

An op lists its candidates, fastest first and the reference last. "auto" takes the first one that does not refuse the
shapes and says, once, what the skipped ones refused; a named implementation runs or raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels import device
from pallas_kernels.mosaic.interpreter import is_interpreted

log = logging.getLogger("pallas_kernels")


class UnsupportedError(ValueError):
    """A named implementation refused the call; the message holds its reason."""


@dataclass(frozen=True)
class Candidate:
    """One implementation. `unsupported_reason` sees the op's arguments and judges shapes, dtypes and device alone."""

    name: str
    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None]


class Op:
    """A named list of candidates; calling it runs one of them."""

    def __init__(self, name: str, candidates: Sequence[Candidate]):
        self.name = name
        self.candidates = tuple(candidates)
        self._said: set[str] = set()
        OPS[name] = self

    def __call__(self, *args: Any, implementation: str = "auto", **kwargs: Any) -> Any:
        """Runs `implementation`: "auto", a candidate's name, or for some ops only, "top_k=reference,router=sm90".

        Raises UnsupportedError with every reason.
        """
        candidate, refusals = self.choose(args, kwargs, implementation)
        self._say(candidate, refusals)
        if listeners := _listeners.get():
            shapes: tuple[Any, Any] = jax.tree.map(_shape, (args, kwargs))
            for calls in listeners:
                calls.append(Call(self, shapes[0], shapes[1], candidate.name, refusals))
        return candidate.run(*args, **kwargs)

    def choose(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], implementation: str = "auto"
    ) -> tuple[Candidate, tuple[str, ...]]:
        """The candidate that takes these arguments, which may be shapes, and `name: reason` of those before it.

        Raises UnsupportedError where there is none.
        """
        implementation = _for_op(self.name, implementation)
        named = [c for c in self.candidates if implementation in ("auto", c.name)]
        if not named:
            known = ", ".join(c.name for c in self.candidates)
            raise UnsupportedError(f"{self.name} has no implementation {implementation!r}: auto, {known}")
        refusals: list[str] = []
        for candidate in named:
            reason = candidate.unsupported_reason(*args, **kwargs)
            if reason is None:
                return candidate, tuple(refusals)
            refusals.append(f"{candidate.name}: {reason}")
        raise UnsupportedError(f"{self.name} cannot run: {'; '.join(refusals)}")

    def _say(self, candidate: Candidate, refusals: tuple[str, ...]) -> None:
        for refusal in refusals:
            said = f"{self.name} on {device.current().name} runs {candidate.name}, not {refusal}"
            if said not in self._said:
                self._said.add(said)
                log.info(said)


OPS: dict[str, Op] = {}  # those whose modules have been imported
NAMES = frozenset(
    "block_matmul block_diagonal_matmul compress experts hyper_connection_pre hyper_connection_post"
    " hyper_connection_head index_scores quantize_rows router sparse_attention sparse_attention_prefill top_k".split()
)


@dataclass(frozen=True)
class Call:
    """One call of an op as a listener sees it. args, kwargs: arrays are ShapeDtypeStructs. refusals: `name: reason`."""

    op: Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ran: str
    refusals: tuple[str, ...]


_listeners: contextvars.ContextVar[tuple[list[Call], ...]] = contextvars.ContextVar("listeners", default=())


@contextlib.contextmanager
def listen() -> Iterator[list[Call]]:
    """Collects every call of every op while the block runs; under jit, those of what is traced in it."""
    calls: list[Call] = []
    token = _listeners.set((*_listeners.get(), calls))
    try:
        yield calls
    finally:
        _listeners.reset(token)


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf


def _for_op(name: str, implementation: str) -> str:
    """What a choice such as "router=sm90,top_k=reference" says of one op; ops it does not list are "auto"."""
    if "=" not in implementation:
        return implementation
    parts = [part.strip() for part in implementation.split(",")]
    if wrong := [part for part in parts if "=" not in part]:
        raise UnsupportedError(f"{wrong[0]!r} in {implementation!r} chooses nothing: write op=name, and commas between")
    choices = {op.strip(): chosen.strip() for op, chosen in (part.split("=", 1) for part in parts)}
    known = NAMES | OPS.keys()
    if unknown := choices.keys() - known:
        raise UnsupportedError(f"no op called {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    return choices.get(name, "auto")


def always(*_args: Any, **_kwargs: Any) -> None:
    """The reference runs everywhere."""
    return None


def kernel(run: Callable[..., Any], unsupported_reason: Callable[..., str | None]) -> Candidate:
    """The candidate of Hopper kernels, "sm90"."""
    return Candidate("sm90", traced_once(run), unsupported_reason)


def traced_once(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as a function of its own in what is compiled, traced and lowered once for all calls of the same shapes.

    A model calls the same kernels in every layer, and Mosaic takes some 0.3 s to lower one.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def traced(where: Any, tree: Any, others: tuple[Any, ...], *arrays: jax.Array) -> Any:
        del where
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(given) if x is _ARRAY else x for x in others])
        return run(*args, **kwargs)

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        others = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
        return traced((device.current(), is_interpreted()), tree, others, *arrays)

    call.clear_cache = traced.clear_cache  # for who changes what `run` does  # pyright: ignore
    return call


_ARRAY = object()  # where an array is among what is known when tracing


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def reference(run: Callable[..., Any]) -> Candidate:
    """The candidate every op ends with."""
    return Candidate("reference", run, always)
