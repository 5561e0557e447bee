"""Keys and values of rows that are being decoded: what each row has, and what several rows share.

A step writes one slot, the same in all rows, so the write is in place on every platform, whatever
the lengths of the rows; `position_BS` says which token of its row a slot holds. A slot is free if
no row needs what is in it. Where rows take tokens back, or are of different lengths when they
begin, slots stay that only some rows use: `tidy` moves every row's tokens to the front.

The B rows share Q prefixes in order, the first B / Q rows the first one.

A layer's cache is [B, K, S, C], heads before slots. The layers of a scanned model are stacked in
front.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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
  position_BS: jax.Array  # int32, of the token in each slot; -1: nothing
  slot: jax.Array  # int32 scalar, where the next tokens go
  shared: tuple[Layer, ...] | Layer | None  # [Q, K, P, C]; slot s holds position s
  length_Q: jax.Array | None  # int32, how many slots of the shared part its rows see

  @property
  def width(self) -> int:
    """Rows that share a prefix: B / Q; 1 where nothing is shared."""
    return 1 if self.shared is None else self.position_BS.shape[0] // self.length_Q.size


def empty(layers: int, scanned: bool, rows: int, heads: int, slots: int, channels: int, dtype):
  """A cache without tokens; dtype int8: quantised."""

  def stored():
    lead = (layers, rows) if scanned else (rows,)
    values = jnp.zeros((*lead, heads, slots, channels), dtype)
    if values.dtype != jnp.int8:
      return Stored(values, None)
    return Stored(values, jnp.zeros((*lead, heads, 1, slots), jnp.float32))

  layer = lambda: Layer(stored(), stored())
  own = layer() if scanned else tuple(layer() for _ in range(layers))
  return Cache(own, jnp.full((rows, slots), -1, jnp.int32), jnp.int32(0), None, None)


def write(cache: Cache, new) -> Cache:
  """Puts T tokens of every row into the next slots, and moves `slot` behind them.

  In place if compilers can tell that all reads come before: see `Decoder.hidden`.

  new: (keys, values), each [B, K, T, C], of every layer; scanned: one pair, [N, B, K, T, C].
  """

  def put(x, new, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), cache.slot, axis)

  def one(old: Stored, new) -> Stored:
    if old.scale_BK1S is None:
      return Stored(put(old.values_BKSC, new, -2), None)
    new = ops.quantize(new)
    return Stored(put(old.values_BKSC, new[0], -2), put(old.scale_BK1S, new[1], -1))

  def layer(old: Layer, new) -> Layer:
    return Layer(one(old.keys, new[0]), one(old.values, new[1]))

  if isinstance(cache.own, Layer):
    own, pairs = layer(cache.own, new), [new]
  else:
    own, pairs = tuple(map(layer, cache.own, new)), new
  return dataclasses.replace(cache, own=own, slot=cache.slot + pairs[0][0].shape[-2])


def note(cache: Cache, positions_BT, segments_BT) -> Cache:
  """The cache with these tokens in the next slots, as far as positions go.

  What a row had from the first of these positions on it has no more. Segment 0 is nobody's token.
  """
  there_BT = segments_BT > 0
  first_B = jnp.min(jnp.where(there_BT, positions_BT, jnp.iinfo(jnp.int32).max), axis=1)
  old_BS = jnp.where(cache.position_BS >= first_B[:, None], -1, cache.position_BS)
  new_BT = jnp.where(there_BT, positions_BT, -1)
  position_BS = jax.lax.dynamic_update_slice(old_BS, new_BT, (0, cache.slot))
  return dataclasses.replace(cache, position_BS=position_BS)


def visible(cache: Cache, positions_BT, segments_BT, window: int | None):
  """bool [B, T, T], [B, T, S], [B, T, P]: what tokens in the next slots, which are noted already,
  see of one another, of the other slots, and of the shared ones (None without any)."""
  near = lambda other: window is None or positions_BT[:, :, None] - other < window
  past = lambda other: other <= positions_BT[:, :, None]
  new_B1T, old_B1S = positions_BT[:, None], cache.position_BS[:, None]
  new = (segments_BT[:, None] > 0) & past(new_B1T) & near(new_B1T)
  slot = jnp.arange(old_B1S.shape[-1])[None, None]
  other = (slot < cache.slot) | (slot >= cache.slot + positions_BT.shape[1])
  own = other & (old_B1S >= 0) & past(old_B1S) & near(old_B1S)
  if cache.shared is None:
    return new, own, None
  slot = jnp.arange(jax.tree.leaves(cache.shared)[0].shape[-2])[None, None]
  shared = (slot < jnp.repeat(cache.length_Q, cache.width)[:, None, None]) & near(slot)
  return new, own, jnp.broadcast_to(shared, (*positions_BT.shape, slot.shape[-1]))


def find_slot(cache: Cache, needed_B) -> tuple[Cache, jax.Array]:
  """The cache with its first free slot as the next one, and whether there is one.

  needed_B: bool, rows whose tokens must stay.
  """
  used_BS = (cache.position_BS >= 0) & needed_B[:, None]
  free_S = ~jnp.any(used_BS, axis=0)
  slot = jnp.argmax(free_S).astype(jnp.int32)
  return dataclasses.replace(cache, slot=slot), jnp.any(free_S)


def used(cache: Cache, needed_B):
  """The most slots that a row needs."""
  return jnp.max(jnp.where(needed_B, jnp.sum(cache.position_BS >= 0, axis=1), 0))


def tidy(cache: Cache) -> Cache:
  """Every row's tokens in its first slots, in their order."""
  last = jnp.iinfo(jnp.int32).max
  key_BS = jnp.where(cache.position_BS < 0, last, cache.position_BS)
  order_BS = jnp.argsort(key_BS, axis=1)
  # On a GPU every row is kernels of its own.
  gpu = {'cuda': move_at_once, 'rocm': move_at_once}
  own = jax.lax.platform_dependent(cache.own, order_BS, **gpu, default=move_one_by_one)
  position_BS = jnp.take_along_axis(cache.position_BS, order_BS, axis=1)
  return dataclasses.replace(cache, own=own, position_BS=position_BS)


