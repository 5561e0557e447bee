"""verl's ppo_trainer.yaml (2026-08) to ours and back."""

from __future__ import annotations

from typing import Any

from reasonrl.peers.lines import APPROXIMATE, EXACT, IGNORED, UNSUPPORTED, Line

VERL_ESTIMATORS = {
  'grpo': {},
  'rloo': {'baseline': 'leave_one_out', 'scale_rewards': 'none'},
  'rloo_vectorized': {'baseline': 'leave_one_out', 'scale_rewards': 'none'},
  'reinforce_plus_plus': {
    'baseline': 'none',
    'scale_rewards': 'none',
    'returns': 'to_go',
    'whiten': True,
  },
  'reinforce_plus_plus_baseline': {'scale_rewards': 'none', 'whiten': True},
  'gdpo': {'multi_objective_aggregation': 'normalize_then_sum'},
}
VERL_AGGREGATIONS = {
  'token-mean': 'token_mean',
  'seq-mean-token-mean': 'seq_mean_token_mean',
  'seq-mean-token-sum': 'seq_mean_token_sum',
  'seq-mean-token-sum-norm': 'token_sum_const',
  'token-sum': 'token_sum',
}
VERL_LOSSES = {
  'vanilla': {},
  'gspo': {'importance_sampling_level': 'sequence', 'loss_agg': 'seq_mean_token_mean'},
  'sapo': {'surrogate': 'sapo', 'loss_agg': 'seq_mean_token_mean'},
  'cispo': {'surrogate': 'cispo'},
}
VERL_KL = {
  **{'kl': 'k1', 'k1': 'k1', 'mse': 'k2', 'k2': 'k2', 'low_var_kl': 'k3', 'k3': 'k3'},
  **{'k3+': 'k3_plus', 'low_var_kl+': 'k3_plus'},
}
ACTOR, ROLLOUT = 'actor_rollout_ref.actor.', 'actor_rollout_ref.rollout.'
VERL_DEFAULTS = {
  'algorithm.adv_estimator': 'gae',
  'algorithm.norm_adv_by_std_in_grpo': True,
  'algorithm.gamma': 1.0,
  'algorithm.use_kl_in_reward': False,
  'algorithm.kl_penalty': 'kl',
  'algorithm.kl_ctrl.type': 'fixed',
  'algorithm.kl_ctrl.kl_coef': 0.001,
  'algorithm.filter_groups.enable': False,
  'algorithm.filter_groups.metric': None,
  'algorithm.filter_groups.max_num_gen_batches': 0,
  'algorithm.rollout_correction.rollout_is': None,
  'algorithm.rollout_correction.rollout_is_threshold': 2.0,
  'algorithm.rollout_correction.rollout_rs': None,
  'algorithm.rollout_correction.bypass_mode': False,
  ACTOR + 'policy_loss.loss_mode': 'vanilla',
  ACTOR + 'clip_ratio': 0.2,
  ACTOR + 'clip_ratio_low': 0.2,
  ACTOR + 'clip_ratio_high': 0.2,
  ACTOR + 'clip_ratio_c': 3.0,
  ACTOR + 'tau_pos': 1.0,
  ACTOR + 'tau_neg': 1.05,
  ACTOR + 'loss_agg_mode': 'token-mean',
  ACTOR + 'loss_scale_factor': None,
  ACTOR + 'use_kl_loss': False,
  ACTOR + 'kl_loss_coef': 0.001,
  ACTOR + 'kl_loss_type': 'low_var_kl',
  ACTOR + 'entropy_coeff': 0.0,
  ACTOR + 'ppo_epochs': 1,
  ACTOR + 'ppo_mini_batch_size': 256,
  ACTOR + 'grad_clip': 1.0,
  ACTOR + 'optim.lr': 1e-6,
  ACTOR + 'optim.weight_decay': 0.01,
  ROLLOUT + 'n': 1,
  ROLLOUT + 'temperature': 1.0,
  ROLLOUT + 'top_p': 1.0,
  ROLLOUT + 'top_k': -1,
  'data.train_batch_size': 1024,
  'data.max_response_length': 512,
}


