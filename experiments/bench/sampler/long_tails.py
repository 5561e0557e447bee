"""Tokens per second of the sampler where lengths have a long tail, as those of reasoning have.

  python experiments/bench/sampler/long_tails.py

512 samples of 64 prompts, lengths exp(normal(3.4, 1)) cut to 4 to 384 tokens, on a micro decoder in
float32. Three forms, interleaved: all rows to the longest; all rows, those that live moving
together; 64 rows, each of which takes the next request when it stops. Prints the seconds of each.
"""

import json
import time

import jax
import numpy as np
from absl import app, flags

from reasonrl import sampling, sharding, types
from reasonrl.configs import common
from reasonrl.models import decoder

ROWS = flags.DEFINE_integer('rows', 512, 'Samples, 8 for each prompt.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs of each form.')


def main(_) -> None:
  config = common.model('micro')
  config.update(vocab_size=64, max_position=512)
  model = decoder.Decoder(**{k: v for k, v in config.items() if k not in ('kind', 'weights')})
  params = jax.jit(model.init)(jax.random.key(0))
  rng, row = np.random.default_rng(0), np.arange(ROWS.value)
  new = np.clip(np.exp(rng.normal(3.4, 1.0, row.size)), 4, 384).astype(np.int32)
  requests = types.Requests(
    tokens_PT=rng.integers(4, 60, (-(-row.size // 8), 32), dtype=np.int32),
    length_P=np.full(-(-row.size // 8), 32, np.int32),
    prompt_R=(row // 8).astype(np.int32),
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, row, 0, 0),
    max_new_R=new,
    numbers={},
    temperature_R=None,
  )
  spec, mesh = types.Spec(1.0, 0, 1.0, 0.0, 0, (0,), ()), sharding.make_mesh(1, 1, 1)
  forms = {'to the longest': (1, 0), 'moving together': (4, 0), '64 rows, refilled': (4, 64)}
  seconds, out = {name: [] for name in forms}, {}
  for i in range(REPEATS.value + 1):  # the first run compiles
    for name, (buckets, slots) in forms.items():
      how = {**common.sampler(), 'buckets': buckets}
      sampler = sampling.Sampler(model, mesh, (0,), **how)
      start = time.perf_counter()
      out[name] = sampler.generate(params, requests, spec, slots, lambda: None)
      if i:
        seconds[name].append(round(time.perf_counter() - start, 2))
  whole = out['to the longest']
  for found in out.values():
    np.testing.assert_array_equal(found.length_R, whole.length_R)
    assert (found.tokens_RS == whole.tokens_RS).mean() > 0.99
  medians = {name: float(np.median(s)) for name, s in seconds.items()}
  result = {
    'tokens': int(new.sum()),
    'longest': int(new.max()),
    'seconds': seconds,
    'tokens/s': {name: round(float(new.sum()) / s) for name, s in medians.items()},
    'times as fast': {n: round(medians['to the longest'] / s, 2) for n, s in medians.items()},
    'jax': jax.__version__,
    'devices': [str(d) for d in jax.devices()],
  }
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
