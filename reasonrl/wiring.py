"""From a config to the parts of a run: every member built and checked before the first step.

`train` reads the tables and hands them in; nothing here knows a member by name. Bad names and
values stop here with one line. What needs many of the parts at once is built here too: the tools of
an environment, the learner of a phase, the parameters that a phase starts from.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from reasonrl import (
  checkpoint,
  data,
  evaluation,
  learner,
  optim,
  prompts,
  records,
  sampling,
  sharding,
  tokenizers,
  types,
)
from reasonrl.models import gguf, huggingface

LOSSES = {'nll': learner.nll}


@dataclasses.dataclass(frozen=True)
class Parts:
  """What the config names, built."""

  config: Any
  mesh: Any
  task: Any
  tokenizer: Any
  prompter: prompts.Prompter
  models: dict[str, Any]
  samplers: dict[str, sampling.Sampler]
  rewards: dict[str, tuple[Any, float]]  # name -> function, weight
  phases: dict[str, Phase]
  evaluation: evaluation.Evaluation
  evaluation_env: Any
  pool: Any
  poll: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Phase:
  """One section of the config that `phases` names. env and algorithm: of a reinforce phase."""

  name: str
  section: Any
  env: Any
  algorithm: Any
  learner: learner.Learner
  starts_at_reference: bool  # before its first update the policy is the frozen reference


def lookup(table: dict, name: str, what: str):
  """table[name]; an unknown name lists the choices."""
  if name not in table:
    raise records.UserError(f'{what}={name!r} is not one of {", ".join(sorted(table))}')
  return table[name]


def build(cls, section, *without: str, **built):
  """cls(**section), leaving out the fields that are not the member's own ('name', ...).

  `built` replaces fields of the section.
  """
  fields = {k: v for k, v in section.to_dict().items() if k not in without} | built
  known = {f.name for f in dataclasses.fields(cls)}
  if fields.keys() != known:
    wrong = ', '.join(sorted(fields.keys() ^ known))
    raise records.UserError(f'{cls.__name__} takes {sorted(known)}; unknown or missing: {wrong}')
  return cls(**fields)


def member(table: dict, section, what: str):
  """The member of `table` that section.name names, with the section's other fields."""
  return build(lookup(table, section.name, f'{what}.name'), section, 'name')


def make_task(table: dict, section, what: str):
  """The task of a section. Where that has `members`, each is a weight and a task section."""
  built = {}
  if 'members' in section:
    built['members'] = {
      name: (entry.weight, make_task(table, entry.task, f'{what}.members.{name}.task'))
      for name, entry in section.members.items()
    }
  return build(lookup(table, section.name, f'{what}.name'), section, 'name', **built)


def phase_sections(config) -> dict[str, Any]:
  """The sections of a config that `phases` may name."""
  return {k: v for k, v in config.items() if hasattr(v, 'kind') and hasattr(v, 'trains')}


def positions(config, kinds) -> list[tuple[str, int]]:
  """config.phases flattened to (name, iteration); a loop is a tuple ending in its repetitions."""
  flat = []
  for entry in config.phases:
    if not isinstance(entry, str) and not isinstance(entry[-1], int):
      raise records.UserError(f'the loop of phases {entry} must end in how often it is repeated')
    names, times = ((entry,), 1) if isinstance(entry, str) else (entry[:-1], entry[-1])
    flat += [(name, iteration) for iteration in range(times) for name in names]
  sections = phase_sections(config)
  for name, _ in flat:
    lookup(sections, name, 'phases')
    lookup(kinds, config[name].kind, f'{name}.kind')
  if not flat:
    raise records.UserError(f'phases is empty: it names sections, of {", ".join(sections)}')
  return flat


def kept_name(flat, index: int) -> str:
  """The folder under phases/ of a phase's final parameters: 'rl', or 'sft-3' inside a loop."""
  names = [name for name, _ in flat]
  name = names[index]
  return name if names.count(name) == 1 else f'{name}-{names[:index].count(name)}'


