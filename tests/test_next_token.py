"""RLP: the rows of a rollout token by token, the reward, and what the method's theory says of both.

Environment: tools that answer by a table. Theory: a tiny decoder whose thoughts can be enumerated.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from reasonrl import controls, learner, packing, records, rl_math, tokenizers, types
from reasonrl.configs import common
from reasonrl.envs import next_token
from reasonrl.rewards import REWARDS

BYTES = tokenizers.Bytes()
(OPEN,), (CLOSE,) = BYTES.encode('<think>'), BYTES.encode('</think>')
EOS = BYTES.eos_ids[0]
TEXTS = ('abcdef', 'ghi')


def environment(**changes):
  fields = common.next_token().to_dict() | {
    **{'num_generations': 2, 'max_thought': 3, 'max_context': 4, 'temperature': 1.0},
    **{'position_sampler': 'class', 'class_weights': {'here': 1.0}},
  }
  return next_token.NextToken(**{k: v for k, v in (fields | changes).items() if k != 'name'})


class Tools:
  """Two texts, to be thought about at one token each; thoughts and scores come from tables."""

  tokenizer = BYTES
  # Said behind a prompt, sample by sample; CLOSE ends a thought.
  says = ([120, CLOSE], [121, 122, 123])

  def __init__(self, texts=TEXTS, at=(3, 2)):
    self.texts, self.at, self.asked, self.scored, self.keys = texts, at, [], [], []

  def examples(self):
    return [
      records.Example(
        **{'task': 't', 'split': 'train', 'index': 7 + i, 'problem': '', 'answer': ''},
        solution=text,
        meta={'text': 'whole', 'classes': [[at, at + 1, 'here', 'xy']]},
      )
      for i, (text, at) in enumerate(zip(self.texts, self.at, strict=True))
    ]

  def text(self, example):
    return np.asarray([*BYTES.encode(example.solution), EOS], np.int32), 0

  def row_keys(self, step, prompt_R, sample_R, thread_R):
    self.keys.append((np.asarray(prompt_R).tolist(), np.asarray(sample_R).tolist(), thread_R))
    return np.zeros((np.size(prompt_R), 2), np.uint32)

  def generate(self, params, requests, spec, slots):
    self.asked.append((params, requests, spec))
    R = requests.prompt_R.size
    width = requests.tokens_PT.shape[1] + int(requests.max_new_R.max())
    said = [
      list(self.says[r % 2]) if spec.controls else [200 + r][: requests.max_new_R[r]]
      for r in range(R)
    ]
    start = requests.length_P[requests.prompt_R]
    tokens, logp = np.zeros((R, width), np.int32), np.zeros((R, width), np.float32)
    for r in range(R):
      span = slice(start[r], start[r] + len(said[r]))
      tokens[r, : start[r]] = requests.tokens_PT[requests.prompt_R[r], : start[r]]
      tokens[r, span], logp[r, span] = said[r], -np.arange(1, len(said[r]) + 1)
    length = start + np.asarray([len(x) for x in said])
    closed = [x[-1] == CLOSE for x in said]
    stop = np.where(closed, int(records.Stop.EOS), int(records.Stop.LENGTH))
    kept = tokens[..., None] if spec.truncates else None
    return types.Samples(tokens, start, length, tokens > 0, logp, logp, 0 * logp, stop, kept)

  def score(self, params, rows):
    """log p = -(token before + 1000 token) / 1e6, or twice that of the average."""
    self.scored.append((params, rows))
    before = np.pad(rows.tokens_BT[:, :-1], ((0, 0), (1, 0)))
    logp = -(before + 1000.0 * rows.tokens_BT) / 1e6 * (2 if params == 'ema' else 1)
    mask = rows.drawn_BT + rows.plain_BT
    assert mask.max() == 1 and not (mask[:, 0]).any()
    even = (rows.tokens_BT % 2 == 0) * mask
    entropy = np.arange(rows.tokens_BT.shape[1]) * mask
    return types.Scores(np.float32(logp * mask), np.float32(entropy), np.float32(even))

  def reward(self, state, experience):
    return experience


STATE = {'params': 'policy', 'ema': 'ema', 'ref': 'ref', 'version': 5}


def rollout(tools=None, **changes):
  tools = tools or Tools()
  return environment(**changes).rollout(tools, STATE, step=3), tools


def row(experience, b):
  return experience.tokens_BT[b, : experience.length_B[b]].tolist()


def ids(text):
  return BYTES.encode(text)


def test_rows_token_by_token():
  """context | <think> | thought, </think> sampled or written | the next token of the text."""
  found, tools = rollout()
  assert row(found, 0) == [*ids('abc'), OPEN, 120, CLOSE, *ids('d')]
  assert row(found, 1) == [*ids('abc'), OPEN, 121, 122, 123, CLOSE, *ids('d')]
  assert row(found, 2) == [*ids('gh'), OPEN, 120, CLOSE, *ids('i')]
  P, S, E = types.PROMPT, types.POLICY, types.ENVIRONMENT
  assert found.source_BT[:3].tolist() == [
    [P, P, P, P, S, S, P, 0, 0],
    [P, P, P, P, S, S, S, E, P],  # the tag was written
    [P, P, P, S, S, P, 0, 0, 0],
  ]
  assert found.mask_BT.sum() == 2 + 3 + 2 + 3  # exactly the sampled tokens
  assert found.logp_BT[1].tolist() == [0, 0, 0, 0, -1, -2, -3, 0, 0]
  assert found.prompt_length_B.tolist() == [4, 4, 3, 3] and found.group_B.tolist() == [0, 0, 1, 1]
  assert [int(stop) for stop in found.stop_B] == [1, 2, 1, 2] and set(found.version_B) == {5}
  # The first token could not be </think>, and none of them <think> or EOS.
  assert sorted(found.support['barred'][1, 4]) == sorted([CLOSE, OPEN, EOS])
  assert sorted(found.support['barred'][1, 5]) == sorted([-1, OPEN, EOS])
  assert (found.support['barred'][found.mask_BT == 0] == -1).all() and 'kept' not in found.support
  assert found.completions[1].think == BYTES.decode([121, 122, 123], skip_special=False)
  assert found.completions[1].text == f'<think>{found.completions[1].think}</think>'
  assert found.completions[0].num_tokens == 2 and found.completions[1].num_tokens == 4
  example = found.examples[1]
  assert (example.problem, example.answer, example.index) == ('abc', 'd', 7)
  assert (example.meta['class'], example.meta['trace'], example.meta['position']) == (
    'here',
    'xy',
    3,
  )


def test_the_next_token_is_never_visible_to_the_sampler():
  """Texts that differ from the position on are asked for in the same way."""
  _, tools = rollout()
  _, others = rollout(Tools(('abcXYZ', 'gh!')))
  ((params, requests, spec),), ((_, same, _),) = tools.asked, others.asked
  for field in dataclasses.fields(types.Requests):
    np.testing.assert_array_equal(getattr(requests, field.name), getattr(same, field.name))
  assert requests.tokens_PT[0, :5].tolist() == [*ids('abc'), OPEN, 0] and params == 'policy'
  assert spec.controls == (controls.Thought.of(BYTES, 1, tuple(sorted((EOS, OPEN)))),)
  # Keys: of the position apart from those of the thoughts, which differ by sample.
  assert tools.keys == [([7, 8], 0, 2), ([7, 7, 8, 8], [0, 1, 0, 1], 0)]


def test_predictions_are_read_at_the_closing_tag_and_at_the_last_token_of_the_context():
  found, tools = rollout()
  (think, no_think) = tools.scored
  assert (think[0], no_think[0]) == ('policy', 'ema')
  logp = lambda before, token: -(before + 1000 * token) / 1e6
  d, i = ids('di')
  want = [[logp(CLOSE, d)]] * 2 + [[logp(CLOSE, i)]] * 2
  np.testing.assert_allclose(found.scores['predicted'], want, rtol=1e-5)
  c, h = ids('ch')
  want = [[2 * logp(c, d)]] * 2 + [[2 * logp(h, i)]] * 2
  np.testing.assert_allclose(found.scores['unthought'], want, rtol=1e-5)
  assert found.scores['predicted_likeliest'][:, 0].tolist() == [d % 2 == 0] * 2 + [i % 2 == 0] * 2
  # One pass for both: old log-probabilities are those of the sampled tokens.
  assert (found.scores['old_logp'] != 0).tolist() == (found.mask_BT > 0).tolist()
  # Without a thought, once for a context: the text itself, and the token as text.
  rows = no_think[1]
  assert rows.length_B.tolist() == [4, 3] and rows.tokens_BT[0].tolist() == ids('abcd')
  assert rows.plain_BT.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]] and not rows.drawn_BT.any()
  assert tools.scored[0][1].plain_BT.sum(1).tolist() == [1, 1, 1, 1]


def test_a_horizon_is_teacher_forced():
  found, _ = rollout(horizon=2, tools=Tools(at=(3, 1)))
  assert row(found, 0) == [*ids('abc'), OPEN, 120, CLOSE, *ids('de')]
  logp = lambda before, token: -(before + 1000 * token) / 1e6
  d, e = ids('de')
  np.testing.assert_allclose(found.scores['predicted'][0], [logp(CLOSE, d), logp(d, e)], rtol=1e-5)
  np.testing.assert_allclose(found.scores['unthought'][0, 1], 2 * logp(d, e), rtol=1e-5)
  # A text that is too short is left out; none at all is an error, as is a held-out one.
  found, _ = rollout(horizon=4)
  assert [e.index for e in found.examples] == [7, 7] and found.group_B.tolist() == [0, 0]
  with pytest.raises(records.UserError, match='no text of a step has the 9 tokens or more'):
    rollout(horizon=8)
  with pytest.raises(records.UserError, match='t/train/8 has 4 tokens, but 5 are the least'):
    environment(horizon=4).fits(Tools(), Tools().examples()[1])
  problem = dataclasses.replace(Tools().examples()[0], meta={})
  with pytest.raises(records.UserError, match="reads texts; task 't' has problems"):
    environment().fits(Tools(), problem)


@pytest.mark.parametrize('no_think, role', [('policy', 'policy'), ('ref', 'ref'), ('ema', 'ema')])
def test_whose_prediction_it_is_compared_with(no_think, role):
  _, tools = rollout(no_think=no_think)
  assert tools.scored[1][0] == role
  assert environment(no_think=no_think).reads == {role} - {'policy'}
  look = {'predicts': 1, 'no_think': no_think}
  assert environment(**look).reads == set()
  assert environment(position_sampler='topq_entropy', **look).reads == {role} - {'policy'}


def test_an_empty_thought_may_be_compared_with():
  _, tools = rollout(no_think='empty_think')
  params, rows = tools.scored[1]
  assert params == 'ema' and rows.tokens_BT[0, :6].tolist() == [*ids('abc'), OPEN, CLOSE, *ids('d')]


def test_thoughts_of_another_position_are_a_control():
  tools = Tools()
  tools.says = ([120, CLOSE], [121, CLOSE])
  found, _ = rollout(tools, thoughts='other')
  assert row(found, 0) == [*ids('abc'), OPEN, 120, CLOSE, *ids('d')]  # trained as they are
  found, tools = rollout(thoughts='other')
  scored = tools.scored[0][1]
  assert scored.tokens_BT[1, : scored.length_B[1]].tolist() == [
    *[*ids('abc'), OPEN, 121, 122, 123, CLOSE],
    *ids('d'),
  ]
  assert 'old_logp' not in found.scores and not scored.drawn_BT.any()
  # Those of another text, though the next position is of the same.
  tools = Tools()
  rollout(tools, thoughts='other', position_sampler='uniform', positions_per_text=2)
  scored = tools.scored[0][1]
  asked = tools.asked[0][1].length_P - 1  # tokens of each context
  said = lambda b: scored.tokens_BT[b, asked[b // 2] + 1]
  assert [said(b) for b in range(8)] == [120, 121] * 4
  with pytest.raises(records.UserError, match='needs two texts in a step'):
    rollout(Tools(TEXTS[:1], (3,)), thoughts='other')


def test_what_is_said_instead_is_sampled_and_trained():
  found, tools = rollout(predicts=1)
  assert row(found, 0) == [*ids('abc'), OPEN, 120, CLOSE, 200]
  assert row(found, 1) == [*ids('abc'), OPEN, 121, 122, 123, CLOSE, 201]
  P, S, E = types.PROMPT, types.POLICY, types.ENVIRONMENT
  assert found.source_BT[1].tolist() == [P, P, P, P, S, S, S, E, S]
  assert found.logp_BT[1].tolist() == [0, 0, 0, 0, -1, -2, -3, 0, -1]
  assert (found.support['barred'][1, 8] == -1).all()  # it could be anything
  assert not tools.scored and found.scores == {} and environment(predicts=1).reads == set()
  _, behind, spec = tools.asked[1]
  assert behind.tokens_PT[1, :9].tolist() == [*row(found, 1)[:8], 0] and spec.controls == ()
  said = BYTES.decode([201], skip_special=False)
  meta = found.examples[1].meta
  assert (meta['said_id'], meta['said'], meta['said_size']) == (201, said, 1)
  assert found.examples[0].answer == 'def'[: len(said.encode())]
  costs = next_token.token_forwards(found, environment(predicts=1))
  whole = 7 + 9 + 6 + 8
  assert costs['token_forwards/prefill'] == 4 + 3 + (whole - 4)  # and behind the thoughts again
  assert costs['token_forwards/train'] == 3 * whole and 'token_forwards/score' not in costs


def test_the_end_of_what_is_said_is_no_part_of_it():
  tools = Tools()
  generate = tools.generate

  def says_d_and_stops(params, requests, spec, slots):
    out = generate(params, requests, spec, slots)
    if not spec.controls:
      for r, (a, b) in enumerate(zip(out.prompt_length_R, out.length_R, strict=True)):
        out.tokens_RS[r, a : b + 1] = [ids('d')[0], EOS]
      out = dataclasses.replace(out, length_R=out.length_R + 1)
    return out

  tools.generate = says_d_and_stops
  found, _ = rollout(tools, predicts=2)
  match = REWARDS['prefix_match'](boxed=False)
  values = [match(e, c).value for e, c in zip(found.examples, found.completions, strict=True)]
  assert values == [1, 1, 0, 0]  # 'abc|d', 'gh|i'
  assert found.mask_BT.sum(1).tolist() == [4, 5, 4, 5]  # EOS is trained


def test_context_instruction_and_untrained_tag():
  found, tools = rollout(max_context=2, instruction='!!', train_close=False)
  assert row(found, 0) == [*ids('!!bc'), OPEN, 120, CLOSE, *ids('d')]
  assert found.mask_BT.sum(1).tolist() == [1, 3, 1, 3]
  assert tools.scored[1][1].tokens_BT[0].tolist() == ids('bcd')  # who does not think has none


def test_truncated_draws_remember_what_was_kept():
  found, _ = rollout(top_k=2)
  np.testing.assert_array_equal(found.support['kept'][..., 0] >= 0, found.mask_BT > 0)


def test_the_least_certain_positions():
  """The table says: certainty falls along the text."""
  found, tools = rollout(position_sampler='topq_entropy', top_entropy=0.1)
  assert [e.meta['position'] for e in found.examples[::2]] == [4, 3]  # of 'abcd|e', 'ghi|EOS'
  assert tools.scored[0][1].plain_BT.sum(1).tolist() == [4, 3]


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'position_sampler': 'best'}, "position_sampler='best' is not one of"),
    ({'no_think': 'frozen'}, "no_think='frozen' is not one of"),
    ({'min_thought': 3}, 'max_thought=3 must be above min_thought=3'),
    ({'class_weights': {'a': 0.8, 'b': 0.3}}, 'sum of them at most 1'),
    ({'horizon': 0}, 'horizon=0 must be at least 1'),
    ({'thoughts': 'other', 'predicts': 1}, "thoughts='other' needs predicts=0"),
    ({'top_entropy': 0.0}, 'top_entropy=0.0'),
  ],
)
def test_settings_that_are_refused(changes, message):
  with pytest.raises(records.UserError, match=message):
    environment(**changes)


def test_token_forwards_by_hand():
  """Contexts of 3 and 2 tokens with <think>, two thoughts of at most 3 tokens each."""
  found, _ = rollout()
  got = next_token.token_forwards(found, environment())
  got = {name.removeprefix('token_forwards/'): value for name, value in got.items()}
  whole = 7 + 9 + 6 + 8
  assert got['prefill'] == 4 + 3 and got['no_think'] == 3 + 2 + 2
  assert got['decode'] == 2 + 4 + 2 + 4  # the written tag as well
  assert (got['score'], got['train']) == (whole, 3 * whole)
  assert got['total'] == 7 + 7 + 12 + 4 * whole
  Lc, L, B, G = 3.5, 3, 2, 2
  assert got['formula'] == B * Lc + B * G * L + B * G * (Lc + L) + B * Lc + 3 * B * G * (Lc + L)


# ------------------------------------------------------------------------------------ the reward


def gains(think, no_think, **changes):
  """information_gain of rollouts with these log-probabilities, [R, H], in one group."""
  fields = common.rewards(information_gain=1.0).information_gain.to_dict() | changes
  fields.pop('weight')
  scores = {'predicted': np.float32(think), 'unthought': np.float32(no_think)}
  R = len(think)
  found = tiny.experience([0] * R, [0] * R, [1] * R, scores=scores)
  return REWARDS['information_gain'](**fields).batch(None, {}, found)


def test_the_published_numbers():
  """p(x|c) = .5, .25, .8, .1 against .25 without a thought; with .9 the advantages are the same."""
  p = np.log([[0.5], [0.25], [0.8], [0.1]])
  r, parts, _ = gains(p, np.full((4, 1), math.log(0.25)))
  np.testing.assert_allclose(r, [0.69315, 0, 1.16315, -0.91629], atol=1e-5)
  assert parts['positive'].tolist() == [1, 0, 1, 0]
  # Jensen: the mean of the logs is no more than the log of the mean.
  np.testing.assert_allclose(
    parts['marginal'], math.log((0.5 + 0.25 + 0.8 + 0.1) / 4 / 0.25), atol=1e-6
  )
  assert r.mean() < parts['marginal'][0]
  other, _, _ = gains(p, np.full((4, 1), math.log(0.9)))
  want = [0.61086, -0.31334, 1.23753, -1.53506]
  for rewards in (r, other):
    np.testing.assert_allclose(advantage(rewards), want, atol=1e-5)


def test_horizon_clip_and_floor_by_hand():
  think, no_think = np.log([[0.5, 0.4]]), np.log([[0.25, 0.5]])
  assert gains(think, no_think)[0] == pytest.approx([0.47000], abs=1e-5)
  r, parts, _ = gains(think, no_think, discount=0.5)
  assert r == pytest.approx([0.58158], abs=1e-5)
  assert parts['per_token'] == pytest.approx([0.58158 / 1.5], abs=1e-5)
  assert gains(think, no_think, clip=0.1)[0] == pytest.approx([0.1])
  assert gains([[-np.inf]], [[-1.0]])[0] == pytest.approx([-29.0])
  assert gains([[-1.0]], [[-1e9]])[0] == pytest.approx([29.0])
  with pytest.raises(records.UserError, match='clip=0.0 must be above 0'):
    gains(think, no_think, clip=0.0)


def advantage(rewards, preset='rlp', groups=None, **changes):
  groups = groups or [0] * len(rewards)
  found = tiny.experience(rewards, groups, [1] * len(rewards))
  return tiny.algorithm(preset, **changes).advantages(found)[:, 2]


def test_leave_one_out_is_rloo_and_forgets_what_a_group_shares():
  """A_i = G/(G-1) (r_i - mean) = r_i - mean of the others: the average's score cancels."""
  rng = np.random.default_rng(0)
  rewards, groups = rng.normal(size=12), [0] * 4 + [1] * 8
  got = advantage(rewards, groups=groups)
  for g, size in ((0, 4), (1, 8)):
    r = rewards[np.asarray(groups) == g]
    others = (r.sum() - r) / (size - 1)
    np.testing.assert_allclose(got[np.asarray(groups) == g], r - others, atol=1e-6)
    assert abs(got[np.asarray(groups) == g].sum()) < 1e-5
  moved = rewards - np.asarray([3.0] * 4 + [-2.0] * 8)  # another average to compare with
  np.testing.assert_allclose(advantage(moved, groups=groups), got, atol=1e-5)
  with_mean = lambda r: advantage(r, groups=groups, baseline='batch_mean')
  np.testing.assert_allclose(with_mean(rewards), rewards - rewards.mean(), atol=1e-6)
  assert np.abs(with_mean(moved) - with_mean(rewards)).max() > 1


