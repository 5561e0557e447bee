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
  collecting,
  data,
  evaluation,
  logs,
  packing,
  profiling,
  records,
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
  kept: list[dict]  # rows for the dataset of a phase that collects


def supervised(stage: tooling.Stage, position):
  """Packed rows of worked solutions: one optimizer step each."""
  setup, section = stage.setup, stage.phase.section
  stream = data.Stream(stage.task, 'train', stage.index, section.examples_per_step, position)
  pack = functools.partial(
    tooling.pack, stage.phase.learner, section.row_length, section.rows_per_batch
  )

  def make(state, read, step):
    del state, read, step
    with profiling.timed(stage.tally, 'data'):
      examples = setup.augmented(stream.next(), stage.phase.augmentations)
      shape = section.few_shot, section.row_length
      seqs = [setup.supervised_sequence(example, *shape) for example in examples]
    with profiling.timed(stage.tally, 'pack'):
      trained = sharding.total(float(sum(seq.index_M.size for seq in seqs)))
      updates = [(pack(seqs)[0], (trained,))]
    tokens = sum(seq.tokens_T.size for seq in seqs)
    return Step(
      updates,
      describe=lambda: {'timing/tokens': sharding.total(tokens)},
      transcripts=list,
      position=stream.position,
      kept=[],
    )

  return make


def reinforce(stage: tooling.Stage, position):
  """Roll out, keep, score, assign credit: one or several optimizer steps on one experience."""
  setup, phase, tally = stage.setup, stage.phase, stage.tally
  section, algorithm = phase.section, phase.algorithm
  stream = data.Stream(stage.task, 'train', stage.index, section.prompts_per_step, position)
  per_step = algorithm.num_iterations * algorithm.num_minibatches  # optimizer steps
  shape = section.row_length, section.rows_per_batch
  pack = functools.partial(tooling.pack, phase.learner, *shape)
  score = tooling.make_score(setup, phase.learner, *shape)
  read_now = []  # the examples of the step under way

  def prompts():
    examples = setup.augmented(stream.next(), phase.augmentations)
    read_now.extend(examples)
    return examples

  tools = tooling.make_tools(stage, 'train', prompts, score)

  def make(state, read, step):
    read_now.clear()
    named = {'params': state.params, 'ema': state.ema, 'version': step * per_step, **read}
    synced = step - step % section.sampler_sync_steps
    stale = {'params': read.get('sampler', state.params), 'version': synced * per_step}
    experience, sampled = sample_groups(stage, tools, named | stale, step)
    if section.shuffle_rewards:
      rng = stage.rng('shuffle', step, jax.process_index())
      shuffled_R = rng.permutation(experience.reward_R)
      experience = dataclasses.replace(experience, reward_R=shuffled_R)
    with profiling.timed(tally, 'score'):
      scores = {
        name: tools.score(named[role], experience.rows).logp_BT
        for name, role in wiring.SCORED_WITH.items()
        if name in algorithm.needs and (name not in experience.scores or 'sampler' in read)
      }
    experience = dataclasses.replace(experience, scores=experience.scores | scores)
    adv_BT = algorithm.advantages(experience)

    updates, texts = [], []
    if section.ntp_coef:
      texts = [setup.supervised_sequence(e, False, section.row_length) for e in read_now]
    for rows, of_texts in minibatches(stage, step, experience.length_B.size, len(texts)):
      minibatch = rollouts.take_rows(experience, rows)
      weight_BT, denominator = algorithm.weights(minibatch)
      aux_BT = {'weight': weight_BT, 'adv': adv_BT[rows], 'sampler_logp': minibatch.logp_BT}
      with profiling.timed(tally, 'pack'):
        aux_BT |= {name: minibatch.scores[name] for name in algorithm.needs} | minibatch.support
        seqs = packing.sequences(minibatch.tokens_BT, minibatch.length_B, aux_BT)
        # Where no process trains a token all weights are 0, and 0 / 1 is 0.
        denominators = [sharding.total(denominator) or 1.0]
        if section.ntp_coef:
          seqs = packing.with_texts(seqs, [texts[i] for i in of_texts], section.ntp_coef)
          learned = sum(float(texts[i].index_M.size) for i in of_texts)
          denominators.append(sharding.total(learned) or 1.0)
        updates.append((pack(seqs)[0], tuple(denominators)))
    correct, shown = setup.evaluation.correct, setup.config.log.transcripts
    return Step(
      updates,
      describe=lambda: (
        describe_experience(setup, experience)
        | algorithm.describe(experience)
        | phase.env.describe(experience)
        | sampled
      ),
      transcripts=lambda: evaluation.transcripts(experience, adv_BT, shown, correct),
      position=stream.position,
      kept=[],
    )

  return make


