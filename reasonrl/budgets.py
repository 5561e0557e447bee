"""Held-out accuracy under budgets of thinking, and how well the budgets are kept.

1. A method has numbers; each is a `Setting`: what is changed of the environment and of the prompts,
   and how many tokens it allows.
2. `sweep` rolls out the test examples at every setting.
3. Control, Scaling and Performance (s1, arXiv 2501.19393, section 3.2) are computed over the
   settings, of which the mean thinking tokens are one number each. Thinking is what stands between
   <think> and </think>, in a completion with its prefill.

    max_think, ignores    budget forcing: thinking is cut off, or made to go on
    target, at_most,      the prompt asks for it: token-, step- and class-conditional control;
    steps, class          '..._forced': and budget forcing sees to it
    rejection             samples until thinking is short enough

Of s1's step-conditional control this has the request, and the bound of 100 tokens a step; left out
is its countdown of steps inside the thinking, which a model has to be trained to write.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from reasonrl import augmentations, records, stats

# (setting, problems, attempt) -> `evaluation.outcomes` of these test problems, in their order; all
# processes call it alike.
Roll = Callable[['Setting', np.ndarray, int], dict[str, np.ndarray]]


class Setting(NamedTuple):
  """One number of a method."""

  name: str
  env: Any
  added: tuple  # augmentations of the problems
  judged: str  # the column that `most` and `target` are about: think_length or completion_length
  most: float  # tokens that it allows; inf = any number
  target: float  # tokens that were asked for; NaN = none were


@dataclasses.dataclass(frozen=True)
class Forced:
  """Budget forcing: a number of the control `think_budget` is each of `numbers`.

  Raises:
    UserError: a number is out of range, or a string is not one that thinking is measured by.
  """

  VARIES: ClassVar[str]
  FIXED: ClassVar[str]
  LEAST: ClassVar[int]

  numbers: tuple[int, ...]
  temperature: float  # 0 = greedy
  think_budget: Mapping  # of `controls.build`; `numbers` replace those that it has

  def __post_init__(self):
    _check(self.numbers, self.LEAST)

  def settings(self, env, added: tuple) -> list[Setting]:
    found = []
    for n in self.numbers:
      both = {self.VARIES: n, self.FIXED: getattr(self, self.FIXED)}
      forced = force(drawn(env, self.temperature), self.think_budget, **both)
      most = both['max_think'] or math.inf
      found.append(Setting(str(n), forced, added, 'think_length', most, math.nan))
    return found


@dataclasses.dataclass(frozen=True)
class MaxThink(Forced):
  """Thinking ends at so many tokens; an end before that is replaced `ignores` times."""

  VARIES, FIXED, LEAST = 'max_think', 'ignores', 1

  ignores: int


@dataclasses.dataclass(frozen=True)
class Ignores(Forced):
  """The end of thinking is replaced so many times, within `max_think` tokens; 0: any number."""

  VARIES, FIXED, LEAST = 'ignores', 'max_think', 0

  max_think: int


COUNTS = {  # what a prompt asks for -> the column that is judged by it
  'thinking': 'think_length',  # token-conditional control (s1)
  'response': 'completion_length',  # LCPO (arXiv 2503.04697)
  'steps': 'think_length',  # step-conditional control: steps of `unit_tokens`
}


@dataclasses.dataclass(frozen=True)
class Asked:
  """The prompt asks for a number of tokens or steps.

  Augmentations of the run that ask for a length give way to this.

  Raises:
    UserError: a field is out of range.
  """

  numbers: tuple[int, ...]
  temperature: float
  template: str  # added to the problem; {n} is the number
  counts: str  # of COUNTS
  unit_tokens: int  # of thinking that a step may have
  forced: bool  # with budget forcing at as many tokens of thinking
  think_budget: Mapping  # of `Forced`, for this

  def __post_init__(self):
    _check(self.numbers, 1)
    augmentations.check_template('evaluation.budgets', 'template', self.template, '{n}')
    if self.counts not in COUNTS:
      raise records.UserError(f'counts={self.counts!r} is not one of {", ".join(COUNTS)}')
    if self.unit_tokens < 1 or (self.forced and self.counts == 'response'):
      raise records.UserError(
        f'unit_tokens={self.unit_tokens} must be at least 1, and forced={self.forced} is for '
        f'thinking or steps, not for counts={self.counts!r}'
      )

  def settings(self, env, added: tuple) -> list[Setting]:
    env, found = drawn(env, self.temperature), []
    steps = self.counts == 'steps'
    for n in self.numbers:
      asked = (*_others(added), augmentations.Suffix(self.template.replace('{n}', str(n))))
      most = n * self.unit_tokens if steps else n
      within = force(env, self.think_budget, max_think=most) if self.forced else env
      target = math.nan if steps else n
      found.append(Setting(str(n), within, asked, COUNTS[self.counts], most, target))
    return found


@dataclasses.dataclass(frozen=True)
class Class:
  """The prompt asks in words for short or for long thinking: class-conditional control.

  Augmentations of the run that ask for a length give way to this.
  """

  temperature: float
  short: str
  long: str

  def settings(self, env, added: tuple) -> list[Setting]:
    env, found = drawn(env, self.temperature), []
    for name, text in (('short', self.short), ('default', ''), ('long', self.long)):
      asked = (*_others(added), *([augmentations.Suffix(text)] if text else ()))
      found.append(Setting(name, env, asked, 'think_length', math.inf, math.nan))
    return found


@dataclasses.dataclass(frozen=True)
class Rejection:
  """Samples anew until thinking has at most so many tokens.

  A problem of which none of 1 + `retries` samples is short enough counts as wrong, with the length
  of the last one.
  """

  numbers: tuple[int, ...]
  temperature: float
  retries: int

  def __post_init__(self):
    _check(self.numbers, 1)
    if self.temperature <= 0 or self.retries < 0:
      raise records.UserError(
        f'temperature={self.temperature} must be above 0, retries={self.retries} at least 0'
      )

  def settings(self, env, added: tuple) -> list[Setting]:
    env = dataclasses.replace(drawn(env, self.temperature), num_generations=1)
    return [Setting(str(n), env, added, 'think_length', n, math.nan) for n in self.numbers]


BUDGETS = {
  'max_think': MaxThink,
  'ignores': Ignores,
  'target': Asked,
  'target_forced': Asked,
  'at_most': Asked,
  'steps': Asked,
  'steps_forced': Asked,
  'class': Class,
  'rejection': Rejection,
}


def by_setting(row: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
  """Setting -> its metrics, of a method in a row of metrics.jsonl; empty: it was not swept."""
  found = {}
  for key, value in row.items():
    if key.startswith(f'eval/{name}/') and key.count('/') == 3:
      _, _, setting, metric = key.split('/')
      found.setdefault(setting, {})[metric] = value
  return found


def _check(numbers, least: int) -> None:
  if not numbers or any(not isinstance(n, int) or n < least for n in numbers):
    raise records.UserError(f'numbers={numbers} must be one or more, from {least} up')


def drawn(env, temperature: float):
  """The environment at that temperature; a greedy draw has no second sample."""
  one = {} if temperature else {'num_generations': 1}
  return dataclasses.replace(env, temperature=temperature, **one)


def force(env, think_budget: Mapping, **numbers: int):
  """The environment under a think_budget with these numbers."""
  if (think_budget['start'], think_budget['end']) != (records.THINK_OPEN, records.THINK_CLOSE):
    raise records.UserError(
      f'think_budget: start={think_budget["start"]!r}, end={think_budget["end"]!r}, but thinking '
      f'is measured between {records.THINK_OPEN!r} and {records.THINK_CLOSE!r}'
    )
  section = {**think_budget, **numbers}
  return dataclasses.replace(env, controls={**env.controls, 'think_budget': section})


def _others(added: tuple) -> tuple:
  """The augmentations that ask for no length."""
  return tuple(each for each in added if not augmentations.longest((each,)))


# ------------------------------------------------------------------------------------ measuring


def sweep(method, env, added: tuple, problems: int, roll: Roll) -> dict[str, float]:
  """Metrics of every setting, '<number>/accuracy' ..., and of all: 'control' ...

  Of a setting:
    accuracy, accuracy_low, accuracy_high   a 95 % interval; clustered by problem
    think_length, completion_length         means, tokens
    truncated                               share cut off at the cap
    within                                  share of responses that keep to the tokens allowed
    mean_error, mean_abs_error, rms_error,
    within_10, over                         where a number of tokens was asked for; over: by one or
                                            more, see `stats.violations`
    failed                                  share of problems without a sample that was accepted

  Of the sweep:
    control      share of settings whose mean tokens are within what they allow; of 'class', of
                 short < default < long, which of the two hold
    scaling      percentage points of accuracy per 1,000 tokens of thinking, see `stats.scaling`
    performance  the best accuracy
  """
  found, settings = {}, method.settings(env, added)
  for setting in settings:
    retries = method.retries if isinstance(method, Rejection) else None
    table, failed_R = _measure(setting, retries, problems, roll)
    row = _describe(setting, table, failed_R)
    if retries is not None:
      row['failed'] = float(failed_R.mean())
    found |= {f'{setting.name}/{name}': value for name, value in row.items()}
  think = [found[f'{setting.name}/think_length'] for setting in settings]
  accuracies = [found[f'{setting.name}/accuracy'] for setting in settings]
  if isinstance(method, Class):
    short, default, long = think
    found['control'] = float(np.mean([short < default, default < long]))
  else:
    judged = [found[f'{setting.name}/{setting.judged}'] for setting in settings]
    most = np.asarray([setting.most for setting in settings])
    found['control'] = stats.control(judged, -math.inf, most)
  found['scaling'] = 1e5 * stats.scaling(think, accuracies)
  found['performance'] = stats.performance(accuracies)
  return found


def _measure(setting: Setting, retries: int | None, problems: int, roll: Roll):
  """The outcomes of a setting, and which of them were not accepted: bool [R]."""
  table = roll(setting, np.arange(problems), 0)
  columns = ('group', 'right', 'stop', 'think_length', 'completion_length')
  table = {name: table[name] for name in columns}
  none_R = np.zeros(table['group'].size, bool)
  if retries is None:
    return table, none_R
  for attempt in range(1, retries + 1):
    again = np.flatnonzero(table['think_length'] > setting.most)
    if not again.size:
      break
    new = roll(setting, again, attempt)
    for name, column in table.items():
      column[again] = new[name]
  return table, table['think_length'] > setting.most


def _describe(setting: Setting, table, failed_R) -> dict[str, float]:
  right_R = table['right'] * ~failed_R
  right_P = np.bincount(table['group'], right_R) / np.bincount(table['group'])
  low, high = stats.clustered(right_P)
  row = {'accuracy': float(right_P.mean()), 'accuracy_low': low, 'accuracy_high': high}
  row |= {name: float(np.mean(table[name])) for name in ('think_length', 'completion_length')}
  row['truncated'] = float(np.mean(table['stop'] == records.Stop.LENGTH))
  length_R = table[setting.judged]
  row['within'] = stats.control(length_R, -math.inf, setting.most)
  if not math.isnan(setting.target):
    row |= stats.length_errors(length_R, setting.target)
    row['within_10'] = float(np.mean(10 * np.abs(length_R - setting.target) <= setting.target))
    row['over'] = stats.violations(length_R, setting.target, 0)['one_sided']
  return row
