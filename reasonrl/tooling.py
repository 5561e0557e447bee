"""What an environment works with, built from the parts of a run.

make_tools     sampling, rewards, rendering and random keys under one roof
make_score     log-probabilities of given tokens, packed like training batches
make_held_out  the evaluation that a run repeats
"""

from __future__ import annotations

import contextlib
import time

import jax

from reasonrl import evaluation, learner, records, sampling, sharding, types, wiring
from reasonrl.rewards import votes


@contextlib.contextmanager
def timed(tally, name: str):
  """Adds the seconds within to tally['timing/<name>_s'], and gives a profiler their name."""
  start = time.monotonic()
  with jax.profiler.TraceAnnotation(name):
    yield
  key = f'timing/{name}_s'
  tally[key] = tally.get(key, 0.0) + time.monotonic() - start


def make_tools(parts, model: str, examples, purpose: str, place, score, tally) -> types.Tools:
  """The tools of an environment; `place` is (phase, iteration), part of every random key.

  A reward either judges completions one by one or by group, in the pool of processes, or has
  `batch(tools, state, experience) -> types.BatchScore`, which runs here and may use the models.

  `tally` collects the seconds spent in each tool and the rewards that failed.
  """

  def generate(params, requests, spec, slots):
    with timed(tally, 'sample'):
      return parts.samplers[model].generate(params, requests, spec, slots, parts.poll)

  def reward(state, experience):
    with timed(tally, 'reward'):
      found = judge(state, experience)
    parts.poll()
    return types.rewarded(experience, found)

  def judge(state, experience):
    found = []
    device = {name: pair for name, pair in parts.rewards.items() if hasattr(pair[0], 'batch')}
    host = {name: pair for name, pair in parts.rewards.items() if name not in device}
    if host:
      groups = experience.group_R.tolist()
      out = parts.pool.score(host, experience.examples, experience.completions, groups)
      dense = out.token_values and types.token_rewards(experience, out.token_values)
      found.append(types.BatchScore(out.value, out.parts, dense))
      tally['reward_timeouts'] += out.timeouts
      tally['reward_errors'] += out.errors
      if out.first_failure:
        tally['failure'] = out.first_failure
    for name, (fn, weight) in device.items():
      value_R, named, dense = fn.batch(tools, state, experience)
      named = {name: value_R} | {f'{name}/{part}': part_R for part, part_R in named.items()}
      dense = None if dense is None else weight * dense
      found.append(types.BatchScore(weight * value_R, named, dense))
    return found

  def row_keys(step, prompt_R, sample_R, thread_R):
    seed = parts.config.seed
    return sampling.row_keys(seed, purpose, *place, step, prompt_R, sample_R, thread_R)

  tools = types.Tools(
    task=parts.task,
    tokenizer=parts.tokenizer,
    sampler=parts.samplers[model],
    prefill=parts.prompter.prefill,
    examples=examples,
    render=lambda example: parts.prompter.render(parts.tokenizer, example),
    row_keys=row_keys,
    generate=generate,
    score=score,
    reward=reward,
  )
  return tools


def pack(parts: wiring.Parts, row_length: int, rows: int, seqs):
  """`learner.pack` into micro-batches of `rows` rows over all processes."""
  each = rows // jax.process_count()
  return learner.pack(seqs, row_length, each, parts.mesh.shape['tensor'])


def make_score(parts: wiring.Parts, student: learner.Learner, row_length: int, rows: int):
  """(params, experience) -> logp_BT of the policy tokens, at the learner's temperature."""

  def score(params, experience):
    aux = {'weight': experience.mask_BT}
    seqs = learner.sequences(experience.tokens_BT, experience.length_B, aux)
    batches, where = pack(parts, row_length, rows, seqs)
    batches = [sharding.put_rows(batch, parts.mesh) for batch in batches]
    logps = [sharding.fetch_rows(student.score(params, batch).logp) for batch in batches]
    return learner.unpack(logps, seqs, where, experience.tokens_BT.shape)

  return score


def distinct_examples(task, split: str, count: int) -> list[records.Example]:
  """The first `count` examples of a split whose problems differ: an interval counts each once.

  Raises:
    UserError: there are fewer.
  """
  found: dict[str, records.Example] = {}
  for index in range(20 * count):
    example = task.example(split, index)
    found.setdefault(example.problem, example)
    if len(found) == count:
      return list(found.values())
  raise records.UserError(
    f'evaluation.num_examples={count}: only {len(found)} different {split} problems among the '
    f'first {20 * count} examples of the task'
  )


def voter(parts: wiring.Parts, examples):
  """experience -> what each rollout votes for, see `votes`; None if a reward knows no answers."""
  correct = parts.evaluation.correct
  names = {example.meta.get(records.CHECKED_BY, correct) for example in examples}
  rewards = {name: parts.rewards[name][0] for name in names}
  if not all(hasattr(reward, 'answer') for reward in rewards.values()):
    return None
  counted = {'vote': (votes.Votes(rewards, correct), 1.0)}

  def vote(experience):
    groups = experience.group_R.tolist()
    return parts.pool.score(counted, experience.examples, experience.completions, groups).value

  return vote


def make_held_out(parts: wiring.Parts):
  """(phase, train state, version, tally) -> metrics and transcripts on the first test examples."""
  count, n = parts.evaluation.num_examples, jax.process_count()
  if count % n:
    raise records.UserError(f'evaluation.num_examples={count} does not divide over {n} processes')
  found = distinct_examples(parts.task, 'test', count)
  examples = wiring.augmented(parts, found[jax.process_index() :: n])
  for example in examples:  # a prompt that does not fit stops the run now, not in an hour
    parts.prompter.render(parts.tokenizer, example)

  env = parts.evaluation_env
  correct, vote = parts.evaluation.correct, voter(parts, found)
  window = types.padded(parts.prompter.max_length) + env.max_completion_length
  rows = 8 * parts.mesh.shape['data'] * parts.mesh.shape['fsdp']  # 8 a device

  def held_out(phase, state, version, tally):
    score = make_score(parts, phase.learner, window, rows)
    model = phase.section.trains
    tools = make_tools(parts, model, lambda: examples, 'eval', (0, 0), score, tally)
    named = {'params': state.params, 'ema': state.ema, 'version': version}
    metrics, experiences = evaluation.evaluate(parts.evaluation, env, tools, named, vote)
    shown = [
      {'mode': mode, **sample}
      for mode, experience in experiences.items()
      for sample in evaluation.transcripts(experience, None, parts.config.log.transcripts, correct)
    ]
    return metrics, shown

  return held_out
