"""The fused loss beside other ways to compute it: time of value and both gradients, and memory.

  python experiments/bench/policy_loss/times.py                                   # two CPU cores
  python experiments/bench/policy_loss/times.py --tokens=4096,8192,16384,32768 \\
      --widths=2048,4096 --vocab=151936 --dtype=bfloat16 --liger                  # a GPU

GRPO's clipped surrogate on random hidden states. Forms:

  fused          ours, in --dtype
  materialised   all logits, float32 softmax, autodiff; operands in float32 on a CPU (what a plain
                 implementation does there), in --dtype elsewhere
  checkpointed   the same by chunks of --rows tokens under jax.checkpoint: no logits kept, 8MDV
  liger          LigerFusedLinearGRPOLoss (liger-kernel, PyTorch), in a process of its own

Before anything is timed the forms must agree. They take turns within a round; printed: the median
time, the median over rounds of a form's time divided by ours, the share of the peak that 6MDV
operations in that time are (peak: the best square product of the same machine, measured here), and
what the compiled program needs beside arguments and results.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from reasonrl import ops, sharding
from reasonrl.kernels import dense, policy_loss
from reasonrl.kernels.policy_loss import reference

TOKENS = flags.DEFINE_list('tokens', ['1024'], 'Scored tokens.')
WIDTHS = flags.DEFINE_list('widths', ['576'], 'Width of the hidden states.')
VOCAB = flags.DEFINE_integer('vocab', 49152, 'Words.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the operands.')
BACKEND = flags.DEFINE_enum('backend', 'auto', ops.BACKENDS, 'Of the fused loss.')
ROWS = flags.DEFINE_integer('rows', 0, "Tokens per chunk; 0: the platform's.")
ROUNDS = flags.DEFINE_integer('rounds', 10, 'Timed rounds.')
LIGER = flags.DEFINE_bool('liger', False, 'Time Liger too; needs liger-kernel and PyTorch.')


def loss_fn(logp, entropy, aux):
  del entropy
  ratio = jnp.exp(logp - aux['old_logp'])
  surrogate = jnp.minimum(ratio * aux['adv'], jnp.clip(ratio, 0.8, 1.2) * aux['adv'])
  return -surrogate * aux['weight'], {}


def length(M: int) -> int:
  """Tokens per sequence: they share an advantage."""
  return min(M, 1024)


def inputs(M, D, V):
  """Hidden states, head, targets, aux: float32 on the host; matrices of numbers that bfloat16 has,
  so that every form sees the same."""
  rng = np.random.default_rng(0)
  rounded = lambda x: x.astype(jnp.bfloat16).astype(np.float32)
  hidden = rounded(rng.standard_normal((M, D), np.float32))
  head = rounded(rng.standard_normal((V, D), np.float32) * D**-0.5)
  targets = rng.integers(0, V, M).astype(np.int32)
  logp = (hidden * head[targets]).sum(1) - np.log(V) - 0.5  # about: ratios near 1
  old_logp = (logp + 0.1 * rng.standard_normal(M)).astype(np.float32)
  adv = rng.standard_normal(M // length(M)).astype(np.float32).repeat(length(M))
  return hidden, head, targets, {'old_logp': old_logp, 'adv': adv, 'weight': np.full(M, 1 / M)}


def forms(dtype, D, mesh):
  """name -> (hidden, head, bias, targets, aux) -> loss, (dhidden, dhead); and its dtype."""
  form = (1.0, None, 1.0, dtype)
  spec = ops.loss_spec(BACKEND.value, ROWS.value, form, {}, D, mesh)

  def fused(hidden, head, bias, targets, aux):
    zeros = jnp.zeros(head.shape, jnp.float32)
    (loss, _), grads = policy_loss.value_and_grads(
      hidden, head, bias, targets, {}, aux, loss_fn, spec, zeros
    )
    return loss, grads

  plain = jnp.dtype('float32') if mesh.devices.flat[0].platform == 'cpu' else dtype

  def whole(hidden, head, bias, targets, aux):
    return reference.policy_loss(hidden, head, bias, targets, {}, aux, loss_fn, (*form[:3], plain))

  def materialised(hidden, head, *rest):
    (loss, _), grads = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(hidden, head, *rest)
    return loss, grads

  def checkpointed(hidden, head, bias, targets, aux):
    def chunked(hidden, head):
      split = lambda x: x.reshape(-1, min(spec.rows, x.shape[0]), *x.shape[1:])

      @jax.checkpoint
      def one(head, hidden, targets, aux):
        return whole(hidden, head, bias, targets, aux)[0]

      step = lambda loss, chunk: (loss + one(head, *chunk), None)
      return jax.lax.scan(step, 0.0, jax.tree.map(split, (hidden, targets, aux)))[0]

    return jax.value_and_grad(chunked, argnums=(0, 1))(hidden, head)

  return {
    'fused': (fused, dtype),
    'materialised': (materialised, plain),
    'checkpointed': (checkpointed, plain),
  }


def peak(dtype, size: int) -> float:
  """Operations per second of the best of many square products."""
  a = jnp.ones((size, size), dtype)
  product = jax.jit(functools.partial(dense.contract, dims=(1, 1), compute_dtype=dtype))
  jax.block_until_ready(product(a, a))
  times = [timed(product, a, a)[0] for _ in range(20)]
  return 2 * size**3 / min(times)


def timed(function, *args):
  start = time.perf_counter()
  out = jax.block_until_ready(function(*args))
  return time.perf_counter() - start, out


def compare(M, D, V, dtype, mesh, best):
  """Prints a line per form; the median time of ours, and its loss."""
  hidden, head, targets, aux = inputs(M, D, V)
  compiled, args, memory = {}, {}, {}
  for name, (function, own) in forms(dtype, D, mesh).items():
    args[name] = jax.device_put((hidden, head, np.zeros(V, np.float32), targets, aux))
    args[name] = (*(x.astype(own) for x in args[name][:2]), *args[name][2:])
    try:
      compiled[name] = jax.jit(function).lower(*args[name]).compile()
      memory[name] = compiled[name].memory_analysis().temp_size_in_bytes
      compiled[name](*args[name])[0].block_until_ready()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      compiled.pop(name, None)
      print(f'{name}: does not fit', flush=True)
  agree({name: program(*args[name]) for name, program in compiled.items()})
  times = {name: [] for name in compiled}
  rng = np.random.default_rng(0)
  for _ in range(ROUNDS.value):
    for name in rng.permutation(list(compiled)):
      times[name].append(timed(compiled[name], *args[name])[0])
  for name in compiled:
    seconds = statistics.median(times[name])
    ratios = [a / b for a, b in zip(times[name], times['fused'], strict=True)]
    report = {
      **{'form': name, 'M': M, 'D': D, 'V': V, 'dtype': str(args[name][1].dtype)},
      **{'ms': round(1e3 * seconds, 1), 'of_ours': round(statistics.median(ratios), 2)},
      'quartiles': [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
      'of_peak': round(6 * M * D * V / seconds / best, 2),
      'temp_mb': round(memory[name] / 1e6, 1),
    }
    print(json.dumps(report), flush=True)
  return statistics.median(times['fused']), float(compiled['fused'](*args['fused'])[0])


def agree(results) -> None:
  """Losses to a hundredth, gradients to two: bfloat16 against float32.

  Raises:
    AssertionError: two forms do not compute the same.
  """
  loss, grads = results['fused']
  for name, (other, others) in results.items():
    assert abs(float(loss) - float(other)) < 1e-2 * abs(float(other)) + 1e-4, (name, loss, other)
    for a, b in zip(grads, others, strict=True):
      a, b = (x.astype(jnp.float32) for x in (a, b))
      gap = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
      assert gap < 2e-2, f'{name}: gradients differ by {gap:.3f}'


def liger(M, D, V, dtype: str, rounds: int) -> None:
  """Liger's loss on the same numbers: median seconds and peak memory, as JSON."""
  import torch
  from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  hidden, head, targets, aux = inputs(M, D, V)
  put = lambda x: torch.from_numpy(x).to(device)
  kind = getattr(torch, dtype)
  hidden = put(hidden).to(kind).reshape(-1, length(M), D).requires_grad_()
  head = put(head).to(kind).requires_grad_()
  rows = lambda x: put(x).reshape(-1, length(M))
  targets, old_logp, adv = rows(targets).long(), rows(aux['old_logp']), rows(aux['adv'])[:, 0]
  mask = torch.ones(targets.shape, device=device)
  loss_fn = LigerFusedLinearGRPOLoss(
    beta=0.0, use_ref_model=False, loss_type='grpo', compiled=device == 'cuda'
  )

  def step():
    hidden.grad = head.grad = None
    loss, _ = loss_fn(hidden, head, targets, mask, adv, old_per_token_logps=old_logp)
    loss.backward()
    if device == 'cuda':
      torch.cuda.synchronize()
    return float(loss.detach())

  for _ in range(3):
    loss = step()
  if device == 'cuda':
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
  report = {'form': 'liger', 'M': M, 'D': D, 'V': V, 'dtype': dtype, 'loss': loss}
  report['ms'] = round(1e3 * statistics.median(times), 1)
  if device == 'cuda':
    report['temp_mb'] = round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)
  print(json.dumps(report))


