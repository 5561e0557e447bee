"""Whether a model says how a text goes on, behind a thought: RPT (arXiv 2506.08007).

All judge rollouts of the environment `next_token`, and apply nowhere else.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from reasonrl import records
from reasonrl.rewards import answer


@dataclasses.dataclass(frozen=True)
class TokenMatch:
  """1 if the next token is predicted, else 0: the special case of RPT for a single token.

  The prediction is what was sampled behind the thought, and where nothing was (`predicts` = 0) the
  likeliest token. The part `no_think` says the same of a prediction without a thought.
  """

  needs: ClassVar[tuple[str, ...]] = ('scores', 'said')

  def batch(self, tools, state, experience):
    """(0 or 1 [R], parts, None)."""
    del tools, state
    scores = experience.scores
    if 'predicted_likeliest' in scores:
      first = lambda name: scores[f'{name}_likeliest'][:, 0].astype(np.float32)
      return first('predicted'), {'no_think': first('unthought')}, None
    metas = [example.meta for example in experience.examples]
    none = [meta.get(records.SAID_ID) is None for meta in metas]
    match = [meta.get(records.SAID_ID) == meta.get(records.NEXT_ID) for meta in metas]
    return np.where(none, np.nan, match).astype(np.float32), {}, None


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
  """1 if what was said is how the text goes on, byte for byte, up to the end of one of its tokens.

      r = 1[y = x[1:l] and l in L]    l = bytes of y > 0, L = ends of the tokens of x in bytes

  y is what was said behind the thought, without the EOS that ends it, or its last \\boxed{}.
  """

  group: ClassVar[bool] = False
  needs: ClassVar[tuple[str, ...]] = ('said',)

  boxed: bool

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    del completion
    said = example.meta.get(records.SAID)
    if said is None:
      return records.Score(None, {}, None)
    if self.boxed:
      said = answer.last_boxed(said) or ''
    ends = example.meta[records.NEXT_BYTES]
    return records.Score(float(prefix(said, example.answer, ends)), {}, None)


def prefix(said: str, text: str, ends) -> bool:
  """Whether `said` is the beginning of `text`, up to one of its `ends` (in bytes)."""
  y, x = (string.encode(errors='surrogatepass') for string in (said, text))
  return len(y) in ends and x[: len(y)] == y


@dataclasses.dataclass(frozen=True)
class Trace:
  """1 if the thought is the one that would help, as the task tells it, else 0."""

  group: ClassVar[bool] = False
  needs: ClassVar[tuple[str, ...]] = ('scores', 'said')

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    wanted = example.meta.get(records.TRACE)
    if not wanted:
      return records.Score(None, {}, None)
    return records.Score(float(completion.think == wanted), {}, None)
