"""Tokens per second of our sampler by itself, and its share of the roofline, on any device.

  python experiments/bench/sampler/alone.py
  python experiments/bench/sampler/alone.py --model=qwen2.5_7b --segment=1024       # a GPU

Random weights, prompts of 64 random tokens, 8 samples of each at temperature 1, no token ends one.
A first turn compiles and is not timed; with --nowarm --repeats=1 the one that compiles is timed.
Rates are measured before each turn (see roofline.py).
Prints a line for every shape; --out appends them to a file. Every size of the ladder is compiled.
With heads of 16 to 128 an H100 reads a cache up to its last used slot, so that --segment=1024, one
size for all, costs no time there.
"""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
import roofline
from absl import app, flags

from reasonrl import sampling, sharding, types
from reasonrl.configs import common
from reasonrl.experiments import processor
from reasonrl.models import decoder

# What each has beyond SmolLM2-135M; of Qwen 2.5 (arXiv 2412.15115) as in its config.json.
SHAPES = {
  'smollm2_135m': {},
  'qwen2.5_7b': {
    **{'vocab_size': 152064, 'num_layers': 28, 'width': 3584, 'mlp_width': 18944},
    **{'num_heads': 28, 'num_kv_heads': 4, 'head_dim': 128, 'qkv_bias': True},
    **{'rope_theta': 1e6, 'tied_embeddings': False},
  },
}
MODEL = flags.DEFINE_enum('model', 'smollm2_135m', SHAPES, 'Shape of the model.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of weights and caches.')
CACHE = flags.DEFINE_enum('cache', 'auto', ['auto', 'int8'], 'Of keys and values.')
SEGMENT = flags.DEFINE_integer('segment', common.sampler().segment, 'Slots of a cache at first.')
ROWS = flags.DEFINE_list('rows', ['64', '256'], 'Samples at a time.')
NEW = flags.DEFINE_list('new', ['1024'], 'New tokens of each.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed turns.', lower_bound=1)
WARM = flags.DEFINE_bool('warm', True, 'Whether a turn that is not timed compiles first.')
OUT = flags.DEFINE_string('out', '', 'A file that lines are appended to.')
TRACE = flags.DEFINE_string('trace', '', 'Folder for a profile of one more turn of each shape.')
PROMPT, SAMPLES = 64, 8


def requests(vocab: int, rows: int, new: int, seed: int) -> types.Requests:
  row, prompts = np.arange(rows), -(-rows // SAMPLES)
  tokens = np.random.default_rng(seed).integers(vocab, size=(prompts, PROMPT), dtype=np.int32)
  return types.Requests(
    tokens_PT=tokens,
    length_P=np.full(prompts, PROMPT, np.int32),
    prompt_R=(row // SAMPLES).astype(np.int32),
    key_R=sampling.row_keys(seed, 'eval', 0, 0, 0, row, 0, 0),
    max_new_R=np.full(rows, new, np.int32),
    numbers={},
    temperature_R=None,
  )


def main(_) -> None:
  config = common.model('smollm2_135m').to_dict() | SHAPES[MODEL.value]
  config |= {'param_dtype': DTYPE.value, 'compute_dtype': DTYPE.value}
  known = {field.name for field in dataclasses.fields(decoder.Decoder)}
  model = decoder.Decoder(**{name: value for name, value in config.items() if name in known})
  key = jax.random.key(0)
  # Not compiled as a whole, which takes a GPU longer than the benchmark.
  normal = lambda x: 0.02 * jax.random.normal(key, x.shape, x.dtype)
  params = jax.tree.map(normal, jax.eval_shape(model.init, key))
  # One count of rows: all stop together.
  how = {'cache_dtype': CACHE.value, 'segment': SEGMENT.value, 'buckets': 1}
  sampler = sampling.Sampler(model, sharding.make_mesh(1, 1, 1), (), **how)
  spec = types.Spec(1.0, 0, 1.0, 0.0, 0, (model.vocab_size,), ())
  device = jax.devices()[0]
  name = processor.name() if device.platform == 'cpu' else device.device_kind
  for rows in map(int, ROWS.value):
    for new in map(int, NEW.value):
      seconds, shares, measured = [], [], []
      for turn in range(0 if WARM.value else 1, REPEATS.value + 1):
        rates = roofline.rates()
        asked = requests(model.vocab_size, rows, new, turn)
        start = time.perf_counter()
        found = sampler.generate(params, asked, spec, 0, lambda: None)
        spent = time.perf_counter() - start
        assert (found.length_R == PROMPT + new).all(), found.length_R
        if turn:
          prompts = asked.length_P.size
          dtypes = DTYPE.value, DTYPE.value if CACHE.value == 'auto' else CACHE.value
          least = roofline.floor(model, prompts, PROMPT, rows, new, *dtypes, rates)
          seconds.append(round(spent, 3))
          shares.append(round(least / spent, 3))
          measured.append({rate: float(f'{value:.3g}') for rate, value in rates.items()})
      if TRACE.value:
        with jax.profiler.trace(TRACE.value):
          sampler.generate(params, asked, spec, 0, lambda: None)
      line = json.dumps(
        {
          'model': MODEL.value,
          'dtype': DTYPE.value,
          **how,
          'rows': rows,
          'new': new,
          'tokens/s': round(rows * new / float(np.median(seconds))),
          'share of the roofline': float(np.median(shares)),
          'first compiles': not WARM.value,
          'seconds': seconds,
          'rates': {rate: float(np.median([m[rate] for m in measured])) for rate in measured[0]},
          'device': name,
          'jax': jax.__version__,
        }
      )
      print(line, flush=True)
      if OUT.value:
        with pathlib.Path(OUT.value).open('a') as file:
          file.write(line + '\n')


if __name__ == '__main__':
  app.run(main)
