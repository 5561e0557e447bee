"""The task `countdown` and its checker: exact, strict, and never fooled, raised or slowed."""

import itertools
import re
from fractions import Fraction

import hypothesis
import pytest
from hypothesis import strategies as st

from reasonrl import records
from reasonrl.records import Stop
from reasonrl.rewards import REWARDS, countdown
from reasonrl.tasks import TASKS, splits

FIELDS = dict(
  seed=0,
  min_numbers=3,
  max_numbers=4,
  min_value=1,
  max_value=99,
  min_target=10,
  max_target=100,
  operations=('+', '-', '*', '/'),
)


def make(**changes):
  return TASKS['countdown'](**(FIELDS | changes))


def example(numbers, target, operations='+-*/'):
  meta = {'numbers': numbers, 'target': target, 'operations': operations}
  return records.Example('x', 'train', 0, '', '', None, meta | {'checked_by': 'countdown'})


def score(text, problem, stop=Stop.EOS, **changes):
  reward = REWARDS['countdown'](**(dict(after_think=True, require_stop=True) | changes))
  return reward(problem, records.Completion(text, (), 0, None, stop, 8))


def says(answer, numbers, target, operations='+-*/'):
  """(value, valid) of an answer in tags after some thought."""
  problem = example(numbers, target, operations)
  found = score(f'<think>x</think><answer>{answer}</answer>', problem)
  assert found.parts['extracted'] == 1
  return found.value, found.parts['valid']


# --------------------------------------------------------------------------------------- checker


@pytest.mark.parametrize(
  ('answer', 'numbers', 'target', 'right', 'valid'),
  [
    ('(12*2)', '12 2', 24, 1, 1),
    ('24', '12 2', 24, 0, 0),
    ('12 + 2', '12 2', 24, 0, 1),
    ('8 / (3 - 8 / 3)', '3 3 8 8', 24, 1, 1),  # 8 / (1 / 3): exact where no integer would do
    ('8*3', '3 3 8 8', 24, 0, 0),  # numbers left over
    ('3*8+3-3', '3 3 8 8', 24, 0, 0),  # a 3 too many, an 8 missing
    ('(3+3)*8-8', '3 3 8 8', 40, 1, 1),
    ('(3+3)*8-8', '3 3 8 8', 24, 0, 1),
    ('2 + 3 * 4', '2 3 4', 14, 1, 1),  # precedence
    ('2 * 3 + 4', '2 3 4', 10, 1, 1),
    ('9 - 4 - 3', '9 4 3', 2, 1, 1),  # from the left
    ('9 - (4 - 3)', '9 4 3', 8, 1, 1),
    ('16 / 4 / 2', '16 4 2', 2, 1, 1),
    ('16 / 4 * 2', '16 4 2', 8, 1, 1),
    ('7 / 3 * 3', '7 3 3', 7, 1, 1),
    ('10 / 4', '10 4', 2, 0, 1),  # not rounded
    ('5 / (3 - 3)', '5 3 3', 5, 0, 0),
    ('((((3))+((4))))', '3 4', 7, 1, 1),
    ('\n3\t+ 4 ', '3 4', 7, 1, 1),
    ('34', '3 4', 34, 0, 0),
    ('3 4', '3 4', 7, 0, 0),
    ('3 + 4 = 7', '3 4', 7, 0, 0),
    ('-3 + 4', '3 4', 1, 0, 0),  # a sign is not one of the operations
    ('3 + +4', '3 4', 7, 0, 0),
    ('3(4)', '3 4', 12, 0, 0),
    ('(3)(4)', '3 4', 12, 0, 0),
    ('2 ** 3', '2 3', 8, 0, 0),
    ('7 // 2', '7 2', 3, 0, 0),
    ('03 + 4', '3 4', 7, 0, 0),
    ('3.0 + 4', '3 4', 7, 0, 0),
    ('3_0 + 4', '30 4', 34, 0, 0),
    ('3e1 + 4', '30 4', 34, 0, 0),
    ('٣ + 4', '3 4', 7, 0, 0),
    ('3 × 4', '3 4', 12, 0, 0),
    ('3 + 4)', '3 4', 7, 0, 0),
    ('(3 + 4', '3 4', 7, 0, 0),
    ('3) + (4', '3 4', 7, 0, 0),
    ('3 + 4 +', '3 4', 7, 0, 0),
    ('3 + () 4', '3 4', 7, 0, 0),
    ('+', '3 4', 7, 0, 0),
    ('', '3 4', 7, 0, 0),
    ('__import__("os")', '3 4', 7, 0, 0),
    ('3 + 4' + ' ' * 506, '3 4', 7, 1, 1),
    ('3 ' + ' ' * 508 + '+ 4', '3 4', 7, 0, 0),  # longer than any answer may be
  ],
)
def test_answers(answer, numbers, target, right, valid):
  assert says(answer, numbers, target) == (right, valid)


