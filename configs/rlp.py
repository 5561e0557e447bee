r"""RLP (arXiv 2510.01265): a model thinks before it predicts the next token of ordinary text, and
is paid for what the thought tells of it.

  python -m reasonrl.main --config=configs/rlp.py              tiny model from scratch, VarChain
  python -m reasonrl.main --config=configs/rlp.py:ntp          with the loss of the text beside it
  python -m reasonrl.main --config=configs/rlp.py:uniform      at any token of the text
  python -m reasonrl.main --config=configs/rlp.py:rpt          RPT (arXiv 2506.08007), one token
  python -m reasonrl.main --config=configs/rlp.py:prefix       the same, up to four tokens
  python -m reasonrl.main --config=configs/rlp.py:cpt          the same compute of next-token loss
  python -m reasonrl.main --config=configs/rlp.py:other        control: paid for another's thought
  python -m reasonrl.main --config=configs/rlp.py:short        control: thoughts of two tokens
  python -m reasonrl.main --config=configs/rlp.py:posttrain \
    --config.sft.init=runs/rlp/phases/rlp --config.tokenizer.kind=saved \
    --config.tokenizer.path=runs/rlp/tokenizer                 SFT and GRPO on questions, on top
  python -m reasonrl.main --config=configs/rlp.py:text --config.task.train=train.txt \
    --config.task.test=test.txt                                a tiny model on a text of yours
  python -m reasonrl.main --config=configs/rlp.py:smollm2 ...  SmolLM2-135M-Instruct, the same files
  python -m reasonrl.main --config=configs/rlp.py:paper ...    the numbers of the paper
  python -m reasonrl.main --config=configs/rlp.py:debug        the first, short

Expected on two CPU cores (experiments/rlp_varchain/ has the runs, three seeds):
  the first   4 min; gain of thinking at answers of three hops from .12 to .75 nats, accuracy from
              .72 to .90; without a thought .56 and .52
  :rpt        .95 of them; :ntp .78; :cpt .71; :uniform .57; :other .38; :short .49
  :smollm2    20 min; gain from -5.0 to -4.8: it does not learn to close a thought in 16 steps
  :posttrain  1 min; questions of three hops from .99 after SFT to 1.00
  :debug      half a minute; no more than a check that everything runs

There is no official code. What the paper leaves open and what was chosen: the policy samples
</think> and is trained on it; at the cap it is written. A thought has neither <think> nor EOS, and
does not begin with </think>: sampler and trainer both know. Texts are scored at temperature 1, and
without thinking by their own tokens alone. Clipping is at .2, which with one update per thought
does nothing.

The names of the paper and of its readers, and where they are here:

  reward               rewards.information_gain | prefix_match | token_match, with env.predicts
  advantage            algorithm.baseline: leave_one_out | batch_mean | none
  length norm          algorithm.loss_agg: seq_mean_token_mean | token_sum_const |
                       seq_mean_token_sum
  no-think scorer      env.no_think: ema | policy | ref | empty_think;  tau: optim.ema_decay
  eps_l, eps_h, beta   algorithm.epsilon, epsilon_high, beta;  inner epochs: num_iterations
  next-token loss      ntp_coef;  G: env.num_generations
  gamma, clip, floor   rewards.information_gain.discount, clip, floor
"""

from reasonrl.configs import common

VARIANTS = {
  '': 'tiny model from scratch on texts in which some tokens need reasoning',
  'ntp': 'the same with .3 of the next-token loss beside it',
  'uniform': 'the same at any token of a text, not half of them at answers',
  'rpt': 'the same with the reward of RPT for a single token',
  'cpt': 'continued pretraining with the same compute',
  'prefix': 'the same with the reward of RPT: up to four tokens are said, byte by byte right',
  'other': 'a control: the reward is that of the thought about another text',
  'short': 'a control: thoughts of two tokens',
  'posttrain': 'SFT and GRPO on questions of the same world',
  'text': 'tiny model from scratch on a text of yours',
  'smollm2': 'SmolLM2-135M-Instruct on a text of yours',
  'paper': 'the numbers of the paper, on a text of yours',
  'debug': 'the first in half a minute, too short to learn much',
}


