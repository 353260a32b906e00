"""Activations to E4M3 codes with a scale for every 128 columns, alone or behind RMSNorm."""

from pallas_kernels.quantize_rows.api import quantize_rows, rms_norm_quantize_rows

__all__ = ["quantize_rows", "rms_norm_quantize_rows"]
