"""Intervals by hand, lengths of thinking on three kinds of tokens, what an evaluation reports."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import evaluation, records, rollouts, stats, tokenizers, types

# ------------------------------------------------------------------------------------ intervals


@pytest.mark.parametrize(
  'p, n, low, high',
  [
    (0.5, 10, 0.236593, 0.763407),  # Wilson 1927; scipy's binomtest(5, 10) says the same
    (0.9, 1024, 0.880104, 0.916906),
    (0.0, 10, 0.0, 0.277533),  # high = z^2 / (n + z^2)
    (1.0, 10, 0.722467, 1.0),
  ],
)
def test_wilson_by_hand(p, n, low, high):
  assert stats.wilson(p, n) == pytest.approx((low, high), abs=1e-6)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_wilson_holds_p_and_stays_a_proportion(p, n):
  low, high = stats.wilson(p, n)
  assert 0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1 and low < high


def test_paired_gain_by_hand():
  # gains 1, 0, 0, 1: mean .5, sd (ddof 1) .577350, 1.959964 * .577350 / 2 = .565793
  gain, low, high = stats.paired_gain([0, 0, 1, 0], [1, 0, 1, 1])
  assert (gain, low, high) == pytest.approx((0.5, -0.065793, 1.065793), abs=1e-6)


@pytest.mark.parametrize(
  'n, c, k, want',
  [
    (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
    (16, 4, 8, 0.961538),  # 1 - C(12,8)/C(16,8) = 1 - 495/12870
    (4, 0, 3, 0.0),
    (4, 1, 4, 1.0),
    (4, 2, 3, 1.0),  # only two wrong ones
    (4, 3, 1, 0.75),
  ],
)
def test_pass_at_k_by_hand(n, c, k, want):
  assert stats.pass_at_k(n, [c], k) == pytest.approx([want], abs=1e-6)


def test_pass_at_k_is_the_mean_over_all_subsets():
  right = np.array([1, 0, 0, 1, 0, 0])
  for k in range(1, 7):
    subsets = [right[list(s)].any() for s in itertools.combinations(range(6), k)]
    assert stats.pass_at_k(6, [2], k) == pytest.approx([np.mean(subsets)])


@pytest.mark.parametrize(
  'votes, right, want',
  [
    ([1, 2, 2, 0, 1], [1, 0, 0, 0, 1], 1.0),  # a tie: the one seen first
    ([2, 1, 2, 0, 1], [0, 1, 0, 0, 1], 0.0),
    ([0, 0], [0, 0], 0.0),
    ([0, 0, 0, 4], [0, 0, 0, 1], 1.0),  # 0 is no vote
  ],
)
def test_majority_by_hand(votes, right, want):
  assert stats.majority(votes, right) == want


def test_majorities_use_blocks():
  votes, right = [1, 2, 2, 1, 1, 6], np.array([1, 0, 0, 1, 1, 0])
  assert stats.majorities(votes, right, 3) == 0.5  # 2 wins the first block, 1 the second
  assert stats.majorities(votes, right, 4) == 1.0  # 1 ties with 2 and came first
  assert stats.majorities(votes, right, 1) == 0.5


def test_pairing_removes_the_spread_between_problems():
  before = np.array([0.0, 0.5, 1.0, 0.2])
  assert stats.paired_gain(before, before + 0.25) == pytest.approx((0.25, 0.25, 0.25))


# ------------------------------------------------------------------------------------ think length


class Characters:
  """One id per character: a tag is seven or eight tokens."""

  def decode(self, ids, skip_special):
    assert not skip_special
    return ''.join(map(chr, ids))


class Pieces:
  """Ids are pieces that cut through the tags, as a pretrained tokenizer's do."""

  PIECES = ('<', 'think', '>', 'a', 'bc', '</', ' d', '></', '>bc', 'bc</')

  def decode(self, ids, skip_special):
    return ''.join(self.PIECES[i] for i in ids)


def completion(tokenizer, ids, stop=records.Stop.LENGTH, prefill=''):
  said = ids[:-1] if stop == records.Stop.EOS else ids
  text = prefill + tokenizer.decode(list(said), skip_special=False)
  return records.Completion(text, tuple(ids), len(ids), records.think_span(text), stop, 99)


