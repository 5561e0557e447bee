"""Picking, renumbering and joining rows of experience."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from reasonrl import records, rollouts, types


def sample(rewards=(1.0, 0.0, 0.5, 0.25), groups=(0, 0, 1, 1), lengths=(1, 3, 2, 2), **changes):
  return tiny.experience(list(rewards), list(groups), list(lengths), **changes)


def threads():
  """Five rows, three rollouts: rollout 0 and 2 have two rows each."""
  whole = sample((0.1, 0.2, 0.3), (0, 0, 4), (1, 2, 3))
  rows = np.array([0, 0, 1, 2, 2])
  return rollouts.take_rows(whole, rows)


def test_mask_is_one_exactly_on_policy_tokens():
  source = np.array([[0, 1, 2, 1, 0]], np.int8)
  changed = dataclasses.replace(sample((1.0,), (0,), (3,)), source_BT=source)
  np.testing.assert_array_equal(changed.mask_BT, [[0, 1, 0, 1, 0]])
  assert changed.mask_BT.dtype == np.float32


def test_take_rows_keeps_rollouts_whole():
  whole = sample(reward_BT=np.ones((4, 5), np.float32))
  whole = dataclasses.replace(whole, scores={'old_logp': np.arange(20.0).reshape(4, 5)})
  part = rollouts.take_rows(whole, np.array([2, 0]))
  np.testing.assert_array_equal(part.tokens_BT, whole.tokens_BT[[2, 0]])
  np.testing.assert_array_equal(part.group_B, [1, 0])
  np.testing.assert_array_equal(part.rollout_B, [2, 0])
  np.testing.assert_array_equal(part.scores['old_logp'], whole.scores['old_logp'][[2, 0]])
  assert part.reward_BT.shape == (2, 5)
  np.testing.assert_array_equal(part.reward_R, whole.reward_R)
  assert part.examples == whole.examples


def test_every_field_with_a_row_axis_is_picked():
  whole = sample(
    reward_BT=np.ones((4, 5), np.float32), support={'kept': np.ones((4, 5, 3), np.int32)}
  )
  part = rollouts.take_rows(whole, np.array([1]))
  assert part.support['kept'].shape[0] == 1
  for field in dataclasses.fields(types.Experience):
    if field.name.endswith(('_B', '_BT')):
      assert getattr(part, field.name).shape[0] == 1, field.name


def test_take_groups_renumbers_rollouts_and_keeps_group_ids():
  part = rollouts.take_groups(threads(), [4])
  np.testing.assert_array_equal(part.group_B, [4, 4])
  np.testing.assert_array_equal(part.rollout_B, [0, 0])
  np.testing.assert_array_equal(part.reward_R, np.float32([0.3]))
  np.testing.assert_array_equal(part.parts['accuracy'], np.float32([0.3]))
  assert [e.index for e in part.examples] == [2]
  assert [c.text for c in part.completions] == ['c2']
  both = rollouts.take_groups(threads(), [0, 4])
  np.testing.assert_array_equal(both.rollout_B, [0, 0, 1, 2, 2])


def test_take_groups_of_shuffled_rows_keeps_reward_and_row_together():
  whole = sample()
  order = np.array([3, 1, 2, 0])
  part = rollouts.take_groups(rollouts.take_rows(whole, order), [1])
  np.testing.assert_array_equal(part.tokens_BT, whole.tokens_BT[[3, 2]])
  np.testing.assert_array_equal(part.reward_R[part.rollout_B], whole.reward_R[[3, 2]])


def test_concatenate_shifts_ids_and_pads_to_the_widest():
  first = sample(lengths=(1, 3, 2, 2))
  second = sample((2.0, 3.0, 4.0), (0, 0, 1), (6, 1, 2), seed=1)
  first, second = (
    dataclasses.replace(e, scores={'old_logp': e.logp_BT - 1.0}) for e in (first, second)
  )
  joined = rollouts.concatenate([first, second])
  assert joined.tokens_BT.shape == (7, 8)
  np.testing.assert_array_equal(joined.tokens_BT[:4, :5], first.tokens_BT)
  assert (joined.tokens_BT[:4, 5:] == 0).all() and (joined.mask_BT[:4, 5:] == 0).all()
  np.testing.assert_array_equal(joined.tokens_BT[4:], second.tokens_BT)
  np.testing.assert_array_equal(joined.scores['old_logp'][4:], second.scores['old_logp'])
  np.testing.assert_array_equal(joined.group_B, [0, 0, 1, 1, 2, 2, 3])
  np.testing.assert_array_equal(joined.rollout_B, np.arange(7))
  np.testing.assert_array_equal(joined.reward_R, [1.0, 0.0, 0.5, 0.25, 2.0, 3.0, 4.0])
  assert [e.problem for e in joined.examples] == ['p0', 'p1', 'p2', 'p3', 'p0', 'p1', 'p2']
  for name in ('tokens_BT', 'group_B', 'rollout_B', 'reward_R', 'logp_BT', 'source_BT'):
    assert getattr(joined, name).dtype == getattr(first, name).dtype, name


def test_concatenate_then_take_groups_is_the_part():
  first, second = sample(), sample(seed=1)
  back = rollouts.take_groups(rollouts.concatenate([first, second]), [2, 3])
  np.testing.assert_array_equal(back.tokens_BT, second.tokens_BT)
  np.testing.assert_array_equal(back.rollout_B, second.rollout_B)
  np.testing.assert_array_equal(back.reward_R, second.reward_R)


def test_concatenate_keeps_threads_of_a_rollout_together():
  joined = rollouts.concatenate([threads(), threads()])
  np.testing.assert_array_equal(joined.rollout_B, [0, 0, 1, 2, 2, 3, 3, 4, 5, 5])
  np.testing.assert_array_equal(joined.group_B, [0, 0, 0, 4, 4, 5, 5, 5, 9, 9])


def test_concatenate_fills_what_only_some_have():
  # A named part of a reward, and credit per token, may be missing from one of two rollouts.
  first = sample(parts={'accuracy': np.zeros(4, np.float32), 'accuracy/extra': np.ones(4)})
  second = dataclasses.replace(sample(), reward_BT=np.ones((4, 5), np.float32))
  joined = rollouts.concatenate([first, second])
  np.testing.assert_array_equal(joined.parts['accuracy/extra'], [1.0] * 4 + [np.nan] * 4)
  assert joined.parts['accuracy'].shape == (8,)
  np.testing.assert_array_equal(joined.reward_BT.sum(1), [0.0] * 4 + [5.0] * 4)
  assert rollouts.concatenate([first, first]).reward_BT is None


def test_kept_ids_are_picked_and_joined_whatever_their_width():
  ids = np.arange(4 * 5 * 2, dtype=np.int32).reshape(4, 5, 2)
  first = sample(support={'kept': ids})
  longer = np.full((4, 8, 1), 7, np.int32)
  second = sample(lengths=(6, 1, 2, 2), support={'kept': longer})
  joined = rollouts.concatenate([first, sample(), second])
  kept_BTK = joined.support['kept']
  assert kept_BTK.shape == (12, 8, 2) and kept_BTK.dtype == np.int32
  np.testing.assert_array_equal(kept_BTK[:4, :5], ids)
  np.testing.assert_array_equal(kept_BTK[8:, :, 0], longer[..., 0])
  for nothing in (kept_BTK[:4, 5:], kept_BTK[4:8], kept_BTK[8:, :, 1]):
    assert (nothing == -1).all()
  part = rollouts.take_groups(joined, [1])
  np.testing.assert_array_equal(part.support['kept'][:, :5], ids[2:])
  assert sample().support == {} and rollouts.concatenate([sample(), sample()]).support == {}


def test_rewards_add_up_and_nan_means_that_none_applies():
  values = np.float32([[1.0, np.nan, 0.5, np.nan], [0.5, 2.0, np.nan, np.nan]])
  dense = np.ones((4, 5), np.float32)
  scores = [
    types.BatchScore(values[0], {'a': values[0]}, None),
    types.BatchScore(values[1], {'b': values[1], 'b/x': values[0]}, dense),
  ]
  got = rollouts.rewarded(sample(), scores, {'a': 0.5})
  np.testing.assert_array_equal(got.reward_R, np.float32([1.5, 2.0, 0.5, np.nan]))
  assert list(got.parts) == ['a', 'b', 'b/x'] and got.reward_R.dtype == np.float32
  assert got.reward_weights == {'a': 0.5}
  np.testing.assert_array_equal(got.reward_BT, dense)
  np.testing.assert_array_equal(
    rollouts.rewarded(sample(), [scores[1]] * 2, {}).reward_BT, 2 * dense
  )
  assert rollouts.rewarded(sample(), scores[:1], {}).reward_BT is None


def test_token_rewards_lie_on_the_completion():
  whole = sample((1.0, 0.0), (0, 0), (1, 3))  # prompts of two tokens
  got = rollouts.token_rewards(whole, [None, np.float32([1, 2, 3])])
  np.testing.assert_array_equal(got, [[0, 0, 0, 0, 0], [0, 0, 1, 2, 3]])
  # A token that a control wrote is one of the completion.
  source_BT = whole.source_BT.copy()
  source_BT[1, 3] = types.ENVIRONMENT
  written = dataclasses.replace(whole, source_BT=source_BT)
  np.testing.assert_array_equal(rollouts.token_rewards(written, [None, np.float32([1, 2, 3])]), got)
  # A rollout of two rows: its values run on from the first row into the second.
  two = rollouts.take_rows(sample((1.0,), (0,), (2,)), np.array([0, 0]))
  got = rollouts.token_rewards(two, [np.float32([1, 2, 3, 4])])
  np.testing.assert_array_equal(got, [[0, 0, 1, 2], [0, 0, 3, 4]])


@pytest.mark.parametrize(
  'field, value',
  [
    *(('temperature', -0.1), ('top_k', -1), ('top_p', 0.0), ('top_p', 1.1), ('min_p', -0.1)),
    *(('min_p', 1.1), ('max_kept_tokens', -1), ('stop_ids', ())),
  ],
)
def test_spec_refuses_what_cannot_be_sampled(field, value):
  good = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'max_kept_tokens': 0}
  good |= {'stop_ids': (1,), 'controls': ()}
  types.Spec(**good)
  with pytest.raises(records.UserError, match=rf'{field}='):
    types.Spec(**(good | {field: value}))
