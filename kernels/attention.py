"""Softmax attention with grouped key/value heads, in canonical batch-leading contractions.

    P[b,h,t,s]   = softmax_s(cap(scale * q[b,h,t] . k[b,h',s])) over the visible s
    out[b,h,t]   = sum_s P[b,h,t,s] v[b,h',s]                        h' = h // (H / K)

The same function serves training (T = S) and decoding (T = 1 against a cache). Scores and softmax
are float32; the operands of all products, forward and backward, have the dtype of q, k and v. The
custom VJP keeps P in that dtype:

    dv = P^T dout    dP = dout v^T    dS = scale P (dP - sum_s P dP)    dq = dS k    dk = dS^T q

A query that sees no key gets 0.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without a visible key yields numbers


def dot(a, b, axis_a, axis_b):
  """Product over one axis of each, batched over the two leading axes; float32 result."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dims = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _weights(q_BKRC, k_BKSC, visible_BTS, scale, softcap):
  """P as [B, K, H/K * T, S] float32, and the slope of the cap (None without one)."""
  B, K, R, _ = q_BKRC.shape
  T, S = visible_BTS.shape[1:]
  scores, slope = dot(q_BKRC, k_BKSC, 3, 3) * scale, None
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
    slope = 1.0 - (scores / softcap) ** 2
  see = visible_BTS[:, None, None]
  scores = jnp.where(see, scores.reshape(B, K, R // T, T, S), MASKED)
  weights = jnp.where(see, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return (weights / jnp.where(total > 0, total, 1.0)).reshape(B, K, R, S), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q_BHTC, k_BKSC, v_BKSC, visible_BTS, scale, softcap):
  """Attention over visible keys.

  Args:
    q_BHTC, k_BKSC, v_BKSC: H must be a multiple of K.
    visible_BTS: bool, query t may look at key s.
    scale: multiplies the scores.
    softcap: None, or c in c * tanh(score / c) (Gemma 2, arXiv 2408.00118).

  Returns:
    [B, H, T, C] in q's dtype.
  """
  return _forward(q_BHTC, k_BKSC, v_BKSC, visible_BTS, scale, softcap)[0]


def _forward(q_BHTC, k_BKSC, v_BKSC, visible_BTS, scale, softcap):
  B, H, T, C = q_BHTC.shape
  K, S = k_BKSC.shape[1:3]
  if H % K or k_BKSC.shape != (B, K, S, C) or visible_BTS.shape != (B, T, S):
    raise ValueError(
      f'attention: q {q_BHTC.shape}, k {k_BKSC.shape}, visible {visible_BTS.shape} do not fit'
    )
  # The H / K query heads of a key head fold into its rows: one product per (b, k).
  q_BKRC = q_BHTC.reshape(B, K, -1, C)
  weights, slope = _weights(q_BKRC, k_BKSC, visible_BTS, scale, softcap)
  weights = weights.astype(v_BKSC.dtype)
  out = dot(weights, v_BKSC, 3, 2).astype(q_BHTC.dtype).reshape(q_BHTC.shape)
  return out, (q_BKRC, k_BKSC, v_BKSC, weights, slope)


def _backward(scale, softcap, residuals, dout_BHTC):
  del softcap
  q_BKRC, k_BKSC, v_BKSC, weights, slope = residuals
  dout = dout_BHTC.reshape(q_BKRC.shape).astype(v_BKSC.dtype)
  dv = dot(weights, dout, 2, 2)
  dweights, weights = dot(dout, v_BKSC, 3, 3), weights.astype(jnp.float32)
  dscores = weights * (dweights - jnp.sum(weights * dweights, axis=-1, keepdims=True)) * scale
  if slope is not None:
    dscores = dscores * slope
  dscores = dscores.astype(q_BKRC.dtype)
  dq, dk = dot(dscores, k_BKSC, 3, 2), dot(dscores, q_BKRC, 2, 2)
  dq = dq.astype(q_BKRC.dtype).reshape(dout_BHTC.shape)
  return dq, dk.astype(k_BKSC.dtype), dv.astype(v_BKSC.dtype), None


attention.defvjp(_forward, _backward)


def attention_ref(q_BHTC, k_BKSC, v_BKSC, visible_BTS, scale, softcap):
  """The same formula with repeated key/value heads."""
  G = q_BHTC.shape[1] // k_BKSC.shape[1]
  k, v = jnp.repeat(k_BKSC, G, axis=1), jnp.repeat(v_BKSC, G, axis=1)
  scores = jnp.einsum('bhtc,bhsc->bhts', q_BHTC, k, precision='highest') * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  weights = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum('bhts,bhsc->bhtc', weights, v, precision='highest')


def cases():
  """(name, B, H, K, T, S, C, softcap)."""
  return [
    ('one head', 1, 1, 1, 4, 4, 8, None),
    ('grouped', 2, 6, 2, 5, 5, 8, None),
    ('decode', 3, 4, 2, 1, 9, 8, None),
    ('softcap', 2, 4, 4, 3, 6, 8, 5.0),
  ]
