"""Packing round trips; a loss and gradient that no slicing changes; the guarded, donated update."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import test_policy_loss
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import learner, packing, types

MODEL = tiny.model()
PARAMS = MODEL.init(jax.random.key(0))
ADVANTAGES = ('adv', 'old_logp', 'ref_logp', 'sampler_logp')


def fresh():
  """Parameters that an update may donate."""
  return jax.tree.map(jnp.copy, PARAMS)


def rows(lengths=(5, 9, 3, 7, 6, 4), width=9, seed=0):
  """Random rows: tokens, lengths, aux with a random mask; each row scores at least one token."""
  rng = np.random.default_rng(seed)
  B = len(lengths)
  tokens_BT = rng.integers(0, MODEL.vocab_size, (B, width)).astype(np.int32)
  at = np.arange(width)[None]
  weight_BT = (rng.random((B, width)) < 0.6) * (at > 0) * (at < np.array(lengths)[:, None])
  weight_BT[:, 1] = 1
  normal = lambda: rng.normal(size=(B, width)).astype(np.float32)
  aux = {'weight': weight_BT.astype(np.float32), 'adv': normal()}
  aux |= {name: normal() * 0.3 - 2.4 for name in ADVANTAGES[1:]}
  return tokens_BT, np.array(lengths), aux


def packed(data, row_length=12, per_batch=2, order=None):
  seqs = packing.sequences(*data)
  seqs = seqs if order is None else [seqs[i] for i in order]
  return packing.pack(seqs, row_length, per_batch, share=True)[0]


def gradient(student, batches, denominator, params=PARAMS):
  """Loss and gradient over micro-batches, as `update` accumulates them."""
  grads, reports = jax.tree.map(jnp.zeros_like, params), []
  for batch in batches:
    grads, report = student.accumulate(params, grads, batch, (jnp.float32(denominator),))
    reports.append(report)
  return float(sum(r['loss'] for r in reports)), jax.device_get(grads), reports


def assert_trees_close(got, want, tolerance=1e-5):
  """Largest difference per leaf, relative to the leaf's largest entry."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


