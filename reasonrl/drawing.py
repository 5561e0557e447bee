"""From logits and one uniform per row to a token: inverse CDF, top-k, top-p, min-p.

Weights are exp(logit - the largest), not normalised; what a truncation leaves out has weight 0. No
sort of the vocabulary anywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from reasonrl import types

BLOCK = 256  # vocabulary entries per block of the two-level inverse CDF


def inverse_cdf(weight_BV, u_B):
  """The token whose interval of the cumulative weights holds u * total, by blocks of BLOCK.

  Args:
    weight_BV: float32 >= 0, not normalised, some entry positive.
    u_B: float32 in [0, 1).

  Returns:
    int32 [B]; never a token of weight 0.
  """
  B, V = weight_BV.shape
  blocks = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
  sums = blocks.sum(-1)
  block_cdf = jnp.cumsum(sums, axis=-1)
  goal_B = u_B * block_cdf[:, -1]
  block_B = _first_above(sums, block_cdf, goal_B)
  before_B = jnp.take_along_axis(block_cdf, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0]
  goal_B = goal_B - jnp.where(block_B > 0, before_B, 0.0)
  inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
  index_B = _first_above(inside, jnp.cumsum(inside, axis=-1), goal_B)
  return (block_B * BLOCK + index_B).astype(jnp.int32)


def _first_above(weight_BN, cdf_BN, goal_B):
  """The first entry of positive weight whose cdf exceeds the goal, else the last such weight.

  Rounding may put the goal just below the first interval or past the last one, and a parallel sum
  may rise at an entry of weight 0.
  """
  positive = ~(weight_BN <= 0)  # NaN included: even then the result is an entry, not padding
  above = positive & (cdf_BN > goal_B[:, None])
  last_B = weight_BN.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
  return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last_B)


def keep_top_k(weight_BV, k: int):
  """Weights below the k-th largest become 0; ties with it stay."""
  if k == 0 or k >= weight_BV.shape[1]:
    return weight_BV
  return _at_least(weight_BV, jax.lax.top_k(weight_BV, k)[0][:, -1:])


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


def kept_ids(weight_BV, most: int):
  """int32 [B, most]: ids of positive weight, the largest first, then -1; and how many there are."""
  value_BK, id_BK = jax.lax.top_k(weight_BV, most)
  return jnp.where(value_BK > 0, id_BK, -1), jnp.sum(weight_BV > 0, axis=-1, dtype=jnp.int32)


def draw(z_BV, u_B, spec: types.Spec):
  """token_B, its log-probability, and the weights that both come from; z_BV already tempered."""
  top_B = jnp.max(z_BV, axis=-1, keepdims=True)
  weight_BV = jnp.exp(z_BV - top_B)
  if spec.temperature == 0:
    # The first index of the maximum: on a CPU three times faster than argmax.
    V = z_BV.shape[1]
    first_B = jnp.min(jnp.where(z_BV == top_B, jnp.arange(V)[None, :], V), axis=-1)
    token_B = jnp.minimum(first_B, V - 1).astype(jnp.int32)
  else:
    weight_BV = keep_top_p(keep_top_k(weight_BV, spec.top_k), spec.top_p)
    weight_BV = keep_min_p(weight_BV, spec.min_p)
    token_B = inverse_cdf(weight_BV, u_B)
  z_B = jnp.take_along_axis(z_BV, token_B[:, None], axis=1)[:, 0]
  return token_B, z_B - top_B[:, 0] - jnp.log(weight_BV.sum(-1)), weight_BV
