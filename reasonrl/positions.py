"""Which tokens of a text are to be thought about before they are read.

Position t speaks about token t: the context is what stands before it, at least one token. All
choices are functions of the given generator, so that a run can go on where it was killed.

  uniform       each position as likely as any other              RLP, arXiv 2510.01265
  every_k       every k-th
  all           each one
  topq_entropy  among the share of positions where the next token is least certain, of those whose
                context is the whole text before it (after RPT, arXiv 2506.08007, which has a
                threshold)
  class         with given probabilities at a token of some kind, else uniform
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

SAMPLERS = ('uniform', 'every_k', 'all', 'topq_entropy', 'class')


def classes(tokenizer, ids, first: int, spans) -> list[tuple[str, str]]:
  """Of every token its kind and the thought that would help: those of its first character, '' where
  none is known.

  Args:
    tokenizer: of the ids.
    ids: of the text; those before `first` stand for no part of it, nor does EOS.
    first: index of the first token of the text.
    spans: [first character, one behind the last, kind, thought], in order.
  """
  found = [('', '')] * len(ids)
  if not spans:
    return found
  starts = np.asarray([span[0] for span in spans])
  for i in range(first, len(ids)):
    if ids[i] in tokenizer.control_ids:
      continue
    at = len(tokenizer.decode(list(ids[first:i]), skip_special=True))
    span = spans[int(np.searchsorted(starts, at, side='right')) - 1]
    found[i] = tuple(span[2:4]) if span[0] <= at < span[1] else ('', '')
  return found


def choose(
  sampler: str,
  rng: np.random.Generator,
  last: int,
  count: int,
  every: int,
  kinds: list[str],
  weights: Mapping[str, float],
  candidates,
) -> list[int]:
  """Positions of one text, from 1 to `last`, in order; fewer than `count` where it is too short.

  Args:
    sampler: of SAMPLERS.
    rng: of this text.
    last: the last position that may be chosen.
    count: how many positions, of the samplers that draw.
    every: k of 'every_k'.
    kinds: of every token, for 'class'.
    weights: name -> probability, together at most 1; a text without that kind draws uniformly.
      'answer' is the kinds 'answer' and 'answer_...'.
    candidates: of 'topq_entropy': the positions to draw from.
  """
  if sampler == 'all':
    return list(range(1, last + 1))
  if sampler == 'every_k':
    return list(range(every, last + 1, every))
  among = np.asarray(candidates) if sampler == 'topq_entropy' else np.arange(1, last + 1)
  if sampler != 'class':
    return sorted(rng.choice(among, min(count, among.size), replace=False).tolist())
  chosen: set[int] = set()
  while len(chosen) < min(count, last):
    left = [t for t in range(1, last + 1) if t not in chosen]
    u, names = rng.random(), list(weights)
    bounds = np.cumsum([weights[name] for name in names])
    name = next((n for n, bound in zip(names, bounds, strict=True) if u < bound), None)
    fitting = [t for t in left if name is not None and f'{kinds[t]}_'.startswith(f'{name}_')]
    chosen.add(int(rng.choice(fitting or left)))
  return sorted(chosen)


def uncertain(entropy_T, last: int, share: float) -> np.ndarray:
  """The positions from 1 to `last` with the largest entropies of the next token, at least one."""
  order = np.argsort(-np.asarray(entropy_T)[1 : last + 1], kind='stable') + 1
  return np.sort(order[: max(1, round(share * last))])
