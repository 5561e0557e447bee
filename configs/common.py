"""Builders and presets: every field of every section, its default, unit and source.

A config calls these, changes what differs and says why. Library dataclasses have no defaults: what
is written here is the whole truth, and a test checks that sections and dataclasses agree. A
`placeholder(float)` is None until a float is given.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base(name: str) -> ConfigDict:
  """The sections that every experiment has; `phases` and their sections are the config's own."""
  return ConfigDict(
    {
      'name': name,
      'seed': 0,  # of weights, samples and minibatches; the problems have task.seed
      'phases': (),  # names of sections; a loop is a tuple ending in its repetitions
      'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},  # one size may be -1: all devices left
      'models': {},  # name -> model(...)
      'loss_backend': 'auto',  # of the fused loss: 'xla', 'pallas_tpu', 'pallas_gpu'
      'loss_chunk': 0,  # scored tokens of a device whose logits exist at a time; 0: its platform's
      'sampler': sampler(),
      'sentinels': True,  # look for broken runs in every step; see reasonrl/sentinels.py
      'max_skipped': 5,  # consecutive steps that are not finite before the run stops
      'rewarding': {'workers': 2, 'timeout_s': 10.0},  # processes; wall seconds per completion
      # s: SIGTERM to exit at the latest; keep_every 0: only the newest are kept
      'checkpoint': {'save_every': 20, 'keep_last': 2, 'keep_every': 0, 'grace_s': 20.0},
      'log': {
        'every': 10,  # steps between plain lines
        'transcripts_every': 10,  # steps
        'transcripts': 4,  # rollouts at a time
        'profile_step': 0,  # step of each phase to trace into <workdir>/profile; 0 = none
      },
      'compilation_cache': '~/.cache/reasonrl',  # of compiled programs; '' = none
    }
  )


def sampler() -> ConfigDict:
  """How rows are decoded; none of it changes what is sampled but 'int8'."""
  return ConfigDict(
    {
      # 'int8' halves the bytes of a cache. Its probabilities are not the learner's: see
      # the metrics of `mismatch`, and correct them by an importance weight of the algorithm.
      'cache_dtype': 'auto',  # the compute dtype
      # Slots of a cache at first; it doubles when a row needs more. Each size is compiled. An H100
      # reads up to the last used slot: there, as many as a row may need cost memory alone.
      'segment': 128,
      'buckets': 4,  # row counts that live rows move together in, each half the one before
    }
  )


# ------------------------------------------------------------------------------------ models


def _llama() -> dict:
  return {
    'kind': 'decoder',
    'weights': '',  # '' = random; a GGUF file, 'smollm2-135m-instruct', a Hugging Face folder
    'vocab_size': 0,  # 0 = the tokenizer's
    'num_layers': 2,
    'width': 64,
    'num_heads': 4,
    'num_kv_heads': 4,
    'head_dim': 16,
    'mlp_width': 172,
    'activation': 'silu',  # or 'gelu_tanh' (Gemma)
    'qkv_bias': False,  # Qwen 2
    'qk_norm': False,  # Qwen 3, Gemma 3
    'norm_plus_one': False,  # Gemma
    'post_norms': False,  # Gemma 2, 3
    'embed_scale': False,  # Gemma
    'attention_scale': placeholder(float),  # None = head_dim ** -0.5; Gemma has its own
    'attention_softcap': placeholder(float),  # Gemma 2: 50
    'final_softcap': placeholder(float),  # Gemma 2: 30
    'sliding_window': placeholder(int),  # Mistral 7B v0.1: 4096
    'sliding_window_pattern': 0,  # every n-th layer sees everything; Gemma 2: 2, Gemma 3: 6
    'rope_theta': 10000.0,
    'rope_scaling': 'default',  # or 'linear' (Gemma 3), 'llama3' (Llama 3.1), 'yarn' (Qwen 2.5, 3)
    'rope_factor': placeholder(float),  # Gemma 3 from 4B on: 8, Llama 3.1: 8, Qwen 2.5: 4
    # tokens, before 'llama3' or 'yarn' stretched them; Llama 3.1: 8192, Qwen 2.5: 32768
    'rope_original_max_position': placeholder(int),
    'rope_low_freq_factor': 1.0,  # turns within those tokens; Llama 3.1
    'rope_high_freq_factor': 4.0,
    'rope_beta_fast': 32.0,  # turns, as above; YaRN (arXiv 2309.00071, sec. 3.2)
    'rope_beta_slow': 1.0,
    'rope_attention_factor': placeholder(float),  # None = 0.1 ln(rope_factor) + 1 if 'yarn', else 1
    'rope_local_theta': placeholder(float),  # of windowed layers, unscaled; Gemma 3: 10000
    'tied_embeddings': True,
    'norm_eps': 1e-5,
    'max_position': 256,
    # Deep models compile sooner. Slower on a CPU, and on a GPU, which copies each layer's weights.
    'scan_layers': False,
    'remat': False,  # recompute activations in the backward pass
    'param_dtype': 'float32',
    'compute_dtype': 'float32',
  }


