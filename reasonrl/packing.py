"""Sequences side by side in micro-batches of one shape, on the host.

1. `sequences` cuts the padding off rows.
2. `pack` puts sequences into the rows of micro-batches.
3. `unpack` brings what was computed back to where the tokens were.
"""

from __future__ import annotations

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


def pack(seqs: list[types.Sequence], row_length: int, rows: int):
  """Sequences -> micro-batches of `rows` rows by first fit, longest first.

  The number of scored slots per row is the largest any row needs, rounded up to a quarter of the
  row (few shapes, few compilations).

  Args:
    seqs: sequences of at most row_length tokens.
    row_length: T of a packed row.
    rows: rows per micro-batch on this process.

  Returns:
    list of host Batches, and for every sequence its (micro-batch, row, first scored slot).

  Raises:
    ValueError: a sequence is longer than row_length, or scores its first token, which nothing
      predicts.
  """
  for i, seq in enumerate(seqs):
    if seq.index_M.size and seq.index_M.min() == 0:
      raise ValueError(f'sequence {i}: the first token of a segment cannot be scored')
  order = sorted(range(len(seqs)), key=lambda i: -seqs[i].tokens_T.size)
  if seqs[order[0]].tokens_T.size > row_length:
    longest = seqs[order[0]].tokens_T.size
    raise ValueError(f'a sequence of {longest} tokens does not fit a packed row of {row_length}')
  free, content = np.zeros(len(seqs), np.int64) + row_length, [[] for _ in seqs]
  for i in order:
    row = int(np.argmax(free >= seqs[i].tokens_T.size))
    free[row] -= seqs[i].tokens_T.size
    content[row].append(i)
  content = [c for c in content if c]
  step = -(-row_length // 4)
  # Every process must compile and run the same programs, so the shapes are agreed on.
  need = sharding.agree(max(max(sum(seqs[i].index_M.size for i in c) for c in content), 1))
  slots = -(-need // step) * step

  def unused(x):  # slots: the number is 0, and there are no ids
    return np.full((rows, slots, *x.shape[1:]), 0 if x.ndim == 1 else -1, x.dtype)

  batches, where = [], [None] * len(seqs)
  for start in range(0, sharding.agree(-(-len(content) // rows)) * rows, rows):
    ints = lambda width, fill: np.full((rows, width), fill, np.int32)
    tokens, positions, segments = ints(row_length, 0), ints(row_length, 0), ints(row_length, 0)
    index = ints(slots, 1)
    aux = {name: unused(x) for name, x in seqs[0].aux.items()}
    for r, members in enumerate(content[start : start + rows]):
      offset = slot = 0
      for segment, i in enumerate(members, start=1):
        seq, n = seqs[i], seqs[i].index_M.size
        span = slice(offset, offset + seq.tokens_T.size)
        tokens[r, span], segments[r, span] = seq.tokens_T, segment
        positions[r, span] = np.arange(seq.tokens_T.size)
        index[r, slot : slot + n] = seq.index_M + offset
        for name in aux:
          aux[name][r, slot : slot + n] = seq.aux[name]
        where[i] = (len(batches), r, slot)
        offset, slot = offset + seq.tokens_T.size, slot + n
    batches.append(types.Batch(tokens, positions, segments, index, aux))
  return batches, where


def unpack(values, seqs: list[types.Sequence], where, shape) -> np.ndarray:
  """Per-micro-batch [B, M] values -> float32 [len(seqs), T], 0 where nothing was scored."""
  out = np.zeros(shape, np.float32)
  for i, (batch, row, slot) in enumerate(where):
    n = seqs[i].index_M.size
    out[i, seqs[i].index_M] = values[batch][row, slot : slot + n]
  return out
