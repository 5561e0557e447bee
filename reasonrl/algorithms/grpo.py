"""The GRPO family as one loss with named axes; its members are presets in `configs/common.py`.

    A     = (R - baseline) / scale, one number per rollout, then optionally whitened over tokens
    r     = pi / pi_old of a token, or the geometric mean over the completion (GSPO)
    loss  = sum_it w_it [ surrogate(r_it, rho_it A_it) + beta KL_it - entropy_coef H_it ] / N

`objective.explain` prints which formula a config is. Sampler, learner and kernels know none of it:
rho, the correction between sampler and trainer, is folded into A (every surrogate is homogeneous in
A), and what concerns whole completions is either computed here on the host or in `prepare`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from reasonrl import advantages, aggregation, records, rl_math, sharding, types
from reasonrl.algorithms import axes


@dataclasses.dataclass(frozen=True)
class GRPO:
  """Settings; every default and its source is in `configs/common.py`."""

  # ---- advantage
  baseline: str
  scale_rewards: str
  multi_objective_aggregation: str
  std_ddof: int
  advantage_eps: float
  returns: str
  gamma: float
  whiten: bool
  positive_weight: float
  negative_weight: float
  # ---- surrogate
  surrogate: str
  importance_sampling_level: str
  log_ratio_clamp: float | None
  epsilon: float
  epsilon_high: float | None
  dual_clip: float | None
  delta: float | None
  cispo_ratio_max: float | None
  cispo_ratio_min: float | None
  sapo_temperature_pos: float
  sapo_temperature_neg: float
  vespo_k_pos: float
  vespo_lambda_pos: float
  vespo_k_neg: float
  vespo_lambda_neg: float
  # ---- sampler against trainer
  old_policy: str
  importance_correction: str
  importance_max: float
  importance_min: float | None
  # ---- KL to the reference, entropy
  beta: float
  kl_estimator: str
  kl_placement: str
  entropy_coef: float
  # ---- aggregation
  loss_agg: str
  loss_constant: int
  local_rows: int
  mask_truncated_completions: bool
  # ---- which groups, how many optimizer steps
  zero_variance: str
  zero_variance_of: str
  num_iterations: int
  num_minibatches: int

  def check(self, num_generations: int, rewards) -> None:
    """Raises UserError for settings that cannot train, or that no formula has."""
    axes.check(self, num_generations, rewards)

  def check_credit(self, discounts) -> None:
    """Raises UserError if rewards that give credit to single tokens do not fit.

    Args:
      discounts: the name of such a reward -> its own discount.
    """
    axes.check_credit(self, discounts)

  @property
  def high(self) -> float:
    return self.epsilon if self.epsilon_high is None else self.epsilon_high

  @property
  def gdpo(self) -> bool:
    return self.multi_objective_aggregation == 'normalize_then_sum'

  @property
  def kl_in_reward(self) -> bool:
    return bool(self.beta) and self.kl_placement == 'reward'

  @property
  def moves(self) -> bool:
    """An experience serves several optimizer steps: after the first, pi is not pi_old."""
    return self.num_iterations * self.num_minibatches > 1

  @property
  def needs(self) -> frozenset[str]:
    """On fresh samples the first pass needs no old_logp: there old = stop_gradient(logp)."""
    moves = self.moves and self.old_policy == 'trainer'
    needs = {
      'old_logp': moves or self.importance_correction != 'none' or self.kl_in_reward,
      'ref_logp': bool(self.beta),
    }
    return frozenset(name for name, needed in needs.items() if needed)

  # ---------------------------------------------------------------------------------- the host

  def keep(self, experience: types.Experience) -> np.ndarray | None:
    """Which groups count; None: all. Those without variance contribute exactly zero gradient.

    But for credit of single tokens: a group that has some counts.
    """
    if self.zero_variance == 'keep':
      return None
    of = self.zero_variance_of
    value_R = experience.reward_R if of == 'reward' else experience.parts[of]
    keep = ~advantages.zero_variance(value_R, experience.group_R)
    if experience.reward_BT is not None:
      credited = np.unique(experience.group_B[(experience.reward_BT * experience.mask_BT).any(1)])
      keep |= np.isin(np.unique(experience.group_R), credited)
    return keep

  def advantages(self, experience: types.Experience) -> np.ndarray:
    """rho A of every token, 0 where the policy did not sample it: float32 [B, T].

    A rollout to which no reward applies has 0 and no part in any mean. Credit of single tokens is a
    reward under 'to_go'; under 'outcome' it is added to their advantages as it is:

        A_t = (R - baseline) / scale + sum_m w_m c_mt      arXiv 2502.03373, without its critic
    """
    mask_BT, rollout_B = experience.mask_BT, experience.rollout_B
    reward_R, group_R = experience.reward_R.astype(np.float64), experience.group_R
    shaped = (self.baseline, self.scale_rewards, self.std_ddof, self.advantage_eps, sharding.total)
    penalty_BT = self._penalty(experience)
    if self.returns == 'to_go':
      outcome_R = advantages.outcome(reward_R, group_R, *shaped)
      reward_BT = advantages.at_last_token(outcome_R, mask_BT, rollout_B) - penalty_BT
      if experience.reward_BT is not None:
        reward_BT = reward_BT + experience.reward_BT
      adv_BT = advantages.to_go(reward_BT, mask_BT, rollout_B, self.gamma)
    else:
      if self.gdpo:
        outcome_R = advantages.normalize_then_sum(
          experience.parts, experience.reward_weights, group_R, *shaped[2:]
        )
      else:
        reward_R -= np.bincount(rollout_B, penalty_BT.sum(1), reward_R.size)
        outcome_R = advantages.outcome(reward_R, group_R, *shaped)
      adv_BT = outcome_R[rollout_B][:, None]
      if experience.reward_BT is not None:
        adv_BT = adv_BT + experience.reward_BT
    judged_BT = mask_BT * _judged(experience)[rollout_B][:, None]
    adv_BT = adv_BT * judged_BT
    if self.whiten:
      adv_BT = advantages.whiten(adv_BT, judged_BT, self.advantage_eps, sharding.total)
    adv_BT = np.where(adv_BT > 0, self.positive_weight, self.negative_weight) * adv_BT
    if self.importance_correction != 'none' and self.surrogate != 'vespo':
      adv_BT = adv_BT * self._rho(experience)
    return adv_BT.astype(np.float32)

  def _penalty(self, experience) -> np.ndarray:
    """beta KL per token, where it is part of the reward."""
    if not self.kl_in_reward:
      return np.zeros(experience.mask_BT.shape)
    old_BT, ref_BT = experience.scores['old_logp'], experience.scores['ref_logp']
    return self.beta * np.asarray(
      rl_math.kl(self.kl_estimator, old_BT, ref_BT, 1.0, experience.mask_BT), np.float64
    )

  def _rho(self, experience) -> np.ndarray:
    return advantages.importance(
      experience.scores['old_logp'],
      experience.logp_BT,
      experience.mask_BT,
      self.importance_correction,
      self.importance_min,
      self.importance_max,
    )

  def describe(self, experience: types.Experience) -> dict[str, float]:
    """Metrics of what the host computed: this process's, and only where something was corrected."""
    row = {}
    mask = experience.mask_BT > 0
    if self.importance_correction != 'none':
      rho = self._rho(experience)[mask]
      row = {'importance/mean': rho.mean(), 'importance/min': rho.min()}
      row |= {'importance/max': rho.max(), 'importance/masked': (rho == 0).mean()}
    if self.kl_in_reward:
      old, ref = experience.scores['old_logp'], experience.scores['ref_logp']
      row['kl'] = np.asarray(rl_math.kl('k3', old, ref, 1.0, mask))[mask].mean()
    return {name: float(value) for name, value in row.items()}

  def weights(self, experience: types.Experience) -> tuple[np.ndarray, float]:
    """Token weights and the denominator; truncated completions leave both if masked."""
    mask_BT = experience.mask_BT
    if self.mask_truncated_completions:
      mask_BT = mask_BT * (experience.stop_B != records.Stop.LENGTH)[:, None]
    return aggregation.loss_weights(
      mask_BT, experience.group_B, self.loss_agg, self.loss_constant, self.local_rows
    )

  # ---------------------------------------------------------------------------------- the device

  @property
  def prepare(self):
    """None, or the function that gives every token the log-ratio of its completion."""
    sequence = self.importance_sampling_level != 'token' or self.surrogate == 'vespo'
    moves = self.moves or self.old_policy == 'sampler'
    corrected = self.surrogate == 'vespo' and self.importance_correction != 'none'
    return self._sequence_log_ratio if (sequence and moves) or corrected else None

  def _sequence_log_ratio(self, logp_BM, batch: types.Batch):
    """The mean log-ratio over a completion (GSPO, arXiv 2507.18071 eq. 7), or the sum (VESPO).

    It counts once per token: completions weigh alike under 'seq_mean_token_mean' alone (GSPO).
    """
    weight_BM = batch.aux['weight']
    segment_BM = jnp.take_along_axis(batch.segments_BT, batch.index_BM, axis=1)
    most = batch.segments_BT.shape[1] + 1  # ids of a row
    summed = functools.partial(rl_math.segment_sum, segment_BM=segment_BM, segments=most)
    gap_BM = rl_math.log_ratio(logp_BM, self._old(logp_BM, batch.aux), weight_BM, self._clamp)
    sum_BM = summed(gap_BM)
    if self.surrogate == 'vespo':
      return {'sequence_log_ratio': sum_BM + self._log_rho(batch.aux, summed)}
    count_BM = summed((weight_BM > 0).astype(jnp.float32))
    return {'sequence_log_ratio': sum_BM / jnp.maximum(count_BM, 1.0)}

  @property
  def _clamp(self) -> float | None:
    return 20.0 if self.surrogate == 'vespo' else self.log_ratio_clamp

  def _log_rho(self, aux, summed):
    """VESPO has the correction inside w: log prod rho, bounded as `importance_correction` says.

    summed: [B, M] -> on every token the sum over its completion.
    """
    if self.importance_correction == 'none':
      return 0.0
    low = 0.0 if self.importance_min is None else self.importance_min
    bounds = math.log(max(low, 1e-8)), math.log(self.importance_max)
    gap_BM = rl_math.log_ratio(aux['old_logp'], aux['sampler_logp'], aux['weight'])
    if self.importance_correction.startswith('sequence'):
      gap_BM = summed(gap_BM)
    if self.importance_correction.endswith('mask'):
      inside = (gap_BM >= bounds[0]) & (gap_BM <= bounds[1])
      gap_BM = jnp.where(inside, gap_BM, math.log(1e-8))
    else:
      gap_BM = jnp.clip(gap_BM, *bounds)
    if self.importance_correction.startswith('sequence'):
      return gap_BM
    return summed(jnp.where(aux['weight'] > 0, gap_BM, 0.0))

  def _old(self, logp, aux):
    if self.old_policy == 'sampler':
      return aux['sampler_logp']
    return aux['old_logp'] if self.moves else jax.lax.stop_gradient(logp)

  def token_loss(self, out, aux):
    """loss_M and metrics, from out.logp, out.entropy and aux: 'adv', 'weight', what is needed."""
    weight = aux['weight']
    logp = jnp.where(weight > 0, out.logp, 0.0)  # a masked NaN in adv would reach its gradient
    gap = rl_math.log_ratio(logp, self._old(logp, aux), weight, self.log_ratio_clamp)
    if self.importance_sampling_level != 'token':
      # Value of the completion's ratio, on each of its tokens a share of its gradient (eq. 13).
      mean = aux['sequence_log_ratio'] if self.prepare else 0.0
      gap = mean + (gap - jax.lax.stop_gradient(gap))
    ratio = jnp.exp(gap)
    loss, metrics = SURROGATES[self.surrogate](self, logp, ratio, aux)
    metrics['ratio_max'] = ratio
    if self.beta and self.kl_placement == 'loss':
      loss += self.beta * rl_math.kl(self.kl_estimator, logp, aux['ref_logp'], ratio, weight)
      metrics['kl'] = rl_math.kl('k3', logp, aux['ref_logp'], ratio, weight)
    if self.entropy_coef:
      loss -= self.entropy_coef * out.entropy
    return loss, metrics


