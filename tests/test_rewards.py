"""Rewards: the rules on examples worked by hand, then no string makes them raise or dawdle."""

import dataclasses
import pickle
import re
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from reasonrl import records
from reasonrl.records import Stop
from reasonrl.rewards import REWARDS, answer, votes

FIELDS = {
  'accuracy': dict(after_think=True, extraction='strict', require_stop=True),
  'addition': dict(),
  'commonsenseqa': dict(),
  'countdown': dict(after_think=True, require_stop=True),
  'gsm8k': dict(),
  'r1_format': dict(allow_empty_think=False),
  'open_r1_format': dict(),
  'tag_count': dict(),
  'soft_overlong': dict(cache=4),
  'lcpo': dict(
    **dict(after_think=True, extraction='strict', require_stop=True),
    **dict(alpha=3e-4, delta=0.5, max_form='paper', violation_tokens=500),
  ),
  'cosine': dict(
    **dict(after_think=True, extraction='strict', require_stop=True, max_length=8, margin=0),
    **dict(value_correct_at_0=1.0, value_correct_at_max=0.5, value_exceeded=0.0),
    **dict(value_wrong_at_0=0.0, value_wrong_at_max=0.5),
  ),
  'prefix_match': dict(boxed=True),
  'trace': dict(),
  'repetition': dict(ngram=2, penalty=-0.05, only_start=False, gamma=0.99),
  'repetition_sparse': dict(
    **dict(after_think=True, extraction='strict', require_stop=True),
    **dict(ngram=2, max_penalty=-1.0, wrong_only=True),
  ),
}


def make(name, **changes):
  return REWARDS[name](**(FIELDS[name] | changes))


# What the rewards of one task read, so that no string reaches them in vain.
META = {
  'addition': {'checked_by': 'addition'},
  'commonsenseqa': {'checked_by': 'commonsenseqa'},
  'gsm8k': {'checked_by': 'gsm8k'},
  'countdown': {'checked_by': 'countdown', 'numbers': '1 9', 'target': 9, 'operations': '+-*/'},
  'lcpo': {'target_length': 2, 'length_mode': 'exact'},
  'prefix_match': {'said': 'ab', 'next_bytes': [1, 3]},
  'trace': {'trace': 'b2'},
}
NO_GOLD = ('accuracy', 'gsm8k', 'lcpo', 'cosine', 'repetition_sparse')  # may not apply


def example(gold='7', name=''):
  return records.Example('test', 'train', 0, 'problem', gold, None, META.get(name, {}))


def completion(text, stop=Stop.EOS):
  return records.Completion(text, (1, 2), 2, records.think_span(text), stop, 8)


def value(name, text, gold='7', stop=Stop.EOS, **changes):
  return make(name, **changes)(example(gold), completion(text, stop)).value


# ------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    (r'so \boxed{7}', '7'),
    (r'\boxed{1} then \boxed{ 2 }', '2'),
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{\boxed{3}}', '3'),
    (r'\boxed{5} and \boxed{6', '5'),  # the last one is not closed
    (r'{ \boxed{5} }}', '5'),
    (r'\boxed{\{1, 2\}}', r'\{1, 2\}'),
    (r'\boxed{\}', None),  # an escaped brace closes nothing
    (r'\boxed {8}', '8'),
    (r'\boxed{}', ''),
    (r'\boxed 8', None),
    (r'\boxed{1} <answer>2</answer> #### 3', '1'),
    ('<answer>4</answer> #### 3', '4'),
    ('<answer>4</answer> <answer> 5 </answer> <answer>6', '5'),
    ('<answer>3<answer>4</answer></answer>', '4'),
    ('</answer>4<answer>', None),
    ('#### 1 #### 42\nI hope this helps.', '42'),
    ('####\n42', '42'),
    ('#### ', ''),
    ('the answer is 7', None),
    ('', None),
  ],
)
def test_extract(text, found):
  assert answer.extract(text) == found


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    ('1 + 2 = 3, so the answer is 3.', '3'),
    ('it costs $1,234.50 now', '1,234.50'),
    ('between 3 and -5', '-5'),
    ('10-4', '4'),
    ('one of 1/2', '1/2'),
    ('lists 1,2345', '2345'),
    ('<answer>8</answer> or 9', '8'),
    ('x2 is a name', None),
    ('no number, not even ٣', None),
  ],
)
def test_extract_lenient(text, found):
  assert answer.extract_lenient(text) == found