def test_a_group_that_only_loses_still_ranks_its_thoughts():
  """The paper's illustration: policy .25 exp(.5 A), expected reward before and after."""
  policy = np.full(4, 0.25)
  for r, want, before, after in (
    ((-0.8, -0.6, -0.5, -0.3), (0.2101, 0.2401, 0.2566, 0.2932), -0.5500, -0.5284),
    ((-0.8, -0.6, -0.35, -0.1), (0.1618, 0.2113, 0.2668, 0.3601), -0.4313, -0.3856),
    ((-0.8, -0.6, -0.2, 0.05), (0.1127, 0.1681, 0.2772, 0.4420), -0.2916, -0.2244),
  ):
    assert policy @ np.asarray(r) == pytest.approx(before, abs=2e-4)
    policy = policy * np.exp(0.5 * advantage(r))
    policy /= policy.sum()
    np.testing.assert_allclose(policy, want, atol=2e-4)
    assert policy @ np.asarray(r) == pytest.approx(after, abs=2e-4)


def test_the_surrogate_by_hand():
  """Two tokens with ratios 1.3 and .7, their mean: -.95, 1.05, and -.99 with a higher bound."""
  loss = lambda adv, high: float(
    jnp.mean(rl_math.ppo_clip(jnp.asarray([1.3, 0.7]), adv, 0.2, high, None, None)[0])
  )
  assert (loss(1.0, 0.2), loss(-1.0, 0.2)) == (pytest.approx(-0.95), pytest.approx(1.05))
  assert loss(1.0, 0.28) == pytest.approx(-0.99)
  found = tiny.experience([1, 0], [0, 0], [2, 3])
  weight_BT, denominator = tiny.algorithm('rlp').weights(found)
  assert weight_BT.sum(1).tolist() == [1, 1] and denominator == 2  # mean over thoughts of means


