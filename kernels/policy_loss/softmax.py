"""The softmax as three sums that merge, and the gradient as numbers per row (see the package)."""

from __future__ import annotations

import functools
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


def more(sums: Sums, z, axis: int | None) -> Sums:
  """The sums with more logits: those along `axis`, or one for each of the sums (None)."""
  if axis is None:
    reduce_max, reduce_sum, expand = (lambda x: x,) * 3
  else:
    reduce_max, reduce_sum = (functools.partial(f, axis=axis) for f in (jnp.max, jnp.sum))
    expand = functools.partial(jnp.expand_dims, axis=axis)
  top = jnp.maximum(sums.top, reduce_max(z))
  shift, gap = sums.top - top, z - expand(top)
  weight, e = jnp.exp(shift), jnp.exp(gap)
  moment = weight * (sums.moment + shift * sums.total) + reduce_sum(e * gap)
  return Sums(top, weight * sums.total + reduce_sum(e), moment)


def none(shape) -> Sums:
  """The sums of no logits."""
  zeros = jnp.zeros(shape, jnp.float32)
  return Sums(jnp.full(shape, OUTSIDE, jnp.float32), zeros, zeros)


def temperatures(support, temperature: float, R: int):
  """[R]: 1 for what is scored as text."""
  temperature_R = jnp.full(R, temperature, jnp.float32)
  if 'plain' in support:
    temperature_R = jnp.where(support['plain'] > 0, 1.0, temperature_R)
  return temperature_R


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
