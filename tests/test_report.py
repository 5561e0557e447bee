"""The report reads what logs.py writes, whole or not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import matplotlib.axes
import pytest

from reasonrl import curves, logs, records, report


def train(step, phase, **metrics):
  return {'step': step, 'phase': phase, 'phase_step': step, 'kind': 'train', **metrics}


def held_out(step, phase, accuracy):
  key = 'eval/sampled/accuracy'
  bounds = {f'{key}_low': accuracy - 0.05, f'{key}_high': accuracy + 0.05}
  return {'step': step, 'phase': phase, 'phase_step': 0, 'kind': 'eval', key: accuracy, **bounds}


ROWS = [
  held_out(0, 'pretrain', 0.0),
  *(train(step, 'pretrain', loss=3 - step / 10, grad_norm=1.0) for step in range(1, 11)),
  held_out(10, 'pretrain', 0.3),
  *(train(step, 'rl', loss=0.0, reward=step / 10, accuracy=step / 20) for step in range(11, 21)),
  held_out(20, 'rl', 0.9),
]
SAMPLE = {
  'step': 20,
  'phase': 'rl',
  'phase_step': 10,
  'kind': 'eval',
  'mode': 'greedy',
  'prompt': '2 + 2 = <script>alert(1)</script>',
  'completion': 'so <think>4</think> it is',
  'answer': '4',
  'reward': 1.1,
  'right': True,
  'parts': {'accuracy': 1.0},
  'advantage': None,
  'length': 5,
  'stop': 'eos',
}


def workdir(folder, rows, samples=()):
  metrics = logs.Metrics(folder, True)
  for row in rows:
    metrics.write(row)
  metrics.rollouts(samples)
  metrics.close()
  return folder


def drawn(monkeypatch, folder) -> dict[str, dict[str, list]]:
  """Panel title -> series label -> the points drawn."""
  panels = {}
  legend = matplotlib.axes.Axes.legend

  def watch(axis, *args, **kwargs):
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    panels[axis.get_title(loc='left')] = lines
    return legend(axis, *args, **kwargs)

  monkeypatch.setattr(matplotlib.axes.Axes, 'legend', watch)
  curves.write(folder)
  return panels


def test_each_panel_draws_its_rows_over_its_phases(tmp_path, monkeypatch):
  panels = drawn(monkeypatch, workdir(tmp_path, ROWS))
  assert set(panels) == {
    'Accuracy',
    'Reward',
    'Supervised loss (nats per token)',
    'Gradient norm',
  }
  accuracy = panels['Accuracy']
  assert accuracy['training samples'] == [[s, s / 20] for s in range(11, 21)]
  # The evaluation of the untrained model lies outside the phase that this panel shows.
  assert accuracy['held-out, sampled (95% interval)'] == [[10, 0.3], [20, 0.9]]
  loss = panels['Supervised loss (nats per token)']
  assert loss['training'] == [[s, 3 - s / 10] for s in range(1, 11)]
  assert all(step <= 10 for line in loss.values() for step, _ in line)  # no policy loss


def test_headline_compares_with_the_model_before_reinforcement():
  assert curves.headline(ROWS) == ('Held-out accuracy: sampled 0.300 → 0.900 (95%: 0.850 to 0.950)')
  supervised = [row for row in ROWS if row['phase'] == 'pretrain']
  assert curves.headline(supervised).startswith('Held-out accuracy: sampled 0.000 → 0.300')
  assert curves.headline(ROWS[:5]) == ''


def test_headline_gives_the_paired_gain():
  before = {'eval/sampled/outcomes': [0, 0, 1, 1]}
  rows = [row | before if row['kind'] == 'eval' else row for row in ROWS]
  rows[-1] = rows[-1] | {'eval/sampled/outcomes': [1, 0, 1, 1]}
  # Gains 1, 0, 0, 0: mean 1/4, sd 1/2, so 1/4 -+ 1.96 / 4.
  assert curves.headline(rows).endswith('0.900, gain 0.250 (95%: -0.240 to 0.740)')


@pytest.mark.parametrize('count', [1, 5, 13, len(ROWS)])
def test_partial_runs_have_a_report(tmp_path, count):
  workdir(tmp_path, ROWS[:count])
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 99, "pha')  # a row that is being written
  assert report.html(tmp_path).stat().st_size > 10_000
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_rows_without_any_known_metric(tmp_path):
  workdir(tmp_path, [train(1, 'rl'), train(2, 'rl', loss=float('nan'), reward=None)])
  assert report.html(tmp_path).exists()


def test_no_metrics_is_a_user_error(tmp_path):
  with pytest.raises(records.UserError, match='no metrics'):
    report.html(tmp_path)


def test_moving_mean():
  assert curves._smooth([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
  assert curves._smooth([1, 2], 1) == [1, 2]


def test_page_is_self_contained_and_escapes_model_text(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'seed': 12345}))
  wrong = SAMPLE | {'right': False, 'completion': 'no tags \udc80'}
  page = report.html(workdir(tmp_path, ROWS, [SAMPLE, wrong])).read_text()
  assert '<script' not in page and '2 + 2 = &lt;script&gt;' in page
  assert not re.findall(r'(?:src|href)="(?!data:)', page)
  assert 'class="sample right"' in page and 'class="sample wrong"' in page
  assert '<b>so </b><span class="think">&lt;think&gt;4&lt;/think&gt;</span><b> it is</b>' in page
  assert '12345' in page
  table = re.sub(r'<[^>]+>', ' ', page)
  assert re.search(r'eval/sampled/accuracy\s+0\s+0.3\s+0.9\s', table)


def test_command_line_door(tmp_path):
  workdir(tmp_path, ROWS)
  door = [sys.executable, '-m', 'reasonrl.report']
  root = report.pathlib.Path(report.__file__).parent.parent
  done = subprocess.run([*door, f'--workdir={tmp_path}'], cwd=root, capture_output=True, text=True)
  assert str(tmp_path / 'report.html') in done.stdout, done.stderr
  done = subprocess.run(door, cwd=root, capture_output=True, text=True)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1) and '--workdir' in done.stderr


def test_accuracy_by_a_fact_of_the_problems_has_a_panel(tmp_path, monkeypatch):
  def by(row, *values):
    return row | {f'eval/greedy/accuracy/digits={n}': v for n, v in enumerate(values, 1)}

  rows = [by(held_out(10, 'pretrain', 0.3), 0.5, 0.0)]
  rows += [train(11, 'collect', reward=0.5, accuracy=0.5), train(12, 'sft', loss=1.0)]
  rows += [by(held_out(12, 'sft', 0.6) | {'iteration': 3, 'phase_step': 12}, 0.9, 0.3)]
  panels = drawn(monkeypatch, workdir(tmp_path, rows))
  assert panels['Held-out accuracy, greedy'] == {
    'digits=1': [[10, 0.5], [12, 0.9]],
    'digits=2': [[10, 0.0], [12, 0.3]],
  }
  assert 'sft-3 12' in (report.html(tmp_path)).read_text()
  # The evaluation after what was learned from the collected rows belongs to the first panel.
  assert panels['Accuracy']['held-out, sampled (95% interval)'] == [[10, 0.3], [12, 0.6]]


def test_accuracy_under_budgets_has_a_panel(tmp_path, monkeypatch):
  """The last sweep, in the order of the thinking tokens."""

  def sweep(step, tokens):
    row = held_out(step, 'rl', 0.5)
    for n, accuracy in tokens.items():
      found = {'accuracy': accuracy, 'accuracy_low': accuracy - 0.1, 'accuracy_high': 1.0}
      found |= {'think_length': n - 0.5, 'completion_length': n + 3}
      row |= {f'eval/max_think/{n}/{name}': value for name, value in found.items()}
    return row | {'eval/max_think/control': 1.0}

  rows = [train(1, 'rl', reward=0.1, accuracy=0.1), sweep(1, {2: 0.1}), sweep(2, {8: 0.6, 4: 0.3})]
  rows.append(held_out(3, 'rl', 0.5))  # without a sweep
  panel = drawn(monkeypatch, workdir(tmp_path, rows))['Accuracy under budgets']
  ((label, line),) = panel.items()
  assert label == 'max_think (95% interval)' and line == [[3.5, 0.3], [7.5, 0.6]]
