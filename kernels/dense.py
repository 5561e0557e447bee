"""The one weight product: y[..., o] = sum_i x[..., i] w[o, i].

Weights are stored [out, in] and contracted on the last axis of both sides, operands are flattened
to two dimensions and cast to `compute_dtype`, products accumulate in float32. The custom VJP casts
the cotangent to `compute_dtype` too, so that all three products of a training step run on the
matrix unit. float32 means float32 (`Precision.HIGHEST`), on TPU and GPU as well.

A CPU packs the right operand of a product before it multiplies. For few rows, as in decoding, that
is most of the work if it is the weight, so there the weight goes left: w x^T.
"""

import functools

import jax
import jax.numpy as jnp


def dense_ref(x, w_OI, compute_dtype):
  """The same product, spelled out."""
  del compute_dtype
  return jnp.einsum('...i,oi->...o', x, w_OI, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def contract(a, b, dims, compute_dtype):
  """`lax.dot_general` of two matrices, summed in float32; dims: one axis of each."""
  precision = jax.lax.Precision.HIGHEST if compute_dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a.astype(compute_dtype),
    b.astype(compute_dtype),
    (((dims[0],), (dims[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


FEW_ROWS = 128  # up to here the weight goes left on a CPU


def project(x_MI, w_OI, compute_dtype):
  """x w^T, float32 [M, O]: `contract`, in the order that suits a CPU if M is small."""
  plain = functools.partial(contract, dims=(1, 1), compute_dtype=compute_dtype)
  if x_MI.shape[0] > min(FEW_ROWS, w_OI.shape[0]):
    return plain(x_MI, w_OI)
  few = functools.partial(_few_rows, compute_dtype=compute_dtype)
  return jax.lax.platform_dependent(x_MI, w_OI, cpu=few, default=plain)


def _few_rows(x_MI, w_OI, compute_dtype):
  M, half = x_MI.shape[0], compute_dtype == jnp.bfloat16
  if M == 1 and half:  # XLA would convert the weight to float32, which costs ten products
    return contract(jnp.pad(x_MI, ((0, 1), (0, 0))), w_OI, (1, 1), compute_dtype)[:1]
  if M < (16 if half else 2):
    return contract(x_MI, w_OI, (1, 1), compute_dtype)
  # Without the barrier XLA turns the product of the transposes back into the other one.
  y_OM = jax.lax.optimization_barrier(contract(w_OI, x_MI, (1, 1), compute_dtype))
  return y_OM.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x, w_OI, compute_dtype):
  """x [..., in] times w_OI [out, in] transposed -> [..., out] in x's dtype.

  Raises:
    ValueError: the last axis of x is not the last axis of w_OI.
  """
  if x.shape[-1] != w_OI.shape[-1]:
    raise ValueError(f'dense: x {x.shape} and weight [out, in] {w_OI.shape} disagree on `in`')
  y = project(x.reshape(-1, x.shape[-1]), w_OI, compute_dtype)
  return y.astype(x.dtype).reshape(*x.shape[:-1], w_OI.shape[0])


def _forward(x, w_OI, compute_dtype):
  return dense(x, w_OI, compute_dtype), (x, w_OI)


def _backward(compute_dtype, residuals, g):
  x, w_OI = residuals
  g_MO = g.reshape(-1, g.shape[-1])
  x_MI = x.reshape(-1, x.shape[-1])
  dx = contract(g_MO, w_OI, (1, 0), compute_dtype)
  dw_OI = contract(g_MO, x_MI, (0, 0), compute_dtype)
  return dx.astype(x.dtype).reshape(x.shape), dw_OI.astype(w_OI.dtype)


dense.defvjp(_forward, _backward)


def cases():
  """(name, x shape, w shape): where `dense` is compared with `dense_ref`."""
  return [('vector', (3,), (5, 3)), ('rows', (7, 16), (8, 16)), ('batch', (2, 3, 16), (5, 16))]
