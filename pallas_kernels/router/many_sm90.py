"""Routing of many tokens on Hopper: logits by one product of XLA's, then two launches.

1. A float32 matrix is the exact sum of three of bfloat16, which one product multiplies by the tokens, with float32
   sums.
2. `choose`: a warp has a token. It adds the three terms, scores them, takes the k best, weighs them, and counts them
   among its tile's; a thread block has a tile of neighbouring tokens, 16 at a time (choose_sm90.py).
3. `order`: a thread block adds up which rows sort before its tile's, by expert and by tile, and numbers these row by
   row (order_sm90.py).

Bound: 6 E N D FLOPs of bfloat16 / 989 TFLOP/s, 26 us for 4096 tokens of V4-Flash. An H200 takes 52, 512
tokens 20; within a layer 36.5 for the product, 4.5 to make the terms, 7.5 to choose and 5.4 to sort.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.router import choose_sm90, order_sm90
from pallas_kernels.router.reference import Routing
from pallas_kernels.router.tiling import padded_experts, tiles
from pallas_kernels.router.token_sm90 import Rules, filled_up
from pallas_kernels.router.token_warps_sm90 import TOKENS

UPPER = np.uint32(0xFFFF0000)


def router(x: jax.Array, weight: jax.Array, bias: jax.Array | None, experts: jax.Array | None, rules: Rules) -> Routing:
    """`reference.router` of x [N, D] bfloat16 and weight [E, D] float32 or bfloat16; sm90.py has the limits."""
    (tokens, _), exist = x.shape, len(weight)
    weight, bias = filled_up(weight, bias, padded_experts(exist))
    cut, padding = tiles(tokens), ((0, -tokens % TOKENS), (0, 0))
    given = None if experts is None else jnp.pad(experts, padding)
    logits = products(jnp.pad(x, padding), weight)
    *chosen, counts = choose_sm90.choose(logits, bias, given, tokens, exist, rules, cut)
    experts, weights, scores = (of_all[:tokens] for of_all in chosen)
    order, counts = order_sm90.order(experts, counts, cut.tokens * rules.k)
    return Routing(experts, weights, scores[:, :exist], counts[:exist], order)


def products(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 [N, terms * E]: their sum over the terms is x @ weight.T."""
    terms = [weight] if weight.dtype == jnp.bfloat16 else terms_of(weight)
    return lax.dot_general(x, jnp.concatenate(terms), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def terms_of(weight: jax.Array) -> list[jax.Array]:
    """Three bfloat16 terms of float32: the upper 16 bits of a number, those of what they leave, and the rest."""
    found = []
    for _ in range(3):
        upper = lax.bitcast_convert_type(lax.bitcast_convert_type(weight, jnp.uint32) & UPPER, jnp.float32)
        found.append(upper.astype(jnp.bfloat16))
        weight = weight - upper
    return found
