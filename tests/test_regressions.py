"""Bugs that happened in other implementations of the GRPO family: one named test each.

The numbers are those of a list of 42, collected from the issues of TRL, verl, OpenRLHF, NeMo-RL,
prime-rl, ms-swift, unsloth, Liger, torchforge. What has no test here cannot happen here:

     7  loss of the critic per micro-batch         no critic
    30  off-policy mask read the wrong scores      no off-policy sequence mask
    36  dropout on while old scores are computed   no dropout in any model
    39  entropy quantile counted padding           no selection of tokens by entropy
    41  re-tokenised text drifts in a tool loop    no tool loop; ids are never re-tokenised

Losses and gradients are those of the learner, uncompiled, on the bigram policy of
`test_objective_grid`: the token after `context` is drawn from softmax(head @ table[context]).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny
from test_objective_grid import Bigram

from reasonrl import (
  advantages,
  aggregation,
  drawing,
  evaluation,
  learner,
  optim,
  packing,
  records,
  rl_math,
  rollouts,
  sampling,
  sharding,
  tokenizers,
  types,
)
from reasonrl.algorithms import axes
from reasonrl.configs import common
from reasonrl.kernels import policy_loss
from reasonrl.kernels.policy_loss import reference as twin

VOCAB = 11
EOS, LENGTH = int(records.Stop.EOS), int(records.Stop.LENGTH)
REWARDS, GROUPS, LENGTHS = [1.0, 0.5, 0.0, 0.5, 1.0, 2.0], [0, 1, 0, 1, 0, 1], [2, 4, 3, 1, 4, 2]
POLICY = Bigram(VOCAB)
_RNG = np.random.default_rng(1)
PARAMS = {
  name: jnp.asarray(_RNG.normal(size=(VOCAB, 2)), jnp.float32) for name in ('table', 'head')
}


def found(rewards=REWARDS, groups=GROUPS, lengths=LENGTHS, **changes) -> types.Experience:
  """Old, reference and sampler near the policy, ratios on both sides of 1."""
  experience = tiny.experience(rewards, groups, lengths, vocab=VOCAB, **changes)
  rng, mask_BT, now = np.random.default_rng(2), experience.mask_BT, scores(experience)
  near = lambda: (now + rng.normal(size=now.shape) * 0.4).astype(np.float32) * mask_BT
  scored = {'old_logp': near(), 'ref_logp': near()}
  return dataclasses.replace(experience, scores=scored, logp_BT=near())


def scores(experience) -> np.ndarray:
  """The policy's log-probability of every token but the first."""
  context, target = experience.tokens_BT[:, :-1].ravel(), experience.tokens_BT[:, 1:].ravel()
  logp, _ = oracle.scores(PARAMS['table'][context], PARAMS['head'], target)
  return np.pad(logp.reshape(len(experience.tokens_BT), -1), ((0, 0), (1, 0)))


def micro_batches(grpo, experience, rows=8, adv_BT=None):
  weight_BT, denominator = grpo.weights(experience)
  adv_BT = grpo.advantages(experience) if adv_BT is None else adv_BT
  aux = {'weight': weight_BT, 'adv': adv_BT, 'sampler_logp': experience.logp_BT}
  aux |= experience.scores
  seqs = packing.sequences(experience.tokens_BT, experience.length_B, aux)
  return packing.pack(seqs, 8, rows, share=True)[0], denominator or 1.0


def measure(grpo, experience, rows=8, adv_BT=None):
  """Metrics and the gradient of the policy's table, in micro-batches of `rows` packed rows."""
  term = learner.Term(grpo.token_loss, grpo.prepare, 'weight')
  student = tiny.make_learner(POLICY, PARAMS, term)
  grads, reports = jax.tree.map(jnp.zeros_like, PARAMS), []
  batches, denominator = micro_batches(grpo, experience, rows, adv_BT)
  with jax.disable_jit():
    for batch in jax.tree.map(jnp.asarray, batches):
      if grpo.prepare:
        batch = student._prepared(grpo.prepare, PARAMS, batch)
      grads, report = student.accumulate(PARAMS, grads, batch, (denominator,))
      reports.append(report)
  return learner.reduce_reports((reports, {})), np.asarray(grads['table'])


