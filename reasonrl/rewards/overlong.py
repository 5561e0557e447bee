"""Length at the end of the budget: DAPO's soft overlong punishment (arXiv 2503.14476 eq. 13)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from reasonrl import records


@dataclasses.dataclass(frozen=True)
class SoftOverlong:
  """0 up to cap - cache tokens, then down in a line to -1 at the cap.

      L <= cap - cache: 0        (cap - cache - L) / cache        L > cap: -1

  An addend: give it a weight beside the reward of the task. With the cap as `max_completion_length`
  a completion that was cut off has -1.
  """

  group: ClassVar[bool] = False

  cache: int  # tokens before the cap over which the punishment grows

  def __post_init__(self):
    if self.cache < 1:
      raise records.UserError(f'rewards.soft_overlong.cache={self.cache} must be at least 1')

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    over = completion.num_tokens - (completion.cap - self.cache)
    return records.Score(-min(max(over / self.cache, 0.0), 1.0), {}, None)