@pytest.mark.parametrize(
  'said, want',
  [('', 0), ('param', 1), ('parameter', 1), ('parame', 0), ('parameters', 0), ('x', 0)],
)
def test_prefix_matching(said, want):
  meta = {'said': said, 'next_bytes': [5, 9, 13]}  # "param", "eter", " set"
  example = records.Example('t', 'train', 0, '', 'parameter set', None, meta)
  assert REWARDS['prefix_match'](boxed=False)(example, None).value == want
  boxed = dataclasses.replace(example, meta={**meta, 'said': f'\\boxed{{no}} \\boxed{{{said}}}!'})
  assert REWARDS['prefix_match'](boxed=True)(boxed, None).value == want
  nobody = dataclasses.replace(example, meta={'next_bytes': [1]})
  assert REWARDS['prefix_match'](boxed=False)(nobody, None).value is None


def test_token_match_by_hand():
  reward = REWARDS['token_match']()
  scores = {'predicted_likeliest': np.eye(2)[:, :1], 'unthought_likeliest': np.ones((2, 1))}
  found = tiny.experience([0, 0], [0, 0], [1, 1], scores=scores)
  value_R, parts, _ = reward.batch(None, {}, found)
  assert value_R.tolist() == [1, 0] and parts['no_think'].tolist() == [1, 1]
  metas = ({'said_id': 4, 'next_id': 4}, {'said_id': 5, 'next_id': 4}, {})
  examples = tuple(records.Example('t', 'train', 0, '', '', None, meta) for meta in metas)
  found = dataclasses.replace(found, scores={}, examples=examples)
  np.testing.assert_array_equal(reward.batch(None, {}, found)[0], [1, 0, np.nan])


