"""The evaluation door: a run's own config and parameters, other weights, and what it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from reasonrl.configs import saved

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = """
 pretrain.steps=2 pretrain.examples_per_step=16 rl.steps=1 rl.prompts_per_step=2
 rl.env.num_generations=2 rl.eval_every=0 evaluation.num_examples=8 mesh.data=1
""".split()


def call(program, cwd, *flags):
  return subprocess.run(
    [sys.executable, '-m', f'reasonrl.{program}', *flags],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'COLUMNS': '100'},
    capture_output=True,
    text=True,
  )


def rows(workdir, kind='eval'):
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [row for row in found if row['kind'] == kind]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  flags = ['--config=configs/r1_zero.py', *(f'--config.{field}' for field in FIELDS)]
  done = call('main', folder, *flags, '--workdir=first')
  assert done.returncode == 0, done.stderr
  return folder / 'first'


def test_a_run_is_evaluated_as_it_was_in_training(run):
  more = '--config.evaluation.env.num_generations=4'
  done = call('evaluate', run.parent, '--workdir=first', '--to=again', more)
  assert done.returncode == 0, done.stderr
  (row,), trained = rows(run.parent / 'again'), rows(run)[-1]
  assert row['eval/greedy/outcomes'] == trained['eval/greedy/outcomes']
  assert {'eval/sampled/pass@4', 'eval/sampled/majority@4'} <= row.keys()
  assert row['eval/sampled/pass@2'] <= row['eval/sampled/pass@4']
  for text in ('pass@1', 'majority@4', 'reward/accuracy/lenient', 'all of it: again'):
    assert text in done.stdout, text
  assert (run.parent / 'again' / 'rollouts.jsonl').stat().st_size


def test_an_earlier_phase_and_given_weights_are_the_same(run):
  first = call('evaluate', run.parent, '--workdir=first', '--phase=pretrain', '--to=one')
  assert first.returncode == 0, first.stderr
  assert (
    rows(run.parent / 'one')[0]['eval/sampled/outcomes']
    == ([row for row in rows(run) if row['phase'] == 'pretrain'][-1]['eval/sampled/outcomes'])
  )
  config = '--config=configs/saved.py:first'
  second = call('evaluate', run.parent, config, '--model=first/phases/pretrain', '--to=two')
  assert second.returncode == 0, second.stderr
  one, two = (rows(run.parent / name)[0] for name in ('one', 'two'))
  assert {k: v for k, v in one.items() if 'timing' not in k} == {
    k: v for k, v in two.items() if 'timing' not in k
  }


def test_a_sweep_of_budgets(run):
  sweeps = ('--sweep=max_think=1,3', '--sweep=rejection=2', '--sweep=ignores=0')
  add = '--config.evaluation.num_examples=16'
  done = call('evaluate', run.parent, '--workdir=first', '--to=swept', add, *sweeps)
  assert done.returncode == 0, done.stderr
  (row,) = rows(run.parent / 'swept')
  for n in (1, 3):
    assert row[f'eval/max_think/{n}/think_length'] <= n and row[f'eval/max_think/{n}/within'] == 1
  assert row['eval/max_think/control'] == 1.0
  assert row['eval/rejection/2/failed'] == 1 - row['eval/rejection/2/within']
  shown = [json.loads(line) for line in (run.parent / 'swept/rollouts.jsonl').open()]
  modes = [row['mode'] for row in shown]
  assert modes[-4:] == ['ignores=0', 'max_think=1', 'max_think=3', 'rejection=2']
  for text in ('max_think', 'Control 100%', 'Scaling', 'Performance', 'failed'):
    assert text in done.stdout, text


@pytest.mark.parametrize(
  'flags, said',
  [
    ((), 'give --workdir=FOLDER of a run, or'),
    (('--config=configs/r1_zero.py',), 'give --workdir=FOLDER of a run, or'),
    (('--workdir=first', '--model=x'), 'give --workdir=FOLDER of a run, or'),
    (('--workdir=first', '--phase=sft'), "--phase='sft' is not one of pretrain, rl"),
    (('--workdir=frist',), "no 'frist/config.json'"),
    (('--workdir=first', '--config.evaluation.num_exampels=3'), "did you mean 'num_examples'?"),
    (('--config=configs/r1_zero.py', '--model=missing.gguf'), 'missing.gguf'),
    (('--workdir=first', '--distributed'), '--distributed needs --to'),
    (('--workdir=first', '--sweep=think=4'), "'think' is not one of at_most, class, ignores"),
    (('--workdir=first', '--sweep=max_think'), 'give it as max_think=4,8,16'),
    (('--workdir=first', '--sweep=class=4'), 'give it as class'),
    (('--workdir=first', '--sweep=max_think=a'), "'a' are not numbers"),
    (('--workdir', 'first', '--phase=sft'), "--phase='sft' is not one of pretrain, rl"),
  ],
)
def test_bad_input_is_one_line(run, flags, said):
  done = call('evaluate', run.parent, *flags)
  assert done.returncode == 2, done.stderr
  assert said in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_a_saved_config_is_the_config(run):
  config = saved.get_config(str(run))
  assert config.is_locked and config.pretrain.steps == 2
  assert config.phases == ('pretrain', 'rl') and isinstance(config.task.strides, tuple)
  assert config.rl.optim.weight_decay[0] == ('scale|bias', 0.0)
  assert config.rl.algorithm.epsilon_high is None
  config.rl.algorithm.epsilon_high = 0.28  # still a number, if any
  config.models.policy.sliding_window = 8
  with pytest.raises(ValueError, match='no .*nowhere/config.json'):
    saved.get_config('nowhere')
