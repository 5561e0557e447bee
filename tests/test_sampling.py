"""The sampler: keys, log-probabilities, layouts, work done, and its stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from reasonrl import ops, records, sampling, sharding, types
from reasonrl.configs import common
from reasonrl.kernels import decode_attention_gpu
from reasonrl.models import decoder
from reasonrl.sampling import plan

V, S = 24, 24
FORBIDDEN = (0, 5)
NEVER = (5,)  # a stop id that is never sampled
RUNNING, EOS, LENGTH = records.Stop
TINY = {
  'vocab_size': V,
  'num_layers': 2,
  'width': 16,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 4,
  'mlp_width': 24,
  'max_position': 64,
}
GEMMA = {
  'norm_plus_one': True,
  'post_norms': True,
  'qk_norm': True,
  'embed_scale': True,
  'final_softcap': 2.0,
  'attention_softcap': 3.0,
  'sliding_window': 4,
  'sliding_window_pattern': 2,
  'rope_local_theta': 100.0,
}


def make(cls=decoder.Decoder, **changes):
  fields = common.model('nano').to_dict() | TINY | changes
  return cls(**{k: v for k, v in fields.items() if k not in ('kind', 'weights')})


@functools.cache
def parameters(model):
  """Random values, large enough for distributions that are far from flat."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


def make_sampler(model, mesh=(1, 1, 1), **changes):
  fields = {**common.sampler(), 'buckets': 1, **changes}  # fewer programs to compile
  return sampling.Sampler(model, sharding.make_mesh(*mesh), FORBIDDEN, **fields)


@pytest.fixture(scope='module')
def sampler():
  return make_sampler(make())


@pytest.fixture(scope='module')
def params(sampler):
  return sampler.layout(parameters(sampler.model))


def spec(
  temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_kept_tokens=0, stop_ids=NEVER, controls=()
):
  return types.Spec(temperature, top_k, top_p, min_p, max_kept_tokens, stop_ids, controls)


def keys(samples, seed=0):
  return sampling.row_keys(seed, 'train', 0, 0, 0, 0, np.asarray(samples), 0)


PROMPTS = ((7,), (1, 2, 3), (4, 3, 2, 1, 6))
FIVE = (*PROMPTS, (2, 2), (9, 8, 7, 6))


def ask(prompt_R, max_new, prompts=PROMPTS, width=6, seed=0):
  """Requests over `prompts`; request r has the key of sample r."""
  tokens_PT = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens_PT, prompts, strict=True):
    row[: len(prompt)] = prompt
  prompt_R = np.asarray(prompt_R, np.int32)
  return types.Requests(
    tokens_PT=tokens_PT,
    length_P=np.asarray([len(p) for p in prompts], np.int32),
    prompt_R=prompt_R,
    key_R=keys(np.arange(prompt_R.size), seed),
    max_new_R=np.broadcast_to(np.asarray(max_new, np.int32), prompt_R.shape),
    numbers={},
    temperature_R=None,
  )


def generate(sampler, requests, how, slots=0):
  return sampler.generate(parameters(sampler.model), requests, how, slots, lambda: None)


@functools.partial(jax.jit, static_argnums=0)
def _scores(sampler, params, tokens_BT):
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  hidden, _ = sampler.model.hidden(params, tokens_BT, positions, jnp.ones_like(positions), None)
  flat = hidden.reshape(-1, hidden.shape[-1])
  head = sampler.model.head(params)
  bias_V = ops.forbid(sampler.model.vocab_size, sampler.forbidden)
  z = ops.logits(flat, head, bias_V, sampler.form(1.0))
  return z.reshape(*tokens_BT.shape, -1)


def log_softmax(sampler, temperature, tokens_BT):
  """float64 [B, T, V]: entry t is the distribution of token t, from one full forward."""
  z = np.asarray(_scores(sampler, parameters(sampler.model), tokens_BT), np.float64)
  z /= temperature or 1.0  # greedy draws report the log-probability at temperature 1
  top = z.max(-1, keepdims=True)
  logp = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
  return np.concatenate([np.zeros_like(logp[:, :1]), logp[:, :-1]], axis=1)


def chosen(logp_BTV, tokens_BT):
  return np.take_along_axis(logp_BTV, tokens_BT[..., None], axis=2)[..., 0]


# ------------------------------------------------------------------------------------ random keys


def test_many_prompts_are_prefilled_in_passes(monkeypatch, sampler, params):
  """Five prompts, two at a time and the last one beside a filler: the same keys and values."""
  tokens = jnp.asarray(np.random.default_rng(0).integers(6, V, (5, 7)), jnp.int32)
  length = jnp.asarray([7, 1, 3, 7, 5])
  run = lambda: jax.jit(lambda *given: sampler._prefilled(*given, 8))(params, tokens, length)
  whole = run()
  monkeypatch.setattr(sampling, 'PREFILL', 14)
  parts = run()
  np.testing.assert_array_equal(parts.position_BS, whole.position_BS)
  same = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(same, parts.own, whole.own)