def assert_trees_equal(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


GRPO = tiny.algorithm(num_iterations=2, beta=0.1, epsilon_high=0.28)
STUDENT = tiny.make_learner(MODEL, PARAMS, learner.Term(GRPO.token_loss, None, 'weight'))


# ------------------------------------------------------------------------------------ packing


def test_sequences_cut_padding_and_keep_aux_where_weight_is():
  tokens = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
  weight = np.array([[0, 0.5, 2.0, 9.0], [0, 0, 7.0, 0]])  # beyond a row's length nothing counts
  adv = np.array([[0, 1, 2, 3], [4, 5, 6, np.nan]])
  first, second = packing.sequences(tokens, [3, 2], {'weight': weight, 'adv': adv})
  np.testing.assert_array_equal(first.tokens_T, [5, 6, 7])
  np.testing.assert_array_equal(first.index_M, [1, 2])
  np.testing.assert_array_equal(first.aux['weight'], np.float32([0.5, 2.0]))
  np.testing.assert_array_equal(first.aux['adv'], np.float32([1, 2]))
  np.testing.assert_array_equal(second.tokens_T, [8, 9])
  assert second.index_M.size == 0


def test_pack_by_hand():
  """First fit, longest first: rows [2], [0, 1] of five tokens; slots in quarters of the row."""
  data = [([1, 2, 3], [2]), ([4, 5], [1]), ([6, 7, 8, 9], [1, 3])]
  seqs = [
    types.Sequence(np.array(t, np.int32), np.array(i), {'weight': np.array(i, np.float32)})
    for t, i in data
  ]
  (batch,), place = packing.pack(seqs, 5, 2, share=False)
  np.testing.assert_array_equal(batch.tokens_BT, [[6, 7, 8, 9, 0], [1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(batch.positions_BT, [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]])
  np.testing.assert_array_equal(batch.segments_BT, [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2]])
  np.testing.assert_array_equal(batch.index_BM, [[1, 3], [2, 4]])
  np.testing.assert_array_equal(batch.aux['weight'], [[1, 3], [2, 1]])
  assert place == [(0, 1, 0), (0, 1, 1), (0, 0, 0)]
  (batch,), _ = packing.pack(seqs[:1], 5, 2, share=False)
  np.testing.assert_array_equal(batch.index_BM, [[2, 1], [1, 1]])  # unused: index 1
  np.testing.assert_array_equal(batch.aux['weight'], [[2, 0], [0, 0]])


def test_ids_are_packed_beside_the_numbers():
  """int32 with their own axis; unused slots have none."""
  tokens, weight = np.array([[5, 6, 7], [8, 9, 0]]), np.array([[0, 0, 1.0], [0, 1.0, 0]])
  ids = np.arange(12).reshape(2, 3, 2) + 2**25  # which float32 would round
  seqs = packing.sequences(tokens, [3, 2], {'weight': weight, 'kept': ids})
  (batch,), _ = packing.pack(seqs, 5, 1, share=True)
  assert batch.aux['kept'].dtype == np.int32
  np.testing.assert_array_equal(batch.aux['kept'], [[ids[0, 2], ids[1, 1]]])
  (batch,), _ = packing.pack(seqs[:1], 3, 2, share=True)
  np.testing.assert_array_equal(batch.aux['kept'][1, 0], [-1, -1])


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.integers(1, 10), min_size=1, max_size=12),
  st.integers(10, 17),
  st.integers(1, 3),
  st.integers(0, 99),
)
def test_every_scored_token_is_packed_once_and_comes_back(lengths, row_length, per_batch, seed):
  rng, width = np.random.default_rng(seed), max(lengths)
  shape = (len(lengths), width)
  tokens, ids = rng.integers(0, 99, shape), np.arange(len(lengths) * width).reshape(shape)
  at = np.arange(width)[None]
  inside = (at > 0) & (at < np.array(lengths)[:, None])
  weight = (rng.random(shape) < 0.5) * inside * rng.random(shape)
  seqs = packing.sequences(tokens, lengths, {'weight': weight, 'id': ids})
  batches, place = packing.pack(seqs, row_length, per_batch, share=True)
  for batch in batches:
    assert batch.tokens_BT.shape == (per_batch, row_length)
    assert batch.index_BM.shape == batches[0].index_BM.shape
    assert (batch.index_BM >= 1).all()
    # A scored token's predecessor is of its sequence, at the position before.
    scored = batch.aux['weight'] > 0
    at = lambda x, index: np.take_along_axis(x, index, 1)
    own, before = (at(batch.segments_BT, i) for i in (batch.index_BM, batch.before_BM))
    begins = at(batch.prefixes_BT, batch.index_BM)
    assert (((own == before) | (begins == before)) & (own > 0))[scored].all()
    gap = at(batch.positions_BT, batch.index_BM) - at(batch.positions_BT, batch.before_BM)
    assert (gap == 1)[scored].all()
  alone, _ = packing.pack(seqs, row_length, per_batch, share=False)
  assert all(b.prefixes_BT is None and (b.before_BM == b.index_BM - 1).all() for b in alone)
  assert sum(int((b.segments_BT > 0).sum()) for b in alone) == sum(lengths)
  found = [np.take_along_axis(b.tokens_BT, b.index_BM, 1) for b in batches]
  np.testing.assert_array_equal(
    packing.unpack(found, seqs, place, shape), np.where(weight > 0, tokens, 0)
  )
  for name, want in (('weight', weight), ('id', ids)):
    got = packing.unpack([b.aux[name] for b in batches], seqs, place, shape)
    np.testing.assert_array_equal(got, np.where(weight > 0, want, 0).astype(np.float32))


