"""Tokens per second of the sampler and the learner, after compilation.

  python experiments/bench/throughput.py --model=nano
  python experiments/bench/throughput.py --model=nano --top_p=0.95
  python experiments/bench/throughput.py --model=smollm2_135m --compute_dtype=bfloat16

Sampling: `rows` sequences of `new` tokens, EOS ignored, tokens counted without prompts. Training:
one optimizer step (gradients, AdamW) on them, prompt and completion tokens counted, padding
not. Weights are random; the arithmetic is the same. Prints the minimum, median and maximum of
`repeats` runs, sampling and training interleaved, as one JSON line.
"""

import json
import os
import time

import jax
import numpy as np
from absl import app, flags

from reasonrl import learner, optim, packing, sampling, sharding, types
from reasonrl.configs import common
from reasonrl.models import decoder

MODEL = flags.DEFINE_enum('model', 'nano', ['nano', 'micro', 'smollm2_135m'], 'Size of the model.')
DTYPE = flags.DEFINE_enum('compute_dtype', 'float32', ['float32', 'bfloat16'], 'Of products.')
ROWS = flags.DEFINE_integer('rows', 0, 'Sequences; 0: 512, for smollm2 64.')
NEW = flags.DEFINE_integer('new', 0, 'New tokens per sequence; 0: 24, for smollm2 64.')
PROMPT = flags.DEFINE_integer('prompt', 16, 'Prompt tokens.')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Below 1 both sides work on the tokens that it keeps.')
REPEATS = flags.DEFINE_integer('repeats', 10, 'Timed runs.')


def main(_) -> None:
  large = MODEL.value == 'smollm2_135m'
  rows, new = ROWS.value or (64 if large else 512), NEW.value or (64 if large else 24)
  config = common.model(MODEL.value)
  config.vocab_size = config.vocab_size or 32
  config.compute_dtype = DTYPE.value
  fields = {k: v for k, v in config.items() if k not in ('kind', 'weights')}
  model, mesh = decoder.Decoder(**fields), sharding.make_mesh(-1, 1, 1)
  params = jax.jit(model.init)(jax.random.key(0))

  generator = np.random.default_rng(0)
  tokens = generator.integers(4, config.vocab_size, (rows, PROMPT.value), dtype=np.int32)
  numbers = np.arange(rows, dtype=np.int32)
  requests = types.Requests(
    tokens_PT=tokens,
    length_P=np.full(rows, PROMPT.value, np.int32),
    prompt_R=numbers,
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, numbers, 0, 0),
    max_new_R=np.full(rows, new, np.int32),
    numbers={},
    temperature_R=None,
  )
  # Token 0 is the stop id and forbidden, so every row runs to its cap.
  sampler = sampling.Sampler(model, mesh, (0,), **common.sampler())
  spec = types.Spec(1.0, 0, TOP_P.value, 0.0, config.vocab_size, (0,), ())
  section = common.optim(1e-5).to_dict()
  student = learner.Learner(
    model=model,
    mesh=mesh,
    tx=optim.build(optim.Optim(**section), params, 100),
    ema_decay=None,
    terms=(learner.Term(learner.nll, None, 'weight'),),
    form=sampler.form(1.0),
    forbidden=(0,),
    loss_backend='auto',
    loss_chunk=0,
  )
  state = student.init(params)
  row_length = 128 if not large else 256
  sample_s, train_s = [], []
  for i in range(REPEATS.value + 1):  # the first run compiles
    start = time.perf_counter()
    out = sampler.generate(state.params, requests, spec, 0, lambda: None)
    middle = time.perf_counter()
    weight = (out.source_RS == types.POLICY).astype(np.float32)
    aux = {'weight': weight} | ({} if out.kept_RSK is None else {'kept': out.kept_RSK})
    seqs = packing.sequences(out.tokens_RS, out.length_R, aux)
    batches, _ = packing.pack(seqs, row_length, 8, share=True)
    state, reports = student.update(state, batches, (weight.sum(),))
    learner.reduce_reports(reports)
    end = time.perf_counter()
    if i:
      sample_s.append(middle - start)
      train_s.append(end - middle)
  sampled, trained = rows * new, int(out.length_R.sum())
  step_s = [a + b for a, b in zip(sample_s, train_s, strict=True)]

  def spread(count, seconds):
    chosen = (max(seconds), float(np.median(seconds)), min(seconds))
    return [round(count / s, 1) for s in chosen]

  result = {
    'model': MODEL.value,
    'compute_dtype': DTYPE.value,
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    'top_p': TOP_P.value,
    'sequences x new tokens': [rows, new],
    'sampled tokens/s (min, median, max)': spread(sampled, sample_s),
    'trained tokens/s (min, median, max)': spread(trained, train_s),
    'step s (min, median, max)': [
      round(f(step_s), 2) for f in (min, lambda x: float(np.median(x)), max)
    ],
    'jax': jax.__version__,
    'devices': [str(d) for d in jax.devices()],
    'load average': [round(x, 2) for x in os.getloadavg()],
  }
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
