"""LCPO (arXiv 2503.04697): a model thinks for as many tokens as its prompt asks for."""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch: pretrain, LCPO-Exact, then LCPO-Max on top of it',
  'exact': 'the first two: the response has as many tokens as asked',
  'max': 'the same as without a name',
  'debug': 'all three in a minute, too short to learn much',
}


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  config = tiny()
  if variant == 'exact':
    config.phases = ('pretrain', 'exact')
  if variant == 'debug':
    config.pretrain.steps = 60
    for section in (config.exact, config['max']):
      section.steps = 4
      section.prompts_per_step = 8
      section.eval_every = 2
    config.evaluation.num_examples = 64
    config.log.every = 1
  config.lock()
  return config


def tiny():
  """A nano decoder that tracks a ball through twelve swaps, in up to forty tokens."""
  config = common.base('lcpo')
  config.phases = ('pretrain', 'exact', 'max')
  config.models.policy = common.model('nano')
  config.tokenizer = common.tokenizer('sentencepiece')
  config.tokenizer.model_type = 'char'
  config.tokenizer.byte_fallback = False
  config.task = common.shuffled_objects(num_swaps=12)
  # All lengths are there to be chosen: strides, passes and fillers.
  config.task.wait_probability = 0.5
  config.task.trace_filler_probability = 0.2
  config.task.direct_filler_probability = 0.7
  config.prompt = common.prompt('plain')
  config.prompt.add_bos = True
  config.prompt.max_length = 24
  # The base has read targets that say nothing about its traces; L1's ignores them as well.
  config.prompt.augmentations = targets(share_max=0.5)
  config.rewards = common.rewards(lcpo=1.0, accuracy=0.0)
  config.rewards.lcpo.alpha = 0.03  # 1.2 / 40, as the paper's .0003 for targets up to 4,000
  config.rewards.lcpo.violation_tokens = 5

  config.pretrain = common.supervised(learning_rate=3e-3)
  config.pretrain.steps = 1000
  config.pretrain.row_length = 96
  config.pretrain.rows_per_batch = 16
  config.pretrain.optim.schedule = 'cosine'
  config.pretrain.optim.warmup_steps = 50
  config.pretrain.optim.weight_decay = ((r'scale|bias', 0.0), (r'.*', 0.01))

  config.exact = reinforce(300)
  config.exact.augmentations = targets(share_max=0.0)
  config['max'] = reinforce(60)
  config['max'].augmentations = targets(share_max=0.5)

  config.evaluation = common.evaluation()
  config.evaluation.env.max_completion_length = 64
  return config


def targets(share_max: float):
  """Targets of 6 to 40 tokens, in few characters."""
  out = common.augmentations('length_target')
  out.length_target.update(min_tokens=6, max_tokens=40, step=2, share_max=share_max)
  out.length_target.update(template_exact='={n}', template_max='<{n}')
  return out


def reinforce(steps: int):
  section = common.reinforce('grpo', learning_rate=3e-4)
  section.steps = steps
  section.row_length = 96
  section.rows_per_batch = 16
  section.env.max_completion_length = 64
  section.eval_every = 20
  return section
