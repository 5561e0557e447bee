"""The objective card: the exact formula that a reinforce phase optimises, in words and symbols.

`card` reads the built phase, so what it prints is what runs. Symbols: R reward, A advantage, pi the
policy, pi_old the policy before the update, mu the sampler's, i a completion, t one of its tokens.
"""

from __future__ import annotations

from reasonrl import peers
from reasonrl.algorithms import grpo

BASELINE = {
  'group_mean': 'mean of its group',
  'leave_one_out': 'mean of the others of its group',
  'batch_mean': 'mean of the batch',
  'none': '0',
}
SCALE = {
  'group': 'std of its group',
  'batch': 'std of the batch',
  'mean': 'mean of its group',
  'none': '',
}
AGGREGATION = {
  'token_mean': ('sum_i sum_t loss_it / N', 'N = trained tokens of the optimizer step'),
  'seq_mean_token_mean': (
    '(1/B) sum_i (1/|o_i|) sum_t loss_it',
    'B = completions of the optimizer step with a trained token, |o_i| = its trained tokens',
  ),
  'token_sum_const': (
    'sum_i sum_t loss_it / (B L)',
    'B = completions of the optimizer step with a trained token, L = loss_constant = {L}',
  ),
  'seq_mean_token_sum': (
    '(1/B) sum_i sum_t loss_it',
    'B = completions of the optimizer step with a trained token',
  ),
  'prompt_mean': (
    '(1/P) sum_p (1/|o_p|) sum_{i in p} sum_t loss_it',
    'P = prompts of the optimizer step, |o_p| = trained tokens of all completions of p',
  ),
  'token_mean_local': (
    '(1/C) sum_c (1/|o_c|) sum_{i in c} sum_t loss_it',
    'C = blocks of local_rows = {rows} completions, |o_c| = trained tokens of a block',
  ),
  'token_sum': ('sum_i sum_t loss_it', 'no denominator: the loss grows with the batch'),
}
# What the estimator's gradient is in expectation, in the loss, for tokens drawn from pi.
KL = {
  'k1': ('log(pi/pi_ref)', 'no gradient at all on policy'),
  'k2': ('log(pi/pi_ref)^2 / 2', 'gradient of KL(pi || pi_ref) on policy'),
  'k3': ('pi_ref/pi - log(pi_ref/pi) - 1', 'gradient of the FORWARD KL(pi_ref || pi)'),
  'ratio_k3': (
    'r (pi_ref/pi - log(pi_ref/pi) - 1)',
    'gradient of KL(pi || pi_ref), always',
  ),
  'k3_plus': ('value of k3, gradient of k2', 'gradient of KL(pi || pi_ref) on policy'),
}


def card(cfg: grpo.GRPO, env, section) -> list[tuple[str, str]]:
  """(label, text) of every part of the objective of a reinforce phase.

  Args:
    cfg: its algorithm.
    env: its environment, for G, lengths and temperature.
    section: its section of the config.
  """
  lines = [('maximise', 'minus the loss below'), ('loss', _loss(cfg)), *_advantage(cfg, env)]
  lines += [('ratio', _ratio(cfg)), ('surrogate', _surrogate(cfg))]
  if cfg.importance_correction != 'none':
    lines.append(('rho', _correction(cfg)))
  if cfg.beta:
    lines.append(('KL', _kl(cfg, section)))
  if cfg.entropy_coef:
    lines.append(('H', 'entropy of the whole next-token distribution, exact'))
  formula, denominator = AGGREGATION[cfg.loss_agg]
  denominator = denominator.replace('{L}', str(cfg.loss_constant))
  lines.append(('aggregation', f'{formula}; {denominator.replace("{rows}", str(cfg.local_rows))}'))
  lines += [('trained tokens', _masks(cfg)), ('groups', _groups(cfg, section))]
  per_step = cfg.num_iterations * cfg.num_minibatches
  cut = [f'{name} {getattr(env, name):g}' for name in ('top_k', 'top_p', 'min_p')]
  cut = [text for text in cut if text not in ('top_k 0', 'top_p 1', 'min_p 0')]
  if cut:
    lines.append(
      ('pi, mu', f'renormalised over the tokens that {", ".join(cut)} kept when it was drawn')
    )
  lines.append(
    (
      'steps',
      f'{section.prompts_per_step} prompts x {env.num_generations} samples at temperature '
      f'{env.temperature:g}, {cfg.num_iterations} pass(es) of {cfg.num_minibatches} minibatch(es): '
      f'{per_step} optimizer step(s); the sampler is renewed every '
      f'{section.sampler_sync_steps} step(s)',
    )
  )
  return lines


def _loss(cfg) -> str:
  terms = ['surrogate(r_it, A_it)']
  if cfg.importance_correction != 'none' and cfg.surrogate != 'vespo':
    terms = ['rho_it surrogate(r_it, A_it)']
  if cfg.beta and cfg.kl_placement == 'loss':
    terms.append(f'{cfg.beta:g} KL_it')
  text = ' + '.join(terms)
  return f'{text} - {cfg.entropy_coef:g} H_it' if cfg.entropy_coef else text