def main(argv) -> None:
  if argv[1:2] == ['liger']:
    M, D, V, dtype, rounds = argv[2:]
    liger(int(M), int(D), int(V), dtype, int(rounds))
    return
  mesh = sharding.make_mesh(1, 1, 1)
  device, dtype = mesh.devices.flat[0], jnp.dtype(DTYPE.value)
  best = peak(dtype, 2048 if device.platform == 'cpu' else 8192)
  print(f'{device.device_kind}, jax {jax.__version__}, peak {best / 1e12:.2f} TFLOP/s', flush=True)
  for D in map(int, WIDTHS.value):
    for M in map(int, TOKENS.value):
      ours, loss = compare(M, D, VOCAB.value, dtype, mesh, best)
      if LIGER.value:
        command = ['liger', M, D, VOCAB.value, DTYPE.value, ROUNDS.value]
        done = subprocess.run(
          [sys.executable, __file__, *map(str, command)], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
          raise RuntimeError('liger failed; what it said is above')
        found = json.loads(done.stdout.splitlines()[-1])
        assert abs(found['loss'] - loss) < 1e-2 * abs(loss) + 1e-4, (found, loss)
        print(json.dumps(found | {'of_ours': round(found['ms'] / 1e3 / ours, 2)}), flush=True)


if __name__ == '__main__':
  app.run(main)
