"""Cosine length reward (arXiv 2502.03373) beside the classic one, in a tight window.

  python -m reasonrl.main --config=configs/cosine.py               short and right, long and wrong
  python -m reasonrl.main --config=configs/cosine.py:classic       right 1; wrong or cut off 0
  python -m reasonrl.main --config=configs/cosine.py:variant_a     the paper's A: long and right
  python -m reasonrl.main --config=configs/cosine.py:debug         the first, short

Expected on two CPU cores (experiments/cosine_shuffled_objects/ has the runs, three seeds):
  the first    4 min; sampled accuracy from .20 to .39 (.21, .22, .75) in 30 tokens
  :classic     from .20 to .69 (.18, .93, .96) in 23 tokens
  :variant_a   from .20 to .43 (.19, .20, .91) in 20 tokens
  :debug       half a minute; no more than a check that everything runs
All of them learn to stay inside the window: at most .003 are cut off.
"""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch: pretrain, then GRPO with the cosine reward',
  'classic': 'the same with the classic reward',
  'variant_a': 'the same with a reward that pays long right answers',
  'debug': 'the first in half a minute, too short to learn much',
}
WINDOW = 32  # tokens of a completion


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  config = tiny()
  if variant == 'classic':
    config.rewards = common.rewards(accuracy=1.0)
    config.rewards.accuracy.require_stop = True
  if variant == 'variant_a':
    config.rewards.cosine.update(value_correct_at_0=0.0, value_correct_at_max=10.0)
    config.rewards.cosine.update(value_wrong_at_0=0.0, value_wrong_at_max=0.0)
  if variant == 'debug':
    config.pretrain.steps = 60
    config.rl.steps = 6
    config.rl.prompts_per_step = 8
    config.rl.eval_every = 3
    config.evaluation.num_examples = 64
    config.log.every = 1
  config.lock()
  return config


def tiny():
  """A nano decoder tracks a ball in 32 tokens: enough for the three passes that make it right, 29,
  and for three of the fillers between them."""
  config = common.nano_shuffled_objects('cosine')
  config.phases = ('pretrain', 'rl')
  config.task.strides = (4, 2, 1)
  config.task.stride_weights = (1.0, 0.0, 0.0)
  config.task.wait_probability = 0.5
  config.task.trace_filler_probability = 0.2
  config.rewards = common.rewards(cosine=1.0, repetition=1.0, accuracy=0.0)
  config.rewards.accuracy.require_stop = True
  config.rewards.cosine.require_stop = True
  config.rewards.cosine.margin = 0
  config.rewards.repetition.ngram = 4

  config.pretrain.steps = 2000  # after 1,000 no pass is right: there is nothing to reward

  config.rl = common.reinforce('grpo', learning_rate=3e-4)
  config.rl.steps = 100
  config.rl.row_length = 64
  config.rl.rows_per_batch = 16
  config.rl.env.max_completion_length = WINDOW

  config.evaluation = common.evaluation()
  config.evaluation.env.max_completion_length = WINDOW
  return config
