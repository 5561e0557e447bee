"""TRL's GRPOConfig (1.16) to ours and back."""

from __future__ import annotations

from typing import Any

from reasonrl import records
from reasonrl.peers.lines import APPROXIMATE, EXACT, IGNORED, UNSUPPORTED, Line

# loss_type -> our surrogate and aggregation
TRL_LOSSES = {
  'grpo': {'loss_agg': 'seq_mean_token_mean'},
  'dapo': {'loss_agg': 'token_mean'},
  'bnpo': {'loss_agg': 'token_mean_local'},
  'dr_grpo': {'loss_agg': 'token_sum_const'},
  'cispo': {'surrogate': 'cispo', 'loss_agg': 'token_mean'},
  'sapo': {'surrogate': 'sapo', 'loss_agg': 'seq_mean_token_mean'},
  'luspo': {'loss_agg': 'seq_mean_token_sum'},
  'vespo': {'surrogate': 'vespo', 'loss_agg': 'token_mean'},
}
TRL_DEFAULTS = {
  'num_generations': 8,
  'max_completion_length': 512,
  'temperature': 1.0,
  'top_p': 1.0,
  'top_k': 0,
  'min_p': None,
  'repetition_penalty': 1.0,
  'learning_rate': 1e-6,
  'max_grad_norm': 1.0,
  'weight_decay': 0.0,
  'adam_beta1': 0.9,
  'adam_beta2': 0.999,
  'adam_epsilon': 1e-8,
  'lr_scheduler_type': 'linear',
  'warmup_steps': 0,
  'beta': 0.0,
  'num_iterations': 1,
  'epsilon': 0.2,
  'epsilon_high': None,
  'delta': None,
  'sapo_temperature_pos': 1.0,
  'sapo_temperature_neg': 1.05,
  'vespo_k_pos': 2.0,
  'vespo_lambda_pos': 3.0,
  'vespo_k_neg': 3.0,
  'vespo_lambda_neg': 2.0,
  'importance_sampling_level': 'token',
  'multi_objective_aggregation': 'sum_then_normalize',
  'scale_rewards': 'group',
  'loss_type': 'dapo',
  'mask_truncated_completions': False,
  'sync_ref_model': False,
  'ref_model_mixup_alpha': 0.6,
  'ref_model_sync_steps': 512,
  'top_entropy_quantile': 1.0,
  'entropy_coef': 0.0,
  'use_adaptive_entropy': False,
  'use_vllm': False,
  'vllm_importance_sampling_correction': True,
  'vllm_importance_sampling_mode': 'sequence_mask',
  'vllm_importance_sampling_clip_max': 3.0,
  'vllm_importance_sampling_clip_min': None,
  'off_policy_mask_threshold': None,
  'use_bias_correction_kl': True,
  'reward_weights': None,
  'per_device_train_batch_size': 8,
  'gradient_accumulation_steps': 1,
  'steps_per_generation': None,
  'generation_batch_size': None,
}
# fields that ours has under `algorithm` with the same name and meaning
TRL_SAME = (
  *('beta', 'num_iterations', 'epsilon', 'delta', 'sapo_temperature_pos', 'sapo_temperature_neg'),
  *('vespo_k_pos', 'vespo_lambda_pos', 'vespo_k_neg', 'vespo_lambda_neg'),
  *('multi_objective_aggregation', 'mask_truncated_completions', 'importance_sampling_level'),
)
# fields that ours has only at this value
TRL_ONLY = {
  'repetition_penalty': 1.0,
  'top_entropy_quantile': 1.0,
  'use_adaptive_entropy': False,
  'off_policy_mask_threshold': None,
}
TRL_OPTIM = {
  'learning_rate': 'learning_rate',
  'max_grad_norm': 'max_grad_norm',
  'adam_beta1': 'b1',
  'adam_beta2': 'b2',
  'adam_epsilon': 'eps',
  'warmup_steps': 'warmup_steps',
}