def test_the_first_token_of_a_sequence_cannot_be_scored():
  seqs = packing.sequences(np.ones((2, 3)), [3, 3], {'weight': np.array([[0, 1, 1], [1, 1, 1]])})
  with pytest.raises(ValueError, match='sequence 1: the first token cannot be scored'):
    packing.pack(seqs, 8, 1, share=True)


def test_a_sequence_longer_than_a_row_is_named():
  seqs = packing.sequences(np.ones((1, 9)), [9], {'weight': np.ones((1, 9)) * (np.arange(9) > 0)})
  with pytest.raises(ValueError, match='sequence of 9 tokens does not fit a packed row of 8'):
    packing.pack(seqs, 8, 1, share=True)
  assert len(packing.pack(seqs, 9, 1, share=True)[0]) == 1


# ------------------------------------------------------------------------------------ the numbers


def test_score_is_the_log_softmax_of_the_token_before():
  """Alignment, temperature and forbidden ids, against logits made row by row."""
  tokens, lengths, aux = rows()
  form = (1.0, None, 0.7, jnp.dtype('float32'))
  student = dataclasses.replace(STUDENT, form=form, forbidden=(0, 4))
  seqs = packing.sequences(tokens, lengths, aux)
  batches, place = packing.pack(seqs, 12, 2, share=True)
  outs = [student.score(PARAMS, batch) for batch in batches]
  logp = packing.unpack([np.asarray(o.logp) for o in outs], seqs, place, tokens.shape)
  entropy = packing.unpack([np.asarray(o.entropy) for o in outs], seqs, place, tokens.shape)
  bias = np.zeros(MODEL.vocab_size)
  bias[[0, 4]] = -1e9
  hidden = jax.jit(hidden_of)(PARAMS, tokens, lengths)
  for i in range(len(lengths)):
    scored = np.flatnonzero(aux['weight'][i] > 0)
    head = MODEL.head(PARAMS)
    want = oracle.scores(hidden[i, scored - 1], head, tokens[i, scored], 1.0, None, 0.7, bias)
    for got, expected in zip((logp, entropy), want, strict=True):
      np.testing.assert_allclose(got[i, scored], expected, rtol=1e-5, atol=1e-5)
      assert (np.delete(got[i], scored) == 0).all()


def hidden_of(params, tokens_BT, lengths):
  """Hidden states of right-padded rows: no packing."""
  at = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  segments = (at < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
  return MODEL.hidden(params, jnp.asarray(tokens_BT), at, segments)[0]


def logp_of(params, tokens_BT, lengths):
  """log p of tokens 1, 2, ...: through whole logits, no fused op."""
  hidden = hidden_of(params, tokens_BT, lengths)[:, :-1]
  logits = jnp.einsum('btd,vd->btv', hidden, MODEL.head(params), precision='highest')
  return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BT[:, 1:, None], axis=2)[..., 0]


def unpacked(tokens, lengths, aux, denominator):
  """The same loss by autodiff, without packing or the fused op."""

  def loss(params):
    logp = logp_of(params, tokens, lengths)
    aux_BT = {name: jnp.asarray(x[:, 1:]) for name, x in aux.items()}
    loss_BT, _ = GRPO.token_loss(learner.Out(logp, jnp.zeros_like(logp)), aux_BT)
    return jnp.sum(aux_BT['weight'] * loss_BT) / denominator

  value, grads = jax.jit(jax.value_and_grad(loss))(PARAMS)
  return float(value), jax.device_get(grads)