def wire(config, tables: dict, flat, workdir: pathlib.Path, pool, poll) -> Parts:
  """Builds and checks everything. `tables`: 'task', 'reward', 'env', ... -> dict of members."""
  mesh = sharding.make_mesh(**config.mesh)
  task = make_task(tables['task'], config.task, 'task')
  augmentations = tuple(
    lookup(prompts.AUGMENTATIONS, name, 'prompt.augmentations')
    for name in config.prompt.augmentations
  )
  prompter = prompts.Prompter(**{**config.prompt, 'augmentations': augmentations})
  rewards = {
    name: (build(lookup(tables['reward'], name, 'rewards'), fields, 'weight'), fields.weight)
    for name, fields in config.rewards.items()
  }
  lookup(rewards, config.evaluation.correct, 'evaluation.correct')
  check_rewards(task, rewards)
  for name in config.models:
    lookup(tables['model'], config.models[name].kind, f'models.{name}.kind')
  tokenizer = make_tokenizer(config, task, workdir)
  models, samplers = {}, {}
  for name, fields in config.models.items():
    models[name] = make_model(tables['model'], fields, tokenizer)
    if tokenizer.vocab_size > models[name].vocab_size:
      raise records.UserError(
        f'models.{name}.vocab_size={models[name].vocab_size} is smaller than the tokenizer, '
        f'{tokenizer.vocab_size} tokens'
      )
    # Never sampled: marks other than EOS, and rows of the head that stand for no token.
    forbidden = set(tokenizer.control_ids) - set(tokenizer.eos_ids)
    forbidden |= set(range(tokenizer.vocab_size, models[name].vocab_size))
    samplers[name] = sampling.Sampler(models[name], mesh, tuple(sorted(forbidden)))
  parts = Parts(
    config=config,
    mesh=mesh,
    task=task,
    tokenizer=tokenizer,
    prompter=prompter,
    models=models,
    samplers=samplers,
    rewards=rewards,
    phases={},
    evaluation=build(evaluation.Evaluation, config.evaluation, 'env'),
    evaluation_env=member(tables['env'], config.evaluation.env, 'evaluation.env'),
    pool=pool,
    poll=poll,
  )
  for name in dict.fromkeys(name for name, _ in flat):
    parts.phases[name] = make_phase(parts, tables, flat, name)
  return parts


def make_model(table: dict, fields, tokenizer):
  """A network from a section of `config.models`; vocab_size 0 is the tokenizer's."""
  section = fields.copy_and_resolve_references()
  section.vocab_size = section.vocab_size or tokenizer.vocab_size
  return build(table[fields.kind], section, 'kind', 'weights')


def make_tokenizer(config, task, workdir: pathlib.Path):
  """The workdir's tokenizer, or on the first start the one that the config asks for."""
  if (workdir / 'tokenizer').exists():
    return tokenizers.load(workdir / 'tokenizer')
  cfg = config.tokenizer
  examples = (task.example('train', i) for i in range(cfg.corpus_examples))
  texts = (text for e in examples for text in (e.problem, e.solution or ''))
  return tokenizers.build(
    cfg.kind, cfg.path, cfg.vocab_size, cfg.model_type, cfg.byte_fallback, texts, task.symbols
  )


def save_tokenizer(tokenizer, workdir: pathlib.Path) -> None:
  """Keeps it in the workdir; a kill leaves the whole folder or none."""
  saved = workdir / 'tokenizer'
  if not saved.exists():
    tokenizer.save(saved.with_suffix('.tmp'))
    saved.with_suffix('.tmp').rename(saved)


# ------------------------------------------------------------------------------------ phases


