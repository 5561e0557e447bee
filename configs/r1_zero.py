"""R1-Zero (arXiv 2501.12948): reasoning from verifiable rewards alone, by GRPO.

  python -m reasonrl.main --config=configs/r1_zero.py
"""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch: pretrain on a trace mixture, then GRPO',
  'debug': 'the same in about a minute, too short to learn much',
}


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  config = common.base('r1_zero')
  config.phases = ('pretrain', 'rl')
  config.models.policy = common.model('nano')
  config.tokenizer = common.tokenizer('sentencepiece')
  config.tokenizer.model_type = 'char'  # one token per swap, cup and tag
  config.tokenizer.byte_fallback = False
  config.task = common.shuffled_objects(num_swaps=8)
  config.prompt = common.prompt('plain')
  config.prompt.add_bos = True
  # Format alone must not ask for thinking: an empty think span is well-formed here, so that
  # thinking grows only because it makes answers right.
  config.rewards = common.rewards(accuracy=1.0, r1_format=1.0)
  config.rewards.r1_format.allow_empty_think = True

  config.pretrain = common.supervised(learning_rate=3e-3)
  config.pretrain.steps = 800
  config.pretrain.optim.schedule = 'cosine'
  config.pretrain.optim.warmup_steps = 50
  config.pretrain.optim.weight_decay = ((r'scale|bias', 0.0), (r'.*', 0.01))

  config.rl = common.reinforce('grpo', learning_rate=3e-4)
  config.rl.steps = 60
  config.rl.env.max_completion_length = 40

  config.evaluation = common.evaluation()
  config.evaluation.env.max_completion_length = 40

  if variant == 'debug':
    config.pretrain.steps = 60
    config.rl.steps = 6
    config.rl.env.prompts_per_step = 8
    config.rl.eval_every = 3
    config.evaluation.num_examples = 64
    config.log.every = 1
  config.lock()
  return config