def slope(grpo, logp, **aux):
  """Loss and its derivative by logp, token by token."""
  aux = {'weight': jnp.ones(len(logp))} | {name: jnp.float32(x) for name, x in aux.items()}

  def total(logp):
    loss, _ = grpo.token_loss(learner.Out(logp, jnp.zeros_like(logp)), aux)
    return jnp.where(aux['weight'] > 0, loss, 0.0).sum()

  return jax.value_and_grad(total)(jnp.float32(logp))


# ------------------------------------------------------------------------------------ the loss


def test_bug_01_kl_term_subtracted():
  """verl: the KL loss had the wrong sign, so a larger beta drove the policy off its reference."""
  row, grads = measure(tiny.algorithm(), found())
  more, with_kl = measure(tiny.algorithm(beta=0.5), found())
  assert more['kl'] > 0.01
  assert more['loss'] - row['loss'] == pytest.approx(0.5 * more['kl'], rel=1e-4)
  # A step down the gradient that beta adds makes KL smaller.
  kl = lambda logp: float(rl_math.kl('k3', logp, jnp.log(0.2), 1.0, jnp.float32(1)))
  _, pull = slope(tiny.algorithm(beta=0.5), [math.log(0.6)], adv=[0], ref_logp=[math.log(0.2)])
  assert kl(math.log(0.6) - 0.1 * float(pull[0])) < kl(math.log(0.6))
  assert np.abs(with_kl - grads).max() > 1e-3


@pytest.mark.parametrize(
  'loss_agg, want',
  [
    ('token_mean', 10 / 4),
    ('seq_mean_token_mean', (1 + 3) / 2),
    ('token_sum_const', 10 / (2 * 5)),
    ('seq_mean_token_sum', 10 / 2),
    ('prompt_mean', 10 / 4),
    ('token_mean_local', (1 + 3) / 2),
    ('token_sum', 10),
  ],
)
def test_bug_02_sum_over_tokens_divided_by_length(loss_agg, want):
  """verl: 'seq-mean-token-sum' was a mean. A completion of loss 1, another of losses 2, 3, 4."""
  mask_BT, loss_BT = np.array([[0, 1, 0, 0], [0, 1, 1, 1]]), np.array([[9, 1, 9, 9], [9, 2, 3, 4]])
  weight_BT, denominator = aggregation.loss_weights(mask_BT, np.zeros(2), loss_agg, 5, 1)
  assert (weight_BT * loss_BT).sum() / (denominator or 1) == pytest.approx(want)


