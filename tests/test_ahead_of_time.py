"""What the compilers for TPU v5e, v6e and H100 say of the programs: python -m pytest -m aot

They come with the extras `tpu-aot` and `gpu-aot` and need no device; Python 3.12, JAX 0.11.2.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reasonrl import learner, ops, optim, sampling, sharding, types
from reasonrl.configs import common
from reasonrl.experiments import ahead_of_time
from reasonrl.kernels.policy_loss import pallas_tpu
from reasonrl.models import decoder

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def without_cache():
  """The cache of compiled programs wants the device that they are for."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', before)


@functools.cache
def bench(what='policy_loss'):
  """experiments/bench/<what>/ahead_of_time.py."""
  path = ROOT / f'experiments/bench/{what}/ahead_of_time.py'
  spec = importlib.util.spec_from_file_location(f'{what}_ahead_of_time', path)
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


@CHIPS
@pytest.mark.parametrize('D, dtype', [(576, 'bfloat16'), (576, 'float32'), (8192, 'bfloat16')])
def test_softcap_bias_and_texts_at_other_widths(chip, D, dtype):
  """Widths that are no power of two, float32, and one whose tiles are half as high."""
  needs(chip)
  mesh = Mesh(np.array(ahead_of_time.devices(chip)[:1]).reshape(1, 1, 1), types.MESH_AXES)
  M, V, dtype = 600, 3000, jnp.dtype(dtype)
  replicated = NamedSharding(mesh, PartitionSpec())
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
  numbers = functools.partial(array, jnp.float32)
  spec = ops.loss_spec('auto', 0, (0.5, 30.0, 0.7, dtype), {'plain': 0}, D, mesh)
  assert spec.backend == bench().BACKEND[chip]
  args = (array(dtype, M, D), array(dtype, V, D), numbers(V), array(jnp.int32, M))
  args = (*args, {'plain': numbers(M)})
  score = functools.partial(ops.token_logps, spec=spec, mesh=mesh)
  ahead_of_time.compiled(score, args, mesh)
  aux = {name: numbers(M) for name in ('old_logp', 'adv', 'weight')}

  def gradient(*args):
    return ops.policy_loss_and_grads(*args[:-1], bench().clipped, spec, mesh, args[-1])

  ahead_of_time.compiled(gradient, (*args, aux, numbers(V, D)), mesh)


@pytest.mark.parametrize('chip, least', [('v5e', 0.90), ('v6e', 0.75)])
def test_the_matrix_units_are_busy(chip, least):
  """At width 2048 and 151,936 words; and what is moved is little more than W, its gradient and the
  logits, in memory on the chip that it has."""
  needs(chip)
  V, D = bench().VOCABULARY, 2048
  score = bench().run(chip, 'score', 'kernel', D, V)
  assert score['mxu']['forward'] >= least
  reads = 2 * V * D * score['rows'] / pallas_tpu.BLOCKS[0]  # W once per block of rows, bfloat16
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


@pytest.mark.parametrize('shape', [(2, 1, 2), (1, 2, 2)], ids=str)
def test_the_update_of_a_model_on_four_chips(shape):
  """Both kernels are in the learner's programs and in the sampler's prefill, on meshes with data,
  fsdp and tensor axes, and nothing is as large as the scores of attention, [B, H, T, T]."""
  needs('v5e')
  devices = np.array(ahead_of_time.devices('v5e')).reshape(shape)
  mesh = Mesh(devices, types.MESH_AXES)
  config = common.model('smollm2_135m')
  config.update(num_layers=2, compute_dtype='bfloat16')  # the second reads what the first saw
  fields = {k: v for k, v in config.items() if k not in ('kind', 'weights')}
  model = decoder.Decoder(**fields)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  sampler = sampling.Sampler(model, mesh, (0,), **common.sampler())
  student = learner.Learner(
    model=model,
    mesh=mesh,
    tx=optim.build(optim.Optim(**common.optim(1e-5).to_dict()), shapes, 10),
    ema_decay=None,
    terms=(learner.Term(learner.nll, None, 'weight'),),
    form=sampler.form(1.0),
    forbidden=(0,),
    loss_backend='auto',
    loss_chunk=0,
  )
  B, T, rows = 8, 2048, NamedSharding(mesh, types.ROWS)
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
  weight = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=rows)
  row = array(B, T)
  batch = types.Batch(row, row, row, None, row, row, {'weight': weight})  # as on TPUs
  params = student.abstract().params
  one = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
  programs = {
    'update': lambda: learner.Learner.accumulate.lower(student, params, params, batch, (one,)),
    'score': lambda: learner.Learner.score.lower(student, params, batch),
    'prefill': lambda: sampling.Sampler.prefill.lower(sampler, params, array(B, T), array(B), T),
  }
  kernels = {
    'update': {'splash_mqa_fwd', 'splash_mqa_dq', 'splash_mqa_dkv', *LOSS},
    'score': {'splash_mqa_fwd', 'policy_loss_forward'},
    'prefill': {'splash_mqa_fwd'},
  }
  for name, lower in programs.items():
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      executable = lower().compile()
    text = executable.as_text()
    found = set(re.findall(r'%(splash_mqa_(?:fwd|dq|dkv)|policy_loss_(?:forward|backward))', text))
    assert found == kernels[name]
    local = B // (shape[0] * shape[1]) * T * T  # the scores of one head
    assert max(ahead_of_time.arrays(executable).values()) < config.num_heads * local