# ------------------------------------------------------------------------------------ theory
#
# A tiny decoder over 11 ids. A thought is one of 7 ids and then a tag: all of them are enumerated,
# so that expectations are sums. CONTEXTS are two texts up to a position.

SHUT, START, NEXT = 1, 2, 9  # the closing and opening tag; NEXT occurs as a target alone
MODEL = tiny.model(tied_embeddings=False)
PARAMS = jax.tree.map(lambda x: 1.5 * x, MODEL.init(jax.random.key(3)))
CONTEXTS = ([4, 5, 3], [6, 4, 4])
THOUGHTS = (3, 4, 5, 6, 7, 8, 10)


@jax.jit
def log_softmax(params, tokens_BT):
  """log p of every next token, [B, T, V], of rows without padding."""
  B, T = tokens_BT.shape
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  ones = jnp.ones((B, T), jnp.int32)
  hidden_BTD, _ = MODEL.hidden(params, tokens_BT, positions_BT, ones, None)
  return jax.nn.log_softmax(hidden_BTD @ MODEL.head(params).T)


def think_rows(context):
  """Rows context | START | thought SHUT, one for each thought."""
  return jnp.asarray([[*context, START, c, SHUT] for c in THOUGHTS])


def thought_logps(params, context):
  """log pi of each thought; its one free token is drawn from THOUGHTS alone."""
  first = log_softmax(params, jnp.asarray([[*context, START]]))[0, -1, jnp.asarray(THOUGHTS)]
  return jax.nn.log_softmax(first)


