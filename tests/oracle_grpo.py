"""The GRPO family in plain float64 loops over rollouts and tokens, as its papers write it.

`credit` gives every token its advantage, `objective` the loss of an optimizer step. Nothing is
shared with the library. What belongs to a whole completion is computed for a whole completion: the
loss of GSPO is that of one ratio s_i, and whoever differentiates it differentiates s_i. What a
paper detaches is computed from `held`, the same rows at the point of differentiation: a numerical
gradient moves `rows` alone.

    rows      list of {'rollout', 'group', 'stop', 'trained'} and, one number per sampled token,
              'logp', 'entropy' of the policy, 'old' of the trainer before the update, 'sampler',
              'ref', 'dense' (credit per token). Tokens nobody sampled are not here.
    rollouts  list of {'group', 'reward', 'parts': {name: reward}}; NaN: no reward applies.
    cfg       an `algorithms.grpo.GRPO`, read as plain data.
"""

from __future__ import annotations

import math

LENGTH = 2  # records.Stop.LENGTH


# ------------------------------------------------------------------------------------ credit


def mean(xs):
  return sum(xs) / len(xs)


def deviation(xs, ddof):
  return math.sqrt(sum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - ddof))


def group_advantages(cfg, rewards, groups, baseline, scale):
  """(R - baseline) / scale of every rollout; one without reward, or without rivals, gets 0."""
  everyone = [x for x in rewards if not math.isnan(x)]
  out = []
  for reward, group in zip(rewards, groups, strict=True):
    rivals = [x for x, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(x)]
    if math.isnan(reward):
      out.append(0.0)
      continue
    if baseline == 'none':
      A = reward
    elif baseline == 'batch_mean':
      A = reward - mean(everyone)
    elif len(rivals) < 2 or max(rivals) == min(rivals):
      out.append(0.0)
      continue
    elif baseline == 'group_mean':  # GRPO, arXiv 2402.03300
      A = reward - mean(rivals)
    elif baseline == 'leave_one_out':  # RLOO, arXiv 2402.14740
      A = reward - (sum(rivals) - reward) / (len(rivals) - 1)
    if scale == 'group':
      A /= deviation(rivals, cfg.std_ddof) + cfg.advantage_eps
    elif scale == 'batch':  # arXiv 2508.08221
      A /= deviation(everyone, cfg.std_ddof) + cfg.advantage_eps
    elif scale == 'mean':  # MaxRL, arXiv 2602.02710
      A /= mean(rivals)
    out.append(A)
  return out


def gdpo(cfg, rollouts, groups, weights):
  """Every reward standardised in its group, their weighted sum in the batch (arXiv 2601.05242)."""
  sums = [0.0] * len(rollouts)
  for name, weight in weights.items():
    part = [rollout['parts'][name] for rollout in rollouts]
    z = group_advantages(cfg, part, groups, 'group_mean', 'group')
    sums = [s + weight * x for s, x in zip(sums, z, strict=True)]
  counted = [
    s
    for s, rollout in zip(sums, rollouts, strict=True)
    if not all(math.isnan(rollout['parts'][name]) for name in weights)
  ]
  return [
    0.0
    if all(math.isnan(rollout['parts'][name]) for name in weights)
    else (s - mean(counted)) / (deviation(counted, cfg.std_ddof) + cfg.advantage_eps)
    for s, rollout in zip(sums, rollouts, strict=True)
  ]


def several(cfg):
  return cfg.num_iterations * cfg.num_minibatches > 1


def before(cfg, row, held):
  """The trainer's log-probabilities before the update: on a single one, those of now."""
  return row['old'] if several(cfg) else held['logp']


def penalties(cfg, row):
  """beta KL(pi_old || ref) of every token, where it is part of the reward."""
  if cfg.beta == 0 or cfg.kl_placement == 'loss':
    return [0.0] * len(row['ref'])
  return [
    cfg.beta * kl(cfg.kl_estimator, pi, ref, None, None)
    for pi, ref in zip(before(cfg, row, row), row['ref'], strict=True)
  ]


def credit(cfg, rows, rollouts, weights):
  """A of every sampled token: list of lists. `weights`: of the rewards by name, for GDPO."""
  groups = [rollout['group'] for rollout in rollouts]
  rewards = [rollout['reward'] for rollout in rollouts]
  penalty = [penalties(cfg, row) for row in rows]
  if cfg.returns == 'to_go':
    A = group_advantages(cfg, rewards, groups, cfg.baseline, cfg.scale_rewards)
    out = returns(cfg, rows, A, penalty)
  else:
    if cfg.multi_objective_aggregation == 'normalize_then_sum':
      A = gdpo(cfg, rollouts, groups, weights)
    else:
      for row, costs in zip(rows, penalty, strict=True):
        rewards[row['rollout']] -= sum(costs)
      A = group_advantages(cfg, rewards, groups, cfg.baseline, cfg.scale_rewards)
    out = [[A[row['rollout']] + credit for credit in row['dense']] for row in rows]
  judged = {row['rollout'] for row in rows if any(row['dense'])}  # by credit per token
  judged |= {r for r, rollout in enumerate(rollouts) if not math.isnan(rollout['reward'])}
  unrewarded = [row['rollout'] not in judged for row in rows]
  if cfg.whiten:  # over tokens, REINFORCE++, arXiv 2501.03262
    tokens = [x for xs, none in zip(out, unrewarded, strict=True) if not none for x in xs]
    scale = deviation(tokens, 1) + cfg.advantage_eps
    out = [[(x - mean(tokens)) / scale for x in xs] for xs in out]
  out = [[0.0] * len(xs) if none else xs for xs, none in zip(out, unrewarded, strict=True)]
  return [[x * (cfg.positive_weight if x > 0 else cfg.negative_weight) for x in xs] for xs in out]


