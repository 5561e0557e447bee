"""The first training examples of a task, over and over: learning from little data."""

from __future__ import annotations

import dataclasses
from typing import Any

from reasonrl import records
from reasonrl.tasks import splits


@dataclasses.dataclass(frozen=True)
class Subset:
  """A task whose train split has `size` examples; its test split is whole.

  Raises:
    UserError: size is below 1.
  """

  task: Any
  size: int

  def __post_init__(self):
    if self.size < 1:
      raise records.UserError(f'size={self.size} of a subset must be at least 1')

  @property
  def symbols(self) -> tuple[str, ...]:
    return self.task.symbols

  @property
  def worked(self):
    """The task's own worked examples, None where it has none."""
    return getattr(self.task, 'worked', None)

  def epoch(self, split: str) -> int:
    """After how many examples the train split repeats."""
    return self.size if split == 'train' else 1

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of the task, in the train split modulo the size."""
    splits.check(split, index)
    return self.task.example(split, index % self.size if split == 'train' else index)
