r"""Few problems out of many: how s1 chose its thousand (arXiv 2501.19393, sec. 2 and app. C).

  python experiments/s1_selection.py --rows=pool.jsonl --tests=aime.jsonl,math500.jsonl \
    --to=selected.jsonl

1. complete        every named field of the row is there (a request that failed left none)
2. distinct        one row for each problem, the first
3. decontaminated  no 8 words in a row that a problem of the tests has
4. well formed     no figures, no marks of a bad conversion
5. difficult       no weak model has solved it
6. diverse         --size of them: a domain, each as likely as any other, then one of its rows, with
                   weight 2^-rank, the longest trace having rank 0; without replacement

A line for each stage says how many rows are left. What is written are rows of the input, in its
order. The fields are those of `reasonrl.tasks.jsonl`, so that they can be trained on as they are;
s1's own files have --problem=question --source=source_type --domain=domain --length=gemini_length
--solved=isqwen7bcorrect,isqwen32bcorrect.

Left out on purpose: what s1 does for its benchmarks (it takes 384 problems of AIME, GPQA and MATH
before it draws, and prefers the domains of AIME and GPQA for the last 300), and the judges that say
which domain a problem has and who solved it.
"""

import collections
import json
import math
import pathlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import flags

from reasonrl import command_line, records
from reasonrl.tasks import files

# 'p1.' to 'p999.' number the parts of a problem; bold without white space, with a digit after its
# beginning, is a number of an exercise.
_CONVERTED = re.compile(r'!\[Image\]|p[1-9]\d{0,2}\.|\*\*(?=.*\d)[^\s\]]*\*\*')
_FIGURE = '[asy]'  # the text of AIME's figures says what they show


def field(row: dict, path: str):
  """What a row has at 'meta.domain' and the like; None if it is not there."""
  value = row
  for key in path.split('.'):
    value = value.get(key) if isinstance(value, dict) else None
  return value


def complete(rows: Sequence[dict], kinds: dict[str, type]) -> list[dict]:
  """The rows that have every field.

  Args:
    rows: of a file.
    kinds: field -> its type.

  Raises:
    UserError: no row has a field, or it is of another type.
  """
  for path, kind in kinds.items():
    found = [(number, field(row, path)) for number, row in enumerate(rows, 1)]
    found = [(number, value) for number, value in found if value is not None]
    if not found:
      raise records.UserError(f'no row has a field {path!r}')
    for number, value in found:
      if not isinstance(value, kind):
        raise records.UserError(f'line {number}: {path}={value!r:.40} is not a {kind.__name__}')
  return [row for row in rows if all(field(row, path) is not None for path in kinds)]


def words(text: str) -> list[str]:
  """The words of a problem as they are compared."""
  return text.lower().split()


def distinct(rows: Iterable[dict], problem: str) -> list[dict]:
  """The first row of each problem; case and white space do not count."""
  found = {}
  for row in rows:
    found.setdefault(tuple(words(field(row, problem))), row)
  return list(found.values())


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
  """All n words in a row; a shorter text is one of its own."""
  found = words(text)
  return {tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))}


def decontaminated(rows: Iterable[dict], problem: str, tests: Iterable[str], n: int) -> list[dict]:
  """The rows that share no n words in a row with a problem of the tests."""
  seen = set().union(*(ngrams(text, n) for text in tests))
  return [row for row in rows if seen.isdisjoint(ngrams(field(row, problem), n))]


def well_formed(problem: str, source: str) -> bool:
  """Whether a problem can be read as text. One with a figure of AIME is, whatever else it has."""
  if _FIGURE in problem:
    return 'AIME' in source
  return _CONVERTED.search(problem) is None


def draw_rank(size: int, u: float) -> int:
  """The rank below `size` that a uniform u of [0, 1) draws: k with probability prop. to 2^-k.

  The first with u (1 - 2^-size) < 1 - 2^-(k + 1), what 0 to k have together.
  """
  return min(int(-math.log2(1 - u * (1 - 0.5**size))), size - 1)


