"""The notebooks only call the library, so they break when it changes: their cells run here.

A small stand-in for IPython runs a notebook's cells in order: `!` lines are commands, `%cd` and
`%%writefile` do what they say, pip is left out, and what would be displayed must be a file.
"""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob('colab/*.ipynb'))
SHELL = 'import subprocess as _s; _s.run({command}, shell=True, check=True)'
# The notebook's run, smaller still.
CONFIG = """
import runpy
from reasonrl import configs
def get_config(arg=''):
  config = runpy.run_path(configs.__path__[0] + '/r1_zero.py')['get_config']('debug')
  config.pretrain.steps = 2
  config.rl.steps = 2
  config.evaluation.num_examples = 8
  return config
"""
DISPLAY = """
import os
def Image(path):
  assert os.path.getsize(path)
def display(_): pass
"""


def code_cells(path: pathlib.Path) -> list[dict]:
  return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']


def python(source: str) -> str:
  """A cell's source with IPython's own lines as plain Python."""
  if source.startswith('%%writefile '):
    name, _, text = source.removeprefix('%%writefile ').partition('\n')
    return f'import pathlib as _p; _p.Path({name!r}).write_text({text!r})'
  lines = []
  for line in source.splitlines():
    indent, mark, rest = re.fullmatch(r'(\s*)([!%]?)(.*)', line).groups()
    if mark == '%':
      line = f'{indent}import os as _o; _o.chdir({rest.removeprefix("cd ")!r})'
    elif mark == '!':
      line = f'{indent}pass' if '-m pip' in rest else indent + SHELL.format(command=f'f{rest!r}')
    lines.append(line)
  return '\n'.join(lines)


def test_python_of_a_cell(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'there').mkdir()
  exec(python('%%writefile there/a.py\nx = 1\n'), {})
  exec(python('name = "b"\nif name:\n  %cd there\n  !cp a.py {name}.py\n!python -m pip x'), {})
  assert (tmp_path / 'there' / 'b.py').read_text() == 'x = 1\n'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_compile_and_hold_no_results(path):
  cells = code_cells(path)
  assert cells
  for cell in cells:
    assert cell['outputs'] == [] and cell['execution_count'] is None
    ast.parse(python(''.join(cell['source'])))


def test_r1_zero_runs(tmp_path):
  for name in ('reasonrl', 'kernels', 'configs', 'experiments'):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'setup.py', tmp_path)
  (tmp_path / 'IPython').mkdir()
  (tmp_path / 'IPython' / 'display.py').write_text(DISPLAY)
  (tmp_path / 'smoke.py').write_text(CONFIG)
  (tmp_path / 'colab').mkdir()
  sources = [''.join(cell['source']) for cell in code_cells(ROOT / 'colab' / 'r1_zero.ipynb')]
  program = '\n'.join(python(source) for source in sources)
  program = re.sub(r"(?m)^CONFIG = '.*?'", "CONFIG = 'smoke.py'", program)
  program = re.sub(r'(?m)^config.rl.steps = \d+', 'config.rl.steps = 2', program)
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=tmp_path / 'colab',
    env=os.environ | {'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'runs' / 'colab-brief' / 'phases' / 'rl').is_dir()
  # Four completions of each of the three models.
  answers = done.stdout[done.stdout.index('runs/colab/phases/pretrain\n') :]
  assert answers.count('/phases/') == 3 and len(answers.splitlines()) >= 15