def test_loss_and_gradient_do_not_depend_on_the_slicing():
  """Micro-batches, packing, order and padding: 1e-5 of each gradient's largest entry (float32)."""
  tokens, lengths, aux = data = rows()
  denominator = float((aux['weight'] > 0).sum())
  loss, grads = unpacked(*data, denominator)
  assert abs(loss) > 1e-3 and all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(grads))
  wide = (
    np.pad(tokens, ((0, 0), (0, 3)), constant_values=7),
    lengths,
    {name: np.pad(x, ((0, 0), (0, 3)), constant_values=1) for name, x in aux.items()},
  )
  ways = {
    'two rows a micro-batch': packed(data),
    'one row a micro-batch': packed(data, per_batch=1),
    'one micro-batch': packed(data, per_batch=6),
    'everything in one row': packed(data, row_length=34, per_batch=1),
    'another order': packed(data, order=[3, 0, 5, 1, 4, 2]),
    'more padding in the rows': packed(wide),
    'more padding in the batch': packed(data, row_length=20, per_batch=8),
  }
  assert [len(batches) for batches in ways.values()] == [2, 3, 1, 1, 2, 2, 1]
  for way, batches in ways.items():
    got_loss, got, _ = gradient(STUDENT, batches, denominator)
    assert got_loss == pytest.approx(loss, rel=1e-5), way
    assert_trees_close(got, grads)


def test_tokens_of_weight_zero_cannot_reach_the_gradient():
  """1e3 and NaN in a masked slot of every aux array: the same bits."""
  data = rows()
  (batch, *others) = packed(data)
  assert (batch.aux['weight'][:, -1] == 0).any()  # unused slots exist
  want_loss, want, _ = gradient(STUDENT, [batch, *others], 7.0)
  for junk in (1e3, -1e3, np.nan, np.inf):
    masked = batch.aux['weight'] == 0
    aux = {n: np.where(masked & (n != 'weight'), np.float32(junk), x) for n, x in batch.aux.items()}
    loss, got, _ = gradient(STUDENT, [dataclasses.replace(batch, aux=aux), *others], 7.0)
    assert loss == want_loss
    assert_trees_equal(got, want)


def test_terms_add_up_each_with_its_denominator():
  nll = learner.Term(learner.nll, None, 'weight')
  both = dataclasses.replace(STUDENT, terms=(*STUDENT.terms, nll))
  alone = dataclasses.replace(STUDENT, terms=(nll,))
  (batch,) = packed(rows(), per_batch=6)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  sums, report = both.accumulate(PARAMS, zeros, batch, (jnp.float32(7.0), jnp.float32(3.0)))
  first_loss, first, _ = gradient(STUDENT, [batch], 7.0)
  second_loss, second, _ = gradient(alone, [batch], 3.0)
  assert float(report['loss']) == pytest.approx(first_loss + second_loss, rel=1e-5)
  assert_trees_close(jax.device_get(sums), jax.tree.map(np.add, first, second))
  assert second_loss > 0


def test_a_term_without_its_denominator_is_an_error():
  state = STUDENT.init(fresh())
  with pytest.raises(ValueError):
    STUDENT.update(state, packed(rows()), (1.0, 2.0))


# ------------------------------------------------------------------------------------ update


def test_zero_variance_groups_give_exactly_zero():
  grpo = tiny.algorithm()
  student = tiny.make_learner(MODEL, PARAMS, learner.Term(grpo.token_loss, None, 'weight'))
  found = tiny.experience([1, 1, 1, 0.3, 0.3, 0.3], [0, 0, 0, 1, 1, 1], [3, 5, 2, 4, 4, 1])
  weight_BT, denominator = grpo.weights(found)
  aux = {'weight': weight_BT, 'adv': grpo.advantages(found)}
  batches = packed((found.tokens_BT, found.length_B, aux))
  loss, grads, _ = gradient(student, batches, denominator)
  assert loss == 0.0
  assert all((g == 0).all() for g in jax.tree.leaves(grads))
  state, _ = student.update(student.init(fresh()), batches, (denominator,))
  assert_trees_equal(state.params, PARAMS)
  mixed = dataclasses.replace(found, reward_R=np.float32([1, 1, 0, 0.3, 0.3, 0.3]))
  aux['adv'] = grpo.advantages(mixed)
  assert (aux['adv'][3:] == 0).all()
  _, grads, _ = gradient(student, packed((found.tokens_BT, found.length_B, aux)), denominator)
  assert all((g != 0).any() for g in jax.tree.leaves(grads))


