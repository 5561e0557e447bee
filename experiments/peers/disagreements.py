"""Where TRL and we differ: both numbers, whether one explains the other, who is right and why.

Each function makes one entry. `reproduces` is the error of OUR result after the stated change
against TRL's: a disagreement counts as understood when that is rounding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import batches
import numpy as np
import ours
import theirs
import torch
import trl

from reasonrl import advantages

ROWS = ('grpo', 'dr_grpo', 'sapo', 'luspo')  # loss types that average over completions
TOKENS = ('dapo', 'cispo', 'vespo')  # that divide by the tokens of the generation batch


def number(option: str, loss_type: str, level: str) -> int | None:
  """The entry that explains why this case of the grid differs or is refused."""
  sequence = level == 'sequence'
  return {
    'mask_truncated': 1 if loss_type in ROWS else None,
    'entropy_coef': 2 if loss_type in ROWS else None,
    'two optimizer steps': 3 if loss_type in TOKENS else None,
    'vLLM token_truncate': 4 if sequence else None,
    'vLLM token_mask': 4 if sequence else None,
    'beta, ratio x k3': 5 if sequence else None,
  }.get(option)


class Entry(NamedTuple):
  title: str
  where: str  # function of TRL
  numbers: str
  verdict: str


def norm(x: dict) -> float:
  return float(np.linalg.norm(x['gradient']))


def say(want: dict, got: dict) -> str:
  return (
    f'TRL: loss {want["loss"]:.5f}, gradient norm {norm(want):.5f}; '
    f'ours: {got["loss"]:.5f}, {norm(got):.5f}'
  )


def reproduces(got: dict, want: dict) -> str:
  """The larger error of loss and gradient."""
  gap = np.abs(got['gradient'] - want['gradient']).max() / np.abs(want['gradient']).max()
  return f'{max(gap, abs(got["loss"] - want["loss"]) / np.abs(want["gradient"]).sum()):.0e}'


def scaled(x: dict, factor: float) -> dict:
  return x | {'loss': factor * x['loss'], 'gradient': factor * x['gradient']}


def both(settings: dict, case: batches.Case, step: int = 0) -> tuple[dict, dict]:
  """TRL's result and ours."""
  algorithm = ours.equivalent(theirs.DEFAULTS[trl.GRPOTrainer] | settings)
  return theirs.run(settings, case, step=step), ours.run(algorithm, case, step)


def empty_rows(base) -> Entry:
  case, lines = batches.make(0, off_policy=True), []
  for loss_type in ROWS:
    level = 'sequence' if loss_type == 'luspo' else 'token'
    settings = base | {'loss_type': loss_type, 'importance_sampling_level': level}
    want, got = both(settings | {'mask_truncated_completions': True}, case)
    error = reproduces(scaled(got, case.stopped_B.mean()), want)
    lines.append(f'{loss_type}: {say(want, got)} (ours x {case.stopped_B.mean():.3f}: {error})')
  return Entry(
    'Completions without a trained token count in the mean over completions',
    '`GRPOTrainer._compute_loss`, `.mean()` and `per_token_loss.size(0)`',
    '; '.join(lines) + '.',
    'Ours, for what masking is for: a masked completion should be as if it were absent (as in verl '
    'and OpenRLHF). In TRL it makes the step smaller, except under `dapo`, `bnpo`, `cispo` and '
    '`vespo`, where it leaves the divisor too. For `dr_grpo` one may hold the other view: its '
    'point is a constant divisor.',
  )


def entropy(base) -> Entry:
  case, lines = batches.make(0, off_policy=True), []
  for loss_type in ROWS:
    settings = base | {'loss_type': loss_type, 'importance_sampling_level': 'token'}
    want, got = both(settings | {'entropy_coef': 0.05}, case)
    plain = ours.equivalent(theirs.DEFAULTS[trl.GRPOTrainer] | settings)
    bonus = dataclasses.replace(
      *(plain,),
      **{'entropy_coef': 0.05, 'loss_agg': 'token_mean', 'surrogate': 'ppo_clip', 'epsilon': 0.2},
      **{'positive_weight': 0.0, 'negative_weight': 0.0, 'importance_sampling_level': 'token'},
    )
    parts = [ours.run(x, case) for x in (plain, bonus)]
    total = {name: parts[0][name] + parts[1][name] for name in ('loss', 'gradient')}
    lines.append(
      f'{loss_type}: {say(want, got)} (ours with a token mean of H: {reproduces(total, want)})'
    )
  return Entry(
    'The entropy bonus is a mean over tokens, whatever the loss type',
    '`GRPOTrainer._compute_loss`, `entropy_loss`',
    '; '.join(lines) + '.',
    'Both do what they document. TRL: `entropy_coef` has one meaning for all loss types. Ours: the '
    'per-token loss, bonus included, is aggregated once, as in verl, so a completion has the same '
    'weight in every term. With token means (`dapo`, `bnpo`, `cispo`, `vespo`) they are equal; '
    "TRL's coefficient for `dr_grpo` is ours times L B / tokens.",
  )