def read(given: dict[str, Any]) -> list[Line]:
  """What each field of a verl config becomes; those that are not given have verl's defaults."""
  given = dict(_flatten(given, ''))
  cfg, lines = {**VERL_DEFAULTS, **given}, []

  def add(field, status, ours, note=''):
    lines.append(Line(field, cfg[field], status, ours, note, field in given))

  for field in given.keys() - VERL_DEFAULTS.keys():
    lines.append(Line(field, given[field], IGNORED, {}, 'not part of the objective', True))
  _verl_advantage(cfg, add)
  _verl_loss(cfg, add)
  _verl_kl(cfg, add)
  _verl_batch(cfg, add)
  return lines


def _flatten(tree, prefix):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _algorithm(**fields) -> dict[str, Any]:
  return {f'algorithm.{name}': value for name, value in fields.items()}


def _verl_advantage(cfg, add) -> None:
  estimator = cfg['algorithm.adv_estimator']
  known = estimator in VERL_ESTIMATORS
  note = '' if known else f'only {", ".join(VERL_ESTIMATORS)}'
  ours = {'advantage_eps': 1e-6, **VERL_ESTIMATORS.get(estimator, {})}
  add('algorithm.adv_estimator', EXACT if known else UNSUPPORTED, _algorithm(**ours), note)
  centred = estimator == 'grpo' and not cfg['algorithm.norm_adv_by_std_in_grpo']
  ours = _algorithm(scale_rewards='none') if centred else {}
  add('algorithm.norm_adv_by_std_in_grpo', EXACT, ours)
  add('algorithm.gamma', EXACT, _algorithm(gamma=cfg['algorithm.gamma']))
  enable, metric = (cfg[f'algorithm.filter_groups.{name}'] for name in ('enable', 'metric'))
  add('algorithm.filter_groups.enable', EXACT, _algorithm(zero_variance='drop') if enable else {})
  scores = {None: 'reward', 'score': 'reward', 'seq_reward': 'reward', 'seq_final_reward': 'reward'}
  note = '' if metric in scores else 'set zero_variance_of to the name of a reward of ours'
  ours = _algorithm(zero_variance_of=scores.get(metric, 'reward'))
  status = APPROXIMATE if enable and note else EXACT
  add('algorithm.filter_groups.metric', status, ours, note)
  batches = cfg['algorithm.filter_groups.max_num_gen_batches']
  ours, note = {'max_generation_batches': max(batches, 1)} if enable else {}, ''
  if enable and not batches:
    note, ours = 'verl has no limit; 10 rollouts here', {'max_generation_batches': 10}
  add('algorithm.filter_groups.max_num_gen_batches', APPROXIMATE if note else EXACT, ours, note)


