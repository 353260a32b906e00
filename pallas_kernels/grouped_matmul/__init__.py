"""Expert layers: rows sorted by expert, one weight matrix an expert."""

from pallas_kernels.grouped_matmul.api import expert_down, expert_gate_up

__all__ = ["expert_down", "expert_gate_up"]
