"""The portable back end: logits of a chunk as [V, R], three products, the rest fused by XLA.

The vocabulary comes first because the sums then run over the leading axis, which vectorises on
CPUs, and because both products of the gradient read dz_VR as it lies.
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


def most_rows(rows: int, D: int, form) -> int:
  del D, form
  return rows


def weights(head_VD, bias_V, form):
  """The head in its compute dtype, once per call and not per chunk."""
  return head_VD.astype(form[3]), bias_V


def forward(weights, hidden_RD, targets_R, support, form, keep: bool):
  """Sums [R], the target's logit [R] (0 where another device has it), and what `backward` reads."""
  z_VR, slope = _logits(weights, hidden_RD, support, form)
  top = z_VR.max(axis=0)
  # Three loops over z_VR: XLA's CPU compiler does not vectorise sums that share one.
  total = jnp.exp(z_VR - top[None]).sum(axis=0)
  gap_VR = jax.lax.optimization_barrier(z_VR) - top[None]
  moment = (jnp.exp(gap_VR) * gap_VR).sum(axis=0)
  V = z_VR.shape[0]
  z_target = jnp.take_along_axis(z_VR, jnp.minimum(targets_R, V - 1)[None], axis=0)[0]
  z_target = jnp.where(targets_R < V, z_target, 0.0)
  return softmax.Sums(top, total, moment), z_target, (z_VR, slope) if keep else None


def backward(weights, saved, hidden_RD, targets_R, support, slopes, dhead_VD, form):
  """dhidden_RD (of this part of the vocabulary), and dhead_VD with this chunk's share added."""
  del support
  (head_VD, _), (z_VR, slope), (scale, _, _, compute_dtype) = weights, saved, form
  hit_VR = jnp.arange(z_VR.shape[0])[:, None] == targets_R[None]
  dz_VR = softmax.dlogits(jax.lax.optimization_barrier(z_VR), hit_VR, slopes, 0) * (slope * scale)
  dz_VR = dz_VR.astype(compute_dtype)
  dhead_VD = dhead_VD + dense.contract(dz_VR, hidden_RD, (1, 0), compute_dtype)
  # On a CPU, bf16 products over the leading axis of both operands are slow or do not exist: there
  # the head is transposed for real, once, because the loop does not change it.
  head_DV = _lying_as_written(head_VD.T)
  dhidden_DR = _lying_as_written(dense.contract(head_DV, dz_VR, (1, 0), compute_dtype))
  return dhidden_DR.T, dhead_VD


def _lying_as_written(x):
  """On a CPU, in memory as its axes say; elsewhere as the compiler likes."""
  major_to_minor = layout.Layout(tuple(range(x.ndim)))
  return jax.lax.platform_dependent(
    x, cpu=lambda x: layout.with_layout_constraint(x, major_to_minor), default=lambda x: x
  )


def _logits(weights, hidden_RD, support, form):
  """z_VR on the support of each token, and its derivative by scale * h . W there."""
  (head_VD, bias_V), (scale, softcap, temperature, compute_dtype) = weights, form
  z_VR = dense.contract(head_VD, hidden_RD, (1, 1), compute_dtype) * scale
  z_VR = softmax.cap(z_VR, softcap)
  slope = 1.0 if softcap is None else 1.0 - (z_VR / softcap) ** 2
  if 'plain' in support:
    temperature = jnp.where(support['plain'][None, :] > 0, 1.0, temperature)
  z_VR = (z_VR + bias_V[:, None]) / temperature
  if 'barred' in support:
    z_VR = jnp.where(_holds(support['barred'], z_VR.shape), -1e9, z_VR)
  if 'kept' in support:  # a token without any keeps all of them
    whole_R = jnp.all(support['kept'] < 0, axis=1)
    z_VR = jnp.where(_holds(support['kept'], z_VR.shape) | whole_R[None], z_VR, -1e9)
  return z_VR, slope / temperature


def _holds(id_RK, shape):
  """bool [V, R]: the ids of each row, -1 = none."""
  id_RK = jnp.where(id_RK < 0, shape[0], id_RK)  # outside of the array, which drops the write
  return jnp.zeros(shape, bool).at[id_RK, jnp.arange(shape[1])[:, None]].set(True, mode='drop')