def predictions(params, context):
  """log p(x | context, thought), [thoughts, V]; log p(x | context), [V]."""
  behind = log_softmax(params, think_rows(context))[:, -1]
  return behind, log_softmax(params, jnp.asarray([context]))[0, -1]


def test_the_reward_is_what_cross_entropy_falls_by():
  """Proposition 1: E_{x~p*}[r(c)] = CE(p*, p_ema) - CE(p*, p(. | c)), for every thought."""
  world = np.random.default_rng(0).dirichlet(np.ones(11))
  behind, plain = map(np.float64, predictions(PARAMS, CONTEXTS[0]))
  for c in range(len(THOUGHTS)):
    r = [gains([[behind[c, x]]], [[plain[x]]])[0][0] for x in range(11)]
    assert world @ r == pytest.approx(-(world @ plain) + world @ behind[c], abs=1e-6)


def test_the_mean_reward_bounds_the_gain_of_thinking():
  """Proposition 2: E_c log p(x | c) <= log E_c p(x | c), for every token x."""
  for context in CONTEXTS:
    behind, plain = map(np.float64, predictions(PARAMS, context))
    pi = np.exp(np.float64(thought_logps(PARAMS, context)))
    assert pi.sum() == pytest.approx(1)
    for x in range(11):
      mean, marginal = pi @ behind[:, x] - plain[x], np.log(pi @ np.exp(behind[:, x])) - plain[x]
      assert mean < marginal


