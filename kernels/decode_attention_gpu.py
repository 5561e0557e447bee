"""One part of `decode_attention` as one GPU kernel (Triton), which writes no scores.

A program has the queries of a key head that look at the same cache, MOST at a time, each time
reading it once, and every N-th block of its slots, up to the last one that anybody sees: room that
a cache has not used yet costs nothing. Online sums as in arXiv 2205.14135, algorithm 1; the
programs that share a cache merge afterwards (Flash-Decoding).

Compiled for compute capability 9.0 in the tests, and run on an H100 with heads of 32, 64 and 128.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from reasonrl.kernels.attention import MASKED

SLOTS = 64  # per block
LEAST, MOST = 16, 64  # queries of one product
WARPS, STAGES = 4, 3
PROGRAMS = 264  # to keep the device busy: two for each multiprocessor of an H100
INTERPRET = False  # True: run without a GPU


def supports(head_dim: int) -> bool:
  """Whether it can do heads of this size: tiles are powers of two, and those of 256 too large."""
  return head_dim in (16, 32, 64, 128)


def sums(q_QKRC, keys, values, see_QXS, beside, T: int, scale, softcap):
  """Sums over the visible slots of one cache, and over a token beside it.

  Args:
    q_QKRC: of all rows that share a cache, R = rows x G x T in this order, the last one fastest.
    keys, values: `Stored`, [Q, K, S, C].
    see_QXS: bool, X = rows x T: what each token of each row sees.
    beside: None, or (k, v, see) of one token beside the cache: [Q, K, C] twice and bool [Q].
    T: tokens of a row.

  Returns:
    m, t [Q, K, R] and o [Q, K, R, C], float32: see `decode_attention`.

  Raises:
    ValueError: not for heads of this size.
  """
  Q, K, R, C = q_QKRC.shape
  if not supports(C) and not INTERPRET:
    raise ValueError(
      f'decode_attention_gpu: head_dim={C} is not one of 16, 32, 64, 128; xla does it'
    )
  X, S = see_QXS.shape[1:]
  tile = min(MOST, max(LEAST, pl.next_power_of_2(R)))
  tiles, blocks = pl.cdiv(R, tile), pl.cdiv(S, SLOTS)
  N = max(1, min(blocks, PROGRAMS // (Q * K * tiles)))
  seen_S = jnp.arange(1, S + 1)[None] * see_QXS.any(axis=1)
  scaled = keys.scale_BK1S is not None
  mine = lambda *shape: pl.BlockSpec(
    (None, None, *shape), lambda i, k, _: (i, k, *[0] * len(shape))
  )
  all_heads = lambda *shape: pl.BlockSpec((None, *shape), lambda i, k, _: (i, *[0] * len(shape)))
  args = [(q_QKRC, mine(R, C)), (keys.values_BKSC, mine(S, C)), (values.values_BKSC, mine(S, C))]
  args += [(see_QXS, all_heads(X, S)), (seen_S.max(axis=1, keepdims=True), all_heads(1))]
  if scaled:
    args += [(x.scale_BK1S[:, :, 0], mine(S)) for x in (keys, values)]
  if beside is not None:
    k_QKC, v_QKC, see_Q = beside
    args += [(k_QKC, mine(C)), (v_QKC, mine(C)), (see_Q[:, None], all_heads(1))]
  form = {'T': T, 'tile': tile, 'tiles': tiles, 'N': N, 'scale': scale, 'softcap': softcap}
  kernel = functools.partial(_kernel, scaled=scaled, beside=beside is not None, **form)
  number = jax.ShapeDtypeStruct((Q, K, N, R), jnp.float32)
  vector = jax.ShapeDtypeStruct((Q, K, N, R, C), jnp.float32)
  m, t, o = pl.pallas_call(
    kernel,
    name='decode_attention',
    grid=(Q, K, tiles * N),
    in_specs=[spec for _, spec in args],
    out_specs=[mine(N, R), mine(N, R), mine(N, R, C)],
    out_shape=[number, number, vector],
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    interpret=INTERPRET,
  )(*(x for x, _ in args))
  top = m.max(axis=2)
  shrink = jnp.exp(m - top[:, :, None])
  return top, (shrink * t).sum(axis=2), (shrink[..., None] * o).sum(axis=2)


def _kernel(
  q_ref, k_ref, v_ref, see_ref, seen_ref, *refs, T, tile, tiles, N, scale, softcap, scaled, beside
):
  *refs, m_ref, t_ref, o_ref = refs
  scale_refs, beside_refs = refs[: 2 * scaled], refs[2 * scaled :]
  (R, C), (X, S) = q_ref.shape, see_ref.shape
  n, first = pl.program_id(2) // tiles, pl.program_id(2) % tiles * tile
  at, row = pl.ds(first, tile), first + jnp.arange(tile)
  inside = row < R
  wide = jnp.broadcast_to(inside[:, None], (tile, C))
  q = triton.load(q_ref.at[at, :], mask=wide, other=0)
  exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

  def dot(a, b, axis):
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)

  def cap(x):
    return x if softcap is None else softcap * jnp.tanh(x / softcap)

  def sees(slot, some):
    """[tile, SLOTS]: whether the token of a query sees a slot."""
    if X == 1:
      see = triton.load(see_ref.at[:, some], mask=(slot < S)[None], other=False)
      return jnp.broadcast_to(see, (tile, SLOTS))
    token = row // (R // X * T) * T + row % T
    pairs = (jnp.broadcast_to(x, (tile, SLOTS)) for x in (token[:, None], slot[None]))
    return triton.load(see_ref.at[*pairs], mask=inside[:, None] & (slot < S)[None], other=False)

  def block(j, sums):
    m, t, o = sums
    start = (n + j * N) * SLOTS
    slot = start + jnp.arange(SLOTS)
    there = slot < S
    some = pl.ds(start, SLOTS)
    load = lambda ref: triton.load(
      ref.at[some, :], mask=jnp.broadcast_to(there[:, None], (SLOTS, C)), other=0
    ).astype(q.dtype)
    by = lambda ref: triton.load(ref.at[some], mask=there, other=0.0)[None]
    x = dot(q, load(k_ref), 1) * scale
    x = cap(x * by(scale_refs[0]) if scaled else x)
    see = sees(slot, some)
    top = jnp.maximum(m, jnp.max(jnp.where(see, x, MASKED), axis=1))
    weights = jnp.where(see, jnp.exp(x - top[:, None]), 0.0)
    shrink = jnp.exp(m - top)
    t = t * shrink + weights.sum(axis=1)
    weights = weights * by(scale_refs[1]) if scaled else weights
    o = o * shrink[:, None] + dot(weights.astype(q.dtype), load(v_ref), 0)
    return top, t, o

  m, t = jnp.full(tile, MASKED, jnp.float32), jnp.zeros(tile, jnp.float32)
  o = jnp.zeros((tile, C), jnp.float32)
  if beside:  # counted by the first program
    k, v, see = beside_refs[0][...], beside_refs[1][...], beside_refs[2][0] & (n == 0)
    x = cap(jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None], axis=1) * scale)
    m, t = jnp.where(see, x, m), jnp.where(see, 1.0, t)
    o = jnp.where(see, jnp.broadcast_to(v.astype(jnp.float32)[None], o.shape), o)
  blocks = pl.cdiv(seen_ref[0], SLOTS)
  m, t, o = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(blocks - n, 0), N), block, (m, t, o))
  triton.store(m_ref.at[n, at], m, mask=inside)
  triton.store(t_ref.at[n, at], t, mask=inside)
  triton.store(o_ref.at[n, at, :], o, mask=wide)
