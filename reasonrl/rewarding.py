"""Runs rewards in worker processes that can be killed.

1. `Pool` starts its workers through multiprocessing's fork server: a clean process without JAX,
   from which a new worker is forked whenever one had to be killed. Build the pool before JAX
   initialises its devices.
2. `score` cuts the work into items: one (reward, completion) each, or one (reward, group) for a
   group reward. A worker receives items by the chunk and answers after every single one, so the
   parent knows at any time which item a worker is busy with, and since when.
3. An item that takes longer than the limit, or takes its worker down, is given value 0 and counted;
   the worker is replaced and the items after it go on. So does an item whose reward raises.
4. The values are put together: per reward, per named part, and as the weighted sum.

No model text is executed here or in the trainer; rewards that must run programs bring a sandbox.
Left out on purpose: retries (a reward is pure) and a fallback without processes.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from reasonrl import records

MEMORY_BYTES = 2 << 30  # address space of one worker
START_S = 60.0  # the longest that a worker may take to start, or to import the rewards
MAX_CHUNK = 64  # items sent at once
READ_BYTES = 1 << 16
MAX_ERROR = 2000  # characters kept of an error

# Rewards by name, each with its weight in the sum.
Rewards = Mapping[str, tuple[Callable, float]]


@dataclasses.dataclass(frozen=True)
class Scores:
  """What the rewards say of R completions, in the order of the completions.

  Attributes:
    value: float32 [R], sum of weight * value over the rewards that apply; NaN if none does (so a
      missing reward is not a reward of 0).
    parts: float32 [R] each: the unweighted value of each reward under its name, and its named parts
      as 'name/part'; NaN = does not apply.
    token_values: weighted sum of the rewards' dense credit, one float32 [num_tokens] per
      completion, None for a completion without; None if no reward gave any.
    timeouts: items (a completion, or a group for group rewards) stopped at the limit.
    errors: items whose reward raised, returned something else than finite scores, or crashed.
    first_failure: what the first of them, timeout or error, was about; None if there was none.
  """

  value: np.ndarray
  parts: dict[str, np.ndarray]
  token_values: list[np.ndarray | None] | None
  timeouts: int
  errors: int
  first_failure: str | None


@dataclasses.dataclass(frozen=True)
class _Item:
  name: str  # which reward
  rows: tuple[int, ...]  # which completions: one, or a whole group


class Pool:
  """`workers` killable processes that score completions; a context manager.

  Args:
    workers: how many processes, at least 1.
    timeout_s: the longest that one reward may take for one completion (or one group), in seconds of
      wall time.
  """

  def __init__(self, workers: int, timeout_s: float):
    if workers < 1:
      raise records.UserError(
        f'rewarding.workers={workers}: rewards run in processes of their own, so at least 1'
      )
    if not 0 < timeout_s < math.inf:
      raise records.UserError(f'rewarding.timeout_s={timeout_s}: a positive number of seconds')
    self._timeout_s = timeout_s
    self._workers = []
    # Runs before multiprocessing's own exit handler, which would wait for ever: workers ignore the
    # SIGTERM that it sends.
    atexit.register(self.close)
    for _ in range(workers):
      self._workers.append(_Worker(timeout_s))

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *exc):
    self.close()

  def close(self):
    """Ends the workers. The pool cannot be used afterwards."""
    atexit.unregister(self.close)
    while self._workers:
      self._workers.pop().stop()

  def score(
    self,
    rewards: Rewards,
    examples: Sequence[records.Example],
    completions: Sequence[records.Completion],
    groups: Sequence[int],
  ) -> Scores:
    """Scores R completions; examples[i] and groups[i] belong to completions[i].

    If this raises, the pool is closed.

    Raises:
      ValueError: no rewards, lists of different lengths, or the pool is closed.
      RuntimeError: a worker cannot start, or cannot import a reward.
    """
    if not rewards:
      raise ValueError('no rewards to score with')
    if not len(examples) == len(completions) == len(groups):
      raise ValueError(
        f'{len(completions)} completions with {len(examples)} examples and {len(groups)} groups'
      )
    if not self._workers:
      raise ValueError('the pool is closed')
    items = _items(rewards, groups)
    try:
      answers, timeouts, failures = self._run(rewards, examples, completions, items)
    except BaseException:
      self.close()  # what the workers still owe must not answer the next call
      raise
    value, parts, token_values = _assemble(rewards, items, answers, len(completions))
    errors, first = len(failures) - timeouts, failures[0] if failures else None
    return Scores(value, parts, token_values, timeouts, errors, first)

  def _run(self, rewards, examples, completions, items):
    """Returns (one answer per item, None where it failed; timeouts; what each failure was)."""
    functions = {name: fn for name, (fn, _) in rewards.items()}
    chunk = min(MAX_CHUNK, max(1, len(items) // (4 * len(self._workers))))
    waiting = collections.deque(range(len(items)))
    answers, timeouts, failures = [None] * len(items), 0, []

    def dispatch(worker):
      taken = [waiting.popleft() for _ in range(min(chunk, len(waiting)))]
      work = []
      for item in (items[i] for i in taken):
        rows = item.rows
        work.append((item.name, [examples[r] for r in rows], [completions[r] for r in rows]))
      worker.send((functions, work), taken)

    def give_up(worker, why):
      """Replaces a worker. The item that it was busy with has failed, the next ones wait again."""
      if not worker.ready:
        raise RuntimeError(f'a reward worker could not start or load the rewards: it {why}')
      item = items[worker.owed.popleft()]
      waiting.extendleft(reversed(worker.owed))
      failures.append(f'reward {item.name!r} of completions {item.rows}: its worker {why}')
      self._replace(worker)

    while waiting or any(worker.owed for worker in self._workers):
      for worker in list(self._workers):
        if waiting and worker.ready and not worker.owed:
          # A worker can also die while it is idle, which is no item's fault.
          dispatch(worker) if worker.process.is_alive() else self._replace(worker)
      busy = {worker.conn: worker for worker in self._workers if worker.owed or not worker.ready}
      patience = min(worker.deadline for worker in busy.values()) - time.monotonic()
      heard = multiprocessing.connection.wait(list(busy), max(0.0, patience))
      now = time.monotonic()
      for conn, worker in busy.items():
        if conn in heard:
          said = worker.read()
          if said is None:
            give_up(worker, 'died')
          for answer in said or ():
            if 'fatal' in answer:
              raise RuntimeError(f'a reward worker cannot load the rewards: {answer["fatal"]}')
            if 'error' in answer:
              failures.append(answer['error'])
            if 'ready' in answer:
              worker.ready = True
            else:
              answers[worker.owed.popleft()] = answer.get('scores')
        elif now > worker.deadline:
          give_up(worker, 'took too long')
          timeouts += 1
    return answers, timeouts, failures

  def _replace(self, worker):
    worker.stop()
    self._workers[self._workers.index(worker)] = _Worker(self._timeout_s)


class _Worker:
  """The parent's side of one process: what it owes, and when it must be heard of next."""

  def __init__(self, timeout_s: float):
    context = multiprocessing.get_context('forkserver')
    self.timeout_s = timeout_s
    self.conn, child = context.Pipe()
    self.process = context.Process(target=_serve, args=(child, timeout_s), daemon=True)
    with _without_main():
      self.process.start()
    child.close()
    self.ready = False  # it has started, or loaded what it was sent last
    self.owed = collections.deque()  # numbers of the items that it was sent, the current one first
    self.deadline = time.monotonic() + START_S
    self.unread = b''

  def send(self, message, numbers: Sequence[int]):
    # Loading may import a large library, which is no item's fault.
    self.ready = False
    self.owed.extend(numbers)
    self.deadline = time.monotonic() + START_S
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `read` will see the end
      self.conn.send(message)

  def read(self) -> list[dict] | None:
    """The answers that have arrived, without waiting for more; None: the worker has ended."""
    try:
      data = os.read(self.conn.fileno(), READ_BYTES)
    except ConnectionResetError:
      data = b''
    if not data:
      return None
    self.deadline = time.monotonic() + self.timeout_s
    *lines, self.unread = (self.unread + data).split(b'\n')
    return [json.loads(line) for line in lines]

  def stop(self):
    self.process.kill()
    self.process.join()
    self.conn.close()


