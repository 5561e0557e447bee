"""The softmax as three sums that merge, and the gradient as numbers per row (see the package)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

OUTSIDE = -1e30  # the bias, and the logit, of rows that are not of the vocabulary


class Sums(NamedTuple):
  """Of one row of logits z, or of a part of it; float32."""

  top: jax.Array  # m = max z
  total: jax.Array  # l = sum exp(z - m)
  moment: jax.Array  # u = sum exp(z - m) (z - m)


class Slopes(NamedTuple):
  """dz_v = target 1[v = target] - exp(z_v - top) (constant + linear (z_v - top)); float32 [R]."""

  top: jax.Array
  constant: jax.Array
  linear: jax.Array
  target: jax.Array


def merge(sums: Sums, top, add) -> Sums:
  """The sums of all parts. top, add: reduce an array of what the parts hold."""
  m = top(sums.top)
  shift = sums.top - jnp.broadcast_to(m, sums.top.shape)
  weight = jnp.exp(shift)
  total, moment = add((weight * sums.total, weight * (sums.moment + shift * sums.total)))
  return Sums(m, total, moment)


def slopes(sums: Sums, entropy_R, a_R, e_R) -> Slopes:
  """From the derivatives of the loss by log-probability and entropy."""
  constant = (a_R + e_R * (entropy_R - jnp.log(sums.total))) / sums.total
  return Slopes(sums.top, constant, e_R / sums.total, a_R)


def dlogits(z, hit, slopes: Slopes, axis: int):
  """dz; the numbers per row get a new `axis`. hit: bool, where v is the row's target."""
  top, constant, linear, target = (jnp.expand_dims(x, axis) for x in slopes)
  gap = z - top
  dz = -jnp.exp(gap) * (constant + linear * gap)
  return jnp.where(hit, dz + target, dz)


def cap(z, softcap: float | None):
  """softcap * tanh(z / softcap) (Gemma 2, arXiv 2408.00118), or z."""
  return z if softcap is None else softcap * jnp.tanh(z / softcap)
