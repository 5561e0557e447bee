"""Tasks: reproducible at random access, train and test disjoint, and right."""

import json
import os
import pickle
import re
import subprocess
import sys
import time

import pytest

from reasonrl import records
from reasonrl.rewards import answer
from reasonrl.tasks import TASKS, arithmetic, reasoning_gym, splits

SHELL = dict(
  seed=0,
  num_objects=5,
  num_swaps=4,
  strides=(0, 4, 2, 1),
  stride_weights=(0.5, 0.1, 0.1, 0.3),
  error_probability=0.03,
  direct_known_probability=0.2,
  direct_filler_probability=0.2,
  trace_filler_probability=0.05,
  wait_probability=0.0,
)
SUMS = dict(
  seed=0,
  min_terms=2,
  max_terms=3,
  min_value=0,
  max_value=19,
  forms=('digits', 'words'),
  operations=('+', '-'),
)
COUNTDOWN = dict(
  seed=0,
  min_numbers=3,
  max_numbers=4,
  min_value=1,
  max_value=9,
  min_target=10,
  max_target=40,
  operations=('+', '-', '*', '/'),
)
FIELDS = {
  'shuffled_objects': SHELL,
  'arithmetic': SUMS,
  'addition': dict(seed=0, min_digits=1, max_digits=3, hint='none'),
  'countdown': COUNTDOWN,
  'varchain': dict(
    **dict(seed=0, form='question', modulus=5, min_hops=1, max_hops=3, segments=2, min_words=2),
    **dict(max_words=4, num_words=8, thought_probability=0.4, error_probability=0.05),
    **dict(thought_at_answer_probability=0.5, thought_kinds=(0.4, 0.3, 0.3)),
  ),
  'reasoning_gym': dict(seed=0, dataset='chain_sum', dataset_config={'max_digits': 2}),
}
# One row of a file, with a number that makes it another one.
ROWS = {
  'jsonl': lambda n: {'problem': f'What is {n} + 0?', 'answer': str(n), 'meta': {'level': 1}},
  'gsm8k': lambda n: {'question': f'Ann has {n} nuts?', 'answer': f'She has {n}.\n#### {n}'},
  'commonsenseqa': lambda n: {
    'answerKey': 'ABCDE'[n % 5],
    'question': {
      'stem': f'Where are nuts, question {n}?',
      'choices': [{'label': label, 'text': f'place {label}'} for label in 'ABCDE'],
    },
  },
}
MIXED = ('arithmetic', 'countdown', 'shuffled_objects')


def make(name, **changes):
  if name == 'reasoning_gym':
    pytest.importorskip('reasoning_gym', reason='the extra `gym` is not installed')
  if name == 'mixture':  # `changes` are its members'
    return TASKS[name]({member: (1.0, make(member, **changes)) for member in MIXED})
  if name == 'subset':
    return TASKS[name](make('arithmetic', **changes), 700)
  return TASKS[name](**(FIELDS[name] | changes))


@pytest.fixture(scope='module', autouse=True)
def row_files(tmp_path_factory):
  """The files of ROWS, 600 and 100 rows."""
  folder = tmp_path_factory.mktemp('rows')
  for name, row in ROWS.items():
    FIELDS[name] = {'seed': 0}
    for split, numbers in (('train', range(600)), ('test', range(600, 700))):
      path = folder / f'{name}-{split}.jsonl'
      path.write_text(''.join(json.dumps(row(n)) + '\n' for n in numbers))
      FIELDS[name][split] = str(path)


