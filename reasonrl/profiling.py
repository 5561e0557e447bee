"""Where the time goes: seconds per stage of a step, and traces for a profiler."""

from __future__ import annotations

import contextlib
import time

import jax


@contextlib.contextmanager
def timed(tally, name: str):
  """Adds the seconds within to tally['timing/<name>_s'], and gives a profiler their name."""
  start = time.monotonic()
  with jax.profiler.TraceAnnotation(name):
    yield
  key = f'timing/{name}_s'
  tally[key] = tally.get(key, 0.0) + time.monotonic() - start


@contextlib.contextmanager
def trace(folder):
  """Profiles what happens within, on the first process."""
  if jax.process_index() > 0:
    yield
    return
  with jax.profiler.trace(folder, create_perfetto_trace=True):
    yield
