"""Configs of TRL and verl: each field exact, approximate or unsupported, and back again."""

from __future__ import annotations

import pytest

from reasonrl import peers, records
from reasonrl.algorithms import grpo
from reasonrl.configs import common, r1_zero
from reasonrl.envs import single_turn
from reasonrl.peers import trl, verl


def apply(lines):
  return peers.apply(r1_zero.get_config(''), common.algorithm('grpo'), lines)


def built(config):
  fields = [config.rl.algorithm.to_dict(), config.rl.env.to_dict()]
  for section in fields:
    section.pop('name')
  return grpo.GRPO(**fields[0]), single_turn.SingleTurn(**fields[1])


def status(lines, field):
  (line,) = [line for line in lines if line.field == field]
  return line.status


def test_trls_defaults_are_our_grpo():
  config = apply(trl.read({}))
  want = common.algorithm('grpo').to_dict()
  assert want['beta'] == 0.0  # where the estimator, TRL's newest default, means nothing
  assert config.rl.algorithm.to_dict() == want | {'kl_estimator': 'ratio_k3'}
  assert (config.rl.env.num_generations, config.rl.env.max_completion_length) == (8, 512)
  assert (config.rl.optim.learning_rate, config.rl.optim.b2) == (1e-6, 0.999)


@pytest.mark.parametrize('loss_type', trl.TRL_LOSSES)
def test_every_loss_type_goes_there_and_back(loss_type):
  given = {'loss_type': loss_type, 'epsilon_high': 4.0, 'num_generations': 4}
  algorithm, env = built(config := apply(trl.read(given)))
  algorithm.check(4, tuple(config.rewards))
  back = trl.nearest(algorithm, env, config.rl)
  assert {**trl.TRL_DEFAULTS, **back}['loss_type'] == loss_type
  assert back['epsilon_high'] == 4.0 and back['num_generations'] == 4


def test_a_trl_file_by_hand(tmp_path):
  (tmp_path / 'trl.yaml').write_text(
    'loss_type: dr_grpo\nscale_rewards: none\nbeta: 0.04\nuse_bias_correction_kl: true\n'
    'max_completion_length: 300\nuse_vllm: true\nsteps_per_generation: 8\n'
    'gradient_accumulation_steps: 2\nsync_ref_model: true\nentropy_coef: 0.01\nreport_to: wandb\n'
  )
  lines = peers.read('trl', str(tmp_path / 'trl.yaml'))
  config = apply(lines)
  a = config.rl.algorithm
  assert (a.scale_rewards, a.loss_agg, a.loss_constant) == ('none', 'token_sum_const', 300)
  assert (a.beta, a.kl_estimator, a.num_minibatches) == (0.04, 'ratio_k3', 4)
  assert (a.importance_correction, a.importance_max) == ('sequence_mask', 3.0)
  assert config.rl.reads.ref.sync_steps == 512
  assert status(lines, 'entropy_coef') == 'approximate'  # TRL's bonus is a token mean
  assert status(lines, 'report_to') == 'ignored'
  said = peers.report(lines)
  assert said.splitlines()[0].startswith('approximate') and 'ignored      report_to' in said
  assert "at the peer's defaults, exact" in said


def test_a_verl_file_by_hand(tmp_path):
  (tmp_path / 'verl.yaml').write_text(
    'algorithm: {adv_estimator: grpo, norm_adv_by_std_in_grpo: false,'
    ' filter_groups: {enable: true, max_num_gen_batches: 10}}\n'
    'actor_rollout_ref:\n'
    '  actor: {clip_ratio_high: 0.28, use_kl_loss: true, kl_loss_type: k2,'
    ' ppo_mini_batch_size: 128}\n'
    '  rollout: {n: 16}\n'
    'data: {train_batch_size: 512}\ntrainer: {logger: console}\n'
  )
  lines = peers.read('verl', str(tmp_path / 'verl.yaml'))
  config = apply(lines)
  a = config.rl.algorithm
  assert (a.epsilon, a.epsilon_high, a.dual_clip, a.log_ratio_clamp) == (0.2, 0.28, 3.0, 20.0)
  assert (a.scale_rewards, a.advantage_eps, a.zero_variance) == ('none', 1e-6, 'drop')
  assert (a.beta, a.kl_estimator, a.num_minibatches) == (0.001, 'k2', 4)
  assert (config.rl.max_generation_batches, config.rl.prompts_per_step) == (10, 512)
  assert config.rl.env.num_generations == 16
  assert status(lines, 'trainer.logger') == 'ignored'
  algorithm, env = built(config)
  back = verl.nearest(algorithm, env, config.rl)
  assert back['algorithm.norm_adv_by_std_in_grpo'] is False
  assert back['actor_rollout_ref.actor.clip_ratio_high'] == 0.28
  assert 'actor_rollout_ref.actor.clip_ratio_c' not in back  # verl's default