def test_update_moves_every_parameter_at_the_first_step_and_counts():
  state = STUDENT.init(fresh())
  state, reports = STUDENT.update(state, packed(rows()), (20.0,))
  for old, new in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(state.params), strict=True):
    assert (np.asarray(old) != np.asarray(new)).any()
  row = learner.reduce_reports(reports)
  assert (row['finite'], row['skipped']) == (1.0, 0.0)
  _, grads, _ = gradient(STUDENT, packed(rows()), 20.0)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  assert row['grad_norm'] == pytest.approx(norm, rel=1e-5)


def test_micro_batches_accumulate_to_the_same_update():
  """Six micro-batches or one: the parameters after two steps agree (float32, 1e-5)."""
  student = dataclasses.replace(STUDENT, tx=tiny.make_learner(MODEL, PARAMS, eps=1e-3).tx)
  ends, programs = [], learner.Learner.apply._cache_size()
  for per_batch in (1, 6):
    state = student.init(fresh())
    for seed in (0, 1):
      batches = packed(rows(seed=seed), row_length=9, per_batch=per_batch)
      state, _ = student.update(state, batches, (20.0,))
    ends.append(jax.device_get(state.params))
  assert_trees_close(*ends)
  # The optimizer's program does not depend on the number of micro-batches.
  assert learner.Learner.apply._cache_size() == programs + 1


def decided(state):
  """What a skipped step must leave alone."""
  return state.params, state.opt_state, state.ema


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
  student = dataclasses.replace(STUDENT, ema_decay=0.5)
  good = packed(rows())
  aux = {**good[1].aux, 'adv': np.full_like(good[1].aux['adv'], bad)}
  broken = [good[0], dataclasses.replace(good[1], aux=aux)]
  state, _ = student.update(student.init(fresh()), good, (20.0,))
  kept = jax.device_get(state)
  for count in (1, 2):
    state, reports = student.update(state, broken, (20.0,))
    row = learner.reduce_reports(reports)
    assert (row['finite'], row['skipped']) == (0.0, count)
    now = jax.device_get(state)
    assert_trees_equal(decided(now), decided(kept))
    assert now.skipped == count
  state, reports = student.update(state, good, (20.0,))
  row = learner.reduce_reports(reports)
  assert (row['finite'], row['skipped'], int(state.skipped)) == (1.0, 0.0, 0)
  once, _ = student.update(student.init(fresh()), good, (20.0,))
  twice, _ = student.update(once, good, (20.0,))  # as if the broken steps had not been
  assert_trees_equal(decided(state), decided(twice))


@pytest.mark.parametrize(
  'token_loss, finite_loss, finite_norm',
  [
    (lambda out, aux: (jnp.sqrt(jnp.maximum(out.logp, 0.0)), {}), True, False),  # slope 0 * inf
    (lambda out, aux: (0.0 * out.logp + jnp.inf, {}), False, True),
  ],
)
def test_loss_and_gradient_are_both_guarded(token_loss, finite_loss, finite_norm):
  student = dataclasses.replace(STUDENT, terms=(learner.Term(token_loss, None, 'weight'),))
  state, reports = student.update(student.init(fresh()), packed(rows()), (20.0,))
  row = learner.reduce_reports(reports)
  assert (np.isfinite(row['loss']), np.isfinite(row['grad_norm'])) == (finite_loss, finite_norm)
  assert (row['finite'], row['skipped']) == (0.0, 1.0)
  assert_trees_equal(state.params, PARAMS)


def test_a_batch_with_nothing_to_train_changes_nothing():
  tokens, lengths, aux = rows()
  aux = {**aux, 'weight': np.zeros_like(aux['weight'])}
  state, reports = STUDENT.update(STUDENT.init(fresh()), packed((tokens, lengths, aux)), (1.0,))
  row = learner.reduce_reports(reports)
  assert (row['loss'], row['tokens'], row['finite'], row['grad_norm']) == (0.0, 0.0, 1.0, 0.0)
  assert all(np.isfinite(x) for x in row.values())
  assert_trees_equal(state.params, PARAMS)