def _advantage(cfg, env) -> list[tuple[str, str]]:
  eps = f' + {cfg.advantage_eps:g}'
  ddof = f' (ddof {cfg.std_ddof})'
  if cfg.gdpo:
    text = f'z of the batch of sum_k w_k z_ik, z_ik = (R_ik - mean of its group) / (std{ddof}{eps})'
  else:
    centred = 'R_i' if cfg.baseline == 'none' else f'R_i - {BASELINE[cfg.baseline]}'
    text, scale = centred, SCALE[cfg.scale_rewards]
    if scale:
      spread = cfg.scale_rewards != 'mean'
      text = f'({centred}) / ({scale}{ddof if spread else ""}{eps if spread else ""})'
  if cfg.returns == 'to_go':
    text = f'sum of rewards from t on (gamma {cfg.gamma:g}), the outcome {text} on the last token'
  else:
    text += ', the same on every token, plus the credit that rewards give single tokens'
  if cfg.whiten:
    text += f'; then whitened over the tokens of the batch (std{eps})'
  weights = cfg.positive_weight, cfg.negative_weight
  if weights != (1.0, 1.0):
    text += f'; times {weights[0]:g} where positive, {weights[1]:g} where negative'
  lines = [('A', text)]
  if cfg.kl_in_reward:
    where = 'r_t' if cfg.returns == 'to_go' else 'R_i (summed over tokens)'
    lines.append(('reward', f'{where} - {cfg.beta:g} KL_it; no gradient through it'))
  return lines


def _ratio(cfg) -> str:
  old = 'mu' if cfg.old_policy == 'sampler' else 'pi_old'
  if cfg.old_policy == 'trainer' and not cfg.moves:
    old = 'stop_gradient(pi)'
  clamp = '' if cfg.log_ratio_clamp is None else f', its log within +-{cfg.log_ratio_clamp:g}'
  if cfg.surrogate == 'reinforce':
    return 'not used'
  if cfg.importance_sampling_level == 'token':
    text = f'r_it = pi / {old} of the token{clamp}'
  else:
    text = f'r_i = exp(mean_t log pi / {old}) of the completion{clamp}'
    if cfg.importance_sampling_level == 'sequence_token':
      text += ', on each token with that value and its own gradient (GSPO-token)'
  return text + (' = 1 in value: one optimizer step per rollout' if 'stop' in old else '')


def _surrogate(cfg) -> str:
  if cfg.surrogate == 'reinforce':
    return '-A log pi'
  if cfg.surrogate == 'cispo':
    low = '0' if cfg.cispo_ratio_min is None else f'{cfg.cispo_ratio_min:g}'
    return f'-stop_gradient(clip(r, {low}, {cfg.cispo_ratio_max:g})) A log pi (absolute bounds)'
  if cfg.surrogate == 'sapo':
    taus = f'{cfg.sapo_temperature_pos:g} if A > 0 else {cfg.sapo_temperature_neg:g}'
    return f'-(4/tau) sigmoid(tau (r - 1)) A, tau = {taus}'
  if cfg.surrogate == 'vespo':
    shape = cfg.vespo_k_pos, cfg.vespo_lambda_pos, cfg.vespo_k_neg, cfg.vespo_lambda_neg
    return (
      '-stop_gradient(e^lambda w^k e^(-lambda w)) A log pi, w = prod_t pi/pi_old (with rho), '
      'k, lambda = {:g}, {:g} if A >= 0 else {:g}, {:g}'.format(*shape)
    )
  first = 'r' if cfg.delta is None else f'min(r, {cfg.delta:g})'
  text = f'-min({first} A, clip(r, {1 - cfg.epsilon:g}, {1 + cfg.high:g}) A)'
  return text if cfg.dual_clip is None else f'{text}, at most {cfg.dual_clip:g} |A| where A < 0'


def _correction(cfg) -> str:
  level, kind = cfg.importance_correction.split('_')
  what = 'pi_old / mu of the token' if level == 'token' else 'prod_t pi_old / mu of the completion'
  low = '0' if cfg.importance_min is None else f'{cfg.importance_min:g}'
  how = 'clipped to' if kind == 'truncate' else 'set to 0 outside'
  return f'{what}, {how} [{low}, {cfg.importance_max:g}]; no gradient; denominators unchanged'


def _kl(cfg, section) -> str:
  formula, gradient = KL[cfg.kl_estimator]
  if cfg.kl_in_reward:
    gradient = 'part of the reward, with pi_old for pi'
  ref, follows = section.reads.ref, ''
  if ref.sync_steps:
    follows = (
      f', every {ref.sync_steps} steps pi_ref <- {ref.mixup_alpha:g} pi + '
      f'{1 - ref.mixup_alpha:g} pi_ref'
    )
  return (
    f'{cfg.kl_estimator} = {formula}: {gradient}; pi_ref = {ref.model} from {ref.init}{follows}'
  )


def _masks(cfg) -> str:
  text = 'those the policy sampled, EOS included; not prompt, padding or environment'
  cut = 'without the tokens of' if cfg.mask_truncated_completions else 'with those of'
  return f'{text}; {cut} completions cut off at the cap (whose reward counts in the baseline)'


def _groups(cfg, section) -> str:
  if cfg.zero_variance == 'keep':
    return 'all; one of equal rewards has A = 0 and counts in the denominator'
  text = f'without those of equal {cfg.zero_variance_of}'
  if section.max_generation_batches > 1:
    text += f', replaced from up to {section.max_generation_batches} rollouts'
  return text


def explain(config, built: dict) -> str:
  """The cards of all reinforce phases of a config, and the peers' settings that come nearest.

  Args:
    config: the run's.
    built: phase name -> (algorithm, environment).
  """
  out = []
  for name, (cfg, env) in built.items():
    lines = card(cfg, env, config[name])
    for peer, fields in peers.nearest(cfg, env, config[name]).items():
      text = ', '.join(f'{field}={value}' for field, value in fields.items())
      lines.append((f'nearest {peer}', f'its defaults but {text}' if text else 'its defaults'))
    width = max(len(label) for label, _ in lines)
    out += [f'objective of {name}', *(f'  {label:<{width}}  {text}' for label, text in lines)]
  return '\n'.join(out)
