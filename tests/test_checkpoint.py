"""Checkpoints: kept as promised, restored onto any mesh; signals that stop a run politely."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import checkpoint, preemption, records, sharding

RULES = ((r'.*', ('tensor', 'fsdp')),)


def tree(mesh, rows=8):
  values = {
    'w': jnp.arange(rows * 4, dtype=jnp.float32).reshape(rows, 4),
    'count': jnp.int32(7),
  }
  return jax.device_put(values, sharding.param_shardings(values, RULES, mesh))


def newest(workdir, target, told=()):
  """`Checkpoints.newest` of a store opened for it."""
  store, said = checkpoint.Checkpoints(workdir, keep_last=9, keep_every=0), []
  try:
    return store.newest(lambda host: target, said.append)
  finally:
    store.close()
    assert len(said) == len(told)
    assert all(text in line for text, line in zip(told, said, strict=True)), said


def test_restores_onto_another_mesh(tmp_path):
  saved, other = sharding.make_mesh(2, 2, 2), sharding.make_mesh(1, 4, 2)
  store = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=0)
  store.save(3, tree(saved), {'step': 3, 'best': 0.5})
  store.close()
  target = jax.tree.map(jnp.zeros_like, tree(other))
  step, found, host = newest(tmp_path, target)
  assert step == 3 and {'step': 3, 'best': 0.5}.items() <= host.items()
  np.testing.assert_array_equal(found['w'], np.arange(32).reshape(8, 4))
  assert found['w'].sharding == target['w'].sharding and int(found['count']) == 7
  wrong = r'checkpoint 3 does not fit .* it has w float32\[8, 4\], not w float32\[16, 4\]'
  with pytest.raises(records.UserError, match=wrong):
    newest(tmp_path, tree(other, rows=16))


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
  """Step 1, and step 2 whose values are larger by one."""
  folder, mesh = tmp_path_factory.mktemp('two'), sharding.make_mesh(1, 1, 1)
  store = checkpoint.Checkpoints(folder, keep_last=2, keep_every=0)
  store.save(1, tree(mesh, rows=1250), {'step': 1})
  store.save(2, jax.tree.map(lambda x: x + 1, tree(mesh, rows=1250)), {'step': 2})
  store.close()
  return folder


@pytest.mark.parametrize('how', ['halve', 'empty', 'remove', 'flip'])
def test_a_damaged_checkpoint_is_never_used(tmp_path, two_checkpoints, how):
  mesh, fell_back = sharding.make_mesh(1, 1, 1), 0
  files = [f for f in (two_checkpoints / 'checkpoints' / '00000002').rglob('*') if f.is_file()]
  for number, file in enumerate(files):
    run = shutil.copytree(two_checkpoints, tmp_path / str(number))
    victim = run / file.relative_to(two_checkpoints)
    data = victim.read_bytes()
    if how == 'remove':
      victim.unlink()
    elif how == 'flip':  # in the middle, which the reader of the arrays does not notice
      at = len(data) // 2
      victim.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] if data else b'x')
    else:
      victim.write_bytes(data[: len(data) // 2] if how == 'halve' else b'')
    store, said = checkpoint.Checkpoints(run, keep_last=2, keep_every=0), []
    step, found, host = store.newest(lambda host: tree(mesh, rows=1250), said.append)
    assert host['step'] == step
    np.testing.assert_array_equal(
      found['w'], np.arange(5000).reshape(1250, 4) + step - 1, err_msg=str(victim)
    )
    if step == 1:  # some files are not needed
      fell_back += 1
      assert 'checkpoint 2 is damaged (' in said[0] and 'going on from 1' in said[0]
      assert [p.name[:8] for p in (run / 'damaged').iterdir()] == ['00000002']
      store.save(2, found, {'step': 2})  # which is where the run comes by again
    store.close()
    if step == 1:
      assert newest(run, tree(mesh, rows=1250))[0] == 2
  assert fell_back >= 3


def test_no_whole_checkpoint_is_an_error_that_moves_nothing(tmp_path, two_checkpoints):
  run = shutil.copytree(two_checkpoints, tmp_path / 'run')
  for file in run.rglob('host/metadata'):
    file.write_bytes(b'')
  before = sorted(run.rglob('*'))
  with pytest.raises(records.UserError, match='no checkpoint of .* can be read .2: .*; 1: '):
    newest(run, tree(sharding.make_mesh(1, 1, 1), rows=1250))
  assert sorted(run.rglob('*')) == before


def test_sums_do_not_depend_on_the_mesh_and_see_every_bit():
  one, other = (tree(sharding.make_mesh(*sizes)) for sizes in ((1, 1, 1), (2, 2, 2)))
  assert checkpoint._state_sum(one) == checkpoint._state_sum(other)
  odd = {'b': jnp.ones(3, jnp.bfloat16), 'n': jnp.int32(-1)}
  for name, value in (('b', jnp.ones(3, jnp.bfloat16).at[1].set(1.0078125)), ('n', jnp.int32(-2))):
    assert checkpoint._state_sum(odd | {name: value}) != checkpoint._state_sum(odd)


def test_a_full_disk_is_an_oserror_whoever_found_out():
  with pytest.raises(OSError) as error, checkpoint._disk_errors():
    raise ValueError('RESOURCE_EXHAUSTED: Failed to write: No space left on device [...]')
  assert error.value.errno == errno.ENOSPC
  with pytest.raises(ValueError, match='other'), checkpoint._disk_errors():
    raise ValueError('other')


def test_keeps_the_newest_and_every_kth(tmp_path):
  mesh = sharding.make_mesh(1, 1, 1)
  store = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=4)
  assert store.newest(None, None) is None
  for step in range(1, 8):
    store.save(step, tree(mesh), {'step': step})
  store.save(7, tree(mesh), {'step': 'again'})  # the same step is not saved twice
  store.close()
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [4, 6, 7]
  assert newest(tmp_path, tree(mesh))[2]['step'] == 7


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
  (tmp_path / 'other').mkdir()  # a folder of something else
  for target in (tree(mesh), None):
    with pytest.raises(records.UserError, match='no parameters at .*other'):
      checkpoint.load_params(tmp_path / 'other', target)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_a_flag_that_poll_raises(number):
  before = signal.getsignal(number)
  with preemption.StopSignal(grace_s=60.0) as stop:
    stop.poll()
    os.kill(os.getpid(), number)
    with pytest.raises(preemption.Stopped) as stopped:
      stop.poll()
  assert stopped.value.code == 128 + number
  assert signal.getsignal(number) == before


def test_a_run_that_cannot_poll_leaves_after_the_grace_and_at_once_on_a_second_ctrl_c():
  program = (
    'import os, sys, time\n'
    'from reasonrl import preemption\n'
    'with preemption.StopSignal(grace_s=float(sys.argv[1])):\n'
    '  for number in sys.argv[2:]: os.kill(os.getpid(), int(number))\n'
    '  time.sleep(60)\n'
  )
  for arguments, code in ((('0.3', '15'), 143), (('60', '2', '2'), 130)):
    start = time.monotonic()
    program_of = [sys.executable, '-c', program, *arguments]
    done = subprocess.run(program_of, timeout=50, capture_output=True, text=True)
    assert done.returncode == code and time.monotonic() - start < 40
    assert 'left at once, not saved' in done.stderr  # a person learns what was lost
    assert ('stopping after this step' in done.stderr) == ('2' in arguments)


@pytest.mark.parametrize(
  'error', [MemoryError(), OSError(errno.EIO, 'disk'), jax.errors.JaxRuntimeError('no memory')]
)
def test_what_is_no_damage_is_not_taken_for_it(error):
  def read():
    raise error

  def wrapped():
    try:
      read()
    except BaseException as cause:
      raise Exception('reading an array') from cause

  with pytest.raises(type(error)):
    checkpoint._try(read)
  with pytest.raises(Exception, match='reading an array'):
    checkpoint._try(wrapped)


def test_whatever_else_a_reader_raises_is_damage():
  def read():
    raise KeyError('key_type')

  assert checkpoint._try(read) == (None, "'key_type'")
  assert checkpoint._try(lambda: 3) == (3, '')
