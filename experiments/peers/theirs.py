"""TRL's side: its trainers' own methods, unmodified, on a batch that we choose.

A trainer is made without __init__, which would want a model and a data set, and gets the attributes
that its methods read. Only three things are ours: the model, which returns log-probabilities and
entropies of given logits; `_generate`, which returns given completions; the accelerator, of one
process. `_generate_and_score_completions` (old and reference log-probabilities, importance weights,
rewards, advantages) and `_compute_loss` then run as they are.
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
import types

import batches
import numpy as np
import torch
import trl

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # arrays are tiny

DEFAULTS = {  # trainer -> the values of its arguments
  trainer: vars(config(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[]))
  for trainer, config in ((trl.GRPOTrainer, trl.GRPOConfig), (trl.RLOOTrainer, trl.RLOOConfig))
}


class Accelerator:
  """One process on one CPU."""

  device = torch.device('cpu')
  num_processes, process_index, is_main_process, sync_gradients = 1, 0, True, True

  def gather(self, x):
    return x

  def reduce(self, x, reduction):
    return x

  def autocast(self):
    return contextlib.nullcontext()

  def unwrap_model(self, model):
    return model


class Model:
  """Called as transformers' patched head is: log-probability and entropy at every token's index."""

  training, is_gradient_checkpointing = True, False

  def __init__(self, logits, requires_grad=False):
    self.logits_BCV = torch.tensor(logits, requires_grad=requires_grad)
    self.rows = slice(None)

  def __call__(self, input_ids, attention_mask, labels, fused_lm_head):
    logp_BCV = self.logits_BCV[self.rows].log_softmax(-1)
    ids_BC = input_ids[:, batches.PROMPT :]
    logp_BC = logp_BCV.gather(-1, ids_BC[..., None])[..., 0]
    entropy_BC = -(logp_BCV.exp() * logp_BCV).sum(-1)
    scored_BC = labels[:, batches.PROMPT :] != -100
    left = lambda x: torch.nn.functional.pad(torch.where(scored_BC, x, 0.0), (batches.PROMPT, 0))
    return types.SimpleNamespace(log_probs=left(logp_BC), entropy=left(entropy_BC))


def make_trainer(cls, settings: dict, case: batches.Case):
  """A trainer without a model to train. settings: names of the config class, and their values."""
  args = types.SimpleNamespace(**(DEFAULTS[cls] | settings))
  self = object.__new__(cls)
  for name, value in vars(args).items():  # most attributes have the name of their argument
    with contextlib.suppress(AttributeError):  # a few are properties
      setattr(self, name, value)
  self.args, self.accelerator = args, Accelerator()
  self.epsilon_low = args.epsilon
  self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
  self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
  # old log-probabilities come from the model that sampled, which on policy is the trained one
  self.model, self.ref_model = Model(case.logits['old']), Model(case.logits['ref'])
  self._tokenizer = types.SimpleNamespace(pad_token_id=batches.PAD)
  self.eos_token_ids = [batches.EOS]
  self.environment_factories = self.environments = None
  self.tools, self.aux_loss_enabled, self._is_vlm = [], False, False
  self._step, self.state = 0, types.SimpleNamespace(global_step=0)
  self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
  self._logs = collections.defaultdict(list)
  self._logs |= {'rewards': collections.defaultdict(list), 'extra': collections.defaultdict(list)}
  self._pending_extra_logs, self._pending_metrics = {}, {}
  self.reward_func_names = list(case.rewards)
  self.reward_funcs = [lambda r=r, **_: list(r) for r in case.rewards.values()]
  self.reward_processing_classes = [None] * len(case.rewards)
  self.reward_weights = torch.tensor([batches.REWARD_WEIGHTS[name] for name in case.rewards])
  if cls is trl.GRPOTrainer:
    self._entropy_bonus_enabled = args.entropy_coef != 0 or args.use_adaptive_entropy
  self._generate = lambda prompts: generated(cls, case)
  return self


def generated(cls, case: batches.Case):
  """What `_generate` returns: lists without padding."""
  rows = [
    [list(x[:n]) for x, n in zip(x_BC, case.length_B, strict=True)]
    for x_BC in (case.tokens_BC, case.written_BC.astype(int), case.logp('sampler'))
  ]
  prompts, texts = [[2] * batches.PROMPT] * batches.B, [''] * batches.B
  if cls is trl.RLOOTrainer:
    return prompts, rows[0], texts
  return prompts, rows[0], rows[1], texts, rows[2], {}, None, []


def run(settings: dict, case: batches.Case, cls=trl.GRPOTrainer, step: int = 0) -> dict:
  """One optimizer step of TRL.

  Returns:
    'loss', 'gradient' [B, C, V] with respect to the policy's logits, 'advantages' [B], 'metrics'
    (TRL's names, mean over micro-batches).
  """
  self = make_trainer(cls, settings, case)
  policy = Model(case.logits['policy'], requires_grad=True)
  found = self._generate_and_score_completions([{'prompt': 'p'} for _ in range(batches.B)])
  self._metrics.clear()
  rows = batches.B // self.args.steps_per_generation
  total = 0.0
  for micro in range(self.args.gradient_accumulation_steps):
    first = rows * (step * self.args.gradient_accumulation_steps + micro)
    policy.rows = slice(first, first + rows)
    inputs = {k: v[policy.rows] if v.dim() else v for k, v in found.items()}
    loss = self._compute_loss(policy, inputs)
    loss.backward()
    total += loss.item()
  metrics = {name: float(np.mean(x)) for name, x in self._metrics['train'].items()}
  gradient = policy.logits_BCV.grad.numpy()
  advantages = found['advantages'].numpy()
  return {'loss': total, 'gradient': gradient, 'advantages': advantages, 'metrics': metrics}
