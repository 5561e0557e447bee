"""A reward that costs nothing and differs between completions."""

import dataclasses
from typing import ClassVar

from reasonrl import records


@dataclasses.dataclass(frozen=True)
class Letters:
  """The share of 'e'."""

  group: ClassVar[bool] = False

  def __call__(self, example, completion):
    return records.Score(completion.text.count('e') / max(1, len(completion.text)), {}, None)
