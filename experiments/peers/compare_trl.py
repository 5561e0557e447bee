"""Our loss and gradient against TRL's own trainer code, on random batches.

    experiments/peers/compare_trl.sh

makes the environment `.venv-trl`, installs pinned TRL, transformers and torch and this repository
into it, and runs this program. A CPU build of torch is enough: pip takes one where it knows an
index that has it. In such an environment: python experiments/peers/compare_trl.py

1. `batches.make` draws logits, ragged rows with holes, rewards with gaps.
2. `theirs.run` calls GRPOTrainer's methods on it, unmodified, in float64: a fake model returns
   log-probabilities of the logits, a fake `_generate` the completions; all else is TRL's.
3. `ours.run` calls GRPO.advantages, weights, prepare and token_loss with the equivalent settings.
   It computes in float64 too, but advantages and weights are float32, as in training.
4. Loss and gradient with respect to the logits are compared for every combination below, and
   written with all disagreements into --to (default: trl.md beside this file).

Errors are the largest difference, relative to the largest entry of TRL's gradient, and of the loss
relative to the sum of |gradient|, since a loss can be 0 by cancellation. What differs by more than
TOLERANCE, and is not explained in `disagreements.py`, ends the program with an error. Left out on
purpose: everything before log-probabilities (models, sampling) and after gradients (optimizers).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import logging
import pathlib
import time

import batches
import disagreements
import numpy as np
import ours
import theirs
import transformers
import trl

from reasonrl import records

TOLERANCE = 1e-5
SEEDS = (0, 1, 2)
BASE = {
  'num_generations': batches.G,
  'per_device_train_batch_size': batches.B,
  'max_completion_length': batches.C,
  'steps_per_generation': 1,
  'gradient_accumulation_steps': 1,
  'beta': 0.0,
}
SCALES = {
  'group': {},
  'batch': {'scale_rewards': 'batch'},
  'none': {'scale_rewards': 'none'},
  'normalize_then_sum': {'multi_objective_aggregation': 'normalize_then_sum'},
}
CLIPPED = ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'luspo')


def correction(mode: str, low: float | None, high: float) -> dict:
  """TRL's correction of a vLLM sampler."""
  bounds = {'vllm_importance_sampling_clip_min': low, 'vllm_importance_sampling_clip_max': high}
  return {'use_vllm': True, 'vllm_importance_sampling_mode': mode, **bounds}


MODES = ('token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask')
EVERYTHING = {'beta': 0.1, 'use_bias_correction_kl': False, 'epsilon': 0.1, 'epsilon_high': 0.3}
OPTIONS = {  # what is changed, and the loss types that read it (TRL refuses vespo with sequence_*)
  'defaults': ({}, tuple(ours.LOSS_TYPES)),
  'beta, k3': ({'beta': 0.1, 'use_bias_correction_kl': False}, tuple(ours.LOSS_TYPES)),
  'beta, ratio x k3': ({'beta': 0.1, 'use_bias_correction_kl': True}, tuple(ours.LOSS_TYPES)),
  'epsilon_high': ({'epsilon_high': 0.35}, (*CLIPPED, 'cispo')),
  'delta': ({'delta': 1.5}, CLIPPED),
  **{
    f'vLLM {mode}': (
      correction(mode, 0.6, 1.5),
      tuple(x for x in ours.LOSS_TYPES if x != 'vespo' or mode.startswith('token')),
    )
    for mode in MODES
  },
  'mask_truncated': ({'mask_truncated_completions': True}, tuple(ours.LOSS_TYPES)),
  'entropy_coef': ({'entropy_coef': 0.05}, tuple(ours.LOSS_TYPES)),
  'two micro-batches': (
    {'steps_per_generation': 2, 'gradient_accumulation_steps': 2},
    tuple(ours.LOSS_TYPES),
  ),
  'two optimizer steps': ({'steps_per_generation': 2}, tuple(ours.LOSS_TYPES)),
  'several at once': (
    EVERYTHING | {'delta': 1.4} | correction('sequence_mask', None, 3.0),
    tuple(x for x in ours.LOSS_TYPES if x != 'vespo'),
  ),
}


def errors(got: dict, want: dict) -> tuple[float, float]:
  """Of the loss and of the gradient."""
  size = np.maximum(np.abs(want['gradient']), 1e-9)  # without a signal: 0, or 1e-17
  loss = abs(got['loss'] - want['loss']) / size.sum()
  return loss, np.abs(got['gradient'] - want['gradient']).max() / size.max()


def compare(settings: dict, case: batches.Case) -> list[tuple[float, float, float]] | None:
  """Errors (loss, gradient, advantages) of every optimizer step; None: we refuse these settings."""
  values = theirs.DEFAULTS[trl.GRPOTrainer] | settings
  algorithm, found = ours.equivalent(values), []
  for step in range(algorithm.num_minibatches):
    try:
      got = ours.run(algorithm, case, step)
    except records.UserError:
      return None
    want = theirs.run(settings, case, step=step)
    advantage = np.abs(got['advantages'] - want['advantages']).max()
    found.append((*errors(got, want), advantage / max(1.0, np.abs(want['advantages']).max())))
  return found