@contextlib.contextmanager
def _without_main():
  """Hides the program's main module from multiprocessing, which would run it again in the child.

  The child would import JAX with it, and a script without an `if __name__` guard would start over.
  """
  main = sys.modules['__main__']
  sys.modules['__main__'] = types.ModuleType('__main__')
  try:
    yield
  finally:
    sys.modules['__main__'] = main


# ------------------------------------------------------------------------------- in the worker


def _serve(conn, timeout_s: float):
  """Answers chunks of items until the parent is gone.

  The parent sends pickled (functions, [(name, examples, completions), ...]). It gets lines of JSON:
  {'ready': true} when the worker has started and when it has loaded a chunk, then one per item:
  {'scores': [[value, parts, token_values], ...]} or {'error': text}.
  """
  # Ctrl-C and a job scheduler's SIGTERM reach the whole process group, but only the trainer may
  # decide what to do: a worker that died of them would change rewards of the last step.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  if sys.platform == 'linux':  # elsewhere the limit is refused or ignored
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
    _say(conn, {'ready': True})
    while True:
      try:
        functions, work = conn.recv()
      except (ImportError, AttributeError) as error:
        _say(conn, {'fatal': str(error)})
        return
      _say(conn, {'ready': True})
      for name, examples, completions in work:
        # The parent ends an item that takes too long. If the parent was killed meanwhile, this
        # alarm does; without a handler it kills whatever Python is busy with.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        answer = _answer(functions[name], examples, completions)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(conn, answer)


