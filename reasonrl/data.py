"""Examples in order, through Grain, with a position that fits in a checkpoint.

A task is a random-access source of endless length; a stream walks it in order, each process taking
every n-th example. Its state is one number, the next batch, whatever the number of hosts.
"""

from __future__ import annotations

import dataclasses

import grain.python as grain
import jax
import numpy as np

from reasonrl import records, types

LENGTH = 2**24  # examples of a stream; indices stay below 2**31 for 128 streams


@dataclasses.dataclass(frozen=True)
class Source:
  """A task's split as a Grain random-access data source."""

  task: object
  split: str
  first: int

  def __len__(self) -> int:
    return LENGTH

  def __getitem__(self, index) -> records.Example:
    return self.task.example(self.split, self.first + int(index))


class Stream:
  """Batches of `size` examples over all processes, from batch `position` on; threads read ahead.

  Stream 0, 1, ... of a split have no position in common: every phase of a run reads its own. Of a
  task that repeats they start where an epoch does.
  """

  def __init__(self, task, split: str, stream: int, size: int, position: int):
    n = jax.process_count()
    if size % n:
      raise records.UserError(f'a batch of {size} examples does not divide over {n} processes')
    self.position = position
    first = stream * LENGTH
    if hasattr(task, 'epoch'):
      first += -first % task.epoch(split)
    source = grain.MapDataset.source(Source(task, split, first))
    batches = source[jax.process_index() :: n].batch(size // n, batch_fn=list)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    self._iterator = iter(batches.to_iter_dataset(options))
    self._iterator.set_state({'next_index': position})

  def next(self) -> list[records.Example]:
    """The next batch; `position` moves on."""
    self.position += 1
    return next(self._iterator)


def supervised_sequence(tokenizer, prompt_ids, prefill: str, example, row_length: int):
  """Prompt + solution + EOS as a Sequence scored from the prompt's end, EOS included.

  `prefill` is the beginning of the solution that the prompt already holds. A solution that was
  sampled has its ids in meta[TOKEN_IDS]. A text is its `text_sequence`.

  Raises:
    UserError: the example has no solution, it begins differently, or does not fit a row.
  """
  if example.solution is None:
    raise records.UserError(
      f'task {example.task!r} has no solutions to learn from: it cannot feed a supervised phase'
    )
  if records.TEXT in example.meta:
    return text_sequence(tokenizer, prompt_ids, example, row_length)
  if records.TOKEN_IDS in example.meta:
    rest = example.meta[records.TOKEN_IDS]
  elif not example.solution.startswith(prefill):
    raise records.UserError(
      f'{example.task} example {example.index}: the solution {example.solution[:20]!r}... '
      f'does not begin with prompt.prefill={prefill!r}'
    )
  else:
    rest = [*tokenizer.encode(example.solution.removeprefix(prefill)), tokenizer.eos_ids[0]]
  ids = [*prompt_ids, *rest]
  if len(ids) > row_length:
    raise records.UserError(
      f'{example.task} example {example.index} has {len(ids)} tokens, more than '
      f'row_length={row_length}'
    )
  return _sequence(ids, np.arange(len(prompt_ids), len(ids)))


def text_sequence(tokenizer, before, example, row_length: int) -> types.Sequence:
  """A text as a Sequence, EOS at its end if it ends there, cut where the row does.

  `before` are the ids in front of it (BOS). What it says can never become a control token. Tokens
  of its untrained spans are not scored, nor is the first of all, which nothing predicts.
  """
  text, at, pieces = example.solution, 0, []
  for start, end in example.meta.get(records.UNTRAINED, ()):
    pieces += [(text[at:start], True), (text[start:end], False)]
    at = end
  ids, trained = list(before), [False] * len(before)
  for piece, learned in (*pieces, (text[at:], True)):
    more = tokenizer.encode_user(piece)
    ids, trained = [*ids, *more], [*trained, *[learned] * len(more)]
  if example.meta[records.TEXT] == records.WHOLE:
    ids, trained = [*ids, tokenizer.eos_ids[0]], [*trained, True]
  trained[0] = False
  return _sequence(ids[:row_length], np.flatnonzero(trained[:row_length]))


def _sequence(ids, index) -> types.Sequence:
  aux = {'weight': np.ones(index.size, np.float32)}
  return types.Sequence(np.asarray(ids, np.int32), index, aux)
