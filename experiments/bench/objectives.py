"""What the presets of the GRPO family cost: each beside plain GRPO, in one interleaved run.

  python experiments/bench/objectives.py

Plain GRPO is written out below: group-standardised advantage, clipped ratio, token mean, and
nothing else. One round is, for it and for every preset in turn, all that an experience costs once
it is sampled and scored: advantages, weights, packing, gradients and one optimizer step. Prints,
per preset, the median over rounds of its time divided by plain GRPO's of the same round, host and
device apart. Plain GRPO is in it twice: how far the second is from 1 is what chance does.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import app, flags

from reasonrl import learner, optim, packing, records, sampling, sharding, types
from reasonrl.algorithms import grpo
from reasonrl.configs import common
from reasonrl.models import decoder

ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timed rounds.')
PRESETS = flags.DEFINE_list('presets', list(common.ALGORITHM_PRESETS), 'Which; by default all.')
GROUPS, G, PROMPT, NEW, VOCAB = 32, 16, 16, 24, 32


class Plain:
  """The formula of arXiv 2402.03300 with a token mean, and no switch."""

  num_minibatches = 1
  prepare = None

  def advantages(self, experience):
    reward_PG = experience.reward_R.reshape(-1, G).astype(np.float64)
    centred = reward_PG - reward_PG.mean(1, keepdims=True)
    adv_R = (centred / (reward_PG.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
    return (adv_R[:, None] * experience.mask_BT).astype(np.float32)

  def weights(self, experience):
    return experience.mask_BT, float(experience.mask_BT.sum())

  def token_loss(self, out, aux):
    gap = jnp.where(aux['weight'] > 0, out.logp - jax.lax.stop_gradient(out.logp), 0.0)
    ratio, adv = jnp.exp(gap), aux['adv']
    return -jnp.minimum(ratio * adv, jnp.clip(ratio, 0.8, 1.2) * adv), {'ratio_max': ratio}


def make_experience(rng) -> types.Experience:
  """Random tokens of full length, and rewards of 0 and 1."""
  rows = GROUPS * G
  tokens = rng.integers(1, VOCAB, (rows, PROMPT + NEW), dtype=np.int32)
  source = np.zeros(tokens.shape, np.int8)
  source[:, PROMPT:] = types.POLICY
  logp = np.where(source == types.POLICY, -np.log(VOCAB), 0.0).astype(np.float32)
  reward = rng.integers(0, 2, rows).astype(np.float32)
  return types.Experience(
    tokens_BT=tokens,
    prompt_length_B=np.full(rows, PROMPT, np.int32),
    length_B=np.full(rows, PROMPT + NEW, np.int32),
    source_BT=source,
    logp_BT=logp,
    stop_B=np.full(rows, int(records.Stop.EOS), np.int32),
    version_B=np.zeros(rows, np.int32),
    group_B=np.repeat(np.arange(GROUPS, dtype=np.int32), G),
    rollout_B=np.arange(rows, dtype=np.int32),
    reward_R=reward,
    parts={'accuracy': reward},
    reward_weights={'accuracy': 1.0},
    reward_BT=None,
    support={},
    scores={'old_logp': logp, 'ref_logp': logp},
    examples=(),
    completions=(),
  )


def main(_) -> None:
  config = common.model('nano')
  config.vocab_size = VOCAB
  fields = {k: v for k, v in config.items() if k not in ('kind', 'weights')}
  model, mesh = decoder.Decoder(**fields), sharding.make_mesh(-1, 1, 1)
  params = jax.jit(model.init)(jax.random.key(0))
  sampler, section = (
    sampling.Sampler(model, mesh, (0,), **common.sampler()),
    common.optim(1e-5).to_dict(),
  )
  tx = optim.build(optim.Optim(**section), params, 100)
  algorithms = {'plain': Plain(), 'plain again': Plain()}
  for preset in PRESETS.value:
    settings = common.algorithm(preset).to_dict()
    settings.pop('name')
    # One optimizer step of each, so that the same work is compared.
    algorithms[preset] = dataclasses.replace(grpo.GRPO(**settings), num_minibatches=1)
  learners, states = {}, {}
  for name, algorithm in algorithms.items():
    learners[name] = learner.Learner(
      model=model,
      mesh=mesh,
      tx=tx,
      ema_decay=None,
      terms=(learner.Term(algorithm.token_loss, algorithm.prepare, 'weight'),),
      form=sampler.form(1.0),
      forbidden=(0,),
      loss_backend='auto',
      loss_chunk=0,
    )
    states[name] = learners[name].init(jax.tree.map(jnp.copy, params))

  times = {name: {'host': [], 'device': []} for name in algorithms}
  rng, names = np.random.default_rng(0), list(algorithms)
  for i in range(ROUNDS.value + 1):  # the first one compiles
    experience = make_experience(rng)
    for name in rng.permutation(names):
      algorithm, start = algorithms[name], time.perf_counter()
      weight_BT, denominator = algorithm.weights(experience)
      aux = {'weight': weight_BT, 'adv': algorithm.advantages(experience)}
      aux |= {'sampler_logp': experience.logp_BT, **experience.scores}
      seqs = packing.sequences(experience.tokens_BT, experience.length_B, aux)
      batches, _ = packing.pack(seqs, 128, 8, share=True)
      middle = time.perf_counter()
      states[name], reports = learners[name].update(states[name], batches, (denominator or 1.0,))
      learner.reduce_reports(reports)
      if i:
        times[name]['host'].append(middle - start)
        times[name]['device'].append(time.perf_counter() - middle)

  table = rich.table.Table('preset', 'host', 'device', 'both')
  for name in names:
    cells = []
    for part in ('host', 'device', 'both'):
      parts = ('host', 'device') if part == 'both' else (part,)
      mine, plain = (
        [sum(column) for column in zip(*(times[n][p] for p in parts), strict=True)]
        for n in (name, 'plain')
      )
      cells.append(statistics.median(a / b for a, b in zip(mine, plain, strict=True)))
    table.add_row(name, *(f'{ratio:.3f}' for ratio in cells))
  rich.console.Console(highlight=False).print(table)
  host, device = (1e3 * statistics.median(times['plain'][p]) for p in ('host', 'device'))
  print(f'plain: {host:.1f} ms on the host, {device:.1f} ms on the device')


if __name__ == '__main__':
  app.run(main)
