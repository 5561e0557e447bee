"""The processor of a benchmark: what is said of it, and what a measured process gets of it."""

import os
import pathlib

VECTORS = ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2', 'asimd')  # the first that it has


def name() -> str:
  """'AMD EPYC, 2 cores, avx2'; what Linux does not say is left out."""
  info = pathlib.Path('/proc/cpuinfo')
  fields = {}
  for line in info.read_text().splitlines() if info.exists() else ():
    key, _, value = line.partition(':')
    fields.setdefault(key.strip(), value.strip())
  flags = fields.get('flags', fields.get('Features', '')).split()
  best = next((x for x in VECTORS if x in flags), '')
  parts = fields.get('model name', ''), f'{os.cpu_count()} cores', best
  return ', '.join(part for part in parts if part)


def environment() -> dict[str, str]:
  """Variables of a process that is measured: every core for its products, memory in large pages."""
  kept = {name: value for name, value in os.environ.items() if not name.startswith('OPENBLAS')}
  return kept | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