def test_ema_follows_the_parameters():
  student = dataclasses.replace(STUDENT, ema_decay=0.75)
  state = student.init(fresh())
  assert_trees_equal(state.ema, PARAMS)
  want = jax.device_get(PARAMS)
  for seed in (0, 1):
    state, _ = student.update(state, packed(rows(seed=seed)), (20.0,))
    want = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), want, state.params)
  assert_trees_close(jax.device_get(state.ema), want, 1e-6)
  assert STUDENT.init(fresh()).ema is None


def test_update_donates_its_state_and_nothing_else():
  """The reference model keeps the parameters that `init` was given."""
  params = fresh()
  for student in (STUDENT, dataclasses.replace(STUDENT, ema_decay=0.5)):
    state = student.init(params)
    new, _ = student.update(state, packed(rows()), (20.0,))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, new)))
  assert_trees_equal(params, PARAMS)


def test_abstract_state_has_the_shapes_of_a_real_one():
  student = dataclasses.replace(STUDENT, ema_decay=0.5)
  real = student.init(fresh())
  abstract = student.abstract()
  assert jax.tree.structure(real) == jax.tree.structure(abstract)
  for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


# ------------------------------------------------------------------------------------ reports


def test_metrics_do_not_depend_on_the_slicing():
  tokens, lengths, aux = data = rows()
  found = []
  for way in ({}, {'per_batch': 1}, {'row_length': 34, 'per_batch': 1}):
    batches = packed(data, **way)
    _, _, reports = gradient(STUDENT, batches, 20.0)
    found.append(learner.reduce_reports((reports, {})))
  for row in found[1:]:
    assert row == pytest.approx(found[0], rel=2e-4)  # the mismatch is a difference: 1e-7 of 2
  assert found[0]['tokens'] == (aux['weight'] > 0).sum()
  assert set(found[0]) == {
    *('loss', 'tokens', 'entropy', 'kl', 'clip_ratio/low', 'clip_ratio/high', 'ratio_max'),
    *('ratio_gap', 'ratio_gap_max'),
    *('mismatch/mean', 'mismatch/max', 'mismatch/p99'),
  }


def test_metrics_are_what_they_say():
  """Against the scores of the same tokens."""
  tokens, lengths, aux = data = rows()
  batches = packed(data)
  _, _, reports = gradient(STUDENT, batches, 20.0)
  row = learner.reduce_reports((reports, {'finite': np.bool_(True)}))
  outs = [STUDENT.score(PARAMS, batch) for batch in batches]
  mask = np.concatenate([b.aux['weight'].ravel() for b in batches]) > 0
  column = lambda arrays: np.concatenate([np.ravel(x) for x in arrays])[mask]
  logp, entropy = column([o.logp for o in outs]), column([o.entropy for o in outs])
  aux = {name: column([b.aux[name] for b in batches]) for name in batches[0].aux}
  gap = np.abs(logp - aux['sampler_logp'])
  ratio = np.exp(logp - aux['old_logp'])
  assert row['entropy'] == pytest.approx(entropy.mean(), rel=1e-5)
  assert row['mismatch/mean'] == pytest.approx(gap.mean(), rel=1e-5)
  assert row['mismatch/max'] == pytest.approx(gap.max(), rel=1e-5)
  assert row['mismatch/p99'] == pytest.approx(np.quantile(gap, 0.99), rel=1e-5)
  assert row['ratio_max'] == pytest.approx(ratio.max(), rel=1e-5)
  assert row['ratio_gap'] == pytest.approx(np.abs(ratio - 1).mean(), rel=1e-5)
  assert row['ratio_gap_max'] == pytest.approx(np.abs(ratio - 1).max(), rel=1e-5)
  low, high = (ratio < 0.8) & (aux['adv'] < 0), (ratio > 1.28) & (aux['adv'] > 0)
  assert low.any() and high.any()
  assert row['clip_ratio/low'] == pytest.approx(low.mean())
  assert row['clip_ratio/high'] == pytest.approx(high.mean())
  assert row['finite'] == 1.0