def optimizer_steps(base) -> Entry:
  case, settings = batches.make(0, off_policy=True), base | {'steps_per_generation': 2}
  tokens = case.mask_BC.reshape(2, -1).sum(1)
  lines = []
  for step in (0, 1):
    want, got = both(settings | {'loss_type': 'dapo'}, case, step)
    error = reproduces(scaled(got, tokens[step] / tokens.mean()), want)
    lines.append(f'step {step + 1}: {say(want, got)} (ours x {tokens[step]} / {tokens.mean()}: ')
    lines[-1] += f'{error})'
  return Entry(
    'Several optimizer steps per generation: whose tokens divide',
    '`GRPOTrainer._compute_loss`, `num_items_in_batch`; `dapo`, `cispo`, `vespo`',
    '; '.join(lines) + '.',
    'Ours, by what both document ("active token in the global accumulated batch" is one optimizer '
    "step). TRL divides by the generation batch's tokens per step, on average the same; a step "
    'with many tokens is then larger. With one step per generation there is no difference.',
  )


def token_weights_of_sequences(base) -> Entry:
  settings = base | {'loss_type': 'grpo', 'importance_sampling_level': 'sequence'}
  settings |= {'use_vllm': True, 'vllm_importance_sampling_mode': 'token_truncate'}
  settings |= {'vllm_importance_sampling_clip_max': 3.0, 'num_iterations': 2}
  case = batches.make(0, off_policy=True)
  want = theirs.run(settings, case)
  algorithm = ours.equivalent(theirs.DEFAULTS[trl.GRPOTrainer] | settings)
  got = ours.run(dataclasses.replace(algorithm, importance_sampling_level='sequence_token'), case)
  cosine = float((want['gradient'] * got['gradient']).sum() / norm(want) / norm(got))
  return Entry(
    'A ratio per completion with a correction per token',
    '`GRPOTrainer._compute_loss`, `* inputs["importance_sampling_ratio"]`',
    f"{say(want, got)} with 'sequence_token' (cosine of the gradients {cosine:.4f}); 'sequence' is "
    'refused.',
    'Neither is an unbiased weight. TRL spreads the gradient of s_i evenly over the tokens, times '
    "the sum of rho_t; with 'sequence_token' (GSPO-token) every token has its own rho_t, at equal "
    "value. We refuse the first, since 'sequence_truncate' and 'sequence_mask' say what is meant; "
    'with those TRL and we agree.',
  )


def ratio_kl_of_sequences(base) -> Entry:
  settings = base | {'loss_type': 'grpo', 'importance_sampling_level': 'sequence', 'beta': 0.1}
  case = batches.make(0, off_policy=True)
  k3 = both(settings | {'use_bias_correction_kl': False, 'num_iterations': 2}, case)
  want = theirs.run(settings | {'use_bias_correction_kl': True, 'num_iterations': 2}, case)
  return Entry(
    'A ratio per completion times the KL of a token',
    '`GRPOTrainer._compute_loss`, `per_token_kl * coef_1`',
    f'TRL: loss {want["loss"]:.5f}, gradient norm {norm(want):.5f}; ours: refused (without the '
    f'factor both have {k3[0]["loss"]:.5f}, {norm(k3[0]):.5f}).',
    "Ours: the factor makes the gradient that of the reverse KL only with the token's own ratio, "
    "as TRL's documentation of `use_bias_correction_kl` says too. It is TRL's default, so "
    'a ratio per completion with `beta` has it there unasked.',
  )


def kl_default(base) -> Entry:
  case = batches.make(0, off_policy=True)
  settings = base | {'beta': 0.1, 'num_iterations': 2}
  want = theirs.run(settings, case)
  k3 = ours.run(ours.equivalent(theirs.DEFAULTS[trl.GRPOTrainer] | settings), case)
  fields = {'kl_estimator': 'k3'}
  algorithm = ours.equivalent(theirs.DEFAULTS[trl.GRPOTrainer] | settings)
  got = ours.run(dataclasses.replace(algorithm, **fields), case)
  return Entry(
    'Default KL estimator when `beta` is not 0',
    '`GRPOConfig.use_bias_correction_kl`, True',
    f"{say(want, got)} (ours with kl_estimator='ratio_k3': {reproduces(k3, want)}).",
    'TRL, as a default: ratio x k3 has the gradient of the reverse KL on and off policy, k3 in the '
    "loss that of the forward KL. Ours is the paper's term; whoever wants TRL 1.16 sets "
    "`kl_estimator='ratio_k3'`. At `beta=0`, both defaults, nothing changes.",
  )


