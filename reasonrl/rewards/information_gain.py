"""What a thought tells of the text that follows it: RLP (arXiv 2510.01265, eqs. 3 to 5).

    r(c) = sum_k gamma^k [ max(log p(x_{t+k} | x_<t, c, ...), floor)
                           - max(log p'(x_{t+k} | x_<t, ...), floor) ]     nats, k < horizon

p' reads the text without a thought. r is a number: no gradient flows through it. The published
reward is for a single next token, k = 0; more of them are an extension.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from reasonrl import records


@dataclasses.dataclass(frozen=True)
class InformationGain:
  """Needs the scores of the environment `next_token`; where it has none, it does not apply.

  Parts: `think` and `no_think`, log p of the next token; `per_token`, r / sum_k gamma^k, to compare
  horizons by; `marginal`, the gain of the mean of p over the thoughts of a context, which is no
  less than that of a thought (Jensen); `positive`, the share of gains above 0.
  """

  needs: ClassVar[tuple[str, ...]] = ('scores',)

  discount: float  # gamma, per token of a horizon above 1
  clip: float | None
  floor: float

  def __post_init__(self):
    if not 0 <= self.discount <= 1:
      raise records.UserError(f'rewards.information_gain.discount={self.discount} is not in [0, 1]')
    if self.clip is not None and self.clip <= 0:
      raise records.UserError(f'rewards.information_gain.clip={self.clip} must be above 0')

  def batch(self, tools, state, experience):
    """(r [R], parts, None)."""
    del tools, state
    scores = experience.scores
    if 'predicted' not in scores:
      return np.full(experience.reward_R.size, np.nan, np.float32), {}, None
    think_RH = np.maximum(scores['predicted'], self.floor).astype(np.float64)
    no_think_RH = np.maximum(scores['unthought'], self.floor).astype(np.float64)
    r_R = gain(think_RH, no_think_RH, self.discount)
    if self.clip is not None:
      r_R = np.clip(r_R, -self.clip, self.clip)
    group_R = np.unique(experience.group_R, return_inverse=True)[1]
    p_G = np.bincount(group_R, np.exp(think_RH[:, 0])) / np.bincount(group_R)
    parts = {
      'think': think_RH[:, 0],
      'no_think': no_think_RH[:, 0],
      'marginal': np.log(p_G)[group_R] - no_think_RH[:, 0],
      'positive': r_R > 0,
      'per_token': r_R / np.sum(self.discount ** np.arange(think_RH.shape[1])),
    }
    parts = {name: np.asarray(x, np.float32) for name, x in parts.items()}
    return r_R.astype(np.float32), parts, None


def gain(think_RH, no_think_RH, gamma: float) -> np.ndarray:
  """sum_k gamma^k (think_k - no_think_k): float64 [R]."""
  think_RH = np.asarray(think_RH, np.float64)
  return (think_RH - no_think_RH) @ gamma ** np.arange(think_RH.shape[1])
