"""Does the completion have the form that R1 asks for? <think>...</think><answer>...</answer>

DeepSeek did not publish its format check (arXiv 2501.12948). `R1Format` is a strict one;
`OpenR1Format` and `TagCount` are what the open-r1 project used, for comparison with its numbers.
Where the prompt holds the beginning of the completion (its `prefill`), the environment has put it
back into the text.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from reasonrl import records


def _score(value: float) -> records.Score:
  return records.Score(float(value), {}, None)


@dataclasses.dataclass(frozen=True)
class R1Format:
  """1 if each tag occurs once, in order, with only white space outside the two spans.

  A completion that was cut off at its cap has the wrong form: an answer is finished by EOS.
  """

  group: ClassVar[bool] = False

  allow_empty_think: bool  # a think span of nothing but white space is accepted too

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    if completion.stop != records.Stop.EOS:
      return _score(0)
    text = completion.text.strip()
    if any(text.count(tag) != 1 for tag in records.TAGS):
      return _score(0)
    # With one tag of each kind this order of the cuts is also the order of the tags.
    before, _, rest = text.partition(records.THINK_OPEN)
    think, closed, rest = rest.partition(records.THINK_CLOSE)
    between, opened, rest = rest.partition(records.ANSWER_OPEN)
    _, ended, after = rest.partition(records.ANSWER_CLOSE)
    in_order = bool(closed and opened and ended)
    outside = (before + between + after).strip()
    return _score(in_order and not outside and (self.allow_empty_think or bool(think.strip())))


@dataclasses.dataclass(frozen=True)
class OpenR1Format:
  r"""open-r1's ^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$ (match, dot = all, multi-line).

  The same language in linear time. What it lets through, and R1Format does not: two think spans, an
  empty one, any text on the lines after </answer>, an answer without EOS. It refuses tags on one
  line and a leading newline.
  """

  group: ClassVar[bool] = False

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    text, start = completion.text, '<think>\n'
    # The earliest seam leaves the most room for the end, so no other seam need be tried.
    _, seam, answer = text.removeprefix(start).partition('\n</think>\n<answer>\n')
    ends = '\n</answer>\n' in answer or answer.endswith('\n</answer>')
    return _score(text.startswith(start) and bool(seam) and ends)


@dataclasses.dataclass(frozen=True)
class TagCount:
  """open-r1's tag count: 0.25 for each of the four tags that stands exactly once on its line."""

  group: ClassVar[bool] = False

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    tags = ('<think>\n', '\n</think>\n', '\n<answer>\n', '\n</answer>')
    return _score(0.25 * sum(completion.text.count(tag) == 1 for tag in tags))
