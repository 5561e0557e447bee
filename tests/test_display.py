"""The live picture, the plain lines, and text that must not command the terminal."""

from __future__ import annotations

import io
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import rich.console
from hypothesis import example, given
from hypothesis import strategies as st

from reasonrl import display

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


def console(terminal: bool, **kwargs) -> rich.console.Console:
  options = {'width': 80, 'height': 24, 'force_terminal': terminal, '_environ': {'TERM': 'xterm'}}
  return rich.console.Console(file=io.StringIO(), **(options | kwargs))


def test_plain_lines(monkeypatch):
  now = 0.0
  monkeypatch.setattr(display.time, 'monotonic', lambda: now)
  out = console(False)
  with display.Display(every=10, shows=True, console=out) as screen:
    screen.phase('rl', 'reinforce', 150, 9)
    screen.status('compiling the sampler')
    for step in range(10, 31):
      metrics = {'reward': 1.324, 'accuracy': np.float32(0.61), 'think_length': 5.12}
      metrics |= {'entropy': math.nan, 'loss': 0.1, 'timing/tokens_per_s': 12345.0}
      now += 1.0  # one second a step
      screen.step(step, metrics)
    key = 'eval/sampled/accuracy'
    screen.evaluation('after', {key: 0.5, f'{key}_low': 0.4, f'{key}_high': 0.6})
    screen.transcripts([ROW])
    screen.note('the end [bold]')
  assert out.file.getvalue().split('\n') == [
    'rl: reinforce, 150 steps, resumed after step 9',
    'compiling the sampler ...',
    'rl 10/150  reward 1.32  accuracy 0.61  think 5.1  tok/s 12.3k',
    'rl 20/150  reward 1.32  accuracy 0.61  think 5.1  tok/s 12.3k  2m10s left',
    'rl 30/150  reward 1.32  accuracy 0.61  think 5.1  tok/s 12.3k  2m00s left',
    'held-out accuracy after  sampled 0.500 [0.400, 0.600]',
    '✓ What is [red]2 + 2[/red]?',
    '  <think>2 and 2</think><answer>4</answer>',
    '  expected 4  reward 1.10  advantage +0.50  tokens 12  eos',
    'the end [bold]',
    '',
  ]


def test_terminal_shows_phase_progress_compilation_and_coloured_transcripts():
  out = console(True)
  with display.Display(every=10, shows=True, console=out) as screen:
    screen.phase('rl', 'reinforce', 150, 0)
    screen.status('compiling the sampler')
    assert 'compiling the sampler' in drawn(screen)
    screen.step(1, {'reward': 0.0, 'accuracy': 0.0})
    screen.step(2, {'reward': 1.0, 'accuracy': 0.5, 'entropy': 0.4})
    screen.transcripts([ROW, ROW | {'right': False}])
    picture = drawn(screen)
  assert 'rl 2/150' in picture and 'entropy 0.40' in picture and 'compiling' not in picture
  assert 'accuracy ▁█ 0.00 → 0.50' in picture
  assert '✓ What is' in picture and '✗ What is' in picture
  coloured = display.transcript(ROW, 80)
  styles = {coloured.plain[span.start : span.end].strip(): span.style for span in coloured.spans}
  assert styles['<answer>4</answer>'] == 'bold green'
  assert styles['<think>2 and 2</think>'] == 'cyan'
  wrong = display.transcript(ROW | {'right': False}, 80)
  assert 'bold red' in {span.style for span in wrong.spans}


def drawn(screen) -> str:
  """The live picture as text, on a console of the same size."""
  out = rich.console.Console(file=io.StringIO(), width=80, height=24)
  out.print(screen._picture())
  return out.file.getvalue()


def test_terminal_is_restored_after_an_exception():
  out = console(True)
  with pytest.raises(RuntimeError), display.Display(1, True, out) as screen:
    screen.phase('rl', 'reinforce', 3, 0)
    raise RuntimeError
  hidden, shown = out.file.getvalue().rfind('\x1b[?25l'), out.file.getvalue().rfind('\x1b[?25h')
  assert 0 <= hidden < shown


@pytest.mark.parametrize('height', [3, 8, 24])
def test_picture_fits_the_terminal(height):
  out = console(True, height=height)
  screen = display.Display(1, True, out)
  screen.phase('rl', 'reinforce', 3, 0)
  screen.step(1, {'reward': 1.0})
  screen.transcripts([ROW | {'completion': 'x ' * 5000, 'prompt': 'y' * 5000}] * 8)
  lines = out.render_lines(screen._picture())
  assert len(lines) <= max(height, 4)  # the bar, the numbers and the curve are always there


def test_colab_and_dumb_terminals_get_plain_lines(monkeypatch):
  for colab, out in ((False, console(True, _environ={'TERM': 'dumb'})), (True, console(True))):
    if colab:
      monkeypatch.setenv('COLAB_RELEASE_TAG', 'release')
    with display.Display(1, True, out) as screen:
      screen.phase('rl', 'reinforce', 3, 0)
      screen.step(1, {})
    assert 'rl 1/3\n' in out.file.getvalue() and '─' not in out.file.getvalue()


def test_other_processes_are_silent():
  out = console(False)
  with display.Display(1, False, out) as screen:
    screen.phase('rl', 'reinforce', 3, 0)
    screen.step(1, {'reward': 1.0})
    screen.note('x')
  assert out.file.getvalue() == ''


@example('a\x1b[2J' * 999, '<think>\x9b' + 'b' * 9999 + '</think>\u202e')
@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_model_text_cannot_command_the_terminal(prompt, completion):
  text = display.transcript(ROW | {'prompt': prompt, 'completion': completion}, 40).plain
  assert all(c.isprintable() or c == '\n' for c in text)
  assert text.count('\n') == 2 and len(text) < 500


def test_output_that_cannot_spell_a_letter_gets_a_question_mark():
  program = (
    'from reasonrl import display\n'
    'with display.Display(1, True) as screen:\n'
    "  screen.note('caf\\u00e9 \\u4e2d')\n"
  )
  environment = os.environ | {
    'PYTHONPATH': str(pathlib.Path(display.__file__).parent.parent),
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
  assert display._clock(seconds) == text


@pytest.mark.parametrize('number, text', [(12345, '12.3k'), (999, '999'), (4.2e6, '4.2M')])
def test_short(number, text):
  assert display._short(number) == text


def test_sparkline():
  assert display._sparkline([0, 1], 10) == '▁█'
  assert display._sparkline([5, 5, 5], 10) == '▁▁▁'
  assert display._sparkline(list(range(16)), 8) == '▁▂▃▄▅▆▇█'
