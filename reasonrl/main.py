"""Trains a language model to reason: one config, one workdir.

  python -m reasonrl.main --config=configs/r1_zero.py:debug --config.rl.steps=20 --workdir=runs/a

--config is looked for as given, then among the configs of reasonrl. A workdir that exists is
resumed; without --workdir a new runs/<config>-<time> is made. Bad input ends with one line and exit
code 2. --explain prints the formula that a config optimises; with --from_trl=FILE.yaml or
--from_verl=FILE.yaml it is that of such a file, whose every field is reported.
"""

import pathlib
import re
import time

from absl import flags
from ml_collections import config_flags

from reasonrl import command_line, launch, records

flags.adopt_module_key_flags(launch)  # --help shows them
_EXPLAIN = flags.DEFINE_bool('explain', False, 'Print the objective of the config, and leave.')
_FROM = {
  peer: flags.DEFINE_string(f'from_{peer}', '', f"YAML file of {name}'s, for the objective.")
  for peer, name in (('trl', 'TRL'), ('verl', 'verl'))
}


def new_workdir(config_file: str) -> str:
  """'configs/r1_zero.py:debug' -> 'runs/r1_zero-debug-20260131-235959'."""
  path, _, arg = config_file.partition(':')
  name = '-'.join([pathlib.Path(path).stem, *re.findall(r'[\w.=]+', arg)])
  return f'runs/{name}-{time.strftime("%Y%m%d-%H%M%S")}'


def main(argv: list[str]) -> int:
  del argv
  config, workdir = launch.CONFIG.value, launch.WORKDIR.value
  if config is None:
    command_line.find_config('', workdir)
  config = launch.from_peers(config, {peer: flag.value for peer, flag in _FROM.items()})
  if _EXPLAIN.value:
    return launch.explain(config)
  if not workdir and launch.DISTRIBUTED.value:
    raise records.UserError('--distributed needs --workdir, a folder that every host sees')
  given = config_flags.get_config_filename(flags.FLAGS['config'])
  return launch.start(config, workdir or new_workdir(given), '--workdir')


if __name__ == '__main__':
  command_line.guarded(main, command_line.parse, launch.RESUMABLE)
