"""Attention against caches: hand numbers, its twin, shared and quantised keys and values.

The GPU kernel runs in interpret mode.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl.kernels import decode_attention as kernel
from reasonrl.kernels import decode_attention_gpu
from reasonrl.kernels.decode_attention import Stored

attend = jax.jit(kernel.decode_attention, static_argnums=(8, 9, 10))
twin = jax.jit(kernel.decode_attention_ref, static_argnums=(8, 9))


def plain(x):
  return Stored(jnp.asarray(x, jnp.float32), None)


@pytest.mark.parametrize(
  ('queries', 'slots', 'dtype', 'left'),
  [(3, 40, 'float32', True), (41, 40, 'float32', False), (3, 40, 'bfloat16', False)]
  + [(200, 300, 'float32', False)],
)
def test_the_larger_goes_left_on_a_cpu(queries, slots, dtype, left):
  q, k = jnp.zeros((1, 2, queries, 8), dtype), jnp.zeros((1, 2, slots, 8), dtype)
  traced = jax.jit(kernel._scores).trace(q, k)
  text = traced.lower(lowering_platforms=('cpu',)).as_text()
  assert (f'1x2x{slots}x{queries}xf32' in text) == left


@pytest.mark.parametrize('backend', kernel.BACKENDS)
def test_by_hand(backend, monkeypatch):
  """Scores ln 1, ln 2 in the shared part, ln 5 in the row's own, ln 8 of the token itself: weights
  1/16, 2/16, 5/16, 8/16."""
  monkeypatch.setattr(decode_attention_gpu, 'INTERPRET', True)
  q = jnp.ones((1, 1, 1, 1))
  new = np.log(8.0) * q, 3.0 * q
  shared = plain(np.log([1.0, 2.0, 9.0]).reshape(1, 1, 3, 1)), plain([[[[8.0], [0.0], [7.0]]]])
  own = plain(np.log([5.0, 3.0]).reshape(1, 1, 2, 1)), plain([[[[16.0], [9.0]]]])
  see_own, see_shared = jnp.asarray([[[True, False]]]), jnp.asarray([[[True, True, False]]])
  see_new = jnp.asarray([[[True]]])
  at = lambda a, b, c: attend(
    q, *new, own, shared, see_new & a, see_own & b, see_shared & c, 1.0, None, backend
  )
  assert at(True, True, True).item() == pytest.approx((8 + 5 * 16 + 8 * 3) / 16, rel=1e-6)
  assert at(False, True, True).item() == pytest.approx((8 + 5 * 16) / 8, rel=1e-6)
  assert at(False, False, True).item() == pytest.approx(8 / 3, rel=1e-6)
  assert at(True, False, False).item() == pytest.approx(3)
  assert at(False, False, False).item() == 0
  alone = attend(q, *new, own, None, see_new, see_own, None, 1.0, None, backend)
  assert alone.item() == pytest.approx((5 * 16 + 8 * 3) / 13, rel=1e-6)


@functools.cache
def case(name, dtype, quantised=False):
  _, B, Q, H, K, T, S, P, C, softcap = next(c for c in kernel.cases() if c[0] == name)
  rng = np.random.default_rng(0)

  def stored(rows, slots):
    x = jnp.asarray(rng.normal(size=(rows, K, slots, C)), dtype)
    return kernel.quantize(x) if quantised else Stored(x, None)

  q = jnp.asarray(rng.normal(size=(B, H, T, C)), dtype)
  new = (jnp.asarray(rng.normal(size=(B, K, T, C)), dtype) for _ in range(2))
  own = stored(B, S), stored(B, S)
  shared = (stored(Q, P), stored(Q, P)) if Q else None
  see = [jnp.asarray(rng.random((B, T, n)) < 0.6) for n in (T, S, P)]
  see[1], see[2] = see[1].at[0].set(False), see[2].at[-1].set(False) if Q else None
  return q, *new, own, shared, *see, C**-0.5, softcap


@pytest.mark.parametrize('backend', kernel.BACKENDS)
@pytest.mark.parametrize('quantised', [False, True])
@pytest.mark.parametrize('name', [c[0] for c in kernel.cases()])
def test_equals_its_twin(name, quantised, backend, monkeypatch):
  monkeypatch.setattr(decode_attention_gpu, 'INTERPRET', True)
  args = case(name, 'float32', quantised)
  np.testing.assert_allclose(attend(*args, backend), twin(*args), atol=1e-5)


@pytest.mark.parametrize('programs', [1, 3, 264])
def test_programs_that_share_a_cache(programs, monkeypatch):
  """Slots behind the last that is seen are not read: there, NaN."""
  monkeypatch.setattr(decode_attention_gpu, 'INTERPRET', True)
  monkeypatch.setattr(decode_attention_gpu, 'PROGRAMS', programs)
  q, k, v, own, shared, *see, scale, softcap = case('long', 'float32')
  see[1] = see[1].at[:, :, 200:].set(False)
  spoiled = [stored._replace(values_BKSC=stored[0].at[:, :, 256:].set(jnp.nan)) for stored in own]
  # Not jitted: PROGRAMS is read while the kernel is traced.
  got = kernel.decode_attention(q, k, v, spoiled, shared, *see, scale, softcap, 'pallas_gpu')
  np.testing.assert_allclose(got, twin(q, k, v, own, shared, *see, scale, softcap), atol=1e-5)


@pytest.mark.parametrize('backend', kernel.BACKENDS)
@pytest.mark.parametrize('name', [c[0] for c in kernel.cases()])
def test_bfloat16_operands_run_here(name, backend, monkeypatch):
  """Every product in its canonical form: others fail on a CPU, and only when they run."""
  monkeypatch.setattr(decode_attention_gpu, 'INTERPRET', True)
  args = case(name, 'bfloat16')
  got = attend(*args, backend)
  assert got.dtype == jnp.bfloat16
  as_float32 = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args[:5]
  )
  np.testing.assert_allclose(got.astype(jnp.float32), twin(*as_float32, *args[5:]), atol=0.03)


def test_quantised_values():
  """127 steps to the largest of a token and head; zeros stay."""
  x = jnp.asarray([[[[1.0, -2.54, 0.011], [0.0, 0.0, 0.0]]]])
  values, scale = kernel.quantize(x)
  assert values.dtype == jnp.int8 and values[0, 0].tolist() == [[50, -127, 1], [0, 0, 0]]
  np.testing.assert_allclose(scale[0, 0, 0], [0.02, 0.0], rtol=1e-6)


def test_heads_that_do_not_divide():
  q, *rest = case('own', 'float32')
  with pytest.raises(ValueError, match='decode_attention: q'):
    attend(q[:, :3], *rest, 'xla')


def test_the_kernel_says_what_it_cannot_do():
  """head_dim 8, outside interpret mode; not jitted, which would remember that mode."""
  with pytest.raises(ValueError, match='head_dim=8 is not one of 16, 32, 64, 128'):
    kernel.decode_attention(*case('own', 'float32'), 'pallas_gpu')


def test_an_unknown_back_end():
  with pytest.raises(ValueError, match="backend='cuda' is not one of xla, pallas_gpu"):
    attend(*case('own', 'float32'), 'cuda')
