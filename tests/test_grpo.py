"""GRPO: its settings, the whole loss against the float64 oracle, and what it learns on a bandit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_grpo
import pytest
import tiny

from reasonrl import learner, packing, records
from reasonrl.algorithms import ALGORITHMS
from reasonrl.configs import common
from reasonrl.kernels import policy_loss

LENGTHS = [2, 4, 3, 1, 4, 2]
GROUPS = [0, 1, 0, 1, 0, 1]  # interleaved
REWARDS = [1.0, 0.5, 0.0, 0.5, 1.0, 2.0]


def experience(**changes):
  return tiny.experience(REWARDS, GROUPS, LENGTHS, **changes)


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize('preset', common.ALGORITHM_PRESETS)
def test_presets_hold_exactly_the_fields_of_their_class(preset):
  section = common.algorithm(preset).to_dict()
  cls = ALGORITHMS[section.pop('name')]
  assert set(section) == {f.name for f in dataclasses.fields(cls)}
  cls(**section).check(2, ('accuracy',))
  for field in dataclasses.fields(cls):
    assert field.default is dataclasses.MISSING, f'{field.name} has a default outside the config'


def test_presets_are_what_they_cite():
  trl, paper = common.algorithm('grpo'), common.algorithm('deepseekmath_grpo')
  assert (trl.scale_rewards, trl.std_ddof, trl.advantage_eps) == ('group', 1, 1e-4)
  assert (trl.epsilon, trl.epsilon_high, trl.beta, trl.loss_agg) == (0.2, None, 0.0, 'token_mean')
  assert (paper.beta, paper.loss_agg) == (0.04, 'seq_mean_token_mean')


@pytest.mark.parametrize(
  'changes, needs',
  [
    ({}, set()),
    ({'num_iterations': 2}, {'old_logp'}),
    ({'num_minibatches': 2}, {'old_logp'}),
    ({'beta': 0.1}, {'ref_logp'}),
    ({'beta': 0.1, 'num_iterations': 2, 'num_minibatches': 3}, {'old_logp', 'ref_logp'}),
  ],
)
def test_needs_only_the_scores_it_uses(changes, needs):
  assert tiny.algorithm(**changes).needs == needs


@pytest.mark.parametrize(
  'changes, generations, said',
  [
    ({}, 1, 'num_generations=1: .* at least 2'),
    ({'scale_rewards': 'none'}, 1, 'num_generations=1: .* at least 2'),
    ({'scale_rewards': 'std'}, 4, "scale_rewards='std' is not one of .*'group'"),
    ({'std_ddof': 2}, 4, r'std_ddof=2 is not one of \(0, 1\)'),
    ({'loss_agg': 'mean'}, 4, "loss_agg='mean' is not one of .*'token_mean'"),
    ({'importance_min': 4.0}, 4, 'importance_min=4.0 is above importance_max=3.0'),
    (
      {'cispo_ratio_min': 2.0, 'cispo_ratio_max': 1.0},
      *(4, 'cispo_ratio_min=2.0 is above cispo_ratio_max=1.0'),
    ),
    ({'num_iterations': 0}, 4, 'num_iterations=0 must be at least 1'),
    ({'num_minibatches': 0}, 4, 'num_minibatches=0 must be at least 1'),
    ({'importance_max': 0.0}, 4, 'importance_max=0.0 must be above 0'),
    ({'log_ratio_clamp': -1.0}, 4, 'log_ratio_clamp=-1.0 must be above 0'),
  ],
)
def test_settings_that_cannot_train_are_refused_by_name(changes, generations, said):
  with pytest.raises(records.UserError, match=said):
    tiny.algorithm(**changes).check(generations, ('accuracy',))


# ------------------------------------------------------------------------------------ credit


def test_advantages_lie_on_policy_tokens_alone():
  adv_BT = tiny.algorithm(scale_rewards='none').advantages(experience())
  want_B = np.float32([1 / 3, -0.5, -2 / 3, -0.5, 1 / 3, 1.0])
  np.testing.assert_allclose(adv_BT, want_B[:, None] * experience().mask_BT, atol=1e-6)
  assert (adv_BT[experience().mask_BT == 0] == 0).all()


def test_rows_of_one_rollout_share_its_advantage():
  """Two turns of rollout 1 are two rows: it still counts once in its group's mean."""
  rollouts, groups = [3, 1, 0, 1, 2], [9, 5, 5, 5, 9]
  turns = tiny.experience([0.0] * 5, groups, [1] * 5)
  turns = dataclasses.replace(
    turns,
    rollout_B=np.array(rollouts, np.int32),
    reward_R=np.float32([1.0, 0.0, 6.0, 2.0]),
  )
  adv_BT = tiny.algorithm(scale_rewards='none').advantages(turns)
  np.testing.assert_allclose(adv_BT[:, 2], [-2.0, -0.5, 0.5, -0.5, 2.0])