def read(given: dict[str, Any]) -> list[Line]:
  """What each field of a GRPOConfig becomes; those that are not given have TRL's defaults."""
  cfg, lines = {**TRL_DEFAULTS, **given}, []

  def add(field, status, ours, note=''):
    lines.append(Line(field, cfg[field], status, ours, note, field in given))

  for field in given.keys() - TRL_DEFAULTS.keys():
    lines.append(Line(field, given[field], IGNORED, {}, 'not part of the objective', True))
  for field in TRL_SAME:
    add(field, EXACT, {f'algorithm.{field}': cfg[field]})
  for field, only in TRL_ONLY.items():
    same = cfg[field] == only
    add(field, EXACT if same else UNSUPPORTED, {}, '' if same else f'only {only!r}')
  for field, ours in TRL_OPTIM.items():
    add(field, EXACT, {f'optim.{ours}': cfg[field]})
  _trl_loss(cfg, add)
  _trl_sampling(cfg, add)
  _trl_reference(cfg, add)
  _trl_batch(cfg, add)
  return lines


def _trl_loss(cfg, add) -> None:
  loss = cfg['loss_type']
  if loss not in TRL_LOSSES:
    raise records.UserError(f'loss_type={loss!r} is not one of {", ".join(TRL_LOSSES)}')
  ours = {f'algorithm.{name}': value for name, value in TRL_LOSSES[loss].items()}
  status, note = EXACT, ''
  if loss == 'dr_grpo':
    ours['algorithm.loss_constant'] = cfg['max_completion_length']
  if loss == 'bnpo':
    ours['algorithm.local_rows'] = cfg['per_device_train_batch_size']
  if loss in ('grpo', 'sapo', 'dr_grpo', 'luspo'):
    note = 'equal while no completion is masked whole: TRL counts such rows, ours does not'
    status = APPROXIMATE if cfg['mask_truncated_completions'] else EXACT
  add('loss_type', status, ours, note)
  if loss == 'cispo':
    cap = cfg['epsilon'] if cfg['epsilon_high'] is None else cfg['epsilon_high']
    note = 'the absolute cap of the ratio' + ('' if cfg['epsilon_high'] else ": TRL's epsilon!")
    add('epsilon_high', EXACT, {'algorithm.cispo_ratio_max': cap}, note)
  else:
    add('epsilon_high', EXACT, {'algorithm.epsilon_high': cfg['epsilon_high']})
  scale = {True: 'group', False: 'none'}.get(cfg['scale_rewards'], cfg['scale_rewards'])
  add('scale_rewards', EXACT, {'algorithm.scale_rewards': scale})
  coef, same = cfg['entropy_coef'], TRL_LOSSES[loss]['loss_agg'] == 'token_mean'
  note = '' if same or not coef else "TRL's bonus is a token mean, ours has the loss's aggregation"
  add('entropy_coef', APPROXIMATE if note else EXACT, {'algorithm.entropy_coef': coef}, note)
  weights = cfg['reward_weights']
  note = '' if weights is None else 'set rewards.<name>.weight'
  add('reward_weights', EXACT if weights is None else UNSUPPORTED, {}, note)


def _trl_sampling(cfg, add) -> None:
  add('num_generations', EXACT, {'env.num_generations': cfg['num_generations']})
  length = cfg['max_completion_length']
  add('max_completion_length', EXACT, {'env.max_completion_length': length})
  add('temperature', EXACT, {'env.temperature': cfg['temperature']})
  for field, off in (('top_p', 1.0), ('top_k', 0), ('min_p', None)):
    used = cfg[field] != off
    note = 'ours scores the truncated distribution, TRL the whole one' if used else ''
    value = 0.0 if cfg[field] is None else cfg[field]
    add(field, APPROXIMATE if used else EXACT, {f'env.{field}': value} if used else {}, note)
  vllm = cfg['use_vllm'] and cfg['vllm_importance_sampling_correction']
  mode = cfg['vllm_importance_sampling_mode'] if vllm else 'none'
  add('use_vllm', EXACT, {}, 'our sampler is the trainer: its correction is for stale samples')
  add('vllm_importance_sampling_correction', EXACT, {})
  add('vllm_importance_sampling_mode', EXACT, {'algorithm.importance_correction': mode})
  high, low = (cfg[f'vllm_importance_sampling_clip_{end}'] for end in ('max', 'min'))
  add('vllm_importance_sampling_clip_max', EXACT, {'algorithm.importance_max': high})
  add('vllm_importance_sampling_clip_min', EXACT, {'algorithm.importance_min': low})