def _say(conn, answer: dict):
  line = json.dumps(answer).encode() + b'\n'
  while line:
    line = line[os.write(conn.fileno(), line) :]


def _answer(fn, examples, completions) -> dict:
  try:
    scores = fn(examples, completions) if fn.group else [fn(examples[0], completions[0])]
    return {'scores': [_plain(*pair) for pair in zip(scores, completions, strict=True)]}
  except Exception:  # whatever a reward does wrong: the parent counts it and shows the first
    return {'error': traceback.format_exc()[-MAX_ERROR:]}


def _plain(score: records.Score, completion: records.Completion) -> list:
  value = None if score.value is None else float(score.value)
  parts = {name: float(part) for name, part in score.parts.items()}
  dense = None if score.token_values is None else [float(v) for v in score.token_values]
  if not all(math.isfinite(v) for v in (value or 0.0, *parts.values(), *(dense or ()))):
    raise ValueError(f'not finite: {score}')
  if dense is not None and len(dense) != completion.num_tokens:
    raise ValueError(f'{len(dense)} token values for {completion.num_tokens} tokens')
  return [value, parts, dense]


# ------------------------------------------------------------------------- before and after


def _items(rewards: Rewards, groups: Sequence[int]) -> list[_Item]:
  single = [name for name, (fn, _) in rewards.items() if not fn.group]
  members = collections.defaultdict(list)
  for row, group in enumerate(groups):
    members[group].append(row)
  # All rewards of a completion side by side: a chunk then carries its text once.
  return [_Item(name, (row,)) for row in range(len(groups)) for name in single] + [
    _Item(name, tuple(rows))
    for name, (fn, _) in rewards.items()
    if fn.group
    for rows in members.values()
  ]


def _assemble(rewards: Rewards, items, answers, size: int):
  """(value [R], parts [R] each, token values): see Scores. A failed item has value 0."""
  parts = {name: np.full(size, np.nan, np.float32) for name in rewards}
  token_values = [None] * size
  for item, answer in zip(items, answers, strict=True):
    failed = [[0.0, {}, None]] * len(item.rows)
    for row, (value, named, dense) in zip(item.rows, answer or failed, strict=True):
      if value is not None:
        parts[item.name][row] = value
      for key, part in named.items():
        key = f'{item.name}/{key}'
        parts.setdefault(key, np.full(size, np.nan, np.float32))[row] = part
      if dense is not None:
        credit = rewards[item.name][1] * np.asarray(dense, np.float32)
        token_values[row] = credit if token_values[row] is None else token_values[row] + credit
  total = np.full(size, np.nan)
  for name, (_, weight) in rewards.items():
    applies = ~np.isnan(parts[name])
    total[applies] = np.nan_to_num(total[applies]) + weight * parts[name][applies]
  dense_given = any(credit is not None for credit in token_values)
  parts = {name: parts[name] for name in sorted(parts)}
  return total.astype(np.float32), parts, token_values if dense_given else None