def test_permuting_rows_permutes_advantages():
  order = np.array([3, 0, 5, 1, 4, 2])
  permuted = tiny.experience(
    np.array(REWARDS)[order], np.array(GROUPS)[order], np.array(LENGTHS)[order]
  )
  grpo = tiny.algorithm()
  want = grpo.advantages(experience())[order]
  got = grpo.advantages(permuted)
  np.testing.assert_array_equal(got.sum(1), want.sum(1))


@pytest.mark.parametrize('returns', ['outcome', 'to_go'])
def test_a_rollout_without_reward_has_no_advantage_and_no_part_in_whitening(returns):
  """Not that of a reward of 0: one token each, rewards 1, 0, none; KL in the reward."""
  found = tiny.experience([1.0, 0.0, np.nan], [0, 0, 0], [1, 1, 1])
  found = dataclasses.replace(
    found, scores={'old_logp': -found.mask_BT, 'ref_logp': -2 * found.mask_BT}
  )
  fields = {'baseline': 'none', 'scale_rewards': 'none', 'returns': returns, 'advantage_eps': 0.0}
  fields |= {'beta': 0.1, 'kl_estimator': 'k1', 'kl_placement': 'reward'}
  plain = tiny.algorithm(**fields).advantages(found)[:, 2]
  np.testing.assert_allclose(plain, [0.9, -0.1, 0.0], atol=1e-7)
  whitened = tiny.algorithm(**fields, whiten=True).advantages(found)[:, 2]
  np.testing.assert_allclose(whitened, [math.sqrt(0.5), -math.sqrt(0.5), 0.0], rtol=1e-6)
  dense = np.float32([[0, 0, 0], [0, 0, 0], [0, 0, 0.5]])  # but credit per token is a reward
  found = dataclasses.replace(found, reward_BT=dense)
  credited = tiny.algorithm(**fields | {'returns': 'to_go'}).advantages(found)[:, 2]
  np.testing.assert_allclose(credited, [0.9, -0.1, 0.4], atol=1e-7)


def test_credit_of_single_tokens_is_added_as_it_is():
  """Rewards 1 and 0 of a group: +-1/sqrt 2 by its std; penalties with their own returns."""
  found = tiny.experience([1.0, 0.0], [0, 0], [2, 2])
  r_p, gamma = -0.05, 0.99
  credit = np.float32([[0, 0, 0, 0], [0, 0, r_p + gamma * r_p, r_p]])
  found = dataclasses.replace(found, reward_BT=credit)
  got = tiny.algorithm(advantage_eps=0.0).advantages(found)[:, 2:4]
  z = math.sqrt(0.5)
  np.testing.assert_allclose(got, [[z, z], [-z - 0.0995, -z - 0.05]], rtol=1e-6)
  unrewarded = dataclasses.replace(found, reward_R=np.float32([np.nan, np.nan]))
  got = tiny.algorithm(advantage_eps=0.0).advantages(unrewarded)[:, 2:4]
  np.testing.assert_allclose(got, [[0, 0], [-0.0995, -0.05]], rtol=1e-6)
  equal = dataclasses.replace(found, reward_R=np.float32([1, 1]))
  assert tiny.algorithm(zero_variance='drop').keep(equal).tolist() == [True]
  spared = dataclasses.replace(equal, reward_BT=0 * credit)
  assert tiny.algorithm(zero_variance='drop').keep(spared).tolist() == [False]


