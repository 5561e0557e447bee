"""Where a task's randomness comes from, and what keeps its test problems out of training.

A problem belongs to the test split when a hash of its text says so: whatever the seed, the index or
the mixture, no problem is in both splits, and a run with another seed is still tested on problems
that it never trained on. A task draws problems until one falls into the split that was asked for.

Only `random.Random.random()` is used: it is the one method whose numbers Python promises to keep
between versions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from reasonrl import records

SPLITS = ('train', 'test')
TEST_ONE_IN = 8  # the share of all problems that is kept for the test split
MAX_DRAWS = 10_000

T = TypeVar('T')


def split_of(key: str) -> str:
  """The split of the problem that `key` names; `key` holds what makes it a different problem."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return 'test' if int.from_bytes(digest, 'big') % TEST_ONE_IN == 0 else 'train'


def check(split: str, index: int) -> None:
  """Raises UserError for an unknown split or a negative index."""
  if split not in SPLITS:
    raise records.UserError(f'unknown split {split!r}; choices: {", ".join(SPLITS)}')
  if index < 0:
    raise records.UserError(f'index {index} of an example is negative')


def generator(seed: int, split: str, index: int) -> random.Random:
  """The generator of one example; raises what `check` raises."""
  check(split, index)
  return random.Random(f'{seed}/{split}/{index}')


def choose(uniform: Callable[[], float], choices: Sequence[T]) -> T:
  """One of `choices`, each as likely as any other; `uniform` draws from [0, 1)."""
  return choices[int(uniform() * len(choices))]


def draw(split: str, problem: Callable[[], T], key: Callable[[T], str]) -> T:
  """Calls `problem()` until `key` of what it returns lies in `split`.

  Raises:
    UserError: after MAX_DRAWS tries; the task has too few problems to fill both splits.
  """
  for _ in range(MAX_DRAWS):
    found = problem()
    if split_of(key(found)) == split:
      return found
  raise records.UserError(
    f'no {split} problem among {MAX_DRAWS} draws: the task has too few different problems to '
    f'keep one in {TEST_ONE_IN} for the test; widen its ranges'
  )
