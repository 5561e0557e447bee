"""The evaluation that a run repeats, on the first distinct problems of the test split."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from reasonrl import budgets, evaluation, records, sharding, tooling, wiring
from reasonrl.rewards import votes


def distinct_examples(task, split: str, count: int) -> list[records.Example]:
  """The first `count` examples of a split whose problems differ: an interval counts each once.

  Raises:
    UserError: there are fewer.
  """
  found: dict[str, records.Example] = {}
  for index in range(20 * count):
    example = task.example(split, index)
    found.setdefault(example.solution if records.TEXT in example.meta else example.problem, example)
    if len(found) == count:
      return list(found.values())
  raise records.UserError(
    f'evaluation.num_examples={count}: only {len(found)} different {split} problems among the '
    f'first {20 * count} examples of the task'
  )


def voter(setup: wiring.Setup, examples):
  """(experience, tally) -> what each rollout votes for, see `votes`; None if a reward knows no
  answers."""
  correct = setup.evaluation.correct
  names = {example.meta.get(records.CHECKED_BY, correct) for example in examples}
  rewards = {name: setup.rewards[name][0] for name in names}
  if not all(hasattr(reward, 'answer') for reward in rewards.values()):
    return None
  counted = {'vote': (votes.Votes(rewards, correct), 1.0)}

  def vote(experience, tally):
    groups = experience.group_R.tolist()
    out = setup.pool.score(counted, experience.examples, experience.completions, groups)
    tooling.count_failures(tally, out)
    return out.value

  return vote


def make_evaluate(setup: wiring.Setup):
  """(stage, train state, version, last) -> metrics and transcripts on the first test examples.

  Where it is the last of a phase, budgets of thinking are swept as well.
  """
  count, n = setup.evaluation.num_examples, jax.process_count()
  if count % n:
    raise records.UserError(f'evaluation.num_examples={count} does not divide over {n} processes')
  found = distinct_examples(setup.task, 'test', count)
  examples = setup.augmented(found[jax.process_index() :: n], setup.evaluation_augmentations)
  for example in examples:  # one that does not fit stops the run now, not in an hour
    setup.evaluation_env.fits(setup, example)
    by = setup.evaluation.by
    known = by in setup.evaluation_env.facts or isinstance(example.meta.get(by), str | int)
    if by and (by == records.HINTED or not known):
      raise records.UserError(
        f'evaluation.by={by!r} is not a name or number that examples have: '
        f'{", ".join(sorted(example.meta)) or "none"}'
      )

  env = setup.evaluation_env
  asked_by_run = setup.evaluation_augmentations
  swept = [method.settings(env, asked_by_run) for method in setup.budgets.values()]
  added = [setting.added for settings in swept for setting in settings]
  for i, asked in enumerate(added):
    if asked not in added[:i]:
      for example in setup.augmented(found[jax.process_index() :: n], asked):
        setup.prompt(example)
  correct, vote = setup.evaluation.correct, voter(setup, found)

  def roll(stage, named, name, shown, setting, problems, attempt):
    """`budgets.Roll` of a method, on the test examples; its first transcript goes into `shown`."""
    score = tooling.make_window_score(setup, stage.phase.learner, setting.env)
    mine = [int(p) for p in problems if p % n == jax.process_index()]
    asked = setup.augmented([found[p] for p in mine or [0]], setting.added)  # all sample
    tools = tooling.make_tools(stage, 'eval', lambda: asked, score)
    experience = setting.env.rollout(tools, named, attempt)
    if not attempt:
      sample = evaluation.transcripts(experience, None, 1, correct)[0]
      shown.append({'mode': f'{name}={setting.name}', **sample})
    table = evaluation.outcomes(experience, tools.tokenizer, correct)
    every, place = sharding.gather(mine), [divmod(int(g), n) for g in table['group']]
    problem = [every[process][i] if every[process] else -1 for i, process in place]
    table['group'] = np.asarray(problem)
    order = np.argsort(problem, kind='stable')
    order = order[table['group'][order] >= 0]
    return {name: column[order] for name, column in table.items()}

  def evaluate(stage, state, version, last):
    stage = dataclasses.replace(stage, place=(0, 0))  # the same draws in every phase
    score = tooling.make_window_score(setup, stage.phase.learner, env)
    tools = tooling.make_tools(stage, 'eval', lambda: examples, score)
    named = {'params': state.params, 'ema': state.ema, 'version': version}
    metrics, experiences = evaluation.evaluate(
      setup.evaluation, env, tools, named, vote and functools.partial(vote, tally=stage.tally)
    )
    shown = [
      {'mode': mode, **sample}
      for mode, experience in experiences.items()
      for sample in evaluation.transcripts(experience, None, setup.config.log.transcripts, correct)
    ]
    for name, method in setup.budgets.items() if last else ():
      rows = functools.partial(roll, stage, named, name, shown)
      swept = budgets.sweep(method, env, setup.evaluation_augmentations, count, rows)
      metrics |= {f'eval/{name}/{metric}': value for metric, value in swept.items()}
    return metrics, shown

  return evaluate
