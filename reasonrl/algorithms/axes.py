"""The axes of the GRPO family: what each may be, and which combinations have no meaning."""

from __future__ import annotations

from reasonrl import advantages, aggregation, records, rl_math

CHOICES = {
  'baseline': advantages.BASELINES,
  'scale_rewards': advantages.SCALES,
  'multi_objective_aggregation': ('sum_then_normalize', 'normalize_then_sum'),
  'std_ddof': (0, 1),
  'returns': ('outcome', 'to_go'),
  'surrogate': ('ppo_clip', 'cispo', 'sapo', 'vespo', 'reinforce'),
  'importance_sampling_level': ('token', 'sequence', 'sequence_token'),
  'old_policy': ('trainer', 'sampler'),
  'importance_correction': advantages.CORRECTIONS,
  'kl_estimator': tuple(rl_math.KL),
  'kl_placement': ('loss', 'reward'),
  'loss_agg': aggregation.AGGREGATIONS,
  'zero_variance': ('keep', 'drop'),
}
LEAST = {'num_iterations': 1, 'num_minibatches': 1, 'loss_constant': 1, 'local_rows': 1}
LEAST |= dict.fromkeys(('advantage_eps', 'epsilon', 'beta', 'gamma'), 0)
POSITIVE = ('log_ratio_clamp', 'cispo_ratio_max', 'importance_max')  # or None
POSITIVE += ('sapo_temperature_pos', 'sapo_temperature_neg')


def check(cfg, num_generations: int, rewards) -> None:
  """Raises UserError for settings that cannot train, or that no formula has.

  Args:
    cfg: a `grpo.GRPO`.
    num_generations: samples per prompt.
    rewards: names of the rewards of the run.
  """
  for name, choices in CHOICES.items():
    if getattr(cfg, name) not in choices:
      raise records.UserError(f'algorithm.{name}={getattr(cfg, name)!r} is not one of {choices}')
  for name, least in LEAST.items():
    if getattr(cfg, name) < least:
      raise records.UserError(f'algorithm.{name}={getattr(cfg, name)} must be at least {least}')
  for name in POSITIVE:
    if getattr(cfg, name) is not None and getattr(cfg, name) <= 0:
      raise records.UserError(f'algorithm.{name}={getattr(cfg, name)} must be above 0')
  if cfg.zero_variance_of not in ('reward', *rewards):
    choices = ', '.join(('reward', *rewards))
    raise records.UserError(
      f'algorithm.zero_variance_of={cfg.zero_variance_of!r} is not one of {choices}'
    )
  if num_generations < 2 and (cfg.baseline not in ('none', 'batch_mean') or cfg.gdpo):
    raise records.UserError(
      f'num_generations={num_generations}: group-relative advantages need at least 2 samples '
      'per prompt (the advantage of a group of one is always 0)'
    )
  for wrong, why in refusals(cfg):
    if wrong:
      raise records.UserError(f'algorithm: {why}')


def check_credit(cfg, discounts) -> None:
  """Raises UserError where rewards that give credit to single tokens do not fit, see `GRPO`."""
  for reward, gamma in discounts.items():
    if cfg.importance_sampling_level == 'sequence':
      raise records.UserError(
        f"algorithm.importance_sampling_level='sequence' has one weight per completion, but "
        f"rewards.{reward} gives credit to single tokens; use 'sequence_token'"
      )
    if cfg.returns == 'to_go' and gamma:
      raise records.UserError(
        f"rewards.{reward}.gamma={gamma} must be 0: algorithm.returns='to_go' makes the returns"
      )


def refusals(cfg) -> list[tuple[bool, str]]:
  """(whether, why) of combinations that have no meaning."""
  level = cfg.importance_sampling_level
  token_correction = cfg.importance_correction.startswith('token')
  return [
    (
      cfg.baseline == 'leave_one_out' and cfg.scale_rewards == 'group',
      "baseline='leave_one_out' with scale_rewards='group' explodes where one sample differs; use "
      "scale_rewards='none' or 'batch'",
    ),
    (
      cfg.baseline != 'group_mean' and cfg.scale_rewards == 'mean',
      "scale_rewards='mean' needs baseline='group_mean'",
    ),
    (
      cfg.baseline in ('none', 'batch_mean') and cfg.scale_rewards == 'group',
      f"scale_rewards='group' needs a group baseline; with baseline={cfg.baseline!r} use 'batch', "
      "'none' or whiten=True",
    ),
    (
      cfg.gdpo and (cfg.returns == 'to_go' or cfg.kl_in_reward),
      "multi_objective_aggregation='normalize_then_sum' has no returns='to_go' and no "
      "kl_placement='reward'",
    ),
    (
      cfg.gdpo and (cfg.baseline, cfg.scale_rewards) != ('group_mean', 'group'),
      "multi_objective_aggregation='normalize_then_sum' standardises each reward by its group: "
      "baseline='group_mean' and scale_rewards='group'",
    ),
    (
      cfg.scale_rewards == 'mean' and cfg.returns == 'outcome' and cfg.kl_in_reward,
      "scale_rewards='mean' needs rewards >= 0, which kl_placement='reward' makes negative",
    ),
    (
      level == 'sequence' and (cfg.returns == 'to_go' or token_correction),
      "importance_sampling_level='sequence' has one weight per completion; for weights per token "
      "use 'sequence_token'",
    ),
    (
      cfg.surrogate == 'cispo' and cfg.cispo_ratio_max is None,
      "surrogate='cispo' needs cispo_ratio_max, the absolute cap of the ratio (ScaleRL: 5.0)",
    ),
    (
      level != 'token' and cfg.surrogate == 'vespo',
      "surrogate='vespo' has its own sequence weight: importance_sampling_level='token'",
    ),
    (
      level != 'token' and bool(cfg.beta) and cfg.kl_estimator == 'ratio_k3',
      "kl_estimator='ratio_k3' needs importance_sampling_level='token'",
    ),
    (
      cfg.kl_in_reward and cfg.kl_estimator in ('ratio_k3', 'k3_plus'),
      f"kl_placement='reward' has no gradient to correct: {cfg.kl_estimator!r} is for the loss",
    ),
    (
      cfg.old_policy == 'sampler' and cfg.importance_correction != 'none',
      "old_policy='sampler' has the sampler in the ratio already: importance_correction='none'",
    ),
    (
      cfg.importance_min is not None and cfg.importance_min > cfg.importance_max,
      f'importance_min={cfg.importance_min} is above importance_max={cfg.importance_max}',
    ),
    (
      None not in (cfg.cispo_ratio_min, cfg.cispo_ratio_max)
      and cfg.cispo_ratio_min > cfg.cispo_ratio_max,
      f'cispo_ratio_min={cfg.cispo_ratio_min} is above cispo_ratio_max={cfg.cispo_ratio_max}',
    ),
    (
      cfg.dual_clip is not None and cfg.dual_clip <= 1,
      f'dual_clip={cfg.dual_clip} must be above 1',
    ),
    (
      cfg.delta is not None and cfg.delta <= 1 + cfg.high,
      f'delta={cfg.delta} must be above 1 + epsilon_high = {1 + cfg.high}',
    ),
  ]
