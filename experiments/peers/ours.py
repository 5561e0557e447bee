"""Our side: the settings that mean the same, and the library's own functions on the same batch."""

from __future__ import annotations

import dataclasses
import functools

import batches
import jax
import jax.numpy as jnp
import numpy as np

from reasonrl import learner, records, rollouts, types
from reasonrl.algorithms import grpo
from reasonrl.configs import common

jax.config.update('jax_enable_x64', True)

LOSS_TYPES = {  # TRL's loss_type -> preset and what it changes; the rest is below
  'grpo': ('grpo', {'loss_agg': 'seq_mean_token_mean'}),
  'bnpo': ('grpo', {'loss_agg': 'token_mean_local'}),
  'dr_grpo': ('dr_grpo', {}),
  'dapo': ('grpo', {}),
  'cispo': ('cispo', {}),
  'sapo': ('sapo', {}),
  'luspo': ('luspo', {'num_minibatches': 1}),
  'vespo': ('vespo', {}),
}
SAME_NAME = (
  *('scale_rewards', 'multi_objective_aggregation', 'importance_sampling_level', 'epsilon'),
  *('epsilon_high', 'delta', 'beta', 'entropy_coef', 'mask_truncated_completions'),
  *('num_iterations', 'sapo_temperature_pos', 'sapo_temperature_neg', 'vespo_k_pos'),
  *('vespo_lambda_pos', 'vespo_k_neg', 'vespo_lambda_neg'),
)


def equivalent(trl: dict) -> grpo.GRPO:
  """Our algorithm for the values of TRL's arguments (GRPOConfig), by name."""
  preset, changes = LOSS_TYPES[trl['loss_type']]
  steps = trl['steps_per_generation'] // trl['gradient_accumulation_steps']
  fields = common.algorithm(preset).to_dict() | {name: trl[name] for name in SAME_NAME} | changes
  fields |= {
    'loss_constant': trl['max_completion_length'],
    'local_rows': batches.B // trl['steps_per_generation'],
    'num_minibatches': steps,
    'kl_estimator': 'ratio_k3' if trl['use_bias_correction_kl'] else 'k3',
  }
  if trl['loss_type'] == 'cispo':
    cap = trl['epsilon'] if trl['epsilon_high'] is None else trl['epsilon_high']
    fields['cispo_ratio_max'] = cap
  if trl['use_vllm'] and trl['vllm_importance_sampling_correction']:
    fields |= {
      'importance_correction': trl['vllm_importance_sampling_mode'],
      'importance_max': trl['vllm_importance_sampling_clip_max'],
      'importance_min': trl['vllm_importance_sampling_clip_min'],
    }
  return build(fields)


def build(fields: dict) -> grpo.GRPO:
  return grpo.GRPO(**{name: x for name, x in fields.items() if name != 'name'})