def test_row_keys_fold_in_every_component():
  base = dict(
    seed=1, purpose='train', phase=2, iteration=3, step=4, prompt_R=5, sample_R=6, thread_R=7
  )
  key = jax.random.key(1)
  for part in (sampling.PURPOSES['train'], 2, 3, 4, 5, 6, 7):
    key = jax.random.fold_in(key, part)
  one = sampling.row_keys(**base | {'prompt_R': np.array([5])})
  assert one.dtype == np.uint32
  np.testing.assert_array_equal(one, [jax.random.key_data(key)])
  found = {tuple(one[0])}
  for name, value in base.items():
    other = 'eval' if name == 'purpose' else value + 1
    changed = base | {name: other}
    changed['prompt_R'] = np.array([changed['prompt_R']])
    found.add(tuple(sampling.row_keys(**changed)[0]))
  assert len(found) == 1 + len(base)


PINNED_KEYS = [
  [3362813952, 1555611411],
  [965583632, 1382675192],
  [1213062660, 3775316157],
  [363683482, 121097843],
]
PINNED_UNIFORMS = [0.4664444923400879, 0.14705240726470947, 0.31168270111083984, 0.4972153902053833]


def test_another_seed_compiles_nothing():
  sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(2), 0)
  before = sampling._row_keys._cache_size()
  sampling.row_keys(123, 'train', 0, 0, 0, 0, np.arange(2), 0)
  assert sampling._row_keys._cache_size() == before


def test_row_keys_never_change():
  """Other values mean that every seeded result of the past is lost."""
  assert sampling.PURPOSES['train'] == 0 and sampling.PURPOSES['eval'] == 1
  got = sampling.row_keys(0, 'train', 0, 0, 0, np.array([0, 0, 1, 2**31 - 1]), np.arange(4), 0)
  assert got.tolist() == PINNED_KEYS
  u = sampling.uniforms(jnp.asarray(got), jnp.asarray([0, 1, 2, 3]))
  np.testing.assert_array_equal(u, np.asarray(PINNED_UNIFORMS, np.float32))


def test_uniforms_are_uniform_and_depend_on_key_and_position():
  key_B, position_B = jnp.asarray(keys(np.arange(4000))), jnp.full(4000, 9)
  u = np.sort(sampling.uniforms(key_B, position_B))
  assert 0 <= u[0] and u[-1] < 1
  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand.
  assert np.abs(u - np.arange(4000) / 4000).max() < 1.95 / 4000**0.5
  other = sampling.uniforms(jnp.tile(key_B[:1], (4000, 1)), jnp.arange(4000))
  assert len(np.unique(other)) > 3990 and len(np.unique(u)) > 3990


# ------------------------------------------------------------------------------------ generate


MODELS = {'llama': {}, 'gemma': GEMMA, 'scan': {'scan_layers': True, 'tied_embeddings': False}}


@pytest.mark.parametrize(
  'changes, temperature',
  [('llama', 1.0), ('llama', 0.6), ('gemma', 0.6), ('scan', 1.0)],
)
def test_sampled_logp_is_the_teacher_forced_one(changes, temperature):
  """float32, within 1e-4, at any temperature, with forbidden ids."""
  sampler = make_sampler(make(**MODELS[changes]))
  requests = ask(np.repeat([0, 1, 2], 8), 15)
  out = generate(sampler, requests, spec(temperature))
  want = chosen(log_softmax(sampler, temperature, out.tokens_RS), out.tokens_RS)
  policy = out.source_RS == types.POLICY
  assert policy.sum() == 24 * 15
  np.testing.assert_allclose(out.logp_RS[policy], want[policy], atol=1e-4, rtol=0)
  assert not out.logp_RS[~policy].any()
  assert not np.isin(out.tokens_RS[policy], FORBIDDEN).any()
  assert len(np.unique(out.tokens_RS[policy])) > 8  # not a test of a constant


def kept_by_sort(logp_V, top_k=0, top_p=1.0, min_p=0.0):
  """The ids that top-k, then top-p, then min-p keep, the likeliest first."""
  order = np.argsort(-logp_V)
  p = np.exp(logp_V[order])
  p = p[: top_k or None]
  before = np.cumsum(p / p.sum()) - p / p.sum()
  p = p[before < top_p]
  return order[: (p >= min_p * p[0]).sum()].tolist()


TRUNCATIONS = [
  ({'top_k': 5}, 1.0),
  ({'top_p': 0.8}, 1.0),
  ({'min_p': 0.3}, 0.7),
  ({'top_k': 12, 'top_p': 0.9, 'min_p': 0.3}, 0.6),
]


