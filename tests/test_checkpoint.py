"""Checkpoints: kept as promised, restored onto any mesh; signals that stop a run politely."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import checkpoint, records, sharding

RULES = ((r'.*', ('tensor', 'fsdp')),)


def tree(mesh, rows=8):
  values = {
    'w': jnp.arange(rows * 4, dtype=jnp.float32).reshape(rows, 4),
    'count': jnp.int32(7),
  }
  return jax.device_put(values, sharding.param_shardings(values, RULES, mesh))


def test_restores_onto_another_mesh(tmp_path):
  saved, other = sharding.make_mesh(2, 2, 2), sharding.make_mesh(1, 4, 2)
  store = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=0)
  store.save(3, tree(saved), {'step': 3, 'best': 0.5})
  store.close()
  store = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=0)
  assert store.latest() == (3, {'step': 3, 'best': 0.5})
  target = jax.tree.map(jnp.zeros_like, tree(other))
  found = store.restore(3, target)
  np.testing.assert_array_equal(found['w'], np.arange(32).reshape(8, 4))
  assert found['w'].sharding == target['w'].sharding and int(found['count']) == 7
  with pytest.raises(records.UserError, match='checkpoint 3 does not fit this model'):
    store.restore(3, tree(other, rows=16))
  store.close()


def test_keeps_the_newest_and_every_kth(tmp_path):
  mesh = sharding.make_mesh(1, 1, 1)
  store = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=4)
  assert store.latest() is None
  for step in range(1, 8):
    store.save(step, tree(mesh), {'step': step})
  store.save(7, tree(mesh), {'step': 'again'})  # the same step is not saved twice
  store.close()
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [4, 6, 7]
  store = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=0)
  assert store.latest() == (7, {'step': 7})
  store.close()


def test_parameters_of_a_phase(tmp_path):
  mesh = sharding.make_mesh(1, 1, 1)
  checkpoint.save_params(tmp_path / 'rl', tree(mesh))
  checkpoint.save_params(tmp_path / 'rl', jax.tree.map(lambda x: x + 1, tree(mesh)))  # replaced
  found = checkpoint.load_params(tmp_path / 'rl', tree(mesh))
  np.testing.assert_array_equal(found['w'], np.arange(32).reshape(8, 4) + 1)
  with pytest.raises(records.UserError, match='no parameters at .*sft'):
    checkpoint.load_params(tmp_path / 'sft', tree(mesh))
  with pytest.raises(records.UserError, match='do not fit this model'):
    checkpoint.load_params(tmp_path / 'rl', tree(mesh, rows=16))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_a_flag_that_poll_raises(number):
  before = signal.getsignal(number)
  with checkpoint.StopSignal(grace_s=60.0) as stop:
    stop.poll()
    os.kill(os.getpid(), number)
    with pytest.raises(checkpoint.Stopped) as stopped:
      stop.poll()
  assert stopped.value.code == 128 + number
  assert signal.getsignal(number) == before


def test_a_run_that_cannot_poll_leaves_after_the_grace_and_at_once_on_a_second_ctrl_c():
  program = (
    'import os, sys, time\n'
    'from reasonrl import checkpoint\n'
    'with checkpoint.StopSignal(grace_s=float(sys.argv[1])):\n'
    '  for number in sys.argv[2:]: os.kill(os.getpid(), int(number))\n'
    '  time.sleep(60)\n'
  )
  for arguments, code in ((('0.3', '15'), 143), (('60', '2', '2'), 130)):
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', program, *arguments], timeout=50)
    assert done.returncode == code and time.monotonic() - start < 40
