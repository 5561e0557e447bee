"""What the compilers for TPU v5e, v6e and H100 say of the programs: python -m pytest -m aot

They come with the extras `tpu-aot` and `gpu-aot` and need no device; Python 3.12, JAX 0.11.2.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys

import jax
import pytest

from reasonrl.experiments import ahead_of_time
from reasonrl.kernels.policy_loss import pallas_tpu

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def bench():
  """experiments/bench/policy_loss/ahead_of_time.py."""
  path = ROOT / 'experiments/bench/policy_loss/ahead_of_time.py'
  spec = importlib.util.spec_from_file_location('policy_loss_ahead_of_time', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def needs(chip):
  if ahead_of_time.missing(chip):
    pytest.skip(ahead_of_time.missing(chip))


CHIPS = pytest.mark.parametrize('chip', ['v5e', 'v6e', 'h100'])
D = 1024


@CHIPS
@pytest.mark.parametrize('V', [151936, 128256])
def test_memory_is_one_chunk_of_logits_however_many_tokens(chip, V):
  """Beside the head, its gradient and [M, D]: one [chunk, V] of float32 (on an H100 one more of
  bfloat16, what the platform's products read)."""
  needs(chip)
  found = {}
  for chunks in (2, 4):
    executable, spec, M = bench().program(chip, 'gradient', 'kernel', D, V, chunks)
    words = V + -V % pallas_tpu.TILE
    limit = max(spec.rows * words, V * D, M * D)
    assert limit < M * V
    arrays = ahead_of_time.arrays(executable)
    above = {shape: n for shape, n in arrays.items() if n > limit}
    assert not above, f'larger than {limit} elements: {above}'
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * V * D  # the gradient of the head is added in place
    found[chunks] = memory.temp_size_in_bytes
    logits = spec.rows * words * (6 if chip == 'h100' else 4)
    assert logits <= found[chunks] < 1.02 * logits + 16 * M * D
  assert found[4] - found[2] < 16 * M * D  # not a function of M * V


@CHIPS
@pytest.mark.parametrize('V', [151936, 128256])
def test_scoring_writes_no_logits(chip, V):
  needs(chip)
  for chunks in (2, 4):
    executable, spec, M = bench().program(chip, 'score', 'kernel', D, V, chunks)
    arrays = ahead_of_time.arrays(executable)
    assert max(arrays.values()) == V * D
    assert executable.memory_analysis().temp_size_in_bytes < 16 * M * D + 2**24


@pytest.mark.parametrize('chip, least', [('v5e', 0.90), ('v6e', 0.75)])
def test_the_matrix_units_are_busy(chip, least):
  """At width 2048 and 151,936 words; and what is moved is little more than W, its gradient and the
  logits, in memory on the chip that it has."""
  needs(chip)
  V, D = bench().VOCABULARY, 2048
  score = bench().run(chip, 'score', 'kernel', D, V)
  assert score['mxu']['forward'] >= least
  reads = 2 * V * D * score['rows'] / pallas_tpu.BLOCK  # W once per block of rows, bfloat16
  # A v6e gathers the targets' rows on its SparseCore, for which its cost model counts W twice over.
  gather = 2 * 2 * V * D if chip == 'v6e' else 0
  assert reads <= score['bytes'] - gather < 1.15 * reads
  step = bench().run(chip, 'gradient', 'kernel', D, V)
  assert set(step['mxu']) == {'forward', 'backward'} and min(step['mxu'].values()) >= least
  logits, gradient = 4 * V * step['rows'], 4 * V * D
  moved = reads + 2 * V * D + 2 * logits + 2 * gradient
  assert moved <= step['bytes'] - gather < 1.1 * moved
  assert max(step['vmem'].values()) < pallas_tpu.VMEM


def test_the_products_run_on_the_tensor_cores():
  needs('h100')
  V, D = bench().VOCABULARY, 2048
  assert bench().run('h100', 'score', 'kernel', D, V)['wgmma']['policy_loss_scores'] > 0
  assert bench().run('h100', 'gradient', 'kernel', D, V)['wgmma']['gemm_fusion'] > 0


def test_what_is_missing_is_said(monkeypatch):
  monkeypatch.setattr(jax, '__version_info__', (0, 10, 2))
  assert 'needs JAX 0.11.2 or newer' in ahead_of_time.missing('v5e')
  monkeypatch.setattr(jax, '__version_info__', (0, 11, 2))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert ahead_of_time.missing('h100') == (
    "no jax_plugins.xla_cuda12: pip install 'reasonrl[gpu-aot]'"
  )
  assert "pip install 'reasonrl[tpu-aot]'" in ahead_of_time.missing('v6e')