# --------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(
  ('text', 'normal'),
  [
    ('007', '7'),
    ('+7', '7'),
    ('-0', '0'),
    ('100,000', '100000'),
    ('100{,}000', '100000'),
    (r'100\,000', '100000'),
    ('12,345.50', '24691/2'),
    ('1,2', '1,2'),  # a pair, not a number
    ('1,2345', '1,2345'),
    ('0.5', '1/2'),
    ('.5', '1/2'),
    ('-.5', '-1/2'),
    ('3.', '3'),
    ('42.', '42'),
    ('7.0', '7'),
    ('14/2', '7'),
    ('-2 / 4', '-1/2'),
    (r'\frac{1}{2}', '1/2'),
    (r'-\dfrac{2}{4}', '-1/2'),
    (r'\frac{-1}{2}', '-1/2'),
    (r'-\frac{-1}{2}', '1/2'),
    (r'\tfrac12', '1/2'),
    (r'\frac{x}{2}', r'\frac{x}{2}'),
    ('1/0', '1/0'),
    (r'\frac{1}{0}', r'\frac{1}{0}'),
    ('$7$', '7'),
    (r'\$7.50', '15/2'),
    ('50%', '50'),
    (r'50\%', '50'),
    (r'12\text{ cm}', '12'),
    (r'\text{Tuesday}', 'Tuesday'),
    (r'\left(1, 2\right)', '(1, 2)'),
    (r'\leftarrow', r'\leftarrow'),
    ('  two   words ', 'two words'),
    ('Yes.', 'Yes'),
    ('٣', '٣'),  # not an ASCII digit: a text like any other
    ('½', '½'),
    ('1e3', '1e3'),
    ('9' * 512, '9' * 512),
    ('9' * 513, None),
    ('', None),
    (' ', None),
    ('$', None),
    ('.', None),
  ],
)
def test_normalise(text, normal):
  assert answer.normalise(text) == normal


def test_equal():
  assert answer.equal('7', '007') and answer.equal('1/2', '0.50')
  assert answer.equal(r'\frac{3}{4}', '.75') and answer.equal('100000', '100,000')
  assert not answer.equal('1/3', '0.333')
  assert not answer.equal('7', '77') and not answer.equal('yes', 'Yes')
  # Nothing equals what has no normal form, not even itself.
  assert not answer.equal('', '') and not answer.equal('9' * 600, '9' * 600)


@hypothesis.given(st.fractions())
def test_every_spelling_of_a_fraction_has_one_normal_form(x):
  spellings = [f'{x.numerator * 6}/{x.denominator * 6}', f' {x} ', f'${x}$']
  spellings.append(f'\\frac{{{x.numerator}}}{{{x.denominator}}}')
  assert {answer.normalise(s) for s in spellings} == {str(x)}


# ----------------------------------------------------------------------------------------- accuracy


def test_accuracy():
  good = '<think>3 + 4</think><answer>7</answer>'
  score = make('accuracy')(example('7'), completion(good))
  assert score == records.Score(1.0, {'extracted': 1.0, 'lenient': 1.0}, None)
  assert make('accuracy')(example('8'), completion(good)).value == 0.0
  score = make('accuracy')(example('7'), completion('<think>3 + 4</think>7'))
  assert score == records.Score(0.0, {'extracted': 0.0, 'lenient': 1.0}, None)
  assert make('accuracy').answer(completion(good)) == '7'
  assert make('accuracy').answer(completion(good.replace('7<', '007.0<'))) == '7'
  assert make('accuracy').answer(completion('7')) is None
  with pytest.raises(records.UserError, match="'any'.*strict, lenient"):
    make('accuracy', extraction='any')


