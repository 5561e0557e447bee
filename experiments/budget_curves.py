"""Sweeps of thinking budgets over seeds: accuracy against tokens, and how well budgets are kept.

  python experiments/budget_curves.py --runs=runs/s1 --to=experiments/s1_shuffled_objects \
    --curves=base:pretrain:ignores,base:pretrain:rejection --also=token:sft:target

The folder of a run is called <variant>-<seed>, as a sweep names it; a curve is
variant:phase:method, the phase's last evaluation. Writes into --to:

    budgets.jsonl  every metric of every setting: one row for each variant, seed, phase, setting
    budgets.png    accuracy against mean tokens of thinking; and for the curves of --asked tokens of
                   the response against tokens asked for. Lines are means over seeds, dots seeds
    budgets.md     tables: the settings of every curve, and of those --also named; Control, Scaling
                   and Performance

An interval is that of the mean of n seeds, mean +- t(.975, n - 1) sd / sqrt(n).
"""

import itertools
import json
import math
import pathlib
import statistics
from typing import Any

import matplotlib.figure
from absl import flags

from reasonrl import budgets, command_line, records
from reasonrl.experiments import seeds

WHOLE = ('control', 'scaling', 'performance')
COLUMNS = (  # title, metric, digits
  ('accuracy', 'accuracy', 3),
  ('thinking', 'think_length', 1),
  ('response', 'completion_length', 1),
  ('within', 'within', 2),
  ('truncated', 'truncated', 2),
  ('off by', 'mean_abs_error', 3),
  ('within 10 %', 'within_10', 2),
  ('over', 'over', 2),
  ('failed', 'failed', 2),
)


def collect(runs) -> list[dict[str, Any]]:
  """One row for each variant, seed, phase, method and setting; 'all' has those of WHOLE."""
  found = []
  for variant, of_seed in runs.items():
    for seed, rows in of_seed.items():
      swept = {}  # the last evaluation of a phase
      for row in rows:
        for name in budgets.BUDGETS:
          if f'eval/{name}/control' in row:
            swept[row['phase'], name] = row
      for (phase, name), row in swept.items():
        place = {'variant': variant, 'seed': int(seed), 'phase': phase, 'method': name}
        for setting, metrics in budgets.by_setting(row, name).items():
          found.append({**place, 'setting': setting, **metrics})
        whole = {metric: row[f'eval/{name}/{metric}'] for metric in WHOLE}
        found.append({**place, 'setting': 'all', **whole})
  return found


def curve(rows, name: str) -> dict[str, dict[str, list[float]]]:
  """Setting -> metric -> its value for every seed, of variant:phase:method.

  Raises:
    UserError: there is no such curve.
  """
  chosen = [row for row in rows if name == f'{row["variant"]}:{row["phase"]}:{row["method"]}']
  if not chosen:
    there = dict.fromkeys(f'{row["variant"]}:{row["phase"]}:{row["method"]}' for row in rows)
    raise records.UserError(f'--curves: {name!r} is not one of {", ".join(there) or "none"}')
  out = {}
  for row in chosen:
    for metric, value in row.items():
      if isinstance(value, int | float) and metric != 'seed':
        out.setdefault(row['setting'], {}).setdefault(metric, []).append(value)
  return out


def draw(curves, asked, path: pathlib.Path) -> None:
  figure = matplotlib.figure.Figure(figsize=(6.2 * (1 + bool(asked)), 4.4), dpi=110)
  axes = figure.subplots(1, 1 + bool(asked), squeeze=False)[0]
  colours = dict(zip(curves, itertools.cycle(seeds.COLOURS), strict=False))
  for name, settings in curves.items():
    points = [found for setting, found in settings.items() if setting != 'all']
    points.sort(key=lambda found: statistics.fmean(found['think_length']))
    tokens, accuracy = ([found[key] for found in points] for key in ('think_length', 'accuracy'))
    _line(axes[0], tokens, accuracy, colours[name], name)
  axes[0].set_title('Accuracy', loc='left', fontsize=11)
  axes[0].set_xlabel('mean tokens of thinking')
  axes[0].set_ylim(-0.02, 1.02)
  for name, settings in asked.items():
    numbers = sorted(int(setting) for setting in settings if setting != 'all')
    said = [settings[str(n)]['completion_length'] for n in numbers]
    asked_for = [[n] * len(lengths) for n, lengths in zip(numbers, said, strict=True)]
    _line(axes[1], asked_for, said, colours[name], name)
  if asked:
    axes[1].axline((0, 0), slope=1, color='#999999', lw=1, ls=':')
    axes[1].set_title('Tokens of the response', loc='left', fontsize=11)
    axes[1].set_xlabel('tokens asked for')
    axes[1].set_ylim(0)
  for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
  figure.tight_layout()
  figure.savefig(path)


def _line(axis, x, y, colour, label) -> None:
  """A line through the means over seeds, and a dot for each seed."""
  means = [[statistics.fmean(values) for values in each] for each in (x, y)]
  axis.plot(*means, '-', color=colour, lw=1.6, label=label)
  flat = [list(itertools.chain(*each)) for each in (x, y)]
  axis.plot(*flat, 'o', color=colour, ms=3.5, alpha=0.55, mew=0)


def tables(curves) -> str:
  """Markdown: Control, Scaling and Performance of every curve; then the settings of each."""
  lines = [
    '| curve | Control | Scaling, points per 1,000 tokens | Performance |',
    '|---|---|---|---|',
  ]
  for name, settings in curves.items():
    whole = settings['all']
    cells = [
      _cell(whole.get(metric), digits) for metric, digits in zip(WHOLE, (2, 0, 3), strict=True)
    ]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  for name, settings in curves.items():
    points = {setting: found for setting, found in settings.items() if setting != 'all'}
    columns = [c for c in COLUMNS if any(c[1] in found for found in points.values())]
    lines += ['', f'| {name} | ' + ' | '.join(title for title, _, _ in columns) + ' |']
    lines.append('|' + '---|' * (1 + len(columns)))
    for setting, found in points.items():
      cells = [_cell(found.get(metric), digits) for _, metric, digits in columns]
      lines.append(f'| {setting} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _cell(values: list[float] | None, digits: int) -> str:
  if values is None:
    return ''
  mean, half = seeds.interval(values)
  return f'{mean:.{digits}f}' + ('' if math.isnan(half) else f' ± {half:.{digits}f}')


def main(_) -> None:
  values, to = flags.FLAGS, pathlib.Path(flags.FLAGS.to)
  rows = collect(seeds.load(pathlib.Path(values.runs)))
  curves = {name: curve(rows, name) for name in values.curves}
  every = curves | {name: curve(rows, name) for name in values.also}
  with open(to / 'budgets.jsonl', 'w', encoding='utf-8') as out:
    out.writelines(json.dumps(row) + '\n' for row in rows)
  draw(curves, {name: curve(rows, name) for name in values.asked}, to / 'budgets.png')
  (to / 'budgets.md').write_text(tables(every), encoding='utf-8')
  print(tables(every))


if __name__ == '__main__':
  flags.DEFINE_string('runs', '', 'Folder of the runs.')  # here: other programs have a --to as well
  flags.DEFINE_string('to', '', 'Folder to write to.')
  flags.DEFINE_list('curves', [], 'variant:phase:method, in the order in which they are shown.')
  flags.DEFINE_list('asked', [], 'Those of --curves that ask for tokens of the response.')
  flags.DEFINE_list('also', [], 'Curves that only the tables show.')
  command_line.guarded(main, flags.FLAGS, '')
