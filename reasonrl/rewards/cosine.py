"""Right and short before right and long, wrong and long before wrong and short (arXiv 2502.03373).

    R = r_L + (r_0 - r_L) (1 + cos(pi n / L)) / 2        n tokens of at most L, EOS included

with one pair (r_0, r_L) for right answers and one for wrong ones: r_0 at length 0, r_L at L. Who
comes within `margin` tokens of L, or passes it, gets r_e, right or not.

The paper's classic reward (1, 0, and 0 for what was cut off) is `accuracy` with require_stop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

from reasonrl import records
from reasonrl.rewards import answer


@dataclasses.dataclass(frozen=True)
class Cosine:
  """Correctness (`answer.Accuracy`) shaped by the length; None where Accuracy is.

  Nothing is asked of the order of the values: a reward that pays long answers is an experiment too
  (the paper's variant A).

  Raises:
    UserError: a value is not finite, or max_length or margin is below 0.
  """

  group: ClassVar[bool] = False

  after_think: bool  # these three: see answer.Accuracy
  extraction: str
  require_stop: bool
  value_correct_at_0: float  # r_0^c
  value_correct_at_max: float  # r_L^c
  value_wrong_at_0: float  # r_0^w
  value_wrong_at_max: float  # r_L^w
  value_exceeded: float  # r_e
  max_length: int  # L, tokens, at most the cap of the completion; 0 = the cap
  margin: int  # tokens

  def __post_init__(self):
    _ = self._accuracy
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.startswith('value_') and not math.isfinite(value):
        raise records.UserError(f'rewards.cosine.{field.name}={value} must be finite')
    for name in ('max_length', 'margin'):
      if getattr(self, name) < 0:
        raise records.UserError(f'rewards.cosine.{name}={getattr(self, name)} must be at least 0')

  @functools.cached_property
  def _accuracy(self) -> answer.Accuracy:
    return answer.Accuracy(self.after_think, self.extraction, self.require_stop)

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    right, tokens = self._accuracy(example, completion).value, completion.num_tokens
    if right is None:
      return records.Score(None, {}, None)
    longest = min(self.max_length or completion.cap, completion.cap)
    exceeded = tokens + self.margin >= longest
    if exceeded:  # what is left has tokens < longest: the cosine never turns up again
      value = self.value_exceeded
    elif right:
      value = cosine(tokens / longest, self.value_correct_at_0, self.value_correct_at_max)
    else:
      value = cosine(tokens / longest, self.value_wrong_at_0, self.value_wrong_at_max)
    return records.Score(value, {'right': right, 'exceeded': float(exceeded)}, None)


def cosine(progress: float, at_0: float, at_1: float) -> float:
  """Half a period of a cosine from `at_0` at progress 0 to `at_1` at progress 1."""
  return at_1 + (at_0 - at_1) * (1 + math.cos(math.pi * progress)) / 2
