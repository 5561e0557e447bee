"""Every sentinel fires on a planted fault, and none in a healthy run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import test_train
import tiny

from reasonrl import records, rewarding, sentinels, train
from reasonrl.algorithms import grpo
from reasonrl.envs import single_turn

HEALTHY = {
  **{'finite': 1.0, 'mismatch/max': 9e-5, 'mismatch/mean': 0.0, 'kl': 0.0},
  **{'ratio_gap': 0.0, 'ratio_gap_max': 0.0},
  **{'unmasked_tokens': 0.0, 'eos_rate': 0.06, 'reward': 0.5, 'reward_std': 0.1, 'grad_norm': 1.0},
  **{'completions': 100.0, 'reward_timeouts': 1.0, 'reward_errors': 0.0},
  **{'params/changed': 1.0, 'params/sampled': 1.0},
}
FACTS = sentinels.Facts(
  'float32', 'float32', True, 'itself', learning=True, reinforcing=True, synced=True
)


def fired(row, facts=FACTS, steps=1):
  seen = {}
  for step in range(1, steps + 1):
    names, _, seen = sentinels.watch(seen, HEALTHY | row, facts, step)
  return names


@pytest.mark.parametrize(
  'name, row',
  [
    ('mismatch', {'mismatch/max': 2e-4}),
    ('mismatch', {'mismatch/max': np.nan}),
    ('ratio', {'ratio_gap_max': 1e-7}),
    ('kl', {'kl': 2e-5}),
    ('kl', {'kl': np.nan}),
    ('stale', {'params/sampled': 0.0}),
    ('unmoved', {'params/changed': 0.0}),
    ('mask', {'unmasked_tokens': 1.0}),
    ('verifier', {'reward_errors': 1.0}),
    ('finite', {'finite': 0.0, 'mismatch/max': np.nan}),  # one thing is wrong, not three
  ],
)
def test_what_fires_at_once(name, row):
  assert fired({}) == []
  assert fired(row) == [name]


@pytest.mark.parametrize(
  'name, row', [('eos', {'eos_rate': 0.04}), ('rewards', {'reward_std': 1e-9})]
)
def test_what_fires_after_twenty_steps_in_a_row(name, row):
  assert fired(row, steps=19) == []
  assert fired(row, steps=20) == [name]
  _, _, seen = sentinels.watch({name: [19, -10]}, HEALTHY, FACTS, 20)
  assert sentinels.watch(seen, HEALTHY | row, FACTS, 21)[0] == []  # one good step begins it anew


def test_what_depends_on_the_run():
  later = FACTS._replace(at_reference=False)
  half = FACTS._replace(compute_dtype='bfloat16', cache_dtype='bfloat16')
  assert fired({'kl': 1.0}, later) == []
  assert fired({'mismatch/max': 1.6, 'kl': 1e-3}, half) == []
  assert fired({'mismatch/mean': 0.06}, half) == ['mismatch']
  assert fired({'mismatch/max': 1.6}, FACTS._replace(cache_dtype='int8')) == []
  assert fired({'mismatch/mean': 0.06}, FACTS._replace(cache_dtype='int8')) == ['mismatch']
  scored, sampled = (FACTS._replace(old_policy=old) for old in ('scored', 'sampled'))
  assert fired({'ratio_gap_max': 9e-5}, scored) == fired({'ratio_gap_max': 0.1}, sampled) == []
  assert fired({'ratio_gap_max': 2e-4}, scored) == ['ratio']
  assert fired({'mismatch/max': 0.1}, FACTS._replace(synced=False)) == []
  half = half._replace(old_policy='scored')
  assert fired({'ratio_gap_max': 0.1}, half) == [] and fired({'ratio_gap': 0.03}, half) == ['ratio']
  assert fired({'params/changed': 0.0}, FACTS._replace(learning=False)) == []
  assert fired({'params/changed': 0.0, 'grad_norm': 1e-9}) == []  # no advantage, no step
  supervised = {name: HEALTHY[name] for name in ('finite', 'grad_norm', 'params/changed')}
  assert sentinels.watch({}, supervised, FACTS, 1)[0] == []


def test_a_line_has_name_number_and_advice_and_comes_every_ten_steps():
  seen, lines = {}, {}
  for step in range(3, 25):
    row = HEALTHY | {'unmasked_tokens': 7.0, 'eos_rate': 0.0}
    _, lines[step], seen = sentinels.watch(json.loads(json.dumps(seen)), row, FACTS, step)
  mask = 'step 13: [mask] 7 sampled tokens are not in the policy mask; the environment must mark'
  assert lines[13][0].startswith(mask)
  assert [step for step, each in lines.items() if '[mask]' in ''.join(each)] == [3, 13, 23]
  assert [step for step, each in lines.items() if '[eos]' in ''.join(each)] == [22]
  assert '[eos] 0.0% of the completions end by themselves, for 20 steps; raise' in lines[22][0]


def test_a_checksum_notices_one_entry():
  params = tiny.model().init(jax.random.key(0))
  before = np.asarray(sentinels.checksum(params))
  leaves, tree = jax.tree.flatten(params)
  same = sentinels.compared(before, [], before, np.asarray(sentinels.checksum(params)))
  assert same == {'params/changed': 0.0}
  for i, leaf in enumerate(leaves):
    moved = [*leaves[:i], leaf.at[(0,) * leaf.ndim].add(1e-3), *leaves[i + 1 :]]
    after = np.asarray(sentinels.checksum(jax.tree.unflatten(tree, moved)))
    assert np.flatnonzero(before != after).tolist() == [i]
    row = sentinels.compared(before, [after], before, after)
    assert row == {'params/changed': 1.0, 'params/sampled': 0.0}
    assert sentinels.compared(before, [after, before], after, after) == {
      'params/changed': 0.0,
      'params/sampled': 1.0,
    }


# ------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(2, 5.0) as pool:
    yield pool


STALE = []


@dataclasses.dataclass(frozen=True)
class Stale(single_turn.SingleTurn):
  """Samples with the parameters of the first step for ever."""

  def rollout(self, tools, state, step):
    if not STALE:
      STALE.append(jax.tree.map(lambda x: x + 0, state['params']))
    return super().rollout(tools, {**state, 'params': STALE[0]}, step)


@dataclasses.dataclass(frozen=True)
class Unmasked(single_turn.SingleTurn):
  """Forgets that the last token of a row, its EOS, was sampled."""

  def rollout(self, tools, state, step):
    found = super().rollout(tools, state, step)
    source_BT = found.source_BT.copy()
    source_BT[np.arange(len(source_BT)), found.length_B - 1] = 0
    return dataclasses.replace(found, source_BT=source_BT)


@dataclasses.dataclass(frozen=True)
class Endless(single_turn.SingleTurn):
  """No row stops by itself."""

  def rollout(self, tools, state, step):
    found = super().rollout(tools, state, step)
    cut = [dataclasses.replace(c, stop=records.Stop.LENGTH) for c in found.completions]
    return dataclasses.replace(found, completions=tuple(cut))


@dataclasses.dataclass(frozen=True)
class WrongOld(grpo.GRPO):
  """Takes old log-probabilities that are of other parameters."""

  def token_loss(self, out, aux):
    return super().token_loss(out, aux | {'old_logp': aux['old_logp'] + 0.1})


@dataclasses.dataclass(frozen=True)
class Reward:
  """More for longer completions; or 0.5 for everything; or fails."""

  kind: str
  group = False

  def __call__(self, example, completion):
    if self.kind == 'fails':
      raise RuntimeError('no verifier today')
    return records.Score({'length': completion.num_tokens, 'equal': 0.5}[self.kind], {}, None)


def paid(monkeypatch, kind, **fields):
  """A config whose rewards are this one alone."""
  monkeypatch.setitem(train.REWARDS, 'planted', Reward)
  config = test_train.short(**fields)
  config.rewards.accuracy.weight = config.rewards.r1_format.weight = 0.0
  config.rewards.planted = {'weight': 1.0, 'kind': kind}
  return config


def names_of(config, workdir, pool):
  assert train.run(config, str(workdir), pool) == 0
  rows = test_train.rows_of(workdir, 'train')
  return [row.get('sentinels', []) for row in rows], rows


def test_a_healthy_run_fires_none(tmp_path, pool, monkeypatch, capsys):
  config = paid(monkeypatch, 'length', rl__steps=3, rl__algorithm__num_minibatches=2)
  config.rl.algorithm.beta = 0.01
  names, rows = names_of(config, tmp_path / 'run', pool)
  assert names == [[], [], []] and not any('sentinels' in row for row in rows)
  assert all(row['params/changed'] == row['params/sampled'] == 1 for row in rows)
  assert all(row['completions'] == 16 and row['ratio_gap_max'] < 1e-4 for row in rows)
  assert ': [' not in capsys.readouterr().out


def test_stale_sampler_parameters(tmp_path, pool, monkeypatch, capsys):
  monkeypatch.setitem(train.ENVS, 'single_turn', Stale)
  STALE.clear()
  config = paid(monkeypatch, 'length', rl__steps=3)
  config.rl.optim.learning_rate = 1e-2
  names, _ = names_of(config, tmp_path / 'run', pool)
  assert names == [[], ['mismatch', 'stale'], ['mismatch', 'stale']]
  out = capsys.readouterr().out
  assert out.count('2: [stale]') == out.count('2: [mismatch]') == 1 and '3: [' not in out


def test_dropped_mask_tokens(tmp_path, pool, monkeypatch):
  monkeypatch.setitem(train.ENVS, 'single_turn', Unmasked)
  names, _ = names_of(test_train.short(), tmp_path / 'run', pool)
  assert names == [['mask'], ['mask']]


def test_wrong_old_log_probabilities(tmp_path, pool, monkeypatch):
  monkeypatch.setitem(train.ALGORITHMS, 'grpo', WrongOld)
  config = paid(monkeypatch, 'length', rl__algorithm__num_iterations=2)
  names, rows = names_of(config, tmp_path / 'run', pool)
  assert names == [['ratio'], ['ratio']]
  assert rows[0]['ratio_gap_max'] == pytest.approx(1 - np.exp(-0.1), abs=1e-4)


def test_a_learning_rate_that_rounds_away(tmp_path, pool):
  config = test_train.short(phases=('pretrain',), pretrain__steps=2)
  config.pretrain.optim.learning_rate = 1e-30
  names, _ = names_of(config, tmp_path / 'run', pool)
  assert names == [['unmoved'], ['unmoved']]
  config.pretrain.optim.learning_rate = 0.0
  assert names_of(config, tmp_path / 'zero', pool)[0] == [[], []]  # as it was told


def test_sentinels_can_be_switched_off(tmp_path, pool):
  config = test_train.short(phases=('pretrain',), pretrain__steps=1, sentinels=False)
  config.pretrain.optim.learning_rate = 1e-30
  names, (row,) = names_of(config, tmp_path / 'run', pool)
  assert names == [[]] and 'params/changed' not in row


def test_equal_rewards_and_rows_that_never_stop(tmp_path, pool, monkeypatch, capsys):
  """A run that was broken off goes on counting."""
  monkeypatch.setitem(train.ENVS, 'single_turn', Endless)
  config = paid(monkeypatch, 'equal', rl__steps=22, rl__env__max_completion_length=2)
  config.checkpoint.save_every = 7
  watch = sentinels.watch

  def break_off(seen, row, facts, step):
    if step == 16:
      raise InterruptedError
    return watch(seen, row, facts, step)

  monkeypatch.setattr(sentinels, 'watch', break_off)
  with pytest.raises(InterruptedError):
    train.run(config, str(tmp_path / 'run'), pool)
  monkeypatch.setattr(sentinels, 'watch', watch)
  names, _ = names_of(config, tmp_path / 'run', pool)
  assert [names[step - 1] for step in (19, 20, 22)] == [[], ['eos', 'rewards'], ['eos', 'rewards']]
  assert (
    capsys.readouterr().out.count('[rewards] all rewards of a step are equal, 0.5, for 20') == 1
  )


def test_a_reward_that_fails(tmp_path, pool, monkeypatch):
  names, rows = names_of(paid(monkeypatch, 'fails'), tmp_path / 'run', pool)
  assert names == [['verifier'], ['verifier']]
  assert rows[0]['reward_errors'] == rows[0]['completions'] == 16


def test_samples_that_nothing_trains_on_may_be_cut_off_and_equal():
  """Of a phase that collects: a base model seldom ends by itself, and most of its answers fail."""
  row = {'eos_rate': 0.0, 'reward_std': 0.0, 'reward': 0.0}
  steps = sentinels.PATIENCE
  assert {'eos', 'rewards'} <= set(fired(row, steps=steps))
  assert not {'eos', 'rewards'} & set(fired(row, FACTS._replace(reinforcing=False), steps))
