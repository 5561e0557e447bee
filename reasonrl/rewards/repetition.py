"""Against saying the same again: penalties for repeated n-grams of tokens (arXiv 2502.03373).

`Repetition` is credit for single tokens, on every token of an n-gram that was there before, with a
discount of its own: it blames what led to the loop, and not all that came before. It has no value
of the outcome. `RepetitionSparse` is an addend of the outcome, as in open-r1 and TRL.

Tokens are the sampled ids, EOS included; the authors' sparse penalty has lower-cased words.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar

from reasonrl import records
from reasonrl.rewards import answer


def repeats(ids: Sequence[int], ngram: int) -> list[int]:
  """The positions, in order, at which an n-gram begins that began before."""
  seen, found = set(), []
  for start in range(len(ids) - ngram + 1):
    gram = tuple(ids[start : start + ngram])
    if gram in seen:
      found.append(start)
    seen.add(gram)
  return found


@dataclasses.dataclass(frozen=True)
class Repetition:
  """r_t = penalty on the tokens of repeated n-grams, else 0; credit sum_{l >= 0} gamma^l r_{t+l}.

  A token in several of them is penalised once. The credit is a return already, to be added to an
  advantage as it is; with gamma 0 it is r itself, for an algorithm that makes returns of it and
  would otherwise sum twice. A completion shorter than `ngram` has zeros. The part 'repeated' is the
  share of penalised tokens.

  Raises:
    UserError: a field is out of range.
  """

  group: ClassVar[bool] = False

  ngram: int  # N, tokens
  penalty: float  # P, at most 0
  only_start: bool  # only the first n-gram of a stretch: of repeats at most N tokens apart
  gamma: float  # discount per token, of this credit alone

  def __post_init__(self):
    _check('repetition', self.ngram, 'penalty', self.penalty)
    if not 0 <= self.gamma <= 1:
      raise records.UserError(f'rewards.repetition.gamma={self.gamma} must be in [0, 1]')

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    starts = repeats(completion.token_ids, self.ngram)
    if self.only_start:
      pairs = zip([-self.ngram - 1, *starts], starts, strict=False)
      starts = [start for before, start in pairs if start - before > self.ngram]
    penalised, end = [False] * completion.num_tokens, 0
    for start in starts:
      for t in range(max(start, end), start + self.ngram):
        penalised[t] = True
      end = start + self.ngram
    returns, value = [], 0.0
    for repeated in reversed(penalised):
      value = self.penalty * repeated + self.gamma * value
      returns.append(value)
    share = sum(penalised) / max(len(penalised), 1)
    return records.Score(None, {'repeated': share}, tuple(reversed(returns)))


@dataclasses.dataclass(frozen=True)
class RepetitionSparse:
  """max_penalty times the share of n-grams that occurred before; 0 without any n-gram.

  None where `answer.Accuracy` is, if it is for wrong answers only. The part 'repeated' is that
  share.

  Raises:
    UserError: a field is out of range.
  """

  group: ClassVar[bool] = False

  ngram: int  # N, tokens
  max_penalty: float  # at most 0
  wrong_only: bool  # a right answer has 0
  after_think: bool  # these three: see answer.Accuracy, for wrong_only
  extraction: str
  require_stop: bool

  def __post_init__(self):
    _check('repetition_sparse', self.ngram, 'max_penalty', self.max_penalty)
    _ = self._accuracy

  @functools.cached_property
  def _accuracy(self) -> answer.Accuracy:
    return answer.Accuracy(self.after_think, self.extraction, self.require_stop)

  def __call__(self, example: records.Example, completion: records.Completion) -> records.Score:
    ids, spared = completion.token_ids, False
    if self.wrong_only:
      right = self._accuracy(example, completion).value
      if right is None:
        return records.Score(None, {}, None)
      spared = bool(right)
    share = len(repeats(ids, self.ngram)) / max(len(ids) - self.ngram + 1, 1)
    return records.Score(0.0 if spared else self.max_penalty * share, {'repeated': share}, None)


def _check(name: str, ngram: int, field: str, penalty: float) -> None:
  if ngram < 1:
    raise records.UserError(f'rewards.{name}.ngram={ngram} must be at least 1')
  if not -math.inf < penalty <= 0:
    raise records.UserError(f'rewards.{name}.{field}={penalty} must be a number up to 0')
