"""Is the line after the scratchpad the sum? For the task `addition` (STaR, arXiv 2203.14465)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from reasonrl import records

CLOSE = '</scratch>'


@dataclasses.dataclass(frozen=True)
class Addition:
  """1 if the answer line is the gold answer, character for character; None for other tasks.

  Its part `trace` is 1 if the scratchpad is the correct one too: a right answer without it was
  reached by wrong reasoning.
  """

  group: ClassVar[bool] = False

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    if example.meta.get(records.CHECKED_BY) != 'addition':
      return records.Score(None, {}, None)
    trace = float(self.trim(completion.text) == example.solution)
    return records.Score(float(self.answer(completion) == example.answer), {'trace': trace}, None)

  def answer(self, completion: records.Completion) -> str | None:
    """The answer line, which is what the completion votes for."""
    found = self.trim(completion.text)
    return None if found is None else found.rpartition('\n')[2]

  def trim(self, text: str) -> str | None:
    """A completion up to and including its answer line, which is what STaR keeps of it.

    The answer is the line after the first line '</scratch>', as in the paper's code; where there is
    no such line, the first line; where nothing follows it, None.
    """
    lines = text.split('\n')
    answer = lines.index(CLOSE) + 1 if CLOSE in lines else 0
    return '\n'.join(lines[: answer + 1]) if answer < len(lines) else None
