"""Sparse decode attention whose entries stay FP8 in shared memory."""
