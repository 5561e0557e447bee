"""Sweeps of budgets over seeds: means and intervals by hand, the files, what is refused."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def sweep(step, phase, accuracy):
  """An evaluation of two settings, 8 and 16 tokens."""
  row = {'step': step, 'phase': phase, 'phase_step': step, 'kind': 'eval'}
  for n, gain in ((8, 0.0), (16, 0.2)):
    found = {'accuracy': accuracy + gain, 'think_length': n - 2, 'completion_length': n + 1}
    found |= {'within': 1.0, 'truncated': 0.0, 'mean_abs_error': 1 / n, 'within_10': 0.5}
    row |= {f'eval/target/{n}/{name}': value for name, value in found.items()}
  whole = {'control': 1.0, 'scaling': 25.0, 'performance': accuracy + 0.2}
  return row | {f'eval/target/{name}': value for name, value in whole.items()}


def runs(folder):
  for seed, accuracy in enumerate((0.3, 0.5, 0.4)):
    rows = [sweep(0, 'pretrain', 0.1), sweep(5, 'exact', 0.2), sweep(9, 'exact', accuracy)]
    rows.insert(1, {'step': 1, 'phase': 'exact', 'phase_step': 1, 'kind': 'train', 'loss': 1.0})
    path = folder / f'lcpo-{seed}' / 'metrics.jsonl'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


def program(*flags):
  command = [sys.executable, 'experiments/budget_curves.py', *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_means_and_intervals_by_hand(tmp_path):
  """.3, .5, .4: mean .4, sd .1, t(.975, 2) = 4.303, half width .248."""
  given, to = runs(tmp_path / 'runs'), tmp_path / 'out'
  to.mkdir()
  curves = '--curves=lcpo:pretrain:target,lcpo:exact:target'
  done = program(f'--runs={given}', f'--to={to}', curves, '--asked=lcpo:exact:target')
  assert done.returncode == 0, done.stderr
  text = (to / 'budgets.md').read_text()
  assert done.stdout.strip() == text.strip()
  assert '| lcpo:exact:target | 1.00 ± 0.00 | 25 ± 0 | 0.600 ± 0.248 |' in text
  assert '| 8 | 0.400 ± 0.248 | 6.0 ± 0.0 | 9.0 ± 0.0 | 1.00 ± 0.00 |' in text
  assert '| 8 | 0.100 ± 0.000 |' in text  # the base
  rows = [json.loads(line) for line in (to / 'budgets.jsonl').read_text().splitlines()]
  assert len(rows) == 3 * 2 * 3  # seeds, phases, two settings and all
  last = [row for row in rows if row['phase'] == 'exact' and row['setting'] == '8']
  assert [row['accuracy'] for row in last] == [0.3, 0.5, 0.4]
  assert (to / 'budgets.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  'curve, said',
  [
    ('lcpo:max:target', "'lcpo:max:target' is not one of lcpo:pretrain:target, lcpo:exact:target"),
    ('cold', "'cold' is not one of"),
  ],
)
def test_an_unknown_curve(tmp_path, curve, said):
  done = program(f'--runs={runs(tmp_path / "runs")}', f'--to={tmp_path}', f'--curves={curve}')
  assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1
