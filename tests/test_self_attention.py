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
  segments = np.zeros((B, T), np.int32)  # what is left of a row is padding
  segments[:, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
  return *qkv, jnp.asarray(segments), window, C**-0.5, softcap


def run(function, q, k, v, segments, *rest):
  """Output of the real tokens and the gradients of a weighted sum of it."""

  def loss(q, k, v):
    out = function(q, k, v, segments, *rest)
    out = jnp.where(segments[:, None, :, None] > 0, out.astype(jnp.float32), 0.0)
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


def test_visible_by_hand():
  """Two segments of two and one token of padding; a window of one sees the token alone."""
  segments = jnp.asarray([[1, 1, 2, 2, 0]])
  want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
  assert kernel.visible(segments, None)[0].astype(int).tolist() == want
  assert kernel.visible(segments, 1)[0].astype(int).tolist() == np.eye(5, dtype=int).tolist()


@pytest.mark.parametrize('dtype, softcap', [('float32', None), ('bfloat16', 5.0)])
def test_what_cudnn_cannot_do_is_refused(dtype, softcap):
  q, k, v, segments, window, scale, _ = make(kernel.cases()[0], dtype)
  with pytest.raises(ValueError, match=f'not {dtype} and softcap={softcap}; xla does'):
    on('cudnn')(q, k, v, segments, window, scale, softcap)


def test_an_unknown_back_end_is_named_with_the_choices():
  with pytest.raises(ValueError, match="'flash' is not one of xla, splash, cudnn"):
    on('flash')(*make(kernel.cases()[0]))
