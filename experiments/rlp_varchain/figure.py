"""The figure and the tables of RLP on VarChain, from the runs of its sweep.

  python experiments/rlp_varchain/figure.py --runs=runs/rlp --to=experiments/rlp_varchain

Writes into --to:

    evaluations.jsonl  every held-out evaluation of every run, by kind of token
    gain.png           gain of thinking at answers by step; accuracy by hops at the end, with a
                       thought and without; accuracy after SFT and GRPO
    tables.md          the numbers, mean +- half width of the 95 % interval (Student's t over seeds)
"""

import collections
import json
import pathlib

import matplotlib.figure
from absl import flags

from reasonrl import command_line
from reasonrl.experiments import seeds

ARMS = ('base', 'rlp', 'ntp', 'uniform', 'rpt', 'cpt', 'other', 'short', 'swapped')
COLOURS = dict(zip(ARMS, ('#000000', *seeds.COLOURS), strict=False))
HOPS = (1, 2, 3)
KINDS = (*(f'answer_{hops}' for hops in HOPS), 'random', 'markov', 'syntax')
GAIN = 'reward/information_gain'
TRAINED = ('zero_variance_groups', 'token_forwards/total', 'token_forwards/formula')
# column -> metric of an evaluation, its sign
COLUMNS = {
  'gain': (GAIN, 1),
  'marginal gain': (f'{GAIN}/marginal', 1),
  'think CE': (f'{GAIN}/think', -1),
  'no-think CE': (f'{GAIN}/no_think', -1),
  'think accuracy': ('accuracy', 1),
  'no-think accuracy': ('reward/token_match/no_think', 1),
  'useful': ('reward/trace', 1),
  'thought tokens': ('think_length', 1),
}


KEPT = (  # of an evaluation, beside its place in the run
  *(f'eval/sampled/{metric}/class=' for metric, _ in COLUMNS.values()),
  *(f'eval/{mode}/accuracy/hops=' for mode in ('greedy', 'sampled')),
)


def load(folder: pathlib.Path) -> dict[str, dict[str, list[dict]]]:
  """Arm -> seed -> its evaluations, without the outcomes of single problems; '<arm> steps' -> seed
  -> rows of its training."""
  found = collections.defaultdict(dict)
  for name, of_seed in seeds.load(folder).items():
    for seed, rows in of_seed.items():
      steps = [row for row in rows if row['kind'] == 'train' and TRAINED[0] in row]
      if steps and TRAINED[1] in steps[0]:
        found[f'{name} steps'][seed] = steps
      rows = [row for row in rows if row['kind'] == 'eval']
      found[name][seed] = [{k: v for k, v in r.items() if 'outcomes' not in k} for r in rows]
  return found


def trained(runs, arm: str, name: str) -> float:
  """The mean of a training metric over steps and seeds."""
  found = [row[name] for rows in runs[f'{arm} steps'].values() for row in rows]
  return sum(found) / len(found)


def value(row: dict, column: str, kind: str, mode: str = 'sampled'):
  metric, sign = COLUMNS[column]
  found = row.get(f'eval/{mode}/{metric}/class={kind}')
  return None if found is None else sign * found


def across(of_seed: dict[str, list[dict]], which: int, column: str, kind: str):
  """(mean, half width) over the seeds of the evaluation `which`; None where one has no such."""
  values = [value(rows[which], column, kind) for rows in of_seed.values()]
  return None if None in values or not values else seeds.interval(values)


def gains(of_seed) -> tuple[list[int], list[float]]:
  """Steps of the arm and the mean gain at answers behind two and three hops."""
  at = collections.defaultdict(list)
  for rows in of_seed.values():
    for row in rows:
      pair = [value(row, 'gain', f'answer_{hops}') for hops in (2, 3)]
      at[row['phase_step']].append(sum(pair) / 2)
  return sorted(at), [sum(at[step]) / len(at[step]) for step in sorted(at)]