def get_config(arg=''):
  """The experiment; `arg` is a key of VARIANTS."""
  variant = common.parse(arg, VARIANTS)
  others = {'posttrain': posttrain, 'text': text, 'smollm2': smollm2, 'paper': paper}
  config = others.get(variant, tiny)()
  if variant == 'ntp':
    config.rlp.ntp_coef = 0.3
  if variant == 'uniform':
    config.rlp.env.position_sampler = 'uniform'
  if variant == 'rpt':
    config.rewards.information_gain.weight = 0.0
    config.rewards.token_match.weight = 1.0
    config.rlp.env.predicts = 1
  if variant == 'prefix':
    config.rewards = common.rewards(information_gain=0.0, prefix_match=1.0, token_match=0.0)
    config.rlp.env.predicts = 4
  if variant == 'cpt':
    config.phases = ('pretrain', 'cpt')
    config.cpt = common.supervised(learning_rate=config.rlp.optim.learning_rate)
    config.cpt.steps = config.rlp.steps
    # The paper's match, G (context + thought) + context tokens a position: with contexts of 20 that
    # is 288 texts of 29 tokens for the 32 positions of a step.
    config.cpt.examples_per_step = 288
    config.cpt.row_length = config.pretrain.row_length
    config.cpt.rows_per_batch = 16
    config.cpt.eval_every = config.rlp.eval_every
  if variant == 'other':
    config.rlp.env.thoughts = 'other'
  if variant == 'short':
    config.rlp.env.max_thought = 2  # a sampled </think> included
    config.evaluation.env.max_thought = 2
  if variant == 'debug':
    config.pretrain.steps = 60
    config.rlp.steps = 6
    config.rlp.prompts_per_step = 8
    config.rlp.eval_every = 3
    config.evaluation.num_examples = 64
    config.log.every = 1
  config.lock()
  return config


def world(name: str):
  """`base` with a nano decoder and the tokens of VarChain, without thoughts in its texts."""
  config = common.base(name)
  config.models.policy = common.model('nano')
  config.models.policy.tied_embeddings = False  # tied, it does not learn to add
  config.tokenizer = common.tokenizer('sentencepiece')
  config.tokenizer.model_type = 'char'
  config.tokenizer.byte_fallback = False
  config.task = common.varchain()
  config.task.thought_probability = 0.0
  config.prompt = common.prompt('plain')
  config.prompt.add_bos = True
  config.prompt.max_length = 32
  return config


def tiny():
  """A nano decoder learns the texts of VarChain, then to think before their tokens."""
  config = world('rlp')
  config.phases = ('pretrain', 'rlp')
  config.rewards = common.rewards(information_gain=1.0, token_match=0.0, trace=0.0)

  config.pretrain = common.supervised(learning_rate=3e-3)
  config.pretrain.task = common.varchain()
  config.pretrain.steps = 3000
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
  config.rlp.eval_every = 25
  config.rlp.optim.ema_decay = 0.99  # the paper's .999 has a half-life of 693 steps
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
  held_out.no_think = 'policy'  # any phase has it
  held_out.slots = 1024
  return config


def posttrain():
  """Questions of the same world, with answers: worked solutions, then GRPO."""
  config = world('rlp_posttrain')
  config.phases = ('sft', 'rl')
  config.task = common.varchain()
  config.task.form = 'question'
  config.rewards = common.rewards(accuracy=1.0, r1_format=1.0)
  config.rewards.r1_format.allow_empty_think = True

  config.sft = common.supervised(learning_rate=1e-3)
  config.sft.steps = 100
  config.sft.examples_per_step = 64
  config.sft.rows_per_batch = 16
  config.sft.optim.schedule = 'cosine'

  config.rl = common.reinforce('grpo', learning_rate=3e-4)
  config.rl.steps = 100
  config.rl.env.num_generations = 8
  config.rl.env.max_completion_length = 20
  config.rl.row_length = 64
  config.rl.rows_per_batch = 16
  config.rl.eval_every = 25

  config.evaluation = common.evaluation()
  config.evaluation.num_examples = 512  # there are 700 questions to hold out, 620 of three hops
  config.evaluation.by = 'hops'
  config.evaluation.env.max_completion_length = 20
  return config


