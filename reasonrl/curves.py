"""A run as a picture: curves.png from metrics.jsonl.

The x axis is the step of the phase, or, where a panel spans several, counted over all. What a run
did not log is not drawn.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from reasonrl import budgets, logs, records, stats

COLOURS = BLUE, ORANGE, GREEN, PURPLE, GREY = '#0072b2', '#d55e00', '#009e73', '#8a5a9e', '#6f6f6f'

# title, y axis ('percent' | 'zero': starts there | 'free' | 'log'), series (label, rows, metric,
# colour); rows: 'train', of these 'supervised' (no reward) or 'reinforce' (a reward); 'eval'
PANELS = (
  (
    'Accuracy',
    'percent',
    (
      ('training samples', 'reinforce', 'accuracy', BLUE),
      ('held-out, sampled', 'eval', 'eval/sampled/accuracy', ORANGE),
      ('held-out, greedy', 'eval', 'eval/greedy/accuracy', GREEN),
    ),
  ),
  ('Reward', 'free', (('training samples', 'reinforce', 'reward', BLUE),)),
  (
    'Length (tokens)',
    'zero',
    (
      ('completion', 'reinforce', 'completion_length', BLUE),
      ('thinking', 'reinforce', 'think_length', PURPLE),
      ('thinking, held-out', 'eval', 'eval/sampled/think_length', ORANGE),
    ),
  ),
  (
    'Length against what was asked',
    'zero',
    (
      ('off by, training samples', 'reinforce', 'reward/lcpo/exact/deviation', BLUE),
      ('off by, held-out', 'eval', 'eval/sampled/reward/lcpo/exact/deviation', ORANGE),
      ('within 10 %, held-out', 'eval', 'eval/sampled/reward/lcpo/exact/within_10', GREEN),
    ),
  ),
  ('Entropy (nats per token)', 'zero', (('policy', 'reinforce', 'entropy', BLUE),)),
  (
    'Supervised loss (nats per token)',
    'zero',
    (('training', 'supervised', 'loss', BLUE),),
  ),
  ('Gradient norm', 'log', (('before clipping', 'train', 'grad_norm', GREY),)),
)


def _panels(rows: Sequence[Mapping[str, Any]]) -> list:
  """PANELS that the rows have data for; after the first, accuracy by a fact of the problems."""
  prefix = 'eval/greedy/accuracy/'
  keys = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
  pairs = zip(keys, itertools.cycle(COLOURS), strict=False)
  series = [(key.removeprefix(prefix), 'eval', key, colour) for key, colour in pairs]
  panels = [*PANELS[:1], ('Held-out accuracy, greedy', 'percent', series), *PANELS[1:]]
  return [p for p in panels if any(rows_with(rows, which, key) for _, which, key, _ in p[2])]


def rows_with(rows: Sequence[Mapping[str, Any]], which: str, metric: str):
  """The rows of the kind `which` (see PANELS) that have the metric."""
  return [
    row
    for row in rows
    if row.get(metric) is not None
    and (row['kind'] == 'eval') == (which == 'eval')
    and (which in ('eval', 'train') or (which == 'reinforce') == ('reward' in row))
  ]


def _smooth(values: Sequence[float], window: int) -> list[float]:
  """Mean over the `window` values around each; fewer at the ends."""
  half = window // 2
  near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
  return [sum(v) / len(v) for v in near]


def _phases(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
  """(name, first step, last step) of each stretch of rows of one phase, in order."""
  return [
    (name, stretch[0]['step'], stretch[-1]['step'])
    for name, group in itertools.groupby(rows, key=lambda row: row['phase'])
    for stretch in [list(group)]
  ]


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
  """'Held-out accuracy: sampled 0.312 → 0.940, gain 0.628 (95%: 0.597 to 0.659)', or ''.

  From the last evaluation before reinforcement began, or else the first, to the last. The interval
  is that of the paired gain; without per-problem outcomes, of the last accuracy.
  """
  began = min((row['step'] for row in rows_with(rows, 'reinforce', 'reward')), default=0)
  texts = []
  for name in ('sampled', 'greedy'):
    key = f'eval/{name}/accuracy'
    chosen = rows_with(rows, 'eval', key)
    if len(chosen) > 1:
      before = ([row for row in chosen if row['step'] < began] or chosen[:1])[-1]
      low, high = chosen[-1].get(f'{key}_low'), chosen[-1].get(f'{key}_high')
      gain, outcomes = '', [row.get(f'eval/{name}/outcomes') for row in (before, chosen[-1])]
      if all(outcomes):
        mean, low, high = stats.paired_gain(*outcomes)
        gain = f', gain {mean:.3f}'
      interval = '' if low is None or high is None else f'{gain} (95%: {low:.3f} to {high:.3f})'
      texts.append(f'{name} {before[key]:.3f} → {chosen[-1][key]:.3f}{interval}')
  return 'Held-out accuracy: ' + ',  '.join(texts) if texts else ''


def write(workdir: str | pathlib.Path) -> pathlib.Path:
  """Draws curves.png from metrics.jsonl and returns its path.

  Raises:
    UserError: there are no metrics.
  """
  workdir = pathlib.Path(workdir)
  rows = logs.read_rows(workdir / logs.METRICS)
  if not rows:
    raise records.UserError(f'no metrics in {workdir / logs.METRICS}')
  panels, swept = _panels(rows), _swept(rows)
  count = len(panels) + bool(swept)
  columns = 2 if count > 1 else 1
  lines = max(1, -(-count // columns))
  height = 2.9 * lines + 0.7
  figure = matplotlib.figure.Figure(figsize=(6.4 * columns, height), dpi=110)
  axes = list(figure.subplots(lines, columns, squeeze=False).flat)
  for axis, panel in zip(axes, panels, strict=False):
    _draw(axis, panel, rows)
  if swept:
    _draw_budgets(axes[len(panels)], swept)
  for axis in axes[count:]:
    axis.remove()
  figure.text(0.012, 1 - 0.12 / height, workdir.resolve().name, va='top', size=14, weight='bold')
  figure.text(0.012, 1 - 0.43 / height, headline(rows), va='top', size=11)
  figure.tight_layout(rect=(0, 0, 1, 1 - 0.65 / height))
  path = workdir / 'curves.png'
  figure.savefig(path)
  return path


def _swept(rows) -> dict[str, list[dict[str, Any]]]:
  """Method -> the metrics of its settings, as they were evaluated last."""
  swept = {}
  for row in rows:
    found = {name: list(budgets.by_setting(row, name).values()) for name in budgets.BUDGETS}
    swept |= {name: settings for name, settings in found.items() if settings}
  return swept


def _draw_budgets(axis, swept) -> None:
  """Accuracy against tokens of thinking, a line for each swept method."""
  for colour, (name, settings) in zip(itertools.cycle(COLOURS), swept.items(), strict=False):
    settings = sorted(settings, key=lambda found: found['think_length'])
    tokens, accuracy, low, high = (
      [found[key] for found in settings]
      for key in ('think_length', 'accuracy', 'accuracy_low', 'accuracy_high')
    )
    axis.vlines(tokens, low, high, color=colour, lw=1.2)
    axis.plot(tokens, accuracy, 'o-', color=colour, ms=4, lw=1, label=f'{name} (95% interval)')
  axis.set_ylim(-0.02, 1.02)
  axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
  axis.set_title('Accuracy under budgets', loc='left', fontsize=11, pad=16)
  axis.set_xlabel('mean tokens of thinking')
  axis.grid(alpha=0.25)
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(fontsize=8, frameon=False, loc='best')


def _draw(axis, panel, rows) -> None:
  """One panel. It spans the phases that logged its training metrics, and evaluations after them."""
  title, scale, series = panel
  rows = [dict(row) for row in rows]
  drawn = [row for _, which, key, _ in series for row in rows_with(rows, which, key)]
  trained = [row for row in drawn if row['kind'] == 'train'] or drawn
  first, last = (pick(row['step'] for row in trained) for pick in (min, max))
  # An evaluation may come later: of a phase that learns what this one has collected.
  rows = [
    row
    for row in rows
    if first - 1 <= row['step'] and (row['step'] <= last or row['kind'] == 'eval')
  ]
  phases = _phases([row for row in rows if row['kind'] == 'train' and row['step'] >= first])
  if len(phases) == 1:
    before = trained[0]['step'] - trained[0]['phase_step']
    phases = [(name, begin - before, end - before) for name, begin, end in phases]
    for row in rows:
      row['step'] -= before
  for label, which, key, colour in series:
    chosen = rows_with(rows, which, key)
    if which == 'eval':
      _draw_evaluations(axis, chosen, key, label, colour)
    else:
      _draw_training(axis, chosen, key, label, colour)
  if scale == 'log' and any(line.get_ydata().max() > 0 for line in axis.lines):
    axis.set_yscale('log')
  elif scale == 'percent':
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
  elif scale == 'zero':
    axis.set_ylim(bottom=0)
  axis.set_title(title, loc='left', fontsize=11, pad=16)
  axis.set_xlabel(f'step of {phases[0][0]}' if len(phases) == 1 else 'step')
  axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  axis.grid(alpha=0.25)
  axis.spines[['top', 'right']].set_visible(False)
  top = axis.get_xaxis_transform()
  for i, (name, begin, end) in enumerate(phases):
    if i % 2:
      axis.axvspan(begin - 1, end, color='#f0e9d8', alpha=0.6, lw=0, zorder=0)
    if end - begin > (last - first) / 20:  # short ones would overlap
      axis.text(begin, 1.01, name, transform=top, va='bottom', size=8, color=GREY)
  axis.legend(fontsize=8, frameon=False, loc='best')


def _draw_training(axis, rows, key, label, colour) -> None:
  """A line for each phase; a long one is drawn faintly under its moving mean."""
  window = max(1, len(rows) // 40) // 2 * 2 + 1  # odd, so that it has a middle
  label += f' (mean of {window} steps)' if window > 1 else ''
  for _, stretch in itertools.groupby(rows, key=lambda row: row['phase']):
    steps, values = zip(*((row['step'], row[key]) for row in stretch), strict=True)
    if window > 1:
      axis.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
    axis.plot(steps, _smooth(values, window), color=colour, lw=1.6, label=label)
    label = None


def _draw_evaluations(axis, rows, key, label, colour) -> None:
  """Points, with their 95% interval where it was logged."""
  if not rows:
    return
  steps, values = [row['step'] for row in rows], [row[key] for row in rows]
  bounded = [row for row in rows if row.get(f'{key}_low') is not None]
  axis.vlines(
    [row['step'] for row in bounded],
    [row[f'{key}_low'] for row in bounded],
    [row[f'{key}_high'] for row in bounded],
    color=colour,
    lw=1.2,
  )
  label += ' (95% interval)' if bounded else ''
  axis.plot(steps, values, 'o-', color=colour, ms=4, lw=1, label=label, zorder=3)