@pytest.mark.parametrize('estimator', verl.VERL_ESTIMATORS)
def test_every_estimator_of_verl_goes_there_and_back(estimator):
  given = {'algorithm': {'adv_estimator': estimator}}
  config = apply(verl.read(given))
  algorithm, env = built(config)
  algorithm.check(4, tuple(config.rewards))
  back = verl.nearest(algorithm, env, config.rl)
  assert back['algorithm.adv_estimator'] == estimator.removesuffix('_vectorized')


@pytest.mark.parametrize(
  'peer, given, field',
  [
    ('trl', {'top_entropy_quantile': 0.2}, 'top_entropy_quantile'),
    ('trl', {'off_policy_mask_threshold': 0.5}, 'off_policy_mask_threshold'),
    ('trl', {'reward_weights': [1.0, 2.0]}, 'reward_weights'),
    ('trl', {'lr_scheduler_type': 'polynomial'}, 'lr_scheduler_type'),
    ('verl', {}, 'algorithm.adv_estimator'),  # gae: needs a critic
    (
      'verl',
      {'algorithm': {'adv_estimator': 'grpo', 'rollout_correction': {'rollout_rs': 'token_k2'}}},
      'algorithm.rollout_correction.rollout_rs',
    ),
  ],
)
def test_what_has_no_counterpart_is_said_and_not_run(peer, given, field):
  lines = peers.READERS[peer](given)
  assert status(lines, field) == 'unsupported'
  with pytest.raises(records.UserError, match=f'no counterpart here: .*{field}'):
    apply(lines)


def test_icepops_bounds_of_verl():
  given = {'rollout_is': 'token', 'rollout_is_threshold': '0.5_5.0'}
  given = {'algorithm': {'adv_estimator': 'grpo', 'rollout_correction': given}}
  a = apply(verl.read(given)).rl.algorithm
  assert (a.importance_correction, a.importance_min, a.importance_max) == ('token_mask', 0.5, 5.0)


@pytest.mark.parametrize(
  'content, said',
  [(None, "no file '.*x.yaml'"), ('a: [', 'is not YAML'), ('- 1', 'does not hold fields')],
)
def test_bad_files(tmp_path, content, said):
  if content is not None:
    (tmp_path / 'x.yaml').write_text(content)
  with pytest.raises(records.UserError, match=said):
    peers.read('trl', str(tmp_path / 'x.yaml'))
  with pytest.raises(records.UserError, match="loss_type='ppo' is not one of grpo"):
    trl.read({'loss_type': 'ppo'})


def test_what_only_comes_near_says_in_what_it_differs():
  lines = trl.read({'loss_type': 'grpo', 'mask_truncated_completions': True})
  assert status(lines, 'loss_type') == 'approximate'  # TRL counts the rows that are masked whole
  assert status(trl.read({'loss_type': 'grpo'}), 'loss_type') == 'exact'
  lines = trl.read({'steps_per_generation': 4, 'gradient_accumulation_steps': 2})
  assert status(lines, 'steps_per_generation') == 'approximate'  # whose tokens divide
  assert status(trl.read({'top_p': 0.9}), 'top_p') == 'approximate'


def test_cispo_of_verl_has_bounds_around_one():
  given = {'actor_rollout_ref': {'actor': {'policy_loss': {'loss_mode': 'cispo'}}}}
  given['actor_rollout_ref']['actor']['clip_ratio_high'] = 0.3
  given['algorithm'] = {'adv_estimator': 'grpo'}
  a = apply(verl.read(given)).rl.algorithm
  assert (a.surrogate, a.cispo_ratio_min, a.cispo_ratio_max) == ('cispo', 0.8, 1.3)


def test_kl_of_verl_is_in_the_reward_or_in_the_loss():
  given = {'algorithm': {'adv_estimator': 'grpo', 'use_kl_in_reward': True}}
  a = apply(verl.read(given)).rl.algorithm
  assert (a.kl_placement, a.kl_estimator, a.beta) == ('reward', 'k1', 0.001)
  given['actor_rollout_ref'] = {'actor': {'use_kl_loss': True}}
  assert status(verl.read(given), 'actor_rollout_ref.actor.use_kl_loss') == 'unsupported'
