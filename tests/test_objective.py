"""The objective card: it says what runs, and every axis shows in it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import tiny

from reasonrl import objective, records
from reasonrl.algorithms import axes, grpo
from reasonrl.configs import common
from reasonrl.envs import single_turn


def text(algorithm, **section) -> str:
  config = {'rl': common.reinforce('grpo', 1e-3)}
  for name, value in section.items():
    config['rl'][name] = value
  fields = config['rl'].env.to_dict()
  fields.pop('name')
  return objective.explain(config, {'rl': (algorithm, single_turn.SingleTurn(**fields))})


@pytest.mark.parametrize(
  'preset, parts',
  [
    ('grpo', ['(R_i - mean of its group) / (std of its group (ddof 1) + 0.0001)']),
    ('grpo', ['clip(r, 0.8, 1.2)', 'N = trained tokens', 'one optimizer step per rollout']),
    ('deepseekmath_grpo', ['+ 0.04 KL_it', '(1/B) sum_i (1/|o_i|) sum_t', 'FORWARD KL']),
    ('dr_grpo', ['A  ', 'R_i - mean of its group, the same', 'L = loss_constant = 512']),
    ('dapo', ['clip(r, 0.8, 1.28)', 'without those of equal reward']),
    ('rloo', ['mean of the others of its group', 'R_i (summed over tokens) - 0.03 KL_it']),
    ('reinforce_pp', ['sum of rewards from t on (gamma 1)', 'whitened', 'r_t - 0.01 KL_it']),
    ('gspo', ['exp(mean_t log pi / pi_old) of the completion', 'clip(r, 0.9997, 1.0004)']),
    ('cispo', ['-stop_gradient(clip(r, 0, 5)) A log pi (absolute bounds)', 'loss_type=cispo']),
    ('sapo', ['-(4/tau) sigmoid(tau (r - 1)) A, tau = 1 if A > 0 else 1.05']),
    ('vespo', ['k, lambda = 2, 3 if A >= 0 else 3, 2']),
    ('maxrl', ['(R_i - mean of its group) / (mean of its group)']),
    ('gdpo', ['z of the batch of sum_k w_k z_ik']),
    ('grpo_n', ['times 0 where positive, 1 where negative']),
    ('reinforce_clip', ['A  ', 'R_i, the same on every token, plus', 'tokens; then whitened']),
  ],
)
def test_cards_of_presets(preset, parts):
  said = ' '.join(text(tiny.algorithm(preset)).split())
  for part in parts:
    assert ' '.join(part.split()) in said, said


# What makes a field matter, and another value of it.
OTHERS = {
  'std_ddof': ({}, 0),
  'advantage_eps': ({}, 1e-6),
  'gamma': ({'returns': 'to_go'}, 0.9),
  'whiten': ({}, True),
  'positive_weight': ({}, 0.5),
  'negative_weight': ({}, 0.5),
  'log_ratio_clamp': ({}, 20.0),
  'epsilon': ({}, 0.1),
  'epsilon_high': ({}, 0.3),
  'dual_clip': ({}, 3.0),
  'delta': ({}, 4.0),
  'cispo_ratio_max': ({'surrogate': 'cispo', 'cispo_ratio_max': 2.0}, 5.0),
  'cispo_ratio_min': ({'surrogate': 'cispo', 'cispo_ratio_max': 2.0}, 0.5),
  'sapo_temperature_pos': ({'surrogate': 'sapo'}, 2.0),
  'sapo_temperature_neg': ({'surrogate': 'sapo'}, 2.0),
  **{
    f'vespo_{name}': ({'surrogate': 'vespo'}, 9.0)
    for name in ('k_pos', 'lambda_pos', 'k_neg', 'lambda_neg')
  },
  'importance_max': ({'importance_correction': 'token_mask'}, 9.0),
  'importance_min': ({'importance_correction': 'token_mask'}, 0.5),
  'beta': ({}, 0.1),
  'entropy_coef': ({}, 0.1),
  'loss_constant': ({'loss_agg': 'token_sum_const'}, 7),
  'local_rows': ({'loss_agg': 'token_mean_local'}, 7),
  'mask_truncated_completions': ({}, True),
  'zero_variance_of': ({'zero_variance': 'drop'}, 'accuracy'),
  'num_iterations': ({}, 2),
  'num_minibatches': ({}, 2),
}
NEEDED = {
  'kl_estimator': {'beta': 0.1},
  'kl_placement': {'beta': 0.1, 'kl_estimator': 'k1'},
  'importance_sampling_level': {'num_minibatches': 2},
  'old_policy': {'num_minibatches': 2},
  'scale_rewards': {'baseline': 'group_mean'},
  'baseline': {'scale_rewards': 'none'},
}


@pytest.mark.parametrize('field', [f.name for f in dataclasses.fields(grpo.GRPO)])
def test_every_axis_shows_in_the_card(field):
  """All values of an axis have different cards, where they are allowed at all."""
  if field in axes.CHOICES:
    needed = NEEDED.get(field, {}) | {'cispo_ratio_max': 5.0}
    values = axes.CHOICES[field]
  else:
    needed, other = OTHERS[field]
    values = [getattr(tiny.algorithm(**needed), field), other]
  cards = set()
  for value in values:
    algorithm = tiny.algorithm(**(needed | {field: value}))
    algorithm.check(4, ('accuracy',))
    cards.add(text(algorithm))
  assert len(cards) == len(values)


def test_the_section_shows_too():
  plain = text(tiny.algorithm())
  assert text(tiny.algorithm(), prompts_per_step=8) != plain
  assert 'renewed every 4 step(s)' in text(tiny.algorithm(), sampler_sync_steps=4)
  env = common.single_turn()
  env.top_p = 0.9
  assert 'over the tokens that top_p 0.9 kept' in text(tiny.algorithm(), env=env)
  reads = common.reads()
  reads.sync_steps = 100
  said = text(tiny.algorithm(beta=0.1), reads={'ref': reads})
  assert 'every 100 steps pi_ref <- 0.6 pi + 0.4 pi_ref' in said


def test_the_peers_come_with_it():
  said = text(tiny.algorithm('gspo'))
  assert 'nearest TRL' in said and 'importance_sampling_level=sequence' in said
  assert 'nearest verl' in said and 'loss_mode=gspo' in said


def test_unknown_values_never_reach_the_card():
  with pytest.raises(records.UserError, match="surrogate='ppo' is not one of"):
    tiny.algorithm(surrogate='ppo').check(4, ())


@pytest.mark.parametrize('peer', ['', 'trl', 'verl'])
def test_the_program_explains_a_config_and_a_peers_file(tmp_path, peer):
  (tmp_path / 'trl.yaml').write_text('loss_type: dr_grpo\n')
  text = 'algorithm: {adv_estimator: rloo}\nactor_rollout_ref: {rollout: {n: 4}}\n'
  (tmp_path / 'verl.yaml').write_text(text)
  flags = ['--config=configs/r1_zero.py', '--explain']
  flags += [f'--from_{peer}={peer}.yaml'] if peer else []
  program = [sys.executable, '-m', 'reasonrl.main', *flags]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  wants = {
    '': '(R_i - mean of its group) / (std of its group (ddof 1) + 0.0001)',
    'trl': "algorithm.loss_agg='token_sum_const', algorithm.loss_constant=512",
    'verl': 'A               R_i - mean of the others of its group',
  }
  assert wants[peer] in done.stdout
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['trl.yaml', 'verl.yaml']  # nothing ran