def returns(cfg, rows, A, penalty):
  """G_t = r_t + gamma G_{t+1} over the sampled tokens of a rollout, its rows one after another."""
  out = [[0.0] * len(row['logp']) for row in rows]
  for rollout in range(len(A)):
    places = [
      (b, t) for b, row in enumerate(rows) if row['rollout'] == rollout for t in range(len(out[b]))
    ]
    for i, (b, t) in enumerate(places):
      for later, (c, u) in enumerate(places[i:]):
        earned = rows[c]['dense'][u] - penalty[c][u] + (A[rollout] if (c, u) == places[-1] else 0)
        out[b][t] += cfg.gamma**later * earned
  return out


# ------------------------------------------------------------------------------------ KL, rho


def kl(estimator, logp, ref, ratio, held_logp):
  """An estimate of KL(pi || ref) from one token (http://joschu.net/blog/kl-approx.html)."""
  k1 = logp - ref
  k2 = (logp - ref) ** 2 / 2
  k3 = math.exp(ref - logp) - (ref - logp) - 1
  if estimator == 'ratio_k3':  # the ratio carries gradient
    return ratio * k3
  if estimator == 'k3_plus':  # the value of k3, the gradient of k2
    return k2 - kl('k2', held_logp, ref, None, None) + kl('k3', held_logp, ref, None, None)
  return {'k1': k1, 'k2': k2, 'k3': k3}[estimator]


def correction(cfg, row, held):
  """rho = pi_old / mu of every token, bounded; never differentiated."""
  mode, n = cfg.importance_correction, len(row['sampler'])
  if mode == 'none':
    return [1.0] * n
  pairs = zip(before(cfg, row, held), row['sampler'], strict=True)
  rho = [math.exp(old - sampler) for old, sampler in pairs]
  if mode.startswith('sequence'):
    rho = [math.prod(rho)] * n
  low = 0.0 if cfg.importance_min is None else cfg.importance_min
  if mode.endswith('truncate'):
    return [min(max(x, low), cfg.importance_max) for x in rho]
  return [x if low <= x <= cfg.importance_max else 0.0 for x in rho]


# ------------------------------------------------------------------------------------ surrogates


def ppo_clip(cfg, ratio, A):
  """PPO (arXiv 1707.06347) with clip-higher, a two-sided bound delta and the dual clip."""
  high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
  bounded = ratio if cfg.delta is None else min(ratio, cfg.delta)
  J = min(bounded * A, min(max(ratio, 1 - cfg.epsilon), 1 + high) * A)
  if A < 0 and cfg.dual_clip is not None:
    J = max(J, cfg.dual_clip * A)
  return -J


def sapo(cfg, ratio, A):
  """arXiv 2511.20347."""
  tau = cfg.sapo_temperature_pos if A > 0 else cfg.sapo_temperature_neg
  return -A * (4 / tau) / (1 + math.exp(-tau * (ratio - 1)))


def cispo_weight(cfg, ratio):
  """arXiv 2506.13585; detached."""
  low = 0.0 if cfg.cispo_ratio_min is None else cfg.cispo_ratio_min
  return min(max(ratio, low), cfg.cispo_ratio_max)


def vespo_weight(cfg, w, A):
  """arXiv 2602.10693; detached."""
  k, lam = cfg.vespo_k_pos, cfg.vespo_lambda_pos
  if A < 0:
    k, lam = cfg.vespo_k_neg, cfg.vespo_lambda_neg
  return math.exp(lam) * w**k * math.exp(-lam * w)


def clamp(x, bound):
  return x if bound is None else min(max(x, -bound), bound)


