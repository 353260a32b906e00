"""The three pieces of mHC: before a sub-layer, behind it, and at the end of the model."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.hyper_connection import reference, sm90
from pallas_kernels.hyper_connection.reference import Mix
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

    Coefficients and sums are float32; the input comes back in the streams' dtype.
    """
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
    x, mix, codes = PRE(
        streams, fn, base, scale, norm_weight,
        iterations=iterations, eps=eps, norm_eps=norm_eps, form=form, implementation=implementation,
    )  # fmt: skip
    return x, codes, mix


@typed
def post(
    streams: Float[Array, "*rows n D"], out: Float[Array, "*rows D"], mix: Mix, *, implementation: str = "auto"
) -> Float[Array, "*rows n D"]:
    """New stream j = post_j * out + sum_i comb[i, j] * stream_i, summed in float32, in the streams' dtype."""
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
    """Collapses the streams by `pre` coefficients alone; the model's last norm follows."""
    return HEAD(streams, fn, base, scale, eps=eps, norm_eps=norm_eps, implementation=implementation)
