"""What must hold before the first step: everything that a config can get wrong ends here.

Each function raises UserError with one line that names the field, its value and what would do.
"""

from __future__ import annotations

import functools
import math
import pathlib

import jax

from reasonrl import (
  augmentations,
  controls,
  ops,
  parameters,
  phases,
  pretrained,
  prompts,
  records,
  types,
  wiring,
)

# The least that a number may be, wherever a section has it.
LEAST = {
  **dict.fromkeys(('num_examples', 'examples_per_step', 'prompts_per_step', 'row_length'), 1),
  **dict.fromkeys(('rows_per_batch', 'max_completion_length', 'num_generations'), 1),
  **dict.fromkeys(('max_generation_batches', 'corpus_examples', 'max_skipped'), 1),
  'sampler_sync_steps': 1,
  **dict.fromkeys(('sync_steps', 'steps_added', 'max_per_problem'), 0),
  **dict.fromkeys(('save_every', 'keep_last', 'every', 'transcripts_every'), 1),
  **dict.fromkeys(('seed', 'steps', 'eval_every', 'slots', 'transcripts', 'profile_step'), 0),
  **dict.fromkeys(('keep_every', 'grace_s', 'learning_rate', 'warmup_steps'), 0),
  **dict.fromkeys(('top_k', 'max_kept_tokens', 'loss_chunk'), 0),
}


def numbers(config) -> None:
  """Counts must not be too small, and must divide over the processes."""
  nodes = {'': config} | {f'{name}.': config[name] for name in ('checkpoint', 'log', 'evaluation')}
  nodes |= {'tokenizer.': config.tokenizer, 'evaluation.env.': config.evaluation.env}
  for name, section in phases.sections(config).items():
    nodes[f'{name}.'] = section
    nodes |= {f'{name}.{key}.': section[key] for key in ('env', 'optim') if key in section}
  for where, node in nodes.items():
    for field, least in LEAST.items():
      if field in node and node[field] < least:
        raise records.UserError(f'{where}{field}={node[field]} must be at least {least}')
    if 'steps' in node and node.kind == 'evaluate' and node.steps:
      raise records.UserError(f'{where}steps={node.steps} must be 0: such a phase only evaluates')
    if 'steps_growth' in node and not 0 < node.steps_growth < math.inf:
      raise records.UserError(f'{where}steps_growth={node.steps_growth} must be positive')
    for field in ('p_rationalization', 'p_show_hint_save'):
      if field in node and not 0 <= node[field] <= 1:
        raise records.UserError(f'{where}{field}={node[field]} must be in [0, 1]')
    for field in ('examples_per_step', 'prompts_per_step'):
      if field in node and node[field] % jax.process_count():
        raise records.UserError(
          f'{where}{field}={node[field]} does not divide over {jax.process_count()} processes'
        )


def loss_backend(asked: str, platform: str) -> None:
  """It must exist, and a kernel needs its platform."""
  if asked not in ops.BACKENDS:
    raise records.UserError(f'loss_backend={asked!r} is not one of {", ".join(ops.BACKENDS)}')
  wanted = {'pallas_tpu': 'tpu', 'pallas_gpu': 'gpu'}.get(asked, platform)
  if wanted != platform:
    raise records.UserError(f'loss_backend={asked!r} runs on a {wanted}, and here is a {platform}')


def check(setup: wiring.Setup, order) -> None:
  """Everything that can be wrong with what was built."""
  loss_backend(setup.config.loss_backend, setup.mesh.devices.flat[0].platform)
  for part in parts(setup.task):
    rewards(part, setup.rewards)
  draws(setup, setup.evaluation_env)
  if setup.evaluation_env.of_texts:
    held_out_texts(setup)
  swept(setup)
  for name, phase in setup.phases.items():
    source(setup.config, order, name, phase.section.init, f'{name}.init')
    task = phase.task(functools.partial(dataset, setup.config, order, name))
    if phases.updates(phase.section):
      trained(setup, phase)
    if phase.section.kind == 'reinforce':
      reinforced(setup, order, phase)
    if phase.env:
      draws(setup, phase.env)
      if phase.section.kind == 'collect' and phase.env.of_texts:
        raise records.UserError(f"{name}.env: what is collected are answers, of env 'single_turn'")
      if phase.section.kind == 'collect' and phase.env.controls:
        raise records.UserError(
          f'{name}.env.controls: what they write would be learned as if the model had said it'
        )
      for part in parts(task):
        rewards(part, setup.rewards)
    sizes(setup, phase)
    balanced(setup, order, task)
    examples(setup, phase, task)
  weights(setup, order)


