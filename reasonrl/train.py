"""THE loop. `run(config, workdir, pool)` reads top to bottom:

1. wire: look every name of the config up in its table, once, and build the parts;
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
import os
import pathlib
import time

import jax
import numpy as np

from reasonrl import (
  checkpoint,
  data,
  evaluation,
  learner,
  logs,
  optim,
  prompts,
  records,
  sampling,
  sharding,
  tokenizers,
  types,
)
from reasonrl.algorithms import ALGORITHMS
from reasonrl.envs import ENVS
from reasonrl.models import MODELS, gguf
from reasonrl.rewards import REWARDS
from reasonrl.tasks import TASKS

LOSSES = {'nll': learner.nll}
# Fields in which a resumed run may differ from the run it continues: they change no result.
MAY_DIFFER = ('mesh', 'rewarding', 'log', 'checkpoint', 'compilation_cache')


# ------------------------------------------------------------------------------------ wiring


@dataclasses.dataclass(frozen=True)
class Parts:
  """What the config names, built."""

  config: object
  mesh: object
  task: object
  tokenizer: object
  prompter: prompts.Prompter
  model: object
  sampler: sampling.Sampler
  rewards: dict
  pool: object
  poll: object


def lookup(table: dict, name: str, what: str):
  """table[name]; an unknown name lists the choices."""
  if name not in table:
    raise records.UserError(f'{what}={name!r} is not one of {", ".join(sorted(table))}')
  return table[name]


def build(cls, section, *without: str):
  """cls(**section), leaving out the fields that are not the member's own ('name', ...)."""
  fields = {k: v for k, v in section.to_dict().items() if k not in without}
  known = {f.name for f in dataclasses.fields(cls)}
  if fields.keys() != known:
    wrong = ', '.join(sorted(fields.keys() ^ known))
    raise records.UserError(f'{cls.__name__} takes {sorted(known)}; unknown or missing: {wrong}')
  return cls(**fields)


def wire(config, tokenizer, pool, poll) -> Parts:
  """Every table lookup of the run. Bad names and values stop here, before anything is computed."""
  mesh = sharding.make_mesh(**config.mesh)
  task = build(lookup(TASKS, config.task.name, 'task.name'), config.task, 'name')
  prompter = prompts.Prompter(**config.prompt)
  for name in config.models:
    lookup(MODELS, config.models[name].kind, f'models.{name}.kind')
  section = config.models.policy.copy_and_resolve_references()
  section.vocab_size = section.vocab_size or tokenizer.vocab_size
  model = build(MODELS[section.kind], section, 'kind', 'weights')
  if tokenizer.vocab_size > model.vocab_size:
    raise records.UserError(
      f'models.policy.vocab_size={model.vocab_size} is smaller than the tokenizer, '
      f'{tokenizer.vocab_size} tokens'
    )
  forbidden = set(tokenizer.control_ids) - set(tokenizer.eos_ids)
  forbidden |= set(range(tokenizer.vocab_size, model.vocab_size))
  rewards = {
    name: (build(lookup(REWARDS, name, 'rewards'), fields, 'weight'), fields.weight)
    for name, fields in config.rewards.items()
  }
  if config.evaluation.correct not in rewards:
    raise records.UserError(
      f'evaluation.correct={config.evaluation.correct!r} is not one of the rewards: '
      f'{", ".join(sorted(rewards))}'
    )
  sampler = sampling.Sampler(model, mesh, tuple(sorted(forbidden)))
  return Parts(
    config, mesh, task, tokenizer, prompter, model, sampler, rewards, pool, poll
  )


def positions(config) -> list[tuple[str, int]]:
  """config.phases flattened to (name, iteration); a loop is a tuple ending in its repetitions."""
  flat = []
  for entry in config.phases:
    names, times = ((entry,), 1) if isinstance(entry, str) else (entry[:-1], entry[-1])
    flat += [(name, iteration) for iteration in range(times) for name in names]
  for name, _ in flat:
    if name not in config or not hasattr(config[name], 'kind'):
      sections = [k for k, v in config.items() if hasattr(v, 'kind')]
      raise records.UserError(f'phase {name!r} is not one of the sections {", ".join(sections)}')
    if config[name].kind not in STEPS:
      raise records.UserError(f'{name}.kind={config[name].kind!r} is not one of {tuple(STEPS)}')
  return flat


