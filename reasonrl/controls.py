"""Sampler controls: what may be drawn, and what is written instead of it, row by row in the graph.

1. A control is a frozen dataclass of token ids: part of the compiled program. Its numbers (a
   budget, a count) are arrays with one entry per row, so that rows of one batch may differ.
2. Before a draw `bias` may forbid tokens; after it `step` may write another token in its place,
   and take back tokens that came before it. What a control writes is of the source ENVIRONMENT:
   it carries no gradient, and counts as a token everywhere.
3. Strings are matched as token ids, on what the row holds, whoever wrote it. A token counts as the
   first of a string if its text ends like that token, and as the last if its text begins so: in
   byte pairs '</think>' may end in '><'. It is matched, and taken back, as a whole.
4. `build` makes controls and their numbers from a section of the config.

`ThinkBudget` is budget forcing (s1, arXiv 2501.19393, section 3.1), `Force` begins a completion,
`Forbid` keeps tokens away for a while, `StopStrings` ends a row behind a text, and `Thought`, for
environments, behind a thought. Several apply in order; the first that writes a token has the step.
Left out on purpose, for all but stop strings: strings that a tokenizer cuts differently in their
middle.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from reasonrl import records

BEFORE, THINKING, AFTER = 0, 1, 2


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


def _padded(strings: list[tuple[int, ...]]):
  """int32 [strings, longest]; rows filled with 0."""
  longest = max(1, *map(len, strings))
  return jnp.asarray([[*ids, *[0] * (longest - len(ids))] for ids in strings], jnp.int32)


@dataclasses.dataclass(frozen=True)
class ThinkBudget(Control):
  """Budget forcing: thinking of at most `max_think` and at least `min_think` tokens.

  Thinking begins behind `start`, which the prompt may end with, and ends with `end` or a stop id.

    at the maximum           `final` is written, which holds an end of its own
    end too early, or one    the end is taken back and `wait` written instead: `ignores` times in
    of the first `ignores`   any case, and until `min_think`
    a stop id                is an end: `end` is written in its place

  Tokens of `wait` are thinking and count; those of `start`, `end` and `final` do not. Where the
  maximum falls into a `wait`, the rest of that is not written; where it may fall into an `end`, the
  next tokens tell, and are taken back if they are none. An end that another control wrote stays.

  Unlike the authors' harness nothing asks for a token between two ends: a model that ends at once
  is given one `wait` after the other. To forbid it would change the probabilities of a draw.

  Numbers: max_think (0: none), min_think, ignores.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ('max_think', 'min_think', 'ignores')
  STRINGS: ClassVar[tuple[str, ...]] = ('start', 'end', 'wait', 'final')

  start: Pattern  # () = the completion begins inside
  end: Pattern
  end_ids: tuple[int, ...]  # as it is written
  wait: tuple[int, ...]  # () = an early end is left as it is
  final: tuple[int, ...]

  def __post_init__(self):
    for name in ('end', 'end_ids', 'final'):
      if not getattr(self, name):
        raise records.UserError(f'think_budget: {name} has no tokens')

  @classmethod
  def of(cls, tokenizer, start: str, end: str, wait: str, final: str) -> ThinkBudget:
    return cls(
      start=pattern(tokenizer, start),
      end=pattern(tokenizer, end),
      end_ids=tuple(tokenizer.encode(end)),
      wait=tuple(tokenizer.encode(wait)),
      final=tuple(tokenizer.encode(final)),
    )

  def begin(self, view: View) -> dict:
    zero_B = jnp.zeros_like(view.length_B)
    inside_B = zero_B == 0
    if self.start:
      before = view._replace(length_B=view.length_B - 1)
      last_B = jnp.take_along_axis(view.tokens_BS, before.length_B[:, None], axis=1)[:, 0]
      inside_B = ends_with(before, last_B, self.start, 0)
    return {
      'phase_B': jnp.where(inside_B, THINKING, BEFORE),
      'begin_B': view.length_B,  # the first position of thinking
      'ignored_B': zero_B,
      'queue_B': zero_B,  # 0, or 1 + the string that is being written
      'at_B': zero_B,
      'over_B': zero_B,  # tokens that its first one takes the place of
    }

  def step(self, state, numbers, view, made: Step, stop_ids) -> tuple[dict, Step]:
    strings = (self.wait, self.final, self.end_ids)
    table, sizes = _padded(list(strings)), jnp.asarray([len(ids) for ids in strings], jnp.int32)
    phase_B, queue_B, at_B = state['phase_B'], state['queue_B'], state['at_B']
    begin_B, ignored_B = state['begin_B'], state['ignored_B']

    # ---- a string is under way
    writing_B = queue_B > 0
    token_B = jnp.where(writing_B, table[jnp.maximum(queue_B - 1, 0), at_B], made.token_B)
    over_B = jnp.where(writing_B & (at_B == 0), state['over_B'], 0)
    drawn_B = ~writing_B & ~made.written_B
    thinking_B = phase_B == THINKING

    # ---- does thinking end here?
    stopped_B = drawn_B & jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
    # In byte pairs one token may close the start and open the end of an empty thought.
    first_mB = jnp.stack([begin_B - bool(self.start), *[begin_B] * max(len(self.end) - 2, 0)])
    closed_B = ~writing_B & ends_with(view, token_B, self.end, first_mB)
    ends_B = thinking_B & (closed_B | stopped_B)
    whole_B = jnp.minimum(len(self.end) - 1, view.length_B - begin_B)
    back_B = jnp.where(ends_B & ~stopped_B, whole_B, 0)
    thought_B = view.length_B - back_B - begin_B  # tokens of thinking without its end
    early_B = (ignored_B < numbers['ignores']) | (thought_B < numbers['min_think'])
    extend_B = ends_B & early_B & drawn_B & bool(self.wait)
    close_B = ends_B & ~extend_B & stopped_B  # a stop id is not the end that was asked for

    queue_B = jnp.where(extend_B, 1, jnp.where(close_B, 3, queue_B))
    fresh_B = extend_B | close_B
    at_B = jnp.where(fresh_B, 0, at_B)
    token_B = jnp.where(fresh_B, table[jnp.maximum(queue_B - 1, 0), 0], token_B)
    back_B = jnp.where(extend_B, back_B, over_B)
    ignored_B = ignored_B + extend_B
    phase_B = jnp.where(ends_B & ~extend_B, AFTER, phase_B)

    # ---- go on in the string
    written_B = writing_B | fresh_B
    at_B = jnp.where(written_B, at_B + 1, 0)
    done_B = written_B & (at_B >= sizes[jnp.maximum(queue_B - 1, 0)])
    queue_B = jnp.where(done_B, 0, queue_B)
    at_B = jnp.where(done_B, 0, at_B)

    # ---- the maximum: what is written next is `final`
    after_B = view.length_B - back_B + 1
    limit_B = numbers['max_think']
    begun_B = jnp.zeros_like(after_B)  # the last tokens that may yet become an end
    for m in range(1, len(self.end)):
      begun_B = jnp.where(ends_with(view, token_B, self.end[:m], begin_B) & drawn_B, m, begun_B)
    full_B = (phase_B == THINKING) & (limit_B > 0) & (after_B - begin_B - begun_B >= limit_B)
    over_B = jnp.where(full_B, after_B - begin_B - limit_B, 0)
    queue_B = jnp.where(full_B, 2, queue_B)
    at_B = jnp.where(full_B, 0, at_B)
    phase_B = jnp.where(full_B, AFTER, phase_B)

    # ---- does thinking begin behind this token?
    if self.start:
      opens_B = (state['phase_B'] == BEFORE) & ends_with(view, token_B, self.start, 0)
      phase_B = jnp.where(opens_B, THINKING, phase_B)
      begin_B = jnp.where(opens_B, after_B, begin_B)
    new = {
      **{'phase_B': phase_B, 'begin_B': begin_B, 'ignored_B': ignored_B},
      **{'queue_B': queue_B, 'at_B': at_B, 'over_B': over_B},
    }
    back_B = jnp.where(written_B, back_B, made.back_B)
    return new, Step(token_B, back_B, made.written_B | written_B)


