"""What is added to problems: targets, levels, labels, by hand; a function of seed and identity."""

import dataclasses

import numpy as np
import pytest

from reasonrl import augmentations, records, tables
from reasonrl.configs import common


def example(problem):
  return records.Example('sums', 'train', 7, problem, '12', None, {})


def augmentation(name, **changes):
  section = common.augmentations(name)[name]
  section.update(changes)
  return tables.build(augmentations.AUGMENTATIONS[name], section)


def numbered(index, task='sums', split='train'):
  return dataclasses.replace(example('7 + 5?'), task=task, split=split, index=index)


def test_length_targets_by_hand():
  fields = {'min_tokens': 10, 'max_tokens': 12}
  for share, mode, text in ((0.0, 'exact', 'Think for'), (1.0, 'max', 'Think for maximum')):
    ask = augmentation('length_target', share_max=share, **fields)
    asked = [ask(3, numbered(i)) for i in range(200)]
    assert {e.meta['target_length'] for e in asked} == {10, 11, 12}
    for e in asked:
      assert e.problem == f'7 + 5? {text} {e.meta["target_length"]} tokens.'
      assert records.length_target(e) == (mode, e.meta['target_length'])
  every_other = augmentation('length_target', min_tokens=6, max_tokens=11, step=2)
  assert {every_other(3, numbered(i)).meta['target_length'] for i in range(99)} == {6, 8, 10}
  fixed = augmentation('length_target', min_tokens=9, max_tokens=9, template_exact=' {n}, {n}!')
  assert fixed(0, numbered(0)).problem == '7 + 5? 9, 9!'
  mixed = augmentation('length_target', share_max=0.5)
  asked = [records.length_target(mixed(3, numbered(i))) for i in range(2000)]
  assert 900 < sum(mode == 'max' for mode, _ in asked) < 1100
  assert min(n for _, n in asked) < 120 and max(n for _, n in asked) > 3980
  assert 1950 < np.mean([n for _, n in asked]) < 2150  # of 100 to 4000: 2050, se 25


def collected(solution, ids, think):
  meta = {records.TOKEN_IDS: list(range(ids)), records.THINK_LENGTH: think}
  return dataclasses.replace(numbered(0), solution=solution, meta=meta)


def test_labels_say_how_long_the_sampled_solution_is():
  three = collected('<think>a\n\nb\n\nc</think><answer>\n\n</answer>', ids=12, think=9)
  for unit, exact, rounded in (('tokens', 12, 16), ('think_tokens', 9, 16), ('steps', 3, 4)):
    for power_of_two, n in ((False, exact), (True, rounded)):
      label = augmentation('length_label', unit=unit, power_of_two=power_of_two)
      labelled = label(3, three)
      assert labelled.problem == f'7 + 5?\n\nThink for up to {n} tokens.'
      assert labelled.meta == three.meta and labelled.solution == three.solution
  label = augmentation('length_label')
  powers = [label(3, collected('', 9, n)).problem.split()[-2] for n in (0, 1, 2, 3, 4, 5, 8, 9)]
  assert powers == ['1', '1', '2', '4', '4', '8', '8', '16']
  with pytest.raises(records.UserError, match='sums/train/0 was not collected by a phase'):
    label(3, numbered(0))
  asked = augmentation('length_target')(3, three)
  with pytest.raises(records.UserError, match='sums/train/0 was collected under a length target'):
    label(3, asked)


def test_what_was_collected_is_labelled_and_not_augmented_again():
  ask, label = augmentation('length_target'), augmentation('length_label')
  end = augmentation('suffix', text=' Go.')
  asked = augmentations.augment((ask, end), 3, numbered(0))
  assert asked == end(3, ask(3, numbered(0))) and asked.problem.endswith(' tokens. Go.')
  row = collected('x', 9, 5)
  assert augmentations.augment((ask, label, end), 3, row) == label(3, row)
  assert augmentations.augment((), 3, row) == row