def source(config, order, name: str, init: str, what: str) -> None:
  """The source of parameters must be there when the phase `name` first begins."""
  names = [n for n, _ in order]
  before = dict.fromkeys(names[: names.index(name)])
  earlier = [n for n in before if phases.updates(config[n])]  # the others keep no parameters
  if init not in ('previous', 'scratch', *earlier):
    if not init or not pathlib.Path(init).is_dir():
      raise records.UserError(
        f"{what}={init!r} is not 'previous', 'scratch', an earlier phase "
        f'({", ".join(earlier) or "there is none"}) or a folder of parameters'
      )


def dataset(config, order, name: str, read: str) -> None:
  """The phase `name` may read what a phase collects that comes before it."""
  names = [n for n, _ in order]
  before = dict.fromkeys(names[: names.index(name)])
  earlier = [n for n in before if config[n].kind == 'collect']
  if read not in earlier:
    raise records.UserError(
      f'{name}.task reads phase={read!r}, which is not an earlier phase that collects: '
      f'{", ".join(earlier) or "there is none"}'
    )


def weights(setup: wiring.Setup, order) -> None:
  """The weights that a model starts from must be on this disk, where a phase reads them."""
  for index, (name, _) in enumerate(order):
    phase = setup.phases[name]
    reads = [(phase.section.trains, phase.section.init)]
    reads += [(read.model, read.init) for read in phase.reads.values()]
    for model, init in reads:
      given = setup.config.models[model].weights
      start = parameters.folder_of(setup, order, index, pathlib.Path(), model, init) is None
      if start and given and not pathlib.Path(given).expanduser().is_dir():
        pretrained.find_gguf(given)


def draws(setup: wiring.Setup, env) -> types.Spec:
  """How an environment draws; the ranges are checked by `types.Spec`."""
  applied, _ = controls.build(env.controls, setup.tokenizer)
  return types.Spec.of(env, setup.tokenizer.eos_ids, applied)


def held_out_texts(setup: wiring.Setup) -> None:
  """What is held out must not move with the parameters, and is one position of every text."""
  env = setup.evaluation_env
  for role in env.reads:
    raise records.UserError(
      f'evaluation.env.no_think={env.no_think!r} reads {role}, but an evaluation has the policy '
      "alone: 'policy'"
    )
  if env.position_sampler not in ('uniform', 'class') or env.positions_per_text != 1:
    raise records.UserError(
      f'evaluation.env.position_sampler={env.position_sampler!r} positions_per_text='
      f"{env.positions_per_text} must be 'uniform' or 'class', and 1"
    )
  if setup.budgets:
    raise records.UserError(
      f'evaluation.budgets={sorted(setup.budgets)}: the environment of texts has no such sweeps'
    )


def swept(setup: wiring.Setup) -> None:
  """Every setting of a sweep of budgets can be rolled out."""
  cap = setup.evaluation_env.max_completion_length
  for name, method in setup.budgets.items():
    for setting in method.settings(setup.evaluation_env, setup.evaluation_augmentations):
      draws(setup, setting.env)
      if cap < setting.most < math.inf:
        raise records.UserError(
          f'evaluation.budgets.{name} allows {setting.most} tokens, but '
          f'evaluation.env.max_completion_length={cap}'
        )


