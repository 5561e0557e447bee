"""The task `mixture`: exact proportions at random access, and the right reward for every member."""

import collections
import math
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from reasonrl import checks, records, rewarding, tables
from reasonrl.configs import common
from reasonrl.rewards import REWARDS
from reasonrl.tasks import TASKS, mixture


def make(**weights):
  """A schedule without tasks."""
  return mixture.Mixture({name: (weight, None) for name, weight in weights.items()})


def build(section):
  return tables.make_task(TASKS, section, 'task', None)


THREE = common.mixture(
  sums=(2, common.arithmetic()), pads=(1, common.addition()), games=(1, common.countdown())
)


# -------------------------------------------------------------------------------------- schedule


def test_a_schedule_by_hand():
  task = make(c=0.25, a=0.5, b=0.25)
  # Of n examples a has floor(n / 2); b has floor(n' / 2) of the n' that are left, c the rest.
  owners = [('c', 0), ('a', 0), ('b', 0), ('a', 1), ('c', 1), ('a', 2), ('b', 1), ('a', 3)]
  assert [task.place(i) for i in range(8)] == owners
  assert task.place(4_000_000_003) == ('a', 2_000_000_001)
  assert make(only=7).place(5) == ('only', 5)


def test_weights_are_the_decimals_that_were_written():
  task, later = make(a=0.1, b=0.2, c=0.7), 10**20  # far enough for the error of a float
  assert collections.Counter(task.place(i)[0] for i in range(10)) == {'a': 1, 'b': 2, 'c': 7}
  for i in range(10):
    name, own = task.place(i)
    assert task.place(later + i) == (name, own + {'a': 1, 'b': 2, 'c': 7}[name] * later // 10)


weights = st.lists(st.integers(1, 50) | st.floats(1e-3, 1e3), min_size=1, max_size=6)


@hypothesis.given(weights, st.integers(0, 2**31))
def test_proportions_are_exact_and_nobody_skips_an_example(found, start):
  names = [f'm{i}' for i in range(len(found))]
  task = make(**dict(zip(names, found, strict=True)))
  total = sum(Fraction(str(weight)) for weight in found)
  at = collections.defaultdict(list)
  for i in range(start, start + 200):
    name, own = task.place(i)
    at[name].append((i, own))
  for name, weight in zip(names, found, strict=True):
    share = Fraction(str(weight)) / total
    for (_, before), (_, own) in zip(at[name], at[name][1:], strict=False):
      assert own == before + 1
    for i, own in at[name]:  # `own` of the member's examples are among the first i
      assert abs(own - i * share) < len(found)


@pytest.mark.parametrize('weight', [0, -1.0, math.nan, math.inf])
def test_bad_weights(weight):
  with pytest.raises(records.UserError, match=f'members.b.weight={weight} is not a positive'):
    make(a=1, b=weight)
  with pytest.raises(records.UserError, match='at least one task'):
    make()


# ----------------------------------------------------------------------------------------- task


def test_an_example_is_the_members_own_under_the_index_of_the_mixture():
  task = build(THREE)
  members = {name: build(entry.task) for name, entry in THREE.members.items()}
  seen = collections.Counter()
  for i in range(200):
    found = task.example('test', i)
    own = members[found.task].example('test', seen[found.task])
    assert (found.split, found.index) == ('test', i)
    for field in ('problem', 'answer', 'solution', 'meta'):
      assert getattr(found, field) == getattr(own, field)
    seen[found.task] += 1
  assert seen == {'sums': 100, 'pads': 50, 'games': 50}


def test_symbols_are_those_of_all_members_once():
  task = build(THREE)
  assert set(task.symbols) == {*records.TAGS, *build(common.addition()).symbols}
  assert len(set(task.symbols)) == len(task.symbols)


def test_a_mixture_may_be_a_member():
  task = build(common.mixture(outer=(1, THREE), sums=(1, common.arithmetic())))
  for i in range(20):
    name, own = task.place(i)
    found, inner = task.example('train', i), build(THREE).example('train', own)
    assert (found.task, found.index) == (name, i)
    assert name != 'outer' or found.problem == inner.problem


def test_errors_name_the_member():
  section = common.mixture(sums=(1, common.arithmetic()))
  section.members.sums.task.name = 'sums'
  with pytest.raises(records.UserError, match="task.members.sums.task.name='sums' is not one of"):
    build(section)
  section.members.sums.task.name = 'countdown'
  with pytest.raises(records.UserError, match='Countdown takes .* unknown or missing'):
    build(section)
  section = common.arithmetic()
  section.members = {}
  with pytest.raises(records.UserError, match='unknown or missing: members'):
    build(section)


# --------------------------------------------------------------------------------------- rewards


def test_a_member_without_its_reward_is_refused():
  rewards = dict.fromkeys(('accuracy', 'addition', 'countdown'))
  checks.rewards(build(THREE), rewards)
  del rewards['countdown']
  with pytest.raises(records.UserError, match='accuracy, addition: .* games need .* countdown'):
    checks.rewards(build(THREE), rewards)


def test_every_member_gets_its_own_reward_and_no_other():
  task = build(THREE)
  sections = common.rewards(accuracy=1.0, addition=1.0, countdown=1.0)
  rewards = {
    name: (tables.build(REWARDS[name], fields, 'weight'), fields.weight)
    for name, fields in sections.items()
  }
  examples = [task.example('train', i) for i in range(24)]
  solved = [e.solution for e in examples]
  missed = [examples[i - 4].solution for i in range(24)]  # the same member's, of another problem
  assert all(e.task == examples[i - 4].task for i, e in enumerate(examples))
  completions = [
    records.Completion(text, (), 0, records.think_span(text), records.Stop.EOS, 8)
    for text in solved + missed
  ]
  with rewarding.Pool(1, 5.0) as pool:
    scores = pool.score(rewards, examples * 2, completions, list(range(48)))
  assert scores.errors == scores.timeouts == 0
  np.testing.assert_array_equal(scores.value, [1.0] * 24 + [0.0] * 24)
  for reward, member in {'accuracy': 'sums', 'addition': 'pads', 'countdown': 'games'}.items():
    applies = ~np.isnan(scores.parts[reward])
    np.testing.assert_array_equal(applies, [e.task == member for e in examples * 2])
    np.testing.assert_array_equal(scores.parts[reward][applies], scores.value[applies])
