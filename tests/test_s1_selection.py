"""The stages of s1's selection by hand, and a file that went through all of them."""

import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import records
from reasonrl.experiments import s1_selection as s1


def row(problem='What is 1 + 1?', source='web', domain='algebra', length=10, solved=False):
  meta = {'source': source, 'domain': domain, 'length': length, 'solved': solved}
  return {'problem': problem, 'answer': '2', 'meta': meta}


def problems(rows):
  return [row['problem'] for row in rows]


def test_incomplete_rows_are_dropped():
  kinds = {'problem': str, 'meta.length': int}
  rows = [
    row('a'),
    row('b', length=None),
    {'problem': 'c'},
    {'problem': None, 'meta': {}},
    row('e'),
  ]
  assert problems(s1.complete(rows, kinds)) == ['a', 'e']
  with pytest.raises(records.UserError, match="no row has a field 'meta.lenght'"):
    s1.complete(rows, {'meta.lenght': int})
  with pytest.raises(records.UserError, match="line 2: meta.solved='no' is not a bool"):
    s1.complete([row(), row(solved='no')], {'meta.solved': bool})


def test_one_row_for_a_problem():
  rows = [row('A  b\n', length=1), row('c'), row('a B', length=2), row('ab')]
  assert s1.distinct(rows, 'problem') == [rows[0], rows[1], rows[3]]


def test_decontamination_by_hand():
  test = 'one two three four five six seven eight nine'
  left = lambda text, n=8: bool(s1.decontaminated([row(text)], 'problem', [test, 'Why not?'], n))
  assert not left('so ONE two  three four\nfive six seven eight then')
  assert left('one two three four five six seven and eight nine')  # seven in a row
  assert not left('one two three four five six seven and eight nine', 7)
  assert not left('two three four five six seven eight nine')  # not the first eight
  assert not left('why NOT?') and left('why not indeed?')  # shorter than eight: only as a whole
  assert s1.decontaminated([row('a')], 'problem', [], 8) == [row('a')]


@pytest.mark.parametrize(
  'problem, source, ok',
  [
    ('What is 1 + 1?', 'web', True),
    ('See ![Image](x.png)', 'web', False),
    ('p1. What is 1 + 1?', 'web', False),
    ('p999. What?', 'web', False),
    ('p0. or p1000. or p 1. or p1, as it was', 'web', True),
    ('**7** What is it?', 'web', False),
    ('**B.2** What is it?', 'web', False),
    ('**Note** that x = 2', 'web', False),  # the digit may come later in the line
    ('**Note** that\nx = 2', 'web', True),
    ('**bold words** of 2', 'web', True),  # white space in it
    ('2 and **bold**', 'web', True),
    ('[asy] draw(); [/asy]', 'web', False),
    ('[asy] draw(); [/asy]', 'qq/AIME_1983_2024', True),
    ('[asy] draw(); [/asy] ![Image]', 'qq/AIME_1983_2024', True),
    ('![Image]', 'qq/AIME_1983_2024', False),
  ],
)
def test_well_formed(problem, source, ok):
  assert s1.well_formed(problem, source) == ok


def test_ranks_have_halving_shares():
  # Of three: 4/7, 2/7, 1/7.
  at = lambda u: s1.draw_rank(3, u)
  assert [at(u) for u in (0.0, 0.5714, 0.5715, 0.8571, 0.8572)] == [0, 0, 1, 1, 2]
  assert [s1.draw_rank(1, u) for u in (0.0, 1 - 2**-53)] == [0, 0]


@given(st.integers(1, 5000), st.floats(0, 1, exclude_max=True))
def test_any_uniform_draws_a_rank(size, u):
  k = s1.draw_rank(size, u)
  assert 0 <= k < size
  share = lambda k: (1 - 0.5**k) / (1 - 0.5**size)
  assert share(k) - 1e-9 <= u <= share(k + 1) + 1e-9


def test_diversity_by_hand():
  rows = [row('a5', length=5), row('a9', length=9), row('a7', length=7)]
  rows += [row('b1', domain='geometry', length=1)]
  draws = iter([0.6, 0.0, 0.2, 0.6, 0.9, 0.7])
  # geometry, now used up; then of algebra alone 7 (.6 is above 4/7), then of 9 and 5 the shorter
  found = s1.diverse(rows, 'meta.domain', 'meta.length', 3, lambda: next(draws))
  assert problems(found) == ['a5', 'a7', 'b1']  # in the order of the input
  with pytest.raises(records.UserError, match='--size=5, but only 4 rows are left'):
    s1.diverse(rows, 'meta.domain', 'meta.length', 5, lambda: 0.0)


def test_domains_are_as_likely_as_each_other_and_long_traces_likelier():
  rows = [
    row(f'{d}{n}', domain=d, length=n) for d, size in (('a', 60), ('b', 6)) for n in range(size)
  ]
  taken = [
    problems(s1.diverse(rows, 'meta.domain', 'meta.length', 1, random.Random(seed).random))[0]
    for seed in range(2000)
  ]
  assert 900 < sum(name[0] == 'b' for name in taken) < 1100
  assert 900 < sum(name in ('a59', 'b5') for name in taken) < 1100


def test_the_program(tmp_path):
  rows = [
    row('one', length=3),
    row('ONE', length=9),  # not distinct
    row('two', length=None),  # not complete
    row('what is the sum of all of the numbers below'),  # contaminated
    row('p1. three'),  # not well formed
    row('four', solved=True),  # not difficult
    *(row(f'five {i}', domain='geometry', length=i) for i in range(4)),
  ]
  write = lambda name, rows: (tmp_path / name).write_text('\n'.join(map(json.dumps, rows)))
  write('pool.jsonl', rows)
  write('test.jsonl', [{'question': 'What is the sum of all of the primes?'}])
  command = [sys.executable, s1.__file__, '--rows=pool.jsonl', '--tests=test.jsonl']
  command += ['--test_problem=question', '--to=out.jsonl', '--size=3']
  run = lambda *more: subprocess.run(
    [*command, *more], cwd=tmp_path, env=os.environ, capture_output=True, text=True
  )
  done = run()
  assert done.stdout.split('\n')[:-1] == [
    *('      10 rows', '       9 complete', '       8 distinct', '       7 decontaminated'),
    *('       6 well formed', '       5 difficult', '       3 diverse'),
  ]
  kept = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().split('\n')[:-1]]
  assert len(kept) == 3 and all(r in rows for r in kept)
  first = (tmp_path / 'out.jsonl').read_text()
  assert run('--seed=0').returncode == 0 and (tmp_path / 'out.jsonl').read_text() == first
  failed = run('--size=6')
  assert (failed.returncode, failed.stderr) == (2, 'error: --size=6, but only 5 rows are left\n')
