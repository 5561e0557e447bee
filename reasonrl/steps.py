"""The steps of a phase: where the batches of an optimizer step come from.

`STEPS[kind](stage, position)` returns a function (state, read, step) -> Step; `read` has the
parameters that the phase reads beside its own, by role ('ref', and 'sampler' where that lags).
The loop calls `describe()`, and where they are due `transcripts()`, when the updates are on their
way, so that the device does not wait for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from reasonrl import (
  data,
  evaluation,
  packing,
  profiling,
  rollouts,
  sharding,
  tooling,
  types,
  wiring,
)


class Step(NamedTuple):
  """What one step of the loop trains on."""

  updates: list[tuple[list[types.Batch], tuple[float, ...]]]  # micro-batches, denominators
  describe: Callable[[], dict]  # () -> metrics
  transcripts: Callable[[], list[dict]]
  position: Any  # of the data, after this step


def supervised(stage: tooling.Stage, position):
  """Packed rows of worked solutions: one optimizer step each."""
  setup, section = stage.setup, stage.phase.section
  stream = data.Stream(setup.task, 'train', stage.index, section.examples_per_step, position)
  pack = functools.partial(tooling.pack, setup, section.row_length, section.rows_per_batch)

  def make(state, read, step):
    del state, read, step
    with profiling.timed(stage.tally, 'data'):
      examples = setup.augmented(stream.next())
      seqs = [setup.supervised_sequence(example, section.row_length) for example in examples]
    with profiling.timed(stage.tally, 'pack'):
      trained = sharding.total(float(sum(seq.index_M.size for seq in seqs)))
      updates = [(pack(seqs)[0], (trained,))]
    tokens = sum(seq.tokens_T.size for seq in seqs)
    return Step(
      updates,
      describe=lambda: {'timing/tokens': sharding.total(tokens)},
      transcripts=list,
      position=stream.position,
    )

  return make


def reinforce(stage: tooling.Stage, position):
  """Roll out, keep, score, assign credit: one or several optimizer steps on one experience."""
  setup, phase, tally = stage.setup, stage.phase, stage.tally
  section, algorithm = phase.section, phase.algorithm
  stream = data.Stream(setup.task, 'train', stage.index, section.prompts_per_step, position)
  per_step = algorithm.num_iterations * algorithm.num_minibatches  # optimizer steps
  shape = section.row_length, section.rows_per_batch
  pack = functools.partial(tooling.pack, setup, *shape)
  score = tooling.make_score(setup, phase.learner, *shape)
  tools = tooling.make_tools(stage, 'train', lambda: setup.augmented(stream.next()), score)

  def make(state, read, step):
    named = {'params': state.params, 'ema': state.ema, 'version': step * per_step, **read}
    synced = step - step % section.sampler_sync_steps
    stale = {'params': read.get('sampler', state.params), 'version': synced * per_step}
    experience, sampled = collect(stage, tools, named | stale, step)
    if section.shuffle_rewards:
      rng = stage.rng('shuffle', step, jax.process_index())
      shuffled_R = rng.permutation(experience.reward_R)
      experience = dataclasses.replace(experience, reward_R=shuffled_R)
    with profiling.timed(tally, 'score'):
      scores = {
        name: tools.score(named[role], experience)
        for name, role in wiring.SCORED_WITH.items()
        if name in algorithm.needs
      }
    experience = dataclasses.replace(experience, scores=scores)
    adv_BT = algorithm.advantages(experience)

    updates = []
    for rows in minibatches(stage, step, experience.length_B.size):
      minibatch = rollouts.take_rows(experience, rows)
      weight_BT, denominator = algorithm.weights(minibatch)
      aux_BT = {'weight': weight_BT, 'adv': adv_BT[rows], 'sampler_logp': minibatch.logp_BT}
      with profiling.timed(tally, 'pack'):
        aux_BT |= minibatch.scores
        seqs = packing.sequences(minibatch.tokens_BT, minibatch.length_B, aux_BT)
        # Where no process trains a token all weights are 0, and 0 / 1 is 0.
        updates.append((pack(seqs)[0], (sharding.total(denominator) or 1.0,)))
    correct, shown = setup.evaluation.correct, setup.config.log.transcripts
    return Step(
      updates,
      describe=lambda: (
        describe_experience(setup, experience) | algorithm.describe(experience) | sampled
      ),
      transcripts=lambda: evaluation.transcripts(experience, adv_BT, shown, correct),
      position=stream.position,
    )

  return make


def collect(stage: tooling.Stage, tools: types.Tools, named: dict, step: int):
  """Rolls out until the algorithm has kept enough groups, or generation batches run out.

  Returns:
    the experience to train on, in which a process that kept no group has one row without trained
    tokens; and metrics of all that was sampled, if the algorithm chooses.
  """
  section, phase = stage.phase.section, stage.phase
  wanted = section.prompts_per_step // jax.process_count()
  sampled, kept, groups, row = [], [], 0, {}
  for _ in range(section.max_generation_batches):
    with profiling.timed(stage.tally, 'rollout'):
      batch = phase.env.rollout(tools, named, step)
    good = phase.algorithm.keep(batch)
    if good is None:
      return batch, row
    sampled.append(batch)
    good = np.unique(batch.group_B)[good][: wanted - groups]
    if good.size:
      kept.append(rollouts.take_groups(batch, good))
    groups += good.size
    if sharding.agree_min(groups) >= wanted:
      break
  if not kept:
    nothing = rollouts.take_rows(batch, np.arange(1))
    kept = [dataclasses.replace(nothing, source_BT=np.zeros_like(nothing.source_BT))]
  everything = describe_experience(stage.setup, rollouts.concatenate(sampled))
  names = ('reward', 'accuracy', 'zero_variance_groups', 'completion_length')
  row = {f'sampled/{name}': everything[name] for name in names}
  row |= {'sampled/batches': len(sampled), 'kept_groups': sharding.total(groups)}
  row['timing/tokens'] = everything['timing/tokens']
  return rollouts.concatenate(kept), row


def minibatches(stage: tooling.Stage, step: int, rows: int):
  """The rows of every optimizer step: `num_iterations` passes over them, shuffled anew."""
  algorithm = stage.phase.algorithm
  per_pass = min(algorithm.num_minibatches, sharding.agree_min(rows))
  for iteration in range(algorithm.num_iterations):
    order = stage.rng('minibatches', step, iteration).permutation(rows)
    yield from np.array_split(order, per_pass)


def describe_experience(setup: wiring.Setup, experience: types.Experience) -> dict:
  """Metrics of what a step is trained on."""
  correct, prefill = setup.evaluation.correct, setup.prompter.prefill
  row = evaluation.summary(evaluation.outcomes(experience, setup.tokenizer, prefill, correct))
  return row | {'timing/tokens': sharding.total(int(experience.length_B.sum()))}


def evaluate(stage, position):
  """A phase that only evaluates makes no steps."""
  del stage, position


STEPS = {'supervised': supervised, 'reinforce': reinforce, 'evaluate': evaluate}