def make_tokenizer(config, workdir: pathlib.Path):
  """The workdir's tokenizer; made from the config (and the task's corpus) on the first start."""
  saved = workdir / 'tokenizer'
  if not saved.exists():
    cfg = config.tokenizer
    task = build(lookup(TASKS, config.task.name, 'task.name'), config.task, 'name')
    examples = (task.example('train', i) for i in range(cfg.corpus_examples))
    texts = (text for e in examples for text in (e.problem, e.solution or ''))
    tokenizer = tokenizers.build(
      cfg.kind, cfg.path, cfg.vocab_size, cfg.model_type, cfg.byte_fallback, texts, task.symbols
    )
    if jax.process_index() == 0:  # a kill leaves the whole folder or none
      tokenizer.save(saved.with_suffix('.tmp'))
      saved.with_suffix('.tmp').rename(saved)
    return tokenizer
  return tokenizers.load(saved)


def make_tools(parts: Parts, examples, purpose: str, place, scorer, tally) -> types.Tools:
  """The tools of an environment; `place` is (phase, iteration), part of every random key."""

  def generate(params, requests, spec, slots):
    start = time.monotonic()
    out = parts.sampler.generate(params, requests, spec, slots, parts.poll)
    tally['timing/sample_s'] += time.monotonic() - start
    return out

  def reward(examples, completions, groups):
    start = time.monotonic()
    out = parts.pool.score(parts.rewards, examples, completions, groups)
    tally['timing/reward_s'] += time.monotonic() - start
    tally['reward_timeouts'] += out.timeouts
    tally['reward_errors'] += out.errors
    parts.poll()
    return out

  def row_keys(step, prompt_R, sample_R, thread_R):
    return sampling.row_keys(
      parts.config.seed, purpose, *place, step, prompt_R, sample_R, thread_R
    )

  return types.Tools(
    tokenizer=parts.tokenizer,
    prefill=parts.prompter.prefill,
    examples=examples,
    render=lambda example: parts.prompter.render(parts.tokenizer, example),
    row_keys=row_keys,
    generate=generate,
    score=scorer,
    reward=reward,
  )


def start_params(parts: Parts):
  """The policy's own start: the weights its config names, or random ones; placed on the mesh."""
  target = abstract_params(parts)
  weights = parts.config.models.policy.weights
  if not weights:
    key = jax.random.key(parts.config.seed, impl='threefry2x32')
    return jax.jit(parts.model.init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(key)
  found, params = gguf.read(weights)
  for name, value in found.items():
    if getattr(parts.model, name) != value:
      raise records.UserError(
        f'models.policy.{name}={getattr(parts.model, name)}, but {weights!r} has {value}'
      )
  return jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), params, target)


def abstract_params(parts: Parts):
  """Shapes, dtypes and shardings of the policy's parameters."""
  shapes = jax.eval_shape(parts.model.init, jax.random.key(0))
  return sharding.abstract(shapes, parts.model.sharding_rules, parts.mesh)


def init_params(parts: Parts, source: str, flat, index: int, workdir: pathlib.Path):
  """Parameters from `source`, as phase `index` sees it.

  'previous' is where the phase before ended, for the first phase the same as 'scratch': the
  model's own start. The name of a phase means its latest run; anything else is a path.
  """
  if source == 'previous':
    source = flat[index - 1][0] if index else 'scratch'
  if source == 'scratch':
    return start_params(parts)
  runs = [i for i in range(index) if flat[i][0] == source]
  folder = workdir / 'phases' / kept_name(flat, runs[-1]) if runs else pathlib.Path(source)
  return checkpoint.load_params(folder, abstract_params(parts))


def kept_name(flat, index: int) -> str:
  """The folder under phases/ of a phase's final parameters: 'rl', or 'sft-3' inside a loop."""
  name, iteration = flat[index]
  return name if [n for n, _ in flat].count(name) == 1 else f'{name}-{iteration}'