_SIZES = {
  # nano: methods text 0.3, with a gated MLP of the same size
  'nano': {},
  'micro': {'num_layers': 4, 'width': 128, 'head_dim': 32, 'mlp_width': 344},
  # HuggingFaceTB/SmolLM2-135M-Instruct (arXiv 2502.02737)
  'smollm2_135m': {
    'vocab_size': 49152,
    'num_layers': 30,
    'width': 576,
    'num_heads': 9,
    'num_kv_heads': 3,
    'head_dim': 64,
    'mlp_width': 1536,
    'rope_theta': 100000.0,
    'max_position': 8192,
  },
}


def model(size: str) -> ConfigDict:
  """A Llama-type decoder: 'nano' (0.1M parameters), 'micro' (0.8M), 'smollm2_135m'."""
  return ConfigDict({**_llama(), **_SIZES[size]})


def nano_shuffled_objects(name: str) -> ConfigDict:
  """`base` with a nano decoder, twelve swaps, and a section `pretrain` to learn their solutions."""
  config = base(name)
  config.models.policy = model('nano')
  config.tokenizer = tokenizer('sentencepiece')
  config.tokenizer.model_type = 'char'  # one token per swap, cup and tag
  config.tokenizer.byte_fallback = False
  config.task = shuffled_objects(num_swaps=12)
  config.prompt = prompt('plain')
  config.prompt.add_bos = True
  config.prompt.max_length = 16
  config.pretrain = supervised(learning_rate=3e-3)
  config.pretrain.steps = 1000
  config.pretrain.row_length = 96
  config.pretrain.rows_per_batch = 16
  config.pretrain.optim.schedule = 'cosine'
  config.pretrain.optim.warmup_steps = 50
  config.pretrain.optim.weight_decay = ((r'scale|bias', 0.0), (r'.*', 0.01))
  return config


# Two worked examples show the format; a 135M model does not follow a description of it.
_TWO_SUMS = """What is three plus four?
<think>3 + 4 = 7</think><answer>7</answer>
What is 12 + 25?
<think>12 + 25 = 37</think><answer>37</answer>"""


def smollm2_sums(name: str) -> ConfigDict:
  """`base` with SmolLM2-135M-Instruct and sums of two numbers up to 99, in digits or words."""
  config = base(name)
  config.models.policy = model('smollm2_135m')
  config.models.policy.weights = 'smollm2-135m-instruct'
  config.models.policy.compute_dtype = 'bfloat16'
  config.tokenizer = tokenizer('gguf')
  config.tokenizer.path = 'smollm2-135m-instruct'
  config.task = arithmetic()
  config.task.max_terms = 2
  config.task.operations = ('+',)
  config.prompt = prompt('chat')
  config.prompt.system = _TWO_SUMS
  config.prompt.prefill = '<think>'
  config.prompt.max_length = 112
  config.log.every = 1  # steps take half a minute
  config.checkpoint.save_every = 5
  return config


# ------------------------------------------------------------------------------------ text


def tokenizer(kind: str) -> ConfigDict:
  """'sentencepiece' (trained on the task's corpus unless `path` is set), 'bytes', 'gguf',
  'tokenizer_json', 'saved' (`path`: the tokenizer/ folder of a run)."""
  return ConfigDict(
    {
      'kind': kind,
      'path': '',  # a .model, GGUF or tokenizer.json file, or 'smollm2-135m-instruct'
      'vocab_size': 512,  # of a trained sentencepiece model: at most
      'model_type': 'bpe',  # 'bpe' | 'unigram' | 'char'
      'byte_fallback': True,  # unknown characters become bytes; else they are an error
      'corpus_examples': 2000,  # examples of the task to train on
    }
  )


def prompt(template: str) -> ConfigDict:
  """'plain', 'r1_zero' (arXiv 2501.12948, table 1) or 'chat' (the tokenizer's own template)."""
  return ConfigDict(
    {
      'template': template,
      'system': '',  # system message of 'chat'; '' = the template's own
      'prefill': '',  # how the completion is made to begin, such as '<think>'
      'add_bos': False,
      'augmentations': {},  # augmentations(...) of every phase that has none of its own
      # worked examples before the problem: '' = none, 'task' = the task's, or a text file of them,
      # separated by blank lines
      'few_shot': '',
      'few_shot_hinted': '',  # that file for prompts that show a hint; '' = the same
      'few_shot_count': 0,  # examples; 0 = all of the file. STaR: 10 ('task'), 7 and 6 (files)
      'max_length': 64,  # tokens; a longer prompt is an error
    }
  )


