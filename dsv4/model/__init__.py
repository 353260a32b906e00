"""The architecture: Flax modules hold parameters and compose, pure functions (here and in pallas_kernels) do the maths.

Caches are explicit pytrees that go in and come out. Parameters cross every jit, optimiser and checkpoint boundary as a
plain nested dict; `transformer.structure` gives the static part and `transformer.bind` joins the two inside jit.
"""
