"""Trains a language model to reason: one config, one workdir.

  python -m reasonrl.main --config=configs/r1_zero.py:debug --config.rl.steps=20 --workdir=runs/a

--config is looked for as given, then among the configs of reasonrl. A workdir that exists is
resumed; without --workdir a new runs/<config>-<time> is made. Bad input ends with one line and exit
code 2. --explain prints the formula that a config optimises; with --from_trl=FILE.yaml or
--from_verl=FILE.yaml it is that of such a file, whose every field is reported.
--replay=runs/a/nonfinite/rl-12-0.npz recomputes an update of that run that was not finite.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from reasonrl import command_line, launch, records

flags.adopt_module_key_flags(launch)  # --help shows them
_EXPLAIN = flags.DEFINE_bool('explain', False, 'Print the objective of the config, and leave.')
_FROM = {
  peer: flags.DEFINE_string(f'from_{peer}', '', f"YAML file of {name}'s, for the objective.")
  for peer, name in (('trl', 'TRL'), ('verl', 'verl'))
}
_REPLAY = flags.DEFINE_string('replay', '', 'Recompute this dump of an update that was not finite.')


def parse(argv: list[str]) -> list[str]:
  """The command line; a dump's run stands in for --config."""
  workdir_of = lambda dump: pathlib.Path(dump).parent.parent
  return command_line.parse(command_line.with_saved_config(argv, 'replay', workdir_of))


def main(argv: list[str]) -> int:
  del argv
  config, workdir = launch.CONFIG.value, launch.WORKDIR.value
  if config is None:
    command_line.find_config('', workdir)
  if _REPLAY.value:
    return launch.replay(config, _REPLAY.value)
  config = launch.from_peers(config, {peer: flag.value for peer, flag in _FROM.items()})
  if _EXPLAIN.value:
    return launch.explain(config)
  if not workdir and launch.DISTRIBUTED.value:
    raise records.UserError('--distributed needs --workdir, a folder that every host sees')
  given = config_flags.get_config_filename(flags.FLAGS['config'])
  return launch.start(config, workdir or launch.new_workdir(given), '--workdir')


if __name__ == '__main__':
  command_line.guarded(main, parse, launch.RESUMABLE)
