"""Is what follows '####' the answer? For the task `gsm8k`, as in STaR (arXiv 2203.14465)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from reasonrl import records
from reasonrl.rewards import answer

MARK = '####'


@dataclasses.dataclass(frozen=True)
class Gsm8k:
  """1 if the rest of the first line with '####' equals the gold answer, as numbers do, else 0.

  None for other tasks, and if the gold has no normal form. Its part `extracted` says whether there
  was an answer.
  """

  group: ClassVar[bool] = False

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    gold = answer.normalise(example.answer)
    if gold is None or example.meta.get(records.CHECKED_BY) != 'gsm8k':
      return records.Score(None, {}, None)
    found = self.answer(completion)
    return records.Score(float(found == gold), {'extracted': float(found is not None)}, None)

  def answer(self, completion: records.Completion) -> str | None:
    """The normal form of the answer, which is what the completion votes for."""
    return answer.normalise(_stated(completion.text))

  def trim(self, text: str) -> str | None:
    """A completion up to and including its answer, which is what STaR keeps; None: no answer."""
    stated = _stated(text)
    if answer.normalise(stated) is None:
      return None
    return text[: text.index(MARK) + len(MARK)] + stated.rstrip()


def _stated(text: str) -> str:
  return text.partition(MARK)[2].partition('\n')[0]
