"""Sampler controls: what may be drawn, and what is written instead of it, row by row in the graph.

1. A control is a frozen dataclass of token ids: part of the compiled program. Its numbers (a
   budget, a count) are arrays with one entry per row, so that rows of one batch may differ.
2. Before a draw `bias` may forbid tokens; after it `step` may write another token in its place,
   and take back tokens that came before it. What a control writes is of the source ENVIRONMENT:
   it carries no gradient, and counts as a token everywhere.
3. Strings are matched as token ids, on what the row holds, whoever wrote it.

`ThinkBudget` is budget forcing (s1, arXiv 2501.19393, section 3.1), `Force` begins a completion,
and `Forbid` keeps tokens away for a while. Several apply in order; the first that writes a token
has the step. Left out on purpose: matching of text that the tokenizer would cut differently.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

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
  back_B: Any  # int32, how many of the last tokens it takes the place of
  written_B: Any  # bool, by a control


def ends_with(view: View, token_B, pattern: tuple[int, ...], begin_B):
  """bool [B]: the row with this token ends with the pattern, none of it before position begin_B."""
  S, m = view.tokens_BS.shape[1], len(pattern)
  found_B = token_B == pattern[-1]
  for j, wanted in enumerate(pattern[:-1]):
    at_B = view.length_B - (m - 1) + j
    before_B = jnp.take_along_axis(view.tokens_BS, jnp.clip(at_B, 0, S - 1)[:, None], axis=1)[:, 0]
    found_B &= (before_B == wanted) & (at_B >= begin_B)
  return found_B


def _padded(strings: list[tuple[int, ...]]):
  """int32 [strings, longest]; rows filled with 0."""
  longest = max(1, *map(len, strings))
  return jnp.asarray([[*ids, *[0] * (longest - len(ids))] for ids in strings], jnp.int32)


@dataclasses.dataclass(frozen=True)
class ThinkBudget:
  """Budget forcing: thinking of at most `max_think` and at least `min_think` tokens.

  Thinking begins behind `start`, or with the completion, and ends with `end` or a stop id.

    at the maximum           `final` is written, which holds an end of its own
    end too early, or one    the end is taken back and `wait` written instead: `ignores` times in
    of the first `ignores`   any case, and until `min_think`
    a stop id                is an end: `end` is written in its place

  Tokens of `wait` are thinking and count; those of `start`, `end` and `final` do not. Where the
  maximum falls into a `wait`, the rest of that is not written.

  Numbers: max_think (0: none), min_think, ignores.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ('max_think', 'min_think', 'ignores')

  start: tuple[int, ...]  # () = the completion begins inside
  end: tuple[int, ...]
  wait: tuple[int, ...]
  final: tuple[int, ...]

  def __post_init__(self):
    for name in ('end', 'wait', 'final'):
      if not getattr(self, name):
        raise records.UserError(f'think_budget: {name} has no tokens')

  @property
  def furthest_back(self) -> int:
    """The most tokens that a step takes the place of."""
    return len(self.end) - 1

  def begin(self, view: View) -> dict:
    zero_B = jnp.zeros_like(view.length_B)
    return {
      'phase_B': zero_B if self.start else zero_B + THINKING,
      'begin_B': view.length_B,  # the first position of thinking
      'ignored_B': zero_B,
      'queue_B': zero_B,  # 0, or 1 + the string that is being written
      'at_B': zero_B,
    }

  def bias(self, state, numbers, view, z_BV):
    del state, numbers, view
    return z_BV

  def step(self, state, numbers, view, made: Step, stop_ids) -> tuple[dict, Step]:
    strings = (self.wait, self.final, self.end)
    table, sizes = _padded(list(strings)), jnp.asarray([len(ids) for ids in strings], jnp.int32)
    phase_B, queue_B, at_B = state['phase_B'], state['queue_B'], state['at_B']
    begin_B, ignored_B = state['begin_B'], state['ignored_B']

    # ---- a string is under way
    writing_B = queue_B > 0
    token_B = jnp.where(writing_B, table[jnp.maximum(queue_B - 1, 0), at_B], made.token_B)
    drawn_B = ~writing_B & ~made.written_B
    thinking_B = phase_B == THINKING

    # ---- does thinking end here?
    stopped_B = drawn_B & jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
    closed_B = ~writing_B & ends_with(view, token_B, self.end, begin_B)
    ends_B = thinking_B & (closed_B | stopped_B)
    back_B = jnp.where(ends_B & ~stopped_B, len(self.end) - 1, 0)
    thought_B = view.length_B - back_B - begin_B  # tokens of thinking without its end
    extend_B = ends_B & ((ignored_B < numbers['ignores']) | (thought_B < numbers['min_think']))
    close_B = ends_B & ~extend_B & stopped_B  # a stop id is not the end that was asked for

    queue_B = jnp.where(extend_B, 1, jnp.where(close_B, 3, queue_B))
    fresh_B = extend_B | close_B
    at_B = jnp.where(fresh_B, 0, at_B)
    token_B = jnp.where(fresh_B, table[jnp.maximum(queue_B - 1, 0), 0], token_B)
    back_B = jnp.where(extend_B, back_B, 0)
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
    full_B = (phase_B == THINKING) & (limit_B > 0) & (after_B - begin_B >= limit_B)
    queue_B = jnp.where(full_B, 2, queue_B)
    at_B = jnp.where(full_B, 0, at_B)
    phase_B = jnp.where(full_B, AFTER, phase_B)

    # ---- does thinking begin behind this token?
    if self.start:
      opens_B = (state['phase_B'] == BEFORE) & ends_with(view, token_B, self.start, view.start_B)
      phase_B = jnp.where(opens_B, THINKING, phase_B)
      begin_B = jnp.where(opens_B, after_B, begin_B)
    new = {
      **{'phase_B': phase_B, 'begin_B': begin_B, 'ignored_B': ignored_B},
      **{'queue_B': queue_B, 'at_B': at_B},
    }
    return new, Step(token_B, jnp.where(fresh_B, back_B, made.back_B), made.written_B | written_B)


