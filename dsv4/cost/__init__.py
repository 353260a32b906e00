"""What a model costs, as functions of its config: parameters, weight bytes, cache bytes. Nothing here imports jax."""

from dsv4.cost.cache_bytes import (
    bytes_per_token,
    compressor_state_bytes,
    dense_multihead_bytes_per_token,
    entry_bytes,
    index_key_bytes,
    window_bytes,
)
from dsv4.cost.parameters import ParameterCount, count_parameters, weight_bytes

__all__ = [
    "ParameterCount",
    "bytes_per_token",
    "compressor_state_bytes",
    "count_parameters",
    "dense_multihead_bytes_per_token",
    "entry_bytes",
    "index_key_bytes",
    "weight_bytes",
    "window_bytes",
]