@pytest.mark.parametrize('loss_agg', ['token_mean', 'seq_mean_token_mean'])
def test_bug_03_aggregation_depends_on_micro_batches(loss_agg):
  """verl, TRL, OpenRLHF: a mean per micro-batch or rank. (Devices: test_sharding.)"""
  grpo = tiny.algorithm(loss_agg=loss_agg, num_iterations=2)
  row, grads = measure(grpo, found())
  assert len(micro_batches(grpo, found(), rows=1)[0]) > 2
  other, split = measure(grpo, found(), rows=1)
  assert other['loss'] == pytest.approx(row['loss'], rel=1e-5, abs=1e-7)
  np.testing.assert_allclose(split, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('minibatches', [1, 2, 3])
def test_bug_04_loss_scaled_by_steps_per_generation(minibatches):
  """TRL: the denominator was that of the generation batch, the sum that of an optimizer step."""
  grpo, everything = tiny.algorithm(num_minibatches=minibatches), found()
  for rows in np.array_split(np.arange(6), minibatches):
    part = rollouts.take_rows(everything, rows)
    part = dataclasses.replace(part, scores={'old_logp': scores(part).astype(np.float32)})
    row, _ = measure(grpo, part, adv_BT=-part.mask_BT)  # a loss of 1 on every token
    assert row['loss'] == pytest.approx(1.0, rel=1e-5)


def test_bug_05_global_loss_divided_by_the_number_of_micro_batches():
  """ms-swift: a loss with a global denominator was divided once more by accumulation steps."""
  for rows in (8, 1):
    row, _ = measure(tiny.algorithm(), found(), rows, adv_BT=-found().mask_BT)
    assert row['loss'] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize('loss_agg', aggregation.AGGREGATIONS)
def test_bug_06_truncated_tokens_left_in_the_denominator(loss_agg):
  """TRL: a masked truncated completion still counted as tokens. It is as if it were absent."""
  stop_B = np.array([EOS, EOS, EOS, EOS, LENGTH, LENGTH], np.int32)
  cut = tiny.experience(REWARDS, GROUPS, LENGTHS, stop_B=stop_B)
  grpo = tiny.algorithm(loss_agg=loss_agg, mask_truncated_completions=True, local_rows=2)
  weight_BT, denominator = grpo.weights(cut)
  want_BT, want = grpo.weights(rollouts.take_rows(cut, np.arange(4)))
  assert denominator == want and not weight_BT[4:].any()
  np.testing.assert_array_equal(weight_BT[:4], want_BT)
  unmasked, _ = dataclasses.replace(grpo, mask_truncated_completions=False).weights(cut)
  assert unmasked[4:].any()


def test_bug_08_logged_loss_scaled_by_the_number_of_micro_batches():
  """verl, TRL: what was logged was a mean of means, or a sum over micro-batches."""
  grpo = tiny.algorithm(num_iterations=2, beta=0.1)
  row, _ = measure(grpo, found())
  other, _ = measure(grpo, found(), rows=1)
  assert other == pytest.approx(row, rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------------------ scores


@functools.cache
def sampled():
  """A tiny decoder, and completions that it sampled at temperature 0.6."""
  model = tiny.model()
  params = jax.tree.map(lambda x: 3.0 * x, model.init(jax.random.key(0)))
  sampler = sampling.Sampler(model, sharding.make_mesh(1, 1, 1), (), **common.sampler())
  prompt_R = np.repeat([0, 1], 6).astype(np.int32)
  requests = types.Requests(
    tokens_PT=np.array([[7, 0, 0], [1, 2, 3]], np.int32),
    length_P=np.array([1, 3], np.int32),
    prompt_R=prompt_R,
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(12), 0),
    max_new_R=np.full(12, 8, np.int32),
    numbers={},
    temperature_R=None,
  )
  spec = types.Spec(0.6, 0, 1.0, 0.0, 0, (3, 8), ())
  return model, params, sampler, sampler.generate(params, requests, spec, 0, lambda: None)


def trained_scores(temperature, row_length=16, rows=12):
  """The trainer's log-probabilities of those completions: [R, S]."""
  model, params, sampler, out = sampled()
  student = tiny.make_learner(model, params)
  student = dataclasses.replace(student, form=sampler.form(temperature))
  seqs = packing.sequences(out.tokens_RS, out.length_R, {'weight': out.source_RS == types.POLICY})
  batches, where = packing.pack(seqs, row_length, rows, share=True)
  logps = [np.asarray(student.score(params, batch).logp) for batch in batches]
  return packing.unpack(logps, seqs, where, out.tokens_RS.shape)


def test_bug_09_temperature_missing_in_the_trainer():
  """TRL, verl: sampled at 0.6, scored at 1.0."""
  out = sampled()[-1]
  np.testing.assert_allclose(trained_scores(0.6), out.logp_RS, atol=1e-4)
  assert np.abs(trained_scores(1.0) - out.logp_RS).max() > 0.1


def test_bug_10_sampler_reports_untempered_scores():
  """vLLM under TRL: raw log-probabilities at T != 1, so the first ratio was not 1."""
  out = sampled()[-1]
  first = np.arange(12), out.prompt_length_R
  np.testing.assert_allclose(np.exp(trained_scores(0.6) - out.logp_RS)[first], 1.0, atol=1e-4)


def test_bug_11_truncated_sampling_biases_the_ratio():
  """TRL: top-p samples, scored by the whole distribution. Here both are over the kept tokens."""
  z = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
  spec = types.Spec(1.0, 2, 1.0, 0.0, 2, (0,), ())
  drawn = drawing.draw(z, z, jnp.array([0.9]), spec)
  token, logp = drawn.token_B, drawn.logp_B
  kept_BK, _ = drawing.kept_ids(drawn.weight_BV, 2)
  spec = policy_loss.Spec((1.0, None, 1.0, jnp.dtype('float32')), 1, 'xla', None)
  args = z, jnp.eye(3), jnp.zeros(3), token, {'kept': kept_BK}, spec
  trained = policy_loss.token_logps(*args).logp
  assert int(token[0]) == 1
  assert [float(logp[0]), float(trained[0])] == pytest.approx([math.log(0.3 / 0.8)] * 2)


def test_bug_12_attention_mask_not_passed_when_scoring():
  """TRL: padding changed the scores."""
  want = trained_scores(0.6)
  np.testing.assert_allclose(trained_scores(0.6, row_length=24), want, atol=1e-5)
  np.testing.assert_allclose(trained_scores(0.6, rows=16), want, atol=1e-5)


def test_bug_13_positions_shifted_by_padding_or_packing():
  """TRL, OpenRLHF, NeMo: position ids counted padding. They restart in every packed sequence."""
  np.testing.assert_allclose(trained_scores(0.6, row_length=48), trained_scores(0.6), atol=1e-5)
  seqs = packing.sequences(np.ones((2, 4), np.int32), [3, 4], {'weight': np.eye(2, 4, 1)})
  (batch,), _ = packing.pack(seqs, 8, 1, share=True)
  assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_bug_14_scores_off_by_one():
  """prime-rl: index t must speak about token t, read from the hidden state at t - 1."""
  experience = found()
  student = tiny.make_learner(POLICY, PARAMS)
  (batch,), _ = micro_batches(tiny.algorithm(), experience)
  got = np.asarray(student.score(PARAMS, batch).logp)
  row = np.arange(len(batch.index_BM))[:, None]
  context, target = batch.tokens_BT[row, batch.before_BM], batch.tokens_BT[row, batch.index_BM]
  table = np.asarray(PARAMS['table'])
  want, _ = oracle.scores(table[context.ravel()], PARAMS['head'], target.ravel())
  np.testing.assert_allclose(got.ravel(), want, atol=1e-5)


@pytest.mark.parametrize('junk', [1e3, np.nan])
@pytest.mark.parametrize('preset', ['grpo', 'gspo', 'cispo', 'sapo', 'vespo'])
def test_bug_15_nan_gradient_through_a_masked_exp(preset, junk):
  """verl and others: mask * exp(x) has a finite value and a NaN gradient."""
  grpo = tiny.algorithm(preset, beta=0.1, kl_placement='loss', num_iterations=2)
  names = ('adv', 'old_logp', 'ref_logp', 'sequence_log_ratio')
  weight, logp = [1.0, 0.0, 1.0], [-1.0, -1.0, -2.0]
  aux = {name: [0.3, 0.3, -0.4] for name in names} | {'weight': weight}
  value, want = slope(grpo, logp, **aux)
  for name in (*names, 'logp'):
    bad = {'logp': logp, **aux}
    bad[name] = [bad[name][0], junk, bad[name][2]]
    got_value, got = slope(grpo, **bad)
    assert got_value == value and np.array_equal(got, want) and np.isfinite(want).all()
  assert want[0] != 0 and want[1] == 0


def test_bug_16_nothing_to_train_on_is_nan():
  """verl, unsloth: every completion masked, or one of no tokens at all."""
  stop_B = np.full(6, LENGTH, np.int32)
  for level in ('token', 'sequence'):
    grpo = tiny.algorithm(
      mask_truncated_completions=True, importance_sampling_level=level, num_iterations=2
    )
    row, grads = measure(grpo, found(stop_B=stop_B))
    assert row['loss'] == 0.0 and not grads.any()
  for loss_agg in ('seq_mean_token_mean', 'prompt_mean'):
    empty = found([1.0, 0.0, 0.5], [0, 0, 0], [2, 0, 3])
    grpo = tiny.algorithm(loss_agg=loss_agg, num_iterations=2)
    row, grads = measure(grpo, empty)
    kept = np.array([0, 2])
    want, same = measure(grpo, rollouts.take_rows(empty, kept), adv_BT=grpo.advantages(empty)[kept])
    assert row['loss'] == pytest.approx(want['loss'], rel=1e-5) and grads.any()
    np.testing.assert_allclose(grads, same, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------ credit


def credit(rewards, groups, **changes):
  """The advantage of each rollout, of one token each."""
  experience = tiny.experience(rewards, groups, [1] * len(rewards))
  return tiny.algorithm(advantage_eps=0.0, **changes).advantages(experience)[:, -1]


@pytest.mark.parametrize(
  'scale, want',
  [
    ('group', [-0.707107, 0.707107, -0.707107, 0.707107]),
    # mean 2.5, squares 6.25 + .25 + 2.25 + 20.25 = 29, over 3; its root is 3.109126
    ('batch', [-0.321634, 0.321634, -0.964901, 0.964901]),
    ('mean', [-1, 1, -0.75, 0.75]),
    ('none', [-1, 1, -3, 3]),
  ],
)
def test_bug_17_scale_rewards_branches_swapped(scale, want):
  """TRL: 'group' and 'batch' did each other's work. Rewards 0, 2 and 1, 7."""
  np.testing.assert_allclose(credit([0, 2, 1, 7], [0, 0, 1, 1], scale_rewards=scale), want, 1e-5)


def test_bug_18_cispo_fell_through_to_ppo():
  """TRL: the condition never matched. A clipped token keeps its gradient under CISPO alone."""
  tokens = {'logp': [0.0], 'old_logp': [-1.0], 'adv': [1.0]}  # ratio e
  grads = {
    name: float(slope(tiny.algorithm(num_iterations=2, **fields), **tokens)[1][0])
    for name, fields in {
      'ppo': {},
      'cispo': {'surrogate': 'cispo', 'cispo_ratio_max': 1.5},
      'cispo, both': {'surrogate': 'cispo', 'cispo_ratio_max': 5.0, 'cispo_ratio_min': 4.0},
    }.items()
  }
  assert grads == pytest.approx({'ppo': 0.0, 'cispo': -1.5, 'cispo, both': -4.0})


@pytest.mark.parametrize('preset', common.ALGORITHM_PRESETS)
def test_bug_19_advantage_on_masked_tokens(preset):
  """verl: whitening gave prompt and padding the advantage -mean / std."""
  experience = found()
  adv_BT = tiny.algorithm(preset, num_iterations=2).advantages(experience)
  assert not adv_BT[experience.mask_BT == 0].any() and adv_BT.any()


def test_bug_20_return_reset_at_tool_tokens():
  """verl: tokens of the environment ended a return. gamma 0.5, reward 4 on the last token."""
  experience = tiny.experience([4.0, 0.0], [0, 1], [4, 1])
  source_BT = experience.source_BT.copy()
  source_BT[0, 4] = types.ENVIRONMENT  # prompt, prompt, policy, policy, environment, policy
  experience = dataclasses.replace(experience, source_BT=source_BT)
  fields = {'baseline': 'none', 'scale_rewards': 'none', 'returns': 'to_go', 'gamma': 0.5}
  adv_BT = tiny.algorithm(**fields).advantages(experience)
  assert adv_BT[0].tolist() == [0, 0, 1, 2, 0, 4]


def test_bug_21_groups_of_low_variance_mis_scaled():
  """verl, NeMo: a one-pass variance lost 1e-5; float32 residues of equal rewards were blown up."""
  np.testing.assert_allclose(credit([1.0, 1.00001], [0, 0]), [-0.707107, 0.707107], rtol=1e-5)
  assert not credit([0.35] * 7, [0] * 7).any()
  one = credit([0.35] * 7 + [0.350001], [0] * 8)
  np.testing.assert_allclose(one, [-0.353553] * 7 + [2.474874], rtol=1e-4)
  with pytest.raises(records.UserError, match='explodes where one sample differs'):
    tiny.algorithm(baseline='leave_one_out').check(8, ())


def test_bug_22_missing_reward_counted_as_zero():
  """TRL: None became 0 in a sum. It is absent: from baseline, scale and whitening."""
  np.testing.assert_allclose(credit([3, 1, np.nan], [0] * 3, scale_rewards='none'), [1, -1, 0])
  np.testing.assert_allclose(credit([3, 1, np.nan], [0] * 3), [0.707107, -0.707107, 0], 1e-5)
  fields = {'baseline': 'none', 'scale_rewards': 'none', 'whiten': True}
  np.testing.assert_allclose(
    credit([3, 1, np.nan], [0] * 3, **fields), [0.707107, -0.707107, 0], 1e-5
  )
  gdpo = advantages.normalize_then_sum(
    {'a': [3, 1, np.nan]}, {'a': 1.0}, np.zeros(3), 1, 0.0, float
  )
  np.testing.assert_allclose(gdpo, [0.707107, -0.707107, 0], rtol=1e-5)


def test_bug_23_groups_misaligned():
  """prime-rl, TRL: samples of a prompt were assumed to be neighbours."""
  order = np.array([3, 0, 5, 1, 4, 2])
  want = credit(REWARDS, GROUPS)
  got = credit(np.array(REWARDS)[order], np.array(GROUPS)[order])
  np.testing.assert_array_equal(got, want[order])
  assert abs(want[[0, 2, 4]].sum()) < 1e-6 and np.unique(want).size > 3


def test_bug_24_group_of_one_trains_nothing_in_silence():
  """OpenRLHF: with one sample per prompt every advantage was 0."""
  for baseline in ('group_mean', 'leave_one_out'):
    with pytest.raises(records.UserError, match='num_generations=1: .* at least 2 samples'):
      tiny.algorithm(baseline=baseline, scale_rewards='none').check(1, ())
  tiny.algorithm('reinforce_clip').check(1, ())  # without a group it is fine


def test_bug_25_normalised_along_the_wrong_axis():
  """OpenRLHF: statistics per row broadcast along columns where B = T."""
  x_BT, mask_BT = np.arange(9.0).reshape(3, 3), np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0]])
  square = advantages.whiten(x_BT, mask_BT, 0.0, float)
  wide = advantages.whiten(
    np.pad(x_BT, ((0, 0), (0, 2))), np.pad(mask_BT, ((0, 0), (0, 2))), 0.0, float
  )
  np.testing.assert_array_equal(wide[:, :3], square)
  # Over 0, 1, 4, 5, 6: mean 3.2, squares 26.8 over 4.
  np.testing.assert_allclose(square[1], np.array([0, 0.8, 1.8]) / math.sqrt(6.7))


