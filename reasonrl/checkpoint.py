"""Checkpoints through Orbax: everything that decides the future, atomic, on any mesh.

`checkpoints/<step>` holds the train state and a JSON item (position, data position, best metric,
log offsets, tokenizer fingerprint, and sums over both: the file format does not notice a flipped
bit). A damaged checkpoint is moved to `damaged/` and the one before it used. `phases/<name>` holds
the final parameters of a phase, outside retention. Steps count over the whole run. `StopSignal`
turns SIGTERM and Ctrl-C into a save.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from reasonrl import records, sharding


class Checkpoints:
  """The newest `keep_last` checkpoints of a run, and every `keep_every`-th step (0: none)."""

  def __init__(self, workdir: str, keep_last: int, keep_every: int):
    self._workdir = pathlib.Path(workdir).absolute()
    keep = [policies.LatestN(keep_last)]
    if keep_every:
      keep.append(policies.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      self._workdir / 'checkpoints',
      options=ocp.CheckpointManagerOptions(
        step_format_fixed_length=8,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Not best_fn: with max_to_keep it deletes the newest checkpoint.
        preservation_policy=policies.AnyPreservationPolicy(keep),
      ),
    )

  def newest(self, target_of: Callable, tell: Callable) -> tuple[int, Any, dict] | None:
    """The newest whole checkpoint: (step, state, host item); None if there is none at all.

    Args:
      target_of: host item -> a tree of arrays or ShapeDtypeStructs like which the state is placed.
      tell: called with a line about the damaged ones, if there were newer ones than that.

    Raises:
      UserError: it does not fit the target, or none is whole.
    """
    damaged = {}
    steps = sorted(self._manager.all_steps(), reverse=True)
    sharding.same(zlib.crc32(repr(steps).encode()) % 2**31, f'{self._workdir}/checkpoints')
    for step in steps:
      state, host, why = self._read(step, target_of)
      if why:
        damaged[step] = why
        continue
      for bad, why in damaged.items():
        self._set_aside(bad)
        tell(f'checkpoint {bad} is damaged ({why}) and now in damaged/; going on from {step}')
      return step, state, host
    if damaged:
      why = '; '.join(f'{step}: {reason}' for step, reason in damaged.items())
      raise records.UserError(
        f'no checkpoint of {self._workdir} can be read ({why}): use another --workdir, or start '
        'over after removing its checkpoints/'
      )
    return None

  def save(self, step: int, state, host: dict) -> None:
    """Starts an asynchronous save; the state may be donated right afterwards."""
    if step == self._manager.latest_step():
      return
    host = {'layout': _layout(state), 'state_sum': _state_sum(state), **host}
    host['host_sum'] = _host_sum(host)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
    with _disk_errors():
      self._manager.save(step, args=args, force=True)

  def _read(self, step: int, target_of):
    """State, host item and '', or None, None and what is damaged."""
    args = ocp.args.Composite(host=ocp.args.JsonRestore())
    found, why = _try(lambda: self._manager.restore(step, args=args).host)
    if why:
      return None, None, why
    if found.pop('host_sum', None) != _host_sum(found):
      return None, None, 'the sum over its position differs'
    target = target_of(found)
    for saved, wanted in itertools.zip_longest(found['layout'], _layout(target)):
      if saved != wanted:
        raise records.UserError(
          f'checkpoint {step} does not fit this model and optimizer: it has {saved}, not {wanted}'
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(target)))
    state, why = _try(lambda: self._manager.restore(step, args=args).state)
    if why:
      return None, None, why
    if found['state_sum'] != _state_sum(state):
      return None, None, 'the sum over its arrays differs'
    return state, found, ''

  def _set_aside(self, step: int) -> None:
    """Moves a checkpoint out of the way of the one that will be saved at the same step."""
    multihost_utils.sync_global_devices(f'damaged {step}')  # every process has seen it
    if jax.process_index() == 0:
      aside = self._workdir / 'damaged' / f'{step:08}-{time.strftime("%Y%m%d-%H%M%S")}'
      aside.parent.mkdir(exist_ok=True)
      (self._workdir / 'checkpoints' / f'{step:08}').rename(aside)
    multihost_utils.sync_global_devices(f'set aside {step}')
    self._manager.reload()

  def close(self) -> None:
    """Waits for pending saves."""
    with _disk_errors():
      self._manager.wait_until_finished()
      self._manager.close()


def _layout(tree) -> list[str]:
  """'params/embed/weight float32[26, 64]' for every leaf."""
  return [
    f'{sharding.path_of(path)} {leaf.dtype}{list(leaf.shape)}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


@jax.jit
def _sums(tree):
  def one(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
    return jnp.sum(bits, dtype=jnp.uint32)

  return jax.tree.map(one, tree)


def _state_sum(tree) -> int:
  """crc32 over the sums of all leaves' bits, modulo 2^32: the same on every mesh."""
  sums = [int(x) for x in jax.tree.leaves(sharding.fetch(_sums(tree)))]
  return zlib.crc32(json.dumps(sums).encode())


def _host_sum(host: dict) -> int:
  return zlib.crc32(json.dumps(host, sort_keys=True).encode())


def _try(read: Callable) -> tuple[Any, str]:
  """What `read` returns and '', or None and what is wrong with the files.

  On several hosts each reads its own part of the arrays, and one that gives up leaves the others in
  a barrier: there a file that cannot be read ends the run, and is to be moved away by hand.
  """
  with contextlib.redirect_stderr(io.StringIO()):  # besides raising, readers print pages
    try:
      return read(), ''
    except Exception as error:
      # A damaged file makes its readers raise anything; but a lack of memory, or a disk that does
      # not answer, is no damage. Orbax wraps what went wrong with an array in a bare Exception.
      cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
      silent = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
      short = isinstance(cause, MemoryError | jax.errors.JaxRuntimeError)
      if silent or short or jax.process_count() > 1:
        raise
      why = (str(error).splitlines() or [type(error).__name__])[0][:200]
    gc.collect()  # which is when Python tells of coroutines that were dropped
    return None, why


@contextlib.contextmanager
def _disk_errors():
  """TensorStore reports a full disk as a ValueError."""
  try:
    yield
  except ValueError as error:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
      if os.strerror(code) in str(error):
        raise OSError(code, os.strerror(code)) from error
    raise


def save_params(path: pathlib.Path, params) -> None:
  """Writes a parameter tree to a new folder, atomically; an older one there is replaced."""
  with _disk_errors(), ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(path).absolute(), params, force=True)


def load_params(path: pathlib.Path, target):
  """Reads a parameter tree saved by `save_params`, placed like `target`.

  With target None it is read as it is, whole, onto the first device.

  Raises:
    UserError: there is none, or its shapes differ.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise records.UserError(f'no parameters at {path}')
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      if target is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        saved = checkpointer.metadata(path).item_metadata
        if saved is None:
          raise FileNotFoundError(path)
        target = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved.tree
        )
      return checkpointer.restore(path, _abstract(target))
    except FileNotFoundError as error:
      raise records.UserError(
        f'no parameters at {path}: the folder is of something else'
      ) from error
    except ValueError as error:
      raise records.UserError(
        f'parameters at {path} do not fit this model: {str(error).splitlines()[0]}'
      ) from error


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
