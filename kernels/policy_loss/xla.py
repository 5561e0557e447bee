"""The portable back end: XLA's products and loops, over tiles of the vocabulary.

Logits lie as [V, R]: sums then run over the leading axis, which vectorises on CPUs, and the product
that makes the gradient of the head reads dz_VR as it lies. A tile is small enough to stay near the
cores of a CPU between the product that makes it and what reads it; the logits of the whole chunk
are kept only if a gradient will want them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import layout

from reasonrl.kernels import dense
from reasonrl.kernels.policy_loss import softmax

SUPPORT = {'kept', 'barred', 'plain'}
ROW_MULTIPLE = 1
TIE = 0.0  # the target's logit is one of those that the maximum is of
TILE = 4  # words per tile and row of a chunk


def most_rows(rows: int, D: int, form) -> int:
  del D, form
  return rows


def weights(head_VD, bias_V, form):
  """The head in its compute dtype, once per call and not per chunk."""
  return head_VD.astype(form[3]), bias_V


def forward(weights, hidden_RD, targets_R, support, form, keep: bool):
  """Sums [R], the target's logit [R] (0 where another device has it), and what `backward` reads."""
  (head_VD, bias_V), R, V = weights, targets_R.shape[0], weights[0].shape[0]
  hidden_RD = hidden_RD.astype(form[3])
  rows = jnp.arange(R)

  def tile(start, size, carry):
    sums, z_target, kept_VR = carry
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
    z = _logits(part(head_VD), part(bias_V), hidden_RD, start, support, form)
    sums = softmax.more(sums, z, 0)
    own, inside = _own(targets_R, start, size)
    z_target = z_target + jnp.where(inside, z[jnp.minimum(own, size - 1), rows], 0.0)
    if keep:
      kept_VR = jax.lax.dynamic_update_slice_in_dim(kept_VR, z, start, 0)
    return sums, z_target, kept_VR

  kept_VR = jnp.zeros((V, R), jnp.float32) if keep else None
  return _over_tiles(tile, V, R, (softmax.none(R), jnp.zeros(R), kept_VR))


def backward(weights, z_VR, hidden_RD, targets_R, support, slopes, dhead_VD, form):
  """dhidden_RD (of this part of the vocabulary), and dhead_VD with this chunk's share added."""
  (head_VD, bias_V), (scale, softcap, _, compute_dtype) = weights, form
  V, R = z_VR.shape
  hidden_RD = hidden_RD.astype(compute_dtype)
  temperature_R = softmax.temperatures(support, form[2], R)

  def tile(start, size, carry):
    dhidden_RD, dhead_VD = carry
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
    z = part(z_VR)
    hit = jnp.arange(size)[:, None] == _own(targets_R, start, size)[0][None]
    dz = softmax.dlogits(z, hit, slopes, 0) * (scale / temperature_R)[None]
    if softcap is not None:
      capped = z * temperature_R[None] - part(bias_V)[:, None]
      dz = dz * (1.0 - jnp.clip(capped / softcap, -1.0, 1.0) ** 2)
    dz = dz.astype(compute_dtype)
    more = part(dhead_VD) + dense.contract(dz, hidden_RD, (1, 0), compute_dtype)
    dhead_VD = jax.lax.dynamic_update_slice_in_dim(dhead_VD, more, start, 0)
    # In bfloat16, products over both leading axes are slow on a CPU or do not exist.
    dz_RV = _lying_as_written(dz.T)
    dhidden_RD = dhidden_RD + dense.contract(dz_RV, part(head_VD), (1, 0), compute_dtype)
    return dhidden_RD, dhead_VD

  dhidden_RD = jnp.zeros((R, head_VD.shape[1]), jnp.float32)
  return _over_tiles(tile, V, R, (dhidden_RD, dhead_VD))


def _over_tiles(tile, V, R, carry):
  """carry -> tile(first word, number of words, carry), for all words in order."""
  size = min(TILE * R, V)
  step = lambda i, carry: tile(i * size, size, carry)
  carry = jax.lax.fori_loop(0, V // size, step, carry)
  return tile(V - V % size, V % size, carry) if V % size else carry


def _logits(head_VD, bias_V, hidden_RD, start, support, form):
  """z_VR of the words from `start` on, on the support of each token."""
  scale, softcap, temperature, compute_dtype = form
  z_VR = dense.contract(head_VD, hidden_RD, (1, 1), compute_dtype) * scale
  z_VR = softmax.cap(z_VR, softcap) + bias_V[:, None]
  z_VR = z_VR / softmax.temperatures(support, temperature, hidden_RD.shape[0])[None]
  if 'barred' in support:
    z_VR = jnp.where(_holds(support['barred'], start, z_VR.shape), -1e9, z_VR)
  if 'kept' in support:  # a token without any keeps all of them
    whole_R = jnp.all(support['kept'] < 0, axis=1)
    z_VR = jnp.where(_holds(support['kept'], start, z_VR.shape) | whole_R[None], z_VR, -1e9)
  return z_VR


def _own(ids, start, size):
  """Ids as rows of a tile, `size` where they are none of it; and whether they are."""
  own = ids - start
  inside = (own >= 0) & (own < size)
  return jnp.where(inside, own, size), inside


def _holds(id_RK, start, shape):
  """bool [V, R]: the ids of each row among the words of a tile, -1 = none."""
  own_RK, _ = _own(jnp.where(id_RK < 0, start + shape[0], id_RK), start, shape[0])
  # What is none of the tile lies outside of the array, which drops the write.
  return jnp.zeros(shape, bool).at[own_RK, jnp.arange(shape[1])[:, None]].set(True, mode='drop')


def _lying_as_written(x):
  """On a CPU, in memory as its axes say; elsewhere as the compiler likes."""
  major_to_minor = layout.Layout(tuple(range(x.ndim)))
  return jax.lax.platform_dependent(
    x, cpu=lambda x: layout.with_layout_constraint(x, major_to_minor), default=lambda x: x
  )