def test_bug_26_reward_of_zero_treated_as_missing():
  """OpenRLHF: `score or default`."""
  np.testing.assert_allclose(credit([0.0, 1.0], [0, 0], scale_rewards='none'), [-0.5, 0.5])
  zero = types.BatchScore(np.float32([0.0, np.nan]), {}, None)
  told = rollouts.rewarded(tiny.experience([9.0, 9.0], [0, 0], [1, 1]), [zero], {'zero': 1.0})
  assert told.reward_R[0] == 0.0 and np.isnan(told.reward_R[1])


# ------------------------------------------------------------------------------------ ratios


def test_bug_27_correction_weights_carry_gradient():
  """verl: rho = pi_old / mu was differentiated. It only scales the gradient, token by token."""
  experience = found()
  grpo = tiny.algorithm(num_iterations=2)
  corrected = dataclasses.replace(grpo, importance_correction='token_truncate')
  at = np.nonzero(experience.mask_BT)
  gap = (experience.scores['old_logp'].astype(np.float64) - experience.logp_BT)[at]
  tokens = {'logp': scores(experience)[at], 'old_logp': experience.scores['old_logp'][at]}
  _, plain = slope(grpo, adv=grpo.advantages(experience)[at], **tokens)
  _, got = slope(corrected, adv=corrected.advantages(experience)[at], **tokens)
  np.testing.assert_allclose(got, np.minimum(np.exp(gap), 3.0) * plain, rtol=1e-4, atol=1e-7)
  assert isinstance(corrected.advantages(experience), np.ndarray)  # no tracer can reach it


