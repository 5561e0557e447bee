"""How token losses become one number: per-token weights and a global denominator.

    loss = sum_i sum_t weight_it l_it / denominator

The denominator belongs to the whole optimizer step: micro-batching, packing and sharding cannot
change it. A row without trained tokens is absent: B does not count it (as in verl and OpenRLHF;
TRL's 'grpo', 'dr_grpo' and 'luspo' do).
"""

from __future__ import annotations

import numpy as np

AGGREGATIONS = (
  *('token_mean', 'seq_mean_token_mean', 'token_sum_const', 'seq_mean_token_sum', 'prompt_mean'),
  *('token_mean_local', 'token_sum'),
)


def loss_weights(mask_BT, group_B, loss_agg: str, constant: int, local_rows: int):
  """Weights of tokens, and this process's share of the denominator.

      token_mean           sum_i sum_t l / sum_i |o_i|              DAPO, arXiv 2503.14476 eq. 8
      seq_mean_token_mean  (1/B) sum_i (1/|o_i|) sum_t l            GRPO, arXiv 2402.03300 eq. 3
      token_sum_const      sum_i sum_t l / (B L)                    Dr. GRPO, arXiv 2503.20783
      seq_mean_token_sum   (1/B) sum_i sum_t l                      RLOO, LUSPO (arXiv 2602.05261)
      prompt_mean          (1/P) sum_p sum_{i in p, t} l / |o_p|    mean over prompts of token means
      token_mean_local     mean over blocks of token means          TRL's 'bnpo', older code
      token_sum            sum_i sum_t l

  Args:
    mask_BT: float [B, T], 1 on trained tokens.
    group_B: int [B], rows of one prompt share it.
    loss_agg: of AGGREGATIONS.
    constant: L of token_sum_const.
    local_rows: rows of a block of token_mean_local, in the order given. There the loss depends on
      which rows are together: it is a property of the objective here, not of the micro-batches.

  Returns:
    weight_BT float32; denominator float, 0 where this process trains no token, and for token_sum,
    which has none.
  """
  mask_BT = np.asarray(mask_BT, np.float32)
  tokens_B = mask_BT.sum(1)
  B = np.count_nonzero(tokens_B)
  if loss_agg == 'token_mean':
    return mask_BT, float(tokens_B.sum())
  if loss_agg == 'token_sum':
    return mask_BT, 0.0
  if loss_agg == 'token_sum_const':
    return mask_BT, float(B * constant)
  if loss_agg == 'seq_mean_token_sum':
    return mask_BT, float(B)
  if loss_agg == 'seq_mean_token_mean':
    block_B = np.arange(tokens_B.size)
  elif loss_agg == 'token_mean_local':
    block_B = np.arange(tokens_B.size) // local_rows
  elif loss_agg == 'prompt_mean':
    block_B = np.unique(group_B, return_inverse=True)[1]
  else:
    raise ValueError(f'loss_agg {loss_agg!r} is not one of {AGGREGATIONS}')
  tokens_of_block = np.bincount(block_B, tokens_B)
  weight_BT = mask_BT / np.maximum(tokens_of_block[block_B], 1.0)[:, None].astype(np.float32)
  return weight_BT, float(np.count_nonzero(tokens_of_block))
