r"""CommonsenseQA (arXiv 1811.00937) from its own files, in the format of STaR (arXiv 2203.14465).

    row       {"answerKey": "B", "question": {"stem": "...?", "choices": [{"label": "A", ...
    problem   Q: ...?\nAnswer Choices:\n(a) bed\n(b) lake\n(c) ...\n(d) ...\n(e) ...\nA:
    hinted    the same with '(b) lake (CORRECT)'
    answer    b

The data has no rationales, so there is no solution. A completion should end its first line with
'(b).', see the reward. Left out on purpose: the official test file, which has no answers; STaR's
numbers are on the development file.
"""

from __future__ import annotations

import dataclasses

from reasonrl import records
from reasonrl.tasks import files

LABELS = ['A', 'B', 'C', 'D', 'E']


@dataclasses.dataclass(frozen=True)
class CommonsenseQA(files.Files):
  """Questions with five choices; other keys of a row are ignored."""

  name = 'commonsenseqa'

  @staticmethod
  def parse(row: dict) -> dict:
    """problem, answer, solution and meta of a row; raises UserError for a bad one."""
    key, question = files.field(row, 'answerKey', str), files.field(row, 'question', dict)
    stem, choices = files.field(question, 'stem', str), files.field(question, 'choices', list)
    labels = [files.field(choice, 'label', str) for choice in choices]
    texts = [files.field(choice, 'text', str) for choice in choices]
    if labels != LABELS or key not in LABELS:
      raise records.UserError(f'answerKey {key!r}, labels {labels}: the choices are A, B, C, D, E')

    def problem(correct: str) -> str:
      lines = [
        f'({label.lower()}) {text}' + ' (CORRECT)' * (label == correct)
        for label, text in zip(labels, texts, strict=True)
      ]
      return '\n'.join([f'Q: {stem}', 'Answer Choices:', *lines, 'A:'])

    return {
      'problem': problem(correct=''),
      'answer': key.lower(),
      'solution': None,
      'meta': {records.CHECKED_BY: 'commonsenseqa', records.HINTED: problem(correct=key)},
    }