def trained(setup: wiring.Setup, phase: wiring.Phase) -> None:
  """Small updates must not round away."""
  model = phase.section.trains
  if setup.models[model].param_dtype != 'float32':
    raise records.UserError(
      f'{phase.name} trains models.{model}.param_dtype={setup.models[model].param_dtype!r}: small '
      "updates would round away; train float32 parameters (compute_dtype may be 'bfloat16')"
    )


def reinforced(setup: wiring.Setup, order, phase: wiring.Phase) -> None:
  """Environment, algorithm and reference must fit each other."""
  name, section, env, algorithm = phase.name, phase.section, phase.env, phase.algorithm
  algorithm.check(env.num_generations, tuple(setup.rewards))
  paid = {n: fn for n, (fn, weight) in setup.rewards.items() if weight}
  if paid and not any(env.offers in getattr(fn, 'needs', (env.offers,)) for fn in paid.values()):
    raise records.UserError(
      f'rewards={", ".join(paid)} do not apply to what {name}.env makes: nothing would be trained'
    )
  discounts = {n: fn.gamma for n, (fn, _) in setup.rewards.items() if hasattr(fn, 'gamma')}
  algorithm.check_credit(discounts)
  if 'ema' in env.reads and section.optim.ema_decay is None:
    raise records.UserError(
      f'{name}.env.no_think={env.no_think!r} needs {name}.optim.ema_decay, such as .999: else '
      'there is no moving average of the parameters'
    )
  unknown = algorithm.needs - wiring.SCORED_WITH.keys()
  if unknown:
    raise records.UserError(f'{name}.algorithm needs {sorted(unknown)}, which nothing provides')
  roles = set(wiring.SCORED_WITH.values()) - {'params'}
  for role, read in section.reads.items():
    if role not in roles:
      raise records.UserError(f'{name}.reads.{role}: no score reads it, only {", ".join(roles)}')
    if read.model not in setup.models or setup.models[read.model] != setup.models[section.trains]:
      fitting = [m for m, model in setup.models.items() if model == setup.models[section.trains]]
      raise records.UserError(
        f'{name}.reads.{role}.model={read.model!r} is not a model of the shape of '
        f'trains={section.trains!r}: {", ".join(fitting)}'
      )
    source(setup.config, order, name, read.init, f'{name}.reads.{role}.init')
  rollouts = section.prompts_per_step * env.num_generations
  if algorithm.num_minibatches > rollouts:
    raise records.UserError(
      f'{name}.algorithm.num_minibatches={algorithm.num_minibatches} is more than the '
      f'{rollouts} rollouts of a step'
    )
  if env.temperature <= 0:
    raise records.UserError(
      f'{name}.env.temperature={env.temperature} must be > 0: a greedy draw has no distribution'
    )
  if 'forbid' in env.controls:
    raise records.UserError(
      f"{name}.env.controls has 'forbid', which changes probabilities as the trainer does not: it "
      'is for evaluation'
    )
  spec = draws(setup, env)
  if spec.truncates and env.max_kept_tokens < max(env.top_k, 1):
    raise records.UserError(
      f'{name}.env.max_kept_tokens={env.max_kept_tokens} must be at least {max(env.top_k, 1)} for '
      f'top_k={env.top_k} top_p={env.top_p} min_p={env.min_p}: training needs the tokens kept'
    )


