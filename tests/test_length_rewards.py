"""Rewards of length: the papers' rules by hand, then no ids make them raise or dawdle."""

import math
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from reasonrl import records, tables
from reasonrl.configs import common
from reasonrl.records import Stop
from reasonrl.rewards import REWARDS, cosine

RIGHT, WRONG = '<think>x</think><answer>7</answer>', '<think>x</think><answer>8</answer>'


def make(name, **changes):
  """The reward of the preset."""
  section = common.rewards(**{name: 1.0})[name]
  section.update(changes)
  return tables.build(REWARDS[name], section, 'weight')


def example(gold='7', **meta):
  return records.Example('sums', 'train', 0, '3 + 4?', gold, None, meta)


def target(tokens, mode='exact', gold='7'):
  return example(gold, **{records.TARGET_LENGTH: tokens, records.LENGTH_MODE: mode})


def said(text=RIGHT, tokens=0, ids=(), cap=100, stop=Stop.EOS):
  count = len(ids) or tokens
  return records.Completion(text, tuple(ids), count, records.think_span(text), stop, cap)


# ------------------------------------------------------------------------------------------- LCPO


def lcpo(text, tokens, example, **changes):
  return make('lcpo', **changes)(example, said(text, tokens)).value


def test_exact_by_hand():
  assert lcpo(RIGHT, 1000, target(1200)) == pytest.approx(0.94)
  assert lcpo(RIGHT, 1400, target(1200)) == pytest.approx(0.94)
  assert lcpo(WRONG, 1000, target(1200)) == pytest.approx(-0.06)
  # A wrong answer on target earns what a right one 3,333 1/3 tokens off does.
  assert lcpo(RIGHT, 3335, target(1)) < lcpo(WRONG, 1, target(1)) < lcpo(RIGHT, 3334, target(1))
  assert lcpo(RIGHT, 12, target(20), alpha=0.03) == pytest.approx(0.76)


@pytest.mark.parametrize('tokens, want', [(500, 0.65), (1000, 0.5), (2000, 0.2), (3000, 0.0)])
def test_max_by_hand(tokens, want):
  assert lcpo(RIGHT, tokens, target(1000, 'max')) == pytest.approx(want)
  assert lcpo(WRONG, tokens, target(1000, 'max')) == 0
  assert lcpo(WRONG, tokens, target(1000, 'max'), max_form='additive') == pytest.approx(want)
  assert lcpo(RIGHT, tokens, target(1000, 'max'), max_form='additive') == pytest.approx(1 + want)


def test_max_saturates_and_the_repository_has_half_the_slope():
  at = lambda tokens: lcpo(RIGHT, tokens, target(2000, 'max'))
  assert at(333) == 1 and at(334) < 1 and at(3666) > 0 and at(3667) == 0
  assert lcpo(RIGHT, 500, target(1000, 'max'), max_form='repository') == pytest.approx(0.575)
  both = {'max_form': 'repository', 'delta': 0.9}  # a delta of its own
  assert lcpo(RIGHT, 500, target(1000, 'max'), **both) == pytest.approx(0.575)
  assert lcpo(RIGHT, 500, target(1000, 'max'), delta=0.1) == pytest.approx(0.25)


def test_parts_by_hand():
  score = make('lcpo')(target(1000), said(WRONG, 900))
  assert score == records.Score(
    pytest.approx(-0.03),
    {
      'exact/right': 0.0,
      'exact/length_error': -0.1,
      'exact/deviation': 0.1,
      'exact/within_10': 1.0,
      'exact/over': 0.0,
      'exact/far': 0.0,
    },
    None,
  )
  part = lambda name, tokens, **changes: make('lcpo', **changes)(
    target(1000, 'max'), said(RIGHT, tokens)
  ).parts[f'max/{name}']
  assert [part('within_10', n) for n in (899, 900, 1100, 1101)] == [0, 1, 1, 0]
  assert [part('over', n) for n in (400, 1500, 1501)] == [0, 0, 1]
  assert part('over', 1001, violation_tokens=0) == 1
  assert [part('far', n) for n in (499, 500, 1500, 1501)] == [1, 0, 0, 1]
  assert part('length_error', 1500) == part('deviation', 1500) == 0.5


@pytest.mark.parametrize(
  'meta',
  [
    {},
    {'target_length': 7},
    {'length_mode': 'max'},
    {'target_length': 0, 'length_mode': 'max'},
    {'target_length': '7', 'length_mode': 'max'},
    {'target_length': 7, 'length_mode': 'least'},
  ],
)
def test_lcpo_without_a_target_does_not_apply(meta):
  assert make('lcpo')(example(**meta), said()) == records.Score(None, {}, None)


