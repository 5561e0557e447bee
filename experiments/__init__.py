"""Runs that support a claim, and the programs that made their numbers."""
