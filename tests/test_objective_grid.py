"""The whole GRPO family against the float64 oracle: value and gradient, over a grid of its axes.

The default suite has every pair of values once, and every preset; all of it (451 cases) is

    python -m pytest -m grid

1. `covering` makes the grid: cases in which every pair of values of two axes occurs, in all of it
   four times. Pairs that the algorithm refuses are `REFUSED`, each in its words.
2. `library` goes the way of `steps.reinforce`: keep, advantages, weights, packing, `prepare`, the
   fused loss; on a policy in which every token has parameters of its own. It runs without
   compilation, since every case is another program.
3. `by_the_book` asks `oracle_grpo`; the gradient is that of central differences.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_grpo
import pytest
import tiny

from reasonrl import learner, packing, records, rollouts, types
from reasonrl.configs import common

# ------------------------------------------------------------------------------------ the axes

# Axis -> its values: each a dict of the fields it sets.
AXES = {
  'baseline': [{'baseline': x} for x in ('group_mean', 'leave_one_out', 'batch_mean', 'none')],
  'scale': [{'scale_rewards': x} for x in ('none', 'group', 'batch', 'mean')]
  + [{'scale_rewards': 'group', 'multi_objective_aggregation': 'normalize_then_sum'}],
  'std': [{'std_ddof': 1, 'advantage_eps': 1e-4}, {'std_ddof': 0, 'advantage_eps': 1e-2}],
  'returns': [
    {'returns': 'outcome'},
    {'returns': 'to_go', 'gamma': 1.0},
    {'returns': 'to_go', 'gamma': 0.9},
    {'returns': 'outcome', 'gamma': 0.9},  # below 1: with credit of single tokens
  ],
  'whiten': [{'whiten': x} for x in (False, True)],
  'signs': [{'positive_weight': p, 'negative_weight': n} for p, n in ((1, 1), (0.25, 1), (2, 0.5))],
  'surrogate': [
    {'surrogate': 'ppo_clip'},
    {'surrogate': 'cispo', 'cispo_ratio_max': 1.3},
    {'surrogate': 'cispo', 'cispo_ratio_max': 1.3, 'cispo_ratio_min': 0.7},
    {'surrogate': 'sapo'},
    {'surrogate': 'sapo', 'sapo_temperature_pos': 2.0, 'sapo_temperature_neg': 0.5},
    {'surrogate': 'vespo'},
    {'surrogate': 'vespo', 'vespo_k_pos': 1.0, 'vespo_lambda_neg': 1.5},
    {'surrogate': 'reinforce'},
  ],
  'level': [{'importance_sampling_level': x} for x in ('token', 'sequence', 'sequence_token')],
  'clamp': [{'log_ratio_clamp': x} for x in (None, 0.5)],
  'epsilon': [
    {'epsilon': low, 'epsilon_high': high}
    for low, high in ((0.2, None), (0.1, 0.3), (3e-4, 4e-4), (10.0, None))
  ],
  'dual_clip': [{'dual_clip': x} for x in (None, 1.5)],
  'delta': [{'delta': x} for x in (None, 1.4)],
  'old': [{'old_policy': x} for x in ('trainer', 'sampler')],
  'correction': [
    {'importance_correction': x}
    for x in ('none', 'token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask')
  ],
  'bounds': [
    {'importance_min': low, 'importance_max': high} for low, high in ((None, 1.3), (0.7, 2.0))
  ],
  'kl': [{'beta': 0.0}]
  + [
    {'beta': 0.3, 'kl_estimator': x, 'kl_placement': 'loss'}
    for x in ('k1', 'k2', 'k3', 'ratio_k3', 'k3_plus')
  ]
  + [{'beta': 0.3, 'kl_estimator': x, 'kl_placement': 'reward'} for x in ('k1', 'k2', 'k3')],
  'entropy': [{'entropy_coef': x} for x in (0.0, 0.1)],
  'agg': [
    {'loss_agg': x, 'loss_constant': 6, 'local_rows': 3}
    for x in (
      *('token_mean', 'seq_mean_token_mean', 'token_sum_const', 'seq_mean_token_sum'),
      *('prompt_mean', 'token_mean_local', 'token_sum'),
    )
  ],
  'truncated': [{'mask_truncated_completions': x} for x in (False, True)],
  'zero_variance': [
    {'zero_variance': 'keep'},
    {'zero_variance': 'drop'},
    {'zero_variance': 'drop', 'zero_variance_of': 'accuracy'},
  ],
  'updates': [{'num_iterations': i, 'num_minibatches': m} for i, m in ((1, 1), (2, 1), (1, 2))],
}


# (fields of one value, fields of another, words of the refusal): all pairs that are refused.
GDPO = {'multi_objective_aggregation': 'normalize_then_sum'}
REFUSED = [
  ({'baseline': 'leave_one_out'}, {'scale_rewards': 'group'}, 'explodes where one sample differs'),
  ({'baseline': 'leave_one_out'}, {'scale_rewards': 'mean'}, "needs baseline='group_mean'"),
  ({'baseline': 'none'}, {'scale_rewards': 'group'}, 'needs a group baseline'),
  ({'baseline': 'batch_mean'}, {'scale_rewards': 'group'}, 'needs a group baseline'),
  ({'baseline': 'batch_mean'}, {'scale_rewards': 'mean'}, "needs baseline='group_mean'"),
  ({'baseline': 'none'}, {'scale_rewards': 'mean'}, "needs baseline='group_mean'"),
  ({'scale_rewards': 'mean'}, {'kl_placement': 'reward'}, 'needs rewards >= 0'),
  (GDPO, {'returns': 'to_go'}, "no returns='to_go'"),
  (GDPO, {'kl_placement': 'reward'}, "no kl_placement='reward'"),
  ({'returns': 'to_go'}, {'importance_sampling_level': 'sequence'}, 'one weight per completion'),
  ({'gamma': 0.9}, {'importance_sampling_level': 'sequence'}, 'repetition gives credit to single'),
  ({'surrogate': 'vespo'}, {'importance_sampling_level': 'sequence'}, 'its own sequence weight'),
  ({'surrogate': 'vespo'}, {'importance_sampling_level': 'sequence_token'}, 'its own sequence'),
  (
    {'importance_sampling_level': 'sequence'},
    {'importance_correction': 'token_truncate'},
    'one weight per completion',
  ),
  (
    {'importance_sampling_level': 'sequence'},
    {'importance_correction': 'token_mask'},
    'one weight per completion',
  ),
  ({'importance_sampling_level': 'sequence'}, {'kl_estimator': 'ratio_k3'}, "level='token'"),
  ({'importance_sampling_level': 'sequence_token'}, {'kl_estimator': 'ratio_k3'}, "level='token'"),
  ({'epsilon': 10.0}, {'delta': 1.4}, r'delta=1.4 must be above 1 \+ epsilon_high = 11'),
  *(
    ({'old_policy': 'sampler'}, {'importance_correction': x}, 'the sampler in the ratio already')
    for x in ('token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask')
  ),
]
# The only pair that a third axis makes good: the penalty is then not part of what is divided.
RESCUED = {'scale_rewards': 'mean', 'returns': 'to_go', 'beta': 0.3, 'kl_placement': 'reward'}

# A value of an axis is its place in this list; a case is one value of every axis.
VALUES = [(axis, fields) for axis, choices in AXES.items() for fields in choices]
OF_AXIS = [[v for v, (name, _) in enumerate(VALUES) if name == axis] for axis in AXES]
FIRST = [values[0] for values in OF_AXIS]
PLAIN = tiny.algorithm()


def algorithm(values):
  """The algorithm with these values; axes that are not given have their first."""
  fields = {}
  for v in (*FIRST, *values):
    fields |= VALUES[v][1]
  return dataclasses.replace(PLAIN, **fields)


def refusal(values) -> str:
  """Why the algorithm refuses these values; '' if it does not."""
  try:
    found = algorithm(values)
    found.check(3, ('accuracy', 'format'))
    if found.returns == 'outcome' and found.gamma < 1:
      found.check_credit({'repetition': found.gamma})
  except records.UserError as error:
    return str(error)
  return ''


@functools.cache
def refused_pairs() -> dict:
  """(value, value) of two axes -> why they are refused, every other axis at its first value."""
  pairs = itertools.combinations(range(len(VALUES)), 2)
  pairs = {(v, w): refusal((v, w)) for v, w in pairs if VALUES[v][0] != VALUES[w][0]}
  return {pair: why for pair, why in pairs.items() if why}


@functools.cache
def covering(times: int) -> list[tuple[int, ...]]:
  """Cases in which every pair of values that is not refused occurs at least `times` times.

  Greedy: for a pair that is still missing, the best of some random cases that hold it.
  """
  rng, n = random.Random(0), len(VALUES)
  wanted = np.triu(np.ones((n, n), bool), 1)
  for values in OF_AXIS:
    wanted[np.ix_(values, values)] = False
  conflicts = [set() for _ in VALUES]
  for v, w in refused_pairs():
    wanted[v, w] = False
    conflicts[v].add(w)
    conflicts[w].add(v)

  def complete(pair):
    case = list(pair)
    missing = [values for values in OF_AXIS if not set(values) & set(pair)]
    for values in rng.sample(missing, len(missing)):
      case.append(rng.choice([v for v in values if not conflicts[v] & set(case)]))
    return tuple(sorted(case))

  cases = []
  for _ in range(times):
    missing = wanted.copy()
    for pair in np.argwhere(wanted):
      if missing[tuple(pair)]:
        tried = [complete(pair) for _ in range(20)]
        cases.append(max(tried, key=lambda case: missing[np.ix_(case, case)].sum()))
        missing[np.ix_(cases[-1], cases[-1])] = False
  return cases


# ------------------------------------------------------------------------------------ the data

GROUP_R = [0, 1, 0, 2, 1, 0, 2, 1, 0]  # interleaved
PARTS = {  # rollout 5 has no reward, 4 not every; group 2 has no variance, group 1 none in accuracy
  'accuracy': [1, 0.5, 0, 0.5, 0.5, math.nan, 0.5, 0.5, 0.25],
  'format': [0, 1, 0.5, 0.25, math.nan, math.nan, 0.25, 0, 1],
}
WEIGHTS = {'accuracy': 1.0, 'format': 0.5}
REWARD_R = [1, 1, 0.25, 0.625, 0.5, math.nan, 0.625, 0.5, 0.75]  # their weighted sum
ROLLOUT_B = [0, 1, 2, 3, 4, 5, 6, 7, 8, 2]  # the last row is a second turn of rollout 2
PROMPT_B = [1, 2, 1, 1, 2, 1, 1, 1, 2, 1]
LENGTH_B = [2, 5, 1, 3, 2, 4, 3, 1, 2, 2]  # of completions
HOLE = (1, 4)  # a token that the environment wrote
STOP_B = [1, 2, 1, 1, 1, 2, 2, 1, 1, 1]  # 2: cut off at the limit
WIDTH, HIDDEN = 7, 2


@dataclasses.dataclass(frozen=True)
class Bigram:
  """The next token depends on the token before alone. With ids that occur once, every token of a
  batch has HIDDEN parameters of its own: its gradient is the derivative by its log-probability and
  its entropy."""

  vocab_size: int
  sharding_rules = ((r'.*', ()),)

  def hidden(self, params, tokens_BT, positions_BT, segments_BT, cache=None, **_):
    return params['table'][tokens_BT], cache

  def head(self, params):
    return params['head']

  def with_head(self, tree, head_VD):
    return {**tree, 'head': head_VD}


@functools.cache
def data():
  """The experience, the parameters, and per sampled token its (row, column)."""
  rng, B = np.random.default_rng(5), len(ROLLOUT_B)
  at = np.arange(WIDTH)[None, :]
  prompt_B, end_B = np.array(PROMPT_B), np.array(PROMPT_B) + LENGTH_B
  real_BT = at < end_B[:, None]
  source_BT = np.where(real_BT & (at >= prompt_B[:, None]), types.POLICY, types.PROMPT)
  source_BT[HOLE] = types.ENVIRONMENT
  tokens_BT = np.where(real_BT, np.cumsum(real_BT).reshape(B, WIDTH), 0)
  vocab = int(tokens_BT.max()) + 1
  params = {
    'table': rng.normal(size=(vocab, HIDDEN)).astype(np.float32),
    'head': rng.normal(size=(vocab, HIDDEN)).astype(np.float32),
  }
  places = np.argwhere(source_BT == types.POLICY)
  row, column = places.T
  context, target = tokens_BT[row, column - 1], tokens_BT[row, column]
  scores = functools.partial(oracle.scores, head_VD=params['head'], targets_M=target)
  now, entropy = scores(params['table'][context])

  spread = lambda start, width: np.float32(start + rng.normal(size=start.size) * width)
  old = spread(now, 0.6)
  tokens = {'now': now, 'entropy': entropy, 'old': old, 'ref': spread(now, 0.6)}
  tokens |= {'sampler': spread(old, 0.3), 'dense': spread(np.zeros(now.size), 0.3)}
  tokens['dense'][[ROLLOUT_B[b] == 5 for b in row]] = 0.0

  def everywhere(name):
    out = np.zeros(tokens_BT.shape, np.float32)
    out[row, column] = tokens[name]
    return out

  found = tiny.experience(REWARD_R, GROUP_R, [1] * len(GROUP_R))
  found = dataclasses.replace(
    found,
    tokens_BT=tokens_BT.astype(np.int32),
    prompt_length_B=prompt_B.astype(np.int32),
    length_B=end_B.astype(np.int32),
    source_BT=source_BT.astype(np.int8),
    logp_BT=everywhere('sampler'),
    stop_B=np.array(STOP_B, np.int32),
    version_B=np.zeros(B, np.int32),
    group_B=np.array(GROUP_R, np.int32)[ROLLOUT_B],
    rollout_B=np.array(ROLLOUT_B, np.int32),
    parts={name: np.array(part, np.float32) for name, part in PARTS.items()},
    reward_weights=WEIGHTS,
  )
  arrays = {name: everywhere(name) for name in tokens}

  # The policy where one parameter of one token is a little more or less: for central differences.
  moved = {}
  for d, sign in itertools.product(range(HIDDEN), (1, -1)):
    table = np.float64(params['table'][context])
    table[:, d] += sign * STEP
    moved[d, sign] = scores(table)
  return found, params, arrays, (row, column, context), tokens, moved


STEP = 1e-5


# ------------------------------------------------------------------------------------ two answers


def batch_of(cfg):
  """What the environment and the scoring passes give this algorithm."""
  found, _, arrays, _, _, _ = data()
  old = arrays['old'] if cfg.num_iterations * cfg.num_minibatches > 1 else arrays['now']
  scores = {'old_logp': old, 'ref_logp': arrays['ref']}
  return dataclasses.replace(
    found,
    scores={name: scores[name] for name in cfg.needs},
    reward_BT=arrays['dense'] if cfg.gamma < 1 else None,
  )


def first_minibatch(cfg, rows):
  """bool per row: the rows of the optimizer step that is compared."""
  return [cfg.num_minibatches == 1 or b % 3 < 2 for b in range(rows)]


def library(cfg):
  """Loss and gradient of the table, as `steps.reinforce` and the learner compute them."""
  _, params, _, _, _, _ = data()
  experience = batch_of(cfg)
  good = cfg.keep(experience)
  if good is not None:
    experience = rollouts.take_groups(experience, np.unique(experience.group_B)[good])
  adv_BT = cfg.advantages(experience)
  rows = np.flatnonzero(first_minibatch(cfg, experience.length_B.size))
  minibatch = rollouts.take_rows(experience, rows)
  weight_BT, denominator = cfg.weights(minibatch)
  aux_BT = {'weight': weight_BT, 'adv': adv_BT[rows], 'sampler_logp': minibatch.logp_BT}
  seqs = packing.sequences(minibatch.tokens_BT, minibatch.length_B, aux_BT | minibatch.scores)
  (batch,), _ = packing.pack(seqs, 16, 4, share=True)
  term = learner.Term(cfg.token_loss, cfg.prepare, 'weight')
  policy = Bigram(params['head'].shape[0])
  update = dataclasses.replace(tiny.make_learner(policy, params, term), loss_chunk=64)
  params, batch = jax.tree.map(jnp.asarray, (params, batch))
  if cfg.prepare:
    batch = update._prepared(cfg.prepare, params, batch)
  zeros = jax.tree.map(jnp.zeros_like, params)
  grads, report = update.accumulate(params, zeros, batch, (denominator or 1.0,))
  return float(report['loss']), np.asarray(grads['table'], np.float64)


def by_the_book(cfg):
  """The same from the oracle."""
  found, params, _, (row, column, context), tokens, moved = data()
  names = {'old': 'old', 'sampler': 'sampler', 'ref': 'ref', 'logp': 'now', 'entropy': 'entropy'}
  outcomes = [
    {'group': g, 'reward': reward, 'parts': {name: PARTS[name][r] for name in PARTS}}
    for r, (g, reward) in enumerate(zip(GROUP_R, REWARD_R, strict=True))
  ]
  held = []
  for b, r in enumerate(ROLLOUT_B):
    of = {name: [float(x) for x in tokens[key][row == b]] for name, key in names.items()}
    of['dense'] = [float(x) * (cfg.gamma < 1) for x in tokens['dense'][row == b]]
    held.append({'rollout': r, 'group': GROUP_R[r], 'stop': STOP_B[b], **of})
  where = [(b, i) for b in range(len(held)) for i in range(len(held[b]['logp']))]
  if cfg.zero_variance == 'drop':
    values = REWARD_R if cfg.zero_variance_of == 'reward' else PARTS[cfg.zero_variance_of]
    credited = {of['group'] for of in held if any(of['dense'])}
    dropped = set(oracle_grpo.zero_variance_groups(values, GROUP_R)) - credited
    outcomes = [outcome if outcome['group'] not in dropped else None for outcome in outcomes]
  present = [b for b, of in enumerate(held) if outcomes[of['rollout']] is not None]
  number = {r: i for i, r in enumerate(r for r, o in enumerate(outcomes) if o is not None)}
  outcomes = [outcome for outcome in outcomes if outcome is not None]
  held = [held[b] | {'rollout': number[held[b]['rollout']]} for b in present]
  for of, trained in zip(held, first_minibatch(cfg, len(held)), strict=True):
    of['trained'] = trained

  A = oracle_grpo.credit(cfg, held, outcomes, WEIGHTS)
  loss = lambda rows: oracle_grpo.objective(cfg, rows, held, A)
  grads = np.zeros(params['table'].shape)
  rows = [of | {'logp': list(of['logp']), 'entropy': list(of['entropy'])} for of in held]
  for m, (b, i) in enumerate(where):
    if b not in present or not held[present.index(b)]['trained']:
      continue
    b = present.index(b)
    for d in range(HIDDEN):
      ends = []
      for sign in (1, -1):
        rows[b]['logp'][i], rows[b]['entropy'][i] = (x[m] for x in moved[d, sign])
        ends.append(loss(rows))
      grads[context[m], d] = (ends[0] - ends[1]) / (2 * STEP)
    rows[b]['logp'][i], rows[b]['entropy'][i] = held[b]['logp'][i], held[b]['entropy'][i]
  return loss(held), grads


def compare(cfg):
  with jax.disable_jit():
    loss, grads = library(cfg)
  want, want_grads = by_the_book(cfg)
  most = np.abs(want_grads).max()
  assert most > 1e-3
  assert loss == pytest.approx(want, rel=2e-5, abs=4e-6)
  np.testing.assert_allclose(grads, want_grads, rtol=1e-3, atol=1e-5 * most)


# ------------------------------------------------------------------------------------ the tests

ONCE, FOUR_TIMES = 94, 379  # cases of `covering`


def test_what_is_refused_says_why():
  """Exactly the pairs of REFUSED."""
  hits = dict.fromkeys(range(len(REFUSED)), 0)
  for (v, w), why in refused_pairs().items():
    fields = [VALUES[v][1], VALUES[w][1]]
    found = [
      i
      for i, (a, b, said) in enumerate(REFUSED)
      for one, other in (fields, fields[::-1])
      if a.items() <= one.items() and b.items() <= other.items() and re.search(said, why)
    ]
    assert found, f'{fields}: {why}'
    hits[found[0]] += 1
  assert all(hits.values()), [REFUSED[i] for i, n in hits.items() if not n]


def least(cases):
  """How often the rarest pair occurs that is not refused."""
  pairs = itertools.combinations(range(len(VALUES)), 2)
  pairs = {(v, w) for v, w in pairs if VALUES[v][0] != VALUES[w][0]} - set(refused_pairs())
  counts = dict.fromkeys(pairs, 0)
  for case in cases:
    for pair in itertools.combinations(case, 2):
      counts[pair] += 1
  return min(counts.values())


def test_the_grid_holds_every_pair():
  assert (len(covering(1)), least(covering(1))) == (ONCE, 1)


@pytest.mark.grid
def test_the_grid_holds_every_pair_four_times():
  assert (len(covering(4)), least(covering(4))) == (FOUR_TIMES, 4)
  assert covering(4)[:ONCE] == covering(1)


@pytest.mark.parametrize('case', range(ONCE))
def test_every_pair_of_values_is_the_oracle(case):
  compare(algorithm(covering(1)[case]))


@pytest.mark.grid
@pytest.mark.parametrize('case', range(FOUR_TIMES))
def test_every_pair_of_values_four_times_is_the_oracle(case):
  compare(algorithm(covering(4)[case]))


@pytest.mark.parametrize(
  'plain, bound',
  [
    ({}, {'delta': 1.4}),
    ({}, {'dual_clip': 1.5}),
    ({'dual_clip': 1.5}, {'delta': 1.4}),
    ({}, {'epsilon_high': 0.5}),
    ({}, {'log_ratio_clamp': 0.5}),
    ({'importance_sampling_level': 'sequence'}, {'log_ratio_clamp': 0.5}),
    ({'surrogate': 'cispo', 'cispo_ratio_max': 1.3}, {'cispo_ratio_min': 0.9}),
    ({'importance_correction': 'token_mask'}, {'importance_min': 0.9}),
    ({'importance_correction': 'sequence_truncate'}, {'importance_min': 0.9}),
    ({'importance_correction': 'token_mask'}, {'importance_max': 1.1}),
    ({'surrogate': 'vespo', 'importance_correction': 'token_mask'}, {'importance_max': 1.1}),
  ],
)
def test_every_bound_is_the_oracle_and_binds(plain, bound):
  """By the oracle, loss or gradient are others without it."""
  plain, bounded = (
    tiny.algorithm(**{'num_iterations': 2, **plain, **more}) for more in ({}, bound)
  )
  compare(bounded)
  assert np.abs(by_the_book(plain)[1] - by_the_book(bounded)[1]).max() > 1e-3


def test_the_pair_that_a_third_axis_makes_good_is_the_oracle():
  compare(tiny.algorithm(**RESCUED, kl_estimator='k2', num_iterations=2))


@pytest.mark.parametrize('preset', common.ALGORITHM_PRESETS)
def test_every_preset_is_the_oracle(preset):
  compare(tiny.algorithm(preset, loss_constant=6, num_iterations=2))


@pytest.mark.grid
@pytest.mark.parametrize('preset', common.ALGORITHM_PRESETS)
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'num_iterations': 2},
    {'old_policy': 'sampler', 'mask_truncated_completions': True},
    {'importance_correction': 'sequence_mask', 'importance_min': 0.5, 'num_minibatches': 2},
  ],
)
def test_every_preset_with_changes_is_the_oracle(preset, changes):
  compare(tiny.algorithm(preset, **{'loss_constant': 6, **changes}))