@pytest.mark.parametrize('correction', advantages.CORRECTIONS[1:])
def test_bug_28_correction_ignored_by_the_fused_loss(correction):
  """Liger, TRL: the fused path had no rho. (All options: test_objective_grid.)"""
  grpo = tiny.algorithm(
    num_iterations=2, importance_correction=correction, importance_max=1.2, importance_min=0.5
  )
  experience, at = found(), np.nonzero(found().mask_BT)
  aux = {'weight': grpo.weights(experience)[0], 'adv': grpo.advantages(experience)}
  aux = {name: jnp.asarray(x[at]) for name, x in (aux | experience.scores).items()}
  hidden = PARAMS['table'][experience.tokens_BT[at[0], at[1] - 1]]
  rest = PARAMS['head'], jnp.zeros(VOCAB), jnp.asarray(experience.tokens_BT[at]), {}, aux
  fn = functools.partial(learner.weighted, grpo.token_loss)
  spec = policy_loss.Spec((1.0, None, 1.0, jnp.dtype('float32')), 64, 'xla', None)

  def value_and_grad(op, how):
    return jax.value_and_grad(lambda h: op(h, *rest, fn, how)[0])(hidden)

  with jax.disable_jit():
    fused, grad = value_and_grad(policy_loss.fused_policy_loss, spec)
    expected, want = value_and_grad(twin.policy_loss, spec.form)
  assert float(fused) == pytest.approx(float(expected), rel=1e-5)
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)
  without, _ = measure(dataclasses.replace(grpo, importance_correction='none'), experience)
  assert abs(float(fused) / experience.mask_BT.sum() - without['loss']) > 1e-3


