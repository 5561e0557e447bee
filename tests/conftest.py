"""Settings of every test: they must be in the environment before anything imports JAX.

Eight virtual CPU devices, errors for implicit rank promotion, and a compilation cache that outlives
the process, which halves the time of the suite. Subprocesses inherit them. What is already set in
the environment wins.
"""

import os
import pathlib
import sys
import tempfile

import pytest

_DEFAULTS = {
  'JAX_PLATFORMS': 'cpu',
  'JAX_NUMPY_RANK_PROMOTION': 'raise',
  'JAX_COMPILATION_CACHE_DIR': str(pathlib.Path(tempfile.gettempdir()) / 'reasonrl-test-cache'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
}
for _name, _value in _DEFAULTS.items():
  os.environ.setdefault(_name, _value)
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  ).strip()


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """A process may map only so much memory in pieces, and every compiled program is some of them."""
  yield
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()
