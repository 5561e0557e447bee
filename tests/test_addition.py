"""The task `addition` and its reward: STaR's strings byte for byte, line by line, the answer."""

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from reasonrl import records, tokenizers
from reasonrl.records import Stop
from reasonrl.rewards import REWARDS
from reasonrl.rewards import addition as reward
from reasonrl.tasks import TASKS, addition

# One example of gen_sums.py, without the end-of-text mark.
PAPER = (
  'Input:\n6 2 4 + 2 5 9\nTarget:\n<scratch>\n6 2 4 + 2 5 9 , C: 0\n2 + 5 , 3 C: 1\n'
  '6 + 2 , 8 3 C: 0\n, 8 8 3 C: 0\n0 8 8 3\n</scratch>\n8 8 3\n\n'
)


def make(**changes):
  return TASKS['addition'](**(dict(seed=0, min_digits=1, max_digits=5) | changes))


def find(first, second):
  """The example whose operands these are."""
  task = make(min_digits=len(first), max_digits=len(first))
  problem = f'Input:\n{" ".join(first)} + {" ".join(second)}\nTarget:'
  examples = (task.example(split, i) for i in range(2000) for split in ('train', 'test'))
  return next(e for e in examples if e.problem == problem)


# ---------------------------------------------------------------------------------------- task


def test_scratchpads_of_the_paper():
  assert addition.scratchpad('624', '259') == PAPER.split('\n')[4:9]
  assert addition.scratchpad('7', '8') == ['7 + 8 , C: 0', ', 5 C: 1', '1 5']
  assert addition.scratchpad('99999', '10001')[-2:] == [', 1 0 0 0 0 C: 1', '1 1 0 0 0 0']


def test_an_example_is_the_papers_text():
  example = find('62', '25')
  assert example.problem + example.solution + '\n\n' == (
    'Input:\n6 2 + 2 5\nTarget:\n<scratch>\n6 2 + 2 5 , C: 0\n6 + 2 , 7 C: 0\n, 8 7 C: 0\n'
    '0 8 7\n</scratch>\n8 7\n\n'
  )
  assert (example.answer, example.meta['hint'], example.meta['digits']) == ('8 7', '0 8 7', 2)


pairs = st.integers(1, 12).flatmap(
  lambda n: st.tuples(*[st.integers(10 ** (n - 1), 10**n - 1)] * 2)
)


@hypothesis.given(pairs)
def test_every_line_holds_the_digits_and_the_carry_of_the_sum_so_far(pair):
  a, b = map(str, pair)
  first, *steps, closing, hint = addition.scratchpad(a, b)
  assert first == f'{" ".join(a)} + {" ".join(b)} , C: 0'
  assert len(steps) == len(a) - 1
  for i, line in enumerate([*steps, closing], 1):
    carry, digits = divmod(int(a[-i:]) + int(b[-i:]), 10**i)
    pair = f'{a[-i - 1]} + {b[-i - 1]} ' if i < len(a) else ''
    assert line == f'{pair}, {" ".join(str(digits).zfill(i))} C: {carry}'
  assert hint == ' '.join(str(int(a) + int(b)).zfill(len(a) + 1))


def operands(example):
  first, second = re.fullmatch(r'Input:\n(.*) \+ (.*)\nTarget:', example.problem).groups()
  return first.replace(' ', ''), second.replace(' ', '')


def test_numbers_and_their_lengths_are_uniform():
  lengths, leading, last = [], [], []
  for i in range(5000):
    first, second = operands(make().example('train', i))
    assert len(first) == len(second)
    lengths.append(len(first))
    leading += [first[0]] * (len(first) > 1)
    last += [second[-1]] * (len(second) > 1)
  for values, choices in ((lengths, range(1, 6)), (leading, '123456789'), (last, '0123456789')):
    assert set(values) == set(choices)
    assert all(abs(values.count(c) / len(values) - 1 / len(choices)) < 0.02 for c in choices)


def test_a_sum_in_another_order_is_in_the_same_split():
  task = make(max_digits=2)
  train, test = (
    {tuple(sorted(operands(task.example(split, i)))) for i in range(3000)}
    for split in ('train', 'test')
  )
  assert not train & test
  one = [{pair for pair in pairs if len(pair[0]) == 1} for pairs in (train, test)]
  assert len(one[0] | one[1]) == 45 and len(one[1]) >= 3  # 9 * 10 / 2; all of them turn up


def test_a_word_is_a_token():
  examples = [make().example('train', i) for i in range(500)]
  texts = [text for e in examples for text in (e.problem, e.solution)]
  for kind in tokenizers.MODEL_TYPES:
    tokenizer = tokenizers.SentencePiece.train(texts, make().symbols, 64, kind, False)
    for text in texts[:200]:
      ids = tokenizer.encode_user(text)
      assert len(ids) == len(re.findall(r'\n| ?[^ \n]+', text))
      assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.parametrize('changes', [dict(min_digits=0), dict(min_digits=3, max_digits=2)])
def test_bad_fields(changes):
  with pytest.raises(records.UserError, match=f'min_digits={changes["min_digits"]}'):
    make(**changes)


# --------------------------------------------------------------------------------------- reward


SUM = records.Example(
  'sums', 'train', 0, PAPER[:28], '8 8 3', PAPER[28:-2], {'checked_by': 'addition'}
)


def score(text, example=SUM):
  return REWARDS['addition']()(example, records.Completion(text, (), 0, None, Stop.LENGTH, 8))


@pytest.mark.parametrize(
  ('text', 'right', 'trace'),
  [
    (SUM.solution, 1, 1),
    (SUM.solution + '\n\nInput:\n1 + 1', 1, 1),  # nothing after the answer line counts
    (SUM.solution.replace('C: 1', 'C: 0'), 1, 0),  # right answer, wrong reasoning
    ('\n<scratch>\n</scratch>\n8 8 3', 1, 0),
    ('</scratch>\n8 8 3\n</scratch>\n8 8 4', 1, 0),  # the first closing line
    ('</scratch>\n8 8 4\n</scratch>\n8 8 3', 0, 0),
    ('8 8 3\n9', 1, 0),  # no scratchpad: the first line
    ('\n8 8 3', 0, 0),
    ('x</scratch>\n8 8 3', 0, 0),  # not a line of its own
    ('</scratch>\n0 8 8 3', 0, 0),
    ('</scratch>\n883', 0, 0),
    ('</scratch>\n8 8 3 ', 0, 0),
    ('</scratch>\n', 0, 0),
    ('</scratch>', 0, 0),
    ('', 0, 0),
  ],
)
def test_the_line_after_the_scratchpad_is_the_answer(text, right, trace):
  assert score(text) == records.Score(right, {'trace': trace}, None)


def test_what_is_kept_ends_with_the_answer_line():
  assert reward.Addition().trim(SUM.solution + '\n\nInput:') == SUM.solution
  assert reward.Addition().trim('</scratch>') is None


def test_solutions_are_right_and_other_sums_are_not():
  examples = [make().example(split, i) for i in range(1000) for split in ('train', 'test')]
  for example, other in zip(examples, examples[1:], strict=False):
    assert score(example.solution, example) == records.Score(1.0, {'trace': 1.0}, None)
    expected = float(other.answer == example.answer)
    assert score(other.solution, example).value == expected


def test_it_does_not_apply_to_other_tasks():
  for meta in ({}, {'checked_by': 'countdown'}):
    other = records.Example('addition', 'train', 0, '', '8 8 3', None, meta)
    assert score('8 8 3', other) == records.Score(None, {}, None)