def test_the_mean_reward_over_positions_is_the_gain_of_a_text():
  """Proposition 3: thoughts do not see their tokens, so rewards of positions add up to what the
  log-likelihood of the text gains, over all ways to think before each of its tokens."""
  text, rewards, logs, chances, plain = [4, 5, 3, 7], [], [], [], 0.0
  for t in range(1, len(text)):
    behind, alone = map(np.float64, predictions(PARAMS, text[:t]))
    chances.append(np.exp(np.float64(thought_logps(PARAMS, text[:t]))))
    logs.append(behind[:, text[t]])
    r, _, _ = gains(behind[:, [text[t]]], np.full((len(THOUGHTS), 1), alone[text[t]]))
    rewards.append(chances[-1] @ r)
    plain += alone[text[t]]
  thinking = sum(
    np.prod([chances[t][c] for t, c in enumerate(cs)]) * sum(logs[t][c] for t, c in enumerate(cs))
    for cs in itertools.product(range(len(THOUGHTS)), repeat=3)
  )
  whole = np.float64(log_softmax(PARAMS, jnp.asarray([text]))[0])
  assert plain == pytest.approx(sum(whole[t - 1, text[t]] for t in range(1, 4)), abs=1e-5)
  assert np.mean(rewards) == pytest.approx((thinking - plain) / 3, abs=1e-5)


