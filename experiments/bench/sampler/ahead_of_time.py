"""The sampler compiled for a TPU v5e that is not here: bytes of a step, memory of a program.

    pip install -e '.[tpu-aot]'          # Python 3.12, JAX 0.11.2 or newer
    python experiments/bench/sampler/ahead_of_time.py

Prints a table and writes it to ahead_of_time.md beside this file; about six minutes on two cores.
The shapes are Qwen2.5-1.5B's: 64 rows, 2048 new tokens each, prompts of 512 tokens with 8 samples.

  W        weights, bfloat16, GB
  caches   keys and values of the rows and, once, of their prompts, GB
  step     read and written in HBM per step, of W + all slots of the caches
  floor    time of a step at the chip's bandwidth, ms, and the tokens per second that makes
  temp     memory of the whole program (prefill, ladder of segments, fewer rows, refill) beside its
           arguments and results, of the caches, which it holds: a segment and its double are 1.5,
           what fewer rows hold comes on top. Of four layers, since all of them take long to
           compile; activations and logits weigh more there
"""

from __future__ import annotations

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reasonrl import caches, sampling, types
from reasonrl.configs import common
from reasonrl.experiments import ahead_of_time
from reasonrl.models import decoder
from reasonrl.sampling import loop, plan, rows

QWEN = {  # 2.5, of 1.5 billion parameters
  **{'vocab_size': 151936, 'num_layers': 28, 'width': 1536, 'mlp_width': 8960, 'qkv_bias': True},
  **{'num_heads': 12, 'num_kv_heads': 2, 'head_dim': 128, 'rope_theta': 1e6, 'norm_eps': 1e-6},
  **{'max_position': 32768, 'compute_dtype': 'bfloat16'},
}
CHIP, ROWS, PROMPT, NEW, SAMPLES = 'v5e', 64, 512, 2048, 8
SPEC = types.Spec(1.0, 0, 1.0, 0.0, 0, (0,), ())


class Case(NamedTuple):
  """A sampler on one chip, and what its programs are given."""

  sampler: sampling.Sampler
  params: dict  # shapes, as `Sampler.layout` leaves them
  put: object  # tree -> the same shapes, on the chip

  def cache(self, rows: int, slots: int):
    return jax.eval_shape(lambda: self.sampler.model.init_cache(rows, slots, self.sampler.dtype))


def case(chip: str, layers: int = 0, **sampler) -> Case:
  """`layers` 0: all of the model's; `sampler`: fields of the section that differ."""
  mesh = Mesh(np.array(ahead_of_time.devices(chip)[:1]).reshape(1, 1, 1), types.MESH_AXES)
  config = common.model('smollm2_135m')
  config.update(QWEN | ({'num_layers': layers} if layers else {}))
  model = decoder.Decoder(**{k: v for k, v in config.items() if k not in ('kind', 'weights')})
  made = sampling.Sampler(model, mesh, (0,), **{**common.sampler(), **sampler})
  whole = NamedSharding(mesh, PartitionSpec())
  put = functools.partial(
    jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
  )
  shapes = put(jax.eval_shape(model.init, jax.random.key(0)))
  return Case(made, put(jax.eval_shape(made.layout, shapes)), put)


def bytes_of(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def steps(case: Case):
  """The executable of steps until all rows have stopped, the state donated; bytes of its cache."""
  model = case.sampler.model

  def state(params):
    cache = model.init_cache(ROWS, NEW, case.sampler.dtype)
    prompts = model.init_cache(ROWS // SAMPLES, PROMPT, case.sampler.dtype)
    cache = caches.share(prompts, jnp.full(ROWS // SAMPLES, PROMPT), cache)
    tokens, length = jnp.zeros((ROWS, PROMPT), jnp.int32), jnp.full(ROWS, PROMPT)
    made = rows.of_prompts(cache, tokens, length, PROMPT + NEW)
    made = rows.assign(made, jnp.zeros((ROWS, 2), jnp.uint32), jnp.full(ROWS, NEW), {})
    return rows.begin(made, params, model, SPEC, NEW)

  def run(params, state):
    policy = case.sampler._policy(params, SPEC, wakes=False)
    live = lambda state: jnp.any(state.live_B)
    return jax.lax.while_loop(live, lambda state: loop.step(policy, state), state)

  given = case.put(jax.eval_shape(state, case.params))
  mesh = case.sampler.mesh
  executable = ahead_of_time.compiled(run, [case.params, given], mesh, donate_argnums=1)
  return executable, bytes_of((given.cache.own, given.cache.shared))


def program(case: Case, requests: int, slots: int):
  """The executable of `Sampler._sample`, and the bytes of the caches that it holds."""
  row = np.arange(requests)
  asked = types.Requests(
    tokens_PT=np.zeros((requests // SAMPLES, PROMPT), np.int32),
    length_P=np.full(requests // SAMPLES, PROMPT, np.int32),
    prompt_R=(row // SAMPLES).astype(np.int32),
    key_R=np.zeros((requests, 2), np.uint32),
    max_new_R=np.full(requests, NEW, np.int32),
    numbers={},
    temperature_R=None,
  )
  (wave,) = plan.waves(asked, slots, 1, PROMPT, PROMPT + NEW)
  lowered = sampling.Sampler._sample.lower(
    case.sampler, case.params, case.put(wave.arrays), SPEC, *wave[2:], PROMPT + NEW
  )
  held = bytes_of(case.cache(wave.rows, NEW)) + bytes_of(case.cache(requests // SAMPLES, PROMPT))
  if slots:  # copies of the prompts that rows are at
    held += bytes_of(case.cache(wave.rows // SAMPLES, PROMPT))
  return lowered.compile(), held


def measure(cache_dtype: str) -> list[str]:
  """A row of the table."""
  of = case(CHIP, cache_dtype=cache_dtype)
  step, held = steps(of)
  weights = bytes_of(of.params)
  moved = ahead_of_time.traffic(step)
  seconds = moved / ahead_of_time.CHIPS[CHIP].bandwidth
  few, temps = case(CHIP, 4, cache_dtype=cache_dtype), []
  for requests, slots in ((ROWS, 0), (8 * ROWS, ROWS)):
    executable, inside = program(few, requests, slots)
    temps.append(f'{executable.memory_analysis().temp_size_in_bytes / inside:.2f}')
  size = [f'{weights / 1e9:.2f}', f'{held / 1e9:.2f}', f'{moved / (weights + held):.3f}']
  return [cache_dtype, *size, f'{1e3 * seconds:.1f}', f'{ROWS / seconds:.0f}', *temps]


def main(_) -> None:
  titles = ['cache', 'W', 'caches', 'step', 'floor', 'tok/s', 'temp', 'temp, refilled']
  lines = ['| ' + ' | '.join(titles) + ' |', '|' + '---|' * len(titles)]
  for cache_dtype in ('auto', 'int8'):
    lines.append('| ' + ' | '.join(measure(cache_dtype)) + ' |')
    print(lines[-1], flush=True)
  (pathlib.Path(__file__).parent / 'ahead_of_time.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  app.run(main)
