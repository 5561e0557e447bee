"""Kernels, one per file: `x`, its reference `x_ref` and `cases()`. Reached only through reasonrl.ops."""