def test_leave_one_out_is_unbiased():
  """E[(1/G) sum_i A_i grad log pi(c_i)] = grad E[r(c)] over all pairs of thoughts (eq. 14)."""
  behind, plain = predictions(PARAMS, CONTEXTS[0])
  r = np.float64(behind[:, NEXT] - plain[NEXT])
  logits = np.random.default_rng(1).normal(size=len(THOUGHTS))
  pi = np.exp(logits) / np.exp(logits).sum()
  score = np.eye(len(THOUGHTS)) - pi  # score[c] = grad log pi(c)
  want = (pi * r) @ score
  got = np.zeros(len(THOUGHTS))
  for a, b in itertools.product(range(len(THOUGHTS)), repeat=2):
    adv = np.float64(advantage([r[a], r[b]]))
    got += pi[a] * pi[b] * (adv[0] * score[a] + adv[1] * score[b]) / 2
  np.testing.assert_allclose(got, want, atol=1e-6)


def experience_of(thoughts, contexts=CONTEXTS, mask=1.0):
  """G thoughts of each context, with NEXT behind them and what the model says of it as reward."""
  rows, rewards, groups = [], [], []
  for g, context in enumerate(contexts):
    behind, plain = predictions(PARAMS, context)
    for c in thoughts:
      rows.append([*context, START, c, SHUT, NEXT])
      rewards.append(float(behind[THOUGHTS.index(c), NEXT] - plain[NEXT]))
      groups.append(g)
  tokens_BT = np.asarray(rows, np.int32)
  at = len(contexts[0]) + 1
  source_BT = np.zeros(tokens_BT.shape, np.int8)
  source_BT[:, at : at + 2], source_BT[:, at + 2] = types.POLICY, types.ENVIRONMENT
  if not mask:
    source_BT[:] = types.PROMPT
  found = tiny.experience(rewards, groups, [3] * len(rows), prompt_length=at)
  return dataclasses.replace(
    found,
    tokens_BT=tokens_BT,
    source_BT=source_BT,
    length_B=np.full(len(rows), tokens_BT.shape[1], np.int32),
    logp_BT=np.zeros(tokens_BT.shape, np.float32),
  )


