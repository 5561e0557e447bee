"""Where the code is found (bare clone, editable, wheel) and what the command line says.

The two builds call setuptools as pip does, without pip and without the network, on a copy of the
sources. `-S` keeps site-packages out of the interpreters that look at them, so that nothing that
happens to be installed can help.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAPPED = ('kernels', 'configs', 'experiments')

LOCATE = (
  'import importlib.util, sys, reasonrl\n'
  f'for name in {MAPPED}:\n'
  "  print(importlib.util.find_spec('reasonrl.' + name).origin)\n"
  f'assert not set(sys.modules) & set({MAPPED})'
)


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> pathlib.Path:
  """The sources alone, as a clone would have them."""
  root = tmp_path_factory.mktemp('clone')
  for name in ('reasonrl', *MAPPED):
    shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'setup.py', root)
  return root


def run(*command: str, cwd: pathlib.Path, path: pathlib.Path | str) -> str:
  """Standard output of a program that must succeed."""
  done = subprocess.run(
    command, cwd=cwd, env=os.environ | {'PYTHONPATH': str(path)}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def build(clone: pathlib.Path, kind: str, into: pathlib.Path) -> zipfile.ZipFile:
  """Builds a wheel, as `pip install` ('wheel') or `pip install -e` ('editable') does."""
  hook = f'from setuptools import build_meta as b; b.build_{kind}({str(into)!r})'
  run(sys.executable, '-c', hook, cwd=clone, path='')
  return zipfile.ZipFile(next(into.glob('*.whl')))


def locate(cwd: pathlib.Path, path: pathlib.Path, start: str) -> list[pathlib.Path]:
  """The folders of reasonrl.kernels, .configs and .experiments, seen from `cwd`."""
  out = run(sys.executable, '-S', '-c', start + LOCATE, cwd=cwd, path=path)
  return [pathlib.Path(line).parent for line in out.split('\n') if line]


def test_bare_clone_from_any_directory(clone, tmp_path):
  assert locate(tmp_path, clone, '') == [clone / name for name in MAPPED]


def test_editable_install(clone, tmp_path):
  site = tmp_path / 'site'
  build(clone, 'editable', tmp_path).extractall(site)
  start = f'import site; site.addsitedir({str(site)!r})\n'  # runs the .pth file
  assert locate(tmp_path, site, start) == [clone / name for name in MAPPED]


def test_wheel_is_complete_and_puts_everything_inside_reasonrl(clone, tmp_path):
  site = tmp_path / 'site'
  wheel = build(clone, 'wheel', tmp_path)
  wheel.extractall(site)
  assert locate(tmp_path, site, '') == [site / 'reasonrl' / name for name in MAPPED]
  packed = {name for name in wheel.namelist() if '.dist-info/' not in name}
  assert all(name.startswith('reasonrl/') for name in packed), packed
  packages = {path.parent for path in clone.rglob('__init__.py') if 'build' not in path.parts}
  for path in (path for folder in packages for path in folder.glob('*.py')):
    inside = path.relative_to(clone).as_posix().removeprefix('reasonrl/')
    assert f'reasonrl/{inside}' in packed


def test_every_folder_with_code_is_a_package():
  for top in ('reasonrl', *MAPPED[:2]):
    for path in (ROOT / top).rglob('*.py'):
      assert (path.parent / '__init__.py').exists(), path


# ------------------------------------------------------------------------------- command line

CONFIG = """
import ml_collections
def get_config(arg=''):
  if arg not in ('', 'debug'):
    raise ValueError(f'unknown argument {arg!r}; choices: debug')
  return ml_collections.ConfigDict({
    'rl': {'steps': 3, 'algorithm': 'grpo'},
    'rewarding': {'workers': 2, 'timeout_s': 1.0},
    'seed': 0,
  })
"""
STUBS = {
  'configs/toy.py': CONFIG,
  'reasonrl/rewarding.py': """
import contextlib, sys
def Pool(workers, timeout_s):
  assert 'jax' not in sys.modules, 'the pool must start before JAX'
  return contextlib.nullcontext(f'pool({workers}, {timeout_s})')
""",
  'reasonrl/train.py': """