def cispo_cap(base) -> Entry:
  case = batches.make(0, off_policy=False)
  settings = base | {'loss_type': 'cispo'}
  want, same = both(settings, case)
  got = both(settings | {'epsilon_high': 5.0}, case)[1]
  return Entry(
    "CISPO's cap when it is not given",
    '`GRPOTrainer.__init__`, `epsilon_high`; `_compute_loss`, `torch.clamp(coef_1, max=...)`',
    f'{say(want, got)} on policy (ours with cispo_ratio_max=0.2: {reproduces(same, want)}).',
    "Ours: TRL's `epsilon_high` falls back to `epsilon`, 0.2, an absolute cap there, so that every "
    'ratio near 1 becomes 0.2 and the gradient a fifth. Our preset has the 5.0 that ScaleRL and '
    "TRL's documentation of `epsilon_high` recommend; without a cap the configuration is refused.",
  )


def masked_overflow(base) -> Entry:
  case = batches.make(0, off_policy=True)
  written_BC, old = case.written_BC.copy(), case.logits['old'].copy()
  written_BC[:, 1] = False
  old[np.arange(batches.B), 1, case.tokens_BC[:, 1]] = -800.0  # e^800 is infinite in float64
  logits = case.logits | {'old': old}
  case = dataclasses.replace(case, written_BC=written_BC, logits=logits)
  want, got = both(base | {'loss_type': 'dapo', 'num_iterations': 2}, case)
  return Entry(
    'An extreme ratio on a token outside the mask',
    '`GRPOTrainer._compute_loss`, `torch.exp(log_importance_weights)` before `* mask`',
    say(want, got) + '.',
    "Ours: the environment's tokens are not trained on, so they must not matter. Infinity times 0 "
    'is NaN; the log-ratio has to be masked before exp. In float32 a gap of 89 nats is enough.',
  )


def equal_rewards(base) -> Entry:
  rewards = np.full(batches.B, 0.7)
  case = batches.make(0, off_policy=False)
  case = dataclasses.replace(case, rewards={'first': rewards, 'second': rewards})
  torch.set_default_dtype(torch.float32)  # as in training
  single = {name: x.astype(np.float32) for name, x in case.logits.items()}
  settings = base | {'num_generations': 6}
  want = theirs.run(settings, dataclasses.replace(case, logits=single))
  torch.set_default_dtype(torch.float64)
  group_R = np.arange(batches.B) // 6
  got = advantages.outcome(1.5 * rewards, group_R, 'group_mean', 'group', 1, 1e-4, float)
  return Entry(
    'A group of equal rewards, in float32',
    '`GRPOTrainer._generate_and_score_completions`, `rewards - mean_grouped_rewards`',
    f'Largest advantage of groups of 6 with rewards 0.7 and weights 1 and 0.5: TRL '
    f'{np.abs(want["advantages"]).max():.1e}, ours {np.abs(got).max():.1e}.',
    'Ours: no variance, no signal. The rest of a float32 mean is divided by 1e-4: small, but '
    'not zero, so Adam sees a gradient where there is none.',
  )


def metrics(base) -> Entry:
  lines = []
  case = batches.make(0, off_policy=True)
  settings = base | {'num_iterations': 2, 'beta': 0.1, 'use_bias_correction_kl': False}
  want, got = (x['metrics'] for x in both(settings, case))
  names = {'kl': 'kl', 'entropy': 'entropy'}
  names |= {f'clip_ratio/{side}_mean': f'clip_ratio/{side}' for side in ('low', 'high')}
  same = max(abs(want[a] - got[b]) for a, b in names.items())
  lines.append(f'`{"`, `".join(names)}` agree to {same:.0e} per token')
  want, got = (x['metrics'] for x in both(settings | {'use_bias_correction_kl': True}, case))
  lines.append(f'but `kl` under bias correction is TRL {want["kl"]:.4f}, ours {got["kl"]:.4f}')
  cispo = settings | {'loss_type': 'cispo', 'epsilon_high': 1.2}
  want, got = (x['metrics'] for x in both(cispo, case))
  lines.append(f'`cispo_clip_ratio` TRL {want["cispo_clip_ratio"]:.4f}')
  lines[-1] += f', ours (clip_ratio/high) {got["clip_ratio/high"]:.4f}'
  level = settings | {'importance_sampling_level': 'sequence', 'epsilon': 0.02}
  want, got = (x['metrics'] for x in both(level, case))
  name = 'clip_ratio/high'
  lines.append(f'`{name}_mean` of sequences TRL {want[f"{name}_mean"]:.4f}, ours {got[name]:.4f}')
  want, got = (x['metrics'] for x in both(settings | {'delta': 1.3}, case))
  lines.append(f'with `delta` {want[f"{name}_mean"]:.4f} and {got[name]:.4f}')
  return Entry(
    'Metrics',
    '`GRPOTrainer._compute_loss`, below "Log the metrics"',
    '; '.join(lines) + '.',
    'Ours for CISPO: the ratio is capped whatever the sign of the advantage, TRL counts only '
    'positive ones. Ours for `delta`: tokens past it with a negative advantage have no gradient '
    "either. A choice: TRL counts a clipped sequence once, we every token of it; TRL's `kl` is the "
    'weighted term, ours the estimate of the KL.',
  )


