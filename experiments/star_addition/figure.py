"""The figures and tables of the STaR experiment, from the runs of its sweep.

  python experiments/star_addition/figure.py --runs=runs/star_addition \
    --to=experiments/star_addition

Writes into --to:

    iterations.jsonl  every run: held-out accuracy and what was kept and sampled, by iteration
    digits.png        held-out greedy accuracy by digits against the iteration, a panel for each arm
    tokens.png        held-out greedy accuracy of all lengths against sampled tokens, with GRPO
    tables.md         accuracies at the end, what was kept, cost

Thick lines are means over the seeds, thin ones the seeds; +- is the 95 % interval of the mean
(Student's t).
"""

import collections
import itertools
import json
import math
import pathlib

import matplotlib.figure
from absl import flags

from reasonrl import command_line, logs
from reasonrl.experiments import seeds

ARMS = {
  'rationalize': 'STaR with rationalisation',
  'plain': 'STaR without',
  'control': 'control: the corpus of the base',
  'pseudo': 'control: hints are pseudo-sums',
  'continue': 'rationalisation, no restart',
  'hot': 'without, sampled at T = .7',
  'grpo': 'GRPO',
}
BY = 'eval/greedy/accuracy/digits='
OVERALL = 'eval/greedy/accuracy'
PAPER = 0.895  # all lengths, after 16 iterations of GPT-J with rationalisation


def iterations(folder: pathlib.Path) -> list[dict]:
  """What a run had reached after each iteration of its loop (GRPO: at each evaluation)."""
  out, spent = [], collections.Counter()
  for row in logs.read_rows(folder / logs.METRICS):
    if row['phase'] == 'pretrain' and row['kind'] == 'train':
      continue
    if row['kind'] == 'train':
      spent['seconds'] += row['timing/step_s']
      spent['trained_tokens'] += row.get('tokens', 0)
      for name in ('problems', 'solved', 'rationalized', 'kept', 'samples', 'sampled_tokens'):
        spent[name] += row.get(f'collect/{name}', 0)
      if row['phase'] == 'rl':
        spent['samples'] += row['completions']
        spent['sampled_tokens'] += row['completions'] * row['completion_length']
      continue
    accuracy = {key.removeprefix(BY): value for key, value in row.items() if key.startswith(BY)}
    out.append({'accuracy': row[OVERALL], 'digits': accuracy, **spent})
  return out


def traces(folder: pathlib.Path) -> dict[str, float]:
  """Of what was kept in all iterations: the share of right scratchpads, without and with a hint."""
  found = collections.defaultdict(list)
  for path in sorted((folder / 'datasets').glob('*.jsonl')):
    for row in logs.read_rows(path):
      found['hinted' if row['hinted'] else 'plain'].append(row['parts']['addition/trace'])
  return {name: sum(values) / len(values) for name, values in found.items()}


def load(runs: pathlib.Path) -> dict[str, list[dict]]:
  """Arm -> a run for each seed that got as far as the others of the arm."""
  found = {}
  for arm in ARMS:
    folders = sorted(runs.glob(f'{arm}-[0-9]'))
    found[arm] = [
      {'arm': arm, 'seed': int(f.name[-1]), 'iterations': iterations(f), 'traces': traces(f)}
      for f in folders
    ]
  for arm, runs_of in found.items():
    most = max((len(run['iterations']) for run in runs_of), default=0)
    found[arm] = [run for run in runs_of if len(run['iterations']) == most]
    for run in runs_of:
      if run not in found[arm]:
        print(f'left out: {arm}-{run["seed"]}, which is not finished')
  return {arm: of_seeds for arm, of_seeds in found.items() if of_seeds}


def lines(axis, xs, values, **style) -> None:
  """The runs and their mean; `values`: a list for each run."""
  for each in values:
    axis.plot(xs, each, color=style['color'], lw=0.6, alpha=0.5)
  axis.plot(xs, [sum(each) / len(each) for each in zip(*values, strict=True)], **style)


def plain_axis(axis, title, x) -> None:
  axis.set_title(title, loc='left', fontsize=11)
  axis.set_xlabel(x)
  axis.set_ylim(-0.02, 1.02)
  axis.grid(alpha=0.25)
  axis.spines[['top', 'right']].set_visible(False)


