"""The architecture: Flax modules hold parameters and compose, pure functions (here and in pallas_kernels) do the maths.

Caches are explicit pytrees that go in and come out. Parameters cross every jit, optimiser and checkpoint boundary as a
plain nested dict; `build(config)` gives the static structure and `nnx.merge` puts the two together inside jit.
"""
