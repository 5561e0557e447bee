"""Advantages, numbers worked by hand, then invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import advantages


def credit(rewards, groups=None, scale='group', ddof=1, eps=0.0, baseline='group_mean'):
  groups = np.zeros(len(rewards), int) if groups is None else groups
  return advantages.outcome(rewards, groups, baseline, scale, ddof, eps, float)


@pytest.mark.parametrize(
  'rewards, scale, ddof, want',
  [
    ([1, 0, 0, 1], 'group', 0, [1, -1, -1, 1]),
    ([1, 0, 0, 1], 'group', 1, [0.866025, -0.866025, -0.866025, 0.866025]),
    ([1, 0, 0, 1], 'none', 1, [0.5, -0.5, -0.5, 0.5]),
    ([1] + [0] * 7, 'group', 0, [2.645751] + [-0.377964] * 7),
    ([1] + [0] * 7, 'group', 1, [2.474874] + [-0.353553] * 7),
    ([1, 0], 'group', 1, [0.707107, -0.707107]),
  ],
)
def test_advantages_by_hand(rewards, scale, ddof, want):
  got = credit(rewards, scale=scale, ddof=ddof)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_advantage_eps_is_added_to_the_std():
  # std (ddof 1) of [1, 0] is .707107, so A = .5 / (.707107 + .292893) = .5
  np.testing.assert_allclose(credit([1, 0], eps=0.292893), [0.5, -0.5], atol=1e-6)


@pytest.mark.parametrize('scale', ['group', 'none'])
@pytest.mark.parametrize('reward', [0.0, 1.0, 0.1, -3.7e5])
def test_equal_rewards_give_exactly_zero(scale, reward):
  # eps = 0 would make 0 / 0; a one-pass or float32 mean of .1 would leave a residue.
  got = credit([reward] * 7, scale=scale)
  assert (got == 0.0).all()


def test_nearly_equal_rewards_keep_their_scale():
  # A one-pass variance E[x^2] - E[x]^2 in float32 is 0 or negative here.
  np.testing.assert_allclose(credit([1.0, 1.00001]), [-0.707107, 0.707107], rtol=1e-5)
  got = credit([1.0, 1.00001], eps=1e-4)  # 5e-6 / (7.0711e-6 + 1e-4)
  np.testing.assert_allclose(got, [-0.046698, 0.046698], rtol=1e-4)


@pytest.mark.parametrize('scale', ['group', 'none'])
@pytest.mark.parametrize('ddof', [0, 1])
def test_group_of_one_gets_zero(scale, ddof):
  assert (credit([0.7, 3.0], [0, 1], scale, ddof) == 0.0).all()


def test_groups_are_found_by_id_not_by_position():
  rewards, groups = np.array([1, 0, 0, 5, 7, 9.0]), np.array([3, 3, 3, 8, 8, 8])
  want = credit(rewards, groups)
  order = np.array([4, 0, 3, 1, 5, 2])
  np.testing.assert_array_equal(credit(rewards[order], groups[order]), want[order])
  alone = credit(rewards[:3])
  np.testing.assert_array_equal(want[:3], alone)


def test_nan_reward_is_absent_not_zero():
  got = credit([1.0, np.nan, 0.0, np.nan], scale='none')
  np.testing.assert_array_equal(got, np.float32([0.5, 0, -0.5, 0]))
  got = credit([1.0, np.nan, 0.0, np.nan])
  np.testing.assert_allclose(got, [0.707107, 0, -0.707107, 0], atol=1e-6)
  assert (credit([np.nan, 1.0, np.nan]) == 0).all()  # one reward left: nothing to compare
  assert (credit([np.nan, np.nan]) == 0).all()


def test_a_reward_of_zero_counts():
  np.testing.assert_allclose(credit([0.0, 0.0, 3.0], scale='none'), [-1, -1, 2])


@settings(max_examples=50, deadline=None)
@given(
  st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=12),
  st.sampled_from(['group', 'none']),
)
def test_advantages_sum_to_zero_in_every_group_and_are_finite(rows, scale):
  rewards, groups = np.array([r for r, _ in rows]), np.array([g for _, g in rows])
  got = credit(rewards, groups, scale, eps=1e-4)
  assert np.isfinite(got).all()
  for g in set(groups):
    assert abs(got[groups == g].sum()) < 1e-4


@pytest.mark.parametrize(
  'args, said',
  [
    (([1, 2], [0], 'none', 1, 0.0), r'rewards \(2,\) and groups \(1,\)'),
    (([[1, 2]], [[0, 0]], 'none', 1, 0.0), r'rewards \(1, 2\)'),
  ],
)
def test_bad_arguments_are_named(args, said):
  with pytest.raises(ValueError, match=said):
    advantages.outcome(args[0], args[1], 'group_mean', args[2], *args[3:], float)


def fraction(rewards, groups):
  return advantages.zero_variance(rewards, groups).mean()


def test_zero_variance():
  assert fraction([1, 1, 0, 1, 2], [0, 0, 1, 1, 2]) == pytest.approx(2 / 3)
  # As `outcome` sees them: without the NaN, group 0 is constant; group 1 has no reward.
  assert fraction([1, np.nan, 1, np.nan], [0, 0, 0, 1]) == 1.0
  assert fraction([1, np.nan, 0, np.nan], [0, 0, 0, 1]) == 0.5


# ------------------------------------------------------------------------------------ other axes


def test_leave_one_out_by_hand():
  # RLOO: r - mean of the others; [1, 0, 0, 1] -> 1 - 1/3 and 0 - 2/3.
  got = credit([1, 0, 0, 1], scale='none', baseline='leave_one_out')
  np.testing.assert_allclose(got, [2 / 3, -2 / 3, -2 / 3, 2 / 3])
  # 4 members less NaN: the others of 3 are 0 and 3, of 0 are 3 and 3.
  got = credit([3, np.nan, 0, 3], scale='none', baseline='leave_one_out')
  np.testing.assert_allclose(got, [1.5, 0, -3, 1.5])


def test_batch_std_by_hand():
  # Two groups, one mean each; the std (ddof 1) of 0, 2, 4, 6 is sqrt(20 / 3).
  got = credit([0, 2, 4, 6], [0, 0, 1, 1], scale='batch')
  np.testing.assert_allclose(got, np.array([-1, 1, -1, 1]) / np.sqrt(20 / 3))


def test_batch_std_is_that_of_all_processes():
  rewards, groups = np.array([0, 2, 4, 6.0]), np.array([0, 0, 1, 1])
  # The other process: n = 2, sum 10, and squared deviations from the common mean 3 of 4 and 6.
  answers = iter([2.0, 10.0, 10.0])
  got = advantages.outcome(
    rewards[:2], groups[:2], 'group_mean', 'batch', 1, 0.0, lambda x: x + next(answers)
  )
  np.testing.assert_allclose(got, np.array([-1, 1]) / np.sqrt(20 / 3))


def test_maxrl_by_hand():
  # (r - mean) / mean: the rarer success is, the more it counts.
  np.testing.assert_allclose(credit([1, 0, 0, 0], scale='mean'), [3, -1, -1, -1])
  np.testing.assert_allclose(credit([1, 1, 0, 0], scale='mean'), [1, 1, -1, -1])
  assert (credit([0, 0, 0, 0], scale='mean') == 0).all()
  with pytest.raises(ValueError, match="'mean' needs rewards >= 0, got -1"):
    credit([-1, 1], scale='mean')


def test_no_baseline_is_the_reward():
  got = credit([2.0, 2.0, np.nan, 5.0], [0, 0, 0, 1], scale='none', baseline='none')
  np.testing.assert_array_equal(got, [2, 2, 0, 5])


def test_gdpo_by_hand():
  """Two rewards of different scale count alike, where their sum would hide the smaller one."""
  rewards = {'big': np.array([10.0, 0, 0, 10]), 'small': np.array([1.0, 0, 1, 0]), 'x': np.zeros(4)}
  groups, weights = np.array([0, 0, 1, 1]), {'big': 1.0, 'small': 1.0}
  # z of [10, 0] is +-.707107, of [0, 10] -+; sums 1.414214, -1.414214, 0, 0; their std (ddof 1):
  # sqrt(4 / 3).
  got = advantages.normalize_then_sum(rewards, weights, groups, 1, 0.0, float)
  np.testing.assert_allclose(got, [1.224745, -1.224745, 0, 0], atol=1e-6)
  rewards = {'a': np.array([1.0, 0, np.nan, 0]), 'b': np.array([0.0, 1, np.nan, 1])}
  got = advantages.normalize_then_sum(
    rewards, {'a': 2.0, 'b': 1.0}, np.zeros(4, int), 1, 0.0, float
  )
  assert got[2] == 0.0 and got[0] > 0 and got[1] == pytest.approx(got[3])


def test_returns_by_hand():
  """gamma 0.5; token 2 of row 0 is the environment's: no discount, no reset."""
  mask_BT = np.array([[0, 1, 0, 1], [0, 1, 1, 0]], np.float32)
  reward_BT = np.array([[9, 1, 9, 2.0], [9, 4, 8, 9]])
  got = advantages.to_go(reward_BT, mask_BT, np.array([0, 1]), 0.5)
  np.testing.assert_allclose(got, [[0, 2, 0, 2], [0, 8, 8, 0]])
  joined = advantages.to_go(reward_BT, mask_BT, np.array([0, 0]), 0.5)  # two rows, one rollout
  np.testing.assert_allclose(joined, [[0, 4, 0, 6], [0, 8, 8, 0]])


