"""Where problems come from: one file per task, one row per task in TASKS.

A task is a frozen dataclass with a field `seed`, a method `example(split, index) -> Example` (a
pure function of the fields, the split and the index) and `symbols`, the strings that a tokenizer
trained for it keeps whole. `splits` keeps train and test apart; where examples are the rows of
`files`, the files do. `mixture` and `subset` are made of such tasks; `collected` reads what a phase
of the run has kept.

A task whose split repeats may say so with `epoch(split)`, the number of examples. For few-shot
prompts it may have `worked(example, count) -> list[Example]`: other examples with
solutions, such as stand before this one; also a pure function.
"""

from reasonrl.tasks import (
  addition,
  arithmetic,
  collected,
  commonsenseqa,
  countdown,
  gsm8k,
  jsonl,
  mixture,
  reasoning_gym,
  shuffled_objects,
  subset,
  text,
  varchain,
)

TASKS = {
  'shuffled_objects': shuffled_objects.ShuffledObjects,
  'arithmetic': arithmetic.Arithmetic,
  'addition': addition.Addition,
  'countdown': countdown.Countdown,
  'mixture': mixture.Mixture,
  'collected': collected.Collected,
  'subset': subset.Subset,
  'text': text.Text,
  'varchain': varchain.VarChain,
  'reasoning_gym': reasoning_gym.ReasoningGym,
  'jsonl': jsonl.Jsonl,
  'gsm8k': gsm8k.Gsm8k,
  'commonsenseqa': commonsenseqa.CommonsenseQA,
}
