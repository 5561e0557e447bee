"""The command line that the programs of this library share: --config, overrides, errors.

1. `parse` finds the config, checks the names of the overrides and hands over to absl's parser.
2. `guarded` runs a program: bad input ends with one line and exit code 2.
"""

import difflib
import errno
import os
import pathlib
import re
import runpy
import sys

from absl import app, flags, logging

from reasonrl import configs, records


def find_config(given: str, workdir: str = '') -> str:
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
  again = f' (configs/saved.py:{workdir} is the config of that run)' if workdir else ''
  wrong = f'--config: no file {path!r}' if path else f'give --config=FILE{again}'
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


def with_saved_config(argv: list[str], flag: str, workdir_of) -> list[str]:
  """argv with the config of a run, if --<flag> names one and there is no --config.

  workdir_of: value of the flag -> the folder of the run.
  """
  at = [i for i, arg in enumerate(argv) if re.match(rf'--?{flag}(=|$)', arg)]
  if not at or any(re.match(r'--?config(=|$)', arg) for arg in argv):
    return argv
  _, equals, value = argv[at[-1]].partition('=')
  value = value if equals else ''.join(argv[at[-1] + 1 : at[-1] + 2])
  return [argv[0], f'--config=configs/saved.py:{workdir_of(value)}', *argv[1:]]


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
  if rest[1:]:
    raise records.UserError(f'what is {rest[1]!r}? Flags are written --name=value')
  return rest


def guarded(main, parser, disk_advice: str) -> None:
  """Runs a program of this library: bad input is one line and exit code 2.

  `disk_advice` ends the line about a disk that is full or not writable.
  """
  try:
    app.run(main, flags_parser=parser)
  except (records.UserError, flags.Error) as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
      raise
    where = f': {e.filename}' if e.filename else ''
    print(f'error: {e.strerror}{where}{disk_advice}', file=sys.stderr, flush=True)
    os._exit(1)  # the threads of a save that failed would print pages below that line
  except KeyboardInterrupt:
    sys.exit(130)
