"""An adapter for data sets of the package reasoning-gym (extra `gym`).

Item i of such a data set depends on (seed, i) alone, so it is a random-access source; an example is
the first item, among positions drawn for it, whose question falls into its split.

The package's own scorers are never called: several of them hand the model's text to eval, and many
pay for near misses. Only data sets are admitted whose answer is unique, short and compared exactly
by the accuracy reward, which make an item in about a millisecond or less (number_sequence can take
20 seconds for one, countdown takes 12 milliseconds) and make the same item in every process
(isomorphic_strings and ransom_note depend on Python's hash seed, so a resumed run would differ).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from reasonrl import records
from reasonrl.tasks import splits

DATASETS = (
  'aiw',
  'base_conversion',
  'basic_arithmetic',
  'binary_alternation',
  'calendar_arithmetic',
  'chain_sum',
  'count_bits',
  'count_primes',
  'course_schedule',
  'decimal_chain_sum',
  'dice',
  'gcd',
  'gsm_symbolic',
  'largest_island',
  'lcm',
  'leg_counting',
  'letter_counting',
  'needle_haystack',
  'products',
  'rectangle_count',
  'rotten_oranges',
  'simple_equations',
  'simple_geometry',
  'spell_backward',
  'string_manipulation',
  'syllogism',
)
# Some data sets prepare a list of this length when they are built.
POSITIONS = 2**20


@dataclasses.dataclass(frozen=True)
class ReasoningGym:
  """One reasoning-gym data set as a task.

  Raises:
    UserError: the package is missing, the data set is not one of DATASETS, or the package refuses
      dataset_config.
  """

  symbols: ClassVar[tuple[str, ...]] = ()

  seed: int
  dataset: str  # one of DATASETS
  dataset_config: Mapping[str, Any]  # the data set's own fields, for example {'min_terms': 3}

  def __post_init__(self):
    if self.dataset not in DATASETS:
      raise records.UserError(
        f'reasoning_gym dataset {self.dataset!r} is not admitted; choices: {", ".join(DATASETS)}'
      )
    for split in splits.SPLITS:
      self.example(split, 0)

  @functools.cached_property
  def _items(self):
    try:
      import reasoning_gym  # 3 seconds, hence here
    except ImportError as error:
      raise records.UserError(
        f"task reasoning_gym needs a package ({error}): pip install 'reasonrl[gym]'"
      ) from error
    fields = dict(self.dataset_config)
    try:
      return reasoning_gym.create_dataset(self.dataset, seed=self.seed, size=POSITIONS, **fields)
    except (TypeError, ValueError, AssertionError) as error:
      raise records.UserError(
        f'reasoning_gym refuses dataset_config={fields} of {self.dataset}: {error}'
      ) from error

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; meta: dataset, source_index. It has no solution."""
    uniform = splits.generator(self.seed, split, index).random

    def problem():
      position = int(uniform() * POSITIONS)
      return position, self._items[position]

    position, item = splits.draw(split, problem, key=lambda found: found[1]['question'])
    return records.Example(
      task='reasoning_gym',
      split=split,
      index=index,
      problem=item['question'],
      answer=item['answer'],
      solution=None,
      meta={'dataset': self.dataset, 'source_index': position},
    )
