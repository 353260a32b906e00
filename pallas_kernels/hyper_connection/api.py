"""The three pieces of mHC: before a sub-layer, behind it, and at the end of the model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.hyper_connection import reference, sm90
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.operands import require_floats, require_shape
from pallas_kernels.quant import QuantTensor
from pallas_kernels.typing import typed

PRE = Op(
    "hyper_connection_pre",
    [kernel(sm90.pre, sm90.pre_unsupported), reference_candidate(reference.pre)],
)
POST = Op(
    "hyper_connection_post",
    [kernel(sm90.post, sm90.post_unsupported), reference_candidate(reference.post)],
)
HEAD = Op("hyper_connection_head", [reference_candidate(reference.head)])


def require_alike(streams: Any, fn: Any, base: Any, scale: Any, norm_weight: Any, iterations: int) -> None:
    """Raises TypeError or ValueError, naming the operand of `pre` that does not fit: kernels read by address."""
    *_, n, width = _require_streams(streams)
    require_floats(fn=fn, base=base, scale=scale, norm_weight=norm_weight)
    why = f"streams have shape {tuple(streams.shape)}"
    require_shape("fn", fn, ((2 + n) * n, n * width), why)
    require_shape("base", base, ((2 + n) * n,), why)
    require_shape("scale", scale, (3,), "one for each of pre, post and comb")
    require_shape("norm_weight", norm_weight, (width,), why)
    if iterations < 1:
        raise ValueError(f"iterations are {iterations}: of Sinkhorn, 1 and more")


def _require_streams(streams: Any) -> tuple[int, ...]:
    require_floats(streams=streams)
    if streams.ndim < 2:
        raise ValueError(f"streams have shape {tuple(streams.shape)}: [..., n, D]")
    return tuple(streams.shape)


@typed
def pre(
    streams: Float[Array, "*rows n D"],
    fn: Float[Array, "mix nD"],
    base: Float[Array, " mix"],
    scale: Float[Array, 3],
    norm_weight: Float[Array, " D"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    implementation: str = "auto",
) -> tuple[Float[Array, "*rows D"], Mix]:
    """The normed sub-layer input and the coefficients that `post` needs; mix = (2 + n) * n.

    Coefficients and sums are float32; the input comes back in the streams' dtype. iterations: of Sinkhorn, 1 and more.
    Raises TypeError for operands that are no arrays of floats, ValueError where their shapes do not fit.
    """
    require_alike(streams, fn, base, scale, norm_weight, iterations)
    return PRE(
        streams, fn, base, scale, norm_weight,
        iterations=iterations, eps=eps, norm_eps=norm_eps, implementation=implementation,
    )  # fmt: skip


@typed
def pre_quantize_rows(
    streams: Float[Array, "*rows n D"],
    fn: Float[Array, "mix nD"],
    base: Float[Array, " mix"],
    scale: Float[Array, 3],
    norm_weight: Float[Array, " D"],
    form: QuantFormat = FP8_GROUP,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    implementation: str = "auto",
) -> tuple[Float[Array, "*rows D"], QuantTensor, Mix]:
    """`pre`, and its x as the products behind it take it: `quantize(x)` in `form`, [rows, D], bit for bit."""
    require_alike(streams, fn, base, scale, norm_weight, iterations)
    x, mix, codes = PRE(
        streams, fn, base, scale, norm_weight,
        iterations=iterations, eps=eps, norm_eps=norm_eps, form=form, implementation=implementation,
    )  # fmt: skip
    return x, codes, mix


@typed
def post(
    streams: Float[Array, "*rows n D"], out: Float[Array, "*rows D"], mix: Mix, *, implementation: str = "auto"
) -> Float[Array, "*rows n D"]:
    """New stream j = post_j * out + sum_i comb[i, j] * stream_i, summed in float32, in the streams' dtype.

    Raises TypeError for operands that are no arrays of floats, ValueError where their shapes do not fit.
    """
    if not isinstance(mix, Mix):
        raise TypeError(f"mix is a {type(mix).__name__}: the Mix that `pre` gives")
    *rows, n, width = _require_streams(streams)
    require_floats(out=out, post=mix.post, comb=mix.comb)
    why = f"streams have shape {tuple(streams.shape)}"
    require_shape("out", out, (*rows, width), why)
    require_shape("mix.post", mix.post, (*rows, n), why)
    require_shape("mix.comb", mix.comb, (*rows, n, n), why)
    return POST(streams, out, mix, implementation=implementation)


@typed
def head(
    streams: Float[Array, "*rows n D"],
    fn: Float[Array, "n nD"],
    base: Float[Array, " n"],
    scale: Float[Array, 1],
    *,
    eps: float,
    norm_eps: float,
    implementation: str = "auto",
) -> Float[Array, "*rows D"]:
    """Collapses the streams by `pre` coefficients alone; the model's last norm follows. Errors: as in `pre`."""
    *_, n, width = _require_streams(streams)
    require_floats(fn=fn, base=base, scale=scale)
    why = f"streams have shape {tuple(streams.shape)}"
    require_shape("fn", fn, (n, n * width), why)
    require_shape("base", base, (n,), why)
    require_shape("scale", scale, (1,), "one for all coefficients")
    return HEAD(streams, fn, base, scale, eps=eps, norm_eps=norm_eps, implementation=implementation)
