"""What an environment works with, built from the setup of a run.

make_tools     sampling, rewards, rendering and random keys
make_score     log-probabilities of given tokens, packed like training batches
make_window_score  the same for rollouts that nothing trains on
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from reasonrl import (
  learner,
  ops,
  packing,
  profiling,
  rollouts,
  sampling,
  sentinels,
  sharding,
  types,
  wiring,
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What stays the same while a phase runs."""

  setup: wiring.Setup
  phase: wiring.Phase
  task: Any  # the phase's own, or the run's
  dataset: pathlib.Path  # where a phase of kind 'collect' writes what it keeps
  place: tuple[int, int]  # (index in the order of phases, iteration): part of every random key
  tally: dict  # seconds and counts of the step under way

  @property
  def index(self) -> int:
    return self.place[0]

  def rng(self, purpose: str, *key: int) -> np.random.Generator:
    """A host generator, a function of the seed, its purpose, the phase and the key."""
    return np.random.default_rng(
      (self.setup.config.seed, sampling.PURPOSES[purpose], *self.place, *key)
    )


def make_tools(stage: Stage, purpose: str, examples, score) -> types.Tools:
  """The tools of an environment.

  A reward either judges completions one by one or by group, in the pool of processes, or has
  `batch(tools, state, experience) -> types.BatchScore`, which runs here and may use the models.

  The stage's tally collects the seconds spent in each tool, the completions that were judged in the
  pool and the rewards that failed; in training also checksums of what was sampled with.

  Args:
    stage: the phase under way.
    purpose: 'train', 'eval', 'collect' or 'hint', part of every random key.
    examples: () -> the next prompts' examples.
    score: see `make_score`.
  """
  setup, tally = stage.setup, stage.tally
  sampler = setup.samplers[stage.phase.section.trains]

  def generate(params, requests, spec, slots):
    if purpose != 'eval' and setup.config.sentinels:
      tally.setdefault('sampled_with', []).append(sentinels.checksum(params))
    with profiling.timed(tally, 'sample'):
      return sampler.generate(params, requests, spec, slots, setup.poll)

  def reward(state, experience):
    with profiling.timed(tally, 'reward'):
      found = judge(state, experience)
    setup.poll()
    weights = {name: weight for name, (_, weight) in setup.rewards.items()}
    return rollouts.rewarded(experience, found, weights)

  def judge(state, experience):
    found = []
    device = {name: pair for name, pair in setup.rewards.items() if hasattr(pair[0], 'batch')}
    host = {name: pair for name, pair in setup.rewards.items() if name not in device}
    if host:
      groups = experience.group_R.tolist()
      out = setup.pool.score(host, experience.examples, experience.completions, groups)
      tally['completions'] += len(experience.completions)
      dense = out.token_values and rollouts.token_rewards(experience, out.token_values)
      found.append(types.BatchScore(out.value, out.parts, dense))
      count_failures(tally, out)
    for name, (fn, weight) in device.items():
      value_R, named, dense = fn.batch(tools, state, experience)
      named = {name: value_R} | {f'{name}/{part}': part_R for part, part_R in named.items()}
      dense = None if dense is None else weight * dense
      found.append(types.BatchScore(weight * value_R, named, dense))
    return found

  def row_keys(step, prompt_R, sample_R, thread_R):
    seed = setup.config.seed
    return sampling.row_keys(seed, purpose, *stage.place, step, prompt_R, sample_R, thread_R)

  tools = types.Tools(
    task=stage.task,
    tokenizer=setup.tokenizer,
    sampler=sampler,
    prefill=setup.prompter.prefill,
    examples=examples,
    render=setup.prompt,
    text=setup.text,
    row_keys=row_keys,
    generate=generate,
    score=score,
    reward=reward,
  )
  return tools


def count_failures(tally: dict, scores) -> None:
  """Adds the rewards that failed in the pool to a tally."""
  tally['reward_timeouts'] += scores.timeouts
  tally['reward_errors'] += scores.errors
  if scores.first_failure:
    tally['failure'] = scores.first_failure


def pack(student: learner.Learner, row_length: int, rows: int, seqs):
  """`packing.pack` into micro-batches of `rows` rows over all processes."""
  each = rows // jax.process_count()
  share = ops.shares_prefixes(student.mesh.devices.flat[0], student.model.compute_dtype)
  return packing.pack(seqs, row_length, each, share)


def make_window_score(setup: wiring.Setup, student: learner.Learner, env):
  """`make_score` of whole rollouts of an environment, where nothing is trained on them."""
  window = env.longest(setup.tokenizer, types.padded(setup.prompter.max_length))
  rows = 8 * setup.mesh.shape['data'] * setup.mesh.shape['fsdp']  # 8 a device
  return make_score(setup, student, window, rows)


def make_score(setup: wiring.Setup, student: learner.Learner, row_length: int, rows: int):
  """`types.Tools.score`: one forward pass over rows, packed into micro-batches of one shape."""

  def score(params, given: types.Rows) -> types.Scores:
    aux = {'weight': given.drawn_BT + given.plain_BT} | given.support
    if given.plain_BT.any():
      aux['plain'] = given.plain_BT
    seqs = packing.sequences(given.tokens_BT, given.length_B, aux)
    batches, where = pack(student, row_length, rows, seqs)
    batches = [sharding.put_rows(batch, setup.mesh) for batch in batches]
    found = [sharding.fetch_rows(student.score(params, batch)) for batch in batches]
    shape = given.tokens_BT.shape
    return types.Scores(*(packing.unpack(x, seqs, where, shape) for x in zip(*found, strict=True)))

  return score
