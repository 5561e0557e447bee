"""Rows that end behind a text, whatever the tokens it is cut into."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from reasonrl import records
from reasonrl.controls.base import Control


@functools.lru_cache(maxsize=64)
def _pieces(tokenizer) -> tuple[str, ...]:
  """What each token adds to a text, the space before a word included."""
  anchor = tokenizer.encode('x')
  decode = lambda ids: tokenizer.decode(ids, skip_special=False)
  known = len(decode(anchor))
  return tuple(decode([*anchor, i])[known:] for i in range(tokenizer.vocab_size))


def _automaton(texts: tuple[str, ...]) -> tuple[list[dict[str, int]], list[bool]]:
  """Of Aho and Corasick (1975): the next state by character, 0 where none is given; which end."""
  after, ends, fail = [{}], [False], [0]
  for text in texts:
    state = 0
    for c in text:
      if c not in after[state]:
        after[state][c] = len(after)
        after, ends, fail = [*after, {}], [*ends, False], [*fail, 0]
      state = after[state][c]
    ends[state] = True
  queue = list(after[0].values())
  for state in queue:  # breadth first: those that it falls back on are complete
    queue += after[state].values()
    for c, child in after[state].items():
      fail[child] = after[fail[state]].get(c, 0)
      ends[child] |= ends[fail[child]]
    after[state] = after[fail[state]] | after[state]
  return after, ends


@dataclasses.dataclass(frozen=True)
class StopStrings(Control):
  """A row ends behind the token with which its completion first holds one of some texts.

  Whatever the tokens: their characters run through an automaton that knows all the texts. What the
  token has behind the text stays; it was sampled. A character whose bytes are several tokens has no
  token that says it, and a text with it is found only where one token holds all of it. Tokens that
  add nothing to a text, which some tokenizers have, hide one that they are in the middle of.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ()
  STRINGS: ClassVar[tuple[str, ...]] = ('texts',)

  states: int  # 0 knows nothing of a text, the last has seen one whole
  longest: int  # characters
  table: bytes  # int16 [states, V]: the state after a token

  @classmethod
  @functools.lru_cache(maxsize=64)
  def of(cls, tokenizer, texts: tuple[str, ...]) -> StopStrings:
    if isinstance(texts, str) or not texts or not all(texts):
      raise records.UserError(
        f'controls.stop_strings.texts={texts!r} must be a tuple of strings, none of them empty'
      )
    after, ends = _automaton(tuple(texts))
    done = len(after)
    letters = {c: i + 1 for i, c in enumerate(sorted(set(''.join(texts))))}
    move = np.zeros((done + 1, len(letters) + 1), np.int16)
    for state, to in enumerate(after):
      for c, new in to.items():
        move[state, letters[c]] = done if ends[new] else new
    move[done] = done
    pieces = _pieces(tokenizer)
    table = np.repeat(np.arange(done + 1, dtype=np.int16)[:, None], len(pieces), axis=1)
    for j in range(max(map(len, pieces))):
      has = np.asarray([len(piece) > j for piece in pieces])
      letter = np.asarray([letters.get(piece[j], 0) for piece in pieces if len(piece) > j])
      table[:, has] = move[table[:, has], letter[None]]
    return cls(done + 1, max(map(len, texts)), table.tobytes())

  def stops(self, view, token_B):
    table = jnp.asarray(np.frombuffer(self.table, np.int16).reshape(self.states, -1))
    last = table.shape[1] - 1  # rows of the head that stand for no token are never drawn
    go = lambda state_B, token_B: table[state_B, jnp.minimum(token_B, last)].astype(jnp.int32)
    S, state_B = view.tokens_BS.shape[1], jnp.zeros_like(token_B)
    for back in range(self.longest - 1, 0, -1):
      at_B = view.length_B - back
      before_B = jnp.take_along_axis(view.tokens_BS, jnp.clip(at_B, 0, S - 1)[:, None], axis=1)
      state_B = jnp.where(at_B >= view.start_B, go(state_B, before_B[:, 0]), 0)
    return go(state_B, token_B) == self.states - 1
