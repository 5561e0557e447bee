"""From a config to the setup of a run: every member built and checked before the first step.

`train` reads the tables and hands them in; nothing here knows a member by name. Bad names and
values stop here with one line.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from reasonrl import (
  augmentations,
  budgets,
  data,
  evaluation,
  learner,
  optim,
  phases,
  prompts,
  records,
  sampling,
  sharding,
  tables,
  tokenizers,
  types,
)

LOSSES = {'nll': learner.nll}
# What an algorithm may need of an experience, and the role of the parameters that give it.
SCORED_WITH = {'old_logp': 'params', 'ref_logp': 'ref'}


@dataclasses.dataclass(frozen=True)
class Setup:
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
  evaluation_augmentations: tuple
  budgets: dict[str, Any]  # name -> method, of the evaluation
  pool: Any
  poll: Callable[[], None]

  def augmented(self, examples, added: tuple) -> list[records.Example]:
    """Examples as prompt, reward and transcript will see them, with the augmentations `added`."""
    return [augmentations.augment(added, self.config.seed, example) for example in examples]

  def prompt(self, example) -> list[int]:
    """The token ids of an example's prompt."""
    return self.prompter.render(self.tokenizer, example)

  def supervised_sequence(self, example, few_shot: bool, row_length: int) -> types.Sequence:
    """An example's prompt and solution as a row to learn."""
    prompt = self.prompter.render(self.tokenizer, example, few_shot)
    prefill = self.prompter.prefill
    return data.supervised_sequence(self.tokenizer, prompt, prefill, example, row_length)

  def text(self, example) -> tuple[np.ndarray, int]:
    """The token ids of a text, and how many of them stand before it (BOS)."""
    before = self.prompter.render(self.tokenizer, example, False)
    return data.text_sequence(self.tokenizer, before, example, sys.maxsize).tokens_T, len(before)


@dataclasses.dataclass(frozen=True)
class Phase:
  """One section of the config that `phases` names."""

  name: str
  section: Any
  task: Callable  # (collect phase -> path of its dataset) -> where the examples come from
  augmentations: tuple  # of its problems
  env: Any  # of a phase that samples
  algorithm: Any  # of a reinforce phase
  reads: dict[str, Any]  # role -> model, init and sync of other parameters that it reads
  learner: learner.Learner  # of the first iteration
  optimizer: Callable  # steps of the phase -> optax transformation

  def at(self, iteration: int) -> Phase:
    """The phase in an iteration of its loop: where it grows, so does the schedule."""
    steps = phases.steps(self.section, iteration)
    if steps == self.section.steps:
      return self  # and so no program is compiled again
    student = dataclasses.replace(self.learner, tx=self.optimizer(steps))
    return dataclasses.replace(self, learner=student)

  @property
  def datasets(self) -> list[str]:
    """The collect phases whose datasets it reads."""
    return [] if self.section.kind == 'evaluate' else sorted(phases.collected_by(self.section.task))

  @property
  def starts_at_reference(self) -> bool:
    """Before its first update the policy is the frozen reference."""
    ref = self.reads.get('ref')
    return ref is not None and (ref.model, ref.init) == (self.section.trains, self.section.init)

  @property
  def old_policy(self) -> str:
    """What the first update of a step divides by: 'itself', 'scored' or 'sampled' probabilities."""
    if self.algorithm is None or 'old_logp' in self.algorithm.needs:
      return 'scored'
    chosen = getattr(self.algorithm, 'old_policy', None)  # not every algorithm has the choice
    return 'sampled' if chosen == 'sampler' else 'itself'

  @property
  def followers(self) -> dict[str, tuple[int, float]]:
    """Role -> (every how many steps it follows the policy, by what share) of what it reads."""
    out = {
      role: (read.sync_steps, read.mixup_alpha)
      for role, read in self.reads.items()
      if read.sync_steps
    }
    if self.section.kind == 'reinforce' and self.section.sampler_sync_steps > 1:
      out['sampler'] = (self.section.sampler_sync_steps, 1.0)
    return out


def wire(config, table: dict, order, workdir: pathlib.Path, pool, poll) -> Setup:
  """Builds everything. `table`: 'task', 'reward', 'env', ... -> its members by name."""
  mesh = sharding.make_mesh(**config.mesh)
  task = tables.make_task(table['task'], config.task, 'task', None)
  with tables.named('prompt'):
    worked = getattr(task, 'worked', None)
    prompter = tables.build(prompts.Prompter, config.prompt, 'augmentations', worked=worked)
  rewards = {}
  for name, fields in config.rewards.items():
    cls = tables.lookup(table['reward'], name, 'rewards')
    rewards[name] = (tables.build(cls, fields, 'weight'), fields.weight)
  tables.lookup(rewards, config.evaluation.correct, 'evaluation.correct')
  for name in config.models:
    tables.lookup(table['model'], config.models[name].kind, f'models.{name}.kind')
  names = dict.fromkeys(name for name, _ in order)
  asked = {name: make_augmentations(config, config[name], name) for name in names}
  asked_in_evaluation = make_augmentations(config, config.evaluation, 'evaluation')
  tokenizer = make_tokenizer(config, task, [*asked.values(), asked_in_evaluation], workdir)
  models, samplers = {}, {}
  for name, fields in config.models.items():
    models[name] = make_model(table['model'], fields, tokenizer)
    if tokenizer.vocab_size > models[name].vocab_size:
      raise records.UserError(
        f'models.{name}.vocab_size={models[name].vocab_size} is smaller than the tokenizer, '
        f'{tokenizer.vocab_size} tokens'
      )
    # Never sampled: marks other than EOS, and rows of the head that stand for no token.
    forbidden = set(tokenizer.control_ids) - set(tokenizer.eos_ids)
    forbidden |= set(range(tokenizer.vocab_size, models[name].vocab_size))
    fixed = {'model': models[name], 'mesh': mesh, 'forbidden': tuple(sorted(forbidden))}
    samplers[name] = tables.build(sampling.Sampler, config.sampler, **fixed)
  setup = Setup(
    config=config,
    mesh=mesh,
    task=task,
    tokenizer=tokenizer,
    prompter=prompter,
    models=models,
    samplers=samplers,
    rewards=rewards,
    phases={},
    evaluation=tables.build(
      evaluation.Evaluation, config.evaluation, 'env', 'augmentations', 'budgets'
    ),
    evaluation_env=tables.member(table['env'], config.evaluation.env, 'evaluation.env'),
    evaluation_augmentations=asked_in_evaluation,
    budgets=make_budgets(config.evaluation),
    pool=pool,
    poll=poll,
  )
  for name in names:
    setup.phases[name] = make_phase(setup, table, name, asked[name])
  return setup


