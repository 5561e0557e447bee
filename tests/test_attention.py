"""Attention: hand numbers, its twin, masks, softcap, bfloat16."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl.kernels import attention as kernel

CASES = pytest.mark.parametrize('case', kernel.cases(), ids=lambda case: case[0])


def make(case, dtype='float32'):
  """q, k, v, a causal mask aligned at the last key, scale and softcap."""
  _, B, H, K, T, S, C, softcap = case
  rng = np.random.default_rng(0)
  shapes = (B, H, T, C), (B, K, S, C), (B, K, S, C)
  qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  see_TS = np.arange(T)[:, None] + S - T >= np.arange(S)[None, :]
  return *qkv, np.broadcast_to(see_TS, (B, T, S)), 2.0 * C**-0.5, softcap


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def run(function, q, k, v, see, scale, softcap):
  """Output and the gradients of a weighted sum of it."""

  def loss(q, k, v):
    out = function(q, k, v, see, scale, softcap)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  return out, *grads


def test_by_hand():
  # Scores 0 and log 3: weights 1/4 and 3/4. The third key is hidden.
  q = jnp.asarray([[[[0.5, 0.0]]]])
  k = jnp.asarray([[[[0.0, 7.0], [np.log(3.0), -7.0], [99.0, 99.0]]]])
  v = jnp.asarray([[[[0.0, 4.0], [4.0, 8.0], [99.0, 99.0]]]])
  out = kernel.attention(q, k, v, jnp.asarray([[[True, True, False]]]), 2.0, None)
  np.testing.assert_allclose(out[0, 0, 0], [3.0, 7.0], rtol=1e-6)


def test_softcap_by_hand():
  # 2 tanh(1000 / 2) = 2 against 0, so the weights are 1 / (1 + e^2) and e^2 / (1 + e^2).
  q, k = jnp.asarray([[[[1.0]]]]), jnp.asarray([[[[0.0], [1000.0]]]])
  out = kernel.attention(q, k, jnp.asarray([[[[0.0], [1.0]]]]), jnp.ones((1, 1, 2), bool), 1.0, 2.0)
  np.testing.assert_allclose(out.item(), np.exp(2) / (1 + np.exp(2)), rtol=1e-6)


def test_query_heads_share_key_heads_in_order():
  # Four query heads, two key heads: heads 0 and 1 read the first, 2 and 3 the second.
  v_BKSC = jnp.asarray([10.0, 20.0]).reshape(1, 2, 1, 1)
  out = kernel.attention(
    jnp.ones((1, 4, 1, 1)), jnp.ones((1, 2, 1, 1)), v_BKSC, jnp.ones((1, 1, 1), bool), 1.0, None
  )
  assert out.reshape(-1).tolist() == [10.0, 10.0, 20.0, 20.0]


@CASES
def test_equals_its_twin(case):
  inputs = make(case)
  got, want = run(kernel.attention, *inputs), run(kernel.attention_ref, *inputs)
  for g, t in zip(got, want, strict=True):
    assert g.shape == t.shape and g.dtype == t.dtype
    np.testing.assert_allclose(g, t, rtol=1e-5, atol=2e-6)


@CASES
def test_bfloat16_stays_near_float32(case):
  """Also: every contraction exists as bfloat16 x bfloat16 -> float32 on this platform."""
  inputs = make(case, 'bfloat16')
  wide = [x.astype(jnp.float32) for x in inputs[:3]]
  got, want = run(kernel.attention, *inputs), run(kernel.attention_ref, *wide, *inputs[3:])
  for g, t in zip(got, want, strict=True):
    assert g.dtype == jnp.bfloat16
    np.testing.assert_allclose(g.astype(jnp.float32), t, rtol=0.03, atol=0.03)


def test_scores_stay_float32_in_bfloat16():
  # Scores 256 and 257, which are one number in bfloat16.
  q, k = jnp.asarray([[[[16.0, 1.0]]]]), jnp.asarray([[[[16.0, 0.0], [16.0, 1.0]]]])
  v, see = jnp.asarray([[[[0.0, 0.0], [1.0, 1.0]]]]), jnp.ones((1, 1, 2), bool)
  out = kernel.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), see, 1.0, None)
  np.testing.assert_allclose(out[0, 0, 0].astype(jnp.float32), np.e / (1 + np.e), rtol=0.01)


def products_in(jaxpr):
  """Every dot_general of a jaxpr, those of nested ones included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield eqn
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from products_in(inner)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_all_products_have_the_dtype_of_their_inputs_and_a_float32_result(dtype):
  """Two forward, four backward, each batched over its two leading axes alone."""
  jaxpr = jax.make_jaxpr(run, static_argnums=(0, 5, 6))(
    kernel.attention, *make(kernel.cases()[1], dtype)
  )
  products = list(products_in(jaxpr.jaxpr))
  assert len(products) == 6
  for product in products:
    assert {v.aval.dtype for v in product.invars} == {jnp.dtype(dtype)}
    assert product.outvars[0].aval.dtype == jnp.float32
    assert product.params['dimension_numbers'][1] == ((0, 1), (0, 1))
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert product.params['precision'] == (highest if dtype == 'float32' else None)


@CASES
def test_hidden_keys_have_no_influence_and_no_gradient(case):
  q, k, v, see, *rest = make(case)
  see = see & (np.arange(see.shape[2]) < see.shape[2] - 1)
  out, _, dk, dv = run(kernel.attention, q, k, v, see, *rest)
  assert not dk[:, :, -1].any() and not dv[:, :, -1].any()
  changed = run(kernel.attention, q, k.at[:, :, -1].set(9.0), v.at[:, :, -1].set(9.0), see, *rest)
  np.testing.assert_array_equal(out, changed[0])


@CASES
def test_a_query_that_sees_nothing_gets_zero(case):
  """And sends no gradient; the other queries do not notice."""
  q, k, v, see, *rest = make(case)
  see = see & (np.arange(see.shape[1]) > 0)[:, None]
  out, dq, dk, dv = run(kernel.attention, q, k, v, see, *rest)
  assert not out[:, :, 0].any() and not dq[:, :, 0].any()
  plain = run(kernel.attention, *make(case))
  np.testing.assert_allclose(out[:, :, 1:], plain[0][:, :, 1:], atol=1e-6)
  assert jnp.isfinite(dk).all() and jnp.isfinite(dv).all()


@CASES
def test_the_order_of_keys_does_not_matter(case):
  q, k, v, see, *rest = make(case)
  order = np.random.default_rng(0).permutation(k.shape[2])
  permuted = run(kernel.attention, q, k[:, :, order], v[:, :, order], see[:, :, order], *rest)
  plain = run(kernel.attention, q, k, v, see, *rest)
  np.testing.assert_allclose(permuted[0], plain[0], rtol=1e-5, atol=1e-6)


def test_jit_changes_nothing():
  inputs = make(kernel.cases()[1])
  jitted = run(kernel.attention, *inputs)[0]
  np.testing.assert_allclose(jitted, kernel.attention(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'heads, slots', [(3, 4), (4, 5)], ids=['heads not a multiple', 'mask of another length']
)
def test_shapes_that_disagree(heads, slots):
  k = jnp.ones((1, 2, 4, 8))
  with pytest.raises(ValueError, match='do not fit'):
    see = jnp.ones((1, 1, slots), bool)
    kernel.attention(jnp.ones((1, heads, 1, 8)), k, k, see, 1.0, None)
