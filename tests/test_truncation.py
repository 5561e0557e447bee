"""Training with top-k, top-p and min-p: sampler, scorer and gradient mean one distribution.

The ids that a token was drawn from travel from the sampler to the loss; here all of it together.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny
from test_learner import assert_trees_close, gradient, hidden_of

from reasonrl import learner, packing, sampling, sharding, types
from reasonrl.configs import common
from reasonrl.kernels.policy_loss import reference as twin

MODEL = tiny.model()
FORBIDDEN = (0, 4)
GRPO = tiny.algorithm(num_iterations=2, beta=0.1)
MESHES = {name: sharding.make_mesh(*map(int, name)) for name in ('111', '811', '222')}
TRUNCATIONS = [
  ({'top_k': 3}, 1.0),
  ({'top_p': 0.7}, 1.0),
  ({'min_p': 0.3}, 0.6),
  ({'top_k': 6, 'top_p': 0.9, 'min_p': 0.2}, 1.4),
]


def parameters():
  """Random values, large enough for distributions that are far from flat."""
  shapes, rng = jax.eval_shape(MODEL.init, jax.random.key(0)), np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


PARAMS = parameters()


def make(temperature, mesh='111'):
  sampler = sampling.Sampler(MODEL, MESHES[mesh], FORBIDDEN, **common.sampler())
  term = learner.Term(GRPO.token_loss, None, 'weight')
  student = tiny.make_learner(MODEL, PARAMS, term)
  return sampler, dataclasses.replace(
    student,
    mesh=MESHES[mesh],
    form=sampler.form(temperature),
    forbidden=FORBIDDEN,
    tx=optax.sgd(4.0),
  )


def sample(sampler, params, how, temperature, seed=0) -> types.Samples:
  """24 rows of 12 new tokens behind three prompts."""
  prompts = np.array([[1, 2, 3], [5, 0, 0], [7, 8, 0]], np.int32)
  fields = {'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'max_kept_tokens': MODEL.vocab_size} | how
  requests = types.Requests(
    tokens_PT=prompts,
    length_P=np.array([3, 1, 2], np.int32),
    prompt_R=np.repeat(np.arange(3, dtype=np.int32), 8),
    key_R=sampling.row_keys(seed, 'train', 0, 0, 0, 0, np.arange(24), 0),
    max_new_R=np.full(24, 12, np.int32),
    numbers={},
    temperature_R=None,
  )
  spec = types.Spec(temperature=temperature, stop_ids=(0,), controls=(), **fields)
  return sampler.generate(params, requests, spec, 0, lambda: None)


def rows(samples, kept=True, **scores):
  """Sequences of the sampled tokens, with random advantages."""
  mask_RS = (samples.source_RS == types.POLICY).astype(np.float32)
  adv_RS = np.random.default_rng(1).normal(size=mask_RS.shape)
  aux = {'weight': mask_RS, 'adv': adv_RS, 'sampler_logp': samples.logp_RS, **scores}
  aux |= {'kept': samples.kept_RSK} if kept else {}
  return packing.sequences(samples.tokens_RS, samples.length_R, aux)


def score(student, params, samples, kept=True):
  """logp_RS and entropy_RS of the sampled tokens."""
  seqs = rows(samples, kept)
  batches, where = packing.pack(seqs, 40, 4, share=True)
  outs = jax.device_get([student.score(params, batch) for batch in batches])
  shape = samples.tokens_RS.shape
  return [packing.unpack([x[i] for x in outs], seqs, where, shape) for i in (0, 1)]


def expected(params, samples, temperature):
  """The same two in float64, from hidden states made row by row and the kept ids alone."""
  bias_V = np.zeros(MODEL.vocab_size)
  bias_V[list(FORBIDDEN)] = -1e9
  hidden_RSD = np.asarray(jax.jit(hidden_of)(params, samples.tokens_RS, samples.length_R))
  policy = samples.source_RS == types.POLICY
  out = np.zeros((2, *policy.shape))
  out[:, policy] = oracle.scores(
    hidden_RSD[np.roll(policy, -1, axis=1)],
    MODEL.head(params),
    samples.tokens_RS[policy],
    temperature=temperature,
    bias_V=bias_V,
    kept_MK=samples.kept_RSK[policy],
  )
  return out


@pytest.mark.parametrize('how, temperature', TRUNCATIONS, ids=str)
def test_sampler_and_scorer_agree(how, temperature):
  sampler, student = make(temperature)
  samples = sample(sampler, PARAMS, how, temperature)
  logp_RS, entropy_RS = score(student, PARAMS, samples)
  np.testing.assert_allclose(logp_RS, samples.logp_RS, atol=1e-5, rtol=0)
  want = expected(PARAMS, samples, temperature)
  np.testing.assert_allclose((logp_RS, entropy_RS), want, atol=1e-5, rtol=0)
  # Without the ids it is another distribution.
  whole_RS, wide_RS = score(student, PARAMS, samples, kept=False)
  policy = samples.source_RS == types.POLICY
  assert (logp_RS - whole_RS)[policy].mean() > 0.1 and (wide_RS > entropy_RS)[policy].mean() > 0.9


def update(student, params, samples, old_RS):
  """Parameters after one step on the samples, and its metrics."""
  batches, _ = packing.pack(rows(samples, old_logp=old_RS, ref_logp=old_RS), 40, 4, share=True)
  tokens = (samples.source_RS == types.POLICY).sum()
  state, reports = student.update(student.init(jax.tree.map(jnp.copy, params)), batches, (tokens,))
  return state.params, learner.reduce_reports(reports)


@pytest.mark.parametrize('how, temperature', TRUNCATIONS, ids=str)
def test_the_ratio_is_one_on_fresh_samples_alone(how, temperature):
  """Before and after a large step; on the old samples with the old ids it is exactly another."""
  sampler, student = make(temperature)
  samples = sample(sampler, PARAMS, how, temperature)
  old_RS, _ = score(student, PARAMS, samples)
  moved, row = update(student, PARAMS, samples, old_RS)
  assert row['mismatch/max'] < 1e-5 and row['finite'] == 1
  assert row['ratio_max'] == pytest.approx(1, abs=1e-5) and abs(row['kl']) < 1e-9

  fresh = sample(sampler, moved, how, temperature, seed=1)
  _, row = update(student, moved, fresh, score(student, moved, fresh)[0])
  assert row['mismatch/max'] < 1e-5 and row['ratio_max'] == pytest.approx(1, abs=1e-5)

  _, row = update(student, moved, samples, old_RS)
  want, policy = expected(moved, samples, temperature)[0], samples.source_RS == types.POLICY
  ratio = np.exp(want - old_RS)[policy]
  assert ratio.max() > 1.2 and np.abs(ratio - 1).mean() > 0.05
  assert row['ratio_max'] == pytest.approx(ratio.max(), rel=1e-4)
  assert row['mismatch/max'] == pytest.approx(np.abs(want - old_RS)[policy].max(), rel=1e-4)


def reference(samples, scores, temperature):
  """Loss and gradient by autodiff of the materialised formula: no packing, no fused operation."""
  policy = samples.source_RS == types.POLICY
  bias_V = jnp.zeros(MODEL.vocab_size).at[jnp.array(FORBIDDEN)].set(-1e9)
  aux = {'weight': policy, 'adv': np.random.default_rng(1).normal(size=policy.shape), **scores}
  aux = {name: jnp.asarray(x[policy], jnp.float32) for name, x in aux.items()}
  form = (1.0, None, temperature, jnp.dtype('float32'))

  def loss(params):
    hidden_MD = hidden_of(params, samples.tokens_RS, samples.length_R)[np.roll(policy, -1, axis=1)]
    fn = lambda logp, entropy, aux: GRPO.token_loss(learner.Out(logp, entropy), aux)
    target_M = samples.tokens_RS[policy]
    support = {'kept': jnp.asarray(samples.kept_RSK[policy])}
    args = (hidden_MD, MODEL.head(params), bias_V, target_M, support, aux, fn, form)
    return twin.policy_loss(*args)[0] / policy.sum()

  return jax.device_get(jax.jit(jax.value_and_grad(loss))(PARAMS))


def test_loss_and_gradient_do_not_depend_on_the_slicing():
  """Packing, micro-batches, order, width of the ids and meshes, with ids in every row."""
  how, temperature = {'top_p': 0.8, 'min_p': 0.1}, 0.8
  sampler, student = make(temperature)
  samples = sample(sampler, PARAMS, how, temperature)
  noise = lambda seed: np.random.default_rng(seed).normal(size=samples.logp_RS.shape) * 0.3
  scores = {'old_logp': samples.logp_RS + noise(2), 'ref_logp': samples.logp_RS + noise(3)}
  want_loss, want = reference(samples, scores, temperature)
  assert abs(want_loss) > 1e-3 and all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(want))
  wide = np.pad(samples.kept_RSK, ((0, 0), (0, 0), (0, 3)), constant_values=-1)
  seqs, wider = rows(samples, **scores), rows(dataclasses.replace(samples, kept_RSK=wide), **scores)
  ways = {
    'one micro-batch': (seqs, 15, 24, '111'),
    'another order': (seqs[::-1], 33, 4, '111'),
    'more padding': (wider, 64, 16, '111'),
    'eight devices': (seqs, 40, 8, '811'),
    'two by two by two': (seqs, 40, 4, '222'),
  }
  for way, (chosen, row_length, per_batch, mesh) in ways.items():
    _, student = make(temperature, mesh)
    batches, _ = packing.pack(chosen, row_length, per_batch, share=True)
    batches = [sharding.put_rows(batch, MESHES[mesh]) for batch in batches]
    params = student.init(jax.tree.map(jnp.copy, PARAMS)).params
    tokens = (samples.source_RS == types.POLICY).sum()
    loss, got, _ = gradient(student, batches, tokens, params)
    assert loss == pytest.approx(want_loss, rel=1e-5), way
    assert_trees_close(got, want)
