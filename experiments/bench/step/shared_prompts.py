"""Scoring and gradients with the prompt of a group once per row, beside every sequence whole.

  python experiments/bench/step/shared_prompts.py
  python experiments/bench/step/shared_prompts.py --dtypes=float32

SmolLM2-135M's shapes with random weights, a group of eight completions of one length. Without
sharing a row holds one of them. Both forms take turns; writes the table shared_prompts.md beside
this file, and prints it: seconds, medians over the turns, and how many times as fast sharing is,
the median and the extremes of the turns.
"""

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from reasonrl import learner, optim, packing, sharding, types
from reasonrl.algorithms import grpo
from reasonrl.configs import common
from reasonrl.experiments import processor
from reasonrl.models import decoder

DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Of products.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed turns.', lower_bound=1)
# prompt, completion, completions in a row that share it
SHAPES = ((64, 64, 8), (256, 64, 8), (64, 256, 2), (64, 256, 8))
SAMPLES = 8
HERE = pathlib.Path(__file__).parent


def make_learner(dtype: str):
  """A learner with the paper's GRPO and KL, and parameters."""
  fields = common.model('smollm2_135m').to_dict() | {'compute_dtype': dtype}
  names = [field.name for field in dataclasses.fields(decoder.Decoder)]
  model = decoder.Decoder(**{name: fields[name] for name in names})
  params = jax.jit(model.init)(jax.random.key(0))
  algorithm = common.algorithm('deepseekmath_grpo').to_dict()
  algorithm.pop('name')
  student = learner.Learner(
    model=model,
    mesh=sharding.make_mesh(1, 1, 1),
    tx=optim.frozen(),
    ema_decay=None,
    terms=(learner.Term(grpo.GRPO(**algorithm).token_loss, None, 'weight'),),
    form=(1.0, None, 1.0, jnp.dtype(dtype)),
    forbidden=(),
    loss_backend='auto',
    loss_chunk=0,
  )
  return student, params


def make_group(vocab: int, prompt: int, new: int) -> list[types.Sequence]:
  rng, out = np.random.default_rng(0), []
  shared = rng.integers(1, vocab, prompt)
  for _ in range(SAMPLES):
    tokens = np.concatenate([shared, rng.integers(1, vocab, new)]).astype(np.int32)
    aux = {name: np.float32(rng.normal(size=new)) for name in ('adv', 'ref_logp', 'sampler_logp')}
    aux |= {'weight': np.ones(new, np.float32)}
    out.append(types.Sequence(tokens, np.arange(prompt, prompt + new), aux))
  return out


def measure(student, params, prompt: int, new: int, together: int):
  """{(part, whether it is shared): seconds of every turn}."""
  seqs = make_group(student.model.vocab_size, prompt, new)
  shapes = {False: (prompt + new, SAMPLES), True: (prompt + together * new, SAMPLES // together)}
  batches = {share: packing.pack(seqs, *shape, share)[0] for share, shape in shapes.items()}
  placed = {share: [sharding.put_rows(b, student.mesh) for b in batches[share]] for share in shapes}
  seconds = {(part, share): [] for part in ('score', 'gradient') for share in shapes}
  for turn in range(REPEATS.value + 1):  # the first one compiles
    for share in shapes:
      start = time.perf_counter()
      jax.block_until_ready([student.score(params, batch) for batch in placed[share]])
      middle = time.perf_counter()
      jax.block_until_ready(student.gradients(params, batches[share], (1.0,))[:2])
      end = time.perf_counter()
      if turn:
        seconds['score', share].append(middle - start)
        seconds['gradient', share].append(end - middle)
  return {key: np.asarray(value) for key, value in seconds.items()}


def main(_) -> None:
  lines = [
    f'{processor.name()}; {REPEATS.value} turns, {SAMPLES} samples of a prompt; seconds.\n',
    '| | prompt + completion | in a row | | whole | shared | times as fast |',
    '|---' * 7 + '|',
  ]
  for dtype in DTYPES.value:
    student, params = make_learner(dtype)
    for prompt, new, together in SHAPES:
      seconds = measure(student, params, prompt, new, together)
      for part in ('score', 'gradient'):
        whole, shared = seconds[part, False], seconds[part, True]
        ratio = whole / shared
        times = f'{np.median(whole):.2f} | {np.median(shared):.2f}'
        faster = f'{np.median(ratio):.2f} ({ratio.min():.2f}, {ratio.max():.2f})'
        shape = f'{prompt} + {new} | {together}'
        lines.append(f'| {dtype} | {shape} | {part} | {times} | {faster} |')
        logging.info(lines[-1])
  (HERE / 'shared_prompts.md').write_text('\n'.join(lines) + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  app.run(main)
