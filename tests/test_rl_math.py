"""Numbers worked by hand on arXiv 2402.03300, 2503.14476 and 2503.20783, then invariances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import rl_math


def advantages(rewards, groups=None, scale='group', ddof=1, eps=0.0):
  groups = np.zeros(len(rewards), int) if groups is None else groups
  return rl_math.group_advantages(rewards, groups, scale, ddof, eps)


# ------------------------------------------------------------------------------------ advantages


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
  got = advantages(rewards, scale=scale, ddof=ddof)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_advantage_eps_is_added_to_the_std():
  # std (ddof 1) of [1, 0] is .707107, so A = .5 / (.707107 + .292893) = .5
  np.testing.assert_allclose(advantages([1, 0], eps=0.292893), [0.5, -0.5], atol=1e-6)


@pytest.mark.parametrize('scale', ['group', 'none'])
@pytest.mark.parametrize('reward', [0.0, 1.0, 0.1, -3.7e5])
def test_equal_rewards_give_exactly_zero(scale, reward):
  # eps = 0 would make 0 / 0; a one-pass or float32 mean of .1 would leave a residue.
  got = advantages([reward] * 7, scale=scale)
  assert (got == 0.0).all()


def test_nearly_equal_rewards_keep_their_scale():
  # A one-pass variance E[x^2] - E[x]^2 in float32 is 0 or negative here.
  np.testing.assert_allclose(advantages([1.0, 1.00001]), [-0.707107, 0.707107], rtol=1e-5)
  got = advantages([1.0, 1.00001], eps=1e-4)  # 5e-6 / (7.0711e-6 + 1e-4)
  np.testing.assert_allclose(got, [-0.046698, 0.046698], rtol=1e-4)


@pytest.mark.parametrize('scale', ['group', 'none'])
@pytest.mark.parametrize('ddof', [0, 1])
def test_group_of_one_gets_zero(scale, ddof):
  assert (advantages([0.7, 3.0], [0, 1], scale, ddof) == 0.0).all()


def test_groups_are_found_by_id_not_by_position():
  rewards, groups = np.array([1, 0, 0, 5, 7, 9.0]), np.array([3, 3, 3, 8, 8, 8])
  want = advantages(rewards, groups)
  order = np.array([4, 0, 3, 1, 5, 2])
  np.testing.assert_array_equal(advantages(rewards[order], groups[order]), want[order])
  alone = advantages(rewards[:3])
  np.testing.assert_array_equal(want[:3], alone)


def test_nan_reward_is_absent_not_zero():
  got = advantages([1.0, np.nan, 0.0, np.nan], scale='none')
  np.testing.assert_array_equal(got, np.float32([0.5, 0, -0.5, 0]))
  got = advantages([1.0, np.nan, 0.0, np.nan])
  np.testing.assert_allclose(got, [0.707107, 0, -0.707107, 0], atol=1e-6)
  assert (advantages([np.nan, 1.0, np.nan]) == 0).all()  # one reward left: nothing to compare
  assert (advantages([np.nan, np.nan]) == 0).all()


def test_a_reward_of_zero_counts():
  np.testing.assert_allclose(advantages([0.0, 0.0, 3.0], scale='none'), [-1, -1, 2])


@settings(max_examples=50, deadline=None)
@given(
  st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=12),
  st.sampled_from(['group', 'none']),
)
def test_advantages_sum_to_zero_in_every_group_and_are_finite(rows, scale):
  rewards, groups = np.array([r for r, _ in rows]), np.array([g for _, g in rows])
  got = advantages(rewards, groups, scale, eps=1e-4)
  assert np.isfinite(got).all()
  for g in set(groups):
    assert abs(got[groups == g].sum()) < 1e-4


@pytest.mark.parametrize(
  'args, said',
  [
    (([1, 2], [0, 0], 'batch', 1, 0.0), "scale 'batch' is not one of 'group', 'none'"),
    (([1, 2], [0], 'none', 1, 0.0), r'rewards \(2,\) and groups \(1,\)'),
    (([[1, 2]], [[0, 0]], 'none', 1, 0.0), r'rewards \(1, 2\)'),
  ],
)
def test_bad_arguments_are_named(args, said):
  with pytest.raises(ValueError, match=said):
    rl_math.group_advantages(*args)


def test_zero_variance_fraction():
  assert rl_math.zero_variance_fraction([1, 1, 0, 1, 2], [0, 0, 1, 1, 2]) == pytest.approx(2 / 3)
  # As `group_advantages` sees them: without the NaN, group 0 is constant; group 1 has no reward.
  assert rl_math.zero_variance_fraction([1, np.nan, 1, np.nan], [0, 0, 0, 1]) == 1.0
  assert rl_math.zero_variance_fraction([1, np.nan, 0, np.nan], [0, 0, 0, 1]) == 0.5


# ------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize(
  'ratio, adv, loss, slope, low, high',
  [
    (1.3, 1.0, -1.2, 0.0, 0, 1),
    (1.3, -1.0, 1.3, 1.0, 0, 0),
    (0.7, 1.0, -0.7, -1.0, 0, 0),
    (0.7, -1.0, 0.8, 0.0, 1, 0),
    (1.1, 2.0, -2.2, -2.0, 0, 0),
    (1.3, 0.0, 0.0, 0.0, 0, 0),
  ],
)
def test_ppo_clip_by_hand(ratio, adv, loss, slope, low, high):
  got, *clipped = rl_math.ppo_clip(jnp.float32(ratio), jnp.float32(adv), 0.2, 0.2)
  assert float(got) == pytest.approx(loss, abs=1e-6)
  assert [float(x) for x in clipped] == [low, high]
  derivative = jax.grad(lambda r: rl_math.ppo_clip(r, adv, 0.2, 0.2)[0])(jnp.float32(ratio))
  assert float(derivative) == pytest.approx(slope, abs=1e-6)


def test_clip_higher_moves_the_upper_bound_alone():
  clip = lambda r, a: [float(x) for x in rl_math.ppo_clip(jnp.float32(r), a, 0.2, 0.28)]
  assert clip(1.25, 1.0) == pytest.approx([-1.25, 0, 0])
  assert clip(1.3, 1.0) == pytest.approx([-1.28, 0, 1])
  assert clip(0.7, -1.0) == pytest.approx([0.8, 1, 0])


def test_epsilon_ten_leaves_no_lower_bound():
  # R1's epsilon: 1 - 10 < 0, and a ratio is positive.
  got = rl_math.ppo_clip(jnp.float32(1e-3), -1.0, 10.0, 10.0)
  assert [float(x) for x in got] == pytest.approx([1e-3, 0, 0])


def test_ratio_of_one_has_the_gradient_of_the_advantage():
  # jnp.minimum splits the gradient of a tie in two halves: they must add up.
  slope = jax.grad(lambda r: rl_math.ppo_clip(r, jnp.float32(0.7), 0.2, 0.2)[0])(jnp.float32(1.0))
  assert float(slope) == pytest.approx(-0.7)


# ------------------------------------------------------------------------------------ KL


@pytest.mark.parametrize('ref, want', [(0.25, 0.193147), (0.75, 0.094535), (0.5, 0.0)])
def test_k3_by_hand(ref, want):
  got = rl_math.kl_k3(jnp.log(0.5), jnp.log(ref), jnp.float32(1.0))
  assert float(got) == pytest.approx(want, abs=1e-6)


def test_mean_k3_is_the_kl():
  # KL((.5, .5) || (.25, .75)) = .143841
  got = rl_math.kl_k3(jnp.log(jnp.full(2, 0.5)), jnp.log(jnp.array([0.25, 0.75])), jnp.ones(2))
  assert float(got.mean()) == pytest.approx(0.143841, abs=1e-6)


def test_k3_of_close_distributions_does_not_cancel():
  # exp(d) - d - 1 in float32 is 0 or 1e-7 here; the truth is d^2 / 2 = 5e-9.
  got = rl_math.kl_k3(jnp.float32(-1.0), jnp.float32(-1.0001), jnp.float32(1.0))
  d = np.float64(np.float32(-1.0001)) + 1.0
  assert float(got) == pytest.approx(d * d / 2, rel=1e-2)


# ------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize('junk', [1e3, -1e3, np.nan, np.inf])
@pytest.mark.parametrize('where', [0, 1, 2, 3])
def test_masked_tokens_cannot_reach_value_or_gradient(junk, where):
  weight = jnp.array([1.0, 0.0, 1.0])

  def total(logp, old, ref, adv):
    ratio = jnp.exp(rl_math.log_ratio(logp, old, weight))
    loss = rl_math.ppo_clip(ratio, adv, 0.2, 0.2)[0] + 0.1 * rl_math.kl_k3(logp, ref, weight)
    return jnp.where(weight > 0, weight * loss, 0.0).sum()

  def at(x):
    arrays = np.float32([[-1, -1, -2], [-1.1, -1, -2], [-1.5, -1.5, -1.5], [1, 1, -1]])
    arrays[where, 1] = x
    value, grad = jax.value_and_grad(total)(*arrays)
    return np.asarray(value), np.asarray(grad)

  (value, grad), (clean, want) = at(junk), at(-1.0)
  assert value == clean
  np.testing.assert_array_equal(grad, want)
  assert np.isfinite(want).all() and want[0] != 0 and want[2] != 0 and want[1] == 0


# ------------------------------------------------------------------------------------ aggregation

MASK = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]], np.float32)  # lengths 2 and 4


@pytest.mark.parametrize(
  'loss_agg, J',
  [('seq_mean_token_mean', 0.0), ('token_mean', -1 / 3), ('token_sum_const', -0.125)],
)
def test_aggregation_by_hand(loss_agg, J):
  """A = +1 on the short row, -1 on the long one, ratio 1, L = 8."""
  weight_BT, denominator = rl_math.loss_weights(MASK, loss_agg, 8)
  assert weight_BT.dtype == np.float32
  assert (weight_BT * np.array([[1.0], [-1.0]])).sum() / denominator == pytest.approx(J)
  assert (weight_BT[MASK == 0] == 0).all()


@pytest.mark.parametrize('loss_agg', ['seq_mean_token_mean', 'token_mean', 'token_sum_const'])
def test_a_row_without_trained_tokens_is_absent(loss_agg):
  padded = np.concatenate([MASK, np.zeros((1, 5), np.float32)])
  weight_BT, denominator = rl_math.loss_weights(padded, loss_agg, 8)
  want_BT, want = rl_math.loss_weights(MASK, loss_agg, 8)
  assert denominator == want
  np.testing.assert_array_equal(weight_BT[:2], want_BT)


@pytest.mark.parametrize('loss_agg', ['seq_mean_token_mean', 'token_mean', 'token_sum_const'])
def test_nothing_to_train_on_is_zero_over_one(loss_agg):
  weight_BT, denominator = rl_math.loss_weights(np.zeros((2, 3)), loss_agg, 8)
  assert (weight_BT == 0).all() and denominator == 0.0


@pytest.mark.parametrize('loss_agg', ['seq_mean_token_mean', 'token_mean', 'token_sum_const'])
def test_padding_changes_no_weight(loss_agg):
  wide = np.pad(MASK, ((0, 0), (0, 3)))
  weight_BT, denominator = rl_math.loss_weights(wide, loss_agg, 8)
  want_BT, want = rl_math.loss_weights(MASK, loss_agg, 8)
  assert denominator == want
  np.testing.assert_array_equal(weight_BT[:, :5], want_BT)


def test_unknown_aggregation_lists_the_choices():
  with pytest.raises(ValueError, match="loss_agg 'mean' is not one of .*token_mean"):
    rl_math.loss_weights(MASK, 'mean', 8)
