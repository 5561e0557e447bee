"""The fused loss on meshes: values, gradients, and what crosses between devices."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from reasonrl import ops, sharding, types
from reasonrl.kernels import policy_loss, self_attention
from reasonrl.kernels.policy_loss import pallas_gpu, pallas_tpu

M, D, V = 32, 16, 37  # V: odd, so that no mesh divides it
FORM = (1.0, 5.0, 0.7, jnp.dtype('float32'))
MESHES = {'111': (1, 1, 1), '811': (8, 1, 1), '181': (1, 8, 1), '118': (1, 1, 8), '222': (2, 2, 2)}


def fn(logp, entropy, aux):
  return aux['weight'] * (jnp.exp(logp) - 0.3 * entropy**2), {'entropy': entropy}


def make(V=V):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  targets = rng.integers(5, V, M)
  # The second half of the ids is another device's wherever the vocabulary is split.
  kept = np.where(np.arange(M)[:, None] % 3, np.stack([targets, targets - 1, targets // 2], 1), -1)
  support = {
    'kept': jnp.asarray(kept, jnp.int32),
    'barred': jnp.asarray(np.stack([np.arange(M) % 5, np.full(M, -1)], 1), jnp.int32),
    'plain': jnp.arange(M) % 2.0,
  }
  bias = jnp.zeros(V).at[1].set(-1e9)
  return (
    *(normal(M, D), normal(V, D), bias, jnp.asarray(targets, jnp.int32)),
    *(support, {'weight': normal(M)}, normal(V, D)),
  )


@functools.cache
def run(mesh, names=('barred', 'kept', 'plain'), backend='xla'):
  """Scores, loss, metrics and both gradients on a mesh."""
  mesh = sharding.make_mesh(*MESHES[mesh])
  hidden, head, bias, targets, support, aux, start = make()
  support = {name: support[name] for name in names}
  spec = ops.loss_spec(backend, 2 if backend == 'xla' else 512, FORM, support, D, mesh)
  args = (hidden, head, bias, targets, support)
  scores = jax.jit(functools.partial(ops.token_logps, spec=spec, mesh=mesh))(*args)
  step = functools.partial(ops.policy_loss_and_grads, fn=fn, spec=spec, mesh=mesh)
  return jax.device_get((scores, jax.jit(step)(*args, aux, dhead_VD=start)))


@pytest.mark.parametrize('mesh', list(MESHES)[1:])
def test_every_mesh_computes_the_same(mesh):
  for a, b in zip(jax.tree.leaves(run(mesh)), jax.tree.leaves(run('111')), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_the_gpu_kernel_on_a_mesh(monkeypatch):
  monkeypatch.setattr(pallas_gpu, 'INTERPRET', True)
  got, want = run('222', ('plain',), 'pallas_gpu'), run('111', ('plain',))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('mesh', ['118', '222'])
def test_the_kernel_on_a_mesh(mesh, monkeypatch):
  monkeypatch.setattr(pallas_tpu, 'INTERPRET', pltpu.InterpretParams(detect_races=True))
  got, want = run(mesh, ('plain',), 'pallas_tpu'), run('111', ('plain',))
  assert not interpret_pallas_call.races.races_found
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def collectives(program: str) -> list[tuple[str, list[tuple[int, ...]]]]:
  """(operation, shapes of its results) for all communication of a compiled program."""
  found = []
  for line in program.splitlines():
    match = re.search(r'= (.*?) (all-\w+|reduce-scatter|collective-permute)\(', line)
    if match and not re.search(r'replica_groups={{\d+}', line):  # a device alone says nothing
      shapes = re.findall(r'[a-z]\w*\[([\d,]*)\]', match[1])
      found.append((match[2], [tuple(int(n) for n in s.split(',') if n) for s in shapes]))
  return found


@pytest.mark.parametrize('rows', [16, 4])
def test_what_crosses_between_devices(rows):
  """Vocabulary over 4, head over fsdp 2, tokens over 2 chunks or 8: numbers per token while
  scoring, the hidden states' gradient once, the head gathered once and its gradient scattered
  once, whatever the number of chunks."""
  mesh, vocab = sharding.make_mesh(1, 2, 4), 64
  hidden, head, bias, targets, _, aux, start = make(vocab)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  args = (put(hidden, types.ROWS), put(head, ops.HEAD), put(bias, ops.VOCABULARY))
  args = (*args, put(targets, types.ROWS), {})
  spec = ops.loss_spec('xla', rows, FORM, {}, D, mesh)
  score = jax.jit(functools.partial(ops.token_logps, spec=spec, mesh=mesh))
  found = collectives(score.lower(*args).compile().as_text())
  gathers = [shapes for op, shapes in found if op == 'all-gather']
  assert gathers == [[(vocab // 4, D)]]
  reductions = [shapes for op, shapes in found if op == 'all-reduce']
  assert len(reductions) + len(gathers) == len(found)
  assert 2 <= len(reductions) <= 5  # the maximum; total, moment and the target's logit
  assert all(shape == (rows,) for shapes in reductions for shape in shapes)

  step = functools.partial(ops.policy_loss_and_grads, fn=fn, spec=spec, mesh=mesh)
  aux, buffer = put(aux, types.ROWS), put(start, ops.HEAD)
  found = collectives(jax.jit(step).lower(*args, aux, dhead_VD=buffer).compile().as_text())
  large = [(op, shapes) for op, shapes in found if any(len(shape) > 1 for shape in shapes)]
  by_op = {op: [s for o, s in large if o == op] for op, _ in large}
  assert by_op.pop('all-gather') == [[(vocab // 4, D)]]
  assert by_op.pop('all-reduce') == [[(M // 2, D)]]  # of the hidden states, over tensor
  assert by_op.pop('reduce-scatter') == [[(vocab // 8, D)]]
  assert not by_op


class Device:
  """What `loss_spec` looks at."""

  def __init__(self, platform, device_kind, **more):
    self.platform, self.device_kind = platform, device_kind
    vars(self).update(more)


@pytest.mark.parametrize(
  'device, support, width, backend, rows',
  [
    (Device('cpu', 'cpu'), {}, 2048, 'xla', 512),
    (Device('tpu', 'TPU v5 lite'), {}, 2048, 'pallas_tpu', 2048),
    (Device('tpu', 'TPU v6 lite'), {'plain': 0}, 2048, 'pallas_tpu', 2048),
    (Device('tpu', 'TPU v6 lite'), {'plain': 0, 'barred': 0}, 2048, 'xla', 2048),
    (Device('tpu', 'TPU v6 lite'), {}, 16384, 'xla', 2048),  # does not fit on-chip memory
    (Device('tpu', 'TPU v4'), {}, 2048, 'xla', 2048),
    (Device('gpu', 'NVIDIA H100', compute_capability='9.0'), {}, 2048, 'pallas_gpu', 4096),
    (Device('gpu', 'NVIDIA A100', compute_capability='8.0'), {}, 2048, 'xla', 4096),
    (Device('gpu', 'AMD', compute_capability='gfx942'), {}, 2048, 'xla', 4096),
    (Device('METAL', 'Metal'), {}, 2048, 'xla', 4096),
  ],
)
def test_auto_takes_the_kernel_of_the_chip(device, support, width, backend, rows):
  class Mesh:
    devices = np.array([device])
    shape = {'data': 1, 'fsdp': 1, 'tensor': 1}

  spec = ops.loss_spec('auto', 0, FORM, support, width, Mesh)
  assert spec == policy_loss.Spec(FORM, rows, backend, None)
  assert ops.loss_spec('pallas_gpu', 7, FORM, support, width, Mesh)[1:3] == (7, 'pallas_gpu')


@pytest.mark.parametrize(
  'device, dtype, C, softcap, backend',
  [
    (Device('cpu', 'cpu'), 'bfloat16', 64, None, 'xla'),
    (Device('tpu', 'TPU v4'), 'bfloat16', 64, 5.0, 'splash'),
    (Device('tpu', 'TPU v4'), 'float32', 64, None, 'xla'),  # splash multiplies in less
    (Device('gpu', 'H100', compute_capability='9.0'), 'bfloat16', 128, None, 'cudnn'),
    (Device('gpu', 'B200', compute_capability='10.0'), 'bfloat16', 64, None, 'cudnn'),
    (Device('gpu', 'H100', compute_capability='9.0'), 'float32', 128, None, 'xla'),
    (Device('gpu', 'H100', compute_capability='9.0'), 'bfloat16', 256, None, 'xla'),
    (Device('gpu', 'H100', compute_capability='9.0'), 'bfloat16', 64, 5.0, 'xla'),
    (Device('gpu', 'T4', compute_capability='7.5'), 'bfloat16', 64, None, 'xla'),
    (Device('gpu', 'AMD', compute_capability='gfx942'), 'bfloat16', 64, None, 'xla'),
  ],
)
def test_attention_takes_the_kernel_of_the_chip(device, dtype, C, softcap, backend):
  assert ops.attention_backend(device, jnp.zeros((1, 1, 1, C), dtype), softcap) == backend
  assert ops.shares_prefixes(device, dtype) == (backend != 'splash')


@pytest.mark.parametrize(
  'device, C, tensor, backend',
  [
    (Device('gpu', 'H100', compute_capability='9.0'), 128, 1, 'pallas_gpu'),
    (Device('gpu', 'H100', compute_capability='9.0'), 128, 2, 'xla'),
    (Device('gpu', 'H100', compute_capability='9.0'), 80, 1, 'xla'),
    (Device('gpu', 'H100', compute_capability='9.0'), 256, 1, 'xla'),
    (Device('gpu', 'A100', compute_capability='8.0'), 128, 1, 'xla'),
    (Device('gpu', 'AMD', compute_capability='gfx942'), 128, 1, 'xla'),
    (Device('tpu', 'TPU v5 lite'), 128, 1, 'xla'),
    (Device('cpu', 'cpu'), 64, 1, 'xla'),
  ],
)
def test_decoding_takes_the_kernel_of_the_chip(device, C, tensor, backend):
  assert ops.decode_backend(device, C, tensor) == backend


@pytest.mark.parametrize('K', [1, 2])
def test_the_attention_kernel_on_a_mesh(K, monkeypatch):
  """Rows over data and fsdp, heads over tensor where it divides the key heads (K = 2)."""
  monkeypatch.setattr(self_attention, 'INTERPRET', True)
  monkeypatch.setattr(ops, 'attention_backend', lambda *_: 'splash')
  rng = np.random.default_rng(0)
  make = lambda heads: jnp.asarray(rng.normal(size=(4, heads, 32, 16)), jnp.float32)
  qkv, segments = (make(4), make(K), make(K)), jnp.asarray(rng.integers(1, 3, (4, 32)))
  segments = jnp.sort(segments, axis=1)
  weights = make(4)

  def value_and_grads(mesh):
    packed = ops.Packed(segments, None, jnp.zeros_like(segments))
    loss = lambda *qkv: (ops.self_attention(*qkv, packed, None, 0.25, None, mesh) * weights).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv)

  want = value_and_grads(None)
  for a, b in zip(
    *map(jax.tree.leaves, (value_and_grads(sharding.make_mesh(2, 2, 2)), want)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
