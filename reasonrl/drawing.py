"""From logits and one uniform per row to a token: inverse CDF, top-k, top-p, min-p.

Weights are exp(logit - the largest), not normalised; what a truncation leaves out has weight 0. No
sort of the vocabulary anywhere.

`shards`: devices that the vocabulary is split over, each with a stretch of it; it must divide V.
Each works on its own stretch, and what they exchange are numbers per row, and k candidates each of
the k largest: the compiler splits the axis of shards, and never gathers [B, V].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reasonrl import types

BLOCK = 256  # vocabulary entries per block of the two-level inverse CDF


class Draw(NamedTuple):
  """One token per row."""

  token_B: Any  # int32
  logp_B: Any  # of what it was drawn from: tempered, truncated, renormalised
  plain_B: Any  # at temperature 1, nothing left out, no control
  entropy_B: Any  # nats, tempered, before anything is left out
  weight_BV: Any  # what it was drawn from, not normalised


def inverse_cdf(weight_BV, u_B, shards: int = 1):
  """The token whose interval of the cumulative weights holds u * total, by blocks of BLOCK.

  Args:
    weight_BV: float32 >= 0, not normalised, some entry positive.
    u_B: float32 in [0, 1).

  Returns:
    int32 [B]; never a token of weight 0.
  """
  B, V = weight_BV.shape
  n = V // shards
  parts = weight_BV.reshape(B, shards, n)
  blocks = jnp.pad(parts, ((0, 0), (0, 0), (0, -n % BLOCK))).reshape(B, shards, -1, BLOCK)
  sums = blocks.sum(-1)
  block_cdf = jnp.cumsum(sums, axis=-1)
  total_BZ = block_cdf[..., -1]
  goal_B = u_B * jnp.cumsum(total_BZ, axis=-1)[:, -1]
  shard_B, goal_B = _interval(total_BZ, jnp.cumsum(total_BZ, axis=-1), goal_B)
  # Every shard looks for the goal in its stretch, and one is right.
  goal_BZ = jnp.broadcast_to(goal_B[:, None], (B, shards))
  block_BZ, goal_BZ = _interval(sums, block_cdf, goal_BZ)
  inside = jnp.take_along_axis(blocks, block_BZ[..., None, None], axis=2)[:, :, 0]
  index_BZ = _first_above(inside, jnp.cumsum(inside, axis=-1), goal_BZ)
  shard = jnp.arange(shards)[None]
  token_BZ = shard * n + block_BZ * BLOCK + index_BZ
  return jnp.sum(jnp.where(shard == shard_B[:, None], token_BZ, 0), axis=-1).astype(jnp.int32)


def _interval(weight, cdf, goal):
  """The interval [...] of the last axis that holds the goal, and how far into it that is."""
  at = _first_above(weight, cdf, goal)
  before = jnp.take_along_axis(cdf, jnp.maximum(at - 1, 0)[..., None], axis=-1)[..., 0]
  return at, goal - jnp.where(at > 0, before, 0.0)


def _first_above(weight, cdf, goal):
  """The first entry of positive weight whose cdf exceeds the goal, else the last such weight.

  Rounding may put the goal just below the first interval or past the last one, and a parallel sum
  may rise at an entry of weight 0.
  """
  positive = ~(weight <= 0)  # NaN included: even then the result is an entry, not padding
  above = positive & (cdf > goal[..., None])
  last = weight.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], axis=-1)
  return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last)


def _largest(weight_BV, k: int, shards: int):
  """The k largest weights of each row and their ids, the largest first, the first of equals first.

  Returns:
    float32 and int32 [B, at most k].
  """
  B, V = weight_BV.shape
  n = V // shards
  value, index = jax.lax.top_k(weight_BV.reshape(B, shards, n), min(k, n))
  value, index = (
    value.reshape(B, -1),
    (index + n * jnp.arange(shards)[None, :, None]).reshape(B, -1),
  )
  if shards == 1:
    return value, index
  value, at = jax.lax.top_k(value, min(k, V))
  return value, jnp.take_along_axis(index, at, axis=1)


def keep_top_k(weight_BV, k: int, shards: int = 1):
  """Weights below the k-th largest become 0; ties with it stay."""
  if k == 0 or k >= weight_BV.shape[1]:
    return weight_BV
  return _at_least(weight_BV, _largest(weight_BV, k, shards)[0][:, -1:])


def keep_top_p(weight_BV, p: float):
  """The smallest set of largest weights whose share is at least p (arXiv 1904.09751); ties stay.

  The threshold is found by bisection over the bit patterns of non-negative floats, which are
  ordered like the floats: exact, and no sort of the vocabulary.
  """
  if p >= 1.0:
    return weight_BV
  goal = p * weight_BV.sum(-1)
  bits_BV = jax.lax.bitcast_convert_type(weight_BV, jnp.int32)

  def halve(_, bounds):  # the largest threshold that still keeps the goal is in [low, high)
    low, high = bounds
    middle = low + (high - low) // 2
    enough = jnp.sum(jnp.where(bits_BV >= middle[:, None], weight_BV, 0.0), -1) >= goal
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low = jnp.zeros(weight_BV.shape[0], jnp.int32)
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, bits_BV.max(-1) + 1))
  return _at_least(weight_BV, jax.lax.bitcast_convert_type(low, jnp.float32)[:, None])


def keep_min_p(weight_BV, p: float):
  """The weights that are at least p times the largest (arXiv 2407.01082)."""
  if p == 0.0:
    return weight_BV
  return _at_least(weight_BV, p * jnp.max(weight_BV, axis=-1, keepdims=True))


def _at_least(weight_BV, least_B1):
  """Smaller weights become 0. NaN stays: a row of it must still give an id."""
  return jnp.where(weight_BV < least_B1, 0.0, weight_BV)


def kept_ids(weight_BV, most: int, shards: int = 1):
  """int32 [B, most]: ids of positive weight, the largest first, then -1; and how many there are."""
  value_BK, id_BK = _largest(weight_BV, most, shards)
  return jnp.where(value_BK > 0, id_BK, -1), jnp.sum(weight_BV > 0, axis=-1, dtype=jnp.int32)


def draw(plain_BV, z_BV, u_B, spec: types.Spec, temperature_B=None, shards: int = 1) -> Draw:
  """One token per row.

  Args:
    plain_BV: logits at temperature 1, float32.
    z_BV: the same with what controls forbid; the temperature is still to come.
    u_B: uniforms.
    temperature_B: of each row, in the place of the spec's, which must not be 0.

  At temperature 0 the most likely token is taken of all; what is reported is of temperature 1.
  """
  sampled = spec.temperature > 0
  greedy_B = None if temperature_B is None else temperature_B == 0
  if temperature_B is not None:
    y_BV = z_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
  else:
    y_BV = z_BV / spec.temperature if spec.temperature else z_BV
  top_B1 = jnp.max(y_BV, axis=-1, keepdims=True)
  whole_BV = weight_BV = jnp.exp(y_BV - top_B1)
  if sampled:
    weight_BV = keep_top_p(keep_top_k(weight_BV, spec.top_k, shards), spec.top_p)
    weight_BV = keep_min_p(weight_BV, spec.min_p)
  if greedy_B is not None and weight_BV is not whole_BV:  # of greedy rows nothing is left out
    weight_BV = jnp.where(greedy_B[:, None], whole_BV, weight_BV)
  token_B = inverse_cdf(weight_BV, u_B, shards) if sampled else None
  if not sampled or greedy_B is not None:
    # The first index of the maximum: on a CPU three times faster than argmax.
    V = z_BV.shape[1]
    first_B = jnp.min(jnp.where(y_BV == top_B1, jnp.arange(V)[None, :], V), axis=-1)
    first_B = jnp.minimum(first_B, V - 1).astype(jnp.int32)
    token_B = jnp.where(greedy_B, first_B, token_B) if sampled else first_B
  at = lambda x_BV: jnp.take_along_axis(x_BV, token_B[:, None], axis=1)[:, 0]
  logp_B = at(y_BV) - top_B1[:, 0] - jnp.log(weight_BV.sum(-1))
  total_B = whole_BV.sum(-1)
  mean_B = jnp.where(whole_BV > 0, whole_BV * (y_BV - top_B1), 0.0).sum(-1) / total_B
  top_B1 = jnp.max(plain_BV, axis=-1, keepdims=True)
  plain_B = at(plain_BV) - top_B1[:, 0] - jnp.log(jnp.exp(plain_BV - top_B1).sum(-1))
  return Draw(token_B, logp_B, plain_B, jnp.log(total_B) - mean_B, weight_BV)
