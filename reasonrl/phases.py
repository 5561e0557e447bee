"""The phases of a run: order and lengths, and where their parameters and datasets are kept."""

from __future__ import annotations

import pathlib
import zlib
from typing import Any

from reasonrl import records, tables


def sections(config) -> dict[str, Any]:
  """The sections of a config that `phases` may name."""
  return {k: v for k, v in config.items() if hasattr(v, 'kind') and hasattr(v, 'trains')}


def order(config, kinds) -> list[tuple[str, int]]:
  """config.phases flattened to (name, iteration); a loop is a tuple ending in its repetitions."""
  flat = []
  for entry in config.phases:
    if not isinstance(entry, str) and not isinstance(entry[-1], int):
      raise records.UserError(f'the loop of phases {entry} must end in how often it is repeated')
    names, times = ((entry,), 1) if isinstance(entry, str) else (entry[:-1], entry[-1])
    flat += [(name, iteration) for iteration in range(times) for name in names]
  found = sections(config)
  for name, _ in flat:
    tables.lookup(found, name, 'phases')
    tables.lookup(kinds, config[name].kind, f'{name}.kind')
  if not flat:
    raise records.UserError(f'phases is empty: it names sections, of {", ".join(found)}')
  return flat


def updates(section) -> bool:
  """Whether such a phase changes parameters: those that sample or evaluate have no optimizer."""
  return 'optim' in section


def steps(section, iteration: int) -> int:
  """The steps of a phase in the iteration (from 0) of its loop.

  A supervised one has int(steps growth^iteration) + added iteration (STaR, arXiv 2203.14465: 1.2
  and 0, or 1 and 20).
  """
  if section.kind != 'supervised':
    return section.steps
  return int(section.steps * section.steps_growth**iteration) + section.steps_added * iteration


def before(order, index: int, name: str) -> int | None:
  """The index of the latest run of the phase `name` before phase `index` of the order."""
  return max((i for i in range(index) if order[i][0] == name), default=None)


def dataset(workdir: pathlib.Path, order, index: int) -> pathlib.Path:
  """Where phase `index`, of kind 'collect', writes what it keeps."""
  return workdir / 'datasets' / f'{kept_name(order, index)}.jsonl'


def read_datasets(workdir: pathlib.Path, order, index: int, names):
  """What phase `index` reads of the collect phases `names`: paths, and sizes with checksums."""
  paths = {name: dataset(workdir, order, before(order, index, name)) for name in names}
  contents = {name: path.read_bytes() for name, path in paths.items()}
  return paths, {name: [len(text), zlib.crc32(text)] for name, text in contents.items()}


def collected_by(task) -> set[str]:
  """The collect phases whose datasets a task section reads."""
  found = {task.phase} if 'phase' in task and task.phase else set()
  inner = [entry.task for entry in task.members.values()] if 'members' in task else []
  inner += [task.task] if 'task' in task else []
  return found.union(*map(collected_by, inner))


def kept_name(order, index: int) -> str:
  """The folder under phases/ of a phase's final parameters: 'rl', or 'sft-3' inside a loop."""
  names = [name for name, _ in order]
  name = names[index]
  return name if names.count(name) == 1 else f'{name}-{names[:index].count(name)}'


def finished(config, kinds, workdir: pathlib.Path) -> dict[str, str]:
  """Folder of final parameters -> its phase, in the order of the run."""
  found, flat = {}, order(config, kinds)
  for index, (phase, _) in enumerate(flat):
    name = kept_name(flat, index)
    found |= {f'{name}-ema': phase, name: phase}
  kept = {path.parent.name for path in (workdir / 'phases').glob('*/*')}  # not what only evaluated
  found = {name: phase for name, phase in found.items() if name in kept}
  if not found:
    raise records.UserError(f'{str(workdir)!r} has not finished a phase: its phases/ is empty')
  return found