# `collected` has no test split, and its rows are those of a run: see test_collecting.py. `text` has
# no problems: see test_texts.py.
@pytest.mark.parametrize('name', [name for name in TASKS if name not in ('collected', 'text')])
class TestEveryTask:
  def test_an_example_is_a_function_of_fields_split_and_index(self, name):
    task = make(name)
    forwards = [task.example('train', i) for i in range(20)]
    copy = pickle.loads(pickle.dumps(task))
    assert [copy.example('train', i) for i in reversed(range(20))] == forwards[::-1]
    assert len({e.problem for e in forwards}) > 15
    other = make(name, seed=1)
    assert [other.example('train', i).problem for i in range(20)] != [e.problem for e in forwards]
    last = task.example('test', 2**31 - 1)
    own = {'mixture': MIXED, 'subset': ('arithmetic',)}
    assert last.task in own.get(name, (name,))
    assert last.split == 'test'
    assert last.index < 100 if name in ROWS else last.index == 2**31 - 1

  def test_no_problem_is_in_both_splits_whatever_the_seed(self, name):
    """The spaces are so small that splits by index would share hundreds of problems."""
    task, other = make(name), make(name, seed=7)
    train = {task.example('train', i).problem for i in range(1500)}
    test = {other.example('test', i).problem for i in range(500)}
    assert len(train) > 500 and len(test) > 50
    assert not train & test

  def test_the_gold_answer_has_a_normal_form_and_the_meta_is_plain(self, name):
    for example in (make(name).example('test', i) for i in range(50)):
      assert answer.normalise(example.answer) is not None
      assert all(isinstance(value, int | str) for value in example.meta.values())

  def test_unknown_splits_and_negative_indices_are_refused(self, name):
    with pytest.raises(records.UserError, match="'dev'; choices: train, test"):
      make(name).example('dev', 0)
    with pytest.raises(records.UserError, match='-1'):
      make(name).example('train', -1)


@pytest.mark.parametrize('name', ['shuffled_objects', 'arithmetic', 'addition', 'varchain', *ROWS])
def test_five_thousand_examples_per_second(name):
  task = make(name)
  start = time.process_time()
  for i in range(1000):
    task.example('train', i)
  assert time.process_time() - start < 0.2  # measured: 0.02


def test_a_subset_repeats_its_first_training_examples():
  task, inner = TASKS['subset'](make('addition'), 3), make('addition')
  assert [task.example('train', i) for i in range(7)] == [
    inner.example('train', i) for i in (0, 1, 2, 0, 1, 2, 0)
  ]
  assert task.example('test', 7) == inner.example('test', 7)
  assert task.symbols == inner.symbols
  example = inner.example('train', 0)
  assert task.worked(example, 2) == inner.worked(example, 2)
  assert TASKS['subset'](make('arithmetic'), 3).worked is None
  with pytest.raises(records.UserError, match='size=0 of a subset must be at least 1'):
    TASKS['subset'](inner, 0)


def test_one_problem_in_eight_is_for_the_test():
  share = sum(splits.split_of(str(i)) == 'test' for i in range(8000)) / 8000
  assert abs(share - 1 / 8) < 0.02


def test_the_streams_do_not_change_between_versions():
  """Every published number rests on these problems: never edit the expected values."""
  tasks = [make(name) for name in ('shuffled_objects', 'arithmetic', 'addition', 'countdown')]
  examples = [task.example(split, 2) for task in tasks for split in splits.SPLITS]
  assert [(e.problem, e.solution) for e in examples] == GOLDEN


GOLDEN = [
  ('3(04)(02)(01)(02)?', '<think>33</think><answer>3</answer>'),
  ('1(01)(24)(01)(14)?', '<think>00.13</think><answer>3</answer>'),
  ('What is 7 + 2 - 1?', '<think>7 + 2 = 9, 9 - 1 = 8</think><answer>8</answer>'),
  ('What is 13 - 0?', '<think>13 - 0 = 13</think><answer>13</answer>'),
  (
    'Input:\n1 3 1 + 3 1 6\nTarget:',
    '\n<scratch>\n1 3 1 + 3 1 6 , C: 0\n3 + 1 , 7 C: 0\n1 + 3 , 4 7 C: 0\n, 4 4 7 C: 0\n'
    '0 4 4 7\n</scratch>\n4 4 7',
  ),
  (
    'Input:\n8 6 + 2 5\nTarget:',
    '\n<scratch>\n8 6 + 2 5 , C: 0\n8 + 2 , 1 C: 1\n, 1 1 C: 1\n1 1 1\n</scratch>\n1 1 1',
  ),
  (
    'Using each of the numbers 4, 9, 5, 4 exactly once and the operations +, -, *, /, write an '
    'expression that equals 30.',
    '<think>4 * 4 = 16\n5 + 16 = 21\n21 + 9 = 30</think><answer>(5 + (4 * 4)) + 9</answer>',
  ),
  (
    'Using each of the numbers 5, 9, 7, 8 exactly once and the operations +, -, *, /, write an '
    'expression that equals 19.',
    '<think>9 + 8 = 17\n7 + 17 = 24\n24 - 5 = 19</think><answer>(7 + (9 + 8)) - 5</answer>',
  ),
]


