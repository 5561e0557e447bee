r"""GSM8K (arXiv 2110.14168) from its own files, in the format of STaR (arXiv 2203.14465).

    row       {"question": "Ann has 3 ...?", "answer": "She has 3*4=<<3*4=12>>12.\n#### 12"}
    problem   Q: Ann has 3 ...?\nA:
    hinted    Q: Ann has 3 ...? (12)\nA:
    solution   She has 3*4=<<3*4=12>>12.\n#### 12      (with the space in front)

The calculator's marks <<3*4=12>> stay; nothing here calculates.
"""

from __future__ import annotations

import dataclasses

from reasonrl import records
from reasonrl.tasks import files

MARK = '####'


@dataclasses.dataclass(frozen=True)
class Gsm8k(files.Files):
  """Word problems whose answers end with a line '#### 12'; other keys of a row are ignored."""

  name = 'gsm8k'

  @staticmethod
  def parse(row: dict) -> dict:
    """problem, answer, solution and meta of a row; raises UserError for a bad one."""
    question, solution = (files.field(row, key, str) for key in ('question', 'answer'))
    gold = solution.partition(MARK)[2].strip()
    if not gold or '\n' in gold:
      raise records.UserError(f'answer {solution[-20:]!r} does not end with a line {MARK} 72')
    hinted = f'Q: {question} ({gold})\nA:'
    return {
      'problem': f'Q: {question}\nA:',
      'answer': gold,
      'solution': f' {solution}',
      'meta': {records.CHECKED_BY: 'gsm8k', records.HINTED: hinted},
    }
