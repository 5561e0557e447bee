"""The operations that policy-gradient algorithms share, pure and tested on hand-worked numbers.

Group statistics run on the host in NumPy float64 (a few numbers per rollout, grouped by id);
token-level operations are jnp and elementwise, so they run inside the fused loss.
Not complete algorithms: those are in `algorithms/`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def group_advantages(reward_R, group_R, scale: str, ddof: int, eps: float) -> np.ndarray:
  """Group-relative advantages.

      A_i = (r_i - mean_g) / (std_g + eps)      scale 'group'  (GRPO, arXiv 2402.03300 sec. 4.1.2)
      A_i =  r_i - mean_g                       scale 'none'   (Dr. GRPO, arXiv 2503.20783)

  with std_g the two-pass standard deviation with `ddof` delta degrees of freedom (torch.std: 1).
  A group whose rewards are all equal, or with one member, gets exactly 0. A NaN reward (no reward
  function applies) is left out of its group's statistics and gets 0.

  Args:
    reward_R: float [R].
    group_R: int [R], any ids; rows of a group need not be adjacent.
    scale: 'group' | 'none'.
    ddof: delta degrees of freedom.
    eps: added to the standard deviation.

  Returns:
    float32 [R].
  """
  reward_R, group_R = np.asarray(reward_R, np.float64), np.asarray(group_R)
  if reward_R.shape != group_R.shape or reward_R.ndim != 1:
    raise ValueError(f'group_advantages: rewards {reward_R.shape} and groups {group_R.shape}')
  if scale not in ('group', 'none'):
    raise ValueError(f"group_advantages: scale {scale!r} is not one of 'group', 'none'")
  adv_R = np.zeros_like(reward_R)
  for group in np.unique(group_R):
    members = (group_R == group) & ~np.isnan(reward_R)
    r = reward_R[members]
    if r.size <= max(ddof, 1) or np.all(r == r[0]):
      continue  # no signal: 0, not 0 / eps and not NaN
    centred = r - r.mean()
    if scale == 'group':
      centred = centred / (np.sqrt((centred**2).sum() / (r.size - ddof)) + eps)
    adv_R[members] = centred
  return adv_R.astype(np.float32)


def zero_variance_fraction(reward_R, group_R) -> float:
  """Share of groups whose rewards, NaN left out, are all equal or none: they carry no gradient."""
  reward_R, group_R = np.asarray(reward_R), np.asarray(group_R)
  groups = [reward_R[(group_R == g) & ~np.isnan(reward_R)] for g in np.unique(group_R)]
  return float(np.mean([np.all(r == r[:1]) for r in groups]))


def log_ratio(logp, old_logp, weight):
  """log pi - log pi_old, zeroed where weight is 0 BEFORE any exp.

  mask * exp(x) has a finite value but a NaN gradient where a masked x overflows exp.
  """
  return jnp.where(weight > 0, logp - old_logp, 0.0)


def ppo_clip(ratio, adv, epsilon_low: float, epsilon_high: float):
  """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)   (arXiv 1707.06347 eq. 7; elementwise).

  Returns:
    loss, and float32 indicators (clipped low, clipped high) that count a token only where the
    clipped branch is selected and its gradient is zero.
  """
  clipped = jnp.clip(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high)
  loss = -jnp.minimum(ratio * adv, clipped * adv)
  low = ((ratio < 1.0 - epsilon_low) & (adv < 0)).astype(jnp.float32)
  high = ((ratio > 1.0 + epsilon_high) & (adv > 0)).astype(jnp.float32)
  return loss, low, high


def kl_k3(logp, ref_logp, weight):
  """k3 = exp(d) - d - 1 with d = log pi_ref - log pi: >= 0, unbiased for KL(pi || pi_ref).

  (http://joschu.net/blog/kl-approx.html; arXiv 2402.03300 eq. 4.) 0 where weight is 0.
  """
  d = log_ratio(ref_logp, logp, weight)
  return jnp.expm1(d) - d


def loss_weights(mask_BT, loss_agg: str, token_constant: int):
  """Per-token weights and the global denominator that turn a sum of token losses into an aggregate.

      token_mean            sum_i sum_t l / sum_i |o_i|      DAPO, arXiv 2503.14476 eq. 8
      seq_mean_token_mean   (1/B) sum_i (1/|o_i|) sum_t l    GRPO, arXiv 2402.03300 eq. 3
      token_sum_const       sum_i sum_t l / (B L)            Dr. GRPO, arXiv 2503.20783, L constant

  The denominator belongs to the whole optimizer step: micro-batching, packing and sharding cannot
  change it. This is one process's share of it, 0 where it trains no token. A row without trained
  tokens is absent: B does not count it (as in verl and OpenRLHF; TRL's 'grpo' and 'dr_grpo' do).

  Args:
    mask_BT: float [B, T], 1 on trained tokens.
    loss_agg: one of the three names.
    token_constant: L, used by token_sum_const only.

  Returns:
    weight_BT float32, denominator float.
  """
  mask_BT = np.asarray(mask_BT, np.float32)
  tokens_B = mask_BT.sum(1)
  B = np.count_nonzero(tokens_B)
  if loss_agg == 'token_mean':
    return mask_BT, float(tokens_B.sum())
  if loss_agg == 'seq_mean_token_mean':
    return mask_BT / np.maximum(tokens_B, 1.0)[:, None], float(B)
  if loss_agg == 'token_sum_const':
    return mask_BT, float(B * token_constant)
  choices = ('token_mean', 'seq_mean_token_mean', 'token_sum_const')
  raise ValueError(f'loss_agg {loss_agg!r} is not one of {choices}')