def diverse(
  rows: Sequence[dict], domain: str, length: str, size: int, uniform: Callable[[], float]
) -> list[dict]:
  """`size` rows: see the head of this file. Domains that are used up are left out.

  Raises:
    UserError: there are fewer.
  """
  if len(rows) < size:
    raise records.UserError(f'--size={size}, but only {len(rows)} rows are left')
  domains = collections.defaultdict(list)  # -> positions of its rows, the longest trace first
  for i in sorted(range(len(rows)), key=lambda i: -field(rows[i], length)):
    domains[field(rows[i], domain)].append(i)
  left, taken = [domains[name] for name in sorted(domains)], []
  for _ in range(size):
    members = left[int(uniform() * len(left))]
    taken.append(members.pop(draw_rank(len(members), uniform())))
    left = [members for members in left if members]
  return [rows[i] for i in sorted(taken)]


def select(
  rows: list[dict],
  tests: Sequence[str],
  *,
  problem: str,
  source: str,
  domain: str,
  length: str,
  solved: Sequence[str],
  ngram: int,
  size: int,
  seed: int,
) -> Iterator[tuple[str, list[dict]]]:
  """(stage, the rows that are left) after each stage.

  `tests` are texts of problems, the others are flags. Raises what `complete` and `diverse` raise.
  """
  yield 'rows', rows
  kinds = {problem: str, source: str, domain: str, length: int}
  rows = complete(rows, kinds | dict.fromkeys(solved, bool))
  yield 'complete', rows
  rows = distinct(rows, problem)
  yield 'distinct', rows
  rows = decontaminated(rows, problem, tests, ngram)
  yield 'decontaminated', rows
  rows = [row for row in rows if well_formed(field(row, problem), field(row, source))]
  yield 'well formed', rows
  rows = [row for row in rows if not any(field(row, path) for path in solved)]
  yield 'difficult', rows
  yield 'diverse', diverse(rows, domain, length, size, random.Random(f'{seed}/s1').random)


def main(_) -> None:
  given = flags.FLAGS
  if not given.to:
    raise records.UserError('give --to=FILE')
  tests = []
  for path in given.tests:
    found = files.read(path)
    tests += [field(row, given.test_problem) for row in complete(found, {given.test_problem: str})]
  names = ('problem', 'source', 'domain', 'length', 'solved', 'ngram', 'size', 'seed')
  flagged = {name: getattr(given, name) for name in names}
  for stage, rows in select(files.read(given.rows), tests, **flagged):
    print(f'{len(rows):>8,} {stage}')
  lines = (json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  pathlib.Path(given.to).write_text(''.join(lines), encoding='utf-8')


if __name__ == '__main__':  # here: other programs have a --to as well
  flags.DEFINE_string('rows', '', 'JSONL file to choose from.')
  flags.DEFINE_string('to', '', 'JSONL file to write.')
  flags.DEFINE_list('tests', [], 'JSONL files of problems that must not be trained on.')
  flags.DEFINE_string('test_problem', 'problem', 'Their field for the problem.')
  flags.DEFINE_string('problem', 'problem', 'Field of --rows for the problem.')
  flags.DEFINE_string('source', 'meta.source', 'For the data set that it comes from.')
  flags.DEFINE_string('domain', 'meta.domain', 'For what it is about.')
  flags.DEFINE_string('length', 'meta.length', 'For the tokens of its trace.')
  flags.DEFINE_list('solved', ['meta.solved'], 'For whether a weak model solved it.')
  flags.DEFINE_integer('ngram', 8, 'Words in a row that tests may not share; 13 is common.', 1)
  flags.DEFINE_integer('size', 1000, 'Rows to choose.', 1)
  flags.DEFINE_integer('seed', 0, 'Of the choice.')
  command_line.guarded(main, flags.FLAGS, '')
