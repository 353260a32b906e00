"""Compiled as one program each: op by op, a cast compiles twenty. tests/quant/test_eager.py holds the casts equal."""

import jax

from pallas_kernels import block_matmul, grouped_matmul, quant

quantize = jax.jit(quant.quantize, static_argnums=1)
dequantize = jax.jit(quant.dequantize, static_argnums=1)
round_trip = jax.jit(quant.round_trip, static_argnums=1)
encode_rows = jax.jit(quant.encode_rows, static_argnums=1)
decode_rows = jax.jit(quant.decode_rows, static_argnums=1)
HOW = ("activations", "implementation", "batch_invariant")
matmul = jax.jit(block_matmul.matmul, static_argnames=("out_dtype", *HOW))
experts = jax.jit(grouped_matmul.experts, static_argnames=("limit", *HOW))
