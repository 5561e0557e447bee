"""Evaluates what a run has learned, or any weights, on held-out problems.

  python -m reasonrl.evaluate --workdir=runs/a --config.evaluation.env.num_generations=16
  python -m reasonrl.evaluate --config=configs/r1_zero.py:smollm2 --model=smollm2-135m-instruct
  python -m reasonrl.evaluate --workdir=runs/a --sweep=max_think=4,8,16 --sweep=ignores=0,1,2

1. The config is that of the run (--workdir) or the one named (--config); --config.x=1 changes it.
2. Its phases become a single `evaluate` phase, which starts from the parameters that the run kept
   (of --phase), or from --model: a GGUF file or its name, a Hugging Face folder, or a folder of
   parameters.
3. `train.run` does the rest, into --to: metrics.jsonl (pass@1 with intervals, greedy and sampled,
   pass@k, majority@k, lengths, truncation, strict and lenient) and rollouts.jsonl (transcripts).
4. --sweep adds a method of evaluation.budgets with these numbers: accuracy and thinking tokens at
   each budget, and over them Control, Scaling and Performance (arXiv 2501.19393).
"""

from __future__ import annotations

import os
import pathlib
import time

import ml_collections
import rich.console
import rich.table
from absl import flags

from reasonrl import budgets, command_line, display, launch, logs, records
from reasonrl.configs import common

flags.adopt_module_key_flags(launch)  # --help shows them
_PHASE = flags.DEFINE_string('phase', '', 'Which phase of the run; by default the last one.')
_MODEL = flags.DEFINE_string('model', '', 'Weights to evaluate under --config.')
_TO = flags.DEFINE_string('to', '', 'Folder of the results; by default a new one.')
_SWEEP = flags.DEFINE_multi_string(
  'sweep', [], 'METHOD=NUMBER,NUMBER,... of evaluation.budgets, such as max_think=4,8,16.'
)
SHOWN = 3  # transcripts on the screen
LENGTHS = (
  *('completion_length', 'stopped_length', 'right_length', 'wrong_length', 'think_length'),
  'truncated',
)


def parse(argv: list[str]) -> list[str]:
  """main's command line; a run's own config stands in for --config."""
  return command_line.parse(command_line.with_saved_config(argv, 'workdir', str))


def source(workdir: str, phase: str) -> pathlib.Path:
  """The folder of the parameters that a run kept of a phase, '' for the last.

  Raises:
    UserError: it kept none, or none of that name.
  """
  from reasonrl import phases, steps  # here: they import JAX

  path = pathlib.Path(workdir).expanduser().absolute()
  saved = ml_collections.ConfigDict(logs.read_config(path))
  kept = phases.finished(saved, steps.STEPS, path)
  if phase and phase not in kept:
    raise records.UserError(f'--phase={phase!r} is not one of {", ".join(kept)}')
  return path / 'phases' / (phase or list(kept)[-1])


def prepare(config, workdir: str, phase: str, model: str):
  """The config of the evaluation: one phase that starts from what is to be evaluated."""
  if bool(workdir) == bool(model):
    raise records.UserError('give --workdir=FOLDER of a run, or --config=... and --model=WEIGHTS')
  config = config.copy_and_resolve_references().unlock()
  config.evaluate = common.evaluate()
  config.phases = ('evaluate',)
  if workdir:
    config.evaluate.init = str(source(workdir, phase))
    saved = common.tokenizer('saved')
    saved.path = str(pathlib.Path(workdir).expanduser().absolute() / 'tokenizer')
    config.tokenizer = saved
  elif os.path.isdir(model) and not os.path.exists(f'{model}/config.json'):
    config.evaluate.init = model  # what a run kept; a Hugging Face folder has a config.json
  else:
    config.models[config.evaluate.trains].weights = model
  return config.lock()


def with_sweeps(config, sweeps: list[str]):
  """The config with methods of evaluation.budgets and their numbers.

  Raises:
    UserError: one is not METHOD=NUMBER,NUMBER,....
  """
  known = common.budgets(*budgets.BUDGETS)
  config.unlock()
  for sweep in sweeps:
    name, _, values = sweep.partition('=')
    if name not in known:
      raise records.UserError(f'--sweep={sweep}: {name!r} is not one of {", ".join(known)}')
    if name not in config.evaluation.budgets:
      config.evaluation.budgets[name] = known[name]
    section = config.evaluation.budgets[name]
    if ('numbers' in section) != bool(values):
      expected = f'{name}=4,8,16' if 'numbers' in section else name
      raise records.UserError(f'--sweep={sweep}: give it as {expected}')
    if values:
      try:
        section.numbers = tuple(int(value) for value in values.split(','))
      except ValueError:
        raise records.UserError(f'--sweep={sweep}: {values!r} are not numbers') from None
  return config.lock()