def make_augmentations(config, section, what: str) -> tuple:
  """What a section adds to its problems: its own augmentations, or those of the run."""
  chosen, what = section, f'{what}.augmentations'
  if 'augmentations' not in section or not section.augmentations:  # a phase that only evaluates
    chosen, what = config.prompt, 'prompt.augmentations'
  return tuple(
    tables.build(tables.lookup(augmentations.AUGMENTATIONS, name, what), fields)
    for name, fields in chosen.augmentations.items()
  )


def make_budgets(section) -> dict[str, Any]:
  """The methods that a section of kind evaluation sweeps."""
  found = {}
  for name, fields in section.budgets.items():
    cls = tables.lookup(budgets.BUDGETS, name, 'evaluation.budgets')
    with tables.named(f'evaluation.budgets.{name}'):
      found[name] = tables.build(cls, fields)
  return found


def make_model(table: dict, fields, tokenizer):
  """A network from a section of `config.models`; vocab_size 0 is the tokenizer's."""
  section = fields.copy_and_resolve_references()
  section.vocab_size = section.vocab_size or tokenizer.vocab_size
  return tables.build(table[fields.kind], section, 'kind', 'weights')


def make_tokenizer(config, task, asked: list[tuple], workdir: pathlib.Path):
  """The workdir's tokenizer, or on the first start the one that the config asks for."""
  if (workdir / 'tokenizer').exists():
    return tokenizers.load(workdir / 'tokenizer')
  cfg = tables.build(tokenizers.Settings, config.tokenizer)
  distinct = [added for i, added in enumerate(asked) if added not in asked[:i]]
  problems = (  # made only where a tokenizer is trained on them
    augmentations.imagined(added, config.seed, task.example('train', i))
    for added in distinct
    for i in range(cfg.corpus_examples)
  )
  texts = (text for e in problems for text in (e.problem, e.solution or ''))
  return tokenizers.build(cfg, texts, task.symbols)


def save_tokenizer(tokenizer, workdir: pathlib.Path) -> None:
  """Keeps it in the workdir; a kill leaves the whole folder or none."""
  saved = workdir / 'tokenizer'
  if not saved.exists():
    tokenizer.save(saved.with_suffix('.tmp'))
    saved.with_suffix('.tmp').rename(saved)


def make_phase(setup: Setup, table: dict, name: str, asked: tuple) -> Phase:
  """Builds one section that `phases` names; `checks` says whether it can run."""
  section = setup.config[name]
  tables.lookup(setup.models, section.trains, f'{name}.trains')
  env, algorithm, reads, task = None, None, {}, lambda dataset: setup.task
  temperature, terms, updates_per_step = 1.0, (), 1
  if section.kind != 'evaluate' and section.task:
    task = functools.partial(tables.make_task, table['task'], section.task, f'{name}.task')
  if section.kind == 'collect':
    env = tables.member(table['env'], section.env, f'{name}.env')
    temperature = env.temperature
  if section.kind == 'supervised':
    terms = (learner.Term(tables.lookup(LOSSES, section.loss, f'{name}.loss'), None, 'weight'),)
  if section.kind == 'reinforce':
    env = tables.member(table['env'], section.env, f'{name}.env')
    algorithm = tables.member(table['algorithm'], section.algorithm, f'{name}.algorithm')
    roles = {SCORED_WITH[name] for name in algorithm.needs & SCORED_WITH.keys()} | env.reads
    reads = {role: section.reads[role] for role in sorted(roles & {'ref'})}
    terms, temperature = (
      (learner.Term(algorithm.token_loss, algorithm.prepare, 'weight'),),
      env.temperature,
    )
    if section.ntp_coef:
      terms += (learner.Term(learner.nll, None, 'text_weight'),)
    updates_per_step = algorithm.num_iterations * algorithm.num_minibatches
  sampler = setup.samplers[section.trains]
  optimizer, ema_decay = lambda steps: optim.frozen(), None
  if phases.updates(section):
    cfg = tables.build(optim.Optim, section.optim)
    shapes, ema_decay = sharding.abstract_params(sampler.model, setup.mesh), cfg.ema_decay
    optimizer = lambda steps: optim.build(cfg, shapes, max(steps, 1) * updates_per_step)
  student = learner.Learner(
    model=sampler.model,
    mesh=setup.mesh,
    tx=optimizer(section.steps),
    ema_decay=ema_decay,
    terms=terms,
    form=sampler.form(temperature),
    forbidden=sampler.forbidden,
    loss_backend=setup.config.loss_backend,
    loss_chunk=setup.config.loss_chunk,
  )
  return Phase(name, section, task, asked, env, algorithm, reads, student, optimizer)
