"""Trains a language model to reason: one config, one workdir.

  python -m reasonrl.main --config=configs/r1_zero.py:debug --config.rl.steps=20 --workdir=runs/a

--config is looked for as given, then among the configs of reasonrl. A workdir that exists is
resumed; without --workdir a new runs/<config>-<time> is made. Bad input ends with one line and exit
code 2. JAX is imported after the reward workers have started, so that they never hold it.
"""

import difflib
import errno
import glob
import importlib.util
import os
import pathlib
import re
import runpy
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

from reasonrl import configs, records

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, such as configs/r1_zero.py:debug; --config.x=1 changes a field.'
)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run, new or to be resumed.')
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One run on several hosts: start the same command on each, with one --workdir'
  ' on a disk that all of them see. TPU pods and Slurm know the rest; else give the next three.',
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0.')
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes the run has.')
_PROCESS = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')


def find_config(given: str) -> str:
  """'configs/r1_zero.py:debug' -> the same with a path that exists, from any working directory."""
  path, colon, arg = given.partition(':')
  folder = pathlib.Path(configs.__path__[0])
  found = folder / path.removeprefix('configs/')
  if os.path.isfile(path):
    return given
  if found.is_file():
    print(f'config: {found}')
    return f'{found}{colon}{arg}'
  names = sorted({file.name for file in folder.glob('*.py')} - {'__init__.py', 'common.py'})
  wrong = f'--config: no file {path!r}' if path else 'give --config=FILE'
  raise records.UserError(f'{wrong}; there are ' + ', '.join(f'configs/{name}' for name in names))


def check_overrides(argv: list[str], given: str) -> None:
  """Refuses --config.a.b=... for a field that the config has not, naming the fields it has."""
  path, *arg = given.split(':', 1)
  try:
    config = runpy.run_path(path)['get_config'](*arg)
  except ValueError as e:  # how a config refuses its argument
    raise records.UserError(f'--config={given}: {e}') from e
  for override in filter(None, (re.match(r'--?(?:no)?config\.([\w.]+)', flag) for flag in argv)):
    node, parents = config, []
    for key in override[1].split('.'):
      fields = sorted(node) if hasattr(node, 'keys') else []
      if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        raise records.UserError(
          f'no config field {".".join([*parents, key])!r}'
          + (f', did you mean {near[0]!r}?' if near else ';')
          + f' {".".join(["config", *parents])} has: {", ".join(fields) or "no fields"}'
        )
      node, parents = node[key], [*parents, key]


def parse(argv: list[str]) -> list[str]:
  """absl's flag parser, after the config was found and the names of its overrides checked."""
  at = next((i for i, flag in enumerate(argv) if re.match(r'--?config(=|$)', flag)), None)
  if at is not None:
    flag, equals, given = argv[at].partition('=')
    rest = argv[at + 1 :] if equals else argv[at + 2 :]
    given = find_config(given if equals else ''.join(argv[at + 1 : at + 2]))
    argv = [*argv[:at], f'{flag}={given}', *rest]
    check_overrides(argv, given)
  rest = flags.FLAGS(argv)
  if flags.FLAGS['verbosity'].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # absl would show every INFO of JAX and Orbax
  return rest


def new_workdir(config_file: str) -> str:
  """'configs/r1_zero.py:debug' -> 'runs/r1_zero-debug-20260131-235959'."""
  path, _, arg = config_file.partition(':')
  name = '-'.join([pathlib.Path(path).stem, *re.findall(r'[\w.=]+', arg)])
  return f'runs/{name}-{time.strftime("%Y%m%d-%H%M%S")}'


def start(config, workdir: str) -> int:
  """Starts the reward workers, then JAX; runs the config in `workdir`. Returns the exit code."""
  by_hand = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if by_hand != (None,) * 3 and (None in by_hand or not _DISTRIBUTED.value):
    raise records.UserError(
      '--coordinator, --num_processes and --process_id belong together, with --distributed; got '
      f'{by_hand}'
    )
  print(f'workdir: {workdir}', flush=True)
  devices = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/*') + glob.glob('/dev/nvidia*')
  if 'JAX_PLATFORMS' not in os.environ and importlib.util.find_spec('libtpu') and not devices:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # libtpu would look for a TPU, loudly
    print('no accelerator found: running on the CPU', flush=True)

  from reasonrl import rewarding

  with rewarding.Pool(config.rewarding.workers, config.rewarding.timeout_s) as pool:
    if _DISTRIBUTED.value:
      import jax

      jax.distributed.initialize(*by_hand)
    from reasonrl import train

    code = train.run(config, workdir, pool)
  if code == 0:
    import jax

    from reasonrl import report

    if jax.process_index() == 0:
      report.write(workdir)
  return code


def main(argv: list[str]) -> int:
  if argv[1:]:
    raise records.UserError(f'what is {argv[1]!r}? Flags are written --name=value')
  if _CONFIG.value is None:
    find_config('')
  if _DISTRIBUTED.value and not _WORKDIR.value:
    raise records.UserError('--distributed needs --workdir, a folder that every host sees')
  workdir = _WORKDIR.value or new_workdir(config_flags.get_config_filename(flags.FLAGS['config']))
  return start(_CONFIG.value, workdir)


def guarded(main, parser) -> None:
  """Runs a program of this library: bad input is one line and exit code 2."""
  try:
    app.run(main, flags_parser=parser)
  except (records.UserError, flags.Error) as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
      raise
    where = f': {e.filename}' if e.filename else ''
    print(
      f'error: {e.strerror}{where}; what was saved is whole, and the same command with --workdir '
      'goes on from it',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)  # the threads of a save that failed would print pages below that line
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == '__main__':
  guarded(main, parse)
