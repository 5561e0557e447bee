"""Where problems come from: one file per task, one row per task in TASKS.

A task is a frozen dataclass with a field `seed`, a method `example(split, index) -> Example` (a
pure function of the fields, the split and the index) and `symbols`, the strings that a tokenizer
trained for it keeps whole. `splits` keeps train and test apart. `mixture` and `subset` are made of
such tasks; `collected` reads what a phase of the run has kept.
"""

from reasonrl.tasks import (
  addition,
  arithmetic,
  collected,
  countdown,
  mixture,
  reasoning_gym,
  shuffled_objects,
  subset,
)

TASKS = {
  'shuffled_objects': shuffled_objects.ShuffledObjects,
  'arithmetic': arithmetic.Arithmetic,
  'addition': addition.Addition,
  'countdown': countdown.Countdown,
  'mixture': mixture.Mixture,
  'collected': collected.Collected,
  'subset': subset.Subset,
  'reasoning_gym': reasoning_gym.ReasoningGym,
}