def _judged(experience: types.Experience) -> np.ndarray:
  """bool [R]: a reward applies, to the whole rollout or to some of its tokens."""
  judged_R = ~np.isnan(experience.reward_R)
  if experience.reward_BT is not None:
    judged_R[experience.rollout_B[experience.reward_BT.any(1)]] = True
  return judged_R


def _ppo_clip(cfg: GRPO, logp, ratio, aux):
  clip = cfg.epsilon, cfg.high, cfg.dual_clip, cfg.delta
  loss, below, above = rl_math.ppo_clip(ratio, aux['adv'], *clip)
  return loss, {'clip_ratio/low': below, 'clip_ratio/high': above}


def _cispo(cfg: GRPO, logp, ratio, aux):
  bounds = cfg.cispo_ratio_min, cfg.cispo_ratio_max
  loss, below, above = rl_math.cispo(logp, ratio, aux['adv'], *bounds)
  return loss, {'clip_ratio/low': below, 'clip_ratio/high': above}


def _sapo(cfg: GRPO, logp, ratio, aux):
  return rl_math.sapo(ratio, aux['adv'], cfg.sapo_temperature_pos, cfg.sapo_temperature_neg), {}


def _vespo(cfg: GRPO, logp, ratio, aux):
  log_w = aux['sequence_log_ratio'] if cfg.prepare else jnp.zeros_like(logp)
  shape = cfg.vespo_k_pos, cfg.vespo_lambda_pos, cfg.vespo_k_neg, cfg.vespo_lambda_neg
  phi = rl_math.vespo_weight(log_w, aux['adv'], *shape)
  return -phi * aux['adv'] * logp, {'vespo_phi': phi}


def _reinforce(cfg: GRPO, logp, ratio, aux):
  return -aux['adv'] * logp, {}


SURROGATES = {
  'ppo_clip': _ppo_clip,
  'cispo': _cispo,
  'sapo': _sapo,
  'vespo': _vespo,
  'reinforce': _reinforce,
}