@pytest.mark.parametrize('name', ['lcpo', 'cosine', 'repetition_sparse'])
def test_correctness_is_that_of_accuracy(name):
  wrong_only = {'wrong_only': True} if name == 'repetition_sparse' else {}
  reward = make(name, require_stop=True, **wrong_only)
  for facts in ({'gold': '$'}, {records.CHECKED_BY: 'countdown'}):
    given = {records.TARGET_LENGTH: 9, records.LENGTH_MODE: 'exact', **facts}
    assert reward(example(**given), said(ids=range(9))).value is None
  at = lambda stop, text=RIGHT, **changes: (
    make(name, **changes)(target(9), said(text, ids=[1, 2] * 30, cap=999, stop=stop)).value
  )
  assert at(Stop.LENGTH, require_stop=True) == at(Stop.EOS, WRONG) != at(Stop.EOS)
  assert at(Stop.EOS, '7') == at(Stop.EOS, WRONG)
  assert at(Stop.EOS, '7', after_think=False, extraction='lenient') == at(Stop.EOS)
  with pytest.raises(records.UserError, match="'any'.*strict, lenient"):
    make(name, extraction='any')


# ----------------------------------------------------------------------------------------- cosine


@pytest.mark.parametrize(
  'tokens, right, wrong',
  [(0, 2, -10), (25, 1.853553, -8.535534), (50, 1.5, -5), (75, 1.146447, -1.464466)],
)
def test_cosine_by_hand(tokens, right, wrong):
  for cap, max_length in ((100, 0), (999, 100)):
    reward = make('cosine', margin=0, max_length=max_length)
    value = lambda text: reward(example(), said(text, tokens, cap=cap)).value  # noqa: B023
    assert [value(RIGHT), value(WRONG)] == pytest.approx([right, wrong], abs=1e-6)


def test_cosine_of_the_papers_window():
  reward = make('cosine', max_length=14336)
  values = [reward(example(), said(text, 4096, cap=16384)).value for text in (RIGHT, WRONG)]
  assert values == pytest.approx([1.811745, -8.117449], abs=1e-6)
  assert reward(example(), said(RIGHT, 4096, cap=4096)).value == -10  # cut off before that window


def test_the_end_of_the_window_comes_before_correctness():
  score = lambda tokens: make('cosine')(example(), said(RIGHT, tokens))
  assert score(83).value == pytest.approx(cosine.cosine(0.83, 2, 1))
  assert score(83).parts == {'right': 1.0, 'exceeded': 0.0}
  assert score(84) == score(5000) == records.Score(-10.0, {'right': 1.0, 'exceeded': 1.0}, None)
  assert make('cosine')(example(), said(RIGHT, 84, cap=101)).value > 0
  assert make('cosine')(example(), said(RIGHT, 0, cap=0)).value == -10


def test_variant_a_pays_long_right_answers():
  a = dict(value_correct_at_0=0.0, value_correct_at_max=10.0)
  a |= dict(value_wrong_at_0=0.0, value_wrong_at_max=0.0)
  values = [make('cosine', **a)(example(), said(RIGHT, n)).value for n in (0, 50, 83)]
  assert values == pytest.approx([0, 5, 10 * (1 - math.cos(0.83 * math.pi)) / 2])
  assert make('cosine', **a)(example(), said(WRONG, 50)).value == 0


# ------------------------------------------------------------------------------------- repetition


def penalties(ids, **changes):
  fields = {'ngram': 2, 'gamma': 0.0, **changes}
  score = make('repetition', **fields)(example(), said(ids=ids))
  assert score.value is None
  return list(score.token_values)


P = -0.05


@pytest.mark.parametrize(
  'ids, want, starts',
  [
    ([1, 2, 1, 2, 3], [0, 0, P, P, 0], [0, 0, P, P, 0]),
    ([1, 1, 1, 1], [0, P, P, P], [0, P, P, 0]),
    ([1], [0], [0]),
    ([], [], []),
    ([1, 2, 3], [0, 0, 0], [0, 0, 0]),
    # Repeats begin at 3, 6 and 7: three tokens are another stretch, one is not.
    ([1, 2, 3, 1, 2, 4, 1, 2, 3], [0, 0, 0, P, P, 0, P, P, P], [0, 0, 0, P, P, 0, P, P, 0]),
    # At 2 and 4: as near as n tokens it is the same stretch.
    ([1, 2, 1, 2, 1, 2], [0, 0, P, P, P, P], [0, 0, P, P, 0, 0]),
  ],
)
def test_penalties_by_hand(ids, want, starts):
  assert penalties(ids) == want
  assert penalties(ids, only_start=True) == starts


def test_the_penalty_has_returns_of_its_own_discount():
  # r = [0, P, P] discounted by .99, beside a right answer whose 1 is discounted by nothing.
  both = [1 + credit for credit in penalties([1, 1, 1], gamma=0.99)]
  assert both == pytest.approx([0.901495, 0.9005, 0.95])
  assert penalties([1, 1, 1], gamma=1.0) == pytest.approx([-0.1, -0.1, -0.05])
  score = make('repetition', ngram=2)(example(), said(ids=[1, 2, 1, 2, 3]))
  assert score.parts == {'repeated': 0.4}


