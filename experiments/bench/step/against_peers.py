"""A step of GRPO against TRL's GRPOTrainer and google-tunix's GRPOLearner, on SmolLM2-135M.

  python -m venv .venv-trl;   .venv-trl/bin/pip install torch transformers trl
  python -m venv .venv-tunix; .venv-tunix/bin/pip install google-tunix      # Python 3.12
  python experiments/bench/step/against_peers.py

Prompts of 64 tokens, completions of 64, temperature 1, KL against a reference with beta .04, AdamW,
one update per step. Beside TRL: 8 prompts with 8 completions each. Beside tunix, which needs more
memory: 2 with 4. All in both dtypes; in bfloat16 the peers' weights are bfloat16 too, of ours only
the products. The engines take turns, each in a process of its own with large pages of memory; the
first step of a turn, which compiles, is left out.

Writes against_peers.json and the table against_peers.md beside this file: median seconds of a step
and its parts, and how many times as fast ours is as the faster form of the peer, the median over
the turns.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags, logging

from reasonrl.experiments import processor, smollm2

HERE = pathlib.Path(__file__).parent
WORKDIR = flags.DEFINE_string('workdir', 'runs/bench_step', 'Where the weights are written.')
PEERS = flags.DEFINE_string('peers', '.', 'Folder with the environments .venv-*.')
REPEATS = flags.DEFINE_integer('repeats', 3, 'Turns.')
STEPS = flags.DEFINE_integer('steps', 3, 'Of each turn.', lower_bound=2)
HALF = flags.DEFINE_bool('bfloat16', True, 'False: float32 alone, on CPUs without such products.')

# peer -> (environment, script, prompts, completions of each)
PEER = {
  'TRL': ('.venv-trl', 'trl_grpo.py', 8, 8),
  'tunix': ('.venv-tunix', 'tunix_grpo.py', 2, 4),
}
PARTS = ('sample', 'score', 'update', 'step')


def run(python: str, script: str, folder: pathlib.Path, *args) -> list[dict[str, float]]:
  """Seconds of the parts of every step but the first."""
  command = [python, HERE / 'engines' / script, folder, *map(str, args)]
  done = subprocess.run(command, capture_output=True, text=True, env=processor.environment())
  if done.returncode:
    raise RuntimeError(f'{script} ended with {done.returncode}:\n{done.stderr[-3000:]}')
  lines = [line for line in done.stdout.splitlines() if line.startswith('STEP ')]
  return [json.loads(line.removeprefix('STEP ')) for line in lines][1:]


def table(result: dict) -> str:
  lines = ['| | sequences | ' + ' | '.join(PARTS) + ' | times as fast |', '|---' * 7 + '|']
  for peer, sides in result['seconds'].items():
    prompts, samples = PEER[peer][2:]
    step = {
      side: np.asarray([np.median([s['step'] for s in t]) for t in sides[side]]) for side in sides
    }
    best = np.min([seconds for side, seconds in step.items() if side.startswith(peer)], axis=0)
    for side, turns in sides.items():
      steps = [s for turn in turns for s in turn]
      spent = [[s[part] for s in steps if part in s] for part in PARTS]
      cells = [f'{np.median(seconds):.1f}' if seconds else '' for seconds in spent]
      last = f'{np.median(best / step[side]):.1f}' if side.startswith('ours') else ''
      lines.append(f'| {side} | {prompts} x {samples} | ' + ' | '.join([*cells, last]) + ' |')
  left = f'\nLeft out: {"; ".join(result["left_out"])}.\n' if result['left_out'] else ''
  about = f'{result["processor"]}; {result["turns"]} turns.\n\n'
  return about + '\n'.join(lines) + '\n' + left


def main(_) -> None:
  folder = pathlib.Path(WORKDIR.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  smollm2.write(folder)
  rows = [{'problem': text, 'answer': ''} for text in smollm2.texts(24, 64)]
  (folder / 'prompts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  result = {'processor': processor.name(), 'turns': 0, 'seconds': {}, 'left_out': []}
  dtypes = ('bfloat16', 'float32') if HALF.value else ('float32',)
  for turn in range(REPEATS.value):
    for peer, (environment, script, prompts, samples) in PEER.items():
      python = pathlib.Path(PEERS.value) / environment / 'bin/python'
      if not python.exists():
        result['left_out'] += [f'{peer} (no {python})'] if not turn else []
        continue
      sizes = prompts, samples, STEPS.value
      calls = {f'ours, {d}': (sys.executable, 'ours.py', folder, *sizes, d) for d in dtypes}
      calls |= {f'{peer}, {d}': (str(python), script, folder, *sizes, d) for d in dtypes}
      for side, call in calls.items():
        steps = run(*call)
        result['seconds'].setdefault(peer, {}).setdefault(side, []).append(steps)
        logging.info('%s x %s, %s: %s', prompts, samples, side, steps)
    result['turns'] = turn + 1
    if result['seconds']:
      (HERE / 'against_peers.json').write_text(json.dumps(result, indent=1) + '\n')
      (HERE / 'against_peers.md').write_text(table(result))
  print(table(result))


if __name__ == '__main__':
  app.run(main)