def test_credit_of_single_tokens_that_does_not_fit():
  fits = {'repetition': 0.99}
  tiny.algorithm().check_credit(fits)
  tiny.algorithm(returns='to_go').check_credit({'repetition': 0.0})
  with pytest.raises(records.UserError, match=r'repetition.gamma=0.99 must be 0'):
    tiny.algorithm(returns='to_go').check_credit(fits)
  with pytest.raises(records.UserError, match='rewards.repetition gives credit to single tokens'):
    tiny.algorithm('gspo').check_credit(fits)


def test_which_groups_are_kept():
  assert tiny.algorithm().keep(experience()) is None
  drop = tiny.algorithm(zero_variance='drop')
  assert drop.keep(experience()).tolist() == [True, True]
  same = tiny.experience([1.0, 0.5, 1.0, 0.5, 1.0, 2.0], GROUPS, LENGTHS)
  assert drop.keep(same).tolist() == [False, True]
  parts = {'accuracy': np.float32([1, 1, 0, 1, 1, 1])}  # another choice by the task's own reward
  same = dataclasses.replace(same, parts=parts)
  drop = tiny.algorithm(zero_variance='drop', zero_variance_of='accuracy')
  assert drop.keep(same).tolist() == [True, False]


@pytest.mark.parametrize('loss_agg', ['token_mean', 'seq_mean_token_mean', 'token_sum_const'])
def test_a_masked_truncated_row_is_as_if_it_were_absent(loss_agg):
  """In weight and denominator; its reward still counts in its group's mean."""
  stop = np.full(6, int(records.Stop.EOS), np.int32)
  stop[[1, 4]] = int(records.Stop.LENGTH)
  cut = experience(stop_B=stop)
  grpo = tiny.algorithm(loss_agg=loss_agg, mask_truncated_completions=True)
  weight_BT, denominator = grpo.weights(cut)
  kept = np.array([0, 2, 3, 5])
  absent = tiny.experience(np.array(REWARDS)[kept], np.array(GROUPS)[kept], np.array(LENGTHS)[kept])
  want_BT, want = grpo.weights(absent)
  assert denominator == want
  np.testing.assert_array_equal(weight_BT[kept][:, : want_BT.shape[1]], want_BT)
  assert (weight_BT[[1, 4]] == 0).all()
  np.testing.assert_array_equal(grpo.advantages(cut), grpo.advantages(experience()))
  ignored, _ = tiny.algorithm(loss_agg=loss_agg).weights(cut)
  assert (ignored[1] != 0).any()  # off by default


# ------------------------------------------------------------------------------------ the loss

HIDDEN, VOCAB, FORM = 2, 5, (1.0, None, 0.8, jnp.dtype('float32'))
SCALES = ('group', 'none')
AGGREGATES = ('token_mean', 'seq_mean_token_mean', 'token_sum_const')
STOPS = [1, 2, 1, 1, 2, 1]


@functools.partial(jax.jit, static_argnums=(0,))
def fused(grpo, hidden, head, targets, aux):
  """sum over tokens of weight x loss, metrics and gradient, as the learner computes them."""
  fn = functools.partial(learner.weighted, grpo.token_loss)

  def loss(hidden):
    spec = policy_loss.Spec(FORM, 7, 'xla', None)
    bias = jnp.zeros(VOCAB)
    return policy_loss.fused_policy_loss(hidden, head, bias, targets, {}, aux, fn, spec)

  return jax.value_and_grad(loss, has_aux=True)(hidden)


