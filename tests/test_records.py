"""Where thinking begins and ends; hints."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import records


@pytest.mark.parametrize(
  'text, parts',
  [
    ('a<think>b</think>c', ('a', '<think>b</think>', 'c')),
    ('<think></think>', ('', '<think></think>', '')),
    ('</think>a<think>b</think></think>', ('</think>a', '<think>b</think>', '</think>')),
    ('<think><think>a</think>b</think>', ('', '<think><think>a</think>', 'b</think>')),
    ('<think>never closed', ('<think>never closed', '', '')),
    ('never opened</think>', ('never opened</think>', '', '')),
    ('', ('', '', '')),
  ],
)
def test_split_think_by_hand(text, parts):
  assert records.split_think(text) == parts
  span = parts[1].removeprefix('<think>').removesuffix('</think>') if parts[1] else None
  assert records.think_span(text) == span


@given(st.lists(st.sampled_from(['<think>', '</think>', 'x', '<', ' '])).map(''.join))
def test_nothing_is_lost(text):
  assert ''.join(records.split_think(text)) == text


def test_a_hint_is_the_tasks_own_or_stands_in_parentheses_behind_the_problem():
  plain = records.Example('sums', 'train', 7, '7 + 5?', '12', '12!', {'level': 1})
  shown = records.show_hint(plain)
  assert shown == dataclasses.replace(
    plain, problem='7 + 5? (12)', meta={'level': 1, 'hint_shown': True}
  )
  own = dataclasses.replace(plain, meta={'hinted': '7 + 5 = 12?'})
  assert records.show_hint(own).problem == '7 + 5 = 12?'
  with pytest.raises(ValueError, match='sums/train/7 shows its hint already'):
    records.show_hint(shown)


def test_a_length_target_needs_a_mode_and_a_positive_number():
  of = lambda **meta: records.length_target(records.Example('s', 'train', 0, '', '', None, meta))
  assert of(target_length=7, length_mode='max') == ('max', 7)
  assert of(target_length=7, length_mode='exact') == ('exact', 7)
  for wrong in ({'length_mode': 'least'}, {'target_length': 0}, {'target_length': 7.0}):
    assert of(**{'target_length': 7, 'length_mode': 'max', **wrong}) is None
  assert of(target_length=7) is None and of(length_mode='max') is None