# ------------------------------------------------------------------------------------ prepare


def sequence_ratio(logp_BM, batch):
  """s = exp(mean over the sequence's tokens of log pi - log pi_old), on each of its tokens."""
  scored = batch.aux['weight'] > 0
  segment_BM = jnp.take_along_axis(batch.segments_BT, batch.index_BM, axis=1)
  same = (segment_BM[:, :, None] == segment_BM[:, None, :]) & scored[:, None, :]
  gap_BM = jnp.where(scored, logp_BM - batch.aux['old_logp'], 0.0)
  mean_BM = (same * gap_BM[:, None, :]).sum(-1) / jnp.maximum(same.sum(-1), 1)
  return {'sequence_ratio': jnp.exp(mean_BM)}


def gspo(out, aux):
  """GSPO-token (arXiv 2507.18071 eq. 13): value s, gradient through sg(s) pi / sg(pi)."""
  s = aux['sequence_ratio'] * jnp.exp(out.logp - jax.lax.stop_gradient(out.logp))
  return -jnp.minimum(s * aux['adv'], jnp.clip(s, 0.9, 1.1) * aux['adv']), {}


def test_prepare_feeds_sequence_level_quantities():
  """Against autodiff of (1/B) sum_i -min(s_i A_i, clip(s_i) A_i), whatever the packing."""
  tokens, lengths, aux = rows()
  mask = aux['weight'] > 0
  adv_B = np.float32([1.0, -1.0, 0.5, -2.0, 1.5, -0.5])
  weight = (mask / mask.sum(1, keepdims=True)).astype(np.float32)
  aux = {'weight': weight, 'adv': adv_B[:, None] * mask, 'old_logp': aux['old_logp']}

  def loss(params):
    gap = logp_of(params, tokens, lengths) - aux['old_logp'][:, 1:]
    s = jnp.exp(jnp.where(mask[:, 1:], gap, 0.0).sum(1) / mask.sum(1))
    return -jnp.minimum(s * adv_B, jnp.clip(s, 0.9, 1.1) * adv_B).mean()

  want_loss, want = jax.jit(jax.value_and_grad(loss))(PARAMS)
  term = learner.Term(gspo, sequence_ratio, 'weight')
  student = dataclasses.replace(STUDENT, terms=(term,), tx=optax.sgd(100.0))
  for row_length, per_batch in ((12, 2), (34, 1)):
    batches = packed((tokens, lengths, aux), row_length, per_batch)
    state, reports = student.update(student.init(fresh()), batches, (len(lengths),))
    assert learner.reduce_reports(reports)['loss'] == pytest.approx(float(want_loss), rel=1e-5)
    moved = jax.tree.map(lambda old, new: np.asarray(old - new) / 100, PARAMS, state.params)
    assert_trees_close(moved, want, 1e-5)


# ------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize('vocab, per_batch', [(1280, 48), (2560, 24)])
def test_the_compiled_update_holds_one_chunk_of_logits(vocab, per_batch):
  """The whole program of a micro-batch, transformer and tied head included, and the scoring one."""
  model = tiny.model(vocab_size=vocab)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  student = tiny.make_learner(model, shapes, *STUDENT.terms)
  (batch,) = packed(rows([8] * per_batch, 8), row_length=8, per_batch=per_batch)
  sizes = batch.index_BM.size, model.width, vocab, student.loss_chunk
  update = learner.Learner.accumulate.lower(student, shapes, shapes, batch, (jnp.float32(1.0),))
  score = learner.Learner.score.lower(student, shapes, batch)
  test_policy_loss.check_memory(update.compile(), *sizes)
  test_policy_loss.check_memory(score.compile(), *sizes, scores=True)
