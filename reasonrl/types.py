"""Arrays that cross a function border: axis letters, the alignment rule, the stage types.

Axis letters, written as a suffix of every such array (`logp_BT`, `hidden_MD`):

    P prompts      G samples per prompt   B rows (sequences)   T positions    V vocabulary
    D width        H query heads          K key/value heads    C head channels
    N layers       F feed-forward width   S cache slots        M scored tokens  R rollouts

In a `support` K counts token ids.

Alignment: index t of any `_BT` array speaks about token t (its log-probability, mask, advantage).
The first token of every sequence has mask 0; segment id 0 is padding. EOS is a policy token:
sampled, stored, masked 1. Padding is known from lengths, never from a token id. Rows are
right-padded and contiguous: prompt, completion, padding; no holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from reasonrl import records

# The axes of the device mesh, and how rows of a batch (slots of the sampler) are split over it.
MESH_AXES = ('data', 'fsdp', 'tensor')
ROWS = PartitionSpec(('data', 'fsdp'))

# source_BT: who wrote a token. Only POLICY tokens carry gradient.
PROMPT, POLICY, ENVIRONMENT = 0, 1, 2


class Rows(NamedTuple):
  """B rows of tokens (host arrays) and which of them to score."""

  tokens_BT: np.ndarray  # int32
  length_B: np.ndarray  # int32
  drawn_BT: np.ndarray  # float32, 1: at the learner's temperature, on what it was drawn from
  plain_BT: np.ndarray  # float32, 1: as text, at temperature 1 on the whole vocabulary
  support: dict[str, np.ndarray]  # as Experience.support


class Scores(NamedTuple):
  """What a model says of scored tokens, 0 elsewhere: float32 [B, T]."""

  logp_BT: np.ndarray
  entropy_BT: np.ndarray  # nats, of the distribution that the token is scored under
  likeliest_BT: np.ndarray  # 1 where no token is more likely


@dataclasses.dataclass(frozen=True)
class Experience:
  """What an environment returns: B rows of NumPy, grouped by id and never by position."""

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
  reward_weights: dict[str, float]  # reward -> its weight in reward_R
  reward_BT: np.ndarray | None  # float32, optional dense reward
  # What each token was drawn from, if not from the whole vocabulary: 'kept' ids or what is left
  # without 'barred' ones. int32 [B, T, K], -1 = padding; a token without ids leaves nothing out.
  support: dict[str, np.ndarray]
  # By name: what algorithm.needs ('old_logp', ...), [B, T]; what an environment's rewards read, [B]
  # or [B, n].
  scores: dict[str, np.ndarray]
  examples: tuple[records.Example, ...]  # [R], for the logs
  completions: tuple[records.Completion, ...]  # [R], for the logs

  @property
  def mask_BT(self) -> np.ndarray:
    """float32 policy mask: 1 exactly on sampled tokens, EOS included."""
    return (self.source_BT == POLICY).astype(np.float32)

  @property
  def rows(self) -> Rows:
    """To score every sampled token as it was drawn."""
    return Rows(
      self.tokens_BT, self.length_B, self.mask_BT, np.zeros_like(self.mask_BT), self.support
    )

  @property
  def first_row_R(self) -> np.ndarray:
    """The first row of each rollout."""
    return np.unique(self.rollout_B, return_index=True)[1]

  @property
  def group_R(self) -> np.ndarray:
    """The group of each rollout."""
    return self.group_B[self.first_row_R]


def padded(length: int) -> int:
  """The width that prompts of at most `length` tokens are padded to: few shapes, few programs."""
  return length + -length % 16


@dataclasses.dataclass(frozen=True)
class Spec:
  """How tokens are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep everything.

  After the temperature top-k applies, then top-p to what it left, then min-p (the order of Hugging
  Face; vLLM applies min-p first, so that there top-p counts what min-p left).
  """

  temperature: float
  top_k: int
  top_p: float
  min_p: float
  max_kept_tokens: int  # most ids of a truncated draw to remember; 0 = remember none
  stop_ids: tuple[int, ...]
  controls: tuple  # of `controls`, in the order in which they apply

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or self.max_kept_tokens < 0 or not self.stop_ids:
      raise records.UserError(
        f'sampling: temperature={self.temperature}, top_k={self.top_k} and '
        f'max_kept_tokens={self.max_kept_tokens} must be >= 0, stop_ids={self.stop_ids} not empty'
      )
    if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
      raise records.UserError(
        f'sampling: top_p={self.top_p} must be in (0, 1], min_p={self.min_p} in [0, 1]'
      )

  @classmethod
  def of(cls, env, eos_ids, controls: tuple) -> Spec:
    """How an environment draws, from its fields."""
    drawn = (env.temperature, env.top_k, env.top_p, env.min_p, env.max_kept_tokens)
    return cls(*drawn, tuple(eos_ids), controls)

  @property
  def truncates(self) -> bool:
    """Whether a token may be left out of a draw; a greedy one takes the most likely of all."""
    return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclasses.dataclass(frozen=True)
class Requests:
  """R requests over P prompts (host arrays). Requests of one prompt share its prefill."""

  tokens_PT: np.ndarray  # int32, right-padded
  length_P: np.ndarray  # int32, at least 1
  prompt_R: np.ndarray  # int32, which prompt each request continues
  key_R: np.ndarray  # uint32 [R, 2], from `sampling.row_keys`
  max_new_R: np.ndarray  # int32, the most tokens each may get
  numbers: dict[str, np.ndarray]  # of the controls: int32 [R] each
  temperature_R: np.ndarray | None  # float32, in the place of the spec's; 0 is greedy


@dataclasses.dataclass(frozen=True)
class Samples:
  """What came back, by request (host arrays)."""

  tokens_RS: np.ndarray
  prompt_length_R: np.ndarray
  length_R: np.ndarray
  source_RS: np.ndarray
  # Of the distribution that was sampled from: tempered, truncated, renormalised (of greedy tokens:
  # at temperature 1, nothing left out); 0 where source is not POLICY.
  logp_RS: np.ndarray
  # Of the same tokens at temperature 1, nothing left out.
  plain_logp_RS: np.ndarray
  # Nats, of the tempered distribution before anything is left out; 0 where source is not POLICY.
  entropy_RS: np.ndarray
  stop_R: np.ndarray
  kept_RSK: np.ndarray | None  # as Experience.support; None: nothing left out, or not remembered


class BatchScore(NamedTuple):
  """What a reward says of all rollouts of an experience."""

  value_R: np.ndarray  # float32; NaN: does not apply
  parts: dict[str, np.ndarray]  # named components, for the logs: float32 [R]
  reward_BT: np.ndarray | None  # dense credit, float32


@dataclasses.dataclass(frozen=True)
class Tools:
  """What an environment may use; built by `tooling.make_tools`.

  sampler: the compiled stages (prefill, decode, append, fork), for several turns.
  examples() -> the next prompts' examples.
  render(example) -> prompt token ids; `prefill` is the completion text they already hold.
  text(example) -> ids of a text (of its `solution`), and the index of the first one behind BOS.
  row_keys(step, prompt_R, sample_R, thread_R) -> uint32 [R, 2].
  generate(params, requests, spec, slots) -> Samples.
  score(params, rows: Rows) -> Scores.
  reward(state, experience) -> the experience with its rewards.
  """

  task: Any
  tokenizer: Any
  sampler: Any
  prefill: str
  examples: Callable
  render: Callable
  text: Callable
  row_keys: Callable
  generate: Callable
  score: Callable
  reward: Callable


class Sequence(NamedTuple):
  """One unpadded row for the learner: its tokens, which of them are scored, and aux there."""

  tokens_T: np.ndarray
  index_M: np.ndarray
  aux: dict[str, np.ndarray]  # float32 [N], or ids: int32 [N, K], padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One packed micro-batch on the device. `_BM` arrays speak about token `index_BM`.

  A sequence is a segment, or two: the one that it continues, for all that do so, and its own.
  Unused slots have weight 0, index 1 and before 0.
  """

  tokens_BT: jax.Array  # int32
  positions_BT: jax.Array  # int32, of a token in its sequence
  segments_BT: jax.Array  # int32, 0 = padding
  # int32, the segment that a token's own one continues, its own where it begins a sequence. None:
  # every segment is a whole sequence.
  prefixes_BT: jax.Array | None
  index_BM: jax.Array  # int32, which tokens are scored
  before_BM: jax.Array  # int32, the token before each, whose hidden state it is read from
  # 'weight' and what the terms need ('adv', 'old_logp', ...): [B, M]; of the support of each token,
  # where it is not the whole vocabulary, 'kept' and 'barred', [B, M, K], and 'plain', [B, M].
  aux: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an optimizer step changes."""

  params: Any
  opt_state: Any
  ema: Any  # exponential moving average of params, or None
  skipped: jax.Array  # int32, consecutive steps skipped because a loss or gradient was not finite
