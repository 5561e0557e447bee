"""Problems of your own: a row is an example as it is.

    {"problem": "What is 6 times 7?", "answer": "42", "solution": null, "meta": {"level": 1}}

`solution` and `meta` may be left out. A problem is what the user asks, before any template;
`meta.checked_by` names the reward where equality with `answer` does not decide.
"""

from __future__ import annotations

import dataclasses

from reasonrl import records
from reasonrl.tasks import files


@dataclasses.dataclass(frozen=True)
class Jsonl(files.Files):
  """Rows that hold the fields of an example; any other key is an error.

  meta.checked_by names the reward that decides, meta.hinted is the problem with its hint, if they
  are not the usual ones.
  """

  name = 'jsonl'

  @staticmethod
  def parse(row: dict) -> dict:
    """problem, answer, solution and meta of a row; raises UserError for a bad one."""
    fields = {
      'problem': files.field(row, 'problem', str),
      'answer': files.field(row, 'answer', str),
      'solution': files.field(row, 'solution', str | None),
      'meta': files.field(row, 'meta', dict | None) or {},
    }
    reserved = sorted({records.HINT_SHOWN, records.TOKEN_IDS} & fields['meta'].keys())
    if reserved:
      raise records.UserError(f'meta.{reserved[0]} is not for files: a run sets it itself')
    unknown = sorted(row.keys() - fields.keys())
    if unknown:
      raise records.UserError(f'unknown key {unknown[0]!r}; choices: {", ".join(fields)}')
    return fields
