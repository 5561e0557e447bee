"""What is added to a problem before it is rendered: a length target, a level of effort, a label.

An augmentation is a pure function of (seed, example): all samples of a group and their rewards see
the same problem and the same `meta`, where what it decided is stored. Several apply in order: in a
config, that of their names.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

from reasonrl import records


@dataclasses.dataclass(frozen=True)
class LengthTarget:
  """Asks for a number of tokens, uniform and per problem (L1, arXiv 2503.04697).

  `records.length_target` of the new example says what was asked.

  Raises:
    UserError: a field is out of range; with an example that has a target already.
  """

  min_tokens: int
  max_tokens: int
  step: int  # targets are min_tokens, min_tokens + step, ...
  share_max: float  # probability that the number is a maximum
  template_exact: str  # added to the problem; {n} is the number
  template_max: str

  def __post_init__(self):
    if not 1 <= self.min_tokens <= self.max_tokens:
      raise records.UserError(
        f'length_target: min_tokens={self.min_tokens}, max_tokens={self.max_tokens}: '
        '1 <= min_tokens <= max_tokens'
      )
    if self.step < 1:
      raise records.UserError(f'length_target.step={self.step} must be at least 1')
    if not 0 <= self.share_max <= 1:
      raise records.UserError(f'length_target.share_max={self.share_max} must be in [0, 1]')
    for name in ('template_exact', 'template_max'):
      check_template('length_target', name, getattr(self, name), '{n}')

  @property
  def longest(self) -> int:
    """The most tokens that it asks for."""
    return self.max_tokens

  def __call__(self, seed: int, example: records.Example) -> records.Example:
    uniform = _generator(seed, 'length_target', example).random
    choices = (self.max_tokens - self.min_tokens) // self.step + 1
    tokens = self.min_tokens + self.step * int(uniform() * choices)
    if uniform() < self.share_max:
      mode, template = records.MAX, self.template_max
    else:
      mode, template = records.EXACT, self.template_exact
    return _targeted(example, template.replace('{n}', str(tokens)), mode, tokens, {})


@dataclasses.dataclass(frozen=True)
class Effort:
  """Asks for a level of effort, which is a number of tokens: by its name, or by that number.

  `records.length_target` of the new example has it, and meta['effort'] its level.

  Raises:
    UserError: a field is out of range; with an example that has a target already.
  """

  levels: Mapping[str, int]  # level -> tokens
  level: str  # of all problems; '' = drawn, each as likely as any other
  mode: str  # of records.LENGTH_MODES
  template: str  # added to the problem; {level} is the level, {n} its tokens

  def __post_init__(self):
    if not self.levels or min(self.levels.values()) < 1:
      raise records.UserError(f'effort.levels={dict(self.levels)}: level -> at least 1 token')
    if self.level not in ('', *self.levels):
      choices = ', '.join(self.levels)
      raise records.UserError(f"effort.level={self.level!r} is not '' or one of {choices}")
    if self.mode not in records.LENGTH_MODES:
      choices = ', '.join(records.LENGTH_MODES)
      raise records.UserError(f'effort.mode={self.mode!r} is not one of {choices}')
    check_template('effort', 'template', self.template, '{level}', '{n}')

  @property
  def longest(self) -> int:
    """The most tokens that it asks for."""
    return max(self.levels.values())

  def __call__(self, seed: int, example: records.Example) -> records.Example:
    uniform, names = _generator(seed, 'effort', example).random, sorted(self.levels)
    level = self.level or names[int(uniform() * len(names))]
    text = self.template.replace('{level}', level).replace('{n}', str(self.levels[level]))
    return _targeted(example, text, self.mode, self.levels[level], {'effort': level})


@dataclasses.dataclass(frozen=True)
class LengthLabel:
  """Says how long the sampled solution of an example is: what it asks for is what is learned.

  Of examples that a phase collected. Token-conditional control labels with the tokens of thinking,
  rounded up to a power of two, step-conditional control with its steps (arXiv 2501.19393); exact
  numbers of the whole response are the baseline that LCPO is compared with (arXiv 2503.04697).

  Raises:
    UserError: `unit` is unknown, `template` has no {n}; with an example that was not collected.
  """

  unit: str  # of UNITS
  power_of_two: bool  # rounded up to one
  separator: str  # between steps
  template: str  # added to the problem; {n} is the number

  def __post_init__(self):
    if self.unit not in UNITS:
      choices = ', '.join(UNITS)
      raise records.UserError(f'length_label.unit={self.unit!r} is not one of {choices}')
    if not self.separator:
      raise records.UserError("length_label.separator='' separates nothing")
    check_template('length_label', 'template', self.template, '{n}')

  def __call__(self, seed: int, example: records.Example) -> records.Example:
    del seed
    if records.TOKEN_IDS not in example.meta:
      raise records.UserError(
        f'length_label: {example.task}/{example.split}/{example.index} was not collected by a '
        'phase, and has no sampled solution to label'
      )
    if records.length_target(example):
      raise records.UserError(
        f'length_label: {example.task}/{example.split}/{example.index} was collected under a '
        'length target, which its problem names already'
      )
    return self.labelled(example, UNITS[self.unit](example, self.separator))

  def labelled(self, example: records.Example, n: int) -> records.Example:
    n = max(n, 1)
    if self.power_of_two:
      n = 1 << (n - 1).bit_length()
    text = self.template.replace('{n}', str(n))
    return dataclasses.replace(example, problem=example.problem + text)


UNITS = {  # what a label counts: (example, separator) -> number
  'tokens': lambda example, separator: len(example.meta[records.TOKEN_IDS]),
  'think_tokens': lambda example, separator: example.meta[records.THINK_LENGTH],
  'steps': lambda example, separator: (
    (records.think_span(example.solution) or '').count(separator) + 1
  ),
}


@dataclasses.dataclass(frozen=True)
class Suffix:
  """Adds a text to the problem.

  Raises:
    UserError: it is empty.
  """

  text: str

  def __post_init__(self):
    if not self.text:
      raise records.UserError("suffix.text='' adds nothing")

  def __call__(self, seed: int, example: records.Example) -> records.Example:
    del seed
    return dataclasses.replace(example, problem=example.problem + self.text)


AUGMENTATIONS = {
  'length_target': LengthTarget,
  'effort': Effort,
  'length_label': LengthLabel,
  'suffix': Suffix,
}


def augment(augmentations, seed: int, example: records.Example) -> records.Example:
  """The example that prompt, reward and transcript will see; a pure function of its arguments.

  What was collected was augmented before it was sampled: only what labels it applies.
  """
  for augmentation in augmentations:
    if records.TOKEN_IDS not in example.meta or isinstance(augmentation, LengthLabel):
      example = augmentation(seed, example)
  return example


def imagined(augmentations, seed: int, example: records.Example) -> records.Example:
  """`augment` before anything is collected, with made-up labels: to train a tokenizer on."""
  for augmentation in augmentations:
    if isinstance(augmentation, LengthLabel):
      n = 1 << example.index % 16 if augmentation.power_of_two else example.index + 1
      example = augmentation.labelled(example, n)
    else:
      example = augmentation(seed, example)
  return example


def longest(augmentations) -> int:
  """The most tokens that one of them asks for; 0 = none asks."""
  return max((getattr(augmentation, 'longest', 0) for augmentation in augmentations), default=0)


def check_template(name: str, field: str, template: str, *holes: str) -> None:
  if not any(hole in template for hole in holes):
    raise records.UserError(f'{name}.{field}={template!r} has no {" or ".join(holes)}')


def _generator(seed: int, name: str, example: records.Example) -> random.Random:
  """Of one augmentation of one example. Only `random()`, which Python keeps between versions."""
  return random.Random(f'{seed}/{name}/{example.task}/{example.split}/{example.index}')


def _targeted(example, text: str, mode: str, tokens: int, facts: dict) -> records.Example:
  if records.length_target(example):
    raise records.UserError(
      f'augmentations: {example.task}/{example.split}/{example.index} has a length target '
      'already; one of them is enough'
    )
  target = {records.TARGET_LENGTH: tokens, records.LENGTH_MODE: mode}
  return dataclasses.replace(
    example, problem=example.problem + text, meta={**example.meta, **target, **facts}
  )
