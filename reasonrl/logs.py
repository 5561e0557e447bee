"""What a run leaves behind and what it shows: workdir files, metric rows, the display.

    open_workdir  config.json, env.json; refuses the workdir of another config
    Metrics       metrics.jsonl and rollouts.jsonl, cut back to a checkpoint's offsets on resume
    Display       a live picture on a terminal, plain lines anywhere else

Files come first: everything the display shows is in them, and two runs of one config write the
same bytes outside env.json and the `timing/` keys. Left out: TensorBoard, W&B and other services
(metrics.jsonl is easy to import), and any knowledge of JAX: devices arrive as strings, metrics as
scalars that have a `tolist`.

A metrics row is {'step', 'phase', 'phase_step', 'kind': 'train' | 'eval', <metric>: number}; wall
times have keys under `timing/`. A rollout row is {'step', 'phase', 'prompt', 'completion',
'answer', 'right', 'reward', 'parts': {<reward>: number}, 'advantage', 'length', 'stop'}.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.progress_bar
import rich.spinner
import rich.table
import rich.text

from reasonrl import records

METRICS, ROLLOUTS = 'metrics.jsonl', 'rollouts.jsonl'
START = {METRICS: 0, ROLLOUTS: 0}  # the offsets of a run that has written nothing


# ------------------------------------------------------------------------------------ workdir


def _plain(value: Any) -> Any:
  """The JSON form of a value: array scalars become numbers, NaN and Inf become null."""
  if hasattr(value, 'tolist'):  # NumPy and JAX
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """{'rl': {'steps': 3}} -> {'rl.steps': 3}. Lists and empty sections are leaves."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat.update(_flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
  """Field -> 'a in the workdir, b now', for every field in which two configs differ."""
  old, new = _flatten(old, ''), _flatten(new, '')

  def show(flat, field):
    return json.dumps(flat[field], ensure_ascii=False) if field in flat else 'absent'

  return {
    field: f'{show(old, field)} in the workdir, {show(new, field)} now'
    for field in sorted(old.keys() | new.keys())
    if show(old, field) != show(new, field)
  }


def _write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces the file in one step: a kill leaves the old one or the new one."""
  partial = path.with_name(path.name + '.tmp')
  text = json.dumps(_plain(value), indent=2, sort_keys=True, ensure_ascii=False)
  partial.write_text(text + '\n', encoding='utf-8')
  partial.replace(path)


def _git_commit() -> str | None:
  """The commit this code was checked out at, '+changes' if edited since; None outside git."""
  root = pathlib.Path(__file__).parent.parent
  if not (root / '.git').exists():  # an installed copy may lie inside somebody else's repository
    return None

  def git(*args):
    return subprocess.run(
      ['git', '-C', str(root), *args], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain') else '')
  except (OSError, subprocess.CalledProcessError):  # no git program, or no commit yet
    return None


def _environment(devices: Sequence[str]) -> dict[str, Any]:
  """Where and how this process runs."""
  return {
    'command': shlex.join([pathlib.Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
    'devices': list(devices),
    'git': _git_commit(),
    'host': platform.platform(),
    'packages': {d.name: d.version for d in importlib.metadata.distributions()},
    'python': platform.python_version(),
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def check_workdir(workdir: str, config: Any, may_differ: Sequence[str]) -> pathlib.Path:
  """The absolute path of a folder that this config may run in; changes nothing.

  Args:
    workdir: a local folder, new or a run's.
    config: the run's ConfigDict.
    may_differ: config fields or sections, in dotted form, in which a resumed run may differ from
      the first start because they change no result ('mesh', 'rewarding').

  Raises:
    UserError: the folder holds a run of another config (names the fields) or is not a workdir.
  """
  if '://' in workdir:
    raise records.UserError(f'workdir {workdir!r} is not a local path; mount it and name the mount')
  path = pathlib.Path(workdir).expanduser().absolute()
  file = path / 'config.json'
  if file.exists():
    old = json.loads(file.read_text(encoding='utf-8'))
    refused = [
      f'{field}: {values}'
      for field, values in config_differences(old, _plain(config.to_dict())).items()
      if not any(f'{field}.'.startswith(f'{free}.') for free in may_differ)
    ]
    if refused:
      raise records.UserError(
        f'workdir {workdir} belongs to another config; use a new --workdir, or put back:\n  '
        + '\n  '.join(refused)
      )
  elif path.exists():
    if not path.is_dir() or any(entry.suffix != '.tmp' for entry in path.iterdir()):
      raise records.UserError(
        f'workdir {workdir} is neither empty nor a run (it has no config.json)'
      )
  return path


def open_workdir(path: pathlib.Path, config: Any, devices: Sequence[str]) -> None:
  """Creates a run's folder, or opens it again to resume.

  Writes config.json, and env.json with one entry for each start of the run.

  Args:
    path: from `check_workdir`.
    config: the run's ConfigDict.
    devices: what the run computes on, in words.

  Raises:
    UserError: it cannot be written.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / 'config.json', _plain(config.to_dict()))
    starts = path / 'env.json'
    earlier = json.loads(starts.read_text(encoding='utf-8')) if starts.exists() else []
    _write_json(starts, [*earlier, _environment(devices)])
  except OSError as e:
    raise records.UserError(f'cannot write to workdir {path}: {e.strerror}') from e


