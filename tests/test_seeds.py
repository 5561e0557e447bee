"""Means over seeds by hand, and the files made of runs."""

import json
import math

import pytest

from reasonrl import records
from reasonrl.experiments import seeds


def test_interval_by_hand():
  # sd 1, t(.975, 2) = 4.302653: 4.302653 / sqrt(3)
  assert seeds.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484138), abs=1e-5)
  mean, half = seeds.interval([5.0])
  assert mean == 5.0 and math.isnan(half)


def run(folder, name, base, end):
  rows = [
    {'kind': 'train', 'phase': 'pretrain', 'step': 1, 'phase_step': 1, 'loss': 1.0},
    {'kind': 'eval', 'phase': 'pretrain', 'step': 0, 'phase_step': 0},
    {'kind': 'eval', 'phase': 'pretrain', 'step': 1, 'phase_step': 1},
    {'kind': 'train', 'phase': 'rl', 'step': 2, 'phase_step': 1, 'reward': 1.0, 'accuracy': base},
    {'kind': 'train', 'phase': 'rl', 'step': 3, 'phase_step': 2, 'reward': 1.0, 'accuracy': end},
    {'kind': 'eval', 'phase': 'rl', 'step': 3, 'phase_step': 2},
  ]
  for row, value in zip([r for r in rows if r['kind'] == 'eval'], (0.0, base, end), strict=True):
    row |= {'eval/sampled/accuracy': value, 'eval/sampled/outcomes': [value]}
  (folder / name).mkdir(parents=True)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / name / 'metrics.jsonl').write_text(text)


def test_what_is_written(tmp_path):
  for seed, base, end in ((0, 0.1, 0.7), (1, 0.2, 0.8), (2, 0.3, 0.9)):
    run(tmp_path, f'my-run-{seed}', base, end)
  run(tmp_path, 'other-0', 0.25, 0.5)
  runs = seeds.load(tmp_path)
  assert {variant: list(found) for variant, found in runs.items()} == {
    'my-run': ['0', '1', '2'],
    'other': ['0'],
  }
  base = {'base': {'0': [{'kind': 'train', 'step': 1, 'loss': 1.0}]}}
  assert seeds.reinforcing(runs | base) == runs
  with pytest.raises(records.UserError, match='no phase reinforces in base'):
    seeds.reinforcing(base)
  steps, values = seeds.across(runs['my-run'], 1, 'eval/sampled/accuracy')
  assert steps == [0, 2]  # of the phase, from just before it on
  assert values[1] == pytest.approx((0.8, 0.248417), abs=1e-5)
  lines = seeds.table(runs).split('\n')
  assert lines[2] == '| my-run | 3 | 0.200 ± 0.248 → 0.800 ± 0.248 |'
  assert lines[3] == '| other | 1 | 0.250 → 0.500 |'
  seeds.draw(runs, tmp_path / 'seeds.png')
  assert (tmp_path / 'seeds.png').stat().st_size
