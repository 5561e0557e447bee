"""Held-out accuracy under budgets of thinking, and how well the budgets are kept.

1. A method has numbers; each is a `Setting`: what is changed of the environment and of the prompts,
   and how many tokens of thinking it allows.
2. `sweep` rolls out the test examples at every setting.
3. Control, Scaling and Performance (s1, arXiv 2501.19393, section 3.2) are computed over the
   settings, of which the mean thinking tokens are one number each.

    max_think, ignores    budget forcing: thinking is cut off, or made to go on
    target, at_most,      the prompt asks for it: token-, step- and class-conditional control;
    steps, class          '..._forced': and budget forcing sees to it
    rejection             samples until thinking is short enough
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from reasonrl import augmentations, records, stats

# (environment, augmentations, problems, attempt) -> `evaluation.outcomes` of these test problems,
# in their order; all processes call it alike.
Roll = Callable[[Any, tuple, np.ndarray, int], dict[str, np.ndarray]]


class Setting(NamedTuple):
  """One number of a method."""

  name: str
  env: Any
  added: tuple  # augmentations of the problems
  most: float  # thinking tokens that it allows; inf = any number
  target: float  # tokens of the whole response that were asked for; NaN = none were


@dataclasses.dataclass(frozen=True)
class Forced:
  """Budget forcing: a number of evaluation.env.controls.think_budget is each of `numbers`.

  Raises:
    UserError: a number is out of range; the environment has no think_budget with its strings.
  """

  VARIES: ClassVar[str]
  FIXED: ClassVar[str]
  LEAST: ClassVar[int]

  numbers: tuple[int, ...]
  temperature: float  # 0 = greedy

  def __post_init__(self):
    _check(self.numbers, self.LEAST)

  def settings(self, env, added: tuple) -> list[Setting]:
    found = []
    for n in self.numbers:
      both = {self.VARIES: n, self.FIXED: getattr(self, self.FIXED)}
      forced = force(drawn(env, self.temperature), **both)
      found.append(Setting(str(n), forced, added, both['max_think'] or math.inf, math.nan))
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


@dataclasses.dataclass(frozen=True)
class Asked:
  """The prompt asks for a number of tokens, or of steps of `unit_tokens` each.

  Token-conditional and step-conditional control (s1), and the targets of LCPO (arXiv 2503.04697).
  Augmentations of the run that ask for a length give way to this.
  """

  numbers: tuple[int, ...]
  temperature: float
  template: str  # added to the problem; {n} is the number
  unit_tokens: int
  forced: bool  # with budget forcing at as many tokens

  def __post_init__(self):
    _check(self.numbers, 1)
    augmentations.check_template('evaluation.budgets', 'template', self.template, '{n}')

  def settings(self, env, added: tuple) -> list[Setting]:
    env, found = drawn(env, self.temperature), []
    others = tuple(each for each in added if not augmentations.longest((each,)))
    for n in self.numbers:
      asked = (*others, augmentations.Suffix(self.template.replace('{n}', str(n))))
      tokens = n * self.unit_tokens
      within = force(env, max_think=tokens) if self.forced else env
      found.append(Setting(str(n), within, asked, tokens, tokens))
    return found


@dataclasses.dataclass(frozen=True)
class Class:
  """The prompt asks in words for short or for long thinking: class-conditional control."""

  temperature: float
  short: str
  long: str

  def settings(self, env, added: tuple) -> list[Setting]:
    env, found = drawn(env, self.temperature), []
    for name, text in (('short', self.short), ('default', ''), ('long', self.long)):
      asked = (*added, augmentations.Suffix(text)) if text else added
      found.append(Setting(name, env, asked, math.inf, math.nan))
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
    return [Setting(str(n), env, added, n, math.nan) for n in self.numbers]


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


def force(env, **numbers: int):
  """The environment with these numbers of its think_budget."""
  if 'think_budget' not in env.controls:
    raise records.UserError(
      "budget forcing needs 'think_budget' in evaluation.env.controls, for its strings; there is "
      f'{", ".join(env.controls) or "none"}'
    )
  section = {**env.controls['think_budget'], **numbers}
  return dataclasses.replace(env, controls={**env.controls, 'think_budget': section})


# ------------------------------------------------------------------------------------ measuring


def sweep(method, env, added: tuple, problems: int, roll: Roll) -> dict[str, float]:
  """Metrics of every setting, '<number>/accuracy' ..., and of all: 'control' ...

  Of a setting:
    accuracy, accuracy_low, accuracy_high   a 95 % interval; clustered by problem
    think_length, completion_length         means, tokens
    truncated                               share cut off at the cap
    within                                  share of responses that keep to the thinking allowed
    mean_error, mean_abs_error, rms_error,
    within_10, over                         of the whole response, where a length was asked for
    failed                                  share of problems without a sample that was accepted

  Of the sweep:
    control      share of settings whose mean thinking is within what they allow; of 'class', of
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
  lengths = [found[f'{setting.name}/think_length'] for setting in settings]
  accuracies = [found[f'{setting.name}/accuracy'] for setting in settings]
  if isinstance(method, Class):
    short, default, long = lengths
    found['control'] = float(np.mean([short < default, default < long]))
  else:
    most = np.asarray([setting.most for setting in settings])
    found['control'] = stats.control(lengths, -math.inf, most)
  found['scaling'] = 1e5 * stats.scaling(lengths, accuracies)
  found['performance'] = stats.performance(accuracies)
  return found


def _measure(setting: Setting, retries: int | None, problems: int, roll: Roll):
  """The outcomes of a setting, and which of them were not accepted: bool [R]."""
  table = roll(setting.env, setting.added, np.arange(problems), 0)
  none_R = np.zeros(table['group'].size, bool)
  if retries is None:
    return table, none_R
  for attempt in range(1, retries + 1):
    again = np.flatnonzero(table['think_length'] > setting.most)
    if not again.size:
      break
    new = roll(setting.env, setting.added, again, attempt)
    for name, column in table.items():
      column[again] = new[name] if name != 'group' else again
  return table, table['think_length'] > setting.most


def _describe(setting: Setting, table, failed_R) -> dict[str, float]:
  right_R = table['right'] * ~failed_R
  right_P = np.bincount(table['group'], right_R) / np.bincount(table['group'])
  low, high = stats.clustered(right_P)
  row = {'accuracy': float(right_P.mean()), 'accuracy_low': low, 'accuracy_high': high}
  row |= {name: float(np.mean(table[name])) for name in ('think_length', 'completion_length')}
  row['truncated'] = float(np.mean(table['stop'] == records.Stop.LENGTH))
  row['within'] = stats.control(table['think_length'], -math.inf, setting.most)
  if not math.isnan(setting.target):
    errors = stats.length_errors(table['completion_length'], setting.target)
    row |= errors
    off_R = np.abs(table['completion_length'] - setting.target)
    row['within_10'] = float(np.mean(10 * off_R <= setting.target))
    row['over'] = stats.violations(table['completion_length'], setting.target, 0)['one_sided']
  return row
