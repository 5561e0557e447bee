"""Arrays that cross a function border: axis letters, the alignment rule, the stage types.

Axis letters, written as a suffix of every such array (`logp_BT`, `hidden_MD`):

    P prompts      G samples per prompt   B rows (sequences)   T positions    V vocabulary
    D width        H query heads          K key/value heads    C head channels
    N layers       F feed-forward width   S cache slots        M scored tokens  R rollouts

Alignment: index t of any `_BT` array speaks about token t (its log-probability, mask, advantage).
The first token of every segment has mask 0; segment id 0 is padding. EOS is a policy token: sampled,
stored, masked 1. Padding is known from lengths, never from a token id. Rows are right-padded and
contiguous: prompt, completion, padding; no holes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from reasonrl import records

# source_BT: who wrote a token. Only POLICY tokens carry gradient.
PROMPT, POLICY, ENVIRONMENT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Experience:
  """What an environment returns: B rows on the host (NumPy), grouped by id and never by position."""

  tokens_BT: np.ndarray  # int32
  prompt_length_B: np.ndarray  # int32, tokens before the first policy token
  length_B: np.ndarray  # int32, prompt + completion
  source_BT: np.ndarray  # int8: PROMPT | POLICY | ENVIRONMENT
  logp_BT: np.ndarray  # float32, the sampler's log-probability; 0 where source != POLICY
  stop_B: np.ndarray  # int32, records.Stop
  version_B: np.ndarray  # int32, optimizer step of the parameters that sampled the row
  group_B: np.ndarray  # int32, rows of one prompt share it
  rollout_B: np.ndarray  # int32, index into [R]; several rows (turns, threads) may form one rollout
  reward_R: np.ndarray  # float32, weighted sum of the parts; NaN: no reward applies
  parts: dict[str, np.ndarray]  # name -> float32 [R]; NaN = does not apply
  reward_BT: np.ndarray | None  # float32, optional dense reward
  scores: dict[str, np.ndarray]  # what algorithm.needs names: 'old_logp', 'ref_logp' -> float32 [B,T]
  examples: tuple[records.Example, ...]  # [R], for the logs
  completions: tuple[records.Completion, ...]  # [R], for the logs

  @property
  def mask_BT(self) -> np.ndarray:
    """float32 policy mask: 1 exactly on sampled tokens, EOS included."""
    return (self.source_BT == POLICY).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One packed micro-batch on the device. Every `_BM` array speaks about token `index_BM` of its row.

  The log-probability of token t is read from the hidden state at t - 1, so index >= 1 wherever
  weight > 0. Unused slots have index 1 and weight 0.
  """

  tokens_BT: jax.Array  # int32
  positions_BT: jax.Array  # int32, restart at 0 in every segment
  segments_BT: jax.Array  # int32, 0 = padding
  index_BM: jax.Array  # int32, which tokens are scored
  aux: dict[str, jax.Array]  # 'weight' and what the term needs ('adv', 'old_logp', ...): [B, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an optimizer step changes."""

  params: Any
  opt_state: Any
  ema: Any  # exponential moving average of params, or None
  step: jax.Array  # int32, optimizer steps tried in this phase
  skipped: jax.Array  # int32, consecutive steps skipped because a loss or gradient was not finite
