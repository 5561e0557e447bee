"""The worker pool: right sums, in order, and no reward can stop, slow or survive the trainer.

The rewards below are imported by the workers: this module must stay importable without JAX.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from typing import ClassVar

import numpy as np
import pytest

from reasonrl import records, rewarding
from reasonrl.rewards import answer, format

REPOSITORY = pathlib.Path(__file__).parents[1]
TIMEOUT_S = 1.0


@dataclasses.dataclass(frozen=True)
class Obey:
  """Does what the completion says: a number is its own value."""

  group: ClassVar[bool] = False

  def __call__(self, example, completion):
    match completion.text.split():
      case ['hang']:
        while True:
          pass
      case ['sleep', seconds]:
        time.sleep(float(seconds))
        return records.Score(1.0, {}, None)
      case ['exit']:
        os._exit(3)
      case ['sys.exit']:
        sys.exit(3)
      case ['segfault']:
        os.kill(os.getpid(), signal.SIGSEGV)
      case ['memory']:
        return records.Score(float(len(bytearray(8 << 30))), {}, None)
      case ['raise']:
        raise KeyError('a bug in a reward')
      case ['nan']:
        return records.Score(float('nan'), {}, None)
      case ['none']:
        return records.Score(None, {'seen': 1.0}, None)
      case ['dense', *values]:
        return records.Score(0.5, {}, tuple(map(float, values)))
      case ['interrupt']:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return records.Score(2.0, {}, None)
      case ['pid']:
        return records.Score(float(os.getpid()), {'jax': float('jax' in sys.modules)}, None)
      case [number]:
        return records.Score(float(number), {'half': float(number) / 2}, None)


def load_slowly():
  time.sleep(1.5 * TIMEOUT_S)
  return Obey()


class SlowToLoad(Obey):
  def __reduce__(self):
    return load_slowly, ()


class DiesOnLoading(Obey):
  def __reduce__(self):
    return os._exit, (3,)


@dataclasses.dataclass(frozen=True)
class Rank:
  """A group reward: the rank of a completion within its group, by the number in its text."""

  group: ClassVar[bool] = True

  def __call__(self, examples, completions):
    assert len({e.problem for e in examples}) == 1
    if any(c.text == 'hang' for c in completions):
      while True:
        pass
    order = sorted(float(c.text) for c in completions)
    return [records.Score(float(order.index(float(c.text))), {}, None) for c in completions]


def example(problem='p'):
  return records.Example('test', 'train', 0, problem, '7', None, {})


def completion(text, tokens=3):
  return records.Completion(text, (0,) * tokens, tokens, None, records.Stop.EOS, 8)


OBEY = {'obey': (Obey(), 1.0)}


def score(pool, texts, rewards=OBEY, groups=None):
  groups = groups or [0] * len(texts)
  return pool.score(
    rewards, [example(f'p{g}') for g in groups], list(map(completion, texts)), groups
  )


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(workers=2, timeout_s=TIMEOUT_S) as pool:
    yield pool


# --------------------------------------------------------------------------------------- the sums


def test_the_weighted_sum_leaves_out_what_does_not_apply(pool):
  rewards = {'a': (Obey(), 2.0), 'b': (Obey(), -1.0)}
  scores = score(pool, ['3', '0', 'none'], rewards)
  np.testing.assert_array_equal(scores.value, np.array([3, 0, np.nan], np.float32))
  np.testing.assert_array_equal(scores.parts['a'], np.array([3, 0, np.nan], np.float32))
  np.testing.assert_array_equal(scores.parts['b'], scores.parts['a'])
  np.testing.assert_array_equal(scores.parts['a/half'], np.array([1.5, 0, np.nan], np.float32))
  np.testing.assert_array_equal(scores.parts['a/seen'], np.array([np.nan, np.nan, 1], np.float32))
  assert list(scores.parts) == ['a', 'a/half', 'a/seen', 'b', 'b/half', 'b/seen']
  assert scores.value.dtype == scores.parts['a'].dtype == np.float32
  assert (scores.timeouts, scores.errors, scores.first_failure) == (0, 0, None)
  assert scores.token_values is None


def test_one_missing_reward_is_not_a_reward_of_zero(pool):
  """'7' has no gold answer to compare with, so only the format counts: 0, not NaN."""
  accuracy = answer.Accuracy(after_think=False, extraction='strict', require_stop=True)
  r1_format = format.R1Format(allow_empty_think=False)
  rewards = {'accuracy': (accuracy, 1.0), 'r1_format': (r1_format, 0.5)}
  no_gold = dataclasses.replace(example(), answer='')
  good = completion('<think>a</think><answer>7</answer>')
  scores = pool.score(
    rewards, [example(), no_gold, no_gold], [good, good, completion('7')], [0, 1, 1]
  )
  assert scores.value.tolist() == [1.5, 0.5, 0.0]
  assert np.isnan(scores.parts['accuracy']).tolist() == [False, True, True]


def test_the_order_is_kept_and_nothing_depends_on_the_number_of_workers(pool):
  texts = [str(i) for i in np.random.default_rng(0).permutation(700)]
  scores = score(pool, texts)
  assert scores.value.tolist() == [float(text) for text in texts]
  with rewarding.Pool(workers=1, timeout_s=TIMEOUT_S) as alone:
    np.testing.assert_array_equal(score(alone, texts).value, scores.value)
  assert score(pool, []).value.shape == (0,)


def test_a_group_reward_sees_a_whole_group_by_its_id(pool):
  rewards = {'rank': (Rank(), 1.0), 'obey': (Obey(), 10.0)}
  scores = score(pool, ['5', '1', '4', '2', '3'], rewards, groups=[8, 3, 8, 3, 8])
  assert scores.parts['rank'].tolist() == [2, 0, 1, 1, 0]
  assert scores.value.tolist() == [52, 10, 41, 21, 30]


def test_dense_credit_is_summed_with_the_weights(pool):
  rewards = {'a': (Obey(), 2.0), 'b': (Obey(), 1.0)}
  scores = score(pool, ['dense 1 2 3', '5'], rewards)
  assert scores.token_values[0].tolist() == [3, 6, 9]
  assert scores.token_values[1] is None
  assert scores.value.tolist() == [1.5, 15.0]


# ------------------------------------------------------------------------------------- the faults


@pytest.mark.parametrize('fault', ['exit', 'sys.exit', 'segfault', 'memory', 'raise', 'nan'])
def test_a_fault_costs_its_own_item_only(pool, fault):
  texts = [str(i) for i in range(40)]
  texts[7] = texts[31] = fault
  scores = score(pool, texts)
  expected = [0.0 if i in (7, 31) else float(i) for i in range(40)]
  assert scores.value.tolist() == expected
  assert (scores.timeouts, scores.errors) == (0, 2)
  named = {'memory': 'MemoryError', 'raise': 'a bug in a reward', 'nan': 'not finite'}
  died = r"reward 'obey' of completions \((7|31),\): its worker died"
  assert re.search(named.get(fault, died), scores.first_failure)


def test_a_hang_is_ended_at_the_limit(pool):
  texts = [str(i) for i in range(40)]
  texts[0] = texts[39] = 'hang'
  start = time.monotonic()
  scores = score(pool, texts)
  assert TIMEOUT_S <= time.monotonic() - start < 2 * TIMEOUT_S + 10
  assert scores.value.tolist() == [0.0, *range(1, 39), 0.0]
  assert (scores.timeouts, scores.errors) == (2, 0)
  assert re.search(r"'obey' of completions \((0|39),\): .* took too long", scores.first_failure)
  assert score(pool, ['4']).value.tolist() == [4.0]


def test_the_limit_is_per_item_not_per_chunk(pool):
  """16 items go out two by two, so one chunk takes longer than the limit, but no item does."""
  texts = [f'sleep {0.6 * TIMEOUT_S}'] * 2 + ['1'] * 14
  start = time.monotonic()
  scores = score(pool, texts)
  assert time.monotonic() - start > TIMEOUT_S
  assert scores.value.tolist() == [1.0] * 16 and scores.timeouts == 0


def test_the_time_to_import_a_reward_is_no_items_fault(pool):
  scores = score(pool, ['1'], {'slow': (SlowToLoad(), 1.0)})
  assert scores.value.tolist() == [1.0] and scores.timeouts == 0


def test_a_group_that_hangs_is_one_timeout(pool):
  scores = score(pool, ['2', 'hang', '1', '3'], {'rank': (Rank(), 1.0)}, groups=[0, 1, 0, 1])
  assert scores.value.tolist() == [1, 0, 0, 0]
  assert (scores.timeouts, scores.errors) == (1, 0)


def test_dense_credit_of_another_length_is_an_error(pool):
  scores = score(pool, ['dense 1 2', '1'])
  assert (scores.errors, scores.token_values) == (1, None)
  assert '2 token values for 3 tokens' in scores.first_failure


def test_a_worker_that_died_between_two_calls_is_nobodys_fault(pool):
  pids = {int(pid) for pid in score(pool, ['pid'] * 50).value}
  for pid in pids:
    os.kill(pid, signal.SIGKILL)
  time.sleep(0.2)
  scores = score(pool, [str(i) for i in range(50)])
  assert scores.value.tolist() == list(range(50)) and scores.errors == 0


def test_workers_have_no_jax_and_ignore_what_the_terminal_sends(pool):
  scores = score(pool, ['pid'] * 30)
  assert not scores.parts['obey/jax'].any()
  assert os.getpid() not in scores.value
  assert score(pool, ['interrupt', '1']).value.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(workers=0, timeout_s=1.0), 'workers=0'),
    (dict(workers=1, timeout_s=0.0), 'timeout_s=0.0'),
    (dict(workers=1, timeout_s=float('inf')), 'timeout_s=inf'),
  ],
)
def test_bad_fields_are_refused(fields, message):
  with pytest.raises(records.UserError, match=message):
    rewarding.Pool(**fields)


def test_bad_arguments_are_refused(pool):
  with pytest.raises(ValueError, match='no rewards'):
    score(pool, ['1'], rewards={})
  with pytest.raises(ValueError, match='1 completions with 2 examples and 1 groups'):
    pool.score(OBEY, [example(), example()], [completion('1')], [0])


@pytest.mark.parametrize(
  ('reward', 'error', 'message'),
  [
    (type('Local', (Obey,), {})(), pickle.PicklingError, 'Local'),
    (DiesOnLoading(), RuntimeError, 'load the rewards: it died'),
  ],
)
def test_a_reward_that_cannot_be_sent_is_an_error_and_closes_the_pool(reward, error, message):
  with rewarding.Pool(workers=1, timeout_s=TIMEOUT_S) as pool:
    with pytest.raises(error, match=message):
      score(pool, ['1'], rewards={'bad': (reward, 1.0)})
    with pytest.raises(ValueError, match='closed'):
      score(pool, ['1'])


def test_close_ends_the_workers():
  with rewarding.Pool(workers=1, timeout_s=TIMEOUT_S) as pool:
    (pid,) = score(pool, ['pid']).value.astype(int)
    assert alive(pid)
  assert not alive(pid)


def test_512_completions_with_two_rewards_are_quick(pool):
  rewards = {
    'accuracy': (answer.Accuracy(True, 'strict', True), 1.0),
    'r1_format': (format.R1Format(False), 1.0),
  }
  completions = [completion('<think>1234</think><answer>7</answer>', 40)] * 512
  times = []
  for _ in range(5):
    start = time.perf_counter()
    scores = pool.score(rewards, [example()] * 512, completions, [i // 16 for i in range(512)])
    times.append(time.perf_counter() - start)
  assert scores.value.tolist() == [2.0] * 512
  assert min(times) < 0.2  # measured: 0.03


# --------------------------------------------------------------------- the life of the processes


def script(tmp_path, text):
  path = tmp_path / 'script.py'
  path.write_text(textwrap.dedent(text))
  env = os.environ | {'PYTHONPATH': os.pathsep.join([str(REPOSITORY), str(REPOSITORY / 'tests')])}
  return subprocess.Popen(
    [sys.executable, str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def test_the_main_module_is_not_run_again_and_the_exit_is_clean(tmp_path):
  """Neither `if __name__ == '__main__'` nor `close`: the script ends by itself, and quickly."""
  process = script(
    tmp_path,
    """
    print('start')
    import test_rewarding as t
    pool = t.rewarding.Pool(workers=2, timeout_s=5.0)
    print(t.score(pool, ['1', '2']).value.tolist())
    """,
  )
  out, err = process.communicate(timeout=30)
  assert (out, err, process.returncode) == ('start\n[1.0, 2.0]\n', '', 0)


def test_a_reward_of_the_main_module_is_refused(tmp_path):
  process = script(
    tmp_path,
    """
    import test_rewarding as t
    class Mine(t.Obey):
      pass
    t.score(t.rewarding.Pool(workers=1, timeout_s=5.0), ['1'], {'mine': (Mine(), 1.0)})
    """,
  )
  _, err = process.communicate(timeout=30)
  assert process.returncode == 1
  assert 'RuntimeError: a reward worker cannot load the rewards' in err and 'Mine' in err


def alive(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except FileNotFoundError:
    return False
  return state != 'Z'


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
  """An idle worker sees the end of its pipe; a busy one is ended by its alarm."""
  process = script(
    tmp_path,
    """
    import test_rewarding as t
    pool = t.rewarding.Pool(workers=2, timeout_s=1.0)
    while len(pids := set(t.score(pool, ['pid'] * 50).value.astype(int).tolist())) < 2:
      pass
    print(*pids, flush=True)
    pool._timeout_s = 1000.0
    for worker in pool._workers:
      worker.timeout_s = 1000.0
    t.score(pool, ['hang'])
    """,
  )
  pids = [int(pid) for pid in process.stdout.readline().split()]
  time.sleep(0.3)
  assert len(pids) == 2 and all(map(alive, pids))
  process.kill()
  process.wait()
  deadline = time.monotonic() + 10
  while any(map(alive, pids)):
    assert time.monotonic() < deadline
    time.sleep(0.05)