@pytest.mark.parametrize('how, temperature', TRUNCATIONS, ids=str)
def test_truncated_samples_carry_what_they_were_drawn_from(sampler, how, temperature):
  """The kept ids of every token and log p over their sum, against float64 and a sort."""
  requests = ask(np.repeat([0, 1, 2], 8), 15)
  out = generate(sampler, requests, spec(temperature, max_kept_tokens=20, **how))
  logp_RSV = log_softmax(sampler, temperature, out.tokens_RS)
  policy, sizes = out.source_RS == types.POLICY, []
  assert out.kept_RSK.dtype == np.int32 and (out.kept_RSK[~policy] == -1).all()
  for logp_V, ids_K, token, logp in zip(
    logp_RSV[policy],
    out.kept_RSK[policy],
    out.tokens_RS[policy],
    out.logp_RS[policy],
    strict=True,
  ):
    kept = kept_by_sort(logp_V, **how)
    assert ids_K.tolist() == kept + [-1] * (20 - len(kept)) and token in kept
    assert logp == pytest.approx(logp_V[token] - np.log(np.exp(logp_V[kept]).sum()), abs=2e-5)
    sizes.append(len(kept))
  assert len(set(sizes)) > 3 or how == {'top_k': 5}  # not a test of a constant
  # Remembering is all that it adds; waves and devices change nothing.
  plain = generate(sampler, requests, spec(temperature, **how))
  assert plain.kept_RSK is None
  np.testing.assert_array_equal(plain.logp_RS, out.logp_RS)
  other = make_sampler(sampler.model, (2, 2, 2))
  waves = generate(other, requests, spec(temperature, max_kept_tokens=20, **how), slots=8)
  np.testing.assert_array_equal(waves.kept_RSK, out.kept_RSK)


def test_more_kept_tokens_than_can_be_remembered(sampler):
  """An error that names the size and the field; the size itself is enough."""
  requests = ask(np.repeat([0, 1, 2], 8), 15)
  whole = generate(sampler, requests, spec(top_p=0.9, max_kept_tokens=500))
  assert whole.kept_RSK.shape[-1] == V  # no more than there are
  size = (whole.kept_RSK >= 0).sum(-1).max()
  enough = generate(sampler, requests, spec(top_p=0.9, max_kept_tokens=int(size)))
  np.testing.assert_array_equal(enough.kept_RSK, whole.kept_RSK[..., :size])
  says = f'drawn from {size} kept tokens, more than max_kept_tokens={size - 1} '
  with pytest.raises(records.UserError, match=says):
    generate(sampler, requests, spec(top_p=0.9, max_kept_tokens=int(size) - 1))
  for how in ({}, {'temperature': 0.0, 'top_p': 0.5}):  # nothing is left out
    assert generate(sampler, requests, spec(max_kept_tokens=1, **how)).kept_RSK is None


def test_int8_keys_and_values(sampler):
  """Near the others, and not the same: what the metrics of `mismatch` see."""
  requests = ask(np.repeat([0, 1, 2], 8), 15)
  for slots in (0, 5):
    out = generate(make_sampler(sampler.model, cache_dtype='int8'), requests, spec(), slots)
    want = chosen(log_softmax(sampler, 1.0, out.tokens_RS), out.tokens_RS)
    policy = out.source_RS == types.POLICY
    gap = np.abs(out.logp_RS - want)[policy]
    assert 1e-4 < gap.mean() < 0.02 and gap.max() < 0.2


def test_greedy_rows_among_others_leave_nothing_out(sampler):
  """They have no kept ids, and their size is not counted."""
  temperature = np.asarray([0.0, 1.0] * 12, np.float32)
  requests = dataclasses.replace(ask(np.repeat([0, 1, 2], 8), 15), temperature_R=temperature)
  out = generate(sampler, requests, spec(top_p=0.3, max_kept_tokens=V - 3))
  kept = (out.kept_RSK >= 0).any(-1)
  policy = out.source_RS == types.POLICY
  np.testing.assert_array_equal(kept, policy & (temperature > 0)[:, None])
  greedy = generate(sampler, ask(np.repeat([0, 1, 2], 8), 15), spec(0.0))
  np.testing.assert_array_equal(out.tokens_RS[::2], greedy.tokens_RS[::2])
  for bad, how in (
    (-temperature - 1, spec()),
    (temperature, spec(0.0)),
    (temperature * np.nan, spec()),
  ):
    with pytest.raises(records.UserError, match='temperatures by request'):
      generate(sampler, dataclasses.replace(requests, temperature_R=bad), how)


def test_bfloat16_logp_is_near_the_teacher_forced_one():
  sampler = make_sampler(make(compute_dtype='bfloat16'))
  out = generate(sampler, ask(np.repeat([0, 1, 2], 8), 15), spec())
  want = chosen(log_softmax(sampler, 1.0, out.tokens_RS), out.tokens_RS)
  policy = out.source_RS == types.POLICY
  gap = np.abs(out.logp_RS - want)[policy]
  assert gap.mean() < 0.02 and gap.max() < 0.2
  decode = sampler.layout(parameters(sampler.model))
  assert decode['layers']['00']['attn']['qkv']['weight'].dtype == jnp.bfloat16
  assert decode['final_norm']['scale'].dtype == jnp.float32