def test_tokens():
  assert countdown.tokens('12*(3 - 4)') == ['12', '*', '(', '3', '-', '4', ')']
  for text in ('٣', '3\u00a0+ 4', 'x', '3 = 3', '9' * 513):
    assert countdown.tokens(text) is None


def test_only_the_operations_of_the_problem():
  assert says('3 * 4', '3 4', 12, '+*') == (1, 1)
  assert says('3 * 4', '3 4', 12, '+-') == (0, 0)


def test_where_the_answer_stands():
  problem, good = example('3 4', 7), '<answer>3 + 4</answer>'
  none = records.Score(0.0, {'extracted': 0.0, 'valid': 0.0}, None)
  assert score('7', problem) == none
  assert score(good, problem) == score(f'<think>{good}</think>', problem) == none
  assert score(good, problem, after_think=False).value == 1
  assert score('<think>3 * 4</think>\\boxed{3 + 4}', problem).value == 1
  assert score(f'<think></think>{good}', problem, Stop.LENGTH).value == 0
  assert score(f'<think></think>{good}', problem, Stop.LENGTH, require_stop=False).value == 1


def test_it_does_not_apply_to_other_tasks():
  for meta in ({}, {'checked_by': 'addition'}):
    other = records.Example('countdown', 'train', 0, '', '7', None, meta)
    assert score('<think></think><answer>7</answer>', other) == records.Score(None, {}, None)


# A tree is a number or (left, sign, right).
trees = st.recursive(
  st.integers(0, 30), lambda t: st.tuples(t, st.sampled_from('+-*/'), t), max_leaves=12
)
RANK = {'+': 1, '-': 1, '*': 2, '/': 2}


def evaluate(tree):
  if isinstance(tree, int):
    return Fraction(tree)
  left, right = evaluate(tree[0]), evaluate(tree[2])
  if left is None or right is None or (tree[1] == '/' and not right):
    return None
  return {
    '+': lambda: left + right,
    '-': lambda: left - right,
    '*': lambda: left * right,
    '/': lambda: left / right,
  }[tree[1]]()


def spell(tree, rank, draw):
  """The tree as text with no more brackets than a term of at least `rank` needs, and some more."""
  if isinstance(tree, int):
    text, needed = str(tree), False
  else:
    left, sign, right = tree
    own = RANK[sign]
    space = draw(st.sampled_from(['', ' ', '\n ']))
    text = f'{spell(left, own, draw)}{space}{sign}{space}{spell(right, own + 1, draw)}'
    needed = own < rank
  return f'({text})' if needed or draw(st.integers(0, 4)) == 0 else text


@hypothesis.given(trees, st.data())
def test_the_value_is_that_of_the_tree_however_it_is_spelt(tree, data):
  assert countdown.value(countdown.tokens(spell(tree, 1, data.draw))) == evaluate(tree)


