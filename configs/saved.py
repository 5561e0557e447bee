"""The config of an earlier run, read from its folder: to run it again, changed or not.

python -m reasonrl.main --config=configs/saved.py:runs/first --config.seed=1
"""

import json
import pathlib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from reasonrl.configs import common

VARIANTS = {}  # the argument is the folder of a run


def get_config(arg=''):
  """`arg`: the folder of a run, which holds config.json."""
  path = pathlib.Path(arg or '').expanduser() / 'config.json'
  if not arg or not path.is_file():
    raise ValueError(f'no {str(path)!r}: what follows the colon is the folder of a run')
  config = ConfigDict(_typed(json.loads(path.read_text(encoding='utf-8')), _optional()))
  config.lock()
  return config


def _optional():
  """Field -> its type, of the fields that may be None."""
  sections = (common.model('nano'), common.algorithm('grpo'), common.optim(0.0))
  return {k: s.get_type(k) for s in sections for k, v in s.items() if v is None}


def _typed(value, optional):
  """JSON has lists where a config has tuples, and null where it has a placeholder."""
  if isinstance(value, dict):
    none = {k: placeholder(optional[k]) for k, v in value.items() if v is None and k in optional}
    return {k: _typed(v, optional) for k, v in value.items()} | none
  return tuple(_typed(v, optional) for v in value) if isinstance(value, list) else value
