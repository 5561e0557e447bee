"""Is the answer right? Extraction, normalisation, equality, and the accuracy reward.

1. `extract` finds the answer in a text: the last balanced \\boxed{...}, else the last
   <answer>...</answer>, else the line after the last '####', else nothing.
2. `normalise` gives every spelling of one number the same string ('007', '7.0', '14/2' -> '7') and
   removes the LaTeX that carries no meaning. Two answers are equal when their normal forms are.
3. `Accuracy` pays 1 for an answer equal to the gold answer, else 0.

Training and evaluation share these functions. Everything takes linear time and nothing evaluates
what the model wrote. A reward that took "any number in the text" could be earned by listing
numbers, so only the evaluation of models that know no format uses `extract_lenient`.

Left out on purpose: symbolic equality (x+1 = 1+x), units other than a trailing \\text{...}, sets.
"""

from __future__ import annotations

import dataclasses
import fractions
import re
from typing import ClassVar

from reasonrl import records

MAX_CHARACTERS = 512  # a longer answer equals nothing; it also bounds the digits of a number

_BOXED = re.compile(r'(\\boxed\s*\{|\\[{}]|[{}])')
_LAST_NUMBER = re.compile(r'(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|/\d+)?', re.ASCII)

_NUMBER = re.compile(r'([+-]?)(\d+)(?:\.(\d*)|\s*/\s*(\d+))?|([+-]?)\.(\d+)', re.ASCII)
_THOUSANDS = re.compile(r'[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?', re.ASCII)
_FRACTION = re.compile(
  r'([+-]?)\\frac\s*(?:\{\s*([+-]?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))', re.ASCII
)
_TEXT = re.compile(r'\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}')
_SIZES = re.compile(r'\\(?:left|right)(?![a-zA-Z])')
_NO_MEANING = re.compile(r'\\[$%!,;:]|[$%]')


def extract(text: str) -> str | None:
  """The answer that `text` states in one of the agreed forms; None if it states none."""
  boxed = last_boxed(text)
  if boxed is not None:
    return boxed
  closed = text.rfind(records.ANSWER_CLOSE)
  opened = text.rfind(records.ANSWER_OPEN, 0, closed) if closed >= 0 else -1
  if opened >= 0:
    start = opened + len(records.ANSWER_OPEN)
    return text[start : text.find(records.ANSWER_CLOSE, start)].strip()
  _, marked, rest = text.rpartition('####')
  return rest.strip().partition('\n')[0].strip() if marked else None


def extract_lenient(text: str) -> str | None:
  """`extract`, else the last number in the text: counts what a strict format hides."""
  found = extract(text)
  if found is not None:
    return found
  numbers = _LAST_NUMBER.findall(text)
  return numbers[-1] if numbers else None


EXTRACTIONS = {'strict': extract, 'lenient': extract_lenient}


def after_thinking(text: str) -> str:
  """What follows the last </think>; '' if there is none or another <think> follows it."""
  _, closed, rest = text.rpartition(records.THINK_CLOSE)
  return rest if closed and records.THINK_OPEN not in rest else ''


def last_boxed(text: str) -> str | None:
  """Content of the \\boxed{ that begins last among those whose brace is closed."""
  text = text[: text.rfind('}') + 1]
  if '\\boxed' not in text:
    return None
  pieces = _BOXED.split(text)  # odd entries are braces: \boxed{, {, } or an escaped \{ \}
  closers = []
  for i in range(len(pieces) - 2, 0, -2):
    piece = pieces[i]
    if piece == '}':
      closers.append(i)
    elif piece == '{' or piece[1] == 'b':
      closer = closers.pop() if closers else None
      if closer is not None and piece != '{':
        return ''.join(pieces[i + 1 : closer]).strip()
  return None


def normalise(text: str) -> str | None:
  """The normal form of an answer; None for an empty one or one above MAX_CHARACTERS.

  A number becomes 'n' or 'n/d' in lowest terms, exactly: '1,000' -> '1000', '0.50' -> '1/2',
  '-\\frac{2}{4}' -> '-1/2'. '50%' is 50 and '12\\text{ cm}' is 12: signs and units are dropped.
  """
  if len(text) > MAX_CHARACTERS:
    return None
  text = text.replace('\\dfrac', '\\frac').replace('\\tfrac', '\\frac').replace('{,}', ',')
  text = _NO_MEANING.sub('', _SIZES.sub('', text))
  text = _TEXT.sub('', text).strip() or _TEXT.sub(r'\1', text)
  text = ' '.join(text.split()).rstrip('. ')
  number = _rational(text)
  return (text if number is None else str(number)) or None


def _rational(text: str) -> fractions.Fraction | None:
  if _THOUSANDS.fullmatch(text):
    text = text.replace(',', '')
  if match := _FRACTION.fullmatch(text):
    sign, top, top_digit, bottom, bottom_digit = match.groups()
    numerator, denominator = int(top or top_digit), int(bottom or bottom_digit)
  elif match := _NUMBER.fullmatch(text):
    sign, whole, decimals, over, sign_of_part, part = match.groups()
    if part is not None:
      sign, whole, decimals = sign_of_part, '0', part
    numerator = int(whole + (decimals or ''))
    denominator = 10 ** len(decimals or '') if over is None else int(over)
  else:
    return None
  if not denominator:
    return None
  return fractions.Fraction(-numerator if sign == '-' else numerator, denominator)


def equal(gold: str, answer: str) -> bool:
  """True if both have a normal form and it is the same."""
  normal = normalise(gold)
  return normal is not None and normal == normalise(answer)


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """1 if the completion states the gold answer, else 0.

  None if the gold has no normal form, or the example is checked by another reward.

  (arXiv 2501.12948, accuracy reward.) Its parts say whether any answer was found (`extracted`), and
  whether the whole text, read leniently, states the gold answer (`lenient`): what `lenient` has
  above the reward is right but not in the form that was asked for.
  """

  group: ClassVar[bool] = False

  after_think: bool  # only what follows the last </think> counts; without a </think> nothing does
  extraction: str  # 'strict' | 'lenient': what also reads the last number in the text
  require_stop: bool  # a completion that was cut off at its cap earns 0

  def __post_init__(self):
    if self.extraction not in EXTRACTIONS:
      raise records.UserError(
        f'extraction={self.extraction!r} is not one of {", ".join(EXTRACTIONS)}'
      )

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    gold = normalise(example.answer)
    if gold is None or records.CHECKED_BY in example.meta:
      return records.Score(None, {}, None)
    found = self._extract(completion)
    stopped = completion.stop == records.Stop.EOS or not self.require_stop
    right = stopped and found is not None and normalise(found) == gold
    lenient = normalise(extract_lenient(completion.text) or '') == gold
    parts = {'extracted': float(found is not None), 'lenient': float(lenient)}
    return records.Score(float(right), parts, None)

  def answer(self, completion: records.Completion) -> str | None:
    """What the completion votes for: equal answers are equal strings. None: it has no answer."""
    if self.require_stop and completion.stop != records.Stop.EOS:
      return None
    return normalise(self._extract(completion) or '')

  def _extract(self, completion: records.Completion) -> str | None:
    text = after_thinking(completion.text) if self.after_think else completion.text
    return EXTRACTIONS[self.extraction](text)
