"""Attention against caches: hand numbers, its twin, shared and quantised keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl.kernels import decode_attention as kernel
from reasonrl.kernels.decode_attention import Stored

attend = jax.jit(kernel.decode_attention, static_argnums=(5, 6))
twin = jax.jit(kernel.decode_attention_ref, static_argnums=(5, 6))


def plain(x):
  return Stored(jnp.asarray(x, jnp.float32), None)


def test_by_hand():
  """Scores ln 1, ln 2 in the shared part and ln 5 in the row's own: weights 1/8, 2/8, 5/8."""
  q = jnp.ones((1, 1, 1, 1))
  shared = plain(np.log([1.0, 2.0, 9.0]).reshape(1, 1, 3, 1)), plain([[[[8.0], [0.0], [7.0]]]])
  own = plain(np.log([5.0, 3.0]).reshape(1, 1, 2, 1)), plain([[[[16.0], [9.0]]]])
  see_own, see_shared = jnp.asarray([[[True, False]]]), jnp.asarray([[[True, True, False]]])
  out = attend(q, own, see_own, shared, see_shared, 1.0, None)
  assert out.item() == pytest.approx(8 / 8 + 5 * 16 / 8, rel=1e-6)
  nothing = attend(q, own, see_own & False, shared, see_shared & False, 1.0, None)
  assert nothing.item() == 0
  one = attend(q, own, see_own & False, shared, see_shared, 1.0, None)
  assert one.item() == pytest.approx(8 / 3, rel=1e-6)
  assert attend(q, own, see_own, None, None, 1.0, None).item() == pytest.approx(16)


@functools.cache
def case(name, dtype, quantised=False):
  _, B, Q, H, K, T, S, P, C, softcap = next(c for c in kernel.cases() if c[0] == name)
  rng = np.random.default_rng(0)

  def stored(rows, slots):
    x = jnp.asarray(rng.normal(size=(rows, K, slots, C)), dtype)
    return kernel.quantize(x) if quantised else Stored(x, None)

  q = jnp.asarray(rng.normal(size=(B, H, T, C)), dtype)
  own = stored(B, S), stored(B, S)
  shared = (stored(Q, P), stored(Q, P)) if Q else None
  see = jnp.asarray(rng.random((B, T, S)) < 0.6), jnp.asarray(rng.random((B, T, P)) < 0.6)
  see = see[0].at[0].set(False), see[1].at[-1].set(False)
  return q, own, see[0], shared, see[1] if Q else None, C**-0.5, softcap


@pytest.mark.parametrize('quantised', [False, True])
@pytest.mark.parametrize('name', [c[0] for c in kernel.cases()])
def test_equals_its_twin(name, quantised):
  args = case(name, 'float32', quantised)
  np.testing.assert_allclose(attend(*args), twin(*args), atol=1e-5)


@pytest.mark.parametrize('name', [c[0] for c in kernel.cases()])
def test_bfloat16_operands_run_here(name):
  """Every product in its canonical form: others fail on a CPU, and only when they run."""
  args = case(name, 'bfloat16')
  got = attend(*args)
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
  q, own, *rest = case('own', 'float32')
  with pytest.raises(ValueError, match='decode_attention: q'):
    attend(q[:, :3], own, *rest)