def test_a_gold_answer_without_normal_form_pays_nobody():
  """A default of 1 or 0 would teach something; TRL and open-r1 had to fix that."""
  for gold in ('', '$', '9' * 513):
    assert value('accuracy', '<think>x</think><answer>7</answer>', gold) is None


def test_accuracy_leaves_an_example_to_the_reward_that_it_names():
  said = completion('<think>x</think><answer>7</answer>')
  for name in ('addition', 'countdown'):
    assert make('accuracy')(example('7', name), said) == records.Score(None, {}, None)


@pytest.mark.parametrize(
  ('text', 'after', 'anywhere'),
  [
    ('<think>a</think><answer>7</answer>', 1, 1),
    ('a</think><answer>7</answer>', 1, 1),  # <think> stood in the prompt
    ('<answer>7</answer>', 0, 1),
    ('<think><answer>7</answer></think>', 0, 1),
    ('<think><answer>7</answer></think><answer>8</answer>', 0, 0),
    ('<think><answer>8</answer></think><answer>7</answer>', 1, 1),
    ('<think>a</think><think><answer>7</answer>', 0, 1),
    ('<think>a</think><answer>7</answer><think>b</think>', 0, 1),
    ('<think>a</think><answer>7</answer></think>', 0, 1),
  ],
)
def test_the_answer_must_come_after_the_thinking(text, after, anywhere):
  assert value('accuracy', text, after_think=True) == after
  assert value('accuracy', text, after_think=False) == anywhere


def test_numbers_in_passing_count_only_when_lenient():
  fields = dict(after_think=False)
  assert value('accuracy', '5, 6, 7', extraction='strict', **fields) == 0
  assert value('accuracy', '5, 6, 7', extraction='lenient', **fields) == 1


def test_a_cut_off_completion_earns_nothing_if_a_stop_is_required():
  text = '<think>a</think><answer>7</answer> and'
  assert value('accuracy', text, stop=Stop.LENGTH, require_stop=True) == 0
  assert value('accuracy', text, stop=Stop.LENGTH, require_stop=False) == 1


# ------------------------------------------------------------------------------------------ format


@pytest.mark.parametrize(
  ('text', 'ok'),
  [
    ('<think>a</think><answer>7</answer>', 1),
    (' <think>a</think>\n\n<answer>7</answer>\n', 1),
    ('<think>\na\n</think>\n<answer>\n7\n</answer>', 1),
    ('<think>a</think><answer></answer>', 1),
    ('<think></think><answer>7</answer>', 0),
    ('<think> \n</think><answer>7</answer>', 0),
    ('x<think>a</think><answer>7</answer>', 0),
    ('<think>a</think>x<answer>7</answer>', 0),
    ('<think>a</think><answer>7</answer>x', 0),
    ('<think>a</think>', 0),
    ('<think>a<answer>7</answer></think>', 0),
    ('<answer>7</answer><think>a</think>', 0),
    ('</think>a<think><answer>7</answer>', 0),
    ('<think>a</think></answer>7<answer>', 0),
    ('<think>a</think><think>b</think><answer>7</answer>', 0),
    ('<think>a</think><answer>7</answer><answer>7</answer>', 0),
    ('<think>a</think></think><answer>7</answer>', 0),
    ('<THINK>a</THINK><answer>7</answer>', 0),
    ('', 0),
  ],
)
def test_r1_format(text, ok):
  assert value('r1_format', text) == ok
  assert value('r1_format', text, stop=Stop.LENGTH) == 0


def test_r1_format_fields():
  for empty in ('<think></think><answer>7</answer>', '<think> </think><answer>7</answer>'):
    assert value('r1_format', empty, allow_empty_think=True) == 1