# ------------------------------------------------------------------------------------- shuffled


def follow(problem):
  """The ball's cup after each swap, from the text alone."""
  cup, cups = problem[0], []
  for a, b in re.findall(r'\((\d)(\d)\)', problem):
    cup = {a: b, b: a}.get(cup, cup)
    cups.append(cup)
  return cups


def span(example):
  return re.fullmatch(r'<think>(.*)</think><answer>(.)</answer>', example.solution).groups()


def test_follow_on_a_problem_worked_by_hand():
  assert follow('3(01)(24)(13)(14)?') == ['3', '3', '1', '4']


def test_a_clean_solution_lists_the_cup_after_every_stride_swaps():
  clean = dict(error_probability=0.0, direct_known_probability=1.0)
  clean |= dict(direct_filler_probability=0.0, trace_filler_probability=0.0)
  task = make('shuffled_objects', **clean)
  seen = set()
  for i in range(200):
    example = task.example('train', i)
    cups, stride = follow(example.problem), example.meta['stride']
    think, said = span(example)
    assert list(think) == (cups[stride - 1 :: stride] if stride else [])
    assert said == example.answer == cups[-1]
    assert example.meta['num_swaps'] == len(cups) == 4
    seen.add(stride)
  assert seen == {0, 1, 2, 4}


def test_a_slip_spoils_the_rest_of_the_trace():
  task = make(
    'shuffled_objects',
    strides=(1,),
    stride_weights=(1.0,),
    error_probability=0.5,
    trace_filler_probability=0.0,
    wait_probability=0.0,
  )
  follows, truth, number = 0, 0, 0
  for i in range(1000):
    example = task.example('train', i)
    think, said = span(example)
    assert said == think[-1]
    before = example.problem[0]
    for (a, b), cup in zip(re.findall(r'\((\d)(\d)\)', example.problem), think, strict=True):
      follows += cup == {a: b, b: a}.get(before, before)
      before, number = cup, number + 1
    truth += said == example.answer
  # A step follows from the one that was listed before it unless it slipped to another cup.
  assert abs(follows / number - (0.5 + 0.5 / 5)) < 0.03
  # The ball's own path is left for good: p -> .6 p + .1 (1 - p) four times from 1 gives .25.
  assert abs(truth / 1000 - 0.25) < 0.05


def test_the_mixture_has_the_stated_frequencies():
  task = make('shuffled_objects', direct_filler_probability=0.5)
  examples = [task.example('train', i) for i in range(4000)]
  strides = [e.meta['stride'] for e in examples]
  for stride, weight in zip(SHELL['strides'], SHELL['stride_weights'], strict=True):
    assert abs(strides.count(stride) / 4000 - weight) < 0.03
  direct = [e for e in examples if not e.meta['stride']]
  # A guess is right one time in five: .2 + .8 / 5.
  assert abs(sum(span(e)[1] == e.answer for e in direct) / len(direct) - 0.36) < 0.04
  # Fillers are geometric: p / (1 - p) of them on average.
  assert abs(sum(len(span(e)[0]) for e in direct) / len(direct) - 1.0) < 0.1
  assert all(set(span(e)[0]) <= set('.') for e in direct)
  steps = [e for e in examples if e.meta['stride'] == 1]
  assert abs(sum(span(e)[0].count('.') for e in steps) / len(steps) - 4 * 0.05 / 0.95) < 0.1


