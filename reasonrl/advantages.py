"""Credit on the host, in NumPy float64: from the rewards of rollouts to advantages.

1. `outcome`: rewards minus a baseline, divided by a scale: one number per rollout;
   `normalize_then_sum` does it for every reward function on its own.
2. `to_go`: rewards of single tokens become returns.
3. `whiten`: zero mean and unit variance over the tokens of the batch.
4. `importance`: weights that correct for tokens drawn by another policy than the trainer's.

Groups are given by id, never by position. A batch is that of all processes: `total` sums a float
over them. A NaN reward (no reward function applies) takes no part and gets 0.
"""

from __future__ import annotations

import numpy as np

BASELINES = ('group_mean', 'leave_one_out', 'batch_mean', 'none')
SCALES = ('group', 'batch', 'mean', 'none')
CORRECTIONS = ('none', 'token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask')


def outcome(reward_R, group_R, baseline: str, scale: str, ddof: int, eps: float, total):
  """A_i = (r_i - b_i) / s_i.

      b 'group_mean'     mean of the group                        GRPO, arXiv 2402.03300 sec. 4.1.2
        'leave_one_out'  mean of the others of the group          RLOO, arXiv 2402.14740 eq. 5
        'batch_mean'     mean of all rewards of the batch
        'none'           0                                        REINFORCE++, arXiv 2501.03262
      s 'group'          std of the group + eps                   GRPO
        'batch'          std of all rewards of the batch + eps    arXiv 2508.08221
        'mean'           mean of the group (rewards >= 0)         MaxRL, arXiv 2602.02710
        'none'           1                                        Dr. GRPO, arXiv 2503.20783

  std is the two-pass standard deviation with `ddof` delta degrees of freedom (torch.std: 1). With a
  baseline of the group, a group of equal rewards, or with one member, gets exactly 0.

  Args:
    reward_R: float [R].
    group_R: int [R], any ids; rollouts of a group need not be adjacent.
    baseline: of BASELINES.
    scale: of SCALES.
    ddof: delta degrees of freedom.
    eps: added to a standard deviation.
    total: the sum of a float over all processes.

  Returns:
    float64 [R].

  Raises:
    ValueError: shapes differ; 'mean' and a reward below 0.
  """
  reward_R, group_R = np.asarray(reward_R, np.float64), np.asarray(group_R)
  if reward_R.shape != group_R.shape or reward_R.ndim != 1:
    raise ValueError(f'outcome: rewards {reward_R.shape} and groups {group_R.shape}')
  applies = ~np.isnan(reward_R)
  if scale == 'mean' and np.any(reward_R[applies] < 0):
    raise ValueError(f"scale_rewards='mean' needs rewards >= 0, got {np.nanmin(reward_R)}")
  alone = baseline in ('none', 'batch_mean')  # a rollout needs no others of its group
  shift, (r, n) = 0.0, (reward_R[applies], applies.sum())
  if baseline == 'batch_mean':
    shift = total(float(r.sum())) / max(total(float(n)), 1.0)
  adv_R = np.where(applies & alone, reward_R - shift, 0.0)
  for group in np.unique(group_R):
    members = (group_R == group) & applies
    r = reward_R[members]
    if alone or r.size < 2 or np.all(r == r[0]):
      continue  # no signal: 0, not 0 / eps and not NaN
    adv_r = r - r.mean()
    if baseline == 'leave_one_out':
      adv_r *= r.size / (r.size - 1)
    if scale == 'group':
      adv_r /= std(r, ddof, float) + eps
    if scale == 'mean':
      adv_r /= r.mean()
    adv_R[members] = adv_r
  if scale == 'batch':
    adv_R /= std(reward_R[applies], ddof, total) + eps
  return adv_R


