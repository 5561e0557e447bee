"""Sequences side by side in micro-batches of one shape, on the host.

1. `sequences` cuts the padding off rows.
2. `pack` puts sequences into the rows of micro-batches.
3. `unpack` brings what was computed back to where the tokens were.
"""

from __future__ import annotations

import collections
from typing import NamedTuple

import numpy as np

from reasonrl import sharding, types


def sequences(tokens_BT, length_B, aux_BT: dict) -> list[types.Sequence]:
  """Rows -> sequences; a token is scored where aux_BT['weight'] > 0.

  aux_BT holds numbers, [B, T], and ids, [B, T, K] padded with -1.
  """
  out = []
  for i, n in enumerate(length_B):
    index = np.flatnonzero(aux_BT['weight'][i, :n] > 0)
    aux = {
      name: np.asarray(x[i, index], np.float32 if x.ndim == 2 else np.int32)
      for name, x in aux_BT.items()
    }
    out.append(types.Sequence(np.asarray(tokens_BT[i, :n], np.int32), index, aux))
  return out


def with_texts(seqs: list[types.Sequence], texts: list[types.Sequence], coef: float):
  """Sequences of rollouts, and of texts that are learned beside them.

  The tokens of texts have 'text_weight' = coef where those of rollouts have 0, the other way around
  'weight', and no other aux; they are scored as text (see kernels.policy_loss).
  """
  out = []
  for seq in seqs:
    zeros = np.zeros(seq.index_M.size, np.float32)
    out.append(seq._replace(aux={**seq.aux, 'text_weight': zeros, 'plain': zeros}))
  for text in texts:
    size = text.index_M.size
    aux = {
      n: np.full((size, *x.shape[1:]), 0 if x.ndim == 1 else -1, x.dtype)
      for n, x in seqs[0].aux.items()
    }
    aux['text_weight'], aux['plain'] = np.full(size, coef, np.float32), np.ones(size, np.float32)
    out.append(text._replace(aux=aux))
  return out


def pack(seqs: list[types.Sequence], row_length: int, rows: int, share: bool):
  """Sequences -> micro-batches of `rows` rows by first fit.

  With `share`, what sequences hold before their first scored token lies in a row once, for all
  sequences of the row that begin like this: the prompt of a group (arXiv 2506.05433).

  The number of scored slots per row is the largest any row needs, rounded up to a quarter of the
  row (few shapes, few compilations).

  Args:
    seqs: sequences of at most row_length tokens.
    row_length: T of a packed row.
    rows: rows per micro-batch on this process.
    share: whether segments may continue another, see `types.Batch`.

  Returns:
    list of host Batches, and for every sequence its (micro-batch, row, first scored slot).

  Raises:
    ValueError: a sequence is longer than row_length, or scores its first token, which nothing
      predicts.
  """
  for i, seq in enumerate(seqs):
    if seq.index_M.size and seq.index_M.min() == 0:
      raise ValueError(f'sequence {i}: the first token cannot be scored')
    if seq.tokens_T.size > row_length:
      raise ValueError(
        f'a sequence of {seq.tokens_T.size} tokens does not fit a packed row of {row_length}'
      )
  nothing = [seq.tokens_T[:0] for seq in seqs]
  begins = [seq.tokens_T[: min(seq.index_M, default=0)] for seq in seqs] if share else nothing
  # What is shared leaves more room, but groups fit together worse than single sequences.
  content = min((_first_fit(seqs, each, row_length) for each in (begins, nothing)), key=len)
  step = -(-row_length // 4)
  # Every process must compile and run the same programs, so the shapes are agreed on.
  need = sharding.agree(max(max(sum(seqs[i].index_M.size for i in c) for c in content), 1))
  slots = -(-need // step) * step

  def unused(x):  # slots: the number is 0, and there are no ids
    return np.full((rows, slots, *x.shape[1:]), 0 if x.ndim == 1 else -1, x.dtype)

  batches, where = [], [None] * len(seqs)
  for first in range(0, sharding.agree(-(-len(content) // rows)) * rows, rows):
    ints = lambda width, fill: np.full((rows, width), fill, np.int32)
    tokens, positions, segments, prefixes = (ints(row_length, 0) for _ in range(4))
    index, before = ints(slots, 1), ints(slots, 0)
    aux = {name: unused(x) for name, x in seqs[0].aux.items()}
    for r, members in enumerate(content[first : first + rows]):
      slot = 0
      for segment, part in enumerate(_segments(members, seqs, begins), start=1):
        span = slice(part.start, part.start + part.tokens.size)
        tokens[r, span], segments[r, span] = part.tokens, segment
        positions[r, span] = np.arange(part.position, part.position + part.tokens.size)
        prefixes[r, span] = part.prefix or segment
        if part.sequence is None:
          continue
        seq = seqs[part.sequence]
        own, at = slice(slot, slot + seq.index_M.size), seq.index_M - part.position + part.start
        index[r, own], before[r, own] = at, np.where(at == part.start, part.before, at - 1)
        for name in aux:
          aux[name][r, own] = seq.aux[name]
        where[part.sequence] = (len(batches), r, slot)
        slot = own.stop
    shared = prefixes if share else None
    batches.append(types.Batch(tokens, positions, segments, shared, index, before, aux))
  return batches, where


def _first_fit(seqs, begins, row_length: int) -> list[list[int]]:
  """Which sequences every row holds, in order.

  First the group with the most tokens, of it the longest sequence; what shares nothing is a group
  alone.
  """
  groups = collections.defaultdict(list)
  for i, begin in enumerate(begins):
    groups[begin.tobytes() or i].append(i)
  sizes = [seq.tokens_T.size for seq in seqs]
  free, content = np.full(len(seqs), row_length), [[] for _ in seqs]
  for group in sorted(groups.values(), key=lambda group: -sum(sizes[i] for i in group)):
    common, holders = begins[group[0]].size, []  # rows that hold the beginning
    for i in sorted(group, key=lambda i: -sizes[i]):
      row = next((row for row in holders if free[row] >= sizes[i] - common), None)
      if row is None:
        row = int(np.argmax(free >= sizes[i]))
        holders.append(row)
        free[row] -= common
      free[row] -= sizes[i] - common
      content[row].append(i)
  return [c for c in content if c]


class _Segment(NamedTuple):
  """A part of a row."""

  start: int  # in the row
  tokens: np.ndarray
  position: int  # of the first one in its sequence
  prefix: int  # the segment that it continues; 0: none
  before: int  # where that one ends in the row; 0: it continues none
  sequence: int | None  # whose scored tokens it holds; None: others continue it


def _segments(members, seqs, begins) -> list[_Segment]:
  """What a row holds, in order."""
  out, end, held = [], 0, {}
  for i in members:
    begin, key = begins[i], begins[i].tobytes()
    if key and key not in held:
      out.append(_Segment(end, begin, 0, 0, 0, None))
      end += begin.size
      held[key] = len(out), end - 1
    own = seqs[i].tokens_T[begin.size :]
    out.append(_Segment(end, own, begin.size, *held.get(key, (0, 0)), i))
    end += own.size
  return out


def unpack(values, seqs: list[types.Sequence], where, shape) -> np.ndarray:
  """Per-micro-batch [B, M] values -> float32 [len(seqs), T], 0 where nothing was scored."""
  out = np.zeros(shape, np.float32)
  for i, (batch, row, slot) in enumerate(where):
    n = seqs[i].index_M.size
    out[i, seqs[i].index_M] = values[batch][row, slot : slot + n]
  return out