def augmentations(*names: str) -> ConfigDict:
  """What is added to problems, in the order of the names: see reasonrl/augmentations.py."""
  fields = {
    'length_target': {  # arXiv 2503.04697
      'min_tokens': 100,  # of a target, uniform; thinking, answer and EOS
      'max_tokens': 4000,  # at most max_completion_length
      'step': 1,  # targets are min_tokens, min_tokens + step, ...
      'share_max': 0.0,  # of targets that are a maximum; L1-Exact 0, L1-Max .5
      'template_exact': ' Think for {n} tokens.',
      'template_max': ' Think for maximum {n} tokens.',
    },
    'effort': {
      'levels': {'low': 512, 'medium': 1024, 'high': 3600},  # tokens; of L1's evaluation
      'level': '',  # one of them for all; '' = drawn, each as likely as any other
      'mode': 'max',  # or 'exact'
      'template': ' Reasoning effort: {level}.',
    },
    'length_label': {  # of collected solutions: token-conditional control (arXiv 2501.19393)
      'unit': 'think_tokens',  # | 'tokens': of the whole response | 'steps'
      'power_of_two': True,  # rounded up to one
      'separator': '\n\n',  # between steps
      'template': '\n\nThink for up to {n} tokens.',
    },
    'suffix': {'text': ''},  # e.g. class-conditional control
  }
  return ConfigDict({name: fields[name] for name in names})


# ------------------------------------------------------------------------------------ tasks


def shuffled_objects(num_swaps: int) -> ConfigDict:
  """Track one ball through swaps. The mixture makes a base that rarely thinks in small steps."""
  return ConfigDict(
    {
      'name': 'shuffled_objects',
      'seed': 0,
      'num_objects': 5,
      'num_swaps': num_swaps,
      'strides': (0, 4, 2, 1),  # 0 = answers without thinking; must divide num_swaps
      'stride_weights': (0.5, 0.1, 0.1, 0.3),
      'error_probability': 0.03,  # of a slip at each listed step
      'direct_known_probability': 0.2,  # a direct answer knows the truth, else it guesses
      'direct_filler_probability': 0.2,
      'trace_filler_probability': 0.05,
      'wait_probability': 0.0,  # of 'Wait' and another pass at the next stride; s1's toy .5
    }
  )


def arithmetic() -> ConfigDict:
  """Sums in digits and in words."""
  return ConfigDict(
    {
      'name': 'arithmetic',
      'seed': 0,
      'min_terms': 2,
      'max_terms': 3,
      'min_value': 1,
      'max_value': 99,
      'forms': ('digits', 'words'),
      'operations': ('+', '-'),
    }
  )


def addition() -> ConfigDict:
  """STaR's n-digit addition with a scratchpad (arXiv 2203.14465)."""
  return ConfigDict(
    {
      'name': 'addition',
      'seed': 0,
      'min_digits': 1,  # STaR trains on 1 to 5 and holds out 6 to 10
      'max_digits': 5,
      'hint': 'none',  # of the problems | 'shown' | 'pseudo': random digits, for a control
    }
  )


def countdown() -> ConfigDict:
  """Reach a target with all of the given numbers, 3 or 4 of them as in TinyZero."""
  return ConfigDict(
    {
      'name': 'countdown',
      'seed': 0,
      'min_numbers': 3,
      'max_numbers': 4,  # at most 6
      # Stream of Search (arXiv 2404.03683); for a tiny model values to 15 and targets to 60
      'min_value': 1,
      'max_value': 99,
      'min_target': 10,
      'max_target': 100,
      'operations': ('+', '-', '*', '/'),  # for a tiny model without '/'
    }
  )


def varchain() -> ConfigDict:
  """Texts in which some tokens need reasoning, and it is known which: see tasks/varchain.py."""
  return ConfigDict(
    {
      'name': 'varchain',
      'seed': 0,
      'form': 'text',  # | 'question': problems with answers
      'modulus': 5,
      'min_hops': 1,
      'max_hops': 3,
      'segments': 1,
      'min_words': 6,
      'max_words': 6,
      'num_words': 16,
      'thought_probability': 0.8,
      'thought_at_answer_probability': 0.8,
      'thought_kinds': (0.5, 0.25, 0.25),  # all hops, the first, dots
      'error_probability': 0.05,
    }
  )


def text() -> ConfigDict:
  """Texts of your own, to be read: JSON Lines or plain text, see tasks/text.py."""
  return ConfigDict(
    {
      'name': 'text',
      'seed': 0,  # of the order
      'train': '',  # a file; the files are the splits
      'test': '',
      'field': 'text',  # of a row of JSON
      'separator': '<|endoftext|>',  # between the texts of a plain file; '' = it is one text
      'max_chars': 2000,  # of a passage; a training row holds row_length tokens of it
    }
  )


def mixture(**members: tuple[float, ConfigDict]) -> ConfigDict:
  """Several tasks in one stream, e.g. mixture(sums=(3, arithmetic()), countdown=(1, countdown())).

  A member's name is free; weights are relative. Every member needs a reward that applies to it.
  """
  sections = {name: {'weight': w, 'task': task} for name, (w, task) in members.items()}
  return ConfigDict({'name': 'mixture', 'members': sections})


def subset(task: ConfigDict, size: int) -> ConfigDict:
  """The first `size` training examples of a task, over and over."""
  return ConfigDict({'name': 'subset', 'task': task, 'size': size})


def reasoning_gym(dataset: str) -> ConfigDict:
  """A data set of the package reasoning-gym (arXiv 2505.24760), extra `gym`."""
  return ConfigDict(
    {
      'name': 'reasoning_gym',
      'seed': 0,
      'dataset': dataset,  # one of tasks.reasoning_gym.DATASETS
      'dataset_config': {},  # its own fields, such as {'min_terms': 3}
    }
  )