def think_tokens(tokenizer, ids, stop=records.Stop.LENGTH, prefill=''):
  made = completion(tokenizer, list(ids), stop, prefill)
  return evaluation.think_tokens(tokenizer, made)


BYTES = tokenizers.Bytes()


@pytest.mark.parametrize(
  'text, want',
  [
    ('<think>abc</think><answer>1</answer>', 3),
    ('so <think>abc</think>', 3),
    ('<think></think>', 0),
    ('<think>abc', 3),  # never closed: all of it is thinking
    ('<think>', 0),
    ('abc</think>', 0),
    ('', 0),
    ('<think>a</think><think>abc</think>', 1),
    ('</think><think>ab</think>', 2),
  ],
)
def test_think_tokens_by_hand(text, want):
  assert think_tokens(BYTES, BYTES.encode(text)) == want  # tags are single tokens
  assert think_tokens(Characters(), map(ord, text)) == want  # tags are spelt out


def test_think_tokens_counts_ids_not_characters():
  pieces = [0, 1, 2, 4, 4, 6, 5, 1, 2]  # < think > bc bc ' d' </ think >
  assert think_tokens(Pieces(), pieces) == 3
  assert think_tokens(Pieces(), [0, 1, 7, 1, 2]) == 0  # < think ></ think >
  assert think_tokens(Pieces(), [0, 1, 8, 3, 9, 1, 2]) == 1  # < think >bc a bc</ think >
  assert think_tokens(BYTES, BYTES.encode('<think>é✓</think>')) == 5  # bytes of two characters
  assert think_tokens(BYTES, BYTES.encode('é✓<think>é✓</think>✓')) == 5


@pytest.mark.parametrize('text, want', [('abc</think>', 3), ('abc', 3), ('', 0), ('</think>', 0)])
def test_think_tokens_after_a_prefilled_tag(text, want):
  ids = BYTES.encode(text)
  assert think_tokens(BYTES, ids, prefill='<think>') == want
  assert think_tokens(BYTES, ids, prefill='Well. <think>') == want


def test_eos_is_not_thinking():
  ids = [*BYTES.encode('<think>abc'), BYTES.eos_ids[0]]
  assert think_tokens(BYTES, ids, records.Stop.EOS) == 3
  assert think_tokens(BYTES, ids[:-1], records.Stop.LENGTH) == 3


@given(st.lists(st.sampled_from(['<think>', '</think>', 'x', ' ', '<', 'é'])), st.booleans())
def test_think_tokens_equals_the_span_for_one_token_per_character(parts, eos):
  text = ''.join(parts)
  ids = [*map(ord, text), *([0] if eos else [])]
  got = think_tokens(Characters(), ids, records.Stop.EOS if eos else records.Stop.LENGTH)
  span = records.think_span(text)
  assert got == (len(text.partition('<think>')[2]) if span is None else len(span))


# ------------------------------------------------------------------------------------ summaries


def sample(rewards=(1.0, 0.0, 0.5, 0.5), lengths=(1, 3, 2, 2)):
  found = tiny.experience(list(rewards), [0, 0, 1, 1], list(lengths))
  cut = dataclasses.replace(found.completions[1], stop=records.Stop.LENGTH, text='<think>xx')
  cut = dataclasses.replace(cut, token_ids=tuple(BYTES.encode('<think>xx')))
  return dataclasses.replace(found, completions=(found.completions[0], cut, *found.completions[2:]))


def summary(experience):
  return evaluation.summary(evaluation.outcomes(experience, BYTES, 'accuracy'))


def test_summary_by_hand():
  got = summary(sample())
  assert got == pytest.approx(
    {
      'reward': 0.5,
      'reward_std': math.sqrt(0.5 / 3),
      'reward/accuracy': 0.5,
      'accuracy': 0.25,  # half a reward is not right
      'completion_length': 2.0,
      'think_length': 0.5,
      'truncated': 0.25,
      'eos_rate': 0.75,
      'stopped_length': 5 / 3,
      'zero_variance_groups': 0.5,
      'unmasked_tokens': 0.0,
    }
  )


