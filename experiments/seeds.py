"""Runs that differ by their seed as one: means, intervals, a picture and a table.

  python experiments/seeds.py --runs=runs/r1_zero_shuffled_objects \
    --to=experiments/r1_zero_shuffled_objects

The folder of a run is called <variant>-<seed>, as a sweep names it. Writes into --to:

    evaluations.jsonl  every held-out evaluation of every run, without per-problem outcomes
    seeds.png          training samples (mean over seeds, band: the 95 % interval of that mean) and
                       held-out points of the phase that reinforces
    seeds.md           a table: before it, and at its end

An interval is that of the mean of n seeds, mean +- t(.975, n - 1) sd / sqrt(n). It says how much
the result depends on the seed; problems are the same in all runs.
"""

import collections
import itertools
import json
import math
import pathlib
import statistics

import matplotlib.figure
import scipy.stats
from absl import flags

from reasonrl import command_line, logs, records

COLOURS = ('#0072b2', '#d55e00', '#009e73', '#8a5a9e', '#6f6f6f', '#e69f00', '#56b4e9')
# title, training metric, held-out metric, whether it is a share
PANELS = (
  ('Accuracy (sampled)', 'accuracy', 'eval/sampled/accuracy', True),
  ('Thinking (tokens)', 'think_length', 'eval/sampled/think_length', False),
  ('Cut off at the cap', 'truncated', 'eval/sampled/truncated', True),
)
TABLE = (
  ('sampled accuracy', 'eval/sampled/accuracy', 3),
  ('greedy accuracy', 'eval/greedy/accuracy', 3),
  ('pass@16', 'eval/sampled/pass@16', 3),
  ('majority@16', 'eval/sampled/majority@16', 3),
  ('format, sampled', 'eval/sampled/reward/r1_format', 3),
  ('lenient, sampled', 'eval/sampled/reward/accuracy/lenient', 3),
  ('think length', 'eval/sampled/think_length', 1),
  ('cut off, sampled', 'eval/sampled/truncated', 3),
)


def interval(values) -> tuple[float, float]:
  """Mean and half width of its 95 % interval; NaN for one value."""
  n = len(values)
  if n < 2:
    return statistics.fmean(values), math.nan
  t = scipy.stats.t.ppf(0.975, n - 1)
  return statistics.fmean(values), float(t) * statistics.stdev(values) / math.sqrt(n)


def load(folder: pathlib.Path) -> dict[str, dict[str, list[dict]]]:
  """Variant -> seed -> rows of metrics.jsonl."""
  found = collections.defaultdict(dict)
  for path in sorted(folder.glob('*-*/metrics.jsonl')):
    variant, _, seed = path.parent.name.rpartition('-')
    found[variant][seed] = logs.read_rows(path)
  if not found:
    raise records.UserError(f'--runs={str(folder)!r} has no <variant>-<seed>/metrics.jsonl')
  return dict(found)


def reinforcing(runs: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, list[dict]]]:
  """The variants that have such a phase: a base that others start from has none.

  Raises:
    UserError: none has.
  """
  found = {
    variant: of_seed
    for variant, of_seed in runs.items()
    if all(any('reward' in row for row in rows) for rows in of_seed.values())
  }
  if not found:
    raise records.UserError(f'no phase reinforces in {", ".join(runs)}')
  return found


def reinforced(rows: list[dict]) -> tuple[list[dict], list[dict]]:
  """Training rows of the phase that reinforces, and evaluations from just before it on."""
  train = [row for row in rows if row['kind'] == 'train' and 'reward' in row]
  first = train[0]['step'] - train[0]['phase_step']
  return train, [row for row in rows if row['kind'] == 'eval' and row['step'] >= first]


def across(seeds: dict[str, list[dict]], pick: int, metric: str):
  """Steps of the phase, and at each the mean and half width over the seeds that have got there."""
  at = collections.defaultdict(list)
  for rows in seeds.values():
    both = reinforced(rows)
    first = both[0][0]['step'] - both[0][0]['phase_step']
    for row in both[pick]:
      if row.get(metric) is not None:
        at[row['step'] - first].append(row[metric])
  steps = [step for step in sorted(at) if len(at[step]) == len(seeds)]
  return steps, [interval(at[step]) for step in steps]


def draw(runs, path: pathlib.Path) -> None:
  figure = matplotlib.figure.Figure(figsize=(6.2 * len(PANELS), 4.2), dpi=110)
  for axis, (title, train, held_out, share) in zip(
    figure.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True
  ):
    for (variant, seeds), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
      steps, values = across(seeds, 0, train)
      low, high = ([m + sign * h for m, h in values] for sign in (-1, 1))
      axis.plot(steps, [m for m, _ in values], color=colour, lw=1.5, label=variant)
      if len(seeds) > 1:
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
      steps, values = across(seeds, 1, held_out)
      bars = [h for _, h in values] if len(seeds) > 1 else None
      means = [m for m, _ in values]
      axis.errorbar(steps, means, bars, fmt='o', color=colour, ms=4, lw=1, capsize=2)
    axis.set_title(title, loc='left', fontsize=11)
    axis.set_xlabel('reinforcement step')
    axis.set_ylim(*((-0.02, 1.02) if share else (0, None)))
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  axis.legend(fontsize=9, frameon=False)
  figure.tight_layout()
  figure.savefig(path)


def table(runs) -> str:
  """Markdown: per variant each metric before reinforcement and after, mean +- half width."""
  used = [row for seeds in runs.values() for rows in seeds.values() for row in reinforced(rows)[1]]
  columns = [column for column in TABLE if any(column[1] in row for row in used)]
  lines = ['| variant | seeds | ' + ' | '.join(name for name, _, _ in columns) + ' |']
  lines.append('|' + '---|' * (2 + len(columns)))

  def cell(seeds, metric, digits):
    texts = []
    for which in (0, -1):
      values = [reinforced(rows)[1][which].get(metric) for rows in seeds.values()]
      if None in values:
        return ''
      mean, half = interval(values)
      texts.append(f'{mean:.{digits}f}' + ('' if math.isnan(half) else f' ± {half:.{digits}f}'))
    return ' → '.join(texts)

  for variant, seeds in runs.items():
    cells = [cell(seeds, metric, digits) for _, metric, digits in columns]
    lines.append(f'| {variant} | {len(seeds)} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def main(_) -> None:
  runs, to = reinforcing(load(pathlib.Path(flags.FLAGS.runs))), pathlib.Path(flags.FLAGS.to)
  with open(to / 'evaluations.jsonl', 'w', encoding='utf-8') as out:
    for variant, seeds in runs.items():
      for seed, rows in seeds.items():
        for row in rows:
          if row['kind'] == 'eval':
            kept = {k: v for k, v in row.items() if not k.endswith('/outcomes')}
            out.write(json.dumps({'variant': variant, 'seed': int(seed), **kept}) + '\n')
  draw(runs, to / 'seeds.png')
  (to / 'seeds.md').write_text(table(runs), encoding='utf-8')
  print(table(runs))


if __name__ == '__main__':
  flags.DEFINE_string('runs', '', 'Folder of the runs.')  # here: other programs have a --to as well
  flags.DEFINE_string('to', '', 'Folder to write to.')
  command_line.guarded(main, flags.FLAGS, '')
