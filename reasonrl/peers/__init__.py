"""Objectives as TRL and verl write them: their config files to ours, and ours to their names.

`read` reads a YAML file; what it does not say is the peer's default. Every field
of the objective is reported as exact, approximate (with what differs) or unsupported; fields about
other things (logging, hardware, data) are listed as ignored. `nearest` goes the other way.

Read off TRL 1.16 (GRPOConfig) and verl 2026-08 (ppo_trainer.yaml); see arXiv ids in
`configs/common.py` for the formulas. Left out: reward functions and datasets, which are code.
"""

from __future__ import annotations

import pathlib
from typing import Any

import yaml

from reasonrl import phases, records
from reasonrl.configs import common
from reasonrl.peers import trl, verl
from reasonrl.peers.lines import APPROXIMATE, EXACT, IGNORED, UNSUPPORTED, Line

READERS = {'trl': trl.read, 'verl': verl.read}


def read(peer: str, path: str) -> list[Line]:
  """The lines of a peer's YAML file.

  Raises:
    UserError: no such file, or it does not hold a mapping.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise records.UserError(f'--from_{peer}: no file {path!r}')
  try:
    given = yaml.safe_load(file.read_text(encoding='utf-8')) or {}
  except yaml.YAMLError as error:
    raise records.UserError(
      f'--from_{peer}: {path} is not YAML: {error}'.replace('\n', ' ')
    ) from error
  if not isinstance(given, dict):
    raise records.UserError(f'--from_{peer}: {path} does not hold fields and values')
  return READERS[peer](given)


def apply(config, lines: list[Line]):
  """The config with all its reinforce phases as the lines say.

  Raises:
    UserError: a line is unsupported, or no phase reinforces.
  """
  wrong = [f'{line.field}={line.value!r}' for line in lines if line.status == UNSUPPORTED]
  if wrong:
    raise records.UserError(f'no counterpart here: {", ".join(wrong)}')
  config = config.copy_and_resolve_references().unlock()
  for section in phases.sections(config).values():
    if section.kind != 'reinforce':
      continue
    section.algorithm = common.algorithm('grpo')
    for line in lines:
      for name, value in line.ours.items():
        *parents, last = name.split('.')
        node = section
        for parent in parents:
          node = node[parent]
        with node.ignore_type():
          node[last] = value
  return config.lock()


def report(lines: list[Line]) -> str:
  """A text line for each field that the file gives or that is not exact."""
  order = (UNSUPPORTED, APPROXIMATE, EXACT, IGNORED)
  shown = [line for line in lines if line.given or line.status in (UNSUPPORTED, APPROXIMATE)]
  out = []
  for line in sorted(shown, key=lambda line: order.index(line.status)):
    ours = ', '.join(f'{name}={value!r}' for name, value in line.ours.items())
    text = f'{line.status:<12} {line.field}={line.value!r}'
    text += f' -> {ours}' if ours else ''
    out.append(text + (f' ({line.note})' if line.note else ''))
  rest = sum(line not in shown for line in lines)
  return '\n'.join([*out, f"and {rest} fields at the peer's defaults, exact"])


def nearest(cfg, env, section) -> dict[str, dict[str, Any]]:
  """'TRL' and 'verl' -> the fields of theirs that come nearest, without their defaults."""
  return {'TRL': trl.nearest(cfg, env, section), 'verl': verl.nearest(cfg, env, section)}