def jsonl() -> ConfigDict:
  """Problems of your own: rows {"problem": ..., "answer": ...}, see tasks/jsonl.py."""
  return _files('jsonl')


def gsm8k() -> ConfigDict:
  """GSM8K's own files (arXiv 2110.14168): 7,473 and 1,319 rows. Needs the reward `gsm8k`."""
  return _files('gsm8k')


def commonsenseqa() -> ConfigDict:
  """CommonsenseQA's own files (arXiv 1811.00937): 9,741 rows; its development file, 1,221 rows, is
  the test. Needs the reward `commonsenseqa`."""
  return _files('commonsenseqa')


def _files(name: str) -> ConfigDict:
  return ConfigDict(
    {
      'name': name,
      'seed': 0,  # of the order of the rows
      'train': '',  # a JSONL file; the files are the splits
      'test': '',
    }
  )


def rewards(**weights: float) -> ConfigDict:
  """Reward name -> its weight and fields, e.g. rewards(accuracy=1.0, r1_format=1.0)."""
  fields = {
    'accuracy': {
      'after_think': True,  # the answer counts only after </think>
      'extraction': 'strict',  # boxed, answer tag or ####; 'lenient': else the last number
      'require_stop': False,  # True: a completion cut off at its cap earns 0
    },
    'addition': {},  # the line after the scratchpad
    'commonsenseqa': {},  # a first line that ends with '(b).'
    'countdown': {  # as in 'accuracy'
      'after_think': True,
      'require_stop': False,
    },
    'gsm8k': {},  # what follows '####'
    'r1_format': {'allow_empty_think': False},
    'open_r1_format': {},
    'tag_count': {},
    'soft_overlong': {'cache': 16},  # tokens before the cap; DAPO 4096 of 20480
    'lcpo': {  # arXiv 2503.04697; the first three as in 'accuracy'
      'after_think': True,
      'extraction': 'strict',
      'require_stop': False,
      'alpha': 3e-4,  # per token, for targets up to 4000: elsewhere 1.2 / the largest
      'delta': 0.5,  # of 'max'
      'max_form': 'paper',  # 'repository': half the slope | 'additive': an ablation
      'violation_tokens': 500,  # above the target
    },
    # arXiv 2502.03373. Its variants, as r_0^c, r_L^c, r_0^w, r_L^w: A 0, 10, 0, 0, where length
    # explodes; B 6, 5, -10, 0; C 10, 9, -10, 0
    'cosine': {  # the first three as in 'accuracy'
      'after_think': True,
      'extraction': 'strict',
      'require_stop': False,
      'value_correct_at_0': 2.0,  # r_0^c
      'value_correct_at_max': 1.0,  # r_L^c
      'value_wrong_at_0': -10.0,  # r_0^w
      'value_wrong_at_max': 0.0,  # r_L^w
      'value_exceeded': -10.0,  # r_e
      'max_length': 0,  # tokens; 0 = the completion's cap. The paper: 14336 of a window of 16k
      'margin': 16,  # tokens below max_length that count as exceeded; the authors' code
    },
    'information_gain': {  # RLP, arXiv 2510.01265
      'discount': 1.0,  # gamma, per token of a horizon above 1
      'clip': placeholder(float),  # None = none
      'floor': -30.0,  # of a log-probability: one impossible token would outweigh all others
    },
    'token_match': {},
    'prefix_match': {'boxed': False},  # RPT, arXiv 2506.08007: True
    'trace': {},
    'repetition': {  # arXiv 2502.03373
      'ngram': 40,  # tokens
      'penalty': -0.05,
      'only_start': False,  # of every stretch of repeats only the first n-gram
      'gamma': 0.99,  # per token; its scripts, its table favours .999; 0 with returns='to_go'
    },
    'repetition_sparse': {  # its last three as in 'accuracy'
      'ngram': 20,  # tokens; arXiv 2502.03373 (words); TRL 3
      'max_penalty': -1.0,  # open-r1 and TRL
      'wrong_only': True,  # arXiv 2502.03373
      'after_think': True,
      'extraction': 'strict',
      'require_stop': False,
    },
  }
  return ConfigDict({name: {'weight': w, **fields[name]} for name, w in weights.items()})


# ------------------------------------------------------------------------------------ phases


def optim(learning_rate: float) -> ConfigDict:
  """AdamW (arXiv 1711.05101) with TRL's clipping norm."""
  return ConfigDict(
    {
      'learning_rate': learning_rate,
      'schedule': 'constant',  # 'constant' | 'linear' | 'cosine'
      'warmup_steps': 0,  # optimizer steps
      'final_fraction': 0.1,  # of learning_rate, at the end of 'linear' and 'cosine'
      'b1': 0.9,
      'b2': 0.95,
      'eps': 1e-8,
      'weight_decay': ((r'scale|bias', 0.0), (r'.*', 0.0)),  # (regex, value), first match
      'lr_scale': ((r'.*', 1.0),),  # (regex, factor), first match; 0 freezes
      'max_grad_norm': 1.0,
      'ema_decay': placeholder(float),  # None = no moving average of the parameters
    }
  )


