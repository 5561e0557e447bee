"""draft"""

from reasonrl.configs import common

VARIANTS = {'': 'rat', 'plain': 'norat', 'debug': 'd'}


def addition(lo, hi, hint='none'):
  t = common.addition()
  t.min_digits = lo
  t.max_digits = hi
  t.hint = hint
  return t


def get_config(arg=''):
  arg = common.parse(arg, VARIANTS)
  c = common.base('star')
  c.phases = ('pretrain', ('collect', 'sft', 3))
  c.models.policy = common.model('nano')
  c.tokenizer = common.tokenizer('sentencepiece')
  c.tokenizer.model_type = 'char'
  c.tokenizer.byte_fallback = False
  c.task = addition(1, 5)
  c.prompt = common.prompt('plain')
  c.prompt.add_bos = True
  c.prompt.max_length = 32
  c.rewards = common.rewards(addition=1.0)
  members = {}
  n = [300, 3000, 300, 150, 75]
  w = [1, 1.5, 0.5, 0.5, 0.5]
  for i in range(5):
    members[f'plain{i + 1}'] = (
      round(w[i] / 4 * 0.6, 4),
      common.subset(addition(i + 1, i + 1), n[i]),
    )
    members[f'hinted{i + 1}'] = (0.08, common.subset(addition(i + 1, i + 1, hint='shown'), 1000))
  corpus = common.mixture(**members)
  c.pretrain = common.supervised(3e-3)
  p = c.pretrain
  p.task = corpus
  p.steps = 1500
  p.examples_per_step = 64
  p.row_length = 160
  p.rows_per_batch = 8
  p.optim.schedule = 'cosine'
  p.optim.warmup_steps = 50
  p.optim.weight_decay = ((r'scale|bias', 0.0), (r'.*', 0.01))
  c.collect = common.collect('star')
  c.collect.steps = 4
  c.collect.prompts_per_step = 1024
  c.collect.env.max_completion_length = 104
  c.collect.env.slots = 256
  c.collect.task = common.subset(addition(1, 5), 10000)
  if arg == 'plain':
    c.collect.p_rationalization = 0.0
  c.sft = common.supervised(3e-3)
  s = c.sft
  s.init = 'pretrain'
  s.steps = 250
  s.examples_per_step = 64
  s.row_length = 160
  s.rows_per_batch = 8
  kept = common.collected('collect')
  kept.balance = 'digits'
  s.task = common.mixture(kept=(0.75, kept), replay=(0.25, common.mixture(**members)))
  s.optim.schedule = 'cosine'
  s.optim.warmup_steps = 50
  s.optim.weight_decay = ((r'scale|bias', 0.0), (r'.*', 0.01))
  c.evaluation = common.evaluation()
  c.evaluation.num_examples = 500
  c.evaluation.correct = 'addition'
  c.evaluation.by = 'digits'
  c.evaluation.env.max_completion_length = 104
  if arg == 'debug':
    p.steps = 60
    s.steps = 10
    c.collect.steps = 2
    c.collect.prompts_per_step = 64
    c.evaluation.num_examples = 64
    c.phases = ('pretrain', ('collect', 'sft', 2))
  c.lock()
  return c
