"""What a run shows: a live picture on a terminal, plain lines anywhere else.

Everything shown is also in the files of the workdir (`logs`); nothing here decides anything.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.progress_bar
import rich.spinner
import rich.table
import rich.text

from reasonrl import records


def _number(value: Any) -> float | None:
  """A metric as a float; None where it is missing, NaN or infinite."""
  return None if value is None or not math.isfinite(value) else float(value)


def _short(number: float) -> str:
  """12345 -> '12.3k'."""
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.3g}{letter}'
  return f'{number:.3g}'


def _clock(seconds: float) -> str:
  """80 -> '1m20s'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


# label, metric, format
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
  ('loss', 'loss', '{:.3f}'.format),
  ('reward', 'reward', '{:.2f}'.format),
  ('accuracy', 'accuracy', '{:.2f}'.format),
  ('kept', 'collect/kept', '{:.0f}'.format),
  ('think', 'think_length', '{:.1f}'.format),
  ('length', 'completion_length', '{:.1f}'.format),
  ('entropy', 'entropy', '{:.2f}'.format),
  ('tok/s', 'timing/tokens_per_s', _short),
)
EVAL_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
  ('greedy', 'eval/greedy/accuracy', '{:.3f}'.format),
  ('sampled', 'eval/sampled/accuracy', '{:.3f}'.format),
  ('think', 'eval/sampled/think_length', '{:.1f}'.format),
)
CURVES = (('accuracy', 'accuracy'), ('reward', 'reward'), ('loss', 'loss'))  # first present
WIDTH = 110  # the picture is no wider: beyond it lines are hard to read, and break on resizing
BARS = '▁▂▃▄▅▆▇█'


def _values(metrics: Mapping[str, Any], columns) -> rich.text.Text:
  """'reward 1.32  accuracy 0.61 [0.58, 0.64]', with what is there."""
  text = rich.text.Text()
  if 'reward' in metrics:  # a policy loss says nothing about progress
    metrics = {k: v for k, v in metrics.items() if k != 'loss'}
  for label, key, form in columns:
    value = _number(metrics.get(key))
    if value is not None:
      text.append('  ' if text else '').append(f'{label} ', 'dim').append(form(value))
      low, high = _number(metrics.get(f'{key}_low')), _number(metrics.get(f'{key}_high'))
      if low is not None and high is not None:
        text.append(f' [{form(low)}, {form(high)}]', 'dim')
  return text