def test_what_a_tokenizer_is_trained_on():
  """Every digit that a label may have is in it."""
  label, end = augmentation('length_label', power_of_two=False), augmentation('suffix', text=' Go.')
  text = augmentations.imagined((label, end), 3, numbered(12)).problem
  assert text == '7 + 5?\n\nThink for up to 13 tokens. Go.'
  texts = [augmentations.imagined((label,), 3, numbered(i)).problem for i in range(100)]
  assert set('0123456789') <= set(''.join(texts))
  powers = (augmentation('length_label'),)
  powers = [augmentations.imagined(powers, 3, numbered(i)) for i in range(20)]
  found = {int(each.problem.split()[-2]) for each in powers}
  assert found == {1 << n for n in range(16)}


def test_the_most_that_is_asked_for():
  ask = augmentation('length_target', max_tokens=400)
  assert augmentations.longest((augmentation('suffix', text='x'), ask)) == 400
  assert augmentations.longest((augmentation('effort'),)) == 3600
  assert augmentations.longest((augmentation('length_label'),)) == 0 == augmentations.longest(())


def test_a_level_of_effort_by_hand():
  e = augmentation('effort', level='high')(3, numbered(0))
  assert e.problem == '7 + 5? Reasoning effort: high.'
  assert e.meta == {'target_length': 3600, 'length_mode': 'max', 'effort': 'high'}
  named = augmentation('effort', level='low', template=' At most {n} ({level}).')
  assert named(3, numbered(0)).problem == '7 + 5? At most 512 (low).'
  drawn = augmentation('effort', mode='exact')
  efforts = [drawn(3, numbered(i)) for i in range(300)]
  for level, tokens in (('low', 512), ('medium', 1024), ('high', 3600)):
    found = [e for e in efforts if e.meta['effort'] == level]
    assert 70 < len(found) < 130
    assert {records.length_target(e) for e in found} == {('exact', tokens)}


@pytest.mark.parametrize('name', ['length_target', 'effort'])
def test_what_is_asked_depends_on_seed_and_identity_alone(name):
  ask = augmentation(name)
  first = ask(3, numbered(0))
  assert ask(3, dataclasses.replace(numbered(0), answer='13', meta={})) == dataclasses.replace(
    first, answer='13'
  )
  kept = ask(3, dataclasses.replace(numbered(0), meta={'level': 1}))
  assert kept.meta == {'level': 1, **first.meta}
  others = [[ask(3, numbered(i)) for i in range(40)], [ask(4, numbered(i)) for i in range(40)]]
  others.append([ask(3, numbered(i, task='words')) for i in range(40)])
  others.append([ask(3, numbered(i, split='test')) for i in range(40)])
  targets = [[e.meta['target_length'] for e in group] for group in others]
  assert len(set(map(tuple, targets))) == 4 and all(len(set(t)) > 1 for t in targets)
  with pytest.raises(records.UserError, match='sums/train/0 has a length target already'):
    ask(3, first)


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('length_target', {'min_tokens': 0}, 'min_tokens=0, max_tokens=4000: 1 <= min_tokens'),
    ('length_target', {'max_tokens': 9}, 'min_tokens=100, max_tokens=9'),
    ('length_target', {'step': 0}, 'length_target.step=0 must be at least 1'),
    ('length_target', {'share_max': 1.5}, r'share_max=1.5 must be in \[0, 1\]'),
    ('length_target', {'template_max': 'Be brief.'}, "template_max='Be brief.' has no {n}"),
    ('effort', {'level': 'huge'}, "level='huge' is not '' or one of high, low, medium"),
    ('effort', {'mode': 'least'}, "mode='least' is not one of exact, max"),
    ('effort', {'template': 'Try.'}, "template='Try.' has no {level} or {n}"),
    ('effort', {'levels': {'low': 0}}, "effort.levels=.*'low': 0.*at least 1 token"),
    ('length_label', {'unit': 'words'}, "unit='words' is not one of tokens, think_tokens, steps"),
    ('length_label', {'separator': ''}, "separator='' separates nothing"),
    ('length_label', {'template': 'Think.'}, "template='Think.' has no {n}"),
    ('suffix', {}, "suffix.text='' adds nothing"),
  ],
)
def test_bad_augmentations(name, changes, message):
  with pytest.raises(records.UserError, match=message):
    augmentation(name, **changes)
