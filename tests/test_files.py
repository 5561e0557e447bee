"""Tasks that read files, and their rewards: rows, their order, STaR's strings, bad files."""

import collections
import json
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from reasonrl import records
from reasonrl.records import Stop
from reasonrl.rewards import REWARDS
from reasonrl.tasks import TASKS, files

JSONL = {'problem': '6 times 7?', 'answer': '42', 'solution': None, 'meta': {'level': 1}}
GSM8K = {
  'question': 'A boat holds 4 crates of 12 jars. How many jars?',
  'answer': 'It holds 4*12=<<4*12=48>>48 jars.\n#### 48',
}
TEXTS = ('oven', 'lake', 'shelf', 'drawer', 'roof')
CHOICES = [{'label': label, 'text': text} for label, text in zip('ABCDE', TEXTS, strict=True)]
STEM = 'Where do ducks swim?'
CSQA = {'answerKey': 'B', 'id': '0', 'question': {'stem': STEM, 'choices': CHOICES}}


def write(path, *rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def make(tmp_path, name, *rows, seed=0, test=None):
  """A task whose files hold these rows."""
  train = write(tmp_path / 'train.jsonl', *rows)
  return TASKS[name](seed, train, write(tmp_path / 'test.jsonl', *(test or rows)))


def only(tmp_path, name, row):
  return make(tmp_path, name, row).example('train', 0)


# ----------------------------------------------------------------------------------------- order


def test_the_order_does_not_change_between_versions():
  """Every run on a file rests on it: never edit the expected values."""
  assert [files.shuffled(0, 'train', 5, i) for i in range(10)] == ORDER


ORDER = [4, 2, 1, 0, 3, 1, 0, 2, 4, 3]


@hypothesis.given(
  st.integers(0, 3), st.sampled_from(['train', 'test']), st.integers(1, 40), st.integers(0, 10**9)
)
def test_every_epoch_is_a_permutation(seed, stream, size, epoch):
  positions = range(epoch * size, (epoch + 1) * size)
  rows = [files.shuffled(seed, stream, size, i) for i in positions]
  assert sorted(rows) == list(range(size))
  files._permutation.cache_clear()
  assert [files.shuffled(seed, stream, size, i) for i in reversed(positions)] == rows[::-1]


def test_seeds_splits_and_epochs_have_their_own_order():
  def order(seed, stream, epoch):
    return tuple(files.shuffled(seed, stream, 50, 50 * epoch + i) for i in range(50))

  orders = {order(s, t, e) for s in range(3) for t in ('train', 'test') for e in range(3)}
  assert len(orders) == 18
  # Each row is as likely as any other at each place: 3000 epochs of 3 rows have 1000 of each.
  seen = collections.Counter((i % 3, files.shuffled(0, 'train', 3, i)) for i in range(9000))
  assert len(seen) == 9 and all(abs(count - 1000) < 120 for count in seen.values())


def test_a_hundred_thousand_rows_in_order_take_a_second():
  start = time.process_time()
  for i in range(100_000):
    files.shuffled(0, 'train', 100_000, i)
  assert time.process_time() - start < 1  # measured: 0.1


def test_index_is_the_row_and_epochs_hold_every_row(tmp_path):
  rows = [JSONL | {'answer': str(n)} for n in range(7)]
  task = make(tmp_path, 'jsonl', *rows, test=rows[:2])
  for epoch in range(3):
    examples = [task.example('train', 7 * epoch + i) for i in range(7)]
    assert sorted(e.index for e in examples) == list(range(7))
    assert all(e.answer == str(e.index) for e in examples)
  assert {task.example('test', i).answer for i in range(2)} == {'0', '1'}


def test_files_are_read_once(tmp_path):
  task = make(tmp_path, 'jsonl', JSONL)
  before = task.example('train', 0)
  (tmp_path / 'train.jsonl').unlink()
  assert task.example('train', 1) == before


# ------------------------------------------------------------------------------------------ rows


def test_a_jsonl_row_is_an_example(tmp_path):
  assert only(tmp_path, 'jsonl', JSONL) == records.Example(
    'jsonl', 'train', 0, '6 times 7?', '42', None, {'level': 1}
  )
  row = {'problem': 'é\u2028?', 'answer': '', 'solution': '42.'}
  assert only(tmp_path, 'jsonl', row) == records.Example(
    'jsonl', 'train', 0, 'é\u2028?', '', '42.', {}
  )


def test_lines_end_where_json_says(tmp_path):
  path = tmp_path / 'rows'
  path.write_bytes('{"problem": "a\u2028b\x85c"}\r\n{"problem": "d"}'.encode())
  assert files.read(str(path)) == [{'problem': 'a\u2028b\x85c'}, {'problem': 'd'}]


def test_a_gsm8k_row(tmp_path):
  example = only(tmp_path, 'gsm8k', GSM8K)
  assert example.problem == 'Q: A boat holds 4 crates of 12 jars. How many jars?\nA:'
  assert example.solution == ' It holds 4*12=<<4*12=48>>48 jars.\n#### 48'
  assert (example.answer, example.task) == ('48', 'gsm8k')
  assert example.meta == {
    'checked_by': 'gsm8k',
    'hinted': 'Q: A boat holds 4 crates of 12 jars. How many jars? (48)\nA:',
  }


def test_a_commonsenseqa_row(tmp_path):
  example = only(tmp_path, 'commonsenseqa', CSQA)
  assert example.problem == (
    'Q: Where do ducks swim?\nAnswer Choices:\n(a) oven\n(b) lake\n(c) shelf\n(d) drawer\n'
    '(e) roof\nA:'
  )
  assert (example.answer, example.solution, example.task) == ('b', None, 'commonsenseqa')
  assert example.meta == {
    'checked_by': 'commonsenseqa',
    'hinted': 'Q: Where do ducks swim?\nAnswer Choices:\n(a) oven\n(b) lake (CORRECT)\n(c) shelf\n'
    '(d) drawer\n(e) roof\nA:',
  }


def changed(question):
  return CSQA | {'question': CSQA['question'] | question}


@pytest.mark.parametrize(
  'name, row, message',
  [
    ('jsonl', {'problem': 'a', 'answr': 'b'}, r"'answer' of type str; .*: problem \(str\), answr"),
    ('jsonl', {'problem': 'a', 'answer': 7}, r"'answer' of type str; .*answer \(int\)"),
    ('jsonl', JSONL | {'solution': 7}, r"'solution' of type str \| None"),
    ('jsonl', JSONL | {'meta': 'x'}, r"'meta' of type dict \| None"),
    ('jsonl', JSONL | {'level': 1}, "unknown key 'level'; choices: problem, answer, solution, m"),
    ('gsm8k', {'answer': '#### 1'}, "'question' of type str"),
    ('gsm8k', GSM8K | {'answer': 'It is 48.'}, "'It is 48.' does not end with a line ####"),
    ('gsm8k', GSM8K | {'answer': 'a\n####'}, 'does not end with'),
    ('gsm8k', GSM8K | {'answer': '#### 48\nso 48'}, 'does not end with'),
    ('commonsenseqa', {'question': {}}, "'answerKey' of type str; its keys: question"),
    ('commonsenseqa', changed({'stem': None}), "'stem' of type str"),
    ('commonsenseqa', changed({'choices': ['A']}), "'label' of type str; its keys: none"),
    ('commonsenseqa', changed({'choices': CHOICES[:4]}), 'the choices are A, B, C, D, E'),
    ('commonsenseqa', changed({'choices': CHOICES[::-1]}), 'the choices are A, B, C, D, E'),
    ('commonsenseqa', CSQA | {'answerKey': 'F'}, "answerKey 'F'"),
    ('commonsenseqa', CSQA | {'answerKey': 'b'}, "answerKey 'b'"),
  ],
)
def test_bad_rows(tmp_path, name, row, message):
  good = {'jsonl': JSONL, 'gsm8k': GSM8K, 'commonsenseqa': CSQA}[name]
  with pytest.raises(records.UserError, match=r'train\.jsonl, line 2: .*' + message):
    make(tmp_path, name, good, row).example('train', 0)


@pytest.mark.parametrize(
  'content, message',
  [
    (b'{}\n{"a": 1\n', 'line 2 is not JSON'),
    (b'{}\n\n{}\n', 'line 2 is not JSON'),
    (b'{}\n"\xff"', 'line 2 is not JSON'),
    (b'{}\n[1]', r'line 2 is not a JSON object: \[1\]'),
    (b'', r'has no rows \(line 1'),
    (None, 'cannot read .*rows.jsonl.*No such file'),
  ],
)
def test_bad_files(tmp_path, content, message):
  path = tmp_path / 'rows.jsonl'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(records.UserError, match=message):
    files.read(str(path))


@pytest.mark.parametrize('name', ['jsonl', 'gsm8k', 'commonsenseqa'])
def test_a_file_that_is_not_named(name):
  for split, paths in (('train', ('', 'a')), ('test', ('a', ''))):
    with pytest.raises(records.UserError, match=f"{split}='' must be a JSONL file"):
      TASKS[name](0, *paths)


# --------------------------------------------------------------------------------------- rewards


def said(text):
  return records.Completion(text, (), 0, None, Stop.LENGTH, 8)


def score(name, text, gold):
  example = records.Example('mine', 'train', 0, '', gold, None, {'checked_by': name})
  return REWARDS[name]()(example, said(text))


@pytest.mark.parametrize(
  'text, answer, kept',
  [
    (' 4*12=48\n#### 48', '48', ' 4*12=48\n#### 48'),
    (' so\n#### 48 \n\nQ: next\n#### 49', '48', ' so\n#### 48'),  # the first one
    ('#### 1,048.0', '1048', '#### 1,048.0'),
    ('It is #### $48', '48', 'It is #### $48'),
    ('#### 48 jars', '48 jars', '#### 48 jars'),
    ('####48', '48', '####48'),
    ('##### 48', '# 48', '##### 48'),
    ('####\n48', None, None),
    ('#### $\n#### 48', None, None),
    ('#### ' + '4' * 600, None, None),
    ('48', None, None),
    ('', None, None),
  ],
)
def test_gsm8k_by_hand(text, answer, kept):
  reward = REWARDS['gsm8k']()
  assert reward.answer(said(text)) == answer
  assert reward.trim(text) == kept
  right = float(answer == '48')
  assert score('gsm8k', text, '48') == records.Score(right, {'extracted': answer is not None}, None)


def test_a_gsm8k_gold_without_normal_form_pays_nobody():
  assert score('gsm8k', '#### $', '$') == records.Score(None, {}, None)
  assert score('gsm8k', '#### 1000', '1,000').value == 1


@pytest.mark.parametrize(
  'text, answer, kept',
  [
    (' Therefore, the answer is blotter (e).', 'e', ' Therefore, the answer is blotter (e).'),
    (' ... (E).\n\nQ: x (a).', 'e', ' ... (E).'),
    ('\n\n (e).\n', 'e', '\n\n (e).'),
    ('(e).', 'e', '(e).'),
    ('the answer is blotter (e)', None, None),
    ('the answer is (e)..', None, None),
    ('the answer is (e). \nQ:', None, None),
    ('the answer is blotter (f).', None, None),
    ('the answer is e).', None, None),
    ('Ducks swim.\nSo the answer is lake (e).', None, None),  # not the first line
    ('', None, None),
  ],
)
def test_commonsenseqa_by_hand(text, answer, kept):
  reward = REWARDS['commonsenseqa']()
  assert reward.answer(said(text)) == answer
  assert reward.trim(text) == kept
  parts = {'extracted': answer is not None}
  assert score('commonsenseqa', text, 'e') == records.Score(answer == 'e', parts, None)
  assert score('commonsenseqa', text, 'a').value == 0


@pytest.mark.parametrize('name', ['gsm8k', 'commonsenseqa'])
def test_they_do_not_apply_to_other_tasks(name):
  for meta in ({}, {'checked_by': 'addition'}):
    other = records.Example(name, 'train', 0, '', 'e', None, meta)
    assert REWARDS[name]()(other, said('#### e\n(e).')) == records.Score(None, {}, None)


def test_a_gsm8k_solution_is_right_and_kept_whole(tmp_path):
  example = only(tmp_path, 'gsm8k', GSM8K)
  assert REWARDS['gsm8k']()(example, said(example.solution)).value == 1
  assert REWARDS['gsm8k']().trim(example.solution + '\n\nQ: more') == example.solution
