"""Attention of a few tokens: to one another, to a row's own cache, and to one that rows share.

Over the visible slots s of one of the three, with scores x_s = cap(scale * q . k_s):

    m = max_s x_s      t = sum_s exp(x_s - m)      o = sum_s exp(x_s - m) v_s

and over the three, i, m_i + log t_i being their log-sum-exp (arXiv 2205.14135, section 3.1):

    M = max_i m_i      out = sum_i exp(m_i - M) o_i / sum_i exp(m_i - M) t_i

The tokens' own keys and values do not come from the cache, so that it can be written later.

The queries of all rows that share a cache fold into one product with it, so that it is not read for
each of them. A cache may hold int8 values with a scale for each token and head: scores and weights
are multiplied by the scales, the values enter the products in the dtype of the queries.

For inference: there is no gradient. A query that sees no slot gets 0. The back ends are

  xla         everywhere
  pallas_gpu  each of the two caches by one kernel, see `decode_attention_gpu`
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reasonrl.kernels import decode_attention_gpu, dense
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
  q_BHTC, k_BKTC, v_BKTC, own, shared, visible_BTT, visible_BTS, visible_BTP, scale, softcap,
  backend: str,
):  # fmt: skip
  """Attention over what is visible of all three.

  Args:
    q_BHTC: H must be a multiple of K.
    k_BKTC, v_BKTC: of the same tokens.
    own: (keys, values) of the row's other tokens, each `Stored` [B, K, S, C].
    shared: the same, [Q, K, P, C], of B / Q rows each, one after the other; None: there is none.
    visible_BTT: bool, query t of row b may look at token t.
    visible_BTS, visible_BTP: bool, or at slot s of `own`, p of `shared` (None without).
    scale, softcap: as in `attention`.
    backend: of BACKENDS.

  Returns:
    [B, H, T, C] in q's dtype.

  Raises:
    ValueError: the back end is unknown, or shapes do not fit.
  """
  B, H, T, C = q_BHTC.shape
  K = own[0].values_BKSC.shape[1]
  if H % K or own[0].values_BKSC.shape[0] != B:
    raise ValueError(f'decode_attention: q {q_BHTC.shape}, keys {own[0].values_BKSC.shape}')
  if backend not in BACKENDS:
    raise ValueError(f'decode_attention: backend={backend!r} is not one of {", ".join(BACKENDS)}')
  form, sums = (scale, softcap), BACKENDS[backend]
  # [Q, K, W, G, T, C]: rows that share a cache, W, behind the heads.
  q_BK1GTC = q_BHTC.reshape(B, K, 1, H // K, T, C)
  parts, beside = [], {}
  if backend == 'pallas_gpu' and T == 1:  # one token more of the row's own cache
    beside = {'beside': (k_BKTC[:, :, 0], v_BKTC[:, :, 0], visible_BTT[:, 0, 0])}
  else:
    new = Stored(k_BKTC, None), Stored(v_BKTC, None)
    parts.append(_xla(q_BK1GTC, *new, visible_BTT[:, None], *form))
  parts.append(sums(q_BK1GTC, *own, visible_BTS[:, None], *form, **beside))
  if shared is not None:
    Q = shared[0].values_BKSC.shape[0]
    q_QKWGTC = q_BK1GTC.reshape(Q, B // Q, K, H // K, T, C).swapaxes(1, 2)
    see_QWTP = visible_BTP.reshape(Q, B // Q, T, -1)
    unfold = lambda x: x.swapaxes(1, 2).reshape(B, K, 1, *x.shape[3:])
    parts.append(tuple(map(unfold, sums(q_QKWGTC, *shared, see_QWTP, *form))))
  top = parts[0][0]
  for m, _, _ in parts[1:]:
    top = jnp.maximum(top, m)
  total, out = 0.0, 0.0
  for m, t, o in parts:
    total, out = total + jnp.exp(m - top) * t, out + jnp.exp(m - top) * o
  return (out / jnp.where(total > 0, total, 1.0)).astype(q_BHTC.dtype).reshape(q_BHTC.shape)


def _xla(q_QKWGTC, keys: Stored, values: Stored, see_QWTS, scale, softcap):
  """m, t [Q, K, W, G, T, 1] and o [Q, K, W, G, T, C], float32, of one cache."""
  Q, K, *lead, C = q_QKWGTC.shape
  see = see_QWTS[:, None, :, None]
  # Rows, heads and tokens fold into the rows of one product per (q, k).
  q = q_QKWGTC.reshape(Q, K, -1, C)
  # Else a CPU converts the caches of all layers first (before JAX 0.11.2 it does all the same).
  if keys.scale_BK1S is not None:
    q, keys, values = jax.lax.optimization_barrier((q, keys, values))
  x = _scores(q, keys.values_BKSC.astype(q.dtype)) * scale
  if keys.scale_BK1S is not None:
    x = x * keys.scale_BK1S
  if softcap is not None:
    x = softcap * jnp.tanh(x / softcap)
  x = jnp.where(see, x.reshape(Q, K, *lead, -1), MASKED)
  m = jnp.max(x, axis=-1, keepdims=True)
  weights = jnp.where(see, jnp.exp(x - m), 0.0)
  t = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.reshape(Q, K, -1, weights.shape[-1])
  if values.scale_BK1S is not None:
    weights = weights * values.scale_BK1S
  o = dot(weights.astype(q.dtype), values.values_BKSC.astype(q.dtype), 3, 2)
  return m, t, o.reshape(Q, K, *lead, C)


def _scores(q_QKMC, k_QKSC):
  """q k^T, float32 [Q, K, M, S]. A CPU packs what is on the right: the smaller, as in `dense`."""
  plain = lambda q, k: dot(q, k, 3, 3)
  few = q_QKMC.shape[2] <= min(dense.FEW_ROWS, k_QKSC.shape[2])
  if not few or q_QKMC.dtype != jnp.float32:  # bfloat16 was not measured
    return plain(q_QKMC, k_QKSC)
  left = lambda q, k: jax.lax.optimization_barrier(dot(k, q, 3, 3)).swapaxes(2, 3)
  return jax.lax.platform_dependent(q_QKMC, k_QKSC, cpu=left, default=plain)


def _gpu(q_QKWGTC, keys: Stored, values: Stored, see_QWTS, scale, softcap, beside=None):
  """The same, and of a token beside the cache: (k, v) [Q, K, C], see [Q]."""
  Q, K, *lead, C = q_QKWGTC.shape
  q, see = q_QKWGTC.reshape(Q, K, -1, C), see_QWTS.reshape(Q, -1, see_QWTS.shape[-1])
  sums = decode_attention_gpu.sums(q, keys, values, see, beside, lead[-1], scale, softcap)
  return tuple(x.reshape(Q, K, *lead, -1) for x in sums)


BACKENDS = {'xla': _xla, 'pallas_gpu': _gpu}


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
    ('long', 6, 2, 6, 2, 1, 400, 130, 32, None),
    ('many rows of several tokens', 20, 1, 4, 1, 3, 40, 70, 16, None),
  ]
