"""What the Mosaic GPU kernels share: running them in the interpreter, scales as bytes, the shape of a launch."""

from pallas_kernels.mosaic.interpreter import interpreted, is_interpreted
from pallas_kernels.mosaic.launch import sm_count

__all__ = ["interpreted", "is_interpreted", "sm_count"]
