"""google-tunix: python tunix_grpo.py <folder> <prompts> <samples> <steps> <dtype>.

A step is the time from one call of the reward to the next: all else of tunix's loop is inside.
"""

import collections
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.llama3 import model as model_lib
from tunix.models.llama3 import params as params_lib
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

sys.path.append(str(pathlib.Path(__file__).parents[2] / 'sampler' / 'engines'))
import tunix_sampler  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

PROMPT, NEW = 72, 64
METHODS = {
  'sample': 'generate',
  'score': 'get_ref_per_token_logps',
  'update': 'update_actor',
}


class Texts:
  """The folder's tokenizer under the names that tunix wants. No token ends a text."""

  def __init__(self, folder: str):
    self.inner = Tokenizer.from_file(f'{folder}/tokenizer.json')

  def encode(self, text, **_):
    return self.inner.encode(text, add_special_tokens=False).ids

  def decode(self, ids, **_):
    return self.inner.decode(list(ids))

  bos_id = staticmethod(lambda: 0)
  eos_id = staticmethod(lambda: -2)
  pad_id = staticmethod(lambda: -1)


def main(folder: str, prompts: str, samples: str, steps: str, dtype: str) -> None:
  prompts, samples, steps = int(prompts), int(samples), int(steps)
  config = tunix_sampler.model_config(folder)
  model_lib.apply_rope = functools.partial(model_lib.apply_rope, rope_theta=config.rope_theta)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  load = functools.partial(
    params_lib.create_model_from_safe_tensors, folder, config, mesh, dtype=jnp.dtype(dtype)
  )
  calls, parts, found = [], collections.Counter(), []

  def letters(prompts, completions, **_):
    calls.append(time.perf_counter())
    if len(calls) > 1:
      found.append({**parts, 'step': calls[-1] - calls[-2]})
    parts.clear()
    return [text.count('e') / max(1, len(text)) for text in completions]

  cluster = cluster_lib.RLCluster(
    actor=load(),
    reference=load(),
    tokenizer=Texts(folder),
    cluster_config=cluster_lib.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (cluster_lib.Role.ACTOR, cluster_lib.Role.REFERENCE, cluster_lib.Role.ROLLOUT), mesh
      ),
      training_config=cluster_lib.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-6),
        eval_every_n_steps=10**9,
        max_steps=steps + 1,
        mini_batch_size=prompts,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=NEW,
        temperature=1.0,
        max_prompt_length=PROMPT,
        kv_cache_size=PROMPT + NEW,
        eos_tokens=[-2],
      ),
    ),
  )
  for name, method in METHODS.items():
    setattr(cluster, method, _around(parts, name, getattr(cluster, method)))
  learner = grpo_learner.GRPOLearner(
    cluster, grpo_learner.GRPOConfig(num_generations=samples, beta=0.04), letters
  )
  lines = (pathlib.Path(folder) / 'prompts.jsonl').read_text().splitlines()
  texts = [json.loads(line)['problem'] for line in lines]
  take = lambda i: np.asarray([texts[(i * prompts + k) % len(texts)] for k in range(prompts)])
  learner.train([{'prompts': take(i)} for i in range(steps + 1)])
  for step in found:
    print('STEP', json.dumps(step))


def _around(parts, name, method):
  @functools.wraps(method)
  def timed(*args, **kwargs):
    start = time.perf_counter()
    try:
      return jax.block_until_ready(method(*args, **kwargs))
    finally:
      parts[name] += time.perf_counter() - start

  return timed


if __name__ == '__main__':
  main(*sys.argv[1:])
