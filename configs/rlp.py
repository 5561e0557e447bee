r"""RLP (arXiv 2510.01265): a model thinks before it predicts the next token of ordinary text, and
is paid for what the thought tells of it.

  python -m reasonrl.main --config=configs/rlp.py              tiny model from scratch, VarChain
  python -m reasonrl.main --config=configs/rlp.py:debug        the same, short
"""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch on texts in which some tokens need reasoning',
  'debug': 'the same in half a minute, too short to learn much',
}


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  config = tiny()
  if variant == 'debug':
    config.pretrain.steps = 60
    config.rlp.steps = 6
    config.rlp.prompts_per_step = 8
    config.rlp.eval_every = 3
    config.evaluation.num_examples = 64
    config.log.every = 1
  config.lock()
  return config


def tiny():
  """A nano decoder reads VarChain: learns its texts, then to think before their tokens."""
  config = common.base('rlp')
  config.phases = ('pretrain', 'rlp')
  config.models.policy = common.model('nano')
  config.tokenizer = common.tokenizer('sentencepiece')
  config.tokenizer.model_type = 'char'
  config.tokenizer.byte_fallback = False
  config.task = common.varchain()
  config.task.thought_probability = 0.0  # of what is held out, and of what is thought about
  config.prompt = common.prompt('plain')
  config.prompt.add_bos = True
  config.prompt.max_length = 16
  config.rewards = common.rewards(information_gain=1.0, token_match=0.0, trace=0.0)

  config.pretrain = common.supervised(learning_rate=3e-3)
  config.pretrain.task = common.varchain()
  config.pretrain.steps = 2000
  config.pretrain.examples_per_step = 64
  config.pretrain.row_length = 96
  config.pretrain.rows_per_batch = 16
  config.pretrain.optim.schedule = 'cosine'
  config.pretrain.optim.final_fraction = 0.05
  config.pretrain.optim.warmup_steps = 100
  config.pretrain.optim.weight_decay = ((r'scale|bias', 0.0), (r'.*', 0.01))

  config.rlp = common.reinforce('rlp', learning_rate=3e-4)
  config.rlp.steps = 150
  config.rlp.prompts_per_step = 32
  config.rlp.row_length = 96
  config.rlp.rows_per_batch = 16
  config.rlp.eval_every = 50
  config.rlp.optim.ema_decay = 0.99
  config.rlp.env = env = common.next_token()
  env.num_generations = 8
  env.max_context = 48
  env.max_thought = 10
  env.temperature = 1.0
  env.position_sampler = 'class'
  env.class_weights = {'answer': 0.5}

  config.evaluation = common.evaluation()
  config.evaluation.correct = 'token_match'
  config.evaluation.by = 'class'
  config.evaluation.env = held_out = config.rlp.env.copy_and_resolve_references()
  held_out.class_weights = {'answer': 0.5, 'random': 0.15, 'markov': 0.15, 'syntax': 0.15}
  held_out.no_think = 'policy'
  held_out.num_generations = 8
  held_out.slots = 1024
  return config