def test_bug_29_tool_tokens_trained_by_the_fused_loss():
  """Liger under TRL: the mask of tool tokens was not passed."""
  tokens_BT = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], np.int32)
  source_BT = np.array([[0, 1, 2, 1, 1], [0, 1, 1, 1, 1]], np.int8)
  experience = dataclasses.replace(
    tiny.experience([1.0, 0.0], [0, 0], [4, 4], prompt_length=1),
    tokens_BT=tokens_BT,
    source_BT=source_BT,
  )
  row, grads = measure(tiny.algorithm(beta=0.0), experience)
  moved = np.abs(grads).max(1) > 0
  assert moved.tolist() == [True, False, True, True, False, True, True, True, True, False, False]
  assert row['tokens'] == 7


def test_bug_31_clip_metrics_always_zero_or_blind_to_the_sign():
  """verl, TRL: a token counts where its gradient is clipped, which depends on the sign of A."""
  ratio, adv = [0.5, 0.5, 1.5, 1.5, 4.0, 1.0], [1, -1, 1, -1, -1, 1]
  out = learner.Out(jnp.log(jnp.float32(ratio)), jnp.zeros(6))
  aux = {'adv': jnp.float32(adv), 'old_logp': jnp.zeros(6), 'weight': jnp.ones(6)}
  for bound, high in ((None, [0, 0, 1, 0, 0, 0]), (3.0, [0, 0, 1, 0, 1, 0])):
    _, metrics = tiny.algorithm(num_iterations=2, dual_clip=bound).token_loss(out, aux)
    assert metrics['clip_ratio/low'].tolist() == [0, 1, 0, 0, 0, 0]
    assert metrics['clip_ratio/high'].tolist() == high