OPEN_R1 = re.compile(
  r'^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$', re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(
  ('text', 'ok'),
  [
    ('<think>\na\n</think>\n<answer>\n7\n</answer>', 1),
    ('<think>\na\n</think>\n<think>\nb\n</think>\n<answer>\n7\n</answer>', 1),  # two spans
    ('<think>\n\n</think>\n<answer>\n7\n</answer>', 1),  # an empty one
    ('<think>\na\n</think>\n<answer>\n7\n</answer>\nanything', 1),
    ('<think>\na\n</think>\n<answer>\n7\n</answer> anything', 0),
    ('<think>a</think><answer>7</answer>', 0),  # on one line
    ('\n<think>\na\n</think>\n<answer>\n7\n</answer>', 0),  # a leading newline
    ('a\n</think>\n<answer>\n7\n</answer>', 0),  # <think> stood in the prompt
    ('<think>\n</think>\n<answer>\n7\n</answer>', 0),
  ],
)
def test_open_r1_format(text, ok):
  assert value('open_r1_format', text) == bool(OPEN_R1.match(text)) == ok


pieces = st.sampled_from([*records.TAGS, '\n', '\n', '\n</think>\n<answer>\n', '\n</answer>', 'a'])


@hypothesis.given(st.lists(pieces, max_size=12), st.booleans())
def test_open_r1_format_is_the_regex(parts, starts):
  text = '<think>\n' * starts + ''.join(parts)
  assert value('open_r1_format', text) == bool(OPEN_R1.match(text))


@pytest.mark.parametrize(
  ('text', 'count'),
  [
    ('<think>\na\n</think>\n<answer>\n7\n</answer>', 1.0),
    ('<think>\na\n</think>\n<answer>\n7\n</answer>\n</answer>', 0.75),
    ('<think>\na\n</think>', 0.25),
    ('<think>a</think><answer>7</answer>', 0.0),
  ],
)
def test_tag_count(text, count):
  assert value('tag_count', text) == count


# -------------------------------------------------------------------------------------------- all

# Those that need a model have tests of their own.
every = pytest.mark.parametrize('name', [n for n in REWARDS if not hasattr(REWARDS[n], 'batch')])


@every
def test_rewards_are_plain_values(name):
  reward = make(name)
  assert pickle.loads(pickle.dumps(reward)) == reward
  assert type(reward).group is False


fragments = st.sampled_from(
  [*records.TAGS, '\\boxed{', '\\boxed', '{', '}', '\\{', '####', '\\frac', '\\frac{1}{', '\\text{']
  + ['1/0', *'$%,.-/019٣ \n\r\x00\ud800\\', *'()+*', '</scratch>', '1*9', '(e).']
)
strings = st.text() | st.lists(fragments | st.text(max_size=3), max_size=30).map(''.join)


@every
@hypothesis.given(text=strings, gold=strings, stop=st.sampled_from([Stop.EOS, Stop.LENGTH]))
def test_no_string_makes_a_reward_raise(name, text, gold, stop):
  variants = [make(name)]
  if name == 'accuracy':
    variants.append(make(name, after_think=False, extraction='lenient'))
    # Also with the text where it is sure to be read.
    text = f'<think></think>{text}'
  if name == 'countdown':
    text = f'<think></think><answer>{text}</answer>'
  for reward in variants:
    score = reward(example(gold, name), completion(text, stop))
    assert (score.value is None) <= (name in (*NO_GOLD, 'repetition'))
    assert score.value is None or 0 <= score.value <= 1
    assert (score.token_values is None) == (name != 'repetition')


N = 50_000  # pieces: several times what a model can write in a completion
ADVERSARIAL = {
  **{
    piece: piece * N for piece in [*records.TAGS, '{', '}', '\\', '9', '.', '-', ' ', '٣', '####']
  },
  'open boxes': '\\boxed{' * N,
  'bare boxes': '\\boxed' * N,
  'spaced boxes': '\\boxed ' * N,
  'empty boxes': '\\boxed{}' * (N // 2),
  'nested boxes': '\\boxed{' * (N // 2) + '}' * (N // 2),
  'braces in a box': '\\boxed{' + '{' * (N // 2) + '}' * (N // 2) + '}',
  'space in a box': '\\boxed' + ' ' * N,
  'digits': '<answer>' + '9' * 10_000 + '</answer>',
  'fraction': '\\boxed{' + '9' * 250 + '/' + '7' * 250 + '}',
  'thousands': '1,' * N,
  'millions': ',111' * N + '1',
  'slashes': '1/' * N,
  'dots': '1.' * N,
  'fractions': '\\boxed{' + '\\frac{' * 80 + '}',
  'texts': '\\boxed{' + '\\text{' * 80 + '}',
  'brackets': '<answer>' + '(' * 255 + '9' + ')' * 255 + '</answer>',
  'open brackets': '<answer>' + '(' * N,
  'operators': '<answer>' + '1+' * 250 + '9</answer>',
  'lines': '\n' * N + '</scratch>' + '\n' * N,
  'open-r1 ends': '<think>\n' + '\n</think>' * N,
  'open-r1 seams': '<think>\n' + '\n</think>\n<answer>\n' * (N // 2),
}


@every
@pytest.mark.parametrize('attack', ADVERSARIAL)
def test_no_string_takes_a_reward_long(name, attack):
  text = ADVERSARIAL[attack]
  variants = [make(name)]
  if name == 'accuracy':
    text = '<think></think>' + text
    variants.append(make(name, after_think=False, extraction='lenient'))
  if name == 'countdown':
    variants = [make(name, after_think=False)]
  for reward in variants:
    sampled, times = completion(text), []
    for _ in range(3):
      start = time.thread_time()
      reward(example(name=name), sampled)
      times.append(time.thread_time() - start)
    assert min(times) < 0.2  # of a slow core; more than linear takes seconds


@every
@hypothesis.given(text=strings)
def test_what_is_kept_begins_the_text_and_ends_with_the_answer(name, text):
  reward = make(name)
  if not hasattr(reward, 'trim'):
    return
  kept, said = reward.trim(text), reward.answer(completion(text))
  assert (kept is None) == (said is None)
  if kept is not None:
    assert text.startswith(kept) and reward.trim(kept) == kept
    assert reward.answer(completion(kept)) == said


def test_votes_by_hand():
  said = ['<think></think><answer>7</answer>', 'nothing', '<think></think><answer>07.0</answer>']
  said += ['<think></think>\\boxed{8}', '<think></think><answer>7</answer>']
  count = votes.Votes({'accuracy': make('accuracy')}, 'accuracy')
  scores = count([example('7')] * 5, [completion(text) for text in said])
  assert [score.value for score in scores] == [1, 0, 1, 4, 1]
  cut = dataclasses.replace(completion(said[0]), stop=records.Stop.LENGTH)
  assert count([example('7')], [cut])[0].value == 0  # what may not be right has no vote


def test_votes_of_an_example_that_names_its_reward():
  count = votes.Votes({'accuracy': make('accuracy'), 'addition': make('addition')}, 'accuracy')
  named = dataclasses.replace(example('7'), meta={records.CHECKED_BY: 'addition'})
  scores = count([named] * 3, [completion(text) for text in ('7', '8', '7')])
  assert [score.value for score in scores] == [1, 2, 1]


# ------------------------------------------------------------------------------------- length


@pytest.mark.parametrize('tokens, want', [(1, 0.0), (80, 0.0), (90, -0.5), (100, -1), (101, -1)])
def test_soft_overlong_by_hand(tokens, want):
  cut = records.Completion('', (), tokens, None, Stop.EOS, 100)
  assert make('soft_overlong', cache=20)(example(), cut).value == want
  with pytest.raises(records.UserError, match='cache=0 must be at least 1'):
    make('soft_overlong', cache=0)
