"""Workdir files byte by byte, and the display on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import rich.console
from hypothesis import example, given
from hypothesis import strategies as st

from reasonrl import logs, records

ROW = {
  'step': 3,
  'phase': 'rl',
  'prompt': 'What is [red]2 + 2[/red]?',
  'completion': '<think>2 and 2</think><answer>4</answer>',
  'answer': '4',
  'reward': 1.1,
  'right': True,
  'parts': {'accuracy': 1.0, 'format': 0.1},
  'advantage': 0.5,
  'length': 12,
  'stop': 'eos',
}


def config(**changes) -> ml_collections.ConfigDict:
  base = ml_collections.ConfigDict(
    {
      'phases': ('pretrain', ('collect', 'sft', 12)),
      'rl': {'optim': {'learning_rate': 3e-4}, 'steps': 10},
      'mesh': {'data': 1},
    }
  )
  base.update_from_flattened_dict(changes)
  return base


def opened(path, cfg=None) -> pathlib.Path:
  found = logs.check_workdir(str(path), cfg or config(), ('mesh',))
  logs.open_workdir(found, cfg or config(), ['cpu:0'])
  return found


# ------------------------------------------------------------------------------------ workdir


def test_open_workdir_writes_the_whole_config_and_each_start(tmp_path):
  path = opened(tmp_path / 'a' / 'b')
  assert path.is_absolute()
  written = json.loads((path / 'config.json').read_text())
  assert written['phases'] == ['pretrain', ['collect', 'sft', 12]]
  assert written['rl'] == {'optim': {'learning_rate': 3e-4}, 'steps': 10}
  assert list(written) == sorted(written)
  opened(path)  # a second start, of the same config
  starts = json.loads((path / 'env.json').read_text())
  assert len(starts) == 2
  assert starts[0]['devices'] == ['cpu:0']
  assert list(starts[0]['packages']) == sorted(starts[0]['packages'])
  assert starts[0]['packages']['numpy'] == np.__version__
  assert starts[0]['command'].endswith(shlex.join(sys.orig_argv[1:]))
  assert sorted(file.name for file in path.iterdir()) == ['config.json', 'env.json']


def test_another_config_is_refused_with_the_fields(tmp_path):
  opened(tmp_path / 'a')
  other = config(**{'rl.optim.learning_rate': 1e-3})
  other.seed = 7
  del other.phases
  with pytest.raises(records.UserError) as e:
    opened(tmp_path / 'a', other)
  assert 'rl.optim.learning_rate: 0.0003 in the workdir, 0.001 now' in str(e.value)
  assert 'seed: absent in the workdir, 7 now' in str(e.value)
  assert 'phases: ["pretrain", ["collect", "sft", 12]] in the workdir, absent now' in str(e.value)
  assert 'steps' not in str(e.value)
  opened(tmp_path / 'a')  # the refusal changed nothing


def test_only_named_sections_may_differ(tmp_path):
  opened(tmp_path / 'a')
  opened(tmp_path / 'a', config(**{'mesh.data': 8}))
  changed = config()
  changed.meshes = 1  # begins like 'mesh' but is another field
  with pytest.raises(records.UserError, match='meshes'):
    opened(tmp_path / 'a', changed)


def test_folders_that_cannot_be_a_workdir(tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.tex').write_text('')
  with pytest.raises(records.UserError, match='neither empty nor a run'):
    opened(tmp_path / 'full')
  with pytest.raises(records.UserError, match='cannot write to workdir'):
    opened(tmp_path / 'full' / 'thesis.tex' / 'x')
  with pytest.raises(records.UserError, match='not a local path'):
    opened('gs://bucket/run')
  (tmp_path / 'killed').mkdir()
  (tmp_path / 'killed' / 'config.json.tmp').write_text('{')  # killed in its first write
  assert opened(tmp_path / 'killed')


def test_processes_that_do_not_write_leave_no_trace(tmp_path):
  path = logs.check_workdir(str(tmp_path / 'a'), config(), ())
  metrics = logs.Metrics(path, False)
  metrics.truncate(logs.START)
  metrics.write({'step': 1})
  assert metrics.offsets() == logs.START
  assert not path.exists()


# ------------------------------------------------------------------------------------ metrics


def test_rows_are_exact_json_with_null_for_nan(tmp_path):
  metrics = logs.Metrics(tmp_path, True)
  metrics.write(
    {'step': 1, 'a': 0.1 + 0.2, 'b': math.nan, 'c': [math.inf, 1], 'd': np.float32(0.1)}
  )
  metrics.write({'step': np.int64(2), 'ok': np.bool_(True), 'n': np.array([1.0, np.nan])})
  # On disk before close: a kill loses nothing. 0.1f = 13421773 / 2**27.
  assert (tmp_path / 'metrics.jsonl').read_text() == (
    '{"step": 1, "a": 0.30000000000000004, "b": null, "c": [null, 1], "d": 0.10000000149011612}\n'
    '{"step": 2, "ok": true, "n": [1.0, null]}\n'
  )


def test_truncate_cuts_back_to_exactly_the_checkpoint(tmp_path):
  metrics = logs.Metrics(tmp_path, True)
  metrics.write({'step': 1})
  metrics.rollouts([ROW])
  offsets = metrics.offsets()
  files = [tmp_path / 'metrics.jsonl', tmp_path / 'rollouts.jsonl']
  kept = [file.read_bytes() for file in files]
  assert offsets == {'metrics.jsonl': 12, 'rollouts.jsonl': len(kept[1])}
  metrics.write({'step': 2})
  metrics.rollouts([ROW, ROW])
  metrics.close()

  resumed = logs.Metrics(tmp_path, True)
  resumed.truncate(offsets)
  assert [file.read_bytes() for file in files] == kept
  resumed.write({'step': 9})
  assert files[0].read_bytes() == kept[0] + b'{"step": 9}\n'
  resumed.truncate(logs.START)
  assert [file.read_bytes() for file in files] == [b'', b'']
  with pytest.raises(records.UserError, match='has 0 bytes, but 12'):
    resumed.truncate(offsets)


@example('\ud800 \u2028')
@given(st.text(st.characters(codec=None)))
def test_any_text_survives_in_one_line(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp('rows')
  logs.Metrics(folder, True).rollouts([{'completion': text}])
  lines = (folder / 'rollouts.jsonl').read_bytes().split(b'\n')
  assert len(lines) == 2 and not lines[1]
  assert json.loads(lines[0]) == {'completion': text}


# ------------------------------------------------------------------------------------ display


def console(terminal: bool, **kwargs) -> rich.console.Console:
  options = {'width': 80, 'height': 24, 'force_terminal': terminal, '_environ': {'TERM': 'xterm'}}
  return rich.console.Console(file=io.StringIO(), **(options | kwargs))


def test_plain_lines(monkeypatch):
  now = 0.0
  monkeypatch.setattr(logs.time, 'monotonic', lambda: now)
  out = console(False)
  with logs.Display(every=10, shows=True, console=out) as display:
    display.phase('rl', 'reinforce', 150, 9)
    display.status('compiling the sampler')
    for step in range(10, 31):
      metrics = {'reward': 1.324, 'accuracy': np.float32(0.61), 'think_length': 5.12}
      metrics |= {'entropy': math.nan, 'loss': 0.1, 'timing/tokens_per_s': 12345.0}
      now += 1.0  # one second a step
      display.step(step, metrics)
    key = 'eval/sampled/accuracy'
    display.evaluation('after', {key: 0.5, f'{key}_low': 0.4, f'{key}_high': 0.6})
    display.transcripts([ROW])
    display.note('the end [bold]')
  assert out.file.getvalue().split('\n') == [
    'rl: reinforce, 150 steps, resumed after step 9',
    'compiling the sampler ...',
    'rl 10/150  reward 1.32  accuracy 0.61  think 5.1  tok/s 12.3k',
    'rl 20/150  reward 1.32  accuracy 0.61  think 5.1  tok/s 12.3k  2m10s left',
    'rl 30/150  reward 1.32  accuracy 0.61  think 5.1  tok/s 12.3k  2m00s left',
    'held-out accuracy after  sampled 0.500 [0.400, 0.600]',
    '✓ What is [red]2 + 2[/red]?',
    '  <think>2 and 2</think><answer>4</answer>',
    '  answer 4  reward 1.10  advantage +0.50  tokens 12  eos',
    'the end [bold]',
    '',
  ]


def test_terminal_shows_phase_progress_compilation_and_coloured_transcripts():
  out = console(True)
  with logs.Display(every=10, shows=True, console=out) as display:
    display.phase('rl', 'reinforce', 150, 0)
    display.status('compiling the sampler')
    assert 'compiling the sampler' in drawn(display)
    display.step(1, {'reward': 0.0, 'accuracy': 0.0})
    display.step(2, {'reward': 1.0, 'accuracy': 0.5, 'entropy': 0.4})
    display.transcripts([ROW, ROW | {'right': False}])
    picture = drawn(display)
  assert 'rl 2/150' in picture and 'entropy 0.40' in picture and 'compiling' not in picture
  assert 'accuracy ▁█ 0.00 → 0.50' in picture
  assert '✓ What is' in picture and '✗ What is' in picture
  coloured = logs.transcript(ROW, 80)
  styles = {coloured.plain[span.start : span.end].strip(): span.style for span in coloured.spans}
  assert styles['<answer>4</answer>'] == 'bold green'
  assert styles['<think>2 and 2</think>'] == 'cyan'
  wrong = logs.transcript(ROW | {'right': False}, 80)
  assert 'bold red' in {span.style for span in wrong.spans}


def drawn(display) -> str:
  """The live picture as text, on a console of the same size."""
  out = rich.console.Console(file=io.StringIO(), width=80, height=24)
  out.print(display._picture())
  return out.file.getvalue()


def test_terminal_is_restored_after_an_exception():
  out = console(True)
  with pytest.raises(RuntimeError), logs.Display(1, True, out) as display:
    display.phase('rl', 'reinforce', 3, 0)
    raise RuntimeError
  hidden, shown = out.file.getvalue().rfind('\x1b[?25l'), out.file.getvalue().rfind('\x1b[?25h')
  assert 0 <= hidden < shown


@pytest.mark.parametrize('height', [3, 8, 24])
def test_picture_fits_the_terminal(height):
  out = console(True, height=height)
  display = logs.Display(1, True, out)
  display.phase('rl', 'reinforce', 3, 0)
  display.step(1, {'reward': 1.0})
  display.transcripts([ROW | {'completion': 'x ' * 5000, 'prompt': 'y' * 5000}] * 8)
  lines = out.render_lines(display._picture())
  assert len(lines) <= max(height, 4)  # the bar, the numbers and the curve are always there


def test_colab_and_dumb_terminals_get_plain_lines(monkeypatch):
  for colab, out in ((False, console(True, _environ={'TERM': 'dumb'})), (True, console(True))):
    if colab:
      monkeypatch.setenv('COLAB_RELEASE_TAG', 'release')
    with logs.Display(1, True, out) as display:
      display.phase('rl', 'reinforce', 3, 0)
      display.step(1, {})
    assert 'rl 1/3\n' in out.file.getvalue() and '─' not in out.file.getvalue()


def test_other_processes_are_silent():
  out = console(False)
  with logs.Display(1, False, out) as display:
    display.phase('rl', 'reinforce', 3, 0)
    display.step(1, {'reward': 1.0})
    display.note('x')
  assert out.file.getvalue() == ''


@example('a\x1b[2J' * 999, '<think>\x9b' + 'b' * 9999 + '</think>\u202e')
@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_model_text_cannot_command_the_terminal(prompt, completion):
  text = logs.transcript(ROW | {'prompt': prompt, 'completion': completion}, 40).plain
  assert all(c.isprintable() or c == '\n' for c in text)
  assert text.count('\n') == 2 and len(text) < 500


def test_output_that_cannot_spell_a_letter_gets_a_question_mark():
  program = (
    'from reasonrl import logs\n'
    'with logs.Display(1, True) as display:\n'
    "  display.note('caf\\u00e9 \\u4e2d')\n"
  )
  environment = os.environ | {
    'PYTHONPATH': str(pathlib.Path(logs.__file__).parent.parent),
    'PYTHONIOENCODING': 'ascii',
  }
  done = subprocess.run(
    [sys.executable, '-c', program], env=environment, capture_output=True, check=True
  )
  assert done.stdout == b'caf? ?\n'


@pytest.mark.parametrize(
  'seconds, text', [(0.4, '0s'), (59.6, '1m00s'), (80, '1m20s'), (7325, '2h02m')]
)
def test_clock(seconds, text):
  assert logs._clock(seconds) == text


@pytest.mark.parametrize('number, text', [(12345, '12.3k'), (999, '999'), (4.2e6, '4.2M')])
def test_short(number, text):
  assert logs._short(number) == text


def test_sparkline():
  assert logs._sparkline([0, 1], 10) == '▁█'
  assert logs._sparkline([5, 5, 5], 10) == '▁▁▁'
  assert logs._sparkline(list(range(16)), 8) == '▁▂▃▄▅▆▇█'
