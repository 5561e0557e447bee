"""What a control is, what it sees and writes, and strings as patterns of token ids."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp


class View(NamedTuple):
  """Rows before the token of this step: int32."""

  tokens_BS: Any
  length_B: Any
  start_B: Any  # where the completion begins


class Step(NamedTuple):
  """What a step writes: the token that was drawn, or a control's."""

  token_B: Any  # int32
  # int32, how many of the last tokens it takes the place of; the row must then go on for as many
  back_B: Any
  written_B: Any  # bool, by a control


def apply(controls, states, numbers, view: View, token_B, stop_ids):
  """What the step writes where `token_B` was drawn, and the states of the controls after it.

  `states` is None where there are no controls.
  """
  made, after = Step(token_B, jnp.zeros_like(token_B), jnp.zeros(token_B.shape, bool)), []
  for control, state in zip(controls, states or (), strict=True):
    new, made = control.step(state, numbers, view, made, stop_ids)
    after.append(new)
  return made, tuple(after) if controls else states


class Control:
  """One that does nothing; the others say what they do instead."""

  MIXES: ClassVar[bool] = False  # whether `mix` says what is fed

  def begin(self, view: View) -> dict:
    """The state before the first token of a completion: arrays with an entry per row."""
    del view
    return {}

  def bias(self, numbers, view: View, z_BV):
    """The logits to draw from."""
    del numbers, view
    return z_BV

  def step(self, state, numbers, view: View, made: Step, stop_ids) -> tuple[dict, Step]:
    """The state after this token, and what is written: `made`, or something in its place."""
    del numbers, view, stop_ids
    return state, made

  def stops(self, view: View, token_B):
    """bool [B], or False for all: the row ends behind this token."""
    del view, token_B
    return False

  def mix(self, state, numbers, view: View, drawn, token_B):
    """What the next step is fed in the place of the token: a mixture of embeddings.

    Args:
      state: after this token.
      drawn: `drawing.Draw`, with the weights and the entropy of this step.
      token_B: as it was written.

    Returns:
      bool [B], rows that are fed it; weights and token ids, float32 and int32 [B, K].
    """
    del state, numbers, view, drawn
    ids_BK = token_B[:, None]
    return jnp.zeros(token_B.shape, bool), jnp.ones(ids_BK.shape, jnp.float32), ids_BK


# Token ids that may stand at each place of a string.
Pattern = tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=64)
def pattern(tokenizer, text: str) -> Pattern:
  """Where `text` stands in a row, in whatever way its ends are joined to what is beside it."""
  ids = tokenizer.encode(text)
  if not ids:
    return ()
  pieces = [tokenizer.decode([i], skip_special=False) for i in range(tokenizer.vocab_size)]
  first, last = pieces[ids[0]], pieces[ids[-1]]
  if len(ids) == 1:
    return ((tuple(i for i, piece in enumerate(pieces) if first in piece)),)
  ends = tuple(i for i, piece in enumerate(pieces) if piece.endswith(first))
  begins = tuple(i for i, piece in enumerate(pieces) if piece.startswith(last))
  return (ends, *((i,) for i in ids[1:-1]), begins)


def ends_with(view: View, token_B, wanted: Pattern, begin_B):
  """bool [B]: the row with this token ends with the pattern, none of it before position begin_B.

  `begin_B` may be a number for each token of the pattern but the last: [m - 1, B].
  """
  S, m = view.tokens_BS.shape[1], len(wanted)
  begin_mB = jnp.broadcast_to(begin_B, (max(m - 1, 1), view.length_B.size))
  one_of = lambda x_B, ids: jnp.any(x_B[:, None] == jnp.asarray(ids, jnp.int32)[None], axis=1)
  found_B = one_of(token_B, wanted[-1])
  for j, ids in enumerate(wanted[:-1]):
    at_B = view.length_B - (m - 1) + j
    before_B = jnp.take_along_axis(view.tokens_BS, jnp.clip(at_B, 0, S - 1)[:, None], axis=1)[:, 0]
    found_B &= one_of(before_B, ids) & (at_B >= begin_mB[j])
  return found_B