def check_section(config, name: str) -> None:
  """Refuses what cannot train, before the first step of the first phase."""
  section, earlier = config[name], {n for n, _ in positions(config)}
  if section.trains not in config.models:
    raise records.UserError(
      f'{name}.trains={section.trains!r} is not one of the models {", ".join(config.models)}'
    )
  named = section.init in {'previous', 'scratch', *earlier}
  if not named and not pathlib.Path(section.init).is_dir():
    raise records.UserError(
      f"{name}.init={section.init!r} is not 'previous', 'scratch', a phase "
      f'({", ".join(sorted(earlier))}) or a folder of parameters'
    )
  if section.kind == 'supervised':
    lookup(LOSSES, section.loss, f'{name}.loss')
  if section.kind == 'reinforce':
    algorithm = build(
      lookup(ALGORITHMS, section.algorithm.name, f'{name}.algorithm.name'), section.algorithm,
      'name'
    )
    env = build(lookup(ENVS, section.env.name, f'{name}.env.name'), section.env, 'name')
    algorithm.check(env.num_generations)
    if env.temperature <= 0 or env.top_k or env.top_p < 1:
      raise records.UserError(
        f'{name}.env: temperature={env.temperature} top_k={env.top_k} top_p={env.top_p}: training '
        'needs temperature > 0 and the whole distribution (top_k 0, top_p 1), else the trained '
        'log-probabilities are not those that were sampled from'
      )


def check_sizes(parts: Parts, name: str) -> None:
  """Refuses what does not fit the model, the mesh or a packed row, before the first step."""
  section, room = parts.config[name], parts.prompter.max_length
  make_learner(parts, section)  # the optimizer's rules must cover every parameter
  envs = {'evaluation.env': parts.config.evaluation.env}
  if section.kind == 'reinforce':
    envs[f'{name}.env'] = section.env
    need = room + section.env.max_completion_length
    if need > section.row_length:
      raise records.UserError(
        f'{name}.row_length={section.row_length} is shorter than prompt.max_length={room} plus '
        f'max_completion_length={section.env.max_completion_length}'
      )
  for what, env in envs.items():
    window = types.padded(room) + env.max_completion_length
    if window > parts.model.max_position:
      raise records.UserError(
        f'prompt.max_length={room} (padded to {types.padded(room)}) plus '
        f'{what}.max_completion_length={env.max_completion_length} is more than the '
        f'{parts.model.max_position} positions of the model'
      )
  if section.kind != 'evaluate' and section.rows_per_batch % sharding.row_multiple(parts.mesh):
    raise records.UserError(
      f'{name}.rows_per_batch={section.rows_per_batch} does not divide over data x fsdp = '
      f'{sharding.row_multiple(parts.mesh)} devices'
    )


# ------------------------------------------------------------------------------------ steps
# `STEPS[kind](parts, section, student, place, position, tally, params_of)` returns a function
# (state, step) -> updates [(micro-batches, denominators)], metrics, transcripts, data position.


def supervised_steps(parts: Parts, section, student, place, position, tally, params_of):
  """Packed rows of worked solutions: one optimizer step each."""
  del student, place, tally, params_of
  stream = data.Stream(parts.task, 'train', section.examples_per_step, position)

  def make(state, step):
    del state, step
    render = lambda example: parts.prompter.render(parts.tokenizer, example)  # noqa: E731
    seqs = [
      data.supervised_sequence(parts.tokenizer, render(example), example, section.row_length)
      for example in augmented(parts, stream.next())
    ]
    trained = sharding.total(float(sum(seq.index_N.size for seq in seqs)))
    row = {'timing/tokens': sum(seq.tokens_L.size for seq in seqs)}
    return [(pack(parts, section, seqs)[0], (trained,))], row, [], stream.position

  return make


