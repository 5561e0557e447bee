"""A step that is not finite names its origin, and the replay of its dump finds it again."""

import dataclasses
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import test_learner
import test_train

from reasonrl import checkpoint, parameters, postmortem, records, replay, rewarding, tooling, train
from reasonrl.algorithms import grpo
from reasonrl.configs import saved


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(2, 5.0) as pool:
    yield pool


STEPS = []


@dataclasses.dataclass(frozen=True)
class Planted(grpo.GRPO):
  """One advantage of the second step is NaN: of ROW, which is in the first of two minibatches."""

  def advantages(self, experience):
    STEPS.append(experience)
    adv_BT = super().advantages(experience) + 0.1 * experience.mask_BT
    if len(STEPS) == 2:
      adv_BT[ROW, experience.prompt_length_B[ROW]] = np.nan
    return adv_BT


ROW = 5


def shown(config, dump):
  console = rich.console.Console(width=200, record=True, file=io.StringIO())
  return replay.run(config, str(dump), console), console.export_text()


def test_a_planted_advantage_end_to_end(tmp_path, pool, monkeypatch, capsys):
  monkeypatch.setitem(train.ALGORITHMS, 'grpo', Planted)
  ends = {}
  for steps in (1, 3):
    STEPS.clear()
    config = test_train.short(rl__steps=steps, rl__algorithm__num_minibatches=2)
    assert train.run(config, str(tmp_path / str(steps)), pool) == 0
    ends[steps] = checkpoint.load_params(tmp_path / str(steps) / 'phases' / 'rl', None)
  rows = test_train.rows_of(tmp_path / '3', 'train')
  assert [row.get('sentinels') for row in rows] == [None, ['finite'], None]
  folder = tmp_path / '3' / 'nonfinite'
  files = {f'rl-2-0.{end}' for end in ('json', 'npz', 'params')}
  assert {path.name for path in folder.iterdir()} == files
  # The parameters are those that the bad update met: where the run of one step ended.
  kept = checkpoint.load_params(folder / 'rl-2-0.params', None)
  test_learner.assert_trees_equal(kept, ends[1])
  out = capsys.readouterr().out
  assert 'step 2: adv is nan, first at token' in out and f'--replay={folder}/rl-2-0.npz' in out

  about = json.loads((folder / 'rl-2-0.json').read_text())
  token = about['report']['origin']['token']
  assert token['token_id'] == STEPS[1].tokens_BT[ROW, STEPS[1].prompt_length_B[ROW]]
  assert token['values']['sampler_logp'] == STEPS[1].logp_BT[ROW, STEPS[1].prompt_length_B[ROW]]
  code, text = shown(saved.get_config(str(tmp_path / '3')), folder / 'rl-2-0.npz')
  assert code == 0 and 'reproduces: adv is nan, first at token' in text
  assert f'({token["text"]!r}): micro-batch 0, row {token["row"]}, slot {token["slot"]}' in text
  assert 'sampler_logp' in text and 'rl step 2, update 0' in text

  # Through the door; then with a batch that was mended.
  monkeypatch.undo()
  command = [sys.executable, '-m', 'reasonrl.main', f'--replay={folder}/rl-2-0.npz']
  done = subprocess.run(command, cwd=test_train.ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and 'reproduces: adv is nan' in done.stdout, done
  with np.load(folder / 'rl-2-0.npz') as arrays:
    mended = {name: np.nan_to_num(arrays[name]) for name in arrays.files}
  np.savez(folder / 'rl-2-0.npz', **mended)
  code, text = shown(saved.get_config(str(tmp_path / '3')), folder / 'rl-2-0.npz')
  assert code == 1 and 'does not reproduce' in text


def test_a_planted_weight_of_a_phase_that_runs_ahead(tmp_path, pool, monkeypatch):
  """The next update is under way when the flag is read; the parameters are still the right ones."""
  pack, calls = tooling.pack, []

  def plant(*args):
    batches, where = pack(*args)
    calls.append(1)
    if len(calls) == 2:
      batches[1].aux['weight'][2, 1] = np.inf
    return batches, where

  ends = {}
  for steps in (1, 3):
    calls.clear()
    config = test_train.short(phases=('pretrain',), pretrain__steps=steps)
    config.pretrain.optim.schedule = 'constant'
    monkeypatch.setattr(tooling, 'pack', plant)
    assert train.run(config, str(tmp_path / str(steps)), pool) == 0
    ends[steps] = checkpoint.load_params(tmp_path / str(steps) / 'phases' / 'pretrain', None)
  folder = tmp_path / '3' / 'nonfinite'
  assert {path.name for path in folder.glob('*.npz')} == {'pretrain-2-0.npz'}
  kept = checkpoint.load_params(folder / 'pretrain-2-0.params', None)
  test_learner.assert_trees_equal(kept, ends[1])
  code, text = shown(saved.get_config(str(tmp_path / '3')), folder / 'pretrain-2-0.npz')
  assert code == 0 and 'weight is inf, first at token' in text
  assert 'micro-batch 1, row 2, slot 1' in text


def test_a_planted_parameter(tmp_path, pool, monkeypatch, capsys):
  init = parameters.init

  def damaged(*args):
    params = init(*args)
    params['layers']['00']['mlp']['down'] = jax.tree.map(
      lambda x: x.at[3, 5].set(jnp.nan), params['layers']['00']['mlp']['down']
    )
    return params

  monkeypatch.setattr(parameters, 'init', damaged)
  config = test_train.short(phases=('pretrain',), pretrain__steps=1)
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  said = 'parameter layers/00/mlp/down/weight has 1 entries that are not finite'
  assert said in capsys.readouterr().out
  dump = tmp_path / 'run' / 'nonfinite' / 'pretrain-1-0.npz'
  code, text = shown(saved.get_config(str(tmp_path / 'run')), dump)
  assert code == 0 and said in text


def test_a_dump_of_another_config_is_refused(tmp_path):
  path = tmp_path / 'nonfinite' / 'old-1-0.npz'
  student = test_learner.STUDENT
  batches = test_learner.packed(test_learner.rows())

  class Letters:
    id_to_piece = str

  place = {'phase': 'old', 'step': 1, 'update': 0}
  dumps = postmortem.Dumps(path.parent)
  dumps.write('old-1-0', place, (student, Letters()), test_learner.PARAMS, (batches, (1.0,)), 1)
  with pytest.raises(records.UserError, match="is of phase 'old', which phases does not name"):
    replay.run(test_train.short(), str(path), None)
