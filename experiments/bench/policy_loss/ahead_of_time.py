"""The fused loss compiled for TPU v5e, v6e and an H100, without any of them: memory, bytes,
schedule.

    pip install -e '.[tpu-aot,gpu-aot]'          # Python 3.12, JAX 0.11.2 or newer
    python experiments/bench/policy_loss/ahead_of_time.py

Prints a table and writes it to ahead_of_time.md beside this file; about five minutes on two cores.
Every row is one compilation in a process of its own.

  temp     memory beside arguments and results, GB
  logits   float32 logits of the chunk, GB: what a gradient keeps, and scoring does not
  VMEM     on-chip memory of the forward and of the backward kernel, MB; a v5e and a v6e have 134
  bytes    read and written in HBM, GB, for one chunk (the compiler counts a loop's body once), and
           the time that takes at the chip's bandwidth, ms
  matrix   time of the chunk's products at the chip's peak, ms
  MXU      share of the kernels' static schedule in which the matrix units are busy: cycles the
           products need over bundles, in the part of a kernel that runs for every tile
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.sharding import Mesh

from reasonrl import ops, types
from reasonrl.experiments import ahead_of_time
from reasonrl.kernels import policy_loss
from reasonrl.kernels.policy_loss import pallas_tpu

BF16 = jnp.dtype('bfloat16')
CHIPS = ('v5e', 'v6e', 'h100')
BACKEND = {'v5e': 'pallas_tpu', 'v6e': 'pallas_tpu', 'h100': 'pallas_gpu'}
VOCABULARY = 151936
CASES = (
  *(('score', backend, 2048, VOCABULARY) for backend in ('kernel', 'xla')),
  *(('gradient', backend, 2048, VOCABULARY) for backend in ('kernel', 'xla')),
  ('gradient', 'kernel', 4096, VOCABULARY),
)


def clipped(logp, entropy, aux):
  """GRPO's clipped surrogate with an entropy bonus, as a loss that reads everything."""
  ratio = jnp.exp(logp - aux['old_logp'])
  surrogate = jnp.minimum(ratio * aux['adv'], jnp.clip(ratio, 0.8, 1.2) * aux['adv'])
  return aux['weight'] * -(surrogate + 0.01 * entropy), {'ratio': ratio}


def program(chip, what, backend, D, V, chunks):
  """The executable of `chunks` chunks, its Spec and number of tokens."""
  mesh = Mesh(np.array(ahead_of_time.devices(chip)[:1]).reshape(1, 1, 1), types.MESH_AXES)
  asked = BACKEND[chip] if backend == 'kernel' else backend
  spec = ops.loss_spec(asked, 0, (1.0, None, 1.0, BF16), {}, D, mesh)
  rows = policy_loss.BACKENDS[spec.backend].most_rows(spec.rows, D, spec.form)
  spec, M = spec._replace(rows=rows), rows * chunks
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
  numbers = functools.partial(array, jnp.float32)
  args = [array(BF16, M, D), array(BF16, V, D), numbers(V), array(jnp.int32, M), {}]
  if what == 'score':
    function = functools.partial(ops.token_logps, spec=spec, mesh=mesh)
    return ahead_of_time.compiled(function, args, mesh), spec, M
  args += [{name: numbers(M) for name in ('old_logp', 'adv', 'weight')}, numbers(V, D)]

  def function(hidden, head, bias, targets, support, aux, dhead):
    return ops.policy_loss_and_grads(
      hidden, head, bias, targets, support, aux, clipped, spec, mesh, dhead
    )

  return ahead_of_time.compiled(function, args, mesh, donate_argnums=6), spec, M


def measure(chip, what, backend, D, V, chunks, folder) -> dict:
  """One row of the table, in a process that `ahead_of_time.flags(folder)` started."""
  executable, spec, _ = program(chip, what, backend, D, V, chunks)
  memory, cost = executable.memory_analysis(), executable.cost_analysis() or {}
  found = {
    'temp': memory.temp_size_in_bytes,
    'alias': memory.alias_size_in_bytes,
    'rows': spec.rows,
    'backend': spec.backend,
    'bytes': cost.get('bytes accessed', 0),
    'flops': cost.get('flops', 0),
  }
  if spec.backend == 'pallas_tpu':
    found['mxu'] = shares(ahead_of_time.CHIPS[chip].macs, what, D, spec.rows, folder)
    found['vmem'] = on_chip_memory(executable)
  if chip == 'h100':
    assembly = [p.read_text() for p in pathlib.Path(folder).glob('*.ptx')]
    found['wgmma'] = {
      name: sum(len(re.findall(r'wgmma\.mma_async', text)) for text in assembly if name in text)
      for name in ('policy_loss_scores', 'gemm_fusion')
    }
  return found


