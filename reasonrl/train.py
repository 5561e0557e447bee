"""THE loop. `run(config, workdir, pool)` reads top to bottom:

1. wire: every name of the config is looked up in its table, once (`wiring` builds and checks);
2. workdir: new, or resumed from its newest checkpoint (position, data, parameters, log offsets);
3. for each phase, for each step: evaluate if due; make this step's batches (from worked solutions,
   or by rolling out the policy and assigning credit); update; log the step before; save if due;
4. at the end of a phase: evaluate, keep its parameters under phases/.

Everything random is a function of (seed, purpose, phase, iteration, step, prompt, sample), so a run
that was killed anywhere continues as if nothing had happened.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from reasonrl import (
  checkpoint,
  data,
  display,
  evaluation,
  learner,
  logs,
  records,
  sharding,
  tooling,
  types,
  wiring,
)
from reasonrl.algorithms import ALGORITHMS
from reasonrl.envs import ENVS
from reasonrl.models import MODELS
from reasonrl.rewards import REWARDS
from reasonrl.tasks import TASKS

TABLES = {
  'task': TASKS,
  'reward': REWARDS,
  'env': ENVS,
  'algorithm': ALGORITHMS,
  'model': MODELS,
}
FAILURES = ('reward_timeouts', 'reward_errors')  # counted by the reward tool
# Fields in which a resumed run may differ from the run it continues: they change no result, the
# mesh beyond rounding.
MAY_DIFFER = ('mesh', 'rewarding', 'log', 'checkpoint', 'compilation_cache')


# ------------------------------------------------------------------------------------ steps
# `STEPS[kind](parts, phase, place, position, tally, params_of)` returns a function
# (state, step) -> updates [(micro-batches, denominators)], describe, data position. The loop calls
# describe() -> metrics, transcripts when the updates are on their way, so that the device does not
# wait for it.


def supervised_steps(parts, phase, place, position, tally, params_of):
  """Packed rows of worked solutions: one optimizer step each."""
  del params_of
  section = phase.section
  stream = data.Stream(parts.task, 'train', place[0], section.examples_per_step, position)
  pack = functools.partial(tooling.pack, parts, section.row_length, section.rows_per_batch)

  def make(state, step):
    del state, step
    with tooling.timed(tally, 'data'):
      examples = wiring.augmented(parts, stream.next())
      seqs = [wiring.supervised_sequence(parts, section, example) for example in examples]
    with tooling.timed(tally, 'pack'):
      trained = sharding.total(float(sum(seq.index_N.size for seq in seqs)))
      updates = [(pack(seqs)[0], (trained,))]
    tokens = sum(seq.tokens_L.size for seq in seqs)
    return updates, lambda: ({'timing/tokens': sharding.total(tokens)}, []), stream.position

  return make


def reinforce_steps(parts, phase, place, position, tally, params_of):
  """Roll out, score, keep, assign credit: one or several optimizer steps on one experience."""
  section, env, algorithm = phase.section, phase.env, phase.algorithm
  stream = data.Stream(parts.task, 'train', place[0], section.prompts_per_step, position)
  wanted = section.prompts_per_step // jax.process_count()
  per_step = algorithm.num_iterations * algorithm.num_minibatches  # optimizer steps
  frozen = {'ref': params_of(section.reads.ref)} if 'ref_logp' in algorithm.needs else {}
  shape = section.row_length, section.rows_per_batch
  pack = functools.partial(tooling.pack, parts, *shape)
  score = tooling.make_score(parts, phase.learner, *shape)
  examples = lambda: wiring.augmented(parts, stream.next())  # noqa: E731
  tools = tooling.make_tools(parts, section.trains, examples, 'train', place, score, tally)

  def make(state, step):
    named = {'params': state.params, 'ema': state.ema, 'version': step * per_step, **frozen}
    kept, groups = [], 0
    for _ in range(section.max_generation_batches):
      with tooling.timed(tally, 'rollout'):
        found = env.rollout(tools, named, step)
      good = np.unique(found.group_B)[algorithm.keep(found)][: wanted - groups]
      if good.size:
        kept.append(types.take_groups(found, good))
      groups += good.size
      if -sharding.agree(-groups) >= wanted:
        break
    if -sharding.agree(-groups) == 0:  # on some process
      raise RuntimeError(
        f'{phase.name} step {step}: the algorithm kept no group of '
        f'{section.max_generation_batches} rollouts of {wanted} prompts'
      )
    experience = types.concatenate(kept) if len(kept) > 1 else kept[0]
    if section.shuffle_rewards:
      rng = np.random.default_rng((parts.config.seed, *place, step, jax.process_index()))
      shuffled_R = rng.permutation(experience.reward_R)
      experience = dataclasses.replace(experience, reward_R=shuffled_R)
    sources = {'old_logp': 'params', 'ref_logp': 'ref'}
    with tooling.timed(tally, 'score'):
      scores = {
        name: tools.score(named[source], experience)
        for name, source in sources.items()
        if name in algorithm.needs
      }
    experience = dataclasses.replace(experience, scores=scores)
    adv_BT = algorithm.advantages(experience)

    updates, rows = [], experience.length_B.size
    parts_per_pass = min(algorithm.num_minibatches, -sharding.agree(-rows))
    for iteration in range(algorithm.num_iterations):
      order = np.random.default_rng((parts.config.seed, *place, step, iteration)).permutation(rows)
      for members in np.array_split(order, parts_per_pass):
        part = types.take_rows(experience, members)
        weight_BT, denominator = algorithm.weights(part)
        aux_BT = {'weight': weight_BT, 'adv': adv_BT[members], 'sampler_logp': part.logp_BT}
        with tooling.timed(tally, 'pack'):
          seqs = learner.sequences(part.tokens_BT, part.length_B, aux_BT | part.scores)
          # Where no process trains a token all weights are 0, and 0 / 1 is 0.
          updates.append((pack(seqs)[0], (sharding.total(denominator) or 1.0,)))

    def describe():
      correct, prefill = parts.evaluation.correct, parts.prompter.prefill
      row = evaluation.summary(evaluation.outcomes(experience, parts.tokenizer, prefill, correct))
      row['timing/tokens'] = sharding.total(int(experience.length_B.sum()))
      return row, evaluation.transcripts(experience, adv_BT, parts.config.log.transcripts, correct)

    return updates, describe, stream.position

  return make


def no_steps(parts, phase, place, position, tally, params_of):
  """A phase that only evaluates."""
  del parts, phase, place, position, tally, params_of


STEPS = {'supervised': supervised_steps, 'reinforce': reinforce_steps, 'evaluate': no_steps}


# ------------------------------------------------------------------------------------ sentinels

# Bounds on |log pi_trainer - log pi_sampler|. In bfloat16 single unlikely tokens differ by more
# than 1 without a bug, so there the mean is watched: over the GRPO steps of SmolLM2-135M it was at
# most 0.017 (experiments/r1_zero_smollm2).
MISMATCH = {'float32': ('mismatch/max', 1e-4), 'bfloat16': ('mismatch/mean', 0.05)}
STEP0_KL = 1e-5  # float32, before the first update: policy and reference are the same parameters


def merge(reports: list[dict]) -> dict:
  """One row from the reports of a step's updates: means, maxima; of the first, mismatch and KL.

  Only the first update meets the parameters that sampled.
  """
  out = {}
  for name in reports[0]:
    values = [report[name] for report in reports]
    if name.startswith('mismatch') or name == 'kl':
      out[name] = values[0]
    elif name == 'tokens':
      out[name] = sum(values)
    elif name == 'finite':
      out[name] = min(values)
    elif name.endswith('_max') or name == 'skipped':
      out[name] = max(values)
    else:
      out[name] = sum(values) / len(values)
  return out


def sentinels(row: dict, at_reference: bool, compute_dtype: str) -> list[str]:
  """What must never be seen while training. Empty when all is well.

  `at_reference`: the policy that sampled still was the reference.
  """
  found = []
  name, limit = MISMATCH[compute_dtype]
  if row.get(name, 0.0) > limit:
    found.append(
      f'sampler and trainer log-probabilities: {name} {row[name]:.1e} is above {limit:.0e}; the '
      'parameters did not reach the sampler, or the two score different distributions'
    )
  if at_reference and compute_dtype == 'float32' and row.get('kl', 0.0) > STEP0_KL:
    found.append(f'KL to the reference before the first update is {row["kl"]:.1e}, not 0')
  if row.get('unmasked_tokens', 0):
    found.append(f'{row["unmasked_tokens"]:.0f} sampled tokens are not in the policy mask')
  if not row['finite']:
    found.append('the loss or a gradient was not finite: the step was skipped and its batch kept')
  return found


# ------------------------------------------------------------------------------------ the loop


def run(config, workdir: str, pool) -> int:
  """Runs every phase of the config, or goes on where the workdir stopped.

  Args:
    config: a locked ConfigDict, see `configs/common.py`.
    workdir: the run's folder.
    pool: a started `rewarding.Pool`.

  Returns:
    0 finished; 143 or 130 stopped by SIGTERM or Ctrl-C, with the last finished step saved.

  Raises:
    UserError: bad input, before the first step.
  """
  # ---- wire: whatever is wrong with the config stops here
  wiring.check_numbers(config)
  if config.compilation_cache and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = str(pathlib.Path(config.compilation_cache).expanduser())
    jax.config.update('jax_compilation_cache_dir', cache)
  stop, leader = checkpoint.StopSignal(config.checkpoint.grace_s), jax.process_index() == 0
  path = everywhere(lambda: logs.check_workdir(workdir, config, MAY_DIFFER))
  flat = wiring.positions(config, STEPS)
  parts = wiring.wire(config, TABLES, flat, path, pool, stop.poll)
  held_out = tooling.make_held_out(parts)

  # ---- open the workdir, run
  devices = [str(d) for d in jax.devices()]
  lock = everywhere(lambda: logs.open_workdir(path, config, devices) if leader else None)
  everywhere(lambda: logs.check_opened(path, config, MAY_DIFFER))
  if leader:
    wiring.save_tokenizer(parts.tokenizer, path)
  keep = {'keep_last': config.checkpoint.keep_last, 'keep_every': config.checkpoint.keep_every}
  with (
    stop,
    lock or contextlib.nullcontext(),
    contextlib.closing(checkpoint.Checkpoints(path, **keep)) as store,
    contextlib.closing(logs.Metrics(path, leader)) as metrics,
    display.Display(config.log.every, leader) as screen,
  ):
    try:
      return run_phases(Run(parts, flat, held_out, path, store, metrics, screen))
    except checkpoint.Stopped as stopped:
      screen.note(f'{stopped}; the same command with --workdir={path} goes on from here')
      return stopped.code


def everywhere(action):
  """Does something on every process, and waits for all; what one of them refuses stops all."""
  done, refusal = None, ''
  try:
    done = action()
  except records.UserError as error:
    refusal = str(error)
  for told in sharding.gather(refusal):
    if told:
      raise records.UserError(told)
  return done


@contextlib.contextmanager
def trace(folder):
  """Profiles what happens within, on the first process."""
  if jax.process_index() > 0:
    yield
    return
  with jax.profiler.trace(folder, create_perfetto_trace=True):
    yield


@dataclasses.dataclass(frozen=True)
class Run:
  """What is open while phases run."""

  parts: wiring.Parts
  flat: list[tuple[str, int]]  # (phase, iteration), in order
  held_out: Callable  # see `tooling.make_held_out`
  path: pathlib.Path
  store: checkpoint.Checkpoints
  metrics: logs.Metrics
  screen: display.Display


def run_phases(run: Run) -> int:
  """Finds the newest checkpoint and runs the phases from there; returns 0."""
  parts, flat, path, screen = run.parts, run.flat, run.path, run.screen
  last = path / 'phases' / wiring.kept_name(flat, len(flat) - 1)
  if sharding.same(int(last.is_dir()), f'whether {last} exists'):
    screen.note(f'{path} is finished')
    return 0
  target_of = lambda at: parts.phases[flat[at['index']][0]].learner.abstract()  # noqa: E731
  newest = run.store.newest(target_of, screen.note)
  at = newest[2] if newest else {'index': 0, 'best': 0.0, 'offsets': logs.START}
  run.metrics.truncate(at['offsets'])
  if newest and at['tokenizer'] != parts.tokenizer.fingerprint:
    raise records.UserError(f'{path}/tokenizer is not the tokenizer of checkpoint {newest[0]}')
  best = at['best']
  for index in range(at['index'], len(flat)):
    resume, newest = newest, None
    best = run_phase(run, index, resume, best)
  return 0


def run_phase(run: Run, index: int, resume, best: float) -> float:
  """Phase `index`, from its start or from a checkpoint (step of the run, state, host item).

  Returns the best held-out greedy accuracy so far.
  """
  parts, flat, path, metrics, screen = run.parts, run.flat, run.path, run.metrics, run.screen
  config, (name, iteration) = parts.config, flat[index]
  phase = parts.phases[name]
  section, student = phase.section, phase.learner
  before = sum(config[n].steps for n, _ in flat[:index])  # steps of the run before this phase
  at = resume[2] if resume else {'step': 0, 'data': 0, 'evaluated': False}
  start, position, evaluated = at['step'], at['data'], at['evaluated']

  # ---- this phase's learner, state and data
  screen.phase(name, section.kind, section.steps, start)
  screen.status('loading parameters')
  params_of = lambda source: wiring.init_params(  # noqa: E731
    parts, source.model, source.init, flat, index, path
  )
  if resume:
    state = resume[1]
  else:
    start_from = (section.trains, section.init, flat, index, path)
    state = student.init(wiring.init_params(parts, *start_from))
  tally = collections.defaultdict(float)  # times and counts of the step under way
  place = (index, iteration)
  make = STEPS[section.kind](parts, phase, place, position, tally, params_of)
  pending, clock = None, time.monotonic()

  def header(kind, step):
    where = {'step': before + step, 'phase': name, 'iteration': iteration}
    return where | {'phase_step': step, 'kind': kind}

  def settle(step):
    """Empties the tally: this process's times, and the failed rewards of all."""
    every = sharding.gather(dict(tally))
    row = {key: value for key, value in tally.items() if key.startswith('timing/')}
    row |= {key: sum(t.get(key, 0) for t in every) for key in FAILURES if key in tally}
    for failure in [t['failure'] for t in every if 'failure' in t][:1]:
      screen.note(f'step {step}: a reward failed and counted 0: {failure}')
    tally.clear()
    return row

  def flush():
    """Fetches and writes what the last dispatched step reported."""
    nonlocal pending, clock
    if pending is None:
      return
    (step, row, reports, updates, samples), pending = pending, None
    with tooling.timed(row, 'wait'):
      row |= merge([learner.reduce_reports(report) for report in reports])
    row['timing/step_s'], clock = time.monotonic() - clock, time.monotonic()
    row['timing/tokens_per_s'] = row['timing/tokens'] / row['timing/step_s']
    metrics.write(header('train', step) | row)
    screen.step(step, row)
    at_reference = step == 1 and phase.starts_at_reference
    for warning in sentinels(row, at_reference, student.model.compute_dtype):
      screen.note(f'step {step}: {warning}')
    if samples and (step == 1 or step % config.log.transcripts_every == 0):
      metrics.rollouts({**header('train', step), **sample} for sample in samples)
      screen.transcripts(samples)
    if not row['finite']:
      where = f'{name}-{step}-{jax.process_index()}.npz'
      learner.save_batches(path / 'nonfinite' / where, updates)
      if row['skipped'] >= config.max_skipped:
        raise RuntimeError(f'{row["skipped"]:.0f} steps in a row were not finite: see {path}')

  def save(step):
    flush()
    host = {'index': index, 'step': step, 'data': position, 'evaluated': evaluated, 'best': best}
    host |= {'offsets': metrics.offsets(), 'tokenizer': parts.tokenizer.fingerprint}
    run.store.save(before + step, state, host)

  for step in range(start, section.steps + 1):
    try:
      parts.poll()
      # ---- evaluate: at the start of the run, at the end of a phase, and when due
      last = step == section.steps
      due = section.eval_every and step and step % section.eval_every == 0
      if (last or due or index == step == 0) and not evaluated:
        flush()
        screen.status('evaluating')
        row, samples = run.held_out(phase, state, step, tally)
        best = max(best, row['eval/greedy/accuracy'])
        counts = settle(step)
        row |= {'eval/best': best, **{f'eval/{key}': counts.get(key, 0) for key in FAILURES}}
        metrics.write(header('eval', step) | row)
        metrics.rollouts({**header('eval', step), **sample} for sample in samples)
        screen.evaluation(f'after {name} step {step}', row)
        clock = time.monotonic()
      evaluated = True
      if last:
        break
      # ---- make this step's batches, update, and only then look at the step before
      if step == start:
        screen.status('compiling')
      traced = step + 1 == config.log.profile_step
      if traced:
        flush()
      with trace(path / 'profile' / name) if traced else contextlib.nullcontext():
        updates, describe, position = make(state, step)
        evaluated, reports = False, []
        with tooling.timed(tally, 'update'):
          for batches, denominators in updates:
            state, report = student.update(state, batches, denominators)
            reports.append(report)
        flush()
        with tooling.timed(tally, 'describe'):
          row, samples = describe()
        pending = (step + 1, row | settle(step + 1), reports, updates, samples)
        if traced:
          flush()
    except checkpoint.Stopped:
      save(step)
      raise
    if (step + 1) % config.checkpoint.save_every == 0 or step + 1 == section.steps:
      save(step + 1)

  # ---- the phase's final parameters, outside checkpoint retention; they mark its end
  kept = path / 'phases' / wiring.kept_name(flat, index)
  if section.kind == 'evaluate':  # it has none of its own
    kept.mkdir(parents=True, exist_ok=True)
    return best
  if state.ema is not None:
    checkpoint.save_params(kept.with_name(f'{kept.name}-ema'), state.ema)
  checkpoint.save_params(kept, state.params)
  return best
