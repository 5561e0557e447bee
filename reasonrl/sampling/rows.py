"""Rows being sampled: what each of them is, how they begin, and how live ones move together."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from reasonrl import caches, controls, records, types

RUNNING, EOS, LENGTH = (int(stop) for stop in records.Stop)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """B rows. Opaque outside this folder."""

  cache: caches.Cache
  tokens_BS: jax.Array
  source_BS: jax.Array
  logp_BS: jax.Array
  plain_BS: jax.Array  # at temperature 1, nothing left out
  entropy_BS: jax.Array
  length_B: jax.Array
  end_B: jax.Array  # a row stops at this length
  limit_B: jax.Array  # and in this decode at this one
  stop_B: jax.Array
  key_B: jax.Array  # uint32 [B, 2]
  start_B: jax.Array  # where the completion begins
  temperature_B: jax.Array | None  # None: that of the spec
  numbers: dict  # of the controls: int32 [B] each
  controls: tuple | None  # their states; None until a decode begins them
  kept_BSK: jax.Array | None  # ids each token was drawn from; None until a draw remembers them
  size_B: jax.Array | None  # the largest kept set of a row's tokens, remembered whole or not
  input_BD: jax.Array | None  # what is fed for the last token; None: its embedding

  @property
  def live_B(self):
    return self.stop_B == RUNNING


def of_prompts(cache, tokens_BT, length_B, window: int) -> State:
  """Rows that hold a prompt each and may grow to `window` tokens."""
  B, T = tokens_BT.shape
  tokens_BT = jnp.where(jnp.arange(T)[None] < length_B[:, None], tokens_BT, 0)
  wide = lambda fill, dtype: jnp.full((B, window), fill, dtype)
  full_B = jnp.full(B, window, jnp.int32)
  return State(
    cache=cache,
    tokens_BS=wide(0, jnp.int32).at[:, :T].set(tokens_BT),
    source_BS=wide(types.PROMPT, jnp.int8),
    logp_BS=wide(0.0, jnp.float32),
    plain_BS=wide(0.0, jnp.float32),
    entropy_BS=wide(0.0, jnp.float32),
    length_B=length_B,
    end_B=full_B,
    limit_B=full_B,
    stop_B=jnp.full(B, RUNNING, jnp.int32),
    key_B=jnp.zeros((B, 2), jnp.uint32),
    start_B=length_B,
    temperature_B=None,
    numbers={},
    controls=None,
    kept_BSK=None,
    size_B=None,
    input_BD=None,
  )


def assign(state: State, key_B, max_new_B, numbers, temperature_B=None) -> State:
  """Rows with keys, the most new tokens of each, and the numbers of their controls."""
  end_B = jnp.minimum(state.length_B + max_new_B, state.tokens_BS.shape[1])
  return dataclasses.replace(
    state,
    key_B=key_B,
    end_B=end_B,
    limit_B=end_B,
    stop_B=jnp.where(end_B <= state.length_B, LENGTH, state.stop_B),
    start_B=state.length_B,
    temperature_B=temperature_B,
    numbers=numbers,
    controls=None,
    input_BD=None,
  )


def begin(state: State, params, model, spec: types.Spec, max_new) -> State:
  """Rows ready to decode up to max_new more tokens: EOS stays, what ran out of length may go on."""
  B, S = state.tokens_BS.shape
  made: dict[str, Any] = {}
  most = min(spec.max_kept_tokens, model.vocab_size) if spec.truncates else 0
  if most and state.kept_BSK is None:
    made |= {'kept_BSK': jnp.full((B, S, most), -1, jnp.int32), 'size_B': jnp.zeros(B, jnp.int32)}
  if spec.controls and state.controls is None:
    view = controls.View(state.tokens_BS, state.length_B, state.start_B)
    made['controls'] = tuple(control.begin(view) for control in spec.controls)
  if any(control.MIXES for control in spec.controls) and state.input_BD is None:
    last_B = jnp.take_along_axis(state.tokens_BS, state.length_B[:, None] - 1, axis=1)[:, 0]
    made['input_BD'] = model.embed(params, last_B)
  limit_B = jnp.minimum(state.length_B + max_new, state.end_B)
  may_B = (state.stop_B != EOS) & (state.length_B < limit_B)
  stopped_B = jnp.where(state.stop_B == EOS, EOS, LENGTH)
  stop_B = jnp.where(may_B, RUNNING, stopped_B)
  return dataclasses.replace(state, limit_B=limit_B, stop_B=stop_B, **made)


def select(mask_B, new: State, old: State) -> State:
  """Rows of `new` where the mask says so, else of `old`; the cache is that of `old`."""

  def one(new, old):
    return jnp.where(mask_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  rest = lambda state: dataclasses.replace(state, cache=None)
  return dataclasses.replace(jax.tree.map(one, rest(new), rest(old)), cache=old.cache)


def take(state: State, rows_B, groups_Q=None) -> State:
  """Row i of the result is a copy of row rows_B[i]; see `caches.take`."""
  rest = dataclasses.replace(state, cache=None)
  rest = jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0, mode='clip'), rest)
  return dataclasses.replace(rest, cache=caches.take(state.cache, rows_B, groups_Q))


def put(state: State, new: State, rows_B) -> State:
  """`state` with the rows of `new` at rows_B; those past the end are dropped."""
  rest = lambda state: dataclasses.replace(state, cache=None)
  one = lambda old, new: old.at[rows_B].set(new, mode='drop')
  out = jax.tree.map(one, rest(state), rest(new))
  return dataclasses.replace(out, cache=caches.put(state.cache, new.cache, rows_B))


def prefixes_needed(state: State, width: int):
  """How many prefixes the live rows need if `width` rows share each."""
  live_QW = state.live_B.reshape(-1, state.cache.width)
  return jnp.sum(-(-live_QW.sum(1) // width))


def compact(state: State, count: int, width: int) -> tuple[State, Any]:
  """The live rows in their order, as `count` rows of which `width` share a prefix.

  Rows of one prefix that do not fit one group get several, each with a copy of it. They must fit:
  `prefixes_needed(state, width)` <= count / width.

  Returns:
    the rows, those without a source being stopped; and where they come from, [count], B = nowhere.
  """
  B, W = state.stop_B.size, state.cache.width
  live_QW = state.live_B.reshape(-1, W)
  needs_Q = -(-live_QW.sum(1) // width)
  first_Q = jnp.cumsum(needs_Q) - needs_Q
  rank_QW = jnp.cumsum(live_QW, axis=1) - 1
  slot_QW = (first_Q[:, None] + rank_QW // width) * width + rank_QW % width
  slot_B = jnp.where(live_QW, slot_QW, count).reshape(-1)
  rows_b = jnp.full(count, B, jnp.int32).at[slot_B].set(jnp.arange(B, dtype=jnp.int32), mode='drop')
  groups_q = None if state.cache.shared is None else rows_b[::width] // W
  moved = take(state, rows_b, groups_q)
  stop_b = jnp.where(rows_b < B, moved.stop_B, LENGTH)
  return dataclasses.replace(moved, stop_B=stop_b), rows_b
