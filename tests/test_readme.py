"""Every command of the README, and of the experiments' READMEs, is one that works.

Programs are started with --only_check_args: they parse their flags, load the config, check its
overrides and leave; the script for TPU VMs with --dry_run. Installation is checked against
setup.py, pytest markers against pyproject.
"""

import ast
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('experiments/**/README.md')])


def commands():
  """Each command line of each ```bash block, with '&&' chains and continued lines taken apart."""
  found = []
  for page in PAGES:
    for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL):
      text = block.replace('\\\n', ' ').replace('&&', '\n')
      lines = (line.split('  #')[0].strip() for line in text.splitlines())
      found += [line for line in lines if line and not line.startswith('#')]
  return sorted(set(found))


def extras():
  """The keys of extras_require in setup.py, read without running it."""
  tree = ast.parse((ROOT / 'setup.py').read_text())
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      names[node.targets[0].id] = node.value
  for call in calls:
    for keyword in call.keywords:
      if keyword.arg == 'extras_require':
        value = names[keyword.value.id] if isinstance(keyword.value, ast.Name) else keyword.value
        return {key.value for key in value.keys if key is not None}
  raise AssertionError('setup.py has no extras_require')


def test_the_readme_has_commands():
  text = ' '.join(commands())
  assert 'reasonrl.main --config=configs/r1_zero.py' in text and '-m pytest' in text


@pytest.mark.parametrize('command', commands())
def test_command(command, tmp_path):
  words = shlex.split(command)
  program, arguments = re.sub(r'^\.\w+/bin/', '', words[0]), words[1:]
  if program == 'pip' or arguments[:2] == ['-m', 'pip']:
    for extra in re.findall(r'\.\[([\w,-]+)\]', command):
      assert set(extra.split(',')) <= extras(), command
  elif arguments[:2] == ['-m', 'venv']:
    assert len(arguments) == 3
  elif arguments[:2] == ['-m', 'pytest']:
    if '-m' in arguments[2:]:
      marker = arguments[arguments.index('-m', 2) + 1]
      settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
      markers = settings['tool']['pytest']['ini_options']['markers']
      assert any(line.startswith(f'{marker}:') for line in markers)
  elif program == 'experiments/tpu_vm.sh':
    subprocess.run(['bash', program, '--dry_run', *arguments], cwd=ROOT, check=True)
  elif program == 'experiments/peers/compare_trl.sh':  # it installs torch: read, not run
    subprocess.run(['bash', '-n', program, *arguments], cwd=ROOT, check=True)
  else:
    assert program.startswith('python'), f'{command!r}: neither pip, venv, pytest nor a program'
    # A folder with what a clone has, and with the run that other commands speak of.
    for top in ('configs', 'experiments', 'reasonrl'):
      (tmp_path / top).symlink_to(ROOT / top)
    (tmp_path / 'runs' / 'first').mkdir(parents=True)
    saved = ROOT / 'experiments' / 'r1_zero_shuffled_objects' / 'config.json'
    shutil.copy(saved, tmp_path / 'runs' / 'first')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
      [sys.executable, *arguments, '--only_check_args'],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert done.returncode == 0, done.stderr
