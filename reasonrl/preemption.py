"""Leaving a run in time: signals become an exception at a point where saving is safe."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time

from reasonrl import sharding


class Stopped(Exception):
  """Raised by `StopSignal.poll`: leave the loop, save the last finished step. `code`: exit code."""

  def __init__(self, code: int):
    super().__init__(f'stopped by {signal.Signals(code - 128).name}')
    self.code = code


class StopSignal:
  """SIGTERM and Ctrl-C set a flag, nothing else; `poll` raises at a point where saving is safe.

  A poll may be minutes away (a compilation, one long decode). Ctrl-C waits for it; a second Ctrl-C
  leaves at once. A preempted machine gives about 30 s: `grace_s` seconds after SIGTERM the process
  leaves as it is, and resumes from its newest checkpoint. Python runs signal handlers only between
  its own instructions, so the clock is a thread that hears of the signal through a file descriptor.
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
    """Says what will happen; counts down from a SIGTERM; leaves at once on a second Ctrl-C."""
    end, code = None, 0
    with open(pipe, 'rb', buffering=0) as signals:
      while True:
        timeout = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([signals], [], [], timeout)[0]:
          self._leave(code, f'not saved within {self._grace_s:g} s of SIGTERM')
        number = signals.read(1)
        if not number:
          return
        if number[0] == signal.SIGINT:
          if code:
            self._leave(128 + signal.SIGINT, 'not saved')
          print('stopping after this step (Ctrl-C again: at once)', file=sys.stderr, flush=True)
        if number[0] == signal.SIGTERM:
          end = end or time.monotonic() + self._grace_s
        if number[0] in (signal.SIGTERM, signal.SIGINT):
          code = code or 128 + number[0]

  def _leave(self, code: int, why: str) -> None:
    print(
      f'\nleft at once, {why}: the newest checkpoint is what remains', file=sys.stderr, flush=True
    )
    os._exit(code)

  def poll(self) -> None:
    """Raises Stopped if any process was asked to stop. Every process must call it equally often."""
    code = sharding.agree(self._code)
    if code:
      raise Stopped(code)
