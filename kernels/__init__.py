"""Kernels, one per file: `x`, its reference `x_ref`, `cases()`. Called through reasonrl.ops."""
