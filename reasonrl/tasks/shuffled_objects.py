"""SHELL: follow one ball under a row of swaps. The tiny world in which R1-Zero is shown.

    problem   3(01)(24)(13)?          the ball's cup, then the swaps; each swap is one token
    solution  <think>3...1</think><answer>1</answer>

A solution thinks with a stride s: it lists the ball's cup after every s-th swap (stride 1: every
one; 0: it does not think and guesses). A model pretrained on the mixture rarely thinks in small
steps but is right when it does, so reinforcement can multiply what is already there. The solutions
are noisy on purpose: a step may slip, which spoils the rest of the trace and the answer, and '.'
fills in without meaning. `answer` is always the truth.

With passes a solution that thinks may say 'Wait' behind a pass and start over at the next stride of
`strides`, finer if they fall; the last pass has the answer. Where budget forcing writes 'Wait', the
model goes on as it learned to.

Left out on purpose: the second alphabet.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from reasonrl import records
from reasonrl.tasks import splits

FILLER, WAIT = '.', 'Wait'


@dataclasses.dataclass(frozen=True)
class ShuffledObjects:
  """Tracks one ball among `num_objects` cups through `num_swaps` transpositions.

  Raises:
    UserError: a field is out of range, a stride does not divide num_swaps, or there are too few
      problems to fill both splits.
  """

  seed: int
  num_objects: int  # cups, 2 to 10: a cup is one digit
  num_swaps: int
  strides: tuple[int, ...]  # strides that a solution may have; 0 is a direct answer
  stride_weights: tuple[float, ...]  # their probabilities
  error_probability: float  # that a listed step is replaced by a uniformly drawn cup
  direct_known_probability: float  # that a direct answer is the truth, else a uniform guess
  direct_filler_probability: float  # of each further filler in the think span of a direct answer
  trace_filler_probability: float  # of each further filler after a listed step
  wait_probability: float  # behind a pass that is not the last, of another one at the next stride

  def __post_init__(self):
    if not 2 <= self.num_objects <= 10:
      raise records.UserError(f'num_objects={self.num_objects}: a cup is one digit, so 2 to 10')
    if self.num_swaps < 1:
      raise records.UserError(f'num_swaps={self.num_swaps}: at least 1')
    for stride in self.strides:
      if stride < 0 or (stride and self.num_swaps % stride):
        raise records.UserError(
          f'strides={self.strides}: {stride} does not divide num_swaps={self.num_swaps} '
          '(0 is a direct answer)'
        )
    weights = self.stride_weights
    summed = abs(sum(weights) - 1) < 1e-6
    if len(weights) != len(self.strides) or any(w < 0 for w in weights) or not summed:
      raise records.UserError(
        f'stride_weights={weights}: one probability for each of strides={self.strides}, sum 1'
      )
    for name in ('error', 'direct_known', 'direct_filler', 'trace_filler', 'wait'):
      value = getattr(self, f'{name}_probability')
      if not 0 <= value <= 1 or ('filler' in name and value == 1):
        raise records.UserError(
          f'{name}_probability={value} is not a probability (fillers: below 1)'
        )
    if self.wait_probability and 0 in self.strides[1:]:
      raise records.UserError(
        f'strides={self.strides}: with wait_probability a pass starts over at the next stride, so '
        '0 can only be the first'
      )
    for split in splits.SPLITS:
      self.example(split, 0)

  @property
  def symbols(self) -> tuple[str, ...]:
    """Tags, swaps, filler and 'Wait'. Cups are digits, which a tokenizer has to split."""
    return (*records.TAGS, *self._swaps, FILLER, *([WAIT] if self.wait_probability else []))

  @functools.cached_property
  def _swaps(self) -> tuple[str, ...]:
    return tuple(f'({a}{b})' for a, b in itertools.combinations(range(self.num_objects), 2))

  @functools.cached_property
  def _moves(self) -> tuple[tuple[int, ...], ...]:
    """moves[swap][cup]: where that swap takes a ball which lies under that cup."""
    moves = []
    for a, b in itertools.combinations(range(self.num_objects), 2):
      move = list(range(self.num_objects))
      move[a], move[b] = b, a
      moves.append(tuple(move))
    return tuple(moves)

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: stride of its solution, num_swaps."""
    uniform = splits.generator(self.seed, split, index).random

    def problem():
      start = int(uniform() * self.num_objects)
      swaps = [int(uniform() * len(self._swaps)) for _ in range(self.num_swaps)]
      return f'{start}{"".join([self._swaps[swap] for swap in swaps])}?', start, swaps

    text, start, swaps = splits.draw(split, problem, key=lambda found: found[0])
    cup = start
    for swap in swaps:
      cup = self._moves[swap][cup]
    stride = self._stride(uniform())
    trace, said = self._trace(uniform, stride, start, swaps, truth=cup)
    return records.Example(
      task='shuffled_objects',
      split=split,
      index=index,
      problem=text,
      answer=str(cup),
      solution=f'<think>{trace}</think><answer>{said}</answer>',
      meta={'stride': stride, 'num_swaps': self.num_swaps},
    )

  def _stride(self, u: float) -> int:
    for stride, weight in zip(self.strides, self.stride_weights, strict=True):
      u -= weight
      if u < 0:
        return stride
    return self.strides[-1]

  def _trace(self, uniform, stride, start, swaps, truth) -> tuple[str, int]:
    """What the solution thinks, and the answer that it gives."""
    trace = []
    if not stride:
      while uniform() < self.direct_filler_probability:
        trace.append(FILLER)
      known = uniform() < self.direct_known_probability
      return ''.join(trace), truth if known else int(uniform() * self.num_objects)
    place = self.strides.index(stride)
    while True:
      cup = start
      for first in range(0, len(swaps), stride):
        for swap in swaps[first : first + stride]:
          cup = self._moves[swap][cup]
        if uniform() < self.error_probability:
          cup = int(uniform() * self.num_objects)
        trace.append(str(cup))
        while uniform() < self.trace_filler_probability:
          trace.append(FILLER)
      place += 1
      if place == len(self.strides) or uniform() >= self.wait_probability:
        return ''.join(trace), cup
      trace.append(WAIT)
      stride = self.strides[place]