def supervised(learning_rate: float) -> ConfigDict:
  """Learn from worked solutions: loss from the prompt's end on, EOS included."""
  return ConfigDict(
    {
      'kind': 'supervised',
      'trains': 'policy',
      'init': 'previous',  # 'previous' | 'scratch' | the name of an earlier phase | a path
      'task': {},  # where its examples come from; {} = config.task
      'augmentations': {},  # of its problems; {} = prompt.augmentations
      'steps': 100,
      # in iteration n = 0, 1, ... of a loop: int(steps growth^n) + added n; STaR 40 and 1.2
      'steps_growth': 1.0,
      'steps_added': 0,
      'loss': 'nll',
      'few_shot': False,  # whether rows begin with the worked examples of prompt.few_shot
      'examples_per_step': 128,
      'row_length': 128,  # tokens of a packed row
      'rows_per_batch': 8,  # packed rows of a micro-batch: few enough to stay in a CPU's cache
      'eval_every': 0,  # steps; 0 = only at the end
      'optim': optim(learning_rate),
    }
  )


def reinforce(preset: str, learning_rate: float) -> ConfigDict:
  """Sample, score, assign credit by `algorithm(preset)`, update."""
  return ConfigDict(
    {
      'kind': 'reinforce',
      'trains': 'policy',
      'init': 'previous',
      # role -> model and source of its frozen parameters; loaded where the algorithm needs the role
      'reads': {'ref': reads()},
      'task': {},  # where its problems come from; {} = config.task
      'augmentations': {},  # of its problems; {} = prompt.augmentations
      'steps': 100,
      'prompts_per_step': 32,  # R1-Zero: 32 (arXiv 2501.12948, sec. 2.2)
      'env': single_turn(),
      'algorithm': algorithm(preset),
      # Rollouts per step at most, while too few groups are kept; DAPO 10 (dynamic sampling).
      'max_generation_batches': 10 if preset == 'dapo' else 1,
      'sampler_sync_steps': 1,  # the sampler's parameters are renewed every so many steps
      # of the next-token loss of the step's solutions or texts beside it; RLP, R1: 0
      'ntp_coef': 0.0,
      'shuffle_rewards': False,  # a control: rewards of a step go to random rollouts of it
      # At least prompt.max_length + max_completion_length. With room for more samples of a prompt,
      # which lies in a row once, work is saved where completions are not longer than the prompt;
      # on a CPU every token is multiplied with all keys of its row.
      'row_length': 128,
      'rows_per_batch': 8,
      'eval_every': 20,
      'optim': optim(learning_rate),
    }
  )


def reads() -> ConfigDict:
  """Parameters that a phase reads frozen; with sync_steps they follow the policy (TRL's names)."""
  return ConfigDict(
    {
      'model': 'policy',
      'init': 'previous',
      'sync_steps': 0,  # steps between syncs, 0 = never; TRL 512
      'mixup_alpha': 0.6,  # ref <- alpha policy + (1 - alpha) ref; TRL
    }
  )


COLLECT_PRESETS = {  # preset -> what it changes of `collect('star')`: of the section, of its env
  # arXiv 2203.14465: greedy, and for problems it fails again with the answer as a hint
  'star': ({}, {}),
  # arXiv 2308.01825: rejection sampling, 100 samples at temperature .7; the paper keeps one of each
  # list of equations, here every different text is kept
  'rft': ({'p_rationalization': 0.0}, {'num_generations': 100, 'temperature': 0.7}),
  # arXiv 2312.06585: 32 samples at .7 among the 40 likeliest tokens, at most 10 kept of a problem
  'rest_em': (
    {'p_rationalization': 0.0, 'max_per_problem': 10},
    {'num_generations': 32, 'temperature': 0.7, 'top_k': 40},
  ),
  # Expert iteration: samples of the policy as it is
  'expert_iteration': (
    {'p_rationalization': 0.0},
    {'num_generations': 4, 'temperature': 1.0},
  ),
}


def collect(preset: str) -> ConfigDict:
  """Sample, keep what is right, write it to a dataset that `collected` reads."""
  section = {
    'kind': 'collect',
    'trains': 'policy',  # what samples; it does not change
    'init': 'previous',
    'task': {},  # where its problems come from; {} = config.task
    'augmentations': {},  # of its problems; {} = prompt.augmentations
    'steps': 20,
    'prompts_per_step': 512,  # STaR: 10,000 problems in all
    'env': single_turn(),
    # of showing the hint where no sample was right, and of storing the problem with it; STaR 1, 0
    'p_rationalization': 1.0,
    'p_show_hint_save': 0.0,
    'max_per_problem': 0,  # rows kept of a problem, the first ones; 0 = all that differ
  }
  greedy = {'num_generations': 1, 'temperature': 0.0, 'max_kept_tokens': 0, 'slots': 512}
  of_section, of_env = COLLECT_PRESETS[preset]
  section['env'].update({**greedy, **of_env})
  return ConfigDict({**section, **of_section})


