"""What a machine can do at best: its rates, and the time that the sampler's work takes at them."""

from __future__ import annotations

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from reasonrl.kernels import dense
from reasonrl.models import decoder


def rates() -> dict[str, float]:
  """Bytes per second that are read, and operations per second of products: the best of five.

  On a CPU two cores read at once. On an accelerator the bytes are those of a copy, both ways.
  """
  read, moved, matrices = _operands()
  best = lambda work: min(_seconds(work) for _ in range(5))
  found = {'bandwidth': moved / best(read)}
  for dtype, (a, b) in matrices.items():
    product = functools.partial(_product, a, b, a.dtype)
    product().block_until_ready()
    found[dtype] = 2 * a.shape[0] ** 3 / best(lambda work=product: work().block_until_ready())
  found['bfloat16'] = max(found['bfloat16'], found['float32'])  # some XLA convert instead
  return found


@functools.cache
def _operands():
  """What reads, how many bytes it moves, and two matrices by dtype."""
  on_cpu = jax.default_backend() == 'cpu'
  size = 2048 if on_cpu else 8192
  key = jax.random.key(0)  # products of zeros take a GPU less time
  fill = lambda dtype: jax.random.normal(key, (size, size), dtype)
  matrices = {dtype: (fill(dtype), fill(dtype)) for dtype in ('float32', 'bfloat16')}
  if on_cpu:
    x = [np.ones(64 * 2**20, np.float32) for _ in range(4)]
    return functools.partial(_read_both, x), sum(a.nbytes for a in x), matrices
  x = jnp.ones(2**29, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy(x).block_until_ready()
  return lambda: copy(x).block_until_ready(), 2 * x.nbytes, matrices


@functools.partial(jax.jit, static_argnums=2)
def _product(a, b, dtype):
  return dense.contract(a, b, (1, 1), dtype)


def _read_both(x) -> None:
  threads = [threading.Thread(target=np.dot, args=(x[i], x[i + 1])) for i in (0, 2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def _seconds(work) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def floor(
  model: decoder.Decoder, prompts: int, prompt: int, rows: int, new: int, dtype: str, cache: str,
  rates: dict,
) -> float:  # fmt: skip
  """Seconds that the machine needs for so many new tokens of rows that share prompts evenly.

  A step reads the weights and the caches, and multiplies each row with the weights: bytes at the
  bandwidth or products at the rate, whichever takes longer. Of a prompt only the last token meets
  the head. dtype: of the weights and products; cache: of keys and values, int8 with a float32 scale
  for each token and head.
  """
  width = jnp.dtype(dtype).itemsize
  layers = model.num_layers * (
    model.width * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    + 3 * model.width * model.mlp_width
  )
  head = model.vocab_size * model.width
  weights = layers + head
  seconds = 2 * (layers * prompt + head) * prompts / rates[dtype]
  head_bytes = model.head_dim + 4 if cache == 'int8' else model.head_dim * jnp.dtype(cache).itemsize
  token = 2 * model.num_layers * model.num_kv_heads * head_bytes  # keys and values
  for step in range(1, new):
    cached = token * (prompts * prompt + rows * step)
    attend = 4 * model.num_layers * model.num_heads * model.head_dim * rows * (prompt + step)
    read = (width * weights + cached) / rates['bandwidth']
    seconds += max(read, (2 * weights * rows + attend) / rates[dtype])
  return seconds
