"""Operations on an `Experience`: make one, restrict it, join several, give it its rewards."""

from __future__ import annotations

import dataclasses

import numpy as np

from reasonrl import types

# The fields of types.Experience that are indexed by row; the others are indexed by rollout.
_BY_ROW = (
  *('tokens_BT', 'prompt_length_B', 'length_B', 'source_BT', 'logp_BT', 'stop_B', 'version_B'),
  *('group_B', 'rollout_B', 'reward_BT'),
)


def fresh(version: int, **fields) -> types.Experience:
  """An experience of one row a rollout, without rewards and scores; `version` of all rows."""
  R = fields['group_B'].size
  return types.Experience(
    version_B=np.full(R, version, np.int32),
    rollout_B=np.arange(R, dtype=np.int32),
    reward_R=np.full(R, np.nan, np.float32),
    parts={},
    reward_weights={},
    reward_BT=None,
    scores={},
    **fields,
  )


def take_rows(experience: types.Experience, rows) -> types.Experience:
  """The experience restricted to some rows; rollouts and their rewards stay whole."""
  fields = {name: getattr(experience, name) for name in _BY_ROW}
  fields = {name: None if x is None else x[rows] for name, x in fields.items()}
  for of in ('support', 'scores'):
    fields[of] = {name: x[rows] for name, x in getattr(experience, of).items()}
  return dataclasses.replace(experience, **fields)


def take_groups(experience: types.Experience, groups) -> types.Experience:
  """The experience restricted to some group ids, with rollouts renumbered from 0."""
  out = take_rows(experience, np.isin(experience.group_B, groups))
  rollouts, rollout_B = np.unique(out.rollout_B, return_inverse=True)
  return dataclasses.replace(
    out,
    rollout_B=rollout_B.astype(np.int32),
    reward_R=out.reward_R[rollouts],
    parts={name: x[rollouts] for name, x in out.parts.items()},
    examples=tuple(out.examples[r] for r in rollouts),
    completions=tuple(out.completions[r] for r in rollouts),
  )


def concatenate_parts(dicts: list[dict], sizes: list[int]) -> dict[str, np.ndarray]:
  """Columns one after the other; where a dict lacks a column, it has NaN there."""
  names = dict.fromkeys(name for columns in dicts for name in columns)
  gaps = [np.full(n, np.nan, np.float32) for n in sizes]
  return {
    name: np.concatenate([c.get(name, gap) for c, gap in zip(dicts, gaps, strict=True)])
    for name in names
  }


def concatenate(experiences: list[types.Experience]) -> types.Experience:
  """Experiences one after the other; group and rollout ids are shifted to stay distinct."""
  shifted, groups, rollouts = [], 0, 0
  for e in experiences:
    shifted.append(
      dataclasses.replace(e, group_B=e.group_B + groups, rollout_B=e.rollout_B + rollouts)
    )
    groups, rollouts = groups + e.group_B.max() + 1, rollouts + e.reward_R.size

  def join(arrays, fill=0):
    """One array, as wide as the widest of each axis behind the first."""
    widest = np.max([x.shape[1:] for x in arrays], axis=0)
    pad = lambda x: [(0, 0), *((0, n - m) for m, n in zip(x.shape[1:], widest, strict=True))]
    return np.concatenate([np.pad(x, pad(x), constant_values=fill) for x in arrays])

  def every(name):
    return [getattr(e, name) for e in shifted]

  # What stands for it where only some have it.
  no_reward = lambda e: np.zeros_like(e.logp_BT)
  no_ids = lambda e: np.full((*e.tokens_BT.shape, 1), -1, np.int32)
  fields = {name: every(name) for name in _BY_ROW}
  if any(x is not None for x in fields['reward_BT']):
    pairs = zip(shifted, fields['reward_BT'], strict=True)
    fields['reward_BT'] = [no_reward(e) if x is None else x for e, x in pairs]
  fields = {name: None if x[0] is None else join(x) for name, x in fields.items()}
  names = dict.fromkeys(name for e in shifted for name in e.support)
  support = {
    name: join([e.support[name] if name in e.support else no_ids(e) for e in shifted], fill=-1)
    for name in names
  }
  return types.Experience(
    **fields,
    support=support,
    reward_R=join(every('reward_R')),
    parts=concatenate_parts(every('parts'), [e.reward_R.size for e in experiences]),
    reward_weights=experiences[0].reward_weights,
    scores={name: join([e.scores[name] for e in shifted]) for name in shifted[0].scores},
    examples=sum(every('examples'), ()),
    completions=sum(every('completions'), ()),
  )


def rewarded(experience: types.Experience, scores: list[types.BatchScore], weights):
  """The experience with the sum of its rewards; a rollout to which none applies has NaN.

  `weights`: reward -> its weight, which `scores` have in them already.
  """
  value_SR = np.stack([score.value_R for score in scores])
  none_R = np.isnan(value_SR).all(0)
  dense = [score.reward_BT for score in scores if score.reward_BT is not None]
  return dataclasses.replace(
    experience,
    reward_R=np.where(none_R, np.nan, np.nansum(value_SR, 0)).astype(np.float32),
    parts={name: part_R for score in scores for name, part_R in score.parts.items()},
    reward_weights=weights,
    reward_BT=sum(dense) if dense else None,
  )


def token_rewards(experience: types.Experience, token_values) -> np.ndarray:
  """Credit per token of a completion (one array per rollout, or None) where it is: [B, T].

  A rollout's values run over its completions, row after row, whoever wrote a token.
  """
  said_BT = experience.source_BT != types.PROMPT
  reward_BT = np.zeros(said_BT.shape, np.float32)
  for r, values in enumerate(token_values):
    if values is not None:
      rows = (experience.rollout_B == r)[:, None]
      reward_BT[said_BT & rows] = values
  return reward_BT
