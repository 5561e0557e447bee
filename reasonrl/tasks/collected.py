"""What a phase of kind 'collect' has kept, to learn from: its dataset in shuffled epochs."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import ClassVar

from reasonrl import records
from reasonrl.tasks import files


@dataclasses.dataclass(frozen=True)
class Collected:
  """Examples whose solutions were sampled; meta has their ids.

  With `balance` the values of that field take turns, however many rows each has: else what is
  easiest is most of what was kept (arXiv 2203.14465).

  Raises:
    UserError: with the first example: the file has no rows, or a row has no such field.
  """

  symbols: ClassVar[tuple[str, ...]] = ()

  phase: str  # whose latest dataset it is; '' = another run's, at `path`
  seed: int  # of the order
  balance: str  # a field of meta; '' = every row is seen equally often
  path: str

  @functools.cached_property
  def _classes(self) -> list[list[dict]]:
    """The rows by their value of `balance`."""
    rows, classes = files.read(self.path), collections.defaultdict(list)
    for row in rows:
      if self.balance and self.balance not in row['meta']:
        raise records.UserError(
          f'balance={self.balance!r} is not a fact of the rows of {self.path}, which have '
          f'{", ".join(sorted(row["meta"])) or "none"}'
        )
      classes[row['meta'][self.balance] if self.balance else ''].append(row)
    order = sorted(classes, key=lambda value: (isinstance(value, str), value))
    return [classes[value] for value in order]

  def example(self, split: str, index: int) -> records.Example:
    """The row at position `index`; there is no test split."""
    if split != 'train':
      raise records.UserError(f'what was collected is to learn from: it has no {split} split')
    turn, own = index % len(self._classes), index // len(self._classes)
    rows = self._classes[turn]
    row = rows[files.shuffled(self.seed, f'class {turn}', len(rows), own)]
    names = ('task', 'split', 'index', 'problem', 'answer', 'solution')
    meta = {**row['meta'], records.TOKEN_IDS: row['token_ids']}
    return records.Example(**{name: row[name] for name in names}, meta=meta)
