"""The weight product: hand numbers, its twin, and what bfloat16 operands do to it."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl.kernels import dense as kernel

F32, BF16 = jnp.dtype('float32'), jnp.dtype('bfloat16')


def normal(seed, shape, dtype='float32'):
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return jnp.asarray(x, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(product, compute_dtype, x, w, ct):
  """y, dx, dw of `product(x, w, compute_dtype)` for the cotangent ct."""
  y, pull = jax.vjp(lambda x, w: product(x, w, compute_dtype), x, w)
  return y, *pull(ct)


def products_in(jaxpr):
  """Every dot_general of a jaxpr, those of nested ones included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield eqn
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from products_in(inner)


def rounded(x):
  """x as bfloat16 operands see it, in float64."""
  return np.asarray(x.astype(BF16)).astype(np.float64)


def test_by_hand():
  x = jnp.asarray([[1.0, 2.0]])
  w_OI = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
  ct = jnp.asarray([[1.0, 10.0, 100.0]])
  y, dx, dw = with_gradients(kernel.dense, F32, x, w_OI, ct)
  assert y.tolist() == [[1.0, 2.0, 11.0]]
  assert dx.tolist() == [[301.0, 410.0]]  # 1 + 300, 10 + 400
  assert dw.tolist() == [[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]


@pytest.mark.parametrize('case', kernel.cases(), ids=lambda case: case[0])
def test_equals_its_twin(case):
  _, x_shape, w_shape = case
  x, w_OI = normal(0, x_shape), normal(1, w_shape)
  ct = normal(2, (*x_shape[:-1], w_shape[0]))
  got = with_gradients(kernel.dense, F32, x, w_OI, ct)
  want = with_gradients(kernel.dense_ref, F32, x, w_OI, ct)
  for g, t in zip(got, want, strict=True):
    assert g.shape == t.shape and g.dtype == t.dtype
    np.testing.assert_allclose(g, t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', kernel.cases(), ids=lambda case: case[0])
def test_bfloat16_rounds_operands_and_accumulates_in_float32(case):
  """x stays float32, so the outputs show the accumulator: exact but for the operands' rounding."""
  _, x_shape, w_shape = case
  x, w_OI = normal(0, x_shape), normal(1, w_shape)
  ct = normal(2, (*x_shape[:-1], w_shape[0]))
  y, dx, dw = with_gradients(kernel.dense, BF16, x, w_OI, ct)
  x_MI, ct_MO = rounded(x).reshape(-1, x_shape[-1]), rounded(ct).reshape(-1, w_shape[0])
  want = x_MI @ rounded(w_OI).T, ct_MO @ rounded(w_OI), ct_MO.T @ x_MI
  for g, t in zip((y, dx, dw), want, strict=True):
    assert g.dtype == F32
    np.testing.assert_allclose(g, t.reshape(g.shape), rtol=1e-5, atol=1e-5)


def test_bfloat16_accumulator_does_not_saturate():
  # A bfloat16 sum of ones stops growing at 256.
  assert kernel.dense(jnp.ones((1, 3000)), jnp.ones((1, 3000)), BF16).item() == 3000.0


def test_dtypes_follow_the_inputs():
  x, w_OI = normal(0, (2, 3, 4), BF16), normal(1, (5, 4))
  y, dx, dw = with_gradients(kernel.dense, BF16, x, w_OI, jnp.ones((2, 3, 5), BF16))
  assert (y.dtype, dx.dtype, dw.dtype) == (BF16, BF16, F32)


@pytest.mark.parametrize('dtype', [F32, BF16], ids=str)
def test_all_three_products_are_plain_matrix_products(dtype):
  """Two-dimensional operands of the compute dtype, float32 out, float32 at full precision."""
  loss = lambda x, w: jnp.sum(kernel.dense(x, w, dtype) ** 2)
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(normal(0, (2, 3, 4)), normal(1, (5, 4)))
  products = list(products_in(jaxpr.jaxpr))
  assert len(products) == 3
  for product in products:
    assert [(v.aval.ndim, v.aval.dtype) for v in product.invars] == [(2, dtype)] * 2
    assert product.outvars[0].aval.dtype == F32
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert product.params['precision'] == (highest if dtype == F32 else None)
  assert products[0].params['dimension_numbers'][0] == ((1,), (1,))  # [out, in], last axis of both


def test_jit_changes_nothing():
  x, w_OI = normal(0, (4, 8)), normal(1, (3, 8))
  jitted = jax.jit(kernel.dense, static_argnums=2)
  np.testing.assert_allclose(jitted(x, w_OI, F32), kernel.dense(x, w_OI, F32), rtol=1e-6)


def test_shapes_that_disagree():
  with pytest.raises(ValueError, match=r'\(2, 4\).*\(4, 5\).*`in`'):
    kernel.dense(jnp.ones((2, 4)), jnp.ones((4, 5)), F32)
