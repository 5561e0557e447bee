"""The import table: which file may import which, read off the syntax trees, imported or not.

The tables below are the design's; `violations` is the checker, tried on small trees with one
planted violation each, and then on the real one.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAPPED = ('kernels', 'configs', 'experiments')  # top-level folders, imported as reasonrl.<name>

LAYERS = (
  ('kernels',),
  (
    *(
      'types',
      'records',
      'ops',
      'rl_math',
      'advantages',
      'aggregation',
      'stats',
      'rollouts',
      'profiling',
      'drawing',
      'caches',
      'pretrained',
      'controls',
      'positions',
    ),
    *('tokenizers', 'logs', 'display', 'sharding'),
  ),
  ('tasks', 'rewards', 'algorithms', 'models', 'prompts', 'augmentations', 'optim'),
  (
    *('data', 'sampling', 'packing', 'learner', 'evaluation', 'checkpoint', 'preemption'),
    *('rewarding', 'envs'),
  ),
  (
    *('train', 'steps', 'held_out', 'sentinels', 'tooling', 'parameters', 'checks', 'wiring'),
    *('objective', 'peers', 'phases', 'tables', 'postmortem', 'collecting', 'budgets'),
  ),
  (
    *('command_line', 'launch', 'main', 'evaluate', 'export', 'report', 'curves', 'replay'),
    'experiments',
  ),
)
LIBRARY = tuple(unit for layer in LAYERS[1:4] for unit in layer)
# what layers 1 and 2 share with everybody above
SHARED = (*LAYERS[1], 'prompts', 'augmentations', 'optim')

# unit -> the units of reasonrl that it may import besides itself
MAY_IMPORT = {
  **{unit: () for unit in LAYERS[0]},
  **{unit: ('types', 'records') for unit in LAYERS[1]},
  'ops': ('kernels', 'types', 'records'),
  'caches': ('ops', 'types', 'records'),
  'tokenizers': ('records', 'pretrained'),
  **{unit: LAYERS[1] for unit in LAYERS[2]},
  **{unit: SHARED for unit in LAYERS[3]},
  **{unit: (*LIBRARY, *LAYERS[4][1:]) for unit in LAYERS[4]},
  **{unit: tuple(u for layer in LAYERS for u in layer) + ('configs',) for unit in LAYERS[5]},
  'configs': (),
}
# library -> the units that may import it
ONLY_IN = {
  'flax': ('models',),
  'jax.experimental.pallas': ('kernels',),
  'orbax': ('checkpoint',),
  'grain': ('data',),
  'optax': ('optim', 'learner'),
}
PEERS = ('experiments/bench/step/engines/tunix_grpo.py',)  # in another's environment, for it
# unit -> the libraries that it may import besides Python's own
ONLY_LIBRARIES = {'kernels': ('jax', 'numpy'), 'configs': ('ml_collections',)}
NO_JAX = ('records', 'tasks', 'rewards', 'prompts', 'pretrained', 'tokenizers', 'logs', 'display')
NO_JAX += ('rewarding', 'configs', 'augmentations')
JAX = ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex')
TABLES = {
  'TASKS': 'tasks',
  'REWARDS': 'rewards',
  'ENVS': 'envs',
  'ALGORITHMS': 'algorithms',
  'MODELS': 'models',
}


def source_files(root: pathlib.Path) -> dict[pathlib.Path, str]:
  """File -> unit, for every source file: reasonrl/tasks/x.py and kernels/x.py -> tasks, kernels."""
  files = {}
  for top in ('reasonrl', *MAPPED):
    for path in sorted((root / top).rglob('*.py')):
      parts = path.relative_to(root).with_suffix('').parts
      files[path] = parts[0] if top in MAPPED else parts[1]
  return files


def imported(tree: ast.AST) -> list[str]:
  """Dotted names of all that is imported anywhere in a file; relative ones start with a dot."""
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      names += [f'{module}.{alias.name}' for alias in node.names]
  return names


def mentioned(tree: ast.AST) -> set[str]:
  """Last names of all that is read or imported in a file: `tasks.TASKS` mentions TASKS."""
  names = {name.split('.')[-1] for name in imported(tree)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      names.add(node.attr)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
      names.add(node.id)
  return names


def within(name: str, library: str) -> bool:
  return f'{name}.'.startswith(f'{library}.')


def file_violations(path: str, unit: str, tree: ast.AST) -> list[str]:
  """What one file does against the tables."""
  if path.endswith('utils.py'):
    return [f'{path}: a file named utils.py has no natural home']
  if unit not in MAY_IMPORT and path != 'reasonrl/__init__.py':
    return [f'{path}: {unit} is in no layer of the import table']
  found = []
  for name in imported(tree):
    root = name.split('.')[0]
    if name.startswith('.'):
      found.append(f'relative import {name}')
    elif root in MAPPED:
      found.append(f'{name}: write reasonrl.{name}')
    elif root == 'reasonrl':
      other = name.split('.')[1] if '.' in name else ''
      if unit == 'configs':
        if not within(name, 'reasonrl.configs.common'):
          found.append(f'configs may not import {name}')
      elif other != unit and other not in MAY_IMPORT.get(unit, ()):
        found.append(f'{unit} may not import {name}')
    else:
      allowed = ONLY_LIBRARIES.get(unit)
      if allowed is not None and root not in (*allowed, *sys.stdlib_module_names):
        found.append(f'{unit} may not import {name}')
      if unit in NO_JAX and root in JAX:
        found.append(f'{unit} may not import {name}: no JAX there')
    for library, owners in ONLY_IN.items():
      if within(name, library) and unit not in owners and path not in PEERS:
        found.append(f'{name} belongs in {", ".join(owners)}')
  for name in mentioned(tree):
    if name in TABLES and unit not in ('train', TABLES[name]):
      found.append(f'the table {name} is read by train.py alone')
  return [f'{path}: {what}' for what in found]


def violations(root: pathlib.Path) -> list[str]:
  """Every violation of a source tree."""
  return [
    violation
    for path, unit in source_files(root).items()
    for violation in file_violations(
      path.relative_to(root).as_posix(), unit, ast.parse(path.read_text(encoding='utf-8'))
    )
  ]


def plant(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
  for name, source in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(source)
  return root


ALLOWED = {
  'reasonrl/__init__.py': 'import pathlib',
  'reasonrl/types.py': 'import jax\nfrom reasonrl import records',
  'reasonrl/ops.py': 'import jax\nfrom reasonrl.kernels import dense',
  'reasonrl/logs.py': 'import rich\nfrom reasonrl import records',
  'reasonrl/tasks/__init__.py': 'from reasonrl.tasks import sums\nTASKS = {"sums": sums.Sums}',
  'reasonrl/tasks/sums.py': 'import random\nfrom reasonrl import records',
  'reasonrl/models/decoder.py': 'import flax.linen as nn\nfrom reasonrl import ops',
  'reasonrl/learner.py': 'import optax\nfrom reasonrl import optim, sharding',
  'reasonrl/train.py': 'from reasonrl import tasks, learner\nTask = tasks.TASKS["sums"]',
  'reasonrl/main.py': 'from reasonrl import configs\ndef f():\n  from reasonrl import train',
  'kernels/dense.py': 'import functools\nimport jax\nfrom jax.experimental import pallas as pl',
  'configs/common.py': 'import ml_collections',
  'configs/r1_zero.py': 'from reasonrl.configs import common',
  'experiments/bench/speed.py': 'from reasonrl import train, sampling',
}


def test_checker_accepts_what_is_allowed(tmp_path):
  assert violations(plant(tmp_path, ALLOWED)) == []


@pytest.mark.parametrize(
  'path, source, said',
  [
    ('reasonrl/rl_math.py', 'from reasonrl import ops', 'rl_math may not import reasonrl.ops'),
    ('reasonrl/rl_math.py', 'import reasonrl.kernels.dense', 'rl_math may not import'),
    ('reasonrl/tasks/sums.py', 'from reasonrl import rewards', 'tasks may not import'),
    ('reasonrl/models/x.py', 'from reasonrl.algorithms import grpo', 'models may not import'),
    ('reasonrl/tasks/sums.py', 'def f():\n  import jax.numpy', 'no JAX there'),
    ('reasonrl/prompts.py', 'import optax', 'no JAX there'),
    ('reasonrl/envs/x.py', 'from reasonrl import sampling', 'envs may not import'),
    ('reasonrl/learner.py', 'from reasonrl import models', 'learner may not import'),
    ('reasonrl/data.py', 'from reasonrl import train', 'data may not import'),
    ('reasonrl/train.py', 'from reasonrl import kernels', 'train may not import'),
    ('reasonrl/train.py', 'import flax', 'flax belongs in models'),
    ('reasonrl/train.py', 'import optax', 'optax belongs in optim, learner'),
    ('reasonrl/train.py', 'import orbax.checkpoint as ocp', 'belongs in checkpoint'),
    ('reasonrl/train.py', 'import grain.python', 'belongs in data'),
    ('reasonrl/ops.py', 'from jax.experimental import pallas', 'belongs in kernels'),
    ('reasonrl/ops.py', 'from jax.experimental.pallas import tpu', 'belongs in kernels'),
    ('reasonrl/ops.py', 'from kernels import dense', 'write reasonrl.kernels.dense'),
    ('reasonrl/ops.py', 'from . import types', 'relative import'),
    ('reasonrl/tasks/utils.py', '', 'utils.py'),
    ('reasonrl/helpers.py', '', 'helpers is in no layer'),
    ('reasonrl/evaluate.py', 'from reasonrl.tasks import TASKS', 'TASKS is read by train.py'),
    ('experiments/x.py', 'from reasonrl import envs\nenvs.ENVS', 'ENVS is read by train.py'),
    ('kernels/dense.py', 'import flax', 'kernels may not import flax'),
    ('kernels/dense.py', 'from reasonrl import types', 'kernels may not import reasonrl'),
    ('configs/r1_zero.py', 'import numpy', 'configs may not import numpy'),
    ('configs/r1_zero.py', 'from reasonrl.configs import other', 'configs may not import'),
    ('configs/r1_zero.py', 'from reasonrl import records', 'configs may not import'),
  ],
)
def test_checker_finds_a_planted_violation(tmp_path, path, source, said):
  found = violations(plant(tmp_path, ALLOWED | {path: source}))
  assert found and all(violation.startswith(path) for violation in found), found
  assert any(said in violation for violation in found), found


def test_source_tree_keeps_to_the_table():
  assert violations(ROOT) == []


def test_reward_side_loads_without_jax():
  modules = []
  for path, unit in source_files(ROOT).items():
    if unit in NO_JAX:
      parts = path.relative_to(ROOT).with_suffix('').parts
      modules.append('.'.join(parts if parts[0] == 'reasonrl' else ('reasonrl', *parts)))
  assert 'reasonrl.records' in modules and 'reasonrl.configs.__init__' in modules
  program = (
    'import importlib, sys\n'
    f'for name in {modules}: importlib.import_module(name)\n'
    f'loaded = [name for name in {JAX} if name in sys.modules]\n'
    'assert not loaded, loaded'
  )
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)