@dataclasses.dataclass(frozen=True)
class Force(Control):
  """A completion begins with `ids`: the first `forced` of them, a number; below 0: all."""

  NUMBERS: ClassVar[tuple[str, ...]] = ('forced',)
  STRINGS: ClassVar[tuple[str, ...]] = ('text',)

  ids: tuple[int, ...]

  def __post_init__(self):
    if not self.ids:
      raise records.UserError('force: ids has no tokens')

  @classmethod
  def of(cls, tokenizer, text: str) -> Force:
    return cls(tuple(tokenizer.encode(text)))

  def step(self, state, numbers, view, made: Step, stop_ids) -> tuple[dict, Step]:
    del stop_ids
    said_B = view.length_B - view.start_B
    ids = jnp.asarray(self.ids, jnp.int32)
    count_B = jnp.where(numbers['forced'] < 0, ids.size, numbers['forced'])
    forced_B = (said_B < jnp.minimum(count_B, ids.size)) & ~made.written_B
    token_B = jnp.where(forced_B, ids[jnp.minimum(said_B, ids.size - 1)], made.token_B)
    return state, made._replace(token_B=token_B, written_B=made.written_B | forced_B)


@dataclasses.dataclass(frozen=True)
class Forbid(Control):
  """`ids` are not drawn among the first `forbidden` tokens of a completion, a number; below 0: all.

  The log-probability of a token is then that of the draw without them, which a trainer that knows
  nothing of it does not reproduce: for evaluation.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ('forbidden',)
  STRINGS: ClassVar[tuple[str, ...]] = ('texts',)

  ids: tuple[int, ...]

  def __post_init__(self):
    if not self.ids:
      raise records.UserError('forbid: ids has no tokens')

  @classmethod
  def of(cls, tokenizer, texts: tuple[str, ...]) -> Forbid:
    """Every token of the texts, wherever it stands."""
    if isinstance(texts, str):
      raise records.UserError(f'controls.forbid.texts={texts!r} must be a tuple of strings')
    return cls(tuple(sorted({i for text in texts for i in tokenizer.encode(text)})))

  def bias(self, numbers, view, z_BV):
    count_B = numbers['forbidden']
    early_B = (count_B < 0) | (view.length_B - view.start_B < count_B)
    ids = jnp.asarray(self.ids, jnp.int32)
    return z_BV.at[:, ids].add(jnp.where(early_B, -jnp.inf, 0.0)[:, None])


@dataclasses.dataclass(frozen=True)
class Thought(Control):
  """A completion is a thought: it ends behind `close` and has at least `least` tokens before that.

  So that it has them, the first of them are not the first of `close_ids`; none is of `never`. Its
  log-probabilities are those of the draw without them: `barred` tells the trainer.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ()

  close: Pattern
  close_ids: tuple[int, ...]
  least: int
  never: tuple[int, ...]

  @classmethod
  def of(cls, tokenizer, least: int, never: tuple[int, ...]) -> Thought:
    """With </think>, whose last token stands alone: what follows is someone else's."""
    ids = tuple(tokenizer.encode(records.THINK_CLOSE))
    begins = pattern(tokenizer, records.THINK_CLOSE)[:-1]
    return cls((*begins, (ids[-1],)), ids, least, never)

  def bias(self, numbers, view, z_BV):
    early_B = view.length_B - view.start_B < self.least
    z_BV = z_BV.at[:, self.close_ids[0]].add(jnp.where(early_B, -jnp.inf, 0.0))
    return z_BV.at[:, jnp.asarray(self.never, jnp.int32)].set(-jnp.inf)

  def stops(self, view, token_B):
    return ends_with(view, token_B, self.close, view.start_B)

  def barred(self, tokens: int) -> np.ndarray:
    """int32 [tokens, K]: what each token of a thought could not be, -1 = nothing."""
    first = np.where(np.arange(tokens) < self.least, self.close_ids[0], -1)
    return np.column_stack([first, *(np.full(tokens, i) for i in self.never)]).astype(np.int32)


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


