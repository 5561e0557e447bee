"""Sweeps of thinking budgets: their settings and their numbers by hand, and through the program."""

import dataclasses
import math

import numpy as np
import pytest

from reasonrl import augmentations, budgets, records, tables
from reasonrl.configs import common
from reasonrl.envs import ENVS

EOS, LENGTH = records.Stop.EOS, records.Stop.LENGTH


def environment(**changes):
  return dataclasses.replace(tables.member(ENVS, common.evaluation().env, 'env'), **changes)


def method(name, **changes):
  section = common.budgets(name)[name]
  section.update(changes)
  return tables.build(budgets.BUDGETS[name], section)


def outcomes(right, think, response=None, stop=EOS, group=None):
  think = np.asarray(think, float)
  response = think + 3 if response is None else np.asarray(response, float)
  return {
    'group': np.arange(think.size) if group is None else np.asarray(group),
    'right': np.asarray(right, float),
    'think_length': think,
    'completion_length': response,
    'stop': np.full(think.size, int(stop)),
  }


def budget(env):
  return env.controls['think_budget']


# ------------------------------------------------------------------------------------ settings


STRINGS = common.controls('think_budget').think_budget.to_dict()


def test_budget_forcing_is_a_control_with_one_number_changed():
  env, ask = environment(), augmentations.Suffix(' Think.')
  found = method('max_think', numbers=(4, 8)).settings(env, (ask,))
  assert [(s.name, s.most, s.added) for s in found] == [('4', 4, (ask,)), ('8', 8, (ask,))]
  assert [budget(s.env)['max_think'] for s in found] == [4, 8]
  assert all({**budget(s.env), 'max_think': 0} == STRINGS for s in found)
  assert all((s.env.temperature, s.env.num_generations) == (0.0, 1) for s in found)
  assert all(s.judged == 'think_length' and math.isnan(s.target) for s in found)
  assert env.controls == {}  # of the plain evaluation
  several = environment(num_generations=16)
  for temperature, samples in ((0.0, 1), (0.6, 16)):  # greedy ones would all be the same
    (s,) = method('max_think', numbers=(4,), temperature=temperature).settings(several, ())
    assert s.env.num_generations == samples
  forcing = environment(controls={'force': {'text': 'a', 'forced': 1}})
  (s,) = method('max_think', numbers=(9,), ignores=3).settings(forcing, ())
  assert s.env.controls['force'] == {'text': 'a', 'forced': 1}
  assert (s.most, budget(s.env)['ignores']) == (9, 3)
  found = method('ignores', numbers=(0, 2), temperature=0.6).settings(env, ())
  assert [budget(s.env)['ignores'] for s in found] == [0, 2]
  assert [s.most for s in found] == [math.inf] * 2 and found[0].env.temperature == 0.6
  found = method('ignores', numbers=(0, 2), max_think=9).settings(env, ())
  assert [(s.most, budget(s.env)['max_think']) for s in found] == [(9, 9)] * 2
  for method_ in ('max_think', 'target_forced'):
    odd = method(method_, think_budget={**STRINGS, 'end': '</thought>'})
    with pytest.raises(records.UserError, match="end='</thought>', but thinking is measured"):
      odd.settings(env, ())


def test_what_is_asked_takes_the_place_of_a_target():
  section = common.augmentations('length_target')
  cls = augmentations.AUGMENTATIONS['length_target']
  target, ask = tables.build(cls, section.length_target), augmentations.Suffix(' Think.')
  env = environment(num_generations=16)
  found = method('target', numbers=(16,), temperature=0.6, template='={n}').settings(
    env, (target, ask)
  )
  (s,) = found
  assert s.added == (ask, augmentations.Suffix('=16')) and (s.most, s.target) == (16, 16)
  assert s.env == dataclasses.replace(env, temperature=0.6) and s.judged == 'think_length'
  (s,) = method('at_most', numbers=(16,)).settings(env, ())
  assert s.judged == 'completion_length' and s.target == 16
  (s,) = method('steps_forced', numbers=(3,)).settings(env, ())
  assert s.added == (augmentations.Suffix('\n\nThink for up to 3 steps.'),)
  assert (s.most, budget(s.env)['max_think']) == (300, 300) and math.isnan(s.target)
  short, default, long = method('class').settings(env, (target, ask))
  assert default.added == (ask,) and [s.added[0] for s in (short, long)] == [ask, ask]
  assert short.added[1].text.startswith(' Answer after a short amount of thinking. Do not')
  assert long.added[1].text.startswith(' Answer after a long amount of thinking. If you feel')


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('max_think', {'numbers': ()}, r'numbers=\(\) must be one or more, from 1 up'),
    ('max_think', {'numbers': (0,)}, r'numbers=\(0,\) must be one or more, from 1 up'),
    ('ignores', {'numbers': (-1,)}, 'must be one or more, from 0 up'),
    ('target', {'template': 'Think.'}, "template='Think.' has no {n}"),
    ('target', {'counts': 'words'}, "counts='words' is not one of thinking, response, steps"),
    ('steps', {'unit_tokens': 0}, 'unit_tokens=0 must be at least 1'),
    (
      'at_most',
      {'forced': True},
      "forced=True is for thinking or steps, not for counts='response'",
    ),
    ('rejection', {'temperature': 0.0}, 'temperature=0.0 must be above 0'),
    ('rejection', {'retries': -1}, 'retries=-1 at least 0'),
  ],
)
def test_bad_methods(name, changes, message):
  with pytest.raises(records.UserError, match=message):
    method(name, **changes)