def reinforce_steps(parts: Parts, section, student, place, position, tally, params_of):
  """Roll out, score, keep, assign credit: one or several optimizer steps on one experience."""
  env = build(ENVS[section.env.name], section.env, 'name')
  algorithm = build(ALGORITHMS[section.algorithm.name], section.algorithm, 'name')
  stream = data.Stream(parts.task, 'train', env.prompts_per_step, position)
  wanted = env.prompts_per_step // jax.process_count()
  frozen = {'ref': params_of(section.ref_init)} if 'ref_logp' in algorithm.needs else {}

  def score(params, experience):
    aux = {'weight': experience.mask_BT}
    seqs = learner.sequences(experience.tokens_BT, experience.length_B, aux)
    batches, where = pack(parts, section, seqs)
    batches = [sharding.put_rows(batch, parts.mesh) for batch in batches]
    logps = [sharding.fetch_rows(student.score(params, batch).logp) for batch in batches]
    return learner.unpack(logps, seqs, where, experience.tokens_BT.shape)

  examples = lambda: augmented(parts, stream.next())  # noqa: E731
  tools = make_tools(parts, examples, 'train', place, score, tally)

  def make(state, step):
    named = {'params': state.params, 'version': step, **frozen}
    kept, groups = [], 0
    for _ in range(section.max_generation_batches):
      found = env.rollout(tools, named, step)
      good = np.unique(found.group_B)[algorithm.keep(found)]
      kept.append(types.take_groups(found, good))
      groups += good.size
      if -sharding.agree(-groups) >= wanted:
        break
    experience = types.concatenate(kept) if len(kept) > 1 else kept[0]
    sources = {'old_logp': 'params', 'ref_logp': 'ref'}
    scores = {
      name: tools.score(named[source], experience)
      for name, source in sources.items()
      if name in algorithm.needs
    }
    experience = dataclasses.replace(experience, scores=scores)
    adv_BT = algorithm.advantages(experience)

    updates, rows = [], experience.length_B.size
    for iteration in range(algorithm.num_iterations):
      order = np.random.default_rng((parts.config.seed, *place, step, iteration)).permutation(rows)
      for members in np.array_split(order, algorithm.num_minibatches):
        part = types.take_rows(experience, members)
        weight_BT, denominator = algorithm.weights(part)
        aux_BT = {'weight': weight_BT, 'adv': adv_BT[members], 'sampler_logp': part.logp_BT}
        seqs = learner.sequences(part.tokens_BT, part.length_B, aux_BT | part.scores)
        updates.append((pack(parts, section, seqs)[0], (sharding.total(denominator),)))
    row = evaluation.summary(experience, parts.tokenizer, parts.prompter.prefill)
    row['timing/tokens'] = int(experience.length_B.sum())
    samples = evaluation.transcripts(experience, adv_BT, parts.config.log.transcripts)
    return updates, row, samples, stream.position

  return make


def no_steps(parts: Parts, section, student, place, position, tally, params_of):
  """A phase that only evaluates."""
  del parts, section, student, place, position, tally, params_of


STEPS = {'supervised': supervised_steps, 'reinforce': reinforce_steps, 'evaluate': no_steps}


def augmented(parts: Parts, examples):
  """Examples as prompt, reward and transcript will see them."""
  return [parts.prompter.augment(parts.config.seed, example) for example in examples]


def pack(parts: Parts, section, seqs):
  """`learner.pack` with this section's shape on this mesh."""
  rows = section.rows_per_batch // jax.process_count()
  return learner.pack(seqs, section.row_length, rows, parts.mesh.shape['tensor'])


def make_learner(parts: Parts, section) -> learner.Learner:
  """The learner of a phase: its loss terms, optimizer and score form."""
  temperature, terms, steps = 1.0, (), max(section.steps, 1)
  if section.kind == 'supervised':
    terms = (learner.Term('lm', LOSSES[section.loss], None),)
  if section.kind == 'reinforce':
    algorithm = build(ALGORITHMS[section.algorithm.name], section.algorithm, 'name')
    prepare = algorithm.prepare if 'prepare' in algorithm.needs else None
    terms = (learner.Term('lm', algorithm.token_loss, prepare),)
    temperature = section.env.temperature
    steps *= algorithm.num_iterations * algorithm.num_minibatches
  cfg = build(optim.Optim, section.optim)
  return learner.Learner(
    model=parts.model,
    mesh=parts.mesh,
    tx=optim.build(cfg, abstract_params(parts), steps),
    ema_decay=cfg.ema_decay,
    terms=terms,
    form=parts.sampler.form(temperature),
    forbidden=parts.sampler.forbidden,
    loss_chunk=parts.config.loss_chunk,
  )


