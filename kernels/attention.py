"""Softmax attention with grouped key/value heads, in canonical batch-leading contractions.

    out[b,h,t] = sum_s softmax_s(cap(scale * q[b,h,t] . k[b,h',s]) + mask[b,t,s]) v[b,h',s]

where h' = h // (H / K). The same function serves training (T = S) and decoding (T = 1 against a
cache). Scores and softmax are float32; the operands of both products have the dtype of q, k and v.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row whose keys are all masked yields numbers, not NaN


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
  B, H, T, C = q_BHTC.shape
  K, S = k_BKSC.shape[1:3]
  if H % K or k_BKSC.shape != (B, K, S, C) or visible_BTS.shape != (B, T, S):
    raise ValueError(
      f'attention: q {q_BHTC.shape}, k {k_BKSC.shape}, visible {visible_BTS.shape} do not fit'
    )
  precision = jax.lax.Precision.HIGHEST if q_BHTC.dtype == jnp.float32 else None
  dot = lambda a, b, dims: jax.lax.dot_general(  # noqa: E731
    a, b, (dims, ((0, 1), (0, 1))), precision=precision, preferred_element_type=jnp.float32
  )
  # The G = H / K query heads of a key head fold into its rows: one product per (b, k).
  q_BKGC = q_BHTC.reshape(B, K, (H // K) * T, C)
  scores = dot(q_BKGC, k_BKSC, ((3,), (3,))) * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = scores.reshape(B, K, H // K, T, S)
  scores = jnp.where(visible_BTS[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSC.dtype).reshape(B, K, (H // K) * T, S)
  return dot(weights, v_BKSC, ((3,), (2,))).astype(q_BHTC.dtype).reshape(B, H, T, C)


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