def both_rloo(off_policy: bool, **settings) -> tuple[dict, dict]:
  """RLOOTrainer, which knows no holes, and our preset 'rloo'."""
  case = batches.make(0, off_policy)
  case = dataclasses.replace(case, written_BC=np.ones_like(case.written_BC))
  fields = ours.common.algorithm('rloo').to_dict() | settings
  algorithm = ours.build(fields | {'num_iterations': 1 + off_policy})
  settings |= {'num_generations': batches.G, 'per_device_train_batch_size': batches.B}
  settings |= {'steps_per_generation': 1, 'gradient_accumulation_steps': 1}
  return theirs.run(settings, case, cls=trl.RLOOTrainer), ours.run(algorithm, case)


def rloo(base) -> Entry:
  del base
  lines = []
  for off_policy in (False, True):
    want, got = both_rloo(off_policy, beta=0.05)
    gap = np.abs(got['gradient'] - want['gradient']).max() / np.abs(want['gradient']).max()
    cosine = float((want['gradient'] * got['gradient']).sum() / norm(want) / norm(got))
    advantage = np.abs(got['advantages'] - want['advantages']).max()
    lines.append(
      f'{"off" if off_policy else "on"} policy: {say(want, got)}; error of the gradient {gap:.0e}, '
      f'cosine {cosine:.3f}, error of the advantages {advantage:.0e}'
    )
  return Entry(
    'RLOO: the product of ratios, and the value of the loss',
    '`RLOOTrainer._compute_loss`, `coef_1 = exp(logps - old_logps)`',
    '. '.join(lines) + '.',
    'On policy, which is all that the paper has, the gradient is the same and the value means '
    "nothing: TRL's is -mean A, ours weighs it by length. Off policy TRL's product is the exact "
    'importance weight of a completion, but a clip at 1 +- 0.2 of it stops whole completions, the '
    "long ones first; our preset clips PPO's ratio of a token, which is biased and keeps them. A "
    'clipped product has no setting here.',
  )


def rloo_truncated(base) -> Entry:
  del base
  want, got = both_rloo(False, beta=0.5, mask_truncated_completions=True)
  kept = np.flatnonzero(batches.make(0, off_policy=False).stopped_B)[:3]
  show = lambda x: ', '.join(f'{a:.3f}' for a in x['advantages'][kept])
  return Entry(
    'RLOO: the KL of a truncated completion',
    '`RLOOTrainer._generate_and_score_completions`, `per_token_kl * completion_mask`',
    f'Advantages of the first kept completions, beta 0.5: TRL {show(want)}; ours {show(got)}.',
    'Ours: a truncated completion keeps its reward in the baseline, so it keeps the penalty that '
    "belongs to it. TRL's mask removes the KL but not the reward, and the baseline of the others "
    'moves by that KL.',
  )


ENTRIES = (
  *(empty_rows, entropy, optimizer_steps, token_weights_of_sequences, ratio_kl_of_sequences),
  *(kl_default, cispo_cap, masked_overflow, equal_rewards, metrics, rloo, rloo_truncated),
)


def report(base: dict) -> list[str]:
  """Markdown lines: every disagreement, and what has no counterpart."""
  lines = ['## Disagreements', '', 'In brackets: the error of ours after the stated change.', '']
  for n, entry in enumerate(ENTRIES, 1):
    title, where, numbers, verdict = entry(base)
    lines += [f'{n}. **{title}** ({where}). {numbers} *Who is right:* {verdict}', '']
  return lines + [
    'In TRL without a counterpart here: `off_policy_mask_threshold`, `top_entropy_quantile`, the',
    "adaptive `entropy_coef`, RLOO's `normalize_advantages` and `reward_clip_range`, the auxiliary",
    "loss of routers, `importance_sampling_level='sequence'` with `vespo` (TRL warns, we refuse).",
  ]
