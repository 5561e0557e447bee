"""Sums in digits or in words, for a pretrained model (or one trained from scratch).

    problem   What is forty-seven plus twelve?
    solution  <think>47 + 12 = 59</think><answer>59</answer>

A sum is the same problem in digits, in words and with its terms in another order: what decides the
split is the sorted list of signed terms, so that no training sum returns in the test in disguise.

Left out on purpose: products, brackets and fractions; reasoning_gym has them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

from reasonrl import records
from reasonrl.tasks import splits

FORMS = ('digits', 'words')
OPERATIONS = {'+': 'plus', '-': 'minus'}
MAX_IN_WORDS = 999_999

_ONES = (
  'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
  'sixteen seventeen eighteen nineteen'
).split()
_TENS = '_ _ twenty thirty forty fifty sixty seventy eighty ninety'.split()


def words(number: int) -> str:
  """English for 0 to 999,999, without 'and': 1105 -> 'one thousand one hundred five'."""
  if not 0 <= number <= MAX_IN_WORDS:
    raise ValueError(f'{number} is not within 0 to {MAX_IN_WORDS}')
  if number < 20:
    return _ONES[number]
  if number < 100:
    tens, rest = divmod(number, 10)
    return _TENS[tens] + (f'-{_ONES[rest]}' if rest else '')
  unit, name = (1000, 'thousand') if number >= 1000 else (100, 'hundred')
  count, rest = divmod(number, unit)
  return f'{words(count)} {name}' + (f' {words(rest)}' if rest else '')


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """Sums and differences of whole numbers; the answer is a decimal integer and may be negative.

  Raises:
    UserError: a field is out of range, or there are too few problems to fill both splits.
  """

  symbols: ClassVar[tuple[str, ...]] = records.TAGS

  seed: int
  min_terms: int
  max_terms: int
  min_value: int
  max_value: int
  forms: tuple[str, ...]  # of FORMS; one is drawn per problem
  operations: tuple[str, ...]  # of OPERATIONS; one is drawn per further term

  def __post_init__(self):
    if not 2 <= self.min_terms <= self.max_terms:
      raise records.UserError(
        f'min_terms={self.min_terms}, max_terms={self.max_terms}: 2 <= min_terms <= max_terms'
      )
    if not 0 <= self.min_value <= self.max_value:
      raise records.UserError(
        f'min_value={self.min_value}, max_value={self.max_value}: 0 <= min_value <= max_value'
      )
    for field, choices in (('forms', FORMS), ('operations', tuple(OPERATIONS))):
      given = getattr(self, field)
      if not given or not set(given) <= set(choices):
        raise records.UserError(f'{field}={given}: one or more of {", ".join(choices)}')
    if 'words' in self.forms and self.max_value > MAX_IN_WORDS:
      raise records.UserError(f'max_value={self.max_value}: words end at {MAX_IN_WORDS}')
    for split in splits.SPLITS:
      self.example(split, 0)

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: form, num_terms."""
    uniform = splits.generator(self.seed, split, index).random
    choose = functools.partial(splits.choose, uniform)

    def problem():
      count = choose(range(self.min_terms, self.max_terms + 1))
      values = [choose(range(self.min_value, self.max_value + 1)) for _ in range(count)]
      return values, [choose(self.operations) for _ in range(count - 1)]

    values, operations = splits.draw(split, problem, _canonical)
    form = choose(self.forms)
    said = [words(value) if form == 'words' else str(value) for value in values]
    question = said[0]
    for operation, term in zip(operations, said[1:], strict=True):
      question += f' {OPERATIONS[operation] if form == "words" else operation} {term}'
    steps, total = [], values[0]
    for operation, value in zip(operations, values[1:], strict=True):
      before, total = total, total + value if operation == '+' else total - value
      steps.append(f'{before} {operation} {value} = {total}')
    return records.Example(
      task='arithmetic',
      split=split,
      index=index,
      problem=f'What is {question}?',
      answer=str(total),
      solution=f'<think>{", ".join(steps)}</think><answer>{total}</answer>',
      meta={'form': form, 'num_terms': len(values)},
    )


def _canonical(problem: tuple[list[int], list[str]]) -> str:
  values, operations = problem
  signed = (-v if sign == '-' else v for sign, v in zip(['+', *operations], values, strict=True))
  return ' '.join(str(term) for term in sorted(signed))
