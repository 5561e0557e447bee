"""Recomputes an update that was not finite, from what the run kept of it.

  python -m reasonrl.main --replay=runs/first/nonfinite/rl-12-0.npz

1. The config is that of the run; --config.x=1 changes it (--config.mesh.fsdp=4: on other devices).
2. `postmortem.find` recomputes the dumped micro-batches with the dumped parameters.
3. A table says what is finite, and the first token that is not is shown with its values.
"""

from __future__ import annotations

import pathlib

import rich.console
import rich.table

from reasonrl import checkpoint, checks, phases, postmortem, records, sharding, train, wiring
from reasonrl.steps import STEPS


def run(config, dump: str, console: rich.console.Console) -> int:
  """Recomputes a dump and shows it. Returns 0 if it is not finite again, else 1.

  Raises:
    UserError: it is no dump, or does not fit the config.
  """
  path = pathlib.Path(dump).expanduser().absolute()
  place, batches, denominators, folder = postmortem.read(path)
  workdir = path.parent.parent
  order = phases.order(config, STEPS)
  setup = wiring.wire(config, train.TABLES, order, workdir, None, lambda: None)
  if place['phase'] not in setup.phases:
    raise records.UserError(f'{dump!r} is of phase {place["phase"]!r}, which phases does not name')
  phase = setup.phases[place['phase']]
  checks.sizes(setup, phase)
  student = phase.learner
  target = sharding.abstract_params(student.model, setup.mesh)
  params = checkpoint.load_params(folder, target)
  report = postmortem.find(student, params, batches, denominators, setup.tokenizer)
  show(console, place, report)
  return 1 if report.finite else 0


def show(console: rich.console.Console, place: dict, report: postmortem.Report) -> None:
  """One line per micro-batch, then the first token that is not finite."""
  where = f'{place["phase"]} step {place["step"]}, update {place["update"]}'
  table = rich.table.Table('micro-batch', 'loss', 'gradient norm', 'tokens not finite', title=where)
  for b, row in enumerate(report.micro_batches):
    table.add_row(str(b), f'{row["loss"]:g}', f'{row["grad_norm"]:g}', str(row['bad_tokens']))
  console.print(table)
  if report.finite:
    console.print('does not reproduce: loss and gradient are finite')
    return
  console.print(f'reproduces: {report.origin}', markup=False, soft_wrap=True)
  if report.origin.token:
    values = rich.table.Table('value', f'at token {report.origin.token.text!r}')
    for name, value in report.origin.token.values.items():
      values.add_row(name, f'{value:g}')
    console.print(values)