def test_bug_32_an_option_that_raises_when_used():
  """verl: 'k3+' was listed and not implemented. (All choices of all axes: test_objective_grid.)"""
  for estimator in axes.CHOICES['kl_estimator']:
    grpo = tiny.algorithm(beta=0.1, kl_estimator=estimator)
    assert np.isfinite(slope(grpo, [-1.0], adv=[1], ref_logp=[-2.0])[1]).all()
  straight = lambda name: slope(
    tiny.algorithm(beta=1.0, kl_estimator=name), [-1.0], adv=[0], ref_logp=[-2.0]
  )
  assert straight('k3_plus')[0] == pytest.approx(float(straight('k3')[0]))
  assert straight('k3_plus')[1] == pytest.approx(np.asarray(straight('k2')[1]))
  assert abs(float(straight('k3')[1][0] - straight('k2')[1][0])) > 0.1


def test_bug_33_ratio_of_a_completion_under_a_mean_over_tokens():
  """TRL: GSPO weighed completions by their length in silence. Here that is what the aggregation
  says: (1 / sum |o|) sum_i |o_i| l_i; the preset 'gspo' has the mean over completions."""
  assert tiny.algorithm('gspo').loss_agg == 'seq_mean_token_mean'
  gaps, adv_B = np.array([0.3, 0.1, -0.5, 0.2]), [1.0, -1.0]
  ratios = [math.exp(gaps[:1].mean()), math.exp(gaps[1:].mean())]
  losses = [oracle_loss(r, A) for r, A in zip(ratios, adv_B, strict=True)]
  experience = tiny.experience([1.0, 0.0], [0, 0], [1, 3], vocab=VOCAB)
  at = np.nonzero(experience.mask_BT)
  old = scores(experience).astype(np.float32)
  old[at] -= gaps.astype(np.float32)
  experience = dataclasses.replace(experience, scores={'old_logp': old})
  adv_BT = np.float32(adv_B)[:, None] * experience.mask_BT
  for loss_agg, want in (
    ('seq_mean_token_mean', (losses[0] + losses[1]) / 2),
    ('token_mean', (losses[0] + 3 * losses[1]) / 4),
  ):
    grpo = tiny.algorithm('gspo', epsilon=0.2, epsilon_high=0.2, loss_agg=loss_agg)
    assert measure(grpo, experience, adv_BT=adv_BT)[0]['loss'] == pytest.approx(want, rel=1e-5)


def oracle_loss(ratio, A):
  return -min(ratio * A, min(max(ratio, 0.8), 1.2) * A)


