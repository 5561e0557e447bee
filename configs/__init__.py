"""Experiments as data: one file per experiment, presets in common.py. Loads without JAX."""