def _sparkline(values: Sequence[float], width: int) -> str:
  """The last point of each of `width` equal stretches, as bars."""
  points = [values[(i + 1) * len(values) // width - 1] for i in range(min(width, len(values)))]
  if len(values) < width:
    points = list(values)
  low, high = min(points), max(points)
  scale = (len(BARS) - 1) / (high - low) if high > low else 0
  return ''.join(BARS[round((p - low) * scale)] for p in points)


def _clean(text: str, limit: int) -> str:
  """One line of at most `limit` characters that cannot command the terminal; the middle goes."""
  text = ''.join(c if c.isprintable() else '⏎' if c == '\n' else '·' for c in text)
  if len(text) > limit:
    head = limit // 2
    text = f'{text[:head]} … {text[len(text) - (limit - head) + 3 :]}'
  return text


def transcript(row: Mapping[str, Any], width: int) -> rich.text.Text:
  """A rollout row in three lines: the prompt, what was thought and said, and what it earned."""
  mark, colour = ('✓', 'green') if row['right'] else ('✗', 'red')
  before, think, after = records.split_think(row['completion'])
  text = rich.text.Text(f'{mark} ', colour)
  text.append(_clean(row['prompt'], 2 * width - 4), 'dim').append('\n  ')
  text.append(_clean(before, width), f'bold {colour}')
  text.append(_clean(think, 2 * width), 'cyan')
  text.append(_clean(after, width), f'bold {colour}').append('\n  ')
  facts = [f'expected {_clean(str(row["answer"]), 40)}']
  for label, key, form in (
    ('reward', 'reward', '{:.2f}'.format),
    ('advantage', 'advantage', '{:+.2f}'.format),
    ('tokens', 'length', '{:.0f}'.format),
  ):
    value = _number(row[key])
    if value is not None:
      facts.append(f'{label} {form(value)}')
  return text.append('  '.join([*facts, str(row['stop'])]), 'dim')


class Display:
  """Shows a run: `with Display(...) as display`, then `phase`, `step`, ... as it goes.

  On a terminal the last lines are a live picture and everything of lasting interest scrolls above
  them; elsewhere (a file, a pipe, Colab) each becomes plain lines. A metric that is missing is not
  shown; none is required.
  """

  def __init__(self, every: int, shows: bool, console: rich.console.Console | None = None):
    """
    Args:
      every: steps between plain lines; a terminal sees every step.
      shows: whether this process is the one that shows; the others stay silent.
      console: where to; None: standard output.
    """
    self._console = console or rich.console.Console(highlight=False)
    self._console.quiet = not shows
    if hasattr(self._console.file, 'reconfigure'):  # a terminal that lacks a letter shows '?'
      self._console.file.reconfigure(errors='replace')
    self._every = every
    self._name, self._steps, self._step = '', 0, 0
    self._metrics: Mapping[str, Any] = {}
    self._curve_label, self._curve = '', []
    self._times: list[tuple[int, float]] = []
    self._rows: list[Mapping[str, Any]] = []
    self._spinner: rich.spinner.Spinner | None = None
    self._busy, self._busy_since = '', 0.0
    self._live = None
    if (
      shows
      and self._console.is_terminal
      and not self._console.is_dumb_terminal
      and 'COLAB_RELEASE_TAG' not in os.environ  # its `!python` has a terminal that cannot redraw
    ):
      self._live = rich.live.Live(
        get_renderable=self._picture, console=self._console, refresh_per_second=4
      )

  def __enter__(self) -> Display:
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Gives the terminal back as it was. Safe to call twice."""
    self.status(None)
    if self._live:
      self._live.stop()

  def phase(self, name: str, kind: str, steps: int, start: int) -> None:
    """A phase begins, or goes on at step `start`."""
    if self._live and self._metrics:
      self._print(self._line())  # the picture forgets the last phase; its end stays above
    self._name, self._steps, self._step = name, steps, start
    self._metrics, self._curve, self._rows, self._times = {}, [], [], []
    self.status(None)
    resumed = f', resumed after step {start}' if start else ''
    text = f'{name}: {kind}, {steps} steps{resumed}' if steps else name
    self._print(rich.text.Text(text, 'bold'))

  def step(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Step `step` (from 1) of the phase is done."""
    self.status(None)
    self._step, self._metrics = step, dict(metrics)
    self._times = [*self._times[-19:], (step, time.monotonic())]
    for label, key in CURVES:
      value = _number(metrics.get(key))
      if value is not None:
        self._curve_label, self._curve = label, [*self._curve, value]
        break
    if not self._live and (step % self._every == 0 or step in (1, self._steps)):
      self._print(self._line())

  def evaluation(self, title: str, metrics: Mapping[str, Any]) -> None:
    """A held-out evaluation is done."""
    self.status(None)
    text = rich.text.Text(f'held-out accuracy {title}'.rstrip(), 'bold')
    narrow = self._live and self._console.width < 110
    text.append('\n  ' if narrow else '  ')
    self._print(text.append_text(_values(metrics, EVAL_COLUMNS)))

  def transcripts(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """A few rollout rows to read."""
    self._rows = list(rows)
    if not self._live:
      for row in rows:
        self._print(transcript(row, 100))

  def status(self, text: str | None) -> None:
    """What the run is busy with, until the next step or evaluation: 'compiling the sampler'."""
    self._busy, self._busy_since = text or '', time.monotonic()
    self._spinner = rich.spinner.Spinner('dots', style='yellow') if text else None
    if text and not self._live:
      self._print(rich.text.Text(f'{text} ...'))

  def note(self, text: str) -> None:
    """A line that stays."""
    self._print(rich.text.Text(text))

  def _print(self, text: rich.text.Text) -> None:
    self._console.print(text, soft_wrap=True)

  def _left(self) -> str:
    """Time left in the phase, by the pace of the last steps (the first one compiles)."""
    times = self._times
    if not times or times[0][0] == times[-1][0] or self._step >= self._steps:
      return ''
    (first, begin), (last, end) = times[0], times[-1]
    return f'{_clock((end - begin) / (last - first) * (self._steps - last))} left'

  def _line(self) -> rich.text.Text:
    parts = [rich.text.Text(f'{self._name} {self._step}/{self._steps}')]
    parts += [_values(self._metrics, COLUMNS), rich.text.Text(self._left())]
    return rich.text.Text('  ').join(part for part in parts if part)

  def _picture(self) -> rich.console.RenderableType:
    """The live lines. Rich's thread draws them: the state they read is replaced, never changed."""
    width, height = self._console.size
    width = min(width, WIDTH)
    bar = rich.table.Table.grid(padding=(0, 1), expand=True)
    bar.width = width
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(
      rich.text.Text(f'{self._name} {self._step}/{self._steps}', 'bold'),
      rich.progress_bar.ProgressBar(total=max(self._steps, 1), completed=self._step),
      rich.text.Text(self._left()),
    )
    lines: list[rich.console.RenderableType] = [rich.text.Text('─' * width, 'dim')]
    lines += [bar] if self._steps else []
    if self._metrics:
      lines.append(_values(self._metrics, COLUMNS))
    curve, spinner = self._curve, self._spinner
    if curve:
      label, ends = f'{self._curve_label} ', f' {curve[0]:.2f} → {curve[-1]:.2f}'
      line = rich.text.Text(label, 'dim')
      line.append(_sparkline(curve, max(width - len(label) - len(ends), 1)), 'green')
      lines.append(line.append(ends))
    if spinner:
      spinner.update(text=f'{self._busy}  {_clock(time.monotonic() - self._busy_since)}')
      lines.append(spinner)
    used, room = len(lines) + 2, height
    for row in self._rows:
      text = transcript(row, width)
      used += len(text.wrap(self._console, width))
      if used > room:
        break
      lines.append(text)
    return rich.console.Group(*lines)