def _verl_loss(cfg, add) -> None:
  mode, low, high = (
    cfg[ACTOR + name] for name in ('policy_loss.loss_mode', 'clip_ratio_low', 'clip_ratio_high')
  )
  known = mode in VERL_LOSSES
  note = '' if known else f'only {", ".join(VERL_LOSSES)}'
  add(
    ACTOR + 'loss_agg_mode',
    EXACT if cfg[ACTOR + 'loss_agg_mode'] in VERL_AGGREGATIONS else UNSUPPORTED,
    _algorithm(loss_agg=VERL_AGGREGATIONS.get(cfg[ACTOR + 'loss_agg_mode'])),
  )
  ours = dict(VERL_LOSSES.get(mode, {}))
  if mode == 'cispo':
    ours |= {'cispo_ratio_min': 1 - low, 'cispo_ratio_max': 1 + high}
  add(ACTOR + 'policy_loss.loss_mode', EXACT if known else UNSUPPORTED, _algorithm(**ours), note)
  add(ACTOR + 'clip_ratio', EXACT, {}, 'verl reads clip_ratio_low and clip_ratio_high')
  add(ACTOR + 'clip_ratio_low', EXACT, _algorithm(epsilon=low))
  add(ACTOR + 'clip_ratio_high', EXACT, _algorithm(epsilon_high=high))
  dual = cfg[ACTOR + 'clip_ratio_c'] if mode == 'vanilla' else None
  note = 'with the clamp of the log-ratio at +-20, which verl always has'
  ours = _algorithm(dual_clip=dual, log_ratio_clamp=20.0)
  add(ACTOR + 'clip_ratio_c', EXACT, ours, note)
  for ours, field in (('sapo_temperature_pos', 'tau_pos'), ('sapo_temperature_neg', 'tau_neg')):
    add(ACTOR + field, EXACT, _algorithm(**{ours: cfg[ACTOR + field]}))
  constant, response = cfg[ACTOR + 'loss_scale_factor'], cfg['data.max_response_length']
  note = '' if constant else "verl's default is the padded width; here the longest response"
  used = cfg[ACTOR + 'loss_agg_mode'] == 'seq-mean-token-sum-norm'
  status = APPROXIMATE if used and note else EXACT
  ours = _algorithm(loss_constant=constant or response)
  add(ACTOR + 'loss_scale_factor', status, ours, note if used else '')
  add(ACTOR + 'entropy_coeff', EXACT, _algorithm(entropy_coef=cfg[ACTOR + 'entropy_coeff']))
  correction = 'algorithm.rollout_correction.'
  level = cfg[correction + 'rollout_is']
  mode = {None: 'none', 'token': 'token_truncate', 'sequence': 'sequence_truncate'}.get(level)
  ours = _algorithm(importance_correction=mode)
  add(correction + 'rollout_is', EXACT if mode else UNSUPPORTED, ours if mode else {})
  threshold = cfg[correction + 'rollout_is_threshold']
  if isinstance(threshold, str) and '_' in threshold:  # IcePop: outside the two bounds it is 0
    low, high = map(float, threshold.split('_'))
    ours = _algorithm(importance_min=low, importance_max=high)
    ours |= _algorithm(importance_correction=mode.replace('truncate', 'mask')) if mode else {}
  else:
    ours = _algorithm(importance_max=float(threshold))
  add(correction + 'rollout_is_threshold', EXACT, ours)
  rejects = cfg[correction + 'rollout_rs']
  add(correction + 'rollout_rs', UNSUPPORTED if rejects else EXACT, {}, 'only none' * bool(rejects))
  bypass = cfg[correction + 'bypass_mode']
  add(correction + 'bypass_mode', EXACT, _algorithm(old_policy='sampler') if bypass else {})


def _verl_kl(cfg, add) -> None:
  in_loss, in_reward = cfg[ACTOR + 'use_kl_loss'], cfg['algorithm.use_kl_in_reward']
  both = in_loss and in_reward
  add(ACTOR + 'use_kl_loss', UNSUPPORTED if both else EXACT, {}, 'not both places' * both)
  kind = cfg['algorithm.kl_penalty'] if in_reward else cfg[ACTOR + 'kl_loss_type']
  coef = cfg['algorithm.kl_ctrl.kl_coef'] if in_reward else cfg[ACTOR + 'kl_loss_coef']
  ours = _algorithm(kl_placement='reward' if in_reward else 'loss')
  add('algorithm.use_kl_in_reward', EXACT, ours)
  fields = ('algorithm.kl_penalty', 'algorithm.kl_ctrl.kl_coef')
  others = (ACTOR + 'kl_loss_type', ACTOR + 'kl_loss_coef')
  if not in_reward:
    fields, others = others, fields
  note = 'verl clamps its input to +-20 and its value to +-10' if kind.startswith('low') else ''
  status = UNSUPPORTED if kind not in VERL_KL else APPROXIMATE if note else EXACT
  used = in_loss or in_reward
  ours = _algorithm(kl_estimator=VERL_KL.get(kind, 'k3'))
  add(fields[0], status if used else EXACT, ours, note if used else '')
  add(fields[1], EXACT, _algorithm(beta=coef if used else 0.0))
  for field in others:
    add(field, EXACT, {}, 'not used')
  adaptive = cfg['algorithm.kl_ctrl.type'] != 'fixed'
  status = UNSUPPORTED if adaptive and in_reward else EXACT
  add('algorithm.kl_ctrl.type', status, {}, 'only fixed' * adaptive)