def grid():
  """(option, loss type, level, on or off policy, scale of rewards, seed) -> settings, batch."""
  for option, (changes, loss_types) in OPTIONS.items():
    for loss_type, level, policy, scale, seed in itertools.product(
      loss_types, ('token', 'sequence'), ('on', 'off'), SCALES, SEEDS
    ):
      if level == 'sequence' and loss_type == 'vespo':
        continue  # it has a sequence weight of its own
      if option == 'two optimizer steps' and policy == 'on':
        continue  # the second step never is
      settings = BASE | changes | SCALES[scale]
      settings |= {'loss_type': loss_type, 'importance_sampling_level': level}
      # With two iterations both take the old log-probabilities from the experience.
      settings['num_iterations'] = 2 if policy == 'off' else 1
      case = batches.make(seed, policy == 'off')
      yield (option, loss_type, level, policy, scale, seed), settings, case


def run_grid():
  """Errors by case: [(key, errors or None)]."""
  return [(key, compare(settings, case)) for key, settings, case in grid()]


def unexplained(results) -> list[tuple]:
  """Cases that differ, or that we refuse, for a reason that is not among the disagreements."""
  bad = []
  for key, found in results:
    option, loss_type, level = key[:3]
    differs = found is None or not max(max(e[:2]) for e in found) <= TOLERANCE
    wrong = found is not None and not max(e[2] for e in found) <= TOLERANCE
    if wrong or (differs and disagreements.number(option, loss_type, level) is None):
      bad.append(key)
  return bad


def table(results) -> list[str]:
  """One line per option and level, one column per loss type: the largest error, or what it is."""
  cells = collections.defaultdict(list)
  for (option, loss_type, level, *_), found in results:
    cells[option, level, loss_type].append(found)
  lines = ['| | level | ' + ' | '.join(ours.LOSS_TYPES) + ' |', '|---' * 10 + '|']
  for option, level in dict.fromkeys(key[:2] for key in cells):
    row = []
    for loss_type in ours.LOSS_TYPES:
      found = cells.get((option, level, loss_type))
      if found is None:
        row.append('')
        continue
      number = disagreements.number(option, loss_type, level)
      refused = [x for x in found if x is None]
      worst = 0.0 if refused else max(max(e[:2]) for x in found for e in x)
      if refused:
        row.append(f'refused [{number}]')
      else:
        row.append(f'{worst:.0e}' if worst <= TOLERANCE else f'differs [{number}]')
    lines.append(f'| {option} | {level} | ' + ' | '.join(row) + ' |')
  return lines


def advantage_table(results) -> list[str]:
  """The largest error of an advantage, by scale and kind of rewards."""
  worst = collections.defaultdict(float)
  for (*_, scale, seed), found in results:
    for e in found or ():
      worst[scale, batches.KINDS[seed]] = max(worst[scale, batches.KINDS[seed]], e[2])
  lines = ['| `scale_rewards` | ' + ' | '.join(batches.KINDS) + ' |', '|---' * 4 + '|']
  for scale in SCALES:
    numbers = ' | '.join(f'{worst[scale, kind]:.0e}' for kind in batches.KINDS)
    lines.append(f'| {scale} | {numbers} |')
  return lines


def summary(results) -> str:
  compared = [(key, found) for key, found in results if found is not None]
  agreed = [max(max(e[:2]) for e in found) for _, found in compared]
  agreed = [e for e in agreed if e <= TOLERANCE]
  return (
    f'{len(results)} cases: {len(agreed)} agree (largest error {max(agreed):.0e}, tolerance '
    f'{TOLERANCE:.0e}), {len(compared) - len(agreed)} differ for a listed reason, '
    f'{len(results) - len(compared)} are refused by us.'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--to', type=pathlib.Path, default=pathlib.Path(__file__).with_name('trl.md'))
  args = parser.parse_args()
  logging.disable(logging.WARNING)  # TRL's, of rows without a reward
  start = time.monotonic()
  results = run_grid()
  lines = [
    f'# Against TRL {trl.__version__} (transformers {transformers.__version__})',
    '',
    'Written by `compare_trl.py`, whose docstring says what is compared and how to run it.',
    '',
    summary(results),
    '',
    'A cell is the largest error of loss and gradient over on and off policy, four `scale_rewards`',
    f'and {len(SEEDS)} seeds; [n] is a disagreement below.',
    '',
    *table(results),
    '',
    'Advantages, largest error (rewards some of which are missing are NaN):',
    '',
    *advantage_table(results),
    '',
    *disagreements.report(BASE),
  ]
  text = '\n'.join(lines) + '\n'
  args.to.write_text(text)
  print(text)
  bad = unexplained(results)
  print(f'{time.monotonic() - start:.0f} s; unexplained: {len(bad)}')
  for key in bad[:20]:
    print(*key)
  raise SystemExit(bool(bad))


if __name__ == '__main__':
  main()
