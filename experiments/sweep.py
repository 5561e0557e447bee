"""Many trials of reasonrl.main from one description.

  python experiments/sweep.py --config=configs/r1_zero.py --to=runs/r1_zero_shuffled_objects \
    --sweep=experiments/r1_zero_shuffled_objects/sweep.py --max_parallel=2

1. The sweep file is plain Python. `def sweep(add)` lists its trials: it calls
   `add(**{'seed': 1, 'rl.env.num_generations': 2})` for each; the keys are config fields, `name=`
   and `config=` give a trial its own folder name and config. `def search(trial)` instead draws
   with Optuna's `trial.suggest_*` and returns such a dict; `--trials` of them maximise `--metric`.
   `--config.x=` on the command line holds for all trials.
2. Every listed trial is checked, names and types, before the first one starts.
3. A trial is a process `python -m reasonrl.main ... --workdir=<to>/<trial>` that writes to
   <to>/<trial>.log. <to>/sweep.jsonl gets a line for every attempt. What finished is skipped, what
   was interrupted goes on, what crashed is retried; bad input (exit code 2) ends the sweep.
4. At the end: a table of the last held-out metrics, also in <to>/summary.json.

Ctrl-C and SIGTERM let the trials save; the same command goes on. Exit code: 0 all finished, 1 some
did not, 2 bad input, 128 + n after signal n. Left out: pruning, and trials on several machines
(`--dry_run` prints commands for any scheduler). The TPU settings were never tried on a TPU.
"""

import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import rich.console
import rich.table
from absl import flags
from ml_collections import config_flags

from reasonrl import command_line, launch, logs, records

flags.adopt_module_key_flags(launch)  # --help shows them
_SWEEP = flags.DEFINE_string('sweep', '', 'Python file with sweep(add) or search(trial).')
_TO = flags.DEFINE_string('to', '', 'Folder of the sweep, new or to be resumed.')
_PARALLEL = flags.DEFINE_integer('max_parallel', 1, 'Trials at a time.', lower_bound=1)
_RETRIES = flags.DEFINE_integer('retries', 1, 'New attempts after a crash.', lower_bound=0)
_CHIPS = flags.DEFINE_enum('chips_per_trial', None, ['1', '2', '4'], 'TPU chips of each trial.')
_TRIALS = flags.DEFINE_integer('trials', 20, 'Trials of a search, earlier ones too.', lower_bound=1)
_METRIC = flags.DEFINE_string('metric', 'eval/sampled/accuracy', 'What a search maximises.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the commands, start nothing.')

