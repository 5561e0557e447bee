"""What controls of the sampler cost: decode with them beside decode without, interleaved.

  python experiments/bench/controls.py
  python experiments/bench/controls.py --model=smollm2_135m --compute_dtype=bfloat16 --rounds=5

Every row runs to its cap, so the token count is the same. `think_budget` is in it twice: with
numbers that never bind, and forced at half of the row. Plain decode is in it twice as well: how far
the second is from 1 is what chance does. Prints one line of JSON: per variant the median over
rounds of its time divided by plain decode's of the same round, with the quartiles.
"""

import json
import time

import jax
import numpy as np
from absl import app, flags

from reasonrl import controls, sampling, sharding, types
from reasonrl.configs import common
from reasonrl.models import decoder

MODEL = flags.DEFINE_enum('model', 'nano', ['nano', 'micro', 'smollm2_135m'], 'Size of the model.')
DTYPE = flags.DEFINE_enum('compute_dtype', 'float32', ['float32', 'bfloat16'], 'Of products.')
ROUNDS = flags.DEFINE_integer('rounds', 30, 'Timed rounds.')
ROWS = flags.DEFINE_integer('rows', 0, 'Sequences; 0: 512, for smollm2 64.')
NEW = flags.DEFINE_integer('new', 0, 'New tokens per sequence; 0: 40, for smollm2 64.')
PROMPT = 16
BUDGET = controls.ThinkBudget(
  start=(), end=((4,), (5,)), end_ids=(4, 5), wait=(6, 7), final=(4, 5, 8)
)


def main(_) -> None:
  large = MODEL.value == 'smollm2_135m'
  rows, new = ROWS.value or (64 if large else 512), NEW.value or (64 if large else 40)
  config = common.model(MODEL.value)
  config.vocab_size = config.vocab_size or 32
  config.compute_dtype = DTYPE.value
  fields = {k: v for k, v in config.items() if k not in ('kind', 'weights')}
  model, mesh = decoder.Decoder(**fields), sharding.make_mesh(-1, 1, 1)
  params = jax.jit(model.init)(jax.random.key(0))
  sampler = sampling.Sampler(model, mesh, (0,), **common.sampler())  # the stop id is never drawn
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, config.vocab_size, (rows, PROMPT), dtype=np.int32)
  row = np.arange(rows, dtype=np.int32)
  variants = {
    'plain': ((), {}),
    'plain again': ((), {}),
    'think_budget, never binding': ((BUDGET,), {'max_think': 0, 'min_think': 0, 'ignores': 0}),
    'think_budget, forced': ((BUDGET,), {'max_think': new // 2, 'min_think': 0, 'ignores': 2}),
    'force': ((controls.Force((6, 7)),), {'forced': 2}),
    'forbid': ((controls.Forbid((4, 5)),), {'forbidden': new}),
  }

  def decode(applied, numbers):
    requests = types.Requests(
      tokens_PT=tokens,
      length_P=np.full(rows, PROMPT, np.int32),
      prompt_R=row,
      key_R=sampling.row_keys(0, 'train', 0, 0, 0, row, 0, 0),
      max_new_R=np.full(rows, new, np.int32),
      numbers={name: np.full(rows, n, np.int32) for name, n in numbers.items()},
      temperature_R=None,
    )
    spec = types.Spec(1.0, 0, 1.0, 0.0, 0, (0,), applied)
    start = time.perf_counter()
    out = sampler.generate(params, requests, spec, 0, lambda: None)
    assert (out.length_R == PROMPT + new).all()
    return time.perf_counter() - start

  seconds = {name: [] for name in variants}
  for name in variants:
    decode(*variants[name])  # compiles
  for _ in range(ROUNDS.value):
    for name in rng.permutation(list(variants)):
      seconds[name].append(decode(*variants[name]))
  plain = np.asarray(seconds['plain'])
  ratios = {
    name: [round(float(q), 3) for q in np.quantile(np.asarray(s) / plain, (0.5, 0.25, 0.75))]
    for name, s in seconds.items()
    if name != 'plain'
  }
  result = {
    'model': MODEL.value,
    'compute_dtype': DTYPE.value,
    'sequences x new tokens': [rows, new],
    'plain, tokens/s': round(rows * new / float(np.median(plain)), 1),
    'ratio (median, quartiles)': ratios,
    'rounds': ROUNDS.value,
    'jax': jax.__version__,
    'devices': [str(d) for d in jax.devices()],
  }
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