@hypothesis.given(st.lists(st.sampled_from(['1', '2', *'+-*/()']), max_size=7))
def test_an_expression_is_what_the_grammar_derives(found):
  """The grammar by rewriting: (E) and E sign E become E until nothing changes."""
  derived, before = ''.join('E' if t.isdigit() else t for t in found), None
  while derived != before:
    before = derived
    derived = re.sub(r'E[-+*/]E', 'E', derived.replace('(E)', 'E'), count=1)
  got = countdown.value(found)
  if derived == 'E':
    assert got is not None or '/' in found  # unless by zero
  else:
    assert got is None


# ------------------------------------------------------------------------------------------ task


@pytest.mark.parametrize(
  'changes',
  [
    dict(),
    dict(min_value=1, max_value=15, max_numbers=3, max_target=60, operations=('+', '-', '*')),
    dict(min_numbers=2, max_numbers=6, max_value=20, min_target=24, max_target=40),
    dict(operations=('-',)),
  ],
)
def test_solutions_follow_the_rules_and_the_checker_accepts_them(changes):
  task, counts, targets = make(**changes), set(), set()
  for split, i in itertools.product(splits.SPLITS, range(1000)):
    found = task.example(split, i)
    numbers, target = found.meta['numbers'].split(), found.meta['target']
    shown = re.fullmatch(
      r'Using each of the numbers (.*) exactly once and the operations (.*), write an expression '
      r'that equals (\d+)\.',
      found.problem,
    )
    assert shown.groups() == (', '.join(numbers), ', '.join(task.operations), str(target))
    assert found.meta['operations'] == ''.join(task.operations)
    assert all(task.min_value <= int(number) <= task.max_value for number in numbers)
    assert task.min_target <= target <= task.max_target
    counts.add(len(numbers))
    targets.add(target)
    # Each step takes two of the terms that are left and puts back what comes out, at least 1.
    think, answer = re.fullmatch(
      r'<think>(.*)</think><answer>(.*)</answer>', found.solution, re.DOTALL
    ).groups()
    left = [int(number) for number in numbers]
    for step in think.split('\n'):
      a, sign, b, c = re.fullmatch(r'(\d+) ([-+*/]) (\d+) = ([1-9]\d*)', step).groups()
      assert evaluate((int(a), sign, int(b))) == int(c) and sign in task.operations
      left.remove(int(a))
      left.remove(int(b))
      left.append(int(c))
    assert left == [target] and answer == found.answer
    expected = records.Score(1.0, {'extracted': 1.0, 'valid': 1.0}, None)
    assert score(found.solution, found) == expected
  assert counts == set(range(task.min_numbers, task.max_numbers + 1))
  assert len(targets) > 0.8 * (task.max_target - task.min_target + 1)


def test_numbers_in_another_order_are_in_the_same_split():
  task = make(max_numbers=3, max_value=9, max_target=30)
  train, test = (
    {
      (tuple(sorted(found.meta['numbers'].split())), found.meta['target'])
      for found in (task.example(split, i) for i in range(3000))
    }
    for split in splits.SPLITS
  )
  assert len(train) > 500 and len(test) > 100
  assert not train & test


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(min_numbers=1), 'min_numbers=1'),
    (dict(max_numbers=2), 'max_numbers=2'),
    (dict(max_numbers=7), 'max_numbers=7'),
    (dict(min_value=0), 'min_value=0'),
    (dict(max_target=9), 'min_target=10, max_target=9'),
    (dict(operations=('+', '^')), '+, -, *, /'),
    (dict(operations=()), 'operations=()'),
    (dict(operations=('+',), min_value=50), 'max_target=100: none of 10000 expressions of'),
    (dict(min_numbers=2, max_value=20, min_target=24, max_target=24), 'too few'),  # of two numbers
    (dict(min_value=9, max_value=9, operations=('+',), max_numbers=3), 'too few'),
  ],
)
def test_bad_fields(changes, message):
  with pytest.raises(records.UserError, match=re.escape(message)):
    make(**changes)
