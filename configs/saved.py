"""The config of an earlier run, read from its folder: to run it again, changed or not.

  python -m reasonrl.main --config=configs/saved.py:runs/first --config.seed=1
"""

import json
import pathlib

from ml_collections import ConfigDict

VARIANTS = {}  # the argument is the folder of a run


def get_config(arg=''):
  """`arg`: the folder of a run, which holds config.json."""
  path = pathlib.Path(arg or '').expanduser() / 'config.json'
  if not arg or not path.is_file():
    raise ValueError(f'no {str(path)!r}: what follows the colon is the folder of a run')
  config = ConfigDict(_tuples(json.loads(path.read_text(encoding='utf-8'))))
  config.lock()
  return config


def _tuples(value):
  """JSON has lists where a config has tuples."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
