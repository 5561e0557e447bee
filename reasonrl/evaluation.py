"""Held-out evaluation: pass@1, greedy and sampled, with intervals, lengths and truncation; and with
several samples of a problem pass@k and the vote of k.

An evaluation is a rollout of an environment on test examples. Its random keys do not depend on the
step, so two evaluations differ by their parameters alone.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from reasonrl import advantages, records, rollouts, sharding, stats, types

# What is reported by the values of `Evaluation.by`, besides accuracy and the parts of rewards.
BY = ('completion_length', 'think_length')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Settings; every default is in `configs/common.py`."""

  num_examples: int
  correct: str  # the reward that means 'right', 1 or 0, where the example names no other
  by: str  # field of meta by whose values accuracy and length are reported too; '' = none


def think_tokens(tokenizer, completion: records.Completion) -> int:
  """Whole tokens between <think> and </think>, or to the end if that is missing; 0 without <think>.

  Counted on the sampled ids: the first ids whose decoded text reaches a character, by bisection.
  """
  start = completion.text.find(records.THINK_OPEN)
  if start < 0:
    return 0
  start += len(records.THINK_OPEN)
  end = completion.text.find(records.THINK_CLOSE, start)
  ids = list(completion.token_ids)
  if not completion.text.endswith(said := tokenizer.decode(ids, skip_special=False)):
    ids = ids[:-1]  # EOS is no part of the text
    said = tokenizer.decode(ids, skip_special=False)
  given = len(completion.text) - len(said)  # characters that the prompt holds

  def reach(characters):
    """The least n such that the first n ids decode to at least that many characters."""
    low, high = 0, len(ids)
    while low < high:
      middle = (low + high) // 2
      text = tokenizer.decode(ids[:middle], skip_special=False)
      enough = given + len(text) >= characters
      low, high = (low, middle) if enough else (middle + 1, high)
    return low

  # Up to the token that starts the closing tag: a character's first byte already counts as one.
  stop = len(ids) if end < 0 else reach(end + 1) - 1
  return max(stop - reach(start), 0)  # a single token may end one tag and start the other


def right(experience: types.Experience, correct: str) -> np.ndarray:
  """float [R]: 1 where the reward that decides the example says 1, else 0; NaN counts as 0."""
  names = [example.meta.get(records.CHECKED_BY, correct) for example in experience.examples]
  return np.asarray([experience.parts[name][r] == 1 for r, name in enumerate(names)], np.float32)


def outcomes(
  experience: types.Experience, tokenizer, correct: str, vote=None
) -> dict[str, np.ndarray]:
  """What the metrics are made of: one number per rollout in every column, of all processes.

  Groups are renumbered so that the order of the problems is that of the data, whose n-th problem
  process n mod count has. `correct`: see `Evaluation`. `vote`: see `evaluate`.
  """
  completions = experience.completions
  by_R = lambda source: np.bincount(
    experience.rollout_B, (experience.source_BT == source).sum(1)
  ).astype(int)
  sampled_R, written_R = by_R(types.POLICY), by_R(types.ENVIRONMENT)
  marked = zip(completions, sampled_R + written_R, strict=True)
  mine = {
    'group': experience.group_R,
    'reward': experience.reward_R,
    'right': right(experience, correct),
    **{f'reward/{name}': part_R for name, part_R in experience.parts.items()},
    'completion_length': [c.num_tokens for c in completions],
    'think_length': [think_tokens(tokenizer, c) for c in completions],
    'stop': [int(c.stop) for c in completions],
    'written': written_R,
    'unmasked_tokens': [c.num_tokens - n for c, n in marked],
  }
  if vote is not None:
    mine['vote'] = vote(experience)
  every = sharding.gather({name: np.asarray(column).tolist() for name, column in mine.items()})
  for process, table in enumerate(every):
    table['group'] = [g * len(every) + process for g in table['group']]
  sizes = [len(table['group']) for table in every]
  return rollouts.concatenate_parts(every, sizes)


def summary(table: dict[str, np.ndarray]) -> dict[str, float]:
  """Means over the rollouts of `outcomes`; NaN rewards do not count."""
  out = {name: _mean(table[name]) for name in table if name.startswith('reward')}
  out['reward_std'] = _std(table['reward'])
  out['accuracy'] = _mean(table['right'])
  out['completion_length'] = _mean(table['completion_length'])
  out['think_length'] = _mean(table['think_length'])
  out['truncated'] = _mean(table['stop'] == records.Stop.LENGTH)
  out['eos_rate'] = _mean(table['stop'] == records.Stop.EOS)
  out['stopped_length'] = _mean(table['completion_length'][table['stop'] == records.Stop.EOS])
  out['zero_variance_groups'] = float(
    advantages.zero_variance(table['reward'], table['group']).mean()
  )
  out['unmasked_tokens'] = float(table['unmasked_tokens'].sum())
  if table['written'].any():
    out['written_length'] = _mean(table['written'])
  return out


