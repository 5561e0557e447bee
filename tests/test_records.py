"""Where thinking begins and ends."""

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