def test_bug_34_one_of_several_stop_ids_counted_as_truncated():
  """TRL: 'truncated' was 'last token is not the EOS'. The sampler says why a row ended."""
  _, _, _, out = sampled()
  last = out.tokens_RS[np.arange(12), out.length_R - 1]
  ended = np.isin(last, (3, 8))
  assert {3, 8} <= set(last[ended].tolist()) and not ended.all()
  np.testing.assert_array_equal(out.stop_R, np.where(ended, EOS, LENGTH))
  grpo = tiny.algorithm(mask_truncated_completions=True)
  experience = found(stop_B=np.array([EOS, EOS, EOS, EOS, EOS, LENGTH], np.int32))
  assert grpo.weights(experience)[0].any(1).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize('level', ['token', 'sequence', 'sequence_token'])
def test_bug_35_old_scores_differ_from_new_ones_on_policy(level):
  """verl, unsloth: two programs, two roundings. A first update has ratio 1, bit for bit."""
  grpo = tiny.algorithm(importance_sampling_level=level, loss_agg='seq_mean_token_mean')
  assert grpo.needs == frozenset() and grpo.prepare is None
  row, _ = measure(grpo, dataclasses.replace(found(), scores={}))
  assert (row['ratio_max'], row['clip_ratio/low'], row['clip_ratio/high']) == (1.0, 0.0, 0.0)
  # Nor where old scores exist for another purpose: scored by another program, here of other value.
  corrected = dataclasses.replace(grpo, importance_correction='sequence_mask', importance_max=1e9)
  assert 'old_logp' in corrected.needs
  assert measure(corrected, found())[0]['ratio_max'] == 1.0


def test_bug_37_reference_with_other_parameters():
  """TRL: the reference was loaded from elsewhere. At step 0 KL and its gradient are 0."""
  experience = found()
  now = scores(experience).astype(np.float32)
  experience = dataclasses.replace(experience, scores={'ref_logp': now})
  row, grads = measure(tiny.algorithm(beta=1.0), experience, adv_BT=np.zeros_like(now))
  assert 0 <= row['kl'] < 1e-12 and np.abs(grads).max() < 1e-6
  row, _ = measure(tiny.algorithm(beta=1.0), found())
  assert row['kl'] > 0.01


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize('warmup', [0, 5])
def test_bug_38_learning_rate_zero_at_the_first_step(schedule, warmup):
  """verl: step 0 of the schedule was 0, so the first update was lost."""
  cfg = tiny.optimizer(schedule=schedule, warmup_steps=warmup)
  tx = optim.build(cfg, PARAMS, 10)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
  moved = optax.apply_updates(PARAMS, updates)
  assert all((np.asarray(moved[name]) != np.asarray(PARAMS[name])).all() for name in PARAMS)


def test_bug_40_logged_reward_without_the_weights():
  """TRL: the weights reached the loss and not the log."""
  parts = {'accuracy': np.float32([1, 0]), 'format': np.float32([1, 1])}
  weights = {'accuracy': 1.0, 'format': 0.5}
  given = [
    types.BatchScore(w * parts[name], {name: parts[name]}, None) for name, w in weights.items()
  ]
  told = rollouts.rewarded(tiny.experience([9.0, 9.0], [0, 0], [2, 2]), given, weights)
  row = evaluation.summary(evaluation.outcomes(told, tokenizers.Bytes(), 'accuracy'))
  assert (row['reward'], row['reward/accuracy'], row['reward/format']) == (1.0, 0.5, 1.0)


@pytest.mark.parametrize('changes', [{'num_iterations': 2}, {'num_minibatches': 2}])
def test_bug_42_ratio_of_one_off_policy(changes):
  """torchforge: exp(logp - stop_gradient(logp)) in every pass. Later ones need the old scores."""
  for preset in ('grpo', 'gspo'):
    grpo = tiny.algorithm(preset, **changes)
    assert 'old_logp' in grpo.needs
    assert abs(measure(grpo, found())[0]['ratio_max'] - 1) > 0.01


# ------------------------------------------------------------------------------------ the list

CANNOT_HAPPEN = {7, 30, 36, 39, 41}


def test_every_bug_of_the_list_is_here():
  """Each number from 1 to 42 has a test, or a line in the table above."""
  tested = {int(m[1]) for name in globals() if (m := re.match(r'test_bug_(\d\d)_', name))}
  table = {int(n) for n in re.findall(r'^ +(\d+)  \S', __doc__, re.MULTILINE)}
  assert table == CANNOT_HAPPEN
  assert tested | table == set(range(1, 43)) and not tested & table
