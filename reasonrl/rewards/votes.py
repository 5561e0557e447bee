"""Who says the same: the votes that a majority is counted from (arXiv 2203.11171).

Not a reward: evaluation runs it where rewards run, because it reads what the model wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from reasonrl import records


@dataclasses.dataclass(frozen=True)
class Votes:
  """For each completion of a group the number, from 1, of the first with the same answer.

  0: it has no answer, and so no vote. The rewards say what an answer is: their method
  `answer(completion)` gives equal strings for equal answers and None for none.
  """

  group: ClassVar[bool] = True

  rewards: Mapping[str, Any]
  correct: str  # of these, where the example names no other

  def __call__(self, examples, completions) -> list[records.Score]:
    reward = self.rewards[examples[0].meta.get(records.CHECKED_BY, self.correct)]
    answers = [reward.answer(completion) for completion in completions]
    numbers = [0 if answer is None else answers.index(answer) + 1 for answer in answers]
    return [records.Score(float(number), {}, None) for number in numbers]
