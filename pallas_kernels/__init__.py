"""Ops of sparse FP8 decoding: one folder an op, one public function each, a pure-jnp reference that defines it.

`<op>/api.py` is the signature callers use, `reference.py` the definition, `kernel_<device>.py` a fast implementation.
Nothing here knows of dsv4: arrays, shapes and static numbers only.
"""