def sweep_table(row: dict, name: str) -> rich.table.Table:
  """One line per setting of a swept method, and what holds over all of them."""
  settings = budgets.by_setting(row, name)
  columns = {'accuracy': 'accuracy', 'think_length': 'thinking', 'completion_length': 'response'}
  columns |= {'within': 'within', 'truncated': 'truncated', 'mean_abs_error': 'off by'}
  columns |= {'within_10': 'within 10 %', 'over': 'over', 'failed': 'failed'}
  columns = {k: v for k, v in columns.items() if any(k in found for found in settings.values())}
  control, scaling, best = (row[f'eval/{name}/{x}'] for x in ('control', 'scaling', 'performance'))
  slope = 'none' if scaling is None else f'{scaling:.3g} points per 1,000 tokens'
  whole = f'Control {control:.0%}, Scaling {slope}, Performance {best:.3f}'
  out = rich.table.Table(name, *columns.values(), caption=whole)
  for setting, found in settings.items():
    cells = [f'{found[metric]:.3g}' for metric in columns]
    low, high = found['accuracy_low'], found['accuracy_high']
    out.add_row(setting, f'{found["accuracy"]:.3f} [{low:.3f}, {high:.3f}]', *cells[1:])
  return out


def table(row: dict) -> rich.table.Table:
  """One line per metric, one column per mode; a 95 % interval where there is one."""
  metrics = ['accuracy']
  for prefix in ('accuracy/', 'completion_length/', 'pass@', 'majority@', 'reward/'):
    start = f'eval/sampled/{prefix}'
    found = [name.removeprefix(start) for name in row if name.startswith(start)]
    found = [name for name in found if not name.endswith(('_low', '_high'))]
    by_size = lambda rest: (rest.isdigit() * len(rest), rest)  # 2, 4, 16
    metrics += [prefix + rest for rest in sorted(found, key=by_size)]
  metrics += LENGTHS
  out = rich.table.Table('', 'greedy', 'sampled')

  def cell(key):
    value, low = row.get(key), row.get(f'{key}_low')
    if value is None or low is None:
      return '' if value is None else f'{value:.4g}'
    return f'{value:.3f} [{low:.3f}, {row[f"{key}_high"]:.3f}]'

  for metric in metrics:
    cells = [cell(f'eval/{mode}/{metric}') for mode in ('greedy', 'sampled')]
    out.add_row('pass@1' if metric == 'accuracy' else metric, *cells)
  return out


def main(argv: list[str]) -> int:
  del argv
  values = flags.FLAGS
  if values.config is None:
    raise records.UserError('give --workdir=FOLDER of a run, or --config=... and --model=WEIGHTS')
  if values.distributed and not values.to:
    raise records.UserError('--distributed needs --to, a folder that every host sees')
  config = prepare(values.config, values.workdir, values.phase, values.model)
  config = with_sweeps(config, values.sweep)
  into = pathlib.Path(values.workdir, 'evaluations') if values.workdir else pathlib.Path('runs')
  name = pathlib.Path(config.evaluate.init if values.workdir else values.model).name
  workdir = values.to or str(into / f'{name}-{time.strftime("%Y%m%d-%H%M%S")}')
  code = launch.start(config, workdir, '--to')

  import jax

  if jax.process_index():
    return code
  rows = logs.read_rows(pathlib.Path(workdir, logs.METRICS))
  console = rich.console.Console(highlight=False)
  if rows:
    console.print(table(rows[-1]))
    for name in config.evaluation.budgets:
      console.print(sweep_table(rows[-1], name))
    for sample in logs.read_rows(pathlib.Path(workdir, logs.ROLLOUTS))[-SHOWN:]:
      console.print(display.transcript(sample, console.width))
    console.print(f'all of it: {workdir}')
  return code


if __name__ == '__main__':
  command_line.guarded(main, parse, launch.RESUMABLE)