def make_phase(parts: Parts, tables: dict, flat, name: str) -> Phase:
  """Builds a phase and refuses what cannot run."""
  section, mesh = parts.config[name], parts.mesh
  lookup(parts.models, section.trains, f'{name}.trains')
  check_source(parts.config, flat, name, section.init, f'{name}.init')
  env = algorithm = prepare = None
  starts_at_reference = False
  if section.kind != 'evaluate' and parts.models[section.trains].param_dtype != 'float32':
    raise records.UserError(
      f'{name} trains models.{section.trains}.param_dtype='
      f'{parts.models[section.trains].param_dtype!r}: small updates would round away; train '
      "float32 parameters (compute_dtype may be 'bfloat16')"
    )
  temperature, terms, steps = 1.0, (), max(section.steps, 1)
  if section.kind == 'supervised':
    terms = (learner.Term('lm', lookup(LOSSES, section.loss, f'{name}.loss'), None),)
  if section.kind == 'reinforce':
    env = member(tables['env'], section.env, f'{name}.env')
    algorithm = member(tables['algorithm'], section.algorithm, f'{name}.algorithm')
    algorithm.check(env.num_generations)
    for role, source in section.reads.items():
      lookup(parts.models, source.model, f'{name}.reads.{role}.model')
      check_source(parts.config, flat, name, source.init, f'{name}.reads.{role}.init')
    ref = section.reads.ref
    if parts.models[ref.model] != parts.models[section.trains]:
      raise records.UserError(
        f'{name}.reads.ref.model={ref.model!r} differs in shape from trains={section.trains!r}'
      )
    starts_at_reference = (ref.model, ref.init) == (section.trains, section.init)
    unknown = algorithm.needs - {'old_logp', 'ref_logp', 'prepare'}
    if unknown:
      raise records.UserError(f'{name}.algorithm needs {sorted(unknown)}, which nothing provides')
    if 'prepare' in algorithm.needs:
      prepare = algorithm.prepare
    terms, temperature = (learner.Term('lm', algorithm.token_loss, prepare),), env.temperature
    steps *= algorithm.num_iterations * algorithm.num_minibatches
    rollouts = section.prompts_per_step * env.num_generations
    if algorithm.num_minibatches > rollouts:
      raise records.UserError(
        f'{name}.algorithm.num_minibatches={algorithm.num_minibatches} is more than the '
        f'{rollouts} rollouts of a step'
      )
    if env.temperature <= 0 or env.top_k or env.top_p < 1:
      raise records.UserError(
        f'{name}.env: temperature={env.temperature} top_k={env.top_k} top_p={env.top_p}: training '
        'needs temperature > 0 and the whole distribution (top_k 0, top_p 1), else the trained '
        'log-probabilities are not those that were sampled from'
      )
  check_sizes(parts, name, env)
  check_examples(parts, section)
  cfg, sampler = build(optim.Optim, section.optim), parts.samplers[section.trains]
  student = learner.Learner(
    model=sampler.model,
    mesh=mesh,
    tx=optim.build(cfg, abstract_params(parts, section.trains), steps),
    ema_decay=cfg.ema_decay,
    terms=terms,
    form=sampler.form(temperature),
    forbidden=sampler.forbidden,
    loss_chunk=parts.config.loss_chunk,
  )
  return Phase(name, section, env, algorithm, student, starts_at_reference)


def check_source(config, flat, name: str, source: str, what: str) -> None:
  """Refuses a source of parameters that would not be there when the phase `name` first begins."""
  names = [n for n, _ in flat]
  before = dict.fromkeys(names[: names.index(name)])
  earlier = [n for n in before if config[n].kind != 'evaluate']  # which keeps no parameters
  if source not in ('previous', 'scratch', *earlier):
    if not source or not pathlib.Path(source).is_dir():
      raise records.UserError(
        f"{what}={source!r} is not 'previous', 'scratch', an earlier phase "
        f'({", ".join(earlier) or "there is none"}) or a folder of parameters'
      )


def check_examples(parts: Parts, section) -> None:
  """The first training examples must fit the prompt, and for supervised phases a packed row."""
  for example in augmented(parts, [parts.task.example('train', i) for i in range(32)]):
    if section.kind == 'supervised':
      supervised_sequence(parts, section, example)
    else:
      parts.prompter.render(parts.tokenizer, example)


def check_rewards(task, rewards) -> None:
  """Refuses examples whose one reward is not among those of the run: nothing else would pay."""
  examples = [task.example('train', i) for i in range(256)]
  members, left = [], [task]
  while left:  # a rare member of a mixture may come later than that
    member = left.pop()
    members += [member.example('train', 0)]
    left += [inner for _, inner in getattr(member, 'members', {}).values()]
  for example in [*examples, *members]:
    name = example.meta.get(records.CHECKED_BY)
    if name is not None and name not in rewards:
      raise records.UserError(
        f'rewards={", ".join(rewards)}: examples of {example.task} need the reward {name}'
      )


def check_numbers(config) -> None:
  """Refuses counts that must be positive."""
  sections = phase_sections(config)
  counts = {
    'checkpoint.save_every': config.checkpoint.save_every,
    'checkpoint.keep_last': config.checkpoint.keep_last,
    'log.every': config.log.every,
    'log.transcripts_every': config.log.transcripts_every,
    'evaluation.num_examples': config.evaluation.num_examples,
    'evaluation.env.num_generations': config.evaluation.env.num_generations,
    'loss_chunk': config.loss_chunk,
  }
  for field in ('examples_per_step', 'prompts_per_step'):
    counts |= {f'{name}.{field}': s[field] for name, s in sections.items() if field in s}
  for name, count in counts.items():
    if count < 1:
      raise records.UserError(f'{name}={count} must be at least 1')
    n = jax.process_count()
    if name.endswith('_per_step') and count % n:
      raise records.UserError(f'{name}={count} does not divide over {n} processes')