@pytest.mark.parametrize('mesh', [(1, 1, 2), (1, 2, 1)])
def test_scanned_layers_are_stacked_once_a_rollout(mesh):
  sampler = make_sampler(make(scan_layers=True, compute_dtype='bfloat16'), mesh)
  decode, split = sampler.layout(parameters(sampler.model)), mesh[2] > 1
  axes = {'q': (None, 'tensor'), 'o': (None, None, 'tensor')} if split else {'qkv': (), 'o': ()}
  for name, of in axes.items():
    weight = decode['layers']['attn'][name]['weight']
    assert weight.shape[0] == sampler.model.num_layers and weight.dtype == jnp.bfloat16
    assert weight.sharding.is_equivalent_to(NamedSharding(sampler.mesh, PartitionSpec(*of)), 3)
  assert decode['layers']['attn_norm']['scale'].dtype == jnp.float32


def test_rows_are_whole():
  """Prompt, completion, padding: lengths, sources, caps and stop reasons of every row."""
  prompt_R, max_new = [2, 0, 1, 1, 0], [3, 9, 0, 5, 1]
  out = generate(make_sampler(make()), ask(prompt_R, max_new), spec())
  assert out.tokens_RS.shape == (5, 6 + 9)
  assert out.prompt_length_R.tolist() == [5, 1, 3, 3, 1]
  assert out.length_R.tolist() == [8, 10, 3, 8, 2]
  assert out.stop_R.tolist() == [LENGTH] * 5
  for r, (start, end) in enumerate(zip(out.prompt_length_R, out.length_R, strict=True)):
    assert tuple(out.tokens_RS[r, :start]) == PROMPTS[prompt_R[r]]
    at = np.arange(15)
    policy = (at >= start) & (at < end)
    np.testing.assert_array_equal(out.source_RS[r], np.where(policy, types.POLICY, types.PROMPT))
    assert not out.tokens_RS[r, end:].any()


def test_eos_is_sampled_stored_and_the_last(sampler):
  stop_ids, max_new = (3, 8, 12), 7
  out = generate(sampler, ask(np.arange(60) % 3, max_new), spec(stop_ids=stop_ids))
  free = generate(sampler, ask(np.arange(60) % 3, max_new), spec())
  ended, at_the_cap = 0, 0
  for r in range(60):
    start, end = out.prompt_length_R[r], out.length_R[r]
    same = free.tokens_RS[r, start : start + max_new]
    first = np.flatnonzero(np.isin(same, stop_ids))
    want = first[0] + 1 if first.size else max_new
    assert end - start == want
    assert out.stop_R[r] == (EOS if first.size else LENGTH)
    np.testing.assert_array_equal(out.tokens_RS[r, start:end], same[:want])
    assert (out.source_RS[r, start:end] == types.POLICY).all()
    assert out.logp_RS[r, start:end].all()
    for after in (out.tokens_RS, out.logp_RS, out.source_RS):
      assert not after[r, end:].any()
    ended += first.size > 0
    at_the_cap += first.size > 0 and want == max_new
  assert 10 < ended < 60 and at_the_cap  # every kind of end was seen


