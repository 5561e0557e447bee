"""What sequences of a row have in common is packed and computed once."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import learner, packing, sharding, tooling, types
from reasonrl.kernels import self_attention

PROMPTS = (3, 1, 5)  # their lengths


def sequence(tokens, first: int, skip=()) -> types.Sequence:
  """Scored from `first` on, but for `skip`; the weight of each is its position."""
  index = np.array([i for i in range(first, len(tokens)) if i not in skip], dtype=int)
  return types.Sequence(np.array(tokens, np.int32), index, {'weight': index.astype(np.float32)})


def groups(vocab: int, samples: int, seed=0, most=6) -> list[types.Sequence]:
  """Samples of each of PROMPTS; environment tokens inside some; two texts, one unscored row."""
  rng = np.random.default_rng(seed)
  out = []
  for length in PROMPTS:
    prompt = rng.integers(1, vocab, length).tolist()
    for _ in range(samples):
      own = rng.integers(1, vocab, rng.integers(1, most)).tolist()
      out.append(sequence(prompt + own, length, skip=(length + 1,)))
  out += [sequence(rng.integers(1, vocab, 7).tolist(), first) for first in (1, 7)]
  rng.shuffle(out)
  names = ('adv', 'old_logp', 'ref_logp', 'sampler_logp')
  return [
    seq._replace(
      aux={**seq.aux, **{n: np.float32(rng.normal(size=seq.index_M.size) - 2.4) for n in names}}
    )
    for seq in out
  ]


def test_a_group_by_hand():
  """A prompt of two, completions of two and one; another sequence behind them."""
  seqs = [sequence([7, 8, 1], 2), sequence([4, 5], 1), sequence([7, 8, 2, 3], 2)]
  (batch,), where = packing.pack(seqs, 8, 1, share=True)
  assert batch.tokens_BT.tolist() == [[7, 8, 2, 3, 1, 4, 5, 0]]
  assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 2, 0, 1, 0]]
  assert batch.segments_BT.tolist() == [[1, 1, 2, 2, 3, 4, 5, 0]]
  assert batch.prefixes_BT.tolist() == [[1, 1, 1, 1, 1, 4, 4, 0]]
  assert batch.index_BM.tolist() == [[2, 3, 4, 6]]
  assert batch.before_BM.tolist() == [[1, 2, 1, 5]]
  assert batch.aux['weight'].tolist() == [[2, 3, 2, 1]]
  assert where == [(0, 0, 2), (0, 0, 3), (0, 0, 0)]


def test_a_group_that_does_not_fit_one_row_repeats_its_prompt():
  seqs = [sequence([7, 8, 9, n, n], 3) for n in range(3)]
  (batch,), _ = packing.pack(seqs, 7, 2, share=True)
  assert batch.tokens_BT.tolist() == [[7, 8, 9, 0, 0, 1, 1], [7, 8, 9, 2, 2, 0, 0]]


def test_sharing_takes_no_more_rows():
  """Group by group these six sequences take four rows of ten tokens, the longest first three."""
  lengths = ((2, 3), (2, 1), (1, 1), (1, 4), (1, 5), (1, 5))  # of prompt and completion
  seqs = [sequence([1 + i // 2] * p + [9] * c, p) for i, (p, c) in enumerate(lengths)]
  (batch,), _ = packing.pack(seqs, 10, 4, share=True)
  assert (batch.segments_BT > 0).any(1).sum() == 3


@pytest.mark.parametrize(
  'platform, dtype, shared',
  [('cpu', 'bfloat16', True), ('tpu', 'float32', True), ('tpu', 'bfloat16', False)],
)
def test_runs_share_where_attention_can(platform, dtype, shared):
  device = SimpleNamespace(platform=platform)
  student = SimpleNamespace(
    mesh=SimpleNamespace(devices=np.array([device])),
    model=SimpleNamespace(compute_dtype=dtype),
  )
  (batch,), _ = tooling.pack(student, 8, 1, [sequence([7, 8, 1], 2), sequence([7, 8, 2], 2)])
  assert (batch.prefixes_BT is not None) == shared
  assert (batch.segments_BT > 0).sum() == (4 if shared else 6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(11, 40), st.integers(0, 99))
def test_every_token_sees_its_own_sequence(samples, row_length, seed):
  """Its tokens, in order and up to itself, and nothing else."""
  seqs = groups(30, samples, seed)
  batches, where = packing.pack(seqs, row_length, 2, share=True)
  for seq, (b, row, slot) in zip(seqs, where, strict=True):
    batch = batches[b]
    packed = self_attention.Packed(batch.segments_BT, batch.prefixes_BT, batch.positions_BT)
    see = np.asarray(self_attention.visible(packed, None))[row]
    for n, i in enumerate(seq.index_M):
      index = batch.index_BM[row, slot + n]
      at = np.flatnonzero(see[index])
      np.testing.assert_array_equal(batch.tokens_BT[row, at], seq.tokens_T[: i + 1])
      np.testing.assert_array_equal(batch.positions_BT[row, at], np.arange(i + 1))
      assert batch.before_BM[row, slot + n] == at[-2]
  alone, _ = packing.pack(seqs, row_length, 2, share=False)
  assert len(batches) <= len(alone)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'changes',
  [{}, {'sliding_window': 3}, {'scan_layers': True, 'remat': True}],
  ids=['full', 'window', 'scan'],
)
def test_loss_gradient_and_scores_are_those_without_sharing(changes, dtype):
  """In bfloat16 a prompt is rounded once, so what differs is the rounding of its gradient."""
  model = tiny.model(compute_dtype=dtype, num_layers=2, **changes)
  params = model.init(jax.random.key(0))
  student = tiny.make_learner(model, params)
  seqs, found, tokens = groups(model.vocab_size, 4), {}, {}
  for share in (False, True):
    batches, where = packing.pack(seqs, 32, 2, share=share)
    grads, loss, reports = student.gradients(params, batches, (7.0,))
    shape = (len(seqs), max(seq.tokens_T.size for seq in seqs))
    scores = zip(*(jax.device_get(student.score(params, batch)) for batch in batches), strict=True)
    scores = [packing.unpack(x, seqs, where, shape) for x in scores]
    report = learner.reduce_reports((reports, {}))
    found[share] = grads, float(loss), scores[:2], report
    tokens[share] = sum(int((batch.segments_BT > 0).sum()) for batch in batches)
  assert tokens[False] == sum(seq.tokens_T.size for seq in seqs)
  assert tokens[True] <= tokens[False] - 3 * sum(PROMPTS) / 2  # most prompts lie there once
  (want_grads, want_loss, want_scores, want), (grads, loss, scores, report) = found.values()
  near = 1e-5 if dtype == 'float32' else 0.03
  assert loss == pytest.approx(want_loss, rel=near)
  for a, b in zip(scores, want_scores, strict=True):
    np.testing.assert_allclose(a, b, atol=near, rtol=near)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=near * np.abs(b).max())
  assert report.keys() == want.keys()
  rel = 1e-4 if dtype == 'float32' else 0.1
  assert all(report[name] == pytest.approx(want[name], rel=rel) for name in want)


def test_short_completions_have_more_segments_in_a_row_than_scored_tokens():
  """Five prompts, one scored token each: the log-ratio of each sequence is its own (GSPO)."""
  seqs = []
  for n in range(5):
    aux = {'weight': np.ones(1, np.float32), 'old_logp': np.float32([-n])}
    seqs.append(types.Sequence(np.array([n + 1, n + 1, 9], np.int32), np.array([2]), aux))
  (batch,), where = packing.pack(seqs, 16, 1, share=True)
  assert batch.segments_BT.max() == 10 > batch.index_BM.shape[1]
  gspo = tiny.algorithm('gspo', num_iterations=2, old_policy='trainer')
  found = gspo.prepare(np.zeros_like(batch.aux['weight']), batch)['sequence_log_ratio']
  assert [float(found[row, slot]) for _, row, slot in where] == [0, 1, 2, 3, 4]


def test_a_mesh_shares_too():
  """Rows over data and fsdp, heads over tensor: the gradient of one device."""
  model = tiny.model(num_layers=2)
  params = model.init(jax.random.key(0))
  one = tiny.make_learner(model, params)
  batches, _ = packing.pack(groups(model.vocab_size, 4), 16, 8, share=True)
  want, loss, _ = one.gradients(params, batches, (7.0,))
  mesh = sharding.make_mesh(2, 2, 2)
  many = dataclasses.replace(one, mesh=mesh)
  placed = jax.device_put(params, sharding.param_shardings(params, model.sharding_rules, mesh))
  got, got_loss, _ = many.gradients(placed, batches, (7.0,))
  assert float(got_loss) == pytest.approx(float(loss), rel=1e-5)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
