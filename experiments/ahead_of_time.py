"""Compiling for TPUs and GPUs that are not here, and reading what the compilers say.

The TPU compiler comes with the extra `tpu-aot`, CUDA's with `gpu-aot`; both run on a machine
without either device, on Python 3.12 and JAX 0.11.2 or newer.

    devices('v5e')                  four devices of the chip, to put shardings on
    compiled(function, args)        the executable: memory_analysis(), cost_analysis(), as_text()
    arrays(executable)              every array of the optimized program
    regions(folder, kernel)         straight-line parts of a kernel's final schedule (TPU)

The schedule and the assembly are written where `flags(folder)` says, which must be in the
environment when the process starts. A schedule counts bundles, one per cycle; it does not know the
times at which the chip waits for memory.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
  """Per chip; from the tables of the vendor."""

  topology: str
  macs: int  # bfloat16 multiplications and additions per cycle
  flops: float  # per second, bfloat16
  bandwidth: float  # bytes per second


CHIPS = {
  'v5e': Chip('v5e:2x2', 4 * 128 * 128, 197e12, 0.82e12),
  'v6e': Chip('v6e:2x2', 4 * 256 * 256, 918e12, 1.64e12),
  'h100': Chip('', 0, 989e12, 3.35e12),
}

# What the TPU compiler asks of its surroundings when there is no TPU.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # otherwise one process at a time
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}

H100 = """
  gpu_device_info {
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
    shared_memory_per_block: 49152 shared_memory_per_core: 233472
    shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
    registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
    device_memory_size: 84942979072 cuda_compute_capability { major: 9 }
  }
  platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 8 patch: 0 }
  runtime_version { major: 12 minor: 9 patch: 0 }
  device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing(chip: str) -> str:
  """Why nothing can be compiled for this chip here, or ''."""
  package, extra = (
    ('jax_plugins.xla_cuda12', 'gpu-aot') if chip == 'h100' else ('libtpu', 'tpu-aot')
  )
  if jax.__version_info__ < (0, 11, 2):
    return f'compiling ahead of time needs JAX 0.11.2 or newer, not {jax.__version__}'
  try:
    found = importlib.util.find_spec(package)
  except ModuleNotFoundError:
    found = None
  return '' if found else f"no {package}: pip install 'reasonrl[{extra}]'"


def flags(folder) -> dict[str, str]:
  """Environment of a process that leaves schedules and assembly in `folder`."""
  return ENVIRONMENT | {
    'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true',
    'XLA_FLAGS': f'--xla_dump_to={folder} --xla_dump_emitter_re=.*',
  }


@functools.cache
def devices(chip: str) -> list:
  """Devices of a chip that need not be here."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if chip != 'h100':
    return topologies.get_topology_desc(CHIPS[chip].topology, 'tpu').devices
  import jax_plugins.xla_cuda12
  from jax._src.lib import xla_client

  jax.devices()  # looks for plugins; this one, without a GPU, fails to register itself
  library = pathlib.Path(jax_plugins.xla_cuda12.__file__).parent / 'xla_cuda_plugin.so'
  if not xla_client.pjrt_plugin_loaded('cuda'):
    xla_client.load_pjrt_plugin_dynamically('cuda', str(library))
  if not xla_client.pjrt_plugin_initialized('cuda'):
    xla_client.initialize_pjrt_plugin('cuda')
  options = {'target_config': H100, 'topology': '1x1x1'}
  return topologies.get_topology_desc('1x1x1', 'cuda', **options).devices


def compiled(function, args, mesh, **jit):
  """`function` for ShapeDtypeStructs whose shardings are of `mesh`."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it for their chip
    return jax.jit(function, **jit).lower(*args).compile()


def arrays(executable) -> dict[str, int]:
  """Every array shape in the optimized program, with its number of elements."""
  shapes = set(re.findall(r'\b[a-z]+[0-9]+\[([0-9,]+)\]', executable.as_text()))
  return {shape: math.prod(map(int, shape.split(','))) for shape in shapes}