def row_loss(cfg, row, held, A):
  """The sum of a completion's token losses. Detached: whatever is read from `held`."""
  n, rho = len(row['logp']), correction(cfg, row, held)
  old = row['sampler'] if cfg.old_policy == 'sampler' else before(cfg, row, held)
  gaps = [clamp(x - y, cfg.log_ratio_clamp) for x, y in zip(row['logp'], old, strict=True)]
  held_gaps = [clamp(x - y, cfg.log_ratio_clamp) for x, y in zip(held['logp'], old, strict=True)]
  s, held_s = math.exp(sum(gaps) / n), math.exp(sum(held_gaps) / n)
  if cfg.importance_sampling_level == 'token':
    ratios, held_ratios = [math.exp(gap) for gap in gaps], [math.exp(gap) for gap in held_gaps]
  elif cfg.importance_sampling_level == 'sequence':
    ratios, held_ratios = [s] * n, [held_s] * n
  else:  # GSPO-token: sg(s_i) pi / sg(pi)
    ratios = [held_s * math.exp(x - y) for x, y in zip(gaps, held_gaps, strict=True)]
    held_ratios = [held_s] * n

  total = 0.0
  if cfg.surrogate in ('ppo_clip', 'sapo'):
    of_ratio = {'ppo_clip': ppo_clip, 'sapo': sapo}[cfg.surrogate]
    if cfg.importance_sampling_level == 'sequence':
      assert len(set(A)) == 1 and len(set(rho)) == 1, 'a completion has one advantage'
      total += n * rho[0] * of_ratio(cfg, s, A[0])
    else:
      total += sum(rho[t] * of_ratio(cfg, ratios[t], A[t]) for t in range(n))
  elif cfg.surrogate == 'vespo':  # the product of all ratios; the correction is inside
    w = math.exp(sum(clamp(x - y, 20) for x, y in zip(held['logp'], old, strict=True)))
    rho = [max(x, 1e-8) for x in rho]
    w *= rho[0] if cfg.importance_correction.startswith('sequence') else math.prod(rho)
    w = min(max(w, 1e-8), math.exp(20))
    total += sum(-vespo_weight(cfg, w, A[t]) * A[t] * row['logp'][t] for t in range(n))
  else:
    for t in range(n):
      weight = cispo_weight(cfg, held_ratios[t]) if cfg.surrogate == 'cispo' else 1.0
      total += -weight * rho[t] * A[t] * row['logp'][t]

  for t in range(n):
    if cfg.beta and cfg.kl_placement == 'loss':
      estimate = kl(cfg.kl_estimator, row['logp'][t], row['ref'][t], ratios[t], held['logp'][t])
      total += cfg.beta * estimate
    total -= cfg.entropy_coef * row['entropy'][t]
  return total


# ------------------------------------------------------------------------------------ the loss


def aggregate(cfg, sums, counts, groups):
  """One number from the sums of token losses and the numbers of tokens of completions."""
  rows = list(zip(sums, counts, groups, strict=True))
  mean_over = lambda block: sum(s for s, _, _ in block) / sum(n for _, n, _ in block)
  if cfg.loss_agg == 'token_mean':  # DAPO, arXiv 2503.14476
    return mean_over(rows)
  if cfg.loss_agg == 'seq_mean_token_mean':  # GRPO, arXiv 2402.03300
    return mean([s / n for s, n, _ in rows])
  if cfg.loss_agg == 'token_sum_const':  # Dr. GRPO, arXiv 2503.20783
    return sum(sums) / (len(rows) * cfg.loss_constant)
  if cfg.loss_agg == 'seq_mean_token_sum':  # RLOO, LUSPO
    return mean(sums)
  if cfg.loss_agg == 'token_sum':
    return sum(sums)
  if cfg.loss_agg == 'prompt_mean':
    return mean([mean_over([row for row in rows if row[2] == g]) for g in set(groups)])
  raise ValueError(cfg.loss_agg)


def objective(cfg, rows, held, A):
  """The loss over the trained rows; A from `credit`, which saw every row of the batch.

  'trained': the rows of this optimizer step. Masked truncated ones are as if they were absent.
  """
  kept = [
    b
    for b, row in enumerate(rows)
    if row['trained'] and not (cfg.mask_truncated_completions and row['stop'] == LENGTH)
  ]
  sums = {b: row_loss(cfg, rows[b], held[b], A[b]) for b in kept}
  counts = {b: len(rows[b]['logp']) for b in kept}
  if cfg.loss_agg == 'token_mean_local':  # TRL's 'bnpo'; blocks of rows, masked ones included
    step = [b for b, row in enumerate(rows) if row['trained']]
    blocks = [step[i : i + cfg.local_rows] for i in range(0, len(step), cfg.local_rows)]
    blocks = [[b for b in block if b in sums] for block in blocks]
    return mean(
      [sum(sums[b] for b in block) / sum(counts[b] for b in block) for block in blocks if block]
    )
  groups = [rows[b]['group'] for b in kept]
  return aggregate(cfg, list(sums.values()), list(counts.values()), groups)


def zero_variance_groups(values, groups):
  """Ids of groups whose rewards are all equal, those that do not apply left out, or missing."""
  out = set()
  for group in set(groups):
    found = {v for v, g in zip(values, groups, strict=True) if g == group and not math.isnan(v)}
    if len(found) < 2:
      out.add(group)
  return out
