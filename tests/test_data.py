"""The stream's order and position; what a supervised row trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from reasonrl import data, records


@dataclasses.dataclass(frozen=True)
class Counting:
  """Example i is its own index."""

  def example(self, split, index):
    return records.Example('counting', split, index, f'{split} {index}', str(index), None, {})


class Letters:
  """One id per letter; 'a' is 10. EOS 2 comes before EOS 3."""

  eos_ids = (2, 3)

  def encode(self, text):
    return [ord(c) - ord('a') + 10 for c in text]


def indices(stream, batches):
  return [[example.index for example in stream.next()] for _ in range(batches)]


def test_stream_walks_the_task_in_order():
  stream = data.Stream(Counting(), 'test', 0, 3, 0)
  first = stream.next()
  assert [e.problem for e in first] == ['test 0', 'test 1', 'test 2']
  assert indices(stream, 2) == [[3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize('at', [0, 1, 4, 1000])
def test_position_restores_the_stream(at):
  stream = data.Stream(Counting(), 'train', 0, 2, 0 if at < 10 else at - 1)
  while stream.position < at:
    stream.next()
  again = data.Stream(Counting(), 'train', 0, 2, stream.position)
  want = indices(stream, 3)
  assert indices(again, 3) == want == [[2 * at + 2 * i, 2 * at + 2 * i + 1] for i in range(3)]
  assert again.position == stream.position == at + 3


def test_reading_ahead_does_not_move_the_position():
  stream = data.Stream(Counting(), 'train', 0, 2, 0)
  stream.next()
  assert stream.position == 1


def test_two_streams_are_equal_and_independent():
  a, b = (data.Stream(Counting(), 'train', 0, 4, 0) for _ in range(2))
  first = a.next()
  a.next()
  assert b.next() == first


def test_processes_share_a_batch_without_overlap(monkeypatch):
  monkeypatch.setattr(data.jax, 'process_count', lambda: 2)
  halves = []
  for process in range(2):
    monkeypatch.setattr(data.jax, 'process_index', lambda: process)  # noqa: B023
    halves.append(indices(data.Stream(Counting(), 'train', 0, 4, 5), 2))
  both = [sorted(a + b) for a, b in zip(*halves, strict=True)]
  assert both == [[20, 21, 22, 23], [24, 25, 26, 27]]
  with pytest.raises(records.UserError, match='batch of 3 examples does not divide over 2'):
    data.Stream(Counting(), 'train', 0, 3, 0)


def supervised(prompt_ids, solution, row_length=16, prefill=''):
  example = records.Example('counting', 'train', 7, 'p', 'a', solution, {})
  return data.supervised_sequence(Letters(), prompt_ids, prefill, example, row_length)


def test_loss_starts_at_the_prompts_end_and_includes_eos():
  seq = supervised([5, 6, 7], 'abc')
  np.testing.assert_array_equal(seq.tokens_T, [5, 6, 7, 10, 11, 12, 2])
  np.testing.assert_array_equal(seq.index_M, [3, 4, 5, 6])
  np.testing.assert_array_equal(seq.aux['weight'], np.ones(4, np.float32))


def test_the_prefill_is_in_the_prompt_and_not_learned_twice():
  plain, prefilled = supervised([5], 'abc'), supervised([5, 10], 'abc', prefill='a')
  np.testing.assert_array_equal(prefilled.tokens_T, plain.tokens_T)
  np.testing.assert_array_equal(prefilled.index_M, [2, 3, 4])
  with pytest.raises(records.UserError, match="does not begin with prompt.prefill='x'"):
    supervised([5], 'abc', prefill='x')


def test_streams_have_no_example_in_common():
  one, two = (data.Stream(Counting(), 'train', k, 2, 0) for k in (0, 1))
  assert one.next()[0].index == 0 and two.next()[0].index == data.LENGTH


def test_a_row_may_be_exactly_full():
  assert supervised([5, 6, 7], 'abc', row_length=7).tokens_T.size == 7
  with pytest.raises(records.UserError, match='example 7 has 7 tokens, more than row_length=6'):
    supervised([5, 6, 7], 'abc', row_length=6)


def test_a_task_without_solutions_cannot_feed_a_supervised_phase():
  with pytest.raises(records.UserError, match="task 'counting' has no solutions"):
    supervised([5], None)


def test_streams_of_a_task_that_repeats_start_where_an_epoch_does():
  """So that a stream that is as long as an epoch has every example once."""

  class Repeating(Counting):
    def epoch(self, split):
      return 7

  for number in (0, 1, 5):
    first = indices(data.Stream(Repeating(), 'train', number, 7, 0), 1)[0][0]
    assert first % 7 == 0 and number * data.LENGTH <= first < number * data.LENGTH + 7


def test_a_solution_that_was_sampled_is_learned_as_it_was_sampled():
  meta = {records.TOKEN_IDS: [30, 31, 3]}
  example = records.Example('t', 'train', 0, '', '', 'abc', meta)
  row = data.supervised_sequence(Letters(), [7, 8], '', example, 8)
  assert row.tokens_T.tolist() == [7, 8, 30, 31, 3] and row.index_M.tolist() == [2, 3, 4]