def collected(phase: str) -> ConfigDict:
  """What the latest run of a collect phase kept; '' with a `path`: what another run did."""
  return ConfigDict(
    {
      'name': 'collected',
      'phase': phase,
      'path': '',  # of a dataset, where there is no phase
      'seed': 0,  # of the order
      'balance': '',  # a field of meta whose values are seen equally often, such as 'digits'
    }
  )


def evaluate() -> ConfigDict:
  """Metrics only."""
  return ConfigDict({'kind': 'evaluate', 'trains': 'policy', 'init': 'previous', 'steps': 0})


def single_turn() -> ConfigDict:
  """One prompt, one completion. Names as in TRL."""
  return ConfigDict(
    {
      'name': 'single_turn',
      'num_generations': 16,  # G; R1-Zero: 16, TRL: 8
      'max_completion_length': 64,  # tokens, EOS included
      'temperature': 1.0,
      'top_k': 0,  # 0 = off
      'top_p': 1.0,
      'min_p': 0.0,  # keeps p >= min_p x the largest p (arXiv 2407.01082); 0 = off
      # tokens; training on a truncated draw needs the ids that were kept, more are an error
      'max_kept_tokens': 64,
      # Rows decoded at a time on each process; 0 = all. With fewer than there are samples a row
      # that stops takes the next one.
      'slots': 0,
      'controls': {},  # controls(...), applied in the order of their names
    }
  )


def next_token() -> ConfigDict:
  """Think before the next token of a text: RLP (arXiv 2510.01265).

  Numbers are the paper's unless it does not say: its 1.7B model, 170M to 1B tokens.
  """
  return ConfigDict(
    {
      'name': 'next_token',
      'position_sampler': 'uniform',  # 'every_k' | 'all' | 'topq_entropy' | 'class'
      'positions_per_text': 1,
      'every': 16,  # tokens; k of 'every_k'
      'top_entropy': 0.2,  # share of the positions, of 'topq_entropy'
      'class_weights': {},  # of 'class': kind of token -> probability; the rest is uniform
      'max_context': 2048,  # tokens
      'horizon': 1,  # tokens behind a thought; more are an extension
      'instruction': '',  # before the context (and its BOS), where it thinks; for base models none
      'num_generations': 16,  # G
      'max_thought': 2048,  # tokens, a sampled </think> included
      'min_thought': 1,  # tokens before it
      'train_close': True,  # a sampled </think> is trained as well: stopping is learned
      'temperature': 0.7,
      'top_k': 0,  # these four as in single_turn
      'top_p': 1.0,
      'min_p': 0.0,
      'max_kept_tokens': 64,
      'slots': 0,
      # whose prediction without a thought: 'ema' | 'policy' before the update | 'ref', frozen |
      # 'empty_think': of the average, behind <think></think>
      'no_think': 'ema',
      'thoughts': 'own',  # 'other', a control: those about the next position of the batch
      'predicts': 0,  # tokens that the model says behind its thought, instead of the text's: RPT
    }
  )


def controls(*names: str) -> ConfigDict:
  """What is written into completions, or kept out of them: see reasonrl/controls/."""
  fields = {
    'think_budget': {  # budget forcing, arXiv 2501.19393
      'start': '<think>',  # the prompt may end with it
      'end': '</think>',
      'wait': 'Wait',  # instead of an end that comes too early; '' = never
      'final': '</think><answer>',  # at the maximum; s1 '\nFinal Answer:' behind its end
      'max_think': 0,  # tokens; 0 = no maximum
      'min_think': 0,  # tokens
      'ignores': 0,  # ends that are replaced in any case; s1 2, L1's baseline 100
    },
    'force': {'text': '', 'forced': -1},  # how a completion begins; tokens of it, -1 = all
    'forbid': {'texts': (), 'forbidden': -1},  # for so many tokens, -1 = all
    'stop_strings': {'texts': ()},  # a completion ends behind the token that completes one
  }
  return ConfigDict({name: fields[name] for name in names})


def evaluation() -> ConfigDict:
  """Held-out pass@1 on distinct test problems: greedy, and sampled as `env` says.

  With env.num_generations above 1 also pass@k and majority@k for the powers of two up to it.
  """
  section = ConfigDict(
    {
      'num_examples': 1024,
      'correct': 'accuracy',  # the reward that means 'right'
      'augmentations': {},  # of its problems; {} = prompt.augmentations
      'budgets': {},  # budgets(...): sweeps of thinking budgets, at the end of every phase
      'by': '',  # a field of meta by which accuracy and length are reported, such as 'digits'
      'env': single_turn(),
    }
  )
  section.env.num_generations = 1
  section.env.max_kept_tokens = 0  # nothing trains on them
  section.env.slots = 128  # what stays in a CPU's cache is faster than all rows at once
  return section