def sizes(setup: wiring.Setup, phase: wiring.Phase) -> None:
  """Rollouts must fit the model's positions and a packed row, and rows the mesh."""
  name, section, env = phase.name, phase.section, phase.env
  room = setup.prompter.max_length
  positions_of_model = setup.models[section.trains].max_position
  envs = {'evaluation.env': (setup.evaluation_env, setup.evaluation_augmentations)}
  if env:
    envs[f'{name}.env'] = env, phase.augmentations
  for what, (each, asked) in envs.items():
    window = each.longest(setup.tokenizer, types.padded(room))
    if window > positions_of_model:
      raise records.UserError(
        f'a row of {what} has up to {window} tokens (prompt.max_length={room} padded to '
        f'{types.padded(room)}; max_completion_length={each.max_completion_length}), more than the '
        f'{positions_of_model} positions of the model'
      )
    longest = augmentations.longest(asked)
    if longest > each.max_completion_length:
      raise records.UserError(
        f'{what}.max_completion_length={each.max_completion_length} is less than the {longest} '
        'tokens that an augmentation asks for'
      )
  # What is trained on must fit a row; the EOS of a completion that was cut may come on top.
  longest = {n: setup.phases[n].env.longest(setup.tokenizer, room) + 1 for n in phase.datasets}
  if section.kind == 'reinforce':
    longest[name] = env.longest(setup.tokenizer, room)
  for what, length in longest.items():
    if length > section.row_length:
      raise records.UserError(
        f'{name}.row_length={section.row_length} is shorter than the {length} tokens that a row of '
        f'{what}.env may have, with prompt.max_length={room} and '
        f'max_completion_length={setup.phases[what].env.max_completion_length}'
      )
  rows = setup.mesh.shape['data'] * setup.mesh.shape['fsdp']
  if phases.updates(section) and section.rows_per_batch % rows:
    raise records.UserError(
      f'{name}.rows_per_batch={section.rows_per_batch} does not divide over data x fsdp = '
      f'{rows} devices'
    )


def parts(task) -> list:
  """The tasks that a task is made of, but for what is yet to be collected."""
  inner = [member for _, member in getattr(task, 'members', {}).values()]
  if inner:  # a rare one may come late in the mixture
    return [part for member in inner for part in parts(member)]
  return [] if getattr(task, 'phase', '') else [task]


def rewards(task, given) -> None:
  """Where an example has a reward of its own it must be one of the run: nothing else would pay."""
  count = max(256, task.epoch('train')) if hasattr(task, 'epoch') else 256
  for example in (task.example('train', i) for i in range(min(count, 100_000))):
    name = example.meta.get(records.CHECKED_BY)
    if name is not None and name not in given:
      raise records.UserError(
        f'rewards={", ".join(given)}: examples of {example.task} need the reward {name}'
      )


def examples(setup: wiring.Setup, phase: wiring.Phase, task) -> None:
  """The first training examples must fit the prompt, and for supervised phases a packed row."""
  shown = phase.section.few_shot if phase.section.kind == 'supervised' else True
  worked = getattr(task, 'worked', None)
  if shown and setup.prompter.few_shot == prompts.TASK and worked is None:
    raise records.UserError(
      f"prompt.few_shot='task', but the task of {phase.name} has no worked examples: give a file"
    )
  rationalizes = phase.section.kind == 'collect' and phase.section.p_rationalization
  for raw in (part.example('train', i) for part in parts(task) for i in range(32)):
    (example,) = setup.augmented([raw], phase.augmentations)
    section = phase.section
    if section.kind == 'supervised':
      setup.supervised_sequence(example, section.few_shot, section.row_length)
    else:
      (phase.env or setup.evaluation_env).fits(setup, example)
    if section.kind == 'reinforce' and section.ntp_coef:
      setup.supervised_sequence(example, False, section.row_length)
    if rationalizes and records.HINT_SHOWN in example.meta:
      raise records.UserError(
        f'{phase.name}.p_rationalization={rationalizes}, but problems of {example.task} show their '
        'hint already'
      )
    if rationalizes:
      setup.prompt(*setup.augmented([records.show_hint(raw)], phase.augmentations))


def balanced(setup: wiring.Setup, order, task) -> None:
  """What is balanced by a fact must come from problems that have it."""
  members = [member for _, member in getattr(task, 'members', {}).values()]
  for member in members:
    balanced(setup, order, member)
  name, field = getattr(task, 'phase', ''), getattr(task, 'balance', '')
  if not name or not field:
    return
  source = setup.phases[name].task(functools.partial(dataset, setup.config, order, name))
  for part in parts(source):
    found = part.example('train', 0).meta
    if not isinstance(found.get(field), str | int):
      raise records.UserError(
        f'balance={field!r} is not a name or number that problems of {name} have: '
        f'{", ".join(sorted(found)) or "none"}'
      )