COLUMNS = ('eval/sampled/accuracy', 'eval/greedy/accuracy', 'eval/sampled/think_length')
BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1'}  # chips of a process -> their shape on the host
PORT = 8476  # of the first TPU process of a host; the others count on from it


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of reasonrl.main."""

  name: str  # its folder in --to
  key: str  # hash of (config, overrides)
  config: str
  overrides: dict[str, Any]  # config field -> value, of the config's own type


@dataclasses.dataclass(frozen=True)
class Attempt:
  """A trial that runs."""

  trial: Trial
  number: int  # of earlier attempts since the sweep was started
  process: subprocess.Popen
  log_start: int  # bytes that earlier attempts wrote
  started: datetime.datetime


# ------------------------------------------------------------------------------------ trials

find_config = functools.cache(command_line.find_config)  # it prints what it found


def as_flags(overrides: dict[str, Any]) -> list[str]:
  """No flag can say None; `make_trial` sees to it that such a field is None by itself."""
  return [f'--config.{field}={value}' for field, value in overrides.items() if value is not None]


def make_trial(name: str, config: str, common: dict[str, Any], own: dict[str, Any]) -> Trial:
  """A trial whose config was loaded with its overrides, by the parser that main will use.

  Args:
    name: of its folder; '' = made from its own overrides.
    config: as in main's --config.
    common: config field -> value, for all trials.
    own: the same, for this one; these win.

  Raises:
    UserError, flags.Error: an unknown config or field, or a value that would not arrive.
  """
  path, overrides = find_config(config), common | own
  command_line.check_overrides([f'--config.{field}=' for field in overrides], path)
  argv, values = ['', f'--config={path}', *as_flags(overrides)], flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  values(argv)
  typed = {}
  for field, value in overrides.items():
    typed[field] = functools.reduce(lambda node, key: node[key], field.split('.'), values.config)
    if typed[field] != (tuple(value) if isinstance(value, list) else value):
      raise records.UserError(f'{field}: {value!r} would arrive as {typed[field]!r}')
  key = hashlib.sha256(json.dumps([config, typed], sort_keys=True).encode()).hexdigest()[:8]
  if not name:
    words = '_'.join(f'{field.split(".")[-1]}={typed[field]}' for field in own) or 'trial'
    name = re.sub(r'[^\w.=+-]+', '-', words)[:48] + f'_{key}'
  elif not re.fullmatch(r'\w[\w.=+-]*', name):
    raise records.UserError(f'name {name!r} is no folder name of letters, digits and . = + - _')
  return Trial(name, key, config, typed)


def list_trials(sweep: Callable, config: str, common: dict[str, Any]) -> list[Trial]:
  """The trials that `sweep(add)` adds. UserError: one of them is bad input, or there is none."""
  trials = {}

  def add(name: str = '', config: str = config, **overrides):
    try:
      trial = make_trial(name, config, common, overrides)
      if trial.name in trials:
        raise records.UserError(f'{trial.name} was added before')
    except (records.UserError, flags.Error) as e:
      raise records.UserError(f'trial {len(trials)}{name and f" ({name})"}: {e}') from e
    trials[trial.name] = trial

  sweep(add)
  if not trials:
    raise records.UserError('sweep(add) added no trial')
  return list(trials.values())


def search_trials(search: Callable, config: str, common: dict[str, Any], to: pathlib.Path | None):
  """Trials that Optuna draws from what it was told of the earlier ones.

  The study is kept in <to>/optuna.log (to=None: nowhere). A trial that was under way when the sweep
  ended is drawn again, with the same parameters and the same folder, so that its run goes on.

  Returns:
    An iterator of trials, and a function that is told of each that ended (see `run`).

  Raises:
    UserError: Optuna is missing; later, the finished run has no such metric.
  """
  try:
    import optuna
  except ImportError as e:
    raise records.UserError(f"search needs a package ({e}): pip install 'reasonrl[sweep]'") from e
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  journal, state, storage = optuna.storages.journal, optuna.trial.TrialState, None
  if to:
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(to / 'optuna.log')))
  study = optuna.create_study(
    storage=storage, study_name=_METRIC.value, direction='maximize', load_if_exists=True
  )
  study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
  for trial in study.get_trials(states=[state.RUNNING]):
    study.tell(trial.number, state=state.FAIL)
    study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
  drawn = {}  # name -> Optuna's trial

  def trials():
    for _ in range(len(study.get_trials(states=[state.COMPLETE])), _TRIALS.value):
      trial = study.ask()
      name = trial.user_attrs.get('name', f'{trial.number:04}')
      trial.set_user_attr('name', name)
      drawn[name] = trial
      yield make_trial(name, config, common, search(trial))

  def told(trial: Trial, exit_code: int):
    metrics = last_evaluation(to / trial.name)
    if exit_code == 0 and _METRIC.value not in metrics:
      numbers = ', '.join(name for name in metrics if isinstance(metrics[name], float))
      raise records.UserError(f'{trial.name} has no {_METRIC.value!r}; it has {numbers}')
    value = metrics.get(_METRIC.value) if exit_code == 0 else None
    study.tell(drawn[trial.name], value, state.FAIL if value is None else state.COMPLETE)

  return trials(), told


# ------------------------------------------------------------------------------------ running


def last_attempts(to: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Trial -> its last row in sweep.jsonl."""
  file = to / 'sweep.jsonl'
  lines = file.read_text(encoding='utf-8').splitlines() if file.exists() else []
  return {row['trial']: row for row in map(json.loads, lines)}