def test_greedy_is_the_argmax_of_the_full_forward(sampler):
  prompts = tuple((1 + i % 20, 1 + i // 20) for i in range(60))
  out = generate(sampler, ask(np.arange(60), 20, prompts), spec(temperature=0.0))
  logp = log_softmax(sampler, 0.0, out.tokens_RS)
  policy = out.source_RS == types.POLICY
  best, second = np.sort(logp, axis=-1)[..., :-3:-1].transpose(2, 0, 1)
  differ = policy & (logp.argmax(-1) != out.tokens_RS)
  assert not (differ & (best - second > 1e-4)).any()
  assert differ.sum() <= 2, f'{differ.sum()} ties in {policy.sum()} tokens'
  np.testing.assert_allclose(out.logp_RS[policy], chosen(logp, out.tokens_RS)[policy], atol=1e-4)
  for how in (spec(top_k=1), spec(top_p=1e-6)):
    same = generate(sampler, ask(np.arange(60), 20, prompts), how)
    assert (same.tokens_RS == out.tokens_RS).mean() > 0.99


# ------------------------------------------------------------------------------------ batch layout


def compare(sampler, one, two, requests):
  """Draws compared and draws that differ, row by row up to the first difference.

  A difference is allowed where the uniform lies within 1e-5 of a boundary of the cdf.
  """
  draws = differ = 0
  for r in range(one.length_R.size):
    start, end = one.prompt_length_R[r], one.length_R[r]
    ids = [samples.tokens_RS[r, start:end] for samples in (one, two)]
    wrong = np.flatnonzero(ids[0] != ids[1])
    draws += wrong[0] + 1 if wrong.size else end - start
    if not wrong.size:
      assert two.length_R[r] == end
      continue
    at = start + wrong[0]
    cdf = np.cumsum(np.exp(log_softmax(sampler, 1.0, one.tokens_RS[r : r + 1])[0, at]))
    u = sampling.uniforms(jnp.asarray(requests.key_R[r : r + 1]), jnp.asarray([at]))
    assert np.abs(cdf - float(u[0])).min() < 1e-5, f'request {r} differs at position {at}'
    differ += 1
  return draws, differ


@pytest.fixture(scope='module')
def many(sampler):
  """320 requests of up to 55 tokens, 8 for each of 40 prompts, as rows that share their prompts."""
  rng = np.random.default_rng(0)
  prompts = tuple(tuple(rng.integers(1, V, rng.integers(1, 7)).tolist()) for _ in range(40))
  order, new = rng.permutation(320), np.repeat([25, 45, 55], [160, 110, 50])
  requests = ask(np.repeat(np.arange(40), 8)[order], rng.permutation(new), prompts)
  return requests, generate(sampler, requests, spec())


def reorder(requests, order):
  rows = {name: getattr(requests, name)[order] for name in ('prompt_R', 'key_R', 'max_new_R')}
  return dataclasses.replace(requests, **rows)


LAYOUTS = {
  # changes of the sampler, slots, mesh
  'live rows move together': ({'buckets': 4}, 0, (1, 1, 1)),
  'short segments': ({'segment': 8}, 0, (1, 1, 1)),
  'other order': ({}, 0, (1, 1, 1)),
  'wider prompts': ({}, 0, (1, 1, 1)),
  'nothing shared': ({}, 0, (1, 1, 1)),
  'a third without company': ({}, 0, (1, 1, 1)),
  'refilled': ({'buckets': 2}, 64, (1, 1, 1)),
  'refilled by prompts': ({}, 64, (1, 1, 1)),
  'refilled in short segments': ({'segment': 8, 'buckets': 2}, 50, (1, 1, 1)),
  'one row': ({}, 1, (1, 1, 1)),
  'eight devices': ({}, 0, (8, 1, 1)),
  'eight devices refilled': ({'segment': 16, 'buckets': 2}, 64, (4, 2, 1)),
  'with a tensor axis': ({}, 0, (2, 2, 2)),
  'with a tensor axis refilled': ({'segment': 32, 'buckets': 2}, 40, (2, 1, 4)),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_draws_do_not_depend_on_the_layout(sampler, many, layout):
  """Rows, company, order, padding, segments, refill and devices: the same tokens by request."""
  requests, want = many
  changes, slots, mesh = LAYOUTS[layout]
  sampler = make_sampler(sampler.model, mesh, **changes)
  order, other = np.arange(320), requests
  if layout == 'other order':
    order = np.random.default_rng(1).permutation(320)
  elif layout == 'one row':
    order = np.arange(0, 320, 40)
  elif layout == 'a third without company':  # groups of different sizes
    order = np.flatnonzero(np.random.default_rng(1).random(320) < 1 / 3)
  elif layout in ('wider prompts', 'refilled by prompts'):
    sampler = make_sampler(make(max_position=128), mesh, **changes)
    wide = np.pad(requests.tokens_PT, ((0, 0), (0, 60)), constant_values=9)
    other = dataclasses.replace(requests, tokens_PT=wide)
  elif layout == 'nothing shared':  # a copy of its prompt for every request
    rows = requests.prompt_R
    copies = {'tokens_PT': requests.tokens_PT[rows], 'length_P': requests.length_P[rows]}
    other = dataclasses.replace(requests, **copies, prompt_R=np.arange(320, dtype=np.int32))
  got = generate(sampler, reorder(other, order), spec(), slots)
  pick = lambda x: x[order]
  want = types.Samples(
    **{k: pick(v) for k, v in vars(want).items() if v is not None}, kept_RSK=None
  )
  draws, differ = compare(make_sampler(sampler.model), want, got, reorder(requests, order))
  assert draws >= min(10_000, 30 * order.size) and differ <= 3, (draws, differ)
  print(f'{layout}: {draws} draws, {differ} within 1e-5 of a boundary')
  if not differ:
    policy = want.source_RS == types.POLICY
    for name in ('logp_RS', 'plain_logp_RS', 'entropy_RS'):
      gap = getattr(got, name)[:, : policy.shape[1]] - getattr(want, name)
      assert np.abs(gap)[policy].max() < 1e-4, name


def test_other_keys_give_other_draws(sampler, many):
  """The comparison above can fail."""
  requests, want = many
  other = dataclasses.replace(requests, key_R=keys(np.arange(320), seed=1))
  with pytest.raises(AssertionError, match='differs at position'):
    compare(sampler, want, generate(sampler, other, spec()), requests)


# ------------------------------------------------------------------------------------ work done


CALLS = []


class Counting(decoder.Decoder):
  """Notes the shape of its input every time the trunk runs on the device."""

  def hidden(self, params, inputs, *rest, **more):
    note = functools.partial(CALLS.append, inputs.shape)
    jax.debug.callback(note)
    return super().hidden(params, inputs, *rest, **more)


def counted(requests, slots):
  """Lengths, and the shapes of the trunk's inputs."""
  sampler = make_sampler(make(Counting, num_layers=1))
  CALLS.clear()
  out = generate(sampler, requests, spec(stop_ids=tuple(range(1, V, 3))), slots)
  jax.effects_barrier()
  assert (out.stop_R == EOS).all()
  return out.length_R - out.prompt_length_R, list(CALLS)


def test_one_prefill_per_prompt_and_no_step_after_the_last_row_stopped():
  lengths, calls = counted(ask(np.repeat([0, 1, 2], 4), 30), 0)
  assert calls == [(3, 6)] + [(12, 1)] * max(lengths) and max(lengths) < 30


def test_a_row_that_stops_takes_the_next_request():
  """With 4 rows as many steps as a queue takes, and never more than the longest too many."""
  requests = ask(np.repeat([0, 1, 2], 4), 30)
  lengths, calls = counted(requests, 4)
  free = [0] * 4
  for n in lengths:  # a row is taken in the step after its last
    free[free.index(min(free))] += n
  assert calls == [(3, 6)] + [(4, 1)] * max(free)
  waves = lengths.reshape(3, 4).max(1).sum()
  assert max(free) < waves


def test_live_rows_move_together():
  """32 rows, 8 of each prompt; 16, 4 of each, once so few live; then 8, 2 of each."""
  new = np.tile([2, 2, 2, 5, 5, 9, 12, 3], 4)
  sampler = make_sampler(make(Counting, num_layers=1), buckets=4)
  CALLS.clear()
  generate(sampler, ask(np.repeat([0, 1, 2, 3], 8), new, FIVE), spec())
  jax.effects_barrier()
  # After 3 tokens 4 rows of each prompt live, after 5 two; after 9 one, but 8 rows are the fewest.
  assert CALLS == [(4, 6)] + [(32, 1)] * 3 + [(16, 1)] * 2 + [(8, 1)] * 7
  CALLS.clear()
  new[8:] = 2  # of the first prompt 5 rows live then, which need 3 of the 4 groups of 2
  generate(sampler, ask(np.repeat([0, 1, 2, 3], 8), new, FIVE), spec())
  jax.effects_barrier()
  assert CALLS == [(4, 6)] + [(32, 1)] * 2 + [(8, 1)] * 10


def test_caches_grow_as_rows_do(sampler):
  """No more slots than a segment has are looked at before a row needs more."""
  model, seen = make(Counting, num_layers=1), []

  class Noting(Counting):
    def hidden(self, params, inputs, *rest, **more):
      slots = rest[2].position_BS.shape[1]
      jax.debug.callback(functools.partial(seen.append, (inputs.shape[1], slots)))
      return super().hidden(params, inputs, *rest, **more)

  sampler = make_sampler(Noting(**vars(model)), segment=4)
  generate(sampler, ask([0, 1, 2], [20, 3, 30]), spec())
  jax.effects_barrier()
  # The cache of the prompts; then 4, 8, 16 slots, 32 in the end.
  want = [(6, 6)] + [(1, 4)] * 4 + [(1, 8)] * 4 + [(1, 16)] * 8 + [(1, 32)] * 14
  assert seen == want


@pytest.mark.parametrize('cache_dtype', ['auto', 'int8'])
def test_a_program_holds_its_caches_once(cache_dtype):
  """Not in another layout too, nor the int8 of all layers as float32, which is four times it."""
  if cache_dtype == 'int8' and jax.__version_info__ < (0, 11, 2):
    pytest.skip('the compiler for CPUs has no barriers that keep the layers apart')
  sampler = make_sampler(
    make(num_layers=8, head_dim=64, max_position=1024), cache_dtype=cache_dtype, segment=512
  )
  (wave,) = plan.waves(ask(np.zeros(64), 512), 0, 1, 6, 518)
  params = jax.eval_shape(sampler.layout, parameters(sampler.model))
  lowered = sampling.Sampler._sample.lower(sampler, params, wave.arrays, spec(), *wave[2:], 518)
  cache = jax.eval_shape(lambda: sampler.model.init_cache(64, 512, sampler.dtype))
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert held < lowered.compile().memory_analysis().temp_size_in_bytes < 1.5 * held


def test_few_requests_share_their_programs(sampler):
  """5 to 8 groups, or rows, are of one shape, and get the same draws."""
  for width in (1, 2):
    asked = lambda groups, width=width: ask(np.repeat(np.arange(groups) % 5, width), 5, FIVE)
    whole, before = None, 0
    for groups in (8, 7, 6):
      got = generate(sampler, asked(groups), spec(), slots=32)
      if whole is None:
        whole, before = got, sampling.Sampler._sample._cache_size()
      np.testing.assert_array_equal(got.tokens_RS, whole.tokens_RS[: groups * width])
    assert sampling.Sampler._sample._cache_size() == before
    generate(sampler, asked(6), spec())  # all at once: as many as there are
    assert sampling.Sampler._sample._cache_size() == before + 1


def test_a_window_longer_than_the_model(sampler):
  requests = ask([0], 59)  # 6 + 59 > 64
  with pytest.raises(records.UserError, match='prompt of 6.*max_new 59.*64 positions'):
    generate(sampler, requests, spec())
  assert generate(sampler, ask([0], 58), spec()).length_R.tolist() == [59]


# ------------------------------------------------------------------------------------ the stages


def start(sampler, params, tokens_BT, length_B, max_new=S, seed=0):
  """Rows ready to decode, in a window of S."""
  B = len(length_B)
  state = sampler.prefill(params, jnp.asarray(tokens_BT), jnp.asarray(length_B), S)
  max_new_B = jnp.broadcast_to(jnp.asarray(max_new, jnp.int32), (B,))
  return sampler.assign(state, jnp.asarray(keys(np.arange(B), seed)), max_new_B, {})


def first(sampler, params, max_new=S):
  requests = ask([0, 1, 2], 0)
  return start(sampler, params, requests.tokens_PT, requests.length_P, max_new)


def host(state):
  """NumPy copies of what does not belong to the cache."""
  names = ('tokens_BS', 'source_BS', 'logp_BS', 'length_B', 'stop_B')
  return {name: np.array(getattr(state, name)) for name in names}


def assert_same(one, two):
  for name in one:
    np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)


def test_decoding_in_two_pieces_is_decoding_in_one(sampler, params):
  one = host(sampler.decode(params, first(sampler, params), spec(), 8))
  state = sampler.decode(params, first(sampler, params), spec(), 3)
  assert (np.asarray(state.stop_B) == LENGTH).all()
  assert_same(host(sampler.decode(params, state, spec(), 5)), one)


TOOL = np.array([[9, 8, 7, 6], [1, 1, 1, 1], [2, 3, 4, 5]], np.int32)


@pytest.mark.parametrize('counts', [(4, 1, 2), (0, 3, 1)], ids=str)
def test_append_is_a_new_prefill(sampler, params, counts):
  """The same continuation and the same log-probabilities, for any number of tokens per row."""
  before = sampler.decode(params, first(sampler, params), spec(), 4)
  length_B = np.array(before.length_B)
  state = sampler.append(params, before, jnp.asarray(TOOL), jnp.asarray(counts))
  middle = host(state)
  for b, n in enumerate(counts):
    assert middle['length_B'][b] == length_B[b] + n
    span = slice(length_B[b], length_B[b] + n)
    assert middle['tokens_BS'][b, span].tolist() == TOOL[b, :n].tolist()
    assert (middle['source_BS'][b, span] == types.ENVIRONMENT).all()
    assert not middle['logp_BS'][b, span].any() and not middle['tokens_BS'][b, span.stop :].any()
  got = host(sampler.decode(params, state, spec(), 5))

  again = start(sampler, params, middle['tokens_BS'][:, :15], middle['length_B'])
  want = host(sampler.decode(params, again, spec(), 5))
  np.testing.assert_array_equal(got['tokens_BS'], want['tokens_BS'])
  np.testing.assert_array_equal(got['length_B'], middle['length_B'] + 5)
  new = want['source_BS'] == types.POLICY
  assert new.sum() == 15
  np.testing.assert_allclose(got['logp_BS'][new], want['logp_BS'][new], atol=1e-4)
  assert (got['source_BS'][new] == types.POLICY).all()


def test_append_of_one_token_at_a_time(sampler, params):
  """The cache's one-token path: a row that gets nothing must not be disturbed."""
  one = sampler.decode(params, first(sampler, params), spec(), 4)
  two = sampler.decode(params, first(sampler, params), spec(), 4)
  counts = jnp.asarray([2, 0, 1])
  one = sampler.append(params, one, jnp.asarray(TOOL[:, :2]), counts)
  for i in range(2):
    column = jnp.asarray(TOOL[:, i : i + 1])
    two = sampler.append(params, two, column, (counts > i).astype(jnp.int32))
  assert_same(*(host(sampler.decode(params, state, spec(), 5)) for state in (one, two)))


def test_append_wakes_rows_that_ended(sampler, params):
  free = host(sampler.decode(params, first(sampler, params), spec(), 4))
  stop_ids = tuple(int(free['tokens_BS'][b, 2 * b + 2]) for b in (0, 1))  # their second new tokens
  how = spec(stop_ids=stop_ids)
  state = sampler.decode(params, first(sampler, params), how, 4)
  assert np.asarray(state.stop_B)[:2].tolist() == [EOS, EOS]
  length_B = np.array(state.length_B)
  state = sampler.append(params, state, jnp.asarray(TOOL), jnp.asarray([2, 0, 2]))
  state = sampler.decode(params, state, spec(), 4)
  grown = (np.asarray(state.length_B) - length_B).tolist()
  assert grown == [2 + 4, 0, 2 + 4]  # the row that got nothing stays ended
  assert state.stop_B.tolist() == [LENGTH, EOS, LENGTH]


def test_append_at_the_end_of_the_window_or_the_cap(sampler, params):
  """What does not fit is dropped, and no row grows past its cap or its window."""
  state = sampler.decode(params, first(sampler, params, (S, S, 6)), spec(), 17)
  assert state.length_B.tolist() == [18, 20, 11]  # the third stopped at its cap
  wide = jnp.asarray(np.tile(TOOL, (1, 2)))
  state = sampler.append(params, state, wide, jnp.asarray([8, 2, 1]))
  assert state.length_B.tolist() == [24, 22, 12]
  state = sampler.decode(params, state, spec(), 17)
  assert state.length_B.tolist() == [24, 24, 12]
  assert state.stop_B.tolist() == [LENGTH] * 3
  sources = [(np.asarray(state.source_BS)[b] == types.POLICY).sum() for b in range(3)]
  assert sources == [17, 17 + 2, 6]


def test_kept_ids_outlive_the_stages(sampler, params):
  """Decode, append, fork, decode: rows keep their ids, and a forced token has none."""
  how, rows = spec(top_p=0.8, max_kept_tokens=V), np.array([2, 0])
  state = sampler.decode(params, first(sampler, params), how, 4)
  before = np.array(state.kept_BSK)
  state = sampler.append(params, state, jnp.asarray(TOOL), jnp.asarray([4, 1, 2]))
  state = sampler.decode(params, sampler.fork(state, jnp.asarray(rows)), how, 3)
  after, source_BS = np.array(state.kept_BSK), np.array(state.source_BS)
  said = before[rows, :, 0] >= 0
  np.testing.assert_array_equal(after[said], before[rows][said])
  np.testing.assert_array_equal(after[..., 0] >= 0, source_BS == types.POLICY)
  tokens_BS = np.array(state.tokens_BS)
  assert (after == tokens_BS[..., None]).any(-1)[source_BS == types.POLICY].all()


def test_kept_ids_are_of_draws_that_leave_something_out(sampler, params):
  state = sampler.decode(params, first(sampler, params), spec(top_p=0.8, max_kept_tokens=V), 4)
  before, length_B = np.array(state.kept_BSK), np.array(state.length_B)
  state = sampler.decode(params, state, spec(), 4)
  after = np.array(state.kept_BSK)
  for b, n in enumerate(length_B):
    np.testing.assert_array_equal(after[b, :n], before[b, :n])
    assert (after[b, n:] == -1).all()


def test_a_row_that_fills_the_window_stops_no_other(sampler, params):
  tokens = np.tile(np.arange(1, 17, dtype=np.int32), (2, 1))
  state = sampler.prefill(params, jnp.asarray(tokens), jnp.asarray([16, 3]), 16)
  state = sampler.assign(state, jnp.asarray(keys(range(2))), jnp.full(2, 16), {})
  state = sampler.decode(params, state, spec(), 16)
  assert state.length_B.tolist() == [16, 16] and state.stop_B.tolist() == [LENGTH] * 2


def test_fork_is_a_copy(sampler, params):
  """A forked row continues like its origin, wherever it sits; its origin is not disturbed."""
  rows = np.array([2, 0, 0, 1, 2])
  state = sampler.decode(params, first(sampler, params), spec(), 4)
  copy = sampler.fork(state, jnp.asarray(rows))
  for name, x in host(state).items():
    np.testing.assert_array_equal(host(copy)[name], x[rows])
  copy = host(sampler.decode(params, copy, spec(), 5))
  state = host(sampler.decode(params, state, spec(), 5))
  assert_same(copy, {name: x[rows] for name, x in state.items()})


def test_forked_rows_with_new_keys_part(sampler, params):
  state = sampler.fork(first(sampler, params), jnp.asarray([1, 1, 1]))
  state = sampler.assign(state, jnp.asarray(keys(range(3))), jnp.full(3, S), {})
  state = sampler.decode(params, state, spec(), 8)
  assert len(np.unique(np.asarray(state.tokens_BS), axis=0)) == 3


def test_prefill_needs_room(sampler, params):
  with pytest.raises(ValueError, match='30 tokens.*24 slots'):
    sampler.prefill(params, jnp.ones((1, 30), jnp.int32), jnp.asarray([3]), S)


@pytest.mark.parametrize(
  'mesh, how',
  [
    ((2, 2, 1), {}),
    ((1, 2, 2), {}),
    ((2, 2, 1), {'scan_layers': True}),
    ((1, 2, 2), {'scan_layers': True}),
    ((2, 2, 1), {'head_dim': 16}),  # by the kernel for GPUs
  ],
  ids=str,
)
def test_stages_on_several_devices(mesh, how, monkeypatch):
  """Prefill, decode, append, decode, fork: what one device says."""
  plain = make_sampler(make(**how))
  several = make_sampler(plain.model, mesh, segment=4)

  def run(sampler):
    tokens, length = np.zeros((4, 6), np.int32), np.asarray([1, 3, 5, 2], np.int32)
    tokens[:] = np.arange(1, 7)
    params = sampler.layout(parameters(sampler.model))
    put = lambda *x: sharding.put_rows(x, sampler.mesh)
    state = sampler.prefill(params, *put(tokens, length), S)
    state = sampler.assign(state, *put(keys(np.arange(4)), np.full(4, S, np.int32)), {})
    state = sampler.decode(params, state, spec(), 4)
    state = sampler.append(
      params, state, *put(np.vstack([TOOL, TOOL[:1]]), np.asarray([4, 0, 1, 2]))
    )
    state = sampler.fork(state, np.asarray([2, 0, 0, 1]))
    return host(sampler.decode(params, state, spec(), 5))

  want = run(plain)
  if 'head_dim' in how:
    monkeypatch.setattr(decode_attention_gpu, 'INTERPRET', True)
    monkeypatch.setattr(ops, 'decode_backend', lambda *_: 'pallas_gpu')
  assert_same(run(several), want)
