"""What a run leaves behind: the files of its workdir.

    check_workdir  refuses the workdir of another config
    open_workdir   config.json, env.json
    Lines          a file of JSON lines, cut back to a checkpoint's offset on resume
    Metrics        two of them, metrics.jsonl and rollouts.jsonl

Files come first: everything the display shows is in them, and two runs of one config write the
same bytes outside env.json and the `timing/` keys. Left out: TensorBoard, W&B and other services
(metrics.jsonl is easy to import), and any knowledge of JAX: devices arrive as strings, metrics as
scalars that have a `tolist`.

A row begins with {'step', 'phase', 'iteration', 'phase_step', 'kind': 'train' | 'eval'}. A metrics
row goes on with <metric>: number, wall times under `timing/`; a rollout row with 'prompt',
'completion', 'answer', 'right', 'reward', 'parts': {<reward>: number}, 'advantage', 'length',
'stop', 'index' (of the example), and 'mode' where it evaluates.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

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


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """The config of a run, as JSON has it: lists for tuples, null for None.

  Raises:
    UserError: the folder has none.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise records.UserError(f'{str(workdir)!r} is not the workdir of a run: no config.json')
  return json.loads(path.read_text(encoding='utf-8'))


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a .jsonl file; a last line that is still being written is left out."""
  text = path.read_text(encoding='utf-8') if path.exists() else ''
  return [json.loads(line) for line in text.split('\n')[:-1]]


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
  if (path / 'config.json').exists():
    old = read_config(path)
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


def check_opened(path: pathlib.Path, config: Any, may_differ: Sequence[str]) -> None:
  """On every host of a run, when its first process has opened the workdir.

  Raises:
    UserError: this host does not see it, or has another config.
  """
  if not (path / 'config.json').exists():
    raise records.UserError(f'workdir {path} is not on a disk that every host sees')
  check_workdir(str(path), config, may_differ)


def open_workdir(path: pathlib.Path, config: Any, devices: Sequence[str]) -> TextIO:
  """Creates a run's folder, or opens it again to resume.

  Writes config.json, and env.json with one entry for each start of the run. Returns a file: while
  it is open, no other process can open the workdir.

  Args:
    path: from `check_workdir`.
    config: the run's ConfigDict.
    devices: what the run computes on, in words.

  Raises:
    UserError: it cannot be written, or another process runs in it.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / 'lock.tmp', 'w')  # .tmp: alone it makes no run of the folder
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise records.UserError(f'another process runs in workdir {path}') from e
    except OSError as e:
      if e.errno not in (errno.ENOTSUP, errno.ENOLCK):  # a mounted bucket knows no locks
        raise
    _write_json(path / 'config.json', _plain(config.to_dict()))
    starts = path / 'env.json'
    earlier = json.loads(starts.read_text(encoding='utf-8')) if starts.exists() else []
    _write_json(starts, [*earlier, _environment(devices)])
    return lock
  except OSError as e:
    raise records.UserError(f'cannot write to workdir {path}: {e.strerror}') from e


# ------------------------------------------------------------------------------------ metrics


class Lines:
  """Appends rows to a file of JSON lines.

  Floats are written as Python's repr, so that equal runs write equal bytes; NaN and Inf as null.
  Every row is handed to the system at once: a killed process loses none. `offset()` goes into
  a checkpoint and `truncate()` undoes what was written after it.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(exist_ok=True)
    self._file = open(path, 'ab')

  def write(self, row: Mapping[str, Any]) -> None:
    text = json.dumps(_plain(row), ensure_ascii=False) + '\n'
    # A lone surrogate in decoded text is no UTF-8; as \udcxx it is still the JSON it was.
    self._file.write(text.encode('utf-8', errors='backslashreplace'))
    self._file.flush()

  def offset(self) -> int:
    """How many bytes it has, after forcing them to the disk: a checkpoint relies on it."""
    os.fsync(self._file.fileno())
    return os.fstat(self._file.fileno()).st_size

  def truncate(self, offset: int) -> None:
    """Cuts it back to `offset`.

    Raises:
      UserError: it is shorter than it was when the checkpoint was made.
    """
    size = os.fstat(self._file.fileno()).st_size
    if size < offset:
      raise records.UserError(
        f'{self._file.name} has {size} bytes, but {offset} when the checkpoint was made: '
        'it was cut or replaced since'
      )
    self._file.truncate(offset)

  def close(self) -> None:
    self._file.close()


class Metrics:
  """metrics.jsonl and rollouts.jsonl; silent on a process that does not write."""

  def __init__(self, workdir: pathlib.Path, writes: bool):
    self._files = {name: Lines(workdir / name) for name in START} if writes else {}

  def write(self, row: Mapping[str, Any]) -> None:
    """One row of metrics.jsonl."""
    self._append(METRICS, row)

  def rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """A few readable samples, for rollouts.jsonl."""
    for row in rows:
      self._append(ROLLOUTS, row)

  def _append(self, name: str, row: Mapping[str, Any]) -> None:
    if name in self._files:
      self._files[name].write(row)

  def offsets(self) -> dict[str, int]:
    return START | {name: file.offset() for name, file in self._files.items()}

  def truncate(self, offsets: Mapping[str, int]) -> None:
    """Cuts both files back to `offsets`, or to nothing with START."""
    for name, file in self._files.items():
      file.truncate(offsets[name])

  def close(self) -> None:
    for file in self._files.values():
      file.close()
