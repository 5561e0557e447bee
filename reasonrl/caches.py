"""Keys and values of rows that are being decoded: what each row has, and what several rows share.

A row's own slots hold its tokens one after the other; slot s holds position `base + s`, where base
is 0, or the number of tokens that the row sees in the shared part. The B rows of a cache share its
Q prefixes in order: the first B / Q rows the first one.

A layer's cache is [B, K, S, C], heads before slots: so a write of one token per row is in place on
every platform. The layers of a scanned model are stacked in front.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from reasonrl import ops
from reasonrl.ops import Stored


class Layer(NamedTuple):
  keys: Stored
  values: Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a decoder remembers."""

  own: tuple[Layer, ...] | Layer  # [B, K, S, C] a layer; scanned: one Layer [N, B, K, S, C]
  shared: tuple[Layer, ...] | Layer | None  # [Q, K, P, C]
  length_Q: jax.Array | None  # int32, how many slots of the shared part its rows see

  @property
  def slots(self) -> int:
    """S."""
    return jax.tree.leaves(self.own)[0].shape[-2]

  @property
  def rows(self) -> int:
    """B."""
    return jax.tree.leaves(self.own)[0].shape[-4]

  @property
  def width(self) -> int:
    """Rows that share a prefix: B / Q; 1 where nothing is shared."""
    return 1 if self.shared is None else self.rows // self.length_Q.size

  def base_B(self):
    """int32 [B]: the position of a row's slot 0."""
    if self.shared is None:
      return jnp.zeros(self.rows, jnp.int32)
    return jnp.repeat(self.length_Q, self.width)


def empty(layers: int, scanned: bool, rows: int, heads: int, slots: int, channels: int, dtype):
  """A cache without tokens; dtype int8: quantised."""

  def stored():
    lead = (layers, rows) if scanned else (rows,)
    values = jnp.zeros((*lead, heads, slots, channels), dtype)
    if values.dtype != jnp.int8:
      return Stored(values, None)
    return Stored(values, jnp.zeros((*lead, heads, 1, slots), jnp.float32))

  layer = lambda: Layer(stored(), stored())
  return Cache(layer() if scanned else tuple(layer() for _ in range(layers)), None, None)


def write(layer: Layer, keys_BKTC, values_BKTC, slots_BT, segments_BT) -> Layer:
  """Puts token t of row b into slot slots[b, t]; segment 0 is not written."""
  S = layer.keys.values_BKSC.shape[2]
  if slots_BT.shape[1] == 1:
    # One token per row: in place on every platform. A finished row rewrites its last token's slot.
    put = jax.vmap(lambda x, new, at: jax.lax.dynamic_update_slice(x, new, (0, at, 0)))
    scale = jax.vmap(lambda x, new, at: jax.lax.dynamic_update_slice(x, new, (0, 0, at)))
    at = slots_BT[:, 0]
  else:
    put = jax.vmap(lambda x, new, at: x.at[:, at].set(new, mode='drop'))
    scale = jax.vmap(lambda x, new, at: x.at[:, :, at].set(new, mode='drop'))
    at = jnp.where(segments_BT > 0, slots_BT, S)

  def one(old: Stored, new) -> Stored:
    if old.scale_BK1S is None:
      return Stored(put(old.values_BKSC, new.astype(old.values_BKSC.dtype), at), None)
    new = ops.quantize(new)
    return Stored(put(old.values_BKSC, new[0], at), scale(old.scale_BK1S, new[1], at))

  return Layer(one(layer.keys, keys_BKTC), one(layer.values, values_BKTC))


def visible(positions_BT, base, slots: int, window: int | None, length_B=None):
  """bool [B, T, S]: the slots that a token sees, of which the first holds position `base`.

  base: int32 [B] or 0. length_B: slots that hold anything; None: all up to the token's own.
  """
  slot = jnp.arange(slots)[None, None, :]
  at_BT1 = (positions_BT - jnp.reshape(base, (-1, 1)))[:, :, None]
  see = slot <= at_BT1 if length_B is None else slot < length_B[:, None, None]
  if window is not None:
    see &= at_BT1 - slot < window
  return see


def _rows(x, rows, axis):
  return jnp.take(x, rows, axis=axis, mode='clip')


def take(cache: Cache, rows_B, groups_Q=None) -> Cache:
  """Row i of the result is a copy of row rows_B[i], and prefix q of prefix groups_Q[q]."""
  own = jax.tree.map(lambda x: _rows(x, rows_B, x.ndim - 4), cache.own)
  if cache.shared is None:
    return Cache(own, None, None)
  shared = jax.tree.map(lambda x: _rows(x, groups_Q, x.ndim - 4), cache.shared)
  return Cache(own, shared, cache.length_Q[groups_Q])


def put(cache: Cache, new: Cache, rows_B) -> Cache:
  """`cache` with the own slots of `new` at rows_B; rows past the end are dropped."""

  def one(old, new):
    at = (slice(None),) * (old.ndim - 4)
    return old.at[(*at, rows_B)].set(new, mode='drop')

  return dataclasses.replace(cache, own=jax.tree.map(one, cache.own, new.own))


def grow(cache: Cache, slots: int) -> Cache:
  """The cache with so many slots, at least as many as it has."""

  def pad(x, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, widths)

  def one(stored: Stored) -> Stored:
    scale = stored.scale_BK1S
    return Stored(pad(stored.values_BKSC, -2), None if scale is None else pad(scale, -1))

  is_stored = lambda x: isinstance(x, Stored)
  return dataclasses.replace(cache, own=jax.tree.map(one, cache.own, is_leaf=is_stored))


def share(prefixes: Cache, length_Q, rows: Cache) -> Cache:
  """Rows without tokens behind prefixes, of whose slots they see the first length_Q."""
  return Cache(rows.own, prefixes.own, length_Q)
