"""`python -m pallas_kernels.bench`: checks every kernel, then times it beside XLA and the peer, in one run."""
