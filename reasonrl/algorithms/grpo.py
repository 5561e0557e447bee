"""Group Relative Policy Optimization (arXiv 2402.03300), with the axes that its users vary.

    J = sum over tokens of  min(r A, clip(r, 1 - eps, 1 + eps_high) A) - beta k3(pi || pi_ref)

aggregated as `loss_agg` says; A is one number per rollout, from its group's rewards alone.
The presets in `configs/common.py` are the settings of TRL and of the paper.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from reasonrl import records, rl_math, types


@dataclasses.dataclass(frozen=True)
class GRPO:
  """Settings; every default and its source is in `configs/common.py`."""

  scale_rewards: str
  std_ddof: int
  advantage_eps: float
  epsilon: float
  epsilon_high: float | None
  beta: float
  loss_agg: str
  loss_constant: int
  num_iterations: int
  num_minibatches: int
  mask_truncated_completions: bool

  def check(self, num_generations: int) -> None:
    """Raises UserError for settings that cannot train."""
    if num_generations < 2:
      raise records.UserError(
        f'num_generations={num_generations}: group-relative advantages need at least 2 samples '
        'per prompt (the advantage of a group of one is always 0)'
      )
    if self.scale_rewards not in ('group', 'none'):
      raise records.UserError(
        f"algorithm.scale_rewards={self.scale_rewards!r} is not one of 'group', 'none'"
      )
    choices = ('token_mean', 'seq_mean_token_mean', 'token_sum_const')
    if self.loss_agg not in choices:
      raise records.UserError(f'algorithm.loss_agg={self.loss_agg!r} is not one of {choices}')
    least = {'num_iterations': 1, 'num_minibatches': 1, 'loss_constant': 1, 'std_ddof': 0}
    least |= {'advantage_eps': 0, 'epsilon': 0, 'beta': 0}
    for name, bound in least.items():
      if getattr(self, name) < bound:
        raise records.UserError(f'algorithm.{name}={getattr(self, name)} must be at least {bound}')
    if self.std_ddof >= num_generations:
      raise records.UserError(
        f'algorithm.std_ddof={self.std_ddof} must be less than num_generations={num_generations}'
      )

  @property
  def needs(self) -> frozenset[str]:
    """On fresh samples the first pass needs no old_logp: there old = stop_gradient(logp)."""
    needs = set()
    if self.num_iterations * self.num_minibatches > 1:
      needs.add('old_logp')
    if self.beta:
      needs.add('ref_logp')
    return frozenset(needs)

  def keep(self, experience: types.Experience) -> np.ndarray:
    """GRPO trains on every group; those without variance contribute exactly zero gradient."""
    return np.ones(np.unique(experience.group_B).size, bool)

  def advantages(self, experience: types.Experience) -> np.ndarray:
    """One advantage per rollout, the same on each of its tokens: float32 [B, T].

    Raises:
      UserError: a reward gave credit to single tokens, which this algorithm would not use.
    """
    if experience.reward_BT is not None:
      raise records.UserError('a reward gives credit per token, which grpo does not use')
    adv_R = rl_math.group_advantages(
      experience.reward_R,
      experience.group_R,
      self.scale_rewards,
      self.std_ddof,
      self.advantage_eps,
    )
    return adv_R[experience.rollout_B][:, None] * experience.mask_BT

  def weights(self, experience: types.Experience) -> tuple[np.ndarray, float]:
    """Token weights and the global denominator; truncated completions leave both if masked."""
    mask_BT = experience.mask_BT
    if self.mask_truncated_completions:
      mask_BT = mask_BT * (experience.stop_B != records.Stop.LENGTH)[:, None]
    return rl_math.loss_weights(mask_BT, self.loss_agg, self.loss_constant)

  def token_loss(self, out, aux):
    """loss_M and metrics, from out.logp and aux: 'adv', 'weight', 'old_logp', 'ref_logp'."""
    weight = aux['weight']
    old = aux['old_logp'] if 'old_logp' in self.needs else jax.lax.stop_gradient(out.logp)
    ratio = jnp.exp(rl_math.log_ratio(out.logp, old, weight))
    high = self.epsilon if self.epsilon_high is None else self.epsilon_high
    loss, low_clipped, high_clipped = rl_math.ppo_clip(ratio, aux['adv'], self.epsilon, high)
    metrics = {'clip_ratio/low': low_clipped, 'clip_ratio/high': high_clipped, 'ratio_max': ratio}
    if self.beta:
      kl = rl_math.kl_k3(out.logp, aux['ref_logp'], weight)
      loss = loss + self.beta * kl
      metrics['kl'] = kl
    return loss, metrics
