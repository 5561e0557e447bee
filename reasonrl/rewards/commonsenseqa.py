"""Does the first line end with the right choice? For the task `commonsenseqa`.

As in STaR (arXiv 2203.14465): '... Therefore, the answer is lake (b).' says b; without the full
stop, or with anything behind it, it says nothing.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from reasonrl import records

_CHOICE = re.compile(r'\(([a-e])\)\.', re.ASCII | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CommonsenseQA:
  """1 if the line ends with the gold choice, else 0; None for other tasks.

  The line is the first that is not blank. Its part `extracted` says whether it ends with a choice.
  """

  group: ClassVar[bool] = False

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    if example.meta.get(records.CHECKED_BY) != 'commonsenseqa':
      return records.Score(None, {}, None)
    found = self.answer(completion)
    parts = {'extracted': float(found is not None)}
    return records.Score(float(found == example.answer), parts, None)

  def answer(self, completion: records.Completion) -> str | None:
    """The letter of the choice, which is what the completion votes for."""
    found = _CHOICE.fullmatch(_first_line(completion.text)[-4:])
    return found and found.group(1).lower()

  def trim(self, text: str) -> str | None:
    """A completion up to and including its answer, which is what STaR keeps; None: no answer."""
    line = _first_line(text)
    blank = text[: len(text) - len(text.lstrip())]
    return blank + line if _CHOICE.fullmatch(line[-4:]) else None


def _first_line(text: str) -> str:
  return text.strip().partition('\n')[0]