RLP = tiny.algorithm('rlp')
STUDENT = tiny.make_learner(MODEL, PARAMS, learner.Term(RLP.token_loss, RLP.prepare, 'weight'))


def gradient(found):
  """Loss and gradient, as the loop computes them."""
  adv_BT = RLP.advantages(found)
  weight_BT, denominator = RLP.weights(found)
  aux = {'weight': weight_BT, 'adv': adv_BT, 'sampler_logp': found.logp_BT}
  seqs = packing.sequences(found.tokens_BT, found.length_B, aux)
  batches, _ = packing.pack(seqs, 16, 4, share=True)
  grads, loss, _ = STUDENT.gradients(PARAMS, batches, (denominator or 1.0,))
  return float(loss), jax.device_get(grads)


def test_the_gradient_is_that_of_the_formula():
  """With ratio 1: - 1/(B G) sum A_i / |c_i| sum_u grad log pi(c_iu). The loss itself is 0."""
  found = experience_of((3, 7, 10))
  adv_B = np.float64(advantage(found.reward_R, groups=found.group_B.tolist()))

  def surrogate(params):
    logp_BTV = log_softmax(params, jnp.asarray(found.tokens_BT))
    said = found.tokens_BT[:, 4:6]
    logp_B2 = jnp.take_along_axis(logp_BTV[:, 3:5], said[..., None], axis=2)[..., 0]
    return -jnp.mean(jnp.asarray(adv_B, jnp.float32) * logp_B2.mean(1))

  want = jax.device_get(jax.grad(surrogate)(PARAMS))
  loss, got = gradient(found)
  assert abs(loss) < 1e-6
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  assert largest > 0.01
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_nothing_flows_through_the_text():
  """The embedding of what stands behind the thought alone has no gradient, nor has anything
  without thoughts to train."""
  _, grads = gradient(experience_of((3, 7, 10)))
  table = grads['embed']['weight']
  assert (table[NEXT] == 0).all() and np.abs(table[START]).max() > 1e-4
  loss, grads = gradient(experience_of((3, 7, 10), mask=0.0))
  assert loss == 0 and all((x == 0).all() for x in jax.tree.leaves(grads))


def test_the_average_by_hand():
  """tau .9, from 1 towards 2: 1.1, 1.19, 1.271."""
  params = jax.tree.map(jnp.ones_like, PARAMS)
  student = tiny.make_learner(MODEL, params, steps=3, ema_decay=0.9, learning_rate=0.0)
  state = student.init(params)
  state = dataclasses.replace(state, params=jax.tree.map(lambda x: 2 * x, params))
  zeros = jax.tree.map(jnp.zeros_like, params)
  for want in (1.1, 1.19, 1.271):
    state, _ = student.apply(state, zeros, jnp.float32(0.0))
    assert float(jax.tree.leaves(state.ema)[0].reshape(-1)[0]) == pytest.approx(want, abs=1e-6)
