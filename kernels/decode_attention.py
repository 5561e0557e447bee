"""Attention of a few tokens: to one another, to a row's own cache, and to one that rows share.

Over the visible slots s of one of the three, with scores x_s = cap(scale * q . k_s):

    m = max_s x_s      t = sum_s exp(x_s - m)      o = sum_s exp(x_s - m) v_s

and over the three, i, m_i + log t_i being their log-sum-exp (arXiv 2205.14135, section 3.1):

    M = max_i m_i      out = sum_i exp(m_i - M) o_i / sum_i exp(m_i - M) t_i

The tokens' own keys and values do not come from the cache, so that it can be written later.

The queries of all rows that share a cache fold into its one product, so it is read once for all of
them. A cache may hold int8 values with a scale for each token and head: scores and weights are
multiplied by the scales, the values enter the products in the dtype of the queries.

For inference: there is no gradient. A query that sees no slot gets 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reasonrl.kernels.attention import MASKED, dot


class Stored(NamedTuple):
  """Keys or values of S slots."""

  values_BKSC: Any  # in the dtype of the queries, or int8
  scale_BK1S: Any  # float32, what the int8 values are multiplied by; None: they are what they are


def quantize(x_BKTC) -> Stored:
  """int8 with one scale per token and head: the largest value becomes 127."""
  x = x_BKTC.astype(jnp.float32)
  scale_BKT = jnp.max(jnp.abs(x), axis=-1) / 127.0
  safe = jnp.where(scale_BKT > 0, scale_BKT, 1.0)[..., None]
  return Stored(jnp.round(x / safe).astype(jnp.int8), scale_BKT[..., None, :])


def decode_attention(
  q_BHTC, k_BKTC, v_BKTC, own, shared, visible_BTT, visible_BTS, visible_BTP, scale, softcap
):
  """Attention over what is visible of all three.

  Args:
    q_BHTC: H must be a multiple of K.
    k_BKTC, v_BKTC: of the same tokens.
    own: (keys, values) of the row's other tokens, each `Stored` [B, K, S, C].
    shared: the same, [Q, K, P, C], of B / Q rows each, one after the other; None: there is none.
    visible_BTT: bool, query t of row b may look at token t.
    visible_BTS, visible_BTP: bool, or at slot s of `own`, p of `shared` (None without).
    scale, softcap: as in `attention`.

  Returns:
    [B, H, T, C] in q's dtype.
  """
  B, H, T, C = q_BHTC.shape
  K = own[0].values_BKSC.shape[1]
  if H % K or own[0].values_BKSC.shape[0] != B:
    raise ValueError(f'decode_attention: q {q_BHTC.shape}, keys {own[0].values_BKSC.shape}')
  q_BKGTC = q_BHTC.reshape(B, K, H // K, T, C)
  new = Stored(k_BKTC, None), Stored(v_BKTC, None)
  parts = [
    _part(q_BKGTC, *new, visible_BTT[:, None, None], scale, softcap),
    _part(q_BKGTC, *own, visible_BTS[:, None, None], scale, softcap),
  ]
  if shared is not None:
    Q = shared[0].values_BKSC.shape[0]
    fold = lambda x: x.reshape(Q, B // Q, *x.shape[1:]).swapaxes(1, 2)
    unfold = lambda x: x.swapaxes(1, 2).reshape(B, *x.shape[1:2], *x.shape[3:])
    see = visible_BTP.reshape(Q, 1, B // Q, 1, T, -1)
    part = _part(fold(q_BKGTC), *shared, see, scale, softcap)
    parts.append(tuple(unfold(x) for x in part))
  top = parts[0][0]
  for part in parts[1:]:
    top = jnp.maximum(top, part[0])
  total, out = 0.0, 0.0
  for m, t, o in parts:
    total, out = total + jnp.exp(m - top) * t, out + jnp.exp(m - top) * o
  return (out / jnp.where(total > 0, total, 1.0)).astype(q_BHTC.dtype).reshape(q_BHTC.shape)


def _part(q, keys: Stored, values: Stored, visible, scale, softcap):
  """m, t [B, K, ..., 1] and o [B, K, ..., C], float32, of q [B, K, ..., C] against one cache.

  `visible` [B, 1, ..., S] fits the scores [B, K, ..., S].
  """
  B, K, *lead, C = q.shape
  # Queries, heads and rows fold into the rows of one product per (b, k).
  x = dot(q.reshape(B, K, -1, C), keys.values_BKSC.astype(q.dtype), 3, 3) * scale
  if keys.scale_BK1S is not None:
    x = x * keys.scale_BK1S
  if softcap is not None:
    x = softcap * jnp.tanh(x / softcap)
  x = jnp.where(visible, x.reshape(B, K, *lead, -1), MASKED)
  m = jnp.max(x, axis=-1, keepdims=True)
  weights = jnp.where(visible, jnp.exp(x - m), 0.0)
  t = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.reshape(B, K, -1, weights.shape[-1])
  if values.scale_BK1S is not None:
    weights = weights * values.scale_BK1S
  o = dot(weights.astype(q.dtype), values.values_BKSC.astype(q.dtype), 3, 2)
  return m, t, o.reshape(B, K, *lead, C)


def decode_attention_ref(
  q_BHTC, k_BKTC, v_BKTC, own, shared, visible_BTT, visible_BTS, visible_BTP, scale, softcap
):
  """The same with every cache copied to every row and head, and one softmax."""
  B, H = q_BHTC.shape[:2]

  def whole(stored):
    x, by = stored
    x = x.astype(jnp.float32) * (1.0 if by is None else by.swapaxes(2, 3))
    return jnp.repeat(jnp.repeat(x, B // x.shape[0], axis=0), H // x.shape[1], axis=1)

  parts = [(Stored(k_BKTC, None), Stored(v_BKTC, None)), own, *([] if shared is None else [shared])]
  k, v = (jnp.concatenate([whole(part[i]) for part in parts], axis=2) for i in (0, 1))
  see = [visible_BTT, visible_BTS, *([] if shared is None else [visible_BTP])]
  see = jnp.concatenate(see, axis=2)[:, None]
  x = jnp.einsum('bhtc,bhsc->bhts', q_BHTC, k, precision='highest') * scale
  if softcap is not None:
    x = softcap * jnp.tanh(x / softcap)
  x = jnp.where(see, x, -jnp.inf)
  weights = jnp.where(see.any(-1, keepdims=True), jax.nn.softmax(x, axis=-1), 0.0)
  return jnp.einsum('bhts,bhsc->bhtc', weights, v, precision='highest')


def cases():
  """(name, B, Q or 0, H, K, T, S, P, C, softcap)."""
  return [
    ('own', 3, 0, 4, 2, 1, 9, 0, 8, None),
    ('several tokens', 2, 0, 4, 2, 3, 9, 0, 8, None),
    ('shared', 6, 2, 4, 2, 1, 5, 7, 8, None),
    ('shared by all', 4, 1, 6, 3, 2, 5, 7, 8, None),
    ('one row each', 3, 3, 4, 4, 1, 5, 4, 8, None),
    ('softcap', 6, 3, 4, 2, 1, 5, 7, 8, 3.0),
  ]
