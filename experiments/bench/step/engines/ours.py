"""Ours: python ours.py <folder> <prompts> <samples> <steps> <dtype>."""

import json
import pathlib
import sys
import tempfile

import jax
import letters
from ml_collections import ConfigDict

from reasonrl import rewarding, train
from reasonrl.configs import common
from reasonrl.tokenizers.byte_level_bpe import ByteLevelBPE

PROMPT, NEW = 72, 64  # most tokens of a prompt, tokens of a completion
END = 7  # <gh_stars>


def config(folder: str, prompts: int, samples: int, steps: int, dtype: str):
  made = common.base('bench')
  made.models.policy = common.model('smollm2_135m')
  made.models.policy.weights, made.models.policy.compute_dtype = folder, dtype
  made.tokenizer = common.tokenizer('tokenizer_json')
  made.tokenizer.path = f'{folder}/tokenizer.json'
  made.task = common.jsonl()
  made.task.train = made.task.test = f'{folder}/prompts.jsonl'
  made.prompt = common.prompt('plain')
  made.prompt.max_length = PROMPT
  made.rewards = ConfigDict({'letters': {'weight': 1.0}})
  made.phases = ('rl',)
  made.rl = common.reinforce('deepseekmath_grpo', learning_rate=1e-6)
  made.rl.steps, made.rl.prompts_per_step, made.rl.eval_every = steps, prompts, 0
  made.rl.env.num_generations, made.rl.env.max_completion_length = samples, NEW
  made.rl.row_length, made.rl.rows_per_batch = PROMPT + samples * NEW, 2  # a row is a group
  made.evaluation = common.evaluation()
  made.evaluation.num_examples, made.evaluation.correct = 1, 'letters'
  made.log.every, made.log.transcripts_every = 1, steps + 1
  made.checkpoint.save_every = steps
  return made


def main(folder: str, prompts: str, samples: str, steps: str, dtype: str) -> None:
  # Or the update's time would be found where the next step waits for it.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # No sample should end before the cap: with another end the model's own are forbidden.
  ByteLevelBPE.eos_ids = property(lambda tokenizer: (END,))
  train.TABLES['reward']['letters'] = letters.Letters
  made = config(folder, int(prompts), int(samples), int(steps), dtype)
  with (
    tempfile.TemporaryDirectory() as workdir,
    rewarding.Pool(made.rewarding.workers, made.rewarding.timeout_s) as pool,
  ):
    train.run(made, workdir, pool)
    rows = map(json.loads, (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines())
    rows = [row for row in rows if 'timing/step_s' in row]
  for row in rows:
    if row['completion_length'] < NEW:
      raise ValueError(f'completions of {row["completion_length"]} tokens, not {NEW}')
    timing = {
      k.removeprefix('timing/').removesuffix('_s'): v for k, v in row.items() if 'timing/' in k
    }
    print('STEP', json.dumps(timing))


if __name__ == '__main__':
  main(*sys.argv[1:])