# In the order in which they apply: what is forced may begin or end thinking.
CONTROLS = {
  **{'force': Force, 'forbid': Forbid, 'think_budget': ThinkBudget},
  'stop_strings': StopStrings,
}


def build(sections: Mapping[str, Mapping], tokenizer) -> tuple[tuple, dict[str, int]]:
  """The controls of a config, name -> strings and numbers, and the numbers of all of them.

  A `wait` that no number asks for is left out: not every tokenizer has it.

  Raises:
    UserError: an unknown control, an unknown, missing or bad field, or a string without tokens.
  """
  built, numbers = [], {}
  for name in sections:
    if name not in CONTROLS:
      raise records.UserError(f'controls: {name!r} is not one of {", ".join(CONTROLS)}')
  for name, cls in CONTROLS.items():
    if name not in sections:
      continue
    fields = dict(sections[name])
    wrong = sorted(fields.keys() ^ {*cls.NUMBERS, *cls.STRINGS})
    if wrong:
      raise records.UserError(f'controls.{name}: unknown or missing: {", ".join(wrong)}')
    for field in cls.NUMBERS:
      value = fields[field]
      least = 0 if name == 'think_budget' else -1
      if not isinstance(value, int) or not least <= value <= np.iinfo(np.int32).max:
        what = f'controls.{name}.{field}={value!r}'
        raise records.UserError(f'{what} is not a whole number from {least} up')
      numbers[field] = value
    if name == 'think_budget':
      asked = fields['ignores'] or fields['min_think']
      if asked and not fields['wait']:
        raise records.UserError(
          "controls.think_budget.wait='', but ignores and min_think write it instead of an end"
        )
      fields['wait'] = fields['wait'] if asked else ''
    built.append(cls.of(tokenizer, **{field: fields[field] for field in cls.STRINGS}))
  return tuple(built), numbers