def shares(macs: int, what: str, D: int, rows: int, folder) -> dict[str, float]:
  """For each kernel, the share of its schedule in which the matrix units are busy."""
  busy = lambda tokens: tokens * pallas_tpu.TILE * D // macs  # cycles of one product of a tile
  forward = ahead_of_time.regions(folder, 'policy_loss_forward')
  # Two branches hold the product; the one without a bias has no transposition.
  plain = min(r['bundles'] for r in forward if r['mxu'] and not r['xlu'])
  needed = busy(next(n for n in pallas_tpu.BLOCKS if rows % n == 0))
  found = {'forward': needed / max(needed, plain)}
  if what == 'gradient':
    backward = ahead_of_time.regions(folder, 'policy_loss_backward')
    loop = max(r['bundles'] for r in backward if r['mxu'])
    once = sum(r['bundles'] for r in backward if r['xlu'] and not r['mxu'])  # a tile's W^T
    needed, turns = 2 * busy(pallas_tpu.ROW_MULTIPLE), rows // pallas_tpu.ROW_MULTIPLE
    found['backward'] = turns * needed / (turns * max(needed, loop) + once)
  return found


def on_chip_memory(executable) -> dict[str, int]:
  """Bytes of it that each kernel takes."""
  found = {}
  for line in executable.as_text().splitlines():
    kernel = re.search(r'%policy_loss_(forward|backward)[\w.]* = .* custom-call\(', line)
    if kernel:
      used = re.search(r'"used_scoped_memory_configs":\[{[^}]*"size":"(\d+)"', line)
      found[kernel[1]] = int(used[1])
  return found


def run(chip, what, backend, D, V, chunks=1) -> dict:
  """`measure` in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, __file__, chip, what, backend, str(D), str(V), str(chunks), folder]
    env = {**os.environ, **ahead_of_time.flags(folder)}
    env.pop('JAX_COMPILATION_CACHE_DIR', None)  # what is cached is not compiled, nor written
    done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f'{" ".join(command)}\n{done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def table() -> str:
  titles = ('chip', 'what', 'back end', 'D', 'tokens', 'temp', 'logits', 'VMEM')
  rows = [(*titles, 'bytes', 'in ms', 'matrix', 'MXU')]
  for chip in CHIPS:
    if ahead_of_time.missing(chip):
      print(ahead_of_time.missing(chip), file=sys.stderr)
      continue
    for what, backend, D, V in CASES:
      found, about = run(chip, what, backend, D, V), ahead_of_time.CHIPS[chip]
      flops = (2 if what == 'score' else 6) * found['rows'] * D * V
      moved = found['bytes'] if backend == 'kernel' else 0  # XLA's own loops are counted once
      share = [f'{name} {x:.0%}' for name, x in found.get('mxu', {}).items()]
      share += [f'{name}: {n} wgmma' for name, n in found.get('wgmma', {}).items() if n]
      rows.append(
        (
          *(chip, what, found['backend'], str(D), str(found['rows'])),
          *(f'{found["temp"] / 1e9:.2f}', f'{4 * found["rows"] * V / 1e9:.2f}'),
          ', '.join(f'{x / 1e6:.0f}' for x in found.get('vmem', {}).values()),
          *((f'{moved / 1e9:.1f}', f'{1e3 * moved / about.bandwidth:.1f}') if moved else ('', '')),
          *(f'{1e3 * flops / about.flops:.1f}', ', '.join(share)),
        )
      )
      print('|', ' | '.join(rows[-1]), '|', flush=True)
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  return '\n'.join([lines[0], '|' + '---|' * len(rows[0]), *lines[1:]]) + '\n'


def main(argv) -> None:
  if len(argv) > 1:  # one row, as `run` asks for it
    chip, what, backend, D, V, chunks, folder = argv[1:]
    print(json.dumps(measure(chip, what, backend, int(D), int(V), int(chunks), folder)))
  else:
    (pathlib.Path(__file__).parent / 'ahead_of_time.md').write_text(table())


if __name__ == '__main__':
  app.run(main)
