"""Casts compiled as one program each: a cast op by op compiles twenty. tests/quant/test_eager.py holds them equal."""

import jax

from pallas_kernels import quant

quantize = jax.jit(quant.quantize, static_argnums=1)
dequantize = jax.jit(quant.dequantize, static_argnums=1)
round_trip = jax.jit(quant.round_trip, static_argnums=1)
encode_rows = jax.jit(quant.encode_rows, static_argnums=1)
decode_rows = jax.jit(quant.decode_rows, static_argnums=1)