def pin(slot: int, chips: int) -> dict[str, str]:
  """Environment of the `slot`-th process on a TPU host whose processes own `chips` chips each."""
  return {
    'TPU_VISIBLE_CHIPS': ','.join(str(slot * chips + i) for i in range(chips)),
    'TPU_CHIPS_PER_PROCESS_BOUNDS': BOUNDS[chips],
    'TPU_PROCESS_BOUNDS': '1,1,1',
    'TPU_PROCESS_ADDRESSES': f'localhost:{PORT + slot}',
    'TPU_PROCESS_PORT': f'{PORT + slot}',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # else the first process locks the others out
  }


def command(trial: Trial, to: pathlib.Path) -> list[str]:
  """The program of a trial."""
  where = [f'--config={trial.config}', f'--workdir={to / trial.name}']
  return [sys.executable, '-m', 'reasonrl.main', *where, *as_flags(trial.overrides)]


def start(trial: Trial, number: int, slot: int, to: pathlib.Path, index: TextIO) -> Attempt:
  """Starts a trial in a session of its own, so that Ctrl-C reaches it through us alone."""
  with open(to / f'{trial.name}.log', 'ab') as log:
    process = subprocess.Popen(
      command(trial, to),
      env=os.environ | (pin(slot, int(_CHIPS.value)) if _CHIPS.value else {}),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      pass_fds=[index.fileno()],  # and with it the lock
    )
    return Attempt(trial, number, process, log.tell(), datetime.datetime.now())


def record(attempt: Attempt, to: pathlib.Path, index: TextIO, console: rich.console.Console) -> int:
  """Writes down how an attempt ended, and returns its exit code as a shell would tell it."""
  trial, code = attempt.trial, attempt.process.returncode
  code = code if code >= 0 else 128 - code
  seconds = (datetime.datetime.now() - attempt.started).total_seconds()
  row = {**dataclasses.asdict(trial), 'exit_code': code, 'seconds': round(seconds, 1)}
  row['started'] = attempt.started.isoformat(timespec='seconds')
  index.write(json.dumps({'trial': row.pop('name'), **row}, ensure_ascii=False) + '\n')
  index.flush()
  written = (to / f'{trial.name}.log').read_bytes()[attempt.log_start :].decode(errors='replace')
  errors = re.split(r'^error: ', written, flags=re.MULTILINE)[1:]
  why = f', {(errors or written.splitlines() or [""])[-1].strip()}' if code else ''
  console.print(f'{trial.name}: exit code {code} after {seconds:.0f} s{why}')
  return code


def run(
  trials: Iterable[Trial],
  told: Callable[[Trial, int], None],
  to: pathlib.Path,
  index: TextIO,
  console: rich.console.Console,
) -> int:
  """Runs the trials, at most --max_parallel at a time.

  Args:
    trials: asked for the next one when there is room for it.
    told: called with every trial that ended for good, and its exit code.
    to: the folder of the sweep.
    index: sweep.jsonl, open and locked.
    console: where the lines go.

  Returns:
    The exit code of the sweep.
  """
  trials, again, running, code = iter(trials), [], {}, 0
  stops, heard = [], 0  # exit codes of those who ask for the end; how many the trials heard of
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays what it is
      signal.signal(number, lambda number, _: stops.append(128 + number))
  done = {(name, row['key']) for name, row in last_attempts(to).items() if row['exit_code'] == 0}
  try:
    while True:
      while not stops and len(running) < _PARALLEL.value:
        trial, number = again.pop() if again else (next(trials, None), 0)
        if trial is None:
          break
        if (trial.name, trial.key) in done and (to / trial.name).is_dir():
          console.print(f'{trial.name}: finished before')
          told(trial, 0)
          continue
        slot = min(set(range(_PARALLEL.value)) - running.keys())
        running[slot] = start(trial, number, slot, to, index)
        console.print(f'{trial.name}: started')
      if not running:
        return stops[0] if stops else code
      time.sleep(0.1)
      for ask in range(heard, len(stops)):  # the first: save and leave; more: leave at once
        for attempt in running.values():
          attempt.process.send_signal(signal.SIGINT if ask else signal.SIGTERM)
      heard = len(stops)
      for slot, attempt in list(running.items()):
        if attempt.process.poll() is None:
          continue
        del running[slot]
        exit_code = record(attempt, to, index, console)
        if exit_code == 0:
          told(attempt.trial, 0)
        elif stops:
          pass  # it goes on the next time
        elif exit_code == 2:
          stops.append(2)
        elif attempt.number < _RETRIES.value:
          again.append((attempt.trial, attempt.number + 1))
        else:
          code = 1
          told(attempt.trial, exit_code)
  finally:
    for attempt in running.values():  # an error of ours
      attempt.process.terminate()
      attempt.process.wait()


