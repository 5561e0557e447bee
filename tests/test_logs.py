"""Workdir files byte by byte, and the display on a terminal and elsewhere."""

from __future__ import annotations

import json
import math
import pathlib
import shlex
import sys

import ml_collections
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reasonrl import logs, records

ROW = {'step': 3, 'phase': 'rl', 'prompt': 'What is 2 + 2?', 'right': True, 'reward': 1.1}


def config(**changes) -> ml_collections.ConfigDict:
  base = ml_collections.ConfigDict(
    {
      'phases': ('pretrain', ('collect', 'sft', 12)),
      'rl': {'optim': {'learning_rate': 3e-4}, 'steps': 10},
      'mesh': {'data': 1},
    }
  )
  base.update_from_flattened_dict(changes)
  return base


def opened(path, cfg=None) -> pathlib.Path:
  found = logs.check_workdir(str(path), cfg or config(), ('mesh',))
  logs.open_workdir(found, cfg or config(), ['cpu:0'])
  return found


# ------------------------------------------------------------------------------------ workdir


def test_open_workdir_writes_the_whole_config_and_each_start(tmp_path):
  path = opened(tmp_path / 'a' / 'b')
  assert path.is_absolute()
  written = json.loads((path / 'config.json').read_text())
  assert written['phases'] == ['pretrain', ['collect', 'sft', 12]]
  assert written['rl'] == {'optim': {'learning_rate': 3e-4}, 'steps': 10}
  assert list(written) == sorted(written)
  opened(path)  # a second start, of the same config
  starts = json.loads((path / 'env.json').read_text())
  assert len(starts) == 2
  assert starts[0]['devices'] == ['cpu:0']
  assert list(starts[0]['packages']) == sorted(starts[0]['packages'])
  assert starts[0]['packages']['numpy'] == np.__version__
  assert starts[0]['command'].endswith(shlex.join(sys.orig_argv[1:]))
  assert sorted(file.name for file in path.iterdir()) == ['config.json', 'env.json', 'lock.tmp']


def test_another_config_is_refused_with_the_fields(tmp_path):
  opened(tmp_path / 'a')
  other = config(**{'rl.optim.learning_rate': 1e-3})
  other.seed = 7
  del other.phases
  with pytest.raises(records.UserError) as e:
    opened(tmp_path / 'a', other)
  assert 'rl.optim.learning_rate: 0.0003 in the workdir, 0.001 now' in str(e.value)
  assert 'seed: absent in the workdir, 7 now' in str(e.value)
  assert 'phases: ["pretrain", ["collect", "sft", 12]] in the workdir, absent now' in str(e.value)
  assert 'steps' not in str(e.value)
  opened(tmp_path / 'a')  # the refusal changed nothing


def test_only_named_sections_may_differ(tmp_path):
  opened(tmp_path / 'a')
  opened(tmp_path / 'a', config(**{'mesh.data': 8}))
  changed = config()
  changed.meshes = 1  # begins like 'mesh' but is another field
  with pytest.raises(records.UserError, match='meshes'):
    opened(tmp_path / 'a', changed)


def test_folders_that_cannot_be_a_workdir(tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.tex').write_text('')
  with pytest.raises(records.UserError, match='neither empty nor a run'):
    opened(tmp_path / 'full')
  with pytest.raises(records.UserError, match='cannot write to workdir'):
    opened(tmp_path / 'full' / 'thesis.tex' / 'x')
  with pytest.raises(records.UserError, match='not a local path'):
    opened('gs://bucket/run')
  (tmp_path / 'killed').mkdir()
  (tmp_path / 'killed' / 'config.json.tmp').write_text('{')  # killed in its first write
  assert opened(tmp_path / 'killed')


def test_one_process_at_a_time(tmp_path):
  lock = logs.open_workdir(tmp_path / 'run', config(), [])
  with pytest.raises(records.UserError, match='another process runs in workdir .*run'):
    logs.open_workdir(tmp_path / 'run', config(), [])
  lock.close()
  logs.open_workdir(tmp_path / 'run', config(), []).close()


def test_a_host_that_does_not_share_the_run(tmp_path):
  with pytest.raises(records.UserError, match='not on a disk that every host sees'):
    logs.check_opened(tmp_path / 'run', config(), [])
  opened(tmp_path / 'run')
  logs.check_opened(tmp_path / 'run', config(), [])
  with pytest.raises(records.UserError, match='belongs to another config'):
    logs.check_opened(tmp_path / 'run', config(seed=9), [])


def test_processes_that_do_not_write_leave_no_trace(tmp_path):
  path = logs.check_workdir(str(tmp_path / 'a'), config(), ())
  metrics = logs.Metrics(path, False)
  metrics.truncate(logs.START)
  metrics.write({'step': 1})
  assert metrics.offsets() == logs.START
  assert not path.exists()


# ------------------------------------------------------------------------------------ metrics


def test_rows_are_exact_json_with_null_for_nan(tmp_path):
  metrics = logs.Metrics(tmp_path, True)
  metrics.write(
    {'step': 1, 'a': 0.1 + 0.2, 'b': math.nan, 'c': [math.inf, 1], 'd': np.float32(0.1)}
  )
  metrics.write({'step': np.int64(2), 'ok': np.bool_(True), 'n': np.array([1.0, np.nan])})
  # On disk before close: a kill loses nothing. 0.1f = 13421773 / 2**27.
  assert (tmp_path / 'metrics.jsonl').read_text() == (
    '{"step": 1, "a": 0.30000000000000004, "b": null, "c": [null, 1], "d": 0.10000000149011612}\n'
    '{"step": 2, "ok": true, "n": [1.0, null]}\n'
  )


def test_truncate_cuts_back_to_exactly_the_checkpoint(tmp_path):
  metrics = logs.Metrics(tmp_path, True)
  metrics.write({'step': 1})
  metrics.rollouts([ROW])
  offsets = metrics.offsets()
  files = [tmp_path / 'metrics.jsonl', tmp_path / 'rollouts.jsonl']
  kept = [file.read_bytes() for file in files]
  assert offsets == {'metrics.jsonl': 12, 'rollouts.jsonl': len(kept[1])}
  metrics.write({'step': 2})
  metrics.rollouts([ROW, ROW])
  metrics.close()

  resumed = logs.Metrics(tmp_path, True)
  resumed.truncate(offsets)
  assert [file.read_bytes() for file in files] == kept
  resumed.write({'step': 9})
  assert files[0].read_bytes() == kept[0] + b'{"step": 9}\n'
  resumed.truncate(logs.START)
  assert [file.read_bytes() for file in files] == [b'', b'']
  with pytest.raises(records.UserError, match='has 0 bytes, but 12'):
    resumed.truncate(offsets)


@example('\ud800 \u2028')
@given(st.text(st.characters(codec=None)))
def test_any_text_survives_in_one_line(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp('rows')
  logs.Metrics(folder, True).rollouts([{'completion': text}])
  lines = (folder / 'rollouts.jsonl').read_bytes().split(b'\n')
  assert len(lines) == 2 and not lines[1]
  assert json.loads(lines[0]) == {'completion': text}