def test_passes_start_over_at_the_next_stride():
  clean = dict(error_probability=0.0, direct_filler_probability=0.0, trace_filler_probability=0.0)
  task = make('shuffled_objects', **clean, wait_probability=0.5)
  passes = {stride: [] for stride in SHELL['strides']}
  for i in range(2000):
    example = task.example('train', i)
    cups, stride = follow(example.problem), example.meta['stride']
    think, said = span(example)
    if stride:
      strides = [s for s in (4, 2, 1) if s <= stride]
      parts = think.split('Wait')
      assert parts == [''.join(cups[s - 1 :: s]) for s in strides[: len(parts)]]
      assert said == example.answer
    passes[stride].append(think.count('Wait'))
  assert set(passes[0]) == set(passes[1]) == {0}  # it did not think, or has no finer stride
  assert abs(passes[2].count(1) / len(passes[2]) - 0.5) < 0.12
  for n, share in ((0, 0.5), (1, 0.25), (2, 0.25)):
    assert abs(passes[4].count(n) / len(passes[4]) - share) < 0.12
  assert 'Wait' in task.symbols and 'Wait' not in make('shuffled_objects').symbols


def test_every_swap_and_the_filler_are_symbols():
  task = make('shuffled_objects')
  assert task.symbols[:4] == records.TAGS
  swaps = [f'({a}{b})' for a in range(5) for b in range(a + 1, 5)]
  assert task.symbols[4:] == (*swaps, '.')
  used = {s for i in range(200) for s in re.findall(r'\(..\)', task.example('train', i).problem)}
  assert used == set(swaps)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(num_objects=11), 'num_objects=11'),
    (dict(num_swaps=0), 'num_swaps=0'),
    (dict(strides=(0, 3, 2, 1)), '3 does not divide num_swaps=4'),
    (dict(stride_weights=(0.5, 0.5)), 'stride_weights'),
    (dict(stride_weights=(0.5, 0.1, 0.1, 0.1)), 'sum 1'),
    (dict(strides=(), stride_weights=()), 'stride_weights'),
    (dict(error_probability=1.5), 'error_probability=1.5'),
    (dict(trace_filler_probability=1.0), 'trace_filler_probability=1.0'),
    (dict(wait_probability=2.0), 'wait_probability=2.0'),
    (dict(wait_probability=0.5, strides=(4, 0, 2, 1)), '0 can only be the first'),
    (dict(num_objects=2, num_swaps=1, strides=(1,), stride_weights=(1.0,)), 'too few'),
  ],
)
def test_bad_fields_of_shuffled_objects(changes, message):
  with pytest.raises(records.UserError, match=re.escape(message)):
    make('shuffled_objects', **changes)


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0, 'zero'),
    (7, 'seven'),
    (13, 'thirteen'),
    (20, 'twenty'),
    (47, 'forty-seven'),
    (100, 'one hundred'),
    (219, 'two hundred nineteen'),
    (1000, 'one thousand'),
    (1105, 'one thousand one hundred five'),
    (40_030, 'forty thousand thirty'),
    (999_999, 'nine hundred ninety-nine thousand nine hundred ninety-nine'),
  ],
)
def test_words(number, text):
  assert arithmetic.words(number) == text


def test_words_are_different_for_different_numbers_and_end_at_a_million():
  assert len({arithmetic.words(n) for n in range(20_000)}) == 20_000
  for number in (-1, 1_000_000):
    with pytest.raises(ValueError, match=str(number)):
      arithmetic.words(number)


def terms(problem):
  """Signed terms of a question, in digits or in words, from its text alone."""
  number = {arithmetic.words(n): n for n in range(20)} | {str(n): n for n in range(20)}
  expression = problem.removeprefix('What is ').removesuffix('?')
  expression = expression.replace('plus', '+').replace('minus', '-')
  parts = ['+', *re.split(r' ([+-]) ', expression)]
  signed = zip(parts[::2], parts[1::2], strict=True)
  return [number[value] if sign == '+' else -number[value] for sign, value in signed]


