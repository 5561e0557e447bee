"""Texts of your own, to be read: JSON Lines with a text in each row, or plain text.

A text becomes passages of at most `max_chars` characters, cut behind white space where there is
some. `shuffled` orders them, epoch by epoch. Nothing here looks whether a text is in both splits.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import ClassVar

from reasonrl import records
from reasonrl.tasks import files, splits


@dataclasses.dataclass(frozen=True)
class Text:
  """Passages of texts; they have no problem and no answer.

  `index` of an example is its passage.

  Raises:
    UserError: a field is out of range; with the first example: a file cannot be read, has no text,
      or a row of it has none.
  """

  symbols: ClassVar[tuple[str, ...]] = (records.THINK_OPEN, records.THINK_CLOSE)

  seed: int  # of the order
  train: str  # path; rows of JSON if it ends with .jsonl
  test: str
  field: str  # of a row, that holds the text
  separator: str  # between the texts of a file of plain text; '' = it is one
  max_chars: int

  def __post_init__(self):
    for split in splits.SPLITS:
      if not getattr(self, split):
        raise records.UserError(f"{split}='' must be a file of text or of JSON Lines")
    if self.max_chars < 1:
      raise records.UserError(f'max_chars={self.max_chars} must be at least 1')

  @functools.cached_property
  def _passages(self) -> dict[str, list[tuple[str, str]]]:
    return {split: self._read(getattr(self, split)) for split in splits.SPLITS}

  def _read(self, path: str) -> list[tuple[str, str]]:
    """(passage, whether it ends the text: WHOLE or PART)."""
    if path.endswith('.jsonl'):
      texts = []
      for number, row in enumerate(files.read(path), 1):
        try:
          texts.append(files.field(row, self.field, str))
        except records.UserError as error:
          raise records.UserError(f'{path}, line {number}: {error}') from None
    else:
      try:
        text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
      except (OSError, UnicodeDecodeError) as error:
        raise records.UserError(f'cannot read {path!r}: {error}') from None
      texts = text.split(self.separator) if self.separator else [text]
    found = []
    for text in texts:
      parts = passages(text.strip(), self.max_chars)
      found += [(part, records.PART) for part in parts[:-1]]
      found += [(part, records.WHOLE) for part in parts[-1:]]
    if not found:
      raise records.UserError(f'{path} has no text')
    return found

  def epoch(self, split: str) -> int:
    """The passages of a split: every so many positions hold each of them once."""
    splits.check(split, 0)
    return len(self._passages[split])

  def example(self, split: str, index: int) -> records.Example:
    """The passage at position `index` of the shuffled epochs of a split."""
    splits.check(split, index)
    found = self._passages[split]
    place = files.shuffled(self.seed, split, len(found), index)
    text, whole = found[place]
    return records.Example('text', split, place, '', '', text, {records.TEXT: whole})


def passages(text: str, most: int) -> list[str]:
  """A text in pieces of at most `most` characters, which together are the text."""
  out, start = [], 0
  while start < len(text):
    end = min(start + most, len(text))
    if end < len(text):
      space = max(text.rfind(c, start, end) for c in ' \n\t')
      end = space + 1 if space > start else end
    out.append(text[start:end])
    start = end
  return out
