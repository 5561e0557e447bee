"""From a section of the config to the member of a table that it names."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

from reasonrl import records


def lookup(table: dict, name: str, what: str):
  """table[name]; an unknown name lists the choices."""
  if name not in table:
    raise records.UserError(f'{what}={name!r} is not one of {", ".join(sorted(table))}')
  return table[name]


@contextlib.contextmanager
def named(what: str):
  """A UserError inside begins with the section that it is about."""
  try:
    yield
  except records.UserError as error:
    raise records.UserError(f'{what}: {error}') from None


def build(cls, section, *without: str, **built):
  """cls(**section), leaving out the fields that are not the member's own ('name', ...).

  `built` replaces fields of the section.
  """
  fields = {k: v for k, v in section.to_dict().items() if k not in without} | built
  known = {f.name for f in dataclasses.fields(cls)}
  if fields.keys() != known:
    wrong = ', '.join(sorted(fields.keys() ^ known))
    raise records.UserError(f'{cls.__name__} takes {sorted(known)}; unknown or missing: {wrong}')
  return cls(**fields)


def member(table: dict, section, what: str):
  """The member of `table` that section.name names, with the section's other fields."""
  return build(lookup(table, section.name, f'{what}.name'), section, 'name')


def make_task(table: dict, section, what: str, dataset: Callable[[str], pathlib.Path] | None):
  """The task of a section.

  `members` of a section are weights and task sections, its `task` is one; for its `phase`, of kind
  'collect', the task is given as `path` what `dataset` returns (None: it is not there to be read).
  """
  built = {}
  if 'members' in section:
    built['members'] = {
      name: (entry.weight, make_task(table, entry.task, f'{what}.members.{name}.task', dataset))
      for name, entry in section.members.items()
    }
  if 'task' in section:
    built['task'] = make_task(table, section.task, f'{what}.task', dataset)
  if 'phase' in section and section.phase:
    if dataset is None:
      raise records.UserError(f'{what}: what {section.phase} collects is for the task of a phase')
    built['path'] = str(dataset(section.phase))
  cls = lookup(table, section.name, f'{what}.name')
  with named(what):
    return build(cls, section, 'name', **built)
