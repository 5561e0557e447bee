"""The loop as a whole: it learns, it resumes bit for bit, it refuses bad input before it starts."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from reasonrl import checkpoint, logs, records, rewarding, train, types
from reasonrl.algorithms import grpo
from reasonrl.configs import common, r1_zero

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(2, 5.0) as pool:
    yield pool


def tiny():
  """The default experiment on an easier problem, four swaps, cut to what a test can wait for."""
  config = r1_zero.get_config('').unlock()
  config.mesh.data = 1
  config.sampler.buckets = 1  # fewer programs to compile
  config.task.num_swaps = 4
  config.task.strides = (0, 1)
  config.task.stride_weights = (0.6, 0.4)
  config.pretrain.steps = 400
  config.rl.steps = 15
  config.rl.env.max_completion_length = 16
  config.rl.optim.learning_rate = 1e-3
  config.rl.eval_every = 0
  config.evaluation.num_examples = 128
  config.evaluation.env.max_completion_length = 16
  return config


def rows_of(workdir, kind):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [row for row in rows if row['kind'] == kind]


def test_reward_rises_and_the_workdir_is_complete(tmp_path, pool):
  assert train.run(tiny(), str(tmp_path / 'run'), pool) == 0
  evals = rows_of(tmp_path / 'run', 'eval')
  assert [(row['phase'], row['phase_step']) for row in evals] == [
    ('pretrain', 0),
    ('pretrain', 400),
    ('rl', 15),
  ]
  base, trained = (row['eval/sampled/accuracy'] for row in evals[1:])
  assert base < 0.6 and trained > base + 0.2, (base, trained)
  rl = [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'rl']
  assert np.mean([r['reward'] for r in rl[-3:]]) > np.mean([r['reward'] for r in rl[:3]]) + 0.2
  # The sentinels, live: one function samples and trains, with the same parameters.
  assert max(row['mismatch/max'] for row in rl) < 1e-4
  assert all(row['unmasked_tokens'] == 0 and row['finite'] == 1 for row in rl)
  assert all(row['reward_timeouts'] == row['reward_errors'] == 0 for row in rl)
  names = {path.name for path in (tmp_path / 'run').iterdir()}
  assert names >= {
    *('config.json', 'env.json', 'metrics.jsonl', 'rollouts.jsonl'),
    *('checkpoints', 'phases', 'tokenizer'),
  }
  shown = [json.loads(line) for line in (tmp_path / 'run' / 'rollouts.jsonl').open()]
  assert {'prompt', 'completion', 'answer', 'reward', 'parts', 'advantage'} <= shown[0].keys()
  assert train.run(tiny(), str(tmp_path / 'run'), pool) == 0  # a finished run is left alone
  assert len(rows_of(tmp_path / 'run', 'eval')) == 3


def short(**fields):
  """Two reinforcement steps on a random model."""
  config = tiny()
  config.phases = ('rl',)
  config.rl.steps = 2
  config.rl.prompts_per_step = 4
  config.rl.env.num_generations = 4
  config.evaluation.num_examples = 8
  for field, value in fields.items():
    *parents, last = field.split('__')
    section = config
    for name in parents:
      section = section[name]
    section[last] = value
  return config


def test_steps_that_are_not_finite_are_kept_and_stop_the_run(tmp_path, pool):
  config = short(phases=('pretrain',), pretrain__steps=6, max_skipped=2)
  config.pretrain.optim.learning_rate = 1e38
  config.pretrain.optim.schedule = 'constant'
  with pytest.raises(RuntimeError, match='2 steps in a row were not finite'):
    train.run(config, str(tmp_path / 'run'), pool)
  kept = {path.name for path in (tmp_path / 'run' / 'nonfinite').iterdir()}
  names = {f'pretrain-{step}-0.{end}' for step in (2, 3) for end in ('npz', 'json')}
  assert kept == names | {'pretrain-2-0.params'}  # which the step after it left alone


@dataclasses.dataclass(frozen=True)
class Picky(grpo.GRPO):
  """Keeps the first group of every rollout."""

  def keep(self, experience):
    return np.unique(experience.group_B) == 0


def test_the_loop_refills_until_enough_groups_are_kept(tmp_path, pool, monkeypatch):
  monkeypatch.setitem(train.ALGORITHMS, 'picky', Picky)
  config = short(rl__algorithm__name='picky', rl__max_generation_batches=3, rl__steps=1)
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  (row,) = rows_of(tmp_path / 'run', 'train')
  shown = [json.loads(line) for line in (tmp_path / 'run' / 'rollouts.jsonl').open()]
  # Three rollouts of 4 prompts, one group of 4 samples kept of each: prompts 0, 4 and 8.
  assert {r['index'] for r in shown if r['kind'] == 'train'} == {0, 4, 8}
  assert row['tokens'] <= 3 * 4 * config.rl.env.max_completion_length


@dataclasses.dataclass(frozen=True)
class Likely:
  """A reward that needs the policy: the log-probability of what it wrote."""

  def batch(self, tools, state, experience):
    logp_BT = tools.score(state['params'], experience.rows).logp_BT
    np.testing.assert_allclose(logp_BT, experience.logp_BT, atol=1e-4)
    logp_R = np.bincount(experience.rollout_B, logp_BT.sum(1)).astype(np.float32)
    return types.BatchScore(logp_R, {'twice': 2 * logp_R}, None)


def test_a_reward_may_use_the_models(tmp_path, pool, monkeypatch):
  monkeypatch.setitem(train.REWARDS, 'likely', Likely)
  config = short(rl__steps=1)
  config.rewards.likely = {'weight': 0.5}
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  for row in rows_of(tmp_path / 'run', 'train') + rows_of(tmp_path / 'run', 'eval'):
    at = 'eval/sampled/reward' if row['kind'] == 'eval' else 'reward'
    assert row[f'{at}/likely'] < 0 and row[f'{at}/likely/twice'] == 2 * row[f'{at}/likely']
    parts = 0.5 * row[f'{at}/likely'] + row[f'{at}/accuracy'] + row[f'{at}/r1_format']
    assert row[at] == pytest.approx(parts, abs=1e-5)


def test_shuffled_rewards_reach_the_advantages_and_no_metric(tmp_path, pool, monkeypatch):
  monkeypatch.setitem(train.REWARDS, 'likely', Likely)  # one that tells all rollouts apart
  rows = {}
  for shuffle in (False, True):
    config = short(rl__steps=1, rl__shuffle_rewards=shuffle, log__transcripts=16)
    config.rewards.likely = {'weight': 0.5}
    workdir = tmp_path / str(shuffle)
    assert train.run(config, str(workdir), pool) == 0
    shown = [json.loads(line) for line in (workdir / 'rollouts.jsonl').open()]
    rows[shuffle] = rows_of(workdir, 'train')[0], [s for s in shown if s['kind'] == 'train']
  (plain, told), (row, mixed) = rows[False], rows[True]
  assert row['reward/likely'] == plain['reward/likely']
  assert row['grad_norm'] != plain['grad_norm']
  assert [s['completion'] for s in mixed] == [s['completion'] for s in told]
  rewards = lambda samples: [s['reward'] for s in samples]
  assert rewards(mixed) != rewards(told) and sorted(rewards(mixed)) == sorted(rewards(told))


def test_a_phase_that_only_evaluates_and_one_that_starts_from_it(tmp_path, pool):
  config = short()
  config.look = common.evaluate()
  config.phases = ('look', 'rl')
  config.rl.steps = 1
  config.rl.algorithm = common.algorithm('deepseekmath_grpo')
  config.rl.algorithm.num_iterations = 2
  config.log.profile_step = 1
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  phases = [(row['phase'], row['phase_step']) for row in rows_of(tmp_path / 'run', 'eval')]
  assert phases == [('look', 0), ('rl', 1)]
  assert not list((tmp_path / 'run' / 'phases' / 'look').iterdir())  # it has no parameters to keep
  (row,) = rows_of(tmp_path / 'run', 'train')
  assert row['kl'] < 1e-5  # step 0: the reference is the same parameters
  assert row['mismatch/max'] < 1e-4
  assert row['timing/rollout_s'] >= row['timing/sample_s'] + row['timing/reward_s']
  assert list((tmp_path / 'run' / 'profile' / 'rl').rglob('perfetto_trace.json.gz'))


def test_augmentations_and_controls_of_a_phase(tmp_path, pool):
  """Only `rl` is asked for a length, and made to think for three tokens at most."""
  config = tiny()
  config.pretrain.steps, config.rl.steps = 40, 2
  config.prompt.max_length = 20
  config.rl.row_length = config.pretrain.row_length = 64
  config.rl.augmentations = common.augmentations('length_target')
  config.rl.augmentations.length_target.update(min_tokens=6, max_tokens=9, template_exact='={n}')
  config.rl.env.controls = common.controls('think_budget')
  config.rl.env.controls.think_budget.update(max_think=3, wait='')
  config.rewards = common.rewards(accuracy=1.0, lcpo=1.0, repetition=1.0)
  config.rewards.repetition.ngram = 1
  config.log.transcripts_every = 1
  config.evaluation.budgets = common.budgets('rejection')
  config.evaluation.budgets.rejection.update(numbers=(2, 16), retries=1)
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  shown = [json.loads(line) for line in (tmp_path / 'run/rollouts.jsonl').read_text().splitlines()]
  trained = [row for row in shown if row['kind'] == 'train' and row['phase'] == 'rl']
  assert trained and all(re.search('=[6-9]$', row['prompt']) for row in trained)
  held_out = [row for row in shown if row['kind'] == 'eval']
  assert held_out and all(row['prompt'].endswith('?') for row in held_out)
  forced = [row for row in trained if len(row['completion'].partition('</think>')[0]) > 9]
  assert any('</think><answer>' in row['completion'] for row in forced)
  for row in forced:
    thought = re.match('<think>((?:[(]..[)]|.)*?)</think>', row['completion'])
    assert thought is None or len(re.findall('[(]..[)]|.', thought[1])) <= 3
  for row in rows_of(tmp_path / 'run', 'train'):
    if row['phase'] == 'rl':
      assert row['unmasked_tokens'] == 0 < row['written_length'] and row['mismatch/max'] < 1e-4
      assert row['reward/repetition/repeated'] >= 0 and 'reward/lcpo/exact/deviation' in row
  last = rows_of(tmp_path / 'run', 'eval')[-1]
  assert last['eval/rejection/16/failed'] == 0 and last['eval/rejection/control'] > 0


def test_a_loop_of_phases_with_averages_and_starts_by_name(tmp_path, pool):
  config = short(phases=('pretrain', ('rl', 'again', 2)), pretrain__steps=2, rl__steps=1)
  config.again = common.supervised(learning_rate=1e-2)
  config.again.update({'steps': 1, 'init': 'pretrain', 'examples_per_step': 8, 'row_length': 64})
  config.again.optim.ema_decay = 0.5
  run = tmp_path / 'run'
  assert train.run(config, str(run), pool) == 0
  names = {path.name for path in (run / 'phases').iterdir()}
  assert names == {'pretrain', 'rl-0', 'rl-1', 'again-0', 'again-0-ema', 'again-1', 'again-1-ema'}
  rows = rows_of(run, 'train')
  assert [(r['phase'], r['iteration'], r['step']) for r in rows] == [
    *(('pretrain', 0, 1), ('pretrain', 0, 2), ('rl', 0, 3), ('again', 0, 4)),
    *(('rl', 1, 5), ('again', 1, 6)),
  ]
  first, last, average, start = (
    jax.tree.leaves(checkpoint.load_params(run / 'phases' / name, None))
    for name in ('again-0', 'again-1', 'again-1-ema', 'pretrain')
  )
  # Both began at `pretrain` and saw other examples; the average of one step is half way.
  assert any(np.any(a != b) for a, b in zip(first, last, strict=True))
  for p, e, s in zip(last, average, start, strict=True):
    np.testing.assert_allclose(e, 0.5 * (p + s), atol=1e-6)


def test_truncated_sampling_trains_on_what_it_drew_from(tmp_path, pool, monkeypatch):
  """Two steps at top_p 0.9 and 0.5: no mismatch and no warning; the reference scores the same."""
  monkeypatch.setitem(train.REWARDS, 'likely', Likely)
  entropy = {}
  for top_p in (0.9, 0.5):
    config = short(rl__env__top_p=top_p, rl__env__max_kept_tokens=200)
    config.rl.algorithm.update({'beta': 0.04, 'num_minibatches': 2})
    config.rewards.likely = {'weight': 0.5}
    workdir = tmp_path / str(top_p)
    assert train.run(config, str(workdir), pool) == 0
    rl = rows_of(workdir, 'train')
    assert len(rl) == 2 and max(row['mismatch/max'] for row in rl) < 1e-4
    assert rl[0]['kl'] < 1e-5 and all(row['finite'] == 1 for row in rl)
    assert not any('sentinels' in row for row in rl)
    entropy[top_p] = rl[0]['entropy']
  assert entropy[0.5] < entropy[0.9] - 0.2


@pytest.mark.slow
def test_the_same_run_on_three_meshes(tmp_path, pool):
  """Placement changes rounding alone: the same draws, so the same curve, until rounding grows."""
  curves = {}
  for mesh in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    config = tiny()
    config.mesh.update(dict(zip(('data', 'fsdp', 'tensor'), mesh, strict=True)))
    config.pretrain.steps, config.rl.steps = 20, 2
    workdir = tmp_path / '-'.join(map(str, mesh))
    assert train.run(config, str(workdir), pool) == 0
    curves[mesh] = rows_of(workdir, 'train')
  one, *others = curves.values()
  for other in others:
    for a, b in zip(one, other, strict=True):
      assert abs(a['loss'] - b['loss']) < 1e-3
      assert a['tokens'] == pytest.approx(b['tokens'], rel=0.02)


# ------------------------------------------------------------------------------------ kill, resume

SMALL = """
 pretrain.steps=9 pretrain.examples_per_step=16 pretrain.eval_every=6
 rl.steps=6 rl.prompts_per_step=4 rl.env.num_generations=4 rl.eval_every=2
 rl.algorithm.num_minibatches=2 rl.algorithm.beta=0.01 evaluation.num_examples=16 mesh.data=1
 checkpoint.save_every=2 log.every=1 log.transcripts_every=1