def move_at_once(own, order_BS):
  """Layers whose slot i has what was in slot order_BS[:, i]."""

  def move(x, axis):
    beside = (1, -1, 1) if axis == -2 else (1, 1, -1)
    at = order_BS.reshape(*[1] * (x.ndim - 4), order_BS.shape[0], *beside)
    return jnp.take_along_axis(x, at, axis=axis)

  return _stored(own, move)


def move_one_by_one(own, order_BS):
  """The same, row by row, in place. The compilers for CPUs and TPUs turn the cache into another
  layout for the gather of all: one or two more of it, even in a loop that runs zero times."""
  rows = jax.tree.leaves(own)[0].shape[:-3]  # [B] or [N, B]

  def move(at, x, axis):
    old = jax.lax.dynamic_slice(x, (*at, 0, 0, 0), (1,) * len(at) + x.shape[-3:])
    # An index for every head, for the same reason.
    index_S = order_BS[at[-1]].reshape((-1, 1) if axis == -2 else (1, -1))
    index = jnp.broadcast_to(index_S, (*old.shape[:-2], *index_S.shape))
    new = jnp.take_along_axis(old, index, axis=axis)
    return jax.lax.dynamic_update_slice(x, new, (*at, 0, 0, 0))

  def one(i, own):
    return _stored(own, functools.partial(move, jnp.unravel_index(i, rows)))

  return jax.lax.fori_loop(0, math.prod(rows), one, own)


def _stored(tree, function):
  """function(array, its axis of slots) on every array."""

  def one(stored: Stored) -> Stored:
    scale = stored.scale_BK1S
    return Stored(function(stored.values_BKSC, -2), None if scale is None else function(scale, -1))

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Stored))


def _take(tree, rows):
  """Rows of layers; past the end: the last."""
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4, mode='clip'), tree)


def take(cache: Cache, rows_B, groups_Q=None) -> Cache:
  """Row i of the result is a copy of row rows_B[i], and prefix q of prefix groups_Q[q]."""
  position_BS = jnp.take(cache.position_BS, rows_B, axis=0, mode='clip')
  cache = dataclasses.replace(cache, own=_take(cache.own, rows_B), position_BS=position_BS)
  if groups_Q is None:
    return cache
  length_Q = jnp.take(cache.length_Q, groups_Q, mode='clip')
  return dataclasses.replace(cache, shared=_take(cache.shared, groups_Q), length_Q=length_Q)


def put(cache: Cache, new: Cache, rows_B) -> Cache:
  """`cache` with the own slots of `new` at rows_B; rows past the end are dropped."""

  def one(old, new):
    at = (slice(None),) * (old.ndim - 4)
    return old.at[(*at, rows_B)].set(new, mode='drop')

  own = jax.tree.map(one, cache.own, new.own)
  position_BS = cache.position_BS.at[rows_B].set(new.position_BS, mode='drop')
  return dataclasses.replace(cache, own=own, position_BS=position_BS)


def grow(cache: Cache, slots: int) -> Cache:
  """The cache with so many slots, at least as many as it has."""

  def pad(x, axis, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)

  position_BS = pad(cache.position_BS, 1, -1)
  return dataclasses.replace(cache, own=_stored(cache.own, pad), position_BS=position_BS)


def share(prompts: Cache, length_P, own: Cache, prompt_Q=None) -> Cache:
  """Rows without tokens behind the prompts, of whose slots they see the first length_P.

  prompt_Q: which prompt each group of rows has; None: they are as many, in the same order.
  """
  shared = prompts.own
  if prompt_Q is not None:
    shared, length_P = _take(shared, prompt_Q), length_P[prompt_Q]
  return dataclasses.replace(own, shared=shared, length_Q=length_P)