def draw_digits(found, path) -> None:
  arms = [arm for arm in found if arm != 'grpo']
  columns = 3
  high = -(-len(arms) // columns)
  figure = matplotlib.figure.Figure(figsize=(4.3 * columns, 3.6 * high), dpi=110)
  axes = list(figure.subplots(high, columns, squeeze=False).flat)
  for axis, arm in zip(axes, arms, strict=False):
    runs = found[arm]
    xs = range(len(runs[0]['iterations']))
    for digits, colour in zip(runs[0]['iterations'][0]['digits'], seeds.COLOURS, strict=False):
      values = [[each['digits'][digits] for each in run['iterations']] for run in runs]
      lines(
        axis,
        xs,
        values,
        color=colour,
        marker='o',
        ms=3,
        lw=1.8,
        label=f'{digits} digit{"s" * (digits != "1")}',
      )
    overall = [[each['accuracy'] for each in run['iterations']] for run in runs]
    lines(axis, xs, overall, color='black', ls='--', lw=1.5, label='all problems')
    plain_axis(axis, ARMS[arm], 'iteration (0: the base)')
  for axis in axes[len(arms) :]:
    axis.remove()
  axes[0].legend(fontsize=8, frameon=False)
  figure.tight_layout()
  figure.savefig(path)


def draw_tokens(found, path) -> None:
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), dpi=110)
  axis = figure.subplots()
  arms = [arm for arm in ('rationalize', 'plain', 'grpo') if arm in found]
  for arm, colour in zip(arms, itertools.cycle(seeds.COLOURS), strict=False):
    runs = found[arm]
    tokens = [[each.get('sampled_tokens', 0) / 1e6 for each in run['iterations']] for run in runs]
    xs = [sum(each) / len(each) for each in zip(*tokens, strict=True)]
    values = [[each['accuracy'] for each in run['iterations']] for run in runs]
    lines(axis, xs, values, color=colour, marker='o', ms=3, lw=1.8, label=ARMS[arm])
  axis.axhline(PAPER, color='grey', lw=1, ls=':')
  axis.text(0, PAPER, ' the paper: GPT-J, 16 iterations', va='bottom', fontsize=8, color='grey')
  plain_axis(axis, 'Held-out greedy accuracy, 1 to 5 digits', 'sampled tokens (millions)')
  axis.legend(fontsize=9, frameon=False)
  figure.tight_layout()
  figure.savefig(path)


def cell(values, digits=3) -> str:
  mean, half = seeds.interval(values)
  return f'{mean:.{digits}f}' + ('' if math.isnan(half) else f' ± {half:.{digits}f}')


def average(run) -> float:
  """Mean accuracy over the iterations: how early, and how far."""
  values = [each['accuracy'] for each in run['iterations'][1:]]
  return sum(values) / len(values)


def tables(found) -> str:
  """Markdown: accuracy at the end; what was kept; what it cost."""
  digits = list(next(iter(found.values()))[0]['iterations'][0]['digits'])
  titles = [f'{d} digit{"s" * (d != "1")}' for d in digits]
  text = ['| arm | seeds | all | all, mean of the iterations | ' + ' | '.join(titles) + ' |']
  text.append('|' + '---|' * (4 + len(digits)))
  base = [run['iterations'][0] for run in next(iter(found.values()))]
  ends = {arm: [run['iterations'][-1] for run in runs] for arm, runs in found.items()}
  for name, each in {'base': base, **{ARMS[arm]: end for arm, end in ends.items()}}.items():
    arm = next((arm for arm in found if ARMS[arm] == name), None)
    cells = [cell([end['accuracy'] for end in each])]
    cells += [cell([average(run) for run in found[arm]])] if arm else ['']
    cells += [cell([end['digits'][d] for end in each]) for d in digits]
    text.append(f'| {name} | {len(each)} | ' + ' | '.join(cells) + ' |')

  text += ['', 'The same seed with rationalisation, less that arm (mean of the iterations):', '']
  best = {run['seed']: average(run) for run in found.get('rationalize', ())}
  for arm, runs in found.items():
    gains = [best[run['seed']] - average(run) for run in runs if run['seed'] in best]
    if arm != 'rationalize' and gains:
      each = ', '.join(f'{gain:+.3f}' for gain in gains)
      text.append(f'- {ARMS[arm]}: {cell(gains)} ({each})')

  text += [
    '',
    '| arm | problems kept, first → last iteration | right scratchpads: plain, hinted |',
  ]
  text.append('|' + '---|' * 3)
  for arm, runs in found.items():
    if not runs[0]['iterations'][-1].get('kept'):
      continue

    def share(run, which):
      after, before = run['iterations'][which], run['iterations'][which - 1]
      got = sum(after[n] - before.get(n, 0) for n in ('solved', 'rationalized'))
      return got / (after['problems'] - before.get('problems', 0))

    kept = ' → '.join(cell([share(run, which) for run in runs]) for which in (1, -1))
    right = [[run['traces'][n] for run in runs if n in run['traces']] for n in ('plain', 'hinted')]
    text.append(f'| {ARMS[arm]} | {kept} | ' + ', '.join(cell(r) for r in right if r) + ' |')

  names = ('samples', 'sampled_tokens', 'trained_tokens')
  text += ['', '| arm | samples | sampled tokens | trained tokens | minutes |', '|' + '---|' * 5]
  for arm, runs in found.items():
    ends = [run['iterations'][-1] for run in runs]
    mean = lambda name, ends=ends: sum(end.get(name, 0) for end in ends) / len(ends)
    cells = [f'{mean(name):,.0f}' for name in names]
    text.append(f'| {ARMS[arm]} | ' + ' | '.join(cells) + f' | {mean("seconds") / 60:.1f} |')
  return '\n'.join(text) + '\n'


def main(_) -> None:
  found, to = load(pathlib.Path(flags.FLAGS.runs)), pathlib.Path(flags.FLAGS.to)
  with open(to / 'iterations.jsonl', 'w', encoding='utf-8') as out:
    for run in itertools.chain(*found.values()):
      out.write(json.dumps(run) + '\n')
  draw_digits(found, to / 'digits.png')
  draw_tokens(found, to / 'tokens.png')
  (to / 'tables.md').write_text(tables(found), encoding='utf-8')
  print(tables(found))


if __name__ == '__main__':
  flags.DEFINE_string('runs', '', 'Folder of the runs.')
  flags.DEFINE_string('to', '', 'Folder to write to.')
  command_line.guarded(main, flags.FLAGS, '')