def _trl_reference(cfg, add) -> None:
  estimator = 'ratio_k3' if cfg['use_bias_correction_kl'] else 'k3'
  add('use_bias_correction_kl', EXACT, {'algorithm.kl_estimator': estimator})
  sync = cfg['ref_model_sync_steps'] if cfg['sync_ref_model'] else 0
  add('sync_ref_model', EXACT, {})
  add('ref_model_sync_steps', EXACT, {'reads.ref.sync_steps': sync})
  add('ref_model_mixup_alpha', EXACT, {'reads.ref.mixup_alpha': cfg['ref_model_mixup_alpha']})
  schedule = cfg['lr_scheduler_type']
  known = {'linear': 'linear', 'cosine': 'cosine', 'constant': 'constant'}
  known |= {'constant_with_warmup': 'constant'}
  ours = {'optim.schedule': known.get(schedule, schedule), 'optim.final_fraction': 0.0}
  add('lr_scheduler_type', EXACT if schedule in known else UNSUPPORTED, ours, '')
  decay = cfg['weight_decay']
  ours = {'optim.weight_decay': ((r'scale|bias', 0.0), (r'.*', decay))}
  add('weight_decay', EXACT, ours)


def _trl_batch(cfg, add) -> None:
  accumulate = cfg['gradient_accumulation_steps']
  generation = cfg['steps_per_generation'] or accumulate
  rollouts = cfg['generation_batch_size'] or cfg['per_device_train_batch_size'] * generation
  note = 'for one process; multiply by the number of processes'
  note = '' if cfg['generation_batch_size'] else note
  status = EXACT if cfg['generation_batch_size'] else APPROXIMATE
  prompts = {'prompts_per_step': max(rollouts // cfg['num_generations'], 1)}
  add('generation_batch_size', status, prompts, note)
  add('per_device_train_batch_size', EXACT, {}, 'ours packs: rows_per_batch is about memory')
  minibatches = {'algorithm.num_minibatches': max(generation // accumulate, 1)}
  add('gradient_accumulation_steps', EXACT, {})
  several = generation > accumulate and cfg['loss_type'] in ('dapo', 'cispo', 'vespo')
  note = 'TRL divides each step by the average tokens of the steps, ours by its own' * several
  add('steps_per_generation', APPROXIMATE if several else EXACT, minibatches, note)


def nearest(cfg, env, section) -> dict[str, Any]:
  out = {name: getattr(cfg, name) for name in TRL_SAME}
  level = out['importance_sampling_level']
  out['importance_sampling_level'] = level.removesuffix('_token')
  kinds = [
    loss
    for loss, fields in TRL_LOSSES.items()
    if fields.get('surrogate', 'ppo_clip') == cfg.surrogate and fields['loss_agg'] == cfg.loss_agg
  ]
  out['loss_type'] = kinds[0] if kinds else '(none)'
  out['epsilon_high'] = cfg.cispo_ratio_max if cfg.surrogate == 'cispo' else cfg.epsilon_high
  out['scale_rewards'] = cfg.scale_rewards if cfg.baseline == 'group_mean' else '(none)'
  if cfg.beta:
    out['use_bias_correction_kl'] = cfg.kl_estimator == 'ratio_k3'
  out['entropy_coef'] = cfg.entropy_coef
  if cfg.importance_correction != 'none':
    out |= {'use_vllm': True, 'vllm_importance_sampling_mode': cfg.importance_correction}
  ref = section.reads.ref
  if cfg.beta and ref.sync_steps:
    out |= {'sync_ref_model': True, 'ref_model_sync_steps': ref.sync_steps}
    out['ref_model_mixup_alpha'] = ref.mixup_alpha
  out |= {'num_generations': env.num_generations, 'temperature': env.temperature}
  out['max_completion_length'] = env.max_completion_length
  return {name: value for name, value in out.items() if value != TRL_DEFAULTS[name]}