# ------------------------------------------------------------------------------------ measuring


def test_a_sweep_by_hand():
  """Thinking 1000, 2000, 4000 with .3, .4, .45 right: slopes 1e-4, 5e-5, 2.5e-5 (methods text)."""
  said = {'1500': (1000, 60), '2000': (2000, 80), '3000': (4000, 90)}

  def roll(setting, problems, attempt):
    think, right = said[str(budget(setting.env)['max_think'])]
    assert problems.size == 200 and attempt == 0
    return outcomes(np.arange(200) < right, np.full(200, think))

  found = budgets.sweep(
    method('max_think', numbers=(1500, 2000, 3000)), environment(), (), 200, roll
  )
  assert found['1500/accuracy'] == 0.3 and found['3000/think_length'] == 4000
  assert found['control'] == pytest.approx(2 / 3)
  assert found['scaling'] == pytest.approx(5.8333333)  # points per 1,000 tokens
  assert found['performance'] == 0.45
  assert [found[f'{n}/within'] for n in said] == [1.0, 1.0, 0.0]
  assert found['1500/accuracy_low'] < 0.3 < found['1500/accuracy_high']
  assert '1500/mean_error' not in found and '1500/failed' not in found


@pytest.mark.parametrize('counts', ['response', 'thinking'])
def test_lengths_against_what_was_asked(counts):
  """90 and 110 tokens of 100: 0 off in the mean, 10 % each; 109 and 131 of 120 likewise."""

  def roll(setting, problems, attempt):
    mean = int(setting.added[-1].text[1:])
    off = 10 if mean == 100 else 11
    lengths, other = [mean - off, mean + off], [5, 999]
    think, response = (other, lengths) if counts == 'response' else (lengths, other)
    return outcomes([1, 0], think, response, stop=LENGTH)

  asked = method('target', numbers=(100, 120), template='={n}', counts=counts)
  found = budgets.sweep(asked, environment(), (), 2, roll)
  assert found['100/mean_error'] == 0 and found['100/mean_abs_error'] == pytest.approx(0.1)
  assert found['100/rms_error'] == pytest.approx(0.1)
  assert (found['100/within_10'], found['120/within_10']) == (1.0, 1.0)
  assert found['100/within'] == found['100/over'] == 0.5 and found['100/truncated'] == 1.0
  assert found['control'] == 1.0  # the means are what was asked
  assert '8/mean_error' not in budgets.sweep(
    method('steps', numbers=(8,)), environment(), (), 2, lambda *_: outcomes([1, 0], [5, 7])
  )


def test_class_conditional_control_counts_two_orders():
  lengths = {1.0: (5, 9, 12), 0.5: (5, 9, 8), 0.0: (5, 4, 3)}
  for want, thought in lengths.items():
    says = iter(thought)
    roll = lambda setting, problems, attempt, says=says: outcomes([1, 0], [next(says)] * 2)
    assert budgets.sweep(method('class'), environment(), (), 2, roll)['control'] == want


def test_rejection_samples_what_is_too_long_again():
  """Problem 0 is short at once, 1 on the second try and 2 never: right, right, right but late."""
  asked = []

  def roll(setting, problems, attempt):
    asked.append((problems.tolist(), attempt))
    assert (setting.env.temperature, setting.env.num_generations) == (1.0, 1)
    think = {0: [4], 1: [9, 3], 2: [9, 8, 7]}
    found = outcomes(np.ones(problems.size), [think[p][attempt] for p in problems], group=problems)
    return found | ({} if attempt else {'reward/lcpo/exact/right': np.ones(3)})  # not every time

  found = budgets.sweep(method('rejection', numbers=(4,), retries=2), environment(), (), 3, roll)
  assert asked == [([0, 1, 2], 0), ([1, 2], 1), ([2], 2)]
  assert found['4/accuracy'] == pytest.approx(2 / 3) and found['4/failed'] == pytest.approx(1 / 3)
  assert found['4/think_length'] == pytest.approx((4 + 3 + 7) / 3)
  asked.clear()
  budgets.sweep(method('rejection', numbers=(9,), retries=2), environment(), (), 3, roll)
  assert asked == [([0, 1, 2], 0)]


def test_several_samples_of_a_problem():
  roll = lambda *_: outcomes([1, 0, 1, 1], [4, 4, 4, 4], group=[0, 0, 1, 1])
  found = budgets.sweep(method('max_think', numbers=(4,)), environment(), (), 2, roll)
  assert found['4/accuracy'] == 0.75 and math.isnan(found['scaling'])