def test_sums_are_right_and_their_solutions_too():
  seen = set()
  for i in range(300):
    example = make('arithmetic').example('train', i)
    total = sum(terms(example.problem))
    assert example.answer == str(total)
    think, said = re.fullmatch(
      r'<think>(.*)</think><answer>(.*)</answer>', example.solution
    ).groups()
    assert said == example.answer
    for step in think.split(', '):
      a, sign, b, c = re.fullmatch(r'(-?\d+) ([+-]) (\d+) = (-?\d+)', step).groups()
      assert int(c) == (int(a) + int(b) if sign == '+' else int(a) - int(b))
    seen.add((example.meta['form'], example.meta['num_terms'], total < 0))
  assert seen == {(f, n, s) for f in ('digits', 'words') for n in (2, 3) for s in (True, False)}


def test_a_sum_in_another_order_or_in_words_is_in_the_same_split():
  task = make('arithmetic')
  train, test = (
    {tuple(sorted(terms(task.example(split, i).problem))) for i in range(2000)}
    for split in splits.SPLITS
  )
  assert len(train) > 1000 and len(test) > 500
  assert not train & test


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(min_terms=1), 'min_terms=1'),
    (dict(min_value=5, max_value=4), 'min_value=5'),
    (dict(forms=('roman',)), 'digits, words'),
    (dict(operations=('*',)), '+, -'),
    (dict(max_value=1_000_000), 'max_value=1000000'),
    (dict(max_terms=2, max_value=0, operations=('+',)), 'too few'),
  ],
)
def test_bad_fields_of_arithmetic(changes, message):
  with pytest.raises(records.UserError, match=re.escape(message)):
    make('arithmetic', **changes)


# ---------------------------------------------------------------------------------- reasoning-gym


@pytest.mark.parametrize('dataset', reasoning_gym.DATASETS)
def test_admitted_data_sets_are_quick_and_have_short_answers(dataset):
  task = make('reasoning_gym', dataset=dataset, dataset_config={})
  start = time.process_time()
  examples = [task.example('train', i) for i in range(30)]
  assert time.process_time() - start < 0.6
  assert len({e.problem for e in examples}) > 25
  assert max(len(e.answer) for e in examples) <= 32


PRINT_ALL = """
from reasonrl.tasks import reasoning_gym
for name in reasoning_gym.DATASETS:
  task = reasoning_gym.ReasoningGym(seed=0, dataset=name, dataset_config={})
  for i in range(60):
    example = task.example('train', i)
    print(name, repr(example.problem), example.answer)
"""


def test_items_do_not_depend_on_the_process():
  make('reasoning_gym')
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PRINT_ALL],
      env=os.environ | {'PYTHONHASHSEED': seed, 'PYTHONPATH': os.pathsep.join(sys.path)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for seed in ('1', '2')
  ]
  first, second = (process.communicate()[0] for process in processes)
  assert len(first.splitlines()) == 60 * len(reasoning_gym.DATASETS)
  assert first == second


def test_a_data_set_that_is_not_admitted_lists_the_choices():
  with pytest.raises(records.UserError, match="'number_sequence'.*choices: aiw, .*chain_sum"):
    TASKS['reasoning_gym'](seed=0, dataset='number_sequence', dataset_config={})


@pytest.mark.parametrize(
  'fields', [{'max_digit': 2}, {'min_digits': 3, 'max_digits': 2}, {'seed': 1}]
)
def test_a_bad_dataset_config_is_refused(fields):
  with pytest.raises(records.UserError, match='dataset_config=.*chain_sum'):
    make('reasoning_gym', dataset_config=fields)


def test_the_missing_package_is_named_with_its_command(monkeypatch):
  monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
  with pytest.raises(records.UserError, match=r"pip install 'reasonrl\[gym\]'"):
    TASKS['reasoning_gym'](seed=0, dataset='chain_sum', dataset_config={})