def budgets(*names: str) -> ConfigDict:
  """Sweeps of thinking budgets: name -> its fields, see reasonrl/budgets.py.

  Strings and numbers are those of s1 (arXiv 2501.19393).
  """
  strings = controls('think_budget').think_budget.to_dict()
  # Token-conditional; L1 (arXiv 2503.04697) samples 16 responses at .6.
  target = {
    'numbers': (512, 1024, 2048, 3600),
    'temperature': 0.0,
    'template': '\n\nThink for up to {n} tokens.',
    'counts': 'thinking',  # tokens | 'response': tokens, thinking and answer | 'steps'
    'unit_tokens': 100,  # of thinking in a step
    'forced': False,  # with budget forcing at that number
    'think_budget': strings,
  }
  # Step-conditional, without s1's countdown; its request is not stated.
  steps = {**target, 'numbers': (16, 32, 64, 128), 'template': '\n\nThink for up to {n} steps.'}
  steps['counts'] = 'steps'
  forced = {'numbers': (512, 1024, 2048, 4096), 'temperature': 0.0, 'think_budget': strings}
  fields = {
    'max_think': {**forced, 'ignores': 0},
    'ignores': {**forced, 'numbers': (0, 1, 2, 4), 'max_think': 0},
    'target': target,
    'target_forced': {**target, 'forced': True},
    # LCPO-Max
    'at_most': {**target, 'template': ' Think for maximum {n} tokens.', 'counts': 'response'},
    'steps': steps,
    'steps_forced': {**steps, 'forced': True},
    'class': {
      'temperature': 0.0,
      'short': ' Answer after a short amount of thinking. Do not spend excessive time '
      'double-checking your work.',
      'long': ' Answer after a long amount of thinking. If you feel like you are finished early, '
      'spend the extra time trying to double-check your work until you are absolutely sure that '
      'you have the correct answer.',
    },
    'rejection': {'numbers': (512, 1024, 2048, 4096), 'temperature': 1.0, 'retries': 16},
  }
  return ConfigDict({name: fields[name] for name in names})


# ------------------------------------------------------------------------------------ algorithms


ALGORITHM_PRESETS = {  # preset -> what it changes of `algorithm('grpo')`
  # TRL's defaults (GRPOConfig), without its correction for a vLLM sampler; with beta above 0 its
  # newest version (1.16) has kl_estimator 'ratio_k3'
  'grpo': {},
  # arXiv 2402.03300, sec. 4.2 and eq. 3; epsilon is not stated there
  'deepseekmath_grpo': {'beta': 0.04, 'loss_agg': 'seq_mean_token_mean'},
  # arXiv 2503.20783: no std, constant divisor (set loss_constant to max_completion_length)
  'dr_grpo': {'scale_rewards': 'none', 'loss_agg': 'token_sum_const'},
  # arXiv 2503.14476: clip-higher, token mean, dynamic sampling (`reinforce` sets how often); its
  # length shaping is the reward `soft_overlong`
  'dapo': {'epsilon_high': 0.28, 'zero_variance': 'drop'},
  # arXiv 2402.14740: leave-one-out, sum over tokens, KL in the reward; beta of its sec. 4
  'rloo': {
    'baseline': 'leave_one_out',
    'scale_rewards': 'none',
    'loss_agg': 'seq_mean_token_sum',
    'beta': 0.03,
    'kl_estimator': 'k1',
    'kl_placement': 'reward',
  },
  # arXiv 2501.03262: token returns with KL, whitened over the batch; beta as in OpenRLHF
  'reinforce_pp': {
    'baseline': 'none',
    'scale_rewards': 'none',
    'returns': 'to_go',
    'whiten': True,
    'beta': 0.01,
    'kl_estimator': 'k1',
    'kl_placement': 'reward',
  },
  # the same paper, with the mean of the group subtracted first; KL (k2) in the loss
  'reinforce_pp_baseline': {
    'scale_rewards': 'none',
    'whiten': True,
    'beta': 0.001,
    'kl_estimator': 'k2',
  },
  # arXiv 2507.18071, sec. 5.1: sequence ratio, 4 minibatches
  'gspo': {
    'importance_sampling_level': 'sequence',
    'epsilon': 3e-4,
    'epsilon_high': 4e-4,
    'loss_agg': 'seq_mean_token_mean',
    'num_minibatches': 4,
  },
  # arXiv 2602.05261: GSPO with the loss of a completion times its length; epsilons as in TRL
  'luspo': {
    'importance_sampling_level': 'sequence',
    'epsilon': 2e-3,
    'epsilon_high': 2.5e-3,
    'loss_agg': 'seq_mean_token_sum',
    'num_minibatches': 4,
  },
  # arXiv 2506.13585; the cap (absolute) is that of ScaleRL, arXiv 2510.13786
  'cispo': {'surrogate': 'cispo', 'cispo_ratio_max': 5.0},
  # arXiv 2510.13786: CISPO, batch std, mean over prompts, no groups of equal rewards; it also has
  # the head in float32
  'scalerl': {
    'surrogate': 'cispo',
    'cispo_ratio_max': 5.0,
    'scale_rewards': 'batch',
    'loss_agg': 'prompt_mean',
    'zero_variance': 'drop',
  },
  # arXiv 2511.20347
  'sapo': {'surrogate': 'sapo', 'loss_agg': 'seq_mean_token_mean'},
  # arXiv 2602.10693
  'vespo': {'surrogate': 'vespo'},
  # arXiv 2602.02710: centred, divided by the mean
  'maxrl': {'scale_rewards': 'mean'},
  # arXiv 2601.05242: every reward function standardised on its own
  'gdpo': {'multi_objective_aggregation': 'normalize_then_sum'},
  # RLP, arXiv 2510.01265, eqs. 6 to 8: leave-one-out, mean over the tokens of a thought; epsilon is
  # not stated
  'rlp': {
    'baseline': 'leave_one_out',
    'scale_rewards': 'none',
    'loss_agg': 'seq_mean_token_mean',
  },
  # arXiv 2510.04028, 2506.01347: negative samples only
  'grpo_n': {'positive_weight': 0.0},
  # REINFORCE with PPO's clip on the batch-whitened return, no critic
  'reinforce_clip': {'baseline': 'none', 'scale_rewards': 'none', 'whiten': True},
}


