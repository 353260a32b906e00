"""Token compression: blocks of m tokens pooled into one cache entry."""

from pallas_kernels.compress.api import CompressorState, Entries, compress, compress_into, initial_state

__all__ = ["CompressorState", "Entries", "compress", "compress_into", "initial_state"]
