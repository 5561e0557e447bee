"""One run on two processes, each with two CPU devices: the curve of one process with four."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from reasonrl import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
# Two passes need the old log-probabilities and a KL term the reference's, so scoring runs too. Five
# evaluation rows a wave are not a multiple of anything. Adam's large eps: with the usual one a
# gradient that is rounding alone moves a parameter as far as any other.
FIELDS = """
 pretrain.steps=4 pretrain.examples_per_step=16 rl.steps=4 rl.prompts_per_step=4
 rl.env.num_generations=4 rl.eval_every=2 rl.algorithm.num_iterations=2 rl.algorithm.beta=0.01
 pretrain.optim.eps=1e-2 rl.optim.eps=1e-2
 evaluation.num_examples=26 evaluation.env.slots=5 checkpoint.save_every=100 log.every=1
""".split()


COLLECTING = """
from reasonrl.configs import common, r1_zero

def get_config(arg=''):
  config = r1_zero.get_config('').unlock()
  config.phases = ('pretrain', ('collect', 'sft', 2))
  config.tokenizer.byte_fallback = True  # the hint needs a space
  config.prompt.max_length = 48
  config.pretrain.update({'steps': 60, 'examples_per_step': 32})
  config.collect = common.collect('star')
  config.collect.update({'steps': 2, 'prompts_per_step': 16})
  config.collect.env.update({'max_completion_length': 24, 'temperature': 1.0, 'slots': 8})
  config.sft = common.supervised(learning_rate=1e-3)
  config.sft.update({'init': 'pretrain', 'steps': 2, 'examples_per_step': 8, 'row_length': 80})
  config.sft.task = common.collected('collect')
  config.evaluation.num_examples = 16
  config.evaluation.env.max_completion_length = 24
  config.evaluation.budgets = common.budgets('rejection')
  config.evaluation.budgets.rejection.update(numbers=(1, 3), retries=2)
  config.log.every = 100
  return config.lock()
"""


def start(workdir, devices, *flags, config='configs/r1_zero.py', fields=FIELDS):
  virtual = f'--xla_force_host_platform_device_count={devices}'
  kept = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  command = [sys.executable, '-m', 'reasonrl.main', f'--workdir={workdir}']
  command += [f'--config={config}', *(f'--config.{field}' for field in fields), *flags]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': f'{kept} {virtual}'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def start_pair(workdir, *flags, **given):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  hosts = ('--distributed', f'--coordinator=127.0.0.1:{port}', '--num_processes=2')
  return [start(workdir, 2, *hosts, f'--process_id={i}', *flags, **given) for i in range(2)]


def finish(processes, code=0):
  out = [process.communicate(timeout=240)[0].decode() for process in processes]
  assert [process.returncode for process in processes] == [code] * len(out), '\n'.join(out)
  return out


def rows(workdir):
  path = workdir / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def params(workdir, phase):
  return checkpoint.load_params(workdir / 'phases' / phase, None)


def test_two_processes_train_as_one_and_stop_together(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish([start(one, 4)])
  pair = start_pair(two)
  while not any(row['phase'] == 'rl' and row['kind'] == 'train' for row in rows(two)):
    if pair[0].poll() is not None or pair[1].poll() is not None:
      break
    time.sleep(0.01)
  pair[1].send_signal(signal.SIGTERM)  # to one of them: both save and leave
  leader, other = finish(pair, 128 + signal.SIGTERM)
  assert 'goes on from here' in leader and 'goes on from here' not in other
  finish(start_pair(two))

  assert_same_rows(rows(one), rows(two))
  for phase in ('pretrain', 'rl'):
    both = zip(*(jax.tree.leaves(params(run, phase)) for run in (one, two)), strict=True)
    assert all(np.allclose(x, y, atol=1e-4) for x, y in both)


def assert_same_rows(want, got):
  assert [(r['kind'], r['phase'], r['phase_step']) for r in got] == [
    (r['kind'], r['phase'], r['phase_step']) for r in want
  ]
  for a, b in zip(want, got, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      if name.startswith('timing/') or name in ('kind', 'phase') or a[name] is b[name] is None:
        continue
      # Placement and packing change rounding alone, which in so short a run changes no draw.
      assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), (name, a['phase'], a['step'])
    if a['kind'] == 'train':
      assert b['timing/tokens'] == a['timing/tokens']


THINKING = """
 pretrain.steps=20 pretrain.optim.eps=1e-2 rlp.steps=2 rlp.prompts_per_step=8 rlp.optim.eps=1e-2
 rlp.env.num_generations=4 rlp.ntp_coef=0.3 rlp.algorithm.num_iterations=2
 rlp.algorithm.baseline=batch_mean evaluation.num_examples=16 evaluation.env.num_generations=2
""".split()


@pytest.mark.slow
def test_two_processes_think_as_one(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  given = {'config': 'configs/rlp.py:debug', 'fields': THINKING}
  finish([start(one, 4, **given)])
  finish(start_pair(two, **given))
  assert_same_rows(rows(one), rows(two))
  for phase in ('rlp', 'rlp-ema'):
    both = zip(*(jax.tree.leaves(params(run, phase)) for run in (one, two)), strict=True)
    assert all(np.allclose(x, y, atol=1e-4) for x, y in both)


@pytest.mark.slow
def test_two_processes_collect_as_one(tmp_path):
  config, one, two = tmp_path / 'collecting.py', tmp_path / 'one', tmp_path / 'two'
  config.write_text(COLLECTING)
  finish([start(one, 4, config=config, fields=())])
  finish(start_pair(two, config=config, fields=()))
  first, second = (
    [json.loads(line) for line in (run / 'datasets' / 'collect-0.jsonl').read_text().splitlines()]
    for run in (one, two)
  )
  assert first == second and {row['hinted'] for row in first} == {False, True}
  assert {row['prompt'] % 2 for row in first} == {0, 1}  # of both processes, in order
  counts = [
    [
      {name: value for name, value in row.items() if name.startswith('collect/')}
      for row in rows(run)
      if row['phase'] == 'collect' and row['kind'] == 'train'
    ]
    for run in (one, two)
  ]
  assert counts[0][:2] == counts[1][:2] and len(counts[0]) == 4
  swept = [
    {name: value for row in rows(run) for name, value in row.items() if 'eval/rejection/' in name}
    for run in (one, two)
  ]
  assert 0 < swept[0]['eval/rejection/1/failed'] < 1  # what is sampled again is of both processes
  assert swept[1] == pytest.approx(swept[0], rel=1e-3, abs=1e-4)
  both = zip(*(jax.tree.leaves(params(run, 'sft-0')) for run in (one, two)), strict=True)
  assert all(np.allclose(x, y, atol=1e-3) for x, y in both)


def test_a_mesh_that_splits_a_row_over_processes_is_refused(tmp_path):
  pair = start_pair(tmp_path / 'run', '--config.mesh.data=1', '--config.mesh.tensor=-1')
  for out in finish(pair, 2):
    assert 'tensor must divide the devices of a process (2)' in out