def make_held_out(parts: Parts):
  """(params, version, tally) -> metrics and transcripts on the first test examples."""
  cfg = parts.config.evaluation
  settings = build(evaluation.Evaluation, cfg, 'env')
  env = build(lookup(ENVS, cfg.env.name, 'evaluation.env.name'), cfg.env, 'name')
  mine = range(jax.process_index(), settings.num_examples, jax.process_count())
  examples = augmented(parts, [parts.task.example('test', i) for i in mine])
  for example in examples:  # a prompt that does not fit stops the run now, not in an hour
    parts.prompter.render(parts.tokenizer, example)

  def held_out(params, version, tally):
    tools = make_tools(parts, lambda: examples, 'eval', (0, 0), None, tally)
    named = {'params': params, 'version': version}
    metrics, found = evaluation.evaluate(settings, env, tools, named)
    shown = [
      {'mode': mode, **sample}
      for mode, experience in found.items()
      for sample in evaluation.transcripts(experience, None, parts.config.log.transcripts)
    ]
    return metrics, shown

  return held_out


# ------------------------------------------------------------------------------------ sentinels

# Largest |log pi_trainer - log pi_sampler| seen without a bug: float32 rounding, and for bfloat16
# what SmolLM2-135M showed over 60 GRPO steps (experiments/r1_zero_smollm2).
MISMATCH = {'float32': 1e-4, 'bfloat16': 1.0}
STEP0_KL = 1e-5  # float32, before the first update: policy and reference are the same parameters


def merge(reports: list[dict]) -> dict:
  """One row from the reports of a step's updates: means, maxima; the mismatch of the first alone.

  Only the first update meets the parameters that sampled.
  """
  out = {}
  for name in reports[0]:
    values = [report[name] for report in reports]
    if name.startswith('mismatch'):
      out[name] = values[0]
    elif name == 'finite':
      out[name] = min(values)
    elif name.endswith('_max') or name == 'skipped':
      out[name] = max(values)
    else:
      out[name] = sum(values) / len(values)
  return out


def sentinels(row: dict, first_step: bool, compute_dtype: str) -> list[str]:
  """What must never be seen while training. Empty when all is well."""
  found = []
  if row.get('mismatch/max', 0.0) > MISMATCH[compute_dtype]:
    found.append(
      f'sampler and trainer log-probabilities differ by {row["mismatch/max"]:.1e} '
      f'(limit {MISMATCH[compute_dtype]:.0e}): the parameters did not reach the sampler, '
      'or the two score different distributions'
    )
  if first_step and compute_dtype == 'float32' and row.get('kl', 0.0) > STEP0_KL:
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
  # ---- check, wire
  flat = positions(config)
  for name, _ in flat:
    check_section(config, name)
  if config.compilation_cache and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = str(pathlib.Path(config.compilation_cache).expanduser())
    jax.config.update('jax_compilation_cache_dir', cache)
  leader = jax.process_index() == 0
  devices = [str(d) for d in jax.devices()]
  path = logs.open_workdir(workdir, config, devices, MAY_DIFFER, leader)
  keep = {'keep_last': config.checkpoint.keep_last, 'keep_every': config.checkpoint.keep_every}
  with (
    checkpoint.StopSignal(config.checkpoint.grace_s) as stop,
    contextlib.closing(checkpoint.Checkpoints(path, **keep)) as store,
    contextlib.closing(logs.Metrics(path, leader)) as metrics,
    logs.Display(config.log.every, leader) as display,
  ):
    parts = wire(config, make_tokenizer(config, path), pool, stop.poll)
    for name, _ in flat:
      check_sizes(parts, name)
    try:
      return run_phases(parts, flat, path, store, metrics, display)
    except checkpoint.Stopped as stopped:
      display.note(f'{stopped}; the same command goes on from here')
      return stopped.code


def run_phases(parts: Parts, flat, path, store, metrics, display) -> int:
  """Finds the newest checkpoint and runs the phases from there; returns 0."""
  if (path / 'phases' / kept_name(flat, len(flat) - 1)).is_dir():
    display.note(f'{path} is finished')
    return 0
  newest = store.latest()
  at = newest[1] if newest else {'index': 0, 'best': 0.0, 'offsets': logs.START}
  metrics.truncate(at['offsets'])
  if newest and at['tokenizer'] != parts.tokenizer.fingerprint:
    raise records.UserError(f'{path}/tokenizer is not the tokenizer of checkpoint {newest[0]}')
  held_out, best = make_held_out(parts), at['best']
  for index in range(at['index'], len(flat)):
    resume = newest if newest and index == at['index'] else None
    best = run_phase(parts, flat, index, resume, best, held_out, path, store, metrics, display)
  return 0


