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
import pytest
import tiny
from jax.sharding import PartitionSpec

from reasonrl import learner, records
from reasonrl.algorithms import ALGORITHMS
from reasonrl.configs import common
from reasonrl.kernels import policy_loss

LENGTHS = [2, 4, 3, 1, 4, 2]
GROUPS = [0, 1, 0, 1, 0, 1]  # interleaved
REWARDS = [1.0, 0.5, 0.0, 0.5, 1.0, 2.0]


def experience(**changes):
  return tiny.experience(REWARDS, GROUPS, LENGTHS, **changes)


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize('preset', common._ALGORITHMS)
def test_presets_hold_exactly_the_fields_of_their_class(preset):
  section = common.algorithm(preset).to_dict()
  cls = ALGORITHMS[section.pop('name')]
  assert set(section) == {f.name for f in dataclasses.fields(cls)}
  cls(**section).check(num_generations=2)
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
    ({'scale_rewards': 'std'}, 4, "scale_rewards='std' is not one of 'group', 'none'"),
    ({'loss_agg': 'mean'}, 4, "loss_agg='mean' is not one of .*'token_mean'"),
    ({'num_iterations': 0}, 4, 'num_iterations=0 must be at least 1'),
    ({'num_minibatches': 0}, 4, 'num_minibatches=0 must be at least 1'),
  ],
)
def test_settings_that_cannot_train_are_refused_by_name(changes, generations, said):
  with pytest.raises(records.UserError, match=said):
    tiny.algorithm(**changes).check(generations)


# ------------------------------------------------------------------------------------ credit


def test_advantages_lie_on_policy_tokens_alone():
  adv_BT = tiny.algorithm(scale_rewards='none').advantages(experience())
  want_B = np.float32([1 / 3, -0.5, -2 / 3, -0.5, 1 / 3, 1.0])
  np.testing.assert_allclose(adv_BT, want_B[:, None] * experience().mask_BT, atol=1e-6)
  assert (adv_BT[experience().mask_BT == 0] == 0).all()


def test_rows_of_one_rollout_share_its_advantage():
  """Two turns of rollout 1 are two rows: it still counts once in its group's mean."""
  found = tiny.experience([1.0, 0.0, 0.0], [5, 5, 5], [1, 1, 1])
  rows = [2, 1, 0, 1]
  turns = dataclasses.replace(
    tiny.experience([0.0] * 4, [5] * 4, [1] * 4),
    rollout_B=np.array(rows, np.int32),
    reward_R=found.reward_R,
  )
  adv_BT = tiny.algorithm(scale_rewards='none').advantages(turns)
  np.testing.assert_allclose(adv_BT[:, 2], [-1 / 3, -1 / 3, 2 / 3, -1 / 3], atol=1e-6)


def test_permuting_rows_permutes_advantages():
  order = np.array([3, 0, 5, 1, 4, 2])
  permuted = tiny.experience(
    np.array(REWARDS)[order], np.array(GROUPS)[order], np.array(LENGTHS)[order]
  )
  grpo = tiny.algorithm()
  want = grpo.advantages(experience())[order]
  got = grpo.advantages(permuted)
  np.testing.assert_array_equal(got.sum(1), want.sum(1))


def test_every_group_is_kept():
  assert tiny.algorithm().keep(experience()).tolist() == [True, True]


@pytest.mark.parametrize('loss_agg', ['token_mean', 'seq_mean_token_mean', 'token_sum_const'])
def test_a_masked_truncated_row_is_as_if_it_were_absent(loss_agg):
  """In weight and denominator; its reward still counts in its group's mean."""
  stop = np.full(6, int(records.Stop.EOS), np.int32)
  stop[[1, 4]] = int(records.Stop.LENGTH)
  cut = experience(stop_B=stop)
  grpo = tiny.algorithm(loss_agg=loss_agg, mask_truncated_completions=True)
  weight_BT, denominator = grpo.weights(cut)
  kept = np.array([0, 2, 3, 5])
  absent = tiny.experience(
    np.array(REWARDS)[kept], np.array(GROUPS)[kept], np.array(LENGTHS)[kept]
  )
  want_BT, want = grpo.weights(absent)
  assert denominator == want
  np.testing.assert_array_equal(weight_BT[kept][:, : want_BT.shape[1]], want_BT)
  assert (weight_BT[[1, 4]] == 0).all()
  np.testing.assert_array_equal(grpo.advantages(cut), grpo.advantages(experience()))
  ignored, _ = tiny.algorithm(loss_agg=loss_agg).weights(cut)
  assert (ignored[1] != 0).any()  # off by default


# ------------------------------------------------------------------------------------ the loss

HIDDEN, VOCAB, FORM = 3, 5, (1.0, None, 0.8, jnp.dtype('float32'))
STOPS = [1, 2, 1, 1, 2, 1]


@functools.partial(jax.jit, static_argnums=(0,))
def fused(grpo, hidden, head, targets, aux):
  """sum over tokens of weight x loss, its gradients and metrics, as the learner computes them."""
  fn = functools.partial(learner._weighted, grpo.token_loss)

  def loss(hidden, head):
    return policy_loss.token_loss(hidden, head, jnp.zeros(VOCAB), targets, aux, fn, FORM, 7)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


GRID = list(
  itertools.product(
    ['group', 'none'],
    ['token_mean', 'seq_mean_token_mean', 'token_sum_const'],
    [0.0, 0.3],
    [None, 0.4],
    [1, 2],
    [False, True],
  )
)


@pytest.mark.parametrize('beta, epsilon_high, num_iterations', set(row[2:5] for row in GRID))
def test_loss_and_gradient_equal_the_float64_oracle(beta, epsilon_high, num_iterations):
  """Every combination of settings: value, gradients by central differences, metrics."""
  rng = np.random.default_rng(3)
  found = experience(stop_B=np.array(STOPS, np.int32), vocab=VOCAB)
  rows_of, at = np.nonzero(found.mask_BT)
  targets = found.tokens_BT[rows_of, at]
  M = targets.size
  hidden = rng.normal(size=(M, HIDDEN)).astype(np.float32)
  head = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
  start, _ = oracle.scores(hidden, head, targets, temperature=FORM[2])
  old, ref = (np.float32(start + rng.normal(size=M) * s) for s in (0.4, 0.7))

  def want(grpo, hidden, head, detached):
    logp, _ = oracle.scores(hidden, head, targets, temperature=FORM[2])
    columns = {'logp': logp, 'old_logp': old, 'ref_logp': ref, 'detached': detached}
    rows = [
      {'stop': STOPS[i], **{name: list(x[rows_of == i]) for name, x in columns.items()}}
      for i in range(len(LENGTHS))
    ]
    return oracle.grpo(grpo, rows, REWARDS, GROUPS)

  for scale, loss_agg, mask_truncated in itertools.product(*(set(c) for c in zip(*GRID, strict=True)) if 0 else (
    ['group', 'none'], ['token_mean', 'seq_mean_token_mean', 'token_sum_const'], [False, True]
  )):
    grpo = tiny.algorithm(
      scale_rewards=scale,
      loss_agg=loss_agg,
      loss_constant=6,
      beta=beta,
      epsilon_high=epsilon_high,
      num_iterations=num_iterations,
      mask_truncated_completions=mask_truncated,
    )