def transcripts(experience: types.Experience, adv_BT, count: int, correct: str) -> list[dict]:
  """`count` rollouts spread over the batch: rows of rollouts.jsonl without step and phase."""
  rows_R, right_R, out = experience.first_row_R, right(experience, correct), []
  for r in range(0, rows_R.size, max(rows_R.size // max(count, 1), 1))[:count]:
    example, completion, row = experience.examples[r], experience.completions[r], rows_R[r]
    mask_T = experience.mask_BT[row] > 0
    out.append(
      {
        'prompt': example.problem,
        'completion': completion.text,
        'answer': example.answer,
        'right': bool(right_R[r]),
        'reward': float(experience.reward_R[r]),
        'parts': {name: float(part_R[r]) for name, part_R in experience.parts.items()},
        'advantage': None if adv_BT is None else float(adv_BT[row][mask_T].mean()),
        'length': completion.num_tokens,
        'stop': completion.stop.name.lower(),
        'index': example.index,
      }
    )
  return out


def evaluate(cfg: Evaluation, env, tools: types.Tools, state: dict, vote) -> tuple[dict, dict]:
  """Greedy and sampled results on the same test examples.

  Args:
    vote: experience -> [R], equal numbers for equal answers to a problem and 0 for none, for
      majority@k; None: there is no vote.

  Returns:
    metrics: 'eval/{greedy,sampled}/{accuracy, accuracy_low, accuracy_high, ...}', and 'outcomes',
      the per-problem share of right answers, for paired comparisons.
    the experiences, by mode.
  """
  metrics, experiences = {}, {}
  greedy = {'num_generations': 1, 'temperature': 0.0}
  for mode, changes in {'greedy': greedy, 'sampled': {}}.items():
    experience = dataclasses.replace(env, **changes).rollout(tools, state, 0)
    table = outcomes(experience, tools.tokenizer, cfg.correct, vote)
    right_R = table['right']
    right_P = np.bincount(table['group'], right_R) / np.bincount(table['group'])
    accuracy = float(right_P.mean())
    low, high = stats.clustered(right_P)
    found = summary(table)
    found |= {'accuracy': accuracy, 'accuracy_low': low, 'accuracy_high': high}
    for name, which in (('right', right_R == 1), ('wrong', right_R != 1)):
      found[f'{name}_length'] = _mean(table['completion_length'][which])
    found |= _of_several(table, right_R)
    if cfg.by:
      names = [name for name in table if name.startswith('reward/')]
      mean_P = {name: _of_groups(table, name) for name in (*BY, *names)}
      found |= _by_value(cfg.by, experience, {'accuracy': right_P, **mean_P})
    metrics |= {f'eval/{mode}/{name}': value for name, value in found.items()}
    metrics[f'eval/{mode}/outcomes'] = [round(float(x), 4) for x in right_P]
    experiences[mode] = experience
  return metrics, experiences


def _by_value(field: str, experience: types.Experience, of_P) -> dict[str, float]:
  """<metric>/<field>=<value>: the mean of a metric of problems, in the order of the data."""
  first = np.unique(experience.group_R, return_index=True)[1]
  mine = [experience.examples[r].meta[field] for r in first]
  values = [value for problem in zip(*sharding.gather(mine), strict=True) for value in problem]
  found = {
    f'{metric}/{field}={each}': _mean(each_P[[value == each for value in values]])
    for metric, each_P in of_P.items()
    for each in sorted(set(values), key=lambda value: (isinstance(value, str), value))
  }
  return {name: mean for name, mean in found.items() if not math.isnan(mean)}


def _of_groups(table, name: str) -> np.ndarray:
  """The mean of a column over the rollouts of each group."""
  return np.bincount(table['group'], table[name]) / np.bincount(table['group'])


def _of_several(table, right_R) -> dict[str, float]:
  """pass@k and majority@k for k = 2, 4, ... up to the samples of a problem."""
  members = [np.flatnonzero(table['group'] == g) for g in np.unique(table['group'])]
  n = min(rows.size for rows in members)
  right_PG = np.stack([right_R[rows[:n]] for rows in members])
  found, k = {}, 2

  def add(name, values_P):
    low, high = stats.clustered(values_P)
    found.update({name: float(np.mean(values_P)), f'{name}_low': low, f'{name}_high': high})

  while k <= n:
    add(f'pass@{k}', stats.pass_at_k(n, right_PG.sum(1), k))
    if 'vote' in table:
      ballots = [table['vote'][rows[:n]].tolist() for rows in members]
      pairs = zip(ballots, right_PG, strict=True)
      add(f'majority@{k}', [stats.majorities(votes, right, k) for votes, right in pairs])
    k *= 2
  return found


def _mean(values) -> float:
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else math.nan


def _std(values) -> float:
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(values.std(ddof=1)) if values.size > 1 else math.nan