def run_phase(
  parts: Parts, flat, index, resume, best, held_out, path, store, metrics, display
) -> float:
  """One phase, from its start or from a checkpoint `resume` = (step of the run, host item).

  Returns the best held-out greedy accuracy so far.
  """
  config, (name, iteration) = parts.config, flat[index]
  section = config[name]
  before = sum(config[n].steps for n, _ in flat[:index])  # steps of the run before this phase
  at = resume[1] if resume else {'step': 0, 'data': 0, 'evaluated': False}
  start, position, evaluated = at['step'], at['data'], at['evaluated']

  # ---- this phase's learner, state and data
  display.phase(name, section.kind, section.steps, start)
  display.status('loading parameters')
  student = make_learner(parts, section)
  params_of = lambda source: init_params(parts, source, flat, index, path)  # noqa: E731
  state = (
    store.restore(resume[0], student.abstract())
    if resume
    else student.init(params_of(section.init))
  )
  tally = collections.defaultdict(float)  # times and counts of the step under way
  place = (index, iteration)
  make = STEPS[section.kind](parts, section, student, place, position, tally, params_of)
  pending, clock = None, time.monotonic()

  def header(kind, step):
    where = {'step': before + step, 'phase': name, 'iteration': iteration}
    return where | {'phase_step': step, 'kind': kind}

  def flush():
    """Fetches and writes what the last dispatched step reported."""
    nonlocal pending, clock
    if pending is None:
      return
    (step, row, reports, updates, samples), pending = pending, None
    row |= merge([learner.reduce_reports(report) for report in reports])
    row['timing/step_s'], clock = time.monotonic() - clock, time.monotonic()
    row['timing/tokens_per_s'] = row['timing/tokens'] / row['timing/step_s']
    metrics.write(header('train', step) | row)
    display.step(step, row)
    for warning in sentinels(row, step == 1, parts.model.compute_dtype):
      display.note(f'step {step}: {warning}')
    if samples and (step == 1 or step % config.log.transcripts_every == 0):
      metrics.rollouts({**header('train', step), **sample} for sample in samples)
      display.transcripts(samples)
    if not row['finite']:
      learner.save_batches(path / 'nonfinite' / f'{name}-{step}.npz', updates)
      if row['skipped'] >= config.max_skipped:
        raise RuntimeError(f'{row["skipped"]:.0f} steps in a row were not finite: see {path}')

  def save(step):
    flush()
    host = {'index': index, 'step': step, 'data': position, 'evaluated': evaluated, 'best': best}
    host |= {'offsets': metrics.offsets(), 'tokenizer': parts.tokenizer.fingerprint}
    store.save(before + step, state, host)

  for step in range(start, section.steps + 1):
    try:
      parts.poll()
      # ---- evaluate: at the start of the run, at the end of a phase, and when due
      last = step == section.steps
      due = section.eval_every and step and step % section.eval_every == 0
      if (last or due or index == step == 0) and not evaluated:
        flush()
        display.status('evaluating')
        row, samples = held_out(state.params, step, tally)
        best = max(best, row['eval/greedy/accuracy'])
        metrics.write(header('eval', step) | row | {'eval/best': best})
        metrics.rollouts({**header('eval', step), **sample} for sample in samples)
        display.evaluation(f'after {name} step {step}', row)
        tally.clear()
        clock = time.monotonic()
      evaluated = True
      if last:
        break
      # ---- make this step's batches, update, and only then look at the step before
      if step == start:
        display.status('compiling')
      updates, row, samples, position = make(state, step)
      row |= tally
      tally.clear()
      evaluated, reports = False, []
      for batches, denominators in updates:
        state, report = student.update(state, batches, denominators)
        reports.append(report)
      flush()
      pending = (step + 1, row, reports, updates, samples)
    except checkpoint.Stopped:
      save(step)
      raise
    if (step + 1) % config.checkpoint.save_every == 0 or step + 1 == section.steps:
      save(step + 1)

  # ---- the phase's final parameters, outside checkpoint retention
  checkpoint.save_params(path / 'phases' / kept_name(flat, index), state.params)
  return best
