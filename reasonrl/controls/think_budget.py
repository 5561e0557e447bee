"""Budget forcing: thinking that ends early, late or after waiting."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from reasonrl import records
from reasonrl.controls.base import Control, Pattern, Step, View, ends_with, pattern

BEFORE, THINKING, AFTER = 0, 1, 2


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
