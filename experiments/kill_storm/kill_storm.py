"""Kills runs at random moments and compares each with a run that nobody disturbed.

  python experiments/kill_storm/kill_storm.py --kills=20

1. For each layout of 8 virtual CPU devices two runs go through undisturbed: pretraining and
   reinforcement with a reference, two minibatches, evaluations, and a checkpoint every 3 steps.
2. `kills` runs on one device, and one run on each other layout, are sent SIGKILL (three of four) or
   SIGTERM at a moment drawn uniformly over the time that an undisturbed run takes, then started
   again with the same command, to the end. Every fifth run compiles anew at each start, the others
   find what was compiled before, as a user's do.
3. Final parameters of both phases, metrics.jsonl outside timing/ and rollouts.jsonl must be equal,
   bit for bit. results.json has a row per kill: what the run was doing, and what differs.

Exit code 1 if anything differs.
"""

import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging

from reasonrl import checkpoint, sharding

_KILLS = flags.DEFINE_integer('kills', 20, 'Killed runs on one device.')
_TO = flags.DEFINE_string('to', 'runs/kill_storm', 'Folder of the runs and of results.json, new.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments.')

LAYOUTS = ('1x1x1', '8x1x1', '2x2x2')  # data x fsdp x tensor
FIELDS = """
 pretrain.steps=30 pretrain.examples_per_step=16 pretrain.eval_every=10
 rl.steps=12 rl.prompts_per_step=8 rl.env.num_generations=4 rl.eval_every=4
 rl.algorithm.num_minibatches=2 rl.algorithm.beta=0.01 evaluation.num_examples=64
 checkpoint.save_every=3 log.every=1 log.transcripts_every=1
""".split()


def start(workdir: pathlib.Path, layout: str, cache: str) -> subprocess.Popen:
  """A run on 8 virtual devices, of which the layout uses some; what it prints goes to a log."""
  mesh = zip(('data', 'fsdp', 'tensor'), layout.split('x'), strict=True)
  changes = [f'--config.{field}' for field in FIELDS]
  changes += [f'--config.mesh.{axis}={size}' for axis, size in mesh]
  changes += [f'--config.compilation_cache={cache}']
  env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_COMPILATION_CACHE')}
  env |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  command = [sys.executable, '-m', 'reasonrl.main', '--config=configs/r1_zero.py']
  with open(f'{workdir}.log', 'a') as log:
    return subprocess.Popen(
      [*command, f'--workdir={workdir}', *changes], stdout=log, stderr=subprocess.STDOUT, env=env
    )


def finish(workdir: pathlib.Path, layout: str, cache: str) -> float:
  """Runs to the end; the seconds that took."""
  begin = time.monotonic()
  if start(workdir, layout, cache).wait(timeout=900):
    raise RuntimeError(f'{workdir} failed: see {workdir}.log')
  return time.monotonic() - begin


def doing(workdir: pathlib.Path) -> str:
  """What the run was at, by its last words and the files under way."""
  lines = pathlib.Path(f'{workdir}.log').read_text().split('\n')
  phases = [x.partition(':')[0] for x in lines if re.match(r'\w+: (supervised|reinforce),', x)]
  acts = [m[1] for m in (re.match(r'(\w+( \w+)?) \.\.\.|\w+ \d+/\d+ ', x) for x in lines) if m]
  saving = [p for p in workdir.glob('*/*') if 'orbax-checkpoint-tmp' in p.name]
  act = 'saving' if saving else (acts or ['starting'])[-1] or 'stepping'
  return ' '.join([*phases[-1:], act])


def plain_rows(workdir: pathlib.Path) -> list[dict]:
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if not k.startswith('timing/')} for row in rows]


def parameters(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Path -> array of a tree of parameters, whatever devices saved it."""
  leaves = jax.tree_util.tree_leaves_with_path(checkpoint.load_params(folder, None))
  return {sharding.path_of(path): np.asarray(leaf) for path, leaf in leaves}


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
  """What of two finished runs is not the same."""
  found = []
  if plain_rows(one) != plain_rows(other):
    found.append('metrics.jsonl')
  if (one / 'rollouts.jsonl').read_bytes() != (other / 'rollouts.jsonl').read_bytes():
    found.append('rollouts.jsonl')
  for phase in ('pretrain', 'rl'):
    a, b = (parameters(run / 'phases' / phase) for run in (one, other))
    if a.keys() != b.keys():
      found.append(f'{phase}: names')
    found += [f'{phase}: {path}' for path in a if not np.array_equal(a[path], b[path])]
  return found


def main(_) -> int:
  logging.set_verbosity(logging.WARNING)
  to, draw = pathlib.Path(_TO.value), random.Random(_SEED.value)
  to.mkdir(parents=True)
  rows = []
  for layout in LAYOUTS:
    whole, kept = to / f'{layout}-whole', str(to.absolute() / 'cache')
    times = {'': finish(whole, layout, kept), kept: finish(to / f'{layout}-again', layout, kept)}
    told = f'{times[""]:.0f} s undisturbed, {times[kept]:.0f} s from the cache'
    print(f'{layout}: {told}', flush=True)
    if found := differences(whole, to / f'{layout}-again'):
      raise RuntimeError(f'two undisturbed runs differ in {found}')
    left = _KILLS.value if layout == LAYOUTS[0] else 1
    for number in itertools.count():
      if not left:
        break
      run = to / f'{layout}-{number:02}'
      cache = kept if number % 5 else ''
      moment, kind = draw.uniform(0, times[cache]), signal.SIGKILL
      if number % 4 == 3:
        kind = signal.SIGTERM
      process = start(run, layout, cache)
      time.sleep(moment)
      process.send_signal(kind)  # to one that has ended: nothing
      at, code = doing(run), process.wait(timeout=120)
      if code == 0:  # the machine has become faster: that was no kill
        times[cache] = min(times[cache], moment)
        continue
      left -= 1
      finish(run, layout, cache)
      row = {'layout': layout, 'run': run.name, 'signal': kind.name, 'after_s': round(moment, 1)}
      row['compiles'] = not cache
      rows.append(row | {'at': at, 'exit_code': code, 'differs': differences(whole, run)})
      print(json.dumps(rows[-1]), flush=True)
      (to / 'results.json').write_text(json.dumps(rows, indent=1) + '\n')
  same = sum(not row['differs'] for row in rows)
  print(f'{same} of {len(rows)} identical')
  return int(same < len(rows))


if __name__ == '__main__':
  app.run(main)
