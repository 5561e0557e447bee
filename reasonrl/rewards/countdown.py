"""Does the answer reach the target with the given numbers? For the task `countdown`.

1. `answer.extract` finds the answer; nothing but digits, + - * /, round brackets and white space
   may stand in it, no sign before a number and no '= 24' after the expression.
2. Its numbers must be the given ones, each exactly as often as it is given and spelt as it is.
3. Its exact rational value must be the target: 8 / (3 - 8 / 3) is 24.

Nothing is evaluated but by the two stacks below, on at most answer.MAX_CHARACTERS characters.

Left out on purpose: TinyZero's 0.1 for a wrong answer in tags. A format reward with a weight of 0.1
comes close, and this reward stays 1 or 0, as an evaluation needs it.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from fractions import Fraction
from typing import ClassVar

from reasonrl import records
from reasonrl.rewards import answer

_CHARACTERS = re.compile(r'[\d\s()+*/-]*', re.ASCII)
_TOKEN = re.compile(r'\d+|\S', re.ASCII)
_APPLY = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.truediv}
_RANK = {'(': 0, '+': 1, '-': 1, '*': 2, '/': 2}


def tokens(expression: str) -> list[str] | None:
  """Its numbers, operations and brackets; None if it is too long or holds anything else."""
  if len(expression) > answer.MAX_CHARACTERS or not _CHARACTERS.fullmatch(expression):
    return None
  return _TOKEN.findall(expression)


def value(found: list[str]) -> Fraction | None:
  """The exact value of an infix expression in `tokens`; None if it is none or divides by zero.

  Dijkstra's two stacks: brackets may be nested to any depth without recursion.
  """
  values, waiting, value_next = [], [], True

  def apply_down_to(rank: int):
    while waiting and _RANK[waiting[-1]] >= rank:
      right, left = values.pop(), values.pop()
      values.append(_APPLY[waiting.pop()](left, right))

  try:
    for token in found:
      if value_next != (token == '(' or token.isdigit()):
        return None
      if token == '(':
        waiting.append(token)
      elif token == ')':
        apply_down_to(1)
        if not waiting:
          return None
        waiting.pop()
      elif token in _APPLY:
        apply_down_to(_RANK[token])
        waiting.append(token)
        value_next = True
      else:
        values.append(Fraction(token))
        value_next = False
    if value_next:
      return None
    apply_down_to(1)
  except ZeroDivisionError:
    return None
  return None if waiting else values[0]


@dataclasses.dataclass(frozen=True)
class Countdown:
  """1 if the stated expression solves the example, 0 if not; None for other tasks.

  Its parts: `extracted`, whether any answer was found, and `valid`, whether that is an expression
  of the given numbers and operations, whatever its value.
  """

  group: ClassVar[bool] = False

  after_think: bool  # as in Accuracy
  require_stop: bool  # as in Accuracy

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    meta = example.meta
    if meta.get(records.CHECKED_BY) != 'countdown':
      return records.Score(None, {}, None)
    text = completion.text
    stated = answer.extract(answer.after_thinking(text) if self.after_think else text)
    stopped = completion.stop == records.Stop.EOS or not self.require_stop
    found = tokens(stated or '') or []
    numbers = sorted(token for token in found if token.isdigit())
    signs = set(found) - set(numbers) - {'(', ')'}
    allowed = numbers == sorted(meta['numbers'].split()) and signs <= set(meta['operations'])
    result = value(found) if allowed else None
    right = stopped and result == meta['target']
    parts = {'extracted': float(stated is not None), 'valid': float(result is not None)}
    return records.Score(float(right), parts, None)
