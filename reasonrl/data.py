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

LENGTH = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Source:
  """A task's split as a Grain random-access data source."""

  task: object
  split: str

  def __len__(self) -> int:
    return LENGTH

  def __getitem__(self, index) -> records.Example:
    return self.task.example(self.split, int(index))


class Stream:
  """Batches of `size` examples over all processes, from batch `position` on; threads read ahead."""

  def __init__(self, task, split: str, size: int, position: int):
    n = jax.process_count()
    if size % n:
      raise records.UserError(f'a batch of {size} examples does not divide over {n} processes')
    self.position = position
    examples = grain.MapDataset.source(Source(task, split))[jax.process_index() :: n]
    batches = examples.batch(size // n, batch_fn=list)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    self._iterator = iter(batches.to_iter_dataset(options))
    self._iterator.set_state({'next_index': position})

  def next(self) -> list[records.Example]:
    """The next batch; `position` moves on."""
    self.position += 1
    return next(self._iterator)


def supervised_sequence(tokenizer, prompt_ids: list[int], example, row_length: int):
  """Prompt + solution + EOS as a Sequence scored from the prompt's end, EOS included.

  Raises:
    UserError: the example has no solution, or does not fit a row.
  """
  if example.solution is None:
    raise records.UserError(
      f'task {example.task!r} has no solutions to learn from: it cannot feed a supervised phase'
    )
  ids = prompt_ids + tokenizer.encode(example.solution) + [tokenizer.eos_ids[0]]
  if len(ids) > row_length:
    raise records.UserError(
      f'{example.task} example {example.index} has {len(ids)} tokens, more than '
      f'row_length={row_length}'
    )
  index = np.arange(len(prompt_ids), len(ids))
  aux = {'weight': np.ones(index.size, np.float32)}
  return types.Sequence(np.asarray(ids, np.int32), index, aux)
