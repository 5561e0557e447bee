"""R1-Zero (arXiv 2501.12948): reasoning from verifiable rewards alone, by GRPO.

  python -m reasonrl.main --config=configs/r1_zero.py            tiny model from scratch
  python -m reasonrl.main --config=configs/r1_zero.py:debug      the same, short
  python -m reasonrl.main --config=configs/r1_zero.py:smollm2    SmolLM2-135M-Instruct

Expected, on two CPU cores (experiments/ has the runs):
  tiny      2 min; held-out sampled accuracy on 1,024 problems from .32 to .96, think length
            from 5 to 12 tokens
  :debug    about half a minute; no more than a check that everything runs
  :smollm2  30 min; greedy accuracy on 512 held-out sums from .35 to .61 or .65 (two seeds), format
            from .78 to 1.00
"""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch: pretrain on a mixture of traces, then GRPO',
  'debug': 'the same in half a minute, too short to learn much',
  'smollm2': 'SmolLM2-135M-Instruct learns sums',
}


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  config = smollm2() if variant == 'smollm2' else tiny()
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
  """A nano decoder that tracks a ball through twelve swaps."""
  config = common.nano_shuffled_objects('r1_zero')
  config.phases = ('pretrain', 'rl')
  # An empty think span is well-formed here: thinking grows only because it makes answers right.
  config.rewards = common.rewards(accuracy=1.0, r1_format=1.0)
  config.rewards.r1_format.allow_empty_think = True

  config.pretrain.row_length = 64

  config.rl = common.reinforce('grpo', learning_rate=3e-4)
  config.rl.steps = 60
  config.rl.row_length = 64
  config.rl.rows_per_batch = 16
  config.rl.env.max_completion_length = 40

  config.evaluation = common.evaluation()
  config.evaluation.env.max_completion_length = 40
  return config


def smollm2():
  """The pretrained model learns to add: two numbers up to 99, in digits or words."""
  config = common.smollm2_sums('r1_zero')
  config.phases = ('rl',)
  config.rewards = common.rewards(accuracy=1.0, r1_format=1.0)

  config.rl = common.reinforce('grpo', learning_rate=1e-5)
  config.rl.steps = 40
  config.rl.prompts_per_step = 8
  config.rl.env.num_generations = 8
  config.rl.env.max_completion_length = 32
  config.rl.row_length = 224  # two sequences
  config.rl.eval_every = 20

  config.evaluation = common.evaluation()
  config.evaluation.num_examples = 512
  config.evaluation.env.max_completion_length = 32
  config.evaluation.env.slots = 64
  return config
