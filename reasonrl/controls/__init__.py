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
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from reasonrl import records
from reasonrl.controls.base import Control, Pattern, Step, View, apply, ends_with, pattern
from reasonrl.controls.stop_strings import StopStrings
from reasonrl.controls.think_budget import ThinkBudget

__all__ = ['CONTROLS', 'Control', 'Step', 'View', 'apply', 'build']
__all__ += ['Forbid', 'Force', 'StopStrings', 'ThinkBudget', 'Thought']


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
