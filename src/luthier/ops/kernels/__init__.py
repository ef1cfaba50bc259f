"""Triton kernels. Only the modules of `ops` import these, and only where `ops.capability` allows."""
