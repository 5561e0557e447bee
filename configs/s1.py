"""s1 (arXiv 2501.19393): budget forcing at test time, and the controls it is compared with.

  python -m reasonrl.main --config=configs/s1.py              a tiny model that may start over
  python -m reasonrl.main --config=configs/s1.py:token        trained to keep to a number of tokens
  python -m reasonrl.main --config=configs/s1.py:step         to a number of steps
  python -m reasonrl.main --config=configs/s1.py:smollm2      SmolLM2-135M-Instruct, evaluation only
  python -m reasonrl.main --config=configs/s1.py:debug        the first, short

Expected on two CPU cores (experiments/s1_shuffled_objects/ has the runs, three seeds):
  the first      5 min beside a second run; greedy accuracy from .26 to .99 where two ends of
                 thinking are replaced by 'Wait', .20 where four are
  :token, :step  5 min beside a second run
  :smollm2       22 min beside other work; accuracy .23 as it is, less with more thinking
                 (experiments/length_smollm2/)
  :debug         half a minute; no more than a check that everything runs
"""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch; budget forcing and rejection sampling when it is evaluated',
  'token': 'its own right solutions, labelled with their tokens of thinking, are learned',
  'step': 'the same with their steps',
  'smollm2': 'SmolLM2-135M-Instruct on sums, evaluation only',
  'debug': 'the first in half a minute, too short to learn much',
}


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  config = smollm2() if variant == 'smollm2' else tiny()
  if variant == 'token':
    conditional(config, 'think_tokens', 'target', (2, 4, 8, 16, 32))
  if variant == 'step':
    conditional(config, 'steps', 'steps', (1, 2, 4))
  if variant == 'debug':
    config.pretrain.steps = 60
    config.evaluation.num_examples = 64
    config.log.every = 10
  config.lock()
  return config


def tiny():
  """A nano decoder tracks a ball: in steps of four swaps, and where it starts over, finer ones."""
  config = common.nano_shuffled_objects('s1')
  config.phases = ('pretrain',)
  # A coarse pass; behind it often 'Wait' and a finer one, but less often than not: greedy, it says
  # one. The last pass has the answer.
  config.task.strides = (4, 2, 1)
  config.task.stride_weights = (1.0, 0.0, 0.0)
  config.task.wait_probability = 0.4
  config.task.trace_filler_probability = 0.0
  config.rewards = common.rewards(accuracy=1.0)

  config.pretrain.steps = 2000

  config.evaluation = common.evaluation()
  config.evaluation.env.max_completion_length = 80
  config.evaluation.env.num_generations = 16  # for the vote
  config.evaluation.budgets = common.budgets('max_think', 'ignores', 'rejection')
  config.evaluation.budgets.max_think.numbers = (2, 4, 8, 16, 32)
  config.evaluation.budgets.max_think.ignores = 2  # so that there is something to cut
  config.evaluation.budgets.ignores.numbers = (0, 1, 2, 4)
  config.evaluation.budgets.ignores.max_think = 32
  config.evaluation.budgets.rejection.numbers = (2, 4, 8, 16, 32)
  return config


def conditional(config, unit: str, method: str, numbers):
  """The model learns its own right solutions, labelled with how long they think."""
  template = '={n}'  # in few characters
  config.phases = ('pretrain', 'collect', 'sft')
  config.prompt.max_length = 24
  config.collect = common.collect('expert_iteration')
  config.collect.steps = 4
  config.collect.env.max_completion_length = 48
  config.sft = common.supervised(learning_rate=1e-3)
  config.sft.task = common.collected('collect')
  config.sft.augmentations = common.augmentations('length_label')
  config.sft.augmentations.length_label.update(unit=unit, separator='Wait', template=template)
  config.sft.steps = 400
  config.sft.row_length = 96
  config.sft.rows_per_batch = 16
  config.evaluation.env.num_generations = 1
  config.evaluation.budgets = common.budgets(method, f'{method}_forced')
  for section in config.evaluation.budgets.values():
    section.update(numbers=numbers, template=template)
    section.unit_tokens = 8


def smollm2():
  """Budget forcing on a pretrained model that was never trained to start over."""
  config = common.smollm2_sums('s1')
  config.phases = ('evaluate',)
  config.prompt.max_length = 160  # class-conditional control is two sentences
  config.rewards = common.rewards(accuracy=1.0)
  config.evaluate = common.evaluate()

  config.evaluation = common.evaluation()
  config.evaluation.num_examples = 128
  config.evaluation.env.max_completion_length = 64
  config.evaluation.env.slots = 64
  config.evaluation.budgets = common.budgets('max_think', 'ignores', 'rejection', 'class')
  config.evaluation.budgets.max_think.numbers = (2, 4, 8, 16, 32)
  config.evaluation.budgets.ignores.numbers = (0, 1, 2, 4)
  config.evaluation.budgets.rejection.numbers = (4, 8, 16)
  config.evaluation.budgets.rejection.retries = 4
  return config
