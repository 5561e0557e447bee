"""The loop. `run(config, workdir, pool)` reads top to bottom:

1. wire: every name of the config is looked up in its table, once (`wiring` builds and checks);
2. workdir: new, or resumed from its newest checkpoint (position, data, parameters, log offsets);
3. for each phase, for each step: evaluate if due; make this step's batches (from worked solutions,
   or by rolling out the policy and assigning credit); update; log the step before; save if due;
4. at the end of a phase: evaluate, keep its parameters under phases/.

Everything random is a function of the seeds, its purpose and its position, so a run
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

from reasonrl import (
  checkpoint,
  checks,
  display,
  held_out,
  learner,
  logs,
  objective,
  parameters,
  phases,
  postmortem,
  preemption,
  profiling,
  records,
  sentinels,
  sharding,
  tooling,
  wiring,
)
from reasonrl.algorithms import ALGORITHMS
from reasonrl.envs import ENVS
from reasonrl.models import MODELS
from reasonrl.rewards import REWARDS
from reasonrl.steps import STEPS
from reasonrl.tasks import TASKS

TABLES = {
  'task': TASKS,
  'reward': REWARDS,
  'env': ENVS,
  'algorithm': ALGORITHMS,
  'model': MODELS,
}
FAILURES = ('reward_timeouts', 'reward_errors')
COUNTS = (*FAILURES, 'completions')  # by the reward tool
START = {  # of a phase
  **{'step': 0, 'data': 0, 'evaluated': False, 'sentinels': {}},
  **{'dataset': 0, 'datasets': None},  # bytes it has collected; checksums of what it reads
}
# Fields in which a resumed run may differ from the run it continues: they change no result, the
# mesh beyond rounding.
MAY_DIFFER = ('mesh', 'rewarding', 'log', 'sentinels', 'checkpoint', 'compilation_cache')


def run(config, workdir: str, pool, flag: str = '--workdir') -> int:
  """Runs every phase of the config, or goes on where the workdir stopped.

  Args:
    config: a locked ConfigDict, see `configs/common.py`.
    workdir: the run's folder.
    pool: a started `rewarding.Pool`.
    flag: the name that the workdir has on the command line, for the advice to go on.

  Returns:
    0 finished; 143 or 130 stopped by SIGTERM or Ctrl-C, with the last finished step saved.

  Raises:
    UserError: bad input, before the first step.
  """
  # ---- wire: whatever is wrong with the config stops here
  checks.numbers(config)
  if config.compilation_cache and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = str(pathlib.Path(config.compilation_cache).expanduser())
    jax.config.update('jax_compilation_cache_dir', cache)
  stop, leader = preemption.StopSignal(config.checkpoint.grace_s), jax.process_index() == 0
  path = sharding.on_all_processes(lambda: logs.check_workdir(workdir, config, MAY_DIFFER))
  order = phases.order(config, STEPS)
  setup = wiring.wire(config, TABLES, order, path, pool, stop.poll)
  checks.check(setup, order)
  evaluate = held_out.make_evaluate(setup)

  # ---- open the workdir, run
  devices = [str(d) for d in jax.devices()]
  open_it = functools.partial(logs.open_workdir, path, config, devices)
  lock = sharding.on_all_processes(open_it if leader else lambda: None)
  sharding.on_all_processes(lambda: logs.check_opened(path, config, MAY_DIFFER))
  if leader:
    wiring.save_tokenizer(setup.tokenizer, path)
  keep = {'keep_last': config.checkpoint.keep_last, 'keep_every': config.checkpoint.keep_every}
  with (
    stop,
    lock or contextlib.nullcontext(),
    contextlib.closing(checkpoint.Checkpoints(path, **keep)) as store,
    contextlib.closing(logs.Metrics(path, leader)) as metrics,
    display.Display(config.log.every, leader) as screen,
  ):
    built = {p.name: (p.algorithm, p.env) for p in setup.phases.values() if p.algorithm}
    screen.note(objective.explain(config, built))
    try:
      return run_phases(Run(setup, order, evaluate, path, store, metrics, screen))
    except preemption.Stopped as stopped:
      screen.close()  # what a person has to copy comes last, and unbroken
      screen.note(f'{stopped}; the same command with {flag}={path} goes on from here')
      return stopped.code


@dataclasses.dataclass(frozen=True)
class Run:
  """What is open while phases run."""

  setup: wiring.Setup
  order: list[tuple[str, int]]  # (phase, iteration)
  evaluate: Callable  # see `held_out.make_evaluate`
  path: pathlib.Path
  store: checkpoint.Checkpoints
  metrics: logs.Metrics
  screen: display.Display


def run_phases(run: Run) -> int:
  """Finds the newest checkpoint and runs the phases from there; returns 0."""
  setup, order, path, screen = run.setup, run.order, run.path, run.screen
  last = path / 'phases' / phases.kept_name(order, len(order) - 1)
  if sharding.same(int(last.is_dir()), f'whether {last} exists'):
    screen.note(f'{path} is finished')
    return 0

  def abstract_state(saved):
    name, iteration = order[saved['index']]
    phase = setup.phases[name].at(iteration)
    student = phase.learner
    followers = dict.fromkeys(phase.followers, sharding.abstract_params(student.model, setup.mesh))
    return {'policy': student.abstract(), 'followers': followers}

  newest = run.store.newest(abstract_state, screen.note)
  saved = newest[2] if newest else {'index': 0, 'best': 0.0, 'offsets': logs.START}
  run.metrics.truncate(saved['offsets'])
  if newest and saved['tokenizer'] != setup.tokenizer.fingerprint:
    raise records.UserError(f'{path}/tokenizer is not the tokenizer of checkpoint {newest[0]}')
  best = saved['best']
  for index in range(saved['index'], len(order)):
    resume, newest = newest, None
    best = run_phase(run, index, resume, best)
  return 0


def run_phase(run: Run, index: int, resume, best: float) -> float:
  """Phase `index`, from its start or from a checkpoint (step of the run, state, host item).

  Returns the best held-out greedy accuracy so far.
  """
  setup, order, path, metrics, screen = run.setup, run.order, run.path, run.metrics, run.screen
  config, (name, iteration) = setup.config, order[index]
  phase = setup.phases[name].at(iteration)
  section, student, steps = phase.section, phase.learner, phases.steps(phase.section, iteration)
  before = sum(phases.steps(config[n], i) for n, i in order[:index])  # steps of the run
  saved = resume[2] if resume else START
  start, position, evaluated = saved['step'], saved['data'], saved['evaluated']

  # ---- this phase's learner, state and data
  learned, stamps = phases.read_datasets(path, order, index, phase.datasets)
  if saved['datasets'] not in (None, stamps):
    raise records.UserError(f'{path}/datasets has changed since the run stopped in {name}')
  begins = section.init
  for n, (size, _) in stamps.items():
    if not sharding.agree(int(size > 0)):
      screen.note(f'{name} has nothing to learn: {n} kept nothing; the parameters stay as they are')
      steps, begins = 0, 'previous'
  screen.phase(name, section.kind, steps, start)
  screen.status('loading parameters')
  init = functools.partial(parameters.init, setup, order, index, path)
  state = resume[1]['policy'] if resume else student.init(init(section.trains, begins))
  read = dict(resume[1]['followers']) if resume else {}
  for role, source in phase.reads.items():
    if role not in read:
      read[role] = init(source.model, source.init)
  if 'sampler' in phase.followers and 'sampler' not in read:
    read['sampler'] = jax.tree.map(jax.numpy.copy, state.params)  # the state itself is donated
  tally = collections.defaultdict(float)
  dataset = phases.dataset(path, order, index)
  lines = open_dataset(dataset, saved['dataset']) if section.kind == 'collect' else None
  task = phase.task(learned.__getitem__)
  stage = tooling.Stage(setup, phase, task, dataset, (index, iteration), tally)
  make = STEPS[section.kind](stage, position)
  pending, began, seen = None, 0.0, saved['sentinels']
  checksum = sentinels.checksum(state.params) if config.sentinels else None
  dumps, unsettled = postmortem.Dumps(path / 'nonfinite'), None

  def facts(step):
    return sentinels.Facts(
      compute_dtype=student.model.compute_dtype,
      cache_dtype=setup.samplers[section.trains].dtype,
      at_reference=step == 1 and phase.starts_at_reference,
      old_policy=phase.old_policy,
      learning=phases.updates(section) and section.optim.learning_rate > 0,
      reinforcing=section.kind == 'reinforce',
      synced='sampler' not in phase.followers or (step - 1) % section.sampler_sync_steps == 0,
    )

  def header(kind, step):
    where = {'step': before + step, 'phase': name, 'iteration': iteration}
    return where | {'phase_step': step, 'kind': kind}

  def settle(step):
    """Empties the tally: this process's times, and the failed rewards of all."""
    every = sharding.gather(dict(tally))
    row = {key: value for key, value in tally.items() if key.startswith('timing/')}
    row |= {key: sum(t.get(key, 0) for t in every) for key in COUNTS if key in tally}
    for failure in [t['failure'] for t in every if 'failure' in t][:1]:
      screen.note(f'step {step}: a reward failed and counted 0: {failure}')
    tally.clear()
    return row

  def examine():
    """Dumps the last update if it was skipped, while the state still has what it met."""
    nonlocal unsettled
    if unsettled is None:
      return
    (step, u, update, final), unsettled = unsettled, None
    final = sharding.fetch(final)
    if not final['finite']:
      place = {**header('train', step), 'update': u}
      dump, parts = f'{phases.kept_name(order, index)}-{step}-{u}', (student, setup.tokenizer)
      said = dumps.write(dump, place, parts, state.params, update, int(final['skipped']))
      screen.note(f'step {step}: {said}')

  def flush():
    """Fetches and writes what the last dispatched step reported."""
    nonlocal pending, seen
    if pending is None:
      return
    if unsettled is not None and unsettled[0] == pending[0]:
      examine()
    (step, row, reports, sums, samples), pending = pending, None
    with profiling.timed(row, 'wait'):
      found = [learner.reduce_reports(report) for report in reports]
      row |= learner.merge_reports(found) if found else {}  # without an update there is no report
    row.setdefault('timing/step_s', time.monotonic() - began)  # it was flushed in its own iteration
    row['timing/tokens_per_s'] = row['timing/tokens'] / row['timing/step_s']
    warnings = []
    if config.sentinels:
      row |= sentinels.compared(*sharding.fetch(sums))
      fired, warnings, seen = sentinels.watch(seen, row, facts(step), step)
      row |= {'sentinels': fired} if fired else {}
    metrics.write(header('train', step) | row)
    screen.step(step, row)
    for warning in warnings:
      screen.note(warning)
    if samples:
      metrics.rollouts({**header('train', step), **sample} for sample in samples)
      screen.transcripts(samples)
    if row.get('skipped', 0) >= config.max_skipped:
      raise RuntimeError(f'{row["skipped"]:.0f} steps in a row were not finite: see {path}')

  def save(step):
    flush()
    host = {'index': index, 'step': step, 'data': position, 'evaluated': evaluated, 'best': best}
    host |= {'offsets': metrics.offsets(), 'tokenizer': setup.tokenizer.fingerprint}
    host |= {'sentinels': seen, 'dataset': lines.offset() if lines else 0, 'datasets': stamps}
    followers = {role: read[role] for role in phase.followers}
    run.store.save(before + step, {'policy': state, 'followers': followers}, host)

  for step in range(start, steps + 1):
    try:
      setup.poll()
      # ---- evaluate: at the start of the run, at the end of a phase, and when due
      last = step == steps
      every = section.eval_every if phases.updates(section) else 0
      due = every and step and step % every == 0
      changed = last and section.kind != 'collect'
      if (changed or due or index == step == 0) and not evaluated:
        flush()
        screen.status('evaluating')
        row, samples = run.evaluate(stage, state, step, last)
        best = max(best, row['eval/greedy/accuracy'])
        counts = settle(step)
        row |= {'eval/best': best, **{f'eval/{key}': counts.get(key, 0) for key in FAILURES}}
        metrics.write(header('eval', step) | row)
        metrics.rollouts({**header('eval', step), **sample} for sample in samples)
        screen.evaluation(f'after {name} step {step}' if steps else '', row)
      evaluated = True
      if last:
        break
      # ---- make this step's batches, update, and only then look at the step before
      began = time.monotonic()
      if step == start:
        screen.status('first step (compiles)')
      traced = step + 1 == config.log.profile_step
      if traced:
        flush()
      with profiling.trace(path / 'profile' / name) if traced else contextlib.nullcontext():
        given = checksum  # of what the sampler should get
        if config.sentinels and 'sampler' in read:
          given = sentinels.checksum(read['sampler'])
        made = make(state, read, step)
        position, evaluated, reports = made.position, False, []
        for example in made.kept if lines else ():
          lines.write(example)
        with profiling.timed(tally, 'update'):
          for u, update in enumerate(made.updates):
            grads, loss, report = student.gradients(state.params, *update)
            examine()  # the update before is done by now, while this one's gradients are under way
            state, final = student.apply(state, grads, loss)
            reports.append((report, final))
            unsettled = step + 1, u, update, final
        for role, (every, share) in phase.followers.items():
          if (step + 1) % every == 0:
            read[role] = parameters.follow(read[role], state.params, share)
        sums = (given, tally.pop('sampled_with', []), checksum)
        if config.sentinels:
          checksum = sentinels.checksum(state.params)
        flush()
        with profiling.timed(tally, 'describe'):
          row = made.describe()
          shown = step == 0 or (step + 1) % config.log.transcripts_every == 0
          samples = made.transcripts() if shown else []
        pending = (step + 1, row | settle(step + 1), reports, (*sums, checksum), samples)
        if traced:
          flush()
    except preemption.Stopped:
      save(step)
      raise
    if (step + 1) % config.checkpoint.save_every == 0 or step + 1 == steps:
      save(step + 1)
    if pending:
      pending[1]['timing/step_s'] = time.monotonic() - began

  if section.kind == 'collect':
    rows = logs.read_rows(dataset)
    hinted = sum(row['hinted'] for row in rows)
    screen.note(f'{name} kept {len(rows)} completions, {hinted} with a hint: {dataset}')

  # ---- the phase's final parameters, outside checkpoint retention; they mark its end
  kept = path / 'phases' / phases.kept_name(order, index)
  if not phases.updates(section):  # it has none of its own
    kept.mkdir(parents=True, exist_ok=True)
    return best
  if state.ema is not None:
    checkpoint.save_params(kept.with_name(f'{kept.name}-ema'), state.ema)
  checkpoint.save_params(kept, state.params)
  return best


def open_dataset(path: pathlib.Path, offset: int) -> logs.Lines | None:
  """The file of a phase that collects, cut back to `offset`; open on the first process alone."""

  def cut_back():
    lines = logs.Lines(path)
    lines.truncate(offset)
    return lines

  return sharding.on_all_processes(cut_back if jax.process_index() == 0 else lambda: None)