def draw(runs, path: pathlib.Path) -> None:
  figure = matplotlib.figure.Figure(figsize=(17, 4.4), dpi=110)
  left, middle, right = figure.subplots(1, 3)
  before = sum(across(runs['base'], -1, 'gain', f'answer_{hops}')[0] for hops in (2, 3)) / 2
  for arm in ('rlp', 'ntp', 'uniform', 'rpt', 'cpt', 'other', 'short'):
    steps, means = gains(runs[arm])
    if steps[0] > 0:
      steps, means = [0, *steps], [before, *means]
    left.plot(steps, means, 'o-', ms=3, lw=1.5, color=COLOURS[arm], label=arm)
  left.axhline(0, color='#999999', lw=0.8)
  left.set_title('Gain of thinking at answers, 2 and 3 hops (nats)', loc='left', fontsize=11)
  left.set_xlabel('step')
  left.legend(fontsize=9, frameon=False)
  shown = ('base', 'cpt', 'rlp', 'ntp', 'uniform', 'rpt')
  for n, arm in enumerate(shown):
    for column, style in (('think accuracy', '-'), ('no-think accuracy', ':')):
      pairs = [across(runs[arm], -1, column, f'answer_{hops}') for hops in HOPS]
      label = arm if style == '-' else None
      at = [hops + 0.04 * (n - len(shown) / 2) for hops in HOPS]
      means, bars = zip(*pairs, strict=True)
      look = {'fmt': f'o{style}', 'ms': 3, 'lw': 1.2, 'capsize': 2, 'color': COLOURS[arm]}
      middle.errorbar(at, means, bars, label=label, **look)
  middle.set_title('Accuracy at answers; dotted: without a thought', loc='left', fontsize=11)
  for n, start in enumerate(('base', 'cpt', 'rlp')):
    pairs = [after(runs[f'post_{start}'], hops) for hops in HOPS]
    at = [hops + 0.05 * (n - 1) for hops in HOPS]
    means, bars = zip(*pairs, strict=True)
    look = {'fmt': 'o-', 'ms': 4, 'lw': 1.2, 'capsize': 2, 'color': COLOURS[start]}
    right.errorbar(at, means, bars, label=f'on {start}', **look)
  right.set_title('Questions after SFT and GRPO, greedy', loc='left', fontsize=11)
  right.legend(fontsize=9, frameon=False)
  for axis in (middle, right):
    axis.set_xlabel('hops')
    axis.set_xticks(HOPS)
    axis.set_ylim(-0.02, 1.04)
  middle.legend(fontsize=8, frameon=False)
  for axis in (left, middle, right):
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(path)


def after(of_seed, hops: int, phase: str = 'rl', mode: str = 'greedy'):
  """Accuracy at the end of a phase of post-training."""
  last = [[r for r in rows if r['phase'] == phase][-1] for rows in of_seed.values()]
  return seeds.interval([row[f'eval/{mode}/accuracy/hops={hops}'] for row in last])


def text(pair) -> str:
  return '' if pair is None else f'{pair[0]:.3f} ± {pair[1]:.3f}'


def tables(runs) -> str:
  """Markdown: every arm by kind of token; what comes after."""
  lines = []
  for kind in KINDS:
    lines += [
      f'\n### {kind}\n',
      '| | ' + ' | '.join(COLUMNS) + ' |',
      '|---|' + '---|' * len(COLUMNS),
    ]
    for arm in ARMS:
      cells = [text(across(runs[arm], -1, column, kind)) for column in COLUMNS]
      lines.append(f'| {arm} | ' + ' | '.join(cells) + ' |')
  lines += ['\n### while training, mean over the steps\n']
  lines += ['| | groups without signal | model tokens of a step | / formula |', '|---|---|---|---|']
  for arm in ('rlp', 'ntp', 'uniform', 'rpt', 'other', 'short'):
    cells = [f'{x:.3g}' for x in (trained(runs, arm, name) for name in TRAINED)]
    lines.append(f'| {arm} | {cells[0]} | {cells[1]} | {float(cells[1]) / float(cells[2]):.2f} |')
  lines += ['\n### questions, greedy accuracy\n', '| on | after | 1 hop | 2 hops | 3 hops |']
  lines.append('|---|---|---|---|---|')
  for start in ('base', 'cpt', 'rlp'):
    for phase, name in (('sft', 'SFT'), ('rl', 'SFT, GRPO')):
      cells = [text(after(runs[f'post_{start}'], hops, phase)) for hops in HOPS]
      lines.append(f'| {start} | {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines).lstrip() + '\n'


def main(_) -> None:
  runs, to = load(pathlib.Path(flags.FLAGS.runs)), pathlib.Path(flags.FLAGS.to)
  with open(to / 'evaluations.jsonl', 'w', encoding='utf-8') as file:
    for name, of_seed in sorted(runs.items()):
      if name.endswith(' steps'):
        continue
      for seed, rows in of_seed.items():
        for row in rows:
          kept = {k: v for k, v in row.items() if k.startswith(KEPT) or not k.startswith('eval/')}
          file.write(json.dumps({'run': f'{name}-{seed}', **kept}) + '\n')
  draw(runs, to / 'gain.png')
  (to / 'tables.md').write_text(tables(runs), encoding='utf-8')
  print(tables(runs))


if __name__ == '__main__':
  flags.DEFINE_string('runs', '', 'Folder of the runs.')
  flags.DEFINE_string('to', '', 'Folder to write to.')
  command_line.guarded(main, flags.FLAGS, '')