LOSS = ('policy_loss_forward', 'policy_loss_backward')


@pytest.mark.parametrize('cache_dtype', ['auto', 'int8'])
def test_a_step_reads_weights_and_caches_once(cache_dtype):
  """And nothing else is as large; the caches are written in place."""
  needs('v5e')
  of = bench('sampler').case('v5e', cache_dtype=cache_dtype)
  executable, caches = bench('sampler').steps(of)
  read = bench('sampler').bytes_of(of.params) + caches
  assert 0.98 * read < ahead_of_time.traffic(executable) < 1.05 * read
  memory = executable.memory_analysis()
  assert memory.alias_size_in_bytes > 0.95 * caches  # but for the prompts', which are only read
  assert memory.temp_size_in_bytes < 0.05 * read


@pytest.mark.parametrize('cache_dtype', ['auto', 'int8'])
def test_a_step_on_a_gpu_writes_no_scores(cache_dtype):
  needs('h100')
  of = bench('sampler').case('h100', 2, cache_dtype=cache_dtype)
  executable, caches = bench('sampler').steps(of)
  memory = executable.memory_analysis()
  assert memory.alias_size_in_bytes > 0.95 * caches
  found, rows = ahead_of_time.arrays(executable), bench('sampler').ROWS
  for slots in (bench('sampler').NEW, bench('sampler').PROMPT):
    of_slots = [n for shape, n in found.items() if shape.endswith(f',{slots}')]
    assert max(of_slots) < rows * of.sampler.model.num_heads * slots
  # Of two layers, each with a cache of its own and a shared one.
  assert executable.as_text().count('name = "decode_attention"') == 4


@pytest.mark.parametrize('C', [16, 64, 128])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize(
  'T, softcap, quantised', [(1, None, False), (3, 5.0, False), (1, None, True)]
)
def test_the_gpu_kernel_fits_the_chip(C, dtype, T, softcap, quantised):
  """Many rows that share a cache, so that its tiles are as large as they get."""
  needs('h100')
  mesh = Mesh(np.array(ahead_of_time.devices('h100')[:1]).reshape(1, 1, 1), types.MESH_AXES)
  whole, (B, Q, H, K, S, P) = NamedSharding(mesh, PartitionSpec()), (64, 4, 8, 2, 1000, 70)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)

  def stored(rows, slots):
    values = array('int8' if quantised else dtype, rows, K, slots, C)
    return ops.Stored(values, array('float32', rows, K, 1, slots) if quantised else None)

  args = [array(dtype, B, heads, T, C) for heads in (H, K, K)]
  args += [(stored(B, S), stored(B, S)), (stored(Q, P), stored(Q, P))]
  args += [array(bool, B, T, n) for n in (T, S, P)]
  attend = lambda *args: ops.decode_attention(*args, C**-0.5, softcap, mesh)
  text = ahead_of_time.compiled(attend, args, mesh).as_text()
  assert text.count('name = "decode_attention"') == 2


@pytest.mark.parametrize(('segment', 'limit'), [(2048, 1.1), (128, 1.6)])
def test_the_whole_program_holds_its_caches_and_little_else(segment, limit):
  """Where a segment becomes its double there is both, 1.5 of the last."""
  needs('v5e')
  of = bench('sampler').case('v5e', 4, segment=segment, buckets=1)
  executable, caches = bench('sampler').program(of, 64, 0)
  assert executable.memory_analysis().temp_size_in_bytes < limit * caches


def test_what_is_missing_is_said(monkeypatch):
  monkeypatch.setattr(jax, '__version_info__', (0, 10, 2))
  assert 'needs JAX 0.11.2 or newer' in ahead_of_time.missing('v5e')
  monkeypatch.setattr(jax, '__version_info__', (0, 11, 2))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert ahead_of_time.missing('h100') == (
    "no jax_plugins.xla_cuda12: pip install 'reasonrl[gpu-aot]'"
  )
  assert "pip install 'reasonrl[tpu-aot]'" in ahead_of_time.missing('v6e')