@pytest.mark.parametrize('num_iterations', [1, 2])
@pytest.mark.parametrize('beta, epsilon_high', [(0.0, None), (0.3, None), (0.0, 0.4), (0.3, 0.4)])
def test_loss_and_gradient_equal_the_float64_oracle(beta, epsilon_high, num_iterations):
  """Every combination of settings: value, gradient by central differences, metrics."""
  rng = np.random.default_rng(3)
  found = experience(stop_B=np.array(STOPS, np.int32), vocab=VOCAB)
  row_M, at_M = np.nonzero(found.mask_BT)
  targets = found.tokens_BT[row_M, at_M]
  hidden = rng.normal(size=(targets.size, HIDDEN)).astype(np.float32)
  head = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
  scores = functools.partial(oracle.scores, targets_M=targets, temperature=FORM[2])
  start = scores(hidden, head)[0]
  old, ref = (np.float32(start + rng.normal(size=start.size) * spread) for spread in (0.4, 0.7))

  outcomes = [{'group': g, 'reward': r} for g, r in zip(GROUPS, REWARDS, strict=True)]

  def rows(hidden):
    logp, entropy = scores(hidden, head)
    columns = {'logp': logp, 'entropy': entropy, 'old': old, 'ref': ref}
    columns |= dict.fromkeys(('sampler', 'dense'), np.zeros(targets.size))
    return [
      {'rollout': i, 'group': GROUPS[i], 'stop': stop, 'trained': True}
      | {name: x[row_M == i].tolist() for name, x in columns.items()}
      for i, stop in enumerate(STOPS)
    ]

  held = rows(hidden)
  for scale, loss_agg, mask_truncated in itertools.product(SCALES, AGGREGATES, [False, True]):
    grpo = tiny.algorithm(
      scale_rewards=scale,
      loss_agg=loss_agg,
      loss_constant=6,
      beta=beta,
      epsilon_high=epsilon_high,
      num_iterations=num_iterations,
      mask_truncated_completions=mask_truncated,
    )
    weight_BT, denominator = grpo.weights(found)
    aux = {'weight': weight_BT, 'adv': grpo.advantages(found)}
    aux = {name: x[row_M, at_M] for name, x in aux.items()} | {'old_logp': old, 'ref_logp': ref}
    # The token loss does not see how rows are weighted: one program serves all three settings.
    traced = dataclasses.replace(
      grpo, scale_rewards='', loss_agg='', mask_truncated_completions=False
    )
    (total, metrics), dhidden = fused(traced, hidden, head, targets, aux)
    A = oracle_grpo.credit(grpo, held, outcomes, {})
    want = lambda h: oracle_grpo.objective(grpo, rows(h), held, A)  # noqa: B023
    assert float(total) / denominator == pytest.approx(want(hidden), rel=2e-5, abs=1e-6)
    gradient = oracle.numerical_gradient(want, hidden)
    np.testing.assert_allclose(dhidden / denominator, gradient, rtol=1e-3, atol=2e-6)
    assert np.abs(gradient).max() > 1e-3
    kept = aux['weight'] > 0
    ratio = np.exp(start - (old if num_iterations == 2 else start))
    adv, high = aux['adv'], 1 + (0.2 if epsilon_high is None else epsilon_high)
    means = {
      'clip_ratio/low': (ratio < 0.8) & (adv < 0),
      'clip_ratio/high': (ratio > high) & (adv > 0),
    }
    if beta:
      means['kl'] = np.exp(ref - start) - (ref - start) - 1
    for name, values in means.items():
      mean = pytest.approx(values[kept].mean(), abs=1e-6)
      assert float(metrics[name][kept].mean()) == mean, name
    if num_iterations == 2:
      assert means['clip_ratio/low'][kept].any() and means['clip_ratio/high'][kept].any()


# ------------------------------------------------------------------------------------ a bandit


@dataclasses.dataclass(frozen=True)
class Bandit:
  """A policy of one token: softmax of three numbers, whatever the prompt."""

  vocab_size: int = 3
  sharding_rules = ((r'weight', ()),)

  def init(self, key):
    del key
    return {'weight': jnp.zeros((3, 1))}

  def hidden(self, params, tokens_BT, positions_BT, segments_BT, cache=None, **_):
    return jnp.ones((*tokens_BT.shape, 1)), cache

  def head(self, params):
    return params['weight']

  def with_head(self, tree, head_VD):
    return {**tree, 'weight': head_VD}