import logging, os, pathlib
from reasonrl import records
def run(config, workdir, pool, flag):
  logging.getLogger('library').info('chatter')
  print('ran', config.rl.steps, workdir, pool, config.is_locked)
  if config.seed == 1:
    raise records.UserError('seed 1 is bad; choices: 0')
  if config.seed == 3:
    raise OSError(28, os.strerror(28), workdir)
  if config.seed == 2:
    os.mkdir(workdir)
    row = '{"step": 1, "phase": "rl", "phase_step": 1, "kind": "train", "reward": 1.0}'
    pathlib.Path(workdir, 'metrics.jsonl').write_text(row + chr(10))
    return 0
  return 143
""",
}


@pytest.fixture(scope='module')
def program(clone, tmp_path_factory) -> pathlib.Path:
  """A clone whose `train` and `rewarding` only say what they were called with."""
  root = shutil.copytree(clone, tmp_path_factory.mktemp('program') / 'clone')
  for name, source in STUBS.items():
    (root / name).write_text(source)
  return root


def call(program, cwd, *flags) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'reasonrl.main', *flags],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(program)},
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
  )


def test_help_does_not_import_jax(tmp_path):
  watch = (
    'import runpy, sys\n'
    "sys.argv = ['main', '--help']\n"
    'try:\n'
    "  runpy.run_module('reasonrl.main', run_name='__main__')\n"
    'except SystemExit:\n'
    "  print('jax' in sys.modules)\n"
  )
  out = run(sys.executable, '-c', watch, cwd=tmp_path, path=ROOT)
  assert '--workdir' in out and '--config' in out
  assert out.endswith('False\n')


@pytest.mark.parametrize('flags', [('--config=configs/toy.py',), ('--config', 'toy.py:debug')])
def test_config_is_found_from_anywhere_and_run(program, tmp_path, flags):
  done = call(program, tmp_path, *flags, '--config.rl.steps=5')
  assert f'config: {program}/configs/toy.py' in done.stdout, done.stderr
  name = 'toy-debug' if 'debug' in flags[-1] else 'toy'
  assert re.search(rf'ran 5 runs/{name}-\d{{8}}-\d{{6}} pool\(2, 1.0\) True', done.stdout)
  assert done.returncode == 143  # what train.run returned


def test_config_as_given_comes_first(program, tmp_path):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'toy.py').write_text(CONFIG.replace("'steps': 3", "'steps': 7"))
  done = call(program, tmp_path, '--config=configs/toy.py', '--workdir=here')
  assert 'config:' not in done.stdout
  assert 'ran 7 here pool' in done.stdout, done.stderr


def test_finished_run_is_reported(program, tmp_path):
  done = call(program, tmp_path, '--config=toy.py', '--config.seed=2', '--workdir=here')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'here' / 'curves.png').exists()
  assert (tmp_path / 'here' / 'report.html').exists()


def test_a_full_disk_is_one_line_that_says_how_to_go_on(program, tmp_path):
  done = call(program, tmp_path, '--config=toy.py', '--config.seed=3', '--workdir=here')
  assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
  assert done.stderr.startswith('error: No space left on device: here; what was saved is whole')


def test_libraries_are_quiet_unless_asked(program, tmp_path):
  assert 'chatter' not in call(program, tmp_path, '--config=toy.py').stderr
  assert 'chatter' in call(program, tmp_path, '--config=toy.py', '--verbosity=0').stderr


@pytest.mark.parametrize(
  'flags, said',
  [
    ((), ('give --config=FILE; there are', 'configs/toy.py')),
    (('--config=configs/tony.py',), ("'configs/tony.py'", 'configs/toy.py')),
    (('--config=toy.py:debgu',), ("unknown argument 'debgu'; choices: debug",)),
    (('--config=toy.py', '--config.rl.stepz=1'), ("'rl.stepz'", "'steps'", 'algorithm, steps')),
    (('--config=toy.py', '--config.sed=1'), ("'sed'", "'seed'", 'rewarding, rl, seed')),
    (('--config=toy.py', '--config.seed.x=1'), ("'seed.x'", 'no fields')),
    (('--config=toy.py', '--config.rl.steps=2.5'), ('config.rl.steps=2.5',)),
    (('--config=toy.py', '--wokdir=x'), ("'wokdir'",)),
    (('--config=toy.py', 'x'), ("'x'",)),
    (('--config=toy.py', '--config.seed=1'), ('seed 1 is bad; choices: 0',)),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(program, tmp_path, flags, said):
  done = call(program, tmp_path, *flags)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
  for text in said:
    assert text in done.stderr
