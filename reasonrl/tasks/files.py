"""Examples that are the rows of files: JSON Lines, one object per line.

1. `read` gives the rows of a file, `Files` makes an example of each as soon as the first is asked
   for: a bad row stops a run at its start.
2. `shuffled` orders them: a file of N rows is an endless stream of epochs, each a permutation.

The files are the splits: nothing here looks whether a problem is in both. Left out on purpose:
compressed files, and files that do not fit into memory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
from typing import Any, ClassVar

from reasonrl import records
from reasonrl.tasks import splits


def read(path: str) -> list[dict]:
  """The rows of a file: row i is on line i + 1.

  Raises:
    UserError: there is no such file, it has no rows, or a line is not a JSON object.
  """
  try:
    lines = pathlib.Path(path).expanduser().read_bytes().splitlines()
  except OSError as error:
    raise records.UserError(f'cannot read {path!r}: {error.strerror}') from None
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise records.UserError(f'{path}, line {number} is not JSON: {error}') from None
    if not isinstance(row, dict):
      raise records.UserError(f'{path}, line {number} is not a JSON object: {str(row)[:40]}')
    rows.append(row)
  if not rows:
    raise records.UserError(f'{path} has no rows (line 1 is missing)')
  return rows


def field(row: Any, key: str, kind: Any) -> Any:
  """row[key], of type `kind`; None if it is missing and `kind` (such as str | None) allows that.

  Raises:
    UserError: it is missing or of another type; lists the keys that there are.
  """
  row = row if isinstance(row, dict) else {}
  if not isinstance(row.get(key), kind):
    wanted = kind.__name__ if isinstance(kind, type) else kind
    found = ', '.join(f'{name} ({type(value).__name__})' for name, value in row.items())
    raise records.UserError(f'no {key!r} of type {wanted}; its keys: {found or "none"}')
  return row.get(key)


@functools.lru_cache(maxsize=64)  # a dataset has one for each value that takes turns
def _permutation(seed: int, stream: str, size: int, epoch: int) -> list[int]:
  uniform = random.Random(f'{seed}/{stream}/epoch {epoch}').random
  return sorted(range(size), key=lambda _: uniform())


def shuffled(seed: int, stream: str, size: int, index: int) -> int:
  """The row, below `size`, at position `index` of an endless stream.

  Any `size` consecutive positions from a multiple of it hold every row once. A pure function of
  its arguments; near the last call it is fast, elsewhere it sorts `size` random numbers.
  """
  epoch, position = divmod(index, size)
  return _permutation(seed, stream, size, epoch)[position]


@dataclasses.dataclass(frozen=True)
class Files:
  """A task with a file for each split.

  A subclass has its `name` and `parse(row)`: problem, answer, solution and meta of a row, or a
  UserError for a bad one.

  `index` of an example is its row.

  Raises:
    UserError: a file is not named; with the first example: what `read` raises, or a row is bad.
  """

  symbols: ClassVar[tuple[str, ...]] = ()
  name: ClassVar[str]

  seed: int  # of the order
  train: str  # path of a JSONL file
  test: str

  def __post_init__(self):
    for split in splits.SPLITS:
      if not getattr(self, split):
        raise records.UserError(f"{split}='' must be a JSONL file")

  @functools.cached_property
  def _examples(self) -> dict[str, list[records.Example]]:
    return {split: self._read(split) for split in splits.SPLITS}

  def _read(self, split: str) -> list[records.Example]:
    examples, path = [], getattr(self, split)
    for index, row in enumerate(read(path)):
      try:
        fields = self.parse(row)
      except records.UserError as error:
        raise records.UserError(f'{path}, line {index + 1}: {error}') from None
      examples.append(records.Example(task=self.name, split=split, index=index, **fields))
    return examples

  def epoch(self, split: str) -> int:
    """The rows of a split's file: every so many positions hold each of them once."""
    splits.check(split, 0)
    return len(self._examples[split])

  def example(self, split: str, index: int) -> records.Example:
    """The row at position `index` of the shuffled epochs of a split's file."""
    splits.check(split, index)
    examples = self._examples[split]
    return examples[shuffled(self.seed, split, len(examples), index)]