def _verl_batch(cfg, add) -> None:
  prompts, mini = cfg['data.train_batch_size'], cfg[ACTOR + 'ppo_mini_batch_size']
  add('data.train_batch_size', EXACT, {'prompts_per_step': prompts})
  exact = prompts % mini == 0
  note = '' if exact else 'does not divide train_batch_size'
  ours = _algorithm(num_minibatches=max(prompts // mini, 1))
  note = note or 'minibatches of completions, where verl splits by prompts'
  add(ACTOR + 'ppo_mini_batch_size', APPROXIMATE if prompts // mini > 1 else EXACT, ours, note)
  add(ACTOR + 'ppo_epochs', EXACT, _algorithm(num_iterations=cfg[ACTOR + 'ppo_epochs']))
  add(ACTOR + 'grad_clip', EXACT, {'optim.max_grad_norm': cfg[ACTOR + 'grad_clip']})
  add(ACTOR + 'optim.lr', EXACT, {'optim.learning_rate': cfg[ACTOR + 'optim.lr']})
  decay = cfg[ACTOR + 'optim.weight_decay']
  add(ACTOR + 'optim.weight_decay', EXACT, {'optim.weight_decay': ((r'.*', decay),)})
  add(ROLLOUT + 'n', EXACT, {'env.num_generations': cfg[ROLLOUT + 'n']})
  length = cfg['data.max_response_length']
  add('data.max_response_length', EXACT, {'env.max_completion_length': length})
  add(ROLLOUT + 'temperature', EXACT, {'env.temperature': cfg[ROLLOUT + 'temperature']})
  for field, off in (('top_p', (1.0,)), ('top_k', (-1, 0))):
    used = cfg[ROLLOUT + field] not in off
    note = 'ours scores the truncated distribution, verl the whole one' if used else ''
    ours = {f'env.{field}': cfg[ROLLOUT + field]} if used else {}
    add(ROLLOUT + field, APPROXIMATE if used else EXACT, ours, note)


def nearest(cfg, env, section) -> dict[str, Any]:
  out = {}
  names = [
    name
    for name, fields in VERL_ESTIMATORS.items()
    if all(
      getattr(cfg, key) == fields.get(key, default)
      for key, default in (
        *(('baseline', 'group_mean'), ('returns', 'outcome'), ('whiten', False)),
        ('multi_objective_aggregation', 'sum_then_normalize'),
      )
    )
  ]
  out['algorithm.adv_estimator'] = names[0] if names else '(none)'
  if names[:1] == ['grpo'] and cfg.scale_rewards == 'none':
    out['algorithm.norm_adv_by_std_in_grpo'] = False
  by_name = {ours: theirs for theirs, ours in VERL_AGGREGATIONS.items()}
  out[ACTOR + 'loss_agg_mode'] = by_name.get(cfg.loss_agg, '(none)')
  modes = {'cispo': 'cispo', 'sapo': 'sapo', 'ppo_clip': 'vanilla'}
  mode = modes.get(cfg.surrogate, '(none)')
  out[ACTOR + 'policy_loss.loss_mode'] = (
    'gspo' if cfg.importance_sampling_level != 'token' else mode
  )
  out |= {ACTOR + 'clip_ratio_low': cfg.epsilon, ACTOR + 'clip_ratio_high': cfg.high}
  if cfg.surrogate == 'cispo':
    out[ACTOR + 'clip_ratio_high'] = cfg.cispo_ratio_max - 1
  if mode == 'vanilla' and cfg.dual_clip is None:
    out[ACTOR + 'clip_ratio_c'] = 1e9  # it cannot be switched off
  if cfg.beta and cfg.kl_in_reward:
    out |= {'algorithm.use_kl_in_reward': True, 'algorithm.kl_ctrl.kl_coef': cfg.beta}
  elif cfg.beta:
    kinds = {ours: theirs for theirs, ours in VERL_KL.items()}
    out |= {ACTOR + 'use_kl_loss': True, ACTOR + 'kl_loss_coef': cfg.beta}
    out[ACTOR + 'kl_loss_type'] = kinds.get(cfg.kl_estimator, '(none)')
  out[ACTOR + 'entropy_coeff'] = cfg.entropy_coef
  out[ACTOR + 'ppo_epochs'] = cfg.num_iterations
  out['data.train_batch_size'] = section.prompts_per_step
  out[ACTOR + 'ppo_mini_batch_size'] = max(section.prompts_per_step // cfg.num_minibatches, 1)
  out[ROLLOUT + 'n'] = env.num_generations
  out['data.max_response_length'] = env.max_completion_length
  return {name: value for name, value in out.items() if value != VERL_DEFAULTS[name]}