def test_the_example_says_which_reward_decides():
  found = sample((1.0, 1.0, 0.0, 0.0))
  sums = np.float32([0.0, np.nan, 1.0, 0.0])
  examples = [dataclasses.replace(e, meta={records.CHECKED_BY: 'sum'}) for e in found.examples]
  mixed = (*found.examples[:1], *examples[1:])
  found = dataclasses.replace(found, examples=mixed, parts=found.parts | {'sum': sums})
  np.testing.assert_array_equal(evaluation.right(found, 'accuracy'), [1, 0, 1, 0])


def test_summary_leaves_nan_rewards_out():
  got = summary(sample((1.0, np.nan, 0.5, np.nan)))
  assert got['reward'] == got['reward/accuracy'] == 0.75
  assert got['reward_std'] == pytest.approx(math.sqrt(0.125))
  assert got['zero_variance_groups'] == 1.0
  assert math.isnan(summary(sample((np.nan,) * 4))['reward'])


def test_summary_counts_sampled_tokens_outside_the_mask():
  found = sample()
  source = found.source_BT.copy()
  source[1, 3] = types.PROMPT
  changed = dataclasses.replace(found, source_BT=source)
  assert summary(changed)['unmasked_tokens'] == 1.0 and 'written_length' not in summary(changed)
  source[1, 3] = types.ENVIRONMENT  # what a control wrote is marked as well
  written = summary(dataclasses.replace(found, source_BT=source))
  assert written['unmasked_tokens'] == 0.0
  assert written['written_length'] == 1 / len(found.completions)


def test_outcomes_of_two_processes_are_in_the_order_of_the_data(monkeypatch):
  # Of problems 0, 1, 2, 3 process 0 has 0 and 2, process 1 has 1 and 3; its reward named a part.
  def gather(mine):
    other = {name: [10 + x for x in column] for name, column in mine.items()}
    return [mine, other | {'group': mine['group'], 'reward/accuracy/part': [0.5] * 4}]

  monkeypatch.setattr(evaluation.sharding, 'gather', gather)
  table = evaluation.outcomes(sample(), BYTES, 'accuracy')
  assert table['group'].tolist() == [0, 0, 2, 2, 1, 1, 3, 3]
  assert table['reward'].tolist() == [1.0, 0.0, 0.5, 0.5, 11.0, 10.0, 10.5, 10.5]
  assert np.isnan(table['reward/accuracy/part'][:4]).all()
  assert evaluation.summary(table)['reward/accuracy/part'] == 0.5


def test_transcripts_pair_rows_with_their_rollouts():
  found = sample()
  adv_BT = np.array([[2.0], [-1.0], [0.5], [-0.5]]) * found.mask_BT
  got = evaluation.transcripts(found, adv_BT, 2, 'accuracy')
  assert [row['prompt'] for row in got] == ['p0', 'p2']  # spread over the batch
  assert got[0] == {
    **{'prompt': 'p0', 'completion': 'c0', 'answer': 'a', 'reward': 1.0, 'advantage': 2.0},
    **{'right': True, 'parts': {'accuracy': 1.0}, 'length': 1, 'stop': 'eos', 'index': 0},
  }
  order = np.array([2, 3, 0, 1])  # rows shuffled, rollouts not
  shuffled = evaluation.transcripts(rollouts.take_rows(found, order), adv_BT[order], 2, 'accuracy')
  assert shuffled == got
  assert len(evaluation.transcripts(found, None, 99, 'accuracy')) == 4
  assert evaluation.transcripts(found, None, 0, 'accuracy') == []
  assert evaluation.transcripts(found, None, 1, 'accuracy')[0]['advantage'] is None


# ------------------------------------------------------------------------------------ evaluate


@dataclasses.dataclass(frozen=True)
class Env:
  """Returns a fixed outcome per problem and remembers how it was asked."""

  num_generations: int
  temperature: float
  top_k: int
  top_p: float
  asked: list

  def rollout(self, tools, state, step):
    self.asked.append((self.num_generations, self.temperature, self.top_k, self.top_p, step))
    G = self.num_generations
    outcomes = np.repeat([1.0, 0.0, 1.0], G)
    if G > 1:
      outcomes[0], outcomes[-1] = 0.0, np.nan  # a NaN is not right
    found = tiny.experience(outcomes, np.repeat([0, 1, 2], G), np.full(3 * G, 2))
    levels = np.repeat(['hard', 'easy', 'hard'], G).tolist()
    examples = [
      dataclasses.replace(example, meta={'level': level})
      for example, level in zip(found.examples, levels, strict=True)
    ]
    return dataclasses.replace(found, examples=tuple(examples))


