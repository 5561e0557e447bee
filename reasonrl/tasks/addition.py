r"""STaR's addition of two n-digit numbers with a scratchpad (arXiv 2203.14465), byte for byte.

    problem   Input:\n6 2 4 + 2 5 9\nTarget:
    solution  \n<scratch>\n6 2 4 + 2 5 9 , C: 0\n2 + 5 , 3 C: 1\n6 + 2 , 8 3 C: 0\n
              , 8 8 3 C: 0\n0 8 8 3\n</scratch>\n8 8 3      (one string, broken here to fit)

After the sum there is one line for every pair of digits from the second least significant on: the
pair, the digits of the result so far and the carry that comes in. The two lines that close the
scratchpad hold all digits with the carry that goes out, and the same with that carry in front. The
correct scratchpad of a sum is unique. problem + solution + '\n\n' is one example of the paper's
gen_sums.py.

What decides the split is the pair of numbers in either order. Left out on purpose: the direct form
without a scratchpad, and few-shot examples in the prompt.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from reasonrl import records
from reasonrl.tasks import splits


def scratchpad(first: str, second: str) -> list[str]:
  """The lines between its tags, for two decimal numbers of one length; the last is the hint."""
  lines = [f'{" ".join(first)} + {" ".join(second)} , C: 0']
  carry, digits = 0, ''  # `digits`: the result so far, each digit followed by a space
  for i, (a, b) in enumerate(zip(reversed(first), reversed(second), strict=True)):
    if i:
      lines.append(f'{a} + {b} , {digits}C: {carry}')
    carry, digit = divmod(int(a) + int(b) + carry, 10)
    digits = f'{digit} {digits}'
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

  def __post_init__(self):
    if not 1 <= self.min_digits <= self.max_digits:
      raise records.UserError(
        f'min_digits={self.min_digits}, max_digits={self.max_digits}: 1 <= min_digits <= max_digits'
      )

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: digits, hint (what STaR shows after 'Target: ')."""
    uniform = splits.generator(self.seed, split, index).random
    digits = splits.choose(uniform, range(self.min_digits, self.max_digits + 1))

    def number():
      rest = ''.join(splits.choose(uniform, '0123456789') for _ in range(digits - 1))
      return splits.choose(uniform, '123456789') + rest

    first, second = splits.draw(
      split, lambda: (number(), number()), key=lambda pair: ' '.join(sorted(pair))
    )
    lines = scratchpad(first, second)
    answer = ' '.join(str(int(first) + int(second)))
    return records.Example(
      task='addition',
      split=split,
      index=index,
      problem=f'Input:\n{" ".join(first)} + {" ".join(second)}\nTarget:',
      answer=answer,
      solution='\n'.join(['', '<scratch>', *lines, '</scratch>', answer]),
      meta={'digits': digits, 'hint': lines[-1], records.CHECKED_BY: 'addition'},
    )
