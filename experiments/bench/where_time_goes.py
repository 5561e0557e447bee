"""Where the time of a run goes: a table for each phase, from its metrics and its profile.

  python experiments/bench/where_time_goes.py --workdir=runs/first

The first table has the median seconds of each stage of a step, first steps (compilation) left out:
indented stages are parts of the one above. What a step takes beyond its stages is the loop itself,
or waiting that no stage owns. If the run was made with --config.log.profile_step=N, the second
table has the host's threads while step N ran: operations of the compiled programs by kind, as
shares of the time all of them took. Open <workdir>/profile in Perfetto or XProf for the rest.
"""

import collections
import gzip
import json
import pathlib
import re
import statistics

import rich.console
import rich.table
from absl import flags

from reasonrl import command_line, logs, records

_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of a run.')

STAGES = (
  *('data', 'rollout', '  sample', '  reward', 'score', 'pack', 'update', 'describe', 'wait'),
  'step',
)


def stages(rows) -> dict[str, list[float]]:
  """Stage -> seconds at each step of a phase after its first two."""
  found = collections.defaultdict(list)
  for row in rows[2:]:
    for stage in STAGES:
      value = row.get(f'timing/{stage.strip()}_s')
      if value is not None:
        found[stage].append(value)
  return found


def operations(folder: pathlib.Path) -> tuple[collections.Counter, float]:
  """Kind of operation -> seconds over all threads, and the seconds that the trace spans."""
  file = max(folder.rglob('perfetto_trace.json.gz'), key=lambda path: path.stat().st_mtime)
  with gzip.open(file) as text:
    events = json.load(text)['traceEvents']
  kinds, last = collections.Counter(), 0.0
  for event in events:
    if event.get('ph') == 'X':
      last = max(last, event['ts'] + event.get('dur', 0))
      if 'hlo_op' in event.get('args', {}):
        kind = re.sub(r'[.\d]+$', '', event['args']['hlo_op'])
        kinds[kind] += event['dur'] / 1e6
  first = min((e['ts'] for e in events if e.get('ph') == 'X'), default=0.0)
  return kinds, (last - first) / 1e6


def main(_) -> None:
  workdir, console = pathlib.Path(_WORKDIR.value), rich.console.Console(highlight=False)
  rows = [row for row in logs.read_rows(workdir / 'metrics.jsonl') if row['kind'] == 'train']
  if not rows:
    raise records.UserError(f'--workdir={_WORKDIR.value!r} has no training steps in metrics.jsonl')
  for phase in dict.fromkeys(row['phase'] for row in rows):
    found = stages([row for row in rows if row['phase'] == phase])
    if not found:
      raise records.UserError(f'phase {phase!r} has fewer than 3 steps: all of them compile')
    table, whole = rich.table.Table(phase, 'median s', 'share'), statistics.median(found['step'])
    for stage in STAGES:
      if found[stage]:
        seconds = statistics.median(found[stage])
        table.add_row(stage, f'{seconds:.4f}', f'{seconds / whole:.1%}')
    console.print(table)
    folder = workdir / 'profile' / phase
    if folder.exists():
      kinds, span = operations(folder)
      table, total = rich.table.Table(f'{phase}, operations', 's', 'share'), kinds.total()
      for kind, seconds in kinds.most_common(12):
        table.add_row(kind, f'{seconds:.3f}', f'{seconds / total:.1%}')
      table.add_row(f'all, in {span:.2f} s', f'{total:.3f}', '')
      console.print(table)


if __name__ == '__main__':
  command_line.guarded(main, flags.FLAGS, '')