def test_evaluate_greedy_and_sampled():
  settings = evaluation.Evaluation(num_examples=3, correct='accuracy', by='')
  asked = []
  tools = types.Tools(*[None] * len(dataclasses.fields(types.Tools)))
  tools = dataclasses.replace(tools, tokenizer=BYTES, prefill='')
  votes = lambda experience: np.arange(1, 1 + experience.reward_R.size)  # each its own
  metrics, found = evaluation.evaluate(settings, Env(2, 0.6, 5, 0.9, asked), tools, {}, votes)
  # The same random keys at every evaluation: the step they see is 0.
  assert asked == [(1, 0.0, 5, 0.9, 0), (2, 0.6, 5, 0.9, 0)]
  assert metrics['eval/greedy/outcomes'] == [1.0, 0.0, 1.0]
  assert metrics['eval/sampled/outcomes'] == [0.5, 0.0, 0.5]
  assert metrics['eval/greedy/accuracy'] == pytest.approx(2 / 3)
  assert metrics['eval/sampled/accuracy'] == pytest.approx(1 / 3)
  # Problems count, not samples: sd of (.5, 0, .5) is .288675, and 1.96 sd / sqrt(3) = .326661.
  assert metrics['eval/sampled/accuracy_low'] == pytest.approx(1 / 3 - 0.326661, abs=1e-5)
  assert metrics['eval/sampled/accuracy_high'] == pytest.approx(1 / 3 + 0.326661, abs=1e-5)
  low, high = stats.wilson(2 / 3, 3)  # of one sample each
  assert metrics['eval/greedy/accuracy_low'] == pytest.approx(low)
  assert metrics['eval/greedy/accuracy_high'] == pytest.approx(high)
  assert metrics['eval/sampled/pass@2'] == pytest.approx(2 / 3)
  assert metrics['eval/sampled/majority@2'] == pytest.approx(1 / 3)  # samples 0,1 | 0,0 | 1,nan
  assert not [name for name in metrics if name.startswith('eval/greedy/pass@')]
  plain, _ = evaluation.evaluate(settings, Env(2, 0.6, 5, 0.9, []), tools, {}, None)
  assert set(metrics) - set(plain) == {
    f'eval/sampled/majority@2{end}' for end in ('', '_low', '_high')
  }
  assert not [name for name in metrics if '=' in name]
  assert metrics['eval/sampled/completion_length'] == 2.0
  assert found['sampled'].reward_R.size == 6 and found['greedy'].reward_R.size == 3


def test_accuracy_and_length_by_a_fact_of_the_examples():
  settings = evaluation.Evaluation(num_examples=3, correct='accuracy', by='level')
  tools = types.Tools(*[None] * len(dataclasses.fields(types.Tools)))
  tools = dataclasses.replace(tools, tokenizer=BYTES, prefill='')
  metrics, _ = evaluation.evaluate(settings, Env(2, 0.6, 5, 0.9, []), tools, {}, None)
  assert {name: value for name, value in metrics.items() if '=' in name} == {
    **{
      f'eval/{mode}/think_length/level={level}': 0.0
      for mode, level in itertools.product(('greedy', 'sampled'), ('easy', 'hard'))
    },
    **{
      'eval/greedy/reward/accuracy/level=easy': 0.0,
      'eval/greedy/reward/accuracy/level=hard': 1.0,
    },
    **{'eval/sampled/reward/accuracy/level=easy': 0.0},
    **{'eval/sampled/reward/accuracy/level=hard': 0.5},
    **{'eval/greedy/accuracy/level=easy': 0.0, 'eval/greedy/accuracy/level=hard': 1.0},
    **{'eval/sampled/accuracy/level=easy': 0.0, 'eval/sampled/accuracy/level=hard': 0.5},
    **{f'eval/greedy/completion_length/level={level}': 2.0 for level in ('easy', 'hard')},
    **{f'eval/sampled/completion_length/level={level}': 2.0 for level in ('easy', 'hard')},
  }