@dataclasses.dataclass(frozen=True)
class Force:
  """A completion begins with `ids`: the first `forced` of them, a number."""

  NUMBERS: ClassVar[tuple[str, ...]] = ('forced',)
  furthest_back: ClassVar[int] = 0

  ids: tuple[int, ...]

  def __post_init__(self):
    if not self.ids:
      raise records.UserError('force: ids has no tokens')

  def begin(self, view: View) -> dict:
    del view
    return {}

  def bias(self, state, numbers, view, z_BV):
    del state, numbers, view
    return z_BV

  def step(self, state, numbers, view, made: Step, stop_ids) -> tuple[dict, Step]:
    del stop_ids
    said_B = view.length_B - view.start_B
    ids = jnp.asarray(self.ids, jnp.int32)
    forced_B = (said_B < jnp.minimum(numbers['forced'], ids.size)) & ~made.written_B
    token_B = jnp.where(forced_B, ids[jnp.minimum(said_B, ids.size - 1)], made.token_B)
    return state, made._replace(token_B=token_B, written_B=made.written_B | forced_B)


@dataclasses.dataclass(frozen=True)
class Forbid:
  """`ids` are not drawn among the first `forbidden` tokens of a completion, a number.

  The log-probability of a token is then that of the draw without them, which a trainer that knows
  nothing of it does not reproduce: for evaluation.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ('forbidden',)
  furthest_back: ClassVar[int] = 0

  ids: tuple[int, ...]

  def __post_init__(self):
    if not self.ids:
      raise records.UserError('forbid: ids has no tokens')

  def begin(self, view: View) -> dict:
    del view
    return {}

  def bias(self, state, numbers, view, z_BV):
    del state
    early_B = view.length_B - view.start_B < numbers['forbidden']
    ids = jnp.asarray(self.ids, jnp.int32)
    return z_BV.at[:, ids].add(jnp.where(early_B, -jnp.inf, 0.0)[:, None])

  def step(self, state, numbers, view, made: Step, stop_ids) -> tuple[dict, Step]:
    del numbers, view, stop_ids
    return state, made


CONTROLS = {'think_budget': ThinkBudget, 'force': Force, 'forbid': Forbid}