def probabilities(params):
  z = np.asarray(params['weight'], np.float64)[:, 0]
  return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


class Play:
  """A bandit under the real learner: `step` samples, scores and updates once per iteration."""

  def __init__(self, start=(0.0, 0.0, 0.0), learning_rate=0.1, **changes):
    self.grpo = tiny.algorithm(**changes)
    model = Bandit()
    params = {'weight': jnp.asarray(start, jnp.float32)[:, None]}
    term = learner.Term(self.grpo.token_loss, None, 'weight')
    self.learner = tiny.make_learner(model, params, term, learning_rate=learning_rate)
    self.state = self.learner.init(params)
    self.rng = np.random.default_rng(0)

  def step(self, payoff, G=16):
    p = probabilities(self.state.params)
    tokens = np.zeros((G, 2), np.int32)
    tokens[:, 1] = self.rng.choice(3, G, p=p)
    logp = np.log(p)[tokens].astype(np.float32) * np.array([0, 1], np.float32)[None]
    found = tiny.experience(np.take(payoff, tokens[:, 1]), [0] * G, [1] * G, prompt_length=1)
    found = dataclasses.replace(found, tokens_BT=tokens)
    weight_BT, denominator = self.grpo.weights(found)
    aux = {'weight': weight_BT, 'adv': self.grpo.advantages(found), 'old_logp': logp}
    aux |= {'ref_logp': np.full_like(logp, math.log(1 / 3)), 'sampler_logp': logp}
    batches, _ = packing.pack(packing.sequences(tokens, found.length_B, aux), 2, G, share=True)
    rows = []
    for _ in range(self.grpo.num_iterations):
      self.state, reports = self.learner.update(self.state, batches, (denominator,))
      rows.append(learner.reduce_reports(reports))
    return rows

  def kl(self):
    """KL of the policy from the uniform reference."""
    p = probabilities(self.state.params)
    return float((p * np.log(3 * p)).sum())


def test_a_bandit_learns_the_rewarded_action():
  play = Play()
  for _ in range(200):
    play.step([1.0, 0.0, 0.0])
  assert probabilities(play.state.params)[0] > 0.99


def test_a_bandit_without_signal_does_not_move():
  play = Play()
  for _ in range(3):
    play.step([1.0, 1.0, 1.0])
  np.testing.assert_array_equal(probabilities(play.state.params), [1 / 3] * 3)


def test_the_first_pass_has_ratio_one_exactly_and_clips_nothing():
  play = Play(start=(0.3, -1.0, 0.9))
  for _ in range(3):
    (row,) = play.step([1.0, 0.0, 0.5])
    assert (row['ratio_max'], row['clip_ratio/low'], row['clip_ratio/high']) == (1.0, 0.0, 0.0)
    assert row['mismatch/max'] < 1e-6


def test_the_second_pass_sees_how_far_the_first_went():
  first, second = Play(num_iterations=2, learning_rate=1.0).step([1.0, 0.0, 0.0])
  assert first['ratio_max'] == pytest.approx(1.0, abs=1e-6)
  assert second['ratio_max'] > 1.2
  assert first['clip_ratio/high'] == 0.0 and second['clip_ratio/high'] > 0.0


def test_the_kl_term_pulls_towards_the_reference():
  """Alone (all rewards equal), and the more the larger beta is."""
  play = Play(start=(2.0, 0.0, 0.0), beta=0.1)
  before = play.kl()
  for _ in range(40):
    (row,) = play.step([1.0, 1.0, 1.0])
  assert play.kl() < 0.1 * before
  assert row['kl'] < 0.1
  ends = []
  for beta in (0.0, 0.3, 3.0):
    play = Play(beta=beta)
    for _ in range(60):
      play.step([1.0, 0.0, 0.0])
    ends.append(play.kl())
  assert ends[0] > ends[1] + 0.2 > ends[2] + 0.4
