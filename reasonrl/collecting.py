"""What a phase of kind 'collect' keeps of its rollouts: rows of a dataset to learn from.

A kept completion is right, whole, and new:

1. right: the reward that decides the example says 1 (the indicator of STaR, arXiv 2203.14465);
2. whole: it ends with EOS, or the reward knows where the answer ends (`trim`) and what follows is
   cut off. Its ids are those that were sampled;
3. new: no row has the same problem and text, and the problem has fewer than `max_per_problem` rows:
   of more, the first ones are kept.

A row is stored with the problem as it was asked, and where that showed a hint, without it, unless
p_show_hint_save drew otherwise.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Any

from reasonrl import evaluation, records, types


def ids_of(tokenizer, completion: records.Completion, prefill: str, text: str) -> list[int]:
  """Ids of `text`, with which the completion begins, EOS included.

  They are the sampled ones; if the end of `text` splits one of them, what is left is encoded.
  `prefill` is the beginning of both texts that the prompt holds.
  """
  ids = list(completion.token_ids)
  stopped = completion.stop == records.Stop.EOS and ids[-1] in tokenizer.eos_ids
  if stopped and text == completion.text:
    return ids
  said = ids[:-1] if stopped else ids
  decode = lambda n: prefill + tokenizer.decode(said[:n], skip_special=False)
  low, high = 0, len(said)
  while low < high:  # the most ids whose text is not longer
    middle = (low + high + 1) // 2
    low, high = (middle, high) if len(decode(middle)) <= len(text) else (low, middle - 1)
  while low and not text.startswith(decode(low)):  # half a character
    low -= 1
  rest = text[len(decode(low)) :]
  return [*said[:low], *tokenizer.encode_user(rest), tokenizer.eos_ids[0]]


NOT_STORED = (records.HINTED, records.TOKEN_IDS)  # no row shows an answer that was not asked for


@dataclasses.dataclass(frozen=True)
class Keeper:
  """Turns the completions of an experience that are right and whole into rows.

  Attributes:
    correct: the reward that means 'right', where the example names no other.
    rewards: name -> (function, weight).
    tokenizer: of the policy.
    prefill: how every completion begins, already in the prompt.
  """

  correct: str
  rewards: dict[str, tuple[Any, float]]
  tokenizer: Any
  prefill: str

  def solved(self, experience: types.Experience) -> set[int]:
    """The groups with a right completion."""
    right_R = evaluation.right(experience, self.correct)
    return set(experience.group_R[right_R == 1].tolist())

  def rows(self, experience: types.Experience, stored, prompts, **place) -> list[dict[str, Any]]:
    """What to learn and where it comes from, a row for each, in the order of the rollouts.

    Args:
      stored: the examples that were asked, by their groups, as they are to be stored.
      prompts: their places in the step.
      place: 'phase', 'iteration' and 'step', for every row.
    """
    samples, found = collections.Counter(), []
    for r, ok in enumerate(evaluation.right(experience, self.correct)):
      example, completion = experience.examples[r], experience.completions[r]
      group = int(experience.group_R[r])
      store, prompt = stored[group], prompts[group]
      sample, samples[group] = samples[group], samples[group] + 1
      text = self._whole(example, completion) if ok else None
      if text is None:
        continue
      ids = ids_of(self.tokenizer, completion, self.prefill, text)
      if len(ids) > completion.cap + 1:  # a token was split into several: it may not fit a row
        continue
      found.append(
        {
          'task': store.task,
          'split': store.split,
          'index': store.index,
          **place,
          'prompt': prompt,
          'sample': sample,
          'hinted': records.HINT_SHOWN in example.meta,
          'reward': float(experience.reward_R[r]),
          'parts': {name: float(part_R[r]) for name, part_R in experience.parts.items()},
          'problem': store.problem,
          'answer': store.answer,
          'solution': text,
          'token_ids': ids,
          'meta': {
            **{key: fact for key, fact in store.meta.items() if key not in NOT_STORED},
            records.THINK_LENGTH: evaluation.think_tokens(self.tokenizer, completion),
          },
        }
      )
    return found

  def _whole(self, example, completion) -> str | None:
    """The text to keep of a right completion; None if it does not end, or ends in the prefill."""
    reward = self.rewards[example.meta.get(records.CHECKED_BY, self.correct)][0]
    if hasattr(reward, 'trim'):
      text = reward.trim(completion.text)
      return text if text is not None and text.startswith(self.prefill) else None
    return completion.text if completion.stop == records.Stop.EOS else None


class Dataset:
  """Which rows are new: to the rows that there are, and to those admitted since."""

  def __init__(self, rows: list[dict[str, Any]], max_per_problem: int):
    self._most = max_per_problem or None
    self._seen, self._count = set(), collections.Counter()
    self.admit(rows)

  def admit(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new ones among them, in order."""
    fresh = []
    for new in rows:
      problem, key = new['problem'], (new['problem'], new['solution'])
      if key not in self._seen and (self._most is None or self._count[problem] < self._most):
        self._seen.add(key)
        self._count[problem] += 1
        fresh.append(new)
    return fresh


def describe(fresh: list[dict[str, Any]]) -> dict[str, float]:
  """Mean of every part of the rewards over the new rows to which it applies, by hint."""
  found = collections.defaultdict(list)
  for row in fresh:
    for part, value in row['parts'].items():
      if not math.isnan(value):
        found[f'collect/{"hinted" if row["hinted"] else "plain"}/{part}'].append(value)
  return {name: statistics.fmean(values) for name, values in found.items()}