WIDTH = {
  'f32': 4,
  's32': 4,
  'u32': 4,
  'bf16': 2,
  's16': 2,
  'u16': 2,
  's8': 1,
  'u8': 1,
  'pred': 1,
  'token': 0,
}
FREE = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant')


def traffic(executable) -> int:
  """HBM bytes of one pass through the loop of a TPU program that has the most operations.

  Every operation of the loop reads its operands and writes its results, unless they are in on-chip
  memory (`S(1)` in the layout). Updates in place, slices and gathers touch what they update or
  yield, and a copy between the two memories what is on the side of HBM. `cost_analysis` knows
  neither.

  Raises:
    ValueError: there is a loop or a branch in it.
    KeyError: an array of a dtype that WIDTH lacks.
  """

  def sizes(shape: str) -> list[tuple[int, bool]]:  # bytes of each array, and whether in HBM
    found = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?', shape)
    return [
      (WIDTH[kind] * math.prod(int(n) for n in dims.split(',') if n), 'S(1)' not in layout)
      for kind, dims, layout in found
    ]

  def moved(name, shape, op, operands) -> int:
    in_hbm = lambda shape: sum(n for n, hbm in sizes(shape) if hbm)
    if op == 'dynamic-update-slice':
      return in_hbm(operands[1]) + (sizes(operands[1])[0][0] if in_hbm(shape) else 0)
    if op == 'copy-start':
      return sum(n for n, hbm in sizes(shape)[:2] if hbm)
    if op == 'slice-start':
      return min(n for n, _ in sizes(shape)[:2])
    if 'gather' in name or op in ('dynamic-slice', 'gather'):
      return sum(n for n, _ in sizes(shape))
    return in_hbm(shape) + sum(map(in_hbm, operands))

  loops, current = {}, None
  for line in executable.as_text().splitlines():
    if begins := re.match(r'(?:ENTRY )?(%[\w.\-]+) .*\{$', line):
      current = loops.setdefault(begins[1], [])
    elif found := re.match(r'\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)', line):
      current.append(found.groups())
  body = max(loops.values(), key=lambda body: sum(op == 'fusion' for _, _, op, _ in body))
  shapes = {name: shape for name, shape, _, _ in body}
  total = 0
  for name, shape, op, rest in body:
    if op in ('while', 'conditional'):
      raise ValueError(f'{name}, a {op}, is in the loop')
    if op not in FREE and not op.endswith('-done'):
      named = re.findall(r'%[\w.\-]+', rest.split('), ')[0])
      total += moved(name, shape, op, [shapes[x] for x in named if x in shapes])
  return total


UNITS = ('mxu', 'xlu', 'valu', 'vpop', 'eup', 'vload', 'fill', 'vstore', 'spill', 'salu')


def regions(folder, kernel: str) -> list[dict[str, int]]:
  """The schedule of a kernel by what lies between two labels: bundles, and the use of each unit.

  Raises:
    FileNotFoundError: no such kernel was compiled, or its schedule was not written.
  """
  schedules = glob.glob(f'{folder}/*{kernel}*-final_bundles.txt')
  schedules = [name for name in schedules if 'schedule-analysis' not in name]
  uses = glob.glob(f'{folder}/*{kernel}*final_hlo-static-per-bundle-utilization.txt')
  if not schedules or not uses:
    raise FileNotFoundError(f'no schedule of {kernel} in {folder}')
  text = pathlib.Path(schedules[0]).read_text().split('= control target key end')[1]
  bundles = re.findall(r'^ *(?:0x[0-9a-f]+|0) +(LH|LB|LE|PB|PF|CT)? *:[> ]*\{', text, re.M)
  lines = pathlib.Path(uses[0]).read_text().split('== UTILIZATION:\n')[1].splitlines()
  found = []
  for label, line in zip(bundles, lines, strict=True):
    if label or not found:
      found.append(dict.fromkeys(('bundles', *UNITS), 0))
    found[-1]['bundles'] += 1
    for unit, count in zip(UNITS, line.split(), strict=True):
      found[-1][unit] += int(count)
  return found