# ------------------------------------------------------------------------------------ metrics


class Metrics:
  """Appends rows to metrics.jsonl and rollouts.jsonl.

  Floats are written as Python's repr, so that equal runs write equal bytes; NaN and Inf as null.
  Every row is handed to the system at once: a killed process loses none. `offsets()` goes into
  a checkpoint and `truncate()` undoes what was written after it.
  """

  def __init__(self, workdir: pathlib.Path, writes: bool):
    self._files = {}
    if writes:
      self._files = {name: open(workdir / name, 'ab') for name in START}

  def write(self, row: Mapping[str, Any]) -> None:
    """One row of metrics.jsonl."""
    self._append(METRICS, row)

  def rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """A few readable samples, for rollouts.jsonl."""
    for row in rows:
      self._append(ROLLOUTS, row)

  def _append(self, name: str, row: Mapping[str, Any]) -> None:
    if name in self._files:
      text = json.dumps(_plain(row), ensure_ascii=False) + '\n'
      # A lone surrogate in decoded text is no UTF-8; as \udcxx it is still the JSON it was.
      self._files[name].write(text.encode('utf-8', errors='backslashreplace'))
      self._files[name].flush()

  def offsets(self) -> dict[str, int]:
    """How many bytes each file has, after forcing them to the disk: a checkpoint relies on it."""
    for file in self._files.values():
      os.fsync(file.fileno())
    return START | {name: os.fstat(f.fileno()).st_size for name, f in self._files.items()}

  def truncate(self, offsets: Mapping[str, int]) -> None:
    """Cuts both files back to `offsets`, or to nothing with START.

    Raises:
      UserError: a file is shorter than it was when the checkpoint was made.
    """
    for name, file in self._files.items():
      size = os.fstat(file.fileno()).st_size
      if size < offsets[name]:
        raise records.UserError(
          f'{file.name} has {size} bytes, but {offsets[name]} when the checkpoint was made: '
          'it was cut or replaced since'
        )
      file.truncate(offsets[name])

  def close(self) -> None:
    for file in self._files.values():
      file.close()


# ------------------------------------------------------------------------------------ display


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
    value = _plain(metrics.get(key))
    if value is not None:
      text.append('  ' if text else '').append(f'{label} ', 'dim').append(form(value))
      low, high = _plain(metrics.get(f'{key}_low')), _plain(metrics.get(f'{key}_high'))
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
  think = records.think_span(row['completion'])
  before, after = row['completion'], ''
  if think is not None:
    span = records.THINK_OPEN + think + records.THINK_CLOSE
    before, _, after = row['completion'].partition(span)
  text = rich.text.Text(f'{mark} ', colour)
  text.append(_clean(row['prompt'], 2 * width - 4), 'dim').append('\n  ')
  text.append(_clean(before, width), f'bold {colour}')
  if think is not None:
    text.append(_clean(span, 2 * width), 'cyan')
  text.append(_clean(after, width), f'bold {colour}').append('\n  ')
  facts = [f'answer {_clean(str(row["answer"]), 40)}']
  for label, key, form in (
    ('reward', 'reward', '{:.2f}'.format),
    ('advantage', 'advantage', '{:+.2f}'.format),
    ('tokens', 'length', '{:.0f}'.format),
  ):
    value = _plain(row[key])
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
    self._print(rich.text.Text(f'{name}: {kind}, {steps} steps{resumed}', 'bold'))

  def step(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Step `step` (from 1) of the phase is done."""
    self.status(None)
    self._step, self._metrics = step, dict(metrics)
    self._times = [*self._times[-19:], (step, time.monotonic())]
    for label, key in CURVES:
      value = _plain(metrics.get(key))
      if value is not None:
        self._curve_label, self._curve = label, [*self._curve, value]
        break
    if not self._live and (step % self._every == 0 or step in (1, self._steps)):
      self._print(self._line())

  def evaluation(self, title: str, metrics: Mapping[str, Any]) -> None:
    """A held-out evaluation is done."""
    self.status(None)
    text = rich.text.Text(f'held-out accuracy {title}  ', 'bold')
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
    lines: list[rich.console.RenderableType] = [rich.text.Text('─' * width, 'dim'), bar]
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