def collect(stage: tooling.Stage, position):
  """Sample and keep what is right; where nothing was, sample again with the answer as a hint.

  STaR (arXiv 2203.14465). The rows go into the dataset of the phase; no parameter changes.
  """
  setup, phase, section = stage.setup, stage.phase, stage.phase.section
  correct, shown = setup.evaluation.correct, setup.config.log.transcripts
  keeper = collecting.Keeper(correct, setup.rewards, setup.tokenizer, setup.prompter.prefill)
  dataset = collecting.Dataset(logs.read_rows(stage.dataset), section.max_per_problem)
  stream = data.Stream(stage.task, 'train', stage.index, section.prompts_per_step, position)
  score = tooling.make_window_score(setup, phase.learner, phase.env)

  def rollout(purpose, examples, state, read, step):
    named = {'params': state.params, 'ema': state.ema, 'version': 0, **read}
    tools = tooling.make_tools(stage, purpose, lambda: examples, score)
    with profiling.timed(stage.tally, 'rollout'):
      return phase.env.rollout(tools, named, step)

  def make(state, read, step):
    raw = stream.next()
    examples = setup.augmented(raw, phase.augmentations)
    prompts = [i * jax.process_count() + jax.process_index() for i in range(len(examples))]
    place = {'phase': phase.name, 'iteration': stage.place[1], 'step': step + 1}
    experiences = [rollout('collect', examples, state, read, step)]
    rows = keeper.rows(experiences[0], examples, prompts, **place)

    solved = keeper.solved(experiences[0])
    rngs = [stage.rng('rationalize', step, prompt) for prompt in prompts]
    shows, saves = np.asarray([rng.random(2) for rng in rngs]).T
    fails = [i for i in range(len(examples)) if i not in solved]
    asks = [i for i in fails if shows[i] < section.p_rationalization]
    asked = sharding.total(len(asks))
    if asked:  # then all processes sample, even one that has nothing to ask
      hints = [records.show_hint(raw[i]) for i in asks or [0]]
      hinted = setup.augmented(hints, phase.augmentations)
      experience = rollout('hint', hinted, state, read, step)
      if asks:
        experiences.append(experience)
        pairs = zip(asks, hinted, strict=True)
        stored = [h if saves[i] < section.p_show_hint_save else examples[i] for i, h in pairs]
        rows += keeper.rows(experience, stored, [prompts[i] for i in asks], **place)
    every = [row for mine in sharding.gather(rows) for row in mine]
    fresh = dataset.admit(sorted(every, key=lambda row: (row['prompt'], row['sample'])))

    completions = [c for experience in experiences for c in experience.completions]
    counts = {
      'problems': section.prompts_per_step,
      'solved': sharding.total(len(solved)),
      'asked': asked,
      'rationalized': len({row['prompt'] for row in every if row['hinted']}),
      'kept': len(fresh),
      'samples': sharding.total(len(completions)),
      'sampled_tokens': sharding.total(sum(c.num_tokens for c in completions)),
    }
    tokens = sum(int(experience.length_B.sum()) for experience in experiences)
    return Step(
      updates=[],
      describe=lambda: (
        describe_experience(setup, experiences[0])
        | {f'collect/{name}': float(count) for name, count in counts.items()}
        | collecting.describe(fresh)
        | {'timing/tokens': sharding.total(tokens)}
      ),
      transcripts=lambda: [
        sample
        for experience in experiences
        for sample in evaluation.transcripts(experience, None, shown, correct)
      ],
      position=stream.position,
      kept=fresh,
    )

  return make


def sample_groups(stage: tooling.Stage, tools: types.Tools, named: dict, step: int):
  """Rolls out until the algorithm has kept enough groups, or generation batches run out.

  Returns:
    the experience to train on, in which a process that kept no group has one row without trained
    tokens; and metrics of all that was sampled, if the algorithm chooses.
  """
  section, phase, wanted = stage.phase.section, stage.phase, None
  sampled, kept, groups, row = [], [], 0, {}
  for _ in range(section.max_generation_batches):
    with profiling.timed(stage.tally, 'rollout'):
      batch = phase.env.rollout(tools, named, step)
    good = phase.algorithm.keep(batch)
    if good is None:
      return batch, row
    sampled.append(batch)
    wanted = wanted or np.unique(batch.group_B).size  # as many as one batch has
    good = np.unique(batch.group_B)[good][: wanted - groups]
    if good.size:
      kept.append(rollouts.take_groups(batch, good))
    groups += good.size
    if sharding.agree_min(groups - wanted) >= 0:
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


def minibatches(stage: tooling.Stage, step: int, rows: int, texts: int):
  """Rows and texts of every optimizer step: `num_iterations` passes over both, rows shuffled."""
  algorithm = stage.phase.algorithm
  per_pass = min(algorithm.num_minibatches, sharding.agree_min(rows))
  for iteration in range(algorithm.num_iterations):
    order = stage.rng('minibatches', step, iteration).permutation(rows)
    parts = np.array_split(order, per_pass), np.array_split(np.arange(texts), per_pass)
    yield from zip(*parts, strict=True)


def describe_experience(setup: wiring.Setup, experience: types.Experience) -> dict:
  """Metrics of what a step is trained on."""
  table = evaluation.outcomes(experience, setup.tokenizer, setup.evaluation.correct)
  row = evaluation.summary(table)
  return row | {'timing/tokens': sharding.total(int(experience.length_B.sum()))}


def evaluate(stage, position):
  """A phase that only evaluates makes no steps."""
  del stage, position


STEPS = {
  'supervised': supervised,
  'reinforce': reinforce,
  'collect': collect,
  'evaluate': evaluate,
}