def normalize_then_sum(rewards, weights, group_R, ddof: int, eps: float, total):
  """GDPO (arXiv 2601.05242): each reward's group z-score, their weighted sum, its batch z-score.

      z_ki = (r_ki - mean_g) / (std_g + eps)
      x_i = sum_k w_k z_ki
      A_i = (x_i - mean) / (std + eps)

  Args:
    rewards: name -> float [R]; NaN where one does not apply.
    weights: name -> weight; its keys are the rewards that count.
    group_R: as in `outcome`, as are the rest.
  """
  z_KR, none_R = [], np.ones(np.shape(group_R), bool)
  for name, weight in weights.items():
    z_KR.append(weight * outcome(rewards[name], group_R, 'group_mean', 'group', ddof, eps, total))
    none_R &= np.isnan(rewards[name])
  x_R = np.sum(z_KR, 0)
  kept = x_R[~none_R]
  mean = total(float(kept.sum())) / max(total(float(kept.size)), 1.0)
  return np.where(none_R, 0.0, (x_R - mean) / (std(kept, ddof, total) + eps))


def std(x, ddof: int, total) -> float:
  """sqrt(sum (x - mean)^2 / (n - ddof)) over all processes, in two passes; 0 where n <= ddof."""
  n = total(float(x.size))
  if n <= ddof:
    return 0.0
  mean = total(float(x.sum())) / n
  return float(np.sqrt(total(float(((x - mean) ** 2).sum())) / (n - ddof)))


def to_go(reward_BT, mask_BT, rollout_B, gamma: float):
  """G_t = r_t + gamma G_{t'}, t' the next sampled token of the rollout, over all its rows in order.

  Tokens that the policy did not sample are stepped over: they neither discount nor end a return.
  """
  out_BT = np.zeros(np.shape(reward_BT), np.float64)
  for rollout in np.unique(rollout_B):
    value = 0.0
    for b in np.flatnonzero(rollout_B == rollout)[::-1]:
      for t in np.flatnonzero(mask_BT[b])[::-1]:
        value = reward_BT[b, t] + gamma * value
        out_BT[b, t] = value
  return out_BT


def at_last_token(value_R, mask_BT, rollout_B):
  """[B, T]: a rollout's number on its last sampled token, 0 elsewhere."""
  out_BT = np.zeros(np.shape(mask_BT), np.float64)
  for r, value in enumerate(value_R):
    rows = [b for b in np.flatnonzero(rollout_B == r) if mask_BT[b].any()]
    if rows:
      out_BT[rows[-1], np.flatnonzero(mask_BT[rows[-1]])[-1]] = value
  return out_BT


def whiten(x_BT, mask_BT, eps: float, total):
  """(x - mean) / (std + eps) over the masked tokens of the batch, 0 on the others.

  Long completions weigh more, since statistics are over tokens (std with ddof 1), as in verl.
  """
  mask_BT = np.asarray(mask_BT) > 0
  x = x_BT[mask_BT]
  mean = total(float(x.sum())) / max(total(float(x.size)), 1.0)
  return np.where(mask_BT, (x_BT - mean) / (std(x, 1, total) + eps), 0.0)


def importance(old_BT, sampler_BT, mask_BT, mode: str, low: float | None, high: float):
  """rho = pi_old / mu, the trainer's policy over the sampler's, bounded; 1 outside the mask.

      token_truncate     clip(rho_t, low, high)                  TIS, arXiv 2510.26788 sec. 2
      token_mask         rho_t [low <= rho_t <= high]            IcePop, arXiv 2510.18855
      sequence_truncate  clip(prod_t rho_t, low, high)
      sequence_mask      prod_t rho_t [low <= it <= high]        MIS

  low None: no lower bound. Denominators of the loss are not touched.
  """
  gap_BT = np.where(mask_BT > 0, np.asarray(old_BT, np.float64) - sampler_BT, 0.0)
  if mode.startswith('sequence'):
    gap_BT = np.broadcast_to(gap_BT.sum(1, keepdims=True), gap_BT.shape)
  rho_BT, low = np.exp(gap_BT), -np.inf if low is None else low
  if mode.endswith('truncate'):
    rho_BT = np.clip(rho_BT, low, high)
  else:
    rho_BT = np.where((rho_BT < low) | (rho_BT > high), 0.0, rho_BT)
  return np.where(mask_BT > 0, rho_BT, 1.0)


def zero_variance(reward_R, group_R) -> np.ndarray:
  """bool, per group in the order of np.unique: rewards, NaN left out, all equal or none."""
  reward_R, group_R = np.asarray(reward_R), np.asarray(group_R)
  groups = [reward_R[(group_R == g) & ~np.isnan(reward_R)] for g in np.unique(group_R)]
  return np.asarray([bool(np.all(r == r[:1])) for r in groups])
