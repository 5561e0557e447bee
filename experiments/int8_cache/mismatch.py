"""How far the sampler's log-probabilities were from the learner's: a line for each variant.

  python experiments/int8_cache/mismatch.py --runs=runs/int8_cache

Means over the steps and seeds of `mismatch/mean` and `mismatch/p99`, the largest `mismatch/max`,
and the smallest and largest importance weight of the last step of any seed.
"""

import collections
import json
import pathlib
import statistics

from absl import app, flags

_RUNS = flags.DEFINE_string('runs', 'runs/int8_cache', 'Folder of a sweep.')


def main(_) -> None:
  found = collections.defaultdict(list)
  for file in sorted(pathlib.Path(_RUNS.value).glob('*/metrics.jsonl')):
    rows = map(json.loads, file.read_text().splitlines())
    found[file.parent.name.rpartition('-')[0]].append([r for r in rows if 'mismatch/mean' in r])
  for variant, runs in found.items():
    rows = [row for run in runs for row in run]
    of = lambda name, rows=rows: [row[name] for row in rows]
    line = f'{variant}: {len(runs)} runs, mean {statistics.mean(of("mismatch/mean")):.1e}'
    line += f', p99 {statistics.mean(of("mismatch/p99")):.1e}, max {max(of("mismatch/max")):.1e}'
    last = [run[-1] for run in runs if 'importance/min' in run[-1]]
    if last:
      low, high = (pick(r[f'importance/{pick.__name__}'] for r in last) for pick in (min, max))
      line += f', weights {low:.2f} to {high:.2f}'
    print(line)


if __name__ == '__main__':
  app.run(main)