def test_a_rollouts_number_lies_on_its_last_sampled_token():
  mask_BT = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], np.float32)
  got = advantages.at_last_token([3.0, 5.0], mask_BT, np.array([0, 1, 0]))
  np.testing.assert_array_equal(got, [[0, 0, 3, 0], [0, 5, 0, 0], [0, 0, 0, 0]])


def test_whitening_by_hand():
  # Over the tokens 1, 1, 4: mean 2, std (ddof 1) sqrt(3); what is masked stays 0.
  got = advantages.whiten(np.array([[1.0, 1, 7], [4, 7, 7]]), [[1, 1, 0], [1, 0, 0]], 0.0, float)
  np.testing.assert_allclose(got, np.array([[-1, -1, 0], [2, 0, 0]]) / np.sqrt(3))
  assert (advantages.whiten(np.ones((2, 2)), np.ones((2, 2)), 1e-4, float) == 0).all()


@pytest.mark.parametrize(
  'mode, low, high, want',
  [
    ('token_truncate', None, 1.5, [0.5, 1.5, 1]),
    ('token_truncate', 0.8, 1.5, [0.8, 1.5, 1]),
    ('token_mask', None, 1.5, [0.5, 0, 1]),
    ('token_mask', 0.8, 3.0, [0, 2, 1]),
    ('sequence_truncate', None, 3.0, [1, 1, 1]),
    ('sequence_truncate', 1.2, 3.0, [1.2, 1.2, 1]),
    ('sequence_mask', None, 0.9, [0, 0, 1]),
    ('sequence_mask', None, 3.0, [1, 1, 1]),
  ],
)
def test_importance_by_hand(mode, low, high, want):
  """rho = .5 and 2 on the sampled tokens, whose product is 1; the last token is not sampled."""
  old_BT = np.log([[0.25, 0.5, 0.9]])
  sampler_BT = np.log([[0.5, 0.25, 0.1]])
  got = advantages.importance(old_BT, sampler_BT, np.array([[1, 1, 0]]), mode, low, high)
  np.testing.assert_allclose(got, [want])


@settings(max_examples=50, deadline=None)
@given(
  st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8),
  st.sampled_from(advantages.BASELINES),
  st.sampled_from(['group', 'batch', 'none']),
  st.randoms(),
)
def test_permuting_rollouts_permutes_credit(rewards, baseline, scale, random):
  groups = np.arange(len(rewards)) % 2
  order = list(range(len(rewards)))
  random.shuffle(order)
  want = credit(rewards, groups, scale, eps=1e-4, baseline=baseline)
  got = credit(np.array(rewards)[order], groups[order], scale, eps=1e-4, baseline=baseline)
  np.testing.assert_allclose(got, want[order], rtol=1e-9, atol=1e-9)