# ------------------------------------------------------------------------------------ results


def last_evaluation(workdir: pathlib.Path) -> dict[str, Any]:
  """The newest row of held-out metrics of a run; {} if there is none yet."""
  rows = [row for row in logs.read_rows(workdir / logs.METRICS) if row['kind'] == 'eval']
  return rows[-1] if rows else {}


def summarize(to: pathlib.Path, console: rich.console.Console) -> None:
  """summary.json, and a table, of all that was ever attempted in this folder."""
  rows, columns = [], dict.fromkeys((*COLUMNS, _METRIC.value))
  for name, row in sorted(last_attempts(to).items()):
    found = last_evaluation(to / name)
    rows.append(row | {metric: found.get(metric) for metric in ('step', *columns)})
  text = json.dumps(rows, indent=2, ensure_ascii=False)
  (to / 'summary.json').write_text(text + '\n', encoding='utf-8')
  choices = [{'config': row['config']} | row['overrides'] for row in rows]
  fields = dict.fromkeys(field for choice in choices for field in choice)
  fields = [f for f in fields if len({str(choice.get(f)) for choice in choices}) > 1]
  table = rich.table.Table('trial', *fields, *(c.removeprefix('eval/') for c in columns), 'exit')
  for row, choice in zip(rows, choices, strict=True):
    metrics = ['' if row[column] is None else f'{row[column]:.3f}' for column in columns]
    chosen = [str(choice.get(field, '')) for field in fields]
    table.add_row(row['trial'], *chosen, *metrics, str(row['exit_code']))
  console.print(table)


# ------------------------------------------------------------------------------------ the door


def main(argv: list[str]) -> int:
  del argv
  if launch.CONFIG.value is None:
    command_line.find_config('')
  if not _TO.value or launch.WORKDIR.value:
    raise records.UserError('give --to=FOLDER and no --workdir: every trial has its own in there')
  if not os.path.isfile(_SWEEP.value):
    raise records.UserError(f'--sweep: no file {_SWEEP.value!r}')
  found = {k: v for k, v in runpy.run_path(_SWEEP.value).items() if k in ('sweep', 'search')}
  if len(found) != 1:
    raise records.UserError(f'{_SWEEP.value} must have either sweep(add) or search(trial)')
  flag, to = flags.FLAGS['config'], pathlib.Path(_TO.value)
  config = config_flags.get_config_filename(flag)
  common = config_flags.get_override_values(flag)

  def plan(to):
    if 'sweep' in found:
      return list_trials(found['sweep'], config, common), lambda trial, exit_code: None
    return search_trials(found['search'], config, common, to)

  if _DRY_RUN.value:
    for trial in plan(None)[0]:
      print(shlex.join(command(trial, to)))
    return 0
  to.mkdir(parents=True, exist_ok=True)
  width = None if sys.stdout.isatty() else 160
  console = rich.console.Console(highlight=False, soft_wrap=True, width=width)
  with open(to / 'sweep.jsonl', 'a', encoding='utf-8') as index:
    try:
      fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise records.UserError(f'{to}: a sweep, or a trial of a killed one, still runs there') from e
    code = run(*plan(to), to, index, console)
    summarize(to, console)
  return code


if __name__ == '__main__':
  command_line.guarded(main, command_line.parse, launch.RESUMABLE)