def check_sizes(parts: Parts, name: str, env) -> None:
  """Refuses what does not fit the model's positions, a packed row or the mesh."""
  section, room = parts.config[name], parts.prompter.max_length
  positions_of_model = parts.models[section.trains].max_position
  envs = {'evaluation.env': parts.evaluation_env} | ({f'{name}.env': env} if env else {})
  for what, each in envs.items():
    if types.padded(room) + each.max_completion_length > positions_of_model:
      raise records.UserError(
        f'prompt.max_length={room} (padded to {types.padded(room)}) plus '
        f'{what}.max_completion_length={each.max_completion_length} is more than the '
        f'{positions_of_model} positions of the model'
      )
  if env and room + env.max_completion_length > section.row_length:
    raise records.UserError(
      f'{name}.row_length={section.row_length} is shorter than prompt.max_length={room} plus '
      f'max_completion_length={env.max_completion_length}'
    )
  rows = parts.mesh.shape['data'] * parts.mesh.shape['fsdp']
  if section.kind != 'evaluate' and section.rows_per_batch % rows:
    raise records.UserError(
      f'{name}.rows_per_batch={section.rows_per_batch} does not divide over data x fsdp = '
      f'{rows} devices'
    )


# ------------------------------------------------------------------------------------ parameters


def abstract_params(parts: Parts, model: str):
  """Shapes, dtypes and shardings of a model's parameters."""
  network = parts.models[model]
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  return sharding.abstract(shapes, network.sharding_rules, parts.mesh)


def start_params(parts: Parts, model: str):
  """A model's own start: the weights its config names, or random ones; placed on the mesh."""
  target, network = abstract_params(parts, model), parts.models[model]
  weights = parts.config.models[model].weights
  if not weights:
    key = jax.random.key(parts.config.seed, impl='threefry2x32')
    return jax.jit(network.init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(key)
  folder = pathlib.Path(weights).expanduser()
  found, params = huggingface.read(folder) if folder.is_dir() else gguf.read(weights)
  wrong = [
    f'{name}={value!r}, not {getattr(network, name)!r}'
    for name, value in found.items()
    if getattr(network, name) != value
  ]
  if wrong:
    raise records.UserError(f'{weights!r} needs models.{model}: {"; ".join(wrong)}')

  def place(path, x, to):
    if x.shape != to.shape:
      raise records.UserError(
        f'models.{model}: {sharding.path_of(path)} is {to.shape}, but {weights!r} has {x.shape}'
      )
    return jax.device_put(x.astype(to.dtype), to.sharding)

  return jax.tree_util.tree_map_with_path(place, params, target)


def init_params(parts: Parts, model: str, source: str, flat, index: int, workdir: pathlib.Path):
  """Parameters from `source`, as phase `index` sees it.

  'previous' is where the last phase that trained this model ended, before any the same as
  'scratch': the model's own start. The name of a phase means its latest run; anything else is a
  path.
  """
  runs = [i for i in range(index) if flat[i][0] == source]
  if source == 'previous':
    sections = [parts.phases[name].section for name, _ in flat[:index]]
    runs = [i for i, s in enumerate(sections) if s.trains == model and s.kind != 'evaluate']
  if source == 'scratch' or (source == 'previous' and not runs):
    return start_params(parts, model)
  folder = workdir / 'phases' / kept_name(flat, runs[-1]) if runs else pathlib.Path(source)
  return checkpoint.load_params(folder, abstract_params(parts, model))


# ------------------------------------------------------------------------------------ examples


def supervised_sequence(parts: Parts, section, example) -> types.Sequence:
  """An example's prompt and solution as a row to learn from."""
  prompt = parts.prompter.render(parts.tokenizer, example)
  prefill = parts.prompter.prefill
  return data.supervised_sequence(parts.tokenizer, prompt, prefill, example, section.row_length)


def augmented(parts: Parts, examples):
  """Examples as prompt, reward and transcript will see them."""
  return [parts.prompter.augment(parts.config.seed, example) for example in examples]