def algorithm(preset: str) -> ConfigDict:
  """A key of ALGORITHM_PRESETS: 'grpo' = TRL's defaults. `--explain` prints the formula."""
  grpo = {
    'name': 'grpo',
    # ---- advantage = (R - baseline) / scale
    'baseline': 'group_mean',  # | 'leave_one_out' (RLOO) | 'batch_mean' | 'none'
    'scale_rewards': 'group',  # std of the 'group' | of the 'batch' | 'mean' (MaxRL) | 'none'
    # 'normalize_then_sum' (GDPO): each reward function by its own group, then the sum by the batch
    'multi_objective_aggregation': 'sum_then_normalize',
    'std_ddof': 1,  # torch.std; every torch peer
    'advantage_eps': 1e-4,  # added to a std; TRL; verl 1e-6
    'returns': 'outcome',  # one number per completion | 'to_go': per token, with dense rewards
    'gamma': 1.0,  # discount per token of 'to_go'
    'whiten': False,  # over the tokens of the batch
    'positive_weight': 1.0,  # factor of advantages above 0
    'negative_weight': 1.0,  # and below
    # ---- surrogate of the ratio
    'surrogate': 'ppo_clip',  # 'ppo_clip' | 'cispo' | 'sapo' | 'vespo' | 'reinforce' (no ratio)
    'importance_sampling_level': 'token',  # 'token' | 'sequence' (GSPO) | 'sequence_token'
    'log_ratio_clamp': placeholder(float),  # verl 20; TRL none
    'epsilon': 0.2,
    'epsilon_high': placeholder(float),  # None = epsilon; DAPO 0.28
    'dual_clip': placeholder(float),  # verl 3.0, always on; TRL none
    'delta': placeholder(float),  # TRL; INTELLECT-2 (arXiv 2505.07291)
    'cispo_ratio_max': placeholder(float),  # absolute: TRL's epsilon_high, verl's 1 + that
    'cispo_ratio_min': placeholder(float),
    'sapo_temperature_pos': 1.0,
    'sapo_temperature_neg': 1.05,
    'vespo_k_pos': 2.0,
    'vespo_lambda_pos': 3.0,
    'vespo_k_neg': 3.0,
    'vespo_lambda_neg': 2.0,
    # ---- sampler against trainer
    'old_policy': 'trainer',  # of the ratio: the 'trainer' before the update | the 'sampler'
    # 'none' | 'token_truncate' | 'token_mask' | 'sequence_truncate' | 'sequence_mask'
    'importance_correction': 'none',  # TRL with vLLM: 'sequence_mask'
    'importance_max': 3.0,  # TRL; verl 2.0
    'importance_min': placeholder(float),
    # ---- KL to the reference, entropy
    'beta': 0.0,
    'kl_estimator': 'k3',  # 'k1' | 'k2' | 'k3' | 'ratio_k3' | 'k3_plus': see rl_math.KL
    'kl_placement': 'loss',  # 'loss' | 'reward'
    'entropy_coef': 0.0,
    # ---- aggregation
    'loss_agg': 'token_mean',  # see aggregation.py; TRL loss_type 'dapo'
    'loss_constant': 512,  # L of 'token_sum_const'
    'local_rows': 8,  # completions of a block of 'token_mean_local'
    'mask_truncated_completions': False,
    # ---- which groups, how many optimizer steps
    'zero_variance': 'keep',  # groups of equal rewards: 'keep' | 'drop', see max_generation_batches
    'zero_variance_of': 'reward',  # or the name of one reward
    'num_iterations': 1,  # passes over an experience
    'num_minibatches': 1,  # optimizer steps per pass
  }
  return ConfigDict({**grpo, **ALGORITHM_PRESETS[preset]})


def parse(arg: str | None, variants: dict) -> str:
  """Checks the part behind the colon of --config=file.py:variant.

  Args:
    arg: the text behind the colon, '' or None for the default.
    variants: variant -> what it is.

  Raises:
    ValueError: an unknown variant; lists the choices.
  """
  if (arg or '') not in variants:
    choices = ', '.join(f':{name} ({what})' for name, what in variants.items() if name)
    raise ValueError(f'variant {arg!r} is not one of {choices}')
  return arg or ''
