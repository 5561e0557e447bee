"""TRL: python trl_grpo.py <folder> <prompts> <samples> <steps> <dtype>."""

import collections
import functools
import json
import os
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl

NEW, BATCH = 64, 8
# What a step does -> the trainer's method that does it; the update scores too, with gradients
METHODS = {
  'score': '_get_per_token_logps_and_entropies',
  'sample': '_generate',
  'rollout': '_generate_and_score_completions',
}


def letters(completions, **_):
  return [text.count('e') / max(1, len(text)) for text in completions]


class Clock(transformers.TrainerCallback):
  """Seconds of every step and of its parts."""

  def __init__(self):
    self.steps, self.parts = [], collections.Counter()

  def on_step_begin(self, *args, **kwargs):
    self.start = time.perf_counter()

  def on_step_end(self, *args, **kwargs):
    step = time.perf_counter() - self.start
    self.steps.append({**self.parts, 'step': step, 'update': step - self.parts['rollout']})
    self.parts.clear()

  def around(self, name, method):
    @functools.wraps(method)
    def timed(*args, **kwargs):
      start, update = time.perf_counter(), torch.is_grad_enabled() and name == 'score'
      try:
        return method(*args, **kwargs)
      finally:
        self.parts[name] += 0.0 if update else time.perf_counter() - start

    return timed


def main(folder: str, prompts: str, samples: str, steps: str, dtype: str) -> None:
  torch.set_num_threads(os.cpu_count())
  with open(f'{folder}/prompts.jsonl') as lines:
    rows = [{'prompt': json.loads(line)['problem']} for line in lines]
  sequences = int(prompts) * int(samples)
  clock = Clock()
  with tempfile.TemporaryDirectory() as output:
    config = trl.GRPOConfig(
      output_dir=output,
      use_cpu=True,
      bf16=dtype == 'bfloat16',
      model_init_kwargs={'dtype': getattr(torch, dtype)},
      per_device_train_batch_size=BATCH,
      gradient_accumulation_steps=sequences // BATCH,
      gradient_checkpointing=False,
      num_generations=int(samples),
      max_completion_length=NEW,
      generation_kwargs={'min_new_tokens': NEW},
      beta=0.04,
      loss_type='grpo',
      learning_rate=1e-6,
      max_steps=int(steps),
      save_strategy='no',
      report_to=[],
      disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
      model=folder,
      reward_funcs=letters,
      args=config,
      train_dataset=datasets.Dataset.from_list(rows),
      callbacks=[clock],
    )
    for name, method in METHODS.items():
      setattr(trainer, method, clock.around(name, getattr(trainer, method)))
    trainer.train()
  for step in clock.steps:
    print('STEP', json.dumps(step))


if __name__ == '__main__':
  main(*sys.argv[1:])
