"""Right, and as long as was asked: LCPO (arXiv 2503.04697).

    exact   1[right] - alpha |n_gold - n|                                       eq. 1
    max     1[right] clip(alpha (n_gold - n) + delta, 0, 1)                     eq. 2

n is the whole response as it was sampled, thinking, answer and EOS. The target n_gold and its mode
are facts of the example, which a prompt augmentation decides (see `augmentations`): constant within
a group. A wrong answer on target beats a right one that is more than 1 / alpha tokens off;
the paper has alpha n_gold <= 1.2.

Left out on purpose: the sigmoid forms of the paper's appendix, which do no better.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

from reasonrl import records
from reasonrl.rewards import answer


def _clip(x: float) -> float:
  return min(max(x, 0.0), 1.0)


MAX_FORMS = {  # (right, alpha (n_gold - n), delta) -> value where the target is a maximum
  'paper': lambda right, slack, delta: right * _clip(slack + delta),
  # The slope of the authors' repository, half of it, with delta 1/2.
  'repository': lambda right, slack, delta: right * _clip(slack / 2 + 0.5),
  # An ablation: short wrong answers are paid, and the model collapses to them.
  'additive': lambda right, slack, delta: right + _clip(slack + delta),
}


@dataclasses.dataclass(frozen=True)
class LCPO:
  """Correctness (`answer.Accuracy`) joined with a token budget.

  None where Accuracy is, or where the example has no target. Its parts are named by the mode, so
  that the two can be told apart: 'exact/right' and

      length_error   (n - n_gold) / n_gold
      deviation      |n - n_gold| / n_gold
      within_10      1 if the deviation is at most .1
      over           1 if n - n_gold is above violation_tokens: what can violate a maximum
      far            1 if |n - n_gold| is, as the paper prints it

  Raises:
    UserError: a field is out of range.
  """

  group: ClassVar[bool] = False

  after_think: bool  # these three: see answer.Accuracy
  extraction: str
  require_stop: bool
  alpha: float  # of the reward, per token
  delta: float  # 'max': what a right answer of just the target's length earns
  max_form: str  # of MAX_FORMS
  violation_tokens: int  # above the target, before it counts as a violation

  def __post_init__(self):
    _ = self._accuracy
    if not 0 <= self.alpha < math.inf:
      raise records.UserError(f'rewards.lcpo.alpha={self.alpha} must be a number from 0 up')
    if not 0 <= self.delta <= 1:
      raise records.UserError(f'rewards.lcpo.delta={self.delta} must be in [0, 1]')
    if self.max_form not in MAX_FORMS:
      raise records.UserError(
        f'rewards.lcpo.max_form={self.max_form!r} is not one of {", ".join(MAX_FORMS)}'
      )
    if self.violation_tokens < 0:
      raise records.UserError(
        f'rewards.lcpo.violation_tokens={self.violation_tokens} must be at least 0'
      )

  @functools.cached_property
  def _accuracy(self) -> answer.Accuracy:
    return answer.Accuracy(self.after_think, self.extraction, self.require_stop)

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    right, target = self._accuracy(example, completion).value, records.length_target(example)
    if right is None or target is None:
      return records.Score(None, {}, None)
    mode, gold = target
    over = completion.num_tokens - gold
    if mode == records.EXACT:
      value = right - self.alpha * abs(over)
    else:
      value = MAX_FORMS[self.max_form](right, -self.alpha * over, self.delta)
    parts = {
      'right': right,
      'length_error': over / gold,
      'deviation': abs(over) / gold,
      'within_10': float(10 * abs(over) <= gold),
      'over': float(over > self.violation_tokens),
      'far': float(abs(over) > self.violation_tokens),
    }
    return records.Score(value, {f'{mode}/{name}': part for name, part in parts.items()}, None)