def experience(case: batches.Case) -> types.Experience:
  """The batch as an environment would return it, with every score there is."""
  at_completion = lambda x_BC: np.pad(np.asarray(x_BC), ((0, 0), (batches.PROMPT, 0)))
  source_BC = np.where(case.mask_BC, types.POLICY, types.ENVIRONMENT)
  applies_KB = ~np.isnan(np.stack(list(case.rewards.values())))
  weighted_KB = [batches.REWARD_WEIGHTS[name] * r for name, r in case.rewards.items()]
  reward_R = np.where(applies_KB.any(0), np.nansum(weighted_KB, 0), np.nan)
  stop_B = np.where(case.stopped_B, records.Stop.EOS, records.Stop.LENGTH)
  return types.Experience(
    tokens_BT=at_completion(case.tokens_BC).astype(np.int32),
    prompt_length_B=np.full(batches.B, batches.PROMPT, np.int32),
    length_B=(batches.PROMPT + case.length_B).astype(np.int32),
    source_BT=at_completion(source_BC).astype(np.int8),
    logp_BT=at_completion(np.where(case.mask_BC, case.logp('sampler'), 0.0)),
    stop_B=stop_B.astype(np.int32),
    version_B=np.zeros(batches.B, np.int32),
    group_B=np.repeat(np.arange(batches.P), batches.G).astype(np.int32),
    rollout_B=np.arange(batches.B, dtype=np.int32),
    reward_R=reward_R,
    parts=dict(case.rewards),
    reward_weights=batches.REWARD_WEIGHTS,
    reward_BT=None,
    scores={f'{x}_logp': at_completion(case.logp(x)) for x in ('old', 'ref')},
    examples=(None,) * batches.B,
    completions=(None,) * batches.B,
  )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(cfg: grpo.GRPO, logits_BMV, batch: types.Batch, denominator):
  """The loss of the learner, written over logits instead of parameters; and its metrics."""
  targets_BM = jnp.take_along_axis(batch.tokens_BT, batch.index_BM, axis=1)

  def loss_fn(logits_BMV):
    logp_BMV = jax.nn.log_softmax(logits_BMV)
    logp_BM = jnp.take_along_axis(logp_BMV, targets_BM[..., None], -1)[..., 0]
    entropy_BM = -(jnp.exp(logp_BMV) * logp_BMV).sum(-1)
    aux = batch.aux
    if cfg.prepare is not None:  # from a scoring pass of its own: no gradient
      aux = aux | cfg.prepare(jax.lax.stop_gradient(logp_BM), batch)
    loss_BM, metrics = cfg.token_loss(learner.Out(logp_BM, entropy_BM), aux)
    weighted_BM = jnp.where(aux['weight'] > 0, aux['weight'] * loss_BM, 0.0)
    return weighted_BM.sum() / denominator, {**metrics, 'entropy': entropy_BM}

  return jax.value_and_grad(loss_fn, has_aux=True)(logits_BMV)


def run(cfg: grpo.GRPO, case: batches.Case, step: int = 0) -> dict:
  """As `theirs.run`; metrics are means over trained tokens, advantages without the correction.

  Raises:
    UserError: the settings have no meaning here.
  """
  cfg.check(batches.G, tuple(case.rewards))
  found, here = experience(case), slice(batches.PROMPT, None)
  adv_BT = cfg.advantages(found)
  outcome_BT = dataclasses.replace(cfg, importance_correction='none').advantages(found)
  rows = np.split(np.arange(batches.B), cfg.num_minibatches)[step]
  minibatch = rollouts.take_rows(found, rows)
  weight_BT, denominator = cfg.weights(minibatch)
  aux = {'adv': adv_BT[rows], 'weight': weight_BT, 'sampler_logp': minibatch.logp_BT}
  aux |= minibatch.scores
  at_BT = np.broadcast_to(np.arange(batches.PROMPT + batches.C), minibatch.tokens_BT.shape)
  batch = types.Batch(
    tokens_BT=minibatch.tokens_BT,
    positions_BT=at_BT,
    segments_BT=(at_BT < minibatch.length_B[:, None]).astype(np.int32),
    prefixes_BT=None,
    index_BM=at_BT[:, here],
    before_BM=at_BT[:, here] - 1,
    aux={name: x[:, here] for name, x in aux.items()},
  )
  # What only the host reads is the same for all, so that fewer programs are compiled.
  traced = dataclasses.replace(
    *(cfg,),
    **{'scale_rewards': '', 'multi_objective_aggregation': '', 'loss_agg': ''},
    **{'mask_truncated_completions': False, 'local_rows': 1},
  )
  logits = case.logits['policy']
  (loss, metrics), dlogits = value_and_gradient(traced, logits[rows], batch, denominator or 1.0)
  kept = batch.aux['weight'] > 0
  gradient = np.zeros_like(logits)
  gradient[rows] = dlogits
  return {
    'loss': float(loss),
    'gradient': gradient,
    'advantages': outcome_BT[np.arange(batches.B), found.mask_BT.argmax(1)],
    'metrics': {name: float(np.mean(np.asarray(x)[kept])) for name, x in metrics.items()},
  }
