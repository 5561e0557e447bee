"""Checkpoints through Orbax: everything that decides the future, atomic, on any mesh.

`checkpoints/<step>` holds the train state and a JSON item (position, data position, best metric,
log offsets, tokenizer fingerprint). `phases/<name>` holds the final parameters of a phase, outside
retention. Steps count over the whole run. `StopSignal` turns SIGTERM and Ctrl-C into a save.
"""

from __future__ import annotations

import os
import pathlib
import select
import signal
import threading
import time

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from reasonrl import records, sharding


class Checkpoints:
  """The newest `keep_last` checkpoints of a run, and every `keep_every`-th step (0: none)."""

  def __init__(self, workdir: str, keep_last: int, keep_every: int):
    keep = [policies.LatestN(keep_last)]
    if keep_every:
      keep.append(policies.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      pathlib.Path(workdir).absolute() / 'checkpoints',
      options=ocp.CheckpointManagerOptions(
        step_format_fixed_length=8,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Not best_fn: with max_to_keep it deletes the newest checkpoint.
        preservation_policy=policies.AnyPreservationPolicy(keep),
      ),
    )

  def latest(self) -> tuple[int, dict] | None:
    """(step, host item) of the newest finished checkpoint, None if there is none."""
    step = self._manager.latest_step()
    if step is None:
      return None
    args = ocp.args.Composite(host=ocp.args.JsonRestore())
    return step, self._manager.restore(step, args=args).host

  def save(self, step: int, state, host: dict) -> None:
    """Starts an asynchronous save; the state may be donated right afterwards."""
    if step == self._manager.latest_step():
      return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
    self._manager.save(step, args=args, force=True)

  def restore(self, step: int, target):
    """The state saved at `step`, placed like `target` (a tree of arrays or ShapeDtypeStructs)."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(target)))
    try:
      return self._manager.restore(step, args=args).state
    except ValueError as error:
      raise records.UserError(
        f'checkpoint {step} does not fit this model and optimizer: {str(error).splitlines()[0]}'
      ) from error

  def close(self) -> None:
    """Waits for pending saves."""
    self._manager.wait_until_finished()
    self._manager.close()


def save_params(path: pathlib.Path, params) -> None:
  """Writes a parameter tree to a new folder, atomically; an older one there is replaced."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(path).absolute(), params, force=True)


def load_params(path: pathlib.Path, target):
  """Reads a parameter tree saved by `save_params`, placed like `target`.

  Raises:
    UserError: there is none, or its shapes differ.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise records.UserError(f'no parameters at {path}')
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(path, _abstract(target))
    except ValueError as error:
      raise records.UserError(
        f'parameters at {path} do not fit this model: {str(error).splitlines()[0]}'
      ) from error


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Stopped(Exception):
  """Raised by `StopSignal.poll`: leave the loop, save the last finished step. `code`: exit code."""

  def __init__(self, code: int):
    super().__init__(f'stopped by {signal.Signals(code - 128).name}')
    self.code = code


class StopSignal:
  """SIGTERM and Ctrl-C set a flag, nothing else; `poll` raises at a point where saving is safe.

  A poll may be minutes away (a compilation, one long decode), and a preempted machine gives about
  30 s: after `grace_s` seconds the process leaves as it is, and resumes from its newest checkpoint.
  A second Ctrl-C leaves at once. Python runs signal handlers only between its own instructions, so
  the clock is a thread that hears of the signal through a file descriptor.
  """

  def __init__(self, grace_s: float):
    self._code, self._grace_s = 0, grace_s
    self._old, self._pipe, self._old_fd = {}, (), -1

  def __enter__(self) -> StopSignal:
    if threading.current_thread() is threading.main_thread():  # notebooks may run us in another
      self._pipe = os.pipe()
      os.set_blocking(self._pipe[1], False)
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._received)
      self._old_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
      threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._pipe:
      signal.set_wakeup_fd(self._old_fd)
      os.close(self._pipe[1])  # ends the thread

  def _received(self, number, _frame) -> None:
    self._code = self._code or 128 + number

  def _watch(self, pipe: int) -> None:
    """Counts down from the first signal; leaves at once on a Ctrl-C after it."""
    end, code = None, 0
    with open(pipe, 'rb', buffering=0) as heard:
      while True:
        patience = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([heard], [], [], patience)[0]:
          os._exit(code)
        number = heard.read(1)
        if not number:
          return
        if number[0] in (signal.SIGTERM, signal.SIGINT):
          if code and number[0] == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
          code = code or 128 + number[0]
          end = end or time.monotonic() + self._grace_s

  def poll(self) -> None:
    """Raises Stopped if any process was asked to stop. Every process must call it equally often."""
    code = sharding.agree(self._code)
    if code:
      raise Stopped(code)