def text():
  """The tiny run on a file. Where a thought helps is not known, so positions are the hard ones.

  The model has never seen a thought: this shows the machine at work, not a result. What is held out
  are any positions, so that they are the same in every evaluation.
  """
  config = tiny()
  config.name = 'rlp_text'
  config.models.policy.max_position = 512
  config.tokenizer = common.tokenizer('sentencepiece')
  config.task = common.text()
  config.prompt.max_length = 16
  config.rewards = common.rewards(information_gain=1.0, token_match=0.0)
  config.pretrain.task = {}
  config.pretrain.row_length = 256
  config.pretrain.rows_per_batch = 8
  config.rlp.row_length = 256
  config.rlp.rows_per_batch = 8
  config.evaluation.by = ''
  for env in (config.rlp.env, config.evaluation.env):
    env.position_sampler = 'uniform'
    env.class_weights = {}
    env.max_context = 128
  config.rlp.env.position_sampler = 'topq_entropy'
  config.evaluation.num_examples = 256
  return config


def paper():
  """Qwen3-1.7B-Base in the paper, a general corpus; learning rate, batch and lengths are its own.

  Optimizer and clipping are not stated there. The model here is the one that comes with a package:
  give another with config.models.policy and config.tokenizer.
  """
  config = smollm2()
  config.task.max_chars = 8000
  config.rlp.steps = 1200
  config.rlp.prompts_per_step = 512
  config.rlp.row_length = 4352
  config.rlp.rows_per_batch = 1
  config.rlp.eval_every = 100
  config.rlp.optim.learning_rate = 1e-6
  config.rlp.optim.ema_decay = 0.999
  for env in (config.rlp.env, config.evaluation.env):
    defaults = common.next_token()
    defaults.instruction = _INSTRUCTION
    env.update(defaults)
  config.rlp.env.slots = 64
  config.evaluation.env.update(no_think='policy', num_generations=4, slots=64)
  return config


# The paper's prompt says the same; it is printed with a slip, so this is our wording.
_INSTRUCTION = (
  'You continue a text. Think briefly, between <think> and </think>, about what comes next. Then '
  'go on with the text in its own style, without a comment.\n\n'
)


def smollm2():
  """Short thoughts before the tokens of a text, at positions that are hard without them."""
  config = common.smollm2_sums('rlp')
  config.phases = ('rlp',)
  config.task = common.text()
  config.task.max_chars = 800
  config.prompt = common.prompt('plain')
  config.rewards = common.rewards(information_gain=1.0, token_match=0.0)

  config.rlp = common.reinforce('rlp', learning_rate=1e-5)
  config.rlp.steps = 16
  config.rlp.prompts_per_step = 8
  config.rlp.row_length = 192
  config.rlp.rows_per_batch = 8
  config.rlp.eval_every = 0
  config.rlp.optim.ema_decay = 0.99
  config.rlp.env = env = common.next_token()
  env.num_generations = 8
  env.instruction = _INSTRUCTION
  env.max_context = 96
  env.max_thought = 16
  env.position_sampler = 'topq_entropy'

  config.evaluation = common.evaluation()
  config.evaluation.num_examples = 128
  config.evaluation.correct = 'token_match'
  config.evaluation.env = held_out = env.copy_and_resolve_references()
  held_out.position_sampler = 'uniform'
  held_out.num_generations = 2
  held_out.no_think = 'policy'
  held_out.slots = 64
  return config
