"""Attention within packed rows: every back end against the materialised formula."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl.kernels import self_attention as kernel

CASES = pytest.mark.parametrize('case', kernel.cases(), ids=lambda case: case[0])


@pytest.fixture(autouse=True)
def without_the_device(monkeypatch):
  """Splash attention in the interpreter; cuDNN's arguments given to JAX's own implementation."""
  monkeypatch.setattr(kernel, 'INTERPRET', True)
  monkeypatch.setattr(kernel, 'CUDNN', 'xla')


def make(case, dtype='float32'):
  _, B, H, K, T, C, lengths, window, softcap = case
  rng = np.random.default_rng(0)
  shapes = (B, H, T, C), (B, K, T, C), (B, K, T, C)
  qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  segments, positions = np.zeros((2, B, T), np.int32)  # what is left of a row is padding
  segments[:, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
  positions[:, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
  return *qkv, kernel.Packed(jnp.asarray(segments), None, positions), window, C**-0.5, softcap


def continued(inputs):
  """The same rows, where all segments but the first continue it."""
  segments, _, positions = inputs[3]
  begin = (segments == 1).sum(1, keepdims=True)
  prefixes, later = jnp.where(segments > 0, 1, 0), segments > 1
  positions = jnp.where(later, positions + begin, positions)
  return *inputs[:3], kernel.Packed(segments, prefixes, positions), *inputs[4:]


def run(function, q, k, v, packed, *rest):
  """Output of the real tokens and the gradients of a weighted sum of it."""

  def loss(q, k, v):
    out = function(q, k, v, packed, *rest)
    out = jnp.where(packed.segments[:, None, :, None] > 0, out.astype(jnp.float32), 0.0)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out * weights), out

  step = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  # In bfloat16 the CPU compiler of JAX 0.12.0 gets dq and dk of the interpreted kernel wrong.
  (_, out), grads = (step if q.dtype == jnp.bfloat16 else jax.jit(step))(q, k, v)
  return out, *grads


def on(backend):
  return functools.partial(kernel.self_attention, backend=backend)


@CASES
@pytest.mark.parametrize('backend', ['xla', 'splash'])
def test_equals_the_formula(backend, case):
  inputs = make(case)
  got, want = run(on(backend), *inputs), run(kernel.self_attention_ref, *inputs)
  for g, t in zip(got, want, strict=True):
    assert g.shape == t.shape
    np.testing.assert_allclose(g, t, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('case', kernel.cases()[:3], ids=lambda case: case[0])
@pytest.mark.parametrize('backend', ['xla', 'splash', 'cudnn'])
def test_bfloat16_stays_near_float32(backend, case):
  inputs = make(case, 'bfloat16')
  wide = [x.astype(jnp.float32) for x in inputs[:3]]
  got, want = run(on(backend), *inputs), run(kernel.self_attention_ref, *wide, *inputs[3:])
  for g, t in zip(got, want, strict=True):
    gap = np.linalg.norm(np.float32(g) - np.float32(t)) / np.linalg.norm(np.float32(t))
    assert gap < 0.02


@pytest.mark.parametrize('case', kernel.cases()[1:3], ids=lambda case: case[0])
@pytest.mark.parametrize('backend, dtype', [('xla', 'float32'), ('cudnn', 'bfloat16')])
def test_segments_that_continue_another_are_as_if_it_were_theirs(backend, dtype, case):
  """Every sequence alone in its row, its beginning repeated, gives the same."""
  inputs = continued(make(case, dtype))
  q, k, v, packed, *rest = inputs
  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  want = run(kernel.self_attention_ref, *wide, packed, *rest)
  for g, t in zip(run(on(backend), *inputs), want, strict=True):
    gap = np.linalg.norm(np.float32(g) - np.float32(t)) / np.linalg.norm(np.float32(t))
    assert gap < (1e-5 if dtype == 'float32' else 0.02)
  got = on(backend)(*inputs)
  ids, begin = packed.segments[0], int((packed.segments[0] == 1).sum())
  for segment in range(2, int(ids.max()) + 1):
    at = np.r_[:begin, np.flatnonzero(ids == segment)]
    row = [x[:, :, at].astype(jnp.float32) for x in (q, k, v)]
    ones = jnp.ones((q.shape[0], at.size), jnp.int32)
    alone = kernel.Packed(ones, None, jnp.broadcast_to(jnp.arange(at.size), ones.shape))
    want = kernel.self_attention_ref(*row, alone, *rest)
    gap = np.abs(np.float32(got[:, :, at]) - want).max()
    assert gap < (1e-5 if dtype == 'float32' else 0.02)


def test_blocks_spare_three_eighths_of_the_work(monkeypatch):
  q, k, v, packed, *rest = make(kernel.cases()[-1])

  def operations():
    attend = lambda q, k, v: kernel.self_attention(q, k, v, packed, *rest, 'xla')
    return jax.jit(attend).lower(q, k, v).cost_analysis()['flops']

  four = operations()
  monkeypatch.setattr(kernel, 'BLOCKS', 1)
  assert four < 0.7 * operations()


def test_splash_refuses_segments_that_continue_another():
  with pytest.raises(ValueError, match="'splash' has no segment that continues another; xla has"):
    on('splash')(*continued(make(kernel.cases()[1])))


def test_visible_by_hand():
  """Two segments of two and one token of padding; a window of one sees the token alone."""
  segments, positions = jnp.asarray([[1, 1, 2, 2, 0]]), jnp.asarray([[0, 1, 0, 1, 0]])
  see = lambda window, *packed: kernel.visible(kernel.Packed(*packed), window)[0].astype(int)
  want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
  assert see(None, segments, None, positions).tolist() == want
  assert see(1, segments, None, positions).tolist() == np.eye(5, dtype=int).tolist()
  # The second continues the first; in a window of two its first token sees the one before it.
  prefixes, positions = jnp.asarray([[1, 1, 1, 1, 0]]), jnp.asarray([[0, 1, 2, 3, 0]])
  want[2:4] = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
  assert see(None, segments, prefixes, positions).tolist() == want
  want[2:4] = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
  assert see(2, segments, prefixes, positions).tolist() == want


@pytest.mark.parametrize('dtype, softcap', [('float32', None), ('bfloat16', 5.0)])
def test_what_cudnn_cannot_do_is_refused(dtype, softcap):
  q, k, v, segments, window, scale, _ = make(kernel.cases()[0], dtype)
  with pytest.raises(ValueError, match=f'not {dtype} and softcap={softcap}; xla does'):
    on('cudnn')(q, k, v, segments, window, scale, softcap)


def test_an_unknown_back_end_is_named_with_the_choices():
  with pytest.raises(ValueError, match="'flash' is not one of xla, splash, cudnn"):
    on('flash')(*make(kernel.cases()[0]))
