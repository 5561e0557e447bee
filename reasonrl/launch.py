"""Starts a run: the reward workers first, then JAX, so that the workers never hold it.

What needs JAX is imported inside the functions.
"""

import glob
import importlib.util
import os
import pathlib
import re
import time

import rich.console
from absl import flags
from ml_collections import config_flags

from reasonrl import records

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, such as configs/r1_zero.py:debug; --config.x=1 changes a field.'
)
WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run, new or to be resumed.')
RESUMABLE = '; what was saved is whole, and the same command with --workdir goes on from it'
DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One run on several hosts: start the same command on each, with one --workdir'
  ' on a disk that all of them see. TPU pods and Slurm know the rest; else give the next three.',
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0.')
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes the run has.')
_PROCESS = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')


def choose_platform() -> None:
  """The CPU, where libtpu is installed without a TPU; before JAX is imported."""
  devices = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/*') + glob.glob('/dev/nvidia*')
  if 'JAX_PLATFORMS' not in os.environ and importlib.util.find_spec('libtpu') and not devices:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # libtpu would look for a TPU, loudly
    print('no accelerator found: running on the CPU', flush=True)


def start(config, workdir: str, flag: str) -> int:
  """Starts the reward workers, then JAX; runs the config in `workdir`. Returns the exit code.

  `flag`: the name that the workdir has on the command line.
  """
  by_hand = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if by_hand != (None,) * 3 and (None in by_hand or not DISTRIBUTED.value):
    raise records.UserError(
      '--coordinator, --num_processes and --process_id belong together, with --distributed; got '
      f'{by_hand}'
    )
  print(f'workdir: {workdir}', flush=True)
  choose_platform()

  from reasonrl import rewarding

  with rewarding.Pool(config.rewarding.workers, config.rewarding.timeout_s) as pool:
    if DISTRIBUTED.value:
      import jax

      jax.distributed.initialize(*by_hand)
    from reasonrl import train

    code = train.run(config, workdir, pool, flag)
  if code == 0:
    import jax

    from reasonrl import report

    if jax.process_index() == 0:
      report.write(workdir)
  return code


def new_workdir(config_file: str) -> str:
  """'configs/r1_zero.py:debug' -> 'runs/r1_zero-debug-20260131-235959'."""
  path, _, arg = config_file.partition(':')
  name = '-'.join([pathlib.Path(path).stem, *re.findall(r'[\w.=]+', arg)])
  return f'runs/{name}-{time.strftime("%Y%m%d-%H%M%S")}'


def from_peers(config, given: dict[str, str]):
  """The config with the objective of a peer's file, whose every field is reported.

  `given`: peer -> path, '' for none.

  Raises:
    UserError: several files, a field without a counterpart, or no phase that reinforces.
  """
  from reasonrl import peers
  from reasonrl.configs import common

  files = {peer: path for peer, path in given.items() if path}
  if len(files) > 1:
    raise records.UserError(f'{" and ".join(f"--from_{peer}" for peer in files)}: give one of them')
  for peer, path in files.items():
    lines = peers.read(peer, path)
    print(peers.report(lines), flush=True)
    config = peers.apply(config, common.algorithm('grpo'), lines)
  return config


def explain(config) -> int:
  """Prints the objective of every phase that reinforces."""
  choose_platform()
  from reasonrl import objective, phases, tables, train

  built = {}
  for name, section in phases.sections(config).items():
    if section.kind == 'reinforce':
      members = (section.algorithm, 'algorithm'), (section.env, 'env')
      built[name] = tuple(
        tables.member(train.TABLES[what], fields, f'{name}.{what}') for fields, what in members
      )
      built[name][0].check(built[name][1].num_generations, tuple(config.rewards))
  print(objective.explain(config, built))
  return 0


def replay(config, dump: str) -> int:
  """Recomputes a dumped update: see `replay`."""
  choose_platform()
  from reasonrl import replay

  return replay.run(config, dump, rich.console.Console(highlight=False))