""".split()


def start(workdir):
  command = [sys.executable, '-m', 'reasonrl.main', f'--workdir={workdir}']
  command += ['--config=configs/r1_zero.py', *(f'--config.{field}' for field in SMALL)]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def until(process, condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.stdout.read().decode()
    assert time.monotonic() < end, 'the run did not get there'
    time.sleep(0.005)


def lines(workdir):
  path = workdir / 'metrics.jsonl'
  return logs.read_rows(path)  # a line may be under way


def in_phase(workdir, phase, step):
  return any(row['phase'] == phase and row['phase_step'] >= step for row in lines(workdir))


def finish(process):
  out = process.communicate(timeout=240)[0].decode()
  assert process.returncode == 0, out
  return out


def assert_same_end(run, other):
  plain = lambda workdir: [
    {k: v for k, v in row.items() if not k.startswith('timing/')} for row in lines(workdir)
  ]
  assert plain(run) == plain(other)
  assert (run / 'rollouts.jsonl').read_bytes() == (other / 'rollouts.jsonl').read_bytes()
  for phase in ('pretrain', 'rl'):
    ours, theirs = (checkpoint.load_params(each / 'phases' / phase, None) for each in (run, other))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      np.testing.assert_array_equal(a, b)


def test_killed_anywhere_it_ends_as_if_undisturbed(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  finish(start(whole))
  disturbances = (
    (signal.SIGKILL, lambda: in_phase(killed, 'pretrain', 5)),
    (signal.SIGKILL, lambda: (killed / 'phases' / 'pretrain').exists()),
    (signal.SIGTERM, lambda: in_phase(killed, 'rl', 1)),
    (signal.SIGKILL, lambda: in_phase(killed, 'rl', 3)),
  )
  for number, reached in disturbances:
    process = start(killed)
    until(process, reached)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0].decode()
    # A polite signal saves and leaves with the shell's code for it.
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), out
  # The newest checkpoint is damaged as well: the one before it takes its place.
  newest = max((killed / 'checkpoints').glob('0*'))
  max(newest.rglob('*'), key=lambda file: file.stat().st_size).write_bytes(b'')
  assert f'checkpoint {int(newest.name)} is damaged' in finish(start(killed))

  assert_same_end(killed, whole)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
  whole, small = tmp_path / 'whole', tmp_path / 'disk' / 'run'
  finish(start(whole))
  small.parent.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=2M', 'tmpfs', small.parent]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('needs the right to mount a file system')
  try:
    process = start(small)
    out = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 1, out
    last = out.splitlines()[-1]
    assert last.startswith('error: No space left on device') and '--workdir goes on' in last
    subprocess.run(['mount', '-o', 'remount,ro', small.parent], check=True)
    process = start(small)
    out = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 2 and 'cannot write to workdir' in out.splitlines()[-1], out
    subprocess.run(['mount', '-o', 'remount,rw,size=50M', small.parent], check=True)
    finish(start(small))
    assert_same_end(small, whole)
  finally:
    subprocess.run(['umount', small.parent], check=True)


# ------------------------------------------------------------------------------------ bad input


BANS = common.controls('forbid')
BANS.forbid.texts = ('.',)
FORGETFUL = common.single_turn()
FORGETFUL.update({'min_p': 0.1, 'max_kept_tokens': 0})


@pytest.mark.parametrize(
  'field, value, says',
  [
    ('rl.algorithm.name', 'gpro', "'gpro' is not one of grpo"),
    ('task.name', 'shell', "'shell' is not one of .*shuffled_objects"),
    ('models.policy.kind', 'mamba', "'mamba' is not one of decoder"),
    ('rl.env.name', 'web', "'web' is not one of next_token, single_turn"),
    ('rl.kind', 'reinforcement', "'reinforcement' is not one of .*reinforce"),
    ('phases', ('pretrain', 'sft'), "phases='sft' is not one of pretrain, rl"),
    ('rl.init', 'sft', "rl.init='sft' is not 'previous', 'scratch', an earlier phase .pretrain."),
    ('rl.trains', 'critic', "'critic' is not one of policy"),
    ('pretrain.loss', 'mse', "'mse' is not one of nll"),
    ('rl.env.num_generations', 1, 'num_generations=1'),
    ('rl.env.top_p', 1.5, 'top_p=1.5'),
    ('rl.env.top_k', 65, 'max_kept_tokens=64 must be at least 65 for top_k=65'),
    ('rl.env', FORGETFUL, 'max_kept_tokens=0 must be at least 1 for top_k=0 top_p=1.0 min_p=0.1'),
    ('rl.env.temperature', 0.0, 'temperature=0.0'),
    ('rl.optim.schedule', 'step', "'step' is not one of"),
    ('prompt.max_length', 5, 'has 7 tokens'),
    ('prompt.template', 'alpaca', "'alpaca'"),
    ('models.policy.max_position', 24, '24 positions'),
    ('models.policy.activation', 'relu', "'relu' is not one of"),
    ('evaluation.correct', 'style', "'style' is not one of accuracy"),
    ('mesh.data', 9, 'data=9 .* does not fit 8 devices'),
    ('rl.rows_per_batch', 3, 'rows_per_batch=3'),
    ('models.policy.weights', 'missing.gguf', 'missing.gguf'),
    ('rl.optim.weight_decay', ((r'scale', 0.0),), 'covered by none'),
    ('loss_backend', 'cuda', "loss_backend='cuda' is not one of auto, xla, pallas_tpu"),
    ('loss_backend', 'pallas_tpu', "'pallas_tpu' runs on a tpu, and here is a cpu"),
    ('loss_chunk', -1, 'loss_chunk=-1 must be at least 0'),
    ('log.every', 0, 'log.every=0 must be at least 1'),
    ('rl.prompts_per_step', 0, 'rl.prompts_per_step=0 must be at least 1'),
    ('evaluation.env.num_generations', 0, 'num_generations=0 must be at least 1'),
    ('evaluation.env.max_completion_length', 0, 'max_completion_length=0 must be at least 1'),
    ('rl.rows_per_batch', 0, 'rl.rows_per_batch=0 must be at least 1'),
    ('rl.env.slots', -1, 'rl.env.slots=-1 must be at least 0'),
    ('rl.steps', -1, 'rl.steps=-1 must be at least 0'),
    ('evaluation.env.top_p', 1.5, 'top_p=1.5'),
    ('seed', -1, 'seed=-1 must be at least 0'),
    ('rl.kind', 'evaluate', 'rl.steps=.* must be 0: such a phase only evaluates'),
    (
      'rl.reads',
      {'critic': {'model': 'policy', 'init': 'scratch'}},
      'reads.critic: no score reads',
    ),
    ('models.policy.param_dtype', 'bfloat16', 'train float32 parameters'),
    ('rl.algorithm.num_minibatches', 1000, 'num_minibatches=1000 is more than'),
    ('pretrain.init', 'rl', 'an earlier phase .there is none.'),
    ('phases', (('pretrain', 'rl'),), 'must end in how often it is repeated'),
    ('task.num_swaps', 1, 'only .* different test problems'),
    ('task', common.countdown(), 'examples of countdown need the reward countdown'),
    (
      'prompt.augmentations',
      common.augmentations('length_target'),
      'max_completion_length=16 is less than the 4000 tokens that an augmentation asks for',
    ),
    ('rl.augmentations', common.augmentations('length_label'), 'was not collected by a phase'),
    ('rl.augmentations', {'haste': {}}, "rl.augmentations='haste' is not one of effort"),
    ('rl.env.controls', BANS, "rl.env.controls has 'forbid', which changes probabilities"),
    ('rl.env.controls', {'brake': {}}, "'brake' is not one of force, forbid, think_budget"),
    ('evaluation.budgets', common.budgets('max_think'), 'budgets.max_think allows 512 tokens'),
    ('evaluation.budgets', common.budgets('target'), 'budgets.target allows 512 tokens'),
    ('evaluation.budgets', common.budgets('class'), 'vocabulary has no .. Answer after a short'),
    ('evaluation.budgets', {'luck': {}}, "evaluation.budgets='luck' is not one of at_most, class"),
  ],
)
def test_bad_input_stops_at_start_with_one_clear_line(tmp_path, pool, field, value, says):
  config = tiny()
  config.mesh.data = 2
  section = config
  *parents, last = field.split('.')
  for name in parents:
    section = section[name]
  with section.ignore_type():
    section[last] = value
  with pytest.raises(records.UserError, match=says) as error:
    train.run(config, str(tmp_path / 'run'), pool)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run' / 'phases').exists()


# ------------------------------------------------------------------------------------ followers


def leaves(folder, name='rl'):
  return jax.tree.leaves(checkpoint.load_params(folder / 'phases' / name, None))


@pytest.mark.parametrize('stop_after', [2, 3])
def test_a_reference_and_a_sampler_that_follow_survive_a_kill(tmp_path, pool, stop_after):
  """They are part of the checkpoint: cut anywhere, the run ends with the same parameters."""
  changes = {'rl__steps': 5, 'rl__sampler_sync_steps': 2, 'rl__reads__ref__sync_steps': 3}
  changes |= {'rl__algorithm__beta': 0.1, 'checkpoint__save_every': 1}
  assert train.run(varied(**changes), str(tmp_path / 'whole'), pool) == 0
  cut = varied(**changes)
  with cut.unlocked():
    cut.rl.steps = stop_after
  assert train.run(cut, str(tmp_path / 'cut'), pool) == 0
  # Take the end mark away and give the run its full length, as if it had been killed there.
  shutil.rmtree(tmp_path / 'cut' / 'phases')
  saved = json.loads((tmp_path / 'cut' / 'config.json').read_text())
  saved['rl']['steps'] = 5
  (tmp_path / 'cut' / 'config.json').write_text(json.dumps(saved))
  rows = [json.loads(line) for line in (tmp_path / 'cut' / 'metrics.jsonl').open()]
  assert train.run(varied(**changes), str(tmp_path / 'cut'), pool) == 0
  assert rows
  for a, b in zip(leaves(tmp_path / 'whole'), leaves(tmp_path / 'cut'), strict=True):
    np.testing.assert_array_equal(a, b)


def varied(**changes):
  """As `short`, with a reward that differs already among the random completions: their length."""
  config = short(**changes)
  with config.unlocked():
    config.rewards = common.rewards(accuracy=1.0, soft_overlong=1.0)
  return config


def test_a_sampler_that_lags_is_off_policy_until_it_is_renewed(tmp_path, pool):
  changes = {'rl__steps': 4, 'rl__sampler_sync_steps': 2, 'rl__optim__learning_rate': 0.01}
  assert train.run(varied(**changes), str(tmp_path / 'run'), pool) == 0
  rows = rows_of(tmp_path / 'run', 'train')
  gaps = [row['mismatch/max'] for row in rows]
  assert not any('sentinels' in row for row in rows)  # it lags as it was told
  assert max(gaps[0], gaps[2]) < 1e-4 < 1e-2 < min(gaps[1], gaps[3])


def test_a_reference_that_follows_by_hand(tmp_path, pool):
  """alpha 1 every step: the reference is the policy, and the KL is 0 at every step."""
  changes = {'rl__steps': 3, 'rl__algorithm__beta': 0.1, 'rl__optim__learning_rate': 0.01}
  assert train.run(varied(**changes), str(tmp_path / 'fixed'), pool) == 0
  changes |= {'rl__reads__ref__sync_steps': 1, 'rl__reads__ref__mixup_alpha': 1.0}
  assert train.run(varied(**changes), str(tmp_path / 'follows'), pool) == 0
  fixed, follows = (
    [row['kl'] for row in rows_of(tmp_path / name, 'train')] for name in ('fixed', 'follows')
  )
  assert fixed[0] < 1e-5 and min(fixed[1:]) > 1e-3
  assert max(follows) < 1e-5
