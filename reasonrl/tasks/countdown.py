"""Countdown: combine the given numbers, each exactly once, into an expression with a given value.

    problem   Using each of the numbers 4, 9, 3 exactly once and the operations +, -, *, /, write an
              expression that equals 24.
    solution  <think>9 - 3 = 6\\n4 * 6 = 24</think><answer>4 * (9 - 3)</answer>

A problem is made from its solution: two terms are drawn and combined until one is left, and what
comes out is the target if it lies in the range. As in the game, no step leaves the positive whole
numbers. Using every number is the rule of Stream of Search (arXiv 2404.03683) and TinyZero.

There are many right answers, so the reward `countdown` decides, not equality with `answer`; it
reads the problem from `meta`. What decides the split is the target and the sorted numbers.

Left out on purpose: traces of a search, and Stream of Search's uniform draw of the target, which
needs one: here a problem with many solutions comes more often than a problem with one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from reasonrl import records
from reasonrl.tasks import splits

OPERATIONS = ('+', '-', '*', '/')
MAX_NUMBERS = 6  # of the game


@dataclasses.dataclass(frozen=True)
class Countdown:
  """Problems that are solvable by construction.

  Raises:
    UserError: a field is out of range, hardly any expression has its value in the target range, or
      there are too few problems to fill both splits.
  """

  symbols: ClassVar[tuple[str, ...]] = records.TAGS

  seed: int
  min_numbers: int
  max_numbers: int
  min_value: int  # of a given number
  max_value: int
  min_target: int
  max_target: int
  operations: tuple[str, ...]  # of OPERATIONS

  def __post_init__(self):
    if not 2 <= self.min_numbers <= self.max_numbers <= MAX_NUMBERS:
      raise records.UserError(
        f'min_numbers={self.min_numbers}, max_numbers={self.max_numbers}: '
        f'2 <= min_numbers <= max_numbers <= {MAX_NUMBERS}'
      )
    for name in ('value', 'target'):
      low, high = (getattr(self, f'{end}_{name}') for end in ('min', 'max'))
      if not 1 <= low <= high:
        raise records.UserError(
          f'min_{name}={low}, max_{name}={high}: 1 <= min_{name} <= max_{name}'
        )
    if not self.operations or not set(self.operations) <= set(OPERATIONS):
      raise records.UserError(
        f'operations={self.operations}: one or more of {", ".join(OPERATIONS)}'
      )
    for split in splits.SPLITS:
      for count in self._counts:
        self._draw(split, count, splits.generator(self.seed, split, 0).random)

  @property
  def _counts(self) -> range:
    return range(self.min_numbers, self.max_numbers + 1)

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: numbers (separated by spaces), target, operations."""
    uniform = splits.generator(self.seed, split, index).random
    count = splits.choose(uniform, self._counts)
    numbers, target, steps, expression = self._draw(split, count, uniform)
    return records.Example(
      task='countdown',
      split=split,
      index=index,
      problem=(
        f'Using each of the numbers {", ".join(map(str, numbers))} exactly once and the '
        f'operations {", ".join(self.operations)}, write an expression that equals {target}.'
      ),
      answer=expression,
      solution=f'<think>{steps}</think><answer>{expression}</answer>',
      meta={
        'numbers': ' '.join(map(str, numbers)),
        'target': target,
        'operations': ''.join(self.operations),
        records.CHECKED_BY: 'countdown',
      },
    )

  def _draw(
    self, split: str, count: int, uniform: Callable[[], float]
  ) -> tuple[list[int], int, str, str]:
    """A problem of `count` numbers: the numbers, the target, and steps and text of a solution."""
    values = range(self.min_value, self.max_value + 1)

    def problem():
      for _ in range(splits.MAX_DRAWS):
        numbers = [splits.choose(uniform, values) for _ in range(count)]
        found = self._combine(uniform, numbers)
        if found and self.min_target <= found[0] <= self.max_target:
          return numbers, *found
      raise records.UserError(
        f'min_target={self.min_target}, max_target={self.max_target}: none of {splits.MAX_DRAWS} '
        f'expressions of {count} numbers from {self.min_value} to {self.max_value} is among them'
      )

    return splits.draw(split, problem, key=lambda found: f'{sorted(found[0])} {found[1]}')

  def _combine(
    self, uniform: Callable[[], float], numbers: list[int]
  ) -> tuple[int, str, str] | None:
    """Value, steps and text of a random expression of all numbers; None at a dead end."""
    terms, steps = [(number, str(number)) for number in numbers], []
    while len(terms) > 1:
      pair = [terms.pop(int(uniform() * len(terms))) for _ in range(2)]
      low, high = sorted(value for value, _ in pair)
      results = {'+': low + high, '-': high - low, '*': low * high, '/': high // low}
      possible = [
        sign
        for sign in self.operations
        if not (sign == '-' and high == low) and not (sign == '/' and high % low)
      ]
      if not possible:
        return None
      sign = splits.choose(uniform, possible)
      if sign in '-/' and pair[0][0] < pair[1][0]:
        pair.reverse()
      (a, left), (b, right) = pair
      steps.append(f'{a} {sign} {b} = {results[sign]}')
      terms.append((results[sign], f'{_bracketed(left)} {sign} {_bracketed(right)}'))
    value, expression = terms[0]
    return value, '\n'.join(steps), expression


def _bracketed(expression: str) -> str:
  return f'({expression})' if ' ' in expression else expression
