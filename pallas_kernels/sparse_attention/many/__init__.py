"""The kernel for many queries, or many entries of each: see kernel_sm90.py."""
