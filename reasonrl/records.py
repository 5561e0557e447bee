"""Records that cross the border between text and tensors: plain Python, no JAX.

    Example     a problem, its answer and (for supervised learning) a worked solution
    Completion  what the policy wrote for it
    Score       what a reward says of that

Rewards run in worker processes that never import JAX, so these types, the tasks and the rewards
must stay importable without it.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

THINK_OPEN, THINK_CLOSE = '<think>', '</think>'
ANSWER_OPEN, ANSWER_CLOSE = '<answer>', '</answer>'
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
# Key of Example.meta where equality with `answer` does not decide: names the reward that does.
CHECKED_BY = 'checked_by'
# Keys of Example.meta for hints, see `show_hint`: the problem with its answer in it, where the task
# has its own form of that; True where `problem` shows the answer.
HINTED, HINT_SHOWN = 'hinted', 'hint_shown'
# Key of Example.meta: the ids of the solution as they were sampled, EOS included. They are what is
# learned: encoding the text again may give other ids.
TOKEN_IDS = 'token_ids'
# Key of Example.meta: how many tokens of a sampled solution are thinking.
THINK_LENGTH = 'think_length'
# Key of Example.meta where `solution` is a text to read and there is no problem: WHOLE, or PART of
# one, which then does not end with EOS. CLASSES: what kind of token stands where, as [first
# character, one behind the last, kind, the thought that would help to predict it or ''].
# UNTRAINED: what of it is read and not learned, as [first character, one behind the last].
TEXT, WHOLE, PART = 'text', 'whole', 'part'
CLASSES, UNTRAINED = 'classes', 'untrained'
# Keys of Example.meta of a position in a text: the kind of its next token, that thought, and the
# token. Of what a model said instead the first token (None: it said nothing), the number of tokens,
# and the text; beside that how many bytes 1, 2, ... of the next tokens are.
CLASS, TRACE, NEXT_ID = 'class', 'trace', 'next_id'
SAID_ID, SAID_SIZE, SAID, NEXT_BYTES = 'said_id', 'said_size', 'said', 'next_bytes'
# Keys of Example.meta for a target of the response's length: how many tokens, thinking, answer and
# EOS together; and whether that is what it should have or the most that it may.
TARGET_LENGTH, LENGTH_MODE = 'target_length', 'length_mode'
EXACT, MAX = LENGTH_MODES = ('exact', 'max')


class UserError(ValueError):
  """Bad input: one line that names the value and the choices. `main` prints it bare."""


class Stop(enum.IntEnum):
  """Why a row stopped growing. RUNNING never leaves the sampler."""

  RUNNING = 0
  EOS = 1  # one of the stop ids was sampled
  LENGTH = 2  # the cap on new tokens, or the window, was reached


@dataclasses.dataclass(frozen=True)
class Example:
  """One problem; (split, index) is its identity."""

  task: str  # in a mixture: the member
  split: str  # 'train' | 'test'
  index: int  # position in the random-access stream of the run's task; of a file: the row
  problem: str  # what the user asks, before any prompt template
  answer: str  # the gold answer, or one of them
  solution: str | None  # a whole target completion, without EOS; None: the task has none
  meta: dict[str, Any]  # JSON-able facts: difficulty, prompt augmentations, ...


def show_hint(example: Example) -> Example:
  """The example with its answer shown in the problem: meta[HINTED], else 'problem (answer)'.

  For rationalisation (STaR, arXiv 2203.14465). It replaces the problem, and so what an augmentation
  has made of it.

  Raises:
    ValueError: it is shown already.
  """
  if HINT_SHOWN in example.meta:
    raise ValueError(f'{example.task}/{example.split}/{example.index} shows its hint already')
  problem = example.meta.get(HINTED, f'{example.problem} ({example.answer})')
  return dataclasses.replace(example, problem=problem, meta={**example.meta, HINT_SHOWN: True})


def length_target(example: Example) -> tuple[str, int] | None:
  """(mode, tokens) that the response should have; None: the example has no such target."""
  mode, tokens = example.meta.get(LENGTH_MODE), example.meta.get(TARGET_LENGTH)
  if mode in LENGTH_MODES and isinstance(tokens, int) and tokens > 0:
    return mode, tokens
  return None


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled completion, as rewards see it."""

  text: str  # decoded, EOS removed, tags kept
  token_ids: tuple[int, ...]  # sampled, or written by a control; EOS included
  num_tokens: int  # len(token_ids)
  think: str | None  # the text between the first <think> and the next </think>, None: no such span
  stop: Stop
  cap: int  # the largest num_tokens this completion could have had


@dataclasses.dataclass(frozen=True)
class Score:
  """What one reward says of one completion. `value` None: the reward does not apply here."""

  value: float | None
  parts: dict[str, float]  # named components, for the logs
  # Credit of every token of the completion: a reward to an algorithm that makes returns, else added
  # to the token's advantage as it is.
  token_values: tuple[float, ...] | None


def split_think(text: str) -> tuple[str, str, str]:
  """(before, from the first <think> to the next </think>, after); (text, "", "") without a pair."""
  before, opened, rest = text.partition(THINK_OPEN)
  span, closed, after = rest.partition(THINK_CLOSE)
  return (before, opened + span + closed, after) if opened and closed else (text, '', '')


def think_span(text: str) -> str | None:
  """The text between the first <think> and the next </think>; None if there is no such pair."""
  think = split_think(text)[1]
  return think[len(THINK_OPEN) : -len(THINK_CLOSE)] if think else None
