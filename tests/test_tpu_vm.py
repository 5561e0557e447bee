"""tpu_vm.sh: the gcloud commands that it prints, and what they do to a worker.

The worker is a folder: a stand-in for gcloud copies files there and runs commands there.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / 'experiments' / 'tpu_vm.sh'
RUN = ('run', 'pod', 'us-east5-b', '--config=configs/r1_zero.py', '--workdir=/mnt/a b')


def call(*arguments, script=SCRIPT, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    ['bash', str(script), *arguments], capture_output=True, text=True, timeout=60, **options
  )


def printed(*arguments) -> list[list[str]]:
  """The words of each command that --dry_run prints."""
  done = call('--dry_run', *arguments)
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


def test_create_and_delete():
  queue = ['gcloud', 'compute', 'tpus', 'queued-resources']
  zone = '--zone=us-east5-b'
  assert printed('create', 'pod', 'us-east5-b', 'v6e-16', '--spot') == [
    [*queue, 'create', 'pod', '--node-id=pod', '--accelerator-type=v6e-16']
    + ['--runtime-version=v2-alpha-tpuv6e', '--spot', zone],
    [*queue, 'describe', 'pod', zone],
  ]
  assert printed('delete', 'pod', 'us-east5-b') == [
    [*queue, 'delete', 'pod', '--force', '--quiet', zone]
  ]


def test_setup_copies_to_all_workers_and_installs():
  copy, install = printed('setup', 'pod', 'us-east5-b')
  assert copy[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp']
  assert copy[6:] == ['pod:reasonrl.tar.gz', '--worker=all', '--zone=us-east5-b']
  assert install[:7] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod', '--worker=all']
  extras = re.search(r"-e '\.\[([\w,]+)\]'$", install[7])[1]
  assert all(f"'{extra}':" in (ROOT / 'setup.py').read_text() for extra in extras.split(','))


@pytest.mark.parametrize(
  'arguments, said',
  [
    ((), 'usage: '),
    (('create', 'pod'), 'usage: '),
    (('create', 'pod', 'z'), 'needs an accelerator type'),
    (('create', 'pod', 'z', 'tpu7x-8'), "'tpu7x-8' is not one of"),
    (('run', 'pod', 'z', '--config=x.py'), 'needs --workdir'),
    (('start', 'pod', 'z'), "'start' is not one of create, setup"),
  ],
)
def test_bad_input_is_one_line(arguments, said):
  done = call(*arguments)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and said in done.stderr


GCLOUD = """#!/bin/bash
cd "$HOME"
case $4 in
  scp) cp "$5" "${6#*:}" ;;
  ssh) exec bash -c "${7#--command=}" ;;
esac
"""
# Stands for the worker's Python: says how it was called, and leaves 143 on SIGTERM.
PYTHON = """#!/bin/bash
printf '%s\\n' "$@"
trap 'echo saved; exit 143' TERM
touch started
for i in {1..600}; do sleep 0.1; done
"""


def program(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def machines(tmp_path):
  """A checkout with its script, and the settings under which gcloud means the folder `worker`."""
  checkout, worker = tmp_path / 'checkout', tmp_path / 'worker'
  (checkout / 'experiments').mkdir(parents=True)
  shutil.copy(SCRIPT, checkout / 'experiments')
  program(tmp_path / 'bin' / 'gcloud', GCLOUD)
  program(tmp_path / 'bin' / 'python3', '#!/bin/bash\necho "$@" >>pip\n')
  program(worker / '.local' / 'bin' / 'uv', '#!/bin/bash\necho "$@" >>uv\n')
  path = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
  environment = os.environ | {'HOME': str(worker), 'PATH': path}

  def script(*arguments):
    return call(*arguments, script=checkout / 'experiments' / 'tpu_vm.sh', env=environment)

  return checkout, worker, script


def test_setup_brings_the_checkout_without_what_git_ignores(machines):
  checkout, worker, script = machines
  subprocess.run(['git', 'init', '--quiet'], cwd=checkout, check=True)
  for name in ('.gitignore', 'a b.py', 'gone.py', 'runs'):
    (checkout / name).write_text('runs\n')
  subprocess.run(['git', 'add', '.'], cwd=checkout, check=True)
  (checkout / 'gone.py').unlink()
  (checkout / 'new.py').touch()
  done = script('setup', 'pod', 'z')
  assert done.returncode == 0, done.stderr
  there = {path.name for path in (worker / 'reasonrl').iterdir()}
  assert there == {'.gitignore', 'a b.py', 'new.py', 'experiments', 'pip', 'uv'}
  assert '-e .[tpu,hf]' in (worker / 'reasonrl' / 'uv').read_text()


def test_run_survives_the_session_and_stop_lets_it_save(machines):
  _, worker, script = machines
  program(worker / 'reasonrl' / '.venv' / 'bin' / 'python', PYTHON)
  assert script(*RUN).returncode == 0
  try:
    end = time.monotonic() + 30
    while not (worker / 'reasonrl' / 'started').exists():
      assert time.monotonic() < end
      time.sleep(0.02)
    again = script(*RUN)
    assert again.returncode == 1 and 'a run is there already' in again.stderr
    log = script('logs', 'pod', 'z').stdout.splitlines()
    assert log[1:] == ['-m', 'reasonrl.main', '--distributed', *RUN[3:]]
  finally:
    stopped = script('stop', 'pod', 'z')
  assert stopped.returncode == 0, stopped.stderr
  assert script('logs', 'pod', 'z').stdout.endswith('saved\n')
  assert script('stop', 'pod', 'z').returncode != 0  # nothing runs