def test_sparse_by_hand():
  value = lambda ids, text=WRONG, **changes: make('repetition_sparse', **{'ngram': 2, **changes})(
    example(), said(text, ids=ids)
  )
  ababc = [1, 2, 1, 2, 3]
  assert value(ababc) == records.Score(-0.25, {'repeated': 0.25}, None)
  assert value(ababc, RIGHT) == records.Score(0.0, {'repeated': 0.25}, None)
  assert value(ababc, RIGHT, wrong_only=False).value == -0.25
  assert value(ababc, max_penalty=-0.4).value == pytest.approx(-0.1)
  assert value([1, 1, 1], ngram=3).value == value([1]).value == value([]).value == 0
  none = make('repetition_sparse', ngram=2, wrong_only=False)(example('$'), said(ids=ababc))
  assert none.value == -0.25  # it does not ask who is right


def slowly(ids, ngram, penalty, only_start):
  """As the paper has it: P on all positions of every n-gram that was seen, in quadratic time."""
  grams = [ids[i : i + ngram] for i in range(max(len(ids) - ngram + 1, 0))]
  out, last = [0.0] * len(ids), None
  for i, gram in enumerate(grams):
    if gram in grams[:i]:
      if not only_start or last is None or i > last + ngram:
        out[i : i + ngram] = [penalty] * ngram
      last = i
  return out


@hypothesis.given(
  ids=st.lists(st.integers(0, 3), max_size=30) | st.lists(st.integers(), max_size=30),
  ngram=st.integers(1, 6),
  only_start=st.booleans(),
  gamma=st.floats(0, 1),
)
def test_any_ids(ids, ngram, only_start, gamma):
  fields = {'ngram': ngram, 'only_start': only_start}
  raw = penalties(ids, **fields)
  assert raw == slowly(ids, ngram, P, only_start)
  returns = penalties(ids, gamma=gamma, **fields)
  for t, value in enumerate(returns):
    assert value == pytest.approx(sum(gamma**k * r for k, r in enumerate(raw[t:])))
  sparse = make('repetition_sparse', ngram=ngram)(example(), said(WRONG, ids=ids)).value
  assert -1 <= sparse <= 0 and (sparse < 0) == any(raw)


@hypothesis.given(
  tokens=st.integers(0, 10**6),
  cap=st.integers(0, 10**6),
  meta=st.dictionaries(
    st.sampled_from([records.TARGET_LENGTH, records.LENGTH_MODE]),
    st.integers() | st.sampled_from(records.LENGTH_MODES) | st.floats() | st.none(),
  ),
)
def test_any_length(tokens, cap, meta):
  sampled = said(RIGHT, tokens, cap=cap)
  assert -10 <= make('cosine')(example(), sampled).value <= 2
  for form in ('paper', 'repository', 'additive'):
    score = make('lcpo', max_form=form)(example(**meta), sampled)
    assert (score.value is None) == (records.length_target(example(**meta)) is None)
    assert all(math.isfinite(x) for x in (score.value or 0.0, *score.parts.values()))


@pytest.mark.parametrize('kind', ['all equal', 'a cycle', 'all different', 'nearly'])
def test_repetition_takes_linear_time(kind):
  ids = {
    'all equal': lambda n: [1] * n,
    'a cycle': lambda n: list(range(39)) * (n // 39),
    'all different': lambda n: list(range(n)),
    'nearly': lambda n: ([1] * 39 + [2]) * (n // 40),
  }[kind]

  def seconds(n, reward):
    sampled, times = said(WRONG, ids=ids(n)), []
    for _ in range(3):
      start = time.thread_time()
      reward(example(), sampled)
      times.append(time.thread_time() - start)
    return min(times)

  for reward in (make('repetition'), make('repetition_sparse')):
    assert seconds(64_000, reward) < max(16 * seconds(8_000, reward), 0.1)  # 64 if quadratic


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('lcpo', {'alpha': -1.0}, 'alpha=-1.0 must be a number from 0 up'),
    ('lcpo', {'alpha': math.nan}, 'alpha=nan'),
    ('lcpo', {'delta': 1.5}, r'delta=1.5 must be in \[0, 1\]'),
    ('lcpo', {'max_form': 'sigmoid'}, "'sigmoid' is not one of paper, repository, additive"),
    ('lcpo', {'violation_tokens': -1}, 'violation_tokens=-1 must be at least 0'),
    ('cosine', {'value_exceeded': -math.inf}, 'cosine.value_exceeded=-inf must be finite'),
    ('cosine', {'max_length': -1}, 'max_length=-1 must be at least 0'),
    ('cosine', {'margin': -1}, 'margin=-1 must be at least 0'),
    ('repetition', {'ngram': 0}, 'repetition.ngram=0 must be at least 1'),
    ('repetition', {'penalty': 0.1}, 'penalty=0.1 must be a number up to 0'),
    ('repetition', {'gamma': 1.1}, r'gamma=1.1 must be in \[0, 1\]'),
    ('repetition_sparse', {'ngram': 0}, 'repetition_sparse.ngram=0'),
    ('repetition_sparse', {'max_penalty': math.nan}, 'max_penalty=nan'),
  ],
)
def test_bad_fields(name, changes, message):
  with pytest.raises(records.UserError, match=message):
    make(name, **changes)
