"""Several tasks in one stream, in proportion to their weights.

Who is next is not drawn but scheduled: of the first n examples the first member (in alphabetical
order) has floor(n * share), of those that are left the second has floor(n' * share'), where share'
is its part of the weights that are left, and so on. So every position is found without the ones
before it, a resumed run goes on where it was, and after any n examples each member's count is less
than the number of members away from n * share; a batch is as mixed as the whole. Each member
delivers its own examples 0, 1, 2, ... without gaps.

Left out on purpose: weights that change during a run.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import math
from collections.abc import Mapping
from typing import Any

from reasonrl import records


@dataclasses.dataclass(frozen=True)
class Mixture:
  """A task made of tasks.

  Its examples are the members', with `task` the member's name here and `index` the position in the
  mixture: that alone tells two examples apart.

  Raises:
    UserError: there is no member, or a weight is not positive.
  """

  members: Mapping[str, tuple[float, Any]]  # name -> weight, task

  def __post_init__(self):
    if not self.members:
      raise records.UserError('members is empty: a mixture needs at least one task')
    for name, (weight, _) in self.members.items():
      if not 0 < weight < math.inf:
        raise records.UserError(f'members.{name}.weight={weight} is not a positive number')

  @property
  def symbols(self) -> tuple[str, ...]:
    """Those of all members."""
    tasks = [self.members[name][1] for name in sorted(self.members)]
    return tuple(dict.fromkeys(symbol for task in tasks for symbol in task.symbols))

  @functools.cached_property
  def _shares(self) -> list[tuple[str, int, int]]:
    """(name, a, b): the member has a / b of what the members before it leave; for the last, 1."""
    # Read as the decimals that were written: 0.1 is a tenth.
    weights = {n: fractions.Fraction(str(self.members[n][0])) for n in sorted(self.members)}
    left, shares = sum(weights.values()), []
    for name, weight in weights.items():
      shares.append((name, *(weight / left).as_integer_ratio()))
      left -= weight
    return shares

  def place(self, index: int) -> tuple[str, int]:
    """Whose example is at `index` of a split, and which one of its own it is."""
    for name, a, b in self._shares:
      before = index * a // b
      if (index + 1) * a // b > before:
        return name, before
      index -= before

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: the member's."""
    name, own = self.place(index)
    return dataclasses.replace(self.members[name][1].example(split, own), task=name, index=index)
