"""A random batch that both sides are given: ragged rows with holes, logits, rewards with gaps."""

from __future__ import annotations

import dataclasses

import numpy as np

P, G, PROMPT, C, V = 3, 4, 2, 7, 5  # prompts, samples each, tokens of prompt and completion, words
B = P * G
EOS, PAD = 0, 1
REWARD_WEIGHTS = {'first': 1.0, 'second': 0.5}
KINDS = ('complete', 'some missing', 'equal and lonely')


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of a group are adjacent, because TRL groups by position."""

  tokens_BC: np.ndarray  # int64; EOS ends a row that was not cut off
  length_B: np.ndarray
  stopped_B: np.ndarray  # bool
  written_BC: np.ndarray  # bool, False in a hole: a token that the environment wrote
  logits: dict[str, np.ndarray]  # 'policy', 'old', 'ref', 'sampler': float64 [B, C, V]
  rewards: dict[str, np.ndarray]  # float64 [B]; NaN: does not apply

  @property
  def inside_BC(self) -> np.ndarray:
    return np.arange(C) < self.length_B[:, None]

  @property
  def mask_BC(self) -> np.ndarray:
    """True where the policy wrote the token."""
    return self.inside_BC & self.written_BC

  def logp(self, whose: str) -> np.ndarray:
    z_BCV = self.logits[whose]
    z_BCV = z_BCV - z_BCV.max(-1, keepdims=True)
    logp_BCV = z_BCV - np.log(np.exp(z_BCV).sum(-1, keepdims=True))
    return np.take_along_axis(logp_BCV, self.tokens_BC[..., None], -1)[..., 0]


def make(seed: int, off_policy: bool, spread: float = 0.5) -> Case:
  """Old, reference and sampler differ from the policy by noise; on policy old is the policy."""
  rng = np.random.default_rng(seed)
  length_B = rng.integers(2, C + 1, B)
  length_B[rng.integers(B)] = C
  stopped_B = rng.random(B) < 0.7
  stopped_B[:2] = True, False  # both kinds
  tokens_BC = rng.integers(2, V, (B, C))
  tokens_BC[np.arange(B)[stopped_B], length_B[stopped_B] - 1] = EOS
  written_BC = rng.random((B, C)) < 0.85
  written_BC[:, 0] = True
  policy = 1.5 * rng.normal(size=(B, C, V))
  noisy = lambda scale: policy + scale * rng.normal(size=policy.shape)
  logits = {'policy': policy, 'old': noisy(spread) if off_policy else policy}
  logits |= {'ref': noisy(0.7), 'sampler': logits['old'] + 0.3 * rng.normal(size=policy.shape)}
  rewards = {name: rng.integers(-2, 5, B) / 4 for name in REWARD_WEIGHTS}
  kind = KINDS[seed % len(KINDS)]
  if kind == 'some missing':
    rewards['first'][[1, 5, 6]] = np.nan
    rewards['second'][[1, 4, 9]] = np.nan  # row 1 has no reward at all
  if kind == 'equal and lonely':  # a group of equal rewards, a group with one reward
    rewards['first'][:G], rewards['second'][:G] = 0.75, 0.5
    for reward in rewards.values():
      reward[G + 1 : 2 * G] = np.nan
  return Case(tokens_BC, length_B, stopped_B, written_BC, logits, rewards)
