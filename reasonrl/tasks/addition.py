r"""STaR's addition of two n-digit numbers with a scratchpad (arXiv 2203.14465), byte for byte.

    problem   Input:\n6 2 4 + 2 5 9\nTarget:
    solution  \n<scratch>\n6 2 4 + 2 5 9 , C: 0\n2 + 5 , 3 C: 1\n6 + 2 , 8 3 C: 0\n
              , 8 8 3 C: 0\n0 8 8 3\n</scratch>\n8 8 3      (one string, broken here to fit)

After the sum there is one line for every pair of digits from the second least significant on: the
pair, the digits of the result so far and the carry that comes in. The two lines that close the
scratchpad hold all digits with the carry that goes out, and the same with that carry in front: what
the hint of rationalisation shows behind 'Target: '. The correct scratchpad of a sum is unique.
problem + solution + '\n\n' is one example of the paper's gen_sums.py.

What decides the split is the pair of numbers in either order. Left out on purpose: the direct form
without a scratchpad.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from reasonrl import records
from reasonrl.tasks import splits

HINTS = ('none', 'shown', 'pseudo')
POOL = 50  # worked examples of each length to choose from, as in the paper's data

# The result of adding two numbers, from the least significant digit on: digit, carry out.
Columns = list[tuple[int, int]]


def add(first: str, second: str) -> Columns:
  """The sum of two decimal numbers of one length."""
  columns, carry = [], 0
  for a, b in zip(reversed(first), reversed(second), strict=True):
    carry, digit = divmod(int(a) + int(b) + carry, 10)
    columns.append((digit, carry))
  return columns


def scratchpad(first: str, second: str, columns: Columns) -> list[str]:
  """The lines between its tags; the last is the hint."""
  lines = [f'{" ".join(first)} + {" ".join(second)} , C: 0']
  carry, digits = 0, ''  # `digits`: the result so far, each digit followed by a space
  for i, (digit, carry_out) in enumerate(columns):
    if i:
      lines.append(f'{first[-1 - i]} + {second[-1 - i]} , {digits}C: {carry}')
    carry, digits = carry_out, f'{digit} {digits}'
  return [*lines, f', {digits}C: {carry}', f'{carry} {digits}'.rstrip()]


@dataclasses.dataclass(frozen=True)
class Addition:
  """Sums of two numbers of n digits; n is uniform, and so are the numbers of n digits (1: 1 to 9).

  Raises:
    UserError: a field is out of range.
  """

  # One token per word; a digit that follows a space is one word with it.
  symbols: ClassVar[tuple[str, ...]] = (
    *('Input:', 'Target:', '<scratch>', '</scratch>', ' +', ' ,', ' C:'),
    *(f' {digit}' for digit in range(10)),
  )

  seed: int
  min_digits: int
  max_digits: int
  # Problems show no hint | the hint | 'pseudo', a control: a hint and a scratchpad of random digits
  # and carries, which agree with each other and not with the numbers: they teach copying alone.
  hint: str

  def __post_init__(self):
    if self.hint not in HINTS:
      raise records.UserError(f'hint={self.hint!r} is not one of {", ".join(HINTS)}')
    if not 1 <= self.min_digits <= self.max_digits:
      raise records.UserError(
        f'min_digits={self.min_digits}, max_digits={self.max_digits}: 1 <= min_digits <= max_digits'
      )

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: digits, and the problem with its hint."""
    uniform = splits.generator(self.seed, split, index).random
    digits = splits.choose(uniform, range(self.min_digits, self.max_digits + 1))

    def number():
      rest = ''.join(splits.choose(uniform, '0123456789') for _ in range(digits - 1))
      return splits.choose(uniform, '123456789') + rest

    first, second = splits.draw(
      split, lambda: (number(), number()), key=lambda pair: ' '.join(sorted(pair))
    )
    columns = add(first, second)
    if self.hint == 'pseudo':
      columns = [(int(uniform() * 10), int(uniform() * 2)) for _ in columns]
    lines = scratchpad(first, second, columns)
    answer = lines[-1].removeprefix('0 ')
    problem = f'Input:\n{" ".join(first)} + {" ".join(second)}\nTarget:'
    example = records.Example(
      task='addition',
      split=split,
      index=index,
      problem=problem,
      answer=answer,
      solution='\n'.join(['', '<scratch>', *lines, '</scratch>', answer]),
      meta={
        'digits': digits,
        records.HINTED: f'{problem} {lines[-1]}',
        records.CHECKED_BY: 'addition',
      },
    )
    return example if self.hint == 'none' else records.show_hint(example)

  def worked(self, example: records.Example, count: int) -> list[records.Example]:
    """`count` other training examples of the same length, for a few-shot prompt.

    They come from the first POOL of that length; which ones depends on the example's index.

    Raises:
      UserError: there are not so many.
    """
    digits, found = example.meta['digits'], {}
    same = dataclasses.replace(self, min_digits=digits, max_digits=digits, hint='none')
    for i in range(POOL):
      other = same.example('train', (example.index + i) % POOL)
      if len(found) == count:
        break
      if other.answer != example.answer:
        found.setdefault(other.problem, other)
    if len(found) < count:
      raise records.UserError(f'{count} worked examples of {digits} digits: only {len(found)}')
    return list(found.values())
