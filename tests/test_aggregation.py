"""Aggregation, numbers worked by hand (arXiv 2402.03300, 2503.14476, 2503.20783), invariances."""

from __future__ import annotations

import numpy as np
import pytest

from reasonrl import aggregation


def weigh(mask_BT, loss_agg, group_B=None, local_rows=1):
  """L = 8; all rows of one prompt, each a block of its own."""
  group_B = np.zeros(len(mask_BT), int) if group_B is None else group_B
  return aggregation.loss_weights(mask_BT, group_B, loss_agg, 8, local_rows)


MASK = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]], np.float32)  # lengths 2 and 4


@pytest.mark.parametrize(
  'loss_agg, J',
  [
    ('seq_mean_token_mean', 0.0),
    ('token_mean', -1 / 3),
    ('token_sum_const', -0.125),
    ('seq_mean_token_sum', -1.0),
    ('token_sum', -2.0),
    ('prompt_mean', -1 / 3),
    ('token_mean_local', 0.0),
  ],
)
def test_aggregation_by_hand(loss_agg, J):
  """A = +1 on the short row, -1 on the long one, ratio 1, L = 8."""
  weight_BT, denominator = weigh(MASK, loss_agg)
  assert weight_BT.dtype == np.float32
  assert (weight_BT * np.array([[1.0], [-1.0]])).sum() / (denominator or 1.0) == pytest.approx(J)
  assert (weight_BT[MASK == 0] == 0).all()


@pytest.mark.parametrize('loss_agg', aggregation.AGGREGATIONS)
def test_a_row_without_trained_tokens_is_absent(loss_agg):
  padded = np.concatenate([MASK, np.zeros((1, 5), np.float32)])
  weight_BT, denominator = weigh(padded, loss_agg)
  want_BT, want = weigh(MASK, loss_agg)
  assert denominator == want
  np.testing.assert_array_equal(weight_BT[:2], want_BT)


@pytest.mark.parametrize('loss_agg', aggregation.AGGREGATIONS)
def test_nothing_to_train_on_is_zero_over_one(loss_agg):
  weight_BT, denominator = weigh(np.zeros((2, 3)), loss_agg)
  assert (weight_BT == 0).all() and denominator == 0.0


@pytest.mark.parametrize('loss_agg', aggregation.AGGREGATIONS)
def test_padding_changes_no_weight(loss_agg):
  wide = np.pad(MASK, ((0, 0), (0, 3)))
  weight_BT, denominator = weigh(wide, loss_agg)
  want_BT, want = weigh(MASK, loss_agg)
  assert denominator == want
  np.testing.assert_array_equal(weight_BT[:, :5], want_BT)


def test_unknown_aggregation_lists_the_choices():
  with pytest.raises(ValueError, match="loss_agg 'mean' is not one of .*token_mean"):
    weigh(MASK, 'mean')


def test_blocks_and_prompts_by_hand():
  """Lengths 1, 3, 2; rows 0 and 1 are one block, rows 0 and 2 one prompt."""
  mask = np.array([[0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]], np.float32)
  weight_BT, denominator = weigh(mask, 'token_mean_local', local_rows=2)
  np.testing.assert_allclose(weight_BT.max(1), [1 / 4, 1 / 4, 1 / 2])
  assert denominator == 2
  weight_BT, denominator = weigh(mask, 'prompt_mean', np.array([7, 3, 7]))
  np.testing.assert_allclose(weight_BT.max(1), [1 / 3, 1 / 3, 1 / 3])
  assert denominator == 2
